//! The commands of `loadtest` as a user runs them: real processes, real sockets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const LOADTEST: &str = env!("CARGO_BIN_EXE_loadtest");
const WAIT: Duration = Duration::from_secs(30);

/// A process that is killed, by its id, when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).expect("a free port")
}

fn start(arguments: &[&str]) -> Running {
    let mut command = Command::new(LOADTEST);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running(command.spawn().expect("loadtest starts"))
}

/// An origin that serves two requests at a time, each for 20 ms: 100 requests per second.
fn origin() -> (Running, SocketAddr) {
    let address = free_address();
    let text = address.to_string();
    let running = start(&["origin", "--listen", &text, "--workers", "2", "--service-ms", "20"]);
    let deadline = Instant::now() + WAIT;
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "the origin does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    (running, address)
}

fn loadtest(arguments: &[&str]) -> Output {
    Command::new(LOADTEST).args(arguments).stdin(Stdio::null()).output().expect("loadtest runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Arguments of a short search.
fn knee(url: &str) -> Vec<String> {
    let arguments = format!(
        "knee --url {url} --start-rate 20 --max-rate 2000 --duration 1s --warm-up 200ms --bisections 2 --rounds 1 --p99 400ms --threads 1"
    );
    arguments.split(' ').map(str::to_owned).collect()
}

#[test]
fn knee_of_an_origin_with_a_known_capacity_is_found_and_reported() {
    let (_origin, address) = origin();
    let directory = std::env::temp_dir().join(format!("loadtest-knee-{}", std::process::id()));
    let mut arguments = knee(&format!("http://{address}/a?b=c"));
    arguments.extend(["--json".to_owned(), "--write".to_owned(), directory.display().to_string()]);
    let output = loadtest(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
    assert_eq!(report["end"], "complete", "{report}");
    let knee = report["knee"]["median"].as_f64().expect("a knee");
    // The capacity is 100 requests per second; a busy machine has less of it.
    assert!((20.0..=125.0).contains(&knee), "{knee}");
    // The origin slows down with a backlog, and clients give up: little is left at twice the knee.
    assert!(report["steps"].as_array().is_some_and(|steps| steps.len() >= 6), "{report}");
    assert_eq!(report["holds_past_knee"].as_bool(), Some(output.status.success()), "{report}");
    for name in ["knee.md", "knee.json", "knee.svg", "knee.html"] {
        let file = directory.join(name);
        assert!(std::fs::read_to_string(&file).is_ok_and(|text| text.len() > 500), "{}", file.display());
    }
    std::fs::remove_dir_all(&directory).expect("the directory exists");
    let progress = text(&output.stderr);
    assert!(progress.contains("step 1: 20/s: goodput") && !progress.contains('\r'), "{progress}");
}

#[test]
fn knee_that_is_interrupted_reports_what_was_measured() {
    let (_origin, address) = origin();
    let mut arguments = knee(&format!("http://{address}/"));
    arguments.push("--json".to_owned());
    let mut running = start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut progress = BufReader::new(running.0.stderr.take().expect("a pipe"));
    let mut line = String::new();
    progress.read_line(&mut line).expect("a line");
    assert!(line.contains("step 1"), "{line}");
    let id = running.0.id().to_string();
    assert!(Command::new("/bin/sh").args(["-c", "kill -INT $0", &id]).status().is_ok_and(|status| status.success()));
    let mut report = String::new();
    running.0.stdout.take().expect("a pipe").read_to_string(&mut report).expect("text");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["end"], "interrupted", "{report}");
    assert!(report["steps"].as_array().is_some_and(|steps| !steps.is_empty()), "{report}");
    assert_eq!(running.0.wait().expect("an end").code(), Some(130));
}

#[test]
fn nonsense_is_refused_with_a_hint() {
    let nowhere = format!("http://{}/", free_address());
    for (arguments, status, hint) in [
        ("--url ftp://a.example/", 2, "http:// or https:// is needed"),
        ("--url http://127.0.0.1:1/ --p99 2s", 2, "--timeout"),
        ("--url http://127.0.0.1:1/ --start-rate 100 --max-rate 50", 2, "not below"),
        ("--url http://127.0.0.1:1/ --connections 0", 2, "--connections"),
        ("--url http://127.0.0.1:1/ --duration 5", 2, "write 250ms"),
        ("--url http://127.0.0.1:1/ --header broken", 2, "`Name: value`"),
        (&format!("--url {nowhere}"), 1, "is the service running?"),
    ] {
        let arguments: Vec<&str> = std::iter::once("knee").chain(arguments.split(' ')).collect();
        let output = loadtest(&arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(hint), "{arguments:?}: {}", text(&output.stderr));
    }
    let output = loadtest(&["faults", "--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1", "--fault", "latncy=1ms"]);
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("there are latency"), "{output:?}");
}

/// The body of one exchange with the control address.
fn control(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("the control address");
    stream.set_read_timeout(Some(WAIT)).expect("a timeout");
    stream.write_all(request.as_bytes()).expect("room");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("text");
    response.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}

#[test]
fn faults_change_over_the_control_address_and_by_lines() {
    let (_origin, origin) = origin();
    let (listen, control_address) = (free_address(), free_address());
    let [listen_text, origin_text, control_text] = [listen, origin, control_address].map(|address| address.to_string());
    let mut running =
        start(&["faults", "--listen", &listen_text, "--upstream", &origin_text, "--control", &control_text]);
    let mut lines = BufReader::new(running.0.stdout.take().expect("a pipe")).lines();
    for expected in ["listening on", "control on", "a line of faults"] {
        let line = lines.next().expect("a line").expect("text");
        assert!(line.starts_with(expected), "{line}");
    }
    let exchange = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect(listen)?;
        stream.set_read_timeout(Some(WAIT))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
        stream.read(&mut [0; 1_024])
    };
    assert!(exchange().expect("a response") > 10);
    let plan = r#"{"rules": [{"cut_after_bytes": 0, "direction": "down"}]}"#;
    let length = plan.len();
    let reply = control(control_address, &format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{plan}"));
    assert!(reply.contains("\"cut_after_bytes\":0"), "{reply}");
    assert_eq!(exchange().expect("a clean end"), 0);
    let mut stdin = running.0.stdin.take().expect("a pipe");
    stdin.write_all(b"nonsense\nclear\n").expect("room");
    let shown = lines.next().expect("a line").expect("text");
    assert!(shown.contains("\"rules\":[]") && shown.contains("\"cut\":1"), "{shown}");
    assert!(exchange().expect("a response") > 10);
    let id = running.0.id().to_string();
    assert!(Command::new("/bin/sh").args(["-c", "kill -TERM $0", &id]).status().is_ok_and(|status| status.success()));
    assert!(running.0.wait().expect("an end").success());
}

/// The gateway that `cargo build --package gateway` has built.
fn tidegate() -> Option<PathBuf> {
    let tidegate = PathBuf::from(LOADTEST).with_file_name("tidegate");
    if !tidegate.is_file() {
        eprintln!("SKIPPED: {} is missing: cargo build --package gateway", tidegate.display());
        return None;
    }
    Some(tidegate)
}

#[test]
fn restarts_lose_no_request() {
    let Some(tidegate) = tidegate() else { return };
    let tidegate = tidegate.display().to_string();
    let arguments = ["restarts", "--requests", "3000", "--drain-idle", "1s", "--clients", "8", "--json"];
    let output = loadtest(&[&arguments[..], &["--tidegate", &tidegate]].concat());
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
    assert!(output.status.success() && figures["lost"] == 0 && figures["unclean_ends"] == 0, "{figures}");
    let at_least = |name: &str, least: u64| figures[name].as_u64().is_some_and(|count| count >= least);
    assert!(at_least("requests", 3_000) && at_least("restarts", 1) && at_least("new_connections", 100), "{figures}");
    assert!(at_least("kept_connections", 1_000), "{figures}");
    let output = loadtest(&["restarts", "--drain-idle", "10ms"]);
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("--drain-idle"), "{output:?}");
}

/// Plays cheap field cases.
#[test]
fn field_cases_are_played_from_the_real_binary() {
    let Some(tidegate) = tidegate() else { return };
    let directory = std::env::temp_dir().join(format!("loadtest-field-cases-{}", std::process::id()));
    let (write, tidegate) = (directory.display().to_string(), tidegate.display().to_string());
    let arguments =
        ["field-cases", "--only", "leaks,error-pipeline,cancel", "--short", "--write", &write, "--tidegate", &tidegate];
    let output = loadtest(&arguments);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    let page = std::fs::read_to_string(directory.join("field-cases.md")).expect("the page");
    std::fs::remove_dir_all(&directory).expect("the directory exists");
    for case in ["leaks", "error-pipeline", "cancel"] {
        assert!(page.contains(&format!("| [`{case}`](#{case}) | pass |")), "{page}");
    }
}
