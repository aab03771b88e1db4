//! Limit overrides of this node and its fleet: one named override on the bus for each rule. Waits
//! for changes of the states of breakers too, which are on the same bus.
//!
//! Refuses to change a rule in another way. Every node therefore applies the latest override,
//! whichever node published it, across reloads and restarts.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use shard::OverrideRequest;
use tokio::time::sleep_until;

use super::breaker_publisher::BreakerPublisher;
use super::state::{ACKNOWLEDGEMENT_TIMEOUT, SharedState, check_node};
use crate::admin::BreakerReply;
use crate::breaker::BreakerQuery;
use crate::event::Event;
use crate::limit::{AdminQuery, AdminQueryError, AdminReply, OverrideCommand};

/// Prefix of the names of overrides on the bus; the rule's name follows.
const NAME_PREFIX: &str = "limit:";

/// Publishes and applies limit overrides on the control thread, and holds the overrides in effect.
pub(super) struct OverridePublisher {
    shared: Arc<SharedState>,
    breakers: BreakerPublisher,
    /// The overrides that took effect, by name: begin and end of each are logged once.
    applied: RefCell<HashMap<String, AppliedOverride>>,
}

/// An override that took effect, or the clearing of one.
struct AppliedOverride {
    version: u64,
    /// False if the command cleared an override.
    is_set: bool,
}

impl OverridePublisher {
    pub(super) fn new(shared: &Arc<SharedState>) -> Self {
        let breakers = BreakerPublisher::new(shared);
        OverridePublisher { shared: Arc::clone(shared), breakers, applied: RefCell::default() }
    }

    /// Replies to a query about breakers.
    pub(super) async fn breaker_query(self: Rc<Self>, query: BreakerQuery) -> BreakerReply {
        self.breakers.query(query).await
    }

    /// Applies the overrides of the bus, also those of breakers. One for a rule that is not
    /// configured here waits for a reload that adds the rule.
    pub(super) fn apply_overrides(&self) {
        self.breakers.apply();
        let (snapshot, config) = (self.shared.snapshot.load(), self.shared.config.load());
        let (overrides, mut applied) = (self.shared.bus.overrides(), self.applied.borrow_mut());
        applied.retain(|name, ended| {
            let is_active = overrides.iter().any(|active| active.name == *name);
            if !is_active && let Some(rule) = name.strip_prefix(NAME_PREFIX) {
                // It has expired, or its replacement had expired before it arrived here.
                let cleared = OverrideCommand::Clear.apply(&snapshot.limiter, &config.limit, rule);
                if cleared.is_ok() && ended.is_set {
                    Event::LimitOverrideEnded { rule, reason: "expired" }.emit();
                }
            }
            is_active
        });
        for active in overrides {
            let Some(rule) = active.name.strip_prefix(NAME_PREFIX) else { continue };
            let remaining = active.until.saturating_duration_since(Instant::now());
            let Some(command) = OverrideCommand::from_text(&active.text, remaining) else {
                tracing::debug!(rule, text = active.text, "an override cannot be parsed");
                continue;
            };
            let previous = applied.get(&active.name);
            let is_new = previous.is_none_or(|previous| previous.version != active.version);
            let was_set = previous.is_some_and(|previous| previous.is_set);
            if command.apply(&snapshot.limiter, &config.limit, rule).is_ok() && is_new {
                let is_set = command != OverrideCommand::Clear;
                if is_set {
                    Event::LimitOverridden { rule, change: &command.description() }.emit();
                } else if was_set {
                    Event::LimitOverrideEnded { rule, reason: "cleared" }.emit();
                }
                applied.insert(active.name, AppliedOverride { version: active.version, is_set });
            }
        }
    }

    /// Waits until an override was registered on the bus, or one expires. Cancel safe.
    pub(super) async fn changed(&self) {
        let next_expiry = self.shared.bus.overrides().iter().map(|active| active.until).min();
        let expiry = async {
            match next_expiry {
                Some(until) => sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.shared.bus.overrides_changed() => {}
            () = expiry => {}
        }
    }

    /// Replies to a query about limits. An override is published to the nodes it is for; the reply
    /// lists the nodes that have not acknowledged it in time.
    pub(super) async fn query(self: Rc<Self>, query: AdminQuery) -> Result<AdminReply, AdminQueryError> {
        let run = || {
            let (snapshot, config) = (self.shared.snapshot.load(), self.shared.config.load());
            query.run(&snapshot.limiter, &config.limit, &snapshot.identity)
        };
        let value = run()?;
        let AdminQuery::Override { rule, command, node } = &query else {
            return Ok(AdminReply { value, is_complete: true });
        };
        if let Some(node) = node
            && let Err(nodes) = check_node(&self.shared, node).await
        {
            return Err(AdminQueryError::UnknownNode { node: node.clone(), nodes });
        }
        let (name, text) = (format!("{NAME_PREFIX}{rule}"), command.to_text());
        let (duration, node) = (command.duration(), node.as_deref());
        let request = OverrideRequest { name: &name, text: &text, duration, node };
        let published = self.shared.bus.publish_override(request, ACKNOWLEDGEMENT_TIMEOUT).await?;
        self.apply_overrides();
        let mut value = run()?;
        value["acknowledged_nodes"] = published.acknowledged_nodes.iter().cloned().collect();
        value["unacknowledged_nodes"] = published.unacknowledged_nodes.iter().cloned().collect();
        value["unreachable_servers"] = published.unreachable_servers.iter().cloned().collect();
        let is_complete = published.unacknowledged_nodes.is_empty() && published.unreachable_servers.is_empty();
        Ok(AdminReply { value, is_complete })
    }
}
