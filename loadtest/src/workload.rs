//! What is asked for, and what a right answer is.

use std::net::SocketAddr;
use std::time::Duration;

use clap::ValueEnum;

use crate::client::{Answer, Connection};
use crate::failure::{Failure, Result};
use crate::load::Report;
use crate::origin;

/// Enough for what a limit lets through before it denies.
const DENIED_AFTER_MAX: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// One key of 1 KiB, from the cache
    #[value(name = "hit-1k")]
    Hit1k,
    /// 1 KiB, always from the origin
    #[value(name = "pass-1k")]
    Pass1k,
    /// One key of 16 KiB, from the cache
    #[value(name = "hit-16k")]
    Hit16k,
    /// One key of 1 MiB, from the cache
    #[value(name = "hit-1m")]
    Hit1m,
    /// 10,000 keys of 1 KiB in random order, from the cache
    #[value(name = "hit-10k-keys")]
    Hit10kKeys,
    /// Denied by a limit: 429
    Denied,
}

/// Where an answer has to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Cache,
    Origin,
    Limit,
}

impl Workload {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Workload::Hit1k => "hit-1k",
            Workload::Pass1k => "pass-1k",
            Workload::Hit16k => "hit-16k",
            Workload::Hit1m => "hit-1m",
            Workload::Hit10kKeys => "hit-10k-keys",
            Workload::Denied => "denied",
        }
    }

    pub(crate) fn body_bytes(self) -> usize {
        match self {
            Workload::Hit16k => 16 << 10,
            Workload::Hit1m => 1 << 20,
            Workload::Hit1k | Workload::Pass1k | Workload::Hit10kKeys | Workload::Denied => 1 << 10,
        }
    }

    pub(crate) fn keys(self) -> usize {
        if self == Workload::Hit10kKeys { 10_000 } else { 1 }
    }

    /// The target, or what all targets begin with where there are several.
    pub(crate) fn base(self) -> &'static str {
        match self.from() {
            From::Cache => "/hit/key",
            From::Origin => "/pass/key",
            From::Limit => "/denied/key",
        }
    }

    fn from(self) -> From {
        match self {
            Workload::Hit1k | Workload::Hit16k | Workload::Hit1m | Workload::Hit10kKeys => From::Cache,
            Workload::Pass1k => From::Origin,
            Workload::Denied => From::Limit,
        }
    }

    fn targets(self) -> Vec<String> {
        match self.keys() {
            1 => vec![self.base().to_owned()],
            keys => (0..keys).map(|key| format!("{}/{key}", self.base())).collect(),
        }
    }

    /// Asks for every target twice and compares status, entity tag, body and the origin's counter. Fills the cache on its way.
    pub(crate) fn check(self, peer: &str, address: SocketAddr, origin: &mut Counter) -> Result<()> {
        let targets = self.targets();
        if self.from() == From::Limit {
            return check_denied(peer, address, &targets[0], origin);
        }
        let mut client = open(peer, address)?;
        let expected = origin::body(self.body_bytes());
        for target in &targets {
            check_answer(peer, target, &get(peer, &mut client, target)?, &expected)?;
        }
        let before = origin.count()?;
        for target in &targets {
            check_answer(peer, target, &get(peer, &mut client, target)?, &expected)?;
        }
        let asked = origin.count()? - before;
        let right = if self.from() == From::Cache { 0 } else { to_u64(targets.len()) };
        if asked == right {
            return Ok(());
        }
        Err(wrong(peer, self.base(), format!("{asked} of {} requests reached the origin, not {right}", targets.len())))
    }

    /// Answers of a run that were not right, by what wrk counts and by how often the origin was `asked` meanwhile.
    pub(crate) fn errors(self, report: &Report, asked: u64) -> u64 {
        let cut = u64::from(report.bytes < report.requests * to_u64(self.body_bytes()));
        let wrong = match self.from() {
            From::Cache => report.refused + asked + cut,
            From::Origin => report.refused + report.requests.saturating_sub(asked) + cut,
            // The slowest limit that nginx knows lets one request through each minute.
            From::Limit => {
                let let_through = 1 + report.duration.as_secs() / Duration::from_mins(1).as_secs();
                (report.requests - report.refused).saturating_sub(let_through)
            }
        };
        wrong + report.broken
    }
}

/// The origin's counter of answered requests.
pub(crate) struct Counter {
    client: Connection,
}

impl Counter {
    pub(crate) fn open(origin: SocketAddr) -> Result<Self> {
        Ok(Counter { client: open("origin", origin)? })
    }

    pub(crate) fn count(&mut self) -> Result<u64> {
        let answer = get("origin", &mut self.client, origin::COUNT)?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        text.parse().map_err(|_| Failure::Unexpected { file: origin::COUNT.to_owned(), text })
    }
}

fn check_answer(peer: &str, target: &str, answer: &Answer, expected: &[u8]) -> Result<()> {
    let what = if answer.status != 200 {
        format!("status {}", answer.status)
    } else if answer.etag.as_deref() != Some(&origin::etag(target.as_bytes())) {
        "the ETag of another target".to_owned()
    } else if answer.body != expected {
        format!("a body of {} bytes that is not the origin's of {}", answer.body.len(), expected.len())
    } else {
        return Ok(());
    };
    Err(wrong(peer, target, what))
}

/// The limit lets some requests through; after that, none, and none reaches the origin.
fn check_denied(peer: &str, address: SocketAddr, target: &str, origin: &mut Counter) -> Result<()> {
    // A connection each: a peer may close after a denial.
    let ask = || Ok::<_, Failure>(get(peer, &mut open(peer, address)?, target)?.status);
    let mut status = ask()?;
    for _ in 0..DENIED_AFTER_MAX {
        if status != 429 {
            status = ask()?;
        }
    }
    let before = origin.count()?;
    for _ in 0..DENIED_AFTER_MAX {
        status = if status == 429 { ask()? } else { status };
    }
    match (status, origin.count()? - before) {
        (429, 0) => Ok(()),
        (429, asked) => Err(wrong(peer, target, format!("{asked} denied requests reached the origin"))),
        (status, _) => Err(wrong(peer, target, format!("status {status}, not 429"))),
    }
}

fn open(peer: &str, address: SocketAddr) -> Result<Connection> {
    Connection::open(address).map_err(Failure::io(format!("{peer} does not accept")))
}

fn get(peer: &str, client: &mut Connection, target: &str) -> Result<Answer> {
    client.get(target).map_err(|error| wrong(peer, target, error.to_string()))
}

fn wrong(peer: &str, target: &str, what: String) -> Failure {
    Failure::Wrong { peer: peer.to_owned(), target: target.to_owned(), what }
}

fn to_u64(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(refused: u64, broken: u64) -> Report {
        let (second, ms) = (Duration::from_secs(1), Duration::from_millis(1));
        Report { requests: 100, bytes: 130_000, duration: second, p50: ms, p99: ms, refused, broken }
    }

    #[test]
    fn a_hit_that_asks_the_origin_is_an_error() {
        assert_eq!(Workload::Hit1k.errors(&report(0, 0), 0), 0);
        assert_eq!(Workload::Hit1k.errors(&report(2, 3), 4), 9);
        assert_eq!(Workload::Hit16k.errors(&report(0, 0), 0), 1, "bodies are cut");
    }

    #[test]
    fn a_pass_that_does_not_ask_the_origin_is_an_error() {
        assert_eq!(Workload::Pass1k.errors(&report(0, 0), 103), 0);
        assert_eq!(Workload::Pass1k.errors(&report(1, 0), 90), 11);
    }

    #[test]
    fn a_denied_request_that_is_let_through_is_an_error() {
        assert_eq!(Workload::Denied.errors(&report(99, 0), 1), 0);
        assert_eq!(Workload::Denied.errors(&report(90, 1), 10), 10);
    }

    #[test]
    fn an_answer_is_right_in_status_tag_and_body() {
        let answer = |status, tag: &str, body: &[u8]| Answer {
            status,
            etag: Some(origin::etag(tag.as_bytes())),
            body: body.to_vec(),
        };
        assert!(check_answer("p", "/a", &answer(200, "/a", b"x"), b"x").is_ok());
        for answer in [answer(503, "/a", b"x"), answer(200, "/b", b"x"), answer(200, "/a", b"y")] {
            assert!(check_answer("p", "/a", &answer, b"x").is_err());
        }
    }
}
