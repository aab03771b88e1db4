//! A response in progress: its body, and its connection, which is returned to the idle pool if the
//! exchange ends cleanly.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::judge::EndpointJudge;
use super::pool;
use super::replay::ReplayBody;
use super::retry::RetryPermit;
use crate::endpoint::{CallOutcome, InFlightGuard};
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadSize;
use crate::http::exchange_clock::Blame;
use crate::http::fields::Fields;
use crate::http::h1::Http1UpstreamConnection;
use crate::http::request_body::RequestBody;
use crate::http::upstream_connection::UpstreamConnection;

/// The body of an upstream response. Reading it also sends the remainder of the request body.
pub(crate) struct UpstreamExchange<'a> {
    connection: Option<UpstreamConnection>,
    trailers: Option<Box<Fields>>,
    body: ReplayBody<RequestBody<'a>>,
    in_flight: InFlightGuard,
    head: HeadVerdict,
    /// Judges the endpoint again if its body fails; `None`: the body has ended.
    judge: Option<Arc<EndpointJudge>>,
    /// The exchange is a retry or a hedge.
    _permit: Option<RetryPermit>,
}

/// The endpoint judged by the head of its response.
#[derive(Clone, Copy, Default)]
pub(super) struct HeadVerdict {
    /// Whether the endpoint has a success if the body ends well.
    pub(super) is_success: bool,
    /// Whether the endpoint is out of use while others are not.
    pub(super) is_outlier: bool,
    /// Whether the response itself is a failure of the upstream.
    pub(super) is_failure: bool,
}

/// A connection after a protocol switch. Its endpoint still counts it as in flight.
pub(crate) struct Tunnel {
    pub(crate) connection: Box<Http1UpstreamConnection>,
    pub(crate) in_flight: InFlightGuard,
}

impl<'a> UpstreamExchange<'a> {
    pub(super) fn new(
        connection: UpstreamConnection,
        body: ReplayBody<RequestBody<'a>>,
        (judge, in_flight): (&Arc<EndpointJudge>, InFlightGuard),
        head: HeadVerdict,
    ) -> Self {
        let connection = Some(connection);
        let mut exchange =
            UpstreamExchange { connection, trailers: None, body, in_flight, head, judge: None, _permit: None };
        exchange.finish_if_idle();
        // Most bodies are there with their head.
        exchange.judge = exchange.head.is_success.then(|| Arc::clone(judge));
        exchange
    }

    /// Counts the exchange as a retry or hedge until it ends.
    pub(super) fn hold(&mut self, permit: Option<RetryPermit>) {
        self._permit = permit;
    }

    /// Whether the response is a failure of the upstream: its status, or that of gRPC in its head.
    pub(crate) fn is_failure(&self) -> bool {
        self.head.is_failure
    }

    /// Whether the endpoint is out of use while others are not: its failure is no verdict about the
    /// upstream.
    pub(crate) fn is_outlier(&self) -> bool {
        self.head.is_outlier
    }

    /// The name of the endpoint that responded.
    pub(crate) fn endpoint(&self) -> Arc<str> {
        Arc::clone(&self.in_flight.endpoint().name)
    }

    /// Counts the time to the head of the response at its endpoint.
    pub(crate) fn count_latency(&self, latency: Duration, now: Instant) {
        self.in_flight.endpoint().count_latency(latency, now);
    }

    /// Whether the client has not delivered its whole request. A failure of the upstream until then
    /// may be the client's fault.
    pub(crate) fn is_request_incomplete(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.is_request_incomplete())
    }

    /// The connection, after the protocol was switched.
    pub(crate) fn into_tunnel(self) -> Option<Tunnel> {
        let UpstreamExchange { connection, in_flight, .. } = self;
        connection.map(|connection| Tunnel { connection: connection.into_tunnel(), in_flight })
    }

    fn finish_if_idle(&mut self) {
        if self.head.is_success && self.connection.as_ref().is_some_and(|connection| connection.is_body_done()) {
            self.head.is_success = false;
            self.in_flight.record_success(Instant::now);
        }
        if let Some(mut connection) = self.connection.take_if(|connection| connection.is_complete()) {
            self.trailers = connection.take_trailers();
            if let UpstreamConnection::Http1(connection) = connection {
                pool::put(self.in_flight.endpoint().connector.key(), connection);
            }
        }
    }
}

impl BodySource for UpstreamExchange<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(Ok(())) };
        let filled = connection.poll_body(cx, &mut self.body);
        self.in_flight.set_sent(self.body.consumed());
        if matches!(filled, Poll::Ready(Ok(()))) && connection.data().is_empty() {
            self.finish_if_idle();
        }
        if filled.is_pending() && self.body.poll_client_closed(cx).is_ready() {
            return Poll::Ready(Err(BodyError::ClientGone));
        }
        if let Poll::Ready(Err(error)) = &filled
            && error.blame() == Blame::Upstream
            && std::mem::take(&mut self.head.is_success)
            && let Some(judge) = self.judge.take()
        {
            let is_timeout = matches!(error, BodyError::Timeout(_));
            judge.judge_body(&self.in_flight, if is_timeout { CallOutcome::Timeout } else { CallOutcome::Failure });
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.connection.as_ref().map_or(&[], |connection| connection.data())
    }

    fn consume(&mut self, count: usize) {
        if let Some(connection) = &mut self.connection {
            connection.consume(count);
            self.in_flight.add_received(count as u64);
            self.finish_if_idle();
        }
    }

    fn take_bytes(&mut self, max: usize) -> Bytes {
        let Some(connection) = &mut self.connection else { return Bytes::new() };
        let bytes = connection.take_bytes(max);
        self.in_flight.add_received(bytes.len() as u64);
        self.finish_if_idle();
        bytes
    }

    fn set_read_size(&mut self, size: ReadSize) {
        if let Some(connection) = &mut self.connection {
            connection.set_read_size(size);
        }
    }

    fn may_have_trailers(&self) -> bool {
        let is_open = |connection: &UpstreamConnection| connection.may_have_trailers();
        self.trailers.is_some() || self.connection.as_ref().is_some_and(is_open)
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref().or_else(|| self.connection.as_ref()?.trailers())
    }
}
