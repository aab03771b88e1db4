//! Builds stores and sites from a configuration, carrying over what a reload must not reset, and exposes their metrics.

use std::sync::Arc;
use std::time::Instant;

use limiter::Cost;
use shard::{BreakerState, LocalSettings, Store, StoreError};

use super::Shared;
use crate::breaker::Breaker;
use crate::cache::stored::Meta;
use crate::config::Config;
use crate::identify::Identity;
use crate::limit;
use crate::metrics::{self, Label as _};
use crate::pipeline::Site;
use crate::route::{Route, Routes, StatusClass};
use crate::upstream::Upstream;

pub(super) fn store(config: &Config) -> Result<Arc<Store<Meta>>, StoreError> {
    let memory_bytes = usize::try_from(config.cache.memory_bytes).unwrap_or(usize::MAX);
    Store::new(LocalSettings { memory_bytes, hot_rate: config.cache.hot_rate }, config.remote.clone())
}

/// A number that no other gateway of a fleet has.
pub(super) fn process_identity() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds this state from the system's randomness.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// Builds a site. Breakers and counts of routes, the upstreams and the limits of `old` live on where their settings are the same.
pub(super) fn site(
    config: &Config,
    store: &Arc<Store<Meta>>,
    identity: u64,
    old: Option<&Site>,
) -> Result<Site, limiter::RuleError> {
    let has_treasury = store.has_default_region();
    let (limiter, limits) = limit::build(&config.limit, identity, has_treasury, old.map(|old| &old.limiter))?;
    let upstreams: Vec<Arc<Upstream>> = config
        .upstreams
        .iter()
        .map(|settings| {
            let kept = old.and_then(|old| old.routes.iter().find(|route| route.upstream.settings() == settings));
            kept.map_or_else(|| Arc::new(Upstream::new(settings.clone())), |route| Arc::clone(&route.upstream))
        })
        .collect();
    let mut routes = Vec::new();
    for settings in &config.routes {
        let upstream = Arc::clone(&upstreams[settings.upstream]);
        let kept = old.and_then(|old| old.routes.iter().find(|route| route.settings.name == settings.name));
        let breaker = kept.filter(|route| {
            *route.breaker.settings() == upstream.settings().breaker
                && route.upstream.settings().endpoints == upstream.settings().endpoints
        });
        let breaker = breaker.map_or_else(
            || Arc::new(Breaker::new(upstream.settings().breaker.clone(), Instant::now())),
            |route| Arc::clone(&route.breaker),
        );
        let names: Vec<_> = settings.limits.iter().flat_map(|index| config.limit.rules[*index].names()).collect();
        let rules = limiter.rule_set(names.iter().map(|name| &**name))?;
        let cost = Cost::new(settings.cost);
        rules.check_cost(cost)?;
        let counts = kept.map(|route| Arc::clone(&route.counts)).unwrap_or_default();
        routes.push(Route { settings: settings.clone(), index: routes.len(), upstream, breaker, rules, cost, counts });
    }
    let tiers = config.limit.weights.iter().map(|(name, _)| name.clone()).collect();
    Ok(Site {
        identity: Identity::new(config.identify.clone(), tiers),
        routes: Routes::new(routes),
        limits,
        limiter,
        cache: config.cache.clone(),
        http: config.http.clone(),
    })
}

/// Registers what is read from the site and the stores at scrape time.
pub(super) fn expose(shared: &Arc<Shared>) {
    expose_routes(shared);
    expose_stores(shared);
}

fn expose_routes(shared: &Arc<Shared>) {
    let info = Arc::clone(shared);
    metrics::expose_gauge_with("tidegate_info", "1; version and node are in the labels.", move |emit| {
        emit(&[("version", env!("CARGO_PKG_VERSION")), ("node", &info.config.load().server.node)], 1.0);
    });
    let limits = Arc::clone(shared);
    metrics::expose_gauge_with(
        "tidegate_limit_on_share",
        "1 where a cluster limit runs on this node's share instead of the common bucket.",
        move |emit| {
            for (rule, lease) in limits.site.load().limiter.leases() {
                emit(&[("rule", rule)], f64::from(u8::from(limit::is_on_share(lease))));
            }
        },
    );
    let routes = Arc::clone(shared);
    metrics::expose_counter_with("tidegate_route_answers", "Answers by route and class of status.", move |emit| {
        for route in routes.site.load().routes.iter() {
            for class in StatusClass::ALL {
                let labels = [("route", &*route.settings.name), ("status_class", class.as_str())];
                emit(&labels, route.counts.answers.get(*class));
            }
        }
    });
    let routes = Arc::clone(shared);
    metrics::expose_counter_with("tidegate_route_degraded", "Answers from the degrade ladder.", move |emit| {
        for route in routes.site.load().routes.iter() {
            emit(&[("route", &route.settings.name)], route.counts.degraded.get());
        }
    });
    let routes = Arc::clone(shared);
    metrics::expose_gauge_with("tidegate_breaker_state", "0 closed, 1 half-open, 2 open.", move |emit| {
        for route in routes.site.load().routes.iter() {
            let state = match route.breaker.state() {
                crate::breaker::State::Closed => 0.0,
                crate::breaker::State::HalfOpen => 1.0,
                crate::breaker::State::Open => 2.0,
            };
            emit(&[("route", &route.settings.name)], state);
        }
    });
}

fn expose_stores(shared: &Arc<Shared>) {
    let store = Arc::clone(&shared.store);
    metrics::expose_gauge_with("tidegate_cache_local_bytes", "Weight of the local tier.", move |emit| {
        emit(&[], store.local_report().weight_bytes as f64);
    });
    let store = Arc::clone(&shared.store);
    metrics::expose_gauge_with(
        "tidegate_shard_open",
        "1 where a shard's breaker is open; lane `bus`: where its changes are not being told, so that it is not read.",
        move |emit| {
            for shard in store.shards() {
                let is_open = |state| state == BreakerState::Open;
                let lanes = [
                    ("read", is_open(shard.reads)),
                    ("read_large", is_open(shard.large)),
                    ("write", is_open(shard.writes)),
                    ("bus", !shard.is_watched),
                ];
                for (lane, is_open) in lanes {
                    emit(
                        &[("region", shard.region.as_str()), ("endpoint", &shard.endpoint), ("lane", lane)],
                        f64::from(u8::from(is_open)),
                    );
                }
            }
        },
    );
    let store = Arc::clone(&shared.store);
    metrics::expose_counter_with(
        "tidegate_shard_reads",
        "Reads of the remote tier by shard and result.",
        move |emit| {
            for shard in store.shards() {
                let (region, endpoint) = (shard.region.to_string(), shard.endpoint.to_string());
                let mut tell = |result: &str, count| {
                    emit(&[("region", &region), ("endpoint", &endpoint), ("result", result)], count);
                };
                tell("hit", shard.counts.hits);
                tell("miss", shard.counts.misses);
                tell("expired", shard.counts.expired);
                tell("corrupt", shard.counts.corrupt);
                tell("foreign", shard.counts.foreign);
                tell("purged", shard.counts.purged);
                for (fault, count) in shard.read_faults.iter() {
                    tell(fault.name(), count + shard.large_faults.of(fault));
                }
            }
        },
    );
    let store = Arc::clone(&shared.store);
    metrics::expose_gauge_with(
        "tidegate_clock_offset_seconds",
        "This machine's wall clock, less the clock that counts.",
        move |emit| emit(&[], store.clock_offset()),
    );
    let store = Arc::clone(&shared.store);
    metrics::expose_gauge_with("tidegate_hot_keys", "Keys that are hot.", move |emit| {
        emit(&[], store.hot_keys().len() as f64);
    });
    let bus = Arc::clone(&shared.bus);
    metrics::expose_counter_with("tidegate_bus", "What the bus of the fleet brought, by kind.", move |emit| {
        let report = bus.report();
        let counts = [
            ("purge_heard", report.heard),
            ("notice_heard", report.notices),
            ("entry_changed", report.changes),
            ("sight_lost", report.losses),
        ];
        for (kind, count) in counts {
            emit(&[("kind", kind)], count);
        }
    });
    let bus = Arc::clone(&shared.bus);
    metrics::expose_gauge_with("tidegate_purges_pending", "Purges that no server could be told yet.", move |emit| {
        emit(&[], bus.report().pending as f64);
    });
    let store = Arc::clone(&shared.store);
    metrics::expose_counter_with(
        "tidegate_shard_writes",
        "Writes to the remote tier by shard and result.",
        move |emit| {
            for shard in store.shards() {
                let (region, endpoint) = (shard.region.to_string(), shard.endpoint.to_string());
                let mut tell = |result: &str, count| {
                    emit(&[("region", &region), ("endpoint", &endpoint), ("result", result)], count);
                };
                tell("stored", shard.counts.stored);
                tell("removed", shard.counts.removed);
                tell("oversize", shard.counts.oversize);
                tell("dropped", shard.counts.dropped_stores + shard.counts.dropped_removals);
                shard.write_faults.iter().for_each(|(fault, count)| tell(fault.name(), count));
            }
        },
    );
    let store = Arc::clone(&shared.store);
    metrics::expose_counter_with(
        "tidegate_shard_bus_faults",
        "What went wrong with the connections that tell of changes, by shard.",
        move |emit| {
            for shard in store.shards() {
                let (region, endpoint) = (shard.region.to_string(), shard.endpoint.to_string());
                for (fault, count) in shard.bus_faults.iter() {
                    emit(&[("region", &region), ("endpoint", &endpoint), ("fault", fault.name())], count);
                }
            }
        },
    );
}
