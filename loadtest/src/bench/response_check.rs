//! Checks that the responses of a peer are correct and complete: before, during and after the load.

use std::io;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::client::{CheckConnection, CheckedResponse};
use crate::bench::curl::CurlClient;
use crate::bench::peer::Peer;
use crate::bench::probe_counts::ProbeCounts;
use crate::bench::workload::{ResponseSource, Workload};
use crate::error::{LoadtestError, Result};
use crate::servers::origin;

/// More than a limit admits before it denies.
const DENIED_AFTER_MAX: usize = 5;
/// Targets that are checked again after all have been requested once: a sample of 10,000 keys.
const SAMPLE_MAX: usize = 1_000;
/// Interval of probes: short enough to detect wrong responses under load, and too long to affect
/// the figures.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// A request in flight reaches the origin within this time.
const SETTLE_INTERVAL: Duration = Duration::from_millis(30);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);

/// How requests of the check are sent to a peer.
pub(crate) enum CheckClient {
    /// In clear text, to this address.
    Plain(SocketAddr),
    Tls(CurlClient),
}

/// A connection of the check, or what opens one for each request.
pub(crate) enum OpenedCheckClient<'a> {
    Plain(CheckConnection),
    Tls(&'a CurlClient),
}

impl CheckClient {
    pub(crate) fn open(&self) -> io::Result<OpenedCheckClient<'_>> {
        Ok(match self {
            CheckClient::Plain(address) => OpenedCheckClient::Plain(CheckConnection::open(*address)?),
            CheckClient::Tls(curl) => OpenedCheckClient::Tls(curl),
        })
    }
}

impl OpenedCheckClient<'_> {
    pub(crate) fn get(&mut self, target: &str) -> io::Result<CheckedResponse> {
        match self {
            OpenedCheckClient::Plain(connection) => connection.get(target),
            OpenedCheckClient::Tls(curl) => curl.get(target),
        }
    }
}

/// Checks the responses of one peer under one workload.
pub(crate) struct ResponseCheck {
    peer: Peer,
    workload: Workload,
    client: CheckClient,
    targets: Vec<String>,
    expected: Vec<u8>,
    last_probe: Option<Instant>,
    next: usize,
}

impl ResponseCheck {
    pub(crate) fn new(peer: Peer, workload: Workload, client: CheckClient) -> Self {
        let expected = origin::body(workload.body_bytes());
        ResponseCheck { peer, workload, client, targets: workload.targets(), expected, last_probe: None, next: 0 }
    }

    /// Requests every target, which fills the cache; then checks as [`Self::after`].
    pub(crate) fn before(&self, origin: &mut OriginCounter) -> Result<()> {
        if self.workload.source() != ResponseSource::Limit {
            self.check_all(&self.targets)?;
        }
        self.after(origin)
    }

    /// Checks status, entity tag and body of a sample of targets, and the counter of the origin.
    pub(crate) fn after(&self, origin: &mut OriginCounter) -> Result<()> {
        match self.workload.source() {
            ResponseSource::Limit => self.check_denial(origin),
            ResponseSource::Cache | ResponseSource::Origin => {
                let step = self.targets.len().div_ceil(SAMPLE_MAX);
                let sample: Vec<String> = self.targets.iter().step_by(step).cloned().collect();
                self.check_source(&sample, origin)
            }
        }
    }

    /// Sends one request on a new connection if the probe interval has passed.
    pub(crate) fn probe(&mut self, probes: &mut ProbeCounts) {
        if self.last_probe.is_some_and(|probe| probe.elapsed() < PROBE_INTERVAL) {
            return;
        }
        self.last_probe = Some(Instant::now());
        // A prime that divides no number of keys: the probes are spread over all keys.
        self.next = (self.next + 7_919) % self.targets.len();
        let target = &self.targets[self.next];
        let response = self.open().and_then(|mut client| self.get(&mut client, target));
        let result = match (response, self.workload.source()) {
            (Ok(response), ResponseSource::Limit) if response.status == 429 => Ok(()),
            (Ok(response), ResponseSource::Limit) => {
                probes.admitted += 1;
                self.check_response(target, &response)
            }
            (response, _) => response.and_then(|response| self.check_response(target, &response)),
        };
        probes.sent += 1;
        if let Err(error) = result {
            probes.wrong += 1;
            eprintln!("{}: under load: {error}", self.workload.name());
        }
    }

    /// Requests `targets` and checks how many of the requests reached the origin.
    fn check_source(&self, targets: &[String], origin: &mut OriginCounter) -> Result<()> {
        let before = origin.settled()?;
        self.check_all(targets)?;
        let origin_requests = origin.count()? - before;
        let all = u64::try_from(targets.len()).unwrap_or(u64::MAX);
        let expected = if self.workload.source() == ResponseSource::Cache { 0 } else { all };
        if origin_requests == expected {
            return Ok(());
        }
        Err(self.wrong(
            self.workload.base(),
            format!("{origin_requests} of {all} requests reached the origin, expected {expected}"),
        ))
    }

    fn check_all(&self, targets: &[String]) -> Result<()> {
        let mut client = self.open()?;
        for target in targets {
            self.check_response(target, &self.get(&mut client, target)?)?;
        }
        Ok(())
    }

    fn check_response(&self, target: &str, response: &CheckedResponse) -> Result<()> {
        // The constant response has the entity tag of a single target.
        let tagged_target = if self.peer == Peer::ConstantResponse { self.workload.base() } else { target };
        let difference = if response.status != 200 {
            format!("status {}", response.status)
        } else if response.etag.as_deref() != Some(&origin::etag(tagged_target.as_bytes())) {
            "the ETag of another target".to_owned()
        } else if response.body != self.expected {
            format!(
                "a body of {} bytes that differs from the origin's {} bytes",
                response.body.len(),
                self.expected.len()
            )
        } else {
            return Ok(());
        };
        Err(self.wrong(target, difference))
    }

    /// Checks that the limit denies all requests after the first few, and that denied requests do
    /// not reach the origin.
    fn check_denial(&self, origin: &mut OriginCounter) -> Result<()> {
        let target = &self.targets[0];
        // A new connection per request: a peer may close the connection after a denial.
        let get_status = || Ok::<_, LoadtestError>(self.get(&mut self.open()?, target)?.status);
        let mut status = get_status()?;
        for _ in 0..DENIED_AFTER_MAX {
            if status != 429 {
                status = get_status()?;
            }
        }
        let before = origin.settled()?;
        for _ in 0..DENIED_AFTER_MAX {
            status = if status == 429 { get_status()? } else { status };
        }
        match (status, origin.count()? - before) {
            (429, 0) => Ok(()),
            (429, count) => Err(self.wrong(target, format!("{count} denied requests reached the origin"))),
            (status, _) => Err(self.wrong(target, format!("status {status}, not 429"))),
        }
    }

    fn open(&self) -> Result<OpenedCheckClient<'_>> {
        self.client.open().map_err(LoadtestError::io(format!("{} does not accept connections", self.peer.name())))
    }

    fn get(&self, client: &mut OpenedCheckClient<'_>, target: &str) -> Result<CheckedResponse> {
        client.get(target).map_err(|error| self.wrong(target, error.to_string()))
    }

    fn wrong(&self, target: &str, difference: String) -> LoadtestError {
        LoadtestError::WrongResponse { peer: self.peer.name().to_owned(), target: target.to_owned(), difference }
    }
}

/// Client that reads the origin's counter of requests.
pub(crate) struct OriginCounter {
    client: CheckConnection,
}

impl OriginCounter {
    pub(crate) fn open(origin: SocketAddr) -> Result<Self> {
        let client =
            CheckConnection::open(origin).map_err(LoadtestError::io("the origin does not accept connections"))?;
        Ok(OriginCounter { client })
    }

    pub(crate) fn count(&mut self) -> Result<u64> {
        let response =
            self.client.get(origin::COUNT).map_err(LoadtestError::io("cannot read the counter of the origin"))?;
        let text = String::from_utf8_lossy(&response.body).into_owned();
        text.parse().map_err(|_| LoadtestError::Unexpected { file: origin::COUNT.to_owned(), text })
    }

    /// Waits until the count is stable: a peer may still send requests of clients that have closed,
    /// and they would be attributed to the next peer. If the count does not become stable, the
    /// difference shows up as an error of the next peer.
    pub(crate) fn settled(&mut self) -> Result<u64> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut count = self.count()?;
        loop {
            thread::sleep(SETTLE_INTERVAL);
            let next = self.count()?;
            if next == count || Instant::now() >= deadline {
                return Ok(next);
            }
            count = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn check(peer: Peer, workload: Workload) -> ResponseCheck {
        // No process listens on port 1.
        ResponseCheck::new(peer, workload, CheckClient::Plain(SocketAddr::from((Ipv4Addr::LOCALHOST, 1))))
    }

    fn response(status: u16, tag: &str, body: &[u8]) -> CheckedResponse {
        CheckedResponse { status, etag: Some(origin::etag(tag.as_bytes())), body: body.to_vec() }
    }

    #[test]
    fn response_is_checked_for_status_etag_and_body() {
        let check = check(Peer::Nginx, Workload::Hit1k);
        let body = origin::body(1_024);
        assert!(check.check_response("/a", &response(200, "/a", &body)).is_ok());
        for wrong in [response(503, "/a", &body), response(200, "/b", &body), response(200, "/a", &body[1..])] {
            assert!(check.check_response("/a", &wrong).is_err());
        }
    }

    #[test]
    fn constant_response_is_checked_against_the_base_target() {
        let check = check(Peer::ConstantResponse, Workload::Hit10kKeys);
        let body = origin::body(1_024);
        assert!(check.check_response("/hit/key/5", &response(200, "/hit/key", &body)).is_ok());
        assert!(check.check_response("/hit/key/5", &response(200, "/hit/key/5", &body)).is_err());
    }

    #[test]
    fn probes_have_an_interval_and_an_unreachable_peer_counts_as_wrong() {
        let mut check = check(Peer::Nginx, Workload::Denied);
        let mut probes = ProbeCounts::default();
        check.probe(&mut probes);
        check.probe(&mut probes);
        assert_eq!(probes, ProbeCounts { sent: 1, wrong: 1, admitted: 0 });
    }
}
