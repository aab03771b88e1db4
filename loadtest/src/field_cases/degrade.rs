//! Case `degrade`: the path of a request while its origin fails and after it recovers: stale
//! response, degrade page, breaker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::journal::journal_criterion;
use crate::case::load::CaseLoad;
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::report::line_chart::{ChartSeries, LineChart, SeriesForm};
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const KEYS: usize = 20;
/// Loads of a second each, per phase of the picture.
const PHASE_SECONDS: u64 = 4;

const CONFIG: &str = r#"
[log]
access = "off"
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
eject = { after = 0 }
[upstreams.origin.breaker]
minimum = 5
open = "1s"
window = "2s"
ramp = "1s"
[[routes]]
name = "stored"
match = { path = "/stored/*" }
upstream = "origin"
cache = { mode = "standard", stale_if_error = "10m" }
[[routes]]
name = "page"
match = { path = "/page/*" }
upstream = "origin"
cache = { mode = "off" }
"#;

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let fails = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&fails);
    let origin = ScriptedOrigin::start(move |_| match shared.load(Relaxed) {
        true => OriginAnswer::status(500),
        false => OriginAnswer::ok("fresh\n").field("Cache-Control: max-age=1"),
    });
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let gateway = CaseGateway::start(context, "degrade", &CONFIG.replace("@ORIGIN@", &origin.address.to_string()))?;
    let seconds = context.pick(PHASE_SECONDS, 30);
    let mut report = CaseReport::new(format!(
        "100 requests a second, half for {KEYS} stored responses with a lifetime of 1 s and half for a route without a cache. The \
         origin responds, fails with 500 for {seconds} s, and recovers."
    ));
    let mut phases = Phases { gateway: &gateway, origin: &origin, rows: Vec::new() };
    phases.run("healthy", seconds)?;
    fails.store(true, Relaxed);
    phases.run("failing", seconds)?;
    let opened = gateway.metric("tidegate_events_total{event=\"breaker_opened\"")?;
    fails.store(false, Relaxed);
    let recovered = await_recovery(&gateway)?;
    phases.run("recovered", seconds)?;
    judge(&phases.rows, &mut report);
    report.check("the breaker opened", (format!("{opened:.0} times"), opened >= 1.0));
    report.check(
        "and closed again without an operator",
        (
            recovered.map_or("no".to_owned(), |time| format!("{:.1} s after the recovery", time.as_secs_f64())),
            recovered.is_some(),
        ),
    );
    let page = page(&gateway, &fails)?;
    report.check("a browser gets a page, another client a problem document, both with Retry-After", (page.0, page.1));
    report.charts.push(chart(&phases.rows));
    journal_criterion(context, &mut report, ("deferred writes are compensated", "breaker-open"))?;
    Ok(report)
}

struct PhaseRow {
    name: &'static str,
    /// Of the stored route: good, all.
    stored: (u64, u64),
    /// Of the route without a cache: good, 503 with the page, all.
    passed: (u64, u64, u64),
    origin_requests: u64,
}

struct Phases<'a> {
    gateway: &'a CaseGateway,
    origin: &'a ScriptedOrigin,
    rows: Vec<PhaseRow>,
}

impl Phases<'_> {
    fn run(&mut self, name: &'static str, seconds: u64) -> Result<()> {
        let before = self.origin.requests();
        let time = Duration::from_secs(seconds);
        let stored = CaseLoad {
            paths: (0..KEYS).map(|key| format!("/stored/{key}")).collect(),
            ..CaseLoad::new(self.gateway.address, "", (50.0, time))
        };
        let passed = CaseLoad::new(self.gateway.address, "/page/a", (50.0, time));
        let reports = crate::case::load::run_all(&[stored, passed])?;
        self.rows.push(PhaseRow {
            name,
            stored: (reports[0].good, reports[0].offered),
            passed: (reports[1].good, reports[1].rejected, reports[1].offered),
            origin_requests: self.origin.requests() - before,
        });
        Ok(())
    }
}

fn judge(rows: &[PhaseRow], report: &mut CaseReport) {
    let [healthy, failing, recovered] = rows else { return };
    report.check(
        "stored responses are all answered with 200 while the origin fails",
        (format!("{} of {}", failing.stored.0, failing.stored.1), failing.stored.0 == failing.stored.1),
    );
    let (good, pages, all) = failing.passed;
    let errors = all - good - pages;
    report.check(
        "requests without a stored response get the degrade page (503); the origin's own 500 is passed until the breaker opens",
        (format!("{pages} pages, {errors} times 500, of {all}"), pages > all / 2 && good == 0),
    );
    report.check(
        "the failing origin gets less than half of the requests that the healthy one got",
        (
            format!("{} and {}", failing.origin_requests, healthy.origin_requests),
            2 * failing.origin_requests < healthy.origin_requests,
        ),
    );
    report.check(
        "after the recovery every request is good",
        (
            format!("{} of {}", recovered.stored.0 + recovered.passed.0, recovered.stored.1 + recovered.passed.2),
            recovered.stored.0 == recovered.stored.1 && recovered.passed.0 == recovered.passed.2,
        ),
    );
}

/// The time until both routes respond with 200 and their breakers are closed.
fn await_recovery(gateway: &CaseGateway) -> Result<Option<Duration>> {
    let began = Instant::now();
    let mut client = gateway.client();
    let recovered = wait_for(Duration::from_secs(30), || {
        // Without calls a breaker does not probe.
        for path in ["/stored/0", "/page/a"] {
            client.get(path, "").map_err(LoadtestError::io("the gateway does not respond"))?;
        }
        Ok((gateway.metric("tidegate_breaker_state")? == 0.0).then_some(()))
    })?;
    Ok(recovered.map(|()| began.elapsed()))
}

/// The two forms of the degrade page, after another failure.
fn page(gateway: &CaseGateway, fails: &AtomicBool) -> Result<(String, bool)> {
    fails.store(true, Relaxed);
    let mut client = gateway.client();
    let mut get = |accept: &str| {
        let fields = format!("Accept: {accept}\r\n");
        wait_for(Duration::from_secs(10), || {
            let response = client.get("/page/a", &fields).map_err(LoadtestError::io("the gateway does not respond"))?;
            Ok((response.status == 503).then_some(response))
        })
    };
    let (Some(html), Some(json)) = (get("text/html")?, get("application/json")?) else {
        return Ok(("no 503".to_owned(), false));
    };
    let kind = |response: &crate::load::response_reader::ResponseReader| {
        response.field("content-type").unwrap_or("").to_owned()
    };
    let is_met = kind(&html).starts_with("text/html")
        && kind(&json).starts_with("application/problem+json")
        && [&html, &json].iter().all(|response| response.field("retry-after").is_some());
    Ok((format!("{}, {}", kind(&html), kind(&json)), is_met))
}

fn chart(rows: &[PhaseRow]) -> LineChart {
    let series = |name: &str, part: fn(&PhaseRow) -> f64| ChartSeries {
        name: name.to_owned(),
        form: SeriesForm::Line,
        points: rows
            .iter()
            .enumerate()
            .flat_map(|(n, row)| [(n as f64, part(row)), (n as f64 + 0.95, part(row))])
            .collect(),
    };
    LineChart {
        title: format!("Good responses: {}", rows.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")),
        x_label: "phase".to_owned(),
        y_label: "% of the requests".to_owned(),
        series: vec![
            series("stored", |row| 100.0 * row.stored.0 as f64 / row.stored.1.max(1) as f64),
            series("without a cache", |row| 100.0 * row.passed.0 as f64 / row.passed.2.max(1) as f64),
            series("degrade page", |row| 100.0 * row.passed.1 as f64 / row.passed.2.max(1) as f64),
        ],
        marks: Vec::new(),
    }
}
