//! The probes of a half-open breaker.
//!
//! All must succeed to close the breaker, and one failure opens it again. A probe has two
//! deadlines: for its client to send the request, after which another call may take its slot, and
//! for the origin to respond, after which it has failed.

use std::time::{Duration, Instant};

/// Calls that a half-open breaker admits.
pub(super) const PROBES: usize = 3;
/// How long a probe may wait for the rest of its client's request before another call may take its
/// slot. Long enough for a common upload; short, because the route rejects calls meanwhile.
pub(super) const PROBE_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// A probe of a half-open breaker.
#[derive(Clone, Copy)]
struct RunningProbe {
    id: u64,
    /// When it was admitted, or when the origin got its whole request.
    since: Instant,
    has_request: bool,
}

/// The running probes and the number of those that succeeded.
#[derive(Default)]
pub(super) struct Probes {
    slots: [Option<RunningProbe>; PROBES],
    /// The id of the next probe.
    next: u64,
    successful: usize,
}

impl Probes {
    /// Takes the slots of probes whose clients did not send their requests in time, and gives a
    /// free one to a new probe; a complete request also takes that of an incomplete one. Returns
    /// the id of the new probe, or `None` if there is no slot.
    pub(super) fn start(&mut self, now: Instant, has_request: bool) -> Option<u64> {
        for slot in &mut self.slots {
            slot.take_if(|probe| {
                !probe.has_request && now.saturating_duration_since(probe.since) >= PROBE_REQUEST_TIMEOUT
            });
        }
        if self.running() + self.successful >= PROBES {
            // Clients that keep their requests back do not keep complete ones out.
            let incomplete = self.slots.iter_mut().find(|slot| slot.is_some_and(|probe| !probe.has_request));
            *incomplete.filter(|_| has_request)? = None;
        }
        let id = self.next;
        self.next += 1;
        *self.slots.iter_mut().find(|slot| slot.is_none())? = Some(RunningProbe { id, since: now, has_request });
        Some(id)
    }

    pub(super) fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// The origin has the whole request of a probe.
    pub(super) fn request_sent(&mut self, id: u64, now: Instant) {
        if let Some(slot) = self.slot(id) {
            *slot = Some(RunningProbe { id, since: now, has_request: true });
        }
    }

    /// Ends a probe. False if it lost its slot to another call: it is no probe any more.
    pub(super) fn end(&mut self, id: u64) -> bool {
        self.slot(id).is_some_and(|slot| slot.take().is_some())
    }

    /// Counts a success. Returns whether it was the last one that was needed.
    pub(super) fn succeed(&mut self) -> bool {
        self.successful += 1;
        self.successful >= PROBES
    }

    /// Whether the origin has had the request of a probe for longer than `limit`.
    pub(super) fn is_overdue(&self, now: Instant, limit: Duration) -> bool {
        let mut running = self.slots.iter().flatten();
        running.any(|probe| probe.has_request && now.saturating_duration_since(probe.since) >= limit)
    }

    fn slot(&mut self, id: u64) -> Option<&mut Option<RunningProbe>> {
        self.slots.iter_mut().find(|slot| slot.is_some_and(|probe| probe.id == id))
    }
}
