//! The forward phase: breaker, endpoint, exchange with the upstream; then the response as the
//! gateway may pass it on.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::context::RequestContext;
use super::mirror;
use super::snapshot::Snapshot;
use super::worker::WorkerResources;
use crate::breaker::{Breaker, CallStart, RecordedCall};
use crate::concurrency::{CallSlot, ConcurrencyLimit, ConcurrencyReport};
use crate::error::{Error, ErrorKind};
use crate::event::{Event, UpstreamFault};
use crate::http::attempt::UpstreamConnectionError;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadSize;
use crate::http::exchange_clock::{Blame, ExchangeTimeout};
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{Request, Response};
use crate::http::request_body::RequestBody;
use crate::http::tls_fault::TlsFault;
use crate::metrics::{self, Counters, Label as _};
use crate::record::RequestRecord;
use crate::route::Route;
use crate::spans::{AttemptLog, BackgroundWork, Phase};
use crate::upstream::{
    AttemptError, CallInProgress, CallRepeats, CallResult, KeptConnections, OutgoingRequest, Tunnel, Upstream,
    UpstreamExchange, UpstreamResponse, UpstreamResult,
};
use crate::{hop, identify};

static TIMEOUTS: LazyLock<Counters<ExchangeTimeout>> = LazyLock::new(Counters::default);

static TLS_FAULTS: LazyLock<Counters<TlsFault>> = LazyLock::new(Counters::default);

/// Exposes `tidegate_timeouts_total` and `tidegate_upstream_tls_failures_total`.
pub(super) fn expose() {
    let help = "Attempts that failed because of TLS with the upstream, by reason.";
    metrics::expose_counters("tidegate_upstream_tls_failures", help, &TLS_FAULTS);
    let help = "Exchanges that a clock ended, by the clock.";
    metrics::expose_counters("tidegate_timeouts", help, &TIMEOUTS);
}

/// Counts a clock that ended an exchange.
pub(crate) fn count_timeout(timeout: ExchangeTimeout) {
    TIMEOUTS.inc(timeout);
}

impl RequestContext<'_> {
    /// Forwards a request, reads the head of the upstream's response into the context and returns
    /// the response's body. `copy` is a request made for this exchange; `None` forwards the
    /// client's own.
    pub(super) async fn forward<'b>(
        &mut self,
        copy: Option<&mut Request>,
        body: RequestBody<'b>,
    ) -> Result<UpstreamBody<'b>, Error> {
        self.enter(Phase::Upstream);
        let (route, accepts_trailers, weight, span) =
            (self.route(), self.accepts_trailers(), self.class_weight(), self.outgoing_span());
        let attempts = self.attempt_log();
        let request = match copy {
            Some(copy) => {
                copy.interim = self.request.interim.share();
                copy
            }
            None => &mut *self.request,
        };
        hop::prepare_for_upstream(request, self.peer);
        identify::write_trace(self.caller.trace, span, &mut request.fields);
        if let Some(id) = &self.record.request_id {
            id.write(&mut request.fields);
        }
        let call = UpstreamCall {
            route,
            worker: self.worker,
            client: self.caller.ip,
            weight,
            kept: KeptConnections::Use,
            deadline: self.deadline.map(Instant::from_std),
            attempts: attempts.as_deref(),
            response: self.response,
            record: self.record,
        };
        let called = call.run(request, body).await;
        if let Some(attempts) = attempts {
            self.end_traced_call(*attempts);
        }
        let mut body = called?;
        body.accepts_trailers = accepts_trailers;
        self.record.forwarded_status = Some(self.response.status.as_u16());
        self.record.upstream = Some(body.exchange.endpoint());
        Ok(body)
    }

    /// Forwards `copy`, a request without a body, by a call that can outlive this request. The
    /// head of the response is in the context after `end_call`.
    pub(super) fn begin_call(&mut self, mut copy: Request, kept: KeptConnections) -> DetachableCall {
        self.enter(Phase::Upstream);
        copy.interim = self.request.interim.share();
        hop::prepare_for_upstream(&mut copy, self.peer);
        identify::write_trace(self.caller.trace, self.outgoing_span(), &mut copy.fields);
        if let Some(id) = &self.record.request_id {
            id.write(&mut copy.fields);
        }
        let (worker, snapshot) = (Rc::clone(self.worker), Arc::clone(self.snapshot));
        let (client, weight) = (self.caller.ip, self.class_weight());
        let resources = CallResources { worker, snapshot, client, weight, kept, attempts: self.attempt_log() };
        begin_detachable(resources, self.route().index, (copy, std::mem::take(self.response)))
    }

    /// A log of the attempts of a call of a sampled request.
    fn attempt_log(&self) -> Option<Box<AttemptLog>> {
        let (spans, exporter) = (self.record.spans.as_ref()?, self.snapshot.tracing.as_ref()?);
        Some(Box::new(AttemptLog::new(spans, exporter)))
    }

    #[cold]
    fn end_traced_call(&mut self, attempts: AttemptLog) {
        if let Some(spans) = &mut self.record.spans {
            spans.end_call(attempts);
        }
    }

    /// The weight of the caller's class, in thousandths.
    pub(super) fn class_weight(&self) -> u32 {
        self.snapshot.class_weights.get(self.caller.user_class).copied().unwrap_or_default()
    }

    /// Takes over the response of a call, or its failure.
    pub(super) fn end_call(&mut self, ended: CallEnd) -> Result<UpstreamBody<'static>, Error> {
        let CallEnd { response, result, upstream, times, blame, requests_sent, retries, is_hedged, attempts } = ended;
        if let Some(attempts) = attempts {
            self.end_traced_call(*attempts);
        }
        *self.response = response;
        (self.record.upstream, self.record.blame) = (upstream, blame);
        (self.record.upstream_time, self.record.connect_time) = times;
        (self.record.requests_sent, self.record.retries, self.record.is_hedged) = (requests_sent, retries, is_hedged);
        let mut body = result?;
        body.accepts_trailers = self.accepts_trailers();
        self.record.forwarded_status = Some(self.response.status.as_u16());
        self.record.upstream = Some(body.exchange.endpoint());
        Ok(body)
    }
}

/// A call of a request without a body that owns everything it uses, so that it can move from a
/// request to a task.
pub(super) type DetachableCall = Pin<Box<dyn Future<Output = CallEnd>>>;

/// The parts of a call that can move to a task, besides its request.
pub(super) struct CallResources {
    pub(super) worker: Rc<WorkerResources>,
    pub(super) snapshot: Arc<Snapshot>,
    /// The address of the client.
    pub(super) client: IpAddr,
    /// The weight of the caller's class, in thousandths.
    pub(super) weight: u32,
    pub(super) kept: KeptConnections,
    /// Gets the attempts of a sampled request.
    pub(super) attempts: Option<Box<AttemptLog>>,
}

/// The head of the response and its body, or the failure with its endpoint and blame.
pub(super) struct CallEnd {
    pub(super) response: Response,
    pub(super) result: Result<UpstreamBody<'static>, Error>,
    upstream: Option<Arc<str>>,
    /// Of the whole call, and of opening a connection.
    times: (Option<Duration>, Option<Duration>),
    blame: Option<Blame>,
    requests_sent: u32,
    retries: u32,
    is_hedged: bool,
    pub(super) attempts: Option<Box<AttemptLog>>,
}

/// Begins a call of `request`, which is prepared for the upstream, by the route at an index of the
/// snapshot. `response` is the head that is filled.
pub(super) fn begin_detachable(
    resources: CallResources,
    route: usize,
    (request, mut response): (Request, Response),
) -> DetachableCall {
    let CallResources { worker, snapshot, client, weight, kept, attempts } = resources;
    Box::pin(async move {
        let mut record = RequestRecord::default();
        let result = match snapshot.routes.at(route) {
            Some(route) => {
                let call = UpstreamCall {
                    route,
                    worker: &worker,
                    client,
                    weight,
                    kept,
                    // That of one request does not end what others wait for.
                    deadline: None,
                    attempts: attempts.as_deref(),
                    response: &mut response,
                    record: &mut record,
                };
                call.run(&request, RequestBody::Empty).await
            }
            None => Err(Error::NoRoute),
        };
        let RequestRecord { upstream, upstream_time, connect_time, blame, .. } = record;
        let RequestRecord { requests_sent, retries, is_hedged, .. } = record;
        let times = (upstream_time, connect_time);
        CallEnd { response, result, upstream, times, blame, requests_sent, retries, is_hedged, attempts }
    })
}

/// One call through the route's breaker: the route, and the response head and record that the call
/// fills.
struct UpstreamCall<'c> {
    route: &'c Route,
    worker: &'c WorkerResources,
    /// The address of the client.
    client: IpAddr,
    /// The weight of the caller's class, in thousandths.
    weight: u32,
    kept: KeptConnections,
    /// When the request that the call is for is given up.
    deadline: Option<Instant>,
    /// Gets the attempts of a sampled request.
    attempts: Option<&'c AttemptLog>,
    response: &'c mut Response,
    record: &'c mut RequestRecord,
}

impl UpstreamCall<'_> {
    /// Calls through the route's breaker, which judges the call by the head of the response: by its
    /// status, and by the time since the upstream had the whole request.
    async fn run<'b>(self, request: &Request, body: RequestBody<'b>) -> Result<UpstreamBody<'b>, Error> {
        let UpstreamCall { route, worker, client, weight, kept, deadline, attempts, response, record } = self;
        // Copies are those of the requests that the route's own upstream gets.
        let mirror = route.mirror.as_ref().filter(|_| !request.is_canary);
        let body = match mirror {
            None => body,
            Some(mirror) => {
                let traced = || {
                    let origin = &attempts?.origin;
                    let route = (&*route.config.name, route.config.path.pattern());
                    Some(origin.begin(BackgroundWork::Mirror, request, route))
                };
                Box::pin(mirror::send_copy(mirror, (request, client, &traced), body)).await?
            }
        };
        let target = route.target(request);
        let mut now = Instant::now();
        let timeouts = route.timeouts(target);
        let total_at = timeouts.total.map(|total| now + total).into_iter().chain(deadline).min();
        let slot = match target.upstream.limit() {
            None => None,
            Some(limit) => match limit.try_acquire(now.into_std()) {
                Some(slot) => Some(slot),
                // It rejects the call at once.
                None if target.breaker.is_rejecting() => None,
                None => {
                    let due = now + limit.config().wait;
                    let due = total_at.map_or(due, |total| total.min(due));
                    let slot = Box::pin(wait_for_slot(&target.upstream, limit, weight, due)).await;
                    let slot =
                        slot.inspect_err(|_| record.upstream = Some(Arc::clone(&target.upstream.config().name)))?;
                    now = Instant::now();
                    Some(slot)
                }
            },
        };
        let start = if body.is_empty() { CallStart::OnAdmission } else { CallStart::OnRequestSent };
        let breaker = &target.breaker;
        let (permit, change) = breaker.admit(start, now.into_std()).map_err(|change| {
            breaker.announce(change);
            record.upstream = Some(Arc::clone(&target.upstream.config().name));
            Error::BreakerOpen
        })?;
        breaker.announce(change);
        let (permit, requests_sent, sent_at) = (RefCell::new(permit), Cell::new(0), Cell::new(now.into_std()));
        let on_sent = || {
            requests_sent.set(requests_sent.get() + 1);
            // The time of a request without a body began with its admission.
            if start == CallStart::OnRequestSent {
                sent_at.set(std::time::Instant::now());
                permit.borrow_mut().start(sent_at.get());
            }
        };
        let hedges = route.config.hedge;
        let on_sent = &on_sent;
        let outgoing = OutgoingRequest { request, kept, client, timeouts, now, total_at, hedges, on_sent, attempts };
        let stats = target.upstream.stats();
        let in_progress = CallInProgress::begin(stats);
        let CallResult { result, repeats } = target.upstream.call(&outgoing, body).await;
        record.requests_sent = requests_sent.get();
        let ended = Instant::now();
        record.upstream_time = Some(ended - now);
        if let Some(repeats) = repeats {
            note_repeats(*repeats, (route, &target.upstream), record);
        }
        let result = result.map(|UpstreamResponse { mut head, exchange }| {
            std::mem::swap(response, &mut *head);
            exchange
        });
        let permit = permit.into_inner();
        in_progress.end(match &result {
            Ok(_) => UpstreamResult::of_status(response.status),
            Err(failure) => UpstreamResult::of_error(&failure.error),
        });
        // A call that says nothing about the upstream has no verdict: its permit is dropped.
        let succeeded = match &result {
            Ok(exchange) if exchange.is_outlier() => None,
            Ok(exchange) => (!exchange.is_request_incomplete()).then(|| !exchange.is_failure()),
            Err(failure) => (failure.is_verdict && !failure.is_outlier).then_some(false),
        };
        let recorded = match succeeded {
            None => {
                drop(permit);
                None
            }
            Some(succeeded) => {
                let ended = ended.into_std();
                // The time of a retry is not that of one call.
                if let Some(slot) = slot.filter(|_| succeeded && requests_sent.get() == 1) {
                    slot.succeed(ended);
                }
                if let Ok(exchange) = &result
                    && requests_sent.get() == 1
                {
                    let took = ended.saturating_duration_since(sent_at.get());
                    stats.durations.observe(took);
                    exchange.count_latency(took, ended);
                }
                let (call, change) = permit.record(succeeded, ended);
                breaker.announce(change);
                call
            }
        };
        let exchange = result.map_err(|failure| {
            count_timeout_of(&failure.error);
            record.upstream.clone_from(&failure.endpoint);
            record.blame = Some(failure.error.blame());
            report_failure(route, &target.upstream, failure)
        })?;
        hop::strip_response(response);
        hop::add_via(&mut response.fields, response.version);
        if !response.fields.has(KnownField::Date) {
            // A recipient with a clock adds a missing Date (RFC 9110 section 6.6.1).
            response.fields.add(KnownField::Date, httpdate::fmt_http_date(worker.view.store().wall_time()));
        }
        let (route, breaker) = (Arc::clone(&route.config.name), Arc::clone(breaker));
        Ok(UpstreamBody { exchange, route, breaker, recorded, accepts_trailers: false })
    }
}

/// Reports the attempts before the one that ended a call.
#[cold]
fn note_repeats(repeats: CallRepeats, (route, upstream): (&Route, &Upstream), record: &mut RequestRecord) {
    (record.retries, record.is_hedged) = (repeats.retries, repeats.is_hedged);
    record.connect_time = repeats.connect_time;
    for failure in repeats.failed {
        count_timeout_of(&failure.error);
        report_failure(route, upstream, failure);
    }
}

/// Waits for a slot of the upstream's concurrency limit.
async fn wait_for_slot(
    upstream: &Upstream,
    limit: &Arc<ConcurrencyLimit>,
    weight: u32,
    due: Instant,
) -> Result<CallSlot, Error> {
    limit.acquire(weight, due).await.map_err(|reason| {
        let ConcurrencyReport { limit, waiting, .. } = limit.report();
        let upstream = &*upstream.config().name;
        Event::UpstreamOverloaded { upstream, reason: reason.as_str(), limit, waiting }.emit();
        Error::ConcurrencyLimit
    })
}

/// The body of an upstream's response, with the breaker and the route that learn of its failure. A
/// failure inside the body reaches breaker and log from here.
pub(crate) struct UpstreamBody<'b> {
    exchange: UpstreamExchange<'b>,
    route: Arc<str>,
    breaker: Arc<Breaker>,
    /// The call at the breaker; `None` if it had no verdict, and its body has none either.
    recorded: Option<RecordedCall>,
    /// Whether the client accepts trailers.
    accepts_trailers: bool,
}

impl UpstreamBody<'_> {
    /// The connection, after the upstream has switched protocols.
    pub(super) fn into_tunnel(self) -> Option<Tunnel> {
        self.exchange.into_tunnel()
    }

    /// The trailers of a body that has ended, whether or not this client accepts trailers.
    pub(super) fn all_trailers(&self) -> Option<&Fields> {
        self.exchange.trailers()
    }

    /// Counts a failure of the body. The breaker and the log learn of it if the upstream is to
    /// blame and had the whole request.
    fn report(&self, error: &BodyError) {
        if let BodyError::Timeout(timeout) = error {
            TIMEOUTS.inc(*timeout);
        }
        let kind = match error {
            _ if error.blame() != Blame::Upstream || self.exchange.is_request_incomplete() => return,
            BodyError::Timeout(_) => UpstreamFault::Timeout,
            BodyError::Malformed(_) => UpstreamFault::Malformed,
            _ => UpstreamFault::Truncated,
        };
        Event::UpstreamFailed { route: &self.route, endpoint: &self.exchange.endpoint(), kind }.emit();
        if let Some(call) = self.recorded {
            self.breaker.announce(self.breaker.fail_late(call, std::time::Instant::now()));
        }
    }
}

impl BodySource for UpstreamBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let filled = self.exchange.poll_fill(cx);
        if let Poll::Ready(Err(error)) = &filled {
            self.report(error);
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.exchange.data()
    }

    fn consume(&mut self, count: usize) {
        self.exchange.consume(count);
    }

    fn take_bytes(&mut self, max: usize) -> Bytes {
        self.exchange.take_bytes(max)
    }

    fn set_read_size(&mut self, size: ReadSize) {
        self.exchange.set_read_size(size);
    }

    fn may_have_trailers(&self) -> bool {
        self.accepts_trailers && self.exchange.may_have_trailers()
    }

    fn trailers(&self) -> Option<&Fields> {
        self.exchange.trailers().filter(|_| self.accepts_trailers)
    }
}

/// Counts the clock that ended a call, if one did: of the upstream, of the whole exchange, or of
/// the client's request body.
fn count_timeout_of(error: &UpstreamConnectionError) {
    if let UpstreamConnectionError::Timeout(timeout) | UpstreamConnectionError::Client(BodyError::Timeout(timeout)) =
        error
    {
        TIMEOUTS.inc(*timeout);
    }
}

/// Logs the failure of an endpoint that is proof of a fault of the upstream, and converts it.
fn report_failure(route: &Route, upstream: &Upstream, failure: AttemptError) -> Error {
    let AttemptError { endpoint, error, is_verdict, .. } = failure;
    let tls = if let UpstreamConnectionError::Tls(fault, _) = &error { Some(tls_fault(*fault)) } else { None };
    let error = Error::from(error);
    if let Some(kind) = tls.or_else(|| fault(error.kind())).filter(|_| is_verdict) {
        let endpoint = endpoint.as_ref().unwrap_or(&upstream.config().name);
        Event::UpstreamFailed { route: &route.config.name, endpoint, kind }.emit();
    }
    error
}

fn tls_fault(fault: TlsFault) -> UpstreamFault {
    TLS_FAULTS.inc(fault);
    match fault {
        TlsFault::CertificateName => UpstreamFault::CertificateName,
        TlsFault::CertificateUnknownIssuer => UpstreamFault::CertificateUnknownIssuer,
        TlsFault::CertificateSelfSigned => UpstreamFault::CertificateSelfSigned,
        TlsFault::CertificateOfAuthority => UpstreamFault::CertificateOfAuthority,
        TlsFault::CertificateExpired => UpstreamFault::CertificateExpired,
        TlsFault::CertificateNotYetValid => UpstreamFault::CertificateNotYetValid,
        TlsFault::CertificateInvalid => UpstreamFault::CertificateInvalid,
        TlsFault::ClientCertificate => UpstreamFault::ClientCertificate,
        TlsFault::Alert => UpstreamFault::TlsAlert,
        TlsFault::Closed => UpstreamFault::TlsClosed,
        TlsFault::Protocol => UpstreamFault::TlsProtocol,
    }
}

fn fault(kind: ErrorKind) -> Option<UpstreamFault> {
    match kind {
        ErrorKind::Connect => Some(UpstreamFault::Connect),
        ErrorKind::NoAddress => Some(UpstreamFault::NoAddress),
        ErrorKind::NoEndpoints => Some(UpstreamFault::NoEndpoints),
        ErrorKind::ConnectTimeout => Some(UpstreamFault::ConnectTimeout),
        ErrorKind::NoResponse => Some(UpstreamFault::NoResponse),
        ErrorKind::Upstream => Some(UpstreamFault::Truncated),
        ErrorKind::Malformed => Some(UpstreamFault::Malformed),
        ErrorKind::Timeout => Some(UpstreamFault::Timeout),
        _ => None,
    }
}
