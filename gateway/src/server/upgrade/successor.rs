//! The side of the new process: asks for the sockets, and says when it accepts from them.

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::geteuid;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::timeout;

use super::super::listeners::{InheritedSockets, ListenerSockets, SocketSource};
use super::super::start_error::UpgradeError;
use super::message::{PROTOCOL, UpgradeConnection, UpgradeMessage};

/// Timeout for the sockets, and for the confirmation of the other process.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The other process, which waits until this one accepts.
pub(crate) struct TakeOver {
    stream: StdStream,
    pub(crate) pid: i32,
    /// Version of the other process.
    pub(crate) version: String,
}

/// The reaction of the other process, once this one accepts.
#[derive(Debug)]
pub(crate) enum TakeOverEnd {
    /// It drains.
    Draining,
    /// It has ended, or its connection was lost: this process serves alone.
    Lost(io::Error),
}

impl TakeOver {
    /// Asks the process at `path` for its sockets. Blocks for `MESSAGE_TIMEOUT` at most; to be
    /// called before the first runtime is built.
    pub(crate) fn request(path: &Path) -> Result<(TakeOver, InheritedSockets), UpgradeError> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(UpgradeError::Exchange)?;
        runtime.block_on(async {
            timeout(MESSAGE_TIMEOUT, receive_sockets(path))
                .await
                .unwrap_or_else(|_elapsed| Err(UpgradeError::Exchange(io::ErrorKind::TimedOut.into())))
        })
    }

    /// Says that this process accepts from `listeners` (indices of the other process), and waits
    /// until the other one drains.
    pub(crate) async fn announce(self, listeners: Vec<usize>, admin: bool) -> Result<TakeOverEnd, UpgradeError> {
        let exchange = async {
            let mut connection = UpgradeConnection::new(UnixStream::from_std(self.stream)?);
            let sent = connection.send(&UpgradeMessage::Accepting { listeners, admin }).await;
            // A refusal may have arrived before.
            let received = connection.receive().await;
            received.map_err(|error| sent.err().unwrap_or(error))
        };
        let lost = |error| Ok(TakeOverEnd::Lost(error));
        match timeout(MESSAGE_TIMEOUT, exchange).await {
            Ok(Ok(UpgradeMessage::Refused { reason })) => Err(UpgradeError::Refused { reason }),
            Ok(Ok(UpgradeMessage::Draining)) => Ok(TakeOverEnd::Draining),
            Ok(Ok(_)) => lost(io::ErrorKind::InvalidData.into()),
            Ok(Err(error)) => lost(error),
            Err(_elapsed) => lost(io::ErrorKind::TimedOut.into()),
        }
    }
}

async fn receive_sockets(path: &Path) -> Result<(TakeOver, InheritedSockets), UpgradeError> {
    let absent = |source| UpgradeError::NoPredecessor { path: path.to_owned(), source };
    let stream = UnixStream::connect(path).await.map_err(absent)?;
    let peer = stream.peer_cred().map_err(UpgradeError::Exchange)?;
    let own = geteuid().as_raw();
    if peer.uid() != own && own != 0 {
        return Err(UpgradeError::OtherUser { path: path.to_owned() });
    }
    let mut connection = UpgradeConnection::new(stream);
    let hello = UpgradeMessage::Hello { protocol: PROTOCOL, version: env!("CARGO_PKG_VERSION").to_owned() };
    connection.send(&hello).await.map_err(UpgradeError::Exchange)?;
    let mut inherited = InheritedSockets { source: SocketSource::Predecessor, listeners: Vec::new(), admin: None };
    loop {
        match connection.receive().await.map_err(UpgradeError::Exchange)? {
            UpgradeMessage::Listener { index, configured, bound, descriptors } => {
                let sockets = connection.take_sockets(descriptors).map_err(UpgradeError::Exchange)?;
                match inherited.listeners.iter_mut().find(|(known, _)| *known == index) {
                    Some((_, known)) => known.sockets.extend(sockets),
                    None => inherited.listeners.push((index, ListenerSockets { configured, bound, sockets })),
                }
            }
            UpgradeMessage::Admin { configured, bound } => {
                let sockets = connection.take_sockets(1).map_err(UpgradeError::Exchange)?;
                inherited.admin = Some(ListenerSockets { configured, bound, sockets });
            }
            UpgradeMessage::Complete { version } => {
                let stream = connection.into_std().map_err(UpgradeError::Exchange)?;
                return Ok((TakeOver { stream, pid: peer.pid().unwrap_or_default(), version }, inherited));
            }
            UpgradeMessage::Refused { reason } => return Err(UpgradeError::Refused { reason }),
            _ => return Err(UpgradeError::Exchange(io::ErrorKind::InvalidData.into())),
        }
    }
}
