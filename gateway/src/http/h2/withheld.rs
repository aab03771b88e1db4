//! How long the window of a connection has been withheld.

use std::cell::Cell;

use tokio::time::Instant;

/// How long the window has been withheld, and whether its uploads were looked at.
#[derive(Default)]
pub(super) struct WithheldWindow {
    pub(super) since: Cell<Option<Instant>>,
    pub(super) is_marked: Cell<bool>,
}

impl WithheldWindow {
    /// The window is withheld now, or is not.
    pub(super) fn observe(&self, is_withheld: bool) {
        if !is_withheld {
            self.since.set(None);
            self.is_marked.set(false);
        } else if self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
        }
    }
}
