//! Whether this process knows where to send requests: after the start, the addresses of all
//! upstreams have to be looked up once before it is ready.
//!
//! A process that is ready too early gets traffic which it can only refuse, and the breaker counts
//! those refusals. Invariant: a name that cannot be looked up delays readiness for
//! `FIRST_LOOKUP_GRACE` at most, and never after the first time.

use std::cell::Cell;
use std::time::Duration;

use super::state::SharedState;
use super::upgrade::IsSuccessor;

/// Two lookups of the default limit (`dns.timeout`): the first one may meet a name server that is
/// busy, as in a cluster whose nodes start many pods.
const FIRST_LOOKUP_GRACE: Duration = Duration::from_secs(10);
/// Names that are listed.
const NAMED_MAX: usize = 20;

/// Remembers that the first lookups are over: reloads do not change it.
pub(super) struct FirstLookups {
    are_over: Cell<bool>,
}

impl FirstLookups {
    /// A successor accepts as soon as it takes over: readiness would not keep requests from it.
    pub(super) fn new(is_successor: IsSuccessor) -> Self {
        FirstLookups { are_over: Cell::new(is_successor == IsSuccessor::Yes) }
    }

    /// The names that readiness waits for; empty: it does not.
    pub(super) fn awaited(&self, shared: &SharedState) -> Vec<String> {
        if self.are_over.get() {
            return Vec::new();
        }
        let snapshot = shared.snapshot.load();
        let unknown = snapshot.upstreams.iter().flat_map(|upstream| {
            let of = |name| format!("first lookup of {} {name}", upstream.config().name);
            upstream.unknown_names().into_iter().map(of).collect::<Vec<_>>()
        });
        let unknown: Vec<String> = unknown.take(NAMED_MAX).collect();
        if unknown.is_empty() || shared.started_at.elapsed() >= FIRST_LOOKUP_GRACE {
            self.are_over.set(true);
            return Vec::new();
        }
        unknown
    }
}
