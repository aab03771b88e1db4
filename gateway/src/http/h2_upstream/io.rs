//! The byte stream of a connection, as the crate `h2` reads and writes it.
//!
//! Counts what was written and remembers when bytes arrived, so that an exchange knows whether any
//! byte of its request can have left, and the connection whether its peer is alive.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::http::transport::TransportStream;

/// The byte stream and the facts about its transfers.
pub(super) struct IoState {
    pub(super) stream: TransportStream,
    /// Bytes given to the system.
    pub(super) written: Cell<u64>,
    /// Whether the last write was not accepted.
    pub(super) is_write_blocked: Cell<bool>,
    /// When bytes arrived last.
    pub(super) read_at: Cell<Instant>,
}

impl IoState {
    pub(super) fn new(stream: TransportStream) -> Self {
        IoState {
            stream,
            written: Cell::new(0),
            is_write_blocked: Cell::new(false),
            read_at: Cell::new(Instant::now()),
        }
    }

    fn note_written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.is_write_blocked.set(written.is_pending());
        let count = ready!(written)?;
        self.written.set(self.written.get() + count as u64);
        Poll::Ready(Ok(count))
    }
}

/// The reader and writer that the crate `h2` gets.
pub(super) struct SharedIo(pub(super) Rc<IoState>);

impl AsyncRead for SharedIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = ready!(self.0.stream.poll_read(cx, buffer.initialize_unfilled()))?;
        buffer.advance(count);
        self.0.read_at.set(Instant::now());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SharedIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.note_written(self.0.stream.poll_write(cx, bytes, &[]))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.note_written(self.0.stream.poll_write_slices(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.stream.poll_shutdown(cx)
    }
}
