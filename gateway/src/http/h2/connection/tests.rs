//! The receiving side stops while the client does not read, and continues.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Wake, Waker};

use tokio::net::TcpStream;

use super::*;

/// Counts how often it was woken.
#[derive(Default)]
struct CountingWaker(AtomicUsize);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// No response has a body.
struct EmptyBody;

impl BodySource for EmptyBody {
    fn poll_fill(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &[]
    }

    fn consume(&mut self, _count: usize) {}
}

fn connection() -> (UnixStream, Rc<Http2Connection<EmptyBody>>) {
    let (client, server) = UnixStream::pair().expect("sockets");
    [&client, &server].into_iter().for_each(|socket| socket.set_nonblocking(true).expect("a live socket"));
    // The engine uses calls that every stream socket has.
    let server = std::net::TcpStream::from(std::os::fd::OwnedFd::from(server));
    let io = TransportStream::plain(TcpStream::from_std(server).expect("a runtime"));
    (client, Http2Connection::new(io, IpAddr::V4(Ipv4Addr::LOCALHOST), HttpLimits::default()))
}

#[tokio::test]
async fn nothing_is_received_while_the_client_does_not_read() {
    let (mut client, h2) = connection();
    let woken = Arc::<CountingWaker>::default();
    let waker = Waker::from(Arc::clone(&woken));
    let mut cx = Context::from_waker(&waker);
    let mut request = Request::default();
    for _ in 0..=OUT_READ_MAX / (HEAD_LEN + 8) {
        h2.sender.borrow_mut().write_frame(frame::PING, frame::ACK, 0, &[0; 8]);
    }
    client.write_all(PREFACE).expect("a live socket");
    client.write_all(&[0, 0, 0, frame::SETTINGS, 0, 0, 0, 0, 0]).expect("a live socket");
    client.write_all(b"\0\0\x0b\x01\x05\0\0\0\x01\x82\x87\x84\x01\x06a.test").expect("a live socket");
    tokio::task::yield_now().await;
    assert!(h2.poll_request(&mut cx, &mut request).is_pending() && !h2.has_begun());
    let mut space = vec![0; 64 << 10];
    for polls in 0.. {
        let before = woken.0.load(Relaxed);
        if h2.poll_send(&mut cx).is_ready() {
            // Nobody waits for the socket: the task must run again.
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
