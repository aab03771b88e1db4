//! Whether a request is sent again, and within which budget.
//!
//! Two reasons need no permission: the server has processed nothing of the request, or it closed a
//! kept connection (RFC 9112 section 9.3.1). Everything else is a retry, which the configuration
//! allows and the budget bounds. Invariant: a request that is not safe to repeat is sent again only
//! while no server can have processed it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::http::attempt::UpstreamConnectionError;
use crate::http::exchange_clock::ExchangeTimeout;
use crate::http::fields::KnownField;
use crate::http::message::{Request, Response};
use crate::http::tls_fault::TlsFault;
use crate::label;
use crate::metrics::{Counter, Counters};

/// Retries of an upstream (`[upstreams.X]`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RetryConfig {
    /// Most retries of one request.
    pub(crate) retries: u32,
    /// Statuses after which a request is sent again: single ones, or classes as in `5` for 5xx.
    pub(crate) statuses: Vec<u16>,
}

impl Default for RetryConfig {
    fn default() -> Self {
        RetryConfig { retries: 0, statuses: vec![503] }
    }
}

impl RetryConfig {
    /// Whether a response has a status after which the request is sent again.
    pub(super) fn wants(&self, response: &Response) -> bool {
        if self.retries == 0 {
            return false;
        }
        let status = response.status.as_u16();
        self.statuses.iter().any(|wanted| *wanted == status || *wanted == status / 100)
    }
}

label! {
    /// Why a request was sent again.
    pub(crate) RetryReason, "reason", {
        /// No endpoint could be reached.
        Connect = "connect",
        /// The connection or its stream ended before a byte of the response.
        Reset = "reset",
        /// The response has one of the configured statuses.
        Status = "status",
    }
}

label! {
    /// Why a request was sent again that no endpoint has processed, as far as the gateway can tell.
    /// This is no retry: `retries` does not limit it.
    pub(crate) ReplayReason, "reason", {
        /// A kept connection ended before a byte of the response: the server had closed it,
        /// probably before the request arrived (RFC 9112 section 9.3.1).
        Closed = "closed",
        /// The server has said that it did not process the request.
        Refused = "refused",
    }
}

/// How often a request is sent again that a server has not processed, and says so. One that refuses
/// everything would otherwise get every request for as long as it does. A server that ends each
/// connection after 50 requests leaves some of them over several times in a row.
const REFUSALS_MAX: u32 = 5;
/// Retries and hedges in progress that are always allowed, as in Envoy.
const BUDGET_MIN: usize = 3;
/// One retry or hedge in progress for this number of requests in flight: 20 %.
const REQUESTS_PER_RETRY: usize = 5;
/// The pause before the first retry of an endpoint that has just failed; doubles with each further
/// one.
const PAUSE: Duration = Duration::from_millis(25);

/// The facts of one failed attempt that decide whether the request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FailedAttempt {
    pub(super) failure: AttemptFailure,
    /// Whether the endpoint may have got any byte of the request.
    pub(super) request_sent: bool,
    /// Whether the connection served an exchange before.
    pub(super) is_reused: bool,
}

/// A failure as retries tell it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttemptFailure {
    /// No connection was opened that can carry a request.
    Connect,
    /// The server has said that it did not process the request.
    Refused,
    /// The connection ended before a byte of the response.
    Closed,
    /// The stream was reset before a byte of the response.
    Reset,
    /// Any other failure: a timeout, a malformed response, a failed client.
    Final,
}

impl AttemptFailure {
    pub(super) fn of(error: &UpstreamConnectionError) -> Self {
        match error {
            UpstreamConnectionError::Connect(_)
            | UpstreamConnectionError::Ended(_)
            | UpstreamConnectionError::Tls(TlsFault::Closed, _)
            | UpstreamConnectionError::NoAddress
            | UpstreamConnectionError::Timeout(ExchangeTimeout::UpstreamConnect) => AttemptFailure::Connect,
            UpstreamConnectionError::Refused(_) => AttemptFailure::Refused,
            UpstreamConnectionError::NoResponse(_) => AttemptFailure::Closed,
            UpstreamConnectionError::Reset(_) => AttemptFailure::Reset,
            _ => AttemptFailure::Final,
        }
    }
}

/// The next step after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterFailure {
    GiveUp,
    /// Sent again without permission: nothing was processed, or a kept connection was closed.
    Repeat,
    /// Sent again if the budget allows it.
    Retry(RetryReason),
}

/// The repetitions that one request still has.
#[derive(Clone, Copy, Debug)]
pub(super) struct RepeatRules {
    /// Whether processing the request twice is safe.
    is_safe: bool,
    retries_left: u32,
    refusals_left: u32,
}

impl RepeatRules {
    pub(super) fn new(is_safe: bool, retries: u32) -> Self {
        RepeatRules { is_safe, retries_left: retries, refusals_left: REFUSALS_MAX }
    }

    /// Forbids retries: the request is sent once, as far as the gateway can tell.
    pub(super) fn forbid_retries(&mut self) {
        self.retries_left = 0;
    }

    /// Allows the repetition of a request that is safe to repeat although its method does not say
    /// so.
    pub(super) fn set_safe(&mut self) {
        self.is_safe = true;
    }

    pub(super) fn has_retries(&self) -> bool {
        self.retries_left > 0
    }

    /// Counts a retry.
    pub(super) fn count_retry(&mut self) {
        self.retries_left = self.retries_left.saturating_sub(1);
    }

    /// The next step after a failure.
    pub(super) fn after(&mut self, failed: FailedAttempt) -> AfterFailure {
        let FailedAttempt { failure, request_sent, is_reused } = failed;
        let may_repeat = self.is_safe || !request_sent;
        match failure {
            AttemptFailure::Refused if self.refusals_left > 0 => {
                self.refusals_left -= 1;
                AfterFailure::Repeat
            }
            AttemptFailure::Closed if is_reused && may_repeat => AfterFailure::Repeat,
            AttemptFailure::Connect if !request_sent && self.has_retries() => AfterFailure::Retry(RetryReason::Connect),
            AttemptFailure::Refused | AttemptFailure::Closed | AttemptFailure::Reset
                if may_repeat && self.has_retries() =>
            {
                AfterFailure::Retry(RetryReason::Reset)
            }
            _ => AfterFailure::GiveUp,
        }
    }
}

/// Whether processing the request twice is safe: by its method, or because its client says that the
/// origin recognises a repetition.
pub(super) fn is_safe_to_repeat(request: &Request) -> bool {
    request.method.is_idempotent() || request.fields.named(b"idempotency-key").next().is_some()
}

/// The time in `Retry-After`, as a number of seconds; `None` without one.
pub(super) fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.fields.get(KnownField::RetryAfter)?;
    let seconds: u64 = str::from_utf8(value).ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// The pause before the next retry of the same endpoint, between a half and all of a time that
/// doubles.
pub(super) fn pause(retries: u32, random: u64) -> Duration {
    let longest = PAUSE * 2_u32.pow(retries.min(6));
    longest / 2 + (longest / 2).mul_f64((random % 1_000) as f64 / 1_000.0)
}

/// The budget of retries and hedges of one upstream, and their counts. It outlives a reload.
#[derive(Default)]
pub(crate) struct RetryBudget {
    running: AtomicUsize,
    retries: Counters<RetryReason>,
    replays: Counters<ReplayReason>,
    hedges: Counter,
    hedges_won: Counter,
    denied: Counter,
    seed: AtomicU64,
}

impl RetryBudget {
    /// The number of cells of its counters.
    pub(super) const CELLS: usize =
        Counters::<RetryReason>::CELLS + Counters::<ReplayReason>::CELLS + 3 * Counter::CELLS;
}

/// A retry or hedge in progress.
pub(crate) struct RetryPermit(Arc<RetryBudget>);

impl Drop for RetryPermit {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Relaxed);
    }
}

impl RetryBudget {
    /// Begins a retry or hedge, beside `in_flight` requests; `None` if the budget is used up.
    pub(super) fn begin(self: &Arc<Self>, in_flight: usize) -> Option<RetryPermit> {
        let allowed = BUDGET_MIN.max(in_flight / REQUESTS_PER_RETRY);
        let has_room = |running: usize| (running < allowed).then_some(running + 1);
        match self.running.fetch_update(Relaxed, Relaxed, has_room) {
            Ok(_) => Some(RetryPermit(Arc::clone(self))),
            Err(_) => {
                self.denied.inc();
                None
            }
        }
    }

    pub(super) fn count_retry(&self, reason: RetryReason) {
        self.retries.inc(reason);
    }

    pub(super) fn count_hedge(&self) {
        self.hedges.inc();
    }

    /// Counts a request that is sent again although it is no retry.
    pub(super) fn count_replay(&self, reason: ReplayReason) {
        self.replays.inc(reason);
    }

    pub(super) fn replays(&self, reason: ReplayReason) -> u64 {
        self.replays.get(reason)
    }

    /// Counts a hedge whose response was used.
    pub(super) fn count_won(&self) {
        self.hedges_won.inc();
    }

    pub(super) fn retries(&self, reason: RetryReason) -> u64 {
        self.retries.get(reason)
    }

    /// Hedges, and those whose response was used.
    pub(super) fn hedges(&self) -> (u64, u64) {
        (self.hedges.get(), self.hedges_won.get())
    }

    /// Retries and hedges that the budget did not allow.
    pub(super) fn denied(&self) -> u64 {
        self.denied.get()
    }

    /// A number that differs from call to call, for pauses.
    pub(super) fn random(&self) -> u64 {
        // The golden ratio spreads consecutive numbers evenly.
        self.seed.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed).rotate_left(32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One attempt, and whether the server has processed it, which the gateway does not see.
    fn attempt() -> impl Strategy<Value = (FailedAttempt, bool)> {
        let failure = prop_oneof![
            Just(AttemptFailure::Connect),
            Just(AttemptFailure::Refused),
            Just(AttemptFailure::Closed),
            Just(AttemptFailure::Reset),
            Just(AttemptFailure::Final),
        ];
        (failure, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(failure, sent, is_reused, processed)| {
            let is_connected = failure != AttemptFailure::Connect;
            let request_sent = sent && is_connected && failure != AttemptFailure::Refused;
            (FailedAttempt { failure, request_sent, is_reused }, processed && request_sent)
        })
    }

    proptest! {
        #[test]
        fn request_that_is_not_safe_to_repeat_is_processed_at_most_once(
            attempts in proptest::collection::vec(attempt(), 1..40),
            retries in 0_u32..10,
        ) {
            let mut rules = RepeatRules::new(false, retries);
            let mut processed = 0;
            for (failed, is_processed) in attempts {
                processed += u32::from(is_processed);
                match rules.after(failed) {
                    AfterFailure::GiveUp => break,
                    AfterFailure::Repeat => {}
                    AfterFailure::Retry(_) => rules.count_retry(),
                }
            }
            prop_assert!(processed <= 1);
        }

        #[test]
        fn repetitions_are_bounded(
            attempts in proptest::collection::vec(attempt(), 40..60),
            is_safe in any::<bool>(),
            retries in 0_u32..10,
        ) {
            let mut rules = RepeatRules::new(is_safe, retries);
            // A kept connection that was closed is followed by a new one.
            let fresh = attempts.into_iter().map(|(failed, _)| FailedAttempt { is_reused: false, ..failed });
            let mut sent = 0;
            for failed in fresh {
                sent += 1;
                match rules.after(failed) {
                    AfterFailure::GiveUp => break,
                    AfterFailure::Repeat => {}
                    AfterFailure::Retry(_) => rules.count_retry(),
                }
            }
            prop_assert!(sent <= 1 + retries + REFUSALS_MAX);
        }

        #[test]
        fn budget_is_a_share_of_the_requests_in_flight(in_flight in 0_usize..10_000) {
            let budget = Arc::new(RetryBudget::default());
            let permits: Vec<_> = std::iter::from_fn(|| budget.begin(in_flight)).collect();
            prop_assert_eq!(permits.len(), (in_flight / 5).max(3));
            prop_assert_eq!(budget.denied(), 1);
            drop(permits);
            prop_assert!(budget.begin(0).is_some());
        }
    }

    #[test]
    fn failures_that_are_final_are_not_repeated() {
        let mut rules = RepeatRules::new(true, 10);
        let failed = |failure| FailedAttempt { failure, request_sent: true, is_reused: true };
        assert_eq!(rules.after(failed(AttemptFailure::Final)), AfterFailure::GiveUp);
        assert_eq!(rules.after(failed(AttemptFailure::Closed)), AfterFailure::Repeat);
        assert_eq!(rules.after(failed(AttemptFailure::Reset)), AfterFailure::Retry(RetryReason::Reset));
        rules.forbid_retries();
        assert_eq!(rules.after(failed(AttemptFailure::Reset)), AfterFailure::GiveUp);
    }

    #[test]
    fn pauses_grow_and_differ() {
        for retries in 0..10 {
            let (longest, shortest) = (pause(retries, 999), pause(retries, 0));
            assert!(shortest < longest && longest <= Duration::from_millis(1_600), "{retries}");
        }
        assert!(pause(3, 0) > pause(0, 999));
    }
}
