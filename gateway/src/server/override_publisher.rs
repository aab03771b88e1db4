//! Limit overrides of this node and its fleet: one named override on the bus for each rule.
//!
//! Refuses to change a rule in another way. Every node therefore applies the latest override,
//! whichever node published it, across reloads and restarts.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use shard::OverrideRequest;

use super::state::{ACKNOWLEDGEMENT_TIMEOUT, SharedState};
use crate::event::Event;
use crate::limit::{AdminQuery, AdminQueryError, AdminReply, OverrideCommand};

/// Prefix of the names of overrides on the bus; the rule's name follows.
const NAME_PREFIX: &str = "limit:";

/// Publishes and applies limit overrides on the control thread, and holds the version of each
/// applied override by name.
pub(super) struct OverridePublisher {
    shared: Arc<SharedState>,
    /// Versions of the overrides that took effect, by name: each is logged once.
    applied: RefCell<HashMap<String, u64>>,
}

impl OverridePublisher {
    pub(super) fn new(shared: &Arc<SharedState>) -> Self {
        OverridePublisher { shared: Arc::clone(shared), applied: RefCell::default() }
    }

    /// Applies the overrides of the bus. One for a rule that is not configured here waits for a
    /// reload that adds the rule.
    pub(super) fn apply_overrides(&self) {
        let (snapshot, config) = (self.shared.snapshot.load(), self.shared.config.load());
        let (overrides, mut applied) = (self.shared.bus.overrides(), self.applied.borrow_mut());
        applied.retain(|name, _| {
            let is_active = overrides.iter().any(|active| active.name == *name);
            if !is_active && let Some(rule) = name.strip_prefix(NAME_PREFIX) {
                // It has expired, or its replacement had expired before it arrived here.
                let _rule_may_be_gone = OverrideCommand::Clear.apply(&snapshot.limiter, &config.limit, rule);
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
            let is_new = applied.get(&active.name) != Some(&active.version);
            if command.apply(&snapshot.limiter, &config.limit, rule).is_ok() && is_new {
                Event::LimitOverridden { rule, change: &command.description() }.emit();
                applied.insert(active.name, active.version);
            }
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
