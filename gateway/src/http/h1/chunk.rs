//! Strict incremental decoder of the chunked coding (RFC 9112 section 7.1).
//!
//! Stricter than the grammar: at most 256 bytes of extensions per chunk, no bare LF, sizes up to
//! 2^52, trailers up to 8 KiB. Extensions are validated and dropped (section 7.1.1). Trailers are
//! validated like fields. Those that a recipient acts on before the end are dropped (RFC 9110
//! section 6.5.1): a next hop that merges them into the head would act on them.

use super::scan::{HeadScanner, ScanResult};
use crate::http::fields::{Fields, KnownField, is_token};

/// Maximum bytes of extensions in a chunk size line.
const EXTENSION_MAX: usize = 256;
/// Maximum hexadecimal digits of a size: 2^52 bytes.
const DIGITS_MAX: usize = 13;
/// Maximum bytes of a trailer section.
const TRAILERS_MAX: usize = 8 << 10;

/// Position in the chunked grammar, with the size read so far or the data bytes left in the current
/// chunk.
#[derive(Debug)]
enum DecoderState {
    Size { size: u64, digits: usize },
    Extension { size: u64, length: usize, part: ExtensionPart },
    SizeLf { size: u64 },
    Data { left: u64 },
    DataCr,
    DataLf,
    Trailers(HeadScanner),
    Done,
}

/// The position inside an extension, `;name=value` or `;name="value"`, with optional white space
/// around `;` and `=` (RFC 9112 section 7.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExtensionPart {
    AfterSize,
    NameStart,
    Name,
    AfterName,
    ValueStart,
    Value,
    Quoted,
    /// After a backslash inside quotes.
    Escaped,
    QuoteEnd,
    AfterValue,
}

impl ExtensionPart {
    /// The part after `byte`; `None` if the grammar does not allow `byte` here.
    fn next(self, byte: u8) -> Option<ExtensionPart> {
        use ExtensionPart::*;
        Some(match (self, byte) {
            (Quoted, b'"') => QuoteEnd,
            (Quoted, b'\\') => Escaped,
            // `qdtext` and `quoted-pair` (RFC 9110 section 5.6.4).
            (Quoted | Escaped, b'\t' | b' '..=b'~' | 0x80..) => Quoted,
            (Quoted | Escaped, _) => return None,
            (AfterSize | NameStart | AfterName | ValueStart | AfterValue, b' ' | b'\t') => self,
            (Name, b' ' | b'\t') => AfterName,
            (Value | QuoteEnd, b' ' | b'\t') => AfterValue,
            (NameStart | ValueStart, b';') => return None,
            (_, b';') => NameStart,
            (Name | AfterName, b'=') => ValueStart,
            (ValueStart, b'"') => Quoted,
            (NameStart | Name, _) if is_token(&[byte]) => Name,
            (ValueStart | Value, _) if is_token(&[byte]) => Value,
            _ => return None,
        })
    }

    fn may_end(self) -> bool {
        matches!(self, ExtensionPart::Name | ExtensionPart::Value | ExtensionPart::QuoteEnd)
    }
}

/// Incremental decoder of one chunked body: its position in the grammar and, at the end, the
/// validated trailers.
#[derive(Debug)]
pub(super) struct ChunkDecoder {
    state: DecoderState,
    trailers: Option<Box<Fields>>,
}

/// Result of decoding the available bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DecodeStep {
    /// `skip` bytes of framing, then `data` bytes of body.
    Data { skip: usize, data: usize },
    /// `skip` bytes of framing, then more bytes are needed.
    More { skip: usize },
    /// `skip` bytes of framing, then the end of the body.
    End { skip: usize },
}

impl ChunkDecoder {
    pub(super) fn new() -> Self {
        ChunkDecoder { state: DecoderState::Size { size: 0, digits: 0 }, trailers: None }
    }

    /// Reads framing from the front of `input` up to body bytes, the end of the body, or the end of
    /// the input. The caller drops `skip` bytes, then consumes any part of `data` and reports it
    /// with `data_consumed`.
    pub(super) fn step(&mut self, input: &[u8]) -> Result<DecodeStep, &'static str> {
        let mut at = 0;
        loop {
            if let DecoderState::Data { left } = self.state {
                let available = usize::try_from(left).unwrap_or(usize::MAX).min(input.len() - at);
                return Ok(if available == 0 {
                    DecodeStep::More { skip: at }
                } else {
                    DecodeStep::Data { skip: at, data: available }
                });
            }
            if let DecoderState::Trailers(scan) = &mut self.state {
                // The section stays in the caller's buffer until it is complete, so the scan
                // continues where it stopped.
                return match scan.advance(&input[at..]) {
                    ScanResult::BareLf => Err("bad trailer line end"),
                    ScanResult::Partial { .. } if input.len() - at > TRAILERS_MAX => Err("trailers too large"),
                    ScanResult::Partial { .. } => Ok(DecodeStep::More { skip: at }),
                    ScanResult::Complete(length) => {
                        self.trailers = parse_trailers(&input[at..at + length])?;
                        self.state = DecoderState::Done;
                        Ok(DecodeStep::End { skip: at + length })
                    }
                };
            }
            if matches!(self.state, DecoderState::Done) {
                return Ok(DecodeStep::End { skip: at });
            }
            let Some(&byte) = input.get(at) else { return Ok(DecodeStep::More { skip: at }) };
            self.advance_framing(byte)?;
            at += 1;
        }
    }

    /// Removes and returns the trailers of a body that has ended.
    pub(super) fn take_trailers(&mut self) -> Option<Box<Fields>> {
        self.trailers.take()
    }

    /// Records that `count` body bytes were consumed.
    pub(super) fn data_consumed(&mut self, count: usize) {
        if let DecoderState::Data { left } = &mut self.state {
            *left -= count as u64;
            if *left == 0 {
                self.state = DecoderState::DataCr;
            }
        }
    }

    fn advance_framing(&mut self, byte: u8) -> Result<(), &'static str> {
        self.state = match (&self.state, byte) {
            (DecoderState::Size { size, digits }, _) if byte.is_ascii_hexdigit() => {
                if *digits == DIGITS_MAX {
                    return Err("chunk size too large");
                }
                let digit = (byte as char).to_digit(16).map_or(0, u64::from);
                DecoderState::Size { size: size << 4 | digit, digits: digits + 1 }
            }
            (DecoderState::Size { digits: 0, .. }, _) => return Err("chunk without a size"),
            (DecoderState::Size { size, .. }, b';') => {
                DecoderState::Extension { size: *size, length: 0, part: ExtensionPart::NameStart }
            }
            (DecoderState::Size { size, .. }, b' ' | b'\t') => {
                DecoderState::Extension { size: *size, length: 0, part: ExtensionPart::AfterSize }
            }
            (DecoderState::Size { size, .. }, b'\r') => DecoderState::SizeLf { size: *size },
            (DecoderState::Extension { size, part, .. }, b'\r') if part.may_end() => {
                DecoderState::SizeLf { size: *size }
            }
            (DecoderState::Extension { size, length, part }, _) => match part.next(byte) {
                Some(part) if *length < EXTENSION_MAX => {
                    DecoderState::Extension { size: *size, length: length + 1, part }
                }
                _ => return Err("bad chunk extension"),
            },
            (DecoderState::SizeLf { size: 0 }, b'\n') => DecoderState::Trailers(HeadScanner::default()),
            (DecoderState::SizeLf { size }, b'\n') => DecoderState::Data { left: *size },
            (DecoderState::DataCr, b'\r') => DecoderState::DataLf,
            (DecoderState::DataLf, b'\n') => DecoderState::Size { size: 0, digits: 0 },
            (DecoderState::Size { .. }, _) => return Err("bad chunk size"),
            _ => return Err("bad chunk line end"),
        };
        Ok(())
    }
}

/// The fields of a trailer section that may be forwarded.
fn parse_trailers(section: &[u8]) -> Result<Option<Box<Fields>>, &'static str> {
    if section.len() > TRAILERS_MAX {
        return Err("trailers too large");
    }
    let mut lines = [httparse::EMPTY_HEADER; 64];
    let Ok(httparse::Status::Complete((_, lines))) = httparse::parse_headers(section, &mut lines) else {
        return Err("bad trailers");
    };
    let mut trailers = Fields::default();
    for line in lines.iter().filter(|line| is_allowed_trailer(line.name)) {
        trailers.push(line.name.as_bytes(), line.value.trim_ascii());
    }
    Ok((!trailers.is_empty()).then(|| Box::new(trailers)))
}

/// Whether a field is allowed as a trailer. Excluded are names that the gateway acts on in heads,
/// and names of framing, routing, authentication, content metadata and client identity.
pub(crate) fn is_allowed_trailer(name: &str) -> bool {
    const FORBIDDEN: [&str; 2] = ["www-authenticate", "authentication-info"];
    const FORBIDDEN_PREFIXES: [&str; 7] = ["content-", "x-forwarded-", "x-real-", "x-user-", "proxy-", "sec-", "if-"];
    let has_prefix = |prefix: &&str| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    KnownField::of(name.as_bytes()).is_none()
        && !FORBIDDEN.iter().any(|other| name.eq_ignore_ascii_case(other))
        && !FORBIDDEN_PREFIXES.iter().any(has_prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `input` in pieces of `piece` bytes; returns the body and the number of bytes left
    /// over.
    fn decode(input: &[u8], piece: usize) -> Result<(Vec<u8>, usize), &'static str> {
        let (mut decoder, mut body, mut buffered, mut fed) = (ChunkDecoder::new(), Vec::new(), Vec::new(), 0);
        loop {
            match decoder.step(&buffered)? {
                DecodeStep::Data { skip, data } => {
                    body.extend_from_slice(&buffered[skip..skip + data]);
                    buffered.drain(..skip + data);
                    decoder.data_consumed(data);
                }
                DecodeStep::End { skip } => return Ok((body, buffered.len() - skip + input.len() - fed)),
                DecodeStep::More { skip } => {
                    buffered.drain(..skip);
                    if fed == input.len() {
                        return Err("incomplete");
                    }
                    let end = (fed + piece).min(input.len());
                    buffered.extend_from_slice(&input[fed..end]);
                    fed = end;
                }
            }
        }
    }

    #[test]
    fn malformed_bodies_are_refused_at_every_split() {
        let bad: [&[u8]; 37] = [
            b"\r\n",
            b"g\r\n",
            b" 1\r\na\r\n",
            b"1 \r\na\r\n",
            b"+1\r\na\r\n",
            b"0x1\r\na\r\n",
            b"1\na\r\n",
            b"1\r\nab\r\n",
            b"1\r\na\n",
            b"1\r\na\rX",
            b"1;a=\"b\r\na\r\n",
            b"1;a=\"\r\n\"\r\na\r\n",
            b"1;a=\"\\\r\n\"\r\na\r\n",
            b"1;a=\"b\nc\"\r\na\r\n",
            b"1;a=\"\0\"\r\na\r\n",
            b"1;a=\"b\"c\r\na\r\n",
            b"1;a=b\"c\"\r\na\r\n",
            b"1;\"a\"\r\na\r\n",
            b"1;a \r\na\r\n",
            b"1;a=b \r\na\r\n",
            b"1;a=\"b\" \r\na\r\n",
            b"1 a\r\na\r\n",
            b"1 ;\r\na\r\n",
            b"1; \r\na\r\n",
            b"1;a b\r\na\r\n",
            b"1;a= \r\na\r\n",
            b"1;\r\na\r\n",
            b"1;=b\r\na\r\n",
            b"1;;a\r\na\r\n",
            b"1;a=\r\na\r\n",
            b"1;a=b=c\r\na\r\n",
            b"1;\0\r\na\r\n",
            b"ffffffffffffff\r\n",
            b"0\r\nbad line\r\n\r\n",
            b"0\r\n: x\r\n\r\n",
            b"0\r\nA : x\r\n\r\n",
            b"0\r\nA: x\n\n",
        ];
        for input in bad {
            for piece in [1, 2, 64] {
                let error = decode(input, piece).expect_err("must be refused");
                assert_ne!(error, "incomplete", "{:?}", String::from_utf8_lossy(input));
            }
        }
        for extension in ["x".repeat(257), format!("x=\"{}\"", "y".repeat(254)), format!("{}x", " ".repeat(256))] {
            assert!(decode(format!("1;{extension}\r\na\r\n0\r\n\r\n").as_bytes(), 64).is_err());
        }
    }

    #[test]
    fn extensions_are_ignored_at_every_split() {
        let long = format!(";x=\"{}\"", "y".repeat(252));
        let extensions = [
            ";a",
            ";a=b",
            ";a;b=c;d",
            ";a=\"b\"",
            ";a=\"\"",
            ";a=\"b;c=d\\\"e\\\\\tf\u{e4}\"",
            " ;a",
            "\t; \ta \t= \tb",
            "; a = \"b\" ; c",
            &long,
        ];
        for extension in extensions {
            let input = format!("1{extension}\r\na\r\n0{extension}\r\n\r\n");
            for piece in [1, 2, 3, 64, 1_024] {
                assert_eq!(decode(input.as_bytes(), piece), Ok((b"a".to_vec(), 0)), "{extension:?} by {piece}");
            }
        }
    }

    #[test]
    fn trailers_that_recipients_act_on_are_dropped() {
        let section =
            b"X-Sum: 1\r\nContent-Length: 3\r\nHOST: b\r\nx-user-id: eve\r\nContent-MD5: x\r\nX-Sum: 2\r\n\r\n";
        let trailers = parse_trailers(section).expect("well-formed").expect("some are left");
        assert_eq!(trailers.iter().map(|field| field.value).collect::<Vec<_>>(), [b"1", b"2"]);
        assert!(parse_trailers(b"Host: b\r\n\r\n").expect("well-formed").is_none());
    }

    #[test]
    fn bytes_after_the_body_are_left() {
        let input = b"3\r\nabc\r\n0a;ext=1\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\nGET /";
        for piece in 1..input.len() {
            assert_eq!(decode(input, piece), Ok((b"abc0123456789".to_vec(), 5)), "pieces of {piece}");
        }
    }
}
