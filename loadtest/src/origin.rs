//! The origin behind the peers: one thread, one body, keep-alive and pipelining, as little work per request as possible.
//!
//! It answers GET and HEAD for any target and refuses requests with a body. `/count` tells how many requests were answered, itself
//! not counted, so that a cache can be caught asking. Each target has an ETag of its own: a mixed-up key shows.

use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::listen::listen;

/// Target of the counter.
pub(crate) const COUNT: &str = "/count";
/// What has not become a request after this many bytes never will.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Larger bodies are written from where they are instead of being copied behind the head.
const COPY_BYTES_MAX: usize = 64 << 10;

/// What an origin answers with.
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) body_bytes: usize,
    pub(crate) cache_control: String,
}

struct Origin {
    body: Vec<u8>,
    /// The fields that are the same in each answer.
    fields: String,
    answered: Cell<u64>,
    date: RefCell<(Instant, String)>,
}

/// What the head of one request asks for.
#[derive(Debug, PartialEq)]
struct Asked<'a> {
    target: &'a [u8],
    is_head: bool,
    closes: bool,
}

/// Runs until the process ends.
pub(crate) fn run(settings: &Settings) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listen(settings.listen)?)?;
        let origin = Rc::new(Origin::new(settings));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of descriptors, most likely: connections that end make room.
                tokio::task::yield_now().await;
                continue;
            };
            let origin = Rc::clone(&origin);
            tokio::task::spawn_local(async move {
                // A client that goes away in the middle is no concern of the origin.
                drop(origin.serve(stream).await);
            });
        }
    })
}

/// The body of `bytes` bytes that every origin sends.
pub(crate) fn body(bytes: usize) -> Vec<u8> {
    (b'a'..=b'z').cycle().zip(0..bytes).map(|(letter, at)| if at % 27 == 26 { b'\n' } else { letter }).collect()
}

/// The entity tag of a target, in its quotes.
pub(crate) fn etag(target: &[u8]) -> String {
    // FNV-1a: short, and the same in the origin and in whoever checks its answers.
    let hash = target
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("\"{hash:016x}\"")
}

impl Origin {
    fn new(settings: &Settings) -> Self {
        Origin {
            body: body(settings.body_bytes),
            fields: format!(
                "Content-Type: text/plain\r\nContent-Length: {}\r\nCache-Control: {}\r\n",
                settings.body_bytes, settings.cache_control
            ),
            answered: Cell::new(0),
            date: RefCell::new((Instant::now(), httpdate::fmt_http_date(SystemTime::now()))),
        }
    }

    /// Serves one connection until either side ends it.
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut inbox = Vec::with_capacity(16 << 10);
        let mut outbox = Vec::with_capacity(4 << 10);
        loop {
            let mut used = 0;
            while let Some(length) = memmem::find(&inbox[used..], b"\r\n\r\n") {
                let head = &inbox[used..used + length];
                used += length + 4;
                let Some(asked) = parse(head) else {
                    outbox.extend_from_slice(
                        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    );
                    return stream.write_all(&outbox).await;
                };
                self.answer(&asked, &mut stream, &mut outbox).await?;
                if asked.closes {
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

    /// Puts the answer into `outbox`; a large body goes out at once.
    async fn answer(&self, asked: &Asked<'_>, stream: &mut TcpStream, outbox: &mut Vec<u8>) -> io::Result<()> {
        if asked.target == COUNT.as_bytes() {
            let count = self.answered.get().to_string();
            let length = count.len();
            let head = format!("HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: {length}\r\n\r\n");
            outbox.extend_from_slice(head.as_bytes());
            outbox.extend_from_slice(count.as_bytes());
            return Ok(());
        }
        self.answered.set(self.answered.get() + 1);
        self.head(asked.target, outbox)?;
        match (asked.is_head, self.body.len() > COPY_BYTES_MAX) {
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

/// Reads a request's head, without its last two line ends. `None`: not a request this origin answers.
fn parse(head: &[u8]) -> Option<Asked<'_>> {
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
    let mut words = lines.next()?.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if !matches!(method, b"GET" | b"HEAD") || version != b"HTTP/1.1" || words.next().is_some() {
        return None;
    }
    let mut asked = Asked { target, is_head: method == b"HEAD", closes: false };
    for line in lines {
        let colon = memchr::memchr(b':', line)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"connection") {
            asked.closes |= value.eq_ignore_ascii_case(b"close");
        } else if name.eq_ignore_ascii_case(b"transfer-encoding")
            || (name.eq_ignore_ascii_case(b"content-length") && value != b"0")
        {
            return None;
        }
    }
    Some(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_bodyless_get_is_refused() {
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
    fn a_head_tells_target_method_and_close() {
        let asked = |target, is_head, closes| Some(Asked { target, is_head, closes });
        assert_eq!(parse(b"GET /a?b HTTP/1.1\r\nHost: x"), asked(b"/a?b".as_slice(), false, false));
        assert_eq!(parse(b"HEAD / HTTP/1.1\r\nconnection:  Close"), asked(b"/".as_slice(), true, true));
        assert_eq!(parse(b"GET / HTTP/1.1\r\nContent-Length: 0"), asked(b"/".as_slice(), false, false));
    }

    #[test]
    fn bodies_have_their_length_and_targets_their_tag() {
        assert_eq!((body(0).len(), body(1_024).len()), (0, 1_024));
        assert_eq!(body(29), b"abcdefghijklmnopqrstuvwxyz\nbc");
        assert_ne!(etag(b"/hit/1"), etag(b"/hit/2"));
    }

    #[tokio::test]
    async fn pipelined_requests_are_answered_in_order_and_counted() {
        let settings = Settings {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            body_bytes: 3,
            cache_control: "max-age=1".to_owned(),
        };
        let origin = Origin::new(&settings);
        let listener = TcpListener::bind(settings.listen).await.expect("a free port");
        let mut client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("a connection");
        let (stream, _) = listener.accept().await.expect("a connection");
        client
            .write_all(
                b"GET /a HTTP/1.1\r\n\r\nHEAD /b HTTP/1.1\r\n\r\nGET /count HTTP/1.1\r\nConnection: close\r\n\r\n",
            )
            .await
            .expect("room");
        origin.serve(stream).await.expect("a clean end");
        let mut answers = String::new();
        client.read_to_string(&mut answers).await.expect("text");
        let parts: Vec<&str> = answers.split("\r\n\r\n").collect();
        assert_eq!(parts.len(), 4, "{answers}");
        assert!(parts[0].contains(&etag(b"/a")) && parts[0].contains("Cache-Control: max-age=1"), "{answers}");
        assert!(parts[1].starts_with("abcHTTP/1.1 200 OK") && parts[1].contains(&etag(b"/b")), "{answers}");
        assert_eq!(parts[3], "2");
    }
}
