//! Collapses concurrent misses of one key into one fetch (a fill). The leader fetches; joiners wait
//! for the response head and stream the same body.
//!
//! - A leader that is dropped before its fetch has a result is replaced by one joiner. A leader
//!   whose client closes goes on without it while others wait (`is_awaited`). A leader whose fetch
//!   fails is replaced once; then all joiners fail with it.
//! - A joiner has a time budget of its own, longer than the deadlines of a fetch. When it runs out,
//!   the joiner fails; it does not fetch on its own.
//! - A body is kept from its first byte while it may be stored. A body that outgrows the size limit
//!   or the budget is buffered up to a window; a reader that falls a window behind is detached when
//!   another reader waits, so that it holds back no other.
//! - A body that may be stored makes room in the budget: slow readers of complete bodies, and of
//!   bodies that are not kept, are detached.
//! - Work of one step does not depend on the number of requests; a wakeup visits those that it
//!   wakes.
//! - Memory is charged to one budget from its allocation until it is freed.
//!
//! Bounds: requests per fill, bytes of all fills, window of a body that is not kept. The table
//! contains only fills with a leader or a producer.

mod slots;
mod state;
mod budget;
mod table;
mod producer;
mod reader;
mod leader;
#[cfg(test)]
mod tests;

pub(crate) use budget::FetchReservation;
pub(crate) use leader::{FillLeader, JoinOutcome, JoinResult};
pub(crate) use producer::Producer;
pub(crate) use reader::FillReader;
pub(crate) use state::FetchEnd;
pub(crate) use table::FillTable;
