//! The routes, upstreams and breakers that views show: a bounded number of rows, and how many there
//! are besides them.

use std::time::Instant;

use serde_json::{Value, json};

use super::breakers::{self, BREAKERS_MAX};
use crate::breaker::BreakerState;
use crate::pipeline::Snapshot;
use crate::route::Route;

/// Routes that are shown: a page of more is not read, and is sent every second.
pub(super) const ROUTES_MAX: usize = 200;
/// Upstreams that are shown.
const UPSTREAMS_MAX: usize = 200;
/// Endpoints of each upstream that are shown.
const ENDPOINTS_MAX: usize = 200;
/// Endpoints of all upstreams that are shown: a row has about 400 bytes, and is sent every second.
const ALL_ENDPOINTS_MAX: usize = 4_000;

/// The breakers that are shown, those that reject calls first, and the number of those that are
/// not.
pub(super) fn breakers(snapshot: &Snapshot) -> (Vec<Value>, usize) {
    let (breakers, hidden) = first_of(breakers::list(snapshot), BREAKERS_MAX, |breaker| !breaker.is_rejecting());
    let now = Instant::now();
    (breakers.into_iter().map(|breaker| breaker.to_json(now)).collect(), hidden)
}

/// The routes that are shown, those whose breaker is not closed first, and the number of those that
/// are not.
pub(super) fn routes(snapshot: &Snapshot) -> (Vec<Value>, usize) {
    let is_closed =
        |route: &&Route| route.target.as_ref().is_none_or(|target| target.breaker.state() == BreakerState::Closed);
    let (mut routes, hidden) = first_of(snapshot.routes.iter().collect(), ROUTES_MAX, is_closed);
    routes.sort_by_key(|route| route.index);
    (routes.into_iter().map(route_row).collect(), hidden)
}

/// At most `max` of `rows`, those that come last only if there is room, and the number of the rest.
fn first_of<T>(mut rows: Vec<T>, max: usize, comes_last: impl Fn(&T) -> bool) -> (Vec<T>, usize) {
    let hidden = rows.len().saturating_sub(max);
    if hidden > 0 {
        rows.sort_by_cached_key(comes_last);
        rows.truncate(max);
    }
    (rows, hidden)
}

/// The name of a route, of its upstreams and the state of its breaker.
pub(super) fn route_row(route: &Route) -> Value {
    json!({
        "name": &*route.config.name,
        "upstream": route.target.as_ref().map(|target| &*target.upstream.config().name),
        "canary": route.canary.as_ref().map(|target| &*target.upstream.config().name),
        "mirror": route.mirror.as_ref().map(|mirror| &*mirror.upstream.config().name),
        "breaker": route.target.as_ref().map(|target| target.breaker.state().as_str()),
    })
}

/// The upstreams that are shown, those with an endpoint out of use first, and the number of those
/// that are not. `endpoints_hidden` of each counts its endpoints that are not shown.
pub(super) fn upstreams(snapshot: &Snapshot) -> (Vec<Value>, usize) {
    let upstreams = snapshot.upstreams.iter().map(|upstream| upstream.to_json()).collect();
    bound_upstreams(upstreams, ALL_ENDPOINTS_MAX)
}

fn bound_upstreams(upstreams: Vec<Value>, mut endpoints_left: usize) -> (Vec<Value>, usize) {
    let is_in_use = |endpoint: &Value| endpoint["reason"].is_null();
    let is_intact = |upstream: &Value| upstream["endpoints"].as_array().is_none_or(|all| all.iter().all(is_in_use));
    let (mut upstreams, hidden) = first_of(upstreams, UPSTREAMS_MAX, is_intact);
    // Those out of use of all upstreams come before those in use of any.
    let mut shown = vec![0; upstreams.len()];
    for counts in [|endpoint: &Value| !endpoint["reason"].is_null(), |_: &Value| true] {
        for (upstream, shown) in upstreams.iter().zip(&mut shown) {
            let count = upstream["endpoints"].as_array().map_or(0, |all| all.iter().filter(|row| counts(row)).count());
            let more = count.min(ENDPOINTS_MAX).saturating_sub(*shown).min(endpoints_left);
            *shown += more;
            endpoints_left -= more;
        }
    }
    for (upstream, shown) in upstreams.iter_mut().zip(shown) {
        let Some(endpoints) = upstream["endpoints"].as_array_mut() else { continue };
        let hidden = endpoints.len() - shown;
        if hidden > 0 {
            endpoints.sort_by_key(is_in_use);
            endpoints.truncate(shown);
        }
        upstream["endpoints_hidden"] = json!(hidden);
    }
    (upstreams, hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An upstream with that many endpoints, the last of which is out of use or not.
    fn upstream(name: usize, endpoints: usize, is_intact: bool) -> Value {
        let row = |index: usize| {
            let reason = (!is_intact && index + 1 == endpoints).then_some("refused");
            json!({ "name": index, "reason": reason })
        };
        json!({ "name": name, "endpoints": (0..endpoints).map(row).collect::<Vec<_>>() })
    }

    #[test]
    fn rows_are_bounded_and_those_out_of_use_stay() {
        let (shown, hidden) = bound_upstreams(vec![upstream(0, 3, false)], 10);
        assert_eq!((shown.len(), hidden, &shown[0]["endpoints_hidden"]), (1, 0, &json!(0)));
        let many = (0..1_000).map(|name| upstream(name, 1, name != 900)).collect();
        let (shown, hidden) = bound_upstreams(many, 10_000);
        assert_eq!((shown.len(), hidden, &shown[0]["name"]), (UPSTREAMS_MAX, 800, &json!(900)));
        let (shown, _) = bound_upstreams(vec![upstream(0, 1_000, false), upstream(1, 1_000, true)], 250);
        let counts =
            |upstream: &Value| (upstream["endpoints"].as_array().map(Vec::len), upstream["endpoints_hidden"].as_u64());
        assert_eq!((counts(&shown[0]), counts(&shown[1])), ((Some(200), Some(800)), (Some(50), Some(950))));
        assert_eq!(shown[0]["endpoints"][0]["name"], 999, "out of use");
        // The one out of use is of the last upstream, for which no place would be left.
        let many = (0..30).map(|name| upstream(name, 200, name != 29)).collect();
        let (shown, _) = bound_upstreams(many, ALL_ENDPOINTS_MAX);
        let rows: usize = shown.iter().map(|upstream| upstream["endpoints"].as_array().map_or(0, Vec::len)).sum();
        assert_eq!((shown.len(), rows), (30, ALL_ENDPOINTS_MAX));
        assert_eq!((counts(&shown[29]), &shown[29]["endpoints"][0]["name"]), ((Some(1), Some(199)), &json!(199)));
    }
}
