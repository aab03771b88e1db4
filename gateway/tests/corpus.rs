//! The corpus against the binary: raw requests and raw answers, cut in three ways, and what must come out at the other side.

mod support;

#[path = "corpus/answers.rs"]
mod answers;
#[path = "corpus/format.rs"]
mod format;
#[path = "corpus/origin.rs"]
mod origin;
#[path = "corpus/requests.rs"]
mod requests;
#[path = "corpus/talk.rs"]
mod talk;
#[path = "corpus/wire.rs"]
mod wire;

use std::io::Write as _;

use support::{Gateway, one_route};

/// No breaker may open: most of what these origins say is wrong.
const BREAKER: &str = "breaker = { minimum = 1000000, error_ratio = 1.0, slow = \"1h\" }";

#[test]
fn requests_get_what_they_deserve_and_the_origin_only_what_is_well_formed() {
    let origin = requests::origin();
    let config = one_route(origin.address, "cache = { mode = \"off\" }", requests::LIMITS);
    let gateway = Gateway::start(&format!("[server]\nworkers = 2\n{config}"));
    let rows: Vec<requests::Row> =
        format::files("requests").iter().map(|path| requests::play(path, &gateway, &origin)).collect();
    let mut table = format!(
        "\n{:<12} {:>5} {:>5} {:>8} {:>4} {:>8}  refused by reason\n",
        "requests", "cases", "runs", "accepted", "gaps", "failures"
    );
    for row in &rows {
        let refused: Vec<String> = row.refused.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        table.push_str(&format!(
            "{:<12} {:>5} {:>5} {:>8} {:>4} {:>8}  {}\n",
            row.name,
            row.cases,
            row.runs,
            row.accepted,
            row.gaps,
            row.failures.len(),
            refused.join(", ")
        ));
    }
    let cases: usize = rows.iter().map(|row| row.cases).sum();
    table.push_str(&format!("{:<12} {cases:>5}\n", "together"));
    say(&table);
    let audit = ("audit".to_owned(), requests::audit(&rows, &origin));
    report(rows.into_iter().map(|row| (row.name, row.failures)).chain([audit]));
    assert!(cases >= 300, "{cases} cases");
}

#[test]
fn answers_are_passed_on_whole_or_not_at_all() {
    let book = answers::Book::open();
    let origins: Vec<origin::RawOrigin> = (0..answers::THREADS).map(|_| book.origin()).collect();
    let mut config = "[server]\nworkers = 1\n".to_owned();
    for (number, origin) in origins.iter().enumerate() {
        config.push_str(&format!("[upstreams.o{number}]\nendpoints = [\"http://{}\"]\n{BREAKER}\n", origin.address));
        for (kind, mode) in [('t', "off"), ('c', "standard")] {
            config.push_str(&format!(
                "[[routes]]\nname = \"{kind}{number}\"\nmatch = {{ path = \"/{kind}{number}/*\" }}\nupstream = \"o{number}\"\n\
                 cache = {{ mode = \"{mode}\" }}\ndegrade = {{ status = 502 }}\n"
            ));
        }
    }
    let gateway = Gateway::start(&config);
    let rows: Vec<answers::Row> =
        format::files("answers").iter().map(|path| answers::play(path, &book, &gateway, &origins)).collect();
    let mut table = format!(
        "\n{:<12} {:>5} {:>5} {:>9} {:>5} {:>5} {:>4} {:>8}\n",
        "answers", "cases", "runs", "passed on", "502", "cut", "gaps", "failures"
    );
    for row in &rows {
        table.push_str(&format!(
            "{:<12} {:>5} {:>5} {:>9} {:>5} {:>5} {:>4} {:>8}\n",
            row.name,
            row.cases,
            row.runs,
            row.passed_on,
            row.refused,
            row.cut,
            row.gaps,
            row.failures.len()
        ));
    }
    let cases: usize = rows.iter().map(|row| row.cases).sum();
    table.push_str(&format!("{:<12} {cases:>5}\n", "together"));
    say(&table);
    report(rows.into_iter().map(|row| (row.name, row.failures)));
    assert!(cases >= 100, "{cases} cases");
}

/// Shown whether the test passes or not.
fn say(table: &str) {
    std::io::stdout().write_all(table.as_bytes()).expect("standard output");
}

#[track_caller]
fn report(rows: impl Iterator<Item = (String, Vec<String>)>) {
    let of_row =
        |(name, failures): (String, Vec<String>)| failures.into_iter().map(move |failure| format!("{name}: {failure}"));
    let mut failures: Vec<String> = rows.flat_map(of_row).collect();
    failures.sort();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn the_second_reader_is_strict() {
    let good = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\nGET";
    let Ok(wire::Read::Whole(message)) = wire::request(good) else { panic!("a good request") };
    assert_eq!((message.body.as_slice(), message.length, message.trailers.len()), (&b"abc"[..], good.len() - 3, 1));
    for end in 0..message.length {
        assert!(matches!(wire::request(&good[..end]), Ok(wire::Read::Part(_))), "its first {end} bytes");
    }
    let head = "POST / HTTP/1.1\r\nHost: a\r\n";
    let chunks = "Transfer-Encoding: chunked\r\n\r\n";
    let wrong = [
        "GET /\n".to_owned(),
        "GET / HTTP/1.0\r\n".into(),
        "GET  / HTTP/1.1\r\n".into(),
        "GET http://a/ HTTP/1.1\r\n".into(),
        "GET /\x7f HTTP/1.1\r\n".into(),
        "GET / HTTP/1.1\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".into(),
        format!("{head}A : b\r\n"),
        format!("{head} folded\r\n"),
        format!("{head}A: b\rc\r\n"),
        format!("{head}A: b\0\r\n"),
        format!("{head}TE: trailers\r\n\r\n"),
        format!("{head}Content-Length: +1\r\n\r\n"),
        format!("{head}Content-Length: 1\r\nContent-Length: 1\r\n\r\n"),
        format!("{head}Content-Length: 1\r\n{chunks}"),
        format!("{head}Transfer-Encoding: gzip\r\n\r\n"),
        format!("{head}{chunks}3;a\r\n"),
        format!("{head}{chunks}3 \r\n"),
        format!("{head}{chunks}3\n"),
        format!("{head}{chunks}3\r\nabcd\r\n"),
        format!("{head}{chunks}0\r\nX T: 1\r\n\r\n"),
    ];
    for text in wrong {
        assert!(wire::request(text.as_bytes()).is_err(), "{text:?}");
    }
}
