//! The ramp of a closing breaker: 5, 25 and 50 % of the calls are admitted, for a third of its time
//! each.
//!
//! Shares apply to routes with many calls. A call is admitted in any case while fewer than `PROBES`
//! calls of the ramp are running: the origin has just answered so many at a time, and a route with
//! few calls would not be used otherwise.

use std::time::{Duration, Instant};

use super::probes::PROBES;

/// The shares of the calls that are admitted, in percent, in order.
const SHARES: [u32; 3] = [5, 25, 50];
/// The least number of calls of which a ratio opens the breaker again. Two failures open it at a
/// ratio of one half, whichever call is the third.
pub(super) const RAMP_CALLS_MIN: u32 = PROBES as u32;

pub(super) struct Ramp {
    since: Instant,
    running: usize,
    /// The part of a call that the share has left over, in percent.
    credit: u32,
}

impl Ramp {
    pub(super) fn new(now: Instant) -> Self {
        Ramp { since: now, running: 0, credit: 0 }
    }

    /// The time until all calls are admitted; zero: they are.
    pub(super) fn left(&self, length: Duration, now: Instant) -> Duration {
        length.saturating_sub(now.saturating_duration_since(self.since))
    }

    /// The share of the calls that is admitted, in percent.
    pub(super) fn percent(&self, length: Duration, now: Instant) -> u32 {
        let step = (length / SHARES.len() as u32).max(Duration::from_nanos(1));
        let steps = now.saturating_duration_since(self.since).as_nanos() / step.as_nanos();
        usize::try_from(steps).ok().and_then(|step| SHARES.get(step).copied()).unwrap_or(100)
    }

    /// Admits a call, or not.
    pub(super) fn admit(&mut self, length: Duration, now: Instant) -> bool {
        self.credit = (self.credit + self.percent(length, now)).min(200);
        let is_admitted = self.credit >= 100 || self.running < PROBES;
        if is_admitted {
            self.credit = self.credit.saturating_sub(100);
            self.running += 1;
        }
        is_admitted
    }

    /// An admitted call has ended.
    pub(super) fn end(&mut self) {
        self.running = self.running.saturating_sub(1);
    }
}
