//! Owns the record of who was denied last: a fixed number of slots, so that an explanation can tell a caller's story.
//!
//! Refuses to grow, to lock and to be exact: a later denial of another subject may take the slot. Invariant: what is
//! read belongs together. A slot is four words written without a lock; the first is the subject's key mixed with the
//! other three, so that a slot which two threads wrote at once matches nobody.

use std::time::Duration;

use super::Subject;
use crate::clock::{self, Moment};
use crate::sync::{AtomicU64, Ordering};

/// In 128 KB. What matters is the denial of a caller who asks why, minutes later at most.
const SLOTS: usize = 4_096;
/// A user's hash may be some device's too.
const USERS: u64 = 0x7573_6572_7573_6572;

/// A denial as it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastDenial {
    pub at: Moment,
    /// The wait it was told then.
    pub retry_after: Duration,
}

#[derive(Debug)]
pub(super) struct Denials(Box<[Slot; SLOTS]>);

#[derive(Debug, Default)]
struct Slot {
    mixed: AtomicU64,
    salt: AtomicU64,
    at: AtomicU64,
    wait: AtomicU64,
}

impl Default for Denials {
    fn default() -> Denials {
        let slots: Vec<Slot> = std::iter::repeat_with(Slot::default).take(SLOTS).collect();
        Denials(slots.try_into().expect("as many as were taken"))
    }
}

impl Denials {
    /// Remembers a denial by the rule of this salt, for the device and for the user if there is one.
    pub(super) fn note(&self, subject: &Subject<'_>, salt: u64, wait: Duration, now: Moment) {
        let words = [salt, now.nanos(), clock::nanos(wait)];
        self.write(device(subject), words);
        if let Some(user) = user(subject) {
            self.write(user, words);
        }
    }

    fn write(&self, key: u64, words: [u64; 3]) {
        let slot = self.slot(key);
        let [salt, at, wait] = words;
        slot.mixed.store(mix(key, words), Ordering::Relaxed);
        slot.salt.store(salt, Ordering::Relaxed);
        slot.at.store(at, Ordering::Relaxed);
        slot.wait.store(wait, Ordering::Relaxed);
    }

    /// The last denial of this device, or of this user if that is later, if it was by the rule of this salt.
    pub(super) fn last(&self, subject: &Subject<'_>, salt: u64) -> Option<LastDenial> {
        let read = |key| {
            let slot = self.slot(key);
            let [by, at, wait] = [&slot.salt, &slot.at, &slot.wait].map(|word| word.load(Ordering::Relaxed));
            (by != 0 && slot.mixed.load(Ordering::Relaxed) == mix(key, [by, at, wait])).then_some((at, by, wait))
        };
        let (at, by, wait) = [Some(device(subject)), user(subject)].into_iter().flatten().filter_map(read).max()?;
        let denial = LastDenial { at: Moment::from_nanos(at), retry_after: Duration::from_nanos(wait) };
        (by == salt).then_some(denial)
    }

    fn slot(&self, key: u64) -> &Slot {
        // The hash is the caller's, so its bits are spread once more.
        let spread = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.0[(spread >> (u64::BITS - SLOTS.ilog2())) as usize]
    }
}

fn device(subject: &Subject<'_>) -> u64 {
    subject.device.0
}

fn user(subject: &Subject<'_>) -> Option<u64> {
    subject.user.map(|user| user.0 ^ USERS)
}

fn mix(key: u64, [salt, at, wait]: [u64; 3]) -> u64 {
    key ^ salt ^ at.rotate_left(21) ^ wait.rotate_left(42)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::quota::KeyHash;
    use crate::tiers::Class;

    fn subject(device: u64, user: Option<u64>) -> Subject<'static> {
        Subject { device: KeyHash(device), user: user.map(KeyHash), class: Class(0), keys: &[] }
    }

    #[test]
    fn remembers_the_last_denial_of_device_and_user() {
        let denials = Denials::default();
        assert_eq!(denials.last(&subject(0, None), 0), None, "an empty slot is nobody's");
        let second = Duration::from_secs(1);
        denials.note(&subject(1, Some(2)), 7, second, Moment::from_nanos(5));
        let told = Some(LastDenial { at: Moment::from_nanos(5), retry_after: second });
        assert_eq!(denials.last(&subject(1, None), 7), told);
        assert_eq!(denials.last(&subject(9, Some(2)), 7), told, "the user, from another device");
        assert_eq!(denials.last(&subject(1, None), 8), None, "another rule");
        assert_eq!(denials.last(&subject(2, None), 7), None, "a device whose hash is the user's");
        denials.note(&subject(1, None), 8, Duration::MAX, Moment::from_nanos(6));
        assert_eq!(denials.last(&subject(1, None), 7), None, "a later one took its place");
        assert!(denials.last(&subject(1, None), 8).is_some());
    }
}
