//! Metrics of the cache store: the local cache, hot keys, the clock, and the Redis shards. They are
//! read at scrape time.

use std::sync::Arc;

use shard::{ShardBreakerState, ShardReport, Store};

use super::stored::CacheMeta;
use crate::metrics::{self, Labels};

/// Receives one reading of a metric.
type Emit<'a, T> = &'a mut dyn FnMut(Labels<'_>, T);

/// Registers the metrics of `store`.
pub(crate) fn expose(store: &Arc<Store<CacheMeta>>) {
    let local = Arc::clone(store);
    metrics::expose_gauge_with("tidegate_cache_local_bytes", "Bytes of the memory cache.", move |emit| {
        emit(&[], local.local_report().weight_bytes as f64);
    });
    let hot = Arc::clone(store);
    metrics::expose_gauge_with("tidegate_hot_keys", "Keys that are hot.", move |emit| {
        emit(&[], hot.hot_keys().len() as f64);
    });
    let clock = Arc::clone(store);
    metrics::expose_gauge_with(
        "tidegate_clock_offset_seconds",
        "This machine's wall clock minus the reference clock.",
        move |emit| emit(&[], clock.clock_offset()),
    );
    expose_shards(store);
}

fn expose_shards(store: &Arc<Store<CacheMeta>>) {
    let breakers = Arc::clone(store);
    metrics::expose_gauge_with(
        "tidegate_shard_breaker_open",
        "1 where the breaker of a shard's operation class is open; operation `bus`: not subscribed, so the shard is not read.",
        move |emit| breakers.shard_reports().for_each(|shard| emit_breakers(&shard, emit)),
    );
    let reads = Arc::clone(store);
    metrics::expose_counter_with(
        "tidegate_shard_reads",
        "Reads of the remote cache by shard and result.",
        move |emit| {
            reads.shard_reports().for_each(|shard| emit_reads(&shard, emit));
        },
    );
    let writes = Arc::clone(store);
    metrics::expose_counter_with(
        "tidegate_shard_writes",
        "Writes to the remote cache by shard and result.",
        move |emit| writes.shard_reports().for_each(|shard| emit_writes(&shard, emit)),
    );
    let bus = Arc::clone(store);
    metrics::expose_counter_with(
        "tidegate_shard_bus_faults",
        "Failures of the connections that carry purges and invalidations, by shard.",
        move |emit| bus.shard_reports().for_each(|shard| emit_bus_faults(&shard, emit)),
    );
}

fn emit_breakers(shard: &ShardReport, emit: Emit<'_, f64>) {
    let is_open = |state| state == ShardBreakerState::Open;
    let operations = [
        ("read", is_open(shard.reads)),
        ("read_large", is_open(shard.large_reads)),
        ("write", is_open(shard.writes)),
        ("bus", !shard.is_subscribed),
    ];
    for (operation, is_open) in operations {
        let labels = [("region", shard.region.as_str()), ("endpoint", &shard.endpoint), ("operation", operation)];
        emit(&labels, f64::from(u8::from(is_open)));
    }
}

fn emit_reads(shard: &ShardReport, emit: Emit<'_, u64>) {
    let mut emit = with_shard_labels(shard, "result", emit);
    emit("hit", shard.counts.hits);
    emit("miss", shard.counts.misses);
    emit("expired", shard.counts.expired);
    emit("corrupt", shard.counts.corrupt);
    emit("incompatible", shard.counts.incompatible);
    emit("purged", shard.counts.purged);
    for (fault, count) in shard.read_faults.iter() {
        emit(fault.name(), count + shard.large_read_faults.get(fault));
    }
}

fn emit_writes(shard: &ShardReport, emit: Emit<'_, u64>) {
    let mut emit = with_shard_labels(shard, "result", emit);
    emit("stored", shard.counts.stored);
    emit("deleted", shard.counts.deleted);
    emit("oversize", shard.counts.oversize);
    emit("dropped", shard.counts.dropped_stores + shard.counts.dropped_deletes);
    shard.write_faults.iter().for_each(|(fault, count)| emit(fault.name(), count));
}

fn emit_bus_faults(shard: &ShardReport, emit: Emit<'_, u64>) {
    let mut emit = with_shard_labels(shard, "fault", emit);
    shard.bus_faults.iter().for_each(|(fault, count)| emit(fault.name(), count));
}

/// Adds the shard's labels to readings that differ in the value of the label `name`.
fn with_shard_labels(shard: &ShardReport, name: &'static str, emit: Emit<'_, u64>) -> impl FnMut(&str, u64) {
    move |value, count| {
        emit(&[("region", shard.region.as_str()), ("endpoint", &shard.endpoint), (name, value)], count);
    }
}
