//! Case `worker-pool`: an endpoint that answers too late rests, and the concurrency limit follows
//! the demand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::load::CaseLoad;
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const ENDPOINTS: usize = 3;
/// Far above the time of a good call.
const TIMEOUT: Duration = Duration::from_millis(400);

/// Of a good call.
const SERVICE: Duration = Duration::from_millis(50);

const CONFIG: &str = r#"
[log]
access = "off"
[upstreams.pool]
endpoints = [@ORIGINS@]
balance = "round-robin"
timeout = "400ms"
concurrency = {}
eject = { after = 3, base = "@REST@", share = 0.5 }
[upstreams.pool.breaker]
mode = "off"
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "pool"
cache = { mode = "off" }
"#;

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let (rest, seconds) = context.pick((3, 3), (30, 20));
    let hangs = Arc::new(AtomicBool::new(false));
    let origins = (0..ENDPOINTS).map(|number| start(number, &hangs)).collect::<Result<Vec<_>>>()?;
    let endpoints: Vec<String> = origins.iter().map(|origin| format!("\"http://{}\"", origin.address)).collect();
    let config = CONFIG.replace("@ORIGINS@", &endpoints.join(", ")).replace("@REST@", &format!("{rest}s"));
    let gateway = CaseGateway::start(context, "worker-pool", &config)?;
    let mut report = CaseReport::new(format!(
        "{ENDPOINTS} endpoints in turn, a timeout of {} ms. One of them stops answering under 60 requests a second, and answers again \
         {seconds} s later. Three timeouts in a row rest it for {rest} s (the documented default is 30 s after five, or after three \
         windows of 10 s with 80 % timeouts).",
        TIMEOUT.as_millis()
    ));
    let load = |seconds| CaseLoad::new(gateway.address, "/a", (60.0, Duration::from_secs(seconds))).run();
    let healthy = load(seconds)?;
    let before: Vec<u64> = origins.iter().map(ScriptedOrigin::requests).collect();
    report.check(
        "healthy endpoints share the load evenly",
        (
            format!("{before:?}"),
            before.iter().max() <= before.iter().min().map(|least| least + least / 5 + 2).as_ref()
                && healthy.good == healthy.offered,
        ),
    );
    hangs.store(true, Relaxed);
    let onset = load(2)?;
    let ejected = gateway.metric("tidegate_upstream_ejections_total{upstream=\"pool\"")?;
    report.check(
        "the endpoint is ejected, and its failures end",
        (
            format!("{ejected:.0} ejections, {} of {} requests failed", onset.offered - onset.good, onset.offered),
            ejected >= 1.0,
        ),
    );
    let asked = origins[0].requests();
    // Less than the rest.
    let resting = load(1)?;
    let while_resting = origins[0].requests() - asked;
    report.check(
        "while it rests, it gets no request and no request fails",
        (
            format!("{while_resting} requests; {} of {} good", resting.good, resting.offered),
            while_resting == 0 && resting.good == resting.offered,
        ),
    );
    let (state, reason) = endpoint_state(&gateway, &origins[0])?;
    report.check("the admin address says so", (format!("state {state}, reason {reason}"), state != "available"));
    hangs.store(false, Relaxed);
    recovery(&gateway, &origins[0], &mut report)?;
    limit(&gateway, &mut report)?;
    Ok(report)
}

/// An endpoint whose calls take `SERVICE`; the first one may hang.
fn start(number: usize, hangs: &Arc<AtomicBool>) -> Result<ScriptedOrigin> {
    let hangs = Arc::clone(hangs);
    let origin = ScriptedOrigin::start(move |_| {
        let delay = match number == 0 && hangs.load(Relaxed) {
            true => Duration::from_secs(3_600),
            false => SERVICE,
        };
        OriginAnswer::ok("ok\n").after(delay)
    });
    origin.map_err(LoadtestError::io("the origin does not start"))
}

fn endpoint_state(gateway: &CaseGateway, origin: &ScriptedOrigin) -> Result<(String, String)> {
    let status = gateway.admin_json("/api/v1/status")?;
    let address = origin.address.to_string();
    let endpoints = status["upstreams"][0]["endpoints"].as_array().cloned().unwrap_or_default();
    let found = endpoints.iter().find(|endpoint| endpoint["name"].as_str().is_some_and(|name| name.contains(&address)));
    let text = |key: &str| found.and_then(|endpoint| endpoint[key].as_str()).unwrap_or("unknown").to_owned();
    Ok((text("state"), text("reason")))
}

fn recovery(gateway: &CaseGateway, origin: &ScriptedOrigin, report: &mut CaseReport) -> Result<()> {
    let (began, asked) = (Instant::now(), origin.answered());
    let mut client = gateway.client();
    let back = wait_for(Duration::from_secs(90), || {
        client.get("/a", "").map_err(LoadtestError::io("the gateway does not respond"))?;
        Ok((origin.answered() > asked + 5).then_some(()))
    })?;
    report.check(
        "after its rest it gets requests again",
        (back.map_or("no".to_owned(), |()| format!("after {:.1} s", began.elapsed().as_secs_f64())), back.is_some()),
    );
    Ok(())
}

/// The limit of calls in progress follows a demand of five times as many, and rest does not shrink
/// it.
fn limit(gateway: &CaseGateway, report: &mut CaseReport) -> Result<()> {
    let of_limit = || gateway.metric("tidegate_upstream_concurrency_limit{upstream=\"pool\"}");
    let before = of_limit()?;
    let load = CaseLoad::new(gateway.address, "/a", (300.0, Duration::from_secs(5))).run()?;
    let (loaded, needed) = (of_limit()?, 300.0 * SERVICE.as_secs_f64());
    std::thread::sleep(Duration::from_secs(2));
    let after = of_limit()?;
    report.check(
        format!("the limit of calls in progress lets through what the pool can serve ({needed:.0} at a time)"),
        (
            format!("limit {before:.0}, under load {loaded:.0}; {} of {} good", load.good, load.offered),
            loaded >= needed && 100 * load.good >= 95 * load.offered,
        ),
    );
    report.check("and does not shrink without demand", (format!("{loaded:.0}, then {after:.0}"), after >= loaded));
    Ok(())
}
