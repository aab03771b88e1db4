//! Every order of concurrent calls at a half-open breaker.
//!
//! The shared state of a breaker is behind one lock, and each operation is one critical section:
//! threads can interleave whole operations only. Four calls of two operations each have 2,520
//! orders; each is run with every combination of results.

use std::time::{Duration, Instant};

use super::super::gate::{Breaker, BreakerPermit};
use super::super::probes::PROBES;
use super::super::state::{BreakerState, CallStart};
use super::{BreakerConfig, SECOND, breaker, trip, with};

const CALLS: usize = 4;

/// The end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Success,
    Failure,
    /// It is cancelled.
    None,
}

const ENDINGS: [Ending; 3] = [Ending::Success, Ending::Failure, Ending::None];

/// Calls `visit` with every order in which each of `CALLS` calls has two operations.
fn for_each_order(visit: &mut impl FnMut(&[usize])) {
    fn extend(order: &mut Vec<usize>, left: &mut [u8; CALLS], visit: &mut impl FnMut(&[usize])) {
        if order.len() == 2 * CALLS {
            return visit(order);
        }
        for call in 0..CALLS {
            if left[call] > 0 {
                left[call] -= 1;
                order.push(call);
                extend(order, left, visit);
                order.pop();
                left[call] += 1;
            }
        }
    }
    extend(&mut Vec::new(), &mut [2; CALLS], visit);
}

enum Call<'b> {
    Waiting,
    Running(BreakerPermit<'b>),
    Ended,
}

/// Runs one order, and checks the invariants after each step.
fn run(breaker: &Breaker, (order, endings): (&[usize], [Ending; CALLS]), now: Instant) {
    let mut calls = [const { Call::Waiting }; CALLS];
    let (mut running, mut successes, mut is_judging) = (0, 0, true);
    for &index in order {
        let context = || format!("{order:?} {endings:?}");
        match std::mem::replace(&mut calls[index], Call::Ended) {
            Call::Waiting => match breaker.admit(CallStart::OnAdmission, now) {
                Ok((permit, change)) => {
                    assert_eq!(change, None);
                    running += usize::from(is_judging);
                    assert!(!is_judging || running + successes <= PROBES, "{}", context());
                    calls[index] = Call::Running(permit);
                }
                Err(_) => assert!(!is_judging || running + successes == PROBES, "a free slot: {}", context()),
            },
            Call::Running(permit) => {
                let change = match endings[index] {
                    Ending::None => {
                        drop(permit);
                        None
                    }
                    ending => permit.record(ending == Ending::Success, now).1,
                };
                if is_judging {
                    running -= 1;
                    successes += usize::from(endings[index] == Ending::Success);
                    let is_over = endings[index] == Ending::Failure || successes == PROBES;
                    assert_eq!(change.is_some(), is_over, "{}", context());
                    is_judging = !is_over;
                    let expected = match endings[index] {
                        Ending::Failure => BreakerState::Open,
                        _ if is_over => BreakerState::Ramp,
                        _ => BreakerState::HalfOpen,
                    };
                    assert_eq!(breaker.state(), expected, "{}", context());
                }
            }
            Call::Ended => {}
        }
    }
    // No slot and no running call is lost: the breaker closes with the next successes.
    let mut now = now + 20 * SECOND;
    while breaker.state() != BreakerState::Closed {
        now += SECOND;
        assert!(now.elapsed() < Duration::from_secs(60), "{order:?} {endings:?}");
        if let Ok((permit, _)) = breaker.admit(CallStart::OnAdmission, now) {
            permit.record(true, now);
        }
    }
    assert_eq!(breaker.advance(now + 3_600 * SECOND), None, "running calls are counted down: {order:?} {endings:?}");
}

#[test]
fn every_order_of_concurrent_calls_keeps_the_slots_of_probes() {
    let epoch = Instant::now();
    let mut count = 0;
    for_each_order(&mut |order| {
        for number in 0..ENDINGS.len().pow(CALLS as u32) {
            // Orders of calls that end alike differ in nothing: every seventh combination is run.
            if (number + count) % 7 != 0 {
                continue;
            }
            let ending = |call: u32| ENDINGS[number / ENDINGS.len().pow(call) % ENDINGS.len()];
            let endings = [0, 1, 2, 3].map(ending);
            let breaker = with(BreakerConfig::default(), epoch);
            trip(&breaker, epoch);
            let now = epoch + 6 * SECOND;
            assert!(breaker.advance(now).is_some());
            run(&breaker, (order, endings), now);
        }
        count += 1;
    });
    assert_eq!(count, 2_520);
    assert_eq!(breaker(epoch).state(), BreakerState::Closed);
}
