//! The byte stream to a peer, plain TCP or TLS, polled by a reader and a writer of the same task.
//!
//! The `RefCell` is borrowed only during a poll, so the two never borrow it at the same time.

use std::cell::RefCell;
use std::io::{self, BufRead as _, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, SendFlags};
use rustls::ConnectionCommon;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::coop;
use tokio_rustls::{client, server};

/// Makes the system call `call` when the socket is ready for `interest`, and retries it if the
/// readiness was spurious. `call` transfers up to `capacity` bytes.
///
/// `call` uses direct system calls: the C library's wrappers also check for thread cancellation,
/// which costs two locked instructions.
#[expect(clippy::too_many_arguments, reason = "hot path: runs for every read and write, and is inlined")]
fn poll_system_call(
    stream: &TcpStream,
    cx: &mut Context<'_>,
    interest: Interest,
    capacity: usize,
    mut call: impl FnMut() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    // A peer that is always ready must not monopolise the thread.
    let budget = ready!(coop::poll_proceed(cx));
    loop {
        let mut transferred = None;
        let outcome = stream.try_io(interest, || {
            let count = call()?;
            transferred = Some(count);
            // A short transfer: the socket is drained and the next call would block (epoll(7)). 0
            // is the end of the stream, where the next call would not block.
            if count > 0 && count < capacity { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match (transferred, outcome) {
            (Some(count), _) => {
                budget.made_progress();
                return Poll::Ready(Ok(count));
            }
            (None, Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            (None, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
            (None, _) if interest.is_readable() => ready!(stream.poll_read_ready(cx))?,
            (None, _) => ready!(stream.poll_write_ready(cx))?,
        }
    }
}

/// Writes from two slices, not both empty, the second only after all of the first.
fn send_slices(stream: &TcpStream, first: &[u8], second: &[u8]) -> io::Result<usize> {
    Ok(match (first, second) {
        (only, []) | ([], only) => rustix::net::send(stream, only, SendFlags::NOSIGNAL)?,
        _ => rustix::io::writev(stream, &[IoSlice::new(first), IoSlice::new(second)])?,
    })
}

/// A socket that is written to whether or not it is reported as writable.
struct UnreadySocket<'a>(&'a TcpStream);

impl io::Write for UnreadySocket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send_slices(self.0, bytes, &[])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection, bound to the thread that polls it.
pub(crate) struct TransportStream(RefCell<Transport>);

/// Socket of a connection: plain TCP, or TLS over TCP after its handshake.
enum Transport {
    Plain(TcpStream),
    Tls(Box<server::TlsStream<TcpStream>>),
    TlsClient(Box<client::TlsStream<TcpStream>>),
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

/// Ready when the session has plaintext, or the socket may have more.
fn poll_session_readable<D>(
    tcp: &TcpStream,
    session: &mut ConnectionCommon<D>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    // Complete records are decrypted as they arrive, so all remaining plaintext is in this reader.
    match session.reader().fill_buf() {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.poll_read_ready(cx),
        _ => Poll::Ready(Ok(())),
    }
}

/// Writes records that are prepared; `None` if there is none.
fn write_session_unready<D>(tcp: &TcpStream, session: &mut ConnectionCommon<D>) -> Option<io::Result<usize>> {
    session.wants_write().then(|| session.write_tls(&mut UnreadySocket(tcp)).map(|_| 0))
}

impl TransportStream {
    pub(crate) fn plain(stream: TcpStream) -> Self {
        TransportStream(RefCell::new(Transport::Plain(stream)))
    }

    pub(crate) fn tls(stream: server::TlsStream<TcpStream>) -> Self {
        TransportStream(RefCell::new(Transport::Tls(Box::new(stream))))
    }

    /// A connection to a server.
    pub(crate) fn tls_client(stream: client::TlsStream<TcpStream>) -> Self {
        TransportStream(RefCell::new(Transport::TlsClient(Box::new(stream))))
    }

    /// A stream of a connection that others share.
    pub(crate) fn shared(stream: Box<dyn SharedByteStream>) -> Self {
        TransportStream(RefCell::new(Transport::Shared(stream)))
    }

    /// Reads available bytes into `space`; 0 is the end of the stream. Cancel safe.
    pub(crate) fn poll_read(&self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        match &mut *self.0.borrow_mut() {
            Transport::Plain(stream) => poll_system_call(stream, cx, Interest::READABLE, space.len(), || {
                let (_, count) = rustix::net::recv(&*stream, &mut *space, RecvFlags::empty())?;
                Ok(count)
            }),
            Transport::Tls(stream) => {
                let mut buf = ReadBuf::new(space);
                ready!(Pin::new(stream.as_mut()).poll_read(cx, &mut buf))?;
                Poll::Ready(Ok(buf.filled().len()))
            }
            Transport::TlsClient(stream) => {
                let mut buf = ReadBuf::new(space);
                ready!(Pin::new(stream.as_mut()).poll_read(cx, &mut buf))?;
                Poll::Ready(Ok(buf.filled().len()))
            }
            Transport::Shared(stream) => stream.poll_read(cx, space),
        }
    }

    /// Whether the peer has closed the connection or its sending side, although bytes may wait to
    /// be read. One system call.
    pub(crate) fn is_closed_by_peer(&self) -> bool {
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let is_closed = |stream: &TcpStream| {
            let mut asked = [PollFd::new(stream, PollFlags::RDHUP)];
            let found = rustix::event::poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            found.is_ok() && asked[0].revents().intersects(closed)
        };
        match &*self.0.borrow() {
            Transport::Plain(stream) => is_closed(stream),
            Transport::Tls(stream) => is_closed(stream.get_ref().0),
            Transport::TlsClient(stream) => is_closed(stream.get_ref().0),
            Transport::Shared(_) => false,
        }
    }

    /// Ready when a read may succeed. The readiness can be spurious: the read may still be pending.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.0.borrow_mut() {
            Transport::Plain(stream) => match stream.try_io(Interest::READABLE, || Ok(())) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(_) => stream.poll_read_ready(cx),
            },
            Transport::Tls(stream) => {
                let (tcp, session) = stream.get_mut();
                poll_session_readable(tcp, session, cx)
            }
            Transport::TlsClient(stream) => {
                let (tcp, session) = stream.get_mut();
                poll_session_readable(tcp, session, cx)
            }
            Transport::Shared(_) => Poll::Ready(Ok(())),
        }
    }

    /// Ready when an idle connection is closed or has got bytes that no request asked for. With
    /// TLS, records without content (such as session tickets) are read and do not count.
    pub(crate) fn poll_unsolicited(&self, cx: &mut Context<'_>) -> Poll<()> {
        let is_plain = matches!(&*self.0.borrow(), Transport::Plain(_));
        if is_plain {
            return self.poll_readable(cx).map(|_| ());
        }
        self.poll_read(cx, &mut [0_u8; 1]).map(|_| ())
    }

    /// Writes from two slices, the second only after all of the first. With TLS, also flushes.
    pub(crate) fn poll_write(&self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> Poll<io::Result<usize>> {
        let capacity = first.len() + second.len();
        let written = match &mut *self.0.borrow_mut() {
            Transport::Plain(stream) => ready!(poll_system_call(stream, cx, Interest::WRITABLE, capacity, || {
                send_slices(stream, first, second)
            }))?,
            Transport::Tls(stream) => {
                let slices = [IoSlice::new(first), IoSlice::new(second)];
                let slices = if first.is_empty() { &slices[1..] } else { &slices[..] };
                ready!(Pin::new(stream.as_mut()).poll_write_vectored(cx, slices))?
            }
            Transport::TlsClient(stream) => {
                let slices = [IoSlice::new(first), IoSlice::new(second)];
                let slices = if first.is_empty() { &slices[1..] } else { &slices[..] };
                ready!(Pin::new(stream.as_mut()).poll_write_vectored(cx, slices))?
            }
            Transport::Shared(stream) => ready!(stream.poll_write(cx, if first.is_empty() { second } else { first }))?,
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        Poll::Ready(Ok(written))
    }

    /// Writes from several slices, not all empty. With TLS, also flushes.
    pub(crate) fn poll_write_slices(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = match &mut *self.0.borrow_mut() {
            Transport::Plain(stream) => {
                let capacity = slices.iter().map(|slice| slice.len()).sum();
                ready!(poll_system_call(stream, cx, Interest::WRITABLE, capacity, || {
                    Ok(rustix::io::writev(&*stream, slices)?)
                }))?
            }
            Transport::Tls(stream) => ready!(Pin::new(stream.as_mut()).poll_write_vectored(cx, slices))?,
            Transport::TlsClient(stream) => ready!(Pin::new(stream.as_mut()).poll_write_vectored(cx, slices))?,
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
        let written = match &mut *self.0.borrow_mut() {
            Transport::Plain(_) if first.is_empty() && second.is_empty() => return Ok(None),
            Transport::Plain(stream) => send_slices(stream, first, second),
            Transport::Tls(stream) => {
                let (tcp, session) = stream.get_mut();
                let Some(written) = write_session_unready(tcp, session) else { return Ok(None) };
                written
            }
            Transport::TlsClient(stream) => {
                let (tcp, session) = stream.get_mut();
                let Some(written) = write_session_unready(tcp, session) else { return Ok(None) };
                written
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
        match &mut *self.0.borrow_mut() {
            Transport::Plain(_) => Poll::Ready(Ok(())),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            Transport::TlsClient(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            Transport::Shared(_) => Poll::Ready(Ok(())),
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
        match &mut *self.0.borrow_mut() {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            Transport::TlsClient(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            Transport::Shared(stream) => Poll::Ready(stream.shutdown()),
        }
    }

    /// Makes the next close a TCP reset, so that a client cannot mistake a truncated response for a
    /// complete one.
    pub(crate) fn reset_on_close(&self) {
        let cell = self.0.borrow();
        let tcp = match &*cell {
            Transport::Plain(stream) => stream,
            Transport::Tls(stream) => stream.get_ref().0,
            Transport::TlsClient(stream) => stream.get_ref().0,
            // Dropping it resets the stream.
            Transport::Shared(_) => return,
        };
        // If setting the option fails, the close is an ordinary one. The framing then still shows
        // the client that bytes are missing.
        if let Err(error) = socket2::SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO)) {
            tracing::debug!(%error, "failed to set SO_LINGER");
        }
    }
}
