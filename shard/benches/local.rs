//! Cost of a lookup in the local cache: an L1 hit, an L2 hit, a miss, and an insertion.
//! `cargo bench --package shard --bench local`

use std::hint::black_box;
use std::time::{Duration, Instant};

use divan::Bencher;
use serde::{Deserialize, Serialize};
use shard::{Entry, EntryMeta, InsertTarget, KeyBuilder, LocalConfig, Region, Store, StoreView, Tag};

/// More than an L1 cache holds, all of them in memory.
const MANY: u32 = 100_000;

fn main() {
    divan::main();
}

#[derive(Serialize, Deserialize)]
struct Note;

impl EntryMeta for Note {
    const SCHEMA: u16 = 1;

    fn heap_bytes(&self) -> usize {
        0
    }

    fn tags(&self) -> &[Tag] {
        &[]
    }

    fn is_compressible(&self) -> bool {
        false
    }
}

fn view() -> StoreView<Note> {
    Store::new(LocalConfig { memory_bytes: 1 << 30, hot_rate: 1_000 }, None).expect("a local store").view()
}

fn key(n: u32) -> KeyBuilder {
    let mut key = KeyBuilder::new();
    key.part(b"http").part(b"shop.example").part(b"/orders/").part(&n.to_le_bytes());
    key
}

fn put(view: &StoreView<Note>, n: u32) {
    let entry = Entry::new(Note, vec![0; 1_000].into(), Duration::from_secs(3_600), Instant::now());
    view.insert(&Region::DEFAULT, &key(n).key(), entry, InsertTarget::Local);
}

/// One key, in the L1 cache.
#[divan::bench]
fn l1_hit(bencher: Bencher<'_, '_>) {
    let view = view();
    put(&view, 0);
    let (key, now) = (key(0), Instant::now());
    bencher.bench_local(|| black_box(view.lookup_local_at(&key.key(), now)).is_some());
}

/// The same with a precomputed hash of the key.
#[divan::bench]
fn l1_hit_prehashed(bencher: Bencher<'_, '_>) {
    let view = view();
    put(&view, 0);
    let (key, now) = (key(0).key().to_owned(), Instant::now());
    bencher.bench_local(|| black_box(view.lookup_local_at(&key.as_key(), now)).is_some());
}

/// A different key of many each time: mostly an L2 hit that misses the CPU caches.
#[divan::bench(sample_size = 1000)]
fn l2_hit(bencher: Bencher<'_, '_>) {
    let view = view();
    (0..MANY).for_each(|n| put(&view, n));
    let keys: Vec<_> = (0..MANY).map(|n| key(n.wrapping_mul(2_654_435_761) % MANY).key().to_owned()).collect();
    let (mut next, now) = (0, Instant::now());
    bencher.bench_local(|| {
        next = (next + 1) % keys.len();
        black_box(view.lookup_local_at(&keys[next].as_key(), now)).is_some()
    });
}

/// A key that is not cached.
#[divan::bench(sample_size = 1000)]
fn miss(bencher: Bencher<'_, '_>) {
    let view = view();
    let (key, now) = (key(0).key().to_owned(), Instant::now());
    bencher.bench_local(|| black_box(view.lookup_local_at(&key.as_key(), now)).is_none());
}

#[divan::bench(sample_size = 1000)]
fn insert(bencher: Bencher<'_, '_>) {
    let view = view();
    let mut next = 0;
    bencher.bench_local(|| {
        next = (next + 1) % MANY;
        put(&view, next);
    });
}
