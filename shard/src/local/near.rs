//! Owns the table in front of the shared cache: one per thread, reached without an atomic write.
//!
//! A set-associative table of fixed size, found by the key's hash and compared by its bytes. What it holds is a `NearCopy`: an
//! `Arc` made by this thread around the shared entry, and a body whose reference count is this thread's too, so that serving a
//! hit touches no counter that another core writes. An entry that the shared cache lets go of is retired; the table finds the
//! mark when it meets the copy, and meets a few more with every insertion. The shared cache
//! hears of a part of the hits.
//!
//! Refuses copies that are large (the transfer costs more than the lookup saves) or that exceed the thread's budget.
//! Invariant: no insertion takes the bytes of all copies, retired ones included, beyond the budget; a copy is served only while
//! its entry is live, in time and of the current generation.

use crate::entry::{Entry, Epochs, Meta};
use crate::key::KeyRef;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// 384 KiB of slots per thread.
const SLOTS: usize = 16_384;
const WAYS: usize = 4;

const WEIGHT_MAX: usize = 64 << 10;

/// The shared cache is told of every 16th hit of a copy, and of one a second: it would take what it never sees asked for as
/// cold, and push out the hottest entries first.
const TOUCH_HITS: u8 = 16;
const TOUCH_EVERY: Duration = Duration::from_secs(1);

/// Slots looked at with every insertion.
const SWEEP: usize = 8;

/// An entry as one thread holds it.
#[derive(Debug)]
pub(crate) struct NearCopy<M> {
    entry: Arc<Entry<M>>,
    key: Box<[u8]>,
    body: Bytes,
}

struct Body<M>(Arc<Entry<M>>);

impl<M> AsRef<[u8]> for Body<M> {
    fn as_ref(&self) -> &[u8] {
        &self.0.body
    }
}

impl<M: Meta> NearCopy<M> {
    fn counts(&self, moment: Moment<'_>) -> bool {
        moment.counts(&self.entry)
    }

    pub(crate) fn new(key: &KeyRef<'_>, entry: Arc<Entry<M>>) -> Arc<Self> {
        let body = Bytes::from_owner(Body(entry.clone()));
        Arc::new(Self { entry, key: key.as_bytes().into(), body })
    }
}

impl<M> NearCopy<M> {
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

/// What decides whether a copy still counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment<'a> {
    pub(crate) now: Instant,
    generation: u64,
    epochs: &'a Epochs,
}

impl<'a> Moment<'a> {
    pub(crate) fn new(now: Instant, epochs: &'a Epochs) -> Self {
        Self { now, generation: epochs.generation(), epochs }
    }

    pub(crate) fn generation(self) -> u64 {
        self.generation
    }

    pub(crate) fn counts<M: Meta>(self, entry: &Entry<M>) -> bool {
        entry.until() > self.now && entry.counts(self.epochs, self.generation)
    }
}

#[derive(Debug)]
pub(crate) struct Near<M> {
    ways: Box<[Way<M>]>,
    bytes: usize,
    sweep: usize,
}

#[derive(Debug)]
struct Way<M> {
    hash: u64,
    /// Found since it was last considered for replacement.
    used: bool,
    /// Since the shared cache was told.
    hits: u8,
    touched: Instant,
    copy: Option<Arc<NearCopy<M>>>,
}

/// What the table had.
pub(crate) struct Found<M> {
    pub(crate) copy: Arc<NearCopy<M>>,
    /// Whether the shared cache is to be told that it is in use.
    pub(crate) touch: bool,
}

impl<M: Meta> Near<M> {
    pub(crate) fn new() -> Self {
        let way = |touched| Way { hash: 0, used: false, hits: 0, touched, copy: None };
        let now = Instant::now();
        let ways = (0..SLOTS).map(|_| way(now)).collect();
        Self { ways, bytes: 0, sweep: 0 }
    }

    pub(crate) fn get(&mut self, key: &KeyRef<'_>, moment: Moment<'_>) -> Option<Found<M>> {
        let at = self.find(key)?;
        let way = &mut self.ways[at];
        let copy = way.copy.as_ref()?;
        if !copy.counts(moment) {
            self.empty(at);
            return None;
        }
        way.hits += 1;
        let touch = way.hits >= TOUCH_HITS || moment.now.saturating_duration_since(way.touched) >= TOUCH_EVERY;
        if touch {
            (way.hits, way.touched) = (0, moment.now);
        }
        way.used = true;
        Some(Found { copy: copy.clone(), touch })
    }

    /// Holds `copy` if it is small enough, within `budget` bytes for everything held.
    pub(crate) fn put(&mut self, key: &KeyRef<'_>, copy: Arc<NearCopy<M>>, moment: Moment<'_>, budget: usize) {
        self.sweep(SWEEP, moment);
        if let Some(at) = self.find(key) {
            self.empty(at);
        }
        let weight = copy.weight();
        if weight > WEIGHT_MAX {
            return;
        }
        let at = self.victim(key, moment);
        self.empty(at);
        self.make_room(weight, budget);
        if self.bytes + weight <= budget {
            self.bytes += weight;
            self.ways[at] = Way { hash: key.hash(), used: false, hits: 0, touched: moment.now, copy: Some(copy) };
        }
    }

    /// Drops what no longer counts from the next `slots` slots.
    pub(crate) fn sweep(&mut self, slots: usize, moment: Moment<'_>) {
        for _ in 0..slots {
            let at = self.next();
            if self.ways[at].copy.as_ref().is_some_and(|copy| !copy.counts(moment)) {
                self.empty(at);
            }
        }
    }

    /// Drops what was not found lately, then anything, in at most one round over a small part of the table: an insertion stays
    /// cheap, and one that still finds no room is not made.
    fn make_room(&mut self, weight: usize, budget: usize) {
        for _ in 0..16 * SWEEP {
            if self.bytes + weight <= budget {
                return;
            }
            let at = self.next();
            if !std::mem::take(&mut self.ways[at].used) {
                self.empty(at);
            }
        }
    }

    /// A slot of the key's set: an empty one, one that no longer counts, or the first not found since it was last passed over.
    fn victim(&mut self, key: &KeyRef<'_>, moment: Moment<'_>) -> usize {
        let set = self.set(key);
        let ways = &mut self.ways[set..set + WAYS];
        let free = ways.iter().position(|way| way.copy.as_ref().is_none_or(|copy| !copy.counts(moment)));
        let idle = |ways: &mut [Way<M>]| ways.iter_mut().position(|way| !std::mem::take(&mut way.used));
        set + free.or_else(|| idle(ways)).or_else(|| idle(ways)).unwrap_or(0)
    }

    fn find(&self, key: &KeyRef<'_>) -> Option<usize> {
        let set = self.set(key);
        let same =
            |way: &Way<M>| way.hash == key.hash() && way.copy.as_ref().is_some_and(|copy| *copy.key == *key.as_bytes());
        self.ways[set..set + WAYS].iter().position(same).map(|way| set + way)
    }

    fn set(&self, key: &KeyRef<'_>) -> usize {
        key.hash() as usize % (SLOTS / WAYS) * WAYS
    }

    fn empty(&mut self, at: usize) {
        if let Some(copy) = self.ways[at].copy.take() {
            self.bytes -= copy.weight();
        }
    }

    fn next(&mut self) -> usize {
        self.sweep = (self.sweep + 1) % SLOTS;
        self.sweep
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::entry::{Purge, Scope, UNNUMBERED};
    use crate::key::KeyBuilder;
    use proptest::prelude::*;
    use std::time::Duration;

    const BUDGET: usize = 1 << 20;

    struct Bench {
        near: Near<Note>,
        now: Instant,
        epochs: Epochs,
    }

    impl Bench {
        fn new() -> Self {
            Self { near: Near::new(), now: Instant::now(), epochs: Epochs::new(0) }
        }

        fn put(&mut self, name: &str, body_bytes: usize, budget: usize) -> Arc<Entry<Note>> {
            let entry = Entry::new(Note(name.into()), vec![0; body_bytes].into(), Duration::from_secs(60), self.now);
            let entry = entry.begun(self.epochs.since());
            let (mut key, entry) = (KeyBuilder::new(), Arc::new(entry));
            let key = key.part(name.as_bytes()).key();
            let copy = NearCopy::new(&key, entry.clone());
            self.near.put(&key, copy, Moment::new(self.now, &self.epochs), budget);
            entry
        }

        fn get(&mut self, name: &str) -> Option<String> {
            let mut key = KeyBuilder::new();
            let found = self.near.get(&key.part(name.as_bytes()).key(), Moment::new(self.now, &self.epochs))?;
            Some(found.copy.entry().meta.0.clone())
        }
    }

    #[test]
    fn a_retired_copy_is_dropped_when_it_is_met() {
        let mut bench = Bench::new();
        let entry = bench.put("a", 10, BUDGET);
        assert_eq!(bench.get("a").as_deref(), Some("a"));
        entry.retire();
        assert_eq!(bench.get("a"), None);
        assert_eq!((bench.near.bytes, Arc::strong_count(&entry)), (0, 1));
    }

    #[test]
    fn a_copy_whose_time_is_over_or_that_was_purged_is_not_served() {
        let mut bench = Bench::new();
        bench.put("a", 10, BUDGET);
        bench.now += Duration::from_secs(60);
        assert_eq!(bench.get("a"), None);
        bench.put("a", 10, BUDGET);
        bench.epochs.purge(Purge { scope: Scope::Everything, is_soft: false }, UNNUMBERED);
        assert_eq!(bench.get("a"), None);
    }

    #[test]
    fn retired_copies_that_nobody_asks_for_are_swept() {
        let mut bench = Bench::new();
        let entries: Vec<_> = (0..100).map(|i| bench.put(&i.to_string(), 10, BUDGET)).collect();
        entries.iter().for_each(|entry| entry.retire());
        bench.near.sweep(SLOTS, Moment::new(bench.now, &bench.epochs));
        assert_eq!(bench.near.bytes, 0);
        assert!(entries.iter().all(|entry| Arc::strong_count(entry) == 1));
    }

    #[test]
    fn large_copies_stay_out() {
        let mut bench = Bench::new();
        bench.put("a", WEIGHT_MAX, BUDGET);
        assert_eq!(bench.get("a"), None);
    }

    #[test]
    fn a_body_is_lent_without_copying_and_keeps_its_entry() {
        let mut bench = Bench::new();
        let entry = bench.put("a", 10, BUDGET);
        let mut key = KeyBuilder::new();
        let copy = bench.near.get(&key.part(b"a").key(), Moment::new(bench.now, &bench.epochs)).unwrap().copy;
        let body = copy.body().clone();
        assert_eq!(body.as_ptr(), entry.body.as_ptr());
        drop((copy, bench));
        assert_eq!(Arc::strong_count(&entry), 2);
        drop(body);
        assert_eq!(Arc::strong_count(&entry), 1);
    }

    proptest! {
        #[test]
        fn whatever_is_put_the_budget_holds_and_no_key_gets_anothers_entry(
            puts in prop::collection::vec((0u32..3_000, 0usize..9_000, 1usize..20), 1..600),
        ) {
            let mut bench = Bench::new();
            for (name, body_bytes, budget) in puts {
                bench.put(&name.to_string(), body_bytes, budget * 10_000);
                let found = bench.get(&name.to_string());
                prop_assert!(found.is_none() || bench.near.bytes <= budget * 10_000);
                prop_assert!(found.is_none_or(|found| found == name.to_string()));
            }
            let copies = bench.near.ways.iter().filter_map(|way| way.copy.as_ref());
            prop_assert_eq!(bench.near.bytes, copies.map(|copy| copy.weight()).sum::<usize>());
        }
    }
}
