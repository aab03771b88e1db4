//! The calls that a breaker judges by: ended ones in one-second buckets, and running ones by their
//! start.

use std::time::{Duration, Instant};

use super::config::BreakerConfig;
use super::state::{OpenCause, OpenReason};

/// Maximum number of one-second buckets of a window.
const BUCKETS: usize = 64;
/// Slots of running calls: twice the slow threshold, at an eighth of it each.
const SLOTS: usize = 16;

/// How ratios apply to a window with few calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallMinimum {
    /// They do not, below this number of calls.
    Required(u32),
    /// As if it had at least this number, and the calls that are missing were successes. Failures
    /// that reach a ratio so will not be outweighed by the next calls.
    Assumed(u32),
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

/// A ring of `BUCKETS` one-second buckets of ended calls, and the running calls.
pub(super) struct CallWindow {
    epoch: Instant,
    seconds: u64,
    slow: Duration,
    slot_millis: u64,
    buckets: [WindowBucket; BUCKETS],
    /// The last second with a failed or slow call, 0 for none. While it is outside the window, the
    /// buckets need not be summed.
    last_bad_second: u64,
    /// No running call started before this slot when it was last checked, and none can have started
    /// there since.
    idle_before_slot: u64,
    running: RunningCalls,
}

impl CallWindow {
    pub(super) fn new(config: &BreakerConfig, epoch: Instant) -> Self {
        CallWindow {
            epoch,
            seconds: config.window.as_secs().clamp(1, BUCKETS as u64 - 1),
            slow: config.slow,
            slot_millis: u64::try_from((config.slow / 8).as_millis()).unwrap_or(u64::MAX).max(1),
            buckets: [WindowBucket::default(); BUCKETS],
            last_bad_second: 0,
            idle_before_slot: 0,
            running: RunningCalls { slots: [(0, 0); SLOTS], older: 0 },
        }
    }

    /// Forgets every call. Running ones are not subtracted when they end.
    pub(super) fn clear(&mut self) {
        self.buckets = [WindowBucket::default(); BUCKETS];
        self.last_bad_second = 0;
        self.running = RunningCalls { slots: [(0, 0); SLOTS], older: 0 };
    }

    pub(super) fn start(&mut self, at: Instant) {
        self.running.start(self.slot(at.saturating_duration_since(self.epoch)));
    }

    /// Ends a running call that started at `at`.
    pub(super) fn finish(&mut self, at: Instant) {
        self.running.finish(self.slot(at.saturating_duration_since(self.epoch)));
    }

    /// Counts a call that has ended.
    pub(super) fn record(&mut self, succeeded: bool, is_slow: bool, now: Instant) {
        let second = self.second(now);
        if !succeeded || is_slow {
            self.last_bad_second = second;
        }
        let bucket = self.bucket(second);
        bucket.calls += 1;
        bucket.failed += u32::from(!succeeded);
        bucket.slow += u32::from(is_slow);
    }

    /// Counts a call that was recorded in `second` as failed.
    pub(super) fn fail_late(&mut self, second: u64, now: Instant) {
        self.last_bad_second = self.second(now);
        let is_in_window = second >= self.oldest_second(now);
        let bucket = self.bucket(self.last_bad_second);
        bucket.failed += 1;
        // A call is in the bucket of its response. Outside the window it counts again, so that
        // there are no more failures than calls.
        bucket.calls += u32::from(!is_in_window);
    }

    /// The rule by which the calls of the window open a breaker; `None`: they do not. To be asked
    /// when a call fails or is slow, or while calls hang: a success, or one that leaves the window,
    /// must not open a breaker.
    pub(super) fn open_cause(
        &mut self,
        config: &BreakerConfig,
        minimum: CallMinimum,
        now: Instant,
    ) -> Option<OpenCause> {
        let current = self.second(now);
        let oldest = self.oldest_second(now);
        // A call may run for longer than the window. It is still counted.
        let overdue = self.overdue(now);
        if overdue == 0 && (self.last_bad_second == 0 || self.last_bad_second < oldest) {
            return None;
        }
        let (mut calls, mut failed, mut slow) = (overdue, 0u32, overdue);
        for bucket in &self.buckets {
            if bucket.second >= oldest && bucket.second <= current {
                calls += bucket.calls;
                failed += bucket.failed;
                slow += bucket.slow;
            }
        }
        let base = match minimum {
            CallMinimum::Required(minimum) if calls < minimum => return None,
            CallMinimum::Required(_) => calls,
            CallMinimum::Assumed(minimum) => calls.max(minimum),
        };
        let reaches = |count: u32, ratio: f64| count > 0 && f64::from(count) >= f64::from(base) * ratio;
        let reason = if reaches(failed, config.error_ratio) {
            OpenReason::ErrorRatio
        } else if reaches(slow, config.slow_ratio) {
            OpenReason::SlowRatio
        } else {
            return None;
        };
        Some(OpenCause { reason, calls, failed, slow })
    }

    /// The second of a time, from 1 on.
    pub(super) fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs() + 1
    }

    /// The first second of the window.
    fn oldest_second(&self, now: Instant) -> u64 {
        self.second(now).saturating_sub(self.seconds - 1)
    }

    /// Slots are never 0, so that an unused entry is older than any slot.
    fn slot(&self, since: Duration) -> u64 {
        let millis = since.as_secs() * 1_000 + u64::from(since.subsec_millis());
        millis / self.slot_millis + 1
    }

    /// The number of running calls that have taken as long as a slow one.
    pub(super) fn overdue(&mut self, now: Instant) -> u32 {
        let since = now.saturating_duration_since(self.epoch).checked_sub(self.slow);
        let slot = since.map_or(0, |since| self.slot(since));
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
