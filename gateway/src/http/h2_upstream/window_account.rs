//! Bytes that exchanges may reserve together.
//!
//! Invariant: what was granted and not released never exceeds the maximum. A request for room that
//! ends at the same time as another one may be refused although there is room. `orders.rs` compiles
//! this file with the atomics of loom.

use super::sync::{AtomicUsize, Ordering::Relaxed};

/// Bytes that the exchanges of all threads may reserve, and have reserved.
pub(super) struct WindowAccount {
    pub(super) max: AtomicUsize,
    pub(super) reserved: AtomicUsize,
}

impl WindowAccount {
    /// Reserves `bytes` if there is room for them.
    pub(super) fn reserve(&self, bytes: usize) -> bool {
        let max = self.max.load(Relaxed);
        let has_room = self.reserved.fetch_add(bytes, Relaxed).saturating_add(bytes) <= max;
        if !has_room {
            self.release(bytes);
        }
        has_room
    }

    pub(super) fn release(&self, bytes: usize) {
        self.reserved.fetch_sub(bytes, Relaxed);
    }
}
