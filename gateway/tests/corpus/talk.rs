//! A client's raw connection, read strictly, and the ways in which bytes are cut into pieces.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use super::support::PATIENCE;
use super::support::client::is_timeout;
use super::wire::{self, Message, Read};

/// The longest wait for bytes that should come at once.
const WAIT: Duration = Duration::from_secs(4);

/// How bytes are cut on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cutting {
    Whole,
    Halves,
    Bytes,
}

impl Cutting {
    /// The ways worth playing for so many bytes: one at a time only where that is quick.
    pub(crate) fn of(length: usize) -> &'static [Cutting] {
        const ALL: [Cutting; 3] = [Cutting::Whole, Cutting::Halves, Cutting::Bytes];
        if length < 300 { &ALL } else { &ALL[..2] }
    }

    /// Cuts `bytes`; the place of the half is pseudo-random and the same in every run.
    pub(crate) fn cut(self, bytes: &[u8], seed: usize) -> Vec<Vec<u8>> {
        match self {
            Cutting::Halves if bytes.len() > 1 => {
                let at = 1 + seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29) % (bytes.len() - 1);
                vec![bytes[..at].to_vec(), bytes[at..].to_vec()]
            }
            Cutting::Bytes => bytes.iter().map(|byte| vec![*byte]).collect(),
            Cutting::Whole | Cutting::Halves => vec![bytes.to_vec()],
        }
    }
}

/// One connection to the gateway.
pub(crate) struct Talk {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// How the gateway ended the connection: in order or not.
    end: Option<bool>,
}

impl Talk {
    /// From a loopback address of its own, by which the origin can tell who asked.
    pub(crate) fn connect(from: IpAddr, to: SocketAddr) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(from, 0).into()).expect("a loopback address");
        socket.connect_timeout(&to.into(), PATIENCE).expect("a connection");
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).expect("a live socket");
        stream.set_read_timeout(Some(WAIT)).expect("a live socket");
        stream.set_write_timeout(Some(WAIT)).expect("a live socket");
        Talk { stream, buffer: Vec::new(), end: None }
    }

    /// Sends piece by piece; false where the gateway no longer takes them.
    pub(crate) fn send(&mut self, pieces: &[Vec<u8>]) -> bool {
        for (number, piece) in pieces.iter().enumerate() {
            // Long enough for the gateway to read what came before, most of the time.
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

    pub(crate) fn finish(&self) {
        drop(self.stream.shutdown(Shutdown::Write));
    }

    /// Bytes that arrived and belong to no answer yet.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.buffer
    }

    fn more(&mut self) -> Result<(), String> {
        let mut space = [0; 16 << 10];
        match self.stream.read(&mut space) {
            Ok(0) => self.end = Some(true),
            Ok(count) => self.buffer.extend_from_slice(&space[..count]),
            Err(error) if is_timeout(&error) => return Err(format!("nothing came for {WAIT:?}")),
            Err(_) => self.end = Some(false),
        }
        Ok(())
    }

    /// The next answer, interim ones included: whole, or as much as came before the end of the connection.
    pub(crate) fn answer(&mut self, is_head: bool) -> Result<Read, String> {
        loop {
            match wire::answer(&self.buffer, is_head, self.end == Some(true))? {
                Read::Whole(message) => {
                    self.buffer.drain(..message.length);
                    return Ok(Read::Whole(message));
                }
                part if self.end.is_some() => return Ok(part),
                Read::Part(_) => self.more()?,
            }
        }
    }

    /// The next whole answer that is not interim. Any number of interim ones may come before it.
    pub(crate) fn last_answer(&mut self, is_head: bool) -> Result<Message, String> {
        self.last_answer_after(is_head, usize::MAX)
    }

    /// Likewise, behind no more than so many interim ones.
    pub(crate) fn last_answer_after(&mut self, is_head: bool, interim_max: usize) -> Result<Message, String> {
        let mut interim = 0;
        loop {
            match self.answer(is_head)? {
                Read::Whole(message) if (100..200).contains(&message.status()) && message.status() != 101 => {
                    interim += 1;
                    if interim > interim_max {
                        return Err(format!("an interim answer that nobody may get: {:?}", message.start));
                    }
                }
                Read::Whole(message) => return Ok(message),
                Read::Part(None) if self.buffer.is_empty() => {
                    return Err("the connection ended without an answer".into());
                }
                Read::Part(part) => return Err(format!("the connection ended inside an answer: {part:?}")),
            }
        }
    }

    /// The next `count` bytes as they are, or as many as come before the end.
    pub(crate) fn raw(&mut self, count: usize) -> Result<Vec<u8>, String> {
        while self.buffer.len() < count && self.end.is_none() {
            self.more()?;
        }
        Ok(self.buffer.drain(..count.min(self.buffer.len())).collect())
    }

    /// Reads until the gateway ends the connection; says whether it did so in order.
    pub(crate) fn end(&mut self) -> Result<bool, String> {
        loop {
            if let Some(in_order) = self.end {
                return Ok(in_order);
            }
            self.more()?;
        }
    }
}
