//! WebSocket over HTTP/2: extended CONNECT (RFC 8441) to an origin that speaks HTTP/1.1.

mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use support::frames::{
    CANCEL, DATA, END_HEADERS, END_STREAM, Frame, FrameClient, HEADERS, RST_STREAM, SETTINGS, WINDOW, WINDOW_UPDATE,
    body, head_block, status,
};
use support::tls::{LISTEN_TLS, write_certificate};
use support::{Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

/// The answer to a `Sec-WebSocket-Key` (RFC 6455 section 4.2.2).
fn accept(key: &str) -> String {
    let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
    base64::engine::general_purpose::STANDARD.encode(hash)
}

/// An origin that switches to a protocol in which every byte comes back, and reports each head and
/// how its connections ended.
struct EchoOrigin {
    address: SocketAddr,
    heads: mpsc::Receiver<Vec<String>>,
    /// Bytes that arrived on a connection, and whether it ended in order.
    ends: mpsc::Receiver<(usize, bool)>,
}

impl EchoOrigin {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let ((send_head, heads), (send_end, ends)) = (mpsc::channel(), mpsc::channel());
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (send_head, send_end) = (send_head.clone(), send_end.clone());
                std::thread::spawn(move || {
                    let _ended_test = send_end.send(echo(stream, &send_head));
                });
            }
        });
        EchoOrigin { address, heads, ends }
    }

    fn head(&self) -> Vec<String> {
        self.heads.recv_timeout(STEP_TIMEOUT).expect("a head")
    }

    fn end(&self) -> (usize, bool) {
        self.ends.recv_timeout(STEP_TIMEOUT).expect("an end")
    }
}

fn echo(mut stream: TcpStream, heads: &mpsc::Sender<Vec<String>>) -> (usize, bool) {
    stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(0) | Err(_) => return (0, false),
            Ok(2) => break,
            Ok(_) => head.push(line.trim_end().to_owned()),
        }
    }
    let key = head.iter().find_map(|line| line.strip_prefix("sec-websocket-key: ")).unwrap_or_default();
    let answer = accept(key);
    let head_of_response = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\
         Sec-WebSocket-Accept: {answer}\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
    );
    drop(heads.send(head));
    if stream.write_all(head_of_response.as_bytes()).is_err() {
        return (0, false);
    }
    let (mut space, mut received) = ([0; 8192], 0);
    loop {
        match reader.read(&mut space) {
            Ok(0) => return (received, true),
            Ok(count) => {
                received += count;
                if stream.write_all(&space[..count]).is_err() {
                    return (received, false);
                }
            }
            Err(_) => return (received, false),
        }
    }
}

struct TunnelServer {
    gateway: Gateway,
    trusted: rustls::pki_types::CertificateDer<'static>,
}

impl TunnelServer {
    fn start(origin: SocketAddr, route: &str, rest: &str) -> Self {
        let dir = TempDir::new();
        let trusted = write_certificate(&dir);
        let gateway = Gateway::start_in(dir, &one_route(origin, route, &format!("{rest}\n{LISTEN_TLS}")));
        TunnelServer { gateway, trusted }
    }

    fn connect(&self) -> FrameClient {
        FrameClient::connect(&self.gateway, &self.trusted, WINDOW)
    }
}

/// An extended CONNECT for WebSocket.
fn connect(stream: u32, fields: &[(&str, &str)]) -> Frame {
    let mut all = vec![
        (":method", "CONNECT"),
        (":protocol", "websocket"),
        (":scheme", "https"),
        (":path", "/chat?room=1"),
        (":authority", "gate.test"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-protocol", "chat"),
    ];
    all.extend_from_slice(fields);
    Frame::new(HEADERS, END_HEADERS, stream).with(head_block(&all))
}

#[test]
fn tunnel_relays_in_both_directions_until_both_sides_end() {
    let origin = EchoOrigin::start();
    let log = "[log]\naccess = \"stdout\"\n";
    let server = TunnelServer::start(origin.address, "", log);
    let mut client = server.connect();
    let settings = client.expect(SETTINGS);
    assert!(settings.payload.chunks(6).any(|setting| setting == [0, 8, 0, 0, 0, 1]), "{settings:?}");
    let increment = client.expect(WINDOW_UPDATE).code();
    // `te` is a field of the connection; the key of the client means nothing.
    client.send(&connect(1, &[("te", "trailers"), ("sec-websocket-key", "mine")]));
    let head = client.expect(HEADERS);
    assert_eq!((head.stream, head.status(), head.flags & END_STREAM), (1, 200, 0));
    let text = String::from_utf8_lossy(&head.payload).to_lowercase();
    assert!(text.contains("sec-websocket-protocol") && text.contains("chat"), "{text}");
    for of_http1 in ["sec-websocket-accept", "upgrade", "connection"] {
        assert!(!text.contains(of_http1), "{of_http1}");
    }
    let received = origin.head();
    assert_eq!(received[0], "GET /chat?room=1 HTTP/1.1");
    let has = |line: &str| received.iter().any(|other| other.eq_ignore_ascii_case(line));
    assert!(has("connection: upgrade") && has("upgrade: websocket") && has("host: gate.test"), "{received:?}");
    assert!(has("sec-websocket-version: 13") && has("x-forwarded-proto: https"), "{received:?}");
    let keys: Vec<_> = received.iter().filter(|line| line.starts_with("sec-websocket-key")).collect();
    assert!(keys.len() == 1 && !keys[0].contains("mine"), "{received:?}");
    assert!(!received.iter().any(|line| line.starts_with("te:") || line.starts_with("content-length")));
    // More than every window, in both directions at once.
    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_be_bytes).take(600_000).collect();
    // The windows that the gateway has granted.
    let mut window = i64::from(initial_window(&settings));
    let mut connection_window = i64::from(WINDOW) + i64::from(increment);
    let (mut at, mut echoed) = (0, Vec::new());
    client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(1_000_000_u32.to_be_bytes()));
    let start = Instant::now();
    while echoed.len() < sent.len() {
        assert!(start.elapsed() < STEP_TIMEOUT, "{} of {} echoed, {at} sent", echoed.len(), sent.len());
        let count = (sent.len() - at).min(10_000).min(usize::try_from(window.min(connection_window)).unwrap_or(0));
        if count > 0 {
            client.send(&Frame::new(DATA, 0, 1).with(&sent[at..at + count]));
            at += count;
            window -= count as i64;
            connection_window -= count as i64;
        }
        let wait = if count > 0 { Duration::from_millis(1) } else { STEP_TIMEOUT };
        let Some(frame) = client.next_within(wait) else { continue };
        match (frame.kind, frame.stream) {
            (DATA, 1) => {
                echoed.extend_from_slice(&frame.payload);
                let increment = u32::try_from(frame.payload.len()).expect("short").to_be_bytes();
                client.send(&Frame::new(WINDOW_UPDATE, 0, 1).with(increment));
            }
            (WINDOW_UPDATE, 0) => connection_window += i64::from(frame.code()),
            (WINDOW_UPDATE, 1) => window += i64::from(frame.code()),
            (RST_STREAM, _) => panic!("{frame:?}"),
            _ => {}
        }
    }
    assert!(echoed == sent);
    assert_eq!(server.gateway.metric("tidegate_requests_in_flight"), 0.0);
    client.send(&Frame::new(DATA, END_STREAM, 1));
    let frames = client.response(1);
    assert_eq!(frames.last().map(|frame| (frame.kind, frame.flags & END_STREAM)), Some((DATA, END_STREAM)));
    assert_eq!(origin.end(), (sent.len(), true));
    assert_eq!(server.gateway.metric("tidegate_upgrades_total"), 1.0);
    let line = &server.gateway.access_log(1)[0];
    assert_eq!((&line["status"], &line["bytes"]), (&200.into(), &sent.len().into()), "{line}");
    assert!(client.is_alive());
}

fn initial_window(settings: &Frame) -> u32 {
    let setting = settings.payload.chunks(6).find(|setting| setting[..2] == [0, 4]);
    setting.map_or(WINDOW, |setting| u32::from_be_bytes(setting[2..].try_into().expect("four bytes")))
}

#[test]
fn connects_that_cannot_be_forwarded_have_a_status() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let server = TunnelServer::start(origin.address, "", "");
    let target = [(":scheme", "https"), (":path", "/"), (":authority", "gate.test")];
    let of = |method, protocol: Option<&'static str>, rest: &[(&'static str, &'static str)]| {
        let mut fields = vec![(":method", method)];
        fields.extend(protocol.map(|protocol| (":protocol", protocol)));
        fields.extend_from_slice(rest);
        head_block(&fields)
    };
    let with = |field| [&target[..], &[field]].concat();
    for (expected, is_malformed, block) in [
        // Unknown protocols (RFC 9220 section 3 says how), and none.
        (501, false, of("CONNECT", Some("connect-udp"), &target)),
        (501, false, of("CONNECT", Some(""), &target)),
        (405, false, of("CONNECT", None, &[(":authority", "gate.test:443")])),
        (400, true, of("CONNECT", None, &target)),
        (400, true, of("GET", Some("websocket"), &target)),
        (400, true, of("CONNECT", Some("websocket"), &[(":authority", "gate.test:443")])),
        (400, true, of("CONNECT", Some("websocket"), &target[..1])),
        (400, true, of("CONNECT", Some("websocket"), &with(("content-length", "5")))),
        (400, true, of("CONNECT", Some("websocket"), &with(("upgrade", "websocket")))),
        (400, true, of("CONNECT", Some("websocket"), &with((":protocol", "websocket")))),
        (400, false, of("CONNECT", Some("websocket"), &with(("host", "other.test")))),
    ] {
        let mut client = server.connect();
        client.send(&Frame::new(HEADERS, END_HEADERS, 1).with(&block));
        assert_eq!(client.expect(HEADERS).status(), expected, "{}", String::from_utf8_lossy(&block));
        if is_malformed {
            assert_eq!(client.expect(RST_STREAM).code(), 1, "{}", String::from_utf8_lossy(&block));
        }
    }
    assert_eq!(origin.count(), 0);
    assert_eq!(server.gateway.metric("tidegate_requests_refused_total{reason=\"protocol\"}"), 2.0);
}

#[test]
fn response_that_is_no_tunnel_is_not_taken_for_one() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n";
    let origin = Origin::start(move |request| match &*request.target {
        "/refused" => Script::reply(403, &[], "members only"),
        "/page" => Script::ok(&[], "a page"),
        "/no-answer" => Script::new().send(format!("{switch}\r\n")),
        "/wrong" => Script::new().send(format!("{switch}Sec-WebSocket-Accept: {}\r\n\r\n", accept("other"))),
        _ => Script::new().send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"),
    });
    let rest =
        "[[routes]]\nname = \"fixed\"\nmatch = { path = \"/fixed\" }\nrespond = { status = 200, body = \"a page\" }\n";
    let server = TunnelServer::start(origin.address, "", rest);
    for (path, expected, page) in [
        ("/refused", 403, "members only"),
        ("/page", 502, "not_switched"),
        ("/fixed", 502, "not_switched"),
        ("/no-answer", 502, "malformed"),
        ("/wrong", 502, "malformed"),
        ("/other", 502, "malformed"),
    ] {
        let mut client = server.connect();
        let fields = [
            (":method", "CONNECT"),
            (":protocol", "WebSocket"),
            (":scheme", "https"),
            (":path", path),
            (":authority", "gate.test"),
        ];
        client.send(&Frame::new(HEADERS, END_HEADERS, 1).with(head_block(&fields)));
        let frames = client.response(1);
        let text = String::from_utf8_lossy(&body(&frames)).into_owned();
        assert!(status(&frames) == expected && text.contains(page), "{path}: {} {text}", status(&frames));
        assert!(client.is_alive());
    }
    assert_eq!(server.gateway.metric("tidegate_upgrades_total"), 0.0);
    assert_eq!(server.gateway.metric("tidegate_failures_total{kind=\"not_switched\"}"), 2.0);
}

#[test]
fn reset_of_one_side_ends_the_other() {
    let origin = EchoOrigin::start();
    let server = TunnelServer::start(origin.address, "", "");
    let mut client = server.connect();
    client.send(&connect(1, &[]));
    assert_eq!(client.expect(HEADERS).status(), 200);
    client.send(&Frame::new(DATA, 0, 1).with("hello"));
    assert_eq!(client.expect(DATA).payload, b"hello");
    client.send(&Frame::new(RST_STREAM, 0, 1).with(CANCEL.to_be_bytes()));
    assert_eq!(origin.end().0, 5);
    assert!(client.is_alive());
    // The origin's side: a connection that is reset by its system.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = TunnelServer::start(address, "", "");
    let mut client = server.connect();
    client.send(&connect(1, &[]));
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut key = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).expect("a head") <= 2 {
            break;
        }
        if let Some(found) = line.strip_prefix("sec-websocket-key: ") {
            key = found.trim_end().to_owned();
        }
    }
    let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
    let head = format!("{head}Sec-WebSocket-Accept: {}\r\n\r\n", accept(&key));
    stream.write_all(head.as_bytes()).expect("a live socket");
    assert_eq!(client.expect(HEADERS).status(), 200);
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).expect("a live socket");
    drop((reader, stream));
    let reset = client.expect(RST_STREAM);
    assert_eq!((reset.stream, reset.code()), (1, CANCEL));
    assert!(client.is_alive());
}

#[test]
fn idle_tunnels_end_and_do_not_live_on_other_streams() {
    let origin = EchoOrigin::start();
    let server = TunnelServer::start(origin.address, "", "[limits_http]\nidle_timeout = \"700ms\"\n");
    let mut client = server.connect();
    client.send(&connect(1, &[]));
    assert_eq!(client.expect(HEADERS).status(), 200);
    client.send(&connect(3, &[]));
    assert_eq!(client.expect(HEADERS).stream, 3);
    let start = Instant::now();
    // The second tunnel is in use.
    let reset = loop {
        assert!(start.elapsed() < STEP_TIMEOUT, "an idle tunnel is not closed");
        client.send(&Frame::new(DATA, 0, 3).with("x"));
        if let Some(frame) = client.next_within(Duration::from_millis(50)).filter(|frame| frame.kind == RST_STREAM) {
            break frame;
        }
    };
    assert_eq!((reset.stream, reset.code()), (1, CANCEL));
    assert!(start.elapsed() >= Duration::from_millis(650), "{:?}", start.elapsed());
    assert_eq!(origin.end(), (0, true));
}

#[test]
fn limits_count_tunnels_as_over_http1() {
    let origin = EchoOrigin::start();
    let limit = "[limits.few]\ntier = \"node\"\nrate = \"1/h\"\nburst = 2\n";
    let server = TunnelServer::start(origin.address, "limits = [\"few\"]", limit);
    let mut http1 = support::tls::connect(server.gateway.address, &server.trusted);
    http1.send(
        "GET / HTTP/1.1\r\nHost: gate.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    );
    assert_eq!(http1.read_head().status, 101);
    let mut client = server.connect();
    client.send(&connect(1, &[]));
    assert_eq!(client.expect(HEADERS).status(), 200);
    client.send(&connect(3, &[]));
    assert_eq!(client.expect(HEADERS).status(), 429);
    wait_for(|| server.gateway.metric("tidegate_upgrades_total") == 2.0, STEP_TIMEOUT);
    // The end of the connection ends its tunnels.
    origin.head();
    origin.head();
    drop(client);
    drop(http1);
    assert_eq!([origin.end().0, origin.end().0], [0, 0]);
}

#[test]
fn tunnel_whose_client_has_ended_at_once_is_open_in_one_direction() {
    let origin = EchoOrigin::start();
    let server = TunnelServer::start(origin.address, "", "");
    let mut client = server.connect();
    let mut head = connect(1, &[]);
    head.flags |= END_STREAM;
    client.send(&head);
    let frames = client.response(1);
    assert_eq!((status(&frames), &*body(&frames)), (200, &b""[..]));
    assert_eq!(origin.end(), (0, true));
    assert!(client.is_alive());
}
