//! The position of a byte range within a complete response (RFC 9110 section 14.4).

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::http::fields::KnownField;
use crate::http::message::{BodyLength, Response, StatusCode};

/// A contiguous range of an object, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub first: u64,
    pub length: u64,
    /// Length of the complete object.
    pub total: u64,
}

impl Extent {
    /// The extent of a complete object.
    pub(crate) fn whole(total: u64) -> Self {
        Extent { first: 0, length: total, total }
    }

    /// Reads the extent of a 206 with a single range. `None` if `Content-Range` is missing,
    /// repeated or invalid, gives no total, or contradicts the length of the body (RFC 9110 section
    /// 14.4).
    pub fn from_content_range(response: &Response) -> Option<Self> {
        if response.status != StatusCode::PARTIAL_CONTENT {
            return None;
        }
        let mut lines = response.fields.all(KnownField::ContentRange);
        let (Some(line), None) = (lines.next(), lines.next()) else { return None };
        let extent = Self::parse(std::str::from_utf8(line).ok()?)?;
        let is_consistent = !matches!(response.length, BodyLength::Known(length) if length != extent.length);
        is_consistent.then_some(extent)
    }

    fn parse(line: &str) -> Option<Self> {
        let (unit, rest) = line.split_once(' ')?;
        let (range, total) = rest.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?;
        let (first, last, total): (u64, u64, u64) = (number(first)?, number(last)?, number(total)?);
        let is_valid = unit.eq_ignore_ascii_case("bytes") && first <= last && last < total;
        is_valid.then(|| Extent { first, length: last - first + 1, total })
    }

    pub(super) fn end(self) -> u64 {
        self.first + self.length
    }

    /// The bytes from `first` to `last` of the complete object. `None` if this extent does not
    /// cover them all.
    pub(crate) fn slice(self, body: &Bytes, (first, last): (u64, u64)) -> Option<Bytes> {
        let begin = usize::try_from(first.checked_sub(self.first)?).ok()?;
        let end = usize::try_from(last.checked_sub(self.first)? + 1).ok()?;
        (end <= body.len()).then(|| body.slice(begin..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partial_response(range: &str, length: BodyLength) -> Response {
        let mut response = Response { status: StatusCode::PARTIAL_CONTENT, length, ..Response::new(StatusCode::OK) };
        response.fields.push(b"Content-Range", range.as_bytes());
        response
    }

    #[test]
    fn extent_requires_a_consistent_content_range() {
        let parse = |range: &str| Extent::from_content_range(&partial_response(range, BodyLength::Streamed));
        assert_eq!(parse("bytes 4-9/10"), Some(Extent { first: 4, length: 6, total: 10 }));
        for invalid in [
            "bytes 4-9/*",
            "bytes */10",
            "bytes 9-4/10",
            "bytes 4-10/10",
            "lines 4-9/10",
            "bytes +4-9/10",
            "4-9/10",
            "",
        ] {
            assert_eq!(parse(invalid), None, "{invalid}");
        }
        assert_eq!(Extent::from_content_range(&partial_response("bytes 4-9/10", BodyLength::Known(5))), None);
    }
}
