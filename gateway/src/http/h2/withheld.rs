//! How long the window of a connection has been withheld.

use std::cell::Cell;

use tokio::time::Instant;

/// The time since which the window is withheld or was last checked, and the number of checks.
#[derive(Default)]
pub(super) struct WithheldWindow {
    since: Cell<Option<Instant>>,
    checks: Cell<u32>,
}

impl WithheldWindow {
    pub(super) fn since(&self) -> Option<Instant> {
        self.since.get()
    }

    /// The window is withheld now, or is not.
    pub(super) fn observe(&self, is_withheld: bool) {
        if !is_withheld {
            self.since.set(None);
            self.checks.set(0);
        } else if self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
        }
    }

    /// The next interval begins with the next `observe`. Returns the number of checks since the
    /// window is withheld.
    pub(super) fn record_check(&self) -> u32 {
        self.since.set(None);
        self.checks.set(self.checks.get() + 1);
        self.checks.get()
    }
}
