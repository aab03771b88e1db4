//! Owns the current time: for entries that a server holds, that server's clock, so that all nodes
//! use the same one; otherwise this machine's clock.
//!
//! Each server's time is queried about once a second and extrapolated with the monotonic clock in
//! between. Without a server's time, the machine's wall clock is used. A jump of either clock is
//! not applied at once: it is more often a fault than a correction, and the previous time is kept
//! for `HOLD_DOWN`.
//!
//! Refuses to measure durations: that is the task of `Instant`.
//! Invariant: the wall clock of one node, however wrong, changes neither the age nor the expiry of
//! entries that another node reads from a server.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tolerated difference between the clocks of two nodes (lesson `clock-drift`).
pub(crate) const CLOCK_TOLERANCE: Duration = Duration::from_millis(1_500);

/// How long a clock that has jumped is ignored. A jump reversed within this time was a fault; a
/// jump that persists may have been the correction.
const HOLD_DOWN: Duration = Duration::from_secs(300);

/// A server's time is ignored if its reply took longer than this.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(500);

/// A server's time is used for this long after its last reply; it is queried every second.
const SERVER_TIME_MAX_AGE: Duration = Duration::from_secs(10);

/// Two clocks differ in speed by at most 1 in so many: NTP slews a clock by up to 1 in 2,000.
const SPEED_TOLERANCE: i64 = 1_000;

/// Value of `base_ms` while the server's time is unknown.
const UNKNOWN: i64 = i64::MIN;

/// One point in time on the wall clock and on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClockReading {
    pub(crate) unix_ms: u64,
    pub(crate) instant: Instant,
}

#[cfg(test)]
impl ClockReading {
    pub(crate) fn from_system() -> Self {
        Self { unix_ms: system_ms() as u64, instant: Instant::now() }
    }
}

/// This machine's wall clock, filtered against jumps with the monotonic clock.
#[derive(Debug)]
pub(crate) struct WallClock {
    created: Instant,
    filter: Mutex<JumpFilter>,
}

/// State of the jump filter of one clock: the accepted offset from the monotonic clock, and the
/// start of a jump that is held down for `HOLD_DOWN`.
#[derive(Clone, Copy, Debug)]
struct JumpFilter {
    /// Unix time in milliseconds at which the process started.
    base_ms: i64,
    /// Monotonic time at which the clock jumped; `None` while it agrees.
    jumped_at: Option<i64>,
}

impl JumpFilter {
    /// Returns the filtered time for a clock that reads `wall_ms`, `monotonic_ms` after the process
    /// started.
    fn apply(&mut self, wall_ms: i64, monotonic_ms: i64) -> i64 {
        let expected_ms = self.base_ms.saturating_add(monotonic_ms);
        if wall_ms.abs_diff(expected_ms) <= CLOCK_TOLERANCE.as_millis() as u64 {
            (self.base_ms, self.jumped_at) = (wall_ms - monotonic_ms, None);
            return wall_ms;
        }
        let since = *self.jumped_at.get_or_insert(monotonic_ms);
        if monotonic_ms - since < HOLD_DOWN.as_millis() as i64 {
            return expected_ms;
        }
        (self.base_ms, self.jumped_at) = (wall_ms - monotonic_ms, None);
        wall_ms
    }
}

impl WallClock {
    pub(crate) fn new() -> Arc<Self> {
        let filter = JumpFilter { base_ms: system_ms(), jumped_at: None };
        Arc::new(Self { created: Instant::now(), filter: Mutex::new(filter) })
    }

    fn unix_ms(&self, now: Instant) -> i64 {
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        filter.apply(system_ms(), self.monotonic_ms(now))
    }

    fn monotonic_ms(&self, now: Instant) -> i64 {
        now.saturating_duration_since(self.created).as_millis() as i64
    }
}

/// The clock of one server: its last reported time, extrapolated with the monotonic clock.
#[derive(Debug)]
pub(crate) struct ServerClock {
    wall: Arc<WallClock>,
    /// Jumps are filtered as for the wall clock.
    filter: Mutex<Option<JumpFilter>>,
    /// The server's Unix time in milliseconds when this process started.
    base_ms: AtomicI64,
    /// Time of the last reading, in milliseconds since this process started.
    updated_at: AtomicI64,
    /// As `base_ms`, but never too late, and jumps are followed at once.
    earliest_base_ms: AtomicI64,
    /// Time of the last reading of `earliest_base_ms`, in milliseconds since this process started.
    earliest_updated_at: AtomicI64,
}

impl ServerClock {
    pub(crate) fn new(wall: Arc<WallClock>) -> Self {
        let [base_ms, earliest_base_ms] = [UNKNOWN; 2].map(AtomicI64::new);
        let [updated_at, earliest_updated_at] = [0; 2].map(AtomicI64::new);
        Self { wall, filter: Mutex::new(None), base_ms, updated_at, earliest_base_ms, earliest_updated_at }
    }

    /// Records the time in a reply of the server to a query sent at `sent`; the reading is dated to
    /// the middle of the round trip.
    pub(crate) fn record_server_time(&self, unix_ms: u64, sent: Instant, received: Instant) {
        let round_trip = received.saturating_duration_since(sent);
        let unix_ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
        // The server read its clock at the latest when the reply arrived. One more millisecond,
        // because both times are rounded.
        let received_ms = self.wall.monotonic_ms(received) + 1;
        self.earliest_base_ms.store(unix_ms.saturating_sub(received_ms), Ordering::Relaxed);
        self.earliest_updated_at.store(received_ms, Ordering::Relaxed);
        if round_trip > ROUND_TRIP_MAX {
            return;
        }
        let monotonic_ms = self.wall.monotonic_ms(sent + round_trip / 2);
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        let filter =
            filter.get_or_insert(JumpFilter { base_ms: unix_ms.saturating_sub(monotonic_ms), jumped_at: None });
        let expected_ms = filter.apply(unix_ms, monotonic_ms);
        self.base_ms.store(expected_ms.saturating_sub(monotonic_ms), Ordering::Relaxed);
        self.updated_at.store(monotonic_ms, Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> ClockReading {
        let instant = Instant::now();
        let unix_ms = self.server_time_ms(instant).unwrap_or_else(|| self.wall.unix_ms(instant));
        ClockReading { unix_ms: u64::try_from(unix_ms).unwrap_or_default(), instant }
    }

    /// A time that the server's clock had reached at `instant`; `None` if the last reading is too
    /// old. It is early by at most the round trip of that reading and a thousandth of the time
    /// between the two, by which the clocks may differ in speed. Unlike `now`, it follows a jump of
    /// the clock at once: it is compared with times that the server itself recorded.
    pub(crate) fn earliest_ms(&self, instant: Instant) -> Option<u64> {
        let base_ms = self.earliest_base_ms.load(Ordering::Relaxed);
        let updated_at = self.earliest_updated_at.load(Ordering::Relaxed);
        let age_ms = self.wall.monotonic_ms(Instant::now()) - updated_at;
        let is_recent = base_ms != UNKNOWN && age_ms < SERVER_TIME_MAX_AGE.as_millis() as i64;
        let instant_ms = self.wall.monotonic_ms(instant);
        let drift_ms = (instant_ms - updated_at).abs() / SPEED_TOLERANCE;
        is_recent.then(|| u64::try_from(base_ms.saturating_add(instant_ms) - drift_ms).unwrap_or_default())
    }

    /// The server's time, if it is recent enough.
    pub(crate) fn server_time_ms(&self, now: Instant) -> Option<i64> {
        let (base_ms, monotonic_ms) = (self.base_ms.load(Ordering::Relaxed), self.wall.monotonic_ms(now));
        let is_recent = base_ms != UNKNOWN
            && monotonic_ms - self.updated_at.load(Ordering::Relaxed) < SERVER_TIME_MAX_AGE.as_millis() as i64;
        is_recent.then(|| base_ms.saturating_add(monotonic_ms))
    }
}

/// The current time by the first of `clocks` that has a recent reading, otherwise by this machine.
pub(crate) fn wall_time<'a>(wall: &WallClock, clocks: impl IntoIterator<Item = &'a ServerClock>) -> SystemTime {
    let now = Instant::now();
    let server_time_ms = clocks.into_iter().find_map(|clock| clock.server_time_ms(now));
    UNIX_EPOCH
        + Duration::from_millis(u64::try_from(server_time_ms.unwrap_or_else(|| wall.unix_ms(now))).unwrap_or_default())
}

fn system_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000;

    #[test]
    fn earliest_time_is_never_later_than_the_servers_and_follows_jumps() {
        let clock = ServerClock::new(WallClock::new());
        let (start, ms) = (Instant::now(), Duration::from_millis);
        assert_eq!(clock.earliest_ms(start), None);
        // The server may have read its clock when the request was sent or when the reply arrived.
        clock.record_server_time(1_000_000, start, start + ms(600));
        let earliest = clock.earliest_ms(start + ms(700)).unwrap();
        assert!((1_000_098..=1_000_100).contains(&earliest), "{earliest}");
        let before = clock.earliest_ms(start).unwrap();
        assert!((999_398..=999_400).contains(&before), "{before}");
        clock.record_server_time(9_000_000, start, start + ms(10));
        assert!(clock.earliest_ms(start).unwrap() > 8_999_000);
        // A fetch of 100 s began before, while the server's clock was slower or faster.
        clock.record_server_time(9_100_050, start + ms(100_000), start + ms(100_000));
        let long_ago = clock.earliest_ms(start).unwrap();
        assert!((8_999_900..=9_000_000).contains(&long_ago), "{long_ago}");
    }

    #[test]
    fn jump_is_applied_after_the_hold_down_and_forgotten_if_reversed() {
        for jump in [HOUR, -HOUR, 2_000] {
            let mut filter = JumpFilter { base_ms: 1_000_000, jumped_at: None };
            assert_eq!(filter.apply(1_000_100, 100), 1_000_100);
            assert_eq!(filter.apply(1_000_200 + jump, 200), 1_000_200, "during the hold-down");
            assert_eq!(filter.apply(1_100_000 + jump, 100_000), 1_100_000);
            assert_eq!(filter.apply(1_100_100, 100_100), 1_100_100, "the jump is reversed");
            assert_eq!(filter.apply(1_200_000 + jump, 200_000), 1_200_000, "a new jump restarts the hold-down");
            assert_eq!(filter.apply(1_499_999 + jump, 499_999), 1_499_999);
            assert_eq!(filter.apply(1_500_000 + jump, 500_000), 1_500_000 + jump, "the jump persists");
            assert_eq!(filter.apply(1_500_001 + jump, 500_001), 1_500_001 + jump);
        }
    }

    #[test]
    fn drift_within_the_tolerance_is_followed() {
        let mut filter = JumpFilter { base_ms: 0, jumped_at: None };
        for second in 1..100 {
            let wall = second * 2_000;
            assert_eq!(filter.apply(wall, second * 1_000), wall);
        }
    }

    #[test]
    fn server_time_is_used_unless_the_reply_was_slow_or_is_old() {
        let wall = WallClock::new();
        let clock = ServerClock::new(wall.clone());
        let (sent, ms) = (Instant::now(), Duration::from_millis);
        clock.record_server_time(1_000, sent, sent + ms(600));
        assert_eq!(clock.server_time_ms(sent), None);
        assert!(clock.now().unix_ms.abs_diff(system_ms() as u64) < 1_000);
        clock.record_server_time(1_000_000, sent, sent + ms(20));
        assert_eq!(clock.server_time_ms(sent + ms(1_010)), Some(1_001_000));
        assert_eq!(clock.server_time_ms(sent + ms(11_000)), None, "the last reply is too old");
        // The server's clock jumps ahead by an hour.
        clock.record_server_time(4_601_000, sent + ms(1_000), sent + ms(1_020));
        assert_eq!(clock.server_time_ms(sent + ms(2_010)), Some(1_002_000));
        let other = ServerClock::new(wall.clone());
        let server_time_ms = wall_time(&wall, [&other, &clock]).duration_since(UNIX_EPOCH).unwrap();
        assert!(server_time_ms < Duration::from_secs(1_100), "{server_time_ms:?}");
    }
}
