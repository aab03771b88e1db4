//! The service manager: socket activation (`LISTEN_FDS`) and notifications (`NOTIFY_SOCKET`), as
//! systemd does them.

mod support;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use support::{
    Client, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, free_address, one_route, tidegate, wait_for,
};

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "ok"))
}

/// Starts the program with `socket` as the descriptor 3, as systemd passes it.
fn start_with_socket(socket: TcpListener, file: &Path) -> Process {
    let program = tidegate().get_program().to_owned();
    let script = "exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" run --config \"$1\"";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(program).arg(file);
    let child = command.stdin(Stdio::from(OwnedFd::from(socket)));
    Process::start_with_input(child)
}

fn write(dir: &TempDir, origin: &Origin, address: SocketAddr) -> std::path::PathBuf {
    let rest =
        format!("[server]\nworkers = 3\n[[listen]]\naddress = \"{address}\"\n[admin]\naddress = \"127.0.0.1:0\"\n");
    dir.write("a.toml", &format!("version = 1\n{}", one_route(origin.address, "", &rest)))
}

#[test]
fn connections_from_before_the_start_are_served() {
    let (origin, dir) = (origin(), TempDir::new());
    let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = socket.local_addr().expect("bound");
    // The manager keeps its copy.
    let managed = socket.try_clone().expect("a descriptor");
    let mut early = Client::connect(address);
    early.send_get("/", &[]);
    let file = write(&dir, &origin, address);
    let mut first = start_with_socket(socket, &file);
    assert_eq!(early.read_response().status, 200);
    let listening = first.stderr.find(STEP_TIMEOUT, |line| line.contains("\"listening\"")).expect("a listener");
    assert!(listening.contains("systemd"), "{listening}");
    for _ in 0..30 {
        assert_eq!(Client::connect(address).get("/", &[]).status, 200);
    }
    first.signal("INT");
    assert_eq!(first.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
    // Between two processes, connections wait in the queue.
    let mut between = Client::connect(address);
    between.send_get("/", &[]);
    let _second = start_with_socket(managed, &file);
    assert_eq!(between.read_response().status, 200);
}

#[test]
fn socket_that_the_configuration_does_not_name_is_refused() {
    let (origin, dir) = (origin(), TempDir::new());
    let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = socket.local_addr().expect("bound");
    let mut process = start_with_socket(socket, &write(&dir, &origin, free_address()));
    assert_eq!(process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(1));
    let error = process.stderr.find(STEP_TIMEOUT, |line| line.contains(&address.to_string()));
    assert!(error.is_some_and(|line| line.contains("[[listen]]")), "{:?}", process.stderr.all());
}

fn receive(manager: &UnixDatagram) -> String {
    let mut buffer = [0; 512];
    let length = manager.recv(&mut buffer).expect("a notification");
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

#[test]
fn states_are_notified() {
    let (origin, dir) = (origin(), TempDir::new());
    let socket = dir.path().join("notify");
    let manager = UnixDatagram::bind(&socket).expect("writable");
    manager.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let config = one_route(origin.address, "", "[server]\nupgrade_socket = \"up.sock\"\n");
    let gateway = Gateway::start_with(dir, &config, |command| {
        command.env("NOTIFY_SOCKET", &socket);
    });
    assert!(receive(&manager).starts_with("READY=1\n"));
    gateway.process.signal("HUP");
    let reloading = receive(&manager);
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert!(receive(&manager).starts_with("READY=1\n"));
    // The main process names its successor before that one says that it is ready.
    let file = gateway.dir.path().join("tidegate.toml");
    let run = &mut tidegate();
    let successor = Process::start(run.args(["run", "--upgrade", "--config"]).arg(file).env("NOTIFY_SOCKET", &socket));
    let handed_over = receive(&manager);
    assert!(handed_over.starts_with(&format!("MAINPID={}\n", successor.id())), "{handed_over}");
    assert!(receive(&manager).starts_with("READY=1\n"));
    wait_for(|| !successor.stderr.events("ready").is_empty(), STEP_TIMEOUT);
    successor.signal("TERM");
    assert!(receive(&manager).starts_with("STOPPING=1\n"));
}

#[test]
fn manager_that_is_gone_is_reported_and_nothing_else_changes() {
    let origin = origin();
    let gateway = Gateway::start_with(TempDir::new(), &one_route(origin.address, "", ""), |command| {
        command.env("NOTIFY_SOCKET", "/nonexistent/notify");
    });
    wait_for(|| !gateway.process.stderr.events("notify_failed").is_empty(), STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).status, 200);
}
