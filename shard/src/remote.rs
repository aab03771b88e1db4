//! Owns a shard: one Redis server that holds some slots of a region, as shared by all threads
//! (`Shard`) and as used by one thread (`ShardClient`).
//!
//! Values are read with `GETRANGE`, which works on strings like `GET` and lets the server limit the
//! length. The first `FIRST_READ_BYTES` are read over the connection that all small reads share. If
//! they begin a longer envelope that would be accepted, the whole value is read over a second
//! connection, so that no small read queues behind a large body. An oversized value is never read
//! whole. A server that violates the protocol and sends more than was requested, in any reply,
//! loses its connection (see `reply_limit`).
//!
//! Refuses to retry, and to wait longer than the deadline for anything.
//! Invariant: a shard that is slow, unreachable or faulty is a cache miss, and an immediate one
//! while its breaker is open.

mod breaker;
mod address;
mod cluster;
mod counts;
mod self_invalidations;
mod fault;
mod reply_limit;
mod dial;
mod operation;
mod connection;
mod write_queue;
mod retry_queue;
mod pending_deletes;
mod redirected_deletes;
mod tombstone;
mod outbox;
mod topology;
mod sentinel;
#[cfg(test)]
mod tests;

pub use address::RedisTlsConfig;
pub(crate) use address::{Dialer, InvalidAddress, ResolvedServer, ServerAddress};
pub use breaker::ShardBreakerState;
pub(crate) use cluster::{CLUSTER_MASTERS_MAX, RedisCluster};
pub(crate) use connection::ShardConnection;
pub use counts::ShardCounts;
pub(crate) use dial::{DialOptions, RedisConnection};
pub use fault::ShardFault;
pub(crate) use operation::OperationClass;
pub use operation::ShardFaultCounts;
pub(crate) use pending_deletes::PendingDeletes;
pub(crate) use reply_limit::ReplyLimits;
pub(crate) use self_invalidations::ChangedKey;
pub(crate) use sentinel::SentinelEndpoint;
pub(crate) use tombstone::{FillBeginning, TOMBSTONE_BYTES_MAX, Tombstone};
pub(crate) use topology::TopologyDiscovery;
pub(crate) use write_queue::{StoreJob, WriteJob};

use crate::clock::{ServerClock, WallClock};
use crate::entry::{Entry, EntryMeta, EnvelopeCodec, EnvelopeError, InvalidationEpochs, PurgeStatus};
use crate::key::{Digest, Region};
use crate::tasks::{ShardTaskKind, ShardTaskWait, TaskGuard};
use bytes::Bytes;
use counts::{ShardCounter, ShardCounters};
use outbox::{ShardWriter, WriteOutbox};
use redirected_deletes::{RedirectedDelete, RedirectedDeletes};
use redis::{Pipeline, Value};
use retry_queue::RetryQueue;
use self_invalidations::SelfInvalidations;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;

/// Writes are not on a request's path: one batch may take this many deadlines.
const WRITE_DEADLINE_FACTOR: u32 = 10;

/// Length of the first read. Most bodies are smaller, and this much occupies a connection for about
/// 50 us.
const FIRST_READ_BYTES: usize = 128 << 10;

/// Limit of a reply besides the value that was asked for: its framing, or the text of an error.
const REPLY_BYTES: usize = 4 << 10;

/// Envelopes from this size are decoded on the blocking pool: checking this much takes about 0.1
/// ms.
const BLOCKING_DECODE_BYTES: usize = 256 << 10;

/// State of a shard that all threads share.
pub(crate) struct Shard {
    id: ConfiguredShard,
    address: Arc<ServerAddress>,
    reads: Arc<OperationClass>,
    /// Reads of large bodies: a network that is too slow for these is not too slow for small ones.
    large_reads: Arc<OperationClass>,
    writes: Arc<OperationClass>,
    counts: Arc<ShardCounters>,
    self_invalidations: Arc<SelfInvalidations>,
    clock: Arc<ServerClock>,
    /// Whether the shard may be read: its purges are known and its invalidations are received.
    is_subscribed: Arc<AtomicBool>,
    bus: OperationClass,
}

/// The place of a shard in the configuration: its region, its index among the region's endpoints or
/// its cluster's masters, and the label of a configured endpoint. Other code refers to a shard by
/// its index in the store's list.
pub(crate) struct ConfiguredShard {
    pub(crate) region: Region,
    /// Index among the region's endpoints, or among the masters of its cluster.
    pub(crate) index: usize,
    /// Identifies a configured endpoint; `None` for a master of a cluster, whose address changes.
    pub(crate) label: Option<String>,
}

/// State and counters of a shard.
#[derive(Clone, Debug)]
pub struct ShardReport {
    /// The region that configures the shard; regions without a configuration use the shards of
    /// `default`.
    pub region: Region,
    /// Index among the region's endpoints, or among the masters of its cluster.
    pub index: usize,
    /// Host, port and database; no credentials.
    pub endpoint: String,
    pub reads: ShardBreakerState,
    /// Reads of large bodies.
    pub large_reads: ShardBreakerState,
    pub writes: ShardBreakerState,
    /// Whether its purges are known and its invalidations are received; the shard is not read
    /// otherwise.
    pub is_subscribed: bool,
    pub bus_faults: ShardFaultCounts,
    pub read_faults: ShardFaultCounts,
    pub large_read_faults: ShardFaultCounts,
    pub write_faults: ShardFaultCounts,
    pub counts: ShardCounts,
}

impl Shard {
    pub(crate) fn new(id: ConfiguredShard, address: Arc<ServerAddress>, wall: Arc<WallClock>) -> Self {
        let ConfiguredShard { region, index, label } = &id;
        let name = label.clone().unwrap_or_else(|| format!("master {index}"));
        Self {
            reads: Arc::new(OperationClass::new(format!("{region} {name} reads"))),
            large_reads: Arc::new(OperationClass::new(format!("{region} {name} large reads"))),
            writes: Arc::new(OperationClass::new(format!("{region} {name} writes"))),
            counts: Arc::default(),
            self_invalidations: Arc::default(),
            clock: Arc::new(ServerClock::new(wall)),
            is_subscribed: Arc::new(AtomicBool::new(true)),
            bus: OperationClass::new(format!("{region} {name} bus")),
            address,
            id,
        }
    }

    /// Host, port and database, or the name of a Sentinel master. For a master of a cluster, its
    /// current address; `None` while no server has that role.
    pub(crate) fn label(&self) -> Option<String> {
        self.id.label.clone().or_else(|| Some(self.address.current()?.label.clone()))
    }

    pub(crate) fn address(&self) -> &Arc<ServerAddress> {
        &self.address
    }

    pub(crate) fn self_invalidations(&self) -> &SelfInvalidations {
        &self.self_invalidations
    }

    /// The clock of the shard's server.
    pub(crate) fn clock(&self) -> &ServerClock {
        &self.clock
    }

    /// Stops reads until `mark_subscribed`.
    pub(crate) fn mark_unsubscribed(&self) {
        self.is_subscribed.store(false, Ordering::Release);
    }

    pub(crate) fn subscription_lost(&self, fault: ShardFault) {
        self.mark_unsubscribed();
        self.bus.record_failure(fault);
    }

    /// Counts a fault of the bus without stopping reads.
    pub(crate) fn record_bus_fault(&self, fault: ShardFault) {
        self.bus.record_fault(fault);
    }

    pub(crate) fn mark_subscribed(&self) {
        self.is_subscribed.store(true, Ordering::Release);
    }

    /// A connection of its own that uses the breaker of `operation`, for replies with values of up
    /// to `value_bytes_max`.
    pub(crate) fn connection(&self, operation: Arc<OperationClass>, value_bytes_max: usize) -> ShardConnection {
        let limits = ReplyLimits::per_reply(REPLY_BYTES.saturating_add(value_bytes_max));
        ShardConnection::new(self.address.clone(), operation, limits)
    }

    /// `None` for an unused master index of a cluster.
    pub(crate) fn report(&self) -> Option<ShardReport> {
        Some(ShardReport {
            region: self.id.region,
            index: self.id.index,
            endpoint: self.label()?,
            reads: self.reads.state(),
            large_reads: self.large_reads.state(),
            writes: self.writes.state(),
            is_subscribed: self.is_subscribed.load(Ordering::Acquire),
            bus_faults: self.bus.faults(),
            read_faults: self.reads.faults(),
            large_read_faults: self.large_reads.faults(),
            write_faults: self.writes.faults(),
            counts: self.counts.snapshot(),
        })
    }
}

/// The shard's client in one thread: three connections, each opened on first use.
pub(crate) struct ShardClient<M> {
    shard: Arc<Shard>,
    reads: ShardConnection,
    large_reads: ShardConnection,
    outbox: WriteOutbox<M>,
    context: ShardContext,
}

/// State that all shards of a store share: codec, invalidation state, pending deletes, and the
/// deadline of an operation.
#[derive(Clone)]
pub(crate) struct ShardContext {
    pub(crate) codec: Arc<EnvelopeCodec>,
    pub(crate) epochs: Arc<InvalidationEpochs>,
    pub(crate) pending_deletes: Arc<PendingDeletes>,
    pub(crate) deadline: Duration,
}

/// Object of a read: the entry in its own slot, or a hot copy with its revision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReadTarget {
    /// The entry in its own slot.
    Entry,
    /// A copy in another slot, used only if it has this revision.
    Copy { revision: u64 },
}

/// One read of an entry or a copy.
#[derive(Clone, Copy)]
pub(crate) struct ReadRequest<'a> {
    /// The key in Redis.
    pub(crate) name: &'a str,
    pub(crate) digest: &'a Digest,
    pub(crate) target: ReadTarget,
    pub(crate) deadline: Duration,
}

/// An entry read from a shard, with its envelope, from which a copy can be written.
pub(crate) struct FetchedEntry<M> {
    pub(crate) entry: Entry<M>,
    /// The envelope as read; the entry's body is a slice of it unless it was compressed.
    pub(crate) envelope: Bytes,
}

impl<M: EntryMeta> ShardClient<M> {
    pub(crate) fn new(shard: Arc<Shard>, context: ShardContext) -> Self {
        let writer = ShardWriter {
            connection: shard.connection(shard.writes.clone(), 0),
            is_cluster_master: shard.id.label.is_none(),
            deadline: context.deadline * WRITE_DEADLINE_FACTOR,
            codec: context.codec.clone(),
            epochs: context.epochs.clone(),
            counts: shard.counts.clone(),
            self_invalidations: shard.self_invalidations.clone(),
            clock: shard.clock.clone(),
            retry_queue: RetryQueue::new(),
            redirected_deletes: RedirectedDeletes::default(),
            pending_deletes: context.pending_deletes.clone(),
            is_subscribed: shard.is_subscribed.clone(),
        };
        let envelope_bytes_max = context.codec.envelope_bytes_max();
        let reads = shard.connection(shard.reads.clone(), FIRST_READ_BYTES);
        let large_reads = shard.connection(shard.large_reads.clone(), envelope_bytes_max);
        Self { shard, reads, large_reads, outbox: WriteOutbox::new(writer), context }
    }

    /// Reads and validates an entry within the deadline. `None` if it is absent, expired, purged or
    /// invalid. Cancel safe.
    pub(crate) async fn fetch(&self, request: ReadRequest<'_>) -> Result<Option<FetchedEntry<M>>, ShardFault> {
        let ReadRequest { name, digest, target, deadline } = request;
        if !self.shard.is_subscribed.load(Ordering::Acquire) {
            self.shard.reads.record_fault(ShardFault::Unsubscribed);
            return Err(ShardFault::Unsubscribed);
        }
        // Entries that this process has deleted count as absent before the server has confirmed it.
        if self.context.pending_deletes.contains(digest.prefix()) {
            self.count_miss(target);
            return Ok(None);
        }
        let began = Instant::now();
        let Some(first) = read(&self.reads, name, FIRST_READ_BYTES, deadline).await? else {
            self.count_miss(target);
            return Ok(None);
        };
        // A value that would be rejected is not read whole.
        if first.len() < FIRST_READ_BYTES || !self.context.codec.is_incomplete::<M>(digest, &first) {
            return Ok(self.open(&self.reads, &request, first).await);
        }
        let (bytes_max, left) = (self.context.codec.envelope_bytes_max(), deadline.saturating_sub(began.elapsed()));
        if left < deadline / 2 {
            // A timeout after so little time would say nothing about reads of large bodies.
            self.shard.large_reads.record_fault(ShardFault::Timeout);
            return Err(ShardFault::Timeout);
        }
        match read(&self.large_reads, name, bytes_max, left).await? {
            Some(whole) => Ok(self.open(&self.large_reads, &request, whole).await),
            None => {
                self.count_miss(target);
                Ok(None)
            }
        }
    }

    fn count_miss(&self, target: ReadTarget) {
        self.count(target, &self.shard.counts.misses);
    }

    /// Counts a result. Results for copies are not counted, because the entry's own slot is read
    /// next.
    fn count(&self, target: ReadTarget, count: &ShardCounter) {
        if target == ReadTarget::Entry {
            count.increment();
        }
    }

    pub(crate) fn enqueue(&self, job: WriteJob<M>) {
        if let WriteJob::Store(store) = &job
            && store.entry.body.len() > self.context.codec.body_bytes_max()
        {
            self.shard.counts.oversize.increment();
            return;
        }
        self.outbox.push(job);
    }

    /// From now on the entry counts as deleted in this process; enqueue its delete next.
    pub(crate) fn begin_delete(&self, name: &str) {
        self.outbox.begin_delete(name);
    }

    /// Waits until everything enqueued has been written or dropped. Cancel safe.
    pub(crate) async fn wait_drained(&self) {
        self.outbox.wait_drained().await;
    }

    /// Takes the deletes that the server redirected, in order. The caller enqueues each at its new
    /// shard and calls `finish_redirected_delete`, or returns it with `defer_delete`.
    pub(crate) fn take_redirected_deletes(&self) -> VecDeque<RedirectedDelete> {
        self.outbox.take_redirected_deletes()
    }

    pub(crate) fn defer_delete(&self, delete: RedirectedDelete) {
        self.outbox.defer_delete(delete);
    }

    /// `is_sent` is false if no shard holds the key.
    pub(crate) fn finish_redirected_delete(&self, name: &str, is_sent: bool) {
        self.outbox.finish_redirected_delete(name, is_sent);
    }

    async fn open(
        &self,
        connection: &ShardConnection,
        request: &ReadRequest<'_>,
        envelope: Bytes,
    ) -> Option<FetchedEntry<M>> {
        let &ReadRequest { name, digest, target, .. } = request;
        let counts = &self.shard.counts;
        match self.decode(digest, &envelope).await {
            Ok(Some((entry, _))) if matches!(target, ReadTarget::Copy { revision } if revision != entry.revision()) => {
            }
            Ok(Some((entry, number))) => {
                match self.context.epochs.remote_purge_status(entry.meta.tags(), number) {
                    PurgeStatus::Purged => {
                        self.count(target, &counts.purged);
                        return None;
                    }
                    PurgeStatus::SoftPurged(at) => entry.mark_soft_purged(at),
                    PurgeStatus::Unaffected => {}
                }
                counts.hits.increment();
                return Some(FetchedEntry { entry, envelope });
            }
            Ok(None) => self.count(target, &counts.expired),
            Err(reason) if reason.is_incompatible() => self.count(target, &counts.incompatible),
            Err(reason) => {
                // Either the value is damaged, or the connection returns replies of other requests:
                // delete the entry and replace the connection.
                counts.corrupt.increment();
                tracing::debug!(endpoint = self.shard.label(), %reason, "corrupt entry");
                connection.discard();
                self.outbox.begin_delete(name);
                self.outbox.push(WriteJob::Delete { name: name.to_owned(), removal: None, redirected_since: None });
            }
        }
        None
    }

    async fn decode(&self, digest: &Digest, envelope: &Bytes) -> Result<Option<(Entry<M>, u64)>, EnvelopeError> {
        if self.context.codec.decoded_bytes(envelope) < BLOCKING_DECODE_BYTES {
            return self.context.codec.decode(digest, envelope, self.shard.clock.now());
        }
        let (codec, clock, digest, envelope) =
            (self.context.codec.clone(), self.shard.clock.clone(), *digest, envelope.clone());
        let name = self.shard.reads.name().clone();
        let decoding = spawn_blocking(move || {
            let _task = TaskGuard::new(ShardTaskKind::Codec, &name, ShardTaskWait::Nothing);
            codec.decode(&digest, &envelope, clock.now())
        });
        // Decoding does not panic; if it did, the panic would be counted, and the entry be absent.
        decoding.await.unwrap_or(Ok(None))
    }
}

/// Reads at most `bytes_max` bytes from the start of a value; `None` if the key is absent.
async fn read(
    connection: &ShardConnection,
    name: &str,
    bytes_max: usize,
    deadline: Duration,
) -> Result<Option<Bytes>, ShardFault> {
    let mut read = Pipeline::with_capacity(1);
    read.cmd("GETRANGE").arg(name).arg(0).arg(bytes_max - 1);
    match connection.execute(&read, deadline).await?.pop() {
        // `GETRANGE` returns an empty string for an absent key.
        Some(Value::BulkString(value)) if value.is_empty() => Ok(None),
        Some(Value::BulkString(value)) => Ok(Some(Bytes::from(value))),
        reply => {
            if let Some(fault) = reply.as_ref().and_then(ShardFault::from_reply) {
                return Err(fault);
            }
            connection.discard();
            Err(ShardFault::Protocol)
        }
    }
}
