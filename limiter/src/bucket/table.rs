//! Owns the [`Table`] of a keyed rule.

use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::quality::RandomState;

use super::{Cell, Gcra, Room, Wait};
use crate::clock::Moment;
use crate::quota::{Cost, KeyHash};

/// Seven cells and their lock fill two cache lines.
const WAYS: usize = 7;

#[derive(Debug, Default)]
struct Way {
    fingerprint: u64,
    cell: Cell,
}

/// A few cells under one lock, held for one decision (tens of nanoseconds, no allocation, no call out).
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set(Mutex<[Way; WAYS]>);

/// A fixed number of cells, shared by threads, found by key.
#[derive(Debug)]
pub struct Table {
    sets: Box<[Set]>,
    keyed: RandomState,
}

impl Table {
    /// Room for at least `keys` keys; allocated here, once.
    pub fn new(keys: NonZeroUsize) -> Table {
        let sets = keys.get().div_ceil(WAYS);
        Table { sets: std::iter::repeat_with(Set::default).take(sets).collect(), keyed: RandomState::default() }
    }

    /// How many keys it holds at most.
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

    /// What [`Table::commit`] would answer; writes nothing, a key that is not held has all of its burst.
    pub fn peek(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (fingerprint, set) = self.locate(key);
        match set.iter().find(|way| way.fingerprint == fingerprint) {
            Some(way) => way.cell.peek(gcra, cost, now),
            None => Cell::default().peek(gcra, cost, now),
        }
    }

    /// Charges `cost` to `key`, displacing another key if the set is full; or charges nothing and says how long
    /// to wait.
    pub fn commit(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        let (fingerprint, mut set) = self.locate(key);
        if let Some(way) = set.iter().find(|way| way.fingerprint == fingerprint) {
            return way.cell.commit(gcra, cost, now);
        }
        let fresh = Cell::default();
        let room = fresh.commit(gcra, cost, now)?;
        if let Some(displaced) = set.iter_mut().min_by_key(|way| way.cell.tat()) {
            *displaced = Way { fingerprint, cell: fresh };
        }
        Ok(room)
    }

    /// Charges `cost` whatever is left, up to a whole burst, displacing another key if the set is full.
    pub fn charge(&self, key: KeyHash, gcra: &Gcra, cost: Cost, now: Moment) {
        let (fingerprint, mut set) = self.locate(key);
        if let Some(way) = set.iter().find(|way| way.fingerprint == fingerprint) {
            return way.cell.charge(gcra, cost, now);
        }
        let fresh = Cell::default();
        fresh.charge(gcra, cost, now);
        if let Some(displaced) = set.iter_mut().min_by_key(|way| way.cell.tat()) {
            *displaced = Way { fingerprint, cell: fresh };
        }
    }

    /// Gives back a charge; a key displaced since has nothing to be given back.
    pub fn refund(&self, key: KeyHash, gcra: &Gcra, cost: Cost) {
        let (fingerprint, set) = self.locate(key);
        if let Some(way) = set.iter().find(|way| way.fingerprint == fingerprint) {
            way.cell.refund(gcra, cost);
        }
    }

    fn locate(&self, key: KeyHash) -> (u64, MutexGuard<'_, [Way; WAYS]>) {
        let fingerprint = self.keyed.hash_one(key.0);
        // The high half of the product: an index below the number of sets, without a division.
        let index = (u128::from(fingerprint) * self.sets.len() as u128) >> 64;
        // A panic under this lock would leave numbers, not broken structure.
        (fingerprint, self.sets[index as usize].0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
