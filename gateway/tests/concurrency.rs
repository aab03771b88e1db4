//! The concurrency limit: calls that wait, order by user class, rejections, and clients that go.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use support::{Client, ClientResponse, Gate, Gateway, Origin, STEP_TIMEOUT, Script, one_route, wait_for};

const LIMIT: &str = "tidegate_upstream_concurrency_limit{upstream=\"origin\"}";
const IN_FLIGHT: &str = "tidegate_upstream_concurrency_in_flight{upstream=\"origin\"}";
const WAITING: &str = "tidegate_upstream_concurrency_waiting{upstream=\"origin\"}";

/// A gateway whose upstream may have two calls in progress.
fn gateway(origin: &Origin, concurrency: &str, rest: &str) -> Gateway {
    let config = one_route(origin.address, "cache = { mode = \"off\" }", rest);
    let keys = format!("[upstreams.origin]\nconcurrency = {{ min = 2, max = 2{concurrency} }}\n");
    Gateway::start(&config.replace("[upstreams.origin]\n", &keys))
}

/// An origin whose responses wait for the gate of their path: `/0` to `/9`.
fn gated_origin() -> (Origin, Arc<Vec<Gate>>) {
    let gates: Arc<Vec<Gate>> = Arc::new((0..10).map(|_| Gate::default()).collect());
    let opened = Arc::clone(&gates);
    let origin = Origin::start(move |request| {
        let index: usize = request.target.trim_start_matches('/').parse().expect("a number");
        Script::new().wait(&opened[index]).head(200, &[("Content-Length", "0")])
    });
    (origin, gates)
}

/// Sends a GET in a thread.
fn send(
    gateway: &Gateway,
    target: &'static str,
    fields: &'static [(&'static str, &'static str)],
) -> thread::JoinHandle<ClientResponse> {
    let mut client = gateway.connect();
    thread::spawn(move || client.get(target, fields))
}

fn targets(origin: &Origin) -> Vec<String> {
    origin.requests().iter().map(|request| request.target.clone()).collect()
}

#[test]
fn calls_above_the_limit_wait_and_are_rejected_after_a_time() {
    let (origin, gates) = gated_origin();
    let gateway = gateway(&origin, ", wait = \"400ms\"", "[log]\naccess = \"stdout\"\n");
    assert_eq!(gateway.metric(LIMIT), 2.0);
    let first: Vec<_> = ["/0", "/1"].map(|target| send(&gateway, target, &[])).into();
    wait_for(|| gateway.metric(IN_FLIGHT) == 2.0, STEP_TIMEOUT);
    let rejected = gateway.get("/2", &[]);
    assert_eq!((rejected.status, rejected.field("retry-after").is_some()), (503, true));
    assert_eq!(rejected.field("proxy-status"), Some("tidegate; error=connection_limit_reached"));
    assert!(rejected.cache_status().ends_with("detail=concurrency_limit"), "{}", rejected.cache_status());
    assert!(rejected.text().contains("concurrency_limit"), "{}", rejected.text());
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"concurrency_limit\"}"), 1.0);
    let rejections = "tidegate_upstream_concurrency_rejections_total{upstream=\"origin\",reason=\"wait\"}";
    assert_eq!((gateway.metric(rejections), gateway.metric(WAITING)), (1.0, 0.0));
    let event = &gateway.process.stderr.event("upstream_overloaded");
    assert_eq!((&event["upstream"], &event["reason"], &event["limit"]), (&"origin".into(), &"wait".into(), &2.into()));
    let line = &gateway.access_log(1)[0];
    assert_eq!((&line["failure"], &line["blame"]), (&"concurrency_limit".into(), &"gateway".into()));
    gates.iter().for_each(Gate::open);
    assert!(first.into_iter().all(|call| call.join().expect("a response").status == 200));
    assert_eq!((gateway.get("/3", &[]).status, origin.count()), (200, 3), "the rejected call was not sent");
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);
}

#[test]
fn calls_of_heavier_user_classes_come_first() {
    let (origin, gates) = gated_origin();
    let identity = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-user\"\ntier = \"header:x-tier\"\n[tiers]\ngold = 2.0\nplatinum = 3.2\n";
    let gateway = gateway(&origin, ", wait = \"30s\"", identity);
    let first: Vec<_> = ["/0", "/1"].map(|target| send(&gateway, target, &[])).into();
    wait_for(|| gateway.metric(IN_FLIGHT) == 2.0, STEP_TIMEOUT);
    let mut calls = Vec::new();
    for (index, (target, tier)) in [("/2", "standard"), ("/3", "platinum"), ("/4", "gold")].into_iter().enumerate() {
        let mut client = gateway.connect();
        calls.push(thread::spawn(move || client.get(target, &[("x-user", "u"), ("x-tier", tier)])));
        wait_for(|| gateway.metric(WAITING) == (index + 1) as f64, STEP_TIMEOUT);
    }
    for (gate, expected) in [(0, "/3"), (3, "/4"), (4, "/2")] {
        gates[gate].open();
        wait_for(|| targets(&origin).iter().any(|target| target == expected), STEP_TIMEOUT);
        assert_eq!(targets(&origin).last().map(String::as_str), Some(expected));
    }
    gates.iter().for_each(Gate::open);
    assert!(first.into_iter().chain(calls).all(|call| call.join().expect("a response").status == 200));
}

#[test]
fn clients_that_go_leave_the_queue_and_return_their_slots() {
    let (origin, gates) = gated_origin();
    let gateway = gateway(&origin, ", wait = \"30s\"", "");
    let mut running: Vec<Client> = ["/0", "/1"].map(|target| started(&gateway, target)).into();
    wait_for(|| gateway.metric(IN_FLIGHT) == 2.0, STEP_TIMEOUT);
    let waiting: Vec<Client> = (0..5).map(|_| started(&gateway, "/2")).collect();
    wait_for(|| gateway.metric(WAITING) == 5.0, STEP_TIMEOUT);
    drop(waiting);
    wait_for(|| gateway.metric(WAITING) == 0.0, STEP_TIMEOUT);
    // A cancelled call returns its slot to one that waits.
    let last = send(&gateway, "/3", &[]);
    wait_for(|| gateway.metric(WAITING) == 1.0, STEP_TIMEOUT);
    drop(running.pop());
    wait_for(|| targets(&origin).iter().any(|target| target == "/3"), STEP_TIMEOUT);
    gates.iter().for_each(Gate::open);
    assert_eq!(last.join().expect("a response").status, 200);
    assert!(!targets(&origin).contains(&"/2".to_owned()), "nothing was sent for clients that are gone");
    wait_for(|| gateway.metric(IN_FLIGHT) == 0.0, STEP_TIMEOUT);
}

fn started(gateway: &Gateway, target: &str) -> Client {
    let mut client = gateway.connect();
    client.send_get(target, &[]);
    client
}

#[test]
fn rejected_call_is_answered_by_a_stale_response() {
    let gate = Gate::default();
    let waits = gate.clone();
    let origin = Origin::start(move |request| match (request.target.as_str(), request.number) {
        ("/kept", 0) => Script::ok(&[("Cache-Control", "max-age=0, stale-if-error=60"), ("ETag", "\"a\"")], "kept"),
        _ => Script::new().wait(&waits).head(200, &[("Content-Length", "0")]),
    });
    let config = one_route(origin.address, "", "");
    let keys = "[upstreams.origin]\nconcurrency = { min = 2, max = 2, wait = \"100ms\" }\n";
    let gateway = Gateway::start(&config.replace("[upstreams.origin]\n", keys));
    assert_eq!(gateway.get("/kept", &[]).text(), "kept");
    let running: Vec<_> = ["/0", "/1"].map(|target| send(&gateway, target, &[])).into();
    wait_for(|| gateway.metric(IN_FLIGHT) == 2.0, STEP_TIMEOUT);
    let stale = gateway.get("/kept", &[]);
    assert_eq!((stale.status, stale.text()), (200, "kept".to_owned()));
    assert_eq!(stale.field("proxy-status"), Some("tidegate; error=connection_limit_reached"));
    gate.open();
    assert!(running.into_iter().all(|call| call.join().expect("a response").status == 200));
}

/// A response counts up to its head: an event stream occupies no slot.
#[test]
fn bodies_and_slow_readers_occupy_no_slot() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/events" => Script::new().head(200, &[("Content-Type", "text/event-stream")]).send("data: 1\n\n").hang(),
        _ => Script::ok(&[], "ok"),
    });
    let gateway = gateway(&origin, ", wait = \"100ms\"", "");
    let streams: Vec<Client> = (0..5)
        .map(|_| {
            let mut client = started(&gateway, "/events");
            assert_eq!(client.read_head().status, 200);
            client
        })
        .collect();
    assert_eq!((gateway.metric(IN_FLIGHT), gateway.get("/", &[]).status), (0.0, 200));
    drop(streams);
}

#[test]
fn limit_and_its_calls_outlive_a_reload() {
    let (origin, gates) = gated_origin();
    let gateway = gateway(&origin, ", wait = \"100ms\"", "");
    let running: Vec<_> = ["/0", "/1"].map(|target| send(&gateway, target, &[])).into();
    wait_for(|| gateway.metric(IN_FLIGHT) == 2.0, STEP_TIMEOUT);
    let config = std::fs::read_to_string(gateway.dir.path().join("tidegate.toml")).expect("the configuration");
    gateway.rewrite(&config.replace("wait = \"100ms\" }", "wait = \"100ms\" }\ntimeout = \"9s\""));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    assert_eq!((gateway.metric(IN_FLIGHT), gateway.get("/2", &[]).status), (2.0, 503));
    gates.iter().for_each(Gate::open);
    assert!(running.into_iter().all(|call| call.join().expect("a response").status == 200));
    wait_for(|| gateway.metric(IN_FLIGHT) == 0.0, Duration::from_secs(5));
}
