//! The comparison: each round of a workload measures every peer once, so that noise on the machine
//! affects all peers alike.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::bench::launcher::{PeerLauncher, RunningPeer};
use crate::bench::load_run::LoadRun;
use crate::bench::origin_front::OriginFront;
use crate::bench::peer::Peer;
use crate::bench::probe_counts::ProbeCounts;
use crate::bench::progress::BenchProgress;
use crate::bench::response_check::{OriginCounter, ResponseCheck};
use crate::bench::workload::Workload;
use crate::error::{LoadtestError, Result};
use crate::load::report::LoadReport;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::cpu_time::{self, CpuTime};
use crate::process::system_calls::SystemCallCounter;
use crate::process::tools::{LOAD_CORE, SERVER_CORE, Tool, Tools, this_program};
use crate::servers::certificate::ServerCertificate;
use crate::servers::free_address::free_addresses;

const START_TIMEOUT: Duration = Duration::from_secs(10);
const WARM_UP_SECONDS: u64 = 1;
/// Longer than any bench takes.
const CACHE_CONTROL: &str = "max-age=86400";

/// Workloads, peers and duration of a bench.
pub(crate) struct BenchPlan {
    pub(crate) workloads: Vec<Workload>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) tidegate: PathBuf,
}

/// Figures of one peer in one round: load report, CPU time and origin requests.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) report: LoadReport,
    pub(crate) errors: u64,
    /// CPU time of the server.
    pub(crate) cpu: CpuTime,
    /// CPU time of everything else on the server's core: other processes, and network processing
    /// that the kernel charges to no process.
    pub(crate) others: Duration,
    pub(crate) elapsed: Duration,
}

/// All rounds of one peer.
pub(crate) struct PeerSamples {
    pub(crate) peer: Peer,
    pub(crate) samples: Vec<Sample>,
    /// System calls of the server per request, if they can be counted.
    pub(crate) system_calls: Option<f64>,
}

/// All peers under one workload.
pub(crate) struct WorkloadComparison {
    pub(crate) workload: Workload,
    pub(crate) peers: Vec<PeerSamples>,
    /// Peers that cannot run this workload, with reasons.
    pub(crate) skipped_peers: Vec<(Peer, String)>,
}

/// Runs the comparisons of a plan.
pub(crate) struct Bench<'a> {
    plan: &'a BenchPlan,
    tools: &'a Tools,
    progress: BenchProgress,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(plan: &'a BenchPlan, tools: &'a Tools) -> Result<Self> {
        if available_parallelism().map_err(LoadtestError::io("cannot count the cores"))?.get() < 2 {
            return Err(LoadtestError::OneCore);
        }
        if !plan.tidegate.is_file() {
            return Err(LoadtestError::NoTidegate { path: plan.tidegate.display().to_string() });
        }
        let samples =
            |workload: &Workload| plan.rounds * plan.peers.iter().filter(|peer| peer.supports(*workload)).count();
        let progress = BenchProgress::new(plan.workloads.iter().map(samples).sum());
        Ok(Bench { plan, tools, progress })
    }

    /// Measures one workload. Origin and peers are started anew, so that no cache content carries
    /// over.
    pub(crate) fn compare(&mut self, workload: Workload) -> Result<WorkloadComparison> {
        let scratch = ScratchDirectory::new()?;
        let (_origin, address) = start_origin(workload, self.tools, &scratch)?;
        let (tools, tidegate) = (self.tools, self.plan.tidegate.as_path());
        let certificate =
            workload.needs_certificate().then(|| ServerCertificate::create(tools, &scratch)).transpose()?;
        let front = OriginFront { tools, scratch: &scratch, origin: address };
        let front = front.start(workload.origin_protocol(), certificate.as_ref())?;
        let launcher = PeerLauncher {
            tools,
            scratch: &scratch,
            tidegate,
            origin: front.as_ref().map_or(address, |(_, address)| *address),
            workload,
            certificate: certificate.as_ref(),
        };
        let (mut started, mut skipped_peers) = (Vec::new(), Vec::new());
        for peer in self.plan.peers.iter().copied().filter(|peer| peer.supports(workload)) {
            if let Some(reason) = launcher.obstacle(peer)? {
                eprintln!("{}: without {}: {reason}", workload.name(), peer.name());
                self.progress.skip(self.plan.rounds);
                skipped_peers.push((peer, reason));
            } else {
                started.push(launcher.start(peer)?);
            }
        }
        let load = LoadRun { tools, scratch: &scratch, workload, seconds: self.plan.seconds, counter: None };
        let mut run = PeerSampler { workload, load, counter: OriginCounter::open(address)? };
        let peers = self.run_rounds(workload, &started, &mut run)?;
        Ok(WorkloadComparison { workload, peers, skipped_peers })
    }

    fn run_rounds(
        &mut self,
        workload: Workload,
        started: &[RunningPeer],
        run: &mut PeerSampler<'_>,
    ) -> Result<Vec<PeerSamples>> {
        let mut checks: Vec<ResponseCheck> =
            started.iter().map(|server| ResponseCheck::new(server.peer, workload, server.client(self.tools))).collect();
        eprintln!("{}: checking and warming up", workload.name());
        for (server, check) in started.iter().zip(&checks) {
            check.before(&mut run.counter)?;
            LoadRun { seconds: WARM_UP_SECONDS, ..run.load }.run(server.address, || ())?;
        }
        let mut peers: Vec<PeerSamples> = started
            .iter()
            .map(|server| PeerSamples { peer: server.peer, samples: Vec::new(), system_calls: None })
            .collect();
        for round in 0..self.plan.rounds {
            for position in 0..started.len() {
                // Rotates the order, so that no peer always follows the same one.
                let index = (position + round) % started.len();
                peers[index].samples.push(run.sample(&started[index], &mut checks[index])?);
                self.progress.step();
            }
            self.report_round(workload, round, &peers);
        }
        for (server, measured) in started.iter().zip(&mut peers) {
            measured.system_calls = run.count_system_calls(server)?;
        }
        for check in &checks {
            check.after(&mut run.counter)?;
        }
        Ok(peers)
    }

    fn report_round(&self, workload: Workload, round: usize, peers: &[PeerSamples]) {
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
            self.progress.time_left(),
            figures.collect::<Vec<_>>().join(", "),
        );
    }
}

/// Measures one peer for one round: runs the load and reads the origin's request counter.
struct PeerSampler<'a> {
    workload: Workload,
    load: LoadRun<'a>,
    counter: OriginCounter,
}

impl PeerSampler<'_> {
    fn sample(&mut self, server: &RunningPeer, check: &mut ResponseCheck) -> Result<Sample> {
        let mut probes = ProbeCounts::default();
        let pid = server.process.pid();
        let origin_before = self.counter.settled()?;
        let (cpu, core, began) = (cpu_time::of_tree(pid)?, cpu_time::of_core(SERVER_CORE)?, Instant::now());
        let report = self.load.run(server.address, || check.probe(&mut probes))?;
        let (cpu, elapsed) = (cpu_time::of_tree(pid)?.since(cpu), began.elapsed());
        let others = cpu_time::of_core(SERVER_CORE)?.saturating_sub(core).saturating_sub(cpu.total());
        let origin_requests = self.counter.settled()? - origin_before;
        let errors = self.workload.errors(&report, &probes, origin_requests);
        if errors > 0 {
            let (workload, peer) = (self.workload.name(), server.peer.name());
            eprintln!(
                "{workload}: {peer}: {errors} errors: {origin_requests} reached the origin; {report:?}, {probes:?}"
            );
        }
        Ok(Sample { report, errors, cpu, others, elapsed })
    }

    /// Counts the system calls of a server under the same load, per request.
    fn count_system_calls(&self, server: &RunningPeer) -> Result<Option<f64>> {
        let LoadRun { tools, scratch, .. } = self.load;
        if !tools.has(Tool::Perf) {
            return Ok(None);
        }
        let output = scratch.path().join("perf.out");
        let counter = SystemCallCounter::new(tools.path(Tool::Perf), server.process.pid(), output)?;
        let load = LoadRun { seconds: WARM_UP_SECONDS, counter: Some(&counter), ..self.load };
        let report = load.run(server.address, || ())?;
        match counter.count() {
            Ok(count) => Ok(Some(as_f64(count) / as_f64(report.requests))),
            Err(failure) => {
                eprintln!("{}: system calls are not counted: {failure}", self.workload.name());
                Ok(None)
            }
        }
    }
}

fn start_origin(workload: Workload, tools: &Tools, scratch: &ScratchDirectory) -> Result<(ChildProcess, SocketAddr)> {
    let [address] = free_addresses()?;
    let mut command = tools.pinned(LOAD_CORE, &this_program()?);
    command.args(["origin", "--listen", &address.to_string()]);
    command.args(["--body-bytes", &workload.body_bytes().to_string(), "--cache-control", CACHE_CONTROL]);
    let mut origin = ChildProcess::start("origin", command, scratch)?;
    origin.await_ready(START_TIMEOUT, || OriginCounter::open(address).is_ok())?;
    Ok((origin, address))
}

impl Sample {
    /// Requests per second.
    pub(crate) fn rate(&self) -> f64 {
        as_f64(self.report.requests) / self.report.duration.as_secs_f64()
    }

    /// CPU time of the server per request, in microseconds.
    pub(crate) fn cpu_per_request(&self) -> f64 {
        self.user_per_request() + self.system_per_request()
    }

    pub(crate) fn user_per_request(&self) -> f64 {
        self.cpu.user.as_secs_f64() * 1e6 / as_f64(self.report.requests)
    }

    pub(crate) fn system_per_request(&self) -> f64 {
        self.cpu.system.as_secs_f64() * 1e6 / as_f64(self.report.requests)
    }

    /// CPU time of the server as a share of elapsed time.
    pub(crate) fn server_share(&self) -> f64 {
        self.cpu.total().as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// CPU time of everything else on the server's core as a share of elapsed time.
    pub(crate) fn others_share(&self) -> f64 {
        self.others.as_secs_f64() / self.elapsed.as_secs_f64()
    }
}

/// Exact below 2^53, which no bench reaches.
#[expect(clippy::cast_precision_loss)]
fn as_f64(number: u64) -> f64 {
    number as f64
}
