//! `loadtest constant-response`: the upper bound of responding, in the foreground.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;

use crate::error::{LoadtestError, Result};
use crate::servers::constant_response::{self, ConstantResponseConfig};

/// Arguments of `loadtest constant-response`.
#[derive(Args)]
pub(crate) struct ConstantResponseArguments {
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

pub(crate) fn run(arguments: ConstantResponseArguments) -> Result<ExitCode> {
    let ConstantResponseArguments { listen, status, body_bytes, target } = arguments;
    let config = ConstantResponseConfig { listen, status, body_bytes, target };
    constant_response::run(&config).map_err(LoadtestError::io(format!("the constant response on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}
