//! Tells how the rules fared: a line for each topic, and the exchanges of those that failed.

use std::collections::BTreeSet;
use std::io::Write as _;

use crate::rule::Topic;
use crate::runner::Verdict;

/// Shown whether the test passes or not.
pub(crate) fn say(topics: &[Topic], verdicts: &[Verdict]) {
    let mut table = format!("\n{:<14} {:>5} {:>5} {:>6}\n", "conformance", "rules", "cases", "failed");
    let mut together = [0; 3];
    for (number, topic) in topics.iter().enumerate() {
        let of_topic: Vec<&Verdict> = verdicts.iter().filter(|verdict| verdict.topic == number).collect();
        let rules: BTreeSet<usize> = of_topic.iter().map(|verdict| verdict.rule).collect();
        let failed = of_topic.iter().filter(|verdict| verdict.failure.is_some()).count();
        let counts = [rules.len(), of_topic.len(), failed];
        table.push_str(&format!("{:<14} {:>5} {:>5} {:>6}\n", topic.name, counts[0], counts[1], counts[2]));
        together.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    table.push_str(&format!("{:<14} {:>5} {:>5} {:>6}\n", "together", together[0], together[1], together[2]));
    std::io::stdout().write_all(table.as_bytes()).expect("standard output");
}

#[track_caller]
pub(crate) fn assert_kept(verdicts: &[Verdict]) {
    let mut text = String::new();
    for verdict in verdicts {
        let Some(failure) = &verdict.failure else { continue };
        let value = if verdict.case.value.is_empty() { String::new() } else { format!(" ({})", verdict.case.value) };
        text.push_str(&format!(
            "\n{} {}{value}\n  {failure}\n{}",
            verdict.case.at, verdict.case.key, verdict.transcript
        ));
    }
    assert!(text.is_empty(), "rules that do not hold:\n{text}");
}
