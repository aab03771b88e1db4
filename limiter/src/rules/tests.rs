//! Decisions over all scopes: denied, raced and reloaded, then allowed.

mod explanations;
mod interleavings;
mod keys;
mod reserve;
mod overrides;

use std::num::{NonZeroU32, NonZeroUsize};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::subject::LimitRequest;
use super::*;
use crate::lease::{LeaseConfig, LeaseSource};
use crate::quota::{Cost, Fraction, KeyHash, Mode, Percent, Quota};

fn quota(rate: &str, burst: u32) -> Quota {
    Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn rule(name: &str, scope: Scope, rate: &str, burst: u32) -> Rule {
    Rule::new(name, scope, quota(rate, burst))
}

fn config() -> LimiterConfig {
    let lease = LeaseConfig::new(1, NonZeroU32::MIN, LeaseSource::LocalFallback);
    LimiterConfig { keys: NonZeroUsize::new(1_000).unwrap(), lease }
}

fn weights() -> [Weight; 3] {
    [1.0, 2.0, 3.2].map(|weight| Weight::try_from(weight).unwrap())
}

fn limiter(rules: Vec<Rule>) -> Limiter {
    Limiter::new(rules, &weights(), config(), at(0)).unwrap()
}

/// One rule per scope that refills one token an hour, so that the remaining tokens can be counted.
fn four_rules(device: u32, user: u32, node: u32, cluster: u32) -> Limiter {
    limiter(vec![
        rule("cluster", Scope::Cluster, "1/h", cluster),
        rule("node", Scope::Node, "1/h", node),
        rule("user", Scope::User, "1/h", user),
        rule("device", Scope::Device, "1/h", device),
    ])
}

const ALL: [&str; 4] = ["cluster", "node", "user", "device"];

fn at(millis: u64) -> MonotonicTime {
    MonotonicTime::ORIGIN + Duration::from_millis(millis)
}

fn cost(tokens: u32) -> Cost {
    Cost::new(NonZeroU32::new(tokens).unwrap())
}

fn subject(device: u64, user: Option<u64>) -> Subject<'static> {
    // Both halves of a real hash differ between subjects.
    let hash = |number: u64| KeyHash(u128::from(number) << 64 | u128::from(number));
    Subject { device: hash(device), user: user.map(hash), class: UserClass(0), keys: &[] }
}

/// Whole tokens left in one rule.
fn left(limiter: &Limiter, name: &str, subject: &Subject<'_>) -> u64 {
    let rules = limiter.rule_set([name]).unwrap();
    let state = &rules.rules[0];
    let key = state.key(subject).unwrap();
    match state.peek(key, &LimitRequest { subject, cost: Cost::ONE, now: at(0) }) {
        Ok(headroom) => headroom.remaining + 1,
        Err(throttled) => throttled.remaining,
    }
}

fn denied(verdict: Verdict) -> Denial {
    match verdict {
        Verdict::Denied(denial) => denial,
        Verdict::Allowed(admission) => panic!("allowed: {admission:?}"),
    }
}

fn allowed(verdict: Verdict) -> Admission {
    match verdict {
        Verdict::Allowed(admission) => admission,
        Verdict::Denied(denial) => panic!("denied: {denial:?}"),
    }
}

#[test]
fn a_denial_in_any_scope_spends_nothing_in_the_others() {
    let bursts = [[1, 9, 9, 9], [9, 1, 9, 9], [9, 9, 1, 9], [9, 9, 9, 1]];
    for [device, user, node, cluster] in bursts {
        let limiter = four_rules(device, user, node, cluster);
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
fn a_denial_reports_the_longest_wait() {
    let limiter = limiter(vec![rule("slow", Scope::Node, "1/m", 1), rule("device", Scope::Device, "1/s", 1)]);
    let rules = limiter.rule_set(["slow", "device"]).unwrap();
    allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
    let denial = denied(rules.decide(&subject(1, None), Cost::ONE, at(1)));
    assert_eq!((denial.limit_status.rule, denial.retry_after), (0, Duration::from_millis(59_999)));
    assert_eq!((denial.retry_after_seconds(), denial.limit_status.remaining), (60, 0));
    assert_eq!(denial.limit_status.quota, quota("1/m", 1));
}

#[test]
fn a_shadow_rule_is_evaluated_and_never_denies() {
    let mut shadow = rule("shadow", Scope::Device, "1/h", 1);
    shadow.mode = Mode::Shadow;
    let limiter = limiter(vec![rule("node", Scope::Node, "1/s", 10), shadow]);
    let rules = limiter.rule_set(["shadow", "node"]).unwrap();
    assert_eq!(allowed(rules.decide(&subject(1, None), Cost::ONE, at(0))).evaluations.shadow_denied, 0);
    let admission = allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
    assert_eq!(admission.evaluations, Evaluations { passed: 0b01, shadow_denied: 0b10, ..Evaluations::default() });
    assert_eq!(admission.tightest().unwrap().rule, 0);
}

#[test]
fn a_rule_that_is_off_is_not_evaluated() {
    let mut off = rule("off", Scope::Device, "1/h", 1);
    off.mode = Mode::Off;
    let rules = limiter(vec![off]).rule_set(["off"]).unwrap();
    for _ in 0..10 {
        let admission = allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
        assert_eq!((admission.tightest(), admission.evaluations), (None, Evaluations::default()));
    }
}

#[test]
fn user_rules_do_not_apply_without_a_user() {
    let rules = limiter(vec![rule("user", Scope::User, "1/h", 1)]).rule_set(["user"]).unwrap();
    for _ in 0..3 {
        allowed(rules.decide(&subject(1, None), Cost::ONE, at(0)));
    }
    allowed(rules.decide(&subject(1, Some(7)), Cost::ONE, at(0)));
    denied(rules.decide(&subject(2, Some(7)), Cost::ONE, at(0)));
}

#[test]
fn a_percentage_always_selects_the_same_devices() {
    let mut some = rule("some", Scope::Device, "1/d", 1);
    some.percent = Percent::try_from(30).unwrap();
    let limited = |rules: &RuleSet| -> Vec<bool> {
        let twice = |device| {
            allowed(rules.decide(&subject(device, None), Cost::ONE, at(0)));
            !rules.decide(&subject(device, None), Cost::ONE, at(0)).is_allowed()
        };
        (0..700).map(twice).collect()
    };
    let build = |some: &Rule| {
        let config = LimiterConfig { keys: LimiterConfig::KEYS, ..config() };
        Limiter::new(vec![some.clone()], &weights(), config, at(0)).unwrap()
    };
    let first = limited(&build(&some).rule_set(["some"]).unwrap());
    assert_eq!(first, limited(&build(&some).rule_set(["some"]).unwrap()));
    let count = first.iter().filter(|&&limited| limited).count();
    assert!((170..250).contains(&count), "{count}");
}

#[test]
fn weight_multiplies_the_rate_of_device_rules_but_not_of_node_rules() {
    for (scope, factors) in [(Scope::Device, [1.0, 2.0, 3.2]), (Scope::Node, [1.0; 3])] {
        for (class, factor) in factors.into_iter().enumerate() {
            let rules = limiter(vec![rule("rule", scope, "100/s", 10)]).rule_set(["rule"]).unwrap();
            let caller = Subject { class: UserClass(class as u8), ..subject(1, None) };
            let granted =
                (0..60_000).filter(|&millis| rules.decide(&caller, Cost::ONE, at(millis)).is_allowed()).count();
            let steady = (granted as f64 - 10.0 * factor) / 60.0;
            assert!((steady / (100.0 * factor) - 1.0).abs() < 0.001, "{scope:?} {factor}: {steady}");
        }
    }
}

#[test]
fn an_unconfigured_class_is_treated_as_the_first() {
    let rules = limiter(vec![rule("rule", Scope::Device, "1/h", 1)]).rule_set(["rule"]).unwrap();
    let caller = Subject { class: UserClass(200), ..subject(1, None) };
    allowed(rules.decide(&caller, Cost::ONE, at(0)));
    denied(rules.decide(&caller, Cost::ONE, at(0)));
}

#[test]
fn a_reload_keeps_the_state_of_rules_with_the_same_name_scope_and_key() {
    let before = four_rules(5, 5, 5, 5);
    let caller = subject(1, Some(1));
    let rules = before.rule_set(ALL).unwrap();
    for _ in 0..5 {
        allowed(rules.decide(&caller, Cost::ONE, at(0)));
    }
    let changed = |name: &str, scope| rule(name, scope, "1/h", 8);
    let after = before
        .rebuild(
            vec![
                changed("device", Scope::Device),
                changed("node", Scope::Node),
                changed("cluster", Scope::Cluster),
                changed("user", Scope::Device),
            ],
            &weights(),
            config(),
            at(0),
        )
        .unwrap();
    // The new quota applies to what was spent under the old one; a lease does not refill its burst.
    for (name, expected) in [("device", 3), ("node", 3), ("cluster", 0), ("user", 8)] {
        assert_eq!(left(&after, name, &caller), expected, "{name}");
    }
}

/// Spends 30 tokens of a rule, changes the rule, and returns what is left then.
fn left_after_reload(scope: Scope, before: (&str, u32), after: (&str, u32), keys: usize) -> u64 {
    let caller = subject(1, Some(1));
    let first = limiter(vec![rule("a", scope, before.0, before.1)]);
    let rules = first.rule_set(["a"]).unwrap();
    for _ in 0..30 {
        allowed(rules.decide(&caller, Cost::ONE, at(0)));
    }
    let changed = LimiterConfig { keys: NonZeroUsize::new(keys).unwrap(), ..config() };
    let second = first.rebuild(vec![rule("a", scope, after.0, after.1)], &weights(), changed, at(0)).unwrap();
    second.take_over(&first, || at(0));
    left(&second, "a", &caller)
}

#[test]
fn tokens_that_were_spent_stay_spent_when_a_rate_changes() {
    for scope in [Scope::Node, Scope::Device, Scope::User] {
        for keys in [1_000, 5_000] {
            let left = |before, after| left_after_reload(scope, before, after, keys);
            assert_eq!(left(("1/s", 60), ("1000/s", 1_000)), 970, "raised");
            assert_eq!(left(("10/d", 100), ("100/s", 200)), 170, "raised by 864,000");
            assert_eq!(left(("1000/h", 100), ("1000/m", 100)), 70, "the burst stays");
            assert_eq!(left(("100/s", 100), ("1/h", 100)), 70, "lowered");
            assert_eq!(left(("100/s", 100), ("1/h", 20)), 0, "below what was spent");
            assert_eq!(left(("1/s", 60), ("1/s", 90)), 60, "the burst alone");
        }
    }
}

#[test]
fn backlog_of_another_class_denies_no_longer_than_the_own_burst_takes() {
    let limits = limiter(vec![rule("a", Scope::Device, "1/h", 10)]);
    let rules = limits.rule_set(["a"]).unwrap();
    let slow = subject(1, None);
    for _ in 0..10 {
        allowed(rules.decide(&slow, Cost::ONE, at(0)));
    }
    // Twice the rate and the burst: 20 tokens take as long as 10 of the other class.
    let fast = Subject { class: UserClass(1), ..slow };
    assert_eq!(denied(rules.decide(&fast, Cost::ONE, at(0))).retry_after, Duration::from_secs(1_800));
    let limits = limits.rebuild(vec![rule("a", Scope::Device, "1/h", 2)], &weights(), config(), at(0)).unwrap();
    let rules = limits.rule_set(["a"]).unwrap();
    let (hour, retry) = (3_600_000, denied(rules.decide(&slow, Cost::ONE, at(0))).retry_after);
    assert_eq!(retry, Duration::from_secs(3_600));
    allowed(rules.decide(&slow, Cost::ONE, at(hour)));
}

/// A stream that has waited decides with the time of its head.
#[test]
fn earlier_decision_gives_no_token_back() {
    for scope in [Scope::Node, Scope::Device] {
        let limits = limiter(vec![rule("a", scope, "10/s", 100)]);
        let rules = limits.rule_set(["a"]).unwrap();
        let caller = subject(1, None);
        allowed(rules.decide(&caller, cost(100), at(10_000)));
        for earlier in [9_990, 5_000, 0] {
            denied(rules.decide(&caller, Cost::ONE, at(earlier)));
            denied(rules.decide(&caller, Cost::ONE, at(10_000)));
        }
        allowed(rules.decide(&caller, Cost::ONE, at(10_100)));
    }
}

#[test]
fn evicted_callers_keep_what_they_have_spent_when_a_rate_changes() {
    let small = LimiterConfig { keys: NonZeroUsize::new(1).unwrap(), ..config() };
    let first = Limiter::new(vec![rule("a", Scope::Device, "10/d", 20)], &weights(), small, at(0)).unwrap();
    let rules = first.rule_set(["a"]).unwrap();
    for number in 0..30 {
        for _ in 0..15 {
            allowed(rules.decide(&subject(number, None), Cost::ONE, at(0)));
        }
    }
    let second = first.rebuild(vec![rule("a", Scope::Device, "100/s", 40)], &weights(), small, at(0)).unwrap();
    second.take_over(&first, || at(0));
    for number in 0..30 {
        let left = left(&second, "a", &subject(number, None));
        // A backlog in the sketch is rounded up.
        assert!((24..=25).contains(&left), "{number}: {left}");
    }
    let rules = second.rule_set(["a"]).unwrap();
    for number in 0..30 {
        allowed(rules.decide(&subject(number, None), Cost::ONE, at(0)));
    }
}

#[test]
fn a_rejected_reload_changes_nothing() {
    let before = limiter(vec![rule("cluster", Scope::Cluster, "1/h", 5)]);
    let rules = vec![rule("cluster", Scope::Cluster, "1/h", 2), rule("cluster", Scope::Node, "1/h", 2)];
    let error = before.rebuild(rules, &weights(), config(), at(0)).unwrap_err();
    assert_eq!(error.to_string(), "two rules are named `cluster`");
    assert_eq!(left(&before, "cluster", &subject(1, None)), 5);
}

#[test]
fn construction_rejects_invalid_rules() {
    let build = |rules, weights: &[Weight]| Limiter::new(rules, weights, config(), at(0)).err();
    let many = (0..65).map(|index| rule(&format!("rule {index}"), Scope::Node, "1/s", 1)).collect();
    assert_eq!(build(many, &weights()), Some(RuleError::TooManyRules(65)));
    assert_eq!(build(vec![], &[]), Some(RuleError::Weights(0)));
    let fast = vec![rule("fast", Scope::Device, "9000000/s", 10)];
    assert!(matches!(build(fast, &weights()), Some(RuleError::Weighted { .. })));
    let error = limiter(vec![]).rule_set(["none"]).unwrap_err();
    assert_eq!(error.to_string(), "there is no rule `none`");
}

#[test]
fn check_cost_rejects_a_cost_above_the_burst() {
    let rules = four_rules(9, 9, 3, 9).rule_set(ALL).unwrap();
    assert_eq!(rules.check_cost(cost(3)), Ok(()));
    let error = rules.check_cost(cost(4)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a cost of 4 never passes rule `node` for the user class at position 0, which may spend at most 3 at once"
    );
    assert_eq!(denied(rules.decide(&subject(1, None), cost(4), at(0))).retry_after, Duration::MAX);
}

#[test]
fn an_admission_reports_remaining_and_reset_of_the_tightest_rule() {
    let limiter = limiter(vec![rule("node", Scope::Node, "100/s", 50), rule("device", Scope::Device, "10/s", 20)]);
    let rules = limiter.rule_set(["node", "device"]).unwrap();
    let caller = Subject { class: UserClass(2), ..subject(1, None) };
    let admission = allowed(rules.decide(&caller, cost(33), at(0)));
    let tightest = admission.tightest().unwrap();
    assert_eq!((tightest.rule, tightest.remaining, tightest.reset_seconds()), (0, 17, 1));
    let admission = allowed(rules.decide(&caller, cost(16), at(0)));
    let device = admission.tightest().unwrap();
    assert_eq!((device.rule, device.remaining, device.reset_seconds()), (0, 1, 1), "the node's limit is fifty");
    let admission = allowed(limiter.rule_set(["device"]).unwrap().decide(&caller, cost(1), at(0)));
    let device = admission.tightest().unwrap();
    assert_eq!((device.rule, device.quota, device.remaining), (1, quota("32/s", 64), 14));
    assert_eq!(device.reset_seconds(), 2);
}

/// Threads race for the last tokens of every rule. Afterwards each rule has spent exactly what was
/// admitted.
#[test]
fn a_lost_race_is_refunded() {
    for round in 0..50 {
        let limiter = four_rules(70, 60, 50, 40 + round);
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
    /// Two callers send requests in random order; each rule spends exactly what was admitted.
    #[test]
    fn rules_spend_exactly_what_was_admitted(
        bursts in prop::array::uniform4(5u32..40),
        requests in prop::collection::vec((0u64..2, any::<bool>(), 1u32..5), 1..80),
    ) {
        let [device, user, node, cluster] = bursts;
        let limiter = four_rules(device, user, node, cluster);
        let rules = limiter.rule_set(ALL).unwrap();
        let (mut shared, mut per_device, mut users) = (0, [0; 2], 0);
        for (caller_id, identified, tokens) in requests {
            let caller = subject(caller_id, identified.then_some(9));
            if rules.decide(&caller, cost(tokens), at(0)).is_allowed() {
                shared += tokens;
                per_device[caller_id as usize] += tokens;
                users += if identified { tokens } else { 0 };
            }
        }
        for (caller_id, spent) in per_device.into_iter().enumerate() {
            prop_assert_eq!(left(&limiter, "device", &subject(caller_id as u64, None)), u64::from(device - spent));
        }
        let caller = subject(0, Some(9));
        prop_assert_eq!(left(&limiter, "user", &caller), u64::from(user - users));
        prop_assert_eq!(left(&limiter, "node", &caller), u64::from(node - shared));
        prop_assert_eq!(left(&limiter, "cluster", &caller), u64::from(cluster - shared));
    }
}
