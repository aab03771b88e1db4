//! A client that sends what it is told and reads HTTP/1.1 answers strictly: fields in order, repeated ones kept,
//! and a difference between a body that ended and one that was cut.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::PATIENCE;

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By its length, its last chunk, or the end of a connection that was to end it.
    Whole,
    /// The connection ended inside it.
    Cut,
}

/// An answer as it arrived.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    pub end: End,
    /// From the last byte sent to the first byte read.
    pub first_byte: Duration,
}

impl Answer {
    /// The only or first value of a field.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    /// Every line of a field, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let lines = self.fields.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        lines.map(|(_, value)| value.as_str()).collect()
    }

    /// The gateway's own member of `Cache-Status`.
    #[track_caller]
    pub fn cache_status(&self) -> &str {
        let last = self.all("cache-status").last().copied();
        last.unwrap_or_else(|| panic!("no Cache-Status in {self:?}"))
    }

    #[track_caller]
    pub fn is_hit(&self) -> bool {
        self.cache_status().contains("; hit")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One connection. The stream is a socket, or TLS over one.
pub struct Client<S = TcpStream> {
    stream: S,
    buffer: Vec<u8>,
    sent: Instant,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("a connection");
        Client::over_socket(stream)
    }

    /// From another loopback address, such as 127.0.0.2: another device to the gateway.
    pub fn connect_from(source: IpAddr, address: SocketAddr) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(source, 0).into()).expect("a loopback address");
        socket.connect_timeout(&address.into(), PATIENCE).expect("a connection");
        Client::over_socket(socket.into())
    }

    fn over_socket(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("a live socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a live socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a live socket");
        Client::over(stream)
    }

    pub fn set_patience(&self, patience: Duration) {
        self.stream.set_read_timeout(Some(patience)).expect("a live socket");
    }

    /// Says that nothing more will be sent.
    pub fn finish(&self) {
        drop(self.stream.shutdown(std::net::Shutdown::Write));
    }

    /// Ends the connection with a reset instead of in order.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("a live socket");
    }

    /// Whether the gateway ends the connection within `deadline`, without another byte.
    pub fn is_closed_within(&mut self, deadline: Duration) -> bool {
        self.set_patience(deadline);
        let mut byte = [0];
        let read = self.stream.read(&mut byte);
        self.set_patience(PATIENCE);
        self.buffer.is_empty()
            && match read {
                Ok(count) => count == 0,
                Err(error) => !is_timeout(&error),
            }
    }
}

impl<S: Read + Write> Client<S> {
    pub fn over(stream: S) -> Self {
        Client { stream, buffer: Vec::new(), sent: Instant::now() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes.as_ref()).expect("a gateway that reads");
    }

    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let sent = self.stream.write_all(bytes).and_then(|()| self.stream.flush());
        self.sent = Instant::now();
        sent
    }

    /// Sends a GET and leaves its answer to be read.
    pub fn ask(&mut self, target: &str, fields: &[(&str, &str)]) {
        self.send(request("GET", target, fields, b""));
    }

    #[track_caller]
    pub fn get(&mut self, target: &str, fields: &[(&str, &str)]) -> Answer {
        self.request("GET", target, fields, b"")
    }

    #[track_caller]
    pub fn request(&mut self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Answer {
        self.send(request(method, target, fields, body));
        self.answer_to(method)
    }

    /// The next answer, to a request with a body in its answer.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        self.answer_to("GET")
    }

    #[track_caller]
    pub fn answer_to(&mut self, method: &str) -> Answer {
        let answer = self.head();
        self.rest(answer, method)
    }

    /// The head of the next answer; its body is left to be read.
    #[track_caller]
    pub fn head(&mut self) -> Answer {
        match self.try_head() {
            Ok(answer) => answer,
            Err(error) => panic!("no answer: {error}; received {:?}", String::from_utf8_lossy(&self.buffer)),
        }
    }

    pub fn try_head(&mut self) -> std::io::Result<Answer> {
        let mut first_byte = None;
        let end = loop {
            if !self.buffer.is_empty() {
                first_byte.get_or_insert_with(|| self.sent.elapsed());
            }
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if self.more()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        };
        let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
        let head = String::from_utf8_lossy(&head[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap_or_default();
        let code = status.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status =
            code.ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, format!("status line {status:?}")))?;
        let fields = lines.filter_map(field_of).collect();
        let first_byte = first_byte.unwrap_or_default();
        Ok(Answer { status, fields, body: Vec::new(), trailers: Vec::new(), end: End::Whole, first_byte })
    }

    /// Reads the body that belongs to a head; interim answers and those to HEAD have none.
    #[track_caller]
    pub fn rest(&mut self, mut answer: Answer, method: &str) -> Answer {
        if method == "HEAD" || matches!(answer.status, 100..=199 | 204 | 304) {
            return answer;
        }
        let is_whole = if answer.field("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
        {
            self.chunks(&mut answer.body, &mut answer.trailers)
        } else if let Some(length) = answer.field("content-length") {
            let length = length.parse().expect("a content length");
            let is_whole = self.fill(length);
            answer.body.extend(self.buffer.drain(..length.min(self.buffer.len())));
            is_whole
        } else {
            let ends_in_order = loop {
                match self.more() {
                    Ok(0) => break true,
                    Ok(_) => {}
                    Err(_) => break false,
                }
            };
            answer.body.append(&mut self.buffer);
            ends_in_order
        };
        answer.end = if is_whole { End::Whole } else { End::Cut };
        answer
    }

    /// Reads `count` bytes of a body that is still under way, as the wire has them.
    #[track_caller]
    pub fn some(&mut self, count: usize) -> Vec<u8> {
        assert!(self.fill(count), "the connection ended early: {:?}", String::from_utf8_lossy(&self.buffer));
        self.buffer.drain(..count).collect()
    }

    /// Everything until the other side ends the connection, in order or not, or patience ends.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        while self.more().is_ok_and(|count| count > 0) {}
        std::mem::take(&mut self.buffer)
    }

    fn chunks(&mut self, body: &mut Vec<u8>, trailers: &mut Vec<(String, String)>) -> bool {
        loop {
            let Some(line) = self.line() else { return false };
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("chunk size {size:?}"));
            if size == 0 {
                // Trailer fields, then an empty line.
                return std::iter::from_fn(|| self.line()).any(|line| {
                    trailers.extend(field_of(&line));
                    line.is_empty()
                });
            }
            let is_whole = self.fill(size + 2);
            body.extend(self.buffer.drain(..size.min(self.buffer.len())));
            if !is_whole {
                return false;
            }
            let end: Vec<u8> = self.buffer.drain(..2).collect();
            assert_eq!(end, b"\r\n", "the end of a chunk");
        }
    }

    fn line(&mut self) -> Option<String> {
        let mut seen = 0;
        let end = loop {
            if let Some(at) = self.buffer[seen..].windows(2).position(|window| window == b"\r\n") {
                break seen + at;
            }
            seen = self.buffer.len().saturating_sub(1);
            if self.more().unwrap_or(0) == 0 {
                return None;
            }
        };
        let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 2);
        Some(line)
    }

    fn fill(&mut self, count: usize) -> bool {
        while self.buffer.len() < count {
            if self.more().unwrap_or(0) == 0 {
                return false;
            }
        }
        true
    }

    fn more(&mut self) -> std::io::Result<usize> {
        let mut chunk = [0; 16 * 1024];
        let count = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok(count)
    }
}

fn field_of(line: &str) -> Option<(String, String)> {
    line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
}

pub fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The bytes of a request; `Host` is added unless given, and `Content-Length` where there is a body.
pub fn request(method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let has = |name: &str| fields.iter().any(|(key, _)| key.eq_ignore_ascii_case(name));
    let mut head = format!("{method} {target} HTTP/1.1\r\n");
    if !has("host") {
        head.push_str("Host: gate.test\r\n");
    }
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() && !has("content-length") && !has("transfer-encoding") {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// `body` in chunks of at most `size` bytes.
pub fn chunked(body: &[u8], size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + body.len() / size * 12 + 16);
    for chunk in body.chunks(size) {
        bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}
