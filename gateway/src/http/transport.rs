//! The byte stream to a peer, plain TCP or TLS, polled by a reader and a writer of the same task.
//!
//! The `RefCell` is borrowed only during a poll, so the two never borrow it at the same time.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncWrite, Interest};
use tokio::net::TcpStream;
use tokio_rustls::client;

use super::socket::{self, poll_system_call};
use super::tls_stream::TlsStream;

/// A connection, bound to the thread that polls it.
pub(crate) struct TransportStream {
    transport: RefCell<Transport>,
    /// Counts the connection until its end.
    _count: Option<OpenConnection>,
}

/// One of several open connections. A drop ends its count.
pub(crate) struct OpenConnection(Arc<AtomicUsize>);

impl OpenConnection {
    pub(crate) fn count(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Relaxed);
        OpenConnection(Arc::clone(open))
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Socket of a connection: plain TCP, or TLS over TCP after its handshake.
enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
    /// A stream of a connection that others share.
    Shared(Box<dyn SharedByteStream>),
}

/// A byte stream inside a connection that others share. It has no socket of its own.
pub(crate) trait SharedByteStream {
    /// Reads available bytes into `space`; 0 is the end of the stream. Cancel safe.
    fn poll_read(&mut self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Accepts bytes, at least one.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>>;

    /// Ends the sending side.
    fn shutdown(&mut self) -> io::Result<()>;
}

impl Transport {
    /// The socket, if the stream has one of its own.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Transport::Plain(stream) => Some(stream),
            Transport::Tls(stream) => Some(stream.tcp()),
            Transport::Shared(_) => None,
        }
    }
}

impl TransportStream {
    pub(crate) fn plain(stream: TcpStream) -> Self {
        TransportStream { transport: RefCell::new(Transport::Plain(stream)), _count: None }
    }

    /// A connection of a client, after its handshake.
    pub(crate) fn tls(stream: TlsStream) -> Self {
        TransportStream { transport: RefCell::new(Transport::Tls(Box::new(stream))), _count: None }
    }

    /// A connection to a server.
    pub(crate) fn tls_client(stream: client::TlsStream<TcpStream>) -> Self {
        let (tcp, session) = stream.into_inner();
        let transport = Transport::Tls(Box::new(TlsStream::new(tcp, session.into())));
        TransportStream { transport: RefCell::new(transport), _count: None }
    }

    /// Counts the connection as long as it is open.
    pub(crate) fn counted(self, count: OpenConnection) -> Self {
        TransportStream { _count: Some(count), ..self }
    }

    /// A stream of a connection that others share.
    pub(crate) fn shared(stream: Box<dyn SharedByteStream>) -> Self {
        TransportStream { transport: RefCell::new(Transport::Shared(stream)), _count: None }
    }

    /// Reads available bytes into `space`; 0 is the end of the stream. Cancel safe.
    pub(crate) fn poll_read(&self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        match &mut *self.transport.borrow_mut() {
            Transport::Plain(stream) => {
                poll_system_call(stream, cx, Interest::READABLE, || socket::receive(stream, space))
            }
            Transport::Tls(stream) => stream.poll_read(cx, space),
            Transport::Shared(stream) => stream.poll_read(cx, space),
        }
    }

    /// Whether the peer has closed the connection or its sending side, although bytes may wait to
    /// be read. One system call.
    pub(crate) fn is_closed_by_peer(&self) -> bool {
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let cell = self.transport.borrow();
        let Some(tcp) = cell.tcp() else { return false };
        let mut asked = [PollFd::new(tcp, PollFlags::RDHUP)];
        let found = rustix::event::poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        found.is_ok() && asked[0].revents().intersects(closed)
    }

    /// Ready when a read may succeed. The readiness can be spurious: the read may still be pending.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.transport.borrow_mut() {
            Transport::Plain(stream) => socket::poll_readable(stream, cx),
            Transport::Tls(stream) => stream.poll_readable(cx),
            Transport::Shared(_) => Poll::Ready(Ok(())),
        }
    }

    /// Ready when an idle connection is closed or has got bytes that no request asked for. With
    /// TLS, records without content (such as session tickets) are read and do not count.
    pub(crate) fn poll_unsolicited(&self, cx: &mut Context<'_>) -> Poll<()> {
        let is_plain = matches!(&*self.transport.borrow(), Transport::Plain(_));
        if is_plain {
            return self.poll_readable(cx).map(|_| ());
        }
        self.poll_read(cx, &mut [0_u8; 1]).map(|_| ())
    }

    /// Writes from two slices, the second only after all of the first. With TLS, also flushes.
    pub(crate) fn poll_write(&self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> Poll<io::Result<usize>> {
        match (first, second) {
            (only, []) | ([], only) => self.poll_write_slices(cx, &[IoSlice::new(only)]),
            _ => self.poll_write_slices(cx, &[IoSlice::new(first), IoSlice::new(second)]),
        }
    }

    /// Writes from several slices, not all empty. With TLS, also flushes.
    pub(crate) fn poll_write_slices(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = match &mut *self.transport.borrow_mut() {
            Transport::Plain(stream) => {
                ready!(poll_system_call(stream, cx, Interest::WRITABLE, || socket::send(stream, slices)))?
            }
            Transport::Tls(stream) => ready!(stream.poll_write(cx, slices))?,
            Transport::Shared(stream) => {
                let first = slices.iter().find(|slice| !slice.is_empty());
                ready!(stream.poll_write(cx, first.map_or(&[], |slice| slice)))?
            }
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        Poll::Ready(Ok(written))
    }

    /// Writes from two slices although the socket is not reported as writable: the system reports
    /// it only once a third of the send buffer is free. Returns the bytes that were taken from the
    /// slices; with TLS 0, because the records that were already prepared are written. `None`: the
    /// socket accepts no byte, or there is none.
    pub(crate) fn write_unready(&self, first: &[u8], second: &[u8]) -> io::Result<Option<usize>> {
        let written = match &mut *self.transport.borrow_mut() {
            Transport::Plain(_) if first.is_empty() && second.is_empty() => return Ok(None),
            Transport::Plain(stream) => {
                let slices = [IoSlice::new(first), IoSlice::new(second)];
                socket::send(stream, &slices).map(|transfer| transfer.count)
            }
            Transport::Tls(stream) => {
                let Some(written) = stream.write_unready() else { return Ok(None) };
                written.map(|()| 0)
            }
            Transport::Shared(_) => return Ok(None),
        };
        match written {
            Ok(count) => Ok(Some(count)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Flushes the TLS buffer; does nothing for plain TCP.
    pub(crate) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.transport.borrow_mut() {
            Transport::Plain(_) | Transport::Shared(_) => Poll::Ready(Ok(())),
            Transport::Tls(stream) => stream.poll_flush(cx),
        }
    }

    /// Shuts down the sending side unless `is_shut`, which it then sets.
    pub(crate) fn poll_shutdown_once(&self, cx: &mut Context<'_>, is_shut: &mut bool) -> Poll<io::Result<()>> {
        if !*is_shut {
            ready!(self.poll_shutdown(cx))?;
            *is_shut = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Shuts down the sending side. With TLS, `close_notify` is sent first.
    pub(crate) fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.transport.borrow_mut() {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => stream.poll_shutdown(cx),
            Transport::Shared(stream) => Poll::Ready(stream.shutdown()),
        }
    }

    /// Makes the next close a TCP reset, so that a client cannot mistake a truncated response for a
    /// complete one.
    pub(crate) fn reset_on_close(&self) {
        // If setting the option fails, the close is an ordinary one. The framing then still shows
        // the client that bytes are missing.
        let cell = self.transport.borrow();
        let Some(tcp) = cell.tcp() else { return };
        if let Err(error) = socket2::SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO)) {
            tracing::debug!(%error, "failed to set SO_LINGER");
        }
    }
}
