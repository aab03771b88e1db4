//! The piece that a stored part lacks for a response, and whether a 206 is that piece (RFC 9111
//! section 3.4).
//!
//! Invariant: bytes of two representations are never joined. Only a strong entity tag shows that
//! they are of one, and the 206 must repeat it.

use bytes::Bytes;

use super::extent::Extent;
use super::policy;
use super::range;
use super::resume::strong_tag;
use super::stored::CachedObject;
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, Request, Response, StatusCode};

/// The smaller one of two gaps around a stored part is fetched first, and held in memory until it
/// is stored. A larger one would keep the response waiting for longer than the whole object does.
const FIRST_OF_TWO_MAX: u64 = 256 << 10;

/// One contiguous piece that a stored part lacks, beside it.
#[derive(Clone, Debug)]
pub(crate) struct MissingPiece {
    /// Head of the object, of which a part is stored.
    object: CachedObject,
    /// The bytes of the response, stored and missing ones together; of the first of two pieces,
    /// those that are stored then.
    wanted: Extent,
    /// Whether the response lacks another piece, on the other side of the part.
    is_first_of_two: bool,
    /// The missing ones of them.
    missing: Extent,
    /// The stored bytes of the response before and after the missing ones.
    before: Bytes,
    after: Bytes,
}

impl MissingPiece {
    /// The piece for `request`: for one range, or for the whole object without `Range`. `None` if
    /// the part has no strong entity tag, holds nothing of the response, or leaves two large gaps
    /// in it: the response is then fetched as a whole.
    pub(crate) fn of(request: &Request, (object, part, body): (&CachedObject, Extent, &Bytes)) -> Option<Self> {
        strong_tag(&object.fields)?;
        let (first, last) = policy::single_range(request, &object.fields, part.total)?;
        let piece = |first: u64, end: u64| Extent { first, length: end - first, total: part.total };
        let end = last + 1;
        let is_beginning = (part.first..part.end()).contains(&first) && end > part.end();
        let is_end = first < part.first && (part.first + 1..=part.end()).contains(&end);
        let mut wanted = piece(first, end);
        let is_first_of_two = first < part.first && end > part.end();
        let (missing, before, after) = if is_first_of_two {
            let (low, high) = (piece(first, part.first), piece(part.end(), end));
            if low.length.min(high.length) > FIRST_OF_TWO_MAX {
                return None;
            }
            if low.length <= high.length {
                wanted = piece(first, part.end());
                (low, Bytes::new(), body.clone())
            } else {
                wanted = piece(part.first, end);
                (high, body.clone(), Bytes::new())
            }
        } else if is_beginning {
            (piece(part.end(), end), part.slice(body, (first, part.end() - 1))?, Bytes::new())
        } else if is_end {
            (piece(first, part.first), Bytes::new(), part.slice(body, (part.first, last))?)
        } else {
            return None;
        };
        Some(MissingPiece { object: object.clone(), wanted, is_first_of_two, missing, before, after })
    }

    /// Whether the response lacks one more piece beside this one and the part.
    pub(crate) fn is_first_of_two(&self) -> bool {
        self.is_first_of_two
    }

    /// The piece and the stored bytes around it.
    pub(crate) fn joined(&self, missing: &[u8]) -> Bytes {
        Bytes::from([&self.before[..], missing, &self.after].concat())
    }

    /// Makes a request one for the piece: another version of the object is sent as a whole.
    pub(crate) fn write_range(&self, request: &mut Fields) {
        request.set(KnownField::Range, format!("bytes={}-{}", self.missing.first, self.missing.end() - 1));
        if let Some(tag) = strong_tag(&self.object.fields) {
            request.set(KnownField::IfRange, tag);
        }
    }

    /// Whether `response` is the piece: a 206 of the same version and coding, of known length.
    pub(crate) fn is_in(&self, response: &Response) -> bool {
        let (own, new) = (&self.object.fields, &response.fields);
        Extent::from_content_range(response) == Some(self.missing)
            && response.length == BodyLength::Known(self.missing.length)
            && strong_tag(new) == strong_tag(own)
            && own.all(KnownField::ContentEncoding).eq(new.all(KnownField::ContentEncoding))
    }

    /// The head of the whole object, of which `response` is the piece: the stored fields, and those
    /// of the 206, which replace them. Its length is that of the response.
    pub(crate) fn whole_head(&self, response: &Response) -> Response {
        let mut head = policy::freshen(&self.object, response);
        range::remove_content_fields(&mut head.fields);
        Response { status: StatusCode::OK, length: BodyLength::Known(self.wanted.length), ..head }
    }

    /// The number of missing bytes.
    pub(crate) fn missing_bytes(&self) -> u64 {
        self.missing.length
    }

    /// The position of the response in the object.
    pub(crate) fn wanted(&self) -> Extent {
        self.wanted
    }

    /// The stored bytes before and after the piece.
    pub(crate) fn into_stored(self) -> (Bytes, Bytes) {
        (self.before, self.after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(range: &str) -> Request {
        let mut request = Request::default();
        if !range.is_empty() {
            request.fields.push(b"Range", range.as_bytes());
        }
        request
    }

    fn object(tag: &str) -> CachedObject {
        let mut object = CachedObject { status: 200, ..CachedObject::default() };
        object.fields.push(b"ETag", tag.as_bytes());
        object
    }

    fn missing(range: &str, tag: &str) -> Option<(u64, u64, String, String)> {
        let (part, body) = (Extent { first: 3, length: 4, total: 10 }, Bytes::from_static(b"3456"));
        let piece = MissingPiece::of(&request(range), (&object(tag), part, &body))?;
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        Some((piece.missing.first, piece.missing.length, text(&piece.before), text(&piece.after)))
    }

    #[test]
    fn one_gap_beside_a_part_with_a_strong_tag_is_completed() {
        let expected = |first, length, before: &str, after: &str| Some((first, length, before.into(), after.into()));
        assert_eq!(missing("bytes=5-8", "\"a\""), expected(7, 2, "56", ""));
        assert_eq!(missing("bytes=3-", "\"a\""), expected(7, 3, "3456", ""));
        assert_eq!(missing("bytes=0-3", "\"a\""), expected(0, 3, "", "3"));
        assert_eq!(missing("bytes=1-6", "\"a\""), expected(1, 2, "", "3456"));
        for range in ["bytes=7-8", "bytes=0-2", "bytes=4-5", "bytes=5-8,9-9", "bytes=x"] {
            assert_eq!(missing(range, "\"a\""), None, "{range}");
        }
        assert_eq!((missing("bytes=5-8", "W/\"a\""), missing("bytes=5-8", "")), (None, None));
    }

    /// Of two gaps, the smaller one comes first.
    #[test]
    fn a_part_inside_the_response_is_completed_in_two_steps() {
        let (part, body) = (Extent { first: 3, length: 4, total: 10 }, Bytes::from_static(b"3456"));
        for (range, first, length, joined, rest) in [
            ("", 0, 3, "0123456", (7, 3)),
            ("bytes=0-9", 0, 3, "0123456", (7, 3)),
            ("bytes=2-8", 2, 1, "23456", (7, 2)),
            ("bytes=0-7", 7, 1, "34567", (0, 3)),
        ] {
            let piece = MissingPiece::of(&request(range), (&object("\"a\""), part, &body)).expect("a piece");
            assert!(piece.is_first_of_two());
            assert_eq!((piece.missing.first, piece.missing.length), (first, length), "{range}");
            let bytes = piece.joined(&b"0123456789"[first as usize..(first + length) as usize]);
            assert_eq!(bytes, joined.as_bytes(), "{range}");
            let next = MissingPiece::of(&request(range), (&object("\"a\""), piece.wanted(), &bytes)).expect("another");
            assert!(!next.is_first_of_two());
            assert_eq!((next.missing.first, next.missing.length), rest, "{range}");
        }
        let total = 2 * FIRST_OF_TWO_MAX + 3;
        let between = |first| Extent { first, length: 1, total };
        let of = |first| MissingPiece::of(&request(""), (&object("\"a\""), between(first), &Bytes::from_static(b"x")));
        assert!(of(FIRST_OF_TWO_MAX + 1).is_none(), "both are large");
        assert!(of(FIRST_OF_TWO_MAX).is_some_and(|piece| piece.missing_bytes() == FIRST_OF_TWO_MAX));
    }

    #[test]
    fn only_a_206_of_the_same_version_is_the_piece() {
        let part = (Extent { first: 0, length: 4, total: 10 }, Bytes::from_static(b"0123"));
        let piece = MissingPiece::of(&request(""), (&object("\"a\""), part.0, &part.1)).expect("a piece");
        let response = |range: &str, tag: &str, length: BodyLength| {
            let mut response = Response { length, ..Response::new(StatusCode::PARTIAL_CONTENT) };
            response.fields.push(b"Content-Range", range.as_bytes());
            response.fields.push(b"ETag", tag.as_bytes());
            response
        };
        assert!(piece.is_in(&response("bytes 4-9/10", "\"a\"", BodyLength::Known(6))));
        let mut two_tags = response("bytes 4-9/10", "\"a\"", BodyLength::Known(6));
        two_tags.fields.push(b"ETag", b"\"b\"");
        for other in [
            response("bytes 4-9/10", "\"b\"", BodyLength::Known(6)),
            response("bytes 4-8/10", "\"a\"", BodyLength::Known(5)),
            response("bytes 4-9/11", "\"a\"", BodyLength::Known(6)),
            response("bytes 4-9/10", "\"a\"", BodyLength::Streamed),
            Response { status: StatusCode::OK, ..response("bytes 4-9/10", "\"a\"", BodyLength::Known(6)) },
            two_tags,
        ] {
            assert!(!piece.is_in(&other), "{other:?}");
        }
        let head = piece.whole_head(&response("bytes 4-9/10", "\"a\"", BodyLength::Known(6)));
        assert_eq!((head.status, head.length), (StatusCode::OK, BodyLength::Known(10)));
        assert!(!head.fields.has(KnownField::ContentRange) && head.fields.has(KnownField::ETag));
    }

    proptest! {
        #[test]
        fn stored_and_missing_bytes_are_those_of_the_response(
            total in 1_u64..40, a in 0_u64..40, b in 0_u64..40, c in 0_u64..40, d in 0_u64..40
        ) {
            let complete = Bytes::from((0..total).map(|at| at as u8).collect::<Vec<_>>());
            let span = |a: u64, b: u64| ((a % total).min(b % total), (a % total).max(b % total));
            let ((first, last), (from, to)) = (span(a, b), span(c, d));
            let part = Extent { first, length: last - first + 1, total };
            let body = complete.slice(first as usize..=last as usize);
            let asked = request(&format!("bytes={from}-{to}"));
            if let Some(piece) = MissingPiece::of(&asked, (&object("\"a\""), part, &body)) {
                let missing = complete.slice(piece.missing.first as usize..piece.missing.end() as usize);
                prop_assert!(!missing.is_empty());
                let joined = piece.joined(&missing);
                prop_assert_eq!(&joined, &complete[piece.wanted.first as usize..piece.wanted.end() as usize]);
                prop_assert_eq!(piece.is_first_of_two, joined.len() != (to - from + 1) as usize);
            }
        }
    }
}
