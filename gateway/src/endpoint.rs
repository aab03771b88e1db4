//! The servers of an upstream: their addresses, what each has in flight, and how the next one is chosen.
//!
//! An endpoint that could not be reached rests for a moment; when all rest, all are tried, since guessing beats refusing.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How a request chooses among the endpoints of its upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Balance {
    /// Each in turn.
    RoundRobin,
    /// The one with the fewest requests in flight; of equals, each in turn.
    #[default]
    LeastRequest,
}

/// Host and port of an endpoint, reached by HTTP in the clear.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// A name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// The port; 80 where the URL names none.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How long an endpoint rests after it could not be reached.
const REST: Duration = Duration::from_secs(1);
/// How long a resolved name is believed.
const NAME_TTL: Duration = Duration::from_secs(5);
/// Names remembered by a thread; there are only as many as the configuration holds.
const NAMES_MAX: usize = 1024;

/// One endpoint, shared by all threads.
pub struct Endpoint {
    pub address: Address,
    /// Where the host is an address and needs no resolving.
    pub numeric: Option<SocketAddr>,
    pub name: Arc<str>,
    in_flight: AtomicUsize,
    /// Milliseconds since `Endpoints::begin` until which it rests.
    rests_until: AtomicU64,
}

/// All endpoints of one upstream.
pub struct Endpoints {
    list: Vec<Endpoint>,
    balance: Balance,
    next: AtomicUsize,
    begin: Instant,
}

/// A request in flight at an endpoint; dropping it ends the count.
pub struct Visit {
    endpoints: Arc<Endpoints>,
    index: usize,
}

impl Visit {
    pub fn new(endpoints: Arc<Endpoints>, index: usize) -> Self {
        endpoints.list[index].in_flight.fetch_add(1, Relaxed);
        Visit { endpoints, index }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoints.list[self.index]
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.endpoints.list[self.index].in_flight.fetch_sub(1, Relaxed);
    }
}

impl Endpoints {
    pub fn new(addresses: &[Address], balance: Balance) -> Self {
        let list = addresses
            .iter()
            .map(|address| Endpoint {
                address: address.clone(),
                numeric: address.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, address.port)),
                name: address.to_string().into(),
                in_flight: AtomicUsize::new(0),
                rests_until: AtomicU64::new(0),
            })
            .collect();
        Endpoints { list, balance, next: AtomicUsize::new(0), begin: Instant::now() }
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn get(&self, index: usize) -> &Endpoint {
        &self.list[index]
    }

    /// The next endpoint to ask, not one of `tried` (a set of indexes below 64). `None` when none is left.
    pub fn choose(&self, tried: u64, now: Instant) -> Option<usize> {
        if self.list.len() == 1 {
            return (tried == 0).then_some(0);
        }
        let now = self.millis(now);
        let turn = self.next.fetch_add(1, Relaxed);
        let count = self.list.len();
        let order = (0..count).map(|step| (turn + step) % count);
        let untried = order.filter(|index| *index >= 64 || tried & (1 << index) == 0);
        let key = |index: &usize| {
            let endpoint = &self.list[*index];
            let is_resting = endpoint.rests_until.load(Relaxed) > now;
            let load = if self.balance == Balance::LeastRequest { endpoint.in_flight.load(Relaxed) } else { 0 };
            (is_resting, load)
        };
        // The first of equals wins, and the order turns with every call.
        untried.min_by_key(key)
    }

    /// Lets an endpoint rest that could not be reached.
    pub fn rest(&self, index: usize, now: Instant) {
        self.list[index].rests_until.store(self.millis(now + REST), Relaxed);
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.begin).as_millis()).unwrap_or(u64::MAX)
    }
}

/// Resolves a name, which is no address. Names go to the system's resolver, off this thread, and are remembered for a few seconds.
///
/// # Errors
/// What the resolver reports, or `NotFound`.
pub async fn resolve(address: &Address) -> io::Result<SocketAddr> {
    thread_local!(static NAMES: RefCell<HashMap<Address, (Instant, SocketAddr)>> = RefCell::default());
    let known = NAMES.with_borrow(|names| names.get(address).copied());
    if let Some((_, found)) = known.filter(|(at, _)| at.elapsed() < NAME_TTL) {
        return Ok(found);
    }
    let found = tokio::net::lookup_host((address.host.as_str(), address.port)).await?.next();
    let found = found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))?;
    NAMES.with_borrow_mut(|names| {
        if names.len() >= NAMES_MAX {
            names.clear();
        }
        names.insert(address.clone(), (Instant::now(), found));
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Endpoints {
        let addresses = [1, 2, 3].map(|port| Address { host: "127.0.0.1".into(), port });
        Endpoints::new(&addresses, Balance::LeastRequest)
    }

    #[test]
    fn tried_and_resting_endpoints_come_last() {
        let endpoints = three();
        let now = Instant::now();
        endpoints.rest(0, now);
        assert!((0..6).all(|_| endpoints.choose(0, now) != Some(0)));
        assert_eq!(endpoints.choose(0b110, now), Some(0));
        assert_eq!(endpoints.choose(0b111, now), None);
        assert!((0..6).any(|_| endpoints.choose(0, now + 2 * REST) == Some(0)));
    }

    #[test]
    fn the_least_loaded_is_chosen() {
        let endpoints = Arc::new(three());
        let now = Instant::now();
        let _busy = [0, 2].map(|index| Visit::new(Arc::clone(&endpoints), index));
        assert!((0..6).all(|_| endpoints.choose(0, now) == Some(1)));
    }
}
