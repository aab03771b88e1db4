//! Owns the [`Table`] of a keyed rule: sets of cells and ghosts, found by key.
//!
//! Refuses to grow and to call out under a lock. Invariant: of the keys of one set, those that owe most have a cell,
//! and those that owe next to most are remembered as ghosts.

use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::quality::RandomState;

use super::ghosts::Ghosts;
use super::{Cell, Gcra, Room, Wait};
use crate::clock::Moment;
use crate::quota::{Cost, KeyHash};

/// Seven cells, their lock and what is known of their ghosts fill two cache lines.
const WAYS: usize = 7;

/// A fixed number of cells, shared by threads, found by key.
#[derive(Debug)]
pub struct Table {
    sets: Box<[Set]>,
    /// Of each set; apart, because without a flood nobody looks at them. Locked only by who holds the set's lock.
    ghosts: Box<[Mutex<Ghosts>]>,
    keyed: RandomState,
}

/// Under one lock, held for one decision (tens of nanoseconds, no allocation, no call out).
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set(Mutex<Ways>);

#[derive(Debug, Default)]
struct Ways {
    ways: [Way; WAYS],
    /// When the last ghost has paid, in nanoseconds since the origin.
    haunted_until: u64,
}

#[derive(Debug, Default)]
struct Way {
    fingerprint: u64,
    cell: Cell,
}

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
    /// on, by decisions on their way, is not carried over; nor are ghosts, whose place in the new table is not known.
    pub(crate) fn resized(&self, keys: NonZeroUsize, now: Moment) -> Table {
        let resized = Table::keyed_by(keys, self.keyed.clone());
        for set in &self.sets {
            for way in lock(&set.0).ways.iter().filter(|way| way.cell.tat() > now.nanos()) {
                let place = resized.place(way.fingerprint);
                resized.put(&mut lock(&resized.sets[place.index].0), place, Cell::owing(way.cell.tat()), now);
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

    /// What [`Table::commit`] would answer; writes nothing. A key that is not held has all of its burst.
    pub fn peek(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (place, set) = self.locate(key);
        match set.cell(place) {
            Some(cell) => cell.peek(gcra, cost, now),
            None => self.returning(&set, place, now).peek(gcra, cost, now),
        }
    }

    /// Charges `cost` to `key`, displacing what owes least if the set is full; or charges nothing and says how long to
    /// wait.
    pub fn commit(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (place, mut set) = self.locate(key);
        if let Some(cell) = set.cell(place) {
            return cell.commit(gcra, cost, now);
        }
        let cell = self.returning(&set, place, now);
        let room = cell.commit(gcra, cost, now)?;
        self.put(&mut set, place, cell, now);
        Ok(room)
    }

    /// Charges `cost` whatever is left, up to a whole burst, displacing what owes least if the set is full.
    pub fn charge(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) {
        let (place, mut set) = self.locate(key);
        if let Some(cell) = set.cell(place) {
            return cell.charge(gcra, cost, now);
        }
        let cell = self.returning(&set, place, now);
        cell.charge(gcra, cost, now);
        self.put(&mut set, place, cell, now);
    }

    /// Gives back a charge; a key that is not even a ghost any more has nothing to be given back.
    pub fn refund(&self, key: KeyHash, gcra: &Gcra, cost: Cost) {
        let (place, set) = self.locate(key);
        match set.cell(place) {
            Some(cell) => cell.refund(gcra, cost),
            None => lock(&self.ghosts[place.index]).forgive(place.tag(), gcra.price_nanos(cost)),
        }
    }

    fn locate(&self, key: KeyHash) -> (Place, MutexGuard<'_, Ways>) {
        let place = self.place(self.keyed.hash_one(key.0));
        (place, lock(&self.sets[place.index].0))
    }

    fn place(&self, fingerprint: u64) -> Place {
        // The high half of the product: an index below the number of sets, without a division.
        let index = (u128::from(fingerprint) * self.sets.len() as u128) >> 64;
        Place { fingerprint, index: index as usize }
    }

    /// A cell for a key that has none: with what its ghost owes, else with all of its burst.
    #[cold]
    fn returning(&self, set: &Ways, place: Place, now: Moment) -> Cell {
        if set.haunted_until <= now.nanos() {
            return Cell::default();
        }
        lock(&self.ghosts[place.index]).find(place.tag(), now.nanos()).map_or_else(Cell::default, Cell::owing)
    }

    /// Gives a key that has no cell the place of the one that owes least, which goes on as a ghost; or, if it owes no
    /// more than that itself, lets it be the ghost.
    #[cold]
    fn put(&self, set: &mut Ways, place: Place, cell: Cell, now: Moment) {
        let mut leaving = Way { fingerprint: place.fingerprint, cell };
        if let Some(least) = set.ways.iter_mut().min_by_key(|way| way.cell.tat())
            && least.cell.tat() < leaving.cell.tat()
        {
            std::mem::swap(least, &mut leaving);
        }
        let owed_until = leaving.cell.tat();
        if owed_until.max(set.haunted_until) <= now.nanos() {
            return;
        }
        let mut ghosts = lock(&self.ghosts[place.index]);
        ghosts.forget(place.tag());
        if owed_until > now.nanos() {
            let paid = ghosts.keep(tag(leaving.fingerprint), owed_until, now.nanos());
            set.haunted_until = set.haunted_until.max(paid);
        }
    }
}

impl Ways {
    fn cell(&self, place: Place) -> Option<&Cell> {
        self.ways.iter().find(|way| way.fingerprint == place.fingerprint).map(|way| &way.cell)
    }
}

impl Place {
    fn tag(self) -> u16 {
        tag(self.fingerprint)
    }
}

/// A panic under these locks would leave numbers, not broken structure.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The low bits; the high ones choose the set.
fn tag(fingerprint: u64) -> u16 {
    fingerprint as u16
}
