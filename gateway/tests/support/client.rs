//! A client that sends raw bytes and parses HTTP/1.1 responses strictly: fields in order, repeated
//! fields kept, and complete bodies distinguished from truncated ones.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::STEP_TIMEOUT;

/// End of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// By its length, its last chunk, or a connection close that delimits it.
    Complete,
    /// The connection closed before the end of the body.
    Truncated,
}

/// A response as received.
#[derive(Clone, Debug)]
pub struct ClientResponse {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    pub end: BodyEnd,
    /// From the last byte sent to the first byte read.
    pub first_byte: Duration,
}

impl ClientResponse {
    /// The first value of a field.
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

/// One connection over a socket or TLS.
pub struct Client<S = TcpStream> {
    stream: S,
    buffer: Vec<u8>,
    sent: Instant,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("a connection");
        Client::from_socket(stream)
    }

    /// Connects from another loopback address, such as 127.0.0.2, which the gateway treats as
    /// another device.
    pub fn connect_from(source: IpAddr, address: SocketAddr) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(source, 0).into()).expect("a loopback address");
        socket.connect_timeout(&address.into(), STEP_TIMEOUT).expect("a connection");
        Client::from_socket(socket.into())
    }

    fn from_socket(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("a live socket");
        stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        stream.set_write_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        Client::from_stream(stream)
    }

    pub fn set_read_timeout(&self, timeout: Duration) {
        self.stream.set_read_timeout(Some(timeout)).expect("a live socket");
    }

    /// Shuts down the sending direction.
    pub fn finish(&self) {
        drop(self.stream.shutdown(std::net::Shutdown::Write));
    }

    /// Closes the connection with a reset (RST).
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("a live socket");
    }

    /// Whether the gateway closes the connection within `deadline` without sending another byte.
    pub fn is_closed_within(&mut self, deadline: Duration) -> bool {
        self.set_read_timeout(deadline);
        let mut byte = [0];
        let read = self.stream.read(&mut byte);
        self.set_read_timeout(STEP_TIMEOUT);
        self.buffer.is_empty()
            && match read {
                Ok(count) => count == 0,
                Err(error) => !is_timeout(&error),
            }
    }
}

impl<S: Read + Write> Client<S> {
    pub fn from_stream(stream: S) -> Self {
        Client { stream, buffer: Vec::new(), sent: Instant::now() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes.as_ref()).expect("the gateway reads");
    }

    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let sent = self.stream.write_all(bytes).and_then(|()| self.stream.flush());
        self.sent = Instant::now();
        sent
    }

    /// Sends a GET without reading the response.
    pub fn send_get(&mut self, target: &str, fields: &[(&str, &str)]) {
        self.send(request("GET", target, fields, b""));
    }

    #[track_caller]
    pub fn get(&mut self, target: &str, fields: &[(&str, &str)]) -> ClientResponse {
        self.request("GET", target, fields, b"")
    }

    #[track_caller]
    #[expect(clippy::too_many_arguments, reason = "the parts of an HTTP request, passed by many tests")]
    pub fn request(&mut self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> ClientResponse {
        self.send(request(method, target, fields, body));
        self.read_response_to(method)
    }

    /// Reads the next response, as for a GET.
    #[track_caller]
    pub fn read_response(&mut self) -> ClientResponse {
        self.read_response_to("GET")
    }

    #[track_caller]
    pub fn read_response_to(&mut self, method: &str) -> ClientResponse {
        let response = self.read_head();
        self.read_body(response, method)
    }

    /// Reads the head of the next response, but not its body.
    #[track_caller]
    pub fn read_head(&mut self) -> ClientResponse {
        match self.try_read_head() {
            Ok(response) => response,
            Err(error) => panic!("no response: {error}; received {:?}", String::from_utf8_lossy(&self.buffer)),
        }
    }

    pub fn try_read_head(&mut self) -> std::io::Result<ClientResponse> {
        let mut first_byte = None;
        let end = loop {
            if !self.buffer.is_empty() {
                first_byte.get_or_insert_with(|| self.sent.elapsed());
            }
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if self.read_more()? == 0 {
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
        let fields = lines.filter_map(parse_field).collect();
        let first_byte = first_byte.unwrap_or_default();
        Ok(ClientResponse {
            status,
            fields,
            body: Vec::new(),
            trailers: Vec::new(),
            end: BodyEnd::Complete,
            first_byte,
        })
    }

    /// Reads the body after a head. Interim responses and responses to HEAD have none.
    #[track_caller]
    pub fn read_body(&mut self, mut response: ClientResponse, method: &str) -> ClientResponse {
        if method == "HEAD" || matches!(response.status, 100..=199 | 204 | 304) {
            return response;
        }
        let is_complete =
            if response.field("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
                self.read_chunks(&mut response.body, &mut response.trailers)
            } else if let Some(length) = response.field("content-length") {
                let length = length.parse().expect("a content length");
                let is_complete = self.buffer_at_least(length);
                response.body.extend(self.buffer.drain(..length.min(self.buffer.len())));
                is_complete
            } else {
                let is_orderly_close = loop {
                    match self.read_more() {
                        Ok(0) => break true,
                        Ok(_) => {}
                        Err(_) => break false,
                    }
                };
                response.body.append(&mut self.buffer);
                is_orderly_close
            };
        response.end = if is_complete { BodyEnd::Complete } else { BodyEnd::Truncated };
        response
    }

    /// Reads `count` raw bytes of a body.
    #[track_caller]
    pub fn read_bytes(&mut self, count: usize) -> Vec<u8> {
        assert!(
            self.buffer_at_least(count),
            "the connection closed early: {:?}",
            String::from_utf8_lossy(&self.buffer)
        );
        self.buffer.drain(..count).collect()
    }

    /// Reads until the peer closes or resets the connection, or the read timeout expires.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        while self.read_more().is_ok_and(|count| count > 0) {}
        std::mem::take(&mut self.buffer)
    }

    fn read_chunks(&mut self, body: &mut Vec<u8>, trailers: &mut Vec<(String, String)>) -> bool {
        loop {
            let Some(line) = self.read_line() else { return false };
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("chunk size {size:?}"));
            if size == 0 {
                // Trailer fields, then an empty line.
                return std::iter::from_fn(|| self.read_line()).any(|line| {
                    trailers.extend(parse_field(&line));
                    line.is_empty()
                });
            }
            let is_complete = self.buffer_at_least(size + 2);
            body.extend(self.buffer.drain(..size.min(self.buffer.len())));
            if !is_complete {
                return false;
            }
            let end: Vec<u8> = self.buffer.drain(..2).collect();
            assert_eq!(end, b"\r\n", "the end of a chunk");
        }
    }

    fn read_line(&mut self) -> Option<String> {
        let mut scanned = 0;
        let end = loop {
            if let Some(at) = self.buffer[scanned..].windows(2).position(|window| window == b"\r\n") {
                break scanned + at;
            }
            scanned = self.buffer.len().saturating_sub(1);
            if self.read_more().unwrap_or(0) == 0 {
                return None;
            }
        };
        let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 2);
        Some(line)
    }

    fn buffer_at_least(&mut self, count: usize) -> bool {
        while self.buffer.len() < count {
            if self.read_more().unwrap_or(0) == 0 {
                return false;
            }
        }
        true
    }

    fn read_more(&mut self) -> std::io::Result<usize> {
        let mut chunk = [0; 16 * 1024];
        let count = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok(count)
    }
}

fn parse_field(line: &str) -> Option<(String, String)> {
    line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
}

/// The data of a chunk, which is read with its end: none of the last one.
pub fn read_chunk(mut read: impl FnMut(usize) -> Vec<u8>) -> Vec<u8> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.extend(read(1));
    }
    let size = usize::from_str_radix(String::from_utf8_lossy(&line).trim_end(), 16).expect("a size");
    let mut chunk = read(size + 2);
    assert!(chunk.ends_with(b"\r\n"), "{size} bytes");
    chunk.truncate(size);
    chunk
}

pub fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Serialises a request. Adds `Host` unless given, and `Content-Length` if there is a body.
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

/// Encodes `body` in chunks of at most `size` bytes.
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
