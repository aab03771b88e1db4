//! The atomics of the limiter: from the standard library, or from loom, which explores every
//! interleaving of threads. `--cfg loom` selects loom (about 30 s to build, then 3 s):
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test --package limiter --test orders --target-dir target/loom \
//!     --config 'profile.dev.package."*".opt-level=0'
//! ```
//!
//! Only the operations in use are provided. Invariant: both implementations have the same
//! semantics.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::AtomicU64;
pub(crate) use std::sync::atomic::Ordering;

#[cfg(loom)]
pub(crate) use explored::AtomicU64;

#[cfg(loom)]
mod explored {
    use std::sync::atomic::Ordering;

    /// The methods of the standard library's atomic on loom's, which lacks the newer ones.
    #[derive(Debug, Default)]
    pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> u64 {
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: u64, order: Ordering) {
            self.0.store(value, order);
        }

        pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
            self.0.swap(value, order)
        }

        pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            self.0.fetch_add(value, order)
        }

        pub(crate) fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
            self.0.fetch_max(value, order)
        }

        pub(crate) fn fetch_min(&self, value: u64, order: Ordering) -> u64 {
            self.0.fetch_min(value, order)
        }

        #[expect(clippy::too_many_arguments, reason = "the signature of the standard library's `compare_exchange`")]
        pub(crate) fn compare_exchange(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.0.compare_exchange(current, new, success, failure)
        }

        #[expect(
            clippy::too_many_arguments,
            reason = "the signature of the standard library's `compare_exchange_weak`"
        )]
        pub(crate) fn compare_exchange_weak(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.0.compare_exchange_weak(current, new, success, failure)
        }

        pub(crate) fn update(&self, set: Ordering, fetch: Ordering, change: impl Fn(u64) -> u64) -> u64 {
            match self.try_update(set, fetch, |value| Some(change(value))) {
                Ok(before) | Err(before) => before,
            }
        }

        pub(crate) fn try_update(
            &self,
            set: Ordering,
            fetch: Ordering,
            change: impl Fn(u64) -> Option<u64>,
        ) -> Result<u64, u64> {
            self.0.fetch_update(set, fetch, change)
        }
    }
}
