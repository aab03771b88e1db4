//! Orders to purge, as operators give them, and what came of them.

use serde_json::json;
use shard::{Purge, Scope, Tag};

use crate::cache;
use crate::cache::tags::{self, BadUrl};

/// What is to be purged, all of it hard or all of it softly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub targets: Vec<Target>,
    /// What is purged softly becomes stale instead of going: it may answer while it is validated, or for a failing origin.
    pub is_soft: bool,
    /// The one node that is meant, instead of all of the fleet.
    pub node: Option<String>,
}

/// One thing to purge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Everything,
    Tag(String),
    Url(String),
}

/// Why an order cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadOrder {
    #[error("say what to purge: url=URL, tag=TAG or all=true; soft=true makes it stale instead")]
    Nothing,
    #[error("`{0}` is no parameter of a purge; there are url, tag, all, soft and node")]
    Unknown(String),
    #[error("`{0}` is true or false")]
    NotBool(&'static str),
    #[error("`{0}` is not the name of a node; all are meant without")]
    NoNode(String),
    #[error("an empty tag is no tag")]
    EmptyTag,
    #[error("{url:?}: {why}")]
    Url { url: String, why: BadUrl },
    #[error(transparent)]
    TooMany(#[from] shard::TooMany),
}

impl Order {
    /// Reads the query of a request to the admin address: `tag=a&tag=b`, `url=http://shop.example/`, `all=true`, `soft=true`.
    ///
    /// # Errors
    /// What the sender has to change.
    pub fn parse(query: &str) -> Result<Order, BadOrder> {
        let mut order = Order { targets: Vec::new(), is_soft: false, node: None };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "url" => order.targets.push(Target::Url(value.into_owned())),
                "tag" if value.is_empty() => return Err(BadOrder::EmptyTag),
                "tag" => order.targets.push(Target::Tag(value.into_owned())),
                "all" => {
                    if boolean("all", &value)? {
                        order.targets.push(Target::Everything);
                    }
                }
                "soft" => order.is_soft = boolean("soft", &value)?,
                "node" if value.is_empty() || value == "*" => return Err(BadOrder::NoNode(value.into_owned())),
                "node" => order.node = Some(value.into_owned()),
                _ => return Err(BadOrder::Unknown(name.into_owned())),
            }
        }
        if order.targets.is_empty() { Err(BadOrder::Nothing) } else { Ok(order) }
    }

    /// The query that `parse` reads.
    pub fn query(&self) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        for target in &self.targets {
            match target {
                Target::Everything => query.append_pair("all", "true"),
                Target::Tag(tag) => query.append_pair("tag", tag),
                Target::Url(url) => query.append_pair("url", url),
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

    /// What the store has to do for it.
    ///
    /// # Errors
    /// A URL that cannot be one; nothing is purged then.
    pub fn purges(&self, settings: &cache::Settings) -> Result<Vec<Purge>, BadOrder> {
        let scope = |target: &Target| match target {
            Target::Everything => Ok(Scope::Everything),
            Target::Tag(name) => Ok(Scope::Tag(Tag::named(name.as_bytes()))),
            Target::Url(url) => {
                tags::of_url(settings, url).map(Scope::Tag).map_err(|why| BadOrder::Url { url: url.clone(), why })
            }
        };
        self.targets.iter().map(|target| Ok(Purge { scope: scope(target)?, is_soft: self.is_soft })).collect()
    }

    /// As a log tells it.
    pub fn told(&self) -> String {
        let told: Vec<String> = self.targets.iter().take(8).map(Target::told).collect();
        let more = if self.targets.len() > told.len() { ", ..." } else { "" };
        format!("{}{more}", told.join(", "))
    }
}

impl Target {
    fn told(&self) -> String {
        match self {
            Target::Everything => "everything".to_owned(),
            Target::Tag(tag) => format!("tag {tag:?}"),
            Target::Url(url) => format!("url {url:?}"),
        }
    }
}

fn boolean(name: &'static str, text: &str) -> Result<bool, BadOrder> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(BadOrder::NotBool(name)),
    }
}

/// What the nodes of a fleet said to a purge: it holds on this node in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub acknowledged: Vec<String>,
    /// Nodes that did not confirm it in time; they do it as soon as they are reached again.
    pub missing: Vec<String>,
    /// Regions' servers that could not be told; they are told as soon as they answer again.
    pub untold: Vec<String>,
}

impl Outcome {
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.untold.is_empty()
    }

    pub fn to_json(&self, order: &Order) -> serde_json::Value {
        json!({
            "purged": order.targets.iter().map(Target::told).collect::<Vec<_>>(),
            "soft": order.is_soft,
            "acknowledged": self.acknowledged,
            "missing": self.missing,
            "untold": self.untold,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_as_it_is_written() {
        let targets = vec![Target::Tag("a&b c".into()), Target::Url("http://a/?x=1&y".into()), Target::Everything];
        for is_soft in [false, true] {
            let order = Order { targets: targets.clone(), is_soft, node: is_soft.then(|| "n 1".to_owned()) };
            assert_eq!(Order::parse(&order.query()), Ok(order));
        }
    }

    #[test]
    fn what_is_unclear_is_refused() {
        for (query, why) in [
            ("", BadOrder::Nothing),
            ("soft=true", BadOrder::Nothing),
            ("all=false", BadOrder::Nothing),
            ("all=yes", BadOrder::NotBool("all")),
            ("tag=", BadOrder::EmptyTag),
            ("tags=a", BadOrder::Unknown("tags".into())),
            ("all=true&node=*", BadOrder::NoNode("*".into())),
        ] {
            assert_eq!(Order::parse(query), Err(why), "{query}");
        }
        let order =
            Order { targets: vec![Target::Tag("a".into()), Target::Url("/a".into())], is_soft: false, node: None };
        let refused = order.purges(&cache::Settings::default());
        assert_eq!(refused, Err(BadOrder::Url { url: "/a".into(), why: BadUrl::NotAbsolute }));
    }
}
