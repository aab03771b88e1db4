//! The connections of one worker thread and what they share.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use arc_swap::ArcSwap;

use crate::pipeline::{Snapshot, WorkerResources};

/// The connections of one thread, and the resources and the snapshot that they use.
pub(crate) struct WorkerContext {
    pub(crate) worker: Rc<WorkerResources>,
    pub(crate) snapshot: Arc<ArcSwap<Snapshot>>,
    is_draining: Cell<bool>,
    /// The time for requests to end is over.
    is_expired: Cell<bool>,
    /// Wakers of the connections' tasks, by connection.
    wakers: RefCell<HashMap<u64, Waker>>,
    next_id: Cell<u64>,
}

impl WorkerContext {
    pub(crate) fn new(worker: WorkerResources, snapshot: Arc<ArcSwap<Snapshot>>) -> Rc<Self> {
        Rc::new(WorkerContext {
            worker: Rc::new(worker),
            snapshot,
            is_draining: Cell::new(false),
            is_expired: Cell::new(false),
            wakers: RefCell::default(),
            next_id: Cell::new(0),
        })
    }

    /// Makes every connection of this thread end after its current request.
    pub(crate) fn drain(&self) {
        self.is_draining.set(true);
        self.wakers.borrow().values().for_each(Waker::wake_by_ref);
    }

    /// Makes every connection of this thread end now.
    pub(crate) fn expire(&self) {
        self.is_expired.set(true);
        self.wakers.borrow().values().for_each(Waker::wake_by_ref);
    }

    pub(super) fn is_expired(&self) -> bool {
        self.is_expired.get()
    }

    pub(super) fn is_draining(&self) -> bool {
        self.is_draining.get()
    }

    /// A guard by which a connection learns that draining begins.
    pub(super) fn drain_guard(self: &Rc<Self>) -> DrainGuard {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        DrainGuard { context: Rc::clone(self), id, is_registered: false }
    }
}

/// Registers a connection for the start of draining, until it is dropped.
pub(super) struct DrainGuard {
    context: Rc<WorkerContext>,
    id: u64,
    is_registered: bool,
}

impl DrainGuard {
    /// Ready when the connection should end. A task's waker stays valid for the life of the task,
    /// so it is registered once.
    pub(super) fn poll_drain(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.register(cx);
        if self.context.is_draining() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Ready when the connection must end, with the requests that it has.
    pub(super) fn poll_expired(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.register(cx);
        if self.context.is_expired() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn register(&mut self, cx: &Context<'_>) {
        if !self.is_registered {
            self.is_registered = true;
            self.context.wakers.borrow_mut().insert(self.id, cx.waker().clone());
        }
    }
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        self.context.wakers.borrow_mut().remove(&self.id);
    }
}
