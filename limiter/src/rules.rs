//! The [`Limiter`]: all rules with their state. It builds and rebuilds them, overrides their modes
//! and explains their decisions.
//!
//! It does not decide: the [`RuleSet`] of a route does that and shares the state. Invariants: the
//! counts of a rule and its active override survive a change of the rule's numbers; a rejected
//! change changes nothing.

mod config;
mod rule;
mod subject;
mod overrides;
mod rule_state;
mod verdict;
mod denial_log;
mod decision;
mod explain;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

pub use config::{LimiterConfig, RULES_MAX};
pub use decision::RuleSet;
pub use denial_log::LastDenial;
pub use explain::Explanation;
pub use overrides::Override;
pub use rule::{KEYS_PER_RULE_MAX, KeyIndex, Rule, RuleError, Scope, UserClass};
pub use subject::Subject;
pub use verdict::{Admission, Denial, Evaluations, LimitStatus, Verdict};

use crate::clock::MonotonicTime;
use crate::lease::Lease;
use crate::quota::Weight;
use denial_log::{DenialLog, DeniedSubject};
use rule_state::{RuleCounter, RuleState};

/// All rules of a configuration with their counters and overrides, and the log of recent denials.
#[derive(Debug)]
pub struct Limiter {
    rules: Box<[Arc<RuleState>]>,
    denial_log: Arc<DenialLog>,
}

/// An override that has not ended, with the name of its rule and its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveOverride {
    pub rule: Arc<str>,
    pub rule_override: Override,
    pub ends_at: MonotonicTime,
}

/// A device or a user that was denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentDenial {
    /// The rule that denied it last.
    pub rule: Arc<str>,
    /// The high bits of the keyed hash of the device; of a user, mixed with a constant.
    pub key: u64,
    pub denial: LastDenial,
    /// Its denials by all rules, from the first one that is counted.
    pub count: u32,
    pub since: MonotonicTime,
}

impl Limiter {
    /// Builds every rule with fresh state.
    pub fn new(
        rules: Vec<Rule>,
        weights: &[Weight],
        config: LimiterConfig,
        now: MonotonicTime,
    ) -> Result<Limiter, RuleError> {
        Limiter { rules: Box::default(), denial_log: Arc::default() }.rebuild(rules, weights, config, now)
    }

    /// Builds the limiter of a new configuration, which takes over with [`Limiter::take_over`]. A
    /// rule with the same name, scope and key keeps its state, so limited callers stay limited and
    /// an override stays active. The state is shared with this limiter, which may keep deciding
    /// until it is dropped. An error changes nothing.
    #[expect(clippy::too_many_arguments, reason = "the arguments of `new`, on an existing limiter; called on reload")]
    pub fn rebuild(
        &self,
        rules: Vec<Rule>,
        weights: &[Weight],
        config: LimiterConfig,
        now: MonotonicTime,
    ) -> Result<Limiter, RuleError> {
        let checked = rule::check(rules, weights, config)?;
        // Everything is valid from here on: a lease that is kept changes for both limiters.
        let states = checked.into_iter().enumerate().map(|(index, checked)| {
            let previous = self.rules.iter().find(|state| state.rule.continues(&checked.rule));
            RuleState::build(index, previous.map(|state| &**state), checked, config, now).map(Arc::new)
        });
        Ok(Limiter { rules: states.collect::<Result<_, _>>()?, denial_log: Arc::clone(&self.denial_log) })
    }

    /// Converts the backlogs that `previous` has left, for rules with another rate: what was spent
    /// stays spent. Call it once, just before this limiter replaces `previous`: a decision of that
    /// one in between finds a backlog of another quota, and forgets a burst at most.
    pub fn take_over(&self, previous: &Limiter, now: impl Fn() -> MonotonicTime) {
        for state in &self.rules {
            if let Some(before) = previous.rules.iter().find(|before| before.rule.continues(&state.rule)) {
                state.take_over(before, now());
            }
        }
    }

    /// The rules that a route names, ordered from narrow to wide scope whatever their order there.
    pub fn rule_set<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<RuleSet, RuleError> {
        let mut rules =
            names.into_iter().map(|name| self.find(name).cloned()).collect::<Result<Vec<_>, RuleError>>()?;
        rules.sort_by_key(|state| (state.rule.scope, state.index));
        // A rule that is named twice is charged once.
        rules.dedup_by_key(|state| state.index);
        // A rule that is off stays in the set: an override may enable it.
        Ok(RuleSet::new(rules.into(), Arc::clone(&self.denial_log)))
    }

    /// The rules in the order of their indexes.
    pub fn rules(&self) -> impl ExactSizeIterator<Item = &Rule> {
        self.rules.iter().map(|state| &state.rule)
    }

    /// Name and lease of each cluster rule in use, for the task that refreshes leases. A rule that
    /// is off is in use while an override with another mode is set: list the leases again after
    /// [`Limiter::set_override`].
    pub fn leases(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Lease>)> {
        self.rules.iter().filter_map(|state| match &state.counter {
            RuleCounter::Cluster { lease, .. } if state.may_apply() => Some((&state.rule.name, lease)),
            _ => None,
        })
    }

    /// Replaces mode and percentage of a rule until `ends_at` or [`Limiter::clear_override`]. A
    /// reload of the rule does not end the override. It takes effect with the next decision of
    /// every rule set and replaces an active override.
    pub fn set_override(&self, rule: &str, rule_override: Override, ends_at: MonotonicTime) -> Result<(), RuleError> {
        self.find(rule)?.override_slot.set(rule_override, ends_at);
        Ok(())
    }

    /// Restores the configured mode and percentage. Without an active override, changes nothing.
    pub fn clear_override(&self, rule: &str) -> Result<(), RuleError> {
        self.find(rule)?.override_slot.clear();
        Ok(())
    }

    /// The overrides in effect at `now`.
    pub fn active_overrides(&self, now: MonotonicTime) -> impl Iterator<Item = ActiveOverride> {
        self.rules.iter().filter_map(move |state| {
            let (rule_override, ends_at) = state.override_slot.active(now)?;
            Some(ActiveOverride { rule: state.rule.name.clone(), rule_override, ends_at })
        })
    }

    /// The subjects that were denied within `window` before `now`, the latest first and at most a
    /// few thousand; for operators. Not exact: where many subjects are denied, one may be missing,
    /// and its count begins again.
    pub fn denied_within(&self, window: Duration, now: MonotonicTime) -> Vec<RecentDenial> {
        let rule_of = |salt: u64| self.rules.iter().find(|state| state.salt == salt);
        let denied = self.denial_log.subjects(|salt, at| now.since(at) <= window && rule_of(salt).is_some());
        let denials = denied.into_iter().filter_map(|subject| {
            let DeniedSubject { key, salt, last: denial, count, since } = subject;
            Some(RecentDenial { rule: Arc::clone(&rule_of(salt)?.rule.name), key, denial, count, since })
        });
        denials.collect()
    }

    fn find(&self, name: &str) -> Result<&Arc<RuleState>, RuleError> {
        let has_name = |state: &&Arc<RuleState>| &*state.rule.name == name;
        self.rules.iter().find(has_name).ok_or_else(|| RuleError::Unknown(name.to_owned()))
    }
}
