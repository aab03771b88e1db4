//! The body of a shared fetch as one client reads it.
//!
//! A client that falls a window behind the other readers gets no more bytes of the shared fetch.
//! If the response allows it, the rest comes from a range request of its own, as a part of the same
//! body. Else the body ends with `BodyError::Detached`.
//!
//! Invariant: every byte is of the representation that the head announced.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::context::{CONDITIONS, RANGE_FIELDS, RequestContext};
use super::fill_task::FillFailure;
use super::forward::{CallEnd, CallResources, DetachableCall, UpstreamBody, begin_detachable};
use super::snapshot::Snapshot;
use super::worker::WorkerResources;
use crate::cache::fill::FillReader;
use crate::cache::resume::ResumePoint;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadSize;
use crate::http::fields::Fields;
use crate::http::message::{Request, Response};
use crate::identify::{OutgoingSpan, RequestId, Trace};
use crate::metrics::{self, Counters, Label as _};
use crate::spans::{AttemptLog, BackgroundWork, Phase, TracedWork, WorkEnd, WorkOrigin};
use crate::upstream::KeptConnections;
use crate::{hop, identify, label};

label! {
    /// The result of the range request for a reader that fell behind.
    ContinuationResult, "result", {
        /// The rest of the same representation.
        Continued = "continued",
        /// Another version, another range, or no range.
        Mismatch = "mismatch",
        /// No response.
        Failed = "failed",
    }
}

static CONTINUATIONS: LazyLock<Counters<ContinuationResult>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(super) fn expose() {
    let help = "Range requests for readers that fell behind a shared fetch.";
    metrics::expose_counters("tidegate_fill_continuations", help, &CONTINUATIONS);
}

/// The body of one reader of a shared fetch.
pub(crate) struct SharedBody {
    source: SharedBodySource,
}

enum SharedBodySource {
    /// The shared fetch, and the request by which this reader can continue alone.
    Fill(FillReader, Option<Box<ContinuationRequest>>),
    /// The range request is sent.
    Requested(DetachableCall, ResumePoint, Option<ContinuationSpans>),
    /// The response to it, and the bytes that are left.
    Rest(Box<UpstreamBody<'static>>, u64, Option<ContinuationSpans>),
    Failed,
}

/// The spans of a range request and of its body, reported when they end: at the latest when the
/// reader goes.
struct ContinuationSpans {
    /// `None` once they are reported.
    work: Option<TracedWork>,
    bytes: u64,
}

impl ContinuationSpans {
    /// Ends the call; its body follows.
    fn end_call(&mut self, attempts: Option<Box<AttemptLog>>) {
        if let (Some((spans, _)), Some(attempts)) = (&mut self.work, attempts) {
            spans.end_call(*attempts);
        }
    }

    /// Reports the spans, with the class of the failure; empty without one.
    fn end(&mut self, failure: &'static str) {
        if let Some((spans, report)) = self.work.take() {
            report.end(spans, WorkEnd { failure, bytes: self.bytes, ..WorkEnd::default() });
        }
    }
}

impl Drop for ContinuationSpans {
    fn drop(&mut self) {
        self.end(FillFailure::Abandoned.as_str());
    }
}

/// The request of a reader, kept while its shared fetch is open.
struct ContinuationRequest {
    /// Without conditions and ranges.
    request: Request,
    peer: IpAddr,
    /// The address of the client, behind trusted proxies.
    client: IpAddr,
    /// The weight of the caller's class, in thousandths.
    weight: u32,
    trace: Trace,
    request_id: Option<RequestId>,
    /// The place of a sampled request in its trace.
    origin: Option<WorkOrigin>,
    /// Index of the route in the snapshot.
    route: usize,
    worker: Rc<WorkerResources>,
    snapshot: Arc<Snapshot>,
}

impl ContinuationRequest {
    fn send(self, point: &ResumePoint) -> (DetachableCall, Option<ContinuationSpans>) {
        let ContinuationRequest { mut request, peer, client, weight, trace, request_id, .. } = self;
        let ContinuationRequest { origin, route, worker, snapshot, .. } = self;
        let of_route = snapshot.routes.at(route).map(|route| (&*route.config.name, route.config.path.pattern()));
        let mut work = origin.zip(of_route).map(|(origin, route)| {
            let (mut spans, report) = origin.begin(BackgroundWork::Continuation, &request, route);
            spans.enter(Phase::Upstream);
            (spans, report)
        });
        point.write_range(&mut request.fields);
        hop::prepare_for_upstream(&mut request, peer);
        let span = match &work {
            Some((spans, _)) => OutgoingSpan::Span(spans.current()),
            None => OutgoingSpan::Untraced(snapshot.identity.random_u64()),
        };
        identify::write_trace(trace, span, &mut request.fields);
        if let Some(id) = request_id {
            id.write(&mut request.fields);
        }
        let attempts = work.as_ref().map(|(spans, report)| Box::new(AttemptLog::new(spans, report.exporter())));
        let kept = KeptConnections::Use;
        let resources = CallResources { worker, snapshot, client, weight, kept, attempts };
        let call = begin_detachable(resources, route, (request, Response::default()));
        (call, work.take().map(|work| ContinuationSpans { work: Some(work), bytes: 0 }))
    }
}

impl SharedBody {
    pub(super) fn new(reader: FillReader) -> Self {
        SharedBody { source: SharedBodySource::Fill(reader, None) }
    }

    /// Lets the client of `context` continue alone if it falls behind and its response allows it.
    pub(super) fn allow_continuation(&mut self, context: &RequestContext<'_>) {
        let SharedBodySource::Fill(reader, continuation) = &mut self.source else { return };
        // A small body is complete already and costs nothing here.
        if !ResumePoint::is_resumable(context.response) || !reader.may_be_detached() {
            return;
        }
        let mut request = context.request.clone();
        CONDITIONS.into_iter().chain(RANGE_FIELDS).for_each(|known| request.fields.remove(known));
        context.reduce(&mut request);
        *continuation = Some(Box::new(ContinuationRequest {
            request,
            peer: context.peer,
            client: context.caller.ip,
            weight: context.class_weight(),
            trace: context.caller.trace,
            request_id: context.record.request_id.clone(),
            origin: context.work_origin(),
            route: context.route().index,
            worker: Rc::clone(context.worker),
            snapshot: Arc::clone(context.snapshot),
        }));
    }

    /// The whole body, if it has arrived and nothing of it was read.
    pub(super) fn take_whole(&mut self) -> Option<Bytes> {
        match &mut self.source {
            SharedBodySource::Fill(reader, _) => reader.take_whole(),
            _ => None,
        }
    }

    /// Ends without reading: the client has the object already. A body that is kept is still
    /// completed, for the store.
    pub(super) fn leave_to_store(self) {
        if let SharedBodySource::Fill(reader, _) = self.source {
            reader.leave_to_store();
        }
    }
}

/// The rest of the body that a range request has given, if it did.
fn rest_of(ended: CallEnd, point: &ResumePoint, mut spans: Option<ContinuationSpans>) -> SharedBodySource {
    if let Some(spans) = &mut spans {
        spans.end_call(ended.attempts);
    }
    let (result, source) = match ended.result {
        Ok(body) => match point.rest_in(&ended.response) {
            Some(rest) => (ContinuationResult::Continued, SharedBodySource::Rest(Box::new(body), rest, spans.take())),
            None => (ContinuationResult::Mismatch, SharedBodySource::Failed),
        },
        Err(error) => {
            tracing::debug!(%error, "a slow reader of a shared fetch could not continue");
            (ContinuationResult::Failed, SharedBodySource::Failed)
        }
    };
    CONTINUATIONS.inc(result);
    if let Some(mut spans) = spans {
        spans.end(result.as_str());
    }
    source
}

impl BodySource for SharedBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            self.source = match &mut self.source {
                SharedBodySource::Fill(reader, continuation) => match ready!(reader.poll_fill(cx)) {
                    Err(BodyError::Detached) => {
                        let continuation = continuation.take();
                        let point = reader.head().and_then(|head| ResumePoint::new(head, reader.offset()));
                        match (continuation, point) {
                            (Some(own), Some(point)) => {
                                let (call, spans) = own.send(&point);
                                SharedBodySource::Requested(call, point, spans)
                            }
                            _ => SharedBodySource::Failed,
                        }
                    }
                    other => return Poll::Ready(other),
                },
                SharedBodySource::Requested(call, point, spans) => {
                    rest_of(ready!(call.as_mut().poll(cx)), point, spans.take())
                }
                SharedBodySource::Rest(body, 0, spans) => {
                    // The end of its framing, so that the connection can be used again.
                    let _is_complete_without_it = body.poll_fill(cx);
                    if let Some(spans) = spans {
                        spans.end("");
                    }
                    return Poll::Ready(Ok(()));
                }
                SharedBodySource::Rest(body, _, spans) => {
                    let filled = ready!(body.poll_fill(cx));
                    let is_short = filled.is_ok() && body.data().is_empty();
                    let filled = if is_short { Err(BodyError::Truncated) } else { filled };
                    if let (Err(_), Some(spans)) = (&filled, spans) {
                        spans.end(FillFailure::Aborted.as_str());
                    }
                    return Poll::Ready(filled);
                }
                SharedBodySource::Failed => return Poll::Ready(Err(BodyError::Detached)),
            };
        }
    }

    fn data(&self) -> &[u8] {
        match &self.source {
            SharedBodySource::Fill(reader, _) => reader.data(),
            SharedBodySource::Rest(body, left, _) => {
                let data = body.data();
                &data[..data.len().min(usize::try_from(*left).unwrap_or(usize::MAX))]
            }
            SharedBodySource::Requested(..) | SharedBodySource::Failed => &[],
        }
    }

    fn consume(&mut self, count: usize) {
        match &mut self.source {
            SharedBodySource::Fill(reader, _) => reader.consume(count),
            SharedBodySource::Rest(body, left, spans) => {
                body.consume(count);
                *left -= count as u64;
                if let Some(spans) = spans {
                    spans.bytes += count as u64;
                }
            }
            SharedBodySource::Requested(..) | SharedBodySource::Failed => {}
        }
    }

    fn take_bytes(&mut self, max: usize) -> Bytes {
        match &mut self.source {
            SharedBodySource::Fill(reader, _) => reader.take_bytes(max),
            _ => {
                let data = self.data();
                let bytes = Bytes::copy_from_slice(&data[..data.len().min(max)]);
                self.consume(bytes.len());
                bytes
            }
        }
    }

    fn set_read_size(&mut self, size: ReadSize) {
        if let SharedBodySource::Rest(body, ..) = &mut self.source {
            body.set_read_size(size);
        }
    }

    /// Those of a range request describe a part and are not sent.
    fn may_have_trailers(&self) -> bool {
        match &self.source {
            SharedBodySource::Fill(reader, _) => reader.may_have_trailers(),
            _ => false,
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        match &self.source {
            SharedBodySource::Fill(reader, _) => reader.trailers(),
            _ => None,
        }
    }
}
