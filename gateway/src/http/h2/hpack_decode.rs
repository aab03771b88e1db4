//! Decodes field sections (RFC 7541 section 3). The cost is proportional to the bytes of the
//! section: nothing that a byte refers to is copied, and a receiver that has had enough fields (RFC
//! 9113 section 10.5.1) is told only the sizes of further ones.

use super::hpack_table::{DynamicTable, HpackField, TableName};
use super::huffman;
use crate::http::fields::KnownField;

/// Bytes of the dynamic table: the initial value, which the gateway keeps (RFC 9113 section 6.5.2).
const TABLE_BYTES: usize = 4096;

/// Space for decoded strings that is kept for the next section.
const TEXT_KEPT_MAX: usize = 8 << 10;

/// A field section that cannot be decoded, after which the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HpackError;

/// The decoder of one connection.
pub(super) struct HpackDecoder {
    table: DynamicTable,
    /// Decoded Huffman strings of the current field.
    text: Vec<u8>,
}

/// A string of a field: a range of the section, or of the decoder's text.
#[derive(Clone, Copy)]
enum HpackString<'a> {
    Plain(&'a [u8]),
    Decoded { start: usize, end: usize },
}

impl<'a> HpackString<'a> {
    fn of(self, text: &'a [u8]) -> &'a [u8] {
        match self {
            HpackString::Plain(bytes) => bytes,
            HpackString::Decoded { start, end } => &text[start..end],
        }
    }
}

impl HpackDecoder {
    pub(super) fn new() -> Self {
        HpackDecoder { table: DynamicTable::new(TABLE_BYTES), text: Vec::new() }
    }

    /// Two sections with the same bytes have the same fields while this number is the same.
    pub(super) fn table_changes(&self) -> u64 {
        self.table.changes()
    }

    /// Decodes a whole section and passes each field to `receive`.
    pub(super) fn decode(&mut self, section: &[u8], mut receive: impl FnMut(HpackField<'_>)) -> Result<(), HpackError> {
        let mut rest = section;
        let mut may_resize = true;
        while let Some(first) = rest.first() {
            match first.leading_zeros() {
                0 => {
                    let index = integer(&mut rest, 7)?;
                    receive(self.table.get(index).ok_or(HpackError)?);
                }
                1 => self.literal(&mut rest, 6, &mut receive)?,
                2 if may_resize => {
                    let size_max = integer(&mut rest, 5)?;
                    if size_max > TABLE_BYTES {
                        return Err(HpackError);
                    }
                    self.table.set_size_max(size_max);
                    continue;
                }
                2 => return Err(HpackError),
                _ => self.literal(&mut rest, 4, &mut receive)?,
            }
            may_resize = false;
        }
        if self.text.capacity() > TEXT_KEPT_MAX {
            self.text = Vec::new();
        }
        Ok(())
    }

    /// A literal field; one with a prefix of six bits is inserted into the table.
    fn literal(
        &mut self,
        rest: &mut &[u8],
        prefix: u8,
        receive: &mut impl FnMut(HpackField<'_>),
    ) -> Result<(), HpackError> {
        self.text.clear();
        let index = integer(rest, prefix)?;
        if index > 0 {
            let (known, name) = self.table.name(index).ok_or(HpackError)?;
            let value = self.string(rest)?;
            let field = HpackField { known, name: &name, value: value.of(&self.text) };
            receive(field);
            if prefix == 6 {
                self.table.insert(field, |_| name.clone());
            }
            return Ok(());
        }
        let name = self.string(rest)?;
        let known = KnownField::of(name.of(&self.text));
        let value = self.string(rest)?;
        let field = HpackField { known, name: name.of(&self.text), value: value.of(&self.text) };
        receive(field);
        if prefix == 6 {
            self.table.insert(field, |name| TableName::Received(name.into()));
        }
        Ok(())
    }

    fn string<'a>(&mut self, rest: &mut &'a [u8]) -> Result<HpackString<'a>, HpackError> {
        let is_huffman = rest.first().ok_or(HpackError)? & 0x80 != 0;
        let length = integer(rest, 7)?;
        let (string, after) = rest.split_at_checked(length).ok_or(HpackError)?;
        *rest = after;
        if !is_huffman {
            return Ok(HpackString::Plain(string));
        }
        let start = self.text.len();
        if !huffman::decode(string, &mut self.text) {
            return Err(HpackError);
        }
        Ok(HpackString::Decoded { start, end: self.text.len() })
    }
}

/// An integer with a prefix of `bits` bits (RFC 7541 section 5.1), below 2^28.
fn integer(rest: &mut &[u8], bits: u8) -> Result<usize, HpackError> {
    let (first, mut after) = rest.split_first().ok_or(HpackError)?;
    let prefix_max = (1_usize << bits) - 1;
    let mut value = usize::from(*first) & prefix_max;
    if value == prefix_max {
        let mut shift = 0;
        loop {
            let (byte, next) = after.split_first().ok_or(HpackError)?;
            after = next;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
            shift += 7;
            if shift > 21 {
                return Err(HpackError);
            }
        }
    }
    *rest = after;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(decoder: &mut HpackDecoder, section: &[u8]) -> Result<Vec<String>, HpackError> {
        let mut lines = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        decoder.decode(section, |field| {
            assert_eq!(field.known, KnownField::of(field.name));
            lines.push(format!("{}: {}", text(field.name), text(field.value)));
        })?;
        Ok(lines)
    }

    #[test]
    fn malformed_sections_are_refused() {
        let sections: [&[u8]; 12] = [
            &[0x80],                               // index 0
            &[0xbe],                               // an entry that the table does not have
            &[0x7f, 0x00],                         // likewise, as a name
            &[0x82, 0x20],                         // a change of size after a field
            &[0x3f, 0xe2, 0x1f],                   // a larger table than allowed
            &[0xff],                               // an integer without end
            &[0xff, 0x80, 0x80, 0x80, 0x80, 0x00], // a long integer
            &[0x40],                               // no name
            &[0x40, 0x05, b'a'],                   // a name without end
            &[0x40, 0x01, b'a'],                   // no value
            &[0x00, 0x01, b'a', 0x81, 0x00],       // wrong padding
            &[0x00, 0x01, b'a', 0x84, 0xff, 0xff, 0xff, 0xff],
        ];
        for section in sections {
            assert_eq!(decoded(&mut HpackDecoder::new(), section), Err(HpackError), "{section:02x?}");
        }
    }

    #[test]
    fn table_is_kept_over_sections_and_evicts() {
        // RFC 7541 appendix C.3.
        let mut decoder = HpackDecoder::new();
        let first = b"\x82\x86\x84\x41\x0fwww.example.com";
        let lines = [":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"];
        assert_eq!(decoded(&mut decoder, first), Ok(lines.map(str::to_owned).into()));
        let second = b"\x82\x86\x84\xbe\x58\x08no-cache";
        let expected = [&lines[..], &["cache-control: no-cache"]].concat();
        assert_eq!(decoded(&mut decoder, second).map(|lines| lines.join("\n")), Ok(expected.join("\n")));
        assert_eq!(decoded(&mut decoder, &[0xbf, 0xbe]).map(|lines| lines.len()), Ok(2));
        // A table of 60 bytes holds one entry, and one of 0 none.
        assert!(decoded(&mut decoder, &[0x3f, 0x1d, 0xbe]).is_ok());
        assert_eq!(decoded(&mut decoder, &[0xbf]), Err(HpackError));
        assert!(decoded(&mut decoder, b"\x20\x40\x01a\x01b").is_ok());
        assert_eq!(decoded(&mut decoder, &[0xbe]), Err(HpackError));
    }

    #[test]
    fn name_that_a_literal_refers_to_is_not_copied() {
        let mut decoder = HpackDecoder::new();
        let name = [b'n'; 3_000];
        let first = [&[0x40, 0x7f, 0xb9, 0x16][..], &name, &[1, b'v']].concat();
        let (mut names, mut bytes) = (std::collections::HashSet::new(), 0);
        assert_eq!(decoder.decode(&first, |_| ()), Ok(()));
        // With and without insertion, which evicts the entry before.
        let references = [[0x7e, 0], [0x0f, 47]].concat();
        let section = [&references[..], &[0]].concat().repeat(1_000);
        let decoded = decoder.decode(&section, |field| {
            assert_eq!(field.name, name);
            names.insert(field.name.as_ptr());
            bytes += field.name.len();
        });
        assert_eq!((decoded, names.len(), bytes), (Ok(()), 1, 2_000 * name.len()));
    }

    #[test]
    fn peer_of_another_library_is_understood() {
        use crate::http::h2::huffman::tests::encode;
        let mut decoder = HpackDecoder::new();
        for number in 0..200 {
            let (name, value) = (format!("x-name-{}", number % 7), "v".repeat(number));
            let (name_text, value_text) = (encode(name.as_bytes()), encode(value.as_bytes()));
            let mut section = vec![0x40, 0x80 | u8::try_from(name_text.len()).expect("short")];
            section.extend(&name_text);
            match u8::try_from(value_text.len()).expect("short") {
                length @ 0..127 => section.push(0x80 | length),
                length => section.extend([0xff, length - 127]),
            }
            section.extend(&value_text);
            section.push(0xbe);
            let line = format!("{name}: {value}");
            assert_eq!(decoded(&mut decoder, &section), Ok(vec![line.clone(), line]));
        }
    }
}
