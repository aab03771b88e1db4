//! The settings of a circuit breaker.

use std::time::Duration;

use crate::label;

label! {
    /// The effect of a breaker.
    pub(crate) BreakerMode, "mode", {
        /// An open breaker rejects calls.
        Enforce = "enforce",
        /// The breaker changes its state and counts what it would reject, and admits every call.
        Shadow = "shadow",
        /// The breaker judges no call.
        Off = "off",
    }
}

/// The calls that one breaker judges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum BreakerScope {
    /// Those of one route: a failing part of an upstream does not reject calls of another one.
    #[default]
    Route,
    /// Those of all routes of the upstream: few calls of each are enough together.
    Upstream,
}

/// Thresholds and times of a circuit breaker (`[upstreams.X.breaker]`).
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
    /// How long the breaker rejects calls before it admits probes, when it opens for the first
    /// time. The following times are longer.
    pub(crate) open: Duration,
    /// Time from successful probes until all calls are admitted; zero: at once.
    pub(crate) ramp: Duration,
    pub(crate) scope: BreakerScope,
    pub(crate) mode: BreakerMode,
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
            ramp: Duration::from_secs(3),
            scope: BreakerScope::default(),
            mode: BreakerMode::Enforce,
        }
    }
}
