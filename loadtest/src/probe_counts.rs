//! Counts of the probes sent during one round.

/// Probes sent during the load of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ProbeCounts {
    pub(crate) sent: u64,
    pub(crate) wrong: u64,
    /// Requests that a limit should have denied.
    pub(crate) admitted: u64,
}
