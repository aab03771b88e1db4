//! Writes one message: a head prepared in a buffer, then a body taken from a `Source`, in as few writes as possible.
//!
//! Head and first piece leave in one write. Invariant: a body of known length is never overrun, and one that ends
//! early is an error, so the peer never sees a short message as whole.

use std::task::{Context, Poll, ready};

use super::framing::FRAMING;
use crate::http::body::{BodyError, Source};
use crate::http::buffer;
use crate::http::fields::Fields;
use crate::http::io::Io;
use crate::http::message::{Length, Response, StatusCode};
use crate::http::text;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Raw { left: Option<u64> },
    Chunked,
}

/// The state of one outgoing message.
pub(super) struct Sender {
    out: Vec<u8>,
    sent: usize,
    framing: Framing,
    /// Bytes of the source's current piece that were announced and not yet written.
    piece: usize,
    in_chunk: bool,
    ended: bool,
    /// The source's failure, while what came before it is still to be written.
    failed: Option<BodyError>,
    /// Whether any byte of the message has left.
    has_left: bool,
    /// Bytes of the body written or about to be, framing aside.
    body_sent: u64,
}

/// Head and body up to this size in all are copied together: one plain write costs less than a gathering one.
const COPY: usize = 4 << 10;

impl Sender {
    pub(super) fn new() -> Self {
        Sender {
            out: Vec::new(),
            sent: 0,
            framing: Framing::Raw { left: Some(0) },
            piece: 0,
            in_chunk: false,
            ended: true,
            failed: None,
            has_left: false,
            body_sent: 0,
        }
    }

    /// The buffer for the head of the next message.
    pub(super) fn head(&mut self) -> &mut Vec<u8> {
        if self.out.capacity() == 0 {
            buffer::take_out(&mut self.out);
        }
        &mut self.out
    }

    /// Says how the body of the head just written is framed.
    pub(super) fn begin(&mut self, length: Length) {
        self.framing = match length {
            Length::Empty => Framing::Raw { left: Some(0) },
            Length::Known(length) => Framing::Raw { left: Some(length) },
            Length::Streamed => Framing::Chunked,
            Length::UntilClose => Framing::Raw { left: None },
        };
        self.piece = 0;
        self.in_chunk = false;
        self.body_sent = 0;
        self.failed = None;
        // Part of an interim head may have left: then what is left of it is no longer to be taken back.
        self.has_left = self.sent > 0;
        self.ended = self.framing == Framing::Raw { left: Some(0) };
    }

    /// Says that a body of so many bytes stands behind the head already.
    pub(super) fn begin_written(&mut self, body_bytes: u64) {
        self.begin(Length::Empty);
        self.body_sent = body_bytes;
    }

    /// Puts a body that is small and at hand behind its head at once.
    pub(super) fn begin_whole(&mut self, source: &mut dyn Source) {
        if let Framing::Raw { left: Some(left) } = self.framing
            && let Some(whole) = source.whole()
            && whole.len() as u64 == left
        {
            self.piece = whole.len();
            self.copies_piece(source);
        }
    }

    pub(super) fn body_sent(&self) -> u64 {
        self.body_sent
    }

    /// Whether the peer has yet to take something that is ready for it.
    pub(super) fn is_blocked(&self) -> bool {
        self.sent < self.out.len() || self.piece > 0
    }

    /// Gives the memory back until the next message.
    pub(super) fn release(&mut self) {
        self.sent = 0;
        buffer::give_out(std::mem::take(&mut self.out));
    }

    /// Moves bytes until the message is written, or the source or the peer makes it wait.
    /// `progress` is set when anything was written. Cancel safe.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        io: &Io,
        source: &mut dyn Source,
        progress: &mut bool,
    ) -> Poll<Result<(), SendError>> {
        while self.is_all_prepared() {
            self.sent += ready!(io.poll_write(cx, &self.out[self.sent..], &[])).map_err(SendError::Peer)?;
            *progress = true;
            self.has_left = true;
        }
        loop {
            let wants_more = self.piece == 0 && !self.ended && self.failed.is_none();
            let starved = wants_more && self.poll_piece(cx, source)?.is_pending();
            if self.copies_piece(source) && !self.ended {
                continue;
            }
            if self.sent == self.out.len() && self.piece == 0 {
                if let Some(error) = self.failed.take() {
                    return Poll::Ready(Err(SendError::Source(error)));
                }
                if !self.ended {
                    ready!(io.poll_flush(cx)).map_err(SendError::Peer)?;
                    return Poll::Pending;
                }
                self.release();
                return io.poll_flush(cx).map_err(SendError::Peer);
            }
            let data = &source.data()[..self.piece];
            let written = ready!(io.poll_write(cx, &self.out[self.sent..], data)).map_err(SendError::Peer)?;
            *progress = true;
            self.has_left = true;
            self.account(written, source);
            if starved && self.sent == self.out.len() {
                ready!(io.poll_flush(cx)).map_err(SendError::Peer)?;
                return Poll::Pending;
            }
        }
    }

    /// Whether nothing but what is prepared is left to be written.
    fn is_all_prepared(&self) -> bool {
        self.ended && self.piece == 0 && self.failed.is_none() && self.sent < self.out.len()
    }

    /// Writes what has been prepared so far, as far as the peer takes it.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>, io: &Io) -> Poll<Result<(), SendError>> {
        while self.sent < self.out.len() {
            self.sent += ready!(io.poll_write(cx, &self.out[self.sent..], &[])).map_err(SendError::Peer)?;
        }
        self.out.clear();
        self.sent = 0;
        io.poll_flush(cx).map_err(SendError::Peer)
    }

    /// Asks the source for its next piece. A failure is told at once where only the head waits, so that another answer may
    /// take its place; behind bytes of the body it is told when these are written.
    fn poll_piece(&mut self, cx: &mut Context<'_>, source: &mut dyn Source) -> Result<Poll<()>, SendError> {
        match self.next_piece(cx, source) {
            Err(SendError::Source(error)) if self.body_sent > 0 => {
                self.failed = Some(error);
                Ok(Poll::Ready(()))
            }
            result => result,
        }
    }

    /// Whether nothing of the message has left yet.
    pub(super) fn is_untouched(&self) -> bool {
        !self.has_left
    }

    /// Drops what was prepared.
    pub(super) fn discard(&mut self) {
        self.out.clear();
        self.sent = 0;
    }

    /// Asks the source for its next piece and frames it.
    fn next_piece(&mut self, cx: &mut Context<'_>, source: &mut dyn Source) -> Result<Poll<()>, SendError> {
        if source.poll_fill(cx).map_err(SendError::Source)?.is_pending() {
            return Ok(Poll::Pending);
        }
        let available = source.data().len();
        match &mut self.framing {
            Framing::Raw { left: Some(left) } => {
                if available == 0 {
                    return Err(SendError::Source(BodyError::Truncated));
                }
                self.piece = usize::try_from(*left).unwrap_or(usize::MAX).min(available);
            }
            Framing::Raw { left: None } => {
                self.piece = available;
                self.ended = available == 0;
            }
            Framing::Chunked => {
                if self.in_chunk {
                    self.out.extend_from_slice(b"\r\n");
                }
                if available == 0 {
                    self.out.extend_from_slice(b"0\r\n");
                    source.trailers().into_iter().for_each(|trailers| push_fields(&mut self.out, trailers));
                    self.out.extend_from_slice(b"\r\n");
                    self.ended = true;
                } else {
                    text::push_size(&mut self.out, available);
                    self.out.extend_from_slice(b"\r\n");
                    self.piece = available;
                    self.in_chunk = true;
                }
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Moves a small piece behind the head that still waits; says whether it did.
    fn copies_piece(&mut self, source: &mut dyn Source) -> bool {
        let fits = self.piece > 0 && !self.out.is_empty() && self.out.len() + self.piece <= COPY;
        if fits {
            self.out.extend_from_slice(&source.data()[..self.piece]);
            self.take_from_piece(self.piece, source);
        }
        fits
    }

    fn account(&mut self, written: usize, source: &mut dyn Source) {
        let of_out = written.min(self.out.len() - self.sent);
        self.sent += of_out;
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        if written > of_out {
            self.take_from_piece(written - of_out, source);
        }
    }

    fn take_from_piece(&mut self, count: usize, source: &mut dyn Source) {
        source.consume(count);
        self.piece -= count;
        self.body_sent += count as u64;
        if let Framing::Raw { left: Some(left) } = &mut self.framing {
            *left -= count as u64;
            self.ended = *left == 0;
        }
    }
}

/// Which side failed while a message was being written.
#[derive(Debug)]
pub enum SendError {
    /// The peer that is written to.
    Peer(std::io::Error),
    /// The body that is read from.
    Source(BodyError),
}

impl From<BodyError> for SendError {
    fn from(error: BodyError) -> Self {
        SendError::Source(error)
    }
}

/// Writes status line and fields of an answer.
pub(super) fn push_start(out: &mut Vec<u8>, response: &Response) {
    match response.status {
        // The most frequent ones are written at once.
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

/// Writes every field line but those of framing, which are written from `Length`, whatever the message holds.
pub(super) fn push_fields(out: &mut Vec<u8>, fields: &Fields) {
    fields.write_lines(out, FRAMING);
}

pub(super) fn push_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

pub(super) fn push_length(out: &mut Vec<u8>, length: Length) {
    match length {
        Length::Empty | Length::UntilClose => {}
        Length::Known(length) => {
            out.extend_from_slice(b"Content-Length: ");
            text::push_number(out, length);
            out.extend_from_slice(b"\r\n");
        }
        Length::Streamed => push_line(out, b"Transfer-Encoding", b"chunked"),
    }
}
