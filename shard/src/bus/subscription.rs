//! Owns the bus's subscription to one server: a connection that receives an invalidation for every
//! change of Tidegate's keys, and that also carries the bus's commands.
//!
//! A subscription comes up in this order: it enables client tracking, reads the events that it
//! missed, publishes what the server missed, marks the cached entries of the server as stale
//! (subscription gap), and only then permits reads of its shards.
//!
//! Refuses to stay up when invalidations may have been lost: a full queue ends the subscription.
//! Invariant: while a subscription is up, a change on its server reaches this process within
//! `HEARTBEAT_INTERVAL`, or the subscription ends.

use super::event::{self, BusEvent, EventPayload, OVERRIDE_KIND, StoredOverride, StreamPosition};
use super::members::{EarlierProcesses, NodeHeartbeat};
use super::overrides::{OVERRIDE_DURATION_MAX, OVERRIDES_MAX};
use super::script::{
    BUS_HASH_TAG, BUS_KEY_PREFIX, EVENTS_KEY, EVENTS_MAX, HEARTBEAT, NODE_EXPIRY_MS, NODES_KEY, OVERRIDES_KEY,
    PUBLISH_OVERRIDE, PUBLISH_PURGE, REMOVE_ENDED, STATE_KEY, TAGS_KEPT_MAX, TAGS_KEY,
};
use crate::entry::Purge;
use crate::placement::{ENTRY_KEY_PREFIX, digest_prefix, is_tombstone_key};
use crate::remote::{
    DialOptions, RedisCluster, RedisConnection, ReplyLimits, ResolvedServer, ServerAddress, ShardFault,
};
use redis::{Pipeline, PushInfo, PushKind, Value, from_redis_value_ref};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Interval of heartbeats, which also detect a lost push message.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// Timeout of one command; only the bus waits for it.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);

/// Covers a DNS lookup, an intercontinental handshake, and authentication.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Queued invalidations: more than a server sends in a second.
const INVALIDATION_QUEUE_MAX: usize = 65_536;

/// Longer keys are not Tidegate's: a region has at most 32 bytes.
const KEY_BYTES_MAX: usize = 192;

/// Of all replies to one pipeline. The longest are the stored overrides and `READ_BATCH` stream
/// events, 3 MiB with 512 bytes for each name and text.
const REPLIES_BYTES_MAX: usize = 8 << 20;

/// The server reports all keys that it changes within one round of its event loop in one message,
/// and `INVALIDATION_QUEUE_MAX` of them fill the queue.
const LIMITS: ReplyLimits =
    ReplyLimits { reply_bytes: REPLIES_BYTES_MAX, push_bytes: INVALIDATION_QUEUE_MAX * 256, is_metered: true };

/// Stream events, or tags, read per command.
const READ_BATCH: usize = 1_000;

/// In Unix seconds. HTTP dates end with the year 9999, and a clock advances from the last time that
/// a server reported.
const YEAR_9000_SECONDS: u64 = 221_845_392_000;

/// A change that a server reported by client tracking.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Invalidation {
    /// The bus's own keys changed.
    BusState,
    /// An entry changed: the prefix of its digest, and its Redis key.
    Entry(u64, Vec<u8>),
    /// The tombstone of an entry was set or has expired: the same prefix, and the tombstone's key.
    Tombstone(u64, Vec<u8>),
    /// Any key may have changed, or the connection ended.
    Everything,
}

/// A connection with client tracking enabled.
pub(super) struct TrackedConnection {
    pub(super) commands: CommandHandle,
    pub(super) invalidations: mpsc::Receiver<Invalidation>,
    /// Set when an invalidation did not fit into the queue.
    pub(super) overflowed: Arc<AtomicBool>,
    /// Whether the server stored the bus when the connection was attempted.
    pub(super) carries_bus: bool,
}

/// Executes commands on a connection, in the order in which they are sent; clones share it.
#[derive(Clone)]
pub(super) struct CommandHandle(RedisConnection);

/// A server's reply to a purge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PublishedPurge {
    pub(super) number: u64,
    /// Position in the stream; `None` if the server already had the purge.
    pub(super) position: Option<StreamPosition>,
}

/// The subscription to one server: the shards on it, its address, and the progress of reading its
/// stream.
pub(super) struct Subscription {
    /// Indexes of the shards on this server.
    pub(super) shards: Vec<usize>,
    pub(super) address: Arc<ServerAddress>,
    label: Option<String>,
    /// The cluster that the server belongs to, and its slot there.
    cluster: Option<(Arc<RedisCluster>, usize)>,
    state: Mutex<SubscriptionState>,
}

/// Progress of a subscription, and its command handle while it is connected.
#[derive(Default)]
struct SubscriptionState {
    commands: Option<CommandHandle>,
    /// Position up to which the stream was read; `None` before the first read.
    position: Option<StreamPosition>,
    /// The highest purge number of this server.
    last_purge_number: u64,
    earlier_processes: EarlierProcesses,
}

/// A purge to publish.
pub(super) struct PurgeMessage<'a> {
    pub(super) purge: Purge,
    /// `None`: the server assigns a number above `latest_number`.
    pub(super) number: Option<u64>,
    /// The highest purge number that this node has received.
    pub(super) latest_number: u64,
    /// `*` or a node.
    pub(super) to: &'a str,
    /// The member that publishes it.
    pub(super) from: &'a str,
}

/// An override to publish.
pub(super) struct OverrideMessage<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
    pub(super) version: u64,
    pub(super) duration: Duration,
    /// `*` or a node.
    pub(super) to: &'a str,
    /// The member that publishes it.
    pub(super) from: &'a str,
}

impl Subscription {
    /// The subscription to a server with one or more shards.
    pub(super) fn for_server(label: String, shards: Vec<usize>, address: Arc<ServerAddress>) -> Self {
        Self { shards, address, label: Some(label), cluster: None, state: Mutex::default() }
    }

    /// The subscription to one server slot of a cluster. Only the server that owns the bus's hash
    /// slot stores the bus; all servers send invalidations.
    pub(super) fn for_cluster_slot(shard: usize, cluster: Arc<RedisCluster>, slot: usize) -> Self {
        let address = cluster.addresses[slot].clone();
        Self { shards: vec![shard], address, label: None, cluster: Some((cluster, slot)), state: Mutex::default() }
    }

    /// The server's name in reports: host, port and database.
    pub(super) fn label(&self) -> String {
        let current = || self.address.current().map(|server| server.label.clone());
        self.label.clone().or_else(current).unwrap_or_else(|| "cluster".to_owned())
    }

    /// Whether this server stores the bus.
    pub(super) fn carries_bus(&self) -> bool {
        self.cluster.as_ref().is_none_or(|(cluster, slot)| cluster.master_of_tag(BUS_HASH_TAG) == Some(*slot))
    }

    /// Whether it belongs to a cluster whose past purges have not been read yet.
    pub(super) fn is_cluster_unsynced(&self) -> bool {
        self.cluster.as_ref().is_some_and(|(cluster, _)| !cluster.is_caught_up.load(Ordering::Acquire))
    }

    pub(super) fn mark_cluster_synced(&self) {
        if let Some((cluster, _)) = &self.cluster {
            cluster.is_caught_up.store(true, Ordering::Release);
        }
    }

    /// Connects and enables client tracking.
    pub(super) async fn connect(&self, server: &ResolvedServer) -> Result<TrackedConnection, ShardFault> {
        let carries_bus = self.carries_bus();
        let (sender, invalidations) = mpsc::channel(INVALIDATION_QUEUE_MAX);
        let overflowed = Arc::new(AtomicBool::new(false));
        let has_overflowed = overflowed.clone();
        let push = move |push: PushInfo| {
            let mut queued = Ok(());
            for_each_invalidation(push, |invalidation| {
                if sender.try_send(invalidation).is_err() {
                    has_overflowed.store(true, Ordering::Release);
                    queued = Err(());
                }
            });
            queued
        };
        let options = DialOptions::new(format!("{} bus", self.label()).into(), LIMITS).with_push(push);
        let connection = match timeout(CONNECT_TIMEOUT, RedisConnection::open(server, options)).await {
            Ok(connected) => connected?,
            Err(_) => return Err(ShardFault::Timeout),
        };
        let commands = CommandHandle(connection);
        let mut track = Pipeline::with_capacity(1);
        track.cmd("CLIENT").arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(ENTRY_KEY_PREFIX);
        commands.execute(&track).await?;
        Ok(TrackedConnection { commands, invalidations, overflowed, carries_bus })
    }

    /// The command handle, while the subscription is connected and its server stores the bus.
    pub(super) fn command_handle(&self) -> Option<CommandHandle> {
        if self.carries_bus() { self.state().commands.clone() } else { None }
    }

    pub(super) fn set_connected(&self, commands: CommandHandle) {
        self.state().commands = Some(commands);
    }

    pub(super) fn set_disconnected(&self) {
        self.state().commands = None;
    }

    pub(super) fn last_purge_number(&self) -> u64 {
        self.state().last_purge_number
    }

    pub(super) fn position(&self) -> Option<StreamPosition> {
        self.state().position
    }

    /// Those of `heartbeats` that are the last ones of earlier processes of this node, `member`.
    pub(super) fn ended_processes(
        &self,
        member: &str,
        heartbeats: &HashMap<String, NodeHeartbeat>,
    ) -> Vec<(String, NodeHeartbeat)> {
        self.state().earlier_processes.ended(member, heartbeats)
    }

    /// Whether the server lists earlier processes of this node that may have ended.
    pub(super) fn has_earlier_processes(&self) -> bool {
        !self.state().earlier_processes.is_empty()
    }

    /// Reads the events since the last read, in order. If the stream was trimmed or lost meanwhile,
    /// reads the stored overrides, the purge floor and the last purges of all tags first.
    pub(super) async fn catch_up(
        &self,
        commands: &CommandHandle,
        mut receive: impl FnMut(FleetUpdate),
    ) -> Result<(), ShardFault> {
        let (first, last) = commands.stream_bounds().await?;
        let read = self.position();
        let is_complete =
            read.is_some_and(|read| read == last || first.is_some_and(|first| first <= read && read < last));
        if is_complete {
            return self.read_stream(commands, &mut receive).await;
        }
        // Later events are read from the stream; earlier state from the hashes that keep the latest
        // value. The stream counts as read up to `last` only after that state was read.
        for stored in commands.stored_overrides().await? {
            receive(FleetUpdate::Override(stored));
        }
        let (number, floor) = commands.purge_state().await?;
        receive(FleetUpdate::PurgeFloor(floor));
        let since = if read.is_some() { self.last_purge_number().min(number) } else { 0 };
        let purges = commands.purges_since(since).await?;
        self.state().position = Some(last);
        for (purge, number) in purges {
            self.record_purge_number(number);
            receive(FleetUpdate::PastPurge(purge, number));
        }
        self.record_purge_number(number);
        self.read_stream(commands, &mut receive).await
    }

    /// Reads the stream to its end.
    pub(super) async fn read_stream(
        &self,
        commands: &CommandHandle,
        receive: &mut impl FnMut(FleetUpdate),
    ) -> Result<(), ShardFault> {
        loop {
            let position = self.position().unwrap_or_default();
            let mut read = Pipeline::with_capacity(1);
            read.cmd("XRANGE").arg(EVENTS_KEY).arg(format!("({position}")).arg("+").arg("COUNT").arg(READ_BATCH);
            let reply = commands.execute(&read).await?.pop().ok_or(ShardFault::Protocol)?;
            let entries = event::parse_stream(&reply).ok_or(ShardFault::Protocol)?;
            let is_end = entries.len() < READ_BATCH;
            for (position, event) in entries {
                if let Some(event) = event {
                    if let EventPayload::Purge { number, .. } = event.payload {
                        self.record_purge_number(number);
                    }
                    receive(FleetUpdate::Event(event));
                }
                self.state().position = Some(position);
            }
            if is_end {
                return Ok(());
            }
        }
    }

    pub(super) fn record_purge_number(&self, number: u64) {
        let mut state = self.state();
        state.last_purge_number = state.last_purge_number.max(number);
    }

    fn state(&self) -> MutexGuard<'_, SubscriptionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A purge or an override read from a server: from its stream or, where that was trimmed, from its
/// stored state. Invalidations arrive separately.
pub(super) enum FleetUpdate {
    Event(BusEvent),
    /// A purge that may no longer be in the stream.
    PastPurge(Purge, u64),
    /// Purges up to this number were discarded.
    PurgeFloor(u64),
    /// A stored override that may no longer be in the stream.
    Override(StoredOverride),
}

impl CommandHandle {
    /// Executes a pipeline; an error among its replies is a fault.
    pub(super) async fn execute(&self, commands: &Pipeline) -> Result<Vec<Value>, ShardFault> {
        let mut connection = self.0.clone();
        let exchange = connection.send_metered(commands, REPLIES_BYTES_MAX);
        let replies = timeout(COMMAND_TIMEOUT, exchange).await.unwrap_or(Err(ShardFault::Timeout))?;
        match replies.iter().find_map(ShardFault::from_reply) {
            Some(fault) => Err(fault),
            None => Ok(replies),
        }
    }

    /// Publishes a purge; returns its number and its stream position.
    pub(super) async fn publish_purge(
        &self,
        PurgeMessage { purge, number, latest_number, to, from }: &PurgeMessage<'_>,
    ) -> Result<PublishedPurge, ShardFault> {
        let mut publish = Pipeline::with_capacity(1);
        publish.cmd("EVAL").arg(PUBLISH_PURGE).arg(3).arg(EVENTS_KEY).arg(STATE_KEY).arg(TAGS_KEY);
        publish.arg(number.unwrap_or(0)).arg(*latest_number).arg(event::encode_purge(*purge)).arg(*to).arg(*from);
        publish.arg(EVENTS_MAX).arg(TAGS_KEPT_MAX);
        let reply = self.execute(&publish).await?.pop().ok_or(ShardFault::Protocol)?;
        let [number, id]: [String; 2] = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        Ok(PublishedPurge { number: number.parse().map_err(|_| ShardFault::Protocol)?, position: id.parse().ok() })
    }

    /// Publishes an override; returns its stream position, or `None` if the server already had it
    /// or a later one.
    pub(super) async fn publish_override(
        &self,
        OverrideMessage { name, text, version, duration, to, from }: &OverrideMessage<'_>,
    ) -> Result<Option<StreamPosition>, ShardFault> {
        let mut publish = Pipeline::with_capacity(1);
        publish.cmd("EVAL").arg(PUBLISH_OVERRIDE).arg(2).arg(EVENTS_KEY).arg(OVERRIDES_KEY);
        publish.arg(*name).arg(*version).arg(*text).arg(duration.as_millis() as u64).arg(*to).arg(*from);
        publish.arg(OVERRIDE_KIND).arg(EVENTS_MAX).arg(OVERRIDES_MAX).arg(OVERRIDE_DURATION_MAX.as_millis() as u64);
        let reply = self.execute(&publish).await?.pop().ok_or(ShardFault::Protocol)?;
        let id: String = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        Ok(id.parse().ok())
    }

    /// Reads the stored overrides for all nodes. Values that cannot be parsed are skipped.
    async fn stored_overrides(&self) -> Result<Vec<StoredOverride>, ShardFault> {
        let mut query = Pipeline::with_capacity(1);
        query.cmd("HGETALL").arg(OVERRIDES_KEY);
        let reply = match self.execute(&query).await {
            // The key has another type.
            Err(ShardFault::Refused) => return Ok(Vec::new()),
            reply => reply?.pop().ok_or(ShardFault::Protocol)?,
        };
        let pairs: Vec<(Value, Value)> = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        let text = |value: &Value| from_redis_value_ref::<String>(value).ok();
        Ok(pairs.iter().filter_map(|(name, value)| event::parse_override(text(name)?, &text(value)?)).collect())
    }

    /// Records a heartbeat of `member`, which has read up to `position` and received the purges up
    /// to `number` from this server.
    pub(super) async fn write_heartbeat(
        &self,
        member: &str,
        position: StreamPosition,
        number: u64,
    ) -> Result<(), ShardFault> {
        let mut heartbeat = Pipeline::with_capacity(1);
        heartbeat.cmd("EVAL").arg(HEARTBEAT).arg(4).arg(NODES_KEY).arg(STATE_KEY).arg(TAGS_KEY).arg(EVENTS_KEY);
        heartbeat.arg(member).arg(position.to_string()).arg(NODE_EXPIRY_MS).arg(number);
        self.execute(&heartbeat).await.map(drop)
    }

    /// The server's clock, in Unix milliseconds; also a liveness check.
    pub(super) async fn server_time_ms(&self) -> Result<u64, ShardFault> {
        let mut time = Pipeline::with_capacity(1);
        time.cmd("TIME");
        let reply = self.execute(&time).await?.pop().ok_or(ShardFault::Protocol)?;
        let [seconds, micros]: [String; 2] = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| ShardFault::Protocol);
        match (number(&seconds)?, number(&micros)?) {
            (seconds @ ..YEAR_9000_SECONDS, micros @ ..1_000_000) => Ok(seconds * 1_000 + micros / 1_000),
            // No valid clock reports this.
            _ => Err(ShardFault::Protocol),
        }
    }

    pub(super) async fn remove_members(&self, members: &[String]) -> Result<(), ShardFault> {
        let mut leave = Pipeline::with_capacity(1);
        leave.cmd("HDEL").arg(NODES_KEY).arg(members);
        self.execute(&leave).await.map(drop)
    }

    /// Removes members that have had no heartbeat since these.
    pub(super) async fn remove_ended(&self, members: &[(String, NodeHeartbeat)]) -> Result<(), ShardFault> {
        let mut remove = Pipeline::with_capacity(1);
        remove.cmd("EVAL").arg(REMOVE_ENDED).arg(1).arg(NODES_KEY);
        for (member, NodeHeartbeat { position, seen_ms }) in members {
            remove.arg(member).arg(format!("{position} {seen_ms}"));
        }
        self.execute(&remove).await.map(drop)
    }

    /// The last heartbeats of all members.
    pub(super) async fn heartbeats(&self) -> Result<HashMap<String, NodeHeartbeat>, ShardFault> {
        let mut query = Pipeline::with_capacity(1);
        query.cmd("HGETALL").arg(NODES_KEY);
        let reply = self.execute(&query).await?.pop().ok_or(ShardFault::Protocol)?;
        let all: HashMap<String, String> = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        let parse = |text: &str| {
            let (position, seen) = text.split_once(' ')?;
            Some(NodeHeartbeat { position: position.parse().ok()?, seen_ms: seen.parse().ok()? })
        };
        Ok(all.into_iter().filter_map(|(member, text)| Some((member, parse(&text)?))).collect())
    }

    /// Those of `purges` that the server does not have, or has under a lower number.
    pub(super) async fn missing_purges(&self, purges: &[(u64, Purge)]) -> Result<Vec<(u64, Purge)>, ShardFault> {
        let mut missing = Vec::new();
        for batch in purges.chunks(READ_BATCH) {
            let mut query = Pipeline::with_capacity(batch.len());
            for (_, purge) in batch {
                query.cmd("ZSCORE").arg(TAGS_KEY).arg(event::encode_purge(*purge));
            }
            for ((number, purge), reply) in batch.iter().zip(self.execute(&query).await?) {
                let stored: Option<f64> = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
                if stored.is_none_or(|stored| (stored as u64) < *number) {
                    missing.push((*number, *purge));
                }
            }
        }
        Ok(missing)
    }

    /// Raises the purge floor: nodes that read this server's state later treat every tagged entry
    /// older than `number` as purged.
    pub(super) async fn raise_purge_floor(&self, number: u64) -> Result<(), ShardFault> {
        let mut raise = Pipeline::with_capacity(1);
        raise.cmd("HSET").arg(STATE_KEY).arg("floor").arg(number);
        self.execute(&raise).await.map(drop)
    }

    /// Reads the first `bytes` bytes of values: of entries, which contain their revisions, or whole
    /// tombstones.
    pub(super) async fn read_heads(&self, keys: &[Vec<u8>], bytes: usize) -> Result<Vec<Value>, ShardFault> {
        let mut query = Pipeline::with_capacity(keys.len());
        for key in keys {
            query.cmd("GETRANGE").arg(key).arg(0).arg(bytes - 1);
        }
        self.execute(&query).await
    }

    /// The first position in the stream, and the last one ever assigned.
    async fn stream_bounds(&self) -> Result<(Option<StreamPosition>, StreamPosition), ShardFault> {
        let mut read = Pipeline::with_capacity(2);
        read.cmd("XRANGE").arg(EVENTS_KEY).arg("-").arg("+").arg("COUNT").arg(1);
        read.cmd("EXISTS").arg(EVENTS_KEY);
        let replies = self.execute(&read).await?;
        let first = replies.first().and_then(event::parse_stream).ok_or(ShardFault::Protocol)?;
        let first = first.first().map(|(position, _)| *position);
        if replies.get(1) == Some(&Value::Int(0)) {
            return Ok((None, StreamPosition::default()));
        }
        // An empty stream still has its last ID.
        let mut info = Pipeline::with_capacity(1);
        info.cmd("XINFO").arg("STREAM").arg(EVENTS_KEY);
        let reply = self.execute(&info).await?.pop().ok_or(ShardFault::Protocol)?;
        let info: HashMap<String, Value> = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        let last = info.get("last-generated-id").and_then(|id| from_redis_value_ref::<String>(id).ok());
        Ok((first, last.and_then(|id| id.parse().ok()).ok_or(ShardFault::Protocol)?))
    }

    /// The highest purge number, and the purge floor.
    async fn purge_state(&self) -> Result<(u64, u64), ShardFault> {
        let mut query = Pipeline::with_capacity(1);
        query.cmd("HMGET").arg(STATE_KEY).arg("last").arg("floor");
        let reply = self.execute(&query).await?.pop().ok_or(ShardFault::Protocol)?;
        let [last, floor]: [Option<u64>; 2] = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
        Ok((last.unwrap_or_default(), floor.unwrap_or_default()))
    }

    /// The purges after `number`, in numeric order.
    async fn purges_since(&self, number: u64) -> Result<Vec<(Purge, u64)>, ShardFault> {
        let mut all = Vec::new();
        loop {
            let mut query = Pipeline::with_capacity(1);
            query.cmd("ZRANGEBYSCORE").arg(TAGS_KEY).arg(format!("({number}")).arg("+inf").arg("WITHSCORES");
            query.arg("LIMIT").arg(all.len()).arg(READ_BATCH);
            let reply = self.execute(&query).await?.pop().ok_or(ShardFault::Protocol)?;
            let batch: Vec<(String, f64)> = from_redis_value_ref(&reply).map_err(|_| ShardFault::Protocol)?;
            let is_end = batch.len() < READ_BATCH;
            // A purge in the format of a later release is skipped but counts for the offset.
            all.extend(batch.into_iter().map(|(text, number)| (event::parse_purge(&text), number as u64)));
            if is_end {
                return Ok(all.into_iter().filter_map(|(purge, number)| Some((purge?, number))).collect());
            }
        }
    }
}

/// Calls `emit` for each invalidation of a push message.
fn for_each_invalidation(push: PushInfo, mut emit: impl FnMut(Invalidation)) {
    match push.kind {
        PushKind::Disconnection => emit(Invalidation::Everything),
        PushKind::Invalidate => match push.data.into_iter().next() {
            Some(Value::Array(keys)) => keys.into_iter().filter_map(parse_invalidated_key).for_each(emit),
            // The server was flushed.
            _ => emit(Invalidation::Everything),
        },
        _ => {}
    }
}

/// Parses an invalidated key; `None` for keys that are not Tidegate's.
fn parse_invalidated_key(key: Value) -> Option<Invalidation> {
    let Value::BulkString(key) = key else { return None };
    if key.starts_with(BUS_KEY_PREFIX.as_bytes()) {
        return Some(Invalidation::BusState);
    }
    if key.len() > KEY_BYTES_MAX {
        return None;
    }
    let prefix = digest_prefix(&key)?;
    Some(if is_tombstone_key(&key) { Invalidation::Tombstone(prefix, key) } else { Invalidation::Entry(prefix, key) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyBuilder, Region};
    use crate::placement::{Slot, redis_key};

    fn invalidations(kind: PushKind, data: Vec<Value>) -> Vec<Invalidation> {
        let mut invalidations = Vec::new();
        for_each_invalidation(PushInfo { kind, data }, |invalidation| invalidations.push(invalidation));
        invalidations
    }

    #[test]
    fn a_push_message_names_changed_entries() {
        let mut key = KeyBuilder::new();
        let key = key.part(b"/a").key();
        let digest = key.digest(&Region::DEFAULT);
        let name = redis_key(&Region::DEFAULT, Slot::for_key(&key, 16), &digest);
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let keys = Value::Array(vec![text(&name), text(NODES_KEY), text("tg:{x}:"), text("tg:{x}:zzzzzzzzzzzzzzzz")]);
        assert_eq!(
            invalidations(PushKind::Invalidate, vec![keys]),
            [Invalidation::Entry(digest.prefix(), name.into_bytes()), Invalidation::BusState]
        );
        assert_eq!(invalidations(PushKind::Invalidate, vec![Value::Nil]), [Invalidation::Everything]);
        assert_eq!(invalidations(PushKind::Disconnection, Vec::new()), [Invalidation::Everything]);
        assert_eq!(invalidations(PushKind::Message, Vec::new()), []);
    }
}
