//! A part of an object that is stored without the rest: where it lies, and how two of them become one (RFC 9111 sections 3.3
//! and 3.4).

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::policy;
use super::stored::{Meta, Object};
use crate::http::fields::Known;
use crate::http::message::{Length, Response, StatusCode};

/// A contiguous piece of an object, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub first: u64,
    pub length: u64,
    /// Of the whole object.
    pub total: u64,
}

impl Extent {
    /// Of an object that is there from its first byte to its last.
    pub fn whole(total: u64) -> Self {
        Extent { first: 0, length: total, total }
    }

    /// What a 206 with one part says of it; `None` where that is nothing, impossible, without the total, or another length than
    /// that of the body (RFC 9110 section 14.4).
    pub fn of(response: &Response) -> Option<Self> {
        if response.status != StatusCode::PARTIAL_CONTENT {
            return None;
        }
        let mut lines = response.fields.all(Known::ContentRange);
        let (Some(line), None) = (lines.next(), lines.next()) else { return None };
        let extent = Self::parse(std::str::from_utf8(line).ok()?)?;
        let is_said = !matches!(response.length, Length::Known(length) if length != extent.length);
        is_said.then_some(extent)
    }

    fn parse(line: &str) -> Option<Self> {
        let (unit, rest) = line.split_once(' ')?;
        let (range, total) = rest.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?;
        let (first, last, total): (u64, u64, u64) = (number(first)?, number(last)?, number(total)?);
        let is_sound = unit.eq_ignore_ascii_case("bytes") && first <= last && last < total;
        is_sound.then(|| Extent { first, length: last - first + 1, total })
    }

    fn end(self) -> u64 {
        self.first + self.length
    }

    /// The bytes of this extent that lie from `first` to `last` of the whole, if it has them all.
    pub fn slice(self, body: &Bytes, (first, last): (u64, u64)) -> Option<Bytes> {
        let begin = usize::try_from(first.checked_sub(self.first)?).ok()?;
        let end = usize::try_from(last.checked_sub(self.first)? + 1).ok()?;
        (end <= body.len()).then(|| body.slice(begin..end))
    }
}

/// A part that has arrived, combined with what is stored of the same object: the same strong tag and total, and no gap between
/// them, and no more than `most` bytes together. Else the new one stands for itself. What has become whole is an object like any other.
pub fn combine(
    stored: Option<(&Object, Extent, &Bytes)>,
    (object, extent, body): (Object, Extent, Bytes),
    most: u64,
) -> (Meta, Bytes) {
    let is_strong = |object: &Object| object.fields.get(Known::ETag).is_some_and(|tag| tag.starts_with(b"\""));
    let same = |old: &Object| is_strong(old) && old.fields.get(Known::ETag) == object.fields.get(Known::ETag);
    let joined = stored.filter(|(old, ..)| same(old)).and_then(|(old, held, bytes)| {
        let spanned = held.end().max(extent.end()) - held.first.min(extent.first);
        let (held, bytes) = if spanned <= most { join((held, bytes), (extent, &body))? } else { return None };
        let head = Response { status: StatusCode::OK, fields: object.fields.clone(), length: Length::Empty };
        let fields = policy::freshen(old, &head).fields;
        Some((Object { fields, ..object.clone() }, held, bytes))
    });
    let (object, extent, body) = joined.unwrap_or((object, extent, body));
    if extent.length == extent.total { (Meta::Object(object), body) } else { (Meta::Part(object, extent), body) }
}

/// Two extents of one object as one, where no byte between them is missing.
fn join((one, ones): (Extent, &Bytes), (two, twos): (Extent, &Bytes)) -> Option<(Extent, Bytes)> {
    if one.total != two.total {
        return None;
    }
    let ((low, lows), (high, highs)) =
        if one.first <= two.first { ((one, ones), (two, twos)) } else { ((two, twos), (one, ones)) };
    if high.first > low.end() {
        return None;
    }
    if high.end() <= low.end() {
        return Some((low, lows.clone()));
    }
    let overlap = usize::try_from(low.end() - high.first).ok()?;
    let mut whole = BytesMut::with_capacity(lows.len() + highs.len() - overlap);
    whole.extend_from_slice(lows);
    whole.extend_from_slice(&highs[overlap..]);
    Some((Extent { length: whole.len() as u64, ..low }, whole.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(range: &str, length: Length) -> Response {
        let mut response = Response { status: StatusCode::PARTIAL_CONTENT, length, ..Response::new(StatusCode::OK) };
        response.fields.push(b"Content-Range", range.as_bytes());
        response
    }

    #[test]
    fn an_extent_is_what_the_answer_says_without_contradiction() {
        let of = |range: &str| Extent::of(&answer(range, Length::Streamed));
        assert_eq!(of("bytes 4-9/10"), Some(Extent { first: 4, length: 6, total: 10 }));
        for bad in [
            "bytes 4-9/*",
            "bytes */10",
            "bytes 9-4/10",
            "bytes 4-10/10",
            "lines 4-9/10",
            "bytes +4-9/10",
            "4-9/10",
            "",
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(Extent::of(&answer("bytes 4-9/10", Length::Known(5))), None);
    }

    #[test]
    fn parts_do_not_grow_beyond_what_is_stored() {
        let mut object = Object::default();
        object.fields.push(b"ETag", b"\"a\"");
        let held = Extent { first: 0, length: 6, total: 20 };
        let new = Extent { first: 6, length: 6, total: 20 };
        let (ones, twos) = (Bytes::from_static(b"012345"), Bytes::from_static(b"6789ab"));
        let of = |most| combine(Some((&object, held, &ones)), (object.clone(), new, twos.clone()), most).1;
        assert_eq!(of(12), &b"0123456789ab"[..]);
        assert_eq!(of(11), twos, "the new one by itself");
    }

    proptest! {
        #[test]
        fn joined_extents_are_the_bytes_of_the_whole(total in 1u64..60, a in 0u64..60, b in 0u64..60, c in 0u64..60, d in 0u64..60) {
            let whole = Bytes::from((0..total).map(|at| at as u8).collect::<Vec<_>>());
            let extent = |from: u64, to: u64| {
                let (from, to) = (from.min(to) % total, from.max(to) % total);
                let (first, last) = (from.min(to), from.max(to));
                Extent { first, length: last - first + 1, total }
            };
            let bytes = |extent: Extent| whole.slice(extent.first as usize..extent.end() as usize);
            let (one, two) = (extent(a, b), extent(c, d));
            let has_gap = one.end() < two.first || two.end() < one.first;
            match join((one, &bytes(one)), (two, &bytes(two))) {
                None => prop_assert!(has_gap),
                Some((held, body)) => {
                    prop_assert!(!has_gap);
                    prop_assert_eq!(held.first, one.first.min(two.first));
                    prop_assert_eq!(held.end(), one.end().max(two.end()));
                    prop_assert_eq!(body, bytes(held));
                }
            }
        }
    }
}
