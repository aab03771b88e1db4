//! Owns one rule with its state: whom it applies to, and how each kind of state is asked.
//!
//! Refuses to know of other rules. Invariant: the state, the trial with it, outlives the rule on a reload.

use std::sync::Arc;
use std::time::Duration;

use super::rule::{Checked, Class, Rule, RuleError, Tier};
use super::trial::{Switch, Trial};
use super::{LimiterSettings, Subject};
use crate::bucket::{Cell, Gcra, Room, Table, Wait};
use crate::clock::Moment;
use crate::lease::Lease;
use crate::quota::{Cost, Fraction, KeyHash, Mode, Quota};

/// A rule with its state.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) index: usize,
    /// Its bit in the masks of a verdict.
    pub(super) bit: u64,
    pub(super) rule: Rule,
    pub(super) salt: u64,
    pub(super) costs_max: Box<[u32]>,
    pub(super) switch: Arc<Switch>,
    pub(super) state: State,
}

#[derive(Clone, Debug)]
pub(super) enum State {
    Keyed { table: Arc<Table>, classes: Box<[Gcra]> },
    Node { cell: Arc<Cell>, classes: Box<[Gcra]> },
    Cluster { lease: Arc<Lease>, reserves: Box<[Fraction]> },
}

/// How a rule treats one subject at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arm {
    /// The key the rule counts the subject by.
    Enforced(KeyHash),
    Shadow(KeyHash),
    /// The rule's percentage leaves the subject out.
    Excluded,
    /// The rule is off, or the subject has nothing it counts by.
    Absent,
}

impl Held {
    pub(super) fn build(
        index: usize,
        kept: Option<&Held>,
        checked: Checked,
        settings: LimiterSettings,
        now: Moment,
    ) -> Result<Held, RuleError> {
        let Checked { rule, gcras, reserves, costs_max } = checked;
        let switch = kept.map(|held| Arc::clone(&held.switch)).unwrap_or_default();
        let state = match (rule.tier, kept.map(|held| &held.state)) {
            (Tier::Node, Some(State::Node { cell, .. })) => State::Node { cell: Arc::clone(cell), classes: gcras },
            (Tier::Node, _) => State::Node { cell: Arc::default(), classes: gcras },
            (Tier::Cluster, Some(State::Cluster { lease, .. })) if lease.belongs_to(settings.lease) => {
                lease.retune(rule.quota, settings.lease, now);
                State::Cluster { lease: Arc::clone(lease), reserves }
            }
            (Tier::Cluster, _) => {
                let lease = Lease::new(rule.quota, settings.lease, now)
                    .map_err(|source| RuleError::Lease { rule: rule.name.clone(), source })?;
                State::Cluster { lease: Arc::new(lease), reserves }
            }
            (Tier::Device | Tier::User | Tier::Key, Some(State::Keyed { table, .. }))
                if table.fits(rule.keys(settings)) =>
            {
                State::Keyed { table: Arc::clone(table), classes: gcras }
            }
            (Tier::Device | Tier::User | Tier::Key, kept) => {
                let table = match kept {
                    Some(State::Keyed { table, .. }) => table.resized(rule.keys(settings), now),
                    _ => Table::new(rule.keys(settings)),
                };
                State::Keyed { table: Arc::new(table), classes: gcras }
            }
        };
        Ok(Held { index, bit: 1 << index, salt: salt(&rule.name), rule, costs_max, switch, state })
    }

    /// Whether it may apply to anybody, by its own mode or by that of a trial, even one that has ended.
    pub(super) fn is_in_use(&self) -> bool {
        self.rule.mode != Mode::Off || self.switch.get().is_some_and(|(trial, _)| trial.mode != Mode::Off)
    }

    /// Mode and percentage in effect.
    pub(super) fn in_effect(&self, now: Moment) -> Trial {
        match self.switch.running(now) {
            None => Trial { mode: self.rule.mode, percent: self.rule.percent },
            Some((trial, _)) => trial,
        }
    }

    /// The key under which the rule counts this subject, if it has one.
    pub(super) fn key(&self, subject: &Subject<'_>) -> Option<KeyHash> {
        match self.rule.tier {
            Tier::Device | Tier::Node | Tier::Cluster => Some(subject.device),
            Tier::User => subject.user,
            Tier::Key => *subject.keys.get(usize::from(self.rule.key?.0))?,
        }
    }

    /// Inlined into both loops of a decision: a call cost 13 instructions a rule.
    #[inline(always)]
    pub(super) fn arm(&self, subject: &Subject<'_>, now: Moment) -> Arm {
        let Trial { mode, percent } = self.in_effect(now);
        if mode == Mode::Off {
            return Arm::Absent;
        }
        match self.key(subject) {
            None => Arm::Absent,
            Some(key) if !percent.includes(key, self.salt) => Arm::Excluded,
            Some(key) if mode == Mode::Shadow => Arm::Shadow(key),
            Some(key) => Arm::Enforced(key),
        }
    }

    pub(super) fn peek(&self, key: KeyHash, class: Class, cost: Cost, now: Moment) -> Result<Room, Wait> {
        match &self.state {
            State::Keyed { table, classes } => table.peek(key, of(classes, class), cost, now),
            State::Node { cell, classes } => cell.peek(of(classes, class), cost, now),
            State::Cluster { lease, reserves } => lease.peek(cost, *of(reserves, class), now),
        }
    }

    /// What there is to spend, if that is a token; else what a peek at one answers.
    pub(super) fn standing(&self, key: KeyHash, class: Class, now: Moment) -> Result<Room, Wait> {
        let Room { remaining, reset } = self.peek(key, class, Cost::ONE, now)?;
        Ok(match &self.state {
            State::Cluster { lease, reserves } => lease.standing(*of(reserves, class), now),
            // A peek tells what would be left after the token.
            State::Keyed { classes, .. } | State::Node { classes, .. } => {
                let token = Duration::from_nanos(of(classes, class).quota().rate().interval_nanos());
                Room { remaining: remaining + 1, reset: reset.saturating_sub(token) }
            }
        })
    }

    pub(super) fn commit(&self, key: KeyHash, class: Class, cost: Cost, now: Moment) -> Result<Room, Wait> {
        match &self.state {
            State::Keyed { table, classes } => table.commit(key, of(classes, class), cost, now),
            State::Node { cell, classes } => cell.commit(of(classes, class), cost, now),
            State::Cluster { lease, reserves } => lease.commit(cost, *of(reserves, class), now),
        }
    }

    pub(super) fn refund(&self, key: KeyHash, class: Class, cost: Cost) {
        match &self.state {
            State::Keyed { table, classes } => table.refund(key, of(classes, class), cost),
            State::Node { cell, classes } => cell.refund(of(classes, class), cost),
            State::Cluster { lease, .. } => lease.refund(cost),
        }
    }

    pub(super) fn charge(&self, key: KeyHash, class: Class, cost: Cost, now: Moment) {
        match &self.state {
            State::Keyed { table, classes } => table.charge(key, of(classes, class), cost, now),
            State::Node { cell, classes } => cell.charge(of(classes, class), cost, now),
            State::Cluster { lease, reserves } => lease.charge(cost, *of(reserves, class), now),
        }
    }

    /// Counts a request denied on a peek here and nowhere narrower, where the rule lives on demand.
    pub(super) fn turned_away(&self, class: Class, cost: Cost) {
        if let State::Cluster { lease, reserves } = &self.state {
            lease.turned_away(cost, *of(reserves, class));
        }
    }

    /// Whole tokens the class leaves to others.
    pub(super) fn reserve(&self, class: Class) -> u64 {
        match &self.state {
            State::Keyed { .. } => 0,
            State::Node { classes, .. } => {
                let gcra = of(classes, class);
                u64::from(gcra.quota().burst().get() - gcra.spendable().get())
            }
            State::Cluster { lease, reserves } => lease.reserve(*of(reserves, class)),
        }
    }

    pub(super) fn quota(&self, class: Class) -> Quota {
        match &self.state {
            State::Keyed { classes, .. } => of(classes, class).quota(),
            State::Node { .. } | State::Cluster { .. } => self.rule.quota,
        }
    }
}

/// What belongs to a class; one that is not configured is treated as the first.
fn of<T>(classes: &[T], class: Class) -> &T {
    classes.get(usize::from(class.0)).unwrap_or(&classes[0])
}

/// FNV-1a of a rule's name: the same on every node, so that all choose the same subjects.
fn salt(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
