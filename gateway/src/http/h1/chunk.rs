//! Strict decoder of the chunked coding (RFC 9112 section 7.1), fed piece by piece.
//!
//! Stricter than the grammar: no quoted extensions, extensions at most 256 bytes a chunk, no white space, no bare LF,
//! sizes at most 2^52, trailers at most 8 KiB. Extensions and trailers are checked and dropped: a recipient may discard
//! them (section 7.1.1 and RFC 9110 section 6.5.1), and what is dropped cannot be used against the next hop.

use super::scan::{Found, Scan};
use crate::http::fields::is_token;

/// Bytes of extensions in one chunk's size line.
const EXTENSION_MAX: usize = 256;
/// Hexadecimal digits of a size: 2^52 bytes.
const DIGITS_MAX: usize = 13;
/// Bytes of a whole trailer section.
const TRAILERS_MAX: usize = 8 << 10;

#[derive(Debug)]
enum State {
    Size { size: u64, digits: usize },
    Extension { size: u64, length: usize },
    SizeLf { size: u64 },
    Data { left: u64 },
    DataCr,
    DataLf,
    Trailers(Scan),
    Done,
}

#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
}

/// What the decoder made of the bytes it saw.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// `skip` bytes of framing, then `data` bytes of body.
    Data { skip: usize, data: usize },
    /// `skip` bytes of framing, then more bytes are needed.
    More { skip: usize },
    /// `skip` bytes of framing, and the body has ended.
    End { skip: usize },
}

impl Decoder {
    pub(super) fn new() -> Self {
        Decoder { state: State::Size { size: 0, digits: 0 } }
    }

    /// Reads framing from the front of `input` until body bytes, the end, or the input's end.
    /// The caller drops `skip` bytes, then takes what it wants of `data` and says so with `taken`.
    pub(super) fn step(&mut self, input: &[u8]) -> Result<Step, &'static str> {
        let mut at = 0;
        loop {
            if let State::Data { left } = self.state {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(input.len() - at);
                return Ok(if here == 0 { Step::More { skip: at } } else { Step::Data { skip: at, data: here } });
            }
            if let State::Trailers(scan) = &mut self.state {
                // The section is left in the caller's buffer until it is whole, so the scan goes on where it stopped.
                return match scan.advance(&input[at..]) {
                    Found::BareLf => Err("bad trailer line end"),
                    Found::Partial { .. } if input.len() - at > TRAILERS_MAX => Err("trailers too large"),
                    Found::Partial { .. } => Ok(Step::More { skip: at }),
                    Found::Whole(length) => {
                        check_trailers(&input[at..at + length])?;
                        self.state = State::Done;
                        Ok(Step::End { skip: at + length })
                    }
                };
            }
            if matches!(self.state, State::Done) {
                return Ok(Step::End { skip: at });
            }
            let Some(&byte) = input.get(at) else { return Ok(Step::More { skip: at }) };
            self.framing(byte)?;
            at += 1;
        }
    }

    /// Records that `count` body bytes were taken.
    pub(super) fn taken(&mut self, count: usize) {
        if let State::Data { left } = &mut self.state {
            *left -= count as u64;
            if *left == 0 {
                self.state = State::DataCr;
            }
        }
    }

    fn framing(&mut self, byte: u8) -> Result<(), &'static str> {
        self.state = match (&self.state, byte) {
            (State::Size { size, digits }, _) if byte.is_ascii_hexdigit() => {
                if *digits == DIGITS_MAX {
                    return Err("chunk size too large");
                }
                let digit = (byte as char).to_digit(16).map_or(0, u64::from);
                State::Size { size: size << 4 | digit, digits: digits + 1 }
            }
            (State::Size { digits: 0, .. }, _) => return Err("chunk without a size"),
            (State::Size { size, .. }, b';') => State::Extension { size: *size, length: 0 },
            (State::Size { size, .. } | State::Extension { size, .. }, b'\r') => State::SizeLf { size: *size },
            (State::Extension { size, length }, _) => {
                if *length == EXTENSION_MAX || !(is_token(&[byte]) || byte == b'=' || byte == b';') {
                    return Err("bad chunk extension");
                }
                State::Extension { size: *size, length: length + 1 }
            }
            (State::SizeLf { size: 0 }, b'\n') => State::Trailers(Scan::default()),
            (State::SizeLf { size }, b'\n') => State::Data { left: *size },
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size { size: 0, digits: 0 },
            (State::Size { .. }, _) => return Err("bad chunk size"),
            _ => return Err("bad chunk line end"),
        };
        Ok(())
    }
}

fn check_trailers(section: &[u8]) -> Result<(), &'static str> {
    if section.len() > TRAILERS_MAX {
        return Err("trailers too large");
    }
    let mut lines = [httparse::EMPTY_HEADER; 64];
    match httparse::parse_headers(section, &mut lines) {
        Ok(httparse::Status::Complete(_)) => Ok(()),
        _ => Err("bad trailers"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `input` arriving in pieces of `piece` bytes; returns the body and how many bytes were left over.
    fn decode(input: &[u8], piece: usize) -> Result<(Vec<u8>, usize), &'static str> {
        let (mut decoder, mut body, mut held, mut fed) = (Decoder::new(), Vec::new(), Vec::new(), 0);
        loop {
            match decoder.step(&held)? {
                Step::Data { skip, data } => {
                    body.extend_from_slice(&held[skip..skip + data]);
                    held.drain(..skip + data);
                    decoder.taken(data);
                }
                Step::End { skip } => return Ok((body, held.len() - skip + input.len() - fed)),
                Step::More { skip } => {
                    held.drain(..skip);
                    if fed == input.len() {
                        return Err("incomplete");
                    }
                    let end = (fed + piece).min(input.len());
                    held.extend_from_slice(&input[fed..end]);
                    fed = end;
                }
            }
        }
    }

    #[test]
    fn malformed_bodies_are_refused_however_they_are_split() {
        let bad: [&[u8]; 18] = [
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
            b"1;a=\"b\"\r\na\r\n",
            b"1; a\r\na\r\n",
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
        assert!(decode(format!("1;{}\r\na\r\n", "x".repeat(257)).as_bytes(), 64).is_err());
    }

    #[test]
    fn good_bodies_leave_what_follows() {
        let input = b"3\r\nabc\r\n0a;ext=1\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\nGET /";
        for piece in 1..input.len() {
            assert_eq!(decode(input, piece), Ok((b"abc0123456789".to_vec(), 5)), "pieces of {piece}");
        }
    }
}
