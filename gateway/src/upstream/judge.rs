//! Judges the endpoints of an upstream by their calls, and ejects those that fail too often.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::stats::UpstreamStats;
use crate::endpoint::{CallOutcome, EjectConfig, EjectionGate, Endpoint, EndpointSet, InFlightGuard, OutReason};

/// The endpoints of one upstream, with the rule by which one is ejected.
pub(super) struct EndpointJudge {
    config: EjectConfig,
    /// Replaced as a whole when an answer of a source differs from the last one.
    pub(super) set: ArcSwap<EndpointSet>,
    ejecting: EjectionGate,
    pub(super) stats: Arc<UpstreamStats>,
}

impl EndpointJudge {
    pub(super) fn new(config: EjectConfig, set: EndpointSet, stats: Arc<UpstreamStats>) -> Self {
        EndpointJudge { config, set: ArcSwap::from_pointee(set), ejecting: EjectionGate::default(), stats }
    }

    /// Records the result of a call at its endpoint, which is ejected if it fails too often.
    /// Returns whether the failure is that of an endpoint that is out while others are not: it says
    /// nothing about the upstream.
    pub(super) fn judge(&self, call: &InFlightGuard, outcome: CallOutcome) -> bool {
        let reason = call.record(outcome, &self.config, std::time::Instant::now);
        outcome != CallOutcome::Success && self.eject(call.endpoint(), reason)
    }

    /// Records the failure of a response body; the call is counted already.
    pub(super) fn judge_body(&self, call: &InFlightGuard, outcome: CallOutcome) {
        let reason = call.record_failure(outcome, &self.config, std::time::Instant::now());
        self.eject(call.endpoint(), reason);
    }

    /// Ejects an endpoint that has failed, if there is a reason and others are left. Returns
    /// whether it is out while others are not.
    fn eject(&self, endpoint: &Endpoint, reason: Option<OutReason>) -> bool {
        let now = std::time::Instant::now();
        let set = self.set.load();
        if let Some(reason) = reason {
            let may_eject = || !endpoint.is_out(now) && set.may_eject(now);
            self.ejecting.pass(may_eject, || {
                self.stats.ejections.inc(reason);
                endpoint.eject(reason, &self.config, now);
            });
        }
        endpoint.is_out(now) && !set.is_panicking(now)
    }
}
