//! Active health checks: each endpoint is asked for a path at an interval, over a connection of its
//! own.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use super::Upstream;
use crate::endpoint::Endpoint;
use crate::http::attempt::UpstreamAttempt;
use crate::http::body::{BodyError, BodySource};
use crate::http::exchange_clock::ExchangeTimeouts;
use crate::http::message::{Request, Response};
use crate::http::upstream_connection::{Http2UpstreamStream, NewUpstreamConnection, UpstreamConnection};
use crate::tasks::{self, TaskWait};

/// Health checks of an upstream's endpoints (`[upstreams.X.health]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HealthConfig {
    /// Path and query of the request.
    pub(crate) path: String,
    /// `Host` of the request; `None`: that of the endpoint.
    pub(crate) host: Option<String>,
    /// Between two checks of an endpoint.
    pub(crate) interval: Duration,
    /// Limit of one check, from connecting to the head of the response.
    pub(crate) timeout: Duration,
    /// Passed checks in a row after which an endpoint is healthy again.
    pub(crate) healthy: u32,
    /// Failed checks in a row after which an endpoint is unhealthy.
    pub(crate) unhealthy: u32,
    /// Statuses that pass a check: single ones, or classes as in `2` for 2xx.
    pub(crate) expect: Vec<u16>,
}

/// Most checks of one upstream at a time: they need a descriptor each.
const CHECKS_MAX: usize = 64;

/// A request body without a byte.
struct NoBody;

impl BodySource for NoBody {
    fn poll_fill(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &[]
    }

    fn consume(&mut self, _count: usize) {}
}

/// Checks the endpoints of `upstream` at its interval. Without health checks it forgets the results
/// of those before a reload, and returns at once.
pub(crate) async fn check_health(upstream: &Upstream) {
    let Some(config) = &upstream.config().health else {
        upstream.endpoints().list().iter().for_each(|endpoint| endpoint.forget_checks());
        return;
    };
    let mut next = Instant::now();
    loop {
        tasks::set_waiting_for(TaskWait::UpstreamHead);
        for endpoints in upstream.endpoints().list().chunks(CHECKS_MAX) {
            let checks = endpoints.iter().map(|endpoint| Box::pin(check(endpoint, config)) as CheckFuture<'_>);
            let mut checks: Vec<_> = checks.collect();
            poll_fn(|cx| {
                checks.retain_mut(|check| check.as_mut().poll(cx).is_pending());
                if checks.is_empty() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        // A round that took longer than the interval does not make the next ones follow at once.
        next = (next + config.interval).max(Instant::now());
        tasks::set_waiting_for(TaskWait::Timer);
        sleep_until(next).await;
    }
}

type CheckFuture<'c> = Pin<Box<dyn Future<Output = ()> + 'c>>;

/// Checks one endpoint and records the result.
async fn check(endpoint: &Arc<Endpoint>, config: &HealthConfig) {
    let passed = timeout(config.timeout, is_healthy(endpoint, config)).await.unwrap_or(false);
    endpoint.record_check(passed, if passed { config.healthy } else { config.unhealthy });
}

async fn is_healthy(endpoint: &Endpoint, config: &HealthConfig) -> bool {
    let opened = match endpoint.connector.connect().await {
        Ok(NewUpstreamConnection::Http1(connection)) => Some(UpstreamConnection::Http1(connection)),
        Ok(NewUpstreamConnection::Http2(connection)) => {
            let stream = Http2UpstreamStream::begin(&connection, &mut connection.take_reservation());
            stream.map(|stream| UpstreamConnection::Http2(Box::new(stream)))
        }
        Err(_) => None,
    };
    let Some(mut connection) = opened else { return false };
    let mut request = Request { authority: endpoint.origin().authority(), ..Request::default() };
    if let Some(host) = &config.host {
        request.authority.clone_from(host);
    }
    request.set_target(&config.path);
    request.fields.push(b"User-Agent", b"tidegate-health");
    request.fields.push(b"Connection", b"close");
    let mut response = Response::default();
    let timeouts = ExchangeTimeouts { head: config.timeout, idle: config.timeout, total: None };
    let mut attempt = UpstreamAttempt {
        request: &request,
        body: &mut NoBody,
        response: &mut response,
        timeouts,
        total_at: None,
        on_request_sent: &|| {},
    };
    if connection.exchange(&mut attempt).await.is_err() {
        return false;
    }
    let status = response.status.as_u16();
    config.expect.iter().any(|expected| *expected == status || *expected == status / 100)
}
