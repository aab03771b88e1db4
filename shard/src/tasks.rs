//! Owns the list of the tasks that connections and write queues start: what each is for, since when
//! it runs and what it waits for. Counts their panics.
//!
//! Their owner ends them, and starts them again when they are needed. The loops of the bus belong
//! to the caller, which lists and counts them.
//!
//! Refuses to start tasks. Invariant: a task is listed from its start to its end, also one that
//! panics or is aborted.

use slab::Slab;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A few for each thread and shard: connections and write queues bound their number.
static TASKS: Mutex<Slab<Arc<TaskState>>> = Mutex::new(Slab::new());

static PANICS: [AtomicU64; ShardTaskKind::ALL.len()] = [const { AtomicU64::new(0) }; ShardTaskKind::ALL.len()];

/// The work of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardTaskKind {
    /// Opens a connection to a shard, or moves commands and replies on one.
    Connection,
    /// Writes queued entries and deletes to a shard.
    Writer,
    /// Encodes or decodes a large entry.
    Codec,
}

impl ShardTaskKind {
    pub const ALL: [ShardTaskKind; 3] = [ShardTaskKind::Connection, ShardTaskKind::Writer, ShardTaskKind::Codec];

    /// Value of the metrics' `kind` label.
    pub fn name(self) -> &'static str {
        match self {
            ShardTaskKind::Connection => "shard_connection",
            ShardTaskKind::Writer => "shard_writer",
            ShardTaskKind::Codec => "shard_codec",
        }
    }

    /// Tasks of this kind that have panicked since the process started.
    pub fn panics(self) -> u64 {
        PANICS[self as usize].load(Ordering::Relaxed)
    }

    /// Counts a panic that did not end its task.
    pub(crate) fn record_panic(self) {
        PANICS[self as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// The event that a task waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShardTaskWait {
    /// Nothing: it runs.
    Nothing,
    /// The server accepts the connection and the login.
    Connect,
    /// The next command, or the reply to one.
    Exchange,
    /// The next job in the queue.
    Job,
    /// The replies to a batch.
    Replies,
    /// The encoding of a large entry.
    Encoding,
    /// The pause before the next attempt.
    Retry,
}

impl ShardTaskWait {
    const ALL: [ShardTaskWait; 7] = [
        ShardTaskWait::Nothing,
        ShardTaskWait::Connect,
        ShardTaskWait::Exchange,
        ShardTaskWait::Job,
        ShardTaskWait::Replies,
        ShardTaskWait::Encoding,
        ShardTaskWait::Retry,
    ];

    fn name(self) -> &'static str {
        match self {
            ShardTaskWait::Nothing => "",
            ShardTaskWait::Connect => "shard_connect",
            ShardTaskWait::Exchange => "shard_exchange",
            ShardTaskWait::Job => "shard_job",
            ShardTaskWait::Replies => "shard_replies",
            ShardTaskWait::Encoding => "shard_encoding",
            ShardTaskWait::Retry => "shard_retry",
        }
    }
}

/// One task in the listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedShardTask {
    pub kind: ShardTaskKind,
    /// Region, shard and operation; no credentials.
    pub name: Arc<str>,
    /// Name of the thread that started the task.
    pub thread: Arc<str>,
    pub age: Duration,
    /// Empty if it waits for nothing.
    pub waiting_for: &'static str,
}

impl ListedShardTask {
    /// All running tasks of this process, the oldest first.
    pub fn all() -> Vec<Self> {
        let now = Instant::now();
        let mut listed: Vec<Self> = tasks().iter().map(|(_, task)| task.to_listed(now)).collect();
        listed.sort_by_key(|task| std::cmp::Reverse(task.age));
        listed
    }
}

/// The state of one running task.
struct TaskState {
    kind: ShardTaskKind,
    name: Arc<str>,
    thread: Arc<str>,
    started: Instant,
    /// Index in `ShardTaskWait::ALL`.
    wait: AtomicU8,
}

impl TaskState {
    fn to_listed(&self, now: Instant) -> ListedShardTask {
        let wait = usize::from(self.wait.load(Ordering::Relaxed));
        ListedShardTask {
            kind: self.kind,
            name: self.name.clone(),
            thread: self.thread.clone(),
            age: now.saturating_duration_since(self.started),
            waiting_for: ShardTaskWait::ALL.get(wait).map_or("", |wait| wait.name()),
        }
    }
}

fn tasks() -> MutexGuard<'static, Slab<Arc<TaskState>>> {
    TASKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lists the task that holds it until it is dropped. If the task panics, counts the panic.
pub(crate) struct TaskGuard {
    slot: usize,
    state: Arc<TaskState>,
}

impl TaskGuard {
    pub(crate) fn new(kind: ShardTaskKind, name: &Arc<str>, wait: ShardTaskWait) -> Self {
        let thread = Arc::from(std::thread::current().name().unwrap_or_default());
        let (name, started, wait) = (name.clone(), Instant::now(), AtomicU8::new(wait as u8));
        let state = Arc::new(TaskState { kind, name, thread, started, wait });
        Self { slot: tasks().insert(state.clone()), state }
    }

    pub(crate) fn set_wait(&self, wait: ShardTaskWait) {
        self.state.wait.store(wait as u8, Ordering::Relaxed);
    }
}

impl Drop for TaskGuard {
    fn drop(&mut self) {
        tasks().remove(self.slot);
        if std::thread::panicking() {
            self.state.kind.record_panic();
        }
    }
}

/// Calls its function when it is dropped by a panic.
pub(crate) struct OnPanic<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for OnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str) -> Vec<(ShardTaskKind, &'static str)> {
        let own = ListedShardTask::all().into_iter().filter(|task| &*task.name == name);
        own.map(|task| (task.kind, task.waiting_for)).collect()
    }

    #[tokio::test]
    async fn task_is_listed_until_it_ends_and_its_panic_is_counted() {
        let (name, kind) = (Arc::from("a panic of the list's test"), ShardTaskKind::Codec);
        let (before, guard) = (kind.panics(), TaskGuard::new(kind, &name, ShardTaskWait::Job));
        assert_eq!(listed(&name), [(kind, "shard_job")]);
        let (ended, called) = std::sync::mpsc::channel();
        let task = tokio::spawn(async move {
            let _on_panic = OnPanic(|| ended.send(()).unwrap());
            guard.set_wait(ShardTaskWait::Retry);
            assert_eq!(listed("a panic of the list's test"), [(kind, "shard_retry")]);
            panic!("in a task");
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!((listed(&name), kind.panics(), called.try_recv()), (Vec::new(), before + 1, Ok(())));
        let task = tokio::spawn(async move {
            let _guard = TaskGuard::new(kind, &Arc::from("an aborted task"), ShardTaskWait::Job);
            std::future::pending::<()>().await;
        });
        while listed("an aborted task").is_empty() {
            tokio::task::yield_now().await;
        }
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        assert_eq!((listed("an aborted task"), kind.panics()), (Vec::new(), before + 1));
    }
}
