//! Combines stored partial responses (RFC 9111 sections 3.3 and 3.4).

use bytes::{Bytes, BytesMut};

use super::extent::Extent;
use super::policy;
use super::range::remove_content_fields;
use super::resume::strong_tag;
use super::stored::{CacheMeta, CachedObject};
use crate::http::message::{BodyLength, Response, StatusCode};

/// Combines a received part with the stored part of the same object. Both must have the same strong
/// entity tag and total length, leave no gap, and have at most `max_bytes` bytes together.
/// Otherwise the result is the received part alone. A part that covers the complete object becomes
/// a complete object.
pub(crate) fn combine(
    stored: Option<(&CachedObject, Extent, &Bytes)>,
    (object, extent, body): (CachedObject, Extent, Bytes),
    max_bytes: u64,
) -> (CacheMeta, Bytes) {
    let tag = strong_tag(&object.fields);
    let is_same = |old: &CachedObject| tag.is_some() && strong_tag(&old.fields) == tag;
    let combined = stored.filter(|(old, ..)| is_same(old)).and_then(|(old, old_extent, bytes)| {
        let span_bytes = old_extent.end().max(extent.end()) - old_extent.first.min(extent.first);
        let (old_extent, bytes) =
            if span_bytes <= max_bytes { join((old_extent, bytes), (extent, &body))? } else { return None };
        let head = Response {
            status: StatusCode::OK,
            fields: object.fields.clone(),
            length: BodyLength::Empty,
            ..Response::default()
        };
        let mut fields = policy::freshen(old, &head).fields;
        remove_content_fields(&mut fields);
        Some((CachedObject { fields, ..object.clone() }, old_extent, bytes))
    });
    let (object, extent, body) = combined.unwrap_or((object, extent, body));
    if extent.length == extent.total {
        (CacheMeta::Object(object), body)
    } else {
        (CacheMeta::Partial(object, extent), body)
    }
}

/// Joins two extents of one object. `None` if bytes between them are missing.
fn join(
    (first_extent, first_bytes): (Extent, &Bytes),
    (second_extent, second_bytes): (Extent, &Bytes),
) -> Option<(Extent, Bytes)> {
    if first_extent.total != second_extent.total {
        return None;
    }
    let ((low, low_bytes), (high, high_bytes)) = if first_extent.first <= second_extent.first {
        ((first_extent, first_bytes), (second_extent, second_bytes))
    } else {
        ((second_extent, second_bytes), (first_extent, first_bytes))
    };
    if high.first > low.end() {
        return None;
    }
    if high.end() <= low.end() {
        return Some((low, low_bytes.clone()));
    }
    let overlap = usize::try_from(low.end() - high.first).ok()?;
    let mut joined = BytesMut::with_capacity(low_bytes.len() + high_bytes.len() - overlap);
    joined.extend_from_slice(low_bytes);
    joined.extend_from_slice(&high_bytes[overlap..]);
    Some((Extent { length: joined.len() as u64, ..low }, joined.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::Fields;
    use proptest::prelude::*;

    #[test]
    fn combined_parts_do_not_exceed_the_size_limit() {
        let mut object = CachedObject::default();
        object.fields.push(b"ETag", b"\"a\"");
        let old_extent = Extent { first: 0, length: 6, total: 20 };
        let new = Extent { first: 6, length: 6, total: 20 };
        let (old_bytes, new_bytes) = (Bytes::from_static(b"012345"), Bytes::from_static(b"6789ab"));
        let combined = |max_bytes| {
            combine(Some((&object, old_extent, &old_bytes)), (object.clone(), new, new_bytes.clone()), max_bytes).1
        };
        assert_eq!(combined(12), &b"0123456789ab"[..]);
        assert_eq!(combined(11), new_bytes, "the received part alone");
    }

    #[test]
    fn fields_of_the_content_are_not_those_of_the_object() {
        let mut fields = Fields::default();
        for name in ["Content-Range", "content-digest", "Content-MD5", "Repr-Digest", "ETag"] {
            fields.push(name.as_bytes(), b"x");
        }
        remove_content_fields(&mut fields);
        assert_eq!(fields.iter().map(|field| field.name).collect::<Vec<_>>(), [&b"Repr-Digest"[..], b"ETag"]);
    }

    proptest! {
        #[test]
        fn joined_extents_have_the_bytes_of_the_complete_object(total in 1u64..60, a in 0u64..60, b in 0u64..60, c in 0u64..60, d in 0u64..60) {
            let complete = Bytes::from((0..total).map(|at| at as u8).collect::<Vec<_>>());
            let extent = |from: u64, to: u64| {
                let (from, to) = (from.min(to) % total, from.max(to) % total);
                let (first, last) = (from.min(to), from.max(to));
                Extent { first, length: last - first + 1, total }
            };
            let bytes = |extent: Extent| complete.slice(extent.first as usize..extent.end() as usize);
            let (one, two) = (extent(a, b), extent(c, d));
            let has_gap = one.end() < two.first || two.end() < one.first;
            match join((one, &bytes(one)), (two, &bytes(two))) {
                None => prop_assert!(has_gap),
                Some((old_extent, body)) => {
                    prop_assert!(!has_gap);
                    prop_assert_eq!(old_extent.first, one.first.min(two.first));
                    prop_assert_eq!(old_extent.end(), one.end().max(two.end()));
                    prop_assert_eq!(body, bytes(old_extent));
                }
            }
        }
    }
}
