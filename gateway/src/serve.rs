//! Client connections: reads requests, runs the pipeline, writes answers. One task per connection, nothing between them.
//!
//! A panic in a request's handling costs that request (500) and its connection, never the thread. While draining, idle
//! connections close and busy ones after their answer.

mod h1;
mod h2;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use limiter::Verdict;

pub use h1::serve as serve_h1;
pub use h2::serve as serve_h2;

use crate::http::h1::Refusal;
use crate::http::message::{Method, Request, Response, StatusCode};
use crate::label;
use crate::log::Line;
use crate::metrics::{self, Counter, Counters, Histogram, Label};
use crate::pipeline::{self, Site, Worker};
use crate::respond::{CacheResult, Story};

impl Label for Refusal {
    const NAME: &'static str = "reason";
    const ALL: &'static [Self] = Refusal::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.reason()
    }
}

label! {
    /// Why a connection to a client ended other than in order.
    Cut, "cut", {
        ClientLeft = "client_left",
        WriteFailed = "write_failed",
        BodyFailed = "body_failed",
        Panic = "panic",
    }
}

static REFUSALS: LazyLock<Counters<Refusal>> = LazyLock::new(Counters::default);
static CUTS: LazyLock<Counters<Cut>> = LazyLock::new(Counters::default);
static UPGRADES: LazyLock<Counter> = LazyLock::new(Counter::default);
static BEGUN: LazyLock<Counter> = LazyLock::new(Counter::default);
static DURATION: LazyLock<Arc<Histogram>> = LazyLock::new(Arc::default);

/// Registers the metrics of this module.
pub fn expose() {
    metrics::expose_counters("tidegate_requests_refused", "Malformed or oversize requests.", &REFUSALS);
    metrics::expose_counters("tidegate_answers_cut", "Answers that could not be completed.", &CUTS);
    metrics::expose_counter_with("tidegate_requests", "Requests whose head was read.", |emit| emit(&[], BEGUN.get()));
    metrics::expose_counter_with("tidegate_upgrades", "Connections that switched protocols.", |emit| {
        emit(&[], UPGRADES.get());
    });
    metrics::expose_gauge_with("tidegate_requests_in_flight", "Requests being answered.", |emit| {
        emit(&[], requests_in_flight() as f64);
    });
    let help = "From a request's head to the last byte of its answer.";
    metrics::expose_histogram("http_server_request_duration_seconds", help, Arc::clone(&DURATION));
}

/// Requests being answered by this process.
pub fn requests_in_flight() -> u64 {
    // Two reads are not one moment; a request that ends between them must not show as an overflow.
    let ended = DURATION.count();
    BEGUN.get().saturating_sub(ended)
}

/// One thread's connections and what they share.
pub struct Hall {
    pub worker: Rc<Worker>,
    pub site: Arc<ArcSwap<Site>>,
    is_draining: Cell<bool>,
    wakers: RefCell<HashMap<u64, Waker>>,
    next: Cell<u64>,
}

impl Hall {
    pub fn new(worker: Worker, site: Arc<ArcSwap<Site>>) -> Rc<Self> {
        Rc::new(Hall {
            worker: Rc::new(worker),
            site,
            is_draining: Cell::new(false),
            wakers: RefCell::default(),
            next: Cell::new(0),
        })
    }

    /// Tells every connection of this thread to end when its request has.
    pub fn drain(&self) {
        self.is_draining.set(true);
        self.wakers.borrow().values().for_each(Waker::wake_by_ref);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.is_draining.get()
    }

    /// A place in the list of those to wake when draining begins.
    pub(crate) fn enrol(self: &Rc<Self>) -> Enrolment {
        let id = self.next.get();
        self.next.set(id + 1);
        Enrolment { hall: Rc::clone(self), id, is_listed: false }
    }
}

/// A connection's place in its hall.
pub(crate) struct Enrolment {
    hall: Rc<Hall>,
    id: u64,
    is_listed: bool,
}

impl Enrolment {
    /// Ready when the connection should end. A task's waker stays good for its life, so it is left once.
    pub(crate) fn poll_drain(&mut self, cx: &Context<'_>) -> Poll<()> {
        if !self.is_listed {
            self.is_listed = true;
            self.hall.wakers.borrow_mut().insert(self.id, cx.waker().clone());
        }
        if self.hall.is_draining() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Enrolment {
    fn drop(&mut self) {
        self.hall.wakers.borrow_mut().remove(&self.id);
    }
}

/// A request counted while it is answered.
struct InFlight {
    began: Instant,
    is_answered: bool,
}

impl InFlight {
    fn begin(began: Instant) -> Self {
        BEGUN.inc();
        InFlight { began, is_answered: false }
    }

    /// Counts it as answered, and says how long that took.
    fn end(mut self) -> Duration {
        self.count()
    }

    fn count(&mut self) -> Duration {
        if std::mem::replace(&mut self.is_answered, true) {
            return Duration::ZERO;
        }
        let took = self.began.elapsed();
        DURATION.observe(took);
        took
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.count();
    }
}

/// Turns a panic into `Err`.
fn caught<T>(act: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    catch_unwind(AssertUnwindSafe(act))
}

/// Polls a future and turns its panic into `Err`.
fn poll_caught<F: Future>(future: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<Result<F::Output, Box<dyn Any + Send>>> {
    match caught(|| future.poll(cx)) {
        Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(panic) => Poll::Ready(Err(panic)),
    }
}

/// A request with its answer, and what is to be told of them.
struct Exchanged<'a> {
    site: &'a Site,
    request: &'a Request,
    response: &'a Response,
    story: &'a Story,
}

/// Counts a refusal and writes the request's line into the access log.
fn tell(hall: &Hall, peer: IpAddr, exchanged: &Exchanged<'_>, bytes: u64, duration: Duration) {
    let Exchanged { site, request, response, story } = *exchanged;
    if let Some(refusal) = story.refused {
        REFUSALS.inc(refusal);
        tracing::debug!(reason = refusal.reason(), "a request was refused");
    }
    if !hall.worker.log.is_open() {
        return;
    }
    let trace = story.trace.map(|trace| trace.to_string()).unwrap_or_default();
    hall.worker.log.record(&Line {
        method: &request.method,
        scheme: request.scheme,
        authority: &request.authority,
        path_and_query: &request.target,
        version: request.version,
        status: response.status,
        bytes,
        duration,
        client: story.ip.unwrap_or(peer),
        route: site.routes.name(story.route),
        cache: story.cache.as_str(),
        degraded: story.degraded,
        limit: match &story.verdict {
            Verdict::Allowed(_) => "",
            Verdict::Denied(denial) => site.limits.name(denial.standing.rule),
        },
        refused: story.refused.map(Refusal::reason).unwrap_or_default(),
        upstream: story.upstream.as_deref().unwrap_or_default(),
        trace_id: &trace,
    });
}

/// The story of a refused request. Nothing in `request` was understood, so nothing of it is told: dashes, as is custom.
fn refused(refusal: Refusal, request: &mut Request) -> Story {
    request.clear();
    request.method = Method::from_bytes(b"-").unwrap_or_default();
    request.set_target("-");
    Story { refused: Some(refusal), cache: CacheResult::Error, must_close: true, ..Story::default() }
}

/// Tells of a request whose client left before its answer began.
fn tell_left(hall: &Hall, site: &Site, peer: IpAddr, request: &Request, duration: Duration) {
    CUTS.inc(Cut::ClientLeft);
    // 499 is nginx's name for it.
    let status = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
    let story = pipeline::abandoned(site, request);
    let response = Response::new(status);
    tell(hall, peer, &Exchanged { site, request, response: &response, story: &story }, 0, duration);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::pin::pin;

    #[tokio::test]
    async fn a_panic_is_an_error_and_not_the_end() {
        let mut future = pin!(async {
            tokio::task::yield_now().await;
            panic!("in a request");
        });
        let caught: Result<(), _> = poll_fn(|cx| poll_caught(future.as_mut(), cx)).await;
        assert!(caught.is_err());
    }
}
