//! The endpoints of one upstream at one time, and the selection of one of them.
//!
//! A set never changes: a new answer of a source makes a new set, which replaces the old one as a
//! whole. Endpoints that are in both keep their state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::{BalancePolicy, Endpoint, EndpointAvailability, Locality, millis};

/// Up to this number of endpoints all are compared; of more, two that are chosen at random. Two
/// choices are nearly as good (Mitzenmacher), and several gateways do not all choose the same one.
const COMPARED_MAX: usize = 4;
/// With consistent hashing, an endpoint has at most this many times the mean of requests in flight
/// (Mirrokni, Thorup, Zadimoghaddam: consistent hashing with bounded loads).
const LOAD_FACTOR: f64 = 1.25;
/// The reciprocal of the golden ratio: its multiples are spread evenly whatever their number.
const GOLDEN: f64 = 0.618_033_988_749_895;

/// How the endpoints of an upstream are selected.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct BalanceConfig {
    pub(crate) policy: BalancePolicy,
    /// How long an endpoint that joins or comes back gets less than its share; 0: not at all.
    pub(crate) slow_start: Duration,
}

/// A request as selection sees it.
#[derive(Clone, Copy)]
pub(crate) struct Pick {
    pub(crate) now: Instant,
    /// The hash of what decides with consistent hashing.
    pub(crate) hash: u64,
}

/// All endpoints of one upstream.
pub(crate) struct EndpointSet {
    list: Vec<Arc<Endpoint>>,
    balance: BalanceConfig,
    /// Whether some endpoints are in other zones.
    has_zones: bool,
    /// The number of endpoints that may be out at a time.
    out_max: usize,
    /// The number of selections.
    next: AtomicU64,
}

/// Endpoints of equal preference.
type Candidates<'s> = SmallVec<[&'s Arc<Endpoint>; 16]>;

impl EndpointSet {
    /// `share` is the largest share of endpoints that may be out at a time.
    pub(crate) fn new(list: Vec<Arc<Endpoint>>, balance: BalanceConfig, share: f64) -> Self {
        // Both are small: a set has some thousand endpoints at most.
        let out_max = (list.len() as f64 * share) as usize;
        let has_zones = list.iter().any(|endpoint| endpoint.locality() == Locality::Remote);
        EndpointSet { list, balance, has_zones, out_max, next: AtomicU64::new(0) }
    }

    pub(crate) fn list(&self) -> &[Arc<Endpoint>] {
        &self.list
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

    /// Selects an endpoint that is not in `tried`: the available ones first, then by priority.
    /// After an attempt, those of the other address family are preferred (RFC 8305 section 4).
    /// `None` if none is left.
    pub(crate) fn select(&self, tried: &[Arc<Endpoint>], pick: Pick) -> Option<&Arc<Endpoint>> {
        if let [only] = &self.list[..] {
            return Some(only).filter(|only| !tried.iter().any(|tried| Arc::ptr_eq(tried, only)));
        }
        let candidates = self.candidates(tried, pick.now);
        if let [only] = &candidates[..] {
            return Some(only);
        }
        if candidates.is_empty() {
            return None;
        }
        let turn = self.next.fetch_add(1, Relaxed);
        Some(match self.balance.policy {
            BalancePolicy::RoundRobin => self.in_turn(&candidates, turn, pick.now),
            BalancePolicy::LeastRequest | BalancePolicy::Ewma => self.least_loaded(&candidates, turn, pick.now),
            BalancePolicy::ConsistentHash => self.by_hash(&candidates, pick),
        })
    }

    /// The untried endpoints of the best preference.
    fn candidates(&self, tried: &[Arc<Endpoint>], now: Instant) -> Candidates<'_> {
        let last = tried.last().map(|endpoint| endpoint.address().is_ipv4());
        let prefers_zone = self.has_zones && self.prefers_zone(now);
        let mut is_panicking = None;
        let mut candidates = Candidates::new();
        let mut best = None;
        for endpoint in &self.list {
            if tried.iter().any(|tried| Arc::ptr_eq(tried, endpoint)) {
                continue;
            }
            let availability = match endpoint.availability(now) {
                EndpointAvailability::Out if *is_panicking.get_or_insert_with(|| self.is_panicking(now)) => {
                    EndpointAvailability::Available
                }
                availability => availability,
            };
            let is_remote = prefers_zone && endpoint.locality() == Locality::Remote;
            let is_same_family = last == Some(endpoint.address().is_ipv4());
            let preference = (availability, endpoint.priority, is_remote, is_same_family);
            match best {
                Some(known) if preference > known => continue,
                Some(known) if preference == known => {}
                _ => {
                    candidates.clear();
                    best = Some(preference);
                }
            }
            candidates.push(endpoint);
        }
        candidates
    }

    /// Whether the zone of this node is preferred: at least half of its endpoints are available.
    /// Fewer would be overloaded by what is meant for all of them.
    fn prefers_zone(&self, now: Instant) -> bool {
        let local = || self.list.iter().filter(|endpoint| endpoint.locality() == Locality::Local);
        let available = local().filter(|endpoint| endpoint.availability(now) == EndpointAvailability::Available);
        2 * available.count() >= local().count()
    }

    /// Each in turn, as often as its weight says.
    fn in_turn<'s>(&self, candidates: &[&'s Arc<Endpoint>], turn: u64, now: Instant) -> &'s Arc<Endpoint> {
        let weights: SmallVec<[f64; 16]> = candidates.iter().map(|endpoint| self.weight(endpoint, now)).collect();
        if weights.iter().all(|weight| *weight == weights[0]) {
            return candidates[index(turn, candidates.len())];
        }
        // The fractional parts of these multiples cover the weights evenly.
        let mut left = (turn as f64 * GOLDEN).fract() * weights.iter().sum::<f64>();
        for (endpoint, weight) in candidates.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return endpoint;
            }
        }
        candidates[candidates.len() - 1]
    }

    /// The one with the least load, of all or of two.
    fn least_loaded<'s>(&self, candidates: &[&'s Arc<Endpoint>], turn: u64, now: Instant) -> &'s Arc<Endpoint> {
        let count = candidates.len();
        let load = |index: usize| {
            let endpoint = candidates[index];
            let now_ms = millis(now);
            let latency = match self.balance.policy {
                BalancePolicy::Ewma => endpoint.load.latency(endpoint.in_flight(), now_ms),
                _ => 1.0,
            };
            let waiting = (endpoint.in_flight() + 1) as f64;
            waiting * latency * endpoint.load.penalty(now_ms) / self.weight(endpoint, now)
        };
        let first = index(turn, count);
        if count <= COMPARED_MAX {
            // The first of equals is selected, and the order rotates with every call.
            let order = (0..count).map(|step| (first + step) % count);
            let least = order.map(|index| (load(index), index)).reduce(|a, b| if b.0 < a.0 { b } else { a });
            return candidates[least.map_or(first, |(_, index)| index)];
        }
        let random = mix(turn);
        let a = index(random, count);
        let b = (a + 1 + index(random >> 32, count - 1)) % count;
        candidates[if load(b) < load(a) { b } else { a }]
    }

    /// The one with the highest score for the hash (rendezvous hashing), among those that have not
    /// more than their bound of requests in flight. When an endpoint joins or leaves, only the
    /// requests that it gets or had move.
    fn by_hash<'s>(&self, candidates: &[&'s Arc<Endpoint>], pick: Pick) -> &'s Arc<Endpoint> {
        let in_flight: usize = candidates.iter().map(|endpoint| endpoint.in_flight()).sum();
        let weights: f64 = candidates.iter().map(|endpoint| self.weight(endpoint, pick.now)).sum();
        let now_ms = millis(pick.now);
        let mut best: Option<(bool, f64, &'s Arc<Endpoint>)> = None;
        for endpoint in candidates {
            let weight = self.weight(endpoint, pick.now);
            let bound = (LOAD_FACTOR * (in_flight + 1) as f64 * weight / weights).ceil();
            // One that fails quickly has few requests in flight. Those that others cannot take must
            // not all go there.
            let load = ((endpoint.in_flight() + 1) as f64 * endpoint.load.penalty(now_ms)).floor();
            let is_below = load <= bound;
            // Uniform in (0, 1].
            let uniform = ((mix(pick.hash ^ endpoint.hash) >> 11) + 1) as f64 / (1_u64 << 53) as f64;
            let score = -weight / uniform.ln();
            if best.is_none_or(|(below, known, _)| (is_below, score) > (below, known)) {
                best = Some((is_below, score, endpoint));
            }
        }
        best.map_or(candidates[0], |(_, _, endpoint)| endpoint)
    }

    fn weight(&self, endpoint: &Endpoint, now: Instant) -> f64 {
        endpoint.load.weight(if self.balance.slow_start.is_zero() { 0 } else { millis(now) }, self.balance.slow_start)
    }
}

fn index(number: u64, length: usize) -> usize {
    usize::try_from(number % length as u64).unwrap_or(0)
}

/// A permutation of numbers that looks random (splitmix64).
pub(super) fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}
