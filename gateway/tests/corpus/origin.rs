//! An origin that plays raw bytes, keeps every byte that it was sent, and reads requests with the strict second reader.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::format::latin1;
use super::support::{PATIENCE, lock};
use super::wire::{self, Message, Read};

/// What one connection brought.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    /// Requests that became whole, in order.
    pub(crate) requests: Vec<Message>,
    /// The head of a request that did not.
    pub(crate) unfinished: Option<Message>,
    /// What the strict reader could not accept: never to be seen.
    pub(crate) malformed: Option<String>,
    /// Answers written to their end.
    pub(crate) played: usize,
    pub(crate) is_over: bool,
}

/// What the origin does about a request.
pub(crate) struct Play {
    /// Written piece by piece.
    pub(crate) pieces: Vec<Vec<u8>>,
    /// Between two pieces.
    pub(crate) pause: Duration,
    /// The connection ends afterwards.
    pub(crate) ends: bool,
}

impl Play {
    pub(crate) fn whole(bytes: impl Into<Vec<u8>>) -> Self {
        Play { pieces: vec![bytes.into()], pause: Duration::ZERO, ends: false }
    }
}

/// Decides by a request and its connection. `false`: its head has arrived, its body has not; `None` then waits for it.
type Script = dyn Fn(&Message, usize, bool) -> Option<Play> + Send + Sync;

struct Shared {
    script: Box<Script>,
    records: Mutex<Vec<Record>>,
    /// Whole requests so far, over all connections.
    requests: AtomicUsize,
    is_over: AtomicBool,
}

pub(crate) struct RawOrigin {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

impl RawOrigin {
    pub(crate) fn start(script: impl Fn(&Message, usize, bool) -> Option<Play> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for the origin");
        let address = listener.local_addr().expect("a bound port");
        let shared = Arc::new(Shared {
            script: Box::new(script),
            records: Mutex::default(),
            requests: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.is_over.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || serve(&shared, stream));
            }
        });
        RawOrigin { address, shared }
    }

    /// One record per connection so far.
    pub(crate) fn records(&self) -> Vec<Record> {
        lock(&self.shared.records).clone()
    }

    pub(crate) fn record(&self, connection: usize) -> Record {
        lock(&self.shared.records)[connection].clone()
    }
}

impl Drop for RawOrigin {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect_timeout(&self.address, PATIENCE));
    }
}

fn serve(shared: &Shared, mut stream: TcpStream) {
    drop(stream.set_nodelay(true));
    drop(stream.set_read_timeout(Some(Duration::from_secs(60))));
    let index = {
        let mut records = lock(&shared.records);
        records.push(Record::default());
        records.len() - 1
    };
    let mut buffer = Vec::new();
    converse(shared, &mut stream, index, &mut buffer);
    let mut records = lock(&shared.records);
    let record = &mut records[index];
    record.is_over = true;
    if !buffer.is_empty() && record.malformed.is_none() {
        match wire::request(&buffer) {
            Ok(Read::Part(Some(message))) => record.unfinished = Some(message),
            Ok(_) => record.malformed = Some(format!("half a head: {:?}", latin1(&buffer))),
            Err(error) => record.malformed = Some(error),
        }
    }
}

/// Answers requests until the connection ends; what is left unanswered stays in `buffer`.
fn converse(shared: &Shared, stream: &mut TcpStream, index: usize, buffer: &mut Vec<u8>) {
    let mut answered_early = false;
    let mut space = vec![0; 64 << 10];
    loop {
        let play = match wire::request(buffer) {
            Ok(Read::Whole(mut message)) => {
                message.number = shared.requests.fetch_add(1, Ordering::SeqCst);
                buffer.drain(..message.length);
                lock(&shared.records)[index].requests.push(message.clone());
                if std::mem::take(&mut answered_early) { None } else { (shared.script)(&message, index, true) }
            }
            Ok(Read::Part(Some(message))) if !answered_early => {
                let play = (shared.script)(&message, index, false);
                answered_early = play.is_some();
                play
            }
            Ok(Read::Part(_)) => None,
            Err(error) => {
                lock(&shared.records)[index].malformed = Some(error);
                return;
            }
        };
        if let Some(play) = play {
            for (number, piece) in play.pieces.iter().enumerate() {
                if number > 0 && !play.pause.is_zero() {
                    std::thread::sleep(play.pause);
                }
                if stream.write_all(piece).is_err() {
                    return;
                }
            }
            if play.ends {
                drop(stream.shutdown(Shutdown::Write));
            }
            lock(&shared.records)[index].played += 1;
        }
        if matches!(wire::request(buffer), Ok(Read::Whole(_)) | Err(_)) {
            continue;
        }
        match stream.read(&mut space) {
            Ok(count) if count > 0 => buffer.extend_from_slice(&space[..count]),
            _ => return,
        }
    }
}
