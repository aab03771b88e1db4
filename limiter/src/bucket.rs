//! Owns the state of local limits: one [`Cell`] per subject, and the [`Table`] that holds a fixed number of them.
//!
//! Refuses to grow: the number of sets is decided at construction, and a new key displaces the cell of its set
//! that is closest to full replenishment (one already replenished loses nothing). Invariant: within one set of a
//! table, and in a lone cell, a charge is atomic: what two threads are granted together never exceeds the quota.
//! The decision is governor's GCRA; this file keeps its one number, the theoretical arrival time (TAT), and
//! hands it over relative to `now`, which leaves GCRA's result unchanged and needs no clock.

use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::quality::RandomState;
use governor::RateLimiter;
use governor::clock::{Clock, Reference};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};

use crate::clock::Moment;
use crate::quota::{Cost, KeyHash, Quota};

/// Seven cells and their lock fill two cache lines.
const WAYS: usize = 7;

/// What is left after a request was, or would be, let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Whole tokens that may still be spent at once.
    pub remaining: u64,
    /// The time until all of the burst is back.
    pub reset: Duration,
}

/// A denial: how long until the same request would pass if nobody else asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Never shorter than true; `Duration::MAX` where the cost exceeds the burst.
    pub after: Duration,
    /// Whole tokens left, fewer than the request costs.
    pub remaining: u64,
    /// The time until all of the burst is back.
    pub reset: Duration,
}

/// A quota made ready for decisions: one per rule and weight, derived when the rule is built.
#[derive(Clone, Copy, Debug)]
pub struct Gcra {
    quota: Quota,
    inner: governor::Quota,
    interval_nanos: u64,
    full_nanos: u64,
}

impl Gcra {
    pub fn new(quota: Quota) -> Gcra {
        let interval_nanos = quota.rate().interval_nanos();
        let inner = governor::Quota::with_period(Duration::from_nanos(interval_nanos))
            .expect("a rate is finite, so its interval is above zero")
            .allow_burst(quota.burst());
        Gcra { quota, inner, interval_nanos, full_nanos: interval_nanos * u64::from(quota.burst().get()) }
    }

    pub fn quota(&self) -> Quota {
        self.quota
    }

    fn remaining(&self, debt_nanos: u64) -> u64 {
        self.full_nanos.saturating_sub(debt_nanos) / self.interval_nanos
    }

    /// Governor multiplies cost and interval unchecked, so a cost above the burst is answered here.
    fn measure(&self, cell: &Cell, cost: Cost, now: Moment, purpose: Purpose) -> Result<Room, Wait> {
        let debt_nanos = std::cell::Cell::new(cell.debt_nanos(self, now));
        let wait = |after| Wait {
            after,
            remaining: self.remaining(debt_nanos.get()),
            reset: Duration::from_nanos(debt_nanos.get()),
        };
        if cost.tokens() > self.quota.burst() {
            return Err(wait(Duration::MAX));
        }
        let store = Measured { cell, gcra: self, now, purpose, debt_nanos: &debt_nanos };
        let limiter = RateLimiter::<_, _, _, NoOpMiddleware<Nanos>>::new(self.inner, store, Still);
        match limiter.check_n(cost.tokens()) {
            Ok(Ok(())) => {
                Ok(Room { remaining: self.remaining(debt_nanos.get()), reset: Duration::from_nanos(debt_nanos.get()) })
            }
            Ok(Err(denied)) => Err(wait(denied.wait_time_from(Still.now()))),
            Err(_) => Err(wait(Duration::MAX)),
        }
    }
}

/// Time does not pass within a decision; arrival times are given relative to it.
#[derive(Debug)]
struct Still;

impl Clock for Still {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(0)
    }
}

#[derive(Clone, Copy, Debug)]
enum Purpose {
    Peek,
    Charge,
}

/// One cell as governor sees it during one decision. `debt_nanos` carries out what governor keeps to itself: the
/// new arrival time.
struct Measured<'a> {
    cell: &'a Cell,
    gcra: &'a Gcra,
    now: Moment,
    purpose: Purpose,
    debt_nanos: &'a std::cell::Cell<u64>,
}

impl StateStore for Measured<'_> {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _key: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut seen = self.cell.0.load(Ordering::Acquire);
        loop {
            let debt_nanos = Cell::debt_of(seen, self.gcra, self.now);
            self.debt_nanos.set(debt_nanos);
            let (outcome, next) = decide(Some(Nanos::new(debt_nanos)))?;
            self.debt_nanos.set(next.as_u64());
            if matches!(self.purpose, Purpose::Peek) {
                return Ok(outcome);
            }
            let tat = self.now.nanos().saturating_add(next.duration_since(Still.now()).as_u64());
            match self.cell.0.compare_exchange_weak(seen, tat, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(outcome),
                Err(changed) => seen = changed,
            }
        }
    }
}

/// The state of one limited subject: its theoretical arrival time. A new cell has all of its burst.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// What [`Cell::commit`] would answer; writes nothing.
    pub fn peek(&self, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        gcra.measure(self, cost, now, Purpose::Peek)
    }

    /// Charges `cost`, or charges nothing and says how long to wait. It may deny what a peek allowed: another
    /// thread came between.
    pub fn commit(&self, gcra: &Gcra, cost: Cost, now: Moment) -> Result<Room, Wait> {
        gcra.measure(self, cost, now, Purpose::Charge)
    }

    /// Gives back a charge that was committed a moment ago.
    pub fn refund(&self, gcra: &Gcra, cost: Cost) {
        let charge = gcra.interval_nanos.saturating_mul(u64::from(cost.tokens().get()));
        self.0.update(Ordering::AcqRel, Ordering::Acquire, |tat| tat.saturating_sub(charge));
    }

    fn debt_nanos(&self, gcra: &Gcra, now: Moment) -> u64 {
        Cell::debt_of(self.0.load(Ordering::Acquire), gcra, now)
    }

    /// No more than a whole burst is ever owed: after a reload that shrinks the burst, or a subject's change of
    /// tier, the old arrival time must not punish it for longer than the new quota takes to come back.
    fn debt_of(tat: u64, gcra: &Gcra, now: Moment) -> u64 {
        tat.saturating_sub(now.nanos()).min(gcra.full_nanos)
    }
}

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
        if let Some(displaced) = set.iter_mut().min_by_key(|way| way.cell.0.load(Ordering::Relaxed)) {
            *displaced = Way { fingerprint, cell: fresh };
        }
        Ok(room)
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

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::quota::Weight;

    fn gcra(rate: &str, burst: u32) -> Gcra {
        Gcra::new(Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap())
    }

    fn cost(tokens: u32) -> Cost {
        Cost::new(NonZeroU32::new(tokens).unwrap())
    }

    fn table(keys: usize) -> Table {
        Table::new(NonZeroUsize::new(keys).unwrap())
    }

    fn at(millis: u64) -> Moment {
        Moment::ORIGIN + Duration::from_millis(millis)
    }

    #[test]
    fn denies_with_the_exact_wait_and_charges_nothing() {
        let (cell, gcra) = (Cell::default(), gcra("100/s", 3));
        cell.commit(&gcra, cost(3), at(0)).unwrap();
        let wait = cell.commit(&gcra, cost(2), at(5)).unwrap_err();
        assert_eq!(wait, Wait { after: Duration::from_millis(15), remaining: 0, reset: Duration::from_millis(25) });
        assert!(cell.peek(&gcra, cost(2), at(5) + (wait.after - Duration::from_nanos(1))).is_err());
        assert_eq!(cell.commit(&gcra, cost(2), at(5) + wait.after).unwrap().remaining, 0);
    }

    #[test]
    fn a_cost_above_the_burst_never_passes() {
        let gcra = gcra("5/h", 5);
        assert_eq!(Cell::default().peek(&gcra, cost(6), at(0)).unwrap_err().after, Duration::MAX);
        assert_eq!(table(7).commit(KeyHash(1), &gcra, cost(u32::MAX), at(0)).unwrap_err().after, Duration::MAX);
    }

    #[test]
    fn a_replenished_cell_is_as_new() {
        let (cell, gcra) = (Cell::default(), gcra("100/s", 3));
        cell.commit(&gcra, cost(3), at(0)).unwrap();
        assert_eq!(cell.peek(&gcra, cost(1), at(30)), Cell::default().peek(&gcra, cost(1), at(30)));
    }

    #[test]
    fn a_peek_writes_nothing() {
        let (table, gcra) = (table(7), gcra("1/s", 1));
        for _ in 0..10 {
            assert_eq!(table.peek(KeyHash(1), &gcra, cost(1), at(0)).unwrap().remaining, 0);
        }
        table.commit(KeyHash(1), &gcra, cost(1), at(0)).unwrap();
        table.peek(KeyHash(1), &gcra, cost(1), at(0)).unwrap_err();
    }

    #[test]
    fn a_refund_restores_the_cell() {
        let (table, gcra) = (table(7), gcra("1/s", 5));
        table.commit(KeyHash(1), &gcra, cost(2), at(0)).unwrap();
        table.commit(KeyHash(1), &gcra, cost(3), at(0)).unwrap();
        table.refund(KeyHash(1), &gcra, cost(3));
        assert_eq!(table.peek(KeyHash(1), &gcra, cost(1), at(0)).unwrap().remaining, 2);
        table.refund(KeyHash(99), &gcra, cost(3));
    }

    #[test]
    fn a_smaller_burst_after_a_reload_does_not_punish_for_longer_than_itself() {
        let cell = Cell::default();
        cell.commit(&gcra("1/m", 60), cost(60), at(0)).unwrap();
        let wait = cell.peek(&gcra("100/s", 10), cost(1), at(0)).unwrap_err();
        assert_eq!(wait.after, Duration::from_millis(10));
    }

    #[test]
    fn threads_together_get_the_burst_and_no_more() {
        let (table, cell, gcra) = (table(7), Cell::default(), gcra("1/h", 1_000));
        let granted: usize = thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let keyed = || table.commit(KeyHash(1), &gcra, cost(1), at(0)).is_ok();
                        let alone = || cell.commit(&gcra, cost(1), at(0)).is_ok();
                        (0..1_000).map(|_| usize::from(keyed()) + usize::from(alone())).sum::<usize>()
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(granted, 2_000);
    }

    #[test]
    fn a_key_costs_at_most_64_bytes() {
        assert_eq!(size_of::<Set>(), 128);
        let table = table(65_536);
        assert!(table.capacity() >= 65_536);
        assert!(table.bytes() <= 64 * 65_536, "{}", table.bytes());
    }

    /// A heavy key at ten times its limit, among a million keys seen once, 100,000 of them a second.
    #[test]
    fn a_flood_of_keys_neither_grows_the_table_nor_frees_the_heavy_key() {
        let (table, gcra) = (table(65_536), gcra("100/s", 200));
        let bytes = table.bytes();
        let mut granted = 0;
        for turn in 0..1_000_000_u64 {
            let now = Moment::from_nanos(turn * 10_000);
            let stranger = KeyHash(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            table.commit(stranger, &gcra, cost(1), now).unwrap();
            if turn % 100 == 0 && table.commit(KeyHash(0), &gcra, cost(1), now).is_ok() {
                granted += 1;
            }
        }
        assert_eq!(table.bytes(), bytes);
        assert!((1_190..=1_200).contains(&granted), "{granted} of a fair 1,200");
    }

    #[test]
    fn weights_give_100_200_and_320_a_second_within_one_percent() {
        let base = Quota::new("100/s".parse().unwrap(), NonZeroU32::new(10).unwrap()).unwrap();
        for (weight, expected) in [(1.0, 1_000.0), (2.0, 2_000.0), (3.2, 3_200.0)] {
            let quota = base.weighted(Weight::try_from(weight).unwrap()).unwrap();
            let (cell, gcra) = (Cell::default(), Gcra::new(quota));
            let granted = (0..10_000).filter(|&millis| cell.commit(&gcra, cost(1), at(millis)).is_ok()).count();
            let steady = granted as f64 - f64::from(quota.burst().get());
            assert!((steady / expected - 1.0).abs() < 0.01, "weight {weight}: {steady}");
        }
    }

    proptest! {
        #[test]
        fn never_above_rate_and_burst_and_waits_are_true(
            rate in 1u64..5_000, burst in 1u32..50,
            arrivals in prop::collection::vec((0u64..50_000_000, 1u32..5), 1..200),
        ) {
            let quota = Quota::new(crate::quota::Rate::new(rate, 1).unwrap(), NonZeroU32::new(burst).unwrap()).unwrap();
            let (cell, gcra) = (Cell::default(), Gcra::new(quota));
            let (mut now, mut granted) = (Moment::ORIGIN, 0u128);
            for (gap, tokens) in arrivals {
                now = now + Duration::from_nanos(gap);
                let peeked = cell.peek(&gcra, cost(tokens), now);
                prop_assert_eq!(peeked, cell.commit(&gcra, cost(tokens), now));
                match peeked {
                    Ok(_) => granted += u128::from(tokens),
                    Err(wait) if wait.after < Duration::MAX => {
                        prop_assert!(cell.peek(&gcra, cost(tokens), now + wait.after).is_ok());
                        prop_assert!(wait.remaining < u64::from(tokens));
                    }
                    Err(_) => prop_assert!(tokens > burst),
                }
                prop_assert!(granted * 1_000_000_000 <= u128::from(now.nanos()) * u128::from(rate) + u128::from(burst) * 1_000_000_000);
            }
        }

        #[test]
        fn a_refund_undoes_its_commit(before in 0u32..10, tokens in 1u32..10, gap in 0u64..2_000) {
            let (cell, gcra) = (Cell::default(), gcra("10/s", 20));
            if before > 0 {
                cell.commit(&gcra, cost(before), at(0)).unwrap();
            }
            let expected = cell.peek(&gcra, cost(1), at(gap));
            cell.commit(&gcra, cost(tokens), at(gap)).unwrap();
            cell.refund(&gcra, cost(tokens));
            prop_assert_eq!(cell.peek(&gcra, cost(1), at(gap)), expected);
        }
    }
}
