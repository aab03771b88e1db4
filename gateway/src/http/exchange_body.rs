//! The body of a response while the rest of its request is sent, whichever protocol the connection
//! speaks: which side is awaited, and how the exchange ends.

use std::task::{Context, Poll, ready};

use super::attempt::{RequestState, UpstreamConnectionError};
use super::body::{BodyError, BodySource};
use super::exchange_clock::{AwaitedStep, ExchangeClock, ExchangeTimeout};

/// The end of an exchange in which no byte could move.
pub(super) enum ClockEnd {
    TimedOut(ExchangeTimeout),
    /// The client has closed its connection before its request was sent.
    ClientGone,
}

impl From<ClockEnd> for BodyError {
    fn from(end: ClockEnd) -> Self {
        match end {
            ClockEnd::TimedOut(timeout) => BodyError::Timeout(timeout),
            ClockEnd::ClientGone => BodyError::ClientGone,
        }
    }
}

impl From<ClockEnd> for UpstreamConnectionError {
    fn from(end: ClockEnd) -> Self {
        match end {
            ClockEnd::TimedOut(timeout) => UpstreamConnectionError::Timeout(timeout),
            ClockEnd::ClientGone => UpstreamConnectionError::ClientGone,
        }
    }
}

/// An exchange whose response head has arrived.
pub(super) trait ExchangeBody {
    fn request_state(&self) -> RequestState;

    /// Sends the request body as far as the client has delivered it. A failure is in
    /// `request_state`.
    fn send_request(&mut self, cx: &mut Context<'_>, request_body: &mut dyn BodySource);

    fn clock(&self) -> &ExchangeClock;

    /// Whether the response is a stream of events, which may be silent.
    fn is_event_stream(&self) -> bool;

    /// Whether every byte of the response body was received.
    fn is_received(&self) -> bool;

    /// Receives bytes of the response body, without a deadline.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>>;

    /// Polls the clock of the step that is awaited when no byte can move; `step` is that of the
    /// response. `Ok` when bytes can move again.
    fn poll_clock(
        &mut self,
        cx: &mut Context<'_>,
        step: AwaitedStep,
        request_body: &mut dyn BodySource,
    ) -> Poll<Result<(), ClockEnd>>;
}

/// Reads the response body and sends the rest of the request body. See `BodySource::poll_fill`.
pub(super) fn poll_body(
    exchange: &mut impl ExchangeBody,
    cx: &mut Context<'_>,
    request_body: &mut dyn BodySource,
) -> Poll<Result<(), BodyError>> {
    loop {
        // The origin has already responded, so an error of the request body does not fail the
        // response.
        if exchange.request_state() == RequestState::Sending {
            exchange.send_request(cx, request_body);
        }
        if exchange.clock().is_total_over() && !exchange.is_received() {
            return Poll::Ready(Err(BodyError::Timeout(ExchangeTimeout::Total)));
        }
        if let Poll::Ready(result) = exchange.poll_receive(cx) {
            return Poll::Ready(result);
        }
        let step = match exchange.request_state() {
            // The upstream may wait for the rest of the request, which its client has not sent.
            RequestState::ClientFailed => AwaitedStep::ClientBody,
            _ if exchange.is_event_stream() => AwaitedStep::EventStream,
            _ => AwaitedStep::UpstreamBody,
        };
        ready!(exchange.poll_clock(cx, step, request_body))?;
    }
}

/// Polled when no byte of a request or of the head of its response can move: fails when the time
/// of the awaited step has passed, or the client has disconnected. `Ok` when bytes can move again.
pub(super) fn poll_wait_for_head(
    exchange: &mut impl ExchangeBody,
    cx: &mut Context<'_>,
    request_body: &mut dyn BodySource,
) -> Poll<Result<(), UpstreamConnectionError>> {
    if let Poll::Ready(ended) = exchange.poll_clock(cx, AwaitedStep::UpstreamHead, request_body) {
        return Poll::Ready(ended.map_err(UpstreamConnectionError::from));
    }
    if exchange.request_state() == RequestState::Sent {
        request_body.poll_client_closed(cx).map(|()| Err(UpstreamConnectionError::ClientGone))
    } else {
        Poll::Pending
    }
}
