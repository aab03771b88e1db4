//! One HTTP/2 connection: the engine does the framing, the pipeline answers.
//!
//! The connection's task reads frames, begins streams, and polls those that were woken. Frames of
//! all streams that are ready leave in one write.

mod stream_context;
mod stream;
mod stream_tasks;

use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use stream::StreamStart;
use stream_context::StreamContext;
use stream_tasks::StreamTasks;

use super::accounting::{self, AbortReason, CompletedExchange};
use super::worker_context::{DrainGuard, DrainStage, WorkerContext};
use crate::event::Event;
use crate::http::HttpLimits;
use crate::http::buffer::ReadBuffer;
use crate::http::deadline::ResettableDeadline;
use crate::http::h2::{
    FrameAbuse, Http2Client, Http2Connection, Http2ErrorCode, ReceiveEnd, describe_unread, refused_streams,
    reserved_bytes,
};
use crate::http::message::{Response, Scheme};
use crate::http::refusal::RequestRefusal;
use crate::http::transport::TransportStream;
use crate::metrics::{self, Counters, Label as _};
use crate::peer::ConnectionPeer;
use crate::pipeline::ResponseBody;
use crate::tasks::{self, TaskWait};

/// Requests that a connection begins before others have their turn.
const REQUEST_WORK_MAX: u32 = 128;
/// A refused head may have taken as long to read as this many others: a head block of 16 KiB can
/// have 16,000 references.
const REFUSED_WORK: u32 = 32;
/// A silent peer gets a PING this often, and this long to acknowledge it.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// How often the socket is asked whether it has accepted bytes, while no others arrive.
const ACCEPTED_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a client gets to accept the last frames of a connection that the gateway ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a client gets to acknowledge that it must open no more streams.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a stream waits until its connection has memory for it.
const DEFERRED_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the uploads of a connection are checked while its window is withheld.
const WITHHELD_INTERVAL: Duration = Duration::from_secs(1);
/// How long a connection may have no streams before it releases what they need.
const RELEASE_AFTER: Duration = Duration::from_millis(250);

static ABUSES: LazyLock<Counters<FrameAbuse>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(super) fn expose() {
    let help = "HTTP/2 connections ended because their client sent too many frames, by the kind of frames.";
    metrics::expose_counters("tidegate_http2_floods", help, &ABUSES);
    let help = "HTTP/2 streams refused for lack of memory, by what had none: connection, address or process.";
    metrics::expose_counters("tidegate_http2_streams_refused", help, refused_streams());
    let help = "Bytes that HTTP/2 connections have reserved for their streams.";
    metrics::expose_gauge_with("tidegate_http2_reserved_bytes", help, |emit| emit(&[], reserved_bytes() as f64));
}

/// Serves a connection, of which bytes may have been received, until it ends.
pub(crate) async fn serve(
    context: Rc<WorkerContext>,
    (io, received): (TransportStream, ReadBuffer),
    peer: ConnectionPeer,
    scheme: Scheme,
) {
    let (limits, client) = {
        let snapshot = context.snapshot.load();
        let is_trusted_proxy = snapshot.identity.is_trusted_proxy(peer.ip);
        (snapshot.http.clone(), Http2Client { address: peer.ip, is_trusted_proxy })
    };
    let h2 = Http2Connection::new((io, received), client, limits.clone());
    let drain = context.drain_guard();
    let shared = StreamContext::new(context, peer, scheme);
    let mut driver = Driver::new(Rc::clone(&h2), limits, drain, Rc::clone(&shared));
    let mut streams = StreamTasks::new();
    poll_fn(|cx| {
        h2.enter(cx);
        streams.enter(cx);
        let polled = driver.poll(cx, &mut streams, stream::serve);
        h2.leave();
        streams.leave();
        if driver.is_released {
            streams.release();
        }
        polled
    })
    .await;
    h2.end_streams();
    streams.end();
    tasks::set_waiting_for(TaskWait::ClientClose);
    h2.linger(CLOSE_TIMEOUT).await;
}

/// Whether new streams are begun.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ConnectionPhase {
    Open,
    /// The client is told to open no more streams.
    Draining,
    /// The client knows.
    Drained,
    /// The client has been told why the connection ends.
    Aborted,
}

/// The state of the task that owns a connection.
struct Driver {
    h2: Rc<Http2Connection<ResponseBody<'static>>>,
    limits: HttpLimits,
    drain: DrainGuard,
    shared: Rc<StreamContext>,
    phase: ConnectionPhase,
    /// Whether it was accepted while draining.
    is_accepted_late: bool,
    /// When the last stream ended; `None` while there are streams.
    idle_since: Option<Instant>,
    /// The memory that streams need was released.
    is_released: bool,
    deadline: ResettableDeadline,
    phase_began: Instant,
    probe_sent: Option<Instant>,
    /// When the socket was last seen to accept bytes, and how many it had accepted.
    accepted: (Instant, u64),
}

impl Driver {
    fn new(
        h2: Rc<Http2Connection<ResponseBody<'static>>>,
        limits: HttpLimits,
        drain: DrainGuard,
        shared: Rc<StreamContext>,
    ) -> Self {
        let now = Instant::now();
        Driver {
            h2,
            deadline: ResettableDeadline::after(limits.header_timeout),
            limits,
            drain,
            is_accepted_late: shared.worker.is_draining(),
            shared,
            phase: ConnectionPhase::Open,
            idle_since: Some(now),
            is_released: true,
            phase_began: now,
            probe_sent: None,
            accepted: (now, 0),
        }
    }

    /// Ready when the connection is over.
    fn poll<F: Future<Output = ()>>(
        &mut self,
        cx: &mut Context<'_>,
        streams: &mut StreamTasks<F>,
        serve: impl Fn(StreamStart) -> F,
    ) -> Poll<()> {
        let mut deferred = None;
        loop {
            // Responses have ended when their last bytes were sent: the client may have opened
            // other streams since.
            streams.poll_woken();
            if self.phase != ConnectionPhase::Aborted {
                match self.poll_requests(cx, streams, &serve) {
                    Poll::Pending => {}
                    Poll::Ready(ReceiveEnd::Closed) => return Poll::Ready(()),
                    Poll::Ready(ReceiveEnd::Error(code)) => self.abort(code, AbortReason::ProtocolError),
                    Poll::Ready(ReceiveEnd::Abuse(abuse)) => {
                        ABUSES.inc(abuse);
                        Event::Http2Flood { client: self.shared.peer.ip, frames: abuse.as_str() }.emit();
                        self.abort(Http2ErrorCode::EnhanceYourCalm, AbortReason::Flood);
                    }
                }
            }
            if self.phase != ConnectionPhase::Aborted && self.drain.poll_stage(cx, DrainStage::Expired).is_ready() {
                self.abort(Http2ErrorCode::NoError, AbortReason::DrainTimeout);
            }
            streams.poll_woken();
            // Streams that have ended may have left memory to requests that wait.
            let to_begin = self.h2.deferred_to_begin();
            if to_begin.is_some() && std::mem::replace(&mut deferred, to_begin) != to_begin {
                continue;
            }
            let sent = self.h2.poll_send(cx);
            if let Poll::Ready(Err(error)) = &sent {
                tracing::debug!(%error, "writing to an HTTP/2 client failed");
                let is_late = error.kind() == std::io::ErrorKind::TimedOut;
                let reason = if is_late { AbortReason::ClientTimeout } else { AbortReason::WriteFailed };
                self.shared.ended_by.set(Some(reason));
                return Poll::Ready(());
            }
            if self.phase == ConnectionPhase::Aborted && sent.is_ready() {
                return Poll::Ready(());
            }
            tasks::set_waiting_for(TaskWait::ClientHead);
            match self.poll_clocks(cx) {
                Poll::Ready(DriverStep::Continue) => {}
                Poll::Ready(DriverStep::End) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Begins the streams whose requests have arrived.
    fn poll_requests<F: Future<Output = ()>>(
        &mut self,
        cx: &mut Context<'_>,
        streams: &mut StreamTasks<F>,
        serve: impl Fn(StreamStart) -> F,
    ) -> Poll<ReceiveEnd> {
        let (mut snapshot, mut work) = (None, 0);
        loop {
            if work >= REQUEST_WORK_MAX {
                // Other connections of the thread have their turn.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let mut buffers = self.shared.take_buffers();
            match self.h2.poll_request(cx, &mut buffers.request) {
                Poll::Ready(Ok(incoming)) => {
                    let snapshot = snapshot.get_or_insert_with(|| self.shared.worker.snapshot.load_full());
                    let (shared, snapshot) = (Rc::clone(&self.shared), std::sync::Arc::clone(snapshot));
                    (self.idle_since, self.is_released) = (None, false);
                    let at = incoming.at.into_std();
                    let has_body = incoming.handle.upload().is_some();
                    work += if incoming.head.is_ok() { 1 } else { REFUSED_WORK };
                    let begin = || serve(StreamStart { shared, snapshot, at, incoming, buffers });
                    // The body of a request may be in the read buffer, and is read first.
                    if has_body { streams.begin_later(at, begin) } else { streams.begin(at, begin) }
                }
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => {
                    self.shared.return_buffers(buffers);
                    return Poll::Pending;
                }
            }
        }
    }

    /// Ends the connection with a code that the client is told, and a reason for the access log.
    fn abort(&mut self, code: Http2ErrorCode, reason: AbortReason) {
        self.shared.ended_by.set(Some(reason));
        self.h2.abort(code);
        self.set_phase(ConnectionPhase::Aborted);
    }

    fn set_phase(&mut self, phase: ConnectionPhase) {
        self.phase = phase;
        self.phase_began = Instant::now();
    }

    /// Polled when nothing moves: ready when a clock has run out, and the connection continues or
    /// ends.
    fn poll_clocks(&mut self, cx: &mut Context<'_>) -> Poll<DriverStep> {
        let is_idle = self.h2.is_idle();
        if !is_idle {
            (self.idle_since, self.is_released) = (None, false);
        }
        let due = match self.phase {
            ConnectionPhase::Aborted => self.phase_began + CLOSE_TIMEOUT,
            ConnectionPhase::Open if self.drain.poll_stage(cx, self.drain_stage()).is_ready() => {
                self.begin_drain();
                return Poll::Ready(DriverStep::Continue);
            }
            ConnectionPhase::Draining if self.h2.is_drain_acknowledged() => {
                self.finish_drain();
                return Poll::Ready(DriverStep::Continue);
            }
            ConnectionPhase::Drained if is_idle => return Poll::Ready(DriverStep::End),
            _ => self.due(is_idle),
        };
        self.deadline.set(due);
        if self.deadline.poll(cx).is_pending() {
            return Poll::Pending;
        }
        Poll::Ready(self.act_when_due(is_idle))
    }

    /// When the next clock runs out. The clock is read only when a connection becomes idle.
    fn due(&mut self, is_idle: bool) -> Instant {
        let head = self.h2.section_began().map(|began| began + self.limits.header_timeout);
        let phase = match self.phase {
            ConnectionPhase::Draining => Some(self.phase_began + DRAIN_TIMEOUT),
            _ => None,
        };
        let idle = if let (Some(phase), true) = (phase, is_idle) {
            phase
        } else if is_idle {
            let since = *self.idle_since.get_or_insert_with(Instant::now);
            let timeout = if self.h2.has_begun() { self.limits.idle_timeout } else { self.limits.header_timeout };
            since + if self.is_released { timeout } else { RELEASE_AFTER.min(timeout) }
        } else {
            self.probe_due()
        };
        let deferred = self.h2.deferred_since().map(|since| since + DEFERRED_TIMEOUT);
        let withheld = self.h2.withheld_since().map(|since| since + WITHHELD_INTERVAL);
        [head, phase, deferred, withheld].into_iter().flatten().fold(idle, Instant::min)
    }

    /// When a silent peer with open streams gets a PING, or is over its time to acknowledge it.
    fn probe_due(&mut self) -> Instant {
        let read_at = self.h2.read_at();
        // Any byte shows that the peer lives.
        self.probe_sent = self.probe_sent.filter(|sent| *sent >= read_at);
        let lived_at = read_at.max(self.accepted.0);
        let due = self.probe_sent.map_or(lived_at + PING_INTERVAL, |sent| sent + PING_TIMEOUT);
        // The clock is not read for each write: the time of unseen ones is that of the next look.
        let has_unseen = self.h2.sent_bytes() > self.accepted.1;
        if has_unseen { due.min(lived_at + ACCEPTED_INTERVAL) } else { due }
    }

    /// Whether the socket has accepted bytes since this was asked: the peer reads, however slowly,
    /// and a PING behind a response may take longer than its time.
    fn has_accepted_bytes(&mut self, now: Instant) -> bool {
        let sent = self.h2.sent_bytes();
        let has_progressed = sent > self.accepted.1;
        if has_progressed {
            self.accepted = (now, sent);
        }
        has_progressed
    }

    fn act_when_due(&mut self, is_idle: bool) -> DriverStep {
        let now = Instant::now();
        if self.phase == ConnectionPhase::Aborted {
            return DriverStep::End;
        }
        if self.h2.section_began().is_some_and(|began| began + self.limits.header_timeout <= now) {
            self.report_late_head();
            self.abort(Http2ErrorCode::EnhanceYourCalm, AbortReason::HeadTimeout);
        } else if self.phase == ConnectionPhase::Draining && self.phase_began + DRAIN_TIMEOUT <= now {
            self.finish_drain();
        } else if self.h2.deferred_since().is_some_and(|since| since + DEFERRED_TIMEOUT <= now) {
            self.h2.refuse_deferred(now - DEFERRED_TIMEOUT);
        } else if self.h2.withheld_since().is_some_and(|since| since + WITHHELD_INTERVAL <= now) {
            self.h2.relieve_window();
        } else if !is_idle {
            if self.has_accepted_bytes(now) {
                self.probe_sent = None;
            } else if self.probe_sent.is_some() {
                self.shared.ended_by.set(Some(AbortReason::PingTimeout));
                return DriverStep::End;
            } else {
                let own = self.h2.write_probe();
                self.accepted.1 += own;
                self.probe_sent = Some(now);
            }
        } else if !self.is_released {
            self.is_released = true;
            self.shared.release_buffers(0);
            self.h2.release_buffers();
        } else if !self.h2.has_begun() {
            return DriverStep::End;
        } else {
            self.begin_drain();
        }
        DriverStep::Continue
    }

    /// Counts a head that is late, and writes its access log line. Its fields are compressed, and
    /// depend on those that are missing: nothing of it is known.
    fn report_late_head(&self) {
        let snapshot = &self.shared.worker.snapshot.load_full();
        let mut buffers = self.shared.take_buffers();
        describe_unread(&mut buffers.request);
        buffers.request.scheme = self.shared.scheme;
        buffers.record =
            accounting::refused(RequestRefusal::HeadTimeout, (&buffers.request, &self.shared.peer), snapshot);
        // The connection ends without a response.
        buffers.response = Response::new(RequestRefusal::HeadTimeout.status());
        buffers.record.aborted = AbortReason::HeadTimeout.as_str();
        accounting::count_abort(AbortReason::HeadTimeout);
        let (peer, duration) = (&self.shared.peer, self.limits.header_timeout);
        let late = CompletedExchange { snapshot, peer, buffers: &mut buffers, bytes: 0, request_bytes: 0, duration };
        late.report(&self.shared.worker);
        self.shared.return_buffers(buffers);
    }

    /// The stage in which the client is told that the connection ends. One that was accepted while
    /// draining serves a stream first: clients give up after a few connections without.
    fn drain_stage(&self) -> DrainStage {
        let is_unserved = self.is_accepted_late && !self.h2.has_streams_begun();
        if is_unserved { DrainStage::Closing } else { DrainStage::Draining }
    }

    /// Tells the client to open no more streams.
    fn begin_drain(&mut self) {
        self.h2.begin_drain();
        self.set_phase(ConnectionPhase::Draining);
    }

    fn finish_drain(&mut self) {
        self.h2.finish_drain();
        self.set_phase(ConnectionPhase::Drained);
    }
}

/// The step after a clock has run out.
enum DriverStep {
    Continue,
    End,
}
