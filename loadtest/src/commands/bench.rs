//! `loadtest bench`: the comparison of Tidegate with its peers, printed as Markdown.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum as _};

use crate::bench::comparison::{Bench, BenchPlan};
use crate::bench::machine::BenchRun;
use crate::bench::markdown;
use crate::bench::peer::Peer;
use crate::bench::record::WorkloadRecord;
use crate::bench::report_directory::ReportDirectory;
use crate::bench::workload::{OriginProtocol, Workload};
use crate::commands::measure::{MeasureArguments, default_tidegate};
use crate::error::{LoadtestError, Result};
use crate::interrupt;
use crate::process::tools::{Tool, Tools};

/// Arguments of `loadtest bench`.
#[derive(Args)]
pub(crate) struct BenchArguments {
    /// Workloads [default: all]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = Workload::value_variants().to_vec())]
    pub(crate) workload: Vec<Workload>,
    /// Servers to compare with [default: all but nginx-openfiles]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = Peer::defaults())]
    pub(crate) peers: Vec<Peer>,
    #[command(flatten)]
    measure: MeasureArguments,
    /// Directory of latest.json, latest.md and latest.svg; figures of workloads that are not
    /// measured stay
    #[arg(long, value_name = "DIRECTORY")]
    write: Option<PathBuf>,
}

pub(crate) fn run(arguments: BenchArguments) -> Result<ExitCode> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_peers_are_measured_once() {
        assert_eq!(sorted_unique([Peer::Tidegate, Peer::Nginx, Peer::Tidegate]), [Peer::Nginx, Peer::Tidegate]);
    }
}
