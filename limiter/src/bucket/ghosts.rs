//! Owns the [`Ghosts`] of a set: what keys owe that had to leave their cell, in six bytes each.
//!
//! Refuses exactness: a key is known by 16 bits, and time passes in units of 65 microseconds. Invariant: a debt is
//! rounded up, so that a key which comes back is admitted less and never more; of all debts the largest are kept.

/// As many as fill, with their lock, four cache lines.
const GHOSTS: usize = 40;
/// A unit of time is 2^16 nanoseconds.
const UNIT_BITS: u32 = 16;
/// Debts end at most this far from the epoch, in units: 78 hours.
const AGE_MAX: u64 = u32::MAX as u64;
/// From here on the epoch is moved to the present. No debt of more than 39 hours is kept whole.
const AGE_OLD: u64 = AGE_MAX / 2;

/// A few debts, found by a tag. Empty ones are paid.
#[derive(Debug)]
pub(super) struct Ghosts {
    /// In units since the origin.
    epoch: u64,
    /// When the debt is paid, in units since the epoch.
    due: [u32; GHOSTS],
    tags: [u16; GHOSTS],
}

impl Default for Ghosts {
    fn default() -> Ghosts {
        Ghosts { epoch: 0, due: [0; GHOSTS], tags: [0; GHOSTS] }
    }
}

impl Ghosts {
    /// The arrival time, in nanoseconds, that the ghost of this tag stands for, if it still owes something.
    pub(super) fn find(&self, tag: u16, now_nanos: u64) -> Option<u64> {
        let age = self.age(now_nanos);
        let due = u64::from(self.due[self.position(tag)?]);
        (due > age).then(|| self.epoch.saturating_add(due) << UNIT_BITS)
    }

    /// Keeps a debt, in place of the least one if that is less. A key whose tag is there has the larger of both. When
    /// the debt is paid, in nanoseconds.
    pub(super) fn keep(&mut self, tag: u16, tat_nanos: u64, now_nanos: u64) -> u64 {
        self.renew(now_nanos);
        let due = tat_nanos.div_ceil(1 << UNIT_BITS).saturating_sub(self.epoch).min(AGE_MAX) as u32;
        let index = self.position(tag).unwrap_or_else(|| self.least());
        if self.due[index] < due {
            (self.due[index], self.tags[index]) = (due, tag);
        }
        (self.epoch + u64::from(due)) << UNIT_BITS
    }

    /// Forgets a debt, because its key has a cell again.
    pub(super) fn forget(&mut self, tag: u16) {
        if let Some(index) = self.position(tag) {
            self.due[index] = 0;
        }
    }

    /// Takes back some of a debt.
    pub(super) fn forgive(&mut self, tag: u16, nanos: u64) {
        if let Some(index) = self.position(tag) {
            let units = u32::try_from(nanos >> UNIT_BITS).unwrap_or(u32::MAX);
            self.due[index] = self.due[index].saturating_sub(units);
        }
    }

    /// No tag is there twice, but that of empty ghosts.
    fn position(&self, tag: u16) -> Option<usize> {
        self.tags.iter().position(|&held| held == tag)
    }

    fn least(&self) -> usize {
        let (mut index, mut least) = (0, u32::MAX);
        for (candidate, &due) in self.due.iter().enumerate() {
            if due < least {
                (index, least) = (candidate, due);
            }
        }
        index
    }

    fn age(&self, now_nanos: u64) -> u64 {
        (now_nanos >> UNIT_BITS).saturating_sub(self.epoch)
    }

    fn renew(&mut self, now_nanos: u64) {
        let age = self.age(now_nanos);
        if age > AGE_OLD {
            let passed = u32::try_from(age).unwrap_or(u32::MAX);
            self.due.iter_mut().for_each(|due| *due = due.saturating_sub(passed));
            self.epoch += age;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const UNIT: u64 = 1 << UNIT_BITS;
    const HOUR: u64 = 3_600_000_000_000;

    #[test]
    fn keeps_the_largest_debts_rounded_up() {
        let mut ghosts = Ghosts::default();
        for tag in 1..=100 {
            ghosts.keep(tag, u64::from(tag) * UNIT * 10 - 3, 0);
        }
        for tag in 1..=60 {
            assert_eq!(ghosts.find(tag, 0), None, "{tag}");
        }
        for tag in 61..=100 {
            assert_eq!(ghosts.find(tag, 0), Some(u64::from(tag) * UNIT * 10));
        }
        assert_eq!(ghosts.find(100, 1_000 * UNIT), None, "paid");
    }

    #[test]
    fn one_tag_has_one_ghost_that_is_forgiven_and_forgotten() {
        let mut ghosts = Ghosts::default();
        ghosts.keep(7, 50 * UNIT, 0);
        ghosts.keep(7, 90 * UNIT, 0);
        ghosts.keep(7, 60 * UNIT, 0);
        assert_eq!(ghosts.find(7, 0), Some(90 * UNIT));
        ghosts.forgive(7, 40 * UNIT + 1);
        assert_eq!(ghosts.find(7, 0), Some(50 * UNIT));
        ghosts.forget(7);
        assert_eq!(ghosts.find(7, 0), None);
    }

    #[test]
    fn no_debt_comes_back_however_long_nobody_looks() {
        let mut ghosts = Ghosts::default();
        ghosts.keep(7, HOUR - UNIT, 0);
        for hours in 1..2_000 {
            assert_eq!(ghosts.find(7, hours * HOUR), None, "{hours}");
        }
        // Debts are whole over the move of the epoch, and cut only where they are longer than its half.
        ghosts.keep(1, 41 * HOUR, 38 * HOUR);
        ghosts.keep(2, 43 * HOUR, 40 * HOUR);
        for (tag, hours) in [(1, 41), (2, 43)] {
            let tat = ghosts.find(tag, 40 * HOUR).unwrap();
            assert!(tat.abs_diff(hours * HOUR) <= UNIT, "{tag}: {tat}");
        }
        ghosts.keep(3, 20_000 * HOUR, 10_000 * HOUR);
        let tat = ghosts.find(3, 10_000 * HOUR).unwrap();
        assert!(tat > 10_039 * HOUR && tat < 10_079 * HOUR, "{}", tat / HOUR);
    }
}
