//! Owns the search for servers that move: the masters of a Redis Cluster, the master that Sentinels name.
//!
//! They are asked every `LOOK_EVERY`, and at once when a server says that it is the wrong one. Whoever answers first is believed.
//!
//! Refuses to wait for one that does not answer longer than `ASK_WITHIN`.

use super::cluster::{Cluster, masters};
use super::fault::Fault;
use super::site::{Dialer, Site};
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, Pipeline, Value, from_redis_value_ref};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const LOOK_EVERY: Duration = Duration::from_secs(1);
const ASK_WITHIN: Duration = Duration::from_millis(500);

/// Not more often, however many servers say that they are wrong.
const REST: Duration = Duration::from_millis(50);

/// What is looked for.
pub(crate) enum Scout {
    Cluster(Arc<Cluster>),
    Sentinels { sentinels: Vec<Client>, master: String, dialer: Box<Dialer>, site: Arc<Site>, call: Arc<Notify> },
}

impl Scout {
    /// Looks for ever; at once when it is called.
    pub(crate) async fn run(&self) {
        let called = match self {
            Self::Cluster(cluster) => &cluster.call,
            Self::Sentinels { call, .. } => call,
        };
        loop {
            self.look().await;
            sleep(REST).await;
            let _called_or_due = timeout(LOOK_EVERY, called.notified()).await;
        }
    }

    async fn look(&self) {
        match self {
            Self::Cluster(cluster) => {
                let known: Vec<_> = cluster.sites.iter().filter_map(|site| site.now()).collect();
                let seeds = cluster.seeds.iter().filter_map(|seed| seed.spot().ok());
                let clients = known.iter().map(|spot| spot.client.clone()).chain(seeds.map(|spot| spot.client));
                for client in clients {
                    let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) =
                        client.get_connection_info().addr().clone()
                    else {
                        continue;
                    };
                    if let Ok(reply) = ask(&client, &["CLUSTER", "SLOTS"]).await
                        && let Some(masters) = masters(&reply, &host)
                    {
                        return cluster.learn(&masters);
                    }
                }
            }
            Self::Sentinels { sentinels, master, dialer, site, .. } => {
                for sentinel in sentinels {
                    let named = ask(sentinel, &["SENTINEL", "get-master-addr-by-name", master]).await;
                    let named = named.ok().and_then(|reply| from_redis_value_ref::<Option<(String, u16)>>(&reply).ok());
                    let Some(Some((host, port))) = named else { continue };
                    let Ok(spot) = dialer.spot_at(&host, port) else { continue };
                    if site.now().is_none_or(|now| now.label != spot.label) {
                        tracing::debug!(master, endpoint = spot.label, "the master is elsewhere");
                        site.move_to(Some(spot));
                    }
                    return;
                }
            }
        }
    }
}

/// Asks on a connection of its own: one that was kept might be to a node that hangs.
async fn ask(client: &Client, words: &[&str]) -> Result<Value, Fault> {
    let exchange = async {
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let connected = client.get_multiplexed_async_connection_with_config(&config).await;
        let mut connection = connected.map_err(|error| Fault::of_connecting(&error))?;
        let mut command = Pipeline::with_capacity(1);
        command.cmd(words[0]).arg(&words[1..]);
        let replies = connection.send_packed_commands(&command, 0, 1).await.map_err(|error| Fault::of(&error))?;
        let reply = replies.into_iter().next().ok_or(Fault::Protocol)?;
        Fault::in_reply(&reply).map_or(Ok(reply), Err)
    };
    timeout(ASK_WITHIN, exchange).await.unwrap_or(Err(Fault::Timeout))
}
