//! Whether heavy keys stay limited in a flood of keys that are used once: `cargo bench --package
//! limiter --bench flood`. docs/adr/0008-keyed-limits-under-flood.md has the results.
//!
//! A thousand heavy keys, Zipf-distributed, send five times their quota of 2/s on average. Each is
//! compared with a cell of its own, which forgets nothing. Between two of their requests come 10,
//! 100 or 1,000 unseen keys.

use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Instant;

use limiter::bucket::{Gcra, GcraCell, GcraTable};
use limiter::{Cost, KeyHash, MonotonicTime, Quota};

/// The configured table sizes: the default, and one for a flood of ten million requests a second.
const KEYS: usize = 65_536;
const MORE_KEYS: usize = 1_048_576;
const HEAVY: usize = 1_000;
/// Requests of heavy keys per second: five times their quota.
const HEAVY_PER_SECOND: u64 = 10_000;
/// One decision in this many is timed.
const TIMED: u64 = 61;

fn main() {
    println!(
        "above: what heavy keys got above their quota; worst key: by how many tokens; denied, inherited: unseen keys"
    );
    println!(
        "ratio   burst   keys     millions  above %  later half %  worst key  denied %  inherited %  p50 ns  p99 ns  B/key"
    );
    for (unseen_per_heavy, millions, keys) in [
        (10, 10, KEYS),
        (100, 10, KEYS),
        (1_000, 10, KEYS),
        (1_000, 50, KEYS),
        (1_000, 10, MORE_KEYS),
        (1_000, 50, MORE_KEYS),
    ] {
        for burst in [1, 5, 20] {
            run(unseen_per_heavy, millions, burst, keys);
        }
    }
}

#[derive(Default)]
struct Counts {
    granted: u64,
    expected: u64,
}

fn run(unseen_per_heavy: u64, millions: u64, burst: u32, keys: usize) {
    let quota = Quota::new("2/s".parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap();
    let (gcra, table) = (Gcra::new(quota), GcraTable::new(NonZeroUsize::new(keys).unwrap()));
    let references: Vec<GcraCell> = (0..HEAVY).map(|_| GcraCell::default()).collect();
    let zipf = zipf();
    let mut counts: Vec<[Counts; 2]> = (0..HEAVY).map(|_| Default::default()).collect();
    let (mut timed, mut denied, mut inherited) = (Vec::new(), 0, 0);
    let rounds = millions * 1_000_000 / unseen_per_heavy;
    let gap_nanos = 1_000_000_000 / (HEAVY_PER_SECOND * (unseen_per_heavy + 1));
    let mut random = 1;
    let mut turn = 0;
    for round in 0..rounds {
        for _ in 0..unseen_per_heavy {
            turn += 1;
            let now = MonotonicTime::from_nanos(turn * gap_nanos);
            let key = KeyHash(u128::from((turn + HEAVY as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let room = if turn % TIMED == 0 {
                let start = Instant::now();
                let room = decide(&table, key, &gcra, now);
                timed.push(start.elapsed());
                room
            } else {
                decide(&table, key, &gcra, now)
            };
            denied += u64::from(room.is_none());
            inherited += u64::from(room.is_some_and(|remaining| remaining + 1 < u64::from(burst)));
        }
        turn += 1;
        let now = MonotonicTime::from_nanos(turn * gap_nanos);
        let heavy = zipf.partition_point(|&below| below < uniform(&mut random));
        let count = &mut counts[heavy][usize::from(round > rounds / 2)];
        let key = KeyHash(u128::from((heavy as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        count.granted += u64::from(decide(&table, key, &gcra, now).is_some());
        count.expected += u64::from(references[heavy].commit(&gcra, Cost::ONE, now).is_ok());
    }
    timed.sort();
    let above = |halves: &[usize]| {
        let sum = |of: fn(&Counts) -> u64| -> u64 {
            counts.iter().flat_map(|count| halves.iter().map(|&half| of(&count[half]))).sum()
        };
        (sum(|count| count.granted) as f64 / sum(|count| count.expected) as f64 - 1.0) * 100.0
    };
    let worst =
        counts.iter().map(|[a, b]| (a.granted + b.granted) as i64 - (a.expected + b.expected) as i64).max().unwrap();
    let of = |part: usize| timed[timed.len() * part / 100].as_nanos();
    let share = |count: u64| count as f64 / (rounds * unseen_per_heavy) as f64 * 100.0;
    println!(
        "1:{unseen_per_heavy:<5} {burst:>5}  {keys:>7}  {millions:>9}  {:>7.2}  {:>12.2}  {worst:>9}  {:>8.3}  {:>11.3}  {:>6}  {:>6}  {:>5.1}",
        above(&[0, 1]),
        above(&[1]),
        share(denied),
        share(inherited),
        of(50),
        of(99),
        table.bytes() as f64 / keys as f64,
    );
}

/// As a rule set with several rules decides.
fn decide(table: &GcraTable, key: KeyHash, gcra: &Gcra, now: MonotonicTime) -> Option<u64> {
    table.peek(key, gcra, Cost::ONE, now).ok()?;
    table.commit(key, gcra, Cost::ONE, now).ok().map(|room| room.remaining)
}

/// For each heavy key, the cumulative share of all requests up to that key.
fn zipf() -> Vec<f64> {
    let total: f64 = (1..=HEAVY).map(|rank| 1.0 / rank as f64).sum();
    let mut below = 0.0;
    (1..=HEAVY)
        .map(|rank| {
            below += 1.0 / rank as f64 / total;
            below
        })
        .collect()
}

fn uniform(random: &mut u64) -> f64 {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*random >> 11) as f64 / (1_u64 << 53) as f64).min(0.999_999)
}
