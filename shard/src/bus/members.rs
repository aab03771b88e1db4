//! Owns the names of the fleet's nodes: read from the servers, and remembered for the time in which
//! no server responds. Also tells which members are processes that this one has replaced.
//!
//! Invariant: at most `MEMBERS_MAX` names are remembered. A name is forgotten when servers respond
//! without it. A member whose heartbeat arrived after this process joined is not replaced.

use super::event::StreamPosition;

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

/// An earlier process of this node without a heartbeat for longer has ended. Two heartbeats: one
/// that only hangs is a member again with its next heartbeat.
const ENDED_AFTER_MS: u64 = 2_000;

/// The last heartbeat of a node on a server: the node's position in the stream, and the time in
/// milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeHeartbeat {
    pub(super) position: StreamPosition,
    pub(super) seen_ms: u64,
}

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

/// Earlier processes of this node on one server: members of the same name that were there when this
/// process joined, with the times of their last heartbeats. `None` before this process has joined.
///
/// One that crashed has no further heartbeat, and this process replaces it. One that has, such as a
/// second process that is configured with the same name, stays a member.
#[derive(Default)]
pub(super) struct EarlierProcesses(Option<HashMap<String, u64>>);

impl EarlierProcesses {
    /// The last heartbeats of those that have ended, of all `heartbeats` on the server. The process
    /// itself, `member`, joins with its first heartbeat.
    pub(super) fn ended(
        &mut self,
        member: &str,
        heartbeats: &HashMap<String, NodeHeartbeat>,
    ) -> Vec<(String, NodeHeartbeat)> {
        let Some(own) = heartbeats.get(member) else { return Vec::new() };
        let is_namesake = |other: &str| other != member && node_of(other) == node_of(member);
        let earlier = self.0.get_or_insert_with(|| {
            let namesakes = heartbeats.iter().filter(|(other, _)| is_namesake(other)).take(MEMBERS_MAX);
            namesakes.map(|(other, heartbeat)| (other.clone(), heartbeat.seen_ms)).collect()
        });
        earlier.retain(|other, seen_ms| heartbeats.get(other).is_some_and(|heartbeat| heartbeat.seen_ms == *seen_ms));
        let ended = earlier.iter().filter(|(_, seen_ms)| own.seen_ms.saturating_sub(**seen_ms) > ENDED_AFTER_MS);
        ended.map(|(other, _)| (other.clone(), heartbeats[other].clone())).collect()
    }

    /// Whether none is left that may have ended.
    pub(super) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(HashMap::is_empty)
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

    #[test]
    fn earlier_processes_have_ended_unless_they_have_a_heartbeat_after_the_join() {
        let at = |members: &[(&str, u64)]| -> HashMap<String, NodeHeartbeat> {
            let heartbeat = |seen_ms| NodeHeartbeat { position: Default::default(), seen_ms };
            members.iter().map(|&(member, seen_ms)| (member.to_owned(), heartbeat(seen_ms))).collect()
        };
        let ended = |earlier: &mut EarlierProcesses, members: &[(&str, u64)]| {
            let mut ended: Vec<_> =
                earlier.ended("a/new", &at(members)).into_iter().map(|(member, _)| member).collect();
            ended.sort();
            ended
        };
        let mut earlier = EarlierProcesses::default();
        assert_eq!(ended(&mut earlier, &[("a/old", 1_000)]), [""; 0], "it has not joined");
        assert_eq!(
            ended(&mut earlier, &[("a/old", 1_000), ("a/twin", 9_000), ("b/1", 1_000), ("a/new", 9_500)]),
            ["a/old"]
        );
        assert!(!earlier.is_empty(), "the twin may have ended");
        // A process that joins later is no earlier one.
        let later = [("a/twin", 9_900), ("b/1", 1_000), ("a/new", 10_500), ("a/later", 10_400)];
        assert_eq!(ended(&mut earlier, &later), [""; 0]);
        assert!(earlier.is_empty());
        let silent = [("a/twin", 9_900), ("b/1", 1_000), ("a/new", 20_000), ("a/later", 10_400)];
        assert_eq!(ended(&mut earlier, &silent), [""; 0], "both had a heartbeat after the join");
    }
}
