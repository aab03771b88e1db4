//! Two gateways that share a real Redis server: a purge on one takes effect on the other.

mod support;

#[path = "support/redis.rs"]
mod server;

use std::time::{Duration, Instant};

use server::Redis;
use support::client::ClientResponse;
use support::{Gateway, Origin, ReceivedRequest, Script, one_route, tidegate, wait_for};

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
