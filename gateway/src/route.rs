//! Routes: the requests they match, and the typed policies of those requests.

mod path_pattern;
mod template;
mod header_edits;
mod path_rewrite;
mod condition;
mod canary;
mod mirror;
mod cors;
mod fixed_response;
mod security_headers;
mod forward_auth;

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use ipnet::IpNet;
use limiter::{Cost, RuleSet};

use crate::breaker::{Breaker, BreakerMode, BreakerState};
use crate::cache::key;
use crate::compress::CompressConfig;
use crate::error::ErrorKind;
use crate::http::exchange_clock::ExchangeTimeouts;
use crate::http::fields::Fields;
use crate::http::message::{OriginEdits, Request, StatusCode};
use crate::http::target;
use crate::identify::Caller;
use crate::identify::auth::{AuthConfig, Authenticator, PrincipalIndex};
use crate::metrics::{self, Counter, Counters, Histogram, Label as _};
use crate::pages::ErrorPages;
use crate::record::CacheResult;
use crate::upstream::Upstream;
use crate::{cache, degrade, label};

pub(crate) use canary::CanaryConfig;
pub(crate) use condition::{RouteConditions, ValuePattern};
pub(crate) use cors::{CorsPolicy, OriginPattern};
pub(crate) use fixed_response::{FixedResponse, Redirect, RouteAction};
pub(crate) use forward_auth::{ForwardAuth, ForwardAuthConfig};
pub(crate) use header_edits::HeaderEdits;
pub(crate) use mirror::{Mirror, MirrorConfig, MirrorResult};
pub(crate) use path_pattern::PathPattern;
pub(crate) use path_rewrite::PathRewrite;
pub(crate) use security_headers::SecurityHeaders;
pub(crate) use template::{Template, TemplateError, TemplateValues, TemplateVariable};

/// One `[[routes]]` with every name resolved to an index.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RouteConfig {
    /// Unique name in logs and metrics.
    pub(crate) name: Arc<str>,
    /// Hosts that match.
    pub(crate) host: HostPattern,
    /// Paths that match.
    pub(crate) path: PathPattern,
    /// Methods that match; empty: all.
    pub(crate) methods: Vec<Method>,
    /// Further conditions; `None` without any.
    pub(crate) conditions: Option<Box<RouteConditions>>,
    pub(crate) action: RouteAction,
    /// Index into the upstreams, for a route that forwards.
    pub(crate) upstream: usize,
    /// Another upstream for a part of the requests; `None`: none.
    pub(crate) canary: Option<Box<CanaryConfig>>,
    /// Another upstream for copies of requests; `None`: none.
    pub(crate) mirror: Option<MirrorConfig>,
    /// The changes of the route in messages; `None`: nothing.
    pub(crate) edits: Option<Box<RouteEdits>>,
    /// Indexes into the limit rules.
    pub(crate) limits: Vec<usize>,
    /// Cost of one request in each rule.
    pub(crate) cost: NonZeroU32,
    /// Additional cost by response status. The first match applies.
    pub(crate) cost_by_status: Vec<(cache::StatusPattern, NonZeroU32)>,
    /// Cache policy; `None` disables the cache for the route.
    pub(crate) cache: Option<cache::CachePolicy>,
    /// The degrade page.
    pub(crate) degrade: degrade::DegradeConfig,
    /// Timeouts that replace those of the upstream.
    pub(crate) timeouts: TimeoutOverrides,
    pub(crate) forward_path: ForwardPath,
    /// Whether a request is sent to a second endpoint while the first one is slow.
    pub(crate) hedge: bool,
    /// Bytes of a request body, in place of `limits_http.body_bytes`.
    pub(crate) body_bytes: Option<u64>,
    /// Pages for the gateway's own responses, before those of the gateway.
    pub(crate) pages: ErrorPages,
    /// The clients that may use the route; `None`: all.
    pub(crate) clients: Option<Box<ClientNetworks>>,
    /// Compression of responses; `None`: none.
    pub(crate) compress: Option<Box<CompressConfig>>,
    /// The credentials that requests need; `None`: none.
    pub(crate) auth: Option<AuthConfig>,
    /// The service that decides about requests; `None`: none.
    pub(crate) forward_auth: Option<ForwardAuthConfig>,
}

impl RouteConfig {
    /// A route for `path` on any host, with the defaults of every other key.
    pub(crate) fn new(name: Arc<str>, path: PathPattern, upstream: usize) -> Self {
        RouteConfig {
            name,
            host: HostPattern::Any,
            path,
            methods: Vec::new(),
            conditions: None,
            action: RouteAction::Forward,
            upstream,
            canary: None,
            mirror: None,
            edits: None,
            limits: Vec::new(),
            cost: NonZeroU32::MIN,
            cost_by_status: Vec::new(),
            cache: Some(cache::CachePolicy::default()),
            degrade: degrade::DegradeConfig::default(),
            timeouts: TimeoutOverrides::default(),
            forward_path: ForwardPath::Normal,
            hedge: false,
            body_bytes: None,
            pages: Vec::new(),
            clients: None,
            compress: None,
            auth: None,
            forward_auth: None,
        }
    }
}

impl RouteConfig {
    /// A number for the route in cache keys, the same on all nodes. `None` where no other route has
    /// requests with the same key: the route has no condition on fields or on the query, of which
    /// parameters may be left out of the key, and takes GET and HEAD alike.
    pub(crate) fn key(&self) -> Option<u64> {
        let takes = |method: &Method| self.methods.is_empty() || self.methods.contains(method);
        let decides = |conditions: &RouteConditions| !conditions.headers.is_empty() || !conditions.query.is_empty();
        let is_shared = self.conditions.as_deref().is_some_and(decides) || takes(&Method::GET) != takes(&Method::HEAD);
        let hash = || blake3::hash(self.name.as_bytes());
        is_shared.then(|| hash().as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)))
    }

    /// Whether the method of a request matches; of a preflight that the route answers, the method
    /// that it asks for.
    fn accepts_method(&self, request: &Request) -> bool {
        if self.methods.is_empty() || self.methods.contains(&request.method) {
            return true;
        }
        let has_cors = self.edits.as_ref().is_some_and(|edits| edits.cors.is_some());
        let asked = has_cors.then(|| CorsPolicy::preflight_method(request)).flatten();
        asked.is_some_and(|asked| self.methods.iter().any(|method| method.as_str().as_bytes() == asked))
    }
}

/// The changes of a route in requests and responses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RouteEdits {
    pub(crate) request: HeaderEdits,
    pub(crate) response: HeaderEdits,
    /// The value of `Host` for the origin.
    pub(crate) host: Option<Template>,
    pub(crate) path: Option<PathRewrite>,
    pub(crate) cors: Option<CorsPolicy>,
    pub(crate) security: Option<SecurityHeaders>,
}

impl RouteEdits {
    /// The changes of one request for the origin.
    pub(crate) fn of_request(&self, values: &TemplateValues<'_>) -> OriginEdits {
        let render = |edits: &[(String, Template)]| {
            edits.iter().map(|(name, value)| (name.clone(), value.render(values))).collect()
        };
        let path = values.request.path();
        OriginEdits {
            path: self.path.as_ref().map(|rewrite| rewrite.path(path, &target::matched_path(path), values)),
            host: self.host.as_ref().and_then(|host| String::from_utf8(host.render(values)).ok()),
            removed: self.request.remove.clone(),
            set: render(&self.request.set),
            added: render(&self.request.add),
        }
    }

    /// Applies the changes of a response to `request`, whatever its source.
    pub(crate) fn edit_response(&self, fields: &mut Fields, values: &TemplateValues<'_>) {
        if let Some(cors) = &self.cors
            && !CorsPolicy::is_preflight(values.request)
        {
            cors.write(values.request, fields);
        }
        self.response.apply(fields, values);
        if let Some(security) = self.security {
            security.apply(fields, key::scheme(values.request), self.cors.is_some());
        }
    }

    /// Whether a value contains `variable`.
    pub(crate) fn uses(&self, variable: TemplateVariable) -> bool {
        let in_path = matches!(&self.path, Some(PathRewrite::Replace(path)) if path.uses(variable));
        let in_host = self.host.as_ref().is_some_and(|host| host.uses(variable));
        in_path || in_host || self.request.uses(variable) || self.response.uses(variable)
    }

    /// Whether requests for the origin change.
    pub(crate) fn changes_requests(&self) -> bool {
        !self.request.is_empty() || self.host.is_some() || self.path.is_some()
    }
}

/// The addresses of clients that may use a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClientNetworks {
    /// Empty: all that are not denied.
    pub(crate) allowed: Vec<IpNet>,
    pub(crate) denied: Vec<IpNet>,
}

impl ClientNetworks {
    pub(crate) fn permits(&self, client: IpAddr) -> bool {
        let contains = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&client));
        !contains(&self.denied) && (self.allowed.is_empty() || contains(&self.allowed))
    }
}

/// Timeouts of a route that replace those of its upstream; `None`: the upstream's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TimeoutOverrides {
    pub(crate) head: Option<Duration>,
    pub(crate) idle: Option<Duration>,
    /// Zero: the exchange has no limit.
    pub(crate) total: Option<Duration>,
}

/// The path that the origin gets. Routes, limits and keys use the normal form in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ForwardPath {
    #[default]
    Normal,
    /// As the client sent it, for an origin that gives several forms of a path different meanings.
    Received,
}

/// The hosts that a route matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum HostPattern {
    /// `*`: every host, and requests without one.
    Any,
    /// One host, in lower case, without a port.
    Exact(String),
    /// `*.example.org`: every subdomain. Stored as `.example.org` in lower case.
    Suffix(String),
}

/// A route with everything that its requests need, built once per snapshot.
pub(crate) struct Route {
    pub(crate) config: RouteConfig,
    /// Position in `Routes`. Request records refer to routes by it: a clone of the name's `Arc`
    /// would write a reference count that all threads share.
    pub(crate) index: usize,
    /// The part of the route in cache keys; see `RouteConfig::key`.
    pub(crate) key: Option<u64>,
    /// `None` for a route that answers by itself.
    pub(crate) target: Option<RouteTarget>,
    /// That of the canary; `None`: there is none.
    pub(crate) canary: Option<RouteTarget>,
    pub(crate) mirror: Option<Mirror>,
    pub(crate) rules: RuleSet,
    pub(crate) cost: Cost,
    pub(crate) counters: Arc<RouteCounters>,
    /// Outlives a reload that does not change its file.
    pub(crate) authenticator: Option<Arc<Authenticator>>,
    pub(crate) forward_auth: Option<Arc<ForwardAuth>>,
}

/// An upstream with the breaker in front of it.
pub(crate) struct RouteTarget {
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) breaker: Arc<Breaker>,
}

impl Route {
    /// The upstream of a request and its breaker, in the phases that forward.
    pub(crate) fn target(&self, request: &Request) -> &RouteTarget {
        let canary = self.canary.as_ref().filter(|_| request.is_canary);
        canary.or(self.target.as_ref()).expect("a route without an upstream answers by itself")
    }

    /// The numbers of the route in cache keys: its own, and that of its canary.
    pub(crate) fn key_numbers(&self) -> impl Iterator<Item = Option<u64>> {
        [self.key].into_iter().chain(self.canary.as_ref().map(|_| Some(self.canary_key())))
    }

    fn canary_key(&self) -> u64 {
        canary::number_of(&format!("{} canary", self.config.name))
    }

    /// The targets that the route has: none, its own, and its canary.
    pub(crate) fn targets(&self) -> impl Iterator<Item = &RouteTarget> {
        self.target.iter().chain(&self.canary)
    }

    /// Decides whether the canary gets a request. It gets none while its breaker rejects calls.
    pub(crate) fn assign(&self, caller: &Caller, request: &mut Request) {
        request.key_route = self.key;
        let (Some(config), Some(canary)) = (&self.config.canary, &self.canary) else { return };
        if config.takes(&self.config.name, caller, request) && !canary.breaker.is_rejecting() {
            request.is_canary = true;
            request.key_route = Some(self.canary_key());
        }
    }

    /// The timeouts of an exchange of this route with an upstream.
    pub(crate) fn timeouts(&self, target: &RouteTarget) -> ExchangeTimeouts {
        let ExchangeTimeouts { head, idle, total } = target.upstream.config().timeouts();
        let own = &self.config.timeouts;
        ExchangeTimeouts {
            head: own.head.unwrap_or(head),
            idle: own.idle.unwrap_or(idle),
            total: own.total.or(total).filter(|total| !total.is_zero()),
        }
    }

    /// The additional cost for a response with `status`.
    pub(crate) fn response_cost(&self, status: StatusCode) -> Option<Cost> {
        let matches = |(statuses, _): &&(cache::StatusPattern, NonZeroU32)| statuses.matches(status.as_u16());
        self.config.cost_by_status.iter().find(matches).map(|(_, cost)| Cost::new(*cost))
    }
}

label! {
    /// The class of a response status.
    pub(crate) StatusClass, "status_class", {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
    }
}

impl StatusClass {
    pub(crate) fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            100..200 => StatusClass::Informational,
            200..300 => StatusClass::Success,
            300..400 => StatusClass::Redirection,
            400..500 => StatusClass::ClientError,
            _ => StatusClass::ServerError,
        }
    }
}

/// Counters of a route; they outlive a reload.
#[derive(Default)]
pub(crate) struct RouteCounters {
    pub(crate) responses: Counters<StatusClass>,
    pub(crate) degraded: Counter,
    /// From the head of a request to the last byte of its response.
    pub(crate) duration: Histogram,
    pub(crate) cache_results: Counters<CacheResult>,
    pub(crate) failures: Counters<ErrorKind>,
    /// Bytes of response bodies.
    pub(crate) response_bytes: Counter,
    pub(crate) mirrored: Arc<Counters<MirrorResult>>,
}

impl RouteCounters {
    /// The number of its cells.
    pub(crate) const CELLS: usize = Counters::<StatusClass>::CELLS
        + Counter::CELLS
        + Histogram::CELLS
        + Counters::<CacheResult>::CELLS
        + Counters::<ErrorKind>::CELLS
        + Counter::CELLS
        + Counters::<MirrorResult>::CELLS;
}

/// Registers the metrics of routes. `for_each_route` visits the current routes at scrape time.
pub(crate) fn expose(for_each_route: impl Fn(&mut dyn FnMut(&Route)) + Clone + Send + Sync + 'static) {
    let for_each = for_each_route.clone();
    metrics::expose_counter_with("tidegate_route_responses", "Responses by route and status class.", move |emit| {
        for_each(&mut |route| {
            for class in StatusClass::ALL {
                let labels = [("route", &*route.config.name), ("status_class", class.as_str())];
                emit(&labels, route.counters.responses.get(*class));
            }
        });
    });
    expose_requests(for_each_route.clone());
    let for_each = for_each_route.clone();
    metrics::expose_counter_with(
        "tidegate_route_degraded",
        "Degraded responses: stale, or the degrade page.",
        move |emit| {
            for_each(&mut |route| emit(&[("route", &route.config.name)], route.counters.degraded.get()));
        },
    );
    let for_each = for_each_route.clone();
    metrics::expose_counter_with(
        "tidegate_route_mirrored",
        "Copies of requests for the mirror of a route, by result.",
        move |emit| {
            for_each(&mut |route| {
                let Some(mirror) = &route.mirror else { return };
                for result in MirrorResult::ALL {
                    let labels = [("route", &*route.config.name), (MirrorResult::NAME, result.as_str())];
                    emit(&labels, mirror.results.get(*result));
                }
            });
        },
    );
    let for_each = for_each_route.clone();
    metrics::expose_gauge_with("tidegate_breaker_state", "0 closed, 1 half-open or ramp, 2 open.", move |emit| {
        for_each(&mut |route| {
            for (target, suffix) in route.targets().zip(["", " canary"]) {
                let state = match target.breaker.state() {
                    BreakerState::Closed => 0.0,
                    BreakerState::HalfOpen | BreakerState::Ramp => 1.0,
                    BreakerState::Open => 2.0,
                };
                emit(&[("route", &format!("{}{suffix}", route.config.name))], state);
            }
        });
    });
    metrics::expose_counter_with(
        "tidegate_breaker_rejections",
        "Calls that a breaker rejected, or would have rejected in shadow mode.",
        move |emit| {
            let mut emitted: Vec<*const Breaker> = Vec::new();
            for_each_route(&mut |route| {
                for RouteTarget { breaker, .. } in route.targets() {
                    // Routes may share one.
                    if emitted.contains(&Arc::as_ptr(breaker)) {
                        continue;
                    }
                    emitted.push(Arc::as_ptr(breaker));
                    let name = breaker.name();
                    let mode = (BreakerMode::NAME, breaker.config().mode.as_str());
                    emit(&[("route", name.route()), ("upstream", &name.upstream), mode], breaker.rejections());
                }
            });
        },
    );
}

/// Exposes what `RouteCounters` counts at the end of each request.
fn expose_requests(for_each_route: impl Fn(&mut dyn FnMut(&Route)) + Clone + Send + Sync + 'static) {
    let for_each = for_each_route.clone();
    let help = "From a request's head to the last byte of its response, by route.";
    metrics::expose_histogram_with("tidegate_route_request_duration_seconds", help, move |emit| {
        for_each(&mut |route| emit(&[("route", &route.config.name)], &route.counters.duration));
    });
    let for_each = for_each_route.clone();
    let help = "How the cache took part in requests, by route.";
    metrics::expose_counter_with("tidegate_route_cache_results", help, move |emit| {
        for_each(&mut |route| {
            for result in CacheResult::ALL {
                let labels = [("route", &*route.config.name), (CacheResult::NAME, result.as_str())];
                emit(&labels, route.counters.cache_results.get(*result));
            }
        });
    });
    let for_each = for_each_route.clone();
    let help = "Failed requests by route and kind, including those answered with a stale response.";
    metrics::expose_counter_with("tidegate_route_failures", help, move |emit| {
        for_each(&mut |route| {
            for kind in ErrorKind::ALL {
                let labels = [("route", &*route.config.name), (ErrorKind::NAME, kind.as_str())];
                emit(&labels, route.counters.failures.get(*kind));
            }
        });
    });
    let help = "Bytes of response bodies that were sent, by route.";
    metrics::expose_counter_with("tidegate_route_response_bytes", help, move |emit| {
        for_each_route(&mut |route| emit(&[("route", &route.config.name)], route.counters.response_bytes.get()));
    });
}

/// All routes, most specific first.
pub(crate) struct Routes(Vec<Route>);

impl Routes {
    /// Sorts the routes: the most specific path first, then the most specific host, then routes
    /// that list methods, then those with more conditions. Else the order of the configuration
    /// stays.
    pub(crate) fn new(mut routes: Vec<Route>) -> Self {
        routes.sort_by_key(|route| std::cmp::Reverse(specificity(&route.config)));
        routes.iter_mut().enumerate().for_each(|(index, route)| route.index = index);
        Routes(routes)
    }

    pub(crate) fn at(&self, index: usize) -> Option<&Route> {
        self.0.get(index)
    }

    /// The name of the route at `index`; empty if there is none.
    pub(crate) fn name(&self, index: Option<usize>) -> &str {
        index.and_then(|index| self.0.get(index)).map_or("", |route| &route.config.name)
    }

    /// The name of a principal of the route at `index`; empty without one.
    pub(crate) fn principal_name(&self, index: Option<usize>, principal: Option<PrincipalIndex>) -> &str {
        let authenticator = index.and_then(|index| self.0.get(index)?.authenticator.as_ref());
        authenticator.zip(principal).map_or("", |(authenticator, principal)| authenticator.name(principal))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Route> {
        self.0.iter()
    }

    /// The first route that matches.
    pub(crate) fn find(&self, request: &Request) -> Option<&Route> {
        let path = target::matched_path(request.path());
        self.0.iter().find(|route| {
            let config = &route.config;
            config.path.matches(&path)
                && matches_host(&config.host, || request.host())
                && config.accepts_method(request)
                && config.conditions.as_ref().is_none_or(|conditions| conditions.matches(request))
        })
    }
}

fn specificity(config: &RouteConfig) -> (usize, bool, u8, usize, bool, usize) {
    let (path_len, is_exact) = match &config.path {
        PathPattern::Exact(path) => (path.len(), true),
        PathPattern::Prefix(prefix) => (prefix.len(), false),
    };
    let (host_rank, host_len) = match &config.host {
        HostPattern::Any => (0, 0),
        HostPattern::Suffix(suffix) => (1, suffix.len()),
        HostPattern::Exact(host) => (2, host.len()),
    };
    let conditions = config.conditions.as_ref().map_or(0, |conditions| conditions.len());
    (path_len, is_exact, host_rank, host_len, !config.methods.is_empty(), conditions)
}

fn matches_host<'a>(pattern: &HostPattern, host: impl FnOnce() -> &'a str) -> bool {
    match pattern {
        HostPattern::Any => true,
        HostPattern::Exact(exact) => exact == host(),
        HostPattern::Suffix(suffix) => {
            let host = host();
            host.len() > suffix.len() && host.ends_with(suffix.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcard_host_requires_a_label() {
        let wildcard = HostPattern::Suffix(".shop.example".into());
        assert!(matches_host(&wildcard, || "a.shop.example") && !matches_host(&wildcard, || "shop.example"));
        assert!(!matches_host(&wildcard, || ".shop.example") && !matches_host(&wildcard, || "evilshop.example"));
    }

    #[test]
    fn specific_path_precedes_specific_host() {
        let config = |path, host| RouteConfig { host, ..RouteConfig::new("r".into(), path, 0) };
        let exact = specificity(&config(PathPattern::Exact("/a/b".into()), HostPattern::Any));
        let prefix = specificity(&config(PathPattern::Prefix("/a/".into()), HostPattern::Exact("h".into())));
        let root = specificity(&config(PathPattern::Prefix("/".into()), HostPattern::Exact("host.example".into())));
        assert!(exact > prefix && prefix > root);
    }
}
