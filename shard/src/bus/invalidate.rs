//! Owns the application of invalidations to the local cache: changes of entries, and removals,
//! which tombstones report (see `remote::tombstone`).
//!
//! A changed entry is removed unless its revision is the one that the server has now. A removed one
//! is removed unless its fill began after the removal. Fills in flight cannot be compared yet, so
//! none that began before the report is stored, except after changes by this process alone.
//!
//! An entry that cannot be compared, because the server does not reply, is removed. So is one whose
//! tombstone is gone when it is read: it has expired, or was evicted as soon as it was set.
//!
//! Refuses nothing.
//! Invariant: after a batch of invalidations, neither a cached entry nor a fill in flight is older
//! than a removal in the batch.

use super::Bus;
use super::subscription::{CommandHandle, Invalidation, Subscription};
use crate::entry::{EntryMeta, EnvelopeCodec, REVISION_BYTES};
use crate::key::CacheKey;
use crate::remote::{ChangedKey, FillBeginning, ShardFault, TOMBSTONE_BYTES_MAX, Tombstone};
use redis::Value;
use std::sync::atomic::Ordering;

/// The reads from the server that a batch of invalidations requires.
#[derive(Default)]
struct PendingReads {
    /// Cached entries that changed, with their revision, and their keys in Redis.
    cached: Vec<(CacheKey, u64)>,
    entry_keys: Vec<Vec<u8>>,
    /// Digest prefix of each tombstone, and whether this process has set one.
    tombstones: Vec<(u64, bool)>,
    tombstone_keys: Vec<Vec<u8>>,
}

impl<M: EntryMeta> Bus<M> {
    /// Applies a batch of invalidations.
    pub(super) async fn apply_invalidations(
        &self,
        subscription: &Subscription,
        commands: &CommandHandle,
        invalidations: Vec<Invalidation>,
    ) -> Result<(), ShardFault> {
        let mut reads = PendingReads::default();
        let mut has_bus_events = false;
        for invalidation in invalidations {
            match invalidation {
                Invalidation::Everything => return Err(ShardFault::Io),
                Invalidation::BusState => has_bus_events = true,
                Invalidation::Entry(digest_prefix, key) => {
                    self.counts.invalidations.fetch_add(1, Ordering::Relaxed);
                    self.store.hot_copies().invalidate(digest_prefix);
                    if self.take_own(subscription, ChangedKey::Entry(digest_prefix)) {
                        continue;
                    }
                    // Recorded whatever revision is cached: an older one may be in flight.
                    self.store.epochs().record_change(digest_prefix);
                    if let Some((cache_key, entry)) = self.store.local().find_by_digest_prefix(digest_prefix) {
                        reads.cached.push((cache_key, entry.revision()));
                        reads.entry_keys.push(key);
                    }
                }
                Invalidation::Tombstone(digest_prefix, key) => {
                    self.store.hot_copies().invalidate(digest_prefix);
                    let is_own = self.take_own(subscription, ChangedKey::Tombstone(digest_prefix));
                    if !is_own {
                        self.store.epochs().record_change(digest_prefix);
                    }
                    // An own tombstone is read too: the server reports two changes at once as one,
                    // and the other may be a removal by another node.
                    if is_own || self.store.local().find_by_digest_prefix(digest_prefix).is_some() {
                        reads.tombstones.push((digest_prefix, is_own));
                        reads.tombstone_keys.push(key);
                    }
                }
            }
        }
        let compared = async {
            self.compare_revisions(commands, &reads).await?;
            self.compare_tombstones((subscription, commands), &reads).await
        };
        if let Err(fault) = compared.await {
            // A single unanswered command does not end the subscription, and no report is repeated.
            self.remove_uncompared(&reads);
            return Err(fault);
        }
        if has_bus_events && subscription.carries_bus() {
            self.read_events(subscription, commands, false).await?;
            self.positions_changed.notify_waiters();
        }
        Ok(())
    }

    /// Whether this process made the change, on any shard of the server.
    fn take_own(&self, subscription: &Subscription, key: ChangedKey) -> bool {
        subscription.shards.iter().any(|&shard| self.store.remote_shards()[shard].self_invalidations().take(key))
    }

    async fn compare_revisions(&self, commands: &CommandHandle, reads: &PendingReads) -> Result<(), ShardFault> {
        if reads.entry_keys.is_empty() {
            return Ok(());
        }
        let heads = commands.read_heads(&reads.entry_keys, REVISION_BYTES).await?;
        for ((key, revision), head) in reads.cached.iter().zip(heads) {
            let is_same = match &head {
                Value::BulkString(head) => EnvelopeCodec::revision(head) == Some(*revision),
                _ => false,
            };
            if !is_same {
                self.store.local().remove(&key.as_key());
            }
        }
        Ok(())
    }

    async fn compare_tombstones(
        &self,
        (subscription, commands): (&Subscription, &CommandHandle),
        reads: &PendingReads,
    ) -> Result<(), ShardFault> {
        if reads.tombstone_keys.is_empty() {
            return Ok(());
        }
        let values = commands.read_heads(&reads.tombstone_keys, TOMBSTONE_BYTES_MAX).await?;
        for (&(digest_prefix, is_own), value) in reads.tombstones.iter().zip(values) {
            match &value {
                Value::BulkString(value) => {
                    self.apply_tombstone(subscription, (digest_prefix, is_own), Tombstone::parse(value));
                }
                _ => return Err(ShardFault::Protocol),
            }
        }
        Ok(())
    }

    fn remove_uncompared(&self, reads: &PendingReads) {
        reads.cached.iter().for_each(|(key, _)| _ = self.store.local().remove(&key.as_key()));
        for &(digest_prefix, is_own) in &reads.tombstones {
            if is_own {
                self.store.epochs().record_change(digest_prefix);
            }
            if let Some((cache_key, _)) = self.store.local().find_by_digest_prefix(digest_prefix) {
                self.store.local().remove(&cache_key.as_key());
            }
        }
    }

    /// Removes the cached entry if it is older than the removal. `None`: the tombstone is gone, or
    /// a later release set it in another format, so any entry may be older.
    fn apply_tombstone(
        &self,
        subscription: &Subscription,
        (digest_prefix, is_own): (u64, bool),
        tombstone: Option<Tombstone>,
    ) {
        let epochs = self.store.epochs();
        if is_own && tombstone.is_none_or(|tombstone| tombstone.reports_other_process(epochs.process())) {
            epochs.record_change(digest_prefix);
        }
        let Some((cache_key, entry)) = self.store.local().find_by_digest_prefix(digest_prefix) else { return };
        // The clock of the server that dated the removal. The entry may come from another one, if
        // the slot has moved since.
        let clock = subscription.shards.first().map(|&shard| self.store.remote_shards()[shard].clock());
        let is_newer = tombstone.zip(entry.fill_epoch()).zip(clock).is_none_or(|((tombstone, began), clock)| {
            tombstone.is_newer_than(FillBeginning::new(epochs, began, clock))
        });
        if is_newer {
            self.store.local().remove(&cache_key.as_key());
        }
    }
}
