//! What one decision costs: `cargo bench --package limiter`. Figures are in docs/adr/0008-keyed-limits-under-flood.md.

use std::cell::Cell;
use std::hint::black_box;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use divan::Bencher;
use limiter::{
    Backing, Class, Cost, KeyHash, LeaseSettings, Limiter, LimiterSettings, Mode, Moment, Quota, Rule, RuleSet,
    Subject, Tier, Weight,
};

fn main() {
    divan::main();
}

/// Generous, so that all passes, at a microsecond a request.
const OPEN: (&str, u32) = ("9000000/s", 10_000_000);
/// So little that nothing passes twice.
const SHUT: (&str, u32) = ("1/d", 1);
const WIDE: [Tier; 4] = [Tier::Device, Tier::User, Tier::Node, Tier::Cluster];

fn quota((rate, burst): (&str, u32)) -> Quota {
    Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn rules(tiers: &[Tier], numbers: (&str, u32), keys: usize) -> RuleSet {
    rule_set(tiers.iter().map(|tier| Rule::new(format!("{tier:?}"), *tier, quota(numbers))).collect(), keys)
}

fn rule_set(rules: Vec<Rule>, keys: usize) -> RuleSet {
    let lease = LeaseSettings::new(1, NonZeroU32::MIN, Backing::Alone);
    let settings = LimiterSettings { keys: NonZeroUsize::new(keys).unwrap(), lease };
    let names: Vec<_> = rules.iter().map(|rule| rule.name.clone()).collect();
    let limiter = Limiter::new(rules, &[Weight::ONE], settings, Moment::ORIGIN).unwrap();
    limiter.rule_set(names.iter().map(|name| &**name)).unwrap()
}

fn run(bencher: Bencher, rules: RuleSet, keys: u64) {
    let turn = Cell::new(1);
    bencher.bench_local(|| {
        turn.set(turn.get() + 1);
        // An odd multiplier visits every key before any comes twice.
        let key = KeyHash(turn.get() * 0x9e37_79b9 % keys);
        let subject = Subject { device: key, user: Some(key), class: Class(0), keys: &[] };
        let now = Moment::ORIGIN + Duration::from_micros(turn.get());
        black_box(rules.decide(black_box(&subject), Cost::ONE, now))
    });
}

#[divan::bench(args = [1, 1_000_000], sample_size = 1_000)]
fn one_rule_allowed(bencher: Bencher, keys: u64) {
    run(bencher, rules(&WIDE[..1], OPEN, 1_000_000), keys);
}

#[divan::bench(args = [1, 1_000_000], sample_size = 1_000)]
fn one_rule_denied(bencher: Bencher, keys: u64) {
    let rules = rules(&WIDE[..1], SHUT, 1_000_000);
    for key in 0..keys {
        let subject = Subject { device: KeyHash(key), user: None, class: Class(0), keys: &[] };
        // A few find a ghost of the same tag, and are denied already.
        black_box(rules.decide(&subject, Cost::ONE, Moment::ORIGIN).is_allowed());
    }
    run(bencher, rules, keys);
}

#[divan::bench(args = [1, 1_000_000], sample_size = 1_000)]
fn four_rules_allowed(bencher: Bencher, keys: u64) {
    run(bencher, rules(&WIDE, OPEN, 1_000_000), keys);
}

/// What rules that are off, and wait for a trial, add to one that is enforced.
#[divan::bench(sample_size = 1_000)]
fn one_rule_allowed_three_off(bencher: Bencher) {
    let rule = |(index, tier): (usize, &Tier)| {
        let mode = if index == 0 { Mode::Enforce } else { Mode::Off };
        Rule { mode, ..Rule::new(format!("{tier:?}"), *tier, quota(OPEN)) }
    };
    run(bencher, rule_set(WIDE.iter().enumerate().map(rule).collect(), 1_000), 1);
}

#[divan::bench(sample_size = 1_000)]
fn four_rules_denied(bencher: Bencher) {
    run(bencher, rules(&WIDE, SHUT, 1_000_000), 1);
}
