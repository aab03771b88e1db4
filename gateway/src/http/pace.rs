//! How fast a peer must take or send a body: at a least rate on average, after a grace (as `mod_reqtimeout` of Apache httpd).
//!
//! Counts only time spent waiting for the peer, so that a slow origin is never held against a client. The clock is read only
//! where a wait begins or ends.

use std::time::Duration;

use tokio::time::Instant;

/// Time to begin with, which a network of any kind may take.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Pace {
    /// Bytes per second; 0 asks for nothing.
    rate: u32,
    grace: Duration,
    bytes: u64,
    waited: Duration,
    since: Option<Instant>,
}

impl Pace {
    pub fn new(rate: u32, patience: Duration) -> Self {
        // Who may not even be silent for so long has no more grace than that.
        Pace { rate, grace: GRACE.min(patience), bytes: 0, waited: Duration::ZERO, since: None }
    }

    /// The peer has moved so many bytes, which ends a wait.
    pub fn moved(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.rest();
    }

    /// Nothing is wanted of the peer any longer.
    pub fn rest(&mut self) {
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
    }

    /// Waiting for the peer; says by when it must have moved something, `None` where there is no least rate.
    pub fn wait(&mut self) -> Option<Instant> {
        if self.rate == 0 {
            return None;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let earned = Duration::from_secs_f64(self.bytes as f64 / f64::from(self.rate));
        let left = self.grace.saturating_add(earned).saturating_sub(self.waited);
        // Further away than any other timeout: never.
        Some(since + left.min(Duration::from_secs(24 * 3600)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_earn_time_and_waits_spend_it() {
        let mut pace = Pace::new(100, Duration::from_secs(60));
        let begin = Instant::now();
        let at = |pace: &mut Pace| (pace.wait().expect("a rate") - begin).as_secs();
        assert_eq!(at(&mut pace), 10);
        tokio::time::advance(Duration::from_secs(6)).await;
        pace.moved(200);
        // Time in which nothing was wanted counts for nothing.
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(at(&mut pace), 106 + 6);
        tokio::time::advance(Duration::from_secs(6)).await;
        pace.moved(0);
        assert_eq!(at(&mut pace), 112);
    }

    #[test]
    fn without_a_rate_nobody_is_late() {
        assert_eq!(Pace::new(0, GRACE).wait(), None);
    }
}
