//! Bodies in motion: a source is asked for bytes, shows what it has, and is told how much was taken.
//!
//! Nothing here holds more than its connection's read buffer. Every method is cancel safe: bytes are lost only by `consume`.

use std::io;
use std::task::{Context, Poll};

use super::fields::Fields;
use super::h1;
use super::h2;

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The framing is malformed: chunk syntax, trailers.
    #[error("malformed body: {0}")]
    Malformed(&'static str),
    /// More bytes than the receiver allows.
    #[error("body larger than allowed")]
    TooLarge,
    /// The stream ended first.
    #[error("body cut short")]
    Truncated,
    /// No byte moved for too long, or the exchange passed its deadline.
    #[error("body timed out")]
    Timeout,
    /// The one for whom it was fetched has left.
    #[error("client went away")]
    ClientGone,
    #[error("body connection failed")]
    Io(#[from] io::Error),
}

/// Something that delivers a body piece by piece.
pub trait Source {
    /// Ready when `data` holds bytes, or the body has ended (`data` is then empty).
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>>;

    /// What has arrived and was not consumed.
    fn data(&self) -> &[u8];

    /// Takes `count` bytes off `data`.
    fn consume(&mut self, count: usize);

    /// All of the body, where it is at hand and nothing is to be done when it leaves.
    fn whole(&self) -> Option<&[u8]> {
        None
    }

    /// What follows the body where it came in chunks; known when the body has ended.
    fn trailers(&self) -> Option<&Fields> {
        None
    }
}

/// A request's body on its way in, from whichever engine carries it.
pub enum RequestBody<'a> {
    Empty,
    H1(h1::RequestBody<'a>),
    H2(Box<h2::RequestBody>),
}

impl RequestBody<'_> {
    pub fn is_empty(&self) -> bool {
        matches!(self, RequestBody::Empty)
    }

    /// Whether no byte of it was taken yet, so that the request could be sent again whole.
    pub fn is_untouched(&self) -> bool {
        // A body that exists may have been sent in part by the first attempt; only its absence is certain.
        self.is_empty()
    }

    /// Resolves when the client has gone away while its body is complete; never for an empty body,
    /// whose connection is watched by the loop that owns it. Cancel safe.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            RequestBody::Empty | RequestBody::H2(_) => Poll::Pending,
            RequestBody::H1(body) => body.poll_gone(cx),
        }
    }
}

impl Source for RequestBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            RequestBody::Empty => Poll::Ready(Ok(())),
            RequestBody::H1(body) => body.poll_fill(cx),
            RequestBody::H2(body) => body.poll_fill(cx),
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            RequestBody::Empty => &[],
            RequestBody::H1(body) => body.data(),
            RequestBody::H2(body) => body.data(),
        }
    }

    fn consume(&mut self, count: usize) {
        match self {
            RequestBody::Empty => {}
            RequestBody::H1(body) => body.consume(count),
            RequestBody::H2(body) => body.consume(count),
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        match self {
            RequestBody::Empty | RequestBody::H2(_) => None,
            RequestBody::H1(body) => body.trailers(),
        }
    }
}
