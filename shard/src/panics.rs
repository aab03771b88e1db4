//! Counts the panics of the tasks that connections and write queues start. Their owner starts them
//! again when they are needed; the loops of the bus belong to the caller, which counts its own.

use std::sync::atomic::{AtomicU64, Ordering};

static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
static WRITERS: AtomicU64 = AtomicU64::new(0);

/// Panics of this process's shard tasks since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardTaskPanics {
    /// Attempts to connect to a shard.
    pub connections: u64,
    /// Tasks that write to a shard.
    pub writers: u64,
}

impl ShardTaskPanics {
    /// The current counts.
    pub fn read() -> Self {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ShardTaskPanics { connections: load(&CONNECTIONS), writers: load(&WRITERS) }
    }
}

/// Runs `on_panic` and counts if the task that holds it panics.
pub(crate) struct PanicGuard<F: FnMut()> {
    counter: &'static AtomicU64,
    on_panic: F,
}

impl<F: FnMut()> PanicGuard<F> {
    pub(crate) fn for_connection(on_panic: F) -> Self {
        PanicGuard { counter: &CONNECTIONS, on_panic }
    }

    pub(crate) fn for_writer(on_panic: F) -> Self {
        PanicGuard { counter: &WRITERS, on_panic }
    }
}

impl<F: FnMut()> Drop for PanicGuard<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.counter.fetch_add(1, Ordering::Relaxed);
            (self.on_panic)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_is_counted_and_an_end_is_not() {
        let before = ShardTaskPanics::read();
        tokio::spawn(async { drop(PanicGuard::for_writer(|| {})) }).await.unwrap();
        assert_eq!(ShardTaskPanics::read().writers, before.writers);
        let (sender, receiver) = std::sync::mpsc::channel();
        let task = tokio::spawn(async move {
            let _guard = PanicGuard::for_writer(move || sender.send(()).unwrap());
            panic!("in a task");
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!((receiver.try_recv(), ShardTaskPanics::read().writers), (Ok(()), before.writers + 1));
    }
}
