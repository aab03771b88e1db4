//! An upstream with workers and a queue, clients that give up, and the queue in front of the limit,
//! simulated with a virtual clock. Every run has a seed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use super::config::ConcurrencyConfig;
use super::estimator::LimitEstimator;
use super::queue::WaitQueue;

/// How the upstream and its clients behave at a time.
#[derive(Clone, Copy)]
pub(super) struct Conditions {
    /// Calls per second.
    pub(super) rate: f64,
    /// Calls that the upstream serves at a time.
    pub(super) workers: usize,
    /// Mean service time of a call, exponentially distributed around nine tenths of it.
    pub(super) service: Duration,
    /// A second kind of calls: its part of all, and its service time.
    pub(super) slow: Option<(f64, Duration)>,
    /// The time that each call spends on the way, without a worker.
    pub(super) network: Duration,
}

impl Conditions {
    /// Calls per second that the upstream can serve.
    pub(super) fn capacity(&self) -> f64 {
        let mean = match self.slow {
            Some((part, slow)) => self.service.as_secs_f64() * (1.0 - part) + slow.as_secs_f64() * part,
            None => self.service.as_secs_f64(),
        };
        self.workers as f64 / mean
    }
}

/// Whether the calls are limited.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Limiting {
    Adaptive,
    Off,
}

/// One second of a run.
#[derive(Clone, Copy, Default)]
pub(super) struct Second {
    pub(super) offered: usize,
    /// Calls that ended before their clients gave up.
    pub(super) good: usize,
    pub(super) rejected: usize,
    pub(super) limit: usize,
    pub(super) in_flight: usize,
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
pub(super) fn run(
    limiting: Limiting,
    (seconds, seed): (usize, u64),
    conditions: impl Fn(usize) -> Conditions,
) -> Vec<Second> {
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
