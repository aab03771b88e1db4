//! Explanations: they equal what a decision finds, and they change nothing.

use super::*;

#[test]
fn explain_covers_every_rule_and_charges_nothing() {
    let reserve = [0.5, 0.25, 0.0].map(|part| Fraction::try_from(part).unwrap());
    let mut node = rule("node", Scope::Node, "10/s", 10);
    node.reserve = reserve.into();
    let user =
        Rule { mode: Mode::Shadow, percent: Percent::try_from(0).unwrap(), ..rule("user", Scope::User, "1/s", 5) };
    let limiter = limiter(vec![node, rule("device", Scope::Device, "10/s", 10), user]);
    let rules = limiter.rule_set(["node", "device"]).unwrap();
    let gold = Subject { class: UserClass(1), ..subject(1, Some(2)) };
    allowed(rules.decide(&gold, cost(4), at(0)));
    let explanations = limiter.explain(&gold, at(100));
    assert_eq!(explanations, limiter.explain(&gold, at(100)));
    let [node, device, user] = &explanations[..] else { panic!("{explanations:?}") };
    // Of ten tokens, four were spent and one was refilled; three are the reserve.
    assert_eq!((node.remaining, node.reserve, node.reset), (4, 3, Duration::from_millis(300)));
    assert_eq!((node.quota, node.wait), (quota("10/s", 10), Duration::ZERO));
    // Weight 2: 16 of 20 were left, and two were refilled.
    assert_eq!((device.remaining, device.quota), (18, quota("20/s", 20)));
    assert_eq!((user.mode, user.has_key, user.is_included, user.override_ends_at), (Mode::Shadow, true, false, None));
    assert_eq!(user.last_denial, None);
}

#[test]
fn a_cluster_rule_is_explained_at_the_rate_of_this_node() {
    let lease = LeaseConfig::new(1, NonZeroU32::new(4).unwrap(), LeaseSource::LocalFallback);
    let rules = vec![rule("cluster", Scope::Cluster, "40/s", 40)];
    let limiter = Limiter::new(rules, &weights(), LimiterConfig { lease, ..config() }, at(0)).unwrap();
    let rules = limiter.rule_set(["cluster"]).unwrap();
    let explain = || limiter.explain(&subject(1, None), at(0)).remove(0);
    let spend = |tokens| allowed(rules.decide(&subject(1, None), cost(tokens), at(0)));
    assert_eq!((explain().remaining, explain().reset), (10, Duration::ZERO));
    spend(4);
    assert_eq!((explain().remaining, explain().reset), (6, Duration::from_millis(400)));
    spend(6);
    let empty = explain();
    assert_eq!((empty.remaining, empty.reset, empty.wait), (0, Duration::from_secs(1), Duration::from_millis(100)));
}

#[test]
fn the_last_denial_is_explained_by_its_rule_and_survives_a_reload() {
    let both = || vec![rule("device", Scope::Device, "1/s", 1), rule("node", Scope::Node, "1/s", 9)];
    let before = limiter(both());
    let rules = before.rule_set(["device", "node"]).unwrap();
    let caller = subject(1, Some(2));
    allowed(rules.decide(&caller, Cost::ONE, at(0)));
    denied(rules.decide(&caller, Cost::ONE, at(300)));
    let after = before.rebuild(both(), &weights(), config(), at(300)).unwrap();
    let last_denials = |subject: &Subject<'_>| -> Vec<_> {
        after.explain(subject, at(400)).into_iter().map(|rule| rule.last_denial).collect()
    };
    let denial = Some(LastDenial { at: at(300), retry_after: Duration::from_millis(700) });
    assert_eq!(last_denials(&caller), [denial, None]);
    assert_eq!(last_denials(&subject(5, Some(2))), [denial, None], "the user, from another device");
    assert_eq!(last_denials(&subject(5, None)), [None, None]);
    assert_eq!(after.explain(&caller, at(400))[0].wait, Duration::from_millis(600));
}

#[test]
fn an_override_is_explained_with_its_end() {
    let limiter = limiter(vec![rule("user", Scope::User, "1/s", 5)]);
    let rule_override = Override { mode: Mode::Off, percent: Percent::ALL };
    limiter.set_override("user", rule_override, at(500)).unwrap();
    let explain = |millis| limiter.explain(&subject(1, None), at(millis)).remove(0);
    assert_eq!((explain(0).mode, explain(0).override_ends_at, explain(0).has_key), (Mode::Off, Some(at(500)), false));
    assert_eq!((explain(500).mode, explain(500).override_ends_at), (Mode::Enforce, None));
}
