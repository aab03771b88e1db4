//! Observes a fleet while actions run: a load balancer's rotation by `/ready`, loads, and purges
//! whose effect is read from every gateway.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::case::client::CaseClient;
use crate::error::{LoadtestError, Result};
use crate::fleet::rotation::{self, Member};
use crate::fleet::{HOST, LIMIT};
use crate::load::open_loop::{OpenLoopLoad, OpenLoopReport};
use crate::load::target::{AddressSet, LoadTarget};

const PURGE_INTERVAL: Duration = Duration::from_millis(500);
const KEYS: usize = 50;
/// Far above any phase.
const TIME_MAX: Duration = Duration::from_secs(3_600);

/// Figures of one action.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PhaseFigures {
    pub(crate) action: String,
    pub(crate) seconds: f64,
    pub(crate) requests: u64,
    /// Requests without a good response, of those without a limit.
    pub(crate) lost: u64,
    /// Requests that were sent again because a kept connection had been closed.
    pub(crate) resent: u64,
    pub(crate) p99_ms: f64,
    pub(crate) admitted: u64,
    /// The most that the fleet's limit may admit in this time.
    pub(crate) admitted_max: u64,
    pub(crate) over_limit: u64,
    pub(crate) purges: u64,
    /// Purges that some node or server had not acknowledged.
    pub(crate) incomplete_purges: u64,
    /// Older responses after a purge that all had acknowledged.
    pub(crate) stale: u64,
    /// Older responses after a purge that some had not: they apply it later.
    pub(crate) stale_unacknowledged: u64,
}

#[derive(Debug, Default)]
struct PurgeCounts {
    purges: u64,
    incomplete: u64,
    stale: u64,
    stale_unacknowledged: u64,
}

/// The gateways of a fleet and its origin's version.
pub(crate) struct FleetWatch<'a> {
    pub(crate) members: Vec<Member>,
    pub(crate) version: &'a AtomicU64,
    pub(crate) regions: usize,
    /// Requests per second without a limit.
    pub(crate) rate: f64,
}

impl FleetWatch<'_> {
    /// Runs loads and purges while `action` runs, for at least `least`.
    pub(crate) fn observe(
        &self,
        (name, least): (&str, Duration),
        action: impl FnOnce() -> Result<()>,
    ) -> Result<PhaseFigures> {
        let stop = AtomicBool::new(false);
        let rotation = rotation::of_all(&self.members);
        let began = Instant::now();
        thread::scope(|scope| {
            let rotate = scope.spawn(|| rotation::follow_readiness(&rotation, &self.members, &stop));
            let passed = scope.spawn(|| self.load(("/cached", self.rate), (&rotation, &stop)));
            let limited = scope.spawn(|| self.load(("/limited", 2.0 * LIMIT.0), (&rotation, &stop)));
            let purged = scope.spawn(|| self.purge(&rotation, &stop));
            let acted = action().and_then(|()| {
                let left = least.saturating_sub(began.elapsed());
                crate::interrupt::wait_for(left, || Ok(None::<()>)).map(drop)
            });
            stop.store(true, Relaxed);
            let time = began.elapsed();
            let panicked = |_| LoadtestError::Load("a thread of the fleet has panicked".to_owned());
            let (passed, limited) = (passed.join().map_err(panicked)?, limited.join().map_err(panicked)?);
            let purged = purged.join().map_err(panicked)?;
            rotate.join().map_err(panicked)?;
            acted?;
            Ok(figures((name, time), &passed?, (&limited?, &purged)))
        })
    }

    fn load(
        &self,
        (prefix, rate): (&str, f64),
        (rotation, stop): (&AddressSet, &AtomicBool),
    ) -> Result<OpenLoopReport> {
        let request = |key: usize| {
            let region = key % self.regions;
            format!("GET {prefix}/{key} HTTP/1.1\r\nHost: {HOST}\r\nx-region: r{region}\r\n\r\n").into_bytes()
        };
        let mut target = LoadTarget::plain(self.members[0].listener, &["/".to_owned()], "");
        target.addresses = rotation.clone();
        target.requests = (0..KEYS).map(request).collect();
        let load = OpenLoopLoad {
            target: &target,
            rate,
            warm_up: Duration::ZERO,
            time: TIME_MAX,
            connections: 256,
            timeout: Duration::from_secs(10),
            threads: 1,
            stop: Some(stop),
        };
        load.run(|_| ())
    }

    /// Changes a response, purges it on one node after another, and reads it from all.
    fn purge(&self, rotation: &AddressSet, stop: &AtomicBool) -> PurgeCounts {
        let mut counts = PurgeCounts::default();
        for number in 0_u64.. {
            if stop.load(Relaxed) {
                break;
            }
            let (region, key) = (number % self.regions as u64, format!("purged-{}", number % 5));
            let request = format!("GET /cached/{key} HTTP/1.1\r\nHost: {HOST}\r\nx-region: r{region}\r\n\r\n");
            // All nodes have it.
            self.members.iter().for_each(|member| drop(CaseClient::new(member.listener).send(request.as_bytes())));
            let newest = self.version.fetch_add(1, Relaxed) + 1;
            let Some(ordered) = rotation.select(number) else { continue };
            let Some(node) = self.members.iter().find(|member| member.listener == ordered) else { continue };
            let query = format!("/api/v1/purge?tag={key}");
            let Ok(reply) = CaseClient::new(node.admin).post(&query, ("", "")) else {
                // The node has ended meanwhile: nothing was promised.
                continue;
            };
            counts.purges += 1;
            counts.incomplete += u64::from(reply.status != 200);
            for member in &self.members {
                // A node that is down serves nothing.
                let Ok(response) = CaseClient::new(member.listener).send(request.as_bytes()) else { continue };
                let version: u64 = String::from_utf8_lossy(&response.body).parse().unwrap_or(newest);
                match (version < newest, reply.status) {
                    (true, 200) => counts.stale += 1,
                    (true, _) => counts.stale_unacknowledged += 1,
                    (false, _) => {}
                }
            }
            thread::sleep(PURGE_INTERVAL);
        }
        counts
    }
}

fn figures(
    (name, time): (&str, Duration),
    passed: &OpenLoopReport,
    (limited, purges): (&OpenLoopReport, &PurgeCounts),
) -> PhaseFigures {
    // A request that is admitted was sent within the time and a moment.
    let admitted_max = (LIMIT.0 * (time.as_secs_f64() + 0.5) + LIMIT.1) as u64;
    PhaseFigures {
        action: name.to_owned(),
        seconds: time.as_secs_f64(),
        requests: passed.offered + limited.offered,
        lost: passed.offered - passed.good + limited.failed,
        resent: passed.resent + limited.resent,
        p99_ms: passed.percentile(99.0).as_secs_f64() * 1e3,
        admitted: limited.good,
        admitted_max,
        over_limit: limited.good.saturating_sub(admitted_max),
        purges: purges.purges,
        incomplete_purges: purges.incomplete,
        stale: purges.stale,
        stale_unacknowledged: purges.stale_unacknowledged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_count_what_exceeds_the_limit() {
        let (mut limited, mut passed) = (OpenLoopReport::default(), OpenLoopReport::default());
        (limited.offered, limited.good, limited.rejected, limited.failed) = (2_000, 1_200, 790, 10);
        (passed.offered, passed.good, passed.rejected, passed.failed) = (500, 495, 2, 3);
        let of = |limited: &OpenLoopReport| {
            figures(("a", Duration::from_secs(10)), &passed, (limited, &PurgeCounts::default()))
        };
        assert_eq!((of(&limited).lost, of(&limited).admitted_max, of(&limited).over_limit), (15, 1_090, 110));
        limited.good = 1_000;
        assert_eq!(of(&limited).over_limit, 0);
    }
}
