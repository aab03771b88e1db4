//! Owns the local tier: one cache shared by all threads (moka), and a table of each thread in front of it.
//!
//! Refuses entries that were removed or purged while they were fetched, and never empties the shared cache at once: a purge
//! raises a generation, older entries no longer count and leave when they are met, replaced, swept or pushed out. What is over
//! is swept likewise, a bounded piece at a time.
//!
//! Memory: both together keep to `memory_bytes` of weight. Threads' tables hold entries of the shared cache, and may keep
//! ones it let go of for a while: a sixteenth is theirs, all tables together. moka lets go of entries some insertions later, which
//! is done at once where these are large. What it pushes out of hot keys stays beside it (see `pins`), in half a sixteenth.
//! Invariant: an entry that left the shared cache is retired, and with that it is gone from every table.

mod near;
mod pins;
mod roll;

pub(crate) use near::{Moment, Near, NearCopy};

use crate::entry::{Entry, Epochs, Home, Judgement, Meta, Since};
use crate::hot::Hot;
use crate::key::{CacheKey, KeyRef, Prehashed};
use moka::notification::RemovalCause;
use moka::sync::Cache;
use pins::Pins;
use roll::{Place, Roll};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the shared cache itself spends on an entry, approximately.
const OVERHEAD: usize = 400;

/// What the shared cache gets of the memory: the allocator and what moka has not yet let go of need the rest, as seen under
/// churn by four threads (tests/memory.rs).
const SHARED_SIXTEENTHS: usize = 13;

/// The part of the memory that threads' tables may hold, all together.
const NEAR_PART: usize = 16;

/// The part of the memory that entries of hot keys may hold beside the shared cache.
const PINS_PART: usize = 32;

/// How many entries a sweep looks at, and how many that are over it lets go of: less than a millisecond of work at
/// leisure, and a little with each insertion.
const SWEEP: usize = 8_192;
const OVER: usize = 32;
const SWEEP_ON_INSERT: usize = 16;
const OVER_ON_INSERT: usize = 2;

/// The part of the memory by which the shared cache may be exceeded for a moment.
const UNSETTLED_PART: usize = 32;

/// Entries stored together do not expire together: up to this part of their time is cut off.
const JITTER: f64 = 0.05;

pub(crate) struct Local<M> {
    shared: Cache<CacheKey, Stored<M>, Prehashed>,
    pins: Arc<Pins<M>>,
    hot: Arc<Hot>,
    epochs: Arc<Epochs>,
    memory_bytes: usize,
    roll: Arc<Roll<M>>,
    views: AtomicUsize,
    /// Bytes inserted since the shared cache last let go of what is too much.
    unsettled: AtomicUsize,
}

/// A thread by which an entry hangs.
type Handle<M> = Arc<Mutex<Option<Arc<Entry<M>>>>>;

/// What the shared cache holds. moka keeps a value for some time after it let go of it, in each thread that wrote; so the entry
/// hangs by a thread that is cut then.
struct Stored<M> {
    entry: Handle<M>,
    weight: u32,
    /// Its place on the roll.
    place: Place,
}

impl<M: Meta> Stored<M> {
    fn entry(&self) -> Option<Arc<Entry<M>>> {
        lock(&self.entry).clone()
    }

    fn let_go(&self, roll: &Roll<M>) {
        let entry = lock(&self.entry).take();
        if let Some(entry) = entry {
            entry.retire();
            roll.leave(self.place);
        }
    }
}

/// What becomes of entries that the shared cache lets go of.
struct PushedOut<M> {
    hot: Arc<Hot>,
    pins: Arc<Pins<M>>,
    roll: Arc<Roll<M>>,
}

impl<M: Meta> PushedOut<M> {
    fn take(&self, key: &CacheKey, stored: Stored<M>, cause: RemovalCause) {
        let hash = key.as_key().hash();
        if cause != RemovalCause::Size || !self.hot.has(hash) {
            return stored.let_go(&self.roll);
        }
        self.pins.keep(key, stored).iter().for_each(|stored| stored.let_go(&self.roll));
    }
}

/// Figures of the local tier; moka brings them up to date a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalReport {
    pub entries: u64,
    pub weight_bytes: u64,
    /// Entries of hot keys that are kept although the memory is needed; not among the others.
    pub pinned: usize,
}

impl<M> Clone for Stored<M> {
    fn clone(&self) -> Self {
        Self { entry: self.entry.clone(), ..*self }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: Meta> Local<M> {
    pub(crate) fn new(memory_bytes: usize, hot: Arc<Hot>, epochs: Arc<Epochs>) -> Self {
        let roll = Arc::new(Roll::new());
        let pins = Arc::new(Pins::new(memory_bytes / PINS_PART));
        let pushed_out = PushedOut { hot: hot.clone(), pins: pins.clone(), roll: roll.clone() };
        let shared = Cache::builder()
            .max_capacity((memory_bytes / 16 * SHARED_SIXTEENTHS) as u64)
            .weigher(|_, stored: &Stored<M>| stored.weight)
            .eviction_listener(move |key, stored, cause| pushed_out.take(&key, stored, cause))
            .build_with_hasher(Prehashed::default());
        let [views, unsettled] = [0; 2].map(AtomicUsize::new);
        Self { shared, pins, hot, epochs, memory_bytes, roll, views, unsettled }
    }

    pub(crate) fn get(&self, key: &KeyRef<'_>, moment: Moment<'_>) -> Option<Arc<NearCopy<M>>> {
        let entry = self.shared.get(key).and_then(|stored| stored.entry()).or_else(|| self.pinned(key))?;
        if !moment.counts(&entry) {
            self.let_go(&[key.to_owned()], moment);
            return None;
        }
        Some(NearCopy::new(key, entry))
    }

    fn pinned(&self, key: &KeyRef<'_>) -> Option<Arc<Entry<M>>> {
        if self.pins.is_empty() || !self.hot.has(key.hash()) { None } else { self.pins.get(key) }
    }

    /// What is held of the entry that has this name at its shard.
    pub(crate) fn named(&self, name: u64) -> Option<(CacheKey, Arc<Entry<M>>)> {
        self.roll.named(name)
    }

    /// Lets the shared cache count a use that a thread's table has answered.
    pub(crate) fn touch(&self, key: &KeyRef<'_>) {
        let _counted_by_looking = self.shared.get(key);
    }

    /// Stores the entry, unless its key was removed or everything purged since its fill began; it can be served either way.
    pub(crate) fn insert(&self, key: &KeyRef<'_>, entry: Entry<M>, now: Instant) -> Inserted<M> {
        let since = entry.since().unwrap_or_else(|| self.epochs.since());
        let mut entry = entry.begun(since);
        let remaining = entry.remaining(now);
        entry.expire_at(now + remaining.mul_f64(1.0 - JITTER * unit(key.hash())));
        let entry = Arc::new(entry);
        let is_purged = self.epochs.judge(entry.meta.tags(), since.generation()) == Judgement::Dead;
        let is_kept = || self.epochs.is_kept(key.hash(), since) && self.is_unchanged(entry.home(), since);
        let stored = is_kept() && !is_purged && !remaining.is_zero();
        if stored {
            let bytes = entry.weight as usize + key.as_bytes().len() + OVERHEAD;
            let owned = key.to_owned();
            let held = Arc::new(Mutex::new(Some(entry.clone())));
            let place = self.roll.enter(owned.clone(), &entry, held.clone());
            let weight = u32::try_from(bytes).unwrap_or(u32::MAX);
            self.shared.insert(owned, Stored { entry: held.clone(), weight, place });
            // One that was pushed out meanwhile is older, unless it is this one.
            self.pins.take_other(key, &held).iter().for_each(|older| older.let_go(&self.roll));
            // A removal that came in between did not find it.
            if !is_kept() {
                self.invalidate(key);
            }
            if self.unsettled.fetch_add(bytes, Ordering::Relaxed) > self.memory_bytes / UNSETTLED_PART {
                self.catch_up();
            }
            let moment = self.moment(now);
            self.let_go(&self.roll.sweep(SWEEP_ON_INSERT, OVER_ON_INSERT, moment), moment);
        }
        Inserted { copy: NearCopy::new(key, entry), stored }
    }

    /// Whether the shard did not tell of a change since then.
    fn is_unchanged(&self, home: Option<Home>, since: Since) -> bool {
        home.is_none_or(|home| self.epochs.is_unchanged(home.name, since))
    }

    pub(crate) fn remove(&self, key: &KeyRef<'_>) {
        self.epochs.removed(key.hash());
        self.invalidate(key);
    }

    fn invalidate(&self, key: &KeyRef<'_>) {
        self.shared.invalidate(key);
        if self.hot.has(key.hash()) || !self.pins.is_empty() {
            self.pins.end(key, self.epochs.since()).iter().for_each(|pinned| pinned.let_go(&self.roll));
        }
    }

    pub(crate) fn moment(&self, now: Instant) -> Moment<'_> {
        Moment::new(now, &self.epochs)
    }

    /// Does what moka puts off until it is used, and a piece of what is put off here: true while there is more of that.
    pub(crate) fn settle(&self, moment: Moment<'_>) -> bool {
        let (over, is_untidy) = self.roll.sweep_at_leisure(SWEEP, OVER, moment);
        self.let_go(&over, moment);
        let cold = self.pins.sweep(moment, |hash| self.hot.has(hash));
        cold.iter().for_each(|stored| stored.let_go(&self.roll));
        self.catch_up();
        is_untidy
    }

    fn catch_up(&self) {
        self.unsettled.store(0, Ordering::Relaxed);
        self.shared.run_pending_tasks();
    }

    /// Lets go of what a sweep has found.
    fn let_go(&self, over: &[CacheKey], moment: Moment<'_>) {
        for key in over {
            let key = key.as_key();
            // It may have been replaced by one that counts.
            let is_over = |stored: &Stored<M>| stored.entry().is_none_or(|entry| !moment.counts(&entry));
            if self.shared.get(&key).as_ref().is_some_and(is_over) {
                self.shared.invalidate(&key);
            }
            if self.pins.get(&key).is_some_and(|entry| !moment.counts(&entry)) {
                self.pins.take(&key).iter().for_each(|stored| stored.let_go(&self.roll));
            }
        }
    }

    pub(crate) fn report(&self) -> LocalReport {
        let (entries, weight_bytes) = (self.shared.entry_count(), self.shared.weighted_size());
        LocalReport { entries, weight_bytes, pinned: self.pins.len() }
    }
}

impl<M> Local<M> {
    pub(crate) fn joined(&self) {
        self.views.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn left(&self) {
        self.views.fetch_sub(1, Ordering::Relaxed);
    }

    /// What one thread's table may hold.
    pub(crate) fn near_bytes(&self) -> usize {
        self.memory_bytes / NEAR_PART / self.views.load(Ordering::Relaxed).max(1)
    }
}

/// What became of an insertion.
pub(crate) struct Inserted<M> {
    pub(crate) copy: Arc<NearCopy<M>>,
    pub(crate) stored: bool,
}

/// The hash as a number from 0 to 1: its seed is the process's, so that nodes cut differently.
fn unit(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::entry::{Purge, Scope, UNNUMBERED};
    use crate::key::KeyBuilder;
    use bytes::Bytes;
    use std::time::Duration;

    const KEEP: Duration = Duration::from_secs(100);

    fn key(n: u64) -> CacheKey {
        KeyBuilder::new().part(&n.to_le_bytes()).key().to_owned()
    }

    fn entry(body_bytes: usize) -> Entry<Note> {
        Entry::new(Note("n".into()), Bytes::from(vec![0; body_bytes]), KEEP, Instant::now())
    }

    fn local(memory_bytes: usize) -> (Local<Note>, Arc<Epochs>) {
        let epochs = Arc::new(Epochs::new(0));
        (Local::new(memory_bytes, Arc::new(Hot::new(1_000)), epochs.clone()), epochs)
    }

    fn found(local: &Local<Note>, key: &CacheKey, now: Instant) -> bool {
        local.get(&key.as_key(), local.moment(now)).is_some()
    }

    #[test]
    fn removing_replacing_and_evicting_retire() {
        let (local, _) = local(100_000);
        let (a, now) = (key(1), Instant::now());
        let first = local.insert(&a.as_key(), entry(10), now).copy;
        let second = local.insert(&a.as_key(), entry(10), now).copy;
        assert!(!first.entry().is_live() && second.entry().is_live());
        local.remove(&a.as_key());
        assert!(!second.entry().is_live() && !found(&local, &a, now));

        let copies: Vec<_> = (0..1_000).map(|n| local.insert(&key(n).as_key(), entry(1_000), now).copy).collect();
        local.settle(local.moment(Instant::now()));
        let live = copies.iter().filter(|copy| copy.entry().is_live()).count();
        assert!(live <= 70 && local.report().weight_bytes <= 100_000, "{live} live");
    }

    #[test]
    fn a_fill_overtaken_by_a_removal_or_a_purge_is_not_stored() {
        let (local, epochs) = local(1 << 20);
        let (a, now) = (key(1), Instant::now());
        let since = epochs.since();
        local.remove(&a.as_key());
        assert!(!local.insert(&a.as_key(), entry(1).begun(since), now).stored);
        let since = epochs.since();
        epochs.purge(Purge { scope: Scope::Everything, is_soft: false }, UNNUMBERED);
        assert!(!local.insert(&a.as_key(), entry(1).begun(since), now).stored);
        assert!(!found(&local, &a, now));
    }

    #[test]
    fn a_purge_hides_what_came_before_and_nothing_after() {
        let (local, epochs) = local(1 << 20);
        let (a, b, now) = (key(1), key(2), Instant::now());
        local.insert(&a.as_key(), entry(1), now);
        epochs.purge(Purge { scope: Scope::Everything, is_soft: false }, UNNUMBERED);
        local.insert(&b.as_key(), entry(1), now);
        assert!(!found(&local, &a, now) && found(&local, &b, now));
    }

    #[test]
    fn times_are_cut_by_up_to_a_twentieth_and_differently() {
        let (local, _) = local(1 << 20);
        let now = Instant::now();
        let mut cuts: Vec<_> = (0..100)
            .map(|n| KEEP - local.insert(&key(n).as_key(), entry(1), now).copy.entry().remaining(now))
            .collect();
        assert!(cuts.iter().all(|&cut| cut <= KEEP / 20 + Duration::from_millis(10)));
        cuts.sort_unstable();
        cuts.dedup();
        assert!(cuts.len() > 90);
    }

    #[test]
    fn an_entry_is_gone_when_its_time_is_over() {
        let (local, _) = local(1 << 20);
        let (a, now) = (key(1), Instant::now());
        local.insert(&a.as_key(), entry(1), now);
        assert!(found(&local, &a, now + KEEP.mul_f64(0.94)) && !found(&local, &a, now + KEEP));
    }

    #[test]
    fn tables_share_a_sixteenth_of_the_memory() {
        let (local, _) = local(1 << 20);
        (0..4).for_each(|_| local.joined());
        assert_eq!(local.near_bytes(), 1 << 14);
        local.left();
        assert!(local.near_bytes() > 1 << 14);
    }
}
