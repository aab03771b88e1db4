//! Prints the results: one line per topic, and the transcripts of failed cases.

use std::collections::BTreeSet;
use std::io::Write as _;

use crate::rule::Topic;
use crate::runner::CaseResult;

/// Printed whether the test passes or not.
pub(crate) fn print_summary(topics: &[Topic], results: &[CaseResult]) {
    let mut table = format!("\n{:<14} {:>5} {:>5} {:>6}\n", "conformance", "rules", "cases", "failed");
    let mut totals = [0; 3];
    for (number, topic) in topics.iter().enumerate() {
        let of_topic: Vec<&CaseResult> = results.iter().filter(|result| result.topic == number).collect();
        let rules: BTreeSet<usize> = of_topic.iter().map(|result| result.rule).collect();
        let failed = of_topic.iter().filter(|result| result.failure.is_some()).count();
        let counts = [rules.len(), of_topic.len(), failed];
        table.push_str(&format!("{:<14} {:>5} {:>5} {:>6}\n", topic.name, counts[0], counts[1], counts[2]));
        totals.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    table.push_str(&format!("{:<14} {:>5} {:>5} {:>6}\n", "total", totals[0], totals[1], totals[2]));
    std::io::stdout().write_all(table.as_bytes()).expect("standard output");
}

#[track_caller]
pub(crate) fn assert_passed(results: &[CaseResult]) {
    let mut text = String::new();
    for result in results {
        let Some(failure) = &result.failure else { continue };
        let value = if result.case.value.is_empty() { String::new() } else { format!(" ({})", result.case.value) };
        text.push_str(&format!("\n{} {}{value}\n  {failure}\n{}", result.case.at, result.case.key, result.transcript));
    }
    assert!(text.is_empty(), "failed rules:\n{text}");
}
