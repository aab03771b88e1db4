//! Idle upstream connections, one pool per peer and thread.
//!
//! Bounded in number and in time. The timeout is shorter than that of common servers, so that a
//! server rarely closes a connection while it is being reused.

use std::cell::RefCell;
use std::collections::HashMap;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use crate::connect::ConnectionKey;
use crate::http::h1::UpstreamConnection;

/// Maximum idle connections per peer and thread, at less than 2 KiB each. A few HTTP/2
/// connections have hundreds of concurrent requests; opening a connection costs more than the rest
/// of an exchange.
const IDLE_MAX: usize = 1_024;
/// Maximum idle time of a connection. Common servers close after 5 s (Node) to 75 s (nginx).
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Idle connections of one thread to one peer, at most `IDLE_MAX`, oldest first, each
/// with the time of its return.
#[derive(Default)]
struct IdlePool {
    connections: Vec<(Instant, Box<UpstreamConnection>)>,
}

thread_local! {
    static POOLS: RefCell<HashMap<ConnectionKey, IdlePool, foldhash::fast::RandomState>> = RefCell::default();
}

/// Takes the most recently used connection that is still open.
pub(super) fn take(key: &ConnectionKey) -> Option<Box<UpstreamConnection>> {
    POOLS.with_borrow_mut(|pools| {
        let pool = pools.get_mut(key)?;
        while let Some((since, mut connection)) = pool.connections.pop() {
            if since.elapsed() >= IDLE_TIMEOUT {
                // The remaining connections are older.
                pool.connections.clear();
                return None;
            }
            // Polled without a task: only the current state matters, no wake-up is needed.
            if connection.poll_closed(&mut Context::from_waker(Waker::noop())).is_pending() {
                return Some(connection);
            }
        }
        None
    })
}

/// Returns a connection whose exchange ended cleanly.
pub(super) fn put(key: &ConnectionKey, mut connection: Box<UpstreamConnection>) {
    connection.release_buffers();
    POOLS.with_borrow_mut(|pools| {
        let pool = match pools.get_mut(key) {
            Some(pool) => pool,
            None => pools.entry(key.clone()).or_default(),
        };
        let now = Instant::now();
        // The oldest connections are at the front. Two checks per call keep pace with one addition.
        let stale =
            pool.connections.iter().take(2).take_while(|(since, _)| now.duration_since(*since) >= IDLE_TIMEOUT).count();
        pool.connections.drain(..stale);
        if pool.connections.len() < IDLE_MAX {
            pool.connections.push((now, connection));
        }
    });
}

/// Closes the connections of this thread that exceeded the idle timeout. Called periodically by the
/// worker.
pub(crate) fn sweep() {
    POOLS.with_borrow_mut(|pools| {
        pools.retain(|_, pool| {
            pool.connections.retain(|(since, _)| since.elapsed() < IDLE_TIMEOUT);
            !pool.connections.is_empty()
        });
    });
}
