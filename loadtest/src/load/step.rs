//! The figures of one step of a load: one rate for some seconds.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::load::open_loop::OpenLoopReport;

/// A step whose generator sent more than this share of its requests late measures the generator.
const LATE_SHARE_MAX: f64 = 0.01;

/// Limits that a step keeps or breaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StepLimits {
    pub(crate) p99: Duration,
    /// Least goodput as a part of the offered rate.
    pub(crate) goodput: f64,
}

/// The judgement of a step about its rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepVerdict {
    Holds,
    P99,
    Goodput,
    /// The generator could not send the requests in time.
    Generator,
}

/// Figures of one step.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LoadStep {
    /// Offered requests per second.
    pub(crate) rate: f64,
    pub(crate) seconds: f64,
    pub(crate) offered: u64,
    pub(crate) good: u64,
    pub(crate) rejected: u64,
    pub(crate) failed: u64,
    pub(crate) timeouts: u64,
    pub(crate) late: u64,
    pub(crate) statuses: BTreeMap<u16, u64>,
    /// Good responses per second.
    pub(crate) goodput: f64,
    pub(crate) mean_ms: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) verdict: StepVerdict,
}

impl LoadStep {
    pub(crate) fn new(rate: f64, time: Duration, report: &OpenLoopReport, limits: StepLimits) -> Self {
        let millis = |latency: Duration| latency.as_secs_f64() * 1e3;
        let mut step = LoadStep {
            rate,
            seconds: time.as_secs_f64(),
            offered: report.offered,
            good: report.good,
            rejected: report.rejected,
            failed: report.failed,
            timeouts: report.timeouts,
            late: report.late,
            statuses: report.statuses.clone(),
            goodput: report.good as f64 / time.as_secs_f64(),
            mean_ms: millis(report.mean()),
            p50_ms: millis(report.percentile(50.0)),
            p99_ms: millis(report.percentile(99.0)),
            p999_ms: millis(report.percentile(99.9)),
            verdict: StepVerdict::Holds,
        };
        step.verdict = step.judge(limits);
        step
    }

    fn judge(&self, limits: StepLimits) -> StepVerdict {
        let share = |count: u64| count as f64 / self.offered.max(1) as f64;
        if share(self.late) > LATE_SHARE_MAX {
            StepVerdict::Generator
        } else if share(self.good) < limits.goodput {
            StepVerdict::Goodput
        } else if self.p99_ms > limits.p99.as_secs_f64() * 1e3 {
            StepVerdict::P99
        } else {
            StepVerdict::Holds
        }
    }

    /// Mean number of good requests in progress (Little's law).
    pub(crate) fn in_progress(&self) -> f64 {
        self.goodput * self.mean_ms / 1e3
    }

    /// Why the requests of the step were not good, for messages.
    pub(crate) fn faults(&self) -> String {
        let statuses: Vec<String> =
            self.statuses.iter().map(|(status, count)| format!("{count} of status {status}")).collect();
        format!(
            "{} requests, {} good, {} without a response in time; {}",
            self.offered,
            self.good,
            self.timeouts,
            if statuses.is_empty() { "no response".to_owned() } else { statuses.join(", ") }
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const LIMITS: StepLimits = StepLimits { p99: Duration::from_millis(100), goodput: 0.98 };

    /// A step of one second without a report.
    pub(crate) fn step(rate: f64, goodput: f64, mean_ms: f64) -> LoadStep {
        let mut step = LoadStep::new(rate, Duration::from_secs(1), &OpenLoopReport::default(), LIMITS);
        step.offered = rate as u64;
        step.good = goodput as u64;
        step.goodput = goodput;
        (step.mean_ms, step.p99_ms) = (mean_ms, 2.0 * mean_ms);
        step.verdict = step.judge(LIMITS);
        step
    }

    #[test]
    fn step_breaks_by_its_generator_its_goodput_or_its_p99() {
        assert_eq!(step(1_000.0, 1_000.0, 10.0).verdict, StepVerdict::Holds);
        assert_eq!(step(1_000.0, 979.0, 10.0).verdict, StepVerdict::Goodput);
        assert_eq!(step(1_000.0, 1_000.0, 60.0).verdict, StepVerdict::P99);
        let mut late = step(1_000.0, 900.0, 10.0);
        late.late = 11;
        assert_eq!(late.judge(LIMITS), StepVerdict::Generator);
    }
}
