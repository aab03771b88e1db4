//! The endpoints of one upstream at one time, and the selection of one of them.
//!
//! A set never changes: a new answer of a source makes a new set, which replaces the old one as a
//! whole. Endpoints that are in both keep their state.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use super::{BalancePolicy, Endpoint, EndpointAvailability};

/// All endpoints of one upstream, in the order in which connections to them are tried.
pub(crate) struct EndpointSet {
    list: Vec<Arc<Endpoint>>,
    balance: BalancePolicy,
    /// The number of endpoints that may be out at a time.
    out_max: usize,
    next: AtomicUsize,
}

impl EndpointSet {
    /// `share` is the largest share of endpoints that may be out at a time.
    pub(crate) fn new(list: Vec<Arc<Endpoint>>, balance: BalancePolicy, share: f64) -> Self {
        // Both are small: a set has some thousand endpoints at most.
        let out_max = (list.len() as f64 * share) as usize;
        EndpointSet { list, balance, out_max, next: AtomicUsize::new(0) }
    }

    /// Whether more endpoints are out than the share allows: then all that are reachable are used,
    /// so that the others are not overloaded.
    pub(crate) fn is_panicking(&self, now: Instant) -> bool {
        self.list.iter().filter(|endpoint| endpoint.is_out(now)).count() > self.out_max
    }

    /// Whether one more endpoint may be ejected.
    pub(crate) fn may_eject(&self, now: Instant) -> bool {
        self.list.iter().filter(|endpoint| endpoint.is_out(now)).count() < self.out_max
    }

    pub(crate) fn list(&self) -> &[Arc<Endpoint>] {
        &self.list
    }

    /// Selects an endpoint that is not in `tried`: the available ones first, then by priority.
    /// After an attempt, those of the other address family are preferred (RFC 8305 section 4).
    /// `None` if none is left.
    pub(crate) fn select(&self, tried: &[Arc<Endpoint>], now: Instant) -> Option<&Arc<Endpoint>> {
        let is_untried = |endpoint: &Arc<Endpoint>| !tried.iter().any(|tried| Arc::ptr_eq(tried, endpoint));
        if let [only] = &self.list[..] {
            return Some(only).filter(|only| is_untried(only));
        }
        let last = tried.last().map(|endpoint| endpoint.address().is_ipv4());
        let mut is_panicking = None;
        let mut availability = |endpoint: &Endpoint| match endpoint.availability(now) {
            EndpointAvailability::Out if *is_panicking.get_or_insert_with(|| self.is_panicking(now)) => {
                EndpointAvailability::Available
            }
            availability => availability,
        };
        let mut preference = |endpoint: &&Arc<Endpoint>| {
            (availability(endpoint), endpoint.priority, last == Some(endpoint.address().is_ipv4()))
        };
        let untried = || self.list.iter().filter(|endpoint| is_untried(endpoint));
        let (mut best, mut count) = (None, 0);
        for preference in untried().map(|endpoint| preference(&endpoint)) {
            match best {
                Some(known) if preference > known => {}
                Some(known) if preference == known => count += 1,
                _ => (best, count) = (Some(preference), 1),
            }
        }
        let best = best?;
        let offset = self.next.fetch_add(1, Relaxed) % count;
        let group = untried().filter(|endpoint| preference(endpoint) == best).enumerate();
        // The first of equals is selected, and the order rotates with every call.
        let rank = |(index, endpoint): &(usize, &Arc<Endpoint>)| {
            let load = if self.balance == BalancePolicy::LeastRequest { endpoint.in_flight() } else { 0 };
            (load, (index + count - offset) % count)
        };
        group.min_by_key(rank).map(|(_, endpoint)| endpoint)
    }
}
