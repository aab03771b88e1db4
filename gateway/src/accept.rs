//! Listening sockets, connection limits, and balancing of connections across workers.
//!
//! Every worker has its own socket on every address (`SO_REUSEPORT`). The kernel distributes few
//! long connections unevenly, so a worker that holds clearly more connections than the others
//! passes a new one to the least loaded worker. Invariant: the `ConnectionTable` counts exactly the
//! connections that hold a `ConnectionPermit`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::event::Event;
use crate::http::h2;
use crate::metrics::{self, Counter, Counters, Label as _};
use crate::peer::ClientNetwork;
use crate::proxy_protocol::ProxyProtocolMode;
use crate::{label, tls};

/// Limits on open connections (`connections` and `connections_per_ip` of `[limits_http]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ConnectionLimits {
    /// Maximum open connections of the process; more are closed on arrival.
    pub(crate) connections: usize,
    /// Maximum open connections of one address (IPv6: one /64).
    pub(crate) connections_per_ip: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits { connections: 100_000, connections_per_ip: 1_000 }
    }
}

/// One `[[listen]]`: an address, with TLS or plaintext.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ListenConfig {
    /// Address and port to bind; port 0 lets the system choose a port.
    pub(crate) address: SocketAddr,
    /// Whether connections begin with a PROXY protocol header.
    pub(crate) proxy_protocol: ProxyProtocolMode,
    /// TLS of this listener; `None` for plaintext HTTP.
    pub(crate) tls: Option<tls::TlsConfig>,
    /// Whether clients may use HTTP/2: as TLS negotiates it (ALPN), or without TLS with prior
    /// knowledge (RFC 9113 section 3.3).
    pub(crate) http2: bool,
}

impl Default for ListenConfig {
    fn default() -> Self {
        ListenConfig {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            proxy_protocol: ProxyProtocolMode::Off,
            tls: None,
            http2: false,
        }
    }
}

/// Requested accept backlog of a listener: enough for a burst, and the maximum that `listen`
/// accepts on older kernels.
const BACKLOG: u32 = 65_535;
/// How long accepting pauses when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The accept queue of a listener that is to be closed has to be empty for so long.
const LAST_ACCEPT_WAIT: Duration = Duration::from_millis(50);
/// Longest time for that: clients may go on connecting.
const LAST_ACCEPT_MAX: Duration = Duration::from_secs(1);
/// Maximum queued connections for another worker; further ones stay on the worker that accepted
/// them.
const REBALANCE_QUEUE_MAX: usize = 1_024;
/// Shards of the per-address counts, each with a lock. A connection locks one of them twice: when
/// it is accepted and when it ends.
const ADDRESS_SHARDS: usize = 16;

/// Fails if a socket already listens on the address. Without this check, a second process of the
/// same user would share the address (`SO_REUSEPORT`) and take a part of its connections. Call it
/// for all addresses before the first `bind`: addresses of one process may overlap, such as
/// `0.0.0.0:80` and `[::]:80`.
///
/// # Errors
/// The error of the system: the address is in use, not local, or privileged.
pub(crate) fn check_unused(address: SocketAddr) -> io::Result<()> {
    if address.port() == 0 {
        return Ok(());
    }
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Tolerates connections of a process that has ended, but no listening socket.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))
}

/// Opens one listening socket per worker on the address.
///
/// # Errors
/// The error of the system: the address is in use, not local, or privileged.
pub(crate) fn bind(listen: &ListenConfig, workers: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let first = bind_one(listen.address)?;
    // With port 0 the system chooses a port for the first socket; the others use the same port.
    let address = first.local_addr()?;
    let others = (1..workers).map(|_| bind_one(address));
    std::iter::once(Ok(first)).chain(others).collect()
}

/// Requests the full backlog for a socket that another program has opened. It already listens; the
/// kernel takes the new length for its queue.
///
/// # Errors
/// The error of the system: it is not a socket of a stream protocol.
pub(crate) fn extend_backlog(socket: &std::net::TcpListener) -> io::Result<()> {
    SockRef::from(socket).listen(i32::try_from(BACKLOG).unwrap_or(i32::MAX))
}

/// Logs a listener at `address`, the bound one.
pub(crate) fn report_listening(listen: &ListenConfig, address: SocketAddr, source: &'static str) {
    let effective = effective_backlog();
    if effective < BACKLOG {
        Event::BacklogCapped { requested: BACKLOG, effective }.emit();
    }
    Event::Listening { address, tls: listen.tls.is_some(), backlog_effective: effective, source }.emit();
}

fn bind_one(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it (tcp(7)).
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(i32::try_from(BACKLOG).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// The backlog after the kernel's cap (`somaxconn`); `BACKLOG` if the cap cannot be read.
fn effective_backlog() -> u32 {
    let cap = std::fs::read_to_string("/proc/sys/net/core/somaxconn").ok().and_then(|text| text.trim().parse().ok());
    cap.map_or(BACKLOG, |cap: u32| cap.min(BACKLOG))
}

label! {
    /// Why a connection was closed on arrival.
    pub(crate) ConnectionRefusal, "reason", {
        /// The limit of the process is reached.
        Total = "connections",
        /// The limit of the address is reached.
        PerAddress = "connections_per_ip",
        /// Connections of the address were ended for floods of HTTP/2 frames.
        Flood = "http2_flood",
    }
}

/// The part of the table in which a network is counted.
fn shard_of(network: ClientNetwork) -> usize {
    let bits = match network {
        ClientNetwork::V4(bits) => u64::from(bits),
        ClientNetwork::V6(bits) => bits,
    };
    // Fibonacci hashing: adjacent addresses get different shards.
    (bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize % ADDRESS_SHARDS
}

/// All connections of the process: counts, limits, and the queues between workers.
pub(crate) struct ConnectionTable {
    limits: ArcSwap<ConnectionLimits>,
    total: AtomicUsize,
    /// Listener tasks that accept.
    listening: AtomicUsize,
    workers: Box<[WorkerSlot]>,
    /// Holds only addresses with an open connection, so `ConnectionLimits::connections` bounds its
    /// size.
    addresses: [Mutex<HashMap<ClientNetwork, usize, foldhash::fast::RandomState>>; ADDRESS_SHARDS],
    accepted: Counter,
    rebalanced: Counter,
    refused: Counters<ConnectionRefusal>,
}

/// Per-worker state on its own cache line: written for every connection of this worker and read for
/// every connection of the others.
#[repr(align(64))]
struct WorkerSlot {
    connections: AtomicUsize,
    queue: mpsc::Sender<RebalancedConnection>,
    receiver: Mutex<Option<mpsc::Receiver<RebalancedConnection>>>,
}

/// A connection in transit to the runtime of another worker.
struct RebalancedConnection {
    stream: std::net::TcpStream,
    listener: usize,
    proxy_protocol: ProxyProtocolMode,
    peer: SocketAddr,
    permit: ConnectionPermit,
}

/// An accepted connection, ready to be served.
pub(crate) struct AcceptedConnection {
    /// With `TCP_NODELAY` set.
    pub(crate) stream: TcpStream,
    /// Index of the listener that accepted it (`ListenerTask::listener`).
    pub(crate) listener: usize,
    /// Unless it is off, the permit does not count the peer's address yet.
    pub(crate) proxy_protocol: ProxyProtocolMode,
    /// Canonical: never an IPv4-mapped IPv6 address.
    pub(crate) peer: SocketAddr,
    /// Must be served as long as the connection.
    pub(crate) permit: ConnectionPermit,
}

/// Counts one open connection; dropping it decrements the counts.
pub(crate) struct ConnectionPermit {
    table: Arc<ConnectionTable>,
    worker: usize,
    /// `None`: the connection counts for no address.
    network: Option<ClientNetwork>,
}

impl ConnectionTable {
    pub(crate) fn new(workers: usize, limits: ConnectionLimits) -> Arc<ConnectionTable> {
        let worker = |_| {
            let (queue, receiver) = mpsc::channel(REBALANCE_QUEUE_MAX);
            WorkerSlot { connections: AtomicUsize::new(0), queue, receiver: Mutex::new(Some(receiver)) }
        };
        Arc::new(ConnectionTable {
            limits: ArcSwap::from_pointee(limits),
            total: AtomicUsize::new(0),
            workers: (0..workers).map(worker).collect(),
            addresses: Default::default(),
            listening: AtomicUsize::new(0),
            accepted: Counter::default(),
            rebalanced: Counter::default(),
            refused: Counters::default(),
        })
    }

    /// Sets the limits for connections accepted from now on.
    pub(crate) fn set_limits(&self, limits: ConnectionLimits) {
        self.limits.store(Arc::new(limits));
    }

    /// Open connections of the process.
    pub(crate) fn count(&self) -> usize {
        self.total.load(Relaxed)
    }

    /// Whether connections are accepted.
    pub(crate) fn is_listening(&self) -> bool {
        self.listening() > 0
    }

    /// Listening sockets from which connections are accepted, one for each listener task.
    pub(crate) fn listening(&self) -> usize {
        self.listening.load(Acquire)
    }

    /// Connections that were accepted so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.get()
    }

    pub(crate) fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Open connections of `worker`.
    pub(crate) fn worker_connections(&self, worker: usize) -> usize {
        self.workers[worker].connections.load(Relaxed)
    }

    /// The queue of connections from other workers. Each worker takes its queue once.
    ///
    /// # Panics
    /// If taken twice, which is a bug of the caller.
    pub(crate) fn take_incoming(self: &Arc<Self>, worker: usize) -> IncomingConnections {
        let receiver = self.workers[worker].receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        IncomingConnections(receiver.expect("each worker takes its queue once"))
    }

    /// `ip`: `None` for a connection whose address is counted later.
    fn admit(self: &Arc<Self>, worker: usize, ip: Option<IpAddr>) -> Result<ConnectionPermit, ConnectionRefusal> {
        if self.total.fetch_add(1, Relaxed) >= self.limits.load().connections {
            self.total.fetch_sub(1, Relaxed);
            return Err(ConnectionRefusal::Total);
        }
        self.workers[worker].connections.fetch_add(1, Relaxed);
        let mut permit = ConnectionPermit { table: Arc::clone(self), worker, network: None };
        ip.map_or(Ok(()), |ip| permit.try_count_address(ip)).map(|()| permit)
    }

    fn refuse(&self, reason: ConnectionRefusal, client: IpAddr) {
        self.refused.inc(reason);
        Event::ConnectionRefused { reason: reason.as_str(), client }.emit();
    }

    fn addresses(
        &self,
        network: ClientNetwork,
    ) -> MutexGuard<'_, HashMap<ClientNetwork, usize, foldhash::fast::RandomState>> {
        self.addresses[shard_of(network)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The least loaded worker, if `worker` (without the new connection) holds clearly more
    /// connections: at least two more while there are few, an eighth of the mean more when there
    /// are many. The margin keeps short connections on the worker that accepted them.
    fn rebalance_target(&self, worker: usize) -> Option<usize> {
        let own = self.worker_connections(worker).saturating_sub(1);
        let counts = (0..self.workers.len()).map(|other| (self.worker_connections(other), other));
        let (least, target) = counts.min()?;
        let mean = self.count() / self.workers.len();
        (own > least + 1 + mean / 8).then_some(target)
    }
}

impl ConnectionPermit {
    /// Counts the connection for an address, once its client is known. An error is counted and
    /// logged: the address has too many connections.
    pub(crate) fn count_address(&mut self, ip: IpAddr) -> Result<(), ConnectionRefusal> {
        self.try_count_address(ip).inspect_err(|reason| self.table.refuse(*reason, ip))
    }

    fn try_count_address(&mut self, ip: IpAddr) -> Result<(), ConnectionRefusal> {
        if h2::is_flooding(ip) {
            return Err(ConnectionRefusal::Flood);
        }
        let network = ClientNetwork::of(ip);
        let mut addresses = self.table.addresses(network);
        if addresses.get(&network).copied().unwrap_or_default() >= self.table.limits.load().connections_per_ip {
            return Err(ConnectionRefusal::PerAddress);
        }
        *addresses.entry(network).or_default() += 1;
        self.network = Some(network);
        Ok(())
    }

    fn migrate_to(&mut self, worker: usize) {
        self.table.workers[self.worker].connections.fetch_sub(1, Relaxed);
        self.table.workers[worker].connections.fetch_add(1, Relaxed);
        self.worker = worker;
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.table.total.fetch_sub(1, Relaxed);
        self.table.workers[self.worker].connections.fetch_sub(1, Relaxed);
        let Some(network) = self.network else { return };
        if let Entry::Occupied(mut count) = self.table.addresses(network).entry(network) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// The connections that other workers pass to a worker.
pub(crate) struct IncomingConnections(mpsc::Receiver<RebalancedConnection>);

impl IncomingConnections {
    /// The next connection from another worker, registered with the calling runtime; `None` when
    /// the table is dropped. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<AcceptedConnection> {
        loop {
            let RebalancedConnection { stream, listener, proxy_protocol, peer, permit } = self.0.recv().await?;
            match TcpStream::from_std(stream) {
                Ok(stream) => {
                    return Some(AcceptedConnection { stream, listener, proxy_protocol, peer, permit });
                }
                // The runtime cannot register the socket (out of memory); the client sees a closed
                // connection.
                Err(error) => tracing::debug!(%error, "failed to move a connection to another worker"),
            }
        }
    }
}

/// Which process accepts from the queue of a listening socket, once this one has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueOwner {
    /// No other: connections that are left in the queue are reset.
    ThisProcess,
    /// The successor of a binary upgrade has the same socket.
    Successor,
}

/// Accepts connections on one listening socket of one worker.
pub(crate) struct ListenerTask {
    pub(crate) socket: std::net::TcpListener,
    /// Index of the listener, reported in `AcceptedConnection` also after a move to another worker.
    pub(crate) listener: usize,
    pub(crate) proxy_protocol: ProxyProtocolMode,
    pub(crate) worker: usize,
    pub(crate) table: Arc<ConnectionTable>,
}

/// Counts a listener task as long as it accepts.
struct OpenListener<'t>(&'t ConnectionTable);

impl<'t> OpenListener<'t> {
    fn new(table: &'t ConnectionTable) -> Self {
        table.listening.fetch_add(1, Relaxed);
        OpenListener(table)
    }
}

impl Drop for OpenListener<'_> {
    fn drop(&mut self) {
        // A worker that sees it also sees the connections that were passed to it before.
        self.0.listening.fetch_sub(1, Release);
    }
}

impl ListenerTask {
    /// Accepts until `stop` completes, then, unless a successor does, until the accept queue of the
    /// kernel stays empty: closing the socket resets connections in it, although their clients may
    /// have sent requests. The socket is closed when the task is dropped: a new run can go on with
    /// it. `handle` gets the connections that this worker serves; it must not block. Cancel safe.
    ///
    /// # Errors
    /// The runtime cannot register the socket.
    pub(crate) async fn run(
        &self,
        stop: impl Future<Output = QueueOwner>,
        handle: impl Fn(AcceptedConnection),
    ) -> io::Result<()> {
        let mut stop = std::pin::pin!(stop);
        let socket = TcpListener::from_std(self.socket.try_clone()?)?;
        // False for a socket that another program has opened.
        let has_nodelay = SockRef::from(&socket).tcp_nodelay()?;
        let admit = |stream, peer| self.admit_and_handle((stream, peer), has_nodelay, &handle);
        let _listening = OpenListener::new(&self.table);
        let owner = loop {
            let accepted = tokio::select! {
                biased;
                owner = &mut stop => break owner,
                accepted = socket.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => admit(stream, peer),
                Err(error) if is_connection_error(&error) => {}
                Err(error) => {
                    Event::AcceptPaused { error: &error }.emit();
                    tokio::select! {
                        owner = &mut stop => break owner,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            }
        };
        if owner == QueueOwner::Successor {
            return Ok(());
        }
        let accept_rest = async {
            // Handshakes that are under way complete during the wait.
            while let Ok(accepted) = timeout(LAST_ACCEPT_WAIT, socket.accept()).await {
                match accepted {
                    Ok((stream, peer)) => admit(stream, peer),
                    Err(error) if is_connection_error(&error) => {}
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                }
            }
        };
        // Whichever is earlier.
        _ = timeout(LAST_ACCEPT_MAX, accept_rest).await;
        Ok(())
    }

    /// Admits an accepted connection and assigns it to a worker. `has_nodelay`: it has
    /// `TCP_NODELAY` set.
    fn admit_and_handle(
        &self,
        (stream, peer): (TcpStream, SocketAddr),
        has_nodelay: bool,
        handle: &impl Fn(AcceptedConnection),
    ) {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let counted = (self.proxy_protocol == ProxyProtocolMode::Off).then_some(peer.ip());
        let permit = match self.table.admit(self.worker, counted) {
            Ok(permit) => permit,
            Err(reason) => return self.table.refuse(reason, peer.ip()),
        };
        self.table.accepted.inc();
        // Fails only if the client has already disconnected.
        if !has_nodelay && stream.set_nodelay(true).is_err() {
            return;
        }
        let ListenerTask { listener, proxy_protocol, .. } = *self;
        let accepted = AcceptedConnection { stream, listener, proxy_protocol, peer, permit };
        if let Some(accepted) = self.rebalance(accepted) {
            handle(accepted);
        }
    }

    /// Passes the connection to a less loaded worker; returns it if it stays on this worker.
    fn rebalance(&self, accepted: AcceptedConnection) -> Option<AcceptedConnection> {
        let Some(target) = self.table.rebalance_target(self.worker) else { return Some(accepted) };
        let Ok(slot) = self.table.workers[target].queue.try_reserve() else { return Some(accepted) };
        let AcceptedConnection { stream, listener, proxy_protocol, peer, mut permit } = accepted;
        // A stream that cannot be deregistered from its runtime is broken; its permit is dropped
        // with it.
        let stream = stream.into_std().ok()?;
        permit.migrate_to(target);
        slot.send(RebalancedConnection { stream, listener, proxy_protocol, peer, permit });
        self.table.rebalanced.inc();
        None
    }
}

/// Whether only the connection being accepted has failed. Any other error would recur at once.
fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut | WouldBlock)
}

/// Exposes the counts of `table`.
pub(crate) fn expose(table: &Arc<ConnectionTable>) {
    let of = |read: fn(&ConnectionTable) -> u64| {
        let table = Arc::clone(table);
        move || read(&table)
    };
    let open = of(|table| table.count() as u64);
    metrics::expose_gauge_with("tidegate_connections", "Open client connections.", move |emit| {
        emit(&[], open() as f64);
    });
    let accepted = of(|table| table.accepted.get());
    metrics::expose_counter_with("tidegate_connections_accepted", "Client connections accepted.", move |emit| {
        emit(&[], accepted());
    });
    let rebalanced = of(|table| table.rebalanced.get());
    metrics::expose_counter_with(
        "tidegate_connections_rebalanced",
        "Client connections passed to a less loaded worker.",
        move |emit| emit(&[], rebalanced()),
    );
    let table = Arc::clone(table);
    metrics::expose_counter_with(
        "tidegate_connections_refused",
        "Client connections closed on arrival, by the limit that was reached.",
        move |emit| {
            for reason in ConnectionRefusal::ALL {
                emit(&[(ConnectionRefusal::NAME, reason.as_str())], table.refused.get(*reason));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn table(workers: usize, connections: usize, connections_per_ip: usize) -> Arc<ConnectionTable> {
        ConnectionTable::new(workers, ConnectionLimits { connections, connections_per_ip })
    }

    fn listener_task(socket: std::net::TcpListener, listener: usize, table: &Arc<ConnectionTable>) -> ListenerTask {
        ListenerTask { socket, listener, proxy_protocol: ProxyProtocolMode::Off, worker: 0, table: Arc::clone(table) }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn connections_over_a_limit_are_refused_and_drops_release_permits() {
        let table = table(1, 3, 2);
        let first = table.admit(0, Some(ip("192.0.2.1"))).ok();
        let second = table.admit(0, Some(ip("192.0.2.1"))).ok();
        assert_eq!(table.admit(0, Some(ip("192.0.2.1"))).err(), Some(ConnectionRefusal::PerAddress));
        let third = table.admit(0, Some(ip("192.0.2.2"))).ok();
        assert_eq!(table.admit(0, Some(ip("192.0.2.3"))).err(), Some(ConnectionRefusal::Total));
        assert_eq!((table.count(), table.worker_connections(0)), (3, 3));
        drop((first, second, third));
        assert_eq!((table.count(), table.worker_connections(0)), (0, 0));
        assert!(table.addresses.iter().all(|shard| shard.lock().expect("not poisoned").is_empty()));
        table.set_limits(ConnectionLimits { connections: 1, connections_per_ip: 1 });
        let _permit = table.admit(0, Some(ip("192.0.2.1"))).ok();
        assert_eq!(table.admit(0, Some(ip("192.0.2.2"))).err(), Some(ConnectionRefusal::Total));
    }

    #[test]
    fn address_is_counted_once_it_is_known() {
        let table = table(1, 3, 1);
        let mut first = table.admit(0, None).expect("below the limits");
        let mut second = table.admit(0, None).expect("counts for no address");
        assert!(table.admit(0, Some(ip("192.0.2.1"))).is_ok(), "released at once");
        assert_eq!(first.count_address(ip("192.0.2.1")), Ok(()));
        assert_eq!(second.count_address(ip("192.0.2.1")), Err(ConnectionRefusal::PerAddress));
        assert_eq!(table.refused.get(ConnectionRefusal::PerAddress), 1);
        drop((first, second));
        assert_eq!((table.count(), table.worker_connections(0)), (0, 0));
        assert!(table.addresses.iter().all(|shard| shard.lock().expect("not poisoned").is_empty()));
    }

    #[test]
    fn ipv6_64_prefix_counts_as_one_address() {
        let table = table(1, 10, 1);
        let _permit = table.admit(0, Some(ip("2001:db8:0:1::1"))).ok();
        assert_eq!(table.admit(0, Some(ip("2001:db8:0:1:ffff::2"))).err(), Some(ConnectionRefusal::PerAddress));
        assert!(table.admit(0, Some(ip("2001:db8:0:2::1"))).is_ok());
    }

    #[test]
    fn only_clear_imbalance_rebalances_a_connection() {
        let table = table(2, 10_000, 10_000);
        let mut permits = Vec::new();
        let mut add = |worker, count: usize| {
            permits.extend((0..count).map(|_| table.admit(worker, Some(ip("192.0.2.1"))).ok()));
            table.rebalance_target(worker)
        };
        // The new connection is already counted.
        assert_eq!(add(0, 1), None);
        assert_eq!(add(0, 1), None);
        assert_eq!(add(0, 1), Some(1));
        assert_eq!(add(1, 1), None);
        assert_eq!((add(0, 1_000), add(1, 998)), (Some(1), None));
        assert_eq!((add(0, 100), add(0, 100)), (None, Some(1)));
    }

    #[test]
    fn descriptor_exhaustion_is_not_a_connection_error() {
        assert!(is_connection_error(&io::ErrorKind::ConnectionAborted.into()));
        for exhausted in [23, 24, 12, 105] {
            assert!(!is_connection_error(&io::Error::from_raw_os_error(exhausted)));
        }
    }

    #[test]
    fn all_workers_listen_on_the_chosen_port() {
        let sockets = bind(&ListenConfig { address: ANYWHERE, ..ListenConfig::default() }, 3).expect("a free port");
        let address = sockets[0].local_addr().expect("bound");
        assert!(address.port() != 0 && sockets.len() == 3);
        assert!(sockets.iter().all(|socket| socket.local_addr().ok() == Some(address)));
    }

    #[test]
    fn address_in_use_is_detected() {
        let sockets = bind(&ListenConfig { address: ANYWHERE, ..ListenConfig::default() }, 2).expect("a free port");
        let address = sockets[0].local_addr().expect("bound");
        let in_use = Err(io::ErrorKind::AddrInUse);
        assert_eq!(check_unused(address).map_err(|error| error.kind()), in_use);
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
        assert_eq!(check_unused(any).map_err(|error| error.kind()), in_use, "an overlapping address");
        // The address stays usable while a connection of the ended listener is open.
        let _client = std::net::TcpStream::connect(address).expect("listening");
        let accepted = std::iter::repeat(()).find_map(|()| sockets.iter().find_map(|socket| socket.accept().ok()));
        drop(sockets);
        assert!(check_unused(address).is_ok());
        assert!(bind(&ListenConfig { address, ..ListenConfig::default() }, 2).is_ok());
        drop(accepted);
        assert!(check_unused(ANYWHERE).is_ok());
    }

    /// Long connections that all arrive at one worker are distributed evenly.
    #[tokio::test]
    async fn connections_are_distributed_over_workers() {
        let table = table(3, 100, 100);
        let socket =
            bind(&ListenConfig { address: ANYWHERE, ..ListenConfig::default() }, 1).expect("a free port").remove(0);
        let address = socket.local_addr().expect("bound");
        let task = listener_task(socket, 7, &table);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let stopped = async {
            stopped.await.expect("sent");
            QueueOwner::ThisProcess
        };
        let served = RefCell::new(Vec::new());
        let clients = async {
            let mut clients = Vec::new();
            for _ in 0..9 {
                clients.push(TcpStream::connect(address).await.expect("listening"));
            }
            while table.count() < 9 {
                tokio::task::yield_now().await;
            }
            stop.send(()).expect("received");
            clients
        };
        let (clients, ran) = tokio::join!(clients, task.run(stopped, |accepted| served.borrow_mut().push(accepted)));
        ran.expect("registered");
        assert_eq!((0..3).map(|worker| table.worker_connections(worker)).collect::<Vec<_>>(), [4, 3, 2]);
        let accepted = table.take_incoming(1).next().await.expect("passed on");
        let locals: Vec<_> = clients.iter().map(|client| client.local_addr().ok()).collect();
        assert!(accepted.listener == 7 && locals.contains(&Some(accepted.peer)));
        assert!(accepted.stream.nodelay().expect("open"));
        assert_eq!((table.accepted.get(), table.rebalanced.get(), served.borrow().len()), (9, 5, 4));
        drop((accepted, served));
    }

    #[tokio::test]
    async fn kernel_accept_queue_is_served_after_stop() {
        let table = table(1, 1, 1);
        let socket =
            bind(&ListenConfig { address: ANYWHERE, ..ListenConfig::default() }, 1).expect("a free port").remove(0);
        let address = socket.local_addr().expect("bound");
        let _client = TcpStream::connect(address).await.expect("listening");
        let _refused = TcpStream::connect(address).await.expect("listening");
        let served = RefCell::new(Vec::new());
        let task = listener_task(socket, 0, &table);
        let stopped = std::future::ready(QueueOwner::ThisProcess);
        task.run(stopped, |accepted| served.borrow_mut().push(accepted)).await.expect("registered");
        assert_eq!((served.borrow().len(), table.refused.get(ConnectionRefusal::Total)), (1, 1));
    }

    #[tokio::test]
    async fn kernel_accept_queue_is_left_to_a_successor() {
        let table = table(1, 2, 2);
        let socket =
            bind(&ListenConfig { address: ANYWHERE, ..ListenConfig::default() }, 1).expect("a free port").remove(0);
        let (address, successor) = (socket.local_addr().expect("bound"), socket.try_clone().expect("a descriptor"));
        let client = TcpStream::connect(address).await.expect("listening");
        let task = listener_task(socket, 0, &table);
        task.run(std::future::ready(QueueOwner::Successor), |_| panic!("accepted")).await.expect("registered");
        drop(task);
        let (_, peer) = successor.accept().expect("the connection is still in the queue");
        assert_eq!((client.local_addr().ok(), table.accepted.get()), (Some(peer), 0));
    }
}
