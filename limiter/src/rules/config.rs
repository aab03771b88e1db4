//! Configuration and bounds that all rules of a limiter share.

use std::num::NonZeroUsize;

use crate::lease::LeaseConfig;

/// The bitmasks of a verdict have one bit per rule.
pub const RULES_MAX: usize = 64;
/// [`UserClass`](super::UserClass) is a byte.
pub(super) const WEIGHTS_MAX: usize = 256;

/// Configuration that all rules of a limiter share: the default number of keys per rule, and the
/// lease configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimiterConfig {
    /// Keys per device, user or key rule that does not set its own number.
    pub keys: NonZeroUsize,
    pub lease: LeaseConfig,
}

impl LimiterConfig {
    /// 65,536 keys per rule, in 4.1 MB: ten million other keys in ten seconds leave heavy keys
    /// limited.
    pub const KEYS: NonZeroUsize = NonZeroUsize::new(65_536).expect("65,536 is not zero");

    pub fn new(lease: LeaseConfig) -> LimiterConfig {
        LimiterConfig { keys: LimiterConfig::KEYS, lease }
    }
}
