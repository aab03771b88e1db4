//! Owns the deletes and tombstones that this process sent to a server: the server reports them as
//! invalidations like any other change, and they are not taken for changes by other nodes.
//!
//! Refuses to remember more than `CHANGES_MAX`: beyond it all are forgotten, some own deletes are
//! taken for changes by other nodes, and a few fills are not stored.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

const CHANGES_MAX: usize = 16_384;

/// A key of Redis that this process changes, by the digest prefix of the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ChangedKey {
    Entry(u64),
    Tombstone(u64),
}

/// At most `CHANGES_MAX` changes that were sent and not yet reported by the server, behind a lock.
#[derive(Debug, Default)]
pub(crate) struct SelfInvalidations(Mutex<HashSet<ChangedKey>>);

impl SelfInvalidations {
    /// Call before the key is changed.
    pub(crate) fn expect(&self, key: ChangedKey) {
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.len() >= CHANGES_MAX {
            pending.clear();
        }
        pending.insert(key);
    }

    /// Call when a subscription starts: earlier changes may never be reported.
    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether an invalidation was caused by this process; true once per change.
    pub(crate) fn take(&self, key: ChangedKey) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&key)
    }
}
