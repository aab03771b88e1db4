//! wrk: how it is started, and what its report says.

use std::net::SocketAddr;
use std::time::Duration;

use crate::failure::{Failure, Result};
use crate::process::{Running, Scratch};
use crate::tools::{LOAD_CORE, Tool, Tools};

const REPORT: &str = include_str!("../wrk/report.lua");
const KEYS: &str = include_str!("../wrk/keys.lua");

/// For wrk to connect, write out its requests and end, beyond the time it was given.
const EXTRA_PATIENCE: Duration = Duration::from_secs(20);

/// One run of wrk.
pub(crate) struct Load<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a Scratch,
    pub(crate) aim: Aim,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Aim {
    pub(crate) connections: usize,
    /// The target, or what all targets begin with where there are several keys.
    pub(crate) base: &'static str,
    pub(crate) keys: usize,
    /// Of a hundred requests, those for the first key; the others are spread over all.
    pub(crate) mostly: usize,
}

impl Aim {
    pub(crate) fn targets(&self) -> Vec<String> {
        match self.keys {
            1 => vec![self.base.to_owned()],
            keys => (0..keys).map(|key| format!("{}/{key}", self.base)).collect(),
        }
    }
}

/// What one run of wrk saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) requests: u64,
    /// Heads and bodies, those of answers cut off by the end included.
    pub(crate) bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// Answers of status 400 and above.
    pub(crate) refused: u64,
    /// Connections, reads, writes that failed, and answers that took more than two seconds.
    pub(crate) broken: u64,
}

impl Load<'_> {
    /// Loads `address` for whole seconds, which is what wrk takes, and calls `meanwhile` again and again.
    pub(crate) fn run(&self, address: SocketAddr, seconds: u64, meanwhile: impl FnMut()) -> Result<Report> {
        let mut script = String::from(REPORT);
        if self.aim.keys > 1 {
            script.push_str(KEYS);
        }
        let script = self.scratch.write("wrk.lua", &script)?;
        let mut command = self.tools.pinned(LOAD_CORE, self.tools.path(Tool::Wrk));
        command.args(["--threads", "1", "--latency", "--connections", &self.aim.connections.to_string()]);
        command.arg("--duration").arg(format!("{seconds}s")).arg("--script").arg(script);
        command.arg(format!("http://{address}{}", self.aim.base));
        command.arg("--").arg(self.aim.keys.to_string()).arg(self.aim.mostly.to_string());
        let mut wrk = Running::start("wrk", command, self.scratch)?;
        match wrk.await_end(Duration::from_secs(seconds) + EXTRA_PATIENCE, meanwhile)? {
            Some(true) => parse(&wrk.output()).ok_or_else(|| Failure::Load(wrk.output())),
            Some(false) => Err(Failure::Load(wrk.output())),
            None => Err(Failure::Load("it does not end".to_owned())),
        }
    }
}

/// Finds the line of report.lua in wrk's output.
fn parse(output: &str) -> Option<Report> {
    let line = output.lines().find_map(|line| line.strip_prefix("report "))?;
    let value = |name: &str| -> Option<u64> {
        let mut values = line.split_ascii_whitespace().filter_map(|pair| pair.split_once('='));
        values.find(|(key, _)| *key == name)?.1.parse().ok()
    };
    Some(Report {
        requests: value("requests")?,
        bytes: value("bytes")?,
        duration: Duration::from_micros(value("microseconds")?),
        p50: Duration::from_micros(value("p50")?),
        p99: Duration::from_micros(value("p99")?),
        refused: value("status")?,
        broken: value("connect")? + value("read")? + value("write")? + value("timeout")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
Running 3s test @ http://127.0.0.1:8080/hit/1
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
    fn an_output_without_its_report_is_none() {
        let without = OUTPUT.split("report ").next().expect("the first part");
        for text in ["", "unable to connect to 127.0.0.1:1 Connection refused\n", without] {
            assert_eq!(parse(text), None);
        }
        for (from, to) in [("p99=811 ", ""), ("requests=361220 b", "requests= b"), ("read=1", "read=-1")] {
            assert_eq!(parse(&OUTPUT.replace(from, to)), None, "{to}");
        }
    }

    #[test]
    fn the_report_is_found_below_what_wrk_prints() {
        let expected = Report {
            requests: 361_220,
            bytes: 474_889_011,
            duration: Duration::from_micros(3_000_011),
            p50: Duration::from_micros(510),
            p99: Duration::from_micros(811),
            refused: 3,
            broken: 7,
        };
        assert_eq!(parse(OUTPUT), Some(expected));
    }
}
