//! Owns what a shard has missed while it failed: entries of one thread that it is told when it is back, if they are still held.
//!
//! An entry is remembered without being kept: once memory lets go of it, or it is replaced, removed or over, there is nothing to tell.
//!
//! Refuses more than `MISSED_MAX`: the oldest give way, which others have had the longest time to fetch anew.

use super::queue::{BATCH_BYTES, Job};
use crate::entry::Entry;
use crate::key::Digest;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

/// What a thread stores in some seconds of an outage: some 300 bytes each, beside what memory holds anyway.
const MISSED_MAX: usize = 4_096;

/// Told at a time, so that what is new does not wait long behind what is old.
const PIECE: usize = 32;

pub(crate) struct Missed<M>(Mutex<VecDeque<Miss<M>>>);

struct Miss<M> {
    name: String,
    digest: Digest,
    hash: u64,
    entry: Weak<Entry<M>>,
}

impl<M> Missed<M> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Remembers an entry; gives back how many were forgotten for it.
    pub(crate) fn note(&self, job: Job<M>) -> usize {
        let Job::Store { name, digest, hash, entry, .. } = job else { return 1 };
        let mut missed = self.lock();
        missed.push_back(Miss { name, digest, hash, entry: std::sync::Arc::downgrade(&entry) });
        let forgotten = missed.len().saturating_sub(MISSED_MAX);
        missed.drain(..forgotten);
        forgotten
    }

    /// Some of what is still to be told, and how many there is nothing to tell of any more.
    pub(crate) fn take(&self) -> (Vec<Job<M>>, usize) {
        let (mut jobs, mut bytes, mut gone, mut missed) = (Vec::new(), 0, 0, self.lock());
        while jobs.len() < PIECE && bytes < BATCH_BYTES {
            let Some(Miss { name, digest, hash, entry }) = missed.pop_front() else { break };
            match entry.upgrade().filter(|entry| entry.is_live()) {
                Some(entry) => {
                    bytes += entry.weight as usize;
                    jobs.push(Job::Store { name, digest, hash, entry, is_late: true });
                }
                None => gone += 1,
            }
        }
        (jobs, gone)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Miss<M>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::key::{KeyBuilder, Region};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    fn entry() -> Arc<Entry<Note>> {
        Arc::new(Entry::new(Note(String::new()), "body".into(), Duration::from_secs(60), Instant::now()))
    }

    fn store(name: usize, entry: &Arc<Entry<Note>>) -> Job<Note> {
        let digest = KeyBuilder::new().key().digest(&Region::DEFAULT);
        Job::Store { name: name.to_string(), digest, hash: 0, entry: entry.clone(), is_late: false }
    }

    #[test]
    fn what_is_no_longer_held_or_was_ended_is_not_told() {
        let (missed, [kept, ended]) = (Missed::new(), [entry(), entry()]);
        assert_eq!(missed.note(store(0, &kept)) + missed.note(store(1, &ended)) + missed.note(store(2, &entry())), 0);
        ended.retire();
        let (jobs, gone) = missed.take();
        assert_eq!((jobs.len(), gone), (1, 2));
        assert!(missed.is_empty());
    }

    #[test]
    fn the_oldest_give_way_and_pieces_are_small() {
        let (missed, kept) = (Missed::new(), entry());
        let forgotten: usize = (0..MISSED_MAX + 10).map(|n| missed.note(store(n, &kept))).sum();
        assert_eq!(forgotten, 10);
        let (jobs, _) = missed.take();
        assert!(matches!(&jobs[0], Job::Store { name, .. } if name == "10"));
        assert_eq!(jobs.len(), PIECE);
    }
}
