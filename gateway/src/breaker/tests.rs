//! Scenarios with a clock of their own. `orders` runs all orders of concurrent calls, `properties`
//! random ones.

mod orders;
mod properties;

use std::time::{Duration, Instant};

use super::config::{BreakerConfig, BreakerMode};
use super::gate::{Breaker, BreakerPermit, RecordedCall};
use super::name::BreakerName;
use super::probes::PROBE_REQUEST_TIMEOUT;
use super::state::{BreakerChange, BreakerState, BreakerTransition, CallStart, ManualState, OpenCause, OpenReason};

const SECOND: Duration = Duration::from_secs(1);

/// A breaker without a ramp: closed after its probes.
fn breaker(epoch: Instant) -> Breaker {
    with(BreakerConfig { ramp: Duration::ZERO, ..BreakerConfig::default() }, epoch)
}

fn with(config: BreakerConfig, epoch: Instant) -> Breaker {
    let name = BreakerName { route: Some("orders".into()), upstream: "shop".into() };
    Breaker::new(name, BreakerConfig { minimum: 4, open: 5 * SECOND, ..config }, epoch, 7)
}

const OPENED: Option<BreakerState> = Some(BreakerState::Open);

fn state_after(change: BreakerTransition) -> Option<BreakerState> {
    Some(match change? {
        BreakerChange::Opened(..) => BreakerState::Open,
        BreakerChange::HalfOpened => BreakerState::HalfOpen,
        BreakerChange::Ramping => BreakerState::Ramp,
        BreakerChange::Closed | BreakerChange::ManualEnded(_) => BreakerState::Closed,
    })
}

fn change_of(breaker: &Breaker, succeeded: bool, now: Instant) -> BreakerTransition {
    breaker.admit(CallStart::OnAdmission, now).map_or(None, |(call, _)| call.record(succeeded, now).1)
}

fn call(breaker: &Breaker, succeeded: bool, now: Instant) -> Option<BreakerState> {
    state_after(change_of(breaker, succeeded, now))
}

fn trip(breaker: &Breaker, now: Instant) {
    for _ in 0..4 {
        call(breaker, false, now);
    }
}

fn admitted(breaker: &Breaker, now: Instant) -> BreakerPermit<'_> {
    admitted_at(breaker, CallStart::OnAdmission, now)
}

fn admitted_at(breaker: &Breaker, start: CallStart, now: Instant) -> BreakerPermit<'_> {
    match breaker.admit(start, now) {
        Ok((call, _)) => call,
        Err(_) => panic!("rejected"),
    }
}

fn is_rejected(breaker: &Breaker, now: Instant) -> bool {
    breaker.admit(CallStart::OnAdmission, now).is_err()
}

#[test]
fn late_failures_open_the_breaker() {
    let now = Instant::now();
    let breaker = breaker(now);
    let recorded = admitted(&breaker, now).record(true, now).0.expect("a judged call");
    for _ in 0..3 {
        call(&breaker, true, now);
    }
    let earlier = RecordedCall { generation: recorded.generation + 1, ..recorded };
    assert_eq!(breaker.fail_late(recorded, now), None);
    assert_eq!(breaker.fail_late(earlier, now), None, "of another generation");
    assert_eq!(state_after(breaker.fail_late(recorded, now)), OPENED);
    assert_eq!(breaker.fail_late(recorded, now), None);
}

#[test]
fn late_failure_of_a_call_outside_the_window_counts_as_one_call() {
    let now = Instant::now();
    let breaker = breaker(now);
    let recorded = admitted(&breaker, now).record(true, now).0.expect("a judged call");
    let later = now + 60 * SECOND;
    (0..3).for_each(|_| assert_eq!(breaker.fail_late(recorded, later), None, "below the minimum of calls"));
    assert_eq!(state_after(breaker.fail_late(recorded, later)), OPENED);
}

#[test]
fn time_of_the_client_is_not_the_time_of_the_origin() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    let (sent, answered) = (epoch + 60 * SECOND, epoch + 61 * SECOND);
    let mut uploads: Vec<_> = (0..20).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, epoch)).collect();
    assert!(!is_rejected(&breaker, epoch + 59 * SECOND), "no call of the origin is running");
    uploads.iter_mut().for_each(|upload| upload.start(sent));
    assert!(uploads.into_iter().all(|upload| upload.record(true, answered).1.is_none()));
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[test]
fn origin_that_answers_complete_uploads_slowly_opens_the_breaker() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    let mut uploads: Vec<_> = (0..4).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, epoch)).collect();
    let sent = epoch + 60 * SECOND;
    uploads.iter_mut().for_each(|upload| upload.start(sent));
    assert!(!is_rejected(&breaker, sent + 2 * SECOND));
    assert!(is_rejected(&breaker, sent + 4 * SECOND), "they count as slow while they run");
}

#[test]
fn calls_without_a_result_count_as_nothing() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    for _ in 0..100 {
        drop(admitted_at(&breaker, CallStart::OnRequestSent, epoch));
        drop(admitted(&breaker, epoch));
    }
    (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None, "below the minimum of calls"));
    assert!(!is_rejected(&breaker, epoch + 60 * SECOND), "none of them is running");
}

#[test]
fn probe_whose_client_stalls_loses_its_slot_to_the_next_call() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    trip(&breaker, epoch);
    let later = epoch + 6 * SECOND;
    let mut stalled: Vec<_> = (0..3).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, later)).collect();
    let soon = later + SECOND / 2;
    assert!(breaker.admit(CallStart::OnRequestSent, soon).is_err(), "another stalled call");
    assert_eq!(call(&breaker, true, soon), None, "a complete request does not wait for stalled ones");
    let due = later + PROBE_REQUEST_TIMEOUT;
    assert_eq!(call(&breaker, true, due), None);
    let third = admitted(&breaker, due);
    // The results of the stalled calls are no results of probes now.
    stalled[0].start(due);
    assert!(stalled.into_iter().all(|probe| probe.record(false, due).1.is_none()));
    assert_eq!(third.record(true, due).1, Some(BreakerChange::Closed));
}

#[test]
fn probe_whose_request_arrives_in_time_is_judged_by_the_time_of_the_origin() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    trip(&breaker, epoch);
    let later = epoch + 6 * SECOND;
    for expected in [None, None, Some(BreakerChange::Closed)] {
        let mut probe = admitted_at(&breaker, CallStart::OnRequestSent, later);
        let sent = later + 60 * SECOND;
        probe.start(sent);
        assert_eq!(probe.record(true, sent + SECOND).1, expected);
    }
}

#[test]
fn probe_that_hangs_opens_the_breaker_again() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    trip(&breaker, epoch);
    let later = epoch + 6 * SECOND;
    let hanging = admitted(&breaker, later);
    let change = breaker.admit(CallStart::OnAdmission, later + 3 * SECOND).err().expect("open");
    assert_eq!(state_after(change), OPENED);
    assert_eq!(hanging.record(true, later + 3 * SECOND).1, None);
}

#[test]
fn open_time_has_jitter_and_grows_until_the_breaker_was_closed_for_long() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    let open_time = |change: BreakerTransition| match change {
        Some(BreakerChange::Opened(_, time)) => time,
        other => panic!("{other:?}"),
    };
    (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
    let mut now = epoch;
    let mut change = change_of(&breaker, false, now);
    let mut times = Vec::new();
    for factor in [1, 2, 4, 8, 8] {
        let time = open_time(change);
        assert!((5 * factor * SECOND..=6 * factor * SECOND).contains(&time), "{factor}: {time:?}");
        assert_eq!(breaker.wait(now), time);
        assert!(is_rejected(&breaker, now + time - Duration::from_millis(1)));
        times.push(time / factor);
        now += time;
        // The first probe fails.
        change = change_of(&breaker, false, now);
    }
    assert!(times.iter().any(|time| *time != times[0]), "{times:?}");
    // Closed for a short time: it grows on. Closed for as long as it was open: it begins anew.
    for (closed_for, factor) in [(SECOND, 8), (60 * SECOND, 1), (9 * SECOND, 2)] {
        now += open_time(change);
        (0..3).for_each(|_| {
            call(&breaker, true, now);
        });
        assert_eq!(breaker.state(), BreakerState::Closed);
        now += closed_for;
        (0..3).for_each(|_| assert_eq!(call(&breaker, false, now), None));
        change = change_of(&breaker, false, now);
        let time = open_time(change);
        assert!((5 * factor * SECOND..=6 * factor * SECOND).contains(&time), "{closed_for:?}: {time:?}");
    }
}

#[test]
fn half_open_closes_after_all_probes_and_opens_on_one_failure() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    trip(&breaker, epoch);
    let later = epoch + 6 * SECOND;
    assert_eq!(call(&breaker, false, later), OPENED);
    let later = later + 12 * SECOND;
    assert_eq!(
        (0..3).map(|_| call(&breaker, true, later)).collect::<Vec<_>>(),
        [None, None, Some(BreakerState::Closed)]
    );
    assert_eq!(call(&breaker, false, later), None, "the window is empty after closing");
}

#[test]
fn cancelled_probe_releases_its_slot() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    trip(&breaker, epoch);
    let later = epoch + 6 * SECOND;
    let probes: Vec<_> = (0..3).map(|_| admitted(&breaker, later)).collect();
    assert!(breaker.admit(CallStart::OnAdmission, later).is_err());
    drop(probes);
    assert!(breaker.admit(CallStart::OnAdmission, later).is_ok());
}

#[test]
fn hanging_calls_open_the_breaker_before_they_end() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    let running: Vec<_> = (0..4).map(|_| admitted(&breaker, epoch)).collect();
    assert!(breaker.admit(CallStart::OnAdmission, epoch + 2 * SECOND).is_ok());
    let change = breaker.admit(CallStart::OnAdmission, epoch + 5 * SECOND).err().expect("open");
    assert_eq!(state_after(change), OPENED);
    drop(running);
}

#[test]
fn failures_outside_the_window_and_below_the_minimum_do_not_count() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
    assert_eq!(call(&breaker, false, epoch + 11 * SECOND), None);
    let breaker = self::breaker(epoch);
    (0..10).for_each(|_| assert_eq!(call(&breaker, true, epoch), None));
    (0..9).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
    assert_eq!(call(&breaker, false, epoch), OPENED);
}

#[test]
fn change_tells_the_rule_and_the_calls_that_opened_the_breaker() {
    let epoch = Instant::now();
    let opened = |reason, calls, failed, slow| Some(OpenCause { reason, calls, failed, slow });
    let cause = |change| match change {
        Some(BreakerChange::Opened(cause, _)) => Some(cause),
        _ => None,
    };
    let failing = breaker(epoch);
    (0..2).for_each(|_| assert_eq!(call(&failing, true, epoch), None));
    assert_eq!(call(&failing, false, epoch), None);
    assert_eq!(cause(change_of(&failing, false, epoch)), opened(OpenReason::ErrorRatio, 4, 2, 0));
    let due = epoch + 6 * SECOND;
    assert_eq!(cause(change_of(&failing, false, due)), opened(OpenReason::ProbeFailed, 1, 1, 0));

    let hanging = breaker(epoch);
    let calls: Vec<_> = (0..4).map(|_| admitted(&hanging, epoch)).collect();
    let change = hanging.admit(CallStart::OnAdmission, due).err().expect("open");
    assert_eq!(cause(change), opened(OpenReason::SlowRatio, 4, 0, 4));
    drop(calls);
    let probe = admitted(&hanging, due + 6 * SECOND);
    let change = hanging.admit(CallStart::OnAdmission, due + 9 * SECOND).err().expect("open");
    assert_eq!(cause(change), opened(OpenReason::ProbeSlow, 1, 0, 1));
    drop(probe);
}

const RAMP: Duration = Duration::from_secs(30);

/// A breaker in its ramp, and the time of its begin.
fn ramping(epoch: Instant) -> (Breaker, Instant) {
    ramping_with(BreakerConfig { ramp: RAMP, ..BreakerConfig::default() }, epoch)
}

fn ramping_with(config: BreakerConfig, epoch: Instant) -> (Breaker, Instant) {
    let breaker = with(config, epoch);
    trip(&breaker, epoch);
    let now = epoch + 6 * SECOND;
    (0..3).for_each(|_| {
        call(&breaker, true, now);
    });
    assert_eq!(breaker.state(), BreakerState::Ramp);
    (breaker, now)
}

#[test]
fn ramp_admits_5_then_25_then_50_percent_and_then_all() {
    let (breaker, begin) = ramping(Instant::now());
    // These run for the whole ramp: shares apply.
    let _running: Vec<_> = (0..3).map(|_| admitted_at(&breaker, CallStart::OnRequestSent, begin)).collect();
    for (seconds, percent) in [(1, 5), (11, 25), (21, 50), (31, 100)] {
        let now = begin + seconds * SECOND;
        let count = (0..400).filter(|_| call_is_admitted(&breaker, now)).count();
        assert!(count.abs_diff(4 * percent) <= 1, "{count} of 400 calls in second {seconds}");
        assert_eq!(breaker.report(now).percent, u32::try_from(percent).ok());
    }
    assert_eq!(breaker.state(), BreakerState::Closed);
}

fn call_is_admitted(breaker: &Breaker, now: Instant) -> bool {
    let admitted = breaker.admit(CallStart::OnAdmission, now);
    admitted.is_ok_and(|(permit, _)| permit.record(true, now).1.is_none())
}

#[test]
fn few_calls_at_a_time_are_not_rejected_in_the_ramp() {
    let (breaker, begin) = ramping(Instant::now());
    assert!((0..100).all(|_| call_is_admitted(&breaker, begin)), "one after the other");
    let calls: Vec<_> = (0..3).map(|_| admitted(&breaker, begin)).collect();
    assert!(is_rejected(&breaker, begin));
    drop(calls);
    assert!(call_is_admitted(&breaker, begin), "cancelled calls do not run");
}

#[test]
fn failures_in_the_ramp_open_the_breaker_again() {
    let (breaker, begin) = ramping(Instant::now());
    assert_eq!(call(&breaker, false, begin), None, "one failure is no ratio");
    assert_eq!(call(&breaker, true, begin), None);
    assert_eq!(call(&breaker, false, begin), OPENED);
    let (breaker, begin) = ramping(Instant::now());
    let hanging: Vec<_> = (0..3).map(|_| admitted(&breaker, begin)).collect();
    assert_eq!(state_after(breaker.advance(begin + 4 * SECOND)), OPENED, "hanging calls are slow");
    drop(hanging);
}

#[test]
fn failures_open_a_ramp_before_a_success_could() {
    let (breaker, begin) = ramping(Instant::now());
    assert_eq!(call(&breaker, false, begin), None);
    assert_eq!(call(&breaker, false, begin), OPENED, "two of three calls, whatever the third does");
    let low = BreakerConfig { ramp: RAMP, error_ratio: 0.3, ..BreakerConfig::default() };
    let (breaker, begin) = ramping_with(low, Instant::now());
    assert_eq!(call(&breaker, false, begin), OPENED, "one of three");
}

#[test]
fn successes_do_not_open_a_breaker() {
    // Of four calls that the ratio needs, the last succeeds.
    let epoch = Instant::now();
    let closed = breaker(epoch);
    (0..3).for_each(|_| assert_eq!(call(&closed, false, epoch), None));
    (0..3).for_each(|_| assert_eq!(call(&closed, true, epoch), None));
    assert_eq!(closed.advance(epoch + SECOND), None);
    // They leave the window before the failures do.
    for (breaker, begin) in [(breaker(epoch), epoch), ramping(epoch)] {
        (0..5).for_each(|_| assert_eq!(call(&breaker, true, begin), None));
        (0..4).for_each(|_| assert_eq!(call(&breaker, false, begin + 8 * SECOND), None));
        for second in 8..40 {
            let change = state_after(breaker.advance(begin + second * SECOND));
            assert!(change.is_none_or(|state| state == BreakerState::Closed), "{change:?} in second {second}");
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}

#[test]
fn time_changes_the_state_without_calls() {
    let epoch = Instant::now();
    let (breaker, begin) = ramping(epoch);
    assert_eq!(breaker.advance(begin + RAMP - SECOND), None);
    assert_eq!(breaker.advance(begin + RAMP), Some(BreakerChange::Closed));
    trip(&breaker, begin + RAMP);
    assert_eq!(breaker.advance(begin + RAMP + 4 * SECOND), None);
    assert_eq!(breaker.advance(begin + RAMP + 12 * SECOND), Some(BreakerChange::HalfOpened));
    // The deadline of a probe passes without another call.
    let probe = admitted(&breaker, begin + RAMP + 12 * SECOND);
    assert_eq!(state_after(breaker.advance(begin + RAMP + 15 * SECOND)), OPENED);
    drop(probe);
    let closed = self::breaker(epoch);
    let hanging: Vec<_> = (0..4).map(|_| admitted(&closed, epoch)).collect();
    assert_eq!(state_after(closed.advance(epoch + 4 * SECOND)), OPENED);
    drop(hanging);
}

#[test]
fn breaker_in_shadow_mode_changes_its_state_and_rejects_nothing() {
    let epoch = Instant::now();
    let breaker = with(BreakerConfig { mode: BreakerMode::Shadow, ..BreakerConfig::default() }, epoch);
    trip(&breaker, epoch);
    assert!(breaker.state() == BreakerState::Open && !breaker.is_rejecting());
    for _ in 0..10 {
        assert_eq!(call(&breaker, true, epoch), None, "a call that is not judged");
    }
    assert_eq!(breaker.rejections(), 10);
    let later = epoch + 6 * SECOND;
    let probes: Vec<_> = (0..5).map(|_| admitted(&breaker, later)).collect();
    assert_eq!(breaker.rejections(), 12);
    let changes: Vec<_> = probes.into_iter().filter_map(|probe| probe.record(true, later).1).collect();
    assert_eq!(changes, [BreakerChange::Ramping]);
}

#[test]
fn breaker_that_is_off_judges_no_call() {
    let epoch = Instant::now();
    let breaker = with(BreakerConfig { mode: BreakerMode::Off, ..BreakerConfig::default() }, epoch);
    (0..100).for_each(|_| assert_eq!(call(&breaker, false, epoch), None));
    let _hanging: Vec<_> = (0..100).map(|_| admitted(&breaker, epoch)).collect();
    assert_eq!(breaker.advance(epoch + 60 * SECOND), None);
    breaker.set_manual(ManualState::Open, SECOND, epoch);
    assert!(is_rejected(&breaker, epoch) && breaker.is_rejecting());
}

#[test]
fn operator_opens_a_breaker_until_its_time_has_passed() {
    for mode in [BreakerMode::Enforce, BreakerMode::Shadow] {
        let epoch = Instant::now();
        let breaker = with(BreakerConfig { mode, ..BreakerConfig::default() }, epoch);
        let earlier = admitted(&breaker, epoch);
        breaker.set_manual(ManualState::Open, 60 * SECOND, epoch);
        assert!(is_rejected(&breaker, epoch) && breaker.is_rejecting());
        assert!(breaker.wait(epoch) >= 60 * SECOND);
        assert_eq!(earlier.record(false, epoch).1, None);
        let due = epoch + 60 * SECOND;
        assert!(is_rejected(&breaker, due - Duration::from_millis(1)));
        assert_eq!(breaker.advance(due), Some(BreakerChange::ManualEnded(ManualState::Open)));
        assert_eq!(breaker.state(), BreakerState::HalfOpen, "it is probed first");
        assert!(call_is_admitted(&breaker, due));
    }
}

#[test]
fn operator_closes_a_breaker_of_a_failing_origin() {
    let epoch = Instant::now();
    let breaker = breaker(epoch);
    trip(&breaker, epoch);
    breaker.set_manual(ManualState::Closed, 60 * SECOND, epoch);
    for _ in 0..100 {
        assert_eq!(call(&breaker, false, epoch), None);
    }
    assert_eq!((breaker.state(), breaker.wait(epoch)), (BreakerState::Closed, Duration::ZERO));
    assert_eq!(breaker.end_manual(epoch), Some(ManualState::Closed));
    assert_eq!(breaker.end_manual(epoch), None);
    (0..3).for_each(|_| assert_eq!(call(&breaker, false, epoch), None, "earlier calls do not count"));
    assert_eq!(call(&breaker, false, epoch), OPENED);
}

#[test]
fn state_of_an_operator_outlives_a_change_of_the_configuration() {
    let epoch = Instant::now();
    let old = breaker(epoch);
    old.set_manual(ManualState::Open, 60 * SECOND, epoch);
    let new = old.replaced(BreakerConfig::default(), epoch + SECOND, 1);
    assert!(is_rejected(&new, epoch + 59 * SECOND) && !is_rejected(&new, epoch + 60 * SECOND));
}
