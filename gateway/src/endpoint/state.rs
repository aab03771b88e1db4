//! Whether an endpoint is to be used: it can be reached, it is not ejected because of its
//! responses, and its health checks pass.
//!
//! Three judges write here: attempts to connect, responses, and health checks. Requests read one
//! number, which is 0 for an endpoint that none of them objects to. `orders.rs` compiles this file
//! with the atomics and locks of loom.

use std::sync::PoisonError;
use std::time::Duration;

use super::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering::Relaxed};
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
    pub(super) is_suspect: AtomicBool,
    /// Whether the last attempt to connect failed.
    pub(super) has_failed_connection: AtomicBool,
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
            if ejections != self.ejections() {
                // The endpoint was ejected meanwhile.
                return None;
            }
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
