//! The comparison: each workload in rounds, and in each round every peer once, so that a noisy minute hits all of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::check::{Check, Counter, Probes};
use crate::failure::{Failure, Result};
use crate::launch::{Setting, Started, free_addresses, this_program};
use crate::load::{Load, Report};
use crate::peer::Peer;
use crate::process::{Running, Scratch};
use crate::progress::Progress;
use crate::tools::{LOAD_CORE, SERVER_CORE, Tools};
use crate::usage::{self, Cpu};
use crate::workload::Workload;

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
    /// Peers that cannot do this, each with the reason.
    pub(crate) left_out: Vec<(Peer, String)>,
}

/// What comparisons share.
pub(crate) struct Bench<'a> {
    plan: &'a Plan,
    tools: &'a Tools,
    progress: Progress,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(plan: &'a Plan, tools: &'a Tools) -> Result<Self> {
        if available_parallelism().map_err(Failure::io("cannot count the cores"))?.get() < 2 {
            return Err(Failure::OneCore);
        }
        if !plan.tidegate.is_file() {
            return Err(Failure::NoTidegate { path: plan.tidegate.display().to_string() });
        }
        let samples =
            |workload: &Workload| plan.rounds * plan.peers.iter().filter(|peer| peer.takes_part_in(*workload)).count();
        let progress = Progress::of(plan.workloads.iter().map(samples).sum());
        Ok(Bench { plan, tools, progress })
    }

    /// Measures one workload with a fresh origin and fresh peers, so that none inherits another's cache.
    pub(crate) fn compare(&mut self, workload: Workload) -> Result<Comparison> {
        let scratch = Scratch::new()?;
        let (_origin, address) = start_origin(workload, self.tools, &scratch)?;
        let (tools, tidegate) = (self.tools, self.plan.tidegate.as_path());
        let setting = Setting { tools, scratch: &scratch, tidegate, origin: address, workload };
        let (mut started, mut left_out) = (Vec::new(), Vec::new());
        for peer in self.plan.peers.iter().copied().filter(|peer| peer.takes_part_in(workload)) {
            if let Some(why) = setting.obstacle(peer)? {
                eprintln!("{}: without {}: {why}", workload.name(), peer.name());
                self.progress.skip(self.plan.rounds);
                left_out.push((peer, why));
            } else {
                started.push(setting.start(peer)?);
            }
        }
        let load = Load { tools, scratch: &scratch, aim: workload.aim() };
        let mut arena = Arena { workload, load, seconds: self.plan.seconds, counter: Counter::open(address)? };
        let peers = self.rounds(workload, &started, &mut arena)?;
        Ok(Comparison { workload, peers, left_out })
    }

    fn rounds(&mut self, workload: Workload, started: &[Started], arena: &mut Arena<'_>) -> Result<Vec<Measured>> {
        let mut checks: Vec<Check> =
            started.iter().map(|server| Check::new(server.peer, server.address, workload)).collect();
        eprintln!("{}: checking and warming up", workload.name());
        for (server, check) in started.iter().zip(&checks) {
            check.before(&mut arena.counter)?;
            arena.load.run(server.address, WARM_UP_SECONDS, || ())?;
        }
        let mut peers: Vec<Measured> =
            started.iter().map(|server| Measured { peer: server.peer, samples: Vec::new() }).collect();
        for round in 0..self.plan.rounds {
            for place in 0..started.len() {
                // Each round begins with another peer, so that none always follows the same one.
                let turn = (place + round) % started.len();
                peers[turn].samples.push(arena.sample(&started[turn], &mut checks[turn])?);
                self.progress.step();
            }
            self.show(workload, round, &peers);
        }
        for check in &checks {
            check.after(&mut arena.counter)?;
        }
        Ok(peers)
    }

    fn show(&self, workload: Workload, round: usize, peers: &[Measured]) {
        let figures = peers.iter().filter_map(|measured| {
            let sample = measured.samples.last()?;
            let errors = if sample.errors > 0 { format!(" ({} ERRORS)", sample.errors) } else { String::new() };
            Some(format!("{} {:.2}{errors}", measured.peer.name(), sample.cpu_per_request()))
        });
        eprintln!(
            "{}: round {}/{}, {}; CPU us/request: {}",
            workload.name(),
            round + 1,
            self.plan.rounds,
            self.progress.left(),
            figures.collect::<Vec<_>>().join(", "),
        );
    }
}

/// The load and the origin of one workload.
struct Arena<'a> {
    workload: Workload,
    load: Load<'a>,
    seconds: u64,
    counter: Counter,
}

impl Arena<'_> {
    fn sample(&mut self, server: &Started, check: &mut Check) -> Result<Sample> {
        let mut probes = Probes::default();
        let pid = server.process.pid();
        let asked = self.counter.settled()?;
        let (cpu, core, began) = (usage::of_tree(pid)?, usage::of_core(SERVER_CORE)?, Instant::now());
        let report = self.load.run(server.address, self.seconds, || check.probe(&mut probes))?;
        let (cpu, elapsed) = (usage::of_tree(pid)?.since(cpu), began.elapsed());
        let others = usage::of_core(SERVER_CORE)?.saturating_sub(core).saturating_sub(cpu.total());
        let asked = self.counter.settled()? - asked;
        let errors = self.workload.errors(&report, &probes, asked);
        if errors > 0 {
            let (workload, peer) = (self.workload.name(), server.peer.name());
            eprintln!("{workload}: {peer}: {errors} errors: {asked} reached the origin; {report:?}, {probes:?}");
        }
        Ok(Sample { report, errors, cpu, others, elapsed })
    }
}

fn start_origin(workload: Workload, tools: &Tools, scratch: &Scratch) -> Result<(Running, SocketAddr)> {
    let [address] = free_addresses()?;
    let mut command = tools.pinned(LOAD_CORE, &this_program()?);
    command.args(["origin", "--listen", &address.to_string()]);
    command.args(["--body-bytes", &workload.body_bytes().to_string(), "--cache-control", CACHE_CONTROL]);
    let mut origin = Running::start("origin", command, scratch)?;
    origin.await_ready(START_PATIENCE, || Counter::open(address).is_ok())?;
    Ok((origin, address))
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
