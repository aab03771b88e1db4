//! The counters of routes, rules and endpoints at one moment, and their rates between two.
//!
//! A counter that began again, after a reload, has no rate below zero.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::metrics::{DurationCounts, Label as _};
use crate::pipeline::Snapshot;
use crate::record::CacheResult;
use crate::route::{Route, StatusClass};

/// Counters of one route.
#[derive(Clone, Default)]
pub(super) struct RouteCounts {
    responses: u64,
    client_errors: u64,
    errors: u64,
    degraded: u64,
    hits: u64,
    lookups: u64,
    durations: DurationCounts,
}

impl RouteCounts {
    fn take(route: &Route) -> Self {
        let counters = &route.counters;
        let of_class = |class| counters.responses.get(class);
        let sum = |is_counted: fn(CacheResult) -> bool| {
            let counted = CacheResult::ALL.iter().copied().filter(|result| is_counted(*result));
            counted.map(|result| counters.cache_results.get(result)).sum()
        };
        let responses = StatusClass::ALL.iter().map(|class| of_class(*class)).sum();
        RouteCounts {
            responses,
            client_errors: of_class(StatusClass::ClientError),
            errors: of_class(StatusClass::ServerError),
            degraded: counters.degraded.get(),
            hits: sum(is_hit),
            lookups: sum(|result| result != CacheResult::Bypass),
            // Hundreds of cells, which a route without a request need not read.
            durations: if responses == 0 { DurationCounts::default() } else { counters.duration.counts() },
        }
    }

    pub(super) fn since(&self, earlier: &RouteCounts) -> RouteCounts {
        RouteCounts {
            responses: self.responses.saturating_sub(earlier.responses),
            client_errors: self.client_errors.saturating_sub(earlier.client_errors),
            errors: self.errors.saturating_sub(earlier.errors),
            degraded: self.degraded.saturating_sub(earlier.degraded),
            hits: self.hits.saturating_sub(earlier.hits),
            lookups: self.lookups.saturating_sub(earlier.lookups),
            durations: self.durations.since(&earlier.durations),
        }
    }

    fn add(&mut self, other: &RouteCounts) {
        self.responses += other.responses;
        self.client_errors += other.client_errors;
        self.errors += other.errors;
        self.degraded += other.degraded;
        self.hits += other.hits;
        self.lookups += other.lookups;
        self.durations.add(&other.durations);
    }
}

/// As the Grafana dashboard counts them.
fn is_hit(result: CacheResult) -> bool {
    matches!(
        result,
        CacheResult::Hit | CacheResult::Remote | CacheResult::Stale | CacheResult::Revalidated | CacheResult::Collapsed
    )
}

/// Evaluations of one rule: passed, denied, and those that shadow mode would have denied.
pub(super) type RuleCounts = [u64; 3];
/// Calls of one endpoint, those of them that failed, and the bytes sent and received.
pub(super) type CallCounts = [u64; 4];

/// The counters at one moment, by name.
pub(super) struct CounterSample {
    pub(super) at: Instant,
    pub(super) routes: HashMap<Arc<str>, RouteCounts>,
    pub(super) rules: HashMap<Arc<str>, RuleCounts>,
    /// By upstream and endpoint.
    pub(super) endpoints: HashMap<(String, String), CallCounts>,
}

impl CounterSample {
    pub(super) fn take(snapshot: &Snapshot) -> Self {
        let routes = snapshot.routes.iter().map(|route| (Arc::clone(&route.config.name), RouteCounts::take(route)));
        let endpoints = snapshot.upstreams.iter().flat_map(|upstream| {
            let endpoints = upstream.endpoints();
            let calls = endpoints.list().iter().map(|endpoint| {
                let (calls, failures) = endpoint.calls();
                let (sent, received) = endpoint.bytes();
                let counts = [calls, failures, sent, received];
                ((upstream.config().name.to_string(), endpoint.name.to_string()), counts)
            });
            calls.collect::<Vec<_>>()
        });
        CounterSample {
            at: Instant::now(),
            routes: routes.collect(),
            rules: snapshot.limits.rule_counts().collect(),
            endpoints: endpoints.collect(),
        }
    }

    /// The differences of all routes together, and the denials of all rules.
    pub(super) fn totals_since(&self, earlier: &CounterSample) -> (RouteCounts, u64) {
        let mut total = RouteCounts::default();
        for (name, counts) in &self.routes {
            total.add(&counts.since(earlier.routes.get(name).unwrap_or(&RouteCounts::default())));
        }
        let denied = self
            .rules
            .iter()
            .map(|(name, counts)| counts[1].saturating_sub(earlier.rules.get(name).copied().unwrap_or_default()[1]));
        (total, denied.sum())
    }
}

/// The rates of one route, or of all, as the dashboard shows them. Absent values are `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct RequestRates {
    pub(super) requests: f64,
    pub(super) client_errors: f64,
    pub(super) errors: f64,
    pub(super) degraded: f64,
    pub(super) hit_ratio: Option<f64>,
    pub(super) p50_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
}

impl RequestRates {
    pub(super) fn of(counts: &RouteCounts, seconds: f64) -> Self {
        let rate = |count: u64| per_second(count, seconds);
        let quantile = |part| counts.durations.quantile(part).map(|time| round(time.as_secs_f64() * 1e3, 2));
        RequestRates {
            requests: rate(counts.responses),
            client_errors: rate(counts.client_errors),
            errors: rate(counts.errors),
            degraded: rate(counts.degraded),
            hit_ratio: (counts.lookups > 0).then(|| round(counts.hits as f64 / counts.lookups as f64, 4)),
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
        }
    }

    pub(super) fn to_json(self) -> serde_json::Value {
        serde_json::json!({
            "requests_per_second": self.requests,
            "client_errors_per_second": self.client_errors,
            "errors_per_second": self.errors,
            "degraded_per_second": self.degraded,
            "hit_ratio": self.hit_ratio,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
        })
    }
}

/// A rate with two decimals. Zero for a time that is too short for a rate.
pub(super) fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds < 0.1 { 0.0 } else { round(count as f64 / seconds, 2) }
}

fn round(value: f64, decimals: i32) -> f64 {
    let scale = 10_f64.powi(decimals);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_differences() {
        let counts =
            |responses, errors, hits| RouteCounts { responses, errors, hits, lookups: hits, ..Default::default() };
        let rates = RequestRates::of(&counts(30, 3, 15).since(&counts(10, 1, 0)), 4.0);
        assert_eq!((rates.requests, rates.errors, rates.hit_ratio), (5.0, 0.5, Some(1.0)));
        let restarted = RequestRates::of(&counts(1, 0, 0).since(&counts(10, 1, 0)), 4.0);
        assert_eq!(restarted, RequestRates::default());
        let histogram = crate::metrics::Histogram::default();
        histogram.observe(std::time::Duration::from_millis(3));
        let first = RouteCounts { responses: 1, durations: histogram.counts(), ..Default::default() };
        let rates = RequestRates::of(&first.since(&RouteCounts::default()), 4.0);
        assert!(rates.p50_ms.is_some_and(|millis| (2.5..=3.8).contains(&millis)), "{rates:?}");
        assert_eq!(RequestRates::of(&RouteCounts::default().since(&RouteCounts::default()), 4.0).p50_ms, None);
        assert_eq!(per_second(7, 0.0), 0.0);
    }
}
