//! `loadtest fleet`: actions on a fleet under load, and what was lost, stale or over the limit.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::case::fake_clock::FakeClock;
use crate::case::gateway::{CaseContext, CaseForm};
use crate::error::{LoadtestError, Result};
use crate::fleet::rotation::Member;
use crate::fleet::watch::{FleetWatch, PhaseFigures};
use crate::fleet::{Fleet, LIMIT};
use crate::process::child::ScratchDirectory;
use crate::process::tools::{Tool, Tools};
use crate::report::progress_bar::ProgressBar;
use crate::{durations, interrupt};

const CLOCK_JUMP: f64 = 3_600.0;

/// An action on a fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FleetAction {
    /// Load alone
    Steady,
    /// Each gateway in turn: SIGTERM, drain, start
    RollingRestart,
    /// The Redis server of the last region is killed, and starts again empty
    RegionLoss,
    /// The last gateway is cut off from all Redis servers
    Partition,
    /// The wall clock of the last gateway jumps an hour forward, then back (libfaketime)
    ClockJump,
}

/// Arguments of `loadtest fleet`.
#[derive(Args, Clone, Debug)]
pub(crate) struct FleetArguments {
    /// Gateways
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=20))]
    nodes: u8,
    /// Regions, each with a Redis server
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    regions: u8,
    /// Actions in their order, separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, default_values_t = FleetAction::value_variants().to_vec())]
    action: Vec<FleetAction>,
    /// Least time of each action; a fault lasts for half of it
    #[arg(long, default_value = "10s", value_parser = durations::parse)]
    duration: Duration,
    /// Requests per second without a limit; as many again are sent to a limit of half of them
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Tidegate binary [default: the one in the directory of this program]
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
    /// Print JSON in place of Markdown
    #[arg(long)]
    json: bool,
}

/// Exits with 1 if a request was lost, a response was stale after an acknowledged purge, or the
/// limit was exceeded.
pub(crate) fn run(arguments: FleetArguments, default_tidegate: PathBuf) -> Result<ExitCode> {
    let FleetArguments { nodes, regions, action, duration, rate, tidegate, json } = arguments;
    if !(1.0..=100_000.0).contains(&rate) {
        return Err(LoadtestError::Usage(format!("--rate {rate} is not from 1 to 100000")));
    }
    if duration < Duration::from_secs(2) || duration > Duration::from_secs(3_000) {
        return Err(LoadtestError::Usage("--duration is from 2s to 50m".to_owned()));
    }
    let tidegate = tidegate.unwrap_or(default_tidegate);
    if !tidegate.is_file() {
        return Err(LoadtestError::NoTidegate { path: tidegate.display().to_string() });
    }
    if action.contains(&FleetAction::ClockJump) {
        FakeClock::library_for(&tidegate)?;
    }
    interrupt::watch()?;
    let tools = Tools::find([Tool::Redis])?;
    tools.raise_descriptors()?;
    let scratch = ScratchDirectory::named("fleet")?;
    let context = CaseContext { tools: &tools, tidegate: &tidegate, form: CaseForm::Long, scratch: &scratch };
    let report = if json { json_text } else { table };
    let mut bar = ProgressBar::new();
    bar.line(&format!("starting {nodes} gateways and {regions} Redis servers"));
    let mut fleet = Fleet::start(context, (nodes.into(), regions.into()))?;
    let mut phases = Vec::new();
    for action in action {
        bar.line(&format!("{} ...", action.name()));
        let figures = play(&mut fleet, (action, duration), (usize::from(regions), rate));
        match figures {
            Ok(figures) => phases.push(figures),
            Err(LoadtestError::Interrupted) if !phases.is_empty() => {
                println!("{}", report(&phases));
                return Err(LoadtestError::Interrupted);
            }
            Err(failure) => return Err(failure),
        }
    }
    println!("{}", report(&phases));
    let is_clean = phases.iter().all(|phase| phase.lost + phase.stale + phase.over_limit == 0);
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl FleetAction {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Plays one action under load, and waits until the fleet is whole again.
fn play(
    fleet: &mut Fleet<'_>,
    (action, duration): (FleetAction, Duration),
    (regions, rate): (usize, f64),
) -> Result<PhaseFigures> {
    let version = std::sync::Arc::clone(&fleet.version);
    let watch = FleetWatch { members: Member::all(&fleet.nodes), version: &version, regions, rate };
    let last = fleet.nodes.len() - 1;
    let rest = || interrupt::wait_for(duration / 2, || Ok(None::<()>)).map(drop);
    let figures = watch.observe((&action.name(), duration), || match action {
        FleetAction::Steady => Ok(()),
        FleetAction::RollingRestart => (0..=last).try_for_each(|node| fleet.restart_node(node)),
        FleetAction::RegionLoss => {
            fleet.lose_region(regions - 1);
            rest()?;
            fleet.restore_region(regions - 1)
        }
        FleetAction::Partition => {
            fleet.set_faults(last, "hang")?;
            rest()?;
            fleet.set_faults(last, "clear")
        }
        FleetAction::ClockJump => {
            let Some(clock) = &fleet.nodes[last].clock else {
                return Err(LoadtestError::Missing {
                    tools: "libfaketime".to_owned(),
                    packages: "faketime".to_owned(),
                });
            };
            clock.set(CLOCK_JUMP)?;
            rest()?;
            clock.set(-CLOCK_JUMP)?;
            interrupt::wait_for(duration / 4, || Ok(None::<()>))?;
            clock.set(0.0)
        }
    })?;
    if !fleet.await_whole()? {
        return Err(LoadtestError::Load(format!("the fleet is not whole again after {}", action.name())));
    }
    Ok(figures)
}

fn json_text(phases: &[PhaseFigures]) -> String {
    serde_json::to_string_pretty(phases).expect("numbers and texts")
}

fn table(phases: &[PhaseFigures]) -> String {
    let mut out = format!(
        "## fleet\n\nLost: requests without a good response. Limit: {:.0}/s and a burst of {:.0} for the fleet, loaded twice. Stale: older \
         than a purge that all nodes had acknowledged; in brackets, than one that some had not.\n\n\
         | action | s | requests | lost | sent again | p99 ms | admitted, at most | over the limit | purges, incomplete | stale |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        LIMIT.0, LIMIT.1
    );
    for phase in phases {
        writeln!(
            out,
            "| {} | {:.0} | {} | {} | {} | {:.1} | {}, {} | {} | {}, {} | {} ({}) |",
            phase.action,
            phase.seconds,
            phase.requests,
            phase.lost,
            phase.resent,
            phase.p99_ms,
            phase.admitted,
            phase.admitted_max,
            phase.over_limit,
            phase.purges,
            phase.incomplete_purges,
            phase.stale,
            phase.stale_unacknowledged
        )
        .expect("writing to a string does not fail");
    }
    out
}
