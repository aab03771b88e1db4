//! Fills: many requests for one missing answer are one request, and nobody who reads slowly, leaves or waits is in another's way.

mod support;

use std::time::{Duration, Instant};

use support::{Client, End, Gate, Gateway, Origin, PATIENCE, Script, one_route, wait_for};

const CACHED: &str = "cache = { mode = \"standard\" }";

fn cached(origin: &Origin) -> Gateway {
    Gateway::start(&one_route(origin.address, CACHED, ""))
}

#[test]
fn a_failed_fill_is_tried_once_more_for_all_who_wait() {
    let gate = Gate::default();
    let opens = gate.clone();
    let origin = Origin::start(move |_| Script::new().wait(&opens).close());
    let gateway = Gateway::start(&one_route(origin.address, CACHED, ""));
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let mut client = gateway.connect();
            client.ask("/", &[]);
            client
        })
        .collect();
    origin.wait_for_requests(1);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 20.0, PATIENCE);
    gate.open();
    for mut client in waiting {
        assert_eq!(client.answer().status, 503);
    }
    assert!(origin.count() <= 2, "{} requests", origin.count());
}

#[test]
fn fills_beyond_their_bytes_pass_through_and_are_not_stored() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; 2 << 20]));
    let gateway = Gateway::start(&one_route(origin.address, CACHED, "[cache]\nfill_bytes = \"1MiB\"\n"));
    for _ in 0..2 {
        let answer = gateway.get("/", &[]);
        assert_eq!((answer.status, answer.body.len(), answer.is_hit()), (200, 2 << 20, false));
    }
    assert_eq!(origin.count(), 2);
}

/// Asks for `target` over `count` connections at once; returns how long it took until all were answered.
fn crowd(gateway: &Gateway, target: &str, count: usize) -> Duration {
    let mut clients: Vec<Client> = (0..count).map(|_| gateway.connect()).collect();
    let start = Instant::now();
    clients.iter_mut().for_each(|client| client.ask(target, &[]));
    for client in &mut clients {
        let answer = client.answer();
        assert_eq!((answer.status, answer.end), (200, End::Whole));
    }
    start.elapsed()
}

#[test]
fn a_crowd_makes_one_request_and_never_queues_for_what_cannot_be_shared() {
    const CROWD: usize = 1_000;
    const TAKES: Duration = Duration::from_millis(300);
    let origin = Origin::start(|request| {
        let control = if request.target.starts_with("/shared") { "max-age=60" } else { "no-store" };
        Script::new().pause(TAKES).head(200, &[("Cache-Control", control), ("Content-Length", "4")]).send("body")
    });
    let gateway = cached(&origin);
    crowd(&gateway, "/shared", CROWD);
    assert_eq!(origin.count(), 1, "misses at once are one request");
    // One exchange that finds out, one for all the others together; a queue would take as many as there are clients.
    let took = crowd(&gateway, "/private", CROWD);
    assert_eq!(origin.count(), 1 + CROWD);
    assert!(took < 10 * TAKES, "{took:?}");
    // Known to be uncacheable now: nobody waits for anybody.
    let took = crowd(&gateway, "/private", CROWD);
    assert!(took < 5 * TAKES, "{took:?}");
}

/// An origin whose body of pieces never ends; nothing of it is stored unless it is short.
fn endless() -> Origin {
    Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
        let piece = [b"1000\r\n", &[b'x'; 0x1000][..], b"\r\n"].concat();
        (0..3_000).fold(Script::new().head(200, &head), |script, _| script.pause(Duration::from_millis(2)).send(&piece))
    })
}

#[test]
fn a_fill_that_nobody_reads_ends_at_once() {
    let origin = endless();
    let gateway = cached(&origin);
    let mut clients: Vec<Client> = (0..3).map(|_| gateway.connect()).collect();
    for client in &mut clients {
        client.ask("/", &[]);
        assert_eq!(client.head().status, 200);
    }
    assert_eq!(origin.count(), 1);
    clients.truncate(1);
    std::thread::sleep(Duration::from_millis(200));
    assert!(origin.ends().is_empty(), "one still reads");
    let left = Instant::now();
    drop(clients);
    wait_for(|| !origin.ends().is_empty(), PATIENCE);
    // 100 ms are what is promised, the rest is the machine's.
    assert!(left.elapsed() < Duration::from_millis(600), "{:?}", left.elapsed());
}

#[test]
fn a_validation_that_nobody_waits_for_goes_on() {
    let origin = Origin::start(|request| {
        let stale = [("Cache-Control", "max-age=0, stale-while-revalidate=60"), ("ETag", "\"a\"")];
        match request.field("if-none-match") {
            None => Script::ok(&stale, "old"),
            Some(_) => Script::new()
                .pause(Duration::from_millis(300))
                .head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "3")])
                .send("new"),
        }
    });
    let gateway = cached(&origin);
    gateway.get("/", &[]);
    assert_eq!(gateway.get("/", &[]).text(), "old");
    wait_for(|| gateway.get("/", &[]).text() == "new", PATIENCE);
    assert_eq!(origin.count(), 2);
}

#[test]
fn readers_that_stall_hold_back_the_origin_not_memory() {
    const READERS: usize = 40;
    // 64 MiB in all, of which each reader takes nothing.
    let origin = Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Content-Length", "67108864")];
        (0..64).fold(Script::new().head(200, &head), |script, _| script.send(vec![b'x'; 1 << 20]))
    });
    let gateway = cached(&origin);
    let before = gateway.process.memory();
    let mut readers: Vec<Client> = (0..READERS).map(|_| gateway.connect()).collect();
    for (number, reader) in readers.iter_mut().enumerate() {
        reader.ask(&format!("/{number}"), &[]);
        assert_eq!(reader.head().status, 200);
    }
    std::thread::sleep(Duration::from_millis(500));
    let grown = gateway.process.memory().saturating_sub(before);
    // What is too large to store is held for nobody: a window for each fill at most, here 1 MiB and a buffer.
    assert!(grown < (READERS * 5 / 4) << 20, "{} MiB for {READERS} readers", grown >> 20);
    drop(readers);
}

#[test]
fn a_crowd_of_slow_readers_shares_one_body() {
    const READERS: usize = 100;
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; 6 << 20]));
    let gateway = cached(&origin);
    let before = gateway.process.memory();
    let mut readers: Vec<Client> = (0..READERS).map(|_| gateway.connect()).collect();
    for reader in &mut readers {
        reader.ask("/", &[]);
        assert_eq!(reader.head().status, 200);
    }
    wait_for(|| gateway.get("/", &[]).is_hit(), PATIENCE);
    let grown = gateway.process.memory().saturating_sub(before);
    assert!(grown < 40 << 20, "{} MiB for one body of 6 MiB", grown >> 20);
    assert_eq!(origin.count(), 1);
    for mut reader in readers {
        assert_eq!(reader.some(6 << 20).len(), 6 << 20);
    }
}
