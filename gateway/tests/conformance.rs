//! The rules of the shared cache, each with its section and an exchange that shows it, played against the binary.
//!
//! `conformance/README.md` tells how a row is written; docs/caching.md is generated from the same rows.

mod support;

#[path = "conformance/check.rs"]
mod check;
#[path = "conformance/origin.rs"]
mod origin;
#[path = "conformance/page.rs"]
mod page;
#[path = "conformance/parser.rs"]
mod parser;
#[path = "conformance/report.rs"]
mod report;
#[path = "conformance/rule.rs"]
mod rule;
#[path = "conformance/runner.rs"]
mod runner;
#[path = "conformance/text.rs"]
mod text;

/// Fewer rules would mean that a file was lost.
const RULES_MIN: usize = 300;

#[test]
fn the_cache_keeps_every_rule() {
    let topics = parser::topics();
    let wanted = std::env::var("RULES").unwrap_or_default();
    let outcomes = runner::play_all(&topics, &wanted);
    report::say(&topics, &outcomes);
    report::assert_kept(&outcomes);
    assert!(topics.iter().map(|topic| topic.rules.len()).sum::<usize>() >= RULES_MIN, "a table was lost");
}

#[test]
fn the_page_shows_the_rules() {
    page::compare(&parser::topics());
}
