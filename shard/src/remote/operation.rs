//! Owns the state that all threads share for one class of operations on a shard (reads, large
//! reads, writes): its breaker, its fault counts and its log messages.
//!
//! Reads and writes fail independently: a full server or a replica rejects writes and serves reads.
//! Each class therefore has its own breaker.
//!
//! Refuses to connect: that is the task of each thread's `ShardConnection`.
//! Invariant: a fault is counted once, where it is recorded.

use super::breaker::{ShardBreaker, ShardBreakerState, ShardBreakerTransition};
use super::fault::ShardFault;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Number of occurrences of each fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardFaultCounts([u64; ShardFault::ALL.len()]);

impl ShardFaultCounts {
    pub fn get(&self, fault: ShardFault) -> u64 {
        self.0[fault as usize]
    }

    /// Every fault with its count.
    pub fn iter(&self) -> impl Iterator<Item = (ShardFault, u64)> {
        ShardFault::ALL.into_iter().zip(self.0)
    }

    /// The fault with the largest increase since `before`, among attempted operations. Counts that
    /// decreased belong to another shard at the same address and are ignored.
    pub fn most_frequent_since(&self, before: &Self) -> Option<ShardFault> {
        let increases = self.iter().map(|(fault, count)| (fault, count.saturating_sub(before.get(fault))));
        let attempted = increases.filter(|&(fault, count)| count > 0 && fault.was_attempted());
        attempted.max_by_key(|&(_, count)| count).map(|(fault, _)| fault)
    }
}

/// Breaker, fault counts and log name of one class of operations on a shard.
#[derive(Debug)]
pub(crate) struct OperationClass {
    /// Shard and operation, for log messages and the list of tasks.
    name: Arc<str>,
    seed: u64,
    breaker: ShardBreaker,
    faults: [AtomicU64; ShardFault::ALL.len()],
}

impl OperationClass {
    pub(crate) fn new(name: String) -> Self {
        // The seed is used for jitter only; code under test takes a seed as a parameter.
        let seed = RandomState::new().hash_one(&name);
        Self { breaker: ShardBreaker::new(Instant::now(), seed), name: name.into(), seed, faults: Default::default() }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Consults the breaker; a rejection is counted.
    pub(crate) fn admit(&self, now: Instant) -> Result<(), ShardFault> {
        if self.breaker.admit(now) {
            return Ok(());
        }
        self.record_fault(ShardFault::Open);
        Err(ShardFault::Open)
    }

    pub(crate) fn is_rejecting(&self, now: Instant) -> bool {
        self.breaker.rejects(now)
    }

    pub(crate) fn state(&self) -> ShardBreakerState {
        self.breaker.state()
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn record_success(&self) {
        if self.breaker.record_success(Instant::now()) == ShardBreakerTransition::Closed {
            tracing::debug!(operation = &*self.name, "shard responds again, breaker closed");
        }
    }

    pub(crate) fn record_failure(&self, fault: ShardFault) {
        self.record_fault(fault);
        if fault.is_breaker_failure() && self.breaker.record_failure(Instant::now()) == ShardBreakerTransition::Opened {
            tracing::debug!(operation = &*self.name, fault = fault.name(), "shard fails, breaker opened");
        }
    }

    /// Opens the breaker: a connection was abandoned because its server hangs.
    pub(crate) fn record_hang(&self) {
        if self.breaker.trip(Instant::now()) == ShardBreakerTransition::Opened {
            tracing::debug!(operation = &*self.name, "shard hangs, breaker opened");
        }
    }

    pub(crate) fn faults(&self) -> ShardFaultCounts {
        ShardFaultCounts(self.faults.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    pub(crate) fn record_fault(&self, fault: ShardFault) {
        self.faults[fault as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_frequent_fault_is_the_largest_increase_of_an_attempted_operation() {
        let counts = |pairs: &[(ShardFault, u64)]| {
            let mut counts = ShardFaultCounts::default();
            pairs.iter().for_each(|&(fault, count)| counts.0[fault as usize] = count);
            counts
        };
        let before = counts(&[(ShardFault::Timeout, 900), (ShardFault::Open, 5_000), (ShardFault::Io, 7)]);
        let after = counts(&[(ShardFault::Timeout, 900), (ShardFault::Open, 9_000), (ShardFault::ReadOnly, 2)]);
        assert_eq!(after.most_frequent_since(&before), Some(ShardFault::ReadOnly));
        assert_eq!(after.most_frequent_since(&after), None);
    }
}
