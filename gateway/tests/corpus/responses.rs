//! Runs the response cases: each one in one write, in halves and byte by byte, and once through a
//! caching route.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::format::{self, ResponseCase, latin1};
use super::raw_client::{RawClient, Split};
use super::raw_origin::{RawOrigin, ScriptedResponse};
use super::reference_parser::{Message, ParseResult};
use super::support::{Gateway, STEP_TIMEOUT, lock, wait_for};

/// Concurrent clients, each with its own origin and therefore its own upstream connections.
pub(crate) const THREADS: usize = 4;

/// The results of one corpus file, a row of the printed table.
pub(crate) struct FileReport {
    pub(crate) name: String,
    pub(crate) cases: usize,
    pub(crate) runs: usize,
    pub(crate) forwarded: usize,
    pub(crate) refused: usize,
    pub(crate) truncated: usize,
    /// Cases that fail and are marked as known failures.
    pub(crate) known_failures: usize,
    pub(crate) failures: Vec<String>,
}

#[derive(Clone, Copy)]
struct Run {
    case: usize,
    split: Split,
    is_cached: bool,
}

/// All cases of all files, for lookup by the origins.
#[derive(Clone)]
pub(crate) struct ResponseCases(Arc<Vec<ResponseCase>>);

impl ResponseCases {
    pub(crate) fn open() -> Self {
        let cases: Vec<ResponseCase> =
            format::files("responses").iter().flat_map(|path| format::responses(path)).collect();
        let names: HashSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len(), "duplicate case name");
        ResponseCases(Arc::new(cases))
    }

    fn find(&self, name: &str) -> usize {
        self.0.iter().position(|case| case.name == name).expect("a known case")
    }

    /// An origin that responds to `/x/CASE/SPLIT` as the case says, and to every other request with
    /// 200.
    pub(crate) fn origin(&self) -> RawOrigin {
        let all_cases = self.clone();
        RawOrigin::start(move |request, _, is_complete| is_complete.then(|| all_cases.respond(request)))
    }

    fn respond(&self, request: &Message) -> ScriptedResponse {
        let target = request.start.split(' ').nth(1).unwrap_or_default();
        let mut parts = target.split('/').skip(2);
        let case = parts.next().and_then(|number| self.0.get(number.parse::<usize>().ok()?));
        let Some(case) = case else {
            return ScriptedResponse::one_piece("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nafter");
        };
        let (split, pause) = match parts.next() {
            Some("Halves") => (Split::Halves, Duration::from_millis(2)),
            Some("Bytes") => (Split::Bytes, Duration::ZERO),
            _ => (Split::Whole, Duration::ZERO),
        };
        ScriptedResponse { pieces: split.apply(&case.origin, case.name.len()), pause, closes: case.origin_closes }
    }
}

pub(crate) fn run_file(path: &Path, all_cases: &ResponseCases, gateway: &Gateway, origins: &[RawOrigin]) -> FileReport {
    let cases: Vec<usize> = format::responses(path).iter().map(|case| all_cases.find(&case.name)).collect();
    let mut runs = Vec::new();
    for &case in &cases {
        runs.extend(Split::for_length(all_cases.0[case].origin.len()).iter().map(|&split| Run {
            case,
            split,
            is_cached: false,
        }));
        runs.push(Run { case, split: Split::Whole, is_cached: true });
    }
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (number, origin) in origins.iter().enumerate() {
            let (runs, next, failures) = (&runs, &next, &failures);
            let test_client = TestClient { number, gateway, origin };
            scope.spawn(move || {
                while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let case = &all_cases.0[run.case];
                    if let Err(error) = run_case(*run, case, &test_client) {
                        lock(failures).push((*run, error));
                    }
                }
            });
        }
    });
    let failed = failures.into_inner().unwrap_or_default();
    let known_failures = format::known_failures(cases.iter().filter_map(|case| {
        let fails = failed.iter().any(|(run, _)| run.case == *case);
        all_cases.0[*case].known_failure.as_ref().map(|_| (all_cases.0[*case].name.as_str(), fails))
    }));
    let mut failures: Vec<String> = Vec::new();
    for (run, error) in failed.iter().filter(|(run, _)| all_cases.0[run.case].known_failure.is_none()) {
        let cached = if run.is_cached { ", cached" } else { "" };
        failures.push(format!("{} ({:?}{cached}): {error}", all_cases.0[run.case].name, run.split));
    }
    let known_failure_count = known_failures.as_ref().map_or(0, |count| *count);
    failures.extend(known_failures.err().into_iter().flatten());
    let count = |is: &dyn Fn(&ResponseCase) -> bool| cases.iter().filter(|case| is(&all_cases.0[**case])).count();
    FileReport {
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        cases: cases.len(),
        runs: runs.len(),
        forwarded: count(&|case| !case.is_truncated && case.error.is_none()),
        refused: count(&|case| case.error.is_some()),
        truncated: count(&|case| case.is_truncated),
        known_failures: known_failure_count,
        failures,
    }
}

/// One of the concurrent clients: its number in the routes, and the servers that it uses.
struct TestClient<'a> {
    number: usize,
    gateway: &'a Gateway,
    origin: &'a RawOrigin,
}

fn run_case(run: Run, case: &ResponseCase, test_client: &TestClient<'_>) -> Result<(), String> {
    let TestClient { number, gateway, .. } = test_client;
    let kind = if run.is_cached { 'c' } else { 't' };
    let target = format!("/{kind}{number}/{}/{:?}", run.case, run.split);
    let version = if case.is_http10 { "1.0" } else { "1.1" };
    let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut client = RawClient::connect(from, gateway.address);
    let mut request = format!("{} {target} HTTP/{version}\r\nHost: a\r\n", case.method).into_bytes();
    request.extend_from_slice(&case.request_fields);
    request.extend_from_slice(b"\r\n");
    client.send(&[request]);
    let is_head = case.method == "HEAD";
    let checked =
        if case.is_truncated { check_truncated(&mut client, case, is_head) } else { check(&mut client, case, is_head) };
    if case.status == 101 {
        // The tunnel stays open until one side closes it.
        drop(client);
    }
    let reused = check_reuse(case, &target, test_client);
    checked.and(reused)
}

/// Checks the response at the client.
fn check(client: &mut RawClient, case: &ResponseCase, is_head: bool) -> Result<(), String> {
    for expected in &case.interim {
        match client.next_response(is_head)? {
            ParseResult::Complete(message) if message.status() == *expected => {}
            other => return Err(format!("expected the interim status {expected}, got {other:?}")),
        }
    }
    // HTTP/1.0 clients get no interim responses (RFC 9110 section 15.2).
    let interim_max = if case.is_http10 { 0 } else { usize::MAX };
    let response = client.final_response_after(is_head, interim_max)?;
    let summary = format!(
        "{:?} {:?} {:?}",
        response.start,
        response.fields,
        latin1(&response.body[..response.body.len().min(200)])
    );
    if response.status() != case.status {
        return Err(format!("expected {}, got {summary}", case.status));
    }
    if let Some(error) = &case.error {
        let expected = format!("tidegate; error={error}");
        return if response.get("proxy-status") == Some(&expected) {
            Ok(())
        } else {
            Err(format!("expected {error}: {summary}"))
        };
    }
    let lines: Vec<String> =
        response.fields.iter().map(|(name, value)| format!("{name}: {value}").trim_end().to_owned()).collect();
    if let Some(missing) = case.fields.iter().find(|field| !lines.contains(field)) {
        return Err(format!("no {missing:?} in {summary}"));
    }
    if let Some(present) =
        case.absent_fields.iter().find(|name| response.get(name).is_some() || has_trailer(&response, name))
    {
        return Err(format!("unexpected {present:?} in {summary}"));
    }
    let trailers: Vec<String> = response.trailers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    if case.trailers.iter().any(|trailer| !trailers.contains(trailer)) {
        return Err(format!("trailers {trailers:?}, expected {:?}", case.trailers));
    }
    if response.status() == 101 {
        let bytes = client.raw(case.tunnel.len())?;
        return if bytes == case.tunnel { Ok(()) } else { Err(format!("{:?} in the tunnel", latin1(&bytes))) };
    }
    match &case.body {
        Some(body) if response.body != *body => {
            Err(format!("{} bytes of body, expected {}: {summary}", response.body.len(), body.len()))
        }
        _ => Ok(()),
    }
}

/// Checks a response that must not look complete: 502, or a truncated response and the end of the
/// connection.
fn check_truncated(client: &mut RawClient, case: &ResponseCase, is_head: bool) -> Result<(), String> {
    match client.next_response(is_head)? {
        ParseResult::Complete(response) if response.status() == 502 => Ok(()),
        ParseResult::Complete(response) => {
            Err(format!("it looks complete: {:?} {:?}", response.start, latin1(&response.body)))
        }
        ParseResult::Partial(None) => Err("the client received nothing".into()),
        ParseResult::Partial(Some(part)) if case.body.as_ref().is_none_or(|body| body.starts_with(&part.body)) => {
            Ok(())
        }
        ParseResult::Partial(Some(part)) => Err(format!("it starts with {:?}", latin1(&part.body))),
    }
}

/// Sends another request and checks on which connection the origin receives it.
fn check_reuse(case: &ResponseCase, target: &str, test_client: &TestClient<'_>) -> Result<(), String> {
    let TestClient { number, gateway, origin } = test_client;
    let carries = |request: &Message| request.start.split(' ').nth(1) == Some(target);
    let connections = || -> Vec<usize> {
        let records = origin.records();
        records.iter().enumerate().filter(|(_, record)| record.requests.iter().any(carries)).map(|(at, _)| at).collect()
    };
    // Unsolicited bytes of the origin must have been sent before the next request.
    let has_responded = |at: &usize| {
        let record = origin.record(*at);
        record.is_closed || record.responses_sent >= record.requests.len()
    };
    wait_for(|| connections().iter().all(has_responded), STEP_TIMEOUT);
    std::thread::sleep(Duration::from_millis(2));
    let mut client = RawClient::connect(IpAddr::V4(Ipv4Addr::LOCALHOST), gateway.address);
    client.send(&[format!("GET /t{number}/after HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").into_bytes()]);
    let after = client.final_response(false).map_err(|error| format!("the next request: {error}"))?;
    if (after.status(), after.body.as_slice()) != (200, b"after") {
        return Err(format!("the next request got {:?} {:?}", after.start, latin1(&after.body)));
    }
    let used = connections();
    let Some(last) = used.last() else { return Err("the origin received no request".into()) };
    let has_served = |at: &usize| {
        let record = origin.record(*at);
        let position = record.requests.iter().rposition(carries);
        position.is_some_and(|position| position + 1 < record.requests.len())
    };
    match case.reuse {
        Some(true) if !has_served(last) => Err("its upstream connection was not reused".into()),
        Some(false) if used.iter().any(has_served) => Err("its upstream connection was reused".into()),
        Some(false) => {
            let is_closed = || used.iter().all(|at| origin.record(*at).is_closed);
            let start = std::time::Instant::now();
            while !is_closed() && start.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_millis(2));
            }
            if is_closed() { Ok(()) } else { Err("its upstream connection was left open".into()) }
        }
        _ => Ok(()),
    }
}

fn has_trailer(response: &Message, name: &str) -> bool {
    response.trailers.iter().any(|(key, _)| key.eq_ignore_ascii_case(name))
}
