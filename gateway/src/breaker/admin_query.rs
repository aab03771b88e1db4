//! Admin queries about breakers: the list, and states that an operator sets for a limited time.
//!
//! Rejects states without an end: a breaker that someone has opened and forgotten would be an
//! outage.

use std::fmt;

use super::name::BreakerName;
use super::state::ManualState;
use super::state_change::BreakerStateChange;
use crate::limit::parse_duration;

/// A query about breakers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BreakerQuery {
    /// A page, from the breaker of this number on.
    List { from: usize },
    /// The breakers of a target.
    Target(BreakerTarget),
    /// Changes states on all nodes, or on one.
    Set { target: BreakerTarget, change: BreakerStateChange, node: Option<String> },
}

/// The breakers that a query is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BreakerTarget {
    /// That of one route.
    Route(String),
    /// All of an upstream.
    Upstream(String),
}

/// Why an admin query about breakers is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BreakerQueryError {
    #[error("unknown parameter `{0}`; known parameters: state, for and node; for the list: from")]
    UnknownParameter(String),
    #[error("`{0}` is not the number of a breaker")]
    InvalidNumber(String),
    #[error("`{0}` is not open or closed")]
    InvalidState(String),
    #[error("`{0}` is not a duration such as 90s, 15m or 2h, at most 8 days")]
    InvalidDuration(String),
    #[error("give the state and its duration: state=open or closed, for=15m (at most 8 days)")]
    MissingState,
    #[error("write the path as /api/v1/breakers/route/NAME or /api/v1/breakers/upstream/NAME")]
    InvalidPath,
    #[error("no route `{0}` has a breaker of its own")]
    UnknownRoute(String),
    #[error("the route `{route}` has no breaker of its own: it shares that of the upstream `{upstream}`")]
    SharedBreaker { route: String, upstream: String },
    #[error("no route uses an upstream `{0}`")]
    UnknownUpstream(String),
    #[error("no state is set for `{0}`: there is nothing to end")]
    NoState(String),
    #[error("`{0}` is not the name of a node; omit `node` for all nodes")]
    InvalidNode(String),
    #[error("the fleet has no node `{node}`; its nodes: {nodes}")]
    UnknownNode { node: String, nodes: String },
    #[error(transparent)]
    RegistryFull(#[from] shard::OverrideRegistryFull),
}

impl BreakerQuery {
    /// Parses a query for a page of the list: `from=200`, or nothing.
    pub(crate) fn list(query: &str) -> Result<Self, BreakerQueryError> {
        let mut from = 0;
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            from = match &*name {
                "from" => value.parse().map_err(|_| BreakerQueryError::InvalidNumber(value.into_owned()))?,
                _ => return Err(BreakerQueryError::UnknownParameter(name.into_owned())),
            };
        }
        Ok(BreakerQuery::List { from })
    }

    /// Parses a query that sets a state: `state=open&for=15m`; `node=NAME` for one node.
    pub(crate) fn set(path: &str, query: &str) -> Result<Self, BreakerQueryError> {
        let (mut state, mut duration, mut node) = (None, None, None);
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "state" => {
                    let parsed = ManualState::parse(&value);
                    state = Some(parsed.ok_or_else(|| BreakerQueryError::InvalidState(value.into_owned()))?);
                }
                "for" => {
                    let parsed = parse_duration(&value);
                    duration = Some(parsed.ok_or_else(|| BreakerQueryError::InvalidDuration(value.into_owned()))?);
                }
                "node" => node = Some(node_name(&value)?),
                _ => return Err(BreakerQueryError::UnknownParameter(name.into_owned())),
            }
        }
        let (state, duration) = state.zip(duration).ok_or(BreakerQueryError::MissingState)?;
        let change = BreakerStateChange::Set(state, duration);
        Ok(BreakerQuery::Set { target: BreakerTarget::parse(path)?, change, node })
    }

    /// Parses a query that ends such a state.
    pub(crate) fn clear(path: &str, query: &str) -> Result<Self, BreakerQueryError> {
        let mut node = None;
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "node" => node = Some(node_name(&value)?),
                _ => return Err(BreakerQueryError::UnknownParameter(name.into_owned())),
            }
        }
        Ok(BreakerQuery::Set { target: BreakerTarget::parse(path)?, change: BreakerStateChange::Judge, node })
    }
}

fn node_name(text: &str) -> Result<String, BreakerQueryError> {
    if text.is_empty() || text == "*" {
        Err(BreakerQueryError::InvalidNode(text.to_owned()))
    } else {
        Ok(text.to_owned())
    }
}

/// As it is in paths.
impl fmt::Display for BreakerTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BreakerTarget::Route(name) => write!(f, "route/{name}"),
            BreakerTarget::Upstream(name) => write!(f, "upstream/{name}"),
        }
    }
}

impl BreakerTarget {
    /// Whether the breaker of this name is one of them.
    pub(crate) fn includes(&self, name: &BreakerName) -> bool {
        match self {
            BreakerTarget::Route(route) => name.route.as_deref() == Some(route),
            BreakerTarget::Upstream(upstream) => *name.upstream == **upstream,
        }
    }

    pub(crate) fn parse(path: &str) -> Result<Self, BreakerQueryError> {
        match path.split_once('/') {
            Some(("route", name)) if !name.is_empty() => Ok(BreakerTarget::Route(name.to_owned())),
            Some(("upstream", name)) if !name.is_empty() => Ok(BreakerTarget::Upstream(name.to_owned())),
            _ => Err(BreakerQueryError::InvalidPath),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn state_needs_a_duration() {
        let parse = |query: &str| BreakerQuery::set("route/orders", query);
        for query in ["", "state=open", "for=5m"] {
            assert_eq!(parse(query), Err(BreakerQueryError::MissingState), "{query}");
        }
        assert_eq!(parse("state=half-open&for=5m"), Err(BreakerQueryError::InvalidState("half-open".to_owned())));
        for duration in ["", "0s", "5", "9d", "-1s", "1.5m"] {
            let query = format!("state=open&for={duration}");
            assert_eq!(parse(&query), Err(BreakerQueryError::InvalidDuration(duration.to_owned())));
        }
        assert_eq!(parse("state=open&for=5m&x=1"), Err(BreakerQueryError::UnknownParameter("x".to_owned())));
        let target = BreakerTarget::Route("orders".to_owned());
        let change = BreakerStateChange::Set(ManualState::Open, Duration::from_secs(300));
        let set = |node: Option<&str>| {
            Ok(BreakerQuery::Set { target: target.clone(), change, node: node.map(str::to_owned) })
        };
        assert_eq!(parse("state=open&for=5m"), set(None));
        assert_eq!(parse("node=b&state=open&for=5m"), set(Some("b")));
        assert_eq!(parse("state=open&for=5m&node=*"), Err(BreakerQueryError::InvalidNode("*".to_owned())));
    }

    #[test]
    fn list_begins_where_the_query_says() {
        assert_eq!(BreakerQuery::list(""), Ok(BreakerQuery::List { from: 0 }));
        assert_eq!(BreakerQuery::list("from=200"), Ok(BreakerQuery::List { from: 200 }));
        for query in ["from=", "from=-1", "from=x", "to=1"] {
            assert!(BreakerQuery::list(query).is_err(), "{query}");
        }
    }

    #[test]
    fn path_names_a_route_or_an_upstream() {
        for path in ["", "orders", "route/", "node/orders"] {
            assert_eq!(BreakerQuery::clear(path, ""), Err(BreakerQueryError::InvalidPath), "{path}");
        }
        let target = BreakerTarget::Upstream("shop".to_owned());
        assert_eq!(target.to_string(), "upstream/shop");
        let cleared = |node: Option<&str>| {
            let change = BreakerStateChange::Judge;
            Ok(BreakerQuery::Set { target: target.clone(), change, node: node.map(str::to_owned) })
        };
        assert_eq!(BreakerQuery::clear("upstream/shop", ""), cleared(None));
        assert_eq!(BreakerQuery::clear("upstream/shop", "node=b"), cleared(Some("b")));
        assert!(BreakerQuery::clear("upstream/shop", "for=1m").is_err());
    }
}
