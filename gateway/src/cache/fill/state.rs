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
pub(super) enum BodyEnd {
    Open,
    Complete,
    /// The body failed, for this reason.
    Aborted(BodyError),
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
    /// The body in one buffer, once it is complete and kept. It replaces the data of the chunks.
    whole: Option<Bytes>,
    pub(super) body_end: BodyEnd,
    pub(super) trailers: Option<Arc<Fields>>,
    /// Failed fetches.
    pub(super) failures: u8,
    /// Whether the body is buffered from its first byte, to be stored and for requests that join
    /// later.
    pub(super) keeps_body: bool,
    /// Whether a body that is kept is completed without a reader: a client had the object already,
    /// the store does not.
    pub(super) is_wanted: bool,
    /// Bytes that a reader may be behind the end of a body that is not kept any more, in addition
    /// to those that were buffered when keeping ended: a request that came later, and reads as fast
    /// as the others, is not cut.
    pub(super) window: u64,
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
                phase: FillPhase::Waiting { has_leader: true },
                chunks: VecDeque::new(),
                first_chunk: 0,
                start: 0,
                end: 0,
                whole: None,
                body_end: BodyEnd::Open,
                trailers: None,
                failures: 0,
                keeps_body: true,
                is_wanted: false,
                window: WINDOW_BYTES,
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

    /// Adds a reader at the first byte. The body must be kept.
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
            // Its chunk may have been a part of the whole body; then no chunk follows.
            SlotPosition::Chunk(number) if number == self.chunks_end() => return,
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

    /// The next bytes of a reader that has read `offset` bytes; `None` if there are none (yet).
    pub(super) fn next_bytes(&mut self, slot: usize, offset: u64) -> Option<Bytes> {
        if offset >= self.end {
            return None;
        }
        if let Some(whole) = &self.whole {
            return Some(whole.slice(usize::try_from(offset).ok()?..));
        }
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

    /// Replaces the chunks by the whole body. The readers that are left share its buffer.
    pub(super) fn set_whole(&mut self, body: Bytes) {
        self.end = body.len() as u64;
        self.chunks.iter_mut().for_each(|chunk| chunk.data = Bytes::new());
        self.whole = Some(body);
    }

    /// The buffered chunks.
    pub(super) fn chunks(&self) -> impl Iterator<Item = &Bytes> {
        self.chunks.iter().map(|chunk| &chunk.data)
    }

    /// Wakes the requests that wait for the head.
    pub(super) fn wake_waiting(&mut self) {
        self.slots.wake(&self.waiting);
    }

    /// Wakes the readers that wait for more of the body.
    pub(super) fn wake_readers(&mut self) {
        self.slots.wake(&self.at_end);
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

    /// Leaves the fill without a leader and wakes one waiting request, which leads next. Returns
    /// false if no request waits.
    pub(super) fn hand_over(&mut self) -> bool {
        if !self.has_waiting() {
            return false;
        }
        self.phase = FillPhase::Waiting { has_leader: false };
        // A waiting request without a waker was woken before or was not polled yet. It finds the
        // phase when it is polled.
        self.slots.wake_first(&self.waiting);
        true
    }

    /// Makes every waiting request a reader of the whole body.
    pub(super) fn start_readers(&mut self, response: Response) {
        self.phase = FillPhase::Streaming(Arc::new(response));
        let position = SlotPosition::Chunk(self.first_chunk);
        while let Some(slot) = self.slots.pop(&mut self.waiting) {
            // No chunk was pushed before the head.
            self.slots.place(slot, position, &mut self.at_end);
            self.slots.wake_slot(slot);
        }
    }

    /// Stops keeping the body. Its backlog becomes the window.
    pub(super) fn stop_keeping(&mut self) {
        self.keeps_body = false;
        self.discard_consumed();
        self.window = WINDOW_BYTES + self.end - self.start;
    }

    /// Whether the fetch goes on: for a reader, or for the store.
    pub(super) fn has_purpose(&self) -> bool {
        self.slots.has_attached() || (self.is_wanted && self.keeps_body)
    }

    /// Detaches the readers that are `window` bytes behind, if another reader has read everything
    /// and waits: the slow ones must not hold it back. Returns whether one was detached.
    pub(super) fn detach_slow_readers(&mut self, window: u64) -> bool {
        !self.at_end.is_empty() && self.detach_readers_behind(window)
    }

    /// Detaches the readers that are `window` bytes behind, of a body that is not kept. Returns
    /// whether one was detached.
    pub(super) fn detach_readers_behind(&mut self, window: u64) -> bool {
        if self.keeps_body {
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

    /// Frees the first chunks that no reader has to read, if the body is not kept.
    pub(super) fn discard_consumed(&mut self) {
        if self.keeps_body {
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

    /// The number of the chunk that is pushed next.
    fn chunks_end(&self) -> u64 {
        self.first_chunk + self.chunks.len() as u64
    }

    fn unlink_reader(&mut self, slot: usize, number: u64) {
        let index = usize::try_from(number - self.first_chunk).unwrap_or(usize::MAX);
        let list = self.chunks.get_mut(index).map_or(&mut self.at_end, |chunk| &mut chunk.readers);
        self.slots.unlink(slot, list);
    }
}
