//! Counts of check requests: a client sends them beside the load of one round and verifies the
//! responses.

/// Counts of check requests that a client sends beside the load, and of the wrong responses among
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ProbeCounts {
    pub(crate) sent: u64,
    pub(crate) wrong: u64,
    /// Requests that a limit should have denied.
    pub(crate) admitted: u64,
}
