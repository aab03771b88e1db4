//! Rounds, duration and program of a measurement.

use std::path::PathBuf;

use clap::Args;

use crate::error::Result;
use crate::process::tools::this_program;

/// Rounds, duration and program of a measurement.
#[derive(Args)]
pub(crate) struct MeasureArguments {
    /// Rounds; each measures every server or case once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(super) rounds: u16,
    /// Seconds of load on each server or case in each round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub(super) seconds: u64,
    /// Tidegate binary to measure [default: the one in the directory of this program]
    #[arg(long, value_name = "PATH")]
    pub(super) tidegate: Option<PathBuf>,
}

pub(crate) fn default_tidegate() -> Result<PathBuf> {
    Ok(this_program()?.with_file_name("tidegate"))
}
