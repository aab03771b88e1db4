//! Whole fleets in virtual time: leases, the reference server and the messages between them.

mod reserve;

use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::quota::Rate;

const TICK: Duration = Duration::from_millis(1);

fn quota(rate: u64, burst: u32) -> Quota {
    Quota::new(Rate::new(rate, 1).unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn config(node: u64, nodes: u32, source: LeaseSource) -> LeaseConfig {
    LeaseConfig::new(node, NonZeroU32::new(nodes).unwrap(), source)
}

fn at(millis: u64) -> MonotonicTime {
    MonotonicTime::ORIGIN + Duration::from_millis(millis)
}

fn cost(tokens: u32) -> Cost {
    Cost::new(NonZeroU32::new(tokens).unwrap())
}

/// A node with a load in thousandths of a request per second, so that fractions add up.
struct Node {
    lease: Lease,
    load_millis: u64,
    due_millis: u64,
    reply: Option<(u64, Option<LeaseGrant>)>,
    admitted: u64,
}

/// A simulated fleet in virtual time: nodes with their leases, one reference server, and the time
/// in milliseconds. A reply takes 1 ms; a failure takes the 20 ms of the deadline.
struct Fleet {
    quota: Quota,
    server: LeaseServerModel,
    nodes: Vec<Node>,
    millis: u64,
    /// The minimum of `admitted - R * t` so far: the bound holds over every window, not only the
    /// first.
    floor: f64,
    requests: u64,
}

impl Fleet {
    fn new(rate: u64, burst: u32, loads: &[f64]) -> Fleet {
        let quota = quota(rate, burst);
        let nodes = loads.iter().enumerate().map(|(index, load)| Node {
            lease: Lease::new(quota, config(index as u64, loads.len() as u32, LeaseSource::Backend), at(0)).unwrap(),
            load_millis: (load * 1_000.0) as u64,
            due_millis: 0,
            reply: None,
            admitted: 0,
        });
        let nodes = nodes.collect();
        Fleet { quota, server: LeaseServerModel::default(), nodes, millis: 0, floor: 0.0, requests: 0 }
    }

    /// Advances time by `duration` while the nodes in `cut_off` cannot reach the backend; returns
    /// how many requests were admitted.
    fn run(&mut self, duration: Duration, cut_off: &[usize]) -> u64 {
        let before = self.admitted();
        for _ in 0..duration.as_millis() {
            self.millis += 1;
            for index in 0..self.nodes.len() {
                self.exchange(index, cut_off.contains(&index));
                self.load(index);
            }
            self.check();
        }
        self.admitted() - before
    }

    fn exchange(&mut self, index: usize, cut_off: bool) {
        let (now, node) = (at(self.millis), &mut self.nodes[index]);
        match node.reply.take_if(|(due, _)| *due <= self.millis) {
            Some((_, Some(grant))) => node.lease.apply_grant(grant, now),
            Some((_, None)) => node.lease.request_failed(now),
            None => {}
        }
        if let Some(request) = node.lease.next_request(now) {
            self.requests += 1;
            node.reply = Some(if cut_off {
                (self.millis + 20, None)
            } else {
                // A date, as Redis returns one: its sums must stay exact.
                let redis = 1_700_000_000_000_000 + self.millis * 1_000 + index as u64;
                (self.millis + 1, Some(self.server.handle(&request, redis)))
            });
        }
    }

    fn load(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.due_millis += node.load_millis * TICK.as_millis() as u64;
        while node.due_millis >= 1_000_000 {
            node.due_millis -= 1_000_000;
            node.admitted += u64::from(node.lease.commit(Cost::ONE, Fraction::ZERO, at(self.millis)).is_ok());
        }
    }

    fn check(&mut self) {
        let rate = self.quota.rate().count() as f64 / self.quota.rate().seconds() as f64;
        let above = self.admitted() as f64 - rate * self.millis as f64 / 1_000.0;
        // The admissions of this millisecond count in full, on whichever side of its end they were.
        let bound = f64::from(self.quota.burst().get()) + rate / 1_000.0;
        assert!(above - self.floor <= bound, "{} above at {} ms", above - self.floor, self.millis);
        self.floor = self.floor.min(above);
    }

    fn admitted(&self) -> u64 {
        self.nodes.iter().map(|node| node.admitted).sum()
    }
}

#[test]
fn a_lease_that_is_not_renewed_expires_into_the_local_rate() {
    let lease = Lease::new(quota(1_000, 1_000), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    let grant = LeaseGrant {
        tokens: 0,
        valid_for: Duration::from_secs(1),
        nodes_seen: Some(2),
        share_micros: Some(500 * MICRO),
    };
    lease.next_request(at(0)).unwrap();
    lease.apply_grant(grant, at(0));
    assert!(lease.commit(cost(1), Fraction::ZERO, at(1_000)).is_err());
    assert!(lease.is_local(at(1_010)));
    assert_eq!((0..10).filter(|_| lease.commit(cost(1), Fraction::ZERO, at(1_010)).is_ok()).count(), 4);
}

#[test]
fn a_grant_after_the_failure_is_dropped() {
    let lease = Lease::new(quota(100, 100), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    let grant = LeaseServerModel::default().handle(&lease.next_request(at(0)).unwrap(), 0);
    lease.request_failed(at(0));
    lease.apply_grant(LeaseGrant { tokens: 50, ..grant }, at(0));
    assert!(lease.commit(cost(1), Fraction::ZERO, at(0)).is_err());
}

#[test]
fn a_request_without_result_does_not_block_the_next() {
    let lease = Lease::new(quota(100, 100), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    assert!(lease.next_request(at(0)).is_some());
    assert!(lease.next_request(at(900)).is_none());
    assert!(lease.next_request(at(1_000)).is_some());
    assert!(lease.is_local(at(1_000)));
}

#[test]
fn borrowed_is_a_count_that_only_grows() {
    let lease = Lease::new(quota(1_000, 100), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    lease.next_request(at(0)).unwrap();
    lease.request_failed(at(10));
    let second = lease.next_request(at(100)).unwrap();
    // 0.8 of the rate would have brought 80, but a node holds at most its 50.
    assert_eq!((second.borrowed, second.uptime_micros), (50, 100_000));
    lease.request_failed(at(120));
    lease.commit(cost(30), Fraction::ZERO, at(120)).unwrap();
    let third = lease.next_request(at(200)).unwrap();
    assert_eq!((third.borrowed, third.uptime_micros), (80, 200_000));
}

#[test]
fn rejects_a_rate_that_leaves_a_node_without_tokens() {
    let slow = Quota::new(Rate::new(1, 86_400).unwrap(), NonZeroU32::new(40).unwrap()).unwrap();
    let error = Lease::new(slow, config(1, 20, LeaseSource::LocalFallback), at(0)).unwrap_err();
    assert!(error.to_string().starts_with("a rate of 1/d cannot be shared by 20 nodes"), "{error}");
}

#[test]
fn a_new_node_without_a_share_reports_a_short_wait() {
    let lease = Lease::new(quota(100, 100), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    lease.next_request(at(0)).unwrap();
    let valid_for = Duration::from_secs(1);
    lease.apply_grant(LeaseGrant { tokens: 0, valid_for, nodes_seen: Some(2), share_micros: Some(0) }, at(0));
    assert_eq!(lease.peek(cost(1), Fraction::ZERO, at(0)).unwrap_err().retry_after, Duration::from_millis(20));
    lease.next_request(at(100)).unwrap();
    lease.request_failed(at(120));
    assert_eq!(lease.peek(cost(1), Fraction::ZERO, at(120)).unwrap_err().retry_after, PENDING_MAX);
}

#[test]
fn threads_spend_exactly_what_was_granted() {
    let lease = Lease::new(quota(100_000, 40_000), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    let valid_for = Duration::from_secs(1);
    let grant = LeaseGrant { tokens: 1_000, valid_for, nodes_seen: Some(1), share_micros: Some(MICRO) };
    let spend = || (0..8_000).filter(|_| lease.commit(Cost::ONE, Fraction::ZERO, at(0)).is_ok()).count();
    let spent: usize = std::thread::scope(|scope| {
        let workers = [scope.spawn(spend), scope.spawn(spend)];
        for turn in 0..10 {
            // Each grant comes before the previous one expires, so that all tokens were granted.
            lease.next_request(at(turn * 500)).unwrap_or_else(|| panic!("turn {turn}"));
            lease.apply_grant(grant, at(turn * 500));
        }
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    let left = lease.balance_micros.load(Ordering::Acquire) / MICRO;
    assert_eq!(spent as u64 + left, 10_000);
}

#[test]
fn a_denial_returns_the_wait_and_a_refund_restores_tokens() {
    let lease = Lease::new(quota(100, 10), config(1, 1, LeaseSource::LocalFallback), at(0)).unwrap();
    assert_eq!(lease.commit(cost(10), Fraction::ZERO, at(0)).unwrap().remaining, 0);
    let throttled = lease.peek(cost(3), Fraction::ZERO, at(5)).unwrap_err();
    assert_eq!(throttled.retry_after, Duration::from_millis(30) - Duration::from_millis(5));
    assert!(lease.peek(cost(3), Fraction::ZERO, at(5) + throttled.retry_after).is_ok());
    lease.refund(cost(3));
    assert!(lease.commit(cost(3), Fraction::ZERO, at(5)).is_ok());
}

#[test]
fn without_a_backend_each_node_has_its_share_and_sends_no_request() {
    let quota = quota(100, 20);
    let lease = Lease::new(quota, config(1, 4, LeaseSource::LocalFallback), at(0)).unwrap();
    assert!(lease.next_request(at(0)).is_none());
    let admitted = (0..10_000).filter(|&millis| lease.commit(cost(1), Fraction::ZERO, at(millis)).is_ok()).count();
    assert!((253..=255).contains(&admitted), "{admitted}");
}

#[test]
fn a_reload_changes_share_and_cap_and_keeps_the_balance() {
    let lease = Lease::new(quota(100, 80), config(1, 4, LeaseSource::LocalFallback), at(0)).unwrap();
    lease.commit(cost(5), Fraction::ZERO, at(0)).unwrap();
    lease.reconfigure(quota(100, 80), config(1, 8, LeaseSource::LocalFallback), at(0));
    assert_eq!(lease.peek(cost(10), Fraction::ZERO, at(0)).unwrap().remaining, 0, "limited to the new cap");
    lease.reconfigure(quota(100, 80), config(1, 2, LeaseSource::LocalFallback), at(0));
    assert!(lease.peek(cost(11), Fraction::ZERO, at(0)).is_err(), "a reload grants nothing");
    assert_eq!(lease.peek(cost(40), Fraction::ZERO, at(600)).unwrap().remaining, 0, "refilled at the new share");
}

#[test]
fn a_grant_adds_at_most_what_was_requested() {
    let lease = Lease::new(quota(1_000, 100), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    let requested = lease.next_request(at(0)).unwrap().requested;
    let valid_for = Duration::from_secs(u64::MAX / 2);
    let grant = LeaseGrant { tokens: u64::MAX, valid_for, nodes_seen: Some(0), share_micros: Some(u64::MAX) };
    lease.apply_grant(grant, at(0));
    assert_eq!(lease.peek(cost(1), Fraction::ZERO, at(0)).unwrap().remaining + 1, requested);
    lease.commit(cost(u32::try_from(requested).unwrap()), Fraction::ZERO, at(0)).unwrap();
    assert!(lease.is_local(at(10_000)), "its validity is limited");
    lease.next_request(at(10_000)).unwrap();
    lease.request_failed(at(10_000));
    let admitted = (10_000..20_000).filter(|&millis| lease.commit(cost(1), Fraction::ZERO, at(millis)).is_ok()).count();
    assert!((7_990..=8_000).contains(&admitted), "the share is at most the rate: {admitted}");
}

#[test]
fn extreme_grants_neither_panic_nor_exceed_the_cap() {
    for extreme in [0, 1, u64::MAX] {
        let lease = Lease::new(quota(1_000, 100), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
        for round in 0..3 {
            let now = at(round * 100);
            let request = lease.next_request(now).unwrap();
            assert!(request.held <= 50 && request.requested <= 50, "{request:?}");
            assert!(lease.next_request(now).is_none());
            let nodes_seen = Some(u32::try_from(extreme).unwrap_or(u32::MAX));
            let valid_for = Duration::from_millis(extreme);
            lease.apply_grant(LeaseGrant { tokens: extreme, valid_for, nodes_seen, share_micros: Some(extreme) }, now);
        }
    }
}

#[test]
fn a_smaller_expected_fleet_applies_at_once_without_the_backend() {
    let lease = Lease::new(quota(1_000, 1_000), config(1, 20, LeaseSource::Backend), at(0)).unwrap();
    lease.next_request(at(0)).unwrap();
    lease.request_failed(at(0));
    lease.reconfigure(quota(1_000, 1_000), config(1, 4, LeaseSource::Backend), at(0));
    let admitted = (0..5_000).filter(|&millis| lease.commit(cost(1), Fraction::ZERO, at(millis)).is_ok()).count();
    assert!((998..=1_000).contains(&admitted), "0.8 of a quarter: {admitted}");
    // The number of nodes that the backend has seen overrides the configuration.
    lease.next_request(at(5_000)).unwrap();
    let valid_for = Duration::ZERO;
    lease.apply_grant(
        LeaseGrant { tokens: 0, valid_for, nodes_seen: Some(10), share_micros: Some(100 * MICRO) },
        at(5_000),
    );
    lease.reconfigure(quota(1_000, 1_000), config(1, 2, LeaseSource::Backend), at(5_000));
    assert_eq!(lease.cap_micros.load(Ordering::Relaxed), 50 * MICRO);
    assert_eq!(lease.local_nanos.load(Ordering::Relaxed), 80_000_000_000);
    // The share scales with the rate.
    lease.reconfigure(quota(500, 1_000), config(1, 2, LeaseSource::Backend), at(5_000));
    assert_eq!(lease.local_nanos.load(Ordering::Relaxed), 40_000_000_000);
}

#[test]
fn one_token_an_hour_is_refilled_exactly() {
    let hourly = Quota::new("1/h".parse().unwrap(), NonZeroU32::new(100).unwrap()).unwrap();
    let lease = Lease::new(hourly, config(1, 1, LeaseSource::LocalFallback), at(0)).unwrap();
    lease.commit(cost(100), Fraction::ZERO, at(0)).unwrap();
    let month = 30 * 24 * 3_600_000;
    let tokens = (0..).take_while(|_| lease.commit(cost(1), Fraction::ZERO, at(month)).is_ok()).count();
    assert_eq!(tokens, 100, "a full burst");
    let hours = |hours: u64| at(month + hours * 3_600_000 + 20);
    let admitted = (1..=1_000).filter(|&hour| lease.commit(cost(1), Fraction::ZERO, hours(hour)).is_ok()).count();
    assert!(admitted >= 999, "{admitted} in 1,000 hours");
}

#[test]
fn rejects_a_burst_that_leaves_nodes_without_a_token() {
    let error = Lease::new(quota(100, 5), config(1, 20, LeaseSource::Backend), at(0)).unwrap_err();
    assert_eq!(error.to_string(), "a burst of 5 cannot be shared by 20 nodes: it takes at least 40");
    assert!(Lease::new(quota(100, 20), config(1, 20, LeaseSource::LocalFallback), at(0)).is_ok());
}

#[test]
fn the_server_starts_empty_and_ignores_clock_jumps() {
    let lease = Lease::new(quota(1_000, 1_000), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    let request = LeaseRequest { requested: 1_000, ..lease.next_request(at(0)).unwrap() };
    let mut server = LeaseServerModel::default();
    let mut ask_at = |uptime_micros, redis| server.handle(&LeaseRequest { uptime_micros, ..request }, redis).tokens;
    assert_eq!(ask_at(0, 7_200_000_000), 0, "cold start");
    assert_eq!(ask_at(50_000, 3_600_000_000), 0, "an hour back");
    assert_eq!(ask_at(150_000, 3_600_100_000), 100, "continues");
    assert_eq!(ask_at(170_000, 90_000_000_000), 40, "a day ahead: the time on the node's clock plus a message delay");
    assert_eq!(ask_at(190_000, 90_000_020_000), 20, "continues");
    assert_eq!(ask_at(60_000_000, 150_000_000_000), 50, "a minute of silence: what is retained for a silent node");
}

#[test]
fn early_requests_do_not_take_all_tokens() {
    let mut fleet = Fleet::new(10_000, 1_000, &[50_000.0, 50_000.0]);
    fleet.run(Duration::from_secs(5), &[]);
    let shares: Vec<u64> = fleet.nodes.iter().map(|node| node.admitted).collect();
    assert!(shares[0].abs_diff(shares[1]) * 20 < shares[0], "{shares:?}");
}

#[test]
fn a_node_with_more_demand_gets_more() {
    let mut fleet = Fleet::new(10_000, 4_000, &[40_000.0, 10_000.0]);
    fleet.run(Duration::from_secs(1), &[]);
    let before = [fleet.nodes[0].admitted, fleet.nodes[1].admitted];
    fleet.run(Duration::from_secs(4), &[]);
    let [more, less] = [0, 1].map(|node: usize| fleet.nodes[node].admitted - before[node]);
    let ratio = more as f64 / less as f64;
    assert!((3.6..4.4).contains(&ratio), "{ratio}");
}

#[test]
fn fleets_of_every_size_keep_the_bound_and_use_the_rate() {
    for nodes in [1, 2, 20] {
        for factor in [0.9, 5.0, 10.0] {
            let mut fleet = Fleet::new(10_000, 1_000, &vec![10_000.0 * factor / f64::from(nodes); nodes as usize]);
            let admitted = fleet.run(Duration::from_secs(10), &[]);
            let ideal = 100_000.0 * f64::min(factor, 1.0);
            let ratio = admitted as f64 / ideal;
            println!("{nodes} nodes at {factor}: {ratio:.4} of ideal, {} requests", fleet.requests);
            assert!(ratio >= 0.97, "{nodes} nodes at {factor}: {ratio}");
        }
    }
}

#[test]
fn two_nodes_at_five_times_50_000_a_second() {
    let mut fleet = Fleet::new(50_000, 5_000, &[125_000.0; 2]);
    let admitted = fleet.run(Duration::from_secs(10), &[]);
    println!("{admitted} of 500000, {} requests", fleet.requests);
    assert!(admitted >= 485_000, "{admitted}");
}

#[test]
fn a_small_burst_is_fetched_more_often() {
    let mut fleet = Fleet::new(10_000, 200, &[25_000.0; 2]);
    let admitted = fleet.run(Duration::from_secs(10), &[]);
    println!("{admitted} of 100000, {} requests", fleet.requests);
    assert!(admitted >= 90_000, "{admitted}");
}

#[test]
fn an_outage_admits_four_fifths_and_never_more_than_the_rate() {
    for factor in [0.9, 5.0] {
        let mut fleet = Fleet::new(10_000, 1_000, &[10_000.0 * factor / 4.0; 4]);
        fleet.run(Duration::from_secs(3), &[]);
        let outage = fleet.run(Duration::from_secs(10), &[0, 1, 2, 3]);
        let after = fleet.run(Duration::from_secs(3), &[]);
        println!("outage at {factor}: {outage} of 100000, after it {after} of 30000");
        assert!((79_000..=82_000).contains(&outage), "{outage}");
        assert!(after as f64 >= 0.93 * 30_000.0 * f64::min(factor, 1.0), "{after}");
    }
}

/// The hard case for the bound: Redis keeps granting while the nodes that are cut off use their
/// local rate.
#[test]
fn a_partitioned_fleet_keeps_the_bound() {
    for cut_off in [&[0][..], &[0, 1], &[0, 1, 2]] {
        let mut fleet = Fleet::new(10_000, 1_000, &[12_500.0; 4]);
        fleet.run(Duration::from_secs(3), &[]);
        let admitted = fleet.run(Duration::from_secs(10), cut_off);
        println!("{} of 4 cut off: {admitted} of 100000", cut_off.len());
        assert!((80_000..=101_000).contains(&admitted), "{admitted}");
        fleet.run(Duration::from_secs(3), &[]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Changing loads, and partitions that begin and end at random.
    #[test]
    fn the_bound_holds_under_random_partitions_and_loads(
        burst in 8u32..2_000,
        phases in prop::collection::vec((prop::collection::vec(0.0..30_000.0f64, 4), 0usize..16, 1u64..1_500), 1..12),
    ) {
        let mut fleet = Fleet::new(5_000, burst, &[5_000.0; 4]);
        fleet.run(Duration::from_millis(200), &[]);
        for (loads, cut, millis) in phases {
            for (node, load) in fleet.nodes.iter_mut().zip(loads) {
                node.load_millis = (load * 1_000.0) as u64;
            }
            let cut_off: Vec<usize> = (0..4).filter(|node| cut >> node & 1 == 1).collect();
            fleet.run(Duration::from_millis(millis), &cut_off);
        }
    }
}

#[test]
fn a_node_that_leaves_frees_its_share_at_once() {
    let mut fleet = Fleet::new(10_000, 1_000, &[50_000.0; 2]);
    fleet.run(Duration::from_secs(2), &[]);
    let gone = fleet.nodes.pop().unwrap();
    let request = gone.lease.final_request(at(fleet.millis)).unwrap();
    let reply = fleet.server.handle(&request, 1_700_000_000_000_000 + fleet.millis * 1_000);
    gone.lease.apply_grant(reply, at(fleet.millis));
    assert!(gone.lease.next_request(at(fleet.millis + 1_000)).is_none());
    assert!(gone.lease.commit(cost(1), Fraction::ZERO, at(fleet.millis + 5_000)).is_err());
    fleet.floor -= gone.admitted as f64;
    let admitted = fleet.run(Duration::from_secs(5), &[]);
    assert!(admitted >= 48_000, "{admitted}");
}

#[test]
fn a_restarted_process_has_its_share_within_half_a_second() {
    for starts_after in [20, 100, 140, 200, 5_000] {
        let mut fleet = Fleet::new(10_000, 1_000, &[50_000.0]);
        fleet.run(Duration::from_secs(2), &[]);
        fleet.millis += starts_after;
        let config = config(99, 1, LeaseSource::Backend);
        fleet.nodes[0].reply = None;
        fleet.nodes[0].lease = Lease::new(fleet.quota, config, at(fleet.millis)).unwrap();
        let meanwhile = fleet.run(Duration::from_millis(500), &[]);
        let after = fleet.run(Duration::from_secs(1), &[]);
        println!("started after {starts_after} ms: {meanwhile} in 0.5 s, then {after} in a second");
        assert!((9_900..=10_500).contains(&after), "{after}");
    }
}

/// The backend receives the requests of a node that does not receive its replies.
#[test]
fn requests_with_lost_replies_are_charged_once_and_only_to_their_sender() {
    let mut fleet = Fleet::new(10_000, 2_000, &[12_500.0; 4]);
    fleet.run(Duration::from_secs(2), &[]);
    let before = [0, 1, 2, 3].map(|node: usize| fleet.nodes[node].admitted);
    for _ in 0..5_000 {
        fleet.run(TICK, &[]);
        let unreachable = &mut fleet.nodes[0];
        unreachable.reply = unreachable.reply.map(|(due, reply)| (if reply.is_some() { due + 19 } else { due }, None));
    }
    let [unreachable, others @ ..] = [0, 1, 2, 3].map(|node: usize| fleet.nodes[node].admitted - before[node]);
    println!("unreachable {unreachable}, others {others:?}");
    assert!((9_500..=10_500).contains(&unreachable), "0.8 of its quarter: {unreachable}");
    assert!(others.iter().all(|&other| other >= 12_000), "their quarters: {others:?}");
}

#[test]
fn short_lived_nodes_never_hold_more_than_the_burst() {
    let mut server = LeaseServerModel::default();
    let quota = quota(10_000, 100);
    let mut held = 0;
    for turn in 0..1_000_u64 {
        let lease = Lease::new(quota, config(turn, 1, LeaseSource::Backend), at(0)).unwrap();
        let request = LeaseRequest { requested: 100, ..lease.next_request(at(0)).unwrap() };
        held += server.handle(&request, turn * 1_000).tokens;
    }
    assert!(held <= 50, "{held}");
}
