//! Request bodies of many streams over one HTTP/2 connection: none of the announced streams is
//! refused, one upload alone has a large window, and an upload that stalls holds up no other.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use support::frames::{END_STREAM, Server, get};
use support::uploads::Uploader;
use support::{Origin, STEP_TIMEOUT, Script, wait_for};

/// Stream ids of requests `first` to `last`.
fn streams(requests: std::ops::Range<u32>) -> impl Iterator<Item = u32> + Clone {
    requests.map(|number| 1 + 2 * number)
}

fn counting() -> Origin {
    Origin::start(|request| Script::ok(&[], format!("{} bytes", request.body.len())))
}

/// An address whose connections accept `bytes` bytes and then nothing more.
fn stalling(bytes: usize) -> SocketAddr {
    accepting(bytes, |stream| {
        std::thread::sleep(6 * STEP_TIMEOUT);
        drop(stream);
    })
}

/// An address whose connections accept `bytes` bytes, and then are what `then` does with them.
fn accepting(bytes: usize, then: impl Fn(TcpStream) + Send + Sync + Copy + 'static) -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a live socket");
    // The system of the gateway would hold megabytes for each connection of large segments.
    socket.set_tcp_mss(536).expect("a live socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
    socket.listen(128).expect("a bound socket");
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let mut space = vec![0; bytes];
                stream.read_exact(&mut space).ok();
                then(stream);
            });
        }
    });
    address
}

/// A gateway whose path `/stall` leads to an origin that accepts `bytes` bytes only.
fn server_with_stall(bytes: usize) -> Server {
    server_before_stall(stalling(bytes))
}

fn server_before_stall(address: SocketAddr) -> Server {
    let rest = format!(
        "[limits_http]\nbody_bytes = \"64MiB\"\n[upstreams.stalled]\nendpoints = [\"http://{}\"]\nretries = 0\n\
         [[routes]]\nname = \"stall\"\nmatch = {{ path = \"/stall\" }}\nupstream = \"stalled\"\n",
        address
    );
    Server::start(counting(), "", &rest)
}

#[test]
fn hundred_uploads_at_once_are_accepted() {
    let server = Server::start(counting(), "", "");
    let mut uploader = Uploader::new(server.connect());
    for round in 0..3 {
        let all = streams(100 * round..100 * (round + 1));
        uploader.begin(all.clone(), "/up", 100_000);
        assert!(uploader.run_until(|uploader| uploader.are_complete(all.clone())));
        assert_eq!(uploader.failures(all), []);
    }
    assert_eq!(server.gateway.metric("tidegate_http2_streams_refused_total{memory=\"connection\"}"), 0.0);
}

#[test]
fn upload_alone_is_offered_a_large_window_and_less_when_others_come() {
    let server = Server::start(counting(), "", "[limits_http]\nbody_bytes = \"256MiB\"\n");
    let mut uploader = Uploader::new(server.connect());
    let length = 200 << 20;
    uploader.begin(streams(0..1), "/up", length);
    let is_large = |uploader: &Uploader| uploader.offered(1) >= 850 << 10;
    assert!(uploader.run_in_round_trips(60, is_large), "{}", uploader.offered(1));
    assert!(uploader.offered(1) <= 896 << 10, "{}", uploader.offered(1));
    // A hundred less one in two bursts: each is accepted, and is done while the first goes on.
    for others in [streams(1..100), streams(100..199)] {
        uploader.begin(others.clone(), "/up", 60_000);
        assert!(uploader.run_until(|uploader| uploader.are_complete(others.clone())));
        assert_eq!(uploader.failures(others), []);
    }
    assert!(!uploader.uploads[&1].has_ended);
    assert!(uploader.run_in_round_trips(60, is_large), "{}", uploader.offered(1));
}

#[test]
fn hundred_uploads_and_requests_are_accepted_after_a_large_upload() {
    let server = Server::start(counting(), "", "[limits_http]\nbody_bytes = \"256MiB\"\n");
    let mut uploader = Uploader::new(server.connect());
    uploader.begin(streams(0..1), "/up", 16 << 20);
    assert!(uploader.run_until(|uploader| uploader.are_complete(streams(0..1))));
    // The window that it had is left to the client.
    uploader.begin(streams(1..101), "/up", 100_000);
    assert!(uploader.run_until(|uploader| uploader.are_complete(streams(1..101))));
    assert_eq!(uploader.failures(streams(1..101)), []);
    let gets: Vec<u8> = streams(101..201).flat_map(|stream| get(stream, "/").bytes()).collect();
    uploader.client.send_bytes(&gets);
    let mut ended = 0;
    while ended < 100 {
        let frame = uploader.client.next_within(STEP_TIMEOUT).expect("a response");
        ended += usize::from(frame.stream > 202 && frame.flags & END_STREAM != 0 && frame.kind < 2);
    }
}

/// None of the later uploads ends, and no byte of them is read, as their upstream does not answer
/// the handshake: none could wait for the memory of another one. The length of the first one is
/// announced, or not.
#[test]
fn hundred_long_uploads_run_after_a_large_one() {
    for is_announced in [true, false] {
        let rest = format!(
            "[upstreams.silent]\nendpoints = [\"https://{}\"]\nretries = 0\nconnect_timeout = \"1m\"\n\
             [limits_http]\nbody_bytes = \"64MiB\"\n\
             [[routes]]\nname = \"stall\"\nmatch = {{ path = \"/stall\" }}\nupstream = \"silent\"\n",
            stalling(1)
        );
        let server = Server::start(counting(), "", &rest);
        let mut uploader = Uploader::new(server.connect());
        if is_announced {
            uploader.begin(streams(0..1), "/up", 16 << 20);
        } else {
            uploader.begin_calls(streams(0..1), "/up", 16 << 20);
        }
        assert!(uploader.run_in_round_trips(200, |uploader| uploader.are_complete(streams(0..1))));
        uploader.begin(streams(1..101), "/stall", 15 << 20);
        let in_flight = || server.gateway.metric("tidegate_requests_in_flight");
        // Less time than a stream may wait.
        assert!(uploader.run_in_round_trips(60, |_| in_flight() >= 95.0), "{}", in_flight());
        assert_eq!(server.gateway.metric("tidegate_http2_streams_refused_total{memory=\"connection\"}"), 0.0);
    }
}

/// Small bodies use up the window that an upload has left; then streams have a first window again
/// as before.
#[test]
fn first_window_is_small_only_while_a_large_window_is_left() {
    let server = Server::start(counting(), "", "[limits_http]\nbody_bytes = \"64MiB\"\n");
    let mut uploader = Uploader::new(server.connect());
    assert_eq!(uploader.first_window, 16 << 10);
    let is_small = |uploader: &Uploader| uploader.first_window == 1 << 10;
    // How much of its window an upload leaves depends on where in it the upload ends.
    let becomes_small = (0..8).any(|number| {
        uploader.begin_calls(streams(number..number + 1), "/up", (8 << 20) + number as usize * 100_000);
        uploader.run_in_round_trips(200, |uploader| uploader.are_complete(streams(number..number + 1)));
        uploader.run_in_round_trips(2, is_small)
    });
    assert!(becomes_small, "{}", uploader.state());
    uploader.begin(streams(8..48), "/up", 30_000);
    assert!(uploader.run_until(|uploader| uploader.are_complete(streams(8..48))));
    assert!(uploader.run_until(|uploader| !is_small(uploader)), "{}", uploader.state());
    assert_eq!(uploader.first_window, 16 << 10);
    uploader.begin(streams(48..148), "/up", 60_000);
    assert!(uploader.run_until(|uploader| uploader.are_complete(streams(48..148))));
    assert_eq!(uploader.failures(streams(8..148)), []);
}

/// An upload that has sent what it may, as its origin reads nothing more.
fn stalled_upload(server: &Server) -> Uploader {
    let mut uploader = Uploader::new(server.connect());
    uploader.begin(streams(0..1), "/stall", 64 << 20);
    send_until_stalled(uploader)
}

fn send_until_stalled(mut uploader: Uploader) -> Uploader {
    let is_stalled = |uploader: &mut Uploader| {
        uploader.send();
        !uploader.receive(Duration::from_secs(1))
    };
    while !is_stalled(&mut uploader) {}
    uploader
}

/// INTERNAL_ERROR.
const INTERNAL: u32 = 2;

#[test]
fn upload_that_stalls_with_a_large_window_holds_up_no_other_for_long() {
    for _ in 0..3 {
        let server = server_with_stall(20 << 20);
        let mut uploader = stalled_upload(&server);
        for round in 0..2 {
            let others = streams(1 + 99 * round..1 + 99 * (round + 1));
            uploader.begin(others.clone(), "/up", 60_000);
            let is_complete = uploader.run_until(|uploader| uploader.are_complete(others.clone()));
            assert!(is_complete, "{round} {}", uploader.state());
            assert_eq!(uploader.failures(others), []);
        }
        let stalled = &uploader.uploads[&1];
        assert!(!stalled.has_ended || stalled.reset == Some(INTERNAL), "{stalled:?}");
    }
}

#[test]
fn upload_that_stalls_is_ended_once_all_memory_of_its_connection_is_held() {
    let server = server_with_stall(20 << 20);
    let mut uploader = stalled_upload(&server);
    // None of the others is read either: they hold what is left, and further ones wait for memory.
    uploader.begin(streams(1..100), "/stall", 60_000);
    assert!(uploader.run_until(|uploader| uploader.uploads[&1].has_ended), "{}", uploader.state());
    assert_eq!(uploader.uploads[&1].reset, Some(INTERNAL));
    let aborted = || server.gateway.metric("tidegate_responses_aborted_total{reason=\"upload_stalled\"}");
    wait_for(|| aborted() == 1.0, STEP_TIMEOUT);
    // It has left enough for all of them.
    wait_for(|| server.gateway.metric("tidegate_requests_in_flight") >= 95.0, STEP_TIMEOUT);
    uploader.run_in_round_trips(3, |_| false);
    assert_eq!(uploader.failures(streams(1..100)).iter().filter(|(_, _, reset)| reset.is_some()).count(), 0);
}

/// Before the head of its response, and after it.
#[test]
fn call_of_grpc_that_is_ended_has_a_status() {
    let silent = stalling(20 << 20);
    let begun = accepting(20 << 20, |mut stream| {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).ok();
        std::thread::sleep(6 * STEP_TIMEOUT);
    });
    for address in [silent, begun] {
        let server = server_before_stall(address);
        let mut uploader = Uploader::new(server.connect());
        uploader.begin_calls(streams(0..1), "/stall", 64 << 20);
        if address == begun {
            assert!(uploader.run_until(|uploader| uploader.uploads[&1].status == 200));
        }
        let mut uploader = send_until_stalled(uploader);
        assert_eq!(uploader.uploads[&1].status, if address == begun { 200 } else { 0 });
        uploader.begin(streams(1..100), "/stall", 60_000);
        assert!(uploader.run_until(|uploader| uploader.uploads[&1].has_ended), "{}", uploader.state());
        let call = &uploader.uploads[&1];
        let has = |text: &[u8]| call.section.windows(text.len()).any(|part| part == text);
        assert_eq!((call.status, call.reset), (200, None));
        assert!(has(b"grpc-status\x0214") && has(b"upload_stalled"), "{:?}", String::from_utf8_lossy(&call.section));
        let aborted = || server.gateway.metric("tidegate_responses_aborted_total{reason=\"upload_stalled\"}");
        wait_for(|| aborted() == 1.0, STEP_TIMEOUT);
        // Its client has not ended the request.
        uploader.uploads.get_mut(&1).expect("the call").has_ended = false;
        assert!(uploader.run_until(|uploader| uploader.uploads[&1].reset == Some(0)), "{}", uploader.state());
        wait_for(|| server.gateway.metric("tidegate_requests_in_flight") >= 95.0, STEP_TIMEOUT);
    }
}

/// An address whose connections accept `bytes` bytes, and then a few every 300 ms.
fn slow(bytes: usize) -> SocketAddr {
    accepting(bytes, |mut stream| {
        let mut space = vec![0; 24 << 10];
        while stream.read(&mut space).is_ok_and(|count| count > 0) {
            std::thread::sleep(Duration::from_millis(300));
        }
    })
}

#[test]
fn upload_that_is_read_slowly_is_not_ended() {
    let rest = format!(
        "[limits_http]\nbody_bytes = \"64MiB\"\n[upstreams.slow]\nendpoints = [\"http://{}\"]\nretries = 0\n\
         [[routes]]\nname = \"slow\"\nmatch = {{ path = \"/slow\" }}\nupstream = \"slow\"\n\
         [upstreams.stalled]\nendpoints = [\"http://{}\"]\nretries = 0\n\
         [[routes]]\nname = \"stall\"\nmatch = {{ path = \"/stall\" }}\nupstream = \"stalled\"\n",
        slow(20 << 20),
        stalling(1)
    );
    let server = Server::start(counting(), "", &rest);
    let mut uploader = Uploader::new(server.connect());
    uploader.begin(streams(0..1), "/slow", 64 << 20);
    assert!(uploader.run_in_round_trips(60, |uploader| uploader.offered(1) >= 600 << 10), "{}", uploader.offered(1));
    uploader.run_in_round_trips(10, |_| false);
    // The others use up what is left of the memory.
    uploader.begin(streams(1..100), "/stall", 60_000);
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_secs(6) {
        uploader.run_in_round_trips(1, |_| false);
    }
    let slow = &uploader.uploads[&1];
    assert!(!slow.has_ended, "{slow:?}");
}

#[test]
fn upload_that_stalls_holds_up_no_other() {
    // At once, and after its window has grown.
    for (accepted, held_min, at_once) in [(1, 0, 99), (20 << 20, 850 << 10, 12)] {
        let server = server_with_stall(accepted);
        let mut uploader = stalled_upload(&server);
        let reserved = server.gateway.metric("tidegate_http2_reserved_bytes");
        assert!(reserved >= f64::from(held_min), "{reserved}");
        for round in 0..2 {
            let others = streams(1 + at_once * round..1 + at_once * (round + 1));
            uploader.begin(others.clone(), "/up", 60_000);
            let is_complete = uploader.run_until(|uploader| uploader.are_complete(others.clone()));
            assert!(is_complete, "{accepted}: {round} {}", uploader.state());
            assert_eq!(uploader.failures(others), []);
        }
        assert!(!uploader.uploads[&1].has_ended);
    }
}

#[test]
fn frames_under_way_when_the_settings_are_acknowledged_are_accepted() {
    use support::frames::{ACK, DATA, Frame, FrameClient, SETTINGS, request_with, status};
    let server = Server::start(counting(), "", "");
    let mut client = FrameClient::connect_silent(&server.gateway, &server.trusted);
    // The settings are acknowledged late, between two frames that the default window allows.
    client.send_bytes(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    client.send(&Frame::new(SETTINGS, 0, 0));
    client.send(&request_with(1, ("POST", "/up"), &[("content-length", "64000")]));
    for _ in 0..3 {
        client.send(&Frame::new(DATA, 0, 1).with(vec![b'u'; 16_000]));
    }
    client.expect(SETTINGS);
    client.send(&Frame::new(SETTINGS, ACK, 0));
    client.send(&Frame::new(DATA, END_STREAM, 1).with(vec![b'u'; 16_000]));
    assert_eq!(status(&client.response(1)), 200);
}
