//! The criterion of cases that need accepted writes: the gateway has no journal yet, and says so.
//!
//! The criterion is not judged, and the report says why. A gateway that has a journal, or refuses
//! the configuration for another reason, fails it: then the case has to play it.

use crate::case::gateway::CaseContext;
use crate::case::report::CaseReport;
use crate::error::Result;

/// A route whose calls become accepted writes when `WHEN`.
const CONFIG: &str = r#"
[journal]
store = "journal"
[upstreams.origin]
endpoints = ["http://127.0.0.1:1"]
[[routes]]
name = "writes"
match = { path = "/*" }
upstream = "origin"
journal = { when = ["@WHEN@"], key = "header:x-order-id" }
"#;
/// Of `tidegate check`.
const REFUSAL: &str = "is not available yet";

/// Adds `criterion` about writes that are accepted `when`, as not available.
pub(crate) fn journal_criterion(
    context: &CaseContext<'_>,
    report: &mut CaseReport,
    (criterion, when): (&str, &str),
) -> Result<()> {
    match context.check_config("journal", &CONFIG.replace("@WHEN@", when))? {
        Err(output) if is_unavailable(&output) => report.unavailable(
            criterion,
            "not judged: this gateway has no journal of accepted writes (`tidegate check`: `journal` is not available yet)",
        ),
        Err(output) => report.check(criterion, (format!("`tidegate check` refuses the journal: {output}"), false)),
        Ok(()) => report.check(criterion, ("the gateway accepts `journal`, and this case does not play it", false)),
    }
    Ok(())
}

/// Whether the journal as a whole is what the gateway does not have.
fn is_unavailable(output: &str) -> bool {
    output.lines().any(|line| line.contains("journal") && line.contains(REFUSAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_refusal_is_no_missing_feature() {
        assert!(is_unavailable("error: journal is not available yet\n"));
        assert!(!is_unavailable("error: unknown key `journla`\nerror: tls is not available yet\n"));
    }
}
