//! The result of a decision: [`Verdict`], with what the response reports to the client.
//!
//! It neither allocates nor counts: rules are indexes and bits. Invariant: shadow rules appear only
//! in the evaluations, never in what a client receives.

use std::time::Duration;

use super::rule::UserClass;
use super::rule_state::RuleTreatment;
use crate::bucket::{Headroom, Throttled};
use crate::quota::Quota;

/// The outcome of one request against the rules of its route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    Allowed(Admission),
    Denied(Denial),
}

impl Verdict {
    pub fn is_allowed(&self) -> bool {
        matches!(self, Verdict::Allowed(_))
    }
}

/// How each rule evaluated one request, for metrics. In every bitmask, bit n is the rule with index
/// n. No rule is in two bitmasks. A rule in none did not apply: it is off, or the subject has no
/// key for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evaluations {
    /// Enforced, and allowed.
    pub passed: u64,
    /// Enforced, and denied: all such rules, not only the one with the longest wait.
    pub denied: u64,
    /// In shadow mode, and allowed.
    pub shadow_passed: u64,
    /// In shadow mode, and would have denied.
    pub shadow_denied: u64,
    /// Not evaluated, because the percentage excludes the subject.
    pub holdout: u64,
}

impl Evaluations {
    /// The rules that were evaluated.
    pub const fn evaluated(&self) -> u64 {
        self.passed | self.denied | self.shadow_passed | self.shadow_denied
    }

    pub(super) const fn has_passed(&self, bit: u64) -> bool {
        (self.passed | self.shadow_passed) & bit != 0
    }

    /// Records a rule's treatment. A rule that applies counts as passed until
    /// [`Evaluations::mark_denied`].
    pub(super) fn record(&mut self, bit: u64, treatment: RuleTreatment) {
        match treatment {
            RuleTreatment::Enforced(_) => self.passed |= bit,
            RuleTreatment::Shadow(_) => self.shadow_passed |= bit,
            RuleTreatment::Holdout => self.holdout |= bit,
            RuleTreatment::NotApplicable => {}
        }
    }

    /// Changes a rule from passed to denied.
    pub(super) const fn mark_denied(&mut self, bit: u64) {
        self.denied |= self.passed & bit;
        self.shadow_denied |= self.shadow_passed & bit;
        self.passed &= !bit;
        self.shadow_passed &= !bit;
    }
}

/// The state of one rule for the subject of a request, after the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitStatus {
    /// The rule's index in its limiter.
    pub rule: usize,
    /// The quota in effect, multiplied by the subject's weight.
    pub quota: Quota,
    /// Whole tokens left; of a cluster rule, those this node holds.
    pub remaining: u64,
    /// Time until the whole burst is available again.
    pub reset: Duration,
}

impl LimitStatus {
    pub(super) fn with_headroom(rule: usize, quota: Quota, headroom: Headroom) -> LimitStatus {
        LimitStatus { rule, quota, remaining: headroom.remaining, reset: headroom.reset }
    }

    pub(super) fn with_throttled(rule: usize, quota: Quota, throttled: Throttled) -> LimitStatus {
        LimitStatus { rule, quota, remaining: throttled.remaining, reset: throttled.reset }
    }

    /// `reset` in whole seconds, rounded up.
    pub fn reset_seconds(&self) -> u64 {
        seconds_up(self.reset)
    }
}

/// A request that was allowed and charged: the facts that the response and the metrics report of
/// it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    tightest: Option<LimitStatus>,
    pub evaluations: Evaluations,
    /// The class of the subject.
    pub class: UserClass,
}

impl Admission {
    pub(super) fn new(class: UserClass) -> Admission {
        Admission { class, ..Admission::default() }
    }

    pub(super) fn record_status(&mut self, limit_status: LimitStatus) {
        if self.tightest.is_none_or(|tightest| limit_status.remaining < tightest.remaining) {
            self.tightest = Some(limit_status);
        }
    }

    /// The exposed enforced rule with the fewest tokens left, the narrowest of several; `None` if
    /// none applied.
    pub fn tightest(&self) -> Option<&LimitStatus> {
        self.tightest.as_ref()
    }
}

/// A request that was denied and charged nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The rule with the longest wait among those that deny.
    pub limit_status: LimitStatus,
    /// Time until that rule would allow the same request. Exact except in a cluster rule, where it
    /// is an estimate, because it depends on the other nodes. `Duration::MAX` if the cost exceeds
    /// what the class may spend at once, which [`RuleSet::check_cost`](super::RuleSet::check_cost)
    /// rejects.
    pub retry_after: Duration,
    /// A rule that passed was not charged either. If the denial is a lost race, the rules after the
    /// losing one had passed their peek.
    pub evaluations: Evaluations,
    /// The class of the subject.
    pub class: UserClass,
}

impl Denial {
    /// `retry_after` in whole seconds, rounded up, so that it is never too short.
    pub fn retry_after_seconds(&self) -> u64 {
        seconds_up(self.retry_after)
    }
}

fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0))
}
