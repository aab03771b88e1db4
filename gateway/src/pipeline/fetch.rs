//! The upstream step: breaker, endpoint, exchange; then the answer as the gateway may pass it on.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::Passage;
use crate::breaker::{Breaker, Change, State};
use crate::error::{Error, Kind};
use crate::event::{Event, UpstreamFault};
use crate::hop;
use crate::http::body::{BodyError, RequestBody, Source};
use crate::http::fields::{Fields, Known};
use crate::http::h1::LinkError;
use crate::http::message::{Request, Response};
use crate::identify::{self, Caller};
use crate::route::Route;
use crate::upstream::{Exchange, Failure, Tunnel};

impl Passage<'_> {
    /// Forwards `request` as it stands and reads the answer's head.
    pub(super) async fn forward<'a>(
        &mut self,
        route: &Route,
        caller: &Caller,
        request: &mut Request,
        body: RequestBody<'a>,
        response: &mut Response,
    ) -> Result<Answer<'a>, Error> {
        let heard = self.site.identity.heard(caller, request);
        let takes_trailers = takes_trailers(request);
        hop::forward(request, *self.peer, heard);
        identify::write_trace(caller.trace, self.site.identity.fresh(), &mut request.fields);
        let mut answer = self.call(route, request, body, response).await?;
        answer.takes_trailers = takes_trailers;
        self.story.forwarded_status = Some(response.status.as_u16());
        self.story.upstream = Some(answer.exchange.endpoint());
        Ok(answer)
    }

    /// One call through the route's breaker. The verdict falls with the answer's head.
    async fn call<'a>(
        &mut self,
        route: &Route,
        request: &Request,
        body: RequestBody<'a>,
        response: &mut Response,
    ) -> Result<Answer<'a>, Error> {
        let call = match route.breaker.admit(Instant::now()) {
            Ok((call, change)) => {
                announce(&route.settings.name, change);
                call
            }
            Err((_, change)) => {
                announce(&route.settings.name, change);
                return Err(Error::BreakerOpen);
            }
        };
        let generation = call.generation();
        let result = route.upstream.send(request, body, response).await;
        match &result {
            // A client that left or failed says nothing about the upstream.
            Err(Failure { error: LinkError::ClientGone | LinkError::Client(_), .. }) => drop(call),
            Ok(_) => {
                announce(&route.settings.name, call.judge(!response.status.is_server_error(), Instant::now()));
            }
            Err(_) => announce(&route.settings.name, call.judge(false, Instant::now())),
        }
        let exchange = result.map_err(|Failure { endpoint, error }| {
            let error = Error::from(error);
            self.story.upstream = endpoint;
            if let Some(kind) = fault(error.kind()) {
                let endpoint = self.story.upstream.as_ref().unwrap_or(&route.upstream.settings().name);
                Event::UpstreamFailed { route: &route.settings.name, endpoint, kind }.emit();
            }
            error
        })?;
        hop::strip_answer(response);
        if !response.fields.has(Known::Date) {
            // A recipient with a clock adds what is missing (RFC 9110 section 6.6.1).
            response.fields.add(Known::Date, httpdate::fmt_http_date(self.worker.view.store().wall_time()));
        }
        let (route, breaker) = (Arc::clone(&route.settings.name), Arc::clone(&route.breaker));
        Ok(Answer { exchange, route, breaker, generation, takes_trailers: false })
    }
}

/// Whether a client has said that it reads trailers (RFC 9110 section 6.5.1).
pub(super) fn takes_trailers(request: &Request) -> bool {
    request.fields.members(Known::Te).any(|coding| coding.eq_ignore_ascii_case(b"trailers"))
}

/// An answer whose body is under way: where it breaks off, breaker and log hear of it.
pub struct Answer<'a> {
    exchange: Exchange<'a>,
    route: Arc<str>,
    breaker: Arc<Breaker>,
    generation: u64,
    takes_trailers: bool,
}

impl Answer<'_> {
    /// The connection that has switched protocols.
    pub fn into_tunnel(self) -> Option<Tunnel> {
        self.exchange.into_tunnel()
    }

    /// The trailers of a body that has ended, whether this client reads them or not.
    pub fn all_trailers(&self) -> Option<&Fields> {
        self.exchange.trailers()
    }

    fn tell(&self, error: &BodyError) {
        let kind = match error {
            BodyError::ClientGone => return,
            BodyError::Timeout => UpstreamFault::Timeout,
            BodyError::Malformed(_) => UpstreamFault::Malformed,
            BodyError::Truncated | BodyError::TooLarge | BodyError::Io(_) => UpstreamFault::Cut,
        };
        Event::UpstreamFailed { route: &self.route, endpoint: &self.exchange.endpoint(), kind }.emit();
        announce(&self.route, self.breaker.fail_late(self.generation, Instant::now()));
    }
}

impl Source for Answer<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let filled = self.exchange.poll_fill(cx);
        if let Poll::Ready(Err(error)) = &filled {
            self.tell(error);
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
        self.exchange.trailers().filter(|_| self.takes_trailers)
    }
}

fn fault(kind: Kind) -> Option<UpstreamFault> {
    match kind {
        Kind::Connect => Some(UpstreamFault::Connect),
        Kind::ConnectTimeout => Some(UpstreamFault::ConnectTimeout),
        Kind::NoAnswer => Some(UpstreamFault::NoAnswer),
        Kind::Upstream => Some(UpstreamFault::Cut),
        Kind::Malformed => Some(UpstreamFault::Malformed),
        Kind::Timeout => Some(UpstreamFault::Timeout),
        _ => None,
    }
}

fn announce(route: &str, change: Change) {
    match change {
        None => {}
        Some(State::Open) => Event::BreakerOpened { route }.emit(),
        Some(State::HalfOpen) => Event::BreakerHalfOpen { route }.emit(),
        Some(State::Closed) => Event::BreakerClosed { route }.emit(),
    }
}
