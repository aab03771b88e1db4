//! One HTTP/2 connection: `h2` does the framing, the pipeline answers.
//!
//! The connection's task reads frames and begins streams; a stream that cannot be answered at once
//! continues as a task of the same thread. Frames of all streams that are ready leave in one write.
//! Invariant: the connection holds at most 2 MiB: heads of requests (`HEADS_MAX`), unread bodies
//! (`CONNECTION_WINDOW`), unsent bytes (`SendBudget`, `GatheredTransport`).

mod stream_context;
mod stream;

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{PingPong, Reason, RecvStream};
use tokio::time::Instant;

use stream_context::{StreamContext, StreamGuard};

use super::worker_context::{DrainGuard, WorkerContext};
use crate::http::HttpLimits;
use crate::http::deadline::ResettableDeadline;
use crate::http::h2::{DataChunk, FrameAbuse, GatheredStream, GatheredTransport};
use crate::http::message::Scheme;
use crate::http::transport::TransportStream;
use crate::metrics::{self, Counters};
use crate::panics::poll_catch;
use crate::peer::ConnectionPeer;
use crate::tasks::{self, TaskKind, TaskWait};

/// Concurrent streams of one connection; the default of nginx.
const STREAMS_MAX: u32 = 128;
/// Bytes of the heads of open requests. A stream beyond them is refused; its client may retry it.
const HEADS_MAX: usize = 512 << 10;
/// Bytes of request bodies that a client may send before the gateway has read them: of one stream,
/// and of all. Together with the round-trip time they bound the speed of an upload.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;
/// Unsent bytes of one stream in `h2`.
const STREAM_SEND_MAX: usize = 64 << 10;
/// Streams that a client may reset before they are accepted, and errors of streams that it may
/// provoke, before its connection ends (CVE-2023-44487, CVE-2025-8671).
const RESETS_MAX: usize = 50;
const PROVOKED_RESETS_MAX: usize = 100;
/// A silent peer gets a PING this often, and this long to acknowledge it.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client gets to accept the last frames of a connection that the gateway ends.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);

static ABUSES: LazyLock<Counters<FrameAbuse>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(super) fn expose() {
    let help = "HTTP/2 connections ended because their client sent too many frames, by the kind of frames.";
    metrics::expose_counters("tidegate_http2_floods", help, &ABUSES);
}

/// Serves a connection until it ends.
pub(crate) async fn serve(context: Rc<WorkerContext>, io: TransportStream, peer: ConnectionPeer, scheme: Scheme) {
    let limits = context.snapshot.load().http.clone();
    let transport = GatheredTransport::new(io, limits.idle_timeout);
    if let Some(h2) = handshake(&transport, &limits).await {
        let drain = context.drain_guard();
        let shared = StreamContext::new(context, peer, scheme, Rc::clone(&transport));
        let mut connection = Connection::new(h2, limits, drain, shared);
        poll_fn(|cx| connection.poll(cx)).await;
    }
    tasks::set_waiting_for(TaskWait::ClientClose);
    transport.linger().await;
}

type ServerConnection = h2::server::Connection<GatheredStream, DataChunk>;

/// Waits for the preface of the client, which has as long as for a head. `None`: it did not come.
async fn handshake(transport: &Rc<GatheredTransport>, limits: &HttpLimits) -> Option<ServerConnection> {
    let handshake = h2::server::Builder::new()
        .max_concurrent_streams(STREAMS_MAX)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .max_send_buffer_size(STREAM_SEND_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(Some(PROVOKED_RESETS_MAX))
        .handshake::<_, DataChunk>(GatheredStream(Rc::clone(transport)));
    let mut handshake = pin!(handshake);
    let mut deadline = ResettableDeadline::after(limits.header_timeout);
    poll_fn(|cx| {
        let polled = handshake.as_mut().poll(cx);
        let sent = transport.poll_send(cx);
        match (polled, sent) {
            (Poll::Ready(Ok(h2)), Poll::Pending | Poll::Ready(Ok(()))) => Poll::Ready(Some(h2)),
            (Poll::Ready(Err(error)), _) => {
                tracing::debug!(%error, "HTTP/2 preface failed");
                Poll::Ready(None)
            }
            (_, Poll::Ready(Err(_))) => Poll::Ready(None),
            (Poll::Pending, _) => deadline.poll(cx).map(|()| None),
        }
    })
    .await
}

/// Whether new streams are begun.
#[derive(PartialEq, Eq)]
enum ConnectionPhase {
    Open,
    /// The client has been told to open no more streams.
    Draining,
    /// The client has been told why the connection ends.
    Aborted,
}

struct Connection {
    h2: ServerConnection,
    limits: HttpLimits,
    drain: DrainGuard,
    shared: Rc<StreamContext>,
    phase: ConnectionPhase,
    /// When a connection without streams ends, or one that is aborted.
    deadline: ResettableDeadline,
    /// When a head must be complete that has been received in part.
    head_deadline: ResettableDeadline,
    is_in_head_block: bool,
    pings: Option<PingPong>,
    ping_sent: Option<Instant>,
    ping_timer: ResettableDeadline,
}

impl Connection {
    #[expect(clippy::too_many_arguments, reason = "the parts that a connection is made of")]
    fn new(mut h2: ServerConnection, limits: HttpLimits, drain: DrainGuard, shared: Rc<StreamContext>) -> Self {
        let pings = h2.ping_pong();
        Connection {
            h2,
            deadline: ResettableDeadline::after(limits.idle_timeout),
            head_deadline: ResettableDeadline::after(limits.header_timeout),
            is_in_head_block: false,
            limits,
            drain,
            shared,
            phase: ConnectionPhase::Open,
            pings,
            ping_sent: None,
            ping_timer: ResettableDeadline::after(PING_INTERVAL),
        }
    }

    /// Ready when the connection is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.h2.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    self.begin_stream(cx, request, respond);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "HTTP/2 connection failed");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => {}
            }
            if let Some(abuse) = self.shared.transport.abuse()
                && self.phase != ConnectionPhase::Aborted
            {
                ABUSES.inc(abuse);
                tracing::debug!(frames = metrics::Label::as_str(abuse), "HTTP/2 flood");
                self.abort(Reason::ENHANCE_YOUR_CALM);
                continue;
            }
            match self.shared.transport.poll_send(cx) {
                // The rest of its frames.
                Poll::Ready(Ok(())) if self.shared.transport.take_refused() => {}
                Poll::Ready(Ok(())) | Poll::Pending => break,
                Poll::Ready(Err(error)) => {
                    tracing::debug!(%error, "writing to an HTTP/2 client failed");
                    return Poll::Ready(());
                }
            }
        }
        tasks::set_waiting_for(TaskWait::ClientHead);
        self.poll_clocks(cx)
    }

    #[expect(clippy::too_many_arguments, reason = "a stream as `h2` gives it")]
    fn begin_stream(
        &mut self,
        cx: &mut Context<'_>,
        request: http::Request<RecvStream>,
        mut respond: h2::server::SendResponse<DataChunk>,
    ) {
        let head_bytes = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        if self.shared.head_bytes() + head_bytes > HEADS_MAX {
            respond.send_reset(Reason::REFUSED_STREAM);
            return;
        }
        let guard = StreamGuard::new(&self.shared, head_bytes);
        let mut serving = Box::pin(stream::serve(guard, request, respond));
        // Most responses from the cache are complete after one poll and need no task.
        match poll_catch(serving.as_mut(), cx) {
            Poll::Pending => tasks::spawn(TaskKind::Stream, serving),
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_panic)) => tracing::error!("a stream panicked"),
        }
    }

    /// Ends the connection at once, with a reason that the client is told.
    fn abort(&mut self, reason: Reason) {
        self.phase = ConnectionPhase::Aborted;
        self.h2.abrupt_shutdown(reason);
        self.deadline.set(Instant::now() + ABORT_TIMEOUT);
    }

    /// Polled when nothing moves: ready when a clock has ended the connection.
    fn poll_clocks(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.phase == ConnectionPhase::Aborted {
            return self.deadline.poll(cx);
        }
        if self.poll_head_timeout(cx).is_ready() {
            self.abort(Reason::ENHANCE_YOUR_CALM);
            return self.repoll(cx);
        }
        if self.poll_ping(cx).is_ready() {
            return Poll::Ready(());
        }
        let is_idle = self.shared.is_idle();
        if self.phase == ConnectionPhase::Open {
            let base = if is_idle { self.shared.idle_since() } else { Instant::now() };
            self.deadline.set(base + self.limits.idle_timeout);
            if self.drain.poll_drain(cx).is_ready() || self.deadline.poll(cx).is_ready() {
                self.phase = ConnectionPhase::Draining;
                self.h2.graceful_shutdown();
                self.deadline.set(Instant::now() + self.limits.idle_timeout);
                return self.repoll(cx);
            }
        } else if is_idle {
            // The client got GOAWAY and did not close the connection.
            return self.deadline.poll(cx);
        }
        Poll::Pending
    }

    /// Pending with a wake-up: there are frames to send.
    fn repoll(&self, cx: &Context<'_>) -> Poll<()> {
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_head_timeout(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let was_in_head_block = std::mem::replace(&mut self.is_in_head_block, self.shared.transport.is_in_head_block());
        if !self.is_in_head_block {
            return Poll::Pending;
        }
        if !was_in_head_block {
            self.head_deadline.restart(self.limits.header_timeout);
        }
        self.head_deadline.poll(cx)
    }

    /// Ready when a silent peer with open streams has not acknowledged a PING.
    fn poll_ping(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(pings), true) = (&mut self.pings, !self.shared.is_idle()) else { return Poll::Pending };
        let read_at = self.shared.transport.read_at();
        // Any byte shows that the peer lives.
        if self.ping_sent.is_some_and(|sent| read_at > sent) {
            let _acknowledged_or_later = pings.poll_pong(cx);
            self.ping_sent = None;
        }
        self.ping_timer.set(self.ping_sent.map_or(read_at + PING_INTERVAL, |sent| sent + PING_TIMEOUT));
        if self.ping_timer.poll(cx).is_pending() {
            return Poll::Pending;
        }
        if self.ping_sent.is_some() {
            return Poll::Ready(());
        }
        self.ping_sent = Some(Instant::now());
        self.ping_timer.restart(PING_TIMEOUT);
        // Fails only while another PING is under way.
        let _sent_or_under_way = pings.send_ping(h2::Ping::opaque());
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
