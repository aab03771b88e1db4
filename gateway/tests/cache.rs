//! The cache as seen by clients and the origin: storing, validation, stale responses, and collapsed
//! misses.

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use support::client::chunked;
use support::{BodyEnd, Client, Gate, Gateway, Origin, ReceivedRequest, STEP_TIMEOUT, Script, one_route, wait_for};

const CACHED: &str = "cache = { mode = \"standard\" }";
/// Stored and stale at once, so that no test has to wait for a second.
const STALE: &str = "max-age=0";

fn cached(origin: &Origin) -> Gateway {
    Gateway::start(&one_route(origin.address, CACHED, ""))
}

#[test]
fn second_request_is_a_hit() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "kept"));
    let gateway = cached(&origin);
    let (first, second) = (gateway.get("/a", &[]), gateway.get("/a", &[]));
    assert_eq!((first.status, first.text(), first.is_hit()), (200, "kept".into(), false));
    assert!(first.cache_status().contains("; stored"), "{}", first.cache_status());
    assert_eq!((second.status, second.text(), second.is_hit()), (200, "kept".into(), true));
    assert!(second.field("age").is_some());
    assert_eq!(origin.count(), 1);
    assert_eq!(gateway.metric("tidegate_cache_results_total{cache=\"hit\"}"), 1.0);
}

#[test]
fn hit_has_all_field_lines_of_the_stored_response() {
    let fields = [("Cache-Control", "max-age=60"), ("Link", "</a>"), ("X-One", "1"), ("Link", "</b>")];
    let origin = Origin::start(move |_| Script::ok(&fields, "kept"));
    let gateway = cached(&origin);
    for round in ["miss", "hit"] {
        let response = gateway.get("/a", &[]);
        assert_eq!(response.is_hit(), round == "hit");
        assert_eq!((response.all("link"), response.all("x-one")), (vec!["</a>", "</b>"], vec!["1"]), "{round}");
    }
}

#[test]
fn key_has_host_path_and_query_without_ignored_parameters() {
    let origin = Origin::start(|request| Script::ok(&[("Cache-Control", "max-age=60")], &request.target));
    let rest = "[cache]\nkey_ignore_query = [\"utm_*\"]";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    assert!(!gateway.get("/a?x=1", &[]).is_hit());
    assert!(!gateway.get("/a?x=2", &[]).is_hit());
    assert!(!gateway.get("/a?x=1", &[("Host", "other.test")]).is_hit());
    assert!(!gateway.get("/A?x=1", &[]).is_hit());
    assert!(gateway.get("/a?x=1&utm_source=mail", &[]).is_hit());
    assert_eq!(origin.count(), 4);
}

#[test]
fn route_without_cache_forwards_every_request() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "new"));
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", ""));
    assert!(gateway.get("/a", &[]).cache_status().contains("fwd=bypass"));
    assert!(!gateway.get("/a", &[]).is_hit());
    assert_eq!(origin.count(), 2);
}

#[test]
fn variants_are_stored_separately() {
    let origin = Origin::start(|request| {
        let language = request.field("accept-language").unwrap_or("none").to_owned();
        Script::ok(&[("Cache-Control", "max-age=60"), ("Vary", "Accept-Language")], language)
    });
    let gateway = cached(&origin);
    for round in 0..2 {
        for language in ["de", "en"] {
            let response = gateway.get("/a", &[("Accept-Language", language), ("X-Other", &round.to_string())]);
            assert_eq!((response.text(), response.is_hit()), (language.to_owned(), round == 1), "{language} {round}");
        }
        assert_eq!(gateway.get("/a", &[]).text(), "none");
    }
    assert_eq!(origin.count(), 3);
}

#[test]
fn private_and_stale_responses_are_not_stored() {
    /// Path, request fields, response fields.
    type Case = (&'static str, &'static [(&'static str, &'static str)], &'static [(&'static str, &'static str)]);
    const FORBIDDEN: [Case; 10] = [
        ("private", &[], &[("Cache-Control", "private, max-age=60")]),
        ("no-store", &[], &[("Cache-Control", "no-store, max-age=60")]),
        ("authorization", &[("Authorization", "Basic eDp5")], &[("Cache-Control", "max-age=60")]),
        ("set-cookie", &[], &[("Cache-Control", "max-age=60"), ("Set-Cookie", "a=b")]),
        ("vary-all", &[], &[("Cache-Control", "max-age=60"), ("Vary", "*")]),
        ("silent", &[], &[]),
        ("s-maxage", &[], &[("Cache-Control", "s-maxage=0, max-age=60")]),
        ("expired", &[], &[("Expires", "0")]),
        ("own-no-store", &[("Cache-Control", "no-store")], &[("Cache-Control", "max-age=60")]),
        ("old", &[], &[("Cache-Control", "max-age=60"), ("Age", "61")]),
    ];
    let find = |request: &ReceivedRequest| FORBIDDEN.iter().find(|(name, ..)| request.target == format!("/{name}"));
    let origin = Origin::start(move |request| {
        Script::ok(find(request).expect("a path of the table").2, request.number.to_string())
    });
    let gateway = cached(&origin);
    for (name, request, _) in FORBIDDEN {
        let target = format!("/{name}");
        let (first, second) = (gateway.get(&target, request), gateway.get(&target, request));
        assert!(!first.cache_status().contains("stored"), "{name}: {}", first.cache_status());
        assert!(!second.is_hit() && first.body != second.body, "{name}: {}", second.cache_status());
    }
    // The response to an authorised request is not served to anonymous requests either.
    assert!(!gateway.get("/authorization", &[]).is_hit());
}

#[test]
fn public_response_to_an_authorized_request_is_shared() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "public, max-age=60")], "all"));
    let gateway = cached(&origin);
    let authorization = [("Authorization", "Basic eDp5")];
    assert!(!gateway.get("/a", &authorization).is_hit());
    assert!(gateway.get("/a", &authorization).is_hit() && gateway.get("/a", &[]).is_hit());
}

#[test]
fn stale_object_is_validated_and_freshened() {
    let origin = Origin::start(|request| match request.field("if-none-match") {
        Some("\"v1\"") => {
            Script::reply(304, &[("ETag", "\"v1\""), ("Cache-Control", "max-age=60"), ("X-New", "1")], "")
        }
        _ => Script::ok(&[("ETag", "\"v1\""), ("Cache-Control", STALE)], "body"),
    });
    let gateway = cached(&origin);
    assert_eq!(gateway.get("/a", &[]).text(), "body");
    let validated = gateway.get("/a", &[]);
    assert_eq!((validated.status, validated.text()), (200, "body".into()));
    assert!(validated.cache_status().contains("fwd=stale; fwd-status=304"), "{}", validated.cache_status());
    let fresh = gateway.get("/a", &[]);
    assert_eq!((fresh.is_hit(), fresh.text(), fresh.field("x-new")), (true, "body".into(), Some("1")));
    assert_eq!(origin.count(), 2);
}

#[test]
fn changed_object_replaces_the_stale_one() {
    let origin = Origin::start(|request| {
        let etag = format!("\"v{}\"", request.number);
        let cache_control = if request.number == 0 { STALE } else { "max-age=60" };
        Script::ok(&[("ETag", &etag), ("Cache-Control", cache_control)], &etag)
    });
    let gateway = cached(&origin);
    let bodies: Vec<String> = (0..3).map(|_| gateway.get("/a", &[]).text()).collect();
    assert_eq!(bodies, ["\"v0\"", "\"v1\"", "\"v1\""]);
}

#[test]
fn matching_conditions_get_304_on_hit_and_miss() {
    let fields =
        [("Cache-Control", "max-age=60"), ("ETag", "\"v1\""), ("Last-Modified", "Tue, 01 Jan 2030 00:00:00 GMT")];
    let origin = Origin::start(move |_| Script::ok(&fields, "body"));
    let gateway = cached(&origin);
    let mut client = gateway.connect();
    let conditions = [
        ("If-None-Match", "\"v1\""),
        ("If-None-Match", "W/\"v1\""),
        ("If-None-Match", "\"v0\", \"v1\""),
        ("If-None-Match", "*"),
        ("If-Modified-Since", "Tue, 01 Jan 2030 00:00:00 GMT"),
    ];
    for condition in conditions {
        let response = client.get("/a", &[condition]);
        assert_eq!((response.status, response.field("etag")), (304, Some("\"v1\"")), "{condition:?}");
        assert!(response.body.is_empty() && response.field("content-length").is_none_or(|length| length == "4"));
    }
    let response =
        client.get("/a", &[("If-None-Match", "\"v2\""), ("If-Modified-Since", "Tue, 01 Jan 2030 00:00:00 GMT")]);
    assert_eq!((response.status, response.text()), (200, "body".into()), "If-None-Match takes precedence");
    assert_eq!(origin.count(), 1, "the complete response is fetched and stored, whatever the condition");
}

#[test]
fn head_is_served_from_a_stored_get() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60"), ("X-One", "1")], "body"));
    let gateway = cached(&origin);
    gateway.get("/a", &[]);
    let mut client = gateway.connect();
    let head = client.request("HEAD", "/a", &[], b"");
    assert!(head.is_hit());
    assert_eq!((head.status, head.field("content-length"), head.field("x-one")), (200, Some("4"), Some("1")));
    assert_eq!(client.get("/a", &[]).text(), "body", "HEAD has no body");
    assert_eq!(origin.count(), 1);
}

/// The HEAD was sent while version `a` was stored; its response matches what is stored since.
#[test]
fn response_to_head_does_not_remove_what_was_stored_meanwhile() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| match (request.number, request.method.as_str()) {
        (0, _) => Script::ok(&[("Cache-Control", STALE), ("ETag", "\"a\"")], "a"),
        (_, "HEAD") => {
            let fields = [("Cache-Control", "max-age=60"), ("ETag", "\"b\""), ("Content-Length", "1")];
            Script::new().wait(&opened).head(200, &fields)
        }
        _ => Script::ok(&[("Cache-Control", "max-age=60"), ("ETag", "\"b\"")], "b"),
    });
    let gateway = cached(&origin);
    assert_eq!(gateway.get("/a", &[]).text(), "a");
    let mut client = gateway.connect();
    client.send(support::client::request("HEAD", "/a", &[], b""));
    origin.wait_for_requests(2);
    // Not the request that waits for the HEAD: that one is another method.
    let no_cache = [("Cache-Control", "no-cache")];
    assert_eq!(gateway.get("/a", &no_cache).text(), "b");
    gate.open();
    assert_eq!(client.read_response_to("HEAD").field("etag"), Some("\"b\""));
    let next = gateway.get("/a", &[]);
    assert_eq!((next.text(), next.is_hit(), origin.count()), ("b".into(), true, 3));
}

#[test]
fn stale_response_outlives_a_head_that_contradicts_it() {
    let is_down = Arc::new(AtomicBool::new(false));
    let down = Arc::clone(&is_down);
    let origin = Origin::start(move |request| {
        let etag = if request.number == 0 { "\"a\"" } else { "\"b\"" };
        match (down.load(Ordering::SeqCst), request.method.as_str()) {
            (true, _) => Script::reply(500, &[], "down"),
            (_, "HEAD") => Script::new().head(200, &[("ETag", etag), ("Content-Length", "1")]),
            _ => Script::ok(&[("Cache-Control", STALE), ("ETag", etag)], "a"),
        }
    });
    let route = "cache = { mode = \"standard\", stale_if_error = \"1m\" }";
    let gateway = Gateway::start(&one_route(origin.address, route, ""));
    assert_eq!(gateway.get("/a", &[]).text(), "a");
    assert_eq!(gateway.request("HEAD", "/a", &[], b"").field("etag"), Some("\"b\""));
    is_down.store(true, Ordering::SeqCst);
    let stale = gateway.get("/a", &[]);
    assert_eq!((stale.status, stale.text()), (200, "a".into()));
}

#[test]
fn only_if_cached_is_never_forwarded() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "body"));
    let gateway = cached(&origin);
    let only = [("Cache-Control", "only-if-cached")];
    assert_eq!((gateway.get("/a", &only).status, origin.count()), (504, 0));
    gateway.get("/a", &[]);
    assert_eq!((gateway.get("/a", &only).status, origin.count()), (200, 1));
}

#[test]
fn no_cache_is_forwarded_and_its_response_replaces_the_object() {
    let origin = Origin::start(|request| Script::ok(&[("Cache-Control", "max-age=60")], request.number.to_string()));
    let gateway = cached(&origin);
    gateway.get("/a", &[]);
    assert_eq!(gateway.get("/a", &[("Cache-Control", "no-cache")]).text(), "1");
    assert_eq!(gateway.get("/a", &[]).text(), "1");
    assert_eq!(gateway.get("/a", &[("Pragma", "no-cache")]).text(), "2");
}

/// An origin that succeeds once and then fails in the way that the path names.
fn failing(request: &ReceivedRequest, cache_control: &str) -> Script {
    let is_first = request.field("if-none-match").is_none();
    if is_first {
        return Script::ok(&[("Cache-Control", cache_control), ("ETag", "\"v1\"")], "kept");
    }
    match request.target.as_str() {
        "/status" => Script::reply(502, &[], "broken"),
        "/hang" => Script::new().hang(),
        "/reset" => Script::new().reset(),
        "/garbage" => Script::new().send("no http at all\r\n\r\n").close(),
        "/half" => Script::new().send("HTTP/1.1 200 OK\r\nContent-").close(),
        _ => Script::new().close(),
    }
}

const FAULTS: [&str; 6] = ["/status", "/hang", "/reset", "/garbage", "/half", "/close"];

fn with_short_timeout(origin: &Origin) -> Gateway {
    let config =
        one_route(origin.address, CACHED, "").replace("[upstreams.origin]", "[upstreams.origin]\ntimeout = \"400ms\"");
    Gateway::start(&config)
}

#[test]
fn stale_object_is_served_if_the_origin_fails() {
    let origin = Origin::start(|request| failing(request, "max-age=0, stale-if-error=60"));
    let gateway = with_short_timeout(&origin);
    for target in FAULTS {
        assert_eq!(gateway.get(target, &[]).status, 200);
        let start = Instant::now();
        let response = gateway.get(target, &[]);
        assert_eq!((response.status, response.text(), response.is_hit()), (200, "kept".into(), true), "{target}");
        assert!(start.elapsed() < Duration::from_secs(2), "{target}: {:?}", start.elapsed());
    }
    origin.stop();
    let response = gateway.get("/status", &[]);
    assert_eq!((response.status, response.text()), (200, "kept".into()), "the origin is stopped");
}

#[test]
fn must_revalidate_forbids_stale_if_error() {
    let origin = Origin::start(|request| failing(request, "max-age=0, stale-if-error=60, must-revalidate"));
    let gateway = with_short_timeout(&origin);
    for target in FAULTS {
        assert_eq!(gateway.get(target, &[]).status, 200);
        let response = gateway.get(target, &[]);
        // A 502 of the origin is passed on. Without a valid response the client gets the error page
        // of the route: 502 for a malformed response, else 503.
        assert_eq!(response.status, if matches!(target, "/status" | "/garbage") { 502 } else { 503 }, "{target}");
        assert!(!response.is_hit(), "{target}");
    }
}

#[test]
fn failure_is_served_without_stale_if_error() {
    let origin = Origin::start(|request| failing(request, STALE));
    let policy = "cache = { stale_if_error = \"0s\" }";
    let gateway = Gateway::start(&one_route(origin.address, policy, ""));
    gateway.get("/close", &[]);
    assert_eq!(gateway.get("/close", &[]).status, 503);
}

#[test]
fn route_stale_windows_apply_without_origin_directives() {
    let origin = Origin::start(|request| failing(request, STALE));
    let route = "cache = { mode = \"standard\", stale_if_error = \"10m\" }";
    let gateway = Gateway::start(&one_route(origin.address, route, ""));
    gateway.get("/close", &[]);
    assert_eq!(gateway.get("/close", &[]).text(), "kept");
}

#[test]
fn one_background_request_revalidates_while_clients_get_the_stale_object() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| match request.number {
        0 => Script::ok(&[("Cache-Control", "max-age=0, stale-while-revalidate=60"), ("ETag", "\"v0\"")], "old"),
        _ => Script::new()
            .wait(&opened)
            .head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "3")])
            .send("new"),
    });
    let gateway = cached(&origin);
    gateway.get("/a", &[]);
    for _ in 0..5 {
        let response = gateway.get("/a", &[]);
        assert_eq!((response.text(), response.is_hit()), ("old".into(), true));
    }
    origin.wait_for_requests(2);
    gate.open();
    wait_for(|| gateway.get("/a", &[]).text() == "new", STEP_TIMEOUT);
    assert_eq!(origin.count(), 2, "one background request for all");
}

#[test]
fn successful_unsafe_method_invalidates_the_object() {
    let origin = Origin::start(|request| {
        let status = if request.field("x-fail").is_some() { 500 } else { 200 };
        Script::reply(status, &[("Cache-Control", "max-age=60")], request.number.to_string())
    });
    let gateway = cached(&origin);
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        gateway.get("/a", &[]);
        assert!(gateway.get("/a", &[]).is_hit());
        gateway.request(method, "/a", &[("X-Fail", "1")], b"x");
        assert!(gateway.get("/a", &[]).is_hit(), "{method} that failed changed nothing");
        gateway.request(method, "/a", &[], b"x");
        assert!(!gateway.get("/a", &[]).is_hit(), "{method}");
    }
    gateway.request("OPTIONS", "/a", &[], b"");
    assert!(gateway.get("/a", &[]).is_hit(), "OPTIONS is safe");
}

/// Runs `each` on `count` connections concurrently.
fn at_once<T: Send + 'static>(
    count: usize,
    gateway: &Gateway,
    each: impl Fn(&mut Client) -> T + Send + Sync + 'static,
) -> Vec<std::thread::JoinHandle<T>> {
    let (start, each) = (Arc::new(Barrier::new(count)), Arc::new(each));
    let run = |_| {
        let (address, start, each) = (gateway.address, Arc::clone(&start), Arc::clone(&each));
        std::thread::spawn(move || {
            let mut client = Client::connect(address);
            start.wait();
            each(&mut client)
        })
    };
    (0..count).map(run).collect()
}

fn join<T>(threads: Vec<std::thread::JoinHandle<T>>) -> Vec<T> {
    threads.into_iter().map(|thread| thread.join().expect("a thread that did not panic")).collect()
}

#[test]
fn concurrent_misses_make_one_request_and_stream_its_body() {
    const CLIENTS: usize = 200;
    for framing in ["length", "chunks"] {
        let gate = Gate::default();
        let opened = gate.clone();
        let origin = Origin::start(move |_| match framing {
            "length" => Script::new()
                .head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "10")])
                .send("first")
                .wait(&opened)
                .send("-last"),
            _ => Script::new()
                .head(200, &[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")])
                .send("5\r\nfirst\r\n")
                .wait(&opened)
                .send("5\r\n-last\r\n0\r\n\r\n"),
        });
        let gateway = cached(&origin);
        let streaming = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&streaming);
        let threads = at_once(CLIENTS, &gateway, move |client| {
            client.send_get("/a", &[]);
            let head = client.read_head();
            let is_chunked = head.field("transfer-encoding").is_some();
            let first = client.read_bytes(if is_chunked { "5\r\nfirst".len() } else { 5 });
            counter.fetch_add(1, Ordering::SeqCst);
            let last = client.read_bytes(if is_chunked { "\r\n5\r\n-last".len() } else { 5 });
            first.ends_with(b"first") && last.ends_with(b"-last")
        });
        wait_for(|| streaming.load(Ordering::SeqCst) == CLIENTS, STEP_TIMEOUT);
        // Every client has the first bytes before the origin sends the last.
        gate.open();
        assert!(join(threads).into_iter().all(|is_whole| is_whole), "{framing}");
        assert_eq!(origin.count(), 1, "{framing}");
        assert_eq!(gateway.get("/a", &[]).text(), "first-last");
        assert_eq!(origin.count(), 1, "{framing}: stored");
    }
}

#[test]
fn uncacheable_requests_do_not_queue() {
    const CLIENTS: usize = 100;
    const EXCHANGE: Duration = Duration::from_millis(300);
    let origin = Origin::start(|request| {
        Script::new()
            .pause(EXCHANGE)
            .head(200, &[("Cache-Control", "no-store"), ("Content-Length", "2")])
            .send(format!("{:02}", request.number % 100))
    });
    let gateway = cached(&origin);
    let start = Instant::now();
    let bodies = join(at_once(CLIENTS, &gateway, |client| client.get("/a", &[]).text()));
    // One exchange for the leader, and one for the waiting requests. The rest is tolerance for a
    // busy machine.
    assert!(start.elapsed() < 5 * EXCHANGE, "{:?}", start.elapsed());
    let mut distinct = bodies.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!((distinct.len(), origin.count()), (CLIENTS, CLIENTS), "every client has its own response");
}

#[test]
fn fetch_of_a_disconnected_leader_continues_for_the_others() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new().wait(&opened).head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "4")]).send("body")
    });
    let gateway = cached(&origin);
    let mut leader = gateway.connect();
    leader.send_get("/a", &[]);
    origin.wait_for_requests(1);
    let mut joiners: Vec<Client> = (0..5).map(|_| gateway.connect()).collect();
    joiners.iter_mut().for_each(|joiner| joiner.send_get("/a", &[]));
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 6.0, STEP_TIMEOUT);
    assert_eq!(origin.count(), 1);
    drop(leader);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 5.0, STEP_TIMEOUT);
    gate.open();
    for joiner in &mut joiners {
        assert_eq!(joiner.read_response().text(), "body");
    }
    assert_eq!(origin.count(), 1);
}

#[test]
fn joiners_read_on_after_the_leader_disconnects() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new()
            .head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "10")])
            .send("first")
            .wait(&opened)
            .send("-last")
    });
    let gateway = cached(&origin);
    let mut clients: Vec<Client> = (0..3).map(|_| gateway.connect()).collect();
    for client in &mut clients {
        client.send_get("/a", &[]);
        assert_eq!(client.read_head().status, 200);
        assert_eq!(client.read_bytes(5), b"first");
    }
    drop(clients.remove(0));
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 2.0, STEP_TIMEOUT);
    gate.open();
    clients.iter_mut().for_each(|client| assert_eq!(client.read_bytes(5), b"-last"));
    assert_eq!(origin.count(), 1);
    wait_for(|| gateway.get("/a", &[]).is_hit(), STEP_TIMEOUT);
}

#[test]
fn truncated_body_is_not_stored_and_aborts_the_response() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/length" => {
            Script::new().head(200, &[("Cache-Control", "max-age=60"), ("Content-Length", "100")]).send("part").close()
        }
        "/chunks" => {
            let fields = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
            Script::new().head(200, &fields).send("4\r\npart\r\n").close()
        }
        "/chunk" => {
            let fields = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
            Script::new().head(200, &fields).send("40\r\npart").close()
        }
        "/bad-chunk" => {
            let fields = [("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")];
            Script::new().head(200, &fields).send("4\r\npart\r\nzz\r\n").close()
        }
        _ => {
            let fields = [("Cache-Control", "max-age=60"), ("Content-Length", "100")];
            Script::new().head(200, &fields).send("part").pause(Duration::from_millis(50)).reset()
        }
    });
    for route in [CACHED, "cache = { mode = \"off\" }"] {
        let gateway = Gateway::start(&one_route(origin.address, route, ""));
        for target in ["/length", "/chunks", "/chunk", "/bad-chunk", "/reset"] {
            let before = origin.count();
            for _ in 0..2 {
                let response = gateway.get(target, &[]);
                assert_eq!(response.end, BodyEnd::Truncated, "{target} {route}: {response:?}");
            }
            assert_eq!(origin.count() - before, 2, "{target} {route}: a truncated body is not stored");
        }
    }
}

#[test]
fn body_above_object_bytes_is_passed_through_and_not_stored() {
    let body: Vec<u8> = (0..200_000u32).map(|at| (at % 251) as u8).collect();
    let sent = body.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/length" => Script::ok(&[("Cache-Control", "max-age=60")], &sent),
        _ => Script::new()
            .head(200, &[("Cache-Control", "max-age=60"), ("Transfer-Encoding", "chunked")])
            .send(chunked(&sent, 4_000)),
    });
    let gateway = Gateway::start(&one_route(origin.address, CACHED, "[cache]\nobject_bytes = \"64KiB\""));
    for target in ["/length", "/chunks"] {
        let before = origin.count();
        for _ in 0..2 {
            let response = gateway.get(target, &[]);
            assert!(response.body == body && response.end == BodyEnd::Complete && !response.is_hit(), "{target}");
        }
        assert_eq!(origin.count() - before, 2, "{target}");
    }
}

#[test]
fn every_response_has_cache_status() {
    let is_broken = Arc::new(AtomicBool::new(false));
    let broken = Arc::clone(&is_broken);
    let origin = Origin::start(move |_| match broken.load(Ordering::SeqCst) {
        true => Script::new().close(),
        false => Script::ok(&[], "fine"),
    });
    let config = format!(
        "[upstreams.origin]\nendpoints = [\"http://{}\"]\n\
         [limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\n\
         [[routes]]\nname = \"plain\"\nmatch = {{ path = \"/plain\" }}\nupstream = \"origin\"\n\
         [[routes]]\nname = \"limited\"\nmatch = {{ path = \"/limited\" }}\nupstream = \"origin\"\nlimits = [\"device\"]\n",
        origin.address
    );
    let gateway = Gateway::start(&config);
    gateway.get("/limited", &[]);
    let mut responses = vec![
        (200, gateway.get("/plain", &[])),
        (404, gateway.get("/nowhere", &[])),
        (429, gateway.get("/limited", &[])),
        (200, gateway.request("POST", "/plain", &[], b"x")),
    ];
    is_broken.store(true, Ordering::SeqCst);
    responses.push((503, gateway.get("/plain", &[])));
    for (target, expected) in [("/bad\x7f", 400), (&*format!("/{}", "x".repeat(9_000)), 414)] {
        let mut client = gateway.connect();
        client.send_get(target, &[]);
        responses.push((expected, client.read_response()));
    }
    for (expected, response) in responses {
        assert_eq!(response.status, expected);
        assert!(response.cache_status().starts_with("tidegate"), "{expected}: {response:?}");
    }
}

// Range requests (RFC 9110 section 14).

#[test]
fn ranges_are_served_from_a_complete_object() {
    let fields = [("Cache-Control", "max-age=60"), ("ETag", "\"one\""), ("Content-Type", "text/plain")];
    let origin = Origin::start(move |_| Script::ok(&fields, "0123456789"));
    let gateway = cached(&origin);
    gateway.get("/", &[]);
    let part = |range: &str| gateway.get("/", &[("Range", range)]);
    for (range, content_range, text) in
        [("bytes=0-1", "bytes 0-1/10", "01"), ("bytes=8-", "bytes 8-9/10", "89"), ("bytes=-1", "bytes 9-9/10", "9")]
    {
        let response = part(range);
        assert_eq!(
            (response.status, response.field("content-range"), response.text()),
            (206, Some(content_range), text.into())
        );
        assert!(response.is_hit() && response.field("age").is_some() && response.field("etag").is_some());
    }
    let none = part("bytes=10-");
    assert_eq!((none.status, none.field("content-range"), none.body.len()), (416, Some("bytes */10"), 0));
    let reusable = ["etag", "last-modified", "expires", "age"].map(|name| none.field(name));
    assert_eq!((none.field("cache-control"), reusable), (Some("no-store"), [None; 4]));
    let two = part("bytes=0-0,-1");
    let content_type = two.field("content-type").expect("a type").to_owned();
    let boundary = content_type.strip_prefix("multipart/byteranges; boundary=").expect("a multipart response");
    let text = two.text();
    assert_eq!((two.status, text.matches(&format!("--{boundary}\r\n")).count()), (206, 2), "{text}");
    assert!(
        text.contains("Content-Range: bytes 9-9/10\r\n\r\n9\r\n") && text.contains("Content-Type: text/plain"),
        "{text}"
    );
    assert_eq!(part("bytes=0-5,3-9").text(), "0123456789", "overlapping ranges get the complete object");
    for (condition, status) in [("\"one\"", 206), ("\"other\"", 200), ("W/\"one\"", 200)] {
        assert_eq!(gateway.get("/", &[("Range", "bytes=0-1"), ("If-Range", condition)]).status, status, "{condition}");
    }
    assert_eq!(gateway.request("HEAD", "/", &[("Range", "bytes=0-1")], b"").status, 200);
    assert_eq!(gateway.get("/", &[("Range", "bytes=0-1"), ("If-None-Match", "\"one\"")]).status, 304);
    assert_eq!(origin.count(), 1);
}

#[test]
fn range_of_an_unstored_object_is_forwarded_unchanged() {
    let origin = Origin::start(|request| match request.field("range") {
        Some(_) => Script::reply(206, &[("Content-Range", "bytes 0-1/4"), ("Cache-Control", "max-age=60")], "01"),
        None => Script::ok(&[("Cache-Control", "max-age=60")], "0123"),
    });
    let gateway = cached(&origin);
    let response = gateway.get("/", &[("Range", "bytes=0-1")]);
    assert_eq!((response.status, response.text()), (206, "01".into()));
    assert_eq!(gateway.get("/", &[]).text(), "0123", "a partial response is not served as complete");
}

// Sources of the freshness lifetime.

#[test]
fn heuristic_freshness_applies_to_cacheable_statuses() {
    let origin = Origin::start(|request| {
        let status = request.target[1..].parse().expect("a status");
        Script::reply(status, &[("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")], "")
    });
    let off = "[cache]\nheuristic = false\n";
    for (route, rest, stores) in [
        (CACHED, "", true),
        ("cache = { heuristic_max = \"0s\" }", "", false),
        ("cache = { heuristic = false }", "", false),
        (CACHED, off, false),
        ("cache = { heuristic = true }", off, true),
        ("cache = { heuristic_max = \"1h\" }", off, true),
    ] {
        let gateway = Gateway::start(&one_route(origin.address, route, rest));
        for (target, allows) in [("/200", true), ("/404", true), ("/202", false), ("/403", false), ("/502", false)] {
            gateway.get(target, &[]);
            assert_eq!(gateway.get(target, &[]).is_hit(), stores && allows, "{target} {route} {rest}");
        }
    }
}

#[test]
fn targeted_field_overrides_cache_control() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/longer" => Script::ok(&[("Cache-Control", "no-store"), ("CDN-Cache-Control", "max-age=60")], ""),
        "/shorter" => Script::ok(&[("Cache-Control", "max-age=60"), ("CDN-Cache-Control", "no-store")], ""),
        _ => Script::ok(&[("Cache-Control", "max-age=60"), ("CDN-Cache-Control", "max-age=\"5, no-store")], ""),
    });
    let strip = "[cache]\ntargeted_to_clients = \"strip\"\n";
    for rest in ["", strip] {
        let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
        for (target, is_stored) in [("/longer", true), ("/shorter", false), ("/invalid", true)] {
            gateway.get(target, &[]);
            let response = gateway.get(target, &[]);
            assert_eq!(response.is_hit(), is_stored, "{target}");
            assert_eq!(response.field("cdn-cache-control").is_some(), rest.is_empty(), "{target}");
        }
    }
    let own = "[cache]\ntargeted = [\"tidegate-cache-control\"]\n";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, own));
    gateway.get("/longer", &[]);
    assert!(!gateway.get("/longer", &[]).is_hit(), "the field is not configured");
}

#[test]
fn set_cookie_responses_are_stored_only_if_configured() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "public, max-age=60"), ("Set-Cookie", "a=b")], ""));
    for (route, is_stored) in [(CACHED, false), ("cache = { set_cookie = \"shared\" }", true)] {
        let gateway = Gateway::start(&one_route(origin.address, route, ""));
        gateway.get("/", &[]);
        let response = gateway.get("/", &[]);
        assert_eq!((response.is_hit(), response.field("set-cookie")), (is_stored, Some("a=b")), "{route}");
    }
}

#[test]
fn configured_ttl_by_status_overrides_the_origin() {
    let origin = Origin::start(|request| {
        let status = request.target[1..4].parse().expect("a status");
        let control = if request.target.ends_with("secret") { "no-store" } else { "max-age=60" };
        Script::reply(status, &[("Cache-Control", control)], "")
    });
    let route = "cache = { ttl = { 200 = \"0s\", 404 = \"1m\", 5xx = \"1m\" } }";
    let gateway = Gateway::start(&one_route(origin.address, route, ""));
    for (target, is_stored) in [("/200", false), ("/404", true), ("/503", true), ("/404/secret", false), ("/301", true)]
    {
        gateway.get(target, &[]);
        assert_eq!(gateway.get(target, &[]).is_hit(), is_stored, "{target}");
    }
}

#[test]
fn cache_status_has_the_forward_reason() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/stale" => Script::ok(&[("Cache-Control", "max-age=0"), ("ETag", "\"x\"")], ""),
        _ => Script::ok(&[("Cache-Control", "max-age=60"), ("Vary", "X-A")], ""),
    });
    let gateway = cached(&origin);
    let fwd = |method: &str, target: &str, fields: &[(&str, &str)]| {
        let response = gateway.request(method, target, fields, b"");
        let status = response.cache_status().to_owned();
        status.split("; ").find_map(|part| part.strip_prefix("fwd=")).unwrap_or("none").to_owned()
    };
    assert_eq!(fwd("GET", "/", &[("X-A", "1")]), "uri-miss");
    assert_eq!(fwd("GET", "/", &[("X-A", "1")]), "none");
    assert_eq!(fwd("GET", "/", &[("X-A", "2")]), "vary-miss");
    assert_eq!(fwd("GET", "/", &[("X-A", "1"), ("Cache-Control", "no-cache")]), "request");
    assert_eq!(fwd("POST", "/other", &[]), "method");
    assert_eq!(fwd("GET", "/stale", &[]), "uri-miss");
    assert_eq!(fwd("GET", "/stale", &[]), "stale");
}

// Invalidation by unsafe methods.

#[test]
fn write_invalidates_location_and_content_location() {
    let origin = Origin::start(|request| match (request.method.as_str(), request.target.as_str()) {
        ("GET", _) => Script::ok(&[("Cache-Control", "max-age=60")], ""),
        (_, "/failed") => Script::reply(500, &[("Location", "/kept")], ""),
        _ => Script::reply(201, &[("Location", "/created?x"), ("Content-Location", "http://elsewhere/kept")], ""),
    });
    let gateway = cached(&origin);
    for target in ["/list", "/created?x", "/kept"] {
        gateway.get(target, &[]);
    }
    gateway.request("POST", "/failed", &[], b"");
    assert!(gateway.get("/kept", &[]).is_hit(), "a failure changes nothing");
    gateway.request("PATCH", "/list", &[], b"");
    for (target, is_hit) in [("/list", false), ("/created?x", false), ("/kept", true)] {
        assert_eq!(gateway.get(target, &[]).is_hit(), is_hit, "{target}");
    }
}

#[test]
fn post_response_is_not_stored_after_a_concurrent_post() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| {
        let own = [("Cache-Control", "max-age=60"), ("Content-Location", "/x"), ("Content-Length", "3")];
        let script = if request.body == b"slow" { Script::new().wait(&opened) } else { Script::new() };
        script.head(200, &own).send("old")
    });
    let gateway = cached(&origin);
    let mut slow = gateway.connect();
    slow.send(support::client::request("POST", "/x", &[], b"slow"));
    origin.wait_for_requests(1);
    gateway.request("POST", "/x", &[], b"fast");
    assert!(gateway.get("/x", &[]).is_hit());
    gate.open();
    assert_eq!(slow.read_response().status, 200);
    assert!(!gateway.get("/x", &[]).is_hit(), "the order of the two writes is unknown");
}

#[test]
fn write_invalidates_the_object_in_all_regions() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], ""));
    let config = one_route(
        origin.address,
        CACHED,
        "[identity]\nregion = [\"header:x-region\"]\nregions = [\"us\", \"asia\", \"eu\"]\n",
    );
    let gateway = Gateway::start(&config);
    let regions: [&[(&str, &str)]; 3] = [&[], &[("X-Region", "us")], &[("X-Region", "asia")]];
    for region in regions {
        gateway.get("/", region);
        assert!(gateway.get("/", region).is_hit());
    }
    gateway.request("POST", "/", &[("X-Region", "eu")], b"");
    for region in regions {
        assert!(!gateway.get("/", region).is_hit(), "{region:?}");
    }
}

/// A route with `policy`, and a gateway that is reloaded with another one.
fn reloaded(gateway: &Gateway, origin: &Origin, policy: &str) {
    let count = gateway.process.stderr.events("reloaded").len();
    gateway.rewrite(&one_route(origin.address, &format!("cache = {{ {policy} }}"), ""));
    wait_for(|| gateway.process.stderr.events("reloaded").len() > count, STEP_TIMEOUT);
}

#[test]
fn a_stored_response_is_used_only_as_the_policy_of_now_allows() {
    /// Policy that stores, policy after the reload, response fields.
    type Case = (&'static str, &'static str, &'static [(&'static str, &'static str)]);
    const CASES: [Case; 4] = [
        (
            "set_cookie = \"shared\"",
            "set_cookie = \"private\"",
            &[("Cache-Control", "max-age=60"), ("Set-Cookie", "a=b")],
        ),
        ("default_ttl = \"1h\"", "default_ttl = \"0s\"", &[]),
        ("ttl = { \"2xx\" = \"1h\" }", "", &[]),
        ("heuristic_max = \"1h\"", "heuristic_max = \"0s\"", &[("Last-Modified", "Tue, 01 Jan 2019 00:00:00 GMT")]),
    ];
    for (before, after, fields) in CASES {
        let origin = Origin::start(move |request| Script::ok(fields, request.number.to_string()));
        let gateway = Gateway::start(&one_route(origin.address, &format!("cache = {{ {before} }}"), ""));
        gateway.get("/a", &[]);
        assert!(gateway.get("/a", &[]).is_hit(), "{before}");
        reloaded(&gateway, &origin, after);
        let response = gateway.get("/a", &[]);
        assert!(!response.is_hit() && origin.count() == 2, "{after}: {}", response.cache_status());
        reloaded(&gateway, &origin, before);
    }
}

#[test]
fn what_a_client_demands_is_honoured_as_configured() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], ""));
    let demands = [("Cache-Control", "no-cache"), ("Cache-Control", "max-age=0"), ("Pragma", "no-cache")];
    for (setting, hits) in [("full", false), ("limited", true), ("off", true)] {
        let rest = format!("[cache]\nhonour_client = \"{setting}\"");
        let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
        for demand in demands {
            gateway.get("/a", &[]);
            assert_eq!(gateway.get("/a", &[demand]).is_hit(), hits, "{setting}: {demand:?}");
        }
        // `only-if-cached` costs the origin nothing.
        assert_eq!(gateway.get("/other", &[("Cache-Control", "only-if-cached")]).status, 504, "{setting}");
        gateway.get("/b", &[("Cache-Control", "no-store")]);
        assert_eq!(gateway.get("/b", &[]).is_hit(), setting == "off", "{setting}: no-store of a request");
    }
    let gateway = Gateway::start(&one_route(origin.address, CACHED, "[cache]\nhonour_client = \"limited\""));
    gateway.get("/a", &[]);
    // A second later, one demand is honoured; those that follow within a second are not.
    let demanded = || gateway.get("/a", &[("Cache-Control", "no-cache")]).is_hit();
    wait_for(|| !demanded(), STEP_TIMEOUT);
    assert!(demanded());
}

#[test]
fn invented_regions_count_as_the_default_one() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], ""));
    let identity = "[identity]\nregion = [\"header:x-region\"]\nregions = [\"south\"]\nregion_default = \"north\"\n";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, identity));
    let mut client = gateway.connect();
    assert!(client.get("/", &[]).cache_status().contains("stored"));
    // Far more names than regions were stored for.
    for number in 0..1_500 {
        let response = client.get("/", &[("X-Region", &format!("invented-{number}"))]);
        assert!(response.is_hit(), "{number}: {}", response.cache_status());
    }
    for name in ["default", "North", "", "south/../north"] {
        assert!(client.get("/", &[("X-Region", name)]).is_hit(), "{name}");
    }
    assert!(!client.get("/", &[("X-Region", "south")]).is_hit());
    assert!(client.get("/", &[("X-Region", "south")]).is_hit());
    assert!(client.get("/", &[("X-Region", "north")]).is_hit());
    assert_eq!(origin.count(), 2);
}
