//! The stage of the scenario tests: a real gateway process, a client and an origin that speak raw bytes.
//!
//! Every port is chosen by the system, every wait has a deadline, and what was started ends with the test, failed or not.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "each test binary compiles this anew and uses its own part of it"
)]

pub mod client;
pub mod origin;

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use client::{Answer, Client, End};
pub use origin::{Gate, Origin, Received, Script};

/// The longest that any step of a test may take: far above what is expected, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks at a condition.
const GLANCE: Duration = Duration::from_millis(3);

/// Waits until `condition` holds; panics when it does not within `deadline`.
#[track_caller]
pub fn wait_for(mut condition: impl FnMut() -> bool, deadline: Duration) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < deadline, "the condition did not hold within {deadline:?}");
        std::thread::sleep(GLANCE);
    }
}

/// A mutex that a failed test may have poisoned serves the others all the same.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A free port of the loopback address, for addresses that must be known before they are bound.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port")
}

/// A directory of one test, removed with it.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tidegate-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Dir(path)
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

impl Drop for Dir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// The lines of a stream, gathered by a thread of its own.
#[derive(Clone, Default)]
pub struct Lines(Arc<(Mutex<Vec<String>>, Condvar)>);

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Lines::default();
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

    /// The first line that matches, as soon as there is one; `None` when the deadline passes.
    pub fn find(&self, deadline: Duration, matches: impl Fn(&str) -> bool) -> Option<String> {
        let start = Instant::now();
        let mut lines = lock(&self.0.0);
        loop {
            if let Some(line) = lines.iter().find(|line| matches(line)) {
                return Some(line.clone());
            }
            let left = deadline.checked_sub(start.elapsed())?;
            lines = self.0.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The lines that are JSON objects with this `event`.
    pub fn events(&self, event: &str) -> Vec<serde_json::Value> {
        self.all().iter().filter_map(|line| event_of(line)).filter(|line| line["event"] == event).collect()
    }
}

fn event_of(line: &str) -> Option<serde_json::Value> {
    serde_json::from_str(line).ok()
}

/// A command under way: its output is gathered, and it is killed when dropped.
pub struct Process {
    child: Child,
    pub stdout: Lines,
    pub stderr: Lines,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("a started process");
        let stdout = Lines::of(child.stdout.take().expect("its output is piped"));
        let stderr = Lines::of(child.stderr.take().expect("its errors are piped"));
        Process { child, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of its own memory that it holds.
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

    /// Its exit, where that comes within the deadline.
    pub fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a process of ours") {
                return Some(status);
            }
            if start.elapsed() > deadline {
                return None;
            }
            std::thread::sleep(GLANCE);
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

/// The command under test.
pub fn tidegate() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tidegate"))
}

/// A gateway process in front of the origins that its configuration names.
pub struct Gateway {
    pub process: Process,
    /// The first listener.
    pub address: SocketAddr,
    /// All listeners, in the order of the file.
    pub addresses: Vec<SocketAddr>,
    pub admin: SocketAddr,
    pub dir: Dir,
}

impl Gateway {
    /// Starts a gateway on `config`. What a test does not care about is added: `version`, `[[listen]]` on a free port,
    /// `[admin]` on another.
    pub fn start(config: &str) -> Self {
        Self::start_in(Dir::new(), config)
    }

    /// Likewise, beside files that are in `dir` already.
    pub fn start_in(dir: Dir, config: &str) -> Self {
        Self::start_with(dir, config, |_| {})
    }

    /// Likewise, by a command that `prepare` has seen.
    pub fn start_with(mut dir: Dir, config: &str, prepare: impl Fn(&mut Command)) -> Self {
        let mut failure = String::new();
        // Another process may take the admin port between its choice and its use; then it is chosen again.
        for _ in 0..5 {
            match Self::attempt(dir, config, &prepare) {
                Ok(gateway) => return gateway,
                Err((given_back, output)) => (dir, failure) = (given_back, output),
            }
            if !failure.contains("in use") {
                break;
            }
        }
        panic!("the gateway did not start:\n{failure}");
    }

    fn attempt(dir: Dir, config: &str, prepare: &impl Fn(&mut Command)) -> Result<Self, (Dir, String)> {
        let admin = free_address();
        let file = dir.write("tidegate.toml", &complete(config, admin));
        let mut command = tidegate();
        command.args(["run", "--config"]).arg(file);
        prepare(&mut command);
        let mut process = Process::start(&mut command);
        let lines = process.stderr.clone();
        let start = Instant::now();
        while lines.events("ready").is_empty() {
            if process.wait(Duration::ZERO).is_some() || start.elapsed() > PATIENCE {
                process.kill();
                // Its last words may still be on their way from the pipe.
                lines.find(Duration::from_millis(500), |line| line.starts_with("tidegate:"));
                return Err((dir, lines.all().join("\n")));
            }
            std::thread::sleep(GLANCE);
        }
        let address = |line: &serde_json::Value| line["address"].as_str().and_then(|text| text.parse().ok());
        let mut addresses: Vec<SocketAddr> = lines.events("listening").iter().filter_map(address).collect();
        addresses.dedup();
        let address = *addresses.first().expect("a listener");
        Ok(Gateway { process, address, addresses, admin, dir })
    }

    /// Replaces the configuration file, as an editor that writes beside it and renames.
    pub fn rewrite(&self, config: &str) {
        let beside = self.dir.write("tidegate.toml.new", &complete(config, self.admin));
        std::fs::rename(beside, self.dir.path().join("tidegate.toml")).expect("a renamed file");
    }

    /// A connection to the first listener.
    pub fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    /// One GET on a connection of its own.
    pub fn get(&self, target: &str, fields: &[(&str, &str)]) -> Answer {
        self.connect().get(target, fields)
    }

    /// One request on a connection of its own.
    pub fn request(&self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Answer {
        self.connect().request(method, target, fields, body)
    }

    /// Sends `bytes` as they are and reads until the gateway ends the connection (or patience does).
    pub fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut client = self.connect();
        client.send(bytes);
        client.read_to_end()
    }

    /// A path of the admin address, asked for as a program on this machine does.
    pub fn admin(&self, target: &str) -> Answer {
        Client::connect(self.admin).get(target, &[("host", "localhost")])
    }

    /// The value of a series such as `name_total{label="x"}`: 0 where the metric has no such series (yet).
    #[track_caller]
    pub fn metric(&self, series: &str) -> f64 {
        let exposition = self.admin("/metrics").text();
        let family = series.split('{').next().unwrap_or(series);
        assert!(exposition.contains(family.trim_end_matches("_total")), "no metric {family} in\n{exposition}");
        let mut values = exposition.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        values.next().and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
    }

    /// The lines of the access log so far (`access = "stdout"`), as soon as there are `count` of them.
    #[track_caller]
    pub fn access_log(&self, count: usize) -> Vec<serde_json::Value> {
        wait_for(|| self.process.stdout.all().len() >= count, PATIENCE);
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

/// A configuration with one route `/*` to `origin`. `route` adds keys to the route, `rest` whole tables.
pub fn one_route(origin: SocketAddr, route: &str, rest: &str) -> String {
    format!(
        "[upstreams.origin]\nendpoints = [\"http://{origin}\"]\n\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"origin\"\n{route}\n\n{rest}\n"
    )
}
