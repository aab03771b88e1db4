//! A small HTTP/1.1 server: the connection loop of the admin listener and the demo origin.
//!
//! A response is complete in memory, or a stream of events. Request bodies are ignored.
//! `HttpLimits` bounds heads and idle time: the first request of a connection has to begin within
//! the header timeout, and later ones within the idle timeout.
//!
//! The number of connections is bounded. A new connection to a full server replaces the one that
//! the server has waited for the longest: a silent one, an idle one, one with a slow head, or one
//! whose client does not read. If all are being answered, a few more are accepted for probes only.
//! Invariant: a probe is answered however many connections are silent, slow or busy.

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinSet, yield_now};

use crate::http::body::{BodyError, BodySource};
use crate::http::fields::{Fields, KnownField};
use crate::http::h1::{DownstreamConnection, RequestReadError, WaitOutcome};
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, Request, Response, StatusCode};
use crate::http::transport::TransportStream;
use crate::metrics::{self, Counter};
use crate::tasks::{self, TaskKind, TaskWait};

/// Limits of a simple server: those of each HTTP message, and the number of connections.
pub(crate) struct SimpleServerLimits {
    pub(crate) http: HttpLimits,
    /// Maximum concurrent connections for all requests.
    pub(crate) connections: usize,
    /// Maximum further connections, for probes only.
    pub(crate) probe_connections: usize,
    /// Whether a request is a probe.
    pub(crate) is_probe: fn(&Request) -> bool,
}

static REPLACED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Exposes `tidegate_admin_connections_replaced_total`.
pub(crate) fn expose() {
    metrics::expose_counter_with(
        "tidegate_admin_connections_replaced",
        "Connections of the admin address that were closed in favour of a new one, because there were too many.",
        |emit| emit(&[], REPLACED.get()),
    );
}

/// A response.
pub(crate) struct SimpleResponse {
    status: StatusCode,
    fields: Fields,
    body: SimpleBody,
}

/// The body of a response.
enum SimpleBody {
    Complete(Vec<u8>),
    /// A source that is mostly pending. The connection may be replaced while its client does not
    /// read.
    Stream(Box<dyn BodySource>),
}

impl SimpleResponse {
    pub(crate) fn new(status: StatusCode, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let mut fields = Fields::default();
        fields.add(KnownField::ContentType, content_type);
        SimpleResponse { status, fields, body: SimpleBody::Complete(body.into()) }
    }

    /// A response whose body is not complete yet.
    pub(crate) fn stream(content_type: &str, body: Box<dyn BodySource>) -> Self {
        let response = SimpleResponse::new(StatusCode::OK, content_type, Vec::new());
        SimpleResponse { body: SimpleBody::Stream(body), ..response }
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
        match &self.body {
            SimpleBody::Complete(body) => body,
            SimpleBody::Stream(source) => source.data(),
        }
    }

    /// Adds a field whose name is not a `KnownField`.
    pub(crate) fn with_named(mut self, name: &str, value: &str) -> Self {
        self.fields.push(name.as_bytes(), value.as_bytes());
        self
    }
}

/// How long accepting pauses after an error that would recur at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client that has not read its response for this long may be replaced.
const UNREAD_AFTER: Duration = Duration::from_secs(2);

/// The stages of a simple server. They only move forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SimpleServerStage {
    Serving,
    /// Another process accepts from the listening socket. Streams end, and every other connection
    /// with its next response: its client finds the other process.
    HandedOver,
    Stopped,
}

/// Serves `listener` with `respond` until the stage is `Stopped` or its sender is dropped.
/// Connections that are open then are aborted. Needs a `LocalSet`. Cancel safe.
pub(crate) async fn serve<F>(
    listener: &TcpListener,
    limits: SimpleServerLimits,
    mut stage: watch::Receiver<SimpleServerStage>,
    respond: F,
) where
    F: AsyncFn(&Request, IpAddr) -> SimpleResponse + 'static,
{
    let (limits, respond) = (Rc::new(limits), Rc::new(respond));
    let mut open = OpenConnections::default();
    let mut is_handed_over = false;
    loop {
        let next = if is_handed_over { SimpleServerStage::Stopped } else { SimpleServerStage::HandedOver };
        tokio::select! {
            biased;
            reached = stage.wait_for(|stage| *stage >= next) => match reached.map(|stage| *stage) {
                Ok(SimpleServerStage::HandedOver) => {
                    is_handed_over = true;
                    open.hand_over();
                }
                _ => return,
            },
            Some(ended) = open.tasks.join_next_with_id() => {
                open.remove(ended.map_or_else(|error| error.id(), |(id, _)| id));
            }
            accepted = listener.accept(), if !is_handed_over && open.has_place(&limits) => match accepted {
                Ok((stream, peer)) => {
                    let progress = open.make_place(&limits);
                    let (limits, respond, shared) = (Rc::clone(&limits), Rc::clone(&respond), Rc::clone(&progress));
                    let serve = async move { serve_connection((stream, peer), &limits, &shared, &*respond).await };
                    open.spawn(progress, serve);
                    // A flood of connections must not replace one before it was polled.
                    yield_now().await;
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }
}

/// The phase of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnectionPhase {
    /// The server waits for a request, or for the client to close.
    Waiting,
    /// The response is computed.
    Responding,
    /// The response is written.
    Sending,
}

/// The phase of a connection with its begin, and whether the connection is for probes only.
struct ConnectionProgress {
    phase: Cell<ConnectionPhase>,
    since: Cell<Instant>,
    is_for_probes: bool,
    /// Its body goes on until the client closes.
    is_stream: Cell<bool>,
    /// It closes after its next response.
    is_last: Cell<bool>,
}

impl ConnectionProgress {
    fn new(is_for_probes: bool) -> Rc<Self> {
        let since = Cell::new(Instant::now());
        let phase = Cell::new(ConnectionPhase::Waiting);
        Rc::new(ConnectionProgress {
            phase,
            since,
            is_for_probes,
            is_stream: Cell::default(),
            is_last: Cell::default(),
        })
    }

    fn enter(&self, phase: ConnectionPhase) {
        self.phase.set(phase);
        self.since.set(Instant::now());
    }

    /// Whether a new connection may replace this one. The room for probes never waits for a client.
    fn is_replaceable(&self, now: Instant) -> bool {
        match self.phase.get() {
            ConnectionPhase::Waiting => true,
            ConnectionPhase::Responding => self.is_for_probes,
            ConnectionPhase::Sending => self.is_for_probes || now.duration_since(self.since.get()) >= UNREAD_AFTER,
        }
    }
}

/// The open connections and their tasks.
#[derive(Default)]
struct OpenConnections {
    tasks: JoinSet<Option<()>>,
    /// Without the connections that were replaced; their tasks end at once.
    by_task: HashMap<Id, (Rc<ConnectionProgress>, AbortHandle)>,
}

impl OpenConnections {
    fn count(&self, is_for_probes: bool) -> usize {
        self.by_task.values().filter(|(open, _)| open.is_for_probes == is_for_probes).count()
    }

    /// The connection that a new one replaces: the one that has waited for the longest.
    fn replaceable(&self, is_for_probes: bool) -> Option<Id> {
        let now = Instant::now();
        let candidates = self.by_task.iter().filter(|(_, (open, _))| open.is_for_probes == is_for_probes);
        let candidates = candidates.filter(|(_, (open, _))| open.is_replaceable(now));
        candidates.min_by_key(|(_, (open, _))| open.since.get()).map(|(id, _)| *id)
    }

    /// Whether a connection may be accepted. More wait in the kernel's backlog.
    fn has_place(&self, limits: &SimpleServerLimits) -> bool {
        self.count(false) < limits.connections || limits.probe_connections > 0 || self.replaceable(false).is_some()
    }

    /// Makes a place for a new connection.
    fn make_place(&mut self, limits: &SimpleServerLimits) -> Rc<ConnectionProgress> {
        if self.count(false) < limits.connections {
            return ConnectionProgress::new(false);
        }
        let replaced = self.replaceable(false);
        let is_for_probes = replaced.is_none() && limits.probe_connections > 0;
        let is_full = is_for_probes && self.count(true) >= limits.probe_connections;
        if let Some(id) = if is_full { self.replaceable(true) } else { replaced } {
            REPLACED.inc();
            if let Some((_, task)) = self.by_task.remove(&id) {
                task.abort();
            }
        }
        ConnectionProgress::new(is_for_probes)
    }

    fn hand_over(&self) {
        for (progress, task) in self.by_task.values() {
            progress.is_last.set(true);
            if progress.is_stream.get() {
                task.abort();
            }
        }
    }

    fn spawn(&mut self, progress: Rc<ConnectionProgress>, serve: impl Future<Output = ()> + 'static) {
        let task = self.tasks.spawn_local(tasks::track(TaskKind::SimpleConnection, serve));
        self.by_task.insert(task.id(), (progress, task));
    }

    fn remove(&mut self, id: Id) {
        // A replaced connection is not listed any more.
        self.by_task.remove(&id);
    }
}

/// Serves one connection until it ends.
async fn serve_connection<F>(
    (stream, peer): (TcpStream, SocketAddr),
    limits: &SimpleServerLimits,
    progress: &ConnectionProgress,
    respond: &F,
) where
    F: AsyncFn(&Request, IpAddr) -> SimpleResponse,
{
    let peer = peer.ip().to_canonical();
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let http = &limits.http;
    let mut connection = DownstreamConnection::new(TransportStream::plain(stream), http);
    let mut request = Request::default();
    // Silence before the first request is bounded as a slow head is.
    let mut silence = http.header_timeout;
    loop {
        tasks::set_waiting_for(TaskWait::ClientHead);
        if connection.wait_for_request(Instant::now(), silence).await != WaitOutcome::Readable {
            return;
        }
        silence = http.idle_timeout;
        let read = connection.read_request(http, &mut request).await;
        progress.enter(ConnectionPhase::Responding);
        tasks::set_waiting_for(TaskWait::Unnamed);
        let response = match read {
            Ok(()) if progress.is_for_probes && !(limits.is_probe)(&request) => {
                connection.exchange().1.close_connection_after();
                SimpleResponse::text(StatusCode::SERVICE_UNAVAILABLE, "too many connections")
            }
            Ok(()) => respond(&request, peer).await,
            Err(RequestReadError::Refused(refusal)) => {
                connection.exchange().1.close_connection_after();
                SimpleResponse::text(refusal.status(), refusal.reason())
            }
            Err(RequestReadError::Io(_)) => return,
        };
        if progress.is_for_probes || progress.is_last.get() {
            connection.exchange().1.close_connection_after();
        }
        progress.enter(ConnectionPhase::Sending);
        if send(&mut connection, response, progress).await.is_err() {
            return connection.abort();
        }
        progress.enter(ConnectionPhase::Waiting);
        if !connection.drain_for_reuse().await {
            return connection.close().await;
        }
    }
}

async fn send(
    connection: &mut DownstreamConnection,
    response: SimpleResponse,
    progress: &ConnectionProgress,
) -> io::Result<()> {
    let SimpleResponse { status, mut fields, body } = response;
    fields.add(KnownField::Date, httpdate::fmt_http_date(SystemTime::now()));
    let length = match &body {
        SimpleBody::Stream(_) => BodyLength::Streamed,
        SimpleBody::Complete(body) if body.is_empty() => BodyLength::Empty,
        SimpleBody::Complete(body) => BodyLength::Known(body.len() as u64),
    };
    let head = Response { status, fields, length, ..Response::default() };
    let sent = match body {
        SimpleBody::Complete(body) => connection.exchange().1.send(&head, &mut SliceBody(&body)).await,
        SimpleBody::Stream(source) => {
            progress.is_stream.set(true);
            connection.exchange().1.send(&head, &mut WatchedStream { source, progress }).await
        }
    };
    sent.map_err(|_peer_gone| io::ErrorKind::ConnectionAborted.into())
}

/// A stream that notes when its client reads.
struct WatchedStream<'a> {
    source: Box<dyn BodySource>,
    progress: &'a ConnectionProgress,
}

impl BodySource for WatchedStream<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let filled = self.source.poll_fill(cx);
        if filled.is_ready() {
            self.progress.enter(ConnectionPhase::Sending);
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.source.data()
    }

    fn consume(&mut self, count: usize) {
        self.source.consume(count);
        self.progress.enter(ConnectionPhase::Sending);
    }
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::task::LocalSet;
    use tokio::time::timeout;

    use super::*;

    const STEP_TIMEOUT: Duration = Duration::from_secs(10);

    /// Runs `client` against a server with room for two connections and two probes, which answers
    /// `/probe` and `/fast`, and never answers others.
    fn run(header_timeout: Duration, client: impl AsyncFnOnce(SocketAddr)) {
        run_with_stage(header_timeout, async |address, _| client(address).await);
    }

    /// As `run`; the client changes the stage.
    fn run_with_stage(
        header_timeout: Duration,
        client: impl AsyncFnOnce(SocketAddr, watch::Sender<SimpleServerStage>),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        LocalSet::new().block_on(&runtime, async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let address = listener.local_addr().expect("bound");
            let limits = SimpleServerLimits {
                http: HttpLimits { header_timeout, ..HttpLimits::default() },
                connections: 2,
                probe_connections: 2,
                is_probe: |request| request.path() == "/probe",
            };
            let (stage, followed_stage) = watch::channel(SimpleServerStage::Serving);
            let respond = async |request: &Request, _: IpAddr| match request.path() {
                "/probe" | "/fast" => SimpleResponse::text(StatusCode::OK, "here"),
                "/stream" => SimpleResponse::stream("text/plain", Box::new(Silent)),
                _ => pending().await,
            };
            let serve = serve(&listener, limits, followed_stage, respond);
            tokio::select! {
                () = serve => unreachable!("it is not stopped"),
                () = client(address, stage) => {}
            }
        });
    }

    /// A body that does not end.
    struct Silent;

    impl BodySource for Silent {
        fn poll_fill(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
            Poll::Pending
        }

        fn data(&self) -> &[u8] {
            b""
        }

        fn consume(&mut self, _: usize) {}
    }

    #[test]
    fn handed_over_connections_end_with_their_next_response() {
        run_with_stage(STEP_TIMEOUT, async |address, stage| {
            let mut idle = send(address, &get("/fast")).await;
            let mut byte = [0];
            idle.read_exact(&mut byte).await.expect("a response");
            let mut stream = send(address, &get("/stream")).await;
            stream.read_exact(&mut byte).await.expect("a head");
            stage.send_replace(SimpleServerStage::HandedOver);
            read_to_end(stream).await;
            idle.write_all(get("/fast").as_bytes()).await.expect("open");
            let text = read_to_end(idle).await;
            assert_eq!((text.matches(" 200 OK").count(), text.matches("Connection: close").count()), (2, 1), "{text}");
            // Another process accepts.
            let mut waiting = send(address, &get("/fast")).await;
            assert!(timeout(Duration::from_millis(200), waiting.read(&mut byte)).await.is_err());
        });
    }

    async fn send(address: SocketAddr, bytes: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("listening");
        stream.write_all(bytes.as_bytes()).await.expect("open");
        stream
    }

    /// Reads the responses until the server closes the connection.
    async fn read_to_end(mut stream: TcpStream) -> String {
        let mut text = Vec::new();
        let read = timeout(STEP_TIMEOUT, stream.read_to_end(&mut text)).await.expect("an end in time");
        // A replaced connection may be reset.
        let _reset = read;
        String::from_utf8(text).expect("text")
    }

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")
    }

    #[test]
    fn probes_have_room_while_all_connections_are_busy() {
        run(STEP_TIMEOUT, async |address| {
            let busy = [send(address, &get("/slow")).await, send(address, &get("/slow")).await];
            for _ in 0..5 {
                let text = read_to_end(send(address, &get("/probe")).await).await;
                assert!(text.starts_with("HTTP/1.1 200 ") && text.contains("Connection: close"), "{text}");
                let text = read_to_end(send(address, &get("/fast")).await).await;
                assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("Connection: close"), "{text}");
            }
            // Silent connections in the room for probes give way, too.
            let silent = [send(address, "").await, send(address, "G").await, send(address, "").await];
            let text = read_to_end(send(address, &get("/probe")).await).await;
            assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
            drop((silent, busy));
        });
    }

    #[test]
    fn waiting_connection_is_replaced_before_a_busy_one() {
        run(STEP_TIMEOUT, async |address| {
            let mut busy = send(address, &get("/slow")).await;
            let idle = send(address, "").await;
            let text =
                read_to_end(send(address, &get("/fast").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")).await);
            assert!(text.await.starts_with("HTTP/1.1 200 "));
            assert_eq!(read_to_end(idle).await, "");
            let mut byte = [0];
            let read = timeout(Duration::from_millis(50), busy.read(&mut byte)).await;
            assert!(read.is_err(), "the busy connection is open: {read:?}");
        });
    }

    #[test]
    fn silence_ends_at_the_header_timeout() {
        run(Duration::from_millis(100), async |address| {
            assert_eq!(read_to_end(send(address, "").await).await, "");
            let text = read_to_end(send(address, "GET").await).await;
            assert!(text.starts_with("HTTP/1.1 408 "), "{text}");
            // Later requests have the idle timeout.
            let mut stream = send(address, &get("/fast")).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            stream
                .write_all(get("/fast").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").as_bytes())
                .await
                .expect("open");
            assert_eq!(read_to_end(stream).await.matches("200 OK").count(), 2);
        });
    }
}
