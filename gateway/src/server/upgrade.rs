//! Binary upgrade: a new process takes the listening sockets of a running one, which drains.
//!
//! The running process listens on the Unix socket `server.upgrade_socket`. The successor checks its
//! configuration, asks for the sockets, starts, accepts from all of them, and only then says so;
//! the other process then stops accepting and drains. Both have the same sockets, so that no
//! connection in their queues is lost. Invariant: until the successor accepts, its failure changes
//! nothing for the running process.

mod message;
mod socket_file;
mod predecessor;
mod successor;

pub(super) use predecessor::{HandOver, IsSuccessor, SuccessorProcess, UpgradeServer};
pub(super) use successor::{TakeOver, TakeOverEnd};
