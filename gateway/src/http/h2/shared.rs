//! The part of a connection that its streams and request bodies share with the task that owns it:
//! the waker of that task, the windows to open, and the memory that is accounted for.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Waker};

use crate::metrics::Counter;

/// Bytes that one connection may account for: 128 streams with small heads. Its buffers for reading
/// and writing come on top: in all it is below 2 MiB (`tests/http2_memory.rs`).
const CONNECTION_MAX: usize = 1_536 << 10;
/// Up to here the windows of streams grow while their bodies are read.
const GROWTH_MAX: usize = 1 << 20;
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

    /// Accounts for `bytes`, which must be released. Returns whether the connection and the process
    /// may hold so many more.
    pub(super) fn account(&self, bytes: usize) -> bool {
        self.account_within(bytes, CONNECTION_MAX, self.process_max)
    }

    /// The same for what makes a stream faster and is not necessary: a window that is larger than
    /// the first one, more than a little of a body that is read at once. Half of the memory is left
    /// for new streams.
    pub(super) fn account_growth(&self, bytes: usize) -> bool {
        self.account_within(bytes, GROWTH_MAX, self.process_max / 2)
    }

    fn account_within(&self, bytes: usize, max: usize, process_max: usize) -> bool {
        let accounted = self.accounted.get() + bytes;
        if accounted > max {
            return false;
        }
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

    pub(super) fn release(&self, bytes: usize) {
        self.accounted.set(self.accounted.get() - bytes);
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
