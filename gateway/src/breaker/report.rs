//! A breaker in the log and at the admin address.

use std::time::{Duration, Instant};

use super::gate::Breaker;
use super::probes::PROBES;
use super::state::{BreakerChange, BreakerTransition, ManualState, OpenCause};
use super::state_change::BreakerStateChange;
use crate::event::Event;
use crate::metrics::Label as _;

impl Breaker {
    /// Logs and counts a change of state.
    pub(crate) fn announce(&self, change: BreakerTransition) {
        let Some(change) = change else { return };
        let (route, upstream) = (self.name().route(), &*self.name().upstream);
        let mode = self.config().mode.as_str();
        match change {
            BreakerChange::Opened(cause, time) => {
                let OpenCause { reason, calls, failed, slow } = cause;
                let ratio = |count: u32| (f64::from(count) / f64::from(calls.max(1)) * 1_000.0).round() / 1_000.0;
                Event::BreakerOpened {
                    route,
                    upstream,
                    mode,
                    reason: reason.as_str(),
                    calls,
                    failed,
                    slow,
                    failed_ratio: ratio(failed),
                    slow_ratio: ratio(slow),
                    seconds: (time.as_secs_f64() * 10.0).round() / 10.0,
                }
                .emit();
            }
            BreakerChange::HalfOpened => {
                Event::BreakerHalfOpen { route, upstream, mode, reason: "open_time_passed", probes: PROBES }.emit();
            }
            BreakerChange::Ramping => {
                let seconds = self.config().ramp.as_secs_f64();
                Event::BreakerRamp { route, upstream, mode, reason: "probes_succeeded", probes: PROBES, seconds }
                    .emit();
            }
            BreakerChange::Closed => {
                let reason = if self.config().ramp.is_zero() { "probes_succeeded" } else { "ramp_ended" };
                Event::BreakerClosed { route, upstream, mode, reason }.emit();
            }
            BreakerChange::ManualEnded(state) => {
                Event::BreakerOverrideEnded { route, upstream, state: state.as_str(), reason: "expired" }.emit();
            }
        }
    }

    /// Changes the state as an operator wants. A state that it has already, with the same end, is
    /// no change: a reload keeps it.
    pub(crate) fn change_state(&self, change: BreakerStateChange, now: Instant) {
        let (route, upstream) = (self.name().route(), &*self.name().upstream);
        match change {
            BreakerStateChange::Set(state, duration) => {
                let is_same = |(known, left): (ManualState, Duration)| {
                    known == state && left.abs_diff(duration) < Duration::from_millis(500)
                };
                if self.report(now).manual.is_some_and(is_same) {
                    return;
                }
                self.set_manual(state, duration, now);
                // Some of it has passed since the order.
                let seconds = duration.as_secs_f64().round() as u64;
                Event::BreakerOverridden { route, upstream, state: state.as_str(), seconds }.emit();
            }
            BreakerStateChange::Judge => {
                if let Some(state) = self.end_manual(now) {
                    let reason = "cleared";
                    Event::BreakerOverrideEnded { route, upstream, state: state.as_str(), reason }.emit();
                }
            }
        }
    }

    /// The state of the breaker, for the admin address.
    pub(crate) fn to_json(&self, now: Instant) -> serde_json::Value {
        let report = self.report(now);
        serde_json::json!({
            "route": self.name().route.as_deref(),
            "upstream": &*self.name().upstream,
            "mode": self.config().mode.as_str(),
            "state": report.state.as_str(),
            "since_seconds": report.since.as_secs(),
            "percent": report.percent,
            "closes_in_seconds": report.wait.as_secs_f64().ceil(),
            "reason": report.cause.map(|cause| cause.reason.as_str()),
            "calls": report.cause.map(|cause| cause.calls),
            "failed": report.cause.map(|cause| cause.failed),
            "slow": report.cause.map(|cause| cause.slow),
            "override": report.manual.map(|(state, left)| serde_json::json!({
                "state": state.as_str(),
                "ends_in_seconds": left.as_secs(),
            })),
            "rejections": report.rejections,
        })
    }
}
