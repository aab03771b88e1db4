//! `loadtest restarts`: two gateways restarted by SIGTERM under load, and the requests that were
//! lost.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::case::gateway::{CaseContext, CaseForm};
use crate::error::{LoadtestError, Result};
use crate::fleet::restarts::{RestartFigures, RestartLoad};
use crate::process::child::ScratchDirectory;
use crate::process::tools::Tools;
use crate::report::progress_bar::ProgressBar;
use crate::{durations, interrupt};

/// Shorter graces are over before a load balancer has read `/ready`.
const DRAIN_IDLE_MIN: Duration = Duration::from_millis(500);

/// Arguments of `loadtest restarts`.
#[derive(Args, Clone, Debug)]
pub(crate) struct RestartsArguments {
    /// Requests; the load ends with the restart in which so many have been sent
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    requests: u64,
    /// Clients; every fourth opens a connection for each request
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(4..=512))]
    clients: u16,
    /// `server.drain_idle` of the gateways; the default of a gateway is 10s
    #[arg(long, default_value = "2s", value_parser = durations::parse)]
    drain_idle: Duration,
    /// Tidegate binary [default: the one in the directory of this program]
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
    /// Print JSON in place of Markdown
    #[arg(long)]
    json: bool,
}

/// Exits with 1 if a request was lost or a drain did not end in time.
pub(crate) fn run(arguments: RestartsArguments, default_tidegate: PathBuf) -> Result<ExitCode> {
    let RestartsArguments { requests, clients, drain_idle, tidegate, json } = arguments;
    if drain_idle < DRAIN_IDLE_MIN || drain_idle > Duration::from_secs(20) {
        return Err(LoadtestError::Usage("--drain-idle is from 500ms to 20s".to_owned()));
    }
    let tidegate = tidegate.unwrap_or(default_tidegate);
    if !tidegate.is_file() {
        return Err(LoadtestError::NoTidegate { path: tidegate.display().to_string() });
    }
    interrupt::watch()?;
    let tools = Tools::find([])?;
    tools.raise_descriptors()?;
    let scratch = ScratchDirectory::named("restarts")?;
    let context = CaseContext { tools: &tools, tidegate: &tidegate, form: CaseForm::Long, scratch: &scratch };
    let mut bar = ProgressBar::new();
    let load = RestartLoad { requests, clients: clients.into(), drain_idle };
    let figures =
        load.run(&context, |restarts, sent| bar.line(&format!("restart {restarts}: {sent} of {requests} requests")))?;
    drop(bar);
    match json {
        true => println!("{}", serde_json::to_string_pretty(&figures).expect("numbers and texts")),
        false => println!("{}", table(&figures)),
    }
    if interrupt::is_requested() {
        return Err(LoadtestError::Interrupted);
    }
    Ok(if figures.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(figures: &RestartFigures) -> String {
    let RestartFigures { seconds, restarts, requests, new_connections, kept_connections, lost, losses, unclean_ends } =
        figures;
    let rows: String = losses.iter().map(|(text, count)| format!("\nlost: {count} x {text}")).collect();
    format!(
        "## restarts\n\nTwo gateways, each in turn ended by SIGTERM and started again, under clients that never retry.\n\n\
         | s | restarts | drains not clean | requests | on new connections | on kept ones | lost |\n|---|---|---|---|---|---|---|\n\
         | {seconds:.0} | {restarts} | {unclean_ends} | {requests} | {new_connections} | {kept_connections} | {lost} |{rows}"
    )
}
