//! One call: attempts at endpoints until one responds, and a second attempt beside a slow one.
//!
//! An attempt is one exchange on one connection, with a response or an `AttemptError`. Every
//! decision after it reads that error.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Upstream;
use super::attempt_error::AttemptError;
use super::exchange::{HeadVerdict, UpstreamExchange};
use super::open::{AttemptPlan, OpenedConnection};
use super::pool::AllowedProtocols;
use super::replay::ReplayBody;
use super::retry::{
    self, AfterFailure, AttemptFailure, FailedAttempt, RepeatRules, ReplayReason, RetryPermit, RetryReason,
};
use crate::endpoint::{BalancePolicy, CallOutcome, Endpoint, InFlightGuard, Pick};
use crate::http::attempt::{UpstreamAttempt, UpstreamConnectionError};
use crate::http::exchange_clock::{Blame, ExchangeTimeouts};
use crate::http::fields::KnownField;
use crate::http::grpc;
use crate::http::message::{BodyLength, Request, Response, StatusCode};
use crate::http::request_body::RequestBody;
use crate::http::upstream_connection::UpstreamConnection;
use crate::spans::{AttemptLog, AttemptSpan};

/// A request for an upstream: its head, its times, and how it may be sent.
#[derive(Clone, Copy)]
pub(crate) struct OutgoingRequest<'r> {
    pub(crate) request: &'r Request,
    pub(crate) kept: KeptConnections,
    /// The address of the client.
    pub(crate) client: IpAddr,
    pub(crate) timeouts: ExchangeTimeouts,
    /// The current time.
    pub(crate) now: Instant,
    /// The end of the whole exchange; `None` without a limit.
    pub(crate) total_at: Option<Instant>,
    /// Whether a slow endpoint is joined by a second one.
    pub(crate) hedges: bool,
    /// Called when an endpoint has the whole request; again if the request is sent again.
    pub(crate) on_sent: &'r dyn Fn(),
    /// Gets the attempts, for the spans of a sampled request.
    pub(crate) attempts: Option<&'r AttemptLog>,
}

/// Whether a request may take a connection that is kept open, and be sent again if that turns out
/// to be closed. One that avoids them is sent once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeptConnections {
    Use,
    Avoid,
}

/// A response whose head has arrived. The body follows from the exchange.
pub(crate) struct UpstreamResponse<'a> {
    pub(crate) head: PooledHead,
    pub(crate) exchange: UpstreamExchange<'a>,
}

/// The end of a call, and how it was reached.
pub(crate) struct CallResult<'a> {
    pub(crate) result: Result<UpstreamResponse<'a>, AttemptError>,
    /// The attempts before the last one; `None`: there was none that counts.
    pub(crate) repeats: Option<Box<CallRepeats>>,
}

/// The attempts of a call besides the one that ended it.
#[derive(Default)]
pub(crate) struct CallRepeats {
    /// The failures after which another attempt was made, in order.
    pub(crate) failed: Vec<AttemptError>,
    pub(crate) retries: u32,
    /// The time of opening the last new connection, TLS included; `None` without one.
    pub(crate) connect_time: Option<Duration>,
    /// Whether a second endpoint was sent the request because the first one was slow.
    pub(crate) is_hedged: bool,
}

/// An attempt that has a response.
struct Answered {
    head: PooledHead,
    connection: UpstreamConnection,
    in_flight: InFlightGuard,
    verdict: HeadVerdict,
}

/// An attempt that has none. The endpoint is not judged yet.
struct Failed {
    error: AttemptError,
    /// The exchange; `None` if no connection was opened.
    exchange: Option<FailedExchange>,
}

struct FailedExchange {
    in_flight: InFlightGuard,
    /// Whether the connection served an exchange before.
    is_reused: bool,
}

type UsedEndpoints = Rc<RefCell<Vec<Arc<Endpoint>>>>;

/// The state of a call between its attempts.
struct CallState {
    plan: AttemptPlan,
    rules: RepeatRules,
    repeats: Box<CallRepeats>,
    permit: Option<RetryPermit>,
    /// A response that is used if its retry has none.
    fallback: Option<Answered>,
    /// Gets every endpoint that is sent the request, for a second call beside this one.
    used: Option<UsedEndpoints>,
}

/// The next step of a call.
enum NextStep<E> {
    Again,
    End(E),
}

impl Upstream {
    /// Sends a request to an endpoint, and again as `retry` decides, and reads the head of the
    /// response. Dropping the future or the exchange closes the connection or resets its stream, so
    /// that the upstream can stop early.
    pub(crate) async fn call<'a>(&self, outgoing: &OutgoingRequest<'_>, body: RequestBody<'a>) -> CallResult<'a> {
        let mut plan = self.plan(outgoing);
        let is_repeatable = plan.is_repeatable && outgoing.kept == KeptConnections::Use;
        if outgoing.hedges && body.is_empty() && is_repeatable {
            // Boxed: few routes ask for it.
            return Box::pin(self.hedge(outgoing, plan)).await;
        }
        let mut body = ReplayBody::new(body);
        let mut first = None;
        if let Some(opened) = self.take_idle(&mut plan, outgoing.now) {
            body.keep();
            let attempted = self.attempt(outgoing, opened, &mut body).await;
            match attempted {
                Ok(answered) if !self.config.retry.wants(&answered.head) => {
                    return CallResult { result: Ok(self.respond(answered, body, None)), repeats: None };
                }
                attempted => first = Some(attempted),
            }
        }
        // Rare, so that the requests on kept connections do not pay for its state.
        let state = self.begin(outgoing, plan);
        Box::pin(self.continue_call(outgoing, (state, first), body)).await
    }

    fn plan(&self, outgoing: &OutgoingRequest<'_>) -> AttemptPlan {
        let OutgoingRequest { request, kept, client, timeouts, now, total_at, .. } = *outgoing;
        let mut plan = AttemptPlan::new(self.config.connect_timeout, now + timeouts.head, total_at);
        plan.is_repeatable = request.method.is_idempotent();
        if self.config.balance.policy == BalancePolicy::ConsistentHash {
            plan.hash = self.config.hash_by.hash(request, client);
        }
        plan.reuses = kept == KeptConnections::Use;
        if request.fields.has(KnownField::Upgrade) {
            plan.protocols = AllowedProtocols::Http1;
        }
        plan
    }

    fn begin(&self, outgoing: &OutgoingRequest<'_>, plan: AttemptPlan) -> CallState {
        let rules = match outgoing.kept {
            KeptConnections::Use => RepeatRules::new(plan.is_repeatable, self.config.retry.retries),
            // The fetch repeats one that has failed.
            KeptConnections::Avoid => RepeatRules::new(false, 0),
        };
        CallState { plan, rules, repeats: Box::default(), permit: None, fallback: None, used: None }
    }

    /// Makes attempts until one responds, or none is left. `attempted` is the end of the first one,
    /// if it was made.
    async fn continue_call<'a>(
        &self,
        outgoing: &OutgoingRequest<'_>,
        (mut state, mut attempted): (CallState, Option<Result<Answered, Failed>>),
        mut body: ReplayBody<RequestBody<'a>>,
    ) -> CallResult<'a> {
        let result = loop {
            let ended = match attempted.take() {
                Some(ended) => ended,
                None => match self.open_timed(outgoing, &mut state).await {
                    Ok(opened) => {
                        if let Some(used) = &state.used {
                            used.borrow_mut().push(Arc::clone(opened.0.endpoint()));
                        }
                        if opened.1.is_reused() || opened.1.may_refuse() || state.rules.has_retries() {
                            body.keep();
                        }
                        self.attempt(outgoing, opened, &mut body).await
                    }
                    Err(error) => Err(Failed { error, exchange: None }),
                },
            };
            let can_rewind = body.can_rewind();
            let next = match ended {
                Ok(answered) if state.rules.has_retries() && self.config.retry.wants(&answered.head) => {
                    self.after_status(outgoing, &mut state, (answered, can_rewind)).await
                }
                Ok(answered) => break Ok(answered),
                Err(failed) => self.after_failure(outgoing, &mut state, (failed, can_rewind)).await,
            };
            match next {
                NextStep::Again => body.rewind(),
                NextStep::End(result) => break result,
            }
        };
        let CallState { repeats, permit, fallback, .. } = state;
        let result = match (result, fallback) {
            (Err(_), Some(answered)) => Ok(answered),
            (result, _) => result,
        };
        CallResult { result: result.map(|answered| self.respond(answered, body, permit)), repeats: Some(repeats) }
    }

    /// Opens a connection, and notes how long that took, unless it was one that is kept.
    async fn open_timed(
        &self,
        outgoing: &OutgoingRequest<'_>,
        state: &mut CallState,
    ) -> Result<OpenedConnection, AttemptError> {
        let began = Instant::now();
        let failed_before = state.repeats.failed.len();
        let opened = self.open(&mut state.plan, &mut state.repeats.failed, outgoing.attempts).await;
        state.repeats.failed[failed_before..].iter().for_each(|failure| self.count_retry_of(failure));
        if let (Some(attempts), Err(failure)) = (outgoing.attempts, &opened) {
            attempts.push(attempt_span(failure.endpoint.as_ref(), began.into_std(), Err(&failure.error)));
        }
        if opened.as_ref().is_ok_and(|(_, connection)| !connection.is_reused()) {
            state.repeats.connect_time = Some(began.elapsed());
        }
        opened
    }

    /// The response of the attempt that ends a call.
    fn respond<'a>(
        &self,
        answered: Answered,
        mut body: ReplayBody<RequestBody<'a>>,
        permit: Option<RetryPermit>,
    ) -> UpstreamResponse<'a> {
        let Answered { head, connection, in_flight, verdict } = answered;
        body.stop_keeping();
        let mut exchange = UpstreamExchange::new(connection, body, (&self.judge, in_flight), verdict);
        if permit.is_some() {
            exchange.hold(permit);
        }
        UpstreamResponse { head, exchange }
    }

    /// One exchange on one connection, up to the head of its response.
    async fn attempt(
        &self,
        outgoing: &OutgoingRequest<'_>,
        (mut in_flight, mut connection): OpenedConnection,
        body: &mut ReplayBody<RequestBody<'_>>,
    ) -> Result<Answered, Failed> {
        let OutgoingRequest { request, timeouts, total_at, on_sent, .. } = *outgoing;
        let began = outgoing.attempts.map(|_| std::time::Instant::now());
        let is_reused = connection.is_reused();
        let mut head = PooledHead::take();
        let mut attempt =
            UpstreamAttempt { request, body, response: &mut head, timeouts, total_at, on_request_sent: on_sent };
        // With a body, the time is also that of the client.
        let is_ewma = self.config.balance.policy == BalancePolicy::Ewma;
        let started = (is_ewma && request.length == BodyLength::Empty).then(std::time::Instant::now);
        let ended = connection.exchange(&mut attempt).await;
        in_flight.set_sent(body.consumed());
        let error = match ended {
            Ok(()) => {
                let is_failure =
                    head.status.is_server_error() || grpc::is_call(request) && grpc::is_failure(&head.fields);
                if let Some(started) = started {
                    let now = std::time::Instant::now();
                    in_flight.endpoint().record_latency((!is_failure).then_some(now - started), now);
                }
                let mut verdict = HeadVerdict { is_failure, ..HeadVerdict::default() };
                if !connection.is_request_incomplete() {
                    verdict.is_success = !is_failure;
                    let outcome = if is_failure { CallOutcome::Failure } else { CallOutcome::Success };
                    verdict.is_outlier = self.judge.judge(&in_flight, outcome);
                }
                if let (Some(attempts), Some(began)) = (outgoing.attempts, began) {
                    attempts.push(attempt_span(Some(&in_flight.endpoint().name), began, Ok(head.status)));
                }
                return Ok(Answered { head, connection, in_flight, verdict });
            }
            Err(error) => error,
        };
        if let (Some(attempts), Some(began)) = (outgoing.attempts, began) {
            attempts.push(attempt_span(Some(&in_flight.endpoint().name), began, Err(&error)));
        }
        let is_timeout = matches!(error, UpstreamConnectionError::Timeout(_));
        let error = AttemptError {
            endpoint: Some(Arc::clone(&in_flight.endpoint().name)),
            is_verdict: error.blame() == Blame::Upstream && (is_timeout || !connection.is_request_incomplete()),
            is_outlier: false,
            request_sent: !connection.is_request_unsent(),
            error,
        };
        Err(Failed { error, exchange: Some(FailedExchange { in_flight, is_reused }) })
    }

    /// Decides about the next attempt after one that failed.
    async fn after_failure(
        &self,
        outgoing: &OutgoingRequest<'_>,
        state: &mut CallState,
        (failed, can_rewind): (Failed, bool),
    ) -> NextStep<Result<Answered, AttemptError>> {
        let Failed { mut error, exchange } = failed;
        if outgoing.kept == KeptConnections::Use && retry::is_safe_to_repeat(outgoing.request) {
            state.rules.set_safe();
        }
        let failure = AttemptFailure::of(&error.error);
        let is_reused = exchange.as_ref().is_some_and(|exchange| exchange.is_reused);
        let facts = FailedAttempt { failure, request_sent: error.request_sent, is_reused };
        let after = if can_rewind { state.rules.after(facts) } else { AfterFailure::GiveUp };
        let endpoint = exchange.as_ref().map(|exchange| Arc::clone(exchange.in_flight.endpoint()));
        if after == AfterFailure::Repeat
            && let Some(endpoint) = &endpoint
        {
            let request_sent = error.request_sent;
            tracing::debug!(endpoint = &*endpoint.name, request_sent, "a connection took no request");
            let is_refused = failure == AttemptFailure::Refused;
            self.budget.count_replay(if is_refused { ReplayReason::Refused } else { ReplayReason::Closed });
            if is_refused {
                state.plan.try_again(Some(endpoint), &self.judge.set.load());
            } else {
                // Other kept connections may be dead too.
                state.plan.reuses = false;
                state.plan.set_next(Arc::clone(endpoint));
            }
            return NextStep::Again;
        }
        if let Some(FailedExchange { in_flight, .. }) = exchange.filter(|_| error.is_verdict) {
            let is_timeout = matches!(error.error, UpstreamConnectionError::Timeout(_));
            let outcome = if is_timeout { CallOutcome::Timeout } else { CallOutcome::Failure };
            error.is_outlier = self.judge.judge(&in_flight, outcome);
            in_flight.endpoint().record_latency(None, std::time::Instant::now());
        }
        let AfterFailure::Retry(reason) = after else { return NextStep::End(Err(error)) };
        let has_other = state.plan.try_again(endpoint.as_ref(), &self.judge.set.load());
        let pause = if has_other { Duration::ZERO } else { retry::pause(state.repeats.retries, self.budget.random()) };
        if !self.begin_retry(state, reason, pause) {
            return NextStep::End(Err(error));
        }
        state.plan.reuses = false;
        self.count_retry_of(&error);
        state.repeats.failed.push(error);
        sleep(pause).await;
        NextStep::Again
    }

    /// Decides about the next attempt after a response with a status that is to be replaced.
    async fn after_status(
        &self,
        outgoing: &OutgoingRequest<'_>,
        state: &mut CallState,
        (answered, can_rewind): (Answered, bool),
    ) -> NextStep<Result<Answered, AttemptError>> {
        let Answered { head, connection, in_flight, .. } = &answered;
        let may_repeat = can_rewind
            && retry::is_safe_to_repeat(outgoing.request)
            && !connection.is_request_incomplete()
            && !connection.has_passed_interim();
        if !may_repeat {
            return NextStep::End(Ok(answered));
        }
        let has_other = state.plan.try_again(Some(in_flight.endpoint()), &self.judge.set.load());
        // The server says when the request may be sent to it again; another one may be ready now.
        let pause = match retry::retry_after(head) {
            _ if has_other => Duration::ZERO,
            wait => wait.unwrap_or_default().max(retry::pause(state.repeats.retries, self.budget.random())),
        };
        if !self.begin_retry(state, RetryReason::Status, pause) {
            return NextStep::End(Ok(answered));
        }
        answered.in_flight.endpoint().count_retry();
        state.fallback = Some(answered);
        sleep(pause).await;
        NextStep::Again
    }

    /// Counts, at its endpoint, a failure after which the request was sent again.
    fn count_retry_of(&self, failure: &AttemptError) {
        let Some(name) = &failure.endpoint else { return };
        if let Some(endpoint) = self.judge.set.load().list().iter().find(|endpoint| endpoint.name == *name) {
            endpoint.count_retry();
        }
    }

    /// Counts a retry that begins after `pause`. False if there is no time for it, or no room in
    /// the budget.
    fn begin_retry(&self, state: &mut CallState, reason: RetryReason, pause: Duration) -> bool {
        if !state.plan.is_in_time(Instant::now() + pause) {
            return false;
        }
        if state.permit.is_none() {
            state.permit = self.budget.begin(self.in_flight());
        }
        if state.permit.is_none() {
            return false;
        }
        state.rules.count_retry();
        state.repeats.retries += 1;
        self.budget.count_retry(reason);
        true
    }

    /// The requests in flight at all endpoints.
    fn in_flight(&self) -> usize {
        self.judge.set.load().list().iter().map(|endpoint| endpoint.in_flight()).sum()
    }

    /// A call that is joined by a second one, at another endpoint, if it has no response in the
    /// time in which 95 % have one. The first good response is used; the other call is given up.
    async fn hedge<'a>(&self, outgoing: &OutgoingRequest<'_>, plan: AttemptPlan) -> CallResult<'a> {
        let used = UsedEndpoints::default();
        let mut state = self.begin(outgoing, plan);
        state.used = Some(Rc::clone(&used));
        let started = std::time::Instant::now();
        let body = || ReplayBody::new(RequestBody::Empty);
        let mut first = pin!(self.continue_call(outgoing, (state, None), body()));
        let delay = self.latencies.p95(started);
        let ended = match delay {
            None => Some(first.as_mut().await),
            Some(delay) => timeout(delay, first.as_mut()).await.ok(),
        };
        if let Some(ended) = ended {
            self.latencies.record(started.elapsed(), std::time::Instant::now());
            return ended;
        }
        let mut state = self.begin(outgoing, self.plan(outgoing));
        state.rules.forbid_retries();
        state.permit = self.begin_hedge(&mut state.plan, &used.borrow());
        if state.permit.is_none() {
            let ended = first.as_mut().await;
            self.latencies.record(started.elapsed(), std::time::Instant::now());
            return ended;
        }
        let joined = std::time::Instant::now();
        // Interim responses of the copy are discarded: those of the first call have passed.
        let copy = outgoing.request.clone();
        let second = OutgoingRequest { request: &copy, ..*outgoing };
        let second = pin!(self.continue_call(&second, (state, None), body()));
        let (mut ended, is_second) = first_good(first, second).await;
        let now = std::time::Instant::now();
        // Also the time of the one that was given up, so that the percentile does not sink.
        self.latencies.record(now - started, now);
        self.latencies.record(now - joined, now);
        if is_second {
            self.budget.count_won();
        }
        ended.repeats.get_or_insert_default().is_hedged = true;
        ended
    }

    /// Begins a hedge at an endpoint other than `used`, if there is one and the budget allows it.
    fn begin_hedge(&self, plan: &mut AttemptPlan, used: &[Arc<Endpoint>]) -> Option<RetryPermit> {
        let has_other = used.iter().all(|endpoint| plan.try_again(Some(endpoint), &self.judge.set.load()));
        let permit = if has_other { self.budget.begin(self.in_flight()) } else { None };
        if permit.is_some() {
            self.budget.count_hedge();
        }
        permit
    }

    /// Selects an endpoint and takes a kept connection to it, if there is one.
    fn take_idle(&self, plan: &mut AttemptPlan, now: Instant) -> Option<OpenedConnection> {
        let set = self.judge.set.load();
        let endpoint = set.select(plan.tried(), Pick { now: now.into_std(), hash: plan.hash })?;
        if plan.reuses
            && let Some(connection) = plan.take_idle(endpoint)
        {
            return Some((InFlightGuard::new(Arc::clone(endpoint)), connection));
        }
        plan.set_next(Arc::clone(endpoint));
        None
    }
}

/// The span of an attempt that has just ended.
#[cold]
fn attempt_span(
    endpoint: Option<&Arc<str>>,
    began: std::time::Instant,
    result: Result<StatusCode, &UpstreamConnectionError>,
) -> AttemptSpan {
    let result = result.map_err(|error| error.class());
    AttemptSpan { endpoint: endpoint.cloned(), began, ended: std::time::Instant::now(), result }
}

thread_local! {
    #[expect(clippy::vec_box, reason = "a head moves between the pool and calls as a pointer")]
    static HEADS: RefCell<Vec<Box<Response>>> = const { RefCell::new(Vec::new()) };
}

/// Heads that a thread keeps for the next responses: one for each of several hundred concurrent
/// calls, because many responses arrive together.
const HEADS_KEPT: usize = 512;
/// Bytes of the fields of a head that is kept: all of them together are at most 2 MiB.
const HEAD_KEPT_MAX: usize = 4 << 10;

/// The head of a response. Its buffers are those of an earlier one, and are reused again.
pub(crate) struct PooledHead(Option<Box<Response>>);

impl PooledHead {
    fn take() -> Self {
        PooledHead(Some(HEADS.with_borrow_mut(Vec::pop).unwrap_or_default()))
    }
}

impl Deref for PooledHead {
    type Target = Response;

    fn deref(&self) -> &Response {
        self.0.as_ref().expect("taken by drop only")
    }
}

impl DerefMut for PooledHead {
    fn deref_mut(&mut self) -> &mut Response {
        self.0.as_mut().expect("taken by drop only")
    }
}

impl Drop for PooledHead {
    fn drop(&mut self) {
        HEADS.with_borrow_mut(|heads| {
            if let Some(mut head) = self.0.take()
                && heads.len() < HEADS_KEPT
                && head.fields.heap_bytes() <= HEAD_KEPT_MAX
            {
                // They are of the body of another response.
                head.forms = None;
                heads.push(head);
            }
        });
    }
}

/// The first of two calls that ends with a response below 500, or else the better one of both.
/// Returns whether it is the second.
async fn first_good<'a>(
    mut first: Pin<&mut impl Future<Output = CallResult<'a>>>,
    mut second: Pin<&mut impl Future<Output = CallResult<'a>>>,
) -> (CallResult<'a>, bool) {
    let (mut first_end, mut second_end) = (None, None);
    poll_fn(|cx| {
        poll_unless_ended(&mut first_end, first.as_mut(), cx);
        poll_unless_ended(&mut second_end, second.as_mut(), cx);
        let is_good = |end: &Option<CallResult<'_>>| end.as_ref().is_some_and(CallResult::is_good);
        let is_decided = is_good(&first_end) || is_good(&second_end) || first_end.is_some() && second_end.is_some();
        if is_decided { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    let prefers_second = match (&first_end, &second_end) {
        (Some(first), Some(second)) => !first.is_good() && (second.is_good() || first.result.is_err()),
        (None, _) => true,
        (Some(_), None) => false,
    };
    let (used, other) = if prefers_second { (second_end, first_end) } else { (first_end, second_end) };
    let mut used = used.expect("one has ended");
    if let Some(CallResult { result, repeats }) = other {
        let sum = used.repeats.get_or_insert_default();
        let CallRepeats { failed, retries, .. } = *repeats.unwrap_or_default();
        sum.failed.extend(failed);
        sum.failed.extend(result.err());
        sum.retries += retries;
    }
    (used, prefers_second)
}

fn poll_unless_ended<'a>(
    end: &mut Option<CallResult<'a>>,
    call: Pin<&mut impl Future<Output = CallResult<'a>>>,
    cx: &mut Context<'_>,
) {
    if end.is_none()
        && let Poll::Ready(ended) = call.poll(cx)
    {
        *end = Some(ended);
    }
}

impl CallResult<'_> {
    /// Whether the response is no failure of the upstream.
    fn is_good(&self) -> bool {
        self.result.as_ref().is_ok_and(|response| !response.exchange.is_failure())
    }
}
