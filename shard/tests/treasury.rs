//! The cluster limit's bucket in a real Redis: it grants, it agrees with the limiter's reference, and it never holds a caller.

mod server;

use limiter::lease::{Ask, Bank, Grant, SCRIPT, Treasury, TreasuryError};
use limiter::{Quota, Rate};
use proptest::prelude::*;
use server::{SLACK, Server, store_on};
use shard::RedisTreasury;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_millis(100);

fn quota(rate: u64, burst: u32) -> Quota {
    Quota::new(Rate::new(rate, 1).unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

fn ask(node: u64, quota: Quota) -> Ask {
    Ask {
        node,
        quota,
        expected: 1,
        wanted: 100,
        returned: 0,
        held: 0,
        demand_millis: 1_000_000,
        borrowed_micros: 0,
        leaving: false,
    }
}

#[tokio::test]
async fn it_grants_and_survives_a_server_that_forgot_the_script() {
    let server = Server::start();
    let treasury = RedisTreasury::new(&store_on(&server), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    assert_eq!(treasury.withdraw(ask(1, quota)).await.unwrap().tokens, 0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let () = redis::cmd("SCRIPT").arg("FLUSH").query(&mut server.spy()).unwrap();
    let began = Instant::now();
    let grant = treasury.withdraw(ask(1, quota)).await.unwrap();
    println!("load and run: {:?}", began.elapsed());
    assert_eq!((grant.tokens, grant.nodes_seen), (100, Some(1)));
    let names: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut server.spy()).unwrap();
    assert_eq!(names, ["tg:lease:{cluster}"]);
}

#[tokio::test]
async fn a_treasury_that_hangs_or_is_gone_answers_within_the_deadline_and_comes_back() {
    let server = Server::start();
    let treasury = RedisTreasury::new(&store_on(&server), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    treasury.withdraw(ask(1, quota)).await.unwrap();
    server.signal("STOP");
    let began = Instant::now();
    assert_eq!(treasury.withdraw(ask(1, quota)).await, Err(TreasuryError::Deadline));
    assert!(began.elapsed() < DEADLINE + SLACK);
    for _ in 0..10 {
        let began = Instant::now();
        assert!(treasury.withdraw(ask(1, quota)).await.is_err());
        assert!(began.elapsed() < DEADLINE + SLACK);
    }
    server.signal("CONT");
    let began = Instant::now();
    while treasury.withdraw(ask(1, quota)).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(2), "does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("back after {:?}", began.elapsed());
    server.stop();
    let began = Instant::now();
    assert_eq!(treasury.withdraw(ask(1, quota)).await, Err(TreasuryError::Unavailable));
    assert!(began.elapsed() < DEADLINE + SLACK);
}

/// The script with the time as two more arguments, and a bucket of its own for every run.
struct Scripted {
    connection: redis::Connection,
    script: redis::Script,
    runs: u32,
}

impl Scripted {
    fn grant(&mut self, ask: &Ask, now_micros: u64) -> Grant {
        let mut call = self.script.key(format!("bucket {}", self.runs));
        for argument in ask.arguments() {
            call.arg(argument);
        }
        let reply: Vec<i64> =
            call.arg(now_micros / 1_000_000).arg(now_micros % 1_000_000).invoke(&mut self.connection).unwrap();
        Grant::parse(&reply).unwrap()
    }
}

#[derive(Debug, Clone)]
struct Step {
    after_micros: u64,
    node: u64,
    wanted: u64,
    returned: u64,
    held: u64,
    demand_millis: u64,
    borrowed_micros: u64,
    leaving: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let after = prop_oneof![8 => 0u64..60_000, 2 => 0u64..2_000_000, 1 => 0u64..60_000_000];
    let amounts =
        (0u64..3_000, 0u64..50, 0u64..1_000, 0u64..200_000_000, prop_oneof![4 => Just(0u64), 1 => 0..50_000_000u64]);
    (after, 1u64..5, amounts, prop::bool::weighted(0.05)).prop_map(|(after_micros, node, amounts, leaving)| {
        let (wanted, returned, held, demand_millis, borrowed_micros) = amounts;
        Step { after_micros, node, wanted, returned, held, demand_millis, borrowed_micros, leaving }
    })
}

/// Many short histories of up to five nodes, on the reference and on the script in a real server.
#[test]
fn the_script_agrees_with_the_limiters_reference() {
    let server = Server::start();
    let timed = SCRIPT.replace("redis.call('TIME')", "{ ARGV[12], ARGV[13] }");
    assert_ne!(timed, SCRIPT, "the script does not take its time from Redis");
    let scripted = Scripted { connection: server.spy(), script: redis::Script::new(&timed), runs: 0 };
    let scripted = std::cell::RefCell::new(scripted);
    let histories = (1u64..100_000, 1u32..20_000, 1u32..8, prop::collection::vec(step(), 1..60));
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |((rate, burst, expected, steps) in histories)| {
        let (mut bank, mut scripted, mut now) = (Bank::default(), scripted.borrow_mut(), 1_700_000_000_000_000);
        scripted.runs += 1;
        for step in steps {
            now += step.after_micros;
            let Step { node, wanted, returned, held, demand_millis, borrowed_micros, leaving, .. } = step;
            let quota = quota(rate, burst);
            let ask = Ask { node, quota, expected, wanted, returned, held, demand_millis, borrowed_micros, leaving };
            prop_assert_eq!(scripted.grant(&ask, now), bank.withdraw(&ask, now), "{:?}", ask);
        }
    });
}
