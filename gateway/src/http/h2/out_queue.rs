//! The bytes of a connection that are not sent yet: frames of all streams, gathered so that one
//! write sends them.
//!
//! Heads and short payloads are copied. A longer payload from memory is kept as it is, between the
//! copied bytes.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};

use crate::http::transport::TransportStream;

/// Shorter payloads are copied: a slice of its own costs as much as copying about these bytes.
const COPY_MAX: usize = 2 << 10;
/// Slices of one write.
const SLICES_MAX: usize = 64;
/// Sent text is dropped from this size on, if it is at least half of the text: a queue that is
/// refilled before it is empty must not grow.
const SENT_MAX: usize = 32 << 10;
/// Space that an empty queue keeps.
const KEPT_MAX: usize = 16 << 10;

/// Unsent bytes, in order.
#[derive(Default)]
pub(super) struct OutQueue {
    text: Vec<u8>,
    /// Bytes of `text` that are sent.
    text_sent: usize,
    /// Payloads, each with the length of the text before it.
    payloads: VecDeque<(usize, Bytes)>,
    len: usize,
}

impl OutQueue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends what `write` appends to a buffer; it must not change what is there.
    pub(super) fn write<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let before = self.text.len();
        let written = write(&mut self.text);
        self.len += self.text.len() - before;
        written
    }

    /// Appends bytes that are in memory anyway.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if bytes.len() <= COPY_MAX {
            return self.write(|text| text.extend_from_slice(&bytes));
        }
        self.len += bytes.len();
        self.payloads.push_back((self.text.len(), bytes));
    }

    /// Writes until the queue is empty, or the socket accepts no more. Returns the bytes that were
    /// accepted by this call as soon as there are any and the socket has no room.
    pub(super) fn poll_write(&mut self, io: &TransportStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = self.slices(&mut slices);
        let written = ready!(io.poll_write_slices(cx, &slices[..count]))?;
        self.advance(written);
        Poll::Ready(Ok(written))
    }

    /// The first bytes, for a write to a socket that is not reported as writable.
    pub(super) fn front(&self) -> &[u8] {
        let end = self.payloads.front().map_or(self.text.len(), |(at, _)| *at);
        match &self.text[self.text_sent..end] {
            [] => self.payloads.front().map_or(&[], |(_, payload)| payload),
            text => text,
        }
    }

    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let (mut count, mut at) = (0, self.text_sent);
        let mut add = |slice: &'a [u8]| {
            if !slice.is_empty() && count < SLICES_MAX {
                slices[count] = IoSlice::new(slice);
                count += 1;
            }
        };
        for (end, payload) in self.payloads.iter().take(SLICES_MAX / 2) {
            add(&self.text[at..*end]);
            add(payload);
            at = *end;
        }
        if self.payloads.len() < SLICES_MAX / 2 {
            add(&self.text[at..]);
        }
        count
    }

    /// The first `count` bytes were sent.
    pub(super) fn advance(&mut self, count: usize) {
        self.len -= count;
        self.skip(count);
        if self.text_sent == self.text.len() && self.payloads.is_empty() {
            self.text.clear();
            self.text_sent = 0;
        } else if self.text_sent >= SENT_MAX && self.text_sent * 2 >= self.text.len() {
            self.text.drain(..self.text_sent);
            self.payloads.iter_mut().for_each(|(at, _)| *at -= self.text_sent);
            self.text_sent = 0;
        }
    }

    fn skip(&mut self, mut count: usize) {
        while let Some((at, payload)) = self.payloads.front_mut() {
            let text = count.min(*at - self.text_sent);
            self.text_sent += text;
            count -= text;
            if self.text_sent < *at {
                return;
            }
            let taken = count.min(payload.len());
            payload.advance(taken);
            count -= taken;
            if !payload.is_empty() {
                return;
            }
            self.payloads.pop_front();
        }
        self.text_sent += count;
    }

    /// Releases the space of an empty queue.
    pub(super) fn release(&mut self) {
        if self.len == 0 {
            *self = OutQueue::default();
        }
    }

    /// Releases what an empty queue does not need during a series of requests.
    pub(super) fn shrink(&mut self) {
        if self.len == 0 && self.text.capacity() > KEPT_MAX * 8 {
            self.text = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_that_never_becomes_empty_does_not_grow() {
        for (text_piece, payload_piece) in [(9_000, 0), (100, 8_000), (1, 0), (3_000, 3_000)] {
            let (mut queue, mut written, mut sent) = (OutQueue::default(), 0_u8, 0_u8);
            for round in 0..5_000 {
                while queue.len() < 40_000 {
                    let mut next = |length: usize| -> Vec<u8> {
                        (0..length)
                            .map(|_| {
                                written = written.wrapping_add(1);
                                written
                            })
                            .collect()
                    };
                    let text = next(text_piece);
                    queue.write(|out| out.extend_from_slice(&text));
                    queue.push(next(payload_piece).into());
                }
                let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                let count = queue.slices(&mut slices);
                let accepted: Vec<u8> =
                    slices[..count].iter().flat_map(|slice| slice.iter()).take(7_001).copied().collect();
                for byte in &accepted {
                    sent = sent.wrapping_add(1);
                    assert_eq!(*byte, sent, "{round}");
                }
                queue.advance(accepted.len());
                assert!(queue.text.capacity() <= 256 << 10, "{}", queue.text.capacity());
            }
        }
    }

    #[test]
    fn bytes_leave_in_order_whatever_the_socket_accepts() {
        for step in [1, 3, 1000, 5000, usize::MAX] {
            let (mut queue, mut expected) = (OutQueue::default(), Vec::new());
            for number in 0..100_u8 {
                let length = usize::from(number) * 97 % 5_000;
                queue.write(|text| text.extend_from_slice(&[number; 9]));
                queue.push(Bytes::from(vec![!number; length]));
                expected.extend([number; 9]);
                expected.resize(expected.len() + length, !number);
            }
            let mut sent = Vec::new();
            while queue.len() > 0 {
                let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                let count = queue.slices(&mut slices);
                assert!(slices[0].starts_with(queue.front()));
                let mut left = step;
                for slice in &slices[..count] {
                    let taken = slice.len().min(left);
                    sent.extend_from_slice(&slice[..taken]);
                    left -= taken;
                }
                queue.advance(step - left);
                assert_eq!(queue.len(), expected.len() - sent.len());
            }
            assert!(sent == expected, "{step}");
        }
    }
}
