//! Owns the discovery of servers that move: the masters of a Redis Cluster and the master that
//! Sentinels report.
//!
//! Queries run every `REFRESH_INTERVAL`, and at once when a server reports that it does not hold a
//! key or is not a master. The first reply is used.
//!
//! Refuses to wait longer than `QUERY_TIMEOUT` for a server.

use super::address::{Dialer, ServerAddress};
use super::cluster::{RedisCluster, parse_cluster_slots};
use super::fault::ShardFault;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, Pipeline, Value, from_redis_value_ref};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
const QUERY_TIMEOUT: Duration = Duration::from_millis(500);

/// Lower bound between refreshes, however many servers trigger one.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_millis(50);

/// The source of addresses.
pub(crate) enum TopologyDiscovery {
    Cluster(Arc<RedisCluster>),
    Sentinels {
        sentinels: Vec<Client>,
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
                let current: Vec<_> = cluster.addresses.iter().filter_map(|address| address.current()).collect();
                let seeds = cluster.seeds.iter().filter_map(|seed| seed.server().ok());
                let clients =
                    current.iter().map(|server| server.client.clone()).chain(seeds.map(|server| server.client));
                for client in clients {
                    let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) =
                        client.get_connection_info().addr().clone()
                    else {
                        continue;
                    };
                    if let Ok(reply) = query(&client, &["CLUSTER", "SLOTS"]).await
                        && let Some(masters) = parse_cluster_slots(&reply, &host)
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
                    let Ok(server) = dialer.server_at(&host, port) else { continue };
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
async fn query(client: &Client, command_words: &[&str]) -> Result<Value, ShardFault> {
    let exchange = async {
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let connected = client.get_multiplexed_async_connection_with_config(&config).await;
        let mut connection = connected.map_err(|error| ShardFault::from_connect_error(&error))?;
        let mut command = Pipeline::with_capacity(1);
        command.cmd(command_words[0]).arg(&command_words[1..]);
        let replies =
            connection.send_packed_commands(&command, 0, 1).await.map_err(|error| ShardFault::from_error(&error))?;
        let reply = replies.into_iter().next().ok_or(ShardFault::Protocol)?;
        ShardFault::from_reply(&reply).map_or(Ok(reply), Err)
    };
    timeout(QUERY_TIMEOUT, exchange).await.unwrap_or(Err(ShardFault::Timeout))
}
