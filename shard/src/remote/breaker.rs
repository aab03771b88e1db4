//! Owns the decision whether a shard is asked at all; shared by all threads.
//!
//! Closed: traffic flows. Open: everything is refused at once, but one call each `PROBE_EVERY` is let through (half-open); its
//! success closes, its failure keeps open. A probe is a moment, not a token: one that is cancelled is simply followed by the
//! next, and nothing can be lost.
//!
//! Opens when a connection is given up because its server hangs, after `CONSECUTIVE` failures in a row, or when more than half of at least `RATIO_MINIMUM` calls failed within the
//! second that a failure began. A healthy call costs two loads of a shared line and no store.
//!
//! Refuses to read a clock: time is passed in.
//! Invariant: while open, at most one call per `PROBE_EVERY` (less its jitter) reaches the shard from this process.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const CONSECUTIVE: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);
const RATIO_MINIMUM: u32 = 20;
pub(crate) const PROBE_EVERY: Duration = Duration::from_millis(250);

/// What a shard's breaker does now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BreakerState {
    Closed,
    Open,
}

/// What a result changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Turn {
    None,
    Opened,
    Closed,
}

#[derive(Debug)]
pub(crate) struct Breaker {
    began: Instant,
    seed: u64,
    open: AtomicBool,
    /// Milliseconds since `began` from which the next call is a probe; meaningful while open.
    probe_at: AtomicU64,
    /// Whether there was a failure that no quiet window has followed: only then are calls counted.
    suspect: AtomicBool,
    tally: Mutex<Tally>,
}

#[derive(Debug)]
struct Tally {
    since: Instant,
    calls: u32,
    failures: u32,
    consecutive: u32,
}

impl Breaker {
    pub(crate) fn new(now: Instant, seed: u64) -> Self {
        Self {
            began: now,
            seed,
            open: AtomicBool::new(false),
            probe_at: AtomicU64::new(0),
            suspect: AtomicBool::new(false),
            tally: Mutex::new(Tally { since: now, calls: 0, failures: 0, consecutive: 0 }),
        }
    }

    pub(crate) fn state(&self) -> BreakerState {
        if self.open.load(Ordering::Acquire) { BreakerState::Open } else { BreakerState::Closed }
    }

    /// Whether a call made now would be refused; claims no probe.
    pub(crate) fn refuses(&self, now: Instant) -> bool {
        self.state() == BreakerState::Open && self.millis(now) < self.probe_at.load(Ordering::Relaxed)
    }

    /// Whether this call may go; while open it is then the probe.
    pub(crate) fn admit(&self, now: Instant) -> bool {
        if self.state() == BreakerState::Closed {
            return true;
        }
        let due = self.probe_at.load(Ordering::Relaxed);
        let next = self.next_probe(now);
        self.millis(now) >= due
            && self.probe_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn succeeded(&self, now: Instant) -> Turn {
        if self.state() == BreakerState::Closed && !self.suspect.load(Ordering::Relaxed) {
            return Turn::None;
        }
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.calls = tally.calls.saturating_add(1);
        tally.consecutive = 0;
        let was_open = self.open.swap(false, Ordering::AcqRel);
        if was_open || now.saturating_duration_since(tally.since) >= WINDOW {
            self.suspect.store(false, Ordering::Relaxed);
        }
        if was_open { Turn::Closed } else { Turn::None }
    }

    pub(crate) fn failed(&self, now: Instant) -> Turn {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh_window =
            !self.suspect.swap(true, Ordering::Relaxed) || now.saturating_duration_since(tally.since) >= WINDOW;
        if fresh_window {
            let consecutive = tally.consecutive;
            *tally = Tally { since: now, calls: 0, failures: 0, consecutive };
        }
        tally.calls = tally.calls.saturating_add(1);
        tally.failures = tally.failures.saturating_add(1);
        tally.consecutive = tally.consecutive.saturating_add(1);
        let mostly_failing = tally.calls >= RATIO_MINIMUM && tally.failures > tally.calls / 2;
        if tally.consecutive < CONSECUTIVE && !mostly_failing {
            return Turn::None;
        }
        drop(tally);
        self.trip(now)
    }

    /// Opens, whatever was counted: a connection was given up because its server hangs.
    pub(crate) fn trip(&self, now: Instant) -> Turn {
        let _tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state() == BreakerState::Open {
            return Turn::None;
        }
        self.probe_at.store(self.next_probe(now), Ordering::Relaxed);
        self.open.store(true, Ordering::Release);
        Turn::Opened
    }

    /// A quarter of jitter keeps the nodes of a fleet from probing together.
    fn next_probe(&self, now: Instant) -> u64 {
        let now_ms = self.millis(now);
        let every = PROBE_EVERY.as_millis() as u64;
        now_ms + every - xxh3_64_with_seed(&now_ms.to_le_bytes(), self.seed) % (every / 4)
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn opened() -> (Breaker, Instant) {
        let now = Instant::now();
        let breaker = Breaker::new(now, 1);
        for _ in 0..CONSECUTIVE {
            breaker.failed(now);
        }
        (breaker, now)
    }

    #[test]
    fn open_refuses_until_a_probe_is_due_and_then_lets_one_through() {
        let (breaker, now) = opened();
        assert!(!breaker.admit(now) && !breaker.admit(now + 180 * MS));
        let admitted = (0..50).filter(|_| breaker.admit(now + 250 * MS)).count();
        assert_eq!(admitted, 1);
    }

    #[test]
    fn a_probe_that_never_reports_is_followed_by_another() {
        let (breaker, now) = opened();
        assert!(breaker.admit(now + 250 * MS));
        assert!(breaker.admit(now + 500 * MS));
    }

    #[test]
    fn a_failed_probe_keeps_open_and_a_good_one_closes() {
        let (breaker, now) = opened();
        assert_eq!(breaker.failed(now + 250 * MS), Turn::None);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert_eq!(breaker.succeeded(now + 500 * MS), Turn::Closed);
        assert!(breaker.admit(now + 500 * MS));
        assert_eq!(breaker.failed(now + 501 * MS), Turn::None);
    }

    #[test]
    fn four_failures_in_a_row_are_forgiven_by_a_success() {
        let now = Instant::now();
        let breaker = Breaker::new(now, 1);
        for round in 0..4 {
            (0..4).for_each(|_| assert_eq!(breaker.failed(now + 2 * round * WINDOW), Turn::None));
            assert_eq!(breaker.succeeded(now + 2 * round * WINDOW + WINDOW), Turn::None);
        }
    }

    #[test]
    fn more_than_half_of_twenty_within_a_second_opens() {
        let now = Instant::now();
        let breaker = Breaker::new(now, 1);
        let mut turns = Vec::new();
        for i in 0..30 {
            let at = now + i * MS;
            turns.push(if i % 3 == 0 { breaker.succeeded(at) } else { breaker.failed(at) });
        }
        // The first success comes before any failure and is not counted.
        assert_eq!(turns.iter().position(|&turn| turn == Turn::Opened), Some(20));
    }

    #[test]
    fn half_of_the_calls_over_several_seconds_does_not() {
        let now = Instant::now();
        let breaker = Breaker::new(now, 1);
        for i in 0..100u32 {
            let at = now + i * 60 * MS;
            let turn = if i % 3 == 0 { breaker.succeeded(at) } else { breaker.failed(at) };
            assert_eq!(turn, Turn::None, "call {i}");
        }
    }
}
