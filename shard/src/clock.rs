//! Owns what time it is: for entries that a server holds, its own clock, so that all nodes reckon by one; else this machine's.
//!
//! A server tells its time about once a second; in between, the monotonic clock goes on from there. Without any, the machine's wall
//! clock counts. A jump of either does not count at once: it is more often a fault than a mend, and what was believed until then is
//! believed for `DOUBT` more.
//!
//! Refuses to say how long anything took: that is `Instant`'s.
//! Invariant: the wall clock of one node, however wrong, neither ages nor rejuvenates what another node reads from a server.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The clocks of two nodes may differ by this much (lesson `clock-drift`).
pub(crate) const CLOCK_TOLERANCE: Duration = Duration::from_millis(1_500);

/// How long a wall clock that has jumped is not believed. What is mended by then was a fault; what is not may have been the mending.
const DOUBT: Duration = Duration::from_secs(300);

/// A server whose answer took longer than this has not told its time.
const TELLING_MAX: Duration = Duration::from_millis(500);

/// A server that has not told its time for so long is not there; it is asked every second.
const LATELY: Duration = Duration::from_secs(10);

/// What no server has told.
const UNTOLD: i64 = i64::MIN;

/// One moment on both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) unix_ms: u64,
    pub(crate) instant: Instant,
}

#[cfg(test)]
impl Now {
    pub(crate) fn read() -> Self {
        Self { unix_ms: system_ms() as u64, instant: Instant::now() }
    }
}

/// This machine's wall clock, held steady by its monotonic one.
#[derive(Debug)]
pub(crate) struct Wall {
    began: Instant,
    held: Mutex<Held>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    /// Milliseconds since 1970 when the process began.
    base: i64,
    /// Since when the wall clock says otherwise.
    doubted: Option<i64>,
}

impl Held {
    /// `mono`: milliseconds since the process began. What time it is, by a wall clock that says `wall`.
    fn read(&mut self, wall: i64, mono: i64) -> i64 {
        let believed = self.base.saturating_add(mono);
        if wall.abs_diff(believed) <= CLOCK_TOLERANCE.as_millis() as u64 {
            (self.base, self.doubted) = (wall - mono, None);
            return wall;
        }
        let since = *self.doubted.get_or_insert(mono);
        if mono - since < DOUBT.as_millis() as i64 {
            return believed;
        }
        (self.base, self.doubted) = (wall - mono, None);
        wall
    }
}

impl Wall {
    pub(crate) fn new() -> Arc<Self> {
        let held = Held { base: system_ms(), doubted: None };
        Arc::new(Self { began: Instant::now(), held: Mutex::new(held) })
    }

    fn unix_ms(&self, now: Instant) -> i64 {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.read(system_ms(), self.mono(now))
    }

    fn mono(&self, now: Instant) -> i64 {
        now.saturating_duration_since(self.began).as_millis() as i64
    }
}

/// The time at one server.
#[derive(Debug)]
pub(crate) struct Clock {
    wall: Arc<Wall>,
    /// As with the wall clock, a jump is not believed at once.
    held: Mutex<Option<Held>>,
    /// Milliseconds since 1970 by the server's clock when this process began, and when it last told them since then.
    base: AtomicI64,
    heard: AtomicI64,
}

impl Clock {
    pub(crate) fn new(wall: Arc<Wall>) -> Self {
        Self { wall, held: Mutex::new(None), base: AtomicI64::new(UNTOLD), heard: AtomicI64::new(0) }
    }

    /// What a server said when it was asked at `sent`; it said so somewhere in between.
    pub(crate) fn learn(&self, unix_ms: u64, sent: Instant, heard: Instant) {
        let took = heard.saturating_duration_since(sent);
        if took > TELLING_MAX {
            return;
        }
        let (unix_ms, mono) = (i64::try_from(unix_ms).unwrap_or(i64::MAX), self.wall.mono(sent + took / 2));
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.get_or_insert(Held { base: unix_ms.saturating_sub(mono), doubted: None });
        let believed = held.read(unix_ms, mono);
        self.base.store(believed.saturating_sub(mono), Ordering::Relaxed);
        self.heard.store(mono, Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> Now {
        let instant = Instant::now();
        let unix_ms = self.told(instant).unwrap_or_else(|| self.wall.unix_ms(instant));
        Now { unix_ms: u64::try_from(unix_ms).unwrap_or_default(), instant }
    }

    /// By the server, if it has said so lately.
    pub(crate) fn told(&self, now: Instant) -> Option<i64> {
        let (base, mono) = (self.base.load(Ordering::Relaxed), self.wall.mono(now));
        let is_told = base != UNTOLD && mono - self.heard.load(Ordering::Relaxed) < LATELY.as_millis() as i64;
        is_told.then(|| base.saturating_add(mono))
    }
}

/// What time it is, by the first of `clocks` whose server has said, else by the machine.
pub(crate) fn wall_time<'a>(wall: &Wall, clocks: impl IntoIterator<Item = &'a Clock>) -> SystemTime {
    let now = Instant::now();
    let told = clocks.into_iter().find_map(|clock| clock.told(now));
    UNIX_EPOCH + Duration::from_millis(u64::try_from(told.unwrap_or_else(|| wall.unix_ms(now))).unwrap_or_default())
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
    fn a_wall_clock_that_jumps_is_believed_after_a_while_or_when_it_is_back() {
        for jump in [HOUR, -HOUR, 2_000] {
            let mut held = Held { base: 1_000_000, doubted: None };
            assert_eq!(held.read(1_000_100, 100), 1_000_100);
            assert_eq!(held.read(1_000_200 + jump, 200), 1_000_200, "not at once");
            assert_eq!(held.read(1_100_000 + jump, 100_000), 1_100_000);
            assert_eq!(held.read(1_100_100, 100_100), 1_100_100, "it is back");
            assert_eq!(held.read(1_200_000 + jump, 200_000), 1_200_000, "and is doubted anew");
            assert_eq!(held.read(1_499_999 + jump, 499_999), 1_499_999);
            assert_eq!(held.read(1_500_000 + jump, 500_000), 1_500_000 + jump, "it stays");
            assert_eq!(held.read(1_500_001 + jump, 500_001), 1_500_001 + jump);
        }
    }

    #[test]
    fn a_clock_that_is_a_little_off_is_followed() {
        let mut held = Held { base: 0, doubted: None };
        for second in 1..100 {
            let wall = second * 2_000;
            assert_eq!(held.read(wall, second * 1_000), wall);
        }
    }

    #[test]
    fn a_server_that_has_said_so_is_believed_and_one_that_took_long_is_not() {
        let wall = Wall::new();
        let clock = Clock::new(wall.clone());
        let (sent, ms) = (Instant::now(), Duration::from_millis);
        clock.learn(1_000, sent, sent + ms(600));
        assert_eq!(clock.told(sent), None);
        assert!(clock.now().unix_ms.abs_diff(system_ms() as u64) < 1_000);
        clock.learn(1_000_000, sent, sent + ms(20));
        assert_eq!(clock.told(sent + ms(1_010)), Some(1_001_000));
        assert_eq!(clock.told(sent + ms(11_000)), None, "it has been silent for long");
        // An hour ahead from one second to the next.
        clock.learn(4_601_000, sent + ms(1_000), sent + ms(1_020));
        assert_eq!(clock.told(sent + ms(2_010)), Some(1_002_000));
        let other = Clock::new(wall.clone());
        let told = wall_time(&wall, [&other, &clock]).duration_since(UNIX_EPOCH).unwrap();
        assert!(told < Duration::from_secs(1_100), "{told:?}");
    }
}
