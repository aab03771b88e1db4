//! After 101: bytes go both ways as they come, until both sides have ended, one fails, or neither moves for too long.
//!
//! Nothing is looked at any more. What either side sent before the switch was complete is passed on first.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::client::Link;
use super::server::Server;
use crate::http::alarm::Alarm;
use crate::http::buffer::Buffer;
use crate::http::io::Io;

/// One direction.
#[derive(Default)]
struct Way {
    bytes: u64,
    has_ended: bool,
    is_shut: bool,
}

impl Way {
    /// Moves what there is; ready when `from` has ended and `to` knows it.
    fn poll(&mut self, cx: &mut Context<'_>, from: &Io, buffer: &mut Buffer, to: &Io) -> Poll<io::Result<()>> {
        loop {
            while !buffer.is_empty() {
                let count = ready!(to.poll_write(cx, buffer.data(), &[]))?;
                buffer.consume(count);
                self.bytes += count as u64;
            }
            buffer.release();
            ready!(to.poll_flush(cx))?;
            if self.has_ended {
                if !self.is_shut {
                    ready!(to.poll_shutdown(cx))?;
                    self.is_shut = true;
                }
                return Poll::Ready(Ok(()));
            }
            self.has_ended = ready!(buffer.poll_fill(from, cx, 1))? == 0;
        }
    }
}

/// Relays between a client and the upstream that has switched protocols; returns the bytes that went to the client.
/// Ends after `idle` without a byte. Not cancel safe: both connections are of no use afterwards.
pub async fn relay(server: &mut Server, link: &mut Link, idle: Duration) -> u64 {
    let (mut up, mut down) = (Way::default(), Way::default());
    let mut alarm = Alarm::after(idle);
    let (client, from_client) = server.parts();
    let (upstream, from_upstream) = link.parts();
    poll_fn(|cx| {
        let before = up.bytes + down.bytes;
        let ways = [up.poll(cx, client, from_client, upstream), down.poll(cx, upstream, from_upstream, client)];
        if up.bytes + down.bytes > before {
            alarm.restart(idle);
        }
        let has_failed = ways.iter().any(|way| matches!(way, Poll::Ready(Err(_))));
        if has_failed || ways.iter().all(Poll::is_ready) { Poll::Ready(()) } else { alarm.poll(cx) }
    })
    .await;
    down.bytes
}
