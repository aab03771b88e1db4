//! The trace of a request: read from W3C Trace Context or B3, or a new one.

use std::fmt;
use std::time::SystemTime;

use super::b3;
use super::random::random_u64;
use super::request_id::RequestUuid;
use super::trace_parent::{SAMPLED, TraceParent, ids, is_hex};
use crate::http::fields::{Fields, KnownField};
use crate::http::text;

/// Trace of a request, and what the client said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) id: u128,
    /// The span of the client; 0 without one.
    pub(crate) parent: u64,
    /// The flags of `traceparent`.
    pub(crate) flags: u8,
    pub(crate) source: TraceSource,
    /// Whether fields of B3 ask for a sampling that is not followed: the upstream does not get
    /// them.
    pub(crate) drops_b3: bool,
}

/// The source of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TraceSource {
    New,
    /// `traceparent` of the client.
    Traceparent,
    /// `traceparent` of the client, whose request for sampling is not followed.
    Unsampled,
    /// The fields of B3.
    B3,
}

impl Trace {
    /// No trace.
    pub(crate) const NONE: Trace = Trace { id: 0, parent: 0, flags: 0, source: TraceSource::New, drops_b3: false };

    pub(crate) fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

/// The share of new traces that are sampled, by the random bits of their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceSampling(u64);

/// The rightmost bits of a trace id that are random (W3C Trace Context level 2).
const RANDOM_BITS: u32 = 56;

impl TraceSampling {
    /// `ratio` from 0 to 1.
    pub(crate) fn new(ratio: f64) -> Self {
        TraceSampling((ratio.clamp(0.0, 1.0) * (1_u64 << RANDOM_BITS) as f64) as u64)
    }

    fn flags(self, random: u64) -> u8 {
        if random & ((1 << RANDOM_BITS) - 1) < self.0 { SAMPLED } else { 0 }
    }
}

/// How traces are sampled.
#[derive(Clone, Copy, Debug)]
pub(super) struct TracePolicy<'r> {
    pub(super) random: &'r foldhash::fast::RandomState,
    /// `None` without tracing, which passes the fields of B3 unread.
    pub(super) sampling: Option<TraceSampling>,
    /// Whether the flags of the peer are followed. Those of others count within `sampling`: any
    /// client can send them.
    pub(super) is_trusted: bool,
}

impl TracePolicy<'_> {
    /// The flags of a trace, of which `received` are those of its sender. `number` decides where
    /// these do not.
    fn flags(&self, received: Option<u8>, number: u64) -> u8 {
        let Some(sampling) = self.sampling else { return received.unwrap_or(SAMPLED) };
        match received {
            Some(flags) if self.is_trusted || flags & SAMPLED == 0 => flags,
            _ => received.unwrap_or(0) & !SAMPLED | sampling.flags(number),
        }
    }

    /// The number that decides about a received trace. An untrusted peer could choose an id that is
    /// always sampled.
    fn number(&self, id: u128) -> u64 {
        if self.is_trusted { id as u64 } else { random_u64(self.random, 3) }
    }
}

/// Reads the trace of the fields, or makes a new one.
pub(super) fn from_fields(fields: &Fields, policy: TracePolicy<'_>) -> Trace {
    let trace = read(fields, policy);
    let drops_b3 = policy.sampling.is_some() && !trace.is_sampled() && b3::asks_for_sampling(fields);
    Trace { drops_b3, ..trace }
}

fn read(fields: &Fields, policy: TracePolicy<'_>) -> Trace {
    let traceparent = fields.get(KnownField::Traceparent).and_then(parse_traceparent);
    if let Some(TraceParent { id, parent, flags: received }) = traceparent {
        let flags = policy.flags(received, policy.number(id));
        let source = if received == Some(flags) { TraceSource::Traceparent } else { TraceSource::Unsampled };
        return Trace { id, parent, flags, source, drops_b3: false };
    }
    let has_tracing = policy.sampling.is_some();
    if let Some(TraceParent { id, parent, flags }) = has_tracing.then(|| b3::parse(fields)).flatten() {
        let flags = policy.flags(flags, policy.number(id));
        return Trace { id, parent, flags, source: TraceSource::B3, drops_b3: false };
    }
    // A new one is also the id of the request: its rightmost 7 bytes are random, as version 2 of
    // the specification asks.
    let id = RequestUuid::new(SystemTime::now(), policy.random).as_u128();
    let decision = has_tracing.then(|| b3::flags_without_trace(fields)).flatten();
    let flags = policy.flags(decision, id as u64);
    Trace { id, parent: 0, flags, source: TraceSource::New, drops_b3: false }
}

/// Version 00, or the beginning of a later one, which has the same members (section 3.2.4).
fn parse_traceparent(value: &[u8]) -> Option<TraceParent> {
    let text = std::str::from_utf8(value).ok().filter(|text| text.is_ascii() && text.len() >= 55)?;
    let (version, rest) = (&text[..2], &text[55..]);
    let is_complete = if version == "00" { rest.is_empty() } else { rest.is_empty() || rest.starts_with('-') };
    let has_layout = [2, 35, 52].iter().all(|at| text.as_bytes()[*at] == b'-');
    if !is_hex(version) || version == "ff" || !is_complete || !has_layout {
        return None;
    }
    let (id, parent) = ids(&text[3..35], &text[36..52])?;
    let flags = Some(&text[53..55]).filter(|flags| is_hex(flags))?;
    Some(TraceParent { id, parent, flags: Some(u8::from_str_radix(flags, 16).ok()?) })
}

/// Writes `traceparent` for the upstream. Without a span of the gateway, that of the client passes
/// as it is, unless its request for sampling is not followed.
pub(crate) fn write_trace(trace: Trace, span: OutgoingSpan, fields: &mut Fields) {
    if trace.drops_b3 {
        fields.retain(|field| !b3::is_field(field.name));
    }
    let span = match (span, trace.source) {
        (OutgoingSpan::Untraced(_), TraceSource::Traceparent) => return,
        // A trace of B3 that is not sampled keeps its parent.
        (OutgoingSpan::Untraced(_), TraceSource::B3) => trace.parent,
        // A changed flag needs another parent (section 3.3).
        (OutgoingSpan::Untraced(random), TraceSource::New | TraceSource::Unsampled) => random,
        (OutgoingSpan::Span(span), _) => span,
    };
    fields.remove(KnownField::Traceparent);
    if matches!(trace.source, TraceSource::New | TraceSource::B3) {
        // It belongs to a `traceparent` that was not understood (section 4.3).
        fields.remove(KnownField::Tracestate);
    }
    fields.add_with(KnownField::Traceparent, |text| {
        text.extend_from_slice(b"00-");
        text::push_hex(text, (trace.id >> 64) as u64);
        text::push_hex(text, trace.id as u64);
        text.push(b'-');
        text::push_hex(text, span);
        text.push(b'-');
        text.extend_from_slice(&[hex_digit(trace.flags >> 4), hex_digit(trace.flags & 15)]);
    });
}

fn hex_digit(digit: u8) -> u8 {
    if digit < 10 { b'0' + digit } else { b'a' + digit - 10 }
}

/// The span that the upstream gets as its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutgoingSpan {
    /// The request has no spans here; a random id for a new trace.
    Untraced(u64),
    /// A span of the gateway.
    Span(u64),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    const ID: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "b7ad6b7169203331";

    fn parsed(text: &str) -> Option<(String, u64, Option<u8>)> {
        let parent = parse_traceparent(text.as_bytes())?;
        Some((format!("{:032x}", parent.id), parent.parent, parent.flags))
    }

    #[test]
    fn later_versions_are_read_as_far_as_they_are_known() {
        let expected = |flags| Some((ID.to_owned(), 0xb7ad_6b71_6920_3331, Some(flags)));
        assert_eq!(parsed(&format!("00-{ID}-{PARENT}-01")), expected(1));
        assert_eq!(parsed(&format!("00-{ID}-{PARENT}-03")), expected(3));
        assert_eq!(parsed(&format!("cc-{ID}-{PARENT}-00")), expected(0));
        assert_eq!(parsed(&format!("cc-{ID}-{PARENT}-00-more")), expected(0));
        for bad in [
            format!("00-{ID}-{PARENT}-00-more"),
            format!("cc-{ID}-{PARENT}-00more"),
            format!("ff-{ID}-{PARENT}-00"),
            format!("00-{}-{PARENT}-00", "0".repeat(32)),
            format!("00-{ID}-{}-00", "0".repeat(16)),
            format!("00-{}-{PARENT}-00", ID.to_uppercase()),
            format!("00-{ID}-{PARENT}-0x"),
            format!("00-{ID}-{PARENT}"),
            "é".repeat(28),
        ] {
            assert_eq!(parsed(&bad), None, "{bad}");
        }
    }

    #[test]
    fn new_traces_are_sampled_by_their_random_bits() {
        let random = foldhash::fast::RandomState::default();
        let sampled = |ratio: f64| {
            let policy = TracePolicy { random: &random, sampling: Some(TraceSampling::new(ratio)), is_trusted: false };
            // A repeated id of an untrusted peer is not decided once for all.
            let same = fields(&[("traceparent", &format!("00-{ID}-{PARENT}-01"))]);
            [fields(&[]), same].map(|fields| (0..2_000).filter(|_| from_fields(&fields, policy).is_sampled()).count())
        };
        assert_eq!((sampled(0.0), sampled(1.0)), ([0, 0], [2_000, 2_000]));
        // Twelve standard deviations.
        assert!(sampled(0.5).iter().all(|count| (730..1_270).contains(count)));
        let untraced = TracePolicy { random: &random, sampling: None, is_trusted: false };
        assert!(from_fields(&fields(&[]), untraced).is_sampled(), "without tracing, the origin decides");
    }

    #[test]
    fn outgoing_parent_keeps_flags_and_state() {
        let random = foldhash::fast::RandomState::default();
        let policy = TracePolicy { random: &random, sampling: Some(TraceSampling::new(0.0)), is_trusted: true };
        let traceparent = format!("00-{ID}-{PARENT}-03");
        let mut sent = fields(&[("traceparent", &traceparent), ("tracestate", "a=b")]);
        let trace = from_fields(&sent, policy);
        write_trace(trace, OutgoingSpan::Span(7), &mut sent);
        let expected = format!("00-{ID}-0000000000000007-03");
        assert_eq!(sent.get(KnownField::Traceparent), Some(expected.as_bytes()));
        assert_eq!(sent.get(KnownField::Tracestate), Some(&b"a=b"[..]));
        let mut bad = fields(&[("traceparent", "00-0-0-0"), ("tracestate", "a=b")]);
        let trace = from_fields(&bad, policy);
        write_trace(trace, OutgoingSpan::Untraced(9), &mut bad);
        let expected = format!("00-{trace}-0000000000000009-00");
        assert_eq!(bad.get(KnownField::Traceparent), Some(expected.as_bytes()));
        assert!(!bad.has(KnownField::Tracestate));
    }
}
