//! Rate limits by device, user, key, node and cluster, decided together in the process.
//!
//! It contains no HTTP and no I/O and does not read the system's clock: callers hash their
//! subjects, pass the time, and send the requests of [`lease`] to a backend. Invariants: no limit
//! is exceeded because something is slow, down, flooded or reloaded; a request that any rule denies
//! is charged nowhere.
//!
//! Each module imports only from those before it: `sync`, `clock`, `quota`, `bucket`, `lease`,
//! `rules`.

mod sync;
pub mod clock;
pub mod quota;
pub mod bucket;
pub mod lease;
pub mod rules;

pub use clock::{MonotonicClock, MonotonicTime};
pub use lease::{
    LEASE_SCRIPT, Lease, LeaseBackend, LeaseBackendError, LeaseConfig, LeaseGrant, LeaseRequest, LeaseSource,
};
pub use quota::{Cost, Fraction, KeyHash, Mode, Percent, Quota, QuotaError, Rate, WEIGHT_MAX, WEIGHT_MIN, Weight};
pub use rules::{
    ActiveOverride, Admission, Denial, Evaluations, Explanation, KEYS_PER_RULE_MAX, KeyIndex, LastDenial, LimitStatus,
    Limiter, LimiterConfig, Override, RecentDenial, Rule, RuleError, RuleSet, Scope, Subject, UserClass, Verdict,
};
