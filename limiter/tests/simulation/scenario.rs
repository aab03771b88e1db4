//! The scenarios: demand, events and outcome.

use std::num::NonZeroU32;

use limiter::{Quota, Rate};

use crate::MS;
use crate::fleet::{Fleet, Tick};

pub(crate) const RATE: u64 = 10_000;
/// The window in which the fleet must reach its rate again, in milliseconds: a single node fetches
/// its tokens four or five times in 100 ms.
const WINDOW: usize = 100;
const WINDOW_ALONE: usize = 200;

/// The distribution of the demand over nodes.
#[derive(Clone, Copy)]
pub(crate) enum Spread {
    Even,
    /// The k-th node has 1/k of the first node's demand.
    Zipf,
}

/// The demand over time, in multiples of the rate.
#[derive(Clone, Copy)]
pub(crate) enum Demand {
    Steady(f64),
    /// The first value, and the second for 200 ms of every second.
    Bursts(f64, f64),
    /// The first value, and the second from the second second on.
    Rises(f64, f64),
}

impl Demand {
    fn at(self, millis: u64) -> f64 {
        match self {
            Demand::Steady(load) => load,
            Demand::Bursts(_, high) if millis % 1_000 >= 800 => high,
            Demand::Rises(_, high) if millis >= 1_000 => high,
            Demand::Bursts(low, _) | Demand::Rises(low, _) => low,
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Event {
    /// Redis refuses connections.
    Down,
    Up,
    UpEmpty,
    /// A replica that is a second behind takes over.
    FailedOver,
    /// This many nodes cannot reach Redis; messages are lost.
    CutOff(usize),
    Healed,
    /// This many processes are killed; others start in their place.
    Killed(usize),
    Started(usize),
    /// The backend's clock jumps by this many seconds.
    ClockJump(i64),
}

#[derive(Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) nodes: u32,
    /// The configured number of nodes.
    pub(crate) expected: u32,
    pub(crate) burst: u32,
    pub(crate) demand: Demand,
    pub(crate) spread: Spread,
    /// Lost messages per million.
    pub(crate) lost: u64,
    /// Time in milliseconds, and event.
    pub(crate) events: &'static [(u64, Event)],
    /// In milliseconds; the first `warm_up` are not counted.
    pub(crate) warm_up: u64,
    pub(crate) duration: u64,
    /// Guarantees, as fractions: the least that is admitted relative to the ideal bucket, and the
    /// most that is denied of all requests beyond what the ideal bucket denies.
    pub(crate) of_ideal_min: f64,
    pub(crate) denied_max: f64,
    /// Guarantee: the longest time after the last event until the fleet has 0.9 of its rate, in
    /// milliseconds.
    pub(crate) recovery_max: usize,
}

impl Scenario {
    /// One second of warm-up, then three seconds without events.
    pub(crate) const fn new(name: &'static str, nodes: u32, demand: Demand) -> Scenario {
        Scenario {
            name,
            nodes,
            expected: nodes,
            burst: 5_000,
            demand,
            spread: Spread::Even,
            lost: 0,
            events: &[],
            warm_up: 1_000,
            duration: 4_000,
            of_ideal_min: 0.99,
            denied_max: 0.01,
            recovery_max: 200,
        }
    }

    fn quota(&self) -> Quota {
        let rate = Rate::new(RATE, 1).expect("a rate");
        Quota::new(rate, NonZeroU32::new(self.burst).expect("not zero")).expect("a quota")
    }

    pub(crate) fn run(&self, seed: u64) -> Outcome {
        let mut fleet = Fleet::new(self.quota(), self.nodes, self.expected, seed);
        fleet.network.lost = self.lost;
        if self.events.iter().any(|(_, event)| matches!(event, Event::FailedOver)) {
            fleet.keep_history();
        }
        let parts: Vec<f64> = (1..=self.nodes)
            .map(|rank| match self.spread {
                Spread::Even => 1.0,
                Spread::Zipf => 1.0 / f64::from(rank),
            })
            .collect();
        let total: f64 = parts.iter().sum();
        for millis in 0..self.duration {
            for (_, event) in self.events.iter().filter(|(at, _)| *at == millis) {
                apply(*event, &mut fleet);
            }
            let demand = RATE as f64 * self.demand.at(millis) / total;
            fleet.tick(|index| demand * parts[index]);
        }
        self.outcome(&fleet)
    }

    fn outcome(&self, fleet: &Fleet) -> Outcome {
        let mut sum = Tick::default();
        for tick in &fleet.ticks[self.warm_up as usize..] {
            sum.offered += tick.offered;
            sum.admitted += tick.admitted;
            sum.ideal += tick.ideal;
        }
        let requests = || fleet.nodes.iter().map(|node| node.requests);
        let back = self.events.iter().rev().find(|(_, event)| event.is_recovery()).map(|(at, _)| *at as usize);
        let failovers = self.events.iter().filter(|(_, event)| matches!(event, Event::FailedOver)).count();
        Outcome {
            scenario: *self,
            sum,
            excess: fleet.audit.worst,
            excess_max: f64::from(self.burst) + failovers as f64 * f64::from(self.burst / 2),
            requests_per_node: requests().max().unwrap_or(0) * 1_000_000 / (self.duration * MS),
            requests: requests().sum::<u64>() * 1_000_000 / (self.duration * MS),
            recovery: back
                .map(|back| recovery(&fleet.ticks, back, if self.nodes == 1 { WINDOW_ALONE } else { WINDOW })),
            ticks: fleet.ticks.clone(),
        }
    }
}

impl Event {
    fn is_recovery(self) -> bool {
        !matches!(self, Event::Down | Event::CutOff(_) | Event::Killed(_) | Event::ClockJump(_))
    }
}

fn apply(event: Event, fleet: &mut Fleet) {
    match event {
        Event::Down => fleet.network.is_down = true,
        Event::Up => fleet.network.is_down = false,
        Event::UpEmpty => {
            fleet.network.is_down = false;
            fleet.reset_bucket();
        }
        Event::FailedOver => {
            fleet.network.is_down = false;
            fleet.fail_over();
        }
        Event::CutOff(nodes) => fleet.network.cut_off[..nodes].fill(true),
        Event::Healed => fleet.network.cut_off.fill(false),
        Event::Killed(nodes) => (0..nodes).for_each(|node| fleet.kill(node)),
        Event::Started(nodes) => (0..nodes).for_each(|node| fleet.start(node)),
        Event::ClockJump(seconds) => fleet.redis_ahead += seconds * 1_000_000,
    }
}

/// Milliseconds from `back` to the end of the last window that is below 0.9 of the ideal.
fn recovery(ticks: &[Tick], back: usize, width: usize) -> usize {
    let is_below = |window: &[Tick]| {
        let sum = |of: fn(&Tick) -> u64| window.iter().map(of).sum::<u64>() as f64;
        sum(|tick| tick.admitted) < 0.9 * sum(|tick| tick.offered).min(RATE as f64 * width as f64 / 1_000.0)
    };
    let below = ticks[back..].windows(width).rposition(is_below);
    // The window that begins a millisecond later is above.
    below.map_or(0, |start| start + 1)
}

pub(crate) struct Outcome {
    pub(crate) scenario: Scenario,
    /// Sums after the warm-up.
    pub(crate) sum: Tick,
    /// The largest excess of any window over `rate * t`, in tokens, and the largest allowed: the
    /// burst, plus the bucket's part of it for each failover.
    pub(crate) excess: f64,
    pub(crate) excess_max: f64,
    /// Lease requests per second: of the node that sends most, and of all nodes.
    pub(crate) requests_per_node: u64,
    pub(crate) requests: u64,
    /// In milliseconds, if Redis or nodes came back.
    pub(crate) recovery: Option<usize>,
    pub(crate) ticks: Vec<Tick>,
}

impl Outcome {
    /// The admitted requests, relative to those that the ideal bucket admits.
    pub(crate) fn of_ideal(&self) -> f64 {
        self.sum.admitted as f64 / self.sum.ideal as f64
    }

    /// The requests denied beyond those that the ideal bucket denies, relative to all requests.
    pub(crate) fn denied(&self) -> f64 {
        self.sum.ideal.saturating_sub(self.sum.admitted) as f64 / self.sum.offered as f64
    }

    /// The guarantees that were not met.
    pub(crate) fn violations(&self) -> Vec<String> {
        let Scenario { name, nodes, of_ideal_min, denied_max, recovery_max, .. } = self.scenario;
        let guarantees = [
            (self.excess <= self.excess_max, format!("{} above rate * t", self.excess)),
            (self.of_ideal() >= of_ideal_min, format!("{:.4} of the ideal", self.of_ideal())),
            (self.denied() <= denied_max, format!("{:.4} denied falsely", self.denied())),
            (self.requests_per_node <= 100, format!("{} lease requests a second", self.requests_per_node)),
            (self.recovery.is_none_or(|millis| millis <= recovery_max), format!("back after {:?} ms", self.recovery)),
        ];
        let violations = guarantees.into_iter().filter(|(is_met, _)| !is_met);
        violations.map(|(_, what)| format!("{name} on {nodes} nodes: {what}")).collect()
    }
}
