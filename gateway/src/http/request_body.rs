//! The body of the current request, whichever protocol engine delivers it.

use std::task::{Context, Poll};

use super::body::{BodyError, BodySource};
use super::fields::Fields;
use super::h1::Http1RequestBody;
use super::h2::Http2RequestBody;

/// A request body from the HTTP/1.1 engine, from HTTP/2, or none.
pub(crate) enum RequestBody<'a> {
    Empty,
    H1(Http1RequestBody<'a>),
    H2(Box<Http2RequestBody>),
    /// One of which bytes were read before.
    Started(Box<StartedBody<'a>>),
}

/// Bytes that were read from a body, and the rest of it.
pub(crate) struct StartedBody<'a> {
    bytes: Vec<u8>,
    consumed: usize,
    rest: RequestBody<'a>,
}

impl<'a> StartedBody<'a> {
    pub(crate) fn new(bytes: Vec<u8>, rest: RequestBody<'a>) -> Self {
        StartedBody { bytes, consumed: 0, rest }
    }

    fn has_bytes(&self) -> bool {
        self.consumed < self.bytes.len()
    }
}

impl RequestBody<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, RequestBody::Empty)
    }

    /// Lowers the limit of the body's size. Call it before the body is read.
    pub(crate) fn limit(&mut self, bytes: u64) {
        match self {
            RequestBody::Empty => {}
            RequestBody::H1(body) => body.limit(bytes),
            RequestBody::H2(body) => body.limit(bytes),
            RequestBody::Started(body) => body.rest.limit(bytes.saturating_sub(body.bytes.len() as u64)),
        }
    }
}

impl BodySource for RequestBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            RequestBody::Empty => Poll::Ready(Ok(())),
            RequestBody::H1(body) => body.poll_fill(cx),
            RequestBody::H2(body) => body.poll_fill(cx),
            RequestBody::Started(body) if body.has_bytes() => Poll::Ready(Ok(())),
            RequestBody::Started(body) => body.rest.poll_fill(cx),
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            RequestBody::Empty => &[],
            RequestBody::H1(body) => body.data(),
            RequestBody::H2(body) => body.data(),
            RequestBody::Started(body) if body.has_bytes() => &body.bytes[body.consumed..],
            RequestBody::Started(body) => body.rest.data(),
        }
    }

    fn consume(&mut self, count: usize) {
        match self {
            RequestBody::Empty => {}
            RequestBody::H1(body) => body.consume(count),
            RequestBody::H2(body) => body.consume(count),
            RequestBody::Started(body) if body.has_bytes() => body.consumed += count,
            RequestBody::Started(body) => body.rest.consume(count),
        }
    }

    fn account_kept(&mut self, bytes: usize) -> bool {
        match self {
            RequestBody::Empty | RequestBody::H1(_) => true,
            RequestBody::H2(body) => body.account_kept(bytes),
            RequestBody::Started(body) => body.rest.account_kept(bytes),
        }
    }

    fn release_kept(&mut self) {
        match self {
            RequestBody::Empty | RequestBody::H1(_) => {}
            RequestBody::H2(body) => body.release_kept(),
            RequestBody::Started(body) => body.rest.release_kept(),
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        match self {
            RequestBody::Empty => None,
            RequestBody::H1(body) => body.trailers(),
            RequestBody::H2(body) => body.trailers(),
            RequestBody::Started(body) => body.rest.trailers(),
        }
    }

    fn may_have_trailers(&self) -> bool {
        match self {
            RequestBody::Empty => false,
            RequestBody::H1(body) => body.may_have_trailers(),
            RequestBody::H2(body) => body.may_have_trailers(),
            RequestBody::Started(body) => body.rest.may_have_trailers(),
        }
    }

    /// Never ready for an empty body: the loop that owns the connection watches it.
    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            RequestBody::Empty | RequestBody::H2(_) => Poll::Pending,
            RequestBody::H1(body) => body.poll_client_closed(cx),
            RequestBody::Started(body) => body.rest.poll_client_closed(cx),
        }
    }

    fn is_client_closed(&self) -> bool {
        match self {
            RequestBody::Empty | RequestBody::H2(_) => false,
            RequestBody::H1(body) => body.is_client_closed(),
            RequestBody::Started(body) => body.rest.is_client_closed(),
        }
    }
}
