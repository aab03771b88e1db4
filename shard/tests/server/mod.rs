//! Owns a real Redis server for the duration of a test: started on a free port, terminated by its
//! process id.
//!
//! Refuses to run without the program `redis-server`.
//! Invariant: no server outlives its test.
#![allow(dead_code, reason = "benches use a part of it")]

pub(crate) mod hostile;
pub(crate) mod proxy;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shard::{
    Compression, Entry, EntryMeta, KeyBuilder, KeyRef, LocalConfig, RedisTlsConfig, Region, RegionConfig, RemoteConfig,
    Store, Tag,
};

/// The default deadline, for tests of timing.
pub(crate) const DEADLINE: Duration = Duration::from_millis(20);

/// For all other tests: a busy machine may delay a reply beyond the default deadline.
pub(crate) const LONG_DEADLINE: Duration = Duration::from_secs(1);

/// By how much a deadline may be exceeded on a busy machine with two cores.
pub(crate) const SLACK: Duration = Duration::from_millis(80);

pub(crate) struct Server {
    child: Child,
    port: u16,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_on(free_port(), &[])
    }

    pub(crate) fn start_on(port: u16, options: &[&str]) -> Self {
        let port_text = port.to_string();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port_text, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]).args(options);
        // A replica writes the received data to a file, which the next server would load.
        command.args(["--dbfilename", &dump_file(port)]);
        Self::run(command, port)
    }

    fn run(mut command: Command, port: u16) -> Self {
        command.current_dir(std::env::temp_dir()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("install redis-server: {error}"));
        let mut server = Self { child, port };
        let until = Instant::now() + Duration::from_secs(10);
        while !is_ready(port) {
            let exited = server.child.try_wait().unwrap();
            assert!(exited.is_none() && Instant::now() < until, "redis-server does not start: {exited:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// Starts a Sentinel with a configuration file, which it rewrites.
    pub(crate) fn sentinel(port: u16, file: &str) -> Self {
        let mut command = Command::new("redis-server");
        command.args([file, "--sentinel", "--port", &port.to_string(), "--bind", "127.0.0.1"]);
        Self::run(command, port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// A direct connection to the server that bypasses the store.
    pub(crate) fn connect(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    /// Creates a user with rules of an ACL, whose password is `secret`, and returns its URL.
    pub(crate) fn create_user(&self, name: &str, rules: &str) -> String {
        let mut command = redis::cmd("ACL");
        command.arg("SETUSER").arg(name);
        rules.split_whitespace().for_each(|rule| _ = command.arg(rule.replace(">PASSWORD", ">secret")));
        let () = command.query(&mut self.connect()).unwrap();
        format!("redis://{name}:secret@127.0.0.1:{}", self.port)
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    pub(crate) fn stop(mut self) -> u16 {
        self.kill();
        self.port
    }

    fn kill(&mut self) {
        // SIGKILL also terminates a stopped process.
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
        let _never_written = std::fs::remove_file(std::env::temp_dir().join(dump_file(self.port)));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The rules of a gateway's user in docs/purging.md.
pub(crate) fn documented_acl() -> &'static str {
    let documented = include_str!("../../../docs/purging.md");
    let rules = documented.lines().find_map(|line| line.trim().strip_prefix("ACL SETUSER tidegate "));
    rules.expect("the page has an ACL rule")
}

fn dump_file(port: u16) -> String {
    format!("tidegate-test-{port}.rdb")
}

/// Whether a Redis server listens on the port; it may require a password.
fn is_ready(port: u16) -> bool {
    let ping = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        let mut first = [0];
        stream.read_exact(&mut first)?;
        std::io::Result::Ok(first[0] == b'+' || first[0] == b'-')
    };
    ping().unwrap_or(false)
}

/// A free port below the ephemeral range: within it, a connection to a port without a listener
/// could be assigned that very port and connect to itself.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() as u16 % 1_000 * 10;
    (0..10_000)
        .map(|_| 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000)
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .expect("one of 10,000 ports is free")
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub(crate) struct Page {
    pub(crate) text: String,
    pub(crate) tags: Vec<Tag>,
}

impl EntryMeta for Page {
    const SCHEMA: u16 = 1;

    fn heap_bytes(&self) -> usize {
        self.text.capacity()
    }

    fn tags(&self) -> &[Tag] {
        &self.tags
    }

    fn is_compressible(&self) -> bool {
        false
    }
}

pub(crate) fn page(text: &str, body: impl Into<Bytes>) -> Entry<Page> {
    Entry::new(Page { text: text.into(), tags: Vec::new() }, body.into(), Duration::from_secs(60), Instant::now())
}

pub(crate) fn region(name: &str) -> Region {
    Region::new(name).unwrap()
}

pub(crate) fn with_key<T>(path: &str, use_key: impl FnOnce(&KeyRef<'_>) -> T) -> T {
    use_key(&KeyBuilder::new().part(path.as_bytes()).key())
}

pub(crate) fn remote_config(regions: &[(&str, &[String])]) -> RemoteConfig {
    let region = |&(name, endpoints): &(&str, &[String])| {
        (
            region(name),
            RegionConfig { slots: 16, endpoints: endpoints.to_vec(), cluster: Vec::new(), fallback: Vec::new() },
        )
    };
    let regions: BTreeMap<_, _> = regions.iter().map(region).collect();
    RemoteConfig {
        deadline: LONG_DEADLINE,
        secret: "secret".into(),
        object_bytes: 1 << 20,
        compression: Compression::Lz4,
        compress_from: 1 << 10,
        hot_copies: 8,
        tls: RedisTlsConfig::default(),
        regions,
        default_region: Region::DEFAULT,
    }
}

pub(crate) fn store(remote: RemoteConfig) -> Arc<Store<Page>> {
    Store::new(LocalConfig { memory_bytes: 16 << 20, hot_rate: 1_000 }, Some(remote)).unwrap()
}

/// A store with one region, `default`, on one server.
pub(crate) fn store_on(server: &Server) -> Arc<Store<Page>> {
    store(remote_config(&[("default", &[server.url()])]))
}

/// Number of values read from each server so far.
pub(crate) fn reads_by_server(servers: &[Server]) -> Vec<u64> {
    let reads = |server: &Server| {
        let stats: String = redis::cmd("INFO").arg("commandstats").query(&mut server.connect()).unwrap();
        let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_getrange:calls="));
        line.and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0)
    };
    servers.iter().map(reads).collect()
}
