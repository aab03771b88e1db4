//! Finds cookies in the `Cookie` fields of a request (RFC 6265 section 4.2).

use crate::http::fields::{Fields, KnownField};

/// Value of the first cookie with this name.
pub(crate) fn find<'a>(fields: &'a Fields, name: &[u8]) -> Option<&'a [u8]> {
    pairs(fields).find_map(|pair| value(pair, name))
}

/// The `NAME=VALUE` pairs of all `Cookie` fields, in order, without surrounding whitespace.
pub(super) fn pairs(fields: &Fields) -> impl Iterator<Item = &[u8]> {
    fields.all(KnownField::Cookie).flat_map(|line| line.split(|byte| *byte == b';')).map(<[u8]>::trim_ascii)
}

/// Value of `pair` if it has this name.
pub(super) fn value<'a>(pair: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (key, value) = pair.split_at(pair.iter().position(|byte| *byte == b'=')?);
    (key == name).then_some(&value[1..])
}
