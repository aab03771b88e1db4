//! The process: commands, reloads, shutdown, logs and the admin address, and TLS.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use support::{
    Client, Gate, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, free_address, one_route, tidegate, wait_for,
};

fn run(arguments: &[&str]) -> Output {
    tidegate().args(arguments).output().expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

// Commands.

#[test]
fn version_and_help_go_to_standard_output() {
    let version = run(&["--version"]);
    let commit = match env!("TIDEGATE_COMMIT") {
        "unknown" => String::new(),
        commit => format!(" ({commit})"),
    };
    let expected = format!("tidegate {}{commit}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((version.status.code(), text(&version.stdout)), (Some(0), expected));
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for command in ["demo", "run", "check"] {
        assert!(text(&help.stdout).contains(command), "{command}");
        assert_eq!(run(&[command, "--help"]).status.code(), Some(0), "{command}");
    }
    for wrong in [&["run"][..], &["frobnicate"], &[], &["check"], &["run", "--config", "a", "--upstream", "b"]] {
        let output = run(wrong);
        assert!(output.status.code() == Some(2) && !output.stderr.is_empty(), "{wrong:?}");
    }
}

#[test]
fn run_upstream_needs_no_file() {
    let origin = Origin::start(|_| Script::ok(&[], "behind"));
    let (url, listen, admin) =
        (format!("http://{}", origin.address), free_address().to_string(), free_address().to_string());
    let process = Process::start(tidegate().args(["run", "--upstream", &url, "--listen", &listen, "--admin", &admin]));
    wait_for(|| !process.stderr.events("ready").is_empty(), STEP_TIMEOUT);
    let listen = listen.parse().expect("an address");
    assert_eq!(Client::connect(listen).get("/", &[]).text(), "behind");
}

#[test]
fn run_reports_the_error_and_fails() {
    let dir = TempDir::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("a port");
    let config = one_route(free_address(), "", "");
    let bad = dir.write("bad.toml", "version = 1\nnonsense = true\n");
    let admin_taken = dir.write(
        "taken.toml",
        &format!("version = 1\n{config}[admin]\naddress = \"{address}\"\n[[listen]]\naddress = \"127.0.0.1:0\"\n"),
    );
    for (file, expected) in [(bad, "nonsense"), (admin_taken, "in use"), (dir.path().join("none.toml"), "none.toml")] {
        let mut process = Process::start(tidegate().args(["run", "--config"]).arg(&file));
        let status = process.wait(STEP_TIMEOUT).expect("an exit");
        assert_eq!(status.code(), Some(1), "{}", file.display());
        assert!(
            process.stderr.find(STEP_TIMEOUT, |line| line.contains(expected)).is_some(),
            "{:?}",
            process.stderr.all()
        );
    }
}

/// Sockets of several workers share an address; a second process must not join them.
#[test]
fn second_process_on_the_same_address_fails() {
    let config = one_route(free_address(), "", "");
    let gateway = Gateway::start(&config);
    let dir = TempDir::new();
    let listen = format!("[admin]\naddress = \"127.0.0.1:0\"\n[[listen]]\naddress = \"{}\"\n", gateway.address);
    let file = dir.write("second.toml", &format!("version = 1\n{config}{listen}"));
    let mut second = Process::start(tidegate().args(["run", "--config"]).arg(&file));
    assert_eq!(second.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(1));
    let expected = format!("tidegate: cannot listen on {}", gateway.address);
    let error = second.stderr.find(STEP_TIMEOUT, |line| line.starts_with(&expected));
    assert!(error.is_some_and(|line| line.contains("in use")), "{:?}", second.stderr.all());
    assert!(second.stderr.events("listening").is_empty());
    drop(gateway);
    let third = Process::start(tidegate().args(["run", "--config"]).arg(&file));
    wait_for(|| !third.stderr.events("ready").is_empty(), STEP_TIMEOUT);
}

#[test]
fn check_accepts_the_example_and_binds_no_address() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tidegate.example.toml");
    let example = example.to_str().expect("a readable path");
    let check = |arguments: &[&str], secret: &str| {
        tidegate().args(arguments).env("REDIS_SECRET", secret).output().expect("it runs")
    };
    let output = check(&["check", example], "0123456789abcdef");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    assert!(text(&output.stdout).contains("valid"));
    let json = check(&["check", "--json", "--deny-warnings", example], "0123456789abcdef");
    let faults: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!((json.status.code(), faults), (Some(0), serde_json::json!([])));
    // Without its secret, the example has one warning.
    let output = check(&["check", example], "");
    assert!(output.status.success() && text(&output.stderr).contains("without a secret"), "{output:?}");
    assert_eq!(check(&["check", "--deny-warnings", example], "").status.code(), Some(1));
    // An address that is in use is not a fault of the file.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let dir = TempDir::new();
    let address = taken.local_addr().expect("a port");
    let file =
        dir.write("a.toml", &format!("version = 1\n{}[admin]\naddress = \"{address}\"\n", one_route(address, "", "")));
    assert_eq!(run(&["check", file.to_str().expect("a path")]).status.code(), Some(0));
}

#[test]
fn check_reports_all_faults_with_their_locations() {
    let dir = TempDir::new();
    let file = dir.write(
        "bad.toml",
        "version = 1\n[servr]\n[upstreams.a]\nendpoints = [\"http://127.0.0.1:1\"]\ntimout = \"1s\"\nconnect_timeout = \"x\"\n\
         [[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"b\"\njournal = {}\n",
    );
    let path = file.to_str().expect("a path");
    let output = run(&["check", path]);
    assert_eq!(output.status.code(), Some(1));
    let report = text(&output.stderr);
    for expected in [
        "bad.toml:2:",
        "did you mean `server`?",
        "bad.toml:5:1",
        "did you mean `timeout`?",
        "bad.toml:6:",
        "unknown upstream `b`",
        "bad.toml:11:",
        "not available yet",
    ] {
        assert!(report.contains(expected), "{expected}\n{report}");
    }
    let json = run(&["check", path, "--json"]);
    let faults: Vec<serde_json::Value> = serde_json::from_slice(&json.stdout).expect("JSON");
    let lines: Vec<u64> = faults.iter().filter_map(|fault| fault["line"].as_u64()).collect();
    assert_eq!((json.status.code(), lines), (Some(1), vec![2, 5, 6, 10, 11]), "{faults:#?}");
    assert!(
        faults
            .iter()
            .all(|fault| fault["column"].is_u64() && fault["message"].is_string() && fault["path"].is_string())
    );
}

#[test]
fn configuration_may_be_json() {
    let dir = TempDir::new();
    let json = serde_json::json!({
        "version": 1,
        "upstreams": {"a": {"endpoints": ["http://127.0.0.1:1"]}},
        "routes": [{"name": "all", "match": {"path": "/*"}, "upstream": "a"}],
    });
    let good = dir.write("a.json", &json.to_string());
    let bad = dir.write("b.json", &json.to_string().replace("\"name\"", "\"nam\""));
    assert_eq!(run(&["check", good.to_str().expect("a path")]).status.code(), Some(0));
    assert_eq!(run(&["check", bad.to_str().expect("a path")]).status.code(), Some(1));
}

// Reloads.

#[test]
fn changed_file_reloads_on_open_connections() {
    let (old, new) = (Origin::start(|_| Script::ok(&[], "old")), Origin::start(|_| Script::ok(&[], "new")));
    let gateway = Gateway::start(&one_route(old.address, "cache = { mode = \"off\" }", ""));
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).text(), "old");
    gateway.rewrite(&one_route(new.address, "cache = { mode = \"off\" }", ""));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    assert_eq!(client.get("/", &[]).text(), "new", "the same connection");
}

#[test]
fn reload_invalidates_cached_caller() {
    let origin = Origin::start(|_| Script::ok(&[], "passed"));
    let config = one_route(origin.address, "cache = { mode = \"off\" }", "");
    let gateway = Gateway::start(&config);
    let mut client = gateway.connect();
    // Never idle for so long that the connection discards the cached caller.
    let mut status_after_reload = |count: usize| {
        wait_for(
            || {
                client.get("/", &[]);
                gateway.process.stderr.events("reloaded").len() == count
            },
            STEP_TIMEOUT,
        );
        client.get("/", &[]).status
    };
    gateway.rewrite(&format!("{config}[access]\ndenied = [\"127.0.0.0/8\"]\n"));
    assert_eq!(status_after_reload(1), 403, "the deny list changed");
    gateway.rewrite(&config.replace("path = \"/*\"", "path = \"/elsewhere\""));
    assert_eq!(status_after_reload(2), 404, "the routes changed");
    gateway.rewrite(&config);
    assert_eq!(status_after_reload(3), 200);
}

#[test]
fn sighup_reloads_without_closing_connections() {
    let origin = Origin::start(|_| Script::ok(&[], "body"));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let mut client = gateway.connect();
    client.get("/", &[]);
    gateway.process.signal("HUP");
    let reloaded = || gateway.process.stderr.events("reloaded").iter().any(|event| event["source"] == "signal");
    wait_for(reloaded, STEP_TIMEOUT);
    assert_eq!(client.get("/", &[]).text(), "body");
    assert!(gateway.process.stderr.events("reload_needs_restart").is_empty());
}

#[test]
fn invalid_file_keeps_the_old_configuration_and_is_reported() {
    let origin = Origin::start(|_| Script::ok(&[], "old"));
    let config = one_route(origin.address, "", "");
    let gateway = Gateway::start(&config);
    let mut client = gateway.connect();
    client.get("/", &[]);
    gateway.rewrite(&format!("{config}[cach]\n"));
    let refused = gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains("\"reload_refused\""));
    assert!(refused.is_some_and(|line| line.contains("\"errors\":1,") && line.contains("\"warnings\":0")));
    assert!(gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains("did you mean `cache`?")).is_some());
    assert_eq!(client.get("/", &[]).text(), "old");
    assert!(gateway.process.stderr.events("reloaded").is_empty());
    gateway.rewrite(&format!("{config}\n# fixed\n"));
    wait_for(|| gateway.process.stderr.events("reloaded").len() == 1, STEP_TIMEOUT);
    assert_eq!((client.get("/", &[]).text(), gateway.get("/", &[]).text()), ("old".into(), "old".into()));
}

/// The warning compares with what the process runs: it is repeated by every reload, and ends when
/// the setting is changed back.
#[test]
fn every_reload_warns_of_settings_that_need_a_restart() {
    let config = one_route(free_address(), "", "[server]\nworkers = 1\n[log]\naccess = \"off\"\n");
    let gateway = Gateway::start(&config);
    let settings = || {
        let events = gateway.process.stderr.events("reload_needs_restart");
        events.iter().map(|event| event["setting"].as_str().expect("text").to_owned()).collect::<Vec<_>>()
    };
    let reload = |config: &str, count: usize| {
        gateway.rewrite(config);
        wait_for(|| gateway.process.stderr.events("reloaded").len() == count, STEP_TIMEOUT);
    };
    let changed = config.replace("workers = 1", "workers = 2");
    reload(&changed, 1);
    assert_eq!(settings(), ["server.workers"]);
    reload(&format!("{changed}# a comment\n"), 2);
    assert_eq!(settings(), ["server.workers"; 2], "the second reload changes nothing else");
    let both = changed.replace("access = \"off\"", "access = \"stdout\"");
    reload(&both, 3);
    assert_eq!(settings()[2..], ["server.workers", "log.access"]);
    reload(&config, 4);
    assert_eq!(settings().len(), 4, "what runs is what the file says");
}

/// A setting that needs a restart is in effect nowhere before it: not in the status, the metrics
/// and the fleet, and not on the dashboard.
#[test]
fn settings_that_need_a_restart_are_not_in_effect_in_part() {
    let rest = "[server]\nnode = \"old\"\nworkers = 1\n[cache]\nmemory = \"64MiB\"\n";
    let config = one_route(free_address(), "", rest);
    let gateway = Gateway::start(&config);
    let new = config.replace("\"old\"", "\"new\"").replace("\"64MiB\"", "\"32MiB\"");
    gateway.rewrite(&new.replace("workers = 1", "workers = 1\nzone = \"a\""));
    wait_for(|| gateway.process.stderr.events("reloaded").len() == 1, STEP_TIMEOUT);
    let events = gateway.process.stderr.events("reload_needs_restart");
    let settings: Vec<_> = events.iter().map(|event| event["setting"].as_str().expect("text").to_owned()).collect();
    assert_eq!(settings, ["server.node", "cache.memory"]);
    let read =
        |target: &str| -> serde_json::Value { serde_json::from_str(&gateway.admin(target).text()).expect("JSON") };
    assert_eq!(read("/api/v1/status")["node"], "old");
    assert!(gateway.admin("/metrics").text().contains("node=\"old\""));
    let dashboard = &read("/api/v1/dashboard")["state"];
    assert_eq!((&dashboard["node"], &dashboard["cache"]["bytes_max"]), (&"old".into(), &(64 << 20).into()));
    for (node, status) in [("old", 200), ("new", 400)] {
        let target = format!("/api/v1/purge?all=true&node={node}");
        let purged = Client::connect(gateway.admin).request("POST", &target, &[("host", "localhost")], b"");
        assert_eq!(purged.status, status, "{}", purged.text());
    }
}

/// A log that cannot be written ends no task.
#[test]
fn reload_works_with_a_full_standard_error() {
    let (old, new) = (Origin::start(|_| Script::ok(&[], "old")), Origin::start(|_| Script::ok(&[], "new")));
    let (dir, listen, admin) = (TempDir::new(), free_address(), free_address());
    let config = |origin: &Origin| {
        let addresses = format!("[admin]\naddress = \"{admin}\"\n[[listen]]\naddress = \"{listen}\"\n");
        format!("version = 1\n{}{addresses}", one_route(origin.address, "cache = { mode = \"off\" }", ""))
    };
    let file = dir.write("tidegate.toml", &config(&old));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device");
    let mut command = tidegate();
    command.args(["run", "--config"]).arg(&file).stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let child = command.stderr(full).spawn().expect("a started process");
    let mut child = KilledOnDrop(child);
    let get = |address| {
        TcpStream::connect(address).map(|_| Client::connect(address).get("/metrics", &[("host", "localhost")]).text())
    };
    wait_for(|| get(listen).is_ok_and(|text| text == "old"), STEP_TIMEOUT);
    let count = |series: &str| {
        let exposition = get(admin).expect("the admin address");
        let value =
            exposition.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse::<u64>().ok());
        value.unwrap_or_else(|| panic!("no {series}"))
    };
    // The watch may begin after the first response, so that the first change is not seen.
    let mut changes = 0..;
    let is_refused = || {
        dir.write("tidegate.toml", &format!("nonsense = {}", changes.next().unwrap_or_default()));
        count("tidegate_events_total{event=\"reload_refused\"}") >= 1
    };
    wait_for(is_refused, STEP_TIMEOUT);
    dir.write("tidegate.toml", &config(&new));
    wait_for(|| get(listen).is_ok_and(|text| text == "new"), STEP_TIMEOUT);
    assert_eq!(count("tidegate_task_panics_total{kind=\"reload\"}"), 0);
    assert!(child.0.try_wait().expect("a child").is_none());
}

/// A process that ends with its test.
struct KilledOnDrop(std::process::Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// How often the threads of a process have begun to wait.
fn waits_of(process: &Process) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.id())).expect("a live process");
    let status = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("status")).ok());
    let waits = |status: String| {
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse::<u64>().ok())
    };
    status.filter_map(waits).sum::<u64>()
}

/// Such as those of an access log. A write to the configuration itself is still found.
#[test]
fn writes_to_other_files_beside_the_configuration_wake_nothing() {
    const WRITES: u64 = 2_000;
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let config = one_route(origin.address, "", "[server]\nworkers = 1\n");
    let gateway = Gateway::start(&config);
    let mut log = std::fs::File::create(gateway.dir.path().join("access.log")).expect("a file");
    let (begin, before) = (Instant::now(), waits_of(&gateway.process));
    for _ in 0..WRITES {
        log.write_all(b"line\n").expect("room");
        std::thread::sleep(Duration::from_micros(100));
    }
    let waits = waits_of(&gateway.process) - before;
    // An idle gateway waits some ten times a second.
    let idle = 100 * begin.elapsed().as_secs();
    assert!(waits < WRITES / 4 + idle, "{waits} waits during {WRITES} writes");
    let file = gateway.dir.path().join("tidegate.toml");
    let text = std::fs::read_to_string(&file).expect("a file");
    std::fs::write(&file, format!("{text}\n[log]\nlevel = \"debug\"\n")).expect("a written file");
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
}

#[test]
fn reload_keeps_limit_state_and_cache() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "kept"));
    let limit = "[limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 2\n";
    let config = one_route(origin.address, "limits = [\"device\"]", limit);
    let gateway = Gateway::start(&config);
    gateway.get("/", &[]);
    gateway.process.signal("HUP");
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    assert!(gateway.get("/", &[]).is_hit());
    assert_eq!(gateway.get("/", &[]).status, 429);
}

// Shutdown.

#[test]
fn sigterm_drains() {
    let gate = Gate::default();
    let opens = gate.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/slow" => Script::new().wait(&opens).head(200, &[("Content-Length", "4")]).send("slow"),
        _ => Script::ok(&[], "fast"),
    });
    let config = one_route(origin.address, "", "[server]\ndrain_timeout = \"30s\"\ndrain_idle = \"3s\"\n");
    let mut gateway = Gateway::start(&config);
    let (mut slow, mut idle, mut silent) = (gateway.connect(), gateway.connect(), gateway.connect());
    let mut admin = Client::connect(gateway.admin);
    assert_eq!((idle.get("/", &[]).status, silent.get("/", &[]).status), (200, 200));
    assert_eq!(admin.get("/ready", &[]).status, 200);
    slow.send_get("/slow", &[]);
    origin.wait_for_requests(3);
    let partial = {
        let mut client = gateway.connect();
        client.send(b"GET / HTTP/1.1\r\n");
        client
    };
    gateway.process.signal("TERM");
    wait_for(|| gateway.admin("/ready").status == 503, STEP_TIMEOUT);
    assert_eq!(gateway.admin("/live").status, 200);
    // Neither the connection that was idle nor a new one loses a request, and either ends after it.
    for client in [&mut idle, &mut gateway.connect()] {
        let response = client.get("/", &[]);
        assert_eq!((response.status, response.field("connection")), (200, Some("close")));
        assert!(client.is_closed_within(STEP_TIMEOUT));
    }
    assert!(silent.is_closed_within(STEP_TIMEOUT), "idle connections close after `drain_idle`");
    wait_for(|| TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).is_err(), STEP_TIMEOUT);
    assert_eq!(gateway.process.wait(Duration::ZERO), None, "two requests are in flight");
    let mut partial = partial;
    partial.send(b"Host: a\r\n\r\n");
    assert_eq!(partial.read_response().status, 200, "a head that has begun is read");
    gate.open();
    let response = slow.read_response();
    assert_eq!((response.status, response.text(), response.field("connection")), (200, "slow".into(), Some("close")));
    let status = gateway.process.wait(STEP_TIMEOUT).expect("an exit");
    assert_eq!(status.code(), Some(0));
}

/// Clients that never retry, over kept and new connections, while one of two gateways drains. As
/// with a load balancer, new connections go to it for a while.
#[test]
fn no_request_is_lost_while_a_gateway_is_replaced() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=600")], "ok"));
    let config = one_route(origin.address, "", "");
    let (mut old, new) = (Gateway::start(&config), Gateway::start(&config));
    let (is_replaced, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (old_address, new_address) = (old.address, new.address);
    let served = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|number| {
                let (is_replaced, is_over) = (&is_replaced, &is_over);
                scope.spawn(move || {
                    let (mut served, mut client) = (0, None);
                    while !is_over.load(Ordering::Relaxed) {
                        let address = if is_replaced.load(Ordering::Relaxed) { new_address } else { old_address };
                        let mut connection = client.take().unwrap_or_else(|| Client::connect(address));
                        let response = connection.get("/", &[]);
                        assert_eq!(response.status, 200);
                        served += 1;
                        // Half of the clients use each connection once.
                        if number % 2 == 0 && response.field("connection") != Some("close") {
                            client = Some(connection);
                        }
                        // Some are idle when the drain begins.
                        std::thread::sleep(Duration::from_millis(number * 20));
                    }
                    served
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        old.process.signal("TERM");
        std::thread::sleep(Duration::from_millis(500));
        is_replaced.store(true, Ordering::Relaxed);
        let status = old.process.wait(2 * STEP_TIMEOUT);
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(status.and_then(|status| status.code()), Some(0));
        clients.into_iter().map(|client| client.join().expect("no request is lost")).sum::<u64>()
    });
    assert!(served > 100, "{served}");
}

#[test]
fn drain_ends_at_its_timeout() {
    let origin = Origin::start(|_| Script::new().hang());
    let mut gateway = Gateway::start(&one_route(origin.address, "", "[server]\ndrain_timeout = \"500ms\"\n"));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    origin.wait_for_requests(1);
    let start = Instant::now();
    gateway.process.signal("TERM");
    assert!(gateway.process.wait(STEP_TIMEOUT).is_some());
    assert!((Duration::from_millis(400)..Duration::from_secs(3)).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains("drain_timed_out")).is_some());
}

#[test]
fn second_signal_ends_the_drain() {
    let origin = Origin::start(|_| Script::new().hang());
    let mut gateway = Gateway::start(&one_route(origin.address, "", "[server]\ndrain_timeout = \"60s\"\n"));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    origin.wait_for_requests(1);
    gateway.process.signal("TERM");
    wait_for(|| !gateway.process.stderr.events("draining").is_empty(), STEP_TIMEOUT);
    gateway.process.signal("TERM");
    assert_eq!(gateway.process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
    assert!(gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains("drain_interrupted")).is_some());
}

/// A person waits for the end: idle connections are not kept.
#[test]
fn sigint_closes_idle_connections_at_once() {
    let config = one_route(free_address(), "", "[server]\ndrain_timeout = \"60s\"\ndrain_idle = \"60s\"\n");
    let mut gateway = Gateway::start(&config);
    let (mut idle, mut fresh) = (gateway.connect(), gateway.connect());
    assert_eq!(idle.get("/", &[]).status, 503);
    wait_for(|| gateway.metric("tidegate_connections") == 2.0, STEP_TIMEOUT);
    gateway.process.signal("INT");
    wait_for(|| !gateway.process.stderr.events("draining").is_empty(), STEP_TIMEOUT);
    assert_eq!(fresh.get("/", &[]).status, 503, "its client has only just connected");
    assert!(idle.is_closed_within(STEP_TIMEOUT));
    assert_eq!(gateway.process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
}

// Logs and the admin address.

#[test]
fn access_log_has_one_json_line_per_request() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "body"));
    let limit = "[limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 2\n[log]\naccess = \"stdout\"\n";
    let gateway = Gateway::start(&one_route(origin.address, "limits = [\"device\"]", limit));
    // On one connection: a worker submits its own lines in order.
    let mut client = gateway.connect();
    (0..3).for_each(|_| drop(client.get("/a?b=c\\", &[])));
    let lines = gateway.access_log(3);
    let results: Vec<_> =
        lines.iter().map(|line| (line["status"].as_u64(), line["cache"].as_str(), line["limit"].as_str())).collect();
    assert_eq!(
        results,
        [(Some(200), Some("miss"), None), (Some(200), Some("hit"), None), (Some(429), Some("error"), Some("device"))]
    );
    for line in &lines {
        assert_eq!((line["route"].as_str(), line["method"].as_str()), (Some("all"), Some("GET")), "{line}");
        assert_eq!((line["path"].as_str(), line["client"].as_str()), (Some("/a?b=c\\"), Some("127.0.0.1")), "{line}");
        assert!(line["duration"].is_number() && line["trace_id"].as_str().is_some_and(|id| id.len() == 32), "{line}");
    }
    assert_eq!(
        (lines[0]["bytes"].as_u64(), lines[0]["upstream"].as_str()),
        (Some(4), Some(&*origin.address.to_string()))
    );
}

#[test]
fn access_log_includes_refused_and_abandoned_requests() {
    let origin = Origin::start(|_| Script::new().hang());
    let gateway = Gateway::start(&one_route(origin.address, "", "[log]\naccess = \"stdout\"\n"));
    gateway.raw(b"GET /a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n");
    let line = gateway.access_log(1).remove(0);
    assert_eq!((line["status"].as_u64(), line["refused"].as_str()), (Some(400), Some("repeated_host")), "{line}");
    assert_eq!((line["method"].as_str(), line["path"].as_str()), (Some("GET"), Some("/a")), "{line}");
    // The head of an upload that is too large is valid: the line says which request it was.
    gateway.raw(b"POST /up?x HTTP/1.1\r\nHost: gate.test\r\nContent-Length: 99999999999\r\n\r\n");
    let line = gateway.access_log(2).remove(1);
    assert_eq!((line["status"].as_u64(), line["refused"].as_str()), (Some(413), Some("body_too_large")), "{line}");
    let facts = ["method", "authority", "path", "route"].map(|field| line[field].as_str().unwrap_or_default());
    assert_eq!(facts, ["POST", "gate.test", "/up?x", "all"], "{line}");
    let mut client = gateway.connect();
    client.send_get("/abandoned", &[]);
    origin.wait_for_requests(1);
    drop(client);
    let line = gateway.access_log(3).remove(2);
    assert_eq!((line["status"].as_u64(), line["route"].as_str()), (Some(499), Some("all")), "{line}");
}

/// The class of a failure, the limits that would have denied a request, and why a response was not
/// completed.
#[test]
fn access_log_names_failures_shadow_denials_and_aborts() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/cut" => Script::new().head(200, &[("Content-Length", "10")]).send("half").close(),
        "/malformed" => Script::new().send("no HTTP\r\n\r\n").close(),
        _ => Script::ok(&[], "body"),
    });
    let limit = |name: &str, mode: &str| {
        format!("[limits.{name}]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\nmode = \"{mode}\"\n")
    };
    let rest =
        limit("first", "shadow") + &limit("second", "shadow") + "[log]\naccess = \"stdout\"\n[server]\nworkers = 1\n";
    let gateway = Gateway::start(&one_route(origin.address, "limits = [\"first\", \"second\"]", &rest));
    let line = |target: &str, number: usize| {
        let mut client = gateway.connect();
        client.send_get(target, &[("connection", "close")]);
        client.read_to_end();
        gateway.access_log(number).remove(number - 1)
    };
    let fields = |line: &serde_json::Value| {
        ["failure", "blame", "aborted", "shadow_limit"].map(|field| line[field].as_str().unwrap_or("-").to_owned())
    };
    assert_eq!(fields(&line("/", 1)), ["-", "-", "-", "-"]);
    assert_eq!(fields(&line("/", 2)), ["-", "-", "-", "first,second"]);
    assert_eq!(fields(&line("/malformed", 3)), ["malformed", "upstream", "-", "first,second"]);
    assert_eq!(fields(&line("/cut", 4)), ["-", "upstream", "body_failed", "first,second"]);
}

#[test]
fn access_log_may_be_a_file_or_off() {
    let origin = Origin::start(|_| Script::ok(&[], "body"));
    let gateway = Gateway::start(&one_route(origin.address, "", "[log]\naccess = \"access.log\"\n"));
    let file = gateway.dir.path().join("access.log");
    gateway.get("/", &[]);
    let lines = || std::fs::read_to_string(&file).unwrap_or_default().lines().count();
    wait_for(|| lines() == 1, STEP_TIMEOUT);
    // SIGHUP reopens a rotated file.
    std::fs::rename(&file, gateway.dir.path().join("access.log.1")).expect("a renamed log");
    gateway.process.signal("HUP");
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    gateway.get("/", &[]);
    wait_for(|| lines() == 1, STEP_TIMEOUT);
    let silent = Gateway::start(&one_route(origin.address, "", "[log]\naccess = \"off\"\n"));
    silent.get("/", &[]);
    silent.process.signal("TERM");
    assert!(silent.process.stdout.all().is_empty());
}

#[test]
fn admin_address_serves_liveness_readiness_and_metrics() {
    let origin = Origin::start(|_| Script::ok(&[], "body"));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.get("/", &[]);
    assert_eq!((gateway.admin("/live").status, gateway.admin("/ready").status), (200, 200));
    let metrics = gateway.admin("/metrics");
    assert_eq!(metrics.field("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert_eq!(gateway.metric("tidegate_requests_total"), 1.0);
    // A response may arrive before it is counted.
    let counted = "http_server_request_duration_seconds_bucket{le=\"+Inf\",network_protocol_version=\"1.1\"} 1";
    wait_for(|| gateway.admin("/metrics").text().contains(counted), STEP_TIMEOUT);
    assert_eq!(gateway.admin("/nothing").status, 404);
    // The public address does not serve the admin paths.
    assert_eq!(gateway.get("/metrics", &[]).text(), "body");
}

#[test]
fn most_specific_route_matches() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let route = |name: &str, matches: &str| {
        format!("[[routes]]\nname = \"{name}\"\nmatch = {{ {matches} }}\nupstream = \"origin\"\n")
    };
    let config = format!(
        "[upstreams.origin]\nendpoints = [\"http://{}\"]\n{}{}{}{}{}",
        origin.address,
        route("all", "path = \"/*\""),
        route("api", "path = \"/api/*\""),
        route("exact", "path = \"/api/exact\""),
        route("host", "host = \"shop.test\", path = \"/api/*\""),
        route("post", "path = \"/api/*\", methods = [\"POST\"]"),
    );
    let gateway = Gateway::start(&config);
    let requests = [
        ("GET", "/", ""),
        ("GET", "/api/x", ""),
        ("GET", "/api/exact", ""),
        ("GET", "/api/x", "shop.test"),
        ("POST", "/api/x", ""),
    ];
    for (method, target, host) in requests {
        let host = if host.is_empty() { "gate.test" } else { host };
        gateway.request(method, target, &[("Host", host)], b"");
    }
    // Lines of different threads may arrive in any order.
    let lines = gateway.access_log(requests.len());
    let mut routes: Vec<&str> = lines.iter().filter_map(|line| line["route"].as_str()).collect();
    routes.sort_unstable();
    assert_eq!(routes, ["all", "api", "exact", "host", "post"]);
}

// TLS.

/// A gateway with TLS for gate.test in front of an origin that echoes the request.
fn tls() -> (Origin, Gateway, CertificateDer<'static>) {
    let origin = Origin::start(|request| {
        let proto = request.field("x-forwarded-proto").unwrap_or_default();
        Script::ok(
            &[("Cache-Control", "no-store")],
            format!("{} {} {proto} {}\n", request.method, request.target, text(&request.body)),
        )
    });
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    let dir = TempDir::new();
    dir.write("tls.crt", &certificate.cert.pem());
    dir.write("tls.key", &certificate.signing_key.serialize_pem());
    let listen = "[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\ncertificates = [{ cert = \"tls.crt\", key = \"tls.key\" }]\n\
                  [limits.few]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\n\
                  [[routes]]\nname = \"few\"\nmatch = { path = \"/few\" }\nupstream = \"origin\"\nlimits = [\"few\"]\n";
    let gateway = Gateway::start_in(dir, &one_route(origin.address, "", listen));
    (origin, gateway, certificate.cert.der().clone())
}

fn handshake(
    gateway: &Gateway,
    trusted: CertificateDer<'static>,
    alpn: &[&str],
) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted).expect("a usable certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("TLS 1.2 and 1.3");
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("gate.test").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let socket = TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let mut stream = StreamOwned::new(connection, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).expect("a handshake");
    }
    stream
}

#[test]
fn tls_serves_http_1() {
    let (_origin, gateway, trusted) = tls();
    for alpn in [&["http/1.1"][..], &[]] {
        let mut client = Client::from_stream(handshake(&gateway, trusted.clone(), alpn));
        assert_eq!(client.get("/a", &[]).text(), "GET /a https \n");
        assert_eq!(client.request("POST", "/b", &[], b"body").text(), "POST /b https body\n");
    }
    let stream = handshake(&gateway, trusted, &["h2", "http/1.1"]);
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
}

#[test]
fn renewed_certificate_is_served_without_a_signal() {
    let (_origin, gateway, old) = tls();
    let mut old_client = Client::from_stream(handshake(&gateway, old, &["http/1.1"]));
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    gateway.dir.write("tls.key", &certificate.signing_key.serialize_pem());
    gateway.dir.write("tls.crt", &certificate.cert.pem());
    let loaded = || gateway.process.stderr.events("certificate_loaded").len() > 1;
    wait_for(loaded, STEP_TIMEOUT);
    let mut client = Client::from_stream(handshake(&gateway, certificate.cert.der().clone(), &["http/1.1"]));
    assert_eq!(client.get("/a", &[]).text(), "GET /a https \n");
    assert_eq!(old_client.get("/a", &[]).text(), "GET /a https \n", "connections outlive the certificate");
}

/// A file with other paths needs a restart: until then, those of the running listener are watched.
#[test]
fn renewed_certificate_is_served_after_a_reload_with_other_paths() {
    let (_origin, gateway, _old) = tls();
    for name in ["tls.crt", "tls.key"] {
        let copy = gateway.dir.path().join(format!("next-{name}"));
        std::fs::copy(gateway.dir.path().join(name), copy).expect("a copied file");
    }
    let file = gateway.dir.path().join("tidegate.toml");
    let text = std::fs::read_to_string(&file).expect("the configuration").replace("\"tls.", "\"next-tls.");
    std::fs::rename(gateway.dir.write("tidegate.toml.new", &text), file).expect("a renamed file");
    let events = |name: &str| gateway.process.stderr.events(name).len();
    wait_for(|| events("reloaded") == 1 && events("reload_needs_restart") == 1, STEP_TIMEOUT);
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    gateway.dir.write("tls.key", &certificate.signing_key.serialize_pem());
    gateway.dir.write("tls.crt", &certificate.cert.pem());
    wait_for(|| events("certificate_loaded") > 1, STEP_TIMEOUT);
    let mut client = Client::from_stream(handshake(&gateway, certificate.cert.der().clone(), &["http/1.1"]));
    assert_eq!(client.get("/a", &[]).text(), "GET /a https \n");
}

/// A file that is missing for a moment, or that must not be read, is like one that cannot be used.
#[test]
fn a_missing_certificate_refuses_no_reload_and_no_start() {
    let (origin, gateway, old) = tls();
    let reloads = |event: &str| gateway.process.stderr.events(event).len();
    for (count, name) in [(1, "tls.key"), (2, "tls.crt")] {
        let (path, kept) = (gateway.dir.path().join(name), gateway.dir.path().join("kept"));
        std::fs::rename(&path, &kept).expect("a renamed file");
        wait_for(|| reloads("certificate_refused") == count, STEP_TIMEOUT);
        wait_for(|| gateway.admin("/ready").text().contains("tls.crt"), STEP_TIMEOUT);
        let refused = gateway.process.stderr.events("certificate_refused").remove(count - 1);
        assert!(refused["error"].as_str().expect("text").contains(name), "{refused}");
        let warning = gateway.process.stderr.events("config_warning").pop().expect("a warning");
        assert!(warning["fault"].as_str().expect("text").contains(name), "{warning}");
        let mut client = Client::from_stream(handshake(&gateway, old.clone(), &["http/1.1"]));
        assert_eq!(client.get("/a", &[]).text(), "GET /a https \n", "the certificate stays in use");
        std::fs::rename(&kept, &path).expect("a renamed file");
        wait_for(|| !gateway.admin("/ready").text().contains("tls.crt"), STEP_TIMEOUT);
    }
    assert_eq!((reloads("reload_refused"), reloads("config_error")), (0, 0));
    // A start needs all files.
    let listen = "[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\ncertificates = [{ cert = \"tls.crt\", key = \"absent.key\" }]\n";
    let text = format!("version = 1\n{}", one_route(origin.address, "", listen));
    let file = gateway.dir.write("other.toml", &text);
    for command in [&["check"][..], &["run", "--config"]] {
        let output = tidegate().args(command).arg(&file).output().expect("the command runs");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
}

#[test]
fn http_2_serves_get_and_post() {
    let (origin, gateway, _) = tls();
    let body = gateway.dir.write("body", &"x".repeat(100_000));
    let url = |target: &str| format!("https://{}{target}", gateway.address);
    let nghttp = |arguments: &[&str]| {
        let output = Command::new("nghttp").args(["--verbose", "--timeout=10"]).args(arguments).output();
        text(&output.expect("nghttp runs (Debian package nghttp2-client)").stdout)
    };
    let get = nghttp(&[&url("/a?b=c")]);
    assert!(get.contains(":status: 200") && get.contains("GET /a?b=c https "), "{get}");
    assert!(get.contains("via: 1.1 tidegate") && get.contains("cache-status: tidegate"), "{get}");
    let [_, denied] = [(); 2].map(|()| nghttp(&[&url("/few")]));
    for expected in [":status: 429", "retry-after: 3600", "ratelimit: \"few\";r=0;t=3600", "\"reason\":\"limited\"}"] {
        assert!(denied.contains(expected), "{expected}: {denied}");
    }
    let post = nghttp(&["--data", body.to_str().expect("a path"), &url("/post")]);
    assert!(post.contains(":status: 200") && post.contains("POST /post https xxx"), "{post}");
    assert_eq!(origin.last().body.len(), 100_000);
    let host = gateway.address.to_string();
    assert_eq!((origin.last().field("host"), origin.last().all("connection").len() < 2), (Some(&*host), true));
}

#[test]
fn http_2_streams_run_concurrently() {
    let (origin, gateway, _) = tls();
    let output = Command::new("h2load")
        .args(["-n", "200", "-c", "2", "-m", "50"])
        .arg(format!("https://{}/", gateway.address))
        .output();
    let report = text(&output.expect("h2load runs (Debian package nghttp2-client)").stdout);
    assert!(report.contains("200 succeeded") && report.contains("200 2xx"), "{report}");
    assert_eq!(origin.count(), 200);
}

#[test]
fn connection_without_a_complete_handshake_is_closed() {
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    let dir = TempDir::new();
    dir.write("tls.crt", &certificate.cert.pem());
    dir.write("tls.key", &certificate.signing_key.serialize_pem());
    let listen = "[limits_http]\nheader_timeout = \"300ms\"\n[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\ncertificates = [{ cert = \"tls.crt\", key = \"tls.key\" }]\n";
    let gateway = Gateway::start_in(dir, &one_route(free_address(), "", listen));
    for bytes in [&b""[..], b"\x16\x03\x01\x02", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"] {
        let mut socket = TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
        socket.set_read_timeout(Some(Duration::from_secs(3))).expect("a live socket");
        socket.write_all(bytes).expect("a live socket");
        let mut received = Vec::new();
        let ended = socket.read_to_end(&mut received);
        assert!(ended.is_ok() || ended.is_err_and(|error| !support::client::is_timeout(&error)), "{bytes:?}");
        assert!(!received.starts_with(b"HTTP"), "{bytes:?}");
    }
}

#[test]
fn effective_configuration_and_schema_are_printed() {
    let dir = TempDir::new();
    let text = "[admin]\ntoken = \"a-secret-of-the-operator\"\n[upstreams.shop]\nendpoints = [\"http://127.0.0.1:1\"]\n\
        [[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"shop\"\ncost = 3\n";
    let file = dir.write("tidegate.toml", &format!("version = 1\n{text}"));
    let run = |arguments: &[&str]| {
        let output = tidegate().arg("config").args(arguments).output().expect("tidegate runs");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let path = file.display().to_string();
    let (succeeded, set) = run(&["print", &path]);
    assert!(succeeded && set.contains("\ncost = 3\n") && !set.contains("timeout"), "{set}");
    let (_, all) = run(&["print", &path, "--defaults", "--origin"]);
    assert!(all.contains(&format!("\ncost = 3  # {path}:10\n")), "{all}");
    assert!(all.contains("upstreams.shop.timeout = \"10s\"  # default\n"), "{all}");
    assert!(all.contains("admin.token = \"***\"") && !all.contains("a-secret"), "{all}");
    // A printed document can be checked, and does not run with the replacement of a secret.
    let printed = dir.write("printed.toml", &set);
    let refused = |arguments: &[&str]| {
        let output = tidegate().args(arguments).arg(&printed).output().expect("tidegate runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(errors.contains("admin.token") && errors.contains("has replaced"), "{errors}");
        !output.status.success()
    };
    assert!(!refused(&["check"]) && refused(&["run", "--config"]));
    dir.write("tidegate.toml", "version = 2\n");
    assert!(!run(&["print", &path]).0);
    let (succeeded, schema) = run(&["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&schema).expect("JSON");
    assert!(succeeded && schema["properties"]["routes"]["items"]["properties"]["redirect"].is_object());
}
