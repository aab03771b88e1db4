//! What only shows when several keys are looked at together: names that refer, things that may exist once, surprises.

use std::collections::{HashMap, HashSet};
use std::num::{NonZeroU32, NonZeroUsize};

use limiter::{Backing, Cost, LeaseSettings, Limiter, LimiterSettings, Moment, RuleError, Weight};

use super::Config;
use super::fault::{At, Code, Problem};
use super::nearest::nearest;
use super::reading::Reading;
use super::section::Draft;
use crate::limit::RuleSettings;
use crate::route;

/// Resolves the names of a draft and reports everything in it that does not fit together.
pub(super) fn resolve(mut draft: Draft, reading: &Reading<'_>) -> Config {
    addresses(&draft, reading);
    identity(&draft, reading);
    regions(&draft, reading);
    let limiters = limiters(&draft, reading);
    sizes(&draft, reading);
    let mut used = Used::default();
    for index in 0..draft.routes.len() {
        resolve_upstream(&mut draft, index, &mut used, reading);
        resolve_limits(&mut draft, index, &limiters, &mut used, reading);
    }
    route_names(&draft, reading);
    route_matches(&draft, reading);
    unused(&draft, &used, reading);
    draft.config
}

/// Indexes of what some route refers to.
#[derive(Default)]
struct Used {
    upstreams: HashSet<usize>,
    rules: HashSet<usize>,
    /// Some name refers to nothing, and may have been meant for what then looks unused.
    is_unclear: bool,
}

fn addresses(draft: &Draft, reading: &Reading<'_>) {
    let mut seen = HashSet::new();
    let listeners = draft.config.listen.iter().map(|listen| listen.address).zip(&draft.listen);
    let admin = (draft.config.admin.address, &draft.admin);
    for (address, at) in listeners.chain([admin]) {
        // Port 0 is another port each time.
        if address.port() != 0 && !seen.insert(address) {
            reading.error(at, Problem::new(Code::Duplicate, format!("{address} is listened on twice")));
        }
    }
    let admin = &draft.config.admin;
    if admin.token.is_none() && !admin.address.ip().is_loopback() {
        let problem = Problem::new(Code::Risk, "without a token, /api is disabled on an address that is not loopback");
        reading.warning(&draft.admin, problem.hint("set `admin.token`; /live, /ready and /metrics stay open"));
    }
}

fn identity(draft: &Draft, reading: &Reading<'_>) {
    if draft.config.identify.trusted_proxies.is_empty() {
        for at in &draft.trusting {
            let problem = Problem::new(Code::Risk, "this field is never believed: there are no trusted proxies");
            reading.warning(at, problem.hint("set `identity.trusted_proxies` to the networks that set it"));
        }
    }
}

fn regions(draft: &Draft, reading: &Reading<'_>) {
    let Some(regions) = &draft.regions else { return };
    if !regions.iter().any(|region| region.value == shard::Region::DEFAULT) {
        let problem = Problem::new(
            Code::Missing,
            "there is no region `default`, which serves all regions without one of their own",
        );
        reading.error(&draft.regions_at, problem.hint("write `[redis.regions.default]`"));
    }
    let stores = draft.config.remote.iter().flat_map(|remote| &remote.regions);
    for (region, settings) in stores {
        let at = regions.iter().find(|named| named.value == *region).map_or(&draft.regions_at, |named| &named.at);
        for neighbour in &settings.fallback {
            if neighbour == region {
                reading.error(at, Problem::bad("`fallback` names the region itself"));
            } else if !regions.iter().any(|region| region.value == *neighbour) {
                let message = format!("`fallback` names the region `{neighbour}`, which has no store");
                reading.error(at, Problem::new(Code::Missing, message));
            }
        }
    }
    // Whatever is left that a start would stumble over.
    if reading.has_error_under("redis") {
        return;
    }
    if let Some(Err(error)) = draft.config.remote.as_ref().map(shard::RemoteSettings::check) {
        let hint =
            "in user and password, percent-encode what is no letter or digit; certificates are those of `redis.tls`";
        reading.error(&draft.regions_at, Problem::bad(error.to_string()).hint(hint));
    }
}

/// Each rule as a limiter of its own, so that a fault has the place of its rule: what the limiter refuses is refused here.
fn limiters(draft: &Draft, reading: &Reading<'_>) -> Vec<Option<Limiter>> {
    let limit = &draft.config.limit;
    // Faulty weights have been reported where they stand.
    let weights: Vec<Weight> = limit.weights.iter().filter_map(|(_, weight)| Weight::try_from(*weight).ok()).collect();
    let backing = if draft.regions.is_some() { Backing::Treasury } else { Backing::Alone };
    let nodes = NonZeroU32::new(limit.nodes).unwrap_or(NonZeroU32::MIN);
    // Nothing is counted: one key is enough.
    let settings = LimiterSettings { keys: NonZeroUsize::MIN, lease: LeaseSettings::new(0, nodes, backing) };
    let build = |rules| Limiter::new(rules, &weights, settings, Moment::default());
    // What may be too much for an address was looked at where it stands.
    let rules = |settings: &RuleSettings| settings.built().map_or_else(|_| Vec::new(), Iterator::collect);
    let each = limit.rules.iter().zip(&draft.rules).map(|(settings, at)| {
        build(rules(settings)).map_err(|error| reading.error(at, refused(&error, &limit.weights))).ok()
    });
    let each: Vec<_> = each.collect();
    if each.iter().all(Option::is_some)
        && let Err(error) = build(limit.rules.iter().flat_map(rules).collect())
    {
        reading.error(&draft.limits, refused(&error, &limit.weights));
    }
    each
}

/// What the limiter says, and why. It knows user tiers by their places.
fn refused(error: &RuleError, weights: &[(String, f64)]) -> Problem {
    let tier = |class: usize| weights.get(class).map_or("", |(name, _)| name);
    match error {
        RuleError::CostAboveBurst { rule, class, cost, most } => {
            let who = tier(*class);
            return Problem::bad(format!(
                "a cost of {cost} never passes limit `{rule}`, which lets {who} users have at most {most} at once"
            ));
        }
        RuleError::ReserveOfAll { rule, class } => {
            return Problem::bad(format!("the reserve of limit `{rule}` leaves nothing to {} users", tier(*class)));
        }
        _ => {}
    }
    let error: &dyn std::error::Error = error;
    let reason = error.source().map_or(String::new(), |source| format!(": {source}"));
    Problem::bad(format!("{error}{reason}"))
}

fn sizes(draft: &Draft, reading: &Reading<'_>) {
    let (http, cache) = (&draft.config.http, &draft.config.cache);
    if http.uri_bytes > http.header_bytes {
        let message = "a target may be longer than a head that holds it: `uri_bytes` has no effect";
        reading.warning(&draft.uri_bytes, Problem::new(Code::Risk, message));
    }
    if cache.object_bytes > cache.memory_bytes {
        let problem = Problem::bad("`cache.object_bytes` is larger than `cache.memory`, which has to hold it");
        reading.error(&draft.object_bytes, problem);
    }
}

fn resolve_upstream(draft: &mut Draft, index: usize, used: &mut Used, reading: &Reading<'_>) {
    let Some(upstream) = &draft.routes[index].upstream else {
        used.is_unclear = true;
        return;
    };
    let known: Vec<&str> = draft.config.upstreams.iter().map(|upstream| &*upstream.name).collect();
    match known.iter().position(|name| *name == upstream.value) {
        Some(found) => {
            draft.config.routes[index].upstream = found;
            used.upstreams.insert(found);
        }
        None => {
            used.is_unclear = true;
            let problem = Problem::new(Code::UnknownName, format!("there is no upstream `{}`", upstream.value));
            reading.error(&upstream.at, problem.hint(nearest(&upstream.value, &known)));
        }
    }
}

fn resolve_limits(
    draft: &mut Draft,
    index: usize,
    limiters: &[Option<Limiter>],
    used: &mut Used,
    reading: &Reading<'_>,
) {
    let names = &draft.routes[index];
    let route = &mut draft.config.routes[index];
    let known: Vec<&str> = draft.config.limit.rules.iter().map(|own| &*own.rule.name).collect();
    for limit in &names.limits {
        let Some(found) = known.iter().position(|name| *name == limit.value) else {
            used.is_unclear = true;
            if reading.has_error_under(&format!("limits.{}", limit.value)) {
                continue; // it is there, and has been complained about
            }
            let problem = Problem::new(Code::UnknownName, format!("there is no limit `{}`", limit.value));
            reading.error(&limit.at, problem.hint(nearest(&limit.value, &known)));
            continue;
        };
        used.rules.insert(found);
        if route.limits.contains(&found) {
            reading.error(
                &limit.at,
                Problem::new(Code::Duplicate, format!("the limit `{}` is attached twice", limit.value)),
            );
            continue;
        }
        route.limits.push(found);
        let rules = limiters[found].as_ref().and_then(|limiter| limiter.rule_set([known[found]]).ok());
        if let Some(Err(error)) = rules.map(|rules| rules.check_cost(Cost::new(route.cost))) {
            reading.error(&names.cost, refused(&error, &draft.config.limit.weights));
        }
    }
}

fn route_names(draft: &Draft, reading: &Reading<'_>) {
    if draft.routes.is_empty() {
        let problem = Problem::new(Code::Risk, "there are no routes: nothing is served");
        reading.warning(&At::default(), problem.hint("write `[[routes]]`"));
    }
    let mut seen = HashSet::new();
    for (route, names) in draft.config.routes.iter().zip(&draft.routes) {
        if !route.name.is_empty() && !seen.insert(&route.name) {
            reading.error(&names.name, Problem::new(Code::Duplicate, format!("there are two routes `{}`", route.name)));
        }
    }
}

/// Two routes for the same host and path are told apart by methods alone, so they must not share one.
fn route_matches(draft: &Draft, reading: &Reading<'_>) {
    let mut seen: HashMap<_, Vec<&route::Settings>> = HashMap::new();
    for (route, names) in draft.config.routes.iter().zip(&draft.routes) {
        if reading.has_error_under(&names.matched.path) {
            continue;
        }
        let same = seen.entry((&route.host, &route.path)).or_default();
        if let Some(other) = same.iter().find(|other| overlap(route, other)) {
            let message = format!("route `{}` matches the same host, path and methods", other.name);
            reading.error(&names.matched, Problem::new(Code::Duplicate, message));
        }
        same.push(route);
    }
}

/// Whether neither route is more specific about methods: both take all, or both name one that the other names.
fn overlap(one: &route::Settings, other: &route::Settings) -> bool {
    let both_all = one.methods.is_empty() && other.methods.is_empty();
    both_all || one.methods.iter().any(|method| other.methods.contains(method))
}

fn unused(draft: &Draft, used: &Used, reading: &Reading<'_>) {
    if used.is_unclear {
        return;
    }
    for (index, (upstream, at)) in draft.config.upstreams.iter().zip(&draft.upstreams).enumerate() {
        if !used.upstreams.contains(&index) {
            let problem = Problem::new(Code::Unused, format!("no route uses the upstream `{}`", upstream.name));
            reading.warning(at, problem);
        }
    }
    for (index, (rule, at)) in draft.config.limit.rules.iter().zip(&draft.rules).enumerate() {
        if !used.rules.contains(&index) {
            let problem = Problem::new(Code::Unused, format!("no route attaches the limit `{}`", rule.rule.name));
            reading.warning(at, problem.hint("name it in the `limits` of a route"));
        }
    }
}
