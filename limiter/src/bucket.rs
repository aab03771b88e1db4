//! Owns the state of local limits: one [`Cell`] per subject, and the [`Table`] that holds a fixed number of them.
//!
//! Refuses to grow: the number of sets is decided at construction. Invariant: within one set of a table, and in a lone
//! cell, a charge is atomic: what two threads are granted together never exceeds the quota. The decision is governor's
//! GCRA; this module keeps its one number, the theoretical arrival time (TAT), and hands it over relative to `now`,
//! which leaves GCRA's result unchanged and needs no clock.
//!
//! # Under a flood of keys
//! What a key owes is its TAT less `now`: zero once its burst is back, and then nothing is lost by forgetting it. A set
//! has seven cells (16 bytes each) and 42 ghosts (7 bytes each): of the keys that hash to it, those that asked for most
//! have a cell, the next are known by 16 bits and a rounded TAT. A key that comes back from either goes on with what it
//! owes. In 63 bytes per key of its size a table so remembers seven times as many debts as that.
//!
//! What a key asked for is what it owes and a token for each time it was denied as a ghost, up to 15: what it would owe
//! if denials were charged. Debts do not tell a heavy key with a burst of one token from a stranger; that it asks again
//! does. Denials only decide who stays: nobody is denied because of them, and time pays for them as it does for debts.
//!
//! - A stranger that is innocent inherits a ghost's debt with a probability of at most 42 in 65,536, or 0.064 %, however
//!   large the flood: it is the chance that one of 42 tags is its own. Nothing adds up in a ghost, unlike in the buckets
//!   of a count-min sketch, which a flood fills until every stranger owes a whole burst.
//! - Apart from one ghost, a debt leaves a set only for keys that asked for more. Whoever rotates keys to push out a key
//!   that asked for `d` tokens has to ask for more with 48 keys of its set at once, denied or not; sets are chosen by a
//!   hash of the process's own, so with seven times the table's keys, and for `7 * keys * d` tokens in the time in which
//!   `d` tokens come back: 460,000 requests per interval between two tokens at the default of 65,536 keys.
//! - That one is the place of the newest: where all others asked for more, a newcomer is known until the next one comes
//!   to its set. One that comes back before is limited as any, and stays the better the more often it is denied; one that
//!   does not has passed unlimited, once for each time it is forgotten.
//! - Where more is owed at once than a table remembers, those that asked for least are forgotten first. A key above its
//!   quota grows out of that once it comes back before it is forgotten.
//!
//! Figures are in docs/adr/0008-keyed-limits-under-flood.md.

mod gcra;
mod ghosts;
mod table;
#[cfg(test)]
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
