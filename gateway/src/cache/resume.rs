//! Continues an interrupted response by a range request: the conditions that the response, and the
//! 206 that continues it, must fulfil (RFC 9110 sections 13.1.5 and 15.3.7).
//!
//! Invariant: bytes of two representations are never joined. Only a strong validator shows that
//! they are of one, and the 206 must repeat it.

use std::sync::Arc;
use std::time::Duration;

use super::date;
use super::extent::Extent;
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, Response, StatusCode};

/// A modification date is a strong validator if `Date` is at least this much later. With less, the
/// clocks of `Last-Modified` and `Date`, which may be the gateway's, might differ (RFC 9110 section
/// 8.8.2.2 demands a second and a difference that excludes this).
const DATE_DISTANCE_MIN: Duration = Duration::from_secs(60);

/// The byte at which a response was interrupted.
pub(crate) struct ResumePoint {
    head: Arc<Response>,
    offset: u64,
}

impl ResumePoint {
    /// Whether a response can be continued: a complete one with a strong validator, of an origin
    /// that takes byte ranges of it.
    pub(crate) fn is_resumable(head: &Response) -> bool {
        let takes_ranges = || {
            let mut units = head.fields.members(KnownField::AcceptRanges);
            units.any(|unit| unit.eq_ignore_ascii_case(b"bytes"))
        };
        head.status == StatusCode::OK && takes_ranges() && strong_validator(&head.fields).is_some()
    }

    /// The point at `offset` of the body of `head`. `None` if it cannot be continued.
    pub(crate) fn new(head: Arc<Response>, offset: u64) -> Option<Self> {
        ResumePoint::is_resumable(&head).then_some(ResumePoint { head, offset })
    }

    /// Adds `Range` and `If-Range` to a request.
    pub(crate) fn write_range(&self, request: &mut Fields) {
        request.set(KnownField::Range, format!("bytes={}-", self.offset));
        if let Some((_, validator)) = strong_validator(&self.head.fields) {
            request.set(KnownField::IfRange, validator);
        }
    }

    /// The number of bytes by which the body of `response` completes this response. `None` if it
    /// does not: it is no 206, of another version or encoding, or not the rest of the body.
    pub(crate) fn rest_in(&self, response: &Response) -> Option<u64> {
        let extent = Extent::from_content_range(response)?;
        let (own, new) = (&self.head.fields, &response.fields);
        let (known, validator) = strong_validator(own)?;
        let is_same = single(new, known) == Some(validator)
            && own.all(KnownField::ContentEncoding).eq(new.all(KnownField::ContentEncoding));
        let is_rest = extent.first == self.offset && extent.first + extent.length == extent.total;
        let is_as_long = !matches!(self.head.length, BodyLength::Known(length) if length != extent.total);
        (is_same && is_rest && is_as_long).then_some(extent.length)
    }
}

/// The strong validator of a response: its entity tag, or its modification date where it has none.
fn strong_validator(fields: &Fields) -> Option<(KnownField, &[u8])> {
    if fields.has(KnownField::ETag) {
        return strong_tag(fields).map(|tag| (KnownField::ETag, tag));
    }
    let modified = single(fields, KnownField::LastModified)?;
    let since = date::parse(single(fields, KnownField::Date)?)?.duration_since(date::parse(modified)?).ok()?;
    (since >= DATE_DISTANCE_MIN).then_some((KnownField::LastModified, modified))
}

/// The strong entity tag of a response, if it has one line with one.
pub(super) fn strong_tag(fields: &Fields) -> Option<&[u8]> {
    let tag = single(fields, KnownField::ETag)?;
    let is_strong = tag.len() >= 2 && tag.starts_with(b"\"") && tag.ends_with(b"\"");
    is_strong.then_some(tag)
}

/// The value of a field that has one line.
fn single(fields: &Fields, known: KnownField) -> Option<&[u8]> {
    let mut lines = fields.all(known);
    let (line, None) = (lines.next()?, lines.next()) else { return None };
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: (&str, &str) = ("Date", "Sun, 06 Nov 1994 08:49:37 GMT");

    fn response(status: u16, lines: &[(&str, &str)]) -> Response {
        let mut response = Response::new(StatusCode::from_u16(status).expect("a status"));
        response.length = BodyLength::Streamed;
        lines.iter().for_each(|(name, value)| response.fields.push(name.as_bytes(), value.as_bytes()));
        response
    }

    fn is_resumable(lines: &[(&str, &str)]) -> bool {
        let ranges = [&[("Accept-Ranges", "bytes")], lines].concat();
        assert!(!ResumePoint::is_resumable(&response(200, lines)), "no Accept-Ranges");
        assert!(!ResumePoint::is_resumable(&response(206, &ranges)), "206");
        ResumePoint::is_resumable(&response(200, &ranges))
    }

    #[test]
    fn only_a_strong_validator_allows_continuation() {
        assert!(is_resumable(&[("ETag", "\"a\"")]));
        assert!(is_resumable(&[DATE, ("Last-Modified", "Sun, 06 Nov 1994 08:48:37 GMT")]));
        for lines in [
            &[][..],
            &[("ETag", "W/\"a\"")],
            &[("ETag", "a")],
            &[("ETag", "\"")],
            &[("ETag", "\"a\""), ("ETag", "\"b\"")],
            // A weak tag says that dates are not strong either.
            &[("ETag", "W/\"a\""), DATE, ("Last-Modified", "Sun, 06 Nov 1994 08:00:00 GMT")],
            &[("Last-Modified", "Sun, 06 Nov 1994 08:00:00 GMT")],
            &[DATE, ("Last-Modified", "Sun, 06 Nov 1994 08:48:38 GMT")],
            &[DATE, ("Last-Modified", "Sun, 06 Nov 1994 09:00:00 GMT")],
        ] {
            assert!(!is_resumable(lines), "{lines:?}");
        }
    }

    #[test]
    fn only_the_rest_of_the_same_representation_continues() {
        let head = [("Accept-Ranges", "bytes"), ("ETag", "\"a\""), ("Content-Encoding", "gzip")];
        let point = ResumePoint::new(Arc::new(response(200, &head)), 4).expect("resumable");
        let mut request = Fields::default();
        request.push(b"Range", b"bytes=0-1");
        point.write_range(&mut request);
        assert_eq!(request.all(KnownField::Range).collect::<Vec<_>>(), [b"bytes=4-"]);
        assert_eq!(request.get(KnownField::IfRange), Some(&b"\"a\""[..]));
        let rest = |status, range, tag, coding| {
            point.rest_in(&response(status, &[("Content-Range", range), ("ETag", tag), ("Content-Encoding", coding)]))
        };
        assert_eq!(rest(206, "bytes 4-9/10", "\"a\"", "gzip"), Some(6));
        assert_eq!(rest(200, "bytes 4-9/10", "\"a\"", "gzip"), None);
        assert_eq!(rest(206, "bytes 4-9/10", "\"b\"", "gzip"), None);
        assert_eq!(rest(206, "bytes 4-9/10", "W/\"a\"", "gzip"), None);
        assert_eq!(rest(206, "bytes 4-9/10", "\"a\"", "br"), None);
        for range in ["bytes 3-9/10", "bytes 5-9/10", "bytes 4-8/10", "bytes 4-9/*", "bytes */10", "4-9/10"] {
            assert_eq!(rest(206, range, "\"a\"", "gzip"), None, "{range}");
        }
        let plain = [("Content-Range", "bytes 4-9/10"), ("ETag", "\"a\"")];
        assert_eq!(point.rest_in(&response(206, &plain)), None, "another coding");
        let untagged = [("Content-Range", "bytes 4-9/10"), ("Content-Encoding", "gzip")];
        assert_eq!(point.rest_in(&response(206, &untagged)), None, "no validator");
    }

    #[test]
    fn known_length_must_be_that_of_the_object() {
        let mut head = response(200, &[("Accept-Ranges", "bytes"), ("ETag", "\"a\"")]);
        head.length = BodyLength::Known(11);
        let point = ResumePoint::new(Arc::new(head), 4).expect("resumable");
        let rest = |range| point.rest_in(&response(206, &[("Content-Range", range), ("ETag", "\"a\"")]));
        assert_eq!((rest("bytes 4-9/10"), rest("bytes 4-10/11")), (None, Some(7)));
    }
}
