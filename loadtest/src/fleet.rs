//! A fleet on one machine: gateways, one Redis server per region, an origin with versions, and a
//! fault proxy between each gateway and each Redis server. `watch` observes them while actions run;
//! `restarts` has two gateways without Redis.

pub(crate) mod watch;
pub(crate) mod restarts;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use crate::case::client::CaseClient;
use crate::case::fake_clock::FakeClock;
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::error::{LoadtestError, Result};
use crate::faults::plan::FaultPlan;
use crate::faults::proxy::FaultProxy;
use crate::servers::free_address::free_addresses;
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

/// One gateway, with what is needed to start it again.
pub(crate) struct FleetNode {
    pub(crate) name: String,
    addresses: [SocketAddr; 2],
    config: String,
    /// To each region's Redis.
    proxies: Vec<FaultProxy>,
    pub(crate) clock: Option<FakeClock>,
    pub(crate) gateway: Option<CaseGateway>,
}

/// All processes of a fleet.
pub(crate) struct Fleet<'a> {
    context: CaseContext<'a>,
    regions: Vec<Option<RedisServer>>,
    region_addresses: Vec<SocketAddr>,
    pub(crate) nodes: Vec<FleetNode>,
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
            origin,
            version,
        };
        let origin = fleet.origin.address;
        for number in 0..nodes {
            let node = fleet.prepare(number, nodes, origin)?;
            fleet.nodes.push(node);
            fleet.start_node(number)?;
        }
        fleet.await_whole()?;
        Ok(fleet)
    }

    fn prepare(&self, number: usize, nodes: usize, origin: SocketAddr) -> Result<FleetNode> {
        let name = format!("node-{number}");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let proxy = |upstream: &SocketAddr| FaultProxy::start(any, *upstream, (FaultPlan::default(), number as u64));
        let proxies = self.region_addresses.iter().map(proxy).collect::<std::io::Result<Vec<_>>>();
        let proxies = proxies.map_err(LoadtestError::io("a fault proxy does not start"))?;
        let region = |(number, proxy): (usize, &FaultProxy)| {
            format!("[redis.regions.r{number}]\nendpoints = [\"redis://{}\"]\n", proxy.address())
        };
        let regions: String = proxies.iter().enumerate().map(region).collect();
        let config = CONFIG
            .replace("@NODE@", &name)
            .replace("@NODES@", &nodes.to_string())
            .replace("@REGIONS@", &regions)
            .replace("@ORIGIN@", &origin.to_string());
        let clock = FakeClock::new(self.context.scratch, &name).ok();
        Ok(FleetNode { name, addresses: free_addresses()?, config, proxies, clock, gateway: None })
    }

    /// Starts a gateway at its addresses.
    pub(crate) fn start_node(&mut self, number: usize) -> Result<()> {
        let node = &mut self.nodes[number];
        let environment = node.clock.as_ref().map(FakeClock::environment).unwrap_or_default();
        let environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let start = (node.name.as_str(), node.addresses);
        node.gateway = Some(CaseGateway::start_at(&self.context, start, (&node.config, &environment))?);
        Ok(())
    }

    /// Ends a gateway with SIGTERM, waits for its drain, and starts it again.
    pub(crate) fn restart_node(&mut self, number: usize) -> Result<()> {
        if let Some(gateway) = &mut self.nodes[number].gateway {
            gateway.signal("TERM")?;
            if gateway.await_end(WAIT)?.is_none() {
                return Err(LoadtestError::Load(format!("{} does not end after SIGTERM", gateway.name)));
            }
        }
        self.start_node(number)
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
        self.nodes[node].proxies.iter().for_each(|proxy| proxy.set_plan(plan.clone()));
        Ok(())
    }

    /// Listeners of the gateways.
    pub(crate) fn listeners(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.addresses[0]).collect()
    }

    pub(crate) fn admins(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.addresses[1]).collect()
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

/// Whether a gateway takes part in the rotation of a load balancer.
pub(crate) fn is_ready(admin: SocketAddr) -> bool {
    CaseClient::new(admin).get("/ready", "").is_ok_and(|response| response.status == 200)
}
