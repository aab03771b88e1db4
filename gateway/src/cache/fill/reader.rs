//! One reader of the body of a fill.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use super::state::{BodyEnd, Fill};
use crate::http::body::{BodyError, BodySource};
use crate::http::fields::Fields;

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
}

impl BodySource for FillReader {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if !self.chunk.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.fill.lock();
        if state.slots[self.slot].is_detached {
            return Poll::Ready(Err(BodyError::Detached));
        }
        if self.offset < state.end {
            self.chunk = state.chunk_at(self.offset);
            return Poll::Ready(Ok(()));
        }
        match state.body_end {
            BodyEnd::Complete => {
                self.trailers = state.trailers.clone().filter(|_| self.accepts_trailers);
                Poll::Ready(Ok(()))
            }
            BodyEnd::Aborted => Poll::Ready(Err(BodyError::Truncated)),
            BodyEnd::Open => {
                state.register(self.slot, cx);
                // A reader that has read everything may make the producer detach slower ones.
                if !state.keeps_body {
                    state.wake_producer();
                }
                Poll::Pending
            }
        }
    }

    fn data(&self) -> &[u8] {
        &self.chunk
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    fn consume(&mut self, count: usize) {
        self.chunk.advance(count);
        self.offset += count as u64;
        if self.chunk.is_empty() {
            self.chunk = Bytes::new();
            let mut state = self.fill.lock();
            state.slots[self.slot].offset = Some(self.offset);
            state.discard_consumed();
        }
    }
}

impl Drop for FillReader {
    fn drop(&mut self) {
        self.chunk = Bytes::new();
        let mut state = self.fill.lock();
        state.slots.remove(self.slot);
        state.discard_consumed();
        state.wake_producer();
    }
}
