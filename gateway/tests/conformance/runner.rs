//! Plays the cases against one gateway and one origin, many at a time, each on a path of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::check::{Seen, check};
use crate::origin::{self, Book, Part};
use crate::rule::{Act, Case, Exchange, Outcome, Topic};
use crate::support::{Answer, Client, Gateway, Received, free_address, lock};
use crate::text::Moment;

/// Cases under way at a time: most of them wait for something.
const THREADS: usize = 24;
/// How long something in the background may take.
const SOON: Duration = Duration::from_secs(3);
/// How often an answer is asked for again because it was read off a fill that was not yet in the store.
const COLLAPSES_MAX: usize = 50;

/// How a case went.
pub(crate) struct Verdict {
    pub(crate) topic: usize,
    pub(crate) rule: usize,
    pub(crate) case: Case,
    pub(crate) failure: Option<String>,
    pub(crate) transcript: String,
}

/// Plays all rules whose name contains `wanted`.
pub(crate) fn play_all(topics: &[Topic], wanted: &str) -> Vec<Verdict> {
    let book = Arc::new(Book::default());
    let origin = origin::start(&book);
    let config = include_str!("gateway.toml")
        .replace("ORIGIN", &origin.address.to_string())
        .replace("NOBODY", &free_address().to_string());
    let gateway = Gateway::start(&config);
    let mut jobs = Vec::new();
    for (topic, of_topic) in topics.iter().enumerate() {
        for (rule, of_rule) in of_topic.rules.iter().enumerate().filter(|(_, rule)| rule.id.contains(wanted)) {
            jobs.extend(of_rule.cases.iter().map(|case| (topic, rule, case)));
        }
    }
    let (next, verdicts) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(&(topic, rule, case)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut transcript = String::new();
                    let played = catch_unwind(AssertUnwindSafe(|| play(case, &book, &gateway, &mut transcript)));
                    let failure = played.unwrap_or_else(|_| Err("the answer is malformed".to_owned())).err();
                    lock(&verdicts).push(Verdict { topic, rule, case: case.clone(), failure, transcript });
                }
            });
        }
    });
    let panics = gateway.process.stderr.events("request_panicked");
    assert!(panics.is_empty(), "{panics:?}");
    let mut verdicts = verdicts.into_inner().expect("no thread panics while it holds the list");
    verdicts.sort_by_key(|verdict| (verdict.topic, verdict.rule, verdict.case.key.clone()));
    verdicts
}

/// What an exchange is played on.
struct Stage<'a> {
    gateway: &'a Gateway,
    part: Arc<Part>,
    moment: Moment,
}

fn play(case: &Case, book: &Book, gateway: &Gateway, transcript: &mut String) -> Result<(), String> {
    let moment = Moment::of(format!("/{}/{}", case.profile, case.key));
    let part = book.enter(&case.key, moment.clone(), case.standing.clone());
    let stage = Stage { gateway, part, moment };
    for act in &case.acts {
        match act {
            Act::Wait(time) => std::thread::sleep(*time),
            Act::Ask(exchange) => {
                stage.part.expect(&exchange.replies);
                let start = Instant::now();
                loop {
                    let mut attempt = String::new();
                    let result = stage.ask(exchange, &mut attempt);
                    let is_last = result.is_ok() || !exchange.is_eventual || start.elapsed() > SOON;
                    if is_last {
                        transcript.push_str(&attempt);
                        result.map_err(|error| format!("{}: {error}", exchange.at))?;
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }
    Ok(())
}

impl Stage<'_> {
    /// One exchange: asks, and checks every answer.
    fn ask(&self, exchange: &Exchange, transcript: &mut String) -> Result<(), String> {
        let request = self.request(exchange);
        transcript.push_str(&indented("> ", &String::from_utf8_lossy(&request)));
        let before = self.part.asked();
        let answers = if exchange.times == 1 {
            vec![self.answer(exchange, &request)]
        } else {
            std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..exchange.times).map(|_| scope.spawn(|| self.answer(exchange, &request))).collect();
                threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
            })
        };
        if exchange.outcome == Outcome::Aside {
            let start = Instant::now();
            while self.part.asked() == before && start.elapsed() < SOON {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let received = self.part.received(before);
        for (request, spoken) in received.iter().zip(self.part.spoken(before)) {
            transcript.push_str(&indented("  origin got  | ", &String::from_utf8_lossy(&request.raw)));
            transcript.push_str(&indented("  origin said | ", &spoken));
        }
        let mut bodies = self.part.bodies();
        if exchange.outcome == Outcome::Miss {
            bodies.drain(..bodies.len().saturating_sub(1));
        }
        for answer in answers {
            let (interim, answer) = answer?;
            transcript.push_str(&indented("< ", &written(&interim, &answer)));
            let seen = Seen { interim: &interim, answer: &answer, received: &received, bodies: &bodies };
            check(exchange, &seen, &self.moment)?;
        }
        Ok(())
    }

    fn answer(&self, exchange: &Exchange, request: &[u8]) -> Result<(Vec<u16>, Answer), String> {
        let mut round = 0;
        loop {
            let (interim, answer) = exchange_once(self.gateway, &exchange.method, request)?;
            // The reader of a fill may have the last byte before the store has the whole.
            let is_joined = answer.all("cache-status").last().is_some_and(|status| status.contains("; collapsed"));
            round += 1;
            if exchange.times > 1 || !is_joined || round > COLLAPSES_MAX {
                return Ok((interim, answer));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn request(&self, exchange: &Exchange) -> Vec<u8> {
        let target = self.moment.text(&exchange.target);
        let target = if target.contains("://") || target == "*" { target } else { self.moment.path.clone() + &target };
        let mut bytes = format!("{} {target} HTTP/1.1\r\n", exchange.method).into_bytes();
        let has = |name: &str| {
            let is_name = |field: &String| field.split(':').next().is_some_and(|key| key.eq_ignore_ascii_case(name));
            exchange.fields.iter().any(is_name)
        };
        if !has("host") {
            bytes.extend(b"Host: gate.test\r\n");
        }
        for field in &exchange.fields {
            bytes.extend(self.moment.bytes(field));
            bytes.extend(b"\r\n");
        }
        let body = self.moment.bytes(&exchange.body);
        if !body.is_empty() && !has("content-length") && !has("transfer-encoding") {
            bytes.extend(format!("Content-Length: {}\r\n", body.len()).into_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(body);
        bytes
    }
}

/// Sends a request on a connection of its own, so that any worker may get it.
fn exchange_once(gateway: &Gateway, method: &str, request: &[u8]) -> Result<(Vec<u16>, Answer), String> {
    let mut client: Client = gateway.connect();
    client.try_send(request).map_err(|error| format!("the gateway does not read: {error}"))?;
    let mut interim = Vec::new();
    loop {
        let head = client.try_head().map_err(|error| format!("no answer: {error}"))?;
        if (100..=199).contains(&head.status) {
            interim.push(head.status);
        } else {
            return Ok((interim, client.rest(head, method)));
        }
    }
}

fn written(interim: &[u16], answer: &Answer) -> String {
    let mut text = String::new();
    for status in interim {
        text.push_str(&format!("{status}\n"));
    }
    text.push_str(&format!("{}\n", answer.status));
    for (name, value) in &answer.fields {
        text.push_str(&format!("{name}: {value}\n"));
    }
    text.push_str(&format!("\n{} [{:?}]\n", answer.text(), answer.end));
    for (name, value) in &answer.trailers {
        text.push_str(&format!("{name}: {value}\n"));
    }
    text
}

/// Each line behind `mark`, long ones cut.
fn indented(mark: &str, text: &str) -> String {
    let short = |line: &str| match line.char_indices().nth(160) {
        Some((at, _)) => format!("{}... ({} bytes)", &line[..at], line.len()),
        None => line.to_owned(),
    };
    text.trim_end().lines().map(|line| format!("    {mark}{}\n", short(line))).collect()
}

/// The last request of those received in an exchange.
pub(crate) fn last(received: &[Received]) -> Result<&Received, String> {
    received.last().ok_or_else(|| "the origin got nothing".to_owned())
}
