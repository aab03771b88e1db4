//! `loadtest`: load generation for Tidegate. An origin, a comparison with other servers, and
//! scenarios.

mod error;
mod spread;
mod interrupt;
mod listen;
mod origin;
mod worker_pool_origin;
mod durations;
mod tls_trust;
mod load_target;
mod response_reader;
mod load_connection;
mod open_loop;
mod load_probe;
mod load_step;
mod scalability;
mod knee_search;
mod line_chart;
mod knee_report;
mod constant_response;
mod byte_relay;
mod client;
mod cpu_time;
mod system_calls;
mod tools;
mod process;
mod load_report;
mod wrk;
mod h2load;
mod probe_counts;
mod workload;
mod load;
mod certificate;
mod curl;
mod peer;
mod goal;
mod response_check;
mod launcher;
mod origin_front;
mod progress;
mod progress_bar;
mod bench;
mod machine;
mod knee_command;
mod record;
mod markdown;
mod chart;
mod report_directory;
mod redis_server;
mod testbed;
mod knee;
mod h2_frames;
mod floods;
mod scenario;
mod seeded_random;
mod fault_plan;
mod fault_relay;
mod fault_proxy;
mod fault_control;
mod faults_command;
mod scripted_origin;
mod fake_clock;
mod case_report;
mod case_client;
mod case_gateway;
mod case_load;
mod fleet;
mod fleet_watch;
mod fleet_command;
mod field_cases;
mod field_cases_page;
mod field_cases_command;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use bench::{Bench, BenchPlan};
use error::{LoadtestError, Result};
use launcher::this_program;
use machine::BenchRun;
use peer::Peer;
use record::WorkloadRecord;
use report_directory::ReportDirectory;
use scenario::{Scenario, ScenarioRunner};
use tools::{Tool, Tools};
use worker_pool_origin::WorkerPool;
use workload::{OriginProtocol, Workload};

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
    Origin(OriginArguments),
    /// Upper bound of responding: a constant response to each request head, nothing parsed
    ConstantResponse(ConstantResponseArguments),
    /// Upper bound of proxying: a relay of bytes, nothing parsed
    ByteRelay(ByteRelayArguments),
    /// Find the knee of any service by its URL, and its goodput at twice the knee
    Knee(knee_command::KneeArguments),
    /// A TCP proxy with faults: latency, rate, drip, cut, reset, hang, refuse, corrupt
    Faults(faults_command::FaultsArguments),
    /// Play the field cases with real gateways, Redis servers and origins
    FieldCases(field_cases_command::FieldCasesArguments),
    /// A fleet with a Redis server per region under load: rolling restart, region loss, partition,
    /// clock jump
    Fleet(fleet_command::FleetArguments),
    /// A field case or a measurement of the remote cache layer, with real servers; prints Markdown,
    /// shows progress on stderr
    Scenario(ScenarioArguments),
    /// Compare tidegate with other servers; prints Markdown, shows progress on stderr
    Bench(BenchArguments),
}

#[derive(Args)]
struct OriginArguments {
    /// Listen address
    #[arg(long)]
    listen: SocketAddr,
    /// Bytes of each body
    #[arg(long, default_value_t = 1_024)]
    body_bytes: usize,
    /// Value of Cache-Control in each response
    #[arg(long, default_value = "max-age=86400")]
    cache_control: String,
    /// Requests that are served at a time, each for `--service-ms`: an origin with a knee
    #[arg(long, requires = "service_ms", value_parser = clap::value_parser!(u16).range(1..))]
    workers: Option<u16>,
    /// Milliseconds of a request in its worker
    #[arg(long, requires = "workers")]
    service_ms: Option<u64>,
}

#[derive(Args)]
struct ConstantResponseArguments {
    /// Listen address
    #[arg(long)]
    listen: SocketAddr,
    /// Status of the response
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(200..=599))]
    status: u16,
    /// Bytes of the response body
    #[arg(long, default_value_t = 1_024)]
    body_bytes: usize,
    /// Target whose ETag the response has, whatever the requested target
    #[arg(long, default_value = "/")]
    target: String,
}

#[derive(Args)]
struct ByteRelayArguments {
    /// Listen address
    #[arg(long)]
    listen: SocketAddr,
    /// Address that each connection is relayed to
    #[arg(long)]
    upstream: SocketAddr,
}

/// Rounds, duration and program of a measurement.
#[derive(Args)]
struct MeasureArguments {
    /// Rounds; each measures every server or case once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    rounds: u16,
    /// Seconds of load on each server or case in each round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Tidegate binary to measure [default: the one in the directory of this program]
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
}

#[derive(Args)]
struct ScenarioArguments {
    /// Scenario
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
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = Peer::defaults())]
    peers: Vec<Peer>,
    #[command(flatten)]
    measure: MeasureArguments,
    /// Directory of latest.json, latest.md and latest.svg; figures of workloads that are not
    /// measured stay
    #[arg(long, value_name = "DIRECTORY")]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Origin(arguments) => serve_origin(arguments),
        Command::ConstantResponse(arguments) => serve_constant_response(arguments),
        Command::ByteRelay(arguments) => serve_byte_relay(&arguments),
        Command::Knee(arguments) => knee_command::run(arguments),
        Command::Faults(arguments) => faults_command::run(arguments),
        Command::FieldCases(arguments) => {
            default_tidegate().and_then(|default| field_cases_command::run(arguments, default))
        }
        Command::Fleet(arguments) => default_tidegate().and_then(|default| fleet_command::run(arguments, default)),
        Command::Scenario(arguments) => run_scenario(arguments),
        Command::Bench(arguments) => run_bench(arguments),
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

fn serve_origin(arguments: OriginArguments) -> Result<ExitCode> {
    let OriginArguments { listen, body_bytes, cache_control, workers, service_ms } = arguments;
    if let Some((workers, millis)) = workers.zip(service_ms) {
        let pool = WorkerPool { workers: workers.into(), service: Duration::from_millis(millis) };
        worker_pool_origin::run(listen, pool).map_err(LoadtestError::io(format!("the origin on {listen}")))?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = origin::OriginConfig { listen, body_bytes, cache_control };
    origin::run(&config).map_err(LoadtestError::io(format!("the origin on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}

fn serve_constant_response(arguments: ConstantResponseArguments) -> Result<ExitCode> {
    let ConstantResponseArguments { listen, status, body_bytes, target } = arguments;
    let config = constant_response::ConstantResponseConfig { listen, status, body_bytes, target };
    constant_response::run(&config).map_err(LoadtestError::io(format!("the constant response on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}

fn serve_byte_relay(arguments: &ByteRelayArguments) -> Result<ExitCode> {
    let ByteRelayArguments { listen, upstream } = *arguments;
    byte_relay::run(listen, upstream).map_err(LoadtestError::io(format!("the relay on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}

fn run_scenario(arguments: ScenarioArguments) -> Result<ExitCode> {
    interrupt::watch()?;
    let tidegate = arguments.measure.tidegate.map_or_else(default_tidegate, Ok)?;
    if !tidegate.is_file() {
        return Err(LoadtestError::NoTidegate { path: tidegate.display().to_string() });
    }
    let tools = Tools::find(match arguments.name {
        Scenario::Knee => None,
        Scenario::Floods => Some(Tool::Openssl),
        Scenario::HotRegion | Scenario::Remote | Scenario::LargeBodies => Some(Tool::Redis),
    })?;
    tools.restrict_to_load_core()?;
    let runner = ScenarioRunner {
        tools: &tools,
        tidegate: &tidegate,
        rounds: arguments.measure.rounds.into(),
        seconds: arguments.measure.seconds,
    };
    print!("{}", runner.run(arguments.name)?);
    Ok(ExitCode::SUCCESS)
}

fn run_bench(arguments: BenchArguments) -> Result<ExitCode> {
    interrupt::watch()?;
    let plan = BenchPlan {
        workloads: sorted_unique(arguments.workload),
        peers: sorted_unique(arguments.peers.into_iter().chain([Peer::Tidegate])),
        rounds: arguments.measure.rounds.into(),
        seconds: arguments.measure.seconds,
        tidegate: arguments.measure.tidegate.map_or_else(default_tidegate, Ok)?,
    };
    if cfg!(debug_assertions) {
        eprintln!("loadtest: debug build: the origin and tidegate are slow, the figures are meaningless");
    }
    let for_tls = [Tool::H2load, Tool::Curl, Tool::Openssl];
    let for_tls = for_tls.into_iter().filter(|_| plan.workloads.iter().any(|workload| workload.needs_certificate()));
    // It stands before an origin that does not speak HTTP/1.1 in clear text.
    let has_front = plan.workloads.iter().any(|workload| workload.origin_protocol() != OriginProtocol::Plain);
    let for_tls = for_tls.chain(has_front.then_some(Tool::Haproxy));
    let servers = plan.peers.iter().filter_map(|peer| peer.tool());
    let tools = Tools::find(servers.chain(for_tls).chain([Tool::Perf]))?;
    let mut report = arguments.write.map(ReportDirectory::open).transpose()?;
    let run = BenchRun::read(&plan, &tools);
    let mut bench = Bench::new(&plan, &tools)?;
    // After the cores are counted: this call restricts the process to one core.
    tools.restrict_to_load_core()?;
    let mut is_clean = true;
    for workload in plan.workloads.iter().copied() {
        // A failed workload does not stop the others, and completed workloads keep their figures.
        let entry = match bench.compare(workload) {
            Ok(comparison) => WorkloadRecord::new(&comparison, &run),
            Err(LoadtestError::Interrupted) => return Err(LoadtestError::Interrupted),
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
        if let Some(report) = &mut report {
            report.put(entry)?;
        }
    }
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sorted in the order of reports, without duplicates.
fn sorted_unique<T: Ord>(named: impl IntoIterator<Item = T>) -> Vec<T> {
    named.into_iter().collect::<BTreeSet<T>>().into_iter().collect()
}

fn default_tidegate() -> Result<PathBuf> {
    Ok(this_program()?.with_file_name("tidegate"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

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

    #[test]
    fn duplicate_peers_are_measured_once() {
        assert_eq!(sorted_unique([Peer::Tidegate, Peer::Nginx, Peer::Tidegate]), [Peer::Nginx, Peer::Tidegate]);
    }
}
