//! Metrics and access log of requests: what is in flight, what was aborted, one line per request.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use limiter::{Admission, Denial, Verdict};

use super::worker_context::WorkerContext;
use crate::error::ErrorKind;
use crate::http::body::BodyError;
use crate::http::exchange_clock::Blame;
use crate::http::fields::KnownField;
use crate::http::h1::RequestRefusal;
use crate::http::message::{HttpVersion, Request, Response, StatusCode};
use crate::identify::{CountryCode, RequestUuid};
use crate::label;
use crate::log::AccessLogEntry;
use crate::metrics::{self, Counter, Counters, Histograms, Label};
use crate::peer::ConnectionPeer;
use crate::pipeline::{self, ExchangeBuffers, Snapshot};
use crate::record::{CacheResult, RequestRecord};
use crate::spans::{FinishedRequest, RequestSpans, bounded};

impl Label for RequestRefusal {
    const NAME: &'static str = "reason";
    const ALL: &'static [Self] = RequestRefusal::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.reason()
    }
}

// The name and the values of OpenTelemetry.
impl Label for HttpVersion {
    const NAME: &'static str = "network_protocol_version";
    const ALL: &'static [Self] = &[HttpVersion::Http10, HttpVersion::Http11, HttpVersion::Http2];
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        match self {
            HttpVersion::Http10 => "1.0",
            HttpVersion::Http11 => "1.1",
            HttpVersion::Http2 => "2",
        }
    }
}

label! {
    /// Why a response was not completed.
    pub(super) AbortReason, "reason", {
        ClientClosed = "client_closed",
        /// The client accepted no byte of the response in time, or too few.
        ClientTimeout = "client_timeout",
        /// The head of another request was not complete in time (HTTP/2).
        HeadTimeout = "head_timeout",
        /// The client did not acknowledge a PING in time (HTTP/2).
        PingTimeout = "ping_timeout",
        /// The connection was ended for a flood of frames (HTTP/2).
        Flood = "flood",
        /// The client broke the protocol (HTTP/2).
        ProtocolError = "protocol_error",
        /// It was not complete when `server.drain_timeout` ended.
        DrainTimeout = "drain_timeout",
        /// Writing to the client failed.
        WriteFailed = "write_failed",
        BodyFailed = "body_failed",
        /// The connection has no memory for its head (HTTP/2).
        Memory = "memory",
        /// The upstream read nothing of what an upload held, and the connection had no memory left
        /// for its other uploads (HTTP/2).
        UploadStalled = "upload_stalled",
        /// The client fell a window behind the other readers of a shared fetch.
        SlowReader = "slow_reader",
        Panic = "panic",
    }
}

impl AbortReason {
    /// The reason of a response whose body failed with `error`.
    pub(super) fn of(error: &BodyError) -> Self {
        match error {
            BodyError::Detached => AbortReason::SlowReader,
            _ => AbortReason::BodyFailed,
        }
    }

    /// The side to blame where a connection has ended for this reason.
    pub(super) fn blame(self) -> Blame {
        match self {
            AbortReason::DrainTimeout | AbortReason::Panic => Blame::Gateway,
            AbortReason::UploadStalled => Blame::Upstream,
            _ => Blame::Client,
        }
    }
}

/// By version.
static REFUSALS: LazyLock<[Counters<RequestRefusal>; HttpVersion::ALL.len()]> = LazyLock::new(Default::default);
static ABORTS: LazyLock<Counters<AbortReason>> = LazyLock::new(Counters::default);
static UPGRADES: LazyLock<Counter> = LazyLock::new(Counter::default);
static BEGUN: LazyLock<Counters<HttpVersion>> = LazyLock::new(Counters::default);
static DURATION: LazyLock<Histograms<HttpVersion>> = LazyLock::new(Histograms::default);

/// Registers the metrics of this module.
pub(crate) fn expose() {
    metrics::expose_counter_with("tidegate_requests_refused", "Malformed or oversize requests.", |emit| {
        for version in HttpVersion::ALL {
            for refusal in RequestRefusal::ALL {
                let labels = [(RequestRefusal::NAME, refusal.reason()), (HttpVersion::NAME, Label::as_str(*version))];
                emit(&labels, REFUSALS[version.index()].get(*refusal));
            }
        }
    });
    metrics::expose_counters("tidegate_responses_aborted", "Responses that were not completed.", &ABORTS);
    metrics::expose_counters("tidegate_requests", "Requests whose head was read.", &BEGUN);
    metrics::expose_counter_with("tidegate_upgrades", "Connections that switched protocols.", |emit| {
        emit(&[], UPGRADES.get());
    });
    metrics::expose_gauge_with("tidegate_requests_in_flight", "Requests being answered.", |emit| {
        emit(&[], requests_in_flight() as f64);
    });
    let help = "From a request's head to the last byte of its response.";
    metrics::expose_histograms("http_server_request_duration_seconds", help, &DURATION);
}

/// Requests being answered by this process.
pub(crate) fn requests_in_flight() -> u64 {
    // The two counters are not read at one moment; a request that ends in between must not show as
    // an overflow.
    let ended = DURATION.count();
    let begun: u64 = HttpVersion::ALL.iter().map(|version| BEGUN.get(*version)).sum();
    begun.saturating_sub(ended)
}

pub(super) fn count_abort(reason: AbortReason) {
    ABORTS.inc(reason);
}

/// Counts a request that is refused.
pub(super) fn count_refusal(refusal: RequestRefusal, version: HttpVersion) {
    REFUSALS[version.index()].inc(refusal);
}

pub(super) fn count_upgrade() {
    UPGRADES.inc();
}

/// Counts one request as in flight until it ends.
pub(super) struct InFlightRequest {
    began: Instant,
    version: HttpVersion,
    is_ended: bool,
}

impl InFlightRequest {
    pub(super) fn begin(began: Instant, version: HttpVersion) -> Self {
        BEGUN.inc(version);
        InFlightRequest { began, version, is_ended: false }
    }

    /// Ends the request and returns its duration.
    pub(super) fn end(mut self) -> Duration {
        self.observe()
    }

    fn observe(&mut self) -> Duration {
        if std::mem::replace(&mut self.is_ended, true) {
            return Duration::ZERO;
        }
        let duration = self.began.elapsed();
        DURATION.observe(self.version, duration);
        duration
    }
}

impl Drop for InFlightRequest {
    fn drop(&mut self) {
        self.observe();
    }
}

/// A request that has ended, with its response.
pub(super) struct CompletedExchange<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) peer: &'a ConnectionPeer,
    pub(super) buffers: &'a ExchangeBuffers,
    /// Bytes of the response body that were sent.
    pub(super) bytes: u64,
    /// Bytes of the request body: those announced, or those received.
    pub(super) request_bytes: u64,
    pub(super) duration: Duration,
}

impl CompletedExchange<'_> {
    /// The facts of the request for its spans.
    #[cold]
    fn finished(&self, spans: &RequestSpans) -> FinishedRequest {
        let ExchangeBuffers { request, response, record, .. } = self.buffers;
        let route = record.route.and_then(|route| self.snapshot.routes.at(route));
        let limit = match &record.verdict {
            Verdict::Allowed(_) => "",
            Verdict::Denied(denial) => self.snapshot.limits.name(denial.limit_status.rule),
        };
        let user_agent = request.fields.get(KnownField::UserAgent).unwrap_or_default();
        FinishedRequest {
            spans: Box::new(spans.clone()),
            duration: self.duration,
            method: request.method.clone(),
            scheme: request.scheme,
            authority: bounded(&request.authority),
            target: bounded(&request.target),
            version: request.version,
            status: response.status,
            client: record.client_ip.unwrap_or(self.peer.ip),
            user_agent: bounded(&String::from_utf8_lossy(user_agent)),
            request_bytes: self.request_bytes,
            bytes: self.bytes,
            route: route.map(|route| route.config.name.to_string()).unwrap_or_default(),
            route_path: route.map(|route| route.config.path.pattern()).unwrap_or_default(),
            cache: record.cache.as_str(),
            failure: record
                .failure
                .map(ErrorKind::as_str)
                .or(record.refusal.map(RequestRefusal::reason))
                .unwrap_or_default(),
            aborted: record.aborted,
            limit: limit.to_owned(),
            upstream: record.upstream.clone(),
            request_id: record.request_id.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Counts a refusal and writes the request's access log line.
    pub(super) fn report(&self, context: &WorkerContext) {
        let ExchangeBuffers { request, response, record, .. } = self.buffers;
        if let Some(refusal) = record.refusal {
            count_refusal(refusal, request.version);
            tracing::debug!(reason = refusal.reason(), "request refused");
        }
        if let Some(route) = record.route.and_then(|route| self.snapshot.routes.at(route)) {
            let counters = &route.counters;
            counters.duration.observe(self.duration);
            counters.cache_results.inc(record.cache);
            counters.response_bytes.add(self.bytes);
            if let Some(failure) = record.failure {
                counters.failures.inc(failure);
            }
        }
        if let (Some(spans), Some(exporter)) = (&record.spans, &self.snapshot.tracing) {
            exporter.submit(self.finished(spans));
        }
        if !context.worker.log.is_open() {
            return;
        }
        let trace = record.trace.map(|trace| trace.to_string()).unwrap_or_default();
        let mut uuid = RequestUuid::NIL.text();
        let request_id = record.request_id.as_ref().map_or("", |id| id.as_str(&mut uuid));
        let (Verdict::Allowed(Admission { evaluations, .. }) | Verdict::Denied(Denial { evaluations, .. })) =
            &record.verdict;
        let shadow_limit = self.snapshot.limits.names(evaluations.shadow_denied);
        let fingerprint = self.peer.fingerprint();
        let received = |known| request.fields.get(known).unwrap_or_default();
        let identity = &self.snapshot.identity;
        context.worker.log.record(
            &self.snapshot.log,
            &AccessLogEntry {
                method: &request.method,
                scheme: request.scheme,
                authority: &request.authority,
                path_and_query: &request.target,
                version: record.version.text(request.version),
                tls: self.peer.tls_version().unwrap_or_default(),
                status: response.status,
                bytes: self.bytes,
                request_bytes: self.request_bytes,
                duration: self.duration,
                client: record.client_ip.unwrap_or(self.peer.ip),
                proxy: self.peer.proxy(),
                route: self.snapshot.routes.name(record.route),
                cache: record.cache.as_str(),
                degraded: record.degraded,
                blame: record.blame.map(Blame::as_str).unwrap_or_default(),
                failure: record.failure.map(ErrorKind::as_str).unwrap_or_default(),
                aborted: record.aborted,
                limit: match &record.verdict {
                    Verdict::Allowed(_) => "",
                    Verdict::Denied(denial) => self.snapshot.limits.name(denial.limit_status.rule),
                },
                shadow_limit: &shadow_limit,
                refused: record.refusal.map(RequestRefusal::reason).unwrap_or_default(),
                upstream: record.upstream.as_deref().unwrap_or_default(),
                upstream_time: record.upstream_time,
                connect_time: record.connect_time,
                retries: record.retries,
                is_hedged: record.is_hedged,
                user: self.snapshot.routes.principal_name(record.route, record.principal),
                user_class: record.user_class.map(|class| identity.user_class_name(class)).unwrap_or_default(),
                device: record.device.map(|device| (device.0 >> 64) as u64),
                country: record.country.as_ref().map(CountryCode::as_str).unwrap_or_default(),
                ja4: fingerprint.map(|fingerprint| fingerprint.ja4.as_str()).unwrap_or_default(),
                fingerprint: fingerprint.map(|fingerprint| fingerprint.stable.as_str()).unwrap_or_default(),
                user_agent: received(KnownField::UserAgent),
                referer: request.fields.named(b"referer").next().unwrap_or_default(),
                trace_id: &trace,
                request_id,
                config: self.snapshot.generation,
            },
        );
    }
}

/// The record of a refused request. `request` is valid if only its body is refused; else it is the
/// description of the head.
pub(super) fn refused(
    refusal: RequestRefusal,
    (request, peer): (&Request, &ConnectionPeer),
    snapshot: &Snapshot,
) -> RequestRecord {
    let (trace, request_id) = snapshot.identity.trace_of_refused(&request.fields, peer);
    let trace = snapshot.tracing.as_ref().map(|_| trace);
    let spans = trace
        .filter(|trace| trace.is_sampled())
        .map(|trace| Box::new(RequestSpans::begin(trace, snapshot.identity.random_u64(), Instant::now())));
    let route = if refusal.is_of_body() { snapshot.routes.find(request).map(|route| route.index) } else { None };
    RequestRecord {
        route,
        refusal: Some(refusal),
        trace,
        spans,
        request_id,
        blame: Some(Blame::Client),
        cache: CacheResult::Error,
        must_close: true,
        ..RequestRecord::default()
    }
}

/// Reports a request whose connection or stream ended before its response began.
#[expect(clippy::too_many_arguments, reason = "an exchange, and how it ended")]
pub(super) fn report_ended(
    context: &WorkerContext,
    snapshot: &Snapshot,
    (peer, buffers): (&ConnectionPeer, &mut ExchangeBuffers),
    (duration, request_bytes): (Duration, u64),
    reason: AbortReason,
) {
    count_abort(reason);
    let status = match reason.blame() {
        // nginx's status for this case, 499, has no registered name.
        Blame::Client => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    buffers.response = Response::new(status);
    buffers.record = RequestRecord {
        blame: Some(reason.blame()),
        aborted: reason.as_str(),
        refusal: buffers.record.refusal,
        ..pipeline::client_closed(&buffers.record)
    };
    CompletedExchange { snapshot, peer, buffers, bytes: 0, request_bytes, duration }.report(context);
}
