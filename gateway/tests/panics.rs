//! Panics of tasks in a whole gateway: each ends its own task, is counted and logged, and a service
//! is started again.
//!
//! The gateway runs in the process of the test, with a log that panics at one event: the event is
//! written by the task that the scenario wants to fail, in the midst of its work.

mod support;

use std::io::{self, Read, Write};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gateway::config::Config;
use gateway::server::{self, BoundAddresses, ConfigSource, StartError, StartMode};
use serde_json::Value;
use support::{Client, STEP_TIMEOUT, TempDir, free_address, lock, one_route, wait_for};

/// Keeps the lines of the process log and panics at some.
#[derive(Clone, Default)]
struct FaultyLog {
    lines: Arc<Mutex<Vec<(Instant, Value)>>>,
    /// The name of the event at which the log panics, and how often.
    fault: Arc<Mutex<(&'static str, usize)>>,
}

impl FaultyLog {
    fn panic_at(&self, event: &'static str, times: usize) {
        *lock(&self.fault) = (event, times);
    }

    /// The times and fields of the events of a name.
    fn events(&self, name: &str) -> Vec<(Instant, Value)> {
        lock(&self.lines).iter().filter(|(_, line)| line["event"] == name).cloned().collect()
    }

    /// The kinds of the tasks that were logged as panicked.
    fn panicked(&self) -> Vec<String> {
        let events = self.events("task_panicked").into_iter();
        events.map(|(_, event)| event["kind"].as_str().expect("text").to_owned()).collect()
    }
}

impl Write for FaultyLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A line that caused a panic is still in the buffer of its thread, before the next one.
        let text = String::from_utf8_lossy(bytes);
        let line: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).expect("a line of JSON");
        let is_faulty = {
            let mut fault = lock(&self.fault);
            let is_faulty = fault.1 > 0 && line["event"] == fault.0;
            fault.1 -= usize::from(is_faulty);
            is_faulty
        };
        lock(&self.lines).push((Instant::now(), line));
        assert!(!is_faulty, "a fault of the log");
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A gateway on threads of this process.
struct InProcessGateway {
    bound: BoundAddresses,
    dir: TempDir,
    thread: Option<JoinHandle<Result<(), StartError>>>,
}

impl InProcessGateway {
    fn start(config: &str) -> Self {
        let dir = TempDir::new();
        let file = dir.write("tidegate.toml", config);
        let (config, _) = Config::load(&file).unwrap_or_else(|report| panic!("{report}"));
        let (ready, is_ready) = sync_channel(1);
        let source = (ConfigSource::File(file), StartMode::Fresh);
        let run = move || server::run(config, source, |bound| drop(ready.send(bound.clone())));
        let thread = std::thread::Builder::new().name("main".to_owned()).spawn(run).expect("a thread");
        let bound = is_ready.recv_timeout(STEP_TIMEOUT).expect("a started gateway");
        InProcessGateway { bound, dir, thread: Some(thread) }
    }

    fn admin(&self, target: &str) -> String {
        Client::connect(self.bound.admin).get(target, &[("host", "localhost")]).text()
    }

    fn metric(&self, series: &str) -> f64 {
        let exposition = self.admin("/metrics");
        let value = exposition.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {series} in\n{exposition}"))
    }

    /// Panics and restarts of a kind of task, as counted.
    fn counts(&self, kind: &str) -> (f64, f64) {
        let count = |metric: &str| self.metric(&format!("tidegate_task_{metric}_total{{kind=\"{kind}\"}}"));
        (count("panics"), count("restarts"))
    }

    /// The waits of the tasks of a kind.
    fn waits(&self, kind: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.admin("/api/v1/tasks")).expect("JSON");
        let tasks = list["tasks"].as_array().expect("a list").iter().filter(|task| task["kind"] == kind);
        tasks.map(|task| task["waiting_for"].as_str().expect("text").to_owned()).collect()
    }

    /// Drains and waits for the end of all threads.
    fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::INT).expect("a signal");
        wait_for(|| thread.is_finished(), STEP_TIMEOUT);
        thread.join().expect("no panic of the control thread").expect("a clean end");
    }
}

fn wait_for_counts(gateway: &InProcessGateway, kind: &str, counts: (f64, f64)) {
    wait_for(|| gateway.counts(kind) == counts, STEP_TIMEOUT);
}

#[test]
fn panic_ends_one_task_and_restarts_a_service() {
    let log = FaultyLog::default();
    let writer = log.clone();
    let level = tracing::Level::DEBUG;
    tracing_subscriber::fmt()
        .json()
        .with_max_level(level)
        .flatten_event(true)
        .with_writer(move || writer.clone())
        .init();
    log.panic_at("shard_down", 3);
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    let files = TempDir::new();
    let cert = files.write("tls.crt", &certificate.cert.pem());
    let key = files.write("tls.key", &certificate.signing_key.serialize_pem());
    let config = format!(
        "version = 1\n[server]\nworkers = 1\n[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"t\"\n\
         [redis]\nsecret = \"0123456789abcdef\"\n[redis.regions.default]\nendpoints = [\"redis://{}\"]\n\
         [[listen]]\naddress = \"127.0.0.1:0\"\n[[listen]]\naddress = \"127.0.0.1:0\"\n\
         [listen.tls]\ncertificates = [{{ cert = {cert:?}, key = {key:?} }}]\n{}",
        free_address(),
        one_route(free_address(), "", "")
    );
    let mut gateway = InProcessGateway::start(&config.replace("token = \"t\"\n", ""));

    // A service that fails again at once is restarted with growing pauses.
    wait_for(|| log.panicked().len() == 1, STEP_TIMEOUT);
    wait_for(|| gateway.waits("state_report") == ["restart"], STEP_TIMEOUT);
    wait_for_counts(&gateway, "state_report", (3.0, 3.0));
    wait_for(|| log.events("shard_down").len() >= 4, STEP_TIMEOUT);
    let times: Vec<Instant> = log.events("shard_down").iter().map(|(at, _)| *at).collect();
    for (pair, pause) in times.windows(2).zip([100, 200, 400]) {
        let gap = pair[1] - pair[0];
        assert!(gap >= Duration::from_millis(pause), "{gap:?} for {pause} ms");
    }
    wait_for(|| gateway.waits("state_report") == ["timer"], STEP_TIMEOUT);
    // Lines are limited to one a second.
    assert!(log.panicked().iter().all(|kind| kind == "state_report"), "{:?}", log.panicked());
    let (_, event) = log.events("task_panicked").remove(0);
    assert_eq!(event["panic"], "a fault of the log", "{event:?}");

    // The reload that failed is repeated by the next change of the file.
    log.panic_at("reload_refused", 1);
    gateway.dir.write("tidegate.toml", "nonsense");
    wait_for_counts(&gateway, "reload", (1.0, 1.0));
    gateway.dir.write("tidegate.toml", &config);
    wait_for(|| log.events("reloaded").len() == 1, STEP_TIMEOUT);

    // A request: its client gets a response, and the connection's task goes on to close.
    log.panic_at("upstream_failed", 1);
    assert_eq!(Client::connect(gateway.bound.listen[0]).get("/", &[]).status, 500);
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"panic\"}"), 1.0);
    assert_eq!(gateway.counts("connection"), (0.0, 0.0));

    // A connection of a worker: the other connections of the worker go on.
    let mut other = Client::connect(gateway.bound.listen[0]);
    assert_eq!(other.get("/", &[]).status, 503);
    log.panic_at("tls_failed", 1);
    let mut failing = std::net::TcpStream::connect(gateway.bound.listen[1]).expect("a connection");
    failing.write_all(b"no TLS at all, and long enough for a record\r\n\r\n").expect("open");
    failing.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let _end_or_reset = failing.read_to_end(&mut Vec::new());
    wait_for(|| gateway.counts("connection").0 == 1.0, STEP_TIMEOUT);
    assert_eq!((other.get("/", &[]).status, gateway.counts("connection").1), (503, 0.0));

    // A connection of the admin address: the service that accepts them is not affected.
    log.panic_at("admin_token_rejected", 1);
    let mut failing = Client::connect(gateway.bound.admin);
    failing.send_get("/api/v1/status", &[("host", "localhost"), ("authorization", "Bearer wrong")]);
    assert!(failing.read_to_end().is_empty());
    assert_eq!(gateway.counts("simple_connection"), (1.0, 0.0));
    assert_eq!(gateway.counts("admin"), (0.0, 0.0));

    assert_eq!((gateway.counts("state_report"), gateway.counts("reload")), ((3.0, 3.0), (1.0, 1.0)));
    gateway.stop();
    assert_eq!(log.events("stopped").len(), 1);
}
