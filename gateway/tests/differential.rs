//! Compares the engine with other parsers of the same bytes: hyper accepts and parses alike what
//! the engine accepts, and the reference parser sees exactly one request in what the gateway
//! forwards.

mod support;

#[path = "corpus/format.rs"]
#[allow(dead_code, reason = "only `latin1` is used here")]
mod format;
#[path = "corpus/generate.rs"]
mod generate;
#[path = "corpus/raw_origin.rs"]
#[allow(dead_code, reason = "each test binary uses a different part")]
mod raw_origin;
#[path = "corpus/raw_client.rs"]
#[allow(dead_code, reason = "each test binary uses a different part")]
mod raw_client;
#[path = "corpus/reference_parser.rs"]
#[allow(dead_code, reason = "each test binary uses a different part")]
mod reference_parser;

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use format::latin1;
use gateway::testing::Fields;
use gateway::testing::HttpLimits;
use gateway::testing::fuzzing;
use gateway::testing::{BodyLength, Request, target};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use raw_client::{RawClient, Split};
use raw_origin::{RawOrigin, ScriptedResponse};
use support::{Gateway, lock, one_route};
use tokio::io::AsyncWriteExt as _;

/// A parsed request, in a form that can be compared between parsers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ParsedRequest {
    method: String,
    target: String,
    /// Lines with lower-case names, sorted by name; lines of the same name in order.
    fields: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    /// Likewise; for the engine, the allowed trailers.
    trailers: Vec<(String, Vec<u8>)>,
}

/// Result of parsing the front of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ParseOutcome {
    /// A request, its length in bytes, and whether another one may follow.
    Request(ParsedRequest, usize, bool),
    Refused(u16),
    Incomplete,
}

/// Parses `bytes` with the engine, fed in pieces.
fn parse_with_engine(bytes: &[u8], piece: usize, limits: &HttpLimits) -> ParseOutcome {
    let mut request = Request::default();
    let head = match fuzzing::parse_request_head(bytes, piece, limits, &mut request) {
        None => return ParseOutcome::Incomplete,
        Some(Err(refusal)) => return ParseOutcome::Refused(refusal.status().as_u16()),
        Some(Ok(head)) => head,
    };
    let rest = &bytes[head.length..];
    let (mut body, mut trailers) = (Vec::new(), Fields::default());
    let length = match request.length {
        BodyLength::Empty | BodyLength::UntilClose => 0,
        BodyLength::Known(length) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let Some(data) = rest.get(..length) else { return ParseOutcome::Incomplete };
            body.extend_from_slice(data);
            length
        }
        BodyLength::Streamed => match fuzzing::decode_chunked(rest, piece, &mut body, &mut trailers) {
            None => return ParseOutcome::Incomplete,
            Some(Err(_)) => return ParseOutcome::Refused(400),
            Some(Ok(length)) => length,
        },
    };
    let (fields, trailers) = (sorted(&request.fields), sorted(&trailers));
    let parsed = ParsedRequest { method: request.method.to_string(), target: request.target, fields, body, trailers };
    ParseOutcome::Request(parsed, head.length + length, head.keep_alive)
}

fn sorted(fields: &Fields) -> Vec<(String, Vec<u8>)> {
    let lines = fields.iter().map(|field| (latin1(field.name).to_ascii_lowercase(), field.value.to_vec()));
    let mut lines: Vec<_> = lines.collect();
    lines.sort_by(|a, b| a.0.cmp(&b.0));
    lines
}

fn sorted_map(fields: &hyper::HeaderMap) -> Vec<(String, Vec<u8>)> {
    let lines = fields.iter().map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()));
    let mut lines: Vec<_> = lines.collect();
    lines.sort_by(|a, b| a.0.cmp(&b.0));
    lines
}

/// Parses the same bytes with hyper's server: all requests that it passed to a service completely.
fn parse_with_hyper(bytes: &[u8]) -> Vec<ParsedRequest> {
    thread_local!(static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));
    RUNTIME.with(|runtime| runtime.block_on(serve_with_hyper(bytes)))
}

async fn serve_with_hyper(bytes: &[u8]) -> Vec<ParsedRequest> {
    let (mut client, server) = tokio::io::duplex(bytes.len().max(1) + 64 * 1024);
    client.write_all(bytes).await.expect("room for all bytes");
    client.shutdown().await.expect("an open pipe");
    let hyper_requests = Rc::new(RefCell::new(Vec::new()));
    let service = hyper::service::service_fn(|request: hyper::Request<Incoming>| {
        let hyper_requests = Rc::clone(&hyper_requests);
        async move {
            if let Some(parsed) = collect(request).await {
                hyper_requests.borrow_mut().push(parsed);
            }
            Ok::<_, Infallible>(hyper::Response::new(String::new()))
        }
    });
    // An error on the bytes after the requests does not matter.
    drop(
        hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(server), service)
            .await,
    );
    hyper_requests.take()
}

async fn collect(request: hyper::Request<Incoming>) -> Option<ParsedRequest> {
    let (parts, mut body) = request.into_parts();
    let (mut data, mut trailers) = (Vec::new(), Vec::new());
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        match frame.ok()?.into_data() {
            Ok(piece) => data.extend_from_slice(&piece),
            Err(frame) => trailers = frame.trailers_ref().map(sorted_map).unwrap_or_default(),
        }
    }
    let mut fields = sorted_map(&parts.headers);
    if parts.uri.authority().is_some() {
        // The authority of the target replaces it.
        fields.retain(|(name, _)| name != "host");
    }
    let target = parts.uri.path_and_query().map(|target| target.as_str().to_owned()).unwrap_or_default();
    let target = if target.starts_with('?') { format!("/{target}") } else { target };
    // The absolute form without a path, for OPTIONS only (RFC 9112 section 3.2.4).
    let is_star = parts.method == "OPTIONS" && parts.uri.authority().is_some() && target == "/";
    let target = if is_star { "*|/".to_owned() } else { target };
    Some(ParsedRequest { method: parts.method.to_string(), target, fields, body: data, trailers })
}

/// Deterministic, so that failures are reproducible. `PROPTEST_CASES` sets another number of cases.
fn runner(cases: u32) -> TestRunner {
    let config = Config { failure_persistence: None, ..Config::default() };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { config.cases } else { cases };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(Config { cases, max_shrink_iters: 4_000, ..config }, rng)
}

#[test]
fn hyper_parses_accepted_requests_alike() {
    let limits = HttpLimits::default();
    let accepted = AtomicUsize::new(0);
    let result = runner(40_000).run(&generate::request(), |bytes| {
        let ParseOutcome::Request(mut own, length, _) = parse_with_engine(&bytes, usize::MAX, &limits) else {
            return Ok(());
        };
        accepted.fetch_add(1, Ordering::Relaxed);
        let hyper_requests = parse_with_hyper(&bytes[..length]);
        prop_assert_eq!(hyper_requests.len(), 1, "hyper saw {:?} in {:?}", hyper_requests, latin1(&bytes));
        let mut other = hyper_requests[0].clone();
        // Some trailers are dropped; the others are unchanged, and none is added.
        let allowed = std::mem::take(&mut own.trailers);
        prop_assert!(allowed.iter().all(|line| other.trailers.contains(line)), "{:?} of {:?}", allowed, other.trailers);
        other.trailers.clear();
        if !other.fields.iter().any(|(name, _)| name == "host") {
            own.fields.retain(|(name, _)| name != "host");
        }
        if let Ok(normal) = target::normal(&other.target, limits.paths) {
            other.target = normal;
        }
        if other.target == "*|/" && (own.target == "*" || own.target == "/") {
            own.target = other.target.clone();
        }
        prop_assert_eq!(own, other, "{:?}", latin1(&bytes));
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    let accepted = accepted.into_inner();
    assert!(accepted > 10_000, "only {accepted} were accepted: too few for a meaningful test");
}

#[test]
fn hyper_decodes_accepted_chunked_bodies_alike() {
    let accepted = AtomicUsize::new(0);
    let result = runner(20_000).run(&generate::mutated_chunks(), |chunks| {
        let (mut body, mut trailers) = (Vec::new(), Fields::default());
        let Some(Ok(length)) = fuzzing::decode_chunked(&chunks, usize::MAX, &mut body, &mut trailers) else {
            return Ok(());
        };
        accepted.fetch_add(1, Ordering::Relaxed);
        let request = [b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", &chunks[..length]].concat();
        let hyper_requests = parse_with_hyper(&request);
        prop_assert_eq!(hyper_requests.len(), 1, "hyper refused {:?}", latin1(&chunks));
        prop_assert_eq!(&hyper_requests[0].body, &body, "{:?}", latin1(&chunks));
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    let accepted = accepted.into_inner();
    assert!(accepted > 5_000, "only {accepted} were accepted: too few for a meaningful test");
}

#[test]
fn splitting_the_input_does_not_change_the_result() {
    let limits = HttpLimits::default();
    let result = runner(20_000).run(&(generate::request(), 1usize..40), |(bytes, piece)| {
        prop_assert_eq!(
            parse_with_engine(&bytes, usize::MAX, &limits),
            parse_with_engine(&bytes, piece, &limits),
            "{:?}",
            latin1(&bytes)
        );
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

/// Sent after every generated request. The gateway responds to it only if the end of the generated
/// request is certain.
const SENTINEL: &[u8] = b"GET /sentinel HTTP/1.1\r\nHost: sentinel\r\nConnection: close\r\n\r\n";

/// Request line, body, trailers.
type Forwarded = (String, Vec<u8>, Vec<(String, Vec<u8>)>);

/// The requests that the engine finds in `bytes`, and the status of the refusal after them.
fn expected_requests(bytes: &[u8], limits: &HttpLimits) -> (Vec<Forwarded>, Option<u16>) {
    let (mut at, mut requests) = (0, Vec::new());
    loop {
        match parse_with_engine(&bytes[at..], usize::MAX, limits) {
            ParseOutcome::Incomplete => return (requests, None),
            ParseOutcome::Refused(status) => return (requests, Some(status)),
            ParseOutcome::Request(request, length, keep_alive) => {
                let line = format!("{} {} HTTP/1.1", request.method, request.target);
                // The connection drops names with `_`, as in heads.
                let trailers = request.trailers.into_iter().filter(|(name, _)| !name.contains('_')).collect();
                requests.push((line, request.body, trailers));
                at += length;
                if !keep_alive {
                    return (requests, None);
                }
            }
        }
    }
}

#[test]
fn exactly_the_accepted_requests_are_forwarded() {
    const CASES: usize = 4_000;
    const THREADS: usize = 4;
    let origin = RawOrigin::start(|request, _, is_complete| {
        let body = if request.start.starts_with("HEAD ") { "" } else { "ok" };
        is_complete.then(|| ScriptedResponse::one_piece(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}")))
    });
    // Short timeouts for incomplete requests.
    let short_timeouts = "[limits_http]\nheader_timeout = \"250ms\"\nidle_timeout = \"250ms\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", short_timeouts));
    let limits = HttpLimits::default();
    let mut runner = runner(1);
    let strategy = generate::request();
    let inputs: Vec<Vec<u8>> =
        (0..CASES).map(|_| strategy.new_tree(&mut runner).expect("a request").current()).collect();
    let address =
        |number: usize| IpAddr::V4(Ipv4Addr::from(0x7f02_0000 + u32::try_from(number * 2 + 1).expect("few cases")));
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(input) = inputs.get(number) else { return };
                    let bytes = [input, SENTINEL].concat();
                    let mut client = RawClient::connect(address(number), gateway.address);
                    let split = if number.is_multiple_of(2) { Split::Whole } else { Split::Halves };
                    client.send(&split.apply(&bytes, number));
                    if let Err(error) = client.read_until_closed() {
                        lock(&failures).push(format!("{error}: {:?}", latin1(input)));
                    }
                    let (_, refused) = expected_requests(&bytes, &limits);
                    let received = latin1(client.unparsed());
                    if refused.is_some_and(|status| !received.contains(&format!("HTTP/1.1 {status} "))) {
                        lock(&failures).push(format!("expected {refused:?}, got {received:?}: {:?}", latin1(input)));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap_or_default();
    let mut forwarded = std::collections::HashMap::<String, Vec<reference_parser::Message>>::new();
    for record in origin.records() {
        failures.extend(record.malformed.map(|error| format!("the origin received malformed bytes: {error}")));
        for request in record.requests {
            let sender = request.get("x-forwarded-for").unwrap_or_default().to_owned();
            forwarded.entry(sender).or_default().push(request);
        }
    }
    for (number, input) in inputs.iter().enumerate() {
        let mut got = forwarded.remove(&address(number).to_string()).unwrap_or_default();
        got.sort_by_key(|request| request.number);
        let got: Vec<Forwarded> = got.into_iter().map(forwarded_as).collect();
        let (expected, _) = expected_requests(&[input, SENTINEL].concat(), &limits);
        if got != expected {
            failures.push(format!("{:?}: expected {expected:?}, the origin received {got:?}", latin1(input)));
        }
    }
    let is_accepted =
        |input: &&Vec<u8>| matches!(parse_with_engine(input, usize::MAX, &limits), ParseOutcome::Request(..));
    let accepted = inputs.iter().filter(is_accepted).count();
    assert!(accepted > CASES / 4, "only {accepted} were accepted: too few for a meaningful test");
    assert!(failures.is_empty(), "{} of {CASES}:\n{}", failures.len(), failures[..failures.len().min(20)].join("\n"));
}

fn forwarded_as(request: reference_parser::Message) -> Forwarded {
    let bytes =
        |text: &str| text.chars().map(|character| u8::try_from(u32::from(character)).expect("Latin-1")).collect();
    let lines = request.trailers.iter().map(|(name, value)| (name.to_ascii_lowercase(), bytes(value)));
    let mut trailers: Vec<(String, Vec<u8>)> = lines.collect();
    trailers.sort_by(|a, b| a.0.cmp(&b.0));
    (request.start, request.body, trailers)
}
