//! The states of a circuit breaker, and their changes as they are reported.

use std::time::Duration;

/// When the time of a call starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallStart {
    /// With its admission: the request is complete and is sent at once.
    OnAdmission,
    /// When `BreakerPermit::start` reports that the origin has the whole request.
    OnRequestSent,
}

/// State of a circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerState {
    /// Calls are admitted.
    Closed,
    /// A growing share of the calls is admitted.
    Ramp,
    /// A few calls are admitted as probes.
    HalfOpen,
    /// Calls are rejected.
    Open,
}

impl BreakerState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Ramp => "ramp",
            BreakerState::HalfOpen => "half-open",
            BreakerState::Open => "open",
        }
    }
}

/// A state that an operator sets for a limited time. No call is judged meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ManualState {
    /// Calls are rejected, also by a breaker in shadow mode.
    Open,
    /// Calls are admitted.
    Closed,
}

impl ManualState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            ManualState::Open => "open",
            ManualState::Closed => "closed",
        }
    }

    /// Reads what `as_str` returns.
    pub(super) fn parse(text: &str) -> Option<Self> {
        [ManualState::Open, ManualState::Closed].into_iter().find(|state| state.as_str() == text)
    }
}

/// A change of state, for the caller to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerChange {
    /// The breaker is open, with the time until it admits probes.
    Opened(OpenCause, Duration),
    HalfOpened,
    /// The probes succeeded: a growing share of the calls is admitted.
    Ramping,
    Closed,
    /// The time of a manual state has passed.
    ManualEnded(ManualState),
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
    pub(super) fn of_probe(succeeded: bool) -> Self {
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
