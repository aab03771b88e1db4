//! One HTTP/2 stream, from its request to the end of its response.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::stream_context::StreamContext;
use crate::error::{Error, ErrorKind};
use crate::http::HttpLimits;
use crate::http::body::{BodyError, BodySource as _};
use crate::http::deadline::ResettableDeadline;
use crate::http::exchange_clock::{Blame, ExchangeTimeout};
use crate::http::fields::Fields;
use crate::http::grpc::{self, GrpcStatus};
use crate::http::h2::{self as http2, ClientClock, Http2ErrorCode, Http2RequestBody, IncomingRequest, ResponseEnd};
use crate::http::message::{BodyLength, HttpVersion, InterimResponses, is_bodiless};
use crate::http::refusal::RequestRefusal;
use crate::http::request_body::RequestBody;
use crate::http::write_timer::WriteTimer;
use crate::metrics::Label as _;
use crate::panics::poll_catch;
use crate::pipeline::{self, Arrival, ExchangeBuffers, RequestContext, ResponseBody, Snapshot};
use crate::serve::accounting::{
    AbortReason, CompletedExchange, InFlightRequest, count_abort, count_upgrade, refused, report_ended,
};
use crate::tasks::{self, TaskWait};
use crate::upstream::Tunnel;
use crate::{degrade, hop};

/// How long and how many bytes a client may still send of its request after the response has ended.
/// A reset at once would destroy the response in some clients.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
const DISCARDED_MAX: usize = 1 << 20;

type Handle = http2::StreamHandle<ResponseBody<'static>>;

/// A request whose head was read, and its buffers.
pub(super) struct StreamStart {
    pub(super) shared: Rc<StreamContext>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) at: Instant,
    pub(super) incoming: IncomingRequest<ResponseBody<'static>>,
    pub(super) buffers: Box<ExchangeBuffers>,
}

/// Serves one stream.
pub(super) async fn serve(start: StreamStart) {
    let StreamStart { shared, snapshot, at, incoming: IncomingRequest { handle, head, .. }, buffers } = start;
    let arrival = Arrival { peer: shared.peer.clone(), at };
    // A refused head is no request.
    let in_flight = head.is_ok().then(|| InFlightRequest::begin(at, HttpVersion::Http2));
    let mut buffers = Some(buffers);
    if let Some(buffers) = &mut buffers {
        buffers.request.scheme = shared.scheme;
    }
    let mut exchange = StreamExchange {
        shared,
        snapshot,
        arrival,
        buffers,
        in_flight,
        tells_stall: false,
        is_reported: false,
        handle,
    };
    if exchange.handle.is_reset() {
        // Nothing is begun for a stream that its client has reset in the same flight.
        return;
    }
    let mut is_malformed = false;
    let body = match head {
        Ok(_details) => exchange.respond().await,
        Err(refused) => {
            is_malformed = refused.is_malformed;
            Some(match refused.refusal {
                RequestRefusal::BodyTooLarge => exchange.refuse_body(),
                refusal => exchange.refuse(refusal),
            })
        }
    };
    let Some(body) = body else { return };
    let body = match exchange.take_tunnel(body) {
        Ok(tunnel) => return exchange.relay(tunnel).await,
        Err(body) => body,
    };
    let is_complete = exchange.send(body).await;
    if is_malformed {
        exchange.handle.reset_malformed();
    } else if is_complete && !exchange.handle.has_received_end() {
        discard(&exchange.handle).await;
    }
}

/// Reads and discards the rest of a request, for a bounded time. The handle then resets the stream
/// with NO_ERROR if the client has not ended it.
async fn discard(handle: &Handle) {
    handle.discard_upload();
    let mut deadline = ResettableDeadline::after(DISCARD_TIMEOUT);
    poll_fn(|cx| {
        if handle.poll_discarded(cx, DISCARDED_MAX).is_ready() || handle.poll_reset(cx).is_ready() {
            return Poll::Ready(());
        }
        deadline.poll(cx)
    })
    .await;
}

/// The request of a stream and what is known of its response.
struct StreamExchange {
    shared: Rc<StreamContext>,
    snapshot: Arc<Snapshot>,
    arrival: Arrival,
    /// Taken when the exchange is dropped.
    buffers: Option<Box<ExchangeBuffers>>,
    /// Taken when the response ends; `None` for a refused head.
    in_flight: Option<InFlightRequest>,
    /// The response tells that the upload was ended.
    tells_stall: bool,
    is_reported: bool,
    handle: Handle,
}

/// Why a response was not sent to its end.
enum ResponseAbort {
    ClientClosed,
    ClientTimeout,
    /// The connection has no memory for the head.
    Memory,
    /// The upstream did not read the request.
    Stalled,
    Source(BodyError),
}

impl StreamExchange {
    fn buffers(&mut self) -> &mut ExchangeBuffers {
        self.buffers.as_mut().expect("taken by drop only")
    }

    /// Runs the pipeline. `None`: the client reset the stream.
    async fn respond(&mut self) -> Option<ResponseBody<'static>> {
        let snapshot = Arc::clone(&self.snapshot);
        let limits = &snapshot.http;
        if http2::may_be_bodiless(&self.buffers().request) {
            match self.first_data(limits).await {
                Ok(true) => self.buffers().request.length = BodyLength::Empty,
                Ok(false) => {}
                Err(BodyError::Timeout(_)) => return Some(self.refuse(RequestRefusal::BodyTimeout)),
                Err(_) => return None,
            }
            let request = &self.buffers().request;
            if limits.refuses_body(&request.method, request.length) {
                return Some(self.refuse(RequestRefusal::BodyOfGet));
            }
        } else if self.handle.upload().is_some_and(|upload| upload.is_complete_and_empty())
            && self.buffers().request.length == BodyLength::Streamed
        {
            // Another method may wait for its response before it sends its body.
            self.buffers().request.length = BodyLength::Empty;
        }
        let StreamExchange { shared, snapshot, arrival, buffers, handle, .. } = self;
        let buffers = buffers.as_mut().expect("taken by drop only");
        let request = &buffers.request;
        let body = match (request.length, handle.upload()) {
            (BodyLength::Empty | BodyLength::Known(0), _) | (_, None) => RequestBody::Empty,
            (_, Some(upload)) => RequestBody::H2(Box::new(Http2RequestBody::new(upload, limits, request))),
        };
        let interim = request.interim.share();
        let handled = {
            let mut handling = pin!(async {
                let mut request_context = RequestContext::new(&shared.worker.worker, snapshot, arrival, buffers);
                match request_context.admit() {
                    Some(ended) => ended,
                    None => request_context.handle(body).await,
                }
            });
            poll_fn(|cx| {
                // Not polled again: a part of the request is missing.
                if handle.is_stalled() {
                    return Poll::Ready(None);
                }
                let polled = poll_catch(handling.as_mut(), cx);
                send_interim(&interim, handle);
                match polled {
                    Poll::Ready(handled) => Poll::Ready(Some(handled)),
                    Poll::Pending => handle.poll_reset(cx).map(|()| None),
                }
            })
            .await
        };
        if handled.is_none() && handle.is_stalled() && !handle.is_reset() {
            return Some(self.tell_stall());
        }
        let handled = handled.filter(|_| buffers.record.failure != Some(ErrorKind::ClientGone));
        let mut body = handled?.unwrap_or_else(|_panic| {
            count_abort(AbortReason::Panic);
            pipeline::panicked(snapshot, buffers)
        });
        body.unpack_head(&mut buffers.response);
        Some(body)
    }

    /// Waits for the first bytes of a request that announces no body. Returns whether it has none.
    async fn first_data(&self, limits: &HttpLimits) -> Result<bool, BodyError> {
        let Some(upload) = self.handle.upload() else { return Ok(true) };
        let mut clock = ClientClock::new(limits);
        poll_fn(|cx| {
            if let Poll::Ready(first) = upload.poll_first(cx) {
                return Poll::Ready(first);
            }
            tasks::set_waiting_for(TaskWait::ClientBody);
            clock.poll(cx).map(|()| Err(BodyError::Timeout(ExchangeTimeout::ClientBody)))
        })
        .await
    }

    /// Answers a request whose announced body is too large for any route.
    fn refuse_body(&mut self) -> ResponseBody<'static> {
        let StreamExchange { shared, snapshot, arrival, buffers, .. } = self;
        let buffers = buffers.as_mut().expect("taken by drop only");
        RequestContext::new(&shared.worker.worker, snapshot, arrival, buffers).refuse_body()
    }

    fn refuse(&mut self, refusal: RequestRefusal) -> ResponseBody<'static> {
        let (snapshot, shared) = (Arc::clone(&self.snapshot), Rc::clone(&self.shared));
        let ExchangeBuffers { request, response, record, .. } = self.buffers();
        *record = refused(refusal, (request, &shared.peer), &snapshot);
        let page = degrade::write_refusal(refusal, record.request_id.as_ref(), response);
        if grpc::is_call(request) {
            degrade::make_grpc(refusal.reason(), response);
            return ResponseBody::EMPTY;
        }
        ResponseBody::Bytes(page)
    }

    /// Answers a call of gRPC whose upload was ended.
    fn tell_stall(&mut self) -> ResponseBody<'static> {
        self.tells_stall = true;
        let ExchangeBuffers { response, record, .. } = self.buffers();
        *record = pipeline::client_closed(record);
        degrade::write_unavailable_call(AbortReason::UploadStalled.as_str(), response);
        ResponseBody::EMPTY
    }

    /// Sends head and body, and reports the exchange. Returns whether the response is complete, or
    /// ends with the status of its failure.
    async fn send(&mut self, body: ResponseBody<'static>) -> bool {
        let snapshot = Arc::clone(&self.snapshot);
        let StreamExchange { handle, buffers, tells_stall, .. } = self;
        let is_stalled = |handle: &Handle| handle.is_stalled() && !*tells_stall;
        let ExchangeBuffers { request, response, .. } = &mut **buffers.as_mut().expect("taken by drop only");
        let remaining = match response.length {
            _ if is_bodiless(&request.method, response.status) => Some(0),
            BodyLength::Empty => Some(0),
            BodyLength::Known(length) => Some(length),
            BodyLength::Streamed | BodyLength::UntilClose => None,
        };
        if body.complete_body().is_some() {
            handle.return_read_grant();
        }
        if !handle.account_head(response) {
            handle.reset(Http2ErrorCode::EnhanceYourCalm);
            self.report(Err(ResponseAbort::Memory));
            return false;
        }
        let mut watch = ReadWatch::new(&snapshot.http, handle);
        let room = poll_fn(|cx| match handle.poll_room(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending if is_stalled(handle) => Poll::Ready(Err(ResponseAbort::Stalled)),
            // The client does not read the bytes of other streams either.
            Poll::Pending => watch.poll_connection(cx, handle).map(|()| Err(ResponseAbort::ClientTimeout)),
        });
        if let Err(late) = room.await {
            if let ResponseAbort::Stalled = late {
                handle.reset(Http2ErrorCode::Internal);
            } else {
                pipeline::count_timeout(ExchangeTimeout::ClientRead);
                handle.reset(Http2ErrorCode::Cancel);
            }
            drop(body);
            self.report(Err(late));
            return false;
        }
        handle.begin_response(response, body, remaining);
        let is_grpc = grpc::is_call(request) && grpc::is_grpc(&response.fields);
        if handle.release_head() {
            response.fields = Fields::default();
        }
        let mut watch = ReadWatch::new(&snapshot.http, handle);
        let ended = poll_fn(|cx| {
            // The response is not polled again: a part of the request is missing.
            if is_stalled(handle) {
                return Poll::Ready(Err(ResponseAbort::Stalled));
            }
            match handle.poll_body(cx) {
                Poll::Ready(ended) => Poll::Ready(ended.map_err(|end| match end {
                    ResponseEnd::ClientClosed => ResponseAbort::ClientClosed,
                    ResponseEnd::Source(error) => ResponseAbort::Source(error),
                })),
                Poll::Pending => watch.poll(cx, handle).map(|()| Err(ResponseAbort::ClientTimeout)),
            }
        })
        .await;
        let ended = ended.and(if *tells_stall { Err(ResponseAbort::Stalled) } else { Ok(()) });
        let mut has_status = false;
        match &ended {
            Ok(()) => {}
            Err(ResponseAbort::ClientTimeout) => {
                pipeline::count_timeout(ExchangeTimeout::ClientRead);
                handle.reset(Http2ErrorCode::Cancel);
            }
            Err(ResponseAbort::ClientClosed | ResponseAbort::Memory) => {}
            Err(ResponseAbort::Stalled) if *tells_stall => has_status = true,
            Err(ResponseAbort::Stalled) => {
                let reason = AbortReason::UploadStalled.as_str();
                has_status = is_grpc && end_with_status(handle, GrpcStatus::Unavailable, reason);
                if !has_status {
                    handle.reset(Http2ErrorCode::Internal);
                }
            }
            Err(ResponseAbort::Source(error)) => {
                let reason = Error::from(error).reason();
                has_status = is_grpc && end_with_status(handle, error.grpc_status(), reason);
                if !has_status {
                    handle.reset(Http2ErrorCode::Internal);
                }
            }
        }
        drop(handle.take_body());
        let is_ended = ended.is_ok() || has_status;
        self.report(ended);
        is_ended
    }

    /// The tunnel that the response begins, or the body of the response.
    fn take_tunnel(&mut self, body: ResponseBody<'static>) -> Result<Tunnel, ResponseBody<'static>> {
        let ExchangeBuffers { request, response, .. } = self.buffers();
        // `pipeline` lets no other response with such a status pass.
        let is_tunnel = hop::is_extended_connect(request) && response.status.is_success();
        if is_tunnel { body.into_tunnel().ok_or(ResponseBody::EMPTY) } else { Err(body) }
    }

    /// Relays bytes in both directions until both sides have ended, one fails, or no byte is
    /// transferred for the idle timeout.
    async fn relay(mut self, tunnel: Tunnel) {
        count_upgrade();
        let began = Instant::now();
        let handled_in = self.in_flight.take().map_or(Duration::ZERO, InFlightRequest::end);
        let idle_timeout = self.snapshot.http.idle_timeout;
        let StreamExchange { handle, buffers, .. } = &self;
        let ExchangeBuffers { response, .. } = &**buffers.as_ref().expect("taken by drop only");
        poll_fn(|cx| handle.poll_room(cx)).await;
        let Tunnel { connection, mut in_flight } = tunnel;
        let (mut up, down) = http2::tunnel(*connection, handle.upload());
        handle.begin_response(response, ResponseBody::Tunnel(Box::new(down)), None);
        let mut relay = TunnelRelay::new(idle_timeout);
        let is_clean = poll_fn(|cx| relay.poll(cx, &mut up, handle)).await;
        if !is_clean && !relay.has_sent_end {
            handle.reset(Http2ErrorCode::Cancel);
        }
        drop(handle.take_body());
        let bytes = handle.sent_bytes();
        in_flight.add_received(bytes);
        in_flight.set_sent(handle.upload().map_or(0, |upload| upload.arrived_bytes()));
        self.is_reported = true;
        let ended_by = self.ended_by();
        let StreamExchange { shared, snapshot, arrival, buffers, .. } = &mut self;
        let buffers = buffers.as_mut().expect("taken by drop only");
        if let Some(reason) = ended_by.filter(|_| !is_clean) {
            count_abort(reason);
            buffers.record.aborted = reason.as_str();
            buffers.record.blame = Some(reason.blame());
        }
        let duration = handled_in + began.elapsed();
        let peer = &arrival.peer;
        CompletedExchange { snapshot, peer, buffers, bytes, request_bytes: 0, duration }.report(&shared.worker);
    }

    /// Bytes of the request's body: those that were announced, or those that have arrived.
    fn request_bytes(&self) -> u64 {
        match self.buffers.as_ref().map(|buffers| buffers.request.length) {
            Some(BodyLength::Known(length)) => length,
            Some(BodyLength::Streamed) => self.handle.upload().map_or(0, |upload| upload.arrived_bytes()),
            _ => 0,
        }
    }

    /// Why the gateway has ended the connection, or the stream.
    fn ended_by(&self) -> Option<AbortReason> {
        self.shared.ended_by.get().or(self.handle.is_stalled().then_some(AbortReason::UploadStalled))
    }

    /// Reports the exchange, whose response has ended in whichever way.
    fn report(&mut self, ended: Result<(), ResponseAbort>) {
        self.is_reported = true;
        let duration = self.in_flight.take().map_or(Duration::ZERO, InFlightRequest::end);
        let (bytes, request_bytes) = (self.handle.sent_bytes(), self.request_bytes());
        let ended_by = self.ended_by();
        let StreamExchange { shared, snapshot, arrival, buffers, .. } = self;
        let buffers = buffers.as_mut().expect("taken by drop only");
        if let Err(abort) = ended {
            let (reason, blame) = match (&abort, ended_by) {
                (ResponseAbort::ClientClosed, Some(reason)) => (reason, reason.blame()),
                _ => (abort.reason(), abort.blame()),
            };
            count_abort(reason);
            buffers.record.aborted = reason.as_str();
            buffers.record.blame = Some(blame);
        }
        let peer = &arrival.peer;
        CompletedExchange { snapshot, peer, buffers, bytes, request_bytes, duration }.report(&shared.worker);
    }
}

impl Drop for StreamExchange {
    fn drop(&mut self) {
        let request_bytes = self.request_bytes();
        let Some(mut buffers) = self.buffers.take() else { return };
        if !self.is_reported {
            let duration = self.in_flight.take().map_or(Duration::ZERO, InFlightRequest::end);
            let is_stalled = self.handle.is_stalled();
            buffers.record.refusal = self.handle.upload_fault().filter(|_| !is_stalled);
            let exchange = (&self.arrival.peer, &mut *buffers);
            let counted = (duration, request_bytes);
            let reason = self.ended_by().unwrap_or(AbortReason::ClientClosed);
            report_ended(&self.shared.worker, &self.snapshot, exchange, counted, reason);
        }
        self.shared.return_buffers(buffers);
    }
}

/// Ends the response to a call of gRPC that has failed with a status in trailers. False if the
/// response cannot have trailers.
fn end_with_status(handle: &Handle, status: GrpcStatus, reason: &str) -> bool {
    let mut trailers = Fields::default();
    status.write(reason, &mut trailers);
    handle.end_with_trailers(&trailers)
}

impl ResponseAbort {
    fn reason(&self) -> AbortReason {
        match self {
            ResponseAbort::ClientClosed => AbortReason::ClientClosed,
            ResponseAbort::ClientTimeout => AbortReason::ClientTimeout,
            ResponseAbort::Memory => AbortReason::Memory,
            ResponseAbort::Stalled => AbortReason::UploadStalled,
            ResponseAbort::Source(error) => AbortReason::of(error),
        }
    }

    fn blame(&self) -> Blame {
        match self {
            ResponseAbort::ClientClosed | ResponseAbort::ClientTimeout | ResponseAbort::Memory => Blame::Client,
            ResponseAbort::Stalled => AbortReason::UploadStalled.blame(),
            ResponseAbort::Source(error) => error.blame(),
        }
    }
}

/// Watches a client that has to read a response.
struct ReadWatch {
    clock: ClientClock,
    sent: u64,
    sent_on_connection: u64,
}

impl ReadWatch {
    fn new(limits: &HttpLimits, handle: &Handle) -> Self {
        ReadWatch { clock: ClientClock::new(limits), sent: 0, sent_on_connection: handle.sent_on_connection() }
    }

    /// Ready when the client reads nothing of the connection, or too little.
    fn poll_connection(&mut self, cx: &mut Context<'_>, handle: &Handle) -> Poll<()> {
        tasks::set_waiting_for(TaskWait::ClientRead);
        loop {
            let sent = handle.sent_on_connection();
            let progress = sent - std::mem::replace(&mut self.sent_on_connection, sent);
            if progress == 0 {
                return self.clock.poll(cx);
            }
            self.clock.record_progress(usize::try_from(progress).unwrap_or(usize::MAX));
            ready!(self.clock.poll(cx));
        }
    }

    /// Ready when the client is late: it allows no byte of this response, or reads nothing at all.
    /// A response that waits for its turn is not late while others are sent.
    fn poll(&mut self, cx: &mut Context<'_>, handle: &Handle) -> Poll<()> {
        if !handle.is_waiting_for_client() {
            tasks::set_waiting_for(TaskWait::UpstreamBody);
            self.clock.record_progress(0);
            return Poll::Pending;
        }
        tasks::set_waiting_for(TaskWait::ClientRead);
        loop {
            let (sent, on_connection) = (handle.sent_bytes(), handle.sent_on_connection());
            let progress = match handle.is_stream_window_closed() {
                true => sent - self.sent,
                false => on_connection - self.sent_on_connection,
            };
            (self.sent, self.sent_on_connection) = (sent, on_connection);
            if progress == 0 {
                return self.clock.poll(cx);
            }
            self.clock.record_progress(usize::try_from(progress).unwrap_or(usize::MAX));
            ready!(self.clock.poll(cx));
        }
    }
}

/// The progress of a tunnel.
struct TunnelRelay {
    idle_timeout: Duration,
    idle: ResettableDeadline,
    /// Runs instead while bytes wait for the upstream: a silent tunnel is not woken for checks.
    write_timer: WriteTimer,
    progress: (u64, u64),
    has_sent_end: bool,
}

impl TunnelRelay {
    fn new(idle_timeout: Duration) -> Self {
        TunnelRelay {
            idle_timeout,
            idle: ResettableDeadline::after(idle_timeout),
            write_timer: WriteTimer::new(idle_timeout),
            progress: (0, 0),
            has_sent_end: false,
        }
    }

    /// Ready when the tunnel is over. Returns whether both sides have ended it.
    fn poll(&mut self, cx: &mut Context<'_>, up: &mut http2::TunnelUpload, handle: &Handle) -> Poll<bool> {
        loop {
            let sent = up.poll(cx);
            if !self.has_sent_end {
                match handle.poll_body(cx) {
                    Poll::Ready(Ok(())) => self.has_sent_end = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(false),
                    Poll::Pending => {}
                }
            }
            // Bytes that wait for their turn are not late while others are sent.
            let waits_for_turn = handle.is_waiting_for_client() && !handle.is_window_closed();
            let down = if waits_for_turn { handle.sent_on_connection() } else { handle.sent_bytes() };
            if std::mem::replace(&mut self.progress, (up.bytes(), down)) != (up.bytes(), down) {
                self.idle.restart(self.idle_timeout);
                self.write_timer.restart();
            }
            match sent {
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Ready(Ok(())) if self.has_sent_end => return Poll::Ready(true),
                _ => {}
            }
            if self.has_sent_end && handle.poll_reset(cx).is_ready() {
                return Poll::Ready(false);
            }
            if !up.is_blocked() {
                return self.idle.poll(cx).map(|()| false);
            }
            ready!(self.write_timer.poll_check(cx));
            match up.write_unready() {
                Err(_) => return Poll::Ready(false),
                Ok(true) => self.write_timer.record_accepted(),
                Ok(false) if self.write_timer.record_blocked() => return Poll::Ready(false),
                Ok(false) => {}
            }
        }
    }
}

fn send_interim(interim: &InterimResponses, handle: &Handle) {
    while let Some(mut response) = interim.take() {
        hop::strip(&mut response.fields);
        handle.send_interim(&response);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<F: Future>(_: fn(StreamStart) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn stream_is_small() {
        // A connection may have a hundred, and each keeps its whole size until its response has
        // ended. Without optimisation it is larger.
        let bytes = size_of_future(serve);
        assert!(bytes <= 4_096, "{bytes}");
    }
}
