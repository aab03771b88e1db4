//! Idle connections to upstreams, kept by the thread that opened them.
//!
//! Bounded per endpoint and in time: a server closes idle connections too, and whoever closes first avoids the race.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use crate::http::h1::Link;

/// Idle connections per endpoint and thread; more than that in flight at once is rare, and closing them is cheap.
const IDLE_MAX: usize = 256;
/// How long a connection may idle; common servers close at 5 s (Node) to 75 s (nginx).
const IDLE_FOR: Duration = Duration::from_secs(4);

#[derive(Default)]
struct Shelf {
    links: Vec<(Instant, Box<Link>)>,
}

thread_local! {
    static SHELVES: RefCell<HashMap<SocketAddr, Shelf, foldhash::fast::RandomState>> = RefCell::default();
}

/// The most recently used connection that still stands.
pub(super) fn take(address: SocketAddr) -> Option<Box<Link>> {
    SHELVES.with_borrow_mut(|shelves| {
        let shelf = shelves.get_mut(&address)?;
        while let Some((since, mut link)) = shelf.links.pop() {
            if since.elapsed() >= IDLE_FOR {
                // Those below are older still.
                shelf.links.clear();
                return None;
            }
            // Polled without a task: the answer counts now, nobody waits for a change.
            if link.poll_dead(&mut Context::from_waker(Waker::noop())).is_pending() {
                return Some(link);
            }
        }
        None
    })
}

/// Keeps a connection whose exchange ended cleanly.
pub(super) fn give(address: SocketAddr, mut link: Box<Link>) {
    link.rest();
    SHELVES.with_borrow_mut(|shelves| {
        let shelf = shelves.entry(address).or_default();
        let now = Instant::now();
        // The oldest are at the front; two looks a call keep pace with one addition.
        let stale = shelf.links.iter().take(2).take_while(|(since, _)| now.duration_since(*since) >= IDLE_FOR).count();
        shelf.links.drain(..stale);
        if shelf.links.len() < IDLE_MAX {
            shelf.links.push((now, link));
        }
    });
}

/// Closes what has idled too long on this thread; a worker calls it now and then.
pub fn sweep() {
    SHELVES.with_borrow_mut(|shelves| {
        shelves.retain(|_, shelf| {
            shelf.links.retain(|(since, _)| since.elapsed() < IDLE_FOR);
            !shelf.links.is_empty()
        });
    });
}
