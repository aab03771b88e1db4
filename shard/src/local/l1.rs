//! Owns the L1 cache: one per thread, in front of the L2 cache, used without atomic writes.
//!
//! A set-associative table of fixed size, indexed by the key's hash and compared by the key's
//! bytes. It holds `L1Entry` values: an `Arc` created by this thread around the shared entry, and a
//! body with a reference count of this thread, so that a hit writes no counter that another core
//! writes. An entry that leaves the L2 cache is retired; the L1 cache drops it on its next lookup,
//! or in the sweep of a few slots with every insertion. A part of the hits is reported to the L2
//! cache.
//!
//! Refuses large entries (their transfer costs more than the lookup saves) and entries beyond the
//! thread's budget.
//! Invariant: no insertion raises the bytes of all entries, retired ones included, above the
//! budget. An entry is served only while it is live, unexpired and of the current generation.

use crate::entry::{Entry, EntryMeta, InvalidationEpochs};
use crate::key::KeyRef;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// 384 KiB of slots per thread.
const TABLE_SLOTS: usize = 16_384;
const WAYS: usize = 4;

const ENTRY_BYTES_MAX: usize = 64 << 10;

/// Every 16th hit of an entry, and one per second, is reported to the L2 cache. It would otherwise
/// consider the hottest entries unused and evict them first.
const L2_TOUCH_HITS: u8 = 16;
const L2_TOUCH_INTERVAL: Duration = Duration::from_secs(1);

/// Slots swept with every insertion.
const INSERT_SWEEP_SLOTS: usize = 8;

/// A shared entry with its key, and a body whose reference count belongs to one thread.
#[derive(Debug)]
pub(crate) struct L1Entry<M> {
    entry: Arc<Entry<M>>,
    key: Box<[u8]>,
    body: Bytes,
}

/// Keeps an entry alive for a `Bytes` of its body whose reference count belongs to one thread.
struct BodyOwner<M>(Arc<Entry<M>>);

impl<M> AsRef<[u8]> for BodyOwner<M> {
    fn as_ref(&self) -> &[u8] {
        &self.0.body
    }
}

impl<M: EntryMeta> L1Entry<M> {
    fn is_valid(&self, validity: ValidityCheck<'_>) -> bool {
        validity.is_valid(&self.entry)
    }

    pub(crate) fn new(key: &KeyRef<'_>, entry: Arc<Entry<M>>) -> Arc<Self> {
        let body = Bytes::from_owner(BodyOwner(entry.clone()));
        Arc::new(Self { entry, key: key.as_bytes().into(), body })
    }
}

impl<M> L1Entry<M> {
    pub(crate) fn entry(&self) -> &Entry<M> {
        &self.entry
    }

    pub(crate) fn share(&self) -> Arc<Entry<M>> {
        self.entry.clone()
    }

    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    fn weight(&self) -> usize {
        self.entry.weight as usize + self.key.len()
    }
}

/// The time and generation at which entries are checked for validity.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ValidityCheck<'a> {
    pub(crate) now: Instant,
    generation: u64,
    epochs: &'a InvalidationEpochs,
}

impl<'a> ValidityCheck<'a> {
    pub(crate) fn new(now: Instant, epochs: &'a InvalidationEpochs) -> Self {
        Self { now, generation: epochs.generation(), epochs }
    }

    pub(crate) fn generation(self) -> u64 {
        self.generation
    }

    pub(crate) fn is_valid<M: EntryMeta>(self, entry: &Entry<M>) -> bool {
        entry.expires_at() > self.now && entry.is_valid(self.epochs, self.generation)
    }
}

/// Set-associative table of one thread with `TABLE_SLOTS` slots in sets of `WAYS`; total bytes are
/// bounded by a budget.
#[derive(Debug)]
pub(crate) struct L1Cache<M> {
    slots: Box<[L1Slot<M>]>,
    bytes: usize,
    budget: usize,
    /// The next slot to sweep.
    next: usize,
}

/// One way of a set: the key's hash, the entry if there is one, and its hits since the last report
/// to the L2 cache.
#[derive(Debug)]
struct L1Slot<M> {
    hash: u64,
    /// Hit since it was last considered for replacement.
    used: bool,
    /// Hits since the last report to the L2 cache.
    hits: u8,
    touched: Instant,
    entry: Option<Arc<L1Entry<M>>>,
}

/// An entry found in the L1 cache, and whether this use must be reported to the L2 cache.
pub(crate) struct L1Hit<M> {
    pub(crate) entry: Arc<L1Entry<M>>,
    /// Whether the use is to be reported to the L2 cache.
    pub(crate) touch_l2: bool,
}

impl<M: EntryMeta> L1Cache<M> {
    pub(crate) fn new() -> Self {
        let empty_slot = |touched| L1Slot { hash: 0, used: false, hits: 0, touched, entry: None };
        let now = Instant::now();
        let slots = (0..TABLE_SLOTS).map(|_| empty_slot(now)).collect();
        Self { slots, bytes: 0, budget: 0, next: 0 }
    }

    /// Sets the bytes that all entries together may hold; applies to later insertions.
    pub(crate) fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
    }

    pub(crate) fn get(&mut self, key: &KeyRef<'_>, validity: ValidityCheck<'_>) -> Option<L1Hit<M>> {
        let at = self.find(key)?;
        let slot = &mut self.slots[at];
        let entry = slot.entry.as_ref()?;
        if !entry.is_valid(validity) {
            self.clear(at);
            return None;
        }
        slot.hits += 1;
        let touch_l2 =
            slot.hits >= L2_TOUCH_HITS || validity.now.saturating_duration_since(slot.touched) >= L2_TOUCH_INTERVAL;
        if touch_l2 {
            (slot.hits, slot.touched) = (0, validity.now);
        }
        slot.used = true;
        Some(L1Hit { entry: entry.clone(), touch_l2 })
    }

    /// Stores `entry` if it is small enough and fits the budget.
    pub(crate) fn insert(&mut self, key: &KeyRef<'_>, entry: Arc<L1Entry<M>>, validity: ValidityCheck<'_>) {
        self.sweep(INSERT_SWEEP_SLOTS, validity);
        if let Some(at) = self.find(key) {
            self.clear(at);
        }
        let weight = entry.weight();
        if weight > ENTRY_BYTES_MAX {
            return;
        }
        let at = self.victim(key, validity);
        self.clear(at);
        self.make_room(weight);
        if self.bytes + weight <= self.budget {
            self.bytes += weight;
            self.slots[at] =
                L1Slot { hash: key.hash(), used: false, hits: 0, touched: validity.now, entry: Some(entry) };
        }
    }

    /// Removes invalid entries from the next `slots` slots; returns their number.
    pub(crate) fn sweep(&mut self, slots: usize, validity: ValidityCheck<'_>) -> usize {
        let mut removed = 0;
        for _ in 0..slots {
            let at = self.advance();
            if self.slots[at].entry.as_ref().is_some_and(|entry| !entry.is_valid(validity)) {
                self.clear(at);
                removed += 1;
            }
        }
        removed
    }

    /// Evicts entries without a recent hit, then any, in one bounded pass over part of the table.
    /// Insertions stay cheap; an entry that still does not fit is not stored.
    fn make_room(&mut self, weight: usize) {
        for _ in 0..16 * INSERT_SWEEP_SLOTS {
            if self.bytes + weight <= self.budget {
                return;
            }
            let at = self.advance();
            if !std::mem::take(&mut self.slots[at].used) {
                self.clear(at);
            }
        }
    }

    /// A slot of the key's set: an empty or invalid one, or the first without a hit since it was
    /// last passed over.
    fn victim(&mut self, key: &KeyRef<'_>, validity: ValidityCheck<'_>) -> usize {
        let first = self.first_of_set(key);
        let set = &mut self.slots[first..first + WAYS];
        let free = set.iter().position(|slot| slot.entry.as_ref().is_none_or(|entry| !entry.is_valid(validity)));
        let idle = |set: &mut [L1Slot<M>]| set.iter_mut().position(|slot| !std::mem::take(&mut slot.used));
        first + free.or_else(|| idle(set)).or_else(|| idle(set)).unwrap_or(0)
    }

    fn find(&self, key: &KeyRef<'_>) -> Option<usize> {
        let first = self.first_of_set(key);
        let same = |slot: &L1Slot<M>| {
            slot.hash == key.hash() && slot.entry.as_ref().is_some_and(|entry| *entry.key == *key.as_bytes())
        };
        self.slots[first..first + WAYS].iter().position(same).map(|way| first + way)
    }

    fn first_of_set(&self, key: &KeyRef<'_>) -> usize {
        key.hash() as usize % (TABLE_SLOTS / WAYS) * WAYS
    }

    fn clear(&mut self, at: usize) {
        if let Some(entry) = self.slots[at].entry.take() {
            self.bytes -= entry.weight();
        }
    }

    fn advance(&mut self) -> usize {
        self.next = (self.next + 1) % TABLE_SLOTS;
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::TestMeta;
    use crate::entry::{Purge, PurgeScope, UNNUMBERED};
    use crate::key::KeyBuilder;
    use proptest::prelude::*;
    use std::time::Duration;

    const BUDGET: usize = 1 << 20;

    struct Fixture {
        l1: L1Cache<TestMeta>,
        now: Instant,
        epochs: InvalidationEpochs,
    }

    impl Fixture {
        fn new() -> Self {
            Self { l1: L1Cache::new(), now: Instant::now(), epochs: InvalidationEpochs::new(0) }
        }

        fn put(&mut self, name: &str, body_bytes: usize, budget: usize) -> Arc<Entry<TestMeta>> {
            let entry =
                Entry::new(TestMeta(name.into()), vec![0; body_bytes].into(), Duration::from_secs(60), self.now);
            let entry = entry.with_fill_epoch(self.epochs.snapshot());
            let (mut key, entry) = (KeyBuilder::new(), Arc::new(entry));
            let key = key.part(name.as_bytes()).key();
            let entry_in_l1 = L1Entry::new(&key, entry.clone());
            self.l1.set_budget(budget);
            self.l1.insert(&key, entry_in_l1, ValidityCheck::new(self.now, &self.epochs));
            entry
        }

        fn get(&mut self, name: &str) -> Option<String> {
            let mut key = KeyBuilder::new();
            let hit = self.l1.get(&key.part(name.as_bytes()).key(), ValidityCheck::new(self.now, &self.epochs))?;
            Some(hit.entry.entry().meta.0.clone())
        }
    }

    #[test]
    fn a_lookup_drops_a_retired_entry() {
        let mut fixture = Fixture::new();
        let entry = fixture.put("a", 10, BUDGET);
        assert_eq!(fixture.get("a").as_deref(), Some("a"));
        entry.retire();
        assert_eq!(fixture.get("a"), None);
        assert_eq!((fixture.l1.bytes, Arc::strong_count(&entry)), (0, 1));
    }

    #[test]
    fn expired_and_purged_entries_are_not_served() {
        let mut fixture = Fixture::new();
        fixture.put("a", 10, BUDGET);
        fixture.now += Duration::from_secs(60);
        assert_eq!(fixture.get("a"), None);
        fixture.put("a", 10, BUDGET);
        fixture.epochs.purge(Purge { scope: PurgeScope::Everything, is_soft: false }, UNNUMBERED);
        assert_eq!(fixture.get("a"), None);
    }

    #[test]
    fn sweeps_drop_retired_entries() {
        let mut fixture = Fixture::new();
        let entries: Vec<_> = (0..100).map(|i| fixture.put(&i.to_string(), 10, BUDGET)).collect();
        entries.iter().for_each(|entry| entry.retire());
        fixture.l1.sweep(TABLE_SLOTS, ValidityCheck::new(fixture.now, &fixture.epochs));
        assert_eq!(fixture.l1.bytes, 0);
        assert!(entries.iter().all(|entry| Arc::strong_count(entry) == 1));
    }

    #[test]
    fn large_entries_are_not_stored() {
        let mut fixture = Fixture::new();
        fixture.put("a", ENTRY_BYTES_MAX, BUDGET);
        assert_eq!(fixture.get("a"), None);
    }

    #[test]
    fn a_body_shares_memory_with_its_entry_and_keeps_it() {
        let mut fixture = Fixture::new();
        let entry = fixture.put("a", 10, BUDGET);
        let mut key = KeyBuilder::new();
        let entry_in_l1 =
            fixture.l1.get(&key.part(b"a").key(), ValidityCheck::new(fixture.now, &fixture.epochs)).unwrap().entry;
        let body = entry_in_l1.body().clone();
        assert_eq!(body.as_ptr(), entry.body.as_ptr());
        drop((entry_in_l1, fixture));
        assert_eq!(Arc::strong_count(&entry), 2);
        drop(body);
        assert_eq!(Arc::strong_count(&entry), 1);
    }

    proptest! {
        #[test]
        fn the_budget_holds_and_no_key_returns_another_keys_entry(
            puts in prop::collection::vec((0u32..3_000, 0usize..9_000, 1usize..20), 1..600),
        ) {
            let mut fixture = Fixture::new();
            for (name, body_bytes, budget) in puts {
                fixture.put(&name.to_string(), body_bytes, budget * 10_000);
                let found = fixture.get(&name.to_string());
                prop_assert!(found.is_none() || fixture.l1.bytes <= budget * 10_000);
                prop_assert!(found.is_none_or(|found| found == name.to_string()));
            }
            let entries = fixture.l1.slots.iter().filter_map(|slot| slot.entry.as_ref());
            prop_assert_eq!(fixture.l1.bytes, entries.map(|entry| entry.weight()).sum::<usize>());
        }
    }
}
