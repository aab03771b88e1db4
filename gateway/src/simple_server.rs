//! A small HTTP/1.1 server for responses that are complete in memory: the connection loop of
//! the admin listener and the demo origin.
//!
//! Nothing is streamed. The number of connections is bounded; `HttpLimits` bounds heads and idle
//! time. Request bodies are ignored.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::http::body::{BodyError, BodySource};
use crate::http::fields::{Fields, KnownField};
use crate::http::h1::{DownstreamConnection, RequestReadError, WaitOutcome};
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, Request, Response, StatusCode};
use crate::http::transport::TransportStream;
use crate::tasks::{self, TaskKind};

/// Limits of a simple server: those of each HTTP message, and the number of connections.
pub(crate) struct SimpleServerLimits {
    pub(crate) http: HttpLimits,
    /// Maximum concurrent connections; more wait in the kernel's backlog.
    pub(crate) connections: usize,
}

/// A response with its complete body.
pub(crate) struct SimpleResponse {
    status: StatusCode,
    fields: Fields,
    body: Vec<u8>,
}

impl SimpleResponse {
    pub(crate) fn new(status: StatusCode, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let mut fields = Fields::default();
        fields.add(KnownField::ContentType, content_type);
        SimpleResponse { status, fields, body: body.into() }
    }

    /// A line of plain text.
    pub(crate) fn text(status: StatusCode, text: &str) -> Self {
        SimpleResponse::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub(crate) fn with(mut self, field: KnownField, value: &str) -> Self {
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

    /// Adds a field whose name is not a `KnownField`.
    pub(crate) fn with_named(mut self, name: &str, value: &str) -> Self {
        self.fields.push(name.as_bytes(), value.as_bytes());
        self
    }
}

/// How long accepting pauses after an error that would recur at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `listener` with `respond` until `stop` becomes true or its sender is dropped. Connections
/// that are open then are aborted. Needs a `LocalSet`. Cancel safe.
pub(crate) async fn serve<F>(
    listener: &TcpListener,
    limits: SimpleServerLimits,
    mut stop: watch::Receiver<bool>,
    respond: F,
) where
    F: AsyncFn(&Request, IpAddr) -> SimpleResponse + 'static,
{
    let connections_max = limits.connections;
    let (limits, respond) = (Rc::new(limits.http), Rc::new(respond));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < connections_max => match accepted {
                Ok((stream, peer)) => {
                    let (limits, respond) = (Rc::clone(&limits), Rc::clone(&respond));
                    let serve = async move { serve_connection(stream, peer, &limits, &*respond).await };
                    connections.spawn_local(tasks::track(TaskKind::SimpleConnection, serve));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }
}

/// Serves one connection until it ends.
async fn serve_connection<F>(stream: TcpStream, peer: SocketAddr, limits: &HttpLimits, respond: &F)
where
    F: AsyncFn(&Request, IpAddr) -> SimpleResponse,
{
    let peer = peer.ip().to_canonical();
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let mut connection = DownstreamConnection::new(TransportStream::plain(stream), limits);
    let mut request = Request::default();
    loop {
        if connection.wait_for_request(Instant::now(), limits.idle_timeout).await != WaitOutcome::Readable {
            return;
        }
        let response = match connection.read_request(limits, &mut request).await {
            Ok(()) => respond(&request, peer).await,
            Err(RequestReadError::Refused(refusal)) => {
                connection.exchange().1.close_connection_after();
                SimpleResponse::text(refusal.status(), refusal.reason())
            }
            Err(RequestReadError::Io(_)) => return,
        };
        if send(&mut connection, response).await.is_err() {
            return connection.abort();
        }
        if !connection.drain_for_reuse().await {
            return connection.close().await;
        }
    }
}

async fn send(connection: &mut DownstreamConnection, response: SimpleResponse) -> io::Result<()> {
    let SimpleResponse { status, mut fields, body } = response;
    fields.add(KnownField::Date, httpdate::fmt_http_date(SystemTime::now()));
    let length = if body.is_empty() { BodyLength::Empty } else { BodyLength::Known(body.len() as u64) };
    let head = Response { status, fields, length };
    let sent = connection.exchange().1.send(&head, &mut SliceBody(&body)).await;
    sent.map_err(|_peer_gone| io::ErrorKind::ConnectionAborted.into())
}

/// A body that is complete in memory.
struct SliceBody<'a>(&'a [u8]);

impl BodySource for SliceBody<'_> {
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
