//! Owns the decision: the rules of all tiers, and whether a request passes those of its route.
//!
//! Refuses to charge a request that does not pass: every rule is peeked first, narrow before wide,
//! and only when all agree are they charged in that order; where another thread took the last
//! token in between, what was charged is refunded in reverse. Invariant: once every decision has
//! ended, a request denied by one rule has spent nothing in another.

#[cfg(test)]
mod tests;
mod verdict;

use std::num::NonZeroUsize;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use verdict::{Denial, Report, Standing, Verdict};

use crate::bucket::{Cell, Gcra, Room, Table, Wait};
use crate::clock::Moment;
use crate::lease::{Lease, LeaseError, LeaseSettings};
use crate::quota::{Cost, KeyHash, Mode, Percent, Quota, QuotaError, Weight};

/// One bit each in the mask of shadow denials.
pub const RULES_MAX: usize = 64;
/// [`Class`] is a byte.
const WEIGHTS_MAX: usize = 256;

/// What a rule counts by, narrow before wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Device,
    User,
    Node,
    Cluster,
}

impl Tier {
    pub const ALL: [Tier; 4] = [Tier::Device, Tier::User, Tier::Node, Tier::Cluster];

    /// Only a subject's own tiers grow with its weight: were it a discount in the shared ones,
    /// traffic of nothing but heavy users would break the limit that all share.
    fn is_weighted(self) -> bool {
        matches!(self, Tier::Device | Tier::User)
    }
}

/// One limit as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: Arc<str>,
    pub tier: Tier,
    pub quota: Quota,
    pub mode: Mode,
    /// Of subjects: users in a user rule, devices in any other.
    pub percent: Percent,
}

/// The position of a user tier in the configured weights. One that is not there weighs as the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class(pub u8);

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    pub device: KeyHash,
    /// Absent where nobody is identified: user rules do not apply.
    pub user: Option<KeyHash>,
    pub class: Class,
}

/// What all rules of a limiter share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimiterSettings {
    /// Keys held per device or user rule.
    pub keys: NonZeroUsize,
    pub lease: LeaseSettings,
}

impl LimiterSettings {
    /// 65,536 keys per rule, in 1.2 MB: a million other keys in ten seconds leave a heavy one in place.
    pub const KEYS: NonZeroUsize = NonZeroUsize::new(65_536).expect("65,536 is not zero");

    pub fn new(lease: LeaseSettings) -> LimiterSettings {
        LimiterSettings { keys: LimiterSettings::KEYS, lease }
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
    #[error("rule `{rule}` cannot be weighted by {weight}")]
    Weighted { rule: Arc<str>, weight: Weight, source: QuotaError },
    #[error("rule `{rule}` cannot be shared by the fleet")]
    Lease { rule: Arc<str>, source: LeaseError },
    #[error("there is no rule `{0}`")]
    Unknown(String),
    #[error("a cost of {cost} never passes rule `{rule}`, which admits at most {most} at once")]
    CostAboveBurst { rule: Arc<str>, cost: u32, most: u32 },
}

/// All rules of a configuration with their state.
#[derive(Debug)]
pub struct Limiter {
    rules: Box<[Arc<Held>]>,
}

/// A rule with its state. The state outlives the rule on a reload.
#[derive(Debug)]
struct Held {
    index: usize,
    rule: Rule,
    salt: u64,
    cost_max: u32,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// One GCRA per class.
    Keyed {
        table: Arc<Table>,
        classes: Box<[Gcra]>,
    },
    Node {
        cell: Arc<Cell>,
        gcra: Gcra,
    },
    Cluster(Arc<Lease>),
}

impl Limiter {
    /// Builds every rule with fresh state.
    pub fn new(
        rules: Vec<Rule>,
        weights: &[Weight],
        settings: LimiterSettings,
        now: Moment,
    ) -> Result<Limiter, RuleError> {
        Limiter { rules: Box::default() }.rebuild(rules, weights, settings, now)
    }

    /// The limiter of a new configuration. A rule whose name and tier are unchanged keeps its
    /// state, so that who is limited stays limited; it is shared with this limiter, which may go
    /// on deciding until it is dropped. A table is kept only if its size is. Refused, nothing changes.
    pub fn rebuild(
        &self,
        rules: Vec<Rule>,
        weights: &[Weight],
        settings: LimiterSettings,
        now: Moment,
    ) -> Result<Limiter, RuleError> {
        check(&rules, weights)?;
        let classes = rules.iter().map(|rule| classes(rule, weights, settings.lease)).collect::<Result<Vec<_>, _>>()?;
        // Everything is valid from here on: a lease that is kept changes for both limiters.
        let held = rules.into_iter().zip(classes).enumerate().map(|(index, (rule, classes))| {
            let kept = self.state_of(&rule.name, rule.tier);
            let cost_max = cost_max(&rule, &classes, settings.lease);
            let state = State::build(kept, &rule, classes, settings, now)?;
            Ok(Arc::new(Held { index, salt: salt(&rule.name), rule, cost_max, state }))
        });
        Ok(Limiter { rules: held.collect::<Result<_, _>>()? })
    }

    /// The rules a route names, narrow before wide whatever their order there.
    pub fn rule_set<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<RuleSet, RuleError> {
        let find = |name: &str| self.rules.iter().find(|held| &*held.rule.name == name).cloned();
        let mut rules = names
            .into_iter()
            .map(|name| find(name).ok_or_else(|| RuleError::Unknown(name.to_owned())))
            .collect::<Result<Vec<_>, _>>()?;
        rules.sort_by_key(|held| (held.rule.tier, held.index));
        // Named twice, a rule is charged once.
        rules.dedup_by_key(|held| held.index);
        rules.retain(|held| held.rule.mode != Mode::Off);
        Ok(RuleSet { rules: rules.into() })
    }

    /// The rules in the order of their indexes.
    pub fn rules(&self) -> impl ExactSizeIterator<Item = &Rule> {
        self.rules.iter().map(|held| &held.rule)
    }

    /// Name and lease of each cluster rule in use, for the loop that asks the treasury.
    pub fn leases(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Lease>)> {
        self.rules.iter().filter_map(|held| match &held.state {
            State::Cluster(lease) if held.rule.mode != Mode::Off => Some((&held.rule.name, lease)),
            _ => None,
        })
    }

    fn state_of(&self, name: &str, tier: Tier) -> Option<&State> {
        let same = |held: &&Arc<Held>| &*held.rule.name == name && held.rule.tier == tier;
        self.rules.iter().find(same).map(|held| &held.state)
    }
}

impl State {
    fn build(
        kept: Option<&State>,
        rule: &Rule,
        classes: Box<[Gcra]>,
        settings: LimiterSettings,
        now: Moment,
    ) -> Result<State, RuleError> {
        Ok(match (rule.tier, kept) {
            (Tier::Device | Tier::User, Some(State::Keyed { table, .. })) if table.fits(settings.keys) => {
                State::Keyed { table: Arc::clone(table), classes }
            }
            (Tier::Device | Tier::User, _) => State::Keyed { table: Arc::new(Table::new(settings.keys)), classes },
            (Tier::Node, kept) => {
                let cell = match kept {
                    Some(State::Node { cell, .. }) => Arc::clone(cell),
                    _ => Arc::default(),
                };
                State::Node { cell, gcra: Gcra::new(rule.quota) }
            }
            (Tier::Cluster, Some(State::Cluster(lease))) if lease.belongs_to(settings.lease) => {
                lease.retune(rule.quota, settings.lease, now);
                State::Cluster(Arc::clone(lease))
            }
            (Tier::Cluster, _) => {
                let lease = Lease::new(rule.quota, settings.lease, now)
                    .map_err(|source| RuleError::Lease { rule: rule.name.clone(), source })?;
                State::Cluster(Arc::new(lease))
            }
        })
    }
}

fn check(rules: &[Rule], weights: &[Weight]) -> Result<(), RuleError> {
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
    Ok(())
}

/// The GCRA of each class of a weighted rule, of the one class of a node rule; a lease has none.
fn classes(rule: &Rule, weights: &[Weight], lease: LeaseSettings) -> Result<Box<[Gcra]>, RuleError> {
    let weighted = |&weight| match rule.quota.weighted(weight) {
        Ok(quota) => Ok(Gcra::new(quota)),
        Err(source) => Err(RuleError::Weighted { rule: rule.name.clone(), weight, source }),
    };
    if rule.tier.is_weighted() {
        return weights.iter().map(weighted).collect();
    }
    if rule.tier == Tier::Cluster {
        Lease::check(rule.quota, lease).map_err(|source| RuleError::Lease { rule: rule.name.clone(), source })?;
    }
    Ok(Box::default())
}

/// The largest cost that every class can pay.
fn cost_max(rule: &Rule, classes: &[Gcra], lease: LeaseSettings) -> u32 {
    match rule.tier {
        Tier::Cluster => Lease::cost_max(rule.quota, lease),
        _ => classes.iter().map(|gcra| gcra.quota().burst().get()).min().unwrap_or(rule.quota.burst().get()),
    }
}

/// FNV-1a of a rule's name: the same on every node, so that all choose the same subjects.
fn salt(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Held {
    /// The key under which the rule counts this subject, if it applies to it at all.
    fn key(&self, subject: &Subject) -> Option<KeyHash> {
        let key = match self.rule.tier {
            Tier::User => subject.user?,
            Tier::Device | Tier::Node | Tier::Cluster => subject.device,
        };
        self.rule.percent.includes(key, self.salt).then_some(key)
    }

    fn peek(&self, key: KeyHash, class: Class, cost: Cost, now: Moment) -> Result<Room, Wait> {
        match &self.state {
            State::Keyed { table, classes } => table.peek(key, weighing(classes, class), cost, now),
            State::Node { cell, gcra } => cell.peek(gcra, cost, now),
            State::Cluster(lease) => lease.peek(cost, now),
        }
    }

    fn commit(&self, key: KeyHash, class: Class, cost: Cost, now: Moment) -> Result<Room, Wait> {
        match &self.state {
            State::Keyed { table, classes } => table.commit(key, weighing(classes, class), cost, now),
            State::Node { cell, gcra } => cell.commit(gcra, cost, now),
            State::Cluster(lease) => lease.commit(cost, now),
        }
    }

    fn refund(&self, key: KeyHash, class: Class, cost: Cost) {
        match &self.state {
            State::Keyed { table, classes } => table.refund(key, weighing(classes, class), cost),
            State::Node { cell, gcra } => cell.refund(gcra, cost),
            State::Cluster(lease) => lease.refund(cost),
        }
    }

    fn quota(&self, class: Class) -> Quota {
        match &self.state {
            State::Keyed { classes, .. } => weighing(classes, class).quota(),
            State::Node { .. } | State::Cluster(_) => self.rule.quota,
        }
    }

    fn bit(&self) -> u64 {
        1 << self.index
    }
}

fn weighing(classes: &[Gcra], class: Class) -> &Gcra {
    classes.get(usize::from(class.0)).unwrap_or(&classes[0])
}

/// The rules of one route, narrow before wide. It holds their state, so it decides by itself and
/// may outlive the limiter it came from.
#[derive(Clone, Debug)]
pub struct RuleSet {
    rules: Box<[Arc<Held>]>,
}

impl RuleSet {
    /// Refuses a cost that some rule, for its lightest class, could never admit.
    pub fn check_cost(&self, cost: Cost) -> Result<(), RuleError> {
        let cost = cost.tokens().get();
        match self.rules.iter().find(|held| held.cost_max < cost) {
            Some(held) => Err(RuleError::CostAboveBurst { rule: held.rule.name.clone(), cost, most: held.cost_max }),
            None => Ok(()),
        }
    }

    /// Whether no rule can apply.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Decides one request, and charges it if it may pass. It neither waits nor allocates.
    pub fn decide(&self, subject: &Subject, cost: Cost, now: Moment) -> Verdict {
        let peeked = self.peek(subject, cost, now);
        match peeked.denial {
            Some(denial) => Verdict::Denied(Denial { shadow_denied: peeked.shadow_denied, ..denial }),
            None => self.commit(subject, cost, now, peeked.shadow_denied),
        }
    }

    fn peek(&self, subject: &Subject, cost: Cost, now: Moment) -> Peeked {
        let mut peeked = Peeked { denial: None, shadow_denied: 0 };
        for held in &self.rules {
            let Some(key) = held.key(subject) else { continue };
            let Err(wait) = held.peek(key, subject.class, cost, now) else { continue };
            // Demand of the cluster is what the narrower tiers would have let through.
            if let (State::Cluster(lease), None) = (&held.state, &peeked.denial) {
                lease.turned_away(cost);
            }
            if held.rule.mode == Mode::Shadow {
                peeked.shadow_denied |= held.bit();
            } else if peeked.denial.is_none_or(|denial| denial.retry_after < wait.after) {
                peeked.denial = Some(denial(held, subject.class, wait));
            }
        }
        peeked
    }

    fn commit(&self, subject: &Subject, cost: Cost, now: Moment, mut shadow_denied: u64) -> Verdict {
        let mut report = Report::default();
        let mut charged = 0;
        for held in &self.rules {
            let Some(key) = held.key(subject) else { continue };
            if shadow_denied & held.bit() != 0 {
                continue;
            }
            match (held.commit(key, subject.class, cost, now), held.rule.mode) {
                (Ok(room), Mode::Enforce) => {
                    charged |= held.bit();
                    let quota = held.quota(subject.class);
                    report.note(held.rule.tier, Standing::with_room(held.index, quota, room));
                }
                (Ok(_), _) => charged |= held.bit(),
                (Err(wait), Mode::Enforce) => {
                    self.refund(subject, cost, charged);
                    let denial = denial(held, subject.class, wait);
                    return Verdict::Denied(Denial { shadow_denied, ..denial });
                }
                (Err(_), _) => shadow_denied |= held.bit(),
            }
        }
        report.shadow_denied = shadow_denied;
        Verdict::Allowed(report)
    }

    fn refund(&self, subject: &Subject, cost: Cost, charged: u64) {
        for held in self.rules.iter().rev().filter(|held| charged & held.bit() != 0) {
            if let Some(key) = held.key(subject) {
                held.refund(key, subject.class, cost);
            }
        }
    }
}

struct Peeked {
    denial: Option<Denial>,
    shadow_denied: u64,
}

fn denial(held: &Held, class: Class, wait: Wait) -> Denial {
    Denial {
        standing: Standing::with_wait(held.index, held.quota(class), wait),
        retry_after: wait.after,
        shadow_denied: 0,
    }
}
