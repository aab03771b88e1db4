//! Owns the discovery of servers that move: the masters of a Redis Cluster and the master that
//! Sentinels report.
//!
//! Queries run every `REFRESH_INTERVAL`, and at once when a server reports that it does not hold a
//! key or is not a master. The first reply is used.
//!
//! Refuses to wait longer than `QUERY_TIMEOUT` for a server.

use super::address::{Dialer, ResolvedServer, ServerAddress};
use super::cluster::{RedisCluster, parse_cluster_slots};
use super::dial::{DialOptions, RedisConnection};
use super::fault::ShardFault;
use super::reply_limit::ReplyLimits;
use redis::{ConnectionAddr, Pipeline, Value, from_redis_value_ref};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
const QUERY_TIMEOUT: Duration = Duration::from_millis(500);

/// Lower bound between refreshes, however many servers trigger one.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_millis(50);

/// Of one reply: a cluster has at most 16,384 ranges of hash slots, each with a few servers.
const REPLY_BYTES_MAX: usize = 16 << 20;

/// The source of addresses.
pub(crate) enum TopologyDiscovery {
    Cluster(Arc<RedisCluster>),
    Sentinels {
        sentinels: Vec<ResolvedServer>,
        master: String,
        dialer: Box<Dialer>,
        address: Arc<ServerAddress>,
        rediscover: Arc<Notify>,
    },
}

impl TopologyDiscovery {
    /// Refreshes forever: at the interval, or when triggered.
    pub(crate) async fn run(&self) {
        let rediscover = match self {
            Self::Cluster(cluster) => &cluster.rediscover,
            Self::Sentinels { rediscover, .. } => rediscover,
        };
        loop {
            self.refresh().await;
            sleep(REFRESH_INTERVAL_MIN).await;
            let _triggered_or_due = timeout(REFRESH_INTERVAL, rediscover.notified()).await;
        }
    }

    async fn refresh(&self) {
        match self {
            Self::Cluster(cluster) => {
                let current = cluster.addresses.iter().filter_map(|address| address.current());
                let seeds = cluster.seeds.iter().map(|seed| Arc::new(seed.server()));
                for server in current.chain(seeds) {
                    let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) = &server.address else {
                        continue;
                    };
                    if let Ok(reply) = query(&server, &["CLUSTER", "SLOTS"]).await
                        && let Some(masters) = parse_cluster_slots(&reply, host)
                    {
                        return cluster.update_topology(&masters);
                    }
                }
            }
            Self::Sentinels { sentinels, master, dialer, address, .. } => {
                for sentinel in sentinels {
                    let reported = query(sentinel, &["SENTINEL", "get-master-addr-by-name", master]).await;
                    let reported =
                        reported.ok().and_then(|reply| from_redis_value_ref::<Option<(String, u16)>>(&reply).ok());
                    let Some(Some((host, port))) = reported else { continue };
                    let server = dialer.server_at(&host, port);
                    if address.current().is_none_or(|now| now.label != server.label) {
                        tracing::debug!(master, endpoint = server.label, "sentinel master moved");
                        address.set(Some(server));
                    }
                    return;
                }
            }
        }
    }
}

/// Queries over a new connection: an existing one might belong to a node that hangs.
async fn query(server: &ResolvedServer, command_words: &[&str]) -> Result<Value, ShardFault> {
    let exchange = async {
        let name = format!("{} topology", server.label).into();
        let options = DialOptions::new(name, ReplyLimits::per_reply(REPLY_BYTES_MAX));
        let mut connection = RedisConnection::open(server, options).await?;
        let mut command = Pipeline::with_capacity(1);
        command.cmd(command_words[0]).arg(&command_words[1..]);
        let reply = connection.send(&command).await?.into_iter().next().ok_or(ShardFault::Protocol)?;
        ShardFault::from_reply(&reply).map_or(Ok(reply), Err)
    };
    let result = timeout(QUERY_TIMEOUT, exchange).await.unwrap_or(Err(ShardFault::Timeout));
    if let Err(fault) = &result {
        tracing::debug!(endpoint = server.label, fault = fault.name(), "query of the topology failed");
    }
    result
}
