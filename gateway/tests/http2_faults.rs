//! HTTP/2 clients that break the rules, and those that only seem to: what is counted, which streams
//! and connections end, and which must not.

mod support;

use std::time::{Duration, Instant};

use support::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, FrameClient, GOAWAY, HEADERS, PING,
    RST_STREAM, SETTINGS, Server, WINDOW_UPDATE, body, get, head_block, request, request_with, status,
};
use support::{Gate, Origin, STEP_TIMEOUT, Script, wait_for};

const PROTOCOL_ERROR: u32 = 1;

/// An origin whose responses wait for `gate`.
fn waiting_origin(gate: &Gate) -> Origin {
    let gate = gate.clone();
    Origin::start(move |_| Script::new().wait(&gate).send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
}

#[test]
fn references_in_trailers_to_one_long_field_cost_little() {
    let server = Server::echo("");
    let mut client = server.connect();
    // Inserted into the table once, then referred to by one byte each.
    let mut block =
        head_block(&[(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "gate.test")]);
    block.extend([0x40, 3]);
    block.extend(b"x-a");
    block.extend([0x7f, 0xa1, 0x1e]);
    block.extend([b'a'; 4000]);
    client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 1).with(&block));
    assert_eq!(status(&client.response(1)), 200);
    let begin = Instant::now();
    for stream in (3..23).step_by(2) {
        let references = [0xbe; 16_000];
        let mut frames = request(stream, "POST", "/").bytes();
        frames.extend(Frame::new(HEADERS, END_STREAM, stream).with(references).bytes());
        for flags in [0, 0, END_HEADERS] {
            frames.extend(Frame::new(CONTINUATION, flags, stream).with(references).bytes());
        }
        client.send_bytes(&frames);
        let reset = client.expect(RST_STREAM);
        assert_eq!((reset.stream, reset.code()), (stream, PROTOCOL_ERROR));
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(client.is_alive());
}

#[test]
fn heads_of_a_reset_stream_explain_no_other_frames() {
    let server = Server::echo("");
    let mut client = server.connect();
    let mut frames = request(1, "POST", "/").bytes();
    frames.extend(Frame::new(WINDOW_UPDATE, 0, 1).with(0_u32.to_be_bytes()).bytes());
    let ping = Frame::new(PING, 0, 0).with([0; 8]).bytes();
    let round = [Frame::new(HEADERS, END_HEADERS, 1).bytes(), ping.clone(), ping].concat();
    frames.extend(round.repeat(200));
    client.send_bytes(&frames);
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
    // The heads alone are a flood, too.
    let mut client = server.connect();
    let mut frames = request(1, "POST", "/").bytes();
    frames.extend(Frame::new(WINDOW_UPDATE, 0, 1).with(0_u32.to_be_bytes()).bytes());
    frames.extend(Frame::new(HEADERS, END_HEADERS, 1).bytes().repeat(200));
    client.send_bytes(&frames);
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
}

/// Every frame by which a client makes the gateway reset an accepted stream is counted.
#[test]
fn every_reset_that_a_client_provokes_is_counted() {
    let gate = Gate::default();
    let server = Server::start(waiting_origin(&gate), "", "");
    type Fault = fn(u32) -> Vec<Frame>;
    let faults: [(&str, Fault); 10] = [
        ("a window that overflows", |stream| {
            let update = Frame::new(WINDOW_UPDATE, 0, stream).with(0x7fff_ffff_u32.to_be_bytes());
            vec![request(stream, "POST", "/"), update]
        }),
        ("an increment of 0", |stream| {
            vec![request(stream, "POST", "/"), Frame::new(WINDOW_UPDATE, 0, stream).with(0_u32.to_be_bytes())]
        }),
        ("DATA after the end", |stream| vec![get(stream, "/"), Frame::new(DATA, 0, stream).with("x")]),
        ("an empty end after the end", |stream| vec![get(stream, "/"), Frame::new(DATA, END_STREAM, stream)]),
        ("trailers after the end", |stream| {
            vec![get(stream, "/"), Frame::new(HEADERS, END_HEADERS | END_STREAM, stream)]
        }),
        ("trailers that do not end the stream", |stream| {
            vec![request(stream, "POST", "/"), Frame::new(HEADERS, END_HEADERS, stream)]
        }),
        ("malformed trailers", |stream| {
            let trailers = Frame::new(HEADERS, END_HEADERS | END_STREAM, stream).with(head_block(&[("X-A", "1")]));
            vec![request(stream, "POST", "/"), trailers]
        }),
        ("more bytes than announced", |stream| {
            let head = request_with(stream, ("POST", "/"), &[("content-length", "1")]);
            vec![head, Frame::new(DATA, 0, stream).with("two")]
        }),
        ("fewer bytes than announced", |stream| {
            let head = request_with(stream, ("POST", "/"), &[("content-length", "9")]);
            vec![head, Frame::new(DATA, END_STREAM, stream).with("two")]
        }),
        ("a stream that depends on itself", |stream| {
            let mut head = get(stream, "/");
            head.flags |= 0x20;
            head.payload = [&stream.to_be_bytes()[..], &[7], &head.payload].concat();
            vec![head]
        }),
    ];
    for (name, fault) in faults {
        let mut client = server.connect();
        // A few at a time: what counts is not the memory of many.
        for first in (0..200).step_by(20) {
            let frames = (first..first + 20).flat_map(|number| fault(1 + 2 * number));
            client.send_bytes(&frames.flat_map(|frame| frame.bytes()).collect::<Vec<_>>());
            if !client.is_alive() {
                break;
            }
        }
        assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)), "{name}");
    }
    gate.open();
    wait_for(|| server.gateway.metric("tidegate_requests_in_flight") == 0.0, STEP_TIMEOUT);
}

/// The client has sent an upload before it knew of the last GOAWAY.
#[test]
fn frames_of_streams_after_the_last_goaway_are_ignored() {
    let gate = Gate::default();
    let mut server = Server::start(waiting_origin(&gate), "", "");
    let mut client = server.connect();
    client.send(&get(1, "/"));
    wait_for(|| server.origin.count() == 1, STEP_TIMEOUT);
    server.gateway.process.signal("TERM");
    client.expect(GOAWAY);
    client.send(&Frame::new(PING, ACK, 0).with(b"draining"));
    let last = client.expect(GOAWAY);
    assert_eq!((last.code(), &last.payload[..4]), (0, &[0, 0, 0, 1][..]));
    let trailers = Frame::new(HEADERS, END_HEADERS | END_STREAM, 3).with(head_block(&[("x-check", "42")]));
    let frames = [request(3, "POST", "/"), Frame::new(DATA, 0, 3).with([b'x'; 10_000]), trailers];
    client.send_bytes(&frames.iter().flat_map(Frame::bytes).collect::<Vec<_>>());
    // The windows are kept.
    for _ in 0..10 {
        client.send(&Frame::new(DATA, 0, 3).with([b'x'; 10_000]));
        assert!(client.is_alive());
    }
    gate.open();
    let frames = client.response(1);
    assert_eq!((status(&frames), &*body(&frames)), (200, &b"ok"[..]));
    assert_eq!(server.origin.count(), 1);
    assert!(server.gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
}

/// A client that has as many open streams as it may opens the next ones when some have ended. Small
/// responses end while the gateway is still sending large ones.
#[test]
fn client_within_the_limit_of_streams_is_never_refused() {
    const LARGE: u32 = 5;
    const SMALL: u32 = 95;
    let (small, large) = (vec![b'x'; 50], vec![b'x'; 4 << 20]);
    let origin = Origin::start(move |request| {
        Script::ok(&[("Cache-Control", "max-age=600")], if request.target == "/large" { &large } else { &small })
    });
    let server = Server::start(origin, "", "");
    for round in 0..10 {
        let mut client = FrameClient::connect(&server.gateway, &server.trusted, 0x7fff_ffff);
        client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(0x7000_0000_u32.to_be_bytes()));
        for (stream, target) in [(1, "/small"), (3, "/large")] {
            client.send(&get(stream, target));
            assert_eq!(status(&client.response(stream)), 200);
        }
        let smalls = |first: u32| (0..SMALL).flat_map(move |number| get(first + 2 * number, "/small").bytes());
        let larges = (0..LARGE).flat_map(|number| {
            let mut head = request_with(5 + 2 * number, ("GET", "/large"), &[("priority", "u=7")]);
            head.flags |= END_STREAM;
            head.bytes()
        });
        let (first, second) = (5 + 2 * LARGE, 5 + 2 * (LARGE + SMALL));
        client.send_bytes(&larges.chain(smalls(first)).collect::<Vec<_>>());
        let mut ended = 0;
        while ended < 2 * SMALL + LARGE {
            let frame = client.next_within(STEP_TIMEOUT).expect("a frame");
            assert_ne!(frame.kind, RST_STREAM, "round {round}, stream {} after {ended}", frame.stream);
            ended += u32::from(frame.ends_stream());
            if frame.ends_stream() && ended == SMALL {
                client.send_bytes(&smalls(second).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn capital_letters_in_a_known_name_are_malformed() {
    let server = Server::echo("");
    let mut client = server.connect();
    for (stream, name) in [(1, "Cookie"), (3, "Accept"), (5, "X-A")] {
        let mut head = request_with(stream, ("GET", "/"), &[(name, "a")]);
        head.flags |= END_STREAM;
        client.send(&head);
        assert_eq!(status(&client.response(stream)), 400, "{name}");
    }
    assert_eq!(server.origin.count(), 0);
}

#[test]
fn values_of_the_setting_of_priorities_are_checked() {
    let server = Server::echo("");
    for (value, ended) in [(1, false), (2, true)] {
        let mut client = server.connect();
        client.send(&Frame::new(SETTINGS, 0, 0).with([0, 9, 0, 0, 0, value]));
        assert_eq!(client.is_alive(), !ended);
    }
}

/// A window that is opened by one byte after the other explains no other frames.
#[test]
fn windows_of_one_byte_are_a_flood() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=600")], [b'x'; 10_000]));
    let server = Server::start(origin, "", "");
    let mut client = FrameClient::connect(&server.gateway, &server.trusted, 0);
    client.send(&get(1, "/"));
    client.expect(HEADERS);
    let update = Frame::new(WINDOW_UPDATE, 0, 1).with(1_u32.to_be_bytes()).bytes();
    let mut sent = 0;
    while sent < 2_000 {
        client.send_bytes(&update.repeat(20));
        sent += 20;
        if !client.is_alive() {
            break;
        }
    }
    assert!(sent < 1_000, "{sent}");
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
}

/// A stream that was reset so long ago that it is forgotten.
#[test]
fn data_of_a_forgotten_stream_ends_no_connection() {
    let server = Server::echo("");
    let mut client = server.connect();
    client
        .send_bytes(&[request(1, "POST", "/").bytes(), Frame::new(WINDOW_UPDATE, 0, 1).with([0; 4]).bytes()].concat());
    assert_eq!(client.expect(RST_STREAM).stream, 1);
    for stream in (3..603).step_by(2) {
        client.send(&get(stream, "/"));
        assert_eq!(status(&client.response(stream)), 200);
    }
    client.send(&Frame::new(DATA, 0, 1).with([0; 1_000]));
    assert!(client.is_alive());
}
