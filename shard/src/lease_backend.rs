//! Owns access to the bucket of a cluster limit: runs the limiter's script on one shard of the
//! default region.
//!
//! The bucket of a rule is the hash `tg:lease:{rule}`. Its endpoint is chosen by rendezvous hashing
//! of the rule's name, so that all nodes agree and rules spread over endpoints. The connection and
//! the breaker are separate from those of reads: lease requests neither queue behind reads nor stop
//! when reads fail.
//!
//! Refuses to retry: a script whose reply was lost may have run, and its tokens are then lost with
//! it. The only exception is the reply that the server does not know the script: nothing has run,
//! and the script itself is sent.
//! Invariant: a request ends within its deadline, and at most one script runs for it.

use crate::entry::EntryMeta;
use crate::remote::{OperationClass, RedisCluster, ShardConnection, ShardFault};
use crate::store::{BucketOwner, Store};
use limiter::lease::{LEASE_SCRIPT, LeaseBackend, LeaseBackendError, LeaseGrant, LeaseRequest};
use redis::{Pipeline, ServerErrorKind, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The lease backend of one rule: the key of its bucket, and connections to the server that holds
/// it. Its connections belong to the runtime that makes the first request.
pub struct RedisLeaseBackend {
    connection: BucketConnection,
    bucket: String,
    sha1: String,
    deadline: Duration,
    endpoint: String,
}

/// Connections to the server that holds the bucket.
enum BucketConnection {
    Server(ShardConnection),
    /// One connection per master index.
    Cluster {
        cluster: Arc<RedisCluster>,
        tag: String,
        connections: Vec<ShardConnection>,
    },
}

/// A command that runs the script, and its first argument: the script or its hash.
struct ScriptCall<'a> {
    command: &'static str,
    script: &'a str,
}

impl RedisLeaseBackend {
    /// The backend of `rule`; `None` if the store has no shards for the default region.
    pub fn new<M: EntryMeta>(store: &Store<M>, rule: &str, deadline: Duration) -> Option<Self> {
        let owner = store.bucket_owner(rule)?;
        let endpoint = match &owner {
            BucketOwner::Shard(shard) => shard.label().unwrap_or_default(),
            BucketOwner::Cluster(..) => "cluster".to_owned(),
        };
        let operation = Arc::new(OperationClass::new(format!("lease {rule} {endpoint}")));
        let connection = match owner {
            BucketOwner::Shard(shard) => BucketConnection::Server(shard.connection(operation, 0)),
            BucketOwner::Cluster(cluster, masters) => {
                let connections = masters.iter().map(|master| master.connection(operation.clone(), 0)).collect();
                BucketConnection::Cluster { cluster: cluster.clone(), tag: rule.to_owned(), connections }
            }
        };
        Some(Self {
            connection,
            bucket: format!("tg:lease:{{{rule}}}"),
            sha1: redis::Script::new(LEASE_SCRIPT).get_hash().to_owned(),
            deadline,
            endpoint,
        })
    }

    /// Host, port and database of the shard that holds the bucket, or `cluster` for a Redis
    /// Cluster.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn run(&self, request: &LeaseRequest) -> Result<Value, LeaseBackendError> {
        let began = Instant::now();
        let by_hash = ScriptCall { command: "EVALSHA", script: &self.sha1 };
        let reply = self.send(by_hash, request, self.deadline).await?;
        let is_unknown = matches!(&reply, Value::ServerError(error) if error.kind() == Some(ServerErrorKind::NoScript));
        if !is_unknown {
            return Ok(reply);
        }
        let left = self.deadline.saturating_sub(began.elapsed());
        self.send(ScriptCall { command: "EVAL", script: LEASE_SCRIPT }, request, left).await
    }

    async fn send(
        &self,
        script_call: ScriptCall<'_>,
        request: &LeaseRequest,
        deadline: Duration,
    ) -> Result<Value, LeaseBackendError> {
        let mut call = Pipeline::with_capacity(1);
        call.cmd(script_call.command).arg(script_call.script).arg(1).arg(&self.bucket);
        for argument in request.arguments() {
            call.arg(argument);
        }
        let connection = match &self.connection {
            BucketConnection::Server(connection) => Some(connection),
            BucketConnection::Cluster { cluster, tag, connections } => {
                cluster.master_of_tag(tag).map(|master| &connections[master])
            }
        };
        let Some(connection) = connection else { return Err(LeaseBackendError::Unavailable) };
        match connection.execute(&call, deadline).await {
            Ok(mut replies) => replies.pop().ok_or(LeaseBackendError::Malformed),
            Err(ShardFault::Timeout) => Err(LeaseBackendError::Deadline),
            Err(_) => Err(LeaseBackendError::Unavailable),
        }
    }
}

impl LeaseBackend for RedisLeaseBackend {
    async fn acquire(&self, request: LeaseRequest) -> Result<LeaseGrant, LeaseBackendError> {
        let numbers = match self.run(&request).await? {
            Value::Array(values) => values,
            Value::ServerError(_) => return Err(LeaseBackendError::Unavailable),
            _ => return Err(LeaseBackendError::Malformed),
        };
        let mut reply = [0; 4];
        if numbers.len() != reply.len() {
            return Err(LeaseBackendError::Malformed);
        }
        for (slot, value) in reply.iter_mut().zip(numbers) {
            let Value::Int(number) = value else { return Err(LeaseBackendError::Malformed) };
            *slot = number;
        }
        LeaseGrant::parse(&reply)
    }
}
