//! Load at a rate that does not depend on the responses: each request has its time, as of many
//! clients that do not know of each other.
//!
//! A closed loop, in which each connection waits for its response, slows down with the server and
//! therefore shows no overload. Latencies count from the time at which a request was due, not from
//! the time at which a connection was free for it: otherwise the requests that a stalled server
//! delays would not be seen (coordinated omission).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::error::{LoadtestError, Result};
use crate::interrupt;
use crate::load::connection::LoadConnection;
use crate::load::response_reader::{Keep, ResponseReader};
use crate::load::target::{Balance, LoadTarget};

/// How long a client of the scenarios waits for its response.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// A request that the generator sends later than this is not the server's delay.
const LATE: Duration = Duration::from_millis(20);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Microseconds up to this are counted exactly to three digits.
const LATENCY_MAX_US: u64 = 120_000_000;

/// A load: its target, rate, time and bounds.
#[derive(Clone, Copy)]
pub(crate) struct OpenLoopLoad<'a> {
    pub(crate) target: &'a LoadTarget,
    /// Requests per second.
    pub(crate) rate: f64,
    /// Time at the start that does not count.
    pub(crate) warm_up: Duration,
    /// Time that counts, after `warm_up`.
    pub(crate) time: Duration,
    /// Most connections at a time. A request waits for one of them, within its `timeout`.
    pub(crate) connections: usize,
    /// From the time at which a request is due to the end of its response.
    pub(crate) timeout: Duration,
    /// Threads of the generator.
    pub(crate) threads: usize,
    /// Ends the load before its time once it is true.
    pub(crate) stop: Option<&'a AtomicBool>,
}

/// The results of the requests of one load, by their ends.
#[derive(Clone, Debug)]
pub(crate) struct OpenLoopReport {
    pub(crate) offered: u64,
    /// Status below 400, in time.
    pub(crate) good: u64,
    /// 429 or 503 in time.
    pub(crate) rejected: u64,
    /// Another status, no response in time, or a failed connection.
    pub(crate) failed: u64,
    /// Requests of `failed` that had no response in time.
    pub(crate) timeouts: u64,
    /// Requests that the generator sent late.
    pub(crate) late: u64,
    /// Requests that were sent again because the server had closed a kept connection.
    pub(crate) resent: u64,
    pub(crate) statuses: BTreeMap<u16, u64>,
    /// Latencies of the good ones, in microseconds.
    latencies: Histogram<u64>,
}

impl Default for OpenLoopReport {
    fn default() -> Self {
        let latencies = Histogram::new_with_bounds(1, LATENCY_MAX_US, 3).expect("valid bounds");
        OpenLoopReport {
            offered: 0,
            good: 0,
            rejected: 0,
            failed: 0,
            timeouts: 0,
            late: 0,
            resent: 0,
            statuses: BTreeMap::new(),
            latencies,
        }
    }
}

impl OpenLoopReport {
    pub(crate) fn percentile(&self, percent: f64) -> Duration {
        Duration::from_micros(self.latencies.value_at_quantile(percent / 100.0))
    }

    /// Mean latency of the good requests.
    pub(crate) fn mean(&self) -> Duration {
        Duration::from_secs_f64(self.latencies.mean() / 1e6)
    }

    /// Sums the parts of several threads or rounds.
    pub(crate) fn add_all(&mut self, other: &OpenLoopReport) {
        self.offered += other.offered;
        self.good += other.good;
        self.rejected += other.rejected;
        self.failed += other.failed;
        self.timeouts += other.timeouts;
        self.late += other.late;
        self.resent += other.resent;
        for (status, count) in &other.statuses {
            *self.statuses.entry(*status).or_default() += count;
        }
        self.latencies.add(&other.latencies).expect("the same bounds");
    }

    fn add(&mut self, request: &EndedRequest) {
        if !request.counts {
            return;
        }
        self.offered += 1;
        self.late += u64::from(request.is_late);
        self.resent += request.resent;
        match request.status {
            Ok(status) => {
                *self.statuses.entry(status).or_default() += 1;
                match status {
                    ..400 => {
                        self.good += 1;
                        let micros = u64::try_from(request.latency.as_micros()).unwrap_or(u64::MAX);
                        self.latencies.saturating_record(micros.max(1));
                    }
                    429 | 503 => self.rejected += 1,
                    _ => self.failed += 1,
                }
            }
            Err(kind) => {
                self.failed += 1;
                self.timeouts += u64::from(kind == io::ErrorKind::TimedOut);
            }
        }
    }
}

struct EndedRequest {
    counts: bool,
    is_late: bool,
    resent: u64,
    status: std::result::Result<u16, io::ErrorKind>,
    /// From the time at which it was due.
    latency: Duration,
}

impl OpenLoopLoad<'_> {
    /// Puts the load on the target; calls `on_tick` periodically. Ends early if the command is
    /// interrupted, with an error.
    pub(crate) fn run(&self, mut on_tick: impl FnMut(Duration)) -> Result<OpenLoopReport> {
        let threads = self.threads.clamp(1, self.connections);
        let began = std::time::Instant::now();
        let parts: Vec<io::Result<OpenLoopReport>> = thread::scope(|scope| {
            let parts: Vec<_> = (0..threads).map(|index| scope.spawn(move || self.run_part(index, threads))).collect();
            while parts.iter().any(|part| !part.is_finished()) {
                on_tick(began.elapsed());
                thread::sleep(POLL_INTERVAL);
            }
            parts.into_iter().map(|part| part.join().unwrap_or_else(|_| Err(io::Error::other("a panic")))).collect()
        });
        if interrupt::is_requested() {
            return Err(LoadtestError::Interrupted);
        }
        let mut report = OpenLoopReport::default();
        for part in parts {
            report.add_all(&part.map_err(LoadtestError::io("the load failed"))?);
        }
        Ok(report)
    }

    /// Sends the requests `index`, `index + threads` and so on.
    fn run_part(&self, index: usize, threads: usize) -> io::Result<OpenLoopReport> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
        runtime.block_on(async {
            let pool = Rc::new(ConnectionPool::new(self, index, threads));
            let start = Instant::now();
            let mut requests = JoinSet::new();
            let mut report = OpenLoopReport::default();
            for number in (index as u64..).step_by(threads) {
                let at = Duration::from_secs_f64(number as f64 / self.rate);
                let is_stopped = self.stop.is_some_and(|stop| stop.load(Relaxed));
                if is_stopped || at >= self.warm_up + self.time || interrupt::is_requested() {
                    break;
                }
                let due = start + at;
                sleep_until(due).await;
                let (pool, counts, is_late) = (Rc::clone(&pool), at >= self.warm_up, due.elapsed() > LATE);
                requests.spawn_local(async move {
                    let resent = Cell::new(0);
                    let result = timeout_at(due + pool.timeout, pool.exchange(number, &resent)).await;
                    let status = match result {
                        Ok(result) => result.map_err(|error| error.kind()),
                        Err(_) => Err(io::ErrorKind::TimedOut),
                    };
                    EndedRequest { counts, is_late, resent: resent.get(), status, latency: due.elapsed() }
                });
                while let Some(Ok(ended)) = requests.try_join_next() {
                    report.add(&ended);
                }
            }
            // At most as long as the timeout.
            while let Some(Ok(ended)) = requests.join_next().await {
                report.add(&ended);
            }
            Ok(report)
        })
    }
}

/// The connections of one thread.
struct ConnectionPool {
    target: LoadTarget,
    timeout: Duration,
    places: Semaphore,
    idle: RefCell<Vec<LoadConnection>>,
}

impl ConnectionPool {
    fn new(load: &OpenLoopLoad<'_>, index: usize, threads: usize) -> Self {
        let share = load.connections / threads + usize::from(index < load.connections % threads);
        ConnectionPool {
            target: load.target.clone(),
            timeout: load.timeout,
            places: Semaphore::new(share),
            idle: RefCell::new(Vec::new()),
        }
    }

    /// The idle connection that was used last, of those that a request to `address` may use.
    fn take_idle(&self, address: SocketAddr) -> Option<LoadConnection> {
        let mut idle = self.idle.borrow_mut();
        match self.target.balance {
            Balance::Connections => idle.pop(),
            Balance::Requests => {
                idle.iter().rposition(|connection| connection.address == address).map(|at| idle.remove(at))
            }
        }
    }

    /// One request over an idle connection, or a new one. A connection is dropped if this is
    /// cancelled.
    async fn exchange(&self, number: u64, resent: &Cell<u64>) -> io::Result<u16> {
        // The semaphore is never closed.
        let _place = self.places.acquire().await;
        let request = &self.target.requests[(number % self.target.requests.len() as u64) as usize];
        loop {
            let address = self.target.addresses.select(number).ok_or(io::ErrorKind::AddrNotAvailable)?;
            let kept = self.take_idle(address);
            let was_kept = kept.is_some();
            let mut connection = match kept {
                Some(connection) => connection,
                None => LoadConnection::open(address, self.target.tls.as_ref()).await?,
            };
            let mut response = ResponseReader::new(Keep::Status, self.target.is_head);
            match connection.exchange(request, &mut response).await {
                Ok(()) => {
                    if response.is_reusable {
                        self.idle.borrow_mut().push(connection);
                    }
                    return Ok(response.status);
                }
                // The server has closed an idle connection: the next one is used.
                Err(_) if was_kept && response.status == 0 => resent.set(resent.get() + 1),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::load::target::AddressSet;

    /// A server that stops for `pause` at its third request.
    fn stalling_server(pause: Duration) -> LoadTarget {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the load");
            let mut buffer = [0; 1_024];
            for number in 0.. {
                if stream.read(&mut buffer).unwrap_or(0) == 0 {
                    return;
                }
                if number == 2 {
                    thread::sleep(pause);
                }
                drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
            }
        });
        LoadTarget::plain(address, &["/".to_owned()], "")
    }

    #[test]
    fn requests_that_a_stall_delays_count_from_the_time_when_they_were_due() {
        let pause = Duration::from_millis(400);
        let target = stalling_server(pause);
        let load = OpenLoopLoad {
            target: &target,
            rate: 50.0,
            warm_up: Duration::ZERO,
            time: Duration::from_secs(1),
            connections: 1,
            timeout: Duration::from_secs(5),
            threads: 1,
            stop: None,
        };
        let report = load.run(|_| ()).expect("a report");
        assert_eq!((report.offered, report.good, report.failed), (50, 50, 0));
        // 20 requests were due during the stall; a closed loop would show one slow request. Those
        // of the first half of the stall were delayed by at least half of it.
        assert!(report.percentile(82.0) >= pause / 2, "{:?}", report.percentile(82.0));
    }

    #[test]
    fn requests_without_a_response_in_time_fail() {
        let target = stalling_server(Duration::from_secs(20));
        let load = OpenLoopLoad {
            target: &target,
            rate: 40.0,
            warm_up: Duration::ZERO,
            time: Duration::from_millis(500),
            connections: 1,
            timeout: Duration::from_millis(300),
            threads: 1,
            stop: None,
        };
        let report = load.run(|_| ()).expect("a report");
        assert_eq!((report.offered, report.good), (20, 2));
        assert_eq!(report.timeouts, report.failed);
        assert_eq!(report.failed, 18);
    }

    /// A server that keeps its connections, and the number of its requests.
    fn counting_server() -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, count) = (stream.expect("the load"), Arc::clone(&count));
                thread::spawn(move || {
                    while stream.read(&mut [0; 1_024]).unwrap_or(0) > 0 {
                        count.fetch_add(1, Relaxed);
                        drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
                    }
                });
            }
        });
        (address, requests)
    }

    #[test]
    fn requests_are_balanced_although_connections_are_kept() {
        let servers = [counting_server(), counting_server()];
        let mut target = LoadTarget::plain(servers[0].0, &["/".to_owned()], "");
        target.addresses = AddressSet::new(servers.iter().map(|(address, _)| *address).collect());
        let load = OpenLoopLoad {
            target: &target,
            rate: 100.0,
            warm_up: Duration::ZERO,
            time: Duration::from_millis(400),
            connections: 4,
            timeout: Duration::from_secs(5),
            threads: 1,
            stop: None,
        };
        let report = load.run(|_| ()).expect("a report");
        assert_eq!((report.offered, report.good), (40, 40));
        assert_eq!(servers.map(|(_, requests)| requests.load(Relaxed)), [20, 20]);
    }
}
