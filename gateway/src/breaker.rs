//! The circuit breaker of a route: closed (calls flow), open (calls are rejected), half-open (a few calls probe).
//!
//! It opens on a share of failed or slow calls over a window of one-second buckets; a call that is still running counts as
//! slow from the moment it passes the threshold, so an upstream that hangs opens it too. Half-open lets `PROBES` calls
//! through; all must succeed to close it, one failure opens it again. A probe that is dropped gives its place back.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When calls to an upstream are cut off (`[upstreams.X.breaker]`); every route of the upstream has a breaker of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Share of failed calls in the window, above 0 and up to 1, at which the breaker opens.
    pub error_ratio: f64,
    /// A call that takes longer is slow, from that moment on, ended or not.
    pub slow: Duration,
    /// Share of slow calls in the window, above 0 and up to 1, at which the breaker opens.
    pub slow_ratio: f64,
    /// Calls in the window before either ratio counts.
    pub minimum: u32,
    /// How far back calls count.
    pub window: Duration,
    /// How long calls are rejected before probes are let through.
    pub open: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            error_ratio: 0.5,
            slow: Duration::from_secs(3),
            slow_ratio: 0.5,
            minimum: 20,
            window: Duration::from_secs(10),
            open: Duration::from_secs(5),
        }
    }
}

/// Calls that a half-open breaker lets through.
const PROBES: u32 = 3;
/// Most one-second buckets of a window.
const BUCKETS: usize = 64;
/// Slots of running calls: twice the slow threshold at an eighth of it each.
const SLOTS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::Open => "open",
            State::HalfOpen => "half-open",
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Bucket {
    second: u64,
    calls: u32,
    failed: u32,
    slow: u32,
}

/// Calls that still run, by when they began: in slots of an eighth of the slow threshold, and all older ones together.
struct Running {
    slots: [(u64, u32); SLOTS],
    older: u32,
}

impl Running {
    fn enter(&mut self, slot: u64) {
        let place = &mut self.slots[index(slot, SLOTS)];
        if place.0 != slot {
            self.older += place.1;
            *place = (slot, 0);
        }
        place.1 += 1;
    }

    fn leave(&mut self, slot: u64) {
        let place = &mut self.slots[index(slot, SLOTS)];
        let count = if place.0 == slot { &mut place.1 } else { &mut self.older };
        *count = count.saturating_sub(1);
    }

    /// Those that began before `slot`.
    fn before(&self, slot: u64) -> u32 {
        self.older + self.slots.iter().filter(|place| place.0 < slot).map(|place| place.1).sum::<u32>()
    }
}

fn index(number: u64, length: usize) -> usize {
    usize::try_from(number % length as u64).unwrap_or(0)
}

struct Core {
    state: State,
    /// Raised with every change of state: a call that began before is not counted after.
    generation: u64,
    opened: Instant,
    probing: u32,
    proved: u32,
    buckets: [Bucket; BUCKETS],
    /// The last second in which a call failed or was slow, 0 for none: while the window is clear of it, nothing needs to be summed up.
    trouble: u64,
    /// Before this slot no call was running when it was last looked at, and none can have begun there since.
    clear: u64,
    running: Running,
}

/// The breaker of one route.
pub struct Breaker {
    settings: Settings,
    begin: Instant,
    slot_millis: u64,
    core: Mutex<Core>,
}

/// A call that was let through. Dropping it without a verdict counts neither way.
pub struct Call<'a> {
    breaker: &'a Breaker,
    began: Instant,
    generation: u64,
    is_probe: bool,
    is_judged: bool,
}

/// A change of state that a verdict or an admission brought about, for the caller to announce.
pub type Change = Option<State>;

impl Breaker {
    pub fn new(settings: Settings, now: Instant) -> Self {
        let core = Core {
            state: State::Closed,
            generation: 0,
            opened: now,
            probing: 0,
            proved: 0,
            buckets: [Bucket::default(); BUCKETS],
            trouble: 0,
            clear: 0,
            running: Running { slots: [(0, 0); SLOTS], older: 0 },
        };
        let slot_millis = u64::try_from((settings.slow / 8).as_millis()).unwrap_or(u64::MAX).max(1);
        Breaker { settings, begin: now, slot_millis, core: Mutex::new(core) }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn state(&self) -> State {
        self.lock().state
    }

    /// Lets a call through.
    ///
    /// # Errors
    /// How long until it is worth asking again.
    pub fn admit(&self, now: Instant) -> Result<(Call<'_>, Change), (Duration, Change)> {
        let mut core = self.lock();
        let mut change = None;
        if core.state == State::Closed && self.is_tripped(&mut core, now) {
            // Nothing ends while everything hangs, so the next call asks.
            core.turn(State::Open, now);
            change = Some(State::Open);
        }
        if core.state == State::Open {
            let waited = now.saturating_duration_since(core.opened);
            if waited < self.settings.open {
                return Err((self.settings.open - waited, change));
            }
            core.turn(State::HalfOpen, now);
            change = Some(State::HalfOpen);
        }
        let is_probe = core.state == State::HalfOpen;
        if is_probe {
            if core.probing + core.proved >= PROBES {
                return Err((self.settings.open, change));
            }
            core.probing += 1;
        } else {
            core.running.enter(self.slot(now));
        }
        let call = Call { breaker: self, began: now, generation: core.generation, is_probe, is_judged: false };
        Ok((call, change))
    }

    /// Counts a call as failed after all: its answer began well and broke off. `generation` is that of its admission.
    pub fn fail_late(&self, generation: u64, now: Instant) -> Change {
        let mut core = self.lock();
        if core.generation != generation || core.state == State::Open {
            return None;
        }
        core.trouble = self.second(now);
        core.bucket(self.second(now)).failed += 1;
        // The call itself is in its bucket since its answer began.
        (core.state == State::HalfOpen || self.is_tripped(&mut core, now)).then(|| {
            core.turn(State::Open, now);
            State::Open
        })
    }

    fn is_tripped(&self, core: &mut Core, now: Instant) -> bool {
        let this = self.second(now);
        let oldest = this.saturating_sub(self.settings.window.as_secs().clamp(1, BUCKETS as u64 - 1) - 1);
        // A call may run for longer than the window: it goes on counting.
        let hanging = now.checked_sub(self.settings.slow).map_or(0, |at| core.hanging(self.slot(at)));
        if hanging == 0 && (core.trouble == 0 || core.trouble < oldest) {
            return false;
        }
        let (mut calls, mut failed, mut slow) = (hanging, 0u32, hanging);
        for bucket in &core.buckets {
            if bucket.second >= oldest && bucket.second <= this {
                calls += bucket.calls;
                failed += bucket.failed;
                slow += bucket.slow;
            }
        }
        let share = |part: u32, ratio: f64| part > 0 && f64::from(part) >= f64::from(calls) * ratio;
        calls >= self.settings.minimum
            && (share(failed, self.settings.error_ratio) || share(slow, self.settings.slow_ratio))
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begin).as_secs() + 1
    }

    /// Slots are never 0, so that an unused place is older than any.
    fn slot(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.begin);
        let millis = since.as_secs() * 1_000 + u64::from(since.subsec_millis());
        millis / self.slot_millis + 1
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    fn turn(&mut self, state: State, now: Instant) {
        self.state = state;
        self.generation += 1;
        self.opened = now;
        self.probing = 0;
        self.proved = 0;
        if state == State::Closed {
            self.buckets = [Bucket::default(); BUCKETS];
            // Calls from before the change are not counted after, so they do not leave either.
            self.running = Running { slots: [(0, 0); SLOTS], older: 0 };
        }
    }

    /// Calls that began before `slot` and still run.
    fn hanging(&mut self, slot: u64) -> u32 {
        if slot <= self.clear {
            return 0;
        }
        let count = self.running.before(slot);
        if count == 0 {
            self.clear = slot;
        }
        count
    }

    fn bucket(&mut self, second: u64) -> &mut Bucket {
        let bucket = &mut self.buckets[index(second, BUCKETS)];
        if bucket.second != second {
            *bucket = Bucket { second, ..Bucket::default() };
        }
        bucket
    }
}

impl Call<'_> {
    /// What `Breaker::fail_late` asks for.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Ends the call with its verdict.
    pub fn judge(mut self, succeeded: bool, now: Instant) -> Change {
        self.is_judged = true;
        let mut core = self.breaker.lock();
        if core.generation != self.generation {
            return None;
        }
        let took = now.saturating_duration_since(self.began);
        let is_slow = took >= self.breaker.settings.slow;
        if self.is_probe {
            core.probing -= 1;
            core.proved += u32::from(succeeded && !is_slow);
            let next = if !succeeded || is_slow {
                State::Open
            } else if core.proved >= PROBES {
                State::Closed
            } else {
                return None;
            };
            core.turn(next, now);
            return Some(next);
        }
        self.leave(&mut core);
        let second = self.breaker.second(now);
        if !succeeded || is_slow {
            core.trouble = second;
        }
        let bucket = core.bucket(second);
        bucket.calls += 1;
        bucket.failed += u32::from(!succeeded);
        bucket.slow += u32::from(is_slow);
        let trips = (!succeeded || is_slow) && self.breaker.is_tripped(&mut core, now);
        trips.then(|| {
            core.turn(State::Open, now);
            State::Open
        })
    }

    fn leave(&self, core: &mut Core) {
        core.running.leave(self.breaker.slot(self.began));
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if self.is_judged {
            return;
        }
        let mut core = self.breaker.lock();
        if core.generation != self.generation {
            return;
        }
        if self.is_probe {
            core.probing -= 1;
        } else {
            self.leave(&mut core);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker(begin: Instant) -> Breaker {
        Breaker::new(Settings { minimum: 4, open: 5 * SECOND, ..Settings::default() }, begin)
    }

    fn call(breaker: &Breaker, succeeded: bool, now: Instant) -> Change {
        breaker.admit(now).map_or(None, |(call, _)| call.judge(succeeded, now))
    }

    fn trip(breaker: &Breaker, now: Instant) {
        for _ in 0..4 {
            call(breaker, false, now);
        }
    }

    fn admitted(breaker: &Breaker, now: Instant) -> Call<'_> {
        match breaker.admit(now) {
            Ok((call, _)) => call,
            Err((wait, _)) => panic!("rejected for {wait:?}"),
        }
    }

    #[test]
    fn answers_that_break_off_open_it_too() {
        let now = Instant::now();
        let breaker = breaker(now);
        let generation = admitted(&breaker, now).generation();
        for _ in 0..4 {
            call(&breaker, true, now);
        }
        assert_eq!(breaker.fail_late(generation, now), None);
        assert_eq!(breaker.fail_late(generation + 1, now), None, "of another time");
        assert_eq!(breaker.fail_late(generation, now), Some(State::Open));
        assert_eq!(breaker.fail_late(generation, now), None);
    }

    #[test]
    fn open_rejects_and_says_how_long() {
        let begin = Instant::now();
        let breaker = breaker(begin);
        assert_eq!(
            (0..4).map(|_| call(&breaker, false, begin)).collect::<Vec<_>>(),
            [None, None, None, Some(State::Open)]
        );
        let (wait, _) = breaker.admit(begin + 2 * SECOND).err().expect("open");
        assert_eq!(wait, 3 * SECOND);
    }

    #[test]
    fn half_open_closes_after_all_probes_and_opens_on_one_failure() {
        let begin = Instant::now();
        let breaker = breaker(begin);
        trip(&breaker, begin);
        let later = begin + 6 * SECOND;
        assert_eq!(call(&breaker, false, later), Some(State::Open));
        let later = later + 6 * SECOND;
        assert_eq!((0..3).map(|_| call(&breaker, true, later)).collect::<Vec<_>>(), [None, None, Some(State::Closed)]);
        assert_eq!(call(&breaker, false, later), None, "the window starts anew");
    }

    #[test]
    fn a_cancelled_probe_gives_its_place_back() {
        let begin = Instant::now();
        let breaker = breaker(begin);
        trip(&breaker, begin);
        let later = begin + 6 * SECOND;
        let probes: Vec<_> = (0..3).map(|_| admitted(&breaker, later)).collect();
        assert!(breaker.admit(later).is_err());
        drop(probes);
        assert!(breaker.admit(later).is_ok());
    }

    #[test]
    fn an_upstream_that_hangs_opens_it_though_nothing_ends() {
        let begin = Instant::now();
        let breaker = breaker(begin);
        let running: Vec<_> = (0..4).map(|_| admitted(&breaker, begin)).collect();
        assert!(breaker.admit(begin + 2 * SECOND).is_ok());
        let (_, change) = breaker.admit(begin + 5 * SECOND).err().expect("open");
        assert_eq!(change, Some(State::Open));
        drop(running);
    }

    #[test]
    fn old_failures_are_forgotten_and_few_do_not_count() {
        let begin = Instant::now();
        let breaker = breaker(begin);
        (0..3).for_each(|_| assert_eq!(call(&breaker, false, begin), None));
        assert_eq!(call(&breaker, false, begin + 11 * SECOND), None);
        let breaker = self::breaker(begin);
        (0..10).for_each(|_| assert_eq!(call(&breaker, true, begin), None));
        (0..9).for_each(|_| assert_eq!(call(&breaker, false, begin), None));
        assert_eq!(call(&breaker, false, begin), Some(State::Open));
    }
}
