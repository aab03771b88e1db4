//! Owns [`Explanation`]: how each rule would treat a subject, and why.
//!
//! Refuses to charge anything. Invariant: what is explained is what a decision at the same moment would find.

use std::sync::Arc;
use std::time::Duration;

use super::denials::LastDenial;
use super::held::Held;
use super::rule::Tier;
use super::trial::Trial;
use super::{Limiter, Subject};
use crate::bucket::{Room, Wait};
use crate::clock::Moment;
use crate::quota::{Mode, Percent, Quota};

/// How one rule would treat a subject's request at a cost of one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The rule's index in its limiter.
    pub rule: usize,
    pub name: Arc<str>,
    pub tier: Tier,
    /// In effect: the trial's, or the configured one.
    pub mode: Mode,
    pub percent: Percent,
    /// When the trial ends that mode and percentage are from; absent: they are the configured ones.
    pub until: Option<Moment>,
    /// Whether the subject has what the rule counts by.
    pub has_key: bool,
    /// Whether the subject is within the percentage.
    pub is_included: bool,
    /// The quota in effect for the subject's class.
    pub quota: Quota,
    /// Whole tokens the subject may spend at once; of a cluster rule, those this node holds.
    pub remaining: u64,
    /// The time until all of the burst is back.
    pub reset: Duration,
    /// Until one token may be spent; zero: now.
    pub wait: Duration,
    /// Whole tokens this class leaves to others.
    pub reserve: u64,
    /// When the subject was last denied, if it was by this rule and is remembered.
    pub last_denial: Option<LastDenial>,
}

impl Limiter {
    /// How each rule would treat this subject now, in the order of the rules; charges nothing.
    pub fn explain(&self, subject: &Subject<'_>, now: Moment) -> Vec<Explanation> {
        self.rules.iter().map(|held| self.explain_one(held, subject, now)).collect()
    }

    fn explain_one(&self, held: &Held, subject: &Subject<'_>, now: Moment) -> Explanation {
        let Trial { mode, percent } = held.in_effect(now);
        let key = held.key(subject);
        let quota = held.quota(subject.class);
        let (remaining, reset, wait) = match key.map(|key| held.standing(key, subject.class, now)) {
            Some(Ok(Room { remaining, reset })) => (remaining, reset, Duration::ZERO),
            Some(Err(Wait { after, remaining, reset })) => (remaining, reset, after),
            None => (u64::from(quota.burst().get()), Duration::ZERO, Duration::ZERO),
        };
        Explanation {
            rule: held.index,
            name: held.rule.name.clone(),
            tier: held.rule.tier,
            mode,
            percent,
            until: held.switch.running(now).map(|(_, until)| until),
            has_key: key.is_some(),
            is_included: key.is_some_and(|key| percent.includes(key, held.salt)),
            quota,
            remaining,
            reset,
            wait,
            reserve: held.reserve(subject.class),
            last_denial: self.denials.last(subject, held.salt),
        }
    }
}
