//! Owns the local cache: an L2 cache shared by all threads of the process (moka), and an L1 cache
//! per thread in front of it.
//!
//! Refuses entries whose key was deleted or whose tags were purged while they were fetched. Never
//! empties the L2 cache at once: a purge raises the generation, and older entries become invalid
//! and are removed when they are looked up, replaced, swept or evicted. Expired entries are removed
//! the same way, in bounded batches.
//!
//! Memory: both layers together keep to `memory_bytes` of weight. The L1 caches hold entries of the
//! L2 cache and may keep removed ones for a while; they share a sixteenth of the memory. moka
//! evicts with a delay of some insertions; it is made to evict at once when the pending bytes are
//! large. Hot entries that moka evicts stay pinned (see `pins`), in half a sixteenth.
//! Invariant: an entry that left the L2 cache is retired, which invalidates it in every L1 cache.

mod handle;
mod l1;
mod index;
mod l2_entry;
mod pins;

pub(crate) use l1::{L1Cache, L1Entry, ValidityCheck};

use crate::entry::{Entry, EntryLocation, EntryMeta, EpochSnapshot, InvalidationEpochs, PurgeStatus};
use crate::hot::HotKeys;
use crate::key::{CacheKey, KeyRef, Prehashed};
use index::EntryIndex;
use l2_entry::L2Entry;
use moka::notification::RemovalCause;
use moka::sync::Cache;
use pins::PinnedEntries;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Approximate overhead of the L2 cache per entry.
const ENTRY_OVERHEAD_BYTES: usize = 400;

/// Share of the memory for the L2 cache. The allocator and moka's pending evictions need the rest,
/// as measured under churn by four threads (tests/memory.rs).
const L2_SIXTEENTHS: usize = 12;

/// Fraction of the memory for all L1 caches together.
const L1_PART: usize = 16;

/// Fraction of the memory for pinned hot entries, in addition to the L2 cache.
const PINS_PART: usize = 32;

/// Slots that a sweep checks, and entries that it may remove: less than a millisecond of work in
/// maintenance, and little with each insertion.
const MAINTENANCE_SWEEP_SLOTS: usize = 8_192;
const MAINTENANCE_REMOVED_MAX: usize = 32;
const INSERT_SWEEP_SLOTS: usize = 16;
const INSERT_SWEEP_REMOVED_MAX: usize = 2;

/// Fraction of the memory by which the L2 cache may be exceeded temporarily.
const PENDING_PART: usize = 32;

/// Entries that are stored together must not expire together: their TTL is shortened by up to this
/// fraction.
const JITTER: f64 = 0.05;

/// The L2 cache of the process with its index and its pinned entries, shared by all threads; weight
/// is bounded by fractions of `memory_bytes`.
pub(crate) struct LocalCache<M> {
    l2: Cache<CacheKey, L2Entry<M>, Prehashed>,
    pins: Arc<PinnedEntries<M>>,
    hot: Arc<HotKeys>,
    epochs: Arc<InvalidationEpochs>,
    memory_bytes: usize,
    index: Arc<EntryIndex<M>>,
    threads: AtomicUsize,
    /// Bytes inserted since moka last ran its pending evictions.
    pending_bytes: AtomicUsize,
}

/// Handles entries that moka removes: pins hot ones and releases the others.
struct EvictionListener<M> {
    hot: Arc<HotKeys>,
    pins: Arc<PinnedEntries<M>>,
    index: Arc<EntryIndex<M>>,
}

impl<M: EntryMeta> EvictionListener<M> {
    fn on_removal(&self, key: &CacheKey, stored: L2Entry<M>, cause: RemovalCause) {
        let hash = key.as_key().hash();
        if cause != RemovalCause::Size || !self.hot.is_hot(hash) {
            return stored.release(&self.index);
        }
        self.pins.pin(key, stored).iter().for_each(|stored| stored.release(&self.index));
    }
}

/// Statistics of the local cache; moka updates them with a delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalCacheReport {
    pub entries: u64,
    pub weight_bytes: u64,
    /// Hot entries pinned in addition to the entries of the L2 cache; not included in the other
    /// figures.
    pub pinned: usize,
}

impl<M: EntryMeta> LocalCache<M> {
    pub(crate) fn new(memory_bytes: usize, hot: Arc<HotKeys>, epochs: Arc<InvalidationEpochs>) -> Self {
        let index = Arc::new(EntryIndex::new());
        let pins = Arc::new(PinnedEntries::new(memory_bytes / PINS_PART));
        let listener = EvictionListener { hot: hot.clone(), pins: pins.clone(), index: index.clone() };
        let l2 = Cache::builder()
            .max_capacity((memory_bytes / 16 * L2_SIXTEENTHS) as u64)
            .weigher(|_, stored: &L2Entry<M>| stored.weight)
            .eviction_listener(move |key, stored, cause| listener.on_removal(&key, stored, cause))
            .build_with_hasher(Prehashed::default());
        let [threads, pending_bytes] = [0; 2].map(AtomicUsize::new);
        Self { l2, pins, hot, epochs, memory_bytes, index, threads, pending_bytes }
    }

    pub(crate) fn get(&self, key: &KeyRef<'_>, validity: ValidityCheck<'_>) -> Option<Arc<L1Entry<M>>> {
        let entry = self.l2.get(key).and_then(|stored| stored.entry()).or_else(|| self.pinned(key))?;
        if !validity.is_valid(&entry) {
            self.remove_invalid(&[key.to_owned()], validity);
            return None;
        }
        Some(L1Entry::new(key, entry))
    }

    fn pinned(&self, key: &KeyRef<'_>) -> Option<Arc<Entry<M>>> {
        if self.pins.is_empty() || !self.hot.is_hot(key.hash()) { None } else { self.pins.get(key) }
    }

    /// The cached entry with this digest prefix.
    pub(crate) fn find_by_digest_prefix(&self, prefix: u64) -> Option<(CacheKey, Arc<Entry<M>>)> {
        self.index.find_by_digest_prefix(prefix)
    }

    /// Records a use in the L2 cache for a hit in an L1 cache.
    pub(crate) fn touch(&self, key: &KeyRef<'_>) {
        let _lookup_counts_the_use = self.l2.get(key);
    }

    /// Stores the entry unless its key was deleted or one of its tags purged since its fill began.
    /// The returned entry can be served either way.
    pub(crate) fn insert(&self, key: &KeyRef<'_>, entry: Entry<M>, now: Instant) -> InsertResult<M> {
        let since = entry.fill_epoch().unwrap_or_else(|| self.epochs.snapshot());
        let mut entry = entry.with_fill_epoch(since);
        let remaining = entry.remaining(now);
        entry.set_expires_at(now + remaining.mul_f64(1.0 - JITTER * unit_interval(key.hash())));
        let entry = Arc::new(entry);
        let is_purged = self.epochs.purge_status(entry.meta.tags(), since.generation()) == PurgeStatus::Purged;
        let is_unchanged =
            || self.epochs.is_undeleted_since(key.hash(), since) && self.is_remote_unchanged(entry.location(), since);
        let is_stored = is_unchanged() && !is_purged && !remaining.is_zero();
        if is_stored {
            let bytes = entry.weight as usize + key.as_bytes().len() + ENTRY_OVERHEAD_BYTES;
            let owned = key.to_owned();
            let handle = Arc::new(Mutex::new(Some(entry.clone())));
            let position = self.index.insert(owned.clone(), &entry, handle.clone());
            let weight = u32::try_from(bytes).unwrap_or(u32::MAX);
            self.l2.insert(owned, L2Entry { entry: handle.clone(), weight, position });
            // An entry evicted and pinned meanwhile is older, unless it is this one.
            self.pins.take_other(key, &handle).iter().for_each(|older| older.release(&self.index));
            // A concurrent deletion may not have found the entry.
            if !is_unchanged() {
                self.invalidate(key);
            }
            if self.pending_bytes.fetch_add(bytes, Ordering::Relaxed) > self.memory_bytes / PENDING_PART {
                self.run_pending_evictions();
            }
            let validity = self.validity(now);
            self.remove_invalid(&self.index.sweep(INSERT_SWEEP_SLOTS, INSERT_SWEEP_REMOVED_MAX, validity), validity);
        }
        InsertResult { entry: L1Entry::new(key, entry), is_stored }
    }

    /// Whether the shard reported no change of the entry since then.
    fn is_remote_unchanged(&self, location: Option<EntryLocation>, since: EpochSnapshot) -> bool {
        location.is_none_or(|location| self.epochs.is_unchanged_since(location.digest_prefix, since))
    }

    /// Removes an entry, also one that is being filled; returns the number of the delete.
    pub(crate) fn remove(&self, key: &KeyRef<'_>) -> u64 {
        let number = self.epochs.record_delete(key.hash());
        self.invalidate(key);
        number
    }

    fn invalidate(&self, key: &KeyRef<'_>) {
        self.l2.invalidate(key);
        if self.hot.is_hot(key.hash()) || !self.pins.is_empty() {
            self.pins.invalidate(key, self.epochs.snapshot()).iter().for_each(|pinned| pinned.release(&self.index));
        }
    }

    pub(crate) fn validity(&self, now: Instant) -> ValidityCheck<'_> {
        ValidityCheck::new(now, &self.epochs)
    }

    /// Runs moka's pending evictions, and sweeps a bounded batch of invalid entries; true if there
    /// may be more.
    pub(crate) fn run_maintenance(&self, validity: ValidityCheck<'_>) -> bool {
        let (invalid, has_more) =
            self.index.sweep_maintenance(MAINTENANCE_SWEEP_SLOTS, MAINTENANCE_REMOVED_MAX, validity);
        self.remove_invalid(&invalid, validity);
        let cold = self.pins.sweep(validity, |hash| self.hot.is_hot(hash));
        cold.iter().for_each(|stored| stored.release(&self.index));
        self.run_pending_evictions();
        has_more
    }

    fn run_pending_evictions(&self) {
        self.pending_bytes.store(0, Ordering::Relaxed);
        self.l2.run_pending_tasks();
    }

    /// Removes entries that a sweep found invalid.
    fn remove_invalid(&self, keys: &[CacheKey], validity: ValidityCheck<'_>) {
        for key in keys {
            let key = key.as_key();
            // A valid entry may have replaced it.
            let is_invalid = |stored: &L2Entry<M>| stored.entry().is_none_or(|entry| !validity.is_valid(&entry));
            if self.l2.get(&key).as_ref().is_some_and(is_invalid) {
                self.l2.invalidate(&key);
            }
            if self.pins.get(&key).is_some_and(|entry| !validity.is_valid(&entry)) {
                self.pins.take(&key).iter().for_each(|stored| stored.release(&self.index));
            }
        }
    }

    pub(crate) fn report(&self) -> LocalCacheReport {
        let (entries, weight_bytes) = (self.l2.entry_count(), self.l2.weighted_size());
        LocalCacheReport { entries, weight_bytes, pinned: self.pins.len() }
    }
}

impl<M> LocalCache<M> {
    pub(crate) fn add_thread(&self) {
        self.threads.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn remove_thread(&self) {
        self.threads.fetch_sub(1, Ordering::Relaxed);
    }

    /// Bytes that one thread's L1 cache may hold.
    pub(crate) fn l1_budget(&self) -> usize {
        self.memory_bytes / L1_PART / self.threads.load(Ordering::Relaxed).max(1)
    }
}

/// The inserted entry, and whether it was stored.
pub(crate) struct InsertResult<M> {
    pub(crate) entry: Arc<L1Entry<M>>,
    pub(crate) is_stored: bool,
}

/// Maps the hash to 0..1. Its seed is per process, so that nodes shorten TTLs differently.
fn unit_interval(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::TestMeta;
    use crate::entry::{Purge, PurgeScope, UNNUMBERED};
    use crate::key::KeyBuilder;
    use bytes::Bytes;
    use std::time::Duration;

    const TTL: Duration = Duration::from_secs(100);

    fn key(n: u64) -> CacheKey {
        KeyBuilder::new().part(&n.to_le_bytes()).key().to_owned()
    }

    fn entry(body_bytes: usize) -> Entry<TestMeta> {
        Entry::new(TestMeta("n".into()), Bytes::from(vec![0; body_bytes]), TTL, Instant::now())
    }

    fn local(memory_bytes: usize) -> (LocalCache<TestMeta>, Arc<InvalidationEpochs>) {
        let epochs = Arc::new(InvalidationEpochs::new(0));
        (LocalCache::new(memory_bytes, Arc::new(HotKeys::new(1_000)), epochs.clone()), epochs)
    }

    fn is_cached(local: &LocalCache<TestMeta>, key: &CacheKey, now: Instant) -> bool {
        local.get(&key.as_key(), local.validity(now)).is_some()
    }

    #[test]
    fn deletion_replacement_and_eviction_retire_entries() {
        let (local, _) = local(100_000);
        let (a, now) = (key(1), Instant::now());
        let first = local.insert(&a.as_key(), entry(10), now).entry;
        let second = local.insert(&a.as_key(), entry(10), now).entry;
        assert!(!first.entry().is_live() && second.entry().is_live());
        local.remove(&a.as_key());
        assert!(!second.entry().is_live() && !is_cached(&local, &a, now));

        let entries: Vec<_> = (0..1_000).map(|n| local.insert(&key(n).as_key(), entry(1_000), now).entry).collect();
        local.run_maintenance(local.validity(Instant::now()));
        let live = entries.iter().filter(|entry| entry.entry().is_live()).count();
        assert!(live <= 70 && local.report().weight_bytes <= 100_000, "{live} live");
    }

    #[test]
    fn a_fill_is_not_stored_after_a_deletion_or_purge() {
        let (local, epochs) = local(1 << 20);
        let (a, now) = (key(1), Instant::now());
        let since = epochs.snapshot();
        local.remove(&a.as_key());
        assert!(!local.insert(&a.as_key(), entry(1).with_fill_epoch(since), now).is_stored);
        let since = epochs.snapshot();
        epochs.purge(Purge { scope: PurgeScope::Everything, is_soft: false }, UNNUMBERED);
        assert!(!local.insert(&a.as_key(), entry(1).with_fill_epoch(since), now).is_stored);
        assert!(!is_cached(&local, &a, now));
    }

    #[test]
    fn a_purge_invalidates_only_earlier_entries() {
        let (local, epochs) = local(1 << 20);
        let (a, b, now) = (key(1), key(2), Instant::now());
        local.insert(&a.as_key(), entry(1), now);
        epochs.purge(Purge { scope: PurgeScope::Everything, is_soft: false }, UNNUMBERED);
        local.insert(&b.as_key(), entry(1), now);
        assert!(!is_cached(&local, &a, now) && is_cached(&local, &b, now));
    }

    #[test]
    fn ttls_are_shortened_by_up_to_five_percent_with_jitter() {
        let (local, _) = local(1 << 20);
        let now = Instant::now();
        let mut reductions: Vec<_> = (0..100)
            .map(|n| TTL - local.insert(&key(n).as_key(), entry(1), now).entry.entry().remaining(now))
            .collect();
        assert!(reductions.iter().all(|&reduction| reduction <= TTL / 20 + Duration::from_millis(10)));
        reductions.sort_unstable();
        reductions.dedup();
        assert!(reductions.len() > 90);
    }

    #[test]
    fn an_expired_entry_is_not_found() {
        let (local, _) = local(1 << 20);
        let (a, now) = (key(1), Instant::now());
        local.insert(&a.as_key(), entry(1), now);
        assert!(is_cached(&local, &a, now + TTL.mul_f64(0.94)) && !is_cached(&local, &a, now + TTL));
    }

    #[test]
    fn l1_caches_share_a_sixteenth_of_the_memory() {
        let (local, _) = local(1 << 20);
        (0..4).for_each(|_| local.add_thread());
        assert_eq!(local.l1_budget(), 1 << 14);
        local.remove_thread();
        assert!(local.l1_budget() > 1 << 14);
    }
}
