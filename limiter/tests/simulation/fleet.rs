//! A fleet in virtual time: production leases, one bucket in memory, the network between them, and
//! clients.
//!
//! Invariant: nothing here sleeps or reads a clock; the same seed gives the same run.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::time::Duration;

use limiter::lease::LeaseServerModel;
use limiter::{Cost, Fraction, Lease, LeaseConfig, LeaseSource, MonotonicTime, Quota};

use crate::MS;
use crate::network::{Arrival, Network, RequestId};
use crate::random::Random;
use crate::reference::{BoundAudit, IdealBucket};

/// The gateway's interval between two checks of a lease.
const CHECK_INTERVAL: u64 = 5 * MS;
/// A date, as Redis returns one: its sums must stay exact.
const REDIS_EPOCH: i64 = 1_700_000_000_000_000;
/// How far behind a replica may be, in milliseconds.
const HISTORY_MAX: usize = 1_000;

pub(crate) struct Node {
    lease: Lease,
    /// The node's own clock at the start of the simulation, in microseconds.
    clock: u64,
    check_at: u64,
    number: u64,
    is_waiting: bool,
    is_dead: bool,
    /// When the current bucket first replied to the node.
    known_since: Option<u64>,
    pub(crate) requests: u64,
    pub(crate) admitted: u64,
    /// The reserve that the node's clients must leave.
    pub(crate) reserve: Fraction,
}

impl Node {
    fn time(&self, now: u64) -> MonotonicTime {
        MonotonicTime::ORIGIN + Duration::from_micros(self.clock + now)
    }

    fn awaits(&mut self, number: u64) -> bool {
        self.is_waiting && self.number == number
    }
}

/// Counts of one millisecond.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tick {
    pub(crate) offered: u64,
    pub(crate) admitted: u64,
    pub(crate) ideal: u64,
}

pub(crate) struct Fleet {
    pub(crate) nodes: Vec<Node>,
    pub(crate) network: Network,
    server: LeaseServerModel,
    /// The bucket at the end of each of the last milliseconds, if a scenario needs it.
    history: Option<VecDeque<LeaseServerModel>>,
    /// Offset of the backend's clock from the true time, in microseconds.
    pub(crate) redis_ahead: i64,
    quota: Quota,
    expected: NonZeroU32,
    pub(crate) audit: BoundAudit,
    reference: IdealBucket,
    random: Random,
    pub(crate) ticks: Vec<Tick>,
    admitted: u64,
}

impl Fleet {
    pub(crate) fn new(quota: Quota, nodes: u32, expected: u32, seed: u64) -> Fleet {
        let mut random = Random::new(seed);
        let expected = NonZeroU32::new(expected).expect("a fleet has a node");
        let members = (0..nodes).map(|index| {
            // Monotonic clocks are unrelated; these are up to 3 s apart.
            let clock = 10_000_000 + random.below(3_000_000);
            let began = MonotonicTime::ORIGIN + Duration::from_micros(clock);
            Node {
                lease: lease(quota, u64::from(index) * 7 + 1, expected, began),
                clock,
                check_at: random.below(20 * MS),
                number: 0,
                is_waiting: false,
                is_dead: false,
                known_since: None,
                requests: 0,
                admitted: 0,
                reserve: Fraction::ZERO,
            }
        });
        let nodes: Vec<Node> = members.collect();
        let rate = quota.rate().count() / quota.rate().seconds();
        Fleet {
            network: Network::new(nodes.len(), Random::new(seed ^ 1)),
            nodes,
            server: LeaseServerModel::default(),
            history: None,
            redis_ahead: 0,
            quota,
            expected,
            audit: BoundAudit::new(rate),
            reference: IdealBucket::new(rate, u64::from(quota.burst().get())),
            random,
            ticks: Vec::new(),
            admitted: 0,
        }
    }

    /// Microseconds since the start.
    pub(crate) fn now(&self) -> u64 {
        self.ticks.len() as u64 * MS
    }

    pub(crate) fn keep_history(&mut self) {
        self.history = Some(VecDeque::new());
    }

    /// A failover: the replica's bucket is a second old.
    pub(crate) fn fail_over(&mut self) {
        self.server = self.history.as_ref().and_then(|history| history.front()).cloned().unwrap_or_default();
    }

    /// The bucket is lost; a new one begins with the next request.
    pub(crate) fn reset_bucket(&mut self) {
        self.server = LeaseServerModel::default();
        self.history.iter_mut().for_each(VecDeque::clear);
        self.nodes.iter_mut().for_each(|node| node.known_since = None);
    }

    /// A process is killed without a final request. Its sent messages still arrive; replies to it
    /// and its clients' requests are lost.
    pub(crate) fn kill(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        (node.is_dead, node.is_waiting, node.known_since) = (true, false, None);
        node.number += 1;
    }

    /// Another process starts in its place, without its state.
    pub(crate) fn start(&mut self, index: usize) {
        let (now, id) = (self.now(), self.random.below(u64::MAX));
        let node = &mut self.nodes[index];
        node.lease = lease(self.quota, id, self.expected, node.time(now));
        (node.is_dead, node.check_at) = (false, now);
    }

    /// Whether the current bucket replied to every node at least this long ago, in microseconds.
    pub(crate) fn all_known_for(&self, micros: u64) -> bool {
        self.nodes.iter().all(|node| node.known_since.is_some_and(|known| known + micros <= self.now()))
    }

    /// Advances time by 1 ms; `demand` returns each node's load in requests per second.
    pub(crate) fn tick(&mut self, demand: impl Fn(usize) -> f64) {
        self.ticks.push(Tick::default());
        let now = self.now();
        self.deliver(now);
        let (mut tick, before) = (Tick::default(), self.admitted);
        for index in 0..self.nodes.len() {
            self.check_lease(index, now);
            let arrives = if self.nodes[index].is_dead { 0.0 } else { demand(index) };
            let arrivals = self.random.arrivals(arrives / 1_000.0);
            tick.offered += arrivals;
            tick.admitted += self.load(index, arrivals, now);
        }
        tick.ideal = self.reference.admit(tick.offered, now);
        self.admitted += tick.admitted;
        self.audit.record(before, self.admitted, now);
        *self.ticks.last_mut().expect("one was pushed") = tick;
        if let Some(history) = &mut self.history {
            history.push_back(self.server.clone());
            if history.len() > HISTORY_MAX {
                history.pop_front();
            }
        }
    }

    fn deliver(&mut self, now: u64) {
        while let Some((at, arrival)) = self.network.next_arrival(now) {
            match arrival {
                Arrival::Request { id, request } => {
                    // A node that was killed or cut off meanwhile gets no reply; a server that is
                    // down runs nothing.
                    if self.network.is_down {
                        continue;
                    }
                    let redis = u64::try_from(REDIS_EPOCH + self.redis_ahead + at.cast_signed()).unwrap_or(0);
                    let grant = self.server.handle(&request, redis);
                    self.network.send_reply(id, grant, at);
                }
                Arrival::Reply { id, grant } => {
                    let node = &mut self.nodes[id.node];
                    if node.awaits(id.number) {
                        node.lease.apply_grant(grant, node.time(at));
                        node.known_since = node.known_since.or(Some(at));
                        (node.is_waiting, node.check_at) = (false, at + CHECK_INTERVAL);
                    }
                }
                Arrival::Failure { id } => {
                    let node = &mut self.nodes[id.node];
                    if node.awaits(id.number) {
                        node.lease.request_failed(node.time(at));
                        (node.is_waiting, node.check_at) = (false, at + CHECK_INTERVAL);
                    }
                }
            }
        }
    }

    fn check_lease(&mut self, index: usize, now: u64) {
        let node = &mut self.nodes[index];
        if node.is_dead || node.is_waiting || node.check_at > now {
            return;
        }
        node.check_at = now + CHECK_INTERVAL;
        if let Some(request) = node.lease.next_request(node.time(now)) {
            node.requests += 1;
            node.number += 1;
            node.is_waiting = true;
            self.network.send_request(RequestId { node: index, number: node.number }, request, now);
        }
    }

    /// Sends this many requests and returns how many were admitted. After the first denial, no
    /// other request at the same time can pass.
    fn load(&mut self, index: usize, arrivals: u64, now: u64) -> u64 {
        let node = &mut self.nodes[index];
        let (time, reserve) = (node.time(now), node.reserve);
        let admitted = (0..arrivals).take_while(|_| node.lease.commit(Cost::ONE, reserve, time).is_ok()).count() as u64;
        for _ in admitted + 1..arrivals {
            node.lease.record_denied_demand(Cost::ONE, reserve);
        }
        node.admitted += admitted;
        admitted
    }
}

fn lease(quota: Quota, id: u64, expected: NonZeroU32, began: MonotonicTime) -> Lease {
    let config = LeaseConfig::new(id, expected, LeaseSource::Backend);
    Lease::new(quota, config, began).expect("a quota that can be shared")
}
