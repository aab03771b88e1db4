//! The part of an HTTP/2 connection that its streams share, and the count of the streams.

use std::cell::Cell;
use std::rc::Rc;

use tokio::time::Instant;

use crate::http::h2::{GatheredTransport, SendBudget};
use crate::http::message::Scheme;
use crate::peer::ConnectionPeer;
use crate::serve::worker_context::WorkerContext;

/// The part of a connection that its streams share.
pub(super) struct StreamContext {
    pub(super) worker: Rc<WorkerContext>,
    pub(super) peer: ConnectionPeer,
    pub(super) scheme: Scheme,
    pub(super) transport: Rc<GatheredTransport>,
    pub(super) budget: Rc<SendBudget>,
    streams: Cell<usize>,
    head_bytes: Cell<usize>,
    /// When the last stream ended.
    idle_since: Cell<Instant>,
}

impl StreamContext {
    #[expect(clippy::too_many_arguments, reason = "the parts of a connection")]
    pub(super) fn new(
        worker: Rc<WorkerContext>,
        peer: ConnectionPeer,
        scheme: Scheme,
        transport: Rc<GatheredTransport>,
    ) -> Rc<Self> {
        Rc::new(StreamContext {
            worker,
            peer,
            scheme,
            transport,
            budget: Rc::default(),
            streams: Cell::new(0),
            head_bytes: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
        })
    }

    /// Whether no stream is open.
    pub(super) fn is_idle(&self) -> bool {
        self.streams.get() == 0
    }

    /// When the last stream ended.
    pub(super) fn idle_since(&self) -> Instant {
        self.idle_since.get()
    }

    /// Bytes of the heads of all open requests.
    pub(super) fn head_bytes(&self) -> usize {
        self.head_bytes.get()
    }
}

/// Counts one stream, and the bytes of its head, until it is dropped.
pub(super) struct StreamGuard {
    pub(super) shared: Rc<StreamContext>,
    head_bytes: usize,
}

impl StreamGuard {
    pub(super) fn new(shared: &Rc<StreamContext>, head_bytes: usize) -> Self {
        shared.streams.set(shared.streams.get() + 1);
        shared.head_bytes.set(shared.head_bytes.get() + head_bytes);
        StreamGuard { shared: Rc::clone(shared), head_bytes }
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let StreamContext { streams, head_bytes, idle_since, .. } = &*self.shared;
        streams.set(streams.get() - 1);
        head_bytes.set(head_bytes.get() - self.head_bytes);
        if streams.get() == 0 {
            idle_since.set(Instant::now());
        }
    }
}
