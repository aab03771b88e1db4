//! An upstream: a named set of endpoints, with one deadline for a complete exchange.
//!
//! A request that was not sent may go to another endpoint. A request that was sent is not sent
//! again, with one exception: the server closed a reused connection before it read the request (RFC
//! 9112 section 9.3.1), and repeating the request is safe.

mod pool;
mod exchange;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

pub(crate) use exchange::{Tunnel, UpstreamExchange};
pub(crate) use pool::sweep;

use crate::endpoint::{EndpointSet, InFlightGuard};
use crate::http::h1::{UpstreamConnection, UpstreamConnectionError};
use crate::http::message::{Request, Response};
use crate::http::request_body::RequestBody;
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
    /// Limit for the complete exchange, from the selection of an endpoint to the last byte of the
    /// response.
    pub(crate) timeout: Duration,
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
            breaker: breaker::BreakerConfig::default(),
        }
    }
}

/// The endpoint that was called last and its error, where no endpoint gave a response.
#[derive(Debug)]
pub(crate) struct UpstreamFailure {
    /// The endpoint that was tried last.
    pub(crate) endpoint: Option<Arc<str>>,
    pub(crate) error: UpstreamConnectionError,
}

/// Request, body, deadline and response buffer of one exchange with an endpoint.
struct Attempt<'r, 'b> {
    request: &'r Request,
    body: &'r mut RequestBody<'b>,
    response: &'r mut Response,
    deadline: Instant,
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

    /// Sends `request` to an endpoint and reads the response head into `response`. The body follows
    /// from the exchange. Dropping the future or the exchange closes the connection, so that the
    /// upstream can stop early.
    ///
    /// # Errors
    /// The failure of the last endpoint that was tried.
    pub(crate) async fn send<'a>(
        &self,
        request: &Request,
        mut body: RequestBody<'a>,
        response: &mut Response,
    ) -> Result<UpstreamExchange<'a>, UpstreamFailure> {
        let now = Instant::now();
        let deadline = now + self.config.timeout;
        let mut tried = 0u64;
        let mut failure = UpstreamFailure { endpoint: None, error: UpstreamConnectionError::Timeout };
        while let Some(index) = self.endpoints.select(tried, now.into_std()) {
            tried |= if index < 64 { 1 << index } else { u64::MAX };
            let in_flight = InFlightGuard::new(Arc::clone(&self.endpoints), index);
            let failed = |error| UpstreamFailure { endpoint: Some(Arc::clone(&self.endpoints.get(index).name)), error };
            match self.connect(index, deadline, true).await {
                Ok(connection) => {
                    let attempt = Attempt { request, body: &mut body, response, deadline };
                    let connection = self.run(index, connection, attempt).await.map_err(failed)?;
                    return Ok(UpstreamExchange::new(connection, body, in_flight));
                }
                Err(error) => {
                    self.endpoints.eject(index, std::time::Instant::now());
                    failure = failed(error);
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(failure)
    }

    /// Runs the exchange on `connection`. Repeats it on a new connection if a reused one turns out
    /// to be closed.
    async fn run(
        &self,
        index: usize,
        mut connection: Box<UpstreamConnection>,
        attempt: Attempt<'_, '_>,
    ) -> Result<Box<UpstreamConnection>, UpstreamConnectionError> {
        let Attempt { request, body, response, deadline } = attempt;
        let is_reused = connection.is_reused();
        match connection.exchange(request, body, deadline, response).await {
            Ok(()) => Ok(connection),
            Err(UpstreamConnectionError::NoResponse(_))
                if is_reused && request.method.is_idempotent() && body.is_replayable() =>
            {
                let mut connection = self.connect(index, deadline, false).await?;
                connection.exchange(request, body, deadline, response).await?;
                Ok(connection)
            }
            Err(error) => Err(error),
        }
    }

    async fn connect(
        &self,
        index: usize,
        deadline: Instant,
        may_reuse: bool,
    ) -> Result<Box<UpstreamConnection>, UpstreamConnectionError> {
        let endpoint = self.endpoints.get(index);
        let time_left = || self.config.connect_timeout.min(deadline.saturating_duration_since(Instant::now()));
        let resolved = match endpoint.numeric {
            Some(resolved) => resolved,
            None => timeout(time_left(), endpoint::resolve(&endpoint.address))
                .await
                .map_err(|_| UpstreamConnectionError::ConnectTimeout)?
                .map_err(UpstreamConnectionError::Connect)?,
        };
        if may_reuse && let Some(connection) = pool::take(resolved) {
            return Ok(connection);
        }
        UpstreamConnection::connect(resolved, time_left()).await.map(Box::new)
    }
}
