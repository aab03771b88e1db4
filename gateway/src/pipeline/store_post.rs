//! The body of a response to POST that is stored as the response to GET (RFC 9110 section 9.3.3),
//! while it is sent to the client.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;

use super::fill_task::PendingEntry;
use super::forward::UpstreamBody;
use super::snapshot::Snapshot;
use super::worker::WorkerResources;
use crate::cache::fill::FetchReservation;
use crate::http::body::{BodyError, BodySource};
use crate::http::fields::Fields;
use crate::http::message::BodyLength;

/// A body that is stored as its client reads it. Nothing is stored if the client closes early.
pub(crate) struct StorePostResponse<'b> {
    pub(super) source: UpstreamBody<'b>,
    pub(super) length: BodyLength,
    pub(super) body: BytesMut,
    pub(super) reservation: FetchReservation,
    /// `None` once stored, or once the body is too large to store.
    pub(super) entry: Option<PendingEntry>,
    pub(super) worker: Rc<WorkerResources>,
    pub(super) snapshot: Arc<Snapshot>,
}

impl BodySource for StorePostResponse<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        ready!(self.source.poll_fill(cx))?;
        // Stored before the last bytes are sent, so that a client that has read them finds the
        // entry. A reader does not poll again once the length is reached.
        let data = self.source.data();
        let is_end = data.is_empty() || self.length == BodyLength::Known((self.body.len() + data.len()) as u64);
        if is_end && let Some(entry) = self.entry.take() {
            self.body.extend_from_slice(data);
            entry.store(&self.worker, &self.snapshot, std::mem::take(&mut self.body).freeze());
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        self.source.data()
    }

    fn consume(&mut self, count: usize) {
        if self.entry.is_some() {
            let config = &self.snapshot.cache;
            let fits = (self.body.len() + count) as u64 <= config.object_bytes;
            if fits && self.reservation.grow(count as u64, config.inflight_fetch_bytes) {
                self.body.extend_from_slice(&self.source.data()[..count]);
            } else {
                self.entry = None;
                self.reservation.release();
                self.body = BytesMut::new();
            }
        }
        self.source.consume(count);
    }

    fn may_have_trailers(&self) -> bool {
        self.source.may_have_trailers()
    }

    fn trailers(&self) -> Option<&Fields> {
        self.source.trailers()
    }
}
