//! One HTTP/2 connection: hyper frames, the pipeline answers. Streams of a connection run as tasks of the same thread.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::{CUTS, Cut, Exchanged, Hall, InFlight, poll_caught, tell};
use crate::degrade;
use crate::http::alarm::Alarm;
use crate::http::body::{BodyError, RequestBody, Source};
use crate::http::h2::{self, Outgoing};
use crate::http::message::{Length, Request, Response, Scheme, StatusCode};
use crate::pipeline::{self, Arrival, Body, Passage, Site, Visitor};
use crate::respond::Story;

/// Streams at once on one connection; the usual choice of servers.
const STREAMS_MAX: u32 = 250;
/// Resets a client may provoke before its connection ends (CVE-2023-44487).
const RESETS_MAX: usize = 50;
/// A silent peer is asked for a sign of life this often, and given this long.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local
where
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// Streams under way on a connection, and when the last one ended.
struct Activity {
    streams: Cell<usize>,
    quiet_since: Cell<Instant>,
}

struct Stream(Rc<Activity>);

impl Stream {
    fn begin(activity: &Rc<Activity>) -> Self {
        activity.streams.set(activity.streams.get() + 1);
        Stream(Rc::clone(activity))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.quiet_since.set(Instant::now());
    }
}

/// Serves the connection of a peer, known by its canonical address, until it ends.
pub async fn serve<T>(hall: Rc<Hall>, io: T, ip: IpAddr, scheme: Scheme)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let limits = hall.site.load().http.clone();
    let activity = Rc::new(Activity { streams: Cell::new(0), quiet_since: Cell::new(Instant::now()) });
    let (service_hall, service_activity) = (Rc::clone(&hall), Rc::clone(&activity));
    let service = service_fn(move |request| {
        let stream = Stream::begin(&service_activity);
        let hall = Rc::clone(&service_hall);
        async move { Ok::<_, Infallible>(answer(hall, ip, scheme, request, stream).await) }
    });
    let connection = hyper::server::conn::http2::Builder::new(Local)
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESETS_MAX)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_PATIENCE)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let mut enrolment = hall.enrol();
    let mut alarm = Alarm::after(limits.idle_timeout);
    let mut is_ending = false;
    let ended = poll_fn(|cx| {
        if !is_ending
            && (enrolment.poll_drain(cx).is_ready() || poll_quiet(&activity, &mut alarm, limits.idle_timeout, cx))
        {
            is_ending = true;
            connection.as_mut().graceful_shutdown();
            alarm.set(Instant::now() + limits.idle_timeout);
        }
        if is_ending && activity.streams.get() == 0 && alarm.poll(cx).is_ready() {
            // The client was told to go and did not.
            return Poll::Ready(Ok(()));
        }
        connection.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP/2 connection failed");
    }
}

/// Whether the connection has had no stream for the idle timeout.
fn poll_quiet(activity: &Activity, alarm: &mut Alarm, idle: Duration, cx: &mut Context<'_>) -> bool {
    let base = if activity.streams.get() > 0 { Instant::now() } else { activity.quiet_since.get() };
    alarm.set(base + idle);
    alarm.poll(cx).is_ready()
}

async fn answer(
    hall: Rc<Hall>,
    ip: IpAddr,
    scheme: Scheme,
    incoming: http::Request<Incoming>,
    stream: Stream,
) -> http::Response<Outgoing<Told>> {
    let site: Arc<Site> = hall.site.load_full();
    let arrival = Arrival { peer: ip, at: Instant::now().into_std() };
    let in_flight = Some(InFlight::begin(arrival.at));
    let mut asked = Asked { hall, site, arrival, request: Request::default(), in_flight, _stream: stream };
    let mut response = Response::new(StatusCode::OK);
    let (parts, body) = incoming.into_parts();
    let (out, story) = match h2::read_head(&parts, &body, &asked.site.http, &mut asked.request) {
        Err(refusal) => {
            let story = super::refused(refusal, &mut asked.request);
            (Body::Bytes(degrade::write_refusal(refusal.status(), refusal.reason(), &mut response)), story)
        }
        Ok(()) => {
            asked.request.scheme = scheme;
            let body = match asked.request.length {
                Length::Empty => RequestBody::Empty,
                _ => RequestBody::H2(Box::new(h2::RequestBody::new(body, &asked.site.http))),
            };
            let mut story = Story::default();
            (asked.run(body, &mut response, &mut story).await, story)
        }
    };
    let length = if asked.request.method == http::Method::HEAD || response.status == StatusCode::NOT_MODIFIED {
        Length::Empty
    } else {
        response.length
    };
    let expected = match length {
        Length::Empty => Some(0),
        Length::Known(length) => Some(length),
        Length::Streamed | Length::UntilClose => None,
    };
    let told = Told { asked, response: response.clone(), story, bytes: 0, expected, end: End::Open, out };
    let body = Outgoing::new(told, length);
    h2::write_head(&response, body).unwrap_or_else(|error| {
        tracing::warn!(%error, "an answer's head does not fit HTTP/2");
        let mut plain = http::Response::new(Outgoing::nothing());
        *plain.status_mut() = StatusCode::BAD_GATEWAY;
        plain
    })
}

/// A request under way. Where it is dropped before its answer began, its client has left.
struct Asked {
    hall: Rc<Hall>,
    site: Arc<Site>,
    arrival: Arrival,
    request: Request,
    /// Taken when the answer begins.
    in_flight: Option<InFlight>,
    _stream: Stream,
}

impl Asked {
    async fn run(&mut self, body: RequestBody<'static>, response: &mut Response, story: &mut Story) -> Body<'static> {
        let handled = {
            let Asked { hall, site, arrival, request, .. } = self;
            let mut passage = Passage::new(&hall.worker, site, arrival, story);
            let mut handling = pin!(async {
                let (mut visitor, mut out) = (Visitor::default(), Body::EMPTY);
                if passage.admit(request, response, &mut visitor, &mut out) {
                    out = passage.pass(&visitor, request, body, response).await;
                }
                out
            });
            poll_fn(|cx| poll_caught(handling.as_mut(), cx)).await
        };
        let mut body = handled.unwrap_or_else(|_panic| {
            CUTS.inc(Cut::Panic);
            pipeline::panicked(&self.site, &self.request, response, story)
        });
        body.settle(response);
        body
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(in_flight) = self.in_flight.take() {
            super::tell_left(&self.hall, &self.site, self.arrival.peer, &self.request, in_flight.end());
        }
    }
}

/// How far an answer has come.
enum End {
    Open,
    Whole,
    /// Its body failed.
    Failed,
}

/// An answer's body that tells its story when it is over, however it ends.
struct Told {
    asked: Asked,
    response: Response,
    story: Story,
    bytes: u64,
    /// Bytes of the whole body, where that is known.
    expected: Option<u64>,
    end: End,
    out: Body<'static>,
}

impl Source for Told {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let filled = self.out.poll_fill(cx);
        match &filled {
            Poll::Ready(Ok(())) if self.out.data().is_empty() => self.end = End::Whole,
            Poll::Ready(Err(_)) => self.end = End::Failed,
            _ => {}
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.out.data()
    }

    fn consume(&mut self, count: usize) {
        self.bytes += count as u64;
        self.out.consume(count);
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let Some(in_flight) = self.asked.in_flight.take() else { return };
        match self.end {
            End::Failed => CUTS.inc(Cut::BodyFailed),
            End::Open if self.expected != Some(self.bytes) => CUTS.inc(Cut::ClientLeft),
            End::Open | End::Whole => {}
        }
        let Asked { hall, site, arrival, request, .. } = &self.asked;
        let exchanged = Exchanged { site, request, response: &self.response, story: &self.story };
        tell(hall, arrival.peer, &exchanged, self.bytes, in_flight.end());
    }
}
