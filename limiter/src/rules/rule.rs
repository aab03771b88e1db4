//! A limit before it has state: [`Scope`], [`Rule`], and the reasons why rules are rejected.
//!
//! Impossible rules are rejected before anything is built. Invariant: an accepted rule can admit
//! a request at a cost of one token for every user class, and has a key exactly if its scope counts
//! by one.

use std::num::NonZeroUsize;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::config::{LimiterConfig, RULES_MAX, WEIGHTS_MAX};
use crate::bucket::Gcra;
use crate::lease::{Lease, LeaseError};
use crate::quota::{Fraction, Mode, Percent, Quota, QuotaError, Weight};

/// Most keys of one rule, in 1.05 GB: the whole table is allocated when the rule is built.
pub const KEYS_PER_RULE_MAX: u32 = 1 << 24;

/// The subject that a rule counts by, from narrow to wide. `Key` is a key that the configuration
/// defines, such as a tenant, an API key or a path: usually several users share it, and it covers
/// less than all traffic of a node. The configuration's key for it is `tier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Device,
    User,
    Key,
    Node,
    Cluster,
}

impl Scope {
    pub const ALL: [Scope; 5] = [Scope::Device, Scope::User, Scope::Key, Scope::Node, Scope::Cluster];

    /// Weight multiplies only the limits of a subject's own scopes. As a discount in the shared
    /// scopes, traffic of heavy users alone would break the limit that all share; the shared scopes
    /// have a reserve instead.
    pub(super) fn is_weighted(self) -> bool {
        matches!(self, Scope::Device | Scope::User | Scope::Key)
    }
}

/// Index of the key in [`Subject::keys`](super::Subject) that a rule of scope key counts by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyIndex(pub u8);

/// Index of a user class in the configured weights. A class out of range is treated as the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserClass(pub u8);

/// Configuration of one limit: scope, quota, mode, percentage and reserves, without counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: Arc<str>,
    pub scope: Scope,
    /// Present exactly in rules of scope key.
    pub key: Option<KeyIndex>,
    pub quota: Quota,
    pub mode: Mode,
    /// Percentage of users in a user rule, of keys in a key rule, of devices in any other.
    pub percent: Percent,
    /// Number of keys, in scopes that have keys; `None`: [`LimiterConfig::keys`].
    pub keys: Option<NonZeroUsize>,
    /// In a node or cluster rule, what each user class must leave to the others, in the order of
    /// the weights: a fraction of the burst, or of half of what a node may hold of a cluster's
    /// burst. Empty: no reserve.
    pub reserve: Box<[Fraction]>,
    /// Whether an admission may report this rule; a denial by it always does.
    pub is_exposed: bool,
}

impl Rule {
    /// An enforced rule for every subject, without a reserve. A rule of scope key still needs its
    /// `key`.
    pub fn new(name: impl Into<Arc<str>>, scope: Scope, quota: Quota) -> Rule {
        Rule {
            name: name.into(),
            scope,
            key: None,
            quota,
            mode: Mode::Enforce,
            percent: Percent::ALL,
            keys: None,
            reserve: Box::default(),
            is_exposed: true,
        }
    }

    /// Whether both count the same, so that one may keep the other's state.
    pub(super) fn continues(&self, other: &Rule) -> bool {
        (&self.name, self.scope, self.key) == (&other.name, other.scope, other.key)
    }

    pub(super) fn keys(&self, config: LimiterConfig) -> NonZeroUsize {
        self.keys.unwrap_or(config.keys)
    }
}

/// Why rules, or a route's list of rules, were rejected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RuleError {
    #[error("{0} rules are more than the {RULES_MAX} that a limiter can hold")]
    TooManyRules(usize),
    #[error("{0} user classes are not from 1 to {WEIGHTS_MAX}")]
    Weights(usize),
    #[error("two rules are named `{0}`")]
    Duplicate(Arc<str>),
    #[error("rule `{0}` has the scope key but does not name its key")]
    KeyMissing(Arc<str>),
    #[error("rule `{0}` names a key but does not have the scope key")]
    KeyUnused(Arc<str>),
    #[error("rule `{rule}` has {keys} keys; at most {KEYS_PER_RULE_MAX} are allowed")]
    TooManyKeys { rule: Arc<str>, keys: usize },
    #[error("rule `{rule}` cannot be weighted by {weight}")]
    Weighted { rule: Arc<str>, weight: Weight, source: QuotaError },
    #[error(
        "rule `{0}` has a reserve, which only rules of scope node or cluster can have; elsewhere a user class has its \
         weight"
    )]
    ReserveUnshared(Arc<str>),
    #[error("rule `{rule}` has a reserve for {reserves} user classes, but {classes} are configured")]
    Reserves { rule: Arc<str>, reserves: usize, classes: usize },
    #[error("the reserve of rule `{rule}` leaves no token to the user class at position {class}")]
    ReserveOfAll { rule: Arc<str>, class: usize },
    #[error("rule `{rule}` cannot be shared by the fleet")]
    Lease { rule: Arc<str>, source: LeaseError },
    #[error("there is no rule `{0}`")]
    Unknown(String),
    #[error(
        "a cost of {cost} never passes rule `{rule}` for the user class at position {class}, which may spend at most \
         {most} at once"
    )]
    CostAboveBurst { rule: Arc<str>, class: usize, cost: u32, most: u32 },
}

/// An accepted rule with the values derived from it.
pub(super) struct CheckedRule {
    pub(super) rule: Rule,
    /// One per user class; empty in a cluster rule.
    pub(super) gcras: Box<[Gcra]>,
    /// One per user class in a cluster rule; empty elsewhere.
    pub(super) reserves: Box<[Fraction]>,
    /// The largest cost that each user class can pay; never zero.
    pub(super) costs_max: Box<[u32]>,
}

/// Checks all rules; returns the first error.
pub(super) fn check(
    rules: Vec<Rule>,
    weights: &[Weight],
    config: LimiterConfig,
) -> Result<Vec<CheckedRule>, RuleError> {
    if rules.len() > RULES_MAX {
        return Err(RuleError::TooManyRules(rules.len()));
    }
    if !(1..=WEIGHTS_MAX).contains(&weights.len()) {
        return Err(RuleError::Weights(weights.len()));
    }
    for (index, rule) in rules.iter().enumerate() {
        if rules[..index].iter().any(|earlier| earlier.name == rule.name) {
            return Err(RuleError::Duplicate(rule.name.clone()));
        }
    }
    rules.into_iter().map(|rule| check_rule(rule, weights, config)).collect()
}

fn check_rule(rule: Rule, weights: &[Weight], config: LimiterConfig) -> Result<CheckedRule, RuleError> {
    let name = || rule.name.clone();
    match (rule.scope, rule.key) {
        (Scope::Key, None) => return Err(RuleError::KeyMissing(name())),
        (Scope::Key, Some(_)) | (_, None) => {}
        (_, Some(_)) => return Err(RuleError::KeyUnused(name())),
    }
    let keys = rule.keys(config).get();
    if rule.scope.is_weighted() && keys > KEYS_PER_RULE_MAX as usize {
        return Err(RuleError::TooManyKeys { rule: name(), keys });
    }
    let reserves = reserves(&rule, weights.len())?;
    let (gcras, costs_max) = if rule.scope == Scope::Cluster {
        Lease::check(rule.quota, config.lease).map_err(|source| RuleError::Lease { rule: name(), source })?;
        let cost_max = |&reserve| Lease::cost_max(rule.quota, config.lease, reserve);
        (Box::default(), reserves.iter().map(cost_max).collect())
    } else {
        let gcras = weights.iter().zip(&reserves).enumerate();
        let gcras = gcras.map(|(class, (&weight, &reserve))| gcra(&rule, class, weight, reserve));
        let gcras = gcras.collect::<Result<Box<[Gcra]>, _>>()?;
        let costs_max = gcras.iter().map(|gcra| gcra.spendable().get()).collect::<Box<[u32]>>();
        (gcras, costs_max)
    };
    match costs_max.iter().position(|&most| most == 0) {
        Some(class) => Err(RuleError::ReserveOfAll { rule: name(), class }),
        None => Ok(CheckedRule { rule, gcras, reserves, costs_max }),
    }
}

fn reserves(rule: &Rule, classes: usize) -> Result<Box<[Fraction]>, RuleError> {
    let name = || rule.name.clone();
    match rule.reserve.len() {
        0 => Ok(std::iter::repeat_n(Fraction::ZERO, classes).collect()),
        _ if rule.scope.is_weighted() => Err(RuleError::ReserveUnshared(name())),
        reserves if reserves != classes => Err(RuleError::Reserves { rule: name(), reserves, classes }),
        _ => Ok(rule.reserve.clone()),
    }
}

fn gcra(rule: &Rule, class: usize, weight: Weight, reserve: Fraction) -> Result<Gcra, RuleError> {
    if !rule.scope.is_weighted() {
        let name = || rule.name.clone();
        return Gcra::with_reserve(rule.quota, reserve).ok_or_else(|| RuleError::ReserveOfAll { rule: name(), class });
    }
    match rule.quota.weighted(weight) {
        Ok(quota) => Ok(Gcra::new(quota)),
        Err(source) => Err(RuleError::Weighted { rule: rule.name.clone(), weight, source }),
    }
}
