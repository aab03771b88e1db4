//! The counts of a load generator.

use std::time::Duration;

/// Result of one run of a load generator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LoadReport {
    pub(crate) requests: u64,
    /// Bytes of heads and bodies, including responses that the end of the run aborted; with HTTP/2
    /// those of bodies.
    pub(crate) bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// Responses with status 400 or above.
    pub(crate) error_statuses: u64,
    /// Failed connects, reads and writes, and responses that took more than 2 s.
    pub(crate) socket_errors: u64,
}
