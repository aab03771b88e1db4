//! An origin that sends raw bytes, and parses and records received requests with the reference
//! parser.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::format::latin1;
use super::reference_parser::{self, Message, ParseResult};
use super::support::{STEP_TIMEOUT, lock};

/// The requests received on one connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConnectionRecord {
    /// Complete requests, in order.
    pub(crate) requests: Vec<Message>,
    /// The head of an incomplete request.
    pub(crate) unfinished: Option<Message>,
    /// The error of the reference parser. The gateway must never cause one.
    pub(crate) malformed: Option<String>,
    /// Responses written completely.
    pub(crate) responses_sent: usize,
    pub(crate) is_closed: bool,
}

/// The response of the origin to a request.
pub(crate) struct ScriptedResponse {
    /// Written piece by piece.
    pub(crate) pieces: Vec<Vec<u8>>,
    /// Pause between two pieces.
    pub(crate) pause: Duration,
    /// Whether the origin then shuts down the connection.
    pub(crate) closes: bool,
}

impl ScriptedResponse {
    pub(crate) fn one_piece(bytes: impl Into<Vec<u8>>) -> Self {
        ScriptedResponse { pieces: vec![bytes.into()], pause: Duration::ZERO, closes: false }
    }
}

/// Chooses the response from the request, the index of its connection, and whether the request is
/// complete. If only the head has arrived, `None` waits for the body.
type Script = dyn Fn(&Message, usize, bool) -> Option<ScriptedResponse> + Send + Sync;

struct Shared {
    script: Box<Script>,
    records: Mutex<Vec<ConnectionRecord>>,
    /// Complete requests so far, across all connections.
    requests: AtomicUsize,
    is_closed: AtomicBool,
}

pub(crate) struct RawOrigin {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

impl RawOrigin {
    pub(crate) fn start(
        script: impl Fn(&Message, usize, bool) -> Option<ScriptedResponse> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for the origin");
        let address = listener.local_addr().expect("a bound port");
        let shared = Arc::new(Shared {
            script: Box::new(script),
            records: Mutex::default(),
            requests: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.is_closed.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || serve(&shared, stream));
            }
        });
        RawOrigin { address, shared }
    }

    /// One record per connection.
    pub(crate) fn records(&self) -> Vec<ConnectionRecord> {
        lock(&self.shared.records).clone()
    }

    pub(crate) fn record(&self, connection: usize) -> ConnectionRecord {
        lock(&self.shared.records)[connection].clone()
    }
}

impl Drop for RawOrigin {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        drop(TcpStream::connect_timeout(&self.address, STEP_TIMEOUT));
    }
}

fn serve(shared: &Shared, mut stream: TcpStream) {
    drop(stream.set_nodelay(true));
    drop(stream.set_read_timeout(Some(Duration::from_secs(60))));
    let index = {
        let mut records = lock(&shared.records);
        records.push(ConnectionRecord::default());
        records.len() - 1
    };
    let mut buffer = Vec::new();
    serve_requests(shared, &mut stream, index, &mut buffer);
    let mut records = lock(&shared.records);
    let record = &mut records[index];
    record.is_closed = true;
    if !buffer.is_empty() && record.malformed.is_none() {
        match reference_parser::request(&buffer) {
            Ok(ParseResult::Partial(Some(message))) => record.unfinished = Some(message),
            Ok(_) => record.malformed = Some(format!("incomplete head: {:?}", latin1(&buffer))),
            Err(error) => record.malformed = Some(error),
        }
    }
}

/// Responds to requests until the connection ends; unparsed bytes stay in `buffer`.
fn serve_requests(shared: &Shared, stream: &mut TcpStream, index: usize, buffer: &mut Vec<u8>) {
    let mut responded_early = false;
    let mut space = vec![0; 64 << 10];
    loop {
        let response = match reference_parser::request(buffer) {
            Ok(ParseResult::Complete(mut message)) => {
                message.number = shared.requests.fetch_add(1, Ordering::SeqCst);
                buffer.drain(..message.length);
                lock(&shared.records)[index].requests.push(message.clone());
                if std::mem::take(&mut responded_early) { None } else { (shared.script)(&message, index, true) }
            }
            Ok(ParseResult::Partial(Some(message))) if !responded_early => {
                let response = (shared.script)(&message, index, false);
                responded_early = response.is_some();
                response
            }
            Ok(ParseResult::Partial(_)) => None,
            Err(error) => {
                lock(&shared.records)[index].malformed = Some(error);
                return;
            }
        };
        if let Some(response) = response {
            for (number, piece) in response.pieces.iter().enumerate() {
                if number > 0 && !response.pause.is_zero() {
                    std::thread::sleep(response.pause);
                }
                if stream.write_all(piece).is_err() {
                    return;
                }
            }
            if response.closes {
                drop(stream.shutdown(Shutdown::Write));
            }
            lock(&shared.records)[index].responses_sent += 1;
        }
        if matches!(reference_parser::request(buffer), Ok(ParseResult::Complete(_)) | Err(_)) {
            continue;
        }
        match stream.read(&mut space) {
            Ok(count) if count > 0 => buffer.extend_from_slice(&space[..count]),
            _ => return,
        }
    }
}
