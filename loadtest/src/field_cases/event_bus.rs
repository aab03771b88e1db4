//! Case `event-bus`: purges to all gateways and to one, with one gateway cut off from Redis, and
//! their replay.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::faults::plan::FaultPlan;
use crate::faults::proxy::FaultProxy;
use crate::interrupt::wait_for;
use crate::servers::redis_server::RedisServer;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const NODES: usize = 3;
const WAIT: Duration = Duration::from_secs(20);

const CONFIG: &str = r#"
[log]
access = "off"
[redis]
deadline = "1s"
secret = "field-case-secret"
[redis.regions.default]
endpoints = ["redis://@REDIS@"]
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "origin"
"#;

/// Three gateways, each with a fault proxy before the Redis that they share.
struct Bus {
    _redis: RedisServer,
    proxies: Vec<FaultProxy>,
    gateways: Vec<CaseGateway>,
    origin: ScriptedOrigin,
    version: Arc<AtomicU64>,
}

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let bus = Bus::start(context)?;
    let rounds = context.pick(10, 200);
    let mut report = CaseReport::new(format!(
        "{NODES} gateways share a Redis server. {rounds} purges of a tag go to all, then one to a single node. The third gateway is cut \
         off from Redis, another purge is ordered, and the partition ends. After each purge the origin has a new version."
    ));
    bus.fill("/a")?;
    let (mut stale, mut incomplete, mut slowest) = (0, 0, Duration::ZERO);
    for _ in 0..rounds {
        let began = Instant::now();
        let (status, _) = bus.change_and_purge("tag=a")?;
        slowest = slowest.max(began.elapsed());
        incomplete += usize::from(status != 200);
        stale += bus.stale("/a", 0..NODES)?;
    }
    report.check(
        "each purge is acknowledged by all nodes",
        (format!("{incomplete} of {rounds} incomplete, the slowest took {} ms", slowest.as_millis()), incomplete == 0),
    );
    report.check(
        "after it, no gateway responds with an older version",
        (format!("{stale} of {} responses", rounds * NODES), stale == 0),
    );
    bus.unicast(&mut report)?;
    bus.partition(&mut report)?;
    Ok(report)
}

impl Bus {
    fn start(context: &CaseContext<'_>) -> Result<Self> {
        let redis = RedisServer::start("redis-event-bus", context.tools, context.scratch)?;
        let version = Arc::new(AtomicU64::new(1));
        let shared = Arc::clone(&version);
        let origin = ScriptedOrigin::start(move |request| {
            let tag = request.target.trim_start_matches('/').to_owned();
            OriginAnswer::ok(format!("{}", shared.load(Relaxed)))
                .field("Cache-Control: max-age=600")
                .field(&format!("Surrogate-Key: {tag}"))
        });
        let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
        let (mut proxies, mut gateways) = (Vec::new(), Vec::new());
        for node in 0..NODES {
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let proxy = FaultProxy::start(any, redis.address(), (FaultPlan::default(), node as u64));
            let proxy = proxy.map_err(LoadtestError::io("the fault proxy does not start"))?;
            let config = CONFIG
                .replace("@REDIS@", &proxy.address().to_string())
                .replace("@ORIGIN@", &origin.address.to_string());
            gateways.push(CaseGateway::start(context, &format!("bus-{node}"), &config)?);
            proxies.push(proxy);
        }
        for gateway in &gateways {
            gateway.await_whole(WAIT)?;
        }
        Ok(Bus { _redis: redis, proxies, gateways, origin, version })
    }

    /// The version that a gateway responds with.
    fn version_at(&self, node: usize, path: &str) -> Result<u64> {
        // The same host at all nodes: it is part of the key.
        let request = format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n\r\n");
        let response = self.gateways[node].client().send(request.as_bytes());
        let response = response.map_err(LoadtestError::io("a gateway does not respond"))?;
        Ok(String::from_utf8_lossy(&response.body).parse().unwrap_or(0))
    }

    fn fill(&self, path: &str) -> Result<()> {
        (0..NODES).try_for_each(|node| self.version_at(node, path).map(drop))
    }

    /// A new version at the origin, then a purge ordered at the first gateway.
    fn change_and_purge(&self, query: &str) -> Result<(u16, Value)> {
        self.version.fetch_add(1, Relaxed);
        self.gateways[0].purge(query)
    }

    /// Responses of `nodes` that are older than the origin's version.
    fn stale(&self, path: &str, nodes: std::ops::Range<usize>) -> Result<usize> {
        let newest = self.version.load(Relaxed);
        let mut stale = 0;
        for node in nodes {
            stale += usize::from(self.version_at(node, path)? != newest);
        }
        Ok(stale)
    }

    /// A purge of one node removes its local copy only.
    fn unicast(&self, report: &mut CaseReport) -> Result<()> {
        self.fill("/b")?;
        // Twice, so that each has a local copy.
        self.fill("/b")?;
        let before: Vec<f64> = self.messages()?;
        let (status, reply) = self.gateways[0].purge("tag=b&node=bus-1")?;
        let reached = || {
            let after = self.messages()?;
            Ok((after[1] > before[1]).then_some(after))
        };
        let after = wait_for(WAIT, reached)?.unwrap_or_default();
        let others = after.len() == NODES && after[2] == before[2];
        report.check(
            "a purge of one node is acknowledged by it and reaches no other",
            (
                format!("status {status}, {}", reply["acknowledged_nodes"]),
                status == 200 && reply["acknowledged_nodes"] == serde_json::json!(["bus-1"]) && others,
            ),
        );
        Ok(())
    }

    fn messages(&self) -> Result<Vec<f64>> {
        self.gateways.iter().map(|gateway| gateway.metric("tidegate_bus_messages_total{kind=\"purge\"}")).collect()
    }

    fn partition(&self, report: &mut CaseReport) -> Result<()> {
        self.fill("/a")?;
        self.proxies[2].set_plan(FaultPlan::parse("hang").map_err(LoadtestError::Usage)?);
        let (status, reply) = self.change_and_purge("tag=a")?;
        let stale = self.stale("/a", 0..2)?;
        report.check(
            "during the partition, the purge takes effect on the nodes that are connected and names the one that is not",
            (format!("{stale} stale, status {status}, unacknowledged {}", reply["unacknowledged_nodes"]), stale == 0 && status == 202 && reply["unacknowledged_nodes"] == serde_json::json!(["bus-2"])),
        );
        let cut_off = self.version_at(2, "/a")?;
        report.check("the node that is cut off goes on responding", (format!("version {cut_off}"), cut_off > 0));
        self.proxies[2].set_plan(FaultPlan::default());
        let began = Instant::now();
        let is_new = || Ok((self.stale("/a", 2..3)? == 0).then_some(()));
        let replayed = wait_for(WAIT, is_new)?;
        report.check(
            "after the partition it applies the purge that it missed",
            (
                replayed.map_or("no".to_owned(), |()| format!("within {:.1} s", began.elapsed().as_secs_f64())),
                replayed.is_some(),
            ),
        );
        // The later responses are as new.
        let stale = self.stale("/a", 0..NODES)?;
        report.check(
            "and no gateway responds with an older version again",
            (format!("{stale} of {NODES}, {} requests at the origin in all", self.origin.requests()), stale == 0),
        );
        Ok(())
    }
}
