//! CPU cost of a fleet's lease requests on one core of Redis, for docs/adr/0009: every node
//! requests as often as a busy one, for 3 s. Run it alone on a quiet machine: `cargo bench -p shard
//! --bench fleet`.

#[path = "../tests/server/mod.rs"]
mod server;

use limiter::lease::{LEASE_SCRIPT, LeaseRequest};
use limiter::{Quota, Rate};
use server::Server;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

fn main() {
    let rate = Rate::new(100_000, 1).expect("a rate");
    let quota = Quota::new(rate, NonZeroU32::new(100_000).expect("not zero")).expect("a quota");
    let request = LeaseRequest {
        node: 0,
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
    };
    for nodes in [1_u64, 20, 100, 300, 500, 1_000] {
        let server = Server::start();
        let mut connection = server.connect();
        let script = redis::Script::new(LEASE_SCRIPT);
        let _sha: String = redis::cmd("SCRIPT").arg("LOAD").arg(LEASE_SCRIPT).query(&mut connection).unwrap();
        let began = Instant::now();
        let interval = Duration::from_micros((100 * nodes).clamp(20_000, 100_000));
        let mut requests = 0;
        for round in 1.. {
            if began.elapsed() > Duration::from_secs(3) {
                break;
            }
            let mut batch = redis::pipe();
            for node in 0..nodes {
                let uptime_micros = u64::try_from(began.elapsed().as_micros()).unwrap();
                let request = LeaseRequest { node, uptime_micros, ..request };
                let call = batch.cmd("EVALSHA").arg(script.get_hash()).arg(1).arg("bucket");
                request.arguments().into_iter().for_each(|argument| _ = call.arg(argument));
                requests += 1;
            }
            let _grants: Vec<Vec<i64>> = batch.query(&mut connection).unwrap();
            std::thread::sleep((round * interval).saturating_sub(began.elapsed()));
        }
        let elapsed = began.elapsed();
        let stats: String = redis::cmd("INFO").arg("commandstats").query(&mut connection).unwrap();
        let evalsha = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).expect("it was called");
        let micros = evalsha.split(['=', ',']).nth(3).and_then(|usec| usec.parse::<f64>().ok()).expect("usec");
        println!(
            "{nodes} nodes: {:.0} requests a second, {:.1} us each, {:.1} % of a core",
            f64::from(requests) / elapsed.as_secs_f64(),
            micros / f64::from(requests),
            micros / 10_000.0 / elapsed.as_secs_f64()
        );
    }
}
