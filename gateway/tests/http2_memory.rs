//! Memory that HTTP/2 connections hold, whatever their clients do: measured on the process while
//! several connections do the worst that is known.

mod support;

use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use base64::Engine as _;
use support::frames::{
    DATA, END_HEADERS, END_STREAM, Frame, FrameClient, HEADERS, Server, WINDOW_UPDATE, body, get, head_block,
};
use support::uploads::Uploader;
use support::{Gate, Origin, STEP_TIMEOUT, Script, wait_for};

/// Bytes that one connection may hold: 2 MiB.
const CONNECTION_MAX: usize = 2 << 20;
const CONNECTIONS: usize = 4;
/// Requests of one connection; the streams above the limit are refused.
const REQUESTS: u32 = 250;
const PAGE: usize = 1 << 20;
/// Requests that a connection may have at once in any case.
const IN_FLIGHT_MIN: f64 = 95.0;

/// An origin with a page that is stored, one that is not, and a request that is never answered.
fn origin(gate: &Gate) -> Origin {
    let (page, gate) = (vec![b'x'; PAGE], gate.clone());
    Origin::start(move |request| match &*request.target {
        "/stored" => Script::ok(&[("Cache-Control", "max-age=600")], &page),
        "/passed" => Script::ok(&[("Cache-Control", "no-store")], &page),
        // As a response of unknown length.
        "/streamed" => Script::new()
            .send("HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n")
            .send(&page)
            .close(),
        _ => Script::new().wait(&gate),
    })
}

/// Bytes of each of several connections, and the requests of all.
struct MemoryUse {
    bytes: usize,
    in_flight: f64,
}

/// Bytes that each of several connections holds when every one has done `attack`.
fn held(server: &Server, window: u32, mut attack: impl FnMut(&mut FrameClient)) -> MemoryUse {
    held_by(server, || {
        let mut client = FrameClient::connect(&server.gateway, &server.trusted, window);
        client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(0x7fff_0000_u32.to_be_bytes()));
        attack(&mut client);
        client
    })
}

/// As `held`, for uploads.
fn held_by_uploads(server: &Server, window: u32, mut attack: impl FnMut(&mut Uploader)) -> MemoryUse {
    held_by(server, || {
        let mut uploader = Uploader::new(FrameClient::connect(&server.gateway, &server.trusted, window));
        attack(&mut uploader);
        uploader
    })
}

fn held_by<C>(server: &Server, attack: impl FnMut() -> C) -> MemoryUse {
    let before = server.gateway.process.memory();
    let _clients: Vec<C> = std::iter::repeat_with(attack).take(CONNECTIONS).collect();
    // Until nothing moves: the largest of what is seen.
    let (mut most, mut changed) = (0, Instant::now());
    let start = Instant::now();
    while changed.elapsed() < Duration::from_millis(700) && start.elapsed() < STEP_TIMEOUT {
        std::thread::sleep(Duration::from_millis(20));
        let now = server.gateway.process.memory().saturating_sub(before);
        if now > most + (64 << 10) {
            changed = Instant::now();
        }
        most = most.max(now);
    }
    MemoryUse { bytes: most / CONNECTIONS, in_flight: server.gateway.metric("tidegate_requests_in_flight") }
}

#[track_caller]
fn assert_held(name: &str, MemoryUse { bytes, in_flight }: &MemoryUse, in_flight_min: f64) {
    eprintln!("{name}: {} KiB a connection, {in_flight} requests in flight", bytes >> 10);
    assert!(*bytes <= CONNECTION_MAX, "{name}: {} KiB a connection", bytes >> 10);
    // The account does not refuse the requests of a client that does no harm.
    assert!(*in_flight >= in_flight_min * CONNECTIONS as f64, "{name}: {in_flight}");
}

fn measured(origin: Origin) -> Server {
    let address = origin.address;
    Server::measured(origin, address)
}

fn gets(target: &str) -> Vec<u8> {
    (0..REQUESTS).flat_map(|number| get(1 + 2 * number, target).bytes()).collect()
}

/// Buffers that every process has after its first requests.
fn warm_up(server: &Server, target: &str) {
    let mut client = FrameClient::connect(&server.gateway, &server.trusted, 0x7fff_ffff);
    client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(0x7fff_0000_u32.to_be_bytes()));
    client.send(&get(1, target));
    assert_eq!(body(&client.response(1)).len(), PAGE);
}

fn check_unread(target: &str, window: u32) {
    let server = measured(origin(&Gate::default()));
    warm_up(&server, target);
    let held = held(&server, window, |client| client.send_bytes(&gets(target)));
    assert_held(&format!("{target}, window {window}"), &held, IN_FLIGHT_MIN);
}

#[test]
fn stored_page_that_is_not_read() {
    check_unread("/stored", 0x7fff_ffff);
}

#[test]
fn stored_page_without_a_window() {
    check_unread("/stored", 0);
}

#[test]
fn passed_page_that_is_not_read() {
    check_unread("/passed", 0x7fff_ffff);
}

#[test]
fn passed_page_without_a_window() {
    check_unread("/passed", 0);
}

#[test]
fn streamed_page_that_is_not_read() {
    check_unread("/streamed", 0x7fff_ffff);
}

#[test]
fn large_heads_that_wait_for_the_origin() {
    let gate = Gate::default();
    let server = measured(origin(&gate));
    warm_up(&server, "/passed");
    let value = "v".repeat(1_900);
    let names: Vec<String> = (0..8).map(|number| format!("x-{number}")).collect();
    let held = held(&server, 0, |client| {
        for number in 0..120 {
            let path = format!("/wait/{number}");
            let mut fields =
                vec![(":method", "GET"), (":scheme", "https"), (":path", &*path), (":authority", "gate.test")];
            fields.extend(names.iter().map(|name| (&**name, &*value)));
            client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * number).with(head_block(&fields)));
        }
    });
    assert_held("heads of 15 KiB", &held, 27.0);
    gate.open();
}

#[test]
fn small_heads_that_wait_for_the_origin() {
    let gate = Gate::default();
    let server = measured(origin(&gate));
    warm_up(&server, "/passed");
    let held = held(&server, 0, |client| {
        let requests: Vec<u8> =
            (0..REQUESTS).flat_map(|number| get(1 + 2 * number, &format!("/wait/{number}")).bytes()).collect();
        client.send_bytes(&requests);
    });
    assert_held("heads that wait", &held, IN_FLIGHT_MIN);
    gate.open();
}

/// A listener whose connections `serve` handles, each in a thread of its own.
fn listener(serve: impl Fn(TcpStream) + Send + Sync + Copy + 'static) -> SocketAddr {
    // All connections come at once: those beyond the backlog would be late by seconds.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a live socket");
    // The system of the gateway would hold megabytes for each connection of large segments.
    socket.set_tcp_mss(536).expect("a live socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
    socket.listen(1_024).expect("a bound socket");
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Stream ids of requests.
fn streams(requests: std::ops::Range<u32>) -> impl Iterator<Item = u32> {
    requests.map(|number| 1 + 2 * number)
}

/// Uploads of which the gateway gets as much as it grants, until nothing moves.
fn upload_all(client: &mut Uploader, requests: std::ops::Range<u32>) {
    client.begin(streams(requests), "/stall", 15 << 20);
    upload_until_stalled(client);
}

fn upload_until_stalled(uploader: &mut Uploader) {
    let start = Instant::now();
    uploader.send();
    while start.elapsed() < STEP_TIMEOUT && uploader.receive(Duration::from_millis(300)) {
        uploader.send();
    }
}

#[test]
fn uploads_that_the_origin_does_not_read() {
    let address = listener(|stream| {
        std::thread::sleep(3 * STEP_TIMEOUT);
        drop(stream);
    });
    let server = Server::measured(Origin::start(|_| Script::ok(&[], "")), address);
    let held = held_by_uploads(&server, 65_535, |client| upload_all(client, 0..100));
    assert_held("uploads", &held, IN_FLIGHT_MIN);
}

#[test]
fn uploads_whose_windows_have_grown() {
    // Reads the beginning of every body, and then nothing.
    let address = listener(|mut stream| {
        let mut beginning = vec![0; 600_000];
        stream.read_exact(&mut beginning).ok();
        std::thread::sleep(3 * STEP_TIMEOUT);
    });
    let server = Server::measured(Origin::start(|_| Script::ok(&[], "")), address);
    let held = held_by_uploads(&server, 65_535, |client| upload_all(client, 0..8));
    assert_held("uploads with grown windows", &held, 8.0);
}

/// Reads 24 MiB of a body of 64 MiB for `/begin`, nothing for `/stall`, and other bodies.
fn upload_origin() -> SocketAddr {
    listener(|mut stream| {
        let mut received = Vec::new();
        let mut space = vec![0; 64 << 10];
        loop {
            let head_end = received.windows(4).position(|bytes| bytes == b"\r\n\r\n");
            let Some(head_end) = head_end else {
                match stream.read(&mut space).unwrap_or(0) {
                    0 => return,
                    count => received.extend_from_slice(&space[..count]),
                }
                continue;
            };
            let head = String::from_utf8_lossy(&received[..head_end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            let mut left = (length.unwrap_or(0) + head_end + 4).saturating_sub(received.len());
            let rest = if head.starts_with("put /begin") { 40 << 20 } else { 0 };
            while !head.starts_with("put /stall") && left > rest {
                match stream.read(&mut space).unwrap_or(0) {
                    0 => return,
                    count => left -= count.min(left),
                }
            }
            if left > 0 {
                return std::thread::sleep(3 * STEP_TIMEOUT);
            }
            received.clear();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").ok();
        }
    })
}

fn upload_server() -> Server {
    let address = upload_origin();
    Server::measured_with(address, "[limits_http]\nbody_bytes = \"64MiB\"\n")
}

#[test]
fn upload_that_stalls_with_its_large_window_before_others() {
    let server = upload_server();
    let held = held_by_uploads(&server, 65_535, |client| {
        client.begin(streams(0..1), "/begin", 64 << 20);
        client.run_in_round_trips(20, |client| client.offered(1) >= 850 << 10);
        upload_until_stalled(client);
        upload_all(client, 1..100);
    });
    // The one that has stalled is ended, as others wait for its memory.
    assert_held("a large window, then other uploads", &held, 20.0);
}

#[test]
fn uploads_that_get_the_window_of_a_past_one() {
    let server = upload_server();
    let held = held_by_uploads(&server, 65_535, |client| {
        client.begin(streams(0..1), "/up", 16 << 20);
        assert!(client.run_in_round_trips(100, |client| client.are_complete(streams(0..1))));
        upload_all(client, 1..101);
    });
    assert_held("the window of a past upload", &held, 40.0);
}

#[test]
fn page_of_which_the_beginning_is_read() {
    let server = measured(origin(&Gate::default()));
    warm_up(&server, "/passed");
    let held = held(&server, 20_000, |client| {
        // Half of the streams, so that each may read more at once.
        let requests: Vec<u8> = (0..60).flat_map(|number| get(1 + 2 * number, "/passed").bytes()).collect();
        client.send_bytes(&requests);
        let mut received = 0;
        while received < 60 * 20_000 {
            received += client.expect(DATA).payload.len();
        }
        let more: Vec<u8> = (60..REQUESTS).flat_map(|number| get(1 + 2 * number, "/passed").bytes()).collect();
        client.send_bytes(&more);
    });
    assert_held("pages whose beginning is read", &held, IN_FLIGHT_MIN);
}

#[test]
fn large_heads_of_responses() {
    let value = "v".repeat(8_000);
    let origin = Origin::start(move |_| Script::ok(&[("Cache-Control", "no-store"), ("X-Long", &value)], [b'x'; 1000]));
    let server = measured(origin);
    let held = held(&server, 0x7fff_ffff, |client| client.send_bytes(&gets("/")));
    assert_held("heads of responses", &held, 0.0);
    // Some cannot be held; the others were written, or wait.
    assert!(server.gateway.metric("tidegate_responses_aborted_total{reason=\"memory\"}") > 0.0);
}

#[test]
fn tunnels_that_are_not_read() {
    let address = listener(|mut stream| {
        let mut lines = std::io::BufReader::new(stream.try_clone().expect("a second handle")).lines();
        let key = lines.find_map(|line| Some(line.ok()?.strip_prefix("sec-websocket-key: ")?.to_owned()));
        let text = format!("{}258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key.unwrap_or_default());
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
        let accept = base64::engine::general_purpose::STANDARD.encode(hash);
        let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
        stream.write_all(format!("{head}Sec-WebSocket-Accept: {accept}\r\n\r\n").as_bytes()).ok();
        stream.write_all(&vec![b'x'; PAGE]).ok();
        std::thread::sleep(3 * STEP_TIMEOUT);
    });
    let server = Server::measured(Origin::start(|_| Script::ok(&[], "")), address);
    let held = held(&server, 0x7fff_ffff, |client| {
        let fields = [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "https"),
            (":path", "/"),
            (":authority", "gate.test"),
        ];
        let head = head_block(&fields);
        let heads: Vec<u8> = (0..REQUESTS)
            .flat_map(|number| Frame::new(HEADERS, END_HEADERS, 1 + 2 * number).with(&head).bytes())
            .collect();
        client.send_bytes(&heads);
    });
    assert_held("tunnels", &held, 0.0);
    let tunnels = || server.gateway.metric("tidegate_upgrades_total");
    wait_for(|| tunnels() >= IN_FLIGHT_MIN * CONNECTIONS as f64, STEP_TIMEOUT);
}

/// The worst of both directions: uploads that the origin does not read, after it has begun
/// responses that the client does not read.
#[test]
fn uploads_and_responses_that_nobody_reads() {
    let address = listener(|mut stream| {
        let mut space = [0; 500];
        if stream.read(&mut space).unwrap_or(0) == 0 {
            return;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n").ok();
        stream.write_all(&[b'x'; 100_000]).ok();
        std::thread::sleep(3 * STEP_TIMEOUT);
    });
    let server = Server::measured(Origin::start(|_| Script::ok(&[], "")), address);
    let held = held_by_uploads(&server, 0, |client| upload_all(client, 0..100));
    assert_held("uploads and responses", &held, IN_FLIGHT_MIN);
}
