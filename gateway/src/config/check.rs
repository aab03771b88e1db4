//! Constraints between several keys: references, uniqueness, and settings with surprising
//! consequences.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};

use limiter::{
    Cost, LeaseConfig, LeaseSource, Limiter, LimiterConfig, MonotonicTime, Percent, Rule, RuleError, Scope, Weight,
};

use super::fault::{ConfigFault, ConfigProblem, DocumentLocation, FaultCode, FaultSeverity};
use super::model::Config;
use super::no_effect;
use super::read_context::{Located, ReadContext};
use super::section::{self, ConfigDraft};
use super::suggestion::suggest;
use crate::accept::ListenConfig;
use crate::cache::CookiePolicy;
use crate::connect::{UpstreamProtocol, UpstreamTls, UpstreamTlsConfig};
use crate::endpoint::{EndpointAddress, EndpointScheme};
use crate::http::target;
use crate::identify::IdentitySource;
use crate::limit::RuleConfig;
use crate::proxy_protocol::ProxyProtocolMode;
use crate::route::{self, ForwardPath, PathPattern};
use crate::upstream::UpstreamConfig;

/// Resolves the references of a draft and reports violated constraints.
pub(super) fn resolve(mut draft: ConfigDraft, context: &ReadContext<'_>) -> Config {
    check_addresses(&draft, context);
    check_identity(&draft, context);
    check_identity_secret(&draft, context);
    resolve_regions(&mut draft, context);
    check_regions(&draft, context);
    check_redis_secret(&draft, context);
    check_cookies(&draft, context);
    let limiters = build_limiters(&draft, context);
    check_unshared_limits(&draft, context);
    check_sizes(&draft, context);
    let mut resolver = RouteResolver { draft: &mut draft, limiters, context, used: UsedDefinitions::default() };
    for index in 0..resolver.draft.routes.len() {
        resolver.resolve_upstream(index);
        resolver.resolve_further_upstreams(index);
        resolver.add_service(index);
        resolver.resolve_limits(index);
    }
    let used = resolver.used;
    check_route_names(&draft, context);
    check_paths(&mut draft, context);
    check_route_matches(&draft, context);
    check_unused(&draft, &used, context);
    check_key_classes(&draft, context);
    no_effect::check(&draft, context);
    draft.config
}

/// The upstreams and rules that at least one route uses; `check_unused` reports the others.
#[derive(Default)]
struct UsedDefinitions {
    upstreams: HashSet<usize>,
    rules: HashSet<usize>,
    /// Whether a reference could not be resolved. It may have been intended for a definition that
    /// would then be reported as unused.
    has_unresolved: bool,
}

/// Resolves the references of routes to upstreams and limits.
struct RouteResolver<'a> {
    draft: &'a mut ConfigDraft,
    limiters: Vec<Option<Limiter>>,
    context: &'a ReadContext<'a>,
    used: UsedDefinitions,
}

fn check_addresses(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let mut seen = HashSet::new();
    let listeners = draft.config.listen.iter().map(|listen| listen.address).zip(&draft.listen);
    let admin = (draft.config.admin.address, &draft.admin);
    for (address, at) in listeners.chain([admin]) {
        // The kernel assigns a different port for each port 0.
        if address.port() == 0 {
            continue;
        }
        let overlaps = |other: &&SocketAddr| {
            let is_any = address.ip().is_unspecified() || other.ip().is_unspecified();
            other.port() == address.port() && is_any && other.is_ipv4() == address.is_ipv4() && **other != address
        };
        if let Some(other) = seen.iter().find(overlaps) {
            let message = format!("the listen addresses {other} and {address} overlap");
            let problem = ConfigProblem::new(FaultCode::Duplicate, message);
            context.error(
                at,
                problem.hint("one of them is all addresses of this machine; keep that one, or another port"),
            );
        }
        if !seen.insert(address) {
            context.error(at, ConfigProblem::new(FaultCode::Duplicate, format!("duplicate listen address {address}")));
        }
    }
    check_own_endpoints(draft, context);
    let admin = &draft.config.admin;
    if admin.token.is_none() && !admin.address.ip().is_loopback() {
        let problem =
            ConfigProblem::new(FaultCode::Risk, "without a token, /api is disabled on a non-loopback address");
        let problem = problem.hint("set `admin.token`; /live, /ready and /metrics need no token");
        context.warning(&draft.admin, problem.lacks(&["admin.token"]));
    }
}

/// An endpoint that is a listener of this process makes every request come back, until limits end
/// the loop.
fn check_own_endpoints(draft: &ConfigDraft, context: &ReadContext<'_>) {
    for (upstream, at) in draft.config.upstreams.iter().zip(&draft.upstreams) {
        upstream.endpoints.iter().for_each(|endpoint| check_own_endpoint(endpoint, at, (draft, context)));
    }
}

fn check_own_endpoint(
    endpoint: &EndpointAddress,
    at: &DocumentLocation,
    (draft, context): (&ConfigDraft, &ReadContext<'_>),
) {
    let Config { listen, admin, .. } = &draft.config;
    let addresses = context.own_machine.addresses(&endpoint.host);
    let is_own = |own: &SocketAddr| {
        let is_reached =
            |ip: &IpAddr| own.ip() == *ip || own.ip().is_unspecified() && (ip.is_loopback() || ip.is_unspecified());
        own.port() == endpoint.port && own.port() != 0 && addresses.iter().any(is_reached)
    };
    let mut listeners = listen.iter().map(|listen| listen.address).chain([admin.address]);
    if let Some(own) = listeners.find(is_own) {
        let message = format!("the endpoint {} is this gateway: it listens on {own}", endpoint.authority());
        let problem = ConfigProblem::new(FaultCode::Risk, message);
        context.warning(at, problem.hint("name the address of the server behind the gateway"));
    }
}

/// A cluster limit without Redis is divided by a number of gateways that nothing states.
fn check_unshared_limits(draft: &ConfigDraft, context: &ReadContext<'_>) {
    if draft.regions.is_some() || draft.config.limit.nodes > 1 {
        return;
    }
    for (rule, at) in draft.config.limit.rules.iter().zip(&draft.rules) {
        if rule.rule.scope == Scope::Cluster {
            let message = "without `[redis]`, every gateway of a fleet applies the whole of this limit by itself";
            let problem = ConfigProblem::new(FaultCode::Risk, message);
            let hint =
                "configure `[redis]`, or `redis.nodes`, by which it is divided; for one gateway, write tier = \"node\"";
            context.warning(at, problem.hint(hint).lacks(&["redis"]));
        }
    }
}

fn check_identity(draft: &ConfigDraft, context: &ReadContext<'_>) {
    if draft.config.identify.trusted_proxies.is_empty() {
        for at in &draft.proxy_dependent {
            let problem = ConfigProblem::new(FaultCode::Risk, "this key has no effect: there are no trusted proxies");
            let problem = problem.hint("set `identity.trusted_proxies` to the networks of the proxies");
            context.warning(at, problem.lacks(&["identity.trusted_proxies"]));
        }
    }
    check_connections(draft, context);
    check_geoip(draft, context);
}

/// Sources that read a database need one, and its regions have to exist.
fn check_geoip(draft: &ConfigDraft, context: &ReadContext<'_>) {
    use IdentitySource::{GeoIpContinent, GeoIpCountry, GeoIpRegion};
    let identify = &draft.config.identify;
    let is_geoip = |source: &IdentitySource| matches!(source, GeoIpRegion | GeoIpCountry | GeoIpContinent);
    if identify.geoip.is_none() && !context.has_fault_under("identity.geoip") {
        let key_of = |rule: &RuleConfig| rule.rule.key.and_then(|key| identify.keys.get(usize::from(key.0)));
        let limits = draft.config.limit.rules.iter().zip(&draft.rules);
        let limits = limits.filter(|(rule, _)| key_of(rule).is_some_and(is_geoip)).map(|(_, at)| at);
        let region = identify.region.iter().any(is_geoip).then_some(&draft.identity_region);
        for at in limits.chain(region) {
            let problem = ConfigProblem::new(FaultCode::Missing, "there is no database of countries");
            context.error(at, problem.hint("write `identity.geoip = { database = \"GeoLite2-Country.mmdb\" }`"));
        }
    }
    let configured = identify.regions.iter().chain(draft.regions.iter().flatten().map(|region| &region.value));
    let configured: HashSet<_> = configured.chain([&identify.region_default]).collect();
    let mut reported = HashSet::new();
    for (_, region) in identify.geoip.iter().flat_map(|geoip| &geoip.regions) {
        if !configured.contains(region) && reported.insert(region) {
            let problem =
                ConfigProblem::new(FaultCode::UnknownName, format!("the region `{region}` is not configured"));
            let problem = problem.hint("add it to `identity.regions` or `[redis.regions]`");
            context
                .error(&draft.identity_geoip, problem.lacks(&["identity.regions", &format!("redis.regions.{region}")]));
        }
    }
    let has_region_source = identify.region.contains(&GeoIpRegion);
    let (message, hint) = match &identify.geoip {
        Some(geoip) if geoip.regions.is_empty() && has_region_source => {
            ("`geoip:` finds no region: no area has one", "set `identity.geoip.regions`")
        }
        Some(geoip) if !geoip.regions.is_empty() && !has_region_source => {
            ("the regions of areas have no effect", "add \"geoip:\" to `identity.region`")
        }
        _ => return,
    };
    let problem = ConfigProblem::new(FaultCode::Risk, message).hint(hint);
    context.warning(&draft.identity_geoip, problem.lacks(&["identity.region", "identity.geoip"]));
}

/// Reports settings of identity and listeners that have no effect without each other.
fn check_connections(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let identify = &draft.config.identify;
    let has_client_auth = |listen: &ListenConfig| listen.tls.as_ref().is_some_and(|tls| tls.client_auth.is_some());
    if matches!(identify.user, Some(IdentitySource::Certificate(_))) && !draft.config.listen.iter().any(has_client_auth)
    {
        let message = "no request has a user: no listener asks for client certificates";
        let problem = ConfigProblem::new(FaultCode::Risk, message).hint("set `client_ca` in `[listen.tls]`");
        context.warning(&draft.identity_user, problem.lacks(&["listen"]));
    }
    for (rule, at) in draft.config.limit.rules.iter().zip(&draft.rules) {
        let (name, hint) = match rule.rule.key.and_then(|key| identify.keys.get(usize::from(key.0))) {
            Some(IdentitySource::Ja4) if !identify.has_fingerprints => ("fingerprint", "[listen.tls]"),
            Some(IdentitySource::Certificate(_)) if !draft.config.listen.iter().any(has_client_auth) => {
                ("client certificate", "client_ca` in `[listen.tls]")
            }
            _ => continue,
        };
        let problem = ConfigProblem::new(FaultCode::Risk, format!("this limit never applies: no request has a {name}"));
        context.warning(at, problem.hint(format!("set `{hint}`")).lacks(&["listen"]));
    }
    for (listen, at) in draft.config.listen.iter().zip(&draft.listen) {
        let message = match listen.proxy_protocol {
            ProxyProtocolMode::Off => continue,
            ProxyProtocolMode::Optional => "`proxy_protocol` has no effect: there are no trusted proxies",
            ProxyProtocolMode::Required => "this listener refuses every connection: there are no trusted proxies",
        };
        if identify.trusted_proxies.is_empty() {
            let problem = ConfigProblem::new(FaultCode::Risk, message);
            let problem = problem.hint("set `identity.trusted_proxies` to the networks of the proxies");
            context.warning(at, problem.lacks(&["identity.trusted_proxies"]));
        }
    }
}

/// Below this length, a secret could be found by trying.
const SECRET_BYTES_MIN: usize = 16;

fn check_identity_secret(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let secret = &draft.config.identify.secret;
    if !secret.is_empty() && secret.len() < SECRET_BYTES_MIN {
        let problem = ConfigProblem::new(FaultCode::Risk, "the secret is short enough to be found by trying");
        let hint = "write at least 16 random characters, such as `openssl rand -hex 16` prints";
        context.warning(&draft.identity_secret, problem.hint(hint));
    }
    for (rule, at) in draft.config.limit.rules.iter().zip(&draft.rules) {
        if secret.is_empty() && rule.rule.percent != Percent::ALL && rule.rule.percent.get() > 0 {
            let message =
                "without `identity.secret`, `percent` selects other subjects on each gateway and after each restart";
            let problem = ConfigProblem::new(FaultCode::Risk, message).hint("set `identity.secret`");
            context.warning(at, problem.lacks(&["identity.secret"]));
        }
    }
}

/// Without a secret, every program that can write to Redis decides what clients get.
fn check_redis_secret(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let secret = draft.config.remote.as_ref().map(|remote| &*remote.secret);
    let message = match secret {
        Some("") => "without a secret, an entry that another program writes to Redis is served to clients",
        Some(secret) if secret.len() < SECRET_BYTES_MIN => "the secret is short enough to be found by trying",
        _ => return,
    };
    let hint = "write at least 16 random characters, the same on all gateways, such as `openssl rand -hex 16` prints";
    let problem = ConfigProblem::new(FaultCode::Risk, message).hint(hint);
    context.warning(&draft.redis_secret, problem.lacks(&["redis.secret"]));
}

/// A configured lifetime applies to pages that an origin made for the cookie of one user and sent
/// without `Cache-Control`. Cookies are not part of the key.
fn check_cookies(draft: &ConfigDraft, context: &ReadContext<'_>) {
    const OK: u16 = 200;
    if draft.config.cache.key_fields.iter().any(|field| field.eq_ignore_ascii_case("cookie")) {
        return;
    }
    for (route, names) in draft.config.routes.iter().zip(&draft.routes) {
        let Some(policy) = route.cache.as_ref().filter(|policy| policy.cookies == CookiePolicy::Unstated) else {
            continue;
        };
        // A lifetime by status overrides the default.
        let (at, lifetime) = match policy.ttl_for_status(OK) {
            Some(lifetime) => (&names.ttl, lifetime),
            None => (&names.default_ttl, policy.default_ttl),
        };
        if !lifetime.is_zero() {
            let message =
                "a response to a request with `Cookie` is stored for all clients, unless the origin forbids it";
            let hint = "write cookies = \"explicit\" to leave the lifetime of such responses to the origin, or \"ignored\" if no page of this route depends on cookies";
            context.warning(at, ConfigProblem::new(FaultCode::Risk, message).hint(hint));
        }
    }
}

/// Completes the list of regions, and chooses the shards of regions without their own.
fn resolve_regions(draft: &mut ConfigDraft, context: &ReadContext<'_>) {
    let identify = &mut draft.config.identify;
    let default = identify.region_default;
    identify.regions.push(default);
    identify.regions.extend(draft.regions.iter().flatten().map(|region| region.value));
    identify.regions.sort_unstable();
    identify.regions.dedup();
    let Some(remote) = &mut draft.config.remote else { return };
    let candidates = [default, shard::Region::DEFAULT];
    match candidates.into_iter().find(|region| remote.regions.contains_key(region)) {
        Some(region) => remote.default_region = region,
        None => {
            let message = format!("the region `{default}` is missing; its shards also serve regions without their own");
            let problem = ConfigProblem::new(FaultCode::Missing, message);
            let region = format!("redis.regions.{default}");
            let hint = format!("write `[{region}]`, or set `identity.region_default`");
            context.error(&draft.regions_at, problem.hint(hint).lacks(&[&region, "identity.region_default"]));
        }
    }
}

fn check_regions(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let Some(regions) = &draft.regions else { return };
    let stores = draft.config.remote.iter().flat_map(|remote| &remote.regions);
    for (region, config) in stores {
        let at = regions.iter().find(|named| named.value == *region).map_or(&draft.regions_at, |named| &named.at);
        for fallback in &config.fallback {
            if fallback == region {
                context.error(at, ConfigProblem::bad_value("`fallback` names the region itself"));
            } else if !regions.iter().any(|region| region.value == *fallback) {
                let message = format!("`fallback` names the region `{fallback}`, which is not configured");
                let problem = ConfigProblem::new(FaultCode::Missing, message);
                context.error(at, problem.lacks(&[&format!("redis.regions.{fallback}")]));
            }
        }
    }
    // Remaining faults that would fail the start.
    if context.has_fault_under("redis") {
        return;
    }
    if let Some(Err(error)) = draft.config.remote.as_ref().map(shard::RemoteConfig::check) {
        let hint = "in user and password, percent-encode all characters but letters and digits; certificates are set in `redis.tls`";
        context.error(&draft.regions_at, ConfigProblem::bad_value(error.to_string()).hint(hint));
    }
}

/// Builds a separate limiter for each rule, so that an error of the limiter is reported at its
/// rule.
fn build_limiters(draft: &ConfigDraft, context: &ReadContext<'_>) -> Vec<Option<Limiter>> {
    let limit = &draft.config.limit;
    // Invalid weights have already been reported.
    let weights: Vec<Weight> = limit.weights.iter().filter_map(|(_, weight)| Weight::try_from(*weight).ok()).collect();
    let lease_source = if draft.regions.is_some() { LeaseSource::Backend } else { LeaseSource::LocalFallback };
    let nodes = NonZeroU32::new(limit.nodes).unwrap_or(NonZeroU32::MIN);
    // These limiters decide no requests: one key is enough, also for rules that name their own
    // number, whose range is checked as it is read. Tables of 16 million keys take a GiB.
    let config = LimiterConfig { keys: NonZeroUsize::MIN, lease: LeaseConfig::new(0, nodes, lease_source) };
    let build = |rules| Limiter::new(rules, &weights, config, MonotonicTime::default());
    // An invalid `per_address` has already been reported.
    let rules = |config: &RuleConfig| -> Vec<Rule> {
        let rules = config.limiter_rules();
        rules.map_or_else(|_| Vec::new(), |rules| rules.map(|rule| Rule { keys: None, ..rule }).collect())
    };
    let limiters = limit.rules.iter().zip(&draft.rules).map(|(config, at)| {
        build(rules(config)).map_err(|error| context.error(at, rule_problem(&error, &limit.weights))).ok()
    });
    let limiters: Vec<_> = limiters.collect();
    if limiters.iter().all(Option::is_some)
        && let Err(error) = build(limit.rules.iter().flat_map(rules).collect())
    {
        context.error(&draft.limits, rule_problem(&error, &limit.weights));
    }
    limiters
}

/// The error of the limiter with its source. The limiter identifies user classes by index.
fn rule_problem(error: &RuleError, weights: &[(String, f64)]) -> ConfigProblem {
    let class_name = |class: usize| weights.get(class).map_or("", |(name, _)| name);
    match error {
        RuleError::CostAboveBurst { rule, class, cost, most } => {
            let users = class_name(*class);
            return ConfigProblem::bad_value(format!(
                "cost {cost} always exceeds limit `{rule}`, whose burst for {users} users is {most}"
            ));
        }
        RuleError::ReserveOfAll { rule, class } => {
            return ConfigProblem::bad_value(format!(
                "the reserve of limit `{rule}` leaves no tokens for {} users",
                class_name(*class)
            ));
        }
        _ => {}
    }
    let error: &dyn std::error::Error = error;
    let reason = error.source().map_or(String::new(), |source| format!(": {source}"));
    ConfigProblem::bad_value(format!("{error}{reason}"))
}

fn check_sizes(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let (http, cache) = (&draft.config.http, &draft.config.cache);
    if http.uri_bytes > http.header_bytes {
        let message = "`uri_bytes` is larger than `header_bytes` and has no effect";
        context.warning(&draft.uri_bytes, ConfigProblem::new(FaultCode::Risk, message));
    }
    if cache.object_bytes > cache.memory_bytes {
        let problem = ConfigProblem::bad_value("`cache.object_bytes` is larger than `cache.memory`");
        context.error(&draft.object_bytes, problem);
    }
}

impl RouteResolver<'_> {
    fn resolve_upstream(&mut self, index: usize) {
        if self.draft.config.routes[index].action != route::RouteAction::Forward {
            return;
        }
        let Some(upstream) = &self.draft.routes[index].upstream else {
            self.used.has_unresolved = true;
            return;
        };
        let upstream = upstream.clone();
        if let Some(position) = self.find_upstream(&upstream) {
            self.draft.config.routes[index].upstream = position;
        }
    }

    /// Adds the upstream of the verification service.
    fn add_service(&mut self, index: usize) {
        let Some(Located { value: endpoint, at }) = self.draft.routes[index].service.clone() else { return };
        let route = &mut self.draft.config.routes[index];
        let Some(service) = &mut route.forward_auth else { return };
        service.upstream = self.draft.config.upstreams.len();
        let mut upstream = UpstreamConfig::new(format!("auth:{}", route.name).into(), vec![endpoint.clone()]);
        upstream.connect_timeout = service.timeout;
        if endpoint.scheme == EndpointScheme::Https {
            let protocols = vec![UpstreamProtocol::Http1];
            match UpstreamTls::new(UpstreamTlsConfig { verify: true, protocols, ..UpstreamTlsConfig::default() }) {
                Ok(tls) => upstream.tls = Some(tls),
                Err(error) => self.context.error(&at, ConfigProblem::bad_value(error.to_string())),
            }
        }
        self.used.upstreams.insert(self.draft.config.upstreams.len());
        self.draft.config.upstreams.push(upstream);
        check_own_endpoint(&endpoint, &at, (&*self.draft, self.context));
    }

    /// Resolves the upstreams of the canary and of the mirror.
    fn resolve_further_upstreams(&mut self, index: usize) {
        let names = &self.draft.routes[index];
        let (canary, mirror) = (names.canary.clone(), names.mirror.clone());
        if let Some(position) = canary.and_then(|name| self.find_upstream(&name))
            && let Some(canary) = &mut self.draft.config.routes[index].canary
        {
            canary.upstream = position;
        }
        if let Some(position) = mirror.and_then(|name| self.find_upstream(&name))
            && let Some(mirror) = &mut self.draft.config.routes[index].mirror
        {
            mirror.upstream = position;
        }
    }

    /// The index of an upstream, which is used then. Reports an unknown one.
    fn find_upstream(&mut self, upstream: &Located<String>) -> Option<usize> {
        let known: Vec<&str> = self.draft.config.upstreams.iter().map(|upstream| &*upstream.name).collect();
        let position = known.iter().position(|name| *name == upstream.value);
        match position {
            Some(position) => {
                self.used.upstreams.insert(position);
            }
            None => {
                self.used.has_unresolved = true;
                let message = format!("unknown upstream `{}`", upstream.value);
                let problem = ConfigProblem::new(FaultCode::UnknownName, message);
                self.context.error(&upstream.at, problem.hint(suggest(&upstream.value, &known)));
            }
        }
        position
    }

    fn resolve_limits(&mut self, index: usize) {
        let names = &self.draft.routes[index];
        let route = &mut self.draft.config.routes[index];
        let known: Vec<&str> = self.draft.config.limit.rules.iter().map(|own| &*own.rule.name).collect();
        for limit in &names.limits {
            let Some(position) = known.iter().position(|name| *name == limit.value) else {
                self.used.has_unresolved = true;
                if self.context.has_fault_under(&format!("limits.{}", limit.value)) {
                    continue; // The limit exists and its fault has already been reported.
                }
                let problem = ConfigProblem::new(FaultCode::UnknownName, format!("unknown limit `{}`", limit.value));
                self.context.error(&limit.at, problem.hint(suggest(&limit.value, &known)));
                continue;
            };
            self.used.rules.insert(position);
            if route.limits.contains(&position) {
                let problem = ConfigProblem::new(FaultCode::Duplicate, format!("duplicate limit `{}`", limit.value));
                self.context.error(&limit.at, problem);
                continue;
            }
            route.limits.push(position);
            let limiter = self.limiters[position].as_ref();
            let rules = limiter.and_then(|limiter| limiter.rule_set([known[position]]).ok());
            if let Some(Err(error)) = rules.map(|rules| rules.check_cost(Cost::new(route.cost))) {
                self.context.error(&names.cost, rule_problem(&error, &self.draft.config.limit.weights));
            }
        }
    }
}

fn check_route_names(draft: &ConfigDraft, context: &ReadContext<'_>) {
    if draft.routes.is_empty() {
        let problem = ConfigProblem::new(FaultCode::Risk, "there are no routes: no request is served");
        context.warning(&DocumentLocation::default(), problem.hint("write `[[routes]]`").lacks(&["routes"]));
    }
    let mut seen = HashSet::new();
    for (route, names) in draft.config.routes.iter().zip(&draft.routes) {
        if !route.name.is_empty() && !seen.insert(&route.name) {
            context.error(
                &names.name,
                ConfigProblem::new(FaultCode::Duplicate, format!("duplicate route name `{}`", route.name)),
            );
        }
    }
}

/// Keys name user classes, which have to exist.
fn check_key_classes(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let known: Vec<&str> = draft.config.limit.weights.iter().map(|(name, _)| &**name).collect();
    for named in draft.routes.iter().filter_map(|names| names.key_classes.as_ref()) {
        for (class, line) in named.classes.iter().filter(|(class, _)| !known.contains(&&**class)) {
            let message = format!("{} line {line}: `[tiers]` does not define `{class}`", named.file);
            let problem = ConfigProblem::new(FaultCode::UnknownName, message);
            context.error(&named.at, problem.hint(suggest(class, &known)).lacks(&["tiers"]));
        }
    }
}

/// Requests have paths in their normal form: another pattern would never match.
fn check_paths(draft: &mut ConfigDraft, context: &ReadContext<'_>) {
    let rules = draft.config.server.paths;
    for (route, names) in draft.config.routes.iter_mut().zip(&draft.routes) {
        if context.has_fault_under(&names.path.path) {
            continue;
        }
        let (path, star) = match &mut route.path {
            PathPattern::Exact(path) => (path, ""),
            PathPattern::Prefix(prefix) => (prefix, "*"),
        };
        let problem = |reason: &str| ConfigProblem::bad_value(format!("`{path}{star}` matches no request: {reason}"));
        match target::normal(path, rules) {
            Err(refusal) => {
                let reason = format!("requests with this path are refused ({})", refusal.reason());
                context.error(&names.path, problem(&reason).hint("docs/paths.md lists which paths are refused"));
            }
            Ok(normal) if normal != *path => {
                let hint = format!("write \"{normal}{star}\"");
                context.error(&names.path, problem("it is not in its normal form").hint(hint));
            }
            Ok(_) if path.contains(';') || path.contains("%3B") => {
                let problem = problem("parameters of segments are not compared");
                context.error(&names.path, problem.hint("leave out what follows the `;` up to the next `/`"));
            }
            Ok(_) => *path = target::matched_path(path).into_owned(),
        }
        check_received_path(route, (&names.forward_path, context));
        check_request_edits(route, (&names.request_headers, context));
    }
}

/// A shared response must not depend on a caller, unless its origin says so.
fn check_request_edits(route: &route::RouteConfig, (at, context): (&DocumentLocation, &ReadContext<'_>)) {
    let variable = route.edits.as_deref().and_then(section::unkeyed_variable).filter(|_| route.cache.is_some());
    let Some((variable, may_vary)) = variable else { return };
    let message = format!("the origin is told `{{{variable}}}`, which is not part of the cache key");
    if may_vary {
        let hint = "set `cache = { mode = \"off\" }`, or let the origin answer with `Vary` and the name of the field";
        context.warning(at, ConfigProblem::new(FaultCode::Risk, message).hint(hint));
    } else {
        let hint = "set `cache = { mode = \"off\" }`: no response says that it varies by its host or path";
        context.error(at, ConfigProblem::bad_value(message).hint(hint));
    }
}

/// With the received path, an origin may give several responses to requests with one key.
fn check_received_path(route: &route::RouteConfig, (at, context): (&DocumentLocation, &ReadContext<'_>)) {
    if route.forward_path == ForwardPath::Received && route.cache.is_some() {
        let message = "what the origin answers to one form of a path is served to clients that send another form of it";
        let problem = ConfigProblem::new(FaultCode::Risk, message);
        context.warning(at, problem.hint("set `cache = { mode = \"off\" }` on this route"));
    }
}

/// Routes for the same host and path differ in their methods, which must not overlap, or in their
/// further conditions.
fn check_route_matches(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let mut seen: HashMap<_, Vec<&route::RouteConfig>> = HashMap::new();
    for (route, names) in draft.config.routes.iter().zip(&draft.routes) {
        if context.has_fault_under(&names.matched.path) {
            continue;
        }
        let same = seen.entry((&route.host, &route.path)).or_default();
        let is_same =
            |other: &&&route::RouteConfig| methods_overlap(route, other) && route.conditions == other.conditions;
        if let Some(other) = same.iter().find(is_same) {
            let message = format!("route `{}` matches the same host, path and methods", other.name);
            context.error(&names.matched, ConfigProblem::new(FaultCode::Duplicate, message));
        }
        same.push(route);
    }
}

/// Whether the methods of two routes overlap and neither is more specific: both accept all methods,
/// or both name a common one.
fn methods_overlap(one: &route::RouteConfig, other: &route::RouteConfig) -> bool {
    let both_accept_all = one.methods.is_empty() && other.methods.is_empty();
    both_accept_all || one.methods.iter().any(|method| other.methods.contains(method))
}

/// Whether an error in a route may be the reason that it names no upstream or limit.
fn may_hide_a_reference(fault: &ConfigFault) -> bool {
    const KEYS: [&str; 4] = ["upstream", "limits", "canary", "mirror"];
    let key = fault.path.strip_prefix("routes[").and_then(|rest| rest.split_once("].")).map(|(_, key)| key);
    let names = |key: &str| KEYS.iter().any(|named| key.split(['.', '[']).next() == Some(*named));
    let is_misspelt =
        KEYS.iter().any(|key| fault.hint.as_ref().is_some_and(|hint| hint.contains(&format!("`{key}`?"))));
    fault.severity == FaultSeverity::Error
        && (fault.path == "routes"
            || key.is_some_and(|key| names(key) || fault.code == FaultCode::UnknownKey && is_misspelt))
}

fn check_unused(draft: &ConfigDraft, used: &UsedDefinitions, context: &ReadContext<'_>) {
    if used.has_unresolved || context.has_fault(may_hide_a_reference) {
        return;
    }
    for (index, (upstream, at)) in draft.config.upstreams.iter().zip(&draft.upstreams).enumerate() {
        if !used.upstreams.contains(&index) {
            let problem =
                ConfigProblem::new(FaultCode::Unused, format!("no route uses the upstream `{}`", upstream.name));
            context.warning(at, problem);
        }
    }
    for (index, (rule, at)) in draft.config.limit.rules.iter().zip(&draft.rules).enumerate() {
        if !used.rules.contains(&index) {
            let problem =
                ConfigProblem::new(FaultCode::Unused, format!("no route uses the limit `{}`", rule.rule.name));
            context.warning(at, problem.hint("add it to the `limits` of a route"));
        }
    }
}
