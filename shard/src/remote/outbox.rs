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
//! Refuses to grow: see `write_queue`.
//! Invariant: of one thread's jobs for a key, an earlier one never takes effect after a later one
//! that was confirmed, with two exceptions: commands in the receive buffer of a hung server when
//! its connection is abandoned, and a redirected delete, which may delete a newer entry too (a
//! later miss).

use super::connection::ShardConnection;
use super::counts::ShardCounters;
use super::fault::ShardFault;
use super::pending_deletes::PendingDeletes;
use super::redirected_deletes::{RedirectOutcome, RedirectedDelete, RedirectedDeletes};
use super::retry_queue::RetryQueue;
use super::self_invalidations::{ChangedKey, SelfInvalidations};
use super::tombstone::{FillBeginning, GuardedStore, StoreOutcome, add_guarded_store, add_tombstone, store_outcome};
use super::write_queue::{StoreJob, WriteJob, WriteQueue};
use crate::clock::ServerClock;
use crate::entry::{Entry, EntryMeta, EnvelopeCodec, InvalidationEpochs, PurgeStatus};
use crate::panics::PanicGuard;
use crate::placement::{ENTRY_KEY_PREFIX, digest_prefix, tombstone_key};
use redis::{Pipeline, Value};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

/// Pause between attempts to send deletes or retries to a failing shard.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

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

async fn run_writer<M: EntryMeta>(queue: Arc<WriteQueue<M>>, writer: Arc<ShardWriter<M>>) {
    // The next job starts the task again.
    let _guard = PanicGuard::for_writer(|| {});
    loop {
        let batch = if writer.retry_queue.is_empty() {
            queue.next_batch().await
        } else {
            match timeout(RETRY_INTERVAL, queue.next_batch()).await {
                Ok(batch) => batch,
                // No new jobs: retry failed stores, which also detects that the shard has
                // recovered.
                Err(_) => {
                    writer.retry_failed_stores().await;
                    continue;
                }
            }
        };
        let (left, was_accepted) = writer.send_batch(batch).await;
        let has_left = !left.is_empty();
        queue.finish_batch(left);
        if has_left {
            sleep(RETRY_INTERVAL).await;
        } else if was_accepted {
            // One piece after each batch, so that new jobs do not wait long behind retries.
            writer.retry_failed_stores().await;
        }
    }
}

impl<M: EntryMeta> ShardWriter<M> {
    /// Retries a piece of the failed stores while the shard's invalidations are received.
    async fn retry_failed_stores(&self) {
        if self.connection.is_rejecting() || self.retry_queue.is_empty() || !self.is_subscribed.load(Ordering::Acquire)
        {
            return;
        }
        let (jobs, obsolete) = self.retry_queue.take();
        self.record_dropped_stores(obsolete);
        let _no_deletes_left = self.send_batch(jobs).await;
    }

    /// Sends a batch. Returns the deletes that remain to be done, and whether the shard accepted
    /// any job.
    async fn send_batch(&self, batch: Vec<WriteJob<M>>) -> (Vec<WriteJob<M>>, bool) {
        if self.connection.is_rejecting() {
            return (self.handle_failed_batch(batch), false);
        }
        let (pipeline, sent) = self.build_pipeline(batch).await;
        if sent.is_empty() {
            return (Vec::new(), false);
        }
        match self.connection.execute(&pipeline, self.deadline).await {
            Ok(replies) => self.apply_replies(sent, &replies),
            Err(_) => (self.handle_failed_batch(sent.into_iter().map(|sent| sent.job).collect()), false),
        }
    }

    async fn build_pipeline(&self, batch: Vec<WriteJob<M>>) -> (Pipeline, Vec<SentJob<M>>) {
        let mut pipeline = Pipeline::with_capacity(batch.len());
        let mut sent = Vec::with_capacity(batch.len());
        for job in batch {
            let commands = match &job {
                // The server may have lost its tombstones, and its removals are not reported.
                WriteJob::Store(store) if !store.is_retry && !self.is_subscribed.load(Ordering::Acquire) => {
                    self.retry_later(job);
                    continue;
                }
                // After a subscription gap or an invalidation, the entry may have been deleted at
                // the server meanwhile.
                WriteJob::Store(store) if store.is_retry && self.may_be_outdated(&store.entry) => 0,
                WriteJob::Store(store) => self.add_store(&mut pipeline, store).await,
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
            if commands > 0 {
                sent.push(SentJob { job, commands });
            } else {
                self.record_dropped_job(&job);
            }
        }
        (pipeline, sent)
    }

    /// Returns the number of commands: 0 if the entry was purged or deleted, may have been deleted
    /// during a subscription gap, has expired, or cannot be encoded.
    async fn add_store(&self, pipeline: &mut Pipeline, store: &StoreJob<M>) -> usize {
        let StoreJob { name, digest, hash, entry, is_retry } = store;
        let ttl = entry.ttl.saturating_sub(entry.age(Instant::now()));
        let (Some(snapshot), Some(tombstone_key)) = (entry.fill_epoch(), tombstone_key(name)) else { return 0 };
        let is_purged = self.epochs.purge_status(entry.meta.tags(), snapshot.generation()) == PurgeStatus::Purged;
        let had_gap =
            entry.location().is_some_and(|at| self.epochs.had_subscription_gap(at.shard, snapshot.generation()));
        let is_invalidated = is_purged || had_gap || !self.epochs.is_undeleted_since(*hash, snapshot);
        if is_invalidated || ttl < Duration::from_millis(1) {
            return 0;
        }
        let envelope = if self.codec.needs_blocking_encode(entry) {
            let (codec, clock, digest, entry) = (self.codec.clone(), self.clock.clone(), *digest, entry.clone());
            spawn_blocking(move || codec.encode(&digest, &entry, clock.now())).await.ok()
        } else {
            Some(self.codec.encode(digest, entry, self.clock.now()))
        };
        let Some(Ok(envelope)) = envelope else { return 0 };
        let store = GuardedStore {
            key: name,
            tombstone_key: &tombstone_key,
            envelope,
            ttl_ms: ttl.as_millis() as u64,
            fill: FillBeginning::new(&self.epochs, snapshot, &self.clock),
            is_retry: *is_retry,
        };
        add_guarded_store(pipeline, &store)
    }

    fn may_be_outdated(&self, entry: &Entry<M>) -> bool {
        entry.fill_epoch().zip(entry.location()).is_none_or(|(snapshot, location)| {
            self.epochs.had_subscription_gap(location.shard, snapshot.generation())
                || !self.epochs.is_unchanged_since(location.digest_prefix, snapshot)
        })
    }

    /// Calls `then` with the id of an entry in its own slot. Copies are skipped: an entry exists
    /// besides them, and servers do not report their changes.
    fn with_entry_id(&self, name: &str, then: impl FnOnce(&PendingDeletes, u64)) {
        if let Some(id) = name.strip_prefix(ENTRY_KEY_PREFIX).and_then(|name| digest_prefix(name.as_bytes())) {
            then(&self.pending_deletes, id);
        }
    }

    fn apply_replies(&self, sent: Vec<SentJob<M>>, replies: &[Value]) -> (Vec<WriteJob<M>>, bool) {
        let (mut left, mut was_accepted, mut replies) = (Vec::new(), false, replies.iter());
        for SentJob { job, commands } in sent {
            let replies: Vec<&Value> = replies.by_ref().take(commands).collect();
            let fault = match &job {
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
            match (fault, &job) {
                (None, WriteJob::Store(_)) => {}
                (None, WriteJob::Copy { .. }) => self.counts.stored.increment(),
                (None, WriteJob::Delete { name, .. }) => {
                    self.with_entry_id(name, PendingDeletes::end);
                    self.counts.deleted.increment();
                }
                (Some(fault), WriteJob::Delete { .. }) if fault.is_breaker_failure() => left.push(job),
                (Some(ShardFault::Moved), WriteJob::Delete { .. }) => self.redirect_delete(job),
                (Some(fault), WriteJob::Store(_)) if fault.is_breaker_failure() => self.retry_later(job),
                (Some(_), _) => self.record_dropped_job(&job),
            }
        }
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
    fn handle_failed_batch(&self, batch: Vec<WriteJob<M>>) -> Vec<WriteJob<M>> {
        let (deletes, stores): (Vec<_>, Vec<_>) = batch.into_iter().partition(WriteJob::is_delete);
        stores.into_iter().for_each(|job| self.retry_later(job));
        if self.is_cluster_master && self.connection.has_no_server() {
            // No server has this master index, and possibly none ever will.
            deletes.into_iter().for_each(|job| self.redirect_delete(job));
            return Vec::new();
        }
        deletes
    }

    fn retry_later(&self, job: WriteJob<M>) {
        self.record_dropped_stores(self.retry_queue.add(job));
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
