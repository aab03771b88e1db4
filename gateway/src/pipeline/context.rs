//! The state of one request in the pipeline: every phase is a method of [`RequestContext`].

use std::net::IpAddr;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use super::buffers::{Arrival, ExchangeBuffers};
use super::snapshot::Snapshot;
use super::worker::WorkerResources;
use crate::cache::control::CacheControl;
use crate::cache::stored::CacheMeta;
use crate::cache::{CachePolicy, HonourClient};
use crate::cache::{key, policy};
use crate::error::ErrorKind;
use crate::hop;
use crate::http::fields::KnownField;
use crate::http::grpc;
use crate::http::message::{OriginEdits, Request, Response};
use crate::identify::auth::Authentication;
use crate::identify::{Caller, OutgoingSpan, RequestId};
use crate::metrics::Label as _;
use crate::record::RequestRecord;
use crate::route::{ForwardPath, Route, TemplateValues};
use crate::spans::{BackgroundWork, Phase, RequestSpans, TracedWork, WorkEnd, WorkOrigin};

/// Fields by which a client asks for a part of an object. A shared fetch is for the whole object.
pub(super) const RANGE_FIELDS: [KnownField; 2] = [KnownField::Range, KnownField::IfRange];
/// Fields whose meaning depends on the copy that the client holds. A shared fetch removes them.
pub(super) const CONDITIONS: [KnownField; 2] = [KnownField::IfNoneMatch, KnownField::IfModifiedSince];

/// One request in the pipeline: the exchange, and the worker, snapshot, caller and route that serve
/// it.
pub(crate) struct RequestContext<'c> {
    pub(super) worker: &'c Rc<WorkerResources>,
    pub(super) snapshot: &'c Arc<Snapshot>,
    pub(super) peer: IpAddr,
    /// The time of arrival, or of the end of the last wait: the clock is not read in every phase.
    pub(super) now: Instant,
    pub(super) caller: CurrentCaller<'c>,
    pub(super) authentication: Authentication,
    /// `None` where no route matches; `admit` then ends the request.
    pub(super) route: Option<&'c Route>,
    pub(crate) request: &'c mut Request,
    pub(super) response: &'c mut Response,
    pub(super) record: &'c mut RequestRecord,
    /// The authority has another certificate than the connection. A trusted proxy connects by its
    /// own name.
    pub(super) is_misdirected: bool,
    /// When the trusted proxy or the caller of gRPC that sent the request gives it up; `None`: it
    /// has not said so.
    pub(super) deadline: Option<Instant>,
    /// A stored object past its freshness, used when the origin fails.
    pub(super) stale: Option<shard::CacheHit<CacheMeta>>,
}

/// The caller of a request: as the connection caches it, or with the user whose password was
/// verified meanwhile.
pub(super) enum CurrentCaller<'c> {
    Cached(&'c Caller),
    Authenticated(Box<Caller>),
}

impl Deref for CurrentCaller<'_> {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        match self {
            CurrentCaller::Cached(caller) => caller,
            CurrentCaller::Authenticated(caller) => caller,
        }
    }
}

/// A request that goes on without its client, in a task of its own, with everything that it uses.
pub(super) struct DetachedRequest {
    worker: Rc<WorkerResources>,
    snapshot: Arc<Snapshot>,
    peer: IpAddr,
    caller: Caller,
    /// Index of the route in the snapshot.
    route: usize,
    request_id: Option<RequestId>,
    pub(super) request: Request,
    stale: Option<shard::CacheHit<CacheMeta>>,
    /// The spans of the work, in the trace of a sampled request.
    traced: Option<TracedWork>,
}

impl DetachedRequest {
    /// Runs `act` with a context of its own, whose response no client reads.
    pub(super) async fn run(mut self, act: impl AsyncFnOnce(&mut RequestContext<'_>)) {
        let Some(route) = self.snapshot.routes.at(self.route) else { return };
        let (mut response, mut record) =
            (Response::default(), RequestRecord { request_id: self.request_id, ..RequestRecord::default() });
        let (spans, report) = self.traced.unzip();
        record.spans = spans;
        let mut context = RequestContext {
            worker: &self.worker,
            snapshot: &self.snapshot,
            peer: self.peer,
            now: Instant::now(),
            caller: CurrentCaller::Cached(&self.caller),
            // It was admitted.
            authentication: Authentication::NotRequired,
            route: Some(route),
            request: &mut self.request,
            response: &mut response,
            record: &mut record,
            is_misdirected: false,
            deadline: None,
            stale: self.stale,
        };
        act(&mut context).await;
        if let (Some(report), Some(spans)) = (report, record.spans.take()) {
            let failure = record.failure.map_or("", ErrorKind::as_str);
            report.end(spans, WorkEnd { upstream: record.upstream, cache: record.cache.as_str(), failure, bytes: 0 });
        }
    }
}

/// The spans of a request, if it is sampled.
#[cold]
fn begin_spans(snapshot: &Snapshot, caller: &Caller, arrival: &Arrival) -> Option<Box<RequestSpans>> {
    let begin = || Box::new(RequestSpans::begin(caller.trace, snapshot.identity.random_u64(), arrival.at));
    caller.trace.is_sampled().then(begin)
}

impl<'c> RequestContext<'c> {
    /// Identifies the caller of the request in `buffers` and finds its route.
    pub(crate) fn new(
        worker: &'c Rc<WorkerResources>,
        snapshot: &'c Arc<Snapshot>,
        arrival: &Arrival,
        buffers: &'c mut ExchangeBuffers,
    ) -> Self {
        let ExchangeBuffers { request, response, record, caller_cache } = buffers;
        let (caller, route, authentication) = caller_cache.lookup(snapshot, &arrival.peer, request);
        *record = RequestRecord {
            trace: Some(caller.trace),
            spans: if snapshot.tracing.is_some() { begin_spans(snapshot, caller, arrival) } else { None },
            request_id: snapshot.identity.request_id(caller, request),
            client_ip: Some(caller.ip),
            device: Some(caller.device),
            user_class: Some(caller.user_class),
            country: caller.country,
            principal: authentication.principal(),
            route: route.map(|route| route.index),
            ..RequestRecord::default()
        };
        if route.is_none_or(|route| route.config.forward_path == ForwardPath::Normal) {
            request.received_path = None;
        }
        let (peer, now) = (arrival.peer.ip, arrival.at);
        let expected = hop::expected_within(&request.fields).filter(|_| caller.is_trusted);
        // A caller of gRPC says how long it waits, and can only shorten its own time.
        let grpc = if grpc::is_call(request) { grpc::timeout(&request.fields) } else { None };
        let deadline = expected.into_iter().chain(grpc).min().and_then(|time| now.checked_add(time));
        let is_misdirected = arrival.peer.is_misdirected(request.host()) && !caller.is_trusted;
        (request.key_route, request.is_canary) = (None, false);
        if let Some(route) = route {
            route.assign(caller, request);
        }
        request.origin_edits = None;
        response.forms = None;
        RequestContext {
            worker,
            snapshot,
            peer,
            now,
            caller: CurrentCaller::Cached(caller),
            authentication,
            route,
            request,
            response,
            record,
            is_misdirected,
            deadline,
            stale: None,
        }
    }

    /// Begins a phase of a sampled request.
    pub(super) fn enter(&mut self, phase: Phase) {
        if let Some(spans) = &mut self.record.spans {
            spans.enter(phase);
        }
    }

    /// The span that an upstream gets as its parent.
    pub(super) fn outgoing_span(&self) -> OutgoingSpan {
        match &self.record.spans {
            None => OutgoingSpan::Untraced(self.snapshot.identity.random_u64()),
            Some(spans) => OutgoingSpan::Span(spans.current()),
        }
    }

    /// Determines what the route changes in the request for the origin.
    #[cold]
    pub(super) fn edit_request(&mut self) {
        self.request.origin_edits = self.origin_edits_of(self.request);
    }

    /// The request as it is sent for a response that others get too: without the parameters that
    /// are not in the cache key, in its target and in what the route makes of it.
    pub(super) fn reduce(&self, copy: &mut Request) {
        key::reduce_target(&self.snapshot.cache, copy);
        if copy.origin_edits.is_some() {
            copy.origin_edits = self.origin_edits_of(copy);
        }
    }

    fn origin_edits_of(&self, request: &Request) -> Option<Rc<OriginEdits>> {
        let edits = self.route?.config.edits.as_deref().filter(|edits| edits.changes_requests())?;
        Some(Rc::new(edits.of_request(&TemplateValues { request, ..self.template_values() })))
    }

    /// The values of variables in the configuration of the route.
    pub(super) fn template_values(&self) -> TemplateValues<'_> {
        TemplateValues {
            request: self.request,
            client_ip: self.caller.ip,
            region: self.caller.region.as_str(),
            tier: self.snapshot.identity.user_class_name(self.caller.user_class),
            user: self.user_name(),
            request_id: self.record.request_id.as_ref(),
            path: self.route.map(|route| &route.config.path),
        }
    }

    /// The name of the user: of the route's authentication, or of `identity.user` where a route
    /// writes it into a field. Empty for an anonymous caller.
    fn user_name(&self) -> &str {
        let principal = self.snapshot.routes.principal_name(self.record.route, self.record.principal);
        if principal.is_empty() { self.caller.user_name.as_deref().unwrap_or_default() } else { principal }
    }

    /// The route, in the phases after `admit`.
    pub(super) fn route(&self) -> &'c Route {
        self.route.expect("`admit` answers requests without a route")
    }

    /// Begins the spans of work in the trace of the request; `None`: it is not sampled.
    pub(super) fn begin_work(&self, work: BackgroundWork) -> Option<TracedWork> {
        let config = &self.route().config;
        Some(self.work_origin()?.begin(work, self.request, (&config.name, config.path.pattern())))
    }

    /// The current phase of a sampled request, below which work may begin.
    pub(super) fn work_origin(&self) -> Option<WorkOrigin> {
        Some(WorkOrigin::of(self.record.spans.as_ref()?, self.snapshot.tracing.as_ref()?))
    }

    /// A copy of the request that can go on without the client, for `work`.
    pub(super) fn detached(&self, work: BackgroundWork, stale: Option<shard::CacheHit<CacheMeta>>) -> DetachedRequest {
        DetachedRequest {
            worker: Rc::clone(self.worker),
            snapshot: Arc::clone(self.snapshot),
            peer: self.peer,
            caller: Caller::clone(&self.caller),
            route: self.route().index,
            request_id: self.record.request_id.clone(),
            request: self.request.clone(),
            stale,
            traced: self.begin_work(work),
        }
    }

    /// Reads the clock again after a wait.
    pub(super) fn update_now(&mut self) {
        self.now = Instant::now();
    }

    /// The request's own cache directives, `Pragma` included, as far as the configuration honours
    /// them.
    pub(super) fn request_directives(&self) -> CacheControl {
        let mut directives = CacheControl::parse(&self.request.fields);
        directives.no_cache = policy::demands_validation(&self.request.fields, &directives);
        if self.snapshot.cache.honour_client == HonourClient::Off {
            directives = CacheControl { no_store: false, ..directives.without_demands() };
        }
        directives
    }

    /// The cache policy of the route; that of `mode = "standard"` where the route has none.
    pub(super) fn cache_policy(&self) -> &'c CachePolicy {
        static DEFAULT: LazyLock<CachePolicy> = LazyLock::new(CachePolicy::default);
        self.route().config.cache.as_ref().unwrap_or_else(|| &DEFAULT)
    }

    /// Whether the client has declared that it accepts trailers (RFC 9110 section 6.5.1).
    pub(super) fn accepts_trailers(&self) -> bool {
        self.request.accepts_trailers
    }
}
