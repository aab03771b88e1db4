//! Scenarios over real Redis servers, and over servers that break the protocol. One program: each
//! file instantiates the whole crate, which takes the compiler longer than all that is in it.

#[path = "../server/mod.rs"]
mod server;

mod bus;
mod failover;
mod hot;
mod large_bodies;
mod lease_backend;
mod outage;
mod protocol_faults;
mod remote;
mod removals;
mod reply_limits;
