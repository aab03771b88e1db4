//! The first window of streams as the client knows it (SETTINGS_INITIAL_WINDOW_SIZE).
//!
//! A change is sent only after the last one was acknowledged. Until then a new stream may have the
//! larger of both.

use super::frame::WINDOW_DEFAULT_BYTES;
use super::request_body::{WINDOW_FIRST, WINDOW_FIRST_SMALL};

/// The setting that the client has acknowledged, and the one that it has not.
pub(super) struct FirstWindow {
    acknowledged: u32,
    sent: Option<u32>,
}

impl FirstWindow {
    /// Of a connection whose first settings are sent.
    pub(super) fn new() -> Self {
        FirstWindow { acknowledged: WINDOW_DEFAULT_BYTES, sent: Some(WINDOW_FIRST) }
    }

    /// That of a stream that begins now, at most.
    pub(super) fn bytes(&self) -> u32 {
        self.acknowledged.max(self.sent.unwrap_or(0))
    }

    /// Whether the client knows the small one.
    pub(super) fn is_small(&self) -> bool {
        self.acknowledged == WINDOW_FIRST_SMALL
    }

    /// The client acknowledges settings. Returns by how much the windows of open streams shrink.
    pub(super) fn acknowledge(&mut self) -> u32 {
        let Some(sent) = self.sent.take() else { return 0 };
        std::mem::replace(&mut self.acknowledged, sent).saturating_sub(sent)
    }

    /// The setting to send, if it is to change. `is_small`: the client has a large window that an
    /// upload has left.
    pub(super) fn change(&mut self, is_small: bool) -> Option<u32> {
        let wanted = if is_small { WINDOW_FIRST_SMALL } else { WINDOW_FIRST };
        if self.sent.is_some() || wanted == self.acknowledged {
            return None;
        }
        self.sent = Some(wanted);
        self.sent
    }

    /// By how much the windows of open streams grow with the setting that was just sent.
    pub(super) fn growth(&self) -> u32 {
        self.sent.unwrap_or(0).saturating_sub(self.acknowledged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_changes_once_the_last_one_is_acknowledged() {
        let mut window = FirstWindow::new();
        assert_eq!((window.bytes(), window.change(true)), (WINDOW_DEFAULT_BYTES, None));
        assert_eq!((window.acknowledge(), window.acknowledge()), (WINDOW_DEFAULT_BYTES - WINDOW_FIRST, 0));
        assert_eq!((window.bytes(), window.change(false)), (WINDOW_FIRST, None));
        assert_eq!((window.change(true), window.growth()), (Some(WINDOW_FIRST_SMALL), 0));
        assert_eq!((window.bytes(), window.change(false)), (WINDOW_FIRST, None), "not acknowledged yet");
        assert_eq!((window.acknowledge(), window.bytes()), (WINDOW_FIRST - WINDOW_FIRST_SMALL, WINDOW_FIRST_SMALL));
        assert_eq!((window.change(false), window.growth()), (Some(WINDOW_FIRST), WINDOW_FIRST - WINDOW_FIRST_SMALL));
        assert_eq!((window.bytes(), window.acknowledge(), window.bytes()), (WINDOW_FIRST, 0, WINDOW_FIRST));
    }
}
