//! Owns what is said on the bus: an event's text form, and its place in a stream.
//!
//! Refuses what it does not understand: a later release may say more.

use crate::entry::{Purge, Scope};
use crate::key::Tag;
use redis::{Value, from_redis_value_ref};
use std::fmt;
use std::str::FromStr;

/// A place in a stream; places are in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    ms: u64,
    sequence: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.sequence)
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, sequence) = text.split_once('-').ok_or(())?;
        Ok(Self { ms: ms.parse().map_err(|_| ())?, sequence: sequence.parse().map_err(|_| ())? })
    }
}

/// What is told on the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// `*` or a node.
    pub(super) to: String,
    pub(super) what: What,
    /// The member that told it.
    pub(super) from: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Purge { purge: Purge, number: u64 },
    Notice(Said),
}

/// A notice as a server keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) name: String,
    pub(super) text: String,
    pub(super) version: u64,
    /// By the server's clock, in milliseconds since 1970.
    pub(super) until_ms: u64,
}

/// `version until text`, as a server keeps a notice by its name.
pub(super) fn said(name: String, kept: &str) -> Option<Said> {
    let mut parts = kept.splitn(3, ' ');
    let (version, until_ms) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some(Said { name, text: parts.next()?.to_owned(), version, until_ms })
}

/// What a notice's `what` is, which no purge's is.
pub(super) const NOTICE: &str = "notice";

/// `*`, or a tag's hash in hexadecimal; `:s` after it where it is purged softly.
pub(super) fn told(purge: Purge) -> String {
    let soft = if purge.is_soft { ":s" } else { "" };
    match purge.scope {
        Scope::Everything => format!("*{soft}"),
        Scope::Tag(tag) => format!("{:016x}{soft}", tag.hash()),
    }
}

pub(super) fn understood(what: &str) -> Option<Purge> {
    let (scope, is_soft) = what.strip_suffix(":s").map_or((what, false), |scope| (scope, true));
    let scope = match scope {
        "*" => Scope::Everything,
        hash if hash.len() == 16 => Scope::Tag(Tag::from_hash(u64::from_str_radix(hash, 16).ok()?)),
        _ => return None,
    };
    Some(Purge { scope, is_soft })
}

/// The entries of a stream as `XRANGE` gives them; what is not understood has a place and no event.
pub(super) fn entries(reply: &Value) -> Option<Vec<(Position, Option<Event>)>> {
    let Value::Array(entries) = reply else { return matches!(reply, Value::Nil).then(Vec::new) };
    entries.iter().map(entry).collect()
}

fn entry(value: &Value) -> Option<(Position, Option<Event>)> {
    let Value::Array(parts) = value else { return None };
    let [id, fields] = parts.as_slice() else { return None };
    let position = from_redis_value_ref::<String>(id).ok()?.parse().ok()?;
    let fields: Vec<String> = from_redis_value_ref(fields).unwrap_or_default();
    let field = |name: &str| {
        let mut pairs = fields.chunks_exact(2).filter(|pair| pair[0] == name);
        pairs.next().map(|pair| pair[1].clone())
    };
    let event = || {
        let what = match &*field("what")? {
            NOTICE => What::Notice(said(field("name")?, &field("said")?)?),
            purge => What::Purge { purge: understood(purge)?, number: field("n")?.parse().ok()? },
        };
        Some(Event { to: field("to")?, what, from: field("from")? })
    };
    Some((position, event()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn purges_come_back_as_they_were_told() {
        for scope in [Scope::Everything, Scope::Tag(Tag::named(b"a"))] {
            for is_soft in [false, true] {
                let purge = Purge { scope, is_soft };
                assert_eq!(understood(&told(purge)), Some(purge));
            }
        }
        for what in [NOTICE, "", ":s", "x", "0123456789abcdeg", "0123456789abcdef0"] {
            assert_eq!(understood(what), None, "{what}");
        }
    }

    #[test]
    fn places_are_in_order_of_time_and_sequence() {
        let places = ["0-0", "9-1", "10-0", "10-9", "10-10"].map(|text| text.parse::<Position>().unwrap());
        assert!(places.is_sorted());
        assert_eq!(places[4].to_string(), "10-10");
        assert!("10".parse::<Position>().is_err() && "a-1".parse::<Position>().is_err());
    }

    #[test]
    fn an_entry_that_is_not_understood_has_its_place() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let fields = ["n", "7", "to", "*", "what", "*:s", "from", "a/1"].map(text).to_vec();
        let said = ["n", "0", "to", "b", "what", NOTICE, "from", "a/1", "name", "x", "said", "5 60 a text"];
        let bad = ["n", "0", "to", "b", "what", NOTICE, "from", "a/1", "name", "x", "said", "5 a text"].map(text);
        let reply = Value::Array(vec![
            Value::Array(vec![text("1-0"), Value::Array(fields)]),
            Value::Array(vec![text("1-1"), Value::Array(vec![text("what"), text("later")])]),
            Value::Array(vec![text("1-2"), Value::Array(said.map(text).to_vec())]),
            Value::Array(vec![text("1-3"), Value::Array(bad.to_vec())]),
        ]);
        let entries = entries(&reply).unwrap();
        let event = |to: &str, what| Some(Event { to: to.into(), what, from: "a/1".into() });
        let purge = Purge { scope: Scope::Everything, is_soft: true };
        assert_eq!(entries[0].1, event("*", What::Purge { purge, number: 7 }));
        assert_eq!(entries[1], ("1-1".parse().unwrap(), None));
        let said = Said { name: "x".into(), text: "a text".into(), version: 5, until_ms: 60 };
        assert_eq!(entries[2].1, event("b", What::Notice(said)));
        assert_eq!(entries[3].1, None);
    }
}
