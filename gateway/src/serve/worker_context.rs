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
    stage: Cell<DrainStage>,
    /// Wakers of the connections' tasks, by connection.
    wakers: RefCell<HashMap<u64, Waker>>,
    next_id: Cell<u64>,
}

/// Stages of the connections of a worker. They only move forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DrainStage {
    Serving,
    /// Each connection ends with its next response.
    Draining,
    /// Idle connections end.
    Closing,
    /// Every connection ends, with the requests that it has.
    Expired,
}

impl WorkerContext {
    pub(crate) fn new(worker: WorkerResources, snapshot: Arc<ArcSwap<Snapshot>>) -> Rc<Self> {
        Rc::new(WorkerContext {
            worker: Rc::new(worker),
            snapshot,
            stage: Cell::new(DrainStage::Serving),
            wakers: RefCell::default(),
            next_id: Cell::new(0),
        })
    }

    /// Moves the connections of this thread to a stage, unless they are beyond it.
    pub(crate) fn enter(&self, stage: DrainStage) {
        self.stage.set(stage.max(self.stage.get()));
        self.wakers.borrow().values().for_each(Waker::wake_by_ref);
    }

    /// Whether a response ends its connection.
    pub(super) fn is_draining(&self) -> bool {
        self.stage.get() >= DrainStage::Draining
    }

    /// Whether the time for requests to end is over.
    pub(super) fn is_expired(&self) -> bool {
        self.stage.get() >= DrainStage::Expired
    }

    /// A guard by which a connection learns that draining begins.
    pub(crate) fn drain_guard(self: &Rc<Self>) -> DrainGuard {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        DrainGuard { context: Rc::clone(self), id, is_registered: false }
    }
}

/// Registers a connection for the start of draining, until it is dropped.
pub(crate) struct DrainGuard {
    context: Rc<WorkerContext>,
    id: u64,
    is_registered: bool,
}

impl DrainGuard {
    /// Ready in the given stage and after it. A task's waker stays valid for the life of the task,
    /// so it is registered once.
    pub(crate) fn poll_stage(&mut self, cx: &Context<'_>, stage: DrainStage) -> Poll<()> {
        if !self.is_registered {
            self.is_registered = true;
            self.context.wakers.borrow_mut().insert(self.id, cx.waker().clone());
        }
        if self.context.stage.get() >= stage { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        self.context.wakers.borrow_mut().remove(&self.id);
    }
}
