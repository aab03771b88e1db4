//! Owns the deletes of one thread that a server of a cluster has redirected, because the hash slot
//! is migrating or has migrated.
//!
//! They wait here until the thread's `StoreView` sends them to the shard that now holds the slot,
//! and until then their entries count as deleted (see `pending_deletes`). While a slot migrates,
//! which can take minutes, they are retried once a second.
//!
//! Refuses more than `REDIRECTED_MAX`, two deletes of one key, and deletes redirected for longer
//! than `REDIRECTED_FOR_MAX`: a resharding that was abandoned.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// As many as the write queue of one shard holds.
const REDIRECTED_MAX: usize = 4_096;

const REDIRECTED_FOR_MAX: Duration = Duration::from_secs(600);

/// A delete whose shard is not known: its key in Redis, and the time of its first redirect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RedirectedDelete {
    pub(crate) name: String,
    /// Number of the removal, as in `WriteJob::Delete`.
    pub(crate) removal: Option<u64>,
    /// When a server first redirected it.
    pub(crate) redirected_since: Instant,
}

/// Whether a redirected delete was queued for its new server, was queued already, or found the
/// queue full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RedirectOutcome {
    Deferred,
    /// A delete of the same key is waiting already.
    Duplicate,
    Rejected,
}

/// Queue of at most `REDIRECTED_MAX` redirected deletes with distinct keys, behind a lock.
#[derive(Debug, Default)]
pub(crate) struct RedirectedDeletes {
    /// Lets readers skip the lock while there are none.
    is_nonempty: AtomicBool,
    deferred: Mutex<RedirectedDeletesState>,
}

/// The redirected deletes in order, and their keys, so that none waits twice.
#[derive(Debug, Default)]
struct RedirectedDeletesState {
    deletes: VecDeque<RedirectedDelete>,
    names: HashSet<String>,
}

impl RedirectedDeletes {
    pub(crate) fn add(&self, delete: RedirectedDelete) -> RedirectOutcome {
        let mut deferred = self.lock();
        if deferred.names.contains(&delete.name) {
            return RedirectOutcome::Duplicate;
        }
        if deferred.deletes.len() >= REDIRECTED_MAX || delete.redirected_since.elapsed() > REDIRECTED_FOR_MAX {
            return RedirectOutcome::Rejected;
        }
        deferred.names.insert(delete.name.clone());
        deferred.deletes.push_back(delete);
        self.is_nonempty.store(true, Ordering::Release);
        RedirectOutcome::Deferred
    }

    /// Takes all deletes, in order.
    pub(crate) fn take(&self) -> VecDeque<RedirectedDelete> {
        if !self.is_nonempty.load(Ordering::Acquire) {
            return VecDeque::new();
        }
        let mut deferred = self.lock();
        self.is_nonempty.store(false, Ordering::Release);
        deferred.names.clear();
        std::mem::take(&mut deferred.deletes)
    }

    fn lock(&self) -> MutexGuard<'_, RedirectedDeletesState> {
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletes_are_taken_in_order_and_excess_and_outdated_ones_are_rejected() {
        let (deletes, since) = (RedirectedDeletes::default(), Instant::now());
        let delete = |n: usize| RedirectedDelete { name: n.to_string(), removal: Some(1), redirected_since: since };
        assert!(deletes.take().is_empty());
        for n in 0..REDIRECTED_MAX {
            assert_eq!(deletes.add(delete(n)), RedirectOutcome::Deferred);
        }
        assert_eq!(
            (deletes.add(delete(0)), deletes.add(delete(REDIRECTED_MAX))),
            (RedirectOutcome::Duplicate, RedirectOutcome::Rejected)
        );
        let taken = deletes.take();
        assert_eq!((taken.len(), &taken[0], &taken[1]), (REDIRECTED_MAX, &delete(0), &delete(1)));
        assert!(deletes.take().is_empty());
        assert_eq!(deletes.add(delete(0)), RedirectOutcome::Deferred);
        if let Some(since) = since.checked_sub(2 * REDIRECTED_FOR_MAX) {
            assert_eq!(
                deletes.add(RedirectedDelete { name: "old".into(), removal: None, redirected_since: since }),
                RedirectOutcome::Rejected
            );
        }
    }
}
