//! Owns the telling: what one thread has to say to a shard goes out from here, in order.
//!
//! Storing and removing never wait on a request's path: they are queued, and one task per thread and shard sends them in
//! batches over a connection of its own, so that no read queues behind a large body. Entries are encoded only when sent.
//!
//! Entries that newer ones push out are dropped: a later miss. Those that find a failing shard are told again when it is back, if they are
//! still held (see `missed`). Removals are kept in order until the shard answers, because a lost one would let an old entry come back;
//! where it answers that it is the wrong one, they are put aside (see `strays`).
//!
//! Refuses to grow: see `queue`.
//! Invariant: of one thread's jobs for a key, an earlier one never takes effect after a later one that was confirmed, except for
//! what a hung server still has in its receive buffer when its connection is given up, and for a removal put aside: a newer entry
//! that goes with the old one is a later miss.

use super::counts::Counts;
use super::echoes::Echoes;
use super::fault::Fault;
use super::link::Link;
use super::missed::Missed;
use super::queue::{Job, Queue};
use super::removals::Removals;
use super::strays::{Aside, Stray, Strays};
use crate::clock::Clock;
use crate::entry::{Entry, Epochs, Judgement, Meta, Seal};
use crate::key::Digest;
use crate::placement::{PREFIX, named};
use redis::{Pipeline, Value};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

/// Between attempts to hand over removals.
const AGAIN: Duration = Duration::from_millis(250);

pub(crate) struct Outbox<M> {
    queue: Arc<Queue<M>>,
    writer: Arc<Writer<M>>,
    task: Mutex<Option<AbortHandle>>,
}

/// What it takes to carry jobs out.
pub(crate) struct Writer<M> {
    pub(crate) link: Link,
    /// Whether it is a place in a cluster, which may be nobody's.
    pub(crate) is_place: bool,
    pub(crate) deadline: Duration,
    pub(crate) seal: Arc<Seal>,
    pub(crate) epochs: Arc<Epochs>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) echoes: Arc<Echoes>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) missed: Missed<M>,
    pub(crate) strays: Strays,
    pub(crate) removals: Arc<Removals>,
    pub(crate) is_watched: Arc<AtomicBool>,
}

impl<M: Meta> Outbox<M> {
    pub(crate) fn new(writer: Writer<M>) -> Self {
        Self { queue: Arc::new(Queue::new()), writer: Arc::new(writer), task: Mutex::new(None) }
    }

    pub(crate) fn push(&self, job: Job<M>) {
        if let Job::Remove { name, .. } = &job {
            self.writer.removal(name, Removals::begin);
        }
        self.queue.push(job).iter().for_each(|job| self.writer.dropped(job));
        self.keep_writing();
    }

    /// Waits until nothing is left to send. Cancel safe.
    pub(crate) async fn drained(&self) {
        self.queue.drained().await;
    }

    pub(crate) fn take_strays(&self) -> VecDeque<Stray> {
        self.writer.strays.take()
    }

    /// Puts a stray that has no place yet aside again.
    pub(crate) fn put_back(&self, stray: Stray) {
        self.writer.put_aside(stray);
    }

    /// Ends a removal that was put aside here: by now it waits elsewhere, or there is nowhere to send it.
    pub(crate) fn resent(&self, name: &str, is_sent: bool) {
        self.writer.removal(name, Removals::end);
        if !is_sent {
            self.writer.counts.dropped_removals.one();
        }
    }

    /// Starts the task that writes, where it is not running. Outside a runtime jobs wait for the next push inside one.
    fn keep_writing(&self) {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            *task = Some(runtime.spawn(write(self.queue.clone(), self.writer.clone())).abort_handle());
        }
    }
}

impl<M> Drop for Outbox<M> {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
    }
}

async fn write<M: Meta>(queue: Arc<Queue<M>>, writer: Arc<Writer<M>>) {
    loop {
        let batch = if writer.missed.is_empty() {
            queue.next().await
        } else {
            match timeout(AGAIN, queue.next()).await {
                Ok(batch) => batch,
                // Nobody has anything new to say: also what finds out that the shard is back.
                Err(_) => {
                    writer.make_up().await;
                    continue;
                }
            }
        };
        let (left, is_told) = writer.carry_out(batch).await;
        let rest = !left.is_empty();
        queue.done(left);
        if rest {
            sleep(AGAIN).await;
        } else if is_told {
            // A piece after each batch: what was missed is told, and nothing new waits long behind it.
            writer.make_up().await;
        }
    }
}

impl<M: Meta> Writer<M> {
    /// Tells the shard a piece of what it has missed, while its changes are being told.
    async fn make_up(&self) {
        if self.link.refuses() || self.missed.is_empty() || !self.is_watched.load(Ordering::Acquire) {
            return;
        }
        let (jobs, gone) = self.missed.take();
        self.lost(gone);
        let _stores_leave_nothing = self.carry_out(jobs).await;
    }

    /// Sends a batch; gives back the removals that are still to be done, and says whether the shard took something.
    async fn carry_out(&self, batch: Vec<Job<M>>) -> (Vec<Job<M>>, bool) {
        if self.link.refuses() {
            return (self.given_up(batch), false);
        }
        let (pipeline, sent) = self.compose(batch).await;
        if sent.is_empty() {
            return (Vec::new(), false);
        }
        match self.link.ask(&pipeline, self.deadline).await {
            Ok(replies) => self.settle(sent, &replies),
            Err(_) => (self.given_up(sent), false),
        }
    }

    async fn compose(&self, batch: Vec<Job<M>>) -> (Pipeline, Vec<Job<M>>) {
        let mut pipeline = Pipeline::with_capacity(batch.len());
        let mut sent = Vec::with_capacity(batch.len());
        for job in batch {
            let composed = match &job {
                // The server was lost sight of, or told of a change: who knows what was removed there meanwhile.
                Job::Store { entry, is_late: true, .. } if self.is_doubted(entry) => false,
                Job::Store { name, digest, hash, entry, is_late } => {
                    let composed = self.compose_store(&mut pipeline, name, digest, *hash, entry).await;
                    if composed && *is_late {
                        pipeline.arg("NX");
                    }
                    composed
                }
                Job::Copy { name, envelope, until } => {
                    let ttl = until.saturating_duration_since(Instant::now()).as_millis() as u64;
                    if ttl > 0 {
                        pipeline.cmd("SET").arg(name).arg(&envelope[..]).arg("PX").arg(ttl);
                    }
                    ttl > 0
                }
                Job::Remove { name, astray } => {
                    // What was astray may take a newer entry with it, and that is news.
                    if astray.is_none() {
                        self.removal(name, |_, name| self.echoes.expect(name));
                    }
                    pipeline.cmd("UNLINK").arg(name);
                    true
                }
            };
            if composed {
                sent.push(job);
            } else {
                self.dropped(&job);
            }
        }
        (pipeline, sent)
    }

    /// False where the entry has become useless while it waited, or cannot be encoded.
    async fn compose_store(
        &self,
        pipeline: &mut Pipeline,
        name: &str,
        digest: &Digest,
        hash: u64,
        entry: &Arc<Entry<M>>,
    ) -> bool {
        let ttl = entry.keep.saturating_sub(entry.age(Instant::now()));
        let ended = entry.since().is_some_and(|since| {
            let is_purged = self.epochs.judge(entry.meta.tags(), since.generation()) == Judgement::Dead;
            is_purged || !self.epochs.is_kept(hash, since)
        });
        if ended || ttl < Duration::from_millis(1) {
            return false;
        }
        let envelope = if self.seal.is_work(entry) {
            let (seal, clock, digest, entry) = (self.seal.clone(), self.clock.clone(), *digest, entry.clone());
            spawn_blocking(move || seal.encode(&digest, &entry, clock.now())).await.ok()
        } else {
            Some(self.seal.encode(digest, entry, self.clock.now()))
        };
        let Some(Ok(envelope)) = envelope else { return false };
        pipeline.cmd("SET").arg(name).arg(envelope).arg("PX").arg(ttl.as_millis() as u64);
        true
    }

    fn is_doubted(&self, entry: &Entry<M>) -> bool {
        entry.since().zip(entry.home()).is_none_or(|(since, home)| {
            self.epochs.was_lost(home.shard, since.generation()) || !self.epochs.is_unchanged(home.name, since)
        })
    }

    /// Of an entry's own slot: a copy is nobody's only one, and servers tell nothing of it.
    fn removal(&self, name: &str, then: impl FnOnce(&Removals, u64)) {
        if let Some(name) = name.strip_prefix(PREFIX).and_then(|name| named(name.as_bytes())) {
            then(&self.removals, name);
        }
    }

    fn settle(&self, sent: Vec<Job<M>>, replies: &[Value]) -> (Vec<Job<M>>, bool) {
        let (mut left, mut is_told) = (Vec::new(), false);
        for (job, reply) in sent.into_iter().zip(replies) {
            let fault = Fault::in_reply(reply);
            is_told |= fault.is_none();
            if let (Some(_), Job::Remove { name, .. }) = (fault, &job) {
                // Nothing was removed, and nothing will be told of it.
                self.removal(name, |_, name| _ = self.echoes.take(name));
            }
            match (fault, &job) {
                // Somebody stored a newer one meanwhile.
                (None, Job::Store { is_late: true, .. }) if *reply == Value::Nil => self.dropped(&job),
                (None, Job::Store { .. } | Job::Copy { .. }) => self.counts.stored.one(),
                (None, Job::Remove { name, .. }) => {
                    self.removal(name, |removals, name| {
                        removals.end(name);
                        // It was not there, and nothing will be told of it.
                        if *reply == Value::Int(0) {
                            self.echoes.take(name);
                        }
                    });
                    self.counts.removed.one();
                }
                (Some(fault), Job::Remove { .. }) if fault.is_evidence() => left.push(job),
                (Some(Fault::Moved), Job::Remove { .. }) => self.is_elsewhere(job),
                (Some(fault), Job::Store { .. }) if fault.is_evidence() => self.lost(self.missed.note(job)),
                (Some(_), _) => self.dropped(&job),
            }
        }
        (left, is_told)
    }

    /// Notes entries and keeps removals.
    fn given_up(&self, batch: Vec<Job<M>>) -> Vec<Job<M>> {
        let (removals, stores): (Vec<_>, Vec<_>) = batch.into_iter().partition(Job::is_removal);
        stores.into_iter().for_each(|job| self.lost(self.missed.note(job)));
        if self.is_place && self.link.is_nowhere() {
            // Nobody holds this place of the cluster, and others may never.
            removals.into_iter().for_each(|job| self.is_elsewhere(job));
            return Vec::new();
        }
        removals
    }

    fn is_elsewhere(&self, job: Job<M>) {
        if let Job::Remove { name, astray } = job {
            self.put_aside(Stray { name, since: astray.unwrap_or_else(Instant::now) });
        }
    }

    fn put_aside(&self, stray: Stray) {
        let name = stray.name.clone();
        match self.strays.add(stray) {
            Aside::Waits => {}
            Aside::Twice => self.removal(&name, Removals::end),
            Aside::GivenUp => self.dropped(&Job::Remove { name, astray: None }),
        }
    }

    fn dropped(&self, job: &Job<M>) {
        match job {
            Job::Store { .. } | Job::Copy { .. } => self.counts.dropped_stores.one(),
            Job::Remove { name, .. } => {
                self.removal(name, Removals::end);
                self.counts.dropped_removals.one();
            }
        }
    }

    /// So many entries will not be told.
    fn lost(&self, entries: usize) {
        (0..entries).for_each(|_| self.counts.dropped_stores.one());
    }
}
