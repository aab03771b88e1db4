//! The limit as calls use it: a slot at once, or after a wait, or a rejection.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout_at;

use super::config::ConcurrencyConfig;
use super::estimator::LimitEstimator;
use super::queue::WaitQueue;
use crate::label;
use crate::metrics::{Counters, Label as _};
use crate::tasks::{self, TaskWait};

label! {
    /// Why a call got no slot.
    pub(crate) ConcurrencyRejection, "reason", {
        /// It left a full queue, for a newer call of its user class, or for one of a class with
        /// fewer calls for its weight.
        Full = "full",
        /// It waited for too long.
        Wait = "wait",
    }
}

/// The adaptive limit of one upstream.
pub(crate) struct ConcurrencyLimit {
    config: ConcurrencyConfig,
    epoch: Instant,
    core: Mutex<LimitCore>,
    rejections: Counters<ConcurrencyRejection>,
}

struct LimitCore {
    estimator: LimitEstimator,
    in_flight: usize,
    waiting: WaitQueue<oneshot::Sender<CallSlot>>,
}

/// The limit, the calls that have a slot, and those that wait for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConcurrencyReport {
    pub(crate) limit: usize,
    pub(crate) in_flight: usize,
    pub(crate) waiting: usize,
}

/// A call in progress. A drop returns the slot; `succeed` before tells how long it took.
pub(crate) struct CallSlot {
    limit: Arc<ConcurrencyLimit>,
    start: Duration,
    /// Whether the limit counts it.
    is_counted: bool,
}

impl ConcurrencyLimit {
    pub(crate) fn new(config: ConcurrencyConfig, now: Instant) -> Self {
        let estimator = LimitEstimator::new(config, Duration::ZERO);
        let core = LimitCore { estimator, in_flight: 0, waiting: WaitQueue::new() };
        ConcurrencyLimit { config, epoch: now, core: Mutex::new(core), rejections: Counters::default() }
    }

    pub(crate) fn config(&self) -> &ConcurrencyConfig {
        &self.config
    }

    pub(crate) fn rejections(&self, reason: ConcurrencyRejection) -> u64 {
        self.rejections.get(reason)
    }

    /// The state of the limit, for the admin address.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let ConcurrencyReport { limit, in_flight, waiting } = self.report();
        let rejections: u64 = ConcurrencyRejection::ALL.iter().map(|reason| self.rejections(*reason)).sum();
        serde_json::json!({
            "limit": limit,
            "min": self.config.min,
            "max": self.config.max,
            "in_flight": in_flight,
            "waiting": waiting,
            "rejections": rejections,
        })
    }

    pub(crate) fn report(&self) -> ConcurrencyReport {
        let mut core = self.lock();
        core.waiting.retain(is_awaited);
        let LimitCore { estimator, in_flight, waiting } = &*core;
        ConcurrencyReport { limit: estimator.limit(), in_flight: *in_flight, waiting: waiting.len() }
    }

    /// A slot, if there is one and no other call waits.
    pub(crate) fn try_acquire(self: &Arc<Self>, now: Instant) -> Option<CallSlot> {
        let mut core = self.lock();
        if core.waiting.len() > 0 {
            core.waiting.retain(is_awaited);
        }
        if core.waiting.len() > 0 || core.in_flight >= core.estimator.limit() {
            return None;
        }
        Some(self.start(&mut core, Duration::ZERO, self.time(now)))
    }

    /// Waits for a slot until `due`. User classes share the slots by weight; `weight` is that of
    /// the caller's class, in thousandths. Cancel safe.
    ///
    /// # Errors
    /// The queue is full, or the time has passed.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        weight: u32,
        due: tokio::time::Instant,
    ) -> Result<CallSlot, ConcurrencyRejection> {
        tasks::set_waiting_for(TaskWait::ConcurrencySlot);
        let (sender, receiver) = oneshot::channel();
        self.enqueue(weight, sender);
        // There may have been a slot meanwhile, without another call that ends.
        self.grant();
        let rejection = match timeout_at(due, receiver).await {
            Ok(Ok(slot)) => return Ok(slot),
            Ok(Err(_dropped)) => ConcurrencyRejection::Full,
            Err(_elapsed) => ConcurrencyRejection::Wait,
        };
        self.rejections.inc(rejection);
        self.lock().estimator.note_rejection();
        Err(rejection)
    }

    fn enqueue(&self, weight: u32, sender: oneshot::Sender<CallSlot>) {
        let mut core = self.lock();
        let now = self.time(Instant::now());
        if core.waiting.is_full() {
            core.waiting.retain(is_awaited);
        }
        // The receiver of a sender that is dropped learns of it.
        drop(core.waiting.push(weight, sender, now));
    }

    /// Gives free slots to waiting calls.
    fn grant(self: &Arc<Self>) {
        loop {
            let (sender, slot) = {
                let mut core = self.lock();
                if core.in_flight >= core.estimator.limit() {
                    return;
                }
                let now = self.time(Instant::now());
                let Some((since, sender)) = core.waiting.pop(now, is_awaited) else { return };
                // A wait of no time is one as well.
                let wait = now.saturating_sub(since).max(Duration::from_nanos(1));
                (sender, self.start(&mut core, wait, now))
            };
            // A call that has gone meanwhile has dropped the slot, which is granted again there.
            if let Err(slot) = sender.send(slot) {
                slot.give_back();
            }
        }
    }

    fn start(self: &Arc<Self>, core: &mut LimitCore, wait: Duration, now: Duration) -> CallSlot {
        core.in_flight += 1;
        core.estimator.note_start(core.in_flight, wait);
        CallSlot { limit: Arc::clone(self), start: now, is_counted: true }
    }

    fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.epoch)
    }

    fn lock(&self) -> MutexGuard<'_, LimitCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_awaited(sender: &oneshot::Sender<CallSlot>) -> bool {
    !sender.is_closed()
}

impl CallSlot {
    /// Returns the slot of a call that has ended well.
    pub(crate) fn succeed(self, now: Instant) {
        let now = self.limit.time(now);
        let mut core = self.limit.lock();
        let others = core.in_flight.saturating_sub(1);
        core.estimator.record(self.start, others, now);
    }

    /// Returns the slot without giving it to another call.
    fn give_back(mut self) {
        self.is_counted = false;
        let mut core = self.limit.lock();
        core.in_flight = core.in_flight.saturating_sub(1);
    }
}

impl Drop for CallSlot {
    fn drop(&mut self) {
        if !self.is_counted {
            return;
        }
        let mut core = self.limit.lock();
        core.in_flight = core.in_flight.saturating_sub(1);
        let (in_flight, now) = (core.in_flight, self.limit.time(Instant::now()));
        core.estimator.advance(in_flight, now);
        let has_waiting = core.waiting.len() > 0;
        drop(core);
        if has_waiting {
            self.limit.grant();
        }
    }
}
