//! Owns the asking side of a lease: what a node knows about its fleet, when it asks, for how much, and what it
//! makes of the answer.
//!
//! Refuses to be asked by requests: only the loop that carries the messages comes here, some fifty times a second.
//! Invariant: at most one ask is under way; what was withdrawn from the balance to be given back is in that ask.

use std::time::Duration;

use super::{Ask, Backing, Grant, LOST_AFTER, Lease, LeaseSettings, MICRO, NANOS};
use crate::clock::Moment;
use crate::quota::Quota;
use crate::sync::Ordering;

/// Asking more often costs Redis more than the smoother supply is worth: at most 100 times a second.
const PACE_MIN: Duration = Duration::from_millis(10);
/// What each node of a large fleet adds to the pace: all together ask a key no more than 10,000 times a second, as far
/// as the next allows.
const PACE_PER_NODE: Duration = Duration::from_micros(100);
/// Less often than this nobody asks: the treasury takes a node that is silent for 150 ms for one that lives on its own
/// share, and a node without an answer is to hear soon that Redis is back.
const PACE_MAX: Duration = Duration::from_millis(100);
/// A node without demand that holds what its largest request takes, or one without an answer, asks this many times less
/// often.
const IDLE_PACES: u32 = 5;
/// A client that is told to come back when there is enough comes so much later than that; no need is remembered for longer
/// than a minute.
const COMES_BACK: Duration = Duration::from_secs(3);
const REMEMBERED_MAX: Duration = Duration::from_secs(60);
/// No answer makes a node wait longer before it lives on its own share.
const VALID_MAX: Duration = Duration::from_secs(10);

/// What only the asking loop touches, some fifty times a second.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) quota: Quota,
    pub(super) settings: LeaseSettings,
    /// What the treasury last said, where it ever did: nodes it sees, and this node's part of the rate.
    nodes_seen: u32,
    pub(super) told_micros: Option<u64>,
    pending: Option<Pending>,
    asked_at: Option<Moment>,
    began: Moment,
    failing: bool,
    left: bool,
    counted: u64,
    ordinary_counted: u64,
    counted_at: Moment,
    demand_millis: u64,
    ordinary_millis: u64,
    peak: u64,
    peak_at: Moment,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    since: Moment,
    wanted: u64,
}

impl Desk {
    pub(super) fn new(quota: Quota, settings: LeaseSettings, now: Moment) -> Desk {
        Desk {
            quota,
            settings,
            nodes_seen: 0,
            told_micros: None,
            pending: None,
            asked_at: None,
            began: now,
            failing: false,
            left: false,
            counted: 0,
            ordinary_counted: 0,
            counted_at: now,
            demand_millis: 0,
            ordinary_millis: 0,
            peak: 0,
            peak_at: now,
        }
    }

    /// A share follows the rate it is a part of: all shares together stay within it, whichever nodes know.
    pub(super) fn retune(&mut self, quota: Quota, settings: LeaseSettings) {
        let [old, new] = [self.quota, quota].map(|quota| u128::from(quota.rate().micros_per_second()));
        let scaled = |told| u64::try_from(u128::from(told) * new / old.max(1)).unwrap_or(u64::MAX);
        self.told_micros = self.told_micros.map(scaled);
        (self.quota, self.settings) = (quota, settings);
    }

    /// As many nodes as are seen, or expected: the treasury does not see those that cannot reach it.
    pub(super) fn fleet(&self) -> u32 {
        self.nodes_seen.max(self.settings.nodes.get())
    }

    /// An equal part of the rate, in billionths of a token per second: millionths would make 1/h 0.3 % slow.
    pub(super) fn equal_nanos(&self) -> u64 {
        let rate = self.quota.rate();
        let nanos = u128::from(rate.count()) * NANOS / u128::from(rate.seconds()) / u128::from(self.fleet());
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

impl Lease {
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
        let cap = self.cap_micros.load(Ordering::Relaxed);
        let needed = desk.peak.saturating_mul(MICRO).min(cap);
        let lacks = self.balance_micros.load(Ordering::Relaxed) < needed;
        let idle = demanded == desk.counted && !lacks || desk.failing;
        let due = if idle { (pace * IDLE_PACES).min(PACE_MAX) } else { pace };
        if desk.asked_at.is_some_and(|asked| now.since(asked) < due) {
            return None;
        }
        self.measure_demand(&mut desk, demanded, now);
        self.accrue(now);
        let target = self.target(&desk, pace);
        if needed == cap && !self.is_local(now) {
            self.drop_fraction();
        }
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
        self.local_nanos.store(0, Ordering::Release);
        let returned = self.withdraw_above(0, 0);
        let ask = Ask { leaving: true, ..self.compose(&mut desk, now, 0, returned) };
        (desk.left, desk.pending) = (true, None);
        Some(ask)
    }

    /// Takes the answer to the pending ask; one that comes when none is pending is dropped. Whatever it says, no
    /// more is taken than was asked for, and no share above the rate.
    pub fn deposit(&self, grant: Grant, now: Moment) {
        let mut desk = self.desk();
        let Some(pending) = desk.pending.take() else { return };
        desk.failing = false;
        // The clock of the local rate stops only after what it has brought so far is counted.
        self.accrue(now);
        desk.nodes_seen = grant.nodes_seen.unwrap_or(0);
        let rate = desk.quota.rate().micros_per_second();
        desk.told_micros = grant.share_micros.map(|share| share.min(rate)).or(desk.told_micros);
        self.publish(&desk);
        self.add(grant.tokens.min(pending.wanted).saturating_mul(MICRO));
        let valid_for = grant.valid_for.min(VALID_MAX);
        self.refill_from.store((now + valid_for).nanos(), Ordering::Release);
    }

    /// The pending ask got no answer: the node goes on at 0.8 of its last known share.
    pub fn failed(&self, now: Moment) {
        self.give_up(&mut self.desk(), now);
    }

    /// What is lost with the answer is lost: the treasury may have granted, or taken back, already.
    fn give_up(&self, desk: &mut Desk, now: Moment) {
        (desk.pending, desk.failing) = (None, true);
        self.refill_from.fetch_min(now.nanos(), Ordering::AcqRel);
    }

    fn compose(&self, desk: &mut Desk, now: Moment, target: u64, returned: u64) -> Ask {
        let balance = self.balance_micros.load(Ordering::Acquire);
        let wanted = target.saturating_sub(balance).div_ceil(MICRO);
        desk.pending = Some(Pending { since: now, wanted });
        desk.asked_at = Some(now);
        let uptime = now.since(desk.began).as_micros();
        Ask {
            node: desk.settings.node,
            quota: desk.quota,
            expected: desk.settings.nodes.get(),
            wanted,
            returned,
            held: balance.div_ceil(MICRO),
            demand_millis: desk.demand_millis,
            ordinary_millis: desk.ordinary_millis,
            borrowed: self.borrowed_micros.load(Ordering::Acquire).div_ceil(MICRO),
            share_micros: desk.told_micros.unwrap_or_else(|| desk.equal_nanos() / 1_000),
            uptime_micros: u64::try_from(uptime).unwrap_or(u64::MAX),
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

    /// The interval, longer in a large fleet; or half the time in which the cap lasts at this node's share if that is
    /// less: a small burst has to be fetched more often.
    fn pace(&self, desk: &Desk) -> Duration {
        let cap = u128::from(self.cap_micros.load(Ordering::Relaxed));
        let share = u128::from(self.expected_nanos.load(Ordering::Relaxed).max(1));
        let half_life = u64::try_from(cap * 1_000 * NANOS / (2 * share)).unwrap_or(u64::MAX);
        let interval = desk.settings.interval.max(PACE_PER_NODE * desk.fleet());
        Duration::from_nanos(half_life).min(interval).clamp(PACE_MIN, PACE_MAX)
    }

    fn measure_demand(&self, desk: &mut Desk, demanded: u64, now: Moment) {
        let elapsed = now.since(desk.counted_at).max(Duration::from_millis(1));
        let ordinary = self.ordinary.load(Ordering::Relaxed);
        let smoothed = |before: u64, tokens: u64| {
            let current = u128::from(tokens) * 1_000 * NANOS / elapsed.as_nanos();
            before / 2 + u64::try_from(current).unwrap_or(u64::MAX) / 2
        };
        desk.demand_millis = smoothed(desk.demand_millis, demanded.wrapping_sub(desk.counted));
        desk.ordinary_millis = smoothed(desk.ordinary_millis, ordinary.wrapping_sub(desk.ordinary_counted));
        desk.ordinary_counted = ordinary;
        let peak = self.peak.swap(0, Ordering::Relaxed);
        let remembered = COMES_BACK + self.time_for(self.cap_micros.load(Ordering::Relaxed), now);
        if peak >= desk.peak {
            (desk.peak, desk.peak_at) = (peak, now);
        } else if now.since(desk.peak_at) > remembered.min(REMEMBERED_MAX) {
            desk.peak = peak.max(desk.peak - desk.peak.div_ceil(8));
        }
        (desk.counted, desk.counted_at) = (demanded, now);
    }

    /// Local time leaves a fraction of a token, and grants are whole: beside it the last token has no room below the cap,
    /// and a request that needs them all would wait for ever. It is less than a token for each time on local time.
    fn drop_fraction(&self) {
        self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, |balance| balance - balance % MICRO);
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
}
