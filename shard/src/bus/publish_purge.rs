//! Owns the publication of purges: the first server that responds assigns the number, all others
//! receive the purge under that number, and unreachable servers receive it later.
//!
//! Invariant: purges of this node are numbered in the order in which they were requested.

use super::event::StreamPosition;
use super::purge_outbox::{LOCAL_ONLY, PENDING_MAX, PendingPurge, PublishResult, PurgeOutboxFull};
use super::subscription::{HEARTBEAT_INTERVAL, PurgeMessage, Subscription};
use super::{ALL_NODES, AwaitedAcks, Bus, DeliveryReport};
use crate::entry::{EntryMeta, Purge, UNNUMBERED};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout_at};

/// The longest delay before a node resends missed purges to a server; the delay is staggered by
/// node, so that one node does it for all.
const RESEND_DELAY_MAX: Duration = Duration::from_millis(500);

impl<M: EntryMeta> Bus<M> {
    /// Purges on this node and on every node of the fleet, or on the node `to` only, and waits up
    /// to `timeout` for acknowledgements.
    ///
    /// # Errors
    /// Nothing was purged.
    pub async fn purge(
        self: &Arc<Self>,
        purges: &[Purge],
        to: Option<&str>,
        timeout: Duration,
    ) -> Result<DeliveryReport, PurgeOutboxFull> {
        let deadline = Instant::now() + timeout;
        let mut results = Vec::new();
        {
            let mut outbox = self.outbox();
            if !self.subscriptions.is_empty() && outbox.pending.len() + purges.len() > PENDING_MAX {
                return Err(PurgeOutboxFull);
            }
            for &purge in purges {
                match to {
                    None => self.store.epochs().purge(purge, UNNUMBERED),
                    Some(to) if to == self.node => self.store.epochs().purge(purge, LOCAL_ONLY),
                    Some(_) => {}
                }
                if !self.subscriptions.is_empty() {
                    let (published, result) = oneshot::channel();
                    outbox.pending.push_back(PendingPurge { purge, to: to.unwrap_or(ALL_NODES).to_owned(), published });
                    results.push(result);
                }
            }
        }
        let mut report = DeliveryReport::default();
        if to.is_none_or(|to| to == self.node) {
            report.acknowledged_nodes.insert(self.node.clone());
        }
        // Published by a loop of the bus, so that a caller that is cancelled does not leave it half
        // done.
        self.publication_requested.notify_one();
        let mut published = Vec::new();
        for result in results {
            match timeout_at(deadline.into(), result).await {
                Ok(Ok(PublishResult { positions, unreachable })) => {
                    published.extend(positions);
                    let labels = unreachable.into_iter().map(|subscription| self.subscriptions[subscription].label());
                    report.unreachable_servers.extend(labels);
                }
                _ => report.unreachable_servers.extend(self.bus_subscriptions().map(Subscription::label)),
            }
        }
        // Only the last position of each subscription is awaited: a node that reached it has read
        // all earlier events.
        let mut positions: BTreeMap<usize, StreamPosition> = BTreeMap::new();
        for (subscription, position) in published {
            positions.entry(subscription).and_modify(|last| *last = position.max(*last)).or_insert(position);
        }
        self.await_acknowledgements(AwaitedAcks { positions: &positions, node: to, deadline }, &mut report).await;
        Ok(report)
    }

    /// Publishes pending purges whenever `purge` has added some. Never returns.
    pub(super) async fn publish_on_request(self: &Arc<Self>) {
        loop {
            self.publication_requested.notified().await;
            self.publish_pending().await;
        }
    }

    /// Numbers pending purges and publishes them to every server, until a purge gets no number
    /// because no server responds.
    pub(super) async fn publish_pending(self: &Arc<Self>) {
        let _publish_guard = self.publish_lock.lock().await;
        loop {
            let next = self.outbox().pending.front().map(|pending| (pending.purge, pending.to.clone()));
            let Some((purge, to)) = next else { return };
            let mut number = None;
            let (mut positions, mut unreachable) = (Vec::new(), Vec::new());
            let mut others = JoinSet::new();
            for (index, subscription) in self.subscriptions.iter().enumerate() {
                let Some(commands) = subscription.command_handle() else {
                    if subscription.carries_bus() {
                        unreachable.push(index);
                    }
                    continue;
                };
                let (to, from) = (to.clone(), self.member.clone());
                let latest_number = self.store.epochs().latest_purge_number();
                let publish = async move {
                    let message = PurgeMessage { purge, number, latest_number, to: &to, from: &from };
                    (index, commands.publish_purge(&message).await)
                };
                if number.is_some() {
                    others.spawn(publish);
                    continue;
                }
                // The first server that responds assigns the number.
                match publish.await {
                    (_, Ok(published)) => {
                        number = Some(published.number);
                        positions.extend(published.position.map(|position| (index, position)));
                    }
                    (_, Err(_)) => unreachable.push(index),
                }
            }
            for (index, published) in others.join_all().await {
                match published {
                    Ok(published) => positions.extend(published.position.map(|position| (index, position))),
                    Err(_) => unreachable.push(index),
                }
            }
            let Some(number) = number else { return };
            if to == ALL_NODES {
                self.store.epochs().assign_number(purge, number);
                self.outbox().record_recent(number, purge);
            }
            if let Some(pending) = self.outbox().pending.pop_front() {
                let _caller_may_be_gone = pending.published.send(PublishResult { positions, unreachable });
            }
        }
    }

    /// Resends the purges since number `since` that a server missed, unless another node did.
    /// Returns whether the server now has all of them.
    pub(super) async fn resend_missed_purges(self: &Arc<Self>, index: usize, since: u64) -> bool {
        let subscription = &self.subscriptions[index];
        sleep(RESEND_DELAY_MAX.mul_f64((self.seed % 1_000) as f64 / 1_000.0)).await;
        // Another server of the cluster stores the bus.
        let Some(commands) = subscription.command_handle() else { return true };
        let (recent, is_complete) = self.outbox().since(since);
        let mut is_resent = true;
        if !is_complete {
            let latest = self.store.epochs().latest_purge_number();
            is_resent &= commands.raise_purge_floor(latest).await.is_ok();
        }
        let Ok(missing) = commands.missing_purges(&recent).await else { return false };
        for (number, purge) in missing {
            is_resent &= commands.publish_purge(&self.numbered_message(purge, number)).await.is_ok();
        }
        is_resent
    }

    /// Retries pending purges until it is dropped: a full server may have room later.
    pub(super) async fn retry_pending(self: &Arc<Self>) {
        loop {
            self.publish_pending().await;
            sleep(HEARTBEAT_INTERVAL).await;
        }
    }
}
