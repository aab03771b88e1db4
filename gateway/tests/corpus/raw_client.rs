//! A raw client connection whose responses are parsed strictly, and the ways to split sent bytes.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use super::reference_parser::{self, Message, ParseResult};
use super::support::STEP_TIMEOUT;
use super::support::client::is_timeout;

/// Maximum wait for bytes that should arrive at once.
const READ_TIMEOUT: Duration = Duration::from_secs(4);

/// How bytes are split into writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    Whole,
    Halves,
    Bytes,
}

impl Split {
    /// The splits to run for so many bytes; byte by byte only for short inputs, where it is fast.
    pub(crate) fn for_length(length: usize) -> &'static [Split] {
        const ALL: [Split; 3] = [Split::Whole, Split::Halves, Split::Bytes];
        if length < 300 { &ALL } else { &ALL[..2] }
    }

    /// Splits `bytes`. The position of the half is pseudo-random and the same in every run.
    pub(crate) fn apply(self, bytes: &[u8], seed: usize) -> Vec<Vec<u8>> {
        match self {
            Split::Halves if bytes.len() > 1 => {
                let at = 1 + seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29) % (bytes.len() - 1);
                vec![bytes[..at].to_vec(), bytes[at..].to_vec()]
            }
            Split::Bytes => bytes.iter().map(|byte| vec![*byte]).collect(),
            Split::Whole | Split::Halves => vec![bytes.to_vec()],
        }
    }
}

/// A connection to the gateway.
pub(crate) struct RawClient {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Set when the gateway has closed the connection: whether it was an orderly close.
    closed: Option<bool>,
}

impl RawClient {
    /// Connects from its own loopback address, which identifies the client at the origin.
    pub(crate) fn connect(from: IpAddr, to: SocketAddr) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(from, 0).into()).expect("a loopback address");
        socket.connect_timeout(&to.into(), STEP_TIMEOUT).expect("a connection");
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).expect("a live socket");
        stream.set_read_timeout(Some(READ_TIMEOUT)).expect("a live socket");
        stream.set_write_timeout(Some(READ_TIMEOUT)).expect("a live socket");
        RawClient { stream, buffer: Vec::new(), closed: None }
    }

    /// Sends the pieces one by one; false if the gateway no longer accepts them.
    pub(crate) fn send(&mut self, pieces: &[Vec<u8>]) -> bool {
        for (number, piece) in pieces.iter().enumerate() {
            // Usually long enough for the gateway to read the previous piece.
            match pieces.len() {
                _ if number == 0 => {}
                2 => std::thread::sleep(Duration::from_millis(1)),
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
            if self.stream.write_all(piece).is_err() {
                return false;
            }
        }
        true
    }

    /// Shuts down the sending side.
    pub(crate) fn shutdown_write(&self) {
        drop(self.stream.shutdown(Shutdown::Write));
    }

    /// Bytes received and not yet parsed as a response.
    pub(crate) fn unparsed(&self) -> &[u8] {
        &self.buffer
    }

    fn read_more(&mut self) -> Result<(), String> {
        let mut space = [0; 16 << 10];
        match self.stream.read(&mut space) {
            Ok(0) => self.closed = Some(true),
            Ok(count) => self.buffer.extend_from_slice(&space[..count]),
            Err(error) if is_timeout(&error) => return Err(format!("no byte for {READ_TIMEOUT:?}")),
            Err(_) => self.closed = Some(false),
        }
        Ok(())
    }

    /// The next response, interim or final: complete, or the part before the end of the connection.
    pub(crate) fn next_response(&mut self, is_head: bool) -> Result<ParseResult, String> {
        loop {
            match reference_parser::response(&self.buffer, is_head, self.closed == Some(true))? {
                ParseResult::Complete(message) => {
                    self.buffer.drain(..message.length);
                    return Ok(ParseResult::Complete(message));
                }
                part if self.closed.is_some() => return Ok(part),
                ParseResult::Partial(_) => self.read_more()?,
            }
        }
    }

    /// The next complete final response, after any number of interim responses.
    pub(crate) fn final_response(&mut self, is_head: bool) -> Result<Message, String> {
        self.final_response_after(is_head, usize::MAX)
    }

    /// Likewise, after at most `interim_max` interim responses.
    pub(crate) fn final_response_after(&mut self, is_head: bool, interim_max: usize) -> Result<Message, String> {
        let mut interim = 0;
        loop {
            match self.next_response(is_head)? {
                ParseResult::Complete(message) if (100..200).contains(&message.status()) && message.status() != 101 => {
                    interim += 1;
                    if interim > interim_max {
                        return Err(format!("unexpected interim response: {:?}", message.start));
                    }
                }
                ParseResult::Complete(message) => return Ok(message),
                ParseResult::Partial(None) if self.buffer.is_empty() => {
                    return Err("the connection ended without a response".into());
                }
                ParseResult::Partial(part) => return Err(format!("the connection ended inside a response: {part:?}")),
            }
        }
    }

    /// The next `count` raw bytes, or the bytes before the end of the connection.
    pub(crate) fn raw(&mut self, count: usize) -> Result<Vec<u8>, String> {
        while self.buffer.len() < count && self.closed.is_none() {
            self.read_more()?;
        }
        Ok(self.buffer.drain(..count.min(self.buffer.len())).collect())
    }

    /// Reads until the gateway closes the connection; returns whether it was an orderly close.
    pub(crate) fn read_until_closed(&mut self) -> Result<bool, String> {
        loop {
            if let Some(is_orderly) = self.closed {
                return Ok(is_orderly);
            }
            self.read_more()?;
        }
    }
}
