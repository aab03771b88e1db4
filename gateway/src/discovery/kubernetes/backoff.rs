//! Delays between requests after failures: growing, with jitter, and as the server asks for.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

const DELAY_MIN: Duration = Duration::from_millis(500);
/// The longest delay without `Retry-After`: an API server that is back is found within it.
const DELAY_MAX: Duration = Duration::from_secs(10);
/// Longest `Retry-After` that is followed: a server that is overloaded for longer says so again.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// The next delay of one watch.
pub(super) struct WatchBackoff {
    delay: Duration,
    random: RandomState,
    count: u64,
}

impl WatchBackoff {
    pub(super) fn new() -> Self {
        WatchBackoff { delay: DELAY_MIN, random: RandomState::new(), count: 0 }
    }

    /// The next delay is a short one: the last request has succeeded.
    pub(super) fn reset(&mut self) {
        self.delay = DELAY_MIN;
    }

    /// The time until the next request, which doubles each time: at least half of the full delay,
    /// so that a fleet does not return all at once, and never before `retry_after`.
    pub(super) fn next(&mut self, retry_after: Option<Duration>) -> Duration {
        let delay = self.jitter(self.delay);
        self.delay = (2 * self.delay).min(DELAY_MAX);
        match retry_after.map(|asked| asked.min(RETRY_AFTER_MAX)) {
            Some(asked) => asked + delay / 4,
            None => delay,
        }
    }

    /// A time between half of `longest` and `longest`.
    pub(super) fn jitter(&mut self, longest: Duration) -> Duration {
        self.count += 1;
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.count);
        let share = f64::from(u16::try_from(hasher.finish() & 0xffff).unwrap_or(0)) / 65_535.0;
        longest.mul_f64(0.5 + share / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_their_bound_and_differ() {
        let mut backoff = WatchBackoff::new();
        let full = [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000].map(Duration::from_millis);
        for longest in full {
            let delay = backoff.next(None);
            assert!(delay >= longest / 2 && delay <= longest, "{delay:?} of {longest:?}");
        }
        backoff.reset();
        assert!(backoff.next(None) <= DELAY_MIN);
        let jitters: std::collections::HashSet<_> = (0..20).map(|_| backoff.jitter(DELAY_MAX)).collect();
        assert!(jitters.len() > 10);
    }

    #[test]
    fn server_is_not_asked_before_its_time() {
        for (asked, longest) in [(3, 6), (3_600, 63)] {
            let delay = WatchBackoff::new().next(Some(Duration::from_secs(asked)));
            assert!(delay >= Duration::from_secs(asked.min(60)) && delay < Duration::from_secs(longest), "{delay:?}");
        }
    }
}
