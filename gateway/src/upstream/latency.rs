//! The latency of an upstream's recent responses, for the time after which a request is hedged.
//!
//! Counts of the current and the last window of 10 s, in steps of a quarter octave: a percentile is
//! at most 19 % too high. Hedged routes alone record here.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Length of a window.
const WINDOW: Duration = Duration::from_secs(10);
/// The upper bound of the first step.
const FIRST_MICROS: f64 = 250.0;
/// Steps: up to 65 s.
const STEPS: usize = 73;
/// Fewest responses from which a percentile is taken.
const SAMPLES_MIN: u32 = 20;

/// Latencies of the last 10 s to 20 s.
pub(super) struct RecentLatencies(Mutex<LatencyWindows>);

struct LatencyWindows {
    since: Instant,
    current: [u32; STEPS],
    last: [u32; STEPS],
}

impl Default for RecentLatencies {
    fn default() -> Self {
        RecentLatencies(Mutex::new(LatencyWindows { since: Instant::now(), current: [0; STEPS], last: [0; STEPS] }))
    }
}

fn step(latency: Duration) -> usize {
    let quarters = (latency.as_secs_f64() * 1e6 / FIRST_MICROS).log2() * 4.0;
    // The conversion saturates: a time below the first step is in it.
    (quarters.ceil() as usize).min(STEPS - 1)
}

fn upper_bound(step: usize) -> Duration {
    Duration::from_secs_f64(FIRST_MICROS * 2_f64.powf(step as f64 / 4.0) / 1e6)
}

impl RecentLatencies {
    /// Records the time to the head of a response, or the time after which an attempt was given up.
    pub(super) fn record(&self, latency: Duration, now: Instant) {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        windows.advance(now);
        windows.current[step(latency)] += 1;
    }

    /// The 95th percentile; `None` with too few responses.
    pub(super) fn p95(&self, now: Instant) -> Option<Duration> {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        windows.advance(now);
        let counts: Vec<u32> = windows.current.iter().zip(&windows.last).map(|(a, b)| a + b).collect();
        let total: u32 = counts.iter().sum();
        if total < SAMPLES_MIN {
            return None;
        }
        let (wanted, mut sum) = (u64::from(total) * 95, 0);
        let step = counts.iter().position(|count| {
            sum += u64::from(*count) * 100;
            sum >= wanted
        });
        step.map(upper_bound)
    }
}

impl LatencyWindows {
    fn advance(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.since);
        if age < WINDOW {
            return;
        }
        let current = std::mem::replace(&mut self.current, [0; STEPS]);
        self.last = if age < 2 * WINDOW { current } else { [0; STEPS] };
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentile_is_that_of_the_recent_responses() {
        let (latencies, start) = (RecentLatencies::default(), Instant::now());
        let milliseconds = Duration::from_millis;
        for _ in 0..19 {
            latencies.record(milliseconds(10), start);
        }
        assert_eq!(latencies.p95(start), None);
        (0..75).for_each(|_| latencies.record(milliseconds(10), start));
        (0..6).for_each(|_| latencies.record(milliseconds(500), start));
        let p95 = latencies.p95(start).expect("a percentile");
        assert!(p95 >= milliseconds(500) && p95 <= milliseconds(600), "{p95:?}");
        (0..40).for_each(|_| latencies.record(milliseconds(10), start));
        let p95 = latencies.p95(start).expect("a percentile");
        assert!(p95 >= milliseconds(10) && p95 <= milliseconds(12), "{p95:?}");
        assert!(latencies.p95(start + 2 * WINDOW - milliseconds(1)).is_some());
        assert_eq!(latencies.p95(start + 4 * WINDOW), None);
    }

    #[test]
    fn steps_cover_all_times() {
        assert_eq!((step(Duration::ZERO), step(Duration::from_micros(250))), (0, 0));
        assert_eq!(step(Duration::from_secs(3_600)), STEPS - 1);
        for micros in [1_u64, 249, 251, 1_000, 33_333, 60_000_000] {
            let latency = Duration::from_micros(micros);
            let bound = upper_bound(step(latency));
            assert!(bound >= latency && (micros < 250 || bound <= latency.mul_f64(1.2)), "{micros}");
        }
    }
}
