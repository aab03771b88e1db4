//! What stands behind the gateway: endpoints under one name, with one deadline for a whole exchange.
//!
//! A request that was never sent may go to another endpoint; one that was sent is not sent again, except on a kept
//! connection that its server had closed before reading it (RFC 9112 section 9.3.1), and only when repeating is safe.

mod exchange;
mod pool;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

pub use exchange::{Exchange, Tunnel};
pub use pool::sweep;

use crate::endpoint::{Endpoints, Visit};
use crate::http::body::RequestBody;
use crate::http::h1::{Link, LinkError};
use crate::http::message::{Request, Response};
use crate::{breaker, endpoint};

/// One `[upstreams.X]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The name that routes refer to.
    pub name: Arc<str>,
    /// The servers, at least one.
    pub endpoints: Vec<endpoint::Address>,
    /// How one of them is chosen.
    pub balance: endpoint::Balance,
    /// From the first packet to an open connection.
    pub connect_timeout: Duration,
    /// The whole exchange, from the choice of an endpoint to the last byte of the answer.
    pub timeout: Duration,
    /// When calls are cut off.
    pub breaker: breaker::Settings,
}

impl Settings {
    /// An upstream with the defaults of every key but its endpoints.
    pub fn new(name: Arc<str>, endpoints: Vec<endpoint::Address>) -> Self {
        Settings {
            name,
            endpoints,
            balance: endpoint::Balance::default(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(10),
            breaker: breaker::Settings::default(),
        }
    }
}

/// A call without an answer.
#[derive(Debug)]
pub struct Failure {
    /// The endpoint that was tried last.
    pub endpoint: Option<Arc<str>>,
    pub error: LinkError,
}

/// A named set of endpoints, shared by all threads.
pub struct Upstream {
    settings: Settings,
    endpoints: Arc<Endpoints>,
}

impl Upstream {
    pub fn new(settings: Settings) -> Self {
        let endpoints = Arc::new(Endpoints::new(&settings.endpoints, settings.balance));
        Upstream { settings, endpoints }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Sends `request` to an endpoint and reads the head of its answer into `response`; the body follows from the exchange.
    /// Dropping the future or the exchange closes the connection: the upstream sees at once that nobody waits.
    ///
    /// # Errors
    /// The failure of the last endpoint that was tried.
    pub async fn send<'a>(
        &self,
        request: &Request,
        mut body: RequestBody<'a>,
        response: &mut Response,
    ) -> Result<Exchange<'a>, Failure> {
        let now = Instant::now();
        let deadline = now + self.settings.timeout;
        let mut tried = 0u64;
        let mut failure = Failure { endpoint: None, error: LinkError::Timeout };
        while let Some(index) = self.endpoints.choose(tried, now.into_std()) {
            tried |= if index < 64 { 1 << index } else { u64::MAX };
            let visit = Visit::new(Arc::clone(&self.endpoints), index);
            let failed = |error| Failure { endpoint: Some(Arc::clone(&self.endpoints.get(index).name)), error };
            match self.connect(index, deadline, true).await {
                Ok(link) => {
                    let link = self.run(index, link, request, &mut body, deadline, response).await.map_err(failed)?;
                    return Ok(Exchange::new(link, body, visit));
                }
                Err(error) => {
                    self.endpoints.rest(index, std::time::Instant::now());
                    failure = failed(error);
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(failure)
    }

    /// The exchange on `link`, and once more on a new connection where a kept one turns out to be dead.
    async fn run(
        &self,
        index: usize,
        mut link: Box<Link>,
        request: &Request,
        body: &mut RequestBody<'_>,
        deadline: Instant,
        response: &mut Response,
    ) -> Result<Box<Link>, LinkError> {
        let was_used = link.is_used();
        match link.exchange(request, body, deadline, response).await {
            Ok(()) => Ok(link),
            Err(LinkError::NoAnswer(_)) if was_used && request.method.is_idempotent() && body.is_untouched() => {
                let mut link = self.connect(index, deadline, false).await?;
                link.exchange(request, body, deadline, response).await?;
                Ok(link)
            }
            Err(error) => Err(error),
        }
    }

    async fn connect(&self, index: usize, deadline: Instant, may_reuse: bool) -> Result<Box<Link>, LinkError> {
        let endpoint = self.endpoints.get(index);
        let patience = || self.settings.connect_timeout.min(deadline.saturating_duration_since(Instant::now()));
        let resolved = match endpoint.numeric {
            Some(resolved) => resolved,
            None => timeout(patience(), endpoint::resolve(&endpoint.address))
                .await
                .map_err(|_| LinkError::ConnectTimeout)?
                .map_err(LinkError::Connect)?,
        };
        if may_reuse && let Some(link) = pool::take(resolved) {
            return Ok(link);
        }
        Link::connect(resolved, patience()).await.map(Box::new)
    }
}
