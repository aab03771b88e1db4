//! The clocks of an exchange: each runs only while its side is awaited, and no client opens the
//! circuit breaker of a healthy origin.
//!
//! Times are a fraction of those in use. A test that nothing happens waits for several times the
//! time in which it would.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use support::client::is_timeout;
use support::{BodyEnd, Client, ClientResponse, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

const MS: Duration = Duration::from_millis(1);

/// How often the gateway checks a client from which it does not read.
const CLIENT_CHECK: Duration = Duration::from_secs(1);

/// A breaker that opens at five calls slower than 300 ms, or at five failures.
const BREAKER: &str = "[upstreams.origin.breaker]\nslow = \"300ms\"\nslow_ratio = 0.5\nerror_ratio = 0.5\nminimum = 5\nopen = \"400ms\"\n";

/// Configuration with a route that does not cache. `upstream` adds keys to the upstream.
fn uncached(origin: SocketAddr, upstream: &str, rest: &str) -> String {
    one_route(origin, "cache = { mode = \"off\" }", rest).replacen("\n\n", &format!("\n{upstream}\n\n"), 1)
}

fn breakable(origin: SocketAddr, upstream: &str, rest: &str) -> Gateway {
    Gateway::start(&uncached(origin, upstream, &format!("{BREAKER}{rest}")))
}

fn received(request: &support::ReceivedRequest) -> Script {
    Script::ok(&[], format!("{} bytes", request.body.len()))
}

/// A response of `pieces` chunks, with `pause` before each.
fn paced(content_type: &str, pieces: usize, pause: Duration) -> Script {
    let head = Script::new().head(200, &[("Content-Type", content_type), ("Transfer-Encoding", "chunked")]);
    (0..pieces).fold(head, |script, _| script.pause(pause).send("6\r\npiece\n\r\n")).send("0\r\n\r\n")
}

/// Sends the head of a POST whose body has `length` bytes.
fn begin_upload(gateway: &Gateway, length: usize, fields: &[(&str, &str)]) -> Client {
    let length = length.to_string();
    let fields: Vec<_> = [("Content-Length", length.as_str())].into_iter().chain(fields.iter().copied()).collect();
    let mut client = gateway.connect();
    client.send(support::client::request("POST", "/upload", &fields, b""));
    client
}

/// Uploads `pieces` pieces of `bytes` bytes with `pause` before each.
fn upload(gateway: &Gateway, (pieces, bytes): (usize, usize), pause: Duration) -> ClientResponse {
    let mut client = begin_upload(gateway, pieces * bytes, &[]);
    for _ in 0..pieces {
        thread::sleep(pause);
        client.send(vec![b'x'; bytes]);
    }
    client.read_response_to("POST")
}

/// Runs `count` clients at once and returns their results.
fn at_once<T: Send>(count: usize, client: impl Fn() -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let clients: Vec<_> = (0..count).map(|_| scope.spawn(&client)).collect();
        clients.into_iter().map(|client| client.join().expect("no panic")).collect()
    })
}

/// Asserts that others are served, and that the breaker was closed all the time.
#[track_caller]
fn assert_closed(gateway: &Gateway) {
    let response = gateway.get("/", &[]);
    assert_eq!(response.status, 200, "{:?}", response.fields);
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);
    assert!(gateway.process.stderr.events("breaker_opened").is_empty());
}

fn timeouts(gateway: &Gateway, clock: &str) -> f64 {
    gateway.metric(&format!("tidegate_timeouts_total{{clock=\"{clock}\"}}"))
}

// Each clock.

#[test]
fn download_may_take_longer_than_the_timeout_while_its_bytes_move() {
    let origin = Origin::start(|_| paced("text/plain", 15, 100 * MS));
    let limits = "timeout = \"300ms\"";
    for route in ["", "cache = { mode = \"off\" }"] {
        let config = one_route(origin.address, route, "").replacen("\n\n", &format!("\n{limits}\n\n"), 1);
        let response = Gateway::start(&config).get("/", &[]);
        assert_eq!((response.status, response.body.len(), response.end), (200, 15 * 6, BodyEnd::Complete), "{route}");
    }
}

#[test]
fn upload_may_take_longer_than_the_timeout_and_gets_the_response_of_the_origin() {
    let origin = Origin::start(received);
    let gateway = Gateway::start(&uncached(origin.address, "timeout = \"300ms\"", ""));
    let response = upload(&gateway, (15, 1_000), 100 * MS);
    assert_eq!((response.status, response.text()), (200, "15000 bytes".to_owned()));
}

#[test]
fn timeout_begins_when_the_request_is_complete() {
    let origin =
        Origin::start(|request| if request.method == "POST" { Script::new().hang() } else { Script::ok(&[], "") });
    let gateway = Gateway::start(&uncached(origin.address, "timeout = \"400ms\"", ""));
    let mut client = begin_upload(&gateway, 2, &[]);
    client.send("a");
    thread::sleep(800 * MS);
    let sent = Instant::now();
    client.send("b");
    let response = client.read_response_to("POST");
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=http_response_timeout")));
    assert!((350 * MS..2_000 * MS).contains(&sent.elapsed()), "{:?}", sent.elapsed());
    assert_eq!(timeouts(&gateway, "upstream_head"), 1.0);
}

#[test]
fn silent_body_is_aborted_after_the_idle_timeout() {
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", "10")]).send("part").hang());
    let gateway = Gateway::start(&uncached(
        origin.address,
        "timeout = \"5s\"\nidle_timeout = \"300ms\"",
        "[log]\naccess = \"stdout\"\n",
    ));
    let start = Instant::now();
    let response = gateway.get("/", &[]);
    assert_eq!((response.status, response.text(), response.end), (200, "part".into(), BodyEnd::Truncated));
    assert!((250 * MS..2_000 * MS).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert_eq!(timeouts(&gateway, "upstream_body"), 1.0);
    assert_eq!(gateway.access_log(1)[0]["blame"], "upstream");
}

#[test]
fn upstream_that_accepts_no_request_bytes_fails_after_the_idle_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let limits = "[limits_http]\nbody_bytes = \"64MiB\"\n";
    let gateway = Gateway::start(&uncached(address, "timeout = \"5s\"\nidle_timeout = \"300ms\"", limits));
    let socket = TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let mut sending = socket.try_clone().expect("a second handle");
    let mut client = Client::from_stream(socket);
    let start = Instant::now();
    thread::scope(|scope| {
        // More than the buffers of all sockets hold.
        scope.spawn(move || {
            let body = vec![b'x'; 64 << 20];
            drop(sending.write_all(&support::client::request("POST", "/", &[], &body)));
        });
        let (_unread, _) = listener.accept().expect("the connection of the gateway");
        assert_eq!(client.read_head().status, 503);
        assert!((250 * MS..4_000 * MS).contains(&start.elapsed()), "{:?}", start.elapsed());
        drop(client);
    });
    assert_eq!(timeouts(&gateway, "upstream_send"), 1.0);
}

/// The gateway does not read from a client while the upstream accepts no byte. That the client has
/// gone is noticed all the same, long before a clock of the upstream ends the exchange.
#[test]
fn client_that_leaves_while_the_upstream_accepts_no_bytes_ends_the_exchange() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let rest = "[limits_http]\nbody_bytes = \"64MiB\"\n[log]\naccess = \"stdout\"\n";
    let gateway = Gateway::start(&uncached(address, "", rest));
    let is_blocked = || gateway.admin("/api/v1/tasks").text().contains("upstream_send");
    type Leave = fn(TcpStream);
    let leave: [(&str, Leave); 3] = [
        ("close", drop),
        ("half-close", |socket| {
            socket.shutdown(Shutdown::Write).expect("a live socket");
            thread::sleep(2 * CLIENT_CHECK);
        }),
        ("reset", |socket| Client::from_stream(socket).reset()),
    ];
    for (number, (name, leave)) in leave.into_iter().enumerate() {
        let mut socket = TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
        socket
            .write_all(b"POST / HTTP/1.1\r\nHost: gate.test\r\nContent-Length: 60000000\r\n\r\n")
            .expect("a live socket");
        let (mut upstream, _) = listener.accept().expect("the connection of the gateway");
        // In small pieces: the end of the client's bytes must not wait for the rest of them.
        wait_for(
            || {
                socket.write_all(&[b'x'; 32 << 10]).expect("room in the buffers");
                is_blocked()
            },
            STEP_TIMEOUT,
        );
        let start = Instant::now();
        leave(socket);
        let line = gateway.access_log(number + 1).remove(number);
        let facts = ["status", "blame", "aborted"].map(|field| line[field].to_string());
        assert_eq!(facts, ["499", "\"client\"", "\"client_closed\""], "{name}: {line}");
        assert!(start.elapsed() < STEP_TIMEOUT, "{name}: {:?}", start.elapsed());
        // The connection to the upstream ends, too.
        upstream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        upstream.read_to_end(&mut Vec::new()).map_or_else(|error| assert!(!is_timeout(&error), "{name}"), drop);
    }
    assert_eq!(timeouts(&gateway, "upstream_send"), 0.0);
    assert!(gateway.process.stderr.events("upstream_failed").is_empty());
}

/// A call that its client gives up has a result like each other one.
#[test]
fn calls_that_their_clients_give_up_count_as_cancelled() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let gateway = Gateway::start(&uncached(address, "", ""));
    let results = |result: &str| {
        gateway.metric(&format!("tidegate_upstream_requests_total{{upstream=\"origin\",result=\"{result}\"}}"))
    };
    for number in 1..=3 {
        let mut client = TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
        client.write_all(b"GET / HTTP/1.1\r\nHost: gate.test\r\n\r\n").expect("a live socket");
        let (mut upstream, _) = listener.accept().expect("the connection of the gateway");
        upstream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        assert!(upstream.read(&mut [0; 4096]).expect("the request") > 0);
        drop(client);
        wait_for(|| results("cancelled") == f64::from(number), STEP_TIMEOUT);
    }
    let mut client = gateway.connect();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut upstream, _) = listener.accept().expect("the connection of the gateway");
            assert!(upstream.read(&mut [0; 4096]).expect("the request") > 0);
            upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("a live socket");
        });
        assert_eq!(client.get("/", &[]).status, 200);
    });
    assert_eq!((results("2xx"), results("cancelled")), (1.0, 3.0));
}

#[test]
fn client_that_stops_in_its_body_gets_408_and_the_clock_of_the_upstream_does_not_run() {
    let origin = Origin::start(received);
    let limits = "[limits_http]\nidle_timeout = \"600ms\"\n[log]\naccess = \"stdout\"\n";
    let gateway = Gateway::start(&uncached(origin.address, "timeout = \"100ms\"\nidle_timeout = \"100ms\"", limits));
    let start = Instant::now();
    let mut client = begin_upload(&gateway, 10, &[]);
    client.send("half");
    assert_eq!(client.read_response_to("POST").status, 408);
    assert!(start.elapsed() >= 550 * MS, "{:?}", start.elapsed());
    assert_eq!((timeouts(&gateway, "client_body"), timeouts(&gateway, "upstream_head")), (1.0, 0.0));
    assert_eq!(gateway.metric("tidegate_requests_refused_total{reason=\"body_timeout\"}"), 1.0);
    assert_eq!(gateway.access_log(1)[0]["blame"], "client");
}

#[test]
fn client_that_does_not_read_spends_no_time_of_the_upstream() {
    const LENGTH: usize = 32 << 20;
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", &LENGTH.to_string())]).fill(LENGTH));
    let gateway = Gateway::start(&uncached(origin.address, "timeout = \"300ms\"\nidle_timeout = \"300ms\"", ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    let head = client.read_head();
    thread::sleep(1_200 * MS);
    let response = client.read_body(head, "GET");
    assert_eq!((response.body.len(), response.end), (LENGTH, BodyEnd::Complete));
}

#[test]
fn total_timeout_ends_a_flowing_exchange_without_blame_of_the_upstream() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/" => Script::ok(&[], "fine"),
        "/hang" => Script::new().hang(),
        _ => paced("text/plain", 100, 50 * MS),
    });
    let gateway = breakable(origin.address, "total_timeout = \"500ms\"", "[log]\naccess = \"stdout\"\n");
    let start = Instant::now();
    let response = gateway.get("/flow", &[]);
    assert_eq!((response.status, response.end), (200, BodyEnd::Truncated));
    assert!((450 * MS..3_000 * MS).contains(&start.elapsed()), "{:?}", start.elapsed());
    let response = gateway.get("/hang", &[]);
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=http_response_timeout")));
    assert_eq!(timeouts(&gateway, "total"), 2.0);
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"total_timeout\"}"), 1.0);
    assert!(gateway.access_log(2).iter().all(|line| line["blame"] == "gateway"));
    assert!(gateway.process.stderr.events("upstream_failed").is_empty());
    assert_closed(&gateway);
}

#[test]
fn total_timeout_ends_a_body_that_never_has_to_be_waited_for() {
    const LENGTH: usize = 64 << 20;
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", &LENGTH.to_string())]).fill(LENGTH));
    let gateway = Gateway::start(&uncached(origin.address, "total_timeout = \"500ms\"", ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    let head = client.read_head();
    thread::sleep(1_000 * MS);
    assert_eq!(client.read_body(head, "GET").end, BodyEnd::Truncated);
    wait_for(|| timeouts(&gateway, "total") == 1.0, STEP_TIMEOUT);
}

#[test]
fn route_replaces_the_timeouts_of_its_upstream() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/head" => Script::new().hang(),
        "/body" => Script::new().head(200, &[("Content-Length", "10")]).send("part").hang(),
        _ => paced("text/plain", 50, 50 * MS),
    });
    let route = |name: &str, own: &str| {
        format!("[[routes]]\nname = \"{name}\"\nmatch = {{ path = \"/{name}\" }}\nupstream = \"origin\"\n{own}\n")
    };
    let routes = [
        route("head", "timeout = \"200ms\""),
        route("body", "idle_timeout = \"200ms\""),
        route("total", "total_timeout = \"200ms\""),
        route("unlimited", "total_timeout = \"0s\""),
    ];
    let upstream = "timeout = \"20s\"\nidle_timeout = \"20s\"\ntotal_timeout = \"2s\"";
    let gateway = Gateway::start(&uncached(origin.address, upstream, &routes.concat()));
    let start = Instant::now();
    assert_eq!(gateway.get("/head", &[]).status, 503);
    assert_eq!(gateway.get("/body", &[]).end, BodyEnd::Truncated);
    assert_eq!(gateway.get("/total", &[]).end, BodyEnd::Truncated);
    assert!(start.elapsed() < 1_900 * MS, "{:?}", start.elapsed());
    let clocks = ["upstream_head", "upstream_body", "total"];
    assert_eq!(clocks.map(|clock| timeouts(&gateway, clock)), [1.0; 3]);
    assert_eq!(gateway.get("/unlimited", &[]).end, BodyEnd::Complete);
}

#[test]
fn silent_event_stream_is_ended_after_the_idle_timeout_without_blame_of_the_upstream() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/events" => Script::new()
            .head(200, &[("Content-Type", "text/event-stream; charset=utf-8"), ("Transfer-Encoding", "chunked")])
            .hang(),
        _ => Script::ok(&[], "fine"),
    });
    let gateway = breakable(origin.address, "idle_timeout = \"300ms\"", "");
    let ends = at_once(12, || gateway.get("/events", &[]).end);
    assert_eq!(ends, [BodyEnd::Truncated; 12]);
    assert_eq!(timeouts(&gateway, "event_stream"), 12.0);
    assert_closed(&gateway);
}

// No client opens the breaker of a healthy origin.

#[test]
fn slow_uploads_that_the_origin_answers_leave_the_breaker_closed() {
    let origin = Origin::start(received);
    let gateway = breakable(origin.address, "", "");
    let statuses = at_once(20, || upload(&gateway, (12, 1_000), 100 * MS).status);
    assert_eq!(statuses, [200; 20]);
    assert_closed(&gateway);
}

#[test]
fn uploads_at_the_pace_of_a_slow_network_leave_the_breaker_closed() {
    let origin = Origin::start(received);
    let gateway = breakable(origin.address, "timeout = \"1s\"", "[limits_http]\nbody_rate = \"0B\"\n");
    // 100 KB/s for 2 s, which is longer than the timeout.
    let responses = at_once(25, || upload(&gateway, (40, 5_000), 50 * MS));
    assert!(responses.iter().all(|response| response.text() == "200000 bytes"), "{:?}", responses[0]);
    assert_closed(&gateway);
}

#[test]
fn event_streams_that_a_limit_of_the_gateway_ends_leave_the_breaker_closed() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/events" => paced("text/event-stream", 100, 50 * MS),
        _ => Script::ok(&[], "fine"),
    });
    let gateway = breakable(origin.address, "timeout = \"300ms\"\ntotal_timeout = \"700ms\"", "");
    let responses = at_once(12, || gateway.get("/events", &[]));
    assert!(responses.iter().all(|response| response.status == 200 && response.end == BodyEnd::Truncated));
    assert_closed(&gateway);
}

/// An origin that waits 800 ms for the rest of a request and then closes, after `response`.
/// Requests without a body get 200. Counts the requests that it has given up.
fn start_impatient_origin(response: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let abandoned = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&abandoned);
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let counter = Arc::clone(&counter);
            thread::spawn(move || {
                drop(stream.set_read_timeout(Some(800 * MS)));
                let (mut received, mut chunk) = (Vec::new(), [0; 1 << 12]);
                while let Ok(count @ 1..) = stream.read(&mut chunk) {
                    received.extend_from_slice(&chunk[..count]);
                    if received.starts_with(b"GET") && received.ends_with(b"\r\n\r\n") {
                        received.clear();
                        drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
                    }
                }
                if received.starts_with(b"POST") {
                    counter.fetch_add(1, Ordering::SeqCst);
                    drop(stream.write_all(response.as_bytes()));
                }
            });
        }
    });
    (address, abandoned)
}

#[test]
fn clients_that_stop_in_their_body_until_the_origin_gives_up_leave_the_breaker_closed() {
    let unavailable = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    for (response, status) in [("", 408), (unavailable, 503)] {
        let (address, abandoned) = start_impatient_origin(response);
        let gateway = breakable(address, "", "[log]\naccess = \"stdout\"\n");
        let statuses = at_once(20, || {
            let mut client = begin_upload(&gateway, 10, &[]);
            client.send("half");
            client.read_response_to("POST").status
        });
        assert_eq!((statuses, abandoned.load(Ordering::SeqCst)), (vec![status; 20], 20));
        assert!(gateway.process.stderr.events("upstream_failed").is_empty());
        let refused = || gateway.metric("tidegate_requests_refused_total{reason=\"body_timeout\"}");
        let (blame, expected) = if status == 408 { ("client", 20.0) } else { ("", 0.0) };
        // A response may arrive before it is counted.
        wait_for(|| refused() == expected, STEP_TIMEOUT);
        assert!(gateway.access_log(20).iter().all(|line| line["blame"].as_str().unwrap_or_default() == blame));
        assert_closed(&gateway);
    }
}

/// An upload of 10 bytes up to the first of them.
const SIZED: &str = "POST / HTTP/1.1\r\nHost: gate.test\r\nContent-Length: 10\r\n\r\nh";
/// As `SIZED`, in chunks.
const CHUNKED: &str = "POST / HTTP/1.1\r\nHost: gate.test\r\nTransfer-Encoding: chunked\r\n\r\na\r\nh";

/// Begins an upload, and returns the client and the origin's end of the exchange, which has
/// received what the client sent.
fn half_an_upload(gateway: &Gateway, listener: &TcpListener, upload: &str) -> (Client, TcpStream) {
    let mut client = gateway.connect();
    client.send(upload);
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let (mut received, mut chunk) = (Vec::new(), [0; 1 << 12]);
    // A chunk leaves with its end.
    while !received.ends_with(b"\nh") && !received.ends_with(b"\nh\r\n") {
        let count = stream.read(&mut chunk).expect("the request");
        assert!(count > 0, "closed");
        received.extend_from_slice(&chunk[..count]);
    }
    (client, stream)
}

fn close_with_reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option of every socket");
    drop(stream);
}

/// The status that the client gets, and the blame in the log.
fn outcome(gateway: &Gateway, mut client: Client, exchanges: usize) -> (u16, String) {
    let status = client.read_response_to("POST").status;
    (status, gateway.access_log(exchanges)[exchanges - 1]["blame"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn origin_that_gives_a_stopped_client_up_is_not_to_blame_and_one_that_fails_a_flowing_one_is() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let gateway = breakable(address, "", "[log]\naccess = \"stdout\"\n");
    let close: fn(TcpStream) = drop;
    let mut exchanges = 0;
    for (end, upload) in [(close, SIZED), (close, CHUNKED), (close_with_reset, SIZED), (close_with_reset, CHUNKED)] {
        let (client, stream) = half_an_upload(&gateway, &listener, upload);
        thread::sleep(800 * MS);
        end(stream);
        exchanges += 1;
        assert_eq!(outcome(&gateway, client, exchanges), (408, "client".to_owned()));

        let (mut client, stream) = half_an_upload(&gateway, &listener, upload);
        // Longer than a stopped client is waited for, in steps that are shorter.
        for _ in 0..8 {
            thread::sleep(100 * MS);
            client.send("x");
        }
        end(stream);
        exchanges += 1;
        assert_eq!(outcome(&gateway, client, exchanges), (503, "upstream".to_owned()));
    }
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"no_response\"}"), 4.0);
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"client_body\"}"), 4.0);
    // No verdict: the clients owed bytes.
    assert_eq!(gateway.metric("tidegate_events_total{event=\"upstream_failed\"}"), 0.0);
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);

    // A complete request is a verdict, however long the client took before.
    for end in [close, close_with_reset] {
        let (mut client, stream) = half_an_upload(&gateway, &listener, SIZED);
        thread::sleep(800 * MS);
        client.send("123456789");
        wait_for(|| is_readable(&stream), STEP_TIMEOUT);
        end(stream);
        exchanges += 1;
        assert_eq!(outcome(&gateway, client, exchanges), (503, "upstream".to_owned()));
    }
    assert_eq!(gateway.metric("tidegate_events_total{event=\"upstream_failed\"}"), 2.0);
}

/// Whether bytes have arrived.
fn is_readable(stream: &TcpStream) -> bool {
    stream.peek(&mut [0]).is_ok_and(|count| count > 0)
}

#[test]
fn clients_that_expect_100_continue_and_send_nothing_leave_the_breaker_closed() {
    let origin = Origin::start(received);
    let gateway = breakable(origin.address, "timeout = \"200ms\"", "[limits_http]\nidle_timeout = \"900ms\"\n");
    let statuses = at_once(20, || {
        let mut client = begin_upload(&gateway, 10, &[("Expect", "100-continue")]);
        [client.read_head().status, client.read_response_to("POST").status]
    });
    assert_eq!(statuses, [[100, 408]; 20]);
    assert_closed(&gateway);
}

#[test]
fn clients_that_send_one_byte_and_hold_their_sockets_leave_the_breaker_closed() {
    let origin = Origin::start(received);
    let gateway = breakable(origin.address, "timeout = \"200ms\"", "");
    let clients: Vec<Client> = (0..40)
        .map(|_| {
            let mut client = begin_upload(&gateway, 1_000, &[]);
            client.send("x");
            client
        })
        .collect();
    wait_for(|| origin.connections() >= 40, STEP_TIMEOUT);
    for _ in 0..10 {
        thread::sleep(100 * MS);
        assert_closed(&gateway);
    }
    drop(clients);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 0.0, STEP_TIMEOUT);
    assert_closed(&gateway);
}

/// A TLS connection that has agreed on HTTP/2.
fn connect_h2(gateway: &Gateway, trusted: CertificateDer<'static>) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted).expect("a usable certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("TLS 1.2 and 1.3").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("gate.test").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let socket = TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    StreamOwned::new(connection, socket)
}

/// An HTTP/2 frame (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small payload").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[test]
fn stalled_uploads_over_one_http_2_connection_leave_the_breaker_closed() {
    let origin = Origin::start(received);
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    let dir = TempDir::new();
    dir.write("tls.crt", &certificate.cert.pem());
    dir.write("tls.key", &certificate.signing_key.serialize_pem());
    let rest = format!(
        "{BREAKER}[limits_http]\nidle_timeout = \"900ms\"\n[[listen]]\naddress = \"127.0.0.1:0\"\n\
         [listen.tls]\ncertificates = [{{ cert = \"tls.crt\", key = \"tls.key\" }}]\n\
         [[listen]]\naddress = \"127.0.0.1:0\"\n"
    );
    let mut gateway = Gateway::start_in(dir, &uncached(origin.address, "timeout = \"200ms\"", &rest));
    let mut client = connect_h2(&gateway, certificate.cert.der().clone());
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("a live connection");
    client.write_all(&frame(4, 0, 0, b"")).expect("a live connection");
    // Static entries for POST, https and /, then the authority as a literal (RFC 7541).
    let head = [&b"\x83\x87\x84\x41\x09"[..], b"gate.test"].concat();
    for stream in (1..40).step_by(2) {
        client.write_all(&frame(1, 4, stream, &head)).expect("a live connection");
        client.write_all(&frame(0, 0, stream, b"x")).expect("a live connection");
    }
    client.flush().expect("a live connection");
    wait_for(|| origin.connections() >= 20, STEP_TIMEOUT);
    // The second listener is plain.
    gateway.address = gateway.addresses[1];
    for _ in 0..5 {
        thread::sleep(100 * MS);
        assert_closed(&gateway);
    }
    wait_for(|| gateway.metric("tidegate_requests_refused_total{reason=\"body_timeout\"}") == 20.0, STEP_TIMEOUT);
    assert_closed(&gateway);
}

#[test]
fn half_open_breaker_takes_its_probes_back_from_clients_that_stall() {
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&is_broken);
    let origin = Origin::start(move |_| Script::reply(if broken.load(Ordering::SeqCst) { 500 } else { 200 }, &[], ""));
    let gateway = breakable(origin.address, "", "");
    wait_for(|| gateway.get("/", &[]).status == 503, STEP_TIMEOUT);
    is_broken.store(false, Ordering::SeqCst);
    thread::sleep(500 * MS);
    let mut stalled: Vec<Client> = (0..3).map(|_| begin_upload(&gateway, 10, &[])).collect();
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 3.0, STEP_TIMEOUT);
    // A complete request takes the probe of a stalled client at once.
    assert_eq!(gateway.get("/", &[]).status, 200);
    let closes = || gateway.get("/", &[]).status == 200 && !gateway.process.stderr.events("breaker_closed").is_empty();
    wait_for(closes, STEP_TIMEOUT);
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);
    // The calls continue without a slot.
    stalled[0].send("0123456789");
    assert_eq!(stalled[0].read_response_to("POST").status, 200);
}

// An origin that is slow, hangs or fails still opens it.

#[test]
fn slow_responses_to_complete_requests_open_the_breaker() {
    for method in ["GET", "POST"] {
        let origin = Origin::start(|_| Script::new().pause(400 * MS).head(200, &[("Content-Length", "0")]));
        let gateway = breakable(origin.address, "", "");
        let body = if method == "POST" { "body" } else { "" };
        let statuses = at_once(5, || gateway.request(method, "/", &[], body.as_bytes()).status);
        assert_eq!(statuses, [200; 5], "{method}");
        assert_eq!(gateway.get("/", &[]).status, 503, "{method}");
    }
}

#[test]
fn origin_that_hangs_after_complete_uploads_opens_the_breaker_while_they_run() {
    let origin =
        Origin::start(|request| if request.method == "POST" { Script::new().hang() } else { Script::ok(&[], "") });
    let gateway = breakable(origin.address, "", "");
    let mut clients: Vec<Client> = (0..5).map(|_| begin_upload(&gateway, 4, &[])).collect();
    clients.iter_mut().for_each(|client| client.send("body"));
    origin.wait_for_requests(5);
    let start = Instant::now();
    wait_for(|| start.elapsed() > 600 * MS, STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).status, 503);
}

#[test]
fn origin_that_stalls_in_its_bodies_opens_the_breaker() {
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", "10")]).send("part").hang());
    let gateway = breakable(origin.address, "idle_timeout = \"200ms\"", "");
    let ends = at_once(5, || gateway.get("/", &[]).end);
    assert_eq!(ends, [BodyEnd::Truncated; 5]);
    assert_eq!(gateway.get("/", &[]).status, 503);
}

#[test]
fn failing_responses_to_uploads_open_the_breaker() {
    let origin = Origin::start(|_| Script::reply(500, &[], ""));
    let gateway = breakable(origin.address, "", "");
    let statuses: Vec<u16> = (0..7).map(|_| upload(&gateway, (1, 10), Duration::ZERO).status).collect();
    assert_eq!(statuses, [500, 500, 500, 500, 500, 503, 503]);
}

// The deadline that travels.

const DEADLINE: &str = "X-Envoy-Expected-Rq-Timeout-Ms";

/// Configuration that trusts the peers of the tests. `upstream` adds keys to the upstream.
fn trusting(origin: SocketAddr, upstream: &str) -> String {
    uncached(origin, upstream, "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\n")
}

/// The time left that the last request to `origin` stated, in milliseconds.
fn time_left(origin: &Origin) -> Option<u64> {
    let request = origin.last();
    let lines = request.all(DEADLINE);
    assert!(lines.len() <= 1, "{lines:?}");
    lines.first().map(|value| value.parse().expect("a number"))
}

#[test]
fn origin_receives_the_time_that_is_left_of_the_total() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    for (upstream, sent, expected) in [
        ("", None, None),
        ("", Some("5000"), Some(4_000..=5_000)),
        ("total_timeout = \"9s\"", None, Some(8_000..=9_000)),
        ("total_timeout = \"9s\"", Some("5000"), Some(4_000..=5_000)),
        ("total_timeout = \"5s\"", Some("9000"), Some(4_000..=5_000)),
        // No limit, and no number: as if the field were absent.
        ("total_timeout = \"5s\"", Some("0"), Some(4_000..=5_000)),
        ("", Some("0"), None),
        ("", Some("soon"), None),
    ] {
        let gateway = Gateway::start(&trusting(origin.address, upstream));
        let fields: Vec<_> = sent.iter().map(|value| (DEADLINE, *value)).collect();
        for (method, body) in [("GET", ""), ("POST", "body"), ("POST", "")] {
            assert_eq!(gateway.request(method, "/", &fields, body.as_bytes()).status, 200);
            let left = time_left(&origin);
            let is_expected =
                expected.as_ref().map_or(left.is_none(), |range| left.is_some_and(|l| range.contains(&l)));
            assert!(is_expected, "{upstream} {sent:?} {method}: {left:?}");
        }
    }
}

#[test]
fn time_for_connecting_is_subtracted_from_what_the_origin_receives() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    // A listener whose queue is full: connection attempts to it time out.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    full.listen(0).expect("a listening socket");
    let address = full.local_addr().expect("bound").as_socket().expect("an address");
    let _queued: Vec<_> = std::iter::from_fn(|| TcpStream::connect_timeout(&address, 100 * MS).ok()).take(16).collect();
    let config = uncached(origin.address, "total_timeout = \"5s\"", "").replace(
        "endpoints = [",
        &format!("balance = \"round-robin\"\nconnect_timeout = \"1s\"\nendpoints = [\"http://{address}\", "),
    );
    let gateway = Gateway::start(&config);
    // Round robin: the first endpoint of one of two requests is the unreachable one, and the other
    // one is tried after 250 ms.
    let mut left = Vec::new();
    for _ in 0..2 {
        assert_eq!(gateway.get("/", &[]).status, 200);
        left.extend(time_left(&origin));
    }
    left.sort_unstable();
    assert!((3_000..=4_760).contains(&left[0]) && (4_761..=5_000).contains(&left[1]), "{left:?}");
}

#[test]
fn deadline_of_an_untrusted_client_is_neither_believed_nor_forwarded() {
    let origin = Origin::start(|_| Script::new().pause(300 * MS).head(200, &[("Content-Length", "0")]));
    for (upstream, route) in [
        ("", "cache = { mode = \"off\" }"),
        ("total_timeout = \"5s\"", "cache = { mode = \"off\" }"),
        // Through a shared fetch.
        ("", ""),
        ("total_timeout = \"5s\"", ""),
    ] {
        // A list of untrusted fields without this one makes no difference.
        let identity = "[identity]\nuntrusted_fields = []\n";
        let config = one_route(origin.address, route, identity).replacen("\n\n", &format!("\n{upstream}\n\n"), 1);
        let gateway = Gateway::start(&config);
        assert_eq!(gateway.get("/", &[(DEADLINE, "50")]).status, 200, "{upstream} {route}");
        let left = time_left(&origin);
        assert_eq!(left.is_some(), !upstream.is_empty(), "{left:?}");
        assert!(left.is_none_or(|left| left > 4_000), "{left:?}");
        assert_eq!(gateway.request("POST", "/", &[(DEADLINE, "50")], b"body").status, 200);
        assert_eq!(timeouts(&gateway, "total"), 0.0);
    }
}

#[test]
fn deadline_of_a_trusted_proxy_ends_the_exchange_without_blame_of_the_upstream() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/" => Script::ok(&[], "fine"),
        "/hang" => Script::new().hang(),
        _ => paced("text/plain", 100, 50 * MS),
    });
    let config = trusting(origin.address, "total_timeout = \"5s\"") + BREAKER + "[log]\naccess = \"stdout\"\n";
    let gateway = Gateway::start(&config);
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(gateway.get("/hang", &[(DEADLINE, "200")]).status, 503);
        assert!((150 * MS..2_000 * MS).contains(&start.elapsed()), "{:?}", start.elapsed());
    }
    assert_eq!(gateway.get("/flow", &[(DEADLINE, "300")]).end, BodyEnd::Truncated);
    assert_eq!(timeouts(&gateway, "total"), 6.0);
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"total_timeout\"}"), 5.0);
    assert!(gateway.access_log(6).iter().all(|line| line["blame"] == "gateway"));
    assert!(gateway.process.stderr.events("upstream_failed").is_empty());
    assert_closed(&gateway);
}

#[test]
fn deadline_of_one_request_does_not_end_a_fetch_that_others_wait_for() {
    let gate = support::Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new()
            .wait(&opened)
            .send("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 4\r\n\r\nbody")
    });
    let gateway = Gateway::start(&trusting(origin.address, "").replacen("cache = { mode = \"off\" }", "", 1));
    thread::scope(|scope| {
        let leader = scope.spawn(|| gateway.get("/", &[(DEADLINE, "500")]));
        origin.wait_for_requests(1);
        let joined = scope.spawn(|| gateway.get("/", &[]));
        let joined_in_vain = scope.spawn(|| gateway.get("/", &[(DEADLINE, "400")]));
        assert_eq!(leader.join().expect("no panic").status, 503);
        assert_eq!(joined_in_vain.join().expect("no panic").status, 503);
        gate.open();
        let response = joined.join().expect("no panic");
        assert_eq!((response.status, response.text()), (200, "body".to_owned()));
    });
    assert_eq!(origin.count(), 1);
    assert_eq!(origin.last().field(DEADLINE), None, "the fetch is for all");
    assert_eq!(timeouts(&gateway, "total"), 2.0);
}

#[test]
fn deadline_travels_through_a_chain_of_gateways() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/hang" => Script::new().hang(),
        _ => Script::ok(&[], ""),
    });
    let inner = Gateway::start(&trusting(origin.address, ""));
    let outer = Gateway::start(&uncached(inner.address, "total_timeout = \"800ms\"", ""));
    assert_eq!(outer.get("/", &[]).status, 200);
    assert!(time_left(&origin).is_some_and(|left| (300..=800).contains(&left)), "{:?}", time_left(&origin));
    let start = Instant::now();
    assert_eq!(outer.get("/hang", &[]).status, 503);
    wait_for(|| !origin.ends().is_empty(), STEP_TIMEOUT);
    assert!(start.elapsed() < 3_000 * MS, "{:?}", start.elapsed());
}
