//! A deadline that is cheap to reset: its timer is touched only when it fires or must fire earlier.
//!
//! A connection resets its deadline with every request. Registering a timer each time would cost
//! more than parsing the request.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::task::coop;
use tokio::time::{Instant, Sleep, sleep_until};

/// A timeout with its expiry time and a timer that is allocated by the first poll and reused by
/// later ones.
pub(crate) struct ResettableDeadline {
    timeout: Duration,
    /// When the deadline expires. `None`: `timeout` after the first poll, which then reads the
    /// clock. Most waits complete before they are polled as pending, so the clock is read only when
    /// needed.
    at: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    /// The task that is registered with the timer.
    waker: Option<Waker>,
}

impl ResettableDeadline {
    /// Expires `timeout` after the first poll.
    pub(crate) fn after(timeout: Duration) -> Self {
        ResettableDeadline { timeout, at: None, timer: None, waker: None }
    }

    /// Restarts: expires `timeout` after the next poll.
    pub(crate) fn restart(&mut self, timeout: Duration) {
        self.timeout = timeout;
        self.at = None;
    }

    /// Restarts: expires `timeout` after `now`. Does not read the clock.
    pub(crate) fn restart_at(&mut self, now: Instant, timeout: Duration) {
        self.timeout = timeout;
        self.at = Some(now + timeout);
    }

    /// Expires at `at`.
    pub(crate) fn set(&mut self, at: Instant) {
        self.at = Some(at);
    }

    /// Expires at `at` or at the current deadline, whichever is earlier.
    pub(crate) fn no_later_than(&mut self, at: Instant) {
        let current = *self.at.get_or_insert_with(|| Instant::now() + self.timeout);
        self.at = Some(current.min(at));
    }

    /// Ready once the deadline has passed. Registers the task to be woken then.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let at = *self.at.get_or_insert_with(|| Instant::now() + self.timeout);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if timer.deadline() > at {
            timer.as_mut().reset(at);
            self.waker = None;
        }
        // The timer is already registered for this task and fires no later than the deadline.
        if !timer.is_elapsed() && self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        // Outside the task's budget: once it is used up, the timer would be pending without being
        // registered, and the deadline would be lost.
        while Pin::new(&mut coop::unconstrained(timer.as_mut())).poll(cx).is_ready() {
            if Instant::now() >= at {
                self.waker = None;
                return Poll::Ready(());
            }
            timer.as_mut().reset(at);
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test(start_paused = true)]
    async fn deadline_polled_without_budget_still_fires() {
        let mut deadline = ResettableDeadline::after(Duration::from_secs(1));
        let is_over = tokio::time::timeout(
            Duration::from_secs(60),
            poll_fn(|cx| {
                while coop::has_budget_remaining() {
                    if let Poll::Ready(budget) = coop::poll_proceed(cx) {
                        budget.made_progress();
                    }
                }
                deadline.poll(cx)
            }),
        );
        assert_eq!(is_over.await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reset_deadline_fires_at_its_latest_time() {
        let start = Instant::now();
        let mut deadline = ResettableDeadline::after(Duration::from_secs(1));
        assert!(poll_fn(|cx| Poll::Ready(deadline.poll(cx).is_pending())).await);
        deadline.set(start + Duration::from_secs(5));
        poll_fn(|cx| deadline.poll(cx)).await;
        assert_eq!(start.elapsed().as_secs(), 5);
        deadline.restart(Duration::from_secs(60));
        assert!(poll_fn(|cx| Poll::Ready(deadline.poll(cx).is_pending())).await);
        deadline.set(Instant::now() + Duration::from_secs(1));
        poll_fn(|cx| deadline.poll(cx)).await;
        assert_eq!(start.elapsed().as_secs(), 6);
    }
}
