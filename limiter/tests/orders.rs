//! Every interleaving of two threads that charge, refund and accrue, explored by loom; empty
//! without `--cfg loom`. `src/sync.rs` has the command.
#![cfg(loom)]

use std::num::NonZeroU32;
use std::time::Duration;

use limiter::bucket::{Gcra, GcraCell};
use limiter::{Cost, Fraction, Lease, LeaseConfig, LeaseSource, MonotonicTime, Quota};
use loom::sync::Arc;
use loom::thread;

mod cell {
    use super::*;

    fn gcra(burst: u32) -> Gcra {
        Gcra::new(Quota::new("1/h".parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap())
    }

    fn left(cell: &GcraCell, gcra: &Gcra) -> u64 {
        cell.peek(gcra, Cost::ONE, MonotonicTime::ORIGIN).map_or(0, |room| room.remaining + 1)
    }

    #[test]
    fn the_last_token_is_granted_once() {
        loom::model(|| {
            let (cell, gcra) = (Arc::new(GcraCell::default()), gcra(1));
            let other = Arc::clone(&cell);
            let theirs = thread::spawn(move || other.commit(&gcra, Cost::ONE, MonotonicTime::ORIGIN).is_ok());
            let ours = cell.commit(&gcra, Cost::ONE, MonotonicTime::ORIGIN).is_ok();
            assert!(ours != theirs.join().unwrap());
        });
    }

    #[test]
    fn a_refund_concurrent_with_a_charge_leaves_what_was_admitted() {
        loom::model(|| {
            let (cell, gcra) = (Arc::new(GcraCell::default()), gcra(3));
            let other = Arc::clone(&cell);
            let theirs = thread::spawn(move || {
                other.commit(&gcra, Cost::ONE, MonotonicTime::ORIGIN).unwrap();
                other.refund(&gcra, Cost::ONE);
            });
            let two = Cost::new(NonZeroU32::new(2).unwrap());
            let ours = cell.commit(&gcra, two, MonotonicTime::ORIGIN).is_ok();
            theirs.join().unwrap();
            assert!(ours);
            assert_eq!(left(&cell, &gcra), 1);
        });
    }

    #[test]
    fn a_charge_concurrent_with_a_decision_leaves_at_most_a_burst_of_backlog() {
        loom::model(|| {
            let (cell, gcra) = (Arc::new(GcraCell::default()), gcra(2));
            let other = Arc::clone(&cell);
            let two = Cost::new(NonZeroU32::new(2).unwrap());
            let theirs = thread::spawn(move || other.charge(&gcra, two, MonotonicTime::ORIGIN));
            let ours = cell.commit(&gcra, Cost::ONE, MonotonicTime::ORIGIN);
            theirs.join().unwrap();
            let (hour, after) = (Duration::from_secs(3_600), cell.commit(&gcra, Cost::ONE, MonotonicTime::ORIGIN));
            assert_eq!(after.unwrap_err().retry_after, hour, "whether ours passed: {}", ours.is_ok());
        });
    }
}

mod lease {
    use super::*;

    /// A lease that holds `burst` tokens and refills one a second by itself.
    fn lease(burst: u32) -> Arc<Lease> {
        let quota = Quota::new("1/s".parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap();
        let config = LeaseConfig::new(1, NonZeroU32::MIN, LeaseSource::LocalFallback);
        Arc::new(Lease::new(quota, config, MonotonicTime::ORIGIN).unwrap())
    }

    fn spend(lease: &Lease, now: MonotonicTime) -> bool {
        lease.commit(Cost::ONE, Fraction::ZERO, now).is_ok()
    }

    #[test]
    fn the_last_token_is_spent_once() {
        loom::model(|| {
            let lease = lease(1);
            let other = Arc::clone(&lease);
            let theirs = thread::spawn(move || spend(&other, MonotonicTime::ORIGIN));
            assert!(spend(&lease, MonotonicTime::ORIGIN) != theirs.join().unwrap());
        });
    }

    #[test]
    fn a_refund_concurrent_with_a_charge_leaves_what_was_admitted() {
        loom::model(|| {
            let lease = lease(3);
            let other = Arc::clone(&lease);
            let theirs = thread::spawn(move || {
                assert!(spend(&other, MonotonicTime::ORIGIN));
                other.refund(Cost::ONE);
            });
            assert!(spend(&lease, MonotonicTime::ORIGIN));
            theirs.join().unwrap();
            assert_eq!(lease.peek(Cost::ONE, Fraction::ZERO, MonotonicTime::ORIGIN).unwrap().remaining, 1);
        });
    }

    /// Both threads see that a second has passed; its token is added once.
    #[test]
    fn elapsed_time_seen_by_two_threads_is_counted_once() {
        loom::model(|| {
            let lease = lease(2);
            for _ in 0..2 {
                assert!(spend(&lease, MonotonicTime::ORIGIN));
            }
            let later = MonotonicTime::ORIGIN + Duration::from_secs(1);
            let other = Arc::clone(&lease);
            let theirs = thread::spawn(move || spend(&other, later));
            let ours = spend(&lease, later);
            let both = [ours, theirs.join().unwrap()];
            assert!(!(both[0] && both[1]));
            assert!(both[0] || both[1] || spend(&lease, later), "the added token can be spent");
        });
    }
}
