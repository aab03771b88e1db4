//! The messages between a node and the lease backend: [`LeaseRequest`], [`LeaseGrant`], the
//! [`LeaseBackend`] trait and the script that it runs.
//!
//! Every number is an integer below 2^53, named with its unit, because Lua has only doubles.
//! Invariant: the order of [`LeaseRequest::arguments`] and of [`LeaseGrant::parse`] is that of
//! `ARGV` and of the reply in `lease.lua`.

use std::future::Future;
use std::time::Duration;

use crate::quota::Quota;

/// The backend's atomic script: `KEYS[1]` is the bucket's hash, `ARGV` is
/// [`LeaseRequest::arguments`].
pub const LEASE_SCRIPT: &str = include_str!("lease.lua");

/// Far above what the script returns, and shorter than the time after which a node is forgotten.
const VALID_MS_MAX: u64 = 10_000;
/// No rate is above ten million tokens a second.
const SHARE_MICROS_MAX: u64 = 10_000_000_000_000;

/// One request of a node to the backend: tokens requested and returned, and the values from which
/// the backend computes the node's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// This process, among all that share the bucket.
    pub node: u64,
    /// The cluster's quota. Each request carries it, so the bucket needs no setup and follows a
    /// reload.
    pub quota: Quota,
    /// Number of nodes that the configuration expects.
    pub expected_nodes: u32,
    /// Tokens requested.
    pub requested: u64,
    /// Unspent tokens returned; the node no longer holds them.
    pub returned: u64,
    /// Tokens that the node still holds, rounded up.
    pub held: u64,
    /// Demand of the node's clients, admitted or not, in thousandths of a token per second.
    pub demand_millis: u64,
    /// The part of the demand that must leave a reserve to others.
    pub ordinary_millis: u64,
    /// Tokens that the node has ever added at its local rate, without a grant, rounded up. The
    /// count only grows, so a request whose reply was lost is not charged twice.
    pub borrowed: u64,
    /// The node's share of the rate as it knows it, in millionths of a token per second: that of
    /// its last grant, or an equal share. Without a reply, the node uses 0.8 of this.
    pub share_micros: u64,
    /// The age of this lease in microseconds of the node's monotonic clock: two requests give the
    /// time between them.
    pub uptime_micros: u64,
    /// Whether this is the node's last request: its record is deleted.
    pub leaving: bool,
}

impl LeaseRequest {
    /// `ARGV` of [`LEASE_SCRIPT`], in order.
    pub fn arguments(&self) -> [i64; 14] {
        let rate = self.quota.rate();
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        [
            // An identity, not a quantity: the script never computes with it.
            self.node.cast_signed(),
            number(rate.count()),
            number(rate.seconds()),
            i64::from(self.quota.burst().get()),
            i64::from(self.expected_nodes),
            number(self.requested),
            number(self.returned),
            number(self.held),
            number(self.demand_millis),
            number(self.borrowed),
            number(self.share_micros),
            number(self.uptime_micros),
            i64::from(self.leaving),
            number(self.ordinary_millis),
        ]
    }
}

/// The backend's reply to one request: tokens, their validity, and the node's share of the rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseGrant {
    /// Tokens to spend.
    pub tokens: u64,
    /// How long, on the node's monotonic clock, all that it holds may be spent.
    pub valid_for: Duration,
    /// Number of nodes that sent a request within the last half minute, including this one.
    pub nodes_seen: Option<u32>,
    /// This node's share of the rate, in millionths of a token per second.
    pub share_micros: Option<u64>,
}

impl LeaseGrant {
    /// Parses the reply of [`LEASE_SCRIPT`]: tokens, validity in milliseconds, nodes, share.
    /// Rejects values that the script cannot return: negative ones and ones beyond any quota.
    pub fn parse(reply: &[i64]) -> Result<LeaseGrant, LeaseBackendError> {
        let &[tokens, valid_ms, nodes, share] = reply else {
            return Err(LeaseBackendError::Malformed);
        };
        let number = |value: i64, most: u64| match u64::try_from(value) {
            Ok(value) if value <= most => Ok(value),
            _ => Err(LeaseBackendError::Malformed),
        };
        let nodes = number(nodes, u64::from(u32::MAX))?;
        Ok(LeaseGrant {
            tokens: number(tokens, u64::from(u32::MAX))?,
            valid_for: Duration::from_millis(number(valid_ms, VALID_MS_MAX)?),
            nodes_seen: u32::try_from(nodes).ok(),
            share_micros: Some(number(share, SHARE_MICROS_MAX)?),
        })
    }
}

/// Why a request got no grant. In every case the caller calls
/// [`Lease::request_failed`](super::Lease::request_failed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseBackendError {
    #[error("the lease backend cannot be reached")]
    Unavailable,
    #[error("the lease backend did not reply within the deadline")]
    Deadline,
    #[error("the reply of the lease backend is malformed")]
    Malformed,
}

/// The store of a cluster limit's tokens: one bucket. Implementations bound every call by a
/// deadline.
pub trait LeaseBackend {
    /// Runs the script once, without a retry. A reply after the deadline is dropped; its tokens are
    /// lost and the limit holds. Cancel safe in the same sense.
    fn acquire(&self, request: LeaseRequest) -> impl Future<Output = Result<LeaseGrant, LeaseBackendError>> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_malformed_replies() {
        for reply in [
            &[][..],
            &[1, 1_000, 1],
            &[1, 1_000, 1, 5, 5],
            &[-1, 1_000, 1, 5],
            &[1, -1, 1, 5],
            &[1, 1_000, i64::MAX, 5],
            &[1, 1_000, 1, -5],
            &[i64::from(u32::MAX) + 1, 1_000, 1, 5],
            &[1, i64::MAX, 1, 5],
            &[1, 1_000, 1, i64::MAX],
        ] {
            assert_eq!(LeaseGrant::parse(reply), Err(LeaseBackendError::Malformed), "{reply:?}");
        }
        let grant = LeaseGrant::parse(&[7, 1_000, 2, 5]).unwrap();
        assert_eq!((grant.tokens, grant.valid_for), (7, Duration::from_secs(1)));
    }
}
