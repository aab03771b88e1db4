//! Owns a shard: one Redis server that holds some slots of a region, as all threads see it (`Shard`) and as one of them uses it
//! (`Wire`).
//!
//! A value is read with `GETRANGE`, which serves a string like `GET` and lets the server cut it. The first `FIRST` bytes are asked
//! for over the connection that all small reads share; where they are the beginning of a longer envelope that would be accepted,
//! the whole is asked for over another, so that no small read stands behind a large body. An oversized value is never pulled in
//! whole. (A server that lies about the protocol itself can still send more: the client reads what is announced.)
//!
//! Refuses to retry, and to wait longer than the deadline for anything.
//! Invariant: a shard that is slow, gone or wrong is a miss, at once after its breaker has opened.

mod breaker;
mod cluster;
mod counts;
mod echoes;
mod fault;
mod lane;
mod link;
mod missed;
mod outbox;
mod queue;
mod removals;
mod scout;
mod sentinel;
mod site;
mod strays;

pub use breaker::BreakerState;
pub(crate) use cluster::{Cluster, PLACES};
pub use counts::ShardCounts;
pub use fault::Fault;
pub use lane::FaultCounts;
pub(crate) use lane::Lane;
pub(crate) use link::Link;
pub(crate) use queue::Job;
pub(crate) use removals::Removals;
pub(crate) use scout::Scout;
pub(crate) use sentinel::Sentinels;
pub use site::TlsSettings;
pub(crate) use site::{BadAddress, Dialer, Site, Spot};

use crate::clock::{Clock, Wall};
use crate::entry::{Corrupt, Entry, Epochs, Judgement, Meta, Seal};
use crate::key::{Digest, Region};
use bytes::Bytes;
use counts::{Count, Counts};
use echoes::Echoes;
use missed::Missed;
use outbox::{Outbox, Writer};
use redis::{Pipeline, Value};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use strays::{Stray, Strays};
use tokio::task::spawn_blocking;

/// Writing is off every request's path: it may take this many deadlines per batch.
const WRITE_DEADLINES: u32 = 10;

/// What is asked for first. Most bodies are no larger, and one takes some 50 us of a connection.
const FIRST: usize = 128 << 10;

/// Checking so much takes some 0.1 ms; more is done beside the thread.
const WORK: usize = 256 << 10;

/// A shard as all threads see it.
pub(crate) struct Shard {
    region: Region,
    index: usize,
    /// Of an endpoint, what tells it from others; of a place in a cluster, nothing.
    label: Option<String>,
    site: Arc<Site>,
    reads: Arc<Lane>,
    /// Reads of large bodies: a network that is too slow for these is not too slow for small ones.
    large: Arc<Lane>,
    writes: Arc<Lane>,
    counts: Arc<Counts>,
    echoes: Arc<Echoes>,
    clock: Arc<Clock>,
    /// Whether it may be read: what was purged there is known, and its changes are being told.
    is_watched: Arc<AtomicBool>,
    bus: Lane,
}

/// A shard's state and figures.
#[derive(Clone, Debug)]
pub struct ShardReport {
    /// Whose settings name it; regions without settings of their own use those of `default`.
    pub region: Region,
    /// Its place among the region's endpoints.
    pub index: usize,
    /// Host, port and database; no credentials.
    pub endpoint: String,
    pub reads: BreakerState,
    /// Reads of large bodies.
    pub large: BreakerState,
    pub writes: BreakerState,
    /// Whether what was purged there is known and its changes are being told; it is not read while they are not.
    pub is_watched: bool,
    pub bus_faults: FaultCounts,
    pub read_faults: FaultCounts,
    pub large_faults: FaultCounts,
    pub write_faults: FaultCounts,
    pub counts: ShardCounts,
}

impl Shard {
    pub(crate) fn new(region: Region, index: usize, site: Arc<Site>, label: Option<String>, wall: Arc<Wall>) -> Self {
        let name = label.clone().unwrap_or_else(|| format!("place {index}"));
        Self {
            region,
            index,
            reads: Arc::new(Lane::new(format!("{region} {name} reads"))),
            large: Arc::new(Lane::new(format!("{region} {name} large reads"))),
            writes: Arc::new(Lane::new(format!("{region} {name} writes"))),
            counts: Arc::default(),
            echoes: Arc::default(),
            clock: Arc::new(Clock::new(wall)),
            is_watched: Arc::new(AtomicBool::new(true)),
            bus: Lane::new(format!("{region} {name} bus")),
            site,
            label,
        }
    }

    /// Host, port and database, or the name of a master; of a place in a cluster, who holds it now. `None` while nobody does.
    pub(crate) fn label(&self) -> Option<String> {
        self.label.clone().or_else(|| Some(self.site.now()?.label.clone()))
    }

    pub(crate) fn site(&self) -> &Arc<Site> {
        &self.site
    }

    pub(crate) fn echoes(&self) -> &Echoes {
        &self.echoes
    }

    /// The time at its server.
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// From now on it is not read, until it is in sight.
    pub(crate) fn lose_sight(&self) {
        self.is_watched.store(false, Ordering::Release);
    }

    pub(crate) fn lost_sight(&self, fault: Fault) {
        self.lose_sight();
        self.bus.failed(fault);
    }

    /// Counts a fault of the bus that changes nothing.
    pub(crate) fn note(&self, fault: Fault) {
        self.bus.count(fault);
    }

    pub(crate) fn in_sight(&self) {
        self.is_watched.store(true, Ordering::Release);
    }

    /// A connection of one's own, with the breaker of `lane`.
    pub(crate) fn link(&self, lane: Arc<Lane>) -> Link {
        Link::new(self.site.clone(), lane)
    }

    /// `None` for a place in a cluster that nobody holds.
    pub(crate) fn report(&self) -> Option<ShardReport> {
        Some(ShardReport {
            region: self.region,
            index: self.index,
            endpoint: self.label()?,
            reads: self.reads.state(),
            large: self.large.state(),
            writes: self.writes.state(),
            is_watched: self.is_watched.load(Ordering::Acquire),
            bus_faults: self.bus.faults(),
            read_faults: self.reads.faults(),
            large_faults: self.large.faults(),
            write_faults: self.writes.faults(),
            counts: self.counts.read(),
        })
    }
}

/// A shard as one thread uses it: three connections, each made on its first use.
pub(crate) struct Wire<M> {
    shard: Arc<Shard>,
    reads: Link,
    large: Link,
    outbox: Outbox<M>,
    common: Common,
}

/// What all shards of a store have in common.
#[derive(Clone)]
pub(crate) struct Common {
    pub(crate) seal: Arc<Seal>,
    pub(crate) epochs: Arc<Epochs>,
    pub(crate) removals: Arc<Removals>,
    pub(crate) deadline: Duration,
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// What is in an entry's own slot.
    Entry,
    /// A copy, which is of no use where it is missing or of another edition.
    Copy { edition: u64 },
}

/// What a shard had.
pub(crate) struct Found<M> {
    pub(crate) entry: Entry<M>,
    /// As it was read; the entry's body is a part of it, unless it was compressed.
    pub(crate) envelope: Bytes,
}

impl<M: Meta> Wire<M> {
    pub(crate) fn new(shard: Arc<Shard>, common: Common) -> Self {
        let writer = Writer {
            link: shard.link(shard.writes.clone()),
            is_place: shard.label.is_none(),
            deadline: common.deadline * WRITE_DEADLINES,
            seal: common.seal.clone(),
            epochs: common.epochs.clone(),
            counts: shard.counts.clone(),
            echoes: shard.echoes.clone(),
            clock: shard.clock.clone(),
            missed: Missed::new(),
            strays: Strays::default(),
            removals: common.removals.clone(),
            is_watched: shard.is_watched.clone(),
        };
        let (reads, large) = (shard.link(shard.reads.clone()), shard.link(shard.large.clone()));
        Self { shard, reads, large, outbox: Outbox::new(writer), common }
    }

    /// The entry called `name`, if it is there, sound and in time, within the deadline. Cancel safe.
    pub(crate) async fn fetch(
        &self,
        name: &str,
        digest: &Digest,
        wanted: Wanted,
        deadline: Duration,
    ) -> Result<Option<Found<M>>, Fault> {
        if !self.shard.is_watched.load(Ordering::Acquire) {
            self.shard.reads.count(Fault::Unwatched);
            return Err(Fault::Unwatched);
        }
        // What this process has removed is gone, even where the server has not heard of it yet.
        if self.common.removals.has(digest.beginning()) {
            self.missed(wanted);
            return Ok(None);
        }
        let began = Instant::now();
        let Some(first) = self.read(&self.reads, name, FIRST, deadline).await? else {
            self.missed(wanted);
            return Ok(None);
        };
        // What would be refused is not read whole.
        if first.len() < FIRST || !self.common.seal.is_cut::<M>(digest, &first) {
            return Ok(self.open(&self.reads, name, digest, wanted, first).await);
        }
        let (most, left) = (self.common.seal.envelope_bytes_max(), deadline.saturating_sub(began.elapsed()));
        if left < deadline / 2 {
            // What is left would say nothing about large bodies.
            self.shard.large.count(Fault::Timeout);
            return Err(Fault::Timeout);
        }
        match self.read(&self.large, name, most, left).await? {
            Some(whole) => Ok(self.open(&self.large, name, digest, wanted, whole).await),
            None => {
                self.missed(wanted);
                Ok(None)
            }
        }
    }

    /// The first bytes of a value, at most so many; `None` where there is none.
    async fn read(&self, link: &Link, name: &str, most: usize, deadline: Duration) -> Result<Option<Bytes>, Fault> {
        let mut read = Pipeline::with_capacity(1);
        read.cmd("GETRANGE").arg(name).arg(0).arg(most - 1);
        match link.ask(&read, deadline).await?.pop() {
            // An absent key is an empty string.
            Some(Value::BulkString(value)) if value.is_empty() => Ok(None),
            Some(Value::BulkString(value)) => Ok(Some(Bytes::from(value))),
            reply => {
                if let Some(fault) = reply.as_ref().and_then(Fault::in_reply) {
                    return Err(fault);
                }
                link.distrust();
                Err(Fault::Protocol)
            }
        }
    }

    fn missed(&self, wanted: Wanted) {
        self.count(wanted, &self.shard.counts.misses);
    }

    /// Counts what was found, but of a copy that is of no use: the entry's own slot is asked next.
    fn count(&self, wanted: Wanted, count: &Count) {
        if wanted == Wanted::Entry {
            count.one();
        }
    }

    pub(crate) fn send(&self, job: Job<M>) {
        if let Job::Store { entry, .. } = &job
            && entry.body.len() > self.common.seal.body_bytes_max()
        {
            self.shard.counts.oversize.one();
            return;
        }
        self.outbox.push(job);
    }

    /// Waits until everything sent has been carried out or dropped. Cancel safe.
    pub(crate) async fn drained(&self) {
        self.outbox.drained().await;
    }

    /// Removals that the server said belong elsewhere, in order: `send` each to where it belongs now, and then tell `resent`; or put it
    /// back.
    pub(crate) fn take_strays(&self) -> VecDeque<Stray> {
        self.outbox.take_strays()
    }

    pub(crate) fn put_back(&self, stray: Stray) {
        self.outbox.put_back(stray);
    }

    /// `is_sent` is false where a stray has nowhere to go.
    pub(crate) fn resent(&self, name: &str, is_sent: bool) {
        self.outbox.resent(name, is_sent);
    }

    async fn open(
        &self,
        link: &Link,
        name: &str,
        digest: &Digest,
        wanted: Wanted,
        envelope: Bytes,
    ) -> Option<Found<M>> {
        let counts = &self.shard.counts;
        match self.decode(digest, &envelope).await {
            Ok(Some((entry, _))) if matches!(wanted, Wanted::Copy { edition } if edition != entry.edition()) => {}
            Ok(Some((entry, number))) => {
                match self.common.epochs.judge_foreign(entry.meta.tags(), number) {
                    Judgement::Dead => {
                        self.count(wanted, &counts.purged);
                        return None;
                    }
                    Judgement::Soft(at) => entry.soften(at),
                    Judgement::Sound => {}
                }
                counts.hits.one();
                return Some(Found { entry, envelope });
            }
            Ok(None) => self.count(wanted, &counts.expired),
            Err(reason) if reason.is_foreign() => self.count(wanted, &counts.foreign),
            Err(reason) => {
                // Either the value is damaged, or the connection answers the wrong questions: both are ended.
                counts.corrupt.one();
                tracing::debug!(endpoint = self.shard.label(), %reason, "corrupt entry");
                link.distrust();
                self.outbox.push(Job::Remove { name: name.to_owned(), astray: None });
            }
        }
        None
    }

    async fn decode(&self, digest: &Digest, envelope: &Bytes) -> Result<Option<(Entry<M>, u64)>, Corrupt> {
        if self.common.seal.opened_bytes(envelope) < WORK {
            return self.common.seal.decode(digest, envelope, self.shard.clock.now());
        }
        let (seal, clock, digest, envelope) =
            (self.common.seal.clone(), self.shard.clock.clone(), *digest, envelope.clone());
        let decoding = spawn_blocking(move || seal.decode(&digest, &envelope, clock.now()));
        // Decoding does not panic; were it to, what it was about is worth nothing.
        decoding.await.unwrap_or(Ok(None))
    }
}
