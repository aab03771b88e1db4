//! Generates docs/caching.md from the rules.

use crate::rule::{Rule, Topic};

const HEAD: &str = "\
# Caching

Tidegate is a shared HTTP cache (RFC 9111) with stale responses (RFC 5861), `Cache-Status` (RFC 9211) and targeted fields (RFC 9213). Each line
below is a rule. A test runs its exchange against the binary and a scripted origin; the exchange is in `gateway/tests/conformance/` under the
name of the rule. If an RFC leaves a choice to the cache, the rule documents the choice.

<!-- Generated from gateway/tests/conformance/*.table by `UPDATE_DOCS=1 cargo test --package gateway --test conformance page`. -->
";

pub(crate) fn check_page(topics: &[Topic]) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/caching.md");
    let expected = markdown(topics);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, expected).expect("docs/caching.md is writable");
        return;
    }
    let page = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        page == expected,
        "docs/caching.md is out of date; regenerate it with UPDATE_DOCS=1 cargo test --package gateway --test conformance page"
    );
}

fn markdown(topics: &[Topic]) -> String {
    let mut page = HEAD.to_owned();
    for topic in topics {
        page.push_str(&format!("\n## {}\n\n", topic.title));
        for paragraph in &topic.about {
            page.push_str(&format!("{paragraph}\n\n"));
        }
        page.push_str("| rule | section | name |\n|---|---|---|\n");
        topic.rules.iter().for_each(|rule| page.push_str(&row(rule)));
    }
    page
}

fn row(rule: &Rule) -> String {
    let sections: Vec<String> = rule.sections.iter().map(|section| link(section)).collect();
    format!("| {} | {} | `{}` |\n", rule.sentence.replace('|', "\\|"), sections.join(", "), rule.id)
}

/// A section such as `RFC 9111 4.2.1`, as a link.
fn link(section: &str) -> String {
    let mut words = section.split(' ').skip(1);
    let (number, part) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let kind = if part.starts_with(|first: char| first.is_ascii_digit()) { "section" } else { "appendix" };
    format!("[{number} {part}](https://www.rfc-editor.org/rfc/rfc{number}#{kind}-{part})")
}
