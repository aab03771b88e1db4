//! What a fleet's asks for tokens cost one core of Redis, for docs/adr/0009: every node asks as often as a busy one does, for
//! 3 s. Run it alone on a quiet machine: `cargo bench -p shard --bench fleet`.

#[path = "../tests/server/mod.rs"]
mod server;

use limiter::lease::{Ask, SCRIPT};
use limiter::{Quota, Rate};
use server::Server;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

fn main() {
    let rate = Rate::new(100_000, 1).expect("a rate");
    let quota = Quota::new(rate, NonZeroU32::new(100_000).expect("not zero")).expect("a quota");
    let ask = Ask {
        node: 0,
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
    };
    for nodes in [1_u64, 20, 100, 300, 500, 1_000] {
        let server = Server::start();
        let mut connection = server.spy();
        let script = redis::Script::new(SCRIPT);
        let _sha: String = redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT).query(&mut connection).unwrap();
        let began = Instant::now();
        let pace = Duration::from_micros((100 * nodes).clamp(20_000, 100_000));
        let mut asks = 0;
        for turn in 1.. {
            if began.elapsed() > Duration::from_secs(3) {
                break;
            }
            let mut round = redis::pipe();
            for node in 0..nodes {
                let uptime_micros = u64::try_from(began.elapsed().as_micros()).unwrap();
                let ask = Ask { node, uptime_micros, ..ask };
                let call = round.cmd("EVALSHA").arg(script.get_hash()).arg(1).arg("bucket");
                ask.arguments().into_iter().for_each(|argument| _ = call.arg(argument));
                asks += 1;
            }
            let _grants: Vec<Vec<i64>> = round.query(&mut connection).unwrap();
            std::thread::sleep((turn * pace).saturating_sub(began.elapsed()));
        }
        let took = began.elapsed();
        let stats: String = redis::cmd("INFO").arg("commandstats").query(&mut connection).unwrap();
        let evalsha = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).expect("it was called");
        let micros = evalsha.split(['=', ',']).nth(3).and_then(|usec| usec.parse::<f64>().ok()).expect("usec");
        println!(
            "{nodes} nodes: {:.0} asks a second, {:.1} us each, {:.1} % of a core",
            f64::from(asks) / took.as_secs_f64(),
            micros / f64::from(asks),
            micros / 10_000.0 / took.as_secs_f64()
        );
    }
}
