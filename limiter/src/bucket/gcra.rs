//! Owns the decision about one subject: a quota made ready ([`Gcra`]) and the one number it works on ([`Cell`]).
//!
//! Refuses a clock and a lock. Invariant: a cell changes by one compare-and-swap per decision, and owes at most a
//! whole burst.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::RateLimiter;
use governor::clock::{Clock, Reference};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};

use super::{Room, Wait};
use crate::clock::Moment;
use crate::quota::{Cost, Fraction, Quota};
use crate::sync::{AtomicU64, Ordering};

/// A quota made ready for decisions: one per rule and class, derived when the rule is built.
#[derive(Clone, Copy, Debug)]
pub struct Gcra {
    quota: Quota,
    /// Governor's quota has a burst of `spendable`: a reserve is a part of the burst out of reach.
    inner: governor::Quota,
    spendable: NonZeroU32,
    interval_nanos: u64,
    spendable_nanos: u64,
    full_nanos: u64,
}

impl Gcra {
    pub fn new(quota: Quota) -> Gcra {
        Gcra::with_spendable(quota, quota.burst())
    }

    /// For a class that leaves `reserve` of a shared burst to others; `None` where nothing would be left to it.
    /// Classes with different reserves may share a cell.
    pub fn reserving(quota: Quota, reserve: Fraction) -> Option<Gcra> {
        let burst = quota.burst().get();
        let spendable = NonZeroU32::new(burst - reserve.of(burst))?;
        Some(Gcra::with_spendable(quota, spendable))
    }

    fn with_spendable(quota: Quota, spendable: NonZeroU32) -> Gcra {
        let interval_nanos = quota.rate().interval_nanos();
        let inner = governor::Quota::with_period(Duration::from_nanos(interval_nanos))
            .expect("a rate is finite, so its interval is above zero")
            .allow_burst(spendable);
        let spendable_nanos = interval_nanos * u64::from(spendable.get());
        let full_nanos = interval_nanos * u64::from(quota.burst().get());
        Gcra { quota, inner, spendable, interval_nanos, spendable_nanos, full_nanos }
    }

    pub fn quota(&self) -> Quota {
        self.quota
    }

    /// The most tokens that may be spent at once: the burst without the reserve.
    pub fn spendable(&self) -> NonZeroU32 {
        self.spendable
    }

    fn remaining(&self, debt_nanos: u64) -> u64 {
        self.spendable_nanos.saturating_sub(debt_nanos) / self.interval_nanos
    }

    pub(super) fn price_nanos(&self, cost: Cost) -> u64 {
        self.interval_nanos.saturating_mul(u64::from(cost.tokens().get()))
    }

    /// Governor multiplies cost and interval unchecked, so a cost above the burst is answered here.
    fn measure(&self, cell: &Cell, cost: Cost, now: Moment, purpose: Purpose) -> Result<Room, Wait> {
        let debt_nanos = std::cell::Cell::new(cell.debt_nanos(self, now));
        let wait = |after| Wait {
            after,
            // One that lacks a token has none, and needs no division.
            remaining: if cost == Cost::ONE { 0 } else { self.remaining(debt_nanos.get()) },
            reset: Duration::from_nanos(debt_nanos.get()),
        };
        if cost.tokens() > self.spendable {
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
    /// One with this theoretical arrival time, in nanoseconds since the origin.
    pub(super) fn owing(tat_nanos: u64) -> Cell {
        Cell(AtomicU64::new(tat_nanos))
    }

    /// Owes this now, whatever it owed: another subject's.
    pub(super) fn become_owing(&self, tat_nanos: u64) {
        self.0.store(tat_nanos, Ordering::Release);
    }

    /// Whether [`Cell::peek`] is likely to allow it, at a glance.
    pub(super) fn may_pass(&self, gcra: &Gcra, cost: Cost, now: Moment) -> bool {
        self.debt_nanos(gcra, now).saturating_add(gcra.price_nanos(cost)) <= gcra.spendable_nanos
    }

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
        self.0.update(Ordering::AcqRel, Ordering::Acquire, |tat| tat.saturating_sub(gcra.price_nanos(cost)));
    }

    /// Charges `cost` whatever is left: it may use up the burst, with the reserve, and owes no more than that.
    pub fn charge(&self, gcra: &Gcra, cost: Cost, now: Moment) {
        let charged = |tat| {
            let debt_nanos = Cell::debt_of(tat, gcra, now).saturating_add(gcra.price_nanos(cost));
            now.nanos().saturating_add(debt_nanos.min(gcra.full_nanos))
        };
        self.0.update(Ordering::AcqRel, Ordering::Acquire, charged);
    }

    /// The theoretical arrival time, in nanoseconds since the origin.
    pub(super) fn tat(&self) -> u64 {
        self.0.load(Ordering::Acquire)
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
