//! The twelve field cases: production incidents with published figures, each played with real
//! processes. Each case has a file, criteria, and figures of its own; `page` is their document.

mod cancel;
mod clock_drift;
mod degrade;
mod error_pipeline;
mod event_bus;
mod hot_region;
mod knee;
mod leaks;
mod network_bound;
mod three_tiers;
mod weighted_users;
mod worker_pool;
pub(crate) mod page;

use clap::ValueEnum;

use crate::case::gateway::CaseContext;
use crate::case::report::CaseReport;
use crate::error::Result;

/// A field case of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum FieldCase {
    /// One key of a region gets most of the load; a shard hangs
    HotRegion,
    /// Limits of device, node and cluster, and calls that take too long
    ThreeTiers,
    /// User classes by weight; rules for a part of the subjects
    WeightedUsers,
    /// Connections that arrive at once; memory of idle ones
    NetworkBound,
    /// Stale response, degrade page and breaker while the origin fails
    Degrade,
    /// Gateways whose wall clocks differ and jump
    ClockDrift,
    /// Goodput past the knee
    Knee,
    /// An endpoint that answers too late rests
    WorkerPool,
    /// Clients that go away cancel the origin's work
    Cancel,
    /// Purges to all gateways and to one, with a partition
    EventBus,
    /// Failures of every stage, counted and logged once
    ErrorPipeline,
    /// Tasks, connections and descriptors after clients went away
    Leaks,
}

impl FieldCase {
    /// The name on the command line and in documents.
    pub(crate) fn id(self) -> &'static str {
        match self {
            FieldCase::HotRegion => "hot-region",
            FieldCase::ThreeTiers => "three-tiers",
            FieldCase::WeightedUsers => "weighted-users",
            FieldCase::NetworkBound => "network-bound",
            FieldCase::Degrade => "degrade",
            FieldCase::ClockDrift => "clock-drift",
            FieldCase::Knee => "knee",
            FieldCase::WorkerPool => "worker-pool",
            FieldCase::Cancel => "cancel",
            FieldCase::EventBus => "event-bus",
            FieldCase::ErrorPipeline => "error-pipeline",
            FieldCase::Leaks => "leaks",
        }
    }

    /// The published figures of the incident or system.
    pub(crate) fn elsewhere(self) -> &'static str {
        match self {
            FieldCase::HotRegion => {
                "Food delivery, 120,000 orders/s: one key took over 800,000 reads/s on one Redis node, whose latency rose to 2.3 s; \
                 success fell from 99.99 % to 63 %. With regions split into slots and a local cache, p99 stayed at 47 ms."
            }
            FieldCase::ThreeTiers => {
                "Payments on New Year's Eve: 100/s for a device, 3,000/s for a node, 50,000/s for the cluster; calls over 3 s were cut \
                 off and became asynchronous writes."
            }
            FieldCase::WeightedUsers => {
                "Platinum users had 3.2 times the threshold; in an A/B test losses fell by 41 %, and the success of their payments held \
                 at 99.95 %."
            }
            FieldCase::NetworkBound => {
                "An autoscaler on CPU (70 %) never fired: interrupts of the network card were at 98 %, `somaxconn` was 128. With \
                 65,535, new connections per second rose 3.8 times."
            }
            FieldCase::Degrade => {
                "The reference path of a request: limit, breaker (open: degrade page), services, and compensation of deferred writes."
            }
            FieldCase::ClockDrift => {
                "Two data centres, clocks 1.2 s apart: 0.3 % of the orders disagreed, until a tolerance of 1.5 s."
            }
            FieldCase::Knee => {
                "Live streaming past 500,000 requests/s: doubling parallelism from 200 to 400 raised latency by 27 % and pauses from 82 \
                 to 410 ms, until threads were held to 1.5 times the cores."
            }
            FieldCase::WorkerPool => {
                "A pool that grows when tasks wait over 200 ms and shrinks below 30 % use; a worker with three windows of over 80 % \
                 timeouts rests for 30 s."
            }
            FieldCase::Cancel => {
                "Pipelines in which the timeout of one stage stops every later stage and releases what it holds."
            }
            FieldCase::EventBus => "Broadcast and delivery by id are separate, and neither blocks the other.",
            FieldCase::ErrorPipeline => {
                "Errors of every stage are merged into one stream with code, context and cause; WARN raises alerts, FATAL the breaker."
            }
            FieldCase::Leaks => {
                "Tasks that never end after a panic or a lost channel, found by snapshots of all tasks."
            }
        }
    }

    pub(crate) fn run(self, context: &CaseContext<'_>) -> Result<CaseReport> {
        match self {
            FieldCase::HotRegion => hot_region::run(context),
            FieldCase::ThreeTiers => three_tiers::run(context),
            FieldCase::WeightedUsers => weighted_users::run(context),
            FieldCase::NetworkBound => network_bound::run(context),
            FieldCase::Degrade => degrade::run(context),
            FieldCase::ClockDrift => clock_drift::run(context),
            FieldCase::Knee => knee::run(context),
            FieldCase::WorkerPool => worker_pool::run(context),
            FieldCase::Cancel => cancel::run(context),
            FieldCase::EventBus => event_bus::run(context),
            FieldCase::ErrorPipeline => error_pipeline::run(context),
            FieldCase::Leaks => leaks::run(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_command_line() {
        for case in FieldCase::value_variants() {
            let value = case.to_possible_value().expect("no case is skipped");
            assert_eq!(value.get_name(), case.id());
        }
        assert_eq!(FieldCase::value_variants().len(), 12);
    }
}
