//! The atomics and locks of the state of endpoints: those of the standard library. `orders.rs` has
//! those of loom in their place.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
pub(super) use std::sync::{Mutex, MutexGuard};
