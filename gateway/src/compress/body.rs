//! A body that is compressed while it is sent.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::encoder::StreamEncoder;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadSize;
use crate::http::compressed_forms::ContentCoding;
use crate::http::fields::Fields;
use crate::metrics::{self, Counter};

/// Bodies that are compressed in pieces at one time: each needs up to 1 MiB.
const STREAMS_MAX: usize = 256;
/// Bytes that one poll compresses before other connections of the thread have their turn.
const PIECE_BYTES: usize = 32 << 10;

static STREAMS: AtomicUsize = AtomicUsize::new(0);
static INPUT_BYTES: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Registers the metrics of this module.
pub(crate) fn expose() {
    let help = "Bytes of bodies that were compressed.";
    metrics::expose_counter_with("tidegate_compression_input_bytes", help, |emit| emit(&[], INPUT_BYTES.get()));
    let help = "Bodies that are being compressed in pieces.";
    metrics::expose_gauge_with("tidegate_compression_streams", help, |emit| {
        emit(&[], STREAMS.load(Relaxed) as f64);
    });
}

/// Counts bytes that were compressed.
pub(crate) fn count_input(bytes: usize) {
    INPUT_BYTES.add(bytes as u64);
}

/// When the encoder makes its output readable before the end of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlushPolicy {
    /// Whenever the source has no more bytes for the moment.
    OnPause,
    /// After each piece of the source: a client waits for each event.
    EachPiece,
}

/// A body that is compressed while it is sent.
pub(crate) struct CompressedBody<S> {
    source: S,
    encoder: StreamEncoder,
    out: Bytes,
    /// Whether the encoder holds bytes that the client could use.
    has_unflushed: bool,
    flushes: FlushPolicy,
    is_finished: bool,
    _stream: StreamPermit,
}

/// One of the bodies that are compressed in pieces.
struct StreamPermit;

impl StreamPermit {
    fn acquire() -> Option<Self> {
        if STREAMS.fetch_add(1, Relaxed) < STREAMS_MAX {
            return Some(StreamPermit);
        }
        STREAMS.fetch_sub(1, Relaxed);
        None
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        STREAMS.fetch_sub(1, Relaxed);
    }
}

impl<S: BodySource> CompressedBody<S> {
    /// # Errors
    /// The source itself: too many bodies are being compressed, or there is no encoder.
    pub(crate) fn new(source: S, coding: ContentCoding, flushes: FlushPolicy) -> Result<Self, S> {
        let (Some(_stream), Ok(encoder)) = (StreamPermit::acquire(), StreamEncoder::new(coding)) else {
            return Err(source);
        };
        let (out, has_unflushed, is_finished) = (Bytes::new(), false, false);
        Ok(CompressedBody { source, encoder, out, has_unflushed, flushes, is_finished, _stream })
    }

    /// Compresses the next piece of the source, or flushes where the source is late.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, BodyError>> {
        let failed = |error: std::io::Error| {
            tracing::warn!(%error, "a body could not be compressed");
            BodyError::Truncated
        };
        let Poll::Ready(filled) = self.source.poll_fill(cx) else {
            if !std::mem::take(&mut self.has_unflushed) {
                return Poll::Pending;
            }
            self.encoder.flush().map_err(failed)?;
            return Poll::Ready(Ok(0));
        };
        filled?;
        let data = self.source.data();
        let count = data.len().min(PIECE_BYTES);
        if count == 0 {
            self.is_finished = true;
            self.encoder.finish().map_err(failed)?;
            return Poll::Ready(Ok(0));
        }
        self.encoder.write(&data[..count]).map_err(failed)?;
        count_input(count);
        self.has_unflushed = true;
        self.source.consume(count);
        if self.flushes == FlushPolicy::EachPiece && self.source.data().is_empty() {
            self.has_unflushed = false;
            self.encoder.flush().map_err(failed)?;
        }
        Poll::Ready(Ok(count))
    }
}

impl<S: BodySource> BodySource for CompressedBody<S> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let mut compressed = 0;
        while self.out.is_empty() && !self.is_finished {
            if compressed >= PIECE_BYTES {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            compressed += ready!(self.poll_piece(cx))?;
            self.out = self.encoder.take().into();
        }
        Poll::Ready(Ok(()))
    }

    fn set_read_size(&mut self, size: ReadSize) {
        self.source.set_read_size(size);
    }

    fn data(&self) -> &[u8] {
        &self.out
    }

    fn consume(&mut self, count: usize) {
        let _sent = self.out.split_to(count);
    }

    fn take_bytes(&mut self, max: usize) -> Bytes {
        self.out.split_to(self.out.len().min(max))
    }

    fn trailers(&self) -> Option<&Fields> {
        self.source.trailers().filter(|_| self.is_finished)
    }
}
