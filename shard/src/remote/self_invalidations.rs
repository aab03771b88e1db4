//! Owns the deletes that this process sent to a server: the server reports them as invalidations
//! like any other change, and they are ignored.
//!
//! Refuses to remember more than `DELETES_MAX`: beyond it all are forgotten, some own deletes are
//! taken for changes by other nodes, and a few fills are not stored.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

const DELETES_MAX: usize = 8_192;

/// Digest prefixes of at most `DELETES_MAX` deletes that were sent and not yet reported by the
/// server, behind a lock.
#[derive(Debug, Default)]
pub(crate) struct SelfInvalidations(Mutex<HashSet<u64>>);

impl SelfInvalidations {
    /// Call before an entry is deleted.
    pub(crate) fn expect(&self, digest_prefix: u64) {
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.len() >= DELETES_MAX {
            pending.clear();
        }
        pending.insert(digest_prefix);
    }

    /// Call when a subscription starts: earlier deletes may never be reported.
    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether an invalidation was caused by this process; true once per delete.
    pub(crate) fn take(&self, digest_prefix: u64) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&digest_prefix)
    }
}
