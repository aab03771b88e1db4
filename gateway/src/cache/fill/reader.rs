//! One reader of the body of a fill.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use super::slots::SlotPosition;
use super::state::{BodyEnd, Fill, FillPhase, WINDOW_BYTES_MIN};
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

    /// Whether the body is not complete yet. Only then can this reader be detached.
    pub(crate) fn is_open(&self) -> bool {
        self.fill.lock().body_end == BodyEnd::Open
    }

    /// The head that the fill has published.
    pub(crate) fn head(&self) -> Option<Arc<Response>> {
        match &self.fill.lock().phase {
            FillPhase::Streaming(response) => Some(Arc::clone(response)),
            _ => None,
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
        if let Some(chunk) = state.next_bytes(self.slot, self.offset) {
            self.chunk = chunk;
            return Poll::Ready(Ok(()));
        }
        match state.body_end {
            BodyEnd::Complete => {
                self.trailers = state.trailers.clone().filter(|_| self.accepts_trailers);
                Poll::Ready(Ok(()))
            }
            BodyEnd::Aborted => Poll::Ready(Err(BodyError::Truncated)),
            BodyEnd::Open => {
                state.slots.register(self.slot, cx);
                // If the window is full, a reader that has read everything makes the producer
                // detach slower ones.
                if !state.keeps_body && state.end - state.start >= WINDOW_BYTES_MIN {
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
