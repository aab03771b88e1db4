//! One HTTP/1.1 connection, from its first request to its last answer.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use arc_swap::Cache;

use super::{CUTS, Cut, Hall, InFlight, ip_of, poll_caught, tell};
use crate::degrade;
use crate::http::body::{RequestBody, Source};
use crate::http::h1::{ReadError, Refusal, SendError, Server};
use crate::http::io::Io;
use crate::http::message::{Request, Response, Scheme, StatusCode};
use crate::pipeline::{self, Body, Site};

/// What becomes of the connection after an exchange.
enum Next {
    Another,
    Close,
    Abort,
}

/// Serves a connection until it ends.
pub async fn serve(hall: Rc<Hall>, io: Io, peer: SocketAddr, scheme: Scheme) {
    let mut site = Cache::new(Arc::clone(&hall.site));
    // A reload changes limits for new connections.
    let limits = site.load().http.clone();
    let mut server = Server::new(io, &limits);
    let (mut request, mut response) = (Request::default(), Response::new(StatusCode::OK));
    let mut enrolment = hall.enrol();
    loop {
        let read = {
            let mut reading = pin!(server.read_request(&limits, &mut request));
            poll_fn(|cx| {
                if let Poll::Ready(read) = reading.as_mut().poll(cx) {
                    return Poll::Ready(Some(read));
                }
                enrolment.poll_drain(cx).map(|()| None)
            })
            .await
        };
        match read {
            Some(Ok(())) => {}
            None | Some(Err(ReadError::Idle | ReadError::Io(_))) => return server.close().await,
            Some(Err(ReadError::Refused(refusal))) => {
                refuse(&hall, &mut server, peer, refusal, &mut request, &mut response).await;
                return server.close().await;
            }
        }
        request.scheme = scheme;
        let next = exchange(&hall, site.load(), &mut server, peer, &mut request, &mut response).await;
        match next {
            Next::Another if server.is_reusable().await => {}
            Next::Another | Next::Close => return server.close().await,
            Next::Abort => return server.abort(),
        }
    }
}

async fn refuse(
    hall: &Hall,
    server: &mut Server,
    peer: SocketAddr,
    refusal: Refusal,
    request: &mut Request,
    response: &mut Response,
) {
    let story = super::refused(refusal, request);
    let mut body = Body::Bytes(degrade::write_refusal(refusal.status(), refusal.reason(), response));
    let (_, mut answer) = server.exchange();
    answer.close_after();
    if answer.send(response, &mut body).await.is_err() {
        CUTS.inc(Cut::WriteFailed);
    }
    tell(hall, ip_of(peer), request, response, &story, answer.body_sent(), Duration::ZERO);
}

/// One request and its answer.
async fn exchange(
    hall: &Hall,
    site: &Arc<Site>,
    server: &mut Server,
    peer: SocketAddr,
    request: &mut Request,
    response: &mut Response,
) -> Next {
    let in_flight = InFlight::begin();
    let ip = ip_of(peer);
    let (mut incoming, mut answer) = server.exchange();
    let has_body = !incoming.is_done();
    // A request without a body leaves its connection free to be watched: the client's leaving ends everything at once.
    let (body, watch) =
        if has_body { (RequestBody::H1(incoming), None) } else { (RequestBody::Empty, Some(&mut incoming)) };
    let mut watch = watch;
    let handled = {
        let mut handling = pin!(pipeline::handle(&hall.worker, site, ip, request, body, response));
        poll_fn(|cx| {
            if let Poll::Ready(handled) = poll_caught(handling.as_mut(), cx) {
                return Poll::Ready(Some(handled));
            }
            watch.as_mut().map_or(Poll::Pending, |incoming| incoming.poll_gone(cx).map(|()| None))
        })
        .await
    };
    let (mut out, story) = match handled {
        Some(Ok(handled)) => handled,
        Some(Err(_panic)) => {
            CUTS.inc(Cut::Panic);
            pipeline::panicked(site, request, response)
        }
        None => {
            super::tell_left(hall, site, ip, request, in_flight.elapsed());
            return Next::Abort;
        }
    };
    // Draining may have begun while the request was answered.
    if story.must_close || hall.is_draining() {
        answer.close_after();
    }
    let sent = {
        let mut sending = pin!(answer.send(response, &mut out as &mut dyn Source));
        poll_fn(|cx| {
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(Some(sent));
            }
            watch.as_mut().map_or(Poll::Pending, |incoming| incoming.poll_gone(cx).map(|()| None))
        })
        .await
    };
    tell(hall, ip, request, response, &story, answer.body_sent(), in_flight.elapsed());
    match sent {
        Some(Ok(())) if story.must_close => Next::Close,
        Some(Ok(())) => Next::Another,
        None => {
            CUTS.inc(Cut::ClientLeft);
            Next::Abort
        }
        Some(Err(SendError::Peer(_))) => {
            CUTS.inc(Cut::WriteFailed);
            Next::Abort
        }
        Some(Err(SendError::Source(error))) => {
            CUTS.inc(Cut::BodyFailed);
            tracing::debug!(%error, "an answer was cut");
            Next::Abort
        }
    }
}
