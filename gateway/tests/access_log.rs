//! The access log: which members a line has, their order, the combined format, and changes by a
//! reload.

mod support;

use std::time::Duration;

use support::frames::{DATA, END_STREAM, Frame, Server, get, request_with};
use support::{Gateway, Origin, Script, TempDir, one_route, tidegate, wait_for};

fn origin() -> Origin {
    Origin::start(|request| match request.target.as_str() {
        "/slow" => Script::new().pause(Duration::from_millis(120)).head(200, &[("Content-Length", "0")]),
        _ => Script::ok(&[("Cache-Control", "max-age=60")], "body"),
    })
}

#[test]
fn a_line_says_who_was_served_from_where_and_how_long_it_took() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(
        origin.address,
        "",
        "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-user\"\ntier = \"header:x-tier\"\n\
         [tiers]\ngold = 2\n",
    ));
    let fields =
        [("User-Agent", "probe/1 \"x\""), ("Referer", "https://other.example/"), ("X-User", "ann"), ("X-Tier", "gold")];
    gateway.get("/slow", &fields);
    gateway.request("POST", "/post", &[], b"12345");
    gateway.get("/hit", &fields);
    gateway.get("/hit", &fields);
    // Each worker writes its own lines.
    let lines = gateway.access_log(4);
    let of = |path: &str, cache: &str| {
        let found = lines.iter().find(|line| line["path"] == path && line["cache"] == cache);
        found.unwrap_or_else(|| panic!("no {cache} of {path} among {lines:?}"))
    };
    let slow = of("/slow", "miss");
    assert_eq!((slow["user_agent"].as_str(), slow["user_class"].as_str()), (Some("probe/1 \"x\""), Some("gold")));
    assert_eq!((slow.get("referer"), slow.get("tls")), (None, None));
    assert_eq!(slow["upstream"], origin.address.to_string());
    let seconds = |name: &str| slow[name].as_f64().unwrap_or_default();
    assert!(seconds("upstream_time") >= 0.12 && seconds("duration") >= seconds("upstream_time"), "{slow}");
    assert_eq!((slow["config"].as_u64(), of("/post", "bypass")["request_bytes"].as_u64()), (Some(1), Some(5)));
    let device = |line: &serde_json::Value| line["device"].as_str().map(str::to_owned);
    assert_eq!(device(slow).map(|hash| hash.len()), Some(16));
    assert_eq!(device(slow), device(of("/hit", "miss")), "one device");
    assert_eq!(of("/hit", "hit").get("upstream_time"), None);
}

#[test]
fn members_and_form_are_chosen_and_reloaded() {
    let origin = origin();
    let config = |log: &str| one_route(origin.address, "", &format!("[log]\n{log}\n"));
    let gateway = Gateway::start(&config("fields = [\"status\", \"path\", \"referer\", \"config\"]"));
    let lines = || gateway.process.stdout.all();
    gateway.get("/a?b", &[("Referer", "r")]);
    wait_for(|| lines().len() == 1, Duration::from_secs(5));
    assert_eq!(lines()[0], "{\"status\":200,\"path\":\"/a?b\",\"referer\":\"r\",\"config\":1}");
    gateway.rewrite(&config("format = \"combined\""));
    wait_for(|| gateway.metric("tidegate_events_total{event=\"reloaded\"}") >= 1.0, Duration::from_secs(5));
    gateway.get("/c", &[("User-Agent", "probe")]);
    wait_for(|| lines().len() == 2, Duration::from_secs(5));
    let line = &lines()[1];
    assert!(
        line.starts_with("127.0.0.1 - - [") && line.ends_with("\"GET /c HTTP/1.1\" 200 4 \"-\" \"probe\""),
        "{line}"
    );
}

/// The members that docs/operations.md has without an asterisk are those of every line.
#[test]
fn the_members_of_every_line_are_those_of_the_documentation() {
    let docs = include_str!("../../docs/operations.md");
    let table = docs.split("## Access log").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section");
    let names = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    let always: Vec<&str> = names.map(|(name, _)| name).filter(|name| !name.contains('`')).collect();
    assert!(always.len() > 5 && always.contains(&"status") && !always.contains(&"version"), "{always:?}");
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.raw(b"\x16\x03\x01\x02\x00\xff\r\n\r\n");
    gateway.raw(b"GET /09\r\n\r\n");
    gateway.get("/", &[]);
    for line in gateway.access_log(3) {
        let absent: Vec<_> = always.iter().filter(|name| line.get(**name).is_none()).collect();
        assert!(absent.is_empty(), "{absent:?} in {line}");
    }
}

/// Which file it is is part of the message.
#[test]
fn a_log_that_cannot_be_opened_is_named() {
    let (origin, dir) = (origin(), TempDir::new());
    let config = one_route(origin.address, "", "[log]\naccess = \"logs/access.log\"\n");
    let file = dir.write("start.toml", &format!("version = 1\n{config}"));
    let output = tidegate().args(["run", "--config"]).arg(&file).output().expect("the command runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let path = dir.path().join("logs/access.log");
    let want = format!("cannot open the access log {}: No such file", path.display());
    assert!(!output.status.success() && stderr.contains(&want), "{stderr}");
    std::fs::create_dir(dir.path().join("logs")).expect("a directory");
    let gateway = Gateway::start_in(dir, &config);
    std::fs::remove_dir_all(gateway.dir.path().join("logs")).expect("a removed directory");
    gateway.process.signal("HUP");
    wait_for(|| !gateway.process.stderr.events("access_log_failed").is_empty(), Duration::from_secs(5));
    let event = &gateway.process.stderr.event("access_log_failed");
    assert_eq!(event["path"], path.display().to_string(), "{event}");
    assert!(event["error"].as_str().expect("text").contains("No such file"), "{event}");
}

#[test]
fn a_refused_head_is_shown_as_far_as_it_was_read() {
    let server = Server::start(origin(), "", "");
    let lines = |count: usize, path: &str| {
        let lines = server.gateway.access_log(count);
        lines.iter().find(|line| line["path"] == path).unwrap_or_else(|| panic!("no {path} in {lines:?}")).clone()
    };
    let shown = |line: &serde_json::Value| ["method", "refused", "version"].map(|name| line[name].to_string());
    let mut client = server.connect();
    client.send(&get(1, "/a%0d"));
    client.response(1);
    assert_eq!(shown(&lines(1, "/a%0d")), ["\"GET\"", "\"path_encoding\"", "\"2.0\""]);
    client.send(&request_with(3, ("PUT", &format!("/{}", "l".repeat(9_000))), &[]));
    client.response(3);
    assert_eq!(shown(&lines(2, &format!("/{}", "l".repeat(511))))[..2], ["\"PUT\"", "\"target_too_long\""]);
    client.send(&request_with(5, ("P T", "/c"), &[]));
    client.response(5);
    assert_eq!(shown(&lines(3, "/c"))[..2], ["\"-\"", "\"request_line\""]);
}

#[test]
fn a_refused_head_of_http1_is_shown_bounded_and_escaped() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let long = "x".repeat(9_000);
    let heads: [(Vec<u8>, &str, String); 6] = [
        (b"GET /a\"b\\ HTTP/1.1\r\nHost: a\r\nBad Name: 1\r\n\r\n".to_vec(), "GET", "/a\"b\\".to_owned()),
        (format!("POST /{long} HTTP/1.1\r\n\r\n").into_bytes(), "POST", format!("/{}", "x".repeat(511))),
        (format!("{long} / HTTP/1.1\r\n\r\n").into_bytes(), &"x".repeat(32), "/".to_owned()),
        (b"\x16\x03\x01\x02\x00\xff\r\n\r\n".to_vec(), "-", "\u{16}\u{3}\u{1}\u{2}\0\u{fffd}".to_owned()),
        (b"GET\r\n\r\n".to_vec(), "GET", "-".to_owned()),
        (b"PUT /lf HTTP/1.1\nHost: a\r\n\r\n".to_vec(), "PUT", "/lf".to_owned()),
    ];
    for (at, (head, method, path)) in heads.into_iter().enumerate() {
        gateway.raw(&head);
        let lines = gateway.access_log(at + 1);
        assert_eq!((lines[at]["method"].as_str(), lines[at]["path"].as_str()), (Some(method), Some(&*path)));
        assert!(lines[at]["refused"].is_string() && lines[at]["request_id"].is_string(), "{}", lines[at]);
    }
}

#[test]
fn a_refused_head_has_the_version_that_was_sent() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let heads = [
        ("GET /10 HTTP/1.0\r\nBad Name: 1\r\n\r\n", Some("1.0")),
        ("GET /11 HTTP/1.1\r\nBad Name: 1\r\n\r\n", Some("1.1")),
        ("GET /30 HTTP/3.0\r\nHost: a\r\n\r\n", Some("3.0")),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some("2.0")),
        ("GET /09\r\n\r\n", None),
        ("GET /other HTTP/1.1x\r\nHost: a\r\n\r\n", None),
        ("GET /two words HTTP/1.0\r\n\r\n", Some("1.0")),
    ];
    for (at, (head, version)) in heads.into_iter().enumerate() {
        gateway.raw(head.as_bytes());
        let line = &gateway.access_log(at + 1)[at];
        assert_eq!((line["version"].as_str(), line["refused"].is_string()), (version, true), "{head:?}: {line}");
    }
    gateway.rewrite(&one_route(origin.address, "", "[log]\nformat = \"combined\"\n"));
    wait_for(|| gateway.metric("tidegate_events_total{event=\"reloaded\"}") >= 1.0, Duration::from_secs(5));
    let before = gateway.process.stdout.all().len();
    gateway.raw(b"GET /09\r\n\r\n");
    wait_for(|| gateway.process.stdout.all().len() > before, Duration::from_secs(5));
    assert!(gateway.process.stdout.all()[before].contains("\"GET /09\" 400 "), "{:?}", gateway.process.stdout.all());
}

#[test]
fn bytes_of_a_body_without_a_length_are_those_received() {
    let server = Server::start(origin(), "", "");
    let mut client = server.connect();
    client.send(&request_with(1, ("POST", "/h2"), &[]));
    client.send(&Frame::new(DATA, 0, 1).with([b'x'; 700]));
    client.send(&Frame::new(DATA, END_STREAM, 1).with([b'x'; 34]));
    client.response(1);
    assert_eq!(server.gateway.access_log(1)[0]["request_bytes"], 734);

    let gateway = Gateway::start(&one_route(server.origin.address, "", ""));
    let mut client = gateway.connect();
    client
        .send(b"POST /h1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n3\r\nfgh\r\n0\r\n\r\n");
    assert_eq!(client.read_response().status, 200);
    assert_eq!(gateway.access_log(1)[0]["request_bytes"], 8);
    client.send(b"GET /h1 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.read_response().status, 200);
    assert_eq!(gateway.access_log(2)[1].get("request_bytes"), None);
}

#[test]
fn time_to_connect_is_that_of_a_new_connection() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", "[server]\nworkers = 1\n"));
    let mut client = gateway.connect();
    for path in ["/slow?1", "/slow?2"] {
        assert_eq!(client.get(path, &[]).status, 200);
    }
    let lines = gateway.access_log(2);
    let seconds = |line: &serde_json::Value, name: &str| line[name].as_f64();
    let connect = seconds(&lines[0], "connect_time").expect("a new connection");
    assert!(connect > 0.0 && connect <= seconds(&lines[0], "upstream_time").unwrap_or_default(), "{lines:?}");
    assert_eq!(seconds(&lines[1], "connect_time"), None, "a kept connection");
}

#[test]
fn both_logs_name_time_alike() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.get("/hit", &[]);
    let access = gateway.access_log(1)[0]["time"].to_string();
    let ready = &gateway.process.stderr.event("ready");
    let process = ready["time"].to_string();
    let form = |time: &str| -> String { time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect() };
    assert_eq!((form(&access), process.len()), (form(&process), "\"0000-00-00T00:00:00.000Z\"".len()));
    assert_eq!((ready["level"].as_str(), ready.get("timestamp")), (Some("INFO"), None));
}

#[test]
fn faults_of_a_refused_reload_are_fields() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.rewrite(&one_route(origin.address, "costt = 1\nlimits = [\"none\"]", ""));
    let log = &gateway.process.stderr;
    wait_for(|| log.events("reload_refused").len() == 1, Duration::from_secs(5));
    let faults = log.events("config_error");
    let keys: Vec<_> = faults.iter().map(|fault| fault["key"].as_str().unwrap_or_default()).collect();
    assert_eq!(keys, ["routes[0].costt", "routes[0].limits[0]"], "{faults:?}");
    let unknown = &faults[0];
    assert_eq!((unknown["code"].as_str(), unknown["column"].as_u64()), (Some("unknown-key"), Some(1)));
    assert!(unknown["line"].as_u64() > Some(1) && unknown["hint"].as_str().is_some_and(|hint| hint.contains("cost")));
    assert!(unknown["file"].as_str().is_some_and(|file| file.ends_with("tidegate.toml")));
    assert!(log.all().iter().all(|line| line.starts_with('{')), "{:?}", log.all());
}
