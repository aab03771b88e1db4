//! Memory that responses over HTTP/2 may hold before their clients take them.
//!
//! A server may send as many bytes as the window of a stream allows before a client takes them.
//! Each exchange with a wide window therefore reserves that window and the bytes of a head; it
//! keeps what the rest of its response can need. Without room in the account, an exchange gets a
//! connection with narrow windows, which hold no more than the read buffer of a connection of
//! HTTP/1.1 and are not accounted for. No exchange is refused. A connection that is being opened
//! holds the reservation of its first exchange: its windows are announced before any other step.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::window_account::WindowAccount;

/// Most bytes of the fields of one response, as over HTTP/1.1.
pub(super) const HEAD_MAX: u32 = 64 << 10;
/// The window of a stream while there is room: about what a round trip of 10 ms takes at 25 MB/s.
const WIDE: u32 = 256 << 10;
/// The window of a stream without room.
const NARROW: u32 = 16 << 10;

static ACCOUNT: WindowAccount = account(usize::MAX);

const fn account(max: usize) -> WindowAccount {
    WindowAccount { max: AtomicUsize::new(max), reserved: AtomicUsize::new(0) }
}

/// Sets how many bytes the exchanges of all threads may reserve: half of what the connections of
/// clients may hold (`limits_http.http2_memory`).
pub(crate) fn set_http2_memory(bytes: u64) {
    ACCOUNT.max.store(usize::try_from(bytes / 2).unwrap_or(usize::MAX), Relaxed);
}

/// Bytes that are reserved for responses over HTTP/2.
pub(crate) fn reserved_upstream_bytes() -> usize {
    ACCOUNT.reserved.load(Relaxed)
}

/// The window of the streams of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamWindow {
    Wide,
    Narrow,
}

impl StreamWindow {
    pub(super) fn bytes(self) -> u32 {
        match self {
            StreamWindow::Wide => WIDE,
            StreamWindow::Narrow => NARROW,
        }
    }
}

/// Bytes that an exchange reserves until its head arrives.
const EXCHANGE_MAX: usize = (WIDE + HEAD_MAX) as usize;

/// The bytes that one exchange with a wide window has reserved.
pub(crate) struct WindowReservation {
    account: &'static WindowAccount,
    bytes: usize,
}

impl WindowReservation {
    /// Reserves the bytes of an exchange; `None`: there is no room for them.
    pub(crate) fn new() -> Option<Self> {
        Self::of(&ACCOUNT)
    }

    fn of(account: &'static WindowAccount) -> Option<Self> {
        account.reserve(EXCHANGE_MAX).then(|| WindowReservation { account, bytes: EXCHANGE_MAX })
    }

    /// The head has arrived, and the body has at most `length` bytes.
    pub(super) fn keep(&mut self, length: u64) {
        let kept = usize::try_from(length).unwrap_or(usize::MAX).min(WIDE as usize).min(self.bytes);
        self.account.release(self.bytes - kept);
        self.bytes = kept;
    }
}

impl Drop for WindowReservation {
    fn drop(&mut self) {
        self.account.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanges_reserve_what_their_responses_can_need_and_return_it() {
        static SMALL: WindowAccount = account(2 * EXCHANGE_MAX);
        let reserved = || SMALL.reserved.load(Relaxed);
        let mut first = WindowReservation::of(&SMALL).expect("room");
        let second = WindowReservation::of(&SMALL).expect("room");
        assert!(WindowReservation::of(&SMALL).is_none());
        assert_eq!(reserved(), 2 * EXCHANGE_MAX);
        first.keep(u64::MAX);
        assert_eq!(reserved(), EXCHANGE_MAX + WIDE as usize);
        first.keep(1_000);
        assert_eq!(reserved(), EXCHANGE_MAX + 1_000);
        first.keep(5_000);
        assert_eq!(reserved(), EXCHANGE_MAX + 1_000, "it is never more again");
        drop(second);
        assert!(WindowReservation::of(&SMALL).is_some());
        drop(first);
        assert_eq!(reserved(), 0);
    }
}
