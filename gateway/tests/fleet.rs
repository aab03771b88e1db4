//! Two gateways that share a real Redis server: a purge on one takes effect on the other.

mod support;

#[path = "support/redis.rs"]
mod server;

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use server::Redis;
use support::client::ClientResponse;
use support::{Client, Gate, Gateway, Origin, ReceivedRequest, Script, lock, one_route, tidegate, wait_for};

const CACHED: &str = "cache = { mode = \"standard\" }";
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Responses tagged with their path.
fn tagged(request: &ReceivedRequest) -> Script {
    let tag = request.target.trim_start_matches('/');
    Script::ok(&[("Cache-Control", "max-age=60"), ("Surrogate-Key", tag)], &request.target)
}

fn gateway(origin: &Origin, redis: &Redis, node: &str) -> Gateway {
    let rest = format!(
        "[server]\nnode = \"{node}\"\n[redis]\ndeadline = \"1s\"\n[redis.regions.default]\nendpoints = [\"{}\"]",
        redis.url()
    );
    let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
    wait_for(|| degraded(&gateway).is_empty(), STEP_TIMEOUT);
    gateway
}

fn degraded(gateway: &Gateway) -> Vec<String> {
    let ready: serde_json::Value = serde_json::from_str(&gateway.admin("/ready").text()).expect("JSON");
    let all = ready["degraded"].as_array().expect("a list").iter();
    all.map(|name| name.as_str().expect("text").to_owned()).collect()
}

fn purge(gateway: &Gateway, arguments: &[&str]) -> (bool, String, String) {
    let admin = gateway.admin.to_string();
    let output = tidegate().arg("purge").args(arguments).args(["--admin", &admin]).output().expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// Whether the response is a hit of the gateway's local cache.
fn is_local_hit(response: &ClientResponse) -> bool {
    response.is_hit() && !response.cache_status().contains("remote")
}

/// Fills the local caches of both gateways.
fn fill(one: &Gateway, other: &Gateway, target: &str) {
    one.get(target, &[]);
    wait_for(|| is_local_hit(&one.get(target, &[])), STEP_TIMEOUT);
    wait_for(|| is_local_hit(&other.get(target, &[])), STEP_TIMEOUT);
}

/// A purge or an override for a node that does not exist is an error with the names that exist.
/// Without Redis, the nodes that a purge does not reach are reported.
#[test]
fn purge_names_the_nodes_that_exist_and_those_that_it_does_not_reach() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    let (is_complete, stdout, stderr) = purge(&one, &["--tag", "a", "--node", "othr"]);
    assert!(!is_complete && stdout.is_empty(), "{stdout}");
    assert!(stderr.contains("the fleet has no node `othr`; its nodes: one, other"), "{stderr}");
    let (is_complete, stdout, _) = purge(&one, &["--tag", "a", "--node", "other"]);
    assert!(is_complete && stdout.contains("(on other)"), "{stdout}");
    // Both know each other by now: `purge` read the members on one; `other` reads them by itself.
    let (is_complete, _, stderr) = purge(&other, &["--tag", "a"]);
    assert!(is_complete, "{stderr}");
    redis.kill();
    wait_for(|| !degraded(&one).is_empty() && !degraded(&other).is_empty(), STEP_TIMEOUT);
    for (gateway, unreached) in [(&one, "other"), (&other, "one")] {
        let (is_complete, _, stderr) = purge(gateway, &["--tag", "a"]);
        let expected = format!("not acknowledged by nodes {unreached}: they apply it");
        assert!(!is_complete && stderr.contains(&expected), "{stderr}");
        assert!(stderr.contains("unreachable servers"), "{stderr}");
    }
    // It cannot be known that a node does not exist.
    let (_, _, stderr) = purge(&one, &["--tag", "a", "--node", "othr"]);
    assert!(stderr.contains("not acknowledged by nodes othr"), "{stderr}");
}

#[test]
fn purge_reaches_all_nodes_and_reports_hung_ones() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    for target in ["/a", "/b"] {
        fill(&one, &other, target);
    }
    let requests = origin.count();
    let (is_complete, stdout, _) = purge(&one, &["--tag", "a"]);
    assert!(is_complete && stdout.contains("(on one, other)"), "{stdout}");
    assert!(!other.get("/a", &[]).cache_status().contains("; hit"), "neither the local cache nor Redis has the object");
    assert!(other.get("/b", &[]).is_hit());
    assert_eq!(origin.count(), requests + 1);

    fill(&one, &other, "/a");
    other.process.signal("STOP");
    let url = format!("http://{}/b", one.address);
    let (is_complete, _, stderr) = purge(&one, &["--tag", "a", "--url", &url]);
    assert!(!is_complete && stderr.contains("not acknowledged by nodes other"), "{stderr}");
    other.process.signal("CONT");
    let began = Instant::now();
    wait_for(|| !is_local_hit(&other.get("/a", &[])), STEP_TIMEOUT);
    println!("a hung node applied a purge {:?} after it resumed", began.elapsed());
    assert_eq!(other.metric("tidegate_bus_messages_total{kind=\"purge\"}"), 3.0);
}

/// A process that is killed does not leave the fleet; the next one of its name replaces it.
#[test]
fn a_node_that_is_back_after_a_crash_has_acknowledged() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    assert!(purge(&one, &["--tag", "a"]).0);
    other.process.signal("KILL");
    let (is_complete, stdout, stderr) = purge(&one, &["--tag", "a"]);
    assert!(!is_complete && stdout.contains("(on one)"), "{stdout}");
    assert!(stderr.contains("not acknowledged by nodes other"), "{stderr}");
    let back = gateway(&origin, &redis, "other");
    for gateway in [&one, &back] {
        let (is_complete, stdout, stderr) = purge(gateway, &["--tag", "a"]);
        assert!(is_complete && stdout.contains("(on one, other)"), "{stdout}{stderr}");
    }
    let open = "/api/v1/breakers/route/all?state=open&for=1s";
    let opened = Client::connect(one.admin).request("POST", open, &[("host", "localhost")], b"");
    let opened: serde_json::Value = serde_json::from_str(&opened.text()).expect("JSON");
    assert_eq!(opened["unacknowledged_nodes"], serde_json::json!([]), "{opened}");
}

#[test]
fn unsafe_request_invalidates_on_all_nodes() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    fill(&one, &other, "/a");
    let fields = [("host", "shop.test")];
    let is_hit = |gateway: &Gateway| gateway.get("/c", &fields).is_hit();
    is_hit(&one);
    wait_for(|| is_hit(&one) && is_hit(&other), STEP_TIMEOUT);
    assert_eq!(one.request("POST", "/c", &fields, b"").status, 200);
    wait_for(|| !is_hit(&other), STEP_TIMEOUT);
    assert!(is_local_hit(&other.get("/a", &[])), "other objects are unaffected");
}

/// The origin holds the old response until the unsafe request has been answered on the other node.
#[test]
fn unsafe_request_reaches_a_fetch_that_runs_on_another_node() {
    const ROUNDS: usize = 10;
    let gates: Vec<Gate> = (0..ROUNDS).map(|_| Gate::default()).collect();
    let (held, changed) = (gates.clone(), Mutex::new(HashSet::new()));
    let origin = Origin::start(move |request| {
        let number: usize = request.target.trim_start_matches('/').parse().expect("a number");
        let cacheable = [("Cache-Control", "max-age=60")];
        if request.method == "POST" {
            lock(&changed).insert(number);
            return Script::ok(&[], "changed");
        }
        if lock(&changed).contains(&number) {
            return Script::ok(&cacheable, "new");
        }
        Script::new().wait(&held[number]).head(200, &[cacheable[0], ("Content-Length", "3")]).send("old")
    });
    let redis = Redis::start();
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    let fields = [("host", "shop.test")];
    for (number, gate) in gates.iter().enumerate() {
        let (target, requests) = (format!("/{number}"), origin.count());
        std::thread::scope(|scope| {
            let old = scope.spawn(|| one.get(&target, &fields).text());
            wait_for(|| origin.count() > requests, STEP_TIMEOUT);
            assert_eq!(other.request("POST", &target, &fields, b"").status, 200);
            gate.open();
            assert_eq!(old.join().expect("a response"), "old");
        });
        assert_eq!(other.get(&target, &fields).text(), "new", "round {number}");
        // The removal is queued, so that no request waits for Redis. Without it, the old response
        // would be served for its lifetime.
        wait_for(|| one.get(&target, &fields).text() == "new", STEP_TIMEOUT);
    }
    // Nor does Redis have an old response.
    let late = gateway(&origin, &redis, "late");
    for (number, node) in (0..ROUNDS).flat_map(|number| [&one, &other, &late].map(|node| (number, node))) {
        assert_eq!(node.get(&format!("/{number}"), &fields).text(), "new", "{number}");
    }
}

/// The marker of the new responses is stored while an old variant is still being fetched.
#[test]
fn unsafe_request_reaches_a_fetch_of_another_variant() {
    let (gate, changed) = (Gate::default(), AtomicBool::new(false));
    let held = gate.clone();
    let origin = Origin::start(move |request| {
        let fields = [("Cache-Control", "max-age=60"), ("Vary", "Accept-Language"), ("Content-Length", "3")];
        if request.method == "POST" {
            changed.store(true, Ordering::Relaxed);
            return Script::ok(&[], "changed");
        }
        if changed.load(Ordering::Relaxed) {
            return Script::new().head(200, &fields).send("new");
        }
        let script = Script::new();
        let script = if request.field("accept-language") == Some("de") { script.wait(&held) } else { script };
        script.head(200, &fields).send("old")
    });
    let redis = Redis::start();
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    let fields = |language| [("host", "shop.test"), ("accept-language", language)];
    assert_eq!(one.get("/page", &fields("en")).text(), "old");
    std::thread::scope(|scope| {
        let old = scope.spawn(|| one.get("/page", &fields("de")).text());
        wait_for(|| origin.count() == 2, STEP_TIMEOUT);
        assert_eq!(other.request("POST", "/page", &fields("de"), b"").status, 200);
        wait_for(|| one.get("/page", &fields("en")).text() == "new", STEP_TIMEOUT);
        wait_for(|| one.get("/page", &fields("en")).is_hit(), STEP_TIMEOUT);
        gate.open();
        assert_eq!(old.join().expect("a response"), "old");
    });
    for node in [&one, &other] {
        assert_eq!(node.get("/page", &fields("de")).text(), "new");
    }
}

#[test]
fn tasks_of_shards_are_listed_with_their_waits() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let gateway = gateway(&origin, &redis, "one");
    gateway.get("/a", &[]);
    let is_listed = |kind: &str, name: &str, waiting_for: &str| {
        let list: serde_json::Value = serde_json::from_str(&gateway.admin("/api/v1/tasks").text()).expect("JSON");
        let tasks = list["tasks"].as_array().expect("a list");
        assert_eq!(list["count"].as_u64(), Some(tasks.len() as u64));
        tasks.iter().any(|task| {
            task["kind"] == kind
                && task["name"].as_str().is_some_and(|listed| listed.ends_with(name))
                && task["waiting_for"] == waiting_for
                && task["age_seconds"].as_f64().is_some_and(|age| (0.0..60.0).contains(&age))
        })
    };
    wait_for(|| is_listed("shard_writer", " writes", "shard_job"), STEP_TIMEOUT);
    for name in [" reads", " writes", " bus"] {
        wait_for(|| is_listed("shard_connection", name, "shard_exchange"), STEP_TIMEOUT);
    }
    assert!(gateway.metric("tidegate_tasks{kind=\"shard_writer\"}") >= 1.0);
    assert_eq!(gateway.metric("tidegate_task_panics_total{kind=\"shard_codec\"}"), 0.0);
}

#[test]
fn purge_without_redis_takes_effect_locally_and_is_published_later() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let one = gateway(&origin, &redis, "one");
    one.get("/a", &[]);
    let port = redis.kill();
    let (is_complete, stdout, stderr) = purge(&one, &["--tag", "a"]);
    assert!(
        !is_complete && stdout.contains("(on one)") && stderr.contains("they receive it when they are reachable again"),
        "{stdout}{stderr}"
    );
    assert!(!one.get("/a", &[]).is_hit());
    wait_for(|| one.metric("tidegate_purges_pending") == 1.0, STEP_TIMEOUT);
    let _redis = Redis::start_on(port);
    wait_for(|| one.metric("tidegate_purges_pending") == 0.0, STEP_TIMEOUT);
    wait_for(|| degraded(&one).is_empty(), STEP_TIMEOUT);
    // Objects cached during the subscription gap are fetched again: another node may have
    // invalidated them.
    let requests = origin.count();
    one.get("/a", &[]);
    assert_eq!((one.get("/a", &[]).is_hit(), origin.count()), (true, requests + 1));
}
