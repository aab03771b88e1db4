//! `loadtest`: load generation for Tidegate. An origin, a comparison with other servers, and
//! scenarios.
//!
//! The modules below are in import order. `commands` has a file for each command; the modules above
//! it do the work: `process` and `servers` start programs, `load` puts load on them, `faults`
//! disturbs connections; `knee`, `bench`, `fleet`, `field_cases` and `scenarios` measure.

mod error;
mod spread;
mod durations;
mod seeded_random;
mod interrupt;
mod process;
mod servers;
mod load;
mod faults;
mod report;
mod knee;
mod bench;
mod case;
mod fleet;
mod field_cases;
mod scenarios;
mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::measure::default_tidegate;
use error::LoadtestError;

/// Load tests of Tidegate.
#[derive(Parser)]
#[command(name = "loadtest", version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A fast, minimal HTTP/1.1 origin on one thread
    Origin(commands::origin::OriginArguments),
    /// Upper bound of responding: a constant response to each request head, nothing parsed
    ConstantResponse(commands::constant_response::ConstantResponseArguments),
    /// Upper bound of proxying: a relay of bytes, nothing parsed
    ByteRelay(commands::byte_relay::ByteRelayArguments),
    /// Find the knee of any service by its URL, and its goodput at twice the knee
    Knee(commands::knee::KneeArguments),
    /// A TCP proxy with faults: latency, rate, drip, cut, reset, hang, refuse, corrupt
    Faults(commands::faults::FaultsArguments),
    /// Play the field cases with real gateways, Redis servers and origins
    FieldCases(commands::field_cases::FieldCasesArguments),
    /// A fleet with a Redis server per region under load: rolling restart, region loss, partition,
    /// clock jump
    Fleet(commands::fleet::FleetArguments),
    /// Two gateways restarted by SIGTERM in turn, under clients that never retry: lost requests
    Restarts(commands::restarts::RestartsArguments),
    /// A field case or a measurement of the remote cache layer, with real servers; prints Markdown,
    /// shows progress on stderr
    Scenario(commands::scenario::ScenarioArguments),
    /// Compare tidegate with other servers; prints Markdown, shows progress on stderr
    Bench(commands::bench::BenchArguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Origin(arguments) => commands::origin::run(arguments),
        Command::ConstantResponse(arguments) => commands::constant_response::run(arguments),
        Command::ByteRelay(arguments) => commands::byte_relay::run(&arguments),
        Command::Knee(arguments) => commands::knee::run(arguments),
        Command::Faults(arguments) => commands::faults::run(arguments),
        Command::FieldCases(arguments) => {
            default_tidegate().and_then(|default| commands::field_cases::run(arguments, default))
        }
        Command::Fleet(arguments) => default_tidegate().and_then(|default| commands::fleet::run(arguments, default)),
        Command::Restarts(arguments) => {
            default_tidegate().and_then(|default| commands::restarts::run(arguments, default))
        }
        Command::Scenario(arguments) => commands::scenario::run(arguments),
        Command::Bench(arguments) => commands::bench::run(arguments),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("loadtest: {failure}");
            ExitCode::from(match failure {
                LoadtestError::Interrupted => 130,
                LoadtestError::Missing { .. }
                | LoadtestError::NoTidegate { .. }
                | LoadtestError::OneCore
                | LoadtestError::Usage(_) => 2,
                _ => 1,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::bench::peer::Peer;
    use crate::bench::workload::Workload;

    #[test]
    fn arguments_are_consistent_and_lists_are_split() {
        Arguments::command().debug_assert();
        let line = "loadtest bench --workload denied,hit-1k --peers nginx,constant-response --rounds 1";
        let Command::Bench(bench) = Arguments::parse_from(line.split(' ')).command else { panic!("{line}") };
        assert_eq!(bench.workload, [Workload::Denied, Workload::Hit1k]);
        assert_eq!(bench.peers, [Peer::Nginx, Peer::ConstantResponse]);
        let Command::Bench(bench) = Arguments::parse_from(["loadtest", "bench"]).command else { panic!("bench") };
        assert_eq!((bench.workload.len(), bench.peers.len()), (15, 10));
    }
}
