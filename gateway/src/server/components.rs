//! Parts of the process that the admin address reports: the degraded ones, and the hot keys.

use std::time::Instant;

use serde_json::json;
use shard::{ShardBreakerState, ShardReport};

use super::breakers;
use super::state::SharedState;
use crate::cache::key;
use crate::tls::RefusedCertificate;

/// Components that are named. Thousands of endpoints may be out, and each probe and each reader of
/// the dashboard gets the list.
const DEGRADED_MAX: usize = 200;

/// Names the refused files of certificates, the breakers that reject calls, the shards whose
/// breakers are not closed, the names whose addresses cannot be looked up, and the endpoints that
/// are out; of more than `DEGRADED_MAX`, the number of the rest.
pub(super) fn degraded_components(shared: &SharedState) -> Vec<String> {
    let snapshot = shared.snapshot.load();
    let rejecting = breakers::list(&snapshot).into_iter().filter(|breaker| breaker.is_rejecting());
    let breakers = rejecting.map(|breaker| match &breaker.name().route {
        Some(route) => format!("breaker {route}"),
        None => format!("breaker of upstream {}", breaker.name().upstream),
    });
    let is_degraded = |shard: &ShardReport| {
        let breakers = [shard.reads, shard.large_reads, shard.writes];
        breakers.iter().any(|state| *state != ShardBreakerState::Closed) || !shard.is_subscribed
    };
    let shards = shared.store.shard_reports().filter(is_degraded);
    let shards = shards.map(|shard| format!("shard {} {}", shard.region, shard.endpoint));
    let endpoints = snapshot.upstreams.iter().flat_map(|upstream| {
        let endpoints = upstream.endpoints();
        let out = endpoints.list().iter().filter(|endpoint| endpoint.out(Instant::now()).is_some());
        out.map(|endpoint| format!("endpoint {} {}", upstream.config().name, endpoint.name)).collect::<Vec<_>>()
    });
    let lookups = snapshot.upstreams.iter().flat_map(|upstream| {
        let of = |name| format!("lookup {} {name}", upstream.config().name);
        upstream.failing_names().into_iter().map(of).collect::<Vec<_>>()
    });
    let certificates = refused_certificates(shared);
    let certificates = certificates.iter().map(|refused| format!("certificate {}", refused.file.display()));
    let mut components = certificates.chain(breakers).chain(shards).chain(lookups).chain(endpoints);
    let mut named: Vec<String> = components.by_ref().take(DEGRADED_MAX).collect();
    match components.count() {
        0 => {}
        rest => named.push(format!("{rest} more")),
    }
    named
}

/// The files with certificates that the last reload has refused, each once: listeners may share
/// one.
pub(super) fn refused_certificates(shared: &SharedState) -> Vec<RefusedCertificate> {
    let mut refused: Vec<RefusedCertificate> = Vec::new();
    for terminator in shared.tls_terminators.iter().flatten() {
        for file in terminator.refused().iter() {
            if !refused.contains(file) {
                refused.push(file.clone());
            }
        }
    }
    refused
}

/// The hot keys, the hottest first.
pub(super) fn hot_keys(shared: &SharedState) -> serde_json::Value {
    let keys: Vec<_> = shared
        .store
        .hot_keys()
        .iter()
        .map(|hot| json!({ "key": key::display(&hot.key.as_key()), "per_second": hot.per_second.round() }))
        .collect();
    json!({ "threshold_per_second": shared.store.hot_rate(), "keys": keys })
}
