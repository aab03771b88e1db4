//! One HTTP/1.1 connection, from its first request to its last response.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::Cache;

use super::accounting::{
    AbortReason, CompletedExchange, InFlightRequest, count_abort, count_upgrade, refused, report_ended,
};
use super::h2;
use super::worker_context::{DrainGuard, DrainStage, WorkerContext};
use crate::error::ErrorKind;
use crate::http::HttpLimits;
use crate::http::body::BodySource;
use crate::http::exchange_clock::Blame;
use crate::http::h1::{
    self, DownstreamConnection, Http1RequestBody, RequestReadError, RequestRefusal, ResponseWriter, SendError,
    WaitOutcome,
};
use crate::http::message::{Response, Scheme, StatusCode};
use crate::http::request_body::RequestBody;
use crate::http::transport::TransportStream;
use crate::metrics::Label as _;
use crate::panics::{catch, poll_catch};
use crate::peer::ConnectionPeer;
use crate::pipeline::{self, Arrival, ExchangeBuffers, RequestContext, ResponseBody, Snapshot};
use crate::tasks::{self, TaskWait};
use crate::{degrade, hop};

/// Whether the connection continues, is closed or is aborted after an exchange.
enum AfterExchange {
    /// The exchange ended at this time.
    Continue(Instant),
    Close,
    Abort,
}

/// How long a connection may be silent before it releases everything that requests need.
const BACK_TO_BACK_TIMEOUT: Duration = Duration::from_millis(250);
/// Time for the first request of a connection while idle ones are closed.
const FIRST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// Why a series of back-to-back requests ended: no further request for `BACK_TO_BACK_TIMEOUT`,
/// the client's close, ours, or abort.
enum RequestSeriesEnd {
    /// No request began for `BACK_TO_BACK_TIMEOUT`.
    Idle,
    /// The client has closed the connection between two requests.
    Closed,
    Close,
    Abort,
    /// The client speaks HTTP/2.
    Http2,
}

/// The layer below the connection, and whether its client may begin with HTTP/2. With TLS, the
/// handshake has negotiated HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HttpTransport {
    Plain,
    PlainOrHttp2,
    Tls,
}

impl HttpTransport {
    fn scheme(self) -> Scheme {
        match self {
            HttpTransport::Plain | HttpTransport::PlainOrHttp2 => Scheme::Http,
            HttpTransport::Tls => Scheme::Https,
        }
    }
}

/// Serves a connection until it ends.
// Not an async fn: its future would hold the arguments beside the connection that they become.
pub(crate) fn serve(
    context: Rc<WorkerContext>,
    io: TransportStream,
    peer: ConnectionPeer,
    transport: HttpTransport,
) -> impl Future<Output = ()> {
    // A reload changes limits for new connections.
    let limits = Rc::new(context.snapshot.load().http.clone());
    let (stream, drain) = (DownstreamConnection::new(io, &limits), context.drain_guard());
    Connection { context, stream, drain, limits, peer, transport, is_used: false }.serve()
}

/// State of one HTTP/1.1 client connection: its stream, its drain guard, its peer, and the limits
/// of the snapshot at accept time.
struct Connection {
    context: Rc<WorkerContext>,
    stream: DownstreamConnection,
    drain: DrainGuard,
    limits: Rc<HttpLimits>,
    peer: ConnectionPeer,
    transport: HttpTransport,
    /// Whether a request has begun.
    is_used: bool,
}

impl Connection {
    async fn serve(mut self) {
        let mut waited = self.wait_for_first(self.limits.header_timeout).await;
        loop {
            match waited {
                Some(WaitOutcome::Readable) => {}
                Some(WaitOutcome::Closed) => return self.stream.close_after_client().await,
                Some(WaitOutcome::TimedOut) | None => return self.stream.close().await,
            }
            // The state of requests is large: it is allocated apart, and only while there are
            // requests.
            match Box::pin(self.run()).await {
                RequestSeriesEnd::Idle => {}
                RequestSeriesEnd::Closed => return self.stream.close_after_client().await,
                RequestSeriesEnd::Close => return self.stream.close().await,
                RequestSeriesEnd::Abort => return self.stream.abort(),
                RequestSeriesEnd::Http2 => {
                    let Connection { context, stream, peer, drain, limits, .. } = self;
                    drop((drain, limits));
                    return Box::pin(h2::serve(context, stream.into_parts(), peer, Scheme::Http)).await;
                }
            }
            self.stream.release_buffers();
            let timeout = self.limits.idle_timeout.saturating_sub(BACK_TO_BACK_TIMEOUT);
            waited = self.wait(Instant::now(), timeout).await;
        }
    }

    /// Waits for bytes of the first request. Its client has just connected, perhaps before the
    /// listener closed, and cannot know that the connection is to end.
    async fn wait_for_first(&mut self, timeout: Duration) -> Option<WaitOutcome> {
        self.stream.start_wait(Instant::now(), timeout);
        let mut is_closing = false;
        poll_fn(|cx| {
            if let Poll::Ready(outcome) = self.stream.poll_wait_for_request(cx) {
                return Poll::Ready(Some(outcome));
            }
            tasks::set_waiting_for(TaskWait::ClientHead);
            if self.drain.poll_stage(cx, DrainStage::Closing).is_ready() && !std::mem::replace(&mut is_closing, true) {
                self.stream.start_wait(Instant::now(), FIRST_REQUEST_GRACE.min(timeout));
                if let Poll::Ready(outcome) = self.stream.poll_wait_for_request(cx) {
                    return Poll::Ready(Some(outcome));
                }
            }
            self.drain.poll_stage(cx, DrainStage::Expired).map(|()| None)
        })
        .await
    }

    /// Waits from `now` on for bytes of the next request; `None` when idle connections close.
    async fn wait(&mut self, now: Instant, timeout: Duration) -> Option<WaitOutcome> {
        self.stream.start_wait(now, timeout);
        poll_fn(|cx| {
            // A request that has arrived is answered.
            if let Poll::Ready(outcome) = self.stream.poll_wait_for_request(cx) {
                return Poll::Ready(Some(outcome));
            }
            tasks::set_waiting_for(TaskWait::ClientHead);
            self.drain.poll_stage(cx, DrainStage::Closing).map(|()| None)
        })
        .await
    }

    /// Serves requests until none has begun for `BACK_TO_BACK_TIMEOUT`.
    async fn run(&mut self) -> RequestSeriesEnd {
        let mut snapshot = Cache::new(Arc::clone(&self.context.snapshot));
        let mut buffers = ExchangeBuffers::default();
        loop {
            let ended = match self.read(&mut buffers).await {
                Ok(()) => {
                    buffers.request.scheme = self.transport.scheme();
                    self.is_used = true;
                    match self.exchange(snapshot.load(), &mut buffers).await {
                        AfterExchange::Continue(ended) if self.stream.drain_for_reuse().await => ended,
                        AfterExchange::Continue(_) | AfterExchange::Close => return RequestSeriesEnd::Close,
                        AfterExchange::Abort => return RequestSeriesEnd::Abort,
                    }
                }
                Err(RequestReadError::Io(_)) => return RequestSeriesEnd::Close,
                Err(RequestReadError::Refused(_)) if self.begins_http2() => return RequestSeriesEnd::Http2,
                Err(RequestReadError::Refused(refusal)) => {
                    self.refuse(refusal, &mut buffers).await;
                    return RequestSeriesEnd::Close;
                }
            };
            if self.stream.is_read_buffer_empty() {
                match self.wait(ended, BACK_TO_BACK_TIMEOUT.min(self.limits.idle_timeout)).await {
                    Some(WaitOutcome::Readable) => {}
                    Some(WaitOutcome::TimedOut) => return RequestSeriesEnd::Idle,
                    Some(WaitOutcome::Closed) => return RequestSeriesEnd::Closed,
                    None => return RequestSeriesEnd::Close,
                }
            }
        }
    }

    fn begins_http2(&self) -> bool {
        self.transport == HttpTransport::PlainOrHttp2 && !self.is_used && self.stream.begins_http2()
    }

    /// Reads the next request's head, the first bytes of which have arrived.
    async fn read(&mut self, buffers: &mut ExchangeBuffers) -> Result<(), RequestReadError> {
        let Connection { stream, limits, .. } = self;
        match stream.read_repeated_head(limits, &mut buffers.request) {
            Some(read) => read,
            None => stream.read_request(limits, &mut buffers.request).await,
        }
    }

    async fn refuse(&mut self, refusal: RequestRefusal, buffers: &mut ExchangeBuffers) {
        let snapshot = &self.context.snapshot.load_full();
        buffers.request.scheme = self.transport.scheme();
        let page = if refusal == RequestRefusal::BodyTooLarge {
            let arrival = Arrival { peer: self.peer.clone(), at: Instant::now() };
            RequestContext::new(&self.context.worker, snapshot, &arrival, buffers).refuse_body()
        } else {
            let is_of_body = refusal.is_of_body();
            let version = if is_of_body { None } else { Some(self.stream.describe_refused(&mut buffers.request)) };
            buffers.record = refused(refusal, (&buffers.request, &self.peer), snapshot);
            buffers.record.version = version.unwrap_or_default();
            let id = buffers.record.request_id.as_ref();
            ResponseBody::Bytes(degrade::write_refusal(refusal, id, &mut buffers.response))
        };
        let (_, mut writer) = self.stream.exchange();
        writer.close_connection_after();
        let sent = writer.send(&buffers.response, &mut { page }).await;
        if let Some(reason) = abort_reason(Some(sent)) {
            count_abort(reason);
        }
        let (bytes, request_bytes) = (writer.body_sent(), self.stream.request_bytes(&buffers.request));
        CompletedExchange { snapshot, peer: &self.peer, buffers, bytes, request_bytes, duration: Duration::ZERO }
            .report(&self.context);
    }

    /// Handles one request and writes its response.
    async fn exchange(&mut self, snapshot: &Arc<Snapshot>, buffers: &mut ExchangeBuffers) -> AfterExchange {
        let Connection { context, stream, peer, drain, .. } = self;
        let (context, peer) = (&**context, &*peer);
        let arrival = Arrival { peer: peer.clone(), at: Instant::now() };
        let in_flight = InFlightRequest::begin(arrival.at, buffers.request.version);
        let (mut incoming, mut writer) = stream.exchange();
        let has_body = !incoming.is_complete();
        let mut request_context = None;
        let admitted = catch(|| {
            let new = RequestContext::new(&context.worker, snapshot, &arrival, buffers);
            request_context.insert(new).admit()
        });
        // Without a request body, nothing else reads the connection: it is watched, so that a
        // client that closes it cancels everything at once.
        let (body, mut watch) =
            if has_body { (RequestBody::H1(incoming), None) } else { (RequestBody::Empty, Some(&mut incoming)) };
        if let (Ok(Some(_)), RequestBody::H1(unread)) = (&admitted, &body)
            && !unread.may_be_drained()
        {
            // A denied upload. Its response says that the connection will not be reused.
            writer.close_connection_after();
        }
        let handled = match (admitted, &mut request_context) {
            (Err(panic), _) => Some(Err(panic)),
            (Ok(Some(ended)), _) => Some(Ok(ended)),
            (Ok(None), None) => None,
            (Ok(None), Some(request_context)) => {
                let interim = request_context.request.interim.share();
                let mut handling = pin!(request_context.handle(body));
                poll_fn(|cx| {
                    let polled = poll_catch(handling.as_mut(), cx);
                    while let Some(mut interim_response) = interim.take() {
                        hop::strip(&mut interim_response.fields);
                        // If the client fails now, sending the final response fails too.
                        let _sent_or_failed = writer.poll_interim(cx, &interim_response);
                    }
                    if let Poll::Ready(handled) = polled {
                        return Poll::Ready(Some(handled));
                    }
                    poll_ended(cx, &mut watch, drain).map(|()| None)
                })
                .await
            }
        };
        let mut out = match handled.filter(|_| buffers.record.failure != Some(ErrorKind::ClientGone)) {
            Some(Ok(body)) => body,
            Some(Err(_panic)) => {
                count_abort(AbortReason::Panic);
                pipeline::panicked(snapshot, buffers)
            }
            None => {
                let counted = (in_flight.end(), stream.request_bytes(&buffers.request));
                report_ended(context, snapshot, (peer, buffers), counted, ended_by(context));
                // Without a byte of a response, a clean end cannot be taken for a complete one.
                return if context.is_expired() { AfterExchange::Abort } else { AfterExchange::Close };
            }
        };
        // Draining may have begun while the request was handled.
        if buffers.record.must_close || context.is_draining() {
            writer.close_connection_after();
        }
        let sent = send(&mut writer, &mut buffers.response, &mut out, (watch, drain)).await;
        if let Some(Ok(())) = sent
            && buffers.response.status == StatusCode::SWITCHING_PROTOCOLS
        {
            count_upgrade();
            let began = Instant::now();
            let handled_in = in_flight.end();
            if let Some(mut tunnel) = out.into_tunnel() {
                let idle_timeout = snapshot.http.idle_timeout;
                let relayed = h1::relay(stream, &mut tunnel.connection, idle_timeout, |cx| {
                    drain.poll_stage(cx, DrainStage::Expired)
                })
                .await;
                tunnel.in_flight.add_received(relayed.to_client);
                tunnel.in_flight.set_sent(relayed.to_upstream);
                let bytes = relayed.to_client;
                let duration = handled_in + began.elapsed();
                if context.is_expired() {
                    count_abort(AbortReason::DrainTimeout);
                    buffers.record.aborted = AbortReason::DrainTimeout.as_str();
                    buffers.record.blame = Some(AbortReason::DrainTimeout.blame());
                }
                CompletedExchange { snapshot, peer, buffers, bytes, request_bytes: 0, duration }.report(context);
            }
            return AfterExchange::Close;
        }
        if let Some(blame) = blame(sent.as_ref()) {
            buffers.record.blame = Some(blame);
        }
        let aborted = match sent {
            None => Some(ended_by(context)),
            sent => abort_reason(sent),
        };
        if aborted == Some(AbortReason::DrainTimeout) {
            buffers.record.blame = Some(AbortReason::DrainTimeout.blame());
        }
        buffers.record.aborted = aborted.map_or("", AbortReason::as_str);
        let duration = in_flight.end();
        let bytes = writer.body_sent();
        drop(out);
        let request_bytes = stream.request_bytes(&buffers.request);
        CompletedExchange { snapshot, peer, buffers, bytes, request_bytes, duration }.report(context);
        match aborted {
            None if buffers.record.must_close => AfterExchange::Close,
            None => AfterExchange::Continue(arrival.at + duration),
            Some(reason) => {
                count_abort(reason);
                AfterExchange::Abort
            }
        }
    }
}

/// Why a response was not sent to its end, if it was not. Counts the clock that ended it.
fn abort_reason(sent: Option<Result<(), SendError>>) -> Option<AbortReason> {
    match sent {
        Some(Ok(())) => None,
        None => Some(AbortReason::ClientClosed),
        Some(Err(SendError::Peer(error))) => {
            tracing::debug!(%error, "writing to a client failed");
            Some(AbortReason::WriteFailed)
        }
        Some(Err(SendError::Timeout(timeout))) => {
            pipeline::count_timeout(timeout);
            Some(AbortReason::ClientTimeout)
        }
        Some(Err(SendError::Source(error))) => {
            tracing::debug!(%error, "response body failed");
            Some(AbortReason::of(&error))
        }
    }
}

/// The side that is responsible for a response that was not sent to its end.
fn blame(sent: Option<&Result<(), SendError>>) -> Option<Blame> {
    match sent {
        Some(Ok(())) => None,
        None | Some(Err(SendError::Peer(_) | SendError::Timeout(_))) => Some(Blame::Client),
        Some(Err(SendError::Source(error))) => Some(error.blame()),
    }
}

/// Ready when the client closes the connection, if it is watched, or the drain has expired.
fn poll_ended(cx: &mut Context<'_>, watch: &mut Option<&mut Http1RequestBody<'_>>, drain: &mut DrainGuard) -> Poll<()> {
    if let Some(incoming) = watch
        && incoming.poll_client_closed(cx).is_ready()
    {
        return Poll::Ready(());
    }
    drain.poll_stage(cx, DrainStage::Expired)
}

/// Why an exchange has ended that `poll_ended` has ended.
fn ended_by(context: &WorkerContext) -> AbortReason {
    if context.is_expired() { AbortReason::DrainTimeout } else { AbortReason::ClientClosed }
}

/// Sends a response; `None` when the client closes the connection first, or the drain expires.
async fn send(
    writer: &mut ResponseWriter<'_>,
    response: &mut Response,
    body: &mut ResponseBody<'_>,
    (mut watch, drain): (Option<&mut Http1RequestBody<'_>>, &mut DrainGuard),
) -> Option<Result<(), SendError>> {
    if !body.serialized().is_some_and(|(serialized, id)| writer.begin_serialized(serialized, id.as_ref())) {
        body.unpack_head(response);
        writer.begin(response, body);
    }
    poll_fn(|cx| {
        if let Poll::Ready(sent) = writer.poll_send(cx, body) {
            return Poll::Ready(Some(sent));
        }
        poll_ended(cx, &mut watch, drain).map(|()| None)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<F: Future>(
        _: fn(Rc<WorkerContext>, TransportStream, ConnectionPeer, HttpTransport) -> F,
    ) -> usize {
        size_of::<F>()
    }

    #[test]
    fn idle_connection_is_small() {
        // Its task. In addition there are a timer and an entry in the runtime (430 bytes), and no
        // buffer.
        let bytes = size_of_future(serve);
        assert!(bytes <= 1_250, "{bytes}");
    }
}
