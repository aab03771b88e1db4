//! Owns the write path from one thread to a shard, in order.
//!
//! Stores and deletes never wait on a request's path: they are queued, and one task per thread and
//! shard sends them in batches over a connection of its own, so that no read queues behind a large
//! body. Entries are encoded when they are sent.
//!
//! Entries evicted from the queue are dropped, which costs a later miss. Stores that fail because
//! the shard is failing are retried when it has recovered, if they are still held in memory (see
//! `retry_queue`). Deletes are kept in order until the shard replies, because a lost delete would
//! let an old entry reappear; a delete that the server redirects is set aside (see
//! `redirected_deletes`).
//!
//! A removal sets a tombstone before it deletes the entry, and a store is compared with it by the
//! server (see `tombstone`): the entry of a fill that began before the removal is not stored,
//! whichever node sends it.
//!
//! A panic while a batch is sent is counted, and its deletes are sent again; its stores are
//! dropped.
//!
//! Refuses to grow: see `write_queue`.
//! Invariant: of one thread's jobs for a key, an earlier one never takes effect after a later one
//! that was confirmed, with two exceptions: commands on their way to a hung server when its
//! connection is abandoned (stores for at most `STORE_VALIDITY`), and a redirected delete, which
//! may delete a newer entry too (a later miss).

use super::connection::ShardConnection;
use super::counts::ShardCounters;
use super::fault::ShardFault;
use super::pending_deletes::PendingDeletes;
use super::redirected_deletes::{RedirectOutcome, RedirectedDelete, RedirectedDeletes};
use super::retry_queue::RetryQueue;
use super::self_invalidations::{ChangedKey, SelfInvalidations};
use super::tombstone::{
    FillBeginning, GuardedStore, StoreOutcome, add_guarded_store, add_tombstone, latest_execution_ms, store_outcome,
};
use super::write_queue::{BATCH_JOBS, StoreJob, WriteJob, WriteQueue};
use crate::clock::ServerClock;
use crate::entry::{EntryMeta, EnvelopeCodec, EpochSnapshot, InvalidationEpochs, PurgeStatus};
use crate::placement::{ENTRY_KEY_PREFIX, digest_prefix, tombstone_key};
use crate::tasks::{ShardTaskKind, ShardTaskWait, TaskGuard};
use redis::{Pipeline, Value};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

/// Pause between attempts to send deletes or retries to a failing shard.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// A delete that panics this often when it is sent alone is dropped, and counted.
const PANICS_MAX: u32 = 3;

/// The write path of one thread to one shard: a bounded queue, and the task that sends its jobs in
/// batches and is aborted on drop.
pub(crate) struct WriteOutbox<M> {
    queue: Arc<WriteQueue<M>>,
    writer: Arc<ShardWriter<M>>,
    task: Mutex<Option<AbortHandle>>,
}

/// A job in a pipeline, and the number of its commands.
struct SentJob<M> {
    job: WriteJob<M>,
    commands: usize,
}

/// Everything needed to write jobs to a shard.
pub(crate) struct ShardWriter<M> {
    pub(crate) connection: ShardConnection,
    /// Whether it is a master index of a cluster, which may be unassigned.
    pub(crate) is_cluster_master: bool,
    pub(crate) deadline: Duration,
    pub(crate) codec: Arc<EnvelopeCodec>,
    pub(crate) epochs: Arc<InvalidationEpochs>,
    pub(crate) counts: Arc<ShardCounters>,
    pub(crate) self_invalidations: Arc<SelfInvalidations>,
    pub(crate) clock: Arc<ServerClock>,
    pub(crate) retry_queue: RetryQueue<M>,
    pub(crate) redirected_deletes: RedirectedDeletes,
    pub(crate) pending_deletes: Arc<PendingDeletes>,
    pub(crate) is_subscribed: Arc<AtomicBool>,
}

impl<M: EntryMeta> WriteOutbox<M> {
    pub(crate) fn new(writer: ShardWriter<M>) -> Self {
        Self { queue: Arc::new(WriteQueue::new()), writer: Arc::new(writer), task: Mutex::new(None) }
    }

    /// Marks an entry as deleted until its delete, which is pushed next, ends.
    pub(crate) fn begin_delete(&self, name: &str) {
        self.writer.with_entry_id(name, PendingDeletes::begin);
    }

    pub(crate) fn push(&self, job: WriteJob<M>) {
        self.queue.push(job).iter().for_each(|job| self.writer.record_dropped_job(job));
        self.ensure_writer_task();
    }

    /// Waits until no job is left. Cancel safe.
    pub(crate) async fn wait_drained(&self) {
        self.queue.wait_drained().await;
    }

    pub(crate) fn take_redirected_deletes(&self) -> VecDeque<RedirectedDelete> {
        self.writer.redirected_deletes.take()
    }

    /// Sets a delete aside again whose new shard is not known yet.
    pub(crate) fn defer_delete(&self, delete: RedirectedDelete) {
        self.writer.set_aside(delete);
    }

    /// Ends a delete that was set aside here: it is queued at another shard, or no shard holds its
    /// key.
    pub(crate) fn finish_redirected_delete(&self, name: &str, is_sent: bool) {
        self.writer.with_entry_id(name, PendingDeletes::end);
        if !is_sent {
            self.writer.counts.dropped_deletes.increment();
        }
    }

    /// Starts the writer task unless it is running. Outside a runtime jobs wait for the next push
    /// inside one.
    fn ensure_writer_task(&self) {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            *task = Some(runtime.spawn(run_writer(self.queue.clone(), self.writer.clone())).abort_handle());
        }
    }
}

impl<M> Drop for WriteOutbox<M> {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
    }
}

/// Runs the writer until it is aborted. A panic is counted and does not end it: the deletes of the
/// batch are sent again, one by one, so that a job that panics every time takes no other with it.
async fn run_writer<M: EntryMeta>(queue: Arc<WriteQueue<M>>, writer: Arc<ShardWriter<M>>) {
    let task = TaskGuard::new(ShardTaskKind::Writer, writer.connection.name(), ShardTaskWait::Job);
    let (mut batch, mut single_jobs) = (SentBatch::default(), SingleJobs::default());
    loop {
        {
            let mut writing = pin!(writer.write_batches(&queue, (&mut batch, &mut single_jobs), &task));
            let mut poll = |cx: &mut Context<'_>| writing.as_mut().poll(cx);
            poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| poll(cx))) {
                Ok(Poll::Pending) => Poll::Pending,
                Ok(Poll::Ready(never)) => match never {},
                Err(_message_is_on_standard_error) => Poll::Ready(()),
            })
            .await;
        }
        ShardTaskKind::Writer.record_panic();
        let (mut deletes, stores): (VecDeque<_>, VecDeque<_>) = batch.take_jobs().partition(WriteJob::is_delete);
        stores.iter().for_each(|job| writer.record_dropped_job(job));
        if single_jobs.count_panic(deletes.len())
            && let Some(job) = deletes.pop_front()
        {
            writer.record_dropped_job(&job);
        }
        queue.finish_batch(deletes);
        task.set_wait(ShardTaskWait::Retry);
        sleep(RETRY_INTERVAL).await;
    }
}

/// The number of jobs that are sent one by one after a panic.
#[derive(Default)]
struct SingleJobs {
    left: usize,
    /// Panics of the job that is sent alone.
    panics: u32,
}

impl SingleJobs {
    /// Records a panic in a batch with so many deletes; true if the delete that was sent alone
    /// panicked too often.
    fn count_panic(&mut self, deletes: usize) -> bool {
        let was_alone = self.left > 0;
        self.left = self.left.max(deletes);
        self.panics = if was_alone { self.panics + 1 } else { 0 };
        let is_hopeless = self.panics >= PANICS_MAX && deletes > 0;
        if is_hopeless {
            self.count_done();
        }
        is_hopeless
    }

    fn count_done(&mut self) {
        (self.left, self.panics) = (self.left.saturating_sub(1), 0);
    }

    fn jobs_max(&self) -> usize {
        if self.left > 0 { 1 } else { BATCH_JOBS }
    }
}

/// The batch that is being sent. It outlives a panic of the code that sends it.
struct SentBatch<M> {
    /// Jobs that are not in the pipeline yet.
    unsent: VecDeque<WriteJob<M>>,
    sent: VecDeque<SentJob<M>>,
}

impl<M> Default for SentBatch<M> {
    fn default() -> Self {
        Self { unsent: VecDeque::new(), sent: VecDeque::new() }
    }
}

impl<M> SentBatch<M> {
    /// Takes all jobs, in order.
    fn take_jobs(&mut self) -> impl Iterator<Item = WriteJob<M>> {
        let sent = std::mem::take(&mut self.sent).into_iter().map(|sent| sent.job);
        sent.chain(std::mem::take(&mut self.unsent))
    }
}

impl<M: EntryMeta> ShardWriter<M> {
    async fn write_batches(
        &self,
        queue: &WriteQueue<M>,
        (batch, single_jobs): (&mut SentBatch<M>, &mut SingleJobs),
        task: &TaskGuard,
    ) -> Infallible {
        loop {
            task.set_wait(ShardTaskWait::Job);
            let jobs_max = single_jobs.jobs_max();
            if self.retry_queue.is_empty() {
                batch.unsent = queue.next_batch(jobs_max).await;
            } else {
                match timeout(RETRY_INTERVAL, queue.next_batch(jobs_max)).await {
                    Ok(jobs) => batch.unsent = jobs,
                    // No new jobs: retry failed stores, which also detects that the shard has
                    // recovered.
                    Err(_) => {
                        self.retry_failed_stores(batch, task).await;
                        continue;
                    }
                }
            }
            let (left, was_accepted) = self.send_batch(batch, task).await;
            let has_left = !left.is_empty();
            queue.finish_batch(left);
            if has_left {
                task.set_wait(ShardTaskWait::Retry);
                sleep(RETRY_INTERVAL).await;
                continue;
            }
            single_jobs.count_done();
            if was_accepted {
                // One piece after each batch, so that new jobs do not wait long behind retries.
                self.retry_failed_stores(batch, task).await;
            }
        }
    }

    /// Retries a piece of the failed stores while the shard's invalidations are received.
    async fn retry_failed_stores(&self, batch: &mut SentBatch<M>, task: &TaskGuard) {
        if self.connection.is_rejecting() || self.retry_queue.is_empty() || !self.is_subscribed.load(Ordering::Acquire)
        {
            return;
        }
        let (jobs, obsolete) = self.retry_queue.take();
        self.record_dropped_stores(obsolete);
        batch.unsent = jobs;
        let _no_deletes_left = self.send_batch(batch, task).await;
    }

    /// Sends a batch. Returns the deletes that remain to be done, and whether the shard accepted
    /// any job. Leaves the batch empty.
    async fn send_batch(&self, batch: &mut SentBatch<M>, task: &TaskGuard) -> (VecDeque<WriteJob<M>>, bool) {
        if self.connection.is_rejecting() {
            return (self.handle_failed_batch(batch), false);
        }
        let pipeline = self.build_pipeline(batch, task).await;
        if batch.sent.is_empty() {
            return (VecDeque::new(), false);
        }
        task.set_wait(ShardTaskWait::Replies);
        match self.connection.execute(&pipeline, self.deadline).await {
            Ok(replies) => self.apply_replies(batch, &replies),
            Err(_) => (self.handle_failed_batch(batch), false),
        }
    }

    async fn build_pipeline(&self, batch: &mut SentBatch<M>, task: &TaskGuard) -> Pipeline {
        let mut pipeline = Pipeline::with_capacity(batch.unsent.len());
        while let Some(job) = batch.unsent.front() {
            #[cfg(test)]
            tests::panic_if_requested(job, "build");
            let commands = match job {
                // The server may have lost its tombstones, and its removals are not reported.
                WriteJob::Store(_) if !self.is_subscribed.load(Ordering::Acquire) => {
                    self.retry_later(batch.unsent.pop_front());
                    continue;
                }
                WriteJob::Store(store) => self.add_store(&mut pipeline, store, task).await,
                WriteJob::Copy { name, envelope, until } => {
                    let ttl = until.saturating_duration_since(Instant::now()).as_millis() as u64;
                    if ttl > 0 {
                        pipeline.cmd("SET").arg(name).arg(&envelope[..]).arg("PX").arg(ttl);
                    }
                    usize::from(ttl > 0)
                }
                WriteJob::Delete { name, removal, redirected_since } => {
                    // A redirected delete may delete a newer entry, and that change must be
                    // processed.
                    let is_own = redirected_since.is_none();
                    // The tombstone first: no outdated entry is stored after the delete.
                    let tombstone = removal.zip(tombstone_key(name));
                    if let Some((sequence, tombstone)) = &tombstone {
                        if is_own {
                            self.with_entry_id(name, |_, id| self.self_invalidations.expect(ChangedKey::Tombstone(id)));
                        }
                        add_tombstone(&mut pipeline, tombstone, (self.epochs.process(), *sequence));
                    }
                    if is_own {
                        self.with_entry_id(name, |_, id| self.self_invalidations.expect(ChangedKey::Entry(id)));
                    }
                    pipeline.cmd("UNLINK").arg(name);
                    1 + usize::from(tombstone.is_some())
                }
            };
            let Some(job) = batch.unsent.pop_front() else { break };
            if commands > 0 {
                batch.sent.push_back(SentJob { job, commands });
            } else {
                self.record_dropped_job(&job);
            }
        }
        pipeline
    }

    /// Returns the number of commands: 0 if the entry was purged, deleted or changed by a node, may
    /// have been deleted during a subscription gap, has expired, or cannot be encoded.
    async fn add_store(&self, pipeline: &mut Pipeline, store: &StoreJob<M>, task: &TaskGuard) -> usize {
        let StoreJob { name, digest, entry, is_retry, .. } = store;
        let ttl = entry.ttl.saturating_sub(entry.age(Instant::now()));
        let (Some(snapshot), Some(tombstone_key)) = (entry.fill_epoch(), tombstone_key(name)) else { return 0 };
        if self.may_be_outdated(store, snapshot) || ttl < Duration::from_millis(1) {
            return 0;
        }
        let envelope = if self.codec.needs_blocking_encode(entry) {
            task.set_wait(ShardTaskWait::Encoding);
            let (codec, clock, digest, entry) = (self.codec.clone(), self.clock.clone(), *digest, entry.clone());
            let task_name = self.connection.name().clone();
            #[cfg(test)]
            let redis_name = name.clone();
            let encoding = spawn_blocking(move || {
                // Lists the encoding, and counts its panic.
                let _task = TaskGuard::new(ShardTaskKind::Codec, &task_name, ShardTaskWait::Nothing);
                #[cfg(test)]
                tests::panic_if_requested_for(&redis_name, "encode");
                codec.encode(&digest, &entry, clock.now())
            });
            encoding.await.ok()
        } else {
            Some(self.codec.encode(digest, entry, self.clock.now()))
        };
        let Some(Ok(envelope)) = envelope else { return 0 };
        // Encoding may have waited for a thread.
        if !self.is_subscribed.load(Ordering::Acquire) || self.may_be_outdated(store, snapshot) {
            return 0;
        }
        let store = GuardedStore {
            key: name,
            tombstone_key: &tombstone_key,
            envelope,
            ttl_ms: ttl.as_millis() as u64,
            fill: FillBeginning::new(&self.epochs, snapshot, &self.clock),
            latest_ms: latest_execution_ms(&self.clock),
            is_retry: *is_retry,
        };
        add_guarded_store(pipeline, &store)
    }

    /// Whether the entry was purged, deleted or changed since its fill began, as far as it was
    /// reported, or may have been during a subscription gap. A job may have waited for long.
    fn may_be_outdated(&self, store: &StoreJob<M>, snapshot: EpochSnapshot) -> bool {
        let StoreJob { hash, entry, .. } = store;
        let is_purged = self.epochs.purge_status(entry.meta.tags(), snapshot.generation()) == PurgeStatus::Purged;
        let is_changed = entry.location().is_none_or(|location| {
            self.epochs.had_subscription_gap(location.shard, snapshot.generation())
                || !self.epochs.is_unchanged_since(location.digest_prefix, snapshot)
        });
        is_purged || is_changed || !self.epochs.is_undeleted_since(*hash, snapshot)
    }

    /// Calls `then` with the id of an entry in its own slot. Copies are skipped: an entry exists
    /// besides them, and servers do not report their changes.
    fn with_entry_id(&self, name: &str, then: impl FnOnce(&PendingDeletes, u64)) {
        if let Some(id) = name.strip_prefix(ENTRY_KEY_PREFIX).and_then(|name| digest_prefix(name.as_bytes())) {
            then(&self.pending_deletes, id);
        }
    }

    fn apply_replies(&self, batch: &mut SentBatch<M>, replies: &[Value]) -> (VecDeque<WriteJob<M>>, bool) {
        let (mut left, mut was_accepted, mut replies) = (VecDeque::new(), false, replies.iter());
        while let Some(SentJob { job, commands }) = batch.sent.front() {
            #[cfg(test)]
            tests::panic_if_requested(job, "apply");
            let replies: Vec<&Value> = replies.by_ref().take(*commands).collect();
            let fault = match job {
                WriteJob::Delete { name, .. } => self.fault_of_delete(name, &replies),
                WriteJob::Copy { .. } => replies.iter().find_map(|reply| ShardFault::from_reply(reply)),
                WriteJob::Store(store) => match store_outcome(&replies) {
                    StoreOutcome::Failed(fault) => Some(fault),
                    outcome => {
                        self.record_outcome(store, outcome);
                        None
                    }
                },
            };
            was_accepted |= fault.is_none();
            // Deletes that remain stay in the batch until all others are done.
            let Some(SentJob { job, .. }) = batch.sent.pop_front() else { break };
            match (fault, &job) {
                (None, WriteJob::Store(_)) => {}
                (None, WriteJob::Copy { .. }) => self.counts.stored.increment(),
                (None, WriteJob::Delete { name, .. }) => {
                    self.with_entry_id(name, PendingDeletes::end);
                    self.counts.deleted.increment();
                }
                (Some(fault), WriteJob::Delete { .. }) if fault.is_breaker_failure() => batch.unsent.push_back(job),
                (Some(ShardFault::Moved), WriteJob::Delete { .. }) => self.redirect_delete(job),
                (Some(fault), WriteJob::Store(_)) if fault.is_breaker_failure() => self.retry_later(Some(job)),
                (Some(_), _) => self.record_dropped_job(&job),
            }
        }
        left.append(&mut batch.unsent);
        (left, was_accepted)
    }

    fn record_outcome(&self, store: &StoreJob<M>, outcome: StoreOutcome) {
        match outcome {
            StoreOutcome::Stored => self.counts.stored.increment(),
            // The entry was removed after its fill began; the report of that may still be on its
            // way, or the subscription lost.
            StoreOutcome::Refused => {
                store.entry.retire();
                self.record_dropped_stores(1);
            }
            StoreOutcome::Kept | StoreOutcome::Failed(_) => self.record_dropped_stores(1),
        }
    }

    /// The fault of a delete, and the changes that it will not be reported for. A tombstone that
    /// the server refuses, because its memory is full for instance, does not hold up the delete.
    fn fault_of_delete(&self, name: &str, replies: &[&Value]) -> Option<ShardFault> {
        let (deleted, tombstones) = replies.split_last()?;
        let (fault, tombstone_fault) =
            (ShardFault::from_reply(deleted), tombstones.iter().find_map(|reply| ShardFault::from_reply(reply)));
        self.with_entry_id(name, |_, id| {
            if fault.is_some() || **deleted == Value::Int(0) {
                self.self_invalidations.take(ChangedKey::Entry(id));
            }
            if tombstone_fault.is_some() {
                self.self_invalidations.take(ChangedKey::Tombstone(id));
            }
        });
        fault.or(tombstone_fault.filter(|fault| *fault == ShardFault::Moved))
    }

    /// Queues entries for a retry and returns the deletes.
    fn handle_failed_batch(&self, batch: &mut SentBatch<M>) -> VecDeque<WriteJob<M>> {
        let (deletes, stores): (VecDeque<_>, VecDeque<_>) = batch.take_jobs().partition(WriteJob::is_delete);
        stores.into_iter().for_each(|job| self.retry_later(Some(job)));
        if self.is_cluster_master && self.connection.has_no_server() {
            // No server has this master index, and possibly none ever will.
            deletes.into_iter().for_each(|job| self.redirect_delete(job));
            return VecDeque::new();
        }
        deletes
    }

    fn retry_later(&self, job: Option<WriteJob<M>>) {
        self.record_dropped_stores(job.map_or(0, |job| self.retry_queue.add(job)));
    }

    fn redirect_delete(&self, job: WriteJob<M>) {
        if let WriteJob::Delete { name, removal, redirected_since } = job {
            let redirected_since = redirected_since.unwrap_or_else(Instant::now);
            self.set_aside(RedirectedDelete { name, removal, redirected_since });
        }
    }

    fn set_aside(&self, delete: RedirectedDelete) {
        let (name, removal) = (delete.name.clone(), delete.removal);
        match self.redirected_deletes.add(delete) {
            RedirectOutcome::Deferred => {}
            RedirectOutcome::Duplicate => self.with_entry_id(&name, PendingDeletes::end),
            RedirectOutcome::Rejected => {
                self.record_dropped_job(&WriteJob::Delete { name, removal, redirected_since: None })
            }
        }
    }

    fn record_dropped_job(&self, job: &WriteJob<M>) {
        match job {
            WriteJob::Store(_) | WriteJob::Copy { .. } => self.counts.dropped_stores.increment(),
            WriteJob::Delete { name, .. } => {
                self.with_entry_id(name, PendingDeletes::end);
                self.counts.dropped_deletes.increment();
            }
        }
    }

    /// Counts stores that will not be written.
    fn record_dropped_stores(&self, entries: usize) {
        (0..entries).for_each(|_| self.counts.dropped_stores.increment());
    }
}

#[cfg(test)]
mod tests {
    use super::super::operation::OperationClass;
    use super::super::reply_limit::ReplyLimits;
    use super::super::tests::TestServer;
    use super::*;
    use crate::clock::WallClock;
    use crate::entry::tests::TestMeta;
    use crate::entry::{Compression, CompressionConfig, Entry, EntryLocation};
    use crate::key::{Digest, KeyBuilder, Region};
    use crate::placement::{Slot, redis_key};
    use redis::Commands;
    use std::collections::HashMap;

    /// How often a job still panics, by its key in Redis and the step.
    static PANICS: Mutex<Option<HashMap<(String, &str), u32>>> = Mutex::new(None);

    pub(super) fn panic_if_requested<M>(job: &WriteJob<M>, step: &'static str) {
        let (WriteJob::Store(StoreJob { name, .. }) | WriteJob::Copy { name, .. } | WriteJob::Delete { name, .. }) =
            job;
        panic_if_requested_for(name, step);
    }

    pub(super) fn panic_if_requested_for(name: &str, step: &'static str) {
        let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(left) = panics.get_or_insert_default().get_mut(&(name.to_owned(), step)).filter(|left| **left > 0)
        else {
            return;
        };
        *left -= 1;
        drop(panics);
        panic!("requested by a test");
    }

    fn request_panics(name: &str, step: &'static str, times: u32) {
        let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        panics.get_or_insert_default().insert((name.to_owned(), step), times);
    }

    /// A write queue on a server, and the state that it shares with its shard.
    struct Fixture {
        server: TestServer,
        outbox: WriteOutbox<TestMeta>,
        /// Distinguishes the keys of tests that run at once.
        test: &'static str,
    }

    impl Fixture {
        fn new(test: &'static str) -> Self {
            let (server, compression) = (TestServer::start(), Compression::Off);
            let operation = Arc::new(OperationClass::new(format!("{test} writes")));
            let writer = ShardWriter {
                connection: ShardConnection::new(server.address(), operation, ReplyLimits::per_reply(4 << 10)),
                is_cluster_master: false,
                deadline: Duration::from_secs(5),
                codec: Arc::new(EnvelopeCodec::new(
                    "secret",
                    1 << 20,
                    CompressionConfig { algorithm: compression, min_bytes: 0 },
                )),
                epochs: Arc::new(InvalidationEpochs::new(1)),
                counts: Arc::default(),
                self_invalidations: Arc::default(),
                clock: Arc::new(ServerClock::new(WallClock::new())),
                retry_queue: RetryQueue::new(),
                redirected_deletes: RedirectedDeletes::default(),
                pending_deletes: Arc::default(),
                is_subscribed: Arc::new(AtomicBool::new(true)),
            };
            Self { server, outbox: WriteOutbox::new(writer), test }
        }

        fn key(&self, n: u32) -> (String, Digest) {
            let mut key = KeyBuilder::new();
            let digest = key.part(self.test.as_bytes()).part(&n.to_le_bytes()).key().digest(&Region::DEFAULT);
            (redis_key(&Region::DEFAULT, Slot::for_key(&key.key(), 1), &digest), digest)
        }

        fn delete(&self, n: u32) -> WriteJob<TestMeta> {
            let (name, _) = self.key(n);
            self.outbox.begin_delete(&name);
            let removal = Some(self.outbox.writer.epochs.record_delete(u64::from(n)));
            WriteJob::Delete { name, removal, redirected_since: None }
        }

        fn store(&self, n: u32, body: usize) -> WriteJob<TestMeta> {
            let (name, digest) = self.key(n);
            let location = Some(EntryLocation { shard: 0, digest_prefix: digest.prefix() });
            let meta = TestMeta(String::new());
            let entry = Entry::new(meta, vec![0; body].into(), Duration::from_secs(60), Instant::now())
                .with_fill_epoch(self.outbox.writer.epochs.snapshot())
                .with_location(location);
            WriteJob::Store(StoreJob {
                name,
                digest,
                hash: u64::from(n) << 40,
                entry: Arc::new(entry),
                is_retry: false,
            })
        }

        async fn drained(&self) {
            timeout(Duration::from_secs(20), self.outbox.wait_drained()).await.expect("the queue is drained");
        }

        fn exists(&self, n: u32) -> bool {
            self.server.connect().exists(self.key(n).0).unwrap()
        }

        /// Deleted, dropped deletes, stored and dropped stores.
        fn counts(&self) -> [u64; 4] {
            let counts = self.outbox.writer.counts.snapshot();
            [counts.deleted, counts.dropped_deletes, counts.stored, counts.dropped_stores]
        }
    }

    #[tokio::test]
    async fn deletes_of_a_batch_that_panics_are_sent_again() {
        for step in ["build", "apply"] {
            let fixture = Fixture::new(step);
            let panics = ShardTaskKind::Writer.panics();
            (0..5).for_each(|n| fixture.server.connect().set(fixture.key(n).0, "old").unwrap());
            request_panics(&fixture.key(2).0, step, 1);
            // One batch: the task is not polled before all are queued.
            (0..3).for_each(|n| fixture.outbox.push(fixture.delete(n)));
            fixture.outbox.push(fixture.store(9, 10));
            (3..5).for_each(|n| fixture.outbox.push(fixture.delete(n)));
            fixture.drained().await;
            assert!((0..5).all(|n| !fixture.exists(n)), "{step}");
            let pending = &fixture.outbox.writer.pending_deletes;
            assert!((0..5).all(|n| !pending.contains(fixture.key(n).1.prefix())), "{step}");
            assert_eq!(fixture.counts(), [5, 0, 0, 1], "{step}: the store is dropped, and counted");
            assert!(ShardTaskKind::Writer.panics() > panics, "{step}");
            // Later jobs need no other push to be sent.
            fixture.outbox.push(fixture.store(8, 10));
            fixture.drained().await;
            assert!(fixture.exists(8), "{step}");
        }
    }

    #[tokio::test]
    async fn a_delete_that_always_panics_takes_no_other_with_it() {
        let fixture = Fixture::new("always");
        (0..4).for_each(|n| fixture.server.connect().set(fixture.key(n).0, "old").unwrap());
        request_panics(&fixture.key(1).0, "build", u32::MAX);
        (0..4).for_each(|n| fixture.outbox.push(fixture.delete(n)));
        fixture.drained().await;
        assert_eq!([0, 1, 2, 3].map(|n| fixture.exists(n)), [false, true, false, false]);
        assert_eq!(fixture.counts(), [3, 1, 0, 0]);
        assert!(!fixture.outbox.writer.pending_deletes.contains(fixture.key(1).1.prefix()));
    }

    #[tokio::test]
    async fn a_panic_of_an_encoding_is_counted_as_such_and_affects_no_other_job() {
        let fixture = Fixture::new("encoding");
        let panics = ShardTaskKind::Codec.panics();
        let large = fixture.store(0, 900_000);
        request_panics(&fixture.key(0).0, "encode", 1);
        [large, fixture.store(1, 10), fixture.store(2, 900_000)].into_iter().for_each(|job| fixture.outbox.push(job));
        fixture.drained().await;
        assert_eq!([0, 1, 2].map(|n| fixture.exists(n)), [false, true, true]);
        assert_eq!(fixture.counts(), [0, 0, 2, 1]);
        assert!(ShardTaskKind::Codec.panics() > panics);
    }

    /// A job can wait for longer than a tombstone exists, behind deletes that fail for instance.
    #[tokio::test]
    async fn a_store_that_waited_while_its_key_was_removed_elsewhere_is_not_sent() {
        let fixture = Fixture::new("waited");
        [0, 1].into_iter().for_each(|n| fixture.outbox.push(fixture.store(n, 10)));
        fixture.outbox.writer.epochs.record_change(fixture.key(0).1.prefix());
        fixture.drained().await;
        assert_eq!((fixture.exists(0), fixture.exists(1), fixture.counts()), (false, true, [0, 0, 1, 1]));
    }
}
