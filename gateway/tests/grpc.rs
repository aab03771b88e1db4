//! gRPC through the gateway, with the client and the server of grpcio: calls of all four kinds,
//! metadata, statuses, deadlines, cancellation, and the gateway's own failures.
//!
//! The tests need Python and the package grpcio, which they install into `~/.cache/tidegate/grpc`.
//! Without Python or a package index they are skipped, and say so.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use bytes::Bytes;
use support::h2_origin::{H2Origin, H2OriginOptions};
use support::tls::LISTEN_TLS;
use support::tls_origin::Authority;
use support::{Gateway, Process, STEP_TIMEOUT, TempDir, free_address};

const GRPCIO: &str = "grpcio==1.85.3";

/// A Python with grpcio; `None`, with a message, where there is none.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    let install = || {
        let dir = PathBuf::from(std::env::var_os("HOME")?).join(".cache/tidegate/grpc");
        let python = dir.join("bin/python");
        let succeeds = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let has_grpcio = || succeeds(Command::new(&python).args(["-c", "import grpc"]));
        let is_there = has_grpcio()
            || succeeds(Command::new("python3").args(["-m", "venv"]).arg(&dir))
                && succeeds(Command::new(&python).args(["-m", "pip", "install", "-q", GRPCIO]))
                && has_grpcio();
        if !is_there {
            eprintln!("SKIPPED: gRPC is not tested, because {GRPCIO} could not be installed into {}", dir.display());
        }
        is_there.then_some(python)
    };
    PYTHON.get_or_init(install).as_deref()
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/grpc").join(name)
}

/// A gRPC server with a port in clear text and one with TLS.
struct Server {
    _process: Process,
    plain: String,
    secure: String,
}

/// A directory with the certificates of the authority `ca.pem`: for the server, and for the gateway
/// as its listener names them.
fn directory() -> TempDir {
    let (authority, dir) = (Authority::new("ours"), TempDir::new());
    authority.write(&dir);
    let server = authority.sign("shop.test", |_| {});
    dir.write("server.pem", &server.pem);
    dir.write("server.key", &server.key_pem);
    let gateway = authority.sign("gateway.test", |_| {});
    dir.write("tls.crt", &gateway.pem);
    dir.write("tls.key", &gateway.key_pem);
    dir
}

fn start_server(python: &Path, dir: &TempDir) -> Server {
    let mut command = Command::new(python);
    command.arg(script("server.py")).arg(dir.path().join("server.key")).arg(dir.path().join("server.pem"));
    let process = Process::start(&mut command);
    let Some(ports) = process.stdout.find(STEP_TIMEOUT, |_| true) else {
        panic!("no server: {}", process.stderr.all().join("\n"))
    };
    let (plain, secure) = ports.split_once(' ').expect("two ports");
    Server {
        plain: format!("h2c://127.0.0.1:{plain}"),
        secure: format!("https://127.0.0.1:{secure}"),
        _process: process,
    }
}

fn gateway(dir: TempDir, endpoint: &str, (upstream, route, rest): (&str, &str, &str)) -> Gateway {
    let tls = if endpoint.starts_with("https") { "tls = { ca = \"ca.pem\", server_name = \"shop.test\" }" } else { "" };
    let config = format!(
        "version = 1\n[server]\nworkers = 2\n[upstreams.shop]\nendpoints = [\"{endpoint}\"]\n\
         breaker = {{ minimum = 1000 }}\n{tls}\n{upstream}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/tidegate.Test/*\" }}\nupstream = \"shop\"\n{route}\n{rest}\n{LISTEN_TLS}"
    );
    Gateway::start_in(dir, &config)
}

/// Runs checks of `client.py` through `gateway`.
#[track_caller]
fn check(python: &Path, gateway: &Gateway, checks: &[&str]) {
    let ca = gateway.dir.path().join("ca.pem").display().to_string();
    check_with(python, (gateway, &ca), checks);
}

/// As `check`; `ca`: the file of the authority, or `-` without TLS.
#[track_caller]
fn check_with(python: &Path, (gateway, ca): (&Gateway, &str), checks: &[&str]) {
    let mut command = Command::new(python);
    command.arg(script("client.py")).arg(gateway.address.to_string()).arg(ca);
    let output = command.args(checks).output().expect("a client");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let passed: Vec<String> = checks.iter().map(|check| format!("ok {check}")).collect();
    assert!(text.lines().take(passed.len()).eq(passed.iter().map(String::as_str)), "{text}");
}

#[test]
fn calls_of_all_kinds_pass_in_clear_text_and_over_tls() {
    let Some(python) = python() else { return };
    let checks = ["unary", "streams", "messages_pass_at_once", "bidi", "statuses", "concurrent", "deadline", "unary"];
    for is_secure in [false, true] {
        let dir = directory();
        let server = start_server(python, &dir);
        let endpoint = if is_secure { &server.secure } else { &server.plain };
        check(python, &gateway(dir, endpoint, ("eject = { after = 0 }", "", "")), &checks);
    }
}

#[test]
fn calls_pass_from_a_client_without_tls() {
    let Some(python) = python() else { return };
    let dir = directory();
    let server = start_server(python, &dir);
    let config = format!(
        "version = 1\n[upstreams.shop]\nendpoints = [\"{}\"]\neject = {{ after = 0 }}\nbreaker = {{ minimum = 1000 }}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/tidegate.Test/*\" }}\nupstream = \"shop\"\n\
         [[listen]]\naddress = \"127.0.0.1:0\"\nhttp2 = true\n",
        server.plain
    );
    let gateway = Gateway::start_in(dir, &config);
    check_with(
        python,
        (&gateway, "-"),
        &["unary", "streams", "messages_pass_at_once", "bidi", "statuses", "concurrent", "deadline"],
    );
}

#[test]
fn cancelled_call_is_cancelled_at_the_server() {
    let Some(python) = python() else { return };
    let dir = directory();
    let server = start_server(python, &dir);
    check(python, &gateway(dir, &server.plain, ("", "", "")), &["cancellation"]);
}

/// A server whose responses begin with one message and then fail as their path says.
fn broken_server() -> H2Origin {
    H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let path = stream.request.uri().path().trim_start_matches("/tidegate.Test/").to_owned();
        let mut head = http::Response::builder().header("content-type", "application/grpc");
        if path == "Length" {
            head = head.header("content-length", "100");
        }
        let head = head.body(()).expect("a response");
        let mut body = stream.respond.send_response(head, false).expect("an open stream");
        body.send_data(Bytes::from_static(b"\0\0\0\0\x01a"), false).expect("an open stream");
        // The client ends its side once it has the message.
        drop(stream.body().await);
        match path.strip_prefix("Reset").and_then(|code| code.parse::<u32>().ok()) {
            Some(code) => return body.send_reset(code.into()),
            None if path == "Silent" => {}
            None => stream.control.abort.notify_one(),
        }
        // A stream that is dropped would be reset.
        std::future::pending::<()>().await;
    })
}

#[test]
fn call_that_fails_inside_its_response_ends_with_a_status() {
    let Some(python) = python() else { return };
    let origin = broken_server();
    let endpoint = format!("h2c://{}", origin.address);
    let gateway_with = |keys| gateway(directory(), &endpoint, (keys, "", ""));
    let all = gateway_with("idle_timeout = \"300ms\"\neject = { after = 0 }");
    check(python, &all, &["broken_streams", "announced_length"]);
    assert_eq!(all.metric("tidegate_timeouts_total{clock=\"upstream_body\"}"), 1.0);
    assert_eq!(all.metric("tidegate_responses_aborted_total{reason=\"body_failed\"}"), 10.0);
    check(python, &gateway_with("total_timeout = \"300ms\""), &["total_inside"]);
    let dir = directory();
    let server = start_server(python, &dir);
    check(python, &gateway(dir, &server.plain, ("", "", "")), &["server_leaves"]);
}

#[test]
fn failures_of_the_gateway_have_statuses_of_grpc() {
    let Some(python) = python() else { return };
    let dead = format!("h2c://{}", free_address());
    check(python, &gateway(directory(), &dead, ("", "", "")), &["unavailable"]);
    let dir = directory();
    let server = start_server(python, &dir);
    let limit = "[limits.few]\ntier = \"node\"\nrate = \"1/h\"\nburst = 1";
    let cases = [
        ("timeout = \"300ms\"", "", "", "gateway_deadline"),
        ("total_timeout = \"300ms\"", "", "", "gateway_total"),
        ("", "limits = [\"few\"]", limit, "limited_after_one"),
        ("", "auth = { api_keys = \"keys.txt\", header = \"x-api-key\" }", "", "unauthenticated"),
        ("", "body_bytes = \"1MiB\"", "", "too_large"),
    ];
    for (upstream, route, rest, name) in cases {
        let dir = directory();
        dir.write("keys.txt", "");
        check(python, &gateway(dir, &server.plain, (upstream, route, rest)), &[name]);
    }
    let gateway = gateway(directory(), &server.plain, ("", "", ""));
    gateway.rewrite(
        &std::fs::read_to_string(gateway.dir.path().join("tidegate.toml"))
            .expect("a file")
            .replace("/tidegate.Test/*", "/x"),
    );
    support::wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    check(python, &gateway, &["unimplemented"]);
}
