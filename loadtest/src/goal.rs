//! What Tidegate is meant to reach, and whether it does.

use crate::peer::Peer;
use crate::workload::Workload;

/// How many times less CPU time per request than a yardstick.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Goal {
    pub(crate) yardstick: Peer,
    pub(crate) ratio: f64,
}

/// The peers that ratios are drawn to: nginx as Debian sets it, and at its best setting for small objects.
pub(crate) const YARDSTICKS: [Peer; 2] = [Peer::Nginx, Peer::NginxNosendfile];

/// One core, all that a route has by default switched on.
pub(crate) fn goals(workload: Workload) -> Vec<Goal> {
    let ratios = match workload {
        Workload::Hit1k => [Some(1.8), Some(1.45)],
        Workload::Hit1k512c => [None, Some(1.4)],
        Workload::Hit10kKeys => [Some(2.35), Some(1.7)],
        Workload::Hit16k => [Some(1.7), None],
        Workload::Hit1m => [Some(2.1), None],
        Workload::Pass1k => [Some(1.2), None],
        Workload::Pass1k512c => [Some(1.3), None],
        Workload::Denied => [Some(1.1), None],
    };
    let goals = YARDSTICKS.into_iter().zip(ratios);
    goals.filter_map(|(yardstick, ratio)| Some(Goal { yardstick, ratio: ratio? })).collect()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_workload_has_a_goal_above_its_yardstick() {
        for workload in Workload::value_variants() {
            let goals = goals(*workload);
            assert!(!goals.is_empty());
            assert!(goals.iter().all(|goal| goal.ratio > 1.0));
        }
    }
}
