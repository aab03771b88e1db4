//! Compares an answer, and what the origin got, with what a row expects.

use crate::rule::{Exchange, Expect, Outcome};
use crate::runner::last;
use crate::support::{Answer, End, Received};
use crate::text::Moment;

/// What an exchange came to.
pub(crate) struct Seen<'a> {
    pub(crate) interim: &'a [u16],
    pub(crate) answer: &'a Answer,
    /// The requests that the origin got meanwhile.
    pub(crate) received: &'a [Received],
    /// Bodies that may answer.
    pub(crate) bodies: &'a [Vec<u8>],
}

pub(crate) fn check(exchange: &Exchange, seen: &Seen<'_>, moment: &Moment) -> Result<(), String> {
    check_outcome(exchange.outcome, seen)?;
    check_whole(exchange, seen)?;
    exchange.expects.iter().try_for_each(|expect| check_one(expect, seen, moment))
}

fn check_outcome(outcome: Outcome, seen: &Seen<'_>) -> Result<(), String> {
    let asked = seen.received.len();
    let is_hit = member(seen.answer).iter().any(|parameter| parameter == "hit");
    let is_conditional =
        |request: &Received| request.field("if-none-match").or(request.field("if-modified-since")).is_some();
    let is_so = match outcome {
        Outcome::Hit => asked == 0 && is_hit,
        Outcome::Miss => asked == 1 && !is_hit,
        Outcome::Valid => asked == 1 && !is_hit && is_conditional(&seen.received[0]),
        Outcome::Aside => asked == 1 && is_hit,
        Outcome::Failed => asked > 0,
        Outcome::Refused => asked == 0 && !is_hit,
        Outcome::Any => true,
    };
    let what = match outcome {
        Outcome::Hit => "a hit, with the origin left alone",
        Outcome::Miss => "the origin to be asked once, and no hit",
        Outcome::Valid => "a conditional request to the origin, and no hit",
        Outcome::Aside => "a hit, and one request to the origin beside",
        Outcome::Failed => "the origin to be asked",
        Outcome::Refused => "an answer of the gateway, with the origin left alone",
        Outcome::Any => "anything",
    };
    let status = seen.answer.all("cache-status").join(", ");
    verify(is_so, || format!("expected {what}; it was asked {asked} times, Cache-Status: {status}"))
}

/// What holds unless a row says otherwise: a whole answer, and with 200 a body that the origin sent.
fn check_whole(exchange: &Exchange, seen: &Seen<'_>) -> Result<(), String> {
    let expects = |which: fn(&Expect) -> bool| exchange.expects.iter().any(which);
    let is_cut = expects(|expect| matches!(expect, Expect::Cut));
    if is_cut {
        let looks_whole = seen.answer.end == End::Whole && seen.answer.status < 500;
        return verify(!looks_whole, || "a cut answer looks whole".to_owned());
    }
    verify(seen.answer.end == End::Whole, || "the answer is cut".to_owned())?;
    let has_own = expects(|expect| matches!(expect, Expect::Body(_) | Expect::BodyContains(_)));
    if has_own || seen.answer.status != 200 || exchange.method != "GET" || exchange.outcome == Outcome::Refused {
        return Ok(());
    }
    verify(seen.bodies.contains(&seen.answer.body), || format!("a body from elsewhere: {:?}", seen.answer.text()))
}

fn check_one(expect: &Expect, seen: &Seen<'_>, moment: &Moment) -> Result<(), String> {
    let answer = seen.answer;
    match expect {
        Expect::Status(status) => same("the status", &answer.status, status),
        Expect::Field(name, value) => line(name, &answer.all(name), &moment.text(value)),
        Expect::Lines(name, values) => {
            let values: Vec<String> = values.iter().map(|value| moment.text(value)).collect();
            same(name, &answer.all(name), &values.iter().map(String::as_str).collect())
        }
        Expect::Contains(name, part) => contains(name, &answer.all(name), &moment.text(part)),
        Expect::Has(name) => verify(answer.field(name).is_some(), || format!("no {name}")),
        Expect::Absent(name) => absent(name, &answer.all(name)),
        Expect::Body(body) => same("the body", &answer.text(), &moment.text(body)),
        Expect::BodyContains(part) => contains("the body", &[&answer.text()], &moment.text(part)),
        Expect::Tells(parameter, is_wanted) => {
            let told = member(answer);
            let is_told = told.iter().any(|one| is_parameter(one, parameter));
            let not = if *is_wanted { "" } else { "no " };
            verify(is_told == *is_wanted, || format!("Cache-Status should tell {not}{parameter}, tells {told:?}"))
        }
        Expect::Interim(status) => {
            verify(seen.interim.contains(status), || format!("no {status} before it, but {:?}", seen.interim))
        }
        Expect::Trailer(name, value) => {
            let lines: Vec<&str> = answer
                .trailers
                .iter()
                .filter(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.as_str())
                .collect();
            line(name, &lines, &moment.text(value))
        }
        Expect::NoTrailers => {
            verify(answer.trailers.is_empty(), || format!("trailers that nobody asked for: {:?}", answer.trailers))
        }
        Expect::Cut => Ok(()),
        sent => check_sent(sent, last(seen.received)?, moment),
    }
}

fn check_sent(expect: &Expect, got: &Received, moment: &Moment) -> Result<(), String> {
    let wrong = |error| format!("the request at the origin: {error}");
    match expect {
        Expect::SentMethod(method) => same("its method", &got.method, method),
        Expect::SentTarget(suffix) => {
            same("its target", &got.target, &format!("{}{}", moment.path, moment.text(suffix)))
        }
        Expect::SentField(name, value) => line(name, &got.all(name), &moment.text(value)),
        Expect::SentContains(name, part) => contains(name, &got.all(name), &moment.text(part)),
        Expect::SentHas(name) => verify(got.field(name).is_some(), || format!("no {name}")),
        Expect::SentAbsent(name) => absent(name, &got.all(name)),
        Expect::SentBody(body) => {
            same("its body", &String::from_utf8_lossy(&got.body).into_owned(), &moment.text(body))
        }
        _ => Ok(()),
    }
    .map_err(wrong)
}

/// The parameters of the gateway's member of `Cache-Status`, which is the last.
fn member(answer: &Answer) -> Vec<String> {
    let lines = answer.all("cache-status");
    let last = lines.last().copied().unwrap_or_default();
    // A key may have commas and semicolons in it.
    let (before, after) = match last.split_once("; key=\"") {
        Some((before, rest)) => (before, rest.split_once('"').map_or("", |(_, after)| after)),
        None => (last, ""),
    };
    before.split("; ").skip(1).chain(after.split("; ").skip(1)).map(str::to_owned).collect()
}

/// `name`, or `name=value`, of which the value may be a range.
fn is_parameter(told: &str, wanted: &str) -> bool {
    match (told.split_once('='), wanted.split_once('=')) {
        (Some((name, value)), Some((wanted, range))) => name == wanted && (value == range || is_within(value, range)),
        (Some((name, _)), None) => name == wanted,
        _ => told == wanted,
    }
}

/// Whether `value` is a number of a range such as `10..12`, both ends included.
fn is_within(value: &str, range: &str) -> bool {
    let number = |text: &str| text.parse::<i64>().ok();
    let bounds = range.split_once("..").map(|(low, high)| (number(low), number(high)));
    matches!((bounds, number(value)), (Some((Some(low), Some(high))), Some(value)) if (low..=high).contains(&value))
}

fn line(name: &str, lines: &[&str], value: &str) -> Result<(), String> {
    let is_there = lines.iter().any(|line| *line == value || is_within(line, value));
    verify(is_there, || format!("{name} should be {value:?}, is {lines:?}"))
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
