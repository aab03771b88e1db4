//! Settings without effect because nothing that they refer to is configured, routes that no request
//! matches, and routes without metrics.

use std::net::IpAddr;

use super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::read_context::ReadContext;
use super::section::{ConfigDraft, RouteReferences};
use crate::cache::{CacheConfig, StatusPattern};
use crate::error::ErrorKind;
use crate::http::message::{Method, Scheme, StatusCode};
use crate::limit::LimitConfig;
use crate::metrics;
use crate::pages::ErrorPage;
use crate::route::{
    FixedResponse, HeaderEdits, HostPattern, PathPattern, Redirect, RouteAction, RouteConfig, RouteCounters,
};
use crate::upstream::{UpstreamConfig, UpstreamStats};

/// Fields that responses with a status must have (RFC 9110 sections 15.3.7, 15.4, 15.5.2, 15.5.6).
const FIELDS_OF_STATUSES: [(&[u16], &str); 4] = [
    (&[206], "content-range"),
    (&[301, 302, 303, 307, 308], "location"),
    (&[401], "www-authenticate"),
    (&[405], "allow"),
];

/// Warns of each setting without effect.
pub(super) fn check(draft: &ConfigDraft, context: &ReadContext<'_>) {
    let checks = Checks { draft, context };
    checks.metrics();
    checks.zones();
    checks.regions();
    checks.user_classes();
    checks.exempt_callers();
    checks.remote_size();
    checks.pages(&draft.config.pages, &draft.config.routes, &draft.pages);
    for (route, names) in draft.config.routes.iter().zip(&draft.routes) {
        checks.costs(route, names);
        checks.pages(&route.pages, std::slice::from_ref(route), &names.pages);
        checks.targets(route, names);
        checks.scheme(route, names);
        match &route.action {
            RouteAction::Forward => {}
            RouteAction::Redirect(redirect) => checks.redirect(redirect, route, names),
            RouteAction::Respond(response) => checks.respond(response, route, names),
        }
    }
}

struct Checks<'a> {
    draft: &'a ConfigDraft,
    context: &'a ReadContext<'a>,
}

impl Checks<'_> {
    fn warn(&self, at: &DocumentLocation, message: impl Into<String>, hint: &str) {
        self.warn_of_lack(at, message, (hint, &[]));
    }

    /// As `warn`, unless errors of the keys `lacking` explain that they have no value.
    fn warn_of_lack(&self, at: &DocumentLocation, message: impl Into<String>, (hint, lacking): (&str, &[&str])) {
        self.context.warning(at, ConfigProblem::new(FaultCode::Risk, message).hint(hint).lacks(lacking));
    }

    /// The counters of routes and upstreams are bounded. Those of a former configuration are kept
    /// until its last request has ended, for the names that the new one does not have.
    fn metrics(&self) {
        let (routes, upstreams) = (self.draft.routes.len(), self.draft.config.upstreams.len());
        let most = metrics::CELLS_MAX.saturating_sub(upstreams * UpstreamStats::CELLS) / RouteCounters::CELLS;
        let at =
            |index: usize| self.draft.routes.get(index).map_or_else(DocumentLocation::default, |it| it.name.clone());
        if routes > most {
            let message =
                format!("the metrics of {routes} routes do not fit beside those of the upstreams ({upstreams})");
            let hint = format!("at most {most} routes; a path such as \"/shop/*\" stands for several");
            self.context.error(&at(most), ConfigProblem::bad_value(message).hint(hint));
        } else if routes > most / 2 {
            let message =
                format!("a reload that renames {} routes would leave some without metrics", most - routes + 1);
            self.warn(&at(most / 2), message, "a path such as \"/shop/*\" stands for several");
        }
    }

    /// Zones are compared: those of endpoints with that of the gateway.
    fn zones(&self) {
        let config = &self.draft.config;
        let has_zone = |upstream: &UpstreamConfig| {
            // The records of a service of Kubernetes name zones too.
            upstream.zones.iter().any(Option::is_some) || upstream.endpoints.iter().any(|it| it.scheme.is_kubernetes())
        };
        if config.server.zone.is_some() && !config.upstreams.iter().any(has_zone) {
            let hint = "write endpoints as `{ url = \"...\", zone = \"...\" }`";
            let message = "`zone` has no effect: no endpoint has a zone";
            self.warn_of_lack(&self.draft.zone, message, (hint, &["upstreams"]));
        }
        for (upstream, at) in config.upstreams.iter().zip(&self.draft.upstreams) {
            if config.server.zone.is_none() && upstream.zones.iter().any(Option::is_some) {
                let hint = "set `server.zone`, such as \"${ZONE}\"";
                let message = "the zones of the endpoints have no effect: this gateway has none";
                self.warn_of_lack(at, message, (hint, &["server.zone"]));
            }
        }
    }

    /// Without a source, every request is in the default region.
    fn regions(&self) {
        let (identify, Some(remote)) = (&self.draft.config.identify, &self.draft.config.remote) else { return };
        if !identify.region.is_empty() || self.context.has_fault_under("redis") {
            return;
        }
        let fallback = remote.regions.get(&remote.default_region).map_or(&[][..], |region| &region.fallback);
        for region in self.draft.regions.iter().flatten() {
            if region.value != remote.default_region && !fallback.contains(&region.value) {
                let message = format!("no request is in the region `{}`", region.value);
                let hint = "set `identity.region`, the source of the region";
                self.warn_of_lack(&region.at, message, (hint, &["identity.region"]));
            }
        }
    }

    /// Without a source, a user has the class `standard`.
    fn user_classes(&self) {
        let config = &self.draft.config;
        let has_keys = self.draft.routes.iter().any(|names| names.key_classes.is_some());
        if config.identify.user_class.is_some() || has_keys || self.context.has_fault_under("limits") {
            return;
        }
        let default = LimitConfig::default().weights;
        let is_default = |name: &str| default.iter().any(|(known, _)| known == name);
        if let Some((name, _)) = config.limit.weights.iter().find(|(name, _)| !is_default(name)) {
            let message = format!("no caller has the class `{name}`");
            let hint = "set `identity.tier`, the source of the class";
            self.warn_of_lack(&self.draft.tiers, message, (hint, &["identity.tier"]));
        }
    }

    fn exempt_callers(&self) {
        let config = &self.draft.config;
        if !config.identify.access.exempt.is_empty() && config.limit.rules.is_empty() {
            let message = "`exempt` has no effect: there are no limits";
            self.warn_of_lack(&self.draft.exempt, message, ("write `[limits.NAME]`", &["limits"]));
        }
    }

    fn remote_size(&self) {
        let config = &self.draft.config;
        if config.remote.is_none() && config.cache.remote_object_bytes != CacheConfig::default().remote_object_bytes {
            let message = "`remote_object_bytes` has no effect: nothing is stored remotely";
            self.warn_of_lack(&self.draft.remote_object_bytes, message, ("write `[redis]`", &["redis"]));
        }
    }

    /// Pages replace the gateway's own responses.
    fn pages(&self, pages: &[(StatusPattern, ErrorPage)], routes: &[RouteConfig], at: &DocumentLocation) {
        for (statuses, _) in pages {
            let StatusPattern::One(number) = *statuses else { continue };
            let Ok(status) = StatusCode::from_u16(number) else { continue };
            if !ErrorKind::is_answered_with(status) && !routes.iter().any(|route| route.degrade.status == status) {
                let message =
                    format!("the page for {number} has no effect: no response of the gateway has this status");
                self.warn(at, message, "error responses of the origin pass unchanged");
            }
        }
    }

    /// The cost of a request counts in the limits of its route.
    fn costs(&self, route: &RouteConfig, names: &RouteReferences) {
        if !names.limits.is_empty() {
            return;
        }
        let has_more = !route.cost_by_status.is_empty();
        let costs = [("cost", &names.cost, route.cost.get() > 1), ("cost_by_status", &names.cost_by_status, has_more)];
        for (key, at, _) in costs.into_iter().filter(|(.., is_set)| *is_set) {
            let message = format!("`{key}` has no effect: the route has no limits");
            let limits = names.cost.path.replace(".cost", ".limits");
            self.warn_of_lack(at, message, ("name limits in `limits`", &[&limits]));
        }
    }

    /// Further upstreams of a route are others, and a second endpoint is another one.
    fn targets(&self, route: &RouteConfig, names: &RouteReferences) {
        let Some(upstream) = &names.upstream else { return };
        for (key, other) in [("canary", &names.canary), ("mirror", &names.mirror)] {
            if let Some(other) = other.as_ref().filter(|other| other.value == upstream.value) {
                let message = format!("`{key}` names the upstream of the route, `{}`", upstream.value);
                self.warn(&other.at, message, "name another upstream");
            }
        }
        let endpoints = self.draft.config.upstreams.get(route.upstream).map_or(&[][..], |it| &it.endpoints);
        if let ([endpoint], true, None) = (endpoints, route.hedge, &route.canary)
            && endpoint.host.parse::<IpAddr>().is_ok()
        {
            let message = format!("`hedge` has no effect: `{}` has one endpoint", upstream.value);
            self.warn(&names.hedge, message, "a second request goes to another endpoint");
        }
    }

    /// Whether a request can have a scheme: that of its connection, or the one that a trusted proxy
    /// names.
    fn is_possible(&self, scheme: Scheme) -> bool {
        let config = &self.draft.config;
        !config.identify.trusted_proxies.is_empty()
            || config.listen.iter().any(|listen| listen.tls.is_some() == (scheme == Scheme::Https))
    }

    fn scheme(&self, route: &RouteConfig, names: &RouteReferences) {
        let scheme = route.conditions.as_ref().and_then(|conditions| conditions.scheme);
        if let Some(scheme) = scheme.filter(|scheme| !self.is_possible(*scheme)) {
            let message = format!("this route matches no request: no listener is reached by {}", scheme.as_str());
            let hint = match scheme {
                Scheme::Https => "write `[listen.tls]`, or `identity.trusted_proxies` for a proxy that ends TLS",
                Scheme::Http => "write a `[[listen]]` without TLS",
            };
            self.warn_of_lack(&names.matched, message, (hint, &["listen", "identity.trusted_proxies"]));
        }
    }

    /// The meaning of some statuses is in a field.
    fn respond(&self, response: &FixedResponse, route: &RouteConfig, names: &RouteReferences) {
        let status = response.status.as_u16();
        let Some((_, field)) = FIELDS_OF_STATUSES.iter().find(|(statuses, _)| statuses.contains(&status)) else {
            return;
        };
        let edits = route.edits.as_ref().map(|edits| &edits.response);
        let names_of = |edits: &HeaderEdits| edits.set.iter().chain(&edits.add).any(|(name, _)| name == field);
        if !edits.is_some_and(names_of) {
            let message = format!("a response with status {status} says nothing without `{field}`");
            let hint = match *field {
                "location" => "write `redirect = { to = \"...\" }` in place of `respond`",
                _ => "set the field in `headers.response.set`",
            };
            self.warn(&names.respond, message, hint);
        }
    }

    /// A redirect to a URL of its own route leads back to itself.
    fn redirect(&self, redirect: &Redirect, route: &RouteConfig, names: &RouteReferences) {
        let source = redirect.to.source();
        let hint = "a client that follows it comes back without end";
        let conditions = route.conditions.as_deref();
        if conditions.is_some_and(|conditions| !conditions.headers.is_empty() || !conditions.query.is_empty())
            || !route.methods.is_empty() && !route.methods.contains(&Method::GET)
        {
            return;
        }
        let required = conditions.and_then(|conditions| conditions.scheme);
        let comes_back = |scheme| self.is_possible(scheme) && required.is_none_or(|required| required == scheme);
        let same_url = ["{host}{uri}", "{authority}{uri}", "{host}{path}", "{authority}{path}"];
        let is_same = match source.split_once("://") {
            Some((scheme, rest)) if same_url.contains(&rest) => match scheme {
                "https" => comes_back(Scheme::Https),
                "http" => comes_back(Scheme::Http),
                // `{scheme}`.
                _ => true,
            },
            Some(_) => false,
            None => self.is_only_route_for(&source, route),
        };
        if is_same {
            self.warn(&names.redirect, "this redirect leads to the route that sends it", hint);
        }
    }

    /// Whether a path, of which the part before its first variable is known, leads to `route`, and
    /// no other route could take it.
    fn is_only_route_for(&self, target: &str, route: &RouteConfig) -> bool {
        let known = target.split(['{', '?', '#']).next().unwrap_or_default();
        let is_whole = !target.contains('{');
        let may_match = |path: &PathPattern| match path {
            PathPattern::Exact(exact) if is_whole => exact == known,
            PathPattern::Exact(exact) => exact.starts_with(known),
            PathPattern::Prefix(prefix) if is_whole => known.starts_with(prefix.as_str()),
            PathPattern::Prefix(prefix) => known.starts_with(prefix.as_str()) || prefix.starts_with(known),
        };
        let leads_back = match &route.path {
            PathPattern::Exact(exact) => is_whole && exact == known,
            PathPattern::Prefix(prefix) => known.starts_with(prefix.as_str()),
        };
        let is_other = |other: &&RouteConfig| other.name != route.name && may_match(&other.path);
        // A less specific route takes nothing from this one.
        let is_below = |other: &RouteConfig| {
            let is_less_specific = match (&other.path, &route.path) {
                (PathPattern::Prefix(_), PathPattern::Exact(_)) => true,
                (PathPattern::Prefix(other), PathPattern::Prefix(own)) => other.len() < own.len(),
                (PathPattern::Exact(_), _) => false,
            };
            is_less_specific && matches!(other.host, HostPattern::Any) && other.conditions.is_none()
        };
        leads_back && self.draft.config.routes.iter().filter(is_other).all(is_below)
    }
}
