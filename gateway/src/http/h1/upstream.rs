//! An HTTP/1.1 connection to an upstream: sends one request, reads one response, and is reused only
//! when both ended cleanly.
//!
//! The request body is sent while the response is read, so neither side can block the other (full
//! duplex). Every wait is for one step of one side, and only its clock runs (`ExchangeClock`). A
//! connection with an incomplete message, with unsolicited bytes or with a framing error is never
//! reused.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use http::Method;

use super::chunk::{ChunkDecoder, DecodeStep};
use super::response;
use super::scan::{HeadScanner, ScanResult};
use super::send::{self, MessageWriter, SendError};
use crate::http::attempt::{
    CLIENT_STOPPED, INTERIM_MAX, RequestState, UpstreamAttempt, UpstreamConnectionError, is_event_stream,
};
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::{ReadBuffer, ReadSize};
use crate::http::exchange_body::{self, ClockEnd, ExchangeBody};
use crate::http::exchange_clock::{AwaitedStep, ClockEvent, ExchangeClock};
use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::message::{BodyLength, HttpVersion, Request, Response, StatusCode, is_bodiless};
use crate::http::text;
use crate::http::tls_fault::TlsFault;
use crate::http::transport::TransportStream;
use crate::http::websocket;

/// Maximum bytes of a response head; a larger one is refused.
const HEAD_MAX: usize = 64 << 10;
/// Fields that are written from `Request` instead of its field lines; and `Trailer`, which only
/// servers of HTTP/2 need.
const REWRITTEN: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Host,
    KnownField::ContentLength,
    KnownField::TransferEncoding,
    KnownField::Trailer,
]);

/// Framing and progress of the current response body: bytes left, the chunk decoder with the bytes
/// `ready` in the buffer, or the end of the connection.
#[derive(Debug)]
enum ResponseBodyState {
    Length { remaining: u64 },
    Chunked { decoder: ChunkDecoder, ready: usize },
    UntilClose,
    Done,
}

/// Progress of reading the head of the final response.
#[derive(Default)]
struct HeadProgress {
    scanner: HeadScanner,
    /// Whether the caller knows that the request was sent.
    is_sent_reported: bool,
    /// Interim responses read before it.
    interim_count: usize,
}

/// A connection to an upstream, idle or in an exchange.
pub(crate) struct Http1UpstreamConnection {
    io: TransportStream,
    buffer: ReadBuffer,
    writer: MessageWriter,
    clock: ExchangeClock,
    body: ResponseBodyState,
    trailers: Option<Box<Fields>>,
    reusable: bool,
    /// Whether the connection served an exchange before. Its server may then have closed it in the
    /// meantime.
    is_reused: bool,
    /// Whether the response is a stream of events, which may be silent.
    is_event_stream: bool,
    request_state: RequestState,
    /// Whether a byte of the current request was given to the system.
    has_sent: bool,
    /// Whether an interim response of the current exchange was passed on.
    has_passed_interim: bool,
}

impl Http1UpstreamConnection {
    /// A connection that is open.
    pub(crate) fn new(io: TransportStream) -> Http1UpstreamConnection {
        Http1UpstreamConnection {
            io,
            buffer: ReadBuffer::default(),
            writer: MessageWriter::new(),
            clock: ExchangeClock::new(),
            body: ResponseBodyState::Done,
            trailers: None,
            reusable: true,
            is_reused: false,
            is_event_stream: false,
            request_state: RequestState::Sent,
            has_sent: false,
            has_passed_interim: false,
        }
    }

    /// Whether no byte of the current request was given to the system.
    pub(crate) fn is_request_unsent(&self) -> bool {
        !self.has_sent
    }

    /// Whether an idle connection is open according to the system, which may know of its end before
    /// the event loop does.
    pub(crate) fn is_open(&self) -> bool {
        !self.io.is_closed_by_peer()
    }

    pub(crate) fn has_passed_interim(&self) -> bool {
        self.has_passed_interim
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.is_reused
    }

    /// Sends the request of `attempt` and reads the response head. Its timeouts cover the response
    /// body too. Not cancel safe: a connection whose exchange was dropped is not reusable.
    ///
    /// # Errors
    /// After `NoResponse` a request that is safe to repeat may be sent again on another connection.
    /// All other errors are final.
    pub(crate) async fn exchange(&mut self, attempt: &mut UpstreamAttempt<'_>) -> Result<(), UpstreamConnectionError> {
        let UpstreamAttempt { request, body, response, timeouts, total_at, on_request_sent, .. } = attempt;
        self.clock.begin(*timeouts, *total_at);
        self.reusable = false;
        self.is_event_stream = false;
        self.request_state = RequestState::Sending;
        self.has_sent = false;
        self.has_passed_interim = false;
        self.buffer.set_read_size(request.read_size);
        self.write_head(request);
        let mut progress = HeadProgress::default();
        poll_fn(|cx| {
            loop {
                let polled = self.poll_head(cx, &mut **body, &mut progress);
                if self.request_state == RequestState::Sent && !progress.is_sent_reported {
                    progress.is_sent_reported = true;
                    on_request_sent();
                }
                match polled {
                    Poll::Pending => {
                        if let Err(error) = ready!(exchange_body::poll_wait_for_head(self, cx, &mut **body)) {
                            return Poll::Ready(Err(error));
                        }
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Ready(Ok(length)) => {
                        let head = &self.buffer.data()[..length];
                        let persistent = response::parse(head, &request.method, response)
                            .map_err(UpstreamConnectionError::Malformed)?;
                        self.buffer.consume(length);
                        if !response.status.is_informational() {
                            self.buffer.shrink();
                            self.begin_body(&request.method, response, persistent);
                            return Poll::Ready(Ok(()));
                        }
                        progress.interim_count += 1;
                        if is_switch(request, response) {
                            // The bytes after this head are not HTTP, so the connection is not
                            // reused.
                            response.length = BodyLength::Empty;
                            self.is_reused = true;
                            return Poll::Ready(Ok(()));
                        }
                        if response.status == StatusCode::SWITCHING_PROTOCOLS {
                            return Poll::Ready(Err(UpstreamConnectionError::Malformed("unsolicited protocol switch")));
                        }
                        if progress.interim_count > INTERIM_MAX {
                            return Poll::Ready(Err(UpstreamConnectionError::Malformed("too many interim responses")));
                        }
                        // The gateway itself sends 100 Continue, and HTTP/1.0 has no interim
                        // responses.
                        if response.status != StatusCode::CONTINUE && request.version != HttpVersion::Http10 {
                            request.interim.push(response.clone());
                            self.has_passed_interim = true;
                        }
                        progress.scanner = HeadScanner::default();
                    }
                }
            }
        })
        .await
    }

    /// The stream and the bytes received from it but not consumed, after a protocol switch.
    pub(in crate::http) fn into_parts(self) -> (TransportStream, ReadBuffer) {
        (self.io, self.buffer)
    }

    /// The stream and the bytes received from it but not consumed.
    pub(super) fn stream_and_buffer(&mut self) -> (&TransportStream, &mut ReadBuffer) {
        (&self.io, &mut self.buffer)
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut dyn BodySource,
        progress: &mut HeadProgress,
    ) -> Poll<Result<usize, UpstreamConnectionError>> {
        let sent = self.poll_send_request(cx, body);
        loop {
            match progress.scanner.advance(self.buffer.data()) {
                ScanResult::Complete(length) => return Poll::Ready(Ok(length)),
                ScanResult::BareLf => return Poll::Ready(Err(UpstreamConnectionError::Malformed("bare line feed"))),
                ScanResult::Partial { .. } if self.buffer.data().len() >= HEAD_MAX => {
                    return Poll::Ready(Err(UpstreamConnectionError::Malformed("head too large")));
                }
                ScanResult::Partial { .. } => {}
            }
            let before = self.buffer.data().len();
            match self.buffer.poll_fill(&self.io, cx, HEAD_MAX) {
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(result) => {
                    let error = result.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                    let is_first = before == 0 && progress.interim_count == 0;
                    let failed = if let Some(fault) = TlsFault::of(&error) {
                        // With TLS 1.3 a refused certificate of the gateway is known only now.
                        UpstreamConnectionError::Tls(fault, error)
                    } else if !is_first {
                        UpstreamConnectionError::Io(error)
                    } else if self.clock.client_silence() >= CLIENT_STOPPED {
                        UpstreamConnectionError::ClientStopped(error)
                    } else {
                        UpstreamConnectionError::NoResponse(error)
                    };
                    return Poll::Ready(Err(failed));
                }
                // An early response is read even if the request could not be sent completely. After
                // a failed send, the bytes that the upstream sent before it closed, or the end, are
                // about to be readable: the socket may not be known as readable yet.
                Poll::Pending => match sent {
                    Poll::Ready(Err(SendError::Source(error))) => {
                        return Poll::Ready(Err(UpstreamConnectionError::Client(error)));
                    }
                    Poll::Ready(_) | Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    fn refuse_request(&mut self, error: &io::Error) {
        tracing::debug!(%error, "an upstream accepts no more of a request");
        self.request_state = RequestState::Refused;
    }

    /// The step that is awaited when no byte can be transferred. `response_step` is that of the
    /// response: it is awaited only once the request was sent, because an upstream may wait for the
    /// whole request before it continues.
    fn awaited_step(&self, response_step: AwaitedStep) -> AwaitedStep {
        match self.request_state {
            RequestState::Sending if self.writer.is_blocked() => AwaitedStep::UpstreamSend,
            RequestState::Sending => AwaitedStep::ClientBody,
            RequestState::Sent | RequestState::Refused | RequestState::ClientFailed => response_step,
        }
    }

    /// Whether the client has not delivered the whole request of the current exchange. A failure of
    /// the upstream until then may be the client's fault, and proves nothing about the upstream.
    pub(crate) fn is_request_incomplete(&self) -> bool {
        !self.writer.has_whole_body()
    }

    /// Sends the request body as far as the client has delivered it.
    fn poll_send_request(&mut self, cx: &mut Context<'_>, body: &mut dyn BodySource) -> Poll<Result<(), SendError>> {
        match self.request_state {
            RequestState::Sent => return Poll::Ready(Ok(())),
            RequestState::Refused => return Poll::Pending,
            RequestState::Sending | RequestState::ClientFailed => {}
        }
        let sent = self.writer.poll_send(cx, &self.io, body);
        if self.writer.take_progress() {
            self.has_sent = true;
            self.clock.record_progress();
        }
        match &sent {
            Poll::Ready(Ok(())) => self.request_state = RequestState::Sent,
            Poll::Ready(Err(SendError::Peer(error))) => self.refuse_request(error),
            // The writer itself has no clock.
            Poll::Ready(Err(SendError::Timeout(_))) => self.request_state = RequestState::Refused,
            Poll::Ready(Err(SendError::Source(_))) => self.request_state = RequestState::ClientFailed,
            Poll::Pending => {}
        }
        sent
    }

    fn write_head(&mut self, request: &Request) {
        let out = self.writer.head_buffer_of(request.read_size);
        out.extend_from_slice(request.method.as_str().as_bytes());
        out.push(b' ');
        request.push_origin_target(out);
        out.extend_from_slice(b" HTTP/1.1\r\n");
        send::push_line(out, b"Host", request.origin_authority().as_bytes());
        request.origin_fields().write_lines(out, REWRITTEN);
        if let Some(left) = self.clock.total_left() {
            // The origin can stop when the response would be too late. 0 would be no limit.
            out.extend_from_slice(b"X-Envoy-Expected-Rq-Timeout-Ms: ");
            text::push_number(out, u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1));
            out.extend_from_slice(b"\r\n");
        }
        send::push_length(out, request.length);
        out.extend_from_slice(b"\r\n");
        self.writer.begin(request.length);
    }

    fn begin_body(&mut self, method: &Method, response: &Response, persistent: bool) {
        self.reusable = persistent;
        self.is_reused = true;
        // Only a body without a length can be a stream of events.
        self.is_event_stream = matches!(response.length, BodyLength::Streamed | BodyLength::UntilClose)
            && response.fields.get(KnownField::ContentType).is_some_and(is_event_stream);
        self.body = match response.length {
            _ if is_bodiless(method, response.status) => ResponseBodyState::Done,
            BodyLength::Empty | BodyLength::Known(0) => ResponseBodyState::Done,
            BodyLength::Known(remaining) => ResponseBodyState::Length { remaining },
            BodyLength::Streamed => ResponseBodyState::Chunked { decoder: ChunkDecoder::new(), ready: 0 },
            BodyLength::UntilClose => ResponseBodyState::UntilClose,
        };
    }

    /// Sets how much of the body is read before it is taken.
    pub(crate) fn set_read_size(&mut self, size: ReadSize) {
        self.buffer.set_read_size(size);
    }

    /// Whether the body of the response has ended.
    pub(crate) fn is_body_done(&self) -> bool {
        matches!(self.body, ResponseBodyState::Done)
    }

    /// Whether the exchange ended cleanly, so that the connection can be reused.
    pub(crate) fn is_reusable(&self) -> bool {
        self.reusable
            && self.request_state == RequestState::Sent
            && self.buffer.is_empty()
            && matches!(self.body, ResponseBodyState::Done)
    }

    /// Returns the buffers to their pool, for an idle connection.
    pub(crate) fn release_buffers(&mut self) {
        self.buffer.release();
        self.writer.release();
    }

    /// Ready when an idle connection cannot be reused: it was closed, or unsolicited bytes arrived.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.io.poll_unsolicited(cx)
    }

    /// Reads the response body and sends the rest of the request body. See `BodySource::poll_fill`.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        request_body: &mut dyn BodySource,
    ) -> Poll<Result<(), BodyError>> {
        exchange_body::poll_body(self, cx, request_body)
    }

    fn advance_framing(&mut self) -> Option<Result<(), BodyError>> {
        match &mut self.body {
            ResponseBodyState::Done => Some(Ok(())),
            ResponseBodyState::Length { .. } | ResponseBodyState::UntilClose => {
                (!self.buffer.is_empty()).then_some(Ok(()))
            }
            ResponseBodyState::Chunked { ready, .. } if *ready > 0 => Some(Ok(())),
            ResponseBodyState::Chunked { decoder, ready } => match decoder.step(self.buffer.data()) {
                Err(reason) => Some(Err(BodyError::Malformed(reason))),
                Ok(DecodeStep::More { skip }) => {
                    self.buffer.consume(skip);
                    None
                }
                Ok(DecodeStep::Data { skip, data }) => {
                    self.buffer.consume(skip);
                    *ready = data;
                    Some(Ok(()))
                }
                Ok(DecodeStep::End { skip }) => {
                    self.buffer.consume(skip);
                    self.trailers = decoder.take_trailers();
                    self.body = ResponseBodyState::Done;
                    Some(Ok(()))
                }
            },
        }
    }

    /// The trailers of a body that has ended.
    pub(crate) fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    /// Removes and returns the trailers.
    pub(crate) fn take_trailers(&mut self) -> Option<Box<Fields>> {
        self.trailers.take()
    }

    pub(crate) fn data(&self) -> &[u8] {
        let buffered = self.buffer.data();
        match &self.body {
            ResponseBodyState::Done => &[],
            ResponseBodyState::Length { remaining } => {
                &buffered[..usize::try_from(*remaining).unwrap_or(usize::MAX).min(buffered.len())]
            }
            ResponseBodyState::Chunked { ready, .. } => &buffered[..*ready],
            ResponseBodyState::UntilClose => buffered,
        }
    }

    pub(crate) fn consume(&mut self, count: usize) {
        // The upstream is not late while its bytes are not taken.
        self.clock.record_progress();
        self.buffer.consume(count);
        match &mut self.body {
            ResponseBodyState::Done | ResponseBodyState::UntilClose => {}
            ResponseBodyState::Length { remaining } => {
                *remaining -= count as u64;
                if *remaining == 0 {
                    self.body = ResponseBodyState::Done;
                }
            }
            ResponseBodyState::Chunked { decoder, ready } => {
                *ready -= count;
                decoder.data_consumed(count);
            }
        }
    }
}

impl ExchangeBody for Http1UpstreamConnection {
    fn request_state(&self) -> RequestState {
        self.request_state
    }

    fn send_request(&mut self, cx: &mut Context<'_>, request_body: &mut dyn BodySource) {
        let _sent_or_failed = self.poll_send_request(cx, request_body);
    }

    fn clock(&self) -> &ExchangeClock {
        &self.clock
    }

    fn is_event_stream(&self) -> bool {
        self.is_event_stream
    }

    fn is_received(&self) -> bool {
        self.is_body_done()
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            if let Some(result) = self.advance_framing() {
                return Poll::Ready(result);
            }
            match self.buffer.poll_fill(&self.io, cx, 1) {
                Poll::Ready(Ok(count)) if count > 0 => self.clock.record_progress(),
                Poll::Ready(Ok(_)) if matches!(self.body, ResponseBodyState::UntilClose) => {
                    self.body = ResponseBodyState::Done;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(BodyError::Truncated)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(BodyError::Io(error))),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn poll_clock(
        &mut self,
        cx: &mut Context<'_>,
        response_step: AwaitedStep,
        body: &mut dyn BodySource,
    ) -> Poll<Result<(), ClockEnd>> {
        let step = self.awaited_step(response_step);
        loop {
            match ready!(self.clock.poll(cx, step)) {
                ClockEvent::TimedOut(timeout) => return Poll::Ready(Err(ClockEnd::TimedOut(timeout))),
                ClockEvent::CheckClient if body.is_client_closed() => return Poll::Ready(Err(ClockEnd::ClientGone)),
                ClockEvent::CheckClient => {}
                ClockEvent::CheckWrite => match self.writer.write_unready(&self.io, body) {
                    Ok(true) => {
                        self.has_sent = true;
                        self.clock.record_accepted();
                        return Poll::Ready(Ok(()));
                    }
                    Ok(false) => {
                        if let Some(timeout) = self.clock.record_blocked() {
                            return Poll::Ready(Err(ClockEnd::TimedOut(timeout)));
                        }
                    }
                    Err(error) => {
                        self.refuse_request(&error);
                        return Poll::Ready(Ok(()));
                    }
                },
            }
        }
    }
}

/// Whether the response switches to a protocol that the request offered (RFC 9110 section 7.8).
fn is_switch(request: &Request, response: &Response) -> bool {
    let offered =
        |protocol: &[u8]| request.fields.members(KnownField::Upgrade).any(|o| o.eq_ignore_ascii_case(protocol));
    let mut chosen = response.fields.members(KnownField::Upgrade).peekable();
    response.status == StatusCode::SWITCHING_PROTOCOLS
        && request.length == BodyLength::Empty
        && chosen.peek().is_some()
        && chosen.all(offered)
        && (request.version != HttpVersion::Http2 || is_accepted(request, response))
}

/// Whether the response answers the key of a WebSocket handshake, which the gateway has made for a
/// client of HTTP/2.
fn is_accepted(request: &Request, response: &Response) -> bool {
    let mut keys = request.fields.named(websocket::KEY.as_bytes());
    let mut answers = response.fields.named(websocket::ACCEPT.as_bytes());
    match (keys.next(), answers.next(), answers.next()) {
        (Some(key), Some(answer), None) => answer == websocket::accept(key).as_bytes(),
        _ => false,
    }
}
