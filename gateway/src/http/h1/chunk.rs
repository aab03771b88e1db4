//! Strict decoder of the chunked coding (RFC 9112 section 7.1), fed piece by piece.
//!
//! Stricter than the grammar: no quoted extensions, extensions at most 256 bytes a chunk, no white space, no bare LF,
//! sizes at most 2^52, trailers at most 8 KiB. Extensions are checked and dropped, as a recipient may (section 7.1.1).
//! Trailers are checked like fields; those that anyone acts on before the end are dropped (RFC 9110 section 6.5.1), for a
//! next hop that merges them with the head would act on them.

use super::scan::{Found, Scan};
use crate::http::fields::{Fields, Known, is_token};

/// Bytes of extensions in one chunk's size line.
const EXTENSION_MAX: usize = 256;
/// Hexadecimal digits of a size: 2^52 bytes.
const DIGITS_MAX: usize = 13;
/// Bytes of a whole trailer section.
const TRAILERS_MAX: usize = 8 << 10;

#[derive(Debug)]
enum State {
    Size { size: u64, digits: usize },
    Extension { size: u64, length: usize, part: Part },
    SizeLf { size: u64 },
    Data { left: u64 },
    DataCr,
    DataLf,
    Trailers(Scan),
    Done,
}

/// Where in `;name=value` an extension stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    NameStart,
    Name,
    ValueStart,
    Value,
}

impl Part {
    /// The part after `byte`; `None` where the grammar has no such byte.
    fn next(self, byte: u8) -> Option<Part> {
        match (self, byte) {
            (Part::Name | Part::Value, b';') => Some(Part::NameStart),
            (Part::Name, b'=') => Some(Part::ValueStart),
            (Part::NameStart | Part::Name, _) if is_token(&[byte]) => Some(Part::Name),
            (Part::ValueStart | Part::Value, _) if is_token(&[byte]) => Some(Part::Value),
            _ => None,
        }
    }

    fn may_end(self) -> bool {
        matches!(self, Part::Name | Part::Value)
    }
}

#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
    trailers: Option<Box<Fields>>,
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
        Decoder { state: State::Size { size: 0, digits: 0 }, trailers: None }
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
                        self.trailers = parse_trailers(&input[at..at + length])?;
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

    /// The trailers of a body that has ended, once.
    pub(super) fn take_trailers(&mut self) -> Option<Box<Fields>> {
        self.trailers.take()
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
            (State::Size { size, .. }, b';') => State::Extension { size: *size, length: 0, part: Part::NameStart },
            (State::Size { size, .. }, b'\r') => State::SizeLf { size: *size },
            (State::Extension { size, part, .. }, b'\r') if part.may_end() => State::SizeLf { size: *size },
            (State::Extension { size, length, part }, _) => match part.next(byte) {
                Some(part) if *length < EXTENSION_MAX => State::Extension { size: *size, length: length + 1, part },
                _ => return Err("bad chunk extension"),
            },
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

/// What may go on of a trailer section.
fn parse_trailers(section: &[u8]) -> Result<Option<Box<Fields>>, &'static str> {
    if section.len() > TRAILERS_MAX {
        return Err("trailers too large");
    }
    let mut lines = [httparse::EMPTY_HEADER; 64];
    let Ok(httparse::Status::Complete((_, lines))) = httparse::parse_headers(section, &mut lines) else {
        return Err("bad trailers");
    };
    let mut trailers = Fields::default();
    for line in lines.iter().filter(|line| may_follow(line.name)) {
        trailers.push(line.name.as_bytes(), line.value.trim_ascii());
    }
    Ok((!trailers.is_empty()).then(|| Box::new(trailers)))
}

/// Whether a field may stand behind the body: not where the gateway knows the name, since it acts on it in heads, nor
/// where the name says that it frames, routes, authenticates, describes the content or speaks for the client.
fn may_follow(name: &str) -> bool {
    const NEVER: [&str; 2] = ["www-authenticate", "authentication-info"];
    const FAMILIES: [&str; 7] = ["content-", "x-forwarded-", "x-real-", "x-user-", "proxy-", "sec-", "if-"];
    let starts = |family: &&str| name.get(..family.len()).is_some_and(|start| start.eq_ignore_ascii_case(family));
    Known::of(name.as_bytes()).is_none()
        && !NEVER.iter().any(|never| name.eq_ignore_ascii_case(never))
        && !FAMILIES.iter().any(starts)
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
        let bad: [&[u8]; 23] = [
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
        assert!(decode(format!("1;{}\r\na\r\n", "x".repeat(257)).as_bytes(), 64).is_err());
    }

    #[test]
    fn trailers_that_anyone_acts_on_are_dropped() {
        let section =
            b"X-Sum: 1\r\nContent-Length: 3\r\nHOST: b\r\nx-user-id: eve\r\nContent-MD5: x\r\nX-Sum: 2\r\n\r\n";
        let trailers = parse_trailers(section).expect("well-formed").expect("some are left");
        assert_eq!(trailers.iter().map(|field| field.value).collect::<Vec<_>>(), [b"1", b"2"]);
        assert!(parse_trailers(b"Host: b\r\n\r\n").expect("well-formed").is_none());
    }

    #[test]
    fn good_bodies_leave_what_follows() {
        let input = b"3\r\nabc\r\n0a;ext=1\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\nGET /";
        for piece in 1..input.len() {
            assert_eq!(decode(input, piece), Ok((b"abc0123456789".to_vec(), 5)), "pieces of {piece}");
        }
    }
}
