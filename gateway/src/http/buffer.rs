//! Read and write buffers from a per-thread pool. A connection holds one only while it has bytes to
//! read or to write.
//!
//! The pool is last in, first out, so that thousands of connections share the few buffers that are
//! in the CPU cache. Invariant: `start <= end <= space.len()`, and the bytes between are received
//! and not consumed.

use std::cell::RefCell;
use std::io;
use std::task::{Context, Poll, ready};

use super::transport::TransportStream;

/// Bytes of a normal read buffer, the initial size: fits a typical message head.
const NORMAL: usize = 16 << 10;
/// Bytes of a large read buffer. A smaller one is replaced by it when a read fills it, unless few
/// bytes are to be read: it saves system calls for large bodies.
const LARGE: usize = 64 << 10;
/// Bytes of a buffer for `ReadSize::Short`: the whole of a short response.
pub(crate) const SHORT: usize = 4 << 10;
/// Bytes of a buffer for `ReadSize::Least`: the head of a response, and of a long body little more.
const LEAST: usize = 1 << 10;
/// The sizes of pooled read buffers, and how many of each a thread keeps: at most 12 MiB.
const POOLED: [(usize, usize); 3] = [(SHORT, 512), (NORMAL, 512), (LARGE, 32)];

thread_local! {
    static POOL: RefCell<[Vec<Vec<u8>>; POOLED.len()]> = const { RefCell::new([const { Vec::new() }; POOLED.len()]) };
}

/// A buffer of one of the pooled sizes, or a new one.
fn take_from_pool(size: usize) -> Vec<u8> {
    let pooled = POOLED.iter().position(|(pooled, _)| *pooled == size);
    pooled.and_then(|index| POOL.with_borrow_mut(|pools| pools[index].pop())).unwrap_or_else(|| vec![0; size])
}

fn return_to_pool(space: Vec<u8>) {
    let Some(index) = POOLED.iter().position(|(size, _)| *size == space.len()) else { return };
    POOL.with_borrow_mut(|pools| {
        if pools[index].len() < POOLED[index].1 {
            pools[index].push(space);
        }
    });
}

/// Bytes of a pooled write buffer: fits a typical message head and a small body.
const WRITE_BYTES: usize = 8 << 10;
/// Pooled write buffers per thread: at most 2 MiB.
const WRITE_POOL_MAX: usize = 256;

thread_local! {
    static WRITE_POOL: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Replaces `out` by an empty write buffer.
pub(crate) fn take_write_buffer(out: &mut Vec<u8>) {
    WRITE_POOL.with_borrow_mut(|pool| match pool.pop() {
        Some(pooled) => *out = pooled,
        None => *out = Vec::with_capacity(WRITE_BYTES),
    });
}

/// Returns a write buffer to the pool. One that has grown is freed instead.
pub(crate) fn return_write_buffer(mut out: Vec<u8>) {
    if out.capacity() == WRITE_BYTES {
        out.clear();
        WRITE_POOL.with_borrow_mut(|pool| {
            if pool.len() < WRITE_POOL_MAX {
                pool.push(out);
            }
        });
    }
}

/// How many bytes a connection reads before its reader asks for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadSize {
    /// As many as a system call gives, up to the size of a buffer.
    #[default]
    Normal,
    /// Enough for a short response: the reader holds several at once.
    Short,
    /// Few: the reader holds many bodies at once.
    Least,
}

impl ReadSize {
    /// Bytes of the space for a body, at most.
    fn bytes_max(self) -> usize {
        match self {
            ReadSize::Normal => usize::MAX,
            ReadSize::Short => SHORT,
            ReadSize::Least => LEAST,
        }
    }
}

/// Received bytes that are not parsed yet.
#[derive(Default)]
pub(crate) struct ReadBuffer {
    space: Vec<u8>,
    start: usize,
    end: usize,
    size: ReadSize,
    /// A read has filled the space.
    was_filled: bool,
}

impl ReadBuffer {
    pub(crate) fn data(&self) -> &[u8] {
        &self.space[self.start..self.end]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Sets the size of the space that is taken next.
    pub(crate) fn set_read_size(&mut self, size: ReadSize) {
        self.size = size;
    }

    /// Releases the space that the head of a message has needed, if few bytes are to be held.
    pub(crate) fn shrink(&mut self) {
        if self.size == ReadSize::Least && self.space.len() > LEAST {
            let mut space = vec![0; LEAST.max(self.end - self.start)];
            space[..self.end - self.start].copy_from_slice(&self.space[self.start..self.end]);
            (self.start, self.end) = (0, self.end - self.start);
            return_to_pool(std::mem::replace(&mut self.space, space));
        }
    }

    /// Returns the memory to the pool if the buffer is empty.
    pub(crate) fn release(&mut self) {
        self.was_filled = false;
        if self.is_empty() && !self.space.is_empty() {
            return_to_pool(std::mem::take(&mut self.space));
        }
    }

    /// Reads once. `capacity` is how many unconsumed bytes must fit in total (the limit of a head,
    /// or 1 for a body). Returns 0 at the end of the stream. Cancel safe.
    pub(crate) fn poll_fill(
        &mut self,
        io: &TransportStream,
        cx: &mut Context<'_>,
        capacity: usize,
    ) -> Poll<io::Result<usize>> {
        if self.is_empty() && self.space.len() > self.size.bytes_max() {
            // It was taken when more could be read.
            return_to_pool(std::mem::take(&mut self.space));
        }
        if self.space.is_empty() {
            // No memory is held before bytes have arrived.
            ready!(io.poll_readable(cx))?;
        }
        self.make_room(capacity);
        let room = self.space.len() - self.end;
        let Poll::Ready(read) = io.poll_read(cx, &mut self.space[self.end..]) else {
            self.release();
            return Poll::Pending;
        };
        let count = read?;
        self.end += count;
        self.was_filled = count == room;
        Poll::Ready(Ok(count))
    }

    fn make_room(&mut self, capacity: usize) {
        if self.space.is_empty() {
            self.space = match self.size {
                ReadSize::Normal => take_from_pool(NORMAL),
                ReadSize::Short => take_from_pool(SHORT),
                ReadSize::Least => vec![0; LEAST],
            };
        }
        if self.was_filled && self.space.len() < LARGE && self.size == ReadSize::Normal {
            // The next read gets the space for more.
            self.grow(LARGE);
        }
        if self.end < self.space.len() {
            return;
        }
        if self.start > 0 {
            self.space.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        } else if self.size != ReadSize::Normal {
            self.grow(self.space.len() * 2);
        } else {
            self.grow(LARGE.max(capacity.next_power_of_two()).max(self.space.len() * 2));
        }
    }

    fn grow(&mut self, size: usize) {
        let mut space = take_from_pool(size);
        let unconsumed = self.end - self.start;
        space[..unconsumed].copy_from_slice(&self.space[self.start..self.end]);
        return_to_pool(std::mem::replace(&mut self.space, space));
        self.start = 0;
        self.end = unconsumed;
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        if !self.space.is_empty() {
            return_to_pool(std::mem::take(&mut self.space));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write as _;

    use super::*;

    /// Reads once and consumes what was read. Returns the size of the space.
    async fn read(buffer: &mut ReadBuffer, io: &TransportStream) -> usize {
        let count = poll_fn(|cx| buffer.poll_fill(io, cx, 1)).await.expect("a live socket");
        assert!(count > 0, "the end of the body");
        buffer.consume(count);
        buffer.space.len()
    }

    /// The space follows the size although bytes are always there to be read.
    #[tokio::test]
    async fn space_of_a_long_body_changes_with_the_size() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let mut origin = std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("a connection");
        let (accepted, _) = listener.accept().expect("the connection");
        accepted.set_nonblocking(true).expect("a live socket");
        let writing = std::thread::spawn(move || origin.write_all(&vec![0; 1 << 20]));
        let io = TransportStream::plain(tokio::net::TcpStream::from_std(accepted).expect("a runtime"));
        let mut buffer = ReadBuffer::default();
        for (size, bytes) in
            [(ReadSize::Least, LEAST), (ReadSize::Normal, LARGE), (ReadSize::Short, SHORT), (ReadSize::Least, LEAST)]
        {
            buffer.set_read_size(size);
            assert_eq!(read(&mut buffer, &io).await, bytes, "{size:?}");
        }
        drop(io);
        drop(writing.join());
    }
}
