//! Case `hot-region`: most of the load on one key of a region with four Redis servers, then one of
//! the servers hangs.

use std::net::SocketAddr;
use std::time::Duration;

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::load::{CaseLoad, run_all};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::faults::plan::FaultPlan;
use crate::faults::proxy::FaultProxy;
use crate::load::open_loop::OpenLoopReport;
use crate::report::line_chart::{ChartSeries, LineChart, SeriesForm};
use crate::servers::redis_server::RedisServer;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const SERVERS: usize = 4;
const KEYS: usize = 200;
/// Bodies of all keys together are far above the memory of 1 MiB.
const BODY_BYTES: usize = 40 << 10;
const RATE: f64 = 300.0;

const CONFIG: &str = r#"
[log]
access = "off"
[redis]
deadline = "100ms"
secret = "field-case-secret"
[redis.regions.default]
endpoints = [@REDIS@]
slots = 16
[cache]
memory = "1MiB"
object_bytes = "256KiB"
remote_object_bytes = "256KiB"
hot_rate = "50/s"
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "origin"
"#;

/// A gateway with four Redis servers, each behind a fault proxy.
struct Region {
    servers: Vec<RedisServer>,
    proxies: Vec<FaultProxy>,
    gateway: CaseGateway,
    origin: ScriptedOrigin,
}

/// One phase of load.
struct Phase {
    report: OpenLoopReport,
    /// Reads of each server.
    reads: Vec<u64>,
    origin: u64,
}

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let time = Duration::from_secs(context.pick(4, 30));
    let region = Region::start(context)?;
    let mut report = CaseReport::new(format!(
        "A region of {SERVERS} Redis servers with {KEYS} responses of {} KiB, above the local memory of 1 MiB. {RATE:.0} requests a \
         second, spread evenly, then 90 % for one key, then with one of the servers hanging.",
        BODY_BYTES >> 10
    ));
    region.fill()?;
    let even = region.load(time, 0.0)?;
    let hot = region.load(time, 0.9)?;
    // The server with fewest reads of the hot phase hangs, or any other: none may matter.
    region.proxies[0].set_plan(FaultPlan::parse("hang").map_err(LoadtestError::Usage)?);
    let hung = region.load(time, 0.9)?;
    region.proxies[0].set_plan(FaultPlan::default());
    for (name, phase) in [("even", &even), ("90 % on one key", &hot), ("with a server that hangs", &hung)] {
        let (good, all) = (phase.report.good, phase.report.offered);
        report.check(format!("{name}: every request is good"), (format!("{good} of {all}"), good == all));
    }
    let per_request = |phase: &Phase| phase.reads.iter().sum::<u64>() as f64 / phase.report.offered.max(1) as f64;
    report.check(
        "the hot key is answered locally: less than half of the reads from Redis",
        (
            format!("{:.2} reads a request, {:.2} of the even load", per_request(&hot), per_request(&even)),
            per_request(&hot) < 0.5 * per_request(&even),
        ),
    );
    let millis = |phase: &Phase, percent| phase.report.percentile(percent).as_secs_f64() * 1e3;
    report.check(
        "its p99 is at most twice that of the even load, or 20 ms",
        (
            format!("{:.1} ms, even {:.1} ms", millis(&hot, 99.0), millis(&even, 99.0)),
            millis(&hot, 99.0) <= (2.0 * millis(&even, 99.0)).max(20.0),
        ),
    );
    report.check(
        "a server that hangs does not slow the requests that do not need it: p50 at most twice that of before, or 10 ms",
        (format!("{:.1} ms, before {:.1} ms; p99 {:.1} ms", millis(&hung, 50.0), millis(&hot, 50.0), millis(&hung, 99.0)), millis(&hung, 50.0) <= (2.0 * millis(&hot, 50.0)).max(10.0)),
    );
    report.check(
        "its keys come from the origin: at most the share of one server of the cold keys, and a read more for each",
        (
            format!("{} requests at the origin of {}", hung.origin, hung.report.offered),
            hung.origin * 5 <= hung.report.offered,
        ),
    );
    report.charts.push(chart(&[("even", &even), ("hot", &hot), ("hung", &hung)]));
    Ok(report)
}

impl Region {
    fn start(context: &CaseContext<'_>) -> Result<Self> {
        let body = "x".repeat(BODY_BYTES);
        let origin = ScriptedOrigin::start(move |_| OriginAnswer::ok(body.clone()).field("Cache-Control: max-age=600"));
        let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
        let (mut servers, mut proxies) = (Vec::new(), Vec::new());
        for number in 0..SERVERS {
            let server = RedisServer::start(&format!("redis-hot-{number}"), context.tools, context.scratch)?;
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let proxy = FaultProxy::start(any, server.address(), (FaultPlan::default(), 1));
            proxies.push(proxy.map_err(LoadtestError::io("the fault proxy does not start"))?);
            servers.push(server);
        }
        let urls: Vec<String> = proxies.iter().map(|proxy| format!("\"redis://{}\"", proxy.address())).collect();
        let config = CONFIG.replace("@REDIS@", &urls.join(", ")).replace("@ORIGIN@", &origin.address.to_string());
        let gateway = CaseGateway::start(context, "hot-region", &config)?;
        gateway.await_whole(Duration::from_secs(10))?;
        Ok(Region { servers, proxies, gateway, origin })
    }

    /// Requests every key until the origin gets no more requests.
    fn fill(&self) -> Result<()> {
        let mut client = self.gateway.client();
        for _ in 0..10 {
            let before = self.origin.requests();
            for key in 0..KEYS {
                let target = format!("/key/{key}");
                client.get(&target, "").map_err(LoadtestError::io(format!("the gateway at {target}")))?;
            }
            if self.origin.requests() == before {
                return Ok(());
            }
        }
        Err(LoadtestError::Load("some keys are never stored in Redis".to_owned()))
    }

    fn load(&self, time: Duration, hot: f64) -> Result<Phase> {
        let (reads, requests) = (self.reads()?, self.origin.requests());
        let spread = CaseLoad {
            paths: (0..KEYS).map(|key| format!("/key/{key}")).collect(),
            ..CaseLoad::new(self.gateway.address, "", (RATE * (1.0 - hot), time))
        };
        let one = (hot > 0.0).then(|| CaseLoad::new(self.gateway.address, "/key/7", (RATE * hot, time)));
        let loads: Vec<CaseLoad> = std::iter::once(spread).chain(one).collect();
        let mut report = OpenLoopReport::default();
        run_all(&loads)?.iter().for_each(|part| report.add_all(part));
        let reads = self.reads()?.iter().zip(&reads).map(|(after, before)| after - before).collect();
        Ok(Phase { report, reads, origin: self.origin.requests() - requests })
    }

    fn reads(&self) -> Result<Vec<u64>> {
        self.servers.iter().map(RedisServer::reads).collect()
    }
}

fn chart(phases: &[(&str, &Phase)]) -> LineChart {
    let percentiles = [1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0];
    let series = phases.iter().map(|(name, phase)| ChartSeries {
        name: (*name).to_owned(),
        form: SeriesForm::Line,
        points: percentiles
            .iter()
            .map(|percent| (*percent, phase.report.percentile(*percent).as_secs_f64() * 1e3))
            .collect(),
    });
    LineChart {
        title: "Latency by percentile".to_owned(),
        x_label: "% of the requests".to_owned(),
        y_label: "ms".to_owned(),
        series: series.collect(),
        marks: Vec::new(),
    }
}
