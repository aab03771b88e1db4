//! The limit simulated with a virtual clock: an upstream with workers and a queue, clients that
//! give up, and the queue in front of the limit. Every run has a seed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use super::config::ConcurrencyConfig;
use super::estimator::LimitEstimator;
use super::queue::WaitQueue;
use crate::picture::{self, Panel};

/// How the upstream and its clients behave at a time.
#[derive(Clone, Copy)]
struct Conditions {
    /// Calls per second.
    rate: f64,
    /// Calls that the upstream serves at a time.
    workers: usize,
    /// Mean service time of a call, exponentially distributed around nine tenths of it.
    service: Duration,
    /// A second kind of calls: its part of all, and its service time.
    slow: Option<(f64, Duration)>,
    /// The time that each call spends on the way, without a worker.
    network: Duration,
}

impl Conditions {
    /// Calls per second that the upstream can serve.
    fn capacity(&self) -> f64 {
        let mean = match self.slow {
            Some((part, slow)) => self.service.as_secs_f64() * (1.0 - part) + slow.as_secs_f64() * part,
            None => self.service.as_secs_f64(),
        };
        self.workers as f64 / mean
    }
}

/// Whether the calls are limited.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Limiting {
    Adaptive,
    Off,
}

/// One second of a run.
#[derive(Clone, Copy, Default)]
struct Second {
    offered: usize,
    /// Calls that ended before their clients gave up.
    good: usize,
    rejected: usize,
    limit: usize,
    in_flight: usize,
}

const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Arrival,
    /// A call arrives at the upstream: when its client sent it, and when it was admitted.
    Received(Duration, Duration),
    Served(Duration, Duration),
    Answered(Duration, Duration),
}

struct Random(u64);

impl Random {
    /// Uniform in (0, 1].
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let number = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((number ^ (number >> 31)) >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }
}

struct Simulation {
    random: Random,
    events: BinaryHeap<Reverse<(Duration, usize, Happening)>>,
    count: usize,
    estimator: LimitEstimator,
    limiting: Limiting,
    waiting: WaitQueue<Duration>,
    wait: Duration,
    in_flight: usize,
    /// Calls that wait in the upstream.
    backlog: VecDeque<(Duration, Duration)>,
    busy: usize,
}

impl Simulation {
    fn push(&mut self, at: Duration, happening: Happening) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, happening)));
    }

    fn admit(&mut self, arrived: Duration, (now, conditions): (Duration, &Conditions)) {
        self.in_flight += 1;
        self.estimator.note_start(self.in_flight, now - arrived);
        self.push(now + conditions.network, Happening::Received(arrived, now));
    }

    fn serve(&mut self, call: (Duration, Duration), (now, conditions): (Duration, &Conditions)) {
        self.busy += 1;
        let mean = match conditions.slow {
            Some((part, slow)) if self.random.uniform() <= part => slow,
            _ => conditions.service,
        };
        let time = mean.mul_f64(0.1 + 0.9 * self.random.exponential());
        self.push(now + time, Happening::Served(call.0, call.1));
    }
}

/// Runs `seconds` seconds; `conditions` by second.
fn run(limiting: Limiting, (seconds, seed): (usize, u64), conditions: fn(usize) -> Conditions) -> Vec<Second> {
    let config = ConcurrencyConfig::default();
    let mut sim = Simulation {
        random: Random(seed),
        events: BinaryHeap::new(),
        count: 0,
        estimator: LimitEstimator::new(config, Duration::ZERO),
        limiting,
        waiting: WaitQueue::new(),
        wait: config.wait,
        in_flight: 0,
        backlog: VecDeque::new(),
        busy: 0,
    };
    let mut result = vec![Second::default(); seconds];
    sim.push(Duration::ZERO, Happening::Arrival);
    while let Some(Reverse((now, _, happening))) = sim.events.pop() {
        let second = now.as_secs() as usize;
        if second >= seconds {
            break;
        }
        let at = (now, &conditions(second));
        match happening {
            Happening::Arrival => {
                let interval = sim.random.exponential() / at.1.rate;
                sim.push(now + Duration::from_secs_f64(interval), Happening::Arrival);
                result[second].offered += 1;
                if sim.limiting == Limiting::Off || (sim.waiting.len() == 0 && sim.in_flight < sim.estimator.limit()) {
                    sim.admit(now, at);
                } else {
                    if sim.waiting.push(1_000, now, now).is_some() {
                        sim.estimator.note_rejection();
                        result[second].rejected += 1;
                    }
                }
            }
            Happening::Received(arrived, admitted) if sim.busy < at.1.workers => sim.serve((arrived, admitted), at),
            Happening::Received(arrived, admitted) => sim.backlog.push_back((arrived, admitted)),
            Happening::Served(arrived, admitted) => {
                sim.busy -= 1;
                sim.push(now, Happening::Answered(arrived, admitted));
                if sim.busy < at.1.workers
                    && let Some(call) = sim.backlog.pop_front()
                {
                    sim.serve(call, at);
                }
            }
            Happening::Answered(arrived, admitted) => {
                sim.in_flight -= 1;
                sim.estimator.record(admitted, sim.in_flight, now);
                result[second].good += usize::from(now - arrived <= PATIENCE);
                while sim.in_flight < sim.estimator.limit()
                    && let Some((_, arrived)) = sim.waiting.pop(now, |_| true)
                {
                    if now - arrived > sim.wait {
                        sim.estimator.note_rejection();
                        result[second].rejected += 1;
                    } else {
                        sim.admit(arrived, at);
                    }
                }
            }
        }
        result[second].limit = sim.estimator.limit();
        result[second].in_flight = sim.in_flight;
    }
    result
}

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

const SCENARIOS: [Scenario; 8] = [
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
