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
use super::upstream::UpstreamConnection;
use crate::http::buffer::ReadBuffer;
use crate::http::deadline::ResettableDeadline;
use crate::http::transport::TransportStream;

/// One direction of the relay.
struct RelayDirection<'a> {
    from: &'a TransportStream,
    /// Bytes read from `from` and not yet written to `to`.
    buffer: &'a mut ReadBuffer,
    to: &'a TransportStream,
    bytes: u64,
    has_ended: bool,
    is_shut: bool,
}

impl<'a> RelayDirection<'a> {
    fn new(from: &'a TransportStream, buffer: &'a mut ReadBuffer, to: &'a TransportStream) -> Self {
        RelayDirection { from, buffer, to, bytes: 0, has_ended: false, is_shut: false }
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
            ready!(self.to.poll_flush(cx))?;
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
}

/// Relays between a client and an upstream that has switched protocols. Returns the bytes sent to
/// the client. Ends after `idle_timeout` without a byte. Not cancel safe: neither connection can be
/// used afterwards.
pub(crate) async fn relay(
    downstream: &mut DownstreamConnection,
    upstream_connection: &mut UpstreamConnection,
    idle_timeout: Duration,
) -> u64 {
    let mut deadline = ResettableDeadline::after(idle_timeout);
    let (client, from_client) = downstream.stream_and_buffer();
    let (upstream, from_upstream) = upstream_connection.stream_and_buffer();
    let mut up = RelayDirection::new(client, from_client, upstream);
    let mut down = RelayDirection::new(upstream, from_upstream, client);
    poll_fn(|cx| {
        let before = up.bytes + down.bytes;
        let results = [up.poll(cx), down.poll(cx)];
        if up.bytes + down.bytes > before {
            deadline.restart(idle_timeout);
        }
        let has_failed = results.iter().any(|result| matches!(result, Poll::Ready(Err(_))));
        if has_failed || results.iter().all(Poll::is_ready) { Poll::Ready(()) } else { deadline.poll(cx) }
    })
    .await;
    down.bytes
}
