//! Owns the way to the cluster limit's bucket: the limiter's script, run on one shard of the default region.
//!
//! The bucket of a rule is the hash `tg:lease:{rule}`; which endpoint keeps it follows from the rule's name by rendezvous, so
//! that all nodes agree and rules spread. It has a connection and a breaker of its own: asking for tokens neither waits behind
//! reads nor stops because they fail.
//!
//! Refuses to retry: a script whose answer is lost may have run, and its tokens are then lost with it. Only the answer that the
//! server does not know the script is followed by the script itself, because then nothing has run.
//! Invariant: an ask ends within its deadline, and at most one script runs for it.

use crate::entry::Meta;
use crate::remote::{Cluster, Fault, Lane, Link};
use crate::store::{Keeper, Store};
use limiter::lease::{Ask, Grant, SCRIPT, Treasury, TreasuryError};
use redis::{Pipeline, ServerErrorKind, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The bucket of one rule. Belongs to the runtime that first asks.
pub struct RedisTreasury {
    ways: Ways,
    bucket: String,
    sha1: String,
    deadline: Duration,
    endpoint: String,
}

/// To the server that keeps the bucket.
enum Ways {
    One(Link),
    /// By place.
    Cluster {
        cluster: Arc<Cluster>,
        tag: String,
        links: Vec<Link>,
    },
}

impl RedisTreasury {
    /// The treasury of `rule`, if the store has shards for the default region.
    pub fn new<M: Meta>(store: &Store<M>, rule: &str, deadline: Duration) -> Option<Self> {
        let keeper = store.keeper(rule)?;
        let endpoint = match &keeper {
            Keeper::Shard(shard) => shard.label().unwrap_or_default(),
            Keeper::Cluster(..) => "cluster".to_owned(),
        };
        let lane = Arc::new(Lane::new(format!("lease {rule} {endpoint}")));
        let ways = match keeper {
            Keeper::Shard(shard) => Ways::One(shard.link(lane)),
            Keeper::Cluster(cluster, places) => {
                let links = places.iter().map(|place| place.link(lane.clone())).collect();
                Ways::Cluster { cluster: cluster.clone(), tag: rule.to_owned(), links }
            }
        };
        Some(Self {
            ways,
            bucket: format!("tg:lease:{{{rule}}}"),
            sha1: redis::Script::new(SCRIPT).get_hash().to_owned(),
            deadline,
            endpoint,
        })
    }

    /// Host, port and database of the shard that keeps the bucket, or that a cluster does.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn run(&self, ask: &Ask) -> Result<Value, TreasuryError> {
        let began = Instant::now();
        let reply = self.send("EVALSHA", &self.sha1, ask, self.deadline).await?;
        let unknown = matches!(&reply, Value::ServerError(error) if error.kind() == Some(ServerErrorKind::NoScript));
        if !unknown {
            return Ok(reply);
        }
        let left = self.deadline.saturating_sub(began.elapsed());
        self.send("EVAL", SCRIPT, ask, left).await
    }

    async fn send(&self, command: &str, script: &str, ask: &Ask, within: Duration) -> Result<Value, TreasuryError> {
        let mut call = Pipeline::with_capacity(1);
        call.cmd(command).arg(script).arg(1).arg(&self.bucket);
        for argument in ask.arguments() {
            call.arg(argument);
        }
        let link = match &self.ways {
            Ways::One(link) => Some(link),
            Ways::Cluster { cluster, tag, links } => cluster.place_of_tag(tag).map(|place| &links[place]),
        };
        let Some(link) = link else { return Err(TreasuryError::Unavailable) };
        match link.ask(&call, within).await {
            Ok(mut replies) => replies.pop().ok_or(TreasuryError::Malformed),
            Err(Fault::Timeout) => Err(TreasuryError::Deadline),
            Err(_) => Err(TreasuryError::Unavailable),
        }
    }
}

impl Treasury for RedisTreasury {
    async fn withdraw(&self, ask: Ask) -> Result<Grant, TreasuryError> {
        let numbers = match self.run(&ask).await? {
            Value::Array(values) => values,
            Value::ServerError(_) => return Err(TreasuryError::Unavailable),
            _ => return Err(TreasuryError::Malformed),
        };
        let mut reply = [0; 4];
        if numbers.len() != reply.len() {
            return Err(TreasuryError::Malformed);
        }
        for (place, value) in reply.iter_mut().zip(numbers) {
            let Value::Int(number) = value else { return Err(TreasuryError::Malformed) };
            *place = number;
        }
        Grant::parse(&reply)
    }
}
