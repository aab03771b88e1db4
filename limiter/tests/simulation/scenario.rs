//! Owns the scenarios: who asks for how much, what happens meanwhile, and what came of it.

use std::num::NonZeroU32;

use limiter::{Quota, Rate};

use crate::MS;
use crate::fleet::{Fleet, Tick};

pub(crate) const RATE: u64 = 10_000;
/// What is looked at to tell whether the fleet has its rate again, in milliseconds: a node alone fetches its tokens four
/// or five times in 100 ms.
const WINDOW: usize = 100;
const WINDOW_ALONE: usize = 200;

/// How the demand is spread over nodes.
#[derive(Clone, Copy)]
pub(crate) enum Spread {
    Even,
    /// The k-th node has 1/k of what the first has.
    Zipf,
}

/// How the demand goes on in time, in parts of the rate.
#[derive(Clone, Copy)]
pub(crate) enum Demand {
    Steady(f64),
    /// So much, and for 200 ms of every second so much.
    Bursts(f64, f64),
    /// So much, and from the second second on so much.
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
    Back,
    BackEmpty,
    /// A replica that is a second behind takes over.
    BackOneSecondOlder,
    /// So many nodes cannot reach Redis; messages vanish.
    CutOff(usize),
    Healed,
    /// So many processes are killed; others take their place.
    Killed(usize),
    Started(usize),
    /// The treasury's clock jumps by so many seconds.
    Jump(i64),
}

#[derive(Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) nodes: u32,
    /// As configured.
    pub(crate) expected: u32,
    pub(crate) burst: u32,
    pub(crate) demand: Demand,
    pub(crate) spread: Spread,
    /// Messages of a million that vanish.
    pub(crate) lost: u64,
    /// When, in milliseconds, and what.
    pub(crate) events: &'static [(u64, Event)],
    /// In milliseconds; the first `warm_up` are not counted.
    pub(crate) warm_up: u64,
    pub(crate) lasts: u64,
    /// What is promised of it, as parts of one: the least that is admitted of what the ideal bucket admits, and the
    /// most that is denied of all requests beyond what it denies.
    pub(crate) of_ideal_min: f64,
    pub(crate) denied_max: f64,
    /// And the time after the last event until the fleet has 0.9 of its rate, in milliseconds.
    pub(crate) back_within: usize,
}

impl Scenario {
    /// A second's warm-up, then three in which nothing happens.
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
            lasts: 4_000,
            of_ideal_min: 0.99,
            denied_max: 0.01,
            back_within: 200,
        }
    }

    fn quota(&self) -> Quota {
        let rate = Rate::new(RATE, 1).expect("a rate");
        Quota::new(rate, NonZeroU32::new(self.burst).expect("not zero")).expect("a quota")
    }

    pub(crate) fn run(&self, seed: u64) -> Outcome {
        let mut fleet = Fleet::new(self.quota(), self.nodes, self.expected, seed);
        fleet.wire.lost = self.lost;
        if self.events.iter().any(|(_, event)| matches!(event, Event::BackOneSecondOlder)) {
            fleet.keep_copies();
        }
        let parts: Vec<f64> = (1..=self.nodes)
            .map(|rank| match self.spread {
                Spread::Even => 1.0,
                Spread::Zipf => 1.0 / f64::from(rank),
            })
            .collect();
        let whole: f64 = parts.iter().sum();
        for millis in 0..self.lasts {
            for (_, event) in self.events.iter().filter(|(at, _)| *at == millis) {
                apply(*event, &mut fleet);
            }
            let demand = RATE as f64 * self.demand.at(millis) / whole;
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
        let asks = || fleet.nodes.iter().map(|node| node.asks);
        let back = self.events.iter().rev().find(|(_, event)| event.is_return()).map(|(at, _)| *at as usize);
        let failovers = self.events.iter().filter(|(_, event)| matches!(event, Event::BackOneSecondOlder)).count();
        Outcome {
            scenario: *self,
            sum,
            excess: fleet.audit.worst,
            excess_max: f64::from(self.burst) + failovers as f64 * f64::from(self.burst / 2),
            asks_per_node: asks().max().unwrap_or(0) * 1_000_000 / (self.lasts * MS),
            asks: asks().sum::<u64>() * 1_000_000 / (self.lasts * MS),
            recovery: back
                .map(|back| recovery(&fleet.ticks, back, if self.nodes == 1 { WINDOW_ALONE } else { WINDOW })),
            ticks: fleet.ticks.clone(),
        }
    }
}

impl Event {
    fn is_return(self) -> bool {
        !matches!(self, Event::Down | Event::CutOff(_) | Event::Killed(_) | Event::Jump(_))
    }
}

fn apply(event: Event, fleet: &mut Fleet) {
    match event {
        Event::Down => fleet.wire.is_down = true,
        Event::Back => fleet.wire.is_down = false,
        Event::BackEmpty => {
            fleet.wire.is_down = false;
            fleet.lose_all();
        }
        Event::BackOneSecondOlder => {
            fleet.wire.is_down = false;
            fleet.lose_a_second();
        }
        Event::CutOff(nodes) => fleet.wire.cut_off[..nodes].fill(true),
        Event::Healed => fleet.wire.cut_off.fill(false),
        Event::Killed(nodes) => (0..nodes).for_each(|node| fleet.kill(node)),
        Event::Started(nodes) => (0..nodes).for_each(|node| fleet.start(node)),
        Event::Jump(seconds) => fleet.redis_ahead += seconds * 1_000_000,
    }
}

/// Milliseconds from `back` to the end of the last window that is poorer than 0.9 of the ideal.
fn recovery(ticks: &[Tick], back: usize, width: usize) -> usize {
    let is_poor = |window: &[Tick]| {
        let sum = |of: fn(&Tick) -> u64| window.iter().map(of).sum::<u64>() as f64;
        sum(|tick| tick.admitted) < 0.9 * sum(|tick| tick.offered).min(RATE as f64 * width as f64 / 1_000.0)
    };
    let poor = ticks[back..].windows(width).rposition(is_poor);
    // The window that begins a millisecond later is rich enough.
    poor.map_or(0, |start| start + 1)
}

pub(crate) struct Outcome {
    pub(crate) scenario: Scenario,
    /// What came after the warm-up.
    pub(crate) sum: Tick,
    /// The largest excess of any window over `rate * t`, in tokens, and what is allowed: the burst, and what the bucket
    /// holds of it for each failover.
    pub(crate) excess: f64,
    pub(crate) excess_max: f64,
    /// Asks a second of the node that asks most, and of all.
    pub(crate) asks_per_node: u64,
    pub(crate) asks: u64,
    /// In milliseconds, where Redis or nodes came back.
    pub(crate) recovery: Option<usize>,
    pub(crate) ticks: Vec<Tick>,
}

impl Outcome {
    /// What was admitted, of what the ideal bucket admits.
    pub(crate) fn of_ideal(&self) -> f64 {
        self.sum.admitted as f64 / self.sum.ideal as f64
    }

    /// What was denied beyond what the ideal bucket denies, of all requests.
    pub(crate) fn denied(&self) -> f64 {
        self.sum.ideal.saturating_sub(self.sum.admitted) as f64 / self.sum.offered as f64
    }

    /// The promises that were not kept.
    pub(crate) fn broken(&self) -> Vec<String> {
        let Scenario { name, nodes, of_ideal_min, denied_max, back_within, .. } = self.scenario;
        let promises = [
            (self.excess <= self.excess_max, format!("{} above rate * t", self.excess)),
            (self.of_ideal() >= of_ideal_min, format!("{:.4} of the ideal", self.of_ideal())),
            (self.denied() <= denied_max, format!("{:.4} denied falsely", self.denied())),
            (self.asks_per_node <= 100, format!("{} asks a second", self.asks_per_node)),
            (self.recovery.is_none_or(|millis| millis <= back_within), format!("back after {:?} ms", self.recovery)),
        ];
        let broken = promises.into_iter().filter(|(is_kept, _)| !is_kept);
        broken.map(|(_, what)| format!("{name} on {nodes} nodes: {what}")).collect()
    }
}
