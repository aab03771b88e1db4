//! Owns the question whether a fill is still wanted: everything may have been purged, or its key removed, since it began.
//!
//! Removals are numbered, and each key's stripe, shared with others by hash, knows the last of its own: a fill that began
//! before that is spoilt, whatever key it was begun for. Memory is fixed, and the price is that a removal now and then spoils the
//! storing (not the serving) of a fill of an unrelated key.
//!
//! Refuses to say which key was removed.
//! Invariant: a fill that began before a removal of its key is never taken for one that began after.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// 512 KiB. A fill is spoilt with the share of these that are removed from while it runs: with 1,000 removals, 1.5 %.
const STRIPES: usize = 65_536;

/// When a fill began, reckoned in purges and removals; see `View::since`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Since {
    generation: u64,
    removals: u64,
}

impl Since {
    pub(crate) fn generation(self) -> u64 {
        self.generation
    }
}

#[derive(Debug)]
pub(crate) struct Epochs {
    generation: AtomicU64,
    /// Removals so far, of any key.
    removals: AtomicU64,
    /// By stripe, the number of its last removal.
    removed: Box<[AtomicU64]>,
}

impl Epochs {
    pub(crate) fn new() -> Self {
        let removed = (0..STRIPES).map(|_| AtomicU64::new(0)).collect();
        Self { generation: AtomicU64::new(0), removals: AtomicU64::new(0), removed }
    }

    /// The moment now.
    pub(crate) fn since(&self) -> Since {
        Since { generation: self.generation(), removals: self.removals.load(Ordering::Acquire) }
    }

    /// Whether nothing has ended the fill of the key with `hash` that began at `since`.
    pub(crate) fn still(&self, hash: u64, since: Since) -> bool {
        // An insertion stores and then looks here; a removal counts here and then looks for what is stored. The fences make sure
        // that at least one of them sees the other.
        fence(Ordering::SeqCst);
        self.generation() == since.generation && self.stripe(hash).load(Ordering::Acquire) <= since.removals
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn removed(&self, hash: u64) {
        let number = self.removals.fetch_add(1, Ordering::AcqRel) + 1;
        self.stripe(hash).fetch_max(number, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn purged(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn stripe(&self, hash: u64) -> &AtomicU64 {
        &self.removed[(hash >> 32) as usize % STRIPES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_or_a_purge_ends_what_began_before() {
        let epochs = Epochs::new();
        let (before, elsewhere) = (epochs.since(), 7 + (1 << 32));
        epochs.removed(elsewhere);
        assert!(epochs.still(7, before));
        epochs.removed(7);
        assert!(!epochs.still(7, before));
        let before = epochs.since();
        assert!(epochs.still(7, before), "it began after the removal");
        epochs.purged();
        assert!(!epochs.still(7, before) && epochs.still(7, epochs.since()));
    }
}
