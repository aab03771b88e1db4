//! Runs the request cases: each one in one write, in halves, byte by byte, and followed by another
//! request, from its own address. Every byte that the origin receives must belong to one of these
//! runs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::format::{self, ClientStep, ConnectionAfter, ExpectedRequest, RequestCase, latin1};
use super::raw_client::{RawClient, Split};
use super::raw_origin::{RawOrigin, ScriptedResponse};
use super::reference_parser::{Line, Message, ParseResult};
use super::support::{Gateway, lock};

/// Concurrent clients.
const THREADS: usize = 4;

/// The results of one corpus file, a row of the printed table.
#[derive(Default)]
pub(crate) struct FileReport {
    pub(crate) name: String,
    pub(crate) cases: usize,
    pub(crate) runs: usize,
    pub(crate) accepted: usize,
    /// Refused cases by reason.
    pub(crate) refused: BTreeMap<String, usize>,
    /// Cases that fail and are marked as known failures.
    pub(crate) known_failures: usize,
    pub(crate) failures: Vec<String>,
    /// The maximum number of requests at the origin by client address.
    request_limits: HashMap<String, usize>,
}

/// Limits so small that a line of a corpus file can exceed them.
pub(crate) const LIMITS: &str =
    "[limits_http]\nheader_bytes = \"4KiB\"\nheader_fields = 20\nuri_bytes = \"1KiB\"\nbody_bytes = \"64KiB\"\n";

/// An origin that responds to every request, and to `/early` before it has read the body.
pub(crate) fn origin() -> RawOrigin {
    RawOrigin::start(|request, _, is_complete| {
        let is_early = request.start.contains(" /early");
        let body = if request.start.starts_with("HEAD ") { "" } else { "ok" };
        let response = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}");
        (is_complete || is_early).then(|| ScriptedResponse::one_piece(response))
    })
}

/// A run of a case by one client.
struct Run<'a> {
    case: &'a RequestCase,
    split: Split,
    /// Whether a valid request follows in the same write. The gateway must not read it if the
    /// connection must end.
    is_followed: bool,
    ip: IpAddr,
}

impl Run<'_> {
    fn name(&self) -> String {
        let followed = if self.is_followed { ", followed" } else { "" };
        format!("{} ({:?}{followed})", self.case.name, self.split)
    }

    /// The maximum number of requests of this run at the origin, including the one after the case
    /// and a partial one.
    fn request_limit(&self) -> usize {
        self.case.origin_requests.len()
            + usize::from(self.case.connection_after != ConnectionAfter::Close)
            + usize::from(self.case.partial_allowed)
    }
}

/// A loopback address that no other run uses.
fn address(number: usize) -> IpAddr {
    let number = u32::try_from(number).expect("few runs");
    IpAddr::V4(Ipv4Addr::from(0x7f01_0000 + number * 2 + 1))
}

pub(crate) fn run_file(path: &Path, gateway: &Gateway, origin: &RawOrigin) -> FileReport {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let cases = format::requests(path);
    let length = |case: &RequestCase| {
        let bytes = |act: &ClientStep| if let ClientStep::Send(bytes) = act { bytes.len() } else { 0 };
        case.steps.iter().map(bytes).sum()
    };
    let mut runs = Vec::new();
    for case in &cases {
        let mut add = |split, is_followed| {
            runs.push(Run { case, split, is_followed, ip: address(NEXT.fetch_add(1, Ordering::Relaxed)) });
        };
        for split in Split::for_length(length(case)) {
            add(*split, false);
        }
        if case.connection_after == ConnectionAfter::Close && matches!(case.steps.last(), Some(ClientStep::Send(_))) {
            add(Split::Whole, true);
        }
    }
    let before = refusals(gateway);
    let failed = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(run) = runs.get(number) else { return };
                    if let Err(error) = run_case(run, gateway.address) {
                        lock(&failed).push((number, error));
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_default();
    // Lets the closes of aborted upstream connections arrive at the origin.
    std::thread::sleep(Duration::from_millis(60));
    failed.extend(check_origin(&runs, origin));
    let known_failures = format::known_failures(cases.iter().filter_map(|case| {
        let fails = failed.iter().any(|(number, _)| runs[*number].case.name == case.name);
        case.known_failure.as_ref().map(|_| (case.name.as_str(), fails))
    }));
    failed.retain(|(number, _)| runs[*number].case.known_failure.is_none());
    let mut failures: Vec<String> =
        failed.into_iter().map(|(number, error)| format!("{}: {error}", runs[number].name())).collect();
    let known_failure_count = known_failures.as_ref().map_or(0, |count| *count);
    failures.extend(known_failures.err().into_iter().flatten());
    failures.extend(check_metric(&runs, &before, &refusals(gateway)));
    let mut row = FileReport {
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        cases: cases.len(),
        runs: runs.len(),
        known_failures: known_failure_count,
        failures,
        request_limits: runs.iter().map(|run| (run.ip.to_string(), run.request_limit())).collect(),
        ..FileReport::default()
    };
    for case in &cases {
        match case.responses.iter().find_map(|get| get.reason.clone()) {
            Some(reason) => *row.refused.entry(reason).or_default() += 1,
            None => row.accepted += 1,
        }
    }
    row
}

const AFTER: &[u8] = b"GET /after HTTP/1.1\r\nHost: after.test\r\nConnection: close\r\n\r\n";

/// The client side of a case.
fn run_case(run: &Run<'_>, gateway: SocketAddr) -> Result<(), String> {
    let case = run.case;
    let mut client = RawClient::connect(run.ip, gateway);
    for (number, act) in case.steps.iter().enumerate() {
        match act {
            ClientStep::Send(bytes) => {
                let mut bytes = bytes.clone();
                if run.is_followed && number + 1 == case.steps.len() {
                    bytes.extend_from_slice(AFTER);
                }
                // The gateway stops reading after a refusal, so a failed write is not an error.
                client.send(&run.split.apply(&bytes, number + case.name.len()));
            }
            ClientStep::Shutdown => client.shutdown_write(),
            ClientStep::AwaitInterim => match client.next_response(false)? {
                ParseResult::Complete(message) if message.status() == 100 => {}
                other => return Err(format!("expected an interim response, got {other:?}")),
            },
        }
    }
    for expected in &case.responses {
        let response = client.final_response_after(expected.is_head, interim_max(case))?;
        if response.status() != expected.status {
            return Err(format!("expected {}, got {:?} {:?}", expected.status, response.start, latin1(&response.body)));
        }
        let says_close = response.all("connection").any(|value| value.eq_ignore_ascii_case("close"));
        if expected.reason.is_some() && !says_close {
            return Err("a refusal without `Connection: close`".into());
        }
        let detail = response.get("cache-status").and_then(|value| value.split_once("; detail="));
        if let (Some(reason), Some((_, detail))) = (&expected.reason, detail)
            && reason != detail
        {
            return Err(format!("expected the refusal {reason}, got {detail}"));
        }
    }
    match case.connection_after {
        ConnectionAfter::Close => expect_close(&mut client),
        ConnectionAfter::Open => {
            client.send(&[AFTER.to_vec()]);
            let response = client.final_response(false).map_err(|error| format!("the next request: {error}"))?;
            if (response.status(), response.body.as_slice()) != (200, b"ok") {
                return Err(format!("the next request got {:?} {:?}", response.start, latin1(&response.body)));
            }
            expect_close(&mut client)
        }
        ConnectionAfter::Any => {
            client.send(&[AFTER.to_vec()]);
            // Either the gateway serves the next request completely or it sends nothing more.
            match client.next_response(false)? {
                ParseResult::Complete(response) if response.status() == 200 => expect_close(&mut client),
                ParseResult::Partial(None) if client.unparsed().is_empty() => Ok(()),
                other => Err(format!("the next request got {other:?}")),
            }
        }
    }
}

/// A client without an expectation gets no `100 Continue`, nor does an HTTP/1.0 client (RFC 9110
/// section 10.1.1).
fn interim_max(case: &RequestCase) -> usize {
    let expects_continue = case.steps.iter().any(|act| match act {
        ClientStep::Send(bytes) => {
            let text = latin1(bytes).to_ascii_lowercase();
            text.contains("expect:") && !text.contains(" http/1.0\r\n")
        }
        ClientStep::AwaitInterim | ClientStep::Shutdown => false,
    });
    usize::from(expects_continue)
}

fn expect_close(client: &mut RawClient) -> Result<(), String> {
    let is_orderly = client.read_until_closed()?;
    match client.unparsed() {
        [] if is_orderly => Ok(()),
        [] => Err("the connection was reset".into()),
        rest => Err(format!("bytes after the last response: {:?}", latin1(rest))),
    }
}

/// The origin side of the cases of a file: no unexpected and no missing request. Failures by run
/// number.
fn check_origin(runs: &[Run<'_>], origin: &RawOrigin) -> Vec<(usize, String)> {
    let (mut failures, mut complete, mut partial) = (Vec::new(), HashMap::<String, Vec<Message>>::new(), Vec::new());
    for record in origin.records() {
        for request in record.requests {
            complete.entry(sender(&request)).or_default().push(request);
        }
        partial.extend(record.unfinished.as_ref().map(sender));
    }
    for (number, run) in runs.iter().enumerate() {
        let ip = run.ip.to_string();
        let got = complete.remove(&ip).unwrap_or_default();
        if partial.contains(&ip) && !run.case.partial_allowed {
            failures.push((number, "the origin received a partial request".into()));
        }
        let mut got: Vec<Message> = got
            .into_iter()
            .filter(|request| run.case.connection_after == ConnectionAfter::Close || !is_after(request))
            .collect();
        // The requests may have arrived on several connections.
        got.sort_by_key(|request| request.number);
        let may_be_missing = run.case.partial_allowed && got.len() < run.case.origin_requests.len();
        if got.len() != run.case.origin_requests.len() && !may_be_missing {
            let lines: Vec<&str> = got.iter().map(|request| request.start.as_str()).collect();
            failures.push((number, format!("the origin received {} requests: {lines:?}", got.len())));
            continue;
        }
        for (expected, request) in run.case.origin_requests.iter().zip(&got) {
            if let Err(error) = compare(expected, request, &ip) {
                failures.push((number, format!("at the origin: {error}")));
            }
        }
    }
    failures
}

/// After all files: checks that every byte at the origin belongs to a well-formed request of a
/// known run.
pub(crate) fn audit(rows: &[FileReport], origin: &RawOrigin) -> Vec<String> {
    let mut request_limits: HashMap<&str, usize> = HashMap::new();
    request_limits
        .extend(rows.iter().flat_map(|row| row.request_limits.iter().map(|(ip, share)| (ip.as_str(), *share))));
    let mut failures = Vec::new();
    for record in origin.records() {
        failures.extend(record.malformed.map(|error| format!("the origin received malformed bytes: {error}")));
        for request in record.requests.iter().chain(&record.unfinished) {
            let from = sender(request);
            match request_limits.get_mut(from.as_str()) {
                Some(left) if *left > 0 => *left -= 1,
                Some(_) => {
                    failures.push(format!("the origin received too many requests of {from}: {:?}", request.start))
                }
                None => failures
                    .push(format!("the origin received a request of an unknown client: {:?} {from:?}", request.start)),
            }
        }
    }
    failures
}

fn is_after(request: &Message) -> bool {
    request.start == "GET /after HTTP/1.1"
}

fn sender(request: &Message) -> String {
    request.get("x-forwarded-for").unwrap_or_default().to_owned()
}

/// Compares `request` with the expected one, without the fields that the gateway adds.
fn compare(expected: &ExpectedRequest, request: &Message, ip: &str) -> Result<(), String> {
    let expected_fields: Vec<String> = expected.fields.clone();
    let was_sent =
        |name: &str| expected_fields.iter().any(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")));
    let mut fields = request.fields.clone();
    let host = request.get("host").unwrap_or_default().to_owned();
    let mut take = |name: &str, is_correct: &dyn Fn(&str) -> bool| {
        // The gateway adds its fields after those of the client.
        let at = fields.iter().rposition(|(key, value)| key.eq_ignore_ascii_case(name) && is_correct(value));
        at.map(|at| fields.remove(at)).ok_or_else(|| format!("no correct {name} among {:?}", request.fields))
    };
    take("x-forwarded-for", &|value| value == ip)?;
    take("x-forwarded-proto", &|value| value == "http")?;
    take("via", &|value| matches!(value, "1.0 tidegate" | "1.1 tidegate"))?;
    if !host.is_empty() {
        take("x-forwarded-host", &|value| value == host)?;
    }
    take("x-request-id", &|value| value.len() == 36)?;
    if !was_sent("traceparent") {
        take("traceparent", &|value| value.len() == 55 && value.starts_with("00-"))?;
    }
    let got: Vec<String> =
        sorted(&fields).iter().map(|(name, value)| format!("{name}: {value}").trim_end().to_owned()).collect();
    let trailers: Vec<String> = request.trailers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let matches = request.start == expected.line
        && got == expected_fields
        && request.body == expected.body
        && trailers == expected.trailers;
    if matches {
        return Ok(());
    }
    let body = |bytes: &[u8]| if bytes.len() > 200 { format!("{} bytes", bytes.len()) } else { latin1(bytes) };
    Err(format!(
        "expected {:?} {expected_fields:?} {:?} {:?}, got {:?} {got:?} {:?} {trailers:?}",
        expected.line,
        body(&expected.body),
        expected.trailers,
        request.start,
        body(&request.body)
    ))
}

/// `Host` first, framing last, all other fields in order: the position of these three is not part
/// of the contract.
fn sorted(fields: &[Line]) -> Vec<Line> {
    let mut fields = fields.to_vec();
    fields.sort_by_key(|(name, _)| match name.to_ascii_lowercase().as_str() {
        "host" => 0,
        "content-length" | "transfer-encoding" => 2,
        _ => 1,
    });
    fields
}

/// Refusals by reason, from the metric.
fn refusals(gateway: &Gateway) -> BTreeMap<String, u64> {
    let text = gateway.admin("/metrics").text();
    let series = |line: &str| {
        let rest = line.strip_prefix("tidegate_requests_refused_total{reason=\"")?;
        let (reason, rest) = rest.split_once('"')?;
        Some((reason.to_owned(), rest.rsplit_once(' ')?.1.parse::<f64>().ok()? as u64))
    };
    // The versions together.
    let mut refusals = BTreeMap::new();
    text.lines().filter_map(series).for_each(|(reason, count)| *refusals.entry(reason).or_default() += count);
    refusals
}

fn check_metric(runs: &[Run<'_>], before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Vec<String> {
    let mut expected: BTreeMap<String, u64> = BTreeMap::new();
    for reason in runs.iter().flat_map(|run| run.case.responses.iter().filter_map(|get| get.reason.clone())) {
        *expected.entry(reason).or_default() += 1;
    }
    let mut failures = Vec::new();
    let reasons: BTreeSet<&String> = expected.keys().chain(after.keys()).collect();
    for reason in reasons {
        let of = |map: &BTreeMap<String, u64>| map.get(reason).copied().unwrap_or(0);
        let grown = of(after) - of(before);
        if grown != of(&expected) {
            failures.push(format!("the metric counts {grown} refusals with {reason}, expected {}", of(&expected)));
        }
    }
    failures
}
