//! Where a message's body ends (RFC 9112 section 6), decided from its fields or refused.

use crate::http::fields::{Fields, Known, KnownSet};
use crate::http::message::Length;

/// What makes the framing of a message unacceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadFraming {
    BadLength,
    RepeatedLength,
    LengthAndCoding,
    RepeatedCoding,
    CodingInHttp10,
    UnknownCoding,
}

/// Fields that say where a body ends.
pub(super) const FRAMING: KnownSet = KnownSet::of(&[Known::ContentLength, Known::TransferEncoding]);

/// The body length that the fields announce; `None` when they announce nothing.
pub(super) fn announced(fields: &Fields, is_http10: bool) -> Result<Option<Length>, BadFraming> {
    if !fields.has_any(FRAMING) {
        return Ok(None);
    }
    let mut lengths = fields.all(Known::ContentLength);
    let mut codings = fields.all(Known::TransferEncoding);
    match (lengths.next(), codings.next()) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(BadFraming::LengthAndCoding),
        (Some(value), None) => {
            if lengths.next().is_some() {
                return Err(BadFraming::RepeatedLength);
            }
            parse_length(value).map(|length| Some(Length::Known(length))).ok_or(BadFraming::BadLength)
        }
        (None, Some(value)) => {
            if codings.next().is_some() {
                return Err(BadFraming::RepeatedCoding);
            }
            if is_http10 {
                return Err(BadFraming::CodingInHttp10);
            }
            if value.eq_ignore_ascii_case(b"chunked") {
                Ok(Some(Length::Streamed))
            } else {
                Err(BadFraming::UnknownCoding)
            }
        }
    }
}

/// Digits only, below 2^63: no sign, no list, no white space, not empty.
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

    fn of(lines: &[(&str, &str)], is_http10: bool) -> Result<Option<Length>, BadFraming> {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        announced(&fields, is_http10)
    }

    #[test]
    fn doubtful_lengths_are_refused() {
        for value in ["", "+1", "-1", "1,1", "1, 1", "0x1", "1 ", "9223372036854775808", "99999999999999999999"] {
            assert_eq!(of(&[("content-length", value)], false), Err(BadFraming::BadLength), "{value:?}");
        }
        assert_eq!(of(&[("content-length", "1"), ("Content-Length", "1")], false), Err(BadFraming::RepeatedLength));
        assert_eq!(of(&[("content-length", "9223372036854775807")], false), Ok(Some(Length::Known(i64::MAX as u64))));
    }

    #[test]
    fn only_a_single_chunked_is_a_coding() {
        let te = "transfer-encoding";
        assert_eq!(of(&[(te, "chunked"), ("content-length", "1")], false), Err(BadFraming::LengthAndCoding));
        assert_eq!(of(&[(te, "chunked"), (te, "chunked")], false), Err(BadFraming::RepeatedCoding));
        assert_eq!(of(&[(te, "gzip, chunked")], false), Err(BadFraming::UnknownCoding));
        assert_eq!(of(&[(te, "chunked")], true), Err(BadFraming::CodingInHttp10));
        assert_eq!(of(&[(te, "Chunked")], false), Ok(Some(Length::Streamed)));
    }
}
