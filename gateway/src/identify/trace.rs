//! W3C Trace Context: reads the trace of a request or starts a new one.

use std::fmt;
use std::time::SystemTime;

use super::request_id::RequestUuid;

use crate::http::fields::{Fields, KnownField};
use crate::http::text;

/// Trace id of a request, and whether the client sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) id: u128,
    /// Whether the client sent the trace.
    pub(crate) is_propagated: bool,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

/// Reads the trace id of `traceparent` (W3C Trace Context, version 00), or generates one.
pub(super) fn from_fields(fields: &Fields, random: &foldhash::fast::RandomState) -> Trace {
    let propagated = fields.get(KnownField::Traceparent).and_then(parse_traceparent);
    // A new one is also the id of the request: its rightmost 7 bytes are random, as version 2 of
    // the specification asks.
    let id = propagated.unwrap_or_else(|| RequestUuid::new(SystemTime::now(), random).as_u128());
    Trace { id, is_propagated: propagated.is_some() }
}

fn parse_traceparent(value: &[u8]) -> Option<u128> {
    let text = std::str::from_utf8(value).ok()?;
    let has_layout =
        text.len() == 55 && text.starts_with("00-") && text.as_bytes()[35] == b'-' && text.as_bytes()[52] == b'-';
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !has_layout || !is_hex(&text[3..35]) || !is_hex(&text[36..52]) || !is_hex(&text[53..]) {
        return None;
    }
    let parent = u64::from_str_radix(&text[36..52], 16).ok()?;
    u128::from_str_radix(&text[3..35], 16).ok().filter(|id| *id != 0 && parent != 0)
}

/// Writes `traceparent` for the upstream, unless the client sent it.
pub(crate) fn write_trace(trace: Trace, span: u64, fields: &mut Fields) {
    if !trace.is_propagated {
        fields.remove(KnownField::Traceparent);
        fields.add_with(KnownField::Traceparent, |text| {
            text.extend_from_slice(b"00-");
            text::push_hex(text, (trace.id >> 64) as u64);
            text::push_hex(text, trace.id as u64);
            text.push(b'-');
            text::push_hex(text, span);
            text.extend_from_slice(b"-01");
        });
    }
}
