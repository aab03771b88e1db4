//! The memory that bodies of fetches in flight hold: charged when it is allocated, credited when it
//! is freed by its last owner.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;

use super::state::{Fill, WINDOW_BYTES_MIN};

/// Bytes that the bodies of all fetches in flight hold.
#[derive(Default)]
pub(crate) struct FetchBudget {
    charged: AtomicU64,
    /// The fills whose bodies are not kept. At most one entry for each, while it lives.
    backlogs: Mutex<Vec<Weak<Fill>>>,
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

    /// Registers a fill whose body is not kept any more.
    pub(super) fn add_backlog(&self, fill: &Arc<Fill>) {
        let mut backlogs = self.backlogs.lock().unwrap_or_else(PoisonError::into_inner);
        backlogs.retain(|fill| fill.strong_count() > 0);
        backlogs.push(Arc::downgrade(fill));
    }

    /// Frees what is buffered for slow readers of bodies that are not kept, except a small window:
    /// these readers are detached.
    pub(super) fn shed_backlogs(&self) {
        // The list is copied: a fill that is dropped here may end requests.
        let backlogs: Vec<Arc<Fill>> = {
            let backlogs = self.backlogs.lock().unwrap_or_else(PoisonError::into_inner);
            backlogs.iter().filter_map(Weak::upgrade).collect()
        };
        for fill in backlogs {
            fill.lock().detach_readers_behind(WINDOW_BYTES_MIN);
        }
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
