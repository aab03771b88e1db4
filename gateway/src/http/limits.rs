//! What a client may send: sizes and times, enforced while reading, before anything is forwarded.

use std::sync::Arc;
use std::time::Duration;

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
    /// Fields that never pass as trailers, beside those that nobody may send so: whoever merges them with the head would
    /// believe them. In the gateway, the fields by which callers are identified.
    pub dropped_trailers: Arc<[String]>,
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
            dropped_trailers: Arc::default(),
        }
    }
}
