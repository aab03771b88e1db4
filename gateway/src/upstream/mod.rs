//! An upstream: a named set of endpoints, with the timeouts of its exchanges.
//!
//! A request that was not sent may go to another endpoint. A request that was sent is not sent
//! again, with one exception: the server closed a reused connection before it read the request (RFC
//! 9112 section 9.3.1), and repeating the request is safe.

mod pool;
mod exchange;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

pub(crate) use exchange::{Tunnel, UpstreamExchange};
pub(crate) use pool::sweep;

use crate::endpoint::{Endpoint, EndpointSet, InFlightGuard};
use crate::http::exchange_clock::{Blame, ExchangeTimeout, ExchangeTimeouts};
use crate::http::h1::{UpstreamAttempt, UpstreamConnection, UpstreamConnectionError};
use crate::http::message::{Request, Response};
use crate::http::request_body::RequestBody;
use crate::tasks::{self, TaskWait};
use crate::{breaker, endpoint};

/// Configuration of one upstream (`[upstreams.X]`): endpoints, load balancing, timeouts and
/// breaker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct UpstreamConfig {
    /// The name that routes refer to.
    pub(crate) name: Arc<str>,
    /// The endpoints, at least one.
    pub(crate) endpoints: Vec<endpoint::EndpointAddress>,
    /// How an endpoint is selected.
    pub(crate) balance: endpoint::BalancePolicy,
    /// Limit for opening a connection.
    pub(crate) connect_timeout: Duration,
    /// From the complete request sent to the head of the response.
    pub(crate) timeout: Duration,
    /// Between two moves of a body, of request or response.
    pub(crate) idle_timeout: Duration,
    /// The whole exchange, from the selection of an endpoint to the last byte of the response;
    /// `None`: no limit.
    pub(crate) total_timeout: Option<Duration>,
    /// When the circuit breaker opens.
    pub(crate) breaker: breaker::BreakerConfig,
}

impl UpstreamConfig {
    /// An upstream with the defaults of every key except its endpoints.
    pub(crate) fn new(name: Arc<str>, endpoints: Vec<endpoint::EndpointAddress>) -> Self {
        UpstreamConfig {
            name,
            endpoints,
            balance: endpoint::BalancePolicy::default(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            total_timeout: None,
            breaker: breaker::BreakerConfig::default(),
        }
    }

    /// The timeouts of an exchange once its connection is open.
    pub(crate) fn timeouts(&self) -> ExchangeTimeouts {
        ExchangeTimeouts { head: self.timeout, idle: self.idle_timeout, total: self.total_timeout }
    }
}

/// The endpoint that was called last and its error, where no endpoint gave a response.
#[derive(Debug)]
pub(crate) struct UpstreamFailure {
    /// The endpoint that was tried last.
    pub(crate) endpoint: Option<Arc<str>>,
    pub(crate) error: UpstreamConnectionError,
    /// Whether the failure is proof of a fault of the upstream. One that fails before the client
    /// has delivered its whole request may have waited for the client.
    pub(crate) is_verdict: bool,
}

impl UpstreamFailure {
    fn new(endpoint: &Endpoint, error: UpstreamConnectionError) -> Self {
        UpstreamFailure {
            endpoint: Some(Arc::clone(&endpoint.name)),
            is_verdict: error.blame() == Blame::Upstream,
            error,
        }
    }
}

/// A request for an upstream: its head and timeouts, the response head that is filled, and the
/// caller that learns when the upstream has the whole request.
pub(crate) struct OutgoingRequest<'r> {
    pub(crate) request: &'r Request,
    pub(crate) response: &'r mut Response,
    pub(crate) timeouts: ExchangeTimeouts,
    /// The current time.
    pub(crate) now: Instant,
    /// The end of the whole exchange; `None` without a limit.
    pub(crate) total_at: Option<Instant>,
    /// Called when the upstream has the whole request; again if the request is sent again.
    pub(crate) on_sent: &'r mut dyn FnMut(),
    /// Called for each endpoint that could not be reached before another one was tried.
    pub(crate) on_endpoint_failed: &'r mut dyn FnMut(UpstreamFailure),
}

/// A named set of endpoints, shared by all threads.
pub(crate) struct Upstream {
    config: UpstreamConfig,
    endpoints: Arc<EndpointSet>,
}

impl Upstream {
    pub(crate) fn new(config: UpstreamConfig) -> Self {
        let endpoints = Arc::new(EndpointSet::new(&config.endpoints, config.balance));
        Upstream { config, endpoints }
    }

    pub(crate) fn config(&self) -> &UpstreamConfig {
        &self.config
    }

    /// Sends a request to an endpoint and reads the head of the response. The body follows from the
    /// exchange. Dropping the future or the exchange closes the connection, so that the upstream
    /// can stop early.
    ///
    /// # Errors
    /// The failure of the last endpoint that was tried.
    pub(crate) async fn send<'a>(
        &self,
        outgoing: OutgoingRequest<'_>,
        mut body: RequestBody<'a>,
    ) -> Result<UpstreamExchange<'a>, UpstreamFailure> {
        let OutgoingRequest { request, response, timeouts, now, total_at, on_sent, on_endpoint_failed } = outgoing;
        let is_repeatable = request.method.is_idempotent() && body.is_replayable();
        let mut attempt = UpstreamAttempt {
            request,
            body: &mut body,
            is_repeatable,
            response,
            timeouts,
            total_at,
            on_request_sent: on_sent,
        };
        let mut tried = 0u64;
        let mut failure = None;
        while let Some(index) = self.endpoints.select(tried, now.into_std()) {
            if let Some(failure) = failure.take() {
                on_endpoint_failed(failure);
            }
            tried |= if index < 64 { 1 << index } else { u64::MAX };
            let in_flight = InFlightGuard::new(Arc::clone(&self.endpoints), index);
            match self.connect(index, total_at, true).await {
                Ok(connection) => {
                    let connection = self.run(index, connection, &mut attempt).await?;
                    return Ok(UpstreamExchange::new(connection, body, in_flight));
                }
                Err(error) => {
                    if error.blame() == Blame::Upstream {
                        self.endpoints.eject(index, std::time::Instant::now());
                    }
                    failure = Some(UpstreamFailure::new(self.endpoints.get(index), error));
                }
            }
            // No further endpoint is tried after the time in which a response would be due: a
            // client does not wait for the connect timeouts of a long list.
            if now.elapsed() >= timeouts.head || total_at.is_some_and(|at| Instant::now() >= at) {
                break;
            }
        }
        Err(failure.expect("an upstream has at least one endpoint, and none was tried before"))
    }

    /// Runs the exchange on `connection`. Repeats it on a new connection if a reused one turns out
    /// to be closed.
    async fn run(
        &self,
        index: usize,
        mut connection: Box<UpstreamConnection>,
        attempt: &mut UpstreamAttempt<'_>,
    ) -> Result<Box<UpstreamConnection>, UpstreamFailure> {
        let is_reused = connection.is_reused();
        let mut result = connection.exchange(attempt).await;
        if attempt.is_repeatable && is_reused && matches!(result, Err(UpstreamConnectionError::NoResponse(_))) {
            connection = self
                .connect(index, attempt.total_at, false)
                .await
                .map_err(|error| UpstreamFailure::new(self.endpoints.get(index), error))?;
            result = connection.exchange(attempt).await;
        }
        result.map_err(|error| {
            let failure = UpstreamFailure::new(self.endpoints.get(index), error);
            let is_timeout = matches!(failure.error, UpstreamConnectionError::Timeout(_));
            let is_verdict = failure.is_verdict && (is_timeout || !connection.is_request_incomplete());
            UpstreamFailure { is_verdict, ..failure }
        })?;
        Ok(connection)
    }

    async fn connect(
        &self,
        index: usize,
        total_at: Option<Instant>,
        may_reuse: bool,
    ) -> Result<Box<UpstreamConnection>, UpstreamConnectionError> {
        let endpoint = self.endpoints.get(index);
        let connect_timeout = self.config.connect_timeout;
        let now = Instant::now();
        // One clock for resolving and connecting.
        let (due, timed_out) = match total_at {
            Some(total) if total <= now => return Err(UpstreamConnectionError::Timeout(ExchangeTimeout::Total)),
            Some(total) if total < now + connect_timeout => (total, ExchangeTimeout::Total),
            _ => (now + connect_timeout, ExchangeTimeout::UpstreamConnect),
        };
        let resolved = match endpoint.numeric {
            Some(resolved) => resolved,
            None => timeout_at(due, endpoint::resolve(&endpoint.address))
                .await
                .map_err(|_| UpstreamConnectionError::Timeout(timed_out))?
                .map_err(UpstreamConnectionError::Connect)?,
        };
        if may_reuse && let Some(connection) = pool::take(resolved) {
            return Ok(connection);
        }
        tasks::set_waiting_for(TaskWait::UpstreamConnect);
        match timeout_at(due, UpstreamConnection::connect(resolved)).await {
            Ok(connected) => connected.map(Box::new),
            Err(_) => Err(UpstreamConnectionError::Timeout(timed_out)),
        }
    }
}
