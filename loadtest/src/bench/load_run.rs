//! The load of a workload: wrk in clear text, h2load over TLS.

use std::net::SocketAddr;

use crate::bench::workload::Workload;
use crate::error::Result;
use crate::load::h2load::H2loadRun;
use crate::load::report::LoadReport;
use crate::load::wrk::WrkRun;
use crate::process::child::ScratchDirectory;
use crate::process::system_calls::SystemCallCounter;
use crate::process::tools::Tools;

/// One run of a workload's load.
#[derive(Clone, Copy)]
pub(crate) struct LoadRun<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a ScratchDirectory,
    pub(crate) workload: Workload,
    pub(crate) seconds: u64,
    pub(crate) counter: Option<&'a SystemCallCounter>,
}

impl LoadRun<'_> {
    /// Puts load on `address`; calls `on_tick` periodically.
    pub(crate) fn run(&self, address: SocketAddr, on_tick: impl FnMut()) -> Result<LoadReport> {
        let LoadRun { tools, scratch, workload, seconds, counter } = *self;
        match workload.tls_load() {
            None => WrkRun { tools, scratch, profile: workload.profile(), seconds, counter }.run(address, on_tick),
            Some(load) => {
                let target = workload.base();
                H2loadRun { tools, scratch, load, target, seconds, counter }.run(address, on_tick)
            }
        }
    }
}
