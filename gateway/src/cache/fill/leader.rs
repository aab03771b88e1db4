//! The request that fetches, and the requests that wait for it.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use shard::{EpochSnapshot, KeyRef};

use super::budget::FetchBudget;
use super::producer::Producer;
use super::reader::FillReader;
use super::state::{BodyProgress, Buffering, FetchEnd, Fill, FillPhase};
use super::table::{Entered, FillTable, Registration};
use crate::error::{Error, ErrorKind};
use crate::http::message::Response;

/// Failed fetches after which all waiting requests fail. A dead origin then does not receive one
/// request for each of them.
const FAILURES_MAX: u8 = 2;

/// The role of a request that missed.
pub(crate) enum JoinResult {
    Lead(FillLeader),
    Join(FillJoiner),
    /// Too many requests wait already. The request fetches on its own.
    Bypass,
}

impl FillTable {
    /// Joins the fill of `key`, or leads a new one that begins at `epoch`. `is_current` says
    /// whether a response requested at a time in the sequence of removals still answers this
    /// request.
    pub(crate) fn join_or_lead(
        self: &Arc<Self>,
        key: &KeyRef<'_>,
        epoch: EpochSnapshot,
        is_current: impl FnOnce(EpochSnapshot) -> bool,
    ) -> JoinResult {
        match self.enter(key, epoch, is_current) {
            Entered::New(fill, registration) => JoinResult::Lead(FillLeader::new(fill, Some(registration))),
            Entered::Existing(fill, registration, slot) => {
                JoinResult::Join(FillJoiner { fill, registration, slot: Some(slot) })
            }
            Entered::Full => JoinResult::Bypass,
        }
    }

    /// Leads a fill of `key`, unless there is one already. For background work.
    pub(crate) fn try_lead(self: &Arc<Self>, key: &KeyRef<'_>, epoch: EpochSnapshot) -> Option<FillLeader> {
        match self.join_or_lead(key, epoch, |_| true) {
            JoinResult::Lead(leader) => Some(leader),
            JoinResult::Join(_) | JoinResult::Bypass => None,
        }
    }
}

/// The obligation to fetch. A joiner takes it over if it is dropped before its fetch has a result.
pub(crate) struct FillLeader {
    pub(super) fill: Arc<Fill>,
    /// `None`: no other request can join.
    registration: Option<Registration>,
    is_finished: bool,
}

impl FillLeader {
    fn new(fill: Arc<Fill>, registration: Option<Registration>) -> Self {
        FillLeader { fill, registration, is_finished: false }
    }

    /// A fetch that no other request joins.
    pub(crate) fn solo() -> Self {
        FillLeader::new(Arc::new(Fill::new(None)), None)
    }

    /// Whether no other request can join.
    pub(crate) fn is_solo(&self) -> bool {
        self.registration.is_none()
    }

    /// Whether a fetch of another leader for the same requests has failed.
    pub(crate) fn repeats_failed(&self) -> bool {
        matches!(self.fill.lock().phase, FillPhase::Waiting { failures: 1.., .. })
    }

    /// Whether requests wait for the result.
    pub(crate) fn has_waiting(&self) -> bool {
        self.fill.lock().has_waiting()
    }

    /// As `has_waiting`, for a leader without a client: registers the task to be woken when no
    /// request waits any more.
    pub(crate) fn is_awaited(&self, cx: &Context<'_>) -> bool {
        let mut state = self.fill.lock();
        state.register_fetch(cx);
        state.has_waiting()
    }

    /// Ends the fetch without a response for the requests that wait.
    pub(crate) fn end(mut self, end: FetchEnd) {
        self.is_finished = true;
        let mut state = self.fill.lock();
        let may_retry = match (&state.phase, end) {
            (FillPhase::Waiting { failures, .. }, FetchEnd::Retry(_)) => failures + 1 < FAILURES_MAX,
            _ => false,
        };
        if may_retry && state.hand_over(1) {
            return;
        }
        drop(state);
        self.close(end);
    }

    /// Publishes the response head and returns the reader of the leader. The producer must be
    /// completed or dropped. All fetches in flight may hold `budget_bytes` of `budget`.
    pub(crate) fn publish_head(
        mut self,
        response: Response,
        budget: &Arc<FetchBudget>,
        budget_bytes: u64,
    ) -> (Producer, FillReader) {
        self.is_finished = true;
        let mut state = self.fill.lock();
        let slot = state.add_reader();
        state.start_readers(response);
        drop(state);
        let (fill, registration) = (Arc::clone(&self.fill), self.registration.take());
        (Producer { fill, registration, budget: Arc::clone(budget), budget_bytes }, FillReader::new(&self.fill, slot))
    }

    /// Gives the waiting requests a response whose body is complete.
    pub(crate) fn publish_complete(mut self, response: Response, body: Bytes) {
        self.is_finished = true;
        self.unregister();
        let mut state = self.fill.lock();
        state.start_readers(response);
        if !body.is_empty() {
            state.push(body);
        }
        state.end_body(BodyProgress::Complete(None));
        state.keep_less(Buffering::Rest);
    }

    fn close(&mut self, end: FetchEnd) {
        self.is_finished = true;
        self.unregister();
        let mut state = self.fill.lock();
        state.phase = FillPhase::Ended(end);
        state.wake_waiting();
    }

    /// No further request joins.
    fn unregister(&mut self) {
        if let Some(registration) = self.registration.take() {
            registration.remove(&self.fill);
        }
    }
}

impl Drop for FillLeader {
    fn drop(&mut self) {
        if !self.is_finished && !self.fill.lock().hand_over(0) {
            self.close(FetchEnd::LookUpAgain);
        }
    }
}

/// A request that waits for the fetch of another request.
pub(crate) struct FillJoiner {
    fill: Arc<Fill>,
    registration: Registration,
    /// Taken over by the reader or the leader that this request becomes.
    slot: Option<usize>,
}

/// The next step of a joiner after its wait: stream the body, look up again, fail, or lead the
/// fetch.
pub(crate) enum JoinOutcome {
    Stream(Arc<Response>, FillReader),
    /// Nothing is shared. The request looks up again.
    Retry,
    /// The response is for the leader alone, or too far ahead. The request fetches on its own.
    Bypass,
    Failed(ErrorKind),
    /// The fetch has no result within the time of this request.
    TimedOut,
    /// The leader was dropped or failed. This request leads now.
    Lead(FillLeader),
}

impl FillJoiner {
    /// Waits for the result of the fetch, at most for `timeout`: then the request is to fail, and
    /// not to add a fetch of its own to a slow origin. Cancel safe.
    pub(crate) async fn wait(mut self, timeout: Duration) -> JoinOutcome {
        let result = tokio::time::timeout(timeout, poll_fn(|cx| self.poll_wait(cx))).await;
        result.unwrap_or(JoinOutcome::TimedOut)
    }

    pub(super) fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<JoinOutcome> {
        let Some(slot) = self.slot else { return Poll::Ready(JoinOutcome::Retry) };
        let mut state = self.fill.lock();
        match &state.phase {
            FillPhase::Waiting { has_leader: true, .. } => {
                state.slots.register(slot, cx);
                Poll::Pending
            }
            FillPhase::Waiting { has_leader: false, failures } => {
                state.phase = FillPhase::Waiting { has_leader: true, failures: *failures };
                state.remove(slot);
                drop(state);
                self.slot = None;
                let leader = FillLeader::new(Arc::clone(&self.fill), Some(self.registration.clone()));
                Poll::Ready(JoinOutcome::Lead(leader))
            }
            // The body failed before this request has read a byte. A fetch for each request that
            // waited would be a stampede on an origin in trouble.
            FillPhase::Streaming(_, BodyProgress::Aborted(error)) => {
                Poll::Ready(JoinOutcome::Failed(Error::from(error).kind()))
            }
            FillPhase::Streaming(response, _) => {
                let response = Arc::clone(response);
                if state.slots.is_detached(slot) {
                    return Poll::Ready(JoinOutcome::Bypass);
                }
                drop(state);
                self.slot = None;
                Poll::Ready(JoinOutcome::Stream(response, FillReader::new(&self.fill, slot)))
            }
            FillPhase::Ended(end) => Poll::Ready(match *end {
                FetchEnd::LookUpAgain => JoinOutcome::Retry,
                FetchEnd::FetchAlone => JoinOutcome::Bypass,
                FetchEnd::Retry(kind) | FetchEnd::Fail(kind) => JoinOutcome::Failed(kind),
            }),
        }
    }
}

impl Drop for FillJoiner {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        let mut state = self.fill.lock();
        state.remove(slot);
        // This request may have been woken to lead. Wake another one.
        if let FillPhase::Waiting { has_leader: false, .. } = state.phase
            && !state.hand_over(0)
        {
            state.phase = FillPhase::Ended(FetchEnd::LookUpAgain);
            drop(state);
            self.registration.remove(&self.fill);
        }
    }
}
