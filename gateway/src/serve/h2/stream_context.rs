//! The part of an HTTP/2 connection that its streams share.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::http::message::Scheme;
use crate::peer::ConnectionPeer;
use crate::pipeline::ExchangeBuffers;
use crate::serve::accounting::AbortReason;
use crate::serve::worker_context::WorkerContext;

/// Buffers that a connection with streams keeps for the next ones. They are reused last in, first
/// out, so that requests that are answered at once use the same ones.
const SPARE_MAX: usize = 32;
/// Bytes of heads above which buffers are not kept: more than the requests of a browser have.
const SPARE_BYTES_MAX: usize = 8 << 10;

/// The part of a connection that its streams share.
pub(super) struct StreamContext {
    pub(super) worker: Rc<WorkerContext>,
    pub(super) peer: ConnectionPeer,
    pub(super) scheme: Scheme,
    /// Why the connection ends, unless its client has closed it.
    pub(super) ended_by: Cell<Option<AbortReason>>,
    // Boxed: they are large, and move between the tasks of streams.
    #[expect(clippy::vec_box, reason = "the boxes are what is reused")]
    spare: RefCell<Vec<Box<ExchangeBuffers>>>,
}

impl StreamContext {
    pub(super) fn new(worker: Rc<WorkerContext>, peer: ConnectionPeer, scheme: Scheme) -> Rc<Self> {
        Rc::new(StreamContext { worker, peer, scheme, ended_by: Cell::default(), spare: RefCell::default() })
    }

    pub(super) fn take_buffers(&self) -> Box<ExchangeBuffers> {
        self.spare.borrow_mut().pop().unwrap_or_default()
    }

    pub(super) fn return_buffers(&self, buffers: Box<ExchangeBuffers>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_MAX && buffers.heap_bytes() <= SPARE_BYTES_MAX {
            spare.push(buffers);
        }
    }

    /// Releases the buffers of past streams but for `kept` of them.
    pub(super) fn release_buffers(&self, kept: usize) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() > kept {
            spare.truncate(kept);
            spare.shrink_to_fit();
        }
    }
}
