//! Owns the [`Table`] of a keyed rule: sets of cells and ghosts, found by key.
//!
//! Refuses to grow and to call out under a lock. Invariant: of the keys of one set, those that asked for most have a
//! cell, and those that asked for next to most are remembered as ghosts, and with them the newest.
//!
//! A key that has a cell is looked at without the lock, so that many threads may deny it at once. A cell that gets another key in the
//! meantime has none while it changes: who finds the same key before and after has seen what was that key's, unless it lost its cell to
//! another and won it back within those nanoseconds; then one decision is made by what the other owes.

use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::quality::RandomState;

use super::ghosts::{Debt, Ghosts, Pace};
use super::{Cell, Gcra, Room, Wait};
use crate::clock::Moment;
use crate::quota::{Cost, KeyHash};
use crate::sync::{AtomicU64, Ordering};

/// Seven cells, their lock and what is known of their ghosts fill two cache lines.
const WAYS: usize = 7;
/// Of a set's `denials`, for each cell.
const DENIAL_BITS: usize = 4;
/// A set knows to 2^30 nanoseconds, about a second, until when its ghosts matter.
const HAUNTED_BITS: u32 = 30;

/// A fixed number of cells, shared by threads, found by key.
#[derive(Debug)]
pub struct Table {
    sets: Box<[Set]>,
    /// Of each set; apart, because without a flood nobody looks at them. Locked only by who holds the set's lock.
    ghosts: Box<[Mutex<Ghosts>]>,
    keyed: RandomState,
}

/// Keys come and go, and are charged, under one lock, held for one decision (tens of nanoseconds, no allocation, no call out).
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    marks: Mutex<Marks>,
    ways: [Way; WAYS],
}

/// A set that is locked.
struct Held<'a> {
    marks: MutexGuard<'a, Marks>,
    ways: &'a [Way; WAYS],
}

#[derive(Debug, Default)]
struct Marks {
    /// When nobody looks for a ghost any more, in 2^30 nanoseconds since the origin.
    haunted_until: u32,
    /// How often the key of each cell was denied when it was a ghost.
    denials: u32,
}

#[derive(Debug, Default)]
struct Way {
    /// [`NOBODY`] while the cell changes its key.
    fingerprint: AtomicU64,
    cell: Cell,
}

/// No key has this fingerprint.
const NOBODY: u64 = 0;

/// Where a key belongs.
#[derive(Clone, Copy)]
struct Place {
    fingerprint: u64,
    /// Of its set.
    index: usize,
}

impl Table {
    /// Room for at least `keys` keys; allocated here, once.
    pub fn new(keys: NonZeroUsize) -> Table {
        Table::keyed_by(keys, RandomState::default())
    }

    fn keyed_by(keys: NonZeroUsize, keyed: RandomState) -> Table {
        let sets = keys.get().div_ceil(WAYS);
        Table {
            sets: std::iter::repeat_with(Set::default).take(sets).collect(),
            ghosts: std::iter::repeat_with(Mutex::default).take(sets).collect(),
            keyed,
        }
    }

    /// A table of another size that goes on with what the keys of this one owe. What is charged to this one from now
    /// on, by decisions on their way, is not carried over; nor are ghosts, whose place in the new table is not known, and
    /// denials, which count again from the next on.
    pub(crate) fn resized(&self, keys: NonZeroUsize, now: Moment) -> Table {
        let resized = Table::keyed_by(keys, self.keyed.clone());
        for set in &self.sets {
            for way in set.hold().ways.iter().filter(|way| way.cell.tat() > now.nanos()) {
                let place = resized.place(way.fingerprint());
                let debt = Debt { tat_nanos: way.cell.tat(), denials: 0 };
                let pace = Pace { now_nanos: now.nanos(), token_nanos: 1 };
                resized.put(&mut resized.sets[place.index].hold(), place, debt, pace);
            }
        }
        resized
    }

    /// How many keys have a cell at most.
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// Whether a table for `keys` keys would be of this size.
    pub(crate) fn fits(&self, keys: NonZeroUsize) -> bool {
        keys.get().div_ceil(WAYS) == self.sets.len()
    }

    /// Memory held, which never changes.
    pub fn bytes(&self) -> usize {
        self.sets.len() * (size_of::<Set>() + size_of::<Mutex<Ghosts>>())
    }

    /// What [`Table::commit`] would answer; charges nothing, but remembers a denial as that does. A key that is not held
    /// has all of its burst.
    pub fn peek(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (place, set) = self.locate(key);
        if let Some(way) = set.way(place) {
            let said = way.cell.peek(gcra, cost, now);
            if way.is_still(place) {
                return said;
            }
        }
        let set = set.hold();
        match set.cell(place) {
            Some(cell) => cell.peek(gcra, cost, now),
            None => {
                let (cell, _) = self.returning(&set, place, pace(gcra, now));
                cell.peek(gcra, cost, now).inspect_err(|_| self.deny(place))
            }
        }
    }

    /// Charges `cost` to `key`, displacing who asked for least if the set is full; or charges nothing and says how long
    /// to wait.
    pub fn commit(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (place, set) = self.locate(key);
        if let Some(way) = set.way(place).filter(|way| !way.cell.may_pass(gcra, cost, now)) {
            let said = way.cell.peek(gcra, cost, now);
            if said.is_err() && way.is_still(place) {
                return said;
            }
        }
        let mut set = set.hold();
        if let Some(cell) = set.cell(place) {
            return cell.commit(gcra, cost, now);
        }
        let (cell, denials) = self.returning(&set, place, pace(gcra, now));
        let room = cell.commit(gcra, cost, now).inspect_err(|_| self.deny(place))?;
        self.put(&mut set, place, Debt { tat_nanos: cell.tat(), denials }, pace(gcra, now));
        Ok(room)
    }

    /// Charges `cost` whatever is left, up to a whole burst, displacing who asked for least if the set is full.
    pub fn charge(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) {
        let (place, set) = self.locate(key);
        let mut set = set.hold();
        if let Some(cell) = set.cell(place) {
            return cell.charge(gcra, cost, now);
        }
        let (cell, denials) = self.returning(&set, place, pace(gcra, now));
        cell.charge(gcra, cost, now);
        self.put(&mut set, place, Debt { tat_nanos: cell.tat(), denials }, pace(gcra, now));
    }

    /// Gives back a charge; a key that is not even a ghost any more has nothing to be given back.
    pub fn refund(&self, key: KeyHash, gcra: &Gcra, cost: Cost) {
        let (place, set) = self.locate(key);
        let set = set.hold();
        match set.cell(place) {
            Some(cell) => cell.refund(gcra, cost),
            None => lock(&self.ghosts[place.index]).forgive(place.tag(), gcra.price_nanos(cost)),
        }
    }

    fn locate(&self, key: KeyHash) -> (Place, &Set) {
        let place = self.place(self.keyed.hash_one(key.0).max(NOBODY + 1));
        (place, &self.sets[place.index])
    }

    fn place(&self, fingerprint: u64) -> Place {
        // The high half of the product: an index below the number of sets, without a division.
        let index = (u128::from(fingerprint) * self.sets.len() as u128) >> 64;
        Place { fingerprint, index: index as usize }
    }

    /// A cell for a key that has none, and its denials: with what its ghost owes, else with all of its burst.
    #[cold]
    fn returning(&self, set: &Held<'_>, place: Place, pace: Pace) -> (Cell, u8) {
        let ghost = if set.is_haunted(pace) { lock(&self.ghosts[place.index]).find(place.tag(), pace) } else { None };
        let debt = ghost.unwrap_or_default();
        (Cell::owing(debt.tat_nanos), debt.denials)
    }

    /// Only ghosts are counted: a key that has a cell is denied as fast as it is allowed, and leaves it to be a ghost.
    #[cold]
    fn deny(&self, place: Place) {
        lock(&self.ghosts[place.index]).deny(place.tag());
    }

    /// Gives a key that has no cell the place of the one that asked for least, which goes on as a ghost; or, if it asked
    /// for no more than that itself, lets it be the ghost.
    #[cold]
    fn put(&self, set: &mut Held<'_>, place: Place, debt: Debt, pace: Pace) {
        let (least, held) = set.least(pace);
        let matters = held.asked_nanos(pace) > pace.now_nanos;
        if !matters && !set.is_haunted(pace) {
            return set.replace(least, place, debt);
        }
        let mut ghosts = lock(&self.ghosts[place.index]);
        ghosts.forget(place.tag());
        if held.asked_nanos(pace) >= debt.asked_nanos(pace) {
            ghosts.keep_newest(place.tag(), debt, pace);
            set.haunt(debt.asked_nanos(pace));
        } else {
            let tag = tag(set.ways[least].fingerprint());
            set.replace(least, place, debt);
            if matters {
                ghosts.keep(tag, held, pace);
                set.haunt(held.asked_nanos(pace));
            }
        }
    }
}

impl Set {
    fn hold(&self) -> Held<'_> {
        Held { marks: lock(&self.marks), ways: &self.ways }
    }

    /// Where a key has its cell, if it has one. What is read there without the lock holds if the place `is_still` the key's afterwards.
    fn way(&self, place: Place) -> Option<&Way> {
        self.ways.iter().find(|way| way.fingerprint.load(Ordering::Acquire) == place.fingerprint)
    }
}

impl Way {
    fn is_still(&self, place: Place) -> bool {
        // The cell was read before, for that acquires.
        self.fingerprint.load(Ordering::Relaxed) == place.fingerprint
    }

    /// Of one whose set is held.
    fn fingerprint(&self) -> u64 {
        self.fingerprint.load(Ordering::Relaxed)
    }
}

impl Held<'_> {
    fn cell(&self, place: Place) -> Option<&Cell> {
        self.ways.iter().find(|way| way.fingerprint() == place.fingerprint).map(|way| &way.cell)
    }

    /// The cell whose key asked for least.
    fn least(&self, pace: Pace) -> (usize, Debt) {
        // Without denials, as in nearly every set, what was asked for is what is owed.
        let index = if self.marks.denials == 0 {
            self.least_by(|index| self.ways[index].cell.tat())
        } else {
            self.least_by(|index| self.debt(index).asked_nanos(pace))
        };
        (index, self.debt(index))
    }

    fn least_by(&self, asked_nanos: impl Fn(usize) -> u64) -> usize {
        let (mut least, mut least_nanos) = (0, asked_nanos(0));
        for index in 1..WAYS {
            let nanos = asked_nanos(index);
            if nanos < least_nanos {
                (least, least_nanos) = (index, nanos);
            }
        }
        least
    }

    fn debt(&self, index: usize) -> Debt {
        let denials = (self.marks.denials >> (DENIAL_BITS * index)) as u8 & Debt::DENIALS_MAX;
        Debt { tat_nanos: self.ways[index].cell.tat(), denials }
    }

    fn replace(&mut self, index: usize, place: Place, debt: Debt) {
        let way = &self.ways[index];
        way.fingerprint.store(NOBODY, Ordering::Relaxed);
        way.cell.become_owing(debt.tat_nanos);
        way.fingerprint.store(place.fingerprint, Ordering::Release);
        let shift = DENIAL_BITS * index;
        self.marks.denials &= !(u32::from(Debt::DENIALS_MAX) << shift);
        self.marks.denials |= u32::from(debt.denials) << shift;
    }

    fn is_haunted(&self, pace: Pace) -> bool {
        u64::from(self.marks.haunted_until) > pace.now_nanos >> HAUNTED_BITS
    }

    fn haunt(&mut self, until_nanos: u64) {
        // Up, for the ghost rounds up, too; the end of the range is 146 years away.
        let until = u32::try_from((until_nanos >> HAUNTED_BITS) + 2).unwrap_or(u32::MAX);
        self.marks.haunted_until = self.marks.haunted_until.max(until);
    }
}

impl Place {
    fn tag(self) -> u16 {
        tag(self.fingerprint)
    }
}

fn pace(gcra: &Gcra, now: Moment) -> Pace {
    Pace { now_nanos: now.nanos(), token_nanos: gcra.price_nanos(Cost::ONE) }
}

/// A panic under these locks would leave numbers, not broken structure.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The low bits; the high ones choose the set.
fn tag(fingerprint: u64) -> u16 {
    fingerprint as u16
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn nobody_sees_what_another_owes_in_a_cell_that_changes_its_key() {
        const KEYS: u64 = 200_000;
        let (set, newest) = (Set::default(), AtomicU64::new(NOBODY));
        let place = |key| Place { fingerprint: key, index: 0 };
        thread::scope(|scope| {
            scope.spawn(|| {
                for key in 1..=KEYS {
                    newest.store(key, Ordering::Relaxed);
                    set.hold().replace(0, place(key), Debt { tat_nanos: key, denials: 0 });
                }
            });
            let mut key = NOBODY;
            while key < KEYS {
                key = newest.load(Ordering::Relaxed);
                if let Some(way) = set.way(place(key)).filter(|_| key != NOBODY) {
                    let owed = way.cell.tat();
                    assert!(owed == key || !way.is_still(place(key)), "{owed:?} of {key}");
                }
            }
        });
        assert_eq!(set.way(place(KEYS)).map(|way| way.cell.tat()), Some(KEYS));
    }
}
