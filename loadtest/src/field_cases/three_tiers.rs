//! Case `three-tiers`: limits of device, node and cluster under loads above each, and calls that
//! take too long.

use std::time::{Duration, Instant};

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::journal::journal_criterion;
use crate::case::load::{CaseLoad, run_all};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::servers::redis_server::RedisServer;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

/// Requests per second and burst of each scope: those of the field case, divided.
const DEVICE: (f64, f64) = (20.0, 20.0);
const NODE: (f64, f64) = (150.0, 30.0);
const CLUSTER: (f64, f64) = (200.0, 40.0);
/// The origin's slowest call that is waited for.
const TIMEOUT: Duration = Duration::from_secs(3);

const CONFIG: &str = r#"
[log]
access = "off"
[identity]
device = ["header:x-device-id"]
secret = "field-case-secret"
[redis]
deadline = "1s"
nodes = 2
[redis.regions.default]
endpoints = ["@REDIS@"]
[limits.device]
tier = "device"
rate = "20/s"
burst = 20
[limits.node]
tier = "node"
rate = "150/s"
burst = 30
[limits.cluster]
tier = "cluster"
rate = "200/s"
burst = 40
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
timeout = "3s"
eject = { after = 0 }
[upstreams.origin.breaker]
mode = "off"
[[routes]]
name = "slow"
match = { path = "/slow/*" }
upstream = "origin"
cache = { mode = "off" }
[[routes]]
name = "limited"
match = { path = "/*" }
upstream = "origin"
limits = ["device", "node", "cluster"]
cache = { mode = "off" }
"#;

/// Requests that a limit may admit in a load.
fn bound((rate, burst): (f64, f64), time: Duration) -> u64 {
    // The load ends up to its timeout later; what is admitted was sent within `time` and a moment.
    (rate * (time.as_secs_f64() + 0.5) + burst) as u64
}

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let time = Duration::from_secs(context.pick(4, 60));
    let redis = RedisServer::start("redis-three-tiers", context.tools, context.scratch)?;
    let origin = ScriptedOrigin::start(|request| match request.target.starts_with("/slow/") {
        true => OriginAnswer::ok("late").after(Duration::from_secs(3_600)),
        false => OriginAnswer::ok("ok\n"),
    });
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let config = CONFIG.replace("@REDIS@", &redis.url()).replace("@ORIGIN@", &origin.address.to_string());
    let gateways = ["tiers-1", "tiers-2"].map(|name| CaseGateway::start(context, name, &config));
    let [one, other] = gateways;
    let gateways = [one?, other?];
    for gateway in &gateways {
        gateway.await_whole(Duration::from_secs(10))?;
        // Without a first grant of the cluster's limit, a request is denied.
        let granted = || Ok((gateway.metric("tidegate_limit_local_fallback{")? == 0.0).then_some(()));
        wait_for(Duration::from_secs(10), granted)?;
    }
    let mut report = CaseReport::new(format!(
        "Two gateways with limits of {}/s for a device, {}/s for a node and {}/s for the cluster (the field case's 100, 3,000 and \
         50,000, divided), loads of about three times each for {} s, and a call that takes longer than 3 s.",
        DEVICE.0,
        NODE.0,
        CLUSTER.0,
        time.as_secs()
    ));
    one_device(&gateways[0], time, &mut report)?;
    many_devices(&gateways, time, &mut report)?;
    slow_call(&gateways[0], &mut report)?;
    journal_criterion(context, &mut report, ("a slow write is accepted (202), journalled and replayed", "slow"))?;
    Ok(report)
}

fn load(gateways: &[CaseGateway], device: &str, (rate, time): (f64, Duration)) -> CaseLoad {
    CaseLoad {
        addresses: gateways.iter().map(|gateway| gateway.address).collect(),
        fields: format!("x-device-id: {device}\r\n"),
        ..CaseLoad::new(gateways[0].address, "/a", (rate, time))
    }
}

/// A device above its limit, beside one that keeps it.
fn one_device(gateway: &CaseGateway, time: Duration, report: &mut CaseReport) -> Result<()> {
    let gateways = std::slice::from_ref(gateway);
    let reports =
        run_all(&[load(gateways, "greedy", (3.0 * DEVICE.0, time)), load(gateways, "modest", (DEVICE.0 / 2.0, time))])?;
    let most = bound(DEVICE, time);
    report.check(
        "a device above its limit is admitted rate * t + burst at most, and not much less",
        (
            format!("{} of {} offered, at most {most}", reports[0].good, reports[0].offered),
            reports[0].good <= most && reports[0].good >= most * 7 / 10,
        ),
    );
    report.check(
        "a device that keeps its limit loses nothing meanwhile: denials of one scope spend nothing in another",
        (format!("{} of {}", reports[1].good, reports[1].offered), reports[1].good == reports[1].offered),
    );
    Ok(())
}

/// Many devices, none above its limit, above those of a node and of the cluster.
fn many_devices(gateways: &[CaseGateway; 2], time: Duration, report: &mut CaseReport) -> Result<()> {
    let devices = |prefix: &str, gateways: &[CaseGateway], total: f64| -> Vec<CaseLoad> {
        let count = (total / (DEVICE.0 * 0.75)) as usize;
        let device = |number: usize| {
            let mut load = load(gateways, &format!("{prefix}-{number}"), (total / count as f64, time));
            // A device keeps its first connection: without this, all would keep one to the first
            // node.
            load.addresses.rotate_left(number % gateways.len());
            load
        };
        (0..count).map(device).collect()
    };
    let reports = run_all(&devices("node", &gateways[..1], 3.0 * NODE.0))?;
    let (good, offered) = reports.iter().fold((0, 0), |sum, report| (sum.0 + report.good, sum.1 + report.offered));
    let most = bound(NODE, time);
    report.check(
        "a node admits rate * t + burst at most",
        (format!("{good} of {offered} offered, at most {most}"), good <= most && good >= most * 7 / 10),
    );
    let reports = run_all(&devices("cluster", gateways, 3.0 * CLUSTER.0))?;
    let (good, offered) = reports.iter().fold((0, 0), |sum, report| (sum.0 + report.good, sum.1 + report.offered));
    let most = bound(CLUSTER, time);
    report.check(
        "both nodes together admit the cluster's rate * t + burst at most, and at least 0.7 of it",
        (format!("{good} of {offered} offered, at most {most}"), good <= most && good >= most * 7 / 10),
    );
    Ok(())
}

fn slow_call(gateway: &CaseGateway, report: &mut CaseReport) -> Result<()> {
    let began = Instant::now();
    let response = gateway.client().get("/slow/a", "Accept: application/json\r\n");
    let response = response.map_err(LoadtestError::io("the gateway does not respond"))?;
    let took = began.elapsed();
    report.check(
        "a call over 3 s is cut off and answered with the degrade page",
        (
            format!("status {} after {:.2} s", response.status, took.as_secs_f64()),
            matches!(response.status, 503 | 504) && took >= TIMEOUT && response.field("retry-after").is_some(),
        ),
    );
    Ok(())
}
