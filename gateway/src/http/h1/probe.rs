//! A door for tests and fuzzers: the engine's parsers over bytes that arrive in pieces, without a connection.
//!
//! Nothing here decides anything: it feeds `scan`, `request`, `response` and `chunk` as a connection would, and the gateway
//! itself never comes through here.

use http::Method;

use super::chunk::{Decoder, Step};
use super::request::{self, Refusal};
use super::response;
use super::scan::{Found, Scan};
use crate::http::fields::Fields;
use crate::http::limits::Limits;
use crate::http::message::{Request, Response};

/// What a request's head says beside the `Request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// Bytes it took, an empty line before it included.
    pub length: usize,
    pub keep_alive: bool,
    pub expects_continue: bool,
}

/// Reads a request's head from the front of `bytes`, `piece` at a time; `None` where they end before it does.
pub fn request_head(
    bytes: &[u8],
    piece: usize,
    limits: &Limits,
    request: &mut Request,
) -> Option<Result<RequestHead, Refusal>> {
    let skip = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let bytes = &bytes[skip..];
    let mut scan = Scan::default();
    let found = |length: usize, request: &Request| RequestHead {
        length: skip + length,
        keep_alive: request.wishes.keep_alive,
        expects_continue: request.wishes.expects_continue,
    };
    for end in ends(bytes.len(), piece) {
        if let Some(parsed) = request::parse_repeated(&bytes[..end], limits, request) {
            return Some(parsed.map(|length| found(length, request)));
        }
        match scan.advance(&bytes[..end]) {
            Found::BareLf => return Some(Err(Refusal::BareLf)),
            Found::Whole(length) if length > limits.header_bytes => return Some(Err(Refusal::HeadTooLarge)),
            Found::Whole(length) => {
                let parsed = request::parse(&bytes[..length], limits, request);
                return Some(parsed.map(|()| found(length, request)));
            }
            Found::Partial { .. } if end >= limits.header_bytes => return Some(Err(Refusal::HeadTooLarge)),
            Found::Partial { .. } => {}
        }
    }
    None
}

/// Reads an answer's head likewise: its length, and whether its connection may serve another request.
pub fn answer_head(
    bytes: &[u8],
    piece: usize,
    method: &Method,
    response: &mut Response,
) -> Option<Result<(usize, bool), &'static str>> {
    let mut scan = Scan::default();
    for end in ends(bytes.len(), piece) {
        match scan.advance(&bytes[..end]) {
            Found::BareLf => return Some(Err("bare line feed")),
            Found::Whole(length) => {
                return Some(response::parse(&bytes[..length], method, response).map(|reusable| (length, reusable)));
            }
            Found::Partial { .. } => {}
        }
    }
    None
}

/// Decodes a chunked body likewise, appending its data to `body` and the trailers worth keeping to `trailers`; how many
/// bytes it took.
pub fn chunked(
    bytes: &[u8],
    piece: usize,
    body: &mut Vec<u8>,
    trailers: &mut Fields,
) -> Option<Result<usize, &'static str>> {
    let mut decoder = Decoder::new();
    let mut at = 0;
    for end in ends(bytes.len(), piece) {
        loop {
            match decoder.step(&bytes[at..end]) {
                Err(reason) => return Some(Err(reason)),
                Ok(Step::End { skip }) => {
                    if let Some(kept) = decoder.take_trailers() {
                        trailers.copy_from(&kept);
                    }
                    return Some(Ok(at + skip));
                }
                Ok(Step::More { skip }) => {
                    at += skip;
                    break;
                }
                Ok(Step::Data { skip, data }) => {
                    body.extend_from_slice(&bytes[at + skip..at + skip + data]);
                    decoder.taken(data);
                    at += skip + data;
                }
            }
        }
    }
    None
}

/// Where pieces of `piece` bytes end.
fn ends(length: usize, piece: usize) -> impl Iterator<Item = usize> {
    let piece = piece.max(1);
    (1..=length.div_ceil(piece)).map(move |count| (count * piece).min(length))
}
