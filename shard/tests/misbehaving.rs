//! A server that speaks the protocol wrongly in every way that came to mind: what is read is the right value or none.

mod server;

use server::{DEADLINE, Page, settings};
use shard::{Entry, KeyBuilder, LocalSettings, Reach, Region, Remote, RemoteSettings, Store, View};
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
/// One in so many answers is wrong, as far as the breaker lets questions through at all.
const ONE_IN: usize = 250;

/// What is sent instead of, or around, a value. `others` is another key's value.
type Wrong = (&'static str, fn(value: &[u8], others: &[u8]) -> Vec<u8>);

const WRONGS: &[Wrong] = &[
    ("an extra frame before", |value, others| [bulk(others), bulk(value)].concat()),
    ("an extra frame after", |value, others| [bulk(value), bulk(others)].concat()),
    ("the same frame twice", |value, _| [bulk(value), bulk(value)].concat()),
    ("a push frame before", |value, _| [b">2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n".to_vec(), bulk(value)].concat()),
    ("a push frame instead", |_, _| b">2\r\n+message\r\n+x\r\n".to_vec()),
    ("another key's value", |_, others| bulk(others)),
    ("a length that is too long", |value, _| framed(value.len() + 7, value)),
    ("a length that is too short", |value, _| framed(value.len() - 7, value)),
    ("a huge length", |value, _| framed(1 << 40, value)),
    ("a length beyond all numbers", |_, _| b"$99999999999999999999999\r\nx\r\n".to_vec()),
    ("a negative length", |_, _| b"$-5\r\n".to_vec()),
    ("no length", |_, _| b"$\r\n\r\n".to_vec()),
    ("a length of letters", |_, _| b"$abc\r\nabc\r\n".to_vec()),
    ("a huge array", |_, _| b"*1000000000\r\n$1\r\na\r\n".to_vec()),
    ("deep nesting", |_, _| b"*1\r\n".repeat(20_000)),
    ("nothing", |_, _| b"$-1\r\n".to_vec()),
    ("an empty value", |_, _| bulk(b"")),
    ("a number", |_, _| b":42\r\n".to_vec()),
    ("an array with the value", |value, _| [b"*1\r\n".to_vec(), bulk(value)].concat()),
    ("a map", |value, _| [b"%1\r\n+a\r\n".to_vec(), bulk(value)].concat()),
    ("a simple string", |_, _| b"+OK\r\n".to_vec()),
    ("an error", |_, _| b"-ERR something\r\n".to_vec()),
    ("an error with a code", |_, _| b"-LOADING Redis is loading the dataset in memory\r\n".to_vec()),
    ("a wrong end of the frame", |value, _| [format!("${}\r\n", value.len()).as_bytes(), value, b"xx"].concat()),
    ("garbage", |_, _| (0..=255).collect()),
    ("zeros", |_, _| vec![0; 4_096]),
    ("a flipped bit", |value, _| flipped(value)),
    ("a value that is cut", |value, _| bulk(&value[..value.len() / 2])),
    ("a value with more after it", |value, others| bulk(&[value, others].concat())),
    ("the head of one and the body of another", |value, others| bulk(&[&value[..112], &others[112..]].concat())),
    ("HTTP", |_, _| b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec()),
    // The rest is done by `serve`.
    (LATE, |value, _| bulk(value)),
    (CUT, |value, _| bulk(value)),
    (SLOWLY, |value, _| bulk(value)),
    (CLOSED, |_, _| Vec::new()),
    (SWAPPED, |value, _| bulk(value)),
];

const LATE: &str = "an answer after the deadline";
const CUT: &str = "an end in the middle";
const SLOWLY: &str = "byte by byte";
const CLOSED: &str = "an end instead";
const SWAPPED: &str = "the answer to the question before";

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
struct Fake {
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    is_wrong: AtomicBool,
    asked: AtomicUsize,
    done: Mutex<Vec<usize>>,
}

impl Fake {
    /// Which wrong is due, if any.
    fn next(&self) -> Option<usize> {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        let is_due = self.is_wrong.load(Ordering::Relaxed) && n.is_multiple_of(ONE_IN);
        let wrong = n / ONE_IN % WRONGS.len();
        is_due.then(|| {
            self.done.lock().unwrap()[wrong] += 1;
            wrong
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

async fn serve(stream: TcpStream, fake: Arc<Fake>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    let mut before = bulk(b"");
    loop {
        let parts = command(&mut stream).await?;
        let name = parts.first()?.to_ascii_uppercase();
        let (mut answer, mut wrong) = (b"+OK\r\n".to_vec(), "");
        match name.as_slice() {
            b"SET" => _ = fake.values.lock().unwrap().insert(parts.get(1)?.clone(), parts.get(2)?.clone()),
            // What is damaged is removed by the gateway; here it is needed again.
            b"UNLINK" => answer = b":1\r\n".to_vec(),
            b"GETRANGE" => {
                let (value, others) = fake.value(parts.get(1)?);
                answer = bulk(&value);
                if let Some(index) = fake.next() {
                    wrong = WRONGS[index].0;
                    answer = WRONGS[index].1(&value, &others);
                }
                if wrong == SWAPPED {
                    answer.clone_from(&before);
                }
                before = bulk(&value);
            }
            _ => {}
        }
        let socket = stream.get_mut();
        match wrong {
            LATE => sleep(3 * DEADLINE).await,
            CLOSED => return None,
            CUT => {
                socket.write_all(&answer[..answer.len() / 2]).await.ok()?;
                return None;
            }
            SLOWLY => {
                for byte in answer.drain(..) {
                    socket.write_all(&[byte]).await.ok()?;
                }
            }
            _ => {}
        }
        socket.write_all(&answer).await.ok()?;
    }
}

async fn start(fake: &Arc<Fake>) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, fake, mut tasks) = (listener.local_addr().unwrap().port(), fake.clone(), JoinSet::new());
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _set = stream.set_nodelay(true);
            let fake = fake.clone();
            tokio::spawn(async move { serve(stream, fake).await });
        }
    });
    (port, tasks)
}

fn text(n: usize) -> String {
    format!("page {n} ").repeat(20 + n % 50)
}

async fn read(view: &View<Page>, n: usize) -> Option<bool> {
    let mut key = KeyBuilder::new();
    match view.remote(&REGION, &key.part(n.to_string().as_bytes()).key()).await {
        Remote::Found(hit) => Some(hit.meta.text == n.to_string() && *hit.body() == text(n)),
        _ => None,
    }
}

/// Asks until all have asked enough; how many values were found, all of them right.
async fn read_all(view: &View<Page>, asked: impl Fn() -> usize) -> usize {
    let (began, mut found, mut tried) = (Instant::now(), 0, 0);
    while asked() < READS {
        let reads: Vec<_> = (0..READERS).map(|reader| read(view, (tried + reader * 7) % PAGES)).collect();
        let results = futures(reads).await;
        assert!(!results.contains(&Some(false)), "another value than the one that was asked for");
        found += results.iter().flatten().count();
        tried += READERS;
        if results.iter().all(Option::is_none) {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(began.elapsed() < Duration::from_secs(300), "{} of {READS}", asked());
    }
    found
}

#[tokio::test]
async fn a_hundred_thousand_reads_of_a_server_that_misbehaves_find_no_wrong_value() {
    let fake = Arc::new(Fake { done: Mutex::new(vec![0; WRONGS.len()]), ..Fake::default() });
    let (port, _tasks) = start(&fake).await;
    // Several gateways' worth: while one waits for its breaker, others ask.
    let stores: Vec<_> = (0..GATEWAYS)
        .map(|_| {
            let endpoint = format!("redis://127.0.0.1:{port}");
            let remote = RemoteSettings { deadline: DEADLINE, ..settings(&[("default", &[endpoint])]) };
            Store::new(LocalSettings { memory_bytes: 1 << 20, hot_rate: 1_000 }, Some(remote)).unwrap()
        })
        .collect();
    let views: Vec<_> = stores.iter().map(Store::view).collect();
    for n in 0..PAGES {
        let mut key = KeyBuilder::new();
        let meta = Page { text: n.to_string(), tags: Vec::new() };
        let entry = Entry::new(meta, text(n).into(), Duration::from_secs(3_600), Instant::now());
        views[0].insert(&REGION, &key.part(n.to_string().as_bytes()).key(), entry, Reach::Shared);
        assert!(views[0].flush(Duration::from_secs(1)).await);
    }
    for n in 0..PAGES {
        assert_eq!(read(&views[n % GATEWAYS], n).await, Some(true), "while it behaves, everything is found");
    }
    fake.is_wrong.store(true, Ordering::Relaxed);
    let (began, first) = (Instant::now(), fake.asked.load(Ordering::Relaxed));
    let asked = || fake.asked.load(Ordering::Relaxed) - first;
    let found: usize = futures(views.iter().map(|view| read_all(view, asked)).collect()).await.into_iter().sum();
    println!("{} asked, {found} found in {:?}", asked(), began.elapsed());
    let report = stores[0].shards().next().unwrap();
    println!("of one: {:?}", report.counts);
    println!("{:?}", report.read_faults.iter().filter(|(_, count)| *count > 0).collect::<Vec<_>>());
    let done = fake.done.lock().unwrap().clone();
    for ((name, _), done) in WRONGS.iter().zip(&done) {
        assert!(*done >= 10, "{name}: {done}");
    }
    assert!(WRONGS.len() >= 20 && found > READS / 3, "{found}");
    // And it is over when the server behaves again.
    fake.is_wrong.store(false, Ordering::Relaxed);
    let began = Instant::now();
    while read(&views[0], 1).await != Some(true) {
        assert!(began.elapsed() < Duration::from_secs(5), "it does not come back");
        sleep(Duration::from_millis(5)).await;
    }
}

/// All of them at once, on this task.
async fn futures<F: Future>(mut all: Vec<F>) -> Vec<F::Output> {
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
    pinned.into_iter().map(|(_, output)| output.expect("it is done")).collect()
}
