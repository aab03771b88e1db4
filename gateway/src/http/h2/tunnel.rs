//! A stream that has become a tunnel (RFC 8441 section 5): DATA frames of the client are written to
//! the upstream's connection, and the bytes of the upstream are the body of the response.
//!
//! The bytes are not inspected. The end of a side is passed on: END_STREAM shuts down the
//! upstream's receiving side, and the end of the upstream becomes END_STREAM.

use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use super::request_body::UploadStream;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::{ReadBuffer, ReadSize};
use crate::http::h1::Http1UpstreamConnection;
use crate::http::transport::TransportStream;

/// The bytes from the upstream.
pub(crate) struct TunnelBody {
    io: Rc<TransportStream>,
    buffer: ReadBuffer,
    has_ended: bool,
}

/// The bytes from the client on their way to the upstream.
pub(crate) struct TunnelUpload {
    io: Rc<TransportStream>,
    /// `None`: the head has ended the client's side.
    upload: Option<Rc<UploadStream>>,
    /// Taken from the stream; those before `written` are written.
    taken: Vec<u8>,
    written: usize,
    /// Bytes that the upstream has accepted.
    bytes: u64,
    is_flush_pending: bool,
    has_ended: bool,
}

/// The two directions of a tunnel between a stream and an upstream that has switched protocols.
pub(crate) fn tunnel(
    connection: Http1UpstreamConnection,
    upload: Option<&Rc<UploadStream>>,
) -> (TunnelUpload, TunnelBody) {
    let (io, buffer) = connection.into_parts();
    let io = Rc::new(io);
    let up = TunnelUpload {
        io: Rc::clone(&io),
        upload: upload.cloned(),
        taken: Vec::new(),
        written: 0,
        bytes: 0,
        is_flush_pending: false,
        has_ended: false,
    };
    (up, TunnelBody { io, buffer, has_ended: false })
}

impl TunnelUpload {
    /// Bytes that the upstream has accepted.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether bytes wait for the upstream to accept them.
    pub(crate) fn is_blocked(&self) -> bool {
        self.written < self.taken.len() || self.is_flush_pending
    }

    /// Forwards what has arrived; ready when the client has ended its side and the upstream knows.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.has_ended {
            while let rest @ [_, ..] = &self.taken[self.written..] {
                let count = ready!(self.io.poll_write(cx, rest, &[]))?;
                self.record_written(count);
            }
            let flushed = self.io.poll_flush(cx);
            self.is_flush_pending = flushed.is_pending();
            ready!(flushed)?;
            self.taken.clear();
            self.written = 0;
            let is_open = match &self.upload {
                Some(upload) => ready!(upload.poll_take(cx, &mut self.taken))?,
                None => false,
            };
            if !is_open {
                ready!(self.io.poll_shutdown(cx))?;
                self.has_ended = true;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what the upstream accepts although its socket is not reported as writable. Returns
    /// whether it accepted a byte.
    pub(crate) fn write_unready(&mut self) -> io::Result<bool> {
        let Some(count) = self.io.write_unready(&self.taken[self.written..], &[])? else { return Ok(false) };
        self.record_written(count);
        Ok(true)
    }

    fn record_written(&mut self, count: usize) {
        self.written += count;
        self.bytes += count as u64;
        if let Some(upload) = &self.upload {
            upload.record_read(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }
}

impl BodySource for TunnelBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.buffer.is_empty() && !self.has_ended {
            self.has_ended = ready!(self.buffer.poll_fill(&self.io, cx, 1))? == 0;
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        self.buffer.data()
    }

    fn consume(&mut self, count: usize) {
        self.buffer.consume(count);
        self.buffer.release();
    }

    fn set_read_size(&mut self, size: ReadSize) {
        self.buffer.set_read_size(size);
    }
}
