//! One byte stream to a peer, plain or TLS, that a reader and a writer of the same task can both poll.
//!
//! The cell is borrowed only for the length of one poll, so the two sides never meet inside it.

use std::cell::RefCell;
use std::io::{self, BufRead as _, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, SendFlags};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::coop;
use tokio_rustls::server::TlsStream;

/// Calls the system once `interest` is met. `call` is asked anew where it was not after all; it may move up to `room` bytes.
///
/// Straight calls, where those of the C library would also look for a thread that is to be cancelled, with two locked instructions.
fn poll_call(
    stream: &TcpStream,
    cx: &mut Context<'_>,
    interest: Interest,
    room: usize,
    mut call: impl FnMut() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    // A peer that never has to be waited for must not keep the thread to itself.
    let budget = ready!(coop::poll_proceed(cx));
    loop {
        let mut moved = None;
        let tried = stream.try_io(interest, || {
            let count = call()?;
            moved = Some(count);
            // Less than there was room for: nothing is left, and the next call would wait (epoll(7)). At the end it would not.
            if count > 0 && count < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match (moved, tried) {
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

/// A connection that lives on the thread which polls it.
pub struct Io(RefCell<Stream>);

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Io {
    pub fn plain(stream: TcpStream) -> Self {
        Io(RefCell::new(Stream::Plain(stream)))
    }

    pub fn tls(stream: TlsStream<TcpStream>) -> Self {
        Io(RefCell::new(Stream::Tls(Box::new(stream))))
    }

    /// Reads what is there into `space`; 0 is the end. Cancel safe.
    pub fn poll_read(&self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        match &mut *self.0.borrow_mut() {
            Stream::Plain(stream) => poll_call(stream, cx, Interest::READABLE, space.len(), || {
                let (_, count) = rustix::net::recv(&*stream, &mut *space, RecvFlags::empty())?;
                Ok(count)
            }),
            Stream::Tls(stream) => {
                let mut buf = ReadBuf::new(space);
                ready!(Pin::new(stream.as_mut()).poll_read(cx, &mut buf))?;
                Poll::Ready(Ok(buf.filled().len()))
            }
        }
    }

    /// Ready when a read might not wait; a read is then tried, and may wait after all.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.0.borrow_mut() {
            Stream::Plain(stream) => match stream.try_io(Interest::READABLE, || Ok(())) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(_) => stream.poll_read_ready(cx),
            },
            Stream::Tls(stream) => {
                let (tcp, session) = stream.get_mut();
                // Whole records are decrypted as they arrive, so what is left of them is here or nowhere.
                match session.reader().fill_buf() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.poll_read_ready(cx),
                    _ => Poll::Ready(Ok(())),
                }
            }
        }
    }

    /// Writes from two slices, the second only after the whole first. TLS is flushed along.
    pub fn poll_write(&self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> Poll<io::Result<usize>> {
        let slices = [IoSlice::new(first), IoSlice::new(second)];
        let slices = if first.is_empty() { &slices[1..] } else { &slices[..] };
        let room = first.len() + second.len();
        let written = match &mut *self.0.borrow_mut() {
            Stream::Plain(stream) => ready!(poll_call(stream, cx, Interest::WRITABLE, room, || {
                Ok(match slices {
                    [only] => rustix::net::send(&*stream, only, SendFlags::NOSIGNAL)?,
                    _ if second.is_empty() => rustix::net::send(&*stream, first, SendFlags::NOSIGNAL)?,
                    _ => rustix::io::writev(&*stream, slices)?,
                })
            }))?,
            Stream::Tls(stream) => ready!(Pin::new(stream.as_mut()).poll_write_vectored(cx, slices))?,
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        Poll::Ready(Ok(written))
    }

    /// Pushes out what TLS has buffered; nothing to do for plain TCP.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.0.borrow_mut() {
            Stream::Plain(_) => Poll::Ready(Ok(())),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    /// Ends the sending side.
    pub fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self.0.borrow_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }

    /// Makes the coming close a reset, so that a client cannot take a cut answer for a whole one.
    pub fn reset_on_close(&self) {
        let cell = self.0.borrow();
        let tcp = match &*cell {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        };
        // Failing to set the option leaves an ordinary close: the framing already tells the client that bytes are missing.
        if let Err(error) = socket2::SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO)) {
            tracing::debug!(%error, "linger was not set");
        }
    }
}
