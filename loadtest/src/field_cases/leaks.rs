//! Case `leaks`: clients that go away in every phase of a request; tasks, connections and
//! descriptors are those of before.

use std::io::Write as _;
use std::time::{Duration, Instant};

use crate::case::client;
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::report::line_chart::{ChartSeries, LineChart, SeriesForm};
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const WAIT: Duration = Duration::from_secs(20);
/// Clients at a time.
const BATCH: usize = 50;

const CONFIG: &str = r#"
[log]
access = "off"
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
timeout = "30s"
[upstreams.origin.breaker]
mode = "off"
[[routes]]
name = "pass"
match = { path = "/pass/*" }
upstream = "origin"
cache = { mode = "off" }
[[routes]]
name = "stored"
match = { path = "/*" }
upstream = "origin"
"#;

/// Phases of a request in which a client goes away: the bytes that it has sent.
const PHASES: [(&str, &[u8]); 5] = [
    ("before a byte", b""),
    ("within the head", b"GET /pass/a HTT"),
    ("within the body", b"POST /pass/b HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc"),
    ("while the origin works", b"GET /pass/hang HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("while it leads a shared fetch", b"GET /stored/hang HTTP/1.1\r\nHost: a\r\n\r\n"),
];

/// Resources that requests of a gateway hold.
#[derive(Clone, Copy, Debug)]
struct HeldResources {
    tasks: f64,
    connections: f64,
    descriptors: f64,
}

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let rounds = context.pick(3, 60);
    let origin = ScriptedOrigin::start(|request| match request.target.ends_with("/hang") {
        true => OriginAnswer::ok("late").after(Duration::from_secs(3_600)),
        false => OriginAnswer::ok("ok\n"),
    });
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let gateway = CaseGateway::start(context, "leaks", &CONFIG.replace("@ORIGIN@", &origin.address.to_string()))?;
    let clients = rounds * PHASES.len() * BATCH;
    let mut report = CaseReport::new(format!(
        "{clients} clients, {BATCH} at a time, go away in each of {} phases of a request. Tasks, connections and descriptors of the \
         process are compared with those of before, and the debug view is read while requests hang.",
        PHASES.len()
    ));
    gateway.client().get("/pass/warm", "").map_err(LoadtestError::io("the gateway does not respond"))?;
    let before = settled(&gateway)?;
    let began = Instant::now();
    let mut points = vec![(0.0, before.tasks)];
    let mut largest: f64 = 0.0;
    for _ in 0..rounds {
        for (_, bytes) in PHASES {
            let tasks = depart(&gateway, bytes)?;
            largest = largest.max(tasks);
            points.push((began.elapsed().as_secs_f64(), tasks));
        }
    }
    let (view_is_whole, view) = debug_view(&gateway)?;
    let after = wait_for(WAIT, || {
        let now = held(&gateway)?;
        Ok((now.tasks <= before.tasks && now.connections <= before.connections).then_some(now))
    })?;
    let last = match after {
        Some(held) => held,
        None => held(&gateway)?,
    };
    points.push((began.elapsed().as_secs_f64(), last.tasks));
    report.check(
        "as many tasks run as before",
        (
            format!("{:.0} before, {largest:.0} at most, {:.0} after", before.tasks, last.tasks),
            last.tasks <= before.tasks,
        ),
    );
    report.check(
        "as many connections are open as before",
        (
            format!("{:.0} before, {:.0} after", before.connections, last.connections),
            last.connections <= before.connections,
        ),
    );
    report.check(
        "descriptors are those of before, within 8 (idle connections to the origin)",
        (
            format!("{:.0} before, {:.0} after", before.descriptors, last.descriptors),
            last.descriptors <= before.descriptors + 8.0,
        ),
    );
    report.check("the debug view lists live tasks by age, with what each waits for", (view, view_is_whole));
    let panics =
        gateway.metric("tidegate_task_panics_total")? + gateway.metric("tidegate_failures_total{kind=\"panic\"}")?;
    report.check("no task panicked", (format!("{panics:.0}"), panics == 0.0));
    report.charts.push(LineChart {
        title: "Running tasks of the gateway".to_owned(),
        x_label: "s".to_owned(),
        y_label: "tasks".to_owned(),
        series: vec![ChartSeries { name: "tasks".to_owned(), form: SeriesForm::Line, points }],
        marks: Vec::new(),
    });
    Ok(report)
}

fn held(gateway: &CaseGateway) -> Result<HeldResources> {
    // Of the kinds that requests start: those of the admin address are this client's.
    let mut tasks = 0.0;
    for kind in
        ["connection", "stream", "upstream_connection", "fill", "detached_fetch", "mirror", "background_validation"]
    {
        tasks += gateway.metric(&format!("tidegate_tasks{{kind=\"{kind}\"}}"))?;
    }
    Ok(HeldResources {
        tasks,
        connections: gateway.metric("tidegate_connections ")?,
        descriptors: gateway.metric("process_open_fds")?,
    })
}

/// The resources when the client of the warm-up has gone.
fn settled(gateway: &CaseGateway) -> Result<HeldResources> {
    wait_for(WAIT, || Ok((gateway.metric("tidegate_connections ")? == 0.0).then_some(())))?;
    held(gateway)
}

/// Clients send `bytes` and go away; returns the tasks while they are there.
fn depart(gateway: &CaseGateway, bytes: &[u8]) -> Result<f64> {
    let mut streams = Vec::new();
    for _ in 0..BATCH {
        let mut stream = client::open(gateway.address).map_err(LoadtestError::io("the gateway does not accept"))?;
        stream.write_all(bytes).map_err(LoadtestError::io("a request cannot be sent"))?;
        streams.push(stream);
    }
    let is_there = || Ok((gateway.metric("tidegate_connections ")? >= BATCH as f64).then_some(()));
    wait_for(WAIT, is_there)?;
    held(gateway).map(|held| held.tasks)
}

/// Reads `/api/v1/tasks` while requests hang: they are there, the oldest first, with what they wait
/// for.
fn debug_view(gateway: &CaseGateway) -> Result<(bool, String)> {
    let mut streams = Vec::new();
    for _ in 0..5 {
        let mut stream = client::open(gateway.address).map_err(LoadtestError::io("the gateway does not accept"))?;
        stream.write_all(PHASES[3].1).map_err(LoadtestError::io("a request cannot be sent"))?;
        streams.push(stream);
    }
    std::thread::sleep(Duration::from_millis(300));
    let view = gateway.admin_json("/api/v1/tasks")?;
    let tasks = view["tasks"].as_array().cloned().unwrap_or_default();
    let ages: Vec<f64> = tasks.iter().filter_map(|task| task["age_seconds"].as_f64()).collect();
    let waiting = tasks.iter().filter(|task| task["waiting_for"].as_str().is_some_and(|text| !text.is_empty())).count();
    let connections = tasks.iter().filter(|task| task["kind"] == "connection").count();
    let is_sorted = ages.windows(2).all(|pair| pair[0] >= pair[1]);
    let text = format!("{} tasks, {connections} connections, {waiting} name what they wait for", tasks.len());
    Ok((is_sorted && ages.len() == tasks.len() && connections >= streams.len() && waiting > 0, text))
}
