//! The limit in runs with an upstream that is simulated, and their bounds.

use std::time::Duration;

use super::config::ConcurrencyConfig;
use super::estimator::LimitEstimator;
use super::simulated_upstream::{Conditions, Limiting, Second, run};
use crate::picture::{self, Panel};

const MS: Duration = Duration::from_millis(1);
/// 20 workers of 25 ms: 800 calls per second, of which 24 are in progress.
const BASE: Conditions = Conditions {
    rate: 400.0,
    workers: 20,
    service: Duration::from_millis(25),
    slow: None,
    network: Duration::from_millis(5),
};

/// A run with its bounds.
struct Scenario {
    name: &'static str,
    seconds: usize,
    conditions: fn(usize) -> Conditions,
    /// Least goodput of what the upstream can serve of what is offered.
    goodput: f64,
    may_reject: bool,
}

const SCENARIOS: [Scenario; 11] = [
    Scenario { name: "light load", seconds: 120, conditions: |_| BASE, goodput: 0.98, may_reject: false },
    Scenario {
        name: "step to twice the capacity",
        seconds: 120,
        conditions: |at| Conditions { rate: if at < 40 { 400.0 } else { 1_600.0 }, ..BASE },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "slow upstream: ten times slower for a minute",
        seconds: 180,
        conditions: |at| match at {
            60..120 => Conditions { rate: 160.0, service: Duration::from_millis(250), ..BASE },
            _ => Conditions { rate: 600.0, ..BASE },
        },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "three quarters of the workers are lost for a minute",
        seconds: 180,
        conditions: |at| Conditions { rate: 1_600.0, workers: if (60..120).contains(&at) { 5 } else { 20 }, ..BASE },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "two kinds of calls: 10 ms, and one in ten 200 ms",
        seconds: 180,
        conditions: |_| Conditions {
            rate: 1_400.0,
            service: Duration::from_millis(10),
            slow: Some((0.1, Duration::from_millis(200))),
            ..BASE
        },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "the way to the upstream is 100 ms longer for a minute",
        seconds: 180,
        conditions: |at| Conditions {
            rate: 1_600.0,
            network: if (60..120).contains(&at) { 105 * MS } else { 5 * MS },
            ..BASE
        },
        // It takes seconds to tell a longer way from a queue, and the limit to grow fourfold.
        goodput: 0.95,
        may_reject: true,
    },
    Scenario {
        name: "every call takes 100 ms in place of 5 for a minute, without overload",
        seconds: 180,
        conditions: |at| Conditions {
            workers: 1_000,
            service: if (60..120).contains(&at) { 100 * MS } else { 5 * MS },
            network: Duration::ZERO,
            ..BASE
        },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "every call takes 60 ms in place of 20 for a minute, without overload",
        seconds: 180,
        conditions: |at| Conditions {
            workers: 1_000,
            service: if (60..120).contains(&at) { 60 * MS } else { 20 * MS },
            network: Duration::ZERO,
            ..BASE
        },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "the way to the upstream is 30 ms longer for a minute, without overload",
        seconds: 180,
        conditions: |at| Conditions {
            rate: 700.0,
            network: if (60..120).contains(&at) { 35 * MS } else { 5 * MS },
            ..BASE
        },
        goodput: 0.98,
        may_reject: true,
    },
    Scenario {
        name: "idle for three minutes, then a burst",
        seconds: 300,
        conditions: |at| Conditions { rate: if (60..240).contains(&at) { 2.0 } else { 700.0 }, ..BASE },
        goodput: 0.98,
        may_reject: false,
    },
    Scenario {
        name: "an hour at twice the capacity",
        seconds: 3_600,
        conditions: |_| Conditions { rate: 400.0, workers: 5, ..BASE },
        goodput: 0.98,
        may_reject: true,
    },
];

/// The result of a scenario.
struct Outcome {
    seconds: Vec<Second>,
    /// Of what the upstream can serve of what is offered, after a quarter of a minute.
    goodput: f64,
    /// The same without a limit.
    unlimited: f64,
    rejected: usize,
    /// The mean limit of the last tenth, relative to that of the second tenth.
    drift: f64,
}

impl Scenario {
    fn run(&self) -> Outcome {
        let seconds = run(Limiting::Adaptive, (self.seconds, 7), self.conditions);
        let mean = |part: &[Second]| part.iter().map(|second| second.limit as f64).sum::<f64>() / part.len() as f64;
        let tenth = self.seconds / 10;
        let drift = mean(&seconds[self.seconds - tenth..]) / mean(&seconds[tenth..2 * tenth]) - 1.0;
        // Half an hour without a limit is as bad as five minutes.
        let unlimited = run(Limiting::Off, (self.seconds.min(300), 7), self.conditions);
        let rejected = seconds.iter().map(|second| second.rejected).sum();
        Outcome { goodput: self.goodput(&seconds), unlimited: self.goodput(&unlimited), seconds, rejected, drift }
    }

    fn goodput(&self, seconds: &[Second]) -> f64 {
        let counted = || seconds.iter().enumerate().skip(15);
        let good: usize = counted().map(|(_, second)| second.good).sum();
        let possible = counted().map(|(at, second)| (self.conditions)(at).capacity().min(second.offered as f64));
        good as f64 / possible.sum::<f64>()
    }

    fn panel(&self, outcome: &Outcome) -> Panel {
        let step = (self.seconds / 180).max(1);
        let line = |value: &dyn Fn(usize, &Second) -> f64| {
            outcome
                .seconds
                .iter()
                .enumerate()
                .step_by(step)
                .map(|(at, second)| (at as f64, value(at, second)))
                .collect()
        };
        let busy = |at: usize, _: &Second| {
            let conditions = (self.conditions)(at);
            let rate = conditions.capacity();
            conditions.workers as f64 + rate * conditions.network.as_secs_f64()
        };
        let lines =
            vec![line(&|_, second| second.limit as f64), line(&busy), line(&|_, second| second.in_flight as f64)];
        let highest = lines.iter().flatten().map(|(_, value): &(f64, f64)| *value).fold(0.0, f64::max);
        Panel {
            title: self.name.to_owned(),
            across: ("s", self.seconds as f64),
            highest: (highest / 20.0).ceil() * 20.0,
            lines,
        }
    }
}

#[test]
fn limit_keeps_the_goodput_of_the_upstream_whatever_the_load() {
    let outcomes: Vec<_> = SCENARIOS.iter().map(|scenario| (scenario, scenario.run())).collect();
    let mut table =
        "| load | goodput | without a limit | rejected | drift of the limit |\n|---|---|---|---|---|\n".to_owned();
    for (scenario, outcome) in &outcomes {
        let is_steady = matches!(scenario.name, "an hour at twice the capacity");
        let drift = if is_steady { format!("{:+.1} %", outcome.drift * 100.0) } else { "-".to_owned() };
        let Outcome { goodput, unlimited, rejected, .. } = outcome;
        table += &format!("| {} | {goodput:.3} | {unlimited:.3} | {rejected} | {drift} |\n", scenario.name);
        println!(
            "{}: {goodput:.3}, unlimited {unlimited:.3}, rejected {rejected}, drift {:.3}",
            scenario.name, outcome.drift
        );
        assert!(*goodput >= scenario.goodput, "{}: {goodput}", scenario.name);
        assert!(scenario.may_reject || *rejected == 0, "{}: {rejected} rejected", scenario.name);
        assert!(!is_steady || outcome.drift.abs() < 0.1, "{}: {}", scenario.name, outcome.drift);
    }
    picture::assert_table("concurrency", &table);
    let panels: Vec<_> = outcomes.iter().map(|(scenario, outcome)| scenario.panel(outcome)).collect();
    let title = (
        "The concurrency limit by load",
        "Simulated with a virtual clock: 20 workers of 25 ms behind a way of 5 ms; clients give up after 1 s.",
    );
    picture::assert_file(
        "pictures/concurrency.svg",
        &picture::draw(title, &["limit", "needed for full throughput", "in progress"], &panels),
    );
}

/// The same guarantees with other seeds, without the hour.
#[test]
fn guarantees_do_not_depend_on_the_seed() {
    for seed in [1, 2] {
        for scenario in &SCENARIOS[..5] {
            let seconds = run(Limiting::Adaptive, (scenario.seconds, seed), scenario.conditions);
            let goodput = scenario.goodput(&seconds);
            assert!(goodput >= scenario.goodput - 0.01, "{} with seed {seed}: {goodput}", scenario.name);
            let rejected: usize = seconds.iter().map(|second| second.rejected).sum();
            assert!(scenario.may_reject || rejected == 0, "{} with seed {seed}: {rejected} rejected", scenario.name);
        }
    }
}

/// Calls that take longer, without a queue in the upstream, are told from overload within seconds.
#[test]
fn limit_admits_the_offered_load_soon_after_each_call_takes_longer() {
    for (rate, before, after) in [
        (250.0, 5, 100),
        (400.0, 5, 100),
        (2_000.0, 5, 100),
        (2_000.0, 5, 50),
        (4_000.0, 5, 100),
        (400.0, 20, 60),
        (400.0, 30, 75),
    ] {
        for seed in [1, 2, 7] {
            let seconds = run(Limiting::Adaptive, (90, seed), |at| Conditions {
                rate,
                workers: 10_000,
                service: MS * if at < 30 { before } else { after },
                slow: None,
                network: Duration::ZERO,
            });
            for (at, second) in seconds.iter().enumerate().skip(36) {
                let goodput = second.good as f64 / second.offered as f64;
                assert!(goodput > 0.8, "{rate} calls of {before}, then {after} ms, seed {seed}: {goodput} at {at} s");
            }
        }
    }
}

/// The limit, in use or nearly so, hides a small step in its estimate of waiting. The throughput
/// falls all the same.
#[test]
fn limit_follows_a_small_step_of_the_latency_before_the_next_regular_drain() {
    for (rate, before) in [(1_000.0, 20), (2_000.0, 20), (4_000.0, 10)] {
        for factor in [1.3, 1.5, 1.7, 2.0] {
            let lost = [1, 2, 3, 4].map(|seed| {
                let seconds = run(Limiting::Adaptive, (60, seed), |at| Conditions {
                    rate,
                    workers: 10_000,
                    service: (MS * before).mul_f64(if at < 40 { 1.0 } else { factor }),
                    slow: None,
                    network: Duration::ZERO,
                });
                let sum = |of: fn(&Second) -> usize| seconds[40..].iter().map(of).sum::<usize>() as f64;
                1.0 - sum(|second| second.good) / sum(|second| second.offered)
            });
            let mean = lost.iter().sum::<f64>() / lost.len() as f64;
            println!("{rate} calls of {before} ms, then {factor} times as long: {mean:.3} lost in 20 s");
            assert!(mean < 0.04, "{rate} calls of {before} ms, then {factor} times as long: {mean:.3}, {lost:.3?}");
        }
    }
}

/// Calls at even intervals that take `latency` each; more than the limit allows wait. Returns the
/// limit after `count` calls.
fn limit_after(
    estimator: &mut LimitEstimator,
    now: &mut Duration,
    (count, latency): (usize, Duration),
    in_flight: usize,
) -> usize {
    for _ in 0..count {
        let is_limited = in_flight >= estimator.limit();
        let running = in_flight.min(estimator.limit());
        estimator.note_start(running, if is_limited { MS } else { Duration::ZERO });
        *now += latency / u32::try_from(running).expect("few calls");
        estimator.record(now.saturating_sub(latency), running - 1, *now);
    }
    estimator.limit()
}

#[test]
fn limit_shrinks_if_it_is_hardly_used_and_the_upstream_is_faster_and_not_because_of_low_traffic() {
    let (mut now, mut estimator) = (Duration::ZERO, LimitEstimator::new(ConcurrencyConfig::default(), Duration::ZERO));
    // The upstream is as fast as without load whatever the limit, until a drain ends.
    let mut limited = 0;
    while limited < 100 || limited < estimator.limit() {
        limited = limit_after(&mut estimator, &mut now, (100, 100 * MS), 1_000);
        assert!(now < Duration::from_secs(60), "it grows as long as the latency stays");
    }
    // Half of it is used, or little at the same latency: nothing is known to be lower.
    assert!(limit_after(&mut estimator, &mut now, (3_000, 100 * MS), limited / 2) >= limited);
    let idle = limit_after(&mut estimator, &mut now, (500, 100 * MS), 2);
    assert!(idle >= limited / 2, "{idle} of {limited}: the last steps of its growth are not measured");
    let shrunk = limit_after(&mut estimator, &mut now, (3_000, 10 * MS), 2);
    assert!(shrunk < idle / 4, "{shrunk} of {idle}");
}

#[test]
fn limit_stays_within_its_bounds() {
    let config = ConcurrencyConfig { min: 8, max: 64, ..ConcurrencyConfig::default() };
    let (mut now, mut estimator) = (Duration::ZERO, LimitEstimator::new(config, Duration::ZERO));
    assert!((0..20).any(|_| limit_after(&mut estimator, &mut now, (1_000, 100 * MS), 1_000) == 64));
    for step in 0..200 {
        let latency = MS * (step % 50 + 1);
        let limit = limit_after(&mut estimator, &mut now, (300, latency), 1 + step as usize % 80);
        assert!((8..=64).contains(&limit), "{limit}");
    }
}
