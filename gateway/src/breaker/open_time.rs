//! How long a breaker stays open: longer each time, until the origin was healthy for a while.

use std::time::{Duration, Instant};

/// The longest time compared to the first one.
const FACTOR_MAX: u32 = 8;
/// Largest part by which a time is longer than it has to be: the gateways of a fleet do not probe
/// at the same moment.
const JITTER: f64 = 0.2;

/// The times for which a breaker was open.
pub(super) struct OpenTimes {
    /// The factor of the next time.
    factor: u32,
    last: Duration,
    /// When the breaker closed; `None`: it was never open.
    closed_at: Option<Instant>,
    random: u64,
}

impl OpenTimes {
    pub(super) fn new(seed: u64) -> Self {
        OpenTimes { factor: 1, last: Duration::ZERO, closed_at: None, random: seed }
    }

    /// Notes that all calls are admitted again.
    pub(super) fn closed(&mut self, now: Instant) {
        self.closed_at = Some(now);
    }

    /// The time of an opening. It doubles, unless the breaker was closed for as long as it was
    /// open, and for `window`.
    pub(super) fn next(&mut self, (base, window): (Duration, Duration), now: Instant) -> Duration {
        let healthy_for = self.closed_at.take().map(|at| now.saturating_duration_since(at));
        if healthy_for.is_some_and(|time| time >= self.last.max(window)) {
            self.factor = 1;
        }
        let time = base * self.factor;
        self.factor = (self.factor * 2).min(FACTOR_MAX);
        self.last = time.mul_f64(1.0 + JITTER * self.uniform());
        self.last
    }

    /// Uniform from 0 to 1 (splitmix64).
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let number = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((number ^ (number >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}
