//! Owns the counters of one shard: incremented by all threads, reported to the gateway's metrics.
//!
//! Refuses rates and time: the consumer of the metrics computes them.
//! Invariant: counters only grow.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that threads increment with relaxed atomics; it never decreases.
#[derive(Debug, Default)]
pub(crate) struct ShardCounter(AtomicU64);

impl ShardCounter {
    pub(crate) fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of the operations of one shard, shared by all threads; [`ShardCounts`] is their
/// snapshot.
#[derive(Debug, Default)]
pub(crate) struct ShardCounters {
    pub(crate) hits: ShardCounter,
    pub(crate) misses: ShardCounter,
    pub(crate) expired: ShardCounter,
    pub(crate) purged: ShardCounter,
    pub(crate) incompatible: ShardCounter,
    pub(crate) corrupt: ShardCounter,
    pub(crate) oversize: ShardCounter,
    pub(crate) stored: ShardCounter,
    pub(crate) deleted: ShardCounter,
    pub(crate) dropped_stores: ShardCounter,
    pub(crate) dropped_deletes: ShardCounter,
}

/// Operations of a shard since the store was created. Faults are counted separately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardCounts {
    pub hits: u64,
    pub misses: u64,
    /// Valid entries that had expired, or whose date is too far in the future; not counted as
    /// misses, like the next four.
    pub expired: u64,
    /// Valid entries stored by a node that did not know of a purge of one of their tags.
    pub purged: u64,
    /// Entries written with another release, secret or size limit.
    pub incompatible: u64,
    /// Entries that were damaged, or stored under another key.
    pub corrupt: u64,
    /// Entries kept in the local cache only because of their size.
    pub oversize: u64,
    /// Entries written.
    pub stored: u64,
    /// Deletes that the server confirmed, whether or not the entry existed.
    pub deleted: u64,
    /// Entries not written because the queue was full, the shard failed until they expired, or they
    /// were removed after their fill began. The only effect is a later miss.
    pub dropped_stores: u64,
    /// Deletes that never reached the server: the old entry may be read until it expires.
    pub dropped_deletes: u64,
}

impl ShardCounters {
    pub(crate) fn snapshot(&self) -> ShardCounts {
        ShardCounts {
            hits: self.hits.get(),
            misses: self.misses.get(),
            expired: self.expired.get(),
            purged: self.purged.get(),
            incompatible: self.incompatible.get(),
            corrupt: self.corrupt.get(),
            oversize: self.oversize.get(),
            stored: self.stored.get(),
            deleted: self.deleted.get(),
            dropped_stores: self.dropped_stores.get(),
            dropped_deletes: self.dropped_deletes.get(),
        }
    }
}
