//! The local cache under churn and with mass expiry: its memory stays bounded, and no call blocks
//! its thread for long. One test, because both parts measure the whole process.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use shard::{Entry, InsertTarget, KeyBuilder, LocalConfig, Purge, PurgeScope, Region, Store, StoreView, Tag};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const MIB: usize = 1 << 20;
const THREADS: u64 = 4;
/// Of the thread's CPU time; without batches it takes seconds. 6 to 30 ms were seen. It includes
/// what the host of a virtual machine does: some take 40 to 75 us for each page that was not used
/// for seconds, which the guest sees as a slow instruction. A step must therefore bound how many
/// cold entries it reads, not only how many it removes.
const PAUSE_MAX: Duration = Duration::from_millis(50);
const HOUR: Duration = Duration::from_secs(3600);

#[derive(Serialize, Deserialize)]
struct Note;

impl shard::EntryMeta for Note {
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

/// Resident anonymous memory of this process, in bytes.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a live process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1_024
}

fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("less than a second"))
}

fn insert(view: &StoreView<Note>, number: u64, bytes: usize, ttl: Duration) {
    let mut builder = KeyBuilder::new();
    let key = builder.part(b"/object").part(&number.to_le_bytes()).key();
    view.insert(
        &Region::DEFAULT,
        &key,
        Entry::new(Note, Bytes::from(vec![7; bytes]), ttl, Instant::now()),
        InsertTarget::Local,
    );
}

fn lookup(view: &StoreView<Note>, number: u64) -> bool {
    let mut builder = KeyBuilder::new();
    view.lookup_local(&builder.part(b"/object").part(&number.to_le_bytes()).key()).is_some()
}

/// A pseudo-random sequence, identical in every run.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Four threads store objects of 100 B to 32 KiB, far more than fit, and look up existing ones.
/// Returns the peak memory after the cache was full.
fn churn(memory_bytes: usize) -> usize {
    let store = Store::new(LocalConfig { memory_bytes, hot_rate: 1_000 }, None).expect("a local store");
    let before = resident_bytes();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let view = store.view();
                scope.spawn(move || {
                    let (mut state, mut most, mut maintained) = (thread, 0, Instant::now());
                    for count in 0..60_000 {
                        // A tenth of the objects gets most of the traffic.
                        let number = if random(&mut state).is_multiple_of(4) {
                            random(&mut state) % 100_000
                        } else {
                            random(&mut state) % 10_000
                        };
                        if !lookup(&view, number) {
                            insert(&view, number, 100 + (number * 7_919 % 32_768) as usize, HOUR);
                        }
                        if maintained.elapsed() > Duration::from_millis(200) {
                            view.run_maintenance();
                            maintained = Instant::now();
                        }
                        if count > 10_000 && count % 500 == 0 {
                            most = most.max(resident_bytes());
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

/// The longest CPU time of one of `count` steps.
fn longest(count: u64, mut step: impl FnMut(u64)) -> Duration {
    let mut longest = Duration::ZERO;
    for number in 0..count {
        let begin = thread_cpu_time();
        step(number);
        longest = longest.max(thread_cpu_time() - begin);
    }
    longest
}

/// Runs maintenance until nothing is left to do, with lookups of invalid entries in between;
/// returns the longest step.
fn maintain_and_lookup(view: &StoreView<Note>) -> Duration {
    let (mut most, mut has_more) = (Duration::ZERO, true);
    while has_more {
        most = most.max(longest(1, |_| has_more = view.run_maintenance()));
        most = most.max(longest(100, |number| assert!(!lookup(view, number), "it has expired or was purged")));
    }
    most
}

#[test]
fn memory_stays_bounded_and_no_call_blocks_for_long() {
    let configured = 64 * MIB;
    let most = churn(configured);
    println!("churn: {:.1} MiB of {} MiB", most as f64 / MIB as f64, configured / MIB);
    assert!(most < configured * 115 / 100, "{} MiB for {} MiB", most / MIB, configured / MIB);
    assert!(most > configured / 2, "the cache was not full: {} MiB", most / MIB);

    // Half a million entries that expire together, then half a million that are purged.
    const ENTRIES: u64 = 500_000;
    let store = Store::new(LocalConfig { memory_bytes: 1_024 * MIB, hot_rate: 1_000 }, None).expect("a local store");
    let view = store.view();
    let soon = Instant::now() + Duration::from_secs(8);
    let storing = longest(ENTRIES, |number| insert(&view, number, 64, soon.saturating_duration_since(Instant::now())));
    let stored = store.local_report().entries;
    std::thread::sleep((soon + Duration::from_millis(100)).saturating_duration_since(Instant::now()));
    let expiring = maintain_and_lookup(&view);
    println!("storing: {storing:?}, expiry of {stored}: {expiring:?}");
    assert_eq!(store.local_report().entries, 0, "expired entries are removed");
    assert!(storing < PAUSE_MAX && expiring < PAUSE_MAX, "storing {storing:?}, expiring {expiring:?}");

    longest(ENTRIES, |number| insert(&view, number, 64, HOUR));
    let begin = thread_cpu_time();
    store.purge_locally(Purge { scope: PurgeScope::Everything, is_soft: false });
    let purge = thread_cpu_time() - begin;
    let purged = maintain_and_lookup(&view);
    println!("purge: {purge:?}, then {purged:?}");
    assert_eq!(store.local_report().entries, 0, "purged entries are removed");
    assert!(purge < PAUSE_MAX && purged < PAUSE_MAX, "{purge:?}, {purged:?}");
}
