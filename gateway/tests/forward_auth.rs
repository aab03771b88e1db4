//! A verification service decides about the requests of a route: acceptances and the fields that
//! they add, denials as the service words them, answers that are kept, and services that fail.

mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use support::{Gateway, Origin, ReceivedRequest, Script};

/// An origin that reports the user that it was told.
fn origin() -> Origin {
    Origin::start(|request| {
        let users = request.all("x-user").join("|");
        Script::ok(&[("Cache-Control", "max-age=60")], format!("{} for {users}", request.target))
    })
}

/// A service that accepts the token `good`.
fn service() -> Origin {
    Origin::start(|request| match request.field("authorization") {
        Some("Bearer good") => Script::ok(&[("X-User", "ann"), ("X-Other", "not configured")], "welcome"),
        Some("Bearer kept") => Script::ok(&[("X-User", "bob"), ("Cache-Control", "max-age=60")], ""),
        Some("Bearer slow") => Script::new().hang(),
        Some("Bearer broken") => Script::reply(500, &[], "secret details"),
        Some(_) => Script::reply(403, &[("Content-Type", "text/plain")], "no such token"),
        None => Script::reply(
            302,
            &[("Location", "https://login.example/"), ("Set-Cookie", "state=1"), ("Keep-Alive", "x")],
            "",
        ),
    })
}

fn gateway(origin: SocketAddr, service: SocketAddr, route: &str) -> Gateway {
    Gateway::start(&format!(
        "[limits.node]\ntier = \"node\"\nrate = \"1/h\"\nburst = 12\n\
         [upstreams.origin]\nendpoints = [\"http://{origin}\"]\n\
         [[routes]]\nname = \"app\"\nmatch = {{ path = \"/*\" }}\nupstream = \"origin\"\nlimits = [\"node\"]\n\
         auth = {{ forward = \"http://{service}/verify?for=app\", headers = [\"x-user\"], user = \"x-user\", timeout = \"300ms\" }}\n{route}"
    ))
}

fn bearer(token: &str) -> (&'static str, String) {
    ("Authorization", format!("Bearer {token}"))
}

fn get(gateway: &Gateway, target: &str, token: &str, more: &[(&str, &str)]) -> support::ClientResponse {
    let (name, value) = bearer(token);
    gateway.get(target, &[&[(name, &*value)], more].concat())
}

#[test]
fn accepted_requests_carry_the_fields_of_the_answer() {
    let (origin, service) = (origin(), service());
    let gateway = gateway(origin.address, service.address, "headers.response.set = { x-seen = \"{user}\" }\n");
    let forged =
        [("X-User", "root"), ("If-None-Match", "\"a\""), ("Range", "bytes=0-1"), ("X-Forwarded-Method", "PUT")];
    let response = get(&gateway, "/a?b", "good", &forged[..1]);
    assert_eq!((response.status, response.text()), (200, "/a?b for ann".to_owned()));
    assert_eq!(response.field("x-seen"), Some("ann"));
    let posted = gateway.request("POST", "/post", &[("Authorization", "Bearer good")], b"body");
    assert_eq!(posted.text(), "/post for ann");
    get(&gateway, "/ranged", "good", &forged);
    let asked: Vec<ReceivedRequest> = service.requests();
    assert_eq!(asked.len(), 3, "an answer without `Cache-Control` is not kept");
    let field = |at: usize, name: &str| asked[at].field(name).unwrap_or("-").to_owned();
    assert_eq!((&*asked[0].method, &*asked[0].target), ("GET", "/verify?for=app"));
    assert_eq!((field(0, "x-forwarded-method"), field(0, "x-forwarded-uri")), ("GET".to_owned(), "/a?b".to_owned()));
    assert_eq!((field(1, "x-forwarded-method"), field(1, "content-length")), ("POST".to_owned(), "-".to_owned()));
    assert_eq!((field(0, "host"), field(0, "x-forwarded-host")), (service.address.to_string(), "gate.test".to_owned()));
    assert_eq!(["range", "if-none-match", "x-forwarded-method"].map(|name| field(2, name)), ["-", "-", "GET"]);
    // Responses to requests with credentials are not shared.
    assert!(!get(&gateway, "/a?b", "good", &[]).is_hit());
    assert_eq!(gateway.metric("tidegate_authentications_total{result=\"valid\"}"), 4.0);
}

#[test]
fn denials_are_those_of_the_service() {
    let (origin, service) = (origin(), service());
    let gateway = gateway(origin.address, service.address, "");
    let denied = get(&gateway, "/", "wrong", &[]);
    assert_eq!((denied.status, denied.text()), (403, "no such token".to_owned()));
    assert_eq!((denied.field("content-type"), denied.field("cache-control")), (Some("text/plain"), Some("no-store")));
    let login = gateway.get("/", &[]);
    assert_eq!((login.status, login.field("location")), (302, Some("https://login.example/")));
    assert_eq!((login.field("set-cookie"), login.field("keep-alive")), (Some("state=1"), None));
    assert_eq!(origin.count(), 0);
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"unauthorized\"}"), 1.0);
    assert_eq!(gateway.metric("tidegate_authentications_total{result=\"unknown\"}"), 2.0);
}

#[test]
fn answers_are_kept_as_they_say_and_for_the_same_request_only() {
    let (origin, service) = (origin(), service());
    let gateway = gateway(origin.address, service.address, "");
    let mut client = gateway.connect();
    let (name, token) = bearer("kept");
    for _ in 0..3 {
        // The same head on one connection.
        let response = client.get("/a", &[(name, &token), ("X-User", "root")]);
        assert_eq!(response.text(), "/a for bob");
    }
    for number in 1..3 {
        let (single, id) = (format!("{number:032x}-00000000000000a{number}-1"), format!("{number:032x}"));
        get(&gateway, "/a", "kept", &[("X-User", "root"), ("b3", &single)]);
        get(&gateway, "/a", "kept", &[("X-User", "root"), ("X-B3-TraceId", &id), ("X-B3-Sampled", "1")]);
    }
    assert_eq!(service.count(), 1, "a trace is of one request");
    get(&gateway, "/b", "kept", &[]);
    get(&gateway, "/a", "kept", &[("Cookie", "another=caller")]);
    assert_eq!(service.count(), 3, "another URL, another cookie");
    for _ in 0..2 {
        assert_eq!(get(&gateway, "/a", "wrong", &[]).status, 403);
    }
    assert_eq!(service.count(), 5, "denials are not kept");
}

#[test]
fn service_that_fails_lets_nothing_pass_and_limits_protect_it() {
    let (origin, service) = (origin(), service());
    let gateway = gateway(origin.address, service.address, "cache = { stale_if_error = \"1h\" }\n");
    let began = Instant::now();
    let slow = get(&gateway, "/", "slow", &[]);
    assert!(began.elapsed() < Duration::from_secs(5));
    let broken = get(&gateway, "/", "broken", &[]);
    for response in [slow, broken] {
        assert_eq!(response.status, 503);
        assert!(response.text().contains("\"reason\":\"verification_unavailable\""), "{}", response.text());
        assert_eq!(response.field("retry-after"), Some("1"));
    }
    assert_eq!(gateway.metric("tidegate_authentications_total{result=\"unavailable\"}"), 2.0);
    service.stop();
    assert_eq!(get(&gateway, "/", "good", &[]).status, 503);
    assert_eq!(origin.count(), 0);
    let asked = service.count();
    let limited = (0..20).filter(|_| get(&gateway, "/", "wrong", &[]).status == 429).count();
    assert!(limited >= 8 && service.count() == asked, "{limited} limited");
}

#[test]
fn faults_of_the_configuration_are_explained() {
    for (auth, expected) in [
        ("forward = \"127.0.0.1:4000\"", "scheme"),
        ("forward = \"h2c://127.0.0.1:4000/\"", "http or https"),
        ("forward = \"http://127.0.0.1:4000/#a\"", "not the URL of a service"),
        ("forward = \"http://127.0.0.1:4000/\", basic = \"users\"", "one of"),
        ("api_keys = \"keys\", headers = [\"x-user\"]", "`headers` applies to `forward` only"),
        ("forward = \"http://127.0.0.1:4000/\", realm = \"x\"", "no effect with `forward`"),
    ] {
        let config = format!(
            "version = 1\n[[listen]]\naddress = \"127.0.0.1:0\"\n[upstreams.a]\nendpoints = [\"http://127.0.0.1:1\"]\n\
             [[routes]]\nname = \"a\"\nmatch = {{ path = \"/*\" }}\nupstream = \"a\"\nauth = {{ {auth} }}\n"
        );
        let dir = support::TempDir::new();
        let path = dir.write("tidegate.toml", &config);
        let output = support::tidegate().arg("check").arg(path).output().expect("tidegate runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && text.contains(expected), "{auth}: {text}");
    }
}
