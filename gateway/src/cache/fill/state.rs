//! The state of one fill, behind its lock: phase, buffered chunks, and one slot for each request
//! that waits or reads.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use bytes::Bytes;
use slab::Slab;

use crate::error::ErrorKind;
use crate::http::fields::Fields;
use crate::http::message::Response;

/// Bytes that a reader may be behind the end of a body that is not kept whole.
pub(super) const WINDOW_BYTES: u64 = 1 << 20;
/// The same while the budget of all fetches is used up: each fetch can still make progress.
pub(super) const WINDOW_BYTES_MIN: u64 = 64 << 10;

/// Progress of a fill.
pub(super) enum FillPhase {
    /// No response head yet. Without a leader, the next waiting request that is polled leads.
    Waiting {
        has_leader: bool,
    },
    /// The head is published; the body follows.
    Streaming(Arc<Response>),
    /// Nothing is shared. Waiting requests look up again.
    Closed,
    /// Nothing is shared, and another lookup finds nothing new. Waiting requests fetch on their
    /// own.
    Unshared,
    Failed(ErrorKind),
}

/// Whether more of the body follows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyEnd {
    Open,
    Complete,
    Aborted,
}

/// One request at a fill.
pub(super) struct FillSlot {
    pub(super) waker: Option<Waker>,
    /// Offset of the next byte to read; `None` while the request waits for the head.
    pub(super) offset: Option<u64>,
    /// The reader was a window behind and gets no more bytes.
    pub(super) is_detached: bool,
}

pub(super) struct FillState {
    pub(super) phase: FillPhase,
    pub(super) chunks: VecDeque<Bytes>,
    /// Offset of the first buffered chunk.
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) body_end: BodyEnd,
    pub(super) trailers: Option<Arc<Fields>>,
    /// Failed fetches.
    pub(super) failures: u8,
    /// Whether the body is buffered from its first byte, to be stored and for requests that join
    /// later.
    pub(super) keeps_body: bool,
    pub(super) slots: Slab<FillSlot>,
    pub(super) producer_waker: Option<Waker>,
}

/// One fetch that several requests share: its head, the bytes that arrived, and its readers.
pub(super) struct Fill {
    state: Mutex<FillState>,
}

impl Fill {
    pub(super) fn new() -> Self {
        Fill {
            state: Mutex::new(FillState {
                phase: FillPhase::Waiting { has_leader: true },
                chunks: VecDeque::new(),
                start: 0,
                end: 0,
                body_end: BodyEnd::Open,
                trailers: None,
                failures: 0,
                keeps_body: true,
                slots: Slab::new(),
                producer_waker: None,
            }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, FillState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FillState {
    /// Adds a slot: of a waiting request, or of a reader at the first byte.
    pub(super) fn add_slot(&mut self, offset: Option<u64>) -> usize {
        self.slots.insert(FillSlot { waker: None, offset, is_detached: false })
    }

    /// Registers the task of a slot for the next change. One slot has one waker, so that a wakeup
    /// costs the same whatever the number of slots.
    pub(super) fn register(&mut self, slot: usize, cx: &Context<'_>) {
        if let Some(slot) = self.slots.get_mut(slot) {
            match &mut slot.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                empty => *empty = Some(cx.waker().clone()),
            }
        }
    }

    /// Wakes every task that is registered: each waits for what has just happened.
    pub(super) fn wake_all(&mut self) {
        self.slots.iter_mut().filter_map(|(_, slot)| slot.waker.take()).for_each(Waker::wake);
    }

    pub(super) fn wake_producer(&mut self) {
        if let Some(waker) = self.producer_waker.take() {
            waker.wake();
        }
    }

    /// Whether a request waits for the head.
    pub(super) fn has_waiting(&self) -> bool {
        self.slots.iter().any(|(_, slot)| slot.offset.is_none())
    }

    /// Leaves the fill without a leader and wakes one waiting request, which leads next. Returns
    /// false if no request waits.
    pub(super) fn hand_over(&mut self) -> bool {
        if !self.has_waiting() {
            return false;
        }
        self.phase = FillPhase::Waiting { has_leader: false };
        // A waiting request without a waker was not polled yet; it finds the phase when it is.
        let woken = self.slots.iter_mut().filter(|(_, slot)| slot.offset.is_none());
        if let Some(waker) = woken.into_iter().find_map(|(_, slot)| slot.waker.take()) {
            waker.wake();
        }
        true
    }

    /// Makes every waiting request a reader of the whole body.
    pub(super) fn start_readers(&mut self, response: Response) {
        self.phase = FillPhase::Streaming(Arc::new(response));
        for (_, slot) in &mut self.slots {
            slot.offset.get_or_insert(0);
        }
        self.wake_all();
    }

    /// Frees the chunks that every reader has consumed, if the body is not kept.
    pub(super) fn discard_consumed(&mut self) {
        if self.keeps_body {
            return;
        }
        let offsets = self.slots.iter().filter(|(_, slot)| !slot.is_detached).filter_map(|(_, slot)| slot.offset);
        let slowest = offsets.min().unwrap_or(self.end);
        while let Some(chunk) = self.chunks.front()
            && self.start + chunk.len() as u64 <= slowest
        {
            self.start += chunk.len() as u64;
            self.chunks.pop_front();
        }
        self.wake_producer();
    }

    /// Detaches the readers that are `window` bytes behind, if another reader has read everything
    /// and waits: the slow ones must not hold it back. Returns whether one was detached.
    pub(super) fn detach_slow_readers(&mut self, window: u64) -> bool {
        let end = self.end;
        let is_starved = |slot: &FillSlot| !slot.is_detached && slot.offset == Some(end);
        if !self.slots.iter().any(|(_, slot)| is_starved(slot)) {
            return false;
        }
        let mut is_detached = false;
        for (_, slot) in &mut self.slots {
            if !slot.is_detached && slot.offset.is_some_and(|offset| offset + window <= end) {
                slot.is_detached = true;
                is_detached = true;
                if let Some(waker) = slot.waker.take() {
                    waker.wake();
                }
            }
        }
        if is_detached {
            self.discard_consumed();
        }
        is_detached
    }

    /// Whether a reader is left that gets the next bytes.
    pub(super) fn has_readers(&self) -> bool {
        self.slots.iter().any(|(_, slot)| !slot.is_detached)
    }

    /// The bytes from `offset` to the end of their chunk.
    pub(super) fn chunk_at(&self, offset: u64) -> Bytes {
        let mut at = self.start;
        for chunk in &self.chunks {
            let end = at + chunk.len() as u64;
            if offset < end {
                return chunk.slice(usize::try_from(offset.saturating_sub(at)).unwrap_or(0)..);
            }
            at = end;
        }
        Bytes::new()
    }
}
