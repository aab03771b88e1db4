//! An HTTP/2 client that writes and reads frames by hand, with TLS or without. Heads are encoded
//! without compression, and its header table has size 0, so that the status of a response is
//! readable.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::tls::{LISTEN_TLS, write_certificate};
use super::{Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const PRIORITY_UPDATE: u8 = 0x10;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 0xb;

/// One frame.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32) -> Self {
        Frame { kind, flags, stream, payload: Vec::new() }
    }

    pub fn with(mut self, payload: impl AsRef<[u8]>) -> Self {
        self.payload = payload.as_ref().to_vec();
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("short").to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], self.kind, self.flags];
        bytes.extend_from_slice(&self.stream.to_be_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// The error code of RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("four bytes"))
    }

    /// The status of a response head; 0 for trailers.
    pub fn status(&self) -> u16 {
        let mut block = &self.payload[..];
        while block.first().is_some_and(|byte| byte & 0xe0 == 0x20) {
            block = &block[1..];
        }
        match block {
            [index @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(index - 0x88)],
            [name @ (0x08 | 0x48 | 0x18), length, rest @ ..] if *name != 0 && length & 0x80 != 0 => {
                huffman_number(rest)
            }
            [0x08, 3, digits @ ..] => digits[..3].iter().fold(0, |number, digit| number * 10 + u16::from(digit - b'0')),
            _ => 0,
        }
    }
}

/// Three digits in the Huffman code of HPACK (RFC 7541 appendix B).
fn huffman_number(bytes: &[u8]) -> u16 {
    let bits = (0..3).fold(0, |bits, at| bits << 8 | u32::from(bytes.get(at).copied().unwrap_or_default()));
    let mut left = 24;
    let mut take = |count: u32| {
        left -= count;
        bits >> left & ((1 << count) - 1)
    };
    (0..3).fold(0, |number, _| {
        let digit = match take(5) {
            short @ 0..3 => short,
            long => (long << 1 | take(1)) - 0b01_1001 + 3,
        };
        number * 10 + u16::try_from(digit).expect("a digit")
    })
}

/// A head block without compression: literals without indexing.
pub fn head_block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        push_text(&mut block, name);
        push_text(&mut block, value);
    }
    block
}

/// A string with its length, an integer with a prefix of 7 bits (RFC 7541 section 5.1).
fn push_text(block: &mut Vec<u8>, text: &str) {
    let Some(mut rest) = text.len().checked_sub(0x7f) else {
        block.push(text.len() as u8);
        return block.extend_from_slice(text.as_bytes());
    };
    block.push(0x7f);
    while rest >= 0x80 {
        block.push((rest % 0x80) as u8 | 0x80);
        rest /= 0x80;
    }
    block.push(rest as u8);
    block.extend_from_slice(text.as_bytes());
}

/// The head of a request for `path`.
pub fn request(stream: u32, method: &str, path: &str) -> Frame {
    request_with(stream, (method, path), &[])
}

/// As `request`, with more fields.
pub fn request_with(stream: u32, (method, path): (&str, &str), fields: &[(&str, &str)]) -> Frame {
    let mut all = vec![(":method", method), (":scheme", "https"), (":path", path), (":authority", "gate.test")];
    all.extend_from_slice(fields);
    Frame::new(HEADERS, END_HEADERS, stream).with(head_block(&all))
}

/// A GET that ends its stream.
pub fn get(stream: u32, path: &str) -> Frame {
    let mut frame = request(stream, "GET", path);
    frame.flags |= END_STREAM;
    frame
}

/// The stream below a connection.
enum ClientStream {
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
    Plain(TcpStream),
}

impl ClientStream {
    fn socket(&self) -> &TcpStream {
        match self {
            ClientStream::Tls(stream) => &stream.sock,
            ClientStream::Plain(stream) => stream,
        }
    }
}

impl Read for ClientStream {
    fn read(&mut self, space: &mut [u8]) -> std::io::Result<usize> {
        match self {
            ClientStream::Tls(stream) => stream.read(space),
            ClientStream::Plain(stream) => stream.read(space),
        }
    }
}

impl Write for ClientStream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            ClientStream::Tls(stream) => stream.write(bytes),
            ClientStream::Plain(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            ClientStream::Tls(stream) => stream.flush(),
            ClientStream::Plain(stream) => stream.flush(),
        }
    }
}

/// One connection.
pub struct FrameClient {
    stream: ClientStream,
    received: Vec<u8>,
    /// The code of the last GOAWAY.
    goaway: Option<u32>,
}

impl FrameClient {
    /// A connection after the TLS handshake: not even the preface was sent.
    pub fn connect_silent(gateway: &Gateway, trusted: &CertificateDer<'static>) -> Self {
        Self::try_connect_silent(gateway.address, trusted).expect("a connection")
    }

    /// As `connect_silent`, to a gateway that may refuse the connection.
    pub fn try_connect_silent(address: SocketAddr, trusted: &CertificateDer<'static>) -> std::io::Result<Self> {
        Self::handshake(TcpStream::connect_timeout(&address, STEP_TIMEOUT)?, trusted)
    }

    /// A connection without TLS: nothing was sent.
    pub fn connect_plain(address: SocketAddr) -> Self {
        let socket = TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("a connection");
        socket.set_nodelay(true).expect("a live socket");
        socket.set_write_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        FrameClient { stream: ClientStream::Plain(socket), received: Vec::new(), goaway: None }
    }

    /// As `connect`, from this address.
    pub fn connect_from(from: IpAddr, gateway: &Gateway, trusted: &CertificateDer<'static>) -> Self {
        Self::connect_prepared(gateway, trusted, WINDOW, |socket| {
            socket.bind(&SocketAddr::new(from, 0).into()).expect("a local address");
        })
    }

    /// As `connect`, over a socket that is prepared before it connects.
    pub fn connect_prepared(
        gateway: &Gateway,
        trusted: &CertificateDer<'static>,
        window: u32,
        prepare: impl FnOnce(&socket2::Socket),
    ) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        prepare(&socket);
        socket.connect_timeout(&gateway.address.into(), STEP_TIMEOUT).expect("a connection");
        let mut client = Self::handshake(socket.into(), trusted).expect("a connection");
        client.send_preface(window);
        client
    }

    fn handshake(socket: TcpStream, trusted: &CertificateDer<'static>) -> std::io::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(trusted.clone()).expect("a usable certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = builder.expect("TLS 1.2 and 1.3").with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from("gate.test").expect("a name");
        let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
        socket.set_nodelay(true).expect("a live socket");
        socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        socket.set_write_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
        Ok(FrameClient { stream: ClientStream::Tls(Box::new(stream)), received: Vec::new(), goaway: None })
    }

    /// A connection whose streams have this initial window.
    pub fn connect(gateway: &Gateway, trusted: &CertificateDer<'static>, window: u32) -> Self {
        let mut client = Self::connect_silent(gateway, trusted);
        client.send_preface(window);
        client
    }

    /// Sends the preface and the settings.
    pub fn send_preface(&mut self, window: u32) {
        let mut settings = vec![0, 1, 0, 0, 0, 0, 0, 4];
        settings.extend_from_slice(&window.to_be_bytes());
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        self.send_bytes(&[&preface[..], &Frame::new(SETTINGS, 0, 0).with(settings).bytes()].concat());
        self.send(&Frame::new(SETTINGS, ACK, 0));
    }

    pub fn send(&mut self, frame: &Frame) {
        self.send_bytes(&frame.bytes());
    }

    /// Fails only if the connection lives and accepts nothing.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        if let Err(error) = self.stream.write_all(bytes).and_then(|()| self.stream.flush()) {
            assert!(!super::client::is_timeout(&error), "the gateway does not read");
        }
    }

    /// The next frame within `deadline`; `None` at the end of the connection or when time is over.
    pub fn next_within(&mut self, deadline: Duration) -> Option<Frame> {
        let start = Instant::now();
        loop {
            if let Some(frame) = self.take_frame() {
                return Some(frame);
            }
            let left = deadline.checked_sub(start.elapsed()).filter(|left| !left.is_zero())?;
            self.stream.socket().set_read_timeout(Some(left)).expect("a live socket");
            let mut space = [0; 16 << 10];
            match self.stream.read(&mut space) {
                Ok(0) => return None,
                Ok(count) => self.received.extend_from_slice(&space[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    fn take_frame(&mut self) -> Option<Frame> {
        let [a, b, c, kind, flags, s1, s2, s3, s4] = *self.received.first_chunk::<9>()?;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        let payload = self.received.get(9..9 + length)?.to_vec();
        self.received.drain(..9 + length);
        let frame = Frame { kind, flags, stream: u32::from_be_bytes([s1, s2, s3, s4]), payload };
        if kind == GOAWAY {
            self.goaway = Some(frame.code());
        }
        Some(frame)
    }

    /// The next frame of this kind; frames of other kinds are skipped.
    #[track_caller]
    pub fn expect(&mut self, kind: u8) -> Frame {
        let start = Instant::now();
        while let Some(frame) = self.next_within(STEP_TIMEOUT.saturating_sub(start.elapsed())) {
            if frame.kind == kind {
                return frame;
            }
        }
        panic!("no frame of kind {kind}");
    }

    /// The frames of a stream up to its end or reset.
    #[track_caller]
    pub fn response(&mut self, stream: u32) -> Vec<Frame> {
        let (start, mut frames) = (Instant::now(), Vec::new());
        while let Some(frame) = self.next_within(STEP_TIMEOUT.saturating_sub(start.elapsed())) {
            if frame.stream == stream {
                let is_end = frame.ends_stream() || frame.kind == RST_STREAM;
                frames.push(frame);
                if is_end {
                    return frames;
                }
            }
        }
        panic!("stream {stream} did not end: {frames:?}");
    }

    /// Whether the connection answers a PING.
    pub fn is_alive(&mut self) -> bool {
        self.send(&Frame::new(PING, 0, 0).with([7; 8]));
        let start = Instant::now();
        while let Some(frame) = self.next_within(STEP_TIMEOUT.saturating_sub(start.elapsed())) {
            if frame.kind == PING && frame.flags == ACK && frame.payload == [7; 8] {
                return true;
            }
        }
        false
    }

    /// Reads until the gateway ends the connection; `None` if it does not within `deadline`, else
    /// the code of the last GOAWAY.
    pub fn closed_within(&mut self, deadline: Duration) -> Option<Option<u32>> {
        let start = Instant::now();
        while self.next_within(deadline.saturating_sub(start.elapsed())).is_some() {}
        (start.elapsed() < deadline).then_some(self.goaway)
    }
}

/// The first window of streams by default.
pub const WINDOW: u32 = 65_535;

/// An origin, and a gateway with TLS before it.
pub struct Server {
    pub origin: Origin,
    pub gateway: Gateway,
    pub trusted: CertificateDer<'static>,
}

impl Server {
    pub fn start(origin: Origin, route: &str, rest: &str) -> Self {
        let dir = TempDir::new();
        let trusted = write_certificate(&dir);
        let config = one_route(origin.address, route, &format!("{rest}\n{LISTEN_TLS}"));
        Server { gateway: Gateway::start_in(dir, &config), origin, trusted }
    }

    /// Before `address`, in place of `origin` if it is another one. The process returns freed
    /// memory to the system at once, so that its memory is what it holds.
    pub fn measured(origin: Origin, address: SocketAddr) -> Self {
        Self { origin, ..Self::measured_with(address, "") }
    }

    /// As `measured`; `rest` adds tables.
    pub fn measured_with(address: SocketAddr, rest: &str) -> Self {
        let dir = TempDir::new();
        let trusted = write_certificate(&dir);
        let gateway = Gateway::start_with(dir, &one_route(address, "", &format!("{rest}\n{LISTEN_TLS}")), |command| {
            command.env("_RJEM_MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0");
        });
        Server { gateway, origin: Origin::start(|_| Script::ok(&[], "")), trusted }
    }

    pub fn echo(rest: &str) -> Self {
        Self::start(Origin::start(|request| Script::ok(&[], format!("{} bytes", request.body.len()))), "", rest)
    }

    pub fn connect(&self) -> FrameClient {
        FrameClient::connect(&self.gateway, &self.trusted, WINDOW)
    }
}

/// The status of the first head.
pub fn status(frames: &[Frame]) -> u16 {
    frames.iter().find(|frame| frame.kind == HEADERS).map_or(0, Frame::status)
}

/// The payloads of DATA frames.
pub fn body(frames: &[Frame]) -> Vec<u8> {
    frames.iter().filter(|frame| frame.kind == DATA).flat_map(|frame| frame.payload.clone()).collect()
}
