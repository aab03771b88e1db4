//! Load at a rate that does not depend on the responses: each request is sent at its time, as by
//! many clients that do not know of each other.
//!
//! A closed loop, in which each connection waits for its response, slows down with the server and
//! therefore shows no overload.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

/// How long a client waits for its response.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// The results of the requests of one load, by their ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenLoopReport {
    pub(crate) offered: u64,
    /// 200 in time.
    pub(crate) good: u64,
    /// 503 in time.
    pub(crate) rejected: u64,
    /// Another status, no response in time, or a failed connection.
    pub(crate) failed: u64,
    /// Latencies of the good ones, sorted.
    latencies: Vec<Duration>,
}

impl OpenLoopReport {
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let index = self.latencies.len().saturating_sub(1) * percent / 100;
        self.latencies.get(index).copied().unwrap_or_default()
    }
}

/// Sends `rate` requests a second for `time`. Only the requests of the second half count: the first
/// one is for whatever adapts to the load.
pub(crate) fn run(address: SocketAddr, rate: f64, time: Duration) -> io::Result<OpenLoopReport> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let idle = Rc::new(RefCell::new(Vec::new()));
        let start = Instant::now();
        let mut requests = JoinSet::new();
        let mut report = OpenLoopReport::default();
        let mut number = 0_u32;
        loop {
            let at = Duration::from_secs_f64(f64::from(number) / rate);
            if at >= time {
                break;
            }
            number += 1;
            sleep_until(start + at).await;
            let (idle, counts) = (Rc::clone(&idle), at >= time / 2);
            requests.spawn_local(async move {
                let sent = Instant::now();
                let status = timeout(PATIENCE, get(address, &idle)).await;
                (counts, status.ok().and_then(Result::ok), sent.elapsed())
            });
            while let Some(Ok(ended)) = requests.try_join_next() {
                report.add(ended);
            }
        }
        while let Some(Ok(ended)) = requests.join_next().await {
            report.add(ended);
        }
        report.latencies.sort_unstable();
        Ok(report)
    })
}

impl OpenLoopReport {
    fn add(&mut self, (counts, status, latency): (bool, Option<u16>, Duration)) {
        if !counts {
            return;
        }
        self.offered += 1;
        match status {
            Some(200) => {
                self.good += 1;
                self.latencies.push(latency);
            }
            Some(503) => self.rejected += 1,
            _ => self.failed += 1,
        }
    }
}

/// One GET over an idle connection, or a new one. Returns the status. A connection is dropped if
/// this is cancelled.
async fn get(address: SocketAddr, idle: &RefCell<Vec<TcpStream>>) -> io::Result<u16> {
    let kept = idle.borrow_mut().pop();
    let mut stream = match kept {
        Some(stream) => stream,
        None => TcpStream::connect(address).await?,
    };
    stream.set_nodelay(true)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: knee.example\r\n\r\n").await?;
    let mut inbox = Vec::with_capacity(1 << 10);
    loop {
        if stream.read_buf(&mut inbox).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some((status, length)) = parse(&inbox)
            && inbox.len() >= length
        {
            idle.borrow_mut().push(stream);
            return Ok(status);
        }
    }
}

/// The status of a response, and its length with its body.
fn parse(bytes: &[u8]) -> Option<(u16, usize)> {
    let head = memmem::find(bytes, b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&bytes[..head]).ok()?;
    let status = text.get(9..12)?.parse().ok()?;
    let is_length = |line: &&str| line.get(..15).is_some_and(|name| name.eq_ignore_ascii_case("content-length:"));
    let length: usize = text.lines().find(is_length)?[15..].trim().parse().ok()?;
    Some((status, head + length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_is_parsed_with_its_length() {
        assert_eq!(parse(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nab"), Some((503, 57)));
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"), None);
    }
}
