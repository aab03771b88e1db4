//! A server that violates the protocol in many ways: a lookup returns the right value or none.

use crate::server::{DEADLINE, Page, remote_config};
use shard::{Entry, InsertTarget, KeyBuilder, LocalConfig, Region, RemoteConfig, RemoteLookup, Store, StoreView};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

const REGION: Region = Region::DEFAULT;
const PAGES: usize = 200;
const READS: usize = 100_000;
const READERS: usize = 64;
const GATEWAYS: usize = 8;
/// One in this many replies is faulty, as far as the breaker admits requests at all.
const FAULT_INTERVAL: usize = 250;

/// The bytes that are sent instead of, or around, a value. `others` is another key's value.
type ReplyFault = (&'static str, fn(value: &[u8], others: &[u8]) -> Vec<u8>);

const REPLY_FAULTS: &[ReplyFault] = &[
    ("an extra frame before", |value, others| [bulk(others), bulk(value)].concat()),
    ("an extra frame after", |value, others| [bulk(value), bulk(others)].concat()),
    ("the same frame twice", |value, _| [bulk(value), bulk(value)].concat()),
    ("a push frame before", |value, _| [b">2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n".to_vec(), bulk(value)].concat()),
    ("a push frame instead", |_, _| b">2\r\n+message\r\n+x\r\n".to_vec()),
    ("another key's value", |_, others| bulk(others)),
    ("a length that is too large", |value, _| framed(value.len() + 7, value)),
    ("a length that is too small", |value, _| framed(value.len() - 7, value)),
    ("a huge length", |value, _| framed(1 << 40, value)),
    ("a length that overflows every integer", |_, _| b"$99999999999999999999999\r\nx\r\n".to_vec()),
    ("a negative length", |_, _| b"$-5\r\n".to_vec()),
    ("no length", |_, _| b"$\r\n\r\n".to_vec()),
    ("a length that is no number", |_, _| b"$abc\r\nabc\r\n".to_vec()),
    ("a huge array", |_, _| b"*1000000000\r\n$1\r\na\r\n".to_vec()),
    ("deep nesting", |_, _| b"*1\r\n".repeat(20_000)),
    ("a null value", |_, _| b"$-1\r\n".to_vec()),
    ("an empty value", |_, _| bulk(b"")),
    ("a number", |_, _| b":42\r\n".to_vec()),
    ("an array with the value", |value, _| [b"*1\r\n".to_vec(), bulk(value)].concat()),
    ("a map", |value, _| [b"%1\r\n+a\r\n".to_vec(), bulk(value)].concat()),
    ("a simple string", |_, _| b"+OK\r\n".to_vec()),
    ("an error", |_, _| b"-ERR something\r\n".to_vec()),
    ("an error with a code", |_, _| b"-LOADING Redis is loading the dataset in memory\r\n".to_vec()),
    ("a wrong frame terminator", |value, _| [format!("${}\r\n", value.len()).as_bytes(), value, b"xx"].concat()),
    ("garbage", |_, _| (0..=255).collect()),
    ("zeros", |_, _| vec![0; 4_096]),
    ("a flipped bit", |value, _| flipped(value)),
    ("a truncated value", |value, _| bulk(&value[..value.len() / 2])),
    ("a value followed by another", |value, others| bulk(&[value, others].concat())),
    ("the header of one entry and the body of another", |value, others| {
        bulk(&[&value[..112], &others[112..]].concat())
    }),
    ("HTTP", |_, _| b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec()),
    // `serve` implements these.
    (LATE, |value, _| bulk(value)),
    (TRUNCATED, |value, _| bulk(value)),
    (BYTE_BY_BYTE, |value, _| bulk(value)),
    (CLOSED, |_, _| Vec::new()),
    (SWAPPED, |value, _| bulk(value)),
];

const LATE: &str = "a reply after the deadline";
const TRUNCATED: &str = "a connection closed within a reply";
const BYTE_BY_BYTE: &str = "byte by byte";
const CLOSED: &str = "a connection closed instead of a reply";
const SWAPPED: &str = "the reply to the previous request";

fn bulk(value: &[u8]) -> Vec<u8> {
    framed(value.len(), value)
}

fn framed(length: usize, value: &[u8]) -> Vec<u8> {
    [format!("${length}\r\n").as_bytes(), value, b"\r\n"].concat()
}

fn flipped(value: &[u8]) -> Vec<u8> {
    static AT: AtomicUsize = AtomicUsize::new(0);
    let at = AT.fetch_add(37, Ordering::Relaxed) % value.len();
    let mut value = value.to_vec();
    value[at] ^= 1 << (at % 8);
    bulk(&value)
}

#[derive(Default)]
struct FaultyServer {
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    is_faulty: AtomicBool,
    reads: AtomicUsize,
    injected: Mutex<Vec<usize>>,
}

impl FaultyServer {
    /// The fault to inject into this reply, if any.
    fn next_fault(&self) -> Option<usize> {
        let n = self.reads.fetch_add(1, Ordering::Relaxed);
        let is_due = self.is_faulty.load(Ordering::Relaxed) && n.is_multiple_of(FAULT_INTERVAL);
        let fault = n / FAULT_INTERVAL % REPLY_FAULTS.len();
        is_due.then(|| {
            self.injected.lock().unwrap()[fault] += 1;
            fault
        })
    }

    fn value(&self, key: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let values = self.values.lock().unwrap();
        let value = values.get(key).cloned().unwrap_or_default();
        let others = values.iter().find(|(other, _)| *other != key).map(|(_, value)| value.clone());
        (value, others.unwrap_or_default())
    }
}

async fn command(stream: &mut BufReader<TcpStream>) -> Option<Vec<Vec<u8>>> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let count: usize = line.trim().strip_prefix('*')?.parse().ok()?;
    let mut parts = Vec::new();
    for _ in 0..count {
        line.clear();
        stream.read_line(&mut line).await.ok()?;
        let length: usize = line.trim().strip_prefix('$')?.parse().ok()?;
        let mut part = vec![0; length + 2];
        stream.read_exact(&mut part).await.ok()?;
        part.truncate(length);
        parts.push(part);
    }
    Some(parts)
}

async fn serve(stream: TcpStream, server: Arc<FaultyServer>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    let mut previous = bulk(b"");
    loop {
        let parts = command(&mut stream).await?;
        let name = parts.first()?.to_ascii_uppercase();
        let (mut reply, mut fault) = (b"+OK\r\n".to_vec(), "");
        match name.as_slice() {
            // The script of a store: script, number of keys, entry, tombstone, four arguments,
            // envelope.
            b"EVAL" => _ = server.values.lock().unwrap().insert(parts.get(3)?.clone(), parts.get(9)?.clone()),
            // The gateway deletes damaged entries; this server keeps them for further reads.
            b"UNLINK" => reply = b":1\r\n".to_vec(),
            b"GETRANGE" => {
                let (value, others) = server.value(parts.get(1)?);
                reply = bulk(&value);
                if let Some(index) = server.next_fault() {
                    fault = REPLY_FAULTS[index].0;
                    reply = REPLY_FAULTS[index].1(&value, &others);
                }
                if fault == SWAPPED {
                    reply.clone_from(&previous);
                }
                previous = bulk(&value);
            }
            _ => {}
        }
        let socket = stream.get_mut();
        match fault {
            LATE => sleep(3 * DEADLINE).await,
            CLOSED => return None,
            TRUNCATED => {
                socket.write_all(&reply[..reply.len() / 2]).await.ok()?;
                return None;
            }
            BYTE_BY_BYTE => {
                for byte in reply.drain(..) {
                    socket.write_all(&[byte]).await.ok()?;
                }
            }
            _ => {}
        }
        socket.write_all(&reply).await.ok()?;
    }
}

async fn start(server: &Arc<FaultyServer>) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, server, mut tasks) = (listener.local_addr().unwrap().port(), server.clone(), JoinSet::new());
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _set = stream.set_nodelay(true);
            let server = server.clone();
            tokio::spawn(async move { serve(stream, server).await });
        }
    });
    (port, tasks)
}

fn text(n: usize) -> String {
    format!("page {n} ").repeat(20 + n % 50)
}

async fn read(view: &StoreView<Page>, n: usize) -> Option<bool> {
    let mut key = KeyBuilder::new();
    match view.lookup_remote(&REGION, &key.part(n.to_string().as_bytes()).key()).await {
        RemoteLookup::Found(hit) => Some(hit.meta.text == n.to_string() && *hit.body() == text(n)),
        _ => None,
    }
}

/// Reads until the total number of reads is reached; returns how many values were found, all of
/// them correct.
async fn read_all(view: &StoreView<Page>, reads: impl Fn() -> usize) -> usize {
    let (began, mut found, mut tried) = (Instant::now(), 0, 0);
    while reads() < READS {
        let batch: Vec<_> = (0..READERS).map(|reader| read(view, (tried + reader * 7) % PAGES)).collect();
        let results = join_all(batch).await;
        assert!(!results.contains(&Some(false)), "the value of another key");
        found += results.iter().flatten().count();
        tried += READERS;
        if results.iter().all(Option::is_none) {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(began.elapsed() < Duration::from_secs(300), "{} of {READS}", reads());
    }
    found
}

#[tokio::test]
async fn hundred_thousand_reads_of_a_faulty_server_return_no_wrong_value() {
    let server =
        Arc::new(FaultyServer { injected: Mutex::new(vec![0; REPLY_FAULTS.len()]), ..FaultyServer::default() });
    let (port, _tasks) = start(&server).await;
    // Several gateways: while one waits for its breaker, the others read.
    let stores: Vec<_> = (0..GATEWAYS)
        .map(|_| {
            let endpoint = format!("redis://127.0.0.1:{port}");
            let remote = RemoteConfig { deadline: DEADLINE, ..remote_config(&[("default", &[endpoint])]) };
            Store::new(LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 }, Some(remote)).unwrap()
        })
        .collect();
    let views: Vec<_> = stores.iter().map(Store::view).collect();
    for n in 0..PAGES {
        let mut key = KeyBuilder::new();
        let meta = Page { text: n.to_string(), tags: Vec::new() };
        let entry = Entry::new(meta, text(n).into(), Duration::from_secs(3_600), Instant::now());
        views[0].insert(&REGION, &key.part(n.to_string().as_bytes()).key(), entry, InsertTarget::LocalAndRemote);
        assert!(views[0].flush(Duration::from_secs(1)).await);
    }
    for n in 0..PAGES {
        assert_eq!(read(&views[n % GATEWAYS], n).await, Some(true), "without faults every value is found");
    }
    server.is_faulty.store(true, Ordering::Relaxed);
    let (began, first) = (Instant::now(), server.reads.load(Ordering::Relaxed));
    let reads = || server.reads.load(Ordering::Relaxed) - first;
    let found: usize = join_all(views.iter().map(|view| read_all(view, reads)).collect()).await.into_iter().sum();
    println!("{} reads, {found} found in {:?}", reads(), began.elapsed());
    let report = stores[0].shard_reports().next().unwrap();
    println!("one gateway: {:?}", report.counts);
    println!("{:?}", report.read_faults.iter().filter(|(_, count)| *count > 0).collect::<Vec<_>>());
    let injected = server.injected.lock().unwrap().clone();
    for ((name, _), injected) in REPLY_FAULTS.iter().zip(&injected) {
        assert!(*injected >= 10, "{name}: {injected}");
    }
    assert!(REPLY_FAULTS.len() >= 20 && found > READS / 3, "{found}");
    // Lookups recover once the server is correct again.
    server.is_faulty.store(false, Ordering::Relaxed);
    let began = Instant::now();
    while read(&views[0], 1).await != Some(true) {
        assert!(began.elapsed() < Duration::from_secs(5), "lookups do not recover");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Polls all futures concurrently on this task.
async fn join_all<F: Future>(mut all: Vec<F>) -> Vec<F::Output> {
    let mut pinned: Vec<_> = all.drain(..).map(|one| (Box::pin(one), None)).collect();
    std::future::poll_fn(|cx| {
        let mut is_done = true;
        for (future, output) in &mut pinned {
            if output.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *output = Some(value),
                    std::task::Poll::Pending => is_done = false,
                }
            }
        }
        if is_done { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    pinned.into_iter().map(|(_, output)| output.expect("the future is ready")).collect()
}
