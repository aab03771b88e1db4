//! What a client may send: sizes and times, enforced while reading, before anything is forwarded.

use std::sync::Arc;
use std::time::Duration;

use super::message::{Length, Method};

/// Bounds of one message and of one connection (`[limits_http]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Bytes of a head, from the first byte of the start line to the empty line; more is 431.
    pub header_bytes: usize,
    /// Fields of a head; more is 431.
    pub header_fields: usize,
    /// Bytes of a request target; more is 414.
    pub uri_bytes: usize,
    /// Bytes of a request body after its transfer coding is removed; more is 413.
    pub body_bytes: u64,
    /// From the first byte of a head (or the accepted connection) to its last; later is 408.
    pub header_timeout: Duration,
    /// Silence between two requests on a connection, or while a body or an answer should move.
    pub idle_timeout: Duration,
    /// Bytes per second that a client must send of a body, or take of an answer, on average, after a grace; 0 for any.
    pub body_rate: u32,
    pub get_body: GetBody,
    /// Fields that never pass as trailers, beside those that nobody may send so: whoever merges them with the head would
    /// believe them. In the gateway, the fields by which callers are identified.
    pub dropped_trailers: Arc<[String]>,
}

/// What becomes of a body whose request's method gives it no meaning (RFC 9110 sections 9.3.1 and 9.3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GetBody {
    /// Passed on with its framing.
    #[default]
    Forward,
    /// Answered 400.
    Refuse,
}

impl Limits {
    /// Whether a request is refused for having a body at all.
    pub fn refuses_body(&self, method: &Method, length: Length) -> bool {
        self.get_body == GetBody::Refuse && length != Length::Empty && matches!(*method, Method::GET | Method::HEAD)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            header_bytes: 16 << 10,
            header_fields: 100,
            uri_bytes: 8 << 10,
            body_bytes: 16 << 20,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            body_rate: 500,
            get_body: GetBody::Forward,
            dropped_trailers: Arc::default(),
        }
    }
}
