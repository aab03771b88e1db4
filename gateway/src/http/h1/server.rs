//! A client's connection: reads one request after the other and writes one answer to each.
//!
//! States: waiting (no byte of a request, no buffer) -> head -> answering (the body may still come in) -> waiting, or closed.
//! After a refusal, an unfinished body that is too long to drain, or a cut answer, the connection is never used again.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::chunk::{Decoder, Step};
use super::request::{self, Refusal};
use super::scan::{Found, Scan};
use super::send::{self, SendError, Sender};
use super::written::Written;
use crate::http::alarm::Alarm;
use crate::http::body::{BodyError, Source};
use crate::http::buffer::Buffer;
use crate::http::fields::Fields;
use crate::http::io::Io;
use crate::http::limits::Limits;
use crate::http::message::{Length, Request, Response, StatusCode, Version};
use crate::http::pace::Pace;

/// How much of a body that nobody read is thrown away to keep the connection.
const DRAIN_MAX: u64 = 64 << 10;
/// Beside the target of a request line: the longest method worth waiting for, two spaces and a version.
const LINE_EXTRA: usize = 64;
/// How long a closing connection waits for the client to take the last answer.
const LINGER: Duration = Duration::from_secs(1);

/// What came of waiting for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    Bytes,
    /// Nothing until the deadline.
    Silent,
    Closed,
}

/// Why there is no next request.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The head is unacceptable: answer with the refusal's status and close.
    #[error("refused: {}", .0.reason())]
    Refused(Refusal),
    /// The connection failed in the middle of a head.
    #[error("connection failed")]
    Io(#[from] io::Error),
}

enum Body {
    Done,
    Length { left: u64 },
    Chunked { decoder: Decoder, total: u64, ready: usize },
    Failed,
}

/// The reading half's state.
struct Reader {
    buffer: Buffer,
    body: Body,
    trailers: Option<Box<Fields>>,
    dropped_trailers: Arc<[String]>,
    body_max: u64,
    /// A `100 Continue` is owed before the body is read.
    owes_continue: bool,
    continue_sent: usize,
    at_end: bool,
    alarm: Alarm,
    idle: Duration,
    /// Made when a body first has to be waited for.
    pace: Option<Box<Pace>>,
    /// Of either body, in bytes per second.
    rate: u32,
}

/// One client connection.
pub struct Server {
    io: Io,
    reader: Reader,
    sender: Sender,
    keep_alive: bool,
    version: Version,
    is_head: bool,
}

/// The body of the current request, borrowed from its connection.
pub struct RequestBody<'a> {
    io: &'a Io,
    reader: &'a mut Reader,
}

/// The writing half of the current exchange.
pub struct Answer<'a> {
    io: &'a Io,
    sender: &'a mut Sender,
    keep_alive: &'a mut bool,
    version: Version,
    is_head: bool,
    idle: Duration,
    rate: u32,
    /// Made when the client first has to be waited for.
    waits: Option<Box<Waits>>,
}

/// How long a client is waited for that does not take its answer.
struct Waits {
    alarm: Alarm,
    pace: Pace,
}

impl Server {
    pub fn new(io: Io, limits: &Limits) -> Self {
        let reader = Reader {
            buffer: Buffer::default(),
            body: Body::Done,
            trailers: None,
            dropped_trailers: Arc::clone(&limits.dropped_trailers),
            body_max: limits.body_bytes,
            owes_continue: false,
            continue_sent: 0,
            at_end: false,
            alarm: Alarm::after(limits.header_timeout),
            idle: limits.idle_timeout,
            pace: None,
            rate: limits.body_rate,
        };
        let sender = Sender::new();
        Server { io, reader, sender, keep_alive: true, version: Version::Http11, is_head: false }
    }

    /// Waits for bytes of the next request, at most for `patience` from `now` on. Holds no buffer meanwhile. Cancel safe.
    pub async fn wait(&mut self, now: Instant, patience: Duration) -> Waited {
        self.expect(now, patience);
        poll_fn(|cx| self.poll_wait(cx)).await
    }

    /// Says how long bytes of the next request are waited for.
    pub fn expect(&mut self, now: Instant, patience: Duration) {
        self.reader.alarm.restart_at(now.into(), patience);
    }

    /// Waits as `wait` does.
    pub fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<Waited> {
        let Reader { buffer, alarm, .. } = &mut self.reader;
        if !buffer.is_empty() {
            return Poll::Ready(Waited::Bytes);
        }
        // What makes a connection readable may be nothing to read: the first look at a socket, or messages of TLS.
        match buffer.poll_fill(&self.io, cx, 1) {
            Poll::Ready(Ok(count)) if count > 0 => return Poll::Ready(Waited::Bytes),
            Poll::Ready(_) => return Poll::Ready(Waited::Closed),
            Poll::Pending => buffer.release(),
        }
        alarm.poll(cx).map(|()| Waited::Silent)
    }

    /// Gives back what the next request may need anew; for a connection that has been quiet.
    pub fn rest(&mut self) {
        self.reader.buffer.release();
        self.sender.release();
    }

    /// Reads the next request's head where it has arrived and is much like the last one's; `None`: it is to be read as any other.
    pub fn read_at_once(&mut self, limits: &Limits, request: &mut Request) -> Option<Result<(), ReadError>> {
        let parsed = request::parse_repeated(self.reader.buffer.data(), limits, request)?;
        Some(parsed.map_err(refuse).map(|length| self.take_head(length, request)))
    }

    /// Reads the next request's head, of which bytes have arrived, and parses it into `request`.
    ///
    /// # Errors
    /// `Refused` with the status to send before closing. Cancel safe.
    pub async fn read_request(&mut self, limits: &Limits, request: &mut Request) -> Result<(), ReadError> {
        self.reader.alarm.restart(limits.header_timeout);
        // What the last request was must not shape the refusal of this one.
        self.is_head = false;
        self.version = Version::Http11;
        let mut scan = Scan::default();
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
            match scan.advance(data) {
                Found::Whole(length) if length > limits.header_bytes => {
                    let first_line = memchr::memchr(b'\r', data).unwrap_or(length);
                    let is_target = first_line > limits.uri_bytes + LINE_EXTRA;
                    return Err(refuse(if is_target { Refusal::TargetTooLong } else { Refusal::HeadTooLarge }));
                }
                Found::Whole(length) => {
                    request::parse(&data[..length], limits, request).map_err(refuse)?;
                    break length;
                }
                Found::BareLf => return Err(refuse(Refusal::BareLf)),
                Found::Partial { first_line_done } => self.check_partial(limits, first_line_done)?,
            }
            self.fill_head(limits).await?;
        };
        self.take_head(length, request);
        Ok(())
    }

    fn take_head(&mut self, length: usize, request: &Request) {
        self.reader.buffer.consume(length);
        self.reader.buffer.release();
        self.reader.expect_body(request.length, request.wishes.expects_continue);
        self.keep_alive = request.wishes.keep_alive;
        self.version = request.version;
        self.is_head = request.method == http::Method::HEAD;
    }

    /// Splits the connection for one exchange: the request's body comes in while the answer goes out.
    pub fn exchange(&mut self) -> (RequestBody<'_>, Answer<'_>) {
        let (idle, rate) = (self.reader.idle, self.reader.rate);
        let answer = Answer {
            io: &self.io,
            sender: &mut self.sender,
            keep_alive: &mut self.keep_alive,
            version: self.version,
            is_head: self.is_head,
            idle,
            rate,
            waits: None,
        };
        (RequestBody { io: &self.io, reader: &mut self.reader }, answer)
    }

    /// After an answer: throws away what is left of the request's body, and says whether another request may follow.
    pub async fn is_reusable(&mut self) -> bool {
        if !self.keep_alive {
            return false;
        }
        if self.reader.owes_continue && !matches!(self.reader.body, Body::Done) {
            // The client was never told to send its body; whether it will is anybody's guess.
            return false;
        }
        let mut drained = 0;
        while !matches!(self.reader.body, Body::Done) {
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

    /// The stream and what has arrived of it unread.
    pub(super) fn parts(&mut self) -> (&Io, &mut Buffer) {
        (&self.io, &mut self.reader.buffer)
    }

    /// Ends the connection so that the last answer arrives: shuts the sending side, then reads a little while longer.
    pub async fn close(mut self) {
        let io = &self.io;
        self.reader.alarm.restart(LINGER);
        let mut drained = 0;
        let alarm = &mut self.reader.alarm;
        poll_fn(|cx| {
            if alarm.poll(cx).is_ready() || ready!(io.poll_shutdown(cx)).is_err() {
                return Poll::Ready(());
            }
            // On the stack: kept across the wait, it would make every connection's task larger.
            let mut scratch = [0; 4096];
            loop {
                match ready!(io.poll_read(cx, &mut scratch)) {
                    Ok(count) if count > 0 && drained < DRAIN_MAX => drained += count as u64,
                    _ => return Poll::Ready(()),
                }
            }
        })
        .await;
    }

    /// Whether no byte of a next request has arrived.
    pub fn is_idle(&self) -> bool {
        self.reader.buffer.is_empty()
    }

    /// Ends the connection at once, as a reset: the answer under way cannot be completed.
    pub fn abort(self) {
        self.io.reset_on_close();
    }

    fn check_partial(&self, limits: &Limits, first_line_done: bool) -> Result<(), ReadError> {
        let length = self.reader.buffer.data().len();
        if !first_line_done && length > limits.uri_bytes + LINE_EXTRA {
            let is_method = request::method_length(self.reader.buffer.data()) > request::METHOD_MAX;
            return Err(refuse(if is_method { Refusal::MethodTooLong } else { Refusal::TargetTooLong }));
        }
        if length >= limits.header_bytes {
            return Err(refuse(Refusal::HeadTooLarge));
        }
        Ok(())
    }

    async fn fill_head(&mut self, limits: &Limits) -> Result<(), ReadError> {
        let Reader { buffer, alarm, .. } = &mut self.reader;
        let io = &self.io;
        let count = poll_fn(|cx| match buffer.poll_fill(io, cx, limits.header_bytes) {
            Poll::Ready(result) => Poll::Ready(result.map_err(ReadError::Io)),
            Poll::Pending => alarm.poll(cx).map(|()| Err(refuse(Refusal::HeadTimeout))),
        })
        .await?;
        if count == 0 {
            return Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }
}

fn refuse(refusal: Refusal) -> ReadError {
    ReadError::Refused(refusal)
}

impl Reader {
    fn expect_body(&mut self, length: Length, expects_continue: bool) {
        self.body = match length {
            Length::Empty | Length::UntilClose | Length::Known(0) => Body::Done,
            Length::Known(left) => Body::Length { left },
            Length::Streamed => Body::Chunked { decoder: Decoder::new(), total: 0, ready: 0 },
        };
        self.trailers = None;
        self.owes_continue = expects_continue && self.buffer.is_empty();
        self.alarm.restart(self.idle);
        self.pace = None;
        self.continue_sent = 0;
    }

    /// Moves framing out of the way; `Some` when data or the end is there.
    fn advance(&mut self) -> Option<Result<(), BodyError>> {
        match &mut self.body {
            Body::Done => Some(Ok(())),
            Body::Failed => Some(Err(BodyError::Truncated)),
            Body::Length { .. } => (!self.buffer.is_empty()).then_some(Ok(())),
            Body::Chunked { ready, .. } if *ready > 0 => Some(Ok(())),
            Body::Chunked { decoder, total, ready } => match decoder.step(self.buffer.data()) {
                Err(reason) => Some(Err(BodyError::Malformed(reason))),
                Ok(Step::More { skip }) => {
                    self.buffer.consume(skip);
                    None
                }
                Ok(Step::End { skip }) => {
                    self.buffer.consume(skip);
                    self.trailers = decoder.take_trailers();
                    if let Some(trailers) = &mut self.trailers {
                        let is_dropped =
                            |name: &[u8]| self.dropped_trailers.iter().any(|n| n.as_bytes().eq_ignore_ascii_case(name));
                        trailers.retain(|field| !is_dropped(field.name));
                    }
                    self.body = Body::Done;
                    Some(Ok(()))
                }
                Ok(Step::Data { skip, data }) => {
                    self.buffer.consume(skip);
                    *ready = data;
                    *total += data as u64;
                    let too_large = *total > self.body_max;
                    Some(if too_large { Err(BodyError::TooLarge) } else { Ok(()) })
                }
            },
        }
    }
}

impl RequestBody<'_> {
    /// Whether the request has no body at all.
    pub fn is_done(&self) -> bool {
        matches!(self.reader.body, Body::Done)
    }

    /// Resolves when the client closes. Bytes of a pipelined request are kept, as far as they fit. Cancel safe.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let reader = &mut *self.reader;
        loop {
            if reader.at_end {
                return Poll::Ready(());
            }
            // A client that pipelines more than a buffer is alive; it is not read further until its turn.
            if !reader.buffer.is_empty() || !matches!(reader.body, Body::Done) {
                return Poll::Pending;
            }
            match ready!(reader.buffer.poll_fill(self.io, cx, 1)) {
                Ok(count) if count > 0 => {}
                _ => reader.at_end = true,
            }
        }
    }

    fn poll_continue(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
        while self.reader.continue_sent < CONTINUE.len() {
            let rest = &CONTINUE[self.reader.continue_sent..];
            self.reader.continue_sent += ready!(self.io.poll_write(cx, rest, &[]))?;
        }
        ready!(self.io.poll_flush(cx))?;
        self.reader.owes_continue = false;
        Poll::Ready(Ok(()))
    }
}

impl Source for RequestBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            if let Some(result) = self.reader.advance() {
                if result.is_err() {
                    self.reader.body = Body::Failed;
                }
                return Poll::Ready(result);
            }
            if self.reader.owes_continue {
                ready!(self.poll_continue(cx))?;
            }
            let reader = &mut *self.reader;
            match reader.buffer.poll_fill(self.io, cx, 1) {
                Poll::Ready(Ok(count)) if count > 0 => {
                    reader.pace.iter_mut().for_each(|pace| pace.moved(count as u64));
                    reader.alarm.restart(reader.idle);
                }
                Poll::Ready(result) => {
                    reader.body = Body::Failed;
                    return Poll::Ready(Err(result.err().map_or(BodyError::Truncated, BodyError::Io)));
                }
                Poll::Pending => {
                    let pace = reader.pace.get_or_insert_with(|| Box::new(Pace::new(reader.rate, reader.idle)));
                    if let Some(at) = pace.wait() {
                        reader.alarm.no_later(at);
                    }
                    ready!(reader.alarm.poll(cx));
                    reader.body = Body::Failed;
                    return Poll::Ready(Err(BodyError::Timeout));
                }
            }
        }
    }

    fn data(&self) -> &[u8] {
        let held = self.reader.buffer.data();
        match &self.reader.body {
            Body::Done | Body::Failed => &[],
            Body::Length { left } => &held[..usize::try_from(*left).unwrap_or(usize::MAX).min(held.len())],
            Body::Chunked { ready, .. } => &held[..*ready],
        }
    }

    fn consume(&mut self, count: usize) {
        // While nobody took bytes, the client could not be late.
        self.reader.alarm.restart(self.reader.idle);
        self.reader.buffer.consume(count);
        match &mut self.reader.body {
            Body::Done | Body::Failed => {}
            Body::Length { left } => {
                *left -= count as u64;
                if *left == 0 {
                    self.reader.body = Body::Done;
                }
            }
            Body::Chunked { decoder, ready, .. } => {
                *ready -= count;
                decoder.taken(count);
            }
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        self.reader.trailers.as_deref()
    }
}

impl Answer<'_> {
    /// The connection ends after this answer, and the answer says so.
    pub fn close_after(&mut self) {
        *self.keep_alive = false;
    }

    /// Sends an interim head; what the client does not take now goes out before the answer.
    pub fn poll_interim(&mut self, cx: &mut Context<'_>, response: &Response) -> Poll<Result<(), SendError>> {
        send::push_start(self.sender.head(), response);
        self.sender.head().extend_from_slice(b"\r\n");
        self.sender.poll_head(cx, self.io)
    }

    /// Writes head and body. Not cancel safe: a cancelled answer leaves the connection unusable.
    ///
    /// # Errors
    /// `Peer` when the client failed, did not read for the idle timeout or read too slowly, `Source` when the body did.
    pub async fn send(&mut self, response: &Response, body: &mut dyn Source) -> Result<(), SendError> {
        self.begin(response, body);
        poll_fn(|cx| self.poll_send(cx, body)).await
    }

    /// Prepares an answer, which `poll_send` is to write.
    pub fn begin(&mut self, response: &Response, body: &mut dyn Source) {
        let length = self.write_head(response);
        self.sender.begin(if self.is_head { Length::Empty } else { length });
        self.sender.begin_whole(body);
        self.waits = None;
    }

    /// Prepares an answer that was written before; says whether that fits this request and connection.
    pub fn begin_written(&mut self, written: &Written) -> bool {
        let fits = *self.keep_alive && self.version == Version::Http11 && !self.is_head;
        if fits {
            self.sender.head().extend_from_slice(&written.text);
            self.sender.begin_written(written.body_bytes);
            self.waits = None;
        }
        fits
    }

    /// Writes head and body as `send` does, once begun.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, body: &mut dyn Source) -> Poll<Result<(), SendError>> {
        let mut progress = false;
        let before = self.sender.body_sent();
        if let Poll::Ready(result) = self.sender.poll_send(cx, self.io, body, &mut progress) {
            return Poll::Ready(result);
        }
        let (idle, rate) = (self.idle, self.rate);
        let new = || Box::new(Waits { alarm: Alarm::after(idle), pace: Pace::new(rate, idle) });
        let Waits { alarm, pace } = &mut **self.waits.get_or_insert_with(new);
        if progress {
            alarm.restart(idle);
            pace.moved(self.sender.body_sent() - before);
        }
        if !self.sender.is_blocked() {
            pace.rest();
        } else if let Some(at) = pace.wait() {
            alarm.no_later(at);
        }
        alarm.poll(cx).map(|()| Err(SendError::Peer(io::ErrorKind::TimedOut.into())))
    }

    /// After a failed `send`: takes the answer back, if nothing of it has left, so that another may be sent.
    pub fn take_back(&mut self) -> bool {
        let is_untouched = self.sender.is_untouched();
        if is_untouched {
            self.sender.discard();
        }
        is_untouched
    }

    /// Bytes of the answer's body written so far.
    pub fn body_sent(&self) -> u64 {
        self.sender.body_sent()
    }

    /// Status line, fields, framing, persistence; returns the body's framing for this client.
    fn write_head(&mut self, response: &Response) -> Length {
        let mut length = response.length;
        if matches!(length, Length::Streamed | Length::UntilClose) {
            // HTTP/1.0 knows no chunks: its answer ends with the connection.
            length = if self.version == Version::Http10 { Length::UntilClose } else { Length::Streamed };
        }
        if length == Length::UntilClose {
            *self.keep_alive = false;
        }
        let out = self.sender.head();
        send::push_start(out, response);
        let has_body = !(response.status.is_informational() || matches!(response.status.as_u16(), 204 | 304));
        if has_body && length == Length::Empty && !self.is_head {
            send::push_length(out, Length::Known(0));
        } else if has_body {
            send::push_length(out, length);
        }
        if response.status == StatusCode::SWITCHING_PROTOCOLS {
            // Its own `Connection` says what becomes of the connection.
        } else if !*self.keep_alive {
            send::push_line(out, b"Connection", b"close");
        } else if self.version == Version::Http10 {
            send::push_line(out, b"Connection", b"keep-alive");
        }
        out.extend_from_slice(b"\r\n");
        length
    }
}
