//! Calls that ended within a time: their rate, their mean latency, and whether the limit held
//! others back meanwhile.

use std::time::Duration;

/// The shortest window.
const TIME_MIN: Duration = Duration::from_millis(100);
/// A window with so few calls in this time ends without the number that it needs.
const FEW_CALLS: usize = 10;
const FEW_CALLS_TIME: Duration = Duration::from_secs(2);
/// Calls of a window after which its latency is as exact as it gets.
const EXACT_CALLS_MAX: usize = 2_000;
/// The longest window with a call.
const TIME_MAX: Duration = Duration::from_secs(5);

/// A window that has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct EndedWindow {
    pub(super) calls: usize,
    /// Calls per second.
    pub(super) rate: f64,
    /// Mean seconds of a call.
    pub(super) latency: f64,
    /// The standard error of `latency`, relative to it.
    pub(super) error: f64,
    /// Whether most calls waited for the limit. If not, the rate is that of the clients.
    pub(super) is_limited: bool,
    /// The longest time that a call waited for the limit.
    pub(super) wait_max: Duration,
    pub(super) in_flight_max: usize,
}

/// A window in progress. Times are those of one clock.
pub(super) struct SampleWindow {
    since: Duration,
    /// The calls that it needs.
    needed: usize,
    /// The largest standard error of the latency.
    error_max: f64,
    calls: usize,
    latency_sum: f64,
    squares_sum: f64,
    in_flight_max: usize,
    starts: usize,
    /// Calls that had to wait, or were rejected.
    limited: usize,
    wait_max: Duration,
}

impl SampleWindow {
    pub(super) fn new((needed, error_max): (usize, f64), now: Duration) -> Self {
        SampleWindow {
            since: now,
            needed,
            error_max,
            calls: 0,
            latency_sum: 0.0,
            squares_sum: 0.0,
            in_flight_max: 0,
            starts: 0,
            limited: 0,
            wait_max: Duration::ZERO,
        }
    }

    /// A call has started after `wait`; `in_flight` run with it.
    pub(super) fn start(&mut self, in_flight: usize, wait: Duration) {
        self.in_flight_max = self.in_flight_max.max(in_flight);
        self.starts += 1;
        self.limited += usize::from(!wait.is_zero());
        self.wait_max = self.wait_max.max(wait);
    }

    /// A call was rejected.
    pub(super) fn reject(&mut self) {
        self.starts += 1;
        self.limited += 1;
    }

    pub(super) fn record(&mut self, latency: Duration) {
        self.calls += 1;
        self.latency_sum += latency.as_secs_f64();
        self.squares_sum += latency.as_secs_f64().powi(2);
    }

    /// The standard error of the mean latency, relative to it.
    fn error(&self) -> f64 {
        let (calls, mean) = (self.calls as f64, self.latency_sum / self.calls as f64);
        let variance = (self.squares_sum / calls - mean * mean).max(0.0);
        (variance / calls).sqrt() / mean.max(1e-9)
    }

    /// Ends the window if it has enough calls for its time.
    pub(super) fn end(&mut self, now: Duration) -> Option<EndedWindow> {
        let time = now.saturating_sub(self.since);
        // At least each of the calls that run at a time once.
        let calls = self.needed.max(self.in_flight_max);
        let is_exact = self.error() <= self.error_max || self.calls >= EXACT_CALLS_MAX;
        let is_due = (time >= TIME_MIN && self.calls >= calls && is_exact)
            || (time >= FEW_CALLS_TIME && self.calls >= FEW_CALLS)
            || (time >= TIME_MAX && self.calls > 0);
        if !is_due {
            return None;
        }
        Some(EndedWindow {
            calls: self.calls,
            rate: self.calls as f64 / time.as_secs_f64(),
            latency: self.latency_sum / self.calls as f64,
            error: self.error(),
            is_limited: 2 * self.limited > self.starts,
            wait_max: self.wait_max,
            in_flight_max: self.in_flight_max,
        })
    }
}
