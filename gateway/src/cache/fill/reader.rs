//! One reader of the body of a fill.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use super::slots::SlotPosition;
use super::state::{BodyProgress, Buffering, Fill, FillPhase, FillState, WINDOW_BYTES_MIN};
use crate::http::body::{BodyError, BodySource};
use crate::http::fields::Fields;
use crate::http::message::Response;

/// A reader with its offset and its current chunk. Its slot is removed when it is dropped.
pub(crate) struct FillReader {
    fill: Arc<Fill>,
    slot: usize,
    offset: u64,
    chunk: Bytes,
    accepts_trailers: bool,
    trailers: Option<Arc<Fields>>,
}

impl FillReader {
    /// Takes over `slot`, whose offset is 0.
    pub(super) fn new(fill: &Arc<Fill>, slot: usize) -> Self {
        FillReader {
            fill: Arc::clone(fill),
            slot,
            offset: 0,
            chunk: Bytes::new(),
            accepts_trailers: false,
            trailers: None,
        }
    }

    /// Sets whether the client accepts trailers. Default: it does not.
    pub(crate) fn accept_trailers(&mut self, accepts_trailers: bool) {
        self.accepts_trailers = accepts_trailers;
    }

    /// The offset of the next byte of `data`.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether this reader may be detached: the body is not complete yet, or has a long rest.
    pub(crate) fn may_be_detached(&self) -> bool {
        let state = self.fill.lock();
        state.is_open() || state.buffered() > WINDOW_BYTES_MIN
    }

    /// The whole body, if it has arrived, is short, has no trailers, and nothing of it was read.
    pub(crate) fn take_whole(&mut self) -> Option<Bytes> {
        /// Pieces of a longer body would be copied for each reader.
        const WHOLE_BYTES_MAX: u64 = 256 << 10;
        let state = self.fill.lock();
        let FillPhase::Streaming(_, BodyProgress::Complete(None)) = &state.phase else { return None };
        if self.offset > 0 || !self.chunk.is_empty() || state.buffered() != state.length() {
            return None;
        }
        if state.length() > WHOLE_BYTES_MAX {
            return None;
        }
        let mut chunks = state.chunks();
        match (chunks.next(), chunks.next()) {
            (Some(only), None) => Some(only.clone()),
            (first, second) => {
                let chunks: Vec<&[u8]> =
                    first.into_iter().chain(second).chain(chunks).map(|chunk| &chunk[..]).collect();
                Some(chunks.concat().into())
            }
        }
    }

    /// Ends without reading: the client has the object already. A body that is kept is still
    /// completed, for the store and for other readers.
    pub(crate) fn leave_to_store(self) {
        if let Buffering::Whole { is_wanted } = &mut self.fill.lock().buffering {
            *is_wanted = true;
        }
    }

    /// The head that the fill has published.
    pub(crate) fn head(&self) -> Option<Arc<Response>> {
        match &self.fill.lock().phase {
            FillPhase::Streaming(response, _) => Some(Arc::clone(response)),
            FillPhase::Waiting { .. } | FillPhase::Ended(_) => None,
        }
    }
}

impl BodySource for FillReader {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if !self.chunk.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.fill.lock();
        if let SlotPosition::Detached(_) = state.slots.position(self.slot) {
            return Poll::Ready(Err(BodyError::Detached));
        }
        if let Some(chunk) = state.next_bytes(self.slot) {
            self.chunk = chunk;
            return Poll::Ready(Ok(()));
        }
        match &state.phase {
            FillPhase::Streaming(_, BodyProgress::Complete(trailers)) => {
                self.trailers = trailers.clone().filter(|_| self.accepts_trailers);
                Poll::Ready(Ok(()))
            }
            FillPhase::Streaming(_, BodyProgress::Aborted(error)) => Poll::Ready(Err(error.shared())),
            // A reader exists from the head on.
            FillPhase::Streaming(_, BodyProgress::Open) | FillPhase::Waiting { .. } | FillPhase::Ended(_) => {
                state.slots.register(self.slot, cx);
                // If the window is full, a reader that has read everything makes the producer
                // detach slower ones.
                if !state.keeps_whole() && state.buffered() >= WINDOW_BYTES_MIN {
                    state.wake_fetch();
                }
                Poll::Pending
            }
        }
    }

    fn data(&self) -> &[u8] {
        &self.chunk
    }

    fn take_bytes(&mut self, max: usize) -> Bytes {
        let bytes = self.chunk.slice(..self.chunk.len().min(max));
        self.consume(bytes.len());
        bytes
    }

    fn may_have_trailers(&self) -> bool {
        let has_none = |state: &FillState| matches!(state.phase, FillPhase::Streaming(_, BodyProgress::Complete(None)));
        self.accepts_trailers && !has_none(&self.fill.lock())
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    fn consume(&mut self, count: usize) {
        self.chunk.advance(count);
        self.offset += count as u64;
        if self.chunk.is_empty() {
            self.chunk = Bytes::new();
            self.fill.lock().advance(self.slot);
        }
    }
}

impl Drop for FillReader {
    fn drop(&mut self) {
        self.chunk = Bytes::new();
        self.fill.lock().remove(self.slot);
    }
}
