//! Ids of requests: that of a trusted proxy, or a new UUID of version 7 (RFC 9562 section 5.7).

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use super::random::random_u64;
use crate::http::fields::{Fields, KnownField};

/// Most bytes of an id that a trusted proxy sends. Every log line of the request repeats it.
const RECEIVED_BYTES_MAX: usize = 128;

/// The two digits of each byte.
static HEX_PAIRS: [[u8; 2]; 256] = {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [DIGITS[byte >> 4], DIGITS[byte & 15]];
        byte += 1;
    }
    pairs
};

/// A UUID that begins with its time, so that ids sort by the time of their requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestUuid([u8; 16]);

/// A UUID as text.
pub(crate) type UuidText = [u8; 36];

/// The id of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RequestId {
    Made(RequestUuid),
    /// Sent by a trusted proxy.
    Received(Box<str>),
}

impl RequestUuid {
    /// The UUID with no bit set, which is no request's.
    pub(crate) const NIL: RequestUuid = RequestUuid([0; 16]);

    /// A UUID of version 7: 48 bits of milliseconds, 73 random bits.
    pub(super) fn new(now: SystemTime, random: &foldhash::fast::RandomState) -> Self {
        let millis = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let high = millis << 16 | 0x7000 | random_u64(random, 1) >> 52;
        let low = random_u64(random, 2) & u64::MAX >> 2 | 1 << 63;
        RequestUuid((u128::from(high) << 64 | u128::from(low)).to_be_bytes())
    }

    pub(super) fn as_u128(self) -> u128 {
        u128::from_be_bytes(self.0)
    }

    pub(super) fn from_u128(number: u128) -> Self {
        RequestUuid(number.to_be_bytes())
    }

    pub(crate) fn text(self) -> UuidText {
        // The position of each byte, after the hyphens before it.
        const AT: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
        let mut text = [b'-'; 36];
        for (byte, at) in self.0.into_iter().zip(AT) {
            [text[at], text[at + 1]] = HEX_PAIRS[usize::from(byte)];
        }
        text
    }
}

impl RequestId {
    /// The id that a trusted proxy sent, if it is one line of visible characters that need no
    /// escaping in a log line, a page or a field.
    pub(super) fn received(fields: &Fields) -> Option<Self> {
        let mut lines = fields.all(KnownField::XRequestId);
        let (Some(value), None) = (lines.next(), lines.next()) else { return None };
        let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~:+/=@#,".contains(byte);
        let is_valid = (1..=RECEIVED_BYTES_MAX).contains(&value.len()) && value.iter().all(is_allowed);
        let text = str::from_utf8(value).ok().filter(|_| is_valid)?;
        Some(RequestId::Received(text.into()))
    }

    /// Replaces `X-Request-Id` by this id.
    pub(crate) fn write(&self, fields: &mut Fields) {
        fields.remove(KnownField::XRequestId);
        fields.add_with(KnownField::XRequestId, |text| self.push(text));
    }

    /// The id as text; `space` holds that of a UUID.
    pub(crate) fn as_str<'a>(&'a self, space: &'a mut UuidText) -> &'a str {
        match self {
            RequestId::Made(uuid) => {
                *space = uuid.text();
                // Digits and hyphens.
                str::from_utf8(space).unwrap_or_default()
            }
            RequestId::Received(text) => text,
        }
    }

    pub(crate) fn push(&self, out: &mut Vec<u8>) {
        match self {
            RequestId::Made(uuid) => out.extend_from_slice(&uuid.text()),
            RequestId::Received(text) => out.extend_from_slice(text.as_bytes()),
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str(&mut RequestUuid::NIL.text()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn uuids_have_version_and_time_and_differ() {
        let random = foldhash::fast::RandomState::default();
        // The time of the example in RFC 9562 appendix A.6.
        let time = UNIX_EPOCH + Duration::from_millis(0x017F_22E2_79B0);
        let ids: Vec<String> =
            (0..1000).map(|_| RequestId::Made(RequestUuid::new(time, &random)).to_string()).collect();
        for id in &ids {
            let bytes = id.as_bytes();
            assert_eq!((id.len(), &id[..15]), (36, "017f22e2-79b0-7"), "{id}");
            assert!(b"89ab".contains(&bytes[19]) && [8, 13, 18, 23].map(|at| bytes[at]) == *b"----", "{id}");
        }
        let distinct: std::collections::HashSet<&str> = ids.iter().map(|id| &id[15..]).collect();
        assert_eq!(distinct.len(), ids.len());
        assert_eq!(&RequestUuid::NIL.text(), b"00000000-0000-0000-0000-000000000000");
    }

    #[test]
    fn received_id_is_one_line_of_harmless_characters() {
        let received = |values: &[&str]| {
            let lines: Vec<_> = values.iter().map(|value| ("X-Request-ID", *value)).collect();
            RequestId::received(&fields(&lines)).map(|id| id.to_string())
        };
        for id in ["a", "Root=1-67891233-abcdef012345678912345678", &"x".repeat(128)] {
            assert_eq!(received(&[id]).as_deref(), Some(id));
        }
        for ids in [&["a", "b"][..], &[""], &[&"x".repeat(129)], &["a b"], &["a\"b"], &["<b>"], &["\u{e9}"], &[]] {
            assert_eq!(received(ids), None, "{ids:?}");
        }
    }
}
