//! One slot for each request at a fill, in lists by what the request waits for or reads next.
//!
//! A slot is in one list at most. Nothing scans all slots: a step visits the slot that moves and
//! its neighbours, or the slots that it wakes.

use std::task::{Context, Waker};

use slab::Slab;

/// The next thing that a request waits for or reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotPosition {
    /// The head.
    Waiting,
    /// The chunk of this number, counted from the first one of the body.
    Chunk(u64),
    /// The reader was a window behind at this chunk and gets no more bytes.
    Detached(u64),
}

/// One request at a fill.
struct FillSlot {
    waker: Option<Waker>,
    position: SlotPosition,
    previous: Option<usize>,
    next: Option<usize>,
}

/// A doubly linked list of slots, oldest first.
#[derive(Default)]
pub(super) struct SlotList {
    first: Option<usize>,
    last: Option<usize>,
}

impl SlotList {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }
}

/// All slots of one fill.
#[derive(Default)]
pub(super) struct FillSlots {
    slots: Slab<FillSlot>,
    detached: usize,
    /// Slots that were read or changed.
    #[cfg(test)]
    pub(super) visits: usize,
}

impl FillSlots {
    /// Whether the request gets no more bytes of the shared fetch.
    pub(super) fn is_detached(&mut self, slot: usize) -> bool {
        matches!(self.position(slot), SlotPosition::Detached(_))
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether a request is left that gets the next bytes.
    pub(super) fn has_attached(&self) -> bool {
        self.slots.len() > self.detached
    }

    pub(super) fn insert(&mut self, position: SlotPosition, list: &mut SlotList) -> usize {
        let slot = self.slots.insert(FillSlot { waker: None, position, previous: None, next: None });
        self.link(slot, list);
        slot
    }

    /// Removes a slot that is in no list.
    pub(super) fn remove(&mut self, slot: usize) {
        if let SlotPosition::Detached(_) = self.slots.remove(slot).position {
            self.detached -= 1;
        }
    }

    pub(super) fn position(&mut self, slot: usize) -> SlotPosition {
        self.visit(slot).position
    }

    /// Moves a slot that is in no list to the end of `list`.
    pub(super) fn place(&mut self, slot: usize, position: SlotPosition, list: &mut SlotList) {
        let old = std::mem::replace(&mut self.visit(slot).position, position);
        if let SlotPosition::Detached(_) = old {
            self.detached -= 1;
        }
        self.link(slot, list);
    }

    /// Marks a slot that is in no list as detached.
    pub(super) fn set_detached(&mut self, slot: usize, chunk: u64) {
        let old = std::mem::replace(&mut self.visit(slot).position, SlotPosition::Detached(chunk));
        if !matches!(old, SlotPosition::Detached(_)) {
            self.detached += 1;
        }
    }

    /// Registers the task of a slot for the next change. One slot has one waker, so that a wakeup
    /// costs the same whatever the number of slots.
    pub(super) fn register(&mut self, slot: usize, cx: &Context<'_>) {
        match &mut self.visit(slot).waker {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
    }

    /// Wakes the first task of a list, if it is registered.
    pub(super) fn wake_first(&mut self, list: &SlotList) {
        if let Some(slot) = list.first {
            self.wake_slot(slot);
        }
    }

    /// Wakes every task of a list that is registered.
    pub(super) fn wake(&mut self, list: &SlotList) {
        let mut next = list.first;
        while let Some(slot) = next {
            self.wake_slot(slot);
            next = self.slots[slot].next;
        }
    }

    pub(super) fn wake_slot(&mut self, slot: usize) {
        if let Some(waker) = self.visit(slot).waker.take() {
            waker.wake();
        }
    }

    /// Removes and returns the first slot of a list.
    pub(super) fn pop(&mut self, list: &mut SlotList) -> Option<usize> {
        let slot = list.first?;
        self.unlink(slot, list);
        Some(slot)
    }

    pub(super) fn unlink(&mut self, slot: usize, list: &mut SlotList) {
        let FillSlot { previous, next, .. } = self.visit(slot);
        let (previous, next) = (previous.take(), next.take());
        match previous {
            Some(previous) => self.visit(previous).next = next,
            None => list.first = next,
        }
        match next {
            Some(next) => self.visit(next).previous = previous,
            None => list.last = previous,
        }
    }

    fn link(&mut self, slot: usize, list: &mut SlotList) {
        let last = list.last.replace(slot);
        self.visit(slot).previous = last;
        match last {
            Some(last) => self.visit(last).next = Some(slot),
            None => list.first = Some(slot),
        }
    }

    fn visit(&mut self, slot: usize) -> &mut FillSlot {
        #[cfg(test)]
        {
            self.visits += 1;
        }
        &mut self.slots[slot]
    }
}
