//! The cluster limit's bucket in a real Redis: it grants, it agrees with the limiter's reference, and it never holds a caller.

mod server;

use limiter::lease::{Ask, Bank, Grant, SCRIPT, Treasury, TreasuryError};
use limiter::{Quota, Rate};
use proptest::prelude::*;
use server::{SLACK, Server, settings, store, store_on};
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
        ordinary_millis: 0,
        borrowed: 0,
        share_micros: 1_000_000,
        uptime_micros: 0,
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
    let later = Ask { uptime_micros: 200_000, ..ask(1, quota) };
    let () = redis::cmd("SCRIPT").arg("FLUSH").query(&mut server.spy()).unwrap();
    let began = Instant::now();
    let grant = treasury.withdraw(later).await.unwrap();
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

#[tokio::test]
async fn a_user_that_may_do_what_the_documentation_says_can_run_the_script() {
    let documented = include_str!("../../docs/purging.md");
    let rules =
        documented.lines().find_map(|line| line.trim().strip_prefix("ACL SETUSER tidegate ")).expect("it is there");
    let server = Server::start();
    let mut command = redis::cmd("ACL");
    command.arg("SETUSER").arg("tidegate");
    rules.split_whitespace().for_each(|rule| _ = command.arg(rule.replace(">PASSWORD", ">secret")));
    let () = command.query(&mut server.spy()).unwrap();
    let url = format!("redis://tidegate:secret@127.0.0.1:{}", server.port());
    let treasury = RedisTreasury::new(&store(settings(&[("default", &[url])])), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    for millis in [0, 60, 120] {
        tokio::time::sleep(Duration::from_millis(60)).await;
        treasury.withdraw(Ask { uptime_micros: millis * 1_000, ..ask(1, quota) }).await.unwrap();
    }
    treasury.withdraw(Ask { leaving: true, ..ask(1, quota) }).await.unwrap();
}

/// Fields of an earlier layout, and of none.
#[tokio::test]
async fn what_is_not_of_this_layout_is_as_if_it_were_not_there() {
    let server = Server::start();
    let key = "tg:lease:{cluster}";
    let mut put = redis::cmd("HSET");
    put.arg(key).arg("at").arg(1).arg("n1").arg(vec![7; 40]).arg("n2").arg(vec![7; 48]).arg("bucket").arg("-1");
    let () = put.query(&mut server.spy()).unwrap();
    let treasury = RedisTreasury::new(&store_on(&server), "cluster", DEADLINE).unwrap();
    let quota = quota(50_000, 5_000);
    assert_eq!(treasury.withdraw(ask(1, quota)).await.unwrap().tokens, 0);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let later = treasury.withdraw(Ask { uptime_micros: 100_000, ..ask(1, quota) }).await.unwrap();
    assert_eq!((later.tokens, later.nodes_seen), (100, Some(1)));
    let mut fields: Vec<String> = redis::cmd("HKEYS").arg(key).query(&mut server.spy()).unwrap();
    fields.sort();
    assert_eq!(fields, ["bucket", "n1"]);
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

/// An ask of some node, so long after the one before.
#[derive(Debug, Clone)]
struct Step {
    after_micros: u64,
    /// A clock of Redis that jumps, forward or back.
    jump_micros: i64,
    /// What the caller's own clock is late by.
    lag_micros: u64,
    ask: Ask,
}

fn step(quota: Quota, expected: u32) -> impl Strategy<Value = Step> {
    let after = prop_oneof![8 => 0u64..60_000, 2 => 0u64..2_000_000, 1 => 0u64..60_000_000];
    let jump = prop_oneof![20 => Just(0i64), 1 => -3_600_000_000..3_600_000_000i64];
    let demand = (0u64..200_000_000, prop_oneof![Just(0u64), 0u64..200_000_000]);
    let amounts = (0u64..3_000, 0u64..50, 0u64..1_000, demand);
    let lag = prop_oneof![8 => 0u64..5_000, 1 => 0u64..3_000_000, 1 => 0u64..60_000_000];
    let past = (prop_oneof![4 => Just(0u64), 1 => 0..50_000u64], 0u64..100_000_000_000, lag);
    (after, jump, 1u64..7, amounts, past, prop::bool::weighted(0.05)).prop_map(
        move |(after_micros, jump_micros, node, amounts, past, leaving)| {
            let (wanted, returned, held, (demand_millis, ordinary_millis)) = amounts;
            let (borrowed, share_micros, lag_micros) = past;
            let ask = Ask { wanted, returned, held, demand_millis, ordinary_millis, ..ask(node, quota) };
            let ask = Ask { expected, borrowed, share_micros, leaving, ..ask };
            Step { after_micros, jump_micros, lag_micros, ask }
        },
    )
}

fn history() -> impl Strategy<Value = Vec<Step>> {
    let rates = (1u64..100_000, prop_oneof![3 => Just(1u32), 1 => 1u32..4_000], 1u32..20_000, 1u32..8);
    rates.prop_flat_map(|(count, seconds, burst, expected)| {
        let burst = NonZeroU32::new(burst).expect("above zero");
        let rate = Rate::new(count, seconds).expect("a rate");
        // A burst that takes years to come back is refused; one token never does.
        let quota = Quota::new(rate, burst).or_else(|_| Quota::new(rate, NonZeroU32::MIN)).expect("a quota");
        prop::collection::vec(step(quota, expected), 1..60)
    })
}

/// Many short histories of up to six nodes, on the reference and on the script in a real server.
#[test]
fn the_script_agrees_with_the_limiters_reference() {
    let server = Server::start();
    let timed = SCRIPT.replace("redis.call('TIME')", "{ ARGV[15], ARGV[16] }");
    assert_ne!(timed, SCRIPT, "the script does not take its time from Redis");
    let scripted = Scripted { connection: server.spy(), script: redis::Script::new(&timed), runs: 0 };
    let scripted = std::cell::RefCell::new(scripted);
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in history())| {
        let (mut bank, mut scripted) = (Bank::default(), scripted.borrow_mut());
        let (mut now, mut passed) = (1_700_000_000_000_000_u64, 0);
        scripted.runs += 1;
        for step in steps {
            passed += step.after_micros;
            now = (now + step.after_micros).saturating_add_signed(step.jump_micros);
            let ask = Ask { uptime_micros: passed.saturating_sub(step.lag_micros), ..step.ask };
            prop_assert_eq!(scripted.grant(&ask, now), bank.withdraw(&ask, now), "{:?}", step);
        }
    });
}
