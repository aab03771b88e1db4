//! The fetching side of a fill whose head is published.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};

use super::budget::FetchBudget;
use super::state::{BodyProgress, Buffering, Fill, WINDOW_BYTES_MIN};
use super::table::Registration;
use crate::http::body::BodyError;
use crate::http::fields::Fields;

/// Appends the body of a fill. Dropping it before `complete` aborts the body for every reader.
pub(crate) struct Producer {
    pub(super) fill: Arc<Fill>,
    pub(super) registration: Option<Registration>,
    pub(super) budget: Arc<FetchBudget>,
    /// Bytes that all fetches in flight may hold together.
    pub(super) budget_bytes: u64,
}

impl Producer {
    /// Appends bytes to the body.
    pub(crate) fn push(&self, data: &[u8]) {
        let chunk = self.budget.charged_chunk(data);
        self.fill.lock().push(chunk);
    }

    /// Whether a body that grows by `bytes` can still be kept whole: it stays within
    /// `object_bytes`, and all fetches together within the budget.
    pub(crate) fn can_keep(&self, bytes: u64, object_bytes: u64) -> bool {
        let state = self.fill.lock();
        if !state.keeps_whole() || state.end + bytes > object_bytes {
            return false;
        }
        drop(state);
        // Slow readers do not use up the room of bodies that may be stored.
        self.budget.make_room(bytes, self.budget_bytes)
    }

    /// Stops keeping the body, because it is too large to store. No further request can join.
    pub(crate) fn stop_keeping(&mut self) {
        self.unregister();
        self.fill.lock().keep_window();
        self.budget.add_backlog(&self.fill);
    }

    /// Resolves to `true` when more bytes can be pushed, and to `false` when no reader is left.
    ///
    /// A body that is not kept is buffered up to a window. When the window is full, the readers
    /// that are a window behind are detached if another reader waits for bytes; else the readers
    /// that are left set the pace. The window is smaller while the budget is used up.
    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut state = self.fill.lock();
        // Also wakes the producer when the last reader is dropped while the upstream is silent.
        state.register_fetch(cx);
        if !state.has_purpose() {
            return Poll::Ready(false);
        }
        let Buffering::Window(window) = state.buffering else { return Poll::Ready(true) };
        let has_room = self.budget.has_room(WINDOW_BYTES_MIN, self.budget_bytes);
        let window = if has_room { window } else { WINDOW_BYTES_MIN };
        if state.buffered() >= window && !state.detach_slow_readers(window) {
            return Poll::Pending;
        }
        Poll::Ready(true)
    }

    /// The bytes that were pushed so far.
    pub(crate) fn length(&self) -> u64 {
        self.fill.lock().end
    }

    /// The complete body, which ends with `last`, in one buffer that is not charged to the budget:
    /// the cache accounts for it. The chunks stay charged until their last reader has read them.
    /// `None` if the body was not kept.
    pub(crate) fn body_with(&self, last: &[u8]) -> Option<Bytes> {
        let state = self.fill.lock();
        if !state.keeps_whole() {
            return None;
        }
        let mut body = BytesMut::with_capacity(usize::try_from(state.end).ok()? + last.len());
        state.chunks().for_each(|chunk| body.extend_from_slice(chunk));
        body.extend_from_slice(last);
        Some(body.freeze())
    }

    /// Ends the body with a failure, which every reader gets.
    pub(crate) fn abort(mut self, error: BodyError) {
        self.end(BodyProgress::Aborted(error));
    }

    /// Ends the body, with its trailers. Call it after the entry is stored, so that the next lookup
    /// finds the entry. Trailers go to the current readers and are not stored (RFC 9111 section
    /// 3.1).
    pub(crate) fn complete(mut self, trailers: Option<&Fields>) {
        self.end(BodyProgress::Complete(trailers.map(|trailers| Arc::new(trailers.clone()))));
    }

    fn end(&mut self, end: BodyProgress) {
        self.unregister();
        let mut state = self.fill.lock();
        if !state.is_open() {
            return;
        }
        state.end_body(end);
        state.keep_less(Buffering::Rest);
        let has_backlog = state.buffered() > WINDOW_BYTES_MIN;
        drop(state);
        if has_backlog {
            self.budget.add_backlog(&self.fill);
        }
    }

    /// No further request joins.
    fn unregister(&mut self) {
        if let Some(registration) = self.registration.take() {
            registration.remove(&self.fill);
        }
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.end(BodyProgress::Aborted(BodyError::Truncated));
    }
}
