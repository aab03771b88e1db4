//! The clocks of a client run only while the gateway waits for it: a delay by the origin, by the
//! upstream connection or by an absent `100 Continue` does not count.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use socket2::{Domain, Socket, Type};
use support::tls::{self, LISTEN_TLS};
use support::{BodyEnd, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

/// `idle_timeout` is a third of `PAUSE`, and the minimum rate is so high that a counted pause would
/// break it.
const SHORT: &str = "[limits_http]\nidle_timeout = \"300ms\"\nbody_rate = \"256KiB\"\nbody_bytes = \"1GiB\"\n";
const PAUSE: Duration = Duration::from_millis(900);

const UNCACHED: &str = "cache = { mode = \"off\" }";

fn start_gateway(origin: SocketAddr) -> Gateway {
    Gateway::start(&one_route(origin, UNCACHED, SHORT))
}

/// A gateway that listens with TLS.
fn start_tls(origin: SocketAddr) -> (Gateway, CertificateDer<'static>) {
    let dir = TempDir::new();
    let trusted = tls::write_certificate(&dir);
    (Gateway::start_in(dir, &one_route(origin, UNCACHED, &format!("{SHORT}{LISTEN_TLS}"))), trusted)
}

#[track_caller]
fn nobody_was_blamed(gateway: &Gateway) {
    for reason in ["write_failed", "client_timeout", "client_closed", "body_failed"] {
        assert_eq!(
            gateway.metric(&format!("tidegate_responses_aborted_total{{reason=\"{reason}\"}}")),
            0.0,
            "{reason}"
        );
    }
    assert_eq!(gateway.metric("tidegate_requests_refused_total{reason=\"body_timeout\"}"), 0.0);
}

#[test]
fn origin_that_pauses_in_its_body_does_not_end_the_response() {
    let origin = Origin::start(|request| {
        let event = "data: tick\n\n";
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        let head: &[(&str, &str)] = &[("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")];
        let script = if request.target == "/quick" { return Script::ok(&[], "quick") } else { Script::new() };
        script.head(200, head).pause(PAUSE).send(&chunk).pause(PAUSE).send(chunk).send("0\r\n\r\n")
    });
    let gateway = start_gateway(origin.address);
    let mut client = gateway.connect();
    let events = client.get("/events", &[]);
    assert_eq!((events.text().matches("tick").count(), events.end), (2, BodyEnd::Complete));
    // The connection continues; a request that was pipelined during a pause is answered in order.
    client.send_get("/events", &[]);
    client.send_get("/quick", &[]);
    assert_eq!((client.read_response().end, client.read_response().text()), (BodyEnd::Complete, "quick".to_owned()));
    // Without chunks, the body of HTTP/1.0 ends with the connection.
    let body = String::from_utf8(gateway.raw(b"GET /events HTTP/1.0\r\nHost: a\r\n\r\n")).expect("text");
    assert!(body.ends_with("data: tick\n\ndata: tick\n\n") && !body.contains("chunked"), "{body}");
    nobody_was_blamed(&gateway);
}

#[test]
fn large_response_with_a_pause_is_not_below_the_minimum_rate() {
    let part = vec![b'x'; 4 << 20];
    let origin = Origin::start(move |_| {
        let length = (2 * part.len()).to_string();
        Script::new().head(200, &[("Content-Length", &length)]).send(&part).pause(PAUSE).send(&part)
    });
    let gateway = start_gateway(origin.address);
    let response = gateway.get("/", &[]);
    assert_eq!((response.body.len(), response.end), (8 << 20, BodyEnd::Complete));
    nobody_was_blamed(&gateway);
}

#[test]
fn pause_of_the_origin_does_not_end_a_response_over_tls() {
    let part = vec![b'x'; 4 << 20];
    let origin = Origin::start(move |_| {
        let length = (2 * part.len()).to_string();
        Script::new().head(200, &[("Content-Length", &length)]).send(&part).pause(PAUSE).send(&part).pause(PAUSE)
    });
    let (gateway, trusted) = start_tls(origin.address);
    let mut client = tls::connect(gateway.address, &trusted);
    for _ in 0..2 {
        let response = client.get("/", &[]);
        assert_eq!((response.body.len(), response.end), (8 << 20, BodyEnd::Complete));
    }
    nobody_was_blamed(&gateway);
}

/// A client that does not read is still reset, also after a pause of the origin, plain and with
/// TLS.
#[test]
fn client_that_does_not_read_after_a_pause_is_reset() {
    let part = vec![b'x'; 64 << 20];
    let origin = Origin::start(move |_| {
        let length = (1 + part.len()).to_string();
        Script::new().head(200, &[("Content-Length", &length)]).send("x").pause(PAUSE).send(&part)
    });
    let aborted = |gateway: &Gateway| gateway.metric("tidegate_responses_aborted_total{reason=\"client_timeout\"}");
    let start = Instant::now();
    let gateway = start_gateway(origin.address);
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    wait_for(|| aborted(&gateway) == 1.0, STEP_TIMEOUT);
    assert!(start.elapsed() > PAUSE, "{:?}", start.elapsed());
    assert_eq!(client.read_response().end, BodyEnd::Truncated);
    let (gateway, trusted) = start_tls(origin.address);
    let mut client = tls::connect(gateway.address, &trusted);
    client.send_get("/", &[]);
    wait_for(|| aborted(&gateway) == 1.0, STEP_TIMEOUT);
    assert_eq!(client.read_response().end, BodyEnd::Truncated);
}

/// The origin reads the head of a request, then nothing for `PAUSE`, then the whole body.
#[test]
fn clock_of_the_body_stands_while_the_upstream_does_not_accept_its_bytes() {
    let length = 32 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let received = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut buffer = vec![0; 1 << 20];
        let mut received = stream.read(&mut buffer).expect("a head");
        std::thread::sleep(PAUSE);
        while received < length {
            received += stream.read(&mut buffer).expect("the body");
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("it reads");
    });
    let gateway = start_gateway(address);
    assert_eq!(gateway.request("POST", "/", &[], &vec![b'x'; length]).status, 200);
    received.join().expect("no panic");
    nobody_was_blamed(&gateway);
}

/// A listener whose queue is full: connection attempts to it time out.
fn unreachable() -> (Socket, Vec<TcpStream>, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    socket.listen(0).expect("a listening socket");
    let address = socket.local_addr().expect("bound").as_socket().expect("an address");
    let timeout = Duration::from_millis(100);
    let queued = std::iter::from_fn(|| TcpStream::connect_timeout(&address, timeout).ok()).take(16).collect();
    (socket, queued, address)
}

#[test]
fn clock_of_the_body_stands_while_the_client_waits_for_100_continue() {
    let origin = Origin::start(|request| Script::ok(&[], request.body.len().to_string()));
    let (_socket, _queued, address) = unreachable();
    let short = SHORT.replace("300ms", "150ms");
    let config = one_route(origin.address, UNCACHED, &short).replace(
        "endpoints = [",
        &format!("balance = \"round-robin\"\nconnect_timeout = \"1s\"\nendpoints = [\"http://{address}\", "),
    );
    let gateway = Gateway::start(&config);
    let mut waited = Duration::ZERO;
    // Round robin: the first endpoint of one of two requests is the unreachable one.
    for _ in 0..2 {
        let mut client = gateway.connect();
        let start = Instant::now();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
        assert_eq!(client.read_head().status, 100);
        waited = waited.max(start.elapsed());
        client.send("hello");
        assert_eq!(client.read_response().text(), "5");
    }
    // The other endpoint is tried after 250 ms. That is longer than the client's clock would allow.
    assert!(waited > Duration::from_millis(200), "no request waited for the unreachable endpoint: {waited:?}");
    nobody_was_blamed(&gateway);
}

// A client or an origin that reads slowly, through a send buffer that holds more than it reads in
// the idle time.

/// `idle_timeout` of client and upstream, and no minimum rate.
const IDLE: Duration = Duration::from_millis(800);
const LARGE: usize = 20 << 20;

fn reading_slowly(origin: SocketAddr, rest: &str) -> String {
    let limits = "[limits_http]\nidle_timeout = \"800ms\"\nbody_rate = \"0B\"\nbody_bytes = \"1GiB\"\n";
    let config = one_route(origin, UNCACHED, &format!("{limits}{rest}"));
    config.replacen("\n\n", "\nidle_timeout = \"800ms\"\n\n", 1)
}

fn large_origin() -> Origin {
    Origin::start(|_| Script::ok(&[], vec![b'x'; LARGE]))
}

/// Sets a small receive buffer, so that what the reader takes is soon known to the sender.
fn with_small_buffer(socket: &Socket) {
    socket.set_recv_buffer_size(64 << 10).expect("an option of every socket");
}

fn connect_slow_reader(address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    with_small_buffer(&socket);
    socket.connect_timeout(&address.into(), STEP_TIMEOUT).expect("a connection");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    stream
}

/// Reads about 400 KB/s for `time`. Returns the number of bytes.
fn read_slowly(stream: &mut impl Read, time: Duration) -> usize {
    let (start, mut taken, mut buffer) = (Instant::now(), 0, vec![0; 20_000]);
    while start.elapsed() < time {
        taken += stream.read(&mut buffer).expect("no reset");
        std::thread::sleep(Duration::from_millis(50));
    }
    taken
}

/// Reads to the end of the stream or its failure. Returns the number of bytes.
fn read_rest(stream: &mut impl Read) -> usize {
    let (mut taken, mut buffer) = (0, vec![0; 1 << 16]);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        taken += count;
    }
    taken
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: gate.test\r\nConnection: close\r\n\r\n";

/// Reads a response slowly for several times the idle time, then to its end.
#[track_caller]
fn reads_whole_response(gateway: &Gateway, mut stream: impl Read + Write) {
    stream.write_all(GET).expect("a live connection");
    let slowly = read_slowly(&mut stream, 3 * IDLE);
    assert!(slowly < LARGE / 4, "{slowly}");
    assert!(slowly + read_rest(&mut stream) > LARGE);
    nobody_was_blamed(gateway);
}

/// Reads a response slowly, then no more, and asserts that the connection is reset after the idle
/// time from there.
#[track_caller]
fn is_reset_after_it_stops(gateway: &Gateway, mut stream: impl Read + Write) {
    stream.write_all(GET).expect("a live connection");
    let slowly = read_slowly(&mut stream, 3 * IDLE);
    nobody_was_blamed(gateway);
    let stopped = Instant::now();
    let aborted = "tidegate_responses_aborted_total{reason=\"client_timeout\"}";
    wait_for(|| gateway.metric(aborted) == 1.0, STEP_TIMEOUT);
    assert!((IDLE / 2..IDLE * 3 / 2).contains(&stopped.elapsed()), "{:?}", stopped.elapsed());
    assert_eq!(gateway.metric("tidegate_timeouts_total{clock=\"client_read\"}"), 1.0);
    assert_eq!(gateway.metric("tidegate_responses_aborted_total{reason=\"write_failed\"}"), 0.0);
    assert!(slowly + read_rest(&mut stream) < LARGE);
}

#[test]
fn client_that_reads_slowly_gets_the_whole_response() {
    let origin = large_origin();
    let gateway = Gateway::start(&reading_slowly(origin.address, ""));
    reads_whole_response(&gateway, connect_slow_reader(gateway.address));
}

#[test]
fn client_that_reads_slowly_over_tls_gets_the_whole_response() {
    let origin = large_origin();
    let dir = TempDir::new();
    let trusted = tls::write_certificate(&dir);
    let gateway = Gateway::start_in(dir, &reading_slowly(origin.address, LISTEN_TLS));
    reads_whole_response(&gateway, tls::over(connect_slow_reader(gateway.address), &trusted));
}

/// From memory, in one piece.
#[test]
fn client_that_reads_a_stored_response_slowly_gets_all_of_it() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], vec![b'x'; LARGE]));
    let cache = "[cache]\nmemory = \"256MiB\"\nobject_bytes = \"64MiB\"\n";
    let gateway = Gateway::start(&reading_slowly(origin.address, cache).replacen(UNCACHED, "", 1));
    assert_eq!(gateway.get("/", &[]).body.len(), LARGE);
    wait_for(|| gateway.get("/", &[]).is_hit(), STEP_TIMEOUT);
    let fetched = origin.count();
    reads_whole_response(&gateway, connect_slow_reader(gateway.address));
    assert_eq!(origin.count(), fetched);
}

#[test]
fn client_that_stops_after_reading_slowly_is_reset_after_the_idle_timeout() {
    let origin = large_origin();
    let gateway = Gateway::start(&reading_slowly(origin.address, "[log]\naccess = \"stdout\"\n"));
    is_reset_after_it_stops(&gateway, connect_slow_reader(gateway.address));
    assert_eq!(gateway.access_log(1)[0]["blame"], "client");
}

#[test]
fn client_that_stops_after_reading_slowly_over_tls_is_reset_after_the_idle_timeout() {
    let origin = large_origin();
    let dir = TempDir::new();
    let trusted = tls::write_certificate(&dir);
    let gateway = Gateway::start_in(dir, &reading_slowly(origin.address, LISTEN_TLS));
    is_reset_after_it_stops(&gateway, tls::over(connect_slow_reader(gateway.address), &trusted));
}

/// A client that resets its connection has not been too slow.
#[test]
fn client_that_resets_is_not_counted_as_too_slow() {
    let origin = large_origin();
    let gateway = Gateway::start(&reading_slowly(origin.address, ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    client.read_bytes(1_000);
    client.reset();
    let count = |reason| gateway.metric(&format!("tidegate_responses_aborted_total{{reason=\"{reason}\"}}"));
    wait_for(|| count("write_failed") + count("client_closed") == 1.0, STEP_TIMEOUT);
    assert_eq!((count("client_timeout"), gateway.metric("tidegate_timeouts_total{clock=\"client_read\"}")), (0.0, 0.0));
}

/// Listens with a small receive buffer, and runs `serve` with the first connection.
fn serve_one<T: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (SocketAddr, std::thread::JoinHandle<T>) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    with_small_buffer(&socket);
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    socket.listen(16).expect("a listening socket");
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().expect("bound");
    let serving = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        serve(stream)
    });
    (address, serving)
}

#[test]
fn origin_that_reads_slowly_gets_the_whole_upload() {
    let (address, received) = serve_one(|mut stream| {
        let mut received = read_slowly(&mut stream, 3 * IDLE);
        let mut buffer = vec![0; 1 << 16];
        while received < LARGE {
            received += stream.read(&mut buffer).expect("the body");
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("it reads");
    });
    let gateway = Gateway::start(&reading_slowly(address, ""));
    assert_eq!(gateway.request("POST", "/", &[], &vec![b'x'; LARGE]).status, 200);
    received.join().expect("no panic");
    assert_eq!(gateway.metric("tidegate_timeouts_total{clock=\"upstream_send\"}"), 0.0);
    nobody_was_blamed(&gateway);
}

#[test]
fn origin_that_stops_after_reading_slowly_times_out() {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let (address, received) = serve_one(move |mut stream| {
        read_slowly(&mut stream, 3 * IDLE);
        let stopped = Instant::now();
        // Closed only after the client has its response.
        let _ended = ended.recv_timeout(STEP_TIMEOUT);
        (stopped, stream)
    });
    let gateway = Gateway::start(&reading_slowly(address, ""));
    let response = gateway.request("POST", "/", &[], &vec![b'x'; LARGE]);
    let answered = Instant::now();
    end.send(()).expect("the origin waits");
    let (stopped, _stream) = received.join().expect("no panic");
    assert_eq!(response.status, 503);
    assert!((IDLE / 2..IDLE * 3 / 2).contains(&(answered - stopped)), "{:?}", answered - stopped);
    assert_eq!(gateway.metric("tidegate_timeouts_total{clock=\"upstream_send\"}"), 1.0);
}

#[test]
fn tunnel_whose_client_reads_slowly_stays_open() {
    let (address, served) = serve_one(|mut stream| {
        let mut head = [0; 1_000];
        assert!(stream.read(&mut head).expect("a head") > 0);
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")?;
        stream.write_all(&vec![b'x'; LARGE])
    });
    let gateway = Gateway::start(&reading_slowly(address, ""));
    let mut stream = connect_slow_reader(gateway.address);
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        .expect("a live connection");
    let slowly = read_slowly(&mut stream, 3 * IDLE);
    assert!(slowly < LARGE / 4, "{slowly}");
    // The client keeps its side open: the tunnel ends after the idle time without a byte.
    assert!(slowly + read_rest(&mut stream) > LARGE);
    served.join().expect("no panic").expect("all sent");
}
