//! Writes one message with as few writes as possible: a head prepared in a buffer, then a body from
//! a `BodySource`.
//!
//! Head and first piece of the body are sent in one write. Invariant: a body of known length is
//! never exceeded, and one that ends early is an error, so the peer never takes a truncated message
//! for a complete one.

use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::{self, ReadSize};
use crate::http::exchange_clock::ExchangeTimeout;
use crate::http::fields::Fields;
use crate::http::framing::FRAMING_FIELDS;
use crate::http::message::{BodyLength, Response, StatusCode};
use crate::http::text;
use crate::http::transport::TransportStream;

/// Framing of an outgoing body: raw with the bytes `left` (`None` until the connection closes), or
/// chunked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyFraming {
    Raw { left: Option<u64> },
    Chunked,
}

/// The state of one outgoing message.
pub(super) struct MessageWriter {
    out: Vec<u8>,
    sent: usize,
    framing: BodyFraming,
    /// Bytes of the current piece of the source that are framed and not yet written.
    piece: usize,
    ended: bool,
    /// Whether the head is to be written before the source is polled.
    is_head_first: bool,
    /// The error of the source, kept until the bytes before it are written.
    source_error: Option<BodyError>,
    /// Whether bytes were written since `take_progress` was called or the message was started.
    progressed: bool,
    /// Whether written bytes wait in the TLS buffer because the socket does not accept them.
    is_flush_pending: bool,
    /// Body bytes written or prepared, without framing.
    body_sent: u64,
}

/// Head and body up to this total size are copied into one buffer: a plain write costs less than a
/// gathering write.
const COPY_MAX: usize = 4 << 10;
/// The first space of a head beside many others.
const HEAD_LEAST: usize = 1 << 10;

impl MessageWriter {
    pub(super) fn new() -> Self {
        MessageWriter {
            out: Vec::new(),
            sent: 0,
            framing: BodyFraming::Raw { left: Some(0) },
            piece: 0,
            ended: true,
            is_head_first: false,
            source_error: None,
            progressed: false,
            is_flush_pending: false,
            body_sent: 0,
        }
    }

    /// The buffer into which the head of the next message is written.
    pub(super) fn head_buffer(&mut self) -> &mut Vec<u8> {
        if self.out.capacity() == 0 {
            buffer::take_write_buffer(&mut self.out);
        }
        &mut self.out
    }

    /// As `head_buffer`, with as little space as possible unless the message is of
    /// `ReadSize::Normal`.
    pub(super) fn head_buffer_of(&mut self, size: ReadSize) -> &mut Vec<u8> {
        if size != ReadSize::Normal && self.out.capacity() == 0 {
            self.out.reserve_exact(HEAD_LEAST);
        }
        self.head_buffer()
    }

    /// Starts a message whose head was just written; `length` determines the framing of its body.
    pub(super) fn begin(&mut self, length: BodyLength) {
        self.framing = match length {
            BodyLength::Empty => BodyFraming::Raw { left: Some(0) },
            BodyLength::Known(length) => BodyFraming::Raw { left: Some(length) },
            BodyLength::Streamed => BodyFraming::Chunked,
            BodyLength::UntilClose => BodyFraming::Raw { left: None },
        };
        self.piece = 0;
        self.body_sent = 0;
        self.source_error = None;
        self.is_head_first = false;
        self.progressed = false;
        self.is_flush_pending = false;
        self.ended = self.framing == BodyFraming::Raw { left: Some(0) };
    }

    /// Starts a message whose body of `body_bytes` is already in the head buffer.
    pub(super) fn begin_serialized(&mut self, body_bytes: u64) {
        self.begin(BodyLength::Empty);
        self.body_sent = body_bytes;
    }

    /// Appends a complete small body to its head.
    pub(super) fn append_complete_body(&mut self, source: &mut dyn BodySource) {
        if let BodyFraming::Raw { left: Some(left) } = self.framing
            && let Some(body) = source.complete_body()
            && body.len() as u64 == left
        {
            self.piece = body.len();
            self.copy_small_piece(source);
        }
    }

    /// Writes the head before the source is polled, if it has no bytes now: an error of the source
    /// then follows the head.
    pub(super) fn write_head_first(&mut self, source: &dyn BodySource) {
        self.is_head_first = !self.ended && source.data().is_empty();
    }

    pub(super) fn body_sent(&self) -> u64 {
        self.body_sent
    }

    /// Whether prepared bytes wait for the peer to accept them. False while only the source is
    /// pending.
    pub(super) fn is_blocked(&self) -> bool {
        self.sent < self.out.len() || self.piece > 0 || self.is_flush_pending
    }

    /// Whether the source has delivered its whole body, sent or not.
    pub(super) fn has_whole_body(&self) -> bool {
        self.ended || matches!(self.framing, BodyFraming::Raw { left: Some(left) } if left == self.piece as u64)
    }

    /// Returns the write buffer to the pool.
    pub(super) fn release(&mut self) {
        self.sent = 0;
        buffer::return_write_buffer(std::mem::take(&mut self.out));
    }

    /// Writes until the message is complete, or the source or the peer is pending.
    /// Cancel safe.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        io: &TransportStream,
        source: &mut dyn BodySource,
    ) -> Poll<Result<(), SendError>> {
        while self.is_fully_prepared() {
            self.sent += ready!(io.poll_write(cx, &self.out[self.sent..], &[])).map_err(SendError::Peer)?;
            self.progressed = true;
        }
        loop {
            let is_head_first = std::mem::take(&mut self.is_head_first);
            let wants_more = self.piece == 0 && !self.ended && self.source_error.is_none() && !is_head_first;
            let source_pending = wants_more && self.poll_piece(cx, source)?.is_pending();
            if self.copy_small_piece(source) && !self.ended {
                continue;
            }
            if self.sent == self.out.len() && self.piece == 0 {
                if let Some(error) = self.source_error.take() {
                    return Poll::Ready(Err(SendError::Source(error)));
                }
                if !self.ended {
                    ready!(self.poll_flush(cx, io))?;
                    return Poll::Pending;
                }
                self.release();
                return self.poll_flush(cx, io);
            }
            let data = &source.data()[..self.piece];
            let written = match self.piece_end() {
                b"" => io.poll_write(cx, &self.out[self.sent..], data),
                end => io.poll_write_slices(cx, &[&self.out[self.sent..], data, end].map(IoSlice::new)),
            };
            let written = ready!(written).map_err(SendError::Peer)?;
            self.progressed = true;
            self.record_written(written, source);
            if source_pending && self.sent == self.out.len() {
                ready!(self.poll_flush(cx, io))?;
                return Poll::Pending;
            }
        }
    }

    /// Writes what the socket accepts although it is not reported as writable. Call it after a
    /// `poll_send` that left the message blocked, and `poll_send` again if it returns true: bytes
    /// were accepted.
    pub(super) fn write_unready(&mut self, io: &TransportStream, source: &mut dyn BodySource) -> io::Result<bool> {
        let data = if self.piece == 0 { &[] } else { &source.data()[..self.piece] };
        let Some(written) = io.write_unready(&self.out[self.sent..], data)? else { return Ok(false) };
        self.progressed = true;
        self.record_written(written, source);
        Ok(true)
    }

    /// The bytes that follow the current piece at once: clients read a chunk with its end before
    /// they deliver it.
    fn piece_end(&self) -> &'static [u8] {
        if self.framing == BodyFraming::Chunked && self.piece > 0 { b"\r\n" } else { b"" }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>, io: &TransportStream) -> Poll<Result<(), SendError>> {
        let flushed = io.poll_flush(cx);
        self.is_flush_pending = flushed.is_pending();
        flushed.map_err(SendError::Peer)
    }

    /// Returns whether bytes were written since the last call, and resets it.
    pub(super) fn take_progress(&mut self) -> bool {
        std::mem::take(&mut self.progressed)
    }

    /// Whether only prepared bytes remain to be written.
    fn is_fully_prepared(&self) -> bool {
        self.ended && self.piece == 0 && self.source_error.is_none() && self.sent < self.out.len()
    }

    /// Writes and flushes the prepared bytes.
    pub(super) fn poll_write_prepared(
        &mut self,
        cx: &mut Context<'_>,
        io: &TransportStream,
    ) -> Poll<Result<(), SendError>> {
        while self.sent < self.out.len() {
            self.sent += ready!(io.poll_write(cx, &self.out[self.sent..], &[])).map_err(SendError::Peer)?;
        }
        self.out.clear();
        self.sent = 0;
        io.poll_flush(cx).map_err(SendError::Peer)
    }

    /// Requests the next piece of the source. An error before any body byte is returned at once,
    /// without the head. A later error is returned after the bytes before it are written.
    fn poll_piece(&mut self, cx: &mut Context<'_>, source: &mut dyn BodySource) -> Result<Poll<()>, SendError> {
        match self.next_piece(cx, source) {
            Err(SendError::Source(error)) if self.body_sent > 0 => {
                self.source_error = Some(error);
                Ok(Poll::Ready(()))
            }
            result => result,
        }
    }

    /// Requests the next piece of the source and frames it.
    fn next_piece(&mut self, cx: &mut Context<'_>, source: &mut dyn BodySource) -> Result<Poll<()>, SendError> {
        if source.poll_fill(cx).map_err(SendError::Source)?.is_pending() {
            return Ok(Poll::Pending);
        }
        let available = source.data().len();
        match &mut self.framing {
            BodyFraming::Raw { left: Some(left) } => {
                if available == 0 {
                    return Err(SendError::Source(BodyError::Truncated));
                }
                self.piece = usize::try_from(*left).unwrap_or(usize::MAX).min(available);
            }
            BodyFraming::Raw { left: None } => {
                self.piece = available;
                self.ended = available == 0;
            }
            BodyFraming::Chunked => {
                if available == 0 {
                    self.out.extend_from_slice(b"0\r\n");
                    source.trailers().into_iter().for_each(|trailers| push_fields(&mut self.out, trailers));
                    self.out.extend_from_slice(b"\r\n");
                    self.ended = true;
                } else {
                    text::push_chunk_size(&mut self.out, available);
                    self.out.extend_from_slice(b"\r\n");
                    self.piece = available;
                }
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Copies a small piece behind unsent prepared bytes; returns whether it did.
    fn copy_small_piece(&mut self, source: &mut dyn BodySource) -> bool {
        let end = self.piece_end();
        let fits = self.piece > 0 && !self.out.is_empty() && self.out.len() + self.piece + end.len() <= COPY_MAX;
        if fits {
            self.out.extend_from_slice(&source.data()[..self.piece]);
            self.out.extend_from_slice(end);
            self.consume_piece(self.piece, source);
        }
        fits
    }

    fn record_written(&mut self, written: usize, source: &mut dyn BodySource) {
        let from_out = written.min(self.out.len() - self.sent);
        self.sent += from_out;
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        if written > from_out {
            let (end, after_out) = (self.piece_end(), written - from_out);
            let (from_piece, from_end) = (after_out.min(self.piece), after_out.saturating_sub(self.piece));
            self.consume_piece(from_piece, source);
            if self.piece == 0 {
                self.out.extend_from_slice(&end[from_end..]);
            }
        }
    }

    fn consume_piece(&mut self, count: usize, source: &mut dyn BodySource) {
        source.consume(count);
        self.piece -= count;
        self.body_sent += count as u64;
        if let BodyFraming::Raw { left: Some(left) } = &mut self.framing {
            *left -= count as u64;
            self.ended = *left == 0;
        }
    }
}

/// Which side failed while a message was written.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The connection to the peer that receives the message.
    Peer(io::Error),
    /// The peer accepted no byte in time, or too few.
    Timeout(ExchangeTimeout),
    /// The source of the body.
    Source(BodyError),
}

impl From<BodyError> for SendError {
    fn from(error: BodyError) -> Self {
        SendError::Source(error)
    }
}

/// Writes the status line and fields of a response.
pub(super) fn push_status_and_fields(out: &mut Vec<u8>, response: &Response) {
    match response.status {
        // The most frequent statuses are constants.
        StatusCode::OK => out.extend_from_slice(b"HTTP/1.1 200 OK\r\n"),
        StatusCode::NOT_MODIFIED => out.extend_from_slice(b"HTTP/1.1 304 Not Modified\r\n"),
        StatusCode::TOO_MANY_REQUESTS => out.extend_from_slice(b"HTTP/1.1 429 Too Many Requests\r\n"),
        status => {
            out.extend_from_slice(b"HTTP/1.1 ");
            out.extend_from_slice(status.as_str().as_bytes());
            out.push(b' ');
            out.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
    push_fields(out, &response.fields);
}

/// Writes all field lines except the framing fields, which are always written from `BodyLength`.
pub(super) fn push_fields(out: &mut Vec<u8>, fields: &Fields) {
    fields.write_lines(out, FRAMING_FIELDS);
}

pub(super) fn push_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

pub(super) fn push_length(out: &mut Vec<u8>, length: BodyLength) {
    match length {
        BodyLength::Empty | BodyLength::UntilClose => {}
        BodyLength::Known(length) => {
            out.extend_from_slice(b"Content-Length: ");
            text::push_number(out, length);
            out.extend_from_slice(b"\r\n");
        }
        BodyLength::Streamed => push_line(out, b"Transfer-Encoding", b"chunked"),
    }
}
