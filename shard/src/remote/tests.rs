//! Owns a real Redis server for a unit test, on a Unix socket in a directory of its own.
//!
//! Invariant: neither the server nor its directory outlives the test.

use super::address::{Dialer, RedisTlsConfig, ServerAddress};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(super) struct TestServer {
    child: Child,
    directory: PathBuf,
}

impl TestServer {
    pub(super) fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("tidegate-unit-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--unixsocket", "redis.sock", "--save", "", "--appendonly", "no"]);
        command.current_dir(&directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("install redis-server: {error}"));
        let server = Self { child, directory };
        let until = Instant::now() + Duration::from_secs(10);
        while redis::Client::open(server.url()).unwrap().get_connection().is_err() {
            assert!(Instant::now() < until, "redis-server does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    fn url(&self) -> String {
        format!("redis+unix://{}", self.directory.join("redis.sock").display())
    }

    pub(super) fn connect(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    pub(super) fn address(&self) -> Arc<ServerAddress> {
        ServerAddress::fixed(Dialer::new(&self.url(), &RedisTlsConfig::default()).unwrap().server())
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
        let _already_removed = std::fs::remove_dir_all(&self.directory);
    }
}
