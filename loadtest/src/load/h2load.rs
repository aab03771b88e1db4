//! Runs h2load and parses its report: load over TLS, with HTTP/2 or HTTP/1.1, on lasting or on new
//! connections.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use crate::error::{LoadtestError, Result};
use crate::load::report::LoadReport;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::system_calls::SystemCallCounter;
use crate::process::tools::{Tool, Tools};

/// Time for h2load to connect and exit, in addition to its duration. New connections are opened at
/// a rate that a busy machine may miss.
const EXTRA_TIMEOUT: Duration = Duration::from_secs(60);
/// Clients offer one suite and one group, so that every server uses the same: the suite that
/// servers prefer on current processors, and the group that all of them have. P-256 is the group of
/// the certificate, which OpenSSL expects among the groups.
const SUITE: &str = "TLS_AES_128_GCM_SHA256";
const GROUPS: &str = "X25519:P-256";
/// New connections in each period.
const NEW_PER_PERIOD: u64 = 50;
const PERIOD_MS: u64 = 50;

/// Connections of a load over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsLoad {
    /// HTTP/2, with concurrent streams on each connection.
    Http2 { connections: usize, streams: usize },
    /// HTTP/1.1 on lasting connections.
    Http1 { connections: usize },
    /// HTTP/1.1 with a new connection, and a full handshake, for each request.
    NewConnections,
}

/// One run of h2load.
pub(crate) struct H2loadRun<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a ScratchDirectory,
    pub(crate) load: TlsLoad,
    pub(crate) target: &'a str,
    pub(crate) seconds: u64,
    /// Counts the system calls of a server meanwhile.
    pub(crate) counter: Option<&'a SystemCallCounter>,
}

impl H2loadRun<'_> {
    /// Puts load on `address`; calls `on_tick` periodically.
    pub(crate) fn run(&self, address: SocketAddr, on_tick: impl FnMut()) -> Result<LoadReport> {
        // In a directory of its own: tidegate watches those of its files, and each line would wake
        // it.
        let directory = self.scratch.path().join("h2load.d");
        fs::create_dir_all(&directory).map_err(LoadtestError::io(format!("cannot create {}", directory.display())))?;
        let log = directory.join("log");
        // h2load appends to its log.
        drop(fs::remove_file(&log));
        let mut command = self.tools.load(self.tools.path(Tool::H2load), self.counter);
        command.args(self.arguments()).arg(format!("--log-file={}", log.display()));
        command.arg(format!("https://{address}{}", self.target));
        let mut h2load = ChildProcess::start("h2load", command, self.scratch)?;
        let output = match h2load.await_end(Duration::from_secs(self.seconds) + EXTRA_TIMEOUT, on_tick)? {
            Some(true) => h2load.output(),
            Some(false) => return Err(LoadtestError::Load(h2load.output())),
            None => return Err(LoadtestError::Load("h2load does not exit".to_owned())),
        };
        let log = fs::read_to_string(&log).map_err(LoadtestError::io("cannot read the log of h2load"))?;
        parse(&output, &log).ok_or(LoadtestError::Load(output))
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![format!("--tls13-ciphers={SUITE}"), format!("--groups={GROUPS}")];
        let mut add = |name: &str, value: u64| arguments.push(format!("--{name}={value}"));
        let as_u64 = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        match self.load {
            TlsLoad::Http2 { connections, streams } => {
                add("clients", as_u64(connections));
                add("max-concurrent-streams", as_u64(streams));
                add("duration", self.seconds);
            }
            TlsLoad::Http1 { connections } => {
                add("clients", as_u64(connections));
                add("duration", self.seconds);
            }
            TlsLoad::NewConnections => {
                let connections = self.seconds * NEW_PER_PERIOD * 1_000 / PERIOD_MS;
                add("clients", connections);
                add("requests", connections);
                add("rate", NEW_PER_PERIOD);
                arguments.push(format!("--rate-period={PERIOD_MS}ms"));
            }
        }
        if !matches!(self.load, TlsLoad::Http2 { .. }) {
            arguments.push("--h1".to_owned());
        }
        arguments
    }
}

/// Parses the output and the log, which has a line with start, status and microseconds for each
/// response.
fn parse(output: &str, log: &str) -> Option<LoadReport> {
    let line = |name: &str| output.lines().find_map(|line| line.strip_prefix(name));
    let seconds = line("finished in ")?.split_once(", ")?.0;
    let requests = line("requests: ")?;
    let requests_done = count(requests, "done")?;
    let statuses = line("status codes: ")?;
    let bad_statuses = ["3xx", "4xx", "5xx"].iter().map(|class| count(statuses, class)).sum::<Option<u64>>()?;
    let failed = ["failed", "errored", "timeout"].iter().map(|kind| count(requests, kind)).sum::<Option<u64>>()?;
    let data = line("traffic: ")?.rsplit_once('(')?.1.strip_suffix(") data")?;
    let mut times: Vec<u32> = log.lines().filter_map(|line| line.rsplit_once('\t')?.1.parse().ok()).collect();
    times.sort_unstable();
    let percentile = |percent: usize| {
        let at = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(at).map_or(Duration::ZERO, |us| Duration::from_micros(u64::from(*us)))
    };
    Some(LoadReport {
        requests: requests_done,
        bytes: data.parse().ok()?,
        duration: duration(seconds)?,
        p50: percentile(50),
        p99: percentile(99),
        error_statuses: bad_statuses,
        socket_errors: failed,
    })
}

/// The number before `word` in a list such as `5 total, 4 done`.
fn count(list: &str, word: &str) -> Option<u64> {
    list.split(", ").find_map(|item| item.strip_suffix(word)?.trim().parse().ok())
}

/// Parses durations such as `2.00s` and `799.42ms`.
fn duration(text: &str) -> Option<Duration> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    units.iter().find_map(|(unit, seconds)| {
        let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
        Duration::try_from_secs_f64(number * seconds).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
starting benchmark...
progress: 100% done

finished in 799.42ms, 25018.08 req/s, 27.08MB/s
requests: 20000 total, 20000 started, 19999 done, 19998 succeeded, 1 failed, 2 errored, 4 timeout
status codes: 19998 2xx, 1 3xx, 0 4xx, 5 5xx
traffic: 21.65MB (22700784) total, 1.77MB (1860000) headers (space savings 37.58%), 19.53MB (20480000) data
                     min         max         mean         sd        +/- sd
time for request:      225us     85.71ms     16.82ms     11.11ms    92.03%
";

    #[test]
    fn incomplete_output_is_rejected() {
        for line in ["finished", "requests", "status codes", "traffic"] {
            let text: Vec<&str> = OUTPUT.lines().filter(|text| !text.starts_with(line)).collect();
            assert_eq!(parse(&text.join("\n"), ""), None, "{line}");
        }
    }

    #[test]
    fn report_and_percentiles_are_read() {
        let log: String = (1..=200).rev().map(|us| format!("1795972659694414\t200\t{us}\n")).collect();
        let expected = LoadReport {
            requests: 19_999,
            bytes: 20_480_000,
            duration: Duration::from_micros(799_420),
            p50: Duration::from_micros(101),
            p99: Duration::from_micros(199),
            error_statuses: 6,
            socket_errors: 7,
        };
        assert_eq!(parse(OUTPUT, &log), Some(expected));
        assert_eq!(parse(OUTPUT, "").map(|report| report.p99), Some(Duration::ZERO));
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("2.00s"), Some(Duration::from_secs(2)));
        assert_eq!(duration("85us"), Some(Duration::from_micros(85)));
        assert_eq!(duration("85"), None);
    }
}
