//! Responses to malformed, oversize and slow requests, which must not reach the origin, and to
//! unusual valid requests.

mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use support::client::chunked;
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, one_route, wait_for};

/// Limits so small that a test can exceed them quickly.
const SMALL: &str =
    "[limits_http]\nheader_bytes = \"4KiB\"\nheader_fields = 20\nuri_bytes = \"1KiB\"\nbody_bytes = \"64KiB\"\n";

fn echo() -> Origin {
    Origin::start(|request| Script::ok(&[], format!("{} {} {}", request.method, request.target, request.body.len())))
}

fn start_gateway(origin: &Origin) -> Gateway {
    Gateway::start(&one_route(origin.address, "", SMALL))
}

/// Requests with a malformed head: name, bytes, status.
const MALFORMED: &[(&str, &str, u16)] = &[
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
    ("length with a space inside", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3 0\r\n\r\nabc", 400),
    ("length with a zero before", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 03\r\n\r\nabc", 400),
    ("length of two zeros", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 00\r\n\r\n", 400),
    ("length as a word", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: three\r\n\r\nabc", 400),
    ("empty length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\nabc", 400),
    ("length of 2^63", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775808\r\n\r\n", 400),
    ("length of 2^64 + 3", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551619\r\n\r\nabc", 400),
    ("unknown coding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\nabc", 501),
    ("chunked not last", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
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
    ("space before the colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    ("tab before the colon", "GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", 400),
    ("space before the colon of a length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\nabc", 400),
    ("no colon", "GET / HTTP/1.1\r\nHost: a\r\nX-A\r\n\r\n", 400),
    ("no name", "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400),
    ("space in a name", "GET / HTTP/1.1\r\nHost: a\r\nX A: b\r\n\r\n", 400),
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
    ("Host with a space", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("Host as a list", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ("Host with a bad port", "GET / HTTP/1.1\r\nHost: a:x\r\n\r\n", 400),
    ("Host with a port too great", "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", 400),
    ("Host with an open bracket", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    ("Host with a query", "GET / HTTP/1.1\r\nHost: a?b\r\n\r\n", 400),
    ("bad Host beside an absolute target", "GET http://b/ HTTP/1.1\r\nHost: a/\r\n\r\n", 400),
    ("bad authority of the target", "GET http://b:x/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("Host beyond ASCII", "GET / HTTP/1.1\r\nHost: b\u{fc}cher.example\r\n\r\n", 400),
    // Request line.
    ("no version", "GET /\r\nHost: a\r\n\r\n", 400),
    ("lower-case version", "GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("version with letters", "GET / HTTP/1.x\r\nHost: a\r\n\r\n", 400),
    ("version of two digits", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    ("version 2.0", "GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ("version 1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    ("version 0.9", "GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    ("two spaces", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("tab instead of a space", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space at the start", " GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space at the end", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    ("no target", "GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("bad method", "G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target without a slash", "GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target with a fragment", "GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target beyond ASCII", "GET /\u{e4} HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("encoded NUL in the path", "GET /a%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("encoded line end in the path", "GET /a%0d%0aX:%20y HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("incomplete percent-encoding in the path", "GET /a%4 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("backslash in the path", "GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("encoded slash", "GET /a%2fb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("encoded backslash", "GET /a%5Cb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("dot segment with a parameter", "GET /a/..;/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("quotes in the target", "GET /a?\"b\" HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("NUL in the target", "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("another scheme", "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("asterisk with GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("CONNECT", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405),
    ("TRACE", "TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    ("unknown expectation", "POST / HTTP/1.1\r\nHost: a\r\nExpect: unknown\r\nContent-Length: 3\r\n\r\nabc", 417),
    ("another protocol", "\x16\x03\x01\x02\r\n\r\n\r\n", 400),
];

/// The status of the first response in `bytes`.
fn status(bytes: &[u8]) -> Option<u16> {
    std::str::from_utf8(bytes.get(9..12)?).ok()?.parse().ok()
}

#[test]
fn malformed_requests_are_refused_and_closed() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let mut failures = Vec::new();
    for (name, request, expected) in MALFORMED {
        let mut client = gateway.connect();
        client.set_read_timeout(Duration::from_secs(2));
        let start = Instant::now();
        // The gateway must not read the second request: it could be smuggled.
        client.send(format!("{request}GET /second HTTP/1.1\r\nHost: a\r\n\r\n"));
        let received = client.read_to_end();
        let responses = received.windows(9).filter(|window| window == b"HTTP/1.1 ").count();
        if status(&received) != Some(*expected) || responses != 1 || start.elapsed() > Duration::from_millis(1_500) {
            let received = String::from_utf8_lossy(&received).into_owned();
            failures
                .push(format!("{name}: expected {expected} and the end, got {received:?} after {:?}", start.elapsed()));
        }
    }
    assert!(
        MALFORMED.len() >= 60 && failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        MALFORMED.len(),
        failures.join("\n")
    );
    assert_eq!((origin.bytes(), origin.connections()), (0, 0), "no byte reached the origin");
}

#[test]
fn malformed_chunks_close_the_connection_and_never_complete_a_request() {
    const MALFORMED_CHUNKS: &[(&str, &str)] = &[
        ("size not hexadecimal", "zz\r\nabc\r\n0\r\n\r\n"),
        ("size with a sign", "+3\r\nabc\r\n0\r\n\r\n"),
        ("size with a prefix", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("no size", "\r\nabc\r\n0\r\n\r\n"),
        ("space before the size", " 3\r\nabc\r\n0\r\n\r\n"),
        ("space after the size", "3 \r\nabc\r\n0\r\n\r\n"),
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
    let gateway = start_gateway(&origin);
    let mut failures = Vec::new();
    for (name, body) in MALFORMED_CHUNKS {
        let mut client = gateway.connect();
        client.set_read_timeout(Duration::from_secs(2));
        let start = Instant::now();
        let head = "POST /chunks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.send(format!("{head}{body}GET /second HTTP/1.1\r\nHost: a\r\n\r\n"));
        let received = client.read_to_end();
        let responses = received.windows(9).filter(|window| window == b"HTTP/1.1 ").count();
        if status(&received) != Some(400) || responses != 1 || start.elapsed() > Duration::from_millis(1_500) {
            let received = String::from_utf8_lossy(&received).into_owned();
            failures.push(format!("{name}: expected 400 and the end, got {received:?} after {:?}", start.elapsed()));
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), MALFORMED_CHUNKS.len(), failures.join("\n"));
    assert_eq!(origin.count(), 0, "no request was completed");
}

#[test]
fn oversize_requests_are_refused_with_the_status_of_the_exceeded_limit() {
    let origin = echo();
    let gateway = start_gateway(&origin);
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
        ("a long method", format!("{} / HTTP/1.1\r\nHost: a\r\n\r\n", "A".repeat(1_000)), 501),
        ("a method longer than any target", format!("{} / HTTP/1.1\r\nHost: a\r\n\r\n", "A".repeat(100_000)), 400),
        ("a long method without an end", "A".repeat(5_000), 400),
        ("a long line that is no request", "\u{1}".repeat(5_000), 400),
        ("a target beyond the whole head", target(8_000), 414),
        ("a long request line without an end", format!("GET /{}", "x".repeat(5_000)), 414),
    ];
    for (name, request, expected) in cases {
        let received = gateway.raw(request.as_bytes());
        assert_eq!(status(&received), Some(expected), "{name}: {:?}", String::from_utf8_lossy(&received));
    }
    assert_eq!(origin.bytes(), 0);
    // Requests at the limits are accepted.
    let with_close = |request: String| request.replacen("\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1);
    for request in [field(3_500), fields(18), target(1_000)] {
        assert_eq!(status(&gateway.raw(with_close(request).as_bytes())), Some(200));
    }
}

#[test]
fn oversize_body_gets_413_with_length_and_chunked() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let received = gateway.raw(b"POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n");
    assert_eq!(status(&received), Some(413), "the length is refused before the body arrives");
    assert_eq!(origin.bytes(), 0);
    let mut client = gateway.connect();
    client.send("POST /chunks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    // The gateway may respond and close before the last byte.
    drop(client.try_send(&chunked(&[b'x'; 70_000], 7_000)));
    assert_eq!(client.read_response().status, 413);
    assert!(client.is_closed_within(STEP_TIMEOUT));
    assert_eq!(origin.count(), 0, "the origin received no complete request");
    assert_eq!(gateway.request("POST", "/fits", &[], &[b'x'; 65_536]).text(), "POST /fits 65536");
}

const SHORT_TIMEOUTS: &str = "[limits_http]\nheader_timeout = \"300ms\"\nidle_timeout = \"700ms\"\n";

#[test]
fn silent_client_is_closed_after_the_header_timeout() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", SHORT_TIMEOUTS));
    let start = Instant::now();
    let received = {
        let mut client = gateway.connect();
        client.set_read_timeout(Duration::from_secs(3));
        client.read_to_end()
    };
    let waited = start.elapsed();
    assert!(received.is_empty() || status(&received) == Some(408), "{:?}", String::from_utf8_lossy(&received));
    assert!((Duration::from_millis(250)..Duration::from_secs(2)).contains(&waited), "{waited:?}");
}

#[test]
fn slow_head_gets_408() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", SHORT_TIMEOUTS));
    let mut client = gateway.connect();
    let start = Instant::now();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nX-A: ");
    // The deadline covers the whole head; single bytes do not extend it.
    while client.try_send(b"x").is_ok() && start.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let received = client.read_to_end();
    assert_eq!(status(&received), Some(408), "{:?}", String::from_utf8_lossy(&received));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(origin.bytes(), 0);
}

#[test]
fn stalled_body_gets_408() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", SHORT_TIMEOUTS));
    let mut client = gateway.connect();
    let start = Instant::now();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc");
    assert_eq!(client.read_response().status, 408);
    assert!(client.is_closed_within(STEP_TIMEOUT));
    let waited = start.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_secs(3)).contains(&waited), "{waited:?}");
    assert_eq!(origin.count(), 0);
}

const MIN_RATE: &str = "[limits_http]\nidle_timeout = \"500ms\"\nbody_rate = \"1KiB\"\n";

#[test]
fn body_below_the_minimum_rate_gets_408() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", MIN_RATE));
    let mut client = gateway.connect();
    let start = Instant::now();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n");
    // Never idle for `idle_timeout`, but below the minimum rate.
    while client.try_send(b"x").is_ok() && start.elapsed() < Duration::from_millis(1_000) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(client.read_response().status, 408);
    assert!(client.is_closed_within(STEP_TIMEOUT));
    assert_eq!(origin.count(), 0);
    assert_eq!(gateway.metric("tidegate_requests_refused_total{reason=\"body_timeout\"}"), 1.0);
}

#[test]
fn response_to_a_client_below_the_minimum_rate_is_aborted() {
    let body = vec![b'x'; 8 << 20];
    let origin = Origin::start(move |_| Script::ok(&[], &body));
    let gateway = Gateway::start(&one_route(origin.address, "", &MIN_RATE.replace("1KiB", "64MiB")));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    let start = Instant::now();
    let mut taken = 0;
    while gateway.metric("tidegate_responses_aborted_total{reason=\"client_timeout\"}") < 1.0
        && start.elapsed() < STEP_TIMEOUT
    {
        taken += client.read_bytes(20_000).len();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(
        gateway.metric("tidegate_responses_aborted_total{reason=\"client_timeout\"}"),
        1.0,
        "after {taken} bytes"
    );
}

#[test]
fn body_of_get_is_refused_if_configured() {
    let origin = echo();
    let request = "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab";
    let gateway = Gateway::start(&one_route(origin.address, "", "[limits_http]\nget_body = \"refuse\"\n"));
    assert_eq!(status(&gateway.raw(request.as_bytes())), Some(400));
    assert_eq!(gateway.metric("tidegate_requests_refused_total{reason=\"body_of_get\"}"), 1.0);
    assert_eq!(gateway.get("/", &[]).status, 200);
    assert_eq!(origin.count(), 1);
    let lenient = Gateway::start(&one_route(origin.address, "", ""));
    assert_eq!(lenient.request("GET", "/", &[], b"ab").text(), "GET / 2");
}

/// The origin responds before it has read a body larger than the drain limit, and does not close.
#[test]
fn unread_body_never_becomes_the_next_request() {
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    // Larger than the socket buffers, smaller than `body_bytes`.
    let body = smuggled.repeat(400_000);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let request_lines = std::thread::spawn(move || {
        let mut heads = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut head = [0; 200];
            let count = std::io::Read::read(&mut stream, &mut head).expect("a head");
            heads.push(String::from_utf8_lossy(&head[..count]).lines().next().unwrap_or_default().to_owned());
            std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("it reads");
            // Kept open: if the gateway reused it, the next request would arrive here.
            std::mem::forget(stream);
        }
        heads
    });
    let gateway = Gateway::start(&one_route(address, "", ""));
    let mut client = gateway.connect();
    client.send(format!("POST /large HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()));
    // The response may arrive before the body is sent.
    let _sent_or_closed = client.try_send(body.as_bytes());
    assert_eq!(client.read_response().status, 200);
    assert!(client.is_closed_within(STEP_TIMEOUT));
    assert_eq!(gateway.get("/next", &[]).status, 200);
    assert_eq!(request_lines.join().expect("no panic"), ["POST /large HTTP/1.1", "GET /next HTTP/1.1"]);
}

#[test]
fn idle_connection_is_closed_after_the_idle_timeout() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", SHORT_TIMEOUTS));
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).status, 200);
    let start = Instant::now();
    assert!(client.is_closed_within(Duration::from_secs(3)));
    let waited = start.elapsed();
    assert!((Duration::from_millis(600)..Duration::from_secs(2)).contains(&waited), "{waited:?}");
}

#[test]
fn pipelined_requests_get_responses_in_order() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let mut client = gateway.connect();
    client.send(
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
         GET /3 HTTP/1.1\r\nHost: a\r\n\r\n",
    );
    let responses: Vec<String> = (0..3).map(|_| client.read_response().text()).collect();
    assert_eq!(responses, ["GET /1 0", "POST /2 3", "GET /3 0"]);
    assert_eq!(client.get("/4", &[]).text(), "GET /4 0", "the connection stays open");
}

#[test]
fn malformed_pipelined_request_does_not_affect_the_response_before_it() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let mut client = gateway.connect();
    client.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.read_response().text(), "GET /1 0");
    assert_eq!(client.read_response().status, 400);
    assert!(client.is_closed_within(STEP_TIMEOUT));
    assert_eq!(origin.count(), 1);
}

#[test]
fn request_may_arrive_byte_by_byte() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let mut client = gateway.connect();
    let bodies = [
        "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        "POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\nX-T: 1\r\n\r\n",
    ];
    for (request, expected) in bodies.into_iter().zip(["POST /a 3", "POST /b 3"]) {
        request.bytes().for_each(|byte| client.send([byte]));
        assert_eq!(client.read_response().text(), expected);
    }
}

#[test]
fn unusual_but_valid_requests_are_forwarded() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let valid = [
        ("empty line before", "\r\nGET /a HTTP/1.1\r\nHost: a\r\n", "GET /a 0"),
        ("absolute target", "GET http://a/b?c=d HTTP/1.1\r\nHost: a\r\n", "GET /b?c=d 0"),
        ("no space after the colon", "GET /c HTTP/1.1\r\nHost:a\r\nX-A:b\r\n", "GET /c 0"),
        ("spaces around a value", "GET /d HTTP/1.1\r\nHost: \t a \t\r\n", "GET /d 0"),
        ("an empty value", "GET /e HTTP/1.1\r\nHost: a\r\nX-A:\r\n", "GET /e 0"),
        ("Latin-1 in a value", "GET /f HTTP/1.1\r\nHost: a\r\nX-A: \u{e4}\r\n", "GET /f 0"),
        ("an IPv6 host", "GET /g HTTP/1.1\r\nHost: [::1]:8080\r\n", "GET /g 0"),
        ("a custom method", "PURGEALL /h HTTP/1.1\r\nHost: a\r\n", "PURGEALL /h 0"),
        ("HTTP/1.0 without Host", "GET /i HTTP/1.0\r\n", "GET /i 0"),
        ("mixed case chunked", "POST /j HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n", "POST /j 3"),
        ("a length of zero", "POST /k HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n", "POST /k 0"),
        ("a Host with a dot and an empty port", "GET /l HTTP/1.1\r\nHost: a.:\r\n", "GET /l 0"),
        ("another Host than that of the target", "GET http://b/m HTTP/1.1\r\nHost: a\r\n", "GET /m 0"),
        ("a backtick in the query", "GET /n?a=`b` HTTP/1.1\r\nHost: a\r\n", "GET /n?a=%60b%60 0"),
    ];
    for (name, head, expected) in valid {
        let body = if head.contains("Chunked") {
            "3\r\nabc\r\n0\r\n\r\n"
        } else if head.contains("Length: 3") {
            "abc"
        } else {
            ""
        };
        let mut client = gateway.connect();
        client.send(format!("{head}\r\n{body}"));
        let response = client.read_response();
        assert_eq!((response.status, response.text()), (200, expected.to_owned()), "{name}");
    }
}

#[test]
fn http_10_and_connection_close_close_after_the_response() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    for request in ["GET / HTTP/1.0\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"] {
        let mut client = gateway.connect();
        client.send(request);
        let response = client.read_response();
        assert_eq!((response.status, response.text()), (200, "GET / 0".into()));
        assert!(client.is_closed_within(STEP_TIMEOUT));
    }
    let mut client = gateway.connect();
    for _ in 0..2 {
        client.send("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(client.read_response().text(), "GET / 0");
    }
}

#[test]
fn chunked_response_is_sent_unchunked_to_an_http_10_client() {
    let origin =
        Origin::start(|_| Script::new().head(200, &[("Transfer-Encoding", "chunked")]).send("3\r\nabc\r\n0\r\n\r\n"));
    let gateway = start_gateway(&origin);
    let mut client = gateway.connect();
    client.send("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
    let response = client.read_response();
    assert_eq!((response.field("transfer-encoding"), response.text()), (None, "abc".into()));
}

#[test]
fn expect_100_continue_is_handled_before_the_body_arrives() {
    let origin = echo();
    let gateway = start_gateway(&origin);
    let mut client = gateway.connect();
    client.send("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.read_head().status, 100);
    client.send("abc");
    assert_eq!(client.read_response().text(), "POST /a 3");
    assert_eq!(origin.last().field("expect"), None, "the gateway handled the expectation itself");
    // No `100 Continue` for a body that will be refused.
    client.send("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.read_response().status, 413);
}

#[test]
fn client_that_disconnects_inside_its_body_completes_no_request() {
    let origin = echo();
    let gateway = start_gateway(&origin);
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
fn connections_per_address_are_limited() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", "[limits_http]\nconnections_per_ip = 3\n"));
    let mut open: Vec<Client> = (0..3).map(|_| gateway.connect()).collect();
    open.iter_mut().for_each(|client| assert_eq!(client.get("/", &[]).status, 200));
    assert!(gateway.connect().is_closed_within(STEP_TIMEOUT), "the fourth is closed on arrival");
    let other = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
    assert_eq!(
        Client::connect_from(other, gateway.address).get("/", &[]).status,
        200,
        "another address is not affected"
    );
    open.pop();
    wait_for(
        || {
            let mut client = gateway.connect();
            client.try_send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").is_ok()
                && client.try_read_head().is_ok_and(|response| response.status == 200)
        },
        STEP_TIMEOUT,
    );
}

#[test]
fn identity_fields_are_dropped_from_trailers() {
    let origin = echo();
    let identity = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-account\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "", identity));
    let body = "3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-Account: eve\r\nAuthorization: Basic eDp5\r\nX_Account: eve\r\nX-Forwarded-User: eve\r\nClient-IP: 1\r\n\r\n";
    let head = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let response = String::from_utf8_lossy(&gateway.raw(format!("{head}{body}").as_bytes())).into_owned();
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    let sent = String::from_utf8_lossy(&origin.last().raw).into_owned();
    assert!(sent.ends_with("\r\n0\r\nX-Sum: 1\r\n\r\n"), "{sent}");
}
