//! The time in which a client has to send or accept the next bytes of a body, and its minimum rate.

use std::task::{Context, Poll};
use std::time::Duration;

use crate::http::deadline::ResettableDeadline;
use crate::http::limits::HttpLimits;
use crate::http::min_rate::MinRateTimer;

/// The clock of one body in one direction. It runs only while the gateway waits for the client.
pub(crate) struct ClientClock {
    idle_timeout: Duration,
    deadline: ResettableDeadline,
    min_rate: MinRateTimer,
}

impl ClientClock {
    pub(crate) fn new(limits: &HttpLimits) -> Self {
        let idle_timeout = limits.idle_timeout;
        let min_rate = MinRateTimer::new(limits.body_rate, idle_timeout);
        ClientClock { idle_timeout, deadline: ResettableDeadline::after(idle_timeout), min_rate }
    }

    /// The client transferred bytes, or the gateway no longer waits for it (0).
    pub(crate) fn record_progress(&mut self, bytes: usize) {
        self.min_rate.record_progress(bytes as u64);
        self.deadline.restart(self.idle_timeout);
    }

    /// Ready when the client is too late. Registers the task to be woken.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(at) = self.min_rate.wait_deadline() {
            self.deadline.no_later_than(at);
        }
        self.deadline.poll(cx)
    }
}
