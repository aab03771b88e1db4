//! Determines the body length of a message from its fields (RFC 9112 section 6), or refuses the
//! message.

use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::message::BodyLength;

/// Why the framing of a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FramingError {
    BadLength,
    RepeatedLength,
    LengthAndCoding,
    RepeatedCoding,
    CodingInHttp10,
    ChunkedNotLast,
    UnknownCoding,
}

/// The fields that determine the end of a body.
pub(super) const FRAMING_FIELDS: KnownFieldSet =
    KnownFieldSet::of(&[KnownField::ContentLength, KnownField::TransferEncoding]);

/// The body length that the fields announce; `None` without framing fields.
pub(super) fn announced_length(fields: &Fields, is_http10: bool) -> Result<Option<BodyLength>, FramingError> {
    if !fields.has_any(FRAMING_FIELDS) {
        return Ok(None);
    }
    let mut lengths = fields.all(KnownField::ContentLength);
    let mut codings = fields.all(KnownField::TransferEncoding);
    match (lengths.next(), codings.next()) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(FramingError::LengthAndCoding),
        (Some(value), None) => {
            if lengths.next().is_some() {
                return Err(FramingError::RepeatedLength);
            }
            parse_length(value).map(|length| Some(BodyLength::Known(length))).ok_or(FramingError::BadLength)
        }
        (None, Some(value)) => {
            if codings.next().is_some() {
                return Err(FramingError::RepeatedCoding);
            }
            if is_http10 {
                return Err(FramingError::CodingInHttp10);
            }
            if value.eq_ignore_ascii_case(b"chunked") {
                Ok(Some(BodyLength::Streamed))
            } else if is_chunked_not_last(value) {
                Err(FramingError::ChunkedNotLast)
            } else {
                Err(FramingError::UnknownCoding)
            }
        }
    }
}

/// Whether `chunked` is applied and another coding after it, so that the end of the body cannot be
/// found (RFC 9112 section 6.3).
fn is_chunked_not_last(value: &[u8]) -> bool {
    let mut codings = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|coding| !coding.is_empty());
    let last = codings.next_back().unwrap_or_default();
    !last.eq_ignore_ascii_case(b"chunked") && codings.any(|coding| coding.eq_ignore_ascii_case(b"chunked"))
}

/// Digits only, below 2^63. Refuses signs, lists, white space and the empty value.
fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let length = value.iter().try_fold(0u64, |sum, digit| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0')))?;
    (length < 1 << 63).then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[(&str, &str)], is_http10: bool) -> Result<Option<BodyLength>, FramingError> {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        announced_length(&fields, is_http10)
    }

    #[test]
    fn ambiguous_lengths_are_refused() {
        for value in ["", "+1", "-1", "1,1", "1, 1", "0x1", "1 ", "9223372036854775808", "99999999999999999999"] {
            assert_eq!(of(&[("content-length", value)], false), Err(FramingError::BadLength), "{value:?}");
        }
        assert_eq!(of(&[("content-length", "1"), ("Content-Length", "1")], false), Err(FramingError::RepeatedLength));
        assert_eq!(
            of(&[("content-length", "9223372036854775807")], false),
            Ok(Some(BodyLength::Known(i64::MAX as u64)))
        );
    }

    #[test]
    fn only_a_single_chunked_coding_is_accepted() {
        let te = "transfer-encoding";
        assert_eq!(of(&[(te, "chunked"), ("content-length", "1")], false), Err(FramingError::LengthAndCoding));
        assert_eq!(of(&[(te, "chunked"), (te, "chunked")], false), Err(FramingError::RepeatedCoding));
        for value in ["gzip", "gzip, chunked", "chunked, chunked", "gzip, , Chunked ,", "xchunked", ""] {
            assert_eq!(of(&[(te, value)], false), Err(FramingError::UnknownCoding), "{value}");
        }
        for value in ["chunked, gzip", "Chunked,x", "gzip, chunked ,, identity,"] {
            assert_eq!(of(&[(te, value)], false), Err(FramingError::ChunkedNotLast), "{value}");
        }
        assert_eq!(of(&[(te, "chunked")], true), Err(FramingError::CodingInHttp10));
        assert_eq!(of(&[(te, "Chunked")], false), Ok(Some(BodyLength::Streamed)));
    }
}
