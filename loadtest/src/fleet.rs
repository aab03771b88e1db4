//! A fleet on one machine: gateways, one Redis server per region, an origin with versions, and a
//! fault proxy between each gateway and each Redis server. `watch` observes them while actions run;
//! `restarts` has two gateways without Redis. Both send their requests to a `rotation`.

mod node;
pub(crate) mod rotation;
pub(crate) mod watch;
pub(crate) mod restarts;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use crate::case::fake_clock::FakeClock;
use crate::case::gateway::CaseContext;
use crate::error::{LoadtestError, Result};
use crate::faults::plan::FaultPlan;
use crate::faults::proxy::FaultProxy;
use crate::fleet::node::{DrainEnd, FleetNode};
use crate::servers::redis_server::RedisServer;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const WAIT: Duration = Duration::from_secs(60);
/// Requests per second of the fleet's limit, and its burst.
pub(crate) const LIMIT: (f64, f64) = (100.0, 40.0);
/// Host of all requests: it is part of the cache key.
pub(crate) const HOST: &str = "fleet.example";

const CONFIG: &str = r#"
[server]
node = "@NODE@"
workers = 1
drain_idle = "2s"
drain_timeout = "5s"
[log]
access = "off"
[identity]
region = ["header:x-region"]
region_default = "r0"
[redis]
deadline = "1s"
nodes = @NODES@
secret = "fleet-secret-of-one-run"
@REGIONS@
[limits.fleet]
tier = "cluster"
rate = "100/s"
burst = 40
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "limited"
match = { path = "/limited/*" }
upstream = "origin"
limits = ["fleet"]
cache = { mode = "off" }
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "origin"
"#;

/// All processes of a fleet.
pub(crate) struct Fleet<'a> {
    context: CaseContext<'a>,
    regions: Vec<Option<RedisServer>>,
    region_addresses: Vec<SocketAddr>,
    pub(crate) nodes: Vec<FleetNode>,
    /// Of each node, to each region's Redis.
    proxies: Vec<Vec<FaultProxy>>,
    origin: ScriptedOrigin,
    pub(crate) version: Arc<AtomicU64>,
}

impl<'a> Fleet<'a> {
    pub(crate) fn start(context: CaseContext<'a>, (nodes, regions): (usize, usize)) -> Result<Self> {
        let version = Arc::new(AtomicU64::new(1));
        let shared = Arc::clone(&version);
        let origin = ScriptedOrigin::start(move |request| {
            let now = httpdate::fmt_http_date(SystemTime::now());
            let tag = request.target.rsplit('/').next().unwrap_or_default();
            OriginAnswer::ok(shared.load(Relaxed).to_string())
                .field("Cache-Control: max-age=600")
                .field(&format!("Date: {now}"))
                .field(&format!("Surrogate-Key: {tag}"))
        });
        let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
        let servers =
            (0..regions).map(|region| RedisServer::start(&format!("redis-r{region}"), context.tools, context.scratch));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let region_addresses = servers.iter().map(RedisServer::address).collect();
        let mut fleet = Fleet {
            context,
            regions: servers.into_iter().map(Some).collect(),
            region_addresses,
            nodes: Vec::new(),
            proxies: Vec::new(),
            origin,
            version,
        };
        for number in 0..nodes {
            fleet.prepare(number, nodes)?;
        }
        fleet.await_whole()?;
        Ok(fleet)
    }

    fn prepare(&mut self, number: usize, nodes: usize) -> Result<()> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let proxy = |upstream: &SocketAddr| FaultProxy::start(any, *upstream, (FaultPlan::default(), number as u64));
        let proxies = self.region_addresses.iter().map(proxy).collect::<std::io::Result<Vec<_>>>();
        let proxies = proxies.map_err(LoadtestError::io("a fault proxy does not start"))?;
        let region = |(number, proxy): (usize, &FaultProxy)| {
            format!("[redis.regions.r{number}]\nendpoints = [\"redis://{}\"]\n", proxy.address())
        };
        let regions: String = proxies.iter().enumerate().map(region).collect();
        let config = CONFIG
            .replace("@NODES@", &nodes.to_string())
            .replace("@REGIONS@", &regions)
            .replace("@ORIGIN@", &self.origin.address.to_string());
        let mut node = FleetNode::new(number, &config)?;
        node.clock = FakeClock::new(self.context.scratch, &node.name, self.context.tidegate).ok();
        node.start(&self.context)?;
        self.nodes.push(node);
        self.proxies.push(proxies);
        Ok(())
    }

    /// Ends a gateway with SIGTERM, waits for its drain, and starts it again.
    pub(crate) fn restart_node(&mut self, number: usize) -> Result<()> {
        let node = &mut self.nodes[number];
        if node.stop()? == DrainEnd::Missing {
            return Err(LoadtestError::Load(format!("{} does not end after SIGTERM", node.name)));
        }
        node.start(&self.context)
    }

    /// Kills the Redis server of a region.
    pub(crate) fn lose_region(&mut self, region: usize) {
        self.regions[region] = None;
    }

    /// Starts it again, empty, at its address.
    pub(crate) fn restore_region(&mut self, region: usize) -> Result<()> {
        let (tools, scratch) = (self.context.tools, self.context.scratch);
        let (name, address) = (format!("redis-r{region}-again"), self.region_addresses[region]);
        self.regions[region] = Some(RedisServer::start_at(&name, address, (tools, scratch))?);
        Ok(())
    }

    /// Sets the faults between a gateway and all Redis servers.
    pub(crate) fn set_faults(&self, node: usize, faults: &str) -> Result<()> {
        let plan = FaultPlan::parse(faults).map_err(LoadtestError::Usage)?;
        self.proxies[node].iter().for_each(|proxy| proxy.set_plan(plan.clone()));
        Ok(())
    }

    /// Waits until no gateway reports a degraded part; `false` after a while.
    pub(crate) fn await_whole(&self) -> Result<bool> {
        let mut is_whole = true;
        for gateway in self.nodes.iter().filter_map(|node| node.gateway.as_ref()) {
            is_whole &= gateway.await_whole(WAIT)?;
        }
        Ok(is_whole)
    }
}
