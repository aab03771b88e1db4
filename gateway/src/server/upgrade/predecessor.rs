//! The side of the running process: gives its sockets to a successor, and learns that it accepts.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::geteuid;
use tokio::net::UnixListener;
use tokio::time::{sleep, timeout};

use super::super::listeners::{ListenerSockets, Listeners};
use super::super::start_error::UpgradeError;
use super::message::{DESCRIPTORS_MAX, PROTOCOL, UpgradeConnection, UpgradeMessage};
use super::socket_file::{self, SocketFile};
use crate::event::Event;

/// Timeout for each message, except for the last one of the successor.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for the start of a successor: it reads its files, and waits for no other program.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Interval at which a started successor is checked for its end.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The upgrade socket of this process, with the sockets that it hands over.
pub(crate) struct UpgradeServer {
    file: SocketFile,
    listener: Option<std::os::unix::net::UnixListener>,
    listen: Vec<ListenerSockets>,
    admin: ListenerSockets,
}

/// A successor that accepts connections. It waits for `confirm`.
pub(crate) struct HandOver {
    pub(crate) pid: i32,
    pub(crate) version: String,
    /// The listeners that the successor accepts from, by their index in this process.
    pub(crate) listeners: BTreeSet<usize>,
    pub(crate) admin: bool,
    connection: UpgradeConnection,
}

impl HandOver {
    /// Tells the successor that this process has stopped accepting.
    pub(crate) async fn confirm(mut self) {
        let sent = timeout(MESSAGE_TIMEOUT, self.connection.send(&UpgradeMessage::Draining)).await;
        if let Ok(Err(error)) = sent {
            // It accepts; it only does not learn that this process drains.
            tracing::debug!(%error, "the hand-over was not confirmed");
        }
    }
}

/// Why a successor did not take over.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("the process {pid} belongs to user {uid}, not to {own}")]
    OtherUser { pid: i32, uid: u32, own: u32 },
    #[error("the successor speaks version {0} of the upgrade protocol, this process version {PROTOCOL}")]
    Protocol(u32),
    #[error("the successor sent an unexpected message")]
    Unexpected,
    #[error("the successor did not accept connections within {} s", START_TIMEOUT.as_secs())]
    Timeout,
    #[error("the successor names listeners that this process does not have")]
    UnknownListener,
    #[error("the successor ended, or its connection failed: {0}")]
    Io(#[from] io::Error),
}

impl UpgradeServer {
    /// Creates the socket under a name of its own; `publish` makes it known. A `successor` replaces
    /// the socket of its predecessor.
    ///
    /// # Errors
    /// The socket cannot be created, or belongs to a running gateway that is not the predecessor.
    pub(crate) fn new(path: &Path, listeners: Listeners, is_successor: IsSuccessor) -> Result<Self, UpgradeError> {
        if is_successor == IsSuccessor::No && socket_file::is_answered(path) {
            return Err(UpgradeError::InUse { path: path.to_owned() });
        }
        let fail = |source| UpgradeError::Socket { path: path.to_owned(), source };
        let (file, listener) = SocketFile::create(path).map_err(fail)?;
        let Listeners { listen, admin, .. } = listeners;
        Ok(UpgradeServer { file, listener: Some(listener), listen, admin })
    }

    /// Gives the socket its name.
    ///
    /// # Errors
    /// The directory has changed since `new`.
    pub(crate) fn publish(&mut self) -> Result<(), UpgradeError> {
        let path = self.file.path().to_owned();
        self.file.publish().map_err(|source| UpgradeError::Socket { path, source })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Serves successors until one accepts connections. Failures of others are reported. Cancel
    /// safe: a successor whose connection is dropped ends, or serves alone.
    pub(crate) async fn serve(&mut self) -> HandOver {
        let listener = match self.listener.take().map(UnixListener::from_std) {
            Some(Ok(listener)) => listener,
            Some(Err(error)) => {
                Event::UpgradeFailed { error: &error }.emit();
                return pending().await;
            }
            None => return pending().await,
        };
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(_) => {
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let credentials = stream.peer_cred();
            let mut connection = UpgradeConnection::new(stream);
            let session = match credentials {
                Ok(peer) => self.session(&mut connection, (peer.pid().unwrap_or_default(), peer.uid())).await,
                Err(error) => Err(error.into()),
            };
            match session {
                // A connection that is closed at once, as by `is_answered`.
                Ok(None) => {}
                Ok(Some(Accepted { pid, version, listeners, admin })) => {
                    self.file.leave();
                    return HandOver { pid, version, listeners, admin, connection };
                }
                Err(error) => {
                    Event::UpgradeFailed { error: &error }.emit();
                    let refusal = UpgradeMessage::Refused { reason: error.to_string() };
                    // The successor may have ended.
                    let _is_told = timeout(MESSAGE_TIMEOUT, connection.send(&refusal)).await;
                }
            }
        }
    }

    /// One successor; `None` if it has asked for nothing.
    async fn session(
        &self,
        connection: &mut UpgradeConnection,
        (pid, uid): (i32, u32),
    ) -> Result<Option<Accepted>, SessionError> {
        let own = geteuid().as_raw();
        if uid != own && uid != 0 {
            return Err(SessionError::OtherUser { pid, uid, own });
        }
        let version = match timeout(MESSAGE_TIMEOUT, connection.receive()).await {
            Err(_elapsed) => return Err(SessionError::Timeout),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Ok(Err(error)) => return Err(error.into()),
            Ok(Ok(UpgradeMessage::Hello { protocol: PROTOCOL, version })) => version,
            Ok(Ok(UpgradeMessage::Hello { protocol, .. })) => return Err(SessionError::Protocol(protocol)),
            Ok(Ok(_)) => return Err(SessionError::Unexpected),
        };
        timeout(MESSAGE_TIMEOUT, self.send_sockets(connection)).await.map_err(|_| SessionError::Timeout)??;
        let accepting = timeout(START_TIMEOUT, connection.receive()).await.map_err(|_| SessionError::Timeout)??;
        let UpgradeMessage::Accepting { listeners, admin } = accepting else { return Err(SessionError::Unexpected) };
        if listeners.iter().any(|index| *index >= self.listen.len()) {
            return Err(SessionError::UnknownListener);
        }
        Ok(Some(Accepted { pid, version, listeners: listeners.into_iter().collect(), admin }))
    }

    async fn send_sockets(&self, connection: &mut UpgradeConnection) -> io::Result<()> {
        for (index, ListenerSockets { configured, bound, sockets }) in self.listen.iter().enumerate() {
            for chunk in sockets.chunks(DESCRIPTORS_MAX) {
                let (configured, bound, descriptors) = (*configured, *bound, chunk.len());
                let message = UpgradeMessage::Listener { index, configured, bound, descriptors };
                connection.send_with(&message, chunk).await?;
            }
        }
        let ListenerSockets { configured, bound, sockets } = &self.admin;
        let message = UpgradeMessage::Admin { configured: *configured, bound: *bound };
        connection.send_with(&message, &sockets[..1]).await?;
        connection.send(&UpgradeMessage::Complete { version: env!("CARGO_PKG_VERSION").to_owned() }).await
    }
}

/// Whether this process takes over from another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IsSuccessor {
    Yes,
    No,
}

/// The announcement of a successor.
struct Accepted {
    pid: i32,
    version: String,
    listeners: BTreeSet<usize>,
    admin: bool,
}

/// The successor that SIGUSR2 has started: the same program file, with the same arguments.
pub(crate) struct SuccessorProcess {
    /// The path of the program file when this process started: a newer program may be there now.
    program: io::Result<PathBuf>,
    child: Option<Child>,
}

impl SuccessorProcess {
    pub(crate) fn new() -> Self {
        SuccessorProcess { program: std::env::current_exe(), child: None }
    }

    /// Starts the program, which takes over at `socket`. It inherits the standard streams. A
    /// failure is reported, and nothing changes.
    pub(crate) fn start(&mut self, socket: Option<&Path>) {
        let Some(socket) = socket else {
            return Event::UpgradeFailed { error: &UpgradeError::NoPath }.emit();
        };
        if self.child.is_some() {
            return Event::UpgradeFailed { error: &"a successor is being started" }.emit();
        }
        let program = match &self.program {
            Ok(program) => program,
            Err(error) => return Event::UpgradeFailed { error }.emit(),
        };
        let mut upgrade = OsString::from("--upgrade=");
        upgrade.push(socket);
        let own = std::env::args_os().skip(1);
        let arguments = own.filter(|argument| !argument.as_encoded_bytes().starts_with(b"--upgrade")).chain([upgrade]);
        let mut command = Command::new(program);
        // The sockets of systemd are not at their numbers any more.
        let command = command.args(arguments).env_remove("LISTEN_FDS").env_remove("LISTEN_PID").stdin(Stdio::null());
        match command.spawn() {
            Ok(child) => {
                Event::SuccessorStarted { pid: child.id() }.emit();
                self.child = Some(child);
            }
            Err(error) => Event::UpgradeFailed { error: &error }.emit(),
        }
    }

    /// Waits for the end of a started successor, which is reported. Never returns. Cancel safe.
    pub(crate) async fn watch(&mut self) -> std::convert::Infallible {
        loop {
            let Some(child) = &mut self.child else { return pending().await };
            match child.try_wait() {
                Ok(None) => sleep(EXIT_POLL_INTERVAL).await,
                Ok(Some(status)) => {
                    self.child = None;
                    Event::UpgradeFailed { error: &format_args!("the successor ended: {status}") }.emit();
                }
                Err(error) => {
                    self.child = None;
                    Event::UpgradeFailed { error: &error }.emit();
                }
            }
        }
    }
}
