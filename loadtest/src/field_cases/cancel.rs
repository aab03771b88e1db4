//! Case `cancel`: clients that go away cancel the work of the origin, unless another client waits
//! for the same response.

use std::time::{Duration, Instant};
use std::{io::Write as _, thread};

use crate::case::client;
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::report::line_chart::{ChartSeries, LineChart, SeriesForm};
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const WITHIN: Duration = Duration::from_millis(100);
/// The request of both clients: the host is a part of the cache key too.
const SHARED: &[u8] = b"GET /shared/a HTTP/1.1\r\nHost: shop.example\r\n\r\n";
const WAIT: Duration = Duration::from_secs(20);

const CONFIG: &str = r#"
[log]
access = "off"
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
timeout = "1m"
[upstreams.origin.breaker]
mode = "off"
[[routes]]
name = "pass"
match = { path = "/pass/*" }
upstream = "origin"
cache = { mode = "off" }
[[routes]]
name = "shared"
match = { path = "/shared/*" }
upstream = "origin"
"#;

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let clients: usize = context.pick(100, 2_000);
    let origin = ScriptedOrigin::start(|request| match request.target.as_str() {
        "/shared/a" => OriginAnswer::ok("whole").field("Cache-Control: max-age=60").after(Duration::from_secs(2)),
        _ => OriginAnswer::ok("late").after(Duration::from_secs(3_600)),
    });
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let gateway = CaseGateway::start(context, "cancel", &CONFIG.replace("@ORIGIN@", &origin.address.to_string()))?;
    let mut report = CaseReport::new(format!(
        "{clients} clients, one after another, send a request that the origin does not answer, and close their connection. \
         Then two clients wait for the same response, and the first of them, whose request fetches it, goes away."
    ));
    let mut delays = Vec::new();
    for number in 0..clients {
        delays.extend(depart(&origin, &gateway, number)?);
    }
    delays.sort_unstable();
    let within = delays.iter().filter(|delay| **delay <= WITHIN).count();
    report.check(
        "every request whose client has gone is cancelled at the origin",
        (format!("{} of {clients}", delays.len()), delays.len() == clients),
    );
    let at = |percent: usize| delays.get(delays.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default();
    report.check(
        "at least 95 % of them within 100 ms",
        (format!("{within} of {clients}; p50 {:?}, p99 {:?}", at(50), at(99)), 100 * within >= 95 * clients),
    );
    shared(&origin, &gateway, &mut report)?;
    let total = delays.len().max(1) as f64;
    let points =
        delays.iter().enumerate().map(|(n, delay)| (delay.as_secs_f64() * 1e3, 100.0 * (n + 1) as f64 / total));
    report.charts.push(LineChart {
        title: "From the client's close to the cancellation at the origin".to_owned(),
        x_label: "ms".to_owned(),
        y_label: "% of the requests".to_owned(),
        series: vec![ChartSeries { name: "cancelled".to_owned(), form: SeriesForm::Line, points: points.collect() }],
        marks: vec![(100.0, "100 ms".to_owned())],
    });
    Ok(report)
}

/// The time from a client's close to the close of its request at the origin; `None` without one.
fn depart(origin: &ScriptedOrigin, gateway: &CaseGateway, number: usize) -> Result<Option<Duration>> {
    let (requests, departures) = (origin.requests(), origin.departures().len());
    let mut stream = client::open(gateway.address).map_err(LoadtestError::io("the gateway does not accept"))?;
    let request = format!("GET /pass/{number} HTTP/1.1\r\nHost: a\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(LoadtestError::io("a request cannot be sent"))?;
    wait_for(WAIT, || Ok((origin.requests() > requests).then_some(())))?;
    let closed = Instant::now();
    drop(stream);
    let departed = wait_for(WAIT, || Ok((origin.departures().len() > departures).then_some(())))?;
    Ok(departed.and_then(|()| origin.departures().last().map(|at| at.saturating_duration_since(closed))))
}

/// The response for one waiting client outlives the other client.
fn shared(origin: &ScriptedOrigin, gateway: &CaseGateway, report: &mut CaseReport) -> Result<()> {
    let (requests, departures) = (origin.requests(), origin.departures().len());
    let mut first = client::open(gateway.address).map_err(LoadtestError::io("the gateway does not accept"))?;
    first.write_all(SHARED).map_err(LoadtestError::io("a request cannot be sent"))?;
    wait_for(WAIT, || Ok((origin.requests() > requests).then_some(())))?;
    let mut second = gateway.client();
    let waiting = thread::spawn(move || second.send(SHARED).map(|response| response.body));
    wait_for(WAIT, || Ok((gateway.metric("tidegate_requests_in_flight ")? >= 2.0).then_some(())))?;
    drop(first);
    let body = waiting.join().ok().and_then(std::result::Result::ok).unwrap_or_default();
    let (asked, cancelled) = (origin.requests() - requests, origin.departures().len() - departures);
    report.check(
        "a client that waits for the same response gets it when the first client has gone",
        (
            format!("{} bytes of 5, {asked} request at the origin, {cancelled} cancelled", body.len()),
            body == b"whole" && asked == 1 && cancelled == 0,
        ),
    );
    Ok(())
}
