//! The comparison: each workload in rounds, and in each round every peer once, so that a noisy minute hits all of them.

use std::env;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result};
use crate::load::{Load, Report};
use crate::peer::{Peer, Setting, Started, free_addresses};
use crate::process::{LOAD_CORE, Running, SERVER_CORE, Scratch, Tools};
use crate::usage::{self, Cpu};
use crate::workload::{Counter, Workload};

const START_PATIENCE: Duration = Duration::from_secs(10);
const WARM_UP_SECONDS: u64 = 1;
/// Kept for longer than any bench lasts.
const CACHE_CONTROL: &str = "max-age=86400";

/// What is to be measured.
pub(crate) struct Plan {
    pub(crate) workloads: Vec<Workload>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) connections: usize,
    pub(crate) tidegate: PathBuf,
}

/// One peer in one round.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) report: Report,
    pub(crate) errors: u64,
    /// CPU time of the server.
    pub(crate) cpu: Cpu,
    /// CPU time of everything else on the server's core: what disturbed it, and network work the kernel charges to nobody.
    pub(crate) others: Duration,
    pub(crate) elapsed: Duration,
}

/// All rounds of one peer.
pub(crate) struct Measured {
    pub(crate) peer: Peer,
    pub(crate) samples: Vec<Sample>,
}

/// All peers under one workload.
pub(crate) struct Comparison {
    pub(crate) workload: Workload,
    pub(crate) peers: Vec<Measured>,
}

/// Measures everything in `plan`.
pub(crate) fn run(plan: &Plan, tools: &Tools) -> Result<Vec<Comparison>> {
    if available_parallelism().map_err(Failure::io("cannot count the cores"))?.get() < 2 {
        return Err(Failure::OneCore);
    }
    if !plan.tidegate.is_file() {
        return Err(Failure::NoTidegate { path: plan.tidegate.display().to_string() });
    }
    plan.workloads.iter().map(|workload| compare(*workload, plan, tools)).collect()
}

/// A fresh origin and fresh peers, so that no workload inherits another's cache.
fn compare(workload: Workload, plan: &Plan, tools: &Tools) -> Result<Comparison> {
    let scratch = Scratch::new()?;
    let (_origin, address) = start_origin(workload, tools, &scratch)?;
    let setting =
        Setting { tools, scratch: &scratch, tidegate: &plan.tidegate, origin: address, connections: plan.connections };
    let started: Vec<Started> = plan.peers.iter().map(|peer| peer.start(&setting)).collect::<Result<_>>()?;
    let mut bench = Bench {
        plan,
        load: Load { tools, scratch: &scratch, workload, connections: plan.connections },
        counter: Counter::open(address)?,
    };
    for server in &started {
        eprintln!("{}: checking and warming {}", workload.name(), server.peer.name());
        workload.check(server.peer.name(), server.address, &mut bench.counter)?;
        bench.load.run(server.address, WARM_UP_SECONDS)?;
    }
    let mut peers: Vec<Measured> =
        started.iter().map(|server| Measured { peer: server.peer, samples: Vec::new() }).collect();
    for round in 0..plan.rounds {
        for place in 0..started.len() {
            // Each round begins with another peer, so that none always follows the same one.
            let turn = (place + round) % started.len();
            let sample = bench.sample(&started[turn])?;
            show(workload, round, plan.rounds, started[turn].peer, &sample);
            peers[turn].samples.push(sample);
        }
    }
    for server in &started {
        workload.check(server.peer.name(), server.address, &mut bench.counter)?;
    }
    Ok(Comparison { workload, peers })
}

struct Bench<'a> {
    plan: &'a Plan,
    load: Load<'a>,
    counter: Counter,
}

impl Bench<'_> {
    fn sample(&mut self, server: &Started) -> Result<Sample> {
        let asked = self.counter.count()?;
        let (cpu, core, began) = (self.cpu(server)?, usage::of_core(SERVER_CORE)?, Instant::now());
        let report = self.load.run(server.address, self.plan.seconds)?;
        let (cpu, elapsed) = (self.cpu(server)?.since(cpu), began.elapsed());
        let others = usage::of_core(SERVER_CORE)?.saturating_sub(core).saturating_sub(cpu.total());
        let asked = self.counter.count()? - asked;
        Ok(Sample { report, errors: self.load.workload.errors(&report, asked), cpu, others, elapsed })
    }

    fn cpu(&self, server: &Started) -> Result<Cpu> {
        usage::of_tree(server.process.pid())
    }
}

fn start_origin(workload: Workload, tools: &Tools, scratch: &Scratch) -> Result<(Running, SocketAddr)> {
    let [address] = free_addresses()?;
    let program = env::current_exe().map_err(Failure::io("cannot find this program"))?;
    let mut command = tools.pinned(LOAD_CORE, &program);
    command.args(["origin", "--listen", &address.to_string()]);
    command.args(["--body-bytes", &workload.body_bytes().to_string(), "--cache-control", CACHE_CONTROL]);
    let mut origin = Running::start("origin", command, scratch)?;
    origin.await_ready(START_PATIENCE, || Counter::open(address).is_ok())?;
    Ok((origin, address))
}

fn show(workload: Workload, round: usize, rounds: usize, peer: Peer, sample: &Sample) {
    eprintln!(
        "{}: round {}/{rounds}  {:<16} {:>8.0} requests/s  {:>7.2} us/request  {} errors",
        workload.name(),
        round + 1,
        peer.name(),
        sample.rate(),
        sample.cpu_per_request(),
        sample.errors,
    );
}

impl Sample {
    /// Requests per second.
    pub(crate) fn rate(&self) -> f64 {
        count(self.report.requests) / self.report.duration.as_secs_f64()
    }

    /// Microseconds of the server's CPU time.
    pub(crate) fn cpu_per_request(&self) -> f64 {
        self.user_per_request() + self.system_per_request()
    }

    pub(crate) fn user_per_request(&self) -> f64 {
        self.cpu.user.as_secs_f64() * 1e6 / count(self.report.requests)
    }

    pub(crate) fn system_per_request(&self) -> f64 {
        self.cpu.system.as_secs_f64() * 1e6 / count(self.report.requests)
    }

    /// Share of the time in which the server ran.
    pub(crate) fn busy(&self) -> f64 {
        self.cpu.total().as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Share of the time in which something else ran on the server's core.
    pub(crate) fn disturbed(&self) -> f64 {
        self.others.as_secs_f64() / self.elapsed.as_secs_f64()
    }
}

/// Exact below 2^53, which no bench reaches.
#[expect(clippy::cast_precision_loss)]
fn count(number: u64) -> f64 {
    number as f64
}
