//! The part of a connection that its streams and request bodies share with the task that owns it:
//! the waker of that task, the windows to open, and the account of its memory.
//!
//! The window of the connection bounds what all request bodies may hold together. It grows with the
//! windows of streams that are read, as far as the account has memory, and shrinks as the client
//! uses it when other streams come.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

use super::account::{ConnectionAccount, WINDOW_BASE};
use super::frame::WINDOW_DEFAULT_BYTES;
use super::memory_budget::MemoryBudget;

/// The largest window of a stream, which bounds the speed of an upload together with the round-trip
/// time. All of it may be held when the upload stalls: as much as leaves memory for others.
pub(super) const STREAM_WINDOW_MAX: u32 = 896 << 10;

/// Bytes of the window that an upload may leave to the client, above the base window, without an
/// effect on new streams.
const WINDOW_LEFT_MAX: u32 = 64 << 10;

/// The shared part of one connection.
pub(super) struct ConnectionShared {
    pub(super) account: ConnectionAccount,
    waker: RefCell<Option<Waker>>,
    /// The task of the connection runs: it need not be woken.
    is_polled: Cell<bool>,
    is_woken: Cell<bool>,
    /// Increments of the windows of streams that are to be sent. At most one per stream and half a
    /// window.
    pub(super) credits: RefCell<Vec<(u32, u32)>>,
    /// Bytes that the client may send.
    window: Cell<u32>,
    /// The window was not opened when it was time.
    is_withheld: Cell<bool>,
    /// The window of a new stream.
    first_window: Cell<u32>,
    uploads: Cell<UploadWindows>,
}

/// The windows of all streams whose request has not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct UploadWindows {
    /// How many have one.
    pub(super) streams: usize,
    /// Bytes that the client may send.
    pub(super) open: usize,
    /// Bytes that it may send while none is read, beyond the first windows.
    pub(super) grown: usize,
}

impl ConnectionShared {
    pub(super) fn new(budget: MemoryBudget) -> Rc<Self> {
        Rc::new(ConnectionShared {
            account: ConnectionAccount::new(budget),
            waker: RefCell::default(),
            is_polled: Cell::new(false),
            is_woken: Cell::new(false),
            credits: RefCell::default(),
            window: Cell::new(WINDOW_BASE),
            is_withheld: Cell::new(false),
            first_window: Cell::new(WINDOW_DEFAULT_BYTES),
            uploads: Cell::default(),
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

    /// A frame with `length` bytes of flow control arrives. Returns whether the window allows it.
    pub(super) fn receive(&self, length: u32) -> bool {
        let left = self.window.get().checked_sub(length);
        self.window.set(left.unwrap_or_default());
        self.update_exposed();
        left.is_some()
    }

    /// The windows of a stream change by what it had and has.
    pub(super) fn change_windows(&self, before: UploadWindows, after: UploadWindows) {
        if before == after {
            return;
        }
        let UploadWindows { streams, open, grown } = self.uploads.get();
        self.uploads.set(UploadWindows {
            streams: streams + after.streams - before.streams,
            open: open + after.open - before.open,
            grown: grown + after.grown - before.grown,
        });
        self.update_exposed();
    }

    /// Bytes that the client may send beyond the base window are accounted for, as far as its open
    /// streams may have them.
    fn update_exposed(&self) {
        let allowed = (self.window.get() as usize).min(self.uploads.get().open);
        self.account.set_exposed(allowed.saturating_sub(WINDOW_BASE as usize));
    }

    /// Sets the window of new streams.
    pub(super) fn set_first_window(&self, bytes: u32) {
        self.first_window.set(bytes);
    }

    /// Bytes beyond those accounted for that the client may send to new streams, with the windows
    /// that they have at first.
    pub(super) fn exposable(&self) -> usize {
        let to_come = self.account.streams_to_come().saturating_mul(self.first_window.get() as usize);
        let possible = (self.window.get() as usize).min(self.uploads.get().open.saturating_add(to_come));
        possible.saturating_sub(WINDOW_BASE as usize + self.account.exposed())
    }

    /// Whether a further stream may begin; `has_upload`: its request has not ended.
    pub(super) fn has_room_for_stream(&self, cost: usize, has_upload: bool) -> bool {
        self.account.has_room_for_stream(cost, if has_upload { self.exposable() } else { 0 })
    }

    /// The increment of the connection's window, if it is time for one.
    pub(super) fn take_credit(&self) -> Option<u32> {
        let (window, grown) = (self.window.get(), self.uploads.get().grown);
        let is_low = window <= WINDOW_BASE / 4 * 3;
        if !is_low && grown == 0 {
            self.is_withheld.set(false);
            return None;
        }
        let may_open = self.account.may_open();
        self.is_withheld.set(is_low && !may_open);
        let size = if may_open { self.window_size(grown) } else { return None };
        let of_size = |size: u32| size.checked_sub(window).filter(|increment| *increment >= size / 4);
        // An increment that is too small to be sent is not accounted for.
        let exposed = (size as usize).saturating_sub(WINDOW_BASE as usize + self.account.exposed());
        let is_allowed = of_size(size).is_some() && self.account.expose(exposed);
        let increment = of_size(if is_allowed { size } else { WINDOW_BASE })?;
        self.window.set(window + increment);
        self.update_exposed();
        Some(increment)
    }

    /// Whether the client has a large window that an upload has left: those that run have not
    /// grown. New streams together could send it at once. `was_left`: it had one at the last
    /// change, which lasts until the client has used it.
    pub(super) fn is_window_left(&self, was_left: bool) -> bool {
        let left = self.window.get().saturating_sub(WINDOW_BASE);
        if was_left { left > 0 } else { left > WINDOW_LEFT_MAX && self.uploads.get().grown == 0 }
    }

    /// The size that the window may have now. First windows have the base window together: streams
    /// that are not read must not use up the memory.
    fn window_size(&self, grown: usize) -> u32 {
        let base = WINDOW_BASE as usize;
        let bodies_max = self.account.bodies_max().saturating_sub(self.account.held());
        let wanted = (base + grown).min(bodies_max).min(STREAM_WINDOW_MAX as usize);
        if wanted < base + self.account.exposed() { WINDOW_BASE } else { wanted as u32 }
    }

    /// Bytes that the client may send on the connection.
    pub(super) fn window_bytes(&self) -> usize {
        self.window.get() as usize
    }

    /// Whether the client may be unable to send because the gateway holds much of what it has sent:
    /// no body is late meanwhile.
    pub(super) fn is_withheld(&self) -> bool {
        self.is_withheld.get()
    }

    /// The window that one stream may have beside the others.
    pub(super) fn stream_share(&self) -> u32 {
        if !self.account.may_open() {
            return 0;
        }
        let share = self.account.bodies_max() / self.uploads.get().streams.max(1);
        u32::try_from(share).unwrap_or(u32::MAX).min(STREAM_WINDOW_MAX)
    }

    /// Bytes of a request body are read.
    pub(super) fn unhold(&self, bytes: usize) {
        self.account.unhold(bytes);
        self.memory_was_released();
    }

    pub(super) fn release(&self, bytes: usize) {
        self.account.release(bytes);
        self.memory_was_released();
    }

    pub(super) fn release_stream(&self, cost: usize) {
        self.account.release_stream(cost);
        self.memory_was_released();
    }

    /// The window, or a stream, may have waited for it.
    fn memory_was_released(&self) {
        if self.account.has_deferred() || self.is_withheld.get() && self.account.may_open() {
            self.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::request_body::{UploadStream, WINDOW_FIRST};
    use super::*;

    /// Uploads on `upload` what the windows allow, `rounds` times. Returns the bytes of each.
    fn upload(shared: &Rc<ConnectionShared>, upload: &UploadStream, rounds: usize) -> Vec<u32> {
        let send = |_| {
            let bytes = upload.window().min(shared.window.get());
            for piece in vec![0; bytes as usize].chunks(16 << 10) {
                assert!(shared.receive(piece.len() as u32));
                upload.receive(piece, 0).expect("within the window");
                upload.take_all();
                shared.take_credit();
            }
            bytes
        };
        (0..rounds).map(send).collect()
    }

    #[test]
    fn upload_alone_has_much_on_its_way_and_its_share_when_others_come() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        shared.account.account_stream(12 << 10).expect("room");
        let first = UploadStream::new(1, WINDOW_FIRST, &shared);
        let sizes = upload(&shared, &first, 20);
        assert!(sizes[19] >= 880 << 10, "{sizes:?}");
        let others: Vec<_> = (1..50).map(|number| UploadStream::new(1 + 2 * number, WINDOW_FIRST, &shared)).collect();
        for _ in 0..49 {
            shared.account.account_stream(12 << 10).expect("room");
        }
        let sizes = upload(&shared, &first, 20);
        assert!(sizes[19] <= 64 << 10, "{sizes:?}");
        drop(others);
        (0..49).for_each(|_| shared.release_stream(12 << 10));
        let sizes = upload(&shared, &first, 20);
        assert!(sizes[19] >= 880 << 10, "{sizes:?}");
        drop(first);
        assert_eq!((shared.uploads.get(), shared.account.exposed()), (UploadWindows::default(), 0));
    }

    #[test]
    fn window_that_is_left_by_an_upload_counts_for_the_next_ones() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let first = UploadStream::new(1, WINDOW_FIRST, &shared);
        upload(&shared, &first, 20);
        drop(first);
        assert!(shared.window.get() > 512 << 10);
        let others: Vec<_> = (1..40).map(|number| UploadStream::new(1 + 2 * number, WINDOW_FIRST, &shared)).collect();
        assert_eq!(shared.account.exposed(), 39 * WINDOW_FIRST as usize - WINDOW_BASE as usize);
        drop(others);
        assert_eq!(shared.account.exposed(), 0);
    }
}
