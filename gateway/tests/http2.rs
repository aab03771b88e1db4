//! HTTP/2 to clients, by hand-made frames: bodies, interim responses and trailers, the clocks of
//! streams and connections, floods, and memory.

mod support;

use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use support::frames::{
    ACK, CANCEL, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, FrameClient, GOAWAY, HEADERS,
    PING, PRIORITY, PRIORITY_UPDATE, REFUSED_STREAM, RST_STREAM, SETTINGS, Server, WINDOW, WINDOW_UPDATE, body, get,
    head_block, request, request_with, status,
};
use support::{Gate, Origin, STEP_TIMEOUT, Script, wait_for};

#[test]
fn request_without_body_bytes_has_no_body() {
    let server = Server::echo("");
    let mut client = server.connect();
    let empty_end = Frame::new(DATA, END_STREAM, 0).bytes();
    let mut end_of = |stream: u32, head: Frame, is_together: bool| {
        let mut end = empty_end.clone();
        end[5..9].copy_from_slice(&stream.to_be_bytes());
        if is_together {
            client.send_bytes(&[head.bytes(), end].concat());
        } else {
            client.send(&head);
            assert!(client.is_alive());
            client.send_bytes(&end);
        }
        assert_eq!(status(&client.response(stream)), 200);
        let received = server.origin.last();
        assert_eq!((received.field("transfer-encoding"), &*received.body), (None, &b""[..]), "stream {stream}");
    };
    end_of(1, request(1, "GET", "/a"), true);
    end_of(3, request(3, "GET", "/b"), false);
    end_of(5, request(5, "OPTIONS", "/c"), false);
    end_of(7, request_with(7, ("POST", "/d"), &[("content-length", "0")]), false);
    for (at, method) in ["POST", "PUT", "DELETE", "PATCH", "QUERY"].into_iter().enumerate() {
        let stream = 9 + 2 * at as u32;
        end_of(stream, request(stream, method, "/e"), true);
    }
}

#[test]
fn repeated_head_has_a_body_of_its_own() {
    let server = Server::echo("");
    let mut client = server.connect();
    for (stream, bytes) in [(1, ""), (3, "12345"), (5, ""), (7, "123"), (9, "1234")] {
        client.send(&request_with(stream, ("GET", "/"), &[("user-agent", "a")]));
        client.send(&Frame::new(DATA, END_STREAM, stream).with(bytes));
        let frames = client.response(stream);
        assert_eq!((status(&frames), body(&frames)), (200, format!("{} bytes", bytes.len()).into_bytes()));
        let received = server.origin.last();
        assert_eq!((&*received.body, received.all("user-agent").len()), (bytes.as_bytes(), 1), "stream {stream}");
    }
}

/// A head that was read twice, of which the first stream had no caller and no route: it depends on
/// itself, or is reset before it is known whether the request has a body.
#[test]
fn repeated_head_does_not_get_the_route_of_another_one() {
    let closed = "[[routes]]\nname = \"closed\"\nmatch = { path = \"/closed\" }\nrespond = { status = 403 }\n";
    let server = Server::echo(closed);
    let head = |stream, path| request_with(stream, ("GET", path), &[("user-agent", "a")]);
    let end = |stream| Frame::new(DATA, END_STREAM, stream);
    let dependent = || {
        let mut head = head(3, "/closed");
        head.flags |= 0x20;
        head.payload = [&3_u32.to_be_bytes()[..], &[7], &head.payload].concat();
        vec![head]
    };
    let reset = || vec![head(3, "/closed"), Frame::new(RST_STREAM, 0, 3).with(CANCEL.to_be_bytes())];
    for refused in [dependent(), reset()] {
        let mut client = server.connect();
        client.send_bytes(&[head(1, "/").bytes(), end(1).bytes()].concat());
        assert_eq!(status(&client.response(1)), 200);
        refused.iter().for_each(|frame| client.send(frame));
        assert!(client.is_alive());
        client.send_bytes(&[head(5, "/closed").bytes(), end(5).bytes()].concat());
        assert_eq!(status(&client.response(5)), 403);
        client.send_bytes(&[head(7, "/closed").bytes(), end(7).bytes()].concat());
        assert_eq!(status(&client.response(7)), 403);
    }
}

#[test]
fn uploads_are_forwarded_with_and_without_a_length() {
    let server = Server::echo("");
    let mut client = server.connect();
    for (stream, fields) in [(1, &[("content-length", "9")][..]), (3, &[])] {
        for method in ["POST", "GET"] {
            let stream = stream + if method == "GET" { 4 } else { 0 };
            client.send(&request_with(stream, (method, "/"), fields));
            client.send(&Frame::new(DATA, 0, stream).with("12345"));
            client.send(&Frame::new(DATA, END_STREAM, stream).with("6789"));
            let frames = client.response(stream);
            assert_eq!((status(&frames), &*body(&frames)), (200, &b"9 bytes"[..]));
        }
        client = server.connect();
    }
}

#[test]
fn large_upload_moves_the_windows() {
    let server = Server::echo("");
    let output = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "head -c 3000000 /dev/zero | curl -sk --http2 --max-time 20 -T - https://{}/up",
            server.gateway.address
        ))
        .output();
    assert_eq!(output.expect("curl runs").stdout, b"3000000 bytes");
}

#[test]
fn continue_is_sent_when_the_body_is_wanted() {
    let server = Server::echo("");
    let mut client = server.connect();
    client.send(&request_with(1, ("POST", "/"), &[("content-length", "4"), ("expect", "100-continue")]));
    assert_eq!(client.expect(HEADERS).status(), 100);
    client.send(&Frame::new(DATA, END_STREAM, 1).with("body"));
    let frames = client.response(1);
    assert_eq!((status(&frames), &*body(&frames)), (200, &b"4 bytes"[..]));
    // A client that does not wait gets none.
    let head = request_with(3, ("POST", "/"), &[("content-length", "4"), ("expect", "100-continue")]);
    client.send_bytes(&[head.bytes(), Frame::new(DATA, END_STREAM, 3).with("body").bytes()].concat());
    assert_eq!(status(&client.response(3)), 200);
}

#[test]
fn interim_responses_of_the_origin_arrive() {
    let origin = Origin::start(|_| {
        Script::new()
            .send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
            .send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    });
    let server = Server::start(origin, "", "");
    let mut client = server.connect();
    client.send(&get(1, "/"));
    let frames = client.response(1);
    let statuses: Vec<_> = frames.iter().filter(|frame| frame.kind == HEADERS).map(Frame::status).collect();
    assert_eq!((&*statuses, &*body(&frames)), (&[103, 200][..], &b"ok"[..]));
}

#[test]
fn trailers_pass_in_both_directions() {
    let origin = Origin::start(|_| {
        Script::new().send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 17\r\n\r\n")
    });
    let server = Server::start(origin, "", "");
    let mut client = server.connect();
    client.send(&request_with(1, ("POST", "/"), &[("te", "trailers")]));
    client.send(&Frame::new(DATA, 0, 1).with("body"));
    client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 1).with(head_block(&[("x-check", "42")])));
    let frames = client.response(1);
    let last = frames.last().expect("frames");
    assert_eq!((status(&frames), last.kind, last.flags & END_STREAM), (200, HEADERS, END_STREAM));
    let raw = String::from_utf8_lossy(&server.origin.last().raw).to_lowercase();
    assert!(raw.ends_with("4\r\nbody\r\n0\r\nx-check: 42\r\n\r\n"), "{raw}");
    // Without the declaration of the client there are none.
    client.send(&get(3, "/"));
    let frames = client.response(3);
    assert_eq!(frames.iter().filter(|frame| frame.kind == HEADERS).count(), 1);
}

#[test]
fn early_response_arrives_before_the_stream_is_reset() {
    let server = Server::echo("[limits_http]\nbody_bytes = \"1000B\"\n");
    let mut client = server.connect();
    client.send(&request_with(1, ("POST", "/"), &[("content-length", "100000")]));
    let frames = client.response(1);
    assert_eq!((status(&frames), frames.last().map(|frame| frame.kind)), (413, Some(DATA)));
    // The client may continue for a while.
    client.send(&Frame::new(DATA, 0, 1).with([0; 10_000]));
    assert!(client.is_alive());
    let reset = client.expect(RST_STREAM);
    assert_eq!((reset.stream, reset.code()), (1, 0));
    client.send(&get(3, "/"));
    assert_eq!(status(&client.response(3)), 200);
    // curl, which takes a reset in the same flight for an error.
    let url = format!("https://{}/", server.gateway.address);
    let upload =
        format!("head -c 300000 /dev/zero | curl -svk --http2 --max-time 20 -o /dev/null -w %{{http_code}} -T - {url}");
    let output = Command::new("sh").arg("-c").arg(upload).output().expect("curl runs");
    assert_eq!(
        (String::from_utf8_lossy(&output.stdout), output.status.success()),
        ("413".into(), true),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn cookies_are_joined_before_fields_are_counted() {
    let server = Server::echo("");
    let mut client = server.connect();
    let crumbs: Vec<_> = (0..120).map(|number| format!("c{number}=1")).collect();
    let fields: Vec<_> = crumbs.iter().map(|crumb| ("cookie", crumb.as_str())).collect();
    let mut head = request_with(1, ("GET", "/"), &fields);
    head.flags |= END_STREAM;
    client.send(&head);
    assert_eq!(status(&client.response(1)), 200);
    assert_eq!(server.origin.last().field("cookie"), Some(&*crumbs.join("; ")));
    let names: Vec<_> = (0..120).map(|number| format!("x-{number}")).collect();
    let fields: Vec<_> = names.iter().map(|name| (name.as_str(), "1")).collect();
    let mut head = request_with(3, ("GET", "/"), &fields);
    head.flags |= END_STREAM;
    client.send(&head);
    assert_eq!(status(&client.response(3)), 431);
}

#[test]
fn stream_that_nobody_reads_ends_and_the_connection_lives() {
    let large = vec![b'x'; 100_000];
    let origin = Origin::start(move |request| match &*request.target {
        "/small" => Script::ok(&[], ""),
        _ => Script::ok(&[("Cache-Control", "no-store")], &large),
    });
    let server = Server::start(origin, "", "[limits_http]\nidle_timeout = \"1s\"\n");
    let mut client = FrameClient::connect(&server.gateway, &server.trusted, 0);
    let begin = Instant::now();
    for number in 0..20 {
        client.send(&get(1 + 2 * number, "/large"));
    }
    for _ in 0..20 {
        let reset = client.expect(RST_STREAM);
        assert_eq!(reset.code(), CANCEL);
    }
    assert!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
    assert!(client.is_alive());
    wait_for(|| server.gateway.metric("tidegate_requests_in_flight") == 0.0, STEP_TIMEOUT);
    assert_eq!(server.gateway.metric("tidegate_timeouts_total{clock=\"client_read\"}"), 20.0);
    client.send(&get(41, "/small"));
    assert_eq!(status(&client.response(41)), 200);
}

#[test]
fn client_that_opens_its_window_slowly_gets_the_whole_body() {
    let origin = Origin::start(|_| Script::ok(&[], [b'x'; 500]));
    let server = Server::start(origin, "", "[limits_http]\nidle_timeout = \"1s\"\nbody_rate = \"0B\"\n");
    let mut client = FrameClient::connect(&server.gateway, &server.trusted, 100);
    client.send(&get(1, "/"));
    let mut received = 0;
    loop {
        let frame = client.expect(DATA);
        received += frame.payload.len();
        if frame.ends_stream() {
            break;
        }
        if received % 100 == 0 {
            std::thread::sleep(Duration::from_millis(400));
            client.send(&Frame::new(WINDOW_UPDATE, 0, 1).with(100_u32.to_be_bytes()));
        }
    }
    assert_eq!(received, 500);
}

#[test]
fn stalled_request_body_ends_with_408_and_the_connection_lives() {
    let server = Server::echo("[limits_http]\nidle_timeout = \"500ms\"\n");
    let mut client = server.connect();
    client.send(&request_with(1, ("POST", "/"), &[("content-length", "10")]));
    client.send(&Frame::new(DATA, 0, 1).with("12345"));
    assert_eq!(status(&client.response(1)), 408);
    assert!(client.is_alive());
}

/// One response after the other gets the window of the connection, which the client opens slowly.
#[test]
fn response_that_waits_for_others_is_not_late() {
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", "1048576")]).fill(1 << 20));
    let server = Server::start(origin, "", "[limits_http]\nidle_timeout = \"1s\"\n");
    let mut client = FrameClient::connect(&server.gateway, &server.trusted, 0x7fff_ffff);
    for stream in [1, 3, 5] {
        client.send(&get(stream, "/"));
    }
    for _ in 0..30 {
        client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(2_000_u32.to_be_bytes()));
        while let Some(frame) = client.next_within(Duration::from_millis(100)) {
            assert_ne!(frame.kind, RST_STREAM, "stream {}", frame.stream);
        }
    }
    // Without further windows, all are late.
    let resets: Vec<u32> = (0..3).map(|_| client.expect(RST_STREAM).code()).collect();
    assert_eq!(resets, [CANCEL; 3]);
}

#[test]
fn slow_request_body_is_below_the_minimum_rate() {
    let server = Server::echo("[limits_http]\nidle_timeout = \"1s\"\nbody_rate = \"1000B\"\n");
    let mut client = server.connect();
    client.send(&request(1, "POST", "/"));
    let begin = Instant::now();
    let frames = loop {
        assert!(begin.elapsed() < STEP_TIMEOUT, "one byte in 200 ms is accepted");
        client.send(&Frame::new(DATA, 0, 1).with("x"));
        if let Some(frame) = client.next_within(Duration::from_millis(200)).filter(|frame| frame.kind == HEADERS) {
            break [frame];
        }
    };
    assert_eq!(status(&frames), 408);
}

#[test]
fn silent_connections_are_closed() {
    let server = Server::echo("[limits_http]\nheader_timeout = \"500ms\"\nidle_timeout = \"1s\"\n");
    // No preface, and a part of it.
    for bytes in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
        let mut client = FrameClient::connect_silent(&server.gateway, &server.trusted);
        client.send_bytes(bytes);
        assert!(client.closed_within(Duration::from_secs(5)).is_some(), "{bytes:?}");
    }
    // A head that does not end.
    let mut client = server.connect();
    let mut head = request(1, "GET", "/");
    head.flags = END_STREAM;
    client.send(&head);
    assert_eq!(client.closed_within(Duration::from_secs(5)), Some(Some(ENHANCE_YOUR_CALM)));
    // No request.
    let mut client = server.connect();
    assert_eq!(client.closed_within(Duration::from_secs(8)), Some(Some(0)));
}

#[test]
fn floods_end_the_connection() {
    let server = Server::echo("");
    let floods = [
        Frame::new(PING, 0, 0).with([0; 8]),
        Frame::new(PING, ACK, 0).with([0; 8]),
        Frame::new(SETTINGS, 0, 0),
        Frame::new(PRIORITY, 0, 1).with([0, 0, 0, 0, 7]),
        Frame::new(WINDOW_UPDATE, 0, 0).with(1_u32.to_be_bytes()),
        Frame::new(0xfe, 0, 0),
        Frame::new(GOAWAY, 0, 0).with([0; 8]),
    ];
    for flood in floods {
        let mut client = server.connect();
        client.expect(SETTINGS);
        client.send_bytes(&flood.bytes().repeat(200));
        assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)), "{flood:?}");
    }
    // Heads that are refused, each of a stream of its own.
    let refused = [
        |stream| request_with(stream, ("GET", "/"), &[("Upper", "a")]),
        |stream| request_with(stream, ("GET", "/"), &[("expect", "other")]),
        |stream| Frame::new(HEADERS, END_HEADERS | END_STREAM, stream),
    ];
    for (number, head) in refused.into_iter().enumerate() {
        let mut client = server.connect();
        for at in 0..200 {
            client.send_bytes(&head(1 + 2 * at).bytes());
        }
        assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)), "head {number}");
    }
    // Floods inside a request.
    let mut client = server.connect();
    let flood = Frame::new(DATA, 0, 1).bytes().repeat(200);
    client.send_bytes(&[request(1, "POST", "/").bytes(), flood].concat());
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
    let mut client = server.connect();
    let flood = Frame::new(CONTINUATION, 0, 1).bytes().repeat(200);
    client.send_bytes(&[Frame::new(HEADERS, END_STREAM, 1).bytes(), flood].concat());
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
    // The floods inside a request may be found by `h2` first.
    let floods = server.gateway.metric("tidegate_http2_floods_total{frames=\"control\"}");
    assert!(floods >= 6.0, "{floods}");
    assert_eq!(server.origin.count(), 0);
}

#[test]
fn resets_of_accepted_streams_are_counted() {
    let gate = Gate::default();
    let origin = {
        let gate = gate.clone();
        Origin::start(move |_| Script::new().wait(&gate))
    };
    let server = Server::start(origin, "", "");
    let mut client = server.connect();
    let mut count = 0;
    for number in 0..400 {
        let stream = 1 + 2 * number;
        client.send(&get(stream, "/"));
        // The gateway has accepted the request when it answers a PING.
        if number % 20 == 0 && !client.is_alive() {
            break;
        }
        client.send(&Frame::new(RST_STREAM, 0, stream).with(CANCEL.to_be_bytes()));
        count = number;
    }
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)), "after {count}");
    assert!(server.origin.count() <= 200, "{}", server.origin.count());
    gate.open();
    wait_for(|| server.gateway.metric("tidegate_requests_in_flight") == 0.0, STEP_TIMEOUT);
}

#[test]
fn resets_that_the_gateway_is_made_to_send_are_counted() {
    let server = Server::echo("");
    let mut client = server.connect();
    for number in 0..200 {
        let stream = 1 + 2 * number;
        // A window that overflows is an error of the stream.
        client.send_bytes(
            &[
                request(stream, "POST", "/").bytes(),
                Frame::new(WINDOW_UPDATE, 0, stream).with(0x7fff_ffff_u32.to_be_bytes()).bytes(),
            ]
            .concat(),
        );
    }
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
}

#[test]
fn drain_finishes_streams_and_tells_the_client() {
    let gate = Gate::default();
    let origin = {
        let gate = gate.clone();
        Origin::start(move |_| Script::new().wait(&gate).send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    };
    let mut server = Server::start(origin, "", "");
    let mut client = server.connect();
    client.send(&get(1, "/"));
    wait_for(|| server.origin.count() == 1, STEP_TIMEOUT);
    server.gateway.process.signal("TERM");
    let goaway = client.expect(GOAWAY);
    assert_eq!(goaway.code(), 0);
    gate.open();
    // `h2` sends the second GOAWAY when its PING is acknowledged.
    let mut frames = Vec::new();
    while let Some(frame) = client.next_within(STEP_TIMEOUT) {
        if frame.kind == PING && frame.flags & ACK == 0 {
            client.send(&Frame::new(PING, ACK, 0).with(&frame.payload));
        }
        frames.push(frame);
    }
    assert_eq!((status(&frames), &*body(&frames)), (200, &b"ok"[..]));
    assert!(server.gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
}

/// The requests of one client, by their end.
#[derive(Default)]
struct Outcomes {
    answered: usize,
    /// Above the last stream of the last GOAWAY: the client may send them again.
    repeatable: usize,
    lost: Vec<String>,
}

/// Sends requests over one connection after the other, several at once, as long as there are
/// connections.
fn request_until_refused(address: std::net::SocketAddr, trusted: &CertificateDer<'static>) -> Outcomes {
    let mut outcomes = Outcomes::default();
    let start = Instant::now();
    while start.elapsed() < STEP_TIMEOUT {
        let Ok(mut client) = FrameClient::try_connect_silent(address, trusted) else { break };
        client.send_preface(WINDOW);
        let mut open = std::collections::BTreeMap::new();
        let (mut next, mut may_open, mut last_stream) = (1, true, u32::MAX);
        loop {
            while may_open && open.len() < 4 && next < 400 {
                client.send(&get(next, &format!("/{next}")));
                open.insert(next, 0);
                next += 2;
            }
            if open.is_empty() {
                break;
            }
            let Some(frame) = client.next_within(STEP_TIMEOUT) else { break };
            match frame.kind {
                GOAWAY => {
                    assert_eq!(frame.code(), 0);
                    (may_open, last_stream) =
                        (false, u32::from_be_bytes(frame.payload[..4].try_into().expect("four bytes")));
                }
                PING if frame.flags & ACK == 0 => client.send(&Frame::new(PING, ACK, 0).with(&frame.payload)),
                HEADERS => drop(open.insert(frame.stream, frame.status())),
                _ => {}
            }
            if frame.ends_stream() && open.remove(&frame.stream) == Some(200) {
                outcomes.answered += 1;
            }
        }
        for (stream, status) in open {
            match stream > last_stream {
                true => outcomes.repeatable += 1,
                false => outcomes.lost.push(format!("{stream} of {last_stream}: {status}")),
            }
        }
    }
    outcomes
}

#[test]
fn no_request_is_lost_while_connections_drain() {
    let origin = Origin::start(|request| {
        let script = Script::new().pause(Duration::from_millis(if request.number % 3 == 0 { 20 } else { 0 }));
        script.send("HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: 2\r\n\r\nok")
    });
    let mut server = Server::start(origin, "", "[server]\ndrain_idle = \"1s\"\n");
    let (address, trusted) = (server.gateway.address, server.trusted.clone());
    let all: Vec<Outcomes> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(|| request_until_refused(address, &trusted))).collect();
        server.origin.wait_for_requests(200);
        server.gateway.process.signal("TERM");
        clients.into_iter().map(|client| client.join().expect("no panic")).collect()
    });
    let lost: Vec<_> = all.iter().flat_map(|outcomes| &outcomes.lost).collect();
    let answered: usize = all.iter().map(|outcomes| outcomes.answered).sum();
    let repeatable: usize = all.iter().map(|outcomes| outcomes.repeatable).sum();
    eprintln!("{answered} answered, {repeatable} to be sent again");
    assert!(lost.is_empty(), "{answered} answered, {repeatable} repeatable, lost {lost:?}");
    assert!(answered >= 190, "{answered}");
    assert!(server.gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
}

#[test]
fn connection_whose_handshake_has_not_begun_does_not_delay_the_end() {
    let rest = "[server]\ndrain_idle = \"0s\"\ndrain_timeout = \"60s\"\n[limits_http]\nheader_timeout = \"50s\"\n";
    let mut server = Server::start(Origin::start(|_| Script::ok(&[], "")), "", rest);
    let _silent = TcpStream::connect_timeout(&server.gateway.address, STEP_TIMEOUT).expect("a connection");
    wait_for(|| server.gateway.metric("tidegate_connections") == 1.0, STEP_TIMEOUT);
    server.gateway.process.signal("TERM");
    assert!(server.gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
}

#[test]
fn client_that_opens_streams_after_the_first_goaway_is_answered() {
    let mut server = Server::echo("");
    let mut client = server.connect();
    client.send(&get(1, "/"));
    assert_eq!(status(&client.response(1)), 200);
    server.gateway.process.signal("TERM");
    let first = client.expect(GOAWAY);
    assert_eq!((first.code(), &first.payload[..4]), (0, &[0x7f, 0xff, 0xff, 0xff][..]));
    // On its way when the gateway said so.
    client.send(&get(3, "/"));
    assert_eq!(status(&client.response(3)), 200);
    // The client knows now: what it sends after that is not processed, and it is told so.
    let ping = Frame::new(PING, ACK, 0).with(b"draining");
    client.send_bytes(&[ping.bytes(), get(5, "/").bytes()].concat());
    let last = client.expect(GOAWAY);
    let last_stream = u32::from_be_bytes(last.payload[..4].try_into().expect("four bytes"));
    let frames: Vec<Frame> = std::iter::from_fn(|| client.next_within(STEP_TIMEOUT)).collect();
    let is_answered = frames.iter().any(|frame| frame.stream == 5);
    assert_eq!(is_answered, last_stream >= 5, "{last_stream} {frames:?}");
    assert!(server.gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
}

/// curl of Debian 12 takes a reset in the flight of the response for an error.
#[test]
fn curl_reads_the_whole_early_response_to_an_upload() {
    let limits = "[limits_http]\nbody_bytes = \"20MiB\"\n[limits.none]\ntier = \"node\"\nrate = \"1/h\"\nburst = 1\n";
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let open = "[[routes]]\nname = \"open\"\nmatch = { path = \"/open\" }\nupstream = \"origin\"\n";
    let server = Server::start(origin, "limits = [\"none\"]", &format!("{open}{limits}"));
    let upload_to = |path: &str, bytes: usize, length: &str| {
        let url = format!("https://{}{path}", server.gateway.address);
        let command = format!(
            "head -c {bytes} /dev/zero | curl -svk --http2 --max-time 20 {length} -w '\\n%{{http_code}}' -T - {url}"
        );
        let output = Command::new("sh").arg("-c").arg(command).output().expect("curl runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').expect("a status");
        assert!(output.status.success(), "{bytes} {status} {}", String::from_utf8_lossy(&output.stderr));
        (status.to_owned(), body.to_owned())
    };
    let upload = |bytes: usize, length: &str| upload_to("/", bytes, length);
    assert_eq!(upload(1_000, "").0, "200");
    for bytes in [1_000, 300_000, 5_000_000] {
        for length in ["", &format!("-H 'Content-Length: {bytes}'")] {
            let (status, body) = upload(bytes, length);
            assert_eq!(status, "429", "{bytes}");
            assert!(body.ends_with("\"reason\":\"limited\"}\n") || body.ends_with("\"reason\":\"limited\"}"), "{body}");
        }
    }
    let (status, body) = upload_to("/open", 10, "-H 'Content-Length: 30000000'");
    assert!(status == "413" && body.contains("body_too_large"), "{status} {body}");
}

#[test]
fn streams_beyond_the_memory_of_the_process_are_refused() {
    let gate = Gate::default();
    let origin = {
        let gate = gate.clone();
        Origin::start(move |_| Script::new().wait(&gate).send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    };
    // Eight reservations of 128 KiB: ten streams each.
    let server = Server::start(origin, "", "[limits_http]\nhttp2_memory = \"1MiB\"\n");
    let mut client = server.connect();
    for number in 0..120 {
        client.send(&get(1 + 2 * number, &format!("/{number}")));
    }
    let refused = client.expect(RST_STREAM);
    assert_eq!(refused.code(), REFUSED_STREAM);
    assert!(client.is_alive());
    assert!(server.gateway.metric("tidegate_http2_reserved_bytes") <= f64::from(1 << 20));
    let mut second = server.connect();
    second.send(&get(1, "/other"));
    assert_eq!(second.expect(RST_STREAM).code(), REFUSED_STREAM);
    gate.open();
    assert_eq!(status(&client.response(1)), 200);
    wait_for(|| server.gateway.metric("tidegate_requests_in_flight") == 0.0, STEP_TIMEOUT);
    wait_for(|| server.gateway.metric("tidegate_http2_reserved_bytes") == 0.0, STEP_TIMEOUT);
    second.send(&get(3, "/other"));
    assert_eq!(status(&second.response(3)), 200);
}

#[test]
fn address_at_its_share_leaves_memory_to_others() {
    let gate = Gate::default();
    let origin = {
        let gate = gate.clone();
        Origin::start(move |_| Script::new().wait(&gate).send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    };
    let server = Server::start(origin, "", "[limits_http]\nhttp2_memory_per_ip = \"1MiB\"\n");
    let mut clients = [server.connect(), server.connect()];
    for (index, client) in clients.iter_mut().enumerate() {
        for number in 0..60 {
            client.send(&get(1 + 2 * number, &format!("/{index}/{number}")));
        }
    }
    assert!(clients.iter_mut().all(FrameClient::is_alive));
    // Another address of the loopback network.
    let from = |address: [u8; 4]| FrameClient::connect_from(address.into(), &server.gateway, &server.trusted);
    let mut other = from([127, 0, 0, 7]);
    for number in 0..60 {
        other.send(&get(1 + 2 * number, &format!("/other/{number}")));
    }
    assert!(other.is_alive());
    let refused =
        |memory| server.gateway.metric(&format!("tidegate_http2_streams_refused_total{{memory=\"{memory}\"}}"));
    assert!(refused("address") > 0.0 && refused("process") == 0.0 && refused("connection") == 0.0);
    gate.open();
    let mut ended = 0;
    while ended < 60 {
        let frame = other.next_within(STEP_TIMEOUT).expect("a frame");
        assert_ne!(frame.kind, RST_STREAM);
        ended += usize::from(frame.ends_stream());
    }
    let events = server.gateway.process.stderr.events("http2_stream_refused");
    assert!(events.iter().any(|event| event["client"] == "127.0.0.1" && event["memory"] == "address"), "{events:?}");
}

#[test]
fn references_to_one_long_field_cost_little_and_are_refused() {
    let server = Server::echo("");
    let mut client = server.connect();
    // Inserted into the table once, then referred to by one byte each.
    let mut block = head_block(&[(":method", "GET"), (":scheme", "https"), (":path", "/")]);
    block.extend([0x41, 0x7f, 0xa1, 0x1e]);
    block.extend([b'a'; 4000]);
    let first = Frame::new(HEADERS, END_HEADERS | END_STREAM, 1).with(&block);
    client.send(&first);
    assert_eq!(status(&client.response(1)), 200);
    let begin = Instant::now();
    for number in 1..20 {
        let references = vec![0xbe; 16_000];
        client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * number).with(references));
        assert_eq!(status(&client.response(1 + 2 * number)), 431);
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
}

#[test]
fn urgent_responses_are_sent_first_and_incremental_ones_share() {
    let body = vec![b'x'; 200_000];
    let origin = Origin::start(move |_| Script::ok(&[("Cache-Control", "max-age=600")], &body));
    let server = Server::start(origin, "", "");
    let mut client = FrameClient::connect(&server.gateway, &server.trusted, 0x7fff_ffff);
    client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with((200_000 - WINDOW).to_be_bytes()));
    client.send(&get(1, "/page"));
    assert_eq!(body_length(&client.response(1)), 200_000);
    // The window of the connection is closed while the requests arrive. The latest update applies.
    let update = |stream: u32, priority: &str| {
        Frame::new(PRIORITY_UPDATE, 0, 0).with([&stream.to_be_bytes()[..], priority.as_bytes()].concat())
    };
    client.send(&update(9, "u=7"));
    client.send(&update(9, "u=1"));
    let mut get_with = |stream: u32, priority: &str| {
        let mut head = request_with(stream, ("GET", "/page"), &[("priority", priority)]);
        head.flags |= END_STREAM;
        client.send(&head);
    };
    get_with(3, "u=7");
    get_with(5, "u=5, i");
    get_with(7, "u=5, i");
    get_with(9, "u=6");
    get_with(11, "u=7");
    client.send(&update(11, "u=0"));
    assert!(client.is_alive());
    client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(1_000_000_u32.to_be_bytes()));
    let mut order: Vec<u32> = Vec::new();
    let mut ended: Vec<u32> = Vec::new();
    while ended.len() < 5 {
        let frame = client.expect(DATA);
        order.push(frame.stream);
        if frame.ends_stream() {
            ended.push(frame.stream);
        }
    }
    let ended_without_shares: Vec<u32> = ended.iter().copied().filter(|stream| ![5, 7].contains(stream)).collect();
    assert_eq!((ended_without_shares, ended[4]), (vec![11, 9, 3], 3), "{order:?}");
    let shares: Vec<u32> = order.iter().copied().filter(|stream| [5, 7].contains(stream)).collect();
    let changes = shares.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes >= shares.len() - 3, "{shares:?}");
}

fn body_length(frames: &[Frame]) -> usize {
    body(frames).len()
}

#[test]
fn others_are_served_while_a_client_floods() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=600")], "ok"));
    let server = Server::start(origin, "", "");
    let mut client = server.connect();
    client.send(&get(1, "/"));
    client.response(1);
    let mut times = |count: u32, first: u32| -> Vec<Duration> {
        let mut times: Vec<Duration> = (0..count)
            .map(|number| {
                let begin = Instant::now();
                client.send(&get(first + 2 * number, "/"));
                assert_eq!(status(&client.response(first + 2 * number)), 200);
                begin.elapsed()
            })
            .collect();
        times.sort();
        times
    };
    let quiet = times(100, 3);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        let attacker = {
            let (stop, server) = (std::sync::Arc::clone(&stop), &server);
            scope.spawn(move || {
                let mut ended = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let address = server.gateway.address;
                    // In the end the address is refused.
                    let Ok(mut client) = FrameClient::try_connect_silent(address, &server.trusted) else { continue };
                    client.send_preface(WINDOW);
                    client.send_bytes(&Frame::new(PING, 0, 0).with([0; 8]).bytes().repeat(10_000));
                    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
                    ended += 1;
                }
                ended
            })
        };
        let flooded = times(100, 1_003);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(attacker.join().expect("no panic") > 0);
        let (before, during) = (quiet[98], flooded[98]);
        // The floor is the share of one core that the attacker's own TLS takes in a debug build.
        assert!(during < (before * 2).max(Duration::from_millis(100)), "{before:?}, {during:?}");
    });
}

#[test]
fn address_that_floods_with_every_connection_is_refused() {
    let server = Server::echo("");
    let mut other = server.connect();
    let mut floods = 0;
    let start = Instant::now();
    while let Ok(mut client) = FrameClient::try_connect_silent(server.gateway.address, &server.trusted) {
        assert!(start.elapsed() < STEP_TIMEOUT, "{floods} floods are accepted");
        client.send_preface(WINDOW);
        client.send_bytes(&Frame::new(PING, 0, 0).with([0; 8]).bytes().repeat(200));
        assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
        floods += 1;
    }
    assert_eq!(floods, 20);
    assert!(server.gateway.metric("tidegate_connections_refused_total{reason=\"http2_flood\"}") >= 1.0);
    // A connection that is open is served.
    other.send(&get(1, "/"));
    assert_eq!(status(&other.response(1)), 200);
}

#[test]
fn lists_of_fields_that_are_too_large_end_the_connection() {
    let server = Server::echo("");
    let mut client = server.connect();
    let long = "v".repeat(12_000);
    let head = |stream| {
        let mut head = request_with(stream, ("GET", "/"), &[("x-long", &long)]);
        head.flags &= !END_HEADERS;
        let rest = Frame::new(CONTINUATION, END_HEADERS, stream).with(head_block(&[("x-longer", &long)]));
        head.flags |= END_STREAM;
        [head.bytes(), rest.bytes()].concat()
    };
    client.send_bytes(&head(1));
    assert_eq!(status(&client.response(1)), 431);
    let sent: Vec<u8> = (1..200).flat_map(|number| head(1 + 2 * number)).collect();
    client.send_bytes(&sent);
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
    assert_eq!(server.origin.count(), 0);
}

/// The head of a response that can be sent at once needs no memory that unread downloads take.
#[test]
fn large_head_is_sent_beside_downloads_that_wait() {
    let policy = "x".repeat(3_000);
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/head" => Script::ok(&[("Cache-Control", "no-store"), ("Content-Security-Policy", &policy)], ""),
        _ => Script::ok(&[("Cache-Control", "no-store")], vec![b'x'; 1 << 20]),
    });
    let server = Server::start(origin, "", "");
    let mut client = server.connect();
    client.send(&get(1, "/large"));
    client.send(&get(3, "/large"));
    // The window of the connection is used up.
    let mut received = 0;
    while received < 65_535 {
        received += client.expect(DATA).payload.len();
    }
    for stream in [5, 7, 9] {
        client.send(&get(stream, "/head"));
        assert_eq!(status(&client.response(stream)), 200);
    }
}
