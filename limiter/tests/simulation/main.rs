//! The cluster limit as a whole fleet in virtual time: the leases of production and the twin of the script, beside
//! the ideal bucket that every request would ask. `--nocapture` shows the table.

mod catalogue;
mod chart;
mod fleet;
mod random;
mod reference;
mod scenario;
mod storm;
mod wire;

use std::sync::LazyLock;

use scenario::{Outcome, Scenario};
use storm::Storm;

/// In microseconds.
const MS: u64 = 1_000;
const SEED: u64 = 20_260;

static OUTCOMES: LazyLock<Vec<Outcome>> =
    LazyLock::new(|| catalogue::all().iter().map(|scenario| scenario.run(SEED)).collect());

#[test]
fn every_scenario_keeps_what_is_promised() {
    print(&OUTCOMES);
    let broken: Vec<String> = OUTCOMES.iter().flat_map(Outcome::broken).collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

/// `UPDATE_DOCS=1` draws it anew.
#[test]
fn the_picture_shows_what_the_simulation_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/pictures/lease.svg");
    let drawn = chart::draw(&OUTCOMES);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &drawn).expect("docs/pictures is there");
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == drawn, "docs/pictures/lease.svg is not what the simulation says: `make docs` draws it anew");
}

/// `STORMS=3000` looks longer.
#[test]
fn no_storm_breaks_the_bound() {
    let storms = std::env::var("STORMS").ok().and_then(|count| count.parse().ok()).unwrap_or(60);
    for seed in 0..storms {
        let Storm { excess, excess_max, log, .. } = Storm::blow(seed);
        assert!(excess <= excess_max, "storm {seed}: {excess} above rate * t, at most {excess_max}: {log:#?}");
    }
}

fn print(outcomes: &[Outcome]) {
    println!(
        "{:38} {:>5} {:>9} {:>8} {:>6} {:>9} {:>7} {:>8}",
        "", "nodes", "of ideal", "denied", "excess", "asks/node", "asks", "recovery"
    );
    for outcome in outcomes {
        let Scenario { name, nodes, burst, .. } = outcome.scenario;
        println!(
            "{name:38} {nodes:>5} {:>8.2}% {:>7.2}% {:>5.0}% {:>7}/s {:>5}/s {:>8}",
            outcome.of_ideal() * 100.0,
            outcome.denied() * 100.0,
            outcome.excess / f64::from(burst) * 100.0,
            outcome.asks_per_node,
            outcome.asks,
            outcome.recovery.map_or(String::new(), |millis| format!("{millis} ms")),
        );
    }
}
