//! The state machine of a breaker: phases, and their changes by calls and by time.

use std::time::{Duration, Instant};

use super::config::BreakerConfig;
use super::open_time::OpenTimes;
use super::probes::Probes;
use super::ramp::{RAMP_CALLS_MIN, Ramp};
use super::state::{BreakerChange, BreakerState, BreakerTransition, ManualState, OpenCause};
use super::window::{CallMinimum, CallWindow};

/// The least time that a rejected client waits while the probes of a half-open breaker run.
const PROBE_WAIT: Duration = Duration::from_secs(1);

enum Phase {
    Closed,
    Open { until: Instant },
    HalfOpen(Probes),
    Ramp(Ramp),
}

/// How an admitted call counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallAdmission {
    /// Not at all.
    Unjudged,
    /// In the window.
    Counted,
    /// In the window, and among the running calls of the ramp.
    InRamp,
    /// As the probe with this id.
    Probe(u64),
}

/// The result of a call, with its admission and times.
pub(super) struct EndedCall {
    pub(super) admission: CallAdmission,
    /// When the origin had the whole request; `None`: it did not.
    pub(super) started_at: Option<Instant>,
    pub(super) succeeded: bool,
}

/// Mutable part of a breaker, behind its lock.
pub(super) struct BreakerCore {
    phase: Phase,
    /// When the phase began.
    since: Instant,
    /// Why it opened last.
    cause: Option<OpenCause>,
    /// Incremented when calls that run are not to be counted any more.
    pub(super) generation: u64,
    pub(super) window: CallWindow,
    open_times: OpenTimes,
    /// The state that an operator has set, and its end.
    manual: Option<(ManualState, Instant)>,
}

impl BreakerCore {
    pub(super) fn new(config: &BreakerConfig, now: Instant, seed: u64) -> Self {
        BreakerCore {
            phase: Phase::Closed,
            since: now,
            cause: None,
            generation: 0,
            window: CallWindow::new(config, now),
            open_times: OpenTimes::new(seed),
            manual: None,
        }
    }

    pub(super) fn state(&self) -> BreakerState {
        match (self.manual, &self.phase) {
            (Some((ManualState::Open, _)), _) => BreakerState::Open,
            (Some((ManualState::Closed, _)), _) | (None, Phase::Closed) => BreakerState::Closed,
            (None, Phase::Open { .. }) => BreakerState::Open,
            (None, Phase::HalfOpen(_)) => BreakerState::HalfOpen,
            (None, Phase::Ramp(_)) => BreakerState::Ramp,
        }
    }

    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Why the breaker is not closed; `None`: it is, or an operator has set its state.
    pub(super) fn cause(&self) -> Option<OpenCause> {
        self.cause.filter(|_| self.manual.is_none() && !matches!(self.phase, Phase::Closed))
    }

    pub(super) fn manual(&self) -> Option<(ManualState, Instant)> {
        self.manual
    }

    /// The share of calls that is admitted, in percent; `None`: as many as there are probes.
    pub(super) fn percent(&self, config: &BreakerConfig, now: Instant) -> Option<u32> {
        match (self.state(), &self.phase) {
            (BreakerState::Open, _) => Some(0),
            (BreakerState::Closed, _) => Some(100),
            (BreakerState::Ramp, Phase::Ramp(ramp)) => Some(ramp.percent(config.ramp, now)),
            _ => None,
        }
    }

    /// The least time until all calls are admitted.
    pub(super) fn wait(&self, config: &BreakerConfig, now: Instant) -> Duration {
        match (self.manual, &self.phase) {
            (Some((ManualState::Open, until)), _) => until.saturating_duration_since(now) + config.ramp,
            (Some((ManualState::Closed, _)), _) | (None, Phase::Closed) => Duration::ZERO,
            (None, Phase::Open { until }) => until.saturating_duration_since(now) + config.ramp,
            (None, Phase::HalfOpen(_)) => PROBE_WAIT + config.ramp,
            (None, Phase::Ramp(ramp)) => ramp.left(config.ramp, now),
        }
    }

    /// Makes the changes that are due at `now`.
    pub(super) fn advance(&mut self, config: &BreakerConfig, now: Instant) -> BreakerTransition {
        if let Some((manual, until)) = self.manual {
            return (now >= until).then(|| {
                self.end_manual(now);
                BreakerChange::ManualEnded(manual)
            });
        }
        match &self.phase {
            Phase::Closed => self.judge_hanging(config, now),
            Phase::Open { until } if now >= *until => {
                self.enter(Phase::HalfOpen(Probes::default()), now);
                Some(BreakerChange::HalfOpened)
            }
            Phase::HalfOpen(probes) if probes.is_overdue(now, config.slow) => {
                Some(self.open(OpenCause::of_probe(true), config, now))
            }
            Phase::Ramp(ramp) => {
                let is_over = ramp.left(config.ramp, now).is_zero();
                self.judge_hanging(config, now).or_else(|| is_over.then(|| self.close(now)))
            }
            Phase::Open { .. } | Phase::HalfOpen(_) => None,
        }
    }

    /// Admits a call after `advance`. `None`: it is rejected.
    pub(super) fn admit(&mut self, config: &BreakerConfig, now: Instant, has_request: bool) -> Option<CallAdmission> {
        let admission = match (self.manual, &mut self.phase) {
            (Some((ManualState::Open, _)), _) => return None,
            (Some((ManualState::Closed, _)), _) => return Some(CallAdmission::Unjudged),
            (None, Phase::Closed) => CallAdmission::Counted,
            (None, Phase::Open { .. }) => return None,
            (None, Phase::HalfOpen(probes)) => return probes.start(now, has_request).map(CallAdmission::Probe),
            (None, Phase::Ramp(ramp)) => ramp.admit(config.ramp, now).then_some(CallAdmission::InRamp)?,
        };
        if has_request {
            self.window.start(now);
        }
        Some(admission)
    }

    /// The origin has the whole request of a call of this generation; `before`: it had it before.
    pub(super) fn request_sent(&mut self, admission: CallAdmission, before: Option<Instant>, now: Instant) {
        match (admission, &mut self.phase) {
            (CallAdmission::Probe(id), Phase::HalfOpen(probes)) => probes.request_sent(id, now),
            (CallAdmission::Counted | CallAdmission::InRamp, _) => {
                before.into_iter().for_each(|before| self.window.finish(before));
                self.window.start(now);
            }
            (CallAdmission::Unjudged | CallAdmission::Probe(_), _) => {}
        }
    }

    /// Ends a call of this generation without a result.
    pub(super) fn release(&mut self, admission: CallAdmission, started_at: Option<Instant>) {
        match (admission, &mut self.phase) {
            (CallAdmission::Probe(id), Phase::HalfOpen(probes)) => {
                probes.end(id);
            }
            (CallAdmission::InRamp, Phase::Ramp(ramp)) => ramp.end(),
            _ => {}
        }
        if matches!(admission, CallAdmission::Counted | CallAdmission::InRamp)
            && let Some(started_at) = started_at
        {
            self.window.finish(started_at);
        }
    }

    /// Ends a call of this generation with its result.
    pub(super) fn record(&mut self, call: &EndedCall, config: &BreakerConfig, now: Instant) -> BreakerTransition {
        let took = call.started_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let is_slow = took >= config.slow;
        let is_good = call.succeeded && !is_slow;
        match (call.admission, &mut self.phase) {
            (CallAdmission::Unjudged, _) => None,
            (CallAdmission::Probe(id), Phase::HalfOpen(probes)) => {
                if !probes.end(id) {
                    return None;
                }
                if !is_good {
                    return Some(self.open(OpenCause::of_probe(call.succeeded), config, now));
                }
                probes.succeed().then(|| self.begin_ramp(config, now))
            }
            (CallAdmission::Probe(_), _) => None,
            (CallAdmission::Counted | CallAdmission::InRamp, _) => {
                self.release(call.admission, call.started_at);
                self.window.record(call.succeeded, is_slow, now);
                if is_good { None } else { self.judge(config, now) }
            }
        }
    }

    /// Counts a recorded call of this generation as failed.
    pub(super) fn fail_late(&mut self, second: u64, config: &BreakerConfig, now: Instant) -> BreakerTransition {
        if self.manual.is_some() {
            return None;
        }
        match self.phase {
            Phase::Open { .. } => None,
            Phase::HalfOpen(_) => Some(self.open(OpenCause::of_probe(false), config, now)),
            Phase::Closed | Phase::Ramp(_) => {
                self.window.fail_late(second, now);
                self.judge(config, now)
            }
        }
    }

    /// Sets a state until `until`. Calls that run are not counted any more.
    pub(super) fn set_manual(&mut self, state: ManualState, until: Instant, now: Instant) {
        self.manual = Some((state, until));
        self.generation += 1;
        self.since = now;
    }

    /// Ends a state that an operator has set: after a closed one all calls are admitted, after an
    /// open one probes are. Returns the state.
    pub(super) fn end_manual(&mut self, now: Instant) -> Option<ManualState> {
        let (manual, _) = self.manual.take()?;
        match manual {
            ManualState::Open => self.enter(Phase::HalfOpen(Probes::default()), now),
            ManualState::Closed => drop(self.close_anew(now)),
        }
        Some(manual)
    }

    /// Opens if calls hang and the window says so: while all hang, none ends.
    fn judge_hanging(&mut self, config: &BreakerConfig, now: Instant) -> BreakerTransition {
        if self.window.overdue(now) == 0 { None } else { self.judge(config, now) }
    }

    /// Opens if the calls of the window say so.
    fn judge(&mut self, config: &BreakerConfig, now: Instant) -> BreakerTransition {
        let minimum = match self.phase {
            Phase::Ramp(_) => CallMinimum::Assumed(RAMP_CALLS_MIN),
            _ => CallMinimum::Required(config.minimum),
        };
        let cause = self.window.open_cause(config, minimum, now)?;
        Some(self.open(cause, config, now))
    }

    fn open(&mut self, cause: OpenCause, config: &BreakerConfig, now: Instant) -> BreakerChange {
        let time = self.open_times.next((config.open, config.window), now);
        self.cause = Some(cause);
        self.enter(Phase::Open { until: now + time }, now);
        BreakerChange::Opened(cause, time)
    }

    fn begin_ramp(&mut self, config: &BreakerConfig, now: Instant) -> BreakerChange {
        if config.ramp.is_zero() {
            return self.close_anew(now);
        }
        self.enter(Phase::Ramp(Ramp::new(now)), now);
        self.window.clear();
        BreakerChange::Ramping
    }

    /// Ends a ramp. Its calls are those of the closed breaker.
    fn close(&mut self, now: Instant) -> BreakerChange {
        self.open_times.closed(now);
        (self.phase, self.since) = (Phase::Closed, now);
        BreakerChange::Closed
    }

    /// Closes without the calls so far.
    fn close_anew(&mut self, now: Instant) -> BreakerChange {
        self.generation += 1;
        self.window.clear();
        self.close(now)
    }

    fn enter(&mut self, phase: Phase, now: Instant) {
        (self.phase, self.since) = (phase, now);
        self.generation += 1;
    }
}
