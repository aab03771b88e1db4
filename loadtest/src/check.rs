//! Whether the answers of a peer are right and complete: before the load, during it and after it.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::client::{Answer, Connection};
use crate::failure::{Failure, Result};
use crate::origin;
use crate::peer::Peer;
use crate::workload::{Source, Workload};

/// Enough for what a limit lets through before it denies.
const DENIED_AFTER_MAX: usize = 5;
/// How many targets are asked for again when all have been asked for once: of 10,000 keys, a sample.
const AGAIN_MAX: usize = 1_000;
/// Between two probes: often enough to see what goes wrong under load, too seldom to be measured.
const PROBE_EVERY: Duration = Duration::from_millis(250);

/// A request that is under way has reached the origin by then.
const SETTLE_EVERY: Duration = Duration::from_millis(30);
const SETTLE_PATIENCE: Duration = Duration::from_secs(3);

/// Right answers of one peer under one workload.
pub(crate) struct Check {
    peer: Peer,
    address: SocketAddr,
    workload: Workload,
    targets: Vec<String>,
    expected: Vec<u8>,
    probed: Option<Instant>,
    next: usize,
}

/// What was asked beside the load of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Probes {
    pub(crate) asked: u64,
    pub(crate) wrong: u64,
    /// Past a limit.
    pub(crate) let_through: u64,
}

impl Check {
    pub(crate) fn new(peer: Peer, address: SocketAddr, workload: Workload) -> Self {
        let expected = origin::body(workload.body_bytes());
        Check { peer, address, workload, targets: workload.targets(), expected, probed: None, next: 0 }
    }

    /// Asks for every target, which fills the cache, and then as after the load.
    pub(crate) fn before(&self, origin: &mut Counter) -> Result<()> {
        if self.workload.source() != Source::Limit {
            self.all_right(&self.targets)?;
        }
        self.after(origin)
    }

    /// Asks again. Compares status, entity tag, body and the origin's counter.
    pub(crate) fn after(&self, origin: &mut Counter) -> Result<()> {
        match self.workload.source() {
            Source::Limit => self.denied(origin),
            Source::Cache | Source::Origin => {
                let step = self.targets.len().div_ceil(AGAIN_MAX);
                let some: Vec<String> = self.targets.iter().step_by(step).cloned().collect();
                self.answers_come_from_their_source(&some, origin)
            }
        }
    }

    /// Asks for one target, on a connection of its own, when the last probe was long enough ago.
    pub(crate) fn probe(&mut self, probes: &mut Probes) {
        if self.probed.is_some_and(|probed| probed.elapsed() < PROBE_EVERY) {
            return;
        }
        self.probed = Some(Instant::now());
        // A prime far from any number of keys: the probes are spread over all of them.
        self.next = (self.next + 7_919) % self.targets.len();
        let target = &self.targets[self.next];
        let answer = self.open().and_then(|mut client| self.get(&mut client, target));
        let right = match (answer, self.workload.source()) {
            (Ok(answer), Source::Limit) if answer.status == 429 => Ok(()),
            (Ok(answer), Source::Limit) => {
                probes.let_through += 1;
                self.right(target, &answer)
            }
            (answer, _) => answer.and_then(|answer| self.right(target, &answer)),
        };
        probes.asked += 1;
        if let Err(failure) = right {
            probes.wrong += 1;
            eprintln!("{}: under load: {failure}", self.workload.name());
        }
    }

    /// Asks for `targets` and compares what the origin saw of it.
    fn answers_come_from_their_source(&self, targets: &[String], origin: &mut Counter) -> Result<()> {
        let before = origin.settled()?;
        self.all_right(targets)?;
        let asked = origin.count()? - before;
        let all = u64::try_from(targets.len()).unwrap_or(u64::MAX);
        let right = if self.workload.source() == Source::Cache { 0 } else { all };
        if asked == right {
            return Ok(());
        }
        Err(self.wrong(self.workload.base(), format!("{asked} of {all} requests reached the origin, not {right}")))
    }

    fn all_right(&self, targets: &[String]) -> Result<()> {
        let mut client = self.open()?;
        for target in targets {
            self.right(target, &self.get(&mut client, target)?)?;
        }
        Ok(())
    }

    fn right(&self, target: &str, answer: &Answer) -> Result<()> {
        // One constant answer can carry the tag of one target only.
        let tagged = if self.peer == Peer::LimitAnswer { self.workload.base() } else { target };
        let what = if answer.status != 200 {
            format!("status {}", answer.status)
        } else if answer.etag.as_deref() != Some(&origin::etag(tagged.as_bytes())) {
            "the ETag of another target".to_owned()
        } else if answer.body != self.expected {
            format!("a body of {} bytes that is not the origin's of {}", answer.body.len(), self.expected.len())
        } else {
            return Ok(());
        };
        Err(self.wrong(target, what))
    }

    /// The limit lets some requests through; after that, none, and none reaches the origin.
    fn denied(&self, origin: &mut Counter) -> Result<()> {
        let target = &self.targets[0];
        // A connection each: a peer may close after a denial.
        let ask = || Ok::<_, Failure>(self.get(&mut self.open()?, target)?.status);
        let mut status = ask()?;
        for _ in 0..DENIED_AFTER_MAX {
            if status != 429 {
                status = ask()?;
            }
        }
        let before = origin.settled()?;
        for _ in 0..DENIED_AFTER_MAX {
            status = if status == 429 { ask()? } else { status };
        }
        match (status, origin.count()? - before) {
            (429, 0) => Ok(()),
            (429, asked) => Err(self.wrong(target, format!("{asked} denied requests reached the origin"))),
            (status, _) => Err(self.wrong(target, format!("status {status}, not 429"))),
        }
    }

    fn open(&self) -> Result<Connection> {
        Connection::open(self.address).map_err(Failure::io(format!("{} does not accept", self.peer.name())))
    }

    fn get(&self, client: &mut Connection, target: &str) -> Result<Answer> {
        client.get(target).map_err(|error| self.wrong(target, error.to_string()))
    }

    fn wrong(&self, target: &str, what: String) -> Failure {
        Failure::Wrong { peer: self.peer.name().to_owned(), target: target.to_owned(), what }
    }
}

/// The origin's counter of answered requests.
pub(crate) struct Counter {
    client: Connection,
}

impl Counter {
    pub(crate) fn open(origin: SocketAddr) -> Result<Self> {
        let client = Connection::open(origin).map_err(Failure::io("the origin does not accept"))?;
        Ok(Counter { client })
    }

    pub(crate) fn count(&mut self) -> Result<u64> {
        let answer = self.client.get(origin::COUNT).map_err(Failure::io("the origin does not tell its counter"))?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        text.parse().map_err(|_| Failure::Unexpected { file: origin::COUNT.to_owned(), text })
    }

    /// The count once it stands still: a peer may be busy with requests whose client has gone, and the next peer would be
    /// blamed for them. Where it does not, what comes is an error that shows.
    pub(crate) fn settled(&mut self) -> Result<u64> {
        let deadline = Instant::now() + SETTLE_PATIENCE;
        let mut count = self.count()?;
        loop {
            thread::sleep(SETTLE_EVERY);
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

    fn check(peer: Peer, workload: Workload) -> Check {
        // Nobody listens on port 1.
        Check::new(peer, SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), workload)
    }

    fn answer(status: u16, tag: &str, body: &[u8]) -> Answer {
        Answer { status, etag: Some(origin::etag(tag.as_bytes())), body: body.to_vec() }
    }

    #[test]
    fn an_answer_is_right_in_status_tag_and_body() {
        let check = check(Peer::Nginx, Workload::Hit1k);
        let body = origin::body(1_024);
        assert!(check.right("/a", &answer(200, "/a", &body)).is_ok());
        for wrong in [answer(503, "/a", &body), answer(200, "/b", &body), answer(200, "/a", &body[1..])] {
            assert!(check.right("/a", &wrong).is_err());
        }
    }

    #[test]
    fn a_constant_answer_has_the_tag_of_no_single_key() {
        let check = check(Peer::LimitAnswer, Workload::Hit10kKeys);
        let body = origin::body(1_024);
        assert!(check.right("/hit/key/5", &answer(200, "/hit/key", &body)).is_ok());
        assert!(check.right("/hit/key/5", &answer(200, "/hit/key/5", &body)).is_err());
    }

    #[test]
    fn probes_come_at_intervals_and_a_peer_that_does_not_answer_is_wrong() {
        let mut check = check(Peer::Nginx, Workload::Denied);
        let mut probes = Probes::default();
        check.probe(&mut probes);
        check.probe(&mut probes);
        assert_eq!(probes, Probes { asked: 1, wrong: 1, let_through: 0 });
    }
}
