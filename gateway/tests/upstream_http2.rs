//! HTTP/2 to upstreams: heads, bodies and trailers, shared connections, refused and lost streams,
//! flow control, TLS with ALPN, and nginx as an origin.

mod support;

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use rustls::ServerConfig;

use support::frames::{DATA, END_HEADERS, END_STREAM, Frame, FrameClient, GOAWAY, HEADERS, PING, SETTINGS, head_block};
use support::h2_origin::{H2Origin, H2OriginOptions, H2Stream};
use support::tls::{LISTEN_TLS, write_certificate};
use support::tls_origin::Authority;
use support::{Gateway, Process, STEP_TIMEOUT, TempDir, free_address, wait_for};

fn config(origin: &str, upstream: &str, route: &str) -> String {
    format!(
        "version = 1\n[server]\nworkers = 1\n[upstreams.shop]\nendpoints = [{origin}]\nbreaker = {{ minimum = 1000 }}\n\
         {upstream}\n[[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\n\
         cache = {{ mode = \"off\" }}\n{route}\n[log]\naccess = \"stdout\"\n"
    )
}

fn h2c(address: SocketAddr) -> String {
    format!("\"h2c://{address}\"")
}

/// Responds with method, path and the length of the body.
async fn echo(mut stream: H2Stream) {
    let line = format!("{} {}", stream.request.method(), stream.request.uri().path());
    if let Some(body) = stream.body().await {
        let is_head = stream.request.method() == http::Method::HEAD;
        stream.reply(200, if is_head { String::new() } else { format!("{line} {}", body.len()) });
    }
}

fn echo_origin() -> H2Origin {
    H2Origin::start(H2OriginOptions::default(), echo)
}

#[test]
fn requests_share_one_connection() {
    let origin = echo_origin();
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut client = gateway.connect();
    for (method, length) in [("GET", 0), ("POST", 3), ("PUT", 300_000), ("DELETE", 0), ("PATCH", 1)] {
        let response = client.request(method, "/a?b=c", &[("x-a", "1")], &vec![b'x'; length]);
        assert_eq!((response.status, response.text()), (200, format!("{method} /a {length}")));
    }
    let head = client.request("HEAD", "/a", &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.all("via"), ["2.0 tidegate"], "the version of the response");
    let seen = origin.seen();
    assert_eq!((origin.connections(), seen.len()), (1, 6));
    assert_eq!(seen[1].uri, "http://gate.test/a?b=c", "the public authority");
    assert_eq!(seen[1].headers["content-length"], "3");
    let names: Vec<&str> = seen[0].headers.keys().map(http::HeaderName::as_str).collect();
    assert!(names.iter().all(|name| !["host", "connection", "transfer-encoding", "te"].contains(name)), "{names:?}");
    assert!(["x-a", "via", "x-forwarded-for"].iter().all(|name| names.contains(name)), "{names:?}");
}

#[test]
fn concurrent_requests_open_connections_as_the_server_allows_streams() {
    for (max_streams, connections) in [(None, 1), (Some(4), 5)] {
        let waiting = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&waiting);
        let options = H2OriginOptions { max_streams, ..H2OriginOptions::default() };
        let origin = H2Origin::start(options, move |mut stream| {
            let waiting = Arc::clone(&counter);
            async move {
                if stream.request.uri().path() == "/wait" {
                    waiting.fetch_add(1, Ordering::SeqCst);
                    while waiting.load(Ordering::SeqCst) < 20 {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                }
                stream.reply(200, "x");
            }
        });
        let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
        // Its settings are known from the first response on.
        assert_eq!(gateway.get("/", &[]).status, 200);
        let mut clients: Vec<_> = (0..20).map(|_| gateway.connect()).collect();
        clients.iter_mut().for_each(|client| client.send_get("/wait", &[]));
        assert!(clients.iter_mut().all(|client| client.read_response().status == 200));
        assert_eq!(origin.connections(), connections, "{max_streams:?}");
    }
}

/// A server that sends its settings and nothing else, and the frames that it gets.
fn silent_server() -> (SocketAddr, std::thread::JoinHandle<Vec<u8>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound port");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&Frame::new(SETTINGS, 0, 0).bytes()).expect("a live connection");
        let mut received = Vec::new();
        drop(stream.read_to_end(&mut received));
        received
    });
    (address, server)
}

/// Takes 30 s: the time of the PING and that of its acknowledgement.
#[test]
fn connection_to_a_silent_server_is_ended() {
    let (address, server) = silent_server();
    let gateway = Gateway::start(&config(&h2c(address), "timeout = \"120s\"", ""));
    let mut client = gateway.connect();
    client.set_read_timeout(Duration::from_secs(60));
    let start = Instant::now();
    client.send_get("/", &[]);
    wait_for(|| gateway.metric("tidegate_upstream_http2_connections") == 1.0, STEP_TIMEOUT);
    let response = client.read_response();
    let waited = start.elapsed();
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=connection_terminated")));
    assert!(waited >= Duration::from_secs(29) && waited < Duration::from_secs(45), "{waited:?}");
    let ping = [0, 0, 8, PING, 0];
    let received = server.join().expect("the end of the connection");
    assert!(received.windows(ping.len()).any(|window| window == ping), "no PING");
    wait_for(|| gateway.metric("tidegate_upstream_http2_connections") == 0.0, STEP_TIMEOUT);
}

#[test]
fn edits_of_the_route_apply() {
    let origin = echo_origin();
    let edits = "strip_prefix = \"/v1\"\n\
                 headers.request = { set = { host = \"internal\", x-b = \"2\" }, remove = [\"cookie\"] }";
    let gateway = Gateway::start(&config(&h2c(origin.address), "", edits).replace("/*", "/v1/*"));
    assert_eq!(gateway.get("/v1/a", &[("cookie", "c"), ("x-b", "1")]).text(), "GET /a 0");
    let seen = &origin.seen()[0];
    assert_eq!(seen.uri, "http://internal/a");
    assert_eq!((seen.headers.get("cookie"), &seen.headers["x-b"]), (None, &HeaderValue::from_static("2")));
}

#[test]
fn interim_responses_and_trailers_pass() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let hints = Response::builder().status(103).header("link", "</a.css>").body(()).expect("a response");
        stream.respond.send_informational(hints).expect("an open stream");
        let trailers = stream.request.body_mut().trailers().await.ok().flatten().unwrap_or_default();
        let mut body = stream.respond.send_response(Response::new(()), false).expect("an open stream");
        body.send_data(Bytes::from(format!("{:?}", trailers.get("x-sum"))), false).expect("an open stream");
        let trailers: HeaderMap =
            [(http::HeaderName::from_static("x-end"), HeaderValue::from_static("1"))].into_iter().collect();
        body.send_trailers(trailers).expect("an open stream");
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut client = gateway.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 7\r\n\r\n");
    let hints = client.read_head();
    assert_eq!((hints.status, hints.field("link")), (103, Some("</a.css>")));
    let head = client.read_head();
    assert_eq!((head.status, head.field("transfer-encoding")), (200, Some("chunked")));
    let rest = String::from_utf8_lossy(&client.read_bytes(29)).into_owned();
    assert!(rest.contains("Some(\"7\")") && rest.contains("x-end: 1"), "{rest}");
    assert_eq!(origin.seen()[0].headers["te"], "trailers");
    assert_eq!(origin.seen()[0].headers["trailer"], "X-Sum");
    // A body of a known length has no trailers.
    gateway.request("POST", "/", &[("Trailer", "X-Sum")], b"abc");
    assert_eq!(origin.seen()[1].headers.get("trailer"), None);
}

/// A response may announce its length and still have trailers, as those of gRPC servers do.
#[test]
fn trailers_follow_a_body_of_known_length() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let path = stream.request.uri().path().to_owned();
        let bytes = if path == "/empty" { "" } else { "message" };
        let head = Response::builder().header("content-length", bytes.len()).header("cache-control", "max-age=600");
        let head = head.body(()).expect("a response");
        let mut body = stream.respond.send_response(head, false).expect("an open stream");
        if !bytes.is_empty() {
            body.send_data(Bytes::from(bytes), path == "/none").expect("an open stream");
        }
        if path != "/none" {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let status = (http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
            body.send_trailers([status].into_iter().collect()).expect("an open stream");
        }
    });
    // Passed on, and by a shared fetch.
    let text = config(&h2c(origin.address), "", "") + LISTEN_TLS;
    for text in [text.replace("cache = { mode = \"off\" }", ""), text] {
        let dir = TempDir::new();
        let trusted = write_certificate(&dir);
        let gateway = Gateway::start_in(dir, &text);
        let mut client = FrameClient::connect(&gateway, &trusted, 65_535);
        for (stream, path, has_trailers) in [(1, "/some", true), (3, "/empty", true), (5, "/none", false)] {
            let fields = [(":method", "GET"), (":scheme", "https"), (":path", path), (":authority", "gate.test")];
            let fields = [&fields[..], &[("te", "trailers")]].concat();
            client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, stream).with(head_block(&fields)));
            let frames = client.response(stream);
            let data: usize = frames.iter().filter(|frame| frame.kind == DATA).map(|frame| frame.payload.len()).sum();
            assert_eq!(data, if path == "/empty" { 0 } else { 7 }, "{path} {frames:?}");
            let heads = frames.iter().filter(|frame| frame.kind == HEADERS).count();
            assert_eq!(heads, 1 + usize::from(has_trailers), "{path} {frames:?}");
        }
    }
}

#[test]
fn stream_that_the_server_refuses_is_sent_again() {
    let refused = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&refused);
    let origin = H2Origin::start(H2OriginOptions::default(), move |mut stream| {
        let is_refused = counter.fetch_add(1, Ordering::SeqCst) == 1;
        async move {
            if is_refused {
                stream.respond.send_reset(h2::Reason::REFUSED_STREAM);
            } else {
                stream.reply(200, "done");
            }
        }
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let response = gateway.request("POST", "/", &[], b"body");
    assert_eq!((response.status, response.text()), (200, "done".to_owned()), "nothing was processed");
    assert_eq!(refused.load(Ordering::SeqCst), 3);
}

#[test]
fn server_that_refuses_every_stream_gets_six() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        stream.respond.send_reset(h2::Reason::REFUSED_STREAM);
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let response = gateway.request("POST", "/", &[], b"body");
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=connection_terminated")));
    assert_eq!(origin.seen().len(), 6);
}

#[test]
fn draining_server_loses_no_request() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        if stream.request.uri().path() == "/drain" {
            stream.control.drain.notify_one();
            // The stream itself goes on.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        stream.reply(200, "done");
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    for _ in 0..10 {
        let mut draining = gateway.connect();
        draining.send_get("/drain", &[]);
        for _ in 0..10 {
            assert_eq!(gateway.request("POST", "/", &[], b"x").status, 200);
        }
        assert_eq!(draining.read_response().status, 200);
    }
    assert!(origin.connections() >= 10);
    wait_for(|| origin.running() <= 1, STEP_TIMEOUT);
}

#[test]
fn lost_connection_repeats_only_what_is_safe_to_repeat() {
    for (method, body, status, count) in [("POST", &b"x"[..], 503, 1), ("GET", b"", 200, 2), ("PUT", b"x", 200, 2)] {
        let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
            stream.body().await;
            if stream.connection == 0 && stream.request.uri().path() == "/lost" {
                stream.control.abort.notify_one();
                // Dropping it would reset the stream before.
                std::future::pending::<()>().await;
            }
            stream.reply(200, "done");
        });
        let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
        assert_eq!(gateway.get("/", &[]).status, 200);
        assert_eq!(gateway.request(method, "/lost", &[], body).status, status, "{method}");
        assert_eq!(origin.seen().iter().filter(|seen| seen.uri.ends_with("/lost")).count(), count, "{method}");
    }
}

#[test]
fn client_that_leaves_resets_its_stream_alone() {
    let ended = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&ended);
    let origin = H2Origin::start(H2OriginOptions::default(), move |mut stream| {
        let ended = Arc::clone(&counter);
        async move {
            if stream.request.uri().path() == "/" {
                return stream.reply(200, "done");
            }
            let reset = std::future::poll_fn(|cx| stream.respond.poll_reset(cx)).await;
            if reset.is_ok_and(|reason| reason == h2::Reason::CANCEL) {
                ended.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let mut client = gateway.connect();
    client.send_get("/wait", &[]);
    wait_for(|| origin.seen().len() == 2, STEP_TIMEOUT);
    drop(client);
    wait_for(|| ended.load(Ordering::SeqCst) == 1, STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).status, 200);
    assert_eq!(origin.connections(), 1);
}

/// Sends `length` bytes, as far as the client reads.
async fn send_bytes(mut stream: H2Stream, length: usize) {
    let Ok(mut body) = stream.respond.send_response(Response::new(()), false) else { return };
    let mut left = length;
    while left > 0 {
        body.reserve_capacity(left.min(64 << 10));
        let Some(Ok(capacity)) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await else { return };
        let count = capacity.min(left);
        left -= count;
        if body.send_data(Bytes::from(vec![b'x'; count]), left == 0).is_err() {
            return;
        }
    }
}

#[test]
fn client_that_reads_nothing_holds_up_nobody_else() {
    let origin = H2Origin::start(H2OriginOptions::default(), |stream| send_bytes(stream, 8 << 20));
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut silent: Vec<_> = (0..60).map(|_| gateway.connect()).collect();
    silent.iter_mut().for_each(|client| client.send_get("/", &[]));
    wait_for(|| origin.seen().len() == 60, STEP_TIMEOUT);
    let start = Instant::now();
    assert_eq!(gateway.get("/", &[]).body.len(), 8 << 20);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(origin.connections(), 1);
}

const RESERVED: &str = "tidegate_upstream_http2_reserved_bytes";
/// Half of it is that of the responses: one has room, beside the head of another one.
const SMALL_MEMORY: &str = "[limits_http]\nhttp2_memory = \"1MiB\"\n";

/// An origin whose responses do not end, and the windows of their streams at first.
fn endless_origin(options: H2OriginOptions) -> (H2Origin, Arc<Mutex<Vec<usize>>>) {
    let windows = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&windows);
    let origin = H2Origin::start(options, move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut body = stream.respond.send_response(Response::new(()), false).expect("an open stream");
            body.reserve_capacity(1 << 20);
            seen.lock().expect("no panic").push(body.capacity());
            while let Some(Ok(count)) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await {
                if count > 0 && body.send_data(Bytes::from(vec![b'x'; count]), false).is_err() {
                    return;
                }
                body.reserve_capacity(1 << 20);
            }
        }
    });
    (origin, windows)
}

/// Responses reserve the windows of their streams; without room, streams have narrow windows.
#[test]
fn responses_that_nobody_takes_hold_bounded_memory() {
    let (origin, windows) = endless_origin(H2OriginOptions::default());
    let gateway = Gateway::start(&(config(&h2c(origin.address), "", "") + SMALL_MEMORY));
    let mut clients: Vec<_> = (0..20).map(|_| gateway.connect()).collect();
    for client in &mut clients {
        client.send_get("/", &[]);
        assert_eq!(client.read_head().status, 200);
    }
    let reserved = gateway.metric(RESERVED);
    assert!((1.0..=f64::from(512 << 10)).contains(&reserved), "{reserved}");
    let mut windows = windows.lock().expect("no panic").clone();
    windows.sort_unstable();
    assert_eq!(windows.iter().filter(|window| **window == 16 << 10).count(), 19, "{windows:?}");
    assert_eq!(origin.connections(), 2);
    drop(clients);
    wait_for(|| gateway.metric(RESERVED) == 0.0, STEP_TIMEOUT);
    // There is room again.
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    assert_eq!(client.read_head().status, 200);
    assert_eq!((gateway.metric(RESERVED), origin.connections()), (f64::from(256 << 10), 2));
}

/// First requests to a server of which it is not known yet whether its connections can be shared
/// open one each. Only as many get wide windows as have room.
#[test]
fn connections_that_are_opened_at_the_same_time_reserve_bounded_memory() {
    const CLIENTS: usize = 40;
    let authority = Authority::new("ours");
    let options = H2OriginOptions {
        tls: Some(tls_config(&authority, &["h2", "http/1.1"])),
        before_settings: Some(Arc::new(tokio::sync::Barrier::new(CLIENTS))),
        ..H2OriginOptions::default()
    };
    let (origin, windows) = endless_origin(options);
    let dir = TempDir::new();
    authority.write(&dir);
    let keys = "tls = { ca = \"ca.pem\", server_name = \"shop.test\" }";
    let gateway =
        Gateway::start_in(dir, &(config(&format!("\"https://{}\"", origin.address), keys, "") + SMALL_MEMORY));
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(|client| client.send_get("/", &[]));
    for client in &mut clients {
        assert_eq!(client.read_head().status, 200);
    }
    assert_eq!(origin.connections(), CLIENTS);
    let reserved = gateway.metric(RESERVED);
    assert!((1.0..=f64::from(512 << 10)).contains(&reserved), "{reserved}");
    let windows = windows.lock().expect("no panic").clone();
    assert_eq!(windows.iter().filter(|window| **window > 16 << 10).count(), 1, "{windows:?}");
    drop(clients);
    wait_for(|| gateway.metric(RESERVED) == 0.0, STEP_TIMEOUT);
}

#[test]
fn head_and_known_length_reserve_what_they_need() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let head = Response::builder().header("content-length", "1000").body(()).expect("a response");
        let mut body = stream.respond.send_response(head, false).expect("an open stream");
        body.send_data(Bytes::from_static(b"begun"), false).expect("an open stream");
        std::future::pending::<()>().await;
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    assert_eq!(client.read_head().status, 200);
    assert_eq!(gateway.metric(RESERVED), 1_000.0);
}

/// Trailers follow an upload with and without a length.
#[test]
fn trailers_of_an_upload_reach_the_server() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let body = stream.body().await.unwrap_or_default();
        let trailers = stream.request.body_mut().trailers().await.ok().flatten();
        let sum = trailers.as_ref().and_then(|trailers| trailers.get("x-sum")?.to_str().ok()).unwrap_or("none");
        stream.reply(200, format!("{} {sum}", body.len()));
    });
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let gateway = Gateway::start_in(dir, &(config(&h2c(origin.address), "", "") + LISTEN_TLS));
    let mut client = FrameClient::connect(&gateway, &trusted, 65_535);
    for (stream, length, has_trailers) in [(1, None, true), (3, Some("5"), true), (5, Some("5"), false)] {
        let mut fields = vec![(":method", "POST"), (":scheme", "https"), (":path", "/"), (":authority", "gate.test")];
        fields.extend(length.map(|length| ("content-length", length)));
        client.send(&Frame::new(HEADERS, END_HEADERS, stream).with(head_block(&fields)));
        client.send(&Frame::new(DATA, 0, stream).with("hello"));
        if has_trailers {
            client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, stream).with(head_block(&[("x-sum", "7")])));
        } else {
            // The end comes in a frame of its own.
            client.send(&Frame::new(DATA, END_STREAM, stream));
        }
        assert_eq!(client.expect(HEADERS).status(), 200);
        let expected = if has_trailers { "5 7" } else { "5 none" };
        assert_eq!(client.expect(DATA).payload, expected.as_bytes(), "{length:?}");
    }
    assert_eq!(origin.seen()[1].headers["content-length"], "5");
}

#[test]
fn upload_waits_for_the_server_and_has_its_clock() {
    let options = H2OriginOptions { window: Some(1_000), ..H2OriginOptions::default() };
    let origin = H2Origin::start(options, |mut stream| async move {
        if stream.request.uri().path() == "/read" {
            return echo(stream).await;
        }
        // Reads nothing, so that the window stays closed.
        drop(std::future::poll_fn(|cx| stream.respond.poll_reset(cx)).await);
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "idle_timeout = \"800ms\"", ""));
    let body = vec![b'x'; 500_000];
    assert_eq!(gateway.request("POST", "/read", &[], &body).text(), "POST /read 500000");
    let start = Instant::now();
    let response = gateway.request("POST", "/stop", &[], &body[..5_000]);
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=http_response_timeout")));
    assert!(start.elapsed() >= Duration::from_millis(800) && start.elapsed() < Duration::from_secs(4));
    assert_eq!(gateway.metric("tidegate_timeouts_total{clock=\"upstream_send\"}"), 1.0);
}

#[test]
fn head_and_body_have_their_clocks() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let is_body = stream.request.uri().path() == "/body";
        let mut body = is_body.then(|| stream.respond.send_response(Response::new(()), false).expect("an open stream"));
        if let Some(body) = &mut body {
            body.send_data(Bytes::from_static(b"begun"), false).expect("an open stream");
        }
        std::future::pending::<()>().await;
    });
    let keys = "timeout = \"300ms\"\nidle_timeout = \"300ms\"\neject = { after = 0 }";
    let gateway = Gateway::start(&config(&h2c(origin.address), keys, ""));
    assert_eq!(gateway.get("/head", &[]).status, 503);
    let mut client = gateway.connect();
    client.send_get("/body", &[]);
    assert_eq!(client.read_head().status, 200);
    assert_eq!(client.read_to_end(), b"5\r\nbegun\r\n", "an incomplete message");
    for clock in ["upstream_head", "upstream_body"] {
        assert_eq!(gateway.metric(&format!("tidegate_timeouts_total{{clock=\"{clock}\"}}")), 1.0, "{clock}");
    }
    assert_eq!(origin.connections(), 1, "the connection outlives its exchanges");
}

#[test]
fn responses_are_cached_and_shared() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let head = Response::builder().header("cache-control", "max-age=60").body(()).expect("a response");
        let mut body = stream.respond.send_response(head, false).expect("an open stream");
        for _ in 0..10 {
            body.send_data(Bytes::from(vec![b'x'; 10_000]), false).expect("an open stream");
        }
        body.send_data(Bytes::new(), true).expect("an open stream");
    });
    let text = config(&h2c(origin.address), "", "").replace("\"off\"", "\"standard\"");
    let gateway = Gateway::start(&text);
    let mut clients: Vec<_> = (0..5).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(|client| client.send_get("/", &[]));
    assert!(clients.iter_mut().all(|client| client.read_response().body.len() == 100_000));
    let hit = gateway.get("/", &[]);
    assert!(hit.is_hit() && hit.body.len() == 100_000);
    assert_eq!(origin.seen().len(), 1);
}

#[test]
fn malformed_responses_are_refused() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound port");
    std::thread::spawn(move || {
        // A server that speaks HTTP/1.1 alone.
        for mut stream in listener.incoming().map_while(Result::ok) {
            drop(std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"));
            drop(std::io::copy(&mut stream, &mut std::io::sink()));
        }
    });
    let gateway = Gateway::start(&config(&h2c(address), "", ""));
    let response = gateway.get("/", &[]);
    assert_eq!((response.status, response.field("proxy-status")), (502, Some("tidegate; error=http_protocol_error")));
}

/// A server of HTTP/2 that sends `settings` at the beginning of each connection, and answers each
/// request with the frames that `respond` has for its stream.
fn frame_origin(settings: Vec<u8>, respond: impl Fn(u32) -> Vec<u8> + Send + Sync + 'static) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound port");
    let respond = Arc::new(respond);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let (settings, respond) = (settings.clone(), Arc::clone(&respond));
            std::thread::spawn(move || -> std::io::Result<()> {
                stream.write_all(&settings)?;
                stream.read_exact(&mut [0; 24])?;
                loop {
                    let mut head = [0; 9];
                    stream.read_exact(&mut head)?;
                    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                    stream.read_exact(&mut vec![0; length as usize])?;
                    let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                    match head[3] {
                        SETTINGS if head[4] == 0 => stream.write_all(&Frame::new(SETTINGS, 1, 0).bytes())?,
                        HEADERS => stream.write_all(&respond(id))?,
                        _ => {}
                    }
                }
            });
        }
    });
    address
}

fn head_frame(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    Frame::new(HEADERS, END_HEADERS | flags, stream).with(head_block(fields)).bytes()
}

/// RFC 9113 sections 8.2 and 8.3.
#[test]
fn response_heads_with_fields_that_http2_does_not_have_are_malformed() {
    const HEADS: [&[(&str, &str)]; 11] = [
        &[("x-a", "1")],
        &[(":status", "200"), (":status", "200")],
        &[(":status", "200"), (":status", "404")],
        &[("x-a", "1"), (":status", "200")],
        &[(":status", "200"), ("X-A", "1")],
        &[(":status", "200"), ("connection", "close")],
        &[(":status", "200"), ("keep-alive", "timeout=5")],
        &[(":status", "200"), ("transfer-encoding", "chunked")],
        &[(":status", "200"), ("upgrade", "websocket")],
        &[(":status", "200"), ("te", "trailers")],
        &[(":status", "200"), ("te", "gzip")],
    ];
    for head in HEADS {
        let address = frame_origin(Frame::new(SETTINGS, 0, 0).bytes(), |id| head_frame(id, END_STREAM, head));
        let gateway = Gateway::start(&config(&h2c(address), "", ""));
        let response = gateway.get("/", &[]);
        let status = response.field("proxy-status");
        assert_eq!((response.status, status), (502, Some("tidegate; error=http_protocol_error")), "{head:?}");
    }
}

/// The library drops them: no client gets them.
#[test]
fn pseudo_fields_of_requests_are_in_no_response() {
    let address = frame_origin(Frame::new(SETTINGS, 0, 0).bytes(), |id| {
        let head = [(":status", "200"), (":path", "/x"), (":authority", "other.test"), ("x-a", "1")];
        let trailers = [(":status", "404"), (":path", "/x"), ("x-b", "2")];
        let body = Frame::new(DATA, 0, id).with("ok").bytes();
        [head_frame(id, 0, &head), body, head_frame(id, END_STREAM, &trailers)].concat()
    });
    let gateway = Gateway::start(&config(&h2c(address), "", ""));
    let mut client = gateway.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE, close\r\n\r\n");
    let response = String::from_utf8_lossy(&client.read_to_end()).into_owned();
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("x-a: 1") && response.contains("x-b: 2"));
    assert!(!response.contains("/x") && !response.contains("other.test") && !response.contains("404"), "{response}");
}

/// Connecting worked: the failure is not that of an endpoint where nothing listens.
#[test]
fn server_that_allows_no_exchange_has_ended_the_connection() {
    let no_streams = Frame::new(SETTINGS, 0, 0).with([0, 3, 0, 0, 0, 0]).bytes();
    let goaway = [Frame::new(SETTINGS, 0, 0).bytes(), Frame::new(GOAWAY, 0, 0).with([0; 8]).bytes()].concat();
    for settings in [no_streams, goaway] {
        let address = frame_origin(settings, |_| Vec::new());
        let gateway = Gateway::start(&config(&h2c(address), "timeout = \"2s\"", ""));
        let response = gateway.request("POST", "/", &[], b"x");
        let status = response.field("proxy-status").map(str::to_owned);
        assert_eq!((response.status, status.as_deref()), (503, Some("tidegate; error=connection_terminated")));
        assert_eq!(gateway.process.stderr.event("upstream_failed")["kind"], "no_response");
    }
}

#[test]
fn interim_responses_pass_in_any_number() {
    const COUNT: usize = 60;
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        for _ in 0..COUNT {
            let progress = Response::builder().status(102).body(()).expect("a response");
            stream.respond.send_informational(progress).expect("an open stream");
        }
        stream.reply(200, "done");
    });
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    let passed = (0..COUNT).filter(|_| client.read_head().status == 102).count();
    assert_eq!((passed, client.read_response().status), (COUNT, 200));
}

#[test]
fn dead_endpoint_costs_no_request() {
    let (origin, dead) = (echo_origin(), free_address());
    let endpoints = format!("\"h2c://{dead}\", \"h2c://{}\"", origin.address);
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"", ""));
    assert!((0..20).all(|_| gateway.request("POST", "/", &[], b"x").status == 200));
}

fn tls_config(authority: &Authority, alpn: &[&str]) -> Arc<ServerConfig> {
    let signed = authority.sign("shop.test", |_| {});
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let (chain, key) = signed.into_parts();
    let mut config =
        builder.expect("versions").with_no_client_auth().with_single_cert(chain, key).expect("a certificate");
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

#[test]
fn tls_uses_http2_where_the_server_selects_it() {
    let authority = Authority::new("ours");
    let options = H2OriginOptions { tls: Some(tls_config(&authority, &["h2"])), ..H2OriginOptions::default() };
    let origin = H2Origin::start(options, echo);
    let start = |alpn: &str| {
        let dir = TempDir::new();
        authority.write(&dir);
        let tls = format!("tls = {{ ca = \"ca.pem\", server_name = \"shop.test\"{alpn} }}");
        Gateway::start_in(dir, &config(&format!("\"https://{}\"", origin.address), &tls, ""))
    };
    for alpn in ["", ", alpn = [\"h2\"]", ", alpn = [\"http/1.1\", \"h2\"]"] {
        let gateway = start(alpn);
        let mut client = gateway.connect();
        assert!((0..5).all(|_| client.request("POST", "/a", &[], b"abc").text() == "POST /a 3"), "{alpn}");
        assert!(origin.seen().last().is_some_and(|seen| seen.uri.starts_with("https://")));
    }
    assert_eq!(origin.connections(), 3);
    assert_eq!(start(", alpn = [\"http/1.1\"]").get("/", &[]).status, 502, "no common protocol");
}

/// nginx with HTTP/2 over TLS.
#[test]
fn nginx_serves_over_http2() {
    if Command::new("nginx").arg("-v").output().is_err() {
        // It is not installed; the other tests of this file do not need it.
        return;
    }
    let (authority, dir, address) = (Authority::new("ours"), TempDir::new(), free_address());
    let server = authority.sign("shop.test", |_| {});
    authority.write(&dir);
    dir.write("server.pem", &server.pem);
    dir.write("server.key", &server.key_pem);
    dir.write("large", &"x".repeat(3_000_000));
    let path = dir.path().display();
    let nginx = format!(
        "daemon off;\nmaster_process off;\npid {path}/nginx.pid;\nerror_log {path}/error.log;\n\
         events {{}}\nhttp {{\naccess_log off;\nclient_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
         fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\nscgi_temp_path {path}/scgi;\n\
         server {{\nlisten {address} ssl http2;\nkeepalive_requests 20;\nssl_certificate {path}/server.pem;\n\
         ssl_certificate_key {path}/server.key;\nroot {path};\n\
         location = /large {{ }}\n\
         location / {{ return 200 \"$server_protocol $request_method $uri $http_x_a\"; }}\n}}\n}}\n"
    );
    let file = dir.write("nginx.conf", &nginx);
    let _nginx = Process::start(Command::new("nginx").arg("-c").arg(&file).arg("-p").arg(dir.path()));
    wait_for(|| std::net::TcpStream::connect(address).is_ok(), STEP_TIMEOUT);
    let tls = "tls = { ca = \"ca.pem\", server_name = \"shop.test\" }";
    let gateway = Gateway::start_in(dir, &config(&format!("\"https://{address}\""), tls, ""));
    let mut connection = gateway.connect();
    // nginx ends each connection after 20 requests with GOAWAY.
    for round in 0..15 {
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS"] {
            let response = connection.request(method, "/a", &[("x-a", "1")], b"");
            assert_eq!((response.status, response.text()), (200, format!("HTTP/2.0 {method} /a 1")), "{round}");
        }
    }
    assert_eq!(connection.get("/large", &[]).body.len(), 3_000_000);
    let part = connection.get("/large", &[("range", "bytes=10-19")]);
    assert_eq!((part.status, part.body.len()), (206, 10));
}

/// Accepts a WebSocket over HTTP/2 and returns its bytes.
async fn echo_tunnel(mut stream: H2Stream) {
    if stream.request.method() != http::Method::CONNECT {
        return echo(stream).await;
    }
    let head = Response::builder().header("sec-websocket-protocol", "chat").body(()).expect("a response");
    let mut body = stream.respond.send_response(head, false).expect("an open stream");
    while let Some(Ok(data)) = stream.request.body_mut().data().await {
        drop(stream.request.body_mut().flow_control().release_capacity(data.len()));
        body.reserve_capacity(data.len());
        drop(body.send_data(data, false));
    }
    drop(body.send_data(Bytes::from_static(b"bye"), true));
}

const HANDSHAKE: &str = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

#[test]
fn websocket_is_an_extended_connect_where_the_server_accepts_it() {
    let options = H2OriginOptions { connect_protocol: true, ..H2OriginOptions::default() };
    let origin = H2Origin::start(options, echo_tunnel);
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut client = gateway.connect();
    client.send(HANDSHAKE);
    let head = client.read_head();
    assert_eq!((head.status, head.field("upgrade")), (101, Some("websocket")));
    assert_eq!(head.field("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(head.field("sec-websocket-protocol"), Some("chat"));
    let seen = &origin.seen()[0];
    assert_eq!((seen.method.as_str(), seen.headers.get("sec-websocket-key")), ("CONNECT", None));
    assert_eq!(seen.headers["sec-websocket-version"], "13");
    for message in [&b"hello"[..], &[b'x'; 100_000]] {
        client.send(message);
        assert_eq!(client.read_bytes(message.len()), message);
    }
    // Other requests use the connection meanwhile.
    assert_eq!(gateway.get("/a", &[]).text(), "GET /a 0");
    client.finish();
    assert_eq!(client.read_to_end(), b"bye");
    assert_eq!(origin.connections(), 1);
}

#[test]
fn websocket_of_an_http2_client_passes_to_an_http2_server() {
    let options = H2OriginOptions { connect_protocol: true, ..H2OriginOptions::default() };
    let origin = H2Origin::start(options, echo_tunnel);
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let text = config(&h2c(origin.address), "", "") + LISTEN_TLS;
    let gateway = Gateway::start_in(dir, &text);
    let mut client = FrameClient::connect(&gateway, &trusted, 65_535);
    let fields = [
        (":method", "CONNECT"),
        (":protocol", "websocket"),
        (":scheme", "https"),
        (":path", "/chat"),
        (":authority", "gate.test"),
        ("sec-websocket-version", "13"),
    ];
    client.send(&Frame::new(HEADERS, END_HEADERS, 1).with(head_block(&fields)));
    assert_eq!(client.expect(HEADERS).status(), 200);
    client.send(&Frame::new(DATA, 0, 1).with("hello"));
    assert_eq!(client.expect(DATA).payload, b"hello");
    client.send(&Frame::new(DATA, END_STREAM, 1));
    let bye = client.expect(DATA);
    assert_eq!(bye.payload, b"bye");
    assert_eq!(origin.seen()[0].method, "CONNECT");
}

#[test]
fn server_without_extended_connect_gets_the_request_without_the_offer() {
    let origin = echo_origin();
    let gateway = Gateway::start(&config(&h2c(origin.address), "", ""));
    let mut client = gateway.connect();
    client.send(HANDSHAKE);
    assert_eq!(client.read_response().text(), "GET /chat 0");
    assert_eq!(origin.seen()[0].headers.get("upgrade"), None);
}

#[test]
fn websocket_over_tls_gets_a_connection_of_http1() {
    let authority = Authority::new("ours");
    let tls = tls_config(&authority, &["h2", "http/1.1"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound port");
    let server = std::thread::spawn(move || {
        let (tcp, _) = listener.accept().expect("a connection");
        let connection = rustls::ServerConnection::new(tls).expect("a connection");
        let mut stream = rustls::StreamOwned::new(connection, tcp);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a request");
            head.push(byte[0]);
        }
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nhello")
            .expect("a live connection");
        stream.flush().expect("a live connection");
        stream.conn.alpn_protocol().map(<[u8]>::to_vec)
    });
    let dir = TempDir::new();
    authority.write(&dir);
    let keys = "tls = { ca = \"ca.pem\", server_name = \"shop.test\" }";
    let gateway = Gateway::start_in(dir, &config(&format!("\"https://{address}\""), keys, ""));
    let mut client = gateway.connect();
    client.send(HANDSHAKE);
    assert_eq!(client.read_head().status, 101);
    assert_eq!(client.read_bytes(5), b"hello");
    assert_eq!(server.join().expect("a server"), Some(b"http/1.1".to_vec()));
}

#[test]
fn health_checks_speak_http2() {
    let is_sick = Arc::new(AtomicUsize::new(0));
    let flag = Arc::clone(&is_sick);
    let origin = H2Origin::start(H2OriginOptions::default(), move |mut stream| {
        let status = if flag.load(Ordering::SeqCst) == 0 { 200 } else { 500 };
        async move { stream.reply(status, "") }
    });
    let health = "health = { path = \"/healthz\", interval = \"100ms\", unhealthy = 1, healthy = 1 }";
    let gateway = Gateway::start(&config(&h2c(origin.address), health, ""));
    wait_for(|| origin.seen().len() >= 3, STEP_TIMEOUT);
    assert!(gateway.process.stderr.events("endpoint_down").is_empty());
    assert!(origin.seen()[0].uri.ends_with("/healthz"));
    is_sick.store(1, Ordering::SeqCst);
    wait_for(|| !gateway.process.stderr.events("endpoint_down").is_empty(), STEP_TIMEOUT);
    // Each check has a connection of its own, which ends with it.
    wait_for(|| origin.running() <= 2, STEP_TIMEOUT);
}
