//! Encodes field sections (RFC 7541 section 6) without a dynamic table and without Huffman codes.
//!
//! Such a section depends on nothing but the fields, and costs little more than copying them. Its
//! names are indices of the static table where possible.

use std::sync::LazyLock;

use super::hpack_table::static_index_of;
use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::message::{BodyLength, Response, StatusCode};

/// Fields that a message in HTTP/2 does not have, and the length, which is written from the
/// framing. `hop` has removed the other fields of a connection (RFC 9113 section 8.2.2).
const EXCLUDED: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Connection,
    KnownField::ContentLength,
    KnownField::TransferEncoding,
    KnownField::Upgrade,
]);

/// The beginning of a line with each known name: a literal without indexing, and its name.
static NAMES: LazyLock<Vec<Box<[u8]>>> = LazyLock::new(|| {
    KnownField::ALL
        .iter()
        .map(|known| {
            let mut text = Vec::new();
            write_name(known.as_str().as_bytes(), &mut text);
            text.into_boxed_slice()
        })
        .collect()
});

/// Tells the peer that the dynamic table has no entries: it precedes the first section.
pub(super) const EMPTY_TABLE: u8 = 0x20;

/// Appends the field section of a response.
pub(super) fn write_response(response: &Response, out: &mut Vec<u8>) {
    write_status(response.status, out);
    write_fields(&response.fields, out);
    if let BodyLength::Known(length) = response.length {
        out.extend_from_slice(&NAMES[KnownField::ContentLength as usize]);
        let mut digits = [0; 20];
        let digits = decimal(length, &mut digits);
        write_string(digits, out);
    }
}

/// Appends the lines of fields, of a head or of trailers.
pub(super) fn write_fields(fields: &Fields, out: &mut Vec<u8>) {
    for field in fields.iter() {
        match field.known {
            Some(known) if EXCLUDED.contains(known) => continue,
            Some(known) => out.extend_from_slice(&NAMES[known as usize]),
            None => write_name(field.name, out),
        }
        write_string(field.value, out);
    }
}

fn write_status(status: StatusCode, out: &mut Vec<u8>) {
    let index = match status.as_u16() {
        200 => 8,
        204 => 9,
        206 => 10,
        304 => 11,
        400 => 12,
        404 => 13,
        500 => 14,
        _ => {
            out.push(0x08);
            return write_string(status.as_str().as_bytes(), out);
        }
    };
    out.push(0x80 | index);
}

/// Begins a literal without indexing.
fn write_name(name: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(name);
    out[start..].make_ascii_lowercase();
    let index = static_index_of(&out[start..]);
    out.truncate(start);
    if let Some(index) = index {
        return write_integer(usize::from(index), (4, 0), out);
    }
    out.push(0);
    write_integer(name.len(), (7, 0), out);
    let start = out.len();
    out.extend_from_slice(name);
    out[start..].make_ascii_lowercase();
}

fn write_string(text: &[u8], out: &mut Vec<u8>) {
    write_integer(text.len(), (7, 0), out);
    out.extend_from_slice(text);
}

/// Appends an integer with a prefix of `bits` bits; `flags` are the bits before them.
fn write_integer(value: usize, (bits, flags): (u8, u8), out: &mut Vec<u8>) {
    let prefix_max = (1_usize << bits) - 1;
    if value < prefix_max {
        return out.push(flags | value as u8);
    }
    out.push(flags | prefix_max as u8);
    let mut rest = value - prefix_max;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hpack_decode::HpackDecoder;
    use super::*;

    #[test]
    fn sections_are_decoded_as_they_were() {
        for (status, length) in [(200, 0), (103, 7), (404, 1_234_567), (599, u64::MAX)] {
            let mut response = Response::new(StatusCode::from_u16(status).expect("valid"));
            response.length = BodyLength::Known(length);
            response.fields.push(b"X-Long-Name", "v".repeat(500).as_bytes());
            response.fields.push(b"Connection", b"close");
            response.fields.push(b"Set-Cookie", b"a=1");
            response.fields.push(b"Link", b"");
            let mut section = vec![EMPTY_TABLE];
            write_response(&response, &mut section);
            let mut lines = Vec::new();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let receive = |field: super::super::hpack_table::HpackField<'_>| {
                lines.push(format!("{}={}", text(field.name), text(field.value)));
            };
            assert_eq!(HpackDecoder::new().decode(&section, receive), Ok(()));
            let long = format!("x-long-name={}", "v".repeat(500));
            let expected = [
                format!(":status={status}"),
                long,
                "set-cookie=a=1".into(),
                "link=".into(),
                format!("content-length={length}"),
            ];
            assert_eq!(lines, expected);
        }
    }
}
