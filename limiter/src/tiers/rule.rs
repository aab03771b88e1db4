//! Owns what a limit is before it has state: [`Tier`], [`Rule`], and why rules are refused.
//!
//! Refuses what cannot work, all of it before anything is built. Invariant: a rule that was accepted lets every class
//! pass at a cost of one token, and counts by something that its tier can count by.

use std::num::NonZeroUsize;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{LimiterSettings, RULES_MAX, WEIGHTS_MAX};
use crate::bucket::Gcra;
use crate::lease::{Lease, LeaseError};
use crate::quota::{Fraction, Mode, Percent, Quota, QuotaError, Weight};

/// In 1.05 GB: a table is allocated whole, when the rule is built.
const KEYS_MAX: usize = 1 << 24;

/// What a rule counts by, narrow before wide: a key of the configuration's own, such as a tenant, an API key or a
/// path, is as a rule shared by several users, and by less than all traffic of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Device,
    User,
    Key,
    Node,
    Cluster,
}

impl Tier {
    pub const ALL: [Tier; 5] = [Tier::Device, Tier::User, Tier::Key, Tier::Node, Tier::Cluster];

    /// Only a subject's own tiers grow with its weight: were it a discount in the shared ones, traffic of nothing but
    /// heavy users would break the limit that all share. There, a reserve is kept for them instead.
    pub(super) fn is_weighted(self) -> bool {
        matches!(self, Tier::Device | Tier::User | Tier::Key)
    }
}

/// Which of a [`Subject`](super::Subject)'s keys a rule of tier key counts by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyIndex(pub u8);

/// The position of a user tier in the configured weights. One that is not there is treated as the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class(pub u8);

/// One limit as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: Arc<str>,
    pub tier: Tier,
    /// Present in rules of tier key, and only there.
    pub key: Option<KeyIndex>,
    pub quota: Quota,
    pub mode: Mode,
    /// Of subjects: users in a user rule, keys in a key rule, devices in any other.
    pub percent: Percent,
    /// Keys held, where the tier has keys; absent: [`LimiterSettings::keys`].
    pub keys: Option<NonZeroUsize>,
    /// In a node or cluster rule, what each class leaves to the others, in the order of the weights: a fraction of the
    /// burst, or of half of what a node may hold of a cluster's. Empty: nothing.
    pub reserve: Box<[Fraction]>,
    /// Whether a report may name it; a denial by it always does.
    pub is_told: bool,
}

impl Rule {
    /// An enforced rule for everybody, without a reserve. One of tier key wants its `key` yet.
    pub fn new(name: impl Into<Arc<str>>, tier: Tier, quota: Quota) -> Rule {
        Rule {
            name: name.into(),
            tier,
            key: None,
            quota,
            mode: Mode::Enforce,
            percent: Percent::ALL,
            keys: None,
            reserve: Box::default(),
            is_told: true,
        }
    }

    /// Whether both count the same, so that the one may go on with the other's state.
    pub(super) fn continues(&self, other: &Rule) -> bool {
        (&self.name, self.tier, self.key) == (&other.name, other.tier, other.key)
    }

    pub(super) fn keys(&self, settings: LimiterSettings) -> NonZeroUsize {
        self.keys.unwrap_or(settings.keys)
    }
}

/// Why rules, or a route's choice of them, were refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RuleError {
    #[error("{0} rules are more than the {RULES_MAX} a limiter holds")]
    TooManyRules(usize),
    #[error("{0} user tiers are not from 1 to {WEIGHTS_MAX}")]
    Weights(usize),
    #[error("two rules are named `{0}`")]
    Duplicate(Arc<str>),
    #[error("rule `{0}` is of tier key and does not say which key")]
    KeyMissing(Arc<str>),
    #[error("rule `{0}` names a key and is not of tier key")]
    KeyUnused(Arc<str>),
    #[error("rule `{rule}` is to hold {keys} keys, more than the {KEYS_MAX} that are no mistake")]
    TooManyKeys { rule: Arc<str>, keys: usize },
    #[error("rule `{rule}` cannot be weighted by {weight}")]
    Weighted { rule: Arc<str>, weight: Weight, source: QuotaError },
    #[error("rule `{0}` has a reserve, which is for rules of tier node or cluster: elsewhere a class has its weight")]
    ReserveUnshared(Arc<str>),
    #[error("rule `{rule}` has a reserve for {reserves} user tiers, and there are {classes}")]
    Reserves { rule: Arc<str>, reserves: usize, classes: usize },
    #[error("the reserve of rule `{rule}` leaves no token to the user tier at position {class}")]
    ReserveOfAll { rule: Arc<str>, class: usize },
    #[error("rule `{rule}` cannot be shared by the fleet")]
    Lease { rule: Arc<str>, source: LeaseError },
    #[error("there is no rule `{0}`")]
    Unknown(String),
    #[error(
        "a cost of {cost} never passes rule `{rule}` for the user tier at position {class}, which it admits at most \
         {most} at once"
    )]
    CostAboveBurst { rule: Arc<str>, class: usize, cost: u32, most: u32 },
}

/// A rule that was accepted, with what is derived from it.
pub(super) struct Checked {
    pub(super) rule: Rule,
    /// One per class; none in a cluster rule.
    pub(super) gcras: Box<[Gcra]>,
    /// One per class in a cluster rule; none elsewhere.
    pub(super) reserves: Box<[Fraction]>,
    /// The largest cost each class can pay, and never zero.
    pub(super) costs_max: Box<[u32]>,
}

/// All rules, or the first fault.
pub(super) fn check(
    rules: Vec<Rule>,
    weights: &[Weight],
    settings: LimiterSettings,
) -> Result<Vec<Checked>, RuleError> {
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
    rules.into_iter().map(|rule| check_one(rule, weights, settings)).collect()
}

fn check_one(rule: Rule, weights: &[Weight], settings: LimiterSettings) -> Result<Checked, RuleError> {
    let name = || rule.name.clone();
    match (rule.tier, rule.key) {
        (Tier::Key, None) => return Err(RuleError::KeyMissing(name())),
        (Tier::Key, Some(_)) | (_, None) => {}
        (_, Some(_)) => return Err(RuleError::KeyUnused(name())),
    }
    let keys = rule.keys(settings).get();
    if rule.tier.is_weighted() && keys > KEYS_MAX {
        return Err(RuleError::TooManyKeys { rule: name(), keys });
    }
    let reserves = reserves(&rule, weights.len())?;
    let (gcras, costs_max) = if rule.tier == Tier::Cluster {
        Lease::check(rule.quota, settings.lease).map_err(|source| RuleError::Lease { rule: name(), source })?;
        let cost_max = |&reserve| Lease::cost_max(rule.quota, settings.lease, reserve);
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
        None => Ok(Checked { rule, gcras, reserves, costs_max }),
    }
}

fn reserves(rule: &Rule, classes: usize) -> Result<Box<[Fraction]>, RuleError> {
    let name = || rule.name.clone();
    match rule.reserve.len() {
        0 => Ok(std::iter::repeat_n(Fraction::ZERO, classes).collect()),
        _ if rule.tier.is_weighted() => Err(RuleError::ReserveUnshared(name())),
        reserves if reserves != classes => Err(RuleError::Reserves { rule: name(), reserves, classes }),
        _ => Ok(rule.reserve.clone()),
    }
}

fn gcra(rule: &Rule, class: usize, weight: Weight, reserve: Fraction) -> Result<Gcra, RuleError> {
    if !rule.tier.is_weighted() {
        let name = || rule.name.clone();
        return Gcra::reserving(rule.quota, reserve).ok_or_else(|| RuleError::ReserveOfAll { rule: name(), class });
    }
    match rule.quota.weighted(weight) {
        Ok(quota) => Ok(Gcra::new(quota)),
        Err(source) => Err(RuleError::Weighted { rule: rule.name.clone(), weight, source }),
    }
}
