//! Owns the limiter's notion of time: a [`Moment`] on a monotonic axis, and the one [`Clock`] that reads it from
//! the system.
//!
//! Refuses wall time: a jump of the date moves no limit. Invariant: every decision takes `now` from its caller,
//! so a test turns time by hand, and a request sees one moment throughout.

use std::ops::Add;
use std::time::{Duration, Instant};

/// A point in monotonic time, in nanoseconds since an arbitrary origin of this process (it lasts 584 years).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The origin itself.
    pub const ORIGIN: Moment = Moment(0);

    /// The moment `nanos` nanoseconds after the origin.
    pub const fn from_nanos(nanos: u64) -> Moment {
        Moment(nanos)
    }

    /// Nanoseconds since the origin.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// The time since `earlier`; zero if `earlier` is later, because threads read the clock at slightly
    /// different times.
    pub const fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, duration: Duration) -> Moment {
        Moment(self.0.saturating_add(nanos(duration)))
    }
}

/// Whole nanoseconds of a duration, saturating: a configured `Duration::MAX` means "never", not a panic.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The production clock: moments since it was started. One per process, so that all moments share an origin.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// Starts the clock at [`Moment::ORIGIN`].
    pub fn start() -> Clock {
        Clock { origin: Instant::now() }
    }

    /// Reads the system's monotonic clock.
    pub fn now(&self) -> Moment {
        self.at(Instant::now())
    }

    /// The moment of a clock that was read already; the origin, if that was before.
    pub fn at(&self, instant: Instant) -> Moment {
        Moment::ORIGIN + instant.saturating_duration_since(self.origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_saturates_when_threads_disagree() {
        let early = Moment::from_nanos(5);
        let late = early + Duration::from_nanos(7);
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(late.since(early), Duration::from_nanos(7));
    }

    #[test]
    fn addition_saturates() {
        assert_eq!(Moment::from_nanos(1) + Duration::MAX, Moment::from_nanos(u64::MAX));
    }

    #[test]
    fn the_system_clock_never_goes_back() {
        let clock = Clock::start();
        let first = clock.now();
        assert!(clock.now() >= first);
    }
}
