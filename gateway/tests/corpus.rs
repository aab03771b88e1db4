//! Runs the corpus against the binary: raw requests and raw responses, split in three ways, with
//! the expected result at the other side.

mod support;

#[path = "corpus/responses.rs"]
mod responses;
#[path = "corpus/format.rs"]
mod format;
#[path = "corpus/raw_origin.rs"]
mod raw_origin;
#[path = "corpus/requests.rs"]
mod requests;
#[path = "corpus/raw_client.rs"]
mod raw_client;
#[path = "corpus/reference_parser.rs"]
mod reference_parser;

use std::io::Write as _;

use support::{Gateway, one_route};

/// Keeps the breaker closed: most responses of these origins are malformed.
const BREAKER: &str = "breaker = { minimum = 1000000, error_ratio = 1.0, slow = \"1h\" }";

#[test]
fn malformed_requests_are_refused_and_only_well_formed_ones_reach_the_origin() {
    let origin = requests::origin();
    let config = one_route(origin.address, "cache = { mode = \"off\" }", requests::LIMITS);
    let gateway = Gateway::start(&format!("[server]\nworkers = 2\n{config}"));
    let rows: Vec<requests::FileReport> =
        format::files("requests").iter().map(|path| requests::run_file(path, &gateway, &origin)).collect();
    let mut table = format!(
        "\n{:<12} {:>5} {:>5} {:>8} {:>5} {:>8}  refused by reason\n",
        "requests", "cases", "runs", "accepted", "known", "failures"
    );
    for row in &rows {
        let refused: Vec<String> = row.refused.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        table.push_str(&format!(
            "{:<12} {:>5} {:>5} {:>8} {:>5} {:>8}  {}\n",
            row.name,
            row.cases,
            row.runs,
            row.accepted,
            row.known_failures,
            row.failures.len(),
            refused.join(", ")
        ));
    }
    let cases: usize = rows.iter().map(|row| row.cases).sum();
    table.push_str(&format!("{:<12} {cases:>5}\n", "total"));
    print_table(&table);
    let audit = ("audit".to_owned(), requests::audit(&rows, &origin));
    assert_no_failures(rows.into_iter().map(|row| (row.name, row.failures)).chain([audit]));
    assert!(cases >= 300, "{cases} cases");
}

#[test]
fn responses_are_forwarded_complete_or_visibly_truncated() {
    let all_cases = responses::ResponseCases::open();
    let origins: Vec<raw_origin::RawOrigin> = (0..responses::THREADS).map(|_| all_cases.origin()).collect();
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
    let rows: Vec<responses::FileReport> = format::files("responses")
        .iter()
        .map(|path| responses::run_file(path, &all_cases, &gateway, &origins))
        .collect();
    let mut table = format!(
        "\n{:<12} {:>5} {:>5} {:>9} {:>5} {:>9} {:>5} {:>8}\n",
        "responses", "cases", "runs", "forwarded", "502", "truncated", "known", "failures"
    );
    for row in &rows {
        table.push_str(&format!(
            "{:<12} {:>5} {:>5} {:>9} {:>5} {:>9} {:>5} {:>8}\n",
            row.name,
            row.cases,
            row.runs,
            row.forwarded,
            row.refused,
            row.truncated,
            row.known_failures,
            row.failures.len()
        ));
    }
    let cases: usize = rows.iter().map(|row| row.cases).sum();
    table.push_str(&format!("{:<12} {cases:>5}\n", "total"));
    print_table(&table);
    assert_no_failures(rows.into_iter().map(|row| (row.name, row.failures)));
    assert!(cases >= 100, "{cases} cases");
}

/// Prints the table, whether the test passes or not.
fn print_table(table: &str) {
    std::io::stdout().write_all(table.as_bytes()).expect("standard output");
}

#[track_caller]
fn assert_no_failures(rows: impl Iterator<Item = (String, Vec<String>)>) {
    let of_row =
        |(name, failures): (String, Vec<String>)| failures.into_iter().map(move |failure| format!("{name}: {failure}"));
    let mut failures: Vec<String> = rows.flat_map(of_row).collect();
    failures.sort();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn reference_parser_is_strict() {
    let valid = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\nGET";
    let Ok(reference_parser::ParseResult::Complete(message)) = reference_parser::request(valid) else {
        panic!("a valid request")
    };
    assert_eq!((message.body.as_slice(), message.length, message.trailers.len()), (&b"abc"[..], valid.len() - 3, 1));
    for end in 0..message.length {
        assert!(
            matches!(reference_parser::request(&valid[..end]), Ok(reference_parser::ParseResult::Partial(_))),
            "its first {end} bytes"
        );
    }
    let head = "POST / HTTP/1.1\r\nHost: a\r\n";
    let chunks = "Transfer-Encoding: chunked\r\n\r\n";
    let malformed = [
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
    for text in malformed {
        assert!(reference_parser::request(text.as_bytes()).is_err(), "{text:?}");
    }
}
