//! The network between nodes and lease backend: message delays, lost messages, unreachable nodes.
//!
//! Invariant: a request ends exactly once, with its reply or as failed; what arrives after its
//! deadline is dropped.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use limiter::{LeaseGrant, LeaseRequest};

use crate::MS;
use crate::random::Random;

/// The gateway's deadline.
const DEADLINE: u64 = 100 * MS;
/// A refused connection is known this soon.
const REFUSED: u64 = MS;

/// One request of one node.
#[derive(Clone, Copy)]
pub(crate) struct RequestId {
    pub(crate) node: usize,
    pub(crate) number: u64,
}

/// A message at its destination, or the failure of a request.
pub(crate) enum Arrival {
    Request { id: RequestId, request: LeaseRequest },
    Reply { id: RequestId, grant: LeaseGrant },
    Failure { id: RequestId },
}

pub(crate) struct Network {
    random: Random,
    /// A message takes at least 0.5 ms, and up to this many microseconds more.
    pub(crate) jitter: u64,
    /// Lost messages per million.
    pub(crate) lost: u64,
    pub(crate) is_down: bool,
    pub(crate) cut_off: Vec<bool>,
    due: BinaryHeap<Reverse<(u64, u64)>>,
    sent: Vec<Option<Arrival>>,
}

impl Network {
    pub(crate) fn new(nodes: usize, random: Random) -> Network {
        let cut_off = vec![false; nodes];
        Network { random, jitter: 2_000, lost: 0, is_down: false, cut_off, due: BinaryHeap::new(), sent: Vec::new() }
    }

    pub(crate) fn send_request(&mut self, id: RequestId, request: LeaseRequest, now: u64) {
        self.schedule(now + if self.is_down { REFUSED } else { DEADLINE }, Arrival::Failure { id });
        if !self.is_down {
            self.transmit(id.node, Arrival::Request { id, request }, now);
        }
    }

    pub(crate) fn send_reply(&mut self, id: RequestId, grant: LeaseGrant, now: u64) {
        self.transmit(id.node, Arrival::Reply { id, grant }, now);
    }

    /// The next message that arrived by `now`, with its time of arrival.
    pub(crate) fn next_arrival(&mut self, now: u64) -> Option<(u64, Arrival)> {
        self.due.peek().filter(|Reverse((at, _))| *at <= now)?;
        let Reverse((at, index)) = self.due.pop()?;
        self.sent[index as usize].take().map(|arrival| (at, arrival))
    }

    fn transmit(&mut self, node: usize, arrival: Arrival, now: u64) {
        let takes = MS / 2 + self.random.below(self.jitter);
        if !self.cut_off[node] && !self.random.chance(self.lost) {
            self.schedule(now + takes, arrival);
        }
    }

    fn schedule(&mut self, at: u64, arrival: Arrival) {
        self.due.push(Reverse((at, self.sent.len() as u64)));
        self.sent.push(Some(arrival));
    }
}
