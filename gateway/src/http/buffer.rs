//! Buffers from a per-thread pool: a connection holds one only while it has bytes to read or to write.
//!
//! The one given back last is taken first, so that thousands of connections read into the few that the caches hold.
//! Invariant: `start <= end <= space.len()`, and the bytes between are received and not consumed.

use std::cell::RefCell;
use std::io;
use std::task::{Context, Poll, ready};

use super::io::Io;

/// A first buffer; holds an ordinary head.
const SMALL: usize = 16 << 10;
/// What a buffer grows to when a read fills it: fewer system calls for large bodies.
const LARGE: usize = 64 << 10;
/// Buffers of each size kept by a thread: 8 MiB of small and 2 MiB of large ones at most.
const POOLED: [usize; 2] = [512, 32];

thread_local! {
    static POOL: RefCell<[Vec<Vec<u8>>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

fn take(large: bool) -> Vec<u8> {
    POOL.with_borrow_mut(|pool| pool[usize::from(large)].pop())
        .unwrap_or_else(|| vec![0; if large { LARGE } else { SMALL }])
}

fn give(space: Vec<u8>) {
    let large = match space.len() {
        SMALL => false,
        LARGE => true,
        _ => return,
    };
    POOL.with_borrow_mut(|pool| {
        let shelf = &mut pool[usize::from(large)];
        if shelf.len() < POOLED[usize::from(large)] {
            shelf.push(space);
        }
    });
}

/// What is kept of an output buffer: room for an ordinary head and a small body.
const OUT: usize = 8 << 10;
/// Output buffers kept by a thread: 2 MiB at most.
const OUT_POOLED: usize = 256;

thread_local! {
    static OUT_POOL: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Makes `out` an empty buffer to write a message into.
pub fn take_out(out: &mut Vec<u8>) {
    OUT_POOL.with_borrow_mut(|pool| match pool.pop() {
        Some(pooled) => *out = pooled,
        None => *out = Vec::with_capacity(OUT),
    });
}

/// Takes it back; one that has grown is not kept.
pub fn give_out(mut out: Vec<u8>) {
    if out.capacity() == OUT {
        out.clear();
        OUT_POOL.with_borrow_mut(|pool| {
            if pool.len() < OUT_POOLED {
                pool.push(out);
            }
        });
    }
}

/// Received bytes that wait to be parsed.
#[derive(Default)]
pub struct Buffer {
    space: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub fn data(&self) -> &[u8] {
        &self.space[self.start..self.end]
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Gives the memory back while nothing waits in it.
    pub fn release(&mut self) {
        if self.is_empty() && !self.space.is_empty() {
            give(std::mem::take(&mut self.space));
        }
    }

    /// Reads once. `want` is how many unconsumed bytes must fit in all (a head's limit, or 1 for a body).
    /// Returns 0 at the end of the stream. Cancel safe.
    pub fn poll_fill(&mut self, io: &Io, cx: &mut Context<'_>, want: usize) -> Poll<io::Result<usize>> {
        if self.space.is_empty() {
            // Nothing is held while nothing has arrived.
            ready!(io.poll_readable(cx))?;
        }
        self.make_room(want);
        let room = self.space.len() - self.end;
        let Poll::Ready(read) = io.poll_read(cx, &mut self.space[self.end..]) else {
            self.release();
            return Poll::Pending;
        };
        let count = read?;
        self.end += count;
        if count == room && self.space.len() == SMALL {
            self.grow(LARGE);
        }
        Poll::Ready(Ok(count))
    }

    fn make_room(&mut self, want: usize) {
        if self.space.is_empty() {
            self.space = take(false);
        }
        if self.end < self.space.len() {
            return;
        }
        if self.start > 0 {
            self.space.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        } else {
            self.grow(LARGE.max(want.next_power_of_two()).max(self.space.len() * 2));
        }
    }

    fn grow(&mut self, size: usize) {
        let mut space = if size == LARGE { take(true) } else { vec![0; size] };
        let held = self.end - self.start;
        space[..held].copy_from_slice(&self.space[self.start..self.end]);
        give(std::mem::replace(&mut self.space, space));
        self.start = 0;
        self.end = held;
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.space.is_empty() {
            give(std::mem::take(&mut self.space));
        }
    }
}
