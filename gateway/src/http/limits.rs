//! Limits on client requests: sizes and timeouts, enforced while reading and before anything is
//! forwarded.

use std::sync::Arc;
use std::time::Duration;

use super::message::{BodyLength, Method};
use super::target::PathRules;

/// Limits of one message and of one connection (`[limits_http]`).
#[derive(Clone, Debug, PartialEq)]
pub struct HttpLimits {
    /// Bytes of a head, from the start line to the empty line; more is answered 431.
    pub header_bytes: usize,
    /// Fields of a head; more is answered 431.
    pub header_fields: usize,
    /// Bytes of a request target; more is answered 414.
    pub uri_bytes: usize,
    /// Bytes of a request body after removal of its transfer coding; more is answered 413.
    pub body_bytes: u64,
    /// The largest limit that a route has in place of `body_bytes`; 0 where none has.
    pub route_body_bytes: u64,
    /// From the first byte of a head (or the accepted connection) to its last byte; later is
    /// answered 408.
    pub header_timeout: Duration,
    /// Time without a byte: between two requests on a connection, or while a body is transferred.
    pub idle_timeout: Duration,
    /// Minimum average bytes per second at which a client sends a request body or reads a response,
    /// after a grace period; 0 disables it.
    pub body_rate: u32,
    pub get_body: GetBodyPolicy,
    pub underscores: UnderscorePolicy,
    /// The normal form of paths (`server.paths`).
    pub paths: PathRules,
    /// Fields dropped from trailers, in addition to those that are never allowed there: a recipient
    /// that merges trailers into the head would trust them. The gateway sets the fields that
    /// identify callers, and those that only trusted proxies may send; `*` ends a beginning of
    /// names.
    pub dropped_trailers: Arc<[String]>,
    /// Bytes that all HTTP/2 connections of the process may hold for their streams. Beyond them,
    /// new streams are refused.
    pub http2_memory: u64,
    /// Those that the connections of one address may hold (IPv6: one /64).
    pub http2_memory_per_ip: u64,
}

/// Whether a body on a GET or HEAD request is forwarded, or the request is refused with 400 (RFC
/// 9110 sections 9.3.1 and 9.3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GetBodyPolicy {
    /// Forwarded with its framing.
    #[default]
    Forward,
    /// Rejected with 400.
    Refuse,
}

/// Whether request fields with `_` in their name are dropped. CGI and interfaces like it (WSGI,
/// Rack, PHP) pass fields as variables whose names have `_` for `-`, so that `X_User_Id` would be
/// taken for `X-User-Id` (RFC 3875 section 4.1.18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnderscorePolicy {
    #[default]
    Drop,
    Forward,
}

impl HttpLimits {
    /// The bytes of a request body that some route accepts.
    pub(crate) fn body_bytes_max(&self) -> u64 {
        self.body_bytes.max(self.route_body_bytes)
    }

    /// Whether a request is refused because it has a body.
    pub(crate) fn refuses_body(&self, method: &Method, length: BodyLength) -> bool {
        self.get_body == GetBodyPolicy::Refuse
            && length != BodyLength::Empty
            && matches!(*method, Method::GET | Method::HEAD)
    }
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            header_bytes: 16 << 10,
            header_fields: 100,
            uri_bytes: 8 << 10,
            body_bytes: 16 << 20,
            route_body_bytes: 0,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            body_rate: 500,
            get_body: GetBodyPolicy::Forward,
            underscores: UnderscorePolicy::Drop,
            paths: PathRules::default(),
            dropped_trailers: Arc::default(),
            http2_memory: 512 << 20,
            http2_memory_per_ip: 128 << 20,
        }
    }
}
