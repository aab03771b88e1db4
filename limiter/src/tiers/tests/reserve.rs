//! Reserves in shared tiers: ordinary traffic stops before weighted users do, and nobody loses a token by it.

use super::*;

const ORDINARY: Class = Class(0);
const PLATINUM: Class = Class(2);

fn reserving(name: &str, tier: Tier, rate: &str, burst: u32, parts: [f64; 3]) -> Rule {
    let reserve = parts.map(|part| Fraction::try_from(part).unwrap());
    Rule { reserve: reserve.into(), ..rule(name, tier, rate, burst) }
}

fn of(class: Class) -> Subject<'static> {
    Subject { class, ..subject(1, None) }
}

#[test]
fn refuses_reserves_that_cannot_work() {
    let build = |rule| Limiter::new(vec![rule], &weights(), settings(), at(0)).unwrap_err().to_string();
    let all = reserving("node", Tier::Node, "1/s", 10, [0.2, 1.0, 0.0]);
    assert_eq!(build(all), "the reserve of rule `node` leaves no token to the user tier at position 1");
    let small = reserving("cluster", Tier::Cluster, "1/s", 1, [0.2, 0.0, 0.0]);
    assert_eq!(build(small), "the reserve of rule `cluster` leaves no token to the user tier at position 0");
    let own = reserving("device", Tier::Device, "1/s", 10, [0.2, 0.0, 0.0]);
    assert!(build(own).starts_with("rule `device` has a reserve, which is for rules of tier node or cluster"));
    let short = Rule { reserve: [Fraction::ZERO].into(), ..rule("node", Tier::Node, "1/s", 10) };
    assert_eq!(build(short), "rule `node` has a reserve for 1 user tiers, and there are 3");
}

#[test]
fn a_cost_that_a_reserve_never_leaves_is_refused_with_its_class() {
    let limiter = limiter(vec![
        reserving("node", Tier::Node, "1/s", 10, [0.3, 0.1, 0.0]),
        reserving("cluster", Tier::Cluster, "1/s", 20, [0.0, 0.8, 0.0]),
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
fn the_wait_is_true_until_reserve_and_cost_are_there() {
    for tier in [Tier::Node, Tier::Cluster] {
        let part = if tier == Tier::Node { 0.4 } else { 0.8 };
        let rules = limiter(vec![reserving("rule", tier, "10/s", 10, [part, 0.0, 0.0])]).rule_set(["rule"]).unwrap();
        assert_eq!(allowed(rules.decide(&of(ORDINARY), cost(5), at(0))).tightest().unwrap().remaining, 1);
        let denial = denied(rules.decide(&of(ORDINARY), cost(3), at(50)));
        // Five and a half are there, three and the reserve of four are wanted.
        assert_eq!(denial.retry_after, Duration::from_millis(150), "{tier:?}");
        assert_eq!(denial.standing.remaining, 1);
        let due = at(50) + denial.retry_after;
        let just_before = Moment::from_nanos(due.nanos() - 1);
        denied(rules.decide(&of(ORDINARY), cost(3), just_before));
        allowed(rules.decide(&of(ORDINARY), cost(3), due));
        assert_eq!(allowed(rules.decide(&of(PLATINUM), cost(4), due)).tightest().unwrap().remaining, 0);
    }
}

/// Arrivals of ordinary and platinum requests per second over `seconds`; what passed of each.
fn overload(rules: &RuleSet, ordinary: u64, platinum: u64, seconds: u64) -> [u64; 2] {
    let (mut passed, mut owed) = ([0; 2], [0; 2]);
    for millis in 1..=seconds * 1_000 {
        for (who, (class, load)) in [(ORDINARY, ordinary), (PLATINUM, platinum)].into_iter().enumerate() {
            owed[who] += load;
            while owed[who] >= 1_000 {
                owed[who] -= 1_000;
                passed[who] += u64::from(rules.decide(&of(class), Cost::ONE, at(millis)).is_allowed());
            }
        }
    }
    passed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Under ten times the rate in ordinary requests, platinum below the rate always passes, all of the rate is used,
    /// and no more than the quota.
    #[test]
    fn platinum_passes_while_ordinary_traffic_overloads(
        rate in 100u64..2_000, share in 1u64..95, ladder in 0.1f64..0.5, tier in prop::sample::select(vec![Tier::Node, Tier::Cluster]),
    ) {
        let (platinum, seconds) = (rate * share / 100, 10);
        let rule = reserving("rule", tier, &format!("{rate}/s"), rate as u32, [ladder, ladder / 2.0, 0.0]);
        let rules = limiter(vec![rule]).rule_set(["rule"]).unwrap();
        let [ordinary_passed, platinum_passed] = overload(&rules, 10 * rate, platinum, seconds);
        prop_assert_eq!(platinum_passed, platinum * seconds);
        let (total, quota) = (ordinary_passed + platinum_passed, rate * seconds + rate);
        prop_assert!(total <= quota, "{} of {}", total, quota);
        prop_assert!(total + 2 + (rate as f64 * ladder).ceil() as u64 >= quota - quota / 500, "{} of {}", total, quota);
    }

    /// With nobody to keep the reserve for, it is filled once, and then the rate is the full one.
    #[test]
    fn ordinary_traffic_alone_gets_the_full_rate(
        rate in 100u64..2_000, ladder in 0.0f64..0.9, tier in prop::sample::select(vec![Tier::Node, Tier::Cluster]),
    ) {
        let rule = reserving("rule", tier, &format!("{rate}/s"), rate as u32, [ladder, 0.0, 0.0]);
        let rules = limiter(vec![rule]).rule_set(["rule"]).unwrap();
        overload(&rules, 3 * rate, 0, 2);
        let before = at(2_000);
        let passed = (0..10_000 * rate / 250).filter(|turn| {
            let now = before + Duration::from_micros(turn * 250_000 / rate);
            rules.decide(&of(ORDINARY), Cost::ONE, now).is_allowed()
        }).count() as u64;
        prop_assert!(passed.abs_diff(10 * rate) <= 2 + rate / 500, "{} of {}", passed, 10 * rate);
    }
}
