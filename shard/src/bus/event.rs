//! Owns the text format of bus events, and positions in a stream.
//!
//! Refuses events that it cannot parse: a later release may have more kinds.

use crate::entry::{Purge, PurgeScope};
use crate::key::Tag;
use redis::{Value, from_redis_value_ref};
use std::fmt;
use std::str::FromStr;

/// A position in a Redis stream, ordered like stream IDs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StreamPosition {
    ms: u64,
    sequence: u64,
}

impl fmt::Display for StreamPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.sequence)
    }
}

impl FromStr for StreamPosition {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, sequence) = text.split_once('-').ok_or(())?;
        Ok(Self { ms: ms.parse().map_err(|_| ())?, sequence: sequence.parse().map_err(|_| ())? })
    }
}

/// One event of a server's stream: its content, its recipient, and the member that published it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BusEvent {
    /// `*` or a node.
    pub(super) to: String,
    pub(super) payload: EventPayload,
    /// The member that published it.
    pub(super) from: String,
}

/// Content of a bus event: a purge with its fleet-wide number, or an override with its version and
/// expiry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EventPayload {
    Purge { purge: Purge, number: u64 },
    Override(StoredOverride),
}

/// An override as a server stores it: name, text, version and expiry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredOverride {
    pub(super) name: String,
    pub(super) text: String,
    pub(super) version: u64,
    /// Expiry by the server's clock, in Unix milliseconds.
    pub(super) until_ms: u64,
}

/// Parses `version until text`, the value of an override's field on a server.
pub(super) fn parse_override(name: String, value: &str) -> Option<StoredOverride> {
    let mut parts = value.splitn(3, ' ');
    let (version, until_ms) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some(StoredOverride { name, text: parts.next()?.to_owned(), version, until_ms })
}

/// The field `what` of an override's event; no purge has this value. Part of the wire format.
pub(super) const OVERRIDE_KIND: &str = "notice";

/// The field `what` of a purge's event: `*`, or a tag's hash in hexadecimal; `:s` is appended to a
/// soft purge.
pub(super) fn encode_purge(purge: Purge) -> String {
    let soft = if purge.is_soft { ":s" } else { "" };
    match purge.scope {
        PurgeScope::Everything => format!("*{soft}"),
        PurgeScope::Tag(tag) => format!("{:016x}{soft}", tag.hash()),
    }
}

pub(super) fn parse_purge(text: &str) -> Option<Purge> {
    let (scope, is_soft) = text.strip_suffix(":s").map_or((text, false), |scope| (scope, true));
    let scope = match scope {
        "*" => PurgeScope::Everything,
        hash if hash.len() == 16 => PurgeScope::Tag(Tag::from_hash(u64::from_str_radix(hash, 16).ok()?)),
        _ => return None,
    };
    Some(Purge { scope, is_soft })
}

/// The reply to `XRANGE`. An event that cannot be parsed yields its position and `None`.
pub(super) fn parse_stream(reply: &Value) -> Option<Vec<(StreamPosition, Option<BusEvent>)>> {
    let Value::Array(entries) = reply else { return matches!(reply, Value::Nil).then(Vec::new) };
    entries.iter().map(parse_stream_entry).collect()
}

fn parse_stream_entry(value: &Value) -> Option<(StreamPosition, Option<BusEvent>)> {
    let Value::Array(parts) = value else { return None };
    let [id, fields] = parts.as_slice() else { return None };
    let position = from_redis_value_ref::<String>(id).ok()?.parse().ok()?;
    let fields: Vec<String> = from_redis_value_ref(fields).unwrap_or_default();
    let field = |name: &str| {
        let mut pairs = fields.chunks_exact(2).filter(|pair| pair[0] == name);
        pairs.next().map(|pair| pair[1].clone())
    };
    let event = || {
        let payload = match &*field("what")? {
            OVERRIDE_KIND => EventPayload::Override(parse_override(field("name")?, &field("said")?)?),
            purge => EventPayload::Purge { purge: parse_purge(purge)?, number: field("n")?.parse().ok()? },
        };
        Some(BusEvent { to: field("to")?, payload, from: field("from")? })
    };
    Some((position, event()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_purges_parse_to_themselves() {
        for scope in [PurgeScope::Everything, PurgeScope::Tag(Tag::surrogate_key(b"a"))] {
            for is_soft in [false, true] {
                let purge = Purge { scope, is_soft };
                assert_eq!(parse_purge(&encode_purge(purge)), Some(purge));
            }
        }
        for text in [OVERRIDE_KIND, "", ":s", "x", "0123456789abcdeg", "0123456789abcdef0"] {
            assert_eq!(parse_purge(text), None, "{text}");
        }
    }

    #[test]
    fn positions_are_ordered_by_time_and_sequence() {
        let positions = ["0-0", "9-1", "10-0", "10-9", "10-10"].map(|text| text.parse::<StreamPosition>().unwrap());
        assert!(positions.is_sorted());
        assert_eq!(positions[4].to_string(), "10-10");
        assert!("10".parse::<StreamPosition>().is_err() && "a-1".parse::<StreamPosition>().is_err());
    }

    #[test]
    fn an_unknown_event_yields_only_its_position() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let fields = ["n", "7", "to", "*", "what", "*:s", "from", "a/1"].map(text).to_vec();
        let stored = ["n", "0", "to", "b", "what", OVERRIDE_KIND, "from", "a/1", "name", "x", "said", "5 60 a text"];
        let bad =
            ["n", "0", "to", "b", "what", OVERRIDE_KIND, "from", "a/1", "name", "x", "said", "5 a text"].map(text);
        let reply = Value::Array(vec![
            Value::Array(vec![text("1-0"), Value::Array(fields)]),
            Value::Array(vec![text("1-1"), Value::Array(vec![text("what"), text("later")])]),
            Value::Array(vec![text("1-2"), Value::Array(stored.map(text).to_vec())]),
            Value::Array(vec![text("1-3"), Value::Array(bad.to_vec())]),
        ]);
        let entries = parse_stream(&reply).unwrap();
        let event = |to: &str, payload| Some(BusEvent { to: to.into(), payload, from: "a/1".into() });
        let purge = Purge { scope: PurgeScope::Everything, is_soft: true };
        assert_eq!(entries[0].1, event("*", EventPayload::Purge { purge, number: 7 }));
        assert_eq!(entries[1], ("1-1".parse().unwrap(), None));
        let stored = StoredOverride { name: "x".into(), text: "a text".into(), version: 5, until_ms: 60 };
        assert_eq!(entries[2].1, event("b", EventPayload::Override(stored)));
        assert_eq!(entries[3].1, None);
    }
}
