//! Connections to upstreams that are kept, one pool per peer and thread: idle ones of HTTP/1.1, and
//! those of HTTP/2, which requests share.
//!
//! Bounded in number and in time. The timeout of HTTP/1.1 is shorter than that of common servers,
//! so that a server rarely closes a connection while it is being reused. Requests that need a
//! further connection of HTTP/2 wait for one that is being opened.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::connect::{ConnectionKey, Connector};
use crate::http::attempt::UpstreamConnectionError;
use crate::http::h1::Http1UpstreamConnection;
use crate::http::upstream_connection::{
    Http2UpstreamConnection, Http2UpstreamStream, NewUpstreamConnection, UpstreamConnection, WindowReservation,
};

/// Maximum idle connections per peer and thread, at less than 2 KiB each. A few HTTP/2
/// connections have hundreds of concurrent requests; opening a connection costs more than the rest
/// of an exchange.
const IDLE_MAX: usize = 1_024;
/// Maximum idle time of a connection. Common servers close after 5 s (Node) to 75 s (nginx).
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// The protocols that a request can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AllowedProtocols {
    Any,
    /// The request offers to switch protocols, which HTTP/2 does not have.
    Http1,
}

/// Connections of one thread to one peer.
#[derive(Default)]
struct PeerPool {
    /// Idle ones of HTTP/1.1, at most `IDLE_MAX`, oldest first, each with the time of its return.
    idle: Vec<(Instant, Box<Http1UpstreamConnection>)>,
    /// Those of HTTP/2, oldest first. Each ends itself when it was idle for long.
    shared: Vec<Rc<Http2UpstreamConnection>>,
    /// Whether the last connection spoke HTTP/2: the next one probably does too.
    is_http2: bool,
    /// The connection of HTTP/2 that is being opened.
    opening: Option<Rc<SharedOpening>>,
}

impl PeerPool {
    /// Takes a place on the oldest connection that has one, so that the others become idle. While
    /// there is memory for it, a connection with wide windows.
    fn begin_stream(&mut self) -> Option<UpstreamConnection> {
        self.shared.retain(|connection| !connection.is_closed());
        if self.shared.is_empty() {
            return None;
        }
        self.begin_with(&mut WindowReservation::new())
    }

    /// The same with a reservation of the caller, who keeps it if there is no place.
    fn begin_with(&mut self, reservation: &mut Option<WindowReservation>) -> Option<UpstreamConnection> {
        let stream = self.shared.iter().find_map(|connection| Http2UpstreamStream::begin(connection, reservation));
        stream.map(|stream| UpstreamConnection::Http2(Box::new(stream)))
    }
}

/// A connection that one request opens and others wait for.
#[derive(Default)]
struct SharedOpening {
    ended: Notify,
    is_ended: Cell<bool>,
    /// Why it was not opened.
    failure: RefCell<Option<UpstreamConnectionError>>,
}

impl SharedOpening {
    /// Waits for its end. Cancel safe.
    async fn wait(&self) {
        while !self.is_ended.get() {
            self.ended.notified().await;
        }
    }
}

/// The request that opens a connection for others too. If it is dropped, one of them takes over.
struct OpeningLead<'k> {
    key: &'k ConnectionKey,
    opening: Rc<SharedOpening>,
}

impl Drop for OpeningLead<'_> {
    fn drop(&mut self) {
        with_pool(self.key, |pool| pool.opening = None);
        self.opening.is_ended.set(true);
        self.opening.ended.notify_waiters();
    }
}

thread_local! {
    static POOLS: RefCell<HashMap<ConnectionKey, PeerPool, foldhash::fast::RandomState>> = RefCell::default();
}

fn with_pool<R>(key: &ConnectionKey, act: impl FnOnce(&mut PeerPool) -> R) -> R {
    POOLS.with_borrow_mut(|pools| match pools.get_mut(key) {
        Some(pool) => act(pool),
        None => act(pools.entry(key.clone()).or_default()),
    })
}

/// Takes a place on a connection of HTTP/2, or the most recently used idle connection that is still
/// open.
pub(super) fn take(key: &ConnectionKey, protocols: AllowedProtocols) -> Option<UpstreamConnection> {
    POOLS.with_borrow_mut(|pools| {
        let pool = pools.get_mut(key)?;
        if !pool.shared.is_empty()
            && protocols == AllowedProtocols::Any
            && let Some(stream) = pool.begin_stream()
        {
            return Some(stream);
        }
        while let Some((since, mut connection)) = pool.idle.pop() {
            if since.elapsed() >= IDLE_TIMEOUT {
                // The remaining connections are older.
                pool.idle.clear();
                return None;
            }
            // Polled without a task: only the current state matters, no wake-up is needed.
            if connection.poll_closed(&mut Context::from_waker(Waker::noop())).is_pending() {
                return Some(UpstreamConnection::Http1(connection));
            }
        }
        None
    })
}

/// Opens a connection for one request. One of HTTP/2 is kept for others too, and requests that
/// could share it wait for it instead of opening their own. Cancel safe; the caller bounds the
/// time.
///
/// # Errors
/// As [`Connector::connect`].
pub(super) async fn connect(
    connector: &Connector,
    protocols: AllowedProtocols,
) -> Result<UpstreamConnection, UpstreamConnectionError> {
    if protocols == AllowedProtocols::Http1 && !connector.is_http2() {
        return begin_on(connector.key(), connector.connect_http1().await?).ok_or_else(ended);
    }
    if !connector.may_be_http2() {
        return begin_on(connector.key(), connector.connect().await?).ok_or_else(ended);
    }
    let key = connector.key();
    loop {
        let joined = with_pool(key, |pool| {
            if let Some(stream) = pool.begin_stream() {
                return Err(stream);
            }
            // Until a server has answered, it is not known whether a connection can be shared.
            let is_shared = pool.is_http2 || connector.is_http2();
            Ok(is_shared.then(|| match &pool.opening {
                Some(opening) => (Rc::clone(opening), false),
                None => (Rc::clone(pool.opening.insert(Rc::default())), true),
            }))
        });
        match joined {
            Err(stream) => return Ok(stream),
            Ok(None) => return begin_on(key, connector.connect().await?).ok_or_else(ended),
            Ok(Some((opening, false))) => {
                opening.wait().await;
                if let Some(error) = &*opening.failure.borrow() {
                    return Err(same_failure(error));
                }
            }
            Ok(Some((opening, true))) => {
                let lead = OpeningLead { key, opening };
                let opened = connector.connect().await;
                return match opened {
                    Ok(connection) => begin_on(key, connection).ok_or_else(ended),
                    Err(error) => {
                        *lead.opening.failure.borrow_mut() = Some(same_failure(&error));
                        Err(error)
                    }
                };
            }
        }
    }
}

/// Keeps a new connection of HTTP/2 and takes a place on it. `None`: it ended meanwhile.
fn begin_on(key: &ConnectionKey, connection: NewUpstreamConnection) -> Option<UpstreamConnection> {
    let connection = match connection {
        NewUpstreamConnection::Http1(connection) => return Some(UpstreamConnection::Http1(connection)),
        NewUpstreamConnection::Http2(connection) => connection,
    };
    with_pool(key, |pool| {
        pool.is_http2 = true;
        // Requests that each opened one before it was known that they can share it: one is enough.
        pool.shared.retain(|connection| !connection.is_closed());
        let mut reservation = connection.take_reservation();
        pool.begin_with(&mut reservation).or_else(|| {
            let stream = Http2UpstreamStream::begin(&connection, &mut reservation);
            pool.shared.push(connection);
            stream.map(|stream| UpstreamConnection::Http2(Box::new(stream)))
        })
    })
}

fn ended() -> UpstreamConnectionError {
    UpstreamConnectionError::Ended(io::ErrorKind::ConnectionAborted.into())
}

/// A failure for another request that waited for the same connection.
fn same_failure(error: &UpstreamConnectionError) -> UpstreamConnectionError {
    match error {
        UpstreamConnectionError::Tls(fault, error) => UpstreamConnectionError::Tls(*fault, same_error(error)),
        UpstreamConnectionError::Connect(error) => UpstreamConnectionError::Connect(same_error(error)),
        UpstreamConnectionError::Ended(error) => UpstreamConnectionError::Ended(same_error(error)),
        _ => UpstreamConnectionError::Connect(io::ErrorKind::NotConnected.into()),
    }
}

fn same_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error.kind().into(),
    }
}

/// Returns a connection whose exchange ended cleanly.
pub(super) fn put(key: &ConnectionKey, mut connection: Box<Http1UpstreamConnection>) {
    connection.release_buffers();
    with_pool(key, |pool| {
        let now = Instant::now();
        // The oldest connections are at the front. Two checks per call keep pace with one addition.
        let stale =
            pool.idle.iter().take(2).take_while(|(since, _)| now.duration_since(*since) >= IDLE_TIMEOUT).count();
        pool.idle.drain(..stale);
        if pool.idle.len() < IDLE_MAX {
            pool.idle.push((now, connection));
        }
    });
}

/// Closes the connections of this thread that exceeded the idle timeout. Called periodically by the
/// worker.
pub(crate) fn sweep() {
    POOLS.with_borrow_mut(|pools| {
        pools.retain(|_, pool| {
            pool.idle.retain(|(since, _)| since.elapsed() < IDLE_TIMEOUT);
            pool.shared.retain(|connection| !connection.is_closed());
            !pool.idle.is_empty() || !pool.shared.is_empty() || pool.opening.is_some()
        });
    });
}
