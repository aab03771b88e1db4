//! The admin address: clients that hold its connections, wrong tokens, and web pages of others.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, free_address, one_route, tidegate, wait_for};

/// Connections of the admin address for all requests.
const ROOM: usize = 64;
/// A probe must be answered within this time, whatever other connections do.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
const GET_METRICS: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn gateway(admin: &str) -> Gateway {
    let address = free_address();
    let admin = if admin.is_empty() { String::new() } else { format!("[admin]\naddress = \"{address}\"\n{admin}\n") };
    let gateway = Gateway::start(&one_route(free_address(), "", &admin));
    if admin.is_empty() { gateway } else { Gateway { admin: address, ..gateway } }
}

fn socket(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    socket
}

/// The status of one GET on a new connection, and the time from connect to the whole head.
fn timed_get(address: SocketAddr, target: &str) -> (u16, Duration) {
    let start = Instant::now();
    let response = Client::connect(address).get(target, &[("host", "localhost")]);
    (response.status, start.elapsed())
}

/// The behaviour of the other connections.
#[derive(Clone, Copy, Debug)]
enum Occupation {
    Silent,
    /// Part of a head.
    Stopped(&'static [u8]),
    /// A byte of an endless head now and then.
    Slow,
    /// Idle after a response.
    KeptAlive,
    /// Requests whose responses are not read.
    Unread,
}

/// Serves probes, metrics and the API at once while many connections are held open in each way.
#[test]
fn held_connections_keep_nobody_out() {
    let tls_hello: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let occupations = [
        Occupation::Silent,
        Occupation::Stopped(b"G"),
        Occupation::Stopped(b"GET /live HTTP/1.1\r\nHost: a\r\nx: "),
        Occupation::Stopped(b"\r\n"),
        Occupation::Stopped(b"POST /live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"),
        Occupation::Stopped(tls_hello),
        Occupation::Slow,
        Occupation::KeptAlive,
        Occupation::Unread,
    ];
    for occupation in occupations {
        for count in [ROOM, 4 * ROOM] {
            let gateway = gateway("");
            let mut held: Vec<TcpStream> = (0..count).map(|_| socket(gateway.admin)).collect();
            for socket in &mut held {
                // A connection that was replaced cannot be written to.
                let _may_be_replaced = match occupation {
                    Occupation::Silent => Ok(()),
                    Occupation::Stopped(bytes) => socket.write_all(bytes),
                    Occupation::Slow => socket.write_all(b"GET /live HTTP/1.1\r\nHost: a\r\nx: "),
                    Occupation::KeptAlive => socket.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                    Occupation::Unread => (0..8).try_for_each(|_| socket.write_all(GET_METRICS)),
                };
            }
            let is_done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while matches!(occupation, Occupation::Slow) && !is_done.load(Ordering::Relaxed) {
                        for mut socket in &held {
                            let _may_be_replaced = socket.write_all(b"x");
                        }
                        std::thread::sleep(Duration::from_millis(100));
                    }
                });
                let mut slow = Vec::new();
                for target in ["/live", "/ready", "/live", "/metrics", "/api/v1/status"] {
                    let (mut status, mut duration) = timed_get(gateway.admin, target);
                    if duration >= PROBE_TIMEOUT {
                        // A busy machine delays one probe. A fault delays each of them.
                        (status, duration) = timed_get(gateway.admin, target);
                    }
                    if status != 200 || duration >= PROBE_TIMEOUT {
                        slow.push((target, status, duration));
                    }
                }
                is_done.store(true, Ordering::Relaxed);
                assert_eq!(slow, [], "{occupation:?}, {count} connections");
            });
        }
    }
}

/// In a full room, the connection that has been idle for the longest gives way, and no other one.
#[test]
fn longest_idle_connection_gives_way() {
    let gateway = gateway("");
    let mut clients: Vec<Client> = (0..ROOM).map(|_| Client::connect(gateway.admin)).collect();
    for client in &mut clients {
        assert_eq!(client.get("/live", &[]).status, 200);
    }
    // The first one is used again, so that the second one has been idle for the longest.
    assert_eq!(clients[0].get("/live", &[]).status, 200);
    let mut newest = Client::connect(gateway.admin);
    assert_eq!(newest.get("/live", &[]).status, 200);
    assert!(clients[1].is_closed_within(STEP_TIMEOUT));
    for (index, client) in clients.iter_mut().enumerate().filter(|(index, _)| *index != 1) {
        assert_eq!(client.get("/live", &[]).status, 200, "{index}");
    }
    assert_eq!(newest.get("/metrics", &[("host", "localhost")]).status, 200);
    assert_eq!(gateway.metric("tidegate_admin_connections_replaced_total"), 2.0, "`metric` needs one as well");
}

/// Silence is bounded as a head is; the idle timeout of 30 s begins with the first response.
#[test]
fn silent_and_slow_connections_are_closed_at_the_head_timeout() {
    let gateway = gateway("");
    let mut silent = Client::connect(gateway.admin);
    let mut slow = Client::connect(gateway.admin);
    let mut kept_alive = Client::connect(gateway.admin);
    assert_eq!(kept_alive.get("/live", &[]).status, 200);
    slow.send(b"GET / HTTP/1.1\r\nHost: a\r\nx: ");
    let start = Instant::now();
    assert!(silent.is_closed_within(STEP_TIMEOUT));
    assert!(start.elapsed() > Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(slow.read_response().status, 408);
    assert_eq!(kept_alive.get("/live", &[]).status, 200);
}

fn status_with_token(gateway: &Gateway, authorization: &str) -> u16 {
    let fields = [("host", "localhost"), ("authorization", authorization)];
    Client::connect(gateway.admin).get("/api/v1/status", &fields).status
}

/// Each wrong token doubles the delay of the next answer to this address. The right token is
/// accepted after the delay, and ends it. A request without a token is no guess.
#[test]
fn wrong_tokens_are_slowed_and_counted() {
    let gateway = gateway("token = \"right-token\"");
    let timed = |authorization: &str| {
        let start = Instant::now();
        (status_with_token(&gateway, authorization), start.elapsed())
    };
    for _ in 0..20 {
        let (status, duration) = timed("Basic cmlnaHQ6dG9rZW4=");
        assert!(status == 401 && duration < PROBE_TIMEOUT, "{status} {duration:?}");
    }
    let wrong = ["Bearer wrong", "Bearer right-toke", "Bearer right-token2", "bearer x", "Bearer Right-token"];
    let start = Instant::now();
    // The sums of 0, 100, 200, 400 and 800 ms. A delay begins before the client has the answer.
    for (authorization, delays) in wrong.into_iter().zip([0, 100, 300, 700, 1_500]) {
        let (status, _) = timed(authorization);
        assert_eq!(status, 401, "{authorization}");
        assert!(start.elapsed() >= Duration::from_millis(delays), "{authorization}: {:?}", start.elapsed());
    }
    // Other clients of this address, and probes, are not affected.
    assert!(timed_get(gateway.admin, "/live").1 < PROBE_TIMEOUT);
    let (status, duration) = timed("Bearer right-token");
    assert!(status == 200 && duration >= Duration::from_millis(1_500), "{status} {duration:?}");
    let (status, duration) = timed("Bearer right-token");
    assert!(status == 200 && duration < PROBE_TIMEOUT, "{status} {duration:?}");
    let count = |reason: &str| gateway.metric(&format!("tidegate_admin_rejections_total{{reason=\"{reason}\"}}"));
    assert_eq!((count("wrong_token"), count("no_token"), count("throttled")), (5.0, 20.0, 0.0));
    let events = gateway.process.stderr.events("admin_token_rejected");
    assert_eq!(events.first().map(|event| event["address"].as_str()), Some(Some("127.0.0.1")), "{events:?}");
}

/// Concurrent guesses are not checked faster, and hold none of the room for others.
#[test]
fn concurrent_wrong_tokens_are_refused_and_keep_nobody_out() {
    let gateway = gateway("token = \"right-token\"");
    let start = Instant::now();
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let guess = |number: usize| {
            scope.spawn({
                let gateway = &gateway;
                move || status_with_token(gateway, &format!("Bearer {number}"))
            })
        };
        let guesses: Vec<_> = (0..48).map(guess).collect();
        wait_for(|| gateway.metric("tidegate_admin_rejections_total{reason=\"wrong_token\"}") >= 3.0, STEP_TIMEOUT);
        for target in ["/live", "/ready", "/metrics"] {
            let (status, duration) = timed_get(gateway.admin, target);
            assert!(status == 200 && duration < PROBE_TIMEOUT, "{target} {status} {duration:?}");
        }
        guesses.into_iter().map(|guess| guess.join().expect("a response")).collect()
    });
    assert!(statuses.iter().all(|status| [401, 429].contains(status)), "{statuses:?}");
    let checked = statuses.iter().filter(|status| **status == 401).count();
    // Two checks are 100 ms apart at least, however late the threads of a busy machine start.
    let most = 1 + usize::try_from(start.elapsed().as_millis()).expect("a few seconds") / 100;
    assert!(checked <= most && checked < statuses.len(), "{checked} of {most}: {statuses:?}");
    let refused = Client::connect(gateway.admin);
    drop(refused);
}

fn purge_with(gateway: &Gateway, fields: &[(&str, &str)]) -> u16 {
    let host: &[(&str, &str)] =
        if fields.iter().any(|(name, _)| *name == "host") { &[] } else { &[("host", "localhost")] };
    Client::connect(gateway.admin).request("POST", "/api/v1/purge?all=true", &[host, fields].concat(), b"").status
}

/// A page of another origin purges nothing and overrides nothing, with a token or without. Programs
/// send no `Origin`.
#[test]
fn foreign_web_pages_are_refused() {
    let own = format!("localhost:{}", free_address().port());
    for token in ["", "token = \"t\""] {
        let gateway = gateway(&format!("{token}\n"));
        let address = gateway.admin.to_string();
        let authorization: &[(&str, &str)] = if token.is_empty() { &[] } else { &[("authorization", "Bearer t")] };
        let purge = |fields: &[(&str, &str)]| purge_with(&gateway, &[fields, authorization].concat());
        for origin in [
            "http://evil.example",
            "https://evil.example",
            "null",
            "",
            "http://localhost:1",
            "http://127.0.0.1",
            "http://localhost.evil.example",
            "http://evil.example#localhost",
            "file://",
            "localhost",
        ] {
            assert_eq!(purge(&[("origin", origin)]), 403, "{origin}");
        }
        assert_eq!(purge(&[("origin", "http://localhost"), ("origin", "http://evil.example")]), 403);
        for site in ["cross-site", "same-site", "x"] {
            assert_eq!(purge(&[("sec-fetch-site", site), ("origin", "http://localhost")]), 403, "{site}");
        }
        assert_eq!(purge(&[]), 200);
        assert_eq!(purge(&[("origin", "http://localhost")]), 200);
        assert_eq!(purge(&[("origin", "http://LOCALHOST:80"), ("sec-fetch-site", "same-origin")]), 200);
        let own_origin = format!("http://{address}");
        assert_eq!(purge(&[("host", &address), ("origin", &own_origin)]), 200);
        assert_eq!(purge(&[("host", &own), ("origin", &format!("http://{own}"))]), 200);
        for (method, target) in [("POST", "/api/v1/limits/x?mode=off&for=1m"), ("DELETE", "/api/v1/limits/x")] {
            let fields = [&[("host", "localhost"), ("origin", "http://evil.example")][..], authorization].concat();
            assert_eq!(Client::connect(gateway.admin).request(method, target, &fields, b"").status, 403, "{method}");
        }
        let mut command = tidegate();
        command.args(["purge", "--all", "--admin", &address]);
        if !token.is_empty() {
            command.env("ADMIN_TOKEN", "t");
        }
        let output: Output = command.output().expect("the command runs");
        assert!(output.status.success(), "{output:?}");
    }
}

/// Without a token, a name that was made to resolve to loopback reads and changes nothing. With a
/// token, any host is served.
#[test]
fn rebound_names_are_refused_without_a_token() {
    let without = gateway("");
    let get = |gateway: &Gateway, target: &str, host: &str| {
        Client::connect(gateway.admin).get(target, &[("host", host), ("authorization", "Bearer t")]).status
    };
    for host in ["evil.example", "evil.example:9900", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.1"] {
        for target in ["/api/v1/status", "/api/v1/tasks", "/metrics", "/"] {
            assert_eq!(get(&without, target, host), 403, "{host} {target}");
        }
        assert_eq!(purge_with(&without, &[("host", host), ("origin", &format!("http://{host}"))]), 403, "{host}");
        assert_eq!((get(&without, "/live", host), get(&without, "/ready", host)), (200, 200), "{host}");
    }
    let address = without.admin.to_string();
    for host in [&*address, "localhost", "localhost:9900", "LOCALHOST", "localhost.", "gate.localhost", "[::1]:9900"] {
        for target in ["/api/v1/status", "/metrics", "/"] {
            assert_eq!(get(&without, target, host), 200, "{host} {target}");
        }
    }
    let with = gateway("token = \"t\"");
    for target in ["/api/v1/status", "/metrics", "/"] {
        assert_eq!(get(&with, target, "admin.example"), 200, "{target}");
    }
}

/// A reader that closes its half or sends more requests than one keeps its responses.
#[test]
fn pipelined_requests_are_answered_in_order() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let mut socket = socket(gateway.admin);
    socket
        .write_all(b"GET /live HTTP/1.1\r\nHost: a\r\n\r\nGET /ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .expect("open");
    let mut text = String::new();
    socket.read_to_string(&mut text).expect("two responses");
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2, "{text}");
    assert!(text.find("live\n") < text.find("\"ready\":true"), "{text}");
}

/// The responses of the admin API have the content types that docs/operations.md states.
#[test]
fn errors_are_text_and_results_are_json() {
    let (open, with) = (gateway(""), gateway("token = \"0123456789abcdef\"\n"));
    for (gateway, method, target, host, status) in [
        (&open, "GET", "/api/v1/status", "localhost", 200),
        (&open, "POST", "/api/v1/purge?tag=a", "localhost", 200),
        (&open, "POST", "/api/v1/purge", "localhost", 400),
        (&with, "GET", "/api/v1/status", "localhost", 401),
        (&open, "GET", "/api/v1/status", "other.example", 403),
        (&open, "GET", "/api/v1/nothing", "localhost", 404),
        (&open, "PUT", "/api/v1/status", "localhost", 405),
    ] {
        let response = Client::connect(gateway.admin).request(method, target, &[("host", host)], b"");
        let kind = if status == 200 { "application/json" } else { "text/plain; charset=utf-8" };
        assert_eq!((response.status, response.field("content-type")), (status, Some(kind)), "{method} {target}");
        assert!(status == 200 || response.text().trim().lines().count() == 1, "{}", response.text());
    }
}

/// Of two values of one parameter, the last one would apply: the operator meant one of them.
#[test]
fn repeated_parameters_are_refused() {
    let gateway = gateway("");
    for (method, target) in [
        ("POST", "/api/v1/purge?tag=a&soft=true&soft=false"),
        ("GET", "/api/v1/limits/explain?ip=192.0.2.1&ip=192.0.2.2"),
        ("GET", "/api/v1/breakers?from=0&from=100"),
    ] {
        let response = Client::connect(gateway.admin).request(method, target, &[("host", "localhost")], b"");
        assert_eq!(response.status, 400, "{target}");
        assert!(response.text().contains("is given twice"), "{target}: {}", response.text());
    }
    let purged =
        Client::connect(gateway.admin).request("POST", "/api/v1/purge?tag=a&tag=b", &[("host", "localhost")], b"");
    assert_eq!(purged.status, 200, "a purge has several targets");
}

#[test]
fn status_lists_a_bounded_number_of_routes() {
    let origin = Origin::start(|_| Script::reply(500, &[], ""));
    let route = |index: usize| {
        let upstream = if index == 5 { "bad" } else { "shop" };
        format!(
            "[[routes]]\nname = \"r{index}\"\nmatch = {{ path = \"/{index}\" }}\nupstream = \"{upstream}\"\n\
             cache = {{ mode = \"off\" }}\n"
        )
    };
    let upstreams = format!(
        "[upstreams.shop]\nendpoints = [\"http://{0}\"]\n[upstreams.bad]\nendpoints = [\"http://{0}\"]\n\
         breaker = {{ minimum = 5, open = \"1m\" }}\n",
        origin.address
    );
    let gateway = Gateway::start(&format!("{upstreams}{}", (0..250).map(route).collect::<String>()));
    let status = || serde_json::from_str::<serde_json::Value>(&gateway.admin("/api/v1/status").text()).expect("JSON");
    let names = |status: &serde_json::Value| -> Vec<String> {
        let routes = status["routes"].as_array().expect("a list");
        routes.iter().map(|route| route["name"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let quiet = status();
    assert_eq!((names(&quiet).len(), &quiet["routes_hidden"]), (200, &50.into()));
    // In the order in which they are matched.
    assert_eq!(names(&quiet)[..3], ["r100", "r101", "r102"]);
    let mut client = gateway.connect();
    for _ in 0..20 {
        client.get("/5", &[]);
    }
    let open = status();
    assert_eq!((names(&open).len(), &open["routes_hidden"], names(&open)[199].as_str()), (200, &50.into(), "r5"));
    assert_eq!(open["routes"][199]["breaker"], "open");
}
