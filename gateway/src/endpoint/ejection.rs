//! The share of endpoints that may be ejected, kept by all threads together.

use std::sync::PoisonError;

use super::sync::Mutex;

/// Held while an endpoint is ejected: another thread sees the ejection before it counts.
#[derive(Default)]
pub(crate) struct EjectionGate(Mutex<()>);

impl EjectionGate {
    /// Ejects by `eject` if `may_eject` says that one more endpoint may be.
    pub(crate) fn pass(&self, may_eject: impl FnOnce() -> bool, eject: impl FnOnce()) {
        let _held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if may_eject() {
            eject();
        }
    }
}
