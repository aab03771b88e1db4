//! Performance goals of Tidegate per workload.

use crate::bench::peer::Peer;
use crate::bench::workload::Workload;

/// Goal for the ratio of the baseline's CPU time per request to Tidegate's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PerformanceGoal {
    pub(crate) baseline: Peer,
    pub(crate) ratio: f64,
}

/// Peers that ratios refer to: nginx with Debian's settings, and with its best setting for small
/// objects.
pub(crate) const BASELINES: [Peer; 2] = [Peer::Nginx, Peer::NginxNosendfile];

/// Goals for one core, with all defaults of a route enabled.
pub(crate) fn goals(workload: Workload) -> Vec<PerformanceGoal> {
    let ratios = match workload {
        Workload::Hit1k => [Some(1.8), Some(1.45)],
        Workload::Hit1k512c => [None, Some(1.4)],
        Workload::Hit10kKeys => [Some(2.35), Some(1.7)],
        Workload::Hit16k => [Some(1.7), None],
        Workload::Hit1m => [Some(2.1), None],
        Workload::Pass1k => [Some(1.2), None],
        Workload::Pass1k512c => [Some(1.3), None],
        // Not stated.
        Workload::PassTls | Workload::PassH2 => [None, None],
        Workload::Denied => [Some(1.1), None],
        Workload::H2Hit1k => [Some(3.5), None],
        Workload::H2Hit16k => [Some(1.8), None],
        Workload::H2Pass1k => [Some(1.6), None],
        Workload::TlsHit1k => [Some(2.2), None],
        Workload::TlsHandshake => [Some(1.75), None],
    };
    let goals = BASELINES.into_iter().zip(ratios);
    goals.filter_map(|(baseline, ratio)| Some(PerformanceGoal { baseline, ratio: ratio? })).collect()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_goal_is_above_its_baseline() {
        for workload in Workload::value_variants() {
            let goals = goals(*workload);
            let is_stated = !matches!(workload, Workload::PassTls | Workload::PassH2);
            assert_eq!(!goals.is_empty(), is_stated, "{workload:?}");
            assert!(goals.iter().all(|goal| goal.ratio > 1.0));
        }
    }
}
