//! Upper bound of responding: an epoll loop that writes one prepared response for each end of a
//! request head and parses nothing else.
//!
//! No server that parses, decides or looks up anything can be faster. Correct only for requests
//! without a body.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;

use memchr::memmem;
use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

use crate::servers::listen::listen;
use crate::servers::origin;

const LISTENER: Token = Token(usize::MAX);
const EVENTS_MAX: usize = 1_024;
/// Requests of the load are far smaller, so that one read returns all available bytes.
const INBOX_BYTES: usize = 16 << 10;
const HEAD_END: &[u8; 4] = b"\r\n\r\n";

/// Configuration of the constant response: listening address, status, length of the body, and
/// entity tag.
pub(crate) struct ConstantResponseConfig {
    pub(crate) listen: SocketAddr,
    pub(crate) status: u16,
    pub(crate) body_bytes: usize,
    /// Target of the entity tag, whatever the requested target.
    pub(crate) target: String,
}

/// A client's socket with the scanner of its request heads and the number of responses that are
/// still to be written.
struct ClientConnection {
    stream: TcpStream,
    ends: HeadEndScanner,
    /// Responses that are not completely written.
    pending: usize,
    /// Bytes of the first of them that are written.
    written: usize,
}

/// Finds the ends of heads in a stream that arrives in pieces.
#[derive(Default)]
struct HeadEndScanner {
    /// Length of the prefix of `\r\n\r\n` at the end of the last piece.
    matched: usize,
}

/// Runs until the process ends.
pub(crate) fn run(config: &ConstantResponseConfig) -> io::Result<()> {
    let response = prepare(config);
    let mut inbox = vec![0; INBOX_BYTES];
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(EVENTS_MAX);
    let mut listener = TcpListener::from_std(listen(config.listen)?);
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    // Bounded by the descriptor limit of the process.
    let mut connections = Slab::new();
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &events {
            if event.token() == LISTENER {
                accept(&listener, &poll, &mut connections)?;
            // An event of a connection that was removed in this round may reach its successor in
            // the slot, for which it has no effect.
            } else if let Some(connection) = connections.get_mut(event.token().0)
                && !connection.serve(event, &mut inbox, &response).unwrap_or(false)
            {
                connections.remove(event.token().0);
            }
        }
    }
}

fn accept(listener: &TcpListener, poll: &Poll, connections: &mut Slab<ClientConnection>) -> io::Result<()> {
    // Any error ends this round: no pending connection, or no descriptor.
    while let Ok((mut stream, _)) = listener.accept() {
        stream.set_nodelay(true)?;
        let entry = connections.vacant_entry();
        poll.registry().register(&mut stream, Token(entry.key()), Interest::READABLE | Interest::WRITABLE)?;
        entry.insert(ClientConnection { stream, ends: HeadEndScanner::default(), pending: 0, written: 0 });
    }
    Ok(())
}

fn prepare(config: &ConstantResponseConfig) -> Vec<u8> {
    let ConstantResponseConfig { status, body_bytes, target, .. } = config;
    let tag = origin::etag(target.as_bytes());
    let mut response =
        format!("HTTP/1.1 {status} Constant\r\nContent-Length: {body_bytes}\r\nETag: {tag}\r\n\r\n").into_bytes();
    response.extend_from_slice(&origin::body(*body_bytes));
    response
}

impl ClientConnection {
    /// Reads and responds until either would block; `false` once the client has closed.
    fn serve(&mut self, event: &Event, inbox: &mut [u8], response: &[u8]) -> io::Result<bool> {
        loop {
            if !self.write(response)? {
                return Ok(true);
            }
            let bytes = match self.stream.read(inbox) {
                Ok(0) => return Ok(false),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            self.pending += self.ends.count(&inbox[..bytes]);
            // A short read means that no bytes are left (epoll(7)), unless the end of the stream
            // has arrived too.
            if bytes < inbox.len() && !event.is_read_closed() {
                self.write(response)?;
                return Ok(true);
            }
        }
    }

    /// Writes the pending responses; `false` if the socket buffer is full.
    fn write(&mut self, response: &[u8]) -> io::Result<bool> {
        while self.pending > 0 {
            match self.stream.write(&response[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            if self.written == response.len() {
                self.written = 0;
                self.pending -= 1;
            }
        }
        Ok(true)
    }
}

impl HeadEndScanner {
    fn count(&mut self, mut piece: &[u8]) -> usize {
        let mut count = 0;
        // Bytes are compared one by one only within a partial match.
        while self.matched > 0 {
            let Some((&byte, rest)) = piece.split_first() else { return count };
            self.matched = match (byte, self.matched) {
                (byte, matched) if byte == HEAD_END[matched] => matched + 1,
                (b'\r', _) => 1,
                _ => 0,
            };
            if self.matched == HEAD_END.len() {
                (count, self.matched) = (count + 1, 0);
            }
            piece = rest;
        }
        let mut after = 0;
        for at in memmem::find_iter(piece, HEAD_END) {
            (count, after) = (count + 1, at + HEAD_END.len());
        }
        let rest = &piece[after..];
        let begun = (1..HEAD_END.len()).rev().find(|length| rest.ends_with(&HEAD_END[..*length]));
        self.matched = begun.unwrap_or(0);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(pieces: &[&[u8]]) -> usize {
        let mut ends = HeadEndScanner::default();
        pieces.iter().map(|piece| ends.count(piece)).sum()
    }

    #[test]
    fn partial_head_ends_are_not_counted() {
        for pieces in [&[b"".as_slice()][..], &[b"a\r\n"], &[b"\r\n\r", b"\r\n"], &[b"\r\n", b"x\r\n"], &[b"\n\r\n\r"]]
        {
            assert_eq!(count(pieces), 0, "{pieces:?}");
        }
    }

    #[test]
    fn head_ends_are_counted_for_any_split_of_the_stream() {
        let stream = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /\r\n\r\r\n\r\n\r\n\r\n";
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let pieces = [&stream[..first], &stream[first..second], &stream[second..]];
                assert_eq!(count(&pieces), 3, "{first} {second}");
            }
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(count(&bytes), 3);
    }

    #[test]
    fn response_equals_that_of_the_origin_for_its_target() {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = ConstantResponseConfig { listen, status: 429, body_bytes: 3, target: "/a".to_owned() };
        let expected =
            format!("HTTP/1.1 429 Constant\r\nContent-Length: 3\r\nETag: {}\r\n\r\nabc", origin::etag(b"/a"));
        assert_eq!(String::from_utf8(prepare(&config)), Ok(expected));
    }
}
