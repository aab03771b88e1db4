//! A body of an upstream between stored bytes: what a stored part lacks for a response, with the
//! part itself.

use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};

use super::forward::UpstreamBody;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadSize;
use crate::http::fields::Fields;

/// Stored bytes that are handed out at once: about what one read of a connection gives, which is
/// what the bounds of a fill expect.
const STORED_BYTES_MAX: usize = 64 << 10;

/// The bytes before the upstream's body, the body, and the bytes after it.
pub(crate) struct PiecedBody {
    before: Bytes,
    source: UpstreamBody<'static>,
    /// Whether the upstream's body has ended.
    has_ended: bool,
    after: Bytes,
    /// Whether stored bytes were before or after the upstream's body.
    is_pieced: bool,
}

impl PiecedBody {
    /// The upstream's body alone.
    pub(super) fn whole(source: UpstreamBody<'static>) -> Self {
        PiecedBody { is_pieced: false, ..PiecedBody::between(source, (Bytes::new(), Bytes::new())) }
    }

    pub(super) fn between(source: UpstreamBody<'static>, (before, after): (Bytes, Bytes)) -> Self {
        PiecedBody { before, source, has_ended: false, after, is_pieced: true }
    }

    /// The trailers of the upstream's body. Those of a piece are not those of the whole.
    pub(super) fn all_trailers(&self) -> Option<&Fields> {
        self.source.all_trailers().filter(|_| !self.is_pieced)
    }
}

impl BodySource for PiecedBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.before.is_empty() && !self.has_ended {
            ready!(self.source.poll_fill(cx))?;
            self.has_ended = self.source.data().is_empty();
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        let stored = match (self.before.is_empty(), self.has_ended) {
            (false, _) => &self.before,
            (true, false) => return self.source.data(),
            (true, true) => &self.after,
        };
        &stored[..stored.len().min(STORED_BYTES_MAX)]
    }

    fn consume(&mut self, count: usize) {
        match (self.before.is_empty(), self.has_ended) {
            (false, _) => self.before.advance(count),
            (true, false) => self.source.consume(count),
            (true, true) => self.after.advance(count),
        }
    }

    fn set_read_size(&mut self, size: ReadSize) {
        self.source.set_read_size(size);
    }
}
