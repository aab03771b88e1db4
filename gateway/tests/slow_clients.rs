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
    for reason in ["write_failed", "client_closed", "body_failed"] {
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
    let aborted = |gateway: &Gateway| gateway.metric("tidegate_responses_aborted_total{reason=\"write_failed\"}");
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
    let config = one_route(origin.address, UNCACHED, SHORT).replace(
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
    assert!(waited > Duration::from_millis(800), "no request waited for the unreachable endpoint: {waited:?}");
    nobody_was_blamed(&gateway);
}
