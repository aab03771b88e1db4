//! Owns the index of the L2 cache, in no particular order. A sweep visits it in small batches and
//! finds invalid entries. moka's own expiry removes everything that is due in one call: half a
//! million entries block a thread for seconds (tests/memory.rs).
//!
//! Removes nothing itself: it only reports invalid entries.

use super::handle::{EntryHandle, lock};
use super::l1::ValidityCheck;
use crate::entry::{Entry, EntryMeta, EpochSnapshot};
use crate::key::{CacheKey, Prehashed};
use slab::Slab;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Each partition grows on its own, so that no reallocation takes long.
const PARTITIONS: usize = 256;

/// Index of the L2 cache, for sweeps and to find the entry that a server reports as changed.
pub(super) struct EntryIndex<M> {
    partitions: Box<[Mutex<IndexPartition<M>>]>,
    /// The partition to sweep next.
    next: AtomicUsize,
    /// Pages swept since a maintenance sweep found more invalid entries than it may return.
    partitions_since_full_batch: AtomicUsize,
}

/// One of 256 parts of the index, each with its own lock.
struct IndexPartition<M> {
    slots: Slab<IndexedEntry<M>>,
    next: usize,
    /// Slots by digest prefix.
    by_digest_prefix: HashMap<u64, usize, Prehashed>,
}

/// Index record of one entry: its key, its expiry, its digest prefix if it has a remote location,
/// and the handle that it shares with the L2 cache.
struct IndexedEntry<M> {
    key: CacheKey,
    expires_at: Instant,
    /// The generation in which it was last found valid.
    generation: u64,
    handle: EntryHandle<M>,
    digest_prefix: Option<u64>,
}

impl<M> Default for IndexPartition<M> {
    fn default() -> Self {
        Self { slots: Slab::new(), next: 0, by_digest_prefix: HashMap::default() }
    }
}

impl<M: EntryMeta> IndexedEntry<M> {
    fn is_invalid(&mut self, validity: ValidityCheck<'_>) -> bool {
        if self.expires_at <= validity.now {
            return true;
        }
        if self.generation != validity.generation() {
            self.generation = validity.generation();
            return lock(&self.handle).as_ref().is_none_or(|entry| !validity.is_valid(entry));
        }
        false
    }
}

fn page_of(hash: u64) -> usize {
    (hash >> 16) as usize % PARTITIONS
}

/// The position of an entry in the index.
#[derive(Clone, Copy)]
pub(super) struct IndexPosition {
    partition: usize,
    at: usize,
}

impl<M: EntryMeta> EntryIndex<M> {
    pub(super) fn new() -> Self {
        let partitions = (0..PARTITIONS).map(|_| Mutex::default()).collect();
        Self { partitions, next: AtomicUsize::new(0), partitions_since_full_batch: AtomicUsize::new(0) }
    }

    /// Adds an entry; returns its position, for `remove`.
    pub(super) fn insert(&self, key: CacheKey, entry: &Arc<Entry<M>>, handle: EntryHandle<M>) -> IndexPosition {
        let digest_prefix = entry.location().map(|location| location.digest_prefix);
        let number = page_of(digest_prefix.unwrap_or_else(|| key.as_key().hash()));
        let generation = entry.fill_epoch().map_or(0, EpochSnapshot::generation);
        let mut partition = lock(&self.partitions[number]);
        let expires_at = entry.expires_at();
        let at = partition.slots.insert(IndexedEntry { key, expires_at, generation, handle, digest_prefix });
        if let Some(prefix) = digest_prefix {
            partition.by_digest_prefix.insert(prefix, at);
        }
        IndexPosition { partition: number, at }
    }

    pub(super) fn remove(&self, position: IndexPosition) {
        let mut partition = lock(&self.partitions[position.partition]);
        let removed = partition.slots.try_remove(position.at);
        if let Some(prefix) = removed.and_then(|removed| removed.digest_prefix)
            && partition.by_digest_prefix.get(&prefix) == Some(&position.at)
        {
            partition.by_digest_prefix.remove(&prefix);
        }
        if partition.slots.is_empty() {
            *partition = IndexPartition::default();
        }
    }

    /// The entry with this digest prefix.
    pub(super) fn find_by_digest_prefix(&self, prefix: u64) -> Option<(CacheKey, Arc<Entry<M>>)> {
        let partition = lock(&self.partitions[page_of(prefix)]);
        let indexed = partition.slots.get(*partition.by_digest_prefix.get(&prefix)?)?;
        Some((indexed.key.clone(), lock(&indexed.handle).clone()?))
    }

    /// Checks the next `slots` slots, or a few more, and returns up to `most` invalid entries.
    pub(super) fn sweep(&self, slots: usize, most: usize, validity: ValidityCheck<'_>) -> Vec<CacheKey> {
        let (mut invalid, mut checked) = (Vec::new(), 0);
        while checked < slots && invalid.len() < most {
            let number = self.next.load(Ordering::Relaxed) % PARTITIONS;
            let mut partition = lock(&self.partitions[number]);
            while invalid.len() < most && checked < slots && partition.next < partition.slots.capacity() {
                let at = partition.next;
                let invalid_key =
                    |indexed: &mut IndexedEntry<M>| indexed.is_invalid(validity).then(|| indexed.key.clone());
                invalid.extend(partition.slots.get_mut(at).and_then(invalid_key));
                partition.next += 1;
                checked += 1;
            }
            if partition.next >= partition.slots.capacity() {
                partition.next = 0;
                checked += 1;
                self.next.store(number + 1, Ordering::Relaxed);
                self.partitions_since_full_batch.fetch_add(1, Ordering::Relaxed);
            }
        }
        invalid
    }

    /// Sweeps a batch; also returns whether some batch of the last round was full, so that there
    /// may be more.
    pub(super) fn sweep_maintenance(
        &self,
        slots: usize,
        most: usize,
        validity: ValidityCheck<'_>,
    ) -> (Vec<CacheKey>, bool) {
        let invalid = self.sweep(slots, most, validity);
        if invalid.len() == most {
            self.partitions_since_full_batch.store(0, Ordering::Relaxed);
        }
        (invalid, self.partitions_since_full_batch.load(Ordering::Relaxed) <= PARTITIONS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::TestMeta;
    use crate::entry::{EntryLocation, InvalidationEpochs, Purge, PurgeScope, UNNUMBERED};
    use crate::key::KeyBuilder;
    use bytes::Bytes;
    use std::collections::BTreeMap;
    use std::time::Duration;

    #[test]
    fn sweeps_find_all_invalid_entries_in_bounded_batches() {
        let (now, epochs, index) = (Instant::now(), InvalidationEpochs::new(0), EntryIndex::new());
        let key = |number: u16| KeyBuilder::new().part(&number.to_le_bytes()).key().to_owned();
        let early = epochs.snapshot();
        epochs.purge(Purge { scope: PurgeScope::Everything, is_soft: false }, UNNUMBERED);
        let late = epochs.snapshot();
        let mut positions = BTreeMap::new();
        for number in 0..1_000 {
            // Every other entry has expired; of the rest, every other one was purged.
            let ttl = Duration::from_secs(if number % 2 == 0 { 60 } else { 1 });
            let entry = Entry::new(TestMeta(String::new()), Bytes::new(), ttl, now);
            let entry = Arc::new(entry.with_fill_epoch(if number % 4 == 0 { early } else { late }));
            let key = key(number);
            let position = index.insert(key.clone(), &entry, Arc::new(Mutex::new(Some(entry.clone()))));
            positions.insert(key.as_key().as_bytes().to_vec(), position);
        }
        let validity = ValidityCheck::new(now + Duration::from_secs(2), &epochs);
        let mut batches = 0;
        let mut has_more = true;
        while has_more {
            let invalid;
            (invalid, has_more) = index.sweep_maintenance(100, 7, validity);
            assert!(invalid.len() <= 7);
            invalid.iter().for_each(|key| {
                index.remove(positions.remove(key.as_key().as_bytes()).expect("each entry is found once"))
            });
            batches += 1;
            assert!(batches < 10_000, "the sweep ends");
        }
        assert_eq!(positions.len(), 250);
        assert!((0..100).all(|_| index.sweep(100, 7, validity).is_empty()));
    }

    #[test]
    fn an_entry_is_found_by_its_digest_prefix_until_removed() {
        let index = EntryIndex::new();
        let key = KeyBuilder::new().part(b"a").key().to_owned();
        let insert = |text: &str| {
            let entry = Entry::new(TestMeta(text.into()), Bytes::new(), Duration::from_secs(60), Instant::now());
            let entry = Arc::new(entry.with_location(Some(EntryLocation { shard: 0, digest_prefix: 77 })));
            index.insert(key.clone(), &entry, Arc::new(Mutex::new(Some(entry.clone()))))
        };
        let found = || index.find_by_digest_prefix(77).map(|(_, entry)| entry.meta.0.clone());
        let old = insert("old");
        let new = insert("new");
        index.remove(old);
        assert_eq!(found().as_deref(), Some("new"), "the replaced entry was removed later");
        index.remove(new);
        assert_eq!(found(), None);
    }
}
