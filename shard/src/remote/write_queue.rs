//! Owns the writes of one thread that wait for a shard: their order and their bounds.
//!
//! Refuses to exceed the bounds: a newer entry evicts the oldest queued one, which other nodes have
//! had the longest time to fetch themselves. A delete evicts nothing.
//! Invariant: queued entries weigh at most `BYTES_MAX` (or there is a single one), and at most
//! `JOBS_MAX` plus one batch of jobs exist.

use crate::entry::Entry;
use crate::key::Digest;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// Queued entries occupy memory beyond the budget of the local cache: at most this many bytes per
/// thread and shard. A single larger entry may be queued alone.
const BYTES_MAX: usize = 8 << 20;
const STORES_MAX: usize = 256;

/// Deletes take a few hundred bytes each and must survive a short outage.
const JOBS_MAX: usize = 4096;

/// Limits of one batch: large enough to keep up with fills, small enough to complete within a
/// deadline.
pub(super) const BATCH_JOBS: usize = 32;
pub(super) const BATCH_BYTES: usize = 256 << 10;

/// A queued write to one shard: an entry to encode and store, an encoded envelope to copy, or a key
/// to delete.
pub(crate) enum WriteJob<M> {
    Store(StoreJob<M>),
    /// Stores an envelope unchanged until it expires.
    Copy {
        name: String,
        envelope: Bytes,
        until: Instant,
    },
    Delete {
        name: String,
        /// Number of the removal in this process, for the tombstone; `None` if the key is deleted
        /// because its value is damaged.
        removal: Option<u64>,
        /// When a server first redirected it.
        redirected_since: Option<Instant>,
    },
}

/// A store of one entry, which is held by reference and encoded only when its batch is sent.
pub(crate) struct StoreJob<M> {
    /// The key in Redis.
    pub(crate) name: String,
    pub(crate) digest: Digest,
    /// Hash of the cache key.
    pub(crate) hash: u64,
    pub(crate) entry: Arc<Entry<M>>,
    /// A retry after an outage: an entry that the shard has received meanwhile is newer and is
    /// kept.
    pub(crate) is_retry: bool,
}

impl<M> WriteJob<M> {
    fn bytes(&self) -> usize {
        match self {
            WriteJob::Store(store) => store.entry.weight as usize,
            WriteJob::Copy { envelope, .. } => envelope.len(),
            WriteJob::Delete { .. } => 0,
        }
    }

    pub(crate) fn is_delete(&self) -> bool {
        matches!(self, WriteJob::Delete { .. })
    }
}

/// Bounded queue of write jobs in order, behind a lock, with notifications for an added job and for
/// a queue without jobs.
pub(crate) struct WriteQueue<M> {
    jobs: Mutex<QueueState<M>>,
    added: Notify,
    drained: Notify,
}

/// Queued jobs, the number and the bytes of those that carry an entry or an envelope, and whether a
/// batch is being sent.
struct QueueState<M> {
    queued: VecDeque<WriteJob<M>>,
    stores: usize,
    bytes: usize,
    is_batch_in_flight: bool,
}

impl<M> WriteQueue<M> {
    pub(crate) fn new() -> Self {
        let jobs = QueueState { queued: VecDeque::new(), stores: 0, bytes: 0, is_batch_in_flight: false };
        Self { jobs: Mutex::new(jobs), added: Notify::new(), drained: Notify::new() }
    }

    /// Queues a job and returns the jobs that did not fit: older entries, or the job itself.
    pub(crate) fn push(&self, job: WriteJob<M>) -> Vec<WriteJob<M>> {
        let (mut jobs, mut dropped) = (self.lock(), Vec::new());
        while !jobs.has_room(&job) {
            let oldest = if job.is_delete() { None } else { jobs.drop_oldest() };
            match oldest {
                Some(oldest) => dropped.push(oldest),
                None => {
                    dropped.push(job);
                    return dropped;
                }
            }
        }
        jobs.add(&job);
        jobs.queued.push_back(job);
        drop(jobs);
        self.added.notify_one();
        dropped
    }

    /// Waits for the next batch, in order, of at most `jobs_max` jobs. Cancel safe.
    pub(crate) async fn next_batch(&self, jobs_max: usize) -> VecDeque<WriteJob<M>> {
        loop {
            if let Some(batch) = self.lock().take(jobs_max) {
                return batch;
            }
            self.added.notified().await;
        }
    }

    /// Ends a batch; the jobs in `left` are queued again at the front.
    pub(crate) fn finish_batch(&self, left: VecDeque<WriteJob<M>>) {
        let mut jobs = self.lock();
        jobs.is_batch_in_flight = false;
        for job in left.into_iter().rev() {
            jobs.add(&job);
            jobs.queued.push_front(job);
        }
        if jobs.is_idle() {
            self.drained.notify_waiters();
        }
    }

    /// Waits until no job is queued or in flight. Cancel safe.
    pub(crate) async fn wait_drained(&self) {
        loop {
            let mut drained = std::pin::pin!(self.drained.notified());
            // From here on no notification is lost.
            drained.as_mut().enable();
            if self.lock().is_idle() {
                return;
            }
            drained.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState<M>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M> QueueState<M> {
    fn has_room(&self, job: &WriteJob<M>) -> bool {
        let fits = self.bytes == 0 || self.bytes + job.bytes() <= BYTES_MAX;
        let room = job.is_delete() || (self.stores < STORES_MAX && fits);
        room && self.queued.len() < JOBS_MAX
    }

    /// Removes the entry that has been queued longest.
    fn drop_oldest(&mut self) -> Option<WriteJob<M>> {
        let at = self.queued.iter().position(|job| !job.is_delete())?;
        let job = self.queued.remove(at)?;
        self.stores -= 1;
        self.bytes -= job.bytes();
        Some(job)
    }

    fn add(&mut self, job: &WriteJob<M>) {
        self.stores += usize::from(!job.is_delete());
        self.bytes += job.bytes();
    }

    fn take(&mut self, jobs_max: usize) -> Option<VecDeque<WriteJob<M>>> {
        let (mut batch, mut bytes) = (VecDeque::new(), 0);
        while batch.len() < jobs_max && bytes < BATCH_BYTES {
            let Some(job) = self.queued.pop_front() else { break };
            bytes += job.bytes();
            self.stores -= usize::from(!job.is_delete());
            batch.push_back(job);
        }
        self.bytes -= bytes;
        self.is_batch_in_flight = !batch.is_empty();
        self.is_batch_in_flight.then_some(batch)
    }

    fn is_idle(&self) -> bool {
        self.queued.is_empty() && !self.is_batch_in_flight
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::TestMeta;
    use crate::key::{KeyBuilder, Region};
    use std::time::Duration;

    fn store(body_bytes: usize) -> WriteJob<TestMeta> {
        let entry =
            Entry::new(TestMeta(String::new()), vec![0; body_bytes].into(), Duration::from_secs(60), Instant::now());
        let digest = KeyBuilder::new().key().digest(&Region::DEFAULT);
        WriteJob::Store(StoreJob { name: "store".into(), digest, hash: 0, entry: Arc::new(entry), is_retry: false })
    }

    fn delete(n: usize) -> WriteJob<TestMeta> {
        WriteJob::Delete { name: n.to_string(), removal: Some(1), redirected_since: None }
    }

    fn names<'a>(batch: impl IntoIterator<Item = &'a WriteJob<TestMeta>>) -> Vec<&'a str> {
        batch
            .into_iter()
            .map(|job| match job {
                WriteJob::Store(StoreJob { name, .. })
                | WriteJob::Copy { name, .. }
                | WriteJob::Delete { name, .. } => name.as_str(),
            })
            .collect()
    }

    #[test]
    fn newer_entry_evicts_the_oldest_entry_but_no_delete() {
        let queue = WriteQueue::new();
        assert!(queue.push(delete(0)).is_empty());
        let dropped: usize = (0..300).map(|_| queue.push(store(0)).len()).sum();
        assert_eq!(dropped, 300 - STORES_MAX);
        assert!(queue.push(delete(1)).is_empty());
        assert_eq!(queue.push(store(BYTES_MAX - 1_000)).len(), STORES_MAX, "a large entry evicts all small ones");
        let jobs = queue.lock();
        assert_eq!((jobs.stores, jobs.queued.len()), (1, 3));
        assert_eq!(names(&jobs.queued), ["0", "1", "store"]);
    }

    #[test]
    fn delete_evicts_nothing_and_is_returned_when_the_queue_is_full() {
        let queue = WriteQueue::new();
        assert!(queue.push(store(0)).is_empty());
        let returned: Vec<_> = (0..5_000).flat_map(|n| queue.push(delete(n))).collect();
        assert_eq!((returned.len(), names(&returned)[0]), (5_000 - JOBS_MAX + 1, "4095"));
        let full = queue.push(store(0));
        assert_eq!(names(&full), ["store"], "the older entry is evicted");
        assert_eq!(queue.lock().queued.len(), JOBS_MAX);
    }

    #[test]
    fn entry_larger_than_the_bound_is_queued_alone() {
        let queue = WriteQueue::new();
        assert!(queue.push(store(BYTES_MAX + 1)).is_empty() && queue.push(delete(0)).is_empty());
        assert_eq!(queue.push(store(0)).len(), 1, "it is evicted by the next entry");
        let jobs = queue.lock();
        assert_eq!((jobs.stores, jobs.queued.len()), (1, 2));
    }

    #[tokio::test]
    async fn jobs_left_of_a_batch_are_queued_at_the_front() {
        let queue = WriteQueue::new();
        (0..40).for_each(|n| assert!(queue.push(delete(n)).is_empty()));
        let mut batch = queue.next_batch(BATCH_JOBS).await;
        assert_eq!(batch.len(), BATCH_JOBS);
        queue.finish_batch(batch.drain(..2).collect());
        assert_eq!(names(&queue.next_batch(BATCH_JOBS).await)[..3], ["0", "1", "32"]);
    }

    #[tokio::test]
    async fn wait_drained_waits_for_the_batch_in_flight() {
        let queue = WriteQueue::new();
        queue.wait_drained().await;
        assert!(queue.push(store(0)).is_empty());
        let batch = queue.next_batch(BATCH_JOBS).await;
        let waiting = tokio::time::timeout(Duration::from_millis(10), queue.wait_drained()).await;
        assert!(waiting.is_err() && batch.len() == 1);
        queue.finish_batch(VecDeque::new());
        queue.wait_drained().await;
    }
}
