//! Random numbers for ids and jitter, from a hash with a secret of the process.

use std::hash::{BuildHasher, Hasher};

/// A random number: unpredictable enough for ids, not for secrets.
pub(super) fn random_u64(random: &foldhash::fast::RandomState, salt: u64) -> u64 {
    use std::cell::Cell;
    thread_local!(static COUNT: Cell<u64> = const { Cell::new(0) });
    let count = COUNT.get().wrapping_add(1);
    COUNT.set(count);
    let mut hasher = random.build_hasher();
    hasher.write_u64(count);
    hasher.write_u64(salt);
    hasher.write_usize(std::ptr::from_ref(&salt).addr());
    hasher.finish() | 1
}
