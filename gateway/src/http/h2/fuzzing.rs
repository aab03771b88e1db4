//! Entry point for tests and fuzzers: a connection that is fed with bytes in pieces over a socket
//! pair, and whose requests are read and answered. The gateway itself does not use it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::net::TcpStream;

use super::abuse::Http2Client;
use super::connection::Http2Connection;
use super::frame::Http2ErrorCode;
use super::memory_budget::reserved_bytes;
use super::receive_request::{IncomingRequest, ReceiveEnd};
use super::request_body::Http2RequestBody;
use super::stream_handle::StreamHandle;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadBuffer;
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, Request, Response, StatusCode};
use crate::http::transport::TransportStream;

/// The results of a connection and its input.
#[derive(Debug, Default)]
pub struct FuzzedConnection {
    /// Everything that was sent to the client.
    pub output: Vec<u8>,
    /// Requests whose head was accepted: method, target and authority.
    pub requests: Vec<(String, String, String)>,
    /// Bytes that were accounted for when everything had ended.
    pub accounted: usize,
    /// Whether the gateway has ended the connection.
    pub is_ended: bool,
}

/// The body of a response.
struct FuzzedBody(Bytes);

impl BodySource for FuzzedBody {
    fn poll_fill(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &self.0
    }

    fn consume(&mut self, count: usize) {
        self.0.advance(count);
    }
}

/// A request that is being answered.
struct FuzzedExchange {
    handle: StreamHandle<FuzzedBody>,
    upload: Option<Http2RequestBody>,
    status: StatusCode,
    has_begun: bool,
}

impl FuzzedExchange {
    fn new(incoming: IncomingRequest<FuzzedBody>, request: &Request, limits: &HttpLimits) -> Self {
        let IncomingRequest { handle, head, .. } = incoming;
        let upload = handle.upload().filter(|_| head.is_ok());
        let upload = upload.map(|upload| Http2RequestBody::new(upload, limits, request));
        let status = head.map_or_else(|refused| refused.refusal.status(), |_| StatusCode::OK);
        FuzzedExchange { handle, upload, status, has_begun: false }
    }

    /// Ready when the response was sent, or cannot be. `size` selects the length of its body.
    fn poll(&mut self, cx: &mut Context<'_>, size: usize) -> Poll<()> {
        if let Some(upload) = &mut self.upload {
            // Every other body is not read.
            while size.is_multiple_of(2)
                && matches!(upload.poll_fill(cx), Poll::Ready(Ok(())))
                && !upload.data().is_empty()
            {
                let count = upload.data().len();
                upload.consume(count.div_ceil(2));
            }
        }
        if !self.has_begun {
            if self.handle.poll_room(cx).is_pending() {
                return Poll::Pending;
            }
            let length = size * 1_013 % 70_000;
            let remaining = (!size.is_multiple_of(3)).then_some(length as u64);
            let mut response = Response::new(self.status);
            response.length = remaining.map_or(BodyLength::Streamed, BodyLength::Known);
            response.fields.push(b"x-size", length.to_string().as_bytes());
            self.handle.begin_response(&response, FuzzedBody(Bytes::from(vec![b'b'; length])), remaining);
            self.has_begun = true;
        }
        self.handle.poll_body(cx).map(drop)
    }
}

/// The gateway's side of the connection.
struct FuzzedServer {
    h2: Rc<Http2Connection<FuzzedBody>>,
    limits: HttpLimits,
    request: Request,
    exchanges: Vec<FuzzedExchange>,
    seen: FuzzedConnection,
}

impl FuzzedServer {
    /// Moves everything that can move. Ready at the end of the connection.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.h2.enter(cx);
        let ended = self.poll_frames(cx);
        self.h2.leave();
        ended
    }

    fn poll_frames(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.h2.poll_request(cx, &mut self.request) {
                Poll::Ready(Ok(incoming)) => {
                    if incoming.head.is_ok() {
                        let Request { method, target, authority, .. } = &self.request;
                        self.seen.requests.push((method.to_string(), target.clone(), authority.clone()));
                    }
                    self.exchanges.push(FuzzedExchange::new(incoming, &self.request, &self.limits));
                }
                Poll::Ready(Err(end)) => {
                    match end {
                        ReceiveEnd::Closed => {}
                        ReceiveEnd::Error(code) => self.h2.abort(code),
                        ReceiveEnd::Abuse(_) => self.h2.abort(Http2ErrorCode::EnhanceYourCalm),
                    }
                    // Frames that do not fit in the socket now are lost.
                    let _sent_or_lost = self.h2.poll_send(cx);
                    return Poll::Ready(());
                }
                Poll::Pending => break,
            }
        }
        loop {
            let before = self.exchanges.len();
            self.exchanges.retain_mut(|exchange| exchange.poll(cx, before).is_pending());
            if matches!(self.h2.poll_send(cx), Poll::Ready(Err(_))) {
                return Poll::Ready(());
            }
            if self.exchanges.len() == before {
                return Poll::Pending;
            }
        }
    }
}

/// Feeds `input`, `piece` bytes at a time, to a connection, and reads all that it sends.
///
/// # Errors
/// The system gives no sockets.
pub fn run_connection(input: &[u8], piece: usize) -> io::Result<FuzzedConnection> {
    thread_local! {
        static RUNTIME: RefCell<Option<tokio::runtime::Runtime>> = const { RefCell::new(None) };
    }
    RUNTIME.with_borrow_mut(|runtime| {
        if runtime.is_none() {
            *runtime = Some(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
        }
        runtime.as_ref().map_or_else(|| Err(io::ErrorKind::Other.into()), |runtime| runtime.block_on(run(input, piece)))
    })
}

async fn run(input: &[u8], piece: usize) -> io::Result<FuzzedConnection> {
    let (client, server) = UnixStream::pair()?;
    client.set_nonblocking(true)?;
    server.set_nonblocking(true)?;
    // The engine uses calls that every stream socket has.
    let server = std::net::TcpStream::from(std::os::fd::OwnedFd::from(server));
    let io = TransportStream::plain(TcpStream::from_std(server)?);
    let (limits, reserved) = (HttpLimits::default(), reserved_bytes());
    let mut server = FuzzedServer {
        h2: Http2Connection::new(
            (io, ReadBuffer::default()),
            Http2Client { address: IpAddr::V4(Ipv4Addr::LOCALHOST), is_trusted_proxy: false },
            limits.clone(),
        ),
        limits,
        request: Request::default(),
        exchanges: Vec::new(),
        seen: FuzzedConnection::default(),
    };
    let (mut rest, mut space) = (input, vec![0; 64 << 10]);
    let mut is_shut = false;
    // Each turn moves bytes, or is one of the last: the client has sent everything and half-closed.
    loop {
        let polled = poll_fn(|cx| Poll::Ready(server.poll(cx))).await;
        let mut has_moved = false;
        while let Ok(count @ 1..) = (&client).read(&mut space) {
            server.seen.output.extend_from_slice(&space[..count]);
            has_moved = true;
        }
        if polled.is_ready() {
            server.seen.is_ended = !is_shut;
            break;
        }
        match (&client).write(&rest[..piece.clamp(1, rest.len().max(1)).min(rest.len())]) {
            Ok(count) if count > 0 => (rest, has_moved) = (&rest[count..], true),
            _ if rest.is_empty() && !has_moved && !is_shut => {
                client.shutdown(std::net::Shutdown::Write)?;
                (is_shut, has_moved) = (true, true);
            }
            _ => {}
        }
        // The reactor sees what has changed.
        tokio::task::yield_now().await;
        if !has_moved && is_shut {
            break;
        }
    }
    server.exchanges.clear();
    server.h2.end_streams();
    let FuzzedServer { h2, mut seen, .. } = server;
    seen.accounted = h2.accounted();
    drop(h2);
    assert_eq!(reserved_bytes(), reserved, "memory stays reserved");
    Ok(seen)
}
