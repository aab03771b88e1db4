//! The list of scenarios, with what each guarantees where that is less than nearly all requests.

use crate::scenario::Event::{ClockJump, CutOff, Down, FailedOver, Healed, Killed, Started, Up, UpEmpty};
use crate::scenario::{Demand, Event, Scenario, Spread};

pub(crate) const OUTAGE: &str = "5x, Redis down for 5 s";
pub(crate) const OUTAGE_RETURNS_EMPTY: &str = "5x, down for 5 s, returns empty";

pub(crate) fn all() -> Vec<Scenario> {
    [steady(), skewed(), uneven(), outages(), restarts()].concat()
}

fn twenty(name: &'static str, load: f64) -> Scenario {
    Scenario::new(name, 20, Demand::Steady(load))
}

fn steady() -> Vec<Scenario> {
    let mut all = Vec::new();
    for nodes in [1, 20, 100] {
        all.push(Scenario::new("0.9x", nodes, Demand::Steady(0.9)));
        all.push(Scenario::new("10x", nodes, Demand::Steady(10.0)));
    }
    all.push(Scenario { expected: 1, ..twenty("10x, 1 expected", 10.0) });
    all.push(Scenario { expected: 40, ..twenty("10x, 40 expected", 10.0) });
    all.push(Scenario { warm_up: 500, duration: 1_500, ..twenty("100x", 100.0) });
    all
}

/// The busiest of 100 nodes has a fifth of all demand. It holds a hundredth of half the burst and
/// fetches it at most 100 times a second: a smaller burst would not suffice for its share.
fn skewed() -> Vec<Scenario> {
    let skewed = |nodes, name, load| Scenario {
        spread: Spread::Zipf,
        burst: if nodes == 100 { 10_000 } else { 5_000 },
        ..Scenario::new(name, nodes, Demand::Steady(load))
    };
    vec![
        skewed(20, "0.9x, Zipf", 0.9),
        skewed(20, "10x, Zipf", 10.0),
        skewed(100, "0.9x, Zipf", 0.9),
        skewed(100, "10x, Zipf", 10.0),
    ]
}

/// A burst finds what the nodes hold and then waits for the next lease request: only the ideal
/// bucket has all of it at once.
fn uneven() -> Vec<Scenario> {
    let clock_jumps: &[(u64, Event)] = &[(1_500, ClockJump(3_600)), (2_500, ClockJump(-7_200))];
    vec![
        Scenario { of_ideal_min: 0.75, denied_max: 0.2, ..Scenario::new("bursts of 5x", 20, Demand::Bursts(0.2, 5.0)) },
        Scenario {
            events: &[(1_300, ClockJump(3_600))],
            of_ideal_min: 0.85,
            denied_max: 0.05,
            ..Scenario::new("10x after idling, Redis clock jumps", 20, Demand::Rises(0.05, 10.0))
        },
        Scenario { of_ideal_min: 0.98, lost: 10_000, ..twenty("5x, 1 % of messages lost", 5.0) },
        Scenario { events: clock_jumps, ..twenty("5x, Redis clock jumps by hours", 5.0) },
        Scenario { events: clock_jumps, ..twenty("0.9x, Redis clock jumps by hours", 0.9) },
    ]
}

/// 100 ms unavailable, 100 ms available.
const FLAPS: &[(u64, Event)] = &[
    (1_000, Down),
    (1_100, Up),
    (1_200, Down),
    (1_300, Up),
    (1_400, Down),
    (1_500, Up),
    (1_600, Down),
    (1_700, Up),
    (1_800, Down),
    (1_900, Up),
    (2_000, Down),
    (2_100, Up),
    (2_200, Down),
    (2_300, Up),
    (2_400, Down),
    (2_500, Up),
    (2_600, Down),
    (2_700, Up),
    (2_800, Down),
    (2_900, Up),
];

/// Without Redis, a fleet admits 0.8 of the rate; 0.2 of 5 s in 6.5 s are lost.
fn outages() -> Vec<Scenario> {
    let long = |name, load, events| Scenario {
        events,
        duration: 8_500,
        of_ideal_min: 0.84,
        denied_max: 0.16,
        ..twenty(name, load)
    };
    let short = |name, load, events| Scenario {
        events,
        duration: 4_000,
        of_ideal_min: 0.95,
        denied_max: 0.05,
        ..twenty(name, load)
    };
    vec![
        long(OUTAGE, 5.0, &[(2_000, Down), (7_000, Up)]),
        long("0.9x, Redis down for 5 s", 0.9, &[(2_000, Down), (7_000, Up)]),
        long(OUTAGE_RETURNS_EMPTY, 5.0, &[(2_000, Down), (7_000, UpEmpty)]),
        long("0.9x, down for 5 s, returns empty", 0.9, &[(2_000, Down), (7_000, UpEmpty)]),
        long("5x, 5 of 20 cut off for 5 s", 5.0, &[(2_000, CutOff(5)), (7_000, Healed)]),
        Scenario {
            expected: 1,
            ..long("5x, 5 of 20 cut off, 1 expected", 5.0, &[(2_000, CutOff(5)), (7_000, Healed)])
        },
        long("0.9x, 5 of 20 cut off for 5 s", 0.9, &[(2_000, CutOff(5)), (7_000, Healed)]),
        Scenario {
            spread: Spread::Zipf,
            ..short("5x, Zipf, Redis restarts empty", 5.0, &[(2_000, Down), (2_200, UpEmpty)])
        },
        short("5x, Redis flaps", 5.0, FLAPS),
        short("5x, all cut off for 150 ms", 5.0, &[(2_000, CutOff(20)), (2_150, Healed)]),
        short("5x, Redis restarts empty", 5.0, &[(2_000, Down), (2_200, UpEmpty)]),
        short("5x, failover loses 1 s", 5.0, &[(2_000, Down), (2_100, FailedOver)]),
    ]
}

/// A process is killed, and another starts in its place at once or later. Guaranteed is when the
/// fleet has the rate again.
fn restarts() -> Vec<Scenario> {
    let at_once: &[(u64, Event)] = &[(2_000, Killed(1)), (2_100, Started(1))];
    let quarter: &[(u64, Event)] = &[(2_000, Killed(5)), (2_100, Started(5))];
    let all: &[(u64, Event)] = &[(2_000, Killed(20)), (2_100, Started(20))];
    let restart = |name, nodes, load, events| Scenario {
        events,
        of_ideal_min: 0.75,
        denied_max: 0.2,
        recovery_max: 500,
        ..Scenario::new(name, nodes, Demand::Steady(load))
    };
    vec![
        restart("5x, killed and restarted", 1, 5.0, at_once),
        restart("0.9x, killed and restarted", 1, 0.9, at_once),
        restart("5x, killed, restarted after 1 s", 1, 5.0, &[(2_000, Killed(1)), (3_000, Started(1))]),
        restart("5x, 5 killed and restarted", 20, 5.0, quarter),
        Scenario { expected: 1, ..restart("5x, 5 restarted, 1 expected", 20, 5.0, quarter) },
        restart("5x, all killed and restarted", 20, 5.0, all),
        restart(
            "5x, restarts in a row",
            20,
            5.0,
            &[
                (1_500, Killed(1)),
                (1_520, Started(1)),
                (1_800, Killed(1)),
                (1_900, Started(1)),
                (2_000, Killed(3)),
                (2_100, Started(3)),
            ],
        ),
    ]
}
