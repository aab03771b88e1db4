//! Entry points for tests and fuzzers: the engine's parsers, fed with bytes in pieces and without a
//! connection.
//!
//! This file has no logic of its own: it drives `scan`, `request`, `response` and `chunk` as a
//! connection does. The gateway itself does not use it.

use http::Method;

use super::chunk::{ChunkDecoder, DecodeStep};
use super::request;
use super::response;
use super::scan::{HeadScanner, ScanResult};
use crate::http::fields::Fields;
use crate::http::limits::HttpLimits;
use crate::http::message::{Request, Response};
use crate::http::refusal::RequestRefusal;

/// Properties of a request head that are not part of `Request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParsedRequestHead {
    /// Bytes of the head, including an empty line before it.
    pub length: usize,
    pub keep_alive: bool,
    pub expects_continue: bool,
}

/// Parses a request head at the front of `bytes`, fed `piece` bytes at a time; `None` if it is
/// incomplete.
pub fn parse_request_head(
    bytes: &[u8],
    piece: usize,
    limits: &HttpLimits,
    request: &mut Request,
) -> Option<Result<ParsedRequestHead, RequestRefusal>> {
    let skip = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let bytes = &bytes[skip..];
    let mut scan = HeadScanner::default();
    let head = |length: usize, request: &Request| ParsedRequestHead {
        length: skip + length,
        keep_alive: request.connection.keep_alive,
        expects_continue: request.connection.expects_continue,
    };
    for end in piece_ends(bytes.len(), piece) {
        if let Some(parsed) = request::parse_repeated(&bytes[..end], limits, request) {
            return Some(parsed.map(|length| head(length, request)));
        }
        match scan.advance(&bytes[..end]) {
            ScanResult::BareLf => return Some(Err(RequestRefusal::BareLf)),
            ScanResult::Complete(length) if length > limits.header_bytes => {
                return Some(Err(RequestRefusal::HeadTooLarge));
            }
            ScanResult::Complete(length) => {
                let parsed = request::parse(&bytes[..length], limits, request);
                return Some(parsed.map(|()| head(length, request)));
            }
            ScanResult::Partial { .. } if end >= limits.header_bytes => return Some(Err(RequestRefusal::HeadTooLarge)),
            ScanResult::Partial { .. } => {}
        }
    }
    None
}

/// Parses a response head likewise. Returns its length and whether the connection can be reused.
pub fn parse_response_head(
    bytes: &[u8],
    piece: usize,
    method: &Method,
    response: &mut Response,
) -> Option<Result<(usize, bool), &'static str>> {
    let mut scan = HeadScanner::default();
    for end in piece_ends(bytes.len(), piece) {
        match scan.advance(&bytes[..end]) {
            ScanResult::BareLf => return Some(Err("bare line feed")),
            ScanResult::Complete(length) => {
                return Some(response::parse(&bytes[..length], method, response).map(|reusable| (length, reusable)));
            }
            ScanResult::Partial { .. } => {}
        }
    }
    None
}

/// Decodes a chunked body likewise. Appends its data to `body`, copies the allowed trailers to
/// `trailers`, and returns the number of bytes read.
pub fn decode_chunked(
    bytes: &[u8],
    piece: usize,
    body: &mut Vec<u8>,
    trailers: &mut Fields,
) -> Option<Result<usize, &'static str>> {
    let mut decoder = ChunkDecoder::new();
    let mut at = 0;
    for end in piece_ends(bytes.len(), piece) {
        loop {
            match decoder.step(&bytes[at..end]) {
                Err(reason) => return Some(Err(reason)),
                Ok(DecodeStep::End { skip }) => {
                    if let Some(allowed) = decoder.take_trailers() {
                        trailers.copy_from(&allowed);
                    }
                    return Some(Ok(at + skip));
                }
                Ok(DecodeStep::More { skip }) => {
                    at += skip;
                    break;
                }
                Ok(DecodeStep::Data { skip, data }) => {
                    body.extend_from_slice(&bytes[at + skip..at + skip + data]);
                    decoder.data_consumed(data);
                    at += skip + data;
                }
            }
        }
    }
    None
}

/// The end offsets of pieces of `piece` bytes.
fn piece_ends(length: usize, piece: usize) -> impl Iterator<Item = usize> {
    let piece = piece.max(1);
    (1..=length.div_ceil(piece)).map(move |count| (count * piece).min(length))
}
