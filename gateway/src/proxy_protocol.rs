//! The PROXY protocol, versions 1 and 2 (HAProxy's `proxy-protocol.txt`): a header at the start of
//! a connection in which a proxy reports its client's address.
//!
//! The header is peeked at and consumed to its last byte, so the bytes that follow it stay in the
//! socket, for TLS or HTTP. Invariants: nothing is consumed unless the header is complete and
//! valid, and it is read only from peers that may send one, which is the caller's decision.

mod parser;

use std::io;
use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::event::Event;
use crate::label;
use crate::metrics::{self, Counters, Label as _};
use parser::{HEADER_BYTES_MAX, HeaderFault, ParsedHeader};

pub(crate) use parser::ProxiedClient;

/// Whether the connections of a listener begin with a header (`listen.proxy_protocol`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ProxyProtocolMode {
    /// The bytes of a header are an ordinary request, which is malformed.
    #[default]
    Off,
    /// Trusted proxies may send a header. From others its bytes are an ordinary request.
    Optional,
    /// Only trusted proxies may connect, and each connection begins with a header.
    Required,
}

label! {
    /// Why a connection was closed before its first byte of TLS or HTTP.
    pub(crate) ProxyHeaderRefusal, "reason", {
        /// The peer is not a trusted proxy.
        Untrusted = "untrusted",
        /// The connection does not begin with a header.
        Missing = "missing",
        Malformed = "malformed",
        /// The header is longer than the bound.
        TooLong = "too_long",
        /// The CRC-32C of a version 2 header does not match.
        Checksum = "checksum",
        /// The header was not complete in time.
        Timeout = "timeout",
        /// The connection ended or failed inside the header.
        Closed = "closed",
    }
}

static REFUSALS: LazyLock<Counters<ProxyHeaderRefusal>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(crate) fn expose() {
    metrics::expose_counters(
        "tidegate_proxy_protocol_refused",
        "Connections closed because of a missing, invalid or untrusted PROXY protocol header.",
        &REFUSALS,
    );
}

impl ProxyHeaderRefusal {
    /// Counts and logs the refusal of a connection from `peer`.
    pub(crate) fn report(self, peer: IpAddr) {
        REFUSALS.inc(self);
        match self {
            // Load balancers probe a port by a connection without a byte.
            ProxyHeaderRefusal::Timeout | ProxyHeaderRefusal::Closed => {
                tracing::debug!(reason = self.as_str(), %peer, "no PROXY protocol header");
            }
            _ => Event::ProxyHeaderRefused { reason: self.as_str(), peer }.emit(),
        }
    }
}

/// Reads a header within `deadline`; `None` if the connection begins with other bytes, none of
/// which is consumed. Cancel safe.
pub(crate) async fn read_header(
    stream: &TcpStream,
    deadline: Duration,
) -> Result<Option<ProxiedClient>, ProxyHeaderRefusal> {
    let (length, client) = match timeout(deadline, peek_header(stream)).await {
        Err(_elapsed) => return Err(ProxyHeaderRefusal::Timeout),
        Ok(Err(_failed)) => return Err(ProxyHeaderRefusal::Closed),
        Ok(Ok(Err(fault))) => return Err(fault.into()),
        Ok(Ok(Ok(ParsedHeader::Incomplete))) => return Err(ProxyHeaderRefusal::Closed),
        Ok(Ok(Ok(ParsedHeader::Absent))) => return Ok(None),
        Ok(Ok(Ok(ParsedHeader::Complete { length, client }))) => (length, client),
    };
    // All of it is in the socket: one call consumes it.
    let mut consumed = [0; HEADER_BYTES_MAX];
    match recv(stream, &mut consumed[..length], RecvFlags::DONTWAIT) {
        Ok((_, count)) if count == length => Ok(Some(client)),
        _ => Err(ProxyHeaderRefusal::Closed),
    }
}

/// Waits until the socket holds a whole header or shows that there is none. `Incomplete`: the peer
/// sends no more.
async fn peek_header(stream: &TcpStream) -> io::Result<Result<ParsedHeader, HeaderFault>> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let peeked = stream.try_io(Interest::READABLE, || {
            // On the stack of the call: it is not part of the task.
            let mut bytes = [0; HEADER_BYTES_MAX];
            let (_, count) = recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
            match parser::parse(&bytes[..count]) {
                // The next packet makes the socket readable again.
                Ok(ParsedHeader::Incomplete) if count > 0 && !ready.is_read_closed() => {
                    Err(io::ErrorKind::WouldBlock.into())
                }
                parsed => Ok(parsed),
            }
        });
        match peeked {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            peeked => return peeked,
        }
    }
}

/// The parser of headers, for fuzz targets and tests.
#[doc(hidden)]
pub mod header {
    use super::parser::{self, ParsedHeader};

    /// The start of a connection.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum HeaderStart {
        Absent,
        Incomplete,
        /// Its length, and the client in text form.
        Complete(usize, String),
        Refused,
    }

    pub fn parse(bytes: &[u8]) -> HeaderStart {
        match parser::parse(bytes) {
            Ok(ParsedHeader::Absent) => HeaderStart::Absent,
            Ok(ParsedHeader::Incomplete) => HeaderStart::Incomplete,
            Ok(ParsedHeader::Complete { length, client }) => HeaderStart::Complete(length, format!("{client:?}")),
            Err(_fault) => HeaderStart::Refused,
        }
    }
}

impl From<HeaderFault> for ProxyHeaderRefusal {
    fn from(fault: HeaderFault) -> Self {
        match fault {
            HeaderFault::Malformed => ProxyHeaderRefusal::Malformed,
            HeaderFault::TooLong => ProxyHeaderRefusal::TooLong,
            HeaderFault::Checksum => ProxyHeaderRefusal::Checksum,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);
    const HEADER: &[u8] = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 443\r\n";

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("listening");
        client.set_nodelay(true).expect("open");
        (client, listener.accept().await.expect("connected").0)
    }

    fn client() -> ProxiedClient {
        ProxiedClient::Address(SocketAddr::from(([192, 0, 2, 1], 1000)))
    }

    #[tokio::test]
    async fn header_in_single_bytes_is_read_and_the_rest_stays() {
        let (mut client_end, mut stream) = connection().await;
        let send = async {
            for byte in HEADER {
                client_end.write_all(&[*byte]).await.expect("open");
                tokio::task::yield_now().await;
            }
            client_end.write_all(b"GET").await.expect("open");
        };
        let (read, ()) = tokio::join!(read_header(&stream, TIMEOUT), send);
        assert_eq!(read, Ok(Some(client())));
        let mut rest = [0; 3];
        stream.read_exact(&mut rest).await.expect("the rest");
        assert_eq!(&rest, b"GET");
    }

    #[tokio::test]
    async fn other_bytes_are_not_consumed() {
        let (mut client_end, mut stream) = connection().await;
        client_end.write_all(b"POST /").await.expect("open");
        assert_eq!(read_header(&stream, TIMEOUT).await, Ok(None));
        let mut rest = [0; 6];
        stream.read_exact(&mut rest).await.expect("all of it");
        assert_eq!(&rest, b"POST /");
    }

    #[tokio::test]
    async fn end_inside_a_header_and_silence_are_refused() {
        for sent in [&b""[..], b"PROX", &HEADER[..HEADER.len() - 1], b"\r\n\r\n\0\r\nQUIT\n\x21"] {
            let (mut client_end, stream) = connection().await;
            client_end.write_all(sent).await.expect("open");
            let short = Duration::from_millis(30);
            assert_eq!(read_header(&stream, short).await, Err(ProxyHeaderRefusal::Timeout), "{sent:?}");
            client_end.shutdown().await.expect("open");
            assert_eq!(read_header(&stream, TIMEOUT).await, Err(ProxyHeaderRefusal::Closed), "{sent:?}");
        }
    }
}
