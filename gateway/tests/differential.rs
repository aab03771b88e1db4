//! The engine against other readers of the same bytes: hyper accepts what it accepts and reads it alike, and what it
//! forwards is exactly one request to a strict second reader.

mod support;

#[path = "corpus/format.rs"]
#[allow(dead_code, reason = "only its bytes-to-text is used here")]
mod format;
#[path = "corpus/generate.rs"]
mod generate;
#[path = "corpus/origin.rs"]
#[allow(dead_code, reason = "each test binary uses its own part of it")]
mod origin;
#[path = "corpus/talk.rs"]
#[allow(dead_code, reason = "each test binary uses its own part of it")]
mod talk;
#[path = "corpus/wire.rs"]
#[allow(dead_code, reason = "each test binary uses its own part of it")]
mod wire;

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use format::latin1;
use gateway::http::Limits;
use gateway::http::fields::Fields;
use gateway::http::h1::probe;
use gateway::http::message::{Length, Request};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use origin::{Play, RawOrigin};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use support::{Gateway, lock, one_route};
use talk::{Cutting, Talk};
use tokio::io::AsyncWriteExt as _;

/// A request as a reader understood it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Understood {
    method: String,
    target: String,
    /// Lower-case names, sorted by them; lines of one name in their order.
    fields: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    /// Likewise; of ours those that are passed on.
    trailers: Vec<(String, Vec<u8>)>,
}

/// What stands at the front of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Front {
    /// A request, the bytes it took, and whether another may follow it.
    Request(Understood, usize, bool),
    Refused(u16),
    Unfinished,
}

/// What the engine makes of `bytes` that arrive in pieces.
fn ours(bytes: &[u8], piece: usize, limits: &Limits) -> Front {
    let mut request = Request::default();
    let head = match probe::request_head(bytes, piece, limits, &mut request) {
        None => return Front::Unfinished,
        Some(Err(refusal)) => return Front::Refused(refusal.status().as_u16()),
        Some(Ok(head)) => head,
    };
    let rest = &bytes[head.length..];
    let (mut body, mut trailers) = (Vec::new(), Fields::default());
    let length = match request.length {
        Length::Empty | Length::UntilClose => 0,
        Length::Known(length) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let Some(data) = rest.get(..length) else { return Front::Unfinished };
            body.extend_from_slice(data);
            length
        }
        Length::Streamed => match probe::chunked(rest, piece, &mut body, &mut trailers) {
            None => return Front::Unfinished,
            Some(Err(_)) => return Front::Refused(400),
            Some(Ok(length)) => length,
        },
    };
    let (fields, trailers) = (sorted(&request.fields), sorted(&trailers));
    let understood = Understood { method: request.method.to_string(), target: request.target, fields, body, trailers };
    Front::Request(understood, head.length + length, head.keep_alive)
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

/// What hyper's server makes of the same bytes: every request that it handed to a service whole.
fn hypers(bytes: &[u8]) -> Vec<Understood> {
    thread_local!(static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));
    RUNTIME.with(|runtime| runtime.block_on(serve_with_hyper(bytes)))
}

async fn serve_with_hyper(bytes: &[u8]) -> Vec<Understood> {
    let (mut client, server) = tokio::io::duplex(bytes.len().max(1) + 64 * 1024);
    client.write_all(bytes).await.expect("room for all bytes");
    client.shutdown().await.expect("an open pipe");
    let seen = Rc::new(RefCell::new(Vec::new()));
    let service = hyper::service::service_fn(|request: hyper::Request<Incoming>| {
        let seen = Rc::clone(&seen);
        async move {
            if let Some(understood) = understand(request).await {
                seen.borrow_mut().push(understood);
            }
            Ok::<_, Infallible>(hyper::Response::new(String::new()))
        }
    });
    // That it fails on what follows is its own affair.
    drop(
        hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(server), service)
            .await,
    );
    seen.take()
}

async fn understand(request: hyper::Request<Incoming>) -> Option<Understood> {
    let (parts, mut body) = request.into_parts();
    let (mut data, mut trailers) = (Vec::new(), Vec::new());
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        match frame.ok()?.into_data() {
            Ok(piece) => data.extend_from_slice(&piece),
            Err(frame) => trailers = frame.trailers_ref().map(sorted_map).unwrap_or_default(),
        }
    }
    let fields = sorted_map(&parts.headers);
    let target = parts.uri.path_and_query().map(|target| target.as_str().to_owned()).unwrap_or_default();
    let target = if target.starts_with('?') { format!("/{target}") } else { target };
    // The form without a path that only OPTIONS has (RFC 9112 section 3.2.4).
    let is_star = parts.method == "OPTIONS" && parts.uri.authority().is_some() && target == "/";
    let target = if is_star { "*|/".to_owned() } else { target };
    Some(Understood { method: parts.method.to_string(), target, fields, body: data, trailers })
}

/// The same in every run, so that a failure is no matter of luck; `PROPTEST_CASES` asks for more.
fn runner(cases: u32) -> TestRunner {
    let config = Config { failure_persistence: None, ..Config::default() };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { config.cases } else { cases };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(Config { cases, max_shrink_iters: 4_000, ..config }, rng)
}

#[test]
fn what_the_engine_accepts_hyper_reads_alike() {
    let limits = Limits::default();
    let accepted = AtomicUsize::new(0);
    let result = runner(40_000).run(&generate::request(), |bytes| {
        let Front::Request(mut own, length, _) = ours(&bytes, usize::MAX, &limits) else { return Ok(()) };
        accepted.fetch_add(1, Ordering::Relaxed);
        let seen = hypers(&bytes[..length]);
        prop_assert_eq!(seen.len(), 1, "hyper saw {:?} in {:?}", seen, latin1(&bytes));
        let mut other = seen[0].clone();
        // Some trailers are dropped; of the others none is changed and none is new.
        let kept = std::mem::take(&mut own.trailers);
        prop_assert!(kept.iter().all(|line| other.trailers.contains(line)), "{:?} of {:?}", kept, other.trailers);
        other.trailers.clear();
        if other.target == "*|/" && (own.target == "*" || own.target == "/") {
            own.target = other.target.clone();
        }
        prop_assert_eq!(own, other, "{:?}", latin1(&bytes));
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    let accepted = accepted.into_inner();
    assert!(accepted > 10_000, "only {accepted} were accepted: the property says little");
}

#[test]
fn chunked_bodies_that_are_accepted_hyper_decodes_alike() {
    let accepted = AtomicUsize::new(0);
    let result = runner(20_000).run(&generate::damaged_chunks(), |chunks| {
        let (mut body, mut trailers) = (Vec::new(), Fields::default());
        let Some(Ok(length)) = probe::chunked(&chunks, usize::MAX, &mut body, &mut trailers) else { return Ok(()) };
        accepted.fetch_add(1, Ordering::Relaxed);
        let request = [b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", &chunks[..length]].concat();
        let seen = hypers(&request);
        prop_assert_eq!(seen.len(), 1, "hyper refused {:?}", latin1(&chunks));
        prop_assert_eq!(&seen[0].body, &body, "{:?}", latin1(&chunks));
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    let accepted = accepted.into_inner();
    assert!(accepted > 5_000, "only {accepted} were accepted: the property says little");
}

#[test]
fn how_bytes_are_cut_changes_nothing() {
    let limits = Limits::default();
    let result = runner(20_000).run(&(generate::request(), 1usize..40), |(bytes, piece)| {
        prop_assert_eq!(ours(&bytes, usize::MAX, &limits), ours(&bytes, piece, &limits), "{:?}", latin1(&bytes));
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

/// Sent behind every generated request: it is answered only where the gateway is sure where that one ended.
const SENTINEL: &[u8] = b"GET /sentinel HTTP/1.1\r\nHost: sentinel\r\nConnection: close\r\n\r\n";

/// Request line, body, trailers.
type Forwarded = (String, Vec<u8>, Vec<(String, Vec<u8>)>);

/// The requests that the engine sees in `bytes`, and the status that refuses the next one.
fn predict(bytes: &[u8], limits: &Limits) -> (Vec<Forwarded>, Option<u16>) {
    let (mut at, mut requests) = (0, Vec::new());
    loop {
        match ours(&bytes[at..], usize::MAX, limits) {
            Front::Unfinished => return (requests, None),
            Front::Refused(status) => return (requests, Some(status)),
            Front::Request(request, length, keep_alive) => {
                let line = format!("{} {} HTTP/1.1", request.method, request.target);
                requests.push((line, request.body, request.trailers));
                at += length;
                if !keep_alive {
                    return (requests, None);
                }
            }
        }
    }
}

#[test]
fn what_is_forwarded_is_exactly_the_requests_that_were_accepted() {
    const CASES: usize = 4_000;
    const THREADS: usize = 4;
    let origin = RawOrigin::start(|request, _, is_whole| {
        let body = if request.start.starts_with("HEAD ") { "" } else { "ok" };
        is_whole.then(|| Play::whole(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}")))
    });
    // What never ends is given up soon.
    let quick = "[limits_http]\nheader_timeout = \"250ms\"\nidle_timeout = \"250ms\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", quick));
    let limits = Limits::default();
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
                    let mut talk = Talk::connect(address(number), gateway.address);
                    let cutting = if number.is_multiple_of(2) { Cutting::Whole } else { Cutting::Halves };
                    talk.send(&cutting.cut(&bytes, number));
                    if let Err(error) = talk.end() {
                        lock(&failures).push(format!("{error}: {:?}", latin1(input)));
                    }
                    let (_, refused) = predict(&bytes, &limits);
                    let answered = latin1(talk.rest());
                    if refused.is_some_and(|status| !answered.contains(&format!("HTTP/1.1 {status} "))) {
                        lock(&failures).push(format!("expected {refused:?}, got {answered:?}: {:?}", latin1(input)));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap_or_default();
    let mut forwarded = std::collections::HashMap::<String, Vec<wire::Message>>::new();
    for record in origin.records() {
        failures.extend(record.malformed.map(|error| format!("the origin got malformed bytes: {error}")));
        for request in record.requests {
            let sender = request.get("x-forwarded-for").unwrap_or_default().to_owned();
            forwarded.entry(sender).or_default().push(request);
        }
    }
    for (number, input) in inputs.iter().enumerate() {
        let mut got = forwarded.remove(&address(number).to_string()).unwrap_or_default();
        got.sort_by_key(|request| request.number);
        let got: Vec<Forwarded> = got.into_iter().map(forwarded_as).collect();
        let (wanted, _) = predict(&[input, SENTINEL].concat(), &limits);
        if got != wanted {
            failures.push(format!("{:?}: wanted {wanted:?}, the origin got {got:?}", latin1(input)));
        }
    }
    let is_accepted = |input: &&Vec<u8>| matches!(ours(input, usize::MAX, &limits), Front::Request(..));
    let accepted = inputs.iter().filter(is_accepted).count();
    assert!(accepted > CASES / 4, "only {accepted} were accepted: the property says little");
    assert!(failures.is_empty(), "{} of {CASES}:\n{}", failures.len(), failures[..failures.len().min(20)].join("\n"));
}

fn forwarded_as(request: wire::Message) -> Forwarded {
    let bytes =
        |text: &str| text.chars().map(|character| u8::try_from(u32::from(character)).expect("Latin-1")).collect();
    let lines = request.trailers.iter().map(|(name, value)| (name.to_ascii_lowercase(), bytes(value)));
    let mut trailers: Vec<(String, Vec<u8>)> = lines.collect();
    trailers.sort_by(|a, b| a.0.cmp(&b.0));
    (request.start, request.body, trailers)
}
