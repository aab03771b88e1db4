//! Collapsed misses: concurrent misses of one key are one request, and slow, disconnected or
//! waiting clients do not affect others.

mod support;

use std::time::{Duration, Instant};

use support::{BodyEnd, Client, Gate, Gateway, Origin, STEP_TIMEOUT, Script, one_route, wait_for};

const CACHED: &str = "cache = { mode = \"standard\" }";

fn cached(origin: &Origin) -> Gateway {
    Gateway::start(&one_route(origin.address, CACHED, ""))
}

#[test]
fn failed_fill_is_retried_once_for_all_waiting_requests() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| Script::new().wait(&opened).close());
    let gateway = Gateway::start(&one_route(origin.address, CACHED, ""));
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let mut client = gateway.connect();
            client.send_get("/", &[]);
            client
        })
        .collect();
    origin.wait_for_requests(1);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 20.0, STEP_TIMEOUT);
    gate.open();
    for mut client in waiting {
        assert_eq!(client.read_response().status, 503);
    }
    assert!(origin.count() <= 2, "{} requests", origin.count());
}

#[test]
fn bodies_above_inflight_fetch_bytes_are_passed_through_and_not_stored() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; 2 << 20]));
    let gateway = Gateway::start(&one_route(origin.address, CACHED, "[cache]\ninflight_fetch_bytes = \"1MiB\"\n"));
    for _ in 0..2 {
        let response = gateway.get("/", &[]);
        assert_eq!((response.status, response.body.len(), response.is_hit()), (200, 2 << 20, false));
    }
    assert_eq!(origin.count(), 2);
}

/// Sends a request for `target` on each of `count` connections; returns the time until all
/// responses arrived.
fn get_concurrently(gateway: &Gateway, target: &str, count: usize) -> Duration {
    let mut clients: Vec<Client> = (0..count).map(|_| gateway.connect()).collect();
    let start = Instant::now();
    clients.iter_mut().for_each(|client| client.send_get(target, &[]));
    for client in &mut clients {
        let response = client.read_response();
        assert_eq!((response.status, response.end), (200, BodyEnd::Complete));
    }
    start.elapsed()
}

#[test]
fn concurrent_misses_make_one_request_and_uncacheable_ones_do_not_queue() {
    const CLIENTS: usize = 1_000;
    const EXCHANGE: Duration = Duration::from_millis(300);
    let origin = Origin::start(|request| {
        let control = if request.target.starts_with("/shared") { "max-age=60" } else { "no-store" };
        Script::new().pause(EXCHANGE).head(200, &[("Cache-Control", control), ("Content-Length", "4")]).send("body")
    });
    let gateway = cached(&origin);
    get_concurrently(&gateway, "/shared", CLIENTS);
    assert_eq!(origin.count(), 1, "concurrent misses are one request");
    // One exchange for the leader, one for the waiting requests. A queue would take one exchange
    // per client.
    let took = get_concurrently(&gateway, "/private", CLIENTS);
    assert_eq!(origin.count(), 1 + CLIENTS);
    assert!(took < 10 * EXCHANGE, "{took:?}");
    // The key is marked as hit-for-miss now, and requests do not wait.
    let took = get_concurrently(&gateway, "/private", CLIENTS);
    assert!(took < 5 * EXCHANGE, "{took:?}");
}

/// An origin that sends a long chunked body slowly.
fn endless() -> Origin {
    Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
        let piece = [b"1000\r\n", &[b'x'; 0x1000][..], b"\r\n"].concat();
        (0..3_000).fold(Script::new().head(200, &head), |script, _| script.pause(Duration::from_millis(2)).send(&piece))
    })
}

#[test]
fn fill_without_readers_is_aborted() {
    let origin = endless();
    let gateway = cached(&origin);
    let mut clients: Vec<Client> = (0..3).map(|_| gateway.connect()).collect();
    for client in &mut clients {
        client.send_get("/", &[]);
        assert_eq!(client.read_head().status, 200);
    }
    assert_eq!(origin.count(), 1);
    clients.truncate(1);
    std::thread::sleep(Duration::from_millis(200));
    assert!(origin.ends().is_empty(), "one reader is left");
    let disconnected_at = Instant::now();
    drop(clients);
    wait_for(|| !origin.ends().is_empty(), STEP_TIMEOUT);
    // The guarantee is 100 ms. The rest is tolerance for a busy machine.
    assert!(disconnected_at.elapsed() < Duration::from_millis(600), "{:?}", disconnected_at.elapsed());
}

#[test]
fn background_validation_continues_without_readers() {
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
    wait_for(|| gateway.get("/", &[]).text() == "new", STEP_TIMEOUT);
    assert_eq!(origin.count(), 2);
}

#[test]
fn stalled_readers_throttle_the_origin_and_do_not_grow_memory() {
    const READERS: usize = 40;
    // 64 MiB, of which no reader consumes anything.
    let origin = Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Content-Length", "67108864")];
        (0..64).fold(Script::new().head(200, &head), |script, _| script.send(vec![b'x'; 1 << 20]))
    });
    let gateway = cached(&origin);
    let before = gateway.process.memory();
    let mut readers: Vec<Client> = (0..READERS).map(|_| gateway.connect()).collect();
    for (number, reader) in readers.iter_mut().enumerate() {
        reader.send_get(&format!("/{number}"), &[]);
        assert_eq!(reader.read_head().status, 200);
    }
    std::thread::sleep(Duration::from_millis(500));
    let grown = gateway.process.memory().saturating_sub(before);
    // A body that is too large to store is buffered only for one window per fill: 1 MiB and a
    // buffer.
    assert!(grown < (READERS * 5 / 4) << 20, "{} MiB for {READERS} readers", grown >> 20);
    drop(readers);
}

#[test]
fn slow_readers_share_one_body() {
    const READERS: usize = 100;
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; 6 << 20]));
    let gateway = cached(&origin);
    let before = gateway.process.memory();
    let mut readers: Vec<Client> = (0..READERS).map(|_| gateway.connect()).collect();
    for reader in &mut readers {
        reader.send_get("/", &[]);
        assert_eq!(reader.read_head().status, 200);
    }
    wait_for(|| gateway.get("/", &[]).is_hit(), STEP_TIMEOUT);
    let grown = gateway.process.memory().saturating_sub(before);
    assert!(grown < 40 << 20, "{} MiB for one body of 6 MiB", grown >> 20);
    assert_eq!(origin.count(), 1);
    for mut reader in readers {
        assert_eq!(reader.read_bytes(6 << 20).len(), 6 << 20);
    }
}
