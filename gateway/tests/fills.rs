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

/// Sends a request for `/` on each of `count` connections and waits until all are in flight.
fn wait_together(gateway: &Gateway, count: usize) -> Vec<Client> {
    let mut clients: Vec<Client> = (0..count).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(|client| client.send_get("/", &[]));
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == count as f64, STEP_TIMEOUT);
    clients
}

#[test]
fn hung_origin_gets_at_most_two_requests_of_sixty_waiting_clients() {
    let origin = Origin::start(|_| Script::new().hang());
    let config =
        one_route(origin.address, CACHED, "").replace("[upstreams.origin]", "[upstreams.origin]\ntimeout = \"1s\"");
    let gateway = Gateway::start(&config);
    let begun = Instant::now();
    for mut client in wait_together(&gateway, 60) {
        assert_eq!(client.read_response().status, 503);
    }
    assert!(origin.count() <= 2, "{} requests", origin.count());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn origin_that_closes_late_gets_at_most_two_requests_of_sixty_waiting_clients() {
    let origin = Origin::start(|_| Script::new().pause(Duration::from_secs(1)).close());
    let config =
        one_route(origin.address, CACHED, "").replace("[upstreams.origin]", "[upstreams.origin]\ntimeout = \"1s\"");
    let gateway = Gateway::start(&config);
    for mut client in wait_together(&gateway, 60) {
        assert_eq!(client.read_response().status, 503);
    }
    assert!(origin.count() <= 2, "{} requests", origin.count());
}

#[test]
fn server_error_is_shared_and_the_next_requests_are_collapsed_again() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new().wait(&opened).pause(Duration::from_millis(200)).head(500, &[("Content-Length", "4")]).send("oops")
    });
    let gateway = cached(&origin);
    let waiting = wait_together(&gateway, 30);
    gate.open();
    for mut client in waiting {
        let response = client.read_response();
        assert_eq!((response.status, response.text()), (500, "oops".to_owned()));
    }
    assert_eq!(origin.count(), 1);
    // No marker is left: while the origin is in trouble, requests are still collapsed.
    for mut client in wait_together(&gateway, 30) {
        assert_eq!(client.read_response().status, 500);
    }
    assert_eq!(origin.count(), 2);
}

#[test]
fn server_error_for_one_client_is_not_shared_and_not_multiplied() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        let head = [("Set-Cookie", "a=1"), ("Content-Length", "4")];
        Script::new().wait(&opened).head(500, &head).send("mine")
    });
    let gateway = cached(&origin);
    let waiting = wait_together(&gateway, 10);
    gate.open();
    let responses: Vec<_> = waiting.into_iter().map(|mut client| client.read_response()).collect();
    let own = responses.iter().filter(|response| response.text() == "mine").count();
    let pages = responses.iter().filter(|response| response.status == 503).count();
    assert_eq!((own, pages, origin.count()), (1, 9, 1));
}

#[test]
fn validation_that_may_not_be_stored_takes_one_round() {
    let (first, others) = (Gate::default(), Gate::default());
    let (first_opened, others_opened) = (first.clone(), others.clone());
    let origin = Origin::start(move |request| match (request.field("if-none-match"), request.number) {
        (None, 0) => Script::ok(&[("Cache-Control", "max-age=0"), ("ETag", "\"a\"")], "body"),
        (_, 1) => {
            let head = [("Cache-Control", "no-store"), ("ETag", "\"a\"")];
            Script::new().wait(&first_opened).head(304, &head)
        }
        _ => Script::new().wait(&others_opened).head(200, &[("Content-Length", "4")]).send("body"),
    });
    let gateway = cached(&origin);
    gateway.get("/", &[]);
    let waiting = wait_together(&gateway, 10);
    first.open();
    // The other nine fetch at once, each for itself, and do not wait for each other again.
    origin.wait_for_requests(2 + 9);
    others.open();
    for mut client in waiting {
        assert_eq!(client.read_response().text(), "body");
    }
    assert_eq!(origin.count(), 2 + 9);
}

/// An origin with a chunked body of 12 MB, above `cache.object_bytes`.
fn large_chunked() -> Origin {
    Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
        let piece = [b"10000\r\n", &[b'x'; 0x10000][..], b"\r\n"].concat();
        (0..192).fold(Script::new().head(200, &head), |script, _| script.send(&piece)).send("0\r\n\r\n")
    })
}

#[test]
fn stalled_reader_does_not_hold_back_another_one() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        let head = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
        let piece = [b"10000\r\n", &[b'x'; 0x10000][..], b"\r\n"].concat();
        let start = Script::new().head(200, &head).send(&piece).wait(&opened);
        (1..192).fold(start, |script, _| script.send(&piece)).send("0\r\n\r\n")
    });
    let gateway = cached(&origin);
    let mut stalled = gateway.connect();
    stalled.send_get("/", &[]);
    assert_eq!(stalled.read_head().status, 200);
    let mut fast = gateway.connect();
    fast.send_get("/", &[]);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 2.0, STEP_TIMEOUT);
    let begun = Instant::now();
    gate.open();
    let response = fast.read_response();
    assert_eq!((response.end, response.body.len()), (BodyEnd::Complete, 192 << 16));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(origin.count(), 1, "both read one fetch");
    // The slow client gets what was sent to it, then a reset.
    assert!(stalled.read_to_end().len() < 192 << 16);
    wait_for(|| gateway.metric("tidegate_responses_aborted_total{reason=\"slow_reader\"}") == 1.0, STEP_TIMEOUT);
}

#[test]
fn stalled_readers_of_growing_bodies_stay_within_the_budget() {
    const READERS: usize = 60;
    const BUDGET_MIB: usize = 16;
    let origin = large_chunked();
    let rest = format!("[cache]\ninflight_fetch_bytes = \"{BUDGET_MIB}MiB\"\n");
    let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
    let before = gateway.process.memory();
    let mut readers: Vec<Client> = (0..READERS).map(|_| gateway.connect()).collect();
    for (number, reader) in readers.iter_mut().enumerate() {
        reader.send_get(&format!("/{number}"), &[]);
        assert_eq!(reader.read_head().status, 200);
    }
    let mut largest = 0;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        largest = largest.max(gateway.process.memory().saturating_sub(before));
    }
    // In addition to the budget: a chunk and read and write buffers for each fetch (256 KiB), and
    // what the allocator keeps.
    let bound = (BUDGET_MIB << 20) + READERS * (256 << 10) + (8 << 20);
    assert!(largest < bound, "{} MiB, at most {} MiB", largest >> 20, bound >> 20);
    drop(readers);
}
