//! Frames that are received while a client does not read, and after responses were sent whose tasks
//! were not polled.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};

use tokio::net::TcpStream;

use super::abuse::Http2Client;
use super::account::STREAMS_MAX;
use super::connection::{Http2Connection, OUT_READ_MAX};
use super::frame::{self, FrameHead, HEAD_LEN, PREFACE, WINDOW_MAX};
use super::priority::Priority;
use super::receive_request::IncomingRequest;
use super::sender::OUT_MAX;
use super::stream_handle::StreamHandle;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadBuffer;
use crate::http::limits::HttpLimits;
use crate::http::message::{Request, Response};
use crate::http::transport::TransportStream;

/// Counts how often it was woken.
#[derive(Default)]
struct CountingWaker(AtomicUsize);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// A body of which more may come.
struct ShortBody(&'static [u8]);

impl BodySource for ShortBody {
    fn poll_fill(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.0.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn data(&self) -> &[u8] {
        self.0
    }

    fn consume(&mut self, count: usize) {
        self.0 = &self.0[count..];
    }
}

fn connection() -> (UnixStream, Rc<Http2Connection<ShortBody>>) {
    let (client, server) = UnixStream::pair().expect("sockets");
    [&client, &server].into_iter().for_each(|socket| socket.set_nonblocking(true).expect("a live socket"));
    // The engine uses calls that every stream socket has.
    let server = std::net::TcpStream::from(std::os::fd::OwnedFd::from(server));
    let io = TransportStream::plain(TcpStream::from_std(server).expect("a runtime"));
    (
        client,
        Http2Connection::new(
            (io, ReadBuffer::default()),
            Http2Client { address: IpAddr::V4(Ipv4Addr::LOCALHOST), is_trusted_proxy: false },
            HttpLimits::default(),
        ),
    )
}

/// Sends a request, and the preface before the first one.
fn send(client: &mut UnixStream, stream: u8) {
    if stream == 1 {
        client.write_all(PREFACE).expect("a live socket");
        client.write_all(&[0, 0, 0, frame::SETTINGS, 0, 0, 0, 0, 0]).expect("a live socket");
    }
    client.write_all(&[0, 0, 11, frame::HEADERS, 5, 0, 0, 0, stream]).expect("a live socket");
    client.write_all(b"\x82\x87\x84\x01\x06a.test").expect("a live socket");
}

/// Leaves more than `bytes` to be sent.
fn fill(h2: &Http2Connection<ShortBody>, bytes: usize) {
    for _ in 0..=bytes / (HEAD_LEN + 8) {
        h2.sender.borrow_mut().write_frame(frame::PING, frame::ACK, 0, &[0; 8]);
    }
}

#[tokio::test]
async fn nothing_is_received_while_the_client_does_not_read() {
    let (mut client, h2) = connection();
    let woken = Arc::<CountingWaker>::default();
    let waker = Waker::from(Arc::clone(&woken));
    let mut cx = Context::from_waker(&waker);
    let mut request = Request::default();
    fill(&h2, OUT_READ_MAX);
    send(&mut client, 1);
    tokio::task::yield_now().await;
    assert!(h2.poll_request(&mut cx, &mut request).is_pending() && !h2.has_begun());
    let mut space = vec![0; 64 << 10];
    for polls in 0.. {
        let before = woken.0.load(Relaxed);
        if h2.poll_send(&mut cx).is_ready() {
            // No task waits for the socket: the task must run again.
            assert!(woken.0.load(Relaxed) > before);
            break;
        }
        assert!(polls < 1_000 && !h2.has_begun());
        while let Ok(1..) = client.read(&mut space) {}
        // The reactor sees the space.
        tokio::task::yield_now().await;
    }
    assert!(matches!(h2.poll_request(&mut cx, &mut request), Poll::Ready(Ok(_))));
}

/// The client knows the end of a response as soon as it has read it, before the task of its stream
/// is polled again.
#[tokio::test]
async fn streams_that_have_ended_do_not_count_towards_the_limit() {
    let (mut client, h2) = connection();
    let mut cx = Context::from_waker(Waker::noop());
    let mut request = Request::default();
    let mut begin = async |client: &mut UnixStream, stream: u8| {
        send(client, stream);
        tokio::task::yield_now().await;
        match h2.poll_request(&mut Context::from_waker(Waker::noop()), &mut request) {
            Poll::Ready(Ok(incoming)) => Some(incoming.handle),
            _ => None,
        }
    };
    let mut open = Vec::new();
    for number in 0..STREAMS_MAX {
        let stream = u8::try_from(2 * number + 1).expect("few streams");
        open.push(begin(&mut client, stream).await.expect("a stream within the limit"));
    }
    fill(&h2, OUT_MAX);
    for handle in &open {
        handle.begin_response(&Response::new(crate::http::message::StatusCode::OK), ShortBody(b"body"), Some(4));
        assert!(handle.poll_body(&mut cx).is_pending());
    }
    assert!(begin(&mut client, 201).await.is_none());
    let mut space = vec![0; 64 << 10];
    while h2.poll_send(&mut cx).is_pending() {
        while let Ok(1..) = client.read(&mut space) {}
        tokio::task::yield_now().await;
    }
    assert!(begin(&mut client, 203).await.is_some());
}

/// A stream of this urgency whose response has begun.
async fn begin_with_priority(
    (client, h2): (&mut UnixStream, &Rc<Http2Connection<ShortBody>>),
    stream: u8,
    urgency: u8,
) -> StreamHandle<ShortBody> {
    send(client, stream);
    tokio::task::yield_now().await;
    let mut request = Request::default();
    let polled = h2.poll_request(&mut Context::from_waker(Waker::noop()), &mut request);
    let Poll::Ready(Ok(IncomingRequest { handle, .. })) = polled else { panic!("no request") };
    handle.stream.priority.set(Priority { urgency, is_incremental: false });
    handle.stream.window.set(WINDOW_MAX);
    handle.begin_response(&Response::new(crate::http::message::StatusCode::OK), ShortBody(&[]), None);
    handle
}

/// The streams of the DATA frames in `bytes`.
fn data_streams(mut bytes: &[u8]) -> Vec<u32> {
    let mut streams = Vec::new();
    while let Some(head) = FrameHead::parse(bytes) {
        if head.kind == frame::DATA && head.length > 0 {
            streams.push(head.stream);
        }
        bytes = bytes.get(HEAD_LEN + head.length..).unwrap_or_default();
    }
    streams
}

#[tokio::test]
async fn response_in_pieces_is_not_delayed_by_less_urgent_ones() {
    const PIECE: &[u8] = &[b'u'; 8_000];
    const LARGE: &[u8] = &[b'l'; 4 << 20];
    let (mut client, h2) = connection();
    let mut cx = Context::from_waker(Waker::noop());
    let low = begin_with_priority((&mut client, &h2), 1, 6).await;
    let urgent = begin_with_priority((&mut client, &h2), 3, 1).await;
    h2.sender.borrow_mut().window = WINDOW_MAX;
    let give = |handle: &StreamHandle<ShortBody>, data| {
        let mut outgoing = handle.stream.outgoing.borrow_mut();
        outgoing.as_mut().expect("a response").body.0 = data;
    };
    give(&low, LARGE);
    let (mut received, mut space, mut pieces) = (Vec::new(), vec![0; 64 << 10], 40);
    while pieces > 0 {
        // The upstream has another piece whenever the last one was sent.
        if !urgent.is_waiting_for_client() {
            give(&urgent, PIECE);
            pieces -= 1;
        }
        for handle in [&urgent, &low] {
            assert!(handle.poll_body(&mut cx).is_pending());
        }
        let _pending_while_the_client_does_not_read = h2.poll_send(&mut cx);
        while let Ok(count @ 1..) = client.read(&mut space) {
            received.extend_from_slice(&space[..count]);
        }
        tokio::task::yield_now().await;
    }
    let streams = data_streams(&received);
    let urgent_frames = streams.iter().filter(|stream| **stream == 3).count();
    let last = streams.iter().rposition(|stream| *stream == 3).unwrap_or(0);
    let low_frames = streams[..last].iter().filter(|stream| **stream == 1).count();
    assert!(urgent_frames >= 38 && low_frames <= urgent_frames, "{urgent_frames} urgent, {low_frames} others");
}
