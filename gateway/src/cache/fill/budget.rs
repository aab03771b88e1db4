//! The memory that bodies of fetches in flight hold: charged when it is allocated, credited when it
//! is freed by its last owner.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;

use super::state::Fill;

/// Bytes that the bodies of all fetches in flight hold.
#[derive(Default)]
pub(crate) struct FetchBudget {
    charged: AtomicU64,
    /// The fills that buffer bytes for slow readers only, oldest first. At most two entries for
    /// each, while it lives.
    backlogs: Mutex<VecDeque<Weak<Fill>>>,
}

impl FetchBudget {
    /// Copies `data` into a chunk that stays charged until its last reference is dropped.
    pub(super) fn charged_chunk(self: &Arc<Self>, data: &[u8]) -> Bytes {
        self.charged.fetch_add(data.len() as u64, Ordering::Relaxed);
        Bytes::from_owner(ChargedChunk { data: data.into(), budget: Arc::clone(self) })
    }

    /// Whether `bytes` more stay within `limit`.
    pub(super) fn has_room(&self, bytes: u64, limit: u64) -> bool {
        self.charged.load(Ordering::Relaxed) + bytes <= limit
    }

    /// Registers a fill that buffers bytes for slow readers only: its body will not be stored, or
    /// is complete.
    pub(super) fn add_backlog(&self, fill: &Arc<Fill>) {
        let mut backlogs = self.lock_backlogs();
        // Only when it would grow: each entry is looked at a constant number of times.
        if backlogs.len() == backlogs.capacity() {
            backlogs.retain(|fill| fill.strong_count() > 0);
        }
        backlogs.push_back(Arc::downgrade(fill));
    }

    /// Makes room for `bytes` more of a body that may be stored. For that, slow readers are
    /// detached, those of the oldest fills first, until there is room. Returns whether there is.
    pub(super) fn make_room(&self, bytes: u64, limit: u64) -> bool {
        // Each fill at most once: those that still grow are queued again.
        let count = self.lock_backlogs().len();
        for _ in 0..count {
            if self.has_room(bytes, limit) {
                return true;
            }
            // No lock is held while a fill is shed or dropped: that may end requests.
            let Some(fill) = self.lock_backlogs().pop_front() else { break };
            if let Some(fill) = fill.upgrade() {
                let mut state = fill.lock();
                state.shed();
                let may_grow = state.is_open();
                drop(state);
                if may_grow {
                    self.lock_backlogs().push_back(Arc::downgrade(&fill));
                }
            }
        }
        self.has_room(bytes, limit)
    }

    fn lock_backlogs(&self) -> MutexGuard<'_, VecDeque<Weak<Fill>>> {
        self.backlogs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty reservation, for a body that is collected outside a fill.
    pub(crate) fn reserve(self: &Arc<Self>) -> FetchReservation {
        FetchReservation { budget: Arc::clone(self), own: 0 }
    }

    #[cfg(test)]
    pub(super) fn charged(&self) -> u64 {
        self.charged.load(Ordering::Relaxed)
    }
}

/// The memory of a chunk, with the budget that it is charged to.
struct ChargedChunk {
    data: Box<[u8]>,
    budget: Arc<FetchBudget>,
}

impl AsRef<[u8]> for ChargedChunk {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for ChargedChunk {
    fn drop(&mut self) {
        self.budget.charged.fetch_sub(self.data.len() as u64, Ordering::Relaxed);
    }
}

/// The bytes that one body outside a fill holds of the budget; credited on drop.
pub(crate) struct FetchReservation {
    budget: Arc<FetchBudget>,
    own: u64,
}

impl FetchReservation {
    /// Charges more bytes. Returns false if all bodies together then exceed `limit`.
    pub(crate) fn grow(&mut self, bytes: u64, limit: u64) -> bool {
        self.own += bytes;
        self.budget.charged.fetch_add(bytes, Ordering::Relaxed) + bytes <= limit
    }

    pub(crate) fn release(&mut self) {
        self.budget.charged.fetch_sub(std::mem::take(&mut self.own), Ordering::Relaxed);
    }
}

impl Drop for FetchReservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_is_charged_until_its_last_reference_is_dropped() {
        let budget = Arc::new(FetchBudget::default());
        let chunk = budget.charged_chunk(b"abcd");
        let slice = chunk.slice(1..2);
        drop(chunk);
        assert_eq!(budget.charged(), 4);
        assert!(budget.has_room(6, 10) && !budget.has_room(7, 10));
        drop(slice);
        assert_eq!(budget.charged(), 0);
    }

    #[test]
    fn reservations_are_bounded_together() {
        let budget = Arc::new(FetchBudget::default());
        let (mut one, mut two) = (budget.reserve(), budget.reserve());
        assert!(one.grow(6, 10) && !two.grow(5, 10));
        two.release();
        assert!(two.grow(4, 10));
        drop((one, two));
        assert_eq!(budget.charged(), 0);
    }
}
