//! The state of the requesting side of a lease: the fleet as seen by the node, and its own demand.

use super::config::{LeaseConfig, NANOS};
use crate::clock::MonotonicTime;
use crate::quota::Quota;

/// State that only the requesting task touches, about fifty times a second.
#[derive(Debug)]
pub(super) struct LeaseRequester {
    pub(super) quota: Quota,
    pub(super) config: LeaseConfig,
    /// From the last grant: nodes seen by the backend (0 before), and this node's share of the
    /// rate.
    pub(super) nodes_seen: u32,
    pub(super) share_micros: Option<u64>,
    pub(super) pending: Option<PendingRequest>,
    pub(super) requested_at: Option<MonotonicTime>,
    pub(super) started_at: MonotonicTime,
    pub(super) is_failing: bool,
    pub(super) has_sent_final_request: bool,
    pub(super) counted: u64,
    pub(super) ordinary_counted: u64,
    pub(super) counted_at: MonotonicTime,
    pub(super) demand_millis: u64,
    pub(super) ordinary_millis: u64,
    pub(super) peak: u64,
    pub(super) peak_at: MonotonicTime,
}

/// A request without a reply yet: the time when it was sent, and the number of tokens requested.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingRequest {
    pub(super) since: MonotonicTime,
    pub(super) requested: u64,
}

impl LeaseRequester {
    pub(super) fn new(quota: Quota, config: LeaseConfig, now: MonotonicTime) -> LeaseRequester {
        LeaseRequester {
            quota,
            config,
            nodes_seen: 0,
            share_micros: None,
            pending: None,
            requested_at: None,
            started_at: now,
            is_failing: false,
            has_sent_final_request: false,
            counted: 0,
            ordinary_counted: 0,
            counted_at: now,
            demand_millis: 0,
            ordinary_millis: 0,
            peak: 0,
            peak_at: now,
        }
    }

    /// Scales the share with the rate that it is a part of, so that the sum of all shares stays
    /// within the rate, whichever nodes have been reconfigured.
    pub(super) fn reconfigure(&mut self, quota: Quota, config: LeaseConfig) {
        let [old, new] = [self.quota, quota].map(|quota| u128::from(quota.rate().micros_per_second()));
        let scaled = |share| u64::try_from(u128::from(share) * new / old.max(1)).unwrap_or(u64::MAX);
        self.share_micros = self.share_micros.map(scaled);
        (self.quota, self.config) = (quota, config);
    }

    /// The larger of the nodes seen and the nodes expected: the backend does not see nodes that
    /// cannot reach it.
    pub(super) fn fleet_size(&self) -> u32 {
        self.nodes_seen.max(self.config.nodes.get())
    }

    /// An equal share of the rate, in billionths of a token per second: in millionths, 1/h would be
    /// 0.3 % too slow.
    pub(super) fn equal_share_nanos(&self) -> u64 {
        let rate = self.quota.rate();
        let nanos = u128::from(rate.count()) * NANOS / u128::from(rate.seconds()) / u128::from(self.fleet_size());
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}
