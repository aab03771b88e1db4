//! Purge orders of operators and their outcomes.

use std::sync::Arc;

use serde_json::json;
use shard::{Bus, Purge, PurgeScope, Tag};

use crate::cache::stored::CacheMeta;
use crate::cache::tags::{self, PurgeUrlError};
use crate::{cache, metrics};

/// Order to purge some targets, all of them hard or all of them soft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurgeOrder {
    pub targets: Vec<PurgeTarget>,
    /// A soft purge makes objects stale instead of removing them: they may be served while they are
    /// validated, or if the origin fails.
    pub is_soft: bool,
    /// Limits the purge to one node; `None` for the whole fleet.
    pub node: Option<String>,
}

/// Target of a purge: every entry, those with a surrogate key, or those of a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PurgeTarget {
    Everything,
    Tag(String),
    Url(String),
}

/// Reason for rejecting a purge order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PurgeOrderError {
    #[error("give a target: url=URL, tag=TAG or all=true; soft=true marks objects stale instead of removing them")]
    NoTarget,
    #[error("unknown parameter `{0}`; known parameters: url, tag, all, soft and node")]
    UnknownParameter(String),
    #[error("`{0}` must be true or false")]
    NotBool(&'static str),
    #[error("`{0}` is not the name of a node; omit `node` for all nodes")]
    InvalidNode(String),
    #[error("the fleet has no node `{node}`; its nodes: {nodes}")]
    UnknownNode { node: String, nodes: String },
    #[error("a tag must not be empty")]
    EmptyTag,
    #[error(
        "{0:?} is not one tag: white space and commas separate the tags of a response; repeat `tag` for each of several"
    )]
    SeveralTags(String),
    #[error("{0:?} is not a tag: the value of a response field has no control characters")]
    InvalidTag(String),
    #[error("all=true purges every stored response; omit `all`, or `url` and `tag`")]
    AllAndTargets,
    #[error(
        "{0:?}: a purge of a URL is not one of all URLs that begin with it; purge by tag (for a `*` of the URL itself, write %2A)"
    )]
    Prefix(String),
    #[error("{url:?}: {reason}")]
    Url { url: String, reason: PurgeUrlError },
    #[error(transparent)]
    OutboxFull(#[from] shard::PurgeOutboxFull),
}

impl PurgeOrder {
    /// Parses the query of an admin API request: `tag=a&tag=b`, `url=http://shop.example/`,
    /// `all=true`, `soft=true`.
    ///
    /// # Errors
    /// An unknown or invalid parameter, or no target.
    pub(crate) fn parse(query: &str) -> Result<PurgeOrder, PurgeOrderError> {
        let mut order = PurgeOrder { targets: Vec::new(), is_soft: false, node: None };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "url" if value.ends_with('*') => return Err(PurgeOrderError::Prefix(value.into_owned())),
                "url" => order.targets.push(PurgeTarget::Url(value.into_owned())),
                "tag" => order.targets.push(PurgeTarget::Tag(parse_tag(value.into_owned())?)),
                "all" => {
                    if parse_bool("all", &value)? {
                        order.targets.push(PurgeTarget::Everything);
                    }
                }
                "soft" => order.is_soft = parse_bool("soft", &value)?,
                "node" if value.is_empty() || value == "*" => {
                    return Err(PurgeOrderError::InvalidNode(value.into_owned()));
                }
                "node" => order.node = Some(value.into_owned()),
                _ => return Err(PurgeOrderError::UnknownParameter(name.into_owned())),
            }
        }
        match &order.targets[..] {
            [] => Err(PurgeOrderError::NoTarget),
            [_, _, ..] if order.targets.contains(&PurgeTarget::Everything) => Err(PurgeOrderError::AllAndTargets),
            _ => Ok(order),
        }
    }

    /// Encodes the order as a query for `parse`.
    pub(crate) fn to_query(&self) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        for target in &self.targets {
            match target {
                PurgeTarget::Everything => query.append_pair("all", "true"),
                PurgeTarget::Tag(tag) => query.append_pair("tag", tag),
                PurgeTarget::Url(url) => query.append_pair("url", url),
            };
        }
        if self.is_soft {
            query.append_pair("soft", "true");
        }
        if let Some(node) = &self.node {
            query.append_pair("node", node);
        }
        query.finish()
    }

    /// Converts the order into purges of the store.
    ///
    /// # Errors
    /// An invalid URL; nothing is purged.
    pub(crate) fn purges(&self, settings: &cache::CacheConfig) -> Result<Vec<Purge>, PurgeOrderError> {
        let scope = |target: &PurgeTarget| match target {
            PurgeTarget::Everything => Ok(PurgeScope::Everything),
            PurgeTarget::Tag(name) => Ok(PurgeScope::Tag(Tag::surrogate_key(name.as_bytes()))),
            PurgeTarget::Url(url) => tags::tag_of_url(settings, url)
                .map(PurgeScope::Tag)
                .map_err(|reason| PurgeOrderError::Url { url: url.clone(), reason }),
        };
        self.targets.iter().map(|target| Ok(Purge { scope: scope(target)?, is_soft: self.is_soft })).collect()
    }

    /// Description for the log: at most eight targets.
    pub fn description(&self) -> String {
        let descriptions: Vec<String> = self.targets.iter().take(8).map(PurgeTarget::description).collect();
        let more = if self.targets.len() > descriptions.len() { ", ..." } else { "" };
        format!("{}{more}", descriptions.join(", "))
    }
}

impl PurgeTarget {
    fn description(&self) -> String {
        match self {
            PurgeTarget::Everything => "everything".to_owned(),
            PurgeTarget::Tag(tag) => format!("tag {tag:?}"),
            PurgeTarget::Url(url) => format!("url {url:?}"),
        }
    }
}

/// A purge of a tag that no response can have would report success and purge nothing.
fn parse_tag(tag: String) -> Result<String, PurgeOrderError> {
    if tag.is_empty() {
        Err(PurgeOrderError::EmptyTag)
    } else if tag.contains(|character: char| character.is_ascii_whitespace() || character == ',') {
        Err(PurgeOrderError::SeveralTags(tag))
    } else if tag.bytes().any(|byte| byte.is_ascii_control()) {
        Err(PurgeOrderError::InvalidTag(tag))
    } else {
        Ok(tag)
    }
}

fn parse_bool(name: &'static str, text: &str) -> Result<bool, PurgeOrderError> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(PurgeOrderError::NotBool(name)),
    }
}

/// Outcome of a purge in the fleet. The purge always takes effect on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PurgeOutcome {
    pub(crate) acknowledged_nodes: Vec<String>,
    /// Nodes that did not acknowledge the purge in time. They apply it when they are reachable
    /// again.
    pub(crate) unacknowledged_nodes: Vec<String>,
    /// Redis servers that could not be reached. They receive the purge when they are reachable
    /// again.
    pub(crate) unreachable_servers: Vec<String>,
}

impl PurgeOutcome {
    pub(crate) fn is_complete(&self) -> bool {
        self.unacknowledged_nodes.is_empty() && self.unreachable_servers.is_empty()
    }

    pub(crate) fn to_json(&self, order: &PurgeOrder) -> serde_json::Value {
        json!({
            "purged": order.targets.iter().map(PurgeTarget::description).collect::<Vec<_>>(),
            "soft": order.is_soft,
            "acknowledged_nodes": self.acknowledged_nodes,
            "unacknowledged_nodes": self.unacknowledged_nodes,
            "unreachable_servers": self.unreachable_servers,
        })
    }
}

/// Registers the metrics of the bus that carries purges.
pub(crate) fn expose(bus: &Arc<Bus<CacheMeta>>) {
    let messages = Arc::clone(bus);
    metrics::expose_counter_with(
        "tidegate_bus_messages",
        "Messages received from the fleet's bus, by kind.",
        move |emit| {
            let report = messages.report();
            let counts = [
                ("purge", report.purges_received),
                ("override", report.overrides_received),
                ("invalidation", report.invalidations),
                ("gap", report.subscription_gaps),
            ];
            for (kind, count) in counts {
                emit(&[("kind", kind)], count);
            }
        },
    );
    let pending = Arc::clone(bus);
    metrics::expose_gauge_with(
        "tidegate_purges_pending",
        "Purges that are not yet published to any server.",
        move |emit| {
            emit(&[], pending.report().pending_purges as f64);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_round_trips() {
        let targets = vec![PurgeTarget::Tag("a&b+c\u{e4}".into()), PurgeTarget::Url("http://a/?x=1&y".into())];
        for targets in [targets, vec![PurgeTarget::Everything]] {
            for is_soft in [false, true] {
                let order = PurgeOrder { targets: targets.clone(), is_soft, node: is_soft.then(|| "n 1".to_owned()) };
                assert_eq!(PurgeOrder::parse(&order.to_query()), Ok(order));
            }
        }
    }

    #[test]
    fn invalid_orders_are_rejected() {
        for (query, error) in [
            ("", PurgeOrderError::NoTarget),
            ("soft=true", PurgeOrderError::NoTarget),
            ("all=false", PurgeOrderError::NoTarget),
            ("all=yes", PurgeOrderError::NotBool("all")),
            ("tag=", PurgeOrderError::EmptyTag),
            ("tag=a%20b", PurgeOrderError::SeveralTags("a b".into())),
            ("tag=c&tag=a,b", PurgeOrderError::SeveralTags("a,b".into())),
            ("tag=a%09", PurgeOrderError::SeveralTags("a\t".into())),
            ("tag=a%00", PurgeOrderError::InvalidTag("a\0".into())),
            ("all=true&tag=x", PurgeOrderError::AllAndTargets),
            ("url=http://a/&all=true", PurgeOrderError::AllAndTargets),
            ("tags=a", PurgeOrderError::UnknownParameter("tags".into())),
            ("url=http://a.test/b/*", PurgeOrderError::Prefix("http://a.test/b/*".into())),
            ("all=true&node=*", PurgeOrderError::InvalidNode("*".into())),
        ] {
            assert_eq!(PurgeOrder::parse(query), Err(error), "{query}");
        }
        let order = PurgeOrder {
            targets: vec![PurgeTarget::Tag("a".into()), PurgeTarget::Url("/a".into())],
            is_soft: false,
            node: None,
        };
        let result = order.purges(&cache::CacheConfig::default());
        assert_eq!(result, Err(PurgeOrderError::Url { url: "/a".into(), reason: PurgeUrlError::NotAbsolute }));
    }
}
