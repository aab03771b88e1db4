//! Calls that wait for their turn: bounded in number and in time.
//!
//! User classes share the turns by their weights (stride scheduling): a class of weight 3.2 gets
//! 3.2 turns for each one of weight 1 while both wait, so that no class starves another. Within a
//! class the oldest call is served first; under overload, when the oldest one has waited for a
//! while, the newest: its client has most of its patience left. The places of a full queue are
//! shared by the weights too: the class with the most calls for its weight loses its oldest one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Most calls that wait. Each holds its request and its connection.
const WAITING_MAX: usize = 1_024;
/// The oldest call of a class has waited for longer: calls come faster than they are served.
const OVERLOAD_WAIT: Duration = Duration::from_millis(100);
/// The distance between two turns of a class of weight 1 (in thousandths).
const STRIDE: u128 = 1 << 40;

/// Waiting calls of type `T`, by the weight of their user class in thousandths.
pub(super) struct WaitQueue<T> {
    /// No class is empty.
    classes: BTreeMap<u32, WaitingClass<T>>,
    len: usize,
    /// The turn of the call that was served last.
    turn: u128,
}

/// The waiting calls of one user class.
struct WaitingClass<T> {
    /// Oldest first.
    calls: VecDeque<(Duration, T)>,
    /// Its next turn. The class with the earliest one is served.
    turn: u128,
}

impl<T> WaitQueue<T> {
    pub(super) fn new() -> Self {
        WaitQueue { classes: BTreeMap::new(), len: 0, turn: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_full(&self) -> bool {
        self.len >= WAITING_MAX
    }

    /// Adds a call. Returns the one that has to leave a full queue.
    pub(super) fn push(&mut self, weight: u32, call: T, now: Duration) -> Option<T> {
        let is_full = self.is_full();
        // A class that begins to wait has no claim to turns that have passed.
        let turn = self.turn + stride(weight);
        let class = self.classes.entry(weight).or_insert_with(|| WaitingClass { calls: VecDeque::new(), turn });
        class.calls.push_back((now, call));
        self.len += 1;
        if is_full { self.drop_one() } else { None }
    }

    /// Removes the oldest call of the class that has the most for its weight; of equal ones, the
    /// lightest.
    fn drop_one(&mut self) -> Option<T> {
        let excess = |(weight, class): (&u32, &WaitingClass<T>)| {
            class.calls.len() as u64 * 1_000_000 / u64::from((*weight).max(1))
        };
        let largest = self.classes.iter().rev().max_by_key(|(weight, class)| excess((weight, class)));
        let weight = *largest?.0;
        let class = self.classes.get_mut(&weight)?;
        let (_, dropped) = class.calls.pop_front()?;
        self.len -= 1;
        if class.calls.is_empty() {
            self.classes.remove(&weight);
        }
        Some(dropped)
    }

    /// Takes the next call that is still awaited, with the time at which it came.
    pub(super) fn pop(&mut self, now: Duration, is_awaited: impl Fn(&T) -> bool) -> Option<(Duration, T)> {
        loop {
            // Of equal turns, that of the heaviest class.
            let weight = *self.classes.iter().rev().min_by_key(|(_, class)| class.turn)?.0;
            let class = self.classes.get_mut(&weight)?;
            let before = class.calls.len();
            let call = class.take(now, &is_awaited);
            self.len -= before - class.calls.len();
            if call.is_some() {
                self.turn = class.turn;
                class.turn += stride(weight);
            }
            if class.calls.is_empty() {
                self.classes.remove(&weight);
            }
            if call.is_some() {
                return call;
            }
        }
    }

    /// Removes the calls that are not awaited any more.
    pub(super) fn retain(&mut self, is_awaited: impl Fn(&T) -> bool) {
        self.classes.values_mut().for_each(|class| class.calls.retain(|(_, call)| is_awaited(call)));
        self.classes.retain(|_, class| !class.calls.is_empty());
        self.len = self.classes.values().map(|class| class.calls.len()).sum();
    }
}

fn stride(weight: u32) -> u128 {
    STRIDE / u128::from(weight.max(1))
}

impl<T> WaitingClass<T> {
    /// Takes the next call that is still awaited; `None`: none is, and those that were seen are
    /// removed.
    fn take(&mut self, now: Duration, is_awaited: &impl Fn(&T) -> bool) -> Option<(Duration, T)> {
        loop {
            while self.calls.pop_front_if(|(_, call)| !is_awaited(call)).is_some() {}
            let is_overloaded = self.calls.front().is_some_and(|(since, _)| now.saturating_sub(*since) > OVERLOAD_WAIT);
            let call = if is_overloaded { self.calls.pop_back() } else { self.calls.pop_front() }?;
            if is_awaited(&call.1) {
                return Some(call);
            }
        }
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
    fn classes_share_the_turns_by_weight_and_within_a_class_the_oldest_is_first() {
        let mut queue = WaitQueue::new();
        for (weight, call) in [(1_000, 1), (3_200, 2), (1_000, 3), (3_200, 4), (2_000, 5)] {
            assert_eq!(queue.push(weight, call, MS * call), None);
        }
        // Turns at 0.31 and 0.63, 0.5, 1 and 2.
        assert_eq!((take_all(&mut queue, 10 * MS), queue.len()), (vec![2, 5, 4, 1, 3], 0));
    }

    /// A class that always waits gets its share, however many calls of a heavier one come.
    #[test]
    fn heavier_class_does_not_starve_a_lighter_one() {
        for (weight, expected) in [(1_500, 400), (3_200, 238), (9_000, 100)] {
            let mut queue = WaitQueue::new();
            for _ in 0..20 {
                queue.push(weight, 0, MS);
                queue.push(1_000, 1, MS);
            }
            let mut light = 0;
            for _ in 0..1_000 {
                // Another call of its class follows each one.
                let (_, call) = queue.pop(MS, |_| true).expect("a call");
                queue.push(if call == 1 { 1_000 } else { weight }, call, MS);
                light += call;
            }
            assert!((expected - 2..=expected + 2).contains(&light), "{weight}: {light}");
        }
    }

    /// A class that was idle gets no turns for that time.
    #[test]
    fn class_that_begins_to_wait_does_not_overtake_all_others() {
        let mut queue = WaitQueue::new();
        for call in 0..100 {
            queue.push(3_200, call, MS);
            queue.pop(MS, |_| true);
        }
        for call in 0..10 {
            queue.push(3_200, call, MS);
        }
        for call in 100..110 {
            queue.push(1_000, call, MS);
        }
        let first: Vec<_> = (0..8).filter_map(|_| queue.pop(MS, |_| true)).map(|(_, call)| call).collect();
        assert_eq!(first, [0, 1, 2, 100, 3, 4, 5, 101]);
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
    fn full_queue_drops_the_oldest_of_the_class_with_the_most_for_its_weight() {
        let mut queue = WaitQueue::new();
        assert_eq!(queue.push(2_000, 0, MS), None);
        (1..1_024).for_each(|call| assert_eq!(queue.push(1_000, call, MS), None));
        assert_eq!(queue.push(1_000, 1_024, MS), Some(1));
        assert_eq!(queue.push(2_000, 1_025, MS), Some(2));
        assert_eq!(queue.push(500, 1_026, MS), Some(3), "a light class has a place too");
        assert_eq!(queue.len(), 1_024);
        // Two classes fill it: the places are shared by weight.
        for _ in 0..4_000 {
            queue.push(2_000, 0, MS);
        }
        for _ in 0..4_000 {
            queue.push(1_000, 1, MS);
        }
        let mut calls = take_all(&mut queue, MS);
        calls.retain(|call| *call == 1);
        assert!((340..=343).contains(&calls.len()), "{}", calls.len());
    }

    #[test]
    fn calls_that_nobody_awaits_are_removed() {
        let mut queue = WaitQueue::new();
        for call in 0..100 {
            queue.push(1_000 + call % 3, call, MS);
        }
        queue.retain(|call| call % 2 == 0);
        assert_eq!(queue.len(), 50);
        assert_eq!(queue.pop(MS, |_| false), None);
        assert_eq!(queue.len(), 0);
    }
}
