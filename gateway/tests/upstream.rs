//! Upstreams that are unreachable, slow, broken or large, and the fields that are forwarded in both
//! directions.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::client::{chunked, read_chunk};
use support::{BodyEnd, Client, Gate, Gateway, Origin, STEP_TIMEOUT, Script, free_address, one_route, wait_for};

/// A configuration with an upstream of several endpoints and further keys.
fn upstream(endpoints: &[SocketAddr], keys: &str) -> String {
    let list: Vec<String> = endpoints.iter().map(|endpoint| format!("\"http://{endpoint}\"")).collect();
    format!(
        "[server]\nworkers = 1\n[upstreams.origin]\nendpoints = [{}]\n{keys}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"origin\"\n",
        list.join(", ")
    )
}

fn plain(origin: &Origin) -> Gateway {
    Gateway::start(&upstream(&[origin.address], ""))
}

fn echo(request: &support::ReceivedRequest) -> Script {
    Script::ok(&[], format!("{} {}", request.method, request.target))
}

// Failures.

#[test]
fn unreachable_origin_gets_the_error_page_at_once() {
    let gateway = Gateway::start(&upstream(&[free_address()], ""));
    let start = Instant::now();
    for (method, body) in [("GET", ""), ("POST", "abc")] {
        let response = gateway.request(method, "/", &[], body.as_bytes());
        assert_eq!((response.status, response.field("cache-control")), (503, Some("no-store")));
        assert!(response.field("retry-after").is_some_and(|wait| wait.parse::<u32>().is_ok_and(|wait| wait > 0)));
        assert_eq!(response.field("proxy-status"), Some("tidegate; error=connection_refused"));
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn error_page_has_the_configured_status() {
    let config = one_route(free_address(), "degrade = { status = 502, retry_after = \"2s\" }", "");
    assert_eq!(Gateway::start(&config).get("/", &[]).status, 502);
}

#[test]
fn connect_timeout_limits_connection_attempts() {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
    socket.listen(0).expect("a listening socket");
    let address = socket.local_addr().ok().and_then(|address| address.as_socket()).expect("a bound port");
    // These fill the backlog. The system then ignores further connection attempts.
    let connect = |_| TcpStream::connect_timeout(&address, Duration::from_millis(50));
    let _held: Vec<_> = (0..4).map(connect).collect();
    let gateway = Gateway::start(&upstream(&[address], "connect_timeout = \"200ms\""));
    let start = Instant::now();
    let response = gateway.get("/", &[]);
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=connection_timeout")));
    assert!((Duration::from_millis(150)..Duration::from_secs(2)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[test]
fn timeout_limits_a_hanging_origin() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/head" => Script::new().send("HTTP/1.1 200 OK\r\nX-A: ").hang(),
        _ => Script::new().hang(),
    });
    let gateway = Gateway::start(&upstream(&[origin.address], "timeout = \"300ms\""));
    for target in ["/silent", "/head"] {
        let start = Instant::now();
        let response = gateway.get(target, &[]);
        assert_eq!(
            (response.status, response.field("proxy-status")),
            (503, Some("tidegate; error=http_response_timeout"))
        );
        assert!(
            (Duration::from_millis(250)..Duration::from_secs(2)).contains(&start.elapsed()),
            "{:?}",
            start.elapsed()
        );
    }
    wait_for(|| origin.ends().len() == 2, STEP_TIMEOUT);
}

#[test]
fn stalled_body_is_aborted_at_the_idle_timeout() {
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", "10")]).send("part").hang());
    let gateway = Gateway::start(&upstream(&[origin.address], "idle_timeout = \"300ms\""));
    let start = Instant::now();
    let response = gateway.get("/", &[]);
    assert_eq!((response.status, response.text(), response.end), (200, "part".into(), BodyEnd::Truncated));
    assert!((Duration::from_millis(250)..Duration::from_secs(2)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[test]
fn malformed_response_fails_only_its_own_request() {
    const GARBAGE: &[(&str, &str)] = &[
        ("no HTTP", "hello, world\r\n\r\n"),
        ("another protocol", "\x16\x03\x01\x02\r\n\r\n"),
        ("bad status", "HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nok"),
        ("status of two digits", "HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok"),
        ("status of four digits", "HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok"),
        ("status below 100", "HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok"),
        ("another version", "HTTP/3.0 200 OK\r\nContent-Length: 2\r\n\r\nok"),
        (
            "length and coding",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
        ("two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
        ("bad length", "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"),
        ("unknown coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        ("NUL in a value", "HTTP/1.1 200 OK\r\nX-A: a\0b\r\nContent-Length: 2\r\n\r\nok"),
        ("blank before a colon", "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok"),
        ("no colon", "HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 2\r\n\r\nok"),
        ("bare CR in a value", "HTTP/1.1 200 OK\r\nX-A: a\rSet-Cookie: b\r\nContent-Length: 2\r\n\r\nok"),
        ("unasked switch", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    ];
    let origin = Origin::start(|request| {
        let found = GARBAGE.iter().enumerate().find(|(at, _)| request.target == format!("/{at}"));
        found.map_or_else(|| echo(request), |(_, (_, bytes))| Script::new().send(bytes).close())
    });
    // The default breaker would open after so many failures.
    let gateway = Gateway::start(&upstream(&[origin.address], "breaker = { minimum = 1000 }"));
    let mut wrong = Vec::new();
    for (at, (name, _)) in GARBAGE.iter().enumerate() {
        let response = gateway.get(&format!("/{at}"), &[]);
        if response.status != 502 || response.field("set-cookie").is_some() {
            wrong.push(format!("{name}: {} {:?} {:?}", response.status, response.fields, response.text()));
        }
        assert_eq!(gateway.get("/fine", &[]).text(), "GET /fine", "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn response_head_size_is_limited() {
    let field = format!("X-A: {}\r\n", "x".repeat(1_000));
    let origin = Origin::start(move |_| Script::new().send("HTTP/1.1 200 OK\r\n").send(field.repeat(2_000)).hang());
    assert_eq!(plain(&origin).get("/", &[]).status, 502);
}

const UNSOLICITED: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";

#[test]
fn bytes_after_a_response_are_discarded() {
    let one = format!("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none{UNSOLICITED}");
    let origin = Origin::start(move |request| match request.number {
        0 => Script::new().send(&one),
        _ => Script::ok(&[], "two"),
    });
    let gateway = plain(&origin);
    assert_eq!(gateway.get("/", &[]).text(), "one");
    assert_eq!(gateway.get("/", &[]).text(), "two");
}

/// Bytes that arrive after a complete response and before the next request are not a response to
/// it. The test plays the origin itself, so that the order is certain.
#[test]
fn bytes_between_two_requests_are_discarded() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let gateway = Gateway::start(&upstream(&[listener.local_addr().expect("its address")], ""));
    let respond = |stream: &mut TcpStream, body: &str| {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a head");
            head.push(byte[0]);
        }
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).expect("a response");
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| gateway.get("/", &[]));
        let (mut stream, _) = listener.accept().expect("a connection");
        respond(&mut stream, "one");
        assert_eq!(first.join().expect("a response").text(), "one");
        stream.write_all(UNSOLICITED.as_bytes()).expect("an unsolicited response");
        let second = scope.spawn(|| gateway.get("/", &[]));
        listener.set_nonblocking(true).expect("a non-blocking listener");
        let mut another = None;
        wait_for(
            || {
                another = listener.accept().ok().map(|(stream, _)| stream);
                second.is_finished() || another.is_some()
            },
            STEP_TIMEOUT,
        );
        if let Some(mut another) = another {
            another.set_nonblocking(false).expect("a stream to wait for");
            respond(&mut another, "two");
        }
        assert_eq!(second.join().expect("a response").text(), "two");
    });
}

// Load balancing and connections.

#[test]
fn failed_connect_is_retried_on_the_other_endpoint() {
    let origin = Origin::start(echo);
    for endpoints in [[free_address(), origin.address], [origin.address, free_address()]] {
        let gateway = Gateway::start(&upstream(&endpoints, "balance = \"round-robin\""));
        for method in ["GET", "POST", "GET", "POST"] {
            assert_eq!(gateway.request(method, "/", &[], b"").status, 200, "{method}");
        }
    }
}

#[test]
fn least_request_selects_the_endpoint_with_fewer_in_flight() {
    let gate = Gate::default();
    let script = |gate: Gate, name: &'static str| {
        move |request: &support::ReceivedRequest| match request.target.as_str() {
            "/long" => Script::new().wait(&gate).head(200, &[("Content-Length", "1")]).send(name),
            _ => Script::ok(&[], name),
        }
    };
    let (a, b) = (Origin::start(script(gate.clone(), "a")), Origin::start(script(gate.clone(), "b")));
    let gateway = Gateway::start(&upstream(&[a.address, b.address], "balance = \"least-request\""));
    let mut long = gateway.connect();
    long.send_get("/long", &[]);
    wait_for(|| a.count() + b.count() == 1, STEP_TIMEOUT);
    let free = if a.count() == 1 { "b" } else { "a" };
    for _ in 0..10 {
        assert_eq!(gateway.get("/", &[]).text(), free);
    }
    gate.open();
    assert_ne!(long.read_response().text(), free);
}

#[test]
fn round_robin_selects_each_endpoint_in_turn() {
    let (a, b) = (Origin::start(echo), Origin::start(echo));
    let gateway = Gateway::start(&upstream(&[a.address, b.address], "balance = \"round-robin\""));
    (0..10).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert_eq!((a.count(), b.count()), (5, 5));
}

#[test]
fn upstream_connections_are_reused() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/chunks" => Script::new().head(200, &[("Transfer-Encoding", "chunked")]).send("2\r\nok\r\n0\r\n\r\n"),
        "/none" => Script::reply(204, &[], ""),
        "/same" => Script::reply(304, &[("ETag", "\"a\"")], ""),
        _ if request.method == "HEAD" => Script::new().head(200, &[("Content-Length", "5")]),
        _ => echo(request),
    });
    let gateway = plain(&origin);
    for target in ["/", "/chunks", "/none", "/same", "/"] {
        gateway.get(target, &[]);
    }
    assert_eq!(gateway.request("HEAD", "/", &[], b"").field("content-length"), Some("5"));
    assert_eq!(gateway.request("POST", "/", &[], b"abc").text(), "POST /");
    assert_eq!((origin.count(), origin.connections()), (7, 1));
}

#[test]
fn response_delimited_by_connection_close_is_complete() {
    let origin = Origin::start(|_| Script::new().head(200, &[("Connection", "close")]).send("until the end").close());
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    for _ in 0..2 {
        let response = client.get("/", &[]);
        assert_eq!((response.text(), response.end), ("until the end".into(), BodyEnd::Complete));
    }
    assert_eq!(origin.connections(), 2);
}

#[test]
fn interim_responses_do_not_end_the_exchange() {
    let origin = Origin::start(|_| {
        Script::new()
            .head(100, &[])
            .head(103, &[("Link", "</a>")])
            .send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast")
    });
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    for _ in 0..2 {
        client.send_get("/", &[]);
        let mut response = client.read_response();
        while response.status < 200 {
            response = client.read_response();
        }
        assert_eq!((response.status, response.text()), (200, "last".into()));
    }
}

/// WebDAV (102) and uploads (104) report progress by them, in any number (RFC 9110 section 15.2).
#[test]
fn interim_responses_are_passed_on_in_any_number() {
    let origin = Origin::start(|request| {
        let (status, count) = request.target[1..].split_once('/').expect("a status and a number");
        let one = |number: usize| format!("HTTP/1.1 {status} X\r\nUpload-Offset: {number}\r\n\r\n");
        let count: usize = count.parse().expect("a number");
        (0..count).fold(Script::new(), |script, number| script.send(one(number))).head(200, &[("Content-Length", "0")])
    });
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    for status in [102, 103, 104] {
        for count in [1, 9, 60] {
            client.send_get(&format!("/{status}/{count}"), &[]);
            let mut head = client.read_head();
            let mut passed = 0;
            while head.status == status {
                assert_eq!(head.field("upload-offset"), Some(&*passed.to_string()));
                passed += 1;
                head = client.read_head();
            }
            assert_eq!((head.status, passed), (200, count), "{status}");
        }
    }
    client.send_get("/100/60", &[]);
    assert_eq!(client.read_head().status, 200, "100 Continue is the gateway's own");
}

/// The gateway does not keep them: a client can do without them.
#[test]
fn interim_responses_that_a_client_does_not_take_are_discarded() {
    const COUNT: usize = 95;
    let large = format!("HTTP/1.1 102 X\r\nX-Large: {}\r\n\r\n", "a".repeat(60 << 10));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound port");
    let is_sent = Arc::new(AtomicBool::new(false));
    let sent = Arc::clone(&is_sent);
    std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().expect("the connection of the gateway");
        assert!(connection.read(&mut [0; 4096]).expect("a request") > 0);
        (0..COUNT).for_each(|_| connection.write_all(large.as_bytes()).expect("a gateway that reads"));
        sent.store(true, Ordering::SeqCst);
        connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("a gateway that reads");
        // Until the gateway closes.
        drop(connection.read(&mut [0; 1]));
    });
    let gateway = Gateway::start(&upstream(&[address], ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    wait_for(|| is_sent.load(Ordering::SeqCst), STEP_TIMEOUT);
    let mut passed = 0;
    let mut head = client.read_head();
    while head.status == 102 {
        passed += 1;
        head = client.read_head();
    }
    assert_eq!(head.status, 200);
    assert!((1..COUNT).contains(&passed), "{passed}");
}

#[test]
fn closed_idle_connection_is_replaced_for_get_and_not_for_post() {
    let origin = Origin::start(|request| match (request.number, request.connection) {
        (0, _) => Script::ok(&[], "first"),
        (_, 0) => Script::new().close(),
        _ => Script::ok(&[], "second"),
    });
    let gateway = plain(&origin);
    assert_eq!(gateway.get("/", &[]).text(), "first");
    assert_eq!(gateway.get("/", &[]).text(), "second");
    assert_eq!((origin.count(), origin.connections()), (3, 2));
    // A replay is no retry.
    assert_eq!(gateway.metric("tidegate_upstream_replays_total{reason=\"closed\"}"), 1.0);
    assert_eq!(gateway.metric("tidegate_upstream_replays_total{reason=\"refused\"}"), 0.0);
    assert_eq!(gateway.metric("tidegate_upstream_retries_total"), 0.0);

    let origin = Origin::start(|request| match (request.number, request.connection) {
        (0, _) => Script::ok(&[], "first"),
        (_, 0) => Script::new().close(),
        _ => Script::ok(&[], "second"),
    });
    let gateway = plain(&origin);
    assert_eq!(gateway.request("POST", "/", &[], b"x").text(), "first");
    assert_eq!(gateway.request("POST", "/", &[], b"x").status, 503, "a POST may have been processed already");
    assert_eq!((origin.count(), origin.connections()), (2, 1));
    assert_eq!(gateway.request("POST", "/", &[], b"x").text(), "second");
}

#[test]
fn origin_restart_between_requests_fails_no_request() {
    let first = Origin::start(echo);
    let gateway = plain(&first);
    assert_eq!(gateway.request("POST", "/a", &[], b"x").text(), "POST /a");
    first.stop();
    let second = Origin::start_at(first.address, echo);
    assert_eq!(gateway.request("POST", "/b", &[], b"x").text(), "POST /b");
    assert_eq!(second.count(), 1);
}

/// An origin that closes its first connection when the second request arrives on it.
fn closing_origin() -> Origin {
    Origin::start(|request| match (request.number, request.connection) {
        (0, _) => Script::ok(&[], "first"),
        (_, 0) => Script::new().close(),
        _ => Script::ok(&[], request.body.len().to_string()),
    })
}

#[test]
fn other_endpoint_gets_the_request_if_a_kept_connection_is_dead_and_its_endpoint_refuses() {
    for (method, body) in [("GET", ""), ("PUT", "body"), ("DELETE", "")] {
        let (first, other) = (Origin::start(echo), Origin::start(echo));
        let gateway = Gateway::start(&upstream(&[first.address, other.address], "balance = \"round-robin\""));
        let mut client = gateway.connect();
        (0..4).for_each(|_| assert_eq!(client.get("/", &[]).status, 200));
        first.stop();
        for _ in 0..4 {
            assert_eq!(client.request(method, "/x", &[], body.as_bytes()).text(), format!("{method} /x"));
        }
        assert_eq!((first.count(), other.count()), (2, 6), "{method}");
    }
}

#[test]
fn small_body_is_sent_again_after_a_kept_connection_turns_out_to_be_closed() {
    let small = pattern(60_000);
    let chunks = chunked(&small, 7_001);
    let chunked = [("Transfer-Encoding", "chunked")];
    for (fields, body) in [(&[][..], &b"x"[..]), (&[], &small), (&chunked, &chunks)] {
        let origin = closing_origin();
        let gateway = plain(&origin);
        let mut client = gateway.connect();
        assert_eq!(client.request("PUT", "/", fields, body).text(), "first");
        assert_eq!(client.request("PUT", "/", fields, body).status, 200);
        let sent = origin.last().body;
        assert!(sent == if fields.is_empty() { body } else { &small }, "{} bytes", sent.len());
        assert_eq!((origin.count(), origin.connections()), (3, 2));
    }
}

#[test]
fn request_that_may_have_been_processed_is_sent_once() {
    let large = pattern(100_000);
    let cases: [(&str, &[u8]); 3] = [("POST", b"x"), ("PATCH", b"x"), ("PUT", &large)];
    for (method, body) in cases {
        let origin = closing_origin();
        let gateway = plain(&origin);
        let mut client = gateway.connect();
        assert_eq!(client.request(method, "/", &[], body).text(), "first");
        assert_eq!(client.request(method, "/", &[], body).status, 503, "{method} {}", body.len());
        assert_eq!((origin.count(), origin.connections()), (2, 1));
    }
}

#[test]
fn client_disconnect_closes_the_upstream_connection() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/body" => {
            Script::new().head(200, &[("Content-Length", "10"), ("Cache-Control", "max-age=60")]).send("part").hang()
        }
        _ => Script::new().hang(),
    });
    let cached = one_route(origin.address, "cache = { mode = \"standard\" }", "");
    for (config, name) in [(upstream(&[origin.address], ""), "plain"), (cached, "cached")] {
        let gateway = Gateway::start(&config);
        for (method, target, body) in
            [("GET", "/head", ""), ("GET", "/body", ""), ("POST", "/head", "abc"), ("POST", "/body", "abc")]
        {
            let (forwarded_before, ended) = (origin.count(), origin.ends().len());
            let mut client = gateway.connect();
            client.send(support::client::request(method, target, &[], body.as_bytes()));
            origin.wait_for_requests(forwarded_before + 1);
            if target == "/body" {
                client.read_head();
                client.read_bytes(4);
            }
            assert_eq!(origin.ends().len(), ended);
            let disconnected_at = Instant::now();
            drop(client);
            wait_for(|| origin.ends().len() > ended, STEP_TIMEOUT);
            let waited = origin.ends()[ended] - disconnected_at;
            assert!(waited < Duration::from_millis(300), "{name} {method} {target}: {waited:?}");
        }
    }
}

// Forwarded fields and bodies.

#[test]
fn hop_by_hop_and_spoofable_client_fields_are_not_forwarded() {
    let origin = Origin::start(echo);
    let rest =
        "[identity]\ntrusted_proxies = [\"10.0.0.0/8\"]\nuser = \"header:x-user-id\"\ntier = \"header:x-user-tier\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "", rest));
    let fields = [
        ("Host", "shop.test:81"),
        ("Connection", "keep-alive, X-Secret"),
        ("Connection", "X-Other"),
        ("X-Secret", "1"),
        ("X-Other", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic eDp5"),
        ("TE", "trailers"),
        ("Trailer", "X-T"),
        ("Upgrade", "h2c"),
        ("X-Forwarded-For", "6.6.6.6"),
        ("X-Forwarded-Host", "evil.test"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Port", "444"),
        ("Forwarded", "for=6.6.6.6"),
        ("X-Real-IP", "6.6.6.6"),
        ("X-Original-URL", "/admin"),
        ("X-Rewrite-URL", "/admin"),
        ("X-User-Id", "root"),
        ("X-User-Tier", "gold"),
        ("Via", "1.0 before"),
        ("Cookie", "a=b"),
        ("Accept", "x/1"),
        ("Accept", "x/2"),
    ];
    assert_eq!(gateway.get("/a?b=c", &fields).text(), "GET /a?b=c");
    let forwarded = origin.last();
    for name in [
        "X-Secret",
        "X-Other",
        "Keep-Alive",
        "Proxy-Connection",
        "Proxy-Authorization",
        "TE",
        "Trailer",
        "Upgrade",
        "X-Forwarded-Port",
        "Forwarded",
        "X-Real-IP",
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-User-Id",
        "X-User-Tier",
    ] {
        assert_eq!(forwarded.all(name), Vec::<&str>::new(), "{name}");
    }
    assert!(
        forwarded.all("connection").iter().all(|value| value.eq_ignore_ascii_case("keep-alive")),
        "{:?}",
        forwarded.fields
    );
    assert_eq!(forwarded.all("host"), ["shop.test:81"]);
    assert_eq!(forwarded.all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(forwarded.all("x-forwarded-host"), ["shop.test:81"]);
    assert_eq!(forwarded.all("x-forwarded-proto"), ["http"]);
    assert_eq!(forwarded.all("via").join(", "), "1.0 before, 1.1 tidegate");
    assert_eq!((forwarded.all("cookie"), forwarded.all("accept")), (vec!["a=b"], vec!["x/1", "x/2"]));
    assert!(forwarded.field("traceparent").is_some());
}

#[test]
fn fields_of_a_trusted_proxy_are_forwarded() {
    let origin = Origin::start(echo);
    let rest = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-user-id\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "", rest));
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let fields = [
        ("X-Forwarded-For", "6.6.6.6, 7.7.7.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "shop.test"),
        ("X-User-Id", "ann"),
        ("traceparent", trace),
    ];
    gateway.get("/", &fields);
    let forwarded = origin.last();
    assert_eq!(forwarded.all("x-forwarded-for"), ["6.6.6.6, 7.7.7.7, 127.0.0.1"]);
    assert_eq!(
        (forwarded.all("x-forwarded-proto"), forwarded.all("x-forwarded-host")),
        (vec!["https"], vec!["shop.test"])
    );
    assert_eq!(forwarded.all("x-user-id"), ["ann"]);
    // The gateway records no span, so it does not change the trace context.
    assert_eq!(forwarded.all("traceparent"), [trace]);
}

#[test]
fn hop_by_hop_response_fields_are_not_forwarded() {
    let fields = [
        ("Connection", "X-Internal"),
        ("X-Internal", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Upgrade", "h2c"),
        ("Trailer", "X-T"),
        ("Set-Cookie", "a=b"),
        ("Set-Cookie", "c=d"),
        ("Via", "1.0 behind"),
        ("Server", "origin"),
    ];
    let origin = Origin::start(move |_| Script::ok(&fields, "body"));
    let gateway = plain(&origin);
    let response = gateway.get("/", &[]);
    for name in ["X-Internal", "Keep-Alive", "Proxy-Authenticate", "Upgrade", "Trailer"] {
        assert_eq!(response.all(name), Vec::<&str>::new(), "{name}");
    }
    assert!(
        response.all("connection").iter().all(|value| value.eq_ignore_ascii_case("keep-alive")),
        "{:?}",
        response.fields
    );
    assert_eq!(response.all("set-cookie"), ["a=b", "c=d"]);
    assert_eq!(response.all("via").join(", "), "1.0 behind, 1.1 tidegate");
    let old = Origin::start(|_| {
        Script::new().send("HTTP/1.0 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 2\r\n\r\nok").close()
    });
    let gateway = plain(&old);
    for is_hit in [false, true] {
        let response = gateway.get("/", &[]);
        assert_eq!((response.is_hit(), response.all("via")), (is_hit, vec!["1.0 tidegate"]));
    }
    assert!(response.field("date").is_some() && response.field("server") == Some("origin"));
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn request_bodies_are_forwarded_unchanged_with_length_and_chunked() {
    let origin = Origin::start(|request| Script::ok(&[], request.body.len().to_string()));
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    for length in [1, 1_000, 65_536, 1 << 20] {
        let body = pattern(length);
        assert_eq!(client.request("POST", "/", &[], &body).text(), length.to_string());
        assert!(origin.last().body == body && origin.last().field("content-length").is_some());
        let chunks = chunked(&body, 10_007);
        assert_eq!(
            client.request("POST", "/", &[("Transfer-Encoding", "chunked")], &chunks).text(),
            length.to_string()
        );
        assert!(origin.last().body == body, "{length} in chunks");
    }
    assert_eq!(client.request("POST", "/", &[("Content-Length", "0")], b"").text(), "0");
    assert_eq!(origin.last().field("content-length"), Some("0"), "an empty body has a length");
}

#[test]
fn large_responses_are_forwarded_unchanged_with_length_and_chunked() {
    let body = pattern(8 << 20);
    let sent = body.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/length" => Script::ok(&[], &sent),
        _ => Script::new().head(200, &[("Transfer-Encoding", "chunked")]).send(chunked(&sent, 50_021)),
    });
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    for target in ["/length", "/chunks"] {
        let response = client.get(target, &[]);
        assert!(response.end == BodyEnd::Complete && response.body == body, "{target}: {} bytes", response.body.len());
    }
}

/// The data of chunks of `length` bytes in all.
fn read_chunks(length: usize, mut read: impl FnMut(usize) -> Vec<u8>) -> Vec<u8> {
    let mut data = Vec::new();
    while data.len() < length {
        data.extend(read_chunk(&mut read));
    }
    data
}

/// Clients read a chunk with its end before they deliver it: an event would be as late as the next
/// one.
#[test]
fn chunk_leaves_with_its_end() {
    for (length, framing) in
        [7, 4_080, 4_090, 5_000, 300_000].into_iter().flat_map(|length| [(length, true), (length, false)])
    {
        let (gate, body) = (Gate::default(), pattern(length));
        let (sent, opened) = (body.clone(), gate.clone());
        let origin = Origin::start(move |_| {
            let script = match framing {
                true => Script::new()
                    .head(200, &[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")])
                    .send([format!("{:x}\r\n", sent.len()).as_bytes(), &sent, b"\r\n"].concat()),
                false => Script::new().head(200, &[("Cache-Control", "max-age=60")]).send(&sent),
            };
            let script = script.wait(&opened);
            if framing { script.send("0\r\n\r\n") } else { script.close() }
        });
        for route in ["cache = { mode = \"off\" }", "cache = { mode = \"standard\" }"] {
            let gateway = Gateway::start(&one_route(origin.address, route, ""));
            // The second one shares the fetch of the first, where there is a cache.
            let mut clients = [gateway.connect(), gateway.connect()];
            for client in &mut clients {
                // Shorter than the gate waits.
                client.set_read_timeout(STEP_TIMEOUT / 3);
                client.send_get("/", &[]);
                assert_eq!(client.read_head().field("transfer-encoding"), Some("chunked"));
                assert!(read_chunks(length, |count| client.read_bytes(count)) == body, "{length} bytes, {route}");
            }
        }
        gate.open();
    }
}

#[test]
fn chunk_of_an_upload_leaves_with_its_end() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let gateway = Gateway::start(&one_route(address, "cache = { mode = \"off\" }", ""));
    for length in [7, 5_000, 300_000] {
        let mut client = gateway.connect();
        client.send("POST / HTTP/1.1\r\nHost: gate.test\r\nTransfer-Encoding: chunked\r\n\r\n");
        let body = pattern(length);
        client.send([format!("{length:x}\r\n").as_bytes(), &body, b"\r\n"].concat());
        let (mut upstream, _) = listener.accept().expect("the connection of the gateway");
        upstream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        let mut read = |count| {
            let mut bytes = vec![0; count];
            upstream.read_exact(&mut bytes).expect("bytes in time");
            bytes
        };
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.extend(read(1));
        }
        assert!(read_chunks(length, read) == body, "{length} bytes");
    }
}

#[test]
fn slow_client_throttles_the_origin() {
    const LENGTH: usize = 64 << 20;
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", &LENGTH.to_string())]).fill(LENGTH));
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    client.read_head();
    let before = resident_bytes(&gateway);
    client.read_bytes(1 << 20);
    std::thread::sleep(Duration::from_millis(300));
    let grown = resident_bytes(&gateway).saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more for one client that does not read");
}

/// Resident bytes of the gateway.
fn resident_bytes(gateway: &Gateway) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.process.id())).expect("a live process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a resident size");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1_024
}

// Circuit breaker and error pages.

const BREAKER: &str =
    "[upstreams.origin.breaker]\nerror_ratio = 0.5\nminimum = 4\nwindow = \"10s\"\nopen = \"400ms\"\n";

fn breakable_origin() -> (Origin, Arc<AtomicBool>) {
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&is_broken);
    let origin = Origin::start(move |_| match broken.load(Ordering::SeqCst) {
        true => Script::reply(500, &[], "broken"),
        false => Script::ok(&[], "works"),
    });
    (origin, is_broken)
}

#[test]
fn breaker_opens_probes_and_closes() {
    let (origin, is_broken) = breakable_origin();
    let gateway = Gateway::start(&one_route(origin.address, "", BREAKER));
    let statuses: Vec<u16> = (0..8).map(|_| gateway.get("/", &[]).status).collect();
    assert_eq!(statuses, [500, 500, 500, 500, 503, 503, 503, 503]);
    assert_eq!(origin.count(), 4, "an open breaker forwards nothing");
    // A failed probe opens the breaker again.
    wait_for(|| gateway.get("/", &[]).status == 500, STEP_TIMEOUT);
    assert_eq!((gateway.get("/", &[]).status, origin.count()), (503, 5));
    is_broken.store(false, Ordering::SeqCst);
    wait_for(|| gateway.get("/", &[]).status == 200, STEP_TIMEOUT);
    (0..10).for_each(|_| assert_eq!(gateway.get("/", &[]).text(), "works"));
    let lines = &gateway.process.stderr;
    wait_for(|| !lines.events("breaker_closed").is_empty(), STEP_TIMEOUT);
    let opened = lines.events("breaker_opened");
    assert!(opened.len() >= 2 && lines.events("breaker_half_open").len() >= 2);
    let cause = |event: &serde_json::Value| {
        (event["reason"].as_str().map(str::to_owned), event["calls"].as_u64(), event["failed"].as_u64())
    };
    assert_eq!(cause(&opened[0]), (Some("error_ratio".to_owned()), Some(4), Some(4)));
    assert_eq!(cause(&opened[1]), (Some("probe_failed".to_owned()), Some(1), Some(1)));
}

/// A body that fails before the head of its response is sent: one response, which is the one that
/// the client gets.
#[test]
fn body_that_fails_with_its_head_is_counted_as_one_response() {
    let origin = Origin::start(|request| match request.number {
        0 => Script::ok(&[("Cache-Control", "max-age=0, stale-if-error=60"), ("ETag", "\"a\"")], "kept"),
        _ => Script::new().send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n").close(),
    });
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"standard\" }", ""));
    let responses = |class: &str| {
        gateway.metric(&format!("tidegate_route_responses_total{{route=\"all\",status_class=\"{class}\"}}"))
    };
    let results = |result: &str| gateway.metric(&format!("tidegate_cache_results_total{{cache=\"{result}\"}}"));
    assert_eq!(gateway.get("/kept", &[]).text(), "kept");
    let response = gateway.get("/none", &[]);
    assert_eq!((response.status, response.field("proxy-status").is_some()), (502, true));
    assert_eq!((responses("2xx"), responses("5xx"), results("miss"), results("error")), (1.0, 1.0, 1.0, 1.0));
    // The ladder begins with the stale response, as after any failure of the upstream.
    let response = gateway.get("/kept", &[]);
    assert_eq!((response.status, response.text()), (200, "kept".to_owned()));
    assert_eq!((responses("2xx"), responses("5xx"), results("stale")), (2.0, 1.0, 1.0));
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"malformed\"}"), 2.0);
}

/// Lines of one kind of failure at one route do not hide those of another, and the last ones of a
/// series are reported although no other failure follows.
#[test]
fn failures_are_throttled_by_route_and_kind_and_the_rest_is_reported() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/a/silent" => Script::new().close(),
        _ => Script::new().send("no HTTP\r\n\r\n").close(),
    });
    let route = |name: &str| {
        format!("[[routes]]\nname = \"{name}\"\nmatch = {{ path = \"/{name}/*\" }}\nupstream = \"origin\"\n")
    };
    let config = one_route(origin.address, "", &(route("a") + &route("b")));
    let gateway = Gateway::start(&config);
    for target in ["/a/x", "/a/x", "/a/x", "/b/x", "/a/silent", "/a/silent"] {
        let status = gateway.get(target, &[]).status;
        assert!(matches!(status, 502 | 503), "{target}: {status}");
    }
    let lines = &gateway.process.stderr;
    wait_for(|| lines.events("events_suppressed").len() == 2, STEP_TIMEOUT);
    let described = |event: &serde_json::Value| {
        let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
        (text("route"), text("kind"), event["suppressed"].as_u64().unwrap_or_default())
    };
    let failed: Vec<_> = lines.events("upstream_failed").iter().map(described).collect();
    let expect = |route: &str, kind: &str, count| (route.to_owned(), kind.to_owned(), count);
    assert_eq!(failed, [expect("a", "malformed", 0), expect("b", "malformed", 0), expect("a", "no_response", 0)]);
    let mut rest: Vec<_> = lines.events("events_suppressed").iter().map(described).collect();
    rest.sort();
    assert_eq!(rest, [expect("a", "malformed", 2), expect("a", "no_response", 1)]);
    assert_eq!(gateway.metric("tidegate_events_total{event=\"upstream_failed\"}"), 6.0);
}

#[test]
fn truncated_responses_open_the_breaker() {
    let origin = Origin::start(|_| Script::new().head(200, &[("Content-Length", "10")]).send("half").close());
    let gateway = Gateway::start(&one_route(origin.address, "", BREAKER));
    for _ in 0..8 {
        let mut client = gateway.connect();
        client.send_get("/", &[("Connection", "close")]);
        client.read_to_end();
    }
    assert!(origin.count() < 8, "{}", origin.count());
    wait_for(|| !gateway.process.stderr.events("breaker_opened").is_empty(), STEP_TIMEOUT);
    assert!(gateway.process.stderr.events("upstream_failed").iter().any(|event| event["kind"] == "truncated"));
}

#[test]
fn statuses_below_500_leave_the_breaker_closed() {
    let origin = Origin::start(|_| Script::reply(404, &[], "no"));
    let gateway = Gateway::start(&one_route(origin.address, "", BREAKER));
    assert!((0..20).all(|_| gateway.get("/", &[]).status == 404));
}

#[test]
fn each_route_has_its_own_breaker() {
    let origin = Origin::start(|request| Script::reply(if request.target == "/bad" { 500 } else { 200 }, &[], ""));
    let bad = "[[routes]]\nname = \"bad\"\nmatch = { path = \"/bad\" }\nupstream = \"origin\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "", &format!("{BREAKER}{bad}")));
    (0..4).for_each(|_| assert_eq!(gateway.get("/bad", &[]).status, 500));
    assert_eq!((gateway.get("/bad", &[]).status, gateway.get("/good", &[]).status), (503, 200));
}

#[test]
fn error_page_is_html_or_json_by_accept() {
    let (origin, _) = breakable_origin();
    // The breaker can be closed before the configured time; a later time would be the least one.
    let breaker = format!("{BREAKER}ramp = \"0s\"\n");
    let gateway =
        Gateway::start(&one_route(origin.address, "degrade = { status = 503, retry_after = \"4s\" }", &breaker));
    (0..4).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 500));
    let accepts = [
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html; charset=utf-8"),
        ("application/json", "application/problem+json"),
        ("*/*", "application/problem+json"),
        ("text/html;q=0.1, application/json", "application/problem+json"),
    ];
    for (accept, expected) in accepts {
        let response = gateway.get("/", &[("Accept", accept)]);
        assert_eq!((response.status, response.field("content-type")), (503, Some(expected)), "{accept}");
        assert_eq!(response.field("cache-control"), Some("no-store"));
        let wait: u64 = response.field("retry-after").and_then(|wait| wait.parse().ok()).expect("seconds");
        assert!((2..=6).contains(&wait), "{wait}: around the configured 4 s");
        if expected.ends_with("json") {
            let problem: serde_json::Value = serde_json::from_slice(&response.body).expect("problem JSON");
            assert_eq!((problem["status"].as_u64(), problem["reason"].as_str()), (Some(503), Some("breaker_open")));
        } else {
            assert!(response.text().starts_with("<!doctype html>"));
        }
    }
    let head = gateway.request("HEAD", "/", &[], b"");
    assert!(head.status == 503 && head.field("content-length").is_some_and(|length| length != "0"));
}

#[test]
fn route_can_configure_its_error_pages() {
    let dir = support::TempDir::new();
    dir.write("busy.html", "<p>later</p>");
    dir.write("busy.json", "{\"later\":true}");
    let route = "degrade = { status = 504, html = \"busy.html\", json = \"busy.json\" }";
    let gateway = Gateway::start_in(dir, &one_route(free_address(), route, ""));
    let html = gateway.get("/", &[("Accept", "text/html")]);
    let json = gateway.get("/", &[("Accept", "application/json")]);
    assert_eq!((html.status, html.text(), json.text()), (504, "<p>later</p>".into(), "{\"later\":true}".into()));
}

#[test]
fn hanging_calls_open_the_breaker_while_running() {
    let origin = Origin::start(|request| match request.number {
        0..3 => Script::new().hang(),
        _ => Script::ok(&[], "works"),
    });
    let breaker = "[upstreams.origin.breaker]\nslow = \"150ms\"\nslow_ratio = 0.5\nminimum = 3\nopen = \"10s\"\n";
    // Without a cache, so that every request is a call.
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", breaker));
    let mut hanging: Vec<Client> = (0..3).map(|_| gateway.connect()).collect();
    hanging.iter_mut().for_each(|client| client.send_get("/", &[]));
    origin.wait_for_requests(3);
    let start = Instant::now();
    // Past the threshold of 150 ms, while all three calls are running. Quick calls before would
    // lower the ratio.
    wait_for(|| start.elapsed() > Duration::from_millis(300), Duration::from_secs(3));
    assert_eq!(gateway.get("/", &[]).status, 503);
    assert!(start.elapsed() < Duration::from_secs(5), "well before the deadline of 10 s: {:?}", start.elapsed());
    let forwarded_before = origin.count();
    assert_eq!((gateway.get("/", &[]).status, origin.count()), (503, forwarded_before));
}

// Upgrades.

/// An origin that switches to a protocol in which every line is echoed twice. It ends with its
/// client.
fn start_doubling_origin() -> (SocketAddr, std::thread::JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let serve = move || {
        let (stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        let mut lines = BufReader::new(stream.try_clone().expect("a second handle"));
        let mut line = String::new();
        while lines.read_line(&mut line).expect("a head") > 2 {
            line.clear();
        }
        let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: doubling\r\n\r\n";
        (&stream).write_all(head.as_bytes()).expect("a live socket");
        let mut count = 0;
        line.clear();
        while lines.read_line(&mut line).expect("a line or the end") > 0 {
            count += 1;
            (&stream).write_all(line.repeat(2).as_bytes()).expect("a live socket");
            line.clear();
        }
        count
    };
    (address, std::thread::spawn(serve))
}

#[test]
fn upgrade_relays_in_both_directions_until_both_sides_end() {
    let (address, origin) = start_doubling_origin();
    let gateway = Gateway::start(&one_route(address, "", ""));
    let mut client = gateway.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: doubling\r\n\r\nearly\n");
    assert_eq!(client.read_head().status, 101);
    assert_eq!(client.read_bytes(12), b"early\nearly\n");
    // Larger than any buffer.
    let line = format!("{}\n", "x".repeat(300_000));
    for _ in 0..3 {
        client.send(&line);
        assert!(client.read_bytes(2 * line.len()) == line.repeat(2).as_bytes());
    }
    client.finish();
    assert_eq!(client.read_to_end(), b"");
    assert_eq!(origin.join().expect("no panic"), 4);
    assert_eq!(gateway.metric("tidegate_upgrades_total"), 1.0);
    assert_eq!(gateway.metric("tidegate_requests_in_flight"), 0.0);
}

#[test]
fn idle_upgrade_is_closed() {
    let (address, origin) = start_doubling_origin();
    let gateway = Gateway::start(&one_route(address, "", "[limits_http]\nidle_timeout = \"300ms\"\n"));
    let mut client = gateway.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: doubling\r\n\r\n");
    assert_eq!(client.read_head().status, 101);
    let start = Instant::now();
    client.read_to_end();
    assert!((Duration::from_millis(250)..STEP_TIMEOUT).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert_eq!(origin.join().expect("no panic"), 0);
}

#[test]
fn early_hints_are_forwarded_before_the_response() {
    let gate = Gate::default();
    let opened = gate.clone();
    let hint = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nConnection: x\r\n\r\n";
    let origin =
        Origin::start(move |_| Script::new().send(hint).wait(&opened).head(200, &[("Content-Length", "2")]).send("ok"));
    let gateway = plain(&origin);
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    let early = client.read_head();
    assert_eq!((early.status, early.field("link"), early.field("connection")), (103, Some("</a.css>"), None));
    gate.open();
    assert_eq!(client.read_response().text(), "ok");
}
