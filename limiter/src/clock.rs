//! The limiter's time: [`MonotonicTime`], and the [`MonotonicClock`] that reads it from the system.
//!
//! Wall time is not used: a jump of the date changes no limit. Invariant: every decision takes
//! `now` from its caller, so tests control the time and a request sees one time throughout.

use std::ops::Add;
use std::time::{Duration, Instant};

/// A point in monotonic time, in nanoseconds since an arbitrary origin of this process. The range
/// is 584 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MonotonicTime(u64);

impl MonotonicTime {
    /// The origin itself.
    pub const ORIGIN: MonotonicTime = MonotonicTime(0);

    /// The time `nanos` nanoseconds after the origin.
    pub const fn from_nanos(nanos: u64) -> MonotonicTime {
        MonotonicTime(nanos)
    }

    /// Nanoseconds since the origin.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// The duration since `earlier`; zero if `earlier` is later, because threads read the clock at
    /// slightly different times.
    pub const fn since(self, earlier: MonotonicTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for MonotonicTime {
    type Output = MonotonicTime;

    fn add(self, duration: Duration) -> MonotonicTime {
        MonotonicTime(self.0.saturating_add(nanos(duration)))
    }
}

/// Whole nanoseconds of a duration, saturating: a configured `Duration::MAX` means "never" and does
/// not panic.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The production clock: time since it was started. One per process, so that all times share an
/// origin.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock {
    origin: Instant,
}

impl MonotonicClock {
    /// Starts the clock at [`MonotonicTime::ORIGIN`].
    pub fn start() -> MonotonicClock {
        MonotonicClock { origin: Instant::now() }
    }

    /// Reads the system's monotonic clock.
    pub fn now(&self) -> MonotonicTime {
        self.at(Instant::now())
    }

    /// The time of an instant that was read already; the origin if that was before.
    pub fn at(&self, instant: Instant) -> MonotonicTime {
        MonotonicTime::ORIGIN + instant.saturating_duration_since(self.origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_saturates_when_threads_disagree() {
        let early = MonotonicTime::from_nanos(5);
        let late = early + Duration::from_nanos(7);
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(late.since(early), Duration::from_nanos(7));
    }

    #[test]
    fn addition_saturates() {
        assert_eq!(MonotonicTime::from_nanos(1) + Duration::MAX, MonotonicTime::from_nanos(u64::MAX));
    }

    #[test]
    fn the_system_clock_is_monotonic() {
        let clock = MonotonicClock::start();
        let first = clock.now();
        assert!(clock.now() >= first);
    }
}
