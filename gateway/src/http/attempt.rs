//! One exchange with an upstream as its caller sees it, whichever protocol the connection speaks:
//! what is sent, within which time, and why it failed.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use super::body::{BodyError, BodySource};
use super::exchange_clock::{Blame, ExchangeTimeout, ExchangeTimeouts};
use super::message::{Request, Response};
use super::tls_fault::TlsFault;
use crate::label;
use crate::metrics::Label as _;

/// Maximum interim (1xx) responses before the final response. A server may send any number (RFC
/// 9110 section 15.2), and reports progress by them (102, 104): this is one in a tenth of a second
/// within the default time for the head. More are those of a server in a loop, each of which costs
/// as much as a response. Their memory is bounded where they wait.
pub(super) const INTERIM_MAX: usize = 99;
/// A client that has sent nothing of its body for this long has stopped: more than a round trip
/// with a retransmission takes on a slow network, less than servers wait for a body.
pub(super) const CLIENT_STOPPED: Duration = Duration::from_millis(500);

/// Why an exchange with an upstream failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamConnectionError {
    #[error("connection refused or unreachable")]
    Connect(#[source] io::Error),
    /// The connection was opened and has ended before it could carry a request, or the server
    /// allows no exchange on it.
    #[error("closed before a request")]
    Ended(#[source] io::Error),
    /// No endpoint has an address: its name is not resolved.
    #[error("no address is known")]
    NoAddress,
    /// The source of the endpoints has answered that there is none.
    #[error("there is no endpoint")]
    NoEndpoints,
    /// TLS failed, in the handshake or after it.
    #[error("TLS failed: {}", .0.as_str())]
    Tls(TlsFault, #[source] io::Error),
    /// The connection ended before the first byte of a response. The server may have closed an idle
    /// connection.
    #[error("closed before a response")]
    NoResponse(#[source] io::Error),
    /// The server has said that it did not process the request: it refused the stream, or it ends
    /// the connection without it (RFC 9113 sections 6.8 and 8.7).
    #[error("not processed by the upstream")]
    Refused(#[source] io::Error),
    /// The server has reset the stream of the request before the first byte of a response.
    #[error("reset before a response")]
    Reset(#[source] io::Error),
    #[error("connection failed inside the response head")]
    Io(#[source] io::Error),
    #[error("malformed response: {0}")]
    Malformed(&'static str),
    #[error("no response in time: {}", .0.as_str())]
    Timeout(ExchangeTimeout),
    /// As `NoResponse`, while the client owed bytes of its request and had sent none for
    /// `CLIENT_STOPPED`: the upstream has given up waiting for it.
    #[error("closed before a response, because the client stopped in its request")]
    ClientStopped(#[source] io::Error),
    /// Reading the client's request body failed.
    #[error("client failed")]
    Client(#[source] BodyError),
    #[error("client went away")]
    ClientGone,
    /// The protocol of the connection cannot carry this part of the request.
    #[error("the protocol cannot carry the request: {0}")]
    Unsendable(&'static str),
}

label! {
    /// Why an attempt or a connection of a call failed, in spans.
    pub(crate) AttemptErrorClass, "error.type", {
        Connect = "connect",
        NoAddress = "no_address",
        NoEndpoints = "no_endpoints",
        Tls = "tls",
        NoResponse = "no_response",
        Refused = "refused",
        Reset = "reset",
        Truncated = "truncated",
        Malformed = "malformed",
        Timeout = "timeout",
        Client = "client",
        /// Another connection was faster.
        Abandoned = "abandoned",
    }
}

impl UpstreamConnectionError {
    /// The class of the error, for spans.
    pub(crate) fn class(&self) -> AttemptErrorClass {
        match self {
            UpstreamConnectionError::Connect(_) => AttemptErrorClass::Connect,
            UpstreamConnectionError::NoAddress => AttemptErrorClass::NoAddress,
            UpstreamConnectionError::NoEndpoints => AttemptErrorClass::NoEndpoints,
            UpstreamConnectionError::Tls(..) => AttemptErrorClass::Tls,
            UpstreamConnectionError::Ended(_) | UpstreamConnectionError::NoResponse(_) => AttemptErrorClass::NoResponse,
            UpstreamConnectionError::Refused(_) => AttemptErrorClass::Refused,
            UpstreamConnectionError::Reset(_) => AttemptErrorClass::Reset,
            UpstreamConnectionError::Io(_) => AttemptErrorClass::Truncated,
            UpstreamConnectionError::Malformed(_) => AttemptErrorClass::Malformed,
            UpstreamConnectionError::Timeout(_) => AttemptErrorClass::Timeout,
            UpstreamConnectionError::ClientStopped(_)
            | UpstreamConnectionError::Client(_)
            | UpstreamConnectionError::ClientGone
            | UpstreamConnectionError::Unsendable(_) => AttemptErrorClass::Client,
        }
    }

    /// The side to blame.
    pub(crate) fn blame(&self) -> Blame {
        match self {
            UpstreamConnectionError::Connect(_)
            | UpstreamConnectionError::Ended(_)
            | UpstreamConnectionError::NoAddress
            | UpstreamConnectionError::NoEndpoints
            | UpstreamConnectionError::Tls(..)
            | UpstreamConnectionError::NoResponse(_)
            | UpstreamConnectionError::Refused(_)
            | UpstreamConnectionError::Reset(_)
            | UpstreamConnectionError::Io(_)
            | UpstreamConnectionError::Malformed(_) => Blame::Upstream,
            UpstreamConnectionError::Timeout(timeout) => timeout.blame(),
            UpstreamConnectionError::ClientStopped(_)
            | UpstreamConnectionError::Client(_)
            | UpstreamConnectionError::ClientGone
            | UpstreamConnectionError::Unsendable(_) => Blame::Client,
        }
    }
}

/// One exchange as its caller sees it: what is sent and within which time, and the response head
/// that it fills.
pub(crate) struct UpstreamAttempt<'r> {
    pub(crate) request: &'r Request,
    pub(crate) body: &'r mut dyn BodySource,
    pub(crate) response: &'r mut Response,
    pub(crate) timeouts: ExchangeTimeouts,
    /// The end of the whole exchange, all attempts included; `None` without a limit.
    pub(crate) total_at: Option<Instant>,
    /// Called when the upstream has the whole request.
    pub(crate) on_request_sent: &'r dyn Fn(),
}

/// Progress of sending the current request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestState {
    Sending,
    /// The upstream has the whole request.
    Sent,
    /// The upstream accepts no more of it. A response may still arrive.
    Refused,
    /// The client failed.
    ClientFailed,
}

/// Whether a `Content-Type` is that of server-sent events.
pub(super) fn is_event_stream(content_type: &[u8]) -> bool {
    const TYPE: &[u8] = b"text/event-stream";
    let end = content_type.iter().position(|byte| *byte == b';').unwrap_or(content_type.len());
    content_type[..end].trim_ascii().eq_ignore_ascii_case(TYPE)
}
