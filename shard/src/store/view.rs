//! Owns one thread's view of the store: its L1 cache, its shard clients, and the order in which
//! cache layers are read and written.
//!
//! Only `lookup_remote` waits, at most for the deadline, and `flush`, which is not called by
//! requests.
//! Invariant: a removed entry is gone from the local cache, on every thread, when `remove` returns.

use super::hot_copies::RevisionRead;
use super::{Redirect, RemoteKey, Store};
use crate::entry::{Entry, EntryMeta, EpochSnapshot, PurgeStatus};
use crate::hot::TopKSketch;
use crate::key::{KeyRef, Region, Tag};
use crate::local::{L1Cache, L1Entry, ValidityCheck};
use crate::remote::{FetchedEntry, ReadRequest, ReadTarget, ShardClient, ShardContext, ShardFault, StoreJob, WriteJob};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Slots of the L1 cache swept per maintenance run: the whole table in 128 runs. Each reads and
/// frees memory that may not have been used for long, which takes up to 75 us on a virtual machine
/// (tests/memory.rs).
const L1_SWEEP_SLOTS: usize = 128;

/// So many invalid entries in a run mean that many expired or were purged together: the next run
/// follows soon.
const L1_SWEEP_FULL: usize = L1_SWEEP_SLOTS / 8;

/// Interval of resending redirected deletes: each further redirect triggers a topology refresh.
const REDIRECT_RESEND_INTERVAL: Duration = Duration::from_secs(1);

/// The same interval in `flush`, which has little time.
const FLUSH_RESEND_INTERVAL: Duration = Duration::from_millis(100);

/// One thread's access to the store: its L1 cache, its top-k sketch, and a client for each shard.
/// `Send`, so that it can be created before its thread runs; not `Sync`. Its connections belong to
/// the runtime that first uses them.
pub struct StoreView<M> {
    store: Arc<Store<M>>,
    l1: RefCell<L1Cache<M>>,
    sketch: RefCell<TopKSketch>,
    /// One per shard of the store.
    clients: Box<[ShardClient<M>]>,
    deletes_resent_at: Cell<Instant>,
}

/// The cache layer that served a hit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheLayer {
    /// The L1 cache of this thread.
    L1,
    /// The L2 cache, shared by all threads; also for an entry that was just inserted.
    L2,
    /// Redis.
    Remote,
}

/// The layers that an insertion writes to: the local cache, alone or with the remote one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InsertTarget {
    Local,
    /// The local cache at once, and the region's shard in the background.
    LocalAndRemote,
}

/// Result of a lookup in the remote cache.
#[derive(Debug)]
pub enum RemoteLookup<M> {
    /// Found; it is now in the local cache too.
    Found(CacheHit<M>),
    Absent,
    Unavailable(ShardFault),
    /// The region has no remote cache.
    NotConfigured,
}

/// An entry that this thread found, and the cache layer that served it. Cheap to clone; may be held
/// for as long as a response takes.
#[derive(Debug)]
pub struct CacheHit<M> {
    entry: Arc<L1Entry<M>>,
    layer: CacheLayer,
}

impl<M> CacheHit<M> {
    pub fn layer(&self) -> CacheLayer {
        self.layer
    }

    /// The body, with a reference count of this thread: cloning it writes no counter that other
    /// cores write. It keeps the entry alive. (The entry's field `body` has the same bytes with the
    /// reference count that all threads share.)
    pub fn body(&self) -> &Bytes {
        self.entry.body()
    }

    /// The entry, for another thread.
    pub fn share(&self) -> Arc<Entry<M>> {
        self.entry.share()
    }
}

impl<M> Clone for CacheHit<M> {
    fn clone(&self) -> Self {
        Self { entry: self.entry.clone(), layer: self.layer }
    }
}

impl<M> Deref for CacheHit<M> {
    type Target = Entry<M>;

    fn deref(&self) -> &Entry<M> {
        self.entry.entry()
    }
}

impl<M: EntryMeta> StoreView<M> {
    pub(super) fn new(store: Arc<Store<M>>) -> Self {
        store.local.add_thread();
        let clients = store.remote.iter().flat_map(|remote| {
            let context = ShardContext {
                codec: remote.codec.clone(),
                epochs: store.epochs.clone(),
                pending_deletes: remote.pending_deletes.clone(),
                deadline: remote.deadline,
            };
            remote.shards.iter().map(move |shard| ShardClient::new(shard.clone(), context.clone()))
        });
        let sketch = RefCell::new(store.hot.new_sketch());
        Self {
            clients: clients.collect(),
            l1: RefCell::new(L1Cache::new()),
            sketch,
            store,
            deletes_resent_at: Cell::new(Instant::now()),
        }
    }

    /// Looks up an unexpired entry in the local cache. The caller judges its freshness.
    pub fn lookup_local(&self, key: &KeyRef<'_>) -> Option<CacheHit<M>> {
        self.lookup_local_at(key, Instant::now())
    }

    /// `lookup_local` for a caller that has already read the clock.
    pub fn lookup_local_at(&self, key: &KeyRef<'_>, now: Instant) -> Option<CacheHit<M>> {
        self.sketch.borrow_mut().record(key);
        let validity = self.store.local.validity(now);
        let hit = self.l1.borrow_mut().get(key, validity);
        if let Some(hit) = hit {
            if hit.touch_l2 {
                self.store.local.touch(key);
            }
            return Some(CacheHit { entry: hit.entry, layer: CacheLayer::L1 });
        }
        let entry = self.store.local.get(key, validity)?;
        self.store_in_l1(key, &entry, validity);
        Some(CacheHit { entry, layer: CacheLayer::L2 })
    }

    /// Looks up an entry on the region's shard, or a hot entry at one of its copies, within the
    /// deadline. Cancel safe: a late reply is dropped.
    pub async fn lookup_remote(&self, region: &Region, key: &KeyRef<'_>) -> RemoteLookup<M> {
        let Some(remote) = self.store.remote_key(region, key) else { return RemoteLookup::NotConfigured };
        let since = self.epoch_snapshot();
        let found = if self.store.hot.is_hot(key.hash()) {
            self.fetch_hot(region, &remote).await
        } else {
            let client = &self.clients[remote.shard];
            let fetched = client
                .fetch(ReadRequest {
                    name: &remote.redis_key,
                    digest: &remote.digest,
                    target: ReadTarget::Entry,
                    deadline: self.deadline(),
                })
                .await;
            fetched.map(|found| found.map(|found| found.entry))
        };
        match found {
            Ok(Some(entry)) => {
                let (entry, _) =
                    self.store_locally(key, entry.with_fill_epoch(since).with_location(Some(remote.location())));
                RemoteLookup::Found(CacheHit { entry, layer: CacheLayer::Remote })
            }
            Ok(None) => RemoteLookup::Absent,
            Err(fault) => RemoteLookup::Unavailable(fault),
        }
    }

    /// Reads one of the copies if their locations are recorded, else the entry's own slot. A copy
    /// that is missing or of another revision is replaced.
    async fn fetch_hot(&self, region: &Region, remote: &RemoteKey) -> Result<Option<Entry<M>>, ShardFault> {
        let (copies, started) = (&self.store.hot_copies, Instant::now());
        let choice = copies.choose(&remote.digest, self.sketch.borrow_mut().random());
        if let Some(choice) = &choice {
            let location = choice.location();
            // Half of the deadline, so that a slow server leaves time for the other.
            let target = ReadTarget::Copy { revision: choice.revision };
            let found = self.clients[location.shard]
                .fetch(ReadRequest {
                    name: &location.redis_key,
                    digest: &remote.digest,
                    target,
                    deadline: self.deadline() / 2,
                })
                .await;
            match found {
                // A change may have been reported while this copy was being read.
                Ok(Some(found)) if copies.is_current(choice) => {
                    return Ok(Some(found.entry));
                }
                // Cluster slots have moved: compute the copies' locations again.
                Err(ShardFault::Moved) => copies.invalidate(remote.digest.prefix()),
                Ok(_) | Err(_) => {}
            }
        }
        let (change_count, remaining) =
            (copies.change_count(&remote.digest), self.deadline().saturating_sub(started.elapsed()));
        let fetched = self.clients[remote.shard].fetch(ReadRequest {
            name: &remote.redis_key,
            digest: &remote.digest,
            target: ReadTarget::Entry,
            deadline: remaining,
        });
        let Some(found) = fetched.await? else {
            return Ok(None);
        };
        let FetchedEntry { entry, envelope } = found;
        let read = RevisionRead { revision: entry.revision(), change_count };
        copies.record_revision(&remote.digest, read, || self.store.copy_locations(region, remote));
        if let Some(choice) = choice.filter(|choice| choice.revision == entry.revision() && copies.claim_write(choice))
        {
            let (location, until) = (choice.location(), entry.expires_at());
            self.clients[location.shard].enqueue(WriteJob::Copy { name: location.redis_key.clone(), envelope, until });
        }
        Ok(Some(entry))
    }

    fn deadline(&self) -> Duration {
        self.store.remote.as_ref().map_or(Duration::ZERO, |remote| remote.deadline)
    }

    /// The current epochs. Read them before a fill's request is sent and pass them to its entry
    /// (`Entry::with_fill_epoch`): the entry is then not stored if any key that it turns out to
    /// have is deleted, or one of its tags purged, while the fill runs.
    pub fn epoch_snapshot(&self) -> EpochSnapshot {
        self.store.epochs.snapshot()
    }

    /// Whether neither the key was deleted by any node, nor one of `tags` purged, since then, as
    /// far as it was reported.
    #[expect(clippy::too_many_arguments, reason = "region and key name the entry, as in `insert`")]
    pub fn is_unchanged_since(&self, region: &Region, key: &KeyRef<'_>, tags: &[Tag], since: EpochSnapshot) -> bool {
        let epochs = &self.store.epochs;
        let is_unchanged_remotely = || {
            let remote = self.store.remote_key(region, key);
            remote.is_none_or(|remote| epochs.is_unchanged_since(remote.digest.prefix(), since))
        };
        epochs.is_undeleted_since(key.hash(), since)
            && epochs.purge_status(tags, since.generation()) == PurgeStatus::Unaffected
            && is_unchanged_remotely()
    }

    /// As `is_unchanged_since`, whatever tags the entry will have: false after any purge.
    pub fn is_untouched_since(&self, region: &Region, key: &KeyRef<'_>, since: EpochSnapshot) -> bool {
        self.epoch_snapshot().generation() == since.generation() && self.is_unchanged_since(region, key, &[], since)
    }

    /// Stores an entry. The returned hit serves the response even if nothing could be stored.
    #[expect(
        clippy::too_many_arguments,
        reason = "region and key name the entry; a struct would only repeat them at every call"
    )]
    pub fn insert(&self, region: &Region, key: &KeyRef<'_>, entry: Entry<M>, target: InsertTarget) -> CacheHit<M> {
        // A removal by another node is found by the location, so an entry that is stored locally
        // only has one, too.
        let remote = self.store.remote_key(region, key);
        let (entry, is_stored) = self.store_locally(key, entry.with_location(remote.as_ref().map(RemoteKey::location)));
        if is_stored
            && target == InsertTarget::LocalAndRemote
            && let Some(remote) = remote
        {
            let (name, digest, hash) = (remote.redis_key, remote.digest, key.hash());
            self.clients[remote.shard].enqueue(WriteJob::Store(StoreJob {
                name,
                digest,
                hash,
                entry: entry.share(),
                is_retry: false,
            }));
        }
        CacheHit { entry, layer: CacheLayer::L2 }
    }

    /// Removes an entry from the local cache now, and from the region's shard and the other nodes
    /// in the background. Fills of the key that began before are stored nowhere, whichever node
    /// they run on.
    pub fn remove(&self, region: &Region, key: &KeyRef<'_>) {
        let Some(remote) = self.store.remote_key(region, key) else {
            self.store.local.remove(key);
            return;
        };
        // The pending delete first: a read that started before is not stored once the local cache
        // has recorded the deletion, and a later read finds the pending delete.
        let client = &self.clients[remote.shard];
        client.begin_delete(&remote.redis_key);
        self.store.hot_copies.invalidate(remote.digest.prefix());
        let removal = Some(self.store.local.remove(key));
        client.enqueue(WriteJob::Delete { name: remote.redis_key, removal, redirected_since: None });
    }

    /// Incremental maintenance: sweeps a bounded batch of invalid entries, reports hot keys, and
    /// resends redirected deletes. Call about once a second, and again soon if it returns true:
    /// there may be more.
    pub fn run_maintenance(&self) -> bool {
        let validity = self.store.local.validity(Instant::now());
        let is_l1_full = self.l1.borrow_mut().sweep(L1_SWEEP_SLOTS, validity) >= L1_SWEEP_FULL;
        self.store.hot.report_rates(&mut self.sketch.borrow_mut(), validity.now);
        if validity.now.duration_since(self.deletes_resent_at.get()) >= REDIRECT_RESEND_INTERVAL {
            self.resend_redirected_deletes();
        }
        self.store.local.run_maintenance(validity) || is_l1_full
    }

    /// Waits until all queued writes are carried out or dropped; false if that took longer than
    /// `timeout`. For shutdown. Cancel safe.
    pub async fn flush(&self, timeout: Duration) -> bool {
        let drained = async {
            loop {
                for client in &self.clients {
                    client.wait_drained().await;
                }
                if !self.resend_redirected_deletes() {
                    return;
                }
                sleep(FLUSH_RESEND_INTERVAL).await;
            }
        };
        tokio::time::timeout(timeout, drained).await.is_ok()
    }

    /// Resends deletes that a cluster server redirected, to their current owner; returns whether
    /// there were any.
    fn resend_redirected_deletes(&self) -> bool {
        self.deletes_resent_at.set(Instant::now());
        let mut has_any = false;
        for (shard, client) in self.clients.iter().enumerate() {
            for delete in client.take_redirected_deletes() {
                has_any = true;
                match self.store.redirect(shard, &delete.name) {
                    Redirect::To(owner) => {
                        let (name, removal) = (delete.name.clone(), delete.removal);
                        let redirected_since = Some(delete.redirected_since);
                        // Queued on the new shard before it is finished on the old one, so that no
                        // read finds the entry in between.
                        self.clients[owner].begin_delete(&name);
                        self.clients[owner].enqueue(WriteJob::Delete { name, removal, redirected_since });
                        client.finish_redirected_delete(&delete.name, true);
                    }
                    Redirect::Unknown => client.defer_delete(delete),
                    Redirect::NoCluster => client.finish_redirected_delete(&delete.name, false),
                }
            }
        }
        has_any
    }

    pub fn store(&self) -> &Arc<Store<M>> {
        &self.store
    }

    fn store_locally(&self, key: &KeyRef<'_>, entry: Entry<M>) -> (Arc<L1Entry<M>>, bool) {
        let now = Instant::now();
        let inserted = self.store.local.insert(key, entry, now);
        if inserted.is_stored {
            self.store_in_l1(key, &inserted.entry, self.store.local.validity(now));
        }
        (inserted.entry, inserted.is_stored)
    }

    fn store_in_l1(&self, key: &KeyRef<'_>, entry: &Arc<L1Entry<M>>, validity: ValidityCheck<'_>) {
        let mut l1 = self.l1.borrow_mut();
        l1.set_budget(self.store.local.l1_budget());
        l1.insert(key, entry.clone(), validity);
    }
}

impl<M> Drop for StoreView<M> {
    fn drop(&mut self) {
        self.store.hot.remove_thread(self.sketch.get_mut());
        self.store.local.remove_thread();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::TestMeta;
    use crate::entry::{Purge, PurgeScope};
    use crate::key::KeyBuilder;
    use crate::store::LocalConfig;

    const EVERYTHING: Purge = Purge { scope: PurgeScope::Everything, is_soft: false };

    fn store() -> Arc<Store<TestMeta>> {
        Store::new(LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 }, None).unwrap()
    }

    fn entry(text: &str) -> Entry<TestMeta> {
        Entry::new(TestMeta(text.into()), Bytes::from_static(b"body"), Duration::from_secs(60), Instant::now())
    }

    fn large(text: &str) -> Entry<TestMeta> {
        Entry::new(TestMeta(text.into()), vec![0; 10_000].into(), Duration::from_secs(60), Instant::now())
    }

    #[test]
    fn a_removal_applies_to_all_threads() {
        let (mut builder, store) = (KeyBuilder::new(), store());
        let key = builder.part(b"/").key();
        let (one, two) = (store.view(), store.view());
        one.insert(&Region::DEFAULT, &key, entry("a"), InsertTarget::LocalAndRemote);
        assert_eq!(two.lookup_local(&key).map(|hit| hit.layer()), Some(CacheLayer::L2));
        assert_eq!(two.lookup_local(&key).map(|hit| hit.layer()), Some(CacheLayer::L1));
        one.remove(&Region::DEFAULT, &key);
        assert!(one.lookup_local(&key).is_none() && two.lookup_local(&key).is_none());
    }

    #[test]
    fn a_replaced_entry_is_not_served_from_another_l1_cache() {
        let (mut builder, store) = (KeyBuilder::new(), store());
        let key = builder.part(b"/").key();
        let (one, two) = (store.view(), store.view());
        one.insert(&Region::DEFAULT, &key, entry("old"), InsertTarget::Local);
        let old_hit = two.lookup_local(&key).unwrap();
        one.insert(&Region::DEFAULT, &key, entry("new"), InsertTarget::Local);
        assert_eq!(two.lookup_local(&key).unwrap().meta.0, "new");
        assert_eq!((old_hit.meta.0.as_str(), old_hit.body().as_ref()), ("old", &b"body"[..]));
    }

    #[test]
    fn a_purge_applies_to_all_l1_caches_and_running_fills() {
        let (mut builder, store) = (KeyBuilder::new(), store());
        let key = builder.part(b"/").key();
        let (one, two) = (store.view(), store.view());
        one.insert(&Region::DEFAULT, &key, entry("a"), InsertTarget::Local);
        two.lookup_local(&key).unwrap();
        let since = two.epoch_snapshot();
        store.purge_locally(EVERYTHING);
        assert!(one.lookup_local(&key).is_none() && two.lookup_local(&key).is_none());
        let served = two.insert(&Region::DEFAULT, &key, entry("late").with_fill_epoch(since), InsertTarget::Local);
        assert_eq!(served.meta.0, "late");
        assert!(one.lookup_local(&key).is_none() && two.lookup_local(&key).is_none());
    }

    /// The L2 cache evicts entries with little use, and only a part of the L1 hits is reported to
    /// it.
    #[test]
    fn an_entry_with_l1_hits_is_not_evicted_by_colder_ones() {
        let (store, now) = (store(), Instant::now());
        let (one, two) = (store.view(), store.view());
        let mut hot = KeyBuilder::new();
        let hot = hot.part(b"hot").key();
        one.insert(&Region::DEFAULT, &hot, large("hot"), InsertTarget::Local);
        for n in 0..40u32 {
            for _ in 0..20 {
                assert!(one.lookup_local_at(&hot, now + n * Duration::from_secs(1)).is_some(), "evicted after {n} s");
            }
            for m in 0..50 {
                let mut cold = KeyBuilder::new();
                let cold = cold.part(&(n * 50 + m).to_le_bytes()).key();
                two.insert(&Region::DEFAULT, &cold, large("cold"), InsertTarget::Local);
                store.local.touch(&cold);
            }
            store.local.run_maintenance(store.local.validity(Instant::now()));
        }
    }

    #[test]
    fn a_view_can_be_sent_to_its_thread() {
        let view = store().view();
        std::thread::spawn(move || view.run_maintenance()).join().unwrap();
    }
}
