//! Retries and hedges: after which failures a request is sent again, where to, how often, and what
//! the log, the metrics and `Cache-Status` say of it.

mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::h2_origin::{H2Origin, H2OriginOptions};
use support::{Gate, Gateway, Origin, ReceivedRequest, STEP_TIMEOUT, Script, free_address, lock, wait_for};

fn config(endpoints: &[String], upstream: &str, route: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
    format!(
        "version = 1\n[server]\nworkers = 1\n[upstreams.shop]\nendpoints = [{}]\nbreaker = {{ minimum = 100000 }}\n\
         eject = {{ after = 0 }}\n{upstream}\n[[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\n\
         upstream = \"shop\"\ncache = {{ mode = \"off\" }}\n{route}\n[log]\naccess = \"stdout\"\n",
        endpoints.join(", ")
    )
}

fn http(address: SocketAddr) -> String {
    format!("http://{address}")
}

#[test]
fn connection_that_ends_before_a_response_is_retried_where_that_is_safe() {
    let failing = Origin::start(|_| Script::new().reset());
    let good = Origin::start(|request| Script::ok(&[], format!("{} bytes", request.body.len())));
    let endpoints = [http(failing.address), http(good.address)];
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"\nretries = 1", ""));
    let key = [("Idempotency-Key", "7")];
    for (method, fields, is_retried) in
        [("GET", &[][..], true), ("PUT", &[], true), ("POST", &key, true), ("POST", &[], false), ("PATCH", &[], false)]
    {
        let before = (failing.count(), good.count());
        let body: &[u8] = if method == "GET" { b"" } else { b"12345" };
        let responses: Vec<_> = (0..4).map(|_| gateway.request(method, "/", fields, body)).collect();
        let ok = responses.iter().filter(|response| response.status == 200).count();
        assert_eq!(ok, if is_retried { 4 } else { 2 }, "{method} {fields:?}");
        assert_eq!(failing.count() - before.0, 2, "each of {method} {fields:?} is sent to it once");
        let retried = responses.iter().filter(|response| response.cache_status().contains("; retries=1")).count();
        assert_eq!(retried, if is_retried { 2 } else { 0 }, "{method}");
        let statuses: Vec<_> = responses.iter().filter_map(|response| response.field("proxy-status")).collect();
        let expected = if is_retried { "tidegate; retries=1" } else { "tidegate; error=connection_terminated" };
        assert_eq!(statuses, [expected; 2], "{method}");
        assert!(responses.iter().all(|r| r.status != 200 || r.text() == format!("{} bytes", body.len())));
    }
    assert_eq!(gateway.metric("tidegate_upstream_retries_total{upstream=\"shop\",reason=\"reset\"}"), 6.0);
    let log = gateway.access_log(20);
    assert_eq!(log.iter().filter(|line| line["retries"] == 1).count(), 6);
}

/// The member of a proxy nearer the origin stays, and a failed retry has the reason too.
#[test]
fn proxy_status_has_failure_and_retries_in_one_member() {
    let origin = Origin::start(|request| match &*request.target {
        "/ok" => Script::ok(&[("Proxy-Status", "inner; received-status=200")], "x"),
        _ => Script::new().reset(),
    });
    let gateway = Gateway::start(&config(&[http(origin.address)], "retries = 1", ""));
    let ok = gateway.get("/ok", &[]);
    assert_eq!((ok.status, ok.all("proxy-status")), (200, vec!["inner; received-status=200"]));
    let failed = gateway.get("/", &[]);
    let expected = "tidegate; error=connection_terminated; retries=1";
    assert_eq!((failed.status, failed.field("proxy-status")), (503, Some(expected)));
}

#[test]
fn nothing_is_retried_by_default() {
    let failing = Origin::start(|_| Script::new().reset());
    let good = Origin::start(|_| Script::ok(&[], "x"));
    let endpoints = [http(failing.address), http(good.address)];
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"", ""));
    let ok = (0..4).filter(|_| gateway.get("/", &[]).status == 200).count();
    assert_eq!((ok, failing.count()), (2, 2));
}

#[test]
fn configured_statuses_are_retried_at_another_endpoint() {
    let busy = Origin::start(|_| Script::reply(503, &[("Retry-After", "60")], "busy"));
    let good = Origin::start(|_| Script::ok(&[], "good"));
    let endpoints = [http(busy.address), http(good.address)];
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"\nretries = 2", ""));
    assert!((0..6).all(|_| gateway.get("/", &[]).text() == "good"));
    assert_eq!(busy.count(), 3);
    let posts: Vec<_> = (0..4).map(|_| gateway.request("POST", "/", &[], b"x").status).collect();
    assert_eq!(posts.iter().filter(|status| **status == 503).count(), 2, "{posts:?}");
    assert_eq!(gateway.metric("tidegate_upstream_retries_total{upstream=\"shop\",reason=\"status\"}"), 3.0);

    let other = config(&endpoints, "balance = \"round-robin\"\nretries = 2\nretry_on = [\"502\"]", "");
    let gateway = Gateway::start(&other);
    assert_eq!((0..4).filter(|_| gateway.get("/", &[]).status == 503).count(), 2);
}

#[test]
fn response_is_used_if_its_retry_fails() {
    let busy = Origin::start(|_| Script::reply(503, &[("X-From", "busy")], "busy"));
    let failing = Origin::start(|_| Script::new().reset());
    let endpoints = [http(busy.address), http(failing.address)];
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"\nretries = 1", ""));
    for _ in 0..4 {
        let response = gateway.get("/", &[]);
        assert_eq!((response.status, response.field("x-from"), response.text()), (503, Some("busy"), "busy".into()));
    }
}

#[test]
fn server_says_when_it_may_be_asked_again() {
    for (value, is_retried) in [("1", true), ("60", false)] {
        let origin = Origin::start(move |request| match request.number {
            0 => Script::reply(503, &[("Retry-After", value)], "later"),
            _ => Script::ok(&[], "good"),
        });
        let gateway = Gateway::start(&config(&[http(origin.address)], "retries = 1", ""));
        let start = Instant::now();
        let response = gateway.get("/", &[]);
        let waited = start.elapsed();
        assert_eq!(response.status, if is_retried { 200 } else { 503 });
        assert_eq!(waited >= Duration::from_secs(1), is_retried, "{waited:?}");
        assert!(waited < Duration::from_secs(5), "{waited:?}");
    }
}

#[test]
fn interim_response_that_the_client_has_forbids_a_retry() {
    let origin = Origin::start(|_| Script::new().head(103, &[("Link", "</a>")]).head(503, &[("Content-Length", "0")]));
    let gateway = Gateway::start(&config(&[http(origin.address)], "retries = 3", ""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    assert_eq!((client.read_head().status, client.read_head().status), (103, 503));
    assert_eq!(origin.count(), 1);
}

#[test]
fn endpoint_that_starts_late_is_reached_by_a_retry() {
    let address = free_address();
    let gateway = Gateway::start(&config(&[http(address)], "retries = 6", ""));
    let mut client = gateway.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx");
    wait_for(
        || gateway.metric("tidegate_upstream_retries_total{upstream=\"shop\",reason=\"connect\"}") >= 2.0,
        STEP_TIMEOUT,
    );
    let origin = Origin::start_at(address, |_| Script::ok(&[], "late"));
    assert_eq!(client.read_response().text(), "late", "nothing was sent before");
    assert_eq!(origin.count(), 1);
}

#[test]
fn budget_bounds_the_retries_in_progress() {
    let gate = Gate::default();
    let seen = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let (origin_gate, counts) = (gate.clone(), Arc::clone(&seen));
    let origin = Origin::start(move |request| {
        let attempt = {
            let mut counts = lock(&counts);
            let count = counts.entry(request.target.clone()).or_default();
            *count += 1;
            *count
        };
        match attempt {
            1 => Script::reply(503, &[], "busy"),
            _ => Script::new().wait(&origin_gate).send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        }
    });
    let gateway = Gateway::start(&config(&[http(origin.address)], "retries = 1", ""));
    let mut clients: Vec<_> = (0..30).map(|_| gateway.connect()).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        client.send_get(&format!("/{index}"), &[]);
    }
    let denied = || gateway.metric("tidegate_upstream_retries_denied_total{upstream=\"shop\"}");
    wait_for(|| lock(&seen).values().sum::<usize>() as f64 + denied() >= 60.0, STEP_TIMEOUT);
    gate.open();
    let ok = clients.iter_mut().map(|client| client.read_response().status).filter(|status| *status == 200).count();
    // At least 3, and at most 20 % of the 30 that are in flight.
    assert!((3..=6).contains(&ok), "{ok}");
    assert_eq!(30.0 - denied(), ok as f64);
}

/// Two origins, of which the first becomes slow when `is_slow` is not 0.
fn slow_pair() -> (Origin, Origin, Arc<AtomicUsize>) {
    let is_slow = Arc::new(AtomicUsize::new(0));
    let flag = Arc::clone(&is_slow);
    let slow = Origin::start(move |_| match flag.load(Ordering::SeqCst) {
        0 => Script::ok(&[], "first"),
        _ => Script::new().pause(Duration::from_secs(3)).send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"),
    });
    (slow, Origin::start(|_| Script::ok(&[], "other")), is_slow)
}

#[test]
fn slow_endpoint_is_joined_by_another_one() {
    let (slow, other, is_slow) = slow_pair();
    let endpoints = [http(slow.address), http(other.address)];
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"", "hedge = true"));
    let mut client = gateway.connect();
    assert!((0..60).all(|_| client.get("/", &[]).status == 200));
    is_slow.store(1, Ordering::SeqCst);
    let start = Instant::now();
    let responses: Vec<_> = (0..8).map(|_| client.get("/", &[])).collect();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(responses.iter().all(|response| response.text() == "other"));
    let hedged = responses.iter().filter(|response| response.cache_status().contains("; hedged")).count();
    assert!(hedged >= 3, "{hedged}");
    assert_eq!(responses.iter().filter(|r| r.field("proxy-status") == Some("tidegate; hedged")).count(), hedged);
    let won = gateway.metric("tidegate_upstream_hedges_total{upstream=\"shop\",used=\"second\"}");
    assert_eq!(won, hedged as f64);
    assert!(gateway.access_log(68).iter().filter(|line| line["hedged"] == true).count() == hedged);
    // The requests that were given up are ended at once.
    wait_for(|| slow.ends().len() >= hedged, STEP_TIMEOUT);

    let start = Instant::now();
    let posts: Vec<_> = (0..2).map(|_| gateway.request("POST", "/", &[], b"x").text()).collect();
    assert!(posts.contains(&"first".to_owned()) && start.elapsed() >= Duration::from_secs(3), "{posts:?}");
}

#[test]
fn routes_that_do_not_ask_have_no_hedges() {
    let (slow, other, is_slow) = slow_pair();
    let endpoints = [http(slow.address), http(other.address)];
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"", ""));
    let mut client = gateway.connect();
    assert!((0..40).all(|_| client.get("/", &[]).status == 200));
    is_slow.store(1, Ordering::SeqCst);
    let start = Instant::now();
    assert!((0..2).all(|_| client.get("/", &[]).status == 200));
    assert!(start.elapsed() >= Duration::from_secs(3));
    assert_eq!(gateway.metric("tidegate_upstream_hedges_total{upstream=\"shop\",used=\"second\"}"), 0.0);
}

/// A generator of numbers for scripts of failures (SplitMix64).
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// How often the origins have processed each request, by its target.
type Processed = Arc<Mutex<HashMap<String, usize>>>;

/// Fails at random, but only after it has processed the request.
fn failing_http1(processed: &Processed, seed: u64) -> Origin {
    let (processed, state) = (Arc::clone(processed), Mutex::new(seed));
    Origin::start(move |request: &ReceivedRequest| {
        *lock(&processed).entry(request.target.clone()).or_default() += 1;
        match next_random(&mut lock(&state)) % 6 {
            0 => Script::new().reset(),
            1 => Script::new().close(),
            2 => Script::reply(503, &[], "busy"),
            3 => Script::ok(&[], "x").close(),
            4 => Script::new().send("HTTP/1.1 2").reset(),
            _ => Script::ok(&[], "x"),
        }
    })
}

/// As `failing_http1`, and refuses streams that it has not processed.
fn failing_http2(processed: &Processed, seed: u64) -> H2Origin {
    let (processed, state) = (Arc::clone(processed), Arc::new(Mutex::new(seed)));
    H2Origin::start(H2OriginOptions::default(), move |mut stream| {
        let (processed, random) = (Arc::clone(&processed), next_random(&mut lock(&state)));
        async move {
            if random % 8 == 0 {
                return stream.respond.send_reset(h2::Reason::REFUSED_STREAM);
            }
            if random % 8 == 1 {
                stream.control.drain.notify_one();
            }
            *lock(&processed).entry(stream.request.uri().path().to_owned()).or_default() += 1;
            stream.body().await;
            match random % 8 {
                2 => stream.respond.send_reset(h2::Reason::INTERNAL_ERROR),
                3 => {
                    stream.control.abort.notify_one();
                    std::future::pending().await
                }
                4 => stream.reply(503, "busy"),
                _ => stream.reply(200, "x"),
            }
        }
    })
}

#[test]
fn request_that_is_not_safe_to_repeat_is_processed_at_most_once() {
    let processed = Processed::default();
    let seed = 20_261_129;
    let http1: Vec<Origin> = (0..2).map(|index| failing_http1(&processed, seed + index)).collect();
    let http2: Vec<H2Origin> = (0..2).map(|index| failing_http2(&processed, seed + 10 + index)).collect();
    let mut endpoints: Vec<String> = http1.iter().map(|origin| http(origin.address)).collect();
    endpoints.extend(http2.iter().map(|origin| format!("h2c://{}", origin.address)));
    endpoints.push(http(free_address()));
    let gateway = Gateway::start(&config(&endpoints, "balance = \"round-robin\"\nretries = 5", "hedge = true"));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let gateway = &gateway;
            scope.spawn(move || {
                for number in 0..150 {
                    let (method, body): (_, &[u8]) = if number % 3 == 0 { ("GET", b"") } else { ("POST", b"order") };
                    let response = gateway.request(method, &format!("/{method}/{thread}/{number}"), &[], body);
                    assert!([200, 503].contains(&response.status), "{}", response.status);
                }
            });
        }
    });
    let counts = lock(&processed);
    let twice: Vec<_> = counts.iter().filter(|(target, count)| target.starts_with("/POST") && **count > 1).collect();
    assert!(twice.is_empty(), "processed more than once with the seed {seed}: {twice:?}");
    assert!(counts.iter().any(|(target, count)| target.starts_with("/GET") && *count > 1), "safe ones are repeated");
    // One that every attempt refuses is answered without having been processed.
    let arrived = counts.keys().filter(|target| target.starts_with("/POST")).count();
    assert!(arrived >= 380, "{arrived} of 400");
}
