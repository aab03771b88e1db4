//! Whether an endpoint is to be used: it can be reached, it is not ejected because of its
//! responses, and its health checks pass.
//!
//! Three judges write here: attempts to connect, responses, and health checks. Requests read one
//! number, which is 0 for an endpoint that none of them objects to.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::label;

/// When an endpoint is ejected because of its responses (`[upstreams.X.eject]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EjectConfig {
    /// Failures in a row; 0: no endpoint is ejected.
    pub(crate) after: u32,
    /// Time of the first ejection; the following ones are longer.
    pub(crate) base: Duration,
    /// The largest share of endpoints that may be out at a time, above 0 and up to 1. If more are,
    /// all are used.
    pub(crate) share: f64,
}

impl Default for EjectConfig {
    fn default() -> Self {
        EjectConfig { after: 5, base: Duration::from_secs(30), share: 0.5 }
    }
}

/// How long an endpoint is tried last after its first failed connection. Doubled with each further
/// failure.
const UNREACHABLE_TIME_MIN: Duration = Duration::from_secs(1);
/// The longest time that an endpoint is tried last before another attempt.
const UNREACHABLE_TIME_MAX: Duration = Duration::from_secs(8);
/// Ejections last at most this many times `EjectConfig::base`.
const EJECTION_FACTOR_MAX: u32 = 10;
/// Length of a window of timeouts, in milliseconds.
const WINDOW: u64 = 10_000;
/// Calls in a window before it counts.
const WINDOW_CALLS_MIN: u64 = 5;
/// Windows in a row with at least 80 % timeouts after which an endpoint is ejected.
const WINDOWS_MAX: u32 = 3;

label! {
    /// Why an endpoint is out of use.
    pub(crate) OutReason, "reason", {
        /// No connection can be opened.
        Connect = "connect",
        /// Failures in a row: statuses of the class 5xx, and broken connections.
        Failures = "failures",
        /// Most calls timed out.
        Timeouts = "timeouts",
        /// Its health checks fail.
        HealthCheck = "health_check",
    }
}

label! {
    /// Whether an endpoint is to be used, in order of preference.
    #[derive(PartialOrd, Ord)]
    pub(crate) EndpointAvailability, "state", {
        Available = "available",
        /// It is ejected, or unhealthy.
        Out = "out",
        /// Its last connection failed a short time ago.
        Unreachable = "unreachable",
    }
}

/// A change of state that is to be reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateChange {
    Down(OutReason),
    Up,
}

/// A failed call, as the state counts it.
#[derive(Clone, Copy)]
pub(super) struct FailedCall {
    pub(super) is_timeout: bool,
    /// The number of calls of the endpoint, with this one.
    pub(super) calls: u64,
    /// `EndpointState::ejections` when the call began.
    pub(super) ejections: u32,
}

/// The part of the state behind its lock.
#[derive(Default)]
struct StateCore {
    failed_connections: u32,
    unreachable_until: u64,
    consecutive_failures: u32,
    ejected_until: u64,
    ejected_for: Option<OutReason>,
    /// Ejections so far, without a long good time between them.
    ejections: u32,
    window: TimeoutWindow,
    /// Whether enough windows in a row had too many timeouts.
    has_timed_out: bool,
    /// Health checks in a row with the same result, and that result.
    checks: u32,
    last_check_passed: bool,
    is_unhealthy: bool,
    /// Whether the last reported state is that it is out.
    is_reported_down: bool,
}

/// Calls and timeouts since the start of a window.
#[derive(Default)]
struct TimeoutWindow {
    /// `None` before the first timeout.
    since: Option<u64>,
    /// Calls of the endpoint before the window.
    calls_before: u64,
    timeouts: u64,
    /// Windows in a row with at least 80 % timeouts.
    bad: u32,
}

impl TimeoutWindow {
    /// Counts a timeout. Returns whether there were enough of them if it ends a window.
    fn record(&mut self, calls: u64, now: u64) -> Option<bool> {
        let elapsed = self.since.map_or(u64::MAX, |since| now.saturating_sub(since));
        if elapsed >= 2 * WINDOW {
            *self = TimeoutWindow { since: Some(now), calls_before: calls.saturating_sub(1), timeouts: 1, bad: 0 };
            return None;
        }
        self.timeouts += 1;
        if elapsed < WINDOW {
            return None;
        }
        let calls_in = calls.saturating_sub(self.calls_before);
        let is_bad = calls_in >= WINDOW_CALLS_MIN && self.timeouts * 10 >= calls_in * 8;
        let bad = if is_bad { self.bad + 1 } else { 0 };
        *self = TimeoutWindow { since: Some(now), calls_before: calls, timeouts: 0, bad };
        Some(bad >= WINDOWS_MAX)
    }
}

/// State of one endpoint, shared by all threads. Times are in milliseconds of one epoch.
#[derive(Default)]
pub(super) struct EndpointState {
    /// Until when the endpoint is out; 0: it is not. The latest of the times in `core`.
    out_until: AtomicU64,
    /// Whether a success changes anything.
    is_suspect: AtomicBool,
    /// Whether the last attempt to connect failed.
    has_failed_connection: AtomicBool,
    /// Ejections so far. The result of a call that began before the last one does not count: it
    /// says nothing about the endpoint after its time.
    ejections: AtomicU32,
    core: Mutex<StateCore>,
}

impl EndpointState {
    pub(super) fn availability(&self, now: impl FnOnce() -> u64) -> EndpointAvailability {
        let until = self.out_until.load(Relaxed);
        if until == 0 {
            return EndpointAvailability::Available;
        }
        let now = now();
        if until <= now {
            return EndpointAvailability::Available;
        }
        let core = self.lock();
        if core.unreachable_until > now { EndpointAvailability::Unreachable } else { EndpointAvailability::Out }
    }

    /// Why the endpoint is out, and the milliseconds until it is used again; `None` for those if
    /// that is not known.
    pub(super) fn out(&self, now: u64) -> Option<(OutReason, Option<u64>)> {
        let core = self.lock();
        if core.is_unhealthy {
            return Some((OutReason::HealthCheck, None));
        }
        let left = |until: u64| (until > now).then(|| Some(until - now));
        let ejected = || left(core.ejected_until).map(|time| (core.ejected_for.unwrap_or(OutReason::Failures), time));
        left(core.unreachable_until).map(|time| (OutReason::Connect, time)).or_else(ejected)
    }

    pub(super) fn record_unreachable(&self, now: u64) -> Option<StateChange> {
        self.change(|core| {
            let time = UNREACHABLE_TIME_MIN * 2_u32.pow(core.failed_connections.min(8));
            core.failed_connections = core.failed_connections.saturating_add(1);
            core.unreachable_until = now + millis_of(time.min(UNREACHABLE_TIME_MAX));
            core.report_down(OutReason::Connect)
        })
    }

    /// The number of ejections, which a call keeps from its beginning.
    pub(super) fn ejections(&self) -> u32 {
        self.ejections.load(Relaxed)
    }

    /// A connection was opened.
    pub(super) fn record_reachable(&self, now: u64) -> Option<StateChange> {
        if !self.is_suspect.load(Relaxed) && !self.has_failed_connection.load(Relaxed) {
            return None;
        }
        self.change(|core| {
            core.failed_connections = 0;
            core.unreachable_until = 0;
            core.report_up(now)
        })
    }

    /// A call that began after `ejections` ended well.
    pub(super) fn record_success(&self, ejections: u32, now: impl FnOnce() -> u64) -> Option<StateChange> {
        if !self.is_suspect.load(Relaxed) || ejections != self.ejections() {
            return None;
        }
        self.change(|core| {
            core.consecutive_failures = 0;
            core.has_timed_out = false;
            core.report_up(now())
        })
    }

    /// A call failed. Returns why the endpoint is to be ejected, if it is. Failures while it is out
    /// do not count.
    pub(super) fn record_failure(&self, call: FailedCall, config: &EjectConfig, now: u64) -> Option<OutReason> {
        let mut reason = None;
        self.change(|core| {
            let is_late = call.ejections != self.ejections();
            if is_late || core.is_unhealthy || core.ejected_until > now {
                return None;
            }
            core.consecutive_failures = core.consecutive_failures.saturating_add(1);
            if call.is_timeout
                && let Some(has_timed_out) = core.window.record(call.calls, now)
            {
                core.has_timed_out = has_timed_out;
            }
            if config.after > 0 {
                let timed_out = core.has_timed_out.then_some(OutReason::Timeouts);
                let failed = (core.consecutive_failures >= config.after).then_some(OutReason::Failures);
                reason = failed.or(timed_out);
            }
            None
        });
        reason
    }

    /// Ejects the endpoint. The time doubles with each ejection, unless the endpoint was in use for
    /// as long as the longest one lasts.
    pub(super) fn eject(&self, reason: OutReason, (config, now): (&EjectConfig, u64)) -> Option<StateChange> {
        self.change(|core| {
            self.ejections.fetch_add(1, Relaxed);
            let longest = config.base * EJECTION_FACTOR_MAX;
            if now.saturating_sub(core.ejected_until) >= millis_of(longest) {
                core.ejections = 0;
            }
            let time = (config.base * 2_u32.pow(core.ejections.min(8))).min(longest);
            core.ejections += 1;
            core.ejected_until = now + millis_of(time);
            core.ejected_for = Some(reason);
            // The next failure after its time ejects it again, the next success does not.
            core.consecutive_failures = config.after.saturating_sub(1);
            core.window = TimeoutWindow::default();
            core.has_timed_out = false;
            core.report_down(reason)
        })
    }

    /// Takes over the result of a health check; `needed` of the same result in a row change the
    /// state.
    pub(super) fn record_check(&self, passed: bool, needed: u32, now: u64) -> Option<StateChange> {
        self.change(|core| {
            if core.checks == 0 || core.last_check_passed != passed {
                core.checks = 0;
                core.last_check_passed = passed;
            }
            core.checks = core.checks.saturating_add(1);
            if core.checks < needed || core.is_unhealthy != passed {
                return None;
            }
            core.is_unhealthy = !passed;
            if passed { core.report_up(now) } else { core.report_down(OutReason::HealthCheck) }
        })
    }

    /// There are no health checks any more: their results do not keep the endpoint out.
    pub(super) fn forget_checks(&self, now: u64) -> Option<StateChange> {
        self.change(|core| {
            core.checks = 0;
            if std::mem::take(&mut core.is_unhealthy) { core.report_up(now) } else { None }
        })
    }

    /// Whether the endpoint is out for another reason than its connections.
    pub(super) fn is_out(&self, now: u64) -> bool {
        self.out_until.load(Relaxed) > now && {
            let core = self.lock();
            core.is_unhealthy || core.ejected_until > now
        }
    }

    fn change(&self, change: impl FnOnce(&mut StateCore) -> Option<StateChange>) -> Option<StateChange> {
        let mut core = self.lock();
        let report = change(&mut core);
        let unhealthy_until = if core.is_unhealthy { u64::MAX } else { 0 };
        self.out_until.store(core.unreachable_until.max(core.ejected_until).max(unhealthy_until), Relaxed);
        // A passed check alone reports an unhealthy endpoint as up.
        let is_reported = core.is_reported_down && !core.is_unhealthy;
        let is_suspect = core.consecutive_failures > 0 || core.has_timed_out || is_reported;
        self.is_suspect.store(is_suspect, Relaxed);
        self.has_failed_connection.store(core.failed_connections > 0, Relaxed);
        report
    }

    fn lock(&self) -> MutexGuard<'_, StateCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateCore {
    fn report_down(&mut self, reason: OutReason) -> Option<StateChange> {
        (!std::mem::replace(&mut self.is_reported_down, true)).then_some(StateChange::Down(reason))
    }

    /// Reports that the endpoint is in use again, if nothing keeps it out.
    fn report_up(&mut self, now: u64) -> Option<StateChange> {
        let is_out = self.is_unhealthy || self.ejected_until > now || self.unreachable_until > now;
        (!is_out && std::mem::take(&mut self.is_reported_down)).then_some(StateChange::Up)
    }
}

fn millis_of(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000;

    fn config() -> EjectConfig {
        EjectConfig::default()
    }

    /// A call that begins now, and ends.
    fn fail(state: &EndpointState, now: u64) -> Option<OutReason> {
        let call = FailedCall { is_timeout: false, calls: 0, ejections: state.ejections() };
        state.record_failure(call, &config(), now)
    }

    fn succeed(state: &EndpointState, now: u64) -> Option<StateChange> {
        state.record_success(state.ejections(), || now)
    }

    /// Records failures until the endpoint is to be ejected, and ejects it. Returns their number.
    fn fail_until_ejected(state: &EndpointState, now: u64) -> u32 {
        for count in 1..100 {
            if let Some(reason) = fail(state, now) {
                state.eject(reason, (&config(), now));
                return count;
            }
        }
        panic!("never ejected")
    }

    #[test]
    fn time_of_an_unreachable_endpoint_grows_to_a_bound_and_ends_with_a_connection() {
        let state = EndpointState::default();
        for (failures, seconds) in [1, 2, 4, 8, 8, 8].into_iter().enumerate() {
            let change = state.record_unreachable(SECOND);
            assert_eq!(change.is_some(), failures == 0, "reported once");
            let until = SECOND + seconds * SECOND;
            assert_eq!(state.availability(|| until - 1), EndpointAvailability::Unreachable);
            assert_eq!(state.availability(|| until), EndpointAvailability::Available);
        }
        assert_eq!(state.record_reachable(SECOND), Some(StateChange::Up));
        assert_eq!(state.availability(|| SECOND), EndpointAvailability::Available);
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_them_does_not() {
        let state = EndpointState::default();
        for _ in 0..100 {
            (0..4).for_each(|_| assert_eq!(fail(&state, 0), None));
            assert_eq!(succeed(&state, 0), None);
        }
        assert_eq!(fail_until_ejected(&state, 0), 5);
        assert_eq!(state.availability(|| 30 * SECOND - 1), EndpointAvailability::Out);
        assert_eq!(state.out(10 * SECOND), Some((OutReason::Failures, Some(20 * SECOND))));
        assert_eq!(state.availability(|| 30 * SECOND), EndpointAvailability::Available);
        assert_eq!(succeed(&state, 30 * SECOND), Some(StateChange::Up));
    }

    #[test]
    fn endpoint_that_still_fails_after_its_time_is_ejected_at_once_and_for_longer() {
        let state = EndpointState::default();
        let mut now = 0;
        assert_eq!(fail_until_ejected(&state, now), 5);
        for seconds in [30, 60, 120, 240, 300, 300] {
            assert_eq!(state.out(now).and_then(|(_, left)| left), Some(seconds * SECOND));
            now += seconds * SECOND;
            assert_eq!(fail_until_ejected(&state, now), 1);
        }
        // A long good time makes the next ejection a first one.
        now += 300 * SECOND;
        succeed(&state, now);
        now += 300 * SECOND;
        assert_eq!(fail_until_ejected(&state, now), 5);
        assert_eq!(state.out(now).and_then(|(_, left)| left), Some(30 * SECOND));
    }

    #[test]
    fn three_windows_of_timeouts_eject_although_some_calls_succeed() {
        let run = |timeouts_of_ten: u64| {
            let state = EndpointState::default();
            let mut calls = 0;
            for now in (0..60 * SECOND).step_by(500) {
                calls += 1;
                if calls % 10 < timeouts_of_ten {
                    let call = FailedCall { is_timeout: true, calls, ejections: 0 };
                    let reason = state.record_failure(call, &EjectConfig { after: 50, ..config() }, now);
                    if reason.is_some() {
                        return Some((reason, now / SECOND));
                    }
                } else {
                    succeed(&state, now);
                }
            }
            None
        };
        let (reason, seconds) = run(9).expect("90 % time out");
        assert!(reason == Some(OutReason::Timeouts) && (30..=34).contains(&seconds), "{reason:?} {seconds}");
        assert_eq!(run(7), None, "70 % time out");
    }

    #[test]
    fn results_of_calls_from_before_an_ejection_do_not_count_after_it() {
        for late in [1, 5, 100] {
            let state = EndpointState::default();
            let before = state.ejections();
            assert_eq!(fail_until_ejected(&state, 0), 5);
            let call = FailedCall { is_timeout: true, calls: 5 + late, ejections: before };
            // Some end while it is out, some after its time; others begin while it is out.
            for now in [1, 29 * SECOND, 30 * SECOND, 31 * SECOND] {
                (0..late).for_each(|_| assert_eq!(state.record_failure(call, &config(), now), None));
                assert_eq!(state.record_success(before, || now), None);
            }
            (0..late).for_each(|_| assert_eq!(fail(&state, 29 * SECOND), None));
            assert_eq!(succeed(&state, 31 * SECOND), Some(StateChange::Up));
            (0..4).for_each(|_| assert_eq!(fail(&state, 32 * SECOND), None, "a success ends the row"));
            assert_eq!(fail(&state, 32 * SECOND), Some(OutReason::Failures));
        }
        let state = EndpointState::default();
        let before = state.ejections();
        assert_eq!(fail_until_ejected(&state, 0), 5);
        assert_eq!(state.record_success(before, || 30 * SECOND), None);
        assert_eq!(fail_until_ejected(&state, 30 * SECOND), 1, "a late success clears nothing either");
    }

    #[test]
    fn failures_of_an_unhealthy_endpoint_do_not_count_when_it_is_healthy_again() {
        let state = EndpointState::default();
        state.record_check(false, 1, 0);
        (0..100).for_each(|_| assert_eq!(fail(&state, 0), None));
        assert!(!state.is_suspect.load(Relaxed), "a success changes nothing");
        state.record_check(true, 1, 0);
        assert_eq!(fail_until_ejected(&state, 0), 5);
    }

    #[test]
    fn endpoint_that_is_never_ejected_is_not_suspect_after_a_success() {
        let state = EndpointState::default();
        // Enough bad windows, but it is the only endpoint: it is not ejected.
        let mut reasons = Vec::new();
        for calls in 1..100 {
            let call = FailedCall { is_timeout: true, calls, ejections: 0 };
            let config = EjectConfig { after: 1_000, ..config() };
            reasons.extend(state.record_failure(call, &config, calls * SECOND));
        }
        assert!(reasons.contains(&OutReason::Timeouts));
        state.record_unreachable(100 * SECOND);
        assert_eq!(succeed(&state, 110 * SECOND), Some(StateChange::Up));
        assert!(!state.is_suspect.load(Relaxed));
        let call = FailedCall { is_timeout: false, calls: 101, ejections: 0 };
        assert_eq!(state.record_failure(call, &config(), 111 * SECOND), None, "one failure of no row");
        assert_eq!(state.record_reachable(112 * SECOND), None);
        assert!(!state.has_failed_connection.load(Relaxed));
    }

    #[test]
    fn health_checks_change_the_state_after_enough_results_in_a_row() {
        let state = EndpointState::default();
        let check = |passed: bool| state.record_check(passed, if passed { 2 } else { 3 }, 0);
        let results = [false, false, true, false, false, false, false, true, false, true, true, true].map(check);
        let mut expected = [None; 12];
        expected[5] = Some(StateChange::Down(OutReason::HealthCheck));
        expected[10] = Some(StateChange::Up);
        assert_eq!(results, expected);
        assert_eq!(state.availability(|| 0), EndpointAvailability::Available);
    }

    #[test]
    fn unhealthy_endpoint_is_in_use_again_when_there_are_no_checks_any_more() {
        let state = EndpointState::default();
        assert_eq!(state.forget_checks(0), None);
        state.record_check(false, 1, 0);
        assert_eq!(state.availability(|| 0), EndpointAvailability::Out);
        assert_eq!(state.forget_checks(0), Some(StateChange::Up));
        assert_eq!(state.availability(|| 0), EndpointAvailability::Available);
        assert_eq!(state.record_check(false, 2, 0), None, "the failed check is forgotten");
    }

    #[test]
    fn endpoint_is_reported_as_up_only_if_nothing_keeps_it_out() {
        let state = EndpointState::default();
        assert_eq!(fail_until_ejected(&state, 0), 5);
        (0..3).for_each(|_| assert_eq!(state.record_check(false, 3, 0), None, "it is reported already"));
        assert_eq!(state.record_check(true, 1, SECOND), None, "it is ejected");
        assert_eq!(succeed(&state, 31 * SECOND), Some(StateChange::Up));
    }
}
