//! Decisions of several threads, split into steps that run in random order: peeks, charges and
//! refunds of several subjects over the same rules.

use super::*;
use crate::rules::rule_state::RuleState;

/// A decision in progress, with the steps of [`RuleSet::decide`]: all peeks, then all charges, then
/// refunds in reverse order.
struct PartialDecision<'a> {
    rules: &'a RuleSet,
    subject: Subject<'static>,
    cost: Cost,
    charged: Vec<usize>,
    next: Step,
}

/// The next step of a decision: a peek or a charge of the rule at this position, a refund, or none
/// because the decision has ended.
#[derive(Clone, Copy)]
enum Step {
    Peek(usize),
    Commit(usize),
    Refund,
    Ended { admitted: bool },
}

impl PartialDecision<'_> {
    fn rule(&self, position: usize) -> (&RuleState, Option<KeyHash>) {
        let state = &self.rules.rules[position];
        (state, state.key(&self.subject))
    }

    fn step(&mut self) {
        let (subject, last) = (self.subject, self.rules.rules.len() - 1);
        let request = LimitRequest { subject: &subject, cost: self.cost, now: at(0) };
        self.next = match self.next {
            Step::Peek(position) => {
                let (state, key) = self.rule(position);
                let is_allowed = key.is_none_or(|key| state.peek(key, &request).is_ok());
                match (is_allowed, position == last) {
                    (false, _) => Step::Ended { admitted: false },
                    (true, false) => Step::Peek(position + 1),
                    (true, true) => Step::Commit(0),
                }
            }
            Step::Commit(position) => {
                let (state, key) = self.rule(position);
                match key.map(|key| state.commit(key, &request)) {
                    Some(Err(_)) => Step::Refund,
                    outcome => {
                        self.charged.extend(outcome.map(|_| position));
                        if position == last { Step::Ended { admitted: true } } else { Step::Commit(position + 1) }
                    }
                }
            }
            Step::Refund => match self.charged.pop() {
                Some(position) => {
                    let (state, key) = self.rule(position);
                    state.refund(key.expect("a charged rule has a key"), &request);
                    Step::Refund
                }
                None => Step::Ended { admitted: false },
            },
            ended => ended,
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn denied_requests_have_spent_nothing_once_all_decisions_have_ended(
        bursts in prop::array::uniform4(1u32..12),
        requests in prop::collection::vec((0u64..2, prop::option::of(0u64..2), 1u32..4), 2..9),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
    ) {
        let [device, user, node, cluster] = bursts;
        let limiter = four_rules(device, user, node, cluster);
        let rules = limiter.rule_set(ALL).unwrap();
        let mut decisions: Vec<PartialDecision<'_>> = requests.iter().map(|&(device, user, tokens)| PartialDecision {
            rules: &rules,
            subject: subject(device, user),
            cost: cost(tokens),
            charged: Vec::new(),
            next: Step::Peek(0),
        }).collect();
        for index in order {
            let turn = index.index(decisions.len());
            decisions[turn].step();
        }
        for decision in &mut decisions {
            while !matches!(decision.next, Step::Ended { .. }) {
                decision.step();
            }
        }
        let is_admitted = |decision: &PartialDecision<'_>| matches!(decision.next, Step::Ended { admitted: true });
        let admitted = || requests.iter().zip(&decisions).filter(|(_, decision)| is_admitted(decision));
        let spent = |counts: &dyn Fn(u64, Option<u64>) -> bool| -> u64 {
            let counted = admitted().filter(|((device, user, _), _)| counts(*device, *user));
            counted.map(|((.., tokens), _)| u64::from(*tokens)).sum()
        };
        let unidentified = subject(0, None);
        prop_assert_eq!(left(&limiter, "node", &unidentified), u64::from(node) - spent(&|_, _| true));
        prop_assert_eq!(left(&limiter, "cluster", &unidentified), u64::from(cluster) - spent(&|_, _| true));
        for id in 0..2 {
            let caller = subject(id, Some(id));
            prop_assert_eq!(left(&limiter, "device", &caller), u64::from(device) - spent(&|device, _| device == id));
            prop_assert_eq!(left(&limiter, "user", &caller), u64::from(user) - spent(&|_, user| user == Some(id)));
        }
    }
}
