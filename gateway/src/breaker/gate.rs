//! The breaker as calls use it: admission, permit, result. Shared by all threads.
//!
//! Invariant: every operation is one critical section of one lock, and none holds it while another
//! begins. An execution is therefore a sequence of whole operations, in any order of the threads;
//! `tests/orders.rs` runs all of them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::config::{BreakerConfig, BreakerMode};
use super::core::{BreakerCore, CallAdmission, EndedCall};
use super::name::BreakerName;
use super::state::{BreakerState, BreakerTransition, CallStart, ManualState, OpenCause};

/// The circuit breaker of a route or of an upstream.
pub(crate) struct Breaker {
    name: BreakerName,
    config: BreakerConfig,
    core: Mutex<BreakerCore>,
    rejections: AtomicU64,
}

/// Permission for one call, whose result the caller records with `record`; a drop without it counts
/// as neither success nor failure.
pub(crate) struct BreakerPermit<'a> {
    breaker: &'a Breaker,
    /// When the origin had the whole request; `None` before.
    started_at: Option<Instant>,
    generation: u64,
    admission: CallAdmission,
    is_recorded: bool,
}

/// A call whose result was recorded, for a failure later on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordedCall {
    pub(super) generation: u64,
    pub(super) second: u64,
}

/// The state of a breaker, for the admin address.
pub(crate) struct BreakerReport {
    pub(crate) state: BreakerState,
    /// The time in this state.
    pub(crate) since: Duration,
    /// The least time until all calls are admitted.
    pub(crate) wait: Duration,
    /// The share of calls that is admitted, in percent; `None`: probes only.
    pub(crate) percent: Option<u32>,
    pub(crate) cause: Option<OpenCause>,
    /// The state that an operator has set, and the time left.
    pub(crate) manual: Option<(ManualState, Duration)>,
    /// Calls that were rejected, or would have been in shadow mode.
    pub(crate) rejections: u64,
}

impl Breaker {
    /// `seed` is that of the jitter of open times.
    pub(crate) fn new(name: BreakerName, config: BreakerConfig, now: Instant, seed: u64) -> Self {
        let core = Mutex::new(BreakerCore::new(&config, now, seed));
        Breaker { name, config, core, rejections: AtomicU64::new(0) }
    }

    /// A closed breaker in place of this one, which had another configuration. A state that an
    /// operator has set stays.
    pub(crate) fn replaced(&self, config: BreakerConfig, now: Instant, seed: u64) -> Self {
        let breaker = Breaker::new(self.name.clone(), config, now, seed);
        if let Some((state, until)) = self.lock().manual() {
            breaker.lock().set_manual(state, until, now);
        }
        breaker
    }

    pub(crate) fn name(&self) -> &BreakerName {
        &self.name
    }

    pub(crate) fn config(&self) -> &BreakerConfig {
        &self.config
    }

    pub(crate) fn state(&self) -> BreakerState {
        self.lock().state()
    }

    /// Whether calls are rejected now.
    pub(crate) fn is_rejecting(&self) -> bool {
        let core = self.lock();
        core.state() == BreakerState::Open && (self.config.mode == BreakerMode::Enforce || core.manual().is_some())
    }

    /// The least time until all calls are admitted.
    pub(crate) fn wait(&self, now: Instant) -> Duration {
        self.lock().wait(&self.config, now)
    }

    /// Calls that were rejected, or would have been in shadow mode.
    pub(crate) fn rejections(&self) -> u64 {
        self.rejections.load(Relaxed)
    }

    pub(crate) fn report(&self, now: Instant) -> BreakerReport {
        let core = self.lock();
        BreakerReport {
            state: core.state(),
            since: now.saturating_duration_since(core.since()),
            wait: core.wait(&self.config, now),
            percent: core.percent(&self.config, now),
            cause: core.cause(),
            manual: core.manual().map(|(state, until)| (state, until.saturating_duration_since(now))),
            rejections: self.rejections(),
        }
    }

    /// Makes the changes that are due at `now`. Returns the last one. To be called several times a
    /// second, so that the state is right without calls.
    pub(crate) fn advance(&self, now: Instant) -> BreakerTransition {
        self.advance_core(&mut self.lock(), now)
    }

    /// Sets a state for a limited time, in every mode.
    pub(crate) fn set_manual(&self, state: ManualState, duration: Duration, now: Instant) {
        self.lock().set_manual(state, now + duration, now);
    }

    /// Ends a state that an operator has set. Returns it; `None`: there is none.
    pub(crate) fn end_manual(&self, now: Instant) -> Option<ManualState> {
        self.lock().end_manual(now)
    }

    /// Admits a call whose time starts at `start`.
    ///
    /// # Errors
    /// The call is rejected.
    pub(crate) fn admit(
        &self,
        start: CallStart,
        now: Instant,
    ) -> Result<(BreakerPermit<'_>, BreakerTransition), BreakerTransition> {
        let has_request = start == CallStart::OnAdmission;
        let mut core = self.lock();
        let change = self.advance_core(&mut core, now);
        let admission = match (self.config.mode, core.manual()) {
            (BreakerMode::Off, None) => Some(CallAdmission::Unjudged),
            _ => core.admit(&self.config, now, has_request),
        };
        let admission = match admission {
            Some(admission) => admission,
            None => {
                self.rejections.fetch_add(1, Relaxed);
                if self.config.mode == BreakerMode::Enforce || core.manual().is_some() {
                    return Err(change);
                }
                CallAdmission::Unjudged
            }
        };
        let permit = BreakerPermit {
            breaker: self,
            started_at: has_request.then_some(now),
            generation: core.generation,
            admission,
            is_recorded: false,
        };
        Ok((permit, change))
    }

    /// Counts a call as failed after `record`: the response started well and was aborted.
    pub(crate) fn fail_late(&self, call: RecordedCall, now: Instant) -> BreakerTransition {
        let mut core = self.lock();
        if core.generation == call.generation { core.fail_late(call.second, &self.config, now) } else { None }
    }

    fn advance_core(&self, core: &mut BreakerCore, now: Instant) -> BreakerTransition {
        let mut last = None;
        while let Some(change) = core.advance(&self.config, now) {
            last = Some(change);
        }
        last
    }

    fn lock(&self) -> MutexGuard<'_, BreakerCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BreakerPermit<'_> {
    /// The origin has the whole request: its time starts. Starts anew if the request is sent again.
    pub(crate) fn start(&mut self, now: Instant) {
        let before = self.started_at.replace(now);
        let mut core = self.breaker.lock();
        if core.generation == self.generation {
            core.request_sent(self.admission, before, now);
        }
    }

    /// Ends the call with its result. The recorded call is `None` if it is not judged.
    pub(crate) fn record(mut self, succeeded: bool, now: Instant) -> (Option<RecordedCall>, BreakerTransition) {
        self.is_recorded = true;
        if self.admission == CallAdmission::Unjudged {
            return (None, None);
        }
        let call = EndedCall { admission: self.admission, started_at: self.started_at, succeeded };
        let mut core = self.breaker.lock();
        let recorded = RecordedCall { generation: self.generation, second: core.window.second(now) };
        let change =
            if core.generation == self.generation { core.record(&call, &self.breaker.config, now) } else { None };
        (Some(recorded), change)
    }
}

impl Drop for BreakerPermit<'_> {
    fn drop(&mut self) {
        if self.is_recorded {
            return;
        }
        let mut core = self.breaker.lock();
        if core.generation == self.generation {
            core.release(self.admission, self.started_at);
        }
    }
}
