//! The means of a case: a `gateway` process, a `client`, several `load`s at a time, a `fake_clock`,
//! and the `report` with its criteria. The field cases and the fleet are played with them.

pub(crate) mod report;
pub(crate) mod client;
pub(crate) mod gateway;
pub(crate) mod journal;
pub(crate) mod load;
pub(crate) mod fake_clock;
