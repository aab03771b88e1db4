//! [`Explanation`]: how each rule would treat a subject, and why.
//!
//! It charges nothing. Invariant: an explanation equals what a decision at the same time would
//! find.

use std::sync::Arc;
use std::time::Duration;

use super::Limiter;
use super::denial_log::LastDenial;
use super::overrides::Override;
use super::rule::Scope;
use super::rule_state::RuleState;
use super::subject::{LimitRequest, Subject};
use crate::bucket::{Headroom, Throttled};
use crate::clock::MonotonicTime;
use crate::quota::{Cost, Mode, Percent, Quota};

/// How one rule would treat a subject's request at a cost of one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The rule's index in its limiter.
    pub rule: usize,
    pub name: Arc<str>,
    pub scope: Scope,
    /// The mode in effect: the override's or the configured one.
    pub mode: Mode,
    pub percent: Percent,
    /// End of the override that sets `mode` and `percent`; `None` if they are the configured ones.
    pub override_ends_at: Option<MonotonicTime>,
    /// Whether the subject has the key that the rule counts by.
    pub has_key: bool,
    /// Whether the percentage includes the subject.
    pub is_included: bool,
    /// The quota in effect for the subject's class.
    pub quota: Quota,
    /// Whole tokens that the subject may spend at once; of a cluster rule, those this node holds.
    pub remaining: u64,
    /// Time until the whole burst is available again.
    pub reset: Duration,
    /// Time until one token may be spent; zero if one may be spent now.
    pub wait: Duration,
    /// Whole tokens that this class must leave to others.
    pub reserve: u64,
    /// The subject's last denial, if it was by this rule and is still in the log.
    pub last_denial: Option<LastDenial>,
}

impl Limiter {
    /// Explains how each rule would treat this subject now, in the order of the rules. Charges
    /// nothing.
    pub fn explain(&self, subject: &Subject<'_>, now: MonotonicTime) -> Vec<Explanation> {
        let request = LimitRequest { subject, cost: Cost::ONE, now };
        self.rules.iter().map(|state| self.explain_rule(state, &request)).collect()
    }

    fn explain_rule(&self, state: &RuleState, request: &LimitRequest<'_>) -> Explanation {
        let LimitRequest { subject, now, .. } = *request;
        let Override { mode, percent } = state.effective_mode(now);
        let key = state.key(subject);
        let quota = state.quota(subject.class);
        let (remaining, reset, wait) = match key.map(|key| state.headroom(key, request)) {
            Some(Ok(Headroom { remaining, reset })) => (remaining, reset, Duration::ZERO),
            Some(Err(Throttled { retry_after, remaining, reset })) => (remaining, reset, retry_after),
            None => (u64::from(quota.burst().get()), Duration::ZERO, Duration::ZERO),
        };
        Explanation {
            rule: state.index,
            name: state.rule.name.clone(),
            scope: state.rule.scope,
            mode,
            percent,
            override_ends_at: state.override_slot.active(now).map(|(_, ends_at)| ends_at),
            has_key: key.is_some(),
            is_included: key.is_some_and(|key| percent.includes(key, state.salt)),
            quota,
            remaining,
            reset,
            wait,
            reserve: state.reserve(subject.class),
            last_denial: self.denial_log.last(subject, state.salt),
        }
    }
}
