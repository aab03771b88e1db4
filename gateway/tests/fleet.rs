//! Two gateways that share a real Redis server: what is ended on one is ended on the other.

mod support;

#[path = "support/redis.rs"]
mod server;

use std::time::{Duration, Instant};

use server::Redis;
use support::client::Answer;
use support::{Gateway, Origin, Received, Script, one_route, tidegate, wait_for};

const CACHED: &str = "cache = { mode = \"standard\" }";
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers that bear their path as a tag.
fn tagged(request: &Received) -> Script {
    let tag = request.target.trim_start_matches('/');
    Script::ok(&[("Cache-Control", "max-age=60"), ("Surrogate-Key", tag)], &request.target)
}

fn gateway(origin: &Origin, redis: &Redis, node: &str) -> Gateway {
    let rest = format!(
        "[server]\nnode = \"{node}\"\n[redis]\ndeadline = \"1s\"\n[redis.regions.default]\nendpoints = [\"{}\"]",
        redis.url()
    );
    let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
    wait_for(|| degraded(&gateway).is_empty(), PATIENCE);
    gateway
}

fn degraded(gateway: &Gateway) -> Vec<String> {
    let ready: serde_json::Value = serde_json::from_str(&gateway.admin("/ready").text()).expect("JSON");
    let all = ready["degraded"].as_array().expect("a list").iter();
    all.map(|what| what.as_str().expect("text").to_owned()).collect()
}

fn purge(gateway: &Gateway, arguments: &[&str]) -> (bool, String, String) {
    let admin = gateway.admin.to_string();
    let output = tidegate().arg("purge").args(arguments).args(["--admin", &admin]).output().expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// Whether it comes from the gateway's own memory.
fn is_held(answer: &Answer) -> bool {
    answer.is_hit() && !answer.cache_status().contains("remote")
}

/// Fills both, and waits until both hold it.
fn fill(one: &Gateway, other: &Gateway, target: &str) {
    one.get(target, &[]);
    wait_for(|| is_held(&one.get(target, &[])), PATIENCE);
    wait_for(|| is_held(&other.get(target, &[])), PATIENCE);
}

#[test]
fn a_purge_on_one_is_a_purge_on_all_and_a_node_that_hangs_is_named() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    for target in ["/a", "/b"] {
        fill(&one, &other, target);
    }
    let asked = origin.count();
    let (is_done, said, _) = purge(&one, &["--tag", "a"]);
    assert!(is_done && said.contains("(on one, other)"), "{said}");
    assert!(!other.get("/a", &[]).cache_status().contains("; hit"), "neither memory nor the server may answer");
    assert!(other.get("/b", &[]).is_hit());
    assert_eq!(origin.count(), asked + 1);

    fill(&one, &other, "/a");
    other.process.signal("STOP");
    let url = format!("http://{}/b", one.address);
    let (is_done, _, told) = purge(&one, &["--tag", "a", "--url", &url]);
    assert!(!is_done && told.contains("not confirmed by other"), "{told}");
    other.process.signal("CONT");
    let began = Instant::now();
    wait_for(|| !is_held(&other.get("/a", &[])), PATIENCE);
    println!("a node that hung has heard of a purge {:?} after it went on", began.elapsed());
    assert_eq!(other.metric("tidegate_bus_total{kind=\"purge_heard\"}"), 3.0);
}

#[test]
fn an_unsafe_request_on_one_ends_what_the_other_holds() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let (one, other) = (gateway(&origin, &redis, "one"), gateway(&origin, &redis, "other"));
    fill(&one, &other, "/a");
    let fields = [("host", "shop.test")];
    let held = |gateway: &Gateway| gateway.get("/c", &fields).is_hit();
    held(&one);
    wait_for(|| held(&one) && held(&other), PATIENCE);
    assert_eq!(one.request("POST", "/c", &fields, b"").status, 200);
    wait_for(|| !held(&other), PATIENCE);
    assert!(is_held(&other.get("/a", &[])), "what was not named is left alone");
}

#[test]
fn without_its_server_a_purge_holds_here_and_the_server_is_told_later() {
    let (redis, origin) = (Redis::start(), Origin::start(tagged));
    let one = gateway(&origin, &redis, "one");
    one.get("/a", &[]);
    let port = redis.kill();
    let (is_done, said, told) = purge(&one, &["--tag", "a"]);
    assert!(
        !is_done && said.contains("(on one)") && told.contains("told as soon as they answer again"),
        "{said}{told}"
    );
    assert!(!one.get("/a", &[]).is_hit());
    wait_for(|| one.metric("tidegate_purges_pending") == 1.0, PATIENCE);
    let _redis = Redis::start_on(port);
    wait_for(|| one.metric("tidegate_purges_pending") == 0.0, PATIENCE);
    wait_for(|| degraded(&one).is_empty(), PATIENCE);
    // What was held meanwhile is asked for once more: another node might have changed it where this one could not see.
    let asked = origin.count();
    one.get("/a", &[]);
    assert_eq!((one.get("/a", &[]).is_hit(), origin.count()), (true, asked + 1));
}
