//! Routes: which requests they match and the policies those requests get, every one already typed and built.

use std::num::NonZeroU32;
use std::sync::Arc;

use http::Method;
use limiter::{Cost, RuleSet};

use crate::breaker::Breaker;
use crate::http::message::{Request, StatusCode};
use crate::metrics::{Counter, Counters};
use crate::upstream::Upstream;
use crate::{cache, degrade, label};

/// One `[[routes]]`, every name in it resolved to an index.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The name in logs and metrics, unique.
    pub name: Arc<str>,
    /// Hosts that match.
    pub host: HostPattern,
    /// Paths that match.
    pub path: PathPattern,
    /// Methods that match; empty: all.
    pub methods: Vec<Method>,
    /// Index into the upstreams.
    pub upstream: usize,
    /// Indexes into the limit rules.
    pub limits: Vec<usize>,
    /// What one request costs in each rule.
    pub cost: NonZeroU32,
    /// What its answer costs beside that, by status; the first that fits counts.
    pub cost_by_status: Vec<(cache::Statuses, NonZeroU32)>,
    /// Cache policy; `None`: neither looked up nor stored.
    pub cache: Option<cache::RoutePolicy>,
    /// What is answered when all else failed.
    pub degrade: degrade::Settings,
}

impl Settings {
    /// A route for `path` on any host, with the defaults of every other key.
    pub fn new(name: Arc<str>, path: PathPattern, upstream: usize) -> Self {
        Settings {
            name,
            host: HostPattern::Any,
            path,
            methods: Vec::new(),
            upstream,
            limits: Vec::new(),
            cost: NonZeroU32::MIN,
            cost_by_status: Vec::new(),
            cache: Some(cache::RoutePolicy::default()),
            degrade: degrade::Settings::default(),
        }
    }
}

/// Which hosts a route matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// `*`: all, a request without a host included.
    Any,
    /// One host, in lower case, without a port.
    Exact(String),
    /// `*.example.org`: every host below, held as `.example.org` in lower case.
    Suffix(String),
}

/// Which paths a route matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathPattern {
    /// This path alone.
    Exact(String),
    /// `/orders/*`: `/orders/` and everything below it, held as `/orders/`. `/*` matches all.
    Prefix(String),
}

/// A route with everything its requests need, built once.
pub struct Route {
    pub settings: Settings,
    /// Its place among the routes, by which stories tell it: they would else count uses of its name, which all threads write.
    pub index: usize,
    pub upstream: Arc<Upstream>,
    pub breaker: Arc<Breaker>,
    pub rules: RuleSet,
    pub cost: Cost,
    pub counts: Arc<Counts>,
}

impl Route {
    /// What a request costs beside its own cost, now that its answer is known.
    pub fn cost_after(&self, status: StatusCode) -> Option<Cost> {
        let fits = |(statuses, _): &&(cache::Statuses, NonZeroU32)| statuses.include(status.as_u16());
        self.settings.cost_by_status.iter().find(fits).map(|(_, cost)| Cost::new(*cost))
    }
}

label! {
    /// The class of an answer's status.
    StatusClass, "status_class", {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
    }
}

impl StatusClass {
    pub fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            100..200 => StatusClass::Informational,
            200..300 => StatusClass::Success,
            300..400 => StatusClass::Redirection,
            400..500 => StatusClass::ClientError,
            _ => StatusClass::ServerError,
        }
    }
}

/// What a route has answered; outlives a reload.
#[derive(Default)]
pub struct Counts {
    pub answers: Counters<StatusClass>,
    pub degraded: Counter,
}

/// All routes, most specific first.
pub struct Routes(Vec<Route>);

impl Routes {
    /// Orders the routes: the most specific path first, then the most specific host, then those that name methods.
    pub fn new(mut routes: Vec<Route>) -> Self {
        routes.sort_by_key(|route| std::cmp::Reverse(specificity(&route.settings)));
        routes.iter_mut().enumerate().for_each(|(index, route)| route.index = index);
        Routes(routes)
    }

    pub fn at(&self, index: usize) -> Option<&Route> {
        self.0.get(index)
    }

    /// The name of the route at `index`; empty where there is none.
    pub fn name(&self, index: Option<usize>) -> &str {
        index.and_then(|index| self.0.get(index)).map_or("", |route| &route.settings.name)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.0.iter()
    }

    /// The first route that matches.
    pub fn find(&self, request: &Request) -> Option<&Route> {
        let path = request.path();
        self.0.iter().find(|route| {
            let settings = &route.settings;
            matches_path(&settings.path, path)
                && matches_host(&settings.host, || request.host())
                && (settings.methods.is_empty() || settings.methods.contains(&request.method))
        })
    }
}

fn specificity(settings: &Settings) -> (usize, bool, u8, usize, bool) {
    let (path_len, is_exact) = match &settings.path {
        PathPattern::Exact(path) => (path.len(), true),
        PathPattern::Prefix(prefix) => (prefix.len(), false),
    };
    let (host_rank, host_len) = match &settings.host {
        HostPattern::Any => (0, 0),
        HostPattern::Suffix(suffix) => (1, suffix.len()),
        HostPattern::Exact(host) => (2, host.len()),
    };
    (path_len, is_exact, host_rank, host_len, !settings.methods.is_empty())
}

fn matches_path(pattern: &PathPattern, path: &str) -> bool {
    match pattern {
        PathPattern::Exact(exact) => exact == path,
        // `OPTIONS *` has no path; only the route for everything can mean it.
        PathPattern::Prefix(prefix) => prefix == "/" || path.starts_with(prefix.as_str()),
    }
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
    fn a_prefix_ends_at_a_segment() {
        let orders = PathPattern::Prefix("/orders/".into());
        assert!(matches_path(&orders, "/orders/") && matches_path(&orders, "/orders/1"));
        assert!(!matches_path(&orders, "/orders-old") && !matches_path(&orders, "/"));
        assert!(matches_path(&PathPattern::Prefix("/".into()), "*"));
    }

    #[test]
    fn a_wildcard_host_needs_a_label() {
        let any = HostPattern::Suffix(".shop.example".into());
        assert!(matches_host(&any, || "a.shop.example") && !matches_host(&any, || "shop.example"));
        assert!(!matches_host(&any, || ".shop.example") && !matches_host(&any, || "evilshop.example"));
    }

    #[test]
    fn the_most_specific_path_wins_over_any_host() {
        let settings = |path, host| Settings { host, ..Settings::new("r".into(), path, 0) };
        let exact = specificity(&settings(PathPattern::Exact("/a/b".into()), HostPattern::Any));
        let prefix = specificity(&settings(PathPattern::Prefix("/a/".into()), HostPattern::Exact("h".into())));
        let root = specificity(&settings(PathPattern::Prefix("/".into()), HostPattern::Exact("host.example".into())));
        assert!(exact > prefix && prefix > root);
    }
}
