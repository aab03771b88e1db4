//! Upper bound of proxying: copies bytes between each client and its own upstream connection, and
//! parses nothing.
//!
//! No proxy that parses what it forwards can be faster, unless it needs fewer than two system calls
//! per direction.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};

use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

use crate::servers::listen::listen;

const LISTENER: Token = Token(usize::MAX);
const EVENTS_MAX: usize = 1_024;
/// Holds a response of the pass workloads, so that one read returns all available bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// The two sockets of one relayed connection, client and upstream. The token of a side is twice the
/// pair's index, plus one for the upstream.
struct RelayPair {
    sides: [RelaySide; 2],
}

/// One socket of a pair, the bytes that it has not accepted yet, and whether its peer has closed
/// its sending direction.
struct RelaySide {
    stream: TcpStream,
    /// Bytes that the socket buffer had no room for. At most one buffer: reading pauses until they
    /// are written.
    pending: Vec<u8>,
    has_ended: bool,
}

/// Runs until the process ends.
pub(crate) fn run(address: SocketAddr, upstream: SocketAddr) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(EVENTS_MAX);
    let mut listener = TcpListener::from_std(listen(address)?);
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    // Bounded by the descriptor limit of the process.
    let mut pairs: Slab<RelayPair> = Slab::new();
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((client, _)) = listener.accept() {
                    // Without an upstream connection, the client connection is closed, which the
                    // load reports as an error.
                    drop(connect(client, upstream, &poll, &mut pairs));
                }
                continue;
            }
            let (index, side) = (event.token().0 / 2, event.token().0 % 2);
            // An event of a pair that was removed in this round may reach its successor in the
            // slot, for which it has no effect.
            if let Some(pair) = pairs.get_mut(index)
                && !pair.forward(side, event, &mut buffer).unwrap_or(false)
            {
                pairs.remove(index);
            }
        }
    }
}

fn connect(client: TcpStream, upstream: SocketAddr, poll: &Poll, pairs: &mut Slab<RelayPair>) -> io::Result<()> {
    // Does not block on loopback, and happens once per client.
    let upstream = std::net::TcpStream::connect(upstream)?;
    upstream.set_nonblocking(true)?;
    let entry = pairs.vacant_entry();
    let mut sides = [client, TcpStream::from_std(upstream)].map(RelaySide::new);
    for (token, side) in (2 * entry.key()..).zip(&mut sides) {
        side.stream.set_nodelay(true)?;
        poll.registry().register(&mut side.stream, Token(token), Interest::READABLE | Interest::WRITABLE)?;
    }
    entry.insert(RelayPair { sides });
    Ok(())
}

impl RelayPair {
    /// Handles an event of one side; `false` once both sides have closed.
    fn forward(&mut self, side: usize, event: &Event, buffer: &mut [u8]) -> io::Result<bool> {
        let [client, upstream] = &mut self.sides;
        let (this, other) = if side == 0 { (client, upstream) } else { (upstream, client) };
        if event.is_readable() {
            copy(this, other, buffer, event.is_read_closed())?;
        }
        if !this.pending.is_empty() {
            // Bytes that were left unread on the other side cause no further event.
            copy(other, this, buffer, true)?;
        }
        Ok(!(this.has_ended && other.has_ended))
    }
}

/// Copies from `from` to `to` until one of them would block. A short read means that no bytes are
/// left (epoll(7)); with `until_end`, reading continues, because the end of the stream may have
/// arrived too.
fn copy(from: &mut RelaySide, to: &mut RelaySide, buffer: &mut [u8], until_end: bool) -> io::Result<()> {
    while to.flush()? && !from.has_ended {
        let bytes = match from.stream.read(buffer) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        if bytes == 0 {
            from.has_ended = true;
            return to.stream.shutdown(Shutdown::Write);
        }
        to.send(&buffer[..bytes])?;
        if bytes < buffer.len() && !until_end {
            return Ok(());
        }
    }
    Ok(())
}

impl RelaySide {
    fn new(stream: TcpStream) -> Self {
        RelaySide { stream, pending: Vec::new(), has_ended: false }
    }

    /// Writes `bytes`; keeps the part that the socket buffer has no room for.
    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.pending.extend_from_slice(bytes);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes the kept bytes; `false` while the socket buffer is full.
    fn flush(&mut self) -> io::Result<bool> {
        if !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            self.send(&pending)?;
        }
        Ok(self.pending.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{self, Ipv4Addr};
    use std::thread;

    use super::*;

    /// More than all buffers between the two ends hold.
    const BYTES: usize = 16 << 20;

    #[test]
    fn all_bytes_arrive_before_the_end_even_if_the_reader_is_slow() {
        let [upstream, relay] = [0, 0].map(|port| net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a port"));
        let to = upstream.local_addr().expect("an address");
        let at = relay.local_addr().expect("an address");
        drop(relay);
        // Ends with this process.
        thread::spawn(move || run(at, to));
        let echo = thread::spawn(move || {
            let (mut stream, _) = upstream.accept().expect("the relay");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("the client's bytes");
            stream.write_all(&bytes).expect("room");
        });
        let mut client = loop {
            if let Ok(client) = net::TcpStream::connect(at) {
                break client;
            }
            thread::yield_now();
        };
        let sent: Vec<u8> = (0..=u8::MAX).cycle().take(BYTES).collect();
        client.write_all(&sent).expect("room");
        client.shutdown(Shutdown::Write).expect("an open connection");
        // The client reads only after all its bytes are written.
        let mut received = Vec::new();
        client.read_to_end(&mut received).expect("the echo");
        assert!(received == sent);
        echo.join().expect("no panic");
    }
}
