//! `loadtest origin`: an origin in the foreground, with or without a knee.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::error::{LoadtestError, Result};
use crate::servers::origin::{self, OriginConfig};
use crate::servers::worker_pool_origin::{self, WorkerPool};

/// Arguments of `loadtest origin`.
#[derive(Args)]
pub(crate) struct OriginArguments {
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

pub(crate) fn run(arguments: OriginArguments) -> Result<ExitCode> {
    let OriginArguments { listen, body_bytes, cache_control, workers, service_ms } = arguments;
    if let Some((workers, millis)) = workers.zip(service_ms) {
        let pool = WorkerPool { workers: workers.into(), service: Duration::from_millis(millis) };
        worker_pool_origin::run(listen, pool).map_err(LoadtestError::io(format!("the origin on {listen}")))?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = OriginConfig { listen, body_bytes, cache_control };
    origin::run(&config).map_err(LoadtestError::io(format!("the origin on {listen}")))?;
    Ok(ExitCode::SUCCESS)
}
