//! W3C Trace Context: the trace that a request belongs to, brought or begun here.

use std::fmt;
use std::hash::{BuildHasher, Hasher};

use crate::http::fields::{Fields, Known};
use crate::http::text;

/// A W3C trace: its id, and whether the caller brought it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    pub id: u128,
    pub brought: bool,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

/// The caller's trace id (W3C Trace Context, version 00), or a new one.
pub(super) fn of(fields: &Fields, random: &foldhash::fast::RandomState) -> Trace {
    let brought = fields.get(Known::Traceparent).and_then(parse_traceparent);
    let id = brought.unwrap_or_else(|| u128::from(fresh(random, 1)) << 64 | u128::from(fresh(random, 2)));
    Trace { id, brought: brought.is_some() }
}

fn parse_traceparent(value: &[u8]) -> Option<u128> {
    let text = std::str::from_utf8(value).ok()?;
    let is_shaped =
        text.len() == 55 && text.starts_with("00-") && text.as_bytes()[35] == b'-' && text.as_bytes()[52] == b'-';
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !is_shaped || !is_hex(&text[3..35]) || !is_hex(&text[36..52]) || !is_hex(&text[53..]) {
        return None;
    }
    let parent = u64::from_str_radix(&text[36..52], 16).ok()?;
    u128::from_str_radix(&text[3..35], 16).ok().filter(|id| *id != 0 && parent != 0)
}

/// A number nobody has seen before; unpredictable enough for trace ids, not for secrets.
pub(super) fn fresh(random: &foldhash::fast::RandomState, salt: u64) -> u64 {
    use std::cell::Cell;
    thread_local!(static COUNT: Cell<u64> = const { Cell::new(0) });
    let count = COUNT.get().wrapping_add(1);
    COUNT.set(count);
    let mut hasher = random.build_hasher();
    hasher.write_u64(count);
    hasher.write_u64(salt);
    hasher.write_usize(std::ptr::from_ref(&salt).addr());
    hasher.finish() | 1
}

/// What the origin is told of the trace: the caller's own field, or a new one.
pub fn write_trace(trace: Trace, span: u64, fields: &mut Fields) {
    if !trace.brought {
        fields.remove(Known::Traceparent);
        fields.add_with(Known::Traceparent, |text| {
            text.extend_from_slice(b"00-");
            text::push_hex(text, (trace.id >> 64) as u64);
            text::push_hex(text, trace.id as u64);
            text.push(b'-');
            text::push_hex(text, span);
            text.extend_from_slice(b"-01");
        });
    }
}
