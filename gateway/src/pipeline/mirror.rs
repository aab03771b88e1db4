//! Copies of requests for the mirror of a route: bounded in number, time and bytes; no client
//! waits for them, and nothing of their responses is used.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use crate::error::Error;
use crate::http::attempt::UpstreamConnectionError;
use crate::http::body::{BodyError, BodySource as _};
use crate::http::exchange_clock::ExchangeTimeouts;
use crate::http::fields::KnownField;
use crate::http::message::{BodyLength, Request};
use crate::http::request_body::{RequestBody, StartedBody};
use crate::identify::{self, OutgoingSpan};
use crate::metrics::Label as _;
use crate::route::{Mirror, MirrorResult};
use crate::spans::{AttemptLog, Phase, TracedWork, WorkEnd};
use crate::tasks::{self, TaskKind};
use crate::upstream::{CallInProgress, KeptConnections, OutgoingRequest, REPLAY_BYTES_MAX, Upstream, UpstreamResult};

/// Most copies of one thread in progress at a time: a mirror that hangs costs no more.
const MIRRORED_MAX: usize = 64;
/// Longest time of one copy, with its response.
const TIME_MAX: Duration = Duration::from_secs(30);
/// How long a request waits for the rest of its body before it is sent without a copy.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

thread_local!(static IN_PROGRESS: Cell<usize> = const { Cell::new(0) });

/// A copy in progress. A drop ends the count.
struct MirrorSlot;

impl MirrorSlot {
    fn take() -> Option<Self> {
        let count = IN_PROGRESS.get();
        (count < MIRRORED_MAX).then(|| {
            IN_PROGRESS.set(count + 1);
            MirrorSlot
        })
    }
}

impl Drop for MirrorSlot {
    fn drop(&mut self) {
        IN_PROGRESS.set(IN_PROGRESS.get().saturating_sub(1));
    }
}

/// Sends a copy of a request to the mirror, if it takes this one. Returns the body for the request
/// itself. A body is read before, up to the bound of what is kept of bodies. `traced` begins the
/// spans of the copy of a sampled request.
///
/// # Errors
/// The client has failed to send its body.
pub(super) async fn send_copy<'b>(
    mirror: &Mirror,
    (request, client, traced): (&Request, IpAddr, &dyn Fn() -> Option<TracedWork>),
    body: RequestBody<'b>,
) -> Result<RequestBody<'b>, Error> {
    if request.upgrade.is_some() || !mirror.takes_next() {
        return Ok(body);
    }
    if request.fields.has(KnownField::Expect) {
        // Its client sends the body after the upstream has asked for it.
        mirror.results.inc(MirrorResult::Body);
        return Ok(body);
    }
    let Some(slot) = MirrorSlot::take() else {
        mirror.results.inc(MirrorResult::Busy);
        return Ok(body);
    };
    let (copied, body) = if body.is_empty() { (Some(Vec::new()), body) } else { read(body).await? };
    let Some(copied) = copied else {
        mirror.results.inc(MirrorResult::Body);
        return Ok(body);
    };
    let (mut request, upstream, results) = (request.clone(), Arc::clone(&mirror.upstream), Arc::clone(&mirror.results));
    let mut traced = traced();
    if let Some((spans, _)) = &mut traced {
        spans.enter(Phase::Upstream);
        identify::write_trace(spans.trace(), OutgoingSpan::Span(spans.current()), &mut request.fields);
    }
    tasks::spawn(TaskKind::Mirror, async move {
        let _slot = slot;
        let copied = RequestBody::Started(Box::new(StartedBody::new(copied, RequestBody::Empty)));
        let body = if request.length == BodyLength::Empty { RequestBody::Empty } else { copied };
        let log = traced.as_ref().map(|(spans, report)| AttemptLog::new(spans, report.exporter()));
        let mut bytes = 0;
        let copy = MirrorCopy { upstream: &upstream, request: &request, client, attempts: log.as_ref() };
        let responded = timeout(TIME_MAX, copy.exchange(body, &mut bytes)).await.unwrap_or(false);
        let result = if responded { MirrorResult::Responded } else { MirrorResult::Failed };
        results.inc(result);
        if let (Some((mut spans, report)), Some(log)) = (traced, log) {
            spans.end_call(log);
            let failure = if responded { "" } else { result.as_str() };
            report.end(spans, WorkEnd { failure, bytes, ..WorkEnd::default() });
        }
    });
    Ok(body)
}

/// Reads a body to its end. `None` with the body from its first byte on, if it is larger than what
/// is kept or takes too long.
async fn read(mut body: RequestBody<'_>) -> Result<(Option<Vec<u8>>, RequestBody<'_>), Error> {
    let (mut bytes, due) = (Vec::new(), Instant::now() + BODY_TIMEOUT);
    let is_complete = loop {
        match timeout_at(due, poll_fn(|cx| body.poll_fill(cx))).await {
            Err(_elapsed) => break false,
            Ok(Err(error)) => return Err(client_error(error)),
            Ok(Ok(())) => {}
        }
        let count = body.data().len();
        if count == 0 {
            break true;
        }
        if bytes.len() + count > REPLAY_BYTES_MAX {
            break false;
        }
        bytes.extend_from_slice(body.data());
        body.consume(count);
    };
    let copied = is_complete.then(|| bytes.clone());
    Ok((copied, RequestBody::Started(Box::new(StartedBody::new(bytes, body)))))
}

fn client_error(error: BodyError) -> Error {
    UpstreamConnectionError::Client(error).into()
}

/// A copy of a request for a mirror.
struct MirrorCopy<'m> {
    upstream: &'m Upstream,
    request: &'m Request,
    /// The address of the client.
    client: IpAddr,
    attempts: Option<&'m AttemptLog>,
}

impl MirrorCopy<'_> {
    /// Sends the copy, and reads its response to the end. Returns whether there was one; `bytes`
    /// gets the size of its body.
    async fn exchange(self, body: RequestBody<'_>, bytes: &mut u64) -> bool {
        let MirrorCopy { upstream, request, client, attempts } = self;
        let slot = match upstream.limit().map(|limit| limit.try_acquire(std::time::Instant::now())) {
            Some(None) => return false,
            Some(slot) => slot,
            None => None,
        };
        let now = Instant::now();
        // The time of a request without a body began with its call.
        let (sent_at, requests_sent, is_bodiless) = (Cell::new(now), Cell::new(0_u32), body.is_empty());
        let ExchangeTimeouts { head, idle, .. } = upstream.config().timeouts();
        let outgoing = OutgoingRequest {
            request,
            kept: KeptConnections::Use,
            client,
            timeouts: ExchangeTimeouts { head, idle, total: Some(TIME_MAX) },
            now,
            total_at: Some(now + TIME_MAX),
            hedges: false,
            on_sent: &|| {
                if !is_bodiless {
                    sent_at.set(Instant::now());
                }
                requests_sent.set(requests_sent.get() + 1);
            },
            attempts,
        };
        let in_progress = CallInProgress::begin(upstream.stats());
        let call = upstream.call(&outgoing, body).await;
        in_progress.end(match &call.result {
            Ok(answered) => UpstreamResult::of_status(answered.head.status),
            Err(failure) => UpstreamResult::of_error(&failure.error),
        });
        let Ok(mut exchange) = call.result.map(|answered| answered.exchange) else { return false };
        let ended = Instant::now();
        if requests_sent.get() == 1 && !exchange.is_outlier() && !exchange.is_request_incomplete() {
            let took = ended.saturating_duration_since(sent_at.get());
            upstream.stats().durations.observe(took);
            exchange.count_latency(took, ended.into_std());
        }
        if let Some(slot) = slot {
            slot.succeed(ended.into_std());
        }
        loop {
            match poll_fn(|cx| exchange.poll_fill(cx)).await {
                Ok(()) if exchange.data().is_empty() => return true,
                Ok(()) => {
                    *bytes += exchange.data().len() as u64;
                    exchange.consume(exchange.data().len());
                }
                Err(_) => return false,
            }
        }
    }
}
