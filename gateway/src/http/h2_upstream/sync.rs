//! The atomics of the account: those of the standard library. `orders.rs` has those of loom in
//! their place.

pub(super) use std::sync::atomic::{AtomicUsize, Ordering};
