//! Every order in which two threads can spend, give back and accrue one lease's balance.

use std::num::NonZeroU32;

use loom::sync::Arc;
use loom::thread;

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
