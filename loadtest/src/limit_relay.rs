//! The limit of passing on: bytes go to an upstream connection of their own and back, and nobody looks at them.
//!
//! No proxy that reads what it forwards can be faster, unless it needs fewer system calls than two for each direction.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};

use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

use crate::listen::listen;

const LISTENER: Token = Token(usize::MAX);
const EVENTS_MAX: usize = 1_024;
/// Holds an answer of the workloads that pass on, so that one read takes all there is.
const BUFFER_BYTES: usize = 64 << 10;

/// Client and upstream; the token of a side is twice the pair's place, plus one for the upstream.
struct Pair {
    sides: [Side; 2],
}

struct Side {
    stream: TcpStream,
    /// What it had no room for. At most one buffer: nothing more is read for it until this is gone.
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
    // Bounded by the descriptors that this process may open.
    let mut pairs: Slab<Pair> = Slab::new();
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((client, _)) = listener.accept() {
                    // Without upstream, the client is closed: it shows as an error of the load.
                    drop(connect(client, upstream, &poll, &mut pairs));
                }
                continue;
            }
            let (place, side) = (event.token().0 / 2, event.token().0 % 2);
            // An event of a pair that ended in this same round may meet its successor, which then finds nothing to do.
            if let Some(pair) = pairs.get_mut(place)
                && !pair.forward(side, event, &mut buffer).unwrap_or(false)
            {
                pairs.remove(place);
            }
        }
    }
}

fn connect(client: TcpStream, upstream: SocketAddr, poll: &Poll, pairs: &mut Slab<Pair>) -> io::Result<()> {
    // On loopback this does not wait, and it happens once for each client.
    let upstream = std::net::TcpStream::connect(upstream)?;
    upstream.set_nonblocking(true)?;
    let entry = pairs.vacant_entry();
    let mut sides = [client, TcpStream::from_std(upstream)].map(Side::new);
    for (token, side) in (2 * entry.key()..).zip(&mut sides) {
        side.stream.set_nodelay(true)?;
        poll.registry().register(&mut side.stream, Token(token), Interest::READABLE | Interest::WRITABLE)?;
    }
    entry.insert(Pair { sides });
    Ok(())
}

impl Pair {
    /// Handles an event of one side; `false` when both sides have ended.
    fn forward(&mut self, side: usize, event: &Event, buffer: &mut [u8]) -> io::Result<bool> {
        let [client, upstream] = &mut self.sides;
        let (this, other) = if side == 0 { (client, upstream) } else { (upstream, client) };
        if event.is_readable() {
            pump(this, other, buffer, event.is_read_closed())?;
        }
        if !this.pending.is_empty() {
            // What was not read from the other side for want of room is not announced again.
            pump(other, this, buffer, true)?;
        }
        Ok(!(this.has_ended && other.has_ended))
    }
}

/// Moves what `from` has until one of the two would block. A short read means that nothing is left (epoll(7)); with
/// `to_the_end`, `from` is read nevertheless, since its end may have come as well.
fn pump(from: &mut Side, to: &mut Side, buffer: &mut [u8], to_the_end: bool) -> io::Result<()> {
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
        if bytes < buffer.len() && !to_the_end {
            return Ok(());
        }
    }
    Ok(())
}

impl Side {
    fn new(stream: TcpStream) -> Self {
        Side { stream, pending: Vec::new(), has_ended: false }
    }

    /// Writes `bytes`, or keeps what there is no room for.
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

    /// Writes what was kept; `false` while there is still no room for all of it.
    fn flush(&mut self) -> io::Result<bool> {
        if !self.pending.is_empty() {
            let kept = std::mem::take(&mut self.pending);
            self.send(&kept)?;
        }
        Ok(self.pending.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{self, Ipv4Addr};
    use std::thread;

    use super::*;

    /// More than the buffers between the two ends hold.
    const BYTES: usize = 16 << 20;

    #[test]
    fn what_one_side_sends_arrives_before_its_end_however_slow_the_other_is() {
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
        // Until the echo waits for room, nothing is read here.
        let mut received = Vec::new();
        client.read_to_end(&mut received).expect("the echo");
        assert!(received == sent);
        echo.join().expect("no panic");
    }
}
