//! Conformance rules of the shared cache. Each rule has an RFC section and an exchange that is run
//! against the binary.
//!
//! `conformance/README.md` describes the format. docs/caching.md is generated from the same rules.

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
#[path = "conformance/template.rs"]
mod template;

/// Fewer rules would mean that a table is missing.
const RULES_MIN: usize = 300;

#[test]
fn cache_conforms_to_every_rule() {
    let topics = parser::topics();
    let filter = std::env::var("RULES").unwrap_or_default();
    let results = runner::run_all(&topics, &filter);
    report::print_summary(&topics, &results);
    report::assert_passed(&results);
    assert!(topics.iter().map(|topic| topic.rules.len()).sum::<usize>() >= RULES_MIN, "a table is missing");
}

#[test]
fn caching_page_is_up_to_date() {
    page::check_page(&parser::topics());
}
