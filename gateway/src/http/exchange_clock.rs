//! The deadlines of one exchange with an upstream: the next step, the side that has to take it, the
//! time for it, and the side to blame when that has passed.
//!
//! Invariant: a clock runs only while the gateway waits for its side. A client that pauses in its
//! request, or that does not read its response, spends none of the upstream's time; the client has
//! clocks of its own, which run where its bytes are read and written (`h1::downstream`, `h2`).
//! `docs/timeouts.md` shows all clocks.

use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use super::deadline::ResettableDeadline;
use super::write_timer::WriteTimer;
use crate::label;
use crate::tasks::{self, TaskWait};

label! {
    /// The side that is responsible for a failure. Status, log, metrics and circuit breaker read
    /// it. A store is never one: a request whose store fails or is late continues as a miss.
    pub(crate) Blame, "blame", {
        Client = "client",
        Gateway = "gateway",
        Upstream = "upstream",
    }
}

label! {
    /// The clock that ran out.
    pub(crate) ExchangeTimeout, "clock", {
        /// The client sent no byte of its request body, or too few.
        ClientBody = "client_body",
        /// The client accepted no byte of the response, or too few.
        ClientRead = "client_read",
        /// No connection to an endpoint.
        UpstreamConnect = "upstream_connect",
        /// The upstream accepted no byte of the request.
        UpstreamSend = "upstream_send",
        /// The upstream had the whole request and sent no head of a response.
        UpstreamHead = "upstream_head",
        /// The upstream sent no byte of the response body.
        UpstreamBody = "upstream_body",
        /// An event stream was silent, as it may be: the limit is the gateway's own.
        EventStream = "event_stream",
        /// The whole exchange took longer than the gateway allows.
        Total = "total",
    }
}

impl ExchangeTimeout {
    pub(crate) fn blame(self) -> Blame {
        match self {
            ExchangeTimeout::ClientBody | ExchangeTimeout::ClientRead => Blame::Client,
            ExchangeTimeout::UpstreamConnect
            | ExchangeTimeout::UpstreamSend
            | ExchangeTimeout::UpstreamHead
            | ExchangeTimeout::UpstreamBody => Blame::Upstream,
            ExchangeTimeout::EventStream | ExchangeTimeout::Total => Blame::Gateway,
        }
    }
}

/// Timeouts of an exchange once its connection is open (`[upstreams.X]`, or the route's own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExchangeTimeouts {
    /// From the complete request sent to the head of the response.
    pub(crate) head: Duration,
    /// Between two moves of a body, of request or response.
    pub(crate) idle: Duration,
    /// The whole exchange, connecting and both bodies included; `None`: no limit.
    pub(crate) total: Option<Duration>,
}

/// The next step of an exchange that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AwaitedStep {
    /// The client is to send bytes of its request. Its own clock runs, not the upstream's.
    ClientBody,
    /// The upstream is to accept bytes of the request.
    UpstreamSend,
    /// The upstream is to send the head of the response.
    UpstreamHead,
    /// The upstream is to send bytes of the response body.
    UpstreamBody,
    /// As `UpstreamBody`, from a stream of events that may be silent.
    EventStream,
}

impl AwaitedStep {
    /// The step as the wait of a task.
    fn task_wait(self) -> TaskWait {
        match self {
            AwaitedStep::ClientBody => TaskWait::ClientBody,
            AwaitedStep::UpstreamSend => TaskWait::UpstreamSend,
            AwaitedStep::UpstreamHead => TaskWait::UpstreamHead,
            AwaitedStep::UpstreamBody => TaskWait::UpstreamBody,
            AwaitedStep::EventStream => TaskWait::EventStream,
        }
    }
}

/// How often a client is checked whose request the upstream does not accept. Each check is one
/// system call.
const CLIENT_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The event that `ExchangeClock::poll` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClockEvent {
    /// The caller is to try a write to the upstream, then to call `record_accepted` or
    /// `record_blocked`.
    CheckWrite,
    /// The upstream accepts no byte, so nothing reads from the client: the caller is to find out
    /// whether the client is still there.
    CheckClient,
    TimedOut(ExchangeTimeout),
}

/// The clock of the current exchange of one connection: the step that is waited for, and the
/// deadline of the whole exchange.
pub(crate) struct ExchangeClock {
    timeouts: ExchangeTimeouts,
    /// The end of the whole exchange; `None` without a limit.
    total_at: Option<Instant>,
    /// The step whose time is running; `None` until the first wait after a step.
    awaited: Option<AwaitedStep>,
    /// When the wait for the client's body began that is the current one.
    client_awaited_since: Option<Instant>,
    deadline: ResettableDeadline,
    /// The time of `AwaitedStep::UpstreamSend`.
    send: WriteTimer,
}

impl ExchangeClock {
    /// A clock for a connection without an exchange.
    pub(crate) fn new() -> Self {
        let timeouts = ExchangeTimeouts { head: Duration::ZERO, idle: Duration::ZERO, total: None };
        let deadline = ResettableDeadline::after(Duration::ZERO);
        let send = WriteTimer::new(Duration::ZERO);
        ExchangeClock { timeouts, total_at: None, awaited: None, client_awaited_since: None, deadline, send }
    }

    /// Begins an exchange whose whole time ends at `total_at`. No step is waited for yet.
    pub(crate) fn begin(&mut self, timeouts: ExchangeTimeouts, total_at: Option<Instant>) {
        self.timeouts = timeouts;
        self.total_at = total_at;
        self.awaited = None;
        self.client_awaited_since = None;
    }

    /// Bytes of a body moved, in either direction, or were taken from the gateway: the next wait
    /// has its full time. The time of the head does not restart: bytes of a body do not replace it.
    pub(crate) fn record_progress(&mut self) {
        self.client_awaited_since = None;
        if self.awaited != Some(AwaitedStep::UpstreamHead) {
            self.awaited = None;
        }
    }

    /// For how long the exchange has waited for the next bytes of the client's body, and for
    /// nothing else.
    pub(crate) fn client_silence(&self) -> Duration {
        self.client_awaited_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Records that the upstream accepted bytes when `ClockEvent::CheckWrite` asked for a write.
    pub(crate) fn record_accepted(&mut self) {
        self.send.record_accepted();
    }

    /// Records that the upstream accepted no byte when `ClockEvent::CheckWrite` asked for a write.
    /// Returns the clock that ran out, if one did.
    pub(crate) fn record_blocked(&mut self) -> Option<ExchangeTimeout> {
        self.send.record_blocked().then_some(ExchangeTimeout::UpstreamSend)
    }

    /// Polled when no byte can move and `step` is waited for. Ready with the clock that ran out, or
    /// when a write to the upstream is to be tried.
    /// The time of a step starts with the first poll that waits for it. Registers the task to be
    /// woken.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, step: AwaitedStep) -> Poll<ClockEvent> {
        tasks::set_waiting_for(step.task_wait());
        if step != AwaitedStep::ClientBody {
            self.client_awaited_since = None;
        }
        let (timeout, clock) = match step {
            AwaitedStep::ClientBody => {
                self.client_awaited_since.get_or_insert_with(Instant::now);
                (None, ExchangeTimeout::Total)
            }
            AwaitedStep::UpstreamSend => return self.poll_send(cx),
            AwaitedStep::UpstreamHead => (Some(self.timeouts.head), ExchangeTimeout::UpstreamHead),
            AwaitedStep::UpstreamBody => (Some(self.timeouts.idle), ExchangeTimeout::UpstreamBody),
            AwaitedStep::EventStream => (Some(self.timeouts.idle), ExchangeTimeout::EventStream),
        };
        if self.awaited != Some(step)
            && let Some(timeout) = timeout
        {
            self.deadline.restart(timeout);
        }
        self.awaited = Some(step);
        match (self.total_at, timeout) {
            (None, None) => return Poll::Pending,
            (Some(total_at), None) => self.deadline.set(total_at),
            (Some(total_at), Some(_)) => self.deadline.no_later_than(total_at),
            (None, Some(_)) => {}
        }
        self.deadline
            .poll(cx)
            .map(|()| ClockEvent::TimedOut(if self.is_total_over() { ExchangeTimeout::Total } else { clock }))
    }

    /// `poll` for the step `UpstreamSend`.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<ClockEvent> {
        if self.awaited.replace(AwaitedStep::UpstreamSend) != Some(AwaitedStep::UpstreamSend) {
            self.send.restart_with(self.timeouts.idle);
            self.deadline.restart(CLIENT_CHECK_INTERVAL);
        }
        if self.deadline.poll(cx).is_ready() {
            self.deadline.restart(CLIENT_CHECK_INTERVAL);
            return Poll::Ready(if self.is_total_over() {
                ClockEvent::TimedOut(ExchangeTimeout::Total)
            } else {
                ClockEvent::CheckClient
            });
        }
        if let Some(total_at) = self.total_at {
            self.send.check_no_later_than(total_at);
        }
        self.send.poll_check(cx).map(|()| match self.is_total_over() {
            true => ClockEvent::TimedOut(ExchangeTimeout::Total),
            false => ClockEvent::CheckWrite,
        })
    }

    /// The time that is left for the whole exchange; `None` without a limit.
    pub(crate) fn total_left(&self) -> Option<Duration> {
        self.total_at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether the time of the whole exchange is over. A body whose bytes never have to be waited
    /// for is checked by this: `poll` does not see it.
    pub(crate) fn is_total_over(&self) -> bool {
        self.total_at.is_some_and(|at| Instant::now() >= at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    const SECOND: Duration = Duration::from_secs(1);

    fn clock(total: Option<Duration>) -> ExchangeClock {
        let mut clock = ExchangeClock::new();
        let timeouts = ExchangeTimeouts { head: 2 * SECOND, idle: 5 * SECOND, total };
        clock.begin(timeouts, total.map(|total| Instant::now() + total));
        clock
    }

    /// Waits for `step` for at most `time`.
    async fn wait(clock: &mut ExchangeClock, step: AwaitedStep, time: Duration) -> Option<ExchangeTimeout> {
        let ended = async {
            loop {
                let timeout = match poll_fn(|cx| clock.poll(cx, step)).await {
                    ClockEvent::TimedOut(timeout) => Some(timeout),
                    ClockEvent::CheckClient => None,
                    ClockEvent::CheckWrite => clock.record_blocked(),
                };
                if let Some(timeout) = timeout {
                    return timeout;
                }
            }
        };
        tokio::time::timeout(time, ended).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn client_that_pauses_in_its_body_spends_no_time_of_the_upstream() {
        let mut clock = clock(None);
        assert_eq!(wait(&mut clock, AwaitedStep::ClientBody, 3600 * SECOND).await, None);
        let sent = Instant::now();
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamHead, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamHead));
        assert_eq!(sent.elapsed(), 2 * SECOND, "from the complete request");
    }

    #[tokio::test(start_paused = true)]
    async fn upstream_that_accepts_no_byte_times_out_after_the_idle_timeout() {
        let mut clock = clock(None);
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamSend, 4 * SECOND).await, None);
        clock.record_progress();
        let start = Instant::now();
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamSend, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamSend));
        assert_eq!(start.elapsed(), 5 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn time_of_the_client_between_two_waits_for_the_upstream_does_not_count() {
        let mut clock = clock(None);
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamSend, 4 * SECOND).await, None);
        assert_eq!(wait(&mut clock, AwaitedStep::ClientBody, 60 * SECOND).await, None);
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamSend, 4 * SECOND).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn progress_does_not_extend_the_time_of_the_head() {
        let mut clock = clock(None);
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamHead, SECOND).await, None);
        clock.record_progress();
        let start = Instant::now();
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamHead, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamHead));
        assert_eq!(start.elapsed(), SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn body_may_take_any_time_while_its_bytes_move() {
        let mut clock = clock(None);
        for _ in 0..360 {
            assert_eq!(wait(&mut clock, AwaitedStep::UpstreamBody, 4 * SECOND).await, None);
            clock.record_progress();
        }
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamBody, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamBody));
    }

    #[tokio::test(start_paused = true)]
    async fn reader_that_takes_no_bytes_spends_no_time_of_the_upstream() {
        let mut clock = clock(None);
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamBody, 4 * SECOND).await, None);
        // Bytes arrive, and the client takes them an hour later.
        clock.record_progress();
        tokio::time::advance(3600 * SECOND).await;
        let start = Instant::now();
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamBody, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamBody));
        assert_eq!(start.elapsed(), 5 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn total_time_ends_every_wait_and_is_blamed_on_the_gateway() {
        use AwaitedStep::{ClientBody, EventStream, UpstreamBody, UpstreamHead, UpstreamSend};
        for step in [ClientBody, UpstreamSend, UpstreamHead, UpstreamBody, EventStream] {
            let mut clock = clock(Some(SECOND));
            let start = Instant::now();
            assert_eq!(wait(&mut clock, step, 60 * SECOND).await, Some(ExchangeTimeout::Total), "{step:?}");
            assert_eq!(start.elapsed(), SECOND, "{step:?}");
        }
        assert_eq!(ExchangeTimeout::Total.blame(), Blame::Gateway);
    }

    #[tokio::test(start_paused = true)]
    async fn earlier_clock_of_a_step_is_named_and_not_the_total() {
        let mut clock = clock(Some(60 * SECOND));
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamHead, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamHead));
    }

    #[tokio::test(start_paused = true)]
    async fn silent_event_stream_is_ended_without_blame_of_the_upstream() {
        let mut clock = clock(None);
        let ended = wait(&mut clock, AwaitedStep::EventStream, 60 * SECOND).await;
        assert_eq!(ended.map(ExchangeTimeout::blame), Some(Blame::Gateway));
    }

    #[tokio::test(start_paused = true)]
    async fn clock_of_the_next_exchange_starts_anew() {
        let mut clock = clock(Some(SECOND));
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamHead, 60 * SECOND).await, Some(ExchangeTimeout::Total));
        clock.begin(ExchangeTimeouts { head: 3 * SECOND, idle: SECOND, total: None }, None);
        let start = Instant::now();
        assert_eq!(wait(&mut clock, AwaitedStep::UpstreamHead, 60 * SECOND).await, Some(ExchangeTimeout::UpstreamHead));
        assert_eq!(start.elapsed(), 3 * SECOND);
    }
}
