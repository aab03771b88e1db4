//! Counts instead of timings: system calls, memory and file descriptors.

mod support;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::frames::{Frame, WINDOW_UPDATE};
use support::tls::{self, LISTEN_TLS, write_certificate};
use support::{
    Client, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, frames, lock, one_route, tidegate, wait_for,
};

/// Serialises the tests: ten thousand connections of one test would change the counts of another.
fn serialise() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    lock(&LOCK)
}

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "body"))
}

/// Socket system calls during `requests` sequential requests for `target`; `None` if tracing is
/// impossible.
fn socket_calls(gateway: &Gateway, target: &str, requests: usize) -> Option<usize> {
    let mut client = gateway.connect();
    (0..20).for_each(|_| drop(client.get(target, &[])));
    traced(gateway, || (0..requests).for_each(|_| assert_eq!(client.get(target, &[]).status, 200)))
}

/// Socket system calls of a gateway during `load`; `None` if tracing is impossible.
fn traced(gateway: &Gateway, load: impl FnOnce()) -> Option<usize> {
    let file = gateway.dir.path().join("calls");
    let calls = "trace=recvfrom,recvmsg,readv,sendto,sendmsg,writev,shutdown,getsockname,setsockopt";
    let mut command = Command::new("strace");
    command.args(["-f", "-e", calls, "-o"]).arg(&file).arg("-p").arg(gateway.process.id().to_string());
    if Command::new("strace").arg("-V").output().is_err() {
        return None;
    }
    let mut strace = Process::start(&mut command);
    // strace prints a line when the process and all its threads are attached.
    strace.stderr.find(STEP_TIMEOUT, |line| line.contains("attached") || line.contains("not permitted"))?;
    if strace.wait(Duration::from_millis(200)).is_some() {
        return None;
    }
    load();
    strace.signal("INT");
    strace.wait(STEP_TIMEOUT).expect("strace ends on SIGINT");
    let text = std::fs::read_to_string(file).expect("the calls");
    // A call that overlaps with one of another thread has two lines; only the first has the
    // parenthesis.
    Some(text.lines().filter(|line| line.contains('(') && !line.contains("resumed")).count())
}

/// Asserts at most `each` calls per request, plus a few calls outside of requests.
#[track_caller]
fn assert_calls(calls: Option<usize>, requests: usize, each: usize) {
    match calls {
        Some(calls) => assert!((requests..=requests * each + requests / 10).contains(&calls), "{calls} for {requests}"),
        None => println!("SKIPPED: strace is not installed or not permitted to trace"),
    }
}

#[test]
fn hit_makes_two_socket_calls_and_pass_through_four() {
    let _serialised = serialise();
    let origin = origin();
    let one_worker = "[server]\nworkers = 1\n";
    let gateway = Gateway::start(&one_route(origin.address, "", one_worker));
    assert_calls(socket_calls(&gateway, "/", 200), 200, 2);
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", one_worker));
    assert_calls(socket_calls(&gateway, "/", 200), 200, 4);
}

/// Beside many other streams too, a short response is received by one call.
#[test]
fn short_response_to_one_of_many_streams_makes_two_calls_to_the_origin() {
    const STREAMS: u32 = 32;
    const BYTES: u32 = 2_000;
    let _serialised = serialise();
    let origin = Origin::start(|_| Script::ok(&[], [b'a'; BYTES as usize]));
    let one_worker = "[server]\nworkers = 1\n";
    let server = frames::Server::start(origin, "cache = { mode = \"off\" }", one_worker);
    let mut client = server.connect();
    let mut first = 1;
    let mut round = || {
        let streams: Vec<u32> = (0..STREAMS).map(|index| first + 2 * index).collect();
        let heads: Vec<u8> = streams.iter().flat_map(|stream| frames::get(*stream, "/").bytes()).collect();
        client.send_bytes(&heads);
        let mut open = STREAMS;
        while open > 0 {
            let frame = client.next_within(STEP_TIMEOUT).expect("a frame");
            open -= u32::from(frame.stream >= first && frame.ends_stream());
        }
        first += 2 * STREAMS;
        client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with((STREAMS * BYTES).to_be_bytes()));
    };
    // Opens the connections to the origin.
    round();
    let calls = traced(&server.gateway, || (0..5).for_each(|_| round()));
    // Those with the client carry several streams each: fewer than one for two.
    let requests = 5 * STREAMS as usize;
    assert_calls(calls.map(|calls| calls.saturating_sub(requests / 2)), requests, 2);
}

/// A TLS connection with one request: three calls for the handshake, two for the request, and one
/// for the end of the connection. The first byte, and the client's `Finished`, may arrive later.
#[test]
fn tls_connection_with_one_request_makes_eight_socket_calls() {
    const CONNECTIONS: usize = 50;
    let _serialised = serialise();
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let origin = origin();
    let gateway =
        Gateway::start_in(dir, &one_route(origin.address, "", &format!("[server]\nworkers = 1\n{LISTEN_TLS}")));
    let exchange = || assert_eq!(tls::connect(gateway.address, &trusted).get("/", &[]).status, 200);
    exchange();
    let calls = traced(&gateway, || (0..CONNECTIONS).for_each(|_| exchange()));
    assert_calls(calls, CONNECTIONS, 8);
}

/// Raises the descriptor limit of this process to its maximum; returns how many connections that
/// allows.
fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("up to the maximum");
    limit.maximum.map_or(usize::MAX, |maximum| usize::try_from(maximum).unwrap_or(usize::MAX)).saturating_sub(500)
}

fn gateway_for_many_connections(origin: &Origin) -> Gateway {
    let limits = "[limits_http]\nconnections_per_ip = 100000\nheader_timeout = \"60s\"\n";
    Gateway::start(&one_route(origin.address, "", limits))
}

fn connections(gateway: &Gateway) -> usize {
    gateway.metric("tidegate_connections") as usize
}

#[test]
fn idle_connection_uses_little_memory() {
    let _serialised = serialise();
    const COUNT: usize = 2_000;
    raise_descriptor_limit();
    let origin = origin();
    let gateway = gateway_for_many_connections(&origin);
    let mut warm = gateway.connect();
    warm.get("/", &[]);
    let before = gateway.process.memory();
    let open_connections: Vec<TcpStream> =
        (0..COUNT).map(|_| TcpStream::connect(gateway.address).expect("listening")).collect();
    wait_for(|| connections(&gateway) >= COUNT, STEP_TIMEOUT);
    let each = gateway.process.memory().saturating_sub(before) / COUNT;
    // 1,795 bytes in an optimised build, which has smaller tasks. A read buffer alone would be 16
    // KiB.
    assert!(each <= 4_096, "{each} bytes per idle connection");
    drop(open_connections);
}

#[test]
fn ten_thousand_concurrent_connections_are_accepted() {
    let _serialised = serialise();
    const THREADS: usize = 8;
    let count = 10_000.min(raise_descriptor_limit()) / THREADS * THREADS;
    if count < 10_000 {
        println!("only {count} connections because of the descriptor limit");
    }
    let origin = origin();
    let gateway = gateway_for_many_connections(&origin);
    let address = gateway.address;
    let open = move || -> Vec<TcpStream> {
        (0..count / THREADS).map(|_| TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("not refused")).collect()
    };
    let threads: Vec<_> = (0..THREADS).map(|_| thread::spawn(open)).collect();
    let mut open_connections: Vec<TcpStream> =
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect();
    wait_for(|| connections(&gateway) >= count, STEP_TIMEOUT);
    let mut active = open_connections.split_off(count - 100);
    for stream in &mut active {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("a live socket");
    }
    for stream in active {
        assert_eq!(Client::from_stream(stream).read_head().status, 200);
    }
}

#[test]
fn descriptor_exhaustion_pauses_accepting_temporarily() {
    let _serialised = serialise();
    let origin = origin();
    let dir = TempDir::new();
    let admin = support::free_address();
    let config = one_route(origin.address, "", "[server]\nworkers = 1\n");
    let listen = format!("[[listen]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"{admin}\"\n");
    let file = dir.write("tidegate.toml", &format!("version = 1\n{config}\n{listen}"));
    let binary = tidegate().get_program().to_owned();
    let limited = "ulimit -n 80; exec \"$0\" run --config \"$1\"";
    let process = Process::start(Command::new("sh").args(["-c", limited]).arg(binary).arg(file));
    let listening = process.stderr.find(STEP_TIMEOUT, |line| line.contains("\"listening\"")).expect("it listens");
    let listening: serde_json::Value = serde_json::from_str(&listening).expect("a line of JSON");
    let address: SocketAddr = listening["address"].as_str().and_then(|text| text.parse().ok()).expect("an address");
    assert!(process.stderr.find(STEP_TIMEOUT, |line| line.contains("\"ready\"")).is_some());
    let mut first = Client::connect(address);
    assert_eq!(first.get("/", &[]).status, 200);
    let open_connections: Vec<TcpStream> =
        (0..120).map(|_| TcpStream::connect(address).expect("the backlog has room")).collect();
    assert!(process.stderr.find(STEP_TIMEOUT, |line| line.contains("\"accept_paused\"")).is_some());
    assert_eq!(first.get("/", &[]).status, 200, "accepted connections are served");
    drop(open_connections);
    let mut next = Client::connect_from(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9)), address);
    assert_eq!(next.get("/", &[]).status, 200);
}

#[test]
fn effective_backlog_is_logged() {
    let _serialised = serialise();
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let cap = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("the kernel's setting");
    let cap: u64 = cap.trim().parse().expect("a number");
    let listening = gateway.process.stderr.events("listening").remove(0);
    assert_eq!(listening["backlog_effective"].as_u64(), Some(cap.min(65_535)));
    assert_eq!(gateway.process.stderr.events("backlog_capped").is_empty(), cap >= 65_535);
}
