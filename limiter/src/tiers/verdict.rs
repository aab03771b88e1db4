//! Owns what a decision says: [`Verdict`], and in it what the response tells the client.
//!
//! Refuses to allocate and to count: rules are indexes and bits. Invariant: shadow rules show only in the votes, never in what a client is told.

use std::time::Duration;

use super::held::Arm;
use super::rule::Class;
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

/// What each rule said about one request, for whoever counts: in every mask, bit n stands for the rule with index n.
/// No rule is in two of them; one in none did not apply, because it is off or the subject has no key for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Votes {
    /// Enforced, and had room.
    pub passed: u64,
    /// Enforced, and had none: all such rules, not only the one that denies for longest.
    pub denied: u64,
    /// In shadow, and had room.
    pub shadow_passed: u64,
    /// In shadow, and would have denied.
    pub shadow_denied: u64,
    /// Not asked, because the percentage leaves the subject out.
    pub excluded: u64,
}

impl Votes {
    /// The rules that were asked.
    pub const fn applied(&self) -> u64 {
        self.passed | self.denied | self.shadow_passed | self.shadow_denied
    }

    pub(super) const fn has_passed(&self, bit: u64) -> bool {
        (self.passed | self.shadow_passed) & bit != 0
    }

    /// Takes a rule that applies to pass, until it says otherwise.
    pub(super) fn take(&mut self, bit: u64, arm: Arm) {
        match arm {
            Arm::Enforced(_) => self.passed |= bit,
            Arm::Shadow(_) => self.shadow_passed |= bit,
            Arm::Excluded => self.excluded |= bit,
            Arm::Absent => {}
        }
    }

    /// Turns the vote of a rule that was taken to pass.
    pub(super) const fn deny(&mut self, bit: u64) {
        self.denied |= self.passed & bit;
        self.shadow_denied |= self.shadow_passed & bit;
        self.passed &= !bit;
        self.shadow_passed &= !bit;
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
    tightest: Option<Standing>,
    pub votes: Votes,
    /// Of the subject.
    pub class: Class,
}

impl Report {
    pub(super) fn new(class: Class) -> Report {
        Report { class, ..Report::default() }
    }

    pub(super) fn note(&mut self, standing: Standing) {
        if self.tightest.is_none_or(|held| standing.remaining < held.remaining) {
            self.tightest = Some(standing);
        }
    }

    /// The enforced rule with the fewest tokens left, the narrowest of several; none where none applied.
    pub fn tightest(&self) -> Option<&Standing> {
        self.tightest.as_ref()
    }
}

/// A request that may not pass, and was charged nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The rule that denies for longest.
    pub standing: Standing,
    /// Until that rule would let the same request pass. Exact but in a cluster rule, where it is
    /// an estimate, because it depends on the other nodes. `Duration::MAX` where the
    /// cost exceeds what the class may spend at once, which [`RuleSet::check_cost`](super::RuleSet::check_cost) refuses.
    pub retry_after: Duration,
    /// A rule that passed did not charge either. Where a race was lost, the rules after the loser had passed before it.
    pub votes: Votes,
    /// Of the subject.
    pub class: Class,
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
