//! Owns a value of the L2 cache and its release.

use super::handle::{EntryHandle, lock};
use super::index::{EntryIndex, IndexPosition};
use crate::entry::{Entry, EntryMeta};
use std::sync::Arc;

/// A value of the L2 cache: the handle of an entry, the bytes charged for it, and its position in
/// the index. Each thread's write buffer in moka may keep a removed value for some time, so the
/// entry is behind a handle that is emptied on removal.
pub(super) struct L2Entry<M> {
    pub(super) entry: EntryHandle<M>,
    pub(super) weight: u32,
    /// Its position in the index.
    pub(super) position: IndexPosition,
}

impl<M: EntryMeta> L2Entry<M> {
    pub(super) fn entry(&self) -> Option<Arc<Entry<M>>> {
        lock(&self.entry).clone()
    }

    pub(super) fn release(&self, index: &EntryIndex<M>) {
        let entry = lock(&self.entry).take();
        if let Some(entry) = entry {
            entry.retire();
            index.remove(self.position);
        }
    }
}

impl<M> Clone for L2Entry<M> {
    fn clone(&self) -> Self {
        Self { entry: self.entry.clone(), ..*self }
    }
}
