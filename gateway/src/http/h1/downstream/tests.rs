//! The clocks of a client run only while the gateway waits for it to send or to accept bytes.

use std::collections::VecDeque;
use std::pin::Pin;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, advance, sleep};

use super::*;

const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
const SECOND: Duration = Duration::from_secs(1);
/// More bytes than the socket buffers of a connection hold.
const LARGE: usize = 64 << 20;

fn limits(body_rate: u32) -> HttpLimits {
    HttpLimits { idle_timeout: IDLE_TIMEOUT, body_rate, body_bytes: u64::MAX, ..HttpLimits::default() }
}

/// A connection and its client.
async fn connection(limits: &HttpLimits) -> (DownstreamConnection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("listening");
    let (stream, _) = listener.accept().await.expect("connected");
    (DownstreamConnection::new(TransportStream::plain(stream), limits), client)
}

/// Reads the head of the request that `client` sends.
async fn receive(connection: &mut DownstreamConnection, client: &mut TcpStream, request: &str) {
    client.write_all(request.as_bytes()).await.expect("connected");
    connection.read_request(&limits(0), &mut Request::default()).await.expect("a valid head");
}

/// A body of pieces, each of which is available only after a pause.
#[derive(Default)]
struct PausingBody {
    pieces: VecDeque<(Duration, usize)>,
    pause: Option<Pin<Box<Sleep>>>,
    piece: Vec<u8>,
    consumed: usize,
}

impl PausingBody {
    fn new(pieces: impl IntoIterator<Item = (u64, usize)>) -> Self {
        let pieces = pieces.into_iter().map(|(pause, bytes)| (Duration::from_secs(pause), bytes)).collect();
        PausingBody { pieces, ..PausingBody::default() }
    }
}

impl BodySource for PausingBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.data().is_empty()
            && let Some(&(pause, bytes)) = self.pieces.front()
        {
            ready!(self.pause.get_or_insert_with(|| Box::pin(sleep(pause))).as_mut().poll(cx));
            self.pause = None;
            self.pieces.pop_front();
            (self.piece, self.consumed) = (vec![b'x'; bytes], 0);
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &self.piece[self.consumed..]
    }

    fn consume(&mut self, count: usize) {
        self.consumed += count;
    }
}

fn streamed() -> Response {
    Response { length: BodyLength::Streamed, ..Response::new(StatusCode::OK) }
}

#[tokio::test(start_paused = true)]
async fn pause_of_the_source_does_not_count_against_the_client() {
    // A rate that any counted second would break.
    for body_rate in [0, 1 << 30] {
        let (mut connection, mut client) = connection(&limits(body_rate)).await;
        receive(&mut connection, &mut client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let start = Instant::now();
        let mut body = PausingBody::new([(4, 10), (0, 10), (30, 10), (600, 10)]);
        let sent = connection.exchange().1.send(&streamed(), &mut body).await;
        assert!(sent.is_ok() && start.elapsed().as_secs() == 634, "{sent:?} after {:?}", start.elapsed());
        assert!(connection.drain_for_reuse().await);
    }
}

#[tokio::test(start_paused = true)]
async fn client_that_does_not_read_is_timed_out_from_the_first_blocked_write() {
    for pause in [0, 4] {
        let (mut connection, mut client) = connection(&limits(0)).await;
        receive(&mut connection, &mut client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let start = Instant::now();
        let mut body = PausingBody::new([(0, 10), (pause, LARGE)]);
        let sent = connection.exchange().1.send(&streamed(), &mut body).await;
        assert!(matches!(sent, Err(SendError::Timeout(ExchangeTimeout::ClientRead))), "{sent:?}");
        assert_eq!(start.elapsed().as_secs(), pause + IDLE_TIMEOUT.as_secs());
    }
}

#[tokio::test(start_paused = true)]
async fn idle_time_starts_anew_after_the_client_has_accepted_everything() {
    let (mut connection, mut client) = connection(&limits(0)).await;
    receive(&mut connection, &mut client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let reading = async {
        // Blocked for most of the idle time, then read to the end, in which another pause begins.
        sleep(IDLE_TIMEOUT - Duration::from_millis(100)).await;
        tokio::io::copy(&mut client, &mut tokio::io::sink()).await.expect("no reset")
    };
    let mut body = PausingBody::new([(0, LARGE), (4, 10), (4, 10)]);
    let sending = async {
        let sent = connection.exchange().1.send(&streamed(), &mut body).await;
        connection.close().await;
        sent
    };
    let (read, sent) = tokio::join!(reading, sending);
    assert!(sent.is_ok() && read > LARGE as u64, "{sent:?}, {read} bytes");
}

const POST: &str = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n";

/// Waits for body bytes and returns their number and the seconds waited.
async fn fill(connection: &mut DownstreamConnection) -> (Result<usize, BodyError>, u64) {
    let start = Instant::now();
    let (mut body, _) = connection.exchange();
    let filled = poll_fn(|cx| body.poll_fill(cx)).await.map(|()| body.data().len());
    (filled, start.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn unread_body_bytes_do_not_count_against_the_client() {
    // The upstream does not accept bytes: the gateway does not read. Neither clock runs.
    let (mut connection, mut client) = connection(&limits(100)).await;
    receive(&mut connection, &mut client, POST).await;
    advance(100 * SECOND).await;
    client.write_all(&[b'x'; 300]).await.expect("connected");
    assert!(matches!(fill(&mut connection).await, (Ok(300), 0)));
    advance(100 * SECOND).await;
    connection.exchange().0.consume(300);
    advance(100 * SECOND).await;
    // From here on the gateway waits for the client.
    let (filled, waited) = fill(&mut connection).await;
    assert!(matches!(filled, Err(BodyError::Timeout(_))) && waited == IDLE_TIMEOUT.as_secs(), "{filled:?} {waited}");
}

#[tokio::test(start_paused = true)]
async fn bytes_before_the_first_wait_count_towards_the_rate() {
    // 10,000 bytes at 1,000 per second: the average allows 10 s of waiting, beyond the grace time.
    let (mut connection, mut client) = connection(&HttpLimits { idle_timeout: 60 * SECOND, ..limits(1_000) }).await;
    receive(&mut connection, &mut client, &POST.replace("1000", "20000")).await;
    client.write_all(&[b'x'; 10_000]).await.expect("connected");
    assert!(matches!(fill(&mut connection).await, (Ok(10_000), 0)));
    connection.exchange().0.consume(10_000);
    let (filled, waited) = fill(&mut connection).await;
    assert!(matches!(filled, Err(BodyError::Timeout(_))) && waited == 20, "{filled:?} {waited}");
}

#[tokio::test(start_paused = true)]
async fn body_is_awaited_only_after_100_continue_was_sent() {
    let (mut connection, mut client) = connection(&limits(100)).await;
    receive(&mut connection, &mut client, &POST.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n")).await;
    advance(100 * SECOND).await;
    let reading = async {
        let mut interim = [0; 25];
        client.read_exact(&mut interim).await.expect("no reset");
        client.write_all(&[b'x'; 1_000]).await.expect("connected");
        interim
    };
    let (interim, filled) = tokio::join!(reading, fill(&mut connection));
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    assert!(matches!(filled, (Ok(1_000), 0)), "{filled:?}");
}

#[tokio::test(start_paused = true)]
async fn lingering_connection_ends_after_silence_and_at_the_latest_after_the_linger_time() {
    let (mut connection, client) = connection(&limits(0)).await;
    let start = Instant::now();
    connection.close().await;
    assert_eq!(start.elapsed(), LINGER_IDLE_TIMEOUT);
    drop(client);
    // A byte in time, again and again, does not extend it beyond the limit.
    let (mut connection, mut client) = self::connection(&limits(0)).await;
    let start = Instant::now();
    let sending = async {
        loop {
            sleep(LINGER_IDLE_TIMEOUT / 2).await;
            client.write_all(b"x").await.expect("open");
        }
    };
    tokio::select! {
        () = connection.close() => {}
        () = sending => {}
    }
    assert_eq!(start.elapsed(), LINGER_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn unread_body_is_drained_for_reuse_only_within_its_bounds() {
    for (length, sent, is_reusable, waited) in [
        (1_000, 1_000, true, Duration::ZERO),
        (1_000, 999, false, DRAIN_TIMEOUT),
        (DRAIN_MAX + 1, 0, false, Duration::ZERO),
    ] {
        let (mut connection, mut client) = connection(&limits(0)).await;
        receive(&mut connection, &mut client, &POST.replace("1000", &length.to_string())).await;
        client.write_all(&vec![b'x'; sent]).await.expect("connected");
        let start = Instant::now();
        assert_eq!((connection.drain_for_reuse().await, start.elapsed()), (is_reusable, waited), "{length} {sent}");
    }
}
