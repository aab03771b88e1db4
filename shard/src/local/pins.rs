//! Owns pinned entries: entries of hot keys that the L2 cache evicted. They stay until they are
//! replaced, invalid, or no longer hot.
//!
//! The L2 cache evicts by recent use, and a flood of other keys counts as use; an entry that many
//! clients request must not be fetched again because of it.
//!
//! Refuses more bytes than its share of the memory.
//! Invariant: there is at most one pinned entry per key, and none that was invalidated by a
//! deletion or change of its key.

use super::handle::{EntryHandle, lock};
use super::l1::ValidityCheck;
use super::l2_entry::L2Entry;
use crate::entry::{Entry, EntryMeta, EpochSnapshot};
use crate::key::{CacheKey, KeyRef, Prehashed};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Pinned entries of hot keys behind one lock, at most `bytes_max` bytes in total, shared by all
/// threads.
pub(super) struct PinnedEntries<M> {
    bytes_max: usize,
    /// Number of pinned entries, so that the lock is not taken if there are none.
    count: AtomicUsize,
    state: Mutex<PinnedState<M>>,
}

/// Pinned entries by key with their total weight in bytes, and the last deletion of each hot key by
/// hash.
struct PinnedState<M> {
    bytes: usize,
    pins: HashMap<CacheKey, L2Entry<M>, Prehashed>,
    /// The last deletion of each hot key: an entry that is being pinned may be older.
    deleted_at: HashMap<u64, EpochSnapshot, Prehashed>,
}

impl<M: EntryMeta> PinnedEntries<M> {
    pub(super) fn new(bytes_max: usize) -> Self {
        let state = PinnedState { bytes: 0, pins: HashMap::default(), deleted_at: HashMap::default() };
        Self { bytes_max, count: AtomicUsize::new(0), state: Mutex::new(state) }
    }

    /// Pins an entry if there is room and its key was not deleted since its fill began; returns the
    /// entries to be released.
    pub(super) fn pin(&self, key: &CacheKey, stored: L2Entry<M>) -> Vec<L2Entry<M>> {
        let Some(entry) = stored.entry() else { return vec![stored] };
        let mut state = lock(&self.state);
        let mut released: Vec<_> = state.take(key).into_iter().collect();
        let deleted_at = state.deleted_at.get(&key.as_key().hash());
        let is_deleted = deleted_at
            .is_some_and(|deleted_at| entry.fill_epoch().is_none_or(|since| since.is_older_than(*deleted_at)));
        if state.bytes + stored.weight as usize <= self.bytes_max && entry.is_live() && !is_deleted {
            state.bytes += stored.weight as usize;
            state.pins.insert(key.clone(), stored);
        } else {
            released.push(stored);
        }
        self.count.store(state.pins.len(), Ordering::Release);
        released
    }

    pub(super) fn get(&self, key: &KeyRef<'_>) -> Option<Arc<Entry<M>>> {
        if self.is_empty() {
            return None;
        }
        lock(&self.state).pins.get(&key.to_owned())?.entry()
    }

    pub(super) fn take(&self, key: &KeyRef<'_>) -> Option<L2Entry<M>> {
        if self.is_empty() {
            return None;
        }
        let mut state = lock(&self.state);
        let taken = state.take(&key.to_owned());
        self.count.store(state.pins.len(), Ordering::Release);
        taken
    }

    /// Removes the pinned entry of a key, unless it is the given one.
    pub(super) fn take_other(&self, key: &KeyRef<'_>, own: &EntryHandle<M>) -> Option<L2Entry<M>> {
        if self.is_empty() {
            return None;
        }
        let key = key.to_owned();
        let mut state = lock(&self.state);
        let is_other = state.pins.get(&key).is_some_and(|stored| !Arc::ptr_eq(&stored.entry, own));
        let taken = if is_other { state.take(&key) } else { None };
        self.count.store(state.pins.len(), Ordering::Release);
        taken
    }

    /// Removes the pinned entry of a deleted hot key, and rejects entries whose fill began before
    /// `now`.
    pub(super) fn invalidate(&self, key: &KeyRef<'_>, now: EpochSnapshot) -> Option<L2Entry<M>> {
        let mut state = lock(&self.state);
        state.deleted_at.insert(key.hash(), now);
        let taken = state.take(&key.to_owned());
        self.count.store(state.pins.len(), Ordering::Release);
        taken
    }

    /// Removes and returns entries that are invalid or no longer hot.
    pub(super) fn sweep(&self, validity: ValidityCheck<'_>, is_hot: impl Fn(u64) -> bool) -> Vec<L2Entry<M>> {
        let mut state = lock(&self.state);
        state.deleted_at.retain(|hash, _| is_hot(*hash));
        let is_removable = |(key, stored): (&CacheKey, &L2Entry<M>)| {
            let is_valid = stored.entry().is_some_and(|entry| validity.is_valid(&entry));
            (!is_valid || !is_hot(key.as_key().hash())).then(|| key.clone())
        };
        let removable: Vec<_> = state.pins.iter().filter_map(is_removable).collect();
        let removed = removable.iter().filter_map(|key| state.take(key)).collect();
        self.count.store(state.pins.len(), Ordering::Release);
        removed
    }

    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<M> PinnedState<M> {
    fn take(&mut self, key: &CacheKey) -> Option<L2Entry<M>> {
        let taken = self.pins.remove(key)?;
        self.bytes -= taken.weight as usize;
        Some(taken)
    }
}
