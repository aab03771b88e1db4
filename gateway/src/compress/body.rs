//! A body that is compressed while it is sent.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
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

/// Bodies that are compressed in pieces at one time: each needs a few hundred KiB.
const STREAMS_MAX: usize = 256;
/// Those of one address on one thread: a client that does not read its responses must not hold the
/// memory of all others.
const ADDRESS_STREAMS_MAX: usize = 8;
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
    coding: ContentCoding,
    /// Made with the first piece: a body that the client does not ask for needs none.
    encoder: Option<StreamEncoder>,
    out: Bytes,
    /// Whether the encoder holds bytes that the client could use.
    has_unflushed: bool,
    flushes: FlushPolicy,
    is_finished: bool,
    /// `None` after the end of the source.
    permit: Option<StreamPermit>,
}

/// One of the bodies that are compressed in pieces.
struct StreamPermit {
    address: IpAddr,
}

thread_local! {
    /// Bodies by the address of their client; an address without any is removed.
    static BY_ADDRESS: RefCell<HashMap<IpAddr, usize>> = RefCell::new(HashMap::new());
}

impl StreamPermit {
    fn acquire(address: IpAddr) -> Option<Self> {
        let count = BY_ADDRESS.with_borrow(|counts| counts.get(&address).copied().unwrap_or(0));
        if count >= ADDRESS_STREAMS_MAX {
            return None;
        }
        if STREAMS.fetch_add(1, Relaxed) >= STREAMS_MAX {
            STREAMS.fetch_sub(1, Relaxed);
            return None;
        }
        BY_ADDRESS.with_borrow_mut(|counts| counts.insert(address, count + 1));
        Some(StreamPermit { address })
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        STREAMS.fetch_sub(1, Relaxed);
        BY_ADDRESS.with_borrow_mut(|counts| match counts.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                counts.remove(&self.address);
            }
        });
    }
}

impl<S: BodySource> CompressedBody<S> {
    /// `client`: the address of the connection.
    ///
    /// # Errors
    /// The source itself: too many bodies are being compressed.
    pub(crate) fn new(source: S, (coding, flushes): (ContentCoding, FlushPolicy), client: IpAddr) -> Result<Self, S> {
        let Some(permit) = StreamPermit::acquire(client) else { return Err(source) };
        let (out, permit) = (Bytes::new(), Some(permit));
        Ok(CompressedBody {
            source,
            coding,
            encoder: None,
            out,
            has_unflushed: false,
            flushes,
            is_finished: false,
            permit,
        })
    }

    fn encoder(&mut self) -> io::Result<&mut StreamEncoder> {
        match &mut self.encoder {
            Some(encoder) => Ok(encoder),
            none => Ok(none.insert(StreamEncoder::new(self.coding)?)),
        }
    }

    /// Compresses the next piece of the source, or flushes where the source is late.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, BodyError>> {
        let failed = |error: io::Error| {
            tracing::warn!(%error, "a body could not be compressed");
            BodyError::Truncated
        };
        let Poll::Ready(filled) = self.source.poll_fill(cx) else {
            if !std::mem::take(&mut self.has_unflushed) {
                return Poll::Pending;
            }
            self.encoder().and_then(StreamEncoder::flush).map_err(failed)?;
            return Poll::Ready(Ok(0));
        };
        filled?;
        let data = self.source.data();
        let count = data.len().min(PIECE_BYTES);
        if count == 0 {
            self.is_finished = true;
            self.encoder().and_then(StreamEncoder::finish).map_err(failed)?;
            self.permit = None;
            return Poll::Ready(Ok(0));
        }
        let piece = &data[..count];
        let encoder = match &mut self.encoder {
            Some(encoder) => encoder,
            none => none.insert(StreamEncoder::new(self.coding).map_err(failed)?),
        };
        encoder.write(piece).map_err(failed)?;
        count_input(count);
        self.has_unflushed = true;
        self.source.consume(count);
        if self.flushes == FlushPolicy::EachPiece && self.source.data().is_empty() {
            self.has_unflushed = false;
            self.encoder().and_then(StreamEncoder::flush).map_err(failed)?;
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
            self.out = self.encoder.as_mut().map(StreamEncoder::take).unwrap_or_default().into();
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
