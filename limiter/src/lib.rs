//! Who may pass: limits by device, user, node and cluster, decided together in the process.
//!
//! It refuses HTTP, I/O and the system's clock: callers hash their subjects, pass the time, and
//! carry what [`lease`] asks of its treasury. The invariant of the whole: a limit is never
//! exceeded because something is slow, down, flooded or reloaded, and a request that is denied
//! anywhere is charged nowhere.
//!
//! Each module imports only from those before it: `sync`, `clock`, `quota`, `bucket`, `lease`, `tiers`.

mod sync;
pub mod clock;
pub mod quota;
pub mod bucket;
pub mod lease;
pub mod tiers;

pub use clock::{Clock, Moment};
pub use lease::{Ask, Backing, Grant, Lease, LeaseSettings, SCRIPT, Treasury, TreasuryError};
pub use quota::{Cost, Fraction, KeyHash, Mode, Percent, Quota, QuotaError, Rate, Weight};
pub use tiers::{
    Class, Denial, Explanation, KeyIndex, LastDenial, Limiter, LimiterSettings, Report, Rule, RuleError, RuleSet,
    Running, Standing, Subject, Tier, Trial, Verdict, Votes,
};
