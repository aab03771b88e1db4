//! Random calls and times.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::gate::{Breaker, BreakerPermit};
use super::super::state::{BreakerState, CallStart, ManualState};
use super::{BreakerConfig, with};

#[derive(Clone, Debug)]
enum Step {
    Admit(bool),
    Sent(usize),
    End(usize, Option<bool>),
    Wait(u64),
    Manual(Option<bool>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => any::<bool>().prop_map(Step::Admit),
        1 => any::<usize>().prop_map(Step::Sent),
        4 => (any::<usize>(), proptest::option::weighted(0.8, any::<bool>())).prop_map(|(at, end)| Step::End(at, end)),
        3 => (0_u64..4_000).prop_map(Step::Wait),
        1 => proptest::option::of(any::<bool>()).prop_map(Step::Manual),
    ];
    proptest::collection::vec(step, 1..120)
}

/// The time at which the breaker is closed if every call succeeds from `now` on.
fn best_case(breaker: &Breaker, mut now: Instant) -> Instant {
    let start = now;
    while breaker.state() != BreakerState::Closed {
        breaker.advance(now);
        for _ in 0..3 {
            if let Ok((permit, _)) = breaker.admit(CallStart::OnAdmission, now) {
                permit.record(true, now);
            }
        }
        if breaker.state() == BreakerState::Closed {
            break;
        }
        now += Duration::from_millis(10);
        assert!(now < start + Duration::from_secs(200), "never closed");
    }
    now
}

proptest! {
    /// A client that waits as long as it is asked to finds a closed breaker, if the origin is
    /// mended; and nothing that calls do keeps a breaker from closing.
    #[test]
    fn breaker_closes_within_the_time_that_clients_are_asked_to_wait(
        steps in steps(),
        seed in any::<u64>(),
        // Shorter and longer than the window.
        ramp in prop_oneof![Just(3), Just(30)],
        ratio in 0.1..1.0,
    ) {
        let epoch = Instant::now();
        let ramp = Duration::from_secs(ramp);
        let breaker = with(BreakerConfig { ramp, error_ratio: ratio, ..BreakerConfig::default() }, epoch);
        let breaker = breaker.replaced(breaker.config().clone(), epoch, seed);
        let mut now = epoch;
        let mut permits: Vec<BreakerPermit<'_>> = Vec::new();
        for step in steps {
            match step {
                Step::Admit(has_request) => {
                    let start = if has_request { CallStart::OnAdmission } else { CallStart::OnRequestSent };
                    let is_open = breaker.is_rejecting();
                    let admitted = breaker.admit(start, now);
                    prop_assert!(!(is_open && admitted.is_ok()) || breaker.state() != BreakerState::Open);
                    permits.extend(admitted.ok().map(|(permit, _)| permit));
                }
                Step::Sent(at) if !permits.is_empty() => {
                    let at = at % permits.len();
                    permits[at].start(now);
                }
                Step::End(at, end) if !permits.is_empty() => {
                    let permit = permits.swap_remove(at % permits.len());
                    if let Some(succeeded) = end {
                        permit.record(succeeded, now);
                    }
                }
                Step::Sent(_) | Step::End(..) => {}
                Step::Wait(millis) => {
                    now += Duration::from_millis(millis);
                    breaker.advance(now);
                }
                Step::Manual(Some(is_open)) => {
                    let state = if is_open { ManualState::Open } else { ManualState::Closed };
                    breaker.set_manual(state, Duration::from_secs(5), now);
                }
                Step::Manual(None) => drop(breaker.end_manual(now)),
            }
        }
        drop(permits);
        let wait = breaker.wait(now);
        if breaker.state() != BreakerState::Closed {
            let closed_at = best_case(&breaker, now);
            prop_assert!(closed_at <= now + wait + Duration::from_millis(20), "{:?} > {wait:?}", closed_at - now);
        }
    }
}
