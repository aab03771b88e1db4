//! Owns the figures of one shard: counted here by all threads, reported to the gateway's metrics.
//!
//! Refuses rates and time: whoever scrapes computes them.
//! Invariant: counters only grow.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that threads share.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) hits: Count,
    pub(crate) misses: Count,
    pub(crate) expired: Count,
    pub(crate) purged: Count,
    pub(crate) foreign: Count,
    pub(crate) corrupt: Count,
    pub(crate) oversize: Count,
    pub(crate) stored: Count,
    pub(crate) removed: Count,
    pub(crate) dropped_stores: Count,
    pub(crate) dropped_removals: Count,
}

/// What happened at a shard since the store was made. Faults are counted apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardCounts {
    pub hits: u64,
    pub misses: u64,
    /// Sound entries whose time was over, or that come from a clock too far ahead; not among the misses, as the next four.
    pub expired: u64,
    /// Sound entries that were stored by a node that did not know of a purge of theirs.
    pub purged: u64,
    /// Entries of another release, secret or size limit.
    pub foreign: u64,
    /// Entries that were damaged, or another key's.
    pub corrupt: u64,
    /// Entries kept local because of their size.
    pub oversize: u64,
    /// Entries written.
    pub stored: u64,
    /// Removals the server confirmed, whether or not there was an entry.
    pub removed: u64,
    /// Entries not written: no room in the queue, or the shard failed until they were over. Nothing but a later miss.
    pub dropped_stores: u64,
    /// Removals that never reached the server: an old entry may be found there until its time is over.
    pub dropped_removals: u64,
}

impl Counts {
    pub(crate) fn read(&self) -> ShardCounts {
        ShardCounts {
            hits: self.hits.get(),
            misses: self.misses.get(),
            expired: self.expired.get(),
            purged: self.purged.get(),
            foreign: self.foreign.get(),
            corrupt: self.corrupt.get(),
            oversize: self.oversize.get(),
            stored: self.stored.get(),
            removed: self.removed.get(),
            dropped_stores: self.dropped_stores.get(),
            dropped_removals: self.dropped_removals.get(),
        }
    }
}
