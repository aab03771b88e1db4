//! Rules of scope key: absent keys, then present ones, and charges after the response.

use super::*;

fn keyed(name: &str, index: u8, burst: u32) -> Rule {
    Rule { key: Some(KeyIndex(index)), ..rule(name, Scope::Key, "1/h", burst) }
}

fn with_keys<'a>(keys: &'a [Option<KeyHash>], caller: &Subject<'_>) -> Subject<'a> {
    Subject { device: caller.device, user: caller.user, class: caller.class, keys }
}

#[test]
fn only_a_key_rule_names_a_key() {
    let build = |rule| Limiter::new(vec![rule], &weights(), config(), at(0)).unwrap_err().to_string();
    assert_eq!(build(rule("api", Scope::Key, "1/h", 1)), "rule `api` has the scope key but does not name its key");
    let device = Rule { key: Some(KeyIndex(0)), ..rule("device", Scope::Device, "1/h", 1) };
    assert_eq!(build(device), "rule `device` names a key but does not have the scope key");
}

#[test]
fn a_rule_whose_key_is_absent_does_not_apply() {
    let limiter = limiter(vec![keyed("second", 1, 1)]);
    let rules = limiter.rule_set(["second"]).unwrap();
    let key = [Some(KeyHash(5)), None];
    for absent in [&[][..], &key[..1], &key] {
        for _ in 0..3 {
            let admission = allowed(rules.decide(&with_keys(absent, &subject(1, None)), Cost::ONE, at(0)));
            assert_eq!(admission.evaluations, Evaluations::default());
        }
    }
}

#[test]
fn each_key_rule_counts_by_its_own_key_with_the_subjects_weight() {
    let limiter = limiter(vec![keyed("first", 0, 10), keyed("second", 1, 15)]);
    let rules = limiter.rule_set(["second", "first"]).unwrap();
    let keys = [Some(KeyHash(5)), Some(KeyHash(5))];
    let gold = Subject { class: UserClass(1), ..with_keys(&keys, &subject(1, None)) };
    // Weight 2: the first admits twenty, the second thirty.
    let passed = (0..50).filter(|_| rules.decide(&gold, Cost::ONE, at(0)).is_allowed()).count();
    assert_eq!(passed, 20);
    let other = [Some(KeyHash(6)), Some(KeyHash(5))];
    let denial = (0..50).find_map(|_| match rules.decide(&with_keys(&other, &gold), Cost::ONE, at(0)) {
        Verdict::Denied(denial) => Some(denial.evaluations.denied),
        Verdict::Allowed(_) => None,
    });
    assert_eq!(denial, Some(0b10), "ten are left in the second rule, fewer than the other key's twenty in the first");
}

#[test]
fn a_key_rule_is_decided_between_user_and_node() {
    let rules = vec![rule("node", Scope::Node, "1/h", 9), keyed("key", 0, 9), rule("user", Scope::User, "1/h", 9)];
    let rules = limiter(rules).rule_set(["node", "key", "user"]).unwrap();
    let order: Vec<_> = rules.rules.iter().map(|state| state.rule.scope).collect();
    assert_eq!(order, [Scope::User, Scope::Key, Scope::Node]);
}

#[test]
fn a_reload_keeps_the_state_of_a_key_rule_only_for_the_same_key() {
    let before = limiter(vec![keyed("a", 0, 5), keyed("b", 0, 5)]);
    let keys = [Some(KeyHash(7)), Some(KeyHash(7))];
    let caller = with_keys(&keys, &subject(1, None));
    for name in ["a", "b"] {
        allowed(before.rule_set([name]).unwrap().decide(&caller, cost(5), at(0)));
    }
    let after = before.rebuild(vec![keyed("a", 0, 8), keyed("b", 1, 8)], &weights(), config(), at(0)).unwrap();
    assert_eq!((left(&after, "a", &caller), left(&after, "b", &caller)), (3, 8));
}

#[test]
fn a_rule_may_have_its_own_number_of_keys() {
    let few = Rule { keys: NonZeroUsize::new(7), ..rule("few", Scope::Device, "1/h", 1) };
    let limiter = limiter(vec![few, rule("many", Scope::Device, "1/h", 1)]);
    let capacity = |name| match &limiter.rule_set([name]).unwrap().rules[0].counter {
        RuleCounter::Keyed { table, .. } => table.capacity(),
        _ => unreachable!("device rules are keyed"),
    };
    assert_eq!((capacity("few"), capacity("many")), (7, 1_001));
}

#[test]
fn a_reload_with_another_number_of_keys_keeps_backlogs() {
    let before = limiter(vec![rule("device", Scope::Device, "1/h", 5)]);
    let caller = subject(1, None);
    allowed(before.rule_set(["device"]).unwrap().decide(&caller, cost(5), at(0)));
    for keys in [7, 100_000] {
        let resized = Rule { keys: NonZeroUsize::new(keys), ..rule("device", Scope::Device, "1/h", 8) };
        let after = before.rebuild(vec![resized], &weights(), config(), at(0)).unwrap();
        assert_eq!(left(&after, "device", &caller), 3, "{keys}");
    }
}

#[test]
fn too_many_keys_are_rejected() {
    let vast = Rule { keys: NonZeroUsize::new(usize::MAX), ..rule("device", Scope::Device, "1/h", 1) };
    let error = Limiter::new(vec![vast], &weights(), config(), at(0)).unwrap_err();
    assert!(matches!(error, RuleError::TooManyKeys { keys: usize::MAX, .. }), "{error}");
}

/// Enforced, shadow, node and cluster rules each lose what they have, and no backlog exceeds a
/// burst.
#[test]
fn a_charge_after_the_response_takes_at_most_what_is_left() {
    let mut shadow = rule("user", Scope::User, "1/s", 4);
    shadow.mode = Mode::Shadow;
    let off = Rule { mode: Mode::Off, ..rule("off", Scope::Device, "1/s", 4) };
    let limiter = limiter(vec![
        rule("device", Scope::Device, "1/s", 10),
        shadow,
        rule("node", Scope::Node, "1/s", 7),
        rule("cluster", Scope::Cluster, "1/s", 6),
        off,
    ]);
    let rules = limiter.rule_set(["device", "user", "node", "cluster", "off"]).unwrap();
    let caller = subject(1, Some(2));
    rules.charge(&caller, cost(3), at(0));
    let left = |name| left(&limiter, name, &caller);
    assert_eq!(["device", "user", "node", "cluster", "off"].map(left), [7, 1, 4, 3, 4]);
    rules.charge(&caller, cost(1_000_000), at(0));
    assert_eq!(["device", "user", "node", "cluster", "off"].map(left), [0, 0, 0, 0, 4]);
    let denial = denied(rules.decide(&caller, Cost::ONE, at(0)));
    assert_eq!(denial.retry_after, Duration::from_secs(1), "a backlog of one burst, not of a million");
    assert_eq!(denial.evaluations, Evaluations { denied: 0b1101, shadow_denied: 0b0010, ..Evaluations::default() });
    rules.charge(&caller, cost(u32::MAX), at(500));
    assert_eq!(
        denied(rules.decide(&caller, cost(10), at(500))).retry_after,
        Duration::MAX,
        "the node's burst is seven"
    );
}
