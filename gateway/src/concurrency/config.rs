//! The bounds of an adaptive limit of concurrent calls.

use std::time::Duration;

/// Bounds of the calls that an upstream has in progress (`[upstreams.X.concurrency]`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConcurrencyConfig {
    pub(crate) min: usize,
    pub(crate) max: usize,
    /// The longest time that a call waits for its turn.
    pub(crate) wait: Duration,
}

impl Default for ConcurrencyConfig {
    fn default() -> Self {
        ConcurrencyConfig { min: 4, max: 1_024, wait: Duration::from_millis(500) }
    }
}
