//! Latencies of an endpoint's recent responses, for its percentiles.
//!
//! Counts of the current and the last window of 30 s, in steps of an eighth of an octave: a
//! percentile is at most an eighth too high. Recording is one addition; threads may lose a few
//! counts when a window begins.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Length of a window in milliseconds.
const WINDOW: u64 = 30_000;
/// The binary logarithm of the end of the first step in microseconds: 128 us.
const FIRST: u32 = 7;
/// Octaves up to 67 s.
const OCTAVES: u32 = 19;
const STEPS: usize = 1 + 8 * OCTAVES as usize;

/// Recent latencies. Times are in milliseconds of one epoch.
pub(super) struct LatencyCounts {
    windows: [[AtomicU32; STEPS]; 2],
    /// The number of the current window.
    current: AtomicU64,
}

impl Default for LatencyCounts {
    fn default() -> Self {
        let window = || std::array::from_fn(|_| AtomicU32::new(0));
        LatencyCounts { windows: [window(), window()], current: AtomicU64::new(0) }
    }
}

fn step(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    let Some(octave) = micros.checked_ilog2().and_then(|log| log.checked_sub(FIRST)) else { return 0 };
    if octave >= OCTAVES {
        return STEPS - 1;
    }
    // The three bits after the first one.
    let eighth = (micros >> (octave + FIRST - 3)) & 7;
    1 + usize::try_from(u64::from(octave) * 8 + eighth).unwrap_or(STEPS - 2)
}

/// The end of a step.
fn upper_bound(step: usize) -> Duration {
    let first = 1_u64 << FIRST;
    let Some(step) = step.checked_sub(1) else { return Duration::from_micros(first) };
    let (octave, eighth) = ((step / 8) as u32, (step % 8) as u64);
    Duration::from_micros((first << octave) * (9 + eighth) / 8)
}

impl LatencyCounts {
    pub(super) fn record(&self, latency: Duration, now: u64) {
        self.advance(now);
        self.windows[parity(now / WINDOW)][step(latency)].fetch_add(1, Relaxed);
    }

    /// The latencies below which these percentages of the last responses were; `None` without any.
    pub(super) fn percentiles<const N: usize>(&self, percents: [u64; N], now: u64) -> Option<[Duration; N]> {
        self.advance(now);
        let [a, b] = &self.windows;
        let counts: Vec<u64> =
            a.iter().zip(b).map(|(a, b)| u64::from(a.load(Relaxed)) + u64::from(b.load(Relaxed))).collect();
        let total: u64 = counts.iter().sum();
        (total > 0).then(|| {
            percents.map(|percent| {
                let (wanted, mut sum) = ((total * percent).div_ceil(100).max(1), 0);
                let reached = counts.iter().position(|count| {
                    sum += count;
                    sum >= wanted
                });
                upper_bound(reached.unwrap_or(STEPS - 1))
            })
        })
    }

    /// Clears what is older than the last window.
    fn advance(&self, now: u64) {
        let (number, before) = (now / WINDOW, self.current.load(Relaxed));
        if number <= before || self.current.compare_exchange(before, number, Relaxed, Relaxed).is_err() {
            return;
        }
        let clear = |window: &[AtomicU32; STEPS]| window.iter().for_each(|count| count.store(0, Relaxed));
        clear(&self.windows[parity(number)]);
        if number > before + 1 {
            clear(&self.windows[1 - parity(number)]);
        }
    }
}

fn parity(number: u64) -> usize {
    usize::from(number % 2 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_is_in_its_step() {
        let mut micros = 1_u64;
        while micros < 100_000_000 {
            let (latency, step) = (Duration::from_micros(micros), step(Duration::from_micros(micros)));
            assert!(latency < upper_bound(step) || step == STEPS - 1, "{latency:?}");
            assert!(step == 0 || upper_bound(step - 1) <= latency, "{latency:?}");
            micros += micros / 7 + 1;
        }
    }

    #[test]
    fn percentiles_are_those_of_the_last_windows() {
        let counts = LatencyCounts::default();
        assert_eq!(counts.percentiles([50], 0), None);
        (1..=100).for_each(|millis| counts.record(Duration::from_millis(millis), 0));
        let of = |now| counts.percentiles([50, 99], now).map(|all| all.map(|latency| latency.as_secs_f64() * 1e3));
        let [p50, p99] = of(WINDOW).expect("the last window");
        assert!((50.0..=57.0).contains(&p50) && (99.0..=112.0).contains(&p99), "{p50} {p99}");
        counts.record(Duration::from_secs(1), WINDOW);
        assert!(of(WINDOW).is_some_and(|[p50, _]| p50 < 60.0));
        assert!(of(2 * WINDOW).is_some_and(|[p50, _]| p50 > 900.0), "the first window has ended");
        assert_eq!(of(9 * WINDOW), None);
    }
}
