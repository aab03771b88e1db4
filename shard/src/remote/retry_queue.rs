//! Owns the stores of one thread that failed because the shard was failing. They are retried when
//! the shard has recovered, if memory still holds the entries.
//!
//! An entry is referenced weakly: once memory has evicted it, or it was replaced, deleted or has
//! expired, there is nothing to retry.
//!
//! Refuses more than `RETRIES_MAX`: the oldest are dropped, which other nodes have had the longest
//! time to fetch themselves.

use super::write_queue::{BATCH_BYTES, StoreJob, WriteJob};
use crate::entry::Entry;
use crate::key::Digest;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

/// About what one thread stores in a few seconds of an outage: some 300 bytes each, besides the
/// entries that memory holds anyway.
const RETRIES_MAX: usize = 4_096;

/// Retried at a time, so that new jobs do not wait long behind retries.
const RETRY_BATCH: usize = 32;

/// Queue of at most `RETRIES_MAX` failed stores of one thread and shard, behind a lock; the oldest
/// are dropped first.
pub(crate) struct RetryQueue<M>(Mutex<VecDeque<FailedStore<M>>>);

/// A store to be retried: the parts of its `StoreJob`, with a weak reference to the entry.
struct FailedStore<M> {
    name: String,
    digest: Digest,
    hash: u64,
    entry: Weak<Entry<M>>,
}

impl<M> RetryQueue<M> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Adds a store and returns the number of stores dropped for it.
    pub(crate) fn add(&self, job: WriteJob<M>) -> usize {
        let WriteJob::Store(StoreJob { name, digest, hash, entry, .. }) = job else { return 1 };
        let mut queue = self.lock();
        queue.push_back(FailedStore { name, digest, hash, entry: std::sync::Arc::downgrade(&entry) });
        let dropped = queue.len().saturating_sub(RETRIES_MAX);
        queue.drain(..dropped);
        dropped
    }

    /// Takes a batch of failed stores, and the number of those whose entries are gone.
    pub(crate) fn take(&self) -> (VecDeque<WriteJob<M>>, usize) {
        let (mut jobs, mut bytes, mut obsolete, mut queue) = (VecDeque::new(), 0, 0, self.lock());
        while jobs.len() < RETRY_BATCH && bytes < BATCH_BYTES {
            let Some(FailedStore { name, digest, hash, entry }) = queue.pop_front() else { break };
            match entry.upgrade().filter(|entry| entry.is_live()) {
                Some(entry) => {
                    bytes += entry.weight as usize;
                    jobs.push_back(WriteJob::Store(StoreJob { name, digest, hash, entry, is_retry: true }));
                }
                None => obsolete += 1,
            }
        }
        (jobs, obsolete)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<FailedStore<M>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::TestMeta;
    use crate::key::{KeyBuilder, Region};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    fn entry() -> Arc<Entry<TestMeta>> {
        Arc::new(Entry::new(TestMeta(String::new()), "body".into(), Duration::from_secs(60), Instant::now()))
    }

    fn store(name: usize, entry: &Arc<Entry<TestMeta>>) -> WriteJob<TestMeta> {
        let digest = KeyBuilder::new().key().digest(&Region::DEFAULT);
        WriteJob::Store(StoreJob { name: name.to_string(), digest, hash: 0, entry: entry.clone(), is_retry: false })
    }

    #[test]
    fn evicted_and_retired_entries_are_not_retried() {
        let (queue, [held, retired]) = (RetryQueue::new(), [entry(), entry()]);
        assert_eq!(queue.add(store(0, &held)) + queue.add(store(1, &retired)) + queue.add(store(2, &entry())), 0);
        retired.retire();
        let (jobs, obsolete) = queue.take();
        assert_eq!((jobs.len(), obsolete), (1, 2));
        assert!(queue.is_empty());
    }

    #[test]
    fn oldest_stores_are_dropped_and_batches_are_small() {
        let (queue, held) = (RetryQueue::new(), entry());
        let dropped: usize = (0..RETRIES_MAX + 10).map(|n| queue.add(store(n, &held))).sum();
        assert_eq!(dropped, 10);
        let (jobs, _) = queue.take();
        assert!(matches!(&jobs[0], WriteJob::Store(store) if store.name == "10"));
        assert_eq!(jobs.len(), RETRY_BATCH);
    }
}
