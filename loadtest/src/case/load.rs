//! Loads of the field cases: several at a time, each in its own open loop.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::error::{LoadtestError, Result};
use crate::load::open_loop::{OpenLoopLoad, OpenLoopReport};
use crate::load::target::{AddressSet, LoadTarget};

const CONNECTIONS: usize = 512;

/// A load of GETs on some gateways.
#[derive(Clone, Debug)]
pub(crate) struct CaseLoad {
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) paths: Vec<String>,
    /// Lines of fields, each with its end.
    pub(crate) fields: String,
    /// Requests per second.
    pub(crate) rate: f64,
    pub(crate) time: Duration,
    /// In which a response counts.
    pub(crate) timeout: Duration,
}

impl CaseLoad {
    /// A load of one path on one gateway, with a timeout of 5 s.
    pub(crate) fn new(address: SocketAddr, path: &str, (rate, time): (f64, Duration)) -> Self {
        CaseLoad {
            addresses: vec![address],
            paths: vec![path.to_owned()],
            fields: String::new(),
            rate,
            time,
            timeout: Duration::from_secs(5),
        }
    }

    pub(crate) fn run(&self) -> Result<OpenLoopReport> {
        let mut target = LoadTarget::plain(self.addresses[0], &self.paths, &self.fields);
        target.addresses = AddressSet::new(self.addresses.clone());
        let load = OpenLoopLoad {
            target: &target,
            rate: self.rate,
            warm_up: Duration::ZERO,
            time: self.time,
            connections: CONNECTIONS,
            timeout: self.timeout,
            threads: 1,
            stop: None,
        };
        load.run(|_| ())
    }
}

/// Runs loads at the same time; their reports in the same order.
pub(crate) fn run_all(loads: &[CaseLoad]) -> Result<Vec<OpenLoopReport>> {
    thread::scope(|scope| {
        let running: Vec<_> = loads.iter().map(|load| scope.spawn(|| load.run())).collect();
        let panicked = || LoadtestError::Load("a load has panicked".to_owned());
        running.into_iter().map(|load| load.join().map_err(|_| panicked())?).collect()
    })
}
