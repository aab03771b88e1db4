//! Calls that wait for their turn: bounded in number and in time.
//!
//! The heaviest user class is served first, and within a class the oldest call; under overload,
//! when the oldest one has waited for a while, the newest: its client has most of its patience
//! left. A full queue drops the oldest call of the lightest class.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Most calls that wait. Each holds its request and its connection.
const WAITING_MAX: usize = 1_024;
/// The oldest call of a class has waited for longer: calls come faster than they are served.
const OVERLOAD_WAIT: Duration = Duration::from_millis(100);

/// Waiting calls of type `T`, by the weight of their user class in thousandths.
pub(super) struct WaitQueue<T> {
    /// Oldest first; no list is empty.
    classes: BTreeMap<u32, VecDeque<(Duration, T)>>,
    len: usize,
}

impl<T> WaitQueue<T> {
    pub(super) fn new() -> Self {
        WaitQueue { classes: BTreeMap::new(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_full(&self) -> bool {
        self.len >= WAITING_MAX
    }

    /// Adds a call. Returns the one that has to leave a full queue, which may be the new one.
    pub(super) fn push(&mut self, weight: u32, call: T, now: Duration) -> Option<T> {
        let mut dropped = None;
        if self.is_full() {
            let lightest = *self.classes.first_key_value()?.0;
            if lightest > weight {
                return Some(call);
            }
            let calls = self.classes.get_mut(&lightest)?;
            dropped = calls.pop_front().map(|(_, call)| call);
            self.len -= usize::from(dropped.is_some());
            if calls.is_empty() {
                self.classes.remove(&lightest);
            }
        }
        self.classes.entry(weight).or_default().push_back((now, call));
        self.len += 1;
        dropped
    }

    /// Takes the next call that is still awaited, with the time at which it came.
    pub(super) fn pop(&mut self, now: Duration, is_awaited: impl Fn(&T) -> bool) -> Option<(Duration, T)> {
        loop {
            let weight = *self.classes.last_key_value()?.0;
            let calls = self.classes.get_mut(&weight)?;
            let before = calls.len();
            while calls.pop_front_if(|(_, call)| !is_awaited(call)).is_some() {}
            self.len -= before - calls.len();
            let is_overloaded = calls.front().is_some_and(|(since, _)| now.saturating_sub(*since) > OVERLOAD_WAIT);
            let call = if is_overloaded { calls.pop_back() } else { calls.pop_front() };
            self.len -= usize::from(call.is_some());
            if calls.is_empty() {
                self.classes.remove(&weight);
            }
            if call.as_ref().is_some_and(|(_, call)| is_awaited(call)) {
                return call;
            }
        }
    }

    /// Removes the calls that are not awaited any more.
    pub(super) fn retain(&mut self, is_awaited: impl Fn(&T) -> bool) {
        self.classes.values_mut().for_each(|calls| calls.retain(|(_, call)| is_awaited(call)));
        self.classes.retain(|_, calls| !calls.is_empty());
        self.len = self.classes.values().map(VecDeque::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn take_all(queue: &mut WaitQueue<u32>, now: Duration) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop(now, |_| true)).map(|(_, call)| call).collect()
    }

    #[test]
    fn heavy_classes_are_served_first_and_within_a_class_the_oldest() {
        let mut queue = WaitQueue::new();
        for (weight, call) in [(1_000, 1), (3_200, 2), (1_000, 3), (3_200, 4), (2_000, 5)] {
            assert_eq!(queue.push(weight, call, MS * call), None);
        }
        assert_eq!((take_all(&mut queue, 10 * MS), queue.len()), (vec![2, 4, 5, 1, 3], 0));
    }

    #[test]
    fn newest_is_served_first_once_the_oldest_has_waited_for_long() {
        let mut queue = WaitQueue::new();
        (0..5).for_each(|call| assert_eq!(queue.push(1_000, call, 40 * MS * call), None));
        assert_eq!(queue.pop(100 * MS, |_| true), Some((Duration::ZERO, 0)));
        assert_eq!(queue.pop(200 * MS, |_| true), Some((160 * MS, 4)));
        assert_eq!(queue.pop(200 * MS, |call| *call != 1 && *call != 3), Some((80 * MS, 2)));
        assert_eq!((queue.pop(200 * MS, |call| *call != 3), queue.len()), (None, 0));
    }

    #[test]
    fn full_queue_drops_the_oldest_of_the_lightest_class() {
        let mut queue = WaitQueue::new();
        assert_eq!(queue.push(2_000, 0, MS), None);
        (1..1_024).for_each(|call| assert_eq!(queue.push(1_000, call, MS), None));
        assert_eq!(queue.push(1_000, 1_024, MS), Some(1));
        assert_eq!(queue.push(2_000, 1_025, MS), Some(2));
        assert_eq!(queue.push(500, 1_026, MS), Some(1_026), "lighter than all others");
        assert_eq!(queue.len(), 1_024);
        queue.retain(|call| call % 2 == 0);
        assert_eq!(queue.len(), 512);
    }
}
