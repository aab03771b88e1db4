//! Owns the entries that this process has deleted and whose deletion the server has not confirmed:
//! they count as absent, although the server would still return them.
//!
//! Refuses to exceed the number of queued deletes: see `write_queue`.
//! Invariant: from the moment a delete is queued until the server has confirmed it or it was
//! dropped, no thread reads the entry.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Number of unconfirmed deletes by digest prefix, for all shards of the store; behind a lock that
/// readers skip while there are none.
#[derive(Debug, Default)]
pub(crate) struct PendingDeletes {
    /// Lets readers skip the lock while there are none.
    count: AtomicUsize,
    /// Number of pending deletes per entry, by digest prefix.
    pending: Mutex<HashMap<u64, u32>>,
}

impl PendingDeletes {
    pub(crate) fn begin(&self, digest_prefix: u64) {
        let mut pending = self.pending();
        *pending.entry(digest_prefix).or_default() += 1;
        self.count.store(pending.len(), Ordering::Release);
    }

    pub(crate) fn end(&self, digest_prefix: u64) {
        let mut pending = self.pending();
        if let Some(count) = pending.get_mut(&digest_prefix) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&digest_prefix);
            }
        }
        self.count.store(pending.len(), Ordering::Release);
    }

    pub(crate) fn contains(&self, digest_prefix: u64) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.pending().contains_key(&digest_prefix)
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<u64, u32>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_absent_until_its_last_pending_delete_ends() {
        let deletes = PendingDeletes::default();
        deletes.begin(1);
        deletes.begin(1);
        deletes.end(1);
        assert!(deletes.contains(1) && !deletes.contains(2));
        deletes.end(1);
        assert!(!deletes.contains(1));
        deletes.end(1);
        assert!(!deletes.contains(1));
    }
}
