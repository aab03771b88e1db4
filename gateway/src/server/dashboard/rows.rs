//! The rows of the dashboard's tables as JSON: routes, endpoints, limits, shards.

use std::cmp::Reverse;
use std::time::Instant;

use serde_json::{Value, json};
use shard::{ShardBreakerState, ShardReport};

use super::super::bounded_lists::{self, ROUTES_MAX};
use super::sample::{CounterSample, RequestRates, RouteCounts, per_second};
use crate::limit::{self, LimitConfig};
use crate::pipeline::Snapshot;
use crate::route::Route;

/// Two samples, with the seconds between them.
pub(super) struct SamplePair<'s> {
    pub(super) earlier: &'s CounterSample,
    pub(super) current: &'s CounterSample,
}

impl SamplePair<'_> {
    pub(super) fn seconds(&self) -> f64 {
        self.current.at.duration_since(self.earlier.at).as_secs_f64()
    }

    fn route(&self, name: &str) -> RequestRates {
        let none = RouteCounts::default();
        let of = |sample: &CounterSample| sample.routes.get(name).unwrap_or(&none).clone();
        RequestRates::of(&of(self.current).since(&of(self.earlier)), self.seconds())
    }

    /// The rate of two counters: those of `current`, less those of `earlier`.
    fn rate(&self, [current, earlier]: [u64; 2]) -> f64 {
        per_second(current.saturating_sub(earlier), self.seconds())
    }
}

/// The routes that are shown, those with most requests, and the number of those that are not.
pub(super) fn routes(snapshot: &Snapshot, samples: &SamplePair<'_>) -> (Vec<Value>, usize) {
    let mut routes: Vec<_> = snapshot.routes.iter().map(|route| (route, samples.route(&route.config.name))).collect();
    let hidden = routes.len().saturating_sub(ROUTES_MAX);
    if hidden > 0 {
        routes.sort_by_key(|(_, rates)| Reverse((rates.requests * 100.0) as u64));
        routes.truncate(ROUTES_MAX);
        routes.sort_by_key(|(route, _)| route.index);
    }
    (routes.into_iter().map(|(route, rates)| route_row(route, rates)).collect(), hidden)
}

fn route_row(route: &Route, rates: RequestRates) -> Value {
    let (mut row, mut rates) = (bounded_lists::route_row(route), rates.to_json());
    if let (Value::Object(row), Value::Object(rates)) = (&mut row, &mut rates) {
        row.append(rates);
    }
    row
}

/// The upstreams that are shown with their endpoints and the rates of these, and the number of
/// those that are not.
pub(super) fn upstreams(snapshot: &Snapshot, samples: &SamplePair<'_>) -> (Vec<Value>, usize) {
    let (upstreams, hidden) = bounded_lists::upstreams(snapshot);
    (upstreams.into_iter().map(|upstream| upstream_row(upstream, samples)).collect(), hidden)
}

fn upstream_row(mut upstream: Value, samples: &SamplePair<'_>) -> Value {
    let name = upstream["name"].as_str().unwrap_or_default().to_owned();
    let Some(endpoints) = upstream["endpoints"].as_array_mut() else { return upstream };
    for endpoint in endpoints {
        let key = (name.clone(), endpoint["name"].as_str().unwrap_or_default().to_owned());
        let counts = |sample: &CounterSample| sample.endpoints.get(&key).copied().unwrap_or_default();
        let (current, earlier) = (counts(samples.current), counts(samples.earlier));
        let rates = ["calls", "failures", "bytes_sent", "bytes_received"].map(|name| format!("{name}_per_second"));
        for (index, key) in rates.iter().enumerate() {
            endpoint[key] = json!(samples.rate([current[index], earlier[index]]));
        }
    }
    upstream
}

/// The rules with their rates, and the denied callers. Callers are named by the hash that the
/// access log has.
pub(super) fn limits(snapshot: &Snapshot, config: &LimitConfig, samples: &SamplePair<'_>) -> Value {
    let mut list = limit::list_rules(&snapshot.limiter, config);
    for rule in list["rules"].as_array_mut().into_iter().flatten() {
        let name = rule["name"].as_str().unwrap_or_default().to_owned();
        let counts = |sample: &CounterSample| sample.rules.get(&*name).copied().unwrap_or_default();
        let (current, earlier) = (counts(samples.current), counts(samples.earlier));
        for (index, key) in ["passed_per_second", "denied_per_second", "shadow_denied_per_second"].iter().enumerate() {
            rule[key] = json!(samples.rate([current[index], earlier[index]]));
        }
        let lease = snapshot.limiter.leases().find(|(rule, _)| ***rule == *name);
        rule["local_fallback"] = json!(lease.map(|(_, lease)| limit::is_local_fallback(lease)));
    }
    list
}

/// The state of a shard.
pub(super) fn shard_row(shard: &ShardReport) -> Value {
    let states = [("read", shard.reads), ("read_large", shard.large_reads), ("write", shard.writes)];
    let failing: Vec<&str> =
        states.iter().filter(|(_, state)| *state != ShardBreakerState::Closed).map(|(name, _)| *name).collect();
    let faults = [&shard.read_faults, &shard.large_read_faults, &shard.write_faults, &shard.bus_faults];
    let latest = |faults: &&shard::ShardFaultCounts| faults.most_frequent_since(&shard::ShardFaultCounts::default());
    let fault = faults.iter().find_map(latest).map(|fault| fault.name());
    let is_up = failing.is_empty() && shard.is_subscribed;
    json!({
        "region": shard.region.as_str(),
        "endpoint": shard.endpoint,
        "state": if is_up { "up" } else { "down" },
        "failing": failing,
        "subscribed": shard.is_subscribed,
        "fault": fault.filter(|_| !is_up),
        "hits": shard.counts.hits,
        "misses": shard.counts.misses,
    })
}

/// The last sample that is old enough for rates, out of the newest and the one before.
pub(super) fn baseline(samples: [&CounterSample; 2], now: Instant) -> &CounterSample {
    let [newest, before] = samples;
    // Rates of a shorter time are mostly noise.
    let is_old_enough = now.duration_since(newest.at).as_secs_f64() >= 4.0;
    if is_old_enough { newest } else { before }
}
