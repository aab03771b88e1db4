//! Owns what a decision says: [`Verdict`], and in it what the response tells the client.
//!
//! Refuses to allocate: rules are indexes, the report is an array of four. Invariant: shadow rules
//! show only in `shadow_denied`, never in what a client is told.

use std::time::Duration;

use super::Tier;
use crate::bucket::{Room, Wait};
use crate::quota::Quota;

/// The outcome of one request against the rules of its route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    Allowed(Report),
    Denied(Denial),
}

impl Verdict {
    pub fn is_allowed(&self) -> bool {
        matches!(self, Verdict::Allowed(_))
    }
}

/// How a request stands with one rule, after the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The rule's index in its limiter.
    pub rule: usize,
    /// The quota in effect, multiplied by the subject's weight.
    pub quota: Quota,
    /// Whole tokens left; of a cluster rule, those this node holds.
    pub remaining: u64,
    /// The time until all of the burst is back.
    pub reset: Duration,
}

impl Standing {
    pub(super) fn with_room(rule: usize, quota: Quota, room: Room) -> Standing {
        Standing { rule, quota, remaining: room.remaining, reset: room.reset }
    }

    pub(super) fn with_wait(rule: usize, quota: Quota, wait: Wait) -> Standing {
        Standing { rule, quota, remaining: wait.remaining, reset: wait.reset }
    }

    /// `reset` in whole seconds, rounded up.
    pub fn reset_seconds(&self) -> u64 {
        seconds_up(self.reset)
    }
}

/// A request that may pass, and was charged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    standings: [Option<Standing>; Tier::ALL.len()],
    /// Bit n is set where the shadow rule with index n would have denied.
    pub shadow_denied: u64,
}

impl Report {
    pub(super) fn note(&mut self, tier: Tier, standing: Standing) {
        let slot = &mut self.standings[tier as usize];
        if slot.is_none_or(|held| standing.remaining < held.remaining) {
            *slot = Some(standing);
        }
    }

    /// The tightest rule of each tier that has one, narrow before wide.
    pub fn standings(&self) -> impl Iterator<Item = &Standing> {
        self.standings.iter().flatten()
    }

    /// The rule with the fewest tokens left; none where no enforced rule applied.
    pub fn tightest(&self) -> Option<&Standing> {
        self.standings().min_by_key(|standing| standing.remaining)
    }
}

/// A request that may not pass, and was charged nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The rule that denies for longest.
    pub standing: Standing,
    /// Until that rule would let the same request pass. Exact in device, user and node rules; in a
    /// cluster rule an estimate, because it depends on the other nodes. `Duration::MAX` where the
    /// cost exceeds the burst, which [`RuleSet::check_cost`](super::RuleSet::check_cost) refuses.
    pub retry_after: Duration,
    /// Bit n is set where the shadow rule with index n would have denied, too.
    pub shadow_denied: u64,
}

impl Denial {
    /// `retry_after` in whole seconds, rounded up: never shorter than true.
    pub fn retry_after_seconds(&self) -> u64 {
        seconds_up(self.retry_after)
    }
}

fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0))
}
