//! Minimum average transfer rate of a body, after a grace period (like `MinRate` of Apache httpd's
//! `mod_reqtimeout`).
//!
//! Only time spent waiting for the peer counts, not time in which the gateway has nothing to write
//! to it or does not read from it. A slow origin thus never makes a client miss its rate. The clock
//! is read only where a wait starts or ends.

use std::time::Duration;

use tokio::time::Instant;

/// Waiting time allowed before any byte was transferred, enough for a slow network.
const GRACE: Duration = Duration::from_secs(10);

/// State of the minimum rate of one body: bytes transferred, accumulated waiting time, and the
/// grace period.
#[derive(Debug)]
pub(crate) struct MinRateTimer {
    /// Bytes per second; 0 disables the timer.
    rate: u32,
    grace: Duration,
    bytes: u64,
    waited: Duration,
    /// When the current wait started.
    wait_start: Option<Instant>,
}

impl MinRateTimer {
    pub(crate) fn new(rate: u32, idle_timeout: Duration) -> Self {
        // The grace period never exceeds the idle timeout.
        MinRateTimer { rate, grace: GRACE.min(idle_timeout), bytes: 0, waited: Duration::ZERO, wait_start: None }
    }

    /// Records that `bytes` were transferred, or that the gateway no longer waits for the peer (0).
    /// Ends a wait.
    pub(crate) fn record_progress(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        if let Some(wait_start) = self.wait_start.take() {
            self.waited += wait_start.elapsed();
        }
    }

    /// Starts or continues a wait for the peer. Returns the time by which it must have transferred
    /// more bytes; `None` without a minimum rate.
    pub(crate) fn wait_deadline(&mut self) -> Option<Instant> {
        if self.rate == 0 {
            return None;
        }
        let wait_start = *self.wait_start.get_or_insert_with(Instant::now);
        let earned = Duration::from_secs_f64(self.bytes as f64 / f64::from(self.rate));
        let left = self.grace.saturating_add(earned).saturating_sub(self.waited);
        // Bounded at a day, which is later than any other timeout.
        Some(wait_start + left.min(Duration::from_secs(24 * 3600)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn transferred_bytes_extend_the_deadline_and_waiting_uses_it_up() {
        let mut min_rate = MinRateTimer::new(100, Duration::from_secs(60));
        let start = Instant::now();
        let due_at = |min_rate: &mut MinRateTimer| (min_rate.wait_deadline().expect("a rate") - start).as_secs();
        assert_eq!(due_at(&mut min_rate), 10);
        tokio::time::advance(Duration::from_secs(6)).await;
        min_rate.record_progress(200);
        // Time outside a wait does not count.
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(due_at(&mut min_rate), 106 + 6);
        tokio::time::advance(Duration::from_secs(6)).await;
        min_rate.record_progress(0);
        assert_eq!(due_at(&mut min_rate), 112);
    }

    #[test]
    fn rate_zero_has_no_deadline() {
        assert_eq!(MinRateTimer::new(0, GRACE).wait_deadline(), None);
    }
}
