//! The listening sockets of the process: inherited from systemd or from a predecessor, or bound.
//!
//! Invariant: every inherited socket of a listener is accepted from, by one worker at least. The
//! kernel assigns connections to the sockets of an address by itself, so those in the queue of any
//! other socket would wait forever. No socket is added to an inherited address either: its queue
//! would be lost if this process ended before it took over.

use std::io;
use std::net::{SocketAddr, TcpListener};

use super::start_error::StartError;
use crate::accept::{self, ListenConfig};
use crate::config::Config;

/// The sockets of one address.
#[derive(Debug)]
pub(super) struct ListenerSockets {
    /// The address in the configuration of the process that bound it; its port may be 0.
    pub(super) configured: SocketAddr,
    pub(super) bound: SocketAddr,
    /// At least one. Not blocking.
    pub(super) sockets: Vec<TcpListener>,
}

/// The process that inherited sockets come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketSource {
    /// Socket activation: the service manager has bound them.
    Systemd,
    /// A running gateway, which goes on with those that are not taken.
    Predecessor,
}

/// The sockets that this process has not bound itself.
#[derive(Debug)]
pub(super) struct InheritedSockets {
    pub(super) source: SocketSource,
    /// Each with its index in the process that it comes from.
    pub(super) listeners: Vec<(usize, ListenerSockets)>,
    pub(super) admin: Option<ListenerSockets>,
}

impl InheritedSockets {
    /// The sockets of socket activation (`LISTEN_FDS`), if any.
    ///
    /// # Errors
    /// One of them is not a listening socket of TCP.
    pub(super) fn from_systemd(config: &Config) -> io::Result<Self> {
        let mut passed = listenfd::ListenFd::from_env();
        let mut inherited = InheritedSockets { source: SocketSource::Systemd, listeners: Vec::new(), admin: None };
        for index in 0..passed.len() {
            let Some(socket) = passed.take_tcp_listener(index)? else { continue };
            socket.set_nonblocking(true)?;
            accept::extend_backlog(&socket)?;
            let bound = socket.local_addr()?;
            let known = inherited.listeners.iter_mut().find(|(_, known)| known.bound == bound);
            match known {
                // Several sockets of one address (`ReusePort=`).
                Some((_, known)) => known.sockets.push(socket),
                None => {
                    let sockets = ListenerSockets { configured: bound, bound, sockets: vec![socket] };
                    match inherited.admin.is_none() && bound == config.admin.address {
                        true => inherited.admin = Some(sockets),
                        false => inherited.listeners.push((index, sockets)),
                    }
                }
            }
        }
        Ok(inherited)
    }

    /// Takes the sockets of an address of the configuration.
    fn take(&mut self, address: SocketAddr) -> Option<(usize, ListenerSockets)> {
        let by_configuration = self.listeners.iter().position(|(_, sockets)| sockets.configured == address);
        let at = by_configuration.or_else(|| self.listeners.iter().position(|(_, sockets)| sockets.bound == address));
        at.map(|at| self.listeners.remove(at))
    }

    fn take_admin(&mut self, address: SocketAddr) -> Option<ListenerSockets> {
        self.admin.take_if(|sockets| sockets.configured == address || sockets.bound == address)
    }

    fn ports(&self) -> Vec<u16> {
        let all = self.listeners.iter().map(|(_, sockets)| sockets).chain(&self.admin);
        all.map(|sockets| sockets.bound.port()).collect()
    }
}

/// All listeners of the process.
pub(super) struct Listeners {
    /// In the order of the configuration.
    pub(super) listen: Vec<ListenerSockets>,
    pub(super) admin: ListenerSockets,
    /// The listeners of another process.
    pub(super) taken: TakenListeners,
}

/// The listeners that this process has inherited.
#[derive(Clone, Debug, Default)]
pub(super) struct TakenListeners {
    /// The indices of listeners where they come from.
    pub(super) theirs: Vec<usize>,
    /// Their indices in this process.
    pub(super) own: Vec<usize>,
    pub(super) admin: bool,
}

/// Sockets of one worker, each with the index of its listener.
pub(super) type WorkerSockets = Vec<(usize, TcpListener)>;

impl Listeners {
    /// Takes the inherited sockets that the configuration has an address for, and binds the other
    /// addresses with one socket for each worker.
    ///
    /// # Errors
    /// An address cannot be bound, or systemd has passed a socket that the configuration does not
    /// name: its connections would wait forever.
    pub(super) fn open(config: &Config, workers: usize, mut inherited: InheritedSockets) -> Result<Self, StartError> {
        let source = inherited.source;
        let ports = inherited.ports();
        let mut listen: Vec<_> = config.listen.iter().map(|listen| inherited.take(listen.address)).collect();
        let admin = inherited.take_admin(config.admin.address);
        let unknown = inherited.listeners.first().map(|(_, sockets)| sockets).or(inherited.admin.as_ref());
        if let (SocketSource::Systemd, Some(sockets)) = (source, unknown) {
            return Err(StartError::UnknownSocket { address: sockets.bound });
        }
        let fail = |address| move |source| StartError::Listen { address, source };
        for (ListenConfig { address, .. }, taken) in config.listen.iter().zip(&listen) {
            // The predecessor may listen on an address that overlaps, until it ends.
            if taken.is_none() && !ports.contains(&address.port()) {
                accept::check_unused(*address).map_err(fail(*address))?;
            }
        }
        let own = listen.iter().enumerate().filter_map(|(own, taken)| Some((taken.as_ref()?.0, own)));
        let (theirs, own) = own.unzip();
        let all_taken = TakenListeners { theirs, own, admin: admin.is_some() };
        let name = match source {
            SocketSource::Systemd => "systemd",
            SocketSource::Predecessor => "predecessor",
        };
        let mut opened = Vec::new();
        for (config, taken) in config.listen.iter().zip(&mut listen) {
            let (sockets, name) = match taken.take() {
                Some((_, sockets)) => (ListenerSockets { configured: config.address, ..sockets }, name),
                None => (bind(config, workers).map_err(fail(config.address))?, "bound"),
            };
            accept::report_listening(config, sockets.bound, name);
            opened.push(sockets);
        }
        let address = config.admin.address;
        let admin = match admin {
            Some(sockets) => ListenerSockets { configured: address, ..sockets },
            None => bind_admin(address).map_err(fail(address))?,
        };
        Ok(Listeners { listen: opened, admin, taken: all_taken })
    }

    /// Assigns every socket to a worker, and every worker a socket of each listener: where there
    /// are too few, workers accept from the same one.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn by_worker(&self, workers: usize) -> io::Result<Vec<WorkerSockets>> {
        let mut assigned: Vec<WorkerSockets> = (0..workers).map(|_| Vec::new()).collect();
        for (listener, ListenerSockets { sockets, .. }) in self.listen.iter().enumerate() {
            for index in 0..sockets.len().max(workers) {
                assigned[index % workers].push((listener, sockets[index % sockets.len()].try_clone()?));
            }
        }
        Ok(assigned)
    }
}

fn bind(listen: &ListenConfig, workers: usize) -> io::Result<ListenerSockets> {
    let sockets = accept::bind(listen, workers)?;
    let bound = sockets.first().map_or(Ok(listen.address), TcpListener::local_addr)?;
    Ok(ListenerSockets { configured: listen.address, bound, sockets })
}

fn bind_admin(address: SocketAddr) -> io::Result<ListenerSockets> {
    let socket = TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    Ok(ListenerSockets { configured: address, bound: socket.local_addr()?, sockets: vec![socket] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listeners(sockets: usize) -> Listeners {
        let bind = |count| {
            let sockets: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
            let bound = sockets[0].local_addr().expect("bound");
            ListenerSockets { configured: bound, bound, sockets }
        };
        Listeners { listen: vec![bind(sockets), bind(1)], admin: bind(1), taken: TakenListeners::default() }
    }

    #[test]
    fn every_socket_has_a_worker_and_every_worker_a_socket() {
        for (sockets, workers) in [(1, 1), (1, 4), (4, 1), (3, 2), (2, 3)] {
            let listeners = listeners(sockets);
            let assigned = listeners.by_worker(workers).expect("descriptors");
            let address = |socket: &TcpListener| socket.local_addr().expect("bound");
            for (index, listener) in listeners.listen.iter().enumerate() {
                let of_listener = |(at, _): &&(usize, TcpListener)| *at == index;
                assert!(assigned.iter().all(|worker| worker.iter().filter(of_listener).count() >= 1));
                let all = assigned.iter().flatten().filter(of_listener).map(|(_, socket)| address(socket));
                let all: Vec<SocketAddr> = all.collect();
                assert!(listener.sockets.iter().all(|socket| all.contains(&address(socket))), "{sockets} {workers}");
            }
        }
    }

    #[test]
    fn inherited_sockets_are_found_by_either_address() {
        let socket = |configured: &str, bound: &str| {
            let address = |text: &str| text.parse().expect("an address");
            ListenerSockets { configured: address(configured), bound: address(bound), sockets: Vec::new() }
        };
        let mut inherited = InheritedSockets {
            source: SocketSource::Predecessor,
            listeners: vec![
                (0, socket("127.0.0.1:0", "127.0.0.1:7001")),
                (1, socket("127.0.0.1:0", "127.0.0.1:7002")),
                (2, socket("127.0.0.1:80", "127.0.0.1:80")),
            ],
            admin: Some(socket("127.0.0.1:0", "127.0.0.1:9")),
        };
        assert_eq!(inherited.ports(), [7001, 7002, 80, 9]);
        let mut take = |text: &str| inherited.take(text.parse().expect("an address")).map(|(index, _)| index);
        assert_eq!(
            (take("127.0.0.1:7002"), take("127.0.0.1:0"), take("127.0.0.1:0"), take("127.0.0.1:80")),
            (Some(1), Some(0), None, Some(2))
        );
        assert!(inherited.take_admin("127.0.0.1:8".parse().expect("an address")).is_none());
        assert!(inherited.take_admin("127.0.0.1:9".parse().expect("an address")).is_some());
    }
}
