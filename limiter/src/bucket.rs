//! Owns the state of local limits: one [`Cell`] per subject, and the [`Table`] that holds a fixed number of them.
//!
//! Refuses to grow: the number of sets is decided at construction. Invariant: within one set of a table, and in a lone
//! cell, a charge is atomic: what two threads are granted together never exceeds the quota. The decision is governor's
//! GCRA; this module keeps its one number, the theoretical arrival time (TAT), and hands it over relative to `now`,
//! which leaves GCRA's result unchanged and needs no clock.
//!
//! # Under a flood of keys
//! What a key owes is its TAT less `now`: zero once its burst is back, and then nothing is lost by forgetting it. A set
//! has seven cells (16 bytes each) and 40 [ghosts](ghosts::Ghosts) (6 bytes each): of the keys that hash to it, those
//! that owe most have a cell, the next are known by 16 bits and a rounded TAT. A key that comes back from either goes on
//! with what it owes. In 55 bytes per key of its size a table so remembers almost seven times as many debts as that.
//!
//! - A stranger that is innocent inherits a ghost's debt with a probability of at most 40 in 65,536, or 0.061 %, however
//!   large the flood: it is the chance that one of 40 tags is its own. Nothing adds up in a ghost, unlike in the buckets
//!   of a count-min sketch, which a flood fills until every stranger owes a whole burst.
//! - A debt leaves a set only for larger ones. Whoever rotates keys to push out a key that owes `d` tokens has to owe more
//!   with 47 keys of its set at once; sets are chosen by a hash of the process's own, so with seven times the table's
//!   keys, and to spend `7 * keys * d` tokens in the time in which `d` tokens come back: 440,000 requests per interval
//!   between two tokens at the default of 65,536 keys.
//! - Where more is owed at once than a table remembers, the smallest debts are forgotten first. A key above its quota
//!   grows out of that with the first requests of its burst; with a burst of one token it cannot, and wants more keys.
//!
//! Figures are in docs/adr/0008-keyed-limits-under-flood.md.

#[cfg(all(test, loom))]
mod explored;
mod gcra;
mod ghosts;
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
