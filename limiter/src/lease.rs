//! Owns one node's part of a cluster limit: prepaid tokens, spent here without a round trip.
//!
//! Refuses I/O: it says what to ask ([`Lease::ask`]) and is told the answer ([`Lease::deposit`],
//! [`Lease::failed`]); someone else carries the message. Invariant: over any time t, all nodes
//! together admit at most R * t + B, for rate R and burst B, whatever the load. It rests on three
//! counts: the treasury's bucket holds at most B/2; what nodes hold unspent is at most the other
//! half, however many they are; and what enters either is at most R, because a node that refills
//! itself in an outage uses 0.8 of a share, and while it is silent the treasury gives that share to
//! nobody.
//!
//! What exceeds it, for want of knowledge:
//! - A failover to a copy of the bucket grants again what the copy has not heard of, at most B/2. A
//!   node that cannot reach the copy lives on a share that the copy may not have heard of either.
//! - A jump of Redis's clock forward is worth up to 20 ms of the rate.
//! - Nodes that outnumber B/2 keep one token each in an outage.
//! - A node refills itself from a share that is given away, and may spend what it held, if it never
//!   reached the bucket that the others reach; if they outlive it by 30 s of silence; or by 0.4 s where
//!   another took its place: one came since it last asked, and with that one as many ask as there were
//!   before, and as many as are expected. Then it is dead, unless more nodes live than are expected. A
//!   share kept for a process that was killed would be lost for half a minute.
//! - A node that starts lives on an equal share until it is answered, in an outage or because messages are
//!   lost, whatever the others were told before.
//!
//! # The node
//! `balance` is all a node may spend, in millionths of tokens, never above `cap`. A grant adds to
//! it; from `refill_from` on, which a grant puts one validity into the future and a failure to
//! `now`, local time adds to it too. So there is no switch between two limiters to race with:
//! a lease that is not renewed expires into the local rate by itself. Of an answer no more is taken
//! than was asked for.
//!
//! # The script
//! One Redis hash per rule, read and written by [`SCRIPT`] in one atomic run. Time is Redis `TIME`
//! in microseconds. Numbers are doubles that hold integers; every product or quotient is floored.
//! An ask reads and writes two fields, however many nodes there are. Every 50 ms one of them looks at
//! every record besides.
//!
//! Field `bucket`, fourteen big-endian doubles: `at` (Redis time of the last ask); `clock` (the bucket's
//! own time, 0 when it was new); `swept` (its time at the last sweep); `level` (micro-tokens); `rest` (the
//! remainder of the last refill, below `period`); over all records `nodes`, `weights`, `ordinary`,
//! `shares`, and `out` (whole tokens held); `claims` (micro-tokens in the level that records have earned
//! since they were written); `quiet` (the shares of silent records); `most` (nodes that lived at once,
//! since none was silent); `joined` (`clock` when last a node without a record came, 0 while the bucket was
//! younger than 200 ms: then all come). And per node `n<id>`, eight: `asked` (`clock` at its last ask);
//! `weight`, its demand in milli-tokens a second; `ordinary`, how much of that has to leave a reserve to
//! others; `share`, its part of the rate in micro-tokens a second; `credit`, micro-tokens it may still
//! claim; `held`, whole tokens; `borrowed` and `uptime` as it told them. A record whose `weight` is 0 is
//! **replaced**: it is in none of the sums, and only its account waits for a node that was not dead after
//! all. The hash expires one minute after the last sweep.
//!
//! Arguments: node, count, period, burst, expected, wanted, returned, held, demand, borrowed, told,
//! uptime, leaving, ordinary: see [`Ask`], where `told` is `share_micros`; the rate is `count` tokens per
//! `period` seconds, which is `count / period` micro-tokens per microsecond. Reply: tokens, validity
//! in ms, nodes, share in micro-tokens/s.
//!
//! 1. `pool = max(1, floor(burst / 2))`, `afield = max(1, burst - pool)`: what the bucket and what
//!    the nodes may hold. A new bucket is **empty**, all its numbers are 0, `at` is now.
//! 2. *Time passes.* `step = now - at`, from 0 to 1 s; where the caller has a record, `clock` advances
//!    no further than 20 ms beyond `asked` plus what the caller's own clock counted since. So a clock
//!    that jumps adds nothing, and an outage, in which nobody asks, passes as one second at most.
//!    `parts = step * count + rest`; `gained = floor(parts / period)`; `rest = parts - gained * period`;
//!    `level += gained` less what `quiet` earned in the step; `claims` grows by what the other shares
//!    earned.
//! 3. *Sweep*, if 50 ms passed since the last. A record is **quiet** if it did not ask for 150 ms before a
//!    sweep: what it earns from then on is its own business, because it lives on 0.8 of it. Of what entered
//!    the level on its account since it last asked, `keep` is left, and what exceeds that is taken out
//!    again, once, but not so that less is left than is claimed. `keep` is the time in which the rate fills
//!    an eighth of the pool, at most 50 ms: an outage ends without a burst, and the silent never claim more
//!    than an eighth. `together` are the nodes that are not quiet and asked since `joined`, by more than
//!    the 20 ms that an ask of the dead may be under way: all of them lived at that moment. Where they are
//!    at least `expected` and `most`, a quiet record that did not ask since `joined`, nor for 400 ms, is
//!    replaced: `weight`, `ordinary`, `share` and `held` become 0, and what was kept free for it counts as
//!    reported in `borrowed`. Records are deleted after 30 s, as is what has another length. `most` becomes
//!    `together`, or stays where that is less while any is quiet, or while not all had the time to ask
//!    since `joined`, 150 ms. The sums are taken anew: `claims` of `share * (clock - asked)`, of `share *
//!    keep` where quiet.
//! 4. *The caller's account.* Without a record, it joins. With one, it leaves the sums. It has earned
//!    `share * (clock - asked)`, or `share * keep` where quiet. `charge = borrowed` less what was reported
//!    before; where quiet, less what was kept free for it, `share` times what its own clock counted beyond
//!    `keep`. `credit += earned + returned - charge`. Without a record it is charged what it ever borrowed,
//!    at most what its share earned since there is a bucket, or since it is up: a bucket that comes back
//!    empty knows of no outage, and asks no one to pay for it. `level = min(pool, level + returned) -
//!    charge`, no lower than `-pool`.
//! 5. *Its share.* `fleet = max(nodes, expected)`, the caller among them; `cap = max(1,
//!    floor(afield / fleet))`; `weight = max(demand, floor(count * 1000 / period / (32 * fleet)),
//!    1)`; `rate = floor(count * 10^6 / period)`, `free = rate - shares`. Demand that has to leave
//!    no reserve comes **first**: as little more of it counts than of the ordinary, 1 to 1000
//!    times, as gives it 1.25 of what it asks for. `left = rate - 1250 * (weights - ordinary)`; in
//!    thousandths, `first = floor(1250000 * ordinary / left)` between 1000 and 1000000, the most
//!    where nothing is left, the least where nothing is ordinary. Of anybody, `weighed = first *
//!    (weight - ordinary) + 1000 * ordinary`. `share = floor(rate * weighed / weighed of all)`, at
//!    most `free` less, while the bucket is younger than 30 s, an equal part for each node that is
//!    expected and was not seen; or `told` while it is younger than 200 ms and has not heard of
//!    all, at most `free`. So the shares that nodes were last told never sum to more than the rate,
//!    even while one of them cannot hear that the others' demand has grown. The record keeps the
//!    larger of it and `told`, at most `free`, because this answer may be lost.
//! 6. *Its grant.* `credit` is held within `-cap` and `cap`. `available = min(level - claims, max(credit,
//!    level - pool / 2))`: grants follow demand by elapsed time, a surplus that nobody claims is anyone's,
//!    and what the others earn, silent ones too, is kept for them. `tokens = floor(min(wanted,
//!    available))`, at most `cap - held` and `afield - out - held`, at least 0. `level -= tokens`;
//!    `credit = max(credit - tokens, min(credit, 0))`.
//! 7. The record is written with `held + tokens`, or deleted if leaving.

mod bank;
mod desk;
#[cfg(test)]
mod tests;
mod treasury;

use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use bank::Bank;
use desk::Desk;
pub use treasury::{Ask, Grant, SCRIPT, Treasury, TreasuryError};

use crate::bucket::{Room, Wait};
use crate::clock::Moment;
use crate::quota::{Cost, Fraction, Quota, Rate};
use crate::sync::{AtomicU64, Ordering};

const MICRO: u64 = 1_000_000;
const NANOS: u128 = 1_000_000_000;
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
    /// Billionths of a token per second: the local rate, and the rate at which grants may be expected.
    local_nanos: AtomicU64,
    expected_nanos: AtomicU64,
    /// All that local time ever added.
    borrowed_micros: AtomicU64,
    /// All tokens ever asked for by clients, admitted or not, and the largest single cost lately.
    demanded: AtomicU64,
    /// Of these, what has to leave a reserve.
    ordinary: AtomicU64,
    peak: AtomicU64,
    desk: Mutex<Desk>,
}

impl Lease {
    /// A lease that starts empty and on 0.8 of an equal share, until the treasury answers; alone,
    /// one that starts with its whole part of the burst.
    pub fn new(quota: Quota, settings: LeaseSettings, now: Moment) -> Result<Lease, LeaseError> {
        Lease::check(quota, settings)?;
        let lease = Lease {
            balance_micros: AtomicU64::new(0),
            cap_micros: AtomicU64::new(0),
            refill_from: AtomicU64::new(now.nanos()),
            local_nanos: AtomicU64::new(0),
            expected_nanos: AtomicU64::new(0),
            borrowed_micros: AtomicU64::new(0),
            demanded: AtomicU64::new(0),
            ordinary: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            desk: Mutex::new(Desk::new(quota, settings, now)),
        };
        lease.publish(&lease.desk());
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
        desk.retune(quota, settings);
        self.publish(&desk);
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

    /// What there is to spend now for a class with this reserve, a token at a time.
    pub(crate) fn standing(&self, reserve: Fraction, now: Moment) -> Room {
        self.accrue(now);
        let balance = self.balance_micros.load(Ordering::Acquire);
        self.room(balance, self.floor(Cost::ONE, reserve), now)
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
    pub fn charge(&self, cost: Cost, reserve: Fraction, now: Moment) {
        self.accrue(now);
        self.count(cost, self.floor(cost, reserve));
        let price = micros(cost);
        self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, |balance| balance.saturating_sub(price));
    }

    /// Whole tokens that a class with this reserve leaves to others.
    pub(crate) fn reserve(&self, reserve: Fraction) -> u64 {
        self.floor(Cost::ONE, reserve).div_ceil(MICRO)
    }

    /// What has to be left of the balance by a request of this cost. The reserve is a fraction of half the cap, which is
    /// what a node asks to hold whatever its demand ([`Lease::target`]), so it is filled once, by what ordinary traffic
    /// may not take, and from then on every grant is spent. Cost and reserve together are at most the cap.
    fn floor(&self, cost: Cost, reserve: Fraction) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        (reserve.micros_of(cap / MICRO) / 2).min(cap.saturating_sub(micros(cost)))
    }

    /// Gives back a charge that was committed a moment ago.
    pub fn refund(&self, cost: Cost) {
        self.add(micros(cost));
    }

    /// Counts a request that was denied on a peek here and nowhere narrower: it is demand too.
    pub fn turned_away(&self, cost: Cost, reserve: Fraction) {
        self.count(cost, self.floor(cost, reserve));
    }

    /// Whether the node lives on its own rate, because the treasury is away or there is none.
    pub fn is_local(&self, now: Moment) -> bool {
        self.refill_from.load(Ordering::Acquire) <= now.nanos()
    }

    /// Adds what local time has brought since `refill_from`, and moves that on by the time it took,
    /// so that no fraction is lost however often this runs. Who moves it, owns the time.
    fn accrue(&self, now: Moment) {
        let from = self.refill_from.load(Ordering::Acquire);
        let rate = u128::from(self.local_nanos.load(Ordering::Acquire));
        let elapsed = u128::from(now.nanos().saturating_sub(from));
        let gained = elapsed * rate / (1_000 * NANOS);
        if gained == 0 {
            return;
        }
        // No later than `now`, because `gained` was rounded down.
        let taken = u64::try_from((gained * 1_000 * NANOS).div_ceil(rate)).unwrap_or(u64::MAX);
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
        if floor > 0 {
            self.ordinary.fetch_add(tokens, Ordering::Relaxed);
        }
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
        let rate = if self.is_local(now) { &self.local_nanos } else { &self.expected_nanos };
        match u128::from(rate.load(Ordering::Relaxed)) {
            // A share of nothing is a newcomer's, and lasts until the treasury next answers.
            0 => LOST_AFTER,
            rate => {
                let nanos = (u128::from(micros) * 1_000 * NANOS).div_ceil(rate);
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
        }
    }

    /// Derives what the hot path reads from the quota, the fleet and, if known, this node's share.
    fn publish(&self, desk: &Desk) {
        let equal = desk.equal_nanos();
        let share = desk.told_micros.map_or(equal, |told| told.saturating_mul(1_000));
        let local = match desk.settings.backing {
            Backing::Alone => share,
            Backing::Treasury => share / 5 * 4,
        };
        let cap = cap_tokens(desk.quota, desk.settings.backing, desk.fleet());
        self.cap_micros.store(u64::from(cap) * MICRO, Ordering::Release);
        // A share follows demand: a node that had none has little, and gets more once it asks for it.
        self.expected_nanos.store(share.max(equal), Ordering::Release);
        self.local_nanos.store(local, Ordering::Release);
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
