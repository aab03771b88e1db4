//! The local tier under churn and at the end of many entries: it keeps to its memory, and no call stops its thread for long.
//! One test, because both look at the whole process.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use shard::{Entry, KeyBuilder, LocalSettings, Purge, Reach, Region, Scope, Store, Tag, View};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const MIB: usize = 1 << 20;
const THREADS: u64 = 4;
/// Of the thread's own time, 11 ms at most where other work fills the caches meanwhile; without pieces it is seconds.
const PAUSE_MAX: Duration = Duration::from_millis(50);
const HOUR: Duration = Duration::from_secs(3600);

#[derive(Serialize, Deserialize)]
struct Note;

impl shard::Meta for Note {
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

/// Bytes of memory of this process.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a live process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1_024
}

fn spent() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("less than a second"))
}

fn insert(view: &View<Note>, number: u64, bytes: usize, keep: Duration) {
    let mut builder = KeyBuilder::new();
    let key = builder.part(b"/object").part(&number.to_le_bytes()).key();
    view.insert(
        &Region::DEFAULT,
        &key,
        Entry::new(Note, Bytes::from(vec![7; bytes]), keep, Instant::now()),
        Reach::Local,
    );
}

fn look(view: &View<Note>, number: u64) -> bool {
    let mut builder = KeyBuilder::new();
    view.local(&builder.part(b"/object").part(&number.to_le_bytes()).key()).is_some()
}

/// Pseudo-random and the same in every run.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Four threads store objects of 100 B to 32 KiB, far more than fit, and look up what they may have; returns the most memory
/// that was seen once the cache was full.
fn churn(memory_bytes: usize) -> usize {
    let store = Store::new(LocalSettings { memory_bytes, hot_rate: 1_000 }, None).expect("a local store");
    let before = memory();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let view = store.view();
                scope.spawn(move || {
                    let (mut state, mut most, mut tidied) = (thread, 0, Instant::now());
                    for count in 0..60_000 {
                        // A tenth of the objects gets most of the traffic.
                        let number = if random(&mut state).is_multiple_of(4) {
                            random(&mut state) % 100_000
                        } else {
                            random(&mut state) % 10_000
                        };
                        if !look(&view, number) {
                            insert(&view, number, 100 + (number * 7_919 % 32_768) as usize, HOUR);
                        }
                        if tidied.elapsed() > Duration::from_millis(200) {
                            view.tidy();
                            tidied = Instant::now();
                        }
                        if count > 10_000 && count % 500 == 0 {
                            most = most.max(memory());
                        }
                    }
                    most
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).max().expect("threads")
    })
    .saturating_sub(before)
}

/// The longest that one of `count` steps took of the thread's own time.
fn longest(count: u64, mut step: impl FnMut(u64)) -> Duration {
    let mut longest = Duration::ZERO;
    for number in 0..count {
        let begin = spent();
        step(number);
        longest = longest.max(spent() - begin);
    }
    longest
}

/// Tidies up until there is no more to do, looking for entries that are over meanwhile; returns the longest step.
fn tidy_and_look(view: &View<Note>) -> Duration {
    let (mut most, mut is_untidy) = (Duration::ZERO, true);
    while is_untidy {
        most = most.max(longest(1, |_| is_untidy = view.tidy()));
        most = most.max(longest(100, |number| assert!(!look(view, number), "its time is over")));
    }
    most
}

#[test]
fn memory_is_held_and_no_call_takes_long() {
    let configured = 64 * MIB;
    let most = churn(configured);
    println!("churn: {:.1} MiB of {} MiB", most as f64 / MIB as f64, configured / MIB);
    assert!(most < configured * 115 / 100, "{} MiB for {} MiB", most / MIB, configured / MIB);
    assert!(most > configured / 2, "it was not full: {} MiB", most / MIB);

    // Half a million entries whose time ends together, and half a million that are purged.
    const ENTRIES: u64 = 500_000;
    let store = Store::new(LocalSettings { memory_bytes: 1_024 * MIB, hot_rate: 1_000 }, None).expect("a local store");
    let view = store.view();
    let soon = Instant::now() + Duration::from_secs(8);
    let storing = longest(ENTRIES, |number| insert(&view, number, 64, soon.saturating_duration_since(Instant::now())));
    let stored = store.local_report().entries;
    std::thread::sleep((soon + Duration::from_millis(100)).saturating_duration_since(Instant::now()));
    let expiring = tidy_and_look(&view);
    println!("storing: {storing:?}, expiry of {stored}: {expiring:?}");
    assert_eq!(store.local_report().entries, 0, "what is over is let go of");
    assert!(storing < PAUSE_MAX && expiring < PAUSE_MAX, "storing {storing:?}, expiring {expiring:?}");

    longest(ENTRIES, |number| insert(&view, number, 64, HOUR));
    let begin = spent();
    store.purge_here(Purge { scope: Scope::Everything, is_soft: false });
    let purge = spent() - begin;
    let purged = tidy_and_look(&view);
    println!("purge: {purge:?}, then {purged:?}");
    assert_eq!(store.local_report().entries, 0, "what was purged is let go of");
    assert!(purge < PAUSE_MAX && purged < PAUSE_MAX, "{purge:?}, {purged:?}");
}
