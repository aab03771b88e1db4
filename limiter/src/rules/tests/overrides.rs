//! Overrides: what they change, when they end, and that a reload does not end them.

use super::*;

fn percent(value: u8) -> Percent {
    Percent::try_from(value).unwrap()
}

fn override_of(mode: Mode, of: u8) -> Override {
    Override { mode, percent: percent(of) }
}

#[test]
fn an_override_of_an_unknown_rule_is_rejected() {
    let limiter = limiter(vec![]);
    assert_eq!(
        limiter.set_override("none", override_of(Mode::Off, 100), at(1)),
        Err(RuleError::Unknown("none".to_owned()))
    );
    assert_eq!(limiter.clear_override("none"), Err(RuleError::Unknown("none".to_owned())));
}

#[test]
fn an_override_replaces_the_mode_until_it_ends() {
    let limiter = limiter(vec![Rule { mode: Mode::Off, ..rule("rule", Scope::Device, "1/h", 1) }]);
    let rules = limiter.rule_set(["rule"]).unwrap();
    let caller = subject(1, None);
    let evaluations = |millis| match rules.decide(&caller, Cost::ONE, at(millis)) {
        Verdict::Allowed(admission) => admission.evaluations,
        Verdict::Denied(denial) => denial.evaluations,
    };
    assert_eq!(evaluations(0), Evaluations::default());
    limiter.set_override("rule", override_of(Mode::Shadow, 100), at(100)).unwrap();
    assert_eq!(evaluations(10), Evaluations { shadow_passed: 1, ..Evaluations::default() });
    assert_eq!(evaluations(20), Evaluations { shadow_denied: 1, ..Evaluations::default() });
    limiter.set_override("rule", override_of(Mode::Enforce, 100), at(100)).unwrap();
    assert_eq!(evaluations(30), Evaluations { denied: 1, ..Evaluations::default() });
    limiter.set_override("rule", override_of(Mode::Enforce, 0), at(100)).unwrap();
    assert_eq!(evaluations(40), Evaluations { holdout: 1, ..Evaluations::default() });
    limiter.set_override("rule", override_of(Mode::Enforce, 100), at(100)).unwrap();
    assert_eq!(evaluations(99), Evaluations { denied: 1, ..Evaluations::default() });
    assert_eq!(evaluations(100), Evaluations::default(), "it has ended");
}

#[test]
fn active_overrides_are_listed_and_can_be_cleared() {
    let limiter = limiter(vec![rule("a", Scope::Device, "1/h", 1), rule("b", Scope::Node, "1/h", 1)]);
    let active = |millis| limiter.active_overrides(at(millis)).collect::<Vec<_>>();
    assert_eq!(active(0), []);
    limiter.set_override("b", override_of(Mode::Shadow, 25), at(50)).unwrap();
    assert_eq!(
        active(0),
        [ActiveOverride { rule: "b".into(), rule_override: override_of(Mode::Shadow, 25), ends_at: at(50) }]
    );
    assert_eq!(active(50), []);
    limiter.set_override("b", override_of(Mode::Off, 100), at(5_000)).unwrap();
    limiter.clear_override("b").unwrap();
    assert_eq!(active(60), []);
}

#[test]
fn a_reload_keeps_an_active_override_and_old_rule_sets_see_it_cleared() {
    let before = limiter(vec![rule("rule", Scope::Device, "1/h", 1)]);
    let rules = before.rule_set(["rule"]).unwrap();
    before.set_override("rule", override_of(Mode::Off, 100), at(1_000)).unwrap();
    let after = before.rebuild(vec![rule("rule", Scope::Device, "1/h", 2)], &weights(), config(), at(0)).unwrap();
    assert_eq!(after.active_overrides(at(10)).count(), 1);
    allowed(rules.decide(&subject(1, None), Cost::ONE, at(10)));
    after.clear_override("rule").unwrap();
    allowed(rules.decide(&subject(1, None), Cost::ONE, at(20)));
    denied(rules.decide(&subject(1, None), Cost::ONE, at(30)));
}

#[test]
fn an_override_selects_a_stable_percentage_of_subjects() {
    let limiter = limiter(vec![Rule { mode: Mode::Off, ..rule("rule", Scope::User, "1/d", 1) }]);
    let rules = limiter.rule_set(["rule"]).unwrap();
    let chosen = |of: u8| -> Vec<u64> {
        limiter.set_override("rule", override_of(Mode::Shadow, of), at(1_000)).unwrap();
        let is_in = |user: &u64| {
            let admission = allowed(rules.decide(&subject(1, Some(*user)), Cost::ONE, at(0)));
            assert_eq!((admission.evaluations.evaluated() | admission.evaluations.holdout).count_ones(), 1);
            admission.evaluations.evaluated() != 0
        };
        (0..700).filter(is_in).collect()
    };
    let (ten, thirty) = (chosen(10), chosen(30));
    assert!((40..100).contains(&ten.len()) && (170..250).contains(&thirty.len()), "{} {}", ten.len(), thirty.len());
    assert!(ten.iter().all(|user| thirty.contains(user)));
    assert_eq!(chosen(10), ten);
}

#[test]
fn a_lease_is_in_use_while_an_override_enables_its_rule() {
    let limiter = limiter(vec![Rule { mode: Mode::Off, ..rule("cluster", Scope::Cluster, "1/s", 5) }]);
    assert_eq!(limiter.leases().count(), 0);
    limiter.set_override("cluster", override_of(Mode::Shadow, 100), at(1_000)).unwrap();
    assert_eq!(limiter.leases().count(), 1);
    limiter.clear_override("cluster").unwrap();
    assert_eq!(limiter.leases().count(), 0);
}
