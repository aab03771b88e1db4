//! What a look into the local tier costs: the thread's table, the cache that threads share, and what is stored in both.
//! `cargo bench --package shard --bench local`

use std::hint::black_box;
use std::time::{Duration, Instant};

use divan::Bencher;
use serde::{Deserialize, Serialize};
use shard::{Entry, KeyBuilder, LocalSettings, Meta, Reach, Region, Store, Tag, View};

/// More than a table holds, and all of them in memory.
const MANY: u32 = 100_000;

fn main() {
    divan::main();
}

#[derive(Serialize, Deserialize)]
struct Note;

impl Meta for Note {
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

fn view() -> View<Note> {
    Store::new(LocalSettings { memory_bytes: 1 << 30, hot_rate: 1_000 }, None).expect("a local store").view()
}

fn key(n: u32) -> KeyBuilder {
    let mut key = KeyBuilder::new();
    key.part(b"http").part(b"shop.example").part(b"/orders/").part(&n.to_le_bytes());
    key
}

fn put(view: &View<Note>, n: u32) {
    let entry = Entry::new(Note, vec![0; 1_000].into(), Duration::from_secs(3_600), Instant::now());
    view.insert(&Region::DEFAULT, &key(n).key(), entry, Reach::Local);
}

/// One key, which the thread's table has.
#[divan::bench]
fn near(bencher: Bencher<'_, '_>) {
    let view = view();
    put(&view, 0);
    let (key, now) = (key(0), Instant::now());
    bencher.bench_local(|| black_box(view.local_at(&key.key(), now)).is_some());
}

/// The same with the key's hash computed before.
#[divan::bench]
fn near_hashed(bencher: Bencher<'_, '_>) {
    let view = view();
    put(&view, 0);
    let (key, now) = (key(0).key().to_owned(), Instant::now());
    bencher.bench_local(|| black_box(view.local_at(&key.as_key(), now)).is_some());
}

/// Ever another key of many: mostly from the cache that threads share, out of the processor's caches.
#[divan::bench(sample_size = 1000)]
fn memory(bencher: Bencher<'_, '_>) {
    let view = view();
    (0..MANY).for_each(|n| put(&view, n));
    let keys: Vec<_> = (0..MANY).map(|n| key(n.wrapping_mul(2_654_435_761) % MANY).key().to_owned()).collect();
    let (mut next, now) = (0, Instant::now());
    bencher.bench_local(|| {
        next = (next + 1) % keys.len();
        black_box(view.local_at(&keys[next].as_key(), now)).is_some()
    });
}

/// A key that nobody has.
#[divan::bench(sample_size = 1000)]
fn absent(bencher: Bencher<'_, '_>) {
    let view = view();
    let (key, now) = (key(0).key().to_owned(), Instant::now());
    bencher.bench_local(|| black_box(view.local_at(&key.as_key(), now)).is_none());
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
