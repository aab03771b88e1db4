//! The origin behind the peers: one thread, one body, keep-alive and pipelining, with minimal work
//! per request.
//!
//! It responds to GET and HEAD for any target and rejects requests with a body. `/count` returns
//! the number of requests so far, without itself, which reveals cache misses. Each target has its
//! own ETag, which reveals mixed-up cache keys.

use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::servers::listen::listen;

/// Target of the counter.
pub(crate) const COUNT: &str = "/count";
/// Largest request head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Larger bodies are written directly instead of being copied behind the head.
const COPY_BYTES_MAX: usize = 64 << 10;

/// Configuration of an origin: listening address, length of all bodies, and `Cache-Control` value.
pub(crate) struct OriginConfig {
    pub(crate) listen: SocketAddr,
    pub(crate) body_bytes: usize,
    pub(crate) cache_control: String,
}

/// State of the origin, used by one thread: the prepared body and fields, the request count, and
/// the `Date` value with the time when it was formatted.
struct OriginServer {
    body: Vec<u8>,
    /// Fields that are the same in each response.
    fields: String,
    requests: Cell<u64>,
    date: RefCell<(Instant, String)>,
}

/// Parsed request head.
#[derive(Debug, PartialEq)]
struct RequestHead<'a> {
    target: &'a [u8],
    is_head: bool,
    closes: bool,
}

/// Runs until the process ends.
pub(crate) fn run(config: &OriginConfig) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listen(config.listen)?)?;
        let origin = Rc::new(OriginServer::new(config));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Probably out of descriptors: closed connections free some.
                tokio::task::yield_now().await;
                continue;
            };
            let origin = Rc::clone(&origin);
            tokio::task::spawn_local(async move {
                // A client that disconnects is not an error of the origin.
                drop(origin.serve(stream).await);
            });
        }
    })
}

/// The body of `bytes` bytes that every origin sends.
pub(crate) fn body(bytes: usize) -> Vec<u8> {
    (b'a'..=b'z').cycle().zip(0..bytes).map(|(letter, at)| if at % 27 == 26 { b'\n' } else { letter }).collect()
}

/// The entity tag of a target, with quotes.
pub(crate) fn etag(target: &[u8]) -> String {
    // FNV-1a: short, and used by the origin and by the response check.
    let hash = target
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("\"{hash:016x}\"")
}

impl OriginServer {
    fn new(config: &OriginConfig) -> Self {
        OriginServer {
            body: body(config.body_bytes),
            fields: format!(
                "Content-Type: text/plain\r\nContent-Length: {}\r\nCache-Control: {}\r\n",
                config.body_bytes, config.cache_control
            ),
            requests: Cell::new(0),
            date: RefCell::new((Instant::now(), httpdate::fmt_http_date(SystemTime::now()))),
        }
    }

    /// Serves one connection until either side closes it.
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut inbox = Vec::with_capacity(16 << 10);
        let mut outbox = Vec::with_capacity(4 << 10);
        loop {
            let mut used = 0;
            while let Some(length) = memmem::find(&inbox[used..], b"\r\n\r\n") {
                let head = &inbox[used..used + length];
                used += length + 4;
                let Some(request) = parse(head) else {
                    outbox.extend_from_slice(
                        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    );
                    return stream.write_all(&outbox).await;
                };
                self.respond(&request, &mut stream, &mut outbox).await?;
                if request.closes {
                    return stream.write_all(&outbox).await;
                }
            }
            inbox.drain(..used);
            if !outbox.is_empty() {
                stream.write_all(&outbox).await?;
                outbox.clear();
            }
            if inbox.len() > HEAD_BYTES_MAX || stream.read_buf(&mut inbox).await? == 0 {
                return Ok(());
            }
        }
    }

    /// Appends the response to `outbox`; writes a large body at once.
    async fn respond(&self, request: &RequestHead<'_>, stream: &mut TcpStream, outbox: &mut Vec<u8>) -> io::Result<()> {
        if request.target == COUNT.as_bytes() {
            let count = self.requests.get().to_string();
            let length = count.len();
            let head = format!("HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: {length}\r\n\r\n");
            outbox.extend_from_slice(head.as_bytes());
            outbox.extend_from_slice(count.as_bytes());
            return Ok(());
        }
        self.requests.set(self.requests.get() + 1);
        self.head(request.target, outbox)?;
        match (request.is_head, self.body.len() > COPY_BYTES_MAX) {
            (true, _) => {}
            (false, false) => outbox.extend_from_slice(&self.body),
            (false, true) => {
                stream.write_all(outbox).await?;
                outbox.clear();
                stream.write_all(&self.body).await?;
            }
        }
        Ok(())
    }

    fn head(&self, target: &[u8], outbox: &mut Vec<u8>) -> io::Result<()> {
        let mut date = self.date.borrow_mut();
        if date.0.elapsed() >= Duration::from_secs(1) {
            *date = (Instant::now(), httpdate::fmt_http_date(SystemTime::now()));
        }
        write!(outbox, "HTTP/1.1 200 OK\r\n{}Date: {}\r\nETag: {}\r\n\r\n", self.fields, date.1, etag(target))
    }
}

/// Parses a request head without its final two line ends. `None`: the origin does not support the
/// request.
fn parse(head: &[u8]) -> Option<RequestHead<'_>> {
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
    let mut words = lines.next()?.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if !matches!(method, b"GET" | b"HEAD") || version != b"HTTP/1.1" || words.next().is_some() {
        return None;
    }
    let mut request = RequestHead { target, is_head: method == b"HEAD", closes: false };
    for line in lines {
        let colon = memchr::memchr(b':', line)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"connection") {
            request.closes |= value.eq_ignore_ascii_case(b"close");
        } else if name.eq_ignore_ascii_case(b"transfer-encoding")
            || (name.eq_ignore_ascii_case(b"content-length") && value != b"0")
        {
            return None;
        }
    }
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_other_than_get_and_head_without_body_are_rejected() {
        for head in [
            "",
            "GET /",
            "GET / HTTP/1.0",
            "POST / HTTP/1.1\r\nHost: a",
            "GET / HTTP/1.1\r\nContent-Length: 3",
            "GET / HTTP/1.1\r\nTransfer-Encoding: chunked",
            "GET / HTTP/1.1\r\nno colon",
            "GET / x HTTP/1.1",
        ] {
            assert_eq!(parse(head.as_bytes()), None, "{head}");
        }
    }

    #[test]
    fn head_is_parsed_into_target_method_and_close() {
        let request = |target, is_head, closes| Some(RequestHead { target, is_head, closes });
        assert_eq!(parse(b"GET /a?b HTTP/1.1\r\nHost: x"), request(b"/a?b".as_slice(), false, false));
        assert_eq!(parse(b"HEAD / HTTP/1.1\r\nconnection:  Close"), request(b"/".as_slice(), true, true));
        assert_eq!(parse(b"GET / HTTP/1.1\r\nContent-Length: 0"), request(b"/".as_slice(), false, false));
    }

    #[test]
    fn bodies_have_their_length_and_targets_their_etag() {
        assert_eq!((body(0).len(), body(1_024).len()), (0, 1_024));
        assert_eq!(body(29), b"abcdefghijklmnopqrstuvwxyz\nbc");
        assert_ne!(etag(b"/hit/1"), etag(b"/hit/2"));
    }

    #[tokio::test]
    async fn pipelined_requests_get_responses_in_order_and_are_counted() {
        let config = OriginConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            body_bytes: 3,
            cache_control: "max-age=1".to_owned(),
        };
        let origin = OriginServer::new(&config);
        let listener = TcpListener::bind(config.listen).await.expect("a free port");
        let mut client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("a connection");
        let (stream, _) = listener.accept().await.expect("a connection");
        client
            .write_all(
                b"GET /a HTTP/1.1\r\n\r\nHEAD /b HTTP/1.1\r\n\r\nGET /count HTTP/1.1\r\nConnection: close\r\n\r\n",
            )
            .await
            .expect("room");
        origin.serve(stream).await.expect("a clean end");
        let mut responses = String::new();
        client.read_to_string(&mut responses).await.expect("text");
        let parts: Vec<&str> = responses.split("\r\n\r\n").collect();
        assert_eq!(parts.len(), 4, "{responses}");
        assert!(parts[0].contains(&etag(b"/a")) && parts[0].contains("Cache-Control: max-age=1"), "{responses}");
        assert!(parts[1].starts_with("abcHTTP/1.1 200 OK") && parts[1].contains(&etag(b"/b")), "{responses}");
        assert_eq!(parts[3], "2");
    }
}
