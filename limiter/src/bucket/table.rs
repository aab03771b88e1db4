//! The [`GcraTable`] of a keyed rule: sets of cells, found by key, and the sketches of evicted
//! keys.
//!
//! It neither grows nor calls out under a lock. Invariant: of the keys of one set, those with the
//! highest demand have a cell; those with the next highest, and the newest, are in the sketch.
//!
//! A key that has a cell is read without the lock, so that many threads may deny it at once. While
//! a cell changes its key, its fingerprint is [`EMPTY_KEY`]. A reader that finds the same
//! fingerprint before and after has read the state of that key, unless the key lost the cell to
//! another and regained it within those nanoseconds; then one decision is made with the other key's
//! backlog.

use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::quality::RandomState;

use super::evicted::{EvictedSketch, KeyBacklog, TimeBase};
use super::gcra::{BacklogScale, EARLIER_MAX_NANOS};
use super::{Gcra, GcraCell, Headroom, Throttled};
use crate::clock::MonotonicTime;
use crate::quota::{Cost, KeyHash};
use crate::sync::{AtomicU64, Ordering};

/// Associativity: seven cells, their lock and the metadata of a set fill two cache lines.
const WAYS: usize = 7;
/// Bits of a set's `denials` per cell.
const DENIAL_BITS: usize = 4;
/// A set stores until when its sketch matters in units of 2^30 nanoseconds, about a second.
const SKETCH_UNIT_BITS: u32 = 30;

/// A fixed number of cells, shared by threads, found by key.
#[derive(Debug)]
pub struct GcraTable {
    sets: Box<[CellSet]>,
    /// One per set. Stored apart, because they are unused without a flood of keys. Locked only by
    /// a thread that holds the set's lock.
    evicted: Box<[Mutex<EvictedSketch>]>,
    hasher: RandomState,
}

/// One set of the table: keys enter, leave and are charged under one lock, held for one decision
/// (tens of nanoseconds, no allocation, no call out).
#[derive(Debug, Default)]
#[repr(align(64))]
struct CellSet {
    metadata: Mutex<SetEvictions>,
    slots: [CellSlot; WAYS],
}

/// A set whose lock is held.
struct LockedSet<'a> {
    metadata: MutexGuard<'a, SetEvictions>,
    slots: &'a [CellSlot; WAYS],
}

/// State of one set of the table about evicted keys: until when its sketch has an effect, and for
/// each cell the denials that its key had while it was evicted.
#[derive(Debug, Default)]
struct SetEvictions {
    /// When the set's sketch has no effect any more, in 2^30 nanoseconds since the clock's origin.
    evicted_until: u32,
    /// How often the key of each cell was denied while it was evicted.
    denials: u32,
}

/// One way of a set: a GCRA cell and the fingerprint of its key, both readable without the set's
/// lock.
#[derive(Debug, Default)]
struct CellSlot {
    /// [`EMPTY_KEY`] while the cell changes its key.
    fingerprint: AtomicU64,
    cell: GcraCell,
}

/// No key has this fingerprint.
const EMPTY_KEY: u64 = 0;

/// The set that a key belongs to, and its fingerprint there.
#[derive(Clone, Copy)]
struct KeyLocation {
    fingerprint: u64,
    set_index: usize,
}

impl GcraTable {
    /// A table for at least `keys` keys. Allocates all its memory here.
    pub fn new(keys: NonZeroUsize) -> GcraTable {
        GcraTable::with_hasher(keys, RandomState::default())
    }

    fn with_hasher(keys: NonZeroUsize, hasher: RandomState) -> GcraTable {
        let sets = keys.get().div_ceil(WAYS);
        GcraTable {
            sets: std::iter::repeat_with(CellSet::default).take(sets).collect(),
            evicted: std::iter::repeat_with(Mutex::default).take(sets).collect(),
            hasher,
        }
    }

    /// A table of another size with the backlogs of this one. Not carried over: charges made to
    /// this table from now on by concurrent decisions, evicted keys (their location in the new
    /// table is not known), and denials, which count again from the next one.
    pub(crate) fn resized(&self, keys: NonZeroUsize, now: MonotonicTime) -> GcraTable {
        let resized = GcraTable::with_hasher(keys, self.hasher.clone());
        for set in &self.sets {
            for slot in set.lock().slots.iter().filter(|slot| slot.cell.tat() > now.nanos()) {
                let location = resized.location_of(slot.fingerprint());
                let backlog = KeyBacklog { tat_nanos: slot.cell.tat(), denials: 0 };
                let time = TimeBase { now_nanos: now.nanos(), token_nanos: 1 };
                resized.insert(&mut resized.sets[location.set_index].lock(), location, backlog, time);
            }
        }
        resized
    }

    /// Converts all backlogs for another quota: what was spent stays spent.
    pub(crate) fn rescale(&self, scale: BacklogScale, now: MonotonicTime) {
        for (set, evicted) in self.sets.iter().zip(&self.evicted) {
            let mut set = set.lock();
            set.slots.iter().for_each(|slot| slot.cell.rescale(scale, now));
            if set.has_evicted(TimeBase { now_nanos: now.nanos(), token_nanos: 1 }) {
                let latest = lock(evicted).rescale(scale, now);
                set.extend_evicted_until(latest);
            }
        }
    }

    /// The number of cells.
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// Whether a table for `keys` keys would have this size.
    pub(crate) fn is_sized_for(&self, keys: NonZeroUsize) -> bool {
        keys.get().div_ceil(WAYS) == self.sets.len()
    }

    /// Memory used, which never changes.
    pub fn bytes(&self) -> usize {
        self.sets.len() * (size_of::<CellSet>() + size_of::<Mutex<EvictedSketch>>())
    }

    /// The result that [`GcraTable::commit`] would return. Charges nothing, but counts a denial as
    /// a commit does. An unknown key has its whole burst.
    #[expect(clippy::too_many_arguments, reason = "hot path: five words in registers, which a struct would spill")]
    pub fn peek(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: MonotonicTime) -> Result<Headroom, Throttled> {
        let (location, set) = self.locate(key);
        if let Some(slot) = set.find(location) {
            let result = slot.cell.peek(gcra, cost, now);
            if slot.still_holds(location) {
                return result;
            }
        }
        let set = set.lock();
        match set.cell(location) {
            Some(cell) => cell.peek(gcra, cost, now),
            None => {
                let (cell, _) = self.evicted_cell(&set, location, (gcra, now));
                cell.peek(gcra, cost, now).inspect_err(|_| self.record_denial(location))
            }
        }
    }

    /// Charges `cost` to `key`, or charges nothing and returns how long to wait. In a full set, the
    /// key with the lowest demand is evicted.
    #[expect(clippy::too_many_arguments, reason = "hot path: five words in registers, which a struct would spill")]
    pub fn commit(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: MonotonicTime) -> Result<Headroom, Throttled> {
        let (location, set) = self.locate(key);
        if let Some(slot) = set.find(location).filter(|slot| !slot.cell.is_likely_to_allow(gcra, cost, now)) {
            let result = slot.cell.peek(gcra, cost, now);
            if result.is_err() && slot.still_holds(location) {
                return result;
            }
        }
        let mut set = set.lock();
        if let Some(cell) = set.cell(location) {
            return cell.commit(gcra, cost, now);
        }
        let (cell, denials) = self.evicted_cell(&set, location, (gcra, now));
        let headroom = cell.commit(gcra, cost, now).inspect_err(|_| self.record_denial(location))?;
        let backlog = KeyBacklog { tat_nanos: cell.tat(), denials };
        self.insert(&mut set, location, backlog, time_base(gcra, now));
        Ok(headroom)
    }

    /// Charges `cost` whatever is left, up to a whole burst. In a full set, the key with the lowest
    /// demand is evicted.
    #[expect(clippy::too_many_arguments, reason = "the parameters of `peek` and `commit`")]
    pub fn charge(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: MonotonicTime) {
        let (location, set) = self.locate(key);
        let mut set = set.lock();
        if let Some(cell) = set.cell(location) {
            return cell.charge(gcra, cost, now);
        }
        let (cell, denials) = self.evicted_cell(&set, location, (gcra, now));
        cell.charge(gcra, cost, now);
        let backlog = KeyBacklog { tat_nanos: cell.tat(), denials };
        self.insert(&mut set, location, backlog, time_base(gcra, now));
    }

    /// Refunds a charge. Has no effect on a key that is in neither cells nor sketch any more.
    pub fn refund(&self, key: KeyHash, gcra: &Gcra, cost: Cost) {
        let (location, set) = self.locate(key);
        let set = set.lock();
        match set.cell(location) {
            Some(cell) => cell.refund(gcra, cost),
            None => lock(&self.evicted[location.set_index]).refund(location.tag(), gcra.cost_nanos(cost)),
        }
    }

    fn locate(&self, key: KeyHash) -> (KeyLocation, &CellSet) {
        let location = self.location_of(self.hasher.hash_one(key.0).max(EMPTY_KEY + 1));
        (location, &self.sets[location.set_index])
    }

    fn location_of(&self, fingerprint: u64) -> KeyLocation {
        // The high half of the product: an index below the number of sets, without a division.
        let set_index = (u128::from(fingerprint) * self.sets.len() as u128) >> 64;
        KeyLocation { fingerprint, set_index: set_index as usize }
    }

    /// A cell for a key that has none, and its denials: with the backlog that the sketch holds,
    /// else with the whole burst. The backlog of another quota is shortened there too.
    #[cold]
    fn evicted_cell(
        &self,
        set: &LockedSet<'_>,
        location: KeyLocation,
        (gcra, now): (&Gcra, MonotonicTime),
    ) -> (GcraCell, u8) {
        let (time, longest) = (time_base(gcra, now), gcra.latest_tat(now));
        if !set.has_evicted(time) {
            return (GcraCell::default(), 0);
        }
        let mut evicted = lock(&self.evicted[location.set_index]);
        let found = evicted.find(location.tag(), time).unwrap_or_default();
        let is_shortened = found.tat_nanos > longest.saturating_add(EARLIER_MAX_NANOS);
        let backlog = if is_shortened { KeyBacklog { tat_nanos: longest, ..found } } else { found };
        if is_shortened {
            evicted.insert_newest(location.tag(), backlog, time);
        }
        (GcraCell::with_tat(backlog.tat_nanos), backlog.denials)
    }

    /// Counts a denial of an evicted key. Denials of a key that has a cell are not counted;
    /// counting starts when the key is evicted.
    #[cold]
    fn record_denial(&self, location: KeyLocation) {
        lock(&self.evicted[location.set_index]).record_denial(location.tag());
    }

    /// Inserts a key that has no cell. The cell of the key with the lowest demand is reused and
    /// that key moves to the sketch; if the new key's demand is not higher, the new key goes to the
    /// sketch.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "cold; each caller holds the set's lock and has the other values")]
    fn insert(&self, set: &mut LockedSet<'_>, location: KeyLocation, backlog: KeyBacklog, time: TimeBase) {
        let (index, lowest) = set.lowest_demand(time);
        let has_demand = lowest.demand_nanos(time) > time.now_nanos;
        if !has_demand && !set.has_evicted(time) {
            return set.replace(index, location, backlog);
        }
        let mut evicted = lock(&self.evicted[location.set_index]);
        evicted.remove(location.tag());
        if lowest.demand_nanos(time) >= backlog.demand_nanos(time) {
            evicted.insert_newest(location.tag(), backlog, time);
            set.extend_evicted_until(backlog.demand_nanos(time));
        } else {
            let tag = tag(set.slots[index].fingerprint());
            set.replace(index, location, backlog);
            if has_demand {
                evicted.insert(tag, lowest, time);
                set.extend_evicted_until(lowest.demand_nanos(time));
            }
        }
    }
}

impl CellSet {
    fn lock(&self) -> LockedSet<'_> {
        LockedSet { metadata: lock(&self.metadata), slots: &self.slots }
    }

    /// The slot of a key, if it has one. Values read from it without the lock are valid if the slot
    /// [still holds](CellSlot::still_holds) the key afterwards.
    fn find(&self, location: KeyLocation) -> Option<&CellSlot> {
        self.slots.iter().find(|slot| slot.fingerprint.load(Ordering::Acquire) == location.fingerprint)
    }
}

impl CellSlot {
    fn still_holds(&self, location: KeyLocation) -> bool {
        // Relaxed suffices: the read of the cell before this one acquires.
        self.fingerprint.load(Ordering::Relaxed) == location.fingerprint
    }

    /// The fingerprint, while the set is locked.
    fn fingerprint(&self) -> u64 {
        self.fingerprint.load(Ordering::Relaxed)
    }
}

impl LockedSet<'_> {
    fn cell(&self, location: KeyLocation) -> Option<&GcraCell> {
        self.slots.iter().find(|slot| slot.fingerprint() == location.fingerprint).map(|slot| &slot.cell)
    }

    /// The cell whose key has the lowest demand.
    fn lowest_demand(&self, time: TimeBase) -> (usize, KeyBacklog) {
        // Without denials, as in nearly every set, demand equals the arrival time.
        let index = if self.metadata.denials == 0 {
            self.lowest_by(|index| self.slots[index].cell.tat())
        } else {
            self.lowest_by(|index| self.backlog(index).demand_nanos(time))
        };
        (index, self.backlog(index))
    }

    fn lowest_by(&self, demand_nanos: impl Fn(usize) -> u64) -> usize {
        let (mut lowest, mut lowest_nanos) = (0, demand_nanos(0));
        for index in 1..WAYS {
            let nanos = demand_nanos(index);
            if nanos < lowest_nanos {
                (lowest, lowest_nanos) = (index, nanos);
            }
        }
        lowest
    }

    fn backlog(&self, index: usize) -> KeyBacklog {
        let denials = (self.metadata.denials >> (DENIAL_BITS * index)) as u8 & KeyBacklog::DENIALS_MAX;
        KeyBacklog { tat_nanos: self.slots[index].cell.tat(), denials }
    }

    fn replace(&mut self, index: usize, location: KeyLocation, backlog: KeyBacklog) {
        let slot = &self.slots[index];
        slot.fingerprint.store(EMPTY_KEY, Ordering::Relaxed);
        slot.cell.set_tat(backlog.tat_nanos);
        slot.fingerprint.store(location.fingerprint, Ordering::Release);
        let shift = DENIAL_BITS * index;
        self.metadata.denials &= !(u32::from(KeyBacklog::DENIALS_MAX) << shift);
        self.metadata.denials |= u32::from(backlog.denials) << shift;
    }

    /// Whether the sketch may hold a key with a backlog or recent denials.
    fn has_evicted(&self, time: TimeBase) -> bool {
        u64::from(self.metadata.evicted_until) > time.now_nanos >> SKETCH_UNIT_BITS
    }

    fn extend_evicted_until(&mut self, until_nanos: u64) {
        // Rounded up, because the sketch rounds up too; the range ends after 146 years.
        let until = u32::try_from((until_nanos >> SKETCH_UNIT_BITS) + 2).unwrap_or(u32::MAX);
        self.metadata.evicted_until = self.metadata.evicted_until.max(until);
    }
}

impl KeyLocation {
    fn tag(self) -> u16 {
        tag(self.fingerprint)
    }
}

fn time_base(gcra: &Gcra, now: MonotonicTime) -> TimeBase {
    TimeBase { now_nanos: now.nanos(), token_nanos: gcra.cost_nanos(Cost::ONE) }
}

/// A panic under these locks leaves changed numbers, not a broken structure.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The low bits; the high bits choose the set.
fn tag(fingerprint: u64) -> u16 {
    fingerprint as u16
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn readers_never_see_another_keys_backlog_while_a_cell_changes_its_key() {
        const KEYS: u64 = 200_000;
        let (set, newest) = (CellSet::default(), AtomicU64::new(EMPTY_KEY));
        let location = |key| KeyLocation { fingerprint: key, set_index: 0 };
        thread::scope(|scope| {
            scope.spawn(|| {
                for key in 1..=KEYS {
                    newest.store(key, Ordering::Relaxed);
                    set.lock().replace(0, location(key), KeyBacklog { tat_nanos: key, denials: 0 });
                }
            });
            let mut key = EMPTY_KEY;
            while key < KEYS {
                key = newest.load(Ordering::Relaxed);
                if let Some(slot) = set.find(location(key)).filter(|_| key != EMPTY_KEY) {
                    let tat = slot.cell.tat();
                    assert!(tat == key || !slot.still_holds(location(key)), "{tat:?} of {key}");
                }
            }
        });
        assert_eq!(set.find(location(KEYS)).map(|slot| slot.cell.tat()), Some(KEYS));
    }
}
