//! Owns the way between nodes and treasury: how long a message takes, which are lost, who cannot reach whom.
//!
//! Invariant: an ask ends, with its answer or as failed, and never twice; what comes after its deadline is dropped.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use limiter::{Ask, Grant};

use crate::MS;
use crate::random::Random;

/// As the gateway's.
const DEADLINE: u64 = 100 * MS;
/// A connection that is refused is known to be at once.
const REFUSED: u64 = MS;

/// What arrives somewhere.
pub(crate) enum Arrival {
    Asked { node: usize, number: u64, ask: Ask },
    Answered { node: usize, number: u64, grant: Grant },
    Failed { node: usize, number: u64 },
}

pub(crate) struct Wire {
    random: Random,
    /// Each way: at least 0.5 ms, and up to this many microseconds more.
    pub(crate) jitter: u64,
    /// Messages of a million that vanish.
    pub(crate) lost: u64,
    pub(crate) is_down: bool,
    pub(crate) cut_off: Vec<bool>,
    due: BinaryHeap<Reverse<(u64, u64)>>,
    sent: Vec<Option<Arrival>>,
}

impl Wire {
    pub(crate) fn new(nodes: usize, random: Random) -> Wire {
        let cut_off = vec![false; nodes];
        Wire { random, jitter: 2_000, lost: 0, is_down: false, cut_off, due: BinaryHeap::new(), sent: Vec::new() }
    }

    pub(crate) fn ask(&mut self, node: usize, number: u64, ask: Ask, now: u64) {
        self.send(now + if self.is_down { REFUSED } else { DEADLINE }, Arrival::Failed { node, number });
        if !self.is_down {
            self.pass(node, Arrival::Asked { node, number, ask }, now);
        }
    }

    pub(crate) fn answer(&mut self, node: usize, number: u64, grant: Grant, now: u64) {
        self.pass(node, Arrival::Answered { node, number, grant }, now);
    }

    /// The next message that is there by `now`, with the time at which it came.
    pub(crate) fn arrived(&mut self, now: u64) -> Option<(u64, Arrival)> {
        self.due.peek().filter(|Reverse((at, _))| *at <= now)?;
        let Reverse((at, index)) = self.due.pop()?;
        self.sent[index as usize].take().map(|arrival| (at, arrival))
    }

    fn pass(&mut self, node: usize, arrival: Arrival, now: u64) {
        let takes = MS / 2 + self.random.below(self.jitter);
        if !self.cut_off[node] && !self.random.chance(self.lost) {
            self.send(now + takes, arrival);
        }
    }

    fn send(&mut self, at: u64, arrival: Arrival) {
        self.due.push(Reverse((at, self.sent.len() as u64)));
        self.sent.push(Some(arrival));
    }
}
