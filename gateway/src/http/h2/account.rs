//! The memory that one connection may hold, and its part of the memory of all connections.
//!
//! Everything that grows with what a client does is accounted for before it is allowed: streams,
//! request bodies that were received, and the window by which more may come. Invariant: what is
//! accounted for, and the base window, stay below `CONNECTION_MAX`.

use std::cell::Cell;

use super::memory_budget::{BudgetShare, MemoryBudget, StreamRefusal};

/// Concurrent streams of one connection: the least that RFC 9113 section 6.5.2 recommends.
pub(super) const STREAMS_MAX: usize = 100;
/// Bytes of memory that one stream takes beside its head, measured: the task with the state of the
/// pipeline, the buffers of its exchange, and the beginning of its response.
pub(super) const STREAM_COST: usize = 12 << 10;
/// Bytes that one connection may account for, with its base window. Its buffers for reading and
/// writing come on top: in all it is below 2 MiB (`tests/http2_memory.rs`).
const CONNECTION_MAX: usize = 1_472 << 10;
/// Bytes that the client may send on the connection in any case, for whichever streams.
pub(super) const WINDOW_BASE: u32 = 112 << 10;
/// Bytes for the bodies of requests and responses that are always left beside streams.
const BODIES_MIN: usize = 128 << 10;
/// Streams for which memory is left when the window of the connection grows: a client that uploads
/// usually has few others. Further ones wait until the window is used.
const STREAMS_LEFT: usize = 24;
/// Bytes that are left for each stream that may come and has to wait.
const DEFERRED_COST: usize = 1_536;
/// Bytes that a stream and its head can cost.
const STREAM_COST_MAX: usize = 48 << 10;
/// Bytes that a connection takes from the budget of the process at once.
const RESERVATION: usize = 128 << 10;

/// The account of one connection.
pub(super) struct ConnectionAccount {
    streams: Cell<usize>,
    /// Of all streams, also of those that wait for memory.
    streams_cost: Cell<usize>,
    deferred: Cell<usize>,
    /// Bytes of request bodies that are held.
    held: Cell<usize>,
    /// Bytes that the client may send for open streams, beyond the base window.
    exposed: Cell<usize>,
    /// All of it.
    accounted: Cell<usize>,
    reserved: Cell<usize>,
    budget: MemoryBudget,
}

impl ConnectionAccount {
    pub(super) fn new(budget: MemoryBudget) -> Self {
        ConnectionAccount {
            streams: Cell::new(0),
            streams_cost: Cell::new(0),
            deferred: Cell::new(0),
            held: Cell::new(0),
            exposed: Cell::new(0),
            accounted: Cell::new(0),
            reserved: Cell::new(0),
            budget,
        }
    }

    pub(super) fn count_refusal(&self, refusal: StreamRefusal) {
        self.budget.count_refusal(refusal);
    }

    /// Bytes that are accounted for.
    pub(super) fn accounted(&self) -> usize {
        self.accounted.get()
    }

    pub(super) fn held(&self) -> usize {
        self.held.get()
    }

    pub(super) fn exposed(&self) -> usize {
        self.exposed.get()
    }

    /// Bytes beside those that each stream is accounted with.
    fn beside_streams(&self) -> usize {
        self.accounted.get() - self.streams_cost.get()
    }

    /// Bytes that are neither streams nor bodies of requests.
    fn others(&self) -> usize {
        self.beside_streams() - self.held.get() - self.exposed.get()
    }

    pub(super) fn streams_to_come(&self) -> usize {
        STREAMS_MAX.saturating_sub(self.streams.get() + self.deferred.get())
    }

    /// Whether a further stream of this cost may begin, so that those that may come can wait.
    /// `exposable`: bytes beyond those accounted for that the client may send to them.
    pub(super) fn has_room_for_stream(&self, cost: usize, exposable: usize) -> bool {
        let deferrable = self.streams_to_come().saturating_sub(1) * DEFERRED_COST;
        let beside = (self.beside_streams() + deferrable + exposable).max(BODIES_MIN);
        self.streams_cost.get() + cost + beside + WINDOW_BASE as usize <= CONNECTION_MAX
    }

    /// Whether the next stream may have to wait.
    pub(super) fn is_short(&self, exposable: usize) -> bool {
        !self.has_room_for_stream(STREAM_COST_MAX, exposable)
    }

    /// Accounts for a stream that begins, for which the connection has room.
    pub(super) fn account_stream(&self, cost: usize) -> Result<(), StreamRefusal> {
        self.reserve(cost, BudgetShare::All)?;
        self.streams.set(self.streams.get() + 1);
        self.streams_cost.set(self.streams_cost.get() + cost);
        Ok(())
    }

    pub(super) fn release_stream(&self, cost: usize) {
        self.streams.set(self.streams.get() - 1);
        self.streams_cost.set(self.streams_cost.get() - cost);
        self.release(cost);
    }

    /// Accounts for a stream that waits until it may begin. `has_exposed`: its window, which is
    /// accounted for, lets the client send more than before.
    pub(super) fn account_deferred(&self, cost: usize, has_exposed: bool) -> Result<(), StreamRefusal> {
        let deferrable = self.streams_to_come().saturating_sub(1) * DEFERRED_COST;
        let beside = (self.beside_streams() + deferrable).max(BODIES_MIN);
        let is_within = self.streams_cost.get() + cost + beside + WINDOW_BASE as usize <= CONNECTION_MAX;
        // So much was left for each.
        if (cost > DEFERRED_COST || has_exposed) && !is_within {
            return Err(StreamRefusal::Connection);
        }
        self.reserve(cost, BudgetShare::All)?;
        self.deferred.set(self.deferred.get() + 1);
        self.streams_cost.set(self.streams_cost.get() + cost);
        Ok(())
    }

    /// As `account_deferred`, for a stream that has waited before.
    pub(super) fn keep_deferred(&self, cost: usize) {
        self.reserve_allowed(cost);
        self.deferred.set(self.deferred.get() + 1);
        self.streams_cost.set(self.streams_cost.get() + cost);
    }

    pub(super) fn release_deferred(&self, cost: usize) {
        self.deferred.set(self.deferred.get() - 1);
        self.streams_cost.set(self.streams_cost.get() - cost);
        self.release(cost);
    }

    pub(super) fn has_deferred(&self) -> bool {
        self.deferred.get() > 0
    }

    /// Bytes that the streams together may hold of responses and kept requests. The share of each
    /// stream that may come is left.
    fn room(&self) -> usize {
        let to_come = self.streams_to_come() * STREAM_COST;
        (CONNECTION_MAX - WINDOW_BASE as usize).saturating_sub(self.streams_cost.get() + to_come).min(BODIES_MIN)
    }

    /// Accounts for `bytes` of a stream, which must be released. Returns whether the connection and
    /// the process may hold them. Half of the memory of the process is left for new streams, and
    /// twice the base window for bodies of requests: those that are kept are released only when the
    /// rest was received.
    pub(super) fn account(&self, bytes: usize) -> bool {
        self.account_within(bytes, self.room())
    }

    /// As `account`, for the first bytes of a response. An eighth of the room is left for what else
    /// a stream needs.
    pub(super) fn account_short_read(&self, bytes: usize) -> bool {
        self.account_within(bytes, self.room() / 8 * 7)
    }

    fn account_within(&self, bytes: usize, room: usize) -> bool {
        let deferrable = self.streams_to_come() * DEFERRED_COST;
        let is_within = self.accounted.get() + bytes + deferrable + 2 * WINDOW_BASE as usize <= CONNECTION_MAX;
        is_within && self.others() + bytes <= room && self.reserve(bytes, BudgetShare::Half).is_ok()
    }

    fn reserve(&self, bytes: usize, share: BudgetShare) -> Result<(), StreamRefusal> {
        let accounted = self.accounted.get() + bytes;
        if let Some(missing) = accounted.checked_sub(self.reserved.get()).filter(|missing| *missing > 0) {
            let reservation = RESERVATION.max(missing);
            self.budget.try_reserve(reservation, share)?;
            self.reserved.set(self.reserved.get() + reservation);
        }
        self.accounted.set(accounted);
        Ok(())
    }

    /// Accounts for bytes that the client was allowed to send.
    fn reserve_allowed(&self, bytes: usize) {
        self.accounted.set(self.accounted.get() + bytes);
        if let Some(missing) = self.accounted.get().checked_sub(self.reserved.get()).filter(|missing| *missing > 0) {
            let reservation = RESERVATION.max(missing);
            self.budget.reserve(reservation);
            self.reserved.set(self.reserved.get() + reservation);
        }
    }

    /// Accounts for bytes of a request body, which the window has allowed.
    pub(super) fn hold(&self, bytes: usize) {
        self.held.set(self.held.get() + bytes);
        self.reserve_allowed(bytes);
    }

    /// Bytes of a request body are read.
    pub(super) fn unhold(&self, bytes: usize) {
        self.held.set(self.held.get() - bytes);
        self.release(bytes);
    }

    /// The client may send `bytes` beyond the base window.
    pub(super) fn set_exposed(&self, bytes: usize) {
        let before = self.exposed.replace(bytes);
        match bytes.checked_sub(before) {
            Some(0) => {}
            Some(more) => self.reserve_allowed(more),
            None => self.release(before - bytes),
        }
    }

    /// Lets the client send `more` bytes beyond the base window than before. Returns whether the
    /// process may hold them.
    pub(super) fn expose(&self, more: usize) -> bool {
        let is_reserved = self.reserve(more, BudgetShare::Half).is_ok();
        self.exposed.set(self.exposed.get() + if is_reserved { more } else { 0 });
        is_reserved
    }

    /// Whether the base window may be opened again. It is opened as bytes arrive, so that a stream
    /// that is not read holds up no other; with many held, as they are read.
    pub(super) fn may_open(&self) -> bool {
        let deferrable = self.streams_to_come() * DEFERRED_COST;
        let others = self.accounted.get() - self.exposed.get() + deferrable;
        let is_within = others + WINDOW_BASE as usize <= CONNECTION_MAX;
        self.held.get() == 0 || is_within && !self.budget.is_full()
    }

    /// Whether the process or the address of the client has no memory left, whatever this
    /// connection does.
    pub(super) fn is_budget_full(&self) -> bool {
        self.budget.is_full()
    }

    /// Bytes that bodies of requests may have: those that are held, and those that may come.
    pub(super) fn bodies_max(&self) -> usize {
        let to_come = self.streams_to_come().min(STREAMS_LEFT) * STREAM_COST;
        CONNECTION_MAX.saturating_sub(self.streams_cost.get() + to_come + self.others())
    }

    pub(super) fn release(&self, bytes: usize) {
        self.accounted.set(self.accounted.get() - bytes);
        self.shrink_reservation();
    }

    /// Returns what a past burst had reserved, even if some streams stay open. One reservation is
    /// left, so that streams that begin and end do not change the budget of the process each time.
    fn shrink_reservation(&self) {
        let unused = self.reserved.get().saturating_sub(self.accounted.get());
        if unused > 2 * RESERVATION {
            self.budget.release(unused - RESERVATION);
            self.reserved.set(self.accounted.get() + RESERVATION);
        }
    }

    /// Returns to the process what the connection does not use now.
    pub(super) fn return_reservation(&self) {
        if self.accounted.get() == 0 {
            self.budget.release(self.reserved.replace(0));
        }
    }
}

impl Drop for ConnectionAccount {
    fn drop(&mut self) {
        self.budget.release(self.reserved.get());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> ConnectionAccount {
        ConnectionAccount::new(MemoryBudget::unlimited())
    }

    #[test]
    fn reservation_of_a_burst_is_returned_while_a_stream_is_open() {
        let account = account();
        for _ in 0..STREAMS_MAX {
            assert!(account.has_room_for_stream(STREAM_COST, 0));
            assert_eq!(account.account_stream(STREAM_COST), Ok(()));
        }
        assert!(account.reserved.get() >= STREAMS_MAX * STREAM_COST);
        for _ in 1..STREAMS_MAX {
            account.release_stream(STREAM_COST);
            assert!(account.reserved.get() >= account.accounted());
        }
        assert!(account.reserved.get() <= STREAM_COST + 2 * RESERVATION, "{}", account.reserved.get());
        // A stream that begins and ends changes nothing.
        let before = account.reserved.get();
        assert_eq!(account.account_stream(STREAM_COST), Ok(()));
        account.release_stream(STREAM_COST);
        assert_eq!(account.reserved.get(), before);
    }

    #[test]
    fn large_heads_that_wait_leave_room_for_others_that_come() {
        let account = account();
        account.hold(800 << 10);
        while account.has_room_for_stream(STREAM_COST, 0) {
            assert_eq!(account.account_stream(STREAM_COST), Ok(()));
        }
        while account.account_deferred(4 << 10, false).is_ok() {}
        while account.streams_to_come() > 0 {
            assert_eq!(account.account_deferred(DEFERRED_COST, false), Ok(()), "none is refused");
        }
        let all = account.accounted() + WINDOW_BASE as usize;
        assert!(all <= CONNECTION_MAX, "{all} of {CONNECTION_MAX}");
    }

    #[test]
    fn body_that_is_held_makes_streams_wait_and_none_is_refused() {
        let account = account();
        assert_eq!(account.account_stream(STREAM_COST), Ok(()));
        // The largest window of one upload.
        account.hold(896 << 10);
        assert!(account.may_open());
        let (mut running, mut waiting) = (0, 0);
        for _ in 1..STREAMS_MAX {
            if account.has_room_for_stream(STREAM_COST + 600, 0) {
                assert_eq!(account.account_stream(STREAM_COST + 600), Ok(()));
                running += 1;
            } else {
                assert_eq!(account.account_deferred(DEFERRED_COST, false), Ok(()));
                waiting += 1;
            }
        }
        assert!(running > 20 && waiting > 0, "{running} run, {waiting} wait");
        // The others may send meanwhile.
        assert!(account.may_open());
        account.unhold(896 << 10);
        assert!(account.has_room_for_stream(STREAM_COST, 0));
    }
}
