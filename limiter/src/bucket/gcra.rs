//! The decision about one subject: a quota prepared for GCRA ([`Gcra`]) and the one number that it
//! works on ([`GcraCell`]).
//!
//! It uses neither a clock nor a lock. Invariant: a charge is one compare-and-swap. A backlog that
//! another quota has left counts as a whole burst at most.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::RateLimiter;
use governor::clock::{Clock, Reference};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};

use super::{Headroom, Throttled};
use crate::clock::MonotonicTime;
use crate::quota::{Cost, Fraction, Quota};
use crate::sync::{AtomicU64, Ordering};

/// A quota prepared for decisions: one per rule and user class, derived when the rule is built.
#[derive(Clone, Copy, Debug)]
pub struct Gcra {
    quota: Quota,
    /// Governor's quota, whose burst is `spendable`: a reserve is a part of the burst out of reach.
    inner: governor::Quota,
    spendable: NonZeroU32,
    interval_nanos: u64,
    spendable_nanos: u64,
    burst_nanos: u64,
}

impl Gcra {
    pub fn new(quota: Quota) -> Gcra {
        Gcra::with_spendable(quota, quota.burst())
    }

    /// For a user class that must leave `reserve` of a shared burst to others; `None` if it could
    /// then spend nothing. Classes with different reserves may share a cell.
    pub fn with_reserve(quota: Quota, reserve: Fraction) -> Option<Gcra> {
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
        let burst_nanos = interval_nanos * u64::from(quota.burst().get());
        Gcra { quota, inner, spendable, interval_nanos, spendable_nanos, burst_nanos }
    }

    pub fn quota(&self) -> Quota {
        self.quota
    }

    /// The most tokens that may be spent at once: the burst without the reserve.
    pub fn spendable(&self) -> NonZeroU32 {
        self.spendable
    }

    fn remaining(&self, backlog_nanos: u64) -> u64 {
        self.spendable_nanos.saturating_sub(backlog_nanos) / self.interval_nanos
    }

    /// The latest arrival time that a decision now can leave.
    pub(super) fn latest_tat(&self, now: MonotonicTime) -> u64 {
        now.nanos().saturating_add(self.burst_nanos)
    }

    pub(super) fn cost_nanos(&self, cost: Cost) -> u64 {
        self.interval_nanos.saturating_mul(u64::from(cost.tokens().get()))
    }

    /// Governor multiplies cost and interval unchecked, so a cost above the burst is denied here.
    #[expect(clippy::too_many_arguments, reason = "hot path: five words in registers, which a struct would spill")]
    fn decide(
        &self,
        cell: &GcraCell,
        cost: Cost,
        now: MonotonicTime,
        operation: GcraOperation,
    ) -> Result<Headroom, Throttled> {
        let backlog_nanos = std::cell::Cell::new(cell.backlog_nanos(self, now));
        let throttled = |retry_after| Throttled {
            retry_after,
            // A cell without one token has none left: no division is needed.
            remaining: if cost == Cost::ONE { 0 } else { self.remaining(backlog_nanos.get()) },
            reset: Duration::from_nanos(backlog_nanos.get()),
        };
        if cost.tokens() > self.spendable {
            return Err(throttled(Duration::MAX));
        }
        let store = CapturingStore { cell, gcra: self, now, operation, backlog_nanos: &backlog_nanos };
        let limiter = RateLimiter::<_, _, _, NoOpMiddleware<Nanos>>::new(self.inner, store, FixedClock);
        match limiter.check_n(cost.tokens()) {
            Ok(Ok(())) => Ok(Headroom {
                remaining: self.remaining(backlog_nanos.get()),
                reset: Duration::from_nanos(backlog_nanos.get()),
            }),
            Ok(Err(denied)) => Err(throttled(denied.wait_time_from(FixedClock.now()))),
            Err(_) => Err(throttled(Duration::MAX)),
        }
    }
}

/// Decisions come with the time of their request, which may be earlier than that of a decision
/// before: a stream over HTTP/2 waits up to 10 s for memory. A backlog that another decision may
/// have left is not shortened.
pub(super) const EARLIER_MAX_NANOS: u64 = 15_000_000_000;

/// How a reload converts backlogs: by the times that one token takes to refill.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BacklogScale {
    /// In nanoseconds.
    before: u64,
    /// In nanoseconds.
    after: u64,
    /// The largest backlog under the new quota, in nanoseconds.
    longest: u64,
}

impl BacklogScale {
    /// `None`: backlogs stay as they are.
    pub(crate) fn between(before: Quota, after: Quota) -> Option<BacklogScale> {
        let [before, interval] = [before, after].map(|quota| quota.rate().interval_nanos());
        let longest = interval * u64::from(after.burst().get());
        (before != interval).then_some(BacklogScale { before, after: interval, longest })
    }

    /// Rounded up: no token is gained.
    pub(super) fn backlog(self, nanos: u64) -> u64 {
        let scaled = (u128::from(nanos) * u128::from(self.after)).div_ceil(u128::from(self.before));
        u64::try_from(scaled).unwrap_or(u64::MAX).min(self.longest)
    }

    fn tat(self, tat: u64, now: MonotonicTime) -> u64 {
        if tat > now.nanos() { now.nanos().saturating_add(self.backlog(tat - now.nanos())) } else { tat }
    }
}

/// A clock that is fixed at zero: time does not pass within a decision, and arrival times are
/// relative to it.
#[derive(Debug)]
struct FixedClock;

impl Clock for FixedClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(0)
    }
}

/// Whether a decision charges the cell or only peeks.
#[derive(Clone, Copy, Debug)]
enum GcraOperation {
    Peek,
    Charge,
}

/// One cell as governor's state store during one decision. `backlog_nanos` captures the new arrival
/// time, which governor does not return.
struct CapturingStore<'a> {
    cell: &'a GcraCell,
    gcra: &'a Gcra,
    now: MonotonicTime,
    operation: GcraOperation,
    backlog_nanos: &'a std::cell::Cell<u64>,
}

impl StateStore for CapturingStore<'_> {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _key: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut tat = self.cell.0.load(Ordering::Acquire);
        loop {
            // A backlog that is longer than this quota's burst ends within one from now on.
            let longest = self.gcra.latest_tat(self.now);
            if tat > longest.saturating_add(EARLIER_MAX_NANOS) {
                match self.cell.0.compare_exchange_weak(tat, longest, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => tat = longest,
                    Err(changed) => {
                        tat = changed;
                        continue;
                    }
                }
            }
            let backlog_nanos = GcraCell::backlog_at(tat, self.gcra, self.now);
            self.backlog_nanos.set(backlog_nanos);
            let (outcome, next) = decide(Some(Nanos::new(backlog_nanos)))?;
            self.backlog_nanos.set(next.as_u64());
            if matches!(self.operation, GcraOperation::Peek) {
                return Ok(outcome);
            }
            let next_tat = self.now.nanos().saturating_add(next.duration_since(FixedClock.now()).as_u64());
            match self.cell.0.compare_exchange_weak(tat, next_tat, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(outcome),
                Err(changed) => tat = changed,
            }
        }
    }
}

/// The state of one limited subject: its theoretical arrival time. A new cell has its whole burst.
#[derive(Debug, Default)]
pub struct GcraCell(AtomicU64);

impl GcraCell {
    /// A cell with this theoretical arrival time, in nanoseconds since the clock's origin.
    pub(super) fn with_tat(tat_nanos: u64) -> GcraCell {
        GcraCell(AtomicU64::new(tat_nanos))
    }

    /// Replaces the arrival time, whatever it was: the cell now belongs to another subject.
    pub(super) fn set_tat(&self, tat_nanos: u64) {
        self.0.store(tat_nanos, Ordering::Release);
    }

    /// Whether [`GcraCell::peek`] is likely to allow the cost; a cheap estimate.
    pub(super) fn is_likely_to_allow(&self, gcra: &Gcra, cost: Cost, now: MonotonicTime) -> bool {
        self.backlog_nanos(gcra, now).saturating_add(gcra.cost_nanos(cost)) <= gcra.spendable_nanos
    }

    /// The result that [`GcraCell::commit`] would return; charges nothing.
    pub fn peek(&self, gcra: &Gcra, cost: Cost, now: MonotonicTime) -> Result<Headroom, Throttled> {
        gcra.decide(self, cost, now, GcraOperation::Peek)
    }

    /// Charges `cost`, or charges nothing and returns how long to wait. It may deny what a peek
    /// allowed, if another thread charged the cell in between.
    pub fn commit(&self, gcra: &Gcra, cost: Cost, now: MonotonicTime) -> Result<Headroom, Throttled> {
        gcra.decide(self, cost, now, GcraOperation::Charge)
    }

    /// Refunds a charge that was committed just before.
    pub fn refund(&self, gcra: &Gcra, cost: Cost) {
        self.0.update(Ordering::AcqRel, Ordering::Acquire, |tat| tat.saturating_sub(gcra.cost_nanos(cost)));
    }

    /// Charges `cost` whatever is left: the charge may use up the burst including the reserve, and
    /// the backlog is capped at the burst.
    pub fn charge(&self, gcra: &Gcra, cost: Cost, now: MonotonicTime) {
        let charged = |tat| {
            let backlog_nanos = GcraCell::backlog_at(tat, gcra, now).saturating_add(gcra.cost_nanos(cost));
            now.nanos().saturating_add(backlog_nanos.min(gcra.burst_nanos))
        };
        self.0.update(Ordering::AcqRel, Ordering::Acquire, charged);
    }

    /// Converts the backlog for another quota: what was spent stays spent.
    pub(crate) fn rescale(&self, scale: BacklogScale, now: MonotonicTime) {
        if self.tat() > now.nanos() {
            self.0.update(Ordering::AcqRel, Ordering::Acquire, |tat| scale.tat(tat, now));
        }
    }

    /// The theoretical arrival time, in nanoseconds since the clock's origin.
    pub(super) fn tat(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn backlog_nanos(&self, gcra: &Gcra, now: MonotonicTime) -> u64 {
        GcraCell::backlog_at(self.0.load(Ordering::Acquire), gcra, now)
    }

    /// TAT minus now, at most a whole burst: after a reload that shrinks the burst, or a change of
    /// the subject's class, the old arrival time must not deny the subject for longer than the new
    /// quota takes to refill. So a decision that finds such an
    /// arrival time also shortens it.
    fn backlog_at(tat: u64, gcra: &Gcra, now: MonotonicTime) -> u64 {
        tat.saturating_sub(now.nanos()).min(gcra.burst_nanos)
    }
}
