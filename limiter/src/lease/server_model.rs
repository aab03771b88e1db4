//! The reference implementation of `lease.lua`: the same bucket in memory, step by step, with time
//! as an argument. docs/cluster-limits.md specifies both.
//!
//! It has no optimisation of its own: where it and the script differ, one of them is wrong. It
//! serves tests, here and in the crate that talks to Redis. Invariant: tokens granted over any time
//! t never exceed rate * t plus half the burst.

use std::collections::BTreeMap;
use std::time::Duration;

use super::backend::{LeaseGrant, LeaseRequest};

const MICRO: f64 = 1_000_000.0;
/// The bucket's clock advances by at most this from one request to the next.
const STEP_MAX: f64 = 1_000_000.0;
/// Allowance for a request that takes longer to arrive than the one before.
const DELAY_SLACK: f64 = 20_000.0;
/// How often silent nodes are identified, which costs a read of every record.
const SWEEP_INTERVAL: f64 = 50_000.0;
/// A bucket younger than this keeps the shares that nodes report, until all have sent a request.
const WARM_UP: f64 = 200_000.0;
/// The most that a silent node retains of the level, in time at its share. The longer, the larger
/// the burst at the end of an outage.
const RETENTION_MAX: f64 = 50_000.0;
/// Longer than the interval of an idle node; a node that is silent for longer uses its local rate.
const SILENT_AFTER: f64 = 150_000.0;
/// A silent node whose place another node took is replaced after this, four intervals of an idle
/// node. Any other is forgotten after [`FORGOTTEN_AFTER`].
const REPLACED_AFTER: f64 = 400_000.0;
const FORGOTTEN_AFTER: f64 = 30_000_000.0;
const VALID_FOR: Duration = Duration::from_secs(1);
/// A node without demand is weighted as if it demanded an equal share divided by this, so that it
/// has a share for an outage.
const IDLE_DIVISOR: f64 = 32.0;
/// The share of priority demand, which leaves no reserve, in thousandths of that demand: measured
/// demand is rough, and a share of the same size would often be used up.
const PRIORITY_HEADROOM: f64 = 1_250.0;
/// The least weight of priority demand relative to ordinary demand, in thousandths.
const PRIORITY_WEIGHT_MIN: f64 = 1_000.0;
const PRIORITY_WEIGHT_MAX: f64 = 1_000_000.0;

/// A lease backend in memory. Numbers are doubles, as in Lua: every result is floored.
#[derive(Clone, Debug, Default)]
pub struct LeaseServerModel {
    bucket: Option<Bucket>,
    records: BTreeMap<u64, NodeRecord>,
}

/// State of the token bucket: times in microseconds, amounts in millionths of a token, and the sums
/// over the nodes' records.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    last_request: f64,
    clock: f64,
    last_sweep: f64,
    level: f64,
    remainder: f64,
    sums: RecordSums,
    claims: f64,
    silent_shares: f64,
    peak_nodes: f64,
    last_join: f64,
}

/// Sums over the records of all nodes whose place no other node took.
#[derive(Clone, Copy, Debug, Default)]
struct RecordSums {
    nodes: f64,
    weights: f64,
    ordinary: f64,
    shares: f64,
    outstanding: f64,
}

/// Account of one node: times in microseconds, `weight` and `ordinary` (demand) in thousandths and
/// `share` in millionths of a token per second, `credit` in millionths of a token, `held` and
/// `borrowed` in tokens.
#[derive(Clone, Copy, Debug)]
struct NodeRecord {
    last_request: f64,
    weight: f64,
    ordinary: f64,
    share: f64,
    credit: f64,
    held: f64,
    borrowed: f64,
    uptime: f64,
}

impl NodeRecord {
    /// Of a replaced node, only the account is kept: the record is in no sum.
    fn is_replaced(&self) -> bool {
        self.weight == 0.0
    }

    fn is_silent(&self, clock: f64) -> bool {
        clock - self.last_request > SILENT_AFTER
    }
}

/// Values derived from the quota and the expected number of nodes of one request.
struct Parameters {
    count: f64,
    period: f64,
    rate: f64,
    outstanding_max: f64,
    capacity: f64,
    retention: f64,
    expected_nodes: f64,
}

impl Parameters {
    fn of(request: &LeaseRequest) -> Parameters {
        let rate = request.quota.rate();
        let (count, period) = (rate.count() as f64, rate.seconds() as f64);
        let burst = f64::from(request.quota.burst().get());
        let pool = (burst / 2.0).floor().max(1.0);
        let outstanding_max = (burst - pool).max(1.0);
        let capacity = pool * MICRO;
        let rate = (count * MICRO / period).floor();
        let retention = RETENTION_MAX.min((capacity * period / (8.0 * count)).floor());
        let expected_nodes = f64::from(request.expected_nodes);
        Parameters { count, period, rate, outstanding_max, capacity, retention, expected_nodes }
    }
}

/// The weight of priority demand, in thousandths, with which it gets [`PRIORITY_HEADROOM`] of what
/// it demands, if the rate suffices, and never less than its part of the whole demand.
fn priority_weight(rate: f64, priority: f64, ordinary: f64) -> f64 {
    let left = rate - PRIORITY_HEADROOM * priority;
    if ordinary == 0.0 {
        PRIORITY_WEIGHT_MIN
    } else if left <= 0.0 {
        PRIORITY_WEIGHT_MAX
    } else {
        (1_000.0 * PRIORITY_HEADROOM * ordinary / left).floor().clamp(PRIORITY_WEIGHT_MIN, PRIORITY_WEIGHT_MAX)
    }
}

/// Tokens at a rate per second over a time in microseconds.
fn earned_at(rate: f64, micros: f64) -> f64 {
    (rate * micros / MICRO).floor()
}

impl RecordSums {
    fn add(&mut self, record: &NodeRecord) {
        self.nodes += 1.0;
        self.weights += record.weight;
        self.ordinary += record.ordinary;
        self.shares += record.share;
        self.outstanding += record.held;
    }

    fn remove(&mut self, record: &NodeRecord) {
        self.nodes -= 1.0;
        self.weights -= record.weight;
        self.ordinary -= record.ordinary;
        self.shares -= record.share;
        self.outstanding -= record.held;
    }
}

impl LeaseServerModel {
    /// Handles one request at `redis_now_micros`, the time of the backend's own clock.
    pub fn handle(&mut self, request: &LeaseRequest, redis_now_micros: u64) -> LeaseGrant {
        let (now, parameters) = (redis_now_micros as f64, Parameters::of(request));
        let mut bucket = self.bucket.unwrap_or(Bucket { last_request: now, ..Bucket::default() });
        let step = bucket.step(request, self.records.get(&request.node), now);
        bucket.last_request = now;
        bucket.advance(&parameters, step);
        if bucket.clock - bucket.last_sweep >= SWEEP_INTERVAL {
            bucket.sweep(&parameters, &mut self.records);
        }
        let record = self.records.remove(&request.node);
        if record.is_none() && bucket.clock >= WARM_UP && !request.leaving {
            bucket.last_join = bucket.clock;
        }
        let credit = bucket.settle(&parameters, request, record);
        let (record, grant) = bucket.grant(&parameters, request, credit);
        if !request.leaving {
            bucket.sums.add(&record);
            self.records.insert(request.node, record);
        }
        self.bucket = Some(bucket);
        grant
    }
}

impl Bucket {
    /// Step 2: by how much the bucket's clock advances.
    fn step(&self, request: &LeaseRequest, record: Option<&NodeRecord>, now: f64) -> f64 {
        let step = (now - self.last_request).clamp(0.0, STEP_MAX);
        let Some(record) = record else { return step };
        let own = record.last_request + request.uptime_micros as f64 - record.uptime + DELAY_SLACK;
        step.min((own - self.clock).max(0.0))
    }

    /// Step 2: refills the level.
    fn advance(&mut self, parameters: &Parameters, step: f64) {
        self.clock += step;
        let parts = step * parameters.count + self.remainder;
        let gained = (parts / parameters.period).floor();
        self.remainder = parts - gained * parameters.period;
        self.level += (gained - earned_at(self.silent_shares, step)).max(0.0);
        self.claims += earned_at(self.sums.shares - self.silent_shares, step);
    }

    /// Step 3: partitions nodes into active, silent, and silent and replaced.
    fn sweep(&mut self, parameters: &Parameters, records: &mut BTreeMap<u64, NodeRecord>) {
        let (before, clock, last_join) = (self.last_sweep, self.clock, self.last_join);
        (self.last_sweep, self.sums, self.claims, self.silent_shares) = (clock, RecordSums::default(), 0.0, 0.0);
        let mut active = 0.0;
        for record in records.values().filter(|record| !record.is_silent(clock)) {
            self.sums.add(record);
            self.claims += earned_at(record.share, clock - record.last_request);
            active += if record.last_request > last_join + DELAY_SLACK { 1.0 } else { 0.0 };
        }
        let (is_complete, mut excess) = (active >= parameters.expected_nodes.max(self.peak_nodes), 0.0);
        let mut peak_nodes = if clock - last_join <= SILENT_AFTER { self.peak_nodes.max(active) } else { active };
        records.retain(|_, record| clock - record.last_request <= FORGOTTEN_AFTER);
        for record in records.values_mut().filter(|record| record.is_silent(clock) && !record.is_replaced()) {
            let withheld = earned_at(record.share, clock - record.last_request - parameters.retention);
            excess += if record.is_silent(before) { 0.0 } else { withheld };
            if is_complete && record.last_request < last_join && clock - record.last_request > REPLACED_AFTER {
                record.borrowed += (withheld / MICRO).floor();
                (record.weight, record.ordinary, record.share, record.held) = (0.0, 0.0, 0.0, 0.0);
            } else {
                self.sums.add(record);
                self.claims += earned_at(record.share, parameters.retention);
                self.silent_shares += record.share;
                peak_nodes = peak_nodes.max(self.peak_nodes);
            }
        }
        self.peak_nodes = peak_nodes;
        self.level = (self.level - excess).max(self.level.min(self.claims));
    }

    /// Step 4: settles the caller's account: the charge to the bucket, and the caller's credit.
    fn settle(&mut self, parameters: &Parameters, request: &LeaseRequest, record: Option<NodeRecord>) -> f64 {
        let (uptime, returned) = (request.uptime_micros as f64, request.returned as f64 * MICRO);
        let charge_max = earned_at(request.share_micros as f64, uptime.min(self.clock));
        let (mut charge, mut credit) = ((request.borrowed as f64 * MICRO).min(charge_max), 0.0);
        if let Some(record) = record {
            let (share, is_silent) = (record.share, record.is_silent(self.last_sweep));
            let (earning, withheld) = if is_silent {
                let beyond = (uptime - record.uptime - parameters.retention).max(0.0);
                (parameters.retention, earned_at(share, beyond))
            } else {
                (self.clock - record.last_request, 0.0)
            };
            let earned = earned_at(share, earning);
            charge = ((request.borrowed as f64 - record.borrowed).max(0.0) * MICRO - withheld).max(0.0);
            credit = record.credit + earned + returned - charge;
            if !record.is_replaced() {
                self.sums.remove(&record);
            }
            self.claims = (self.claims - earned).max(0.0);
            self.silent_shares -= if is_silent { share } else { 0.0 };
        }
        self.level = (parameters.capacity.min(self.level + returned) - charge).max(-parameters.capacity);
        credit
    }

    /// Steps 5 and 6: the caller's share and its grant.
    fn grant(&mut self, parameters: &Parameters, request: &LeaseRequest, credit: f64) -> (NodeRecord, LeaseGrant) {
        let (reported_share, held) = (request.share_micros as f64, request.held as f64);
        let nodes = self.sums.nodes + 1.0;
        let fleet = nodes.max(parameters.expected_nodes);
        let cap = (parameters.outstanding_max / fleet).floor().max(1.0);
        let idle = (parameters.count * 1_000.0 / parameters.period / (IDLE_DIVISOR * fleet)).floor();
        let weight = (request.demand_millis as f64).max(idle).max(1.0);
        let ordinary = (request.ordinary_millis as f64).min(request.demand_millis as f64);
        let unseen = if self.clock < FORGOTTEN_AFTER { (parameters.expected_nodes - nodes).max(0.0) } else { 0.0 };
        let free = (parameters.rate - self.sums.shares).max(0.0);
        let (weights, all_ordinary) = (self.sums.weights + weight, self.sums.ordinary + ordinary);
        let priority = priority_weight(parameters.rate, weights - all_ordinary, all_ordinary);
        let weigh = |all: f64, ordinary: f64| priority * (all - ordinary) + PRIORITY_WEIGHT_MIN * ordinary;
        let by_demand = (parameters.rate * weigh(weight, ordinary) / weigh(weights, all_ordinary)).floor();
        let by_demand = by_demand.min(free - (parameters.rate * unseen / parameters.expected_nodes).floor());
        let share = if self.clock < WARM_UP { reported_share } else { by_demand }.min(free).max(0.0);
        let share_kept = share.max(reported_share.min(free));
        let credit = credit.min(cap * MICRO).max(-cap * MICRO);
        let available = credit.max(self.level - (parameters.capacity / 2.0).floor()).min(self.level - self.claims);
        let tokens = ((request.requested as f64 * MICRO).min(available) / MICRO).floor();
        let tokens = tokens.min(cap - held).min(parameters.outstanding_max - self.sums.outstanding - held).max(0.0);
        self.level -= tokens * MICRO;
        let record = NodeRecord {
            last_request: self.clock,
            weight,
            ordinary,
            share: share_kept,
            credit: (credit - tokens * MICRO).max(credit.min(0.0)),
            held: held + tokens,
            borrowed: request.borrowed as f64,
            uptime: request.uptime_micros as f64,
        };
        let grant = LeaseGrant {
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

    fn lease_request() -> impl Strategy<Value = LeaseRequest> {
        let quota = Quota::new(Rate::new(5_000, 1).unwrap(), NonZeroU32::new(1_000).unwrap()).unwrap();
        let demand = (0u64..50_000_000, 0u64..50_000_000);
        let amounts = (0u64..1_000, prop_oneof![4 => Just(0u64), 1 => 0u64..50], 0u64..300, demand);
        let past = (0u64..5_000, 0u64..5_000_000_000, 0u64..100_000_000);
        (0u64..6, amounts, past, prop::bool::weighted(0.05)).prop_map(move |(node, amounts, past, leaving)| {
            let (requested, returned, held, (demand_millis, ordinary_millis)) = amounts;
            let (borrowed, share_micros, uptime_micros) = past;
            LeaseRequest {
                node,
                quota,
                expected_nodes: 4,
                requested,
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

    /// A bucket of 10,000 a second for nodes that each have half of it and demand it all.
    struct BusyFleet {
        server: LeaseServerModel,
        expected_nodes: u32,
    }

    impl BusyFleet {
        fn new(expected_nodes: u32) -> BusyFleet {
            BusyFleet { server: LeaseServerModel::default(), expected_nodes }
        }

        /// The nodes and the share in the reply to `node`, `millis` after the start.
        fn request(&mut self, node: u64, millis: u64) -> (Option<u32>, Option<u64>) {
            self.request_with_borrowed(node, millis, 0)
        }

        fn request_with_borrowed(&mut self, node: u64, millis: u64, borrowed: u64) -> (Option<u32>, Option<u64>) {
            let quota = Quota::new(Rate::new(10_000, 1).unwrap(), NonZeroU32::new(10_000).unwrap()).unwrap();
            let request = LeaseRequest {
                node,
                quota,
                expected_nodes: self.expected_nodes,
                requested: 0,
                returned: 0,
                held: 0,
                demand_millis: 5_000_000,
                ordinary_millis: 0,
                borrowed,
                share_micros: 5_000_000_000,
                uptime_micros: millis * 1_000,
                leaving: false,
            };
            let grant = self.server.handle(&request, 1_700_000_000_000_000 + millis * 1_000);
            (grant.nodes_seen, grant.share_micros)
        }

        fn level(&self) -> f64 {
            self.server.bucket.unwrap().level / MICRO
        }
    }

    /// One node is expected, two exist, and a third joins just as the first is cut off. The bucket
    /// replaces the first by mistake, until that returns and pays for what was not withheld for it.
    #[test]
    fn a_node_that_was_replaced_by_mistake_pays_what_it_borrowed_when_it_returns() {
        let mut fleet = BusyFleet::new(1);
        (0..1_000).step_by(20).for_each(|millis| _ = [1, 2].map(|node| fleet.request(node, millis)));
        let last = (1_000..1_800).step_by(20).map(|millis| [2, 3].map(|node| fleet.request(node, millis))[1]).last();
        assert_eq!(last.unwrap(), (Some(2), Some(5_000_000_000)), "the third has the first one's place");
        let before = fleet.level();
        // 0.8 s at 4,000 a second; 5,000 a second were withheld for half the time.
        let (nodes, _) = fleet.request_with_borrowed(1, 1_800, 3_200);
        let paid = before + 20.0 * 10.0 - fleet.level();
        assert!(nodes == Some(3) && (1_000.0..1_500.0).contains(&paid), "{paid} of 3,200");
    }

    /// Two nodes are expected. The first is cut off; the second is killed, and its last request
    /// arrives after the first one of the third, which has its place: two send requests, but only
    /// one exists.
    #[test]
    fn a_late_request_of_a_dead_node_replaces_no_node() {
        let mut fleet = BusyFleet::new(2);
        (0..1_000).step_by(20).for_each(|millis| _ = [1, 2].map(|node| fleet.request(node, millis)));
        (1_000..1_500).step_by(20).for_each(|millis| _ = fleet.request(2, millis));
        fleet.request(3, 1_500);
        fleet.request(2, 1_502);
        let replies: Vec<_> = (1_520..2_500).step_by(20).map(|millis| fleet.request(3, millis)).collect();
        assert!(replies.iter().all(|&reply| reply == (Some(3), Some(0))), "{replies:?}");
    }

    proptest! {
        /// For arbitrary and even wrong requests.
        #[test]
        fn grants_never_exceed_the_rate_and_half_the_burst(
            requests in
                prop::collection::vec((prop_oneof![8 => 0u64..30_000, 1 => 0u64..5_000_000], lease_request()), 1..200),
        ) {
            let (mut server, mut now) = (LeaseServerModel::default(), 1_700_000_000_000_000);
            let (mut granted, mut least) = (0.0, 0.0_f64);
            let started_at = now;
            for (after, request) in requests {
                now += after;
                let passed = 5_000.0 * (now - started_at) as f64 / MICRO;
                least = least.min(granted - passed);
                granted += server.handle(&request, now).tokens as f64 - request.returned as f64;
                prop_assert!(granted - passed - least <= 500.0, "{granted} in {passed}");

                let bucket = server.bucket.unwrap();
                let mut sums = RecordSums::default();
                server.records.values().filter(|record| !record.is_replaced()).for_each(|record| sums.add(record));
                let fields = |sums: &RecordSums| [sums.nodes, sums.weights, sums.ordinary, sums.shares, sums.outstanding];
                prop_assert_eq!(fields(&bucket.sums), fields(&sums));
                prop_assert!(sums.shares <= 5_000.0 * MICRO, "shares sum to {}", sums.shares);
                prop_assert!(bucket.level.abs() <= 500.0 * MICRO && bucket.claims >= 0.0, "{bucket:?}");
                prop_assert!(bucket.silent_shares >= 0.0 && bucket.silent_shares <= sums.shares, "{bucket:?}");
            }
        }
    }
}
