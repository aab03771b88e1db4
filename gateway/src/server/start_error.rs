//! Why a process could not start, or take over from another one.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::tls;

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot use the certificates of {address}: {source}")]
    Tls { address: SocketAddr, source: Box<tls::TlsError> },
    #[error("cannot use the limits: {0}")]
    Limits(#[from] limiter::RuleError),
    #[error("cannot use the stores: {0}")]
    Store(#[from] shard::StoreConfigError),
    #[error("cannot open the access log{}: {source}", path.as_ref().map_or(String::new(), |path| format!(" {}", path.display())))]
    AccessLog { path: Option<PathBuf>, source: io::Error },
    #[error("cannot use the sockets of systemd (LISTEN_FDS): {0}")]
    Activation(#[source] io::Error),
    #[error(
        "systemd has passed a socket for {address}, which the configuration does not listen on: its connections would wait forever; add it to `[[listen]]`, or remove its `ListenStream=`"
    )]
    UnknownSocket { address: SocketAddr },
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

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
