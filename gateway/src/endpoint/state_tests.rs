//! The state of one endpoint: unreachable, ejected, unhealthy, and back.

use super::state::*;
use std::sync::atomic::Ordering::Relaxed;

const SECOND: u64 = 1_000;

fn config() -> EjectConfig {
    EjectConfig::default()
}

/// A call that begins now, and ends.
fn fail(state: &EndpointState, now: u64) -> Option<OutReason> {
    let call = FailedCall { is_timeout: false, calls: 0, ejections: state.ejections() };
    state.record_failure(call, &config(), now)
}

fn succeed(state: &EndpointState, now: u64) -> Option<StateChange> {
    state.record_success(state.ejections(), || now)
}

/// Records failures until the endpoint is to be ejected, and ejects it. Returns their number.
fn fail_until_ejected(state: &EndpointState, now: u64) -> u32 {
    for count in 1..100 {
        if let Some(reason) = fail(state, now) {
            state.eject(reason, (&config(), now));
            return count;
        }
    }
    panic!("never ejected")
}

#[test]
fn time_of_an_unreachable_endpoint_grows_to_a_bound_and_ends_with_a_connection() {
    let state = EndpointState::default();
    for (failures, seconds) in [1, 2, 4, 8, 8, 8].into_iter().enumerate() {
        let change = state.record_unreachable(SECOND);
        assert_eq!(change.is_some(), failures == 0, "reported once");
        let until = SECOND + seconds * SECOND;
        assert_eq!(state.availability(|| until - 1), EndpointAvailability::Unreachable);
        assert_eq!(state.availability(|| until), EndpointAvailability::Available);
    }
    assert_eq!(state.record_reachable(SECOND), Some(StateChange::Up));
    assert_eq!(state.availability(|| SECOND), EndpointAvailability::Available);
}

#[test]
fn failures_in_a_row_eject_and_a_success_between_them_does_not() {
    let state = EndpointState::default();
    for _ in 0..100 {
        (0..4).for_each(|_| assert_eq!(fail(&state, 0), None));
        assert_eq!(succeed(&state, 0), None);
    }
    assert_eq!(fail_until_ejected(&state, 0), 5);
    assert_eq!(state.availability(|| 30 * SECOND - 1), EndpointAvailability::Out);
    assert_eq!(state.out(10 * SECOND), Some((OutReason::Failures, Some(20 * SECOND))));
    assert_eq!(state.availability(|| 30 * SECOND), EndpointAvailability::Available);
    assert_eq!(succeed(&state, 30 * SECOND), Some(StateChange::Up));
}

#[test]
fn endpoint_that_still_fails_after_its_time_is_ejected_at_once_and_for_longer() {
    let state = EndpointState::default();
    let mut now = 0;
    assert_eq!(fail_until_ejected(&state, now), 5);
    for seconds in [30, 60, 120, 240, 300, 300] {
        assert_eq!(state.out(now).and_then(|(_, left)| left), Some(seconds * SECOND));
        now += seconds * SECOND;
        assert_eq!(fail_until_ejected(&state, now), 1);
    }
    // A long good time makes the next ejection a first one.
    now += 300 * SECOND;
    succeed(&state, now);
    now += 300 * SECOND;
    assert_eq!(fail_until_ejected(&state, now), 5);
    assert_eq!(state.out(now).and_then(|(_, left)| left), Some(30 * SECOND));
}

#[test]
fn three_windows_of_timeouts_eject_although_some_calls_succeed() {
    let run = |timeouts_of_ten: u64| {
        let state = EndpointState::default();
        let mut calls = 0;
        for now in (0..60 * SECOND).step_by(500) {
            calls += 1;
            if calls % 10 < timeouts_of_ten {
                let call = FailedCall { is_timeout: true, calls, ejections: 0 };
                let reason = state.record_failure(call, &EjectConfig { after: 50, ..config() }, now);
                if reason.is_some() {
                    return Some((reason, now / SECOND));
                }
            } else {
                succeed(&state, now);
            }
        }
        None
    };
    let (reason, seconds) = run(9).expect("90 % time out");
    assert!(reason == Some(OutReason::Timeouts) && (30..=34).contains(&seconds), "{reason:?} {seconds}");
    assert_eq!(run(7), None, "70 % time out");
}

#[test]
fn results_of_calls_from_before_an_ejection_do_not_count_after_it() {
    for late in [1, 5, 100] {
        let state = EndpointState::default();
        let before = state.ejections();
        assert_eq!(fail_until_ejected(&state, 0), 5);
        let call = FailedCall { is_timeout: true, calls: 5 + late, ejections: before };
        // Some end while it is out, some after its time; others begin while it is out.
        for now in [1, 29 * SECOND, 30 * SECOND, 31 * SECOND] {
            (0..late).for_each(|_| assert_eq!(state.record_failure(call, &config(), now), None));
            assert_eq!(state.record_success(before, || now), None);
        }
        (0..late).for_each(|_| assert_eq!(fail(&state, 29 * SECOND), None));
        assert_eq!(succeed(&state, 31 * SECOND), Some(StateChange::Up));
        (0..4).for_each(|_| assert_eq!(fail(&state, 32 * SECOND), None, "a success ends the row"));
        assert_eq!(fail(&state, 32 * SECOND), Some(OutReason::Failures));
    }
    let state = EndpointState::default();
    let before = state.ejections();
    assert_eq!(fail_until_ejected(&state, 0), 5);
    assert_eq!(state.record_success(before, || 30 * SECOND), None);
    assert_eq!(fail_until_ejected(&state, 30 * SECOND), 1, "a late success clears nothing either");
}

#[test]
fn failures_of_an_unhealthy_endpoint_do_not_count_when_it_is_healthy_again() {
    let state = EndpointState::default();
    state.record_check(false, 1, 0);
    (0..100).for_each(|_| assert_eq!(fail(&state, 0), None));
    assert!(!state.is_suspect.load(Relaxed), "a success changes nothing");
    state.record_check(true, 1, 0);
    assert_eq!(fail_until_ejected(&state, 0), 5);
}

#[test]
fn endpoint_that_is_never_ejected_is_not_suspect_after_a_success() {
    let state = EndpointState::default();
    // Enough bad windows, but it is the only endpoint: it is not ejected.
    let mut reasons = Vec::new();
    for calls in 1..100 {
        let call = FailedCall { is_timeout: true, calls, ejections: 0 };
        let config = EjectConfig { after: 1_000, ..config() };
        reasons.extend(state.record_failure(call, &config, calls * SECOND));
    }
    assert!(reasons.contains(&OutReason::Timeouts));
    state.record_unreachable(100 * SECOND);
    assert_eq!(succeed(&state, 110 * SECOND), Some(StateChange::Up));
    assert!(!state.is_suspect.load(Relaxed));
    let call = FailedCall { is_timeout: false, calls: 101, ejections: 0 };
    assert_eq!(state.record_failure(call, &config(), 111 * SECOND), None, "one failure of no row");
    assert_eq!(state.record_reachable(112 * SECOND), None);
    assert!(!state.has_failed_connection.load(Relaxed));
}

#[test]
fn health_checks_change_the_state_after_enough_results_in_a_row() {
    let state = EndpointState::default();
    let check = |passed: bool| state.record_check(passed, if passed { 2 } else { 3 }, 0);
    let results = [false, false, true, false, false, false, false, true, false, true, true, true].map(check);
    let mut expected = [None; 12];
    expected[5] = Some(StateChange::Down(OutReason::HealthCheck));
    expected[10] = Some(StateChange::Up);
    assert_eq!(results, expected);
    assert_eq!(state.availability(|| 0), EndpointAvailability::Available);
}

#[test]
fn unhealthy_endpoint_is_in_use_again_when_there_are_no_checks_any_more() {
    let state = EndpointState::default();
    assert_eq!(state.forget_checks(0), None);
    state.record_check(false, 1, 0);
    assert_eq!(state.availability(|| 0), EndpointAvailability::Out);
    assert_eq!(state.forget_checks(0), Some(StateChange::Up));
    assert_eq!(state.availability(|| 0), EndpointAvailability::Available);
    assert_eq!(state.record_check(false, 2, 0), None, "the failed check is forgotten");
}

#[test]
fn endpoint_is_reported_as_up_only_if_nothing_keeps_it_out() {
    let state = EndpointState::default();
    assert_eq!(fail_until_ejected(&state, 0), 5);
    (0..3).for_each(|_| assert_eq!(state.record_check(false, 3, 0), None, "it is reported already"));
    assert_eq!(state.record_check(true, 1, SECOND), None, "it is ejected");
    assert_eq!(succeed(&state, 31 * SECOND), Some(StateChange::Up));
}
