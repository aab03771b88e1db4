//! An origin in this process whose responses a scenario decides, with counts of what happened to
//! each request: it was answered, or its client went away first.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::servers::listen::listen;

const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Times of departures that are kept.
const DEPARTURES_MAX: usize = 10_000;

/// A request that has arrived, body included.
#[derive(Clone, Debug)]
pub(crate) struct OriginRequest {
    pub(crate) target: String,
}

/// The answer to one request.
#[derive(Clone, Debug)]
pub(crate) struct OriginAnswer {
    /// Before the first byte of the response. Longer than any test: the origin hangs.
    pub(crate) delay: Duration,
    pub(crate) status: u16,
    /// Lines of fields, each with its end.
    pub(crate) fields: String,
    pub(crate) body: String,
}

impl OriginAnswer {
    pub(crate) fn ok(body: impl Into<String>) -> Self {
        OriginAnswer { delay: Duration::ZERO, status: 200, fields: String::new(), body: body.into() }
    }

    pub(crate) fn status(status: u16) -> Self {
        OriginAnswer { status, ..OriginAnswer::ok("failure\n") }
    }

    pub(crate) fn field(mut self, line: &str) -> Self {
        self.fields.push_str(line);
        self.fields.push_str("\r\n");
        self
    }

    pub(crate) fn after(self, delay: Duration) -> Self {
        OriginAnswer { delay, ..self }
    }
}

#[derive(Default)]
struct OriginCounts {
    requests: AtomicU64,
    answered: AtomicU64,
    departures: Mutex<Vec<Instant>>,
}

/// A running origin; it ends on drop.
pub(crate) struct ScriptedOrigin {
    pub(crate) address: SocketAddr,
    counts: Arc<OriginCounts>,
    running: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

type Handler = dyn Fn(&OriginRequest) -> OriginAnswer + Send + Sync;

impl ScriptedOrigin {
    pub(crate) fn start(handler: impl Fn(&OriginRequest) -> OriginAnswer + Send + Sync + 'static) -> io::Result<Self> {
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let counts = Arc::new(OriginCounts::default());
        let (running, ended) = watch::channel(());
        let (handler, shared): (Arc<Handler>, _) = (Arc::new(handler), Arc::clone(&counts));
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => return eprintln!("loadtest: an origin does not start: {error}"),
            };
            if let Err(error) = runtime.block_on(accept(listener, handler, (shared, ended))) {
                eprintln!("loadtest: an origin has ended: {error}");
            }
        };
        let thread = thread::Builder::new().name("scripted-origin".to_owned()).spawn(serve)?;
        Ok(ScriptedOrigin { address, counts, running: Some(running), thread: Some(thread) })
    }

    /// Requests so far.
    pub(crate) fn requests(&self) -> u64 {
        self.counts.requests.load(Relaxed)
    }

    /// Requests whose response was written.
    pub(crate) fn answered(&self) -> u64 {
        self.counts.answered.load(Relaxed)
    }

    /// The times at which clients closed their connection while a request was in progress.
    pub(crate) fn departures(&self) -> Vec<Instant> {
        self.counts.departures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for ScriptedOrigin {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    handler: Arc<Handler>,
    (counts, mut ended): (Arc<OriginCounts>, watch::Receiver<()>),
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    let (handler, counts) = (Rc::new(handler), Rc::new(counts));
    loop {
        tokio::select! {
            // Its sender is dropped, never used.
            _ = ended.changed() => return Ok(()),
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                // Out of descriptors: closed connections free some.
                let Ok((stream, _)) = accepted else { tokio::task::yield_now().await; continue };
                let (handler, counts) = (Rc::clone(&handler), Rc::clone(&counts));
                connections.spawn_local(async move {
                    // A client that disconnects is not an error of the origin.
                    drop(serve(stream, &handler, &counts).await);
                });
            }
        }
    }
}

async fn serve(mut stream: TcpStream, handler: &Arc<Handler>, counts: &Arc<OriginCounts>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut inbox = Vec::with_capacity(4 << 10);
    loop {
        let Some((request, length)) = parse(&inbox)? else {
            if inbox.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut inbox).await? == 0 {
                return Ok(());
            }
            continue;
        };
        inbox.drain(..length);
        counts.requests.fetch_add(1, Relaxed);
        let answer = handler(&request);
        if !answer.delay.is_zero() {
            tokio::select! {
                () = sleep(answer.delay) => {}
                read = stream.read_buf(&mut inbox) => {
                    if matches!(read, Ok(0) | Err(_)) {
                        let mut departures = counts.departures.lock().unwrap_or_else(PoisonError::into_inner);
                        if departures.len() < DEPARTURES_MAX {
                            departures.push(Instant::now());
                        }
                        return Ok(());
                    }
                }
            }
        }
        let OriginAnswer { status, fields, body, .. } = answer;
        let length = body.len();
        let response = format!("HTTP/1.1 {status} Scripted\r\n{fields}Content-Length: {length}\r\n\r\n{body}");
        stream.write_all(response.as_bytes()).await?;
        counts.answered.fetch_add(1, Relaxed);
    }
}

/// The first request of `bytes` and its length; `None` while it is incomplete.
fn parse(bytes: &[u8]) -> io::Result<Option<(OriginRequest, usize)>> {
    let mut fields = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut fields);
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
    let httparse::Status::Complete(head) = request.parse(bytes).map_err(invalid)? else { return Ok(None) };
    let length = request.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|field| std::str::from_utf8(field.value).ok()?.trim().parse().ok());
    let length = head + length.unwrap_or(0_usize);
    let parsed = OriginRequest { target: request.path.unwrap_or_default().to_owned() };
    Ok((bytes.len() >= length).then_some((parsed, length)))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream as StdStream;

    use super::*;

    #[test]
    fn answers_departures_and_requests_are_counted() {
        let origin = ScriptedOrigin::start(|request| match request.target.as_str() {
            "/hang" => OriginAnswer::ok("late").after(Duration::from_secs(3_600)),
            target => OriginAnswer::ok(target).field("x-a: 1"),
        });
        let origin = origin.expect("an origin");
        let mut stream = StdStream::connect(origin.address).expect("a connection");
        stream.write_all(b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\nab").expect("room");
        let mut response = vec![0; 64];
        let length = stream.read(&mut response).expect("a response");
        let text = String::from_utf8_lossy(&response[..length]).into_owned();
        assert!(text.contains("x-a: 1\r\n") && text.ends_with("\r\n\r\n/a"), "{text}");
        stream.write_all(b"GET /hang HTTP/1.1\r\n\r\n").expect("room");
        let deadline = Instant::now() + Duration::from_secs(10);
        while origin.requests() < 2 && Instant::now() < deadline {
            thread::yield_now();
        }
        drop(stream);
        while origin.departures().is_empty() && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!((origin.requests(), origin.answered(), origin.departures().len()), (2, 1, 1));
    }
}
