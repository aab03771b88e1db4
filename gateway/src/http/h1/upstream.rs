//! An HTTP/1.1 connection to an upstream: sends one request, reads one response, and is reused only
//! when both ended cleanly.
//!
//! The request body is sent while the response is read, so neither side can block the other (full
//! duplex). A connection with an incomplete message, with unsolicited bytes or with a framing error
//! is never reused.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Method;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::chunk::{ChunkDecoder, DecodeStep};
use super::response;
use super::scan::{HeadScanner, ScanResult};
use super::send::{self, MessageWriter, SendError};
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadBuffer;
use crate::http::deadline::ResettableDeadline;
use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::message::{BodyLength, HttpVersion, Request, Response, StatusCode, is_bodiless};
use crate::http::transport::TransportStream;

/// Maximum bytes of a response head; a larger one is refused.
const HEAD_MAX: usize = 64 << 10;
/// Maximum interim (1xx) responses before the final response.
const INTERIM_MAX: usize = 8;

/// Fields that are written from `Request` instead of its field lines.
const REWRITTEN: KnownFieldSet =
    KnownFieldSet::of(&[KnownField::Host, KnownField::ContentLength, KnownField::TransferEncoding]);

/// Why an exchange with an upstream failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamConnectionError {
    #[error("connection refused or unreachable")]
    Connect(#[source] io::Error),
    #[error("connect timed out")]
    ConnectTimeout,
    /// The connection ended before the first byte of a response. The server may have closed an idle
    /// connection.
    #[error("closed before a response")]
    NoResponse(#[source] io::Error),
    #[error("connection failed inside the response head")]
    Io(#[source] io::Error),
    #[error("malformed response: {0}")]
    Malformed(&'static str),
    #[error("no response within the deadline")]
    Timeout,
    /// Reading the client's request body failed.
    #[error("client failed")]
    Client(#[source] BodyError),
    #[error("client went away")]
    ClientGone,
}

/// Framing and progress of the current response body: bytes left, the chunk decoder with the bytes
/// `ready` in the buffer, or the end of the connection.
#[derive(Debug)]
enum ResponseBodyState {
    Length { remaining: u64 },
    Chunked { decoder: ChunkDecoder, ready: usize },
    UntilClose,
    Done,
}

/// Progress of reading the head of the final response.
#[derive(Default)]
struct HeadProgress {
    scanner: HeadScanner,
    /// Interim responses read before it.
    interim_count: usize,
}

/// A connection to an upstream, idle or in an exchange.
pub(crate) struct UpstreamConnection {
    io: TransportStream,
    buffer: ReadBuffer,
    writer: MessageWriter,
    deadline: ResettableDeadline,
    body: ResponseBodyState,
    trailers: Option<Box<Fields>>,
    reusable: bool,
    /// Whether the connection served an exchange before. Its server may then have closed it in the
    /// meantime.
    is_reused: bool,
    request_sent: bool,
    address: SocketAddr,
}

impl UpstreamConnection {
    /// Opens a connection.
    ///
    /// # Errors
    /// `Connect` or `ConnectTimeout`. Cancel safe.
    pub(crate) async fn connect(
        address: SocketAddr,
        connect_timeout: Duration,
    ) -> Result<UpstreamConnection, UpstreamConnectionError> {
        let stream = timeout(connect_timeout, TcpStream::connect(address))
            .await
            .map_err(|_| UpstreamConnectionError::ConnectTimeout)?
            .map_err(UpstreamConnectionError::Connect)?;
        stream.set_nodelay(true).map_err(UpstreamConnectionError::Connect)?;
        Ok(UpstreamConnection {
            io: TransportStream::plain(stream),
            buffer: ReadBuffer::default(),
            writer: MessageWriter::new(),
            deadline: ResettableDeadline::after(connect_timeout),
            body: ResponseBodyState::Done,
            trailers: None,
            reusable: true,
            is_reused: false,
            request_sent: true,
            address,
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.is_reused
    }

    /// Sends `request` with `body` and reads the response head. The deadline covers the whole
    /// exchange, including the response body. Not cancel safe: a connection whose exchange was
    /// dropped is not reusable.
    ///
    /// # Errors
    /// After `NoResponse` a request that is safe to repeat may be sent again on another connection.
    /// All other errors are final.
    #[expect(clippy::too_many_arguments, reason = "caller-owned buffers of one exchange, reused for every attempt")]
    pub(crate) async fn exchange(
        &mut self,
        request: &Request,
        body: &mut dyn BodySource,
        deadline: Instant,
        response: &mut Response,
    ) -> Result<(), UpstreamConnectionError> {
        self.deadline.set(deadline);
        self.reusable = false;
        self.request_sent = false;
        self.write_head(request);
        let mut progress = HeadProgress::default();
        poll_fn(|cx| {
            loop {
                match self.poll_head(cx, body, &mut progress) {
                    Poll::Pending => return self.poll_timeout_or_client_closed(cx, body),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Ready(Ok(length)) => {
                        let head = &self.buffer.data()[..length];
                        let persistent = response::parse(head, &request.method, response)
                            .map_err(UpstreamConnectionError::Malformed)?;
                        self.buffer.consume(length);
                        if !response.status.is_informational() {
                            self.begin_body(&request.method, response, persistent);
                            return Poll::Ready(Ok(()));
                        }
                        progress.interim_count += 1;
                        if is_switch(request, response) {
                            // The bytes after this head are not HTTP, so the connection is not
                            // reused.
                            response.length = BodyLength::Empty;
                            self.is_reused = true;
                            return Poll::Ready(Ok(()));
                        }
                        if response.status == StatusCode::SWITCHING_PROTOCOLS || progress.interim_count > INTERIM_MAX {
                            return Poll::Ready(Err(UpstreamConnectionError::Malformed(
                                "unsolicited interim response",
                            )));
                        }
                        // The gateway itself sends 100 Continue, and HTTP/1.0 has no interim
                        // responses.
                        if response.status != StatusCode::CONTINUE && request.version != HttpVersion::Http10 {
                            request.interim.push(response.clone());
                        }
                        progress.scanner = HeadScanner::default();
                    }
                }
            }
        })
        .await
    }

    /// The stream and the bytes received from it but not consumed.
    pub(super) fn stream_and_buffer(&mut self) -> (&TransportStream, &mut ReadBuffer) {
        (&self.io, &mut self.buffer)
    }

    /// Polled when no byte can be transferred: fails when the deadline has passed or the client has
    /// disconnected.
    fn poll_timeout_or_client_closed(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut dyn BodySource,
    ) -> Poll<Result<(), UpstreamConnectionError>> {
        if self.deadline.poll(cx).is_ready() {
            return Poll::Ready(Err(UpstreamConnectionError::Timeout));
        }
        if self.request_sent {
            body.poll_client_closed(cx).map(|()| Err(UpstreamConnectionError::ClientGone))
        } else {
            Poll::Pending
        }
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut dyn BodySource,
        progress: &mut HeadProgress,
    ) -> Poll<Result<usize, UpstreamConnectionError>> {
        let sent = self.poll_send_request(cx, body);
        loop {
            match progress.scanner.advance(self.buffer.data()) {
                ScanResult::Complete(length) => return Poll::Ready(Ok(length)),
                ScanResult::BareLf => return Poll::Ready(Err(UpstreamConnectionError::Malformed("bare line feed"))),
                ScanResult::Partial { .. } if self.buffer.data().len() >= HEAD_MAX => {
                    return Poll::Ready(Err(UpstreamConnectionError::Malformed("head too large")));
                }
                ScanResult::Partial { .. } => {}
            }
            let before = self.buffer.data().len();
            match self.buffer.poll_fill(&self.io, cx, HEAD_MAX) {
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(result) => {
                    let error = result.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                    let is_first = before == 0 && progress.interim_count == 0;
                    let failed = if is_first {
                        UpstreamConnectionError::NoResponse(error)
                    } else {
                        UpstreamConnectionError::Io(error)
                    };
                    return Poll::Ready(Err(failed));
                }
                // An early response is read even if the request could not be sent completely. The
                // send error counts only if no response arrives.
                Poll::Pending => match sent {
                    Poll::Ready(Err(SendError::Source(error))) => {
                        return Poll::Ready(Err(UpstreamConnectionError::Client(error)));
                    }
                    Poll::Ready(Err(SendError::Peer(error))) => {
                        return Poll::Ready(Err(UpstreamConnectionError::NoResponse(error)));
                    }
                    Poll::Ready(Ok(())) | Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    /// Sends the request body as far as the client has delivered it.
    fn poll_send_request(&mut self, cx: &mut Context<'_>, body: &mut dyn BodySource) -> Poll<Result<(), SendError>> {
        if self.request_sent {
            return Poll::Ready(Ok(()));
        }
        let sent = self.writer.poll_send(cx, &self.io, body);
        self.request_sent = matches!(sent, Poll::Ready(Ok(())));
        sent
    }

    fn write_head(&mut self, request: &Request) {
        let out = self.writer.head_buffer();
        out.extend_from_slice(request.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(request.target.as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
        send::push_line(out, b"Host", request.authority.as_bytes());
        request.fields.write_lines(out, REWRITTEN);
        send::push_length(out, request.length);
        out.extend_from_slice(b"\r\n");
        self.writer.begin(request.length);
    }

    fn begin_body(&mut self, method: &Method, response: &Response, persistent: bool) {
        self.reusable = persistent;
        self.is_reused = true;
        self.body = match response.length {
            _ if is_bodiless(method, response.status) => ResponseBodyState::Done,
            BodyLength::Empty | BodyLength::Known(0) => ResponseBodyState::Done,
            BodyLength::Known(remaining) => ResponseBodyState::Length { remaining },
            BodyLength::Streamed => ResponseBodyState::Chunked { decoder: ChunkDecoder::new(), ready: 0 },
            BodyLength::UntilClose => ResponseBodyState::UntilClose,
        };
    }

    /// Whether the exchange ended cleanly, so that the connection can be reused.
    pub(crate) fn is_reusable(&self) -> bool {
        self.reusable && self.request_sent && self.buffer.is_empty() && matches!(self.body, ResponseBodyState::Done)
    }

    /// Returns the buffers to their pool, for an idle connection.
    pub(crate) fn release_buffers(&mut self) {
        self.buffer.release();
        self.writer.release();
    }

    /// Ready when an idle connection cannot be reused: it was closed, or unsolicited bytes arrived.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.io.poll_readable(cx).map(|_| ())
    }

    /// Reads the response body and sends the rest of the request body. See `BodySource::poll_fill`.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        request_body: &mut dyn BodySource,
    ) -> Poll<Result<(), BodyError>> {
        // The origin has already responded, so an error of the request body does not fail the
        // response.
        let _sent_or_failed = self.poll_send_request(cx, request_body);
        loop {
            if let Some(result) = self.advance_framing() {
                return Poll::Ready(result);
            }
            match self.buffer.poll_fill(&self.io, cx, 1) {
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(Ok(_)) if matches!(self.body, ResponseBodyState::UntilClose) => {
                    self.body = ResponseBodyState::Done;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(BodyError::Truncated)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(BodyError::Io(error))),
                Poll::Pending => {
                    ready!(self.deadline.poll(cx));
                    return Poll::Ready(Err(BodyError::Timeout));
                }
            }
        }
    }

    fn advance_framing(&mut self) -> Option<Result<(), BodyError>> {
        match &mut self.body {
            ResponseBodyState::Done => Some(Ok(())),
            ResponseBodyState::Length { .. } | ResponseBodyState::UntilClose => {
                (!self.buffer.is_empty()).then_some(Ok(()))
            }
            ResponseBodyState::Chunked { ready, .. } if *ready > 0 => Some(Ok(())),
            ResponseBodyState::Chunked { decoder, ready } => match decoder.step(self.buffer.data()) {
                Err(reason) => Some(Err(BodyError::Malformed(reason))),
                Ok(DecodeStep::More { skip }) => {
                    self.buffer.consume(skip);
                    None
                }
                Ok(DecodeStep::Data { skip, data }) => {
                    self.buffer.consume(skip);
                    *ready = data;
                    Some(Ok(()))
                }
                Ok(DecodeStep::End { skip }) => {
                    self.buffer.consume(skip);
                    self.trailers = decoder.take_trailers();
                    self.body = ResponseBodyState::Done;
                    Some(Ok(()))
                }
            },
        }
    }

    /// The trailers of a body that has ended.
    pub(crate) fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    /// Removes and returns the trailers.
    pub(crate) fn take_trailers(&mut self) -> Option<Box<Fields>> {
        self.trailers.take()
    }

    pub(crate) fn data(&self) -> &[u8] {
        let buffered = self.buffer.data();
        match &self.body {
            ResponseBodyState::Done => &[],
            ResponseBodyState::Length { remaining } => {
                &buffered[..usize::try_from(*remaining).unwrap_or(usize::MAX).min(buffered.len())]
            }
            ResponseBodyState::Chunked { ready, .. } => &buffered[..*ready],
            ResponseBodyState::UntilClose => buffered,
        }
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.buffer.consume(count);
        match &mut self.body {
            ResponseBodyState::Done | ResponseBodyState::UntilClose => {}
            ResponseBodyState::Length { remaining } => {
                *remaining -= count as u64;
                if *remaining == 0 {
                    self.body = ResponseBodyState::Done;
                }
            }
            ResponseBodyState::Chunked { decoder, ready } => {
                *ready -= count;
                decoder.data_consumed(count);
            }
        }
    }
}

/// Whether the response switches to a protocol that the request offered (RFC 9110 section 7.8).
fn is_switch(request: &Request, response: &Response) -> bool {
    let offered =
        |protocol: &[u8]| request.fields.members(KnownField::Upgrade).any(|o| o.eq_ignore_ascii_case(protocol));
    let mut chosen = response.fields.members(KnownField::Upgrade).peekable();
    response.status == StatusCode::SWITCHING_PROTOCOLS
        && request.length == BodyLength::Empty
        && chosen.peek().is_some()
        && chosen.all(offered)
}
