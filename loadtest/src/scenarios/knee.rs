//! Lesson `knee`: an origin that serves a fixed number of requests at a time, under loads up to
//! three times its capacity, with and without the adaptive concurrency limit.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use crate::bench::client::CheckConnection;
use crate::error::Result;
use crate::load::open_loop::{OpenLoopLoad, OpenLoopReport, PATIENCE};
use crate::load::target::LoadTarget;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::tools::{LOAD_CORE, SERVER_CORE, Tools, this_program};
use crate::servers::free_address::free_addresses;
use crate::servers::worker_pool_origin::WorkerPool;

const POOL: WorkerPool = WorkerPool { workers: 20, service: Duration::from_millis(25) };
/// Loads as parts of the capacity.
const LOADS: [f64; 6] = [0.5, 0.8, 1.0, 1.5, 2.0, 3.0];
/// More than the requests that are due within the patience of the clients.
const CONNECTIONS: usize = 4_096;
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs all loads for `seconds` each. Returns a table.
pub(crate) fn run(tools: &Tools, tidegate: &Path, seconds: u64) -> Result<String> {
    let scratch = ScratchDirectory::named("knee")?;
    let capacity = POOL.workers as f64 / POOL.service.as_secs_f64();
    let mut out = format!(
        "## knee\n\n{} workers of {:?}: {capacity:.0} requests per second. Clients give up after {PATIENCE:?}.\n\n\
         | limit | load | goodput/s | of the capacity | p50 ms | p99 ms | 503 | failed |\n|---|---|---|---|---|---|---|---|\n",
        POOL.workers, POOL.service
    );
    let mut best = [0.0_f64; 2];
    let mut at_twice = [0.0_f64; 2];
    for (index, (name, key)) in [("none", ""), ("adaptive", "concurrency = {}\n")].into_iter().enumerate() {
        for load in LOADS {
            // New processes: no load inherits the backlog of another one.
            let (_origin, gateway, address) = start(tools, tidegate, (name, key), &scratch)?;
            // The first half is for the limit, which adapts to the load.
            let half = Duration::from_secs(seconds) / 2;
            let target = LoadTarget::plain(address, &["/".to_owned()], "");
            let load_of = OpenLoopLoad {
                target: &target,
                rate: capacity * load,
                warm_up: half,
                time: half,
                connections: CONNECTIONS,
                timeout: PATIENCE,
                threads: 1,
                stop: None,
            };
            let report = load_of.run(|_| ())?;
            drop(gateway);
            let goodput = report.good as f64 / half.as_secs_f64();
            best[index] = best[index].max(goodput);
            if load == 2.0 {
                at_twice[index] = goodput;
            }
            write_row(&mut out, (name, load), goodput / capacity, &report);
            eprintln!("knee: limit {name}, load {load}: {goodput:.0}/s");
        }
    }
    writeln!(
        out,
        "\nGoodput at twice the capacity, as a ratio to the peak: {:.3} without a limit, {:.3} with it.\n",
        at_twice[0] / best[0],
        at_twice[1] / best[1]
    )
    .expect("writing to a string does not fail");
    Ok(out)
}

fn start(
    tools: &Tools,
    tidegate: &Path,
    (name, key): (&str, &str),
    scratch: &ScratchDirectory,
) -> Result<(ChildProcess, ChildProcess, SocketAddr)> {
    let [origin, address, admin] = free_addresses()?;
    let mut command = tools.pinned(LOAD_CORE, &this_program()?);
    let service = POOL.service.as_millis().to_string();
    command.args(["origin", "--listen", &origin.to_string(), "--workers", &POOL.workers.to_string()]);
    command.args(["--service-ms", &service]);
    let mut origin_process = ChildProcess::start("origin", command, scratch)?;
    let is_ready = |address| {
        CheckConnection::open(address)
            .and_then(|mut client| client.get("/"))
            .is_ok_and(|response| response.status == 200)
    };
    origin_process.await_ready(READY_TIMEOUT, || is_ready(origin))?;
    let config = format!(
        "version = 1\n[log]\naccess = \"off\"\n[[listen]]\naddress = \"{address}\"\n[admin]\naddress = \"{admin}\"\n\
         [upstreams.pool]\nendpoints = [\"http://{origin}\"]\n{key}[upstreams.pool.breaker]\nmode = \"off\"\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"pool\"\ncache = {{ mode = \"off\" }}\n"
    );
    let file = scratch.write(&format!("{name}.toml"), &config)?;
    let mut command = tools.pinned(SERVER_CORE, tidegate);
    command.arg("run").arg("--config").arg(file);
    let mut gateway = ChildProcess::start(name, command, scratch)?;
    gateway.await_ready(READY_TIMEOUT, || is_ready(address))?;
    Ok((origin_process, gateway, address))
}

fn write_row(out: &mut String, (name, load): (&str, f64), of_capacity: f64, report: &OpenLoopReport) {
    let millis = |percent: f64| report.percentile(percent).as_secs_f64() * 1e3;
    let share = |count: u64| 100.0 * count as f64 / report.offered.max(1) as f64;
    writeln!(
        out,
        "| {name} | {load:.1} | {:.0} | {of_capacity:.3} | {:.0} | {:.0} | {:.1} % | {:.1} % |",
        of_capacity * POOL.workers as f64 / POOL.service.as_secs_f64(),
        millis(50.0),
        millis(99.0),
        share(report.rejected),
        share(report.failed)
    )
    .expect("writing to a string does not fail");
}
