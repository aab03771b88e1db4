//! The log of recent denials: a fixed number of slots, read by explanations of a caller's limits.
//!
//! It neither grows nor locks, and it is not exact: a later denial of another subject may take the
//! slot. Invariant: the words read from a slot belong together. A slot is four words written
//! without a lock. The first word is the subject's key mixed with the other three, so a slot that
//! two threads wrote at once matches no subject. A subject's denials are counted from the first one
//! after which no other subject took its slot; a word with a tag of the subject and the count
//! changes as one.

use std::time::Duration;

use super::subject::Subject;
use crate::clock::{self, MonotonicTime};
use crate::sync::{AtomicU64, Ordering};

/// In 192 KB. Explanations are requested within minutes of a denial.
const SLOTS: usize = 4_096;
/// Distinguishes a user from a device with the same hash.
const USER_TAG: u64 = 0x7573_6572_7573_6572;

/// Time and wait of a denial as the client received it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastDenial {
    pub at: MonotonicTime,
    /// The wait that the response gave.
    pub retry_after: Duration,
}

/// The denials of one device or user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeniedSubject {
    /// The high bits of the key of device or user.
    pub(super) key: u64,
    /// The salt of the rule that denied it last.
    pub(super) salt: u64,
    pub(super) last: LastDenial,
    /// Its denials by all rules since `since`.
    pub(super) count: u32,
    pub(super) since: MonotonicTime,
}

/// Fixed table of `SLOTS` recent denials, indexed by the hash of device or user, without a lock.
#[derive(Debug)]
pub(super) struct DenialLog(Box<[DenialSlot; SLOTS]>);

/// One denial in four words: the rule's salt, time and wait in nanoseconds, and a checksum that
/// also contains the subject's key.
#[derive(Debug, Default)]
struct DenialSlot {
    checksum: AtomicU64,
    salt: AtomicU64,
    at: AtomicU64,
    wait: AtomicU64,
    /// A tag of the subject in the high half, its denials in the low one.
    counted: AtomicU64,
    /// The time of the first denial that is counted.
    since: AtomicU64,
}

/// The denials in `counted`.
const COUNT_MASK: u64 = u32::MAX as u64;

impl Default for DenialLog {
    fn default() -> DenialLog {
        let slots: Vec<DenialSlot> = std::iter::repeat_with(DenialSlot::default).take(SLOTS).collect();
        DenialLog(slots.try_into().expect("as many as were taken"))
    }
}

impl DenialLog {
    /// Records a denial by the rule with this salt, for the device and for the user if there is
    /// one.
    pub(super) fn record(&self, subject: &Subject<'_>, salt: u64, denial: LastDenial) {
        let words = [salt, denial.at.nanos(), clock::nanos(denial.retry_after)];
        self.write(device_key(subject), words);
        if let Some(user) = user_key(subject) {
            self.write(user, words);
        }
    }

    fn write(&self, key: u64, words: [u64; 3]) {
        let slot = self.slot(key);
        let [salt, at, wait] = words;
        slot.checksum.store(checksum_of(key, words), Ordering::Relaxed);
        slot.salt.store(salt, Ordering::Relaxed);
        slot.at.store(at, Ordering::Relaxed);
        slot.wait.store(wait, Ordering::Relaxed);
        let (tag, counted) = (tag_of(key), slot.counted.load(Ordering::Relaxed));
        if counted & !COUNT_MASK != tag {
            slot.since.store(at, Ordering::Relaxed);
            slot.counted.store(tag | 1, Ordering::Relaxed);
        } else if counted & COUNT_MASK < COUNT_MASK >> 1 {
            // Threads that count at once do not carry into the tag: they are fewer than the rest.
            slot.counted.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The later of the last denials of this device and this user, if it was by the rule with this
    /// salt.
    pub(super) fn last(&self, subject: &Subject<'_>, salt: u64) -> Option<LastDenial> {
        let read = |key| {
            let slot = self.slot(key);
            let [by, at, wait] = [&slot.salt, &slot.at, &slot.wait].map(|word| word.load(Ordering::Relaxed));
            let is_whole = slot.checksum.load(Ordering::Relaxed) == checksum_of(key, [by, at, wait]);
            (by != 0 && is_whole).then_some((at, by, wait))
        };
        let keys = [Some(device_key(subject)), user_key(subject)];
        let (at, by, wait) = keys.into_iter().flatten().filter_map(read).max()?;
        let denial = LastDenial { at: MonotonicTime::from_nanos(at), retry_after: Duration::from_nanos(wait) };
        (by == salt).then_some(denial)
    }

    /// The subjects in the log whose last denial is wanted: by the salt of its rule, and its time.
    /// The latest come first. A denial of a user is in the log twice.
    pub(super) fn subjects(&self, is_wanted: impl Fn(u64, MonotonicTime) -> bool) -> Vec<DeniedSubject> {
        let read = |slot: &DenialSlot| {
            let words @ [salt, at, wait] = [&slot.salt, &slot.at, &slot.wait].map(|word| word.load(Ordering::Relaxed));
            // The checksum of a slot that two threads wrote at once gives a key that belongs to
            // another slot.
            let key = checksum_of(slot.checksum.load(Ordering::Relaxed), words);
            let is_whole = std::ptr::eq(self.slot(key), slot);
            let denial = LastDenial { at: MonotonicTime::from_nanos(at), retry_after: Duration::from_nanos(wait) };
            let counted = slot.counted.load(Ordering::Relaxed);
            let (count, since) = match counted & !COUNT_MASK == tag_of(key) {
                true => (counted & COUNT_MASK, MonotonicTime::from_nanos(slot.since.load(Ordering::Relaxed))),
                // Another thread is about to count the denial.
                false => (1, denial.at),
            };
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let subject = DeniedSubject { key, salt, last: denial, count, since };
            (salt != 0 && is_whole && is_wanted(salt, denial.at)).then_some(subject)
        };
        let mut denied: Vec<_> = self.0.iter().filter_map(read).collect();
        denied.sort_by_key(|subject| std::cmp::Reverse(subject.last.at));
        denied
    }

    fn slot(&self, key: u64) -> &DenialSlot {
        &self.0[(spread(key) >> (u64::BITS - SLOTS.ilog2())) as usize]
    }
}

/// The caller chose the hash, so its bits are mixed once more.
fn spread(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Distinguishes the subjects of one slot, by other bits than those that select it.
fn tag_of(key: u64) -> u64 {
    spread(key) << 32
}

fn device_key(subject: &Subject<'_>) -> u64 {
    subject.device.high_bits()
}

fn user_key(subject: &Subject<'_>) -> Option<u64> {
    subject.user.map(|user| user.high_bits() ^ USER_TAG)
}

fn checksum_of(key: u64, [salt, at, wait]: [u64; 3]) -> u64 {
    key ^ salt ^ at.rotate_left(21) ^ wait.rotate_left(42)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::KeyHash;
    use crate::rules::UserClass;

    fn subject(device: u128, user: Option<u128>) -> Subject<'static> {
        let hash = |high: u128| KeyHash(high << 64);
        Subject { device: hash(device), user: user.map(hash), class: UserClass(0), keys: &[] }
    }

    fn denial(nanos: u64, retry_after: Duration) -> LastDenial {
        LastDenial { at: MonotonicTime::from_nanos(nanos), retry_after }
    }

    #[test]
    fn records_the_last_denial_of_device_and_user() {
        let denial_log = DenialLog::default();
        assert_eq!(denial_log.last(&subject(0, None), 0), None, "an empty slot matches no subject");
        let first = denial(5, Duration::from_secs(1));
        denial_log.record(&subject(1, Some(2)), 7, first);
        assert_eq!(denial_log.last(&subject(1, None), 7), Some(first));
        assert_eq!(denial_log.last(&subject(9, Some(2)), 7), Some(first), "the user, from another device");
        assert_eq!(denial_log.last(&subject(1, None), 8), None, "another rule");
        assert_eq!(denial_log.last(&subject(2, None), 7), None, "a device whose hash equals the user's");
        denial_log.record(&subject(1, None), 8, denial(6, Duration::MAX));
        assert_eq!(denial_log.last(&subject(1, None), 7), None, "a later denial replaced it");
        assert!(denial_log.last(&subject(1, None), 8).is_some());
        let second = denial(6, Duration::from_nanos(u64::MAX));
        let denied = |salts: &[u64], from| {
            denial_log.subjects(|salt, at| salts.contains(&salt) && at >= MonotonicTime::from_nanos(from))
        };
        let device = DeniedSubject { key: 1, salt: 8, last: second, count: 2, since: first.at };
        let user = DeniedSubject { key: 2 ^ USER_TAG, salt: 7, last: first, count: 1, since: first.at };
        assert_eq!(denied(&[7, 8], 0), [device, user]);
        assert_eq!(denied(&[7, 8], 6), [device]);
        assert_eq!(denied(&[7], 0), [user], "a rule that does not exist any more");
    }

    #[test]
    fn denials_are_counted_until_another_subject_takes_the_slot() {
        let denial_log = DenialLog::default();
        let slot_of = |key: u64| std::ptr::from_ref(denial_log.slot(key));
        let other = (2..).find(|key| slot_of(*key) == slot_of(1)).expect("as many keys as it takes");
        let deny = |key: u64, times: u64| {
            (0..times).for_each(|at| denial_log.record(&subject(key.into(), None), 7, denial(at + 5, Duration::ZERO)));
        };
        let counts = || {
            let denied = denial_log.subjects(|_, _| true);
            denied.iter().map(|subject| (subject.key, subject.count)).collect::<Vec<_>>()
        };
        deny(1, 1_000);
        assert_eq!(counts(), [(1, 1_000)]);
        deny(other, 3);
        assert_eq!(counts(), [(other, 3)]);
        deny(1, 1);
        assert_eq!(counts(), [(1, 1)]);
    }

    #[test]
    fn threads_count_every_denial_of_one_subject() {
        let denial_log = DenialLog::default();
        denial_log.record(&subject(1, None), 7, denial(5, Duration::ZERO));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..10_000).for_each(|_| denial_log.record(&subject(1, None), 7, denial(5, Duration::ZERO)));
                });
            }
        });
        let denied = denial_log.subjects(|_, _| true);
        assert_eq!(denied.iter().map(|subject| subject.count).collect::<Vec<_>>(), [40_001]);
    }
}
