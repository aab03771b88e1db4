//! Owns the [`Ghosts`] of a set: what keys owe that had to leave their cell, in seven bytes each.
//!
//! Refuses exactness: a key is known by 16 bits, and time passes in units of 65 microseconds. Invariant: a debt is
//! rounded up, so that a key which comes back is admitted less and never more; the newest stays, and of all others
//! those that asked for most.

/// With their lock and a set's two cache lines, 440 bytes for seven keys.
const GHOSTS: usize = 42;
/// A unit of time is 2^16 nanoseconds.
const UNIT_BITS: u32 = 16;
/// Debts end at most this far from the epoch, in units: 78 hours.
const AGE_MAX: u64 = u32::MAX as u64;
/// At this age the epoch is moved to the present. No debt of more than 39 hours is kept whole.
const AGE_OLD: u64 = AGE_MAX / 2;

/// What is known of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Debt {
    /// The theoretical arrival time, in nanoseconds since the origin.
    pub(super) tat_nanos: u64,
    /// How often it was denied while it was a ghost, up to [`Debt::DENIALS_MAX`].
    pub(super) denials: u8,
}

/// What debts are compared by: the present, and how long a token takes to come back to who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) now_nanos: u64,
    pub(super) token_nanos: u64,
}

impl Debt {
    /// Four bits for each cell. Whoever asks faster than its quota reaches them and needs no more to stay.
    pub(super) const DENIALS_MAX: u8 = 15;

    /// When all would be paid that was asked for, granted or not.
    pub(super) fn asked_nanos(self, pace: Pace) -> u64 {
        self.tat_nanos.saturating_add(pace.token_nanos.saturating_mul(u64::from(self.denials)))
    }

    /// With fewer denials if the debt was paid long ago: time pays for them after it.
    fn aged(self, pace: Pace) -> Debt {
        let tokens = pace.now_nanos.saturating_sub(self.tat_nanos).div_ceil(pace.token_nanos);
        Debt { denials: self.denials.saturating_sub(u8::try_from(tokens).unwrap_or(u8::MAX)), ..self }
    }
}

/// A few debts, found by a tag. Empty ones are paid, and were not denied.
#[derive(Debug)]
pub(super) struct Ghosts {
    /// In units since the origin.
    epoch: u64,
    /// When the debt is paid, in units since the epoch.
    due: [u32; GHOSTS],
    tags: [u16; GHOSTS],
    denials: [u8; GHOSTS],
}

impl Default for Ghosts {
    fn default() -> Ghosts {
        Ghosts { epoch: 0, due: [0; GHOSTS], tags: [0; GHOSTS], denials: [0; GHOSTS] }
    }
}

impl Ghosts {
    /// What the ghost of this tag stands for, if there is one that owes something or was denied lately.
    pub(super) fn find(&self, tag: u16, pace: Pace) -> Option<Debt> {
        let index = self.position(tag)?;
        let tat_nanos = self.epoch.saturating_add(u64::from(self.due[index])) << UNIT_BITS;
        let debt = Debt { tat_nanos, denials: self.denials[index] }.aged(pace);
        (u64::from(self.due[index]) > self.age(pace.now_nanos) || debt.denials > 0).then_some(debt)
    }

    /// Counts that the key of this tag was denied.
    pub(super) fn deny(&mut self, tag: u16) {
        if let Some(index) = self.position(tag) {
            self.denials[index] = (self.denials[index] + 1).min(Debt::DENIALS_MAX);
        }
    }

    /// Keeps a debt, in place of the one that asked for least if that is less. A key whose tag is there has the larger
    /// of both.
    pub(super) fn keep(&mut self, tag: u16, debt: Debt, pace: Pace) {
        self.renew(pace.now_nanos);
        let index = self.position(tag).unwrap_or_else(|| self.least(pace));
        let token = token_units(pace);
        if asked(self.due[index], self.denials[index], token) < asked(self.due_of(debt), debt.denials, token) {
            self.put(index, tag, debt);
        }
    }

    /// Keeps a debt, in place of the one that asked for least whatever that is, so that a newcomer can come back once
    /// before the next one does.
    pub(super) fn keep_newest(&mut self, tag: u16, debt: Debt, pace: Pace) {
        self.renew(pace.now_nanos);
        let index = self.position(tag).unwrap_or_else(|| self.least(pace));
        self.put(index, tag, debt);
    }

    /// Forgets a debt, because its key has a cell again.
    pub(super) fn forget(&mut self, tag: u16) {
        if let Some(index) = self.position(tag) {
            (self.due[index], self.denials[index]) = (0, 0);
        }
    }

    /// Takes back some of a debt, rounded down.
    pub(super) fn forgive(&mut self, tag: u16, nanos: u64) {
        if let Some(index) = self.position(tag) {
            let units = u32::try_from(nanos >> UNIT_BITS).unwrap_or(u32::MAX);
            self.due[index] = self.due[index].saturating_sub(units);
        }
    }

    fn put(&mut self, index: usize, tag: u16, debt: Debt) {
        (self.due[index], self.tags[index], self.denials[index]) = (self.due_of(debt), tag, debt.denials);
    }

    fn due_of(&self, debt: Debt) -> u32 {
        debt.tat_nanos.div_ceil(1 << UNIT_BITS).saturating_sub(self.epoch).min(AGE_MAX) as u32
    }

    /// No tag is there twice, but that of empty ghosts.
    fn position(&self, tag: u16) -> Option<usize> {
        self.tags.iter().position(|&held| held == tag)
    }

    fn least(&self, pace: Pace) -> usize {
        let token = token_units(pace);
        let (mut index, mut least) = (0, u32::MAX);
        for (candidate, (&due, &denials)) in self.due.iter().zip(&self.denials).enumerate() {
            let asked = asked(due, denials, token);
            if asked < least {
                (index, least) = (candidate, asked);
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

/// [`Debt::asked_nanos`] in units since the epoch.
fn asked(due: u32, denials: u8, token_units: u32) -> u32 {
    due.saturating_add(token_units * u32::from(denials))
}

/// Rounded up, as debts are; so long at most that all denials together do not overflow.
fn token_units(pace: Pace) -> u32 {
    pace.token_nanos.div_ceil(1 << UNIT_BITS).min(AGE_MAX / u64::from(Debt::DENIALS_MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 1 << UNIT_BITS;
    const HOUR: u64 = 3_600_000_000_000;

    fn at(now_nanos: u64) -> Pace {
        Pace { now_nanos, token_nanos: 100 * UNIT }
    }

    fn owing(tat_nanos: u64) -> Debt {
        Debt { tat_nanos, denials: 0 }
    }

    fn tat(ghosts: &Ghosts, tag: u16, now_nanos: u64) -> Option<u64> {
        ghosts.find(tag, at(now_nanos)).map(|debt| debt.tat_nanos)
    }

    #[test]
    fn keeps_the_largest_debts_rounded_up() {
        let mut ghosts = Ghosts::default();
        for tag in 1..=100 {
            ghosts.keep(tag, owing(u64::from(tag) * UNIT * 10 - 3), at(0));
        }
        for tag in 1..=58 {
            assert_eq!(tat(&ghosts, tag, 0), None, "{tag}");
        }
        for tag in 59..=100 {
            assert_eq!(tat(&ghosts, tag, 0), Some(u64::from(tag) * UNIT * 10));
        }
        assert_eq!(tat(&ghosts, 100, 1_000 * UNIT), None, "paid");
    }

    #[test]
    fn one_tag_has_one_ghost_that_is_forgiven_and_forgotten() {
        let mut ghosts = Ghosts::default();
        ghosts.keep(7, owing(50 * UNIT), at(0));
        ghosts.keep(7, owing(90 * UNIT), at(0));
        ghosts.keep(7, owing(60 * UNIT), at(0));
        assert_eq!(tat(&ghosts, 7, 0), Some(90 * UNIT));
        ghosts.forgive(7, 40 * UNIT + 1);
        assert_eq!(tat(&ghosts, 7, 0), Some(50 * UNIT));
        ghosts.forget(7);
        assert_eq!(tat(&ghosts, 7, 0), None);
    }

    #[test]
    fn whoever_is_denied_outlasts_larger_debts_and_time_pays_for_that() {
        let mut ghosts = Ghosts::default();
        ghosts.keep(1, owing(50 * UNIT), at(0));
        for _ in 0..3 {
            ghosts.deny(1);
        }
        (1_000..1_100).for_each(|tag| ghosts.keep(tag, owing(349 * UNIT), at(0)));
        assert_eq!(ghosts.find(1, at(0)), Some(Debt { tat_nanos: 50 * UNIT, denials: 3 }));
        for (now, denials) in [(50, Some(3)), (51, Some(2)), (150, Some(2)), (151, Some(1)), (251, None)] {
            assert_eq!(ghosts.find(1, at(now * UNIT)).map(|debt| debt.denials), denials, "{now}");
        }
        (2_000..2_100).for_each(|tag| ghosts.keep(tag, owing(351 * UNIT), at(0)));
        assert_eq!(ghosts.find(1, at(0)), None);
    }

    #[test]
    fn the_newest_has_a_place_and_takes_one_only() {
        let mut ghosts = Ghosts::default();
        (1..=100).for_each(|tag| ghosts.keep(tag, owing(u64::from(tag) * 1_000 * UNIT), at(0)));
        for tag in 1_000..1_100 {
            ghosts.keep_newest(tag, owing(UNIT), at(0));
            assert_eq!(tat(&ghosts, tag, 0), Some(UNIT));
        }
        assert!((60..=100).all(|tag| tat(&ghosts, tag, 0).is_some()));
    }

    #[test]
    fn no_debt_comes_back_however_long_nobody_looks() {
        let mut ghosts = Ghosts::default();
        ghosts.keep(7, owing(HOUR - UNIT), at(0));
        for hours in 1..2_000 {
            assert_eq!(tat(&ghosts, 7, hours * HOUR), None, "{hours}");
        }
        // Debts are whole over the move of the epoch, and cut only where they are longer than its half.
        ghosts.keep(1, owing(41 * HOUR), at(38 * HOUR));
        ghosts.keep(2, owing(43 * HOUR), at(40 * HOUR));
        for (tag, hours) in [(1, 41), (2, 43)] {
            let paid = tat(&ghosts, tag, 40 * HOUR).unwrap();
            assert!(paid.abs_diff(hours * HOUR) <= UNIT, "{tag}: {paid}");
        }
        ghosts.keep(3, owing(20_000 * HOUR), at(10_000 * HOUR));
        let paid = tat(&ghosts, 3, 10_000 * HOUR).unwrap();
        assert!(paid > 10_039 * HOUR && paid < 10_079 * HOUR, "{}", paid / HOUR);
    }
}
