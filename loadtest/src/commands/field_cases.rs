//! `loadtest field-cases`: plays the field cases one after another and writes their page.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Instant, SystemTime};

use clap::{Args, ValueEnum as _};

use crate::bench::machine;
use crate::case::gateway::{CaseContext, CaseForm};
use crate::case::report::{CaseReport, CheckOutcome};
use crate::error::{LoadtestError, Result};
use crate::field_cases::FieldCase;
use crate::field_cases::page::{FieldCasesPage, PlayedCase, terminal_text};
use crate::interrupt;
use crate::process::child::ScratchDirectory;
use crate::process::tools::{Tool, Tools};
use crate::report::progress_bar::ProgressBar;

/// Arguments of `loadtest field-cases`.
#[derive(Args, Clone, Debug)]
pub(crate) struct FieldCasesArguments {
    /// Cases to play, separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ID")]
    only: Vec<FieldCase>,
    /// Short forms, each under 30 s on two cores
    #[arg(long)]
    short: bool,
    /// Tidegate binary [default: the one in the directory of this program]
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
    /// Directory for field-cases.md and pictures/; sections of cases that are not played stay
    #[arg(long, value_name = "DIRECTORY")]
    write: Option<PathBuf>,
}

/// Exits with 1 if a criterion is not met or a case cannot be played.
pub(crate) fn run(arguments: FieldCasesArguments, default_tidegate: PathBuf) -> Result<ExitCode> {
    let tidegate = arguments.tidegate.unwrap_or(default_tidegate);
    if !tidegate.is_file() {
        return Err(LoadtestError::NoTidegate { path: tidegate.display().to_string() });
    }
    interrupt::watch()?;
    let mut cases = arguments.only;
    if cases.is_empty() {
        cases = FieldCase::value_variants().to_vec();
    }
    let tools = Tools::find([Tool::Redis])?;
    tools.raise_descriptors()?;
    let open = |directory| FieldCasesPage::open(directory, FieldCase::value_variants());
    let mut page = arguments.write.map(open).transpose()?;
    let form = if arguments.short { CaseForm::Short } else { CaseForm::Long };
    let setting = setting(&tidegate, form);
    let (mut bar, mut is_clean) = (ProgressBar::new(), true);
    for (number, case) in cases.iter().enumerate() {
        bar.line(&format!("case {} of {}: {}", number + 1, cases.len(), case.id()));
        let began = Instant::now();
        // Each case has a directory of its own, removed with its processes' files.
        let scratch = ScratchDirectory::named(&format!("case-{}", case.id()))?;
        let context = CaseContext { tools: &tools, tidegate: &tidegate, form, scratch: &scratch };
        let report = match case.run(&context) {
            Ok(report) => report,
            Err(LoadtestError::Interrupted) => return Err(LoadtestError::Interrupted),
            Err(failure) => failed(&failure),
        };
        is_clean &= report.outcome() != CheckOutcome::Fail;
        let seconds = began.elapsed().as_secs_f64();
        let played = PlayedCase { case: *case, report: &report, seconds, setting: &setting };
        print!("{}", terminal_text(&played));
        if let Some(page) = &mut page {
            page.put(&played)?;
        }
    }
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A case that could not be played to its end does not stop the others.
fn failed(failure: &LoadtestError) -> CaseReport {
    let mut report = CaseReport::new("The case could not be played to its end.");
    report.check("the case is played to its end", (failure.to_string(), false));
    report
}

/// Machine class, build of the gateway, form and date.
fn setting(tidegate: &std::path::Path, form: CaseForm) -> String {
    let version = Command::new(tidegate).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    // Cargo's directory of unoptimised builds.
    let is_debug = tidegate.components().any(|part| part.as_os_str() == "debug");
    let build = if is_debug { "debug build" } else { "release build" };
    let form = match form {
        CaseForm::Short => "short form",
        CaseForm::Long => "long form",
    };
    let date = httpdate::fmt_http_date(SystemTime::now());
    format!("{form}, {version} ({build}), {}, {date}", machine::description())
}
