//! Collapsed misses: concurrent misses of one key are one request, and slow, disconnected or
//! waiting clients do not affect others.

mod support;

use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::client::{chunked, read_chunk};
use support::{
    BodyEnd, Client, ClientResponse, Gate, Gateway, Origin, ReceivedRequest, STEP_TIMEOUT, Script, one_route, wait_for,
};

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
fn stalled_clients_of_a_passed_body_throttle_the_origin() {
    const READERS: usize = 40;
    // 64 MiB, of which no reader consumes anything.
    let origin = Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Content-Length", "67108864")];
        Script::new().head(200, &head).fill(64 << 20)
    });
    let gateway = cached(&origin);
    let before = gateway.process.memory();
    let mut readers = Vec::new();
    for number in 0..READERS {
        let mut reader = gateway.connect();
        reader.send_get(&format!("/{number}"), &[]);
        assert_eq!(reader.read_head().status, 200);
        readers.push(reader);
    }
    std::thread::sleep(Duration::from_millis(500));
    let grown = gateway.process.memory().saturating_sub(before);
    // A body of a known length above `object_bytes` is passed through: one buffer for each client.
    assert!(grown < READERS << 20, "{} MiB for {READERS} readers", grown >> 20);
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

/// A request that is sent again, because a kept connection was closed, is the second one.
#[test]
fn origin_that_closes_kept_connections_gets_at_most_two_requests_of_sixty_waiting_clients() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/kept" => Script::ok(&[("Cache-Control", "no-store")], "kept"),
        _ => Script::new().wait(&opened).close(),
    });
    let gateway = cached(&origin);
    assert_eq!(gateway.get("/kept", &[]).text(), "kept");
    let waiting = wait_together(&gateway, 60);
    origin.wait_for_requests(2);
    gate.open();
    for mut client in waiting {
        assert!(client.read_response().status >= 500);
    }
    assert!(origin.count() <= 3, "{} requests after the first", origin.count() - 1);
}

/// The fetch that repeats a failed one takes no kept connection, which might be closed too.
#[test]
fn repeated_fetch_is_sent_once() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/kept" => Script::ok(&[("Cache-Control", "no-store")], "kept"),
        _ => Script::new().wait(&opened).close(),
    });
    // Kept connections belong to a worker.
    let gateway = Gateway::start(&one_route(origin.address, CACHED, "[server]\nworkers = 1\n"));
    let waiting = wait_together(&gateway, 20);
    origin.wait_for_requests(1);
    // The first fetch has a new connection. The next one would find this one in the pool.
    assert_eq!(gateway.get("/kept", &[]).text(), "kept");
    gate.open();
    for mut client in waiting {
        assert!(client.read_response().status >= 500);
    }
    assert_eq!(origin.count(), 3, "two requests of the fetch, and that of the kept connection");
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

/// An origin with a chunked body of 24 MiB, above `cache.object_bytes`.
fn large_chunked() -> Origin {
    Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
        let piece = [b"10000\r\n", &[b'x'; 0x10000][..], b"\r\n"].concat();
        (0..384).fold(Script::new().head(200, &head), |script, _| script.send(&piece)).send("0\r\n\r\n")
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
        (1..384).fold(start, |script, _| script.send(&piece)).send("0\r\n\r\n")
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
    assert_eq!((response.end, response.body.len()), (BodyEnd::Complete, 384 << 16));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(origin.count(), 1, "both read one fetch");
    // The slow client gets what was sent to it, then a reset.
    assert!(stalled.read_to_end().len() < 384 << 16);
    wait_for(|| gateway.metric("tidegate_responses_aborted_total{reason=\"slow_reader\"}") == 1.0, STEP_TIMEOUT);
}

/// Size of the object that a slow reader continues: above `cache.object_bytes`.
const LARGE: usize = 24 << 20;

/// Bytes that differ at every offset within reach of a mistake.
fn large_body() -> Vec<u8> {
    (0..LARGE as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// An origin with the object in its first response, chunked, after a gate; and with `rest` for
/// requests with a range, which gets the requested offset and the object.
fn resumable(
    gate: &Gate,
    fields: &'static [(&str, &str)],
    rest: impl Fn(&ReceivedRequest, usize, &[u8]) -> Script + Send + Sync + 'static,
) -> Origin {
    let (opened, body) = (gate.clone(), large_body());
    Origin::start(move |request| {
        if let Some(range) = request.field("range") {
            let first = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
            return rest(request, first.expect("one open range").parse().expect("an offset"), &body);
        }
        let head = [&[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")], fields].concat();
        let (start, later) = body.split_at(0x10000);
        let first = [b"10000\r\n", start, b"\r\n"].concat();
        Script::new().head(200, &head).send(first).wait(&opened).send(chunked(later, 0x10000))
    })
}

const TAGGED: &[(&str, &str)] = &[("Accept-Ranges", "bytes"), ("ETag", "\"a\"")];

fn part(status: u16, fields: &[(&str, &str)], (first, body): (usize, &[u8])) -> Script {
    let range = format!("bytes {first}-{}/{}", body.len() - 1, body.len());
    let fields = [&[("Content-Range", &*range)], fields].concat();
    Script::reply(status, &fields, &body[first..])
}

/// Lets a client fall behind a fast one, and returns what it then reads.
fn read_slowly(gateway: &Gateway, gate: &Gate) -> ClientResponse {
    let mut slow = gateway.connect();
    slow.send_get("/", &[("If-None-Match", "\"other\""), ("X-Client", "slow")]);
    let head = slow.read_head();
    assert_eq!(head.status, 200);
    let mut fast = gateway.connect();
    fast.send_get("/", &[]);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 2.0, STEP_TIMEOUT);
    gate.open();
    let response = fast.read_response();
    assert_eq!((response.end, response.body == large_body()), (BodyEnd::Complete, true));
    slow.read_body(head, "GET")
}

fn continuations(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tidegate_fill_continuations_total{{result=\"{result}\"}}"))
}

fn slow_readers(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_responses_aborted_total{reason=\"slow_reader\"}")
}

#[test]
fn slow_reader_continues_with_a_range_request() {
    let date: &[(&str, &str)] = &[
        ("Accept-Ranges", "bytes"),
        ("Last-Modified", "Sun, 06 Nov 1994 08:00:00 GMT"),
        ("Date", "Sun, 06 Nov 1994 08:49:37 GMT"),
    ];
    for (fields, validator) in [(TAGGED, "\"a\""), (date, "Sun, 06 Nov 1994 08:00:00 GMT")] {
        let gate = Gate::default();
        let origin = resumable(&gate, fields, move |_, first, body| part(206, fields, (first, body)));
        let gateway = cached(&origin);
        let response = read_slowly(&gateway, &gate);
        assert_eq!((response.end, response.body.len()), (BodyEnd::Complete, LARGE));
        assert!(response.body == large_body(), "every byte is right");
        let requests = origin.requests();
        assert_eq!(requests.len(), 2, "one shared fetch, one range request");
        assert_eq!(requests[1].field("if-range"), Some(validator));
        assert_eq!((requests[1].field("if-none-match"), requests[1].field("x-client")), (None, Some("slow")));
        assert!(requests[1].field("x-forwarded-for").is_some() && requests[1].field("via").is_some());
        assert_eq!((continuations(&gateway, "continued"), slow_readers(&gateway)), (1.0, 0.0));
    }
}

#[test]
fn slow_reader_continues_with_a_chunked_part() {
    let gate = Gate::default();
    let origin = resumable(&gate, TAGGED, |_, first, body| {
        let range = format!("bytes {first}-{}/{LARGE}", LARGE - 1);
        let head = [("Content-Range", &*range), ("ETag", "\"a\""), ("Transfer-Encoding", "chunked")];
        Script::new().head(206, &head).send(chunked(&body[first..], 10_000))
    });
    let gateway = cached(&origin);
    let response = read_slowly(&gateway, &gate);
    assert!((response.end, response.body) == (BodyEnd::Complete, large_body()));
    assert_eq!((continuations(&gateway, "continued"), slow_readers(&gateway)), (1.0, 0.0));
}

#[test]
fn slow_reader_of_a_known_length_continues_while_the_budget_is_used_up() {
    let (gate, body) = (Gate::default(), large_body());
    let opened = gate.clone();
    let origin = Origin::start(move |request| match request.field("range") {
        Some(range) => {
            let first = range.trim_start_matches("bytes=").trim_end_matches('-').parse().expect("an offset");
            part(206, TAGGED, (first, &body))
        }
        None => {
            let length = LARGE.to_string();
            let head = [&[("Cache-Control", "max-age=60"), ("Content-Length", &*length)], TAGGED].concat();
            Script::new().head(200, &head).send(&body[..0x10000]).wait(&opened).send(&body[0x10000..])
        }
    });
    let rest = "[cache]\nobject_bytes = \"32MiB\"\ninflight_fetch_bytes = \"1MiB\"\n";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    let response = read_slowly(&gateway, &gate);
    assert!((response.end, response.body) == (BodyEnd::Complete, large_body()));
    assert_eq!((continuations(&gateway, "continued"), slow_readers(&gateway)), (1.0, 0.0));
}

#[test]
fn slow_reader_is_aborted_where_the_rest_does_not_fit() {
    type Rest = fn(usize, &[u8]) -> Script;
    let cases: [(&str, &str, Rest); 6] = [
        ("another version", "mismatch", |first, body| part(206, &[("ETag", "\"b\"")], (first, body))),
        ("no validator", "mismatch", |first, body| part(206, &[], (first, body))),
        ("ignored range", "mismatch", |_, body| Script::ok(TAGGED, body)),
        ("another range", "mismatch", |first, body| part(206, TAGGED, (first - 1, body))),
        ("error", "mismatch", |_, _| Script::reply(503, &[], "")),
        ("no response", "failed", |_, _| Script::new().close()),
    ];
    for (name, result, rest) in cases {
        let gate = Gate::default();
        let origin = resumable(&gate, TAGGED, move |_, first, body| rest(first, body));
        let gateway = cached(&origin);
        let response = read_slowly(&gateway, &gate);
        assert_eq!(response.end, BodyEnd::Truncated, "{name}");
        assert!(response.body.len() < LARGE && large_body().starts_with(&response.body), "{name}");
        wait_for(|| slow_readers(&gateway) == 1.0, STEP_TIMEOUT);
        assert_eq!(continuations(&gateway, result), 1.0, "{name}");
    }
}

#[test]
fn part_that_ends_early_is_an_aborted_response() {
    let gate = Gate::default();
    let origin = resumable(&gate, TAGGED, |_, first, body| {
        let range = format!("bytes {first}-{}/{LARGE}", LARGE - 1);
        let head = [("Content-Range", &*range), ("ETag", "\"a\""), ("Transfer-Encoding", "chunked")];
        Script::new().head(206, &head).send(chunked(&body[first..LARGE - 1], 10_000))
    });
    let gateway = cached(&origin);
    let response = read_slowly(&gateway, &gate);
    assert_eq!(response.end, BodyEnd::Truncated);
    assert!(large_body().starts_with(&response.body));
    wait_for(|| gateway.metric("tidegate_responses_aborted_total{reason=\"body_failed\"}") == 1.0, STEP_TIMEOUT);
}

#[test]
fn no_range_is_requested_without_a_strong_validator() {
    for fields in [
        &[("Accept-Ranges", "bytes"), ("ETag", "W/\"a\"")][..],
        &[("Accept-Ranges", "none"), ("ETag", "\"a\"")],
        &[("ETag", "\"a\"")],
        // The gateway adds `Date`, which says nothing about the origin's clock.
        &[("Accept-Ranges", "bytes")],
    ] {
        let gate = Gate::default();
        let origin = resumable(&gate, fields, move |_, first, body| part(206, fields, (first, body)));
        let gateway = cached(&origin);
        assert_eq!(read_slowly(&gateway, &gate).end, BodyEnd::Truncated, "{fields:?}");
        wait_for(|| slow_readers(&gateway) == 1.0, STEP_TIMEOUT);
        assert_eq!(origin.count(), 1, "{fields:?}");
    }
}

fn in_flight(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_requests_in_flight")
}

/// A response that may be stored, once the gate is open.
fn answer_after(gate: &Gate) -> Script {
    Script::new().wait(gate).head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "4")]).send("body")
}

fn detached_fetches(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_tasks{kind=\"detached_fetch\"}")
}

/// Lets `count` clients join one key, one after the other, and all but the last leave, the leaders
/// first. Returns the last.
fn leave_one_after_the_other(gateway: &Gateway, count: usize, leader: &[(&str, &str)]) -> Client {
    let mut clients = Vec::new();
    for number in 0..count {
        let mut client = gateway.connect();
        client.send_get("/", if number == 0 { leader } else { &[] });
        wait_for(|| in_flight(gateway) == (number + 1) as f64, STEP_TIMEOUT);
        clients.push(client);
    }
    for left in (1..count).rev() {
        drop(clients.remove(0));
        wait_for(|| in_flight(gateway) == left as f64, STEP_TIMEOUT);
    }
    clients.remove(0)
}

#[test]
fn leaders_that_leave_one_after_the_other_cost_one_exchange() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| answer_after(&opened));
    let gateway = cached(&origin);
    // The condition of the client that leaves is its own.
    let mut last = leave_one_after_the_other(&gateway, 10, &[("If-None-Match", "*")]);
    assert_eq!(detached_fetches(&gateway), 1.0);
    gate.open();
    let response = last.read_response();
    assert_eq!((response.status, response.text()), (200, "body".to_owned()));
    assert_eq!(origin.count(), 1);
    assert!(gateway.get("/", &[]).is_hit());
    wait_for(|| detached_fetches(&gateway) == 0.0, STEP_TIMEOUT);
}

#[test]
fn fetch_without_its_client_ends_with_the_last_waiting_request() {
    let origin = Origin::start(|_| Script::new().hang());
    let gateway = cached(&origin);
    let last = leave_one_after_the_other(&gateway, 3, &[]);
    assert_eq!((detached_fetches(&gateway), origin.ends().len()), (1.0, 0));
    drop(last);
    wait_for(|| detached_fetches(&gateway) == 0.0 && origin.ends().len() == 1, STEP_TIMEOUT);
    assert_eq!(origin.count(), 1);
}

#[test]
fn fetch_without_its_client_keeps_its_deadline() {
    let origin = Origin::start(|_| Script::new().hang());
    let config =
        one_route(origin.address, CACHED, "").replace("[upstreams.origin]", "[upstreams.origin]\ntimeout = \"1s\"");
    let gateway = Gateway::start(&config);
    let begun = Instant::now();
    assert_eq!(leave_one_after_the_other(&gateway, 3, &[]).read_response().status, 503);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(origin.count(), 1);
    wait_for(|| detached_fetches(&gateway) == 0.0, STEP_TIMEOUT);
}

#[test]
fn deadline_of_the_leader_does_not_end_the_fetch_for_others() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| answer_after(&opened));
    let rest = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\n";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    let (mut leader, mut other) = (gateway.connect(), gateway.connect());
    leader.send_get("/", &[("X-Envoy-Expected-Rq-Timeout-Ms", "500")]);
    origin.wait_for_requests(1);
    other.send_get("/", &[]);
    wait_for(|| in_flight(&gateway) == 2.0, STEP_TIMEOUT);
    assert_eq!(leader.read_response().status, 503);
    assert_eq!(detached_fetches(&gateway), 1.0);
    gate.open();
    assert_eq!((other.read_response().text(), origin.count()), ("body".to_owned(), 1));
}

#[test]
fn shared_fetches_end_with_the_process() {
    let origin = Origin::start(|_| Script::new().hang());
    let rest = "[server]\nworkers = 2\ndrain_timeout = \"200ms\"\n";
    let mut gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    // One led by its client, one without, both with requests of both workers that wait.
    let left = leave_one_after_the_other(&gateway, 3, &[]);
    let others: Vec<Client> = (0..16).map(|_| gateway.connect()).collect();
    let others: Vec<Client> = others
        .into_iter()
        .map(|mut client| {
            client.send_get("/other", &[]);
            client
        })
        .collect();
    wait_for(|| in_flight(&gateway) == 17.0, STEP_TIMEOUT);
    gateway.process.signal("TERM");
    assert!(gateway.process.wait(STEP_TIMEOUT).is_some(), "it ends at the drain timeout");
    let lines = gateway.process.stderr.all();
    assert!(!lines.iter().any(|line| line.contains("panic")), "{lines:#?}");
    drop((left, others));
}

#[test]
fn fetch_without_its_client_may_validate_or_be_uncacheable() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| match (request.number, request.field("if-none-match")) {
        (0, _) => Script::ok(&[("Cache-Control", "max-age=0"), ("ETag", "\"a\"")], "body"),
        (1, Some(_)) => Script::new().wait(&opened).head(304, &[("Cache-Control", "max-age=0"), ("ETag", "\"a\"")]),
        (2, Some(_)) => Script::new()
            .pause(Duration::from_millis(500))
            .head(304, &[("Cache-Control", "no-store"), ("ETag", "\"a\"")]),
        _ => Script::reply(200, &[("Cache-Control", "no-store")], "mine"),
    });
    let gateway = cached(&origin);
    gateway.get("/", &[]);
    let mut last = leave_one_after_the_other(&gateway, 3, &[]);
    gate.open();
    assert_eq!((last.read_response().text(), origin.count()), ("body".to_owned(), 2));
    // Not to be shared: the client that is left fetches on its own.
    let mut last = leave_one_after_the_other(&gateway, 2, &[]);
    let response = last.read_response();
    assert_eq!((response.status, origin.count()), (200, 4));
}

/// CPU time of the gateway so far, in seconds.
fn cpu_seconds(gateway: &Gateway) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", gateway.process.id())).expect("a live process");
    let after_name = stat.rsplit(')').next().expect("fields");
    let ticks = after_name.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number"));
    // USER_HZ is 100 on every Linux.
    ticks.sum::<f64>() / 100.0
}

#[test]
fn ten_thousand_waiting_clients_share_one_exchange() {
    const CLIENTS: usize = 10_000;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("up to the maximum");
    let allowed = limit.maximum.map_or(CLIENTS, |maximum| usize::try_from(maximum).unwrap_or(CLIENTS));
    let count = CLIENTS.min(allowed.saturating_sub(2_000));
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| answer_after(&opened));
    let rest = "[limits_http]\nconnections_per_ip = 100000\n";
    let config =
        one_route(origin.address, CACHED, rest).replace("[upstreams.origin]", "[upstreams.origin]\ntimeout = \"60s\"");
    let gateway = Gateway::start(&config);
    let begun = Instant::now();
    let mut clients: Vec<Client> = (0..count)
        .map(|_| {
            let mut client = gateway.connect();
            client.send_get("/", &[]);
            client
        })
        .collect();
    wait_for(|| in_flight(&gateway) == count as f64, 3 * STEP_TIMEOUT);
    let (joined, joining) = (begun.elapsed(), cpu_seconds(&gateway));
    gate.open();
    for client in &mut clients {
        let response = client.read_response();
        assert_eq!((response.status, response.text()), (200, "body".to_owned()));
    }
    let (all, cpu) = (begun.elapsed(), cpu_seconds(&gateway));
    println!(
        "{count} clients: joined in {joined:?}, {joining} s of CPU; answered in {:?}, {} s of CPU",
        all - joined,
        cpu - joining
    );
    assert_eq!(origin.count(), 1);
}

#[test]
fn stalled_readers_of_growing_bodies_stay_within_the_budget() {
    const READERS: usize = 60;
    const BUDGET_MIB: usize = 16;
    let origin = large_chunked();
    let rest = format!("[cache]\ninflight_fetch_bytes = \"{BUDGET_MIB}MiB\"\n");
    let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
    let before = gateway.process.memory();
    let mut readers = Vec::new();
    for number in 0..READERS {
        let mut reader = gateway.connect();
        reader.send_get(&format!("/{number}"), &[]);
        assert_eq!(reader.read_head().status, 200);
        readers.push(reader);
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

/// A request that begins after a write or a purge does not get the response to a request that was
/// sent before it.
#[test]
fn a_request_after_a_removal_does_not_join_the_fetch_before_it() {
    for removal in ["write", "purge-url", "purge-all", "purge-tag"] {
        let gate = Gate::default();
        let opened = gate.clone();
        let origin = Origin::start(move |request| match (request.method.as_str(), request.number) {
            ("GET", 0) => Script::new()
                .head(200, &[("Cache-Control", "max-age=60"), ("Surrogate-Key", "t"), ("Content-Length", "3")])
                .wait(&opened)
                .send("old"),
            _ => Script::ok(&[("Cache-Control", "max-age=60")], "new"),
        });
        let gateway = cached(&origin);
        let mut first = gateway.connect();
        first.send_get("/x", &[]);
        assert_eq!(first.read_head().status, 200);
        match removal {
            "write" => assert_eq!(gateway.request("POST", "/x", &[], b"").status, 200),
            purge => {
                let query = match purge {
                    "purge-url" => "url=http://gate.test/x".to_owned(),
                    "purge-all" => "all=true".to_owned(),
                    _ => "tag=t".to_owned(),
                };
                let mut admin = Client::connect(gateway.admin);
                let status =
                    admin.request("POST", &format!("/api/v1/purge?{query}"), &[("host", "localhost")], b"").status;
                assert_eq!(status, 200, "{purge}");
            }
        }
        let second = gateway.get("/x", &[]);
        assert_eq!((second.status, second.text()), (200, "new".to_owned()), "{removal}: {}", second.cache_status());
        gate.open();
        assert_eq!(first.read_bytes(3), b"old");
        assert!(gateway.get("/x", &[]).text() == "new", "{removal}: the old response is not stored");
    }
}

#[test]
fn body_that_fails_with_its_head_is_not_fetched_once_for_each_waiting_request() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        let bytes = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n";
        Script::new().wait(&opened).send(bytes).close()
    });
    let gateway = cached(&origin);
    let waiting = wait_together(&gateway, 60);
    gate.open();
    for mut client in waiting {
        // The leader's response may have begun.
        let response = client.read_response();
        assert!(response.status == 502 || response.end != BodyEnd::Complete, "{}", response.status);
    }
    assert!(origin.count() <= 2, "{} requests", origin.count());
}

/// Conditional requests leave no reader behind: one connection cannot fill the places of a fetch.
#[test]
fn matching_conditions_neither_fill_a_fetch_nor_keep_it_alive() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new()
            .head(200, &[("Cache-Control", "max-age=60"), ("ETag", "\"a\""), ("Content-Length", "8")])
            .send("half")
            .wait(&opened)
            .send("rest")
    });
    let gateway = cached(&origin);
    let mut first = gateway.connect();
    first.send_get("/x", &[]);
    assert_eq!(first.read_head().status, 200);
    let mut conditional = gateway.connect();
    for _ in 0..20_100 {
        let response = conditional.get("/x", &[("If-None-Match", "*")]);
        assert_eq!(response.status, 304);
    }
    // There is still a place for others.
    let mut second = gateway.connect();
    second.send_get("/x", &[]);
    assert_eq!(second.read_head().status, 200);
    drop(first);
    drop(second);
    // The object is completed for the store, because clients have asked for it.
    gate.open();
    wait_for(|| gateway.get("/x", &[]).is_hit(), STEP_TIMEOUT);
    assert_eq!(origin.count(), 1);
}

/// The second client begins later and reads as fast as the first: it is not slow.
#[test]
fn a_request_that_joins_late_is_not_cut() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        let head = Script::new().head(200, &[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")]);
        let first = (0..6).fold(head, |script, _| script.send(piece()));
        (0..6).fold(first.wait(&opened), |script, _| script.send(piece())).send("0\r\n\r\n")
    });
    let gateway = cached(&origin);
    let mut early = gateway.connect();
    early.send_get("/x", &[]);
    let early_head = early.read_head();
    // It has read half of the body when the other one begins.
    let mut late = gateway.connect();
    late.send_get("/x", &[]);
    let late_head = late.read_head();
    assert_eq!((early_head.status, late_head.status), (200, 200));
    gate.open();
    // Side by side: one that falls 1 MiB behind the other would be cut.
    let (mut clients, mut lengths, mut has_ended) = ([early, late], [0; 2], [false; 2]);
    while has_ended != [true; 2] {
        let behind = usize::from(has_ended[0] || !has_ended[1] && lengths[1] < lengths[0]);
        let length = read_chunk(|count| clients[behind].read_bytes(count)).len();
        lengths[behind] += length;
        has_ended[behind] = length == 0;
    }
    assert_eq!(lengths, [12 << 20; 2]);
    assert_eq!(origin.count(), 1);
    // The object is known to be too large: the next requests of it do not wait for each other.
    assert!(gateway.get("/x", &[]).cache_status().contains("fwd=miss"));
}

/// A chunk of 1 MiB.
fn piece() -> Vec<u8> {
    [b"100000\r\n", &[b'x'; 1 << 20][..], b"\r\n"].concat()
}

/// Clients that do not read bodies which outgrow the object limit hold the budget of all fetches.
/// The responses of others are stored all the same.
#[test]
fn stalled_readers_do_not_keep_other_responses_from_the_store() {
    let origin = Origin::start(|request| {
        if request.target.starts_with("/small") {
            return Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; 100 << 10]);
        }
        let head = Script::new().head(200, &[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")]);
        (0..12).fold(head, |script, _| script.send(piece())).send("0\r\n\r\n")
    });
    let rest = "[cache]\ninflight_fetch_bytes = \"24MiB\"\n";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    let stalled: Vec<Client> = (0..8)
        .map(|number| {
            let mut client = gateway.connect();
            client.send_get(&format!("/big/{number}"), &[]);
            client
        })
        .collect();
    wait_for(|| origin.count() == 8, STEP_TIMEOUT);
    std::thread::sleep(Duration::from_millis(500));
    for number in 0..5 {
        let target = format!("/small/{number}");
        assert_eq!(gateway.get(&target, &[]).status, 200);
        wait_for(|| gateway.get(&target, &[]).is_hit(), STEP_TIMEOUT);
    }
    drop(stalled);
}

/// The clock that ended a shared fetch is in the log of each of its readers.
#[test]
fn a_fetch_that_ends_by_its_total_time_is_not_blamed_on_the_upstream() {
    let origin = Origin::start(|_| {
        Script::new().head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "8")]).send("half").hang()
    });
    let gateway = Gateway::start(&one_route(origin.address, &format!("{CACHED}\ntotal_timeout = \"300ms\""), ""));
    assert_ne!(gateway.get("/x", &[]).end, BodyEnd::Complete);
    let log = gateway.access_log(1);
    assert_eq!(log[0]["blame"], "gateway", "{}", log[0]);
}

/// The bodies are below the object limit: complete, in the store or evicted from it, and still held
/// by clients that do not read.
#[test]
fn stalled_readers_of_stored_bodies_stay_within_the_budget() {
    const READERS: usize = 40;
    const BUDGET_MIB: usize = 16;
    const CACHE_MIB: usize = 8;
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; 7 << 20]));
    let rest = format!("[cache]\ninflight_fetch_bytes = \"{BUDGET_MIB}MiB\"\nmemory = \"{CACHE_MIB}MiB\"\n");
    let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
    let before = gateway.process.memory();
    let mut readers = Vec::new();
    let mut largest = 0;
    for number in 0..READERS {
        let mut reader = gateway.connect();
        reader.send_get(&format!("/{number}"), &[]);
        assert_eq!(reader.read_head().status, 200);
        readers.push(reader);
        largest = largest.max(gateway.process.memory().saturating_sub(before));
    }
    // Another client gets its response, and the store takes it.
    assert_eq!(gateway.get("/last", &[]).body.len(), 7 << 20);
    largest = largest.max(gateway.process.memory().saturating_sub(before));
    // In addition to the budget and the cache: one body that is put together, read and write
    // buffers for each client (256 KiB), and what the allocator keeps.
    let bound = ((BUDGET_MIB + CACHE_MIB + 8 + 16) << 20) + READERS * (256 << 10);
    assert!(largest < bound, "{} MiB, at most {} MiB", largest >> 20, bound >> 20);
    drop(readers);
}

#[test]
fn background_validation_ends_when_its_response_is_too_large_to_store() {
    let origin = Origin::start(|request| match request.number {
        0 => Script::ok(&[("Cache-Control", "max-age=0, stale-while-revalidate=60"), ("ETag", "\"a\"")], "old"),
        _ => {
            let head = Script::new().head(200, &[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")]);
            (0..9).fold(head, |script, _| script.send(piece())).hang()
        }
    });
    let gateway = cached(&origin);
    gateway.get("/", &[]);
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).text(), "old");
    origin.wait_for_requests(2);
    // No client waits for the body, and it will not be stored: the connection is closed.
    wait_for(|| !origin.ends().is_empty() && fills(&gateway) == 0.0, STEP_TIMEOUT);
    assert_eq!(gateway.metric("tidegate_tasks{kind=\"background_validation\"}"), 0.0);
}

fn fills(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_tasks{kind=\"fill\"}")
}

#[test]
fn body_that_outgrows_a_small_limit_at_once_is_passed_through() {
    let origin = Origin::start(|_| {
        let head = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
        Script::new().head(200, &head).send(chunked(&[b'x'; 8_000], 8_000))
    });
    let gateway = Gateway::start(&one_route(origin.address, CACHED, "[cache]\nobject_bytes = \"1KiB\"\n"));
    for _ in 0..2 {
        let response = gateway.get("/", &[]);
        assert_eq!((response.status, response.end, response.body.len()), (200, BodyEnd::Complete, 8_000));
    }
    assert_eq!((origin.count(), gateway.metric("tidegate_failures_total{kind=\"panic\"}")), (2, 0.0));
}

/// A second fetch to wait for does not prolong the wait: twice the time to connect and to the head,
/// and a second, are the time of all rounds together.
#[test]
fn time_of_a_waiting_request_does_not_begin_again_in_each_round() {
    let origin = Origin::start(|request| {
        let late = Script::new().pause(Duration::from_millis(2_700));
        // A closed connection is not used again: nothing is sent twice.
        let head = [("Cache-Control", "max-age=60"), ("Vary", "A"), ("Content-Length", "4"), ("Connection", "close")];
        match request.number {
            1 => late.close(),
            _ => late.head(200, &head).send("body"),
        }
    });
    let config = one_route(origin.address, CACHED, "")
        .replace("[upstreams.origin]", "[upstreams.origin]\ntimeout = \"3s\"\nconnect_timeout = \"50ms\"");
    let gateway = Gateway::start(&config);
    let mut first = gateway.connect();
    first.send_get("/", &[("A", "1")]);
    origin.wait_for_requests(1);
    let mut others: Vec<Client> = (0..10).map(|_| gateway.connect()).collect();
    others.iter_mut().for_each(|client| client.send_get("/", &[("A", "2")]));
    assert_eq!(first.read_response().status, 200);
    // The response is another variant. One of the others fetches in vain until 5.4 s, and one until
    // 8.1 s; the time of the rest ends after 7.1 s.
    let failed = others.iter_mut().map(Client::read_response).filter(|response| response.status != 200).count();
    let timed_out = gateway.metric("tidegate_failures_total{kind=\"shared_fetch_timeout\"}");
    assert_eq!((failed, timed_out, origin.count()), (9, 8.0, 3));
    let log = gateway.access_log(11);
    assert_eq!(log.iter().filter(|line| line["blame"] == "gateway").count(), 8, "{log:#?}");
}
