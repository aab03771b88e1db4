//! One HTTP/2 connection to an upstream, with the task that drives it.
//!
//! The task ends the connection when it has had no exchange for `IDLE_TIMEOUT`, or when its peer
//! does not acknowledge a PING. A server that ends the connection is no failure: exchanges that it
//! has begun go on, and it names those that it will not begin.

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, ResponseFuture, SendRequest};
use h2::{Ping, SendStream};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::head::PeerName;
use super::io::{IoState, SharedIo};
use super::memory::{HEAD_MAX, StreamWindow, WindowReservation};
use crate::http::attempt::UpstreamConnectionError;
use crate::http::deadline::ResettableDeadline;
use crate::http::message::Scheme;
use crate::http::tls_fault::TlsFault;
use crate::http::transport::TransportStream;
use crate::tasks::{self, TaskKind};

/// Most exchanges on one connection at a time; the server may allow fewer. Further ones get another
/// connection. nginx allows 128, and more would delay each other.
const STREAMS_MAX: usize = 128;
/// Bytes of a request that wait for the socket. More would only be copied earlier.
const SEND_BUFFER: usize = 128 << 10;
/// How long a connection may have no exchange. The server is told, so that a request that crosses
/// its end is not lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A silent peer gets a PING this often while there are exchanges, and this long to acknowledge it.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections of all threads that have begun and not ended.
static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

/// The connections of HTTP/2 to upstreams, of all threads.
pub(crate) fn http2_connections() -> usize {
    CONNECTIONS.load(Relaxed)
}

/// One of `CONNECTIONS`, until it is dropped.
struct CountedConnection;

impl CountedConnection {
    fn new() -> Self {
        CONNECTIONS.fetch_add(1, Relaxed);
        CountedConnection
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        CONNECTIONS.fetch_sub(1, Relaxed);
    }
}

/// The number of streams before the server has sent its settings.
const STREAMS_UNKNOWN: usize = usize::MAX - 1;

/// A connection that exchanges share.
pub(crate) struct Http2UpstreamConnection {
    /// `None`: no further exchange may begin.
    sender: RefCell<Option<SendRequest<Bytes>>>,
    pub(super) io: Rc<IoState>,
    pub(super) peer: PeerName,
    /// Bytes of a response that the server may send before its client takes them.
    pub(super) window: StreamWindow,
    /// That of the first exchange, until it begins.
    first: Cell<Option<WindowReservation>>,
    active: Cell<usize>,
    /// Whether an exchange has begun before.
    is_used: Cell<bool>,
    idle_since: Cell<Instant>,
    /// Notified of the settings of the server, or of the end before them.
    began: Notify,
    /// Why the connection ended.
    failure: RefCell<Option<h2::Error>>,
}

impl Http2UpstreamConnection {
    /// Begins HTTP/2 on a stream to `authority`, and waits for the settings of the server: they say
    /// how many exchanges the connection may have. The connection is driven by a task of this
    /// thread and closes when the last reference is dropped. Cancel safe.
    ///
    /// # Errors
    /// `Ended`, or `Tls`, if the stream fails; `Malformed` if the server does not speak HTTP/2.
    pub(crate) async fn open(
        stream: TransportStream,
        scheme: Scheme,
        authority: String,
    ) -> Result<Rc<Self>, UpstreamConnectionError> {
        let io = Rc::new(IoState::new(stream));
        let first = WindowReservation::new();
        let window = if first.is_some() { StreamWindow::Wide } else { StreamWindow::Narrow };
        let mut builder = Builder::new();
        builder
            .enable_push(false)
            .initial_max_send_streams(STREAMS_UNKNOWN)
            .initial_window_size(window.bytes())
            // The windows of all exchanges together: none can use up what another one needs.
            .initial_connection_window_size(window.bytes() * STREAMS_MAX as u32)
            .max_header_list_size(HEAD_MAX)
            .max_send_buffer_size(SEND_BUFFER);
        let (sender, connection) = builder.handshake(SharedIo(Rc::clone(&io))).await.map_err(connect_error)?;
        let this = Rc::new(Http2UpstreamConnection {
            sender: RefCell::new(Some(sender)),
            io: Rc::clone(&io),
            peer: PeerName { scheme, authority },
            window,
            first: Cell::new(first),
            active: Cell::new(0),
            is_used: Cell::new(false),
            idle_since: Cell::new(Instant::now()),
            began: Notify::new(),
            failure: RefCell::new(None),
        });
        let deadline = ResettableDeadline::after(PING_INTERVAL);
        let driver = Driver { this: Rc::downgrade(&this), io, deadline, _counted: CountedConnection::new() };
        tasks::spawn(TaskKind::UpstreamConnection, driver.run(connection));
        loop {
            match this.allowed() {
                Some(STREAMS_UNKNOWN) => this.began.notified().await,
                Some(_) => return Ok(this),
                None => {
                    let failure = this.failure.borrow_mut().take();
                    return Err(failure.map_or_else(
                        || UpstreamConnectionError::Ended(io::ErrorKind::UnexpectedEof.into()),
                        connect_error,
                    ));
                }
            }
        }
    }

    /// The number of streams that the server allows; `None`: the connection is closed.
    fn allowed(&self) -> Option<usize> {
        Some(self.sender.borrow().as_ref()?.current_max_send_streams())
    }

    /// Takes the reservation for the first exchange; `None`: the windows are narrow.
    pub(crate) fn take_reservation(&self) -> Option<WindowReservation> {
        self.first.take()
    }

    /// Whether no exchange may begin any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.borrow().is_none()
    }

    /// The exchanges in progress.
    pub(crate) fn active(&self) -> usize {
        self.active.get()
    }

    /// Counts an exchange that begins. Returns whether the connection served one before; `None` if
    /// it is closed, or has as many as it may have.
    pub(super) fn begin(&self) -> Option<bool> {
        let allowed = self.allowed()?.min(STREAMS_MAX);
        (self.active.get() < allowed).then(|| {
            self.active.set(self.active.get() + 1);
            self.is_used.replace(true)
        })
    }

    /// Counts the end of an exchange.
    pub(super) fn end(&self) {
        self.active.set(self.active.get() - 1);
        if self.active.get() == 0 {
            self.idle_since.set(Instant::now());
        }
    }

    /// Whether the connection is open according to the system, which may know of its end before the
    /// event loop does.
    pub(super) fn is_open(&self) -> bool {
        !self.io.stream.is_closed_by_peer()
    }

    /// Whether the server accepts extended CONNECT (RFC 8441 section 3).
    pub(super) fn accepts_connect(&self) -> bool {
        self.sender.borrow().as_ref().is_some_and(SendRequest::is_extended_connect_protocol_enabled)
    }

    /// Sends the head of a request.
    ///
    /// # Errors
    /// The server has ended the connection, or the request cannot be sent.
    pub(super) fn send_head(
        &self,
        head: http::Request<()>,
        is_complete: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), UpstreamConnectionError> {
        let sender = self.sender.borrow().clone();
        let Some(mut sender) = sender else {
            return Err(UpstreamConnectionError::Refused(io::ErrorKind::NotConnected.into()));
        };
        sender.send_request(head, is_complete).map_err(|error| {
            if error.is_go_away() || error.is_io() {
                self.close();
                UpstreamConnectionError::Refused(io::Error::other(error))
            } else {
                tracing::debug!(%error, "a request cannot be sent over HTTP/2");
                UpstreamConnectionError::Unsendable("head")
            }
        })
    }

    /// Lets no exchange begin any more. The connection ends after those in progress.
    pub(super) fn close(&self) {
        let sender = self.sender.borrow_mut().take();
        drop(sender);
    }
}

fn connect_error(error: h2::Error) -> UpstreamConnectionError {
    if !error.is_io() && !error.is_remote() {
        return UpstreamConnectionError::Malformed("not HTTP/2");
    }
    let error = error.into_io().unwrap_or_else(|| io::ErrorKind::InvalidData.into());
    match TlsFault::of(&error) {
        Some(fault) => UpstreamConnectionError::Tls(fault, error),
        None => UpstreamConnectionError::Ended(error),
    }
}

/// The task of a connection.
struct Driver {
    this: Weak<Http2UpstreamConnection>,
    io: Rc<IoState>,
    deadline: ResettableDeadline,
    _counted: CountedConnection,
}

impl Driver {
    /// Reads and writes until the connection ends. Dropping `connection` ends its exchanges.
    async fn run(mut self, mut connection: Connection<SharedIo, Bytes>) {
        let mut pings = connection.ping_pong();
        // When the PING was sent that is not acknowledged yet.
        let mut probed: Option<Instant> = None;
        let mut has_begun = false;
        let failure = poll_fn(|cx| {
            loop {
                if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                    return Poll::Ready(ended.err());
                }
                if !has_begun
                    && let Some(this) = self.this.upgrade()
                    && this.allowed() != Some(STREAMS_UNKNOWN)
                {
                    has_begun = true;
                    this.began.notify_waiters();
                }
                let now = Instant::now();
                if let Some(pings) = &mut pings
                    && pings.poll_pong(cx).is_ready()
                {
                    probed = None;
                }
                let Some(this) = self.this.upgrade() else {
                    // The exchanges in progress hold references: there is none.
                    self.deadline.set(now + PING_TIMEOUT);
                    if self.deadline.poll(cx).is_ready() {
                        return Poll::Ready(None);
                    }
                    return Poll::Pending;
                };
                // Any byte shows that the peer lives.
                probed = probed.filter(|sent| *sent >= self.io.read_at.get());
                let is_idle = this.active() == 0;
                let due = match probed {
                    _ if is_idle => this.idle_since.get() + IDLE_TIMEOUT,
                    Some(sent) => sent + PING_TIMEOUT,
                    None => self.io.read_at.get() + PING_INTERVAL,
                };
                if due <= now {
                    if is_idle {
                        this.close();
                    } else if probed.is_some() {
                        tracing::debug!("an HTTP/2 upstream does not acknowledge a PING");
                        return Poll::Ready(None);
                    } else if let Some(pings) = &mut pings
                        && pings.send_ping(Ping::opaque()).is_ok()
                    {
                        probed = Some(now);
                    }
                    if this.is_closed() || probed.is_some() {
                        self.deadline.set(now + PING_TIMEOUT);
                        continue;
                    }
                }
                // An exchange that begins meanwhile wakes this task, but moves no deadline.
                self.deadline.set(due.clamp(now + Duration::from_millis(1), now + PING_INTERVAL));
                if self.deadline.poll(cx).is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await;
        if let Some(error) = &failure {
            tracing::debug!(%error, "an HTTP/2 connection to an upstream ended");
        }
        if let Some(this) = self.this.upgrade() {
            *this.failure.borrow_mut() = failure;
            this.close();
            this.began.notify_waiters();
        }
    }
}
