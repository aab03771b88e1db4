//! The circuit breaker: its state without traffic, shadow mode, a breaker of a whole upstream, and
//! states that an operator sets.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use support::{Client, ClientResponse, Gateway, Origin, STEP_TIMEOUT, Script, one_route, wait_for};

const STATE: &str = "tidegate_breaker_state{route=\"all\"}";

/// An origin that fails until told otherwise.
fn broken_origin() -> (Origin, Arc<AtomicBool>) {
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&is_broken);
    let origin = Origin::start(move |_| Script::reply(if broken.load(Ordering::SeqCst) { 500 } else { 200 }, &[], ""));
    (origin, is_broken)
}

fn breaker(keys: &str) -> String {
    format!("[upstreams.origin.breaker]\nminimum = 4\n{keys}\n")
}

fn statuses(gateway: &Gateway, count: usize) -> Vec<u16> {
    (0..count).map(|_| gateway.get("/", &[]).status).collect()
}

fn api(gateway: &Gateway, method: &str, path: &str) -> ClientResponse {
    let target = format!("/api/v1/breakers{path}");
    Client::connect(gateway.admin).request(method, &target, &[("host", "localhost")], b"")
}

/// The first line of an event, which may reach the test after the response.
fn event(gateway: &Gateway, name: &str) -> serde_json::Value {
    let log = &gateway.process.stderr;
    wait_for(|| !log.events(name).is_empty(), STEP_TIMEOUT);
    log.events(name).remove(0)
}

fn listed(response: &ClientResponse) -> serde_json::Value {
    assert_eq!(response.status, 200, "{}", response.text());
    let mut list: serde_json::Value = serde_json::from_str(&response.text()).expect("JSON");
    list["breakers"][0].take()
}

fn degraded(gateway: &Gateway) -> serde_json::Value {
    let ready: serde_json::Value = serde_json::from_str(&gateway.admin("/ready").text()).expect("JSON");
    ready["degraded"].clone()
}

#[test]
fn state_follows_time_without_traffic() {
    let (origin, _) = broken_origin();
    let gateway = Gateway::start(&one_route(origin.address, "", &breaker("open = \"1s\"")));
    assert_eq!(statuses(&gateway, 5), [500, 500, 500, 500, 503]);
    assert_eq!((gateway.metric(STATE), degraded(&gateway)), (2.0, serde_json::json!(["breaker all"])));
    // No request is sent meanwhile.
    wait_for(|| gateway.metric(STATE) == 1.0, STEP_TIMEOUT);
    assert_eq!((degraded(&gateway), origin.count()), (serde_json::json!([]), 4));
    let half_open = event(&gateway, "breaker_half_open");
    assert_eq!((&half_open["route"], &half_open["upstream"]), (&"all".into(), &"origin".into()));
    assert_eq!(half_open["reason"], "open_time_passed");
    let opened = event(&gateway, "breaker_opened");
    assert_eq!((&opened["failed_ratio"], &opened["upstream"]), (&1.0.into(), &"origin".into()));
    let seconds = opened["seconds"].as_f64().expect("a number");
    assert!((1.0..=1.2).contains(&seconds), "{seconds}");
}

#[test]
fn clients_are_asked_to_wait_until_the_breaker_can_be_closed() {
    let (origin, _) = broken_origin();
    let config =
        one_route(origin.address, "degrade = { retry_after = \"1s\" }", &breaker("open = \"20s\"\nramp = \"10s\""));
    let gateway = Gateway::start(&config);
    statuses(&gateway, 4);
    let response = gateway.get("/", &[]);
    let seconds: u64 = response.field("retry-after").and_then(|value| value.parse().ok()).expect("a number");
    let closes = listed(&api(&gateway, "GET", ""))["closes_in_seconds"].as_f64().expect("a number");
    assert!(response.status == 503 && (29..=36).contains(&seconds), "{seconds}");
    assert!((28.0..=34.0).contains(&closes) && seconds as f64 >= closes - 1.0, "{seconds} {closes}");
}

#[test]
fn breaker_in_shadow_mode_logs_and_counts_and_rejects_nothing() {
    let (origin, _) = broken_origin();
    let gateway = Gateway::start(&one_route(origin.address, "", &breaker("mode = \"shadow\"")));
    assert_eq!(statuses(&gateway, 10), [500; 10]);
    assert_eq!(origin.count(), 10);
    let rejections = "tidegate_breaker_rejections_total{route=\"all\",upstream=\"origin\",mode=\"shadow\"}";
    assert_eq!((gateway.metric(rejections), gateway.metric(STATE)), (6.0, 2.0));
    assert_eq!(event(&gateway, "breaker_opened")["mode"], "shadow");
    assert_eq!(degraded(&gateway), serde_json::json!([]));
}

#[test]
fn routes_of_an_upstream_share_its_breaker_if_it_says_so() {
    for (scope, expected) in [("route", 500), ("upstream", 503)] {
        let (origin, _) = broken_origin();
        let other = "[[routes]]\nname = \"other\"\nmatch = { path = \"/other\" }\nupstream = \"origin\"\n";
        let keys = breaker(&format!("scope = \"{scope}\""));
        let gateway = Gateway::start(&one_route(origin.address, "", &format!("{other}{keys}")));
        statuses(&gateway, 4);
        assert_eq!(gateway.get("/other", &[]).status, expected, "{scope}");
        let is_shared = scope == "upstream";
        let route = event(&gateway, "breaker_opened")["route"].clone();
        assert_eq!(route, if is_shared { "*" } else { "all" });
        assert_eq!(api(&gateway, "POST", "/route/other?state=closed&for=1m").status, if is_shared { 404 } else { 200 });
        assert_eq!(api(&gateway, "POST", "/upstream/origin?state=closed&for=1m").status, 200);
        assert_eq!(gateway.get("/other", &[]).status, 500, "{scope}");
        assert_eq!(statuses(&gateway, 20), [500; 20], "{scope}");
    }
}

#[test]
fn operator_opens_and_closes_a_breaker_for_a_time() {
    let (origin, is_broken) = broken_origin();
    is_broken.store(false, Ordering::SeqCst);
    let config = |open: &str| one_route(origin.address, "", &breaker(&format!("open = \"{open}\"")));
    let gateway = Gateway::start(&config("5s"));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let list = listed(&api(&gateway, "POST", "/route/all?state=open&for=1h"));
    assert_eq!((&list["state"], &list["override"]["state"]), (&"open".into(), &"open".into()));
    assert_eq!((statuses(&gateway, 3), origin.count()), (vec![503; 3], 1));
    let overridden = event(&gateway, "breaker_overridden");
    assert_eq!((&overridden["state"], &overridden["seconds"]), (&"open".into(), &3_600.into()));
    assert_eq!(degraded(&gateway), serde_json::json!(["breaker all"]));
    // It stays with another configuration.
    gateway.rewrite(&config("6s"));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).status, 503);
    let list = listed(&api(&gateway, "DELETE", "/route/all"));
    assert_eq!((&list["state"], &list["override"]), (&"half-open".into(), &serde_json::Value::Null));
    assert_eq!(gateway.get("/", &[]).status, 200);
    assert_eq!(event(&gateway, "breaker_override_ended")["reason"], "cleared");
    let nothing = api(&gateway, "DELETE", "/route/all");
    assert_eq!(nothing.status, 404);
    assert!(nothing.text().starts_with("no state is set for `route/all`"), "{}", nothing.text());
    // And the other way round, until its time has passed.
    is_broken.store(true, Ordering::SeqCst);
    listed(&api(&gateway, "POST", "/route/all?state=closed&for=1s"));
    assert_eq!(statuses(&gateway, 8), [500; 8]);
    let ended = || gateway.process.stderr.events("breaker_override_ended").len() == 2;
    wait_for(ended, STEP_TIMEOUT);
    assert_eq!(gateway.process.stderr.events("breaker_override_ended")[1]["reason"], "expired");
    for (method, path, status) in [
        ("POST", "/route/none?state=open&for=1m", 404),
        ("POST", "/upstream/none?state=open&for=1m", 404),
        ("POST", "/route/all?state=open", 400),
        ("POST", "/route/all?state=ajar&for=1m", 400),
        ("DELETE", "/route/all", 404),
        ("DELETE", "/upstream/origin", 404),
        ("GET", "/route/all", 405),
        ("POST", "", 405),
    ] {
        assert_eq!(api(&gateway, method, path).status, status, "{method} {path}");
    }
}
