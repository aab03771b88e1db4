//! A TCP proxy with faults: the `plan` of the faults, the `relay` of one direction that applies it,
//! the `proxy` of connections, and the `control` address that changes the plan.

pub(crate) mod plan;
mod relay;
pub(crate) mod proxy;
pub(crate) mod control;
