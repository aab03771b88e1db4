//! The forward phase: breaker, endpoint, exchange with the upstream; then the response as the
//! gateway may pass it on.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::context::RequestContext;
use super::worker::WorkerResources;
use crate::breaker::{Breaker, BreakerState, BreakerTransition};
use crate::error::{Error, ErrorKind};
use crate::event::{Event, UpstreamFault};
use crate::http::body::{BodyError, BodySource};
use crate::http::fields::{Fields, KnownField};
use crate::http::h1::UpstreamConnectionError;
use crate::http::message::{Request, Response};
use crate::http::request_body::RequestBody;
use crate::record::RequestRecord;
use crate::route::Route;
use crate::upstream::{Tunnel, UpstreamExchange, UpstreamFailure};
use crate::{hop, identify};

impl RequestContext<'_> {
    /// Forwards a request, reads the head of the upstream's response into the context and returns
    /// the response's body. `copy` is a request made for this exchange; `None` forwards the
    /// client's own.
    pub(super) async fn forward<'b>(
        &mut self,
        copy: Option<&mut Request>,
        body: RequestBody<'b>,
    ) -> Result<UpstreamBody<'b>, Error> {
        let (route, accepts_trailers) = (self.route(), self.accepts_trailers());
        let identity = &self.snapshot.identity;
        let request = copy.unwrap_or(self.request);
        let forwarding = identity.trusted_forwarding(self.caller, request);
        hop::prepare_for_upstream(request, self.peer, forwarding);
        identify::write_trace(self.caller.trace, identity.random_u64(), &mut request.fields);
        let call = UpstreamCall { route, worker: self.worker, response: self.response, record: self.record };
        let mut body = call.run(request, body).await?;
        body.accepts_trailers = accepts_trailers;
        self.record.forwarded_status = Some(self.response.status.as_u16());
        self.record.upstream = Some(body.exchange.endpoint());
        Ok(body)
    }
}

/// One call through the route's breaker: the route, and the response head and record that the call
/// fills.
struct UpstreamCall<'c> {
    route: &'c Route,
    worker: &'c WorkerResources,
    response: &'c mut Response,
    record: &'c mut RequestRecord,
}

impl UpstreamCall<'_> {
    /// Calls through the route's breaker, which judges the call by the head of the response.
    async fn run<'b>(self, request: &Request, body: RequestBody<'b>) -> Result<UpstreamBody<'b>, Error> {
        let UpstreamCall { route, worker, response, record } = self;
        let permit = match route.breaker.admit(Instant::now()) {
            Ok((permit, change)) => {
                announce(&route.config.name, change);
                permit
            }
            Err((_, change)) => {
                announce(&route.config.name, change);
                return Err(Error::BreakerOpen);
            }
        };
        let generation = permit.generation();
        let result = route.upstream.send(request, body, response).await;
        match &result {
            // A client that closed or failed is no evidence about the upstream.
            Err(UpstreamFailure {
                error: UpstreamConnectionError::ClientGone | UpstreamConnectionError::Client(_),
                ..
            }) => {
                drop(permit);
            }
            Ok(_) => {
                let succeeded = !response.status.is_server_error();
                announce(&route.config.name, permit.record(succeeded, Instant::now()));
            }
            Err(_) => announce(&route.config.name, permit.record(false, Instant::now())),
        }
        let exchange = result.map_err(|UpstreamFailure { endpoint, error }| {
            let error = Error::from(error);
            record.upstream = endpoint;
            if let Some(kind) = fault(error.kind()) {
                let endpoint = record.upstream.as_ref().unwrap_or(&route.upstream.config().name);
                Event::UpstreamFailed { route: &route.config.name, endpoint, kind }.emit();
            }
            error
        })?;
        hop::strip_response(response);
        if !response.fields.has(KnownField::Date) {
            // A recipient with a clock adds a missing Date (RFC 9110 section 6.6.1).
            response.fields.add(KnownField::Date, httpdate::fmt_http_date(worker.view.store().wall_time()));
        }
        let (route, breaker) = (Arc::clone(&route.config.name), Arc::clone(&route.breaker));
        Ok(UpstreamBody { exchange, route, breaker, generation, accepts_trailers: false })
    }
}

/// The body of an upstream's response, with the breaker and the route that learn of its failure. A
/// failure inside the body reaches breaker and log from here.
pub(crate) struct UpstreamBody<'b> {
    exchange: UpstreamExchange<'b>,
    route: Arc<str>,
    breaker: Arc<Breaker>,
    generation: u64,
    /// Whether the client accepts trailers.
    accepts_trailers: bool,
}

impl UpstreamBody<'_> {
    /// The connection, after the upstream has switched protocols.
    pub(super) fn into_tunnel(self) -> Option<Tunnel> {
        self.exchange.into_tunnel()
    }

    /// The trailers of a body that has ended, whether or not this client accepts trailers.
    pub(super) fn all_trailers(&self) -> Option<&Fields> {
        self.exchange.trailers()
    }

    fn report(&self, error: &BodyError) {
        let kind = match error {
            BodyError::ClientGone | BodyError::Detached => return,
            BodyError::Timeout => UpstreamFault::Timeout,
            BodyError::Malformed(_) => UpstreamFault::Malformed,
            BodyError::Truncated | BodyError::TooLarge | BodyError::Io(_) => UpstreamFault::Truncated,
        };
        Event::UpstreamFailed { route: &self.route, endpoint: &self.exchange.endpoint(), kind }.emit();
        announce(&self.route, self.breaker.fail_late(self.generation, Instant::now()));
    }
}

impl BodySource for UpstreamBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let filled = self.exchange.poll_fill(cx);
        if let Poll::Ready(Err(error)) = &filled {
            self.report(error);
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.exchange.data()
    }

    fn consume(&mut self, count: usize) {
        self.exchange.consume(count);
    }

    fn trailers(&self) -> Option<&Fields> {
        self.exchange.trailers().filter(|_| self.accepts_trailers)
    }
}

fn fault(kind: ErrorKind) -> Option<UpstreamFault> {
    match kind {
        ErrorKind::Connect => Some(UpstreamFault::Connect),
        ErrorKind::ConnectTimeout => Some(UpstreamFault::ConnectTimeout),
        ErrorKind::NoResponse => Some(UpstreamFault::NoResponse),
        ErrorKind::Upstream => Some(UpstreamFault::Truncated),
        ErrorKind::Malformed => Some(UpstreamFault::Malformed),
        ErrorKind::Timeout => Some(UpstreamFault::Timeout),
        _ => None,
    }
}

fn announce(route: &str, change: BreakerTransition) {
    match change {
        None => {}
        Some(BreakerState::Open) => Event::BreakerOpened { route }.emit(),
        Some(BreakerState::HalfOpen) => Event::BreakerHalfOpen { route }.emit(),
        Some(BreakerState::Closed) => Event::BreakerClosed { route }.emit(),
    }
}
