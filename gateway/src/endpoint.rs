//! The endpoints of an upstream: addresses, requests in flight, and load balancing.
//!
//! An endpoint that could not be reached is ejected for a short time. If all endpoints are ejected,
//! all are tried, because a failed attempt costs no more than a rejected request.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How a request selects an endpoint of its upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum BalancePolicy {
    /// Each in turn.
    RoundRobin,
    /// The endpoint with the fewest requests in flight; among equals, each in turn.
    #[default]
    LeastRequest,
}

/// Host and port of an endpoint, reached by plain HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EndpointAddress {
    /// A host name, an IPv4 address, or an IPv6 address without brackets.
    pub(crate) host: String,
    /// The port; 80 if the URL has none.
    pub(crate) port: u16,
}

impl fmt::Display for EndpointAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How long an endpoint is ejected after a failed connection.
const EJECTION_TIME: Duration = Duration::from_secs(1);
/// How long a resolved name is cached.
const NAME_TTL: Duration = Duration::from_secs(5);
/// Maximum number of cached names per thread. Only configured names are cached; the cache is
/// cleared at this bound.
const NAMES_MAX: usize = 1024;

/// One endpoint of an upstream, shared by all threads: address, requests in flight, end of its
/// ejection.
pub(crate) struct Endpoint {
    pub(crate) address: EndpointAddress,
    /// The address, if the host is numeric and needs no resolution.
    pub(crate) numeric: Option<SocketAddr>,
    pub(crate) name: Arc<str>,
    in_flight: AtomicUsize,
    /// Milliseconds since `EndpointSet::epoch` until which the endpoint is ejected.
    ejected_until: AtomicU64,
}

/// All endpoints of one upstream, with the policy and the state of load balancing.
pub(crate) struct EndpointSet {
    list: Vec<Endpoint>,
    balance: BalancePolicy,
    next: AtomicUsize,
    epoch: Instant,
}

/// A request in flight at an endpoint. Dropping the guard ends the count.
pub(crate) struct InFlightGuard {
    endpoints: Arc<EndpointSet>,
    index: usize,
}

impl InFlightGuard {
    pub(crate) fn new(endpoints: Arc<EndpointSet>, index: usize) -> Self {
        endpoints.list[index].in_flight.fetch_add(1, Relaxed);
        InFlightGuard { endpoints, index }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoints.list[self.index]
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.endpoints.list[self.index].in_flight.fetch_sub(1, Relaxed);
    }
}

impl EndpointSet {
    pub(crate) fn new(addresses: &[EndpointAddress], balance: BalancePolicy) -> Self {
        let list = addresses
            .iter()
            .map(|address| Endpoint {
                address: address.clone(),
                numeric: address.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, address.port)),
                name: address.to_string().into(),
                in_flight: AtomicUsize::new(0),
                ejected_until: AtomicU64::new(0),
            })
            .collect();
        EndpointSet { list, balance, next: AtomicUsize::new(0), epoch: Instant::now() }
    }

    pub(crate) fn get(&self, index: usize) -> &Endpoint {
        &self.list[index]
    }

    /// Selects the next endpoint that is not in `tried`, a set of indexes below 64. `None` if none
    /// is left.
    pub(crate) fn select(&self, tried: u64, now: Instant) -> Option<usize> {
        if self.list.len() == 1 {
            return (tried == 0).then_some(0);
        }
        let now = self.millis(now);
        let offset = self.next.fetch_add(1, Relaxed);
        let count = self.list.len();
        let order = (0..count).map(|step| (offset + step) % count);
        let untried = order.filter(|index| *index >= 64 || tried & (1 << index) == 0);
        let key = |index: &usize| {
            let endpoint = &self.list[*index];
            let is_ejected = endpoint.ejected_until.load(Relaxed) > now;
            let load = if self.balance == BalancePolicy::LeastRequest { endpoint.in_flight.load(Relaxed) } else { 0 };
            (is_ejected, load)
        };
        // The first of equals is selected, and the order rotates with every call.
        untried.min_by_key(key)
    }

    /// Ejects an endpoint that could not be reached.
    pub(crate) fn eject(&self, index: usize, now: Instant) {
        self.list[index].ejected_until.store(self.millis(now + EJECTION_TIME), Relaxed);
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }
}

/// Resolves a host name with the resolver of the system, on another thread. Results are cached for
/// a few seconds.
///
/// # Errors
/// The error of the resolver, or `NotFound`.
pub(crate) async fn resolve(address: &EndpointAddress) -> io::Result<SocketAddr> {
    thread_local!(static NAMES: RefCell<HashMap<EndpointAddress, (Instant, SocketAddr)>> = RefCell::default());
    let cached = NAMES.with_borrow(|names| names.get(address).copied());
    if let Some((_, resolved)) = cached.filter(|(at, _)| at.elapsed() < NAME_TTL) {
        return Ok(resolved);
    }
    let resolved = tokio::net::lookup_host((address.host.as_str(), address.port)).await?.next();
    let resolved = resolved.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))?;
    NAMES.with_borrow_mut(|names| {
        if names.len() >= NAMES_MAX {
            names.clear();
        }
        names.insert(address.clone(), (Instant::now(), resolved));
    });
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three_endpoints() -> EndpointSet {
        let addresses = [1, 2, 3].map(|port| EndpointAddress { host: "127.0.0.1".into(), port });
        EndpointSet::new(&addresses, BalancePolicy::LeastRequest)
    }

    #[test]
    fn tried_endpoints_are_skipped_and_ejected_ones_come_last() {
        let endpoints = three_endpoints();
        let now = Instant::now();
        endpoints.eject(0, now);
        assert!((0..6).all(|_| endpoints.select(0, now) != Some(0)));
        assert_eq!(endpoints.select(0b110, now), Some(0));
        assert_eq!(endpoints.select(0b111, now), None);
        assert!((0..6).any(|_| endpoints.select(0, now + 2 * EJECTION_TIME) == Some(0)));
    }

    #[test]
    fn least_loaded_endpoint_is_selected() {
        let endpoints = Arc::new(three_endpoints());
        let now = Instant::now();
        let _busy = [0, 2].map(|index| InFlightGuard::new(Arc::clone(&endpoints), index));
        assert!((0..6).all(|_| endpoints.select(0, now) == Some(1)));
    }
}
