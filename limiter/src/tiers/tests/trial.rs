//! Trials: what they change, when they end, and that a reload does not end them.

use super::*;

fn percent(value: u8) -> Percent {
    Percent::try_from(value).unwrap()
}

fn trial(mode: Mode, of: u8) -> Trial {
    Trial { mode, percent: percent(of) }
}

#[test]
fn a_trial_of_a_rule_that_is_not_there_is_refused() {
    let limiter = limiter(vec![]);
    assert_eq!(limiter.try_out("none", trial(Mode::Off, 100), at(1)), Err(RuleError::Unknown("none".to_owned())));
    assert_eq!(limiter.end_trial("none"), Err(RuleError::Unknown("none".to_owned())));
}

#[test]
fn a_trial_replaces_the_mode_until_it_ends() {
    let limiter = limiter(vec![Rule { mode: Mode::Off, ..rule("rule", Tier::Device, "1/h", 1) }]);
    let rules = limiter.rule_set(["rule"]).unwrap();
    let caller = subject(1, None);
    let votes = |millis| match rules.decide(&caller, Cost::ONE, at(millis)) {
        Verdict::Allowed(report) => report.votes,
        Verdict::Denied(denial) => denial.votes,
    };
    assert_eq!(votes(0), Votes::default());
    limiter.try_out("rule", trial(Mode::Shadow, 100), at(100)).unwrap();
    assert_eq!(votes(10), Votes { shadow_passed: 1, ..Votes::default() });
    assert_eq!(votes(20), Votes { shadow_denied: 1, ..Votes::default() });
    limiter.try_out("rule", trial(Mode::Enforce, 100), at(100)).unwrap();
    assert_eq!(votes(30), Votes { denied: 1, ..Votes::default() });
    limiter.try_out("rule", trial(Mode::Enforce, 0), at(100)).unwrap();
    assert_eq!(votes(40), Votes { excluded: 1, ..Votes::default() });
    limiter.try_out("rule", trial(Mode::Enforce, 100), at(100)).unwrap();
    assert_eq!(votes(99), Votes { denied: 1, ..Votes::default() });
    assert_eq!(votes(100), Votes::default(), "it ended by itself");
}

#[test]
fn trials_are_told_and_end_on_demand() {
    let limiter = limiter(vec![rule("a", Tier::Device, "1/h", 1), rule("b", Tier::Node, "1/h", 1)]);
    let running = |millis| limiter.trials(at(millis)).collect::<Vec<_>>();
    assert_eq!(running(0), []);
    limiter.try_out("b", trial(Mode::Shadow, 25), at(50)).unwrap();
    assert_eq!(running(0), [Running { rule: "b".into(), trial: trial(Mode::Shadow, 25), until: at(50) }]);
    assert_eq!(running(50), []);
    limiter.try_out("b", trial(Mode::Off, 100), at(5_000)).unwrap();
    limiter.end_trial("b").unwrap();
    assert_eq!(running(60), []);
}

#[test]
fn a_reload_keeps_a_running_trial_and_the_old_rule_sets_see_its_end() {
    let before = limiter(vec![rule("rule", Tier::Device, "1/h", 1)]);
    let rules = before.rule_set(["rule"]).unwrap();
    before.try_out("rule", trial(Mode::Off, 100), at(1_000)).unwrap();
    let after = before.rebuild(vec![rule("rule", Tier::Device, "1/h", 2)], &weights(), settings(), at(0)).unwrap();
    assert_eq!(after.trials(at(10)).count(), 1);
    allowed(rules.decide(&subject(1, None), Cost::ONE, at(10)));
    after.end_trial("rule").unwrap();
    allowed(rules.decide(&subject(1, None), Cost::ONE, at(20)));
    denied(rules.decide(&subject(1, None), Cost::ONE, at(30)));
}

#[test]
fn a_trial_takes_a_stable_share_of_subjects() {
    let limiter = limiter(vec![Rule { mode: Mode::Off, ..rule("rule", Tier::User, "1/d", 1) }]);
    let rules = limiter.rule_set(["rule"]).unwrap();
    let chosen = |of: u8| -> Vec<u64> {
        limiter.try_out("rule", trial(Mode::Shadow, of), at(1_000)).unwrap();
        let is_in = |user: &u64| {
            let report = allowed(rules.decide(&subject(1, Some(*user)), Cost::ONE, at(0)));
            assert_eq!((report.votes.applied() | report.votes.excluded).count_ones(), 1);
            report.votes.applied() != 0
        };
        (0..700).filter(is_in).collect()
    };
    let (ten, thirty) = (chosen(10), chosen(30));
    assert!((40..100).contains(&ten.len()) && (170..250).contains(&thirty.len()), "{} {}", ten.len(), thirty.len());
    assert!(ten.iter().all(|user| thirty.contains(user)));
    assert_eq!(chosen(10), ten);
}

#[test]
fn a_lease_is_in_use_while_a_trial_switches_it_on() {
    let limiter = limiter(vec![Rule { mode: Mode::Off, ..rule("cluster", Tier::Cluster, "1/s", 5) }]);
    assert_eq!(limiter.leases().count(), 0);
    limiter.try_out("cluster", trial(Mode::Shadow, 100), at(1_000)).unwrap();
    assert_eq!(limiter.leases().count(), 1);
    limiter.end_trial("cluster").unwrap();
    assert_eq!(limiter.leases().count(), 0);
}
