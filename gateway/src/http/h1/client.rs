//! A connection to an upstream: sends one request, reads one answer, and is used again only when both ended cleanly.
//!
//! The request's body is pumped while the answer is read, so neither side can block the other (full duplex).
//! A link that owes bytes, holds bytes nobody asked for, or broke its framing is never idle again.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Method;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::chunk::{Decoder, Step};
use super::response;
use super::scan::{Found, Scan};
use super::send::{self, SendError, Sender};
use crate::http::alarm::Alarm;
use crate::http::body::{BodyError, RequestBody};
use crate::http::buffer::Buffer;
use crate::http::fields::{Fields, Known, KnownSet};
use crate::http::io::Io;
use crate::http::message::{Length, Request, Response, StatusCode, Version, is_bodiless};

/// Bytes of an answer's head; above it the answer is refused.
const HEAD_MAX: usize = 64 << 10;
/// Interim (1xx) answers before the real one.
const INTERIM_MAX: usize = 8;

/// Fields that are written from the request itself.
const REWRITTEN: KnownSet = KnownSet::of(&[Known::Host, Known::ContentLength, Known::TransferEncoding]);

/// Why an exchange with an upstream failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("connection refused or unreachable")]
    Connect(#[source] io::Error),
    #[error("connecting took too long")]
    ConnectTimeout,
    /// The connection ended before the first byte of an answer: the server may have closed an idle connection.
    #[error("closed before an answer")]
    NoAnswer(#[source] io::Error),
    #[error("connection failed in the answer's head")]
    Io(#[source] io::Error),
    #[error("malformed answer: {0}")]
    Malformed(&'static str),
    #[error("no answer within the deadline")]
    Timeout,
    /// The client's body failed, or the client left.
    #[error("client failed")]
    Client(#[source] BodyError),
    #[error("client went away")]
    ClientGone,
}

#[derive(Debug)]
enum Body {
    Length { left: u64 },
    Chunked { decoder: Decoder, ready: usize },
    UntilClose,
    Done,
}

/// One upstream connection.
pub struct Link {
    io: Io,
    buffer: Buffer,
    sender: Sender,
    alarm: Alarm,
    body: Body,
    trailers: Option<Box<Fields>>,
    reusable: bool,
    /// Whether it served an exchange before: then its server may have closed it meanwhile.
    used: bool,
    request_sent: bool,
    address: SocketAddr,
}

impl Link {
    /// Opens a connection.
    ///
    /// # Errors
    /// `Connect` or `ConnectTimeout`. Cancel safe.
    pub async fn connect(address: SocketAddr, patience: Duration) -> Result<Link, LinkError> {
        let stream = timeout(patience, TcpStream::connect(address))
            .await
            .map_err(|_| LinkError::ConnectTimeout)?
            .map_err(LinkError::Connect)?;
        stream.set_nodelay(true).map_err(LinkError::Connect)?;
        Ok(Link {
            io: Io::plain(stream),
            buffer: Buffer::default(),
            sender: Sender::new(),
            alarm: Alarm::after(patience),
            body: Body::Done,
            trailers: None,
            reusable: true,
            used: false,
            request_sent: true,
            address,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn is_used(&self) -> bool {
        self.used
    }

    /// Sends `request` with `body` and reads the answer's head. The deadline covers the whole exchange, the answer's
    /// body included. Not cancel safe: a link whose exchange was dropped is not reusable.
    ///
    /// # Errors
    /// `NoAnswer` where the request may be sent again on another link if it is safe to; all others are final.
    pub async fn exchange(
        &mut self,
        request: &Request,
        body: &mut RequestBody<'_>,
        deadline: Instant,
        response: &mut Response,
    ) -> Result<(), LinkError> {
        self.alarm.set(deadline);
        self.reusable = false;
        self.request_sent = false;
        self.write_head(request);
        let mut scan = Scan::default();
        let mut interim = 0;
        poll_fn(|cx| {
            loop {
                match self.poll_head(cx, body, &mut scan, interim > 0) {
                    Poll::Pending => return self.poll_stalled(cx, body),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Ready(Ok(length)) => {
                        let head = &self.buffer.data()[..length];
                        let persistent =
                            response::parse(head, &request.method, response).map_err(LinkError::Malformed)?;
                        self.buffer.consume(length);
                        if !response.status.is_informational() {
                            self.begin_body(&request.method, response, persistent);
                            return Poll::Ready(Ok(()));
                        }
                        interim += 1;
                        if is_switch(request, response) {
                            // What follows is no HTTP: the link ends with it.
                            response.length = Length::Empty;
                            self.used = true;
                            return Poll::Ready(Ok(()));
                        }
                        if response.status == StatusCode::SWITCHING_PROTOCOLS || interim > INTERIM_MAX {
                            return Poll::Ready(Err(LinkError::Malformed("unasked interim answer")));
                        }
                        // The gateway answers expectations itself, and a client of HTTP/1.0 knows none of these.
                        if response.status != StatusCode::CONTINUE && request.version != Version::Http10 {
                            request.interim.push(response.clone());
                        }
                        scan = Scan::default();
                    }
                }
            }
        })
        .await
    }

    /// The stream and what has arrived of it unread.
    pub(super) fn parts(&mut self) -> (&Io, &mut Buffer) {
        (&self.io, &mut self.buffer)
    }

    /// Nothing can move: the deadline has passed, or the client has left.
    fn poll_stalled(&mut self, cx: &mut Context<'_>, body: &mut RequestBody<'_>) -> Poll<Result<(), LinkError>> {
        if self.alarm.poll(cx).is_ready() {
            return Poll::Ready(Err(LinkError::Timeout));
        }
        if self.request_sent { body.poll_gone(cx).map(|()| Err(LinkError::ClientGone)) } else { Poll::Pending }
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut RequestBody<'_>,
        scan: &mut Scan,
        has_begun: bool,
    ) -> Poll<Result<usize, LinkError>> {
        let pump = self.poll_pump(cx, body);
        loop {
            match scan.advance(self.buffer.data()) {
                Found::Whole(length) => return Poll::Ready(Ok(length)),
                Found::BareLf => return Poll::Ready(Err(LinkError::Malformed("bare line feed"))),
                Found::Partial { .. } if self.buffer.data().len() >= HEAD_MAX => {
                    return Poll::Ready(Err(LinkError::Malformed("head too large")));
                }
                Found::Partial { .. } => {}
            }
            let before = self.buffer.data().len();
            match self.buffer.poll_fill(&self.io, cx, HEAD_MAX) {
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(result) => {
                    let error = result.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                    let is_first = before == 0 && !has_begun;
                    let failed = if is_first { LinkError::NoAnswer(error) } else { LinkError::Io(error) };
                    return Poll::Ready(Err(failed));
                }
                // An answer that came early is read even when the request could not be sent whole; only silence makes the failure count.
                Poll::Pending => match pump {
                    Poll::Ready(Err(SendError::Source(error))) => return Poll::Ready(Err(LinkError::Client(error))),
                    Poll::Ready(Err(SendError::Peer(error))) => return Poll::Ready(Err(LinkError::NoAnswer(error))),
                    Poll::Ready(Ok(())) | Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    /// Sends on what the client has delivered.
    fn poll_pump(&mut self, cx: &mut Context<'_>, body: &mut RequestBody<'_>) -> Poll<Result<(), SendError>> {
        if self.request_sent {
            return Poll::Ready(Ok(()));
        }
        let mut progress = false;
        let sent = self.sender.poll_send(cx, &self.io, body, &mut progress);
        self.request_sent = matches!(sent, Poll::Ready(Ok(())));
        sent
    }

    fn write_head(&mut self, request: &Request) {
        let out = self.sender.head();
        out.extend_from_slice(request.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(request.target.as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
        send::push_line(out, b"Host", request.authority.as_bytes());
        request.fields.write_lines(out, REWRITTEN);
        send::push_length(out, request.length);
        out.extend_from_slice(b"\r\n");
        self.sender.begin(request.length);
    }

    fn begin_body(&mut self, method: &Method, response: &Response, persistent: bool) {
        self.reusable = persistent;
        self.used = true;
        self.body = match response.length {
            _ if is_bodiless(method, response.status) => Body::Done,
            Length::Empty | Length::Known(0) => Body::Done,
            Length::Known(left) => Body::Length { left },
            Length::Streamed => Body::Chunked { decoder: Decoder::new(), ready: 0 },
            Length::UntilClose => Body::UntilClose,
        };
    }

    /// Whether the exchange ended so cleanly that the next one may use this connection.
    pub fn is_idle(&self) -> bool {
        self.reusable && self.request_sent && self.buffer.is_empty() && matches!(self.body, Body::Done)
    }

    /// Gives buffers back before the link waits in a pool.
    pub fn rest(&mut self) {
        self.buffer.release();
        self.sender.release();
    }

    /// Whether an idle link still stands; bytes or an end that arrived meanwhile disqualify it.
    pub fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.io.poll_readable(cx).map(|_| ())
    }

    /// Moves the answer's body and, while it lasts, the request's. See `Source::poll_fill`.
    pub fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        request_body: &mut RequestBody<'_>,
    ) -> Poll<Result<(), BodyError>> {
        // A request body that fails now does not take the answer with it: the origin has answered already.
        let _pumped_or_failed = self.poll_pump(cx, request_body);
        loop {
            if let Some(result) = self.advance() {
                return Poll::Ready(result);
            }
            match self.buffer.poll_fill(&self.io, cx, 1) {
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(Ok(_)) if matches!(self.body, Body::UntilClose) => {
                    self.body = Body::Done;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(BodyError::Truncated)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(BodyError::Io(error))),
                Poll::Pending => {
                    ready!(self.alarm.poll(cx));
                    return Poll::Ready(Err(BodyError::Timeout));
                }
            }
        }
    }

    fn advance(&mut self) -> Option<Result<(), BodyError>> {
        match &mut self.body {
            Body::Done => Some(Ok(())),
            Body::Length { .. } | Body::UntilClose => (!self.buffer.is_empty()).then_some(Ok(())),
            Body::Chunked { ready, .. } if *ready > 0 => Some(Ok(())),
            Body::Chunked { decoder, ready } => match decoder.step(self.buffer.data()) {
                Err(reason) => Some(Err(BodyError::Malformed(reason))),
                Ok(Step::More { skip }) => {
                    self.buffer.consume(skip);
                    None
                }
                Ok(Step::Data { skip, data }) => {
                    self.buffer.consume(skip);
                    *ready = data;
                    Some(Ok(()))
                }
                Ok(Step::End { skip }) => {
                    self.buffer.consume(skip);
                    self.trailers = decoder.take_trailers();
                    self.body = Body::Done;
                    Some(Ok(()))
                }
            },
        }
    }

    /// The trailers of a body that has ended.
    pub fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    /// The same, once.
    pub fn take_trailers(&mut self) -> Option<Box<Fields>> {
        self.trailers.take()
    }

    pub fn data(&self) -> &[u8] {
        let held = self.buffer.data();
        match &self.body {
            Body::Done => &[],
            Body::Length { left } => &held[..usize::try_from(*left).unwrap_or(usize::MAX).min(held.len())],
            Body::Chunked { ready, .. } => &held[..*ready],
            Body::UntilClose => held,
        }
    }

    pub fn consume(&mut self, count: usize) {
        self.buffer.consume(count);
        match &mut self.body {
            Body::Done | Body::UntilClose => {}
            Body::Length { left } => {
                *left -= count as u64;
                if *left == 0 {
                    self.body = Body::Done;
                }
            }
            Body::Chunked { decoder, ready } => {
                *ready -= count;
                decoder.taken(count);
            }
        }
    }
}

/// Whether the answer switches to a protocol that the request offered (RFC 9110 section 7.8).
fn is_switch(request: &Request, response: &Response) -> bool {
    let offered = |protocol: &[u8]| request.fields.members(Known::Upgrade).any(|o| o.eq_ignore_ascii_case(protocol));
    let mut chosen = response.fields.members(Known::Upgrade).peekable();
    response.status == StatusCode::SWITCHING_PROTOCOLS
        && request.length == Length::Empty
        && chosen.peek().is_some()
        && chosen.all(offered)
}
