//! Progress and remaining time of a bench.

use std::time::{Duration, Instant};

/// Samples taken so far and in total. The time between samples (starts, checks) counts as theirs.
pub(crate) struct BenchProgress {
    started: Instant,
    done: usize,
    total: usize,
}

impl BenchProgress {
    pub(crate) fn new(total: usize) -> Self {
        BenchProgress { started: Instant::now(), done: 0, total }
    }

    pub(crate) fn step(&mut self) {
        self.done += 1;
    }

    /// Removes samples that will not be taken.
    pub(crate) fn skip(&mut self, samples: usize) {
        self.total = self.total.saturating_sub(samples);
    }

    /// Estimated remaining time as text.
    pub(crate) fn time_left(&self) -> String {
        format_time_left(estimate(self.started.elapsed(), self.done, self.total))
    }
}

fn estimate(elapsed: Duration, done: usize, total: usize) -> Duration {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    elapsed / count(done.max(1)) * count(total.saturating_sub(done))
}

fn format_time_left(left: Duration) -> String {
    let (minutes, seconds) = (left.as_secs() / 60, left.as_secs() % 60);
    if minutes == 0 { format!("{seconds} s left") } else { format!("{minutes} min {seconds:02} s left") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_proportional_to_remaining_samples() {
        let elapsed = Duration::from_secs(30);
        assert_eq!(estimate(elapsed, 3, 9), Duration::from_secs(60));
        assert_eq!(estimate(elapsed, 0, 2), Duration::from_secs(60));
        assert_eq!(estimate(elapsed, 9, 9), Duration::ZERO);
        assert_eq!(estimate(elapsed, 9, 2), Duration::ZERO);
    }

    #[test]
    fn minutes_are_shown_if_there_are_any() {
        assert_eq!(format_time_left(Duration::from_secs(59)), "59 s left");
        assert_eq!(format_time_left(Duration::from_secs(185)), "3 min 05 s left");
    }
}
