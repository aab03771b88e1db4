//! The decision whether a request passes the rules of its route.
//!
//! A request that does not pass is charged nowhere. Every rule is peeked first, from narrow to wide
//! scope. Only when all allow the request are they charged, in the same order. If another thread
//! took the last token in between, the charges made so far are refunded in reverse order.
//! Invariant: once every decision has ended, a request denied by one rule has spent nothing in
//! another. The set of rules that apply is fixed once per decision, so an override that begins or
//! ends in between cannot make a rule charge what it did not peek, or refund what it did not
//! charge.

use std::sync::Arc;

use super::denial_log::{DenialLog, LastDenial};
use super::rule::RuleError;
use super::rule_state::{RuleState, RuleTreatment};
use super::subject::{LimitRequest, Subject};
use super::verdict::{Admission, Denial, Evaluations, LimitStatus, Verdict};
use crate::bucket::Throttled;
use crate::clock::MonotonicTime;
use crate::quota::Cost;

/// The rules of one route, ordered from narrow to wide scope. It shares the rules' state, so it
/// decides by itself and may outlive the limiter that built it.
#[derive(Clone, Debug)]
pub struct RuleSet {
    pub(super) rules: Box<[Arc<RuleState>]>,
    denial_log: Arc<DenialLog>,
}

/// The rule that denies a request, with its wait.
struct DenyingRule<'a> {
    state: &'a RuleState,
    throttled: Throttled,
}

impl RuleSet {
    pub(super) fn new(rules: Box<[Arc<RuleState>]>, denial_log: Arc<DenialLog>) -> RuleSet {
        RuleSet { rules, denial_log }
    }

    /// Rejects a cost that some rule can never admit for some user class, because of its burst or
    /// its reserve.
    pub fn check_cost(&self, cost: Cost) -> Result<(), RuleError> {
        let cost = cost.tokens().get();
        for state in &self.rules {
            if let Some(class) = state.costs_max.iter().position(|&most| most < cost) {
                let most = state.costs_max[class];
                return Err(RuleError::CostAboveBurst { rule: state.rule.name.clone(), class, cost, most });
            }
        }
        Ok(())
    }

    /// Whether no rule can ever apply. A rule that is off counts: an override may enable it.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Decides one request and charges it if it is allowed. Neither blocks nor allocates.
    pub fn decide(&self, subject: &Subject<'_>, cost: Cost, now: MonotonicTime) -> Verdict {
        let request = LimitRequest { subject, cost, now };
        let mut evaluations = Evaluations::default();
        // A charge to a single rule is atomic by itself and needs no peek.
        if let [only] = &*self.rules {
            evaluations.record(only.bit, only.treatment(subject, now));
        } else if let Some(denying) = self.peek(&request, &mut evaluations) {
            return self.deny(denying, &request, evaluations);
        }
        self.commit(&request, evaluations)
    }

    /// Charges a request after its response, such as a failed login that costs more. Every enforced
    /// or shadow rule that applies loses `cost`, or what is left of its burst. Never denies, and
    /// never raises a backlog above a whole burst: later decisions see what is left. A lease is
    /// charged up to what this node holds.
    pub fn charge(&self, subject: &Subject<'_>, cost: Cost, now: MonotonicTime) {
        let request = LimitRequest { subject, cost, now };
        for state in &self.rules {
            if let RuleTreatment::Enforced(key) | RuleTreatment::Shadow(key) = state.treatment(subject, now) {
                state.charge(key, &request);
            }
        }
    }

    /// The enforced rule with the longest wait among those that deny, if any. Records the
    /// evaluation of every rule.
    fn peek(&self, request: &LimitRequest<'_>, evaluations: &mut Evaluations) -> Option<DenyingRule<'_>> {
        let mut longest: Option<DenyingRule<'_>> = None;
        for state in &self.rules {
            let treatment = state.treatment(request.subject, request.now);
            evaluations.record(state.bit, treatment);
            let (RuleTreatment::Enforced(key) | RuleTreatment::Shadow(key)) = treatment else { continue };
            let Err(throttled) = state.peek(key, request) else { continue };
            evaluations.mark_denied(state.bit);
            // Demand on the cluster is what the narrower scopes would have let through.
            if longest.is_none() {
                state.record_denied_demand(request);
            }
            let is_longest =
                longest.as_ref().is_none_or(|longest| longest.throttled.retry_after < throttled.retry_after);
            if matches!(treatment, RuleTreatment::Enforced(_)) && is_longest {
                longest = Some(DenyingRule { state, throttled });
            }
        }
        longest
    }

    fn commit(&self, request: &LimitRequest<'_>, mut evaluations: Evaluations) -> Verdict {
        let class = request.subject.class;
        let mut admission = Admission::new(class);
        let mut charged = 0;
        for state in &self.rules {
            if !evaluations.has_passed(state.bit) {
                continue;
            }
            let Some(key) = state.key(request.subject) else { continue };
            match state.commit(key, request) {
                Ok(headroom) => {
                    charged |= state.bit;
                    if evaluations.passed & state.bit != 0 && state.rule.is_exposed {
                        let quota = state.quota(class);
                        admission.record_status(LimitStatus::with_headroom(state.index, quota, headroom));
                    }
                }
                Err(throttled) => {
                    evaluations.mark_denied(state.bit);
                    if evaluations.denied != 0 {
                        self.refund(request, charged);
                        return self.deny(DenyingRule { state, throttled }, request, evaluations);
                    }
                }
            }
        }
        admission.evaluations = evaluations;
        Verdict::Allowed(admission)
    }

    fn refund(&self, request: &LimitRequest<'_>, charged: u64) {
        for state in self.rules.iter().rev().filter(|state| charged & state.bit != 0) {
            if let Some(key) = state.key(request.subject) {
                state.refund(key, request);
            }
        }
    }

    fn deny(&self, denying: DenyingRule<'_>, request: &LimitRequest<'_>, evaluations: Evaluations) -> Verdict {
        let DenyingRule { state, throttled } = denying;
        let LimitRequest { subject, now, .. } = *request;
        self.denial_log.record(subject, state.salt, LastDenial { at: now, retry_after: throttled.retry_after });
        Verdict::Denied(Denial {
            limit_status: LimitStatus::with_throttled(state.index, state.quota(subject.class), throttled),
            retry_after: throttled.retry_after,
            evaluations,
            class: subject.class,
        })
    }
}
