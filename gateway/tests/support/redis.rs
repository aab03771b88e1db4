//! Runs a real Redis server for a test and accesses it over RESP 2.
//!
//! Requires the program `redis-server`. Invariant: no server outlives its test, however the test
//! ends; each process is killed by its own id.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Timeout of the start: a server starts in about 50 ms, and later on a busy machine with two
/// cores.
const START_WITHIN: Duration = Duration::from_secs(10);

pub(crate) struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    /// Starts a server on a free port. Retries with another port if the port was taken meanwhile.
    pub(crate) fn start() -> Redis {
        (0..5).find_map(|_| Redis::try_start(free_port(), &[])).expect("redis-server starts on one of five free ports")
    }

    /// Starts a server on the port of a killed one.
    pub(crate) fn start_on(port: u16) -> Redis {
        Redis::start_with(port, &[])
    }

    /// Starts a server with additional options. It may still be loading its data file.
    pub(crate) fn start_with(port: u16, options: &[&str]) -> Redis {
        Redis::try_start(port, options).unwrap_or_else(|| panic!("redis-server does not start on {port}"))
    }

    fn try_start(port: u16, options: &[&str]) -> Option<Redis> {
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.args(options);
        command.current_dir(std::env::temp_dir()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("install redis-server: {error}"));
        let mut redis = Redis { child, port };
        let began = Instant::now();
        while began.elapsed() < START_WITHIN {
            if redis.child.try_wait().expect("a child process").is_some() {
                return None;
            }
            let is_up = |reply| match reply {
                Reply::Text(text) => text == "PONG",
                Reply::Error(error) => error.starts_with("LOADING"),
                _ => false,
            };
            if redis.try_command(&[b"PING"]).is_ok_and(is_up) {
                return Some(redis);
            }
            sleep(Duration::from_millis(5));
        }
        None
    }

    pub(crate) fn url(&self) -> String {
        url(self.port)
    }

    /// Suspends the process (SIGSTOP): it keeps its connections and sends no replies.
    pub(crate) fn freeze(&self) {
        self.signal("STOP");
    }

    pub(crate) fn thaw(&self) {
        self.signal("CONT");
    }

    /// Kills the server (SIGKILL) and returns its port for a successor.
    pub(crate) fn kill(mut self) -> u16 {
        self.end();
        self.port
    }

    /// All keys of the server, sorted.
    pub(crate) fn keys(&self) -> Vec<String> {
        let Reply::List(keys) = self.command(&[b"KEYS", b"*"]) else { panic!("KEYS returns a list") };
        let mut keys: Vec<_> = keys.into_iter().map(Reply::into_text).collect();
        keys.sort();
        keys
    }

    /// Keys of cached responses, without those of leases and of the bus.
    pub(crate) fn entries(&self) -> Vec<String> {
        let others = ["tg:lease:", "tg:{bus}:"];
        self.keys().into_iter().filter(|key| !others.iter().any(|other| key.starts_with(other))).collect()
    }

    pub(crate) fn value(&self, key: &str) -> Option<Vec<u8>> {
        match self.command(&[b"GET", key.as_bytes()]) {
            Reply::Nothing => None,
            reply => Some(reply.into_bytes()),
        }
    }

    /// Sends one command on a new connection.
    pub(crate) fn command(&self, parts: &[&[u8]]) -> Reply {
        match self.try_command(parts) {
            Ok(Reply::Error(error)) => panic!("redis-server returned an error: {error}"),
            Ok(reply) => reply,
            Err(error) => panic!("redis-server on {}: {error}", self.port),
        }
    }

    fn try_command(&self, parts: &[&[u8]]) -> io::Result<Reply> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(START_WITHIN))?;
        let mut request = format!("*{}\r\n", parts.len()).into_bytes();
        for part in parts {
            request.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
            request.extend_from_slice(part);
            request.extend_from_slice(b"\r\n");
        }
        (&stream).write_all(&request)?;
        Reply::read(&mut BufReader::new(stream))
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("the program kill runs").success());
    }

    fn end(&mut self) {
        // SIGKILL also ends a suspended process.
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.end();
    }
}

/// Endpoint URL of a server on `port`, running or not.
pub(crate) fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

/// A free port below the ephemeral range. In that range, a connection attempt to a port without
/// listener can use the same port as its source and connect to itself, and a killed server could
/// not rebind its port.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = u16::try_from(std::process::id() % 1_000).expect("below 1,000") * 10;
    (0..10_000)
        .map(|_| 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000)
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .expect("one of 10,000 ports is free")
}

/// A reply of Redis.
#[derive(Debug, PartialEq)]
pub(crate) enum Reply {
    Text(String),
    Error(String),
    Number(i64),
    Bytes(Vec<u8>),
    Nothing,
    List(Vec<Reply>),
}

impl Reply {
    fn read(stream: &mut impl BufRead) -> io::Result<Reply> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "not RESP");
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let (kind, rest) = line.trim_end().split_at_checked(1).ok_or_else(malformed)?;
        let number = || rest.parse::<i64>().map_err(|_| malformed());
        Ok(match kind {
            "+" => Reply::Text(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Number(number()?),
            "$" => {
                let Ok(length) = usize::try_from(number()?) else { return Ok(Reply::Nothing) };
                let mut bytes = vec![0; length + 2];
                stream.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Reply::Bytes(bytes)
            }
            "*" => Reply::List((0..number()?).map(|_| Reply::read(stream)).collect::<io::Result<_>>()?),
            _ => return Err(malformed()),
        })
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        match self {
            Reply::Bytes(bytes) => bytes,
            reply => panic!("not bytes: {reply:?}"),
        }
    }

    pub(crate) fn into_text(self) -> String {
        String::from_utf8(self.into_bytes()).expect("keys of the gateway are ASCII")
    }
}
