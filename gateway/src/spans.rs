//! The spans of sampled requests: what the pipeline notes of a request, and its export.
//!
//! A request without a trace, or one that is not sampled, has no [`RequestSpans`], and every note
//! is one comparison. Invariant: no request waits for the export; what the queue does not take is
//! dropped and counted.

mod otlp;
mod exporter;
mod work;

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

pub(crate) use exporter::{ExportCompression, TraceExporter, TracingConfig, expose};
pub(crate) use work::{TracedWork, WorkEnd, WorkOrigin};

use crate::http::attempt::AttemptErrorClass;
use crate::http::message::{HttpVersion, Method, Scheme, StatusCode};
use crate::identify::Trace;
use crate::label;

label! {
    /// A phase of a request that has a span of its own.
    pub(crate) Phase, "phase", {
        /// Access lists, limits and authentication.
        Admit = "admit",
        /// The verification service of the route.
        Authorize = "authorize",
        /// Caches, and the wait for the fetch of another request.
        Lookup = "lookup",
        /// The call of the upstream, up to the head of its response.
        Upstream = "upstream",
        /// The response, up to its last byte.
        Respond = "respond",
    }
}

label! {
    /// Work with a span of its own, named as its task.
    pub(crate) BackgroundWork, "work", {
        /// A copy for the mirror of a route.
        Mirror = "mirror",
        /// The validation of a stale response that was served.
        Validation = "background_validation",
        /// A shared fetch whose client has left before the head of the response.
        Fetch = "detached_fetch",
        /// The body of a shared fetch, from the head of the response on.
        Fill = "fill",
        /// The rest of a body for a reader that fell behind its shared fetch.
        Continuation = "continuation",
    }
}

/// Phases of one request: lookups repeat a few times, and a fetch may be repeated once.
const PHASES_MAX: usize = 16;
/// Attempts of one call: more than retries and hedges make.
const ATTEMPTS_MAX: usize = 16;
/// Connections that one call tries.
const CONNECTS_MAX: usize = 16;
/// Most bytes of a text of a client in a span.
const TEXT_MAX: usize = 512;

/// A text of a client, bounded.
pub(crate) fn bounded(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_MAX)].to_owned()
}

/// The spans of one request while it is handled. Its phases follow each other.
#[derive(Clone, Debug)]
pub(crate) struct RequestSpans {
    trace: Trace,
    /// Id of the server's span, or of that of background work.
    id: u64,
    /// Id of the span above; 0: none.
    parent: u64,
    /// `None`: a request of a client.
    work: Option<BackgroundWork>,
    began: Instant,
    /// Wall time at `began`.
    began_at: SystemTime,
    phases: Vec<PhaseSpan>,
}

#[derive(Clone, Debug)]
struct PhaseSpan {
    phase: Phase,
    id: u64,
    began: Instant,
    /// `None` while it lasts.
    ended: Option<Instant>,
    attempts: Vec<AttemptSpan>,
    connects: Vec<ConnectSpan>,
}

/// One connection that a call has tried to open.
#[derive(Clone, Debug)]
pub(crate) struct ConnectSpan {
    pub(crate) endpoint: Arc<str>,
    pub(crate) address: SocketAddr,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// `None`: it was opened.
    pub(crate) failure: Option<AttemptErrorClass>,
}

/// One attempt of a call to get a response from an endpoint.
#[derive(Clone, Debug)]
pub(crate) struct AttemptSpan {
    pub(crate) endpoint: Option<Arc<str>>,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// The status of the response, or the class of the failure.
    pub(crate) result: Result<StatusCode, AttemptErrorClass>,
}

/// Collects the attempts and the connections of one call of a sampled request.
pub(crate) struct AttemptLog {
    attempts: RefCell<Vec<AttemptSpan>>,
    connects: RefCell<Vec<ConnectSpan>>,
    /// For a copy of the call.
    pub(crate) origin: WorkOrigin,
}

impl AttemptLog {
    pub(crate) fn new(spans: &RequestSpans, exporter: &Arc<TraceExporter>) -> Self {
        let origin = WorkOrigin::of(spans, exporter);
        AttemptLog { attempts: RefCell::default(), connects: RefCell::default(), origin }
    }

    pub(crate) fn push(&self, attempt: AttemptSpan) {
        let mut attempts = self.attempts.borrow_mut();
        if attempts.len() < ATTEMPTS_MAX {
            attempts.push(attempt);
        }
    }

    pub(crate) fn push_connect(&self, connect: ConnectSpan) {
        let mut connects = self.connects.borrow_mut();
        if connects.len() < CONNECTS_MAX {
            connects.push(connect);
        }
    }
}

impl RequestSpans {
    /// The spans of a request that arrived at `began`; `seed` is a random number.
    pub(crate) fn begin(trace: Trace, seed: u64, began: Instant) -> Self {
        let began_at = SystemTime::now().checked_sub(began.elapsed()).unwrap_or(SystemTime::UNIX_EPOCH);
        let (id, parent) = (seed.max(1), trace.parent);
        let mut spans = RequestSpans { trace, id, parent, work: None, began, began_at, phases: Vec::new() };
        spans.begin_phase(Phase::Admit, began);
        spans
    }

    /// Begins a phase, which ends the one before.
    pub(crate) fn enter(&mut self, phase: Phase) {
        let now = Instant::now();
        self.end_phase(now);
        self.begin_phase(phase, now);
    }

    /// Ends the phase.
    pub(crate) fn leave(&mut self) {
        self.end_phase(Instant::now());
    }

    /// The id of the current phase, as the parent of the upstream's spans.
    pub(crate) fn current(&self) -> u64 {
        self.phases.last().map_or(self.id, |phase| phase.id)
    }

    pub(crate) fn trace(&self) -> Trace {
        self.trace
    }

    /// Adds the attempts of the call that the last phase has made, and ends the phase.
    pub(crate) fn end_call(&mut self, log: AttemptLog) {
        if let Some(last) = self.phases.last_mut() {
            last.attempts.extend(log.attempts.into_inner());
            last.connects.extend(log.connects.into_inner());
        }
        self.leave();
    }

    fn begin_phase(&mut self, phase: Phase, began: Instant) {
        if self.phases.len() < PHASES_MAX {
            let id = child_id(self.id, self.phases.len());
            self.phases.push(PhaseSpan { phase, id, began, ended: None, attempts: Vec::new(), connects: Vec::new() });
        }
    }

    fn end_phase(&mut self, now: Instant) {
        if let Some(last) = self.phases.last_mut() {
            last.ended.get_or_insert(now);
        }
    }

    /// The number of spans that are exported.
    fn count(&self) -> u64 {
        let below = |phase: &PhaseSpan| phase.attempts_below().len() + phase.connects_below().len();
        1 + self.phases.iter().map(|phase| 1 + below(phase) as u64).sum::<u64>()
    }

    /// Nanoseconds since 1970.
    fn unix_nanos(&self, at: Instant) -> u128 {
        let began = self.began_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (began + at.saturating_duration_since(self.began)).as_nanos()
    }
}

impl PhaseSpan {
    /// The attempts with spans of their own: a single one is the call itself.
    fn attempts_below(&self) -> &[AttemptSpan] {
        if self.attempts.len() > 1 { &self.attempts } else { &[] }
    }

    /// The connections with spans of their own: a single one belongs to the attempt.
    fn connects_below(&self) -> &[ConnectSpan] {
        if self.connects.len() > 1 { &self.connects } else { &[] }
    }
}

/// The id of a span below `parent`: a mixture of both numbers (SplitMix64), never zero.
fn child_id(parent: u64, index: usize) -> u64 {
    let mut mixed = parent.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)).max(1)
}

/// A request that has ended, with the facts of its spans.
#[derive(Debug)]
pub(crate) struct FinishedRequest {
    pub(crate) spans: Box<RequestSpans>,
    pub(crate) duration: Duration,
    pub(crate) method: Method,
    pub(crate) scheme: Scheme,
    pub(crate) authority: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) version: HttpVersion,
    pub(crate) status: StatusCode,
    pub(crate) client: IpAddr,
    pub(crate) user_agent: String,
    pub(crate) request_bytes: u64,
    pub(crate) bytes: u64,
    /// Name and path of the route; empty without one.
    pub(crate) route: String,
    pub(crate) route_path: String,
    pub(crate) cache: &'static str,
    /// The class of the failure; empty without one.
    pub(crate) failure: &'static str,
    /// Why the response was not completed; empty if it was.
    pub(crate) aborted: &'static str,
    /// The limit that denied the request.
    pub(crate) limit: String,
    pub(crate) upstream: Option<Arc<str>>,
    pub(crate) request_id: String,
}
