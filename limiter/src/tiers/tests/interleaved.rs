//! Decisions of several threads, taken apart into their steps and mixed in every order: peeks, charges and refunds of
//! several subjects over the same rules.

use super::*;
use crate::tiers::held::Held;

/// One decision on its way, as [`RuleSet::decide`] goes it: all peeks, then all charges, then refunds in reverse.
struct Going<'a> {
    rules: &'a RuleSet,
    subject: Subject<'static>,
    cost: Cost,
    charged: Vec<usize>,
    next: Step,
}

#[derive(Clone, Copy)]
enum Step {
    Peek(usize),
    Commit(usize),
    Refund,
    Ended { admitted: bool },
}

impl Going<'_> {
    fn held(&self, position: usize) -> (&Held, Option<KeyHash>) {
        let held = &self.rules.rules[position];
        (held, held.key(&self.subject))
    }

    fn step(&mut self) {
        let (class, last) = (self.subject.class, self.rules.rules.len() - 1);
        self.next = match self.next {
            Step::Peek(position) => {
                let (held, key) = self.held(position);
                let room = key.is_none_or(|key| held.peek(key, class, self.cost, at(0)).is_ok());
                match (room, position == last) {
                    (false, _) => Step::Ended { admitted: false },
                    (true, false) => Step::Peek(position + 1),
                    (true, true) => Step::Commit(0),
                }
            }
            Step::Commit(position) => {
                let (held, key) = self.held(position);
                match key.map(|key| held.commit(key, class, self.cost, at(0))) {
                    Some(Err(_)) => Step::Refund,
                    outcome => {
                        self.charged.extend(outcome.map(|_| position));
                        if position == last { Step::Ended { admitted: true } } else { Step::Commit(position + 1) }
                    }
                }
            }
            Step::Refund => match self.charged.pop() {
                Some(position) => {
                    let (held, key) = self.held(position);
                    held.refund(key.expect("what was charged has a key"), class, self.cost);
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
    fn denied_requests_have_spent_nothing_once_all_have_ended(
        bursts in prop::array::uniform4(1u32..12),
        requests in prop::collection::vec((0u64..2, prop::option::of(0u64..2), 1u32..4), 2..9),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
    ) {
        let [device, user, node, cluster] = bursts;
        let limiter = four_tiers(device, user, node, cluster);
        let rules = limiter.rule_set(ALL).unwrap();
        let mut going: Vec<Going<'_>> = requests.iter().map(|&(device, user, tokens)| Going {
            rules: &rules,
            subject: subject(device, user),
            cost: cost(tokens),
            charged: Vec::new(),
            next: Step::Peek(0),
        }).collect();
        for index in order {
            let turn = index.index(going.len());
            going[turn].step();
        }
        for one in &mut going {
            while !matches!(one.next, Step::Ended { .. }) {
                one.step();
            }
        }
        let admitted = || requests.iter().zip(&going).filter(|(_, one)| matches!(one.next, Step::Ended { admitted: true }));
        let spent = |of: &dyn Fn(u64, Option<u64>) -> bool| -> u64 {
            admitted().filter(|((device, user, _), _)| of(*device, *user)).map(|((.., tokens), _)| u64::from(*tokens)).sum()
        };
        let anyone = subject(0, None);
        prop_assert_eq!(left(&limiter, "node", &anyone), u64::from(node) - spent(&|_, _| true));
        prop_assert_eq!(left(&limiter, "cluster", &anyone), u64::from(cluster) - spent(&|_, _| true));
        for who in 0..2 {
            let caller = subject(who, Some(who));
            prop_assert_eq!(left(&limiter, "device", &caller), u64::from(device) - spent(&|device, _| device == who));
            prop_assert_eq!(left(&limiter, "user", &caller), u64::from(user) - spent(&|_, user| user == Some(who)));
        }
    }
}
