//! Tunnel after a 101 response: relays bytes in both directions until both sides have ended, one
//! fails, or no byte is transferred for the idle timeout.
//!
//! The bytes are not inspected. Bytes that arrived before the switch was complete are relayed
//! first.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::downstream::DownstreamConnection;
use super::upstream::Http1UpstreamConnection;
use crate::http::buffer::ReadBuffer;
use crate::http::deadline::ResettableDeadline;
use crate::http::transport::TransportStream;
use crate::http::write_timer::WriteTimer;

/// One direction of the relay.
struct RelayDirection<'a> {
    from: &'a TransportStream,
    /// Bytes read from `from` and not yet written to `to`.
    buffer: &'a mut ReadBuffer,
    to: &'a TransportStream,
    bytes: u64,
    /// Whether written bytes wait in the TLS buffer of `to`.
    is_flush_pending: bool,
    has_ended: bool,
    is_shut: bool,
}

impl<'a> RelayDirection<'a> {
    fn new(from: &'a TransportStream, buffer: &'a mut ReadBuffer, to: &'a TransportStream) -> Self {
        RelayDirection { from, buffer, to, bytes: 0, is_flush_pending: false, has_ended: false, is_shut: false }
    }

    /// Relays available bytes; ready when `from` has ended and `to` is shut down.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while !self.buffer.is_empty() {
                let count = ready!(self.to.poll_write(cx, self.buffer.data(), &[]))?;
                self.buffer.consume(count);
                self.bytes += count as u64;
            }
            self.buffer.release();
            let flushed = self.to.poll_flush(cx);
            self.is_flush_pending = flushed.is_pending();
            ready!(flushed)?;
            if self.has_ended {
                if !self.is_shut {
                    ready!(self.to.poll_shutdown(cx))?;
                    self.is_shut = true;
                }
                return Poll::Ready(Ok(()));
            }
            self.has_ended = ready!(self.buffer.poll_fill(self.from, cx, 1))? == 0;
        }
    }

    /// Whether bytes wait for `to` to accept them.
    fn is_blocked(&self) -> bool {
        !self.buffer.is_empty() || self.is_flush_pending
    }

    /// Writes what `to` accepts although it is not reported as writable. Returns whether it
    /// accepted a byte.
    fn write_unready(&mut self) -> io::Result<bool> {
        let Some(count) = self.to.write_unready(self.buffer.data(), &[])? else { return Ok(false) };
        self.buffer.consume(count);
        self.bytes += count as u64;
        Ok(true)
    }
}

/// The bytes that a tunnel has relayed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RelayedBytes {
    pub(crate) to_upstream: u64,
    pub(crate) to_client: u64,
}

/// Relays between a client and an upstream that has switched protocols. Ends after `idle_timeout`
/// without a byte, or when `poll_end` is ready. Not cancel safe: neither connection can be used
/// afterwards.
pub(crate) async fn relay(
    downstream: &mut DownstreamConnection,
    upstream_connection: &mut Http1UpstreamConnection,
    idle_timeout: Duration,
    mut poll_end: impl FnMut(&Context<'_>) -> Poll<()>,
) -> RelayedBytes {
    let mut deadline = ResettableDeadline::after(idle_timeout);
    // Runs instead while bytes wait: a silent tunnel is not woken for checks.
    let mut write_timer = WriteTimer::new(idle_timeout);
    let (client, from_client) = downstream.stream_and_buffer();
    let (upstream, from_upstream) = upstream_connection.stream_and_buffer();
    let mut up = RelayDirection::new(client, from_client, upstream);
    let mut down = RelayDirection::new(upstream, from_upstream, client);
    poll_fn(|cx| {
        loop {
            let before = up.bytes + down.bytes;
            let results = [up.poll(cx), down.poll(cx)];
            if up.bytes + down.bytes > before {
                deadline.restart(idle_timeout);
                write_timer.restart();
            }
            let has_failed = results.iter().any(|result| matches!(result, Poll::Ready(Err(_))));
            if has_failed || results.iter().all(Poll::is_ready) || poll_end(cx).is_ready() {
                return Poll::Ready(());
            }
            if !up.is_blocked() && !down.is_blocked() {
                return deadline.poll(cx);
            }
            ready!(write_timer.poll_check(cx));
            match [up.write_unready(), down.write_unready()] {
                [Err(_), _] | [_, Err(_)] => return Poll::Ready(()),
                [Ok(false), Ok(false)] if write_timer.record_blocked() => return Poll::Ready(()),
                [Ok(false), Ok(false)] => {}
                _ => {
                    deadline.restart(idle_timeout);
                    write_timer.record_accepted();
                }
            }
        }
    })
    .await;
    RelayedBytes { to_upstream: up.bytes, to_client: down.bytes }
}
