//! Selection simulated with a virtual clock: queues of endpoints with different speeds, failures,
//! and members that join and leave. Every run has a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::set::mix;
use super::{
    BalanceConfig, BalancePolicy, CallOutcome, EjectConfig, Endpoint, EndpointAddress, EndpointSet, EndpointTarget,
    InFlightGuard, Pick,
};
use crate::picture::{self, Panel};

/// One simulated endpoint: it serves `parallel` calls at a time, each for `service`.
#[derive(Clone, Copy)]
struct Server {
    service: Duration,
    parallel: usize,
    fails: bool,
}

const FAST: Server = Server { service: Duration::from_millis(10), parallel: 8, fails: false };

/// The result of a run: calls by endpoint, and the latencies of the calls that succeeded.
struct Run {
    calls: Vec<usize>,
    failed: usize,
    latencies: Vec<Duration>,
}

impl Run {
    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted[sorted.len() * percent / 100]
    }
}

fn endpoints(count: usize) -> Vec<Arc<Endpoint>> {
    let endpoint = |index: usize| {
        let host = format!("10.0.{}.{}", index / 250, index % 250 + 1);
        let origin = EndpointAddress::http(&host, 80);
        let address = origin.numeric().expect("a numeric host");
        Arc::new(Endpoint::new(&"shop".into(), &origin, EndpointTarget::at(address), None))
    };
    (0..count).map(endpoint).collect()
}

fn set(list: Vec<Arc<Endpoint>>, policy: BalancePolicy) -> EndpointSet {
    EndpointSet::new(list, BalanceConfig { policy, slow_start: Duration::ZERO }, 0.5)
}

/// Sends `count` calls at exponential intervals with the given mean. No endpoint is ejected, so
/// that selection alone is seen.
fn run(policy: BalancePolicy, servers: &[Server], (count, interval): (usize, Duration)) -> Run {
    let set = set(endpoints(servers.len()), policy);
    let start = Instant::now();
    let config = EjectConfig { after: 0, ..EjectConfig::default() };
    // When each of the parallel places of a server is free again.
    let mut places: Vec<Vec<Duration>> = servers.iter().map(|server| vec![Duration::ZERO; server.parallel]).collect();
    // Calls by their end; the guards of those that run.
    let mut running: BinaryHeap<Reverse<(Duration, usize, usize)>> = BinaryHeap::new();
    let mut guards = BTreeMap::new();
    let mut result = Run { calls: vec![0; servers.len()], failed: 0, latencies: Vec::new() };
    let mut now = Duration::ZERO;
    for call in 0..count {
        let uniform = ((mix(call as u64) >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        now += interval.mul_f64(-uniform.ln());
        while let Some(Reverse((end, call, index))) = running.peek().copied().filter(|Reverse((end, ..))| *end <= now) {
            running.pop();
            let (guard, began): (InFlightGuard, Duration) = guards.remove(&call).expect("a running call");
            let endpoint = guard.endpoint();
            let at = start + end;
            endpoint.record_latency((!servers[index].fails).then_some(end - began), at);
            if servers[index].fails {
                guard.record(CallOutcome::Failure, &config, || at);
                result.failed += 1;
            } else {
                guard.record(CallOutcome::Success, &config, || at);
                guard.record_success(|| at);
                result.latencies.push(end - began);
            }
        }
        let pick = Pick { now: start + now, hash: mix(call as u64 % 1_000) };
        let endpoint = set.select(&[], pick).expect("an endpoint");
        let index = set.list().iter().position(|other| Arc::ptr_eq(other, endpoint)).expect("one of the set");
        let place = places[index].iter_mut().min().expect("a place");
        let end = (*place).max(now) + servers[index].service;
        *place = end;
        result.calls[index] += 1;
        guards.insert(call, (InFlightGuard::new(Arc::clone(endpoint)), now));
        running.push(Reverse((end, call, index)));
    }
    result
}

#[test]
fn slow_endpoint_gets_few_calls_by_load_and_its_share_in_turn() {
    let mut servers = [FAST; 10];
    servers[3].service = 10 * FAST.service;
    let load = (40_000, Duration::from_micros(400));
    let in_turn = run(BalancePolicy::RoundRobin, &servers, load);
    assert_eq!(in_turn.calls[3], 4_000);
    for policy in [BalancePolicy::LeastRequest, BalancePolicy::Ewma] {
        let run = run(policy, &servers, load);
        let share = run.calls[3] as f64 / load.0 as f64;
        assert!(share < 0.06, "{policy:?}: {share}");
        assert!(run.percentile(90) <= 2 * FAST.service, "{policy:?}: {:?}", run.percentile(90));
        assert!(run.percentile(99) <= in_turn.percentile(99), "{policy:?}");
    }
    let ewma = run(BalancePolicy::Ewma, &servers, load);
    assert!(ewma.calls[3] * 50 < load.0, "{}: the latency itself is seen", ewma.calls[3]);
}

#[test]
fn endpoint_that_fails_fast_attracts_no_calls() {
    let mut servers = [FAST; 4];
    servers[1] = Server { service: Duration::from_micros(200), fails: true, ..FAST };
    let load = (40_000, Duration::from_micros(600));
    for policy in [BalancePolicy::LeastRequest, BalancePolicy::Ewma, BalancePolicy::ConsistentHash] {
        let run = run(policy, &servers, load);
        let share = run.failed as f64 / load.0 as f64;
        assert!(share < 0.25, "{policy:?}: {share} of the calls fail, more than in turn");
    }
}

#[test]
fn equal_endpoints_get_equal_shares() {
    let policies = [BalancePolicy::RoundRobin, BalancePolicy::LeastRequest, BalancePolicy::Ewma];
    for policy in policies {
        for count in [2, 3, 5, 20] {
            let run = run(policy, &vec![FAST; count], (20_000, Duration::from_millis(2)));
            let mean = 20_000.0 / count as f64;
            let worst = run.calls.iter().map(|calls| (*calls as f64 / mean - 1.0).abs()).fold(0.0, f64::max);
            assert!(worst < 0.25, "{policy:?} of {count}: {:?}", run.calls);
        }
    }
}

#[test]
fn weights_are_shares() {
    for (policy, tolerance) in [(BalancePolicy::RoundRobin, 0.02), (BalancePolicy::ConsistentHash, 0.1)] {
        let list = endpoints(4);
        list.iter().zip([1, 2, 3, 4]).for_each(|(endpoint, weight)| endpoint.set_weight(weight));
        let set = set(list, policy);
        let now = Instant::now();
        let mut calls = [0_usize; 4];
        for key in 0..20_000 {
            let endpoint = set.select(&[], Pick { now, hash: mix(key) }).expect("an endpoint");
            calls[set.list().iter().position(|other| Arc::ptr_eq(other, endpoint)).expect("one of the set")] += 1;
        }
        for (index, calls) in calls.into_iter().enumerate() {
            let expected = 2_000.0 * (index + 1) as f64;
            assert!((calls as f64 / expected - 1.0).abs() < tolerance, "{policy:?} {index}: {calls}");
        }
    }
}

#[test]
fn joining_and_leaving_endpoints_move_few_keys() {
    const KEYS: u64 = 20_000;
    for count in [2, 5, 10, 50] {
        let all = endpoints(count + 1);
        let now = Instant::now();
        let choose = |list: &[Arc<Endpoint>]| -> Vec<Arc<str>> {
            let set = set(list.to_vec(), BalancePolicy::ConsistentHash);
            let name = |key| Arc::clone(&set.select(&[], Pick { now, hash: mix(key) }).expect("an endpoint").name);
            (0..KEYS).map(name).collect()
        };
        let (before, after) = (choose(&all[..count]), choose(&all));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / KEYS as f64;
        assert!(moved <= 1.2 / (count + 1) as f64, "{count}: {moved} of the keys moved");
        let joined = &all[count].name;
        assert!(before.iter().zip(&after).all(|(a, b)| a == b || b == joined), "{count}: keys moved between others");
    }
}

#[test]
fn load_of_one_key_is_bounded_and_spills_over() {
    let set = set(endpoints(5), BalancePolicy::ConsistentHash);
    let now = Instant::now();
    let mut guards = Vec::new();
    for _ in 0..100 {
        let endpoint = set.select(&[], Pick { now, hash: 7 }).expect("an endpoint");
        guards.push(InFlightGuard::new(Arc::clone(endpoint)));
    }
    let most = set.list().iter().map(|endpoint| endpoint.in_flight()).max().expect("endpoints");
    assert!(most <= 26, "{most}: 1.25 times the mean of 20, rounded up");
}

#[test]
fn share_of_a_joining_endpoint_grows_in_its_slow_start() {
    let list = endpoints(4);
    let slow_start = Duration::from_secs(10);
    let balance = BalanceConfig { policy: BalancePolicy::RoundRobin, slow_start };
    let set = EndpointSet::new(list, balance, 0.5);
    let start = Instant::now();
    set.list()[2].begin_slow_start(start);
    let share = |after: Duration| {
        let pick = Pick { now: start + after, hash: 0 };
        let chosen = (0..4_000).filter(|_| Arc::ptr_eq(set.select(&[], pick).expect("one"), &set.list()[2])).count();
        chosen as f64 / 4_000.0
    };
    let shares = [0, 5, 10].map(|seconds| share(Duration::from_secs(seconds)));
    let expected = [0.1 / 3.1, 0.5 / 3.5, 0.25];
    assert!(shares.iter().zip(expected).all(|(share, expected)| (share - expected).abs() < 0.01), "{shares:?}");
}

const POLICIES: [(BalancePolicy, &str); 4] = [
    (BalancePolicy::RoundRobin, "round-robin"),
    (BalancePolicy::LeastRequest, "least-request"),
    (BalancePolicy::Ewma, "ewma"),
    (BalancePolicy::ConsistentHash, "consistent-hash"),
];

/// The part of the keys that move when an endpoint joins `count` others.
fn moved(count: usize) -> f64 {
    const KEYS: u64 = 20_000;
    let (all, now) = (endpoints(count + 1), Instant::now());
    let choose = |list: &[Arc<Endpoint>]| -> Vec<Arc<str>> {
        let set = set(list.to_vec(), BalancePolicy::ConsistentHash);
        (0..KEYS).map(|key| Arc::clone(&set.select(&[], Pick { now, hash: mix(key) }).expect("one").name)).collect()
    };
    let (before, after) = (choose(&all[..count]), choose(&all));
    before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / KEYS as f64
}

#[test]
fn policies_in_the_documentation_are_as_simulated() {
    let mut slow = [FAST; 10];
    slow[3].service = 10 * FAST.service;
    let mut failing = [FAST; 4];
    failing[1] = Server { service: Duration::from_micros(200), fails: true, ..FAST };
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let mut table = "| policy | calls of the slow endpoint | p50 ms | p90 ms | p99 ms | calls of the failing endpoint |\n|---|---|---|---|---|---|\n".to_owned();
    let mut curves = Vec::new();
    for (policy, name) in POLICIES {
        let (load, fail_load) = ((40_000, Duration::from_micros(400)), (40_000, Duration::from_micros(600)));
        let (slowed, failed) = (run(policy, &slow, load), run(policy, &failing, fail_load));
        let share = |calls: usize| 100.0 * calls as f64 / 40_000.0;
        let [p50, p90, p99] = [50, 90, 99].map(|percent| millis(slowed.percentile(percent)));
        table += &format!(
            "| `{name}` | {:.1} % | {p50:.0} | {p90:.0} | {p99:.0} | {:.1} % |\n",
            share(slowed.calls[3]),
            share(failed.calls[1])
        );
        curves
            .push((0..100).map(|percent| (f64::from(percent), millis(slowed.percentile(percent as usize)))).collect());
    }
    let counts = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
    let moves: Vec<(f64, f64)> = counts.iter().map(|count| (*count as f64, 100.0 * moved(*count))).collect();
    let ideal = counts.iter().map(|count| (*count as f64, 100.0 / (*count + 1) as f64)).collect();
    table += "\n| endpoints before one joins | keys that move | of the ideal |\n|---|---|---|\n";
    for (count, part) in &moves {
        table += &format!("| {count:.0} | {part:.1} % | {:.2} |\n", part * (count + 1.0) / 100.0);
        assert!(part * (count + 1.0) <= 120.0, "{count}: {part}");
    }
    picture::assert_table("balancing", &table);
    let panels = [
        Panel {
            title: "latency by percentile, one of ten endpoints ten times slower (ms)".to_owned(),
            across: ("%", 100.0),
            highest: 200.0,
            lines: curves,
        },
        Panel {
            title: "keys that move when an endpoint joins, and 1/n (%)".to_owned(),
            across: ("endpoints", 32.0),
            highest: 60.0,
            lines: vec![moves, ideal],
        },
    ];
    let title = (
        "Selection of endpoints",
        "Simulated with a virtual clock; no endpoint is ejected, so that selection alone is seen.",
    );
    let legend = POLICIES.map(|(_, name)| name);
    picture::assert_file("pictures/balancing.svg", &picture::draw(title, &legend, &panels));
}
