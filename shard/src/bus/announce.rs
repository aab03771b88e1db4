//! Owns the publication of overrides: by this node, reception from others, and republication to
//! servers that were unreachable.
//!
//! Refuses overrides that the registry refuses (see `overrides`).

use super::event::StoredOverride;
use super::overrides::{NamedOverride, NewOverride, OverrideRegistryFull, TEXT_MAX};
use super::subscription::{OverrideMessage, Subscription};
use super::{ALL_NODES, AwaitedAcks, Bus, DeliveryReport};
use crate::entry::EntryMeta;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// An override to apply in the fleet.
#[derive(Clone, Copy, Debug)]
pub struct OverrideRequest<'a> {
    pub name: &'a str,
    pub text: &'a str,
    pub duration: Duration,
    /// The only node that it applies on; `None` for all.
    pub node: Option<&'a str>,
}

impl<M: EntryMeta> Bus<M> {
    /// Applies an override on this node and on every node of the fleet, or on one node only, and
    /// waits up to `timeout` for acknowledgements. A node that starts later reads the active
    /// fleet-wide overrides. A server that is unreachable now receives fleet-wide overrides when it
    /// is back.
    ///
    /// # Errors
    /// The override applies nowhere.
    pub async fn publish_override(
        &self,
        OverrideRequest { name, text, duration, node }: OverrideRequest<'_>,
        timeout: Duration,
    ) -> Result<DeliveryReport, OverrideRegistryFull> {
        let deadline = Instant::now() + timeout;
        if name.len().max(text.len()) > TEXT_MAX {
            return Err(OverrideRegistryFull);
        }
        let now = self.store.wall_time();
        let version = self.overrides.next_version(now);
        let mut report = DeliveryReport::default();
        if node.is_none_or(|node| node == self.node) {
            let announcement = NewOverride { name, text, version, is_fleet_wide: node.is_none() };
            self.overrides.register(&announcement, duration, now)?;
            report.acknowledged_nodes.insert(self.node.clone());
        }
        let mut publishing = JoinSet::new();
        for (index, subscription) in self.subscriptions.iter().enumerate() {
            if !subscription.carries_bus() {
                continue;
            }
            let Some(commands) = subscription.command_handle() else {
                report.unreachable_servers.insert(subscription.label());
                continue;
            };
            let (name, text, from) = (name.to_owned(), text.to_owned(), self.member.clone());
            let to = node.unwrap_or(ALL_NODES).to_owned();
            publishing.spawn(async move {
                let message = OverrideMessage { name: &name, text: &text, version, duration, to: &to, from: &from };
                (index, commands.publish_override(&message).await)
            });
        }
        let mut positions = BTreeMap::new();
        for (index, published) in publishing.join_all().await {
            match published {
                Ok(position) => positions.extend(position.map(|position| (index, position))),
                Err(_) => _ = report.unreachable_servers.insert(self.subscriptions[index].label()),
            }
        }
        self.await_acknowledgements(AwaitedAcks { positions: &positions, node, deadline }, &mut report).await;
        Ok(report)
    }

    /// The overrides that are active on this node.
    pub fn overrides(&self) -> Vec<NamedOverride> {
        self.overrides.active()
    }

    /// Waits until an override was registered since the last call; supports one waiter. Cancel
    /// safe.
    pub async fn overrides_changed(&self) {
        self.overrides.changed().await;
    }

    /// Republishes the latest fleet-wide override of each name, expired ones included, to a server
    /// that may have been unreachable or may have lost its data. The server ignores those that it
    /// has.
    pub(super) async fn republish_overrides(self: &Arc<Self>, index: usize) {
        let Some(commands) = self.subscriptions[index].command_handle() else { return };
        for NamedOverride { name, text, version, until } in self.overrides.fleet_wide() {
            let message = OverrideMessage {
                name: &name,
                text: &text,
                version,
                duration: until.saturating_duration_since(Instant::now()),
                to: ALL_NODES,
                from: &self.member,
            };
            if commands.publish_override(&message).await.is_err() {
                // Republished when the subscription is connected again.
                return;
            }
        }
    }

    /// Registers an override from a server; returns whether it is new. Its remaining duration is
    /// computed from the server's clock.
    pub(super) fn apply_override(
        &self,
        subscription: &Subscription,
        stored: &StoredOverride,
        is_fleet_wide: bool,
    ) -> bool {
        let Some(&shard) = subscription.shards.first() else { return false };
        let now_ms = self.store.remote_shards()[shard].clock().now().unix_ms;
        let duration = Duration::from_millis(stored.until_ms.saturating_sub(now_ms));
        let announcement =
            NewOverride { name: &stored.name, text: &stored.text, version: stored.version, is_fleet_wide };
        self.overrides.register(&announcement, duration, self.store.wall_time()).unwrap_or_else(|reason| {
            tracing::warn!(%reason, "override rejected");
            false
        })
    }
}
