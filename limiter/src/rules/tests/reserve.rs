//! Reserves in shared scopes: ordinary traffic stops before weighted users do, and no token is
//! lost.

use super::*;

const ORDINARY: UserClass = UserClass(0);
const PLATINUM: UserClass = UserClass(2);

fn with_reserve(rule: Rule, parts: [f64; 3]) -> Rule {
    let reserve = parts.map(|fraction| Fraction::try_from(fraction).unwrap());
    Rule { reserve: reserve.into(), ..rule }
}

fn caller(class: UserClass) -> Subject<'static> {
    Subject { class, ..subject(1, None) }
}

#[test]
fn rejects_invalid_reserves() {
    let build = |rule| Limiter::new(vec![rule], &weights(), config(), at(0)).unwrap_err().to_string();
    let all = with_reserve(rule("node", Scope::Node, "1/s", 10), [0.2, 1.0, 0.0]);
    assert_eq!(build(all), "the reserve of rule `node` leaves no token to the user class at position 1");
    let small = with_reserve(rule("cluster", Scope::Cluster, "1/s", 1), [0.2, 0.0, 0.0]);
    assert_eq!(build(small), "the reserve of rule `cluster` leaves no token to the user class at position 0");
    let own = with_reserve(rule("device", Scope::Device, "1/s", 10), [0.2, 0.0, 0.0]);
    assert!(build(own).starts_with("rule `device` has a reserve, which only rules of scope node or cluster can have"));
    let short = Rule { reserve: [Fraction::ZERO].into(), ..rule("node", Scope::Node, "1/s", 10) };
    assert_eq!(build(short), "rule `node` has a reserve for 1 user classes, but 3 are configured");
}

#[test]
fn check_cost_rejects_a_cost_that_the_reserve_never_allows_with_its_class() {
    let limiter = limiter(vec![
        with_reserve(rule("node", Scope::Node, "1/s", 10), [0.3, 0.1, 0.0]),
        with_reserve(rule("cluster", Scope::Cluster, "1/s", 20), [0.0, 0.8, 0.0]),
    ]);
    let most = |name| {
        let rules = limiter.rule_set([name]).unwrap();
        (1..).take_while(|&tokens| rules.check_cost(cost(tokens)).is_ok()).last().unwrap()
    };
    assert_eq!((most("node"), most("cluster")), (7, 12));
    let error = limiter.rule_set(["node"]).unwrap().check_cost(cost(8)).unwrap_err();
    assert_eq!(error, RuleError::CostAboveBurst { rule: "node".into(), class: 0, cost: 8, most: 7 });
}

#[test]
fn the_wait_is_exact_until_reserve_and_cost_are_available() {
    for scope in [Scope::Node, Scope::Cluster] {
        let fraction = if scope == Scope::Node { 0.4 } else { 0.8 };
        let rules = limiter(vec![with_reserve(rule("rule", scope, "10/s", 10), [fraction, 0.0, 0.0])])
            .rule_set(["rule"])
            .unwrap();
        assert_eq!(allowed(rules.decide(&caller(ORDINARY), cost(5), at(0))).tightest().unwrap().remaining, 1);
        let denial = denied(rules.decide(&caller(ORDINARY), cost(3), at(50)));
        // Five and a half tokens are available; three and the reserve of four are needed.
        assert_eq!(denial.retry_after, Duration::from_millis(150), "{scope:?}");
        assert_eq!(denial.limit_status.remaining, 1);
        let due = at(50) + denial.retry_after;
        let just_before = MonotonicTime::from_nanos(due.nanos() - 1);
        denied(rules.decide(&caller(ORDINARY), cost(3), just_before));
        allowed(rules.decide(&caller(ORDINARY), cost(3), due));
        assert_eq!(allowed(rules.decide(&caller(PLATINUM), cost(4), due)).tightest().unwrap().remaining, 0);
    }
}

/// Sends ordinary and platinum requests at these rates per second for `seconds`; returns how many
/// of each passed.
fn overload(rules: &RuleSet, ordinary: u64, platinum: u64, seconds: u64) -> [u64; 2] {
    let (mut passed, mut due) = ([0; 2], [0; 2]);
    for millis in 1..=seconds * 1_000 {
        for (index, (class, load)) in [(ORDINARY, ordinary), (PLATINUM, platinum)].into_iter().enumerate() {
            due[index] += load;
            while due[index] >= 1_000 {
                due[index] -= 1_000;
                passed[index] += u64::from(rules.decide(&caller(class), Cost::ONE, at(millis)).is_allowed());
            }
        }
    }
    passed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// With ordinary requests at ten times the rate, platinum requests below the rate always pass,
    /// the whole rate is used, and no more than the quota.
    #[test]
    fn platinum_passes_while_ordinary_traffic_overloads(
        rate in 100u64..2_000, share in 1u64..95, ladder in 0.1f64..0.5, scope in prop::sample::select(vec![Scope::Node, Scope::Cluster]),
    ) {
        let (platinum, seconds) = (rate * share / 100, 10);
        let rule = with_reserve(rule("rule", scope, &format!("{rate}/s"), rate as u32), [ladder, ladder / 2.0, 0.0]);
        let rules = limiter(vec![rule]).rule_set(["rule"]).unwrap();
        let [ordinary_passed, platinum_passed] = overload(&rules, 10 * rate, platinum, seconds);
        prop_assert_eq!(platinum_passed, platinum * seconds);
        let (total, quota) = (ordinary_passed + platinum_passed, rate * seconds + rate);
        prop_assert!(total <= quota, "{} of {}", total, quota);
        prop_assert!(total + 2 + (rate as f64 * ladder).ceil() as u64 >= quota - quota / 500, "{} of {}", total, quota);
    }

    /// Without other traffic the reserve is filled once, and then ordinary traffic gets the full
    /// rate.
    #[test]
    fn ordinary_traffic_alone_gets_the_full_rate(
        rate in 100u64..2_000, ladder in 0.0f64..0.9, scope in prop::sample::select(vec![Scope::Node, Scope::Cluster]),
    ) {
        let rule = with_reserve(rule("rule", scope, &format!("{rate}/s"), rate as u32), [ladder, 0.0, 0.0]);
        let rules = limiter(vec![rule]).rule_set(["rule"]).unwrap();
        overload(&rules, 3 * rate, 0, 2);
        let before = at(2_000);
        let passed = (0..10_000 * rate / 250).filter(|turn| {
            let now = before + Duration::from_micros(turn * 250_000 / rate);
            rules.decide(&caller(ORDINARY), Cost::ONE, now).is_allowed()
        }).count() as u64;
        prop_assert!(passed.abs_diff(10 * rate) <= 2 + rate / 500, "{} of {}", passed, 10 * rate);
    }
}
