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

use std::io;
use std::path::PathBuf;

pub(super) use predecessor::{HandOver, IsSuccessor, SuccessorProcess, UpgradeServer};
pub(super) use successor::{TakeOver, TakeOverEnd};

/// Why a process could not take over from another one, or cannot be upgraded later.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    #[error(
        "`--upgrade` needs the socket of the running gateway: set `server.upgrade_socket`, or write --upgrade=SOCKET"
    )]
    NoPath,
    #[error(
        "no gateway answers on {}: {source} (is it running, with this `server.upgrade_socket`? Start without --upgrade if not)",
        path.display()
    )]
    NoPredecessor { path: PathBuf, source: io::Error },
    #[error("the gateway on {} belongs to another user; take over as that user, or as root", path.display())]
    OtherUser { path: PathBuf },
    #[error("the running gateway refuses the upgrade and goes on: {reason}")]
    Refused { reason: String },
    #[error("the running gateway did not hand over its listeners: {0}")]
    Exchange(#[source] io::Error),
    #[error("not all workers accept connections")]
    NotAccepting,
    #[error("cannot create `server.upgrade_socket` {}: {source} (create its directory, writable for this user)", path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("another gateway answers on {}: upgrade it with --upgrade, or choose another `server.upgrade_socket`", path.display())]
    InUse { path: PathBuf },
}
