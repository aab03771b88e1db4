//! Every order in which two threads can charge, refund and accrue, explored by loom; empty without `--cfg loom`. The command
//! stands in `src/sync.rs`.
#![cfg(loom)]

use std::num::NonZeroU32;
use std::time::Duration;

use limiter::bucket::{Cell, Gcra};
use limiter::{Backing, Cost, Fraction, Lease, LeaseSettings, Moment, Quota};
use loom::sync::Arc;
use loom::thread;

mod cell {
    use super::*;

    fn gcra(burst: u32) -> Gcra {
        Gcra::new(Quota::new("1/h".parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap())
    }

    fn left(cell: &Cell, gcra: &Gcra) -> u64 {
        cell.peek(gcra, Cost::ONE, Moment::ORIGIN).map_or(0, |room| room.remaining + 1)
    }

    #[test]
    fn the_last_token_is_given_once() {
        loom::model(|| {
            let (cell, gcra) = (Arc::new(Cell::default()), gcra(1));
            let other = Arc::clone(&cell);
            let theirs = thread::spawn(move || other.commit(&gcra, Cost::ONE, Moment::ORIGIN).is_ok());
            let ours = cell.commit(&gcra, Cost::ONE, Moment::ORIGIN).is_ok();
            assert!(ours != theirs.join().unwrap());
        });
    }

    #[test]
    fn a_refund_beside_a_charge_leaves_what_was_admitted() {
        loom::model(|| {
            let (cell, gcra) = (Arc::new(Cell::default()), gcra(3));
            let other = Arc::clone(&cell);
            let theirs = thread::spawn(move || {
                other.commit(&gcra, Cost::ONE, Moment::ORIGIN).unwrap();
                other.refund(&gcra, Cost::ONE);
            });
            let two = Cost::new(NonZeroU32::new(2).unwrap());
            let ours = cell.commit(&gcra, two, Moment::ORIGIN).is_ok();
            theirs.join().unwrap();
            assert!(ours);
            assert_eq!(left(&cell, &gcra), 1);
        });
    }

    #[test]
    fn a_charge_after_the_answer_beside_a_decision_owes_a_burst_at_most() {
        loom::model(|| {
            let (cell, gcra) = (Arc::new(Cell::default()), gcra(2));
            let other = Arc::clone(&cell);
            let two = Cost::new(NonZeroU32::new(2).unwrap());
            let theirs = thread::spawn(move || other.charge(&gcra, two, Moment::ORIGIN));
            let ours = cell.commit(&gcra, Cost::ONE, Moment::ORIGIN);
            theirs.join().unwrap();
            let (hour, after) = (Duration::from_secs(3_600), cell.commit(&gcra, Cost::ONE, Moment::ORIGIN));
            assert_eq!(after.unwrap_err().after, hour, "whether ours passed: {}", ours.is_ok());
        });
    }
}

mod lease {
    use super::*;

    /// A lease that holds `burst` tokens, and gets one a second by itself.
    fn lease(burst: u32) -> Arc<Lease> {
        let quota = Quota::new("1/s".parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap();
        let settings = LeaseSettings::new(1, NonZeroU32::MIN, Backing::Alone);
        Arc::new(Lease::new(quota, settings, Moment::ORIGIN).unwrap())
    }

    fn spend(lease: &Lease, now: Moment) -> bool {
        lease.commit(Cost::ONE, Fraction::ZERO, now).is_ok()
    }

    #[test]
    fn the_last_token_is_spent_once() {
        loom::model(|| {
            let lease = lease(1);
            let other = Arc::clone(&lease);
            let theirs = thread::spawn(move || spend(&other, Moment::ORIGIN));
            assert!(spend(&lease, Moment::ORIGIN) != theirs.join().unwrap());
        });
    }

    #[test]
    fn a_refund_beside_a_charge_leaves_what_was_admitted() {
        loom::model(|| {
            let lease = lease(3);
            let other = Arc::clone(&lease);
            let theirs = thread::spawn(move || {
                assert!(spend(&other, Moment::ORIGIN));
                other.refund(Cost::ONE);
            });
            assert!(spend(&lease, Moment::ORIGIN));
            theirs.join().unwrap();
            assert_eq!(lease.peek(Cost::ONE, Fraction::ZERO, Moment::ORIGIN).unwrap().remaining, 1);
        });
    }

    /// Both threads see that a second has passed; its token is added once.
    #[test]
    fn time_that_two_threads_see_is_counted_once() {
        loom::model(|| {
            let lease = lease(2);
            for _ in 0..2 {
                assert!(spend(&lease, Moment::ORIGIN));
            }
            let later = Moment::ORIGIN + Duration::from_secs(1);
            let other = Arc::clone(&lease);
            let theirs = thread::spawn(move || spend(&other, later));
            let ours = spend(&lease, later);
            let both = [ours, theirs.join().unwrap()];
            assert!(!(both[0] && both[1]));
            assert!(both[0] || both[1] || spend(&lease, later), "the token of whoever added it is there");
        });
    }
}
