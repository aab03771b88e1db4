//! Owns the limiter: the rules of all tiers with their state, built, rebuilt, tried out and explained.
//!
//! Refuses to decide: that is done by the [`RuleSet`] of a route, which shares the state. Invariant: what a rule has
//! counted, and a trial that runs, outlive a change of its numbers; a refused change changes nothing.

mod decision;
mod denials;
mod explain;
mod held;
mod rule;
#[cfg(test)]
mod tests;
mod trial;
mod verdict;

use std::num::NonZeroUsize;
use std::sync::Arc;

pub use decision::RuleSet;
pub use denials::LastDenial;
pub use explain::Explanation;
pub use rule::{Class, KeyIndex, Rule, RuleError, Tier};
pub use trial::Trial;
pub use verdict::{Denial, Report, Standing, Verdict, Votes};

use crate::clock::Moment;
use crate::lease::{Lease, LeaseSettings};
use crate::quota::{KeyHash, Weight};
use denials::Denials;
use held::{Held, State};

/// One bit each in the masks of a verdict.
pub const RULES_MAX: usize = 64;
/// [`Class`] is a byte.
const WEIGHTS_MAX: usize = 256;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject<'a> {
    pub device: KeyHash,
    /// Absent where nobody is identified: user rules do not apply.
    pub user: Option<KeyHash>,
    pub class: Class,
    /// What the configuration's own keys came to, by [`KeyIndex`]. A rule whose key is absent, or beyond the end, does
    /// not apply.
    pub keys: &'a [Option<KeyHash>],
}

/// What all rules of a limiter share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimiterSettings {
    /// Keys held per device, user or key rule that does not say how many.
    pub keys: NonZeroUsize,
    pub lease: LeaseSettings,
}

impl LimiterSettings {
    /// 65,536 keys per rule, in 4.1 MB: ten million other keys in ten seconds leave heavy ones limited.
    pub const KEYS: NonZeroUsize = NonZeroUsize::new(65_536).expect("65,536 is not zero");

    pub fn new(lease: LeaseSettings) -> LimiterSettings {
        LimiterSettings { keys: LimiterSettings::KEYS, lease }
    }
}

/// All rules of a configuration with their state.
#[derive(Debug)]
pub struct Limiter {
    rules: Box<[Arc<Held>]>,
    denials: Arc<Denials>,
}

/// A trial that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    pub rule: Arc<str>,
    pub trial: Trial,
    pub until: Moment,
}

impl Limiter {
    /// Builds every rule with fresh state.
    pub fn new(
        rules: Vec<Rule>,
        weights: &[Weight],
        settings: LimiterSettings,
        now: Moment,
    ) -> Result<Limiter, RuleError> {
        Limiter { rules: Box::default(), denials: Arc::default() }.rebuild(rules, weights, settings, now)
    }

    /// The limiter of a new configuration. A rule whose name, tier and key are unchanged keeps its state, so that who
    /// is limited stays limited and a trial runs on; it is shared with this limiter, which may go on deciding until it
    /// is dropped. Refused, nothing changes.
    pub fn rebuild(
        &self,
        rules: Vec<Rule>,
        weights: &[Weight],
        settings: LimiterSettings,
        now: Moment,
    ) -> Result<Limiter, RuleError> {
        let checked = rule::check(rules, weights, settings)?;
        // Everything is valid from here on: a lease that is kept changes for both limiters.
        let held = checked.into_iter().enumerate().map(|(index, checked)| {
            let kept = self.rules.iter().find(|held| held.rule.continues(&checked.rule));
            Held::build(index, kept.map(|held| &**held), checked, settings, now).map(Arc::new)
        });
        Ok(Limiter { rules: held.collect::<Result<_, _>>()?, denials: Arc::clone(&self.denials) })
    }

    /// The rules a route names, narrow before wide whatever their order there.
    pub fn rule_set<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<RuleSet, RuleError> {
        let mut rules =
            names.into_iter().map(|name| self.find(name).cloned()).collect::<Result<Vec<_>, RuleError>>()?;
        rules.sort_by_key(|held| (held.rule.tier, held.index));
        // Named twice, a rule is charged once.
        rules.dedup_by_key(|held| held.index);
        // One that is off stays: a trial may switch it on.
        Ok(RuleSet::new(rules.into(), Arc::clone(&self.denials)))
    }

    /// The rules in the order of their indexes.
    pub fn rules(&self) -> impl ExactSizeIterator<Item = &Rule> {
        self.rules.iter().map(|held| &held.rule)
    }

    /// Name and lease of each cluster rule in use, for the loop that asks the treasury. One that is off is in use while
    /// a trial is set that is not: look again after [`Limiter::try_out`].
    pub fn leases(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Lease>)> {
        self.rules.iter().filter_map(|held| match &held.state {
            State::Cluster { lease, .. } if held.is_in_use() => Some((&held.rule.name, lease)),
            _ => None,
        })
    }

    /// Replaces mode and percentage of a rule until then, or until [`Limiter::end_trial`]; a reload of the rule does not
    /// end it. It takes effect with the next decision of every rule set, and replaces a trial that runs.
    pub fn try_out(&self, rule: &str, trial: Trial, until: Moment) -> Result<(), RuleError> {
        self.find(rule)?.switch.set(trial, until);
        Ok(())
    }

    /// Goes back to the configured mode and percentage; nothing changes where no trial runs.
    pub fn end_trial(&self, rule: &str) -> Result<(), RuleError> {
        self.find(rule)?.switch.clear();
        Ok(())
    }

    /// The trials that run.
    pub fn trials(&self, now: Moment) -> impl Iterator<Item = Running> {
        self.rules.iter().filter_map(move |held| {
            let (trial, until) = held.switch.running(now)?;
            Some(Running { rule: held.rule.name.clone(), trial, until })
        })
    }

    fn find(&self, name: &str) -> Result<&Arc<Held>, RuleError> {
        let named = |held: &&Arc<Held>| &*held.rule.name == name;
        self.rules.iter().find(named).ok_or_else(|| RuleError::Unknown(name.to_owned()))
    }
}
