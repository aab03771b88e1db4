//! Every interleaving of threads at the shared state of endpoints, explored by loom: responses,
//! connections and health checks judge an endpoint at the same time, and endpoints are ejected
//! within their share.
//!
//! The breaker is not explored here: each of its operations is one critical section, and
//! `breaker/tests/orders.rs` runs every order of those. The pools of connections are those of one
//! thread each; `http/h2_upstream/orders.rs` explores the account that they share.

use std::sync::Arc;
use std::time::Duration;

use ejection::EjectionGate;
use loom::thread;
use state::{EjectConfig, EndpointAvailability, EndpointState, FailedCall, OutReason, StateChange};

mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
    pub(super) use loom::sync::{Mutex, MutexGuard};
}
#[expect(clippy::duplicate_mod, dead_code, reason = "compiled with the atomics and locks of loom")]
#[path = "state.rs"]
mod state;
#[expect(clippy::duplicate_mod, reason = "compiled with the locks of loom")]
#[path = "ejection.rs"]
mod ejection;

const SECOND: u64 = 1_000;

fn config() -> EjectConfig {
    EjectConfig { after: 2, base: Duration::from_secs(30), share: 0.5 }
}

/// A call that began after `ejections` fails at `now`.
fn fail(state: &EndpointState, ejections: u32, now: u64) -> Option<OutReason> {
    state.record_failure(FailedCall { is_timeout: false, calls: 1, ejections }, &config(), now)
}

fn eject(state: &EndpointState, now: u64) {
    state.eject(OutReason::Failures, (&config(), now));
}

/// Runs `other` in a second thread beside `own`, in every interleaving, on a state that `before`
/// has prepared; then `after`.
fn explore(
    before: fn(&EndpointState),
    [own, other]: [fn(&EndpointState); 2],
    after: impl Fn(&EndpointState) + Send + Sync + 'static,
) {
    loom::model(move || {
        let state = Arc::new(EndpointState::default());
        before(&state);
        let second = {
            let state = Arc::clone(&state);
            thread::spawn(move || other(&state))
        };
        own(&state);
        second.join().expect("no panic");
        after(&state);
    });
}

/// A success that began before an ejection says nothing for the endpoint after it: its first
/// failure then ejects it again.
#[test]
fn success_from_before_an_ejection_clears_nothing() {
    let before = |state: &EndpointState| assert_eq!(fail(state, 0, 0), None);
    let success = |state: &EndpointState| {
        state.record_success(0, || 0);
    };
    explore(before, [|state| eject(state, 0), success], |state| {
        assert_eq!(state.availability(|| SECOND), EndpointAvailability::Out);
        assert_eq!(fail(state, 1, 31 * SECOND), Some(OutReason::Failures));
    });
}

/// Failures that began before an ejection count towards no later one.
#[test]
fn failure_from_before_an_ejection_does_not_count_after_it() {
    let failure = |state: &EndpointState| {
        fail(state, 0, 31 * SECOND);
    };
    explore(
        |_| (),
        [|state| eject(state, 0), failure],
        |state| {
            state.record_success(1, || 31 * SECOND);
            assert_eq!(fail(state, 1, 32 * SECOND), None, "a first failure");
        },
    );
}

/// The number that requests read is the latest of the times that the judges have set.
#[test]
fn published_time_is_that_of_all_judges() {
    let connection = |state: &EndpointState| {
        state.record_unreachable(0);
        state.record_reachable(0);
    };
    explore(
        |_| (),
        [|state| eject(state, 0), connection],
        |state| {
            assert_eq!(state.availability(|| 29 * SECOND), EndpointAvailability::Out);
            assert_eq!(state.availability(|| 30 * SECOND), EndpointAvailability::Available);
        },
    );
    let check = |state: &EndpointState| {
        state.record_check(false, 1, 0);
    };
    explore(
        |_| (),
        [
            |state| {
                state.record_unreachable(0);
            },
            check,
        ],
        |state| {
            assert_eq!(state.availability(|| 0), EndpointAvailability::Unreachable);
            assert_eq!(state.availability(|| 9 * SECOND), EndpointAvailability::Out, "it is unhealthy");
            state.record_check(true, 1, 10 * SECOND);
            assert_eq!(state.availability(|| 10 * SECOND), EndpointAvailability::Available);
        },
    );
}

/// A success after both threads ends the row of failures: it is known that there is one.
#[test]
fn success_after_concurrent_results_ends_the_row() {
    let failure = |state: &EndpointState| {
        fail(state, 0, 0);
    };
    let success = |state: &EndpointState| {
        state.record_success(0, || 0);
    };
    explore(failure, [failure, success], |state| {
        state.record_success(0, || 0);
        assert_eq!(fail(state, 0, 0), None);
    });
}

/// Down and up are reported once each, whichever thread changes the state.
#[test]
fn every_change_is_reported_once() {
    loom::model(|| {
        let state = Arc::new(EndpointState::default());
        let other = Arc::clone(&state);
        let second = thread::spawn(move || other.record_check(false, 1, 0));
        let reports = [state.record_unreachable(0), second.join().expect("no panic")];
        assert_eq!(reports.iter().flatten().count(), 1, "{reports:?}");
        let other = Arc::clone(&state);
        let second = thread::spawn(move || other.record_check(true, 1, 0));
        let reports = [state.record_reachable(0), second.join().expect("no panic")];
        assert_eq!(reports.iter().flatten().collect::<Vec<_>>(), [&StateChange::Up], "{reports:?}");
    });
}

/// Of three endpoints one may be out: two threads that have a reason each eject one.
#[test]
fn threads_together_eject_no_more_than_the_share() {
    loom::model(|| {
        let endpoints: Arc<[EndpointState; 3]> = Arc::default();
        let gate = Arc::new(EjectionGate::default());
        let judge = |index: usize| {
            let (endpoints, gate) = (Arc::clone(&endpoints), Arc::clone(&gate));
            move || {
                let may_eject = || endpoints.iter().filter(|endpoint| endpoint.is_out(0)).count() < 1;
                gate.pass(may_eject, || eject(&endpoints[index], 0));
            }
        };
        let second = thread::spawn(judge(1));
        judge(0)();
        second.join().expect("no panic");
        assert_eq!(endpoints.iter().filter(|endpoint| endpoint.is_out(0)).count(), 1);
    });
}
