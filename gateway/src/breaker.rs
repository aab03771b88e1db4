//! The circuit breaker of a route: closed (calls are admitted), open (calls are rejected),
//! half-open (a few calls probe).
//!
//! The breaker opens at a ratio of failed or slow calls over a window of one-second buckets. A
//! running call counts as slow as soon as it passes the threshold, so a hanging upstream opens the
//! breaker too. Half-open admits `PROBES` calls: all must succeed to close the breaker, and one
//! failure opens it again. A dropped probe frees its slot.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Thresholds of the circuit breaker (`[upstreams.X.breaker]`). Every route of the upstream has its
/// own breaker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BreakerConfig {
    /// Ratio of failed calls in the window, above 0 and up to 1, at which the breaker opens.
    pub(crate) error_ratio: f64,
    /// Duration at which a call counts as slow, whether it has ended or not.
    pub(crate) slow: Duration,
    /// Ratio of slow calls in the window, above 0 and up to 1, at which the breaker opens.
    pub(crate) slow_ratio: f64,
    /// Minimum number of calls in the window before either ratio applies.
    pub(crate) minimum: u32,
    /// Length of the window.
    pub(crate) window: Duration,
    /// How long the breaker rejects calls before it admits probes.
    pub(crate) open: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig {
            error_ratio: 0.5,
            slow: Duration::from_secs(3),
            slow_ratio: 0.5,
            minimum: 20,
            window: Duration::from_secs(10),
            open: Duration::from_secs(5),
        }
    }
}

/// Calls that a half-open breaker admits.
const PROBES: u32 = 3;
/// Maximum number of one-second buckets of a window.
const BUCKETS: usize = 64;
/// Slots of running calls: twice the slow threshold, at an eighth of it each.
const SLOTS: usize = 16;

/// State of a circuit breaker: closed admits calls, open rejects them, half-open admits at most
/// `PROBES` probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerState {
    Closed,
    Open,
    HalfOpen,
}

impl BreakerState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half-open",
        }
    }
}

/// Calls recorded within one second of the window: all, failed and slow ones; reset when its slot
/// is reused for a later second.
#[derive(Clone, Copy, Default)]
struct WindowBucket {
    second: u64,
    calls: u32,
    failed: u32,
    slow: u32,
}

/// Counts running calls by start time: in slots of an eighth of the slow threshold, and all older
/// calls together.
struct RunningCalls {
    slots: [(u64, u32); SLOTS],
    older: u32,
}

impl RunningCalls {
    fn start(&mut self, slot: u64) {
        let entry = &mut self.slots[index(slot, SLOTS)];
        if entry.0 != slot {
            self.older += entry.1;
            *entry = (slot, 0);
        }
        entry.1 += 1;
    }

    fn finish(&mut self, slot: u64) {
        let entry = &mut self.slots[index(slot, SLOTS)];
        let count = if entry.0 == slot { &mut entry.1 } else { &mut self.older };
        *count = count.saturating_sub(1);
    }

    /// The number of calls that started before `slot`.
    fn started_before(&self, slot: u64) -> u32 {
        self.older + self.slots.iter().filter(|entry| entry.0 < slot).map(|entry| entry.1).sum::<u32>()
    }
}

fn index(number: u64, length: usize) -> usize {
    usize::try_from(number % length as u64).unwrap_or(0)
}

/// Mutable part of a breaker, behind its lock: state, probes, running calls, and a ring of
/// `BUCKETS` one-second buckets.
struct BreakerCore {
    state: BreakerState,
    /// Incremented at every change of state. A call that started before a change is not counted
    /// after it.
    generation: u64,
    opened_at: Instant,
    running_probes: u32,
    successful_probes: u32,
    buckets: [WindowBucket; BUCKETS],
    /// The last second with a failed or slow call, 0 for none. While it is outside the window, the
    /// buckets need not be summed.
    last_bad_second: u64,
    /// No running call started before this slot when it was last checked, and none can have started
    /// there since.
    idle_before_slot: u64,
    running: RunningCalls,
}

/// The circuit breaker of one route: its thresholds, and its state behind a lock.
pub(crate) struct Breaker {
    config: BreakerConfig,
    epoch: Instant,
    slot_millis: u64,
    core: Mutex<BreakerCore>,
}

/// Permission for one call, whose result the caller records with `record`; a drop without it counts
/// as neither success nor failure.
pub(crate) struct BreakerPermit<'a> {
    breaker: &'a Breaker,
    started_at: Instant,
    generation: u64,
    is_probe: bool,
    is_recorded: bool,
}

/// The state that the breaker changed to during a call, if it changed; for the caller to report.
pub(crate) type BreakerTransition = Option<BreakerState>;

impl Breaker {
    pub(crate) fn new(config: BreakerConfig, now: Instant) -> Self {
        let core = BreakerCore {
            state: BreakerState::Closed,
            generation: 0,
            opened_at: now,
            running_probes: 0,
            successful_probes: 0,
            buckets: [WindowBucket::default(); BUCKETS],
            last_bad_second: 0,
            idle_before_slot: 0,
            running: RunningCalls { slots: [(0, 0); SLOTS], older: 0 },
        };
        let slot_millis = u64::try_from((config.slow / 8).as_millis()).unwrap_or(u64::MAX).max(1);
        Breaker { config, epoch: now, slot_millis, core: Mutex::new(core) }
    }

    pub(crate) fn config(&self) -> &BreakerConfig {
        &self.config
    }

    pub(crate) fn state(&self) -> BreakerState {
        self.lock().state
    }

    /// Admits a call.
    ///
    /// # Errors
    /// The time until a retry is useful.
    pub(crate) fn admit(
        &self,
        now: Instant,
    ) -> Result<(BreakerPermit<'_>, BreakerTransition), (Duration, BreakerTransition)> {
        let mut core = self.lock();
        let mut change = None;
        if core.state == BreakerState::Closed && self.should_open(&mut core, now) {
            // While all calls hang, none ends. The next admission therefore checks the ratios.
            core.transition_to(BreakerState::Open, now);
            change = Some(BreakerState::Open);
        }
        if core.state == BreakerState::Open {
            let waited = now.saturating_duration_since(core.opened_at);
            if waited < self.config.open {
                return Err((self.config.open - waited, change));
            }
            core.transition_to(BreakerState::HalfOpen, now);
            change = Some(BreakerState::HalfOpen);
        }
        let is_probe = core.state == BreakerState::HalfOpen;
        if is_probe {
            if core.running_probes + core.successful_probes >= PROBES {
                return Err((self.config.open, change));
            }
            core.running_probes += 1;
        } else {
            core.running.start(self.slot(now));
        }
        let permit =
            BreakerPermit { breaker: self, started_at: now, generation: core.generation, is_probe, is_recorded: false };
        Ok((permit, change))
    }

    /// Counts a call as failed after `record`: the response started well and was aborted.
    /// `generation` is that of its admission.
    pub(crate) fn fail_late(&self, generation: u64, now: Instant) -> BreakerTransition {
        let mut core = self.lock();
        if core.generation != generation || core.state == BreakerState::Open {
            return None;
        }
        core.last_bad_second = self.second(now);
        core.bucket(self.second(now)).failed += 1;
        // The call itself is in its bucket since the start of its response.
        (core.state == BreakerState::HalfOpen || self.should_open(&mut core, now)).then(|| {
            core.transition_to(BreakerState::Open, now);
            BreakerState::Open
        })
    }

    fn should_open(&self, core: &mut BreakerCore, now: Instant) -> bool {
        let current = self.second(now);
        let oldest = current.saturating_sub(self.config.window.as_secs().clamp(1, BUCKETS as u64 - 1) - 1);
        // A call may run for longer than the window. It is still counted.
        let overdue = now.checked_sub(self.config.slow).map_or(0, |at| core.overdue(self.slot(at)));
        if overdue == 0 && (core.last_bad_second == 0 || core.last_bad_second < oldest) {
            return false;
        }
        let (mut calls, mut failed, mut slow) = (overdue, 0u32, overdue);
        for bucket in &core.buckets {
            if bucket.second >= oldest && bucket.second <= current {
                calls += bucket.calls;
                failed += bucket.failed;
                slow += bucket.slow;
            }
        }
        let reaches = |count: u32, ratio: f64| count > 0 && f64::from(count) >= f64::from(calls) * ratio;
        calls >= self.config.minimum
            && (reaches(failed, self.config.error_ratio) || reaches(slow, self.config.slow_ratio))
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs() + 1
    }

    /// Slots are never 0, so that an unused entry is older than any slot.
    fn slot(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.epoch);
        let millis = since.as_secs() * 1_000 + u64::from(since.subsec_millis());
        millis / self.slot_millis + 1
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BreakerCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BreakerCore {
    fn transition_to(&mut self, state: BreakerState, now: Instant) {
        self.state = state;
        self.generation += 1;
        self.opened_at = now;
        self.running_probes = 0;
        self.successful_probes = 0;
        if state == BreakerState::Closed {
            self.buckets = [WindowBucket::default(); BUCKETS];
            // Calls from before the change are not counted after it, so they are not subtracted
            // either.
            self.running = RunningCalls { slots: [(0, 0); SLOTS], older: 0 };
        }
    }

    /// The number of running calls that started before `slot`.
    fn overdue(&mut self, slot: u64) -> u32 {
        if slot <= self.idle_before_slot {
            return 0;
        }
        let count = self.running.started_before(slot);
        if count == 0 {
            self.idle_before_slot = slot;
        }
        count
    }

    fn bucket(&mut self, second: u64) -> &mut WindowBucket {
        let bucket = &mut self.buckets[index(second, BUCKETS)];
        if bucket.second != second {
            *bucket = WindowBucket { second, ..WindowBucket::default() };
        }
        bucket
    }
}

impl BreakerPermit<'_> {
    /// The generation that `Breaker::fail_late` expects.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Ends the call with its result.
    pub(crate) fn record(mut self, succeeded: bool, now: Instant) -> BreakerTransition {
        self.is_recorded = true;
        let mut core = self.breaker.lock();
        if core.generation != self.generation {
            return None;
        }
        let took = now.saturating_duration_since(self.started_at);
        let is_slow = took >= self.breaker.config.slow;
        if self.is_probe {
            core.running_probes -= 1;
            core.successful_probes += u32::from(succeeded && !is_slow);
            let next = if !succeeded || is_slow {
                BreakerState::Open
            } else if core.successful_probes >= PROBES {
                BreakerState::Closed
            } else {
                return None;
            };
            core.transition_to(next, now);
            return Some(next);
        }
        self.finish(&mut core);
        let second = self.breaker.second(now);
        if !succeeded || is_slow {
            core.last_bad_second = second;
        }
        let bucket = core.bucket(second);
        bucket.calls += 1;
        bucket.failed += u32::from(!succeeded);
        bucket.slow += u32::from(is_slow);
        let opens = (!succeeded || is_slow) && self.breaker.should_open(&mut core, now);
        opens.then(|| {
            core.transition_to(BreakerState::Open, now);
            BreakerState::Open
        })
    }

    fn finish(&self, core: &mut BreakerCore) {
        core.running.finish(self.breaker.slot(self.started_at));
    }
}

impl Drop for BreakerPermit<'_> {
    fn drop(&mut self) {
        if self.is_recorded {
            return;
        }
        let mut core = self.breaker.lock();
        if core.generation != self.generation {
            return;
        }
        if self.is_probe {
            core.running_probes -= 1;
        } else {
            self.finish(&mut core);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker(epoch: Instant) -> Breaker {
        Breaker::new(BreakerConfig { minimum: 4, open: 5 * SECOND, ..BreakerConfig::default() }, epoch)
    }

    fn call(breaker: &Breaker, succeeded: bool, now: Instant) -> BreakerTransition {
        breaker.admit(now).map_or(None, |(call, _)| call.record(succeeded, now))
    }

    fn trip(breaker: &Breaker, now: Instant) {
        for _ in 0..4 {
            call(breaker, false, now);
        }
    }

    fn admitted(breaker: &Breaker, now: Instant) -> BreakerPermit<'_> {
        match breaker.admit(now) {
            Ok((call, _)) => call,
            Err((wait, _)) => panic!("rejected for {wait:?}"),
        }
    }

    #[test]
    fn late_failures_open_the_breaker() {
        let now = Instant::now();
        let breaker = breaker(now);
        let generation = admitted(&breaker, now).generation();
        for _ in 0..4 {
            call(&breaker, true, now);
        }
        assert_eq!(breaker.fail_late(generation, now), None);
        assert_eq!(breaker.fail_late(generation + 1, now), None, "of an earlier generation");
        assert_eq!(breaker.fail_late(generation, now), Some(BreakerState::Open));
        assert_eq!(breaker.fail_late(generation, now), None);
    }

    #[test]
    fn open_breaker_rejects_with_the_remaining_time() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        assert_eq!(
            (0..4).map(|_| call(&breaker, false, epoch)).collect::<Vec<_>>(),
            [None, None, None, Some(BreakerState::Open)]
        );
        let (wait, _) = breaker.admit(epoch + 2 * SECOND).err().expect("open");
        assert_eq!(wait, 3 * SECOND);
    }

    #[test]
    fn half_open_closes_after_all_probes_and_opens_on_one_failure() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        assert_eq!(call(&breaker, false, later), Some(BreakerState::Open));
        let later = later + 6 * SECOND;
        assert_eq!(
            (0..3).map(|_| call(&breaker, true, later)).collect::<Vec<_>>(),
            [None, None, Some(BreakerState::Closed)]
        );
        assert_eq!(call(&breaker, false, later), None, "the window is empty after closing");
    }

    #[test]
    fn cancelled_probe_releases_its_slot() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        let probes: Vec<_> = (0..3).map(|_| admitted(&breaker, later)).collect();
        assert!(breaker.admit(later).is_err());
        drop(probes);
        assert!(breaker.admit(later).is_ok());
    }

    #[test]
    fn hanging_calls_open_the_breaker_before_they_end() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        let running: Vec<_> = (0..4).map(|_| admitted(&breaker, epoch)).collect();
        assert!(breaker.admit(epoch + 2 * SECOND).is_ok());
        let (_, change) = breaker.admit(epoch + 5 * SECOND).err().expect("open");
        assert_eq!(change, Some(BreakerState::Open));
        drop(running);
    }

    #[test]
    fn failures_outside_the_window_and_below_the_minimum_do_not_count() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
        assert_eq!(call(&breaker, false, epoch + 11 * SECOND), None);
        let breaker = self::breaker(epoch);
        (0..10).for_each(|_| assert_eq!(call(&breaker, true, epoch), None));
        (0..9).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
        assert_eq!(call(&breaker, false, epoch), Some(BreakerState::Open));
    }
}
