//! The lease backend on a real Redis server: it grants tokens, agrees with the limiter's model, and
//! every request ends within its deadline.

use crate::server::{SLACK, Server, documented_acl, remote_config, store, store_on};
use limiter::lease::{LEASE_SCRIPT, LeaseBackend, LeaseBackendError, LeaseGrant, LeaseRequest, LeaseServerModel};
use limiter::{Quota, Rate};
use proptest::prelude::*;
use shard::RedisLeaseBackend;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_millis(100);

fn quota(rate: u64, burst: u32) -> Quota {
    Quota::new(Rate::new(rate, 1).unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn request(node: u64, quota: Quota) -> LeaseRequest {
    LeaseRequest {
        node,
        quota,
        expected_nodes: 1,
        requested: 100,
        returned: 0,
        held: 0,
        demand_millis: 1_000_000,
        ordinary_millis: 0,
        borrowed: 0,
        share_micros: 1_000_000,
        uptime_micros: 0,
        leaving: false,
    }
}

#[tokio::test]
async fn grants_tokens_and_reloads_a_flushed_script() {
    let server = Server::start();
    let backend = RedisLeaseBackend::new(&store_on(&server), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    assert_eq!(backend.acquire(request(1, quota)).await.unwrap().tokens, 0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let later = LeaseRequest { uptime_micros: 200_000, ..request(1, quota) };
    let () = redis::cmd("SCRIPT").arg("FLUSH").query(&mut server.connect()).unwrap();
    let began = Instant::now();
    let grant = backend.acquire(later).await.unwrap();
    println!("load and run: {:?}", began.elapsed());
    assert_eq!((grant.tokens, grant.nodes_seen), (100, Some(1)));
    let names: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut server.connect()).unwrap();
    assert_eq!(names, ["tg:lease:{cluster}"]);
}

#[tokio::test]
async fn requests_to_a_hung_or_stopped_server_fail_within_the_deadline() {
    let server = Server::start();
    let backend = RedisLeaseBackend::new(&store_on(&server), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    backend.acquire(request(1, quota)).await.unwrap();
    server.signal("STOP");
    let began = Instant::now();
    assert_eq!(backend.acquire(request(1, quota)).await, Err(LeaseBackendError::Deadline));
    assert!(began.elapsed() < DEADLINE + SLACK);
    for _ in 0..10 {
        let began = Instant::now();
        assert!(backend.acquire(request(1, quota)).await.is_err());
        assert!(began.elapsed() < DEADLINE + SLACK);
    }
    server.signal("CONT");
    let began = Instant::now();
    while backend.acquire(request(1, quota)).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(2), "the backend does not recover");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("back after {:?}", began.elapsed());
    server.stop();
    let began = Instant::now();
    assert_eq!(backend.acquire(request(1, quota)).await, Err(LeaseBackendError::Unavailable));
    assert!(began.elapsed() < DEADLINE + SLACK);
}

#[tokio::test]
async fn documented_acl_permits_the_script() {
    let server = Server::start();
    let url = server.create_user("tidegate", documented_acl());
    let backend = RedisLeaseBackend::new(&store(remote_config(&[("default", &[url])])), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    for millis in [0, 60, 120] {
        tokio::time::sleep(Duration::from_millis(60)).await;
        backend.acquire(LeaseRequest { uptime_micros: millis * 1_000, ..request(1, quota) }).await.unwrap();
    }
    backend.acquire(LeaseRequest { leaving: true, ..request(1, quota) }).await.unwrap();
}

/// The hash contains fields of an earlier layout and of none.
#[tokio::test]
async fn fields_of_another_layout_are_ignored() {
    let server = Server::start();
    let key = "tg:lease:{cluster}";
    let mut put = redis::cmd("HSET");
    put.arg(key).arg("at").arg(1).arg("n1").arg(vec![7; 40]).arg("n2").arg(vec![7; 48]).arg("bucket").arg("-1");
    let () = put.query(&mut server.connect()).unwrap();
    let backend = RedisLeaseBackend::new(&store_on(&server), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    assert_eq!(backend.acquire(request(1, quota)).await.unwrap().tokens, 0);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let later = backend.acquire(LeaseRequest { uptime_micros: 100_000, ..request(1, quota) }).await.unwrap();
    assert_eq!((later.tokens, later.nodes_seen), (100, Some(1)));
    let mut fields: Vec<String> = redis::cmd("HKEYS").arg(key).query(&mut server.connect()).unwrap();
    fields.sort();
    assert_eq!(fields, ["bucket", "n1"]);
}

/// The script with the time as two additional arguments, and a separate bucket for every run.
struct ScriptRunner {
    connection: redis::Connection,
    script: redis::Script,
    runs: u32,
}

impl ScriptRunner {
    fn grant(&mut self, request: &LeaseRequest, now_micros: u64) -> LeaseGrant {
        let mut call = self.script.key(format!("bucket {}", self.runs));
        for argument in request.arguments() {
            call.arg(argument);
        }
        let reply: Vec<i64> =
            call.arg(now_micros / 1_000_000).arg(now_micros % 1_000_000).invoke(&mut self.connection).unwrap();
        LeaseGrant::parse(&reply).unwrap()
    }
}

/// A request of some node, sent this long after the previous one.
#[derive(Debug, Clone)]
struct Step {
    after_micros: u64,
    /// Jump of the Redis clock, forward or back.
    jump_micros: i64,
    /// Lag of the caller's own clock.
    lag_micros: u64,
    request: LeaseRequest,
}

fn step(quota: Quota, expected_nodes: u32) -> impl Strategy<Value = Step> {
    let after = prop_oneof![8 => 0u64..60_000, 2 => 0u64..2_000_000, 1 => 0u64..60_000_000];
    let jump = prop_oneof![20 => Just(0i64), 1 => -3_600_000_000..3_600_000_000i64];
    let demand = (0u64..200_000_000, prop_oneof![Just(0u64), 0u64..200_000_000]);
    let amounts = (0u64..3_000, 0u64..50, 0u64..1_000, demand);
    let lag = prop_oneof![8 => 0u64..5_000, 1 => 0u64..3_000_000, 1 => 0u64..60_000_000];
    let past = (prop_oneof![4 => Just(0u64), 1 => 0..50_000u64], 0u64..100_000_000_000, lag);
    (after, jump, 1u64..7, amounts, past, prop::bool::weighted(0.05)).prop_map(
        move |(after_micros, jump_micros, node, amounts, past, leaving)| {
            let (requested, returned, held, (demand_millis, ordinary_millis)) = amounts;
            let (borrowed, share_micros, lag_micros) = past;
            let request =
                LeaseRequest { requested, returned, held, demand_millis, ordinary_millis, ..request(node, quota) };
            let request = LeaseRequest { expected_nodes, borrowed, share_micros, leaving, ..request };
            Step { after_micros, jump_micros, lag_micros, request }
        },
    )
}

fn history() -> impl Strategy<Value = Vec<Step>> {
    let rates = (1u64..100_000, prop_oneof![3 => Just(1u32), 1 => 1u32..4_000], 1u32..20_000, 1u32..8);
    rates.prop_flat_map(|(count, seconds, burst, expected_nodes)| {
        let burst = NonZeroU32::new(burst).expect("above zero");
        let rate = Rate::new(count, seconds).expect("a rate");
        // A burst that takes years to refill is rejected; a burst of one token never is.
        let quota = Quota::new(rate, burst).or_else(|_| Quota::new(rate, NonZeroU32::MIN)).expect("a quota");
        prop::collection::vec(step(quota, expected_nodes), 1..60)
    })
}

/// Many short histories of up to six nodes, run against the model and against the script on a real
/// server.
#[test]
fn script_agrees_with_the_limiters_model() {
    let server = Server::start();
    let timed = LEASE_SCRIPT.replace("redis.call('TIME')", "{ ARGV[15], ARGV[16] }");
    assert_ne!(timed, LEASE_SCRIPT, "the script does not take its time from Redis");
    let script_runner = ScriptRunner { connection: server.connect(), script: redis::Script::new(&timed), runs: 0 };
    let script_runner = std::cell::RefCell::new(script_runner);
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in history())| {
        let (mut model, mut script_runner) = (LeaseServerModel::default(), script_runner.borrow_mut());
        let (mut now, mut elapsed) = (1_700_000_000_000_000_u64, 0);
        script_runner.runs += 1;
        for step in steps {
            elapsed += step.after_micros;
            now = (now + step.after_micros).saturating_add_signed(step.jump_micros);
            let request = LeaseRequest { uptime_micros: elapsed.saturating_sub(step.lag_micros), ..step.request };
            prop_assert_eq!(script_runner.grant(&request, now), model.handle(&request, now), "{:?}", step);
        }
    });
}
