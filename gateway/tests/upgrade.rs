//! Binary upgrades: a new process takes the listening sockets of a running one, and no request is
//! lost.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::{
    Client, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, free_address, one_route, tidegate, wait_for,
};

const SERVER: &str = "[server]\nupgrade_socket = \"up.sock\"\ndrain_idle = \"1s\"\n";

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=600")], "ok"))
}

fn config(origin: &Origin, rest: &str) -> String {
    one_route(origin.address, "", &format!("{SERVER}{rest}"))
}

fn file(gateway: &Gateway) -> PathBuf {
    gateway.dir.path().join("tidegate.toml")
}

/// Starts the program on the configuration file of `gateway`, to take over.
fn start_successor(gateway: &Gateway) -> Process {
    Process::start(tidegate().args(["run", "--upgrade", "--config"]).arg(file(gateway)))
}

/// Takes over from `gateway`, whose process ends by itself.
#[track_caller]
fn upgrade(gateway: &mut Gateway) {
    let successor = start_successor(gateway);
    wait_for(|| !successor.stderr.events("ready").is_empty(), STEP_TIMEOUT);
    assert_eq!(successor.stderr.events("took_over").len(), 1);
    let mut old = std::mem::replace(&mut gateway.process, successor);
    wait_for(|| !old.stderr.events("handed_over").is_empty(), STEP_TIMEOUT);
    assert_eq!(old.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0), "{:?}", old.stderr.all());
    assert!(old.stderr.events("drain_timed_out").is_empty());
}

/// Clients that never retry, over new and kept connections, while `during` runs. Any lost request
/// is a panic. Returns the number of requests.
fn under_load(address: SocketAddr, target: &str, during: impl FnOnce()) -> u64 {
    let (is_over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (is_over, served) = (&is_over, &served);
            scope.spawn(move || {
                let mut kept = None;
                while !is_over.load(Ordering::Relaxed) {
                    let mut connection = kept.take().unwrap_or_else(|| Client::connect(address));
                    let response = connection.get(target, &[("host", "localhost")]);
                    assert_eq!(response.status, 200);
                    served.fetch_add(1, Ordering::Relaxed);
                    // Half of the clients use each connection once; some are idle for a while.
                    if number % 2 == 0 && response.field("connection") != Some("close") {
                        kept = Some(connection);
                    }
                    std::thread::sleep(Duration::from_millis(number * 5));
                }
            });
        }
        // A failure of `during` must not leave the clients running.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(during));
        is_over.store(true, Ordering::Relaxed);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    served.into_inner()
}

#[test]
fn no_request_is_lost_in_three_upgrades() {
    let origin = origin();
    let mut gateway = Gateway::start(&config(&origin, ""));
    let (address, admin) = (gateway.address, gateway.admin);
    let mut probed = 0;
    let served = under_load(address, "/", || {
        // Probes of readiness, likewise over new and kept connections.
        probed = under_load(admin, "/ready", || (0..3).for_each(|_| upgrade(&mut gateway)));
    });
    assert!(served > 200 && probed > 100, "{served} {probed}");
    let reported: Vec<SocketAddr> = gateway.process.stderr.events("listening").iter().map(address_of).collect();
    assert_eq!(reported, [address]);
}

fn address_of(event: &serde_json::Value) -> SocketAddr {
    event["address"].as_str().and_then(|text| text.parse().ok()).expect("an address")
}

/// The kernel assigns connections to all sockets of an address: each must be accepted from.
#[test]
fn number_of_workers_may_change() {
    let origin = origin();
    let with = |workers: usize| config(&origin, "").replace("[server]\n", &format!("[server]\nworkers = {workers}\n"));
    let mut gateway = Gateway::start(&with(3));
    for workers in [1, 4, 2] {
        gateway.rewrite(&with(workers));
        upgrade(&mut gateway);
        for _ in 0..60 {
            assert_eq!(gateway.get("/", &[]).status, 200);
        }
    }
}

#[test]
fn changed_addresses_are_bound_and_old_ones_close_after_the_drain() {
    let origin = origin();
    let (kept, removed, added) = (free_address(), free_address(), free_address());
    let admin = free_address();
    let with = |addresses: [SocketAddr; 2], admin: SocketAddr| {
        let listen = addresses.map(|address| format!("[[listen]]\naddress = \"{address}\"\n")).concat();
        config(&origin, &format!("{listen}[admin]\naddress = \"{admin}\"\n")).replace("1s", "3s")
    };
    let mut gateway = Gateway::start(&with([removed, kept], free_address()));
    let mut silent = Client::connect(removed);
    assert_eq!(silent.get("/", &[]).status, 200);
    let served = under_load(kept, "/", || {
        gateway.rewrite(&with([added, kept], admin));
        let successor = start_successor(&gateway);
        wait_for(|| !successor.stderr.events("ready").is_empty(), STEP_TIMEOUT);
        let handed_over = || gateway.process.stderr.events("handed_over");
        wait_for(|| !handed_over().is_empty(), STEP_TIMEOUT);
        let handed_over = handed_over();
        assert_eq!((handed_over[0]["listeners"].as_u64(), handed_over[0]["kept"].as_u64()), (Some(1), Some(1)));
        // Clients of the removed address do not know yet: they are served for `drain_idle`.
        let response = Client::connect(removed).get("/", &[]);
        assert_eq!((response.status, response.field("connection")), (200, Some("close")));
        assert_eq!(Client::connect(added).get("/", &[]).status, 200);
        assert_eq!(Client::connect(admin).get("/ready", &[]).status, 200);
        let mut old = std::mem::replace(&mut gateway.process, successor);
        assert_eq!(silent.get("/", &[]).status, 200);
        assert_eq!(old.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
        assert!(TcpStream::connect_timeout(&removed, STEP_TIMEOUT).is_err(), "closed with the old process");
    });
    assert!(served > 50, "{served}");
}

// Failures: the running process goes on.

#[test]
fn successor_that_fails_changes_nothing() {
    let origin = origin();
    let good = config(&origin, "");
    let gateway = Gateway::start(&good);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let in_use = format!("[[listen]]\naddress = \"{}\"\n", taken.local_addr().expect("bound"));
    let listen = format!("{in_use}[[listen]]\naddress = \"{}\"\n", gateway.address);
    // The first fails before it asks for the sockets, the second when it has them.
    let broken = [(good.replace("upstream = ", "upstraem = "), "upstraem"), (config(&origin, &listen), "in use")];
    let served = under_load(gateway.address, "/", || {
        for (text, expected) in &broken {
            gateway.rewrite(text);
            let mut successor = start_successor(&gateway);
            assert_eq!(successor.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(1));
            let error = successor.stderr.find(STEP_TIMEOUT, |line| line.contains(expected));
            assert!(error.is_some(), "{:?}", successor.stderr.all());
        }
        wait_for(|| gateway.process.stderr.events("upgrade_failed").len() == 1, STEP_TIMEOUT);
        assert_eq!(gateway.admin("/ready").status, 200);
    });
    assert!(served > 50 && gateway.process.stderr.events("handed_over").is_empty(), "{served}");
    assert_eq!(gateway.metric("tidegate_events_total{event=\"upgrade_failed\"}"), 1.0);
}

/// A process that has the sockets and ends before it accepts. The next one takes over.
#[test]
fn successor_killed_with_the_sockets_changes_nothing() {
    let origin = origin();
    let mut gateway = Gateway::start(&config(&origin, ""));
    let path = gateway.dir.path().join("up.sock");
    assert_eq!(std::fs::metadata(&path).expect("a socket").permissions().mode() & 0o777, 0o600);
    let served = under_load(gateway.address, "/", || {
        let mut stream = UnixStream::connect(&path).expect("an upgrade socket");
        stream.write_all(b"{\"message\":\"hello\",\"protocol\":1,\"version\":\"0.0.1\"}\n").expect("it reads");
        let lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
        let kinds = lines.map_while(Result::ok).map(|line| {
            let message: serde_json::Value = serde_json::from_str(&line).expect("a line of JSON");
            message["message"].as_str().expect("a kind").to_owned()
        });
        let mut kinds = kinds.take_while(|kind| kind != "complete");
        assert!(kinds.by_ref().all(|kind| kind == "listener" || kind == "admin"));
        drop((kinds, stream));
        wait_for(|| gateway.process.stderr.events("upgrade_failed").len() == 1, STEP_TIMEOUT);
        for wrong in [&b"{\"message\":\"hello\",\"protocol\":9,\"version\":\"9\"}\n"[..], b"GET / HTTP/1.1\r\n\r\n"] {
            let mut stream = UnixStream::connect(&path).expect("an upgrade socket");
            stream.write_all(wrong).expect("it reads");
            let answer = BufReader::new(stream).lines().next().expect("an answer").expect("an answer");
            assert!(answer.contains("refused"), "{answer}");
        }
        upgrade(&mut gateway);
    });
    assert!(served > 50, "{served}");
}

/// A successor that `strace` kills by SIGKILL at a system call: before the `number`-th call of
/// `name` is made. `None` without strace.
fn start_killed_successor(gateway: &Gateway, (name, number): (&str, usize)) -> Option<Process> {
    let mut strace = Command::new("strace");
    let inject = format!("inject={name}:signal=KILL:when={number}");
    strace.args(["-f", "-qq", "-e", &format!("trace={name}"), "-e", &inject, "-o"]);
    strace.arg(gateway.dir.path().join("calls")).arg("--").arg(tidegate().get_program());
    strace.args(["run", "--upgrade", "--config"]).arg(file(gateway));
    Command::new("strace").arg("-V").output().is_ok().then(|| Process::start(&mut strace))
}

/// Events `upgrade_failed` of the running process, by whether the successor had asked for sockets.
const BEFORE: usize = 0;
const WITH_SOCKETS: usize = 1;

/// SIGKILL at each stage of a start: the running process goes on, says so where it has sent its
/// sockets, and hands over to the next one.
#[test]
fn successor_killed_at_any_stage_of_its_start_changes_nothing() {
    let stages = [
        // Its configuration is checked, and the running process does not know of it.
        ("connect", 1, BEFORE),
        // It has asked for the sockets, and waits for the first message.
        ("recvmsg", 1, WITH_SOCKETS),
        // It has one of two listeners.
        ("recvmsg", 2, WITH_SOCKETS),
        // It has all sockets, and has created the file of its own upgrade socket.
        ("chmod,fchmodat", 1, WITH_SOCKETS),
        // It starts its threads.
        ("clone3,clone", 2, WITH_SOCKETS),
    ];
    let origin = origin();
    let with_two =
        format!("[[listen]]\naddress = \"{}\"\n[[listen]]\naddress = \"{}\"\n", free_address(), free_address());
    let mut gateway = Gateway::start(&config(&origin, &with_two));
    let mut failures = 0;
    let mut kill_at = |gateway: &Gateway, (name, number, failed): (&str, usize, usize)| {
        let Some(mut successor) = start_killed_successor(gateway, (name, number)) else {
            println!("SKIPPED: strace is not installed");
            return;
        };
        let status = successor.wait(STEP_TIMEOUT).expect("it is killed");
        // strace ends as its process does.
        assert_eq!(status.signal(), Some(9), "{name} {number}: {status} {:?}", successor.stderr.all());
        assert!(successor.stderr.events("ready").is_empty(), "{name} {number}");
        failures += failed;
        let events = || gateway.process.stderr.events("upgrade_failed");
        wait_for(|| events().len() == failures, STEP_TIMEOUT);
        if failed > 0 {
            let event = events().pop().expect("it has failed");
            assert_eq!(
                (&event["level"], event["error"].as_str().map(|error| error.contains("the successor ended"))),
                (&"ERROR".into(), Some(true)),
                "{event}"
            );
        }
        assert_eq!(gateway.admin("/ready").status, 200);
    };
    let served = under_load(gateway.address, "/", || stages.iter().for_each(|stage| kill_at(&gateway, *stage)));
    assert!(served > 50, "{served}");
    // It accepts connections, and is about to say so. A connection that it has accepted ends with
    // it; kept ones of the running process do not.
    let mut kept = gateway.connect();
    assert_eq!(kept.get("/", &[]).status, 200);
    kill_at(&gateway, ("sendmsg", 2, WITH_SOCKETS));
    assert_eq!(kept.get("/", &[]).status, 200);
    assert!(gateway.process.stderr.events("handed_over").is_empty());
    let served = under_load(gateway.address, "/", || upgrade(&mut gateway));
    assert!(served > 50, "{served}");
    assert_eq!(upgrade_sockets(&gateway), ["up.sock"], "killed ones leave nothing");
}

/// Names of the upgrade sockets in the directory of a gateway.
fn upgrade_sockets(gateway: &Gateway) -> Vec<String> {
    let entries = std::fs::read_dir(gateway.dir.path()).expect("its directory").map_while(Result::ok);
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("up.sock")).collect()
}

/// The running process sees the end of a successor that it has started itself.
#[test]
fn successor_of_sigusr2_that_is_killed_changes_nothing() {
    let origin = origin();
    let mut gateway = Gateway::start(&config(&origin, ""));
    // Stopped before it can take over.
    let pid = || gateway.process.stderr.events("successor_started").last().and_then(|event| event["pid"].as_u64());
    gateway.process.signal("USR2");
    wait_for(|| pid().is_some(), STEP_TIMEOUT);
    let kill = Command::new("kill").args(["-KILL", &pid().expect("its id").to_string()]).status();
    assert!(kill.is_ok_and(|status| status.success()));
    wait_for(|| !gateway.process.stderr.events("upgrade_failed").is_empty(), STEP_TIMEOUT);
    let failed = gateway.process.stderr.events("upgrade_failed");
    assert!(
        failed.iter().any(|event| event["error"].as_str().is_some_and(|error| error.contains("signal: 9"))),
        "{failed:?}"
    );
    assert_eq!(gateway.get("/", &[]).status, 200);
    let served = under_load(gateway.address, "/", || upgrade(&mut gateway));
    assert!(served > 50, "{served}");
}

#[test]
fn upgrade_without_a_running_gateway_fails_with_a_hint() {
    let origin = origin();
    let dir = TempDir::new();
    let listen = "[[listen]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"127.0.0.1:0\"\n";
    let file = dir.write("a.toml", &format!("version = 1\n{}", config(&origin, listen)));
    let without = dir.write("b.toml", &format!("version = 1\n{}", one_route(origin.address, "", listen)));
    let path = dir.path().join("up.sock");
    // A file that an earlier process has left.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("writable"));
    for (file, expected) in [(&file, "no gateway answers"), (&without, "--upgrade=SOCKET")] {
        let output = tidegate().args(["run", "--upgrade", "--config"]).arg(file).output().expect("it runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && errors.contains(expected), "{errors}");
    }
    let run = || Process::start(tidegate().args(["run", "--config"]).arg(&file));
    let first = run();
    wait_for(|| !first.stderr.events("ready").is_empty(), STEP_TIMEOUT);
    let mut second = run();
    assert_eq!(second.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(1));
    assert!(second.stderr.find(STEP_TIMEOUT, |line| line.contains("another gateway answers")).is_some());
    first.signal("INT");
    wait_for(|| !path.exists(), STEP_TIMEOUT);
}

// SIGUSR2.

/// A process that the gateway has started, killed on drop.
struct Successor(u32);

impl Successor {
    fn of(gateway: &Gateway) -> Self {
        let event = || gateway.process.stderr.events("successor_started").pop();
        wait_for(|| event().is_some(), STEP_TIMEOUT);
        let pid = event().and_then(|event| event["pid"].as_u64()).expect("its id");
        Successor(u32::try_from(pid).expect("an id"))
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        drop(Command::new("kill").args(["-KILL", &self.0.to_string()]).status());
    }
}

#[test]
fn sigusr2_starts_a_successor() {
    let origin = origin();
    let good = config(&origin, "");
    let mut gateway = Gateway::start(&good);
    gateway.rewrite(&good.replace("upstream = ", "upstraem = "));
    gateway.process.signal("USR2");
    let failed = || gateway.process.stderr.events("upgrade_failed");
    wait_for(|| !failed().is_empty(), STEP_TIMEOUT);
    assert!(failed()[0]["error"].as_str().is_some_and(|error| error.contains("exit status: 1")), "{:?}", failed());
    gateway.rewrite(&good);
    let mut successor = None;
    let served = under_load(gateway.address, "/", || {
        gateway.process.signal("USR2");
        wait_for(|| gateway.process.stderr.events("successor_started").len() == 2, STEP_TIMEOUT);
        successor = Some(Successor::of(&gateway));
        assert_eq!(gateway.process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
    });
    // It writes to the same standard error.
    assert!(served > 50 && gateway.process.stderr.events("took_over").len() == 1, "{served}");
    assert_eq!(gateway.get("/", &[]).status, 200);
    drop(successor);
}

#[test]
fn sigusr2_without_an_upgrade_socket_is_refused() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.process.signal("USR2");
    let refused = gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains("upgrade_failed"));
    assert!(refused.is_some_and(|line| line.contains("server.upgrade_socket")));
    assert_eq!(gateway.get("/", &[]).status, 200);
}
