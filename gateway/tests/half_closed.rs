//! Clients of HTTP/1.1 that end their sending side after a request and read on, as `nc -N` does
//! (RFC 9112 section 9.6), and clients that have gone.

mod support;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use support::client::{chunked, request};
use support::tls::{self, LISTEN_TLS};
use support::{Client, Gate, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

const LOG: &str = "[log]\naccess = \"stdout\"\n";
const CACHED: &str = "cache = { mode = \"standard\" }";
/// An end of the sending side that arrives later after a request is that of a client that leaves.
const HALF_CLOSE_WINDOW: Duration = Duration::from_millis(100);

fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    socket
}

/// Sends `bytes` and then the end of the sending side.
fn send_and_finish(gateway: &Gateway, bytes: &[u8]) -> TcpStream {
    let mut socket = connect(gateway.address);
    socket.write_all(bytes).expect("the gateway reads");
    socket.shutdown(Shutdown::Write).expect("a live socket");
    socket
}

/// Reads until the gateway ends the connection, without a reset.
#[track_caller]
fn read_to_clean_end(socket: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).expect("an end without a reset");
    String::from_utf8(bytes).expect("text")
}

fn in_flight(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_requests_in_flight")
}

/// Waits longer than a client that only ends its sending side would.
fn outlast_window() {
    thread::sleep(HALF_CLOSE_WINDOW * 2);
}

/// An origin that responds when the gate is open: `/part` with one half before that.
fn gated(gate: &Gate) -> Origin {
    let gate = gate.clone();
    Origin::start(move |request| {
        let head = [("Cache-Control", "max-age=60"), ("Content-Length", "8")];
        match &*request.target {
            "/part" => Script::new().head(200, &head).send("half").wait(&gate).send("rest"),
            _ => Script::new().wait(&gate).head(200, &head).send("complete"),
        }
    })
}

#[test]
fn half_closed_client_gets_its_whole_response() {
    let requests: [(&str, Vec<u8>, usize); 6] = [
        ("GET", request("GET", "/a", &[], b""), 1),
        ("HTTP/1.0", b"GET /a HTTP/1.0\r\nHost: gate.test\r\n\r\n".to_vec(), 1),
        ("a response that has begun", request("GET", "/part", &[], b""), 1),
        ("a body", request("POST", "/a", &[], b"body"), 1),
        ("chunks", request("POST", "/a", &[("Transfer-Encoding", "chunked")], &chunked(b"body", 2)), 1),
        ("pipelined", [request("GET", "/a", &[], b""), request("POST", "/part", &[], b"body")].concat(), 2),
    ];
    for route in ["", CACHED] {
        for (name, bytes, responses) in &requests {
            let gate = Gate::default();
            let origin = gated(&gate);
            let gateway = Gateway::start(&one_route(origin.address, route, LOG));
            let mut socket = send_and_finish(&gateway, bytes);
            origin.wait_for_requests(1);
            outlast_window();
            assert_eq!(in_flight(&gateway), 1.0, "{name}");
            gate.open();
            let received = read_to_clean_end(&mut socket);
            let count = |text: &str| received.matches(text).count();
            assert_eq!(
                (count("HTTP/1.1 200 "), count("complete") + count("halfrest")),
                (*responses, *responses),
                "{name}: {received}"
            );
            for line in gateway.access_log(*responses) {
                assert_eq!((line["status"].as_u64(), line["aborted"].as_str()), (Some(200), None), "{name}: {line}");
            }
        }
    }
}

/// `close_notify` ends the sending side of TLS (RFC 8446 section 6.1), with the end of that of TCP
/// or without it.
#[test]
fn half_closed_client_over_tls_gets_its_response_and_a_close_notify() {
    for (ends_tcp, target) in [(false, "/a"), (true, "/a"), (true, "/stored")] {
        let gate = Gate::default();
        let origin = gated(&gate);
        let dir = TempDir::new();
        let trusted = tls::write_certificate(&dir);
        let gateway = Gateway::start_in(dir, &one_route(origin.address, CACHED, &format!("{LOG}{LISTEN_TLS}")));
        let is_stored = target == "/stored";
        if is_stored {
            gate.open();
            tls::connect(gateway.address, &trusted).get(target, &[]);
        }
        let mut stream = tls::over(connect(gateway.address), &trusted);
        // The handshake is complete.
        stream.flush().expect("a handshake");
        stream.write_all(&request("GET", target, &[], b"")).expect("the gateway reads");
        stream.conn.send_close_notify();
        stream.conn.complete_io(&mut stream.sock).expect("a live socket");
        if ends_tcp {
            stream.sock.shutdown(Shutdown::Write).expect("a live socket");
        }
        origin.wait_for_requests(1);
        if !is_stored {
            outlast_window();
        }
        gate.open();
        // Without `close_notify`, the end would be an error.
        assert!(read_to_clean_end(&mut stream).ends_with("complete"));
        let line = gateway.access_log(1).pop().expect("a line");
        assert_eq!((line["status"].as_u64(), line["aborted"].as_str()), (Some(200), None), "{line}");
    }
}

/// An end of TLS without `close_notify` is a truncation: its client has gone.
#[test]
fn tls_client_that_ends_its_socket_only_has_gone() {
    let origin = Origin::start(|_| Script::new().hang());
    let dir = TempDir::new();
    let trusted = tls::write_certificate(&dir);
    let gateway = Gateway::start_in(dir, &one_route(origin.address, "", &format!("{LOG}{LISTEN_TLS}")));
    let mut stream = tls::over(connect(gateway.address), &trusted);
    stream.write_all(&request("GET", "/", &[], b"")).expect("the gateway reads");
    stream.flush().expect("a live socket");
    stream.sock.shutdown(Shutdown::Write).expect("a live socket");
    assert_eq!(gateway.access_log(1)[0]["status"], 499);
    wait_for(|| !origin.ends().is_empty(), STEP_TIMEOUT);
}

#[test]
fn client_that_ends_its_sending_side_later_has_gone() {
    for bytes in [request("GET", "/", &[], b""), request("POST", "/", &[], b"body")] {
        for route in ["", CACHED] {
            let origin = Origin::start(|_| Script::new().hang());
            let gateway = Gateway::start(&one_route(origin.address, route, LOG));
            let mut socket = connect(gateway.address);
            socket.write_all(&bytes).expect("the gateway reads");
            origin.wait_for_requests(1);
            outlast_window();
            socket.shutdown(Shutdown::Write).expect("a live socket");
            // One that reads on sees a clean end.
            assert_eq!(read_to_clean_end(&mut socket), "");
            let line = gateway.access_log(1).remove(0);
            assert_eq!(
                (line["status"].as_u64(), line["aborted"].as_str()),
                (Some(499), Some("client_closed")),
                "{line}"
            );
            wait_for(|| !origin.ends().is_empty(), STEP_TIMEOUT);
        }
    }
}

/// A connection that is closed answers the first bytes with a reset, which ends the exchange.
#[test]
fn half_closed_client_that_goes_ends_its_exchange() {
    let gate = Gate::default();
    let opened = gate.clone();
    let event = "6\r\nevent\n\r\n";
    let origin = Origin::start(move |_| {
        let head = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")];
        Script::new().head(200, &head).send(event).wait(&opened).send(event).hang()
    });
    let gateway = Gateway::start(&one_route(origin.address, "", LOG));
    let mut client = Client::connect(gateway.address);
    client.send_get("/", &[]);
    client.finish();
    client.read_head();
    // The end of a chunk is sent with the next one.
    client.read_bytes(event.len() - 2);
    drop(client);
    gate.open();
    wait_for(|| !origin.ends().is_empty(), STEP_TIMEOUT);
    let line = gateway.access_log(1).remove(0);
    assert_eq!((line["status"].as_u64(), line["blame"].as_str()), (Some(200), Some("client")), "{line}");
}

#[test]
fn reset_of_a_half_closed_client_ends_its_exchange() {
    let origin = Origin::start(|_| Script::new().hang());
    let gateway = Gateway::start(&one_route(origin.address, "timeout = \"1m\"", LOG));
    for (number, bytes) in [request("GET", "/", &[], b""), request("POST", "/", &[], b"body")].into_iter().enumerate() {
        let mut client = Client::connect(gateway.address);
        client.send(bytes);
        client.finish();
        origin.wait_for_requests(number + 1);
        outlast_window();
        assert_eq!(in_flight(&gateway), 1.0);
        client.reset();
        wait_for(|| origin.ends().len() > number, STEP_TIMEOUT);
        assert_eq!(gateway.access_log(number + 1)[number]["status"], 499);
    }
}

#[test]
fn half_closed_clients_lead_and_join_a_shared_fetch() {
    for target in ["/a", "/part"] {
        let gate = Gate::default();
        let origin = gated(&gate);
        let gateway = Gateway::start(&one_route(origin.address, CACHED, LOG));
        let get = request("GET", target, &[], b"");
        let mut sockets = Vec::new();
        for count in 1..=3 {
            sockets.push(send_and_finish(&gateway, &get));
            wait_for(|| in_flight(&gateway) == f64::from(count), STEP_TIMEOUT);
        }
        outlast_window();
        gate.open();
        sockets.iter_mut().for_each(|socket| assert!(read_to_clean_end(socket).contains("HTTP/1.1 200 "), "{target}"));
        assert_eq!(origin.count(), 1);
    }
}

#[test]
fn half_closed_client_is_answered_by_another_endpoint() {
    let gate = Gate::default();
    let good = gated(&gate);
    let bad = Origin::start(|_| Script::new().pause(HALF_CLOSE_WINDOW * 2).reset());
    let endpoints = format!("balance = \"round-robin\"\nretries = 1\nendpoints = [\"http://{}\", ", good.address);
    let config = one_route(bad.address, "", LOG).replace("endpoints = [", &endpoints);
    let gateway = Gateway::start(&config);
    gate.open();
    for number in 0..4 {
        let mut socket = send_and_finish(&gateway, &request("GET", &format!("/{number}"), &[], b""));
        assert!(read_to_clean_end(&mut socket).ends_with("complete"));
    }
    assert!(bad.count() > 0);
}

/// Begins an upload of `length` bytes. Returns the connection of the client, and that of the
/// upstream, which reads nothing yet.
fn begin_upload(gateway: &Gateway, upstream: &TcpListener, length: usize) -> (TcpStream, TcpStream) {
    let mut socket = connect(gateway.address);
    let head = format!("POST / HTTP/1.1\r\nHost: gate.test\r\nContent-Length: {length}\r\n\r\n");
    socket.write_all(head.as_bytes()).expect("a live socket");
    let (connection, _) = upstream.accept().expect("the connection of the gateway");
    connection.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    (socket, connection)
}

/// The end of a request waits in the buffers of the system while the upstream accepts nothing.
#[test]
fn half_closed_upload_waits_for_an_upstream_that_does_not_read() {
    let upstream = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let rest = format!("[limits_http]\nbody_bytes = \"64MiB\"\n{LOG}");
    let address = upstream.local_addr().expect("bound");
    let gateway = Gateway::start(&one_route(address, "cache = { mode = \"off\" }", &rest));
    let is_blocked = || gateway.admin("/api/v1/tasks").text().contains("upstream_send");
    // How many bytes fit the buffers on the way to the upstream.
    let (mut socket, connection) = begin_upload(&gateway, &upstream, 60_000_000);
    let piece = [b'x'; 32 << 10];
    let mut length = 0;
    wait_for(
        || {
            socket.write_all(&piece).expect("room in the buffers");
            length += piece.len();
            is_blocked()
        },
        STEP_TIMEOUT,
    );
    drop((socket, connection));
    wait_for(|| in_flight(&gateway) == 0.0, STEP_TIMEOUT);
    length += 4 * piece.len();
    let (mut socket, mut connection) = begin_upload(&gateway, &upstream, length);
    socket.write_all(&vec![b'x'; length]).expect("room in the buffers");
    socket.shutdown(Shutdown::Write).expect("a live socket");
    wait_for(is_blocked, STEP_TIMEOUT);
    // The gateway asks the system once a second whether the client is still there.
    thread::sleep(Duration::from_millis(2_500));
    assert_eq!(in_flight(&gateway), 1.0);
    let mut received = 0;
    let mut space = vec![0; 1 << 20];
    while received < length {
        let count = connection.read(&mut space).expect("the whole request");
        assert!(count > 0, "{received} of {length}");
        received += count;
    }
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").expect("a live socket");
    assert!(read_to_clean_end(&mut socket).ends_with("ok"));
}

#[test]
fn half_closed_client_that_upgrades_reads_on() {
    let gate = Gate::default();
    let opened = gate.clone();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gateway = Gateway::start(&one_route(listener.local_addr().expect("bound"), "", LOG));
    let origin = thread::spawn(move || -> io::Result<Vec<u8>> {
        let (mut upstream, _) = listener.accept()?;
        upstream.set_read_timeout(Some(STEP_TIMEOUT))?;
        assert!(upstream.read(&mut [0; 4096])? > 0, "the request");
        opened.wait();
        upstream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")?;
        // The end of the client's bytes arrives, and bytes of the origin still reach the client.
        let mut received = Vec::new();
        upstream.read_to_end(&mut received)?;
        upstream.write_all(b"goodbye")?;
        Ok(received)
    });
    let fields = [("Connection", "upgrade"), ("Upgrade", "echo")];
    let mut socket = send_and_finish(&gateway, &request("GET", "/", &fields, b""));
    wait_for(|| in_flight(&gateway) == 1.0, STEP_TIMEOUT);
    outlast_window();
    gate.open();
    let received = read_to_clean_end(&mut socket);
    assert!(received.starts_with("HTTP/1.1 101") && received.ends_with("goodbye"), "{received}");
    assert_eq!(origin.join().expect("no panic").expect("a tunnel"), b"");
}
