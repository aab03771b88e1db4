//! The part of a connection that its streams and request bodies share with the task that owns it:
//! the waker of that task, the windows to open, and the memory that is accounted for.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Waker};

use crate::metrics::Counter;

/// Concurrent streams of one connection: the least that RFC 9113 section 6.5.2 recommends.
pub(super) const STREAMS_MAX: usize = 100;
/// Bytes of memory that one stream takes beside its head, measured: the task with the state of the
/// pipeline, the buffers of its exchange, and the beginning of its response.
pub(super) const STREAM_COST: usize = 12 << 10;
/// Bytes that one connection may account for. Its window, and its buffers for reading and writing,
/// come on top: in all it is below 2 MiB (`tests/http2_memory.rs`).
const CONNECTION_MAX: usize = 1_344 << 10;
/// The receiving window of the connection.
pub(super) const CONNECTION_WINDOW: u32 = 112 << 10;
/// Bytes that a connection takes from the budget of the process at once.
const RESERVATION: usize = 128 << 10;

/// Bytes that all HTTP/2 connections of the process have reserved.
static RESERVED: AtomicUsize = AtomicUsize::new(0);

/// Streams that were refused because their connection or the process had no memory for them.
static REFUSED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Streams that were refused for lack of memory.
pub(crate) fn refused_streams() -> u64 {
    REFUSED.get()
}

pub(super) fn count_refused_stream() {
    REFUSED.inc();
}

/// Bytes that all HTTP/2 connections of the process have reserved.
pub(crate) fn reserved_bytes() -> usize {
    RESERVED.load(Relaxed)
}

/// The shared part of one connection.
pub(super) struct ConnectionShared {
    waker: RefCell<Option<Waker>>,
    /// The task of the connection runs: it need not be woken.
    is_polled: Cell<bool>,
    is_woken: Cell<bool>,
    /// Increments of the windows of streams that are to be sent. At most one per stream and half a
    /// window.
    pub(super) credits: RefCell<Vec<(u32, u32)>>,
    /// Bytes that the client may send.
    window: Cell<u32>,
    /// Bytes that were received since the window was last opened.
    credit: Cell<u32>,
    /// The window was not opened when it was time.
    is_withheld: Cell<bool>,
    /// Bytes of request bodies that are held. They are accounted for.
    held: Cell<usize>,
    streams: Cell<usize>,
    streams_cost: Cell<usize>,
    /// All of it.
    accounted: Cell<usize>,
    reserved: Cell<usize>,
    /// Bytes that all connections may reserve.
    process_max: usize,
}

impl ConnectionShared {
    pub(super) fn new(process_max: usize) -> Rc<Self> {
        Rc::new(ConnectionShared {
            waker: RefCell::default(),
            is_polled: Cell::new(false),
            is_woken: Cell::new(false),
            credits: RefCell::default(),
            window: Cell::new(CONNECTION_WINDOW),
            credit: Cell::new(0),
            is_withheld: Cell::new(false),
            held: Cell::new(0),
            streams: Cell::new(0),
            streams_cost: Cell::new(0),
            accounted: Cell::new(0),
            reserved: Cell::new(0),
            process_max,
        })
    }

    /// The task of the connection begins to run.
    pub(super) fn enter(&self, cx: &Context<'_>) {
        self.is_polled.set(true);
        self.is_woken.set(false);
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    /// The task has done what it can.
    pub(super) fn leave(&self) {
        self.is_polled.set(false);
    }

    /// There are bytes to send.
    pub(super) fn wake(&self) {
        if self.is_polled.get() || self.is_woken.replace(true) {
            return;
        }
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Accounts for a new stream. Returns whether the connection and the process may hold it. What
    /// other streams hold refuses none: it has left their share to those that may come.
    pub(super) fn account_stream(&self, cost: usize) -> bool {
        if self.streams_cost.get() + cost > CONNECTION_MAX || !self.reserve(cost, self.process_max) {
            return false;
        }
        self.streams.set(self.streams.get() + 1);
        self.streams_cost.set(self.streams_cost.get() + cost);
        true
    }

    /// Bytes that are accounted for.
    pub(super) fn accounted(&self) -> usize {
        self.accounted.get()
    }

    pub(super) fn release_stream(&self, cost: usize) {
        self.streams.set(self.streams.get() - 1);
        self.streams_cost.set(self.streams_cost.get() - cost);
        self.release(cost);
    }

    /// Bytes that the streams together may hold beside what each is accounted with. The share of
    /// each stream that may come is left.
    fn room(&self) -> usize {
        let to_come = STREAMS_MAX.saturating_sub(self.streams.get()) * STREAM_COST;
        CONNECTION_MAX.saturating_sub(self.streams_cost.get() + to_come)
    }

    fn beside_streams(&self) -> usize {
        self.accounted.get() - self.streams_cost.get()
    }

    /// Accounts for `bytes` of a stream, which must be released. Returns whether the connection and
    /// the process may hold them. Half of the memory of the process is left for new streams.
    pub(super) fn account(&self, bytes: usize) -> bool {
        self.beside_streams() + bytes <= self.room() && self.reserve(bytes, self.process_max / 2)
    }

    fn reserve(&self, bytes: usize, process_max: usize) -> bool {
        let accounted = self.accounted.get() + bytes;
        if accounted > self.reserved.get() {
            let reservation = RESERVATION.max(accounted - self.reserved.get());
            if RESERVED.fetch_add(reservation, Relaxed) + reservation > process_max {
                RESERVED.fetch_sub(reservation, Relaxed);
                return false;
            }
            self.reserved.set(self.reserved.get() + reservation);
        }
        self.accounted.set(accounted);
        true
    }

    /// A frame with `length` bytes of flow control arrives. Returns whether the window allows it.
    pub(super) fn receive(&self, length: u32) -> bool {
        let left = self.window.get().checked_sub(length);
        self.window.set(left.unwrap_or_default());
        self.credit.set(self.credit.get() + length);
        left.is_some()
    }

    /// The increment of the connection's window, if it is time for one.
    pub(super) fn take_credit(&self) -> Option<u32> {
        if self.credit.get() < CONNECTION_WINDOW / 4 {
            return None;
        }
        self.is_withheld.set(!self.may_open());
        if self.is_withheld.get() {
            return None;
        }
        let increment = self.credit.take();
        self.window.set(self.window.get() + increment);
        Some(increment)
    }

    /// Whether the client may be unable to send because the gateway holds much of what it has sent:
    /// no body is late meanwhile.
    pub(super) fn is_withheld(&self) -> bool {
        self.is_withheld.get()
    }

    /// Whether the client may send more although bytes of it are held. A window is opened as bytes
    /// arrive, so that a stream that is not read holds up no other; with many held, as they are
    /// read.
    fn may_open(&self) -> bool {
        let is_process_full = RESERVED.load(Relaxed) >= self.process_max;
        self.held.get() == 0 || !is_process_full && self.beside_streams() <= self.room()
    }

    /// Whether the windows of streams may grow.
    pub(super) fn may_grow(&self) -> bool {
        self.held.get() <= self.room() / 2 && self.may_open()
    }

    /// Accounts for bytes of a request body, which the window has allowed.
    pub(super) fn hold(&self, bytes: usize) {
        self.held.set(self.held.get() + bytes);
        self.accounted.set(self.accounted.get() + bytes);
        if let Some(missing) = self.accounted.get().checked_sub(self.reserved.get()).filter(|missing| *missing > 0) {
            let reservation = RESERVATION.max(missing);
            RESERVED.fetch_add(reservation, Relaxed);
            self.reserved.set(self.reserved.get() + reservation);
        }
    }

    /// Bytes of a request body are read.
    pub(super) fn unhold(&self, bytes: usize) {
        self.held.set(self.held.get() - bytes);
        self.release(bytes);
    }

    pub(super) fn release(&self, bytes: usize) {
        self.accounted.set(self.accounted.get() - bytes);
        self.shrink_reservation();
        // The window may have waited for this.
        if self.credit.get() >= CONNECTION_WINDOW / 4 && self.may_open() {
            self.wake();
        }
    }

    /// Returns what a past burst had reserved, even if some streams stay open. One reservation is
    /// left, so that streams that begin and end do not change the budget of the process each time.
    fn shrink_reservation(&self) {
        let unused = self.reserved.get().saturating_sub(self.accounted.get());
        if unused > 2 * RESERVATION {
            RESERVED.fetch_sub(unused - RESERVATION, Relaxed);
            self.reserved.set(self.accounted.get() + RESERVATION);
        }
    }

    /// Returns to the process what the connection does not use now.
    pub(super) fn return_reservation(&self) {
        if self.accounted.get() == 0 {
            RESERVED.fetch_sub(self.reserved.replace(0), Relaxed);
        }
    }
}

impl Drop for ConnectionShared {
    fn drop(&mut self) {
        RESERVED.fetch_sub(self.reserved.get(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservation_of_a_burst_is_returned_while_a_stream_is_open() {
        let shared = ConnectionShared::new(usize::MAX);
        for _ in 0..100 {
            assert!(shared.account_stream(STREAM_COST));
        }
        assert!(shared.reserved.get() >= 100 * STREAM_COST);
        for _ in 1..100 {
            shared.release_stream(STREAM_COST);
            assert!(shared.reserved.get() >= shared.accounted());
        }
        assert!(shared.reserved.get() <= STREAM_COST + 2 * RESERVATION, "{}", shared.reserved.get());
        // A stream that begins and ends changes nothing.
        let before = shared.reserved.get();
        assert!(shared.account_stream(STREAM_COST));
        shared.release_stream(STREAM_COST);
        assert_eq!(shared.reserved.get(), before);
    }
}
