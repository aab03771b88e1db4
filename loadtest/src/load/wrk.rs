//! Runs wrk and parses its report.

use std::net::SocketAddr;
use std::time::Duration;

use crate::error::{LoadtestError, Result};
use crate::load::report::LoadReport;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::system_calls::SystemCallCounter;
use crate::process::tools::{Tool, Tools};

const REPORT: &str = include_str!("../../wrk/report.lua");
const KEYS: &str = include_str!("../../wrk/keys.lua");

/// Time for wrk to connect, prepare its requests and exit, in addition to its duration.
const EXTRA_TIMEOUT: Duration = Duration::from_secs(20);

/// One run of wrk: its load profile and its duration.
#[derive(Clone, Copy)]
pub(crate) struct WrkRun<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a ScratchDirectory,
    pub(crate) profile: LoadProfile,
    /// Whole seconds, as wrk requires.
    pub(crate) seconds: u64,
    /// Counts the system calls of a server meanwhile.
    pub(crate) counter: Option<&'a SystemCallCounter>,
}

/// Connections and targets of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoadProfile {
    pub(crate) connections: usize,
    /// The target, or the prefix of all targets if there are several keys.
    pub(crate) base: &'static str,
    pub(crate) keys: usize,
    /// Percentage of requests for the first key; the others are spread over all keys.
    pub(crate) hot_percent: usize,
}

impl LoadProfile {
    pub(crate) fn targets(&self) -> Vec<String> {
        match self.keys {
            1 => vec![self.base.to_owned()],
            keys => (0..keys).map(|key| format!("{}/{key}", self.base)).collect(),
        }
    }
}

impl WrkRun<'_> {
    /// Puts load on `address`; calls `on_tick` periodically.
    pub(crate) fn run(&self, address: SocketAddr, on_tick: impl FnMut()) -> Result<LoadReport> {
        let seconds = self.seconds;
        let mut script = String::from(REPORT);
        if self.profile.keys > 1 {
            script.push_str(KEYS);
        }
        let script = self.scratch.write("wrk.lua", &script)?;
        let mut command = self.tools.load(self.tools.path(Tool::Wrk), self.counter);
        command.args(["--threads", "1", "--latency", "--connections", &self.profile.connections.to_string()]);
        command.arg("--duration").arg(format!("{seconds}s")).arg("--script").arg(script);
        command.arg(format!("http://{address}{}", self.profile.base));
        command.arg("--").arg(self.profile.keys.to_string()).arg(self.profile.hot_percent.to_string());
        let mut wrk = ChildProcess::start("wrk", command, self.scratch)?;
        match wrk.await_end(Duration::from_secs(seconds) + EXTRA_TIMEOUT, on_tick)? {
            Some(true) => parse(&wrk.output()).ok_or_else(|| LoadtestError::Load(wrk.output())),
            Some(false) => Err(LoadtestError::Load(wrk.output())),
            None => Err(LoadtestError::Load("wrk does not exit".to_owned())),
        }
    }
}

/// Parses the line that report.lua adds to the output of wrk.
fn parse(output: &str) -> Option<LoadReport> {
    let line = output.lines().find_map(|line| line.strip_prefix("report "))?;
    let value = |name: &str| -> Option<u64> {
        let mut values = line.split_ascii_whitespace().filter_map(|pair| pair.split_once('='));
        values.find(|(key, _)| *key == name)?.1.parse().ok()
    };
    Some(LoadReport {
        requests: value("requests")?,
        bytes: value("bytes")?,
        duration: Duration::from_micros(value("microseconds")?),
        p50: Duration::from_micros(value("p50")?),
        p99: Duration::from_micros(value("p99")?),
        error_statuses: value("status")?,
        socket_errors: value("connect")? + value("read")? + value("write")? + value("timeout")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
ChildProcess 3s test @ http://127.0.0.1:8080/hit/1
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   521.17us  112.04us   5.11ms   91.77%
    Req/Sec   120.90k     4.01k  127.92k    76.67%
  Latency Distribution
     50%  510.00us
     75%  561.00us
     90%  602.00us
     99%  811.00us
  361220 requests in 3.00s, 452.89MB read
  Socket errors: connect 0, read 1, write 2, timeout 4
Requests/sec: 120406.21
Transfer/sec:    150.96MB
report requests=361220 bytes=474889011 microseconds=3000011 p50=510 p99=811 status=3 connect=0 read=1 write=2 timeout=4
";

    #[test]
    fn output_without_a_complete_report_is_rejected() {
        let without = OUTPUT.split("report ").next().expect("the first part");
        for text in ["", "unable to connect to 127.0.0.1:1 Connection refused\n", without] {
            assert_eq!(parse(text), None);
        }
        for (from, to) in [("p99=811 ", ""), ("requests=361220 b", "requests= b"), ("read=1", "read=-1")] {
            assert_eq!(parse(&OUTPUT.replace(from, to)), None, "{to}");
        }
    }

    #[test]
    fn report_line_is_found_in_the_output() {
        let expected = LoadReport {
            requests: 361_220,
            bytes: 474_889_011,
            duration: Duration::from_micros(3_000_011),
            p50: Duration::from_micros(510),
            p99: Duration::from_micros(811),
            error_statuses: 3,
            socket_errors: 7,
        };
        assert_eq!(parse(OUTPUT), Some(expected));
    }
}
