//! The cost of one decision: `cargo bench --package limiter`.
//! docs/adr/0008-keyed-limits-under-flood.md has the results.

use std::cell::Cell;
use std::hint::black_box;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use divan::Bencher;
use limiter::{
    Cost, KeyHash, LeaseConfig, LeaseSource, Limiter, LimiterConfig, Mode, MonotonicTime, Quota, Rule, RuleSet, Scope,
    Subject, UserClass, Weight,
};

fn main() {
    divan::main();
}

/// Large enough that every request passes, at one request per microsecond.
const UNLIMITED: (&str, u32) = ("9000000/s", 10_000_000);
/// So small that nothing passes twice.
const EXHAUSTED: (&str, u32) = ("1/d", 1);
const SCOPES: [Scope; 4] = [Scope::Device, Scope::User, Scope::Node, Scope::Cluster];

fn quota((rate, burst): (&str, u32)) -> Quota {
    Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn rules(scopes: &[Scope], rate_and_burst: (&str, u32), keys: usize) -> RuleSet {
    rule_set(scopes.iter().map(|scope| Rule::new(format!("{scope:?}"), *scope, quota(rate_and_burst))).collect(), keys)
}

fn rule_set(rules: Vec<Rule>, keys: usize) -> RuleSet {
    let lease = LeaseConfig::new(1, NonZeroU32::MIN, LeaseSource::LocalFallback);
    let config = LimiterConfig { keys: NonZeroUsize::new(keys).unwrap(), lease };
    let names: Vec<_> = rules.iter().map(|rule| rule.name.clone()).collect();
    let limiter = Limiter::new(rules, &[Weight::ONE], config, MonotonicTime::ORIGIN).unwrap();
    limiter.rule_set(names.iter().map(|name| &**name)).unwrap()
}

fn run(bencher: Bencher, rules: RuleSet, keys: u64) {
    let turn = Cell::new(1);
    bencher.bench_local(|| {
        turn.set(turn.get() + 1);
        // An odd multiplier visits every key before any comes twice.
        let key = KeyHash(u128::from(turn.get() * 0x9e37_79b9 % keys));
        let subject = Subject { device: key, user: Some(key), class: UserClass(0), keys: &[] };
        let now = MonotonicTime::ORIGIN + Duration::from_micros(turn.get());
        black_box(rules.decide(black_box(&subject), Cost::ONE, now))
    });
}

#[divan::bench(args = [1, 1_000_000], sample_size = 1_000)]
fn one_rule_allowed(bencher: Bencher, keys: u64) {
    run(bencher, rules(&SCOPES[..1], UNLIMITED, 1_000_000), keys);
}

#[divan::bench(args = [1, 1_000_000], sample_size = 1_000)]
fn one_rule_denied(bencher: Bencher, keys: u64) {
    let rules = rules(&SCOPES[..1], EXHAUSTED, 1_000_000);
    for key in 0..keys {
        let subject = Subject { device: KeyHash(u128::from(key)), user: None, class: UserClass(0), keys: &[] };
        // A few find an evicted key with the same tag and are denied already.
        black_box(rules.decide(&subject, Cost::ONE, MonotonicTime::ORIGIN).is_allowed());
    }
    run(bencher, rules, keys);
}

#[divan::bench(args = [1, 1_000_000], sample_size = 1_000)]
fn four_rules_allowed(bencher: Bencher, keys: u64) {
    run(bencher, rules(&SCOPES, UNLIMITED, 1_000_000), keys);
}

/// The cost of rules that are off, and may be enabled by an override, in addition to an enforced one.
#[divan::bench(sample_size = 1_000)]
fn one_rule_allowed_three_off(bencher: Bencher) {
    let rule = |(index, scope): (usize, &Scope)| {
        let mode = if index == 0 { Mode::Enforce } else { Mode::Off };
        Rule { mode, ..Rule::new(format!("{scope:?}"), *scope, quota(UNLIMITED)) }
    };
    run(bencher, rule_set(SCOPES.iter().enumerate().map(rule).collect(), 1_000), 1);
}

#[divan::bench(sample_size = 1_000)]
fn four_rules_denied(bencher: Bencher) {
    run(bencher, rules(&SCOPES, EXHAUSTED, 1_000_000), 1);
}
