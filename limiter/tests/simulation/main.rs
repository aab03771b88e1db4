//! The cluster limit of a whole fleet in virtual time: production leases and the reference
//! implementation of the script, compared with an ideal bucket that every request reaches without
//! delay. `--nocapture` prints the table.

mod catalogue;
mod chart;
mod fleet;
mod random;
mod reference;
mod scenario;
mod chaos;
mod network;
mod scale;

use std::sync::LazyLock;

use chaos::ChaosRun;
use scenario::{Outcome, Scenario};

/// In microseconds.
const MS: u64 = 1_000;
const SEED: u64 = 20_260;

static OUTCOMES: LazyLock<Vec<Outcome>> =
    LazyLock::new(|| catalogue::all().iter().map(|scenario| scenario.run(SEED)).collect());

#[test]
fn every_scenario_meets_its_guarantees() {
    print(&OUTCOMES);
    let violations: Vec<String> = OUTCOMES.iter().flat_map(Outcome::violations).collect();
    assert!(violations.is_empty(), "{violations:#?}");
}

/// `UPDATE_DOCS=1` regenerates the picture.
#[test]
fn the_picture_in_the_docs_matches_the_simulation() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/pictures/lease.svg");
    let expected = chart::draw(&OUTCOMES);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &expected).expect("docs/pictures exists");
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == expected, "docs/pictures/lease.svg differs from the simulation: `make docs` regenerates it");
}

/// `CHAOS_RUNS=3000` runs more of them.
#[test]
fn random_faults_never_break_the_bound() {
    let runs = std::env::var("CHAOS_RUNS").ok().and_then(|count| count.parse().ok()).unwrap_or(60);
    for seed in 0..runs {
        let ChaosRun { excess, excess_max, log, .. } = ChaosRun::run(seed);
        assert!(excess <= excess_max, "run {seed}: {excess} above rate * t, at most {excess_max}: {log:#?}");
    }
}

fn print(outcomes: &[Outcome]) {
    println!(
        "{:38} {:>5} {:>9} {:>8} {:>6} {:>9} {:>7} {:>8}",
        "", "nodes", "of ideal", "denied", "excess", "req/node", "req", "recovery"
    );
    for outcome in outcomes {
        let Scenario { name, nodes, burst, .. } = outcome.scenario;
        println!(
            "{name:38} {nodes:>5} {:>8.2}% {:>7.2}% {:>5.0}% {:>7}/s {:>5}/s {:>8}",
            outcome.of_ideal() * 100.0,
            outcome.denied() * 100.0,
            outcome.excess / f64::from(burst) * 100.0,
            outcome.requests_per_node,
            outcome.requests,
            outcome.recovery.map_or(String::new(), |millis| format!("{millis} ms")),
        );
    }
}
