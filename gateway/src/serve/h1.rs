//! One HTTP/1.1 connection, from its first request to its last answer.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use arc_swap::Cache;

use super::{CUTS, Cut, Enrolment, Exchanged, Hall, InFlight, UPGRADES, caught, poll_caught, tell};
use crate::http::Limits;
use crate::http::body::RequestBody;
use crate::http::h1::{self, Answer, ReadError, Refusal, SendError, Server, Waited};
use crate::http::io::Io;
use crate::http::message::{Request, Response, Scheme, StatusCode};
use crate::pipeline::{self, Arrival, Body, Passage, Site, Visitor};
use crate::respond::Story;
use crate::{degrade, hop};

/// What becomes of the connection after an exchange.
enum Next {
    /// The exchange ended then.
    Another(Instant),
    Close,
    Abort,
}

/// How long a connection may be quiet before it gives up all it holds for requests.
const QUIET: Duration = Duration::from_millis(250);

/// How a run of requests ended.
enum Run {
    /// Nothing came for a while.
    Quiet,
    Close,
    Abort,
}

/// Serves the connection of a peer, known by its canonical address, until it ends.
pub async fn serve(hall: Rc<Hall>, io: Io, ip: IpAddr, scheme: Scheme) {
    // A reload changes limits for new connections.
    let limits = Rc::new(hall.site.load().http.clone());
    let mut server = Server::new(io, &limits);
    let mut enrolment = hall.enrol();
    let mut patience = limits.header_timeout;
    loop {
        match wait(&mut server, &mut enrolment, Instant::now(), patience).await {
            Some(Waited::Bytes) => {}
            Some(Waited::Silent | Waited::Closed) | None => return server.close().await,
        }
        // What requests need is large: it lies apart, and only while there are some.
        let run = Box::pin(run(&hall, &mut server, &limits, ip, scheme, &mut enrolment));
        match run.await {
            Run::Quiet => {}
            Run::Close => return server.close().await,
            Run::Abort => return server.abort(),
        }
        server.rest();
        patience = limits.idle_timeout.saturating_sub(QUIET);
    }
}

/// Waits for bytes of the next request, from `now` on; `None` when draining begins.
async fn wait(server: &mut Server, enrolment: &mut Enrolment, now: Instant, patience: Duration) -> Option<Waited> {
    server.expect(now, patience);
    poll_fn(|cx| {
        // A request that has arrived is answered, draining or not.
        if let Poll::Ready(waited) = server.poll_wait(cx) {
            return Poll::Ready(Some(waited));
        }
        enrolment.poll_drain(cx).map(|()| None)
    })
    .await
}

/// What the requests of a connection are read into and answered from, one after the other.
struct Papers {
    request: Request,
    response: Response,
    story: Story,
    visitor: Visitor,
}

/// Serves requests until none has come for `QUIET`.
async fn run(
    hall: &Hall,
    server: &mut Server,
    limits: &Limits,
    ip: IpAddr,
    scheme: Scheme,
    enrolment: &mut Enrolment,
) -> Run {
    let mut site = Cache::new(Arc::clone(&hall.site));
    let mut papers = Papers {
        request: Request::default(),
        response: Response::new(StatusCode::OK),
        story: Story::default(),
        visitor: Visitor::default(),
    };
    loop {
        let read = if let Some(read) = server.read_at_once(limits, &mut papers.request) {
            Some(read)
        } else {
            let mut reading = pin!(server.read_request(limits, &mut papers.request));
            poll_fn(|cx| {
                if let Poll::Ready(read) = reading.as_mut().poll(cx) {
                    return Poll::Ready(Some(read));
                }
                enrolment.poll_drain(cx).map(|()| None)
            })
            .await
        };
        let ended = match read {
            Some(Ok(())) => {
                papers.request.scheme = scheme;
                match exchange(hall, site.load(), server, ip, &mut papers).await {
                    Next::Another(ended) if server.is_reusable().await => ended,
                    Next::Another(_) | Next::Close => return Run::Close,
                    Next::Abort => return Run::Abort,
                }
            }
            None | Some(Err(ReadError::Io(_))) => return Run::Close,
            Some(Err(ReadError::Refused(refusal))) => {
                refuse(hall, server, ip, refusal, &mut papers).await;
                return Run::Close;
            }
        };
        if server.is_idle() {
            let quiet = QUIET.min(limits.idle_timeout);
            match wait(server, enrolment, ended, quiet).await {
                Some(Waited::Bytes) => {}
                Some(Waited::Silent) => return Run::Quiet,
                Some(Waited::Closed) | None => return Run::Close,
            }
        }
    }
}

async fn refuse(hall: &Hall, server: &mut Server, ip: IpAddr, refusal: Refusal, papers: &mut Papers) {
    let Papers { request, response, .. } = papers;
    let story = super::refused(refusal, request);
    let mut body = Body::Bytes(degrade::write_refusal(refusal.status(), refusal.reason(), response));
    let (_, mut answer) = server.exchange();
    answer.close_after();
    if answer.send(response, &mut body).await.is_err() {
        CUTS.inc(Cut::WriteFailed);
    }
    let exchanged = Exchanged { site: &hall.site.load(), request, response, story: &story };
    tell(hall, ip, &exchanged, answer.body_sent(), Duration::ZERO);
}

/// One request and its answer.
async fn exchange(hall: &Hall, site: &Arc<Site>, server: &mut Server, ip: IpAddr, papers: &mut Papers) -> Next {
    let Papers { request, response, story, visitor } = papers;
    let arrival = Arrival { peer: ip, at: Instant::now() };
    let in_flight = InFlight::begin(arrival.at);
    let (mut incoming, mut answer) = server.exchange();
    let has_body = !incoming.is_done();
    let mut passage = Passage::new(&hall.worker, site, &arrival, story);
    let mut out = Body::EMPTY;
    let admitted = caught(|| passage.admit(request, response, visitor, &mut out));
    // A request without a body leaves its connection free to be watched: the client's leaving ends everything at once.
    let (body, watch) =
        if has_body { (RequestBody::H1(incoming), None) } else { (RequestBody::Empty, Some(&mut incoming)) };
    let mut watch = watch;
    let handled = match admitted {
        Err(panic) => Some(Err(panic)),
        Ok(false) => Some(Ok(())),
        Ok(true) => {
            let interim = request.interim.clone();
            let mut handling = pin!(passage.pass(visitor, request, body, response));
            let handled = poll_fn(|cx| {
                let polled = poll_caught(handling.as_mut(), cx);
                while let Some(mut early) = interim.take() {
                    hop::strip(&mut early.fields);
                    // A client that fails now fails again when its answer is sent.
                    let _sent_or_failed = answer.poll_interim(cx, &early);
                }
                if let Poll::Ready(handled) = polled {
                    return Poll::Ready(Some(handled));
                }
                watch.as_mut().map_or(Poll::Pending, |incoming| incoming.poll_gone(cx).map(|()| None))
            })
            .await;
            handled.map(|handled| handled.map(|body| out = body))
        }
    };
    match handled {
        Some(Ok(())) => {}
        Some(Err(_panic)) => {
            CUTS.inc(Cut::Panic);
            out = pipeline::panicked(site, request, response, story);
        }
        None => {
            super::tell_left(hall, site, ip, request, in_flight.end());
            return Next::Abort;
        }
    }
    // Draining may have begun while the request was answered.
    if story.must_close || hall.is_draining() {
        answer.close_after();
    }
    let mut sent = send(&mut answer, response, &mut out, watch.as_deref_mut()).await;
    if let Some(Err(SendError::Source(error))) = &sent
        && answer.take_back()
    {
        out = pipeline::broken(site, request, response, story, error);
        sent = send(&mut answer, response, &mut out, watch).await;
    }
    if let Some(Ok(())) = sent
        && response.status == StatusCode::SWITCHING_PROTOCOLS
    {
        UPGRADES.inc();
        let began = Instant::now();
        let took = in_flight.end();
        if let Some(mut tunnel) = out.into_tunnel() {
            let bytes = h1::relay(server, &mut tunnel.link, site.http.idle_timeout).await;
            tell(hall, ip, &Exchanged { site, request, response, story }, bytes, took + began.elapsed());
        }
        return Next::Close;
    }
    let took = in_flight.end();
    tell(hall, ip, &Exchanged { site, request, response, story }, answer.body_sent(), took);
    match after(sent) {
        Ok(()) if story.must_close => Next::Close,
        Ok(()) => Next::Another(arrival.at + took),
        Err(cut) => {
            CUTS.inc(cut);
            Next::Abort
        }
    }
}

/// Why an answer was not sent whole, if it was not.
fn after(sent: Option<Result<(), SendError>>) -> Result<(), Cut> {
    match sent {
        Some(Ok(())) => Ok(()),
        None => Err(Cut::ClientLeft),
        Some(Err(SendError::Peer(_))) => Err(Cut::WriteFailed),
        Some(Err(SendError::Source(error))) => {
            tracing::debug!(%error, "an answer was cut");
            Err(Cut::BodyFailed)
        }
    }
}

/// Sends an answer; `None` when the client leaves meanwhile.
async fn send(
    answer: &mut Answer<'_>,
    response: &mut Response,
    body: &mut Body<'_>,
    mut watch: Option<&mut h1::RequestBody<'_>>,
) -> Option<Result<(), SendError>> {
    if !body.written().is_some_and(|written| answer.begin_written(written)) {
        body.settle(response);
        answer.begin(response, body);
    }
    poll_fn(|cx| {
        if let Poll::Ready(sent) = answer.poll_send(cx, body) {
            return Poll::Ready(Some(sent));
        }
        watch.as_mut().map_or(Poll::Pending, |incoming| incoming.poll_gone(cx).map(|()| None))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn future<F: Future>(_: fn(Rc<Hall>, Io, IpAddr, Scheme) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn an_idle_connection_is_small() {
        // Its task; beside it there are a timer and a place in the runtime (430 bytes), and no buffer.
        let bytes = future(serve);
        assert!(bytes <= 1_250, "{bytes}");
    }
}
