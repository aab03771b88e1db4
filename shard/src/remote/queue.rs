//! Owns what one thread still has to tell a shard: jobs, their order, and the bounds on them.
//!
//! Refuses to keep more than the bounds: a newer entry pushes out the oldest, which others have had the longest time to fetch
//! anew; a removal pushes out nothing.
//! Invariant: entries waiting weigh at most `BYTES_MAX` (or are a single one), and jobs are at most `JOBS_MAX` and a batch.

use crate::entry::Entry;
use crate::key::Digest;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// Entries waiting are held in memory beyond the local tier's budget: this many bytes of them per thread and shard. One that is
/// larger by itself may wait alone.
const BYTES_MAX: usize = 8 << 20;
const STORES_MAX: usize = 256;

/// Removals are a few hundred bytes each and must outlive a short outage.
const JOBS_MAX: usize = 4096;

/// What one round trip carries: enough to keep up with fills, little enough to be through within a deadline.
const BATCH_JOBS: usize = 32;
pub(super) const BATCH_BYTES: usize = 256 << 10;

pub(crate) enum Job<M> {
    Store {
        name: String,
        digest: Digest,
        hash: u64,
        entry: Arc<Entry<M>>,
        /// The shard has missed it: what came there meanwhile is newer.
        is_late: bool,
    },
    /// Stores an envelope as it was read, for as long as it is good.
    Copy { name: String, envelope: Bytes, until: Instant },
    Remove {
        name: String,
        /// When a server first sent it elsewhere.
        astray: Option<Instant>,
    },
}

impl<M> Job<M> {
    fn bytes(&self) -> usize {
        match self {
            Job::Store { entry, .. } => entry.weight as usize,
            Job::Copy { envelope, .. } => envelope.len(),
            Job::Remove { .. } => 0,
        }
    }

    pub(crate) fn is_removal(&self) -> bool {
        matches!(self, Job::Remove { .. })
    }
}

pub(crate) struct Queue<M> {
    jobs: Mutex<Jobs<M>>,
    added: Notify,
    drained: Notify,
}

struct Jobs<M> {
    waiting: VecDeque<Job<M>>,
    stores: usize,
    bytes: usize,
    in_flight: bool,
}

impl<M> Queue<M> {
    pub(crate) fn new() -> Self {
        let jobs = Jobs { waiting: VecDeque::new(), stores: 0, bytes: 0, in_flight: false };
        Self { jobs: Mutex::new(jobs), added: Notify::new(), drained: Notify::new() }
    }

    /// Takes a job, and gives back those that there is no room for: older entries, or the job itself.
    pub(crate) fn push(&self, job: Job<M>) -> Vec<Job<M>> {
        let (mut jobs, mut dropped) = (self.lock(), Vec::new());
        while !jobs.has_room(&job) {
            let oldest = if job.is_removal() { None } else { jobs.drop_oldest() };
            match oldest {
                Some(oldest) => dropped.push(oldest),
                None => {
                    dropped.push(job);
                    return dropped;
                }
            }
        }
        jobs.count(&job);
        jobs.waiting.push_back(job);
        drop(jobs);
        self.added.notify_one();
        dropped
    }

    /// The next batch, in order, as soon as there is one.
    pub(crate) async fn next(&self) -> Vec<Job<M>> {
        loop {
            if let Some(batch) = self.lock().take() {
                return batch;
            }
            self.added.notified().await;
        }
    }

    /// Ends a batch; what is `left` of it comes first again.
    pub(crate) fn done(&self, left: Vec<Job<M>>) {
        let mut jobs = self.lock();
        jobs.in_flight = false;
        for job in left.into_iter().rev() {
            jobs.count(&job);
            jobs.waiting.push_front(job);
        }
        if jobs.is_idle() {
            self.drained.notify_waiters();
        }
    }

    /// Waits until nothing is left, under way or waiting. Cancel safe.
    pub(crate) async fn drained(&self) {
        loop {
            let mut drained = std::pin::pin!(self.drained.notified());
            // From here on a notification is not missed.
            drained.as_mut().enable();
            if self.lock().is_idle() {
                return;
            }
            drained.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs<M>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M> Jobs<M> {
    fn has_room(&self, job: &Job<M>) -> bool {
        let fits = self.bytes == 0 || self.bytes + job.bytes() <= BYTES_MAX;
        let room = job.is_removal() || (self.stores < STORES_MAX && fits);
        room && self.waiting.len() < JOBS_MAX
    }

    /// The entry that has waited longest.
    fn drop_oldest(&mut self) -> Option<Job<M>> {
        let at = self.waiting.iter().position(|job| !job.is_removal())?;
        let job = self.waiting.remove(at)?;
        self.stores -= 1;
        self.bytes -= job.bytes();
        Some(job)
    }

    fn count(&mut self, job: &Job<M>) {
        self.stores += usize::from(!job.is_removal());
        self.bytes += job.bytes();
    }

    fn take(&mut self) -> Option<Vec<Job<M>>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH_JOBS && bytes < BATCH_BYTES {
            let Some(job) = self.waiting.pop_front() else { break };
            bytes += job.bytes();
            self.stores -= usize::from(!job.is_removal());
            batch.push(job);
        }
        self.bytes -= bytes;
        self.in_flight = !batch.is_empty();
        self.in_flight.then_some(batch)
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && !self.in_flight
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::key::{KeyBuilder, Region};
    use std::time::Duration;

    fn store(body_bytes: usize) -> Job<Note> {
        let entry =
            Entry::new(Note(String::new()), vec![0; body_bytes].into(), Duration::from_secs(60), Instant::now());
        let digest = KeyBuilder::new().key().digest(&Region::DEFAULT);
        Job::Store { name: "store".into(), digest, hash: 0, entry: Arc::new(entry), is_late: false }
    }

    fn remove(n: usize) -> Job<Note> {
        Job::Remove { name: n.to_string(), astray: None }
    }

    fn names(batch: &[Job<Note>]) -> Vec<&str> {
        batch
            .iter()
            .map(|(Job::Store { name, .. } | Job::Copy { name, .. } | Job::Remove { name, .. })| name.as_str())
            .collect()
    }

    #[test]
    fn newer_entries_push_out_the_oldest_and_no_removal() {
        let queue = Queue::new();
        assert!(queue.push(remove(0)).is_empty());
        let dropped: usize = (0..300).map(|_| queue.push(store(0)).len()).sum();
        assert_eq!(dropped, 300 - STORES_MAX);
        assert!(queue.push(remove(1)).is_empty());
        assert_eq!(queue.push(store(BYTES_MAX - 1_000)).len(), STORES_MAX, "a heavy one pushes out all that are light");
        let mut jobs = queue.lock();
        assert_eq!((jobs.stores, jobs.waiting.len()), (1, 3));
        assert_eq!(names(jobs.waiting.make_contiguous()), ["0", "1", "store"]);
    }

    #[test]
    fn removals_push_out_nothing_and_are_given_back_when_there_are_too_many() {
        let queue = Queue::new();
        assert!(queue.push(store(0)).is_empty());
        let given_back: Vec<_> = (0..5_000).flat_map(|n| queue.push(remove(n))).collect();
        assert_eq!((given_back.len(), names(&given_back)[0]), (5_000 - JOBS_MAX + 1, "4095"));
        let full = queue.push(store(0));
        assert_eq!(names(&full), ["store"], "the older one makes room");
        assert_eq!(queue.lock().waiting.len(), JOBS_MAX);
    }

    #[test]
    fn an_entry_larger_than_the_bound_waits_alone() {
        let queue = Queue::new();
        assert!(queue.push(store(BYTES_MAX + 1)).is_empty() && queue.push(remove(0)).is_empty());
        assert_eq!(queue.push(store(0)).len(), 1, "it goes when another comes");
        let jobs = queue.lock();
        assert_eq!((jobs.stores, jobs.waiting.len()), (1, 2));
    }

    #[tokio::test]
    async fn what_is_left_of_a_batch_comes_first_again() {
        let queue = Queue::new();
        (0..40).for_each(|n| assert!(queue.push(remove(n)).is_empty()));
        let mut batch = queue.next().await;
        assert_eq!(batch.len(), BATCH_JOBS);
        queue.done(batch.drain(..2).collect());
        assert_eq!(names(&queue.next().await)[..3], ["0", "1", "32"]);
    }

    #[tokio::test]
    async fn it_is_drained_only_when_nothing_is_under_way() {
        let queue = Queue::new();
        queue.drained().await;
        assert!(queue.push(store(0)).is_empty());
        let batch = queue.next().await;
        let waiting = tokio::time::timeout(Duration::from_millis(10), queue.drained()).await;
        assert!(waiting.is_err() && batch.len() == 1);
        queue.done(Vec::new());
        queue.drained().await;
    }
}
