//! A scripted origin: runs a script for each request and records all received bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::client::is_timeout;
use super::{STEP_TIMEOUT, lock, wait_for};

/// Interval at which a waiting connection checks whether the test has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A request as received by the origin.
#[derive(Clone, Debug)]
pub struct ReceivedRequest {
    /// Index of its connection, from 0.
    pub connection: usize,
    /// Number of earlier requests to this origin.
    pub number: usize,
    pub method: String,
    pub target: String,
    pub fields: Vec<(String, String)>,
    /// The body without its framing.
    pub body: Vec<u8>,
    /// Head and body as sent on the wire.
    pub raw: Vec<u8>,
}

impl ReceivedRequest {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn all(&self, name: &str) -> Vec<&str> {
        let lines = self.fields.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        lines.map(|(_, value)| value.as_str()).collect()
    }
}

/// A gate that blocks a script until the test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }

    /// Waits until the gate is open, at most for `STEP_TIMEOUT`.
    pub fn wait(&self) {
        let guard = lock(&self.0.0);
        drop(
            self.0
                .1
                .wait_timeout_while(guard, STEP_TIMEOUT, |is_open| !*is_open)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

enum Step {
    Send(Vec<u8>),
    Fill(usize),
    Pause(Duration),
    Wait(Gate),
    Close,
    Reset,
    Hang,
}

/// Steps of the origin for one request. The connection then waits for the next request, unless the
/// script closed it.
#[derive(Default)]
pub struct Script(Vec<Step>);

impl Script {
    pub fn new() -> Self {
        Script::default()
    }

    /// A 200 response with `Content-Length` and these fields.
    pub fn ok(fields: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        Script::reply(200, fields, body)
    }

    /// A response with `Content-Length`.
    pub fn reply(status: u16, fields: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let length = body.len().to_string();
        let mut all = fields.to_vec();
        if status != 304 && status != 204 {
            all.push(("Content-Length", &length));
        }
        // One write, as real servers do, because some tests count the reads of the gateway.
        Script::new().send([head(status, &all).as_bytes(), body].concat())
    }

    /// Sends the head of a response.
    pub fn head(self, status: u16, fields: &[(&str, &str)]) -> Self {
        self.send(head(status, fields))
    }

    pub fn send(self, bytes: impl AsRef<[u8]>) -> Self {
        self.then(Step::Send(bytes.as_ref().to_vec()))
    }

    /// Sends `length` bytes `x`. A large body is not built first: fresh memory takes longer on some
    /// machines than the time in which a test expects the head.
    pub fn fill(self, length: usize) -> Self {
        self.then(Step::Fill(length))
    }

    pub fn pause(self, time: Duration) -> Self {
        self.then(Step::Pause(time))
    }

    /// Waits until the test opens the gate.
    pub fn wait(self, gate: &Gate) -> Self {
        self.then(Step::Wait(gate.clone()))
    }

    /// Closes the connection.
    pub fn close(self) -> Self {
        self.then(Step::Close)
    }

    /// Closes the connection with a reset (RST).
    pub fn reset(self) -> Self {
        self.then(Step::Reset)
    }

    /// Sends nothing until the peer closes the connection.
    pub fn hang(self) -> Self {
        self.then(Step::Hang)
    }

    fn then(mut self, step: Step) -> Self {
        self.0.push(step);
        self
    }
}

type ScriptFn = dyn Fn(&ReceivedRequest) -> Script + Send + Sync;

struct Shared {
    script: Box<ScriptFn>,
    requests: Mutex<Vec<ReceivedRequest>>,
    connections: AtomicUsize,
    bytes: AtomicUsize,
    /// Times at which the peer closed a connection, in order.
    ends: Mutex<Vec<Instant>>,
    streams: Mutex<Vec<TcpStream>>,
    is_stopped: AtomicBool,
}

/// An origin on its own port, with one thread per connection.
pub struct Origin {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

fn head(status: u16, fields: &[(&str, &str)]) -> String {
    let mut head = format!("HTTP/1.1 {status} Scripted\r\n");
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head + "\r\n"
}

/// Listens with a large backlog, so that simultaneous connections are not dropped.
fn listen(address: SocketAddr) -> TcpListener {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("an option of every socket");
    socket.bind(&address.into()).expect("a port for the origin");
    socket.listen(4_096).expect("a listening socket");
    socket.into()
}

impl Origin {
    pub fn start(script: impl Fn(&ReceivedRequest) -> Script + Send + Sync + 'static) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), script)
    }

    /// Starts on a given address, for an origin that starts or restarts later.
    pub fn start_at(address: SocketAddr, script: impl Fn(&ReceivedRequest) -> Script + Send + Sync + 'static) -> Self {
        let listener = listen(address);
        let address = listener.local_addr().expect("a bound port");
        let shared = Arc::new(Shared {
            script: Box::new(script),
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            ends: Mutex::default(),
            streams: Mutex::default(),
            is_stopped: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.is_stopped.load(Ordering::SeqCst) {
                    return;
                }
                let connection = accepting.connections.fetch_add(1, Ordering::SeqCst);
                if let Ok(copy) = stream.try_clone() {
                    lock(&accepting.streams).push(copy);
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || serve(&shared, stream, connection));
            }
        });
        Origin { address, shared }
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<ReceivedRequest> {
        lock(&self.shared.requests).clone()
    }

    /// Number of completely received requests.
    pub fn count(&self) -> usize {
        lock(&self.shared.requests).len()
    }

    pub fn last(&self) -> ReceivedRequest {
        self.requests().pop().expect("a request")
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Bytes received over all connections.
    pub fn bytes(&self) -> usize {
        self.shared.bytes.load(Ordering::SeqCst)
    }

    /// Times at which the peer closed connections.
    pub fn ends(&self) -> Vec<Instant> {
        lock(&self.shared.ends).clone()
    }

    #[track_caller]
    pub fn wait_for_requests(&self, count: usize) {
        wait_for(|| self.count() >= count, STEP_TIMEOUT);
    }

    /// Closes all connections and refuses new ones.
    pub fn stop(&self) {
        if self.shared.is_stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        for stream in lock(&self.shared.streams).drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
        // Wakes the accepting thread, which then closes the listener.
        drop(TcpStream::connect_timeout(&self.address, STEP_TIMEOUT));
        let is_refused = || TcpStream::connect_timeout(&self.address, STEP_TIMEOUT).is_err();
        let start = Instant::now();
        while !is_refused() && start.elapsed() < STEP_TIMEOUT {
            std::thread::yield_now();
        }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(shared: &Shared, mut stream: TcpStream, connection: usize) {
    drop(stream.set_nodelay(true));
    drop(stream.set_read_timeout(Some(POLL_INTERVAL)));
    drop(stream.set_write_timeout(Some(STEP_TIMEOUT)));
    let mut buffer = Vec::new();
    while let Some(mut request) = read_request(shared, &mut stream, &mut buffer) {
        request.connection = connection;
        {
            let mut requests = lock(&shared.requests);
            request.number = requests.len();
            requests.push(request.clone());
        }
        for step in (shared.script)(&request).0 {
            match step {
                Step::Send(bytes) => {
                    if stream.write_all(&bytes).is_err() {
                        return lock(&shared.ends).push(Instant::now());
                    }
                }
                Step::Fill(length) => {
                    if std::io::copy(&mut std::io::repeat(b'x').take(length as u64), &mut stream).is_err() {
                        return lock(&shared.ends).push(Instant::now());
                    }
                }
                Step::Pause(time) => std::thread::sleep(time),
                Step::Wait(gate) => gate.wait(),
                Step::Close => return drop(stream.shutdown(Shutdown::Both)),
                Step::Reset => {
                    drop(socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)));
                    // Drop the clone kept for `stop` too; otherwise the socket stays open.
                    let address = stream.peer_addr().ok();
                    lock(&shared.streams).retain(|copy| copy.peer_addr().ok() != address);
                    return;
                }
                Step::Hang => {
                    while read_more(shared, &mut stream, &mut buffer) {}
                    return;
                }
            }
        }
    }
}

/// Reads the next complete request; `None` at the end of the connection.
fn read_request(shared: &Shared, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<ReceivedRequest> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if !read_more(shared, stream, buffer) {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let mut lines = head.trim_end().split("\r\n");
    let mut start = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, target) = (start.next().unwrap_or_default(), start.next().unwrap_or_default());
    let field = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    let fields: Vec<(String, String)> = lines.filter_map(field).collect();
    let mut request =
        ReceivedRequest { connection: 0, number: 0, method, target, fields, body: Vec::new(), raw: Vec::new() };
    let length: usize = request.field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut at = end;
    if request.field("transfer-encoding").is_some() {
        loop {
            let line_end = find_line(shared, stream, buffer, at)?;
            let size = String::from_utf8_lossy(&buffer[at..line_end]).into_owned();
            let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16).ok()?;
            at = line_end + 2;
            if size == 0 {
                break;
            }
            buffer_at_least(shared, stream, buffer, at + size + 2)?;
            request.body.extend_from_slice(&buffer[at..at + size]);
            at += size + 2;
        }
        loop {
            let line_end = find_line(shared, stream, buffer, at)?;
            let is_last = line_end == at;
            at = line_end + 2;
            if is_last {
                break;
            }
        }
    } else {
        buffer_at_least(shared, stream, buffer, end + length)?;
        request.body.extend_from_slice(&buffer[end..end + length]);
        at += length;
    }
    request.raw = buffer.drain(..at).collect();
    Some(request)
}

fn find_line(shared: &Shared, stream: &mut TcpStream, buffer: &mut Vec<u8>, from: usize) -> Option<usize> {
    loop {
        if let Some(at) = buffer[from..].windows(2).position(|window| window == b"\r\n") {
            return Some(from + at);
        }
        if !read_more(shared, stream, buffer) {
            return None;
        }
    }
}

fn buffer_at_least(shared: &Shared, stream: &mut TcpStream, buffer: &mut Vec<u8>, length: usize) -> Option<()> {
    while buffer.len() < length {
        if !read_more(shared, stream, buffer) {
            return None;
        }
    }
    Some(())
}

/// Reads from the connection into `buffer`; false at the end of the connection or of the test.
fn read_more(shared: &Shared, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 64 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => {
                shared.bytes.fetch_add(count, Ordering::SeqCst);
                buffer.extend_from_slice(&chunk[..count]);
                return true;
            }
            Err(error) if is_timeout(&error) && !shared.is_stopped.load(Ordering::SeqCst) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    lock(&shared.ends).push(Instant::now());
    false
}
