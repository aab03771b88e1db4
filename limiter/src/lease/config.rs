//! Configuration of a lease: the node, its fleet, and where its tokens come from.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::quota::Rate;

pub(super) const MICRO: u64 = 1_000_000;
pub(super) const NANOS: u128 = 1_000_000_000;
/// A pending request is given up after this if nothing reported its result, because its task ended.
pub(super) const PENDING_MAX: Duration = Duration::from_secs(1);

/// The source of the tokens of a cluster limit: grants of a backend, or an equal share for each
/// expected node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseSource {
    /// From a backend; while it is unavailable, from 0.8 of this node's last known share.
    Backend,
    /// No backend: each of the expected nodes has an equal share of rate and burst.
    LocalFallback,
}

/// Configuration of a lease: the node and its fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// This process among all that share the bucket. Chosen at random at start, because two
    /// processes with the same number share one node's part.
    pub node: u64,
    /// Number of nodes expected in the fleet.
    pub nodes: NonZeroU32,
    /// A request covers this much time of the node's own demand.
    pub interval: Duration,
    pub source: LeaseSource,
}

impl LeaseConfig {
    /// A configuration with the default interval of 20 ms.
    pub fn new(node: u64, nodes: NonZeroU32, source: LeaseSource) -> LeaseConfig {
        LeaseConfig { node, nodes, interval: Duration::from_millis(20), source }
    }

    /// The smallest burst with which every node can hold a token while the bucket holds as many.
    pub(super) fn burst_min(&self) -> u64 {
        let halves = match self.source {
            LeaseSource::Backend => 2,
            LeaseSource::LocalFallback => 1,
        };
        halves * u64::from(self.nodes.get())
    }
}

/// Why a lease cannot be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    #[error("a burst of {burst} cannot be shared by {nodes} nodes: it takes at least {least}")]
    BurstTooSmall { burst: u32, nodes: u32, least: u64 },
    #[error("a rate of {rate} cannot be shared by {nodes} nodes: each would get less than one token in eleven days")]
    RateTooSlow { rate: Rate, nodes: u32 },
}
