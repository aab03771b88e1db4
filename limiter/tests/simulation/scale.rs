//! Lease requests by the size of the fleet and the burst, from production leases in virtual time:
//! the section `lease` of docs/scale.md.

use std::fmt::Write as _;

use crate::SEED;
use crate::scenario::{Demand, Outcome, Scenario};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/scale.md");
const NODES: [u32; 5] = [1, 5, 20, 100, 400];
const BURSTS: [u32; 2] = [5_000, 50_000];
/// The slowest measured run of the script, in microseconds of one core of Redis.
const SCRIPT_MICROS: f64 = 10.8;
/// Requests per second that all nodes together may send to one limit: the interval grows with the
/// fleet.
const REQUESTS_MAX: u64 = 10_000;

fn outcomes() -> Vec<Outcome> {
    let scenario = |nodes, burst| Scenario {
        burst,
        duration: 3_000,
        of_ideal_min: 0.0,
        denied_max: 1.0,
        ..Scenario::new("scale", nodes, Demand::Steady(1.5))
    };
    BURSTS.iter().flat_map(|burst| NODES.map(|nodes| scenario(nodes, *burst).run(SEED))).collect()
}

fn table(outcomes: &[Outcome]) -> String {
    let mut out = String::from(
        "| gateways | burst | lease requests/s of each | of all, for one limit | core of Redis | admitted of the ideal bucket |\n\
         |---|---|---|---|---|---|\n",
    );
    for outcome in outcomes {
        writeln!(
            out,
            "| {} | {} | {} | {} | {:.1} % | {:.1} % |",
            outcome.scenario.nodes,
            outcome.scenario.burst,
            outcome.requests_per_node,
            outcome.requests,
            100.0 * outcome.requests as f64 * SCRIPT_MICROS / 1e6,
            100.0 * outcome.of_ideal()
        )
        .expect("writing to a string does not fail");
    }
    out
}

/// The page with another text between the marks of a section.
fn replaced(page: &str, section: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- {section} -->\n"), format!("<!-- /{section} -->"));
    let (before, rest) = page.split_once(&begin).expect("the section begins");
    let (_, after) = rest.split_once(&end).expect("the section ends");
    format!("{before}{begin}{text}{end}{after}")
}

/// `UPDATE_DOCS=1` regenerates the section.
#[test]
fn scale_page_has_the_lease_requests_of_the_simulation() {
    let outcomes = outcomes();
    for outcome in &outcomes {
        let nodes = outcome.scenario.nodes;
        assert!(outcome.requests <= REQUESTS_MAX, "{nodes}: {} requests", outcome.requests);
        assert!(outcome.excess <= outcome.excess_max, "{nodes}: {} tokens over the bound", outcome.excess);
    }
    let page = std::fs::read_to_string(PAGE).expect("docs/scale.md");
    let expected = replaced(&page, "lease", &table(&outcomes));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(PAGE, &expected).expect("docs/scale.md is writable");
    } else {
        assert!(page == expected, "docs/scale.md differs from the simulation: `make docs` regenerates it");
    }
}
