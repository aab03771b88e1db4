//! Plays the request cases: each one whole, in halves, byte by byte and with another request behind it, from an address
//! of its own. Whatever the origin is sent must belong to one of these runs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::format::{self, Act, RequestCase, Sees, Then, latin1};
use super::origin::{Play, RawOrigin};
use super::support::{Gateway, lock};
use super::talk::{Cutting, Talk};
use super::wire::{Line, Message, Read};

/// Clients at a time.
const THREADS: usize = 4;

/// The line that the table shows for one file.
#[derive(Default)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) cases: usize,
    pub(crate) runs: usize,
    pub(crate) accepted: usize,
    /// Refused cases by reason.
    pub(crate) refused: BTreeMap<String, usize>,
    /// Cases that fail, as they say they do.
    pub(crate) gaps: usize,
    pub(crate) failures: Vec<String>,
    /// How many requests the origin may have got from each address.
    shares: HashMap<String, usize>,
}

/// Bounds so small that a line of text can cross them.
pub(crate) const LIMITS: &str =
    "[limits_http]\nheader_bytes = \"4KiB\"\nheader_fields = 20\nuri_bytes = \"1KiB\"\nbody_bytes = \"64KiB\"\n";

/// An origin that answers everything, and `/early` before it has read the body.
pub(crate) fn origin() -> RawOrigin {
    RawOrigin::start(|request, _, is_whole| {
        let is_early = request.start.contains(" /early");
        let body = if request.start.starts_with("HEAD ") { "" } else { "ok" };
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}");
        (is_whole || is_early).then(|| Play::whole(answer))
    })
}

/// One client's part in one case.
struct Run<'a> {
    case: &'a RequestCase,
    cutting: Cutting,
    /// A good request comes in the same piece, and must not be read where the connection is to end.
    is_followed: bool,
    ip: IpAddr,
}

impl Run<'_> {
    fn name(&self) -> String {
        let followed = if self.is_followed { ", followed" } else { "" };
        format!("{} ({:?}{followed})", self.case.name, self.cutting)
    }

    /// Requests of this run that may reach the origin, the one after the case and one that only begins included.
    fn share(&self) -> usize {
        self.case.sees.len() + usize::from(self.case.then != Then::Close) + usize::from(self.case.may_begin)
    }
}

/// A loopback address that no other run has.
fn address(number: usize) -> IpAddr {
    let number = u32::try_from(number).expect("few runs");
    IpAddr::V4(Ipv4Addr::from(0x7f01_0000 + number * 2 + 1))
}

pub(crate) fn play(path: &Path, gateway: &Gateway, origin: &RawOrigin) -> Row {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let cases = format::requests(path);
    let length = |case: &RequestCase| {
        let bytes = |act: &Act| if let Act::Send(bytes) = act { bytes.len() } else { 0 };
        case.acts.iter().map(bytes).sum()
    };
    let mut runs = Vec::new();
    for case in &cases {
        let mut add = |cutting, is_followed| {
            runs.push(Run { case, cutting, is_followed, ip: address(NEXT.fetch_add(1, Ordering::Relaxed)) });
        };
        for cutting in Cutting::of(length(case)) {
            add(*cutting, false);
        }
        if case.then == Then::Close && matches!(case.acts.last(), Some(Act::Send(_))) {
            add(Cutting::Whole, true);
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
                    if let Err(error) = converse(run, gateway.address) {
                        lock(&failed).push((number, error));
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_default();
    // What the gateway gave up is on its way to the origin as an end of a connection.
    std::thread::sleep(Duration::from_millis(60));
    failed.extend(check_origin(&runs, origin));
    let gaps = format::gaps(cases.iter().filter_map(|case| {
        let fails = failed.iter().any(|(number, _)| runs[*number].case.name == case.name);
        case.gap.as_ref().map(|_| (case.name.as_str(), fails))
    }));
    failed.retain(|(number, _)| runs[*number].case.gap.is_none());
    let mut failures: Vec<String> =
        failed.into_iter().map(|(number, error)| format!("{}: {error}", runs[number].name())).collect();
    let gap_count = gaps.as_ref().map_or(0, |count| *count);
    failures.extend(gaps.err().into_iter().flatten());
    failures.extend(check_metric(&runs, &before, &refusals(gateway)));
    let mut row = Row {
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        cases: cases.len(),
        runs: runs.len(),
        gaps: gap_count,
        failures,
        shares: runs.iter().map(|run| (run.ip.to_string(), run.share())).collect(),
        ..Row::default()
    };
    for case in &cases {
        match case.gets.iter().find_map(|get| get.reason.clone()) {
            Some(reason) => *row.refused.entry(reason).or_default() += 1,
            None => row.accepted += 1,
        }
    }
    row
}

const AFTER: &[u8] = b"GET /after HTTP/1.1\r\nHost: after.test\r\nConnection: close\r\n\r\n";

/// The client's side of a case.
fn converse(run: &Run<'_>, gateway: SocketAddr) -> Result<(), String> {
    let case = run.case;
    let mut talk = Talk::connect(run.ip, gateway);
    for (number, act) in case.acts.iter().enumerate() {
        match act {
            Act::Send(bytes) => {
                let mut bytes = bytes.clone();
                if run.is_followed && number + 1 == case.acts.len() {
                    bytes.extend_from_slice(AFTER);
                }
                // Where the gateway has refused already it need not read on.
                talk.send(&run.cutting.cut(&bytes, number + case.name.len()));
            }
            Act::Finish => talk.finish(),
            Act::AwaitInterim => match talk.answer(false)? {
                Read::Whole(message) if message.status() == 100 => {}
                other => return Err(format!("instead of an interim answer: {other:?}")),
            },
        }
    }
    for get in &case.gets {
        let answer = talk.last_answer_after(get.is_head, interim_max(case))?;
        if answer.status() != get.status {
            return Err(format!("expected {}, got {:?} {:?}", get.status, answer.start, latin1(&answer.body)));
        }
        let says_close = answer.all("connection").any(|value| value.eq_ignore_ascii_case("close"));
        if get.reason.is_some() && !says_close {
            return Err("a refusal without `Connection: close`".into());
        }
        let detail = answer.get("cache-status").and_then(|value| value.split_once("; detail="));
        if let (Some(reason), Some((_, detail))) = (&get.reason, detail)
            && reason != detail
        {
            return Err(format!("expected to be refused for {reason}, was for {detail}"));
        }
    }
    match case.then {
        Then::Close => close(&mut talk),
        Then::Open => {
            talk.send(&[AFTER.to_vec()]);
            let answer = talk.last_answer(false).map_err(|error| format!("the next request: {error}"))?;
            if (answer.status(), answer.body.as_slice()) != (200, b"ok") {
                return Err(format!("the next request got {:?} {:?}", answer.start, latin1(&answer.body)));
            }
            close(&mut talk)
        }
        Then::Any => {
            talk.send(&[AFTER.to_vec()]);
            // Either it serves another request whole or it says nothing more.
            match talk.answer(false)? {
                Read::Whole(answer) if answer.status() == 200 => close(&mut talk),
                Read::Part(None) if talk.rest().is_empty() => Ok(()),
                other => Err(format!("the next request got {other:?}")),
            }
        }
    }
}

/// A client that expects nothing gets no `100 Continue`, nor does one of HTTP/1.0 (RFC 9110 section 10.1.1).
fn interim_max(case: &RequestCase) -> usize {
    let is_asked = case.acts.iter().any(|act| match act {
        Act::Send(bytes) => {
            let text = latin1(bytes).to_ascii_lowercase();
            text.contains("expect:") && !text.contains(" http/1.0\r\n")
        }
        Act::AwaitInterim | Act::Finish => false,
    });
    usize::from(is_asked)
}

fn close(talk: &mut Talk) -> Result<(), String> {
    let in_order = talk.end()?;
    match talk.rest() {
        [] if in_order => Ok(()),
        [] => Err("the connection was reset".into()),
        rest => Err(format!("bytes after the last answer: {:?}", latin1(rest))),
    }
}

/// The origin's side of a file's cases: nothing unexpected, nothing missing. Failures by number of their run.
fn check_origin(runs: &[Run<'_>], origin: &RawOrigin) -> Vec<(usize, String)> {
    let (mut failures, mut whole, mut begun) = (Vec::new(), HashMap::<String, Vec<Message>>::new(), Vec::new());
    for record in origin.records() {
        for request in record.requests {
            whole.entry(sender(&request)).or_default().push(request);
        }
        begun.extend(record.unfinished.as_ref().map(sender));
    }
    for (number, run) in runs.iter().enumerate() {
        let ip = run.ip.to_string();
        let got = whole.remove(&ip).unwrap_or_default();
        if begun.contains(&ip) && !run.case.may_begin {
            failures.push((number, "the origin got the beginning of a request".into()));
        }
        let mut got: Vec<Message> =
            got.into_iter().filter(|request| run.case.then == Then::Close || !is_after(request)).collect();
        // They may have come on several connections.
        got.sort_by_key(|request| request.number);
        let may_lack = run.case.may_begin && got.len() < run.case.sees.len();
        if got.len() != run.case.sees.len() && !may_lack {
            let lines: Vec<&str> = got.iter().map(|request| request.start.as_str()).collect();
            failures.push((number, format!("the origin got {} requests: {lines:?}", got.len())));
            continue;
        }
        for (sees, request) in run.case.sees.iter().zip(&got) {
            if let Err(error) = compare(sees, request, &ip) {
                failures.push((number, format!("at the origin: {error}")));
            }
        }
    }
    failures
}

/// Every byte that the origin got, when all files are played: it belongs to a well-formed request of a known run.
pub(crate) fn audit(rows: &[Row], origin: &RawOrigin) -> Vec<String> {
    let mut shares: HashMap<&str, usize> = HashMap::new();
    shares.extend(rows.iter().flat_map(|row| row.shares.iter().map(|(ip, share)| (ip.as_str(), *share))));
    let mut failures = Vec::new();
    for record in origin.records() {
        failures.extend(record.malformed.map(|error| format!("the origin got malformed bytes: {error}")));
        for request in record.requests.iter().chain(&record.unfinished) {
            let from = sender(request);
            match shares.get_mut(from.as_str()) {
                Some(left) if *left > 0 => *left -= 1,
                Some(_) => failures.push(format!("the origin got too many requests of {from}: {:?}", request.start)),
                None => failures.push(format!("the origin got a request of nobody: {:?} {from:?}", request.start)),
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

/// Whether `request` is what the case wants, apart from what the gateway may add.
fn compare(sees: &Sees, request: &Message, ip: &str) -> Result<(), String> {
    let wanted: Vec<String> = sees.fields.clone();
    let brought = |name: &str| wanted.iter().any(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")));
    let mut fields = request.fields.clone();
    let host = request.get("host").unwrap_or_default().to_owned();
    let mut take = |name: &str, is_right: &dyn Fn(&str) -> bool| {
        // The gateway adds behind what the client sent.
        let at = fields.iter().rposition(|(key, value)| key.eq_ignore_ascii_case(name) && is_right(value));
        at.map(|at| fields.remove(at)).ok_or_else(|| format!("no right {name} among {:?}", request.fields))
    };
    take("x-forwarded-for", &|value| value == ip)?;
    take("x-forwarded-proto", &|value| value == "http")?;
    take("via", &|value| matches!(value, "1.0 tidegate" | "1.1 tidegate"))?;
    if !host.is_empty() {
        take("x-forwarded-host", &|value| value == host)?;
    }
    if !brought("traceparent") {
        take("traceparent", &|value| value.len() == 55 && value.starts_with("00-"))?;
    }
    let got: Vec<String> =
        sorted(&fields).iter().map(|(name, value)| format!("{name}: {value}").trim_end().to_owned()).collect();
    let trailers: Vec<String> = request.trailers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let as_wanted =
        request.start == sees.line && got == wanted && request.body == sees.body && trailers == sees.trailers;
    if as_wanted {
        return Ok(());
    }
    let body = |bytes: &[u8]| if bytes.len() > 200 { format!("{} bytes", bytes.len()) } else { latin1(bytes) };
    Err(format!(
        "wanted {:?} {wanted:?} {:?} {:?}, got {:?} {got:?} {:?} {trailers:?}",
        sees.line,
        body(&sees.body),
        sees.trailers,
        request.start,
        body(&request.body)
    ))
}

/// `Host` first, framing last, all else in its order: where the engine writes these three is its own affair.
fn sorted(fields: &[Line]) -> Vec<Line> {
    let mut fields = fields.to_vec();
    fields.sort_by_key(|(name, _)| match name.to_ascii_lowercase().as_str() {
        "host" => 0,
        "content-length" | "transfer-encoding" => 2,
        _ => 1,
    });
    fields
}

/// Refusals by reason, as the metric has them.
fn refusals(gateway: &Gateway) -> BTreeMap<String, u64> {
    let text = gateway.admin("/metrics").text();
    let series = |line: &str| {
        let rest = line.strip_prefix("tidegate_requests_refused_total{reason=\"")?;
        let (reason, value) = rest.split_once("\"} ")?;
        Some((reason.to_owned(), value.trim().parse::<f64>().ok()? as u64))
    };
    text.lines().filter_map(series).collect()
}

fn check_metric(runs: &[Run<'_>], before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Vec<String> {
    let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
    for reason in runs.iter().flat_map(|run| run.case.gets.iter().filter_map(|get| get.reason.clone())) {
        *wanted.entry(reason).or_default() += 1;
    }
    let mut failures = Vec::new();
    let reasons: BTreeSet<&String> = wanted.keys().chain(after.keys()).collect();
    for reason in reasons {
        let of = |map: &BTreeMap<String, u64>| map.get(reason).copied().unwrap_or(0);
        let grown = of(after) - of(before);
        if grown != of(&wanted) {
            failures.push(format!("the metric counts {grown} refusals as {reason}, expected {}", of(&wanted)));
        }
    }
    failures
}
