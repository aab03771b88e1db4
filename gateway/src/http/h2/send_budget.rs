//! The bytes of responses that one connection holds between the pipeline and its socket.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};

/// Bytes that all streams of a connection may have handed over and not sent. A socket accepts less
/// at once, so a client that reads is never held up by it.
const HELD_MAX: usize = 256 << 10;

/// Counts the bytes of `DataChunk`s that exist.
#[derive(Default)]
pub(crate) struct SendBudget {
    held: Cell<usize>,
    /// Streams that wait for room; as many as the connection has streams.
    waiting: RefCell<Vec<Waker>>,
}

impl SendBudget {
    /// Ready when a chunk may be made. Registers the task to be woken.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.held.get() < HELD_MAX {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn release(&self, bytes: usize) {
        self.held.set(self.held.get() - bytes);
        if self.held.get() < HELD_MAX / 2 {
            self.waiting.borrow_mut().drain(..).for_each(Waker::wake);
        }
    }
}

/// The payload of DATA frames.
pub(crate) struct DataChunk {
    bytes: Bytes,
    held: usize,
    budget: Rc<SendBudget>,
}

impl DataChunk {
    pub(crate) fn new(bytes: Bytes, budget: &Rc<SendBudget>) -> Self {
        budget.held.set(budget.held.get() + bytes.len());
        DataChunk { held: bytes.len(), bytes, budget: Rc::clone(budget) }
    }
}

impl Buf for DataChunk {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

impl Drop for DataChunk {
    fn drop(&mut self) {
        self.budget.release(self.held);
    }
}
