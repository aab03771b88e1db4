//! Owns the purges that are on their way: pending ones without a number, and the recent ones that
//! unreachable servers receive later.
//!
//! Refuses more than `PENDING_MAX` purges while no server responds.

use super::event::StreamPosition;
use crate::entry::Purge;
use std::collections::VecDeque;
use tokio::sync::oneshot;

/// Purges that no server has accepted yet.
pub(super) const PENDING_MAX: usize = 1_024;

/// Recent purges kept for servers that were unreachable.
const RECENT_MAX: usize = 4_096;

/// The number of a purge that applies to the local cache of one node and not to entries on servers.
pub(super) const LOCAL_ONLY: u64 = 0;

/// Queue of at most `PENDING_MAX` purges without a number, and the last `RECENT_MAX` numbered
/// purges; behind the lock of the bus.
#[derive(Default)]
pub(super) struct PurgeOutbox {
    pub(super) pending: VecDeque<PendingPurge>,
    /// The last purges of the fleet, whichever node published them.
    recent: VecDeque<(u64, Purge)>,
    /// Number of purges dropped from `recent`.
    dropped: u64,
    /// Purges that arrived late, to be republished under a higher number.
    pub(super) late: Vec<(u64, Purge)>,
}

/// A purge without a number: its scope, its recipient (`*` or a node), and the channel for the
/// result of its publication.
pub(super) struct PendingPurge {
    pub(super) purge: Purge,
    pub(super) to: String,
    pub(super) published: oneshot::Sender<PublishResult>,
}

/// The positions at which a purge was published, and the subscriptions that did not accept it.
#[derive(Clone, Debug)]
pub(super) struct PublishResult {
    /// Stream position, by subscription.
    pub(super) positions: Vec<(usize, StreamPosition)>,
    pub(super) unreachable: Vec<usize>,
}

/// The outbox is full because no server accepts purges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no server responds, and {PENDING_MAX} purges are pending already")]
pub struct PurgeOutboxFull;

impl PurgeOutbox {
    /// Number of purges so far.
    pub(super) fn count(&self) -> u64 {
        self.dropped + self.recent.len() as u64
    }

    /// The purges from `since` on, and whether none of them was dropped.
    pub(super) fn since(&self, since: u64) -> (Vec<(u64, Purge)>, bool) {
        let skip = usize::try_from(since.saturating_sub(self.dropped)).unwrap_or(usize::MAX);
        (self.recent.iter().skip(skip).copied().collect(), since >= self.dropped)
    }

    /// Remembers a numbered purge, for servers that are unreachable now.
    pub(super) fn record_recent(&mut self, number: u64, purge: Purge) {
        self.recent.push_back((number, purge));
        if self.recent.len() > RECENT_MAX {
            self.recent.pop_front();
            self.dropped += 1;
        }
    }
}
