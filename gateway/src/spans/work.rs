//! Work beside a request or after it: its spans are children of the span of the request that it
//! began in, which may have ended before.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::exporter::TraceExporter;
use super::{BackgroundWork, FinishedRequest, RequestSpans, bounded, child_id};
use crate::http::message::{Request, StatusCode};
use crate::identify::Trace;
use crate::metrics::Label as _;

/// Indexes of attempts below a span are smaller.
const FIRST_INDEX: usize = 1 << 16;

/// The place in a trace where work begins, and the exporter that takes its spans.
#[derive(Clone)]
pub(crate) struct WorkOrigin {
    trace: Trace,
    parent: u64,
    exporter: Arc<TraceExporter>,
}

/// The facts of work that has begun, which its end reports with its spans.
pub(crate) struct WorkReport {
    facts: Box<FinishedRequest>,
    exporter: Arc<TraceExporter>,
}

/// Work that has begun: its spans so far, and what reports them.
pub(crate) type TracedWork = (Box<RequestSpans>, WorkReport);

/// The end of work.
#[derive(Default)]
pub(crate) struct WorkEnd {
    pub(crate) upstream: Option<Arc<str>>,
    /// The result of the cache; empty without one.
    pub(crate) cache: &'static str,
    /// The class of the failure; empty without one.
    pub(crate) failure: &'static str,
    /// Bytes of the response body.
    pub(crate) bytes: u64,
}

impl WorkOrigin {
    /// The current phase of a request.
    pub(crate) fn of(spans: &RequestSpans, exporter: &Arc<TraceExporter>) -> Self {
        WorkOrigin { trace: spans.trace, parent: spans.current(), exporter: Arc::clone(exporter) }
    }

    /// Begins work for `request`, of the route with this name and this path.
    pub(crate) fn begin(
        &self,
        work: BackgroundWork,
        request: &Request,
        (route, route_path): (&str, String),
    ) -> TracedWork {
        let spans = RequestSpans {
            trace: self.trace,
            id: child_id(self.parent, FIRST_INDEX + work.index()),
            parent: self.parent,
            work: Some(work),
            began: Instant::now(),
            began_at: SystemTime::now(),
            phases: Vec::new(),
        };
        let facts = FinishedRequest {
            spans: Box::new(spans.clone()),
            duration: Duration::ZERO,
            method: request.method.clone(),
            scheme: request.scheme,
            authority: bounded(&request.authority),
            target: bounded(&request.target),
            version: request.version,
            // No client gets the response.
            status: StatusCode::OK,
            client: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            user_agent: String::new(),
            request_bytes: 0,
            bytes: 0,
            route: route.to_owned(),
            route_path,
            cache: "",
            failure: "",
            aborted: "",
            limit: String::new(),
            upstream: None,
            request_id: String::new(),
        };
        (Box::new(spans), WorkReport { facts: Box::new(facts), exporter: Arc::clone(&self.exporter) })
    }
}

impl WorkReport {
    pub(crate) fn exporter(&self) -> &Arc<TraceExporter> {
        &self.exporter
    }

    /// Reports the spans of work that has ended.
    pub(crate) fn end(self, spans: Box<RequestSpans>, end: WorkEnd) {
        let WorkReport { facts, exporter } = self;
        let WorkEnd { upstream, cache, failure, bytes } = end;
        let duration = spans.began.elapsed();
        exporter.submit(FinishedRequest { spans, duration, upstream, cache, failure, bytes, ..*facts });
    }
}
