//! `loadtest scenario`: one scenario, printed as Markdown.

use std::process::ExitCode;

use clap::Args;

use crate::commands::measure::{MeasureArguments, default_tidegate};
use crate::error::{LoadtestError, Result};
use crate::interrupt;
use crate::process::tools::{Tool, Tools};
use crate::scenarios::{Scenario, ScenarioRunner};

/// Arguments of `loadtest scenario`.
#[derive(Args)]
pub(crate) struct ScenarioArguments {
    /// Scenario
    #[arg(value_enum)]
    name: Scenario,
    #[command(flatten)]
    measure: MeasureArguments,
}

pub(crate) fn run(arguments: ScenarioArguments) -> Result<ExitCode> {
    interrupt::watch()?;
    let tidegate = arguments.measure.tidegate.map_or_else(default_tidegate, Ok)?;
    if !tidegate.is_file() {
        return Err(LoadtestError::NoTidegate { path: tidegate.display().to_string() });
    }
    let others: &[Tool] = match arguments.name {
        Scenario::Knee => &[],
        Scenario::Floods => &[Tool::Openssl],
        Scenario::HotRegion | Scenario::Remote | Scenario::LargeBodies => &[Tool::Redis],
        Scenario::Features => &[Tool::Valgrind, Tool::CallgrindControl],
    };
    let tools = Tools::find(others.iter().copied())?;
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
