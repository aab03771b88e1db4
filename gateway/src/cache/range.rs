//! Parts of a complete object (RFC 9110 section 14): what a `Range` asks for, and the answer with one part or several.
//!
//! Invariant: no answer is larger than the object and its part heads; ranges that overlap, or are many, get the whole object.

use bytes::{BufMut, Bytes, BytesMut};

use super::date;
use super::part::Extent;
use crate::http::fields::{Fields, Known};
use crate::http::message::{Length, Response, StatusCode};

/// More parts are answered whole (RFC 9110 section 14.2 lets a server ignore what looks like an attack).
const PARTS_MAX: usize = 16;
/// What `Range` lines longer than this ask for is not worth finding out.
const BYTES_MAX: usize = 1_024;

/// First and last position of a part.
type Part = (u64, u64);

/// What a request wants of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Whole,
    Parts(Vec<Part>),
    /// No part of it exists.
    Nothing,
}

/// Reads `Range`, and `If-Range` against the stored fields. Anything malformed asks for the whole.
pub(super) fn wanted(request: &Fields, stored: &Fields, length: u64) -> Wanted {
    let mut lines = request.all(Known::Range);
    match (lines.next(), lines.next()) {
        (Some(line), None) if line.len() <= BYTES_MAX && is_current(request, stored) => {
            parts(line, length).unwrap_or(Wanted::Whole)
        }
        _ => Wanted::Whole,
    }
}

fn parts(line: &[u8], length: u64) -> Option<Wanted> {
    let (unit, set) = line.split_at_checked(6)?;
    if !unit.eq_ignore_ascii_case(b"bytes=") {
        return None;
    }
    let mut parts: Vec<Part> = Vec::new();
    let mut asked = 0;
    for spec in set.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|spec| !spec.is_empty()) {
        asked += 1;
        parts.extend(part(spec, length)?);
    }
    if asked == 0 || asked > PARTS_MAX {
        return None;
    }
    if parts.is_empty() {
        return Some(Wanted::Nothing);
    }
    let mut sorted = parts.clone();
    sorted.sort_unstable();
    let overlap = sorted.windows(2).any(|pair| pair[1].0 <= pair[0].1);
    (!overlap).then_some(Wanted::Parts(parts))
}

/// `Some(None)`: well-formed, and outside the object.
fn part(spec: &[u8], length: u64) -> Option<Option<Part>> {
    let dash = memchr::memchr(b'-', spec)?;
    let (first, last) = (&spec[..dash], &spec[dash + 1..]);
    if first.is_empty() {
        let suffix = number(last)?;
        return Some((suffix > 0 && length > 0).then(|| (length - suffix.min(length), length - 1)));
    }
    let first = number(first)?;
    let last = if last.is_empty() { u64::MAX } else { number(last)? };
    if last < first {
        return None;
    }
    Some((first < length).then(|| (first, last.min(length - 1))))
}

/// Saturates: a position that large is beyond every object.
fn number(digits: &[u8]) -> Option<u64> {
    let value = |sum: u64, digit: &u8| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    (!digits.is_empty() && digits.iter().all(u8::is_ascii_digit)).then(|| digits.iter().fold(0, value))
}

/// Whether `If-Range` holds (RFC 9110 section 13.1.5): compared strongly, and a date exactly.
fn is_current(request: &Fields, stored: &Fields) -> bool {
    let Some(condition) = request.get(Known::IfRange) else { return true };
    if condition.starts_with(b"\"") || condition.starts_with(b"W/") {
        return condition.starts_with(b"\"") && stored.get(Known::ETag) == Some(condition);
    }
    let modified = stored.get(Known::LastModified);
    // A date is a strong validator only a while after the change (RFC 9110 section 8.8.2.2).
    let is_strong = || {
        let (modified, date) = (date::parse(modified?)?, date::parse(stored.get(Known::Date)?)?);
        Some(date.duration_since(modified).is_ok_and(|since| since.as_secs() >= 1))
    };
    modified.is_some() && date::parse(condition) == modified.and_then(date::parse) && is_strong() == Some(true)
}

/// Makes the answer with what is held of the whole the answer that is wanted. `None` where not all of it is held; `response` is
/// as it was then.
pub(super) fn answer(wanted: Wanted, held: Extent, body: &Bytes, response: &mut Response) -> Option<Bytes> {
    let total = held.total;
    let answer = match wanted {
        Wanted::Whole => return None,
        Wanted::Nothing => {
            response.status = StatusCode::RANGE_NOT_SATISFIABLE;
            response.fields.remove(Known::ContentType);
            response.fields.remove(Known::ContentEncoding);
            response.fields.add(Known::ContentRange, format!("bytes */{total}"));
            Bytes::new()
        }
        Wanted::Parts(parts) => {
            let pieces: Option<Vec<Bytes>> = parts.iter().map(|part| held.slice(body, *part)).collect();
            let pieces = pieces?;
            response.status = StatusCode::PARTIAL_CONTENT;
            if let ([part], [piece]) = (&parts[..], &pieces[..]) {
                response.fields.add(Known::ContentRange, content_range(*part, total));
                piece.clone()
            } else {
                several(&parts, &pieces, total, response)
            }
        }
    };
    response.length = Length::Known(answer.len() as u64);
    Some(answer)
}

fn content_range((first, last): Part, total: u64) -> String {
    format!("bytes {first}-{last}/{total}")
}

/// RFC 9110 section 14.6.
fn several(parts: &[Part], pieces: &[Bytes], total: u64, response: &mut Response) -> Bytes {
    let boundary = boundary(pieces);
    let kind = response.fields.get(Known::ContentType).map(<[u8]>::to_vec);
    let mut whole = BytesMut::new();
    for (part, piece) in parts.iter().zip(pieces) {
        whole.put_slice(format!("\r\n--{boundary}\r\n").as_bytes());
        if let Some(kind) = &kind {
            whole.put_slice(b"Content-Type: ");
            whole.put_slice(kind);
            whole.put_slice(b"\r\n");
        }
        whole.put_slice(format!("Content-Range: {}\r\n\r\n", content_range(*part, total)).as_bytes());
        whole.put_slice(piece);
    }
    whole.put_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    response.fields.remove(Known::ContentType);
    response.fields.add(Known::ContentType, format!("multipart/byteranges; boundary={boundary}"));
    whole.freeze()
}

/// A delimiter that none of the pieces has in it (RFC 2046 section 5.1.1).
fn boundary(pieces: &[Bytes]) -> String {
    let free =
        |candidate: &String| !pieces.iter().any(|piece| memchr::memmem::find(piece, candidate.as_bytes()).is_some());
    (0u64..)
        .map(|number| format!("tidegate-part-{number:016x}"))
        .find(free)
        .expect("finite bytes hold finitely many numbers")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(range: &str, length: u64) -> Wanted {
        let mut fields = Fields::default();
        fields.push(b"Range", range.as_bytes());
        wanted(&fields, &Fields::default(), length)
    }

    #[test]
    fn forms_are_read_and_the_malformed_is_ignored() {
        let parts = |parts: &[Part]| Wanted::Parts(parts.to_vec());
        for (range, expected) in [
            ("bytes=0-1", parts(&[(0, 1)])),
            ("BYTES=5-", parts(&[(5, 9)])),
            ("bytes=-3", parts(&[(7, 9)])),
            ("bytes=-99", parts(&[(0, 9)])),
            ("bytes=8-99999999999999999999999", parts(&[(8, 9)])),
            ("bytes=0-0, 2-2 , -1", parts(&[(0, 0), (2, 2), (9, 9)])),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=0-1,99-", parts(&[(0, 1)])),
            ("bytes=0-5,5-6", Wanted::Whole),
            ("bytes=2-1", Wanted::Whole),
            ("bytes=", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("bytes=1", Wanted::Whole),
            ("lines=0-1", Wanted::Whole),
            ("bytes=0-0,1-1,2-2,3-3,4-4,5-5,6-6,7-7,8-8,9-9,0-0,1-1,2-2,3-3,4-4,5-5,6-6", Wanted::Whole),
        ] {
            assert_eq!(of(range, 10), expected, "{range}");
        }
        assert_eq!(of("bytes=0-", 0), Wanted::Nothing);
    }

    proptest! {
        #[test]
        fn parts_are_inside_and_apart(range in "bytes=[0-9]{0,3}-[0-9]{0,3}(,[0-9]{0,3}-[0-9]{0,3}){0,4}", length in 0u64..500) {
            if let Wanted::Parts(parts) = of(&range, length) {
                prop_assert!(parts.iter().all(|(first, last)| first <= last && *last < length));
                prop_assert!(parts.iter().map(|(first, last)| last - first + 1).sum::<u64>() <= length);
                let body = Bytes::from(vec![b'-'; usize::try_from(length).unwrap()]);
                let mut response = Response::new(StatusCode::OK);
                let single = parts.len() == 1;
                let held = Extent::whole(length);
                let answer = answer(Wanted::Parts(parts), held, &body, &mut response).expect("all is held");
                prop_assert_eq!(response.status, StatusCode::PARTIAL_CONTENT);
                prop_assert_eq!(single, response.fields.has(Known::ContentRange));
                prop_assert!(answer.len() as u64 <= length + 5 * 150);
            }
        }
    }
}
