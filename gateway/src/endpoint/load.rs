//! The load of an endpoint as selection compares it: requests in flight, latency, recent failures,
//! and weight.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How fast a mean forgets, in milliseconds: an endpoint without calls is tried again after a few
/// of these.
const DECAY: f64 = 10_000.0;
/// The part of a call in the failure rate.
const FAILURE_PART: f64 = 0.125;
/// The load of an endpoint all of whose calls fail, as a multiple. One that answers errors quickly
/// has few requests in flight, and would attract more of them otherwise.
const FAILURE_PENALTY: f64 = 9.0;
/// The failure rate below which failures are forgotten: after 32 s for a single one, 53 s for an
/// endpoint all of whose calls failed. However small it is, it would keep an endpoint from being
/// selected while no other one has more requests in flight.
const FAILURES_FORGOTTEN: f64 = 0.005;
/// The smallest part of its weight that an endpoint has in its slow start.
const SLOW_START_MIN: f64 = 0.1;
/// Latency in milliseconds that is expected of an endpoint with requests in flight that was never
/// measured, and that a failure counts as: how fast it fails says nothing for it.
const UNKNOWN_LATENCY: f64 = 1_000.0;

/// A mean that decays towards 0 while nothing is recorded. Threads may overwrite each other's
/// values: one of many samples is then lost.
#[derive(Default)]
struct DecayingMean {
    /// The bits of an `f64`.
    value: AtomicU64,
    /// When it was recorded.
    at: AtomicU64,
}

impl DecayingMean {
    fn is_zero(&self) -> bool {
        self.value.load(Relaxed) == 0
    }

    /// The part of a value that is left at `now`.
    fn kept(&self, now: u64) -> f64 {
        (-(now.saturating_sub(self.at.load(Relaxed)) as f64) / DECAY).exp()
    }

    fn read(&self, now: u64) -> f64 {
        if self.is_zero() { 0.0 } else { f64::from_bits(self.value.load(Relaxed)) * self.kept(now) }
    }

    fn store(&self, value: f64, now: u64) {
        self.value.store(value.to_bits(), Relaxed);
        self.at.store(now, Relaxed);
    }

    /// Records a sample of a mean that follows a higher sample at once, and lower ones with time.
    fn record_peak(&self, sample: f64, now: u64) {
        let (value, kept) = (f64::from_bits(self.value.load(Relaxed)), self.kept(now));
        let mean = if self.is_zero() { sample } else { value * kept + sample * (1.0 - kept) };
        self.store(mean.max(sample), now);
    }

    /// Records a sample that counts for `part` of the mean.
    fn record(&self, sample: f64, part: f64, now: u64) {
        let value = self.read(now);
        self.store(value + (sample - value) * part, now);
    }
}

/// The load of one endpoint as selection knows it. Times are in milliseconds of one epoch.
#[derive(Default)]
pub(super) struct EndpointLoad {
    weight: AtomicU32,
    latency: DecayingMean,
    failures: DecayingMean,
    /// When the endpoint joined or came back; 0: with the upstream.
    since: AtomicU64,
}

impl EndpointLoad {
    pub(super) fn set_weight(&self, weight: u32) {
        self.weight.store(weight.max(1), Relaxed);
    }

    pub(super) fn begin_slow_start(&self, now: u64) {
        self.since.store(now.max(1), Relaxed);
    }

    /// The weight at a time; smaller in the slow start.
    pub(super) fn weight(&self, now: u64, slow_start: Duration) -> f64 {
        let weight = f64::from(self.weight.load(Relaxed));
        let since = self.since.load(Relaxed);
        if slow_start.is_zero() || since == 0 {
            return weight;
        }
        let part = now.saturating_sub(since) as f64 / (slow_start.as_secs_f64() * 1_000.0);
        weight * part.clamp(SLOW_START_MIN, 1.0)
    }

    /// Records the latency of a call; `None`: it failed.
    pub(super) fn record_latency(&self, latency: Option<Duration>, now: u64) {
        let latency = latency.map_or(UNKNOWN_LATENCY, |latency| latency.as_secs_f64() * 1_000.0);
        self.latency.record_peak(latency, now);
    }

    pub(super) fn record_outcome(&self, is_failure: bool, now: impl FnOnce() -> u64) {
        if is_failure || !self.failures.is_zero() {
            self.failures.record(if is_failure { 1.0 } else { 0.0 }, FAILURE_PART, now());
        }
    }

    /// How much longer a call is expected to take because of recent failures.
    pub(super) fn penalty(&self, now: u64) -> f64 {
        let rate = self.failures.read(now);
        if rate < FAILURES_FORGOTTEN { 1.0 } else { 1.0 + FAILURE_PENALTY * rate }
    }

    /// The expected latency of a call in milliseconds. 0 for an endpoint that is idle and was never
    /// measured, so that it is.
    pub(super) fn latency(&self, in_flight: usize, now: u64) -> f64 {
        match self.latency.is_zero() {
            true if in_flight == 0 => 0.0,
            true => UNKNOWN_LATENCY,
            false => self.latency.read(now),
        }
    }
}
