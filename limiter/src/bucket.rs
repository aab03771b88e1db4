//! State of local limits: one [`GcraCell`] per subject, and the [`GcraTable`] with a fixed number
//! of cells.
//!
//! A table never grows: its number of sets is fixed at construction. Invariant: a charge is atomic
//! within one set of a table and in a single cell: what two threads are granted together never
//! exceeds the quota. The decision is governor's GCRA. This module keeps its one number, the
//! theoretical arrival time (TAT), and passes it relative to `now`, which does not change GCRA's
//! result and needs no clock. docs/limits.md specifies which keys a table keeps when there are more
//! keys than cells; docs/adr/0008-keyed-limits-under-flood.md has the measurements.

mod gcra;
mod evicted;
mod table;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use gcra::BacklogScale;
pub use gcra::{Gcra, GcraCell};
pub use table::GcraTable;

/// The remaining quota after a request was, or would be, allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headroom {
    /// Whole tokens that may still be spent at once.
    pub remaining: u64,
    /// Time until the whole burst is available again.
    pub reset: Duration,
}

/// A denial by one limit: the time until the same request would pass if no other request came, the
/// remaining quota and its reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// Never too short; `Duration::MAX` if the cost exceeds the burst.
    pub retry_after: Duration,
    /// Whole tokens left, fewer than the request costs.
    pub remaining: u64,
    /// Time until the whole burst is available again.
    pub reset: Duration,
}
