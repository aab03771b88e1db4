//! Owns what a node and the treasury say to each other: [`Ask`], [`Grant`], the [`Treasury`] trait and the
//! script behind it.
//!
//! Refuses floats and units: every number is an integer below 2^53, named with its unit, because Lua has nothing
//! but doubles. Invariant: the order of [`Ask::arguments`] and of [`Grant::parse`] is that of `ARGV` and of the
//! reply in `lease.lua`.

use std::future::Future;
use std::time::Duration;

use crate::quota::Quota;

/// The atomic script of the treasury: `KEYS[1]` is the bucket's hash, `ARGV` is [`Ask::arguments`].
pub const SCRIPT: &str = include_str!("lease.lua");

/// Far above what the script says, and still no time in which a node could be forgotten.
const VALID_MS_MAX: u64 = 10_000;
/// No rate is above ten million tokens a second.
const SHARE_MICROS_MAX: u64 = 10_000_000_000_000;

/// One request of a node to the treasury.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// This process, among all that share the bucket.
    pub node: u64,
    /// The cluster's quota; each ask carries it, so the bucket needs no setup and follows a reload.
    pub quota: Quota,
    /// Nodes the configuration expects.
    pub expected: u32,
    /// Tokens asked for.
    pub wanted: u64,
    /// Unspent tokens given back; the node no longer holds them.
    pub returned: u64,
    /// Tokens the node still holds, rounded up.
    pub held: u64,
    /// What its clients asked for, admitted or not, in thousandths of a token per second.
    pub demand_millis: u64,
    /// How much of it has to leave a reserve to others.
    pub ordinary_millis: u64,
    /// Tokens it has ever given itself on its own account, without the treasury, rounded up: a count that only
    /// grows, so that an ask whose answer was lost is not charged twice.
    pub borrowed: u64,
    /// Its part of the rate as it knows it, in millionths of a token per second: what it was last told, or an equal
    /// part. Without an answer it lives on 0.8 of this.
    pub share_micros: u64,
    /// How long it has had this lease, in microseconds of its monotonic clock: two asks tell what passed between.
    pub uptime_micros: u64,
    /// Whether this is its last ask: its record is dropped.
    pub leaving: bool,
}

impl Ask {
    /// `ARGV` of [`SCRIPT`], in order.
    pub fn arguments(&self) -> [i64; 14] {
        let rate = self.quota.rate();
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        [
            // An identity, not a quantity: the script never computes with it.
            self.node.cast_signed(),
            number(rate.count()),
            number(rate.seconds()),
            i64::from(self.quota.burst().get()),
            i64::from(self.expected),
            number(self.wanted),
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

/// The treasury's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Tokens to spend.
    pub tokens: u64,
    /// How long, on the node's monotonic clock, all it holds may be spent.
    pub valid_for: Duration,
    /// Nodes that asked within the last half minute, with this one.
    pub nodes_seen: Option<u32>,
    /// This node's part of the rate, in millionths of a token per second.
    pub share_micros: Option<u64>,
}

impl Grant {
    /// Reads the reply of [`SCRIPT`]: tokens, validity in milliseconds, nodes, share. What no script would say,
    /// negative or beyond any quota, is refused.
    pub fn parse(reply: &[i64]) -> Result<Grant, TreasuryError> {
        let &[tokens, valid_ms, nodes, share] = reply else {
            return Err(TreasuryError::Malformed);
        };
        let number = |value: i64, most: u64| match u64::try_from(value) {
            Ok(value) if value <= most => Ok(value),
            _ => Err(TreasuryError::Malformed),
        };
        let nodes = number(nodes, u64::from(u32::MAX))?;
        Ok(Grant {
            tokens: number(tokens, u64::from(u32::MAX))?,
            valid_for: Duration::from_millis(number(valid_ms, VALID_MS_MAX)?),
            nodes_seen: u32::try_from(nodes).ok(),
            share_micros: Some(number(share, SHARE_MICROS_MAX)?),
        })
    }
}

/// Why an ask got no answer. Whatever it was, the caller says [`Lease::failed`](super::Lease::failed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreasuryError {
    #[error("the treasury cannot be reached")]
    Unavailable,
    #[error("the treasury did not answer within the deadline")]
    Deadline,
    #[error("the treasury's answer makes no sense")]
    Malformed,
}

/// Where the cluster's tokens are kept: one bucket. Its implementation bounds every call by a deadline.
pub trait Treasury {
    /// Runs the script once, without a retry: an answer that comes after the deadline is dropped, its tokens are
    /// lost, and the limit holds. Cancel safe in the same sense.
    fn withdraw(&self, ask: Ask) -> impl Future<Output = Result<Grant, TreasuryError>> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_replies_that_make_no_sense() {
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
            assert_eq!(Grant::parse(reply), Err(TreasuryError::Malformed), "{reply:?}");
        }
        let grant = Grant::parse(&[7, 1_000, 2, 5]).unwrap();
        assert_eq!((grant.tokens, grant.valid_for), (7, Duration::from_secs(1)));
    }
}
