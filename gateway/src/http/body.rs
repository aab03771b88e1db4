//! Streaming of message bodies: a `BodySource` fills its buffer, exposes it as `data`, and drops
//! what was consumed.
//!
//! A source holds at most its connection's read buffer. Every method is cancel safe: only `consume`
//! discards bytes.

use std::io;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::buffer::ReadSize;
use super::exchange_clock::{Blame, ExchangeTimeout};
use super::fields::Fields;
use super::grpc::GrpcStatus;
use super::refusal::RequestRefusal;
use crate::metrics::Label as _;

/// Why a body could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The framing is malformed: chunk syntax, trailers.
    #[error("malformed body: {0}")]
    Malformed(&'static str),
    /// More bytes than the receiver allows.
    #[error("body larger than allowed")]
    TooLarge,
    /// The stream ended before the body was complete.
    #[error("body truncated")]
    Truncated,
    /// The stream of a request has ended before its body was complete, for this reason.
    #[error("stream ended: {}", .0.reason())]
    Stream(RequestRefusal),
    /// The peer reset the stream of the body with this error code (RFC 9113 section 7).
    #[error("stream reset with code {0}")]
    Reset(u32),
    /// A clock of the exchange ran out.
    #[error("body timed out: {}", .0.as_str())]
    Timeout(ExchangeTimeout),
    /// The client for which the body was fetched has disconnected.
    #[error("client went away")]
    ClientGone,
    /// The reader of a shared fetch fell too far behind the other readers.
    #[error("reader fell behind the shared fetch")]
    Detached,
    #[error("body connection failed")]
    Io(#[from] io::Error),
}

impl BodyError {
    /// The failure of a body as each of its readers gets it.
    pub(crate) fn shared(&self) -> BodyError {
        match self {
            BodyError::Malformed(reason) => BodyError::Malformed(reason),
            BodyError::Timeout(timeout) => BodyError::Timeout(*timeout),
            BodyError::TooLarge => BodyError::TooLarge,
            BodyError::Detached => BodyError::Detached,
            // The connection of the reader itself has not failed.
            BodyError::Truncated
            | BodyError::Stream(_)
            | BodyError::Reset(_)
            | BodyError::ClientGone
            | BodyError::Io(_) => BodyError::Truncated,
        }
    }

    /// The status of a call of gRPC whose response failed.
    pub(crate) fn grpc_status(&self) -> GrpcStatus {
        match self {
            BodyError::Timeout(_) => GrpcStatus::DeadlineExceeded,
            BodyError::Reset(code) => GrpcStatus::of_reset(*code),
            BodyError::Malformed(_) => GrpcStatus::Internal,
            BodyError::TooLarge => GrpcStatus::ResourceExhausted,
            BodyError::ClientGone | BodyError::Stream(_) => GrpcStatus::Cancelled,
            BodyError::Truncated | BodyError::Detached | BodyError::Io(_) => GrpcStatus::Unavailable,
        }
    }

    /// The side to blame for the body of a response.
    pub(crate) fn blame(&self) -> Blame {
        match self {
            BodyError::Timeout(timeout) => timeout.blame(),
            BodyError::Stream(_) | BodyError::ClientGone | BodyError::Detached => Blame::Client,
            BodyError::TooLarge => Blame::Gateway,
            BodyError::Malformed(_) | BodyError::Truncated | BodyError::Reset(_) | BodyError::Io(_) => Blame::Upstream,
        }
    }
}

/// Delivers a body in pieces.
pub(crate) trait BodySource {
    /// Ready when `data` holds bytes, or when the body has ended (`data` is then empty).
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>>;

    /// Bytes received and not yet consumed.
    fn data(&self) -> &[u8];

    /// Removes `count` bytes from the front of `data`.
    fn consume(&mut self, count: usize);

    /// Removes up to `max` bytes from the front of `data`. A source of stored bytes does not copy
    /// them.
    fn take_bytes(&mut self, max: usize) -> Bytes {
        let data = self.data();
        let bytes = Bytes::copy_from_slice(&data[..data.len().min(max)]);
        self.consume(bytes.len());
        bytes
    }

    /// Sets how many bytes are read before they are asked for, where they are read from a
    /// connection.
    fn set_read_size(&mut self, _size: ReadSize) {}

    /// Accounts for bytes at the front of `data` that will be kept after they are consumed, where
    /// the memory of the connection is bounded. Returns whether they may be kept.
    fn account_kept(&mut self, _bytes: usize) -> bool {
        true
    }

    /// The bytes that were accounted for by `account_kept` are no longer kept.
    fn release_kept(&mut self) {}

    /// The complete body, if it is in memory and consuming it has no side effect.
    fn complete_body(&self) -> Option<&[u8]> {
        None
    }

    /// The trailers of a chunked body, available when the body has ended.
    fn trailers(&self) -> Option<&Fields> {
        None
    }

    /// Whether trailers may follow although the length of the body is known: the last byte is then
    /// not the end.
    fn may_have_trailers(&self) -> bool {
        false
    }

    /// Ready when the client has closed its connection after its body was complete. Never ready for
    /// a source that does not watch the client connection. Cancel safe.
    fn poll_client_closed(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }

    /// Whether the client has closed its connection, or its sending side, although bytes of its
    /// body may wait to be read. Asks the system. False for a source that has no connection of its
    /// own.
    fn is_client_closed(&self) -> bool {
        false
    }
}
