//! [`Override`]: a mode and a percentage that replace a rule's own for a limited time, and the
//! [`OverrideSlot`] that stores it.
//!
//! There is no override without an end. Invariant: a decision reads mode and percentage of one rule
//! in one load, so it never sees half an override.

use crate::clock::MonotonicTime;
use crate::quota::{Mode, Percent};
use crate::sync::{AtomicU64, Ordering};

const MODE_BITS: u32 = 2;
const PERCENT_BITS: u32 = 7;
const NANOS_PER_MICRO: u64 = 1_000;

/// Mode and percentage that replace those of a rule; the end is stored beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override {
    pub mode: Mode,
    pub percent: Percent,
}

/// The override of one rule, if any, in one word: end in microseconds since the clock's origin,
/// percentage, mode. Zero, an end at the origin, means no override.
#[derive(Debug, Default)]
pub(super) struct OverrideSlot(AtomicU64);

impl OverrideSlot {
    pub(super) fn set(&self, rule_override: Override, ends_at: MonotonicTime) {
        let mode = match rule_override.mode {
            Mode::Enforce => 0,
            Mode::Shadow => 1,
            Mode::Off => 2,
        };
        // 2^64 nanoseconds are fewer than 2^55 microseconds.
        let ends_at_micros = ends_at.nanos().div_ceil(NANOS_PER_MICRO);
        let percent = u64::from(rule_override.percent.get());
        let word = ((ends_at_micros << PERCENT_BITS | percent) << MODE_BITS) | mode;
        self.0.store(word, Ordering::Relaxed);
    }

    pub(super) fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// The stored override, even one that has ended, and its end.
    pub(super) fn get(&self) -> Option<(Override, MonotonicTime)> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            word => Some(decode(word)),
        }
    }

    /// The override in effect at `now`, and its end.
    pub(super) fn active(&self, now: MonotonicTime) -> Option<(Override, MonotonicTime)> {
        self.get().filter(|(_, ends_at)| *ends_at > now)
    }
}

fn decode(word: u64) -> (Override, MonotonicTime) {
    let mode = match word & ((1 << MODE_BITS) - 1) {
        0 => Mode::Enforce,
        1 => Mode::Shadow,
        _ => Mode::Off,
    };
    let percent = (word >> MODE_BITS & ((1 << PERCENT_BITS) - 1)) as u8;
    let percent = Percent::try_from(percent).unwrap_or(Percent::ALL);
    let ends_at_micros = word >> (MODE_BITS + PERCENT_BITS);
    (Override { mode, percent }, MonotonicTime::from_nanos(ends_at_micros.saturating_mul(NANOS_PER_MICRO)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_override_round_trips_through_its_slot(nanos in 1u64.., percent in 0u8..=100, mode in 0usize..3) {
            let mode = [Mode::Enforce, Mode::Shadow, Mode::Off][mode];
            let rule_override = Override { mode, percent: Percent::try_from(percent).unwrap() };
            let slot = OverrideSlot::default();
            slot.set(rule_override, MonotonicTime::from_nanos(nanos));
            let (decoded, ends_at) = slot.get().unwrap();
            prop_assert_eq!(decoded, rule_override);
            prop_assert!((nanos..=nanos.saturating_add(999)).contains(&ends_at.nanos()));
            prop_assert!(slot.active(MonotonicTime::from_nanos(nanos - 1)).is_some());
            prop_assert!(slot.active(ends_at).is_none());
            slot.clear();
            prop_assert_eq!(slot.get(), None);
        }
    }
}
