//! An origin with a knee: it serves a fixed number of requests at a time, each for a fixed time,
//! and slows down when too many are in progress.
//!
//! A worker takes the oldest waiting request, as a thread pool behind a queue does. The clients of
//! requests that wait for long have given up; they are served all the same.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::servers::listen::listen;

/// Requests in progress for each worker above which the service takes longer: memory, locks and
/// context switches of a real pool cost time.
const KNEE: usize = 4;
const HEAD_BYTES_MAX: usize = 64 << 10;
const RESPONSE: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\nContent-Length: 3\r\n\r\nok\n";

/// Workers of an origin, and the time of a request in one of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerPool {
    pub(crate) workers: usize,
    pub(crate) service: Duration,
}

struct PoolState {
    pool: WorkerPool,
    free: Semaphore,
    in_progress: Cell<usize>,
}

/// Runs until the process ends.
pub(crate) fn run(address: SocketAddr, pool: WorkerPool) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listen(address)?)?;
        let state = Rc::new(PoolState { pool, free: Semaphore::new(pool.workers), in_progress: Cell::new(0) });
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            let state = Rc::clone(&state);
            tokio::task::spawn_local(async move {
                // A client that disconnects is not an error of the origin.
                drop(state.serve(stream).await);
            });
        }
    })
}

impl PoolState {
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut inbox = Vec::with_capacity(4 << 10);
        loop {
            match memmem::find(&inbox, b"\r\n\r\n") {
                Some(length) => {
                    inbox.drain(..length + 4);
                    self.work().await;
                    stream.write_all(RESPONSE).await?;
                }
                None if inbox.len() > HEAD_BYTES_MAX || stream.read_buf(&mut inbox).await? == 0 => return Ok(()),
                None => {}
            }
        }
    }

    /// Waits for a worker and for its work.
    async fn work(&self) {
        self.in_progress.set(self.in_progress.get() + 1);
        // The semaphore is never closed.
        let worker = self.free.acquire().await;
        let above = self.in_progress.get().div_ceil(KNEE * self.pool.workers).max(1);
        sleep(self.pool.service * u32::try_from(above).unwrap_or(u32::MAX)).await;
        self.in_progress.set(self.in_progress.get() - 1);
        drop(worker);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn requests_wait_for_a_worker() {
        let pool = WorkerPool { workers: 2, service: Duration::from_millis(30) };
        let state = PoolState { pool, free: Semaphore::new(2), in_progress: Cell::new(0) };
        let start = Instant::now();
        tokio::join!(state.work(), state.work(), state.work(), state.work());
        assert!(start.elapsed() >= 2 * pool.service, "two rounds of two");
        assert_eq!(state.in_progress.get(), 0);
    }
}
