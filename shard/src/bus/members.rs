//! Owns the names of the fleet's nodes: read from the servers, and remembered for the time in which
//! no server responds.
//!
//! Invariant: at most `MEMBERS_MAX` names are remembered. A name is forgotten when servers respond
//! without it.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// More nodes than a fleet has, so that a hostile server cannot fill the memory.
const MEMBERS_MAX: usize = 10_000;

/// Members of a fleet that reads them at every heartbeat. All members read the list of all, so that
/// larger fleets read it less often: a server sends this many members a second to each node.
const MEMBERS_PER_HEARTBEAT: usize = 32;
const HEARTBEATS_BETWEEN_READS_MAX: usize = 30;

/// A member that no server has named for longer has left, if a server responds. Longer than the
/// interval at which each server is read: a node may be cut off from one server only.
const LEFT_AFTER: Duration = Duration::from_secs(40);

/// The nodes of a fleet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FleetNodes {
    pub names: BTreeSet<String>,
    /// Whether every server has responded, so that no node is missing.
    pub is_complete: bool,
}

/// Members of the fleet and when they were last read from a server.
#[derive(Default)]
pub(super) struct KnownMembers(Mutex<HashMap<String, Instant>>);

impl KnownMembers {
    pub(super) fn record<'a>(&self, members: impl Iterator<Item = &'a String>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        known.retain(|_, seen| now.duration_since(*seen) < LEFT_AFTER);
        for member in members {
            if known.len() < MEMBERS_MAX || known.contains_key(member) {
                known.insert(member.clone(), now);
            }
        }
    }

    /// Heartbeats until the members are to be read again.
    pub(super) fn heartbeats_until_read(&self) -> usize {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).len();
        (1 + known / MEMBERS_PER_HEARTBEAT).min(HEARTBEATS_BETWEEN_READS_MAX)
    }

    /// The names of the remembered nodes.
    pub(super) fn nodes(&self) -> BTreeSet<String> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.keys().map(|member| node_of(member).to_owned()).collect()
    }
}

/// The node of a member: a member is a node name and a process seed.
pub(super) fn node_of(member: &str) -> &str {
    member.rsplit_once('/').map_or(member, |(node, _)| node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembered_members_are_bounded_and_named_by_node() {
        let known = KnownMembers::default();
        let members: Vec<_> = (0..2 * MEMBERS_MAX).map(|number| format!("n{}/{number:016x}", number % 3)).collect();
        known.record(members.iter());
        assert_eq!(known.0.lock().expect("not poisoned").len(), MEMBERS_MAX);
        assert_eq!(known.nodes(), ["n0", "n1", "n2"].map(str::to_owned).into());
    }
}
