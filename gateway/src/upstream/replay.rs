//! A request body that can be sent again: its first bytes are kept while they are sent.
//!
//! Bytes are kept only while a failure could make another attempt useful, at most `KEPT_MAX` of one
//! body and `KEPT_BYTES_MAX` on one thread. A body that exceeds either bound is sent once.

use std::cell::Cell;
use std::task::{Context, Poll};

use crate::http::body::{BodyError, BodySource};
use crate::http::fields::Fields;

/// Most bytes that are kept of one body: forms and API calls are smaller, uploads are larger.
pub(crate) const KEPT_MAX: usize = 64 << 10;
/// Most bytes that the bodies of one thread keep: 512 of the largest size.
const KEPT_BYTES_MAX: usize = 32 << 20;

thread_local!(static KEPT_BYTES: Cell<usize> = const { Cell::new(0) });

/// A request body and its bytes so far.
pub(super) struct ReplayBody<S> {
    source: S,
    kept: KeptBytes,
    /// Bytes of `kept` that were consumed again.
    replayed: usize,
    /// Bytes that were consumed since the first byte.
    consumed: u64,
    keeping: Keeping,
}

/// Bytes that count as kept on this thread.
#[derive(Default)]
struct KeptBytes(Vec<u8>);

impl KeptBytes {
    fn len(&self) -> usize {
        self.0.len()
    }

    /// Appends bytes, if there is room.
    fn extend(&mut self, bytes: &[u8]) -> bool {
        let has_room = self.len() + bytes.len() <= KEPT_MAX && KEPT_BYTES.get() + bytes.len() <= KEPT_BYTES_MAX;
        if has_room {
            KEPT_BYTES.set(KEPT_BYTES.get() + bytes.len());
            self.0.extend_from_slice(bytes);
        }
        has_room
    }
}

impl Drop for KeptBytes {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            KEPT_BYTES.set(KEPT_BYTES.get().saturating_sub(self.len()));
        }
    }
}

/// Whether the consumed bytes of a body are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeping {
    /// No byte was lost, and those that follow are kept.
    All,
    /// No byte was lost, and those that follow are not kept.
    Paused,
    /// Bytes were consumed and not kept: the body cannot be sent again.
    Lost,
}

impl<S: BodySource> ReplayBody<S> {
    pub(super) fn new(source: S) -> Self {
        ReplayBody { source, kept: KeptBytes::default(), replayed: 0, consumed: 0, keeping: Keeping::Paused }
    }

    /// Keeps the bytes from here on, unless some were lost.
    pub(super) fn keep(&mut self) {
        if self.keeping == Keeping::Paused {
            self.keeping = Keeping::All;
        }
    }

    /// Keeps no further bytes. Those that were kept are still sent.
    pub(super) fn stop_keeping(&mut self) {
        if self.keeping == Keeping::All {
            self.keeping = Keeping::Paused;
        }
        if self.replayed == self.kept.len() && self.kept.len() > 0 {
            self.lose();
        }
    }

    /// Whether the first byte is still kept, or was not consumed.
    pub(super) fn can_rewind(&self) -> bool {
        self.keeping != Keeping::Lost
    }

    /// Starts again with the first byte. Call it only if it is still there.
    pub(super) fn rewind(&mut self) {
        self.replayed = 0;
        self.consumed = 0;
    }

    /// Bytes that were consumed since the body began, or began again.
    pub(super) fn consumed(&self) -> u64 {
        self.consumed
    }

    fn is_replaying(&self) -> bool {
        self.replayed < self.kept.len()
    }

    /// Drops the kept bytes, of which all were consumed.
    fn lose(&mut self) {
        self.kept = KeptBytes::default();
        self.source.release_kept();
        self.replayed = 0;
        self.keeping = Keeping::Lost;
    }

    /// Keeps `count` bytes at the front of the source, if there is room.
    fn keep_front(&mut self, count: usize) {
        if self.keeping == Keeping::All
            && self.source.account_kept(count)
            && self.kept.extend(&self.source.data()[..count])
        {
            self.replayed = self.kept.len();
        } else if self.keeping != Keeping::Lost {
            self.lose();
        }
    }
}

impl<S: BodySource> BodySource for ReplayBody<S> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.is_replaying() { Poll::Ready(Ok(())) } else { self.source.poll_fill(cx) }
    }

    fn data(&self) -> &[u8] {
        if self.is_replaying() { &self.kept.0[self.replayed..] } else { self.source.data() }
    }

    fn consume(&mut self, count: usize) {
        self.consumed += count as u64;
        if self.is_replaying() {
            self.replayed += count;
            if self.keeping == Keeping::Paused && !self.is_replaying() {
                self.lose();
            }
            return;
        }
        if count > 0 {
            self.keep_front(count);
        }
        self.source.consume(count);
    }

    fn trailers(&self) -> Option<&Fields> {
        self.source.trailers()
    }

    fn may_have_trailers(&self) -> bool {
        self.source.may_have_trailers()
    }

    fn is_client_closed(&self) -> bool {
        self.source.is_client_closed()
    }

    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.source.poll_client_closed(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use proptest::prelude::*;

    use super::*;

    /// A body in memory, delivered in pieces of at most 10,000 bytes.
    struct MemoryBody(Vec<u8>, usize);

    impl BodySource for MemoryBody {
        fn poll_fill(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
            Poll::Ready(Ok(()))
        }

        fn data(&self) -> &[u8] {
            let rest = &self.0[self.1..];
            &rest[..rest.len().min(10_000)]
        }

        fn consume(&mut self, count: usize) {
            self.1 += count;
        }
    }

    /// Reads from `body` in pieces of `piece` bytes, at most `limit`.
    fn read(body: &mut ReplayBody<MemoryBody>, piece: usize, limit: usize) -> Vec<u8> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut bytes = Vec::new();
        while bytes.len() < limit {
            assert!(body.poll_fill(&mut cx).is_ready());
            let count = body.data().len().min(piece).min(limit - bytes.len());
            if count == 0 {
                break;
            }
            bytes.extend_from_slice(&body.data()[..count]);
            body.consume(count);
        }
        bytes
    }

    fn kept_body(bytes: Vec<u8>) -> ReplayBody<MemoryBody> {
        let mut body = ReplayBody::new(MemoryBody(bytes, 0));
        body.keep();
        body
    }

    proptest! {
        /// A body is whole again after each rewind, or cannot be rewound.
        #[test]
        fn body_is_the_same_after_each_rewind(
            length in 0..2 * KEPT_MAX,
            reads in proptest::collection::vec((1_usize..40_000, 0..2 * KEPT_MAX), 1..5),
        ) {
            let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let mut body = kept_body(bytes.clone());
            let mut furthest = 0;
            for (piece, limit) in reads {
                let part = read(&mut body, piece, limit);
                prop_assert_eq!(&part[..], &bytes[..limit.min(length)]);
                furthest = furthest.max(part.len());
                prop_assert_eq!(body.can_rewind(), furthest <= KEPT_MAX);
                body.rewind();
                if furthest > KEPT_MAX {
                    return Ok(());
                }
            }
            prop_assert_eq!(read(&mut body, 1_000, usize::MAX), bytes);
        }
    }

    #[test]
    fn body_that_is_not_kept_is_sent_once() {
        let mut body = ReplayBody::new(MemoryBody(b"abc".to_vec(), 0));
        assert!(body.can_rewind(), "nothing was read");
        read(&mut body, 1, 1);
        assert!(!body.can_rewind());
        body.keep();
        assert!(!body.can_rewind());
        assert_eq!(read(&mut body, 9, 9), b"bc");

        let mut body = kept_body(b"abcdef".to_vec());
        read(&mut body, 3, 3);
        body.rewind();
        body.stop_keeping();
        assert_eq!(read(&mut body, 2, 9), b"abcdef", "kept bytes are sent although no more are kept");
        assert!(!body.can_rewind() && body.kept.len() == 0);
    }

    #[test]
    fn bodies_of_a_thread_keep_a_bounded_number_of_bytes() {
        let bytes = vec![0; KEPT_MAX];
        let mut bodies: Vec<_> = (0..KEPT_BYTES_MAX / KEPT_MAX).map(|_| kept_body(bytes.clone())).collect();
        bodies.iter_mut().for_each(|body| drop(read(body, KEPT_MAX, KEPT_MAX)));
        let mut further = kept_body(bytes.clone());
        read(&mut further, 1, 1);
        assert!(!further.can_rewind() && bodies.iter().all(ReplayBody::can_rewind));
        drop(bodies);
        let mut body = kept_body(bytes);
        read(&mut body, 1, 1);
        assert!(body.can_rewind());
    }
}
