//! The knee of a service: its `search`, the law of `scalability` that is fitted to the steps, and
//! the `report`.

mod scalability;
pub(crate) mod search;
pub(crate) mod report;
