//! Owns the decision: whether a request passes the rules of its route.
//!
//! Refuses to charge a request that does not pass: every rule is peeked first, narrow before wide, and only when all
//! agree are they charged in that order; where another thread took the last token in between, what was charged is
//! refunded in reverse. Invariant: once every decision has ended, a request denied by one rule has spent nothing in
//! another. Which rules apply is settled once per decision, so a trial that begins or ends in between cannot make a
//! rule charge what it did not look at, or refund what it did not charge.

use std::sync::Arc;

use super::Subject;
use super::denials::Denials;
use super::held::{Arm, Held};
use super::rule::RuleError;
use super::verdict::{Denial, Report, Standing, Verdict, Votes};
use crate::bucket::Wait;
use crate::clock::Moment;
use crate::quota::Cost;

/// The rules of one route, narrow before wide. It holds their state, so it decides by itself and may outlive the
/// limiter it came from.
#[derive(Clone, Debug)]
pub struct RuleSet {
    pub(super) rules: Box<[Arc<Held>]>,
    denials: Arc<Denials>,
}

impl RuleSet {
    pub(super) fn new(rules: Box<[Arc<Held>]>, denials: Arc<Denials>) -> RuleSet {
        RuleSet { rules, denials }
    }

    /// Refuses a cost that some rule could never admit for some class, because of its burst or its reserve.
    pub fn check_cost(&self, cost: Cost) -> Result<(), RuleError> {
        let cost = cost.tokens().get();
        for held in &self.rules {
            if let Some(class) = held.costs_max.iter().position(|&most| most < cost) {
                let most = held.costs_max[class];
                return Err(RuleError::CostAboveBurst { rule: held.rule.name.clone(), class, cost, most });
            }
        }
        Ok(())
    }

    /// Whether no rule can ever apply. One that is off counts: a trial may switch it on.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Decides one request, and charges it if it may pass. It neither waits nor allocates.
    pub fn decide(&self, subject: &Subject<'_>, cost: Cost, now: Moment) -> Verdict {
        let mut votes = Votes::default();
        // A charge to one rule is atomic by itself, and needs nobody's agreement.
        if let [only] = &*self.rules {
            votes.take(only.bit, only.arm(subject, now));
        } else if let Some((held, wait)) = self.peek(subject, cost, now, &mut votes) {
            return self.deny(held, subject, wait, votes, now);
        }
        self.commit(subject, cost, now, votes)
    }

    /// Charges a request that was answered already, such as a failed login that is to cost more: enforced and shadow
    /// rules that apply lose `cost`, or what they have left of their burst. It never denies, and nobody owes more than
    /// a whole burst; the next decision finds what is left. A lease gives what this node holds.
    pub fn charge(&self, subject: &Subject<'_>, cost: Cost, now: Moment) {
        for held in &self.rules {
            if let Arm::Enforced(key) | Arm::Shadow(key) = held.arm(subject, now) {
                held.charge(key, subject.class, cost, now);
            }
        }
    }

    /// The enforced rule that denies for longest, if any; `votes` learn of every rule.
    fn peek(&self, subject: &Subject<'_>, cost: Cost, now: Moment, votes: &mut Votes) -> Option<(&Held, Wait)> {
        let mut longest: Option<(&Held, Wait)> = None;
        for held in &self.rules {
            let arm = held.arm(subject, now);
            votes.take(held.bit, arm);
            let (Arm::Enforced(key) | Arm::Shadow(key)) = arm else { continue };
            let Err(wait) = held.peek(key, subject.class, cost, now) else { continue };
            votes.deny(held.bit);
            // Demand of the cluster is what the narrower tiers would have let through.
            if longest.is_none() {
                held.turned_away(subject.class, cost);
            }
            let is_enforced = matches!(arm, Arm::Enforced(_));
            if is_enforced && longest.as_ref().is_none_or(|(_, longest)| longest.after < wait.after) {
                longest = Some((held, wait));
            }
        }
        longest
    }

    fn commit(&self, subject: &Subject<'_>, cost: Cost, now: Moment, mut votes: Votes) -> Verdict {
        let mut report = Report::new(subject.class);
        let mut charged = 0;
        for held in &self.rules {
            if !votes.has_passed(held.bit) {
                continue;
            }
            let Some(key) = held.key(subject) else { continue };
            match held.commit(key, subject.class, cost, now) {
                Ok(room) => {
                    charged |= held.bit;
                    if votes.passed & held.bit != 0 {
                        let quota = held.quota(subject.class);
                        report.note(Standing::with_room(held.index, quota, room));
                    }
                }
                Err(wait) => {
                    votes.deny(held.bit);
                    if votes.denied != 0 {
                        self.refund(subject, cost, charged);
                        return self.deny(held, subject, wait, votes, now);
                    }
                }
            }
        }
        report.votes = votes;
        Verdict::Allowed(report)
    }

    fn refund(&self, subject: &Subject<'_>, cost: Cost, charged: u64) {
        for held in self.rules.iter().rev().filter(|held| charged & held.bit != 0) {
            if let Some(key) = held.key(subject) {
                held.refund(key, subject.class, cost);
            }
        }
    }

    fn deny(&self, held: &Held, subject: &Subject<'_>, wait: Wait, votes: Votes, now: Moment) -> Verdict {
        self.denials.note(subject, held.salt, wait.after, now);
        Verdict::Denied(Denial {
            standing: Standing::with_wait(held.index, held.quota(subject.class), wait),
            retry_after: wait.after,
            votes,
            class: subject.class,
        })
    }
}
