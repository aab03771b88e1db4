//! The time in which a peer has to accept a byte.
//!
//! The system reports a socket as writable only once a third of its send buffer is free, which may
//! be more than a megabyte. A peer that reads slowly but steadily would seem to have stopped. The
//! timer therefore interrupts the wait several times, so that the gateway can try a write that
//! succeeds as soon as the peer has accepted anything.
//!
//! Nothing is tried while the socket accepts bytes: only a wait has checks. A peer that has stopped
//! is detected between the timeout and `1 / CHECKS` of it later.

use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use super::deadline::ResettableDeadline;

/// Checks in the time of one wait. More would detect the last progress more precisely; each costs
/// one system call of a stalled connection.
const CHECKS: u32 = 8;

/// Writes of one check, at most: as many pieces of a body as a send buffer holds. Space that a
/// check left free would look like progress in the next one.
const WRITES_MAX: u32 = 64;

/// A timeout with the checks of the current wait that have failed.
pub(crate) struct WriteTimer {
    timeout: Duration,
    failed_checks: u32,
    /// Writes of the current check that the peer accepted; 0 between checks.
    accepted_writes: u32,
    /// When the next check is due.
    check: ResettableDeadline,
}

impl WriteTimer {
    /// The wait starts with the first poll.
    pub(crate) fn new(timeout: Duration) -> Self {
        WriteTimer { timeout, failed_checks: 0, accepted_writes: 0, check: ResettableDeadline::after(timeout / CHECKS) }
    }

    /// The peer has accepted bytes, or none waits for it: the next poll starts a new wait.
    pub(crate) fn restart(&mut self) {
        self.failed_checks = 0;
        self.check.restart(self.timeout / CHECKS);
    }

    /// As `restart`, with another timeout.
    pub(crate) fn restart_with(&mut self, timeout: Duration) {
        self.timeout = timeout;
        self.restart();
    }

    /// Makes the next check due at `at`, if it would be due later.
    pub(crate) fn check_no_later_than(&mut self, at: Instant) {
        self.check.no_later_than(at);
    }

    /// Polled while bytes wait for the peer. Ready when a check is due or continues: the caller
    /// tries to write, and calls `record_accepted` or `record_blocked`. Registers the task to be
    /// woken.
    pub(crate) fn poll_check(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.accepted_writes > 0 { Poll::Ready(()) } else { self.check.poll(cx) }
    }

    /// Records that the peer accepted bytes in a check, which continues until it accepts no more.
    pub(crate) fn record_accepted(&mut self) {
        self.restart();
        self.accepted_writes = (self.accepted_writes + 1) % WRITES_MAX;
    }

    /// Records that the peer accepted no byte: the end of a check. Returns whether its time is
    /// over.
    pub(crate) fn record_blocked(&mut self) -> bool {
        if self.accepted_writes == 0 {
            self.failed_checks += 1;
        }
        self.accepted_writes = 0;
        self.check.restart(self.timeout / CHECKS);
        self.failed_checks >= CHECKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    const TIMEOUT: Duration = Duration::from_secs(80);

    #[tokio::test(start_paused = true)]
    async fn peer_that_accepts_nothing_is_over_time_after_the_timeout() {
        let (mut timer, start, mut checks) = (WriteTimer::new(TIMEOUT), Instant::now(), 0);
        loop {
            poll_fn(|cx| timer.poll_check(cx)).await;
            checks += 1;
            if timer.record_blocked() {
                break;
            }
        }
        assert_eq!((start.elapsed(), checks), (TIMEOUT, CHECKS));
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_accepts_bytes_in_one_check_of_its_time_is_never_over_it() {
        let mut timer = WriteTimer::new(TIMEOUT);
        for _ in 0..100 {
            for _ in 1..CHECKS {
                poll_fn(|cx| timer.poll_check(cx)).await;
                assert!(!timer.record_blocked());
            }
            let due = Instant::now();
            for _ in 0..3 {
                poll_fn(|cx| timer.poll_check(cx)).await;
                timer.record_accepted();
            }
            assert_eq!(due.elapsed(), TIMEOUT / CHECKS, "one check");
            poll_fn(|cx| timer.poll_check(cx)).await;
            assert!(!timer.record_blocked());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn check_of_a_peer_that_accepts_everything_has_an_end() {
        let (mut timer, start) = (WriteTimer::new(TIMEOUT), Instant::now());
        for _ in 0..=WRITES_MAX {
            poll_fn(|cx| timer.poll_check(cx)).await;
            timer.record_accepted();
        }
        assert_eq!(start.elapsed(), TIMEOUT / CHECKS * 2);
    }
}
