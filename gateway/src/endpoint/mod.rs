//! The endpoints of an upstream: identity, state and selection.
//!
//! An endpoint is one address. Its state is shared by all threads and outlives every change of the
//! set that it belongs to. An endpoint that could not be reached is tried last for a while. If no
//! endpoint can be reached, all of them are tried, because a failed attempt costs no more than a
//! rejected request.

mod address;
mod set;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

pub(crate) use address::{EndpointAddress, EndpointScheme};
pub(crate) use set::EndpointSet;

/// How a request selects an endpoint of its upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum BalancePolicy {
    /// Each in turn.
    RoundRobin,
    /// The endpoint with the fewest requests in flight; among equals, each in turn.
    #[default]
    LeastRequest,
}

/// How long an endpoint is tried last after its first failed connection. Doubled with each further
/// failure.
const UNREACHABLE_TIME_MIN: Duration = Duration::from_secs(1);
/// The longest time that an endpoint is tried last before another attempt.
const UNREACHABLE_TIME_MAX: Duration = Duration::from_secs(8);

/// One address that a source has found, with its weight and priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EndpointTarget {
    pub(crate) address: SocketAddr,
    /// Endpoints of a lower number are preferred (SRV).
    pub(crate) priority: u16,
}

/// Whether an endpoint is to be tried, in order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum EndpointAvailability {
    Available,
    /// Its last connection failed a short time ago.
    Unreachable,
}

/// One endpoint of an upstream, shared by all threads.
pub(crate) struct Endpoint {
    /// The item of the configuration that it comes from.
    origin: EndpointAddress,
    pub(crate) address: SocketAddr,
    /// Its name in logs and metrics.
    pub(crate) name: Arc<str>,
    pub(crate) priority: u16,
    in_flight: AtomicUsize,
    /// Milliseconds since `EPOCH` until which connections to it are not expected to succeed.
    unreachable_until: AtomicU64,
    /// Failed connections since the last one that succeeded.
    failed_connections: AtomicU32,
}

impl Endpoint {
    pub(crate) fn new(origin: &EndpointAddress, target: EndpointTarget) -> Self {
        Endpoint {
            origin: origin.clone(),
            address: target.address,
            name: origin.name_of(target.address).into(),
            priority: target.priority,
            in_flight: AtomicUsize::new(0),
            unreachable_until: AtomicU64::new(0),
            failed_connections: AtomicU32::new(0),
        }
    }

    /// Whether this is the endpoint that `target` of `origin` stands for.
    pub(crate) fn is(&self, origin: &EndpointAddress, target: EndpointTarget) -> bool {
        self.address == target.address && self.priority == target.priority && self.origin == *origin
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    pub(crate) fn availability(&self, now: Instant) -> EndpointAvailability {
        let until = self.unreachable_until.load(Relaxed);
        // Most endpoints never failed, and the clock is converted for none of these.
        if until > 0 && until > millis(now) {
            EndpointAvailability::Unreachable
        } else {
            EndpointAvailability::Available
        }
    }

    /// Records that no connection could be opened.
    pub(crate) fn record_unreachable(&self, now: Instant) {
        let failed = self.failed_connections.fetch_add(1, Relaxed);
        let time = (UNREACHABLE_TIME_MIN * 2_u32.pow(failed.min(8))).min(UNREACHABLE_TIME_MAX);
        self.unreachable_until.store(millis(now + time), Relaxed);
    }

    /// Records that a connection was opened.
    pub(crate) fn record_reachable(&self) {
        if self.failed_connections.load(Relaxed) > 0 {
            self.failed_connections.store(0, Relaxed);
            self.unreachable_until.store(0, Relaxed);
        }
    }
}

/// A request in flight at an endpoint. Dropping the guard ends the count.
pub(crate) struct InFlightGuard(Arc<Endpoint>);

impl InFlightGuard {
    pub(crate) fn new(endpoint: Arc<Endpoint>) -> Self {
        endpoint.in_flight.fetch_add(1, Relaxed);
        InFlightGuard(endpoint)
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// Milliseconds since the first use of an endpoint in this process.
fn millis(now: Instant) -> u64 {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(now.saturating_duration_since(*EPOCH).as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(count: u16) -> EndpointSet {
        let endpoint = |port| {
            let origin = EndpointAddress::http("127.0.0.1", port);
            let address = origin.numeric().expect("a numeric host");
            Arc::new(Endpoint::new(&origin, EndpointTarget { address, priority: 0 }))
        };
        EndpointSet::new((1..=count).map(endpoint).collect(), BalancePolicy::LeastRequest)
    }

    fn port(selected: Option<&Arc<Endpoint>>) -> Option<u16> {
        selected.map(|endpoint| endpoint.address.port())
    }

    #[test]
    fn tried_endpoints_are_skipped_and_unreachable_ones_come_last() {
        let set = endpoints(3);
        let now = Instant::now();
        let list = set.list();
        list[0].record_unreachable(now);
        assert!((0..6).all(|_| port(set.select(&[], now)) != Some(1)));
        assert_eq!(port(set.select(&list[1..], now)), Some(1));
        assert_eq!(port(set.select(list, now)), None);
        assert!((0..6).any(|_| port(set.select(&[], now + 2 * UNREACHABLE_TIME_MIN)) == Some(1)));
    }

    #[test]
    fn every_endpoint_of_many_is_selected_once() {
        let set = endpoints(200);
        let now = Instant::now();
        let mut tried = Vec::new();
        while let Some(endpoint) = set.select(&tried, now) {
            tried.push(Arc::clone(endpoint));
            assert!(tried.len() <= 200);
        }
        let mut ports: Vec<u16> = tried.iter().map(|endpoint| endpoint.address.port()).collect();
        ports.sort_unstable();
        assert_eq!(ports, (1..=200).collect::<Vec<u16>>());
    }

    #[test]
    fn time_of_an_unreachable_endpoint_grows_to_a_bound_and_ends_with_a_connection() {
        let set = endpoints(1);
        let (endpoint, now) = (&set.list()[0], Instant::now());
        let is_unreachable =
            |after: u64| endpoint.availability(now + Duration::from_millis(after)) == EndpointAvailability::Unreachable;
        for (failures, seconds) in [1, 2, 4, 8, 8, 8].into_iter().enumerate() {
            endpoint.record_unreachable(now);
            assert!(is_unreachable(seconds * 1_000 - 1) && !is_unreachable(seconds * 1_000 + 1), "{failures}");
        }
        endpoint.record_reachable();
        assert!(!is_unreachable(0));
    }

    #[test]
    fn least_loaded_endpoint_is_selected() {
        let set = endpoints(3);
        let now = Instant::now();
        let _busy = [0, 2].map(|index: usize| InFlightGuard::new(Arc::clone(&set.list()[index])));
        assert!((0..6).all(|_| port(set.select(&[], now)) == Some(2)));
    }
}
