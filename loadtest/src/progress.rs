//! How far a bench is, for whoever waits for it.

use std::time::{Duration, Instant};

/// Samples taken out of all that will be. What lies between them (starting, checking) counts as their time.
pub(crate) struct Progress {
    began: Instant,
    done: usize,
    all: usize,
}

impl Progress {
    pub(crate) fn of(all: usize) -> Self {
        Progress { began: Instant::now(), done: 0, all }
    }

    pub(crate) fn step(&mut self) {
        self.done += 1;
    }

    /// Takes samples off that will not be taken.
    pub(crate) fn skip(&mut self, samples: usize) {
        self.all = self.all.saturating_sub(samples);
    }

    /// The time left, as people say it.
    pub(crate) fn left(&self) -> String {
        spoken(estimate(self.began.elapsed(), self.done, self.all))
    }
}

fn estimate(elapsed: Duration, done: usize, all: usize) -> Duration {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    elapsed / count(done.max(1)) * count(all.saturating_sub(done))
}

fn spoken(left: Duration) -> String {
    let (minutes, seconds) = (left.as_secs() / 60, left.as_secs() % 60);
    if minutes == 0 { format!("{seconds} s left") } else { format!("{minutes} min {seconds:02} s left") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_in_proportion_to_what_is_left() {
        let elapsed = Duration::from_secs(30);
        assert_eq!(estimate(elapsed, 3, 9), Duration::from_secs(60));
        assert_eq!(estimate(elapsed, 0, 2), Duration::from_secs(60));
        assert_eq!(estimate(elapsed, 9, 9), Duration::ZERO);
        assert_eq!(estimate(elapsed, 9, 2), Duration::ZERO);
    }

    #[test]
    fn minutes_are_named_where_there_are_any() {
        assert_eq!(spoken(Duration::from_secs(59)), "59 s left");
        assert_eq!(spoken(Duration::from_secs(185)), "3 min 05 s left");
    }
}
