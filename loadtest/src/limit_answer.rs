//! The limit of answering: an epoll loop that writes one prepared answer for each end of a request's head, and reads nothing else.
//!
//! No server that parses, decides or looks anything up can be faster. It is right only for requests without a body.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;

use memchr::memmem;
use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

use crate::listen::listen;
use crate::origin;

const LISTENER: Token = Token(usize::MAX);
const EVENTS_MAX: usize = 1_024;
/// Requests of the load are far smaller, so that one read takes all there is.
const INBOX_BYTES: usize = 16 << 10;
const HEAD_END: &[u8; 4] = b"\r\n\r\n";

/// What is answered.
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) status: u16,
    pub(crate) body_bytes: usize,
    /// Its entity tag is told, whatever is asked for.
    pub(crate) target: String,
}

struct Connection {
    stream: TcpStream,
    ends: HeadEnds,
    /// Answers that are not yet written as a whole.
    owed: usize,
    /// Bytes of the first of them that are.
    written: usize,
}

/// Finds the ends of heads in a stream that comes in pieces.
#[derive(Default)]
struct HeadEnds {
    /// How much of `\r\n\r\n` the last piece ended with.
    matched: usize,
}

/// Runs until the process ends.
pub(crate) fn run(settings: &Settings) -> io::Result<()> {
    let answer = prepare(settings);
    let mut inbox = vec![0; INBOX_BYTES];
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(EVENTS_MAX);
    let mut listener = TcpListener::from_std(listen(settings.listen)?);
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    // Bounded by the descriptors that this process may open.
    let mut connections = Slab::new();
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &events {
            if event.token() == LISTENER {
                accept(&listener, &poll, &mut connections)?;
            // An event of a connection that ended in this same round may meet its successor, which then finds nothing to do.
            } else if let Some(connection) = connections.get_mut(event.token().0)
                && !connection.serve(event, &mut inbox, &answer).unwrap_or(false)
            {
                connections.remove(event.token().0);
            }
        }
    }
}

fn accept(listener: &TcpListener, poll: &Poll, connections: &mut Slab<Connection>) -> io::Result<()> {
    // Any error ends this round: there is no more to accept, or no descriptor for it.
    while let Ok((mut stream, _)) = listener.accept() {
        stream.set_nodelay(true)?;
        let entry = connections.vacant_entry();
        poll.registry().register(&mut stream, Token(entry.key()), Interest::READABLE | Interest::WRITABLE)?;
        entry.insert(Connection { stream, ends: HeadEnds::default(), owed: 0, written: 0 });
    }
    Ok(())
}

fn prepare(settings: &Settings) -> Vec<u8> {
    let Settings { status, body_bytes, target, .. } = settings;
    let tag = origin::etag(target.as_bytes());
    let mut answer =
        format!("HTTP/1.1 {status} Constant\r\nContent-Length: {body_bytes}\r\nETag: {tag}\r\n\r\n").into_bytes();
    answer.extend_from_slice(&origin::body(*body_bytes));
    answer
}

impl Connection {
    /// Reads and answers until either would block; `false` when the client has ended.
    fn serve(&mut self, event: &Event, inbox: &mut [u8], answer: &[u8]) -> io::Result<bool> {
        loop {
            if !self.write(answer)? {
                return Ok(true);
            }
            let bytes = match self.stream.read(inbox) {
                Ok(0) => return Ok(false),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            self.owed += self.ends.count(&inbox[..bytes]);
            // A short read means that nothing is left (epoll(7)), unless the end has come as well.
            if bytes < inbox.len() && !event.is_read_closed() {
                self.write(answer)?;
                return Ok(true);
            }
        }
    }

    /// Writes what is owed; `false` when the client has no room for all of it.
    fn write(&mut self, answer: &[u8]) -> io::Result<bool> {
        while self.owed > 0 {
            match self.stream.write(&answer[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            if self.written == answer.len() {
                self.written = 0;
                self.owed -= 1;
            }
        }
        Ok(true)
    }
}

impl HeadEnds {
    fn count(&mut self, mut piece: &[u8]) -> usize {
        let mut count = 0;
        // Only while an end has begun is each byte looked at.
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
        let mut ends = HeadEnds::default();
        pieces.iter().map(|piece| ends.count(piece)).sum()
    }

    #[test]
    fn what_only_resembles_an_end_is_none() {
        for pieces in [&[b"".as_slice()][..], &[b"a\r\n"], &[b"\r\n\r", b"\r\n"], &[b"\r\n", b"x\r\n"], &[b"\n\r\n\r"]]
        {
            assert_eq!(count(pieces), 0, "{pieces:?}");
        }
    }

    #[test]
    fn ends_are_counted_however_the_stream_is_cut() {
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
    fn the_answer_is_the_origins_for_its_target() {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let settings = Settings { listen, status: 429, body_bytes: 3, target: "/a".to_owned() };
        let expected =
            format!("HTTP/1.1 429 Constant\r\nContent-Length: 3\r\nETag: {}\r\n\r\nabc", origin::etag(b"/a"));
        assert_eq!(String::from_utf8(prepare(&settings)), Ok(expected));
    }
}
