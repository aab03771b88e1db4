//! The parent of a trace, as both formats name it.

/// The bit of the flags by which a request is sampled.
pub(super) const SAMPLED: u8 = 1;

/// The parent that a client names.
pub(super) struct TraceParent {
    pub(super) id: u128,
    pub(super) parent: u64,
    /// `None`: the client leaves the decision to the gateway.
    pub(super) flags: Option<u8>,
}

/// A trace id of 16 or 32 digits and a span id, both in lower case and not zero.
pub(super) fn ids(trace: &str, span: &str) -> Option<(u128, u64)> {
    if !matches!(trace.len(), 16 | 32) || span.len() != 16 || !is_hex(trace) || !is_hex(span) {
        return None;
    }
    let ids = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(span, 16).ok()?);
    (ids.0 != 0 && ids.1 != 0).then_some(ids)
}

pub(super) fn is_hex(part: &str) -> bool {
    part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
