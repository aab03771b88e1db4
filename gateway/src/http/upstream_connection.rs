//! A connection to an upstream, or a place on a shared one, whichever protocol it speaks.

use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::attempt::{UpstreamAttempt, UpstreamConnectionError};
use super::body::{BodyError, BodySource};
use super::buffer::ReadSize;
use super::fields::Fields;
use super::h1::Http1UpstreamConnection;
pub(crate) use super::h2_upstream::{
    Http2UpstreamConnection, Http2UpstreamStream, WindowReservation, http2_connections, reserved_upstream_bytes,
    set_http2_memory,
};
use super::transport::TransportStream;

/// A connection that was just opened.
pub(crate) enum NewUpstreamConnection {
    /// For one exchange at a time.
    Http1(Box<Http1UpstreamConnection>),
    /// For many.
    Http2(Rc<Http2UpstreamConnection>),
}

/// The connection of one exchange: an HTTP/1.1 connection, or a stream of an HTTP/2 connection.
pub(crate) enum UpstreamConnection {
    Http1(Box<Http1UpstreamConnection>),
    Http2(Box<Http2UpstreamStream>),
}

impl UpstreamConnection {
    /// See [`Http1UpstreamConnection::exchange`].
    ///
    /// # Errors
    /// After `Refused` any request may be sent again, after `NoResponse` and `Reset` one that is
    /// safe to repeat. All other errors are final.
    pub(crate) async fn exchange(&mut self, attempt: &mut UpstreamAttempt<'_>) -> Result<(), UpstreamConnectionError> {
        match self {
            UpstreamConnection::Http1(connection) => connection.exchange(attempt).await,
            // Boxed: the future of HTTP/1.1 stays small.
            UpstreamConnection::Http2(stream) => Box::pin(stream.exchange(attempt)).await,
        }
    }

    /// Whether the upstream has processed nothing of the current request.
    pub(crate) fn is_request_unsent(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.is_request_unsent(),
            UpstreamConnection::Http2(stream) => stream.is_request_unsent(),
        }
    }

    /// Whether it is open according to the system, which may know of its end before the event loop
    /// does.
    pub(crate) fn is_open(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.is_open(),
            UpstreamConnection::Http2(stream) => stream.is_open(),
        }
    }

    /// Gives up a connection that is closed: a shared one gets no further exchange.
    pub(crate) fn abandon(self) {
        match self {
            UpstreamConnection::Http1(connection) => drop(connection),
            UpstreamConnection::Http2(stream) => stream.abandon_connection(),
        }
    }

    /// Whether the connection served an exchange before.
    pub(crate) fn is_reused(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.is_reused(),
            UpstreamConnection::Http2(stream) => stream.is_reused(),
        }
    }

    /// The byte stream to which the exchange has switched.
    pub(crate) fn into_tunnel(self) -> Box<Http1UpstreamConnection> {
        match self {
            UpstreamConnection::Http1(connection) => connection,
            UpstreamConnection::Http2(stream) => {
                Box::new(Http1UpstreamConnection::new(TransportStream::shared(stream)))
            }
        }
    }

    /// Whether an interim response was passed on to the client.
    pub(crate) fn has_passed_interim(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.has_passed_interim(),
            UpstreamConnection::Http2(stream) => stream.has_passed_interim(),
        }
    }

    /// Whether the server can say that it has not processed a request.
    pub(crate) fn may_refuse(&self) -> bool {
        matches!(self, UpstreamConnection::Http2(_))
    }

    /// Whether the client has not delivered the whole request.
    pub(crate) fn is_request_incomplete(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.is_request_incomplete(),
            UpstreamConnection::Http2(stream) => stream.is_request_incomplete(),
        }
    }

    /// Whether the body of the response has ended.
    pub(crate) fn is_body_done(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.is_body_done(),
            UpstreamConnection::Http2(stream) => stream.is_body_done(),
        }
    }

    /// Whether the exchange ended cleanly: a connection can be reused, a stream has nothing to
    /// reset.
    pub(crate) fn is_complete(&self) -> bool {
        match self {
            UpstreamConnection::Http1(connection) => connection.is_reusable(),
            UpstreamConnection::Http2(stream) => stream.is_complete(),
        }
    }

    /// Reads the response body and sends the rest of the request body. See `BodySource::poll_fill`.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        request_body: &mut dyn BodySource,
    ) -> Poll<Result<(), BodyError>> {
        match self {
            UpstreamConnection::Http1(connection) => connection.poll_body(cx, request_body),
            UpstreamConnection::Http2(stream) => stream.poll_body(cx, request_body),
        }
    }

    /// Sets how much of the body is read before it is taken. A stream of HTTP/2 has its window.
    pub(crate) fn set_read_size(&mut self, size: ReadSize) {
        match self {
            UpstreamConnection::Http1(connection) => connection.set_read_size(size),
            UpstreamConnection::Http2(_) => {}
        }
    }

    pub(crate) fn data(&self) -> &[u8] {
        match self {
            UpstreamConnection::Http1(connection) => connection.data(),
            UpstreamConnection::Http2(stream) => stream.data(),
        }
    }

    pub(crate) fn consume(&mut self, count: usize) {
        match self {
            UpstreamConnection::Http1(connection) => connection.consume(count),
            UpstreamConnection::Http2(stream) => stream.consume(count),
        }
    }

    /// Removes up to `max` bytes from the front of `data`.
    pub(crate) fn take_bytes(&mut self, max: usize) -> Bytes {
        match self {
            UpstreamConnection::Http1(connection) => {
                let data = connection.data();
                let bytes = Bytes::copy_from_slice(&data[..data.len().min(max)]);
                connection.consume(bytes.len());
                bytes
            }
            UpstreamConnection::Http2(stream) => stream.take_bytes(max),
        }
    }

    /// The trailers of a body that has ended.
    pub(crate) fn trailers(&self) -> Option<&Fields> {
        match self {
            UpstreamConnection::Http1(connection) => connection.trailers(),
            UpstreamConnection::Http2(stream) => stream.trailers(),
        }
    }

    /// Whether trailers may follow a body of known length: not over HTTP/1.1.
    pub(crate) fn may_have_trailers(&self) -> bool {
        match self {
            UpstreamConnection::Http1(_) => false,
            UpstreamConnection::Http2(stream) => stream.may_have_trailers(),
        }
    }

    /// Removes and returns the trailers.
    pub(crate) fn take_trailers(&mut self) -> Option<Box<Fields>> {
        match self {
            UpstreamConnection::Http1(connection) => connection.take_trailers(),
            UpstreamConnection::Http2(stream) => stream.take_trailers(),
        }
    }
}
