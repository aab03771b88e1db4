//! The access log: which members a line has, their order, the combined format, and changes by a
//! reload.

mod support;

use std::time::Duration;

use support::{Gateway, Origin, Script, one_route, wait_for};

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
