//! Owns the circuit breaker of one operation class of a shard, shared by all threads.
//!
//! Closed: all calls pass. Open: calls are rejected at once, except one probe per `PROBE_INTERVAL`
//! (half-open); its success closes the breaker, its failure keeps it open. A probe is a point in
//! time, not a token: a cancelled probe is followed by the next one, so no probe can leak.
//!
//! The breaker opens when a connection is abandoned because its server hangs, after
//! `CONSECUTIVE_FAILURES` failures in a row, or when more than half of at least `RATIO_CALLS_MIN`
//! calls failed within one second of a failure. A successful call of a closed breaker costs two
//! loads of a shared cache line and no store.
//!
//! Refuses to read a clock: the time is a parameter.
//! Invariant: while open, at most one call per `PROBE_INTERVAL` (less its jitter) reaches the shard
//! from this process.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const CONSECUTIVE_FAILURES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);
const RATIO_CALLS_MIN: u32 = 20;
pub(crate) const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// State of a shard's breaker: closed, or open with one probe admitted at intervals; there is no
/// half-open state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShardBreakerState {
    Closed,
    Open,
}

/// The state change that a result caused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ShardBreakerTransition {
    None,
    Opened,
    Closed,
}

/// Circuit breaker of one operation class: atomic state and time of the next probe, and a window of
/// calls behind a lock, which a success takes only after a failure.
#[derive(Debug)]
pub(crate) struct ShardBreaker {
    created: Instant,
    seed: u64,
    is_open: AtomicBool,
    /// Time of the next probe, in milliseconds since `created`; valid while open.
    probe_at: AtomicU64,
    /// Calls are counted only after a failure, until a window without failures has passed.
    is_counting: AtomicBool,
    window: Mutex<CallWindow>,
}

/// Counts of calls and failures since the window's first failure; consecutive failures continue
/// across windows.
#[derive(Debug)]
struct CallWindow {
    since: Instant,
    calls: u32,
    failures: u32,
    consecutive: u32,
}

impl ShardBreaker {
    pub(crate) fn new(now: Instant, seed: u64) -> Self {
        Self {
            created: now,
            seed,
            is_open: AtomicBool::new(false),
            probe_at: AtomicU64::new(0),
            is_counting: AtomicBool::new(false),
            window: Mutex::new(CallWindow { since: now, calls: 0, failures: 0, consecutive: 0 }),
        }
    }

    pub(crate) fn state(&self) -> ShardBreakerState {
        if self.is_open.load(Ordering::Acquire) { ShardBreakerState::Open } else { ShardBreakerState::Closed }
    }

    /// Whether a call made now would be rejected; does not use up a probe.
    pub(crate) fn rejects(&self, now: Instant) -> bool {
        self.state() == ShardBreakerState::Open && self.millis(now) < self.probe_at.load(Ordering::Relaxed)
    }

    /// Whether this call may proceed; while open, a permitted call is the probe.
    pub(crate) fn admit(&self, now: Instant) -> bool {
        if self.state() == ShardBreakerState::Closed {
            return true;
        }
        let due = self.probe_at.load(Ordering::Relaxed);
        let next = self.next_probe(now);
        self.millis(now) >= due
            && self.probe_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn record_success(&self, now: Instant) -> ShardBreakerTransition {
        if self.state() == ShardBreakerState::Closed && !self.is_counting.load(Ordering::Relaxed) {
            return ShardBreakerTransition::None;
        }
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.calls = window.calls.saturating_add(1);
        window.consecutive = 0;
        let was_open = self.is_open.swap(false, Ordering::AcqRel);
        if was_open || now.saturating_duration_since(window.since) >= WINDOW {
            self.is_counting.store(false, Ordering::Relaxed);
        }
        if was_open { ShardBreakerTransition::Closed } else { ShardBreakerTransition::None }
    }

    pub(crate) fn record_failure(&self, now: Instant) -> ShardBreakerTransition {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new_window =
            !self.is_counting.swap(true, Ordering::Relaxed) || now.saturating_duration_since(window.since) >= WINDOW;
        if is_new_window {
            let consecutive = window.consecutive;
            *window = CallWindow { since: now, calls: 0, failures: 0, consecutive };
        }
        window.calls = window.calls.saturating_add(1);
        window.failures = window.failures.saturating_add(1);
        window.consecutive = window.consecutive.saturating_add(1);
        let mostly_failing = window.calls >= RATIO_CALLS_MIN && window.failures > window.calls / 2;
        if window.consecutive < CONSECUTIVE_FAILURES && !mostly_failing {
            return ShardBreakerTransition::None;
        }
        drop(window);
        self.trip(now)
    }

    /// Opens regardless of the counts: a connection was abandoned because its server hangs.
    pub(crate) fn trip(&self, now: Instant) -> ShardBreakerTransition {
        let _window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state() == ShardBreakerState::Open {
            return ShardBreakerTransition::None;
        }
        self.probe_at.store(self.next_probe(now), Ordering::Relaxed);
        self.is_open.store(true, Ordering::Release);
        ShardBreakerTransition::Opened
    }

    /// Jitter of up to a quarter keeps the nodes of a fleet from probing at the same time.
    fn next_probe(&self, now: Instant) -> u64 {
        let now_ms = self.millis(now);
        let every = PROBE_INTERVAL.as_millis() as u64;
        now_ms + every - xxh3_64_with_seed(&now_ms.to_le_bytes(), self.seed) % (every / 4)
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.created).as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn opened_breaker() -> (ShardBreaker, Instant) {
        let now = Instant::now();
        let breaker = ShardBreaker::new(now, 1);
        for _ in 0..CONSECUTIVE_FAILURES {
            breaker.record_failure(now);
        }
        (breaker, now)
    }

    #[test]
    fn open_breaker_admits_one_call_once_a_probe_is_due() {
        let (breaker, now) = opened_breaker();
        assert!(!breaker.admit(now) && !breaker.admit(now + 180 * MS));
        let admitted = (0..50).filter(|_| breaker.admit(now + 250 * MS)).count();
        assert_eq!(admitted, 1);
    }

    #[test]
    fn probe_without_result_is_followed_by_another() {
        let (breaker, now) = opened_breaker();
        assert!(breaker.admit(now + 250 * MS));
        assert!(breaker.admit(now + 500 * MS));
    }

    #[test]
    fn failed_probe_keeps_breaker_open_and_success_closes_it() {
        let (breaker, now) = opened_breaker();
        assert_eq!(breaker.record_failure(now + 250 * MS), ShardBreakerTransition::None);
        assert_eq!(breaker.state(), ShardBreakerState::Open);
        assert_eq!(breaker.record_success(now + 500 * MS), ShardBreakerTransition::Closed);
        assert!(breaker.admit(now + 500 * MS));
        assert_eq!(breaker.record_failure(now + 501 * MS), ShardBreakerTransition::None);
    }

    #[test]
    fn success_resets_consecutive_failures() {
        let now = Instant::now();
        let breaker = ShardBreaker::new(now, 1);
        for round in 0..4 {
            (0..4).for_each(|_| {
                assert_eq!(breaker.record_failure(now + 2 * round * WINDOW), ShardBreakerTransition::None)
            });
            assert_eq!(breaker.record_success(now + 2 * round * WINDOW + WINDOW), ShardBreakerTransition::None);
        }
    }

    #[test]
    fn opens_when_over_half_of_twenty_calls_fail_within_one_second() {
        let now = Instant::now();
        let breaker = ShardBreaker::new(now, 1);
        let mut transitions = Vec::new();
        for i in 0..30 {
            let at = now + i * MS;
            transitions.push(if i % 3 == 0 { breaker.record_success(at) } else { breaker.record_failure(at) });
        }
        // The first success precedes every failure and is not counted.
        assert_eq!(transitions.iter().position(|&transition| transition == ShardBreakerTransition::Opened), Some(20));
    }

    #[test]
    fn stays_closed_when_failures_spread_over_several_seconds() {
        let now = Instant::now();
        let breaker = ShardBreaker::new(now, 1);
        for i in 0..100u32 {
            let at = now + i * 60 * MS;
            let transition = if i % 3 == 0 { breaker.record_success(at) } else { breaker.record_failure(at) };
            assert_eq!(transition, ShardBreakerTransition::None, "call {i}");
        }
    }
}
