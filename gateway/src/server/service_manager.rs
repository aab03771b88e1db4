//! The service manager: systemd, or another one with its protocol (sd_notify(3)), learns the state
//! of the process over the socket that `NOTIFY_SOCKET` names.
//!
//! Without that variable nothing is sent. A message that cannot be sent is an event; the gateway
//! serves nevertheless.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::time::{ClockId, clock_gettime};

use crate::event::Event;

/// The state of the process, as far as the manager acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotifiedState {
    /// Connections are accepted, with the current configuration.
    Ready,
    /// The configuration is read again; `Ready` follows, whether it was accepted or not.
    Reloading,
    /// The process drains and ends.
    Stopping,
    /// A successor has taken over: it is the main process of the service.
    HandedOver { pid: i32 },
}

impl NotifiedState {
    fn message(self) -> String {
        match self {
            NotifiedState::Ready => "READY=1\nSTATUS=Accepting connections".to_owned(),
            NotifiedState::Reloading => {
                let now = clock_gettime(ClockId::Monotonic);
                let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
                format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\nSTATUS=Reading the configuration")
            }
            NotifiedState::Stopping => "STOPPING=1\nSTATUS=Draining connections".to_owned(),
            NotifiedState::HandedOver { pid } => format!("MAINPID={pid}\nSTATUS=A successor has taken over"),
        }
    }
}

/// The socket of the manager, if there is one.
#[derive(Debug, Default)]
pub(super) struct ServiceManager(Option<(UnixDatagram, SocketAddr)>);

impl ServiceManager {
    /// The manager that `NOTIFY_SOCKET` names. An address that cannot be used is reported.
    pub(super) fn from_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return ServiceManager(None);
        };
        let opened = open(&name).inspect_err(|error| Event::NotifyFailed { error }.emit());
        ServiceManager(opened.ok())
    }

    pub(super) fn notify(&self, state: NotifiedState) {
        let Some((socket, address)) = &self.0 else { return };
        if let Err(error) = socket.send_to_addr(state.message().as_bytes(), address) {
            Event::NotifyFailed { error: &error }.emit();
        }
    }
}

/// A name that begins with `@` is in the abstract namespace.
fn open(name: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A manager that does not read must not delay the gateway.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_arrive_at_paths_and_abstract_names() {
        let path = std::env::temp_dir().join(format!("tidegate-notify-{}", std::process::id()));
        let abstract_name = format!("tidegate-notify-{}", std::process::id());
        let at_name = SocketAddr::from_abstract_name(&abstract_name).expect("a short name");
        let managers = [
            (UnixDatagram::bind(&path).expect("writable"), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&at_name).expect("unused"), format!("@{abstract_name}").into()),
        ];
        for (manager, name) in &managers {
            let service = ServiceManager(Some(open(name).expect("a socket")));
            service.notify(NotifiedState::Ready);
            service.notify(NotifiedState::HandedOver { pid: 7 });
            let mut buffer = [0; 128];
            for expected in ["READY=1\n", "MAINPID=7\n"] {
                let length = manager.recv(&mut buffer).expect("a message");
                assert!(buffer[..length].starts_with(expected.as_bytes()), "{name:?}");
            }
        }
        std::fs::remove_file(path).expect("removed");
        ServiceManager(None).notify(NotifiedState::Stopping);
    }

    #[test]
    fn reload_carries_the_monotonic_time() {
        let text = NotifiedState::Reloading.message();
        let time = text.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).expect("required by systemd");
        assert!(time.parse::<u64>().is_ok_and(|time| time > 0), "{text}");
    }
}
