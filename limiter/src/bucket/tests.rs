//! Cells and tables: denied, flooded and raced, then allowed.

use std::num::{NonZeroU32, NonZeroUsize};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::clock::MonotonicTime;
use crate::quota::{Cost, KeyHash, Quota, Weight};

fn gcra(rate: &str, burst: u32) -> Gcra {
    Gcra::new(Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap())
}

fn cost(tokens: u32) -> Cost {
    Cost::new(NonZeroU32::new(tokens).unwrap())
}

fn table(keys: usize) -> GcraTable {
    GcraTable::new(NonZeroUsize::new(keys).unwrap())
}

fn at(millis: u64) -> MonotonicTime {
    MonotonicTime::ORIGIN + Duration::from_millis(millis)
}

#[test]
fn denies_with_the_exact_wait_and_charges_nothing() {
    let (cell, gcra) = (GcraCell::default(), gcra("100/s", 3));
    cell.commit(&gcra, cost(3), at(0)).unwrap();
    let throttled = cell.commit(&gcra, cost(2), at(5)).unwrap_err();
    assert_eq!(
        throttled,
        Throttled { retry_after: Duration::from_millis(15), remaining: 0, reset: Duration::from_millis(25) }
    );
    assert!(cell.peek(&gcra, cost(2), at(5) + (throttled.retry_after - Duration::from_nanos(1))).is_err());
    assert_eq!(cell.commit(&gcra, cost(2), at(5) + throttled.retry_after).unwrap().remaining, 0);
}

#[test]
fn a_cost_above_the_burst_never_passes() {
    let gcra = gcra("5/h", 5);
    assert_eq!(GcraCell::default().peek(&gcra, cost(6), at(0)).unwrap_err().retry_after, Duration::MAX);
    assert_eq!(table(7).commit(KeyHash(1), &gcra, cost(u32::MAX), at(0)).unwrap_err().retry_after, Duration::MAX);
}

#[test]
fn a_refilled_cell_equals_a_new_one() {
    let (cell, gcra) = (GcraCell::default(), gcra("100/s", 3));
    cell.commit(&gcra, cost(3), at(0)).unwrap();
    assert_eq!(cell.peek(&gcra, cost(1), at(30)), GcraCell::default().peek(&gcra, cost(1), at(30)));
}

#[test]
fn a_peek_writes_nothing() {
    let (table, gcra) = (table(7), gcra("1/s", 1));
    for _ in 0..10 {
        assert_eq!(table.peek(KeyHash(1), &gcra, cost(1), at(0)).unwrap().remaining, 0);
    }
    table.commit(KeyHash(1), &gcra, cost(1), at(0)).unwrap();
    table.peek(KeyHash(1), &gcra, cost(1), at(0)).unwrap_err();
}

#[test]
fn a_refund_restores_the_cell() {
    let (table, gcra) = (table(7), gcra("1/s", 5));
    table.commit(KeyHash(1), &gcra, cost(2), at(0)).unwrap();
    table.commit(KeyHash(1), &gcra, cost(3), at(0)).unwrap();
    table.refund(KeyHash(1), &gcra, cost(3));
    assert_eq!(table.peek(KeyHash(1), &gcra, cost(1), at(0)).unwrap().remaining, 2);
    table.refund(KeyHash(99), &gcra, cost(3));
}

#[test]
fn a_smaller_burst_after_a_reload_caps_the_backlog() {
    let cell = GcraCell::default();
    cell.commit(&gcra("1/m", 60), cost(60), at(0)).unwrap();
    let throttled = cell.peek(&gcra("100/s", 10), cost(1), at(0)).unwrap_err();
    assert_eq!(throttled.retry_after, Duration::from_millis(10));
}

#[test]
fn threads_together_get_at_most_the_burst() {
    let (table, cell, gcra) = (table(7), GcraCell::default(), gcra("1/h", 1_000));
    let granted: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let keyed = || table.commit(KeyHash(1), &gcra, cost(1), at(0)).is_ok();
                    let single = || cell.commit(&gcra, cost(1), at(0)).is_ok();
                    (0..1_000).map(|_| usize::from(keyed()) + usize::from(single())).sum::<usize>()
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert_eq!(granted, 2_000);
}

#[test]
fn a_key_costs_at_most_64_bytes() {
    assert_eq!(table(7).bytes(), 440);
    let table = table(65_536);
    assert!(table.capacity() >= 65_536);
    assert!(table.bytes() <= 64 * 65_536, "{}", table.bytes());
}

/// A heavy key at ten times its limit, among a million keys seen once, 100,000 of them a second.
#[test]
fn a_flood_of_keys_neither_grows_the_table_nor_exempts_the_heavy_key() {
    let (table, gcra) = (table(65_536), gcra("100/s", 200));
    let bytes = table.bytes();
    let mut granted = 0;
    for turn in 0..1_000_000_u64 {
        let now = MonotonicTime::from_nanos(turn * 10_000);
        let unseen = KeyHash(u128::from(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        table.commit(unseen, &gcra, cost(1), now).unwrap();
        if turn % 100 == 0 && table.commit(KeyHash(0), &gcra, cost(1), now).is_ok() {
            granted += 1;
        }
    }
    assert_eq!(table.bytes(), bytes);
    assert!((1_190..=1_200).contains(&granted), "{granted} of a expected 1,200");
}

/// A hundred heavy keys in turn at five times their quota, with a hundred unseen keys between any
/// two requests: seven times as many backlogs at once as there are cells.
#[test]
fn heavy_keys_stay_within_five_percent_of_their_quota_in_a_flood() {
    let (table, gcra) = (table(6_552), gcra("2/s", 5));
    let references: Vec<GcraCell> = (0..100).map(|_| GcraCell::default()).collect();
    let (mut granted, mut expected, mut inherited) = (0.0, 0.0, 0);
    for turn in 0..1_000_000_u64 {
        // A thousand requests of heavy keys a second.
        let now = MonotonicTime::from_nanos(turn * 10_000);
        let unseen = KeyHash(u128::from(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        inherited += usize::from(table.commit(unseen, &gcra, cost(1), now).unwrap().remaining < 4);
        if turn % 100 == 0 {
            let heavy = turn / 100 % 100;
            granted += f64::from(u8::from(table.commit(KeyHash(u128::from(heavy * 2)), &gcra, cost(1), now).is_ok()));
            expected += f64::from(u8::from(references[heavy as usize].commit(&gcra, cost(1), now).is_ok()));
        }
    }
    assert!((0.95..=1.05).contains(&(granted / expected)), "{granted} of {expected}");
    assert!(inherited <= 1_000, "{inherited} unseen keys inherited a backlog");
}

/// As above with a burst of one token: a heavy key's backlog is no larger than an unseen key's, but
/// the heavy key returns. The table remembers backlogs for half of the time that they last.
#[test]
fn a_burst_of_one_suffices_to_distinguish_heavy_keys_from_unseen_keys() {
    let (table, gcra) = (table(3_000), gcra("2/s", 1));
    let references: Vec<GcraCell> = (0..100).map(|_| GcraCell::default()).collect();
    let (mut granted, mut expected, mut denied) = (0.0, 0.0, 0);
    for turn in 0..1_000_000_u64 {
        let now = MonotonicTime::from_nanos(turn * 10_000);
        let unseen = KeyHash(u128::from(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        denied += usize::from(table.commit(unseen, &gcra, cost(1), now).is_err());
        if turn % 100 == 0 {
            let heavy = turn / 100 % 100;
            granted += f64::from(u8::from(table.commit(KeyHash(u128::from(heavy * 2)), &gcra, cost(1), now).is_ok()));
            expected += f64::from(u8::from(references[heavy as usize].commit(&gcra, cost(1), now).is_ok()));
        }
    }
    assert!((0.95..=1.05).contains(&(granted / expected)), "{granted} of {expected}");
    assert!(denied <= 1_000, "{denied} unseen keys inherited a backlog");
}

/// Filling a set with keys that return again and again does not exempt a new key from its limit.
#[test]
fn a_new_key_is_limited_among_keys_with_more_denials() {
    let (table, gcra) = (table(7), gcra("1/h", 1));
    for round in 0..20 {
        for key in 0..60 {
            let _ = table.commit(KeyHash(key), &gcra, cost(1), at(round));
        }
    }
    for new_key in 1_000..1_100 {
        // One in 1,500 inherits a backlog and is denied at once.
        let _ = table.commit(KeyHash(new_key), &gcra, cost(1), at(20));
        assert!(table.commit(KeyHash(new_key), &gcra, cost(1), at(20)).is_err(), "{new_key}");
    }
}

#[test]
fn a_resized_table_keeps_backlogs() {
    let (small, gcra) = (table(700), gcra("1/s", 5));
    for key in 0..100 {
        small.commit(KeyHash(key), &gcra, cost(5), at(0)).unwrap();
    }
    for keys in [7_000, 700, 350] {
        let resized = small.resized(NonZeroUsize::new(keys).unwrap(), at(1_000));
        assert!(resized.is_sized_for(NonZeroUsize::new(keys).unwrap()));
        let denied = (0..100).filter(|&key| resized.peek(KeyHash(key), &gcra, cost(2), at(1_000)).is_err()).count();
        assert_eq!(denied, 100, "{keys}");
    }
    let replenished = small.resized(NonZeroUsize::new(70).unwrap(), at(5_000));
    assert!((0..100).all(|key| replenished.peek(KeyHash(key), &gcra, cost(5), at(5_000)).is_ok()));
}

#[test]
fn weights_give_100_200_and_320_a_second_within_a_thousandth() {
    let base = Quota::new("100/s".parse().unwrap(), NonZeroU32::new(10).unwrap()).unwrap();
    for (weight, expected) in [(1.0, 100.0), (2.0, 200.0), (3.2, 320.0)] {
        let quota = base.weighted(Weight::try_from(weight).unwrap()).unwrap();
        let (cell, gcra) = (GcraCell::default(), Gcra::new(quota));
        let granted = (0..60_000).filter(|&millis| cell.commit(&gcra, cost(1), at(millis)).is_ok()).count();
        let steady = (granted as f64 - f64::from(quota.burst().get())) / 60.0;
        assert!((steady / expected - 1.0).abs() < 0.001, "weight {weight}: {steady}");
    }
}

proptest! {
    #[test]
    fn never_above_rate_and_burst_and_waits_are_exact(
        rate in 1u64..5_000, burst in 1u32..50,
        arrivals in prop::collection::vec((0u64..50_000_000, 1u32..5), 1..200),
    ) {
        let quota = Quota::new(crate::quota::Rate::new(rate, 1).unwrap(), NonZeroU32::new(burst).unwrap()).unwrap();
        let (cell, gcra) = (GcraCell::default(), Gcra::new(quota));
        let (mut now, mut granted) = (MonotonicTime::ORIGIN, 0u128);
        for (gap, tokens) in arrivals {
            now = now + Duration::from_nanos(gap);
            let peeked = cell.peek(&gcra, cost(tokens), now);
            prop_assert_eq!(peeked, cell.commit(&gcra, cost(tokens), now));
            match peeked {
                Ok(_) => granted += u128::from(tokens),
                Err(throttled) if throttled.retry_after < Duration::MAX => {
                    prop_assert!(cell.peek(&gcra, cost(tokens), now + throttled.retry_after).is_ok());
                    prop_assert!(throttled.remaining < u64::from(tokens));
                }
                Err(_) => prop_assert!(tokens > burst),
            }
            let refilled = u128::from(now.nanos()) * u128::from(rate);
            prop_assert!(granted * 1_000_000_000 <= refilled + u128::from(burst) * 1_000_000_000);
        }
    }

    #[test]
    fn a_refund_undoes_its_commit(before in 0u32..10, tokens in 1u32..10, gap in 0u64..2_000) {
        let (cell, gcra) = (GcraCell::default(), gcra("10/s", 20));
        if before > 0 {
            cell.commit(&gcra, cost(before), at(0)).unwrap();
        }
        let expected = cell.peek(&gcra, cost(1), at(gap));
        cell.commit(&gcra, cost(tokens), at(gap)).unwrap();
        cell.refund(&gcra, cost(tokens));
        prop_assert_eq!(cell.peek(&gcra, cost(1), at(gap)), expected);
    }

    /// Keys with smaller backlogs cannot evict a key with a larger one, however many they are.
    #[test]
    fn smaller_backlogs_evict_no_larger_one(
        heavy in 2u32..10, unseen_keys in prop::collection::vec((1u128.., 1u32..10), 0..400),
    ) {
        let (table, gcra) = (table(7), gcra("1/h", 10));
        table.commit(KeyHash(0), &gcra, cost(heavy), at(0)).unwrap();
        for (key, tokens) in unseen_keys {
            // A key that inherits a backlog may be denied.
            let _ = table.commit(KeyHash(key), &gcra, cost(tokens.min(heavy - 1)), at(0));
        }
        let left = 10 - heavy;
        prop_assert!(table.peek(KeyHash(0), &gcra, cost(left + 1), at(0)).is_err());
    }

    /// Keys that are used once cannot evict a key that was denied, however many they are, as long
    /// as the denied key would have a backlog if its denials were charged.
    #[test]
    fn keys_used_once_do_not_evict_a_denied_key(
        denials in 1usize..20, unseen_keys in prop::collection::vec(8u128.., 0..400),
    ) {
        let (table, gcra) = (table(7), gcra("1/h", 1));
        table.commit(KeyHash(0), &gcra, cost(1), at(0)).unwrap();
        for key in 1..=7 {
            let _ = table.commit(KeyHash(key), &gcra, cost(1), at(1));
        }
        for _ in 0..denials {
            prop_assert!(table.commit(KeyHash(0), &gcra, cost(1), at(2)).is_err());
        }
        for (key, turn) in unseen_keys.into_iter().zip(3..) {
            let _ = table.commit(KeyHash(key), &gcra, cost(1), at(turn * 5_000));
        }
        prop_assert!(table.peek(KeyHash(0), &gcra, cost(1), at(3_599_999)).is_err());
    }
}
