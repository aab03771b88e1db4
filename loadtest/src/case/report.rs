//! The result of a field case: what was done, figures, criteria with their outcomes, pictures.

use crate::report::line_chart::LineChart;

/// How a criterion came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckOutcome {
    Pass,
    Fail,
    /// The gateway says that it does not have the feature.
    Unavailable,
}

/// One criterion of a case, and the figure that it was judged by.
#[derive(Clone, Debug)]
pub(crate) struct CaseCheck {
    pub(crate) criterion: String,
    pub(crate) figure: String,
    pub(crate) outcome: CheckOutcome,
}

/// Result of one case.
#[derive(Clone, Debug, Default)]
pub(crate) struct CaseReport {
    /// Sentences.
    pub(crate) done: String,
    pub(crate) checks: Vec<CaseCheck>,
    /// Below each other in one picture.
    pub(crate) charts: Vec<LineChart>,
}

impl CaseReport {
    pub(crate) fn new(done: impl Into<String>) -> Self {
        CaseReport { done: done.into(), ..CaseReport::default() }
    }

    /// Adds a criterion that a condition decides.
    pub(crate) fn check(&mut self, criterion: impl Into<String>, (figure, is_met): (impl Into<String>, bool)) {
        let outcome = if is_met { CheckOutcome::Pass } else { CheckOutcome::Fail };
        self.checks.push(CaseCheck { criterion: criterion.into(), figure: figure.into(), outcome });
    }

    /// Adds a criterion that cannot be judged, because the gateway refuses the feature.
    pub(crate) fn unavailable(&mut self, criterion: impl Into<String>, reason: impl Into<String>) {
        let outcome = CheckOutcome::Unavailable;
        self.checks.push(CaseCheck { criterion: criterion.into(), figure: reason.into(), outcome });
    }

    /// The outcome in words. Criteria that could not be judged are named, and are no failure.
    pub(crate) fn verdict(&self) -> String {
        match self.checks.iter().filter(|check| check.outcome == CheckOutcome::Unavailable).count() {
            0 => self.outcome().text().to_owned(),
            1 => format!("{}, 1 criterion not available yet", self.outcome().text()),
            several => format!("{}, {several} criteria not available yet", self.outcome().text()),
        }
    }

    /// Whether all criteria that can be judged are met.
    pub(crate) fn outcome(&self) -> CheckOutcome {
        let has = |outcome| self.checks.iter().any(|check| check.outcome == outcome);
        // A case without a criterion shows nothing.
        if has(CheckOutcome::Fail) {
            CheckOutcome::Fail
        } else if has(CheckOutcome::Pass) {
            CheckOutcome::Pass
        } else if has(CheckOutcome::Unavailable) {
            CheckOutcome::Unavailable
        } else {
            CheckOutcome::Fail
        }
    }
}

impl CheckOutcome {
    pub(crate) fn text(self) -> &'static str {
        match self {
            CheckOutcome::Pass => "pass",
            CheckOutcome::Fail => "FAIL",
            CheckOutcome::Unavailable => "not available yet",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_criterion_fails_the_case_and_none_too() {
        let mut report = CaseReport::new("nothing");
        assert_eq!(report.outcome(), CheckOutcome::Fail);
        report.unavailable("a", "no such feature");
        assert_eq!(report.outcome(), CheckOutcome::Unavailable);
        report.check("b", ("1", true));
        assert_eq!(report.outcome(), CheckOutcome::Pass);
        assert_eq!(report.verdict(), "pass, 1 criterion not available yet");
        report.check("c", ("0", false));
        assert_eq!(report.outcome(), CheckOutcome::Fail);
        assert_eq!(report.verdict(), "FAIL, 1 criterion not available yet");
    }
}
