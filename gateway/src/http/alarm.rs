//! A deadline that is cheap to move: the timer behind it is touched only when it fires or must fire earlier.
//!
//! A connection moves its deadline with every request; registering a timer each time costs more than the request's parsing.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

pub struct Alarm {
    patience: Duration,
    /// Where it is not known yet, it is read off the clock by the first poll: most waits end before they begin.
    at: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    /// Whom the timer wakes when it fires.
    sleeper: Option<Waker>,
}

impl Alarm {
    /// Fires when `patience` has passed since it was first polled.
    pub fn after(patience: Duration) -> Self {
        Alarm { patience, at: None, timer: None, sleeper: None }
    }

    /// Begins anew, as `after` does.
    pub fn restart(&mut self, patience: Duration) {
        self.patience = patience;
        self.at = None;
    }

    /// Begins anew at `now`, so that the clock need not be read.
    pub fn restart_at(&mut self, now: Instant, patience: Duration) {
        self.patience = patience;
        self.at = Some(now + patience);
    }

    pub fn set(&mut self, at: Instant) {
        self.at = Some(at);
    }

    /// Fires at `at`, if it would not before.
    pub fn no_later(&mut self, at: Instant) {
        let own = *self.at.get_or_insert_with(|| Instant::now() + self.patience);
        self.at = Some(own.min(at));
    }

    /// Ready once the deadline has passed; the task is woken for it.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let at = *self.at.get_or_insert_with(|| Instant::now() + self.patience);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if timer.deadline() > at {
            timer.as_mut().reset(at);
            self.sleeper = None;
        }
        // One that waits for the right moment and wakes the right task need not be told so again.
        if !timer.is_elapsed() && self.sleeper.as_ref().is_some_and(|sleeper| sleeper.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= at {
                self.sleeper = None;
                return Poll::Ready(());
            }
            timer.as_mut().reset(at);
        }
        self.sleeper = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test(start_paused = true)]
    async fn a_moved_deadline_fires_at_its_last_place() {
        let begin = Instant::now();
        let mut alarm = Alarm::after(Duration::from_secs(1));
        assert!(poll_fn(|cx| Poll::Ready(alarm.poll(cx).is_pending())).await);
        alarm.set(begin + Duration::from_secs(5));
        poll_fn(|cx| alarm.poll(cx)).await;
        assert_eq!(begin.elapsed().as_secs(), 5);
        alarm.restart(Duration::from_secs(60));
        assert!(poll_fn(|cx| Poll::Ready(alarm.poll(cx).is_pending())).await);
        alarm.set(Instant::now() + Duration::from_secs(1));
        poll_fn(|cx| alarm.poll(cx)).await;
        assert_eq!(begin.elapsed().as_secs(), 6);
    }
}
