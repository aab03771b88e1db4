//! Harness of the scenario tests: a gateway process, and a client and an origin that exchange raw
//! bytes.
//!
//! The system chooses every port, every wait has a timeout, and all processes end with the test,
//! even if it fails.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "each test binary compiles this module and uses a part of it"
)]

pub mod api_server;
pub mod client;
pub mod dns;
pub mod frames;
pub mod h2_origin;
pub mod origin;
pub mod tls;
pub mod tls_origin;
pub mod uploads;

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use client::{BodyEnd, Client, ClientResponse};
pub use origin::{Gate, Origin, ReceivedRequest, Script};

/// Timeout of any step of a test: far above the expected duration, even on a busy machine.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(3);

/// Waits until `condition` holds. Panics if it does not hold within `deadline`.
#[track_caller]
pub fn wait_for(mut condition: impl FnMut() -> bool, deadline: Duration) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < deadline, "the condition did not hold within {deadline:?}");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Locks a mutex even if a failed test has poisoned it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A free port of the loopback address, for addresses that must be known before the bind.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port")
}

/// Temporary directory of one test, removed on drop.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tidegate-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        TempDir(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("a written file");
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// The lines of a stream, collected by a separate thread.
#[derive(Clone, Default)]
pub struct OutputLines(Arc<(Mutex<Vec<String>>, Condvar)>);

impl OutputLines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = OutputLines::default();
        let writer = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                lock(&writer.0.0).push(String::from_utf8_lossy(&line).into_owned());
                writer.0.1.notify_all();
            }
        });
        lines
    }

    pub fn all(&self) -> Vec<String> {
        lock(&self.0.0).clone()
    }

    /// Waits for the first line that matches; `None` if the deadline passes.
    pub fn find(&self, deadline: Duration, matches: impl Fn(&str) -> bool) -> Option<String> {
        let start = Instant::now();
        let mut lines = lock(&self.0.0);
        loop {
            if let Some(line) = lines.iter().find(|line| matches(line)) {
                return Some(line.clone());
            }
            let remaining = deadline.checked_sub(start.elapsed())?;
            lines = self.0.1.wait_timeout(lines, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The first line with this `event`, which may follow the response that it belongs to.
    #[track_caller]
    pub fn event(&self, event: &str) -> serde_json::Value {
        wait_for(|| !self.events(event).is_empty(), STEP_TIMEOUT);
        self.events(event).swap_remove(0)
    }

    /// The lines that are JSON objects with this `event`.
    pub fn events(&self, event: &str) -> Vec<serde_json::Value> {
        self.all().iter().filter_map(|line| parse_event(line)).filter(|line| line["event"] == event).collect()
    }
}

fn parse_event(line: &str) -> Option<serde_json::Value> {
    serde_json::from_str(line).ok()
}

/// A running command. Its output is collected, and it is killed on drop.
pub struct Process {
    child: Child,
    pub stdout: OutputLines,
    pub stderr: OutputLines,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        Self::start_with_input(command.stdin(Stdio::null()))
    }

    /// As `start`, with the standard input of the command.
    pub fn start_with_input(command: &mut Command) -> Self {
        let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("a started process");
        let stdout = OutputLines::of(child.stdout.take().expect("stdout is piped"));
        let stderr = OutputLines::of(child.stderr.take().expect("stderr is piped"));
        Process { child, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Anonymous resident memory in bytes.
    pub fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("a live process");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1_024
    }

    /// Sends a signal by its name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.expect("`kill` runs").success(), "signal {name}");
    }

    /// Waits for the exit; `None` if the deadline passes.
    pub fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child process") {
                return Some(status);
            }
            if start.elapsed() > deadline {
                return None;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The command under test; for measurements, that of `TIDEGATE_PROGRAM`.
pub fn tidegate() -> Command {
    std::env::var_os("TIDEGATE_PROGRAM").map_or_else(|| Command::new(env!("CARGO_BIN_EXE_tidegate")), Command::new)
}

/// A gateway process in front of the origins of its configuration.
pub struct Gateway {
    pub process: Process,
    /// The first listener.
    pub address: SocketAddr,
    /// All listeners, in the order of the file.
    pub addresses: Vec<SocketAddr>,
    pub admin: SocketAddr,
    pub dir: TempDir,
}

impl Gateway {
    /// Starts a gateway with `config`. Adds `version`, `[[listen]]` on a free port and `[admin]` on
    /// another one if the configuration lacks them.
    pub fn start(config: &str) -> Self {
        Self::start_in(TempDir::new(), config)
    }

    /// Starts a gateway whose configuration file is written to `dir`.
    pub fn start_in(dir: TempDir, config: &str) -> Self {
        Self::start_with(dir, config, |_| {})
    }

    /// Starts a gateway in `dir` with a command that `prepare` modifies.
    pub fn start_with(mut dir: TempDir, config: &str, prepare: impl Fn(&mut Command)) -> Self {
        let mut failure = String::new();
        // Another process may bind the admin port between its choice and its use; then another port
        // is chosen.
        for _ in 0..5 {
            match Self::attempt(dir, config, &prepare) {
                Ok(gateway) => return gateway,
                Err((returned_dir, output)) => (dir, failure) = (returned_dir, output),
            }
            if !failure.contains("in use") {
                break;
            }
        }
        panic!("the gateway did not start:\n{failure}");
    }

    fn attempt(dir: TempDir, config: &str, prepare: &impl Fn(&mut Command)) -> Result<Self, (TempDir, String)> {
        let admin = free_address();
        let file = dir.write("tidegate.toml", &complete(config, admin));
        let mut command = tidegate();
        command.args(["run", "--config"]).arg(file);
        prepare(&mut command);
        let mut process = Process::start(&mut command);
        let lines = process.stderr.clone();
        let start = Instant::now();
        while lines.events("ready").is_empty() {
            if process.wait(Duration::ZERO).is_some() || start.elapsed() > STEP_TIMEOUT {
                process.kill();
                // The error message may not have been read from the pipe yet.
                lines.find(Duration::from_millis(500), |line| line.starts_with("tidegate:"));
                return Err((dir, lines.all().join("\n")));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let address = |line: &serde_json::Value| line["address"].as_str().and_then(|text| text.parse().ok());
        let mut addresses: Vec<SocketAddr> = lines.events("listening").iter().filter_map(address).collect();
        addresses.dedup();
        let address = *addresses.first().expect("a listener");
        Ok(Gateway { process, address, addresses, admin, dir })
    }

    /// Replaces the configuration file atomically: writes a new file and renames it.
    pub fn rewrite(&self, config: &str) {
        let new_file = self.dir.write("tidegate.toml.new", &complete(config, self.admin));
        std::fs::rename(new_file, self.dir.path().join("tidegate.toml")).expect("a renamed file");
    }

    /// A connection to the first listener.
    pub fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    /// One GET on a new connection.
    pub fn get(&self, target: &str, fields: &[(&str, &str)]) -> ClientResponse {
        self.connect().get(target, fields)
    }

    /// One request on a new connection.
    #[expect(clippy::too_many_arguments, reason = "the parts of an HTTP request, passed by many tests")]
    pub fn request(&self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> ClientResponse {
        self.connect().request(method, target, fields, body)
    }

    /// Sends `bytes` on a new connection and reads until the gateway closes it or the timeout
    /// expires.
    pub fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut client = self.connect();
        client.send(bytes);
        client.read_to_end()
    }

    /// GET of a path of the admin listener, as a local program sends it.
    pub fn admin(&self, target: &str) -> ClientResponse {
        Client::connect(self.admin).get(target, &[("host", "localhost")])
    }

    /// Sum of the series such as `name_total{label="x"}`, whatever their other labels; 0 if the
    /// metric has no such series (yet).
    #[track_caller]
    pub fn metric(&self, series: &str) -> f64 {
        let exposition = self.admin("/metrics").text();
        let (family, labels) = series.trim_end_matches('}').split_once('{').unwrap_or((series, ""));
        let wanted: Vec<&str> = labels.split(',').filter(|label| !label.is_empty()).collect();
        assert!(exposition.contains(family.trim_end_matches("_total")), "no metric {family} in\n{exposition}");
        let values = exposition.lines().filter_map(|line| {
            let (found, value) = line.strip_prefix(family)?.rsplit_once(' ')?;
            let is_series = found.is_empty() || found.starts_with('{');
            let found: Vec<&str> = found.trim_matches(['{', '}']).split(',').collect();
            let is_wanted = is_series && wanted.iter().all(|label| found.contains(label));
            is_wanted.then(|| value.parse::<f64>().ok()).flatten()
        });
        values.sum()
    }

    /// Waits for `count` lines of the access log (`access = "stdout"`) and returns all lines.
    #[track_caller]
    pub fn access_log(&self, count: usize) -> Vec<serde_json::Value> {
        wait_for(|| self.process.stdout.all().len() >= count, STEP_TIMEOUT);
        let lines = self.process.stdout.all();
        lines.iter().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }
}

fn complete(config: &str, admin: SocketAddr) -> String {
    let mut text = String::new();
    if !config.contains("version =") {
        text.push_str("version = 1\n");
    }
    text.push_str(config);
    if !config.contains("[[listen]]") {
        text.push_str("\n[[listen]]\naddress = \"127.0.0.1:0\"\n");
    }
    if !config.contains("[admin]") {
        text.push_str(&format!("\n[admin]\naddress = \"{admin}\"\n"));
    }
    text
}

/// Configuration with one route `/*` to `origin`. `route` adds keys to the route, `rest` adds
/// tables.
pub fn one_route(origin: SocketAddr, route: &str, rest: &str) -> String {
    format!(
        "[upstreams.origin]\nendpoints = [\"http://{origin}\"]\n\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"origin\"\n{route}\n\n{rest}\n"
    )
}
