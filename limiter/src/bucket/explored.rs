//! Every order in which two threads can charge, charge and refund one cell.

use std::num::NonZeroU32;

use loom::sync::Arc;
use loom::thread;

use super::*;
use crate::clock::Moment;
use crate::quota::{Cost, Quota};

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
