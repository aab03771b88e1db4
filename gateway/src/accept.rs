//! Listening sockets: which addresses are served, how many connections may stand at once, and which worker holds each.
//!
//! Every worker has a socket of its own on every address (`SO_REUSEPORT`). The kernel spreads few long connections badly over
//! them, so a worker that holds clearly more than the others hands a new connection to the lightest one.
//! Invariant: what is counted in the `Floor` is exactly what holds a `Permit`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::event::Event;
use crate::metrics::{self, Counter, Counters, Label as _};
use crate::{label, tls};

/// Bounds on accepted connections (`connections` and `connections_per_ip` of `[limits_http]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Connections the process holds at once; more are closed as they arrive.
    pub connections: usize,
    /// Connections one address (IPv6: one /64) holds at once.
    pub connections_per_ip: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { connections: 100_000, connections_per_ip: 1_000 }
    }
}

/// One `[[listen]]`: an address, with TLS or in the clear.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    /// Address and port to bind; port 0 lets the system choose.
    pub address: SocketAddr,
    /// TLS of this listener; `None` serves HTTP in the clear.
    pub tls: Option<tls::Settings>,
}

impl Default for Listen {
    fn default() -> Self {
        Listen { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)), tls: None }
    }
}

/// Connections that the kernel may hold for one listener until they are accepted: a burst's worth, and the most that
/// `listen` takes on older kernels.
const BACKLOG: u32 = 65_535;
/// How long accepting rests when the process is out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections on their way to another worker; more stay where they were accepted.
const HAND_OVER_MAX: usize = 1_024;
/// Locks over the per-address counts; a connection takes one of them twice in its life.
const SHARDS: usize = 16;

/// Opens one listening socket per worker on the address, and says so.
///
/// # Errors
/// What the system says: the address is in use, or not ours, or needs a privilege.
pub fn bind(listen: &Listen, workers: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let first = bind_one(listen.address)?;
    // With port 0 the first socket has chosen, and the others share what it got.
    let address = first.local_addr()?;
    let others = (1..workers).map(|_| bind_one(address));
    let listeners = std::iter::once(Ok(first)).chain(others).collect::<io::Result<Vec<_>>>()?;
    let effective = effective_backlog();
    if effective < BACKLOG {
        Event::BacklogCapped { asked: BACKLOG, effective }.emit();
    }
    Event::Listening { address, tls: listen.tls.is_some(), backlog_effective: effective }.emit();
    Ok(listeners)
}

fn bind_one(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(i32::try_from(BACKLOG).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// What the kernel makes of `BACKLOG`; as asked where it does not say.
fn effective_backlog() -> u32 {
    let cap = std::fs::read_to_string("/proc/sys/net/core/somaxconn").ok().and_then(|text| text.trim().parse().ok());
    cap.map_or(BACKLOG, |cap: u32| cap.min(BACKLOG))
}

label! {
    /// Why a connection was closed as it arrived.
    Refused, "reason", {
        /// The process holds all it may.
        Total = "connections",
        /// The address holds all it may.
        PerAddress = "connections_per_ip",
    }
}

/// What counts as one address: IPv4 whole, IPv6 by its /64, which is what one subscriber gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Origin {
    V4(u32),
    V6(u64),
}

impl Origin {
    /// `ip` is canonical: an IPv4 address mapped into IPv6 would share one /64 with all others.
    fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Origin::V4(ip.to_bits()),
            IpAddr::V6(ip) => Origin::V6((ip.to_bits() >> 64) as u64),
        }
    }

    fn shard(self) -> usize {
        let bits = match self {
            Origin::V4(bits) => u64::from(bits),
            Origin::V6(bits) => bits,
        };
        // Fibonacci hashing: neighbouring addresses fall into different shards.
        (bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize % SHARDS
    }
}

/// All connections of the process: counts, limits, and the way from worker to worker.
pub struct Floor {
    settings: ArcSwap<Settings>,
    total: AtomicUsize,
    workers: Box<[Worker]>,
    /// Holds only addresses with a connection, so `Settings::connections` bounds it.
    addresses: [Mutex<HashMap<Origin, usize, foldhash::fast::RandomState>>; SHARDS],
    accepted: Counter,
    handed_over: Counter,
    refused: Counters<Refused>,
}

/// On a cache line of its own: written with every connection of this worker, read with every one of the others.
#[repr(align(64))]
struct Worker {
    connections: AtomicUsize,
    incoming: mpsc::Sender<HandedOver>,
    receiver: Mutex<Option<mpsc::Receiver<HandedOver>>>,
}

/// A connection between two runtimes.
struct HandedOver {
    stream: std::net::TcpStream,
    listener: usize,
    peer: SocketAddr,
    local: SocketAddr,
    permit: Permit,
}

/// A connection to be served.
pub struct Accepted {
    /// With `TCP_NODELAY` set.
    pub stream: TcpStream,
    /// Which listener it came in by (`Door::listener`).
    pub listener: usize,
    /// Canonical: IPv4 is never written as IPv6.
    pub peer: SocketAddr,
    pub local: SocketAddr,
    /// To be kept as long as the connection.
    pub permit: Permit,
}

/// The right to hold one connection; its drop gives the counts back.
pub struct Permit {
    floor: Arc<Floor>,
    worker: usize,
    origin: Origin,
}

impl Floor {
    pub fn new(workers: usize, settings: Settings) -> Arc<Floor> {
        let worker = |_| {
            let (incoming, receiver) = mpsc::channel(HAND_OVER_MAX);
            Worker { connections: AtomicUsize::new(0), incoming, receiver: Mutex::new(Some(receiver)) }
        };
        Arc::new(Floor {
            settings: ArcSwap::from_pointee(settings),
            total: AtomicUsize::new(0),
            workers: (0..workers).map(worker).collect(),
            addresses: Default::default(),
            accepted: Counter::default(),
            handed_over: Counter::default(),
            refused: Counters::default(),
        })
    }

    /// New limits, for connections accepted from now on.
    pub fn set(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    /// Connections that stand now.
    pub fn connections(&self) -> usize {
        self.total.load(Relaxed)
    }

    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Connections that `worker` holds now.
    pub fn connections_of(&self, worker: usize) -> usize {
        self.workers[worker].connections.load(Relaxed)
    }

    /// What other workers hand to this one; each worker takes its end once.
    ///
    /// # Panics
    /// When taken twice: a bug of the caller.
    pub fn incoming(self: &Arc<Self>, worker: usize) -> Incoming {
        let receiver = self.workers[worker].receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        Incoming(receiver.expect("each worker takes its incoming connections once"))
    }

    fn admit(self: &Arc<Self>, worker: usize, ip: IpAddr) -> Result<Permit, Refused> {
        let settings = self.settings.load();
        if self.total.fetch_add(1, Relaxed) >= settings.connections {
            self.total.fetch_sub(1, Relaxed);
            return Err(Refused::Total);
        }
        let origin = Origin::of(ip);
        let mut addresses = self.addresses(origin);
        if addresses.get(&origin).copied().unwrap_or_default() >= settings.connections_per_ip {
            self.total.fetch_sub(1, Relaxed);
            return Err(Refused::PerAddress);
        }
        *addresses.entry(origin).or_default() += 1;
        drop(addresses);
        self.workers[worker].connections.fetch_add(1, Relaxed);
        Ok(Permit { floor: Arc::clone(self), worker, origin })
    }

    fn addresses(&self, origin: Origin) -> MutexGuard<'_, HashMap<Origin, usize, foldhash::fast::RandomState>> {
        self.addresses[origin.shard()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lightest worker, where `worker` (the new connection left out) holds clearly more: two more while there are
    /// few, an eighth of the mean more when there are many, so that short connections stay where they are.
    fn lighter_than(&self, worker: usize) -> Option<usize> {
        let own = self.connections_of(worker).saturating_sub(1);
        let counts = (0..self.workers.len()).map(|other| (self.connections_of(other), other));
        let (least, lightest) = counts.min()?;
        let mean = self.connections() / self.workers.len();
        (own > least + 1 + mean / 8).then_some(lightest)
    }
}

impl Permit {
    fn move_to(&mut self, worker: usize) {
        self.floor.workers[self.worker].connections.fetch_sub(1, Relaxed);
        self.floor.workers[worker].connections.fetch_add(1, Relaxed);
        self.worker = worker;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.floor.total.fetch_sub(1, Relaxed);
        self.floor.workers[self.worker].connections.fetch_sub(1, Relaxed);
        if let Entry::Occupied(mut held) = self.floor.addresses(self.origin).entry(self.origin) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }
}

/// A worker's end of the hand-over.
pub struct Incoming(mpsc::Receiver<HandedOver>);

impl Incoming {
    /// The next connection from another worker, on the calling runtime; `None` when the floor is gone. Cancel safe.
    pub async fn next(&mut self) -> Option<Accepted> {
        loop {
            let HandedOver { stream, listener, peer, local, permit } = self.0.recv().await?;
            match TcpStream::from_std(stream) {
                Ok(stream) => return Some(Accepted { stream, listener, peer, local, permit }),
                // The runtime cannot watch it (no memory for that); the client sees a closed connection.
                Err(error) => tracing::debug!(%error, "a connection was lost on its way to another worker"),
            }
        }
    }
}

/// One listening socket of one worker.
pub struct Door {
    pub socket: std::net::TcpListener,
    /// Says in `Accepted` which listener a connection came in by, also after it was handed over.
    pub listener: usize,
    pub worker: usize,
    pub floor: Arc<Floor>,
}

impl Door {
    /// Accepts until `stop` is over, then takes what the kernel holds already, and closes.
    /// `handle` gets what this worker serves itself; it must not block. Cancel safe.
    ///
    /// # Errors
    /// A socket that the runtime cannot watch.
    pub async fn run(self, stop: impl Future<Output = ()>, handle: impl Fn(Accepted)) -> io::Result<()> {
        let mut stop = std::pin::pin!(stop);
        let Door { socket, listener, worker, floor } = self;
        let socket = TcpListener::from_std(socket)?;
        let hall = Hall { listener, worker, floor };
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stop => break,
                accepted = socket.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => hall.receive(stream, peer, &handle),
                Err(error) if concerns_one_connection(&error) => {}
                Err(error) => {
                    Event::AcceptPaused { error: &error }.emit();
                    tokio::select! {
                        () = &mut stop => break,
                        () = tokio::time::sleep(PAUSE) => {}
                    }
                }
            }
        }
        hall.receive_rest(&socket.into_std()?, &handle)
    }
}

/// Behind the door: where connections are counted in and shown to their worker.
struct Hall {
    listener: usize,
    worker: usize,
    floor: Arc<Floor>,
}

impl Hall {
    fn receive(&self, stream: TcpStream, peer: SocketAddr, handle: &impl Fn(Accepted)) {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let permit = match self.floor.admit(self.worker, peer.ip()) {
            Ok(permit) => permit,
            Err(reason) => {
                self.floor.refused.inc(reason);
                Event::ConnectionRefused { reason: reason.as_str(), client: peer.ip() }.emit();
                return;
            }
        };
        self.floor.accepted.inc();
        // Either fails only where the client is gone already.
        let Ok(local) = stream.set_nodelay(true).and_then(|()| stream.local_addr()) else { return };
        let local = SocketAddr::new(local.ip().to_canonical(), local.port());
        let accepted = Accepted { stream, listener: self.listener, peer, local, permit };
        if let Some(accepted) = self.hand_over(accepted) {
            handle(accepted);
        }
    }

    /// Closing the socket would reset connections that the kernel has completed, whose clients may have sent requests.
    /// The socket is asked itself: the runtime knows only of what had arrived when it last looked.
    fn receive_rest(&self, socket: &std::net::TcpListener, handle: &impl Fn(Accepted)) -> io::Result<()> {
        for _ in 0..BACKLOG {
            let Ok((stream, peer)) = socket.accept() else { break };
            stream.set_nonblocking(true)?;
            self.receive(TcpStream::from_std(stream)?, peer, handle);
        }
        Ok(())
    }

    /// Gives the connection back where it stays on this worker.
    fn hand_over(&self, accepted: Accepted) -> Option<Accepted> {
        let Some(lightest) = self.floor.lighter_than(self.worker) else { return Some(accepted) };
        let Ok(slot) = self.floor.workers[lightest].incoming.try_reserve() else { return Some(accepted) };
        let Accepted { stream, listener, peer, local, mut permit } = accepted;
        // A stream that cannot leave its runtime is broken; its permit goes with it.
        let stream = stream.into_std().ok()?;
        permit.move_to(lightest);
        slot.send(HandedOver { stream, listener, peer, local, permit });
        self.floor.handed_over.inc();
        None
    }
}

/// Whether only the connection that was being accepted has failed; anything else would fail again at once.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut | WouldBlock)
}

/// Exposes the counts of `floor`.
pub fn expose(floor: &Arc<Floor>) {
    let of = |read: fn(&Floor) -> u64| {
        let floor = Arc::clone(floor);
        move || read(&floor)
    };
    let open = of(|floor| floor.connections() as u64);
    metrics::expose_gauge_with("tidegate_connections", "Client connections that stand now.", move |emit| {
        emit(&[], open() as f64);
    });
    let accepted = of(|floor| floor.accepted.get());
    metrics::expose_counter_with("tidegate_connections_accepted", "Client connections accepted.", move |emit| {
        emit(&[], accepted());
    });
    let handed_over = of(|floor| floor.handed_over.get());
    metrics::expose_counter_with(
        "tidegate_connections_handed_over",
        "Client connections given to a worker that held fewer.",
        move |emit| emit(&[], handed_over()),
    );
    let floor = Arc::clone(floor);
    metrics::expose_counter_with(
        "tidegate_connections_refused",
        "Client connections closed as they arrived, by the limit that was reached.",
        move |emit| {
            for reason in Refused::ALL {
                emit(&[(Refused::NAME, reason.as_str())], floor.refused.get(*reason));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn floor(workers: usize, connections: usize, connections_per_ip: usize) -> Arc<Floor> {
        Floor::new(workers, Settings { connections, connections_per_ip })
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn what_is_over_a_limit_is_refused_and_drops_give_back() {
        let floor = floor(1, 3, 2);
        let first = floor.admit(0, ip("192.0.2.1")).ok();
        let second = floor.admit(0, ip("192.0.2.1")).ok();
        assert_eq!(floor.admit(0, ip("192.0.2.1")).err(), Some(Refused::PerAddress));
        let third = floor.admit(0, ip("192.0.2.2")).ok();
        assert_eq!(floor.admit(0, ip("192.0.2.3")).err(), Some(Refused::Total));
        assert_eq!((floor.connections(), floor.connections_of(0)), (3, 3));
        drop((first, second, third));
        assert_eq!((floor.connections(), floor.connections_of(0)), (0, 0));
        assert!(floor.addresses.iter().all(|shard| shard.lock().expect("not poisoned").is_empty()));
        floor.set(Settings { connections: 1, connections_per_ip: 1 });
        let _held = floor.admit(0, ip("192.0.2.1")).ok();
        assert_eq!(floor.admit(0, ip("192.0.2.2")).err(), Some(Refused::Total));
    }

    #[test]
    fn an_ipv6_subscriber_is_one_address() {
        let floor = floor(1, 10, 1);
        let _held = floor.admit(0, ip("2001:db8:0:1::1")).ok();
        assert_eq!(floor.admit(0, ip("2001:db8:0:1:ffff::2")).err(), Some(Refused::PerAddress));
        assert!(floor.admit(0, ip("2001:db8:0:2::1")).is_ok());
    }

    #[test]
    fn only_clear_imbalance_moves_a_connection() {
        let floor = floor(2, 10_000, 10_000);
        let mut held = Vec::new();
        let mut add = |worker, count: usize| {
            held.extend((0..count).map(|_| floor.admit(worker, ip("192.0.2.1")).ok()));
            floor.lighter_than(worker)
        };
        // The connection in question is already counted.
        assert_eq!(add(0, 1), None);
        assert_eq!(add(0, 1), None);
        assert_eq!(add(0, 1), Some(1));
        assert_eq!(add(1, 1), None);
        assert_eq!((add(0, 1_000), add(1, 998)), (Some(1), None));
        assert_eq!((add(0, 100), add(0, 100)), (None, Some(1)));
    }

    #[test]
    fn descriptors_running_out_is_no_matter_of_one_connection() {
        assert!(concerns_one_connection(&io::ErrorKind::ConnectionAborted.into()));
        for exhausted in [23, 24, 12, 105] {
            assert!(!concerns_one_connection(&io::Error::from_raw_os_error(exhausted)));
        }
    }

    #[test]
    fn every_worker_listens_on_the_port_that_was_chosen() {
        let sockets = bind(&Listen { address: ANYWHERE, tls: None }, 3).expect("a free port");
        let address = sockets[0].local_addr().expect("bound");
        assert!(address.port() != 0 && sockets.len() == 3);
        assert!(sockets.iter().all(|socket| socket.local_addr().ok() == Some(address)));
    }

    /// Long connections that all reach one worker end up evenly on all.
    #[tokio::test]
    async fn connections_spread_over_the_workers() {
        let floor = floor(3, 100, 100);
        let socket = bind(&Listen { address: ANYWHERE, tls: None }, 1).expect("a free port").remove(0);
        let address = socket.local_addr().expect("bound");
        let door = Door { socket, listener: 7, worker: 0, floor: Arc::clone(&floor) };
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let stopped = async { stopped.await.expect("sent") };
        let kept = RefCell::new(Vec::new());
        let clients = async {
            let mut clients = Vec::new();
            for _ in 0..9 {
                clients.push(TcpStream::connect(address).await.expect("listening"));
            }
            while floor.connections() < 9 {
                tokio::task::yield_now().await;
            }
            stop.send(()).expect("received");
            clients
        };
        let (clients, ran) = tokio::join!(clients, door.run(stopped, |accepted| kept.borrow_mut().push(accepted)));
        ran.expect("watched");
        assert_eq!((0..3).map(|worker| floor.connections_of(worker)).collect::<Vec<_>>(), [4, 3, 2]);
        let accepted = floor.incoming(1).next().await.expect("handed over");
        let locals: Vec<_> = clients.iter().map(|client| client.local_addr().ok()).collect();
        assert!(accepted.listener == 7 && accepted.local == address && locals.contains(&Some(accepted.peer)));
        assert!(accepted.stream.nodelay().expect("open"));
        assert_eq!((floor.accepted.get(), floor.handed_over.get(), kept.borrow().len()), (9, 5, 4));
        drop((accepted, kept));
    }

    #[tokio::test]
    async fn what_the_kernel_holds_is_served_after_the_stop() {
        let floor = floor(1, 1, 1);
        let socket = bind(&Listen { address: ANYWHERE, tls: None }, 1).expect("a free port").remove(0);
        let address = socket.local_addr().expect("bound");
        let _client = TcpStream::connect(address).await.expect("listening");
        let _refused = TcpStream::connect(address).await.expect("listening");
        let served = RefCell::new(Vec::new());
        let door = Door { socket, listener: 0, worker: 0, floor: Arc::clone(&floor) };
        door.run(std::future::ready(()), |accepted| served.borrow_mut().push(accepted)).await.expect("watched");
        assert_eq!((served.borrow().len(), floor.refused.get(Refused::Total)), (1, 1));
    }
}
