//! The stream between `h2` and the socket: gathers the frames of all streams that are ready, so
//! that one write sends them.
//!
//! `h2` flushes after every few frames. Here its flush does nothing: the loop that owns the
//! connection sends the gathered bytes once no stream has more work (`poll_send`). Invariant: at
//! most `GATHERED_MAX` bytes are gathered; when they do not fit, they are written at once.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::frame_scan::{FrameAbuse, FrameScanner};
use crate::http::deadline::ResettableDeadline;
use crate::http::transport::TransportStream;
use crate::http::write_timer::WriteTimer;

/// Gathered bytes of a connection: about what a socket accepts at once, and four TLS records.
const GATHERED_MAX: usize = 64 << 10;
/// Space that a connection without gathered bytes keeps.
const KEPT_MAX: usize = 16 << 10;
/// Bytes that are discarded while a connection closes.
const DISCARDED_MAX: usize = 1 << 20;
/// How long a connection that the gateway closes is read: a reset by the system would destroy the
/// last frames on their way.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// One connection, shared by `h2` (as `GatheredStream`) and the loop that owns both.
pub(crate) struct GatheredTransport {
    io: TransportStream,
    state: RefCell<GatherState>,
}

struct GatherState {
    /// Gathered bytes; those before `sent` are sent.
    out: Vec<u8>,
    sent: usize,
    /// Whether `h2` waits for room.
    is_refused: bool,
    is_shut: bool,
    scanner: FrameScanner,
    /// When bytes were received last.
    read_at: Instant,
    write_timer: WriteTimer,
}

impl GatheredTransport {
    /// `write_timeout`: how long the client may accept no byte.
    pub(crate) fn new(io: TransportStream, write_timeout: Duration) -> Rc<Self> {
        let state = GatherState {
            out: Vec::new(),
            sent: 0,
            is_refused: false,
            is_shut: false,
            scanner: FrameScanner::new(),
            read_at: Instant::now(),
            write_timer: WriteTimer::new(write_timeout),
        };
        Rc::new(GatheredTransport { io, state: RefCell::new(state) })
    }

    /// The frames that the client sent too many of, if it did. Nothing is read from then on.
    pub(crate) fn abuse(&self) -> Option<FrameAbuse> {
        self.state.borrow().scanner.abuse()
    }

    /// Whether a head is received in part.
    pub(crate) fn is_in_head_block(&self) -> bool {
        self.state.borrow().scanner.is_in_head_block()
    }

    /// When bytes were received last.
    pub(crate) fn read_at(&self) -> Instant {
        self.state.borrow().read_at
    }

    /// One DATA frame is handed over.
    pub(crate) fn record_data_frame(&self) {
        self.state.borrow_mut().scanner.record_data_frame();
    }

    /// A response was handed over to its end.
    pub(crate) fn record_response(&self) {
        self.state.borrow_mut().scanner.record_response();
    }

    /// Whether `h2` found no room since the last call: it must be polled again after a send.
    pub(crate) fn take_refused(&self) -> bool {
        std::mem::take(&mut self.state.borrow_mut().is_refused)
    }

    /// Sends the gathered bytes. An error ends the connection: also `TimedOut`, when the client has
    /// accepted no byte in time.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        loop {
            let sent = state.poll_write_gathered(&self.io, cx)?;
            if sent.is_ready() && self.io.poll_flush(cx)?.is_ready() {
                state.write_timer.restart();
                return Poll::Ready(Ok(()));
            }
            // The system reports space late: a slow reader would seem to have stopped.
            ready!(state.write_timer.poll_check(cx));
            match self.io.write_unready(&state.out[state.sent..], &[])? {
                Some(count) => {
                    state.write_timer.record_accepted();
                    state.record_sent(count);
                }
                None if state.write_timer.record_blocked() => {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                None => {}
            }
        }
    }

    /// Reads and discards what the client still sends, for a bounded time, after the sending side
    /// was shut down.
    pub(crate) async fn linger(&self) {
        let mut deadline = ResettableDeadline::after(CLOSE_TIMEOUT);
        let (mut discarded, mut space) = (0, vec![0; 4 << 10]);
        std::future::poll_fn(|cx| {
            if deadline.poll(cx).is_ready() || self.poll_end(cx).is_err() {
                return Poll::Ready(());
            }
            while let Poll::Ready(read) = self.io.poll_read(cx, &mut space) {
                match read {
                    Ok(count) if count > 0 && discarded < DISCARDED_MAX => discarded += count,
                    // The end, an error, or too much.
                    _ => return Poll::Ready(()),
                }
            }
            Poll::Pending
        })
        .await;
    }

    /// Sends what is gathered and shuts down the sending side, as far as it is possible now.
    fn poll_end(&self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.poll_send(cx)?.is_ready() {
            let _pending_is_retried = self.io.poll_shutdown_once(cx, &mut self.state.borrow_mut().is_shut)?;
        }
        Ok(())
    }
}

impl GatherState {
    fn poll_write_gathered(&mut self, io: &TransportStream, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        while self.sent < self.out.len() {
            match io.poll_write(cx, &self.out[self.sent..], &[])? {
                Poll::Ready(count) => {
                    self.write_timer.restart();
                    self.record_sent(count);
                }
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
        Ok(Poll::Ready(()))
    }

    fn record_sent(&mut self, count: usize) {
        self.scanner.record_sent(count);
        self.sent += count;
        if self.sent >= self.out.len() {
            self.sent = 0;
            self.out.clear();
            self.out.shrink_to(KEPT_MAX);
        }
    }
}

/// The side of a `GatheredTransport` that `h2` reads and writes.
pub(crate) struct GatheredStream(pub(crate) Rc<GatheredTransport>);

impl AsyncRead for GatheredStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.0.abuse().is_some() {
            // The loop ends the connection.
            return Poll::Pending;
        }
        let count = ready!(self.0.io.poll_read(cx, buf.initialize_unfilled()))?;
        let state = &mut *self.0.state.borrow_mut();
        let filled = buf.filled().len();
        state.scanner.scan(&buf.initialized()[filled..filled + count]);
        state.read_at = Instant::now();
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for GatheredStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let state = &mut *self.0.state.borrow_mut();
        if state.out.len() >= GATHERED_MAX && state.poll_write_gathered(&self.0.io, cx)?.is_pending() {
            state.is_refused = true;
            return Poll::Pending;
        }
        let mut room = GATHERED_MAX - state.out.len();
        let before = room;
        for slice in slices {
            let taken = room.min(slice.len());
            state.out.extend_from_slice(&slice[..taken]);
            room -= taken;
        }
        Poll::Ready(Ok(before - room))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_send(cx))?;
        self.0.io.poll_shutdown_once(cx, &mut self.0.state.borrow_mut().is_shut)
    }
}
