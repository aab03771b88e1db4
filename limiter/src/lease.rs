//! Owns one node's part of a cluster limit: prepaid tokens, spent here without a round trip.
//!
//! Refuses I/O: it says what to ask ([`Lease::ask`]) and is told the answer ([`Lease::deposit`],
//! [`Lease::failed`]); someone else carries the message. Invariant: over any time t, all nodes
//! together admit at most R * t + B, for rate R and burst B, whatever the load. It rests on three
//! counts: the treasury's bucket holds at most B/2; what nodes hold unspent is at most the other
//! half, however many they are; and what enters either is at most R, because a node that refills
//! itself in an outage uses 0.8 of a share that the treasury keeps free while the node is silent
//! and charges when it is back. Two excesses remain, both for want of knowledge: nodes that
//! outnumber B/2 keep one token each in an outage; and a node that others outlive by 30 s of
//! silence, or that never reached the treasury they reach, refills itself from a share that the
//! treasury has given away.
//!
//! # The node
//! `balance` is all a node may spend, in millionths of tokens, never above `cap`. A grant adds to
//! it; from `refill_from` on, which a grant puts one validity into the future and a failure to
//! `now`, local time adds to it too. So there is no switch between two limiters to race with:
//! a lease that is not renewed expires into the local rate by itself.
//!
//! # The script
//! One Redis hash per rule, read and written by [`SCRIPT`] in one atomic run. Time is Redis `TIME`
//! in microseconds. Numbers are doubles that hold integers; every product or quotient is floored.
//!
//! Fields: `at` (time of the last refill), `level` (micro-tokens in the bucket), `rest` (the
//! remainder of the last refill, below `period`), and per node `n<id>` = five big-endian doubles,
//! `asked weight share credit held`: time of its last ask; its demand in milli-tokens a second; its
//! part of the rate in micro-tokens a second; micro-tokens it may still claim; whole tokens it
//! holds. The hash expires one minute after the last ask.
//!
//! Arguments: node, count, period, burst, expected, wanted, returned, held, demand, borrowed,
//! leaving: see [`Ask`]; the rate is `count` tokens per `period` seconds, which is `count / period`
//! micro-tokens per microsecond. Reply: tokens, validity in ms, nodes, share in micro-tokens/s.
//!
//! 1. `pool = max(1, floor(burst / 2))`, `afield = max(1, burst - pool)`: what the bucket and what
//!    the nodes may hold. No `at`: the bucket is new and **empty**, `at = now`.
//! 2. Records older than 30 s, or of another length, are deleted, the caller's own too. A record has earned
//!    `floor((now - asked) * share / 10^6)` since it was written (a negative time counts as 0). Of
//!    the *others*: `nodes` is their number plus one, and `total`, `shares`, `out`, `claims` are
//!    the sums of weights, shares, tokens held, and earnings.
//! 3. `elapsed = now - at` within 0 and 30 s (a clock that jumps back adds nothing, one that jumps
//!    forward at most a full bucket). `parts = elapsed * count + rest`;
//!    `gained = floor(parts / period)`; `rest = parts - gained * period`.
//!    `level = min(pool, level + gained + returned) - borrowed`, no lower than `-pool`.
//! 4. `fleet = max(nodes, expected)`; `cap = max(1, floor(afield / fleet))`;
//!    `weight = max(demand, floor(count * 1000 / period / (32 * fleet)), 1)`;
//!    `rate = floor(count * 10^6 / period)`;
//!    `share = floor(rate * weight / (total + weight))`, at most `rate - shares`, at least 0: the
//!    shares that nodes were last told never sum to more than the rate, even while one of them
//!    cannot hear that the others' demand has grown.
//! 5. `credit` is 0 for a caller without a record; else its old credit
//!    `+ earned + returned - borrowed`, within `-cap` and `cap`. This is the grant in proportion to
//!    demand by elapsed time.
//! 6. `available = max(credit, level - max(claims, floor(pool / 2)))`: a surplus that nobody claims
//!    is anyone's, but what the others earn, silent ones too, is kept for them.
//!    `tokens = floor(min(wanted, available, level))`, at most `cap - held` and
//!    `afield - out - held`, at least 0. `level -= tokens`;
//!    `credit = max(credit - tokens, min(credit, 0))`.
//! 7. The record is written with `held + tokens`, or deleted if leaving.

mod bank;
#[cfg(test)]
mod tests;
mod treasury;

use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use bank::Bank;
pub use treasury::{Ask, Grant, SCRIPT, Treasury, TreasuryError};

use crate::bucket::{Room, Wait};
use crate::clock::Moment;
use crate::quota::{Cost, Fraction, Quota, Rate};
use crate::sync::{AtomicU64, Ordering};

const MICRO: u64 = 1_000_000;
const NANOS: u128 = 1_000_000_000;
/// Asking more often costs Redis more than the smoother supply is worth.
const PACE_MIN: Duration = Duration::from_millis(2);
/// A node without demand, or without an answer, asks this many times less often. It still asks,
/// because the treasury takes a node that is silent for long for gone.
const IDLE_PACES: u32 = 5;
/// An ask that nobody answered or declared failed, because its task ended, is lost after this.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// Where a cluster limit gets its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// From a treasury; while it is away, from 0.8 of this node's last known share.
    Treasury,
    /// There is none: each of the expected nodes has an equal part of rate and burst.
    Alone,
}

/// What a lease has to know about its fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseSettings {
    /// This process among all that share the bucket: random at start, because two that share a
    /// number share one node's part.
    pub node: u64,
    /// Nodes expected in the fleet.
    pub nodes: NonZeroU32,
    /// How much of its own demand a node asks for at a time.
    pub interval: Duration,
    pub backing: Backing,
}

impl LeaseSettings {
    /// Settings with the default interval of 20 ms.
    pub fn new(node: u64, nodes: NonZeroU32, backing: Backing) -> LeaseSettings {
        LeaseSettings { node, nodes, interval: Duration::from_millis(20), backing }
    }

    /// The smallest burst in which every node can hold a token while the bucket holds as many.
    fn burst_min(&self) -> u64 {
        let halves = match self.backing {
            Backing::Treasury => 2,
            Backing::Alone => 1,
        };
        halves * u64::from(self.nodes.get())
    }
}

/// Why a lease cannot be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    #[error("a burst of {burst} cannot be shared by {nodes} nodes: it takes at least {least}")]
    BurstTooSmall { burst: u32, nodes: u32, least: u64 },
    #[error("a rate of {rate} cannot be shared by {nodes} nodes: less than one token in eleven days is left for each")]
    RateTooSlow { rate: Rate, nodes: u32 },
}

/// A node's prepaid part of a cluster limit; shared by threads, spent with a few atomics.
#[derive(Debug)]
pub struct Lease {
    balance_micros: AtomicU64,
    cap_micros: AtomicU64,
    /// Local time adds to the balance from here on, in nanoseconds.
    refill_from: AtomicU64,
    /// Millionths of a token per second: the local rate, and the rate at which grants may be expected.
    local_micros: AtomicU64,
    expected_micros: AtomicU64,
    borrowed_micros: AtomicU64,
    /// All tokens ever asked for by clients, admitted or not, and the largest single cost lately.
    demanded: AtomicU64,
    peak: AtomicU64,
    desk: Mutex<Desk>,
}

/// What only the asking loop touches, some fifty times a second.
#[derive(Debug)]
struct Desk {
    quota: Quota,
    settings: LeaseSettings,
    fleet: u32,
    pending: Option<Pending>,
    asked_at: Option<Moment>,
    failing: bool,
    left: bool,
    counted: u64,
    counted_at: Moment,
    demand_millis: u64,
    peak: u64,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    since: Moment,
    borrowed_micros: u64,
}

impl Lease {
    /// A lease that starts empty and on 0.8 of an equal share, until the treasury answers; alone,
    /// one that starts with its whole part of the burst.
    pub fn new(quota: Quota, settings: LeaseSettings, now: Moment) -> Result<Lease, LeaseError> {
        Lease::check(quota, settings)?;
        let desk = Desk {
            quota,
            settings,
            fleet: settings.nodes.get(),
            pending: None,
            asked_at: None,
            failing: false,
            left: false,
            counted: 0,
            counted_at: now,
            demand_millis: 0,
            peak: 0,
        };
        let lease = Lease {
            balance_micros: AtomicU64::new(0),
            cap_micros: AtomicU64::new(0),
            refill_from: AtomicU64::new(now.nanos()),
            local_micros: AtomicU64::new(0),
            expected_micros: AtomicU64::new(0),
            borrowed_micros: AtomicU64::new(0),
            demanded: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            desk: Mutex::new(desk),
        };
        lease.publish(&lease.desk(), None);
        if settings.backing == Backing::Alone {
            lease.balance_micros.store(lease.cap_micros.load(Ordering::Relaxed), Ordering::Release);
        }
        Ok(lease)
    }

    /// Whether a lease can be built, or retuned, to this.
    pub(crate) fn check(quota: Quota, settings: LeaseSettings) -> Result<(), LeaseError> {
        let (burst, nodes, least) = (quota.burst().get(), settings.nodes.get(), settings.burst_min());
        if u64::from(burst) < least {
            return Err(LeaseError::BurstTooSmall { burst, nodes, least });
        }
        if quota.rate().micros_per_second() < u64::from(nodes) {
            return Err(LeaseError::RateTooSlow { rate: quota.rate(), nodes });
        }
        Ok(())
    }

    /// Takes a new quota after a reload and keeps what is held, cut to the new cap.
    pub(crate) fn retune(&self, quota: Quota, settings: LeaseSettings, now: Moment) {
        let mut desk = self.desk();
        if (desk.quota, desk.settings) == (quota, settings) {
            return;
        }
        // What passed until now, passed at the old rate.
        self.accrue(now);
        (desk.quota, desk.settings) = (quota, settings);
        // A treasury knows better how many there are, and says so with its next grant.
        desk.fleet = match settings.backing {
            Backing::Treasury => desk.fleet.max(settings.nodes.get()),
            Backing::Alone => settings.nodes.get(),
        };
        self.publish(&desk, None);
        let cap = self.cap_micros.load(Ordering::Relaxed);
        self.balance_micros.fetch_min(cap, Ordering::AcqRel);
    }

    /// Whether it can be retuned to these settings: where the tokens come from cannot change.
    pub(crate) fn belongs_to(&self, settings: LeaseSettings) -> bool {
        let own = self.desk().settings;
        (own.node, own.backing) == (settings.node, settings.backing)
    }

    /// The largest cost one node can ever admit, for a fleet of the expected size, to a class that leaves `reserve`.
    pub(crate) fn cost_max(quota: Quota, settings: LeaseSettings, reserve: Fraction) -> u32 {
        let cap = cap_tokens(quota, settings.backing, settings.nodes.get());
        // At most the half of a cap, which is at least one token.
        cap - reserve.micros_of(cap.into()).div_ceil(2 * MICRO) as u32
    }

    /// What [`Lease::commit`] would answer; spends nothing and counts no demand.
    pub fn peek(&self, cost: Cost, reserve: Fraction, now: Moment) -> Result<Room, Wait> {
        self.accrue(now);
        let (price, floor) = (micros(cost), self.floor(cost, reserve));
        let balance = self.balance_micros.load(Ordering::Acquire);
        if balance < price + floor {
            return Err(self.wait(price, floor, balance, now));
        }
        Ok(self.room(balance - price, floor, now))
    }

    /// Spends `cost` if `reserve`, a fraction of half of what the node may hold, is left after it; or spends nothing and
    /// estimates when a grant may cover both. Counts demand.
    pub fn commit(&self, cost: Cost, reserve: Fraction, now: Moment) -> Result<Room, Wait> {
        self.accrue(now);
        let (price, floor) = (micros(cost), self.floor(cost, reserve));
        self.count(cost, floor);
        let spent = |balance: u64| (balance >= price + floor).then(|| balance - price);
        self.balance_micros
            .try_update(Ordering::AcqRel, Ordering::Acquire, spent)
            .map(|before| self.room(before - price, floor, now))
            .map_err(|balance| self.wait(price, floor, balance, now))
    }

    /// Takes `cost`, or what there is of it, for something already answered; counts demand.
    pub fn charge(&self, cost: Cost, now: Moment) {
        self.accrue(now);
        self.count(cost, 0);
        let price = micros(cost);
        self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, |balance| balance.saturating_sub(price));
    }

    /// Whole tokens that a class with this reserve leaves to others.
    pub(crate) fn reserve(&self, reserve: Fraction) -> u64 {
        self.floor(Cost::ONE, reserve).div_ceil(MICRO)
    }

    /// What has to be left of the balance by a request of this cost. The reserve is a fraction of half the cap, which is
    /// what a node asks to hold whatever its demand ([`Lease::target`]), so it is filled once, by what ordinary traffic
    /// may not take, and from then on every grant is spent. Cost and reserve together are less than the cap by a token:
    /// a node that holds a fraction of one is granted no more.
    fn floor(&self, cost: Cost, reserve: Fraction) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        (reserve.micros_of(cap / MICRO) / 2).min(cap.saturating_sub(micros(cost) + MICRO))
    }

    /// Gives back a charge that was committed a moment ago.
    pub fn refund(&self, cost: Cost) {
        self.add(micros(cost));
    }

    /// Counts a request that was denied on a peek here and nowhere narrower: it is demand too.
    pub fn turned_away(&self, cost: Cost, reserve: Fraction) {
        self.count(cost, self.floor(cost, reserve));
    }

    /// What to ask of the treasury now, if anything. Call it every few milliseconds; every ask has
    /// to be followed by [`Lease::deposit`] or [`Lease::failed`] before there is another.
    pub fn ask(&self, now: Moment) -> Option<Ask> {
        let mut desk = self.desk();
        if desk.settings.backing == Backing::Alone || desk.left {
            return None;
        }
        if let Some(pending) = desk.pending {
            if now.since(pending.since) < LOST_AFTER {
                return None;
            }
            self.give_up(&mut desk, now);
        }
        let demanded = self.demanded.load(Ordering::Relaxed);
        let pace = self.pace(&desk);
        let idle = demanded == desk.counted || desk.failing;
        let due = if idle { pace * IDLE_PACES } else { pace };
        if desk.asked_at.is_some_and(|asked| now.since(asked) < due) {
            return None;
        }
        self.measure_demand(&mut desk, demanded, now);
        self.accrue(now);
        let target = self.target(&desk, pace);
        let cap = self.cap_micros.load(Ordering::Relaxed);
        // A slack, so that tokens do not go to and fro with every breath of the demand.
        // While asks fail nothing is returned: it would be lost with them.
        let slack = if desk.failing { u64::MAX } else { cap / 4 };
        let returned = self.withdraw_above(target, slack);
        Some(self.compose(&mut desk, now, target, returned))
    }

    /// The last ask of a node that shuts down and has nothing left to decide: it gives everything back,
    /// so that its part of the rate is free at once and not after half a minute. The answer is ignored.
    pub fn leave(&self, now: Moment) -> Option<Ask> {
        let mut desk = self.desk();
        if desk.settings.backing == Backing::Alone || desk.left {
            return None;
        }
        self.accrue(now);
        self.local_micros.store(0, Ordering::Release);
        let returned = self.withdraw_above(0, 0);
        let ask = Ask { leaving: true, ..self.compose(&mut desk, now, 0, returned) };
        (desk.left, desk.pending) = (true, None);
        Some(ask)
    }

    /// Takes the answer to the pending ask; one that comes when none is pending is dropped.
    pub fn deposit(&self, grant: Grant, now: Moment) {
        let mut desk = self.desk();
        if desk.pending.take().is_none() {
            return;
        }
        desk.failing = false;
        // The clock of the local rate stops only after what it has brought so far is counted.
        self.accrue(now);
        desk.fleet = grant.nodes_seen.unwrap_or(0).max(desk.settings.nodes.get());
        self.publish(&desk, grant.share_micros);
        self.add(grant.tokens.saturating_mul(MICRO));
        self.refill_from.store((now + grant.valid_for).nanos(), Ordering::Release);
    }

    /// The pending ask got no answer: the node goes on at 0.8 of its last known share.
    pub fn failed(&self, now: Moment) {
        self.give_up(&mut self.desk(), now);
    }

    /// Whether the node lives on its own rate, because the treasury is away or there is none.
    pub fn is_local(&self, now: Moment) -> bool {
        self.refill_from.load(Ordering::Acquire) <= now.nanos()
    }

    /// What is lost with the answer is lost: the treasury may have granted, or taken back, already.
    fn give_up(&self, desk: &mut Desk, now: Moment) {
        if let Some(pending) = desk.pending.take() {
            self.borrowed_micros.fetch_add(pending.borrowed_micros, Ordering::AcqRel);
        }
        desk.failing = true;
        self.refill_from.fetch_min(now.nanos(), Ordering::AcqRel);
    }

    fn compose(&self, desk: &mut Desk, now: Moment, target: u64, returned: u64) -> Ask {
        let balance = self.balance_micros.load(Ordering::Acquire);
        // Beyond a few bursts the treasury's debts are floored anyway, and doubles stay exact.
        let debt_max = 4 * MICRO * u64::from(desk.quota.burst().get());
        let borrowed_micros = self.borrowed_micros.swap(0, Ordering::AcqRel).min(debt_max);
        desk.pending = Some(Pending { since: now, borrowed_micros });
        desk.asked_at = Some(now);
        Ask {
            node: desk.settings.node,
            quota: desk.quota,
            expected: desk.settings.nodes.get(),
            wanted: target.saturating_sub(balance).div_ceil(MICRO),
            returned,
            held: balance.div_ceil(MICRO),
            demand_millis: desk.demand_millis,
            borrowed_micros,
            leaving: false,
        }
    }

    /// Twice the demand of a pace (one is spent while the next is fetched), the largest request,
    /// or half the cap, so that the first request after a pause finds something.
    fn target(&self, desk: &Desk, pace: Duration) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        let demand = u128::from(desk.demand_millis) * 1_000 * pace.as_nanos() * 2 / NANOS;
        let demand = u64::try_from(demand).unwrap_or(u64::MAX);
        demand.max(desk.peak.saturating_mul(MICRO)).max(cap / 2).min(cap)
    }

    /// The interval, or half the time in which the cap lasts at this node's share if that is less:
    /// a small burst has to be fetched more often.
    fn pace(&self, desk: &Desk) -> Duration {
        let cap = u128::from(self.cap_micros.load(Ordering::Relaxed));
        let share = u128::from(self.expected_micros.load(Ordering::Relaxed).max(1));
        let half_life = u64::try_from(cap * NANOS / (2 * share)).unwrap_or(u64::MAX);
        Duration::from_nanos(half_life).max(PACE_MIN).min(desk.settings.interval)
    }

    fn measure_demand(&self, desk: &mut Desk, demanded: u64, now: Moment) {
        let elapsed = now.since(desk.counted_at).max(Duration::from_millis(1));
        let tokens = u128::from(demanded.wrapping_sub(desk.counted));
        let current = u64::try_from(tokens * 1_000 * NANOS / elapsed.as_nanos()).unwrap_or(u64::MAX);
        desk.demand_millis = desk.demand_millis / 2 + current / 2;
        let peak = self.peak.swap(0, Ordering::Relaxed);
        desk.peak = peak.max(desk.peak - desk.peak.div_ceil(8));
        (desk.counted, desk.counted_at) = (demanded, now);
    }

    /// Takes whole tokens above `target` out of the balance, if they exceed it by more than `slack`.
    fn withdraw_above(&self, target: u64, slack: u64) -> u64 {
        let surplus = |balance: u64| match balance.saturating_sub(target) {
            excess if excess > slack => excess / MICRO,
            _ => 0,
        };
        let keep = |balance: u64| balance - surplus(balance) * MICRO;
        surplus(self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, keep))
    }

    /// Adds what local time has brought since `refill_from`, and moves that on by the time it took,
    /// so that no fraction is lost however often this runs. Who moves it, owns the time.
    fn accrue(&self, now: Moment) {
        let from = self.refill_from.load(Ordering::Acquire);
        let rate = u128::from(self.local_micros.load(Ordering::Acquire));
        let elapsed = u128::from(now.nanos().saturating_sub(from));
        let gained = elapsed * rate / NANOS;
        if gained == 0 {
            return;
        }
        // No later than `now`, because `gained` was rounded down.
        let taken = u64::try_from((gained * NANOS).div_ceil(rate)).unwrap_or(u64::MAX);
        let moved = from.saturating_add(taken);
        if self.refill_from.compare_exchange(from, moved, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let added = self.add(u64::try_from(gained).unwrap_or(u64::MAX));
            self.borrowed_micros.fetch_add(added, Ordering::AcqRel);
        }
    }

    /// Adds to the balance up to the cap (which may have shrunk below it), and says how much.
    fn add(&self, gained: u64) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        let raised = |balance: u64| balance.saturating_add(gained).min(cap).max(balance);
        let before = self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, raised);
        raised(before) - before
    }

    /// A node has to ask for as much as lets its largest request pass, with what has to be left after it.
    fn count(&self, cost: Cost, floor: u64) {
        let tokens = u64::from(cost.tokens().get());
        self.demanded.fetch_add(tokens, Ordering::Relaxed);
        let needed = tokens + floor.div_ceil(MICRO);
        if self.peak.load(Ordering::Relaxed) < needed {
            self.peak.fetch_max(needed, Ordering::Relaxed);
        }
    }

    fn room(&self, balance: u64, floor: u64, now: Moment) -> Room {
        let missing = self.cap_micros.load(Ordering::Relaxed).saturating_sub(balance);
        Room { remaining: balance.saturating_sub(floor) / MICRO, reset: self.time_for(missing, now) }
    }

    fn wait(&self, price: u64, floor: u64, balance: u64, now: Moment) -> Wait {
        let after = self.time_for(price + floor - balance, now);
        let Room { remaining, reset } = self.room(balance, floor, now);
        Wait { after, remaining, reset: reset.max(after) }
    }

    fn time_for(&self, micros: u64, now: Moment) -> Duration {
        let rate = if self.is_local(now) { &self.local_micros } else { &self.expected_micros };
        match u128::from(rate.load(Ordering::Relaxed)) {
            // A share of nothing is a newcomer's, and lasts until the treasury next answers.
            0 => LOST_AFTER,
            rate => {
                let nanos = (u128::from(micros) * NANOS).div_ceil(rate);
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
        }
    }

    /// Derives what the hot path reads from the quota, the fleet and, if known, this node's share.
    fn publish(&self, desk: &Desk, share_micros: Option<u64>) {
        let equal = desk.quota.rate().micros_per_second() / u64::from(desk.fleet);
        let share = share_micros.unwrap_or(equal);
        let local = match desk.settings.backing {
            Backing::Alone => share,
            Backing::Treasury => share.saturating_mul(4) / 5,
        };
        let cap = cap_tokens(desk.quota, desk.settings.backing, desk.fleet);
        self.cap_micros.store(u64::from(cap) * MICRO, Ordering::Release);
        // A share follows demand: a node that had none has little, and gets more once it asks for it.
        self.expected_micros.store(share.max(equal), Ordering::Release);
        self.local_micros.store(local, Ordering::Release);
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Nothing under this lock can panic half way; its numbers are valid in any combination.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whole tokens one node of `fleet` may hold: of the half of the burst that is not in the bucket,
/// or of all of it where there is no bucket.
fn cap_tokens(quota: Quota, backing: Backing, fleet: u32) -> u32 {
    let burst = quota.burst().get();
    let afield = match backing {
        Backing::Treasury => burst - burst / 2,
        Backing::Alone => burst,
    };
    (afield / fleet).max(1)
}

fn micros(cost: Cost) -> u64 {
    u64::from(cost.tokens().get()) * MICRO
}
