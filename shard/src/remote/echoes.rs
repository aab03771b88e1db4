//! Owns what this process has had a server remove: the server tells of that as of any other change, and it is no news.
//!
//! Refuses to remember more than `NAMES_MAX`: then some of it is news, which costs a fill or two their storing.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

const NAMES_MAX: usize = 8_192;

#[derive(Debug, Default)]
pub(crate) struct Echoes(Mutex<HashSet<u64>>);

impl Echoes {
    /// To be called before an entry with this name is removed.
    pub(crate) fn expect(&self, name: u64) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= NAMES_MAX {
            names.clear();
        }
        names.insert(name);
    }

    /// To be called when a server's changes begin to be told: of what was removed before, nothing may ever be told.
    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether the change of an entry with this name is this process's own; once.
    pub(crate) fn take(&self, name: u64) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&name)
    }
}
