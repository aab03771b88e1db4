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

/// Seven cells and their lock fill two cache lines, and the search in them is short.
const WAYS: usize = 7;

/// A fixed number of cells, shared by threads, found by key.
#[derive(Debug)]
pub struct Table {
    sets: Box<[Set]>,
    keyed: RandomState,
}

/// Under one lock, held for one decision (tens of nanoseconds, no allocation, no call out).
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set(Mutex<Ways>);

#[derive(Debug, Default)]
#[repr(C)]
struct Ways {
    ways: [Way; WAYS],
    /// When the last ghost has paid: from then on nobody has to look at them, which are in other cache lines.
    haunted_until: u64,
    ghosts: Ghosts,
}

#[derive(Debug, Default)]
struct Way {
    fingerprint: u64,
    cell: Cell,
}

impl Table {
    /// Room for at least `keys` keys; allocated here, once.
    pub fn new(keys: NonZeroUsize) -> Table {
        Table::keyed_by(keys, RandomState::default())
    }

    fn keyed_by(keys: NonZeroUsize, keyed: RandomState) -> Table {
        let sets = keys.get().div_ceil(WAYS);
        Table { sets: std::iter::repeat_with(Set::default).take(sets).collect(), keyed }
    }

    /// A table of another size that goes on with what the keys of this one owe. What is charged to this one from now
    /// on, by decisions on their way, is not carried over; nor are ghosts, whose place in the new table is not known.
    pub(crate) fn resized(&self, keys: NonZeroUsize, now: Moment) -> Table {
        let resized = Table::keyed_by(keys, self.keyed.clone());
        for set in &self.sets {
            for way in set.lock().ways.iter().filter(|way| way.cell.tat() > now.nanos()) {
                resized.set_of(way.fingerprint).place(way.fingerprint, Cell::owing(way.cell.tat()), now);
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
        self.sets.len() * size_of::<Set>()
    }

    /// What [`Table::commit`] would answer; writes nothing. A key that is not held has all of its burst.
    pub fn peek(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (fingerprint, set) = self.locate(key);
        match set.way(fingerprint) {
            Some(way) => way.cell.peek(gcra, cost, now),
            None => set.returning(fingerprint, now).peek(gcra, cost, now),
        }
    }

    /// Charges `cost` to `key`, displacing what owes least if the set is full; or charges nothing and says how long to
    /// wait.
    pub fn commit(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (fingerprint, mut set) = self.locate(key);
        if let Some(way) = set.way(fingerprint) {
            return way.cell.commit(gcra, cost, now);
        }
        let cell = set.returning(fingerprint, now);
        let room = cell.commit(gcra, cost, now)?;
        set.place(fingerprint, cell, now);
        Ok(room)
    }

    /// Charges `cost` whatever is left, up to a whole burst, displacing what owes least if the set is full.
    pub fn charge(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) {
        let (fingerprint, mut set) = self.locate(key);
        if let Some(way) = set.way(fingerprint) {
            return way.cell.charge(gcra, cost, now);
        }
        let cell = set.returning(fingerprint, now);
        cell.charge(gcra, cost, now);
        set.place(fingerprint, cell, now);
    }

    /// Gives back a charge; a key that is not even a ghost any more has nothing to be given back.
    pub fn refund(&self, key: KeyHash, gcra: &Gcra, cost: Cost) {
        let (fingerprint, mut set) = self.locate(key);
        if let Some(way) = set.way(fingerprint) {
            return way.cell.refund(gcra, cost);
        }
        // Whether it has paid by now does not matter.
        if let Some((index, _)) = set.ghost(fingerprint, Moment::ORIGIN) {
            set.ghosts.forgive(index, gcra.price_nanos(cost));
        }
    }

    fn locate(&self, key: KeyHash) -> (u64, MutexGuard<'_, Ways>) {
        let fingerprint = self.keyed.hash_one(key.0);
        (fingerprint, self.set_of(fingerprint))
    }

    fn set_of(&self, fingerprint: u64) -> MutexGuard<'_, Ways> {
        // The high half of the product: an index below the number of sets, without a division.
        let index = (u128::from(fingerprint) * self.sets.len() as u128) >> 64;
        self.sets[index as usize].lock()
    }
}

impl Set {
    fn lock(&self) -> MutexGuard<'_, Ways> {
        // A panic under this lock would leave numbers, not broken structure.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ways {
    fn way(&self, fingerprint: u64) -> Option<&Way> {
        self.ways.iter().find(|way| way.fingerprint == fingerprint)
    }

    /// A cell for a key that has none: with what its ghost owes, else with all of its burst.
    fn returning(&self, fingerprint: u64, now: Moment) -> Cell {
        match self.ghost(fingerprint, now) {
            Some((_, tat)) => Cell::owing(tat),
            None => Cell::default(),
        }
    }

    /// Gives a key that has no cell the place of the one that owes least, which goes on as a ghost; or, if it owes no
    /// more than that itself, lets it be the ghost.
    fn place(&mut self, fingerprint: u64, cell: Cell, now: Moment) {
        if let Some((index, _)) = self.ghost(fingerprint, now) {
            self.ghosts.forget(index);
        }
        let mut leaving = Way { fingerprint, cell };
        if let Some(least) = self.ways.iter_mut().min_by_key(|way| way.cell.tat())
            && least.cell.tat() < leaving.cell.tat()
        {
            std::mem::swap(least, &mut leaving);
        }
        if leaving.cell.tat() > now.nanos() {
            let paid = self.ghosts.keep(tag(leaving.fingerprint), leaving.cell.tat(), now.nanos());
            self.haunted_until = self.haunted_until.max(paid);
        }
    }

    fn ghost(&self, fingerprint: u64, now: Moment) -> Option<(usize, u64)> {
        if self.haunted_until <= now.nanos() {
            return None;
        }
        self.ghosts.find(tag(fingerprint), now.nanos())
    }
}

/// The low bits; the high ones choose the set.
fn tag(fingerprint: u64) -> u16 {
    fingerprint as u16
}
