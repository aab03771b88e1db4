//! What clients get for requests that are malformed, oversize, slow or odd, and that the origin never hears of them.

mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use support::client::chunked;
use support::{Client, Gateway, Origin, PATIENCE, Script, one_route, wait_for};

/// Bounds so small that a test can cross them quickly.
const SMALL: &str =
    "[limits_http]\nheader_bytes = \"4KiB\"\nheader_fields = 20\nuri_bytes = \"1KiB\"\nbody_bytes = \"64KiB\"\n";

fn echo() -> Origin {
    Origin::start(|request| Script::ok(&[], format!("{} {} {}", request.method, request.target, request.body.len())))
}

fn strict(origin: &Origin) -> Gateway {
    Gateway::start(&one_route(origin.address, "", SMALL))
}

/// Requests that are wrong in the head: name, bytes, status.
const WRONG: &[(&str, &str, u16)] = &[
    // Framing.
    (
        "length and coding",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "coding and length",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        400,
    ),
    ("two different lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    ("two equal lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("length with a plus", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc", 400),
    ("length below zero", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
    ("length as a list", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc", 400),
    ("length in hexadecimal", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\nabc", 400),
    ("length with a fraction", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3.0\r\n\r\nabc", 400),
    ("length with a blank inside", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3 0\r\n\r\nabc", 400),
    ("length in words", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: three\r\n\r\nabc", 400),
    ("empty length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\nabc", 400),
    ("length of 2^63", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775808\r\n\r\n", 400),
    ("length of 2^64 + 3", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551619\r\n\r\nabc", 400),
    ("unknown coding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\nabc", 501),
    ("chunked not last", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 501),
    ("coding before chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ("chunked twice", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501),
    (
        "two coding lines",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "identity beside chunked",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    ("identity", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\nabc", 501),
    ("empty coding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\nabc", 501),
    ("chunked with a parameter", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n", 501),
    (
        "chunked with a vertical tab",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    ("coding in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    // Field lines.
    ("folded value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n 2\r\n\r\n", 400),
    ("folded by a tab", "GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n\t2\r\n\r\n", 400),
    ("first field folded", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    ("blank before the colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    ("tab before the colon", "GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", 400),
    ("blank before the colon of a length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\nabc", 400),
    ("no colon", "GET / HTTP/1.1\r\nHost: a\r\nX-A\r\n\r\n", 400),
    ("no name", "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400),
    ("blank in a name", "GET / HTTP/1.1\r\nHost: a\r\nX A: b\r\n\r\n", 400),
    ("bracket in a name", "GET / HTTP/1.1\r\nHost: a\r\nX(A): b\r\n\r\n", 400),
    ("NUL in a name", "GET / HTTP/1.1\r\nHost: a\r\nX\0A: b\r\n\r\n", 400),
    ("NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: b\0c\r\n\r\n", 400),
    ("control character in a value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: b\x01c\r\n\r\n", 400),
    ("delete character in a value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: b\x7fc\r\n\r\n", 400),
    ("letter beyond ASCII in a name", "GET / HTTP/1.1\r\nHost: a\r\nX-\u{e4}: b\r\n\r\n", 400),
    ("bare CR in a value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: b\rc\r\n\r\n", 400),
    ("bare CR as a line end", "GET / HTTP/1.1\r\nHost: a\rX-A: b\r\n\r\n", 400),
    ("bare LF in a value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: b\nX-B: c\r\n\r\n", 400),
    ("bare LF after the request line", "GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("bare LF everywhere", "GET / HTTP/1.1\nHost: a\n\n", 400),
    ("bare LF at the end", "GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    ("CR CR LF", "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400),
    // Host.
    ("no Host", "GET / HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    ("two equal Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    ("empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    ("Host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ("Host with a user", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    ("Host with a blank", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("Host as a list", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ("Host with a bad port", "GET / HTTP/1.1\r\nHost: a:x\r\n\r\n", 400),
    ("Host with a port too great", "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", 400),
    ("Host with an open bracket", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    ("Host with a query", "GET / HTTP/1.1\r\nHost: a?b\r\n\r\n", 400),
    ("Host against the target", "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    // Request line.
    ("no version", "GET /\r\nHost: a\r\n\r\n", 400),
    ("lower-case version", "GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("version with letters", "GET / HTTP/1.x\r\nHost: a\r\n\r\n", 400),
    ("version of two digits", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    ("version 2.0", "GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ("version 1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    ("version 0.9", "GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    ("two blanks", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("tab instead of a blank", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("blank at the start", " GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("blank at the end", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    ("no target", "GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("blank in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("bad method", "G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target without a slash", "GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target with a fragment", "GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target beyond ASCII", "GET /\u{e4} HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("NUL in the target", "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("another scheme", "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("asterisk with GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("CONNECT", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405),
    ("TRACE", "TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    ("unknown expectation", "POST / HTTP/1.1\r\nHost: a\r\nExpect: wonders\r\nContent-Length: 3\r\n\r\nabc", 417),
    ("another protocol", "\x16\x03\x01\x02\r\n\r\n\r\n", 400),
];

/// The status of the first answer in `bytes`.
fn status(bytes: &[u8]) -> Option<u16> {
    std::str::from_utf8(bytes.get(9..12)?).ok()?.parse().ok()
}

#[test]
fn malformed_requests_are_refused_and_their_connections_closed() {
    let origin = echo();
    let gateway = strict(&origin);
    let mut wrong = Vec::new();
    for (name, request, expected) in WRONG {
        let mut client = gateway.connect();
        client.set_patience(Duration::from_secs(2));
        let start = Instant::now();
        // A second request behind the first must not be read: it could be the smuggled one.
        client.send(format!("{request}GET /second HTTP/1.1\r\nHost: a\r\n\r\n"));
        let received = client.read_to_end();
        let answers = received.windows(9).filter(|window| window == b"HTTP/1.1 ").count();
        if status(&received) != Some(*expected) || answers != 1 || start.elapsed() > Duration::from_millis(1_500) {
            let received = String::from_utf8_lossy(&received).into_owned();
            wrong
                .push(format!("{name}: expected {expected} and the end, got {received:?} after {:?}", start.elapsed()));
        }
    }
    assert!(WRONG.len() >= 60 && wrong.is_empty(), "{} of {}:\n{}", wrong.len(), WRONG.len(), wrong.join("\n"));
    assert_eq!((origin.bytes(), origin.connections()), (0, 0), "the origin never heard of them");
}

#[test]
fn broken_chunks_end_the_connection_and_never_make_a_whole_request() {
    const BROKEN: &[(&str, &str)] = &[
        ("size not hexadecimal", "zz\r\nabc\r\n0\r\n\r\n"),
        ("size with a sign", "+3\r\nabc\r\n0\r\n\r\n"),
        ("size with a prefix", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("no size", "\r\nabc\r\n0\r\n\r\n"),
        ("blank before the size", " 3\r\nabc\r\n0\r\n\r\n"),
        ("blank after the size", "3 \r\nabc\r\n0\r\n\r\n"),
        ("bare LF after the size", "3\nabc\r\n0\r\n\r\n"),
        ("bare CR after the size", "3\rabc\r\n0\r\n\r\n"),
        ("bare LF after the data", "3\r\nabc\n0\r\n\r\n"),
        ("data longer than its size", "3\r\nabcd\r\n0\r\n\r\n"),
        ("data shorter than its size", "4\r\nabc\r\n0\r\n\r\n"),
        ("size beyond 64 bits", "10000000000000003\r\nabc\r\n0\r\n\r\n"),
        ("size of minus one", "ffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        ("bare LF in an extension", "3;a=\nb\r\nabc\r\n0\r\n\r\n"),
        ("NUL in an extension", "3;a=\0\r\nabc\r\n0\r\n\r\n"),
        ("bad trailer", "3\r\nabc\r\n0\r\nX Y: z\r\n\r\n"),
        ("folded trailer", "3\r\nabc\r\n0\r\nX: y\r\n z\r\n\r\n"),
        ("bare LF at the end", "3\r\nabc\r\n0\r\n\n"),
    ];
    let origin = echo();
    let gateway = strict(&origin);
    let mut wrong = Vec::new();
    for (name, body) in BROKEN {
        let mut client = gateway.connect();
        client.set_patience(Duration::from_secs(2));
        let start = Instant::now();
        let head = "POST /chunks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.send(format!("{head}{body}GET /second HTTP/1.1\r\nHost: a\r\n\r\n"));
        let received = client.read_to_end();
        let answers = received.windows(9).filter(|window| window == b"HTTP/1.1 ").count();
        if status(&received) != Some(400) || answers != 1 || start.elapsed() > Duration::from_millis(1_500) {
            let received = String::from_utf8_lossy(&received).into_owned();
            wrong.push(format!("{name}: expected 400 and the end, got {received:?} after {:?}", start.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), BROKEN.len(), wrong.join("\n"));
    assert_eq!(origin.count(), 0, "no request became whole");
}

#[test]
fn oversize_requests_are_refused_by_what_is_too_large() {
    let origin = echo();
    let gateway = strict(&origin);
    let field = |size: usize| format!("GET / HTTP/1.1\r\nHost: a\r\nX-A: {}\r\n\r\n", "x".repeat(size));
    let fields = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X-A: b\r\n".repeat(count));
    let target = |size: usize| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(size));
    let endless = format!("GET / HTTP/1.1\r\nHost: a\r\nX-A: {}", "x".repeat(5_000));
    let cases = [
        ("one long field", field(5_000), 431),
        ("a head without an end", endless, 431),
        ("many fields", fields(30), 431),
        ("very many fields", fields(300), 431),
        ("a long target", target(1_500), 414),
        ("a target beyond the whole head", target(8_000), 414),
        ("a long request line without an end", format!("GET /{}", "x".repeat(5_000)), 414),
    ];
    for (name, request, expected) in cases {
        let received = gateway.raw(request.as_bytes());
        assert_eq!(status(&received), Some(expected), "{name}: {:?}", String::from_utf8_lossy(&received));
    }
    assert_eq!(origin.bytes(), 0);
    // What just fits is let through.
    let keep = |request: String| request.replacen("\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1);
    for request in [field(3_500), fields(18), target(1_000)] {
        assert_eq!(status(&gateway.raw(keep(request).as_bytes())), Some(200));
    }
}

#[test]
fn an_oversize_body_gets_413_with_a_length_and_in_chunks() {
    let origin = echo();
    let gateway = strict(&origin);
    let received = gateway.raw(b"POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n");
    assert_eq!(status(&received), Some(413), "a length tells before the body comes");
    assert_eq!(origin.bytes(), 0);
    let mut client = gateway.connect();
    client.send("POST /chunks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    // The gateway may answer and close before the last byte.
    drop(client.try_send(&chunked(&[b'x'; 70_000], 7_000)));
    assert_eq!(client.answer().status, 413);
    assert!(client.is_closed_within(PATIENCE));
    assert_eq!(origin.count(), 0, "the origin never got a whole request");
    assert_eq!(gateway.request("POST", "/fits", &[], &[b'x'; 65_536]).text(), "POST /fits 65536");
}

const QUICK: &str = "[limits_http]\nheader_timeout = \"300ms\"\nidle_timeout = \"700ms\"\n";

#[test]
fn a_client_that_never_sends_a_byte_is_closed_after_the_header_timeout() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", QUICK));
    let start = Instant::now();
    let received = {
        let mut client = gateway.connect();
        client.set_patience(Duration::from_secs(3));
        client.read_to_end()
    };
    let waited = start.elapsed();
    assert!(received.is_empty() || status(&received) == Some(408), "{:?}", String::from_utf8_lossy(&received));
    assert!((Duration::from_millis(250)..Duration::from_secs(2)).contains(&waited), "{waited:?}");
}

#[test]
fn a_slow_head_gets_408() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", QUICK));
    let mut client = gateway.connect();
    let start = Instant::now();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nX-A: ");
    // A byte now and then does not help: the deadline is the head's, not the byte's.
    while client.try_send(b"x").is_ok() && start.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let received = client.read_to_end();
    assert_eq!(status(&received), Some(408), "{:?}", String::from_utf8_lossy(&received));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(origin.bytes(), 0);
}

#[test]
fn a_body_that_stops_gets_408() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", QUICK));
    let mut client = gateway.connect();
    let start = Instant::now();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc");
    assert_eq!(client.answer().status, 408);
    assert!(client.is_closed_within(PATIENCE));
    let waited = start.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_secs(3)).contains(&waited), "{waited:?}");
    assert_eq!(origin.count(), 0);
}

const RATED: &str = "[limits_http]\nidle_timeout = \"500ms\"\nbody_rate = \"1KiB\"\n";

#[test]
fn a_body_that_trickles_gets_408() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", RATED));
    let mut client = gateway.connect();
    let start = Instant::now();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n");
    // Never silent for as long as `idle_timeout`, and still far too slow.
    while client.try_send(b"x").is_ok() && start.elapsed() < Duration::from_millis(1_000) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(client.answer().status, 408);
    assert!(client.is_closed_within(PATIENCE));
    assert_eq!(origin.count(), 0);
    assert_eq!(gateway.metric("tidegate_requests_refused_total{reason=\"body_timeout\"}"), 1.0);
}

#[test]
fn a_client_that_sips_is_cut() {
    let body = vec![b'x'; 8 << 20];
    let origin = Origin::start(move |_| Script::ok(&[], &body));
    let gateway = Gateway::start(&one_route(origin.address, "", &RATED.replace("1KiB", "64MiB")));
    let mut client = gateway.connect();
    client.ask("/", &[]);
    let start = Instant::now();
    let mut taken = 0;
    while gateway.metric("tidegate_answers_cut_total{cut=\"write_failed\"}") < 1.0 && start.elapsed() < PATIENCE {
        taken += client.some(20_000).len();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(gateway.metric("tidegate_answers_cut_total{cut=\"write_failed\"}"), 1.0, "after {taken} bytes");
}

#[test]
fn a_body_of_get_is_refused_where_it_is_told_to_be() {
    let origin = echo();
    let asks = "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab";
    let gateway = Gateway::start(&one_route(origin.address, "", "[limits_http]\nget_body = \"refuse\"\n"));
    assert_eq!(status(&gateway.raw(asks.as_bytes())), Some(400));
    assert_eq!(gateway.metric("tidegate_requests_refused_total{reason=\"body_of_get\"}"), 1.0);
    assert_eq!(gateway.get("/", &[]).status, 200);
    assert_eq!(origin.count(), 1);
    let lenient = Gateway::start(&one_route(origin.address, "", ""));
    assert_eq!(lenient.request("GET", "/", &[], b"ab").text(), "GET / 2");
}

/// An origin that answers before it has read a body larger than what is drained, and does not close.
#[test]
fn a_body_that_nobody_reads_never_becomes_the_next_request() {
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    // More than sockets hold, less than `body_bytes`.
    let body = smuggled.repeat(400_000);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let seen = std::thread::spawn(move || {
        let mut heads = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut head = [0; 200];
            let count = std::io::Read::read(&mut stream, &mut head).expect("a head");
            heads.push(String::from_utf8_lossy(&head[..count]).lines().next().unwrap_or_default().to_owned());
            std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("it reads");
            // Held open: were it pooled, the next request would be sent here.
            std::mem::forget(stream);
        }
        heads
    });
    let gateway = Gateway::start(&one_route(address, "", ""));
    let mut client = gateway.connect();
    client.send(format!("POST /large HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()));
    // The answer may overtake the body.
    let _sent_or_closed = client.try_send(body.as_bytes());
    assert_eq!(client.answer().status, 200);
    assert!(client.is_closed_within(PATIENCE));
    assert_eq!(gateway.get("/next", &[]).status, 200);
    assert_eq!(seen.join().expect("no panic"), ["POST /large HTTP/1.1", "GET /next HTTP/1.1"]);
}

#[test]
fn an_idle_connection_is_closed_after_the_idle_timeout() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", QUICK));
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).status, 200);
    let start = Instant::now();
    assert!(client.is_closed_within(Duration::from_secs(3)));
    let waited = start.elapsed();
    assert!((Duration::from_millis(600)..Duration::from_secs(2)).contains(&waited), "{waited:?}");
}

#[test]
fn three_requests_in_one_write_get_three_answers_in_order() {
    let origin = echo();
    let gateway = strict(&origin);
    let mut client = gateway.connect();
    client.send(
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
         GET /3 HTTP/1.1\r\nHost: a\r\n\r\n",
    );
    let answers: Vec<String> = (0..3).map(|_| client.answer().text()).collect();
    assert_eq!(answers, ["GET /1 0", "POST /2 3", "GET /3 0"]);
    assert_eq!(client.get("/4", &[]).text(), "GET /4 0", "the connection lives on");
}

#[test]
fn a_malformed_request_behind_a_good_one_leaves_the_good_answer() {
    let origin = echo();
    let gateway = strict(&origin);
    let mut client = gateway.connect();
    client.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.answer().text(), "GET /1 0");
    assert_eq!(client.answer().status, 400);
    assert!(client.is_closed_within(PATIENCE));
    assert_eq!(origin.count(), 1);
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let origin = echo();
    let gateway = strict(&origin);
    let mut client = gateway.connect();
    let bodies = [
        "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        "POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\nX-T: 1\r\n\r\n",
    ];
    for (request, expected) in bodies.into_iter().zip(["POST /a 3", "POST /b 3"]) {
        request.bytes().for_each(|byte| client.send([byte]));
        assert_eq!(client.answer().text(), expected);
    }
}

#[test]
fn odd_but_valid_requests_pass() {
    let origin = echo();
    let gateway = strict(&origin);
    let valid = [
        ("empty line before", "\r\nGET /a HTTP/1.1\r\nHost: a\r\n", "GET /a 0"),
        ("absolute target", "GET http://a/b?c=d HTTP/1.1\r\nHost: a\r\n", "GET /b?c=d 0"),
        ("no blank after the colon", "GET /c HTTP/1.1\r\nHost:a\r\nX-A:b\r\n", "GET /c 0"),
        ("blanks around a value", "GET /d HTTP/1.1\r\nHost: \t a \t\r\n", "GET /d 0"),
        ("an empty value", "GET /e HTTP/1.1\r\nHost: a\r\nX-A:\r\n", "GET /e 0"),
        ("Latin-1 in a value", "GET /f HTTP/1.1\r\nHost: a\r\nX-A: \u{e4}\r\n", "GET /f 0"),
        ("an IPv6 host", "GET /g HTTP/1.1\r\nHost: [::1]:8080\r\n", "GET /g 0"),
        ("a method of its own", "PURGEALL /h HTTP/1.1\r\nHost: a\r\n", "PURGEALL /h 0"),
        ("HTTP/1.0 without Host", "GET /i HTTP/1.0\r\n", "GET /i 0"),
        ("mixed case chunked", "POST /j HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n", "POST /j 3"),
        ("zeros before a length", "POST /k HTTP/1.1\r\nHost: a\r\nContent-Length: 003\r\n", "POST /k 3"),
    ];
    for (name, head, expected) in valid {
        let body = if head.contains("Chunked") {
            "3\r\nabc\r\n0\r\n\r\n"
        } else if head.contains("Length") {
            "abc"
        } else {
            ""
        };
        let mut client = gateway.connect();
        client.send(format!("{head}\r\n{body}"));
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, expected.to_owned()), "{name}");
    }
}

#[test]
fn http_10_and_connection_close_end_the_connection_after_the_answer() {
    let origin = echo();
    let gateway = strict(&origin);
    for request in ["GET / HTTP/1.0\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"] {
        let mut client = gateway.connect();
        client.send(request);
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, "GET / 0".into()));
        assert!(client.is_closed_within(PATIENCE));
    }
    let mut client = gateway.connect();
    for _ in 0..2 {
        client.send("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(client.answer().text(), "GET / 0");
    }
}

#[test]
fn a_chunked_answer_reaches_an_http_10_client_without_chunks() {
    let origin =
        Origin::start(|_| Script::new().head(200, &[("Transfer-Encoding", "chunked")]).send("3\r\nabc\r\n0\r\n\r\n"));
    let gateway = strict(&origin);
    let mut client = gateway.connect();
    client.send("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
    let answer = client.answer();
    assert_eq!((answer.field("transfer-encoding"), answer.text()), (None, "abc".into()));
}

#[test]
fn expect_100_continue_is_answered_before_the_body_comes() {
    let origin = echo();
    let gateway = strict(&origin);
    let mut client = gateway.connect();
    client.send("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.head().status, 100);
    client.send("abc");
    assert_eq!(client.answer().text(), "POST /a 3");
    assert_eq!(origin.last().field("expect"), None, "the gateway met the expectation itself");
    // A body that will be refused is not asked for.
    client.send("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.answer().status, 413);
}

#[test]
fn a_client_that_leaves_inside_its_body_leaves_no_whole_request() {
    let origin = echo();
    let gateway = strict(&origin);
    for head in ["Content-Length: 10\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"] {
        let mut client = gateway.connect();
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{head}"));
        client.finish();
        let received = client.read_to_end();
        assert!(received.is_empty() || status(&received) == Some(400), "{:?}", String::from_utf8_lossy(&received));
    }
    assert_eq!(origin.count(), 0);
    assert_eq!(gateway.get("/after", &[]).text(), "GET /after 0");
}

#[test]
fn one_address_holds_no_more_connections_than_it_may() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", "[limits_http]\nconnections_per_ip = 3\n"));
    let mut held: Vec<Client> = (0..3).map(|_| gateway.connect()).collect();
    held.iter_mut().for_each(|client| assert_eq!(client.get("/", &[]).status, 200));
    assert!(gateway.connect().is_closed_within(PATIENCE), "the fourth is closed as it arrives");
    let other = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
    assert_eq!(
        Client::connect_from(other, gateway.address).get("/", &[]).status,
        200,
        "another address is not affected"
    );
    held.pop();
    wait_for(
        || {
            let mut client = gateway.connect();
            client.try_send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").is_ok()
                && client.try_head().is_ok_and(|answer| answer.status == 200)
        },
        PATIENCE,
    );
}

#[test]
fn trailers_pass_but_for_those_that_identify() {
    let origin = echo();
    let identity = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-account\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "", identity));
    let body = "3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-Account: eve\r\nAuthorization: Basic eDp5\r\n\r\n";
    let head = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let answer = String::from_utf8_lossy(&gateway.raw(format!("{head}{body}").as_bytes())).into_owned();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let sent = String::from_utf8_lossy(&origin.last().raw).into_owned();
    assert!(sent.ends_with("\r\n0\r\nX-Sum: 1\r\n\r\n"), "{sent}");
}
