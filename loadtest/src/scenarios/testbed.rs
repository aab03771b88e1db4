//! Processes of a scenario: origins, Redis servers and gateways; and one measurement of a gateway.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::client::CheckConnection;
use crate::bench::response_check::OriginCounter;
use crate::error::{LoadtestError, Result};
use crate::load::report::LoadReport;
use crate::load::wrk::WrkRun;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::cpu_time;
use crate::process::template::fill_template;
use crate::process::tools::{LOAD_CORE, SERVER_CORE, Tools, this_program};
use crate::servers::free_address::free_addresses;
use crate::servers::origin;
use crate::servers::redis_server::RedisServer;

const GATEWAY: &str = include_str!("../../peers/remote.toml");
const TIMEOUT: Duration = Duration::from_secs(20);
/// Passes over all keys until none is missing: a full write queue drops entries.
const FILL_PASSES_MAX: usize = 20;

/// An origin process; all its bodies have one length.
pub(crate) struct OriginProcess {
    address: SocketAddr,
    body_bytes: usize,
    counter: OriginCounter,
    _process: ChildProcess,
}

/// Values for the configuration template of a gateway process: memory, Redis servers, origin of
/// large bodies.
pub(crate) struct GatewaySetup<'a> {
    pub(crate) name: &'a str,
    /// The tidegate binary.
    pub(crate) tidegate: &'a Path,
    pub(crate) memory: &'a str,
    pub(crate) servers: &'a [RedisServer],
    /// Origin of `/large/`.
    pub(crate) large: &'a OriginProcess,
}

/// A tidegate process on the server's core, stopped on drop, with the address of its listener.
pub(crate) struct GatewayProcess {
    pub(crate) address: SocketAddr,
    process: ChildProcess,
}

/// One measurement of a gateway: wrk's report, CPU time, and requests at the origin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measurement {
    pub(crate) report: LoadReport,
    pub(crate) cpu_us: f64,
    /// CPU time of the gateway as a share of elapsed time.
    pub(crate) cpu_share: f64,
    /// Requests at the origin during the measurement.
    pub(crate) origin_requests: u64,
}

impl OriginProcess {
    pub(crate) fn start(name: &str, body_bytes: usize, tools: &Tools, scratch: &ScratchDirectory) -> Result<Self> {
        let [address] = free_addresses()?;
        let mut command = tools.pinned(LOAD_CORE, &this_program()?);
        command.args(["origin", "--listen", &address.to_string(), "--body-bytes", &body_bytes.to_string()]);
        let mut process = ChildProcess::start(name, command, scratch)?;
        process.await_ready(TIMEOUT, || OriginCounter::open(address).is_ok())?;
        Ok(OriginProcess { address, body_bytes, counter: OriginCounter::open(address)?, _process: process })
    }
}

impl GatewayProcess {
    pub(crate) fn start(
        setup: &GatewaySetup<'_>,
        origin: &OriginProcess,
        tools: &Tools,
        scratch: &ScratchDirectory,
    ) -> Result<Self> {
        let [address, admin] = free_addresses()?;
        let mut endpoints = String::new();
        for server in setup.servers {
            write!(endpoints, "{:?}, ", server.url()).expect("writing to a string does not fail");
        }
        let values = [
            ("LISTEN", address.to_string()),
            ("ADMIN", admin.to_string()),
            ("ENDPOINTS", endpoints),
            ("MEMORY", setup.memory.to_owned()),
            ("ORIGIN", origin.address.to_string()),
            ("LARGE", setup.large.address.to_string()),
        ];
        let text = fill_template(GATEWAY, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = scratch.write(&format!("{}.toml", setup.name), &text)?;
        let mut command = tools.pinned(SERVER_CORE, setup.tidegate);
        command.arg("run").arg("--config").arg(file);
        let mut process = ChildProcess::start(setup.name, command, scratch)?;
        process.await_ready(TIMEOUT, || {
            CheckConnection::open(address)
                .and_then(|mut client| client.get("/pass/ready"))
                .is_ok_and(|response| response.status == 200)
        })?;
        Ok(GatewayProcess { address, process })
    }

    /// Requests every target until no request reaches the origin; checks every response.
    pub(crate) fn fill(&self, targets: &[String], origin: &mut OriginProcess) -> Result<()> {
        let expected = origin::body(origin.body_bytes);
        let mut client = CheckConnection::open(self.address)
            .map_err(LoadtestError::io("the gateway does not accept connections"))?;
        for _ in 0..FILL_PASSES_MAX {
            let before = origin.counter.settled()?;
            for target in targets {
                let response = client.get(target).map_err(LoadtestError::io(format!("the gateway at {target}")))?;
                let is_tagged = response.etag.as_deref() == Some(&origin::etag(target.as_bytes()));
                if response.status != 200 || response.body != expected || !is_tagged {
                    let difference = format!("status {}, {} bytes", response.status, response.body.len());
                    return Err(LoadtestError::WrongResponse {
                        peer: "tidegate".to_owned(),
                        target: target.clone(),
                        difference,
                    });
                }
            }
            if origin.counter.settled()? == before {
                return Ok(());
            }
        }
        Err(LoadtestError::Load("some keys are never stored".to_owned()))
    }

    /// Puts load on the gateway for some seconds; calls `on_tick` periodically.
    pub(crate) fn measure(
        &self,
        wrk: WrkRun<'_>,
        origin: &mut OriginProcess,
        on_tick: impl FnMut(),
    ) -> Result<Measurement> {
        let origin_before = origin.counter.settled()?;
        let (cpu, began) = (cpu_time::of_tree(self.process.pid())?, Instant::now());
        let report = wrk.run(self.address, on_tick)?;
        let (cpu, elapsed) = (cpu_time::of_tree(self.process.pid())?.since(cpu), began.elapsed());
        let origin_requests = origin.counter.settled()? - origin_before;
        if report.error_statuses + report.socket_errors > 0 {
            return Err(LoadtestError::Load(format!("{report:?}")));
        }
        let cpu_us = cpu.total().as_secs_f64() * 1e6 / as_f64(report.requests);
        Ok(Measurement {
            report,
            cpu_us,
            cpu_share: cpu.total().as_secs_f64() / elapsed.as_secs_f64(),
            origin_requests,
        })
    }
}

impl Measurement {
    /// Requests per second.
    pub(crate) fn rate(&self) -> f64 {
        as_f64(self.report.requests) / self.report.duration.as_secs_f64()
    }
}

/// Exact below 2^53, which no load reaches.
#[expect(clippy::cast_precision_loss)]
pub(crate) fn as_f64(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_has_no_unfilled_placeholder() {
        let names = ["LISTEN", "ADMIN", "ENDPOINTS", "MEMORY", "ORIGIN", "LARGE"];
        let filled = fill_template(GATEWAY, &names.map(|name| (name, "x")));
        assert_eq!(filled.replace("@NAME@", "").matches('@').count(), 0, "{filled}");
    }
}
