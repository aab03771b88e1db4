//! The caller of a request, and the request as rules evaluate it.

use super::rule::UserClass;
use crate::clock::MonotonicTime;
use crate::quota::{Cost, KeyHash};

/// The caller of a request as rules count it: hashes of device, user and configured keys, and the
/// user class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject<'a> {
    pub device: KeyHash,
    /// `None` if the caller is not identified: user rules do not apply.
    pub user: Option<KeyHash>,
    pub class: UserClass,
    /// Values of the keys that the configuration defines, by [`KeyIndex`](super::KeyIndex). A rule
    /// whose key is `None` or out of range does not apply.
    pub keys: &'a [Option<KeyHash>],
}

/// One request as rules evaluate it: its subject, its cost in tokens, and the time of the decision.
#[derive(Clone, Copy, Debug)]
pub(super) struct LimitRequest<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) cost: Cost,
    pub(super) now: MonotonicTime,
}
