//! The circuit breaker of a route: closed (calls are admitted), open (calls are rejected),
//! half-open (a few calls probe).
//!
//! The breaker opens at a ratio of failed or slow calls over a window of one-second buckets. The
//! time of a call starts when the origin has the whole request: the time that a client takes to
//! send it is not the origin's. A running call counts as slow as soon as it passes the threshold,
//! so a hanging upstream opens the breaker too. A permit that is dropped without a result counts as
//! neither success nor failure; calls that fail by the client's fault or by a limit of the gateway
//! end like this, so that no client can open the breaker of a healthy origin.
//!
//! Half-open admits `PROBES` calls: all must succeed to close the breaker, and one failure opens it
//! again. A dropped probe frees its slot, and a probe whose client does not send its request within
//! `PROBE_REQUEST_TIMEOUT` loses it to the next call.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Thresholds of the circuit breaker (`[upstreams.X.breaker]`). Every route of the upstream has its
/// own breaker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BreakerConfig {
    /// Ratio of failed calls in the window, above 0 and up to 1, at which the breaker opens.
    pub(crate) error_ratio: f64,
    /// Duration at which a call counts as slow, whether it has ended or not.
    pub(crate) slow: Duration,
    /// Ratio of slow calls in the window, above 0 and up to 1, at which the breaker opens.
    pub(crate) slow_ratio: f64,
    /// Minimum number of calls in the window before either ratio applies.
    pub(crate) minimum: u32,
    /// Length of the window.
    pub(crate) window: Duration,
    /// How long the breaker rejects calls before it admits probes.
    pub(crate) open: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig {
            error_ratio: 0.5,
            slow: Duration::from_secs(3),
            slow_ratio: 0.5,
            minimum: 20,
            window: Duration::from_secs(10),
            open: Duration::from_secs(5),
        }
    }
}

/// Calls that a half-open breaker admits.
const PROBES: usize = 3;
/// How long a probe may wait for the rest of its client's request before another call may take its
/// slot. Long enough for a common upload; short, because the route rejects calls meanwhile.
const PROBE_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of one-second buckets of a window.
const BUCKETS: usize = 64;
/// Slots of running calls: twice the slow threshold, at an eighth of it each.
const SLOTS: usize = 16;

/// When the time of a call starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallStart {
    /// With its admission: the request is complete and is sent at once.
    OnAdmission,
    /// When `BreakerPermit::start` reports that the origin has the whole request.
    OnRequestSent,
}

/// State of a circuit breaker: closed admits calls, open rejects them, half-open admits at most
/// `PROBES` probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerState {
    Closed,
    Open,
    HalfOpen,
}

impl BreakerState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half-open",
        }
    }
}

/// Calls recorded within one second of the window: all, failed and slow ones; reset when its slot
/// is reused for a later second.
#[derive(Clone, Copy, Default)]
struct WindowBucket {
    second: u64,
    calls: u32,
    failed: u32,
    slow: u32,
}

/// Counts running calls by start time: in slots of an eighth of the slow threshold, and all older
/// calls together.
struct RunningCalls {
    slots: [(u64, u32); SLOTS],
    older: u32,
}

impl RunningCalls {
    fn start(&mut self, slot: u64) {
        let entry = &mut self.slots[index(slot, SLOTS)];
        if entry.0 != slot {
            self.older += entry.1;
            *entry = (slot, 0);
        }
        entry.1 += 1;
    }

    fn finish(&mut self, slot: u64) {
        let entry = &mut self.slots[index(slot, SLOTS)];
        let count = if entry.0 == slot { &mut entry.1 } else { &mut self.older };
        *count = count.saturating_sub(1);
    }

    /// The number of calls that started before `slot`.
    fn started_before(&self, slot: u64) -> u32 {
        self.older + self.slots.iter().filter(|entry| entry.0 < slot).map(|entry| entry.1).sum::<u32>()
    }
}

fn index(number: u64, length: usize) -> usize {
    usize::try_from(number % length as u64).unwrap_or(0)
}

/// A probe of a half-open breaker.
#[derive(Clone, Copy)]
struct RunningProbe {
    id: u64,
    /// When it was admitted, or when the origin got its whole request.
    since: Instant,
    has_request: bool,
}

/// Mutable part of a breaker, behind its lock: state, probes, running calls, and a ring of
/// `BUCKETS` one-second buckets.
struct BreakerCore {
    state: BreakerState,
    /// Incremented at every change of state. A call that started before a change is not counted
    /// after it.
    generation: u64,
    opened_at: Instant,
    probes: [Option<RunningProbe>; PROBES],
    /// The id of the next probe.
    next_probe: u64,
    successful_probes: usize,
    buckets: [WindowBucket; BUCKETS],
    /// The last second with a failed or slow call, 0 for none. While it is outside the window, the
    /// buckets need not be summed.
    last_bad_second: u64,
    /// No running call started before this slot when it was last checked, and none can have started
    /// there since.
    idle_before_slot: u64,
    running: RunningCalls,
}

/// The circuit breaker of one route: its thresholds, and its state behind a lock.
pub(crate) struct Breaker {
    config: BreakerConfig,
    epoch: Instant,
    slot_millis: u64,
    core: Mutex<BreakerCore>,
}

/// Permission for one call, whose result the caller records with `record`; a drop without it counts
/// as neither success nor failure.
pub(crate) struct BreakerPermit<'a> {
    breaker: &'a Breaker,
    /// When the origin had the whole request; `None` before.
    started_at: Option<Instant>,
    generation: u64,
    /// The id of the probe, if the call is one.
    probe: Option<u64>,
    is_recorded: bool,
}

/// A call whose result was recorded, for a failure later on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordedCall {
    generation: u64,
    second: u64,
}

/// A change of state, for the caller to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerChange {
    Opened(OpenCause),
    HalfOpened,
    Closed,
}

/// The state that the breaker changed to during a call, if it changed.
pub(crate) type BreakerTransition = Option<BreakerChange>;

/// Why a breaker opened, with the calls of its window: all, failed and slow ones, running calls
/// that are slow included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenCause {
    pub(crate) reason: OpenReason,
    pub(crate) calls: u32,
    pub(crate) failed: u32,
    pub(crate) slow: u32,
}

impl OpenCause {
    /// A probe of a half-open breaker failed, or was slow.
    fn of_probe(succeeded: bool) -> Self {
        let reason = if succeeded { OpenReason::ProbeSlow } else { OpenReason::ProbeFailed };
        OpenCause { reason, calls: 1, failed: u32::from(!succeeded), slow: u32::from(succeeded) }
    }
}

/// The rule by which a breaker opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenReason {
    ErrorRatio,
    SlowRatio,
    ProbeFailed,
    ProbeSlow,
}

impl OpenReason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            OpenReason::ErrorRatio => "error_ratio",
            OpenReason::SlowRatio => "slow_ratio",
            OpenReason::ProbeFailed => "probe_failed",
            OpenReason::ProbeSlow => "probe_slow",
        }
    }
}

impl Breaker {
    pub(crate) fn new(config: BreakerConfig, now: Instant) -> Self {
        let core = BreakerCore {
            state: BreakerState::Closed,
            generation: 0,
            opened_at: now,
            probes: [None; PROBES],
            next_probe: 0,
            successful_probes: 0,
            buckets: [WindowBucket::default(); BUCKETS],
            last_bad_second: 0,
            idle_before_slot: 0,
            running: RunningCalls { slots: [(0, 0); SLOTS], older: 0 },
        };
        let slot_millis = u64::try_from((config.slow / 8).as_millis()).unwrap_or(u64::MAX).max(1);
        Breaker { config, epoch: now, slot_millis, core: Mutex::new(core) }
    }

    pub(crate) fn config(&self) -> &BreakerConfig {
        &self.config
    }

    pub(crate) fn state(&self) -> BreakerState {
        self.lock().state
    }

    /// Admits a call whose time starts at `start`.
    ///
    /// # Errors
    /// The time until a retry is useful.
    pub(crate) fn admit(
        &self,
        start: CallStart,
        now: Instant,
    ) -> Result<(BreakerPermit<'_>, BreakerTransition), (Duration, BreakerTransition)> {
        let mut core = self.lock();
        let mut change = None;
        // While all calls hang, none ends. The next admission therefore checks the ratios.
        if core.state == BreakerState::Closed
            && let Some(cause) = self.open_cause(&mut core, now)
        {
            change = Some(core.open(cause, now));
        }
        if core.state == BreakerState::Open {
            let waited = now.saturating_duration_since(core.opened_at);
            if waited < self.config.open {
                return Err((self.config.open - waited, change));
            }
            core.transition_to(BreakerState::HalfOpen, now);
            change = Some(BreakerChange::HalfOpened);
        }
        let has_request = start == CallStart::OnAdmission;
        let mut probe = None;
        if core.state == BreakerState::HalfOpen {
            if core.has_slow_probe(now, self.config.slow) {
                return Err((self.config.open, Some(core.open(OpenCause::of_probe(true), now))));
            }
            probe = core.start_probe(now, has_request);
            if probe.is_none() {
                return Err((self.config.open, change));
            }
        } else if has_request {
            core.running.start(self.slot(now));
        }
        let permit = BreakerPermit {
            breaker: self,
            started_at: has_request.then_some(now),
            generation: core.generation,
            probe,
            is_recorded: false,
        };
        Ok((permit, change))
    }

    /// Counts a call as failed after `record`: the response started well and was aborted.
    pub(crate) fn fail_late(&self, call: RecordedCall, now: Instant) -> BreakerTransition {
        let mut core = self.lock();
        if core.generation != call.generation || core.state == BreakerState::Open {
            return None;
        }
        let second = self.second(now);
        core.last_bad_second = second;
        let is_in_window = call.second >= self.oldest_second(now);
        let bucket = core.bucket(second);
        bucket.failed += 1;
        // A call is in the bucket of its response. Outside the window it counts again, so that
        // there are no more failures than calls.
        bucket.calls += u32::from(!is_in_window);
        let cause = match core.state {
            BreakerState::HalfOpen => OpenCause::of_probe(false),
            BreakerState::Closed | BreakerState::Open => self.open_cause(&mut core, now)?,
        };
        Some(core.open(cause, now))
    }

    /// Why the calls of the window open the breaker, if they do.
    fn open_cause(&self, core: &mut BreakerCore, now: Instant) -> Option<OpenCause> {
        let current = self.second(now);
        let oldest = self.oldest_second(now);
        // A call may run for longer than the window. It is still counted.
        let overdue = now.checked_sub(self.config.slow).map_or(0, |at| core.overdue(self.slot(at)));
        if overdue == 0 && (core.last_bad_second == 0 || core.last_bad_second < oldest) {
            return None;
        }
        let (mut calls, mut failed, mut slow) = (overdue, 0u32, overdue);
        for bucket in &core.buckets {
            if bucket.second >= oldest && bucket.second <= current {
                calls += bucket.calls;
                failed += bucket.failed;
                slow += bucket.slow;
            }
        }
        let reaches = |count: u32, ratio: f64| count > 0 && f64::from(count) >= f64::from(calls) * ratio;
        if calls < self.config.minimum {
            return None;
        }
        let reason = if reaches(failed, self.config.error_ratio) {
            OpenReason::ErrorRatio
        } else if reaches(slow, self.config.slow_ratio) {
            OpenReason::SlowRatio
        } else {
            return None;
        };
        Some(OpenCause { reason, calls, failed, slow })
    }

    /// The first second of the window.
    fn oldest_second(&self, now: Instant) -> u64 {
        self.second(now).saturating_sub(self.config.window.as_secs().clamp(1, BUCKETS as u64 - 1) - 1)
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs() + 1
    }

    /// Slots are never 0, so that an unused entry is older than any slot.
    fn slot(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.epoch);
        let millis = since.as_secs() * 1_000 + u64::from(since.subsec_millis());
        millis / self.slot_millis + 1
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BreakerCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BreakerCore {
    fn open(&mut self, cause: OpenCause, now: Instant) -> BreakerChange {
        self.transition_to(BreakerState::Open, now);
        BreakerChange::Opened(cause)
    }

    fn transition_to(&mut self, state: BreakerState, now: Instant) {
        self.state = state;
        self.generation += 1;
        self.opened_at = now;
        self.probes = [None; PROBES];
        self.successful_probes = 0;
        if state == BreakerState::Closed {
            self.buckets = [WindowBucket::default(); BUCKETS];
            // Calls from before the change are not counted after it, so they are not subtracted
            // either.
            self.running = RunningCalls { slots: [(0, 0); SLOTS], older: 0 };
        }
    }

    /// Whether the origin has had the request of a probe for longer than `slow`.
    fn has_slow_probe(&self, now: Instant, slow: Duration) -> bool {
        self.probes
            .iter()
            .flatten()
            .any(|probe| probe.has_request && now.saturating_duration_since(probe.since) >= slow)
    }

    /// Takes the slots of probes whose clients did not send their requests in time, and gives a
    /// free one to a new probe; a complete request also takes that of an incomplete one. Returns
    /// its id; `None` if no slot is left.
    fn start_probe(&mut self, now: Instant, has_request: bool) -> Option<u64> {
        for slot in &mut self.probes {
            slot.take_if(|probe| {
                !probe.has_request && now.saturating_duration_since(probe.since) >= PROBE_REQUEST_TIMEOUT
            });
        }
        if self.probes.iter().flatten().count() + self.successful_probes >= PROBES {
            // Clients that keep their requests back do not keep complete ones out.
            let incomplete = self.probes.iter_mut().find(|slot| slot.is_some_and(|probe| !probe.has_request));
            *incomplete.filter(|_| has_request)? = None;
        }
        let id = self.next_probe;
        self.next_probe += 1;
        *self.probes.iter_mut().find(|slot| slot.is_none())? = Some(RunningProbe { id, since: now, has_request });
        Some(id)
    }

    fn probe_slot(&mut self, id: u64) -> Option<&mut Option<RunningProbe>> {
        self.probes.iter_mut().find(|slot| slot.is_some_and(|probe| probe.id == id))
    }

    /// The number of running calls that started before `slot`.
    fn overdue(&mut self, slot: u64) -> u32 {
        if slot <= self.idle_before_slot {
            return 0;
        }
        let count = self.running.started_before(slot);
        if count == 0 {
            self.idle_before_slot = slot;
        }
        count
    }

    fn bucket(&mut self, second: u64) -> &mut WindowBucket {
        let bucket = &mut self.buckets[index(second, BUCKETS)];
        if bucket.second != second {
            *bucket = WindowBucket { second, ..WindowBucket::default() };
        }
        bucket
    }
}

impl BreakerPermit<'_> {
    /// The origin has the whole request: its time starts. Starts anew if the request is sent again.
    pub(crate) fn start(&mut self, now: Instant) {
        let mut core = self.breaker.lock();
        let before = self.started_at.replace(now);
        if core.generation != self.generation {
            return;
        }
        if let Some(id) = self.probe {
            if let Some(slot) = core.probe_slot(id) {
                *slot = Some(RunningProbe { id, since: now, has_request: true });
            }
            return;
        }
        if let Some(before) = before {
            core.running.finish(self.breaker.slot(before));
        }
        core.running.start(self.breaker.slot(now));
    }

    /// Ends the call with its result.
    pub(crate) fn record(mut self, succeeded: bool, now: Instant) -> (RecordedCall, BreakerTransition) {
        self.is_recorded = true;
        let call = RecordedCall { generation: self.generation, second: self.breaker.second(now) };
        (call, self.end(succeeded, now))
    }

    fn end(&self, succeeded: bool, now: Instant) -> BreakerTransition {
        let mut core = self.breaker.lock();
        if core.generation != self.generation {
            return None;
        }
        let took = self.started_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let is_slow = took >= self.breaker.config.slow;
        if let Some(id) = self.probe {
            // A probe that lost its slot to another call is no probe any more.
            *core.probe_slot(id)? = None;
            core.successful_probes += usize::from(succeeded && !is_slow);
            if !succeeded || is_slow {
                return Some(core.open(OpenCause::of_probe(succeeded), now));
            }
            if core.successful_probes < PROBES {
                return None;
            }
            core.transition_to(BreakerState::Closed, now);
            return Some(BreakerChange::Closed);
        }
        self.finish(&mut core);
        let second = self.breaker.second(now);
        if !succeeded || is_slow {
            core.last_bad_second = second;
        }
        let bucket = core.bucket(second);
        bucket.calls += 1;
        bucket.failed += u32::from(!succeeded);
        bucket.slow += u32::from(is_slow);
        if succeeded && !is_slow {
            return None;
        }
        let cause = self.breaker.open_cause(&mut core, now)?;
        Some(core.open(cause, now))
    }

    fn finish(&self, core: &mut BreakerCore) {
        if let Some(started_at) = self.started_at {
            core.running.finish(self.breaker.slot(started_at));
        }
    }
}

impl Drop for BreakerPermit<'_> {
    fn drop(&mut self) {
        if self.is_recorded {
            return;
        }
        let mut core = self.breaker.lock();
        if core.generation != self.generation {
            return;
        }
        match self.probe {
            Some(id) => {
                if let Some(slot) = core.probe_slot(id) {
                    *slot = None;
                }
            }
            None => self.finish(&mut core),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker(epoch: Instant) -> Breaker {
        Breaker::new(BreakerConfig { minimum: 4, open: 5 * SECOND, ..BreakerConfig::default() }, epoch)
    }

    const OPENED: Option<BreakerState> = Some(BreakerState::Open);

    fn state_after(change: BreakerTransition) -> Option<BreakerState> {
        Some(match change? {
            BreakerChange::Opened(_) => BreakerState::Open,
            BreakerChange::HalfOpened => BreakerState::HalfOpen,
            BreakerChange::Closed => BreakerState::Closed,
        })
    }

    fn change_of(breaker: &Breaker, succeeded: bool, now: Instant) -> BreakerTransition {
        breaker.admit(CallStart::OnAdmission, now).map_or(None, |(call, _)| call.record(succeeded, now).1)
    }

    fn call(breaker: &Breaker, succeeded: bool, now: Instant) -> Option<BreakerState> {
        state_after(change_of(breaker, succeeded, now))
    }

    fn trip(breaker: &Breaker, now: Instant) {
        for _ in 0..4 {
            call(breaker, false, now);
        }
    }

    fn admitted(breaker: &Breaker, now: Instant) -> BreakerPermit<'_> {
        admitted_at(breaker, CallStart::OnAdmission, now)
    }

    fn admitted_at(breaker: &Breaker, start: CallStart, now: Instant) -> BreakerPermit<'_> {
        match breaker.admit(start, now) {
            Ok((call, _)) => call,
            Err((wait, _)) => panic!("rejected for {wait:?}"),
        }
    }

    fn is_rejected(breaker: &Breaker, now: Instant) -> bool {
        breaker.admit(CallStart::OnAdmission, now).is_err()
    }

    #[test]
    fn late_failures_open_the_breaker() {
        let now = Instant::now();
        let breaker = breaker(now);
        let (recorded, _) = admitted(&breaker, now).record(true, now);
        for _ in 0..3 {
            call(&breaker, true, now);
        }
        let earlier = RecordedCall { generation: recorded.generation + 1, ..recorded };
        assert_eq!(breaker.fail_late(recorded, now), None);
        assert_eq!(breaker.fail_late(earlier, now), None, "of another generation");
        assert_eq!(state_after(breaker.fail_late(recorded, now)), OPENED);
        assert_eq!(breaker.fail_late(recorded, now), None);
    }

    #[test]
    fn late_failure_of_a_call_outside_the_window_counts_as_one_call() {
        let now = Instant::now();
        let breaker = breaker(now);
        let (recorded, _) = admitted(&breaker, now).record(true, now);
        let later = now + 60 * SECOND;
        (0..3).for_each(|_| assert_eq!(breaker.fail_late(recorded, later), None, "below the minimum of calls"));
        assert_eq!(state_after(breaker.fail_late(recorded, later)), OPENED);
    }

    #[test]
    fn time_of_the_client_is_not_the_time_of_the_origin() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        let (sent, answered) = (epoch + 60 * SECOND, epoch + 61 * SECOND);
        let mut uploads: Vec<_> = (0..20).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, epoch)).collect();
        assert!(!is_rejected(&breaker, epoch + 59 * SECOND), "no call of the origin is running");
        uploads.iter_mut().for_each(|upload| upload.start(sent));
        assert!(uploads.into_iter().all(|upload| upload.record(true, answered).1.is_none()));
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn origin_that_answers_complete_uploads_slowly_opens_the_breaker() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        let mut uploads: Vec<_> = (0..4).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, epoch)).collect();
        let sent = epoch + 60 * SECOND;
        uploads.iter_mut().for_each(|upload| upload.start(sent));
        assert!(!is_rejected(&breaker, sent + 2 * SECOND));
        assert!(is_rejected(&breaker, sent + 4 * SECOND), "they count as slow while they run");
    }

    #[test]
    fn calls_without_a_result_count_as_nothing() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        for _ in 0..100 {
            drop(admitted_at(&breaker, CallStart::OnRequestSent, epoch));
            drop(admitted(&breaker, epoch));
        }
        (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None, "below the minimum of calls"));
        assert!(!is_rejected(&breaker, epoch + 60 * SECOND), "none of them is running");
    }

    #[test]
    fn probe_whose_client_stalls_loses_its_slot_to_the_next_call() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        let mut stalled: Vec<_> = (0..3).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, later)).collect();
        let soon = later + SECOND / 2;
        assert!(breaker.admit(CallStart::OnRequestSent, soon).is_err(), "another stalled call");
        assert_eq!(call(&breaker, true, soon), None, "a complete request does not wait for stalled ones");
        let due = later + PROBE_REQUEST_TIMEOUT;
        assert_eq!(call(&breaker, true, due), None);
        let third = admitted(&breaker, due);
        // The results of the stalled calls are no results of probes now.
        stalled[0].start(due);
        assert!(stalled.into_iter().all(|probe| probe.record(false, due).1.is_none()));
        assert_eq!(third.record(true, due).1, Some(BreakerChange::Closed));
    }

    #[test]
    fn probe_whose_request_arrives_in_time_is_judged_by_the_time_of_the_origin() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        for expected in [None, None, Some(BreakerChange::Closed)] {
            let mut probe = admitted_at(&breaker, CallStart::OnRequestSent, later);
            let sent = later + 60 * SECOND;
            probe.start(sent);
            assert_eq!(probe.record(true, sent + SECOND).1, expected);
        }
    }

    #[test]
    fn probe_that_hangs_opens_the_breaker_again() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        let hanging = admitted(&breaker, later);
        let (_, change) = breaker.admit(CallStart::OnAdmission, later + 3 * SECOND).err().expect("open");
        assert_eq!(state_after(change), OPENED);
        assert_eq!(hanging.record(true, later + 3 * SECOND).1, None);
    }

    #[test]
    fn open_breaker_rejects_with_the_remaining_time() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        assert_eq!((0..4).map(|_| call(&breaker, false, epoch)).collect::<Vec<_>>(), [None, None, None, OPENED]);
        let (wait, _) = breaker.admit(CallStart::OnAdmission, epoch + 2 * SECOND).err().expect("open");
        assert_eq!(wait, 3 * SECOND);
    }

    #[test]
    fn half_open_closes_after_all_probes_and_opens_on_one_failure() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        assert_eq!(call(&breaker, false, later), OPENED);
        let later = later + 6 * SECOND;
        assert_eq!(
            (0..3).map(|_| call(&breaker, true, later)).collect::<Vec<_>>(),
            [None, None, Some(BreakerState::Closed)]
        );
        assert_eq!(call(&breaker, false, later), None, "the window is empty after closing");
    }

    #[test]
    fn cancelled_probe_releases_its_slot() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        trip(&breaker, epoch);
        let later = epoch + 6 * SECOND;
        let probes: Vec<_> = (0..3).map(|_| admitted(&breaker, later)).collect();
        assert!(breaker.admit(CallStart::OnAdmission, later).is_err());
        drop(probes);
        assert!(breaker.admit(CallStart::OnAdmission, later).is_ok());
    }

    #[test]
    fn hanging_calls_open_the_breaker_before_they_end() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        let running: Vec<_> = (0..4).map(|_| admitted(&breaker, epoch)).collect();
        assert!(breaker.admit(CallStart::OnAdmission, epoch + 2 * SECOND).is_ok());
        let (_, change) = breaker.admit(CallStart::OnAdmission, epoch + 5 * SECOND).err().expect("open");
        assert_eq!(state_after(change), OPENED);
        drop(running);
    }

    #[test]
    fn failures_outside_the_window_and_below_the_minimum_do_not_count() {
        let epoch = Instant::now();
        let breaker = breaker(epoch);
        (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
        assert_eq!(call(&breaker, false, epoch + 11 * SECOND), None);
        let breaker = self::breaker(epoch);
        (0..10).for_each(|_| assert_eq!(call(&breaker, true, epoch), None));
        (0..9).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
        assert_eq!(call(&breaker, false, epoch), OPENED);
    }

    #[test]
    fn change_tells_the_rule_and_the_calls_that_opened_the_breaker() {
        let epoch = Instant::now();
        let opened =
            |reason, calls, failed, slow| Some(BreakerChange::Opened(OpenCause { reason, calls, failed, slow }));
        let failing = breaker(epoch);
        (0..2).for_each(|_| assert_eq!(call(&failing, true, epoch), None));
        assert_eq!(call(&failing, false, epoch), None);
        assert_eq!(change_of(&failing, false, epoch), opened(OpenReason::ErrorRatio, 4, 2, 0));
        let due = epoch + 5 * SECOND;
        assert_eq!(change_of(&failing, false, due), opened(OpenReason::ProbeFailed, 1, 1, 0));

        let hanging = breaker(epoch);
        let calls: Vec<_> = (0..4).map(|_| admitted(&hanging, epoch)).collect();
        let (_, change) = hanging.admit(CallStart::OnAdmission, due).err().expect("open");
        assert_eq!(change, opened(OpenReason::SlowRatio, 4, 0, 4));
        drop(calls);
        let probe = admitted(&hanging, due + 5 * SECOND);
        let (_, change) = hanging.admit(CallStart::OnAdmission, due + 8 * SECOND).err().expect("open");
        assert_eq!(change, opened(OpenReason::ProbeSlow, 1, 0, 1));
        drop(probe);
    }
}
