//! Owns a fleet in virtual time: the leases of production, one bucket in memory, the wire between, and clients.
//!
//! Invariant: nothing here sleeps or reads a clock; the same seed gives the same history.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::time::Duration;

use limiter::lease::Bank;
use limiter::{Backing, Cost, Fraction, Lease, LeaseSettings, Moment, Quota};

use crate::MS;
use crate::random::Random;
use crate::reference::{Audit, Reference};
use crate::wire::{Arrival, Wire};

/// As the gateway's loop.
const LOOK: u64 = 5 * MS;
/// A date, as Redis has one: its sums have to stay exact.
const REDIS_EPOCH: i64 = 1_700_000_000_000_000;
/// How far back a replica may be.
const COPIES: usize = 1_000;

pub(crate) struct Node {
    lease: Lease,
    /// What its own clock says at the beginning of the simulation, in microseconds.
    clock: u64,
    look_at: u64,
    number: u64,
    is_asking: bool,
    is_dead: bool,
    /// When the bucket that there is now first answered it.
    known_at: Option<u64>,
    pub(crate) asks: u64,
    pub(crate) admitted: u64,
    /// What its clients leave to others.
    pub(crate) reserve: Fraction,
}

impl Node {
    fn moment(&self, now: u64) -> Moment {
        Moment::ORIGIN + Duration::from_micros(self.clock + now)
    }

    fn ends(&mut self, number: u64) -> bool {
        self.is_asking && self.number == number
    }
}

/// What one millisecond brought.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tick {
    pub(crate) offered: u64,
    pub(crate) admitted: u64,
    pub(crate) ideal: u64,
}

pub(crate) struct Fleet {
    pub(crate) nodes: Vec<Node>,
    pub(crate) wire: Wire,
    bank: Bank,
    /// The bucket as it was at the end of each of the last milliseconds, where somebody wants it.
    copies: Option<VecDeque<Bank>>,
    /// What the treasury's clock shows beyond the true time, in microseconds.
    pub(crate) redis_ahead: i64,
    quota: Quota,
    expected: NonZeroU32,
    pub(crate) audit: Audit,
    reference: Reference,
    random: Random,
    pub(crate) ticks: Vec<Tick>,
    admitted: u64,
}

impl Fleet {
    pub(crate) fn new(quota: Quota, nodes: u32, expected: u32, seed: u64) -> Fleet {
        let mut random = Random::new(seed);
        let expected = NonZeroU32::new(expected).expect("a fleet has a node");
        let members = (0..nodes).map(|index| {
            // Monotonic clocks have nothing to do with each other; these are up to 3 s apart.
            let clock = 10_000_000 + random.below(3_000_000);
            let began = Moment::ORIGIN + Duration::from_micros(clock);
            Node {
                lease: lease(quota, u64::from(index) * 7 + 1, expected, began),
                clock,
                look_at: random.below(20 * MS),
                number: 0,
                is_asking: false,
                is_dead: false,
                known_at: None,
                asks: 0,
                admitted: 0,
                reserve: Fraction::ZERO,
            }
        });
        let nodes: Vec<Node> = members.collect();
        let rate = quota.rate().count() / quota.rate().seconds();
        Fleet {
            wire: Wire::new(nodes.len(), Random::new(seed ^ 1)),
            nodes,
            bank: Bank::default(),
            copies: None,
            redis_ahead: 0,
            quota,
            expected,
            audit: Audit::new(rate),
            reference: Reference::new(rate, u64::from(quota.burst().get())),
            random,
            ticks: Vec::new(),
            admitted: 0,
        }
    }

    /// Microseconds since the beginning.
    pub(crate) fn now(&self) -> u64 {
        self.ticks.len() as u64 * MS
    }

    pub(crate) fn keep_copies(&mut self) {
        self.copies = Some(VecDeque::new());
    }

    /// The replica takes over: the bucket is what it was a second ago.
    pub(crate) fn lose_a_second(&mut self) {
        self.bank = self.copies.as_ref().and_then(|copies| copies.front()).cloned().unwrap_or_default();
    }

    /// The bucket is lost, and a new one begins with the next ask.
    pub(crate) fn lose_all(&mut self) {
        self.bank = Bank::default();
        self.copies.iter_mut().for_each(VecDeque::clear);
        self.nodes.iter_mut().for_each(|node| node.known_at = None);
    }

    /// A process ends without a word. What it sent is under way; what is sent to it goes nowhere, as do its clients.
    pub(crate) fn kill(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        (node.is_dead, node.is_asking, node.known_at) = (true, false, None);
        node.number += 1;
    }

    /// Another process begins in its place, and knows nothing of it.
    pub(crate) fn start(&mut self, index: usize) {
        let (now, id) = (self.now(), self.random.below(u64::MAX));
        let node = &mut self.nodes[index];
        node.lease = lease(self.quota, id, self.expected, node.moment(now));
        (node.is_dead, node.look_at) = (false, now);
    }

    /// Whether the bucket that there is now answered every node so long ago, in microseconds.
    pub(crate) fn all_are_known_for(&self, micros: u64) -> bool {
        self.nodes.iter().all(|node| node.known_at.is_some_and(|known| known + micros <= self.now()))
    }

    /// Turns time by 1 ms; `demand` says how many requests a second each node expects.
    pub(crate) fn tick(&mut self, demand: impl Fn(usize) -> f64) {
        self.ticks.push(Tick::default());
        let now = self.now();
        self.carry(now);
        let (mut tick, before) = (Tick::default(), self.admitted);
        for index in 0..self.nodes.len() {
            self.look(index, now);
            let arrives = if self.nodes[index].is_dead { 0.0 } else { demand(index) };
            let arrivals = self.random.arrivals(arrives / 1_000.0);
            tick.offered += arrivals;
            tick.admitted += self.load(index, arrivals, now);
        }
        tick.ideal = self.reference.admit(tick.offered, now);
        self.admitted += tick.admitted;
        self.audit.note(before, self.admitted, now);
        *self.ticks.last_mut().expect("one was pushed") = tick;
        if let Some(copies) = &mut self.copies {
            copies.push_back(self.bank.clone());
            if copies.len() > COPIES {
                copies.pop_front();
            }
        }
    }

    fn carry(&mut self, now: u64) {
        while let Some((at, arrival)) = self.wire.arrived(now) {
            match arrival {
                Arrival::Asked { node, number, ask } => {
                    // Who hangs up or is cut off meanwhile gets no answer; a server that is down runs nothing.
                    if self.wire.is_down {
                        continue;
                    }
                    let redis = u64::try_from(REDIS_EPOCH + self.redis_ahead + at.cast_signed()).unwrap_or(0);
                    let grant = self.bank.withdraw(&ask, redis);
                    self.wire.answer(node, number, grant, at);
                }
                Arrival::Answered { node, number, grant } => {
                    let node = &mut self.nodes[node];
                    if node.ends(number) {
                        node.lease.deposit(grant, node.moment(at));
                        node.known_at = node.known_at.or(Some(at));
                        (node.is_asking, node.look_at) = (false, at + LOOK);
                    }
                }
                Arrival::Failed { node, number } => {
                    let node = &mut self.nodes[node];
                    if node.ends(number) {
                        node.lease.failed(node.moment(at));
                        (node.is_asking, node.look_at) = (false, at + LOOK);
                    }
                }
            }
        }
    }

    fn look(&mut self, index: usize, now: u64) {
        let node = &mut self.nodes[index];
        if node.is_dead || node.is_asking || node.look_at > now {
            return;
        }
        node.look_at = now + LOOK;
        if let Some(ask) = node.lease.ask(node.moment(now)) {
            node.asks += 1;
            node.number += 1;
            node.is_asking = true;
            self.wire.ask(index, node.number, ask, now);
        }
    }

    /// How many of so many requests pass. After the first that does not, no other of the same moment can.
    fn load(&mut self, index: usize, arrivals: u64, now: u64) -> u64 {
        let node = &mut self.nodes[index];
        let (moment, reserve) = (node.moment(now), node.reserve);
        let admitted =
            (0..arrivals).take_while(|_| node.lease.commit(Cost::ONE, reserve, moment).is_ok()).count() as u64;
        for _ in admitted + 1..arrivals {
            node.lease.turned_away(Cost::ONE, reserve);
        }
        node.admitted += admitted;
        admitted
    }
}

fn lease(quota: Quota, id: u64, expected: NonZeroU32, began: Moment) -> Lease {
    let settings = LeaseSettings::new(id, expected, Backing::Treasury);
    Lease::new(quota, settings, began).expect("a quota that can be shared")
}
