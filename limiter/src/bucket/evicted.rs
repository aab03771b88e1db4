//! The [`EvictedSketch`] of a set: the backlogs of keys that lost their cell, in seven bytes each.
//!
//! It is not exact: a key is identified by a 16-bit tag, and time has a resolution of 65
//! microseconds. Invariants: a backlog is rounded up, so that a key that returns is admitted less
//! and never more; the newest key stays, and of all others those with the highest demand.

use super::gcra::BacklogScale;
use crate::clock::MonotonicTime;

/// Together with their lock and the two cache lines of a set, 440 bytes per seven keys.
const ENTRIES: usize = 42;
/// A unit of time is 2^16 nanoseconds.
const UNIT_BITS: u32 = 16;
/// Backlogs end at most this many units after the epoch: 78 hours.
const END_MAX: u64 = u32::MAX as u64;
/// At this age the epoch is moved to the present. A backlog of more than 39 hours is truncated.
const EPOCH_AGE_MAX: u64 = END_MAX / 2;

/// The GCRA backlog of one key, which decides what an eviction keeps: of an evicted key, from the
/// sketch, or of a key with a cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KeyBacklog {
    /// The theoretical arrival time, in nanoseconds since the clock's origin.
    pub(super) tat_nanos: u64,
    /// Number of denials while the key was evicted, up to [`KeyBacklog::DENIALS_MAX`].
    pub(super) denials: u8,
}

/// The present time and the time that one token takes to refill: the units in which backlogs of one
/// rule are compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimeBase {
    pub(super) now_nanos: u64,
    pub(super) token_nanos: u64,
}

impl KeyBacklog {
    /// Four bits per cell. A key that exceeds its quota reaches this and needs no more to stay.
    pub(super) const DENIALS_MAX: u8 = 15;

    /// The key's demand: what its arrival time would be if its denials had been charged.
    pub(super) fn demand_nanos(self, time: TimeBase) -> u64 {
        self.tat_nanos.saturating_add(time.token_nanos.saturating_mul(u64::from(self.denials)))
    }

    /// Reduces the denials if the backlog ended long ago: they decay at the refill rate after it.
    fn decayed(self, time: TimeBase) -> KeyBacklog {
        let tokens = time.now_nanos.saturating_sub(self.tat_nanos).div_ceil(time.token_nanos);
        KeyBacklog { denials: self.denials.saturating_sub(u8::try_from(tokens).unwrap_or(u8::MAX)), ..self }
    }
}

/// Fixed-size table of `ENTRIES` evicted keys: the end of the backlog, a 16-bit tag and the denials
/// of each. An empty entry has no backlog and no denials.
#[derive(Debug)]
pub(super) struct EvictedSketch {
    /// In units since the clock's origin.
    epoch: u64,
    /// End of each backlog, in units since the epoch.
    ends: [u32; ENTRIES],
    tags: [u16; ENTRIES],
    denials: [u8; ENTRIES],
}

impl Default for EvictedSketch {
    fn default() -> EvictedSketch {
        EvictedSketch { epoch: 0, ends: [0; ENTRIES], tags: [0; ENTRIES], denials: [0; ENTRIES] }
    }
}

impl EvictedSketch {
    /// The entry with this tag, if it has a backlog or recent denials.
    pub(super) fn find(&self, tag: u16, time: TimeBase) -> Option<KeyBacklog> {
        let index = self.index_of(tag)?;
        let tat_nanos = self.epoch.saturating_add(u64::from(self.ends[index])) << UNIT_BITS;
        let backlog = KeyBacklog { tat_nanos, denials: self.denials[index] }.decayed(time);
        (u64::from(self.ends[index]) > self.epoch_age(time.now_nanos) || backlog.denials > 0).then_some(backlog)
    }

    /// Counts a denial of the key with this tag.
    pub(super) fn record_denial(&mut self, tag: u16) {
        if let Some(index) = self.index_of(tag) {
            self.denials[index] = (self.denials[index] + 1).min(KeyBacklog::DENIALS_MAX);
        }
    }

    /// Inserts a backlog in place of the one with the lowest demand, if that is lower. A tag that
    /// is present keeps the larger of both.
    pub(super) fn insert(&mut self, tag: u16, backlog: KeyBacklog, time: TimeBase) {
        self.rebase(time.now_nanos);
        let index = self.index_of(tag).unwrap_or_else(|| self.lowest_demand(time));
        let token = token_units(time);
        let inserted = demand_units(self.end_of(backlog), backlog.denials, token);
        if demand_units(self.ends[index], self.denials[index], token) < inserted {
            self.write(index, tag, backlog);
        }
    }

    /// Inserts a backlog in place of the one with the lowest demand, whatever that is, so that a
    /// new key is still known when it returns before the next one comes.
    pub(super) fn insert_newest(&mut self, tag: u16, backlog: KeyBacklog, time: TimeBase) {
        self.rebase(time.now_nanos);
        let index = self.index_of(tag).unwrap_or_else(|| self.lowest_demand(time));
        self.write(index, tag, backlog);
    }

    /// Clears an entry, because its key has a cell again.
    pub(super) fn remove(&mut self, tag: u16) {
        if let Some(index) = self.index_of(tag) {
            (self.ends[index], self.denials[index]) = (0, 0);
        }
    }

    /// Reduces a backlog by a refund, rounded down.
    pub(super) fn refund(&mut self, tag: u16, nanos: u64) {
        if let Some(index) = self.index_of(tag) {
            let units = u32::try_from(nanos >> UNIT_BITS).unwrap_or(u32::MAX);
            self.ends[index] = self.ends[index].saturating_sub(units);
        }
    }

    /// Converts all backlogs for another quota. Returns the latest end, in nanoseconds since the
    /// clock's origin.
    pub(super) fn rescale(&mut self, scale: BacklogScale, now: MonotonicTime) -> u64 {
        self.rebase(now.nanos());
        let age = self.epoch_age(now.nanos());
        for end in &mut self.ends {
            if let Some(units) = u64::from(*end).checked_sub(age).filter(|units| *units > 0) {
                let scaled = scale.backlog(units << UNIT_BITS).div_ceil(1 << UNIT_BITS);
                *end = age.saturating_add(scaled).min(END_MAX) as u32;
            }
        }
        let latest = self.ends.iter().max().copied().unwrap_or_default();
        self.epoch.saturating_add(u64::from(latest)) << UNIT_BITS
    }

    fn write(&mut self, index: usize, tag: u16, backlog: KeyBacklog) {
        (self.ends[index], self.tags[index], self.denials[index]) = (self.end_of(backlog), tag, backlog.denials);
    }

    fn end_of(&self, backlog: KeyBacklog) -> u32 {
        backlog.tat_nanos.div_ceil(1 << UNIT_BITS).saturating_sub(self.epoch).min(END_MAX) as u32
    }

    /// No tag is present twice, except that of empty entries.
    fn index_of(&self, tag: u16) -> Option<usize> {
        self.tags.iter().position(|&present| present == tag)
    }

    fn lowest_demand(&self, time: TimeBase) -> usize {
        let token = token_units(time);
        let (mut index, mut lowest) = (0, u32::MAX);
        for (candidate, (&end, &denials)) in self.ends.iter().zip(&self.denials).enumerate() {
            let demand = demand_units(end, denials, token);
            if demand < lowest {
                (index, lowest) = (candidate, demand);
            }
        }
        index
    }

    fn epoch_age(&self, now_nanos: u64) -> u64 {
        (now_nanos >> UNIT_BITS).saturating_sub(self.epoch)
    }

    fn rebase(&mut self, now_nanos: u64) {
        let age = self.epoch_age(now_nanos);
        if age > EPOCH_AGE_MAX {
            let passed = u32::try_from(age).unwrap_or(u32::MAX);
            self.ends.iter_mut().for_each(|end| *end = end.saturating_sub(passed));
            self.epoch += age;
        }
    }
}

/// [`KeyBacklog::demand_nanos`] in units since the epoch.
fn demand_units(end: u32, denials: u8, token_units: u32) -> u32 {
    end.saturating_add(token_units * u32::from(denials))
}

/// Rounded up, as backlogs are; limited so that the most denials do not overflow.
fn token_units(time: TimeBase) -> u32 {
    time.token_nanos.div_ceil(1 << UNIT_BITS).min(END_MAX / u64::from(KeyBacklog::DENIALS_MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 1 << UNIT_BITS;
    const HOUR: u64 = 3_600_000_000_000;

    fn at(now_nanos: u64) -> TimeBase {
        TimeBase { now_nanos, token_nanos: 100 * UNIT }
    }

    fn backlog(tat_nanos: u64) -> KeyBacklog {
        KeyBacklog { tat_nanos, denials: 0 }
    }

    fn tat(sketch: &EvictedSketch, tag: u16, now_nanos: u64) -> Option<u64> {
        sketch.find(tag, at(now_nanos)).map(|backlog| backlog.tat_nanos)
    }

    #[test]
    fn keeps_the_largest_backlogs_rounded_up() {
        let mut sketch = EvictedSketch::default();
        for tag in 1..=100 {
            sketch.insert(tag, backlog(u64::from(tag) * UNIT * 10 - 3), at(0));
        }
        for tag in 1..=58 {
            assert_eq!(tat(&sketch, tag, 0), None, "{tag}");
        }
        for tag in 59..=100 {
            assert_eq!(tat(&sketch, tag, 0), Some(u64::from(tag) * UNIT * 10));
        }
        assert_eq!(tat(&sketch, 100, 1_000 * UNIT), None, "the backlog has ended");
    }

    #[test]
    fn one_tag_has_one_entry_that_can_be_refunded_and_removed() {
        let mut sketch = EvictedSketch::default();
        sketch.insert(7, backlog(50 * UNIT), at(0));
        sketch.insert(7, backlog(90 * UNIT), at(0));
        sketch.insert(7, backlog(60 * UNIT), at(0));
        assert_eq!(tat(&sketch, 7, 0), Some(90 * UNIT));
        sketch.refund(7, 40 * UNIT + 1);
        assert_eq!(tat(&sketch, 7, 0), Some(50 * UNIT));
        sketch.remove(7);
        assert_eq!(tat(&sketch, 7, 0), None);
    }

    #[test]
    fn denials_outrank_larger_backlogs_and_decay_over_time() {
        let mut sketch = EvictedSketch::default();
        sketch.insert(1, backlog(50 * UNIT), at(0));
        for _ in 0..3 {
            sketch.record_denial(1);
        }
        (1_000..1_100).for_each(|tag| sketch.insert(tag, backlog(349 * UNIT), at(0)));
        assert_eq!(sketch.find(1, at(0)), Some(KeyBacklog { tat_nanos: 50 * UNIT, denials: 3 }));
        for (now, denials) in [(50, Some(3)), (51, Some(2)), (150, Some(2)), (151, Some(1)), (251, None)] {
            assert_eq!(sketch.find(1, at(now * UNIT)).map(|backlog| backlog.denials), denials, "{now}");
        }
        (2_000..2_100).for_each(|tag| sketch.insert(tag, backlog(351 * UNIT), at(0)));
        assert_eq!(sketch.find(1, at(0)), None);
    }

    #[test]
    fn the_newest_key_has_one_entry_and_evicts_no_other() {
        let mut sketch = EvictedSketch::default();
        (1..=100).for_each(|tag| sketch.insert(tag, backlog(u64::from(tag) * 1_000 * UNIT), at(0)));
        for tag in 1_000..1_100 {
            sketch.insert_newest(tag, backlog(UNIT), at(0));
            assert_eq!(tat(&sketch, tag, 0), Some(UNIT));
        }
        assert!((60..=100).all(|tag| tat(&sketch, tag, 0).is_some()));
    }

    #[test]
    fn an_ended_backlog_never_reappears_without_access() {
        let mut sketch = EvictedSketch::default();
        sketch.insert(7, backlog(HOUR - UNIT), at(0));
        for hours in 1..2_000 {
            assert_eq!(tat(&sketch, 7, hours * HOUR), None, "{hours}");
        }
        // Backlogs survive a move of the epoch, and are truncated only above half its range.
        sketch.insert(1, backlog(41 * HOUR), at(38 * HOUR));
        sketch.insert(2, backlog(43 * HOUR), at(40 * HOUR));
        for (tag, hours) in [(1, 41), (2, 43)] {
            let end = tat(&sketch, tag, 40 * HOUR).unwrap();
            assert!(end.abs_diff(hours * HOUR) <= UNIT, "{tag}: {end}");
        }
        sketch.insert(3, backlog(20_000 * HOUR), at(10_000 * HOUR));
        let end = tat(&sketch, 3, 10_000 * HOUR).unwrap();
        assert!(end > 10_039 * HOUR && end < 10_079 * HOUR, "{}", end / HOUR);
    }
}
