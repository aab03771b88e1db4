//! Builds the store and the snapshots from a configuration and carries over the state that a reload
//! must not reset.

use std::sync::Arc;
use std::time::Instant;

use limiter::Cost;
use shard::{LocalConfig, Store, StoreConfigError};

use crate::breaker::{Breaker, BreakerName, BreakerScope};
use crate::cache::stored::CacheMeta;
use crate::config::Config;
use crate::event::Event;
use crate::http::upstream_connection::set_http2_memory;
use crate::identify::CallerIdentifier;
use crate::identify::auth::Authenticator;
use crate::limit;
use crate::pipeline::Snapshot;
use crate::route::{ForwardAuth, Mirror, Route, RouteAction, RouteTarget, Routes};
use crate::spans::{TraceExporter, TracingConfig};
use crate::upstream::{Upstream, UpstreamConfig};

pub(super) fn store(config: &Config) -> Result<Arc<Store<CacheMeta>>, StoreConfigError> {
    let memory_bytes = usize::try_from(config.cache.memory_bytes).unwrap_or(usize::MAX);
    Store::new(LocalConfig { memory_bytes, hot_rate: config.cache.hot_rate }, config.remote.clone())
}

/// A random number: of this process in a fleet, or a seed.
pub(super) fn random_number() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds this state from the system's randomness.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// Builds a snapshot. Takes upstreams, breakers, counters of routes and limits over from `old`
/// where their configuration is unchanged.
pub(super) fn snapshot(
    config: &Config,
    store: &Arc<Store<CacheMeta>>,
    lease_node: u64,
    old: Option<&Snapshot>,
) -> Result<Snapshot, limiter::RuleError> {
    let has_lease_backend = store.has_default_region();
    let (limiter, limits) = limit::build(&config.limit, lease_node, has_lease_backend, old.map(|old| &old.limiter))?;
    let upstreams: Vec<Arc<Upstream>> = config
        .upstreams
        .iter()
        .map(|upstream| {
            let upstream = UpstreamConfig { own_zone: config.server.zone.clone(), ..upstream.clone() };
            let old = old.and_then(|old| old.upstreams.iter().find(|old| old.config().name == upstream.name));
            match old {
                Some(old) if *old.config() == upstream => Arc::clone(old),
                old => Arc::new(Upstream::new(upstream, old.map(|old| &**old))),
            }
        })
        .collect();
    let mut routes: Vec<Route> = Vec::new();
    for route in &config.routes {
        let upstream = (route.action == RouteAction::Forward).then(|| Arc::clone(&upstreams[route.upstream]));
        let target_of = |upstream: Arc<Upstream>| {
            let breaker = breaker_of(&route.name, &upstream, (&routes, old));
            RouteTarget { upstream, breaker }
        };
        let target = upstream.map(target_of);
        let canary = route.canary.as_ref().map(|canary| target_of(Arc::clone(&upstreams[canary.upstream])));
        let previous_route = old.and_then(|old| old.routes.iter().find(|old| old.config.name == route.name));
        let names: Vec<_> = route.limits.iter().flat_map(|index| config.limit.rules[*index].names()).collect();
        let rules = limiter.rule_set(names.iter().map(|name| &**name))?;
        let cost = Cost::new(route.cost);
        rules.check_cost(cost)?;
        let counters = previous_route.map(|old| Arc::clone(&old.counters)).unwrap_or_default();
        let mirror = route.mirror.as_ref().map(|mirror| {
            let upstream = Arc::clone(&upstreams[mirror.upstream]);
            Mirror::new(upstream, mirror.percent, Arc::clone(&counters.mirrored))
        });
        let authenticator = route.auth.as_ref().map(|config| {
            let old = previous_route.and_then(|old| old.authenticator.as_ref());
            let kept = old.filter(|old| old.config() == config);
            kept.map_or_else(|| Arc::new(Authenticator::new(config.clone(), old.map(|old| &**old))), Arc::clone)
        });
        let forward_auth = route.forward_auth.as_ref().map(|config| {
            let target = target_of(Arc::clone(&upstreams[config.upstream]));
            let old = previous_route.and_then(|old| old.forward_auth.as_ref());
            ForwardAuth::replacing(old, config, target)
        });
        let index = routes.len();
        let key = route.key();
        routes.push(Route {
            config: route.clone(),
            index,
            key,
            target,
            canary,
            mirror,
            rules,
            cost,
            counters,
            authenticator,
            forward_auth,
        });
    }
    set_http2_memory(config.http.http2_memory);
    let user_classes = config.limit.weights.iter().map(|(name, _)| name.clone()).collect();
    Ok(Snapshot {
        identity: CallerIdentifier::replacing(old.map(|old| &old.identity), config.identify.clone(), user_classes),
        routes: Routes::new(routes),
        upstreams,
        class_weights: config.limit.weights.iter().map(|(_, weight)| (weight * 1_000.0) as u32).collect(),
        limits,
        limiter,
        cache: config.cache.clone(),
        pages: config.pages.clone(),
        log: config.log.format.clone(),
        tracing: config.tracing.as_ref().and_then(|tracing| exporter(tracing, config, old)),
        generation: old.map_or(0, |old| old.generation) + 1,
        http: config.http.clone(),
    })
}

/// The exporter of spans. A process that cannot start its thread does not trace.
fn exporter(tracing: &TracingConfig, config: &Config, old: Option<&Snapshot>) -> Option<Arc<TraceExporter>> {
    let old = old.and_then(|old| old.tracing.as_ref());
    let exporter = TraceExporter::replacing(old, tracing, &config.server.node);
    exporter.inspect_err(|error| Event::TraceExportFailed { url: &tracing.url, spans: 0, error }.emit()).ok()
}

/// The breaker of a route: that of its upstream if an earlier route has made it, that of `old` if
/// nothing has changed, or a new one.
fn breaker_of(
    route: &Arc<str>,
    upstream: &Arc<Upstream>,
    (earlier, old): (&[Route], Option<&Snapshot>),
) -> Arc<Breaker> {
    let config = &upstream.config().breaker;
    let own = (config.scope == BreakerScope::Route).then(|| Arc::clone(route));
    let name = BreakerName { route: own, upstream: Arc::clone(&upstream.config().name) };
    let has_name = |target: &&RouteTarget| *target.breaker.name() == name;
    if let Some(target) = earlier.iter().flat_map(Route::targets).find(has_name) {
        return Arc::clone(&target.breaker);
    }
    let old = old.and_then(|old| old.routes.iter().flat_map(Route::targets).find(has_name));
    match old {
        Some(RouteTarget { breaker, upstream: before })
            if breaker.config() == config && before.config().endpoints == upstream.config().endpoints =>
        {
            Arc::clone(breaker)
        }
        Some(RouteTarget { breaker, .. }) => {
            Arc::new(breaker.replaced(config.clone(), Instant::now(), random_number()))
        }
        None => Arc::new(Breaker::new(name, config.clone(), Instant::now(), random_number())),
    }
}
