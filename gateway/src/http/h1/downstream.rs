//! An HTTP/1.1 connection from a client: reads one request after the other and writes one response
//! to each.
//!
//! States: waiting (no byte of a request, no buffer) -> reading the head -> responding (the request
//! body may still arrive) -> waiting, or closed. After a refusal, a request body that is too long
//! to drain, or an aborted response, the connection is not reused.
//!
//! A timeout runs only while the gateway waits for the client: for bytes of a head or body, or for
//! the client to accept bytes that the gateway has to write. A closing connection
//! discards what the client still sends for a short time: closed with unread bytes, TCP would reset
//! it and the client could lose the response.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::chunk::{ChunkDecoder, DecodeStep};
use super::request;
use super::scan::{HeadScanner, ScanResult};
use super::send::{self, MessageWriter, SendError};
use super::serialized::SerializedResponse;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadBuffer;
use crate::http::deadline::ResettableDeadline;
use crate::http::exchange_clock::ExchangeTimeout;
use crate::http::fields::{Fields, is_token, matches_pattern};
use crate::http::head;
use crate::http::limits::{HttpLimits, UnderscorePolicy};
use crate::http::message::{BodyLength, HttpVersion, NamedVersion, Request, Response, StatusCode};
use crate::http::min_rate::MinRateTimer;
use crate::http::refusal::RequestRefusal;
use crate::http::transport::TransportStream;
use crate::http::write_timer::WriteTimer;
use crate::tasks::{self, TaskWait};

/// Maximum bytes of an unread request body that are discarded to keep the connection. A new
/// connection costs less than reading more.
const DRAIN_MAX: u64 = 64 << 10;
/// Maximum time for that.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of a request line beside its target: the longest accepted method, two spaces and a
/// version.
const LINE_EXTRA: usize = 64;
/// How long a closing connection stays open while the client sends nothing: enough for the client
/// to read the last response and to close.
const LINGER_IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a closing connection discards what the client sends. Shorter than the default header
/// timeout, so that a client holds a connection no longer by its body than by silence; long enough
/// for most uploads of tens of megabytes to end.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// Reads of a closing connection before other tasks of the thread run: at most 512 KiB.
const LINGER_READS: usize = 8;
/// Most bytes that a closing connection discards.
const LINGER_BYTES_MAX: usize = 64 << 20;
/// Bytes of interim responses that the client has not taken above which further ones are discarded:
/// as many as one response head may have.
const INTERIM_WAITING_MAX: usize = 64 << 10;

/// The part of HTTP/2's preface that looks like a head (RFC 9113 section 3.4).
const HTTP2_PREFACE_HEAD: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// Result of waiting for a request: bytes arrived, timed out, or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitOutcome {
    /// Bytes have arrived.
    Readable,
    /// No byte arrived before the deadline.
    TimedOut,
    Closed,
}

/// Why the next request could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestReadError {
    /// The head is refused: respond with the status of the refusal and close.
    #[error("refused: {}", .0.reason())]
    Refused(RequestRefusal),
    /// The connection failed inside a head.
    #[error("connection failed")]
    Io(#[from] io::Error),
}

/// Framing and progress of the current request body: bytes left, or the chunk decoder with the
/// decoded bytes that are `ready` in the buffer.
enum RequestBodyState {
    Done,
    Length { remaining: u64 },
    Chunked { decoder: ChunkDecoder, ready: usize },
    Failed,
}

/// State of the reading half.
struct RequestReader {
    buffer: ReadBuffer,
    body: RequestBodyState,
    trailers: Option<Box<Fields>>,
    dropped_trailers: Arc<[String]>,
    underscores: UnderscorePolicy,
    body_max: u64,
    /// The limit of the current request's route.
    route_body_max: u64,
    /// Whether `100 Continue` must be sent before the body is read.
    must_send_continue: bool,
    continue_sent: usize,
    client_closed: bool,
    deadline: ResettableDeadline,
    idle_timeout: Duration,
    /// Bytes of the current body received so far, with its framing.
    body_received: u64,
    /// Bytes of the current body without its framing, if it is chunked.
    chunked_bytes: u64,
    /// Created by the first wait for body bytes.
    min_rate: Option<Box<MinRateTimer>>,
    /// Minimum rate of request and response body, in bytes per second.
    body_rate: u32,
}

/// A connection from a client: its stream, the state of the reading half, and the current outgoing
/// message.
pub(crate) struct DownstreamConnection {
    io: TransportStream,
    reader: RequestReader,
    writer: MessageWriter,
    keep_alive: bool,
    version: HttpVersion,
    is_head: bool,
}

/// The body of the current request, borrowed from its connection.
pub(crate) struct Http1RequestBody<'a> {
    io: &'a TransportStream,
    reader: &'a mut RequestReader,
}

/// The writing half of the current exchange.
pub(crate) struct ResponseWriter<'a> {
    io: &'a TransportStream,
    writer: &'a mut MessageWriter,
    keep_alive: &'a mut bool,
    version: HttpVersion,
    is_head: bool,
    idle_timeout: Duration,
    body_rate: u32,
    /// Created by the first wait for the client to accept bytes.
    timeouts: Option<Box<WriteTimeouts>>,
}

/// Timeouts for a client that does not read its response. They run only while bytes wait for the
/// client to accept them, not while the source of the body is pending.
struct WriteTimeouts {
    timer: WriteTimer,
    min_rate: MinRateTimer,
    /// Bytes of the body that the minimum rate counts.
    counted: u64,
}

impl DownstreamConnection {
    pub(crate) fn new(io: TransportStream, limits: &HttpLimits) -> Self {
        let reader = RequestReader {
            buffer: ReadBuffer::default(),
            body: RequestBodyState::Done,
            trailers: None,
            dropped_trailers: Arc::clone(&limits.dropped_trailers),
            underscores: limits.underscores,
            body_max: limits.body_bytes_max(),
            route_body_max: u64::MAX,
            must_send_continue: false,
            continue_sent: 0,
            client_closed: false,
            deadline: ResettableDeadline::after(limits.header_timeout),
            idle_timeout: limits.idle_timeout,
            body_received: 0,
            chunked_bytes: 0,
            min_rate: None,
            body_rate: limits.body_rate,
        };
        let writer = MessageWriter::new();
        DownstreamConnection { io, reader, writer, keep_alive: true, version: HttpVersion::Http11, is_head: false }
    }

    /// Waits until `timeout` after `now` for bytes of the next request. Holds no buffer while
    /// waiting. Cancel safe.
    pub(crate) async fn wait_for_request(&mut self, now: Instant, timeout: Duration) -> WaitOutcome {
        self.start_wait(now, timeout);
        poll_fn(|cx| self.poll_wait_for_request(cx)).await
    }

    /// Sets the deadline of the next wait: `timeout` after `now`.
    pub(crate) fn start_wait(&mut self, now: Instant, timeout: Duration) {
        self.reader.deadline.restart_at(now.into(), timeout);
    }

    /// Polls the wait that `start_wait` has begun.
    pub(crate) fn poll_wait_for_request(&mut self, cx: &mut Context<'_>) -> Poll<WaitOutcome> {
        let RequestReader { buffer, deadline, .. } = &mut self.reader;
        if !buffer.is_empty() {
            return Poll::Ready(WaitOutcome::Readable);
        }
        // A readable connection may have no bytes: the first readiness of a socket, or TLS control
        // messages.
        match buffer.poll_fill(&self.io, cx, 1) {
            Poll::Ready(Ok(count)) if count > 0 => return Poll::Ready(WaitOutcome::Readable),
            Poll::Ready(_) => return Poll::Ready(WaitOutcome::Closed),
            Poll::Pending => buffer.release(),
        }
        deadline.poll(cx).map(|()| WaitOutcome::TimedOut)
    }

    /// Returns the buffers to their pool, for a connection without requests.
    pub(crate) fn release_buffers(&mut self) {
        self.reader.buffer.release();
        self.writer.release();
    }

    /// Whether the client speaks HTTP/2 with prior knowledge (RFC 9113 section 3.3): a head that is
    /// refused.
    pub(crate) fn begins_http2(&self) -> bool {
        self.reader.buffer.data().starts_with(HTTP2_PREFACE_HEAD)
    }

    /// The stream and the bytes received from it but not consumed.
    pub(crate) fn into_parts(self) -> (TransportStream, ReadBuffer) {
        (self.io, self.reader.buffer)
    }

    /// Fast path: reads the head of the next request if it has arrived and repeats the fields of
    /// the previous one. `None`: use `read_request`.
    pub(crate) fn read_repeated_head(
        &mut self,
        limits: &HttpLimits,
        request: &mut Request,
    ) -> Option<Result<(), RequestReadError>> {
        let parsed = request::parse_repeated(self.reader.buffer.data(), limits, request)?;
        Some(parsed.map_err(refuse).map(|length| self.take_head(length, request)))
    }

    /// Reads the head of the next request, of which bytes have arrived, and parses it into
    /// `request`.
    ///
    /// # Errors
    /// `Refused` with the status to send before closing. Cancel safe.
    pub(crate) async fn read_request(
        &mut self,
        limits: &HttpLimits,
        request: &mut Request,
    ) -> Result<(), RequestReadError> {
        self.reader.deadline.restart(limits.header_timeout);
        // The response to a refusal must not depend on the previous request.
        self.is_head = false;
        self.version = HttpVersion::Http11;
        let mut scanner = HeadScanner::default();
        let mut may_skip = true;
        let length = loop {
            // One empty line before the request line is tolerated (RFC 9112 section 2.2).
            if may_skip && self.reader.buffer.data().starts_with(b"\r\n") {
                self.reader.buffer.consume(2);
                may_skip = false;
            }
            let data = self.reader.buffer.data();
            if data.is_empty() || may_skip && data == b"\r" {
                self.fill_head(limits).await?;
                continue;
            }
            match scanner.advance(data) {
                ScanResult::Complete(length) if length > limits.header_bytes => {
                    let first_line = &data[..memchr::memchr(b'\r', data).unwrap_or(length)];
                    let is_long_line = first_line.len() > limits.uri_bytes + LINE_EXTRA;
                    return Err(refuse(if is_long_line {
                        request::refusal_of_long_line(first_line, limits)
                    } else {
                        RequestRefusal::HeadTooLarge
                    }));
                }
                ScanResult::Complete(length) => {
                    request::parse(&data[..length], limits, request).map_err(refuse)?;
                    break length;
                }
                ScanResult::BareLf => return Err(refuse(RequestRefusal::BareLf)),
                ScanResult::Partial { first_line_complete } => self.check_partial_head(limits, first_line_complete)?,
            }
            self.fill_head(limits).await?;
        };
        self.take_head(length, request);
        Ok(())
    }

    /// Describes the refused head, which is still in the buffer, for the access log: by its request
    /// line, or by its first bytes if it has none. Returns the version that the head names.
    #[cold]
    pub(crate) fn describe_refused(&self, request: &mut Request) -> NamedVersion {
        let head = self.reader.buffer.data();
        let line = &head[..head.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(head.len())];
        let mut parts = line.split(|byte| *byte == b' ');
        let version = NamedVersion::of(line.rsplit(|byte| *byte == b' ').next().unwrap_or_default());
        let is_http10 = version == NamedVersion::Other(*b"1.0");
        request.version = if is_http10 { HttpVersion::Http10 } else { HttpVersion::Http11 };
        match (parts.next().unwrap_or_default(), parts.next()) {
            (method, Some(target)) if is_token(method) => head::describe_refused(request, method, target),
            (method, None) if is_token(method) => head::describe_refused(request, method, b""),
            _ => head::describe_refused(request, b"", line),
        }
        version
    }

    /// Bytes of the current request's body: those that were announced, or those received so far.
    pub(crate) fn request_bytes(&self, request: &Request) -> u64 {
        match request.length {
            BodyLength::Known(length) => length,
            BodyLength::Streamed => self.reader.chunked_bytes,
            BodyLength::Empty | BodyLength::UntilClose => 0,
        }
    }

    fn take_head(&mut self, length: usize, request: &Request) {
        self.reader.buffer.consume(length);
        self.reader.buffer.release();
        self.reader.begin_body(request.length, request.connection.expects_continue);
        self.keep_alive = request.connection.keep_alive;
        self.version = request.version;
        self.is_head = request.method == http::Method::HEAD;
    }

    /// Splits the connection for one exchange: the request body is read while the response is
    /// written.
    pub(crate) fn exchange(&mut self) -> (Http1RequestBody<'_>, ResponseWriter<'_>) {
        let (idle_timeout, body_rate) = (self.reader.idle_timeout, self.reader.body_rate);
        let response_writer = ResponseWriter {
            io: &self.io,
            writer: &mut self.writer,
            keep_alive: &mut self.keep_alive,
            version: self.version,
            is_head: self.is_head,
            idle_timeout,
            body_rate,
            timeouts: None,
        };
        (Http1RequestBody { io: &self.io, reader: &mut self.reader }, response_writer)
    }

    /// After a response: discards the rest of the request body. Returns whether the connection can
    /// be reused; `close` discards a body that is too long for that.
    pub(crate) async fn drain_for_reuse(&mut self) -> bool {
        if !self.keep_alive || matches!(self.reader.body, RequestBodyState::Done) {
            return self.keep_alive;
        }
        self.reader.may_be_drained() && timeout(DRAIN_TIMEOUT, self.drain()).await.unwrap_or(false)
    }

    /// Discards the rest of the request body; returns whether it ended within `DRAIN_MAX`.
    async fn drain(&mut self) -> bool {
        let mut drained = 0;
        while !matches!(self.reader.body, RequestBodyState::Done) {
            let (mut body, _) = self.exchange();
            if poll_fn(|cx| body.poll_fill(cx)).await.is_err() {
                return false;
            }
            let count = body.data().len();
            body.consume(count);
            drained += count as u64;
            if drained > DRAIN_MAX {
                return false;
            }
        }
        true
    }

    /// The stream and the bytes received from it but not consumed.
    pub(super) fn stream_and_buffer(&mut self) -> (&TransportStream, &mut ReadBuffer) {
        (&self.io, &mut self.reader.buffer)
    }

    /// Shuts the connection down without losing the last response: ends the sending side (with TLS,
    /// by a `close_notify` first), then discards what the client sends until the client closes,
    /// sends nothing for `LINGER_IDLE_TIMEOUT`, has sent `LINGER_BYTES_MAX`, or `LINGER_TIMEOUT`
    /// has passed. The connection is to be dropped afterwards.
    pub(crate) async fn close(&mut self) {
        let io = &self.io;
        let RequestReader { buffer, deadline, .. } = &mut self.reader;
        let end = tokio::time::Instant::now() + LINGER_TIMEOUT;
        deadline.restart(LINGER_IDLE_TIMEOUT);
        let (mut is_shut, mut discarded) = (false, 0);
        tasks::set_waiting_for(TaskWait::ClientClose);
        poll_fn(|cx| {
            // While the client does not accept the end of the sending side, its bytes are read: it
            // may read only after it has sent them.
            match io.poll_shutdown_once(cx, &mut is_shut) {
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            for _ in 0..LINGER_READS {
                let unread = buffer.data().len();
                buffer.consume(unread);
                match buffer.poll_fill(io, cx, 1) {
                    Poll::Ready(Ok(count)) if count > 0 && discarded < LINGER_BYTES_MAX => {
                        discarded += count;
                        deadline.set(end.min(tokio::time::Instant::now() + LINGER_IDLE_TIMEOUT));
                    }
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return deadline.poll(cx),
                }
            }
            ready_or_yield(deadline.poll(cx), cx)
        })
        .await;
    }

    /// Shuts down a connection whose client has sent its last byte between two requests.
    pub(crate) async fn close_after_client(&mut self) {
        // There is nothing to receive, and the system ends the sending side of a socket that is
        // closed. With TLS, a client that waits for the answer to its `close_notify` gets it.
        if !self.io.is_closed_by_peer() {
            self.close().await;
        }
    }

    /// Whether no byte of a next request has arrived.
    pub(crate) fn is_read_buffer_empty(&self) -> bool {
        self.reader.buffer.is_empty()
    }

    /// Resets the connection, because the current response cannot be completed.
    pub(crate) fn abort(self) {
        self.io.reset_on_close();
    }

    fn check_partial_head(&self, limits: &HttpLimits, first_line_complete: bool) -> Result<(), RequestReadError> {
        let length = self.reader.buffer.data().len();
        if !first_line_complete && length > limits.uri_bytes + LINE_EXTRA {
            return Err(refuse(request::refusal_of_long_line(self.reader.buffer.data(), limits)));
        }
        if length >= limits.header_bytes {
            return Err(refuse(RequestRefusal::HeadTooLarge));
        }
        Ok(())
    }

    async fn fill_head(&mut self, limits: &HttpLimits) -> Result<(), RequestReadError> {
        let RequestReader { buffer, deadline, .. } = &mut self.reader;
        let io = &self.io;
        let count = poll_fn(|cx| match buffer.poll_fill(io, cx, limits.header_bytes) {
            Poll::Ready(result) => Poll::Ready(result.map_err(RequestReadError::Io)),
            Poll::Pending => deadline.poll(cx).map(|()| Err(refuse(RequestRefusal::HeadTimeout))),
        })
        .await?;
        if count == 0 {
            return Err(RequestReadError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }
}

/// Returns a pending `poll` with a wake-up, so that the task continues after the other ready tasks.
fn ready_or_yield(poll: Poll<()>, cx: &Context<'_>) -> Poll<()> {
    if poll.is_pending() {
        cx.waker().wake_by_ref();
    }
    poll
}

fn refuse(refusal: RequestRefusal) -> RequestReadError {
    RequestReadError::Refused(refusal)
}

impl RequestReader {
    fn begin_body(&mut self, length: BodyLength, expects_continue: bool) {
        self.body = match length {
            BodyLength::Empty | BodyLength::UntilClose | BodyLength::Known(0) => RequestBodyState::Done,
            BodyLength::Known(remaining) => RequestBodyState::Length { remaining },
            BodyLength::Streamed => {
                self.chunked_bytes = 0;
                RequestBodyState::Chunked { decoder: ChunkDecoder::new(), ready: 0 }
            }
        };
        self.trailers = None;
        self.route_body_max = u64::MAX;
        self.must_send_continue = expects_continue && self.buffer.is_empty();
        self.deadline.restart(self.idle_timeout);
        self.body_received = self.buffer.data().len() as u64;
        self.min_rate = None;
        self.continue_sent = 0;
    }

    /// Whether the rest of the body may be short enough to be discarded for the next request.
    fn may_be_drained(&self) -> bool {
        match self.body {
            RequestBodyState::Done => true,
            RequestBodyState::Failed => false,
            // The client got no `100 Continue`, so it is undefined whether it will send its body.
            RequestBodyState::Length { .. } | RequestBodyState::Chunked { .. } if self.must_send_continue => false,
            RequestBodyState::Length { remaining } => remaining <= DRAIN_MAX,
            RequestBodyState::Chunked { .. } => true,
        }
    }

    /// Polled while the gateway waits for the client: fails when the client has been idle for too
    /// long, or its body is below the minimum rate.
    fn poll_client_timeout(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        let min_rate = self.min_rate.get_or_insert_with(|| {
            let mut min_rate = Box::new(MinRateTimer::new(self.body_rate, self.idle_timeout));
            min_rate.record_progress(self.body_received);
            min_rate
        });
        if let Some(at) = min_rate.wait_deadline() {
            self.deadline.no_later_than(at);
        }
        tasks::set_waiting_for(TaskWait::ClientBody);
        ready!(self.deadline.poll(cx));
        self.body = RequestBodyState::Failed;
        Poll::Ready(BodyError::Timeout(ExchangeTimeout::ClientBody))
    }

    /// Consumes framing; `Some` when body bytes or the end are available.
    fn advance_framing(&mut self) -> Option<Result<(), BodyError>> {
        match &mut self.body {
            RequestBodyState::Done => Some(Ok(())),
            RequestBodyState::Failed => Some(Err(BodyError::Truncated)),
            RequestBodyState::Length { .. } => (!self.buffer.is_empty()).then_some(Ok(())),
            RequestBodyState::Chunked { ready, .. } if *ready > 0 => Some(Ok(())),
            RequestBodyState::Chunked { decoder, ready } => match decoder.step(self.buffer.data()) {
                Err(reason) => Some(Err(BodyError::Malformed(reason))),
                Ok(DecodeStep::More { skip }) => {
                    self.buffer.consume(skip);
                    None
                }
                Ok(DecodeStep::End { skip }) => {
                    self.buffer.consume(skip);
                    self.trailers = decoder.take_trailers();
                    if let Some(trailers) = &mut self.trailers {
                        let has_dropped_name = |name: &[u8]| {
                            self.dropped_trailers.iter().any(|dropped| matches_pattern(name, dropped.as_bytes()))
                        };
                        let drops_underscores = self.underscores == UnderscorePolicy::Drop;
                        trailers.retain(|field| {
                            !(has_dropped_name(field.name) || drops_underscores && field.name.contains(&b'_'))
                        });
                    }
                    self.body = RequestBodyState::Done;
                    Some(Ok(()))
                }
                Ok(DecodeStep::Data { skip, data }) => {
                    self.buffer.consume(skip);
                    *ready = data;
                    self.chunked_bytes += data as u64;
                    let too_large = self.chunked_bytes > self.body_max.min(self.route_body_max);
                    Some(if too_large { Err(BodyError::TooLarge) } else { Ok(()) })
                }
            },
        }
    }
}

impl Http1RequestBody<'_> {
    /// Whether the body is complete, or the request has none.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self.reader.body, RequestBodyState::Done)
    }

    /// Whether the rest of the body may be short enough for the connection to be reused.
    pub(crate) fn may_be_drained(&self) -> bool {
        self.reader.may_be_drained()
    }

    fn poll_continue(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
        while self.reader.continue_sent < CONTINUE.len() {
            let rest = &CONTINUE[self.reader.continue_sent..];
            self.reader.continue_sent += ready!(self.io.poll_write(cx, rest, &[]))?;
        }
        ready!(self.io.poll_flush(cx))?;
        self.reader.must_send_continue = false;
        Poll::Ready(Ok(()))
    }
}

impl Http1RequestBody<'_> {
    /// Lowers the limit of the body's size.
    pub(crate) fn limit(&mut self, bytes: u64) {
        self.reader.route_body_max = bytes;
    }
}

impl BodySource for Http1RequestBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            if let Some(result) = self.reader.advance_framing() {
                if result.is_err() {
                    self.reader.body = RequestBodyState::Failed;
                }
                return Poll::Ready(result);
            }
            if self.reader.must_send_continue {
                let Poll::Ready(sent) = self.poll_continue(cx) else {
                    return self.reader.poll_client_timeout(cx).map(Err);
                };
                sent?;
            }
            let reader = &mut *self.reader;
            match reader.buffer.poll_fill(self.io, cx, 1) {
                Poll::Ready(Ok(count)) if count > 0 => {
                    reader.body_received = reader.body_received.saturating_add(count as u64);
                    reader.min_rate.iter_mut().for_each(|min_rate| min_rate.record_progress(count as u64));
                    reader.deadline.restart(reader.idle_timeout);
                }
                Poll::Ready(result) => {
                    reader.body = RequestBodyState::Failed;
                    return Poll::Ready(Err(result.err().map_or(BodyError::Truncated, BodyError::Io)));
                }
                Poll::Pending => return reader.poll_client_timeout(cx).map(Err),
            }
        }
    }

    fn data(&self) -> &[u8] {
        let buffered = self.reader.buffer.data();
        match &self.reader.body {
            RequestBodyState::Done | RequestBodyState::Failed => &[],
            RequestBodyState::Length { remaining } => {
                &buffered[..usize::try_from(*remaining).unwrap_or(usize::MAX).min(buffered.len())]
            }
            RequestBodyState::Chunked { ready, .. } => &buffered[..*ready],
        }
    }

    fn consume(&mut self, count: usize) {
        // The client is not late while the gateway does not consume its bytes.
        self.reader.deadline.restart(self.reader.idle_timeout);
        self.reader.buffer.consume(count);
        match &mut self.reader.body {
            RequestBodyState::Done | RequestBodyState::Failed => {}
            RequestBodyState::Length { remaining } => {
                *remaining -= count as u64;
                if *remaining == 0 {
                    self.reader.body = RequestBodyState::Done;
                }
            }
            RequestBodyState::Chunked { decoder, ready, .. } => {
                *ready -= count;
                decoder.data_consumed(count);
            }
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        self.reader.trailers.as_deref()
    }

    /// Bytes of a pipelined request are kept, as far as they fit the buffer.
    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let reader = &mut *self.reader;
        loop {
            if reader.client_closed {
                return Poll::Ready(());
            }
            // A client that pipelines more than a buffer is connected. It is not read further until
            // its next request is due.
            if !reader.buffer.is_empty() || !matches!(reader.body, RequestBodyState::Done) {
                return Poll::Pending;
            }
            match ready!(reader.buffer.poll_fill(self.io, cx, 1)) {
                Ok(count) if count > 0 => {}
                _ => reader.client_closed = true,
            }
        }
    }

    fn is_client_closed(&self) -> bool {
        self.reader.client_closed || self.io.is_closed_by_peer()
    }
}

impl ResponseWriter<'_> {
    /// Closes the connection after this response and announces it in the response.
    pub(crate) fn close_connection_after(&mut self) {
        *self.keep_alive = false;
    }

    /// Sends an interim head. Bytes that the client does not accept now are sent before the
    /// response. While too many wait, it is discarded: a client can do without it.
    pub(crate) fn poll_interim(&mut self, cx: &mut Context<'_>, response: &Response) -> Poll<Result<(), SendError>> {
        if self.writer.head_buffer().len() >= INTERIM_WAITING_MAX {
            ready!(self.writer.poll_write_prepared(cx, self.io))?;
        }
        send::push_status_and_fields(self.writer.head_buffer(), response);
        self.writer.head_buffer().extend_from_slice(b"\r\n");
        self.writer.poll_write_prepared(cx, self.io)
    }

    /// Writes head and body. Not cancel safe: a cancelled response leaves the connection unusable.
    ///
    /// # Errors
    /// `Peer` when the connection failed. `Timeout` when the client did not read for the idle
    /// timeout, or read too slowly.
    /// `Source` when the body failed.
    pub(crate) async fn send(&mut self, response: &Response, body: &mut dyn BodySource) -> Result<(), SendError> {
        self.begin(response, body);
        poll_fn(|cx| self.poll_send(cx, body)).await
    }

    /// Prepares a response for `poll_send`. `body` was polled before, and has not failed.
    pub(crate) fn begin(&mut self, response: &Response, body: &mut dyn BodySource) {
        let length = self.write_head(response);
        self.writer.begin(if self.is_head { BodyLength::Empty } else { length });
        self.writer.append_complete_body(body);
        self.writer.write_head_first(body);
        self.timeouts = None;
    }

    /// Prepares a serialized response with its id. Returns whether it fits this request and
    /// connection.
    pub(crate) fn begin_serialized(&mut self, serialized: &SerializedResponse, id: Option<&[u8; 36]>) -> bool {
        let fits = *self.keep_alive && self.version == HttpVersion::Http11 && !self.is_head;
        if fits {
            serialized.write(id, self.writer.head_buffer());
            self.writer.begin_serialized(serialized.body_bytes);
            self.timeouts = None;
        }
        fits
    }

    /// Writes the prepared response, as `send` does.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>, body: &mut dyn BodySource) -> Poll<Result<(), SendError>> {
        loop {
            if let Poll::Ready(result) = self.writer.poll_send(cx, self.io, body) {
                return Poll::Ready(result);
            }
            let (sent, is_blocked) = (self.writer.body_sent(), self.writer.is_blocked());
            let has_progressed = self.writer.take_progress();
            if let Some(timeouts) = &mut self.timeouts
                && (has_progressed || !is_blocked)
            {
                timeouts.timer.restart();
                timeouts.min_rate.record_progress(sent - timeouts.counted);
                timeouts.counted = sent;
            }
            if !is_blocked {
                // Only the source is pending: no clock of the client runs.
                return Poll::Pending;
            }
            tasks::set_waiting_for(TaskWait::ClientRead);
            let WriteTimeouts { timer, min_rate, .. } = &mut **self.timeouts.get_or_insert_with(|| {
                let mut min_rate = MinRateTimer::new(self.body_rate, self.idle_timeout);
                min_rate.record_progress(sent);
                Box::new(WriteTimeouts { timer: WriteTimer::new(self.idle_timeout), min_rate, counted: sent })
            });
            let rate_missed_at = min_rate.wait_deadline();
            if let Some(at) = rate_missed_at {
                timer.check_no_later_than(at);
            }
            ready!(timer.poll_check(cx));
            let is_rate_missed = || rate_missed_at.is_some_and(|at| tokio::time::Instant::now() >= at);
            if self.writer.write_unready(self.io, body).map_err(SendError::Peer)? {
                timer.record_accepted();
            } else if timer.record_blocked() || is_rate_missed() {
                return Poll::Ready(Err(SendError::Timeout(ExchangeTimeout::ClientRead)));
            }
        }
    }

    /// Bytes of the response body written so far.
    pub(crate) fn body_sent(&self) -> u64 {
        self.writer.body_sent()
    }

    /// Writes status line, fields, framing and persistence. Returns the framing of the body for
    /// this client.
    fn write_head(&mut self, response: &Response) -> BodyLength {
        let mut length = response.length;
        if matches!(length, BodyLength::Streamed | BodyLength::UntilClose) {
            // HTTP/1.0 has no chunked coding: the body ends when the connection closes.
            length = if self.version == HttpVersion::Http10 { BodyLength::UntilClose } else { BodyLength::Streamed };
        }
        if length == BodyLength::UntilClose {
            *self.keep_alive = false;
        }
        let out = self.writer.head_buffer();
        send::push_status_and_fields(out, response);
        let has_body = !(response.status.is_informational() || matches!(response.status.as_u16(), 204 | 304));
        if has_body && length == BodyLength::Empty && !self.is_head {
            send::push_length(out, BodyLength::Known(0));
        } else if has_body {
            send::push_length(out, length);
        }
        if response.status == StatusCode::SWITCHING_PROTOCOLS {
            // The response has its own `Connection` field.
        } else if !*self.keep_alive {
            send::push_line(out, b"Connection", b"close");
        } else if self.version == HttpVersion::Http10 {
            send::push_line(out, b"Connection", b"keep-alive");
        }
        out.extend_from_slice(b"\r\n");
        length
    }
}

#[cfg(test)]
mod tests;
