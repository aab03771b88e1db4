//! Upstreams with a sick endpoint: it is ejected, shown, and used again when it is well, and the
//! others answer meanwhile.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value;
use support::{Gate, Gateway, Origin, STEP_TIMEOUT, Script, free_address, wait_for};

fn config(endpoints: &[SocketAddr], keys: &str) -> String {
    let list: Vec<String> = endpoints.iter().map(|endpoint| format!("\"http://{endpoint}\"")).collect();
    format!(
        "[server]\nworkers = 1\n[upstreams.shop]\nendpoints = [{}]\n{keys}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\ncache = {{ mode = \"off\" }}\n",
        list.join(", ")
    )
}

/// An origin that responds with the status that the test sets, and 200 at first.
fn origin_with_status() -> (Origin, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(200));
    let current = Arc::clone(&status);
    (Origin::start(move |_| Script::reply(current.load(Ordering::SeqCst), &[], "")), status)
}

/// The endpoint of that address in `/api/v1/status`.
fn endpoint(gateway: &Gateway, address: SocketAddr) -> Value {
    let status: Value = serde_json::from_str(&gateway.admin("/api/v1/status").text()).expect("JSON");
    let endpoints = status["upstreams"][0]["endpoints"].as_array().cloned().unwrap_or_default();
    endpoints.into_iter().find(|endpoint| endpoint["name"] == address.to_string()).expect("the endpoint")
}

fn degraded(gateway: &Gateway) -> String {
    let ready: Value = serde_json::from_str(&gateway.admin("/ready").text()).expect("JSON");
    ready["degraded"].to_string()
}

#[test]
fn endpoint_that_always_fails_is_ejected_and_the_breaker_stays_closed() {
    for balance in ["round-robin", "least-request"] {
        let (good, _) = origin_with_status();
        let (bad, status) = origin_with_status();
        status.store(500, Ordering::SeqCst);
        let gateway = Gateway::start(&config(&[good.address, bad.address], &format!("balance = \"{balance}\"")));
        let mut client = gateway.connect();
        let failed = (0..120).filter(|_| client.get("/", &[]).status != 200).count();
        assert!(failed <= 5, "{balance}: {failed} of 120 failed");
        assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);
        if balance == "least-request" {
            // Its failures count as load, so that it gets hardly any call before it is ejected.
            continue;
        }
        let state = endpoint(&gateway, bad.address);
        assert_eq!((state["state"].as_str(), state["reason"].as_str()), (Some("out"), Some("failures")), "{state}");
        assert!(state["seconds_left"].as_f64().is_some_and(|left| (20.0..=30.0).contains(&left)), "{state}");
        assert_eq!(degraded(&gateway), format!("[\"endpoint shop {}\"]", bad.address));
        let events = gateway.process.stderr.events("endpoint_down");
        assert_eq!((events.len(), events[0]["reason"].as_str()), (1, Some("failures")));
        assert_eq!(gateway.metric("tidegate_upstream_endpoints{upstream=\"shop\",state=\"out\"}"), 1.0);
        assert_eq!(gateway.metric("tidegate_upstream_ejections_total{upstream=\"shop\",reason=\"failures\"}"), 1.0);
    }
}

#[test]
fn failures_that_are_in_flight_when_their_endpoint_is_ejected_do_not_open_the_breaker() {
    let gate = Gate::default();
    let opened = gate.clone();
    let good = Origin::start(|_| Script::ok(&[], ""));
    let bad = Origin::start(move |_| Script::new().wait(&opened).head(500, &[("Content-Length", "0")]));
    let gateway = Gateway::start(&config(&[good.address, bad.address], "balance = \"round-robin\""));
    let mut clients: Vec<_> = (0..80).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(|client| client.send_get("/", &[]));
    wait_for(|| bad.count() == 40, STEP_TIMEOUT);
    gate.open();
    let statuses: Vec<u16> = clients.iter_mut().map(|client| client.read_response().status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 500).count(), 40);
    assert!((0..40).all(|_| gateway.get("/", &[]).status == 200));
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);
}

#[test]
fn endpoint_whose_bodies_break_off_is_ejected() {
    let good = Origin::start(|_| Script::ok(&[], ""));
    let bad = Origin::start(|_| Script::new().head(200, &[("Content-Length", "10")]).send("half").close());
    let gateway = Gateway::start(&config(&[good.address, bad.address], "balance = \"round-robin\""));
    for _ in 0..40 {
        let mut client = gateway.connect();
        client.send_get("/", &[("Connection", "close")]);
        client.read_to_end();
    }
    assert!((5..=6).contains(&bad.count()), "{}", bad.count());
    assert_eq!(endpoint(&gateway, bad.address)["reason"], "failures");
}

#[test]
fn ejected_endpoint_is_used_again_after_its_time() {
    let (good, _) = origin_with_status();
    let (bad, status) = origin_with_status();
    status.store(503, Ordering::SeqCst);
    let keys = "balance = \"round-robin\"\neject = { after = 2, base = \"300ms\", share = 0.5 }";
    let gateway = Gateway::start(&config(&[good.address, bad.address], keys));
    let mut client = gateway.connect();
    let failed = (0..20).filter(|_| client.get("/", &[]).status != 200).count();
    assert_eq!(failed, 2);
    status.store(200, Ordering::SeqCst);
    let before = bad.count();
    wait_for(|| client.get("/", &[]).status == 200 && bad.count() > before + 2, STEP_TIMEOUT);
    wait_for(|| gateway.process.stderr.events("endpoint_up").len() == 1, STEP_TIMEOUT);
    assert_eq!(
        (endpoint(&gateway, bad.address)["state"].as_str(), degraded(&gateway).as_str()),
        (Some("available"), "[]")
    );
}

#[test]
fn endpoint_that_is_back_is_not_ejected_for_calls_from_before() {
    let (gate, status) = (Gate::default(), Arc::new(AtomicU16::new(500)));
    let (opened, current) = (gate.clone(), Arc::clone(&status));
    let good = Origin::start(|_| Script::ok(&[], ""));
    let bad = Origin::start(move |_| {
        let status = current.load(Ordering::SeqCst);
        Script::new().wait(&opened).head(status, &[("Content-Length", "0")])
    });
    let keys = "balance = \"round-robin\"\neject = { base = \"300ms\" }";
    let gateway = Gateway::start(&config(&[good.address, bad.address], keys));
    let mut clients: Vec<_> = (0..40).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(|client| client.send_get("/", &[]));
    wait_for(|| bad.count() == 20, STEP_TIMEOUT);
    status.store(200, Ordering::SeqCst);
    gate.open();
    let failed = clients.iter_mut().map(|client| client.read_response().status);
    assert_eq!(failed.filter(|status| *status == 500).count(), 20);
    // The calls that failed after the fifth one are no reason.
    wait_for(|| gateway.get("/", &[]).status == 200 && bad.count() > 30, STEP_TIMEOUT);
    assert_eq!(gateway.metric("tidegate_upstream_ejections_total{upstream=\"shop\",reason=\"failures\"}"), 1.0);
}

#[test]
fn only_a_share_of_the_endpoints_is_ejected() {
    for (count, share, ejected) in [(1, 0.5, 0), (2, 0.5, 1), (4, 0.5, 2), (4, 1.0, 4)] {
        let origins: Vec<_> = (0..count).map(|_| Origin::start(|_| Script::reply(500, &[], ""))).collect();
        let addresses: Vec<_> = origins.iter().map(|origin| origin.address).collect();
        let keys = format!(
            "balance = \"round-robin\"\neject = {{ after = 2, share = {share} }}\nbreaker = {{ minimum = 1000 }}"
        );
        let gateway = Gateway::start(&config(&addresses, &keys));
        (0..40).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 500));
        let out = gateway.metric("tidegate_upstream_endpoints{upstream=\"shop\",state=\"out\"}");
        assert_eq!(out, f64::from(ejected), "{count} {share}");
    }
}

#[test]
fn dead_endpoint_is_reported_and_its_return_too() {
    let alive = Origin::start(|_| Script::ok(&[], ""));
    let dead = free_address();
    let gateway = Gateway::start(&config(&[alive.address, dead], "balance = \"round-robin\""));
    (0..30).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    let events = gateway.process.stderr.events("endpoint_down");
    assert_eq!((events.len(), events[0]["reason"].as_str()), (1, Some("connect")));
    assert_eq!(events[0]["endpoint"], dead.to_string());
    assert_eq!(degraded(&gateway), format!("[\"endpoint shop {dead}\"]"));
    assert_eq!(endpoint(&gateway, dead)["reason"], "connect");
    let _back = Origin::start_at(dead, |_| Script::ok(&[], ""));
    wait_for(
        || gateway.get("/", &[]).status == 200 && !gateway.process.stderr.events("endpoint_up").is_empty(),
        STEP_TIMEOUT,
    );
    assert_eq!(degraded(&gateway), "[]");
}

#[test]
fn endpoint_whose_health_checks_fail_gets_no_request_until_they_pass() {
    let healthy = Arc::new(AtomicU16::new(204));
    let status = Arc::clone(&healthy);
    let sick = Origin::start(move |request| match request.target.as_str() {
        "/healthz?full=1" => Script::reply(status.load(Ordering::SeqCst), &[], ""),
        _ => Script::ok(&[], "sick"),
    });
    let well = Origin::start(|request| Script::reply(if request.target == "/" { 200 } else { 204 }, &[], ""));
    let keys = "balance = \"round-robin\"\n\
                health = { path = \"/healthz?full=1\", host = \"health.test\", interval = \"100ms\", timeout = \"1s\", \
                healthy = 2, unhealthy = 2, expect = [\"204\"] }";
    let gateway = Gateway::start(&config(&[sick.address, well.address], keys));
    wait_for(|| sick.count() > 0, STEP_TIMEOUT);
    let check = &sick.requests()[0];
    assert_eq!((check.method.as_str(), check.field("host")), ("GET", Some("health.test")));
    // 200 is not what is expected.
    healthy.store(200, Ordering::SeqCst);
    let lines = &gateway.process.stderr;
    wait_for(|| !lines.events("endpoint_down").is_empty(), STEP_TIMEOUT);
    assert_eq!(lines.event("endpoint_down")["reason"], "health_check");
    assert!((0..20).all(|_| gateway.get("/", &[]).text() != "sick"));
    healthy.store(204, Ordering::SeqCst);
    wait_for(|| !lines.events("endpoint_up").is_empty(), STEP_TIMEOUT);
    assert!((0..4).any(|_| gateway.get("/", &[]).text() == "sick"));
}

#[test]
fn unhealthy_endpoint_is_used_again_when_health_checks_are_removed() {
    let good = Origin::start(|_| Script::ok(&[], ""));
    let bad = Origin::start(|received| Script::reply(if received.target == "/healthz" { 500 } else { 200 }, &[], ""));
    let config = |keys: &str| config(&[good.address, bad.address], &format!("balance = \"round-robin\"\n{keys}"));
    let health = "health = { path = \"/healthz\", interval = \"100ms\", unhealthy = 1, expect = [\"404\", \"200\"] }";
    let gateway = Gateway::start(&config(health));
    wait_for(|| endpoint(&gateway, bad.address)["reason"] == "health_check", STEP_TIMEOUT);
    gateway.rewrite(&config(""));
    wait_for(|| endpoint(&gateway, bad.address)["state"] == "available", STEP_TIMEOUT);
}

#[test]
fn all_endpoints_are_used_if_too_many_are_unhealthy() {
    let origins: Vec<_> = (0..3)
        .map(|_| Origin::start(|request| Script::reply(if request.target == "/" { 200 } else { 500 }, &[], "")))
        .collect();
    let addresses: Vec<_> = origins.iter().map(|origin| origin.address).collect();
    let health = "health = { path = \"/healthz\", interval = \"100ms\", unhealthy = 1 }";
    let gateway = Gateway::start(&config(&addresses, &format!("balance = \"round-robin\"\n{health}")));
    wait_for(|| gateway.metric("tidegate_upstream_endpoints{upstream=\"shop\",state=\"out\"}") == 3.0, STEP_TIMEOUT);
    let served = |origin: &Origin| origin.requests().iter().filter(|request| request.target == "/").count();
    (0..9).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert_eq!(origins.iter().map(served).collect::<Vec<_>>(), [3, 3, 3]);
    let status: Value = serde_json::from_str(&gateway.admin("/api/v1/status").text()).expect("JSON");
    assert_eq!(status["upstreams"][0]["panic"], true);
}

#[test]
fn endpoint_that_hangs_is_checked_in_time_and_does_not_delay_the_checks_of_others() {
    let hanging = Origin::start(|_| Script::new().hang());
    let well = Origin::start(|_| Script::ok(&[], ""));
    let health = "health = { path = \"/\", interval = \"100ms\", timeout = \"200ms\", unhealthy = 2 }";
    let gateway = Gateway::start(&config(&[hanging.address, well.address], health));
    wait_for(|| !gateway.process.stderr.events("endpoint_down").is_empty(), Duration::from_secs(5));
    assert_eq!(endpoint(&gateway, hanging.address)["reason"], "health_check");
    let before = well.count();
    wait_for(|| well.count() >= before + 3, Duration::from_secs(5));
}

#[test]
fn equal_keys_reach_the_same_endpoint_and_the_next_one_if_it_is_dead() {
    let origins: Vec<_> = (0..4).map(|_| Origin::start(|_| Script::ok(&[], ""))).collect();
    let addresses: Vec<_> = origins.iter().map(|origin| origin.address).collect();
    for (hash_by, field) in [("header:x-tenant", "X-Tenant"), ("cookie:sid", "Cookie")] {
        let keys = format!("balance = \"consistent-hash\"\nhash_by = \"{hash_by}\"");
        let gateway = Gateway::start(&config(&addresses, &keys));
        let get = |key: usize| {
            let value = if field == "Cookie" { format!("a=b; sid={key}") } else { key.to_string() };
            let before: Vec<_> = origins.iter().map(Origin::count).collect();
            assert_eq!(gateway.get("/", &[(field, &value)]).status, 200);
            origins.iter().zip(before).position(|(origin, before)| origin.count() > before).expect("one origin")
        };
        let chosen: Vec<usize> = (0..40).map(get).collect();
        assert_eq!((0..40).map(get).collect::<Vec<_>>(), chosen, "{hash_by}");
        assert!((0..4).all(|index| chosen.contains(&index)), "{hash_by}: {chosen:?}");
    }
    // Without the field the client decides: one endpoint for all.
    let gateway = Gateway::start(&config(&addresses, "balance = \"consistent-hash\"\nhash_by = \"client\""));
    let before: Vec<_> = origins.iter().map(Origin::count).collect();
    (0..10).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert_eq!(origins.iter().zip(before).filter(|(origin, before)| origin.count() > *before).count(), 1);
}

#[test]
fn weighted_endpoints_get_their_shares() {
    let (light, heavy) = (Origin::start(|_| Script::ok(&[], "")), Origin::start(|_| Script::ok(&[], "")));
    let text = config(&[light.address], "balance = \"round-robin\"")
        .replace("endpoints = [", &format!("endpoints = [{{ url = \"http://{}\", weight = 3 }}, ", heavy.address));
    let gateway = Gateway::start(&text);
    (0..40).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert!((29..=31).contains(&heavy.count()) && light.count() + heavy.count() == 40, "{}", heavy.count());
}

/// Latencies, connections and results of calls, at the admin address and as metrics.
/// Requests stay in the zone of the gateway while half of its endpoints are there, and return to
/// it.
#[test]
fn own_zone_is_used_until_it_is_lost_and_again_when_it_is_back() {
    let origins: Vec<Origin> = (0..4).map(|_| Origin::start(|_| Script::ok(&[], ""))).collect();
    let config = |zones: [&str; 4]| {
        let items = origins.iter().zip(zones);
        let items = items.map(|(origin, zone)| format!("{{ url = \"http://{}\", zone = \"{zone}\" }}", origin.address));
        let list: Vec<String> = items.collect();
        format!(
            "[server]\nworkers = 1\nzone = \"eu-1a\"\n[upstreams.shop]\nendpoints = [{}]\n\
             [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\ncache = {{ mode = \"off\" }}\n",
            list.join(", ")
        )
    };
    let gateway = Gateway::start(&config(["eu-1a", "eu-1a", "eu-1b", "eu-1c"]));
    let mut client = gateway.connect();
    let mut used = |count: usize| {
        let before: Vec<usize> = origins.iter().map(Origin::count).collect();
        assert!((0..count).all(|_| client.get("/", &[]).status == 200));
        let after = origins.iter().map(Origin::count).zip(before);
        after.map(|(after, before)| after > before).collect::<Vec<bool>>()
    };
    assert_eq!(used(40), [true, true, false, false]);
    origins[0].stop();
    assert_eq!(used(40), [false, true, false, false], "half of the zone is there");
    origins[1].stop();
    assert_eq!(used(40), [false, false, true, true], "the zone is lost, and no request");
    let back = Origin::start_at(origins[0].address, |_| Script::ok(&[], ""));
    wait_for(|| used(1) == [false; 4] && back.count() > 0, STEP_TIMEOUT);
    wait_for(|| used(40) == [false; 4], STEP_TIMEOUT);
    // Other zones by a reload: the endpoints are the same.
    gateway.rewrite(&config(["eu-1b", "eu-1b", "eu-1a", "eu-1c"]));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    assert_eq!((used(40), back.count() > 0), (vec![false, false, true, false], true));
}

#[test]
fn endpoints_and_calls_are_shown_with_latencies_connections_and_results() {
    let fast = Origin::start(|request| match request.target.as_str() {
        "/missing" => Script::reply(404, &[], ""),
        "/broken" => Script::new().close(),
        _ => Script::ok(&[], "fast"),
    });
    let slow = Origin::start(|_| Script::new().pause(Duration::from_millis(150)).head(200, &[("Content-Length", "0")]));
    let gateway = Gateway::start(&config(&[fast.address, slow.address], "balance = \"round-robin\""));
    for _ in 0..10 {
        assert_eq!(gateway.get("/", &[]).status, 200);
    }
    let status: Value = serde_json::from_str(&gateway.admin("/api/v1/status").text()).expect("JSON");
    let endpoints = status["upstreams"][0]["endpoints"].as_array().expect("a list").clone();
    let [p50, p99] = ["latency_p50_ms", "latency_p99_ms"]
        .map(|key| endpoints.iter().map(|endpoint| endpoint[key].as_f64().expect("a number")).collect::<Vec<_>>());
    assert!(p50[0] < 150.0 && p99[0] >= p50[0], "{p50:?} {p99:?}");
    assert!((150.0..1_000.0).contains(&p50[1]) && p99[1] >= p50[1], "{p50:?} {p99:?}");
    let open = |endpoint: &Value| endpoint["connections"]["1.1"].as_u64().expect("a number");
    assert_eq!(endpoints.iter().map(open).collect::<Vec<_>>(), [1, 1], "{endpoints:?}");
    let connections = "tidegate_upstream_connections{upstream=\"shop\",network_protocol_version=\"1.1\"}";
    assert_eq!(gateway.metric(connections), 2.0);
    // Kept connections are closed after a few seconds without a request.
    wait_for(|| gateway.metric(connections) == 0.0, STEP_TIMEOUT);
    let requests = |result: &str| {
        gateway.metric(&format!("tidegate_upstream_requests_total{{upstream=\"shop\",result=\"{result}\"}}"))
    };
    assert_eq!((requests("2xx"), requests("4xx")), (10.0, 0.0));
    assert_eq!(gateway.metric("tidegate_upstream_request_duration_seconds_count{upstream=\"shop\"}"), 10.0);
    slow.stop();
    wait_for(|| gateway.get("/missing", &[]).status == 404, STEP_TIMEOUT);
    wait_for(|| gateway.get("/broken", &[]).status >= 500, STEP_TIMEOUT);
    assert!(requests("4xx") >= 1.0 && requests("failed") >= 1.0);
}

#[test]
fn bytes_and_retries_are_counted_by_endpoint() {
    let good = Origin::start(|_| Script::ok(&[], vec![b'x'; 30_000]));
    let bad = Origin::start(|_| Script::reply(503, &[], ""));
    let keys = "balance = \"round-robin\"\nretries = 1\nretry_on = [\"503\"]\neject = { after = 0 }";
    let gateway = Gateway::start(&config(&[good.address, bad.address], keys));
    let mut client = gateway.connect();
    for _ in 0..10 {
        let response = client.request("PUT", "/", &[], &[b'y'; 20_000]);
        assert_eq!((response.status, response.body.len()), (200, 30_000));
    }
    let of = |address, key: &str| endpoint(&gateway, address)[key].as_u64().expect("a number");
    let retried = bad.count() as u64;
    assert!((1..=10).contains(&retried), "{retried}");
    let counts = |address| ["bytes_sent", "bytes_received", "retries"].map(|key| of(address, key));
    // The last exchange is counted just after its response.
    wait_for(|| counts(good.address) == [200_000, 300_000, 0], STEP_TIMEOUT);
    assert_eq!(counts(bad.address), [retried * 20_000, 0, retried], "the request was sent to it too");
    let bytes = |direction: &str| {
        let labels = format!("upstream=\"shop\",direction=\"{direction}\"");
        gateway.metric(&format!("tidegate_upstream_body_bytes_total{{{labels}}}"))
    };
    assert_eq!((bytes("sent"), bytes("received")), ((200_000 + retried * 20_000) as f64, 300_000.0));
    let retries = gateway.metric("tidegate_upstream_retries_total{upstream=\"shop\",reason=\"status\"}");
    assert_eq!(retries, retried as f64);
    // An endpoint without a connection has its request sent to another one.
    bad.stop();
    wait_for(|| gateway.get("/", &[]).status == 200 && of(bad.address, "retries") > retried, STEP_TIMEOUT);
    assert_eq!(of(good.address, "retries"), 0);
}

#[test]
fn bytes_of_a_response_that_its_client_leaves_are_those_that_were_read() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new().head(200, &[("Content-Length", "9000")]).send([b'x'; 4_000]).wait(&opened).send([b'x'; 5_000])
    });
    let gateway = Gateway::start(&config(&[origin.address], ""));
    let mut client = gateway.connect();
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    origin.wait_for_requests(1);
    wait_for(|| of_first(&gateway, "in_flight") == 1, STEP_TIMEOUT);
    assert_eq!(of_first(&gateway, "bytes_received"), 0, "counted at the end of the exchange");
    drop(client);
    wait_for(|| of_first(&gateway, "in_flight") == 0, STEP_TIMEOUT);
    assert!(of_first(&gateway, "bytes_received") <= 4_000);
    gate.open();
}

#[test]
fn bytes_of_a_tunnel_are_counted_in_both_directions_when_it_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gateway = Gateway::start(&config(&[listener.local_addr().expect("bound")], ""));
    let mut client = gateway.connect();
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    let (mut upstream, _) = listener.accept().expect("the connection of the gateway");
    upstream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    assert!(upstream.read(&mut [0; 4096]).expect("the request") > 0);
    let switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhello";
    upstream.write_all(switch).expect("a live socket");
    assert_eq!((client.read_head().status, client.read_bytes(5)), (101, b"hello".to_vec()));
    client.send("good day");
    let mut received = [0; 8];
    upstream.read_exact(&mut received).expect("the bytes of the client");
    drop(upstream);
    assert_eq!(client.read_to_end(), b"");
    drop(client);
    wait_for(|| of_first(&gateway, "in_flight") == 0, STEP_TIMEOUT);
    assert_eq!((of_first(&gateway, "bytes_received"), of_first(&gateway, "bytes_sent")), (5, 8));
    for (direction, bytes) in [("received", 5.0), ("sent", 8.0)] {
        let series = format!("tidegate_upstream_body_bytes_total{{direction=\"{direction}\"}}");
        assert_eq!(gateway.metric(&series), bytes, "{direction}");
    }
}

fn of_first(gateway: &Gateway, key: &str) -> u64 {
    let status: Value = serde_json::from_str(&gateway.admin("/api/v1/status").text()).expect("JSON");
    status["upstreams"][0]["endpoints"][0][key].as_u64().expect("a number")
}
