//! Owns the fleet bus: purges and overrides between the nodes of a fleet, and key invalidations
//! from Redis servers. It runs over every server of every region.
//!
//! A purge applies on this node at once. The first server that responds assigns its number; the
//! purge is then published to all servers under that number. Each node records its stream position
//! on each server, and the publisher waits for these acknowledgements. A server that is unreachable
//! receives the purge when it is back; a purge that no server accepted waits in the outbox. A node
//! that was disconnected continues from its stream position, or reads the last purges of all tags
//! where the stream was trimmed; so does a node that has just started, which also replaces the
//! processes of its name that ended without leaving the fleet. Each node consumes the
//! stream at its own rate; a slow node delays no other node.
//!
//! An override (see `overrides`) also applies on this node at once and is published to every
//! reachable server. A node that starts reads the active overrides.
//!
//! Entries that a server reports as changed or removed are compared with the local cache (see
//! `invalidate`). Writes of this node do not invalidate its own copies.
//!
//! Refuses more purges than the outbox holds (see `purge_outbox`).
//! Invariant: a shard is read only while the purges of its server are known here and its
//! invalidations are received.

mod event;
mod overrides;
mod script;
mod members;
mod subscription;
mod purge_outbox;
mod publish_purge;
mod announce;
mod invalidate;

pub use announce::OverrideRequest;
pub use members::FleetNodes;
pub use overrides::{NamedOverride, OVERRIDE_DURATION_MAX, OverrideRegistryFull};
pub use purge_outbox::PurgeOutboxFull;

use crate::entry::{EntryMeta, Purge};
use crate::remote::{ShardFault, TopologyDiscovery};
use crate::store::Store;
use event::{BusEvent, EventPayload, StreamPosition};
use members::{KnownMembers, NodeHeartbeat, node_of};
use overrides::OverrideRegistry;
use purge_outbox::{LOCAL_ONLY, PurgeOutbox};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use subscription::{CommandHandle, FleetUpdate, HEARTBEAT_INTERVAL, PurgeMessage, Subscription, TrackedConnection};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Heartbeats of a node to a server each second.
#[cfg(test)]
pub(crate) fn heartbeats_per_second() -> f64 {
    1.0 / HEARTBEAT_INTERVAL.as_secs_f64()
}

/// Names of members that a server sends to each of `nodes` nodes, in a second.
#[cfg(test)]
pub(crate) fn members_read_per_second(nodes: usize) -> f64 {
    let known = KnownMembers::default();
    known.record((0..nodes).map(|node| format!("node-{node}")).collect::<Vec<_>>().iter());
    nodes as f64 * heartbeats_per_second() / known.heartbeats_until_read() as f64
}

/// Recipient of an event that is for all nodes.
const ALL_NODES: &str = "*";

/// Delay between connection attempts; half of it is jitter.
const RECONNECT_DELAY: Duration = Duration::from_millis(200);

/// Consecutive heartbeats that a server may leave unanswered.
const UNANSWERED_MAX: u32 = 2;

/// Microseconds by which a purge may arrive after later ones. Servers are independent, so their
/// streams are not ordered relative to each other.
const LATE_PURGE_MICROS: u64 = 2_000_000;

/// A node without a heartbeat for longer is not awaited.
const SILENT_AFTER_MS: u64 = 3_000;

/// Interval between checks for acknowledgements, in addition to notifications.
const ACK_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Invalidations processed in one batch.
const INVALIDATION_BATCH: usize = 256;

/// The fleet bus of a store: a subscription to each of its servers, the outbox of purges, and the
/// registry of overrides.
pub struct Bus<M> {
    store: Arc<Store<M>>,
    node: String,
    /// Node name and process seed: two processes may be configured with the same name.
    member: String,
    subscriptions: Vec<Subscription>,
    seed: u64,
    outbox: Mutex<PurgeOutbox>,
    /// Notified when a purge is pending.
    publication_requested: Notify,
    /// Serialises publication, in the order of the purges.
    publish_lock: AsyncMutex<()>,
    /// Notified when another node may have recorded a new stream position.
    positions_changed: Notify,
    overrides: OverrideRegistry,
    members: KnownMembers,
    counts: BusCounters,
}

/// Event counters of the bus, incremented with relaxed atomics; [`BusReport`] is their snapshot.
#[derive(Default)]
struct BusCounters {
    purges_received: AtomicU64,
    overrides_received: AtomicU64,
    invalidations: AtomicU64,
    subscription_gaps: AtomicU64,
}

/// Counters of a bus since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusReport {
    /// Purges received from other nodes.
    pub purges_received: u64,
    /// Overrides received from other nodes.
    pub overrides_received: u64,
    /// Entries that servers reported as changed.
    pub invalidations: u64,
    /// Subscriptions that were lost.
    pub subscription_gaps: u64,
    /// Purges that no server has accepted yet.
    pub pending_purges: usize,
}

/// Delivery of purges or of an override to the fleet. Both apply on this node in any case, unless
/// they are addressed to another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeliveryReport {
    /// Nodes that acknowledged, this one included.
    pub acknowledged_nodes: BTreeSet<String>,
    /// Nodes that have not acknowledged yet; they will once they are reachable.
    pub unacknowledged_nodes: BTreeSet<String>,
    /// Servers that did not accept the message; they receive it once they respond.
    pub unreachable_servers: BTreeSet<String>,
}

/// One loop of the bus, which its owner runs as long as the process.
pub struct BusLoop<M> {
    bus: Arc<Bus<M>>,
    role: LoopRole,
    has_run: AtomicBool,
}

/// The work of a loop.
enum LoopRole {
    /// Follows the subscription with this index.
    Subscription(usize),
    Discovery(Arc<TopologyDiscovery>),
    /// Publishes pending purges.
    Publication,
}

impl<M: EntryMeta> BusLoop<M> {
    /// Never returns. After a panic it may be called again; not cancel safe otherwise.
    pub async fn run(&self) {
        let BusLoop { bus, role, has_run } = self;
        let is_restart = has_run.swap(true, Ordering::Relaxed);
        match role {
            LoopRole::Subscription(index) => bus.maintain_subscription(*index, is_restart).await,
            LoopRole::Discovery(discovery) => discovery.run().await,
            LoopRole::Publication => bus.publish_on_request().await,
        }
    }
}

/// Records the loss of a subscription whose loop panics: its shards must not be read until the
/// loop runs again.
struct LossOnPanic<'b, M: EntryMeta> {
    bus: &'b Bus<M>,
    subscription: &'b Subscription,
}

impl<M: EntryMeta> Drop for LossOnPanic<'_, M> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.bus.record_loss(self.subscription, ShardFault::Io);
        }
    }
}

impl<M: EntryMeta> Bus<M> {
    /// Creates the bus of a store's shards for the node `node`. From now on the shards are not read
    /// until `run` has received their purges.
    pub fn new(store: &Arc<Store<M>>, node: &str) -> Arc<Self> {
        let seed = RandomState::new().hash_one(node);
        store.hot_copies().enable();
        let mut servers: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut cluster_slots = Vec::new();
        for (index, shard) in store.remote_shards().iter().enumerate() {
            shard.mark_unsubscribed();
            match store.cluster_of(index) {
                Some((cluster, slot)) => {
                    cluster_slots.push(Subscription::for_cluster_slot(index, cluster.clone(), slot))
                }
                None => servers.entry(shard.label().unwrap_or_default()).or_default().push(index),
            }
        }
        let for_server = |(label, shards): (String, Vec<usize>)| {
            let address = store.remote_shards()[shards[0]].address().clone();
            Subscription::for_server(label, shards, address)
        };
        Arc::new(Self {
            store: store.clone(),
            node: node.to_owned(),
            member: format!("{node}/{seed:016x}"),
            subscriptions: servers.into_iter().map(for_server).chain(cluster_slots).collect(),
            seed,
            outbox: Mutex::default(),
            publication_requested: Notify::new(),
            publish_lock: AsyncMutex::new(()),
            positions_changed: Notify::new(),
            overrides: OverrideRegistry::new(seed),
            members: KnownMembers::default(),
            counts: BusCounters::default(),
        })
    }

    /// The loops of the bus: its subscriptions, the discovery of cluster servers, and the
    /// publication of purges. The caller runs all of them, and runs one again that has panicked.
    pub fn loops(self: &Arc<Self>) -> Vec<BusLoop<M>> {
        let subscriptions = (0..self.subscriptions.len()).map(LoopRole::Subscription);
        let discoveries = self.store.topology_discoveries().iter().cloned().map(LoopRole::Discovery);
        let roles = subscriptions.chain(discoveries).chain([LoopRole::Publication]);
        let with_bus = |role| BusLoop { bus: self.clone(), role, has_run: AtomicBool::new(false) };
        roles.map(with_bus).collect()
    }

    /// Starts the loops as tasks of the current runtime. They end when the returned set is dropped,
    /// and with a panic.
    pub fn run(self: &Arc<Self>) -> JoinSet<()> {
        let loops = self.loops().into_iter();
        loops.map(|bus_loop| async move { bus_loop.run().await }).collect()
    }

    /// Removes this node from the fleet, so that other nodes do not await its acknowledgements.
    pub async fn leave(&self) {
        let members = [self.member.clone()];
        for commands in self.subscriptions.iter().filter_map(Subscription::command_handle) {
            let _expires_by_itself = commands.remove_members(&members).await;
        }
    }

    pub fn report(&self) -> BusReport {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BusReport {
            purges_received: load(&self.counts.purges_received),
            overrides_received: load(&self.counts.overrides_received),
            invalidations: load(&self.counts.invalidations),
            subscription_gaps: load(&self.counts.subscription_gaps),
            pending_purges: self.outbox().pending.len(),
        }
    }

    /// The nodes of the fleet, this one included, and those that were members when a server last
    /// responded. Takes at most one command timeout for each server. Cancel safe.
    pub async fn nodes(&self) -> FleetNodes {
        let mut nodes = FleetNodes { names: BTreeSet::from([self.node.clone()]), is_complete: true };
        for subscription in self.subscriptions.iter().filter(|subscription| subscription.carries_bus()) {
            let read = match subscription.command_handle() {
                Some(commands) => self.read_heartbeats(&commands).await.ok(),
                None => None,
            };
            nodes.is_complete &= read.is_some();
        }
        nodes.names.extend(self.members.nodes());
        nodes
    }

    /// Reads the last heartbeats of all members and remembers the members.
    async fn read_heartbeats(&self, commands: &CommandHandle) -> Result<HashMap<String, NodeHeartbeat>, ShardFault> {
        let heartbeats = commands.heartbeats().await?;
        self.members.record(heartbeats.keys());
        Ok(heartbeats)
    }

    /// Reads the members, and removes from the fleet earlier processes of this node that ended
    /// without leaving it: this process has read all purges, so that none awaits them.
    async fn update_members(&self, subscription: &Subscription, commands: &CommandHandle) -> Result<(), ShardFault> {
        let heartbeats = self.read_heartbeats(commands).await?;
        let ended = subscription.ended_processes(&self.member, &heartbeats);
        if ended.is_empty() { Ok(()) } else { commands.remove_ended(&ended).await }
    }

    /// Waits until every node has acknowledged on some server, or is silent on all of them.
    async fn await_acknowledgements(
        &self,
        AwaitedAcks { positions, node, deadline }: AwaitedAcks<'_>,
        report: &mut DeliveryReport,
    ) {
        loop {
            let notified = self.positions_changed.notified();
            let mut silent: HashMap<String, bool> = HashMap::new();
            let mut acknowledged = BTreeSet::new();
            let mut has_read = self.subscriptions.is_empty();
            for (&subscription, &published) in positions {
                let Some(commands) = self.subscriptions[subscription].command_handle() else { continue };
                let Ok(heartbeats) = self.read_heartbeats(&commands).await else { continue };
                has_read = true;
                let newest = heartbeats.values().map(|heartbeat| heartbeat.seen_ms).max().unwrap_or_default();
                for (member, NodeHeartbeat { position, seen_ms }) in heartbeats {
                    if member == self.member || node.is_some_and(|node| node != node_of(&member)) {
                        continue;
                    }
                    let is_silent = newest - seen_ms > SILENT_AFTER_MS;
                    silent.entry(member.clone()).and_modify(|silent| *silent &= is_silent).or_insert(is_silent);
                    if position >= published {
                        acknowledged.insert(member);
                    }
                }
            }
            let is_awaited = |(member, is_silent): (&String, &bool)| !acknowledged.contains(member) && !is_silent;
            let is_complete = !silent.iter().any(is_awaited);
            if is_complete || Instant::now() >= deadline {
                for member in silent.into_keys() {
                    let is_acknowledged = acknowledged.contains(&member);
                    let nodes =
                        if is_acknowledged { &mut report.acknowledged_nodes } else { &mut report.unacknowledged_nodes };
                    nodes.insert(node_of(&member).to_owned());
                }
                if !has_read && node.is_none() {
                    // No server responds: the nodes of the fleet are those that were last read.
                    let known = self.members.nodes();
                    report.unacknowledged_nodes.extend(known.into_iter().filter(|known| *known != self.node));
                }
                if let Some(node) = node
                    && !report.acknowledged_nodes.contains(node)
                {
                    report.unacknowledged_nodes.insert(node.to_owned());
                }
                return;
            }
            tokio::select! {
                () = notified => {}
                () = sleep(ACK_POLL_INTERVAL) => {}
            }
        }
    }

    /// Connects one subscription, follows it, and reconnects after a failure. Never returns.
    /// `was_connected` is true for a new call after a panic.
    async fn maintain_subscription(self: &Arc<Self>, index: usize, mut was_connected: bool) {
        let subscription = &self.subscriptions[index];
        let _loss = LossOnPanic { bus: self, subscription };
        // Number of fleet purges that the server is known to have received; later ones are resent.
        let mut purges_before = 0;
        loop {
            let server = subscription.address.wait_resolved().await;
            let fault = match subscription.connect(&server).await {
                Ok(connected) => match self.bring_up(subscription, &connected).await {
                    Ok(()) => {
                        was_connected = true;
                        let (bus, since) = (self.clone(), purges_before);
                        let has_resent = Arc::new(AtomicBool::new(false));
                        let resent = has_resent.clone();
                        let mut resending = JoinSet::new();
                        resending.spawn(async move {
                            bus.republish_overrides(index).await;
                            let is_complete = bus.resend_missed_purges(index, since).await;
                            resent.store(is_complete, Ordering::Release);
                            bus.retry_pending().await;
                        });
                        // An answered heartbeat proves that everything sent before it has arrived.
                        let on_answer = |purges| {
                            if has_resent.load(Ordering::Acquire) {
                                purges_before = purges;
                            }
                        };
                        tokio::select! {
                            fault = self.follow(subscription, connected, on_answer) => fault,
                            () = subscription.address.wait_changed(&server) => ShardFault::Moved,
                            Some(Err(error)) = resending.join_next() => resume_unwind(error.into_panic()),
                        }
                    }
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            if was_connected {
                self.counts.subscription_gaps.fetch_add(1, Ordering::Relaxed);
            }
            self.record_loss(subscription, fault);
            let jitter = RandomState::new().hash_one(self.seed) % 1_000;
            sleep(RECONNECT_DELAY / 2 + RECONNECT_DELAY.mul_f64(jitter as f64 / 2_000.0)).await;
        }
    }

    /// Marks the shards of a subscription as not readable.
    fn record_loss(&self, subscription: &Subscription, fault: ShardFault) {
        subscription.set_disconnected();
        subscription.address.request_rediscovery();
        for &shard in &subscription.shards {
            self.store.remote_shards()[shard].subscription_lost(fault);
        }
        // Only after the shards are marked: a read that is still permitted could otherwise record a
        // copy's revision whose change no server reports.
        self.store.hot_copies().invalidate_all();
    }

    /// Reads the server's clock, which dates the entries that are stored there.
    async fn sync_clock(&self, subscription: &Subscription, commands: &CommandHandle) -> Result<(), ShardFault> {
        let sent = Instant::now();
        let unix_ms = commands.server_time_ms().await?;
        let received = Instant::now();
        for &shard in &subscription.shards {
            self.store.remote_shards()[shard].clock().record_server_time(unix_ms, sent, received);
        }
        Ok(())
    }

    /// Brings the state of this node up to date with the server, then permits reads of its shards.
    async fn bring_up(&self, subscription: &Subscription, connected: &TrackedConnection) -> Result<(), ShardFault> {
        let commands = &connected.commands;
        self.sync_clock(subscription, commands).await?;
        if connected.carries_bus {
            subscription.catch_up(commands, |message| self.on_message(subscription, message)).await?;
            self.write_heartbeat(subscription, commands).await?;
            // Read again later; the commands before show that the server responds.
            let _unread = self.update_members(subscription, commands).await;
            subscription.mark_cluster_synced();
        } else if subscription.is_cluster_unsynced() {
            return Err(ShardFault::Unsubscribed);
        }
        subscription.set_connected(commands.clone());
        self.store.hot_copies().invalidate_all();
        for &shard in &subscription.shards {
            // Also before the first connection: removals by other nodes since this process started
            // were not reported.
            self.store.epochs().record_subscription_gap(shard);
            self.store.remote_shards()[shard].self_invalidations().clear();
            self.store.remote_shards()[shard].mark_subscribed();
        }
        Ok(())
    }

    /// Processes a subscription until it is lost; returns the fault. Calls `on_answer` after each
    /// answered heartbeat, with the number of fleet purges before it.
    async fn follow(
        self: &Arc<Self>,
        subscription: &Subscription,
        mut connected: TrackedConnection,
        mut on_answer: impl FnMut(u64),
    ) -> ShardFault {
        let (commands, carries_bus) = (connected.commands.clone(), connected.carries_bus);
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        let mut unanswered = 0;
        let mut until_members_are_read = 1;
        let mut invalidations = Vec::new();
        loop {
            if connected.overflowed.load(Ordering::Acquire) {
                return ShardFault::Protocol;
            }
            let result = tokio::select! {
                count = connected.invalidations.recv_many(&mut invalidations, INVALIDATION_BATCH) => {
                    if count == 0 {
                        return ShardFault::Io;
                    }
                    self.apply_invalidations(subscription, &commands, std::mem::take(&mut invalidations)).await
                }
                _ = heartbeat.tick() => match subscription.carries_bus() {
                    // The cluster slot of the bus moved to or from this server: resubscribe.
                    now if now != carries_bus => Err(ShardFault::Moved),
                    carries_bus => {
                        let purges = self.outbox().count();
                        let synced = self.sync_clock(subscription, &commands).await;
                        if synced.is_ok() {
                            on_answer(purges);
                        }
                        if carries_bus && synced.is_ok() {
                            until_members_are_read -= 1;
                            if until_members_are_read == 0 || subscription.has_earlier_processes() {
                                until_members_are_read = self.members.heartbeats_until_read();
                                // Read again later; the events show whether the server responds.
                                let _unread = self.update_members(subscription, &commands).await;
                            }
                            self.read_events(subscription, &commands, true).await
                        } else {
                            synced
                        }
                    }
                },
            };
            match result {
                Ok(()) => unanswered = 0,
                Err(ShardFault::Timeout) if unanswered + 1 < UNANSWERED_MAX => unanswered += 1,
                Err(fault) => return fault,
            }
        }
    }

    /// Records this node's stream position on the server. A full or read-only server rejects the
    /// write but still sends invalidations; other nodes then report this one as unacknowledged on
    /// it.
    async fn write_heartbeat(&self, subscription: &Subscription, commands: &CommandHandle) -> Result<(), ShardFault> {
        let position = subscription.position().unwrap_or_default();
        match commands.write_heartbeat(&self.member, position, subscription.last_purge_number()).await {
            Err(fault @ (ShardFault::OutOfMemory | ShardFault::ReadOnly)) => {
                subscription.shards.iter().for_each(|&shard| self.store.remote_shards()[shard].record_bus_fault(fault));
                Ok(())
            }
            other => other,
        }
    }

    /// Reads new events and records the stream position.
    async fn read_events(
        &self,
        subscription: &Subscription,
        commands: &CommandHandle,
        is_due: bool,
    ) -> Result<(), ShardFault> {
        let before = subscription.position();
        subscription.read_stream(commands, &mut |message| self.on_message(subscription, message)).await?;
        if is_due || subscription.position() != before {
            self.write_heartbeat(subscription, commands).await?;
        }
        let late = std::mem::take(&mut self.outbox().late);
        for (number, purge) in late {
            for commands in self.subscriptions.iter().filter_map(Subscription::command_handle) {
                let _unreachable_servers_get_it_later =
                    commands.publish_purge(&self.numbered_message(purge, number)).await;
            }
        }
        Ok(())
    }

    fn on_message(&self, subscription: &Subscription, message: FleetUpdate) {
        let epochs = self.store.epochs();
        match message {
            FleetUpdate::Override(stored) => _ = self.apply_override(subscription, &stored, true),
            FleetUpdate::PurgeFloor(number) => epochs.raise_floor(number),
            FleetUpdate::PastPurge(purge, number) => {
                if !epochs.has_applied(purge, number) {
                    epochs.purge(purge, number);
                }
            }
            FleetUpdate::Event(BusEvent { to, payload, from })
                if from == self.member || (to != ALL_NODES && to != self.node) =>
            {
                if let EventPayload::Override(stored) = payload {
                    self.overrides.observe_version(stored.version, self.store.wall_time());
                }
            }
            FleetUpdate::Event(BusEvent { to, payload: EventPayload::Override(stored), .. }) => {
                if self.apply_override(subscription, &stored, to == ALL_NODES) {
                    self.counts.overrides_received.fetch_add(1, Ordering::Relaxed);
                }
            }
            FleetUpdate::Event(BusEvent { to, payload: EventPayload::Purge { purge, number }, .. }) => {
                if to == ALL_NODES && epochs.has_applied(purge, number) {
                    return;
                }
                self.counts.purges_received.fetch_add(1, Ordering::Relaxed);
                if to != ALL_NODES {
                    return epochs.purge(purge, LOCAL_ONLY);
                }
                // Entries stored by nodes that already knew later purges are purged too, and all
                // nodes learn the higher number.
                let latest = epochs.latest_purge_number();
                let is_late = number + LATE_PURGE_MICROS < latest;
                let number = if is_late { latest } else { number };
                epochs.purge(purge, number);
                self.outbox().record_recent(number, purge);
                if is_late {
                    self.outbox().late.push((number, purge));
                }
            }
        }
    }

    fn numbered_message(&self, purge: Purge, number: u64) -> PurgeMessage<'_> {
        PurgeMessage { purge, number: Some(number), latest_number: 0, to: ALL_NODES, from: &self.member }
    }

    /// Subscriptions whose server stores the bus.
    fn bus_subscriptions(&self) -> impl Iterator<Item = &Subscription> {
        self.subscriptions.iter().filter(|subscription| subscription.carries_bus())
    }

    fn outbox(&self) -> MutexGuard<'_, PurgeOutbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stream positions that nodes have to reach.
struct AwaitedAcks<'a> {
    /// By subscription.
    positions: &'a BTreeMap<usize, StreamPosition>,
    /// The only node that is awaited; `None` for all.
    node: Option<&'a str>,
    deadline: Instant,
}
