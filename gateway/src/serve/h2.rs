//! One HTTP/2 connection: hyper does the framing, the pipeline answers. The streams of a connection
//! run as tasks of the same thread.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::accounting::{AbortReason, CompletedExchange, InFlightRequest, count_abort, refused, report_client_closed};
use super::worker_context::WorkerContext;
use crate::degrade;
use crate::http::body::{BodyError, BodySource};
use crate::http::deadline::ResettableDeadline;
use crate::http::exchange_clock::Blame;
use crate::http::h2::{self, Http2ResponseBody};
use crate::http::message::{BodyLength, Scheme, StatusCode};
use crate::http::request_body::RequestBody;
use crate::metrics::Label as _;
use crate::panics::poll_catch;
use crate::peer::ConnectionPeer;
use crate::pipeline::{self, Arrival, ExchangeBuffers, RequestContext, ResponseBody, Snapshot};
use crate::tasks::{self, TaskKind};

/// Concurrent streams of one connection; the common default of servers.
const STREAMS_MAX: u32 = 250;
/// Resets that a client may provoke before its connection ends (CVE-2023-44487).
const RESETS_MAX: usize = 50;
/// A silent peer gets a PING this often, and this long to acknowledge it.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// hyper executor that spawns each future as a task of the current thread, so that futures need not
/// be `Send`.
#[derive(Clone, Copy)]
struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor
where
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tasks::spawn(TaskKind::Stream, future);
    }
}

/// The open streams of a connection, and when the last one ended.
struct StreamActivity {
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
}

/// Counts one stream as open until it is dropped.
struct StreamGuard(Rc<StreamActivity>);

impl StreamGuard {
    fn new(activity: &Rc<StreamActivity>) -> Self {
        activity.streams.set(activity.streams.get() + 1);
        StreamGuard(Rc::clone(activity))
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}

/// Serves a connection until it ends.
pub(crate) async fn serve<T>(context: Rc<WorkerContext>, io: T, peer: ConnectionPeer, scheme: Scheme)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let limits = context.snapshot.load().http.clone();
    let activity = Rc::new(StreamActivity { streams: Cell::new(0), idle_since: Cell::new(Instant::now()) });
    let (service_context, service_activity) = (Rc::clone(&context), Rc::clone(&activity));
    let service = service_fn(move |incoming| {
        let stream = StreamGuard::new(&service_activity);
        let (context, peer) = (Rc::clone(&service_context), peer.clone());
        async move {
            let exchange = StreamExchange::begin(context, peer, stream);
            Ok::<_, Infallible>(respond(exchange, scheme, incoming).await)
        }
    });
    let connection = hyper::server::conn::http2::Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESETS_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let mut drain = context.drain_guard();
    let mut deadline = ResettableDeadline::after(limits.idle_timeout);
    let mut is_ending = false;
    let ended = poll_fn(|cx| {
        if !is_ending
            && (drain.poll_drain(cx).is_ready() || poll_idle(&activity, &mut deadline, limits.idle_timeout, cx))
        {
            is_ending = true;
            connection.as_mut().graceful_shutdown();
            deadline.set(Instant::now() + limits.idle_timeout);
        }
        if is_ending && activity.streams.get() == 0 && deadline.poll(cx).is_ready() {
            // The client got GOAWAY and did not close the connection.
            return Poll::Ready(Ok(()));
        }
        connection.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP/2 connection failed");
    }
}

/// Whether the connection has had no stream for the idle timeout.
fn poll_idle(
    activity: &StreamActivity,
    deadline: &mut ResettableDeadline,
    idle_timeout: Duration,
    cx: &mut Context<'_>,
) -> bool {
    let base = if activity.streams.get() > 0 { Instant::now() } else { activity.idle_since.get() };
    deadline.set(base + idle_timeout);
    deadline.poll(cx).is_ready()
}

async fn respond(
    mut exchange: StreamExchange,
    scheme: Scheme,
    incoming: http::Request<Incoming>,
) -> http::Response<Http2ResponseBody<ReportingBody>> {
    let (parts, body) = incoming.into_parts();
    let limits = &exchange.snapshot.http;
    let source = match h2::read_head(&parts, &body, limits, &mut exchange.buffers.request) {
        Err(refusal) => {
            let ExchangeBuffers { request, response, record, .. } = &mut exchange.buffers;
            *record = refused(refusal, request, &exchange.snapshot);
            ResponseBody::Bytes(degrade::write_refusal(refusal.status(), refusal.reason(), response))
        }
        Ok(()) => {
            exchange.buffers.request.scheme = scheme;
            let body = match exchange.buffers.request.length {
                BodyLength::Empty => RequestBody::Empty,
                _ => RequestBody::H2(Box::new(h2::Http2RequestBody::new(body, limits))),
            };
            exchange.run(body).await
        }
    };
    let ExchangeBuffers { request, response, .. } = &exchange.buffers;
    let length = if request.method == http::Method::HEAD || response.status == StatusCode::NOT_MODIFIED {
        BodyLength::Empty
    } else {
        response.length
    };
    let expected = match length {
        BodyLength::Empty => Some(0),
        BodyLength::Known(length) => Some(length),
        BodyLength::Streamed | BodyLength::UntilClose => None,
    };
    let head = response.clone();
    let body = ReportingBody { exchange, bytes: 0, expected, state: BodyState::Open, source };
    h2::write_head(&head, Http2ResponseBody::new(body, length)).unwrap_or_else(|error| {
        tracing::warn!(%error, "response head is not valid in HTTP/2");
        let mut plain = http::Response::new(Http2ResponseBody::empty());
        *plain.status_mut() = StatusCode::BAD_GATEWAY;
        plain
    })
}

/// One HTTP/2 stream from its request to the end of its response.
struct StreamExchange {
    context: Rc<WorkerContext>,
    snapshot: Arc<Snapshot>,
    arrival: Arrival,
    buffers: ExchangeBuffers,
    /// Taken when the response ends.
    in_flight: Option<InFlightRequest>,
    _stream: StreamGuard,
}

impl StreamExchange {
    fn begin(context: Rc<WorkerContext>, peer: ConnectionPeer, stream: StreamGuard) -> Self {
        let snapshot = context.snapshot.load_full();
        let arrival = Arrival { peer, at: Instant::now().into_std() };
        let in_flight = Some(InFlightRequest::begin(arrival.at));
        StreamExchange { context, snapshot, arrival, buffers: ExchangeBuffers::default(), in_flight, _stream: stream }
    }

    async fn run(&mut self, body: RequestBody<'static>) -> ResponseBody<'static> {
        let StreamExchange { context, snapshot, arrival, buffers, .. } = self;
        let handled = {
            let mut handling = pin!(async {
                let mut request_context = RequestContext::new(&context.worker, snapshot, arrival, buffers);
                match request_context.admit() {
                    Some(ended) => ended,
                    None => request_context.handle(body).await,
                }
            });
            poll_fn(|cx| poll_catch(handling.as_mut(), cx)).await
        };
        let mut body = handled.unwrap_or_else(|_panic| {
            count_abort(AbortReason::Panic);
            pipeline::panicked(snapshot, buffers)
        });
        body.unpack_head(&mut buffers.response);
        body
    }
}

impl Drop for StreamExchange {
    fn drop(&mut self) {
        if let Some(in_flight) = self.in_flight.take() {
            let exchange = (&self.arrival.peer, &mut self.buffers);
            report_client_closed(&self.context, &self.snapshot, exchange, in_flight.end());
        }
    }
}

/// Whether a response body is open, complete or failed.
enum BodyState {
    Open,
    Complete,
    Failed(AbortReason),
}

/// A response body that reports its exchange when it ends, in whichever way.
struct ReportingBody {
    exchange: StreamExchange,
    bytes: u64,
    /// Length of the whole body, where it is known.
    expected: Option<u64>,
    state: BodyState,
    source: ResponseBody<'static>,
}

impl BodySource for ReportingBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let filled = self.source.poll_fill(cx);
        match &filled {
            Poll::Ready(Ok(())) if self.source.data().is_empty() => self.state = BodyState::Complete,
            Poll::Ready(Err(error)) => {
                self.state = BodyState::Failed(AbortReason::of(error));
                self.exchange.buffers.record.blame = Some(error.blame());
            }
            _ => {}
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.source.data()
    }

    fn consume(&mut self, count: usize) {
        self.bytes += count as u64;
        self.source.consume(count);
    }
}

impl Drop for ReportingBody {
    fn drop(&mut self) {
        let Some(in_flight) = self.exchange.in_flight.take() else { return };
        match self.state {
            BodyState::Failed(reason) => {
                count_abort(reason);
                self.exchange.buffers.record.aborted = reason.as_str();
            }
            BodyState::Open if self.expected != Some(self.bytes) => {
                count_abort(AbortReason::ClientClosed);
                self.exchange.buffers.record.blame = Some(Blame::Client);
                self.exchange.buffers.record.aborted = AbortReason::ClientClosed.as_str();
            }
            BodyState::Open | BodyState::Complete => {}
        }
        let StreamExchange { context, snapshot, arrival, buffers, .. } = &self.exchange;
        let duration = in_flight.end();
        CompletedExchange { snapshot, peer: &arrival.peer, buffers, bytes: self.bytes, duration }.report(context);
    }
}
