//! The dashboard, in headless Chromium against a gateway under load: the state of a stopped
//! endpoint and of a stopped shard is shown without a reload of the page, and axe finds nothing.
//!
//! Needs Debian's `chromium`, `node` and `redis-server`, and `playwright-core` and `axe-core` of
//! npm, which are installed into `~/.cache/tidegate/browser`. The browser is skipped, loudly, where
//! one of them is missing. `DASHBOARD_PICTURES` names a directory for pictures of the page.

#[path = "support/redis.rs"]
mod redis_server;
mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis_server::Redis;
use serde_json::{Value, json};
use support::tls::{LISTEN_TLS, write_certificate};
use support::{Client, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

/// A step of the browser takes seconds at most; on a busy machine, its start takes longer.
const BROWSER_TIMEOUT: Duration = Duration::from_secs(40);

fn tools() -> PathBuf {
    PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/tidegate/browser")
}

const PACKAGES: [&str; 2] = ["playwright-core@1.65.1", "axe-core@4.14.1"];

/// Whether the packages are there, or could be installed.
fn has_packages() -> bool {
    let directory = |package: &&str| tools().join("node_modules").join(package.split('@').next().unwrap_or_default());
    let are_there = || PACKAGES.iter().all(|package| directory(package).exists());
    let mut command = Command::new("npm");
    command.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]).arg(tools()).args(PACKAGES);
    are_there() || std::fs::create_dir_all(tools()).is_ok() && command.output().is_ok() && are_there()
}

/// The needs of the browser that this machine lacks.
fn missing() -> Vec<String> {
    let is_installed = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let programs = ["chromium", "node"].into_iter().filter(|program| !is_installed(program)).map(str::to_owned);
    let mut missing: Vec<String> = programs.collect();
    if missing.is_empty() && !has_packages() {
        missing.push(format!("{} in {}", PACKAGES.join(" and "), tools().display()));
    }
    missing
}

/// The load uses this listener. The other one has a certificate.
const LISTEN: &str = "[[listen]]\naddress = \"127.0.0.1:0\"\n";

fn config(endpoints: [SocketAddr; 2], redis: &Redis) -> String {
    let [first, second] = endpoints;
    format!(
        "[redis]\nsecret = \"0123456789abcdef0123\"\n[redis.regions.default]\nendpoints = [\"{}\"]\n\
         [limits.device]\ntier = \"device\"\nrate = \"20/s\"\nburst = 20\n\
         [upstreams.shop]\nendpoints = [\"http://{first}\", \"http://{second}\"]\n\
         [upstreams.failing]\nendpoints = [\"http://{first}\"]\nbreaker = {{ open = \"60s\" }}\n\
         [[routes]]\nname = \"shop\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\n\
         [[routes]]\nname = \"limited\"\nmatch = {{ path = \"/limited\" }}\nupstream = \"shop\"\nlimits = [\"device\"]\n\
         [[routes]]\nname = \"failing\"\nmatch = {{ path = \"/failing\" }}\nupstream = \"failing\"\n",
        redis.url()
    ) + LISTEN
        + LISTEN_TLS
}

fn origin() -> Origin {
    Origin::start(|request| match request.target.as_str() {
        "/failing" => Script::reply(500, &[], "failed"),
        "/page" => Script::ok(&[("Cache-Control", "max-age=60")], "page"),
        target if target.starts_with("/stored/") => Script::ok(&[("Cache-Control", "max-age=60")], "stored"),
        _ => Script::ok(&[("Cache-Control", "no-store")], "own"),
    })
}

/// Sends requests until the flag is set: hits, new keys for the shard, passes and denied ones.
fn load(address: SocketAddr, is_done: &AtomicBool) {
    let mut number = 0;
    while !is_done.load(Ordering::Relaxed) {
        let Ok(stream) = TcpStream::connect_timeout(&address, STEP_TIMEOUT) else { return };
        drop(stream.set_read_timeout(Some(STEP_TIMEOUT)));
        let mut client = Client::from_stream(stream);
        for _ in 0..20 {
            number += 1;
            let stored = format!("/stored/{number}");
            for target in ["/page", "/own", "/limited", "/failing", stored.as_str()] {
                let request = format!("GET {target} HTTP/1.1\r\nHost: gate.test\r\n\r\n");
                let Ok(()) = client.try_send(request.as_bytes()) else { break };
                let Ok(head) = client.try_read_head() else { break };
                client.read_body(head, "GET");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// The report of a step of the browser.
#[track_caller]
fn step(browser: &Process, name: &str) -> Value {
    let is_step = |line: &str| serde_json::from_str::<Value>(line).is_ok_and(|line| line["step"] == name);
    let line = browser.stdout.find(BROWSER_TIMEOUT, is_step);
    let line = line.unwrap_or_else(|| panic!("no {name}: {:?} {:?}", browser.stdout.all(), browser.stderr.all()));
    serde_json::from_str(&line).expect("JSON")
}

#[test]
fn browser_shows_faults_without_a_reload_and_is_accessible() {
    let missing = missing();
    if !missing.is_empty() {
        return eprintln!("SKIPPED: the dashboard was not shown in a browser; missing: {}", missing.join(", "));
    }
    let (first, second, redis) = (origin(), origin(), Redis::start());
    let config = config([first.address, second.address], &redis);
    let dir = TempDir::new();
    write_certificate(&dir);
    let mut gateway = Gateway::start_in(dir, &config);
    let locked_admin = support::free_address();
    let admin = format!("[admin]\naddress = \"{locked_admin}\"\ntoken = \"right\"\n");
    let _locked = Gateway::start(&one_route(first.address, "", &admin));
    let is_done = AtomicBool::new(false);
    let (address, is_done) = (gateway.address, &is_done);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(move || load(address, is_done));
        }
        let mut command = Command::new("node");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dashboard/browser.mjs"));
        command.arg(format!("http://{}/", gateway.admin)).arg(format!("http://{locked_admin}/"));
        command.arg(std::env::var_os("DASHBOARD_PICTURES").unwrap_or_default());
        command.env("TOOLS", tools()).env("CHROMIUM", "/usr/bin/chromium").env("PURGED", "http://gate.test/page");
        let browser = Process::start(&mut command);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            step(&browser, "tools");
            step(&browser, "ready");
            let stopped = now();
            second.stop();
            redis.kill();
            let shown =
                ["endpoint", "shard"].map(|name| step(&browser, name)["time"].as_f64().expect("a time") - stopped);
            eprintln!("shown after: endpoint {:.2} s, shard {:.2} s", shown[0], shown[1]);
            assert_eq!(step(&browser, "breaker")["hasFocus"], true);
            gateway.rewrite(&config.replace("[limits.device]", "[limits.device]\nno_such_key = 1"));
            step(&browser, "refused");
            let looks = step(&browser, "looks");
            assert_eq!(looks["violations"], serde_json::json!([]));
            assert_eq!(looks["overflows"], serde_json::json!([]));
            assert_eq!(step(&browser, "login")["violations"], serde_json::json!([]));
            step(&browser, "end");
            gateway.process.kill();
            let done = step(&browser, "done");
            assert_eq!((&done["faults"], &done["foreign"]), (&serde_json::json!([]), &serde_json::json!([])));
        }));
        is_done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Opens the stream and returns the names of the first `count` events with their data.
fn events(address: SocketAddr, count: usize) -> Vec<(String, Value)> {
    let mut stream = TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("a connection");
    stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    // An HTTP/1.0 client gets the events without chunks.
    stream.write_all(b"GET /api/v1/stream HTTP/1.0\r\nHost: localhost\r\n\r\n").expect("sent");
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let mut found = Vec::new();
    while found.len() < count {
        let line = lines.next().expect("an open stream");
        if let Some(name) = line.strip_prefix("event: ") {
            let data = lines.next().expect("an open stream");
            let data = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
            found.push((name.to_owned(), data));
        }
    }
    found
}

#[test]
fn stream_has_state_log_and_history() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.get("/page", &[]);
    let events = events(gateway.admin, 3);
    let of = |name: &str| events.iter().filter(|(event, _)| event == name).map(|(_, data)| data).collect::<Vec<_>>();
    let states = of("state");
    assert_eq!(states.len(), 2, "{events:?}");
    assert_eq!(states[0]["routes"][0]["name"], "all");
    assert_eq!(states[0]["upstreams"][0]["endpoints"][0]["state"], "available");
    assert!(of("log")[0].as_array().is_some_and(|lines| lines.iter().any(|line| line["fields"]["event"] == "ready")));
    let whole: Value = serde_json::from_str(&gateway.admin("/api/v1/dashboard").text()).expect("JSON");
    assert_eq!(whole["state"]["breakers"][0]["state"], "closed");
    assert!(whole["history"].is_array() && whole["log"].is_array());
}

/// The state has a bounded size; the routes with most requests stay.
#[test]
fn routes_beyond_the_bound_are_counted() {
    let origin = origin();
    let routes = (0..250).map(|number| {
        let target = format!("match = {{ path = \"/r{number}\" }}\nupstream = \"origin\"\n");
        format!("[[routes]]\nname = \"r{number}\"\n{target}")
    });
    let gateway = Gateway::start(&one_route(origin.address, "", &routes.collect::<String>()));
    // The last one in the order of routes has requests.
    let state = || -> Value {
        gateway.get("/all", &[]);
        serde_json::from_str(&gateway.admin("/api/v1/dashboard").text()).expect("JSON")
    };
    let has_all = |state: &Value| {
        state["state"]["routes"].as_array().is_some_and(|routes| routes.iter().any(|route| route["name"] == "all"))
    };
    wait_for(|| has_all(&state()), STEP_TIMEOUT);
    let state = state();
    assert_eq!(state["state"]["routes"].as_array().map(Vec::len), Some(200));
    assert_eq!(state["state"]["routes_hidden"], 51);
}

/// One breaker for each route, and one text for each endpoint that is out, are bounded too.
#[test]
fn breakers_and_faults_beyond_the_bound_are_counted() {
    let origin = origin();
    let routes = (0..250).map(|number| {
        let target = format!("match = {{ path = \"/r{number}\" }}\nupstream = \"origin\"\n");
        format!("[[routes]]\nname = \"r{number}\"\n{target}")
    });
    let gateway = Gateway::start(&one_route(origin.address, "", &routes.collect::<String>()));
    let state = || -> Value {
        let state: Value = serde_json::from_str(&gateway.admin("/api/v1/dashboard").text()).expect("JSON");
        state["state"].clone()
    };
    let open = |number: usize| {
        let target = format!("/api/v1/breakers/route/r{number}?state=open&for=1h");
        let response = Client::connect(gateway.admin).request("POST", &target, &[("host", "localhost")], b"");
        assert_eq!(response.status, 200, "{}", response.text());
        // The reply has the breaker that was set, whatever its place in the list.
        let reply: Value = serde_json::from_str(&response.text()).expect("JSON");
        assert_eq!((&reply["total"], &reply["next"]), (&json!(1), &Value::Null), "{reply}");
        let breaker = &reply["breakers"][0];
        assert_eq!((&breaker["route"], &breaker["state"]), (&json!(format!("r{number}")), &json!("open")));
    };
    open(249);
    let is_open = |state: &Value| state["breakers"][0]["state"] == "open";
    wait_for(|| is_open(&state()), STEP_TIMEOUT);
    let before = state();
    assert_eq!(before["breakers"].as_array().map(Vec::len), Some(200));
    assert_eq!(before["degraded"], json!(["breaker r249"]));
    assert_eq!(before["breakers_hidden"], 51);
    (0..249).for_each(open);
    wait_for(|| state()["degraded"].as_array().is_some_and(|list| list.len() == 201), STEP_TIMEOUT);
    assert_eq!(state()["degraded"][200], "50 more");
}

/// A seventeenth stream is refused. An ended one leaves its place, and streams that are not read
/// keep no other request out.
#[test]
fn streams_are_bounded() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let open = || {
        let mut client = Client::connect(gateway.admin);
        client.send_get("/api/v1/stream", &[("host", "localhost")]);
        let status = client.read_head().status;
        (client, status)
    };
    let streams: Vec<_> = (0..16).map(|_| open()).collect();
    assert!(streams.iter().all(|(_, status)| *status == 200));
    assert_eq!(open().1, 503);
    assert_eq!(gateway.admin("/live").status, 200);
    drop(streams);
    wait_for(|| open().1 == 200, STEP_TIMEOUT);
}

/// An open dashboard does not delay the end of the process, and shows the drain.
#[test]
fn drain_is_shown_and_not_delayed() {
    let gate = support::Gate::default();
    let opened = gate.clone();
    let origin =
        Origin::start(move |_| Script::new().wait(&opened).send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
    let mut gateway = Gateway::start(&one_route(origin.address, "", ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    origin.wait_for_requests(1);
    let mut dashboard = Client::connect(gateway.admin);
    dashboard.send_get("/api/v1/stream", &[("host", "localhost")]);
    assert_eq!(dashboard.read_head().status, 200);
    gateway.process.signal("TERM");
    let mut text = Vec::new();
    while !text.ends_with(b"\"draining\":true") {
        text.extend(dashboard.read_bytes(1));
    }
    gate.open();
    assert_eq!(client.read_response().status, 200);
    assert_eq!(gateway.process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
}

/// The stream has the access rules of the API, and ends when its token is replaced.
#[test]
fn stream_needs_the_token_that_is_configured_now() {
    let (origin, admin) = (origin(), support::free_address());
    let config =
        |token: &str| one_route(origin.address, "", &format!("[admin]\naddress = \"{admin}\"\ntoken = \"{token}\"\n"));
    let gateway = Gateway::start(&config("first"));
    let open = |token: &str| {
        let mut client = Client::connect(admin);
        client.send_get("/api/v1/stream", &[("host", "localhost"), ("authorization", &format!("Bearer {token}"))]);
        (client.read_head(), client)
    };
    assert_eq!(Client::connect(admin).get("/api/v1/stream", &[("host", "localhost")]).status, 401);
    let (head, mut client) = open("first");
    assert_eq!(head.status, 200);
    gateway.rewrite(&config("second"));
    let response = client.read_body(head, "GET");
    assert_eq!(response.end, support::BodyEnd::Complete);
    assert_eq!(open("first").0.status, 401);
    assert_eq!(open("second").0.status, 200);
    let foreign = [("host", "localhost"), ("authorization", "Bearer second"), ("origin", "http://evil.example")];
    assert_eq!(Client::connect(admin).get("/api/v1/stream", &foreign).status, 403);
}

/// The page works under a policy that permits its own files alone.
#[test]
fn page_forbids_every_other_origin() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    for path in ["/", "/ui/main.js", "/ui/style.css", "/ui/icon.svg"] {
        let response = gateway.admin(path);
        assert_eq!(response.status, 200, "{path}");
        let policy = response.field("content-security-policy").expect("a policy");
        assert!(
            policy.starts_with("default-src 'none'") && !policy.contains("unsafe") && !policy.contains("http"),
            "{policy}"
        );
    }
    assert_eq!(Client::connect(gateway.admin).request("POST", "/", &[("host", "localhost")], b"").status, 405);
    assert_eq!(Client::connect(gateway.admin).get("/ui/main.js", &[("host", "evil.example")]).status, 403);
}
