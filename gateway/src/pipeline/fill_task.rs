//! The task that moves a body from the upstream to the readers of a shared fetch, and into the
//! store.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use shard::{CacheKey, Entry, EpochSnapshot, InsertTarget, Region};

use super::pieced_body::PiecedBody;
use super::snapshot::Snapshot;
use super::worker::WorkerResources;
use crate::cache::extent::Extent;
use crate::cache::fill::Producer;
use crate::cache::partial;
use crate::cache::policy::HIT_FOR_MISS_TTL;
use crate::cache::stored::{CacheMeta, CachedObject};
use crate::http::body::BodySource as _;
use crate::http::buffer::ReadSize;
use crate::label;
use crate::tasks::{self, TaskWait};

/// A cache entry whose body is still arriving: its head, key, region and lifetime.
pub(super) struct PendingEntry {
    pub(super) object: CachedObject,
    /// The position of the body in the whole object, if it is a part.
    pub(super) extent: Option<Extent>,
    pub(super) ttl: Duration,
    pub(super) fill_epoch: EpochSnapshot,
    pub(super) key: CacheKey,
    pub(super) region: Region,
}

/// Moves the body of a shared fetch from the upstream to its readers and into the store.
pub(super) struct FillTask {
    /// `None`: the body is shared and not stored.
    pub(super) entry: Option<PendingEntry>,
    pub(super) producer: Producer,
    pub(super) source: PiecedBody,
    /// The length of the body, if the head announced it.
    pub(super) length: Option<u64>,
    pub(super) worker: Rc<WorkerResources>,
    pub(super) snapshot: Arc<Snapshot>,
}

/// The end of a fill, for its span.
pub(super) struct FillEnd {
    pub(super) bytes: u64,
    /// `None`: the body is complete.
    pub(super) failure: Option<FillFailure>,
}

label! {
    /// Why the body of a shared fetch is not complete.
    pub(super) FillFailure, "failure", {
        /// No reader was left.
        Abandoned = "abandoned",
        /// The body has failed.
        Aborted = "aborted",
    }
}

impl FillTask {
    /// Stores the body once it is complete. Ends early when no reader is left.
    pub(super) async fn run(self) -> FillEnd {
        let FillTask { mut entry, mut producer, mut source, length, worker, snapshot } = self;
        // The body belongs to the cache, not to the connection of its first reader.
        source.set_read_size(ReadSize::Normal);
        let mut is_kept = entry.is_some();
        if !is_kept {
            producer.stop_keeping();
        }
        loop {
            let filled = poll_fn(|cx| match producer.poll_ready(cx) {
                Poll::Ready(true) => source.poll_fill(cx).map(Some),
                Poll::Ready(false) => Poll::Ready(None),
                Poll::Pending => {
                    tasks::set_waiting_for(TaskWait::Readers);
                    Poll::Pending
                }
            });
            match filled.await {
                None => return FillEnd { bytes: producer.length(), failure: Some(FillFailure::Abandoned) },
                Some(Err(error)) => {
                    tracing::debug!(%error, "the body of a shared fetch failed");
                    let bytes = producer.length();
                    producer.abort(error);
                    return FillEnd { bytes, failure: Some(FillFailure::Aborted) };
                }
                Some(Ok(())) => {}
            }
            let data = source.data();
            if data.is_empty() {
                break;
            }
            let count = data.len();
            if is_kept && !producer.can_keep(count as u64, snapshot.cache.object_bytes) {
                is_kept = false;
                producer.stop_keeping();
                if producer.length() + count as u64 > snapshot.cache.object_bytes {
                    mark_uncacheable(entry.as_ref(), &worker);
                }
            }
            // Stored before the last bytes of a known length are sent: a client that has read them
            // finds the entry.
            if length.is_some_and(|length| producer.length() + count as u64 == length) {
                store(entry.take(), producer.body_with(data), (&worker, &snapshot));
            }
            producer.push(data);
            source.consume(count);
        }
        if entry.is_some() {
            store(entry, producer.body_with(&[]), (&worker, &snapshot));
        }
        let bytes = producer.length();
        producer.complete(source.all_trailers());
        FillEnd { bytes, failure: None }
    }
}

/// Stores a body that was kept, unless it is not the part that its head announced.
fn store(entry: Option<PendingEntry>, body: Option<Bytes>, (worker, snapshot): (&WorkerResources, &Snapshot)) {
    if let (Some(entry), Some(body)) = (entry, body)
        && entry.extent.is_none_or(|extent| extent.length == body.len() as u64)
    {
        entry.store(worker, snapshot, body);
    }
}

/// Marks the key of an object that turned out too large to store: the next requests of it do not
/// wait for each other.
fn mark_uncacheable(entry: Option<&PendingEntry>, worker: &WorkerResources) {
    if let Some(PendingEntry { extent: None, fill_epoch, key, region, .. }) = entry {
        let marker = Entry::new(CacheMeta::HitForMiss, Bytes::new(), HIT_FOR_MISS_TTL, Instant::now());
        worker.view.insert(region, &key.as_key(), marker.with_fill_epoch(*fill_epoch), InsertTarget::Local);
    }
}

impl PendingEntry {
    /// Stores `body`, combined with a part that is stored already.
    pub(super) fn store(self, worker: &WorkerResources, snapshot: &Snapshot, body: Bytes) {
        let key = self.key.as_key();
        let (meta, body) = match self.extent {
            None => (CacheMeta::Object(self.object), body),
            Some(extent) => {
                let stored = worker.view.lookup_local(&key);
                if stored.as_ref().is_some_and(|hit| matches!(hit.meta, CacheMeta::Object(_))) {
                    // The whole object was stored in the meantime.
                    return;
                }
                let stored = stored.as_ref().and_then(|hit| match &hit.meta {
                    CacheMeta::Partial(object, extent) => Some((object, *extent, hit.body())),
                    _ => None,
                });
                partial::combine(stored, (self.object, extent, body), snapshot.cache.object_bytes)
            }
        };
        let is_shared = matches!(meta, CacheMeta::Object(_)) && body.len() as u64 <= snapshot.cache.remote_object_bytes;
        let target = if is_shared { InsertTarget::LocalAndRemote } else { InsertTarget::Local };
        let entry = Entry::new(meta, body, self.ttl, Instant::now()).with_fill_epoch(self.fill_epoch);
        worker.view.insert(&self.region, &key, entry, target);
    }
}
