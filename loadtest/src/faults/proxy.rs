//! A TCP proxy with faults: accepts connections, opens one to the upstream for each, and relays
//! both directions as its plan says. The plan may change at any time and then applies to open
//! connections too.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;
use socket2::SockRef;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::faults::plan::{Direction, FaultPlan};
use crate::faults::relay::{FaultRelay, RelayCounts, RelayEnd};
use crate::servers::listen::listen;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for both sides to read the end of a cut connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Further connections wait in the backlog.
const CONNECTIONS_MAX: usize = 10_000;

/// A running proxy; it ends on drop, and its connections with it.
pub(crate) struct FaultProxy {
    address: SocketAddr,
    plan: watch::Sender<Arc<FaultPlan>>,
    counts: Arc<ProxyCounts>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Debug, Default)]
struct ProxyCounts {
    accepted: AtomicU64,
    open: AtomicU64,
    refused: AtomicU64,
    unreachable: AtomicU64,
    cut: AtomicU64,
    reset: AtomicU64,
    up: Arc<RelayCounts>,
    down: Arc<RelayCounts>,
}

/// Counts of a proxy since its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ProxyReport {
    pub(crate) accepted: u64,
    pub(crate) open: u64,
    /// Connections that were reset because the plan refuses them. Excludes those that found no
    /// listener.
    pub(crate) refused: u64,
    /// Connections for which the upstream could not be reached.
    pub(crate) unreachable: u64,
    pub(crate) cut: u64,
    pub(crate) reset: u64,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
    pub(crate) corrupted_bytes: u64,
}

/// The parts that connections share.
struct ProxyState {
    upstream: SocketAddr,
    seed: u64,
    plan: watch::Receiver<Arc<FaultPlan>>,
    counts: Arc<ProxyCounts>,
}

impl FaultProxy {
    /// Starts on a thread of its own. Port 0 is any free one.
    pub(crate) fn start(address: SocketAddr, upstream: SocketAddr, (plan, seed): (FaultPlan, u64)) -> io::Result<Self> {
        let first = listen(address)?;
        let address = first.local_addr()?;
        let (sender, receiver) = watch::channel(Arc::new(plan));
        let counts = Arc::new(ProxyCounts::default());
        let shared = Arc::clone(&counts);
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
            let state = ProxyState { upstream, seed, plan: receiver, counts: shared };
            runtime.block_on(accept(first, address, Rc::new(state)))
        };
        let thread = thread::Builder::new().name("faults".to_owned()).spawn(serve)?;
        Ok(FaultProxy { address, plan: sender, counts, thread: Some(thread) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn plan(&self) -> Arc<FaultPlan> {
        self.plan.borrow().clone()
    }

    /// Replaces the plan; open connections follow it from their next piece of bytes on.
    pub(crate) fn set_plan(&self, plan: FaultPlan) {
        self.plan.send_replace(Arc::new(plan));
    }

    /// Whether its thread still runs.
    pub(crate) fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    pub(crate) fn report(&self) -> ProxyReport {
        let counts = &self.counts;
        ProxyReport {
            accepted: counts.accepted.load(Relaxed),
            open: counts.open.load(Relaxed),
            refused: counts.refused.load(Relaxed),
            unreachable: counts.unreachable.load(Relaxed),
            cut: counts.cut.load(Relaxed),
            reset: counts.reset.load(Relaxed),
            bytes_up: counts.up.bytes.load(Relaxed),
            bytes_down: counts.down.bytes.load(Relaxed),
            corrupted_bytes: counts.up.corrupted.load(Relaxed) + counts.down.corrupted.load(Relaxed),
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        // The thread ends when the plan's sender is gone.
        let (closed, _) = watch::channel(Arc::new(FaultPlan::default()));
        drop(std::mem::replace(&mut self.plan, closed));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Accepts connections until the plan's sender is gone.
async fn accept(first: std::net::TcpListener, address: SocketAddr, state: Rc<ProxyState>) -> io::Result<()> {
    let mut listener = Some(TcpListener::from_std(first)?);
    let mut plan = state.plan.clone();
    let mut connections = JoinSet::new();
    let mut number = 0_u64;
    loop {
        let refuses_all = plan.borrow_and_update().refuses_all();
        if refuses_all {
            listener = None;
        } else if listener.is_none() {
            listener = Some(TcpListener::from_std(listen(address)?)?);
        }
        let has_room = connections.len() < CONNECTIONS_MAX;
        let next = async {
            match &listener {
                Some(listener) if has_room => listener.accept().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = plan.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
            Some(_) = connections.join_next() => {}
            accepted = next => {
                // Out of descriptors: closed connections free some.
                let Ok((client, _)) = accepted else { tokio::task::yield_now().await; continue };
                number += 1;
                state.counts.accepted.fetch_add(1, Relaxed);
                let state = Rc::clone(&state);
                connections.spawn_local(async move {
                    state.counts.open.fetch_add(1, Relaxed);
                    state.serve(client, number).await;
                    state.counts.open.fetch_sub(1, Relaxed);
                });
            }
        }
    }
}

impl ProxyState {
    /// Relays one connection to its end.
    async fn serve(&self, mut client: TcpStream, number: u64) {
        let draw = (self.seed, number);
        let mut plan = self.plan.clone();
        // A connection that hangs from its start has no upstream.
        loop {
            let effects = plan.borrow_and_update().effects(Direction::Up, draw);
            if effects.refuses {
                self.counts.refused.fetch_add(1, Relaxed);
                return reset(&client);
            }
            if !effects.hangs {
                break;
            }
            if plan.changed().await.is_err() {
                return;
            }
        }
        let Ok(Ok(mut upstream)) = timeout(CONNECT_TIMEOUT, TcpStream::connect(self.upstream)).await else {
            self.counts.unreachable.fetch_add(1, Relaxed);
            return reset(&client);
        };
        let (client_nodelay, upstream_nodelay) = (client.set_nodelay(true), upstream.set_nodelay(true));
        if client_nodelay.and(upstream_nodelay).is_err() {
            return;
        }
        match self.relay((&mut client, &mut upstream), draw).await {
            Ok(RelayEnd::Closed) => {}
            Ok(RelayEnd::Cut) => {
                self.counts.cut.fetch_add(1, Relaxed);
                close((client, upstream)).await;
            }
            Ok(RelayEnd::Reset) | Err(_) => {
                self.counts.reset.fetch_add(1, Relaxed);
                reset(&client);
                reset(&upstream);
            }
        }
    }

    async fn relay(&self, sides: (&mut TcpStream, &mut TcpStream), draw: (u64, u64)) -> io::Result<RelayEnd> {
        let (from_client, to_client) = sides.0.split();
        let (from_upstream, to_upstream) = sides.1.split();
        let side = |direction, counts: &Arc<RelayCounts>| FaultRelay {
            direction,
            draw,
            plan: self.plan.clone(),
            counts: Arc::clone(counts),
        };
        let (up, down) = (side(Direction::Up, &self.counts.up), side(Direction::Down, &self.counts.down));
        let (up, down) = (up.run(from_client, to_upstream), down.run(from_upstream, to_client));
        tokio::pin!(up, down);
        let (mut up_ended, mut down_ended) = (false, false);
        let mut plan = self.plan.clone();
        while !(up_ended && down_ended) {
            let end = tokio::select! {
                end = &mut up, if !up_ended => { up_ended = true; end? }
                end = &mut down, if !down_ended => { down_ended = true; end? }
                changed = plan.changed() => {
                    changed.map_err(io::Error::other)?;
                    let refuses = plan.borrow_and_update().effects(Direction::Up, draw).refuses;
                    if refuses { RelayEnd::Reset } else { continue }
                }
            };
            if end != RelayEnd::Closed {
                return Ok(end);
            }
        }
        Ok(RelayEnd::Closed)
    }
}

/// Closes with RST when the stream is dropped.
fn reset(stream: &TcpStream) {
    // Without the option it closes with FIN, or with RST if bytes are unread.
    drop(SockRef::from(stream).set_linger(Some(Duration::ZERO)));
}

/// Closes both sides with FIN, and reads what still comes: unread bytes would make it a RST.
async fn close((mut client, mut upstream): (TcpStream, TcpStream)) {
    let ends = async {
        for stream in [&mut client, &mut upstream] {
            if SockRef::from(&*stream).shutdown(std::net::Shutdown::Write).is_err() {
                continue;
            }
            let mut buffer = [0; 4_096];
            while stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        }
    };
    drop(timeout(CLOSE_TIMEOUT, ends).await);
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener as StdListener, TcpStream as StdStream};
    use std::time::Instant;

    use super::*;

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    /// An upstream that echoes, and a proxy before it.
    fn proxy(plan: &str) -> FaultProxy {
        let upstream = StdListener::bind(ANY).expect("a port");
        let address = upstream.local_addr().expect("an address");
        thread::spawn(move || {
            for stream in upstream.incoming() {
                let mut stream = stream.expect("a connection");
                thread::spawn(move || {
                    let mut buffer = [0; 4_096];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..length]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        FaultProxy::start(ANY, address, (FaultPlan::parse(plan).expect("a plan"), 1)).expect("a proxy")
    }

    fn client(proxy: &FaultProxy) -> StdStream {
        let stream = StdStream::connect(proxy.address()).expect("the proxy");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        stream
    }

    /// Sends `bytes` and reads the echo until the end of the connection or all have come.
    fn echo(stream: &mut StdStream, bytes: &[u8]) -> (Vec<u8>, io::Result<usize>) {
        let mut received = Vec::new();
        // A reset is reported once, by the write or by a read.
        if let Err(error) = stream.write_all(bytes) {
            return (received, Err(error));
        }
        let mut buffer = [0; 4_096];
        loop {
            match stream.read(&mut buffer) {
                Ok(length @ 1..) => received.extend_from_slice(&buffer[..length]),
                end => return (received, end),
            }
            if received.len() >= bytes.len() {
                return (received, Ok(1));
            }
        }
    }

    #[test]
    fn bytes_pass_unchanged_and_half_closed_connections_end() {
        let proxy = proxy("latency=1ms,jitter=3ms");
        let mut stream = client(&proxy);
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(100_000).collect();
        let (received, _) = echo(&mut stream, &bytes);
        assert!(received == bytes);
        stream.shutdown(std::net::Shutdown::Write).expect("an open connection");
        assert_eq!(stream.read(&mut [0; 1]).expect("an end"), 0);
        assert_eq!(proxy.report().bytes_down, 100_000);
    }

    #[test]
    fn latency_delays_and_drip_and_rate_pace() {
        for (plan, bytes, least) in [
            ("latency=150ms,direction=down", 10, 150),
            ("drip=5,direction=up", 10, 100),
            ("rate=1000,direction=down", 200, 150),
        ] {
            let proxy = proxy(plan);
            let began = Instant::now();
            let (received, _) = echo(&mut client(&proxy), &vec![7; bytes]);
            assert_eq!(received.len(), bytes, "{plan}");
            assert!(began.elapsed() >= Duration::from_millis(least), "{plan}: {:?}", began.elapsed());
        }
    }

    #[test]
    fn cut_ends_with_fin_and_reset_with_rst_after_their_bytes() {
        let proxy_with_cut = proxy("cut=1000,direction=down");
        let (received, end) = echo(&mut client(&proxy_with_cut), &[7; 3_000]);
        assert_eq!((received.len(), end.expect("a clean end")), (1_000, 0));
        assert_eq!(proxy_with_cut.report().cut, 1);
        let proxy_with_reset = proxy("reset=0,direction=down");
        let (received, end) = echo(&mut client(&proxy_with_reset), &[7; 3_000]);
        assert_eq!((received.len(), end.expect_err("RST").kind()), (0, io::ErrorKind::ConnectionReset));
        assert_eq!(proxy_with_reset.report().reset, 1);
    }

    #[test]
    fn corrupted_bytes_are_counted() {
        let proxy = proxy("corrupt=0.01,direction=up");
        let (received, _) = echo(&mut client(&proxy), &[0; 20_000]);
        let changed = received.iter().filter(|byte| **byte != 0).count() as u64;
        assert!(changed > 100 && proxy.report().corrupted_bytes == changed, "{changed}, {:?}", proxy.report());
    }

    #[test]
    fn plan_changes_apply_to_open_connections() {
        let proxy = proxy("");
        let mut stream = client(&proxy);
        assert_eq!(echo(&mut stream, b"one").0, b"one");
        proxy.set_plan(FaultPlan::parse("hang").expect("a plan"));
        stream.write_all(b"two").expect("room");
        stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        assert!(stream.read(&mut [0; 3]).is_err(), "nothing is forwarded");
        proxy.set_plan(FaultPlan::default());
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let mut two = [0; 3];
        stream.read_exact(&mut two).expect("what waited");
        assert_eq!(&two, b"two");

        proxy.set_plan(FaultPlan::parse("refuse").expect("a plan"));
        assert_eq!(stream.read(&mut two).expect_err("RST").kind(), io::ErrorKind::ConnectionReset);
        let deadline = Instant::now() + Duration::from_secs(5);
        while StdStream::connect(proxy.address()).is_ok() {
            assert!(Instant::now() < deadline, "there is still a listener");
        }
        proxy.set_plan(FaultPlan::default());
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut again = loop {
            match StdStream::connect(proxy.address()) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        assert_eq!(echo(&mut again, b"three").0, b"three");
    }
}
