//! Parses the tables. A malformed line fails the test with its file and line number.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use crate::rule::{Action, Case, Exchange, Expect, Framing, Outcome, Reply, ResponseSpec, Rule, Step, Topic};

/// The topics in the order of the page.
const TOPICS: [&str; 15] = [
    "storing",
    "statuses",
    "freshness",
    "requests",
    "keys",
    "vary",
    "validation",
    "update304",
    "stale",
    "range",
    "targeted",
    "invalidation",
    "headers",
    "hostile",
    "configuration",
];

/// A line and its position.
struct Line {
    at: String,
    text: String,
}

pub(crate) fn topics() -> Vec<Topic> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let topics: Vec<Topic> = TOPICS.iter().map(|name| topic(&directory, name)).collect();
    let mut seen = HashSet::new();
    for rule in topics.iter().flat_map(|topic| &topic.rules) {
        assert!(seen.insert(&rule.id), "two rules are named {}", rule.id);
    }
    let tables = std::fs::read_dir(&directory).expect("the tables").filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "table"))
    });
    assert_eq!(tables.count(), TOPICS.len(), "a table without a topic");
    topics
}

fn topic(directory: &Path, name: &str) -> Topic {
    let text = std::fs::read_to_string(directory.join(format!("{name}.table")))
        .unwrap_or_else(|error| panic!("{name}.table: {error}"));
    let mut topic = Topic { name: name.to_owned(), title: String::new(), about: Vec::new(), rules: Vec::new() };
    let mut blocks: Vec<Vec<Line>> = Vec::new();
    for (number, text) in text.lines().enumerate() {
        let text = text.trim_end();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let line = Line { at: format!("{name}.table:{}", number + 1), text: text.to_owned() };
        match text.split_once(' ') {
            Some(("topic", title)) => topic.title = title.to_owned(),
            Some(("about", text)) => topic.about.push(text.to_owned()),
            Some(("rule", _)) => blocks.push(vec![line]),
            _ => blocks.last_mut().unwrap_or_else(|| panic!("{}: before the first rule", line.at)).push(line),
        }
    }
    assert!(!topic.title.is_empty(), "{name}.table has no title");
    topic.rules = blocks.iter().map(|block| rule(block)).collect();
    topic
}

fn rule(block: &[Line]) -> Rule {
    let at = &block[0].at;
    let mut parts = block[0].text["rule ".len()..].split(", ");
    let id = parts.next().unwrap_or_default().to_owned();
    assert!(
        !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'),
        "{at}: the name of a rule is lower case letters, digits and hyphens"
    );
    let sections: Vec<String> = parts.map(str::to_owned).collect();
    assert!(!sections.is_empty() && sections.iter().all(|section| is_section(section)), "{at}: no section");
    let is_statement = |line: &&Line| {
        line.text.starts_with(['<', '>', '=', '@', ' '])
            || ["each ", "on ", "wait "].iter().any(|word| line.text.starts_with(word))
    };
    let (words, statements): (Vec<&Line>, Vec<&Line>) = block[1..].iter().partition(|line| !is_statement(line));
    let sentence = words.iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join(" ");
    assert!(sentence.ends_with('.'), "{at}: a rule is a sentence");
    let each = statements.iter().find_map(|line| line.text.strip_prefix("each ")?.split_once(": "));
    let values: Vec<&str> = each.map_or_else(|| vec![""], |(_, values)| values.split(" | ").map(str::trim).collect());
    let name = each.map_or_else(String::new, |(name, _)| format!("{{{name}}}"));
    let cases = values.iter().enumerate().map(|(number, value)| {
        let filled = |line: &&&Line| Line {
            at: line.at.clone(),
            text: if name.is_empty() { line.text.clone() } else { line.text.replace(&name, value) },
        };
        let lines: Vec<Line> =
            statements.iter().filter(|line| !line.text.starts_with("each ")).map(|line| filled(&line)).collect();
        let key = if each.is_some() { format!("{id}-{number}") } else { id.clone() };
        case(at, key, value, &lines)
    });
    let cases = cases.collect();
    let sentence = if name.is_empty() { sentence } else { sentence.replace(&name, &enumeration(&values)) };
    Rule { id, sections, sentence, cases }
}

/// Whether the text is `RFC`, a number and a section.
fn is_section(text: &str) -> bool {
    let words: Vec<&str> = text.split(' ').collect();
    matches!(words[..], ["RFC", number, section]
        if number.bytes().all(|byte| byte.is_ascii_digit())
            && section.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.'))
}

fn enumeration(values: &[&str]) -> String {
    match values {
        [one] => (*one).to_owned(),
        [some @ .., last] => format!("{} and {last}", some.join(", ")),
        [] => String::new(),
    }
}

fn case(at: &str, key: String, value: &str, lines: &[Line]) -> Case {
    let mut case = Case {
        at: at.to_owned(),
        key,
        value: value.to_owned(),
        route: "plain".to_owned(),
        default_reply: None,
        actions: Vec::new(),
    };
    let mut is_after_request = false;
    for Line { at, text } in lines {
        if let Some(field) = text.strip_prefix("    ") {
            let exchange = last(&mut case);
            let fields = match exchange {
                Some(exchange) if is_after_request => &mut exchange.fields,
                Some(Exchange { replies, .. }) if !replies.is_empty() => fields_of(replies.last_mut(), at),
                _ => fields_of(case.default_reply.as_mut(), at),
            };
            fields.push(field.to_owned());
            continue;
        }
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        match word {
            "on" => case.route = rest.to_owned(),
            "wait" => case.actions.push(Action::Wait(duration(at, rest))),
            ">" => case.actions.push(Action::Send(exchange(at, rest))),
            "<" => match last(&mut case) {
                Some(exchange) => exchange.replies.push(Reply(vec![step(at, rest)])),
                None => case.default_reply = Some(Reply(vec![step(at, rest)])),
            },
            "<+" => {
                let step = step(at, rest);
                let reply = match last(&mut case) {
                    Some(exchange) => exchange.replies.last_mut(),
                    None => case.default_reply.as_mut(),
                };
                reply.unwrap_or_else(|| panic!("{at}: nothing to continue")).0.push(step);
            }
            "=" => last_request(&mut case, at).expects.push(expect(at, rest)),
            "@" => last_request(&mut case, at).expects.push(expect_sent(at, rest)),
            _ => panic!("{at}: unknown statement {text:?}"),
        }
        is_after_request = word == ">";
    }
    assert!(case.actions.iter().any(|action| matches!(action, Action::Send(_))), "{at}: no request");
    case
}

fn last(case: &mut Case) -> Option<&mut Exchange> {
    case.actions.iter_mut().rev().find_map(|action| match action {
        Action::Send(exchange) => Some(exchange),
        Action::Wait(_) => None,
    })
}

fn last_request<'a>(case: &'a mut Case, at: &str) -> &'a mut Exchange {
    last(case).unwrap_or_else(|| panic!("{at}: no request"))
}

fn fields_of<'a>(reply: Option<&'a mut Reply>, at: &str) -> &'a mut Vec<String> {
    match reply.and_then(|reply| reply.0.last_mut()) {
        Some(Step::Head(spec)) => &mut spec.fields,
        _ => panic!("{at}: a field without a message"),
    }
}

/// Splits the text into words. One word in double quotes may contain spaces.
fn words(at: &str, text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = if rest.starts_with('"') {
            rest.rfind('"').filter(|end| *end > 0).unwrap_or_else(|| panic!("{at}: an open quote")) + 1
        } else {
            rest.find(' ').unwrap_or(rest.len())
        };
        words.push(rest[..end].to_owned());
        rest = rest[end..].trim_start();
    }
    words
}

fn quoted(word: &str) -> Option<String> {
    Some(word.strip_prefix('"')?.strip_suffix('"')?.to_owned())
}

fn exchange(at: &str, text: &str) -> Exchange {
    let mut words = words(at, text).into_iter();
    let mut exchange = Exchange {
        at: at.to_owned(),
        method: words.next().unwrap_or_else(|| panic!("{at}: no method")),
        target: String::new(),
        fields: Vec::new(),
        body: String::new(),
        outcome: Outcome::Miss,
        times: 1,
        is_eventual: false,
        replies: Vec::new(),
        expects: Vec::new(),
    };
    let mut outcome = None;
    for word in words {
        match word.as_str() {
            "hit" => outcome = Some(Outcome::Hit),
            "miss" => outcome = Some(Outcome::Miss),
            "validated" => outcome = Some(Outcome::Validated),
            "background" => outcome = Some(Outcome::Background),
            "fallback" => outcome = Some(Outcome::Fallback),
            "local" => outcome = Some(Outcome::Local),
            "any" => outcome = Some(Outcome::Any),
            "eventually" => exchange.is_eventual = true,
            word if word.starts_with(['/', '?', '#', '%', ';', '*']) || word.contains("://") => {
                exchange.target = word.to_owned();
            }
            word => match (quoted(word), word.parse(), word.strip_prefix('x').and_then(|times| times.parse().ok())) {
                (Some(body), ..) => exchange.body = body,
                (_, Ok(status), _) => exchange.expects.push(Expect::Status(status)),
                (.., Some(times)) => exchange.times = times,
                _ => panic!("{at}: unknown word {word:?}"),
            },
        }
    }
    exchange.outcome = outcome.unwrap_or_else(|| panic!("{at}: no outcome"));
    exchange
}

fn step(at: &str, text: &str) -> Step {
    if let Some(bytes) = text.strip_prefix("raw ") {
        return Step::Raw(bytes.to_owned());
    }
    let words = words(at, text);
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["close"] => Step::Close,
        ["reset"] => Step::Reset,
        ["hang"] => Step::Hang,
        ["pause", time] => Step::Pause(duration(at, time)),
        [status, ref rest @ ..] => {
            let status = status.parse().unwrap_or_else(|_| panic!("{at}: a status"));
            let (mut framing, mut body) = (Framing::Length, None);
            for word in rest {
                match *word {
                    "chunked" => framing = Framing::Chunked,
                    "unframed" => framing = Framing::None,
                    word => body = Some(quoted(word).unwrap_or_else(|| panic!("{at}: unknown word {word:?}"))),
                }
            }
            Step::Head(ResponseSpec { status, framing, body, fields: Vec::new() })
        }
        [] => panic!("{at}: an empty reply"),
    }
}

fn expect(at: &str, text: &str) -> Expect {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let rest = rest.trim_start();
    match word {
        "no" if rest == "trailers" => Expect::NoTrailers,
        "no" => Expect::Absent(rest.to_owned()),
        "has" => Expect::Has(rest.to_owned()),
        "truncated" => Expect::Truncated,
        "body" => match rest.strip_prefix("~ ") {
            Some(part) => Expect::BodyContains(part.to_owned()),
            None => Expect::Body(quoted(rest).unwrap_or_else(|| panic!("{at}: a body in quotes"))),
        },
        "cache-status" => match rest.strip_prefix("no ") {
            Some(parameter) => Expect::CacheStatus(parameter.to_owned(), false),
            None => Expect::CacheStatus(rest.to_owned(), true),
        },
        "interim" => Expect::Interim(rest.parse().unwrap_or_else(|_| panic!("{at}: a status"))),
        "trailer" => {
            let (name, value) = field(at, rest);
            Expect::Trailer(name, value)
        }
        "lines" => {
            let (name, values) = field(at, rest);
            Expect::Lines(name, values.split(" | ").map(str::to_owned).collect())
        }
        _ => match (text.parse(), text.split_once(" ~ ")) {
            (Ok(status), _) => Expect::Status(status),
            (_, Some((name, part))) if !name.contains(':') => Expect::Contains(name.to_owned(), part.to_owned()),
            _ => {
                let (name, value) = field(at, text);
                Expect::Field(name, value)
            }
        },
    }
}

fn expect_sent(at: &str, text: &str) -> Expect {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    match word {
        "no" => Expect::SentAbsent(rest.to_owned()),
        "has" => Expect::SentHas(rest.to_owned()),
        "method" => Expect::SentMethod(rest.to_owned()),
        "target" => Expect::SentTarget(rest.to_owned()),
        "body" => Expect::SentBody(quoted(rest).unwrap_or_else(|| panic!("{at}: a body in quotes"))),
        _ => match text.split_once(" ~ ") {
            Some((name, part)) if !name.contains(':') => Expect::SentContains(name.to_owned(), part.to_owned()),
            _ => {
                let (name, value) = field(at, text);
                Expect::SentField(name, value)
            }
        },
    }
}

fn field(at: &str, text: &str) -> (String, String) {
    let (name, value) = text.split_once(':').unwrap_or_else(|| panic!("{at}: no field in {text:?}"));
    (name.to_owned(), value.trim_start().to_owned())
}

fn duration(at: &str, text: &str) -> Duration {
    let millis = text.strip_suffix("ms").and_then(|count| count.parse().ok());
    let seconds = || text.strip_suffix('s').and_then(|count| count.parse::<u64>().ok());
    let millis = millis.or_else(|| seconds().map(|count| count * 1000));
    Duration::from_millis(millis.unwrap_or_else(|| panic!("{at}: a time in ms or s")))
}
