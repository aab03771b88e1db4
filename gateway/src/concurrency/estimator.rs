//! The limit of concurrent calls that an upstream needs for its full throughput: the calls that it
//! has in progress at that throughput if none of them waits in it (Little's law), and some more.
//!
//! ```text
//! limit = 1.25 * n + sqrt(n),   n = throughput * latency
//! ```
//! - The throughput is the 90th percentile of the last windows in which the limit held calls back.
//!   In others it is that of the clients: they never lower the limit.
//! - The latency is that without waiting. With the limit in use, calls wait in the upstream, and an
//!   estimate from them would grow without bound. So from time to time the limit is lowered until
//!   nothing waits there (a drain), and the latency of the following calls is measured. Between two
//!   drains it may only fall, to the 25th percentile of the windows.
//! - A latency that stays above the estimate causes an early drain, and so does a limit that would
//!   be much lower: calls that take longer for another reason than waiting have a lower throughput
//!   with the same limit, and a lower limit would lower it further. If the drain confirms the
//!   latency, the upstream has changed, and earlier throughputs are forgotten, except for the last
//!   one before the drain.
//! - So does a throughput that falls while calls wait. A latency that is higher by less is hidden
//!   in the estimate: with the limit in use, calls may wait in the upstream as long.
//!
//! The mean latency of a window is used, not that of its fastest calls: with fast and slow kinds of
//! calls, the number in progress follows from the mean.

use std::collections::VecDeque;
use std::time::Duration;

use super::config::ConcurrencyConfig;
use super::window::{EndedWindow, SampleWindow};

/// The first limit.
const INITIAL: usize = 20;
/// How much more than the calls in progress are admitted. The upstream is never idle because the
/// gateway has not sent the next call yet.
const HEADROOM: f64 = 1.25;
/// Calls of a window, and of the measurement in a drain: a mean of calls of different kinds needs
/// many.
const WINDOW_CALLS: (usize, f64) = (100, f64::INFINITY);
const DRAIN_CALLS: (usize, f64) = (200, 0.05);
/// Windows whose throughputs are compared.
const RATES: usize = 20;
/// Windows whose mean latency is one without load if it is lower than the known one.
const LATENCIES: usize = 10;
/// Windows between two drains, and the time between them.
const DRAIN_WINDOWS: u32 = 50;
/// Calls between two drains, as a multiple of those of a drain.
const DRAIN_COST: usize = 20;
const DRAIN_INTERVAL: Duration = Duration::from_secs(10);
/// The part of the calls in progress that a drain leaves.
const DRAIN_PART: f64 = 0.8;
/// The same for a drain because of a higher latency.
const EARLY_DRAIN_PART: f64 = 0.7;
/// A higher latency than the estimate by this factor, in so many windows in a row, causes a drain.
const HIGHER: f64 = 2.5;
const HIGHER_WINDOWS: u32 = 4;
/// A throughput below the usual one, in standard errors of a window, less a part of one, added up
/// over windows in which the limit holds calls back, causes a drain at this sum (the test of Page,
/// CUSUM). A step by one fifth is found in three windows, and chance adds few drains. The sum
/// grows with the calls that a drain needs.
const LOWER_RATE: f64 = 0.7;
const LOWER_RATE_SUM: f64 = 3.5;
/// The least standard error of a throughput, that of 100 calls at random times.
const RATE_ERROR_MIN: f64 = 0.1;
/// The part of a window in the usual throughput.
const USUAL_RATE_PART: f64 = 0.05;
/// A lower limit by this factor is not set without a drain.
const MUCH_LOWER: f64 = 0.8;
/// A drain that measures a higher latency than before by this factor confirms it.
const CONFIRMED: f64 = 1.3;
/// After a drain that measures a lower latency than before by this factor, the next one follows
/// soon.
const IMPROVED: f64 = 0.9;
/// Part of a measurement that differs little from the known latency. Differences below so many
/// standard errors are chance.
const BLEND: f64 = 0.5;
const NOISE: f64 = 2.0;
const DRAIN_SOON: (u32, Duration) = (5, Duration::ZERO);
/// A drain ends after this many times the latency, whether or not the calls in flight ended.
const DRAIN_TIME_MAX: f64 = 5.0;
/// Calls that wait for longer make the limit grow, if the upstream is as fast as without load.
const LONG_WAIT: Duration = Duration::from_millis(200);
const UNLOADED: f64 = 1.1;
const GROWTH: f64 = 1.5;
/// Use of the limit below which it shrinks to what is known to be enough.
const LOW_USE: f64 = 0.3;

/// A drain in progress.
#[derive(Clone, Copy)]
enum Drain {
    None,
    /// Calls that were sent before are in flight.
    Emptying {
        since: Duration,
        limit: f64,
    },
    /// Calls that were sent since the beginning are measured.
    Measuring {
        since: Duration,
        limit: f64,
    },
}

/// The adaptive limit. All times are those of one clock.
pub(super) struct LimitEstimator {
    config: ConcurrencyConfig,
    limit: f64,
    window: SampleWindow,
    /// Throughputs of the last windows in which calls waited.
    rates: VecDeque<f64>,
    /// The latency without load, in seconds; `None` before the first window.
    latency: Option<f64>,
    /// Latencies of the windows since the last drain, at most `RATES`.
    latencies: VecDeque<f64>,
    drain: Drain,
    drained_at: Duration,
    /// Limited windows since the last drain.
    windows: u32,
    /// Windows until the next drain, and the least time.
    interval: (u32, Duration),
    /// Windows in a row with a higher latency.
    higher: u32,
    /// The usual throughput since the last drain, that of clients in windows without a limit.
    usual_rate: Option<f64>,
    /// By how many standard errors the throughput of the last windows was lower in sum.
    lower_rate: f64,
}

impl LimitEstimator {
    pub(super) fn new(config: ConcurrencyConfig, now: Duration) -> Self {
        LimitEstimator {
            config,
            limit: INITIAL.clamp(config.min, config.max) as f64,
            window: SampleWindow::new(WINDOW_CALLS, now),
            rates: VecDeque::with_capacity(RATES),
            latency: None,
            latencies: VecDeque::with_capacity(RATES),
            drain: Drain::None,
            drained_at: now,
            windows: 0,
            interval: (DRAIN_WINDOWS, DRAIN_INTERVAL),
            higher: 0,
            usual_rate: None,
            lower_rate: 0.0,
        }
    }

    /// The calls that may run at a time now.
    pub(super) fn limit(&self) -> usize {
        let limit = match self.drain {
            Drain::None => self.limit,
            Drain::Emptying { limit, .. } | Drain::Measuring { limit, .. } => self.limit.min(limit),
        };
        // Bounded by `max`, which is a `usize`.
        (limit as usize).clamp(self.config.min, self.config.max)
    }

    /// A call has started; `in_flight` run with it.
    pub(super) fn note_start(&mut self, in_flight: usize, wait: Duration) {
        self.window.start(in_flight, wait);
    }

    /// A call was rejected.
    pub(super) fn note_rejection(&mut self) {
        self.window.reject();
    }

    /// A call that started at `start` has ended well; `in_flight` still run.
    pub(super) fn record(&mut self, start: Duration, in_flight: usize, now: Duration) {
        let latency = now.saturating_sub(start);
        match self.drain {
            Drain::None => self.window.record(latency),
            Drain::Emptying { .. } => {}
            Drain::Measuring { since, .. } if start >= since => self.window.record(latency),
            Drain::Measuring { .. } => {}
        }
        self.advance(in_flight, now);
        if let Some(window) = self.window.end(now) {
            self.window = SampleWindow::new(WINDOW_CALLS, now);
            self.take(window, now);
        }
    }

    /// A call has ended that says nothing about the upstream's speed.
    pub(super) fn advance(&mut self, in_flight: usize, now: Duration) {
        match self.drain {
            Drain::Emptying { since, limit } => {
                let latency = self.latency.unwrap_or(0.0);
                let is_late = now.saturating_sub(since).as_secs_f64() > DRAIN_TIME_MAX * latency;
                if in_flight <= self.limit() || is_late {
                    self.drain = Drain::Measuring { since: now, limit };
                    self.window = SampleWindow::new(DRAIN_CALLS, now);
                }
            }
            Drain::None | Drain::Measuring { .. } => {}
        }
    }

    /// The calls in progress at full throughput, if it is known.
    fn in_progress(&self) -> Option<f64> {
        Some(percentile(&self.rates, 90)? * self.latency?)
    }

    /// The latency with as many calls in progress as the limit allows.
    fn expected_latency(&self) -> Option<f64> {
        let latency = self.latency?;
        Some(latency * self.in_progress().map_or(1.0, |n| (self.limit / n).max(1.0)))
    }

    fn formula(&self) -> Option<f64> {
        let n = self.in_progress()?;
        Some((HEADROOM * n + n.sqrt()).clamp(self.config.min as f64, self.config.max as f64))
    }

    fn take(&mut self, window: EndedWindow, now: Duration) {
        if let Drain::Measuring { .. } = self.drain {
            return self.end_drain(window, now);
        }
        let is_higher = self.expected_latency().is_some_and(|expected| window.latency > HIGHER * expected);
        self.higher = if is_higher { self.higher + 1 } else { 0 };
        push(&mut self.latencies, window.latency, LATENCIES);
        let mean = self.latencies.iter().sum::<f64>() / self.latencies.len() as f64;
        // That of one window is about three times that of all.
        let noise = NOISE * window.error / 3.0;
        let is_known =
            self.latency.is_some_and(|known| known * (1.0 - noise) <= mean || self.latencies.len() < LATENCIES);
        if !is_known {
            self.latency = Some(mean);
        }
        // The rate of an unlimited window is that of the clients.
        let is_higher_rate = percentile(&self.rates, 90).is_none_or(|known| window.rate > known);
        if window.is_limited || (is_higher_rate && !self.rates.is_empty()) {
            push(&mut self.rates, window.rate, RATES);
        }
        let is_slower = self.is_slower(window);
        if window.is_limited {
            self.windows += 1;
            let is_doubtful = self.adjust(window) || is_slower;
            self.drain_if_due(is_doubtful, now);
        } else if (window.in_flight_max as f64) < LOW_USE * self.limit
            && let Some(formula) = self.formula()
        {
            // The known throughput is not lower with less traffic; the latency may be.
            self.limit = self.limit.min(formula);
        }
    }

    /// Whether the throughput has fallen although calls wait: the upstream does less at a time, or
    /// each call takes longer in it.
    fn is_slower(&mut self, window: EndedWindow) -> bool {
        let usual = *self.usual_rate.get_or_insert(window.rate);
        // Calls of different kinds are as uneven in their number as in their latency.
        let lower = (1.0 - window.rate / usual) / window.error.max(RATE_ERROR_MIN) - LOWER_RATE;
        self.lower_rate = if window.is_limited { (self.lower_rate + lower).max(0.0) } else { 0.0 };
        self.usual_rate = Some(usual + (window.rate - usual) * USUAL_RATE_PART);
        self.lower_rate > LOWER_RATE_SUM * f64::from(self.interval.0.max(DRAIN_WINDOWS)) / f64::from(DRAIN_WINDOWS)
    }

    /// Sets the limit after a window that it held back. Returns whether it would be much lower:
    /// with fewer calls per second either the upstream does less at a time, or each call takes
    /// longer in it, and then a lower limit would lower the throughput further. A drain tells
    /// which.
    fn adjust(&mut self, window: EndedWindow) -> bool {
        let Some(formula) = self.formula() else { return false };
        let is_unloaded = self.latency.is_some_and(|latency| window.latency <= UNLOADED * latency);
        if window.wait_max > LONG_WAIT && is_unloaded {
            self.limit = formula.max((self.limit * GROWTH).min(self.config.max as f64));
        } else if formula < MUCH_LOWER * self.limit {
            return true;
        } else {
            self.limit = formula;
        }
        false
    }

    fn drain_if_due(&mut self, is_doubtful: bool, now: Duration) {
        let since_drain = now.saturating_sub(self.drained_at);
        let part = if is_doubtful || self.higher >= HIGHER_WINDOWS {
            EARLY_DRAIN_PART
        } else if self.windows >= self.interval.0 && since_drain >= self.interval.1 {
            DRAIN_PART
        } else {
            return;
        };
        if let Some(n) = self.in_progress() {
            self.drain = Drain::Emptying { since: now, limit: n * part };
        }
    }

    fn end_drain(&mut self, window: EndedWindow, now: Duration) {
        let noise = NOISE * window.error;
        let is_changed = self.latency.is_none_or(|known| window.latency > CONFIRMED.max(1.0 + noise) * known);
        if is_changed && window.is_limited {
            // If each call takes longer, fewer in progress have a lower throughput; if less is done
            // at a time, it is that of the drain too.
            let before = self.rates.back().copied().unwrap_or(0.0);
            self.rates.clear();
            self.rates.push_back(window.rate.max(before));
        }
        // Fewer calls in progress were faster: still fewer may be.
        let is_improved = self.latency.is_some_and(|known| window.latency < IMPROVED.min(1.0 - noise) * known);
        let windows = u32::try_from(DRAIN_COST * window.calls / WINDOW_CALLS.0).unwrap_or(u32::MAX).max(DRAIN_WINDOWS);
        self.interval = if is_improved { DRAIN_SOON } else { (windows, DRAIN_INTERVAL) };
        // A measurement that differs little differs by chance.
        self.latency = Some(match self.latency {
            Some(known) if !is_changed && !is_improved => known + (window.latency - known) * BLEND,
            // Too low a latency would keep the limit low until the next drain, and one that is too
            // high falls with the next windows.
            Some(_) if is_changed => window.latency * (1.0 + noise.min(BLEND)),
            _ => window.latency,
        });
        self.latencies.clear();
        (self.drain, self.drained_at) = (Drain::None, now);
        (self.windows, self.higher) = (0, 0);
        (self.usual_rate, self.lower_rate) = (None, 0.0);
        if let Some(formula) = self.formula() {
            self.limit = formula;
        }
    }
}

fn push(values: &mut VecDeque<f64>, value: f64, count: usize) {
    if values.len() >= count {
        values.pop_front();
    }
    values.push_back(value);
}

fn percentile(values: &VecDeque<f64>, percent: usize) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get((sorted.len().checked_sub(1)? * percent).div_ceil(100)).copied()
}
