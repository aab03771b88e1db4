//! Cells and tables: denied, flooded and raced before allowed.

use std::num::{NonZeroU32, NonZeroUsize};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::clock::Moment;
use crate::quota::{Cost, KeyHash, Quota, Weight};

fn gcra(rate: &str, burst: u32) -> Gcra {
    Gcra::new(Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap())
}

fn cost(tokens: u32) -> Cost {
    Cost::new(NonZeroU32::new(tokens).unwrap())
}

fn table(keys: usize) -> Table {
    Table::new(NonZeroUsize::new(keys).unwrap())
}

fn at(millis: u64) -> Moment {
    Moment::ORIGIN + Duration::from_millis(millis)
}

#[test]
fn denies_with_the_exact_wait_and_charges_nothing() {
    let (cell, gcra) = (Cell::default(), gcra("100/s", 3));
    cell.commit(&gcra, cost(3), at(0)).unwrap();
    let wait = cell.commit(&gcra, cost(2), at(5)).unwrap_err();
    assert_eq!(wait, Wait { after: Duration::from_millis(15), remaining: 0, reset: Duration::from_millis(25) });
    assert!(cell.peek(&gcra, cost(2), at(5) + (wait.after - Duration::from_nanos(1))).is_err());
    assert_eq!(cell.commit(&gcra, cost(2), at(5) + wait.after).unwrap().remaining, 0);
}

#[test]
fn a_cost_above_the_burst_never_passes() {
    let gcra = gcra("5/h", 5);
    assert_eq!(Cell::default().peek(&gcra, cost(6), at(0)).unwrap_err().after, Duration::MAX);
    assert_eq!(table(7).commit(KeyHash(1), &gcra, cost(u32::MAX), at(0)).unwrap_err().after, Duration::MAX);
}

#[test]
fn a_replenished_cell_is_as_new() {
    let (cell, gcra) = (Cell::default(), gcra("100/s", 3));
    cell.commit(&gcra, cost(3), at(0)).unwrap();
    assert_eq!(cell.peek(&gcra, cost(1), at(30)), Cell::default().peek(&gcra, cost(1), at(30)));
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
fn a_smaller_burst_after_a_reload_does_not_punish_for_longer_than_itself() {
    let cell = Cell::default();
    cell.commit(&gcra("1/m", 60), cost(60), at(0)).unwrap();
    let wait = cell.peek(&gcra("100/s", 10), cost(1), at(0)).unwrap_err();
    assert_eq!(wait.after, Duration::from_millis(10));
}

#[test]
fn threads_together_get_the_burst_and_no_more() {
    let (table, cell, gcra) = (table(7), Cell::default(), gcra("1/h", 1_000));
    let granted: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let keyed = || table.commit(KeyHash(1), &gcra, cost(1), at(0)).is_ok();
                    let alone = || cell.commit(&gcra, cost(1), at(0)).is_ok();
                    (0..1_000).map(|_| usize::from(keyed()) + usize::from(alone())).sum::<usize>()
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
fn a_flood_of_keys_neither_grows_the_table_nor_frees_the_heavy_key() {
    let (table, gcra) = (table(65_536), gcra("100/s", 200));
    let bytes = table.bytes();
    let mut granted = 0;
    for turn in 0..1_000_000_u64 {
        let now = Moment::from_nanos(turn * 10_000);
        let stranger = KeyHash(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        table.commit(stranger, &gcra, cost(1), now).unwrap();
        if turn % 100 == 0 && table.commit(KeyHash(0), &gcra, cost(1), now).is_ok() {
            granted += 1;
        }
    }
    assert_eq!(table.bytes(), bytes);
    assert!((1_190..=1_200).contains(&granted), "{granted} of a fair 1,200");
}

/// A hundred keys ask for five times their quota in turn, and between any two requests come a hundred strangers: seven
/// times as many debts at once as there are cells.
#[test]
fn heavy_keys_stay_within_five_percent_of_their_quota_in_a_flood() {
    let (table, gcra) = (table(6_552), gcra("2/s", 5));
    let references: Vec<Cell> = (0..100).map(|_| Cell::default()).collect();
    let (mut granted, mut fair, mut owing) = (0.0, 0.0, 0);
    for turn in 0..1_000_000_u64 {
        // A thousand requests of heavy keys a second.
        let now = Moment::from_nanos(turn * 10_000);
        let stranger = KeyHash(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        owing += usize::from(table.commit(stranger, &gcra, cost(1), now).unwrap().remaining < 4);
        if turn % 100 == 0 {
            let heavy = turn / 100 % 100;
            granted += f64::from(u8::from(table.commit(KeyHash(heavy * 2), &gcra, cost(1), now).is_ok()));
            fair += f64::from(u8::from(references[heavy as usize].commit(&gcra, cost(1), now).is_ok()));
        }
    }
    assert!((0.95..=1.05).contains(&(granted / fair)), "{granted} of {fair}");
    assert!(owing <= 1_000, "{owing} strangers inherited");
}

/// As above with a burst of one token: a heavy key owes no more than a stranger, but asks again. The table remembers
/// debts for half of the time that they last.
#[test]
fn a_burst_of_one_is_enough_to_tell_heavy_keys_from_strangers() {
    let (table, gcra) = (table(3_000), gcra("2/s", 1));
    let references: Vec<Cell> = (0..100).map(|_| Cell::default()).collect();
    let (mut granted, mut fair, mut refused) = (0.0, 0.0, 0);
    for turn in 0..1_000_000_u64 {
        let now = Moment::from_nanos(turn * 10_000);
        let stranger = KeyHash(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        refused += usize::from(table.commit(stranger, &gcra, cost(1), now).is_err());
        if turn % 100 == 0 {
            let heavy = turn / 100 % 100;
            granted += f64::from(u8::from(table.commit(KeyHash(heavy * 2), &gcra, cost(1), now).is_ok()));
            fair += f64::from(u8::from(references[heavy as usize].commit(&gcra, cost(1), now).is_ok()));
        }
    }
    assert!((0.95..=1.05).contains(&(granted / fair)), "{granted} of {fair}");
    assert!(refused <= 1_000, "{refused} strangers inherited");
}

/// Whoever fills a set with keys that ask again and again does not keep a newcomer from being limited.
#[test]
fn a_newcomer_is_limited_among_keys_that_were_denied_more() {
    let (table, gcra) = (table(7), gcra("1/h", 1));
    for round in 0..20 {
        for key in 0..60 {
            let _ = table.commit(KeyHash(key), &gcra, cost(1), at(round));
        }
    }
    for newcomer in 1_000..1_100 {
        // One in 1,500 inherits, and is denied at once.
        let _ = table.commit(KeyHash(newcomer), &gcra, cost(1), at(20));
        assert!(table.commit(KeyHash(newcomer), &gcra, cost(1), at(20)).is_err(), "{newcomer}");
    }
}

#[test]
fn a_table_of_another_size_goes_on_with_what_is_owed() {
    let (small, gcra) = (table(700), gcra("1/s", 5));
    for key in 0..100 {
        small.commit(KeyHash(key), &gcra, cost(5), at(0)).unwrap();
    }
    for keys in [7_000, 700, 350] {
        let resized = small.resized(NonZeroUsize::new(keys).unwrap(), at(1_000));
        assert!(resized.fits(NonZeroUsize::new(keys).unwrap()));
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
        let (cell, gcra) = (Cell::default(), Gcra::new(quota));
        let granted = (0..60_000).filter(|&millis| cell.commit(&gcra, cost(1), at(millis)).is_ok()).count();
        let steady = (granted as f64 - f64::from(quota.burst().get())) / 60.0;
        assert!((steady / expected - 1.0).abs() < 0.001, "weight {weight}: {steady}");
    }
}

proptest! {
    #[test]
    fn never_above_rate_and_burst_and_waits_are_true(
        rate in 1u64..5_000, burst in 1u32..50,
        arrivals in prop::collection::vec((0u64..50_000_000, 1u32..5), 1..200),
    ) {
        let quota = Quota::new(crate::quota::Rate::new(rate, 1).unwrap(), NonZeroU32::new(burst).unwrap()).unwrap();
        let (cell, gcra) = (Cell::default(), Gcra::new(quota));
        let (mut now, mut granted) = (Moment::ORIGIN, 0u128);
        for (gap, tokens) in arrivals {
            now = now + Duration::from_nanos(gap);
            let peeked = cell.peek(&gcra, cost(tokens), now);
            prop_assert_eq!(peeked, cell.commit(&gcra, cost(tokens), now));
            match peeked {
                Ok(_) => granted += u128::from(tokens),
                Err(wait) if wait.after < Duration::MAX => {
                    prop_assert!(cell.peek(&gcra, cost(tokens), now + wait.after).is_ok());
                    prop_assert!(wait.remaining < u64::from(tokens));
                }
                Err(_) => prop_assert!(tokens > burst),
            }
            prop_assert!(granted * 1_000_000_000 <= u128::from(now.nanos()) * u128::from(rate) + u128::from(burst) * 1_000_000_000);
        }
    }

    #[test]
    fn a_refund_undoes_its_commit(before in 0u32..10, tokens in 1u32..10, gap in 0u64..2_000) {
        let (cell, gcra) = (Cell::default(), gcra("10/s", 20));
        if before > 0 {
            cell.commit(&gcra, cost(before), at(0)).unwrap();
        }
        let expected = cell.peek(&gcra, cost(1), at(gap));
        cell.commit(&gcra, cost(tokens), at(gap)).unwrap();
        cell.refund(&gcra, cost(tokens));
        prop_assert_eq!(cell.peek(&gcra, cost(1), at(gap)), expected);
    }

    /// Whoever owes less cannot push out whoever owes more, with however many keys.
    #[test]
    fn keys_that_owe_less_push_nobody_out(heavy in 2u32..10, strangers in prop::collection::vec((1u64.., 1u32..10), 0..400)) {
        let (table, gcra) = (table(7), gcra("1/h", 10));
        table.commit(KeyHash(0), &gcra, cost(heavy), at(0)).unwrap();
        for (key, tokens) in strangers {
            // One that inherits from a ghost may be denied.
            let _ = table.commit(KeyHash(key), &gcra, cost(tokens.min(heavy - 1)), at(0));
        }
        let left = 10 - heavy;
        prop_assert!(table.peek(KeyHash(0), &gcra, cost(left + 1), at(0)).is_err());
    }
    /// Whoever asks once cannot push out whoever was denied, with however many keys, while that would owe anything if
    /// its denials were charged.
    #[test]
    fn keys_that_ask_once_do_not_push_out_one_that_was_denied(
        denials in 1usize..20, strangers in prop::collection::vec(8u64.., 0..400),
    ) {
        let (table, gcra) = (table(7), gcra("1/h", 1));
        table.commit(KeyHash(0), &gcra, cost(1), at(0)).unwrap();
        for key in 1..=7 {
            let _ = table.commit(KeyHash(key), &gcra, cost(1), at(1));
        }
        for _ in 0..denials {
            prop_assert!(table.commit(KeyHash(0), &gcra, cost(1), at(2)).is_err());
        }
        for (key, turn) in strangers.into_iter().zip(3..) {
            let _ = table.commit(KeyHash(key), &gcra, cost(1), at(turn * 5_000));
        }
        prop_assert!(table.peek(KeyHash(0), &gcra, cost(1), at(3_599_999)).is_err());
    }
}
