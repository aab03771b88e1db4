//! Owns the reference of `lease.lua`: the same bucket in memory, line for line, with time passed in.
//!
//! Refuses cleverness of its own: where the two differ, one of them is wrong. It serves tests, here and in the
//! crate that talks to Redis, and a tour without Redis. Invariant: tokens granted over any time t never exceed
//! rate * t plus half the burst.

use std::collections::BTreeMap;
use std::time::Duration;

use super::treasury::{Ask, Grant};

const MICRO: f64 = 1_000_000.0;
/// The bucket's time passes by no more than this from one ask to the next.
const STEP: f64 = 1_000_000.0;
/// What an ask may be later under way than the one before.
const SLACK: f64 = 20_000.0;
/// How often the silent are told from the others: it costs a look at every record.
const SWEEP: f64 = 50_000.0;
/// The shares by which nodes lived before hold for the first moments of a bucket, until all have asked.
const YOUNG: f64 = 200_000.0;
/// What a silent node claims of the level, at most: the more, the larger the burst in which an outage ends.
const KEEP: f64 = 50_000.0;
/// Longer than an idle node's pace; a node that is silent for longer lives on its own rate.
const QUIET: f64 = 150_000.0;
/// A silent node in whose place another came is replaced after this, four paces of an idle one; any other is gone
/// after [`FORGET`].
const REPLACED: f64 = 400_000.0;
const FORGET: f64 = 30_000_000.0;
const VALID_FOR: Duration = Duration::from_secs(1);
/// A node without demand counts as wanting this part of an equal share, so that it has something to live on in
/// an outage.
const IDLE_PARTS: f64 = 32.0;
/// What the first, who leave no reserve, are given for their demand, in thousandths: demand is rough, and a share that
/// is just as large would be used up every other moment.
const FIRST_OF_DEMAND: f64 = 1_250.0;
/// How much more than an ordinary token the demand for a first one weighs, in thousandths.
const FIRST_MIN: f64 = 1_000.0;
const FIRST_MAX: f64 = 1_000_000.0;

/// A treasury in memory. Numbers are doubles, as Lua's are: every result is floored.
#[derive(Clone, Debug, Default)]
pub struct Bank {
    bucket: Option<Bucket>,
    records: BTreeMap<u64, Record>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    at: f64,
    clock: f64,
    swept: f64,
    level: f64,
    rest: f64,
    sums: Sums,
    claims: f64,
    quiet: f64,
    most: f64,
    joined: f64,
}

/// Of all records.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    nodes: f64,
    weights: f64,
    ordinary: f64,
    shares: f64,
    out: f64,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    asked: f64,
    weight: f64,
    ordinary: f64,
    share: f64,
    credit: f64,
    held: f64,
    borrowed: f64,
    uptime: f64,
}

impl Record {
    /// Only the account of one that is replaced is kept: it is in no sum.
    fn is_replaced(&self) -> bool {
        self.weight == 0.0
    }
}

/// What follows from the quota.
struct Terms {
    count: f64,
    period: f64,
    rate: f64,
    afield: f64,
    capacity: f64,
    keep: f64,
    expected: f64,
}

impl Terms {
    fn of(ask: &Ask) -> Terms {
        let rate = ask.quota.rate();
        let (count, period) = (rate.count() as f64, rate.seconds() as f64);
        let burst = f64::from(ask.quota.burst().get());
        let pool = (burst / 2.0).floor().max(1.0);
        let afield = (burst - pool).max(1.0);
        let capacity = pool * MICRO;
        let rate = (count * MICRO / period).floor();
        let keep = KEEP.min((capacity * period / (8.0 * count)).floor());
        Terms { count, period, rate, afield, capacity, keep, expected: f64::from(ask.expected) }
    }
}

/// Such that the first have what they ask for and a quarter more, if there is so much, and never less than their part of
/// the whole demand; in thousandths.
fn first_weight(rate: f64, first: f64, ordinary: f64) -> f64 {
    let left = rate - FIRST_OF_DEMAND * first;
    if ordinary == 0.0 {
        FIRST_MIN
    } else if left <= 0.0 {
        FIRST_MAX
    } else {
        (1_000.0 * FIRST_OF_DEMAND * ordinary / left).floor().clamp(FIRST_MIN, FIRST_MAX)
    }
}

fn part(of: f64, micros: f64) -> f64 {
    (of * micros / MICRO).floor()
}

impl Sums {
    fn add(&mut self, record: &Record) {
        self.nodes += 1.0;
        self.weights += record.weight;
        self.ordinary += record.ordinary;
        self.shares += record.share;
        self.out += record.held;
    }

    fn remove(&mut self, record: &Record) {
        self.nodes -= 1.0;
        self.weights -= record.weight;
        self.ordinary -= record.ordinary;
        self.shares -= record.share;
        self.out -= record.held;
    }
}

impl Bank {
    /// Answers one ask at `redis_now_micros`, the time of the treasury's own clock.
    pub fn withdraw(&mut self, ask: &Ask, redis_now_micros: u64) -> Grant {
        let (now, terms) = (redis_now_micros as f64, Terms::of(ask));
        let mut bucket = self.bucket.unwrap_or(Bucket { at: now, ..Bucket::default() });
        bucket.pass(&terms, ask, self.records.get(&ask.node), now);
        if bucket.clock - bucket.swept >= SWEEP {
            bucket.sweep(&terms, &mut self.records);
        }
        let mine = self.records.remove(&ask.node);
        if mine.is_none() && bucket.clock >= YOUNG && !ask.leaving {
            bucket.joined = bucket.clock;
        }
        let credit = bucket.settle(&terms, ask, mine);
        let (record, grant) = bucket.grant(&terms, ask, credit);
        if !ask.leaving {
            bucket.sums.add(&record);
            self.records.insert(ask.node, record);
        }
        self.bucket = Some(bucket);
        grant
    }
}

impl Bucket {
    /// Time passes.
    fn pass(&mut self, terms: &Terms, ask: &Ask, mine: Option<&Record>, now: f64) {
        let mut step = (now - self.at).clamp(0.0, STEP);
        if let Some(mine) = mine {
            step = step.min((mine.asked + ask.uptime_micros as f64 - mine.uptime + SLACK - self.clock).max(0.0));
        }
        self.at = now;
        self.clock += step;
        let parts = step * terms.count + self.rest;
        let gained = (parts / terms.period).floor();
        self.rest = parts - gained * terms.period;
        self.level += (gained - part(self.quiet, step)).max(0.0);
        self.claims += part(self.sums.shares - self.quiet, step);
    }

    /// The silent are told from the others, and the replaced from the silent.
    fn sweep(&mut self, terms: &Terms, records: &mut BTreeMap<u64, Record>) {
        let (before, clock, joined) = (self.swept, self.clock, self.joined);
        (self.swept, self.sums, self.claims, self.quiet) = (clock, Sums::default(), 0.0, 0.0);
        let mut together = 0.0;
        for record in records.values().filter(|record| clock - record.asked <= QUIET) {
            self.sums.add(record);
            self.claims += part(record.share, clock - record.asked);
            together += if record.asked > joined + SLACK { 1.0 } else { 0.0 };
        }
        let (is_whole, mut excess) = (together >= terms.expected.max(self.most), 0.0);
        let mut most = if clock - joined <= QUIET { self.most.max(together) } else { together };
        records.retain(|_, record| clock - record.asked <= FORGET);
        for record in records.values_mut().filter(|record| clock - record.asked > QUIET && !record.is_replaced()) {
            let kept_free = part(record.share, clock - record.asked - terms.keep);
            excess += if before - record.asked <= QUIET { kept_free } else { 0.0 };
            if is_whole && record.asked < joined && clock - record.asked > REPLACED {
                record.borrowed += (kept_free / MICRO).floor();
                (record.weight, record.ordinary, record.share, record.held) = (0.0, 0.0, 0.0, 0.0);
            } else {
                self.sums.add(record);
                self.claims += part(record.share, terms.keep);
                self.quiet += record.share;
                most = most.max(self.most);
            }
        }
        self.most = most;
        self.level = (self.level - excess).max(self.level.min(self.claims));
    }

    /// The caller's account: what is charged to the bucket, and the caller's credit.
    fn settle(&mut self, terms: &Terms, ask: &Ask, mine: Option<Record>) -> f64 {
        let (uptime, returned) = (ask.uptime_micros as f64, ask.returned as f64 * MICRO);
        let unknown = part(ask.share_micros as f64, uptime.min(self.clock));
        let (mut charge, mut credit) = ((ask.borrowed as f64 * MICRO).min(unknown), 0.0);
        if let Some(mine) = mine {
            let is_quiet = self.swept - mine.asked > QUIET;
            let earned = part(mine.share, if is_quiet { terms.keep } else { self.clock - mine.asked });
            let covered = if is_quiet { part(mine.share, (uptime - mine.uptime - terms.keep).max(0.0)) } else { 0.0 };
            charge = ((ask.borrowed as f64 - mine.borrowed).max(0.0) * MICRO - covered).max(0.0);
            credit = mine.credit + earned + returned - charge;
            if !mine.is_replaced() {
                self.sums.remove(&mine);
            }
            self.claims = (self.claims - earned).max(0.0);
            self.quiet -= if is_quiet { mine.share } else { 0.0 };
        }
        self.level = (terms.capacity.min(self.level + returned) - charge).max(-terms.capacity);
        credit
    }

    /// Its share and its grant.
    fn grant(&mut self, terms: &Terms, ask: &Ask, credit: f64) -> (Record, Grant) {
        let (told, held) = (ask.share_micros as f64, ask.held as f64);
        let nodes = self.sums.nodes + 1.0;
        let fleet = nodes.max(terms.expected);
        let cap = (terms.afield / fleet).floor().max(1.0);
        let idle = (terms.count * 1_000.0 / terms.period / (IDLE_PARTS * fleet)).floor();
        let weight = (ask.demand_millis as f64).max(idle).max(1.0);
        let ordinary = (ask.ordinary_millis as f64).min(ask.demand_millis as f64);
        let unseen = if self.clock < FORGET { (terms.expected - nodes).max(0.0) } else { 0.0 };
        let free = (terms.rate - self.sums.shares).max(0.0);
        let (weights, all_ordinary) = (self.sums.weights + weight, self.sums.ordinary + ordinary);
        let first = first_weight(terms.rate, weights - all_ordinary, all_ordinary);
        let weigh = |all: f64, ordinary: f64| first * (all - ordinary) + FIRST_MIN * ordinary;
        let by_demand = (terms.rate * weigh(weight, ordinary) / weigh(weights, all_ordinary)).floor();
        let by_demand = by_demand.min(free - (terms.rate * unseen / terms.expected).floor());
        let share = if self.clock < YOUNG { told } else { by_demand }.min(free).max(0.0);
        let kept = share.max(told.min(free));
        let credit = credit.min(cap * MICRO).max(-cap * MICRO);
        let available = credit.max(self.level - (terms.capacity / 2.0).floor()).min(self.level - self.claims);
        let tokens = ((ask.wanted as f64 * MICRO).min(available) / MICRO).floor();
        let tokens = tokens.min(cap - held).min(terms.afield - self.sums.out - held).max(0.0);
        self.level -= tokens * MICRO;
        let credit = (credit - tokens * MICRO).max(credit.min(0.0));
        let (borrowed, uptime) = (ask.borrowed as f64, ask.uptime_micros as f64);
        let (asked, share_kept, held) = (self.clock, kept, held + tokens);
        let record = Record { asked, weight, ordinary, share: share_kept, credit, held, borrowed, uptime };
        let grant = Grant {
            tokens: tokens as u64,
            valid_for: VALID_FOR,
            nodes_seen: Some(nodes as u32),
            share_micros: Some(share as u64),
        };
        (record, grant)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;
    use crate::quota::{Quota, Rate};

    fn ask() -> impl Strategy<Value = Ask> {
        let quota = Quota::new(Rate::new(5_000, 1).unwrap(), NonZeroU32::new(1_000).unwrap()).unwrap();
        let demand = (0u64..50_000_000, 0u64..50_000_000);
        let amounts = (0u64..1_000, prop_oneof![4 => Just(0u64), 1 => 0u64..50], 0u64..300, demand);
        let past = (0u64..5_000, 0u64..5_000_000_000, 0u64..100_000_000);
        (0u64..6, amounts, past, prop::bool::weighted(0.05)).prop_map(move |(node, amounts, past, leaving)| {
            let (wanted, returned, held, (demand_millis, ordinary_millis)) = amounts;
            let (borrowed, share_micros, uptime_micros) = past;
            let expected = 4;
            Ask {
                node,
                quota,
                expected,
                wanted,
                returned,
                held,
                demand_millis,
                ordinary_millis,
                borrowed,
                share_micros,
                uptime_micros,
                leaving,
            }
        })
    }

    /// A bucket of 10,000 a second, half of it to each of two nodes that want much: what `node` is told `millis` after
    /// the beginning, and the level then.
    fn told(bank: &mut Bank, expected: u32, node: u64, millis: u64, borrowed: u64) -> (Option<u32>, Option<u64>, f64) {
        let quota = Quota::new(Rate::new(10_000, 1).unwrap(), NonZeroU32::new(10_000).unwrap()).unwrap();
        let ask = Ask {
            node,
            quota,
            expected,
            wanted: 0,
            returned: 0,
            held: 0,
            demand_millis: 5_000_000,
            ordinary_millis: 0,
            borrowed,
            share_micros: 5_000_000_000,
            uptime_micros: millis * 1_000,
            leaving: false,
        };
        let grant = bank.withdraw(&ask, 1_700_000_000_000_000 + millis * 1_000);
        (grant.nodes_seen, grant.share_micros, bank.bucket.unwrap().level / MICRO)
    }

    /// One node is expected, two there are, and a third comes just as the first is cut off: the bucket errs, until that
    /// is back and pays what was not kept free for it.
    #[test]
    fn a_node_that_was_taken_for_dead_pays_what_it_borrowed_when_it_is_back() {
        let mut bank = Bank::default();
        (0..1_000).step_by(20).for_each(|millis| _ = [1, 2].map(|node| told(&mut bank, 1, node, millis, 0)));
        let turns = (1_000..1_800).step_by(20);
        let last = turns.map(|millis| [2, 3].map(|node| told(&mut bank, 1, node, millis, 0))[1]).last();
        let (nodes, share, before) = last.unwrap();
        assert_eq!((nodes, share), (Some(2), Some(5_000_000_000)), "it has the first one's place");
        // 0.8 s on 4,000 a second; 5,000 a second were kept free for half the time.
        let (nodes, _, after) = told(&mut bank, 1, 1, 1_800, 3_200);
        let paid = before + 20.0 * 10.0 - after;
        assert!(nodes == Some(3) && (1_000.0..1_500.0).contains(&paid), "{paid} of 3,200");
    }

    /// Two are expected. The first is cut off; the second is killed, and its last ask comes after the first one of
    /// the third, which has its place: two ask, but only one lives.
    #[test]
    fn an_ask_of_the_dead_that_comes_late_replaces_nobody() {
        let mut bank = Bank::default();
        (0..1_000).step_by(20).for_each(|millis| _ = [1, 2].map(|node| told(&mut bank, 2, node, millis, 0)));
        (1_000..1_500).step_by(20).for_each(|millis| _ = told(&mut bank, 2, 2, millis, 0));
        told(&mut bank, 2, 3, 1_500, 0);
        told(&mut bank, 2, 2, 1_502, 0);
        let all = (1_520..2_500).step_by(20).map(|millis| told(&mut bank, 2, 3, millis, 0));
        let all: Vec<_> = all.map(|(nodes, share, _)| (nodes, share)).collect();
        assert!(all.iter().all(|&told| told == (Some(3), Some(0))), "{all:?}");
    }

    proptest! {
        /// Whatever nodes say, and however wrong they are.
        #[test]
        fn grants_never_exceed_the_rate_and_half_the_burst(
            asks in prop::collection::vec((prop_oneof![8 => 0u64..30_000, 1 => 0u64..5_000_000], ask()), 1..200),
        ) {
            let (mut bank, mut now, mut granted, mut least) = (Bank::default(), 1_700_000_000_000_000, 0.0, 0.0_f64);
            let began = now;
            for (after, ask) in asks {
                now += after;
                let passed = 5_000.0 * (now - began) as f64 / MICRO;
                least = least.min(granted - passed);
                granted += bank.withdraw(&ask, now).tokens as f64 - ask.returned as f64;
                prop_assert!(granted - passed - least <= 500.0, "{granted} in {passed}");

                let bucket = bank.bucket.unwrap();
                let mut sums = Sums::default();
                bank.records.values().filter(|record| !record.is_replaced()).for_each(|record| sums.add(record));
                let shown = |sums: &Sums| [sums.nodes, sums.weights, sums.ordinary, sums.shares, sums.out];
                prop_assert_eq!(shown(&bucket.sums), shown(&sums));
                prop_assert!(sums.shares <= 5_000.0 * MICRO, "{} told", sums.shares);
                prop_assert!(bucket.level.abs() <= 500.0 * MICRO && bucket.claims >= 0.0, "{bucket:?}");
                prop_assert!(bucket.quiet >= 0.0 && bucket.quiet <= sums.shares, "{bucket:?}");
            }
        }
    }
}
