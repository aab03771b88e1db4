//! What was measured, as Markdown for people and as JSON for programs.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use serde_json::{Value, json};

use crate::bench::{Comparison, Measured, Plan, Sample};
use crate::peer::Peer;
use crate::process::Tools;
use crate::spread::Spread;

/// The peers that ratios are drawn to.
const YARDSTICKS: [Peer; 2] = [Peer::Nginx, Peer::NginxNosendfile];

/// Where and with what it was measured.
pub(crate) struct Machine {
    facts: Vec<(&'static str, String)>,
}

impl Machine {
    pub(crate) fn read(tools: &Tools, tidegate: &Path) -> Self {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let facts = vec![
            ("processor", format!("{}, {cores} cores available", processor())),
            ("kernel", read("/proc/sys/kernel/osrelease")),
            ("load before", read("/proc/loadavg")),
            ("nginx", version(&tools.nginx, "-v")),
            ("wrk", version(&tools.wrk, "-v")),
            ("tidegate", version(tidegate, "--version")),
            ("command", env::args().collect::<Vec<_>>().join(" ")),
        ];
        Machine { facts }
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(file).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

fn processor() -> String {
    let text = read("/proc/cpuinfo");
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

/// The first line a program prints about itself, on whichever stream.
fn version(program: &Path, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().next().map_or("unknown", str::trim).to_owned()
}

/// Spread over the rounds of one figure.
fn spread(measured: &Measured, figure: impl Fn(&Sample) -> f64) -> Spread {
    Spread::of(measured.samples.iter().map(figure)).unwrap_or(Spread { median: 0.0, min: 0.0, max: 0.0 })
}

/// How many times less CPU time `measured` needs than `yardstick`: a ratio per round, since rounds see the same noise.
fn cpu_ratio(measured: &Measured, yardstick: &Measured) -> Option<Spread> {
    let rounds = yardstick.samples.iter().zip(&measured.samples);
    Spread::of(rounds.map(|(yardstick, sample)| yardstick.cpu_per_request() / sample.cpu_per_request()))
}

fn rate_ratio(measured: &Measured, yardstick: &Measured) -> Option<Spread> {
    let rounds = yardstick.samples.iter().zip(&measured.samples);
    Spread::of(rounds.map(|(yardstick, sample)| sample.rate() / yardstick.rate()))
}

fn errors(measured: &Measured) -> u64 {
    measured.samples.iter().map(|sample| sample.errors).sum()
}

/// Errors of all peers in all rounds.
pub(crate) fn total_errors(comparisons: &[Comparison]) -> u64 {
    comparisons.iter().flat_map(|comparison| &comparison.peers).map(errors).sum()
}

fn micros(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

pub(crate) fn markdown(machine: &Machine, plan: &Plan, comparisons: &[Comparison]) -> String {
    let mut text = String::new();
    for (name, fact) in &machine.facts {
        line(&mut text, format_args!("- {name}: {fact}"));
    }
    let (rounds, seconds, connections) = (plan.rounds, plan.seconds, plan.connections);
    line(
        &mut text,
        format_args!(
            "\nMedians of {rounds} interleaved rounds of {seconds} s, {connections} connections; server on core 0, load and origin on \
             core 1. Ratios are of CPU time per request, drawn within each round: median (smallest to largest), above 1 is better. \
             Busy: how much of core 0 the server took, and everything else."
        ),
    );
    for comparison in comparisons {
        table(&mut text, comparison);
    }
    text
}

fn table(text: &mut String, comparison: &Comparison) {
    let yardsticks: Vec<&Measured> =
        YARDSTICKS.iter().filter_map(|peer| comparison.peers.iter().find(|measured| measured.peer == *peer)).collect();
    line(text, format_args!("\n### {}\n", comparison.workload.name()));
    let mut head =
        String::from("| peer | requests/s | CPU us/request (user + system) | p50 us | p99 us | errors | busy |");
    for yardstick in &yardsticks {
        head.push_str(&format!(" to {} |", yardstick.peer.name()));
    }
    line(text, format_args!("{head}\n|---|{}", "---:|".repeat(6 + yardsticks.len())));
    for measured in &comparison.peers {
        let median = |figure: fn(&Sample) -> f64| spread(measured, figure).median;
        let mut row = format!(
            "| {} | {:.0} | {:.2} ({:.2} + {:.2}) | {:.0} | {:.0} | {} | {:.0} % + {:.0} % |",
            measured.peer.name(),
            median(Sample::rate),
            median(Sample::cpu_per_request),
            median(Sample::user_per_request),
            median(Sample::system_per_request),
            median(|sample| micros(sample.report.p50)),
            median(|sample| micros(sample.report.p99)),
            errors(measured),
            median(Sample::busy) * 100.0,
            median(Sample::disturbed) * 100.0,
        );
        for yardstick in &yardsticks {
            match cpu_ratio(measured, yardstick) {
                Some(ratio) => row.push_str(&format!(" {:.2} ({:.2} to {:.2}) |", ratio.median, ratio.min, ratio.max)),
                None => row.push_str(" |"),
            }
        }
        line(text, format_args!("{row}"));
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("a String takes everything");
}

pub(crate) fn json(machine: &Machine, plan: &Plan, comparisons: &[Comparison]) -> Value {
    let facts = machine.facts.iter().map(|(name, fact)| (name.replace(' ', "_"), json!(fact)));
    json!({
        "machine": Value::Object(facts.collect()),
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "connections": plan.connections,
        "workloads": comparisons.iter().map(|comparison| json!({
            "name": comparison.workload.name(),
            "peers": comparison.peers.iter().map(|measured| peer(measured, comparison)).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
    })
}

fn peer(measured: &Measured, comparison: &Comparison) -> Value {
    let of = |figure: fn(&Sample) -> f64| spread_json(Some(spread(measured, figure)));
    let ratios = comparison.peers.iter().filter(|other| YARDSTICKS.contains(&other.peer)).map(|yardstick| {
        let ratios = json!({
            "cpu": spread_json(cpu_ratio(measured, yardstick)),
            "requests_per_second": spread_json(rate_ratio(measured, yardstick)),
        });
        (yardstick.peer.name().to_owned(), ratios)
    });
    json!({
        "name": measured.peer.name(),
        "requests_per_second": of(Sample::rate),
        "cpu_us_per_request": of(Sample::cpu_per_request),
        "user_us_per_request": of(Sample::user_per_request),
        "system_us_per_request": of(Sample::system_per_request),
        "p50_us": of(|sample| micros(sample.report.p50)),
        "p99_us": of(|sample| micros(sample.report.p99)),
        "server_share_of_core": of(Sample::busy),
        "others_share_of_core": of(Sample::disturbed),
        "errors": errors(measured),
        "ratio_to": Value::Object(ratios.collect()),
        "rounds": measured.samples.iter().map(sample).collect::<Vec<_>>(),
    })
}

fn spread_json(spread: Option<Spread>) -> Value {
    spread.map_or(Value::Null, |spread| json!({ "median": spread.median, "min": spread.min, "max": spread.max }))
}

fn sample(sample: &Sample) -> Value {
    json!({
        "requests": sample.report.requests,
        "bytes": sample.report.bytes,
        "duration_us": micros(sample.report.duration),
        "user_us": micros(sample.cpu.user),
        "system_us": micros(sample.cpu.system),
        "others_us": micros(sample.others),
        "p50_us": micros(sample.report.p50),
        "p99_us": micros(sample.report.p99),
        "errors": sample.errors,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::load::Report;
    use crate::usage::Cpu;
    use crate::workload::Workload;

    /// A round of one second and 1,000 requests; `cpu` in milliseconds is then also microseconds per request.
    fn round(cpu: u64) -> Sample {
        let second = Duration::from_secs(1);
        let report =
            Report { requests: 1_000, bytes: 0, duration: second, p50: second, p99: second, refused: 0, broken: 0 };
        let cpu = Cpu { user: Duration::from_millis(cpu), system: Duration::ZERO };
        Sample { report, errors: 1, cpu, others: Duration::ZERO, elapsed: second }
    }

    fn comparison() -> Comparison {
        let measured = |peer, cpus: [u64; 3]| Measured { peer, samples: cpus.map(round).to_vec() };
        let peers = vec![measured(Peer::Nginx, [10, 20, 12]), measured(Peer::Tidegate, [5, 5, 8])];
        Comparison { workload: Workload::Hit1k, peers }
    }

    #[test]
    fn ratios_are_drawn_within_rounds() {
        let comparison = comparison();
        let ratio = cpu_ratio(&comparison.peers[1], &comparison.peers[0]);
        assert_eq!(ratio, Some(Spread { median: 2.0, min: 1.5, max: 4.0 }));
    }

    #[test]
    fn the_table_has_one_column_for_each_yardstick_that_was_measured() {
        let mut text = String::new();
        table(&mut text, &comparison());
        let row = "| tidegate | 1000 | 5.00 (5.00 + 0.00) | 1000000 | 1000000 | 3 | 0 % + 0 % | 2.00 (1.50 to 4.00) |";
        assert!(text.contains(row), "{text}");
        let pipes: Vec<usize> = text.lines().skip(3).map(|line| line.matches('|').count()).collect();
        assert_eq!(pipes, [9, 9, 9, 9], "{text}");
        assert!(!text.contains("nosendfile"), "{text}");
    }

    #[test]
    fn the_json_has_medians_ratios_and_every_round() {
        let comparison = comparison();
        let value = peer(&comparison.peers[1], &comparison);
        assert_eq!(value["cpu_us_per_request"]["median"], 5.0);
        assert_eq!(value["ratio_to"]["nginx"]["cpu"]["max"], 4.0);
        assert_eq!(value["rounds"].as_array().map(Vec::len), Some(3));
        assert_eq!(total_errors(&[comparison]), 6);
    }
}
