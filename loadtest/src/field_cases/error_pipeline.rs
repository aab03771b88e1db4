//! Case `error-pipeline`: failures of every stage, each counted and logged once, with its class,
//! the side to blame and the request's id.

use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;

use crate::case::client::{self, CaseClient};
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::servers::free_address::free_addresses;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const WAIT: Duration = Duration::from_secs(10);

const CONFIG: &str = r#"
[limits.none]
tier = "device"
rate = "1/h"
burst = 1
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
timeout = "300ms"
eject = { after = 0 }
[upstreams.origin.breaker]
mode = "off"
[upstreams.absent]
endpoints = ["http://@ABSENT@"]
eject = { after = 0 }
[upstreams.absent.breaker]
mode = "off"
[upstreams.broken]
endpoints = ["http://@ORIGIN@"]
eject = { after = 0 }
[upstreams.broken.breaker]
minimum = 3
open = "1m"
[[routes]]
name = "limited"
match = { path = "/limited/*" }
respond = { status = 200 }
limits = ["none"]
[[routes]]
name = "absent"
match = { path = "/absent/*" }
upstream = "absent"
cache = { mode = "off" }
[[routes]]
name = "broken"
match = { path = "/broken/*" }
upstream = "broken"
cache = { mode = "off" }
[[routes]]
name = "origin"
match = { path = "/origin/*" }
upstream = "origin"
cache = { mode = "off" }
"#;

/// Failures of one class: the metric that counts them, and the field of the access log that has
/// their class.
struct FailureClass {
    metric: &'static str,
    field: &'static str,
    class: &'static str,
    /// A field of the line that names the cause, and its value.
    cause: (&'static str, &'static str),
}

const fn failure(metric: &'static str, class: &'static str, cause: (&'static str, &'static str)) -> FailureClass {
    FailureClass { metric, field: "failure", class, cause }
}

const CLASSES: [FailureClass; 7] = [
    failure("tidegate_failures_total{kind=\"no_route\"}", "no_route", ("blame", "client")),
    failure("tidegate_failures_total{kind=\"limited\"}", "limited", ("limit", "none")),
    failure("tidegate_failures_total{kind=\"connect\"}", "connect", ("blame", "upstream")),
    failure("tidegate_failures_total{kind=\"timeout\"}", "timeout", ("blame", "upstream")),
    failure("tidegate_failures_total{kind=\"malformed\"}", "malformed", ("blame", "upstream")),
    failure("tidegate_failures_total{kind=\"breaker_open\"}", "breaker_open", ("blame", "gateway")),
    FailureClass {
        metric: "tidegate_responses_aborted_total{reason=\"client_closed\"}",
        field: "aborted",
        class: "client_closed",
        cause: ("blame", "client"),
    },
];

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let count = context.pick(20, 1_000);
    let origin = ScriptedOrigin::start(|request| match request.target.split('/').nth(2) {
        Some("hang") => OriginAnswer::ok("late").after(Duration::from_secs(3_600)),
        Some("fail") => OriginAnswer::status(500),
        Some("malformed") => OriginAnswer::ok("x").field("Content-Length: 99"),
        _ => OriginAnswer::ok("ok\n"),
    });
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let [absent] = free_addresses()?;
    let config = CONFIG.replace("@ORIGIN@", &origin.address.to_string()).replace("@ABSENT@", &absent.to_string());
    let gateway = CaseGateway::start(context, "error-pipeline", &config)?;
    let mut report = CaseReport::new(format!(
        "{count} failures of each of seven kinds: no route, a limit, no connection to the upstream, no response in time, a malformed \
         response, calls of an open breaker, and a client that goes away. Each has a trace and an id of its own."
    ));
    provoke(&gateway, &origin, count)?;
    let total = CLASSES.len() * count;
    let lines = access_log(&gateway, total)?;
    for FailureClass { metric, field, class, cause: (name, value) } in CLASSES {
        let counted = gateway.metric(metric)? as usize;
        let logged: Vec<&Value> = lines.iter().filter(|line| line[field] == class).collect();
        let caused = logged.iter().filter(|line| line[name] == value).count();
        report.check(
            format!("`{class}`: each is counted once and logged once, with `{name}` {value}"),
            (
                format!("{counted} counted, {} logged, {caused} with it, of {count}", logged.len()),
                [counted, logged.len(), caused] == [count; 3],
            ),
        );
    }
    let all = gateway.metric("tidegate_failures_total{")? + gateway.metric("tidegate_responses_aborted_total{")?;
    report.check("and nothing else is counted", (format!("{all:.0} of {total}"), all as usize == total));
    let mut traces: Vec<&str> = lines.iter().filter_map(|line| line["trace_id"].as_str()).collect();
    traces.sort_unstable();
    traces.dedup();
    report.check(
        "each line names its trace",
        (format!("{} different of {}", traces.len(), lines.len()), traces.len() == total && lines.len() == total),
    );
    let opened = gateway.metric("tidegate_events_total{event=\"breaker_opened\"")?;
    report.check("failures reach the breaker: it opened once", (format!("{opened:.0}"), opened == 1.0));
    let warnings =
        gateway.output().matches("\"level\":\"warn\"").count() + gateway.output().matches("\"level\":\"WARN\"").count();
    report.check(
        "the process log warns, at most once a second for each kind",
        (format!("{warnings} warnings for {total} failures"), warnings > 0 && warnings < total),
    );
    Ok(report)
}

fn provoke(gateway: &CaseGateway, origin: &ScriptedOrigin, count: usize) -> Result<()> {
    let mut client = gateway.client();
    let mut repeat = |times: usize, path: &str| -> Result<()> {
        for _ in 0..times {
            get(&mut client, path)?;
        }
        Ok(())
    };
    repeat(count, "/nowhere/a")?;
    repeat(count + 1, "/limited/a")?;
    repeat(count, "/absent/a")?;
    repeat(count, "/origin/hang")?;
    repeat(count, "/origin/malformed")?;
    // The origin's own errors are responses, until the breaker opens.
    repeat(3, "/broken/fail")?;
    repeat(count, "/broken/fail")?;
    for _ in 0..count {
        let requests = origin.requests();
        let mut stream = client::open(gateway.address).map_err(LoadtestError::io("the gateway does not accept"))?;
        stream.write_all(b"GET /origin/hang HTTP/1.1\r\nHost: a\r\n\r\n").map_err(LoadtestError::io("no request"))?;
        wait_for(WAIT, || Ok((origin.requests() > requests).then_some(())))?;
    }
    Ok(())
}

fn get(client: &mut CaseClient, path: &str) -> Result<()> {
    client
        .get(path, "Accept: application/json\r\n")
        .map(drop)
        .map_err(LoadtestError::io(format!("the gateway at {path}")))
}

/// The lines of failed requests in the access log, when there are `total` of them or after a wait.
fn access_log(gateway: &CaseGateway, total: usize) -> Result<Vec<Value>> {
    let read = || -> Vec<Value> {
        let output = gateway.output();
        let lines = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .filter(|line| (line["failure"].is_string() || line["aborted"].is_string()) && line["path"].is_string())
            .collect()
    };
    wait_for(WAIT, || Ok((read().len() >= total).then_some(())))?;
    Ok(read())
}
