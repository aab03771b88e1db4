//! Case `knee`: an origin whose capacity is known, below and above it, with and without the
//! adaptive concurrency limit.

use std::time::Duration;

use crate::case::client::CaseClient;
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::report::CaseReport;
use crate::error::Result;
use crate::load::open_loop::{OpenLoopLoad, OpenLoopReport, PATIENCE};
use crate::load::target::LoadTarget;
use crate::process::child::ChildProcess;
use crate::process::tools::this_program;
use crate::report::line_chart::{ChartSeries, LineChart, SeriesForm};
use crate::servers::free_address::free_addresses;
use crate::servers::worker_pool_origin::WorkerPool;

const POOL: WorkerPool = WorkerPool { workers: 10, service: Duration::from_millis(40) };
const LOADS_SHORT: [f64; 3] = [0.8, 1.0, 2.0];
const LOADS_LONG: [f64; 7] = [0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0];
const READY_TIMEOUT: Duration = Duration::from_secs(20);
const RATIO: f64 = 0.98;

const CONFIG: &str = r#"
[log]
access = "off"
[limits_http]
connections_per_ip = 20000
[upstreams.pool]
endpoints = ["http://@ORIGIN@"]
@LIMIT@
[upstreams.pool.breaker]
mode = "off"
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "pool"
cache = { mode = "off" }
"#;

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let loads: &[f64] = context.pick(LOADS_SHORT.as_slice(), LOADS_LONG.as_slice());
    let (warm_up, time) = context.pick((2, 2), (10, 20));
    let capacity = POOL.workers as f64 / POOL.service.as_secs_f64();
    let mut report = CaseReport::new(format!(
        "An origin with {} workers of {} ms ({capacity:.0} requests/s), which slows down with many requests in progress. Open-model \
         loads of {loads:?} times that, each on new processes, for {time} s after {warm_up} s; clients give up after {PATIENCE:?}.",
        POOL.workers,
        POOL.service.as_millis()
    ));
    let mut series = Vec::new();
    let mut at_twice = Vec::new();
    for (name, key) in [("without a limit", ""), ("adaptive limit", "concurrency = {}")] {
        let mut points = Vec::new();
        for load in loads {
            let measured = measure(context, key, (capacity * load, warm_up, time))?;
            points.push((*load, measured.good as f64 / time as f64 / capacity, measured));
        }
        let peak = points.iter().map(|point| point.1).fold(0.0, f64::max);
        let twice = points.iter().find(|point| point.0 == 2.0).map_or(0.0, |point| point.1);
        at_twice.push((twice / peak, points.last().map_or(0, |point| point.2.failed)));
        series.push(ChartSeries {
            name: name.to_owned(),
            form: SeriesForm::Line,
            points: points.iter().map(|point| (point.0, point.1)).collect(),
        });
    }
    report.check(
        "with the limit, goodput at twice the capacity is at least 0.98 of the peak",
        (format!("{:.3}; without a limit {:.3}", at_twice[1].0, at_twice[0].0), at_twice[1].0 >= RATIO),
    );
    report.check(
        "without the limit it is lower, so that the load shows what the limit does",
        (format!("{:.3}", at_twice[0].0), at_twice[0].0 < at_twice[1].0),
    );
    report.charts.push(LineChart {
        title: "Goodput by load, as parts of the capacity".to_owned(),
        x_label: "offered".to_owned(),
        y_label: "good responses".to_owned(),
        series,
        marks: vec![(1.0, "capacity".to_owned())],
    });
    threads(context, &mut report)?;
    Ok(report)
}

fn measure(context: &CaseContext<'_>, key: &str, (rate, warm_up, time): (f64, u64, u64)) -> Result<OpenLoopReport> {
    let [origin] = free_addresses()?;
    let mut command = context.command(&this_program()?);
    command.args(["origin", "--listen", &origin.to_string(), "--workers", &POOL.workers.to_string()]);
    command.args(["--service-ms", &POOL.service.as_millis().to_string()]);
    let mut process = ChildProcess::start("knee-origin", command, context.scratch)?;
    process.await_ready(READY_TIMEOUT, || CaseClient::new(origin).get("/", "").is_ok())?;
    let config = CONFIG.replace("@ORIGIN@", &origin.to_string()).replace("@LIMIT@", key);
    let gateway = CaseGateway::start(context, "knee", &config)?;
    let target = LoadTarget::plain(gateway.address, &["/".to_owned()], "");
    let load = OpenLoopLoad {
        target: &target,
        rate,
        warm_up: Duration::from_secs(warm_up),
        time: Duration::from_secs(time),
        connections: 4_096,
        timeout: PATIENCE,
        threads: 1,
        stop: None,
    };
    load.run(|_| ())
}

/// Worker threads are as many as cores.
fn threads(context: &CaseContext<'_>, report: &mut CaseReport) -> Result<()> {
    let config = "[server]\nworkers = 0\ndrain_idle = \"0s\"\n[[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nrespond = { status = 200 }\n";
    let gateway = CaseGateway::start(context, "knee-threads", config)?;
    let tasks = std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).into_iter().flatten().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    let workers = names.filter(|name| name.starts_with("worker-")).count();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    report.check(
        "`workers = 0` is one worker thread per core",
        (format!("{workers} on {cores} cores"), workers == cores),
    );
    Ok(())
}
