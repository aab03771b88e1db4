//! One HTTP/2 stream, from its request to the end of its response.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use tokio::time::Instant;

use super::stream_context::{StreamContext, StreamGuard};
use crate::http::HttpLimits;
use crate::http::body::{BodyError, BodySource as _};
use crate::http::deadline::ResettableDeadline;
use crate::http::exchange_clock::{Blame, ExchangeTimeout};
use crate::http::h2::{self as http2, ClientClock, DataChunk, Http2RequestBody, SharedRecvStream};
use crate::http::message::{BodyLength, InterimResponses, StatusCode, is_bodiless};
use crate::http::refusal::RequestRefusal;
use crate::http::request_body::RequestBody;
use crate::metrics::Label as _;
use crate::panics::poll_catch;
use crate::pipeline::{self, Arrival, ExchangeBuffers, RequestContext, ResponseBody, Snapshot};
use crate::serve::accounting::{
    AbortReason, CompletedExchange, InFlightRequest, count_abort, refused, report_client_closed,
};
use crate::{degrade, hop};

/// Bytes of one DATA frame: the largest frame that every client accepts.
const FRAME_MAX: usize = 16 << 10;
/// How long and how many bytes a client may still send of its request after the response has ended.
/// A reset at once would destroy the response in some clients.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
const DISCARDED_MAX: usize = 1 << 20;

/// Serves one stream.
pub(super) async fn serve(guard: StreamGuard, request: http::Request<RecvStream>, respond: SendResponse<DataChunk>) {
    let shared = Rc::clone(&guard.shared);
    let (parts, incoming) = request.into_parts();
    let incoming = Rc::new(RefCell::new(incoming));
    let mut exchange = StreamExchange::begin(&shared);
    let mut respond = respond;
    let Some(body) = exchange.respond(parts, &incoming, &mut respond).await else { return };
    let sending = Sending { exchange, respond, body };
    let Some(mut stream) = sending.send().await else { return };
    if !incoming.borrow().is_end_stream() {
        discard(&incoming, &mut stream).await;
    }
    // Without a handle to the stream, `h2` resets it with NO_ERROR once its last frame has left, if
    // the client has not ended it.
    drop((stream, incoming, guard));
}

/// Reads and discards the rest of a request, for a bounded time.
async fn discard(incoming: &SharedRecvStream, stream: &mut SendStream<DataChunk>) {
    let mut deadline = ResettableDeadline::after(DISCARD_TIMEOUT);
    let mut discarded = 0;
    poll_fn(|cx| {
        let incoming = &mut *incoming.borrow_mut();
        while let Poll::Ready(data) = incoming.poll_data(cx) {
            let Some(Ok(data)) = data else { return Poll::Ready(()) };
            discarded += data.len();
            let _window_is_opened = incoming.flow_control().release_capacity(data.len());
            if discarded > DISCARDED_MAX {
                return Poll::Ready(());
            }
        }
        if stream.poll_reset(cx).is_ready() {
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
    buffers: Box<ExchangeBuffers>,
    /// Taken when the response ends.
    in_flight: Option<InFlightRequest>,
}

impl StreamExchange {
    fn begin(shared: &Rc<StreamContext>) -> Self {
        let snapshot = shared.worker.snapshot.load_full();
        let arrival = Arrival { peer: shared.peer.clone(), at: Instant::now().into_std() };
        let in_flight = Some(InFlightRequest::begin(arrival.at));
        StreamExchange { shared: Rc::clone(shared), snapshot, arrival, buffers: Box::default(), in_flight }
    }

    /// Reads the head and runs the pipeline. `None`: the client reset the stream.
    #[expect(clippy::too_many_arguments, reason = "a stream as `h2` gives it")]
    async fn respond(
        &mut self,
        parts: http::request::Parts,
        incoming: &SharedRecvStream,
        respond: &mut SendResponse<DataChunk>,
    ) -> Option<ResponseBody<'static>> {
        let snapshot = Arc::clone(&self.snapshot);
        let limits = &snapshot.http;
        let mut has_ended = incoming.borrow().is_end_stream();
        let mut received = Bytes::new();
        if !has_ended && http2::may_be_bodiless(&parts) {
            match first_data(incoming, limits).await {
                FirstData::None => has_ended = true,
                FirstData::Received(data) => received = data,
                FirstData::Failed => return None,
                FirstData::TimedOut => return Some(self.refuse(RequestRefusal::BodyTimeout)),
            }
        }
        if let Err(refusal) = http2::read_head(&parts, has_ended, limits, &mut self.buffers.request) {
            return Some(self.refuse(refusal));
        }
        drop(parts);
        let request = &mut self.buffers.request;
        request.scheme = self.shared.scheme;
        let body = match request.length {
            BodyLength::Empty => RequestBody::Empty,
            _ => RequestBody::H2(Box::new(Http2RequestBody::new((incoming, received), limits, request))),
        };
        let interim = request.interim.share();
        let StreamExchange { shared, snapshot, arrival, buffers, .. } = self;
        let handled = {
            let mut handling = pin!(async {
                let mut request_context = RequestContext::new(&shared.worker.worker, snapshot, arrival, buffers);
                match request_context.admit() {
                    Some(ended) => ended,
                    None => request_context.handle(body).await,
                }
            });
            poll_fn(|cx| {
                let polled = poll_catch(handling.as_mut(), cx);
                send_interim(&interim, respond);
                match polled {
                    Poll::Ready(handled) => Poll::Ready(Some(handled)),
                    Poll::Pending => respond.poll_reset(cx).map(|_| None),
                }
            })
            .await
        };
        let mut body = handled?.unwrap_or_else(|_panic| {
            count_abort(AbortReason::Panic);
            pipeline::panicked(snapshot, buffers)
        });
        body.unpack_head(&mut buffers.response);
        Some(body)
    }

    fn refuse(&mut self, refusal: RequestRefusal) -> ResponseBody<'static> {
        let ExchangeBuffers { request, response, record, .. } = &mut *self.buffers;
        *record = refused(refusal, request);
        ResponseBody::Bytes(degrade::write_refusal(refusal.status(), refusal.reason(), response))
    }

    /// Reports the exchange, whose response has ended in whichever way.
    fn report(&mut self, ended: Result<(), ResponseAbort>, bytes: u64) {
        let Some(in_flight) = self.in_flight.take() else { return };
        let record = &mut self.buffers.record;
        if let Err(abort) = ended {
            let reason = abort.reason();
            count_abort(reason);
            record.aborted = reason.as_str();
            record.blame = Some(abort.blame());
        }
        let duration = in_flight.end();
        let peer = &self.arrival.peer;
        CompletedExchange { snapshot: &self.snapshot, peer, buffers: &self.buffers, bytes, duration }
            .report(&self.shared.worker);
    }
}

impl Drop for StreamExchange {
    fn drop(&mut self) {
        if let Some(in_flight) = self.in_flight.take() {
            let exchange = (&self.arrival.peer, &mut *self.buffers);
            report_client_closed(&self.shared.worker, &self.snapshot, exchange, in_flight.end());
        }
    }
}

fn send_interim(interim: &InterimResponses, respond: &mut SendResponse<DataChunk>) {
    while let Some(mut response) = interim.take() {
        hop::strip(&mut response.fields);
        // If the stream is over, the final response fails too.
        if let Ok(head) = http2::write_head(&response) {
            let _sent_or_over = respond.send_informational(head);
        }
    }
}

/// The first DATA frame of a request that announces no body.
enum FirstData {
    /// The stream ended.
    None,
    Received(Bytes),
    Failed,
    TimedOut,
}

async fn first_data(incoming: &SharedRecvStream, limits: &HttpLimits) -> FirstData {
    let mut clock = ClientClock::new(limits);
    poll_fn(|cx| {
        let mut incoming = incoming.borrow_mut();
        loop {
            return Poll::Ready(match incoming.poll_data(cx) {
                Poll::Pending => {
                    ready!(clock.poll(cx));
                    FirstData::TimedOut
                }
                Poll::Ready(None) => FirstData::None,
                Poll::Ready(Some(Err(_))) => FirstData::Failed,
                Poll::Ready(Some(Ok(data))) if data.is_empty() => continue,
                Poll::Ready(Some(Ok(data))) => FirstData::Received(data),
            });
        }
    })
    .await
}

/// Why a response was not sent to its end.
enum ResponseAbort {
    ClientClosed,
    ClientTimeout,
    Source(BodyError),
}

impl ResponseAbort {
    fn reason(&self) -> AbortReason {
        match self {
            ResponseAbort::ClientClosed => AbortReason::ClientClosed,
            ResponseAbort::ClientTimeout => AbortReason::ClientTimeout,
            ResponseAbort::Source(error) => AbortReason::of(error),
        }
    }

    fn blame(&self) -> Blame {
        match self {
            ResponseAbort::ClientClosed | ResponseAbort::ClientTimeout => Blame::Client,
            ResponseAbort::Source(error) => error.blame(),
        }
    }

    /// The code of the reset that ends the stream.
    fn code(&self) -> Reason {
        match self {
            ResponseAbort::ClientClosed | ResponseAbort::ClientTimeout => Reason::CANCEL,
            ResponseAbort::Source(_) => Reason::INTERNAL_ERROR,
        }
    }
}

/// A response that is to be sent.
struct Sending {
    exchange: StreamExchange,
    respond: SendResponse<DataChunk>,
    body: ResponseBody<'static>,
}

impl Sending {
    /// Sends head and body, and reports the exchange. Returns the stream after a complete response.
    async fn send(self) -> Option<SendStream<DataChunk>> {
        let Sending { mut exchange, mut respond, mut body } = self;
        if let Some(error) = poll_fn(|cx| Poll::Ready(first_error(&mut body, cx))).await {
            // No byte was sent yet.
            body = pipeline::body_failed(&exchange.snapshot, &mut exchange.buffers, &error);
        }
        let ExchangeBuffers { request, response, .. } = &*exchange.buffers;
        let length = if is_bodiless(&request.method, response.status) { BodyLength::Empty } else { response.length };
        let remaining = match length {
            BodyLength::Empty => Some(0),
            BodyLength::Known(length) => Some(length),
            BodyLength::Streamed | BodyLength::UntilClose => None,
        };
        let head = http2::write_head(response).unwrap_or_else(|error| {
            tracing::warn!(%error, "response head is not valid in HTTP/2");
            let mut plain = http::Response::new(());
            *plain.status_mut() = StatusCode::BAD_GATEWAY;
            plain
        });
        let remaining = if head.status() == response.status { remaining } else { Some(0) };
        let Ok(stream) = respond.send_response(head, remaining == Some(0)) else { return None };
        drop(respond);
        let limits = &exchange.snapshot.http;
        let clock = ClientClock::new(limits);
        let shared = Rc::clone(&exchange.shared);
        let mut sender = BodySender { stream, shared: &shared, remaining, clock, bytes: 0 };
        let ended = match remaining {
            Some(0) => Ok(()),
            _ => poll_fn(|cx| sender.poll_send(cx, &mut body)).await,
        };
        let BodySender { mut stream, bytes, .. } = sender;
        let is_complete = ended.is_ok();
        match &ended {
            Ok(()) => shared.transport.record_response(),
            Err(abort) => {
                if let ResponseAbort::ClientTimeout = abort {
                    pipeline::count_timeout(ExchangeTimeout::ClientRead);
                }
                stream.send_reset(abort.code());
            }
        }
        drop(body);
        exchange.report(ended, bytes);
        is_complete.then_some(stream)
    }
}

/// The error of a body that fails before its first byte.
fn first_error(body: &mut ResponseBody<'static>, cx: &mut Context<'_>) -> Option<BodyError> {
    match body.poll_fill(cx) {
        Poll::Ready(Err(error)) => Some(error),
        _ => None,
    }
}

/// Sends a body as its client grants capacity.
struct BodySender<'a> {
    stream: SendStream<DataChunk>,
    shared: &'a StreamContext,
    /// Bytes that the head announces and that are not sent.
    remaining: Option<u64>,
    clock: ClientClock,
    bytes: u64,
}

impl BodySender<'_> {
    fn poll_send(&mut self, cx: &mut Context<'_>, body: &mut ResponseBody<'static>) -> Poll<Result<(), ResponseAbort>> {
        loop {
            match body.poll_fill(cx) {
                Poll::Pending => {
                    self.clock.record_progress(0);
                    return self.poll_client_closed(cx);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(ResponseAbort::Source(error))),
                Poll::Ready(Ok(())) => {}
            }
            let available = body.data().len();
            if available == 0 {
                return Poll::Ready(self.end(body));
            }
            let allowed = self.remaining.map_or(FRAME_MAX, |left| usize::try_from(left).unwrap_or(FRAME_MAX));
            let wanted = available.min(allowed).min(FRAME_MAX);
            if self.shared.budget.poll_room(cx).is_pending() || self.poll_capacity(cx, wanted).is_pending() {
                if self.clock.poll(cx).is_ready() {
                    return Poll::Ready(Err(ResponseAbort::ClientTimeout));
                }
                return self.poll_client_closed(cx);
            }
            let data = body.take_bytes(wanted.min(self.stream.capacity()));
            self.bytes += data.len() as u64;
            self.clock.record_progress(data.len());
            if let Some(left) = &mut self.remaining {
                *left -= data.len() as u64;
            }
            let is_last = self.remaining == Some(0);
            self.shared.transport.record_data_frame();
            if self.stream.send_data(DataChunk::new(data, &self.shared.budget), is_last).is_err() {
                return Poll::Ready(Err(ResponseAbort::ClientClosed));
            }
            if is_last {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Ready when the client allows at least one byte. Registers the task to be woken.
    fn poll_capacity(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<()> {
        self.stream.reserve_capacity(wanted);
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                // The stream is over, which `send_data` reports.
                None | Some(Err(_)) => return Poll::Ready(()),
            }
        }
        Poll::Ready(())
    }

    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResponseAbort>> {
        self.stream.poll_reset(cx).map(|_| Err(ResponseAbort::ClientClosed))
    }

    /// Ends the stream after the last byte, with trailers if there are any.
    fn end(&mut self, body: &ResponseBody<'static>) -> Result<(), ResponseAbort> {
        if self.remaining.is_some() {
            return Err(ResponseAbort::Source(BodyError::Truncated));
        }
        let trailers = body.trailers().and_then(|trailers| http2::write_fields(trailers).ok());
        let sent = match trailers {
            Some(trailers) => self.stream.send_trailers(trailers),
            None => self.stream.send_data(DataChunk::new(Bytes::new(), &self.shared.budget), true),
        };
        sent.map_err(|_| ResponseAbort::ClientClosed)
    }
}
