//! Range requests for a stored object (RFC 9110 section 14): parses `Range` and builds the 206 or
//! 416 response.
//!
//! Invariant: no response is larger than the object plus its part headers. Overlapping ranges and
//! too many ranges get the complete object.

use bytes::{BufMut, Bytes, BytesMut};

use super::date;
use super::extent::Extent;
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, Response, StatusCode};

/// More ranges get the complete object. RFC 9110 section 14.2 lets a server ignore requests that
/// look like an attack.
const RANGES_MAX: usize = 16;
/// Longer `Range` lines are ignored: they are not worth parsing.
const LINE_BYTES_MAX: usize = 1_024;

/// First and last position of a range, both inclusive.
type ByteRange = (u64, u64);

/// Removes the fields that describe the bytes of a partial response and not its object: their
/// position and their digests (RFC 9110 section 14.4, RFC 9530 section 2).
pub(crate) fn remove_content_fields(fields: &mut Fields) {
    let is_digest =
        |name: &[u8]| name.eq_ignore_ascii_case(b"Content-Digest") || name.eq_ignore_ascii_case(b"Content-MD5");
    fields.remove(KnownField::ContentRange);
    fields.retain(|field| !is_digest(field.name));
}

/// The part of an object that a request selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RangeSelection {
    Whole,
    Ranges(Vec<ByteRange>),
    /// No requested range overlaps the object.
    Unsatisfiable,
}

/// Parses `Range`, and evaluates `If-Range` against the stored fields. A malformed field selects
/// the complete object.
///
/// Several ranges of an object with a content coding are selected with `If-Range` only. Without it,
/// their 206 would need the `Content-Encoding` of the object, which would be taken for that of the
/// multipart body (RFC 9110 section 15.3.7).
pub(super) fn select(request: &Fields, stored: &Fields, length: u64) -> RangeSelection {
    let mut lines = request.all(KnownField::Range);
    let selection = match (lines.next(), lines.next()) {
        (Some(line), None) if line.len() <= LINE_BYTES_MAX && is_current(request, stored) => {
            parse_ranges(line, length).unwrap_or(RangeSelection::Whole)
        }
        _ => RangeSelection::Whole,
    };
    match &selection {
        RangeSelection::Ranges(ranges)
            if ranges.len() > 1 && stored.has(KnownField::ContentEncoding) && !request.has(KnownField::IfRange) =>
        {
            RangeSelection::Whole
        }
        _ => selection,
    }
}

fn parse_ranges(line: &[u8], length: u64) -> Option<RangeSelection> {
    let (unit, range_set) = line.split_at_checked(6)?;
    if !unit.eq_ignore_ascii_case(b"bytes=") {
        return None;
    }
    let mut ranges: Vec<ByteRange> = Vec::new();
    let mut spec_count = 0;
    for spec in range_set.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|spec| !spec.is_empty()) {
        spec_count += 1;
        ranges.extend(byte_range(spec, length)?);
    }
    if spec_count == 0 || spec_count > RANGES_MAX {
        return None;
    }
    if ranges.is_empty() {
        return Some(RangeSelection::Unsatisfiable);
    }
    let mut sorted = ranges.clone();
    sorted.sort_unstable();
    let overlaps = sorted.windows(2).any(|pair| pair[1].0 <= pair[0].1);
    (!overlaps).then_some(RangeSelection::Ranges(ranges))
}

/// Parses one range. `Some(None)`: valid, but outside the object.
fn byte_range(spec: &[u8], length: u64) -> Option<Option<ByteRange>> {
    let dash = memchr::memchr(b'-', spec)?;
    let (first, last) = (&spec[..dash], &spec[dash + 1..]);
    if first.is_empty() {
        let suffix = parse_position(last)?;
        return Some((suffix > 0 && length > 0).then(|| (length - suffix.min(length), length - 1)));
    }
    let first = parse_position(first)?;
    let last = if last.is_empty() { u64::MAX } else { parse_position(last)? };
    if last < first {
        return None;
    }
    Some((first < length).then(|| (first, last.min(length - 1))))
}

/// Saturates: such a position is beyond the end of every object.
fn parse_position(digits: &[u8]) -> Option<u64> {
    let value = |sum: u64, digit: &u8| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    (!digits.is_empty() && digits.iter().all(u8::is_ascii_digit)).then(|| digits.iter().fold(0, value))
}

/// Evaluates `If-Range` (RFC 9110 section 13.1.5): strong comparison of entity tags, exact
/// comparison of dates.
fn is_current(request: &Fields, stored: &Fields) -> bool {
    let Some(condition) = request.get(KnownField::IfRange) else { return true };
    if condition.starts_with(b"\"") || condition.starts_with(b"W/") {
        return condition.starts_with(b"\"") && stored.get(KnownField::ETag) == Some(condition);
    }
    let modified = stored.get(KnownField::LastModified);
    // A date is a strong validator only if the response was generated at least one second after it
    // (RFC 9110 section 8.8.2.2).
    let is_strong = || {
        let (modified, date) = (date::parse(modified?)?, date::parse(stored.get(KnownField::Date)?)?);
        Some(date.duration_since(modified).is_ok_and(|since| since.as_secs() >= 1))
    };
    modified.is_some() && date::parse(condition) == modified.and_then(date::parse) && is_strong() == Some(true)
}

/// Turns `response` into the response for `selection`, from the stored `extent`. `None` if the
/// complete object is selected or the extent does not cover all ranges; `response` is then
/// unchanged.
pub(super) fn apply(selection: RangeSelection, extent: Extent, body: &Bytes, response: &mut Response) -> Option<Bytes> {
    let total = extent.total;
    let content = match selection {
        RangeSelection::Whole => return None,
        RangeSelection::Unsatisfiable => {
            response.status = StatusCode::RANGE_NOT_SATISFIABLE;
            remove_facts_of_object(&mut response.fields);
            response.fields.set(KnownField::CacheControl, "no-store");
            response.fields.add(KnownField::ContentRange, format!("bytes */{total}"));
            Bytes::new()
        }
        RangeSelection::Ranges(ranges) => {
            let pieces: Option<Vec<Bytes>> = ranges.iter().map(|range| extent.slice(body, *range)).collect();
            let pieces = pieces?;
            response.status = StatusCode::PARTIAL_CONTENT;
            remove_content_fields(&mut response.fields);
            if let ([range], [piece]) = (&ranges[..], &pieces[..]) {
                response.fields.add(KnownField::ContentRange, content_range(*range, total));
                piece.clone()
            } else {
                multipart(&ranges, &pieces, total, response)
            }
        }
    };
    response.length = BodyLength::Known(content.len() as u64);
    Some(content)
}

/// Removes what describes the object or allows its reuse from the head of a 416: its content,
/// validators and freshness, that for caches of one kind included (`CDN-Cache-Control`, RFC 9213).
fn remove_facts_of_object(fields: &mut Fields) {
    const OF_OBJECT: [KnownField; 7] = [
        KnownField::ContentType,
        KnownField::ContentEncoding,
        KnownField::ContentLanguage,
        KnownField::ETag,
        KnownField::LastModified,
        KnownField::Expires,
        KnownField::Age,
    ];
    OF_OBJECT.into_iter().for_each(|known| fields.remove(known));
    remove_content_fields(fields);
    let controls_caches = |name: &[u8]| {
        let end = |len: usize| name.len().checked_sub(len).map(|at| &name[at..]);
        end(14).is_some_and(|end| end.eq_ignore_ascii_case(b"-cache-control"))
            || name.eq_ignore_ascii_case(b"surrogate-control")
            || name.eq_ignore_ascii_case(b"pragma")
    };
    fields.retain(|field| !controls_caches(field.name));
}

fn content_range((first, last): ByteRange, total: u64) -> String {
    format!("bytes {first}-{last}/{total}")
}

/// Builds a `multipart/byteranges` body (RFC 9110 section 14.6).
fn multipart(ranges: &[ByteRange], pieces: &[Bytes], total: u64, response: &mut Response) -> Bytes {
    let boundary = boundary(pieces);
    let content_type = response.fields.get(KnownField::ContentType).map(<[u8]>::to_vec);
    let mut multipart = BytesMut::new();
    for (range, piece) in ranges.iter().zip(pieces) {
        multipart.put_slice(format!("\r\n--{boundary}\r\n").as_bytes());
        if let Some(content_type) = &content_type {
            multipart.put_slice(b"Content-Type: ");
            multipart.put_slice(content_type);
            multipart.put_slice(b"\r\n");
        }
        multipart.put_slice(format!("Content-Range: {}\r\n\r\n", content_range(*range, total)).as_bytes());
        multipart.put_slice(piece);
    }
    multipart.put_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    response.fields.remove(KnownField::ContentType);
    // The client has the coding of the object from the response that it names in `If-Range`.
    response.fields.remove(KnownField::ContentEncoding);
    response.fields.add(KnownField::ContentType, format!("multipart/byteranges; boundary={boundary}"));
    multipart.freeze()
}

/// A boundary that occurs in none of the parts (RFC 2046 section 5.1.1).
fn boundary(pieces: &[Bytes]) -> String {
    let is_unused =
        |candidate: &String| !pieces.iter().any(|piece| memchr::memmem::find(piece, candidate.as_bytes()).is_some());
    (0u64..)
        .map(|number| format!("tidegate-part-{number:016x}"))
        .find(is_unused)
        .expect("finite bytes hold finitely many numbers")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn select_range(range: &str, length: u64) -> RangeSelection {
        let mut fields = Fields::default();
        fields.push(b"Range", range.as_bytes());
        select(&fields, &Fields::default(), length)
    }

    #[test]
    fn valid_ranges_are_selected_and_malformed_ones_ignored() {
        let ranges = |ranges: &[ByteRange]| RangeSelection::Ranges(ranges.to_vec());
        for (range, expected) in [
            ("bytes=0-1", ranges(&[(0, 1)])),
            ("BYTES=5-", ranges(&[(5, 9)])),
            ("bytes=-3", ranges(&[(7, 9)])),
            ("bytes=-99", ranges(&[(0, 9)])),
            ("bytes=8-99999999999999999999999", ranges(&[(8, 9)])),
            ("bytes=0-0, 2-2 , -1", ranges(&[(0, 0), (2, 2), (9, 9)])),
            ("bytes=10-", RangeSelection::Unsatisfiable),
            ("bytes=-0", RangeSelection::Unsatisfiable),
            ("bytes=0-1,99-", ranges(&[(0, 1)])),
            ("bytes=0-5,5-6", RangeSelection::Whole),
            ("bytes=2-1", RangeSelection::Whole),
            ("bytes=", RangeSelection::Whole),
            ("bytes=a-b", RangeSelection::Whole),
            ("bytes=1", RangeSelection::Whole),
            ("lines=0-1", RangeSelection::Whole),
            ("bytes=0-0,1-1,2-2,3-3,4-4,5-5,6-6,7-7,8-8,9-9,0-0,1-1,2-2,3-3,4-4,5-5,6-6", RangeSelection::Whole),
        ] {
            assert_eq!(select_range(range, 10), expected, "{range}");
        }
        assert_eq!(select_range("bytes=0-", 0), RangeSelection::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn selected_ranges_are_in_bounds_and_disjoint(range in "bytes=[0-9]{0,3}-[0-9]{0,3}(,[0-9]{0,3}-[0-9]{0,3}){0,4}", length in 0u64..500) {
            if let RangeSelection::Ranges(ranges) = select_range(&range, length) {
                prop_assert!(ranges.iter().all(|(first, last)| first <= last && *last < length));
                prop_assert!(ranges.iter().map(|(first, last)| last - first + 1).sum::<u64>() <= length);
                let body = Bytes::from(vec![b'-'; usize::try_from(length).unwrap()]);
                let mut response = Response::new(StatusCode::OK);
                let is_single = ranges.len() == 1;
                let extent = Extent::whole(length);
                let content = apply(RangeSelection::Ranges(ranges), extent, &body, &mut response).expect("a complete body");
                prop_assert_eq!(response.status, StatusCode::PARTIAL_CONTENT);
                prop_assert_eq!(is_single, response.fields.has(KnownField::ContentRange));
                prop_assert!(content.len() as u64 <= length + 5 * 150);
            }
        }
    }
}
