//! States of breakers that an operator has set, of this node and its fleet: one named override on
//! the bus for each route or upstream, and one more for each node with a state of its own.
//!
//! Every node applies the latest one of those for a breaker, whichever node published it, across
//! reloads and restarts. Of an override for a route and one for its upstream, or for the fleet and
//! for a node, the later one applies until it expires, then the earlier one.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde_json::Value;
use shard::{NamedOverride, OverrideRequest};
use tokio::time::timeout;

use super::breakers;
use super::state::{ACKNOWLEDGEMENT_TIMEOUT, SharedState, check_node};
use crate::breaker::{Breaker, BreakerQuery, BreakerQueryError, BreakerStateChange, BreakerTarget};
use crate::limit::AdminReply;

/// Prefix of the names of overrides on the bus. The name of the node follows, if it is for one,
/// then the path of the breaker after a colon.
const NAME_PREFIX: &str = "breaker";
/// How long the fleet knows that a breaker judges calls again for which no state is known here.
const UNKNOWN_STATE_DURATION: Duration = Duration::from_secs(60);

/// The name of an override on the bus.
fn bus_name(target: &BreakerTarget, node: Option<&str>) -> String {
    match node {
        Some(node) => format!("{NAME_PREFIX}@{node}:{target}"),
        None => format!("{NAME_PREFIX}:{target}"),
    }
}

/// The breakers that such a name stands for.
fn target_of(name: &str) -> Option<BreakerTarget> {
    let rest = name.strip_prefix(NAME_PREFIX)?;
    let path = match rest.strip_prefix(':') {
        Some(path) => path,
        None => {
            let node_end = [":route/", ":upstream/"].iter().filter_map(|kind| rest.find(kind)).min()?;
            rest.starts_with('@').then_some(&rest[node_end + 1..])?
        }
    };
    BreakerTarget::parse(path).ok()
}

/// Publishes and applies states of breakers on the control thread.
pub(super) struct BreakerPublisher {
    shared: Arc<SharedState>,
    /// The version of the override that each breaker has, by its address. The breaker is kept
    /// allocated, so that no other one gets this address.
    applied: RefCell<HashMap<*const Breaker, (Weak<Breaker>, u64)>>,
    ended: RefCell<EndedStates>,
}

/// States that have ended before they expire: the versions of their overrides, by name. The node
/// that publishes an end may not know for how long a state of another node would have lasted: the
/// override of the end can expire first. At most as many as there are overrides.
#[derive(Default)]
struct EndedStates(HashMap<String, u64>);

impl EndedStates {
    /// Adds those that ended since, and drops those that have expired.
    fn update(&mut self, active: &[ActiveState]) {
        self.0.retain(|name, version| active.iter().any(|state| state.name == *name && state.version == *version));
        let ended = active.iter().filter(|state| state.is_ended(active));
        self.0.extend(ended.map(|state| (state.name.clone(), state.version)));
    }

    fn contains(&self, state: &ActiveState) -> bool {
        self.0.get(&state.name) == Some(&state.version)
    }
}

/// An override of the bus for breakers.
struct ActiveState {
    name: String,
    target: BreakerTarget,
    change: BreakerStateChange,
    version: u64,
}

impl ActiveState {
    /// `None`: it is of something else, or cannot be parsed.
    fn of(active: &NamedOverride, now: Instant) -> Option<Self> {
        let target = target_of(&active.name)?;
        let change = BreakerStateChange::from_text(&active.text, active.until.saturating_duration_since(now));
        if change.is_none() {
            tracing::debug!(name = active.name, text = active.text, "an override cannot be parsed");
        }
        Some(ActiveState { name: active.name.clone(), target, change: change?, version: active.version })
    }

    /// Whether it is no state, or one that was ended since. The states of others remain: those of
    /// routes when that of their upstream is ended.
    fn is_ended(&self, active: &[ActiveState]) -> bool {
        self.change == BreakerStateChange::Judge
            || active.iter().any(|other| {
                let is_end = other.change == BreakerStateChange::Judge && other.target == self.target;
                is_end && other.version > self.version
            })
    }
}

impl BreakerPublisher {
    pub(super) fn new(shared: &Arc<SharedState>) -> Self {
        BreakerPublisher { shared: Arc::clone(shared), applied: RefCell::default(), ended: RefCell::default() }
    }

    /// Applies the overrides of the bus. One for a breaker that is not configured here waits for a
    /// reload that adds it.
    pub(super) fn apply(&self) {
        let now = Instant::now();
        let mut active: Vec<ActiveState> =
            self.shared.bus.overrides().iter().filter_map(|active| ActiveState::of(active, now)).collect();
        active.sort_unstable_by_key(|active| std::cmp::Reverse(active.version));
        let (applied, ended) = (&mut *self.applied.borrow_mut(), &mut *self.ended.borrow_mut());
        ended.update(&active);
        applied.retain(|_, (breaker, _)| breaker.strong_count() > 0);
        if active.is_empty() && applied.is_empty() {
            return;
        }
        for breaker in breakers::list(&self.shared.snapshot.load()) {
            let latest = active.iter().find(|state| state.target.includes(breaker.name()) && !ended.contains(state));
            let before = applied.get(&Arc::as_ptr(breaker)).map(|(_, version)| *version);
            match latest {
                Some(latest) if before != Some(latest.version) => {
                    // A later one may have expired.
                    breaker.announce(breaker.advance(now));
                    breaker.change_state(latest.change, now);
                    applied.insert(Arc::as_ptr(breaker), (Arc::downgrade(breaker), latest.version));
                }
                None if before.is_some() => {
                    applied.remove(&Arc::as_ptr(breaker));
                    // It has expired, or its replacement had expired before it arrived here.
                    breaker.announce(breaker.advance(now));
                    breaker.change_state(BreakerStateChange::Judge, now);
                }
                Some(_) | None => {}
            }
        }
    }

    /// How long the fleet has to know of a change: of the end of a state until that would have
    /// ended by itself. The registry of overrides is bounded.
    fn duration(&self, change: BreakerStateChange, target: &BreakerTarget) -> Duration {
        if let BreakerStateChange::Set(_, duration) = change {
            return duration;
        }
        let (now, overrides) = (Instant::now(), self.shared.bus.overrides());
        let active = overrides.iter().filter_map(|active| ActiveState::of(active, now));
        let states = active.filter(|active| active.target == *target).filter_map(|active| match active.change {
            BreakerStateChange::Set(_, left) => Some(left),
            BreakerStateChange::Judge => None,
        });
        states.max().unwrap_or_default().max(UNKNOWN_STATE_DURATION)
    }

    /// Whether a state is set for the target that may be ended: on this node, or on another one,
    /// whose own states are known there alone.
    async fn may_have_state(&self, target: &BreakerTarget, node: Option<&str>) -> bool {
        let is_known = {
            let (now, overrides, ended) = (Instant::now(), self.shared.bus.overrides(), self.ended.borrow());
            let active: Vec<_> = overrides.iter().filter_map(|active| ActiveState::of(active, now)).collect();
            let is_set = |state: &ActiveState| !state.is_ended(&active) && !ended.contains(state);
            active.iter().any(|state| state.target == *target && is_set(state))
        };
        let own = self.shared.config.load().server.node.clone();
        if is_known || node.is_some_and(|node| node != own) {
            return true;
        }
        if node.is_some() {
            return false;
        }
        match timeout(ACKNOWLEDGEMENT_TIMEOUT, self.shared.bus.nodes()).await {
            Ok(nodes) => !nodes.is_complete || nodes.names.iter().any(|name| *name != own),
            Err(_) => true,
        }
    }

    /// Replies to a query. A state is published to the nodes it is for; the reply lists the nodes
    /// that have not acknowledged it in time.
    ///
    /// # Errors
    /// There is no such breaker on this node, no such node, or no state that could be ended.
    pub(super) async fn query(&self, query: BreakerQuery) -> Result<AdminReply, BreakerQueryError> {
        let BreakerQuery::Set { target, change, node } = query else {
            let value = breakers::query(&self.shared.snapshot.load(), &query)?;
            return Ok(AdminReply { value, is_complete: true });
        };
        let of_target = || -> Result<Value, BreakerQueryError> {
            breakers::query(&self.shared.snapshot.load(), &BreakerQuery::Target(target.clone()))
        };
        of_target()?;
        if let Some(node) = &node
            && let Err(nodes) = check_node(&self.shared, node).await
        {
            return Err(BreakerQueryError::UnknownNode { node: node.clone(), nodes });
        }
        if change == BreakerStateChange::Judge && !self.may_have_state(&target, node.as_deref()).await {
            return Err(BreakerQueryError::NoState(target.to_string()));
        }
        let (name, duration) = (bus_name(&target, node.as_deref()), self.duration(change, &target));
        let request = OverrideRequest { name: &name, text: change.to_text(), duration, node: node.as_deref() };
        let published = self.shared.bus.publish_override(request, ACKNOWLEDGEMENT_TIMEOUT).await?;
        self.apply();
        let mut value = of_target()?;
        value["acknowledged_nodes"] = published.acknowledged_nodes.iter().cloned().collect();
        value["unacknowledged_nodes"] = published.unacknowledged_nodes.iter().cloned().collect();
        value["unreachable_servers"] = published.unreachable_servers.iter().cloned().collect();
        let is_complete = published.unacknowledged_nodes.is_empty() && published.unreachable_servers.is_empty();
        Ok(AdminReply { value, is_complete })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str, change: BreakerStateChange, version: u64) -> ActiveState {
        let target = target_of(name).expect("a name of breakers");
        ActiveState { name: name.to_owned(), target, change, version }
    }

    /// The end is known for a shorter time than the state would have lasted.
    #[test]
    fn state_that_was_ended_does_not_return() {
        let open = BreakerStateChange::from_text("open", Duration::from_secs(3_600)).expect("a state");
        let of_node = || state("breaker@edge-1:route/orders", open, 7);
        let other = || state("breaker@edge-1:route/shop", open, 6);
        let end = || state("breaker:route/orders", BreakerStateChange::Judge, 8);
        let mut ended = EndedStates::default();
        ended.update(&[other(), of_node()]);
        assert!(!ended.contains(&of_node()));
        for active in [vec![end(), of_node(), other()], vec![of_node(), other()]] {
            ended.update(&active);
            assert!(ended.contains(&of_node()) && !ended.contains(&other()), "{} overrides", active.len());
        }
        let again = state("breaker@edge-1:route/orders", open, 9);
        assert!(!ended.contains(&again), "it is set again");
        ended.update(&[other()]);
        assert!(ended.0.is_empty(), "it has expired");
    }

    #[test]
    fn names_of_overrides_are_read_as_they_were_written() {
        for path in ["route/orders", "route/a:b@c", "upstream/origin"] {
            let target = BreakerTarget::parse(path).expect("a breaker");
            for node in [None, Some("edge-1"), Some("10.0.0.1:9900")] {
                assert_eq!(target_of(&bus_name(&target, node)).as_ref(), Some(&target), "{path} {node:?}");
            }
        }
        for other in ["device", "breaker", "breaker@edge-1", "breaker@edge-1:limit/x", "breakers:route/a"] {
            assert!(target_of(other).is_none(), "{other}");
        }
    }
}
