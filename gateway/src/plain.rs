//! Small whole answers over HTTP/1.1: the connection loop that the admin address and the demo's origin share.
//!
//! Nothing here streams: an answer is made in memory and written. Connections are bounded in number, heads and silence by
//! `Limits`; a request's body is not looked at.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::http::body::{BodyError, Source};
use crate::http::fields::{Fields, Known};
use crate::http::h1::{ReadError, Server, Waited};
use crate::http::io::Io;
use crate::http::limits::Limits;
use crate::http::message::{Length, Request, Response, StatusCode};

/// What the service allows.
pub(crate) struct Bounds {
    pub(crate) http: Limits,
    /// Connections at once; more wait in the kernel's backlog.
    pub(crate) connections: usize,
}

/// An answer with its whole body.
pub(crate) struct Reply {
    status: StatusCode,
    fields: Fields,
    body: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(status: StatusCode, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let mut fields = Fields::default();
        fields.add(Known::ContentType, content_type);
        Reply { status, fields, body: body.into() }
    }

    /// A line of plain text.
    pub(crate) fn text(status: StatusCode, text: &str) -> Self {
        Reply::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub(crate) fn with(mut self, field: Known, value: &str) -> Self {
        self.fields.add(field, value);
        self
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    #[cfg(test)]
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// A field the gateway has no use for itself.
    pub(crate) fn with_named(mut self, name: &str, value: &str) -> Self {
        self.fields.push(name.as_bytes(), value.as_bytes());
        self
    }
}

/// How long accepting rests after a failure that would come again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves `listener` with `answer` until `stop` turns true or its sender is gone; what runs then is cut.
/// Needs a `LocalSet`. Cancel safe.
pub(crate) async fn serve<A>(listener: TcpListener, bounds: Bounds, mut stop: watch::Receiver<bool>, answer: A)
where
    A: AsyncFn(&Request, IpAddr) -> Reply + 'static,
{
    let (limits, answer) = (Rc::new(bounds.http), Rc::new(answer));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < bounds.connections => match accepted {
                Ok((stream, peer)) => {
                    let (limits, answer) = (Rc::clone(&limits), Rc::clone(&answer));
                    connections.spawn_local(async move { converse(stream, peer, &limits, &*answer).await });
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}

/// One connection, from its first request to its last.
async fn converse<A>(stream: TcpStream, peer: SocketAddr, limits: &Limits, answer: &A)
where
    A: AsyncFn(&Request, IpAddr) -> Reply,
{
    let peer = peer.ip().to_canonical();
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let mut server = Server::new(Io::plain(stream), limits);
    let mut request = Request::default();
    loop {
        if server.wait(Instant::now(), limits.idle_timeout).await != Waited::Bytes {
            return;
        }
        let reply = match server.read_request(limits, &mut request).await {
            Ok(()) => answer(&request, peer).await,
            Err(ReadError::Refused(refusal)) => {
                server.exchange().1.close_after();
                Reply::text(refusal.status(), refusal.reason())
            }
            Err(ReadError::Io(_)) => return,
        };
        if send(&mut server, reply).await.is_err() {
            return server.abort();
        }
        if !server.is_reusable().await {
            return server.close().await;
        }
    }
}

async fn send(server: &mut Server, reply: Reply) -> io::Result<()> {
    let Reply { status, mut fields, body } = reply;
    fields.add(Known::Date, httpdate::fmt_http_date(SystemTime::now()));
    let length = if body.is_empty() { Length::Empty } else { Length::Known(body.len() as u64) };
    let response = Response { status, fields, length };
    let sent = server.exchange().1.send(&response, &mut Whole(&body)).await;
    sent.map_err(|_peer_left| io::ErrorKind::ConnectionAborted.into())
}

/// A body that is all there.
struct Whole<'a>(&'a [u8]);

impl Source for Whole<'_> {
    fn poll_fill(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        self.0
    }

    fn consume(&mut self, count: usize) {
        self.0 = &self.0[count..];
    }
}
