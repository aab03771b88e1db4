//! `loadtest`: the load that Tidegate is measured with. An origin, and a comparison with other servers.

mod failure;
mod spread;
mod interrupt;
mod listen;
mod origin;
mod limit_answer;
mod limit_relay;
mod client;
mod usage;
mod tools;
mod process;
mod load;
mod workload;
mod peer;
mod goal;
mod check;
mod launch;
mod progress;
mod bench;
mod machine;
mod record;
mod markdown;
mod chart;
mod publication;
mod redis;
mod stage;
mod scenario;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use bench::{Bench, Plan};
use failure::{Failure, Result};
use launch::this_program;
use machine::Run;
use peer::Peer;
use publication::Publication;
use record::Entry;
use scenario::{Play, Scenario};
use tools::{Tool, Tools};
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
    /// The limit of answering: a constant answer to each head of a request, nothing parsed
    LimitAnswer(LimitAnswerArguments),
    /// The limit of passing on: a relay of bytes, nothing parsed
    LimitRelay(LimitRelayArguments),
    /// A field case or a question about the remote tier, with real servers; prints Markdown, shows progress on stderr
    Scenario(ScenarioArguments),
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
struct LimitAnswerArguments {
    /// Address to serve
    #[arg(long)]
    listen: SocketAddr,
    /// Status of the answer
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(200..=599))]
    status: u16,
    /// Bytes of its body
    #[arg(long, default_value_t = 1_024)]
    body_bytes: usize,
    /// The target whose ETag it carries, whatever is asked for
    #[arg(long, default_value = "/")]
    target: String,
}

#[derive(Args)]
struct LimitRelayArguments {
    /// Address to serve
    #[arg(long)]
    listen: SocketAddr,
    /// Where each connection is passed on to
    #[arg(long)]
    upstream: SocketAddr,
}

/// How often, how long and what is measured.
#[derive(Args)]
struct MeasureArguments {
    /// Rounds, in each of which every server or case is measured once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    rounds: u16,
    /// Seconds of load on each server or case in each round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// The tidegate to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
}

#[derive(Args)]
struct ScenarioArguments {
    /// Which
    #[arg(value_enum)]
    name: Scenario,
    #[command(flatten)]
    measure: MeasureArguments,
}

#[derive(Args)]
struct BenchArguments {
    /// Workloads [default: all]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = Workload::value_variants().to_vec())]
    workload: Vec<Workload>,
    /// Servers to compare with [default: all but nginx-openfiles]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = Peer::usual())]
    peers: Vec<Peer>,
    #[command(flatten)]
    measure: MeasureArguments,
    /// Directory for latest.json, latest.md and latest.svg; the workloads that are not measured keep their figures there
    #[arg(long, value_name = "DIRECTORY")]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Origin(arguments) => serve_origin(arguments),
        Command::LimitAnswer(arguments) => serve_limit_answer(arguments),
        Command::LimitRelay(arguments) => serve_limit_relay(&arguments),
        Command::Scenario(arguments) => run_scenario(arguments),
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

fn serve_limit_answer(arguments: LimitAnswerArguments) -> Result<ExitCode> {
    let LimitAnswerArguments { listen, status, body_bytes, target } = arguments;
    let settings = limit_answer::Settings { listen, status, body_bytes, target };
    limit_answer::run(&settings).map_err(Failure::io(format!("the constant answer on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}

fn serve_limit_relay(arguments: &LimitRelayArguments) -> Result<ExitCode> {
    let LimitRelayArguments { listen, upstream } = *arguments;
    limit_relay::run(listen, upstream).map_err(Failure::io(format!("the relay on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}

fn run_scenario(arguments: ScenarioArguments) -> Result<ExitCode> {
    interrupt::watch()?;
    let tidegate = arguments.measure.tidegate.map_or_else(beside_this, Ok)?;
    if !tidegate.is_file() {
        return Err(Failure::NoTidegate { path: tidegate.display().to_string() });
    }
    let tools = Tools::find([Tool::Redis])?;
    tools.settle()?;
    let play = Play {
        tools: &tools,
        tidegate: &tidegate,
        rounds: arguments.measure.rounds.into(),
        seconds: arguments.measure.seconds,
    };
    print!("{}", play.scenario(arguments.name)?);
    Ok(ExitCode::SUCCESS)
}

fn run_bench(arguments: BenchArguments) -> Result<ExitCode> {
    interrupt::watch()?;
    let plan = Plan {
        workloads: sorted(arguments.workload),
        peers: sorted(arguments.peers.into_iter().chain([Peer::Tidegate])),
        rounds: arguments.measure.rounds.into(),
        seconds: arguments.measure.seconds,
        tidegate: arguments.measure.tidegate.map_or_else(beside_this, Ok)?,
    };
    if cfg!(debug_assertions) {
        eprintln!("loadtest: a debug build: the origin is slow, and tidegate beside it slower; figures mean nothing");
    }
    let tools = Tools::find(plan.peers.iter().filter_map(|peer| peer.tool()))?;
    let mut publication = arguments.write.map(Publication::open).transpose()?;
    let run = Run::read(&plan, &tools);
    let mut bench = Bench::new(&plan, &tools)?;
    // Only now: until here, the cores that this process may use are counted.
    tools.settle()?;
    let mut is_clean = true;
    for workload in plan.workloads.iter().copied() {
        // One workload that fails leaves the others their chance, and those that are done keep their figures.
        let entry = match bench.compare(workload) {
            Ok(comparison) => Entry::new(&comparison, &run),
            Err(Failure::Interrupted) => return Err(Failure::Interrupted),
            Err(failure) => {
                eprintln!("loadtest: {}: {failure}", workload.name());
                is_clean = false;
                continue;
            }
        };
        if entry.errors() > 0 {
            eprintln!("loadtest: {}: {} errors", workload.name(), entry.errors());
            is_clean = false;
        }
        println!("{}", markdown::section(&entry).trim_start());
        if let Some(publication) = &mut publication {
            publication.put(entry)?;
        }
    }
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// In the order of reports, each once.
fn sorted<T: Ord>(named: impl IntoIterator<Item = T>) -> Vec<T> {
    named.into_iter().collect::<BTreeSet<T>>().into_iter().collect()
}

fn beside_this() -> Result<PathBuf> {
    Ok(this_program()?.with_file_name("tidegate"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent_and_lists_are_split() {
        Arguments::command().debug_assert();
        let line = "loadtest bench --workload denied,hit-1k --peers nginx,limit-answer --rounds 1";
        let Command::Bench(bench) = Arguments::parse_from(line.split(' ')).command else { panic!("{line}") };
        assert_eq!(bench.workload, [Workload::Denied, Workload::Hit1k]);
        assert_eq!(bench.peers, [Peer::Nginx, Peer::LimitAnswer]);
        let Command::Bench(bench) = Arguments::parse_from(["loadtest", "bench"]).command else { panic!("bench") };
        assert_eq!((bench.workload.len(), bench.peers.len()), (8, 7));
    }

    #[test]
    fn what_is_named_twice_is_measured_once() {
        assert_eq!(sorted([Peer::Tidegate, Peer::Nginx, Peer::Tidegate]), [Peer::Nginx, Peer::Tidegate]);
    }
}
