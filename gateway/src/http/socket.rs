//! System calls on the socket of a connection, made when it is ready.
//!
//! Direct system calls: the C library's wrappers also check for thread cancellation, which costs
//! two locked instructions.

use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop;

/// The result of a system call: how many bytes it transferred, of how many that it could.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub(crate) count: usize,
    pub(crate) capacity: usize,
}

/// Makes a system call when the socket is ready for `interest`, and retries it if the readiness was
/// spurious. Returns the number of transferred bytes.
pub(crate) fn poll_system_call(
    stream: &TcpStream,
    cx: &mut Context<'_>,
    interest: Interest,
    mut call: impl FnMut() -> io::Result<Transfer>,
) -> Poll<io::Result<usize>> {
    // A peer that is always ready must not monopolise the thread.
    let budget = ready!(coop::poll_proceed(cx));
    loop {
        let mut transferred = None;
        let outcome = stream.try_io(interest, || {
            let Transfer { count, capacity } = call()?;
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

/// Ready when a read may succeed. The readiness can be spurious.
pub(crate) fn poll_readable(stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    match stream.try_io(Interest::READABLE, || Ok(())) {
        Ok(()) => Poll::Ready(Ok(())),
        Err(_) => stream.poll_read_ready(cx),
    }
}

pub(crate) fn receive(stream: &TcpStream, space: &mut [u8]) -> io::Result<Transfer> {
    let capacity = space.len();
    let (_, count) = rustix::net::recv(stream, space, RecvFlags::empty())?;
    Ok(Transfer { count, capacity })
}

/// Sends from slices, not all empty, in their order. One slice costs less than several: the kernel
/// has no list to copy.
pub(crate) fn send(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<Transfer> {
    let capacity = slices.iter().map(|slice| slice.len()).sum();
    let count = match slices {
        [only, ..] if only.len() == capacity => rustix::net::send(stream, only, SendFlags::NOSIGNAL)?,
        [_empty, only] if only.len() == capacity => rustix::net::send(stream, only, SendFlags::NOSIGNAL)?,
        _ => rustix::io::writev(stream, slices)?,
    };
    Ok(Transfer { count, capacity })
}
