//! One node's part of a cluster limit: prepaid tokens, spent here without a round trip.
//!
//! It does no I/O. [`Lease::next_request`] returns what to request from the backend, and
//! [`Lease::apply_grant`] or [`Lease::request_failed`] takes the result; the caller sends the
//! message. Invariant: over any time t, all nodes together admit at most R * t + B, for rate R and
//! burst B, whatever the load. docs/cluster-limits.md specifies the protocol: why the bound holds,
//! its exceptions, the states of a node and the steps of the script.

mod config;
mod backend;
mod server_model;
mod requester;
mod requests;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use backend::{LEASE_SCRIPT, LeaseBackend, LeaseBackendError, LeaseGrant, LeaseRequest};
pub use config::{LeaseConfig, LeaseError, LeaseSource};
use config::{MICRO, NANOS, PENDING_MAX};
use requester::LeaseRequester;
pub use server_model::LeaseServerModel;

use crate::bucket::{Headroom, Throttled};
use crate::clock::MonotonicTime;
use crate::quota::{Cost, Fraction, Quota};
use crate::sync::{AtomicU64, Ordering};

/// A node's prepaid part of a cluster limit; shared by threads, spent with a few atomics.
#[derive(Debug)]
pub struct Lease {
    balance_micros: AtomicU64,
    cap_micros: AtomicU64,
    /// From this time on, the local rate adds to the balance; in nanoseconds.
    refill_from: AtomicU64,
    /// In billionths of a token per second: the local rate, and the rate at which grants are
    /// expected.
    local_nanos: AtomicU64,
    expected_nanos: AtomicU64,
    /// All that the local rate has ever added.
    borrowed_micros: AtomicU64,
    /// All tokens that clients have ever requested, admitted or not.
    demanded: AtomicU64,
    /// The part of `demanded` that must leave a reserve.
    ordinary: AtomicU64,
    /// The largest recent need of a single request.
    peak: AtomicU64,
    requester: Mutex<LeaseRequester>,
}

impl Lease {
    /// A lease that starts empty, at 0.8 of an equal share until the first grant. With
    /// [`LeaseSource::LocalFallback`], one that starts with its whole part of the burst.
    pub fn new(quota: Quota, config: LeaseConfig, now: MonotonicTime) -> Result<Lease, LeaseError> {
        Lease::check(quota, config)?;
        let lease = Lease {
            balance_micros: AtomicU64::new(0),
            cap_micros: AtomicU64::new(0),
            refill_from: AtomicU64::new(now.nanos()),
            local_nanos: AtomicU64::new(0),
            expected_nanos: AtomicU64::new(0),
            borrowed_micros: AtomicU64::new(0),
            demanded: AtomicU64::new(0),
            ordinary: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            requester: Mutex::new(LeaseRequester::new(quota, config, now)),
        };
        lease.update_rates(&lease.requester());
        if config.source == LeaseSource::LocalFallback {
            lease.balance_micros.store(lease.cap_micros.load(Ordering::Relaxed), Ordering::Release);
        }
        Ok(lease)
    }

    /// Whether a lease can be built with, or reconfigured to, these values.
    pub(crate) fn check(quota: Quota, config: LeaseConfig) -> Result<(), LeaseError> {
        let (burst, nodes, least) = (quota.burst().get(), config.nodes.get(), config.burst_min());
        if u64::from(burst) < least {
            return Err(LeaseError::BurstTooSmall { burst, nodes, least });
        }
        if quota.rate().micros_per_second() < u64::from(nodes) {
            return Err(LeaseError::RateTooSlow { rate: quota.rate(), nodes });
        }
        Ok(())
    }

    /// Takes a new quota after a reload and keeps the balance, limited to the new cap.
    pub(crate) fn reconfigure(&self, quota: Quota, config: LeaseConfig, now: MonotonicTime) {
        let mut requester = self.requester();
        if (requester.quota, requester.config) == (quota, config) {
            return;
        }
        // The time until now counts at the old rate.
        self.accrue(now);
        requester.reconfigure(quota, config);
        self.update_rates(&requester);
        let cap = self.cap_micros.load(Ordering::Relaxed);
        self.balance_micros.fetch_min(cap, Ordering::AcqRel);
    }

    /// Whether the lease can be reconfigured to `config`: node and source cannot change.
    pub(crate) fn can_reconfigure(&self, config: LeaseConfig) -> bool {
        let own = self.requester().config;
        (own.node, own.source) == (config.node, config.source)
    }

    /// The largest cost that one node of a fleet of the expected size can ever admit for a user
    /// class that must leave `reserve`.
    pub(crate) fn cost_max(quota: Quota, config: LeaseConfig, reserve: Fraction) -> u32 {
        let cap = cap_tokens(quota, config.source, config.nodes.get());
        // At most half of the cap, which is at least one token.
        cap - reserve.micros_of(cap.into()).div_ceil(2 * MICRO) as u32
    }

    /// The result that [`Lease::commit`] would return; spends nothing and records no demand.
    pub fn peek(&self, cost: Cost, reserve: Fraction, now: MonotonicTime) -> Result<Headroom, Throttled> {
        self.accrue(now);
        let (cost_micros, floor) = (micros(cost), self.reserve_floor(cost, reserve));
        let balance = self.balance_micros.load(Ordering::Acquire);
        if balance < cost_micros + floor {
            return Err(self.throttled(cost_micros + floor - balance, self.headroom_of(balance, floor, now), now));
        }
        Ok(self.headroom_of(balance - cost_micros, floor, now))
    }

    /// The tokens that a user class with this reserve may spend now, one at a time.
    pub(crate) fn headroom(&self, reserve: Fraction, now: MonotonicTime) -> Headroom {
        self.accrue(now);
        let balance = self.balance_micros.load(Ordering::Acquire);
        self.headroom_of(balance, self.reserve_floor(Cost::ONE, reserve), now)
    }

    /// Spends `cost` if `reserve`, a fraction of half of what the node may hold, is left after it.
    /// Otherwise spends nothing and estimates when a grant may cover both. Records demand.
    pub fn commit(&self, cost: Cost, reserve: Fraction, now: MonotonicTime) -> Result<Headroom, Throttled> {
        self.accrue(now);
        let (cost_micros, floor) = (micros(cost), self.reserve_floor(cost, reserve));
        self.record_demand(cost, floor);
        let spent = |balance: u64| (balance >= cost_micros + floor).then(|| balance - cost_micros);
        match self.balance_micros.try_update(Ordering::AcqRel, Ordering::Acquire, spent) {
            Ok(before) => Ok(self.headroom_of(before - cost_micros, floor, now)),
            Err(balance) => {
                Err(self.throttled(cost_micros + floor - balance, self.headroom_of(balance, floor, now), now))
            }
        }
    }

    /// Spends `cost`, or what is left of the balance, for a request that has its response already.
    /// Records demand.
    pub fn charge(&self, cost: Cost, reserve: Fraction, now: MonotonicTime) {
        self.accrue(now);
        self.record_demand(cost, self.reserve_floor(cost, reserve));
        let cost_micros = micros(cost);
        self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, |balance| balance.saturating_sub(cost_micros));
    }

    /// Whole tokens that a user class with this reserve must leave to others.
    pub(crate) fn reserve(&self, reserve: Fraction) -> u64 {
        self.reserve_floor(Cost::ONE, reserve).div_ceil(MICRO)
    }

    /// The balance that a request of this cost must leave. The reserve is a fraction of half the
    /// cap, which a node requests whatever its demand ([`Lease::target`]). So the reserve is filled
    /// once, by what ordinary traffic must not spend, and from then on every grant is spent. Cost
    /// and reserve together are at most the cap.
    fn reserve_floor(&self, cost: Cost, reserve: Fraction) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        (reserve.micros_of(cap / MICRO) / 2).min(cap.saturating_sub(micros(cost)))
    }

    /// Refunds a charge that was committed just before.
    pub fn refund(&self, cost: Cost) {
        self.add(micros(cost));
    }

    /// Records a request that was denied by a peek here and by no narrower rule: it is demand too.
    pub fn record_denied_demand(&self, cost: Cost, reserve: Fraction) {
        self.record_demand(cost, self.reserve_floor(cost, reserve));
    }

    /// Whether the node uses its local rate, because the backend is unavailable or there is none.
    pub fn is_local(&self, now: MonotonicTime) -> bool {
        self.refill_from.load(Ordering::Acquire) <= now.nanos()
    }

    /// Adds what the local rate brought since `refill_from`, and advances that by the time it took,
    /// so that no fraction is lost however often this runs. The thread that advances it adds the
    /// tokens.
    fn accrue(&self, now: MonotonicTime) {
        let from = self.refill_from.load(Ordering::Acquire);
        let rate = u128::from(self.local_nanos.load(Ordering::Acquire));
        let elapsed = u128::from(now.nanos().saturating_sub(from));
        let gained = elapsed * rate / (1_000 * NANOS);
        if gained == 0 {
            return;
        }
        // No later than `now`, because `gained` was rounded down.
        let taken = u64::try_from((gained * 1_000 * NANOS).div_ceil(rate)).unwrap_or(u64::MAX);
        let advanced = from.saturating_add(taken);
        if self.refill_from.compare_exchange(from, advanced, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let added = self.add(u64::try_from(gained).unwrap_or(u64::MAX));
            self.borrowed_micros.fetch_add(added, Ordering::AcqRel);
        }
    }

    /// Adds to the balance up to the cap (which may have shrunk below it), and returns how much.
    fn add(&self, gained: u64) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        let raised = |balance: u64| balance.saturating_add(gained).min(cap).max(balance);
        let before = self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, raised);
        raised(before) - before
    }

    /// Records the demand of one request. The node must hold enough for its largest request and the
    /// reserve after it, which is `peak`.
    fn record_demand(&self, cost: Cost, floor: u64) {
        let tokens = u64::from(cost.tokens().get());
        self.demanded.fetch_add(tokens, Ordering::Relaxed);
        if floor > 0 {
            self.ordinary.fetch_add(tokens, Ordering::Relaxed);
        }
        let needed = tokens + floor.div_ceil(MICRO);
        if self.peak.load(Ordering::Relaxed) < needed {
            self.peak.fetch_max(needed, Ordering::Relaxed);
        }
    }

    fn headroom_of(&self, balance: u64, floor: u64, now: MonotonicTime) -> Headroom {
        let missing = self.cap_micros.load(Ordering::Relaxed).saturating_sub(balance);
        Headroom { remaining: balance.saturating_sub(floor) / MICRO, reset: self.time_for(missing, now) }
    }

    fn throttled(&self, missing_micros: u64, headroom: Headroom, now: MonotonicTime) -> Throttled {
        let retry_after = self.time_for(missing_micros, now);
        let Headroom { remaining, reset } = headroom;
        Throttled { retry_after, remaining, reset: reset.max(retry_after) }
    }

    fn time_for(&self, micros: u64, now: MonotonicTime) -> Duration {
        let rate = if self.is_local(now) { &self.local_nanos } else { &self.expected_nanos };
        match u128::from(rate.load(Ordering::Relaxed)) {
            // A new node has a share of zero until the next grant.
            0 => PENDING_MAX,
            rate => {
                let nanos = (u128::from(micros) * 1_000 * NANOS).div_ceil(rate);
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
        }
    }

    /// Derives what the hot path reads from the quota, the fleet and, if known, this node's share.
    fn update_rates(&self, requester: &LeaseRequester) {
        let equal = requester.equal_share_nanos();
        let share = requester.share_micros.map_or(equal, |share| share.saturating_mul(1_000));
        let local = match requester.config.source {
            LeaseSource::LocalFallback => share,
            LeaseSource::Backend => share / 5 * 4,
        };
        let cap = cap_tokens(requester.quota, requester.config.source, requester.fleet_size());
        self.cap_micros.store(u64::from(cap) * MICRO, Ordering::Release);
        // A share follows demand: a node without demand has a small one, and gets more once it
        // requests more.
        self.expected_nanos.store(share.max(equal), Ordering::Release);
        self.local_nanos.store(local, Ordering::Release);
    }

    fn requester(&self) -> MutexGuard<'_, LeaseRequester> {
        // No code under this lock can panic half way; its numbers are valid in any combination.
        self.requester.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whole tokens that one node of a fleet may hold: its part of the half of the burst that is not in
/// the bucket, or of the whole burst if there is no bucket.
fn cap_tokens(quota: Quota, source: LeaseSource, fleet_size: u32) -> u32 {
    let burst = quota.burst().get();
    let outstanding_max = match source {
        LeaseSource::Backend => burst - burst / 2,
        LeaseSource::LocalFallback => burst,
    };
    (outstanding_max / fleet_size).max(1)
}

fn micros(cost: Cost) -> u64 {
    u64::from(cost.tokens().get()) * MICRO
}
