//! Decisions over all tiers: denied, raced and reloaded before allowed.

mod explained;
mod interleaved;
mod keys;
mod reserve;
mod trial;

use std::num::NonZeroU32;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::lease::Backing;
use crate::quota::{Cost, Fraction, Percent, Quota};

fn quota(rate: &str, burst: u32) -> Quota {
    Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn rule(name: &str, tier: Tier, rate: &str, burst: u32) -> Rule {
    Rule::new(name, tier, quota(rate, burst))
}

fn settings() -> LimiterSettings {
    let lease = LeaseSettings::new(1, NonZeroU32::MIN, Backing::Alone);
    LimiterSettings { keys: NonZeroUsize::new(1_000).unwrap(), lease }
}

fn weights() -> [Weight; 3] {
    [1.0, 2.0, 3.2].map(|weight| Weight::try_from(weight).unwrap())
}

fn limiter(rules: Vec<Rule>) -> Limiter {
    Limiter::new(rules, &weights(), settings(), at(0)).unwrap()
}

/// A rule per tier whose tokens come back once an hour, so that what is left can be counted.
fn four_tiers(device: u32, user: u32, node: u32, cluster: u32) -> Limiter {
    limiter(vec![
        rule("cluster", Tier::Cluster, "1/h", cluster),
        rule("node", Tier::Node, "1/h", node),
        rule("user", Tier::User, "1/h", user),
        rule("device", Tier::Device, "1/h", device),
    ])
}

const ALL: [&str; 4] = ["cluster", "node", "user", "device"];

fn at(millis: u64) -> Moment {
    Moment::ORIGIN + Duration::from_millis(millis)
}

fn cost(tokens: u32) -> Cost {
    Cost::new(NonZeroU32::new(tokens).unwrap())
}

fn subject(device: u64, user: Option<u64>) -> Subject<'static> {
    Subject { device: KeyHash(device), user: user.map(KeyHash), class: Class(0), keys: &[] }
}

/// Whole tokens left in one rule.
fn left(limiter: &Limiter, name: &str, subject: &Subject<'_>) -> u64 {
    let rules = limiter.rule_set([name]).unwrap();
    let held = &rules.rules[0];
    let key = held.key(subject).unwrap();
    match held.peek(key, subject.class, Cost::ONE, at(0)) {
        Ok(room) => room.remaining + 1,
        Err(wait) => wait.remaining,
    }
}

fn denied(verdict: Verdict) -> Denial {
    match verdict {
        Verdict::Denied(denial) => denial,
        Verdict::Allowed(report) => panic!("allowed: {report:?}"),
    }
}

fn allowed(verdict: Verdict) -> Report {
    match verdict {
        Verdict::Allowed(report) => report,
        Verdict::Denied(denial) => panic!("denied: {denial:?}"),
    }
}

#[test]
fn a_denial_in_any_tier_spends_nothing_in_the_others() {
    let bursts = [[1, 9, 9, 9], [9, 1, 9, 9], [9, 9, 1, 9], [9, 9, 9, 1]];
    for [device, user, node, cluster] in bursts {
        let limiter = four_tiers(device, user, node, cluster);
        let rules = limiter.rule_set(ALL).unwrap();
        let caller = subject(1, Some(1));
        allowed(rules.decide(&caller, Cost::ONE, at(0)));
        for _ in 0..20 {
            denied(rules.decide(&caller, Cost::ONE, at(0)));
        }
        for (name, burst) in [("device", device), ("user", user), ("node", node), ("cluster", cluster)] {
            assert_eq!(left(&limiter, name, &caller), u64::from(burst - 1), "{name}");
        }
    }
}

#[test]
fn the_longest_wait_is_told() {
    let limiter = limiter(vec![rule("slow", Tier::Node, "1/m", 1), rule("device", Tier::Device, "1/s", 1)]);
    let rules = limiter.rule_set(["slow", "device"]).unwrap();
    allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
    let denial = denied(rules.decide(&subject(1, None), Cost::ONE, at(1)));
    assert_eq!((denial.standing.rule, denial.retry_after), (0, Duration::from_millis(59_999)));
    assert_eq!((denial.retry_after_seconds(), denial.standing.remaining), (60, 0));
    assert_eq!(denial.standing.quota, quota("1/m", 1));
}

#[test]
fn a_shadow_rule_reports_and_never_denies() {
    let mut shadow = rule("shadow", Tier::Device, "1/h", 1);
    shadow.mode = Mode::Shadow;
    let limiter = limiter(vec![rule("node", Tier::Node, "1/s", 10), shadow]);
    let rules = limiter.rule_set(["shadow", "node"]).unwrap();
    assert_eq!(allowed(rules.decide(&subject(1, None), Cost::ONE, at(0))).votes.shadow_denied, 0);
    let report = allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
    assert_eq!(report.votes, Votes { passed: 0b01, shadow_denied: 0b10, ..Votes::default() });
    assert_eq!(report.tightest().unwrap().rule, 0);
}

#[test]
fn a_rule_that_is_off_is_not_evaluated() {
    let mut off = rule("off", Tier::Device, "1/h", 1);
    off.mode = Mode::Off;
    let rules = limiter(vec![off]).rule_set(["off"]).unwrap();
    for _ in 0..10 {
        let report = allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
        assert_eq!((report.tightest(), report.votes), (None, Votes::default()));
    }
}

#[test]
fn without_a_user_user_rules_do_not_apply() {
    let rules = limiter(vec![rule("user", Tier::User, "1/h", 1)]).rule_set(["user"]).unwrap();
    for _ in 0..3 {
        allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
    }
    allowed(rules.decide(&subject(1, Some(7)), Cost::ONE, at(0)));
    denied(rules.decide(&subject(2, Some(7)), Cost::ONE, at(0)));
}

#[test]
fn a_percentage_of_devices_is_limited_and_always_the_same_ones() {
    let mut some = rule("some", Tier::Device, "1/d", 1);
    some.percent = Percent::try_from(30).unwrap();
    let limited = |rules: &RuleSet| -> Vec<bool> {
        let twice = |device| {
            allowed(rules.decide(&subject(device, None), Cost::ONE, at(0)));
            !rules.decide(&subject(device, None), Cost::ONE, at(0)).is_allowed()
        };
        (0..700).map(twice).collect()
    };
    let build = |some: &Rule| {
        let settings = LimiterSettings { keys: LimiterSettings::KEYS, ..settings() };
        Limiter::new(vec![some.clone()], &weights(), settings, at(0)).unwrap()
    };
    let first = limited(&build(&some).rule_set(["some"]).unwrap());
    assert_eq!(first, limited(&build(&some).rule_set(["some"]).unwrap()));
    let count = first.iter().filter(|&&limited| limited).count();
    assert!((170..250).contains(&count), "{count}");
}

#[test]
fn weight_multiplies_the_subjects_own_tiers_within_a_thousandth() {
    for (tier, factors) in [(Tier::Device, [1.0, 2.0, 3.2]), (Tier::Node, [1.0; 3])] {
        for (class, factor) in factors.into_iter().enumerate() {
            let rules = limiter(vec![rule("rule", tier, "100/s", 10)]).rule_set(["rule"]).unwrap();
            let caller = Subject { class: Class(class as u8), ..subject(1, None) };
            let granted =
                (0..60_000).filter(|&millis| rules.decide(&caller, Cost::ONE, at(millis)).is_allowed()).count();
            let steady = (granted as f64 - 10.0 * factor) / 60.0;
            assert!((steady / (100.0 * factor) - 1.0).abs() < 0.001, "{tier:?} {factor}: {steady}");
        }
    }
}

#[test]
fn a_class_that_is_not_configured_weighs_as_the_first() {
    let rules = limiter(vec![rule("rule", Tier::Device, "1/h", 1)]).rule_set(["rule"]).unwrap();
    let caller = Subject { class: Class(200), ..subject(1, None) };
    allowed(rules.decide(&caller, Cost::ONE, at(0)));
    denied(rules.decide(&caller, Cost::ONE, at(0)));
}

#[test]
fn a_reload_keeps_who_is_limited_limited() {
    let before = four_tiers(5, 5, 5, 5);
    let caller = subject(1, Some(1));
    let rules = before.rule_set(ALL).unwrap();
    for _ in 0..5 {
        allowed(rules.decide(&caller, Cost::ONE, at(0)));
    }
    let changed = |name: &str, tier| rule(name, tier, "1/h", 8);
    let after = before
        .rebuild(
            vec![
                changed("device", Tier::Device),
                changed("node", Tier::Node),
                changed("cluster", Tier::Cluster),
                changed("user", Tier::Device),
            ],
            &weights(),
            settings(),
            at(0),
        )
        .unwrap();
    // The new quota applies to what was spent under the old one; a lease has no burst to catch up.
    for (name, expected) in [("device", 3), ("node", 3), ("cluster", 0), ("user", 8)] {
        assert_eq!(left(&after, name, &caller), expected, "{name}");
    }
}

#[test]
fn a_refused_reload_changes_nothing() {
    let before = limiter(vec![rule("cluster", Tier::Cluster, "1/h", 5)]);
    let rules = vec![rule("cluster", Tier::Cluster, "1/h", 2), rule("cluster", Tier::Node, "1/h", 2)];
    let error = before.rebuild(rules, &weights(), settings(), at(0)).unwrap_err();
    assert_eq!(error.to_string(), "two rules are named `cluster`");
    assert_eq!(left(&before, "cluster", &subject(1, None)), 5);
}

#[test]
fn construction_refuses_what_cannot_work() {
    let build = |rules, weights: &[Weight]| Limiter::new(rules, weights, settings(), at(0)).err();
    let many = (0..65).map(|index| rule(&format!("rule {index}"), Tier::Node, "1/s", 1)).collect();
    assert_eq!(build(many, &weights()), Some(RuleError::TooManyRules(65)));
    assert_eq!(build(vec![], &[]), Some(RuleError::Weights(0)));
    let fast = vec![rule("fast", Tier::Device, "9000000/s", 10)];
    assert!(matches!(build(fast, &weights()), Some(RuleError::Weighted { .. })));
    let error = limiter(vec![]).rule_set(["none"]).unwrap_err();
    assert_eq!(error.to_string(), "there is no rule `none`");
}

#[test]
fn a_cost_above_the_burst_is_a_fault_of_the_configuration() {
    let rules = four_tiers(9, 9, 3, 9).rule_set(ALL).unwrap();
    assert_eq!(rules.check_cost(cost(3)), Ok(()));
    let error = rules.check_cost(cost(4)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a cost of 4 never passes rule `node` for the user tier at position 0, which it admits at most 3 at once"
    );
    assert_eq!(denied(rules.decide(&subject(1, None), cost(4), at(0))).retry_after, Duration::MAX);
}

#[test]
fn the_tightest_rule_is_reported_with_room_and_reset() {
    let limiter = limiter(vec![rule("node", Tier::Node, "100/s", 50), rule("device", Tier::Device, "10/s", 20)]);
    let rules = limiter.rule_set(["node", "device"]).unwrap();
    let caller = Subject { class: Class(2), ..subject(1, None) };
    let report = allowed(rules.decide(&caller, cost(33), at(0)));
    let tightest = report.tightest().unwrap();
    assert_eq!((tightest.rule, tightest.remaining, tightest.reset_seconds()), (0, 17, 1));
    let report = allowed(rules.decide(&caller, cost(16), at(0)));
    let device = report.tightest().unwrap();
    assert_eq!((device.rule, device.remaining, device.reset_seconds()), (0, 1, 1), "the node's fifty");
    let report = allowed(limiter.rule_set(["device"]).unwrap().decide(&caller, cost(1), at(0)));
    let device = report.tightest().unwrap();
    assert_eq!((device.rule, device.quota, device.remaining), (1, quota("32/s", 64), 14));
    assert_eq!(device.reset_seconds(), 2);
}

/// Threads race for the last tokens of every tier; when all is decided, the books balance.
#[test]
fn a_lost_race_is_refunded() {
    for round in 0..50 {
        let limiter = four_tiers(70, 60, 50, 40 + round);
        let rules = limiter.rule_set(ALL).unwrap();
        let caller = subject(round.into(), Some(1));
        let spend = || (0..60).filter(|_| rules.decide(&caller, Cost::ONE, at(0)).is_allowed()).count();
        let admitted: usize = thread::scope(|scope| {
            let workers = [scope.spawn(spend), scope.spawn(spend), scope.spawn(spend)];
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert!(admitted <= 50.min(40 + round as usize));
        for (name, burst) in [("device", 70), ("user", 60), ("node", 50), ("cluster", 40 + round)] {
            assert_eq!(left(&limiter, name, &caller), u64::from(burst) - admitted as u64, "{name}");
        }
    }
}

proptest! {
    /// Two callers take turns at random; each rule has spent exactly what passed.
    #[test]
    fn rules_spend_what_was_admitted_and_nothing_else(
        bursts in prop::array::uniform4(5u32..40),
        requests in prop::collection::vec((0u64..2, any::<bool>(), 1u32..5), 1..80),
    ) {
        let [device, user, node, cluster] = bursts;
        let limiter = four_tiers(device, user, node, cluster);
        let rules = limiter.rule_set(ALL).unwrap();
        let (mut shared, mut own, mut users) = (0, [0; 2], 0);
        for (who, identified, tokens) in requests {
            let caller = subject(who, identified.then_some(9));
            if rules.decide(&caller, cost(tokens), at(0)).is_allowed() {
                shared += tokens;
                own[who as usize] += tokens;
                users += if identified { tokens } else { 0 };
            }
        }
        for (who, spent) in own.into_iter().enumerate() {
            prop_assert_eq!(left(&limiter, "device", &subject(who as u64, None)), u64::from(device - spent));
        }
        let caller = subject(0, Some(9));
        prop_assert_eq!(left(&limiter, "user", &caller), u64::from(user - users));
        prop_assert_eq!(left(&limiter, "node", &caller), u64::from(node - shared));
        prop_assert_eq!(left(&limiter, "cluster", &caller), u64::from(cluster - shared));
    }
}
