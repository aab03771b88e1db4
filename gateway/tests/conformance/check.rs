//! Compares a response, and the requests at the origin, with the expectations of a rule.

use crate::rule::{Exchange, Expect, Outcome};
use crate::runner::last;
use crate::support::{BodyEnd, ClientResponse, ReceivedRequest};
use crate::template::TemplateContext;

/// The result of an exchange.
pub(crate) struct Observed<'a> {
    pub(crate) interim: &'a [u16],
    pub(crate) response: &'a ClientResponse,
    /// The requests that the origin received during the exchange.
    pub(crate) received: &'a [ReceivedRequest],
    /// The bodies that the response may have.
    pub(crate) bodies: &'a [Vec<u8>],
}

pub(crate) fn check(exchange: &Exchange, observed: &Observed<'_>, context: &TemplateContext) -> Result<(), String> {
    check_outcome(exchange.outcome, observed)?;
    check_complete(exchange, observed)?;
    exchange.expects.iter().try_for_each(|expect| check_one(expect, observed, context))
}

fn check_outcome(outcome: Outcome, observed: &Observed<'_>) -> Result<(), String> {
    let request_count = observed.received.len();
    let is_hit = cache_status_parameters(observed.response).iter().any(|parameter| parameter == "hit");
    let is_conditional =
        |request: &ReceivedRequest| request.field("if-none-match").or(request.field("if-modified-since")).is_some();
    let holds = match outcome {
        Outcome::Hit => request_count == 0 && is_hit,
        Outcome::Miss => request_count == 1 && !is_hit,
        Outcome::Validated => request_count == 1 && !is_hit && is_conditional(&observed.received[0]),
        Outcome::Background => request_count == 1 && is_hit,
        Outcome::Fallback => request_count > 0,
        Outcome::Local => request_count == 0 && !is_hit,
        Outcome::Any => true,
    };
    let what = match outcome {
        Outcome::Hit => "a hit, and no request to the origin",
        Outcome::Miss => "one request to the origin, and no hit",
        Outcome::Validated => "a conditional request to the origin, and no hit",
        Outcome::Background => "a hit, and one background request to the origin",
        Outcome::Fallback => "a request to the origin",
        Outcome::Local => "a response of the gateway, and no request to the origin",
        Outcome::Any => "anything",
    };
    let status = observed.response.all("cache-status").join(", ");
    verify(holds, || format!("expected {what}; the origin received {request_count} requests, Cache-Status: {status}"))
}

/// Default expectations: the response is complete, and a 200 has a body that the origin sent.
fn check_complete(exchange: &Exchange, observed: &Observed<'_>) -> Result<(), String> {
    let expects = |which: fn(&Expect) -> bool| exchange.expects.iter().any(which);
    let is_truncated = expects(|expect| matches!(expect, Expect::Truncated));
    if is_truncated {
        let appears_complete = observed.response.end == BodyEnd::Complete && observed.response.status < 500;
        return verify(!appears_complete, || "a truncated response appears complete".to_owned());
    }
    verify(observed.response.end == BodyEnd::Complete, || "the response is truncated".to_owned())?;
    let has_own = expects(|expect| matches!(expect, Expect::Body(_) | Expect::BodyContains(_)));
    if has_own || observed.response.status != 200 || exchange.method != "GET" || exchange.outcome == Outcome::Local {
        return Ok(());
    }
    verify(observed.bodies.contains(&observed.response.body), || {
        format!("a body that the origin did not send: {:?}", observed.response.text())
    })
}

fn check_one(expect: &Expect, observed: &Observed<'_>, context: &TemplateContext) -> Result<(), String> {
    let response = observed.response;
    match expect {
        Expect::Status(status) => same("the status", &response.status, status),
        Expect::Field(name, value) => line(name, &response.all(name), &context.text(value)),
        Expect::Lines(name, values) => {
            let values: Vec<String> = values.iter().map(|value| context.text(value)).collect();
            same(name, &response.all(name), &values.iter().map(String::as_str).collect())
        }
        Expect::Contains(name, part) => contains(name, &response.all(name), &context.text(part)),
        Expect::Has(name) => verify(response.field(name).is_some(), || format!("no {name}")),
        Expect::Absent(name) => absent(name, &response.all(name)),
        Expect::Body(body) => same("the body", &response.text(), &context.text(body)),
        Expect::BodyContains(part) => contains("the body", &[&response.text()], &context.text(part)),
        Expect::CacheStatus(parameter, should_be_present) => {
            let parameters = cache_status_parameters(response);
            let is_present = parameters.iter().any(|actual| is_parameter(actual, parameter));
            let not = if *should_be_present { "" } else { "no " };
            verify(is_present == *should_be_present, || {
                format!("Cache-Status should have {not}{parameter}, has {parameters:?}")
            })
        }
        Expect::Interim(status) => {
            verify(observed.interim.contains(status), || format!("no {status} before it, but {:?}", observed.interim))
        }
        Expect::Trailer(name, value) => {
            let lines: Vec<&str> = response
                .trailers
                .iter()
                .filter(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.as_str())
                .collect();
            line(name, &lines, &context.text(value))
        }
        Expect::NoTrailers => {
            verify(response.trailers.is_empty(), || format!("unexpected trailers: {:?}", response.trailers))
        }
        Expect::Truncated => Ok(()),
        sent => check_sent(sent, last(observed.received)?, context),
    }
}

fn check_sent(expect: &Expect, received: &ReceivedRequest, context: &TemplateContext) -> Result<(), String> {
    let wrong = |error| format!("the request at the origin: {error}");
    match expect {
        Expect::SentMethod(method) => same("its method", &received.method, method),
        Expect::SentTarget(suffix) => {
            same("its target", &received.target, &format!("{}{}", context.path, context.text(suffix)))
        }
        Expect::SentField(name, value) => line(name, &received.all(name), &context.text(value)),
        Expect::SentContains(name, part) => contains(name, &received.all(name), &context.text(part)),
        Expect::SentHas(name) => verify(received.field(name).is_some(), || format!("no {name}")),
        Expect::SentAbsent(name) => absent(name, &received.all(name)),
        Expect::SentBody(body) => {
            same("its body", &String::from_utf8_lossy(&received.body).into_owned(), &context.text(body))
        }
        _ => Ok(()),
    }
    .map_err(wrong)
}

/// The parameters of the `Cache-Status` cache_status_parameters of the gateway, which is the last
/// one.
fn cache_status_parameters(response: &ClientResponse) -> Vec<String> {
    let lines = response.all("cache-status");
    let last = lines.last().copied().unwrap_or_default();
    // A key may contain commas and semicolons.
    let (before, after) = match last.split_once("; key=\"") {
        Some((before, rest)) => (before, rest.split_once('"').map_or("", |(_, after)| after)),
        None => (last, ""),
    };
    before.split("; ").skip(1).chain(after.split("; ").skip(1)).map(str::to_owned).collect()
}

/// Whether `actual` is `name` or `name=value`, where the expected value may be a range.
fn is_parameter(actual: &str, expected: &str) -> bool {
    match (actual.split_once('='), expected.split_once('=')) {
        (Some((name, value)), Some((expected, range))) => {
            name == expected && (value == range || is_within(value, range))
        }
        (Some((name, _)), None) => name == expected,
        _ => actual == expected,
    }
}

/// Whether `value` is in a range of numbers such as `10..12`, both ends inclusive.
fn is_within(value: &str, range: &str) -> bool {
    let number = |text: &str| text.parse::<i64>().ok();
    let bounds = range.split_once("..").map(|(low, high)| (number(low), number(high)));
    matches!((bounds, number(value)), (Some((Some(low), Some(high))), Some(value)) if (low..=high).contains(&value))
}

fn line(name: &str, lines: &[&str], value: &str) -> Result<(), String> {
    let is_present = lines.iter().any(|line| *line == value || is_within(line, value));
    verify(is_present, || format!("{name} should be {value:?}, is {lines:?}"))
}

fn contains(what: &str, lines: &[&str], part: &str) -> Result<(), String> {
    verify(lines.iter().any(|line| line.contains(part)), || format!("{what} should contain {part:?}, is {lines:?}"))
}

fn absent(name: &str, lines: &[&str]) -> Result<(), String> {
    verify(lines.is_empty(), || format!("{name} should be absent, is {lines:?}"))
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: &T, should: &T) -> Result<(), String> {
    verify(is == should, || format!("{what} should be {should:?}, is {is:?}"))
}

fn verify(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}
