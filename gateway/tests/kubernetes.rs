//! Upstreams whose endpoints are services of Kubernetes: every change of the slices is followed,
//! and no failure of the API server costs a request.
#![cfg(feature = "kubernetes")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use support::api_server::{ApiFault, ApiServer, endpoint, slice};
use support::tls_origin::{Authority, TlsOrigin, TlsOriginOptions};
use support::{Gate, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, wait_for};

/// Short times, so that a silent server is noticed within a test.
const SHORT: &str = "timeout = \"2s\"\nwatch_timeout = \"1s\"";
const ROUND_ROBIN: &str = "balance = \"round-robin\"";
/// For the delays after failures, of up to 10 s.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// One upstream with one endpoint.
fn upstream(url: &str, keys: &str) -> String {
    format!(
        "[server]\nworkers = 1\nzone = \"here\"\n[upstreams.shop]\nendpoints = [\"{url}\"]\n{keys}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\n"
    )
}

/// A gateway in front of the service `shop`, when it knows the endpoints. `section` has keys of
/// `kubernetes`.
fn gateway(api: &ApiServer, section: &str) -> Gateway {
    ready(starting_gateway(api, section))
}

/// A load balancer sends requests from then on.
fn ready(gateway: Gateway) -> Gateway {
    wait_for(|| gateway.admin("/ready").status == 200, STEP_TIMEOUT);
    gateway
}

fn starting_gateway(api: &ApiServer, section: &str) -> Gateway {
    let dir = TempDir::new();
    let section = api.section(&dir, section);
    Gateway::start_in(dir, &format!("{section}{}", upstream("kubernetes://shop.default:http", ROUND_ROBIN)))
}

/// Origins at one port, as pods have it. Each responds with its number.
fn pods<const COUNT: usize>() -> [Origin; COUNT] {
    const NAMES: [&str; 4] = ["1", "2", "3", "4"];
    let first = Origin::start(|_| Script::ok(&[], NAMES[0]));
    let port = first.address.port();
    let mut first = Some(first);
    std::array::from_fn(|index| {
        first.take().unwrap_or_else(|| {
            let last = u8::try_from(index + 1).expect("a few pods");
            Origin::start_at(SocketAddr::from(([127, 0, 0, last], port)), move |_| Script::ok(&[], NAMES[index]))
        })
    })
}

/// The pods that respond, in order.
fn responders(gateway: &Gateway) -> String {
    let mut texts: Vec<String> = (0..8).map(|_| gateway.get("/", &[]).text()).collect();
    texts.sort_unstable();
    texts.dedup();
    texts.concat()
}

/// The state of the service at the admin address.
fn name_state(gateway: &Gateway) -> Value {
    let status: Value = serde_json::from_str(&gateway.admin("/api/v1/status").text()).expect("JSON");
    status["upstreams"][0]["names"][0].clone()
}

fn failures(gateway: &Gateway) -> Vec<Value> {
    gateway.process.stderr.events("lookup_failed")
}

fn recoveries(gateway: &Gateway) -> usize {
    gateway.process.stderr.events("lookup_recovered").len()
}

#[test]
fn slices_are_followed_and_requests_and_connections_survive() {
    let api = ApiServer::start();
    let [one, two, three] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    api.set(slice("shop-b", "shop", &[two.address, one.address]));
    api.set(slice("other-a", "other", &[three.address]));
    let gateway = gateway(&api, "");
    assert_eq!(responders(&gateway), "12");
    assert_eq!(name_state(&gateway)["addresses"], 2, "an address of two slices counts once");
    api.set(slice("shop-b", "shop", &[three.address]));
    wait_for(|| responders(&gateway) == "13", STEP_TIMEOUT);
    let gone = two.count();
    assert_eq!(responders(&gateway), "13");
    assert_eq!(two.count(), gone);
    assert_eq!([one.connections(), three.connections()], [1, 1], "connections are kept");
    let gate = Gate::default();
    let waited = gate.clone();
    let slow = Origin::start_at(SocketAddr::from(([127, 0, 0, 9], one.address.port())), move |_| {
        Script::new().head(200, &[("content-length", "4")]).send("la").wait(&waited).send("st")
    });
    api.delete("shop-b");
    api.set(slice("shop-a", "shop", &[slow.address]));
    let is_used = |pod: &Origin| gateway.admin("/api/v1/status").text().contains(&format!("@{}\"", pod.address));
    wait_for(|| is_used(&slow) && !is_used(&one) && !is_used(&three), STEP_TIMEOUT);
    let mut client = gateway.connect();
    client.send_get("/slow", &[]);
    slow.wait_for_requests(1);
    api.set(slice("shop-a", "shop", &[two.address]));
    wait_for(|| is_used(&two) && !is_used(&slow), STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).text(), "2");
    gate.open();
    let response = client.read_response();
    assert_eq!((response.status, response.text().as_str()), (200, "last"), "its endpoint has left meanwhile");
    assert!(failures(&gateway).is_empty());
    assert_eq!(api.lists(), 1);
}

#[test]
fn conditions_decide_which_endpoints_are_used() {
    let api = ApiServer::start();
    let [one, two, three] = pods();
    let (ready, unready) = (json!({ "ready": true }), json!({ "ready": false }));
    let leaving = json!({ "ready": false, "serving": true, "terminating": true });
    let set = |conditions: [&Value; 3]| {
        let mut changed = slice("shop-a", "shop", &[one.address, two.address, three.address]);
        for (endpoint, conditions) in changed["endpoints"].as_array_mut().expect("endpoints").iter_mut().zip(conditions)
        {
            endpoint["conditions"] = conditions.clone();
        }
        api.set(changed);
    };
    set([&ready, &leaving, &unready]);
    let gateway = gateway(&api, "");
    assert_eq!(responders(&gateway), "1");
    set([&unready, &leaving, &unready]);
    wait_for(|| responders(&gateway) == "2", STEP_TIMEOUT);
    set([&Value::Null, &leaving, &json!({})]);
    wait_for(|| responders(&gateway) == "13", STEP_TIMEOUT);
    set([&unready; 3]);
    wait_for(|| gateway.get("/", &[]).status == 503, STEP_TIMEOUT);
}

#[test]
fn service_without_endpoints_has_a_reason_and_recovers_at_once() {
    let api = ApiServer::start();
    let [pod] = pods();
    let gateway = gateway(&api, "");
    for _ in 0..30 {
        let response = gateway.get("/", &[]);
        assert_eq!(
            (response.status, response.field("proxy-status")),
            (503, Some("tidegate; error=destination_unavailable"))
        );
    }
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"no_endpoints\"}"), 30.0);
    assert_eq!(gateway.admin("/ready").status, 200);
    let lines = gateway.process.stderr.events("upstream_failed");
    assert_eq!(lines[0]["kind"], "no_endpoints");
    for _ in 0..2 {
        api.set(slice("shop-a", "shop", &[pod.address]));
        wait_for(|| name_state(&gateway)["addresses"] == 1, STEP_TIMEOUT);
        // The breaker has counted nothing.
        assert_eq!(gateway.get("/", &[]).status, 200);
        api.delete("shop-a");
        wait_for(|| name_state(&gateway)["addresses"] == 0, STEP_TIMEOUT);
        assert_eq!(gateway.get("/", &[]).status, 503);
    }
    assert!(failures(&gateway).is_empty());
}

#[test]
fn closed_watches_continue_at_the_version_where_they_ended() {
    let api = ApiServer::start();
    let [one, two] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    let gateway = gateway(&api, SHORT);
    assert_eq!(responders(&gateway), "1");
    for round in 0..3 {
        wait_for(|| api.open_watches() == 1, STEP_TIMEOUT);
        api.close_watches();
        // It may happen while no watch is open.
        api.set(slice("shop-a", "shop", &[[&one, &two][(round + 1) % 2].address]));
        wait_for(|| responders(&gateway) == ["1", "2"][(round + 1) % 2], STEP_TIMEOUT);
    }
    api.send_event(json!({ "type": "BOOKMARK", "object": { "metadata": { "resourceVersion": "1000000" } } }));
    // The next one, when the time of this one is over.
    wait_for(|| api.watches().iter().any(|watch| watch.version() == Some(1_000_000)), STEP_TIMEOUT);
    let versions: Vec<_> = api.watches().iter().filter_map(|watch| watch.version()).collect();
    assert!(versions.is_sorted(), "{versions:?}");
    assert_eq!((api.lists(), failures(&gateway).len()), (1, 0));
    assert!(gateway.metric("tidegate_kubernetes_watches_total{result=\"ok\"}") >= 3.0);
}

#[test]
fn version_that_is_too_old_is_followed_by_a_list() {
    let api = ApiServer::start();
    let [one, two] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    let gateway = gateway(&api, "");
    assert_eq!(responders(&gateway), "1");
    api.compact(slice("shop-a", "shop", &[two.address]));
    api.close_watches();
    wait_for(|| responders(&gateway) == "2", STEP_TIMEOUT);
    assert_eq!((api.lists(), failures(&gateway).len()), (2, 0));
    assert_eq!(gateway.metric("tidegate_kubernetes_watches_total{result=\"gone\"}"), 1.0);
}

/// Lets the server fail until the gateway tells it, and recover. Returns the error.
fn fail_and_recover(api: &ApiServer, fault: ApiFault) -> String {
    let [one, two] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    // Many bytes take a while on a busy machine.
    let gateway = gateway(api, if fault == ApiFault::Endless { "timeout = \"20s\"" } else { SHORT });
    assert_eq!(responders(&gateway), "1");
    api.fail(fault);
    // Missed, and found by a list or by the next watch.
    api.compact(slice("shop-a", "shop", &[two.address]));
    api.close_watches();
    wait_for(|| !failures(&gateway).is_empty(), RECOVERY_TIMEOUT);
    wait_for(|| gateway.metric("tidegate_upstream_lookups_failing{upstream=\"shop\"}") == 1.0, STEP_TIMEOUT);
    let ready: Value = serde_json::from_str(&gateway.admin("/ready").text()).expect("JSON");
    assert_eq!(ready["degraded"], json!(["lookup shop kubernetes://shop.default:http"]), "{fault:?}");
    let state = name_state(&gateway);
    assert_eq!((&state["addresses"], state["error"].is_string()), (&json!(1), true), "{state}");
    assert_eq!(failures(&gateway)[0]["known"], 1);
    assert_eq!(responders(&gateway), "1", "the last endpoints stay: {fault:?}");
    let seen = api.requests().len();
    wait_for(|| api.requests().len() > seen, RECOVERY_TIMEOUT);
    assert_eq!((failures(&gateway).len(), recoveries(&gateway)), (1, 0), "told once: {fault:?}");
    api.fail(ApiFault::None);
    wait_for(|| responders(&gateway) == "2", RECOVERY_TIMEOUT);
    wait_for(|| name_state(&gateway)["error"].is_null(), STEP_TIMEOUT);
    assert_eq!((failures(&gateway).len(), recoveries(&gateway)), (1, 1), "{fault:?}");
    failures(&gateway)[0]["error"].as_str().expect("a text").to_owned()
}

#[test]
fn server_that_fails_costs_no_request_and_is_told_once() {
    for (fault, wanted) in [
        (ApiFault::Status(403, ""), "verbs `list` and `watch` for `endpointslices` of the group `discovery.k8s.io`"),
        (ApiFault::Status(500, ""), "status 500: refused with 500"),
        (ApiFault::Status(429, "1"), "status 429"),
        (ApiFault::Status(404, ""), "is this the URL of an API server"),
        (ApiFault::Silence, "not answered in time"),
        (ApiFault::Garbage, "malformed"),
        (ApiFault::Endless, "larger than 16777216 bytes"),
    ] {
        let error = fail_and_recover(&ApiServer::start(), fault);
        assert!(error.contains(wanted), "{fault:?}: {error}");
    }
}

#[test]
fn silent_watch_is_noticed_and_its_changes_are_found() {
    let api = ApiServer::start();
    let [one, two] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    let gateway = gateway(&api, SHORT);
    assert_eq!(responders(&gateway), "1");
    api.fail(ApiFault::Stall);
    api.close_watches();
    api.set(slice("shop-a", "shop", &[two.address]));
    // Found by the list after the silence, although every watch is silent.
    wait_for(|| responders(&gateway) == "2", STEP_TIMEOUT);
    let error = failures(&gateway)[0]["error"].as_str().expect("a text").to_owned();
    assert!(error.contains("silent"), "{error}");
    assert!(gateway.metric("tidegate_kubernetes_watches_total{result=\"stalled\"}") >= 1.0);
    api.fail(ApiFault::None);
    wait_for(|| name_state(&gateway)["error"].is_null(), STEP_TIMEOUT);
    api.set(slice("shop-a", "shop", &[one.address]));
    wait_for(|| responders(&gateway) == "1", STEP_TIMEOUT);
}

#[test]
fn rotated_token_is_read_again() {
    let api = ApiServer::start();
    let [one, two] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    let gateway = gateway(&api, SHORT);
    assert_eq!(responders(&gateway), "1");
    gateway.dir.write("token", "second");
    api.set_token("second");
    api.close_watches();
    api.set(slice("shop-a", "shop", &[two.address]));
    wait_for(|| responders(&gateway) == "2", STEP_TIMEOUT);
    assert!(failures(&gateway).is_empty(), "the token was replaced in time");
    let used = api.requests().last().and_then(|request| request.token.clone());
    assert_eq!(used.as_deref(), Some("second"));
    api.set_token("third");
    api.close_watches();
    wait_for(|| !failures(&gateway).is_empty(), STEP_TIMEOUT);
    assert!(failures(&gateway)[0]["error"].as_str().is_some_and(|error| error.contains("401")));
    gateway.dir.write("token", "third");
    wait_for(|| recoveries(&gateway) == 1, RECOVERY_TIMEOUT);
}

#[test]
fn gateway_starts_without_the_server_and_recovers() {
    let api = ApiServer::start();
    let [pod] = pods();
    api.set(slice("shop-a", "shop", &[pod.address]));
    api.fail(ApiFault::Status(503, ""));
    let gateway = starting_gateway(&api, "");
    let response = gateway.get("/", &[]);
    assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=dns_error")));
    let statuses = || [gateway.admin("/live").status, gateway.admin("/ready").status];
    assert_eq!(statuses(), [200, 503]);
    api.fail(ApiFault::None);
    wait_for(|| recoveries(&gateway) == 1, RECOVERY_TIMEOUT);
    assert_eq!(statuses(), [200, 200]);
    assert_eq!(responders(&gateway), "1");
}

#[test]
fn first_requests_wait_for_the_first_list() {
    let api = ApiServer::start();
    let [pod] = pods();
    api.set(slice("shop-a", "shop", &[pod.address]));
    let dir = TempDir::new();
    let section = api.section(&dir, "");
    let config = upstream("kubernetes://shop.default:http", "connect_timeout = \"8s\"");
    let gateway = Gateway::start_in(dir, &format!("{section}{config}"));
    assert_eq!(gateway.get("/", &[]).status, 200);
}

#[test]
fn malformed_objects_are_left_out_and_counted() {
    let api = ApiServer::start();
    let [one, two] = pods();
    api.set(slice("shop-a", "shop", &[one.address]));
    let mut odd = slice("shop-b", "shop", &[two.address]);
    odd["endpoints"] =
        json!([endpoint("not an address", true), 7, { "addresses": "127.0.0.2" }, endpoint("127.0.0.2", true)]);
    api.set(odd.clone());
    let mut wrong = slice("shop-c", "shop", &[]);
    wrong["addressType"] = json!("Pigeon");
    api.set(wrong);
    let gateway = gateway(&api, "");
    assert_eq!(responders(&gateway), "12");
    let skipped = || gateway.metric("tidegate_kubernetes_skipped_total{reason=\"malformed\"}");
    assert_eq!(skipped(), 4.0);
    // A slice that becomes unusable stays as it was.
    odd["addressType"] = json!(7);
    api.set(odd);
    api.send_event(json!({ "type": "ADDED", "object": { "metadata": 7 } }));
    api.send_event(json!({ "type": "ADDED", "object": "nothing" }));
    wait_for(|| skipped() == 7.0, STEP_TIMEOUT);
    assert_eq!(responders(&gateway), "12");
    assert_eq!((api.lists(), failures(&gateway).len()), (1, 0));
    // A line of another kind: what was missed is not known.
    api.send_event(json!({ "kind": "SURPRISE" }));
    wait_for(|| api.lists() == 2, STEP_TIMEOUT);
    wait_for(|| recoveries(&gateway) == 1, STEP_TIMEOUT);
}

#[test]
fn thousands_of_endpoints_arrive_in_pages_and_change() {
    let api = ApiServer::start();
    let slices = |index: u8, last: u8| {
        let addresses: Vec<SocketAddr> = (0..100).map(|at| SocketAddr::from(([127, index, at, last], 9))).collect();
        slice(&format!("shop-{index}"), "shop", &addresses)
    };
    (1..=40).for_each(|index| api.set(slices(index, 1)));
    api.set_page(7);
    let gateway = gateway(&api, "");
    let endpoints = || gateway.metric("tidegate_upstream_endpoints{upstream=\"shop\"}");
    wait_for(|| endpoints() == 4_000.0, STEP_TIMEOUT);
    assert_eq!(api.lists(), 6);
    (1..=40).for_each(|index| api.set(slices(index, 2)));
    // The status lists 200 of them.
    let is_changed = || {
        let status = gateway.admin("/api/v1/status").text();
        status.contains(".2:9\"") && !status.contains(".1:9\"")
    };
    wait_for(is_changed, STEP_TIMEOUT);
    // The last slice goes, and the others stay: every change before it was applied.
    api.delete("shop-40");
    wait_for(|| endpoints() == 3_900.0, STEP_TIMEOUT);
    assert!(is_changed());
}

#[test]
fn one_watch_serves_all_upstreams_and_ends_with_the_last() {
    let api = ApiServer::start();
    let [pod] = pods();
    api.set(slice("shop-a", "shop", &[pod.address]));
    let dir = TempDir::new();
    let section = api.section(&dir, "");
    let url = format!("kubernetes://shop.default:{}", pod.address.port());
    let config = |first: &str, timeout: &str| {
        let second = "[upstreams.second]\nendpoints = [\"kubernetes://shop.default:http\"]\n\
                      [[routes]]\nname = \"second\"\nmatch = { path = \"/second\" }\nupstream = \"second\"\n";
        let second = if timeout.is_empty() { "" } else { second };
        format!("{section}{}{second}", upstream(first, timeout))
    };
    let gateway = ready(Gateway::start_in(dir, &config(&url, "timeout = \"5s\"")));
    assert_eq!((gateway.get("/", &[]).status, gateway.get("/second", &[]).status), (200, 200));
    wait_for(|| api.open_watches() == 1, STEP_TIMEOUT);
    assert_eq!(gateway.metric("tidegate_kubernetes_services"), 1.0);
    let tasks = gateway.admin("/api/v1/tasks").text();
    assert!(tasks.contains("kubernetes_watch") && tasks.contains("api_server"), "{tasks}");
    let reloads = || gateway.process.stderr.events("reloaded").len();
    gateway.rewrite(&config(&url, "timeout = \"6s\""));
    wait_for(|| reloads() == 1, STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).status, 200);
    gateway.rewrite(&config(&format!("http://{}", pod.address), ""));
    wait_for(|| reloads() == 2, STEP_TIMEOUT);
    wait_for(|| gateway.metric("tidegate_kubernetes_services") == 0.0, STEP_TIMEOUT);
    assert_eq!((api.lists(), api.watches().len()), (1, 1), "a reload starts no further watch");
    // The server sees the end of the connection with its next event.
    api.set(slice("shop-a", "shop", &[pod.address]));
    api.set(slice("shop-a", "shop", &[]));
    wait_for(
        || {
            api.set(slice("shop-a", "shop", &[pod.address]));
            api.open_watches() == 0
        },
        STEP_TIMEOUT,
    );
    gateway.rewrite(&config(&url, ""));
    wait_for(|| reloads() == 3, STEP_TIMEOUT);
    wait_for(|| api.open_watches() == 1, STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).status, 200);
}

#[test]
fn own_zone_and_hints_are_preferred() {
    let api = ApiServer::start();
    let [one, two] = pods();
    let mut zones = slice("shop-a", "shop", &[one.address, two.address]);
    (zones["endpoints"][0]["zone"], zones["endpoints"][1]["zone"]) = (json!("there"), json!("here"));
    api.set(zones.clone());
    let gateway = gateway(&api, "");
    assert_eq!(responders(&gateway), "2");
    zones["endpoints"][0]["hints"] = json!({ "forZones": [{ "name": "here" }] });
    zones["endpoints"][1]["hints"] = json!({ "forZones": [{ "name": "there" }] });
    api.set(zones);
    wait_for(|| responders(&gateway) == "1", STEP_TIMEOUT);
}

#[test]
fn both_families_and_ports_by_name_and_number_are_used() {
    let api = ApiServer::start();
    let [one] = pods();
    let six = Origin::start_at("[::1]:0".parse().expect("an address"), |_| Script::ok(&[], "6"));
    api.set(slice("shop-a", "shop", &[one.address]));
    api.set(slice("shop-6", "shop", &[six.address]));
    let gateway = gateway(&api, "");
    assert_eq!(responders(&gateway), "16");
    let dir = TempDir::new();
    let section = api.section(&dir, "");
    let wrong = Gateway::start_in(dir, &format!("{section}{}", upstream("kubernetes://shop.default:web", "")));
    assert_eq!(wrong.get("/", &[]).status, 503);
    wait_for(|| !failures(&wrong).is_empty(), STEP_TIMEOUT);
    let error = failures(&wrong)[0]["error"].as_str().expect("a text").to_owned();
    assert!(error.contains("no port `web`") && error.contains(&format!("http ({})", one.address.port())), "{error}");
    wrong.rewrite(&format!(
        "{}{}",
        api.section(&wrong.dir, ""),
        upstream(&format!("kubernetes://shop.default:{}", six.address.port()), "")
    ));
    wait_for(|| wrong.get("/", &[]).text() == "6", STEP_TIMEOUT);
}

#[test]
fn servers_with_tls_prove_the_name_of_the_service() {
    let api = ApiServer::start();
    let authority = Authority::new("pods");
    let origin = TlsOrigin::start(authority.sign("shop.default.svc", |_| {}), &TlsOriginOptions::default());
    api.set(slice("shop-a", "shop", &[origin.address]));
    let dir = TempDir::new();
    authority.write(&dir);
    let section = api.section(&dir, "");
    let config = upstream("kubernetes+https://shop.default", "tls = { ca = \"ca.pem\" }");
    let gateway = Gateway::start_in(dir, &format!("{section}{config}"));
    assert_eq!(gateway.get("/", &[]).status, 200);
}

#[test]
fn pods_find_the_server_by_their_environment_and_kubeconfigs_name_it() {
    let api = ApiServer::start();
    let [pod] = pods();
    api.set(slice("shop-a", "shop", &[pod.address]));
    let dir = TempDir::new();
    api.section(&dir, "");
    let files = "[kubernetes]\nca = \"cluster-ca.crt\"\ntoken_file = \"token\"\nnamespace = \"default\"\n";
    let in_pod = Gateway::start_with(dir, &format!("{files}{}", upstream("kubernetes://shop", "")), |command| {
        command.env("KUBERNETES_SERVICE_HOST", api.address.ip().to_string());
        command.env("KUBERNETES_SERVICE_PORT", api.address.port().to_string());
    });
    let in_pod = ready(in_pod);
    assert_eq!(in_pod.get("/", &[]).status, 200);
    let dir = TempDir::new();
    dir.write("cluster-ca.crt", &api.pem());
    dir.write(
        "kubeconfig",
        &format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters:\n- name: lab\n  cluster: {{ server: \"https://{}\", certificate-authority: cluster-ca.crt }}\n\
             users:\n- name: me\n  user: {{ token: first }}\n\
             contexts:\n- name: lab\n  context: {{ cluster: lab, user: me, namespace: default }}\n",
            api.address
        ),
    );
    let file = "[kubernetes]\nkubeconfig = \"kubeconfig\"\n";
    let outside = ready(Gateway::start_in(dir, &format!("{file}{}", upstream("kubernetes://shop:http", ""))));
    assert_eq!(outside.get("/", &[]).status, 200);
}
