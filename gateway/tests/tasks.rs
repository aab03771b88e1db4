//! The tasks of the process: `GET /api/v1/tasks`, and interim responses of tasks that no client
//! awaits.

mod support;

use serde_json::Value;
use support::{Gate, Gateway, Origin, STEP_TIMEOUT, Script, one_route, wait_for};

/// `kind`, `waiting_for` and `thread` of the listed tasks.
fn tasks(gateway: &Gateway) -> Vec<(String, String, String)> {
    let list: Value = serde_json::from_slice(&gateway.admin("/api/v1/tasks").body).expect("JSON");
    let text = |task: &Value, key: &str| task[key].as_str().expect("a string").to_owned();
    let tasks = list["tasks"].as_array().expect("a list");
    let count = list["count"].as_u64().expect("a number");
    assert_eq!(count, tasks.len() as u64);
    assert!(tasks.iter().all(|task| task["age_seconds"].as_f64().is_some_and(|age| (0.0..60.0).contains(&age))));
    tasks.iter().map(|task| (text(task, "kind"), text(task, "waiting_for"), text(task, "thread"))).collect()
}

fn is_listed(gateway: &Gateway, kind: &str, waiting_for: &str) -> bool {
    tasks(gateway).iter().any(|task| (&*task.0, &*task.1) == (kind, waiting_for) && task.2.starts_with("worker-"))
}

fn count(gateway: &Gateway, kind: &str) -> usize {
    tasks(gateway).iter().filter(|task| task.0 == kind).count()
}

#[test]
fn tasks_are_listed_while_they_run() {
    let (head, body) = (Gate::default(), Gate::default());
    let (head_gate, body_gate) = (head.clone(), body.clone());
    let fields: &[(&str, &str)] = &[("Cache-Control", "max-age=60"), ("Content-Length", "4")];
    let origin =
        Origin::start(move |_| Script::new().wait(&head_gate).head(200, fields).send("ha").wait(&body_gate).send("lf"));
    let gateway = Gateway::start(&one_route(origin.address, "cache = { }", "[server]\nworkers = 2"));
    for service in ["listener", "incoming", "maintenance"] {
        wait_for(|| count(&gateway, service) == 2, STEP_TIMEOUT);
    }
    for service in ["admin", "reload", "overrides", "state_report"] {
        wait_for(|| count(&gateway, service) == 1, STEP_TIMEOUT);
    }
    assert_eq!((count(&gateway, "connection"), count(&gateway, "fill")), (0, 0));
    let mut client = gateway.connect();
    wait_for(|| is_listed(&gateway, "connection", "client_head"), STEP_TIMEOUT);
    client.send_get("/page", &[]);
    wait_for(|| tasks(&gateway).iter().any(|task| task.1 == "upstream_head"), STEP_TIMEOUT);
    head.open();
    wait_for(|| is_listed(&gateway, "fill", "upstream_body"), STEP_TIMEOUT);
    assert_eq!((gateway.metric("tidegate_tasks{kind=\"fill\"}"), count(&gateway, "connection")), (1.0, 1));
    body.open();
    assert_eq!(client.read_response().text(), "half");
    wait_for(|| count(&gateway, "fill") == 0 && is_listed(&gateway, "connection", "client_head"), STEP_TIMEOUT);
    drop(client);
    wait_for(|| count(&gateway, "connection") == 0, STEP_TIMEOUT);
    assert_eq!(gateway.metric("tidegate_tasks{kind=\"connection\"}"), 0.0);
}

#[test]
fn task_list_refuses_post() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let post = support::Client::connect(gateway.admin).request("POST", "/api/v1/tasks", &[("host", "localhost")], b"");
    assert_eq!((post.status, post.field("allow")), (405, Some("GET, HEAD")));
}

/// The interim responses of a background validation belong to no client: not to the one whose
/// request started it, either.
#[test]
fn interim_responses_of_a_background_validation_reach_no_client() {
    let (validation, slow) = (Gate::default(), Gate::default());
    let (validation_gate, slow_gate) = (validation.clone(), slow.clone());
    let stale = ("Cache-Control", "max-age=0, stale-while-revalidate=60");
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/slow" => Script::new().wait(&slow_gate).head(200, &[("Content-Length", "4")]).send("slow"),
        _ if request.field("if-none-match").is_none() => Script::ok(&[stale, ("ETag", "\"1\"")], "old"),
        _ => Script::new()
            .wait(&validation_gate)
            .head(103, &[("Link", "</leaked>")])
            .head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "3")])
            .send("new"),
    });
    let gateway = Gateway::start(&one_route(origin.address, "cache = { }", "[server]\nworkers = 1"));
    let mut client = gateway.connect();
    assert_eq!(client.get("/page", &[]).text(), "old");
    // Stale, and starts the validation.
    assert_eq!(client.get("/page", &[]).text(), "old");
    wait_for(|| origin.count() == 2, STEP_TIMEOUT);
    client.send_get("/slow", &[]);
    wait_for(|| origin.count() == 3, STEP_TIMEOUT);
    validation.open();
    wait_for(|| gateway.get("/page", &[]).text() == "new", STEP_TIMEOUT);
    slow.open();
    let response = client.read_response();
    assert_eq!((response.status, response.field("link"), response.text()), (200, None, "slow".into()));
}

/// A client that leads a fetch gets the interim responses of it; a client that joins gets none.
#[test]
fn interim_responses_of_a_shared_fetch_reach_at_most_the_leader() {
    let gate = Gate::default();
    let origin_gate = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new()
            .wait(&origin_gate)
            .head(103, &[("Link", "</a>")])
            .head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "4")])
            .send("page")
    });
    let gateway = Gateway::start(&one_route(origin.address, "cache = { }", "[server]\nworkers = 1"));
    let (mut leader, mut joined) = (gateway.connect(), gateway.connect());
    leader.send_get("/page", &[]);
    wait_for(|| origin.count() == 1, STEP_TIMEOUT);
    joined.send_get("/page", &[]);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 2.0, STEP_TIMEOUT);
    gate.open();
    let first = leader.read_head();
    let response = if first.status == 103 { leader.read_head() } else { first };
    assert_eq!(leader.read_body(response, "GET").text(), "page");
    let response = joined.read_response();
    assert_eq!((response.status, response.text(), origin.count()), (200, "page".into(), 1));
}
