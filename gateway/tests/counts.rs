//! What is counted rather than timed: system calls, memory and descriptors.

mod support;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Client, Dir, Gateway, Origin, PATIENCE, Process, Script, lock, one_route, tidegate, wait_for};

/// One at a time: ten thousand connections of one test would be in the counts of another.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    lock(&ALONE)
}

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "body"))
}

/// Calls on sockets while `requests` requests for `target` are made one after the other; `None` where nothing can be traced.
fn socket_calls(gateway: &Gateway, target: &str, requests: usize) -> Option<usize> {
    let mut client = gateway.connect();
    (0..20).for_each(|_| drop(client.get(target, &[])));
    let file = gateway.dir.path().join("calls");
    let calls = "trace=recvfrom,recvmsg,readv,sendto,sendmsg,writev";
    let mut command = Command::new("strace");
    command.args(["-f", "-e", calls, "-o"]).arg(&file).arg("-p").arg(gateway.process.id().to_string());
    if Command::new("strace").arg("-V").output().is_err() {
        return None;
    }
    let mut strace = Process::start(&mut command);
    // One line for the process and each thread; then all of them are traced.
    strace.stderr.find(PATIENCE, |line| line.contains("attached") || line.contains("not permitted"))?;
    if strace.wait(Duration::from_millis(200)).is_some() {
        return None;
    }
    (0..requests).for_each(|_| assert_eq!(client.get(target, &[]).status, 200));
    strace.signal("INT");
    strace.wait(PATIENCE).expect("it ends when told");
    let text = std::fs::read_to_string(file).expect("the calls");
    // A call that was interrupted by another thread's has two lines, and its bracket in the first.
    let names = ["recvfrom(", "recvmsg(", "readv(", "sendto(", "sendmsg(", "writev("];
    Some(text.lines().filter(|line| names.iter().any(|name| line.contains(name))).count())
}

/// Per request, with room for the few that belong to no request.
#[track_caller]
fn assert_calls(calls: Option<usize>, requests: usize, each: usize) {
    match calls {
        Some(calls) => assert!((requests..=requests * each + requests / 10).contains(&calls), "{calls} for {requests}"),
        None => println!("SKIPPED: strace is not installed, or may not trace"),
    }
}

#[test]
fn a_hit_takes_two_system_calls_on_sockets_and_a_pass_through_four() {
    let _alone = alone();
    let origin = origin();
    let one_worker = "[server]\nworkers = 1\n";
    let gateway = Gateway::start(&one_route(origin.address, "", one_worker));
    assert_calls(socket_calls(&gateway, "/", 200), 200, 2);
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", one_worker));
    assert_calls(socket_calls(&gateway, "/", 200), 200, 4);
}

/// Lets this process open as many descriptors as it may; returns how many connections that allows.
fn descriptors() -> usize {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("up to the maximum");
    limit.maximum.map_or(usize::MAX, |maximum| usize::try_from(maximum).unwrap_or(usize::MAX)).saturating_sub(500)
}

fn crowded(origin: &Origin) -> Gateway {
    let limits = "[limits_http]\nconnections_per_ip = 100000\nheader_timeout = \"60s\"\n";
    Gateway::start(&one_route(origin.address, "", limits))
}

fn connections(gateway: &Gateway) -> usize {
    gateway.metric("tidegate_connections") as usize
}

#[test]
fn an_idle_connection_holds_little() {
    let _alone = alone();
    const COUNT: usize = 2_000;
    descriptors();
    let origin = origin();
    let gateway = crowded(&origin);
    let mut warm = gateway.connect();
    warm.get("/", &[]);
    let before = gateway.process.memory();
    let held: Vec<TcpStream> = (0..COUNT).map(|_| TcpStream::connect(gateway.address).expect("listening")).collect();
    wait_for(|| connections(&gateway) >= COUNT, PATIENCE);
    let each = gateway.process.memory().saturating_sub(before) / COUNT;
    // 1,795 bytes with optimisation, whose tasks are smaller; a read buffer alone would be 16 KiB.
    assert!(each <= 4_096, "{each} bytes for each idle connection");
    drop(held);
}

#[test]
fn ten_thousand_connections_at_once_are_all_taken() {
    let _alone = alone();
    const THREADS: usize = 8;
    let count = 10_000.min(descriptors()) / THREADS * THREADS;
    if count < 10_000 {
        println!("only {count} connections: the descriptor limit allows no more");
    }
    let origin = origin();
    let gateway = crowded(&origin);
    let address = gateway.address;
    let open = move || -> Vec<TcpStream> {
        (0..count / THREADS).map(|_| TcpStream::connect_timeout(&address, PATIENCE).expect("not refused")).collect()
    };
    let threads: Vec<_> = (0..THREADS).map(|_| thread::spawn(open)).collect();
    let mut held: Vec<TcpStream> = threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect();
    wait_for(|| connections(&gateway) >= count, PATIENCE);
    let mut asked = held.split_off(count - 100);
    for stream in &mut asked {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("a live socket");
    }
    for stream in asked {
        assert_eq!(Client::over(stream).head().status, 200);
    }
}

#[test]
fn running_out_of_descriptors_pauses_accepting_and_passes() {
    let _alone = alone();
    let origin = origin();
    let dir = Dir::new();
    let admin = support::free_address();
    let config = one_route(origin.address, "", "[server]\nworkers = 1\n");
    let listen = format!("[[listen]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"{admin}\"\n");
    let file = dir.write("tidegate.toml", &format!("version = 1\n{config}\n{listen}"));
    let binary = tidegate().get_program().to_owned();
    let limited = "ulimit -n 80; exec \"$0\" run --config \"$1\"";
    let process = Process::start(Command::new("sh").args(["-c", limited]).arg(binary).arg(file));
    let listening = process.stderr.find(PATIENCE, |line| line.contains("\"listening\"")).expect("it listens");
    let listening: serde_json::Value = serde_json::from_str(&listening).expect("a line of JSON");
    let address: SocketAddr = listening["address"].as_str().and_then(|text| text.parse().ok()).expect("an address");
    assert!(process.stderr.find(PATIENCE, |line| line.contains("\"ready\"")).is_some());
    let mut first = Client::connect(address);
    assert_eq!(first.get("/", &[]).status, 200);
    let held: Vec<TcpStream> = (0..120).map(|_| TcpStream::connect(address).expect("the backlog takes it")).collect();
    assert!(process.stderr.find(PATIENCE, |line| line.contains("\"accept_paused\"")).is_some());
    assert_eq!(first.get("/", &[]).status, 200, "those that were accepted are served");
    drop(held);
    let mut next = Client::connect_from(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9)), address);
    assert_eq!(next.get("/", &[]).status, 200);
}

#[test]
fn the_backlog_is_asked_for_and_what_the_kernel_makes_of_it_is_told() {
    let _alone = alone();
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let cap = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("a kernel's setting");
    let cap: u64 = cap.trim().parse().expect("a number");
    let listening = gateway.process.stderr.events("listening").remove(0);
    assert_eq!(listening["backlog_effective"].as_u64(), Some(cap.min(65_535)));
    assert_eq!(gateway.process.stderr.events("backlog_capped").is_empty(), cap >= 65_535);
}
