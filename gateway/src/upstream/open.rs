//! Opens a connection for a request: to the selected endpoint first, and to the next ones when it
//! fails or is slow to accept (RFC 8305).
//!
//! Nothing of the request is sent before, so that any number of endpoints may be tried. Each is
//! tried once.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::attempt_error::AttemptError;
use super::pool::{self, AllowedProtocols};
use crate::endpoint::{Endpoint, EndpointAvailability, EndpointSet, InFlightGuard, Pick};
use crate::http::attempt::{AttemptErrorClass, UpstreamConnectionError};
use crate::http::exchange_clock::{Blame, ExchangeTimeout};
use crate::http::upstream_connection::UpstreamConnection;
use crate::spans::{AttemptLog, ConnectSpan};
use crate::tasks::{self, TaskWait};

/// How long a connection attempt runs alone. RFC 8305 section 5 recommends 250 ms.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Most connection attempts of one request at a time.
const ATTEMPTS_MAX: usize = 4;
/// Most endpoints known as unreachable that one request tries. Their connections failed a few
/// seconds ago at most.
const UNREACHABLE_TRIES_MAX: usize = 3;

/// A connection with the count of its request at the endpoint.
pub(super) type OpenedConnection = (InFlightGuard, UpstreamConnection);

/// The endpoints that a request has tried, and its times for the next ones.
pub(super) struct AttemptPlan {
    tried: Vec<Arc<Endpoint>>,
    unreachable_tries: usize,
    /// The endpoint of the next connection, if it is decided.
    next: Option<Arc<Endpoint>>,
    /// Whether idle connections may be used: until one turns out to be dead.
    pub(super) reuses: bool,
    /// Whether the request may be sent again.
    pub(super) is_repeatable: bool,
    pub(super) protocols: AllowedProtocols,
    pub(super) connect_timeout: Duration,
    /// No further endpoint is tried from then on: a client does not wait for the connect timeouts
    /// of a long list.
    pub(super) tries_until: Instant,
    /// The end of the whole exchange; `None` without a limit.
    pub(super) total_at: Option<Instant>,
    /// The hash by which an endpoint is selected with consistent hashing.
    pub(super) hash: u64,
}

/// A connection attempt in progress.
struct Opening {
    in_flight: InFlightGuard,
    started: Instant,
    connecting: Pin<Box<dyn Future<Output = Result<UpstreamConnection, UpstreamConnectionError>>>>,
}

impl Opening {
    /// Notes the attempt, which has ended, for the spans of a sampled request.
    fn note(&self, log: Option<&AttemptLog>, failure: Option<AttemptErrorClass>) {
        let Some(log) = log else { return };
        let endpoint = self.in_flight.endpoint();
        log.push_connect(ConnectSpan {
            endpoint: Arc::clone(&endpoint.name),
            address: endpoint.address(),
            began: self.started.into_std(),
            ended: Instant::now().into_std(),
            failure,
        });
    }
}

/// The end of a wait for connection attempts.
enum OpeningEvent {
    /// The attempt at this index has ended.
    Ended(usize, Result<UpstreamConnection, UpstreamConnectionError>),
    /// The running attempts are slow: it is time for another one.
    Delayed,
}

impl AttemptPlan {
    pub(super) fn new(connect_timeout: Duration, tries_until: Instant, total_at: Option<Instant>) -> Self {
        AttemptPlan {
            tried: Vec::new(),
            unreachable_tries: 0,
            next: None,
            reuses: true,
            is_repeatable: false,
            protocols: AllowedProtocols::Any,
            connect_timeout,
            tries_until,
            total_at,
            hash: 0,
        }
    }

    /// The endpoints that were tried.
    pub(super) fn tried(&self) -> &[Arc<Endpoint>] {
        &self.tried
    }

    /// Opens the next connection to `endpoint`, whether or not it was tried.
    pub(super) fn set_next(&mut self, endpoint: Arc<Endpoint>) {
        if !self.tried.iter().any(|tried| Arc::ptr_eq(tried, &endpoint)) {
            self.tried.push(Arc::clone(&endpoint));
        }
        self.next = Some(endpoint);
    }

    /// Tries endpoints of `set` once more: one that was not tried, or else all again, `failed`
    /// last. Returns whether there is one that was not tried.
    pub(super) fn try_again(&mut self, failed: Option<&Arc<Endpoint>>, set: &EndpointSet) -> bool {
        self.next = None;
        self.tried.extend(failed.cloned());
        let pick = Pick { now: Instant::now().into_std(), hash: self.hash };
        if set.select(&self.tried, pick).is_some() {
            return true;
        }
        self.tried.clear();
        self.unreachable_tries = 0;
        self.tried.extend(failed.filter(|_| set.list().len() > 1).cloned());
        false
    }

    /// Whether further endpoints may be tried at `now`.
    pub(super) fn is_in_time(&self, now: Instant) -> bool {
        now < self.tries_until && self.total_at.is_none_or(|at| now < at)
    }

    /// Takes an idle connection to `endpoint`. A request that must not be repeated gets one that is
    /// still open according to the system: the server may have closed it since the last turn of the
    /// event loop.
    pub(super) fn take_idle(&self, endpoint: &Endpoint) -> Option<UpstreamConnection> {
        while let Some(connection) = pool::take(endpoint.connector.key(), self.protocols) {
            if self.is_repeatable || connection.is_open() {
                return Some(connection);
            }
            connection.abandon();
        }
        None
    }

    /// The endpoint to try next; `None` if no further one is worth an attempt.
    fn next(&mut self, set: &EndpointSet) -> Option<Arc<Endpoint>> {
        if let Some(next) = self.next.take() {
            return Some(next);
        }
        let now = Instant::now();
        if !self.tried.is_empty() && (now >= self.tries_until || self.total_at.is_some_and(|at| now >= at)) {
            return None;
        }
        let endpoint = Arc::clone(set.select(&self.tried, Pick { now: now.into_std(), hash: self.hash })?);
        if endpoint.availability(now.into_std()) == EndpointAvailability::Unreachable {
            self.unreachable_tries += 1;
            if self.unreachable_tries > UNREACHABLE_TRIES_MAX {
                return None;
            }
        }
        self.tried.push(Arc::clone(&endpoint));
        Some(endpoint)
    }

    /// Starts to open a connection to `endpoint`.
    fn open(&self, endpoint: Arc<Endpoint>) -> Opening {
        let now = Instant::now();
        let (due, timed_out) = match self.total_at {
            Some(total) if total < now + self.connect_timeout => (total, ExchangeTimeout::Total),
            _ => (now + self.connect_timeout, ExchangeTimeout::UpstreamConnect),
        };
        let (connector, protocols) = (endpoint.connector.clone(), self.protocols);
        let connecting = Box::pin(async move {
            match timeout_at(due, pool::connect(&connector, protocols)).await {
                Ok(connected) => connected,
                Err(_) => Err(UpstreamConnectionError::Timeout(timed_out)),
            }
        });
        Opening { in_flight: InFlightGuard::new(endpoint), started: now, connecting }
    }
}

/// Gives a connection to an endpoint of `set`, as `plan` says. `failed` gets the failure of each
/// endpoint after which another one was tried, `log` each connection that was tried. Cancel safe.
///
/// # Errors
/// The failure of the last endpoint that was tried.
pub(super) async fn open(
    set: &EndpointSet,
    plan: &mut AttemptPlan,
    failed: &mut Vec<AttemptError>,
    log: Option<&AttemptLog>,
) -> Result<OpenedConnection, AttemptError> {
    tasks::set_waiting_for(TaskWait::UpstreamConnect);
    let mut running: Vec<Opening> = Vec::new();
    let mut failure: Option<AttemptError> = None;
    let mut delay = pin!(sleep(ATTEMPT_DELAY));
    let mut is_exhausted = false;
    loop {
        match plan.next(set) {
            Some(endpoint) => {
                if plan.reuses
                    && let Some(connection) = plan.take_idle(&endpoint)
                {
                    note_slow(&running, Instant::now());
                    running.iter().for_each(|other| other.note(log, Some(AttemptErrorClass::Abandoned)));
                    failed.extend(failure);
                    return Ok((InFlightGuard::new(endpoint), connection));
                }
                running.push(plan.open(endpoint));
                delay.as_mut().reset(Instant::now() + ATTEMPT_DELAY);
            }
            None if running.is_empty() => {
                return Err(failure.unwrap_or_else(|| AttemptError::unsent(None, UpstreamConnectionError::NoAddress)));
            }
            None => is_exhausted = true,
        }
        let may_start = !is_exhausted && running.len() < ATTEMPTS_MAX;
        let event = poll_fn(|cx| {
            for (index, opening) in running.iter_mut().enumerate() {
                if let Poll::Ready(result) = opening.connecting.as_mut().poll(cx) {
                    return Poll::Ready(OpeningEvent::Ended(index, result));
                }
            }
            if may_start { delay.as_mut().poll(cx).map(|()| OpeningEvent::Delayed) } else { Poll::Pending }
        });
        match event.await {
            OpeningEvent::Delayed => {}
            OpeningEvent::Ended(index, Ok(connection)) => {
                let opening = running.swap_remove(index);
                opening.note(log, None);
                running.iter().for_each(|other| other.note(log, Some(AttemptErrorClass::Abandoned)));
                let Opening { in_flight, started, .. } = opening;
                in_flight.endpoint().record_reachable(Instant::now().into_std());
                note_slow(&running, started);
                failed.extend(failure);
                return Ok((in_flight, connection));
            }
            OpeningEvent::Ended(index, Err(error)) => {
                let opening = running.swap_remove(index);
                opening.note(log, Some(error.class()));
                let endpoint = Arc::clone(opening.in_flight.endpoint());
                if error.blame() == Blame::Upstream {
                    endpoint.record_unreachable(Instant::now().into_std());
                }
                failed.extend(failure.replace(AttemptError::unsent(Some(&endpoint), error)));
            }
        }
    }
}

/// Another connection, whose attempt began at `started`, is used: endpoints that had longer by an
/// `ATTEMPT_DELAY` and have not accepted are tried last for a while.
fn note_slow(running: &[Opening], started: Instant) {
    let slow = running.iter().filter(|other| other.started + ATTEMPT_DELAY <= started);
    slow.for_each(|other| other.in_flight.endpoint().record_unreachable(Instant::now().into_std()));
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;

    use super::*;
    use crate::endpoint::{BalanceConfig, EndpointAddress, EndpointScheme, EndpointTarget};
    use crate::http::upstream_connection::NewUpstreamConnection;

    #[tokio::test(flavor = "local")]
    async fn shared_connection_that_the_server_has_closed_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let server = std::thread::spawn(move || {
            let (mut accepted, _) = listener.accept().expect("the connection");
            // SETTINGS without a setting.
            accepted.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).expect("a live connection");
            accepted
        });
        let origin =
            EndpointAddress { scheme: EndpointScheme::H2c, ..EndpointAddress::http("127.0.0.1", address.port()) };
        let target = EndpointTarget::at(address);
        let endpoint = Endpoint::new(&"shop".into(), &origin, target, None);
        let opened = pool::connect(&endpoint.connector, AllowedProtocols::Any).await;
        assert!(opened.is_ok());
        drop(opened);
        // The event loop does not run between this end and the selection below.
        drop(server.join().expect("a server"));
        let mut plan = AttemptPlan::new(Duration::from_secs(5), Instant::now() + Duration::from_secs(5), None);
        assert!(plan.take_idle(&endpoint).is_none());
        plan.is_repeatable = true;
        assert!(plan.take_idle(&endpoint).is_none(), "no request gets it");
    }

    #[tokio::test]
    async fn request_that_must_not_be_repeated_gets_no_connection_that_the_server_has_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let origin = EndpointAddress::http("127.0.0.1", address.port());
        let target = EndpointTarget::at(address);
        let endpoint = Arc::new(Endpoint::new(&"shop".into(), &origin, target, None));
        let set = EndpointSet::new(vec![Arc::clone(&endpoint)], BalanceConfig::default(), 0.5);
        for is_repeatable in [true, false] {
            let connection = endpoint.connector.connect().await;
            let Ok(NewUpstreamConnection::Http1(connection)) = connection else { panic!("a connection") };
            let (accepted, _) = listener.accept().expect("the connection");
            pool::put(endpoint.connector.key(), connection);
            // The event loop does not run between this end and the selection below.
            drop(accepted);
            let mut plan = AttemptPlan::new(Duration::from_secs(5), Instant::now() + Duration::from_secs(5), None);
            plan.is_repeatable = is_repeatable;
            let opened = open(&set, &mut plan, &mut Vec::new(), None).await;
            let (_, connection) = opened.unwrap_or_else(|_| panic!("a connection"));
            // A new connection was not accepted yet, so that it is open.
            assert_eq!(connection.is_open(), !is_repeatable);
        }
    }
}
