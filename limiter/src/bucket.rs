//! Owns the state of local limits: one [`Cell`] per subject, and the [`Table`] that holds a fixed number of them.
//!
//! Refuses to grow: the number of sets is decided at construction, and a new key displaces the cell of its set
//! that is closest to full replenishment (one already replenished loses nothing). Invariant: within one set of a
//! table, and in a lone cell, a charge is atomic: what two threads are granted together never exceeds the quota.
//! The decision is governor's GCRA; this module keeps its one number, the theoretical arrival time (TAT), and
//! hands it over relative to `now`, which leaves GCRA's result unchanged and needs no clock.

mod gcra;
mod table;
#[cfg(all(test, not(loom)))]
mod tests;

use std::time::Duration;

pub use gcra::{Cell, Gcra};
pub use table::Table;

/// What is left after a request was, or would be, let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Whole tokens that may still be spent at once.
    pub remaining: u64,
    /// The time until all of the burst is back.
    pub reset: Duration,
}

/// A denial: how long until the same request would pass if nobody else asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Never shorter than true; `Duration::MAX` where the cost exceeds the burst.
    pub after: Duration,
    /// Whole tokens left, fewer than the request costs.
    pub remaining: u64,
    /// The time until all of the burst is back.
    pub reset: Duration,
}
