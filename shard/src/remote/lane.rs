//! Owns what all threads share about one way to a shard (reading, writing): its breaker, its faults, and their log lines.
//!
//! Reading and writing fail apart: a full server or a replica refuses writes and serves reads, so each has a lane of its own.
//!
//! Refuses to connect: that is each thread's `Link`.
//! Invariant: a fault is counted once, where it is recorded.

use super::breaker::{Breaker, BreakerState, Turn};
use super::fault::Fault;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How often each fault happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts([u64; Fault::ALL.len()]);

impl FaultCounts {
    pub fn of(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }

    /// Every fault with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Fault, u64)> {
        Fault::ALL.into_iter().zip(self.0)
    }

    /// The fault that happened most since `before`, of what was tried. Counts that fell are another shard's, at the same
    /// address, and say nothing.
    pub fn latest(&self, before: &Self) -> Option<Fault> {
        let risen = self.iter().map(|(fault, count)| (fault, count.saturating_sub(before.of(fault))));
        let tried = risen.filter(|&(fault, count)| count > 0 && fault.was_tried());
        tried.max_by_key(|&(_, count)| count).map(|(fault, _)| fault)
    }
}

#[derive(Debug)]
pub(crate) struct Lane {
    /// Of the shard and what is done with it, for the log.
    name: String,
    seed: u64,
    breaker: Breaker,
    faults: [AtomicU64; Fault::ALL.len()],
}

impl Lane {
    pub(crate) fn new(name: String) -> Self {
        // Only jitter comes from it; what is checked by tests takes its seed as an argument.
        let seed = RandomState::new().hash_one(&name);
        Self { breaker: Breaker::new(Instant::now(), seed), name, seed, faults: Default::default() }
    }

    /// Asks the breaker; a refusal is counted.
    pub(crate) fn admit(&self, now: Instant) -> Result<(), Fault> {
        if self.breaker.admit(now) {
            return Ok(());
        }
        self.count(Fault::Open);
        Err(Fault::Open)
    }

    pub(crate) fn refuses(&self, now: Instant) -> bool {
        self.breaker.refuses(now)
    }

    pub(crate) fn state(&self) -> BreakerState {
        self.breaker.state()
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn succeeded(&self) {
        if self.breaker.succeeded(Instant::now()) == Turn::Closed {
            tracing::debug!(lane = self.name, "shard answers again");
        }
    }

    pub(crate) fn failed(&self, fault: Fault) {
        self.count(fault);
        if fault.is_evidence() && self.breaker.failed(Instant::now()) == Turn::Opened {
            tracing::debug!(lane = self.name, fault = fault.name(), "shard fails, its breaker is open");
        }
    }

    /// A connection was given up because its server hangs.
    pub(crate) fn hangs(&self) {
        if self.breaker.trip(Instant::now()) == Turn::Opened {
            tracing::debug!(lane = self.name, "shard hangs, its breaker is open");
        }
    }

    pub(crate) fn faults(&self) -> FaultCounts {
        FaultCounts(self.faults.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    pub(crate) fn count(&self, fault: Fault) {
        self.faults[fault as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_fault_is_the_one_that_rose_and_was_tried() {
        let counts = |pairs: &[(Fault, u64)]| {
            let mut counts = FaultCounts::default();
            pairs.iter().for_each(|&(fault, count)| counts.0[fault as usize] = count);
            counts
        };
        let before = counts(&[(Fault::Timeout, 900), (Fault::Open, 5_000), (Fault::Io, 7)]);
        let after = counts(&[(Fault::Timeout, 900), (Fault::Open, 9_000), (Fault::ReadOnly, 2)]);
        assert_eq!(after.latest(&before), Some(Fault::ReadOnly));
        assert_eq!(after.latest(&after), None);
    }
}
