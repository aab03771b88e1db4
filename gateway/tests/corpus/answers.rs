//! Plays the answer cases: each one whole, in halves and byte by byte, and once more through a route that caches.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::format::{self, AnswerCase, latin1};
use super::origin::{Play, RawOrigin};
use super::support::{Gateway, PATIENCE, lock, wait_for};
use super::talk::{Cutting, Talk};
use super::wire::{Message, Read};

/// Clients at a time, each with an origin and so with upstream connections of its own.
pub(crate) const THREADS: usize = 4;

/// The line that the table shows for one file.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) cases: usize,
    pub(crate) runs: usize,
    pub(crate) passed_on: usize,
    pub(crate) refused: usize,
    pub(crate) cut: usize,
    /// Cases that fail, as they say they do.
    pub(crate) gaps: usize,
    pub(crate) failures: Vec<String>,
}

#[derive(Clone, Copy)]
struct Run {
    case: usize,
    cutting: Cutting,
    is_cached: bool,
}

/// Every case of every file, for origins to look up.
#[derive(Clone)]
pub(crate) struct Book(Arc<Vec<AnswerCase>>);

impl Book {
    pub(crate) fn open() -> Self {
        let cases: Vec<AnswerCase> = format::files("answers").iter().flat_map(|path| format::answers(path)).collect();
        let names: HashSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len(), "two cases of one name");
        Book(Arc::new(cases))
    }

    fn find(&self, name: &str) -> usize {
        self.0.iter().position(|case| case.name == name).expect("a case of the book")
    }

    /// An origin that answers `/x/CASE/CUTTING` with what the book says and everything else with 200.
    pub(crate) fn origin(&self) -> RawOrigin {
        let book = self.clone();
        RawOrigin::start(move |request, _, is_whole| is_whole.then(|| book.play(request)))
    }

    fn play(&self, request: &Message) -> Play {
        let target = request.start.split(' ').nth(1).unwrap_or_default();
        let mut parts = target.split('/').skip(2);
        let case = parts.next().and_then(|number| self.0.get(number.parse::<usize>().ok()?));
        let Some(case) = case else { return Play::whole("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nafter") };
        let (cutting, pause) = match parts.next() {
            Some("Halves") => (Cutting::Halves, Duration::from_millis(2)),
            Some("Bytes") => (Cutting::Bytes, Duration::ZERO),
            _ => (Cutting::Whole, Duration::ZERO),
        };
        Play { pieces: cutting.cut(&case.origin, case.name.len()), pause, ends: case.ends }
    }
}

pub(crate) fn play(path: &Path, book: &Book, gateway: &Gateway, origins: &[RawOrigin]) -> Row {
    let cases: Vec<usize> = format::answers(path).iter().map(|case| book.find(&case.name)).collect();
    let mut runs = Vec::new();
    for &case in &cases {
        runs.extend(Cutting::of(book.0[case].origin.len()).iter().map(|&cutting| Run {
            case,
            cutting,
            is_cached: false,
        }));
        runs.push(Run { case, cutting: Cutting::Whole, is_cached: true });
    }
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (number, origin) in origins.iter().enumerate() {
            let (runs, next, failures) = (&runs, &next, &failures);
            scope.spawn(move || {
                while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let case = &book.0[run.case];
                    if let Err(error) = converse(*run, case, number, gateway, origin) {
                        lock(failures).push((*run, error));
                    }
                }
            });
        }
    });
    let failed = failures.into_inner().unwrap_or_default();
    let gaps = format::gaps(cases.iter().filter_map(|case| {
        let fails = failed.iter().any(|(run, _)| run.case == *case);
        book.0[*case].gap.as_ref().map(|_| (book.0[*case].name.as_str(), fails))
    }));
    let mut failures: Vec<String> = Vec::new();
    for (run, error) in failed.iter().filter(|(run, _)| book.0[run.case].gap.is_none()) {
        let cached = if run.is_cached { ", cached" } else { "" };
        failures.push(format!("{} ({:?}{cached}): {error}", book.0[run.case].name, run.cutting));
    }
    let gap_count = gaps.as_ref().map_or(0, |count| *count);
    failures.extend(gaps.err().into_iter().flatten());
    let count = |is: &dyn Fn(&AnswerCase) -> bool| cases.iter().filter(|case| is(&book.0[**case])).count();
    Row {
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        cases: cases.len(),
        runs: runs.len(),
        passed_on: count(&|case| !case.is_cut && case.error.is_none()),
        refused: count(&|case| case.error.is_some()),
        cut: count(&|case| case.is_cut),
        gaps: gap_count,
        failures,
    }
}

fn converse(run: Run, case: &AnswerCase, number: usize, gateway: &Gateway, origin: &RawOrigin) -> Result<(), String> {
    let kind = if run.is_cached { 'c' } else { 't' };
    let target = format!("/{kind}{number}/{}/{:?}", run.case, run.cutting);
    let version = if case.is_http10 { "1.0" } else { "1.1" };
    let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut talk = Talk::connect(from, gateway.address);
    let mut request = format!("{} {target} HTTP/{version}\r\nHost: a\r\n", case.method).into_bytes();
    request.extend_from_slice(&case.asks_with);
    request.extend_from_slice(b"\r\n");
    talk.send(&[request]);
    let is_head = case.method == "HEAD";
    let answered = if case.is_cut { check_cut(&mut talk, case, is_head) } else { check(&mut talk, case, is_head) };
    if case.status == 101 {
        // A tunnel lasts as long as both sides want.
        drop(talk);
    }
    let reused = check_reuse(case, &target, number, gateway, origin);
    answered.and(reused)
}

/// The answer as the client must get it.
fn check(talk: &mut Talk, case: &AnswerCase, is_head: bool) -> Result<(), String> {
    for wanted in &case.interim {
        match talk.answer(is_head)? {
            Read::Whole(message) if message.status() == *wanted => {}
            other => return Err(format!("expected an interim {wanted}, got {other:?}")),
        }
    }
    // None of them for HTTP/1.0 (RFC 9110 section 15.2).
    let interim_max = if case.is_http10 { 0 } else { usize::MAX };
    let answer = talk.last_answer_after(is_head, interim_max)?;
    let told =
        format!("{:?} {:?} {:?}", answer.start, answer.fields, latin1(&answer.body[..answer.body.len().min(200)]));
    if answer.status() != case.status {
        return Err(format!("expected {}, got {told}", case.status));
    }
    if let Some(error) = &case.error {
        let wanted = format!("tidegate; error={error}");
        return if answer.get("proxy-status") == Some(&wanted) {
            Ok(())
        } else {
            Err(format!("expected {error}: {told}"))
        };
    }
    let lines: Vec<String> =
        answer.fields.iter().map(|(name, value)| format!("{name}: {value}").trim_end().to_owned()).collect();
    if let Some(missing) = case.fields.iter().find(|field| !lines.contains(field)) {
        return Err(format!("no {missing:?} in {told}"));
    }
    if let Some(there) = case.absent.iter().find(|name| answer.get(name).is_some() || has_trailer(&answer, name)) {
        return Err(format!("{there:?} in {told}"));
    }
    let trailers: Vec<String> = answer.trailers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    if case.trailers.iter().any(|trailer| !trailers.contains(trailer)) {
        return Err(format!("trailers {trailers:?}, expected {:?}", case.trailers));
    }
    if answer.status() == 101 {
        let bytes = talk.raw(case.tunnel.len())?;
        return if bytes == case.tunnel { Ok(()) } else { Err(format!("{:?} in the tunnel", latin1(&bytes))) };
    }
    match &case.body {
        Some(body) if answer.body != *body => {
            Err(format!("{} bytes of body, expected {}: {told}", answer.body.len(), body.len()))
        }
        _ => Ok(()),
    }
}

/// An answer that must not look whole: 502, or a beginning and the end of the connection.
fn check_cut(talk: &mut Talk, case: &AnswerCase, is_head: bool) -> Result<(), String> {
    match talk.answer(is_head)? {
        Read::Whole(answer) if answer.status() == 502 => Ok(()),
        Read::Whole(answer) => Err(format!("it looks whole: {:?} {:?}", answer.start, latin1(&answer.body))),
        Read::Part(None) => Err("the client got nothing at all".into()),
        Read::Part(Some(part)) if case.body.as_ref().is_none_or(|body| body.starts_with(&part.body)) => Ok(()),
        Read::Part(Some(part)) => Err(format!("it begins with {:?}", latin1(&part.body))),
    }
}

/// Asks once more, and looks which connection the origin gets that on.
fn check_reuse(
    case: &AnswerCase,
    target: &str,
    number: usize,
    gateway: &Gateway,
    origin: &RawOrigin,
) -> Result<(), String> {
    let carries = |request: &Message| request.start.split(' ').nth(1) == Some(target);
    let connections = || -> Vec<usize> {
        let records = origin.records();
        records.iter().enumerate().filter(|(_, record)| record.requests.iter().any(carries)).map(|(at, _)| at).collect()
    };
    // What the origin says too much must have been said before the next request is asked.
    let has_played = |at: &usize| {
        let record = origin.record(*at);
        record.is_over || record.played >= record.requests.len()
    };
    wait_for(|| connections().iter().all(has_played), PATIENCE);
    std::thread::sleep(Duration::from_millis(2));
    let mut talk = Talk::connect(IpAddr::V4(Ipv4Addr::LOCALHOST), gateway.address);
    talk.send(&[format!("GET /t{number}/after HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").into_bytes()]);
    let after = talk.last_answer(false).map_err(|error| format!("the next request: {error}"))?;
    if (after.status(), after.body.as_slice()) != (200, b"after") {
        return Err(format!("the next request got {:?} {:?}", after.start, latin1(&after.body)));
    }
    let used = connections();
    let Some(last) = used.last() else { return Err("the origin was not asked".into()) };
    let has_served = |at: &usize| {
        let record = origin.record(*at);
        let asked = record.requests.iter().rposition(carries);
        asked.is_some_and(|asked| asked + 1 < record.requests.len())
    };
    match case.reuse {
        Some(true) if !has_served(last) => Err("its upstream connection was not used again".into()),
        Some(false) if used.iter().any(has_served) => Err("its upstream connection was used again".into()),
        Some(false) => {
            let is_closed = || used.iter().all(|at| origin.record(*at).is_over);
            let start = std::time::Instant::now();
            while !is_closed() && start.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_millis(2));
            }
            if is_closed() { Ok(()) } else { Err("its upstream connection was left open".into()) }
        }
        _ => Ok(()),
    }
}

fn has_trailer(answer: &Message, name: &str) -> bool {
    answer.trailers.iter().any(|(key, _)| key.eq_ignore_ascii_case(name))
}
