//! Owns [`Trial`]: a mode and a percentage that replace a rule's own for a while, and the switch that holds it.
//!
//! Refuses to be forgotten: every trial ends by itself. Invariant: a decision reads mode and percentage of one rule
//! together, in one load, so it never sees half a trial.

use crate::clock::Moment;
use crate::quota::{Mode, Percent};
use crate::sync::{AtomicU64, Ordering};

const MODE_BITS: u32 = 2;
const PERCENT_BITS: u32 = 7;
const NANOS_PER_MICRO: u64 = 1_000;

/// What is tried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    pub mode: Mode,
    pub percent: Percent,
}

/// The trial of one rule, if any, in one word: the end in microseconds since the origin, percentage, mode. Zero, which
/// ends at the origin, is no trial.
#[derive(Debug, Default)]
pub(super) struct Switch(AtomicU64);

impl Switch {
    pub(super) fn set(&self, trial: Trial, until: Moment) {
        let mode = match trial.mode {
            Mode::Enforce => 0,
            Mode::Shadow => 1,
            Mode::Off => 2,
        };
        // 2^64 nanoseconds are fewer than 2^55 microseconds.
        let until_micros = until.nanos().div_ceil(NANOS_PER_MICRO);
        let percent = u64::from(trial.percent.get());
        let word = ((until_micros << PERCENT_BITS | percent) << MODE_BITS) | mode;
        self.0.store(word, Ordering::Relaxed);
    }

    pub(super) fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// The trial that is set, even one that has ended, and its end.
    pub(super) fn get(&self) -> Option<(Trial, Moment)> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            word => Some(read(word)),
        }
    }

    /// The trial that runs at `now`.
    pub(super) fn running(&self, now: Moment) -> Option<(Trial, Moment)> {
        self.get().filter(|(_, until)| *until > now)
    }
}

fn read(word: u64) -> (Trial, Moment) {
    let mode = match word & ((1 << MODE_BITS) - 1) {
        0 => Mode::Enforce,
        1 => Mode::Shadow,
        _ => Mode::Off,
    };
    let percent = (word >> MODE_BITS & ((1 << PERCENT_BITS) - 1)) as u8;
    let percent = Percent::try_from(percent).unwrap_or(Percent::ALL);
    let until_micros = word >> (MODE_BITS + PERCENT_BITS);
    (Trial { mode, percent }, Moment::from_nanos(until_micros.saturating_mul(NANOS_PER_MICRO)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_trial_is_read_as_it_was_set(nanos in 1u64.., percent in 0u8..=100, mode in 0usize..3) {
            let mode = [Mode::Enforce, Mode::Shadow, Mode::Off][mode];
            let trial = Trial { mode, percent: Percent::try_from(percent).unwrap() };
            let switch = Switch::default();
            switch.set(trial, Moment::from_nanos(nanos));
            let (read, until) = switch.get().unwrap();
            prop_assert_eq!(read, trial);
            prop_assert!((nanos..=nanos.saturating_add(999)).contains(&until.nanos()));
            prop_assert!(switch.running(Moment::from_nanos(nanos - 1)).is_some());
            prop_assert!(switch.running(until).is_none());
            switch.clear();
            prop_assert_eq!(switch.get(), None);
        }
    }
}
