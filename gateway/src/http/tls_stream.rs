//! TLS over a TCP connection.
//!
//! The records of one write leave in one system call, and what one system call has received is
//! decrypted at once.

use std::io::{self, BufRead as _, IoSlice, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{Connection, ProtocolVersion};
use tokio::io::{AsyncWrite as _, Interest};
use tokio::net::TcpStream;

use super::socket::{self, Transfer, poll_system_call};

/// A connection, to be used once its handshake is complete.
pub(crate) struct TlsStream {
    tcp: TcpStream,
    session: Connection,
    /// The session may have plaintext, or the end of the stream.
    has_received: bool,
    /// `close_notify` is written.
    is_closing: bool,
}

/// The socket as rustls reads and writes it: one system call each. Keeps how many bytes the last
/// call could have transferred.
struct SessionSocket<'a> {
    tcp: &'a TcpStream,
    capacity: usize,
}

impl TlsStream {
    pub(crate) fn new(tcp: TcpStream, session: Connection) -> Self {
        TlsStream { tcp, session, has_received: true, is_closing: false }
    }

    pub(crate) fn session(&self) -> &Connection {
        &self.session
    }

    /// Completes the handshake. The session tickets of TLS 1.3 leave with the first response if its
    /// request has arrived with the handshake: a write of their own costs as much.
    ///
    /// # Errors
    /// `InvalidData` with a `rustls::Error`, of which an alert tells the peer; `UnexpectedEof`;
    /// those of the socket.
    pub(crate) fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let is_handshaking = self.session.is_handshaking();
            if is_handshaking || self.session.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
                ready!(self.poll_flush(cx))?;
            }
            if !is_handshaking {
                return Poll::Ready(Ok(()));
            }
            if ready!(self.poll_receive(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Reads available bytes into `space`; 0 is the end of the stream. Cancel safe.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            if self.has_received {
                match self.session.reader().read(space) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.has_received = false,
                    read => return Poll::Ready(read),
                }
            }
            let Poll::Ready(received) = self.poll_receive(cx) else { return self.poll_idle(cx) };
            received?;
        }
    }

    /// Pending. A client that sends nothing now gets the session tickets.
    fn poll_idle<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if self.session.wants_write() {
            ready!(self.poll_flush(cx))?;
        }
        Poll::Pending
    }

    /// Receives once and decrypts complete records. Returns the number of received bytes; 0 is the
    /// end of the stream.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let TlsStream { tcp, session, has_received, .. } = self;
        let count = ready!(poll_system_call(tcp, cx, Interest::READABLE, || {
            let mut socket = SessionSocket { tcp, capacity: 0 };
            let count = session.read_tls(&mut socket)?;
            Ok(Transfer { count, capacity: socket.capacity })
        }))?;
        match session.process_new_packets() {
            Ok(state) => {
                *has_received = state.plaintext_bytes_to_read() > 0 || state.peer_has_closed() || count == 0;
                Poll::Ready(Ok(count))
            }
            Err(error) => {
                // An alert says why the connection ends, if there is room for it.
                let _sent = self.poll_flush(cx);
                Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)))
            }
        }
    }

    /// Ready when there is plaintext, or the socket may have more.
    pub(super) fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Complete records are decrypted as they arrive, so all remaining plaintext is in this
        // reader.
        if self.has_received {
            match self.session.reader().fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.has_received = false,
                _ => return Poll::Ready(Ok(())),
            }
        }
        match socket::poll_readable(&self.tcp, cx) {
            Poll::Pending => self.poll_idle(cx),
            ready => ready,
        }
    }

    /// Writes from slices, not all empty, and flushes. Bytes that were accepted may still be in the
    /// session's buffer.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            let accepted = match slices {
                [only] => self.session.writer().write(only)?,
                _ => self.session.writer().write_vectored(slices)?,
            };
            match (accepted, self.poll_flush(cx)?) {
                (0, Poll::Pending) => return Poll::Pending,
                // The buffer was full.
                (0, Poll::Ready(())) => {}
                (count, _) => return Poll::Ready(Ok(count)),
            }
        }
    }

    /// Writes the records that are prepared.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let TlsStream { tcp, session, .. } = self;
        while session.wants_write() {
            let written = ready!(poll_system_call(tcp, cx, Interest::WRITABLE, || {
                let mut socket = SessionSocket { tcp, capacity: 0 };
                let count = session.write_tls(&mut socket)?;
                Ok(Transfer { count, capacity: socket.capacity })
            }))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes records that are prepared, although the socket is not reported as writable; `None` if
    /// there is none.
    pub(super) fn write_unready(&mut self) -> Option<io::Result<()>> {
        let TlsStream { tcp, session, .. } = self;
        session.wants_write().then(|| session.write_tls(&mut SessionSocket { tcp, capacity: 0 }).map(|_| ()))
    }

    /// Sends `close_notify` and shuts down the sending side.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.is_closing, true) {
            self.session.send_close_notify();
        }
        ready!(self.poll_flush(cx))?;
        match ready!(Pin::new(&mut self.tcp).poll_shutdown(cx)) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            shut => Poll::Ready(shut),
        }
    }
}

impl Read for SessionSocket<'_> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let Transfer { count, capacity } = socket::receive(self.tcp, space)?;
        self.capacity = capacity;
        Ok(count)
    }
}

impl Write for SessionSocket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Transfer { count, capacity } = socket::send(self.tcp, slices)?;
        self.capacity = capacity;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
