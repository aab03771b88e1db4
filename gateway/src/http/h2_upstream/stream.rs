//! One exchange on an HTTP/2 connection: sends a request, reads its response.
//!
//! The request body is sent while the response is read, as over HTTP/1.1, and every wait is for one
//! step of one side. Bytes of a response are read as their client takes them: the window of the
//! stream holds the rest back. Dropping an exchange that has not ended resets its stream.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::Method;

use super::connection::Http2UpstreamConnection;
use super::head;
use super::memory::{StreamWindow, WindowReservation};
use crate::http::attempt::{
    CLIENT_STOPPED, INTERIM_MAX, RequestState, UpstreamAttempt, UpstreamConnectionError, is_event_stream,
};
use crate::http::body::{BodyError, BodySource};
use crate::http::exchange_body::{self, ClockEnd, ExchangeBody};
use crate::http::exchange_clock::{AwaitedStep, ClockEvent, ExchangeClock};
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, HttpVersion, Request, Response, StatusCode};
use crate::http::tls_fault::TlsFault;
use crate::http::transport::SharedByteStream;

/// Most bytes of a request body that are passed on at once.
const PIECE_MAX: usize = 64 << 10;

/// Progress of the response.
enum ResponseState {
    /// The request was not sent yet.
    None,
    Head(ResponseFuture),
    Body(RecvStream),
    Done,
}

/// An exchange, with its place among those of its connection.
pub(crate) struct Http2UpstreamStream {
    connection: Rc<Http2UpstreamConnection>,
    /// The memory for the response; `None`: it has ended, or its window is narrow.
    reservation: Option<WindowReservation>,
    /// Whether the connection served an exchange before.
    is_reused: bool,
    clock: ExchangeClock,
    request: RequestState,
    /// Bytes that the request body still has; `None` if its length is not known.
    left: Option<u64>,
    /// Whether bytes of the request wait for the upstream.
    is_blocked: bool,
    sender: Option<SendStream<Bytes>>,
    response: ResponseState,
    /// Bytes of the response body that were received and not consumed.
    data: Bytes,
    trailers: Option<Box<Fields>>,
    is_event_stream: bool,
    /// Whether the request is an extended CONNECT.
    is_connect: bool,
    interim_count: usize,
    /// Bytes that were written on the connection before the request.
    written_before: u64,
    /// As of the last check of a blocked request.
    written_checked: u64,
    /// The server has said that it did not process the request.
    is_refused: bool,
}

impl Http2UpstreamStream {
    /// Takes a place on a connection and the reservation for it; `None` if the connection is
    /// closed, has no place, or has narrow windows although there is a reservation, or wide ones
    /// without one.
    pub(crate) fn begin(
        connection: &Rc<Http2UpstreamConnection>,
        reservation: &mut Option<WindowReservation>,
    ) -> Option<Self> {
        if (connection.window == StreamWindow::Wide) != reservation.is_some() {
            return None;
        }
        let is_reused = connection.begin()?;
        Some(Self::new(Rc::clone(connection), is_reused, reservation.take()))
    }

    fn new(connection: Rc<Http2UpstreamConnection>, is_reused: bool, reservation: Option<WindowReservation>) -> Self {
        let written = connection.io.written.get();
        Http2UpstreamStream {
            connection,
            reservation,
            is_reused,
            clock: ExchangeClock::new(),
            request: RequestState::Sending,
            left: None,
            is_blocked: false,
            sender: None,
            response: ResponseState::None,
            data: Bytes::new(),
            trailers: None,
            is_event_stream: false,
            is_connect: false,
            interim_count: 0,
            written_before: written,
            written_checked: written,
            is_refused: false,
        }
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.is_reused
    }

    /// Whether the connection is open according to the system.
    pub(crate) fn is_open(&self) -> bool {
        self.connection.is_open()
    }

    /// Lets no further exchange begin on the connection.
    pub(crate) fn abandon_connection(&self) {
        self.connection.close();
    }

    /// Whether the server has not processed the request: no byte was written since it began, or the
    /// server has said so.
    pub(crate) fn is_request_unsent(&self) -> bool {
        self.is_refused || self.connection.io.written.get() == self.written_before
    }

    pub(crate) fn has_passed_interim(&self) -> bool {
        self.interim_count > 0
    }

    /// Whether the client has not delivered the whole request: all of its bytes, and its end.
    pub(crate) fn is_request_incomplete(&self) -> bool {
        self.left != Some(0) || self.request == RequestState::Sending
    }

    /// Sends the request of `attempt` and reads the response head. Its timeouts cover the response
    /// body too. Not cancel safe: dropping it resets the stream.
    ///
    /// # Errors
    /// After `Refused` any request may be sent again; after `NoResponse` and `Reset` one that is
    /// safe to repeat.
    pub(crate) async fn exchange(&mut self, attempt: &mut UpstreamAttempt<'_>) -> Result<(), UpstreamConnectionError> {
        let UpstreamAttempt { request, body, response, timeouts, total_at, on_request_sent } = attempt;
        self.clock.begin(*timeouts, *total_at);
        self.left = match request.length {
            BodyLength::Empty | BodyLength::UntilClose => Some(0),
            BodyLength::Known(length) => Some(length),
            BodyLength::Streamed => None,
        };
        self.written_before = self.connection.io.written.get();
        let mut head = head::request_head(request, &self.connection.peer, self.clock.total_left())
            .map_err(UpstreamConnectionError::Unsendable)?;
        self.is_connect = head::is_websocket(request) && self.connection.accepts_connect();
        if self.is_connect {
            head::make_connect(&mut head);
        }
        let is_complete = self.left == Some(0);
        let ends = is_complete && !self.is_connect;
        let (future, sender) = self.connection.send_head(head, ends).inspect_err(|_| self.is_refused = true)?;
        self.response = ResponseState::Head(future);
        if is_complete {
            self.request = RequestState::Sent;
        }
        self.sender = Some(sender);
        let mut is_sent_reported = false;
        poll_fn(|cx| {
            loop {
                let polled = self.poll_head(cx, &mut **body, (request, response));
                if self.request == RequestState::Sent && !is_sent_reported {
                    is_sent_reported = true;
                    on_request_sent();
                }
                if let Poll::Ready(ended) = polled {
                    return Poll::Ready(ended);
                }
                match ready!(exchange_body::poll_wait_for_head(self, cx, &mut **body)) {
                    Ok(()) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
        })
        .await
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut dyn BodySource,
        (request, response): (&Request, &mut Response),
    ) -> Poll<Result<(), UpstreamConnectionError>> {
        let sent = self.poll_send_request(cx, body);
        loop {
            let ResponseState::Head(future) = &mut self.response else {
                return Poll::Ready(Err(UpstreamConnectionError::Malformed("no response")));
            };
            if let Poll::Ready(Some(interim)) = future.poll_informational(cx) {
                let interim = interim.map_err(|error| self.head_error(error))?;
                self.pass_interim(&interim, request)?;
                continue;
            }
            return match Pin::new(future).poll(cx) {
                Poll::Ready(Ok(parts)) => {
                    let (parts, stream) = parts.into_parts();
                    let begun = self.begin_body((parts.status, &parts.headers), stream, &request.method, response);
                    if self.is_tunnel(response) && begun.is_ok() {
                        head::make_switch(request, response);
                    }
                    Poll::Ready(begun)
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(self.head_error(error))),
                // An early response is read even if the request could not be sent completely.
                Poll::Pending => match sent {
                    Err(error) => Poll::Ready(Err(UpstreamConnectionError::Client(error))),
                    Ok(()) => Poll::Pending,
                },
            };
        }
    }

    fn pass_interim(&mut self, interim: &http::Response<()>, request: &Request) -> Result<(), UpstreamConnectionError> {
        self.interim_count += 1;
        // HTTP/2 has no switch of protocols (RFC 9113 section 8.6).
        if interim.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(UpstreamConnectionError::Malformed("unsolicited protocol switch"));
        }
        if self.interim_count > INTERIM_MAX {
            return Err(UpstreamConnectionError::Malformed("too many interim responses"));
        }
        // The gateway itself sends 100 Continue, and HTTP/1.0 has no interim responses.
        if interim.status() != StatusCode::CONTINUE && request.version != HttpVersion::Http10 {
            let mut response = Response::default();
            head::read_response((interim.status(), interim.headers()), &request.method, false, &mut response)
                .map_err(UpstreamConnectionError::Malformed)?;
            request.interim.push(response);
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one response")]
    fn begin_body(
        &mut self,
        parts: (StatusCode, &http::HeaderMap),
        stream: RecvStream,
        method: &Method,
        response: &mut Response,
    ) -> Result<(), UpstreamConnectionError> {
        let is_complete = stream.is_end_stream();
        head::read_response(parts, method, is_complete, response).map_err(UpstreamConnectionError::Malformed)?;
        response.version = HttpVersion::Http2;
        self.is_event_stream = response.length == BodyLength::Streamed
            && response.fields.get(KnownField::ContentType).is_some_and(is_event_stream);
        if is_complete {
            self.end_response();
            return Ok(());
        }
        self.response = ResponseState::Body(stream);
        if let Some(reservation) = &mut self.reservation {
            reservation.keep(if let BodyLength::Known(length) = response.length { length } else { u64::MAX });
        }
        Ok(())
    }

    /// The last byte of the response was taken from the connection.
    fn end_response(&mut self) {
        self.response = ResponseState::Done;
        self.reservation = None;
    }

    /// Sends the request body as far as the client has delivered it, and the upstream accepts it.
    /// Errors are those of the client.
    fn poll_send_request(&mut self, cx: &mut Context<'_>, body: &mut dyn BodySource) -> Result<(), BodyError> {
        let Some(sender) = &mut self.sender else { return Ok(()) };
        self.is_blocked = false;
        while self.request == RequestState::Sending {
            match body.poll_fill(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    self.request = RequestState::ClientFailed;
                    return Err(error);
                }
            }
            let available = body.data().len().min(PIECE_MAX);
            if self.left.is_some_and(|left| (left == 0) != (available == 0)) {
                self.request = RequestState::ClientFailed;
                return Err(if available == 0 { BodyError::Truncated } else { BodyError::Malformed("length") });
            }
            if available == 0 {
                let ended = match body.trailers() {
                    Some(trailers) => sender.send_trailers(head::write_trailers(trailers)),
                    None => sender.send_data(Bytes::new(), true),
                };
                self.left = Some(0);
                self.request = if ended.is_ok() { RequestState::Sent } else { RequestState::Refused };
                return Ok(());
            }
            let wanted = usize::try_from(self.left.unwrap_or(u64::MAX)).unwrap_or(usize::MAX).min(available);
            sender.reserve_capacity(wanted);
            let accepted = match sender.capacity() {
                0 => match sender.poll_capacity(cx) {
                    Poll::Pending => {
                        self.is_blocked = true;
                        return Ok(());
                    }
                    Poll::Ready(Some(Ok(count))) => count,
                    // A response may still arrive.
                    Poll::Ready(Some(Err(_)) | None) => {
                        self.request = RequestState::Refused;
                        return Ok(());
                    }
                },
                count => count,
            };
            let accepted = accepted.min(wanted);
            if accepted == 0 {
                continue;
            }
            let piece = body.take_bytes(accepted);
            let is_sent = self.left.as_mut().is_some_and(|left| {
                *left -= piece.len() as u64;
                *left == 0
            });
            let is_last = is_sent && !body.may_have_trailers();
            self.clock.record_progress();
            self.request = match sender.send_data(piece, is_last) {
                Ok(()) if is_last => RequestState::Sent,
                Ok(()) => RequestState::Sending,
                Err(_) => RequestState::Refused,
            };
        }
        Ok(())
    }

    /// The failure of an exchange without a head.
    fn head_error(&mut self, error: h2::Error) -> UpstreamConnectionError {
        let is_refusal = error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM));
        if is_refusal {
            self.is_refused = true;
            if error.is_go_away() {
                self.connection.close();
            }
            return UpstreamConnectionError::Refused(io::Error::other(error));
        }
        if !error.is_remote() && !error.is_io() {
            tracing::debug!(%error, "a malformed HTTP/2 response");
            return UpstreamConnectionError::Malformed("HTTP/2 protocol error");
        }
        let is_reset = error.is_reset();
        let failure = error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
        if let Some(fault) = TlsFault::of(&failure) {
            UpstreamConnectionError::Tls(fault, failure)
        } else if self.interim_count > 0 {
            UpstreamConnectionError::Io(failure)
        } else if is_reset {
            UpstreamConnectionError::Reset(failure)
        } else if self.clock.client_silence() >= CLIENT_STOPPED {
            UpstreamConnectionError::ClientStopped(failure)
        } else {
            UpstreamConnectionError::NoResponse(failure)
        }
    }

    /// Whether the response to an extended CONNECT begins a tunnel.
    fn is_tunnel(&self, response: &Response) -> bool {
        self.is_connect && response.status.is_success() && matches!(self.response, ResponseState::Body(_))
    }

    /// Whether the body of the response has ended.
    pub(crate) fn is_body_done(&self) -> bool {
        matches!(self.response, ResponseState::Done) && self.data.is_empty()
    }

    /// Whether the exchange ended cleanly.
    pub(crate) fn is_complete(&self) -> bool {
        self.request == RequestState::Sent && self.is_body_done()
    }

    /// Reads the response body and sends the rest of the request body. See `BodySource::poll_fill`.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        request_body: &mut dyn BodySource,
    ) -> Poll<Result<(), BodyError>> {
        exchange_body::poll_body(self, cx, request_body)
    }

    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.data.advance(count);
        self.release(count);
    }

    /// Removes up to `max` bytes from the front of `data`, without a copy.
    pub(crate) fn take_bytes(&mut self, max: usize) -> Bytes {
        let taken = self.data.split_to(self.data.len().min(max));
        self.release(taken.len());
        taken
    }

    /// Allows the server to send as many bytes again.
    fn release(&mut self, count: usize) {
        // The upstream is not late while its bytes are not taken.
        self.clock.record_progress();
        if let ResponseState::Body(stream) = &mut self.response
            && let Err(error) = stream.flow_control().release_capacity(count)
        {
            tracing::debug!(%error, "a stream cannot be continued");
        }
    }

    /// The trailers of a body that has ended.
    pub(crate) fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    /// Whether trailers may follow the body.
    pub(crate) fn may_have_trailers(&self) -> bool {
        match &self.response {
            ResponseState::Body(stream) => !stream.is_end_stream(),
            _ => self.trailers.is_some(),
        }
    }

    /// Removes and returns the trailers.
    pub(crate) fn take_trailers(&mut self) -> Option<Box<Fields>> {
        self.trailers.take()
    }
}

impl ExchangeBody for Http2UpstreamStream {
    fn request_state(&self) -> RequestState {
        self.request
    }

    fn send_request(&mut self, cx: &mut Context<'_>, request_body: &mut dyn BodySource) {
        let _failure_is_in_the_state = self.poll_send_request(cx, request_body);
    }

    fn clock(&self) -> &ExchangeClock {
        &self.clock
    }

    fn is_event_stream(&self) -> bool {
        self.is_event_stream
    }

    fn is_received(&self) -> bool {
        matches!(self.response, ResponseState::Done)
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while self.data.is_empty() {
            let ResponseState::Body(stream) = &mut self.response else { return Poll::Ready(Ok(())) };
            match ready!(stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.clock.record_progress();
                    self.data = data;
                }
                Some(Err(error)) => return Poll::Ready(Err(body_error(error))),
                None => {
                    let trailers = ready!(stream.poll_trailers(cx)).map_err(body_error)?;
                    self.trailers = trailers.and_then(|trailers| head::read_trailers(&trailers));
                    self.end_response();
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_clock(
        &mut self,
        cx: &mut Context<'_>,
        response_step: AwaitedStep,
        body: &mut dyn BodySource,
    ) -> Poll<Result<(), ClockEnd>> {
        let step = match self.request {
            RequestState::Sending if self.is_blocked => AwaitedStep::UpstreamSend,
            RequestState::Sending => AwaitedStep::ClientBody,
            RequestState::Sent | RequestState::Refused | RequestState::ClientFailed => response_step,
        };
        loop {
            match ready!(self.clock.poll(cx, step)) {
                ClockEvent::TimedOut(timeout) => return Poll::Ready(Err(ClockEnd::TimedOut(timeout))),
                ClockEvent::CheckClient if body.is_client_closed() => return Poll::Ready(Err(ClockEnd::ClientGone)),
                ClockEvent::CheckClient => {}
                ClockEvent::CheckWrite => {
                    let io = &self.connection.io;
                    let written = io.written.get();
                    // A socket that accepts bytes of the connection, if slowly, accepts them of
                    // this request in its turn. A closed window is the server's own decision.
                    if io.is_write_blocked.get() && written != self.written_checked {
                        self.clock.record_progress();
                    } else if let Some(timeout) = self.clock.record_blocked() {
                        return Poll::Ready(Err(ClockEnd::TimedOut(timeout)));
                    }
                    self.written_checked = written;
                }
            }
        }
    }
}

/// The stream after an extended CONNECT: bytes in DATA frames.
impl SharedByteStream for Http2UpstreamStream {
    fn poll_read(&mut self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_receive(cx)).map_err(io::Error::other)?;
        let count = self.data.len().min(space.len());
        space[..count].copy_from_slice(&self.data[..count]);
        self.consume(count);
        Poll::Ready(Ok(count))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(sender) = &mut self.sender else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        sender.reserve_capacity(bytes.len().min(PIECE_MAX));
        while sender.capacity() == 0 {
            match ready!(sender.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let count = sender.capacity().min(bytes.len());
        sender.send_data(Bytes::copy_from_slice(&bytes[..count]), false).map_err(io::Error::other)?;
        Poll::Ready(Ok(count))
    }

    fn shutdown(&mut self) -> io::Result<()> {
        match self.sender.take() {
            Some(mut sender) => sender.send_data(Bytes::new(), true).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}

impl Drop for Http2UpstreamStream {
    fn drop(&mut self) {
        self.connection.end();
    }
}

/// The failure of a response body.
fn body_error(error: h2::Error) -> BodyError {
    if error.is_io() {
        return BodyError::Io(error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()));
    }
    match error.reason() {
        _ if !error.is_remote() => BodyError::Malformed("HTTP/2 protocol error"),
        Some(reason) if error.is_reset() => BodyError::Reset(reason.into()),
        _ => BodyError::Truncated,
    }
}
