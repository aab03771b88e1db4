//! User classes in the queue, simulated with a virtual clock: calls come at exponential intervals,
//! and each takes one of the turns of the upstream, which come at even intervals.

use std::time::Duration;

use super::config::ConcurrencyConfig;
use super::queue::WaitQueue;
use crate::picture;

/// Turns per second.
const CAPACITY: f64 = 800.0;
const SECONDS: f64 = 60.0;
/// The weights of the two classes in thousandths: as `platinum = 3.2` and `standard`.
const WEIGHTS: [u32; 2] = [3_200, 1_000];

/// Uniform in (0, 1].
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (((number ^ (number >> 31)) >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

/// Served calls of each class, as parts of the capacity. `loads` are those of the classes.
fn served(loads: [f64; 2], mut random: u64) -> [f64; 2] {
    let wait = ConcurrencyConfig::default().wait;
    let mut queue = WaitQueue::new();
    let mut next = [0.0_f64; 2];
    let mut counts = [0.0; 2];
    let turns = (CAPACITY * SECONDS) as u32;
    for turn in 1..=turns {
        let now = f64::from(turn) / CAPACITY;
        for class in 0..2 {
            while next[class] <= now {
                queue.push(WEIGHTS[class], (class, next[class]), Duration::from_secs_f64(next[class]));
                next[class] -= uniform(&mut random).ln() / (loads[class] * CAPACITY);
            }
        }
        let is_awaited = |(_, came): &(usize, f64)| now - came <= wait.as_secs_f64();
        if let Some((_, (class, _))) = queue.pop(Duration::from_secs_f64(now), is_awaited) {
            counts[class] += 1.0 / f64::from(turns);
        }
    }
    counts
}

#[test]
fn classes_share_an_overloaded_upstream_by_weight() {
    let mut table =
        "| load of weight 3.2 | load of weight 1 | served of weight 3.2 | served of weight 1 |\n|---|---|---|---|\n"
            .to_owned();
    for loads in [[0.3, 0.3], [0.5, 2.0], [2.0, 0.1], [1.5, 1.5], [3.0, 0.5], [0.2, 3.0]] {
        let [heavy, light] = served(loads, 7);
        table += &format!("| {:.1} | {:.1} | {heavy:.3} | {light:.3} |\n", loads[0], loads[1]);
        println!("{loads:?}: {heavy:.3} {light:.3}");
        // Each class gets what it asks for, at most its share; what one leaves is the other's.
        let share = f64::from(WEIGHTS[0]) / f64::from(WEIGHTS[0] + WEIGHTS[1]);
        let expected = [share.max(1.0 - loads[1]).min(loads[0]), (1.0 - share).max(1.0 - loads[0]).min(loads[1])];
        for (actual, expected) in [heavy, light].into_iter().zip(expected) {
            assert!((actual - expected).abs() < 0.02, "{loads:?}: {actual} in place of {expected}");
        }
        assert!(heavy + light >= 0.98_f64.min(loads[0] + loads[1] - 0.02), "{loads:?}");
    }
    picture::assert_table("user_classes", &table);
}
