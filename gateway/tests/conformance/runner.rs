//! Runs the cases against one gateway and one origin, many concurrently, each on its own path.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::check::{Observed, check};
use crate::origin::{self, CaseOrigin, CaseRegistry};
use crate::rule::{Action, Case, Exchange, Outcome, Topic};
use crate::support::{Client, ClientResponse, Gateway, ReceivedRequest, free_address, lock};
use crate::template::TemplateContext;

/// Concurrent cases. Most of them wait for something.
const THREADS: usize = 24;
/// Time limit for background work.
const BACKGROUND_TIMEOUT: Duration = Duration::from_secs(3);
/// Retries of a response that was read from a fill before the fill was stored.
const COLLAPSED_RETRIES_MAX: usize = 50;

/// The result of a case.
pub(crate) struct CaseResult {
    pub(crate) topic: usize,
    pub(crate) rule: usize,
    pub(crate) case: Case,
    pub(crate) failure: Option<String>,
    pub(crate) transcript: String,
}

/// Runs all rules whose name contains `filter`.
pub(crate) fn run_all(topics: &[Topic], filter: &str) -> Vec<CaseResult> {
    let registry = Arc::new(CaseRegistry::default());
    let origin = origin::start(&registry);
    let config = include_str!("gateway.toml")
        .replace("ORIGIN", &origin.address.to_string())
        .replace("UNREACHABLE", &free_address().to_string());
    let gateway = Gateway::start(&config);
    let mut jobs = Vec::new();
    for (topic, of_topic) in topics.iter().enumerate() {
        for (rule, of_rule) in of_topic.rules.iter().enumerate().filter(|(_, rule)| rule.id.contains(filter)) {
            jobs.extend(of_rule.cases.iter().map(|case| (topic, rule, case)));
        }
    }
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(&(topic, rule, case)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut transcript = String::new();
                    let outcome =
                        catch_unwind(AssertUnwindSafe(|| run_case(case, &registry, &gateway, &mut transcript)));
                    let failure = outcome.unwrap_or_else(|_| Err("the response is malformed".to_owned())).err();
                    lock(&results).push(CaseResult { topic, rule, case: case.clone(), failure, transcript });
                }
            });
        }
    });
    let panics = gateway.process.stderr.events("request_panicked");
    assert!(panics.is_empty(), "{panics:?}");
    let mut results = results.into_inner().expect("no thread panics while it holds the list");
    results.sort_by_key(|result| (result.topic, result.rule, result.case.key.clone()));
    results
}

/// The gateway and origin state that a case runs with.
struct CaseRunner<'a> {
    gateway: &'a Gateway,
    origin_case: Arc<CaseOrigin>,
    context: TemplateContext,
}

fn run_case(case: &Case, registry: &CaseRegistry, gateway: &Gateway, transcript: &mut String) -> Result<(), String> {
    let context = TemplateContext::of(format!("/{}/{}", case.route, case.key));
    let origin_case = registry.register(&case.key, context.clone(), case.default_reply.clone());
    let runner = CaseRunner { gateway, origin_case, context };
    for action in &case.actions {
        match action {
            Action::Wait(time) => std::thread::sleep(*time),
            Action::Send(exchange) => {
                runner.origin_case.script_replies(&exchange.replies);
                let start = Instant::now();
                loop {
                    let mut attempt = String::new();
                    let result = runner.run_exchange(exchange, &mut attempt);
                    let is_last = result.is_ok() || !exchange.is_eventual || start.elapsed() > BACKGROUND_TIMEOUT;
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

impl CaseRunner<'_> {
    /// Sends the requests of an exchange and checks every response.
    fn run_exchange(&self, exchange: &Exchange, transcript: &mut String) -> Result<(), String> {
        let request = self.request(exchange);
        transcript.push_str(&indented("> ", &String::from_utf8_lossy(&request)));
        let before = self.origin_case.request_count();
        let responses = if exchange.times == 1 {
            vec![self.send_request(exchange, &request)]
        } else {
            std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..exchange.times).map(|_| scope.spawn(|| self.send_request(exchange, &request))).collect();
                threads.into_iter().map(|thread| thread.join().expect("a response")).collect()
            })
        };
        if exchange.outcome == Outcome::Background {
            let start = Instant::now();
            while self.origin_case.request_count() == before && start.elapsed() < BACKGROUND_TIMEOUT {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let received = self.origin_case.received(before);
        for (request, sent) in received.iter().zip(self.origin_case.sent(before)) {
            transcript.push_str(&indented("  request to origin    | ", &String::from_utf8_lossy(&request.raw)));
            transcript.push_str(&indented("  response of origin   | ", &sent));
        }
        let mut bodies = self.origin_case.bodies();
        if exchange.outcome == Outcome::Miss {
            bodies.drain(..bodies.len().saturating_sub(1));
        }
        for response in responses {
            let (interim, response) = response?;
            transcript.push_str(&indented("< ", &format_response(&interim, &response)));
            let observed = Observed { interim: &interim, response: &response, received: &received, bodies: &bodies };
            check(exchange, &observed, &self.context)?;
        }
        Ok(())
    }

    fn send_request(&self, exchange: &Exchange, request: &[u8]) -> Result<(Vec<u16>, ClientResponse), String> {
        let mut round = 0;
        loop {
            let (interim, response) = exchange_once(self.gateway, &exchange.method, request)?;
            // A reader of a fill may receive the last byte before the body is stored.
            let is_joined = response.all("cache-status").last().is_some_and(|status| status.contains("; collapsed"));
            round += 1;
            if exchange.times > 1 || !is_joined || round > COLLAPSED_RETRIES_MAX {
                return Ok((interim, response));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn request(&self, exchange: &Exchange) -> Vec<u8> {
        let target = self.context.text(&exchange.target);
        let target = if target.contains("://") || target == "*" { target } else { self.context.path.clone() + &target };
        let mut bytes = format!("{} {target} HTTP/1.1\r\n", exchange.method).into_bytes();
        let has = |name: &str| {
            let is_name = |field: &String| field.split(':').next().is_some_and(|key| key.eq_ignore_ascii_case(name));
            exchange.fields.iter().any(is_name)
        };
        if !has("host") {
            bytes.extend(b"Host: gate.test\r\n");
        }
        for field in &exchange.fields {
            bytes.extend(self.context.bytes(field));
            bytes.extend(b"\r\n");
        }
        let body = self.context.bytes(&exchange.body);
        if !body.is_empty() && !has("content-length") && !has("transfer-encoding") {
            bytes.extend(format!("Content-Length: {}\r\n", body.len()).into_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(body);
        bytes
    }
}

/// Sends a request on a new connection, so that any worker may receive it.
fn exchange_once(gateway: &Gateway, method: &str, request: &[u8]) -> Result<(Vec<u16>, ClientResponse), String> {
    let mut client: Client = gateway.connect();
    client.try_send(request).map_err(|error| format!("the gateway does not read: {error}"))?;
    let mut interim = Vec::new();
    loop {
        let head = client.try_read_head().map_err(|error| format!("no response: {error}"))?;
        if (100..=199).contains(&head.status) {
            interim.push(head.status);
        } else {
            return Ok((interim, client.read_body(head, method)));
        }
    }
}

fn format_response(interim: &[u16], response: &ClientResponse) -> String {
    let mut text = String::new();
    for status in interim {
        text.push_str(&format!("{status}\n"));
    }
    text.push_str(&format!("{}\n", response.status));
    for (name, value) in &response.fields {
        text.push_str(&format!("{name}: {value}\n"));
    }
    text.push_str(&format!("\n{} [{:?}]\n", response.text(), response.end));
    for (name, value) in &response.trailers {
        text.push_str(&format!("{name}: {value}\n"));
    }
    text
}

/// Prefixes each line with `mark` and truncates long lines.
fn indented(mark: &str, text: &str) -> String {
    let short = |line: &str| match line.char_indices().nth(160) {
        Some((at, _)) => format!("{}... ({} bytes)", &line[..at], line.len()),
        None => line.to_owned(),
    };
    text.trim_end().lines().map(|line| format!("    {mark}{}\n", short(line))).collect()
}

/// The last request that the origin received in an exchange.
pub(crate) fn last(received: &[ReceivedRequest]) -> Result<&ReceivedRequest, String> {
    received.last().ok_or_else(|| "the origin received no request".to_owned())
}
