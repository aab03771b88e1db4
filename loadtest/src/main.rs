//! `loadtest`: the load that Tidegate is measured with. An origin, and a comparison with other servers.

mod failure;
mod spread;
mod interrupt;
mod origin;
mod client;
mod usage;
mod process;
mod load;
mod workload;
mod peer;
mod bench;
mod report;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

use clap::{Args, Parser, Subcommand, ValueEnum};

use bench::Plan;
use failure::{Failure, Result};
use peer::Peer;
use process::Tools;
use report::Machine;
use workload::Workload;

/// Load for Tidegate.
#[derive(Parser)]
#[command(name = "loadtest", version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A fast, minimal HTTP/1.1 origin on one thread
    Origin(OriginArguments),
    /// Compare tidegate with other servers; prints Markdown, shows progress on stderr
    Bench(BenchArguments),
}

#[derive(Args)]
struct OriginArguments {
    /// Address to serve
    #[arg(long)]
    listen: SocketAddr,
    /// Bytes of each body
    #[arg(long, default_value_t = 1_024)]
    body_bytes: usize,
    /// Value of Cache-Control in each answer
    #[arg(long, default_value = "max-age=86400")]
    cache_control: String,
}

#[derive(Args)]
struct BenchArguments {
    /// Workloads [default: all]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = Workload::value_variants().to_vec())]
    workload: Vec<Workload>,
    /// Servers to compare with
    #[arg(long, value_enum, value_delimiter = ',', default_value = "nginx,nginx-nosendfile")]
    peers: Vec<Peer>,
    /// Rounds, in each of which every server is measured once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    rounds: u16,
    /// Seconds of load on each server in each round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Connections of the load
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    connections: u16,
    /// The tidegate to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
    /// File for the figures of every round
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Origin(arguments) => serve_origin(arguments),
        Command::Bench(arguments) => run_bench(arguments),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("loadtest: {failure}");
            ExitCode::from(match failure {
                Failure::Interrupted => 130,
                Failure::Missing { .. } | Failure::NoTidegate { .. } | Failure::OneCore => 2,
                _ => 1,
            })
        }
    }
}

fn serve_origin(arguments: OriginArguments) -> Result<ExitCode> {
    let OriginArguments { listen, body_bytes, cache_control } = arguments;
    let settings = origin::Settings { listen, body_bytes, cache_control };
    origin::run(&settings).map_err(Failure::io(format!("the origin on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}

fn run_bench(arguments: BenchArguments) -> Result<ExitCode> {
    interrupt::watch()?;
    let tools = Tools::find()?;
    let plan = Plan {
        workloads: arguments.workload,
        peers: with_tidegate(arguments.peers),
        rounds: arguments.rounds.into(),
        seconds: arguments.seconds,
        connections: arguments.connections.into(),
        tidegate: arguments.tidegate.map_or_else(beside_this, Ok)?,
    };
    if cfg!(debug_assertions) {
        eprintln!("loadtest: a debug build: the origin is slow, and tidegate beside it slower; figures mean nothing");
    }
    let machine = Machine::read(&tools, &plan.tidegate);
    let comparisons = bench::run(&plan, &tools)?;
    print!("{}", report::markdown(&machine, &plan, &comparisons));
    if let Some(path) = arguments.json {
        let text = format!("{:#}\n", report::json(&machine, &plan, &comparisons));
        fs::write(&path, text).map_err(Failure::io(format!("cannot write {}", path.display())))?;
    }
    match report::total_errors(&comparisons) {
        0 => Ok(ExitCode::SUCCESS),
        errors => {
            eprintln!("loadtest: {errors} errors");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn with_tidegate(named: Vec<Peer>) -> Vec<Peer> {
    let mut peers = Vec::new();
    for peer in named.into_iter().chain([Peer::Tidegate]) {
        if !peers.contains(&peer) {
            peers.push(peer);
        }
    }
    peers
}

fn beside_this() -> Result<PathBuf> {
    let program = env::current_exe().map_err(Failure::io("cannot find this program"))?;
    Ok(program.with_file_name("tidegate"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent_and_lists_are_split() {
        Arguments::command().debug_assert();
        let line = "loadtest bench --workload hit-1k,denied --peers nginx --rounds 1";
        let Command::Bench(bench) = Arguments::parse_from(line.split(' ')).command else { panic!("{line}") };
        assert_eq!(bench.workload, [Workload::Hit1k, Workload::Denied]);
        assert_eq!(with_tidegate(bench.peers), [Peer::Nginx, Peer::Tidegate]);
        let Command::Bench(bench) = Arguments::parse_from(["loadtest", "bench"]).command else { panic!("bench") };
        assert_eq!((bench.workload.len(), bench.peers.len()), (6, 2));
    }

    #[test]
    fn tidegate_is_measured_once() {
        assert_eq!(with_tidegate(vec![Peer::Tidegate, Peer::Nginx]), [Peer::Tidegate, Peer::Nginx]);
    }
}
