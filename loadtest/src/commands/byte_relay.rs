//! `loadtest byte-relay`: the upper bound of proxying, in the foreground.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;

use crate::error::{LoadtestError, Result};
use crate::servers::byte_relay;

/// Arguments of `loadtest byte-relay`.
#[derive(Args)]
pub(crate) struct ByteRelayArguments {
    /// Listen address
    #[arg(long)]
    listen: SocketAddr,
    /// Address that each connection is relayed to
    #[arg(long)]
    upstream: SocketAddr,
}

pub(crate) fn run(arguments: &ByteRelayArguments) -> Result<ExitCode> {
    let ByteRelayArguments { listen, upstream } = *arguments;
    byte_relay::run(listen, upstream).map_err(LoadtestError::io(format!("the relay on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}
