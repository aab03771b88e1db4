//! Figures of large fleets from the constants of this crate: the sections `slots`, `connections`
//! and `duplicates` of docs/scale.md.

use std::fmt::Write as _;

use crate::bus::{heartbeats_per_second, members_read_per_second};
use crate::key::KeyBuilder;
use crate::placement::{Slot, SlotTable};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/scale.md");
const FLEETS: [usize; 4] = [5, 20, 100, 400];
const WORKERS: [usize; 2] = [4, 16];
const KEYS: usize = 100_000;
/// Connections of one thread to one server: small reads, large reads, writes (docs/operations.md).
const CONNECTIONS_PER_WORKER: usize = 3;
/// Of a process to one server, for the bus.
const CONNECTIONS_OF_BUS: usize = 1;
/// Redis's default.
const MAXCLIENTS: usize = 10_000;

fn rows(out: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(out, "{arguments}").expect("writing to a string does not fail");
}

/// The share of the busiest endpoint relative to the mean, by slots and by keys.
fn busiest(slots: u16, endpoints: usize) -> (f64, f64) {
    let labels: Vec<String> = (0..endpoints).map(|number| format!("redis://10.0.0.{number}:6379")).collect();
    let table = SlotTable::assign(slots, &labels);
    let mut keys = vec![0_usize; endpoints];
    let mut builder = KeyBuilder::new();
    for number in 0..KEYS {
        let path = format!("/product/{number}");
        let key = builder.clear().part(b"http").part(b"shop.example").part(path.as_bytes());
        keys[table.owner(Slot::for_key(&key.key(), slots))] += 1;
    }
    let most_slots = usize::from(slots).div_ceil(endpoints) * endpoints;
    let most_keys = keys.into_iter().max().unwrap_or(0) * endpoints;
    (most_slots as f64 / f64::from(slots), most_keys as f64 / KEYS as f64)
}

fn slots_table() -> String {
    let mut out = String::from(
        "| slots | Redis servers | busiest server by slots, of the mean | by 100,000 keys |\n|---|---|---|---|\n",
    );
    for slots in [16, 64, 256, 1_024] {
        for endpoints in [4, 12, 50] {
            if endpoints > usize::from(slots) {
                rows(&mut out, format_args!("| {slots} | {endpoints} | refused: a server would have no slot | |"));
                continue;
            }
            let (by_slots, by_keys) = busiest(slots, endpoints);
            rows(&mut out, format_args!("| {slots} | {endpoints} | {by_slots:.2} | {by_keys:.2} |"));
        }
    }
    out
}

fn connections_table() -> String {
    let mut out = String::from(
        "| gateways | workers of each | connections to one server | of `maxclients` 10,000 | bus messages/s at one server, idle | member names/s that it sends |\n\
         |---|---|---|---|---|---|\n",
    );
    for nodes in FLEETS {
        for workers in WORKERS {
            let connections = nodes * (workers * CONNECTIONS_PER_WORKER + CONNECTIONS_OF_BUS);
            let share = 100.0 * connections as f64 / MAXCLIENTS as f64;
            let heartbeats = nodes as f64 * heartbeats_per_second();
            let names = nodes as f64 * members_read_per_second(nodes);
            rows(
                &mut out,
                format_args!("| {nodes} | {workers} | {connections} | {share:.0} % | {heartbeats:.0} | {names:.0} |"),
            );
        }
    }
    out
}

fn duplicates_table() -> String {
    let mut out = String::from(
        "| gateways | workers of each | copies of one hot response in memory | deliveries of one purge | invalidations/s of 100 changed keys/s that all gateways hold |\n\
         |---|---|---|---|---|\n",
    );
    for nodes in FLEETS {
        for workers in WORKERS {
            // One in the memory that threads share, and one in the table of each thread.
            let copies = nodes * (workers + 1);
            rows(&mut out, format_args!("| {nodes} | {workers} | {copies} | {nodes} | {} |", 100 * nodes));
        }
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

/// `UPDATE_DOCS=1` regenerates the sections.
#[test]
fn scale_page_has_the_figures_of_the_constants() {
    let page = std::fs::read_to_string(PAGE).expect("docs/scale.md");
    let sections = [("slots", slots_table()), ("connections", connections_table()), ("duplicates", duplicates_table())];
    let expected = sections.iter().fold(page.clone(), |page, (section, text)| replaced(&page, section, text));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(PAGE, &expected).expect("docs/scale.md is writable");
    } else {
        assert!(page == expected, "docs/scale.md differs from the constants: `make docs` regenerates it");
    }
}
