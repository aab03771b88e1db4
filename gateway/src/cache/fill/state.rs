//! The state of one fill, behind its lock: phase, buffered chunks, and the requests that wait or
//! read.
//!
//! Work of one step is constant: each chunk has the list of the readers that read it next, and a
//! chunk that is not kept is freed when its list is empty.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use bytes::Bytes;
use shard::EpochSnapshot;

use super::slots::{FillSlots, SlotList, SlotPosition};
use crate::error::ErrorKind;
use crate::http::body::BodyError;
use crate::http::fields::Fields;
use crate::http::message::Response;

/// Bytes that a reader may be behind the end of a body that is not kept whole.
pub(super) const WINDOW_BYTES: u64 = 1 << 20;
/// The same while the budget of all fetches is used up: each fetch can still make progress.
pub(super) const WINDOW_BYTES_MIN: u64 = 64 << 10;

/// How a fetch ends without a response for the requests that wait for it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FetchEnd {
    /// Another lookup finds the response, or that the key is uncacheable.
    LookUpAgain,
    /// The response is for the client of the leader alone, and another lookup finds nothing new:
    /// each request fetches on its own, at once.
    FetchAlone,
    /// A failure that another attempt may not meet: one request tries again. A second failure fails
    /// all.
    Retry(ErrorKind),
    /// A failure that another attempt would meet too, or wait for as long: all requests fail.
    Fail(ErrorKind),
}

/// Progress of a fill.
pub(super) enum FillPhase {
    /// No response head yet. Without a leader, the next waiting request that is polled leads.
    Waiting {
        has_leader: bool,
        failures: u8,
    },
    /// The head is published; the body follows.
    Streaming(Arc<Response>, BodyProgress),
    Ended(FetchEnd),
}

/// Whether more of the body follows.
pub(super) enum BodyProgress {
    Open,
    /// With trailers, if there were any.
    Complete(Option<Arc<Fields>>),
    /// The body failed, for this reason.
    Aborted(BodyError),
}

/// The part of the body that is buffered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Buffering {
    /// From the first byte: for the store, and for requests that join later. No reader is detached.
    Whole {
        /// Whether the body is completed without a reader: a client had the object already, the
        /// store does not.
        is_wanted: bool,
    },
    /// Up to this many bytes, until its readers have read them: the body will not be stored. It is
    /// `WINDOW_BYTES`, in addition to what was buffered when this became known: a request that came
    /// later, and reads as fast as the others, is not cut.
    Window(u64),
    /// The body is complete. It is freed as its last readers read it.
    Rest,
}

/// Buffered bytes, with the readers that read them next.
struct FillChunk {
    data: Bytes,
    readers: SlotList,
}

pub(super) struct FillState {
    pub(super) phase: FillPhase,
    chunks: VecDeque<FillChunk>,
    /// Number of the first buffered chunk.
    first_chunk: u64,
    /// Offset of the first buffered chunk.
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) buffering: Buffering,
    pub(super) slots: FillSlots,
    /// The requests that wait for the head.
    waiting: SlotList,
    /// The readers that have read every chunk.
    at_end: SlotList,
    /// The task that fetches: a producer, or a leader without a client.
    fetch_waker: Option<Waker>,
}

/// One fetch that several requests share: its head, the bytes that arrived, and its readers.
pub(super) struct Fill {
    /// The time in the sequence of removals at which the fetch began; `None` if no request joins.
    pub(super) epoch: Option<EpochSnapshot>,
    state: Mutex<FillState>,
}

impl Fill {
    pub(super) fn new(epoch: Option<EpochSnapshot>) -> Self {
        Fill {
            epoch,
            state: Mutex::new(FillState {
                phase: FillPhase::Waiting { has_leader: true, failures: 0 },
                chunks: VecDeque::new(),
                first_chunk: 0,
                start: 0,
                end: 0,
                buffering: Buffering::Whole { is_wanted: false },
                slots: FillSlots::default(),
                waiting: SlotList::default(),
                at_end: SlotList::default(),
                fetch_waker: None,
            }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, FillState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FillState {
    /// Adds a request that waits for the head.
    pub(super) fn add_waiting(&mut self) -> usize {
        self.slots.insert(SlotPosition::Waiting, &mut self.waiting)
    }

    /// Adds a reader at the first byte. The body must be kept whole.
    pub(super) fn add_reader(&mut self) -> usize {
        let list = self.chunks.front_mut().map_or(&mut self.at_end, |chunk| &mut chunk.readers);
        self.slots.insert(SlotPosition::Chunk(self.first_chunk), list)
    }

    /// Removes a request, whatever its position, and the chunks that only it had to read.
    pub(super) fn remove(&mut self, slot: usize) {
        match self.slots.position(slot) {
            SlotPosition::Waiting => self.slots.unlink(slot, &mut self.waiting),
            SlotPosition::Chunk(number) => self.unlink_reader(slot, number),
            SlotPosition::Detached(_) => {}
        }
        self.slots.remove(slot);
        self.discard_consumed();
        if !self.slots.has_attached() {
            self.wake_fetch();
        }
    }

    /// Moves a reader that has read its chunk to the next one. A detached reader is attached again
    /// if that chunk is still buffered.
    pub(super) fn advance(&mut self, slot: usize) {
        let next = match self.slots.position(slot) {
            SlotPosition::Waiting => return,
            SlotPosition::Chunk(number) => {
                self.unlink_reader(slot, number);
                number + 1
            }
            SlotPosition::Detached(number) if number + 1 < self.first_chunk => {
                return self.slots.set_detached(slot, number + 1);
            }
            SlotPosition::Detached(number) => number + 1,
        };
        let index = usize::try_from(next - self.first_chunk).unwrap_or(usize::MAX);
        let list = self.chunks.get_mut(index).map_or(&mut self.at_end, |chunk| &mut chunk.readers);
        self.slots.place(slot, SlotPosition::Chunk(next), list);
        self.discard_consumed();
    }

    /// The next bytes of a reader; `None` if there are none (yet).
    pub(super) fn next_bytes(&mut self, slot: usize) -> Option<Bytes> {
        let SlotPosition::Chunk(number) = self.slots.position(slot) else { return None };
        let index = usize::try_from(number.checked_sub(self.first_chunk)?).ok()?;
        self.chunks.get(index).map(|chunk| chunk.data.clone())
    }

    /// Appends bytes and wakes the readers that wait for them.
    pub(super) fn push(&mut self, data: Bytes) {
        self.end += data.len() as u64;
        let readers = std::mem::take(&mut self.at_end);
        self.slots.wake(&readers);
        self.chunks.push_back(FillChunk { data, readers });
        self.discard_consumed();
    }

    /// The buffered chunks.
    pub(super) fn chunks(&self) -> impl Iterator<Item = &Bytes> {
        self.chunks.iter().map(|chunk| &chunk.data)
    }

    /// Bytes of the body so far.
    pub(super) fn length(&self) -> u64 {
        self.end
    }

    /// Bytes that are buffered.
    pub(super) fn buffered(&self) -> u64 {
        self.end - self.start
    }

    /// Wakes the requests that wait for the head.
    pub(super) fn wake_waiting(&mut self) {
        self.slots.wake(&self.waiting);
    }

    /// Registers the task that fetches. It is woken when it can go on, and when no request is left.
    pub(super) fn register_fetch(&mut self, cx: &Context<'_>) {
        match &mut self.fetch_waker {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
    }

    pub(super) fn wake_fetch(&mut self) {
        if let Some(waker) = self.fetch_waker.take() {
            waker.wake();
        }
    }

    /// Whether a request waits for the head.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Leaves the fill without a leader, after `new_failures` of its fetches, and wakes one waiting
    /// request, which leads next. Returns false if no request waits.
    pub(super) fn hand_over(&mut self, new_failures: u8) -> bool {
        let FillPhase::Waiting { failures, .. } = self.phase else { return false };
        if !self.has_waiting() {
            return false;
        }
        self.phase = FillPhase::Waiting { has_leader: false, failures: failures + new_failures };
        // A waiting request without a waker was woken before or was not polled yet. It finds the
        // phase when it is polled.
        self.slots.wake_first(&self.waiting);
        true
    }

    /// Makes every waiting request a reader of the whole body.
    pub(super) fn start_readers(&mut self, response: Response) {
        self.phase = FillPhase::Streaming(Arc::new(response), BodyProgress::Open);
        let position = SlotPosition::Chunk(self.first_chunk);
        while let Some(slot) = self.slots.pop(&mut self.waiting) {
            // No chunk was pushed before the head.
            self.slots.place(slot, position, &mut self.at_end);
            self.slots.wake_slot(slot);
        }
    }

    /// Ends the body and wakes the readers that wait for more of it.
    pub(super) fn end_body(&mut self, end: BodyProgress) {
        if let FillPhase::Streaming(_, body) = &mut self.phase {
            *body = end;
        }
        self.slots.wake(&self.at_end);
    }

    /// Whether bytes may follow.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.phase, FillPhase::Streaming(_, BodyProgress::Open))
    }

    /// Whether the body is buffered from its first byte.
    pub(super) fn keeps_whole(&self) -> bool {
        matches!(self.buffering, Buffering::Whole { .. })
    }

    /// Changes what is buffered, from the whole body to less.
    pub(super) fn keep_less(&mut self, buffering: Buffering) {
        self.buffering = buffering;
        self.discard_consumed();
    }

    /// Keeps a window only. The backlog is added to it.
    pub(super) fn keep_window(&mut self) {
        self.keep_less(Buffering::Window(WINDOW_BYTES));
        self.buffering = Buffering::Window(WINDOW_BYTES + self.buffered());
    }

    /// Whether the fetch goes on: for a reader, or for the store.
    pub(super) fn has_purpose(&self) -> bool {
        self.slots.has_attached() || self.buffering == Buffering::Whole { is_wanted: true }
    }

    /// Detaches the readers that are `window` bytes behind, if another reader has read everything
    /// and waits: the slow ones must not hold it back. Returns whether one was detached.
    pub(super) fn detach_slow_readers(&mut self, window: u64) -> bool {
        !self.at_end.is_empty() && self.detach_readers_behind(window)
    }

    /// Frees what is buffered beyond the smallest window, unless the body is kept whole.
    pub(super) fn shed(&mut self) {
        self.detach_readers_behind(WINDOW_BYTES_MIN);
        if let Buffering::Window(window) = &mut self.buffering {
            // The backlog that was a part of it is gone.
            *window = WINDOW_BYTES;
        }
    }

    /// Detaches the readers that are `window` bytes behind, of a body that is not kept whole.
    /// Returns whether one was detached.
    fn detach_readers_behind(&mut self, window: u64) -> bool {
        if self.keeps_whole() {
            return false;
        }
        let mut is_detached = false;
        while self.start + window <= self.end
            && let Some(chunk) = self.chunks.front_mut()
        {
            while let Some(slot) = self.slots.pop(&mut chunk.readers) {
                self.slots.set_detached(slot, self.first_chunk);
                self.slots.wake_slot(slot);
                is_detached = true;
            }
            self.discard_consumed();
        }
        is_detached
    }

    /// Frees the first chunks that no reader has to read, unless the body is kept whole.
    fn discard_consumed(&mut self) {
        if self.keeps_whole() {
            return;
        }
        let mut is_freed = false;
        while let Some(chunk) = self.chunks.front()
            && chunk.readers.is_empty()
        {
            self.start += chunk.data.len() as u64;
            self.first_chunk += 1;
            self.chunks.pop_front();
            is_freed = true;
        }
        if is_freed {
            self.wake_fetch();
        }
    }

    fn unlink_reader(&mut self, slot: usize, number: u64) {
        let index = usize::try_from(number - self.first_chunk).unwrap_or(usize::MAX);
        let list = self.chunks.get_mut(index).map_or(&mut self.at_end, |chunk| &mut chunk.readers);
        self.slots.unlink(slot, list);
    }
}
