//! Limits as seen by clients: which requests share a counter, which are denied, and the content and
//! cost of a denial.
//!
//! Refill rates are so low that no token returns during a test; the burst is then exactly what is
//! admitted.

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use support::{
    Client, ClientResponse, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, free_address, one_route, tidegate, wait_for,
};

const DEVICE: &str = "[identity]\ndevice = [\"header:x-device\"]\n";
/// The client of the test is a trusted proxy.
const TRUSTING: &str = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-user\"\ntier = \"header:x-tier\"\n\
                        [tiers]\nplatinum = 3.2\n";

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "passed"))
}

/// A rule with a rate of one token per hour.
fn rule(name: &str, tier: &str, burst: u32) -> String {
    format!("[limits.{name}]\ntier = \"{tier}\"\nrate = \"1/h\"\nburst = {burst}\n")
}

/// One uncached route `/NAME/*` per entry, with the given keys.
fn routes(origin: SocketAddr, routes: &[(&str, &str)], rest: &str) -> String {
    let route = |(name, keys): &(&str, &str)| {
        format!(
            "[[routes]]\nname = \"{name}\"\nmatch = {{ path = \"/{name}/*\" }}\nupstream = \"origin\"\n\
             cache = {{ mode = \"off\" }}\n{keys}\n"
        )
    };
    let routes: String = routes.iter().map(route).collect();
    format!("[upstreams.origin]\nendpoints = [\"http://{origin}\"]\n{routes}{rest}")
}

/// A gateway with one route with these limits.
fn limited(origin: &Origin, limits: &str, rest: &str) -> Gateway {
    let route = format!("cache = {{ mode = \"off\" }}\nlimits = [{limits}]");
    Gateway::start(&one_route(origin.address, &route, rest))
}

/// Number of `count` requests with these fields that pass. All requests after the first denial must
/// be denied.
#[track_caller]
fn passed(client: &mut Client, target: &str, fields: &[(&str, &str)], count: usize) -> usize {
    let statuses: Vec<u16> = (0..count).map(|_| client.get(target, fields).status).collect();
    let passed = statuses.iter().take_while(|status| **status == 200).count();
    assert!(statuses[passed..].iter().all(|status| *status == 429), "{statuses:?}");
    passed
}

fn from(last: u8, gateway: &Gateway) -> Client {
    Client::connect_from(IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)), gateway.address)
}

// Counting.

#[test]
fn device_is_header_value_and_address() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &format!("{DEVICE}{}", rule("device", "device", 2)));
    let mut here = gateway.connect();
    assert_eq!(passed(&mut here, "/", &[("X-Device", "a")], 4), 2);
    assert_eq!(passed(&mut here, "/", &[("X-Device", "b")], 3), 2, "another device at this address");
    assert_eq!(passed(&mut here, "/", &[], 3), 2, "callers without a device id are one device");
    assert_eq!(
        passed(&mut gateway.connect(), "/", &[("x-device", "a")], 1),
        0,
        "another connection is the same device"
    );
    assert_eq!(passed(&mut from(2, &gateway), "/", &[("X-Device", "a")], 3), 2, "the same id at another address");
    assert_eq!(origin.count(), 8, "denied requests do not reach the origin");
}

#[test]
fn trusted_proxy_sets_address_and_ipv6_counts_by_64_prefix() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &format!("{TRUSTING}{}", rule("device", "device", 2)));
    let mut proxy = gateway.connect();
    let mut of = |chain: &str| passed(&mut proxy, "/", &[("X-Forwarded-For", chain)], 3);
    assert_eq!((of("198.51.100.1"), of("198.51.100.2"), of("198.51.100.1")), (2, 2, 0));
    assert_eq!(of("9.9.9.9, 198.51.100.2, 127.0.0.9"), 0, "addresses left of the client's own are ignored");
    assert_eq!((of("2001:db8::1"), of("2001:db8::ffff:2"), of("2001:db8:0:1::1")), (2, 0, 2));
}

/// A proxy that writes one field forwards a client's own line of the other.
#[test]
fn client_lines_of_forwarding_fields_are_ignored() {
    let origin = origin();
    for (setting, written, added) in [
        ("", ("X-Forwarded-For", ""), ("Forwarded", "for=")),
        ("forwarded_field = \"x-forwarded-for\"\n", ("X-Forwarded-For", ""), ("Forwarded", "for=")),
        ("forwarded_field = \"forwarded\"\n", ("Forwarded", "for="), ("X-Forwarded-For", "")),
    ] {
        let identity = format!("[identity]\n{setting}trusted_proxies = [\"127.0.0.0/8\"]\n");
        let gateway = limited(&origin, "\"device\"", &format!("{identity}{}", rule("device", "device", 2)));
        let mut proxy = gateway.connect();
        let mut of = |address: &str, made_up: usize| {
            let (address, claim) = (format!("{}{address}", written.1), format!("{}192.0.2.{made_up}", added.1));
            passed(&mut proxy, "/", &[(written.0, &address), (added.0, &claim)], 1)
        };
        assert_eq!((0..9).map(|made_up| of("198.51.100.1", made_up)).sum::<usize>(), 2, "{setting}");
        assert_eq!(of("198.51.100.2", 1), 1, "{setting}");
        // The element that the proxy appends counts, whatever the client's own line contains.
        for claim in ["192.0.2.66", "[192.0.2.66]\"", "192.0.2.66:\"", "\"", "x;by=\""] {
            assert_eq!(of(&format!("{claim}, {}198.51.100.1", written.1), 1), 0, "{setting} {claim}");
        }
        assert_eq!(of("198.51.100.3", 1), 1, "{setting}");
        let got = origin.last();
        assert_eq!(got.field("x-forwarded-for"), Some("198.51.100.3, 127.0.0.1"), "{setting}");
        assert_eq!(got.field("forwarded"), None, "{setting}");
    }
}

#[test]
fn user_limits_span_addresses_and_are_weighted_by_class() {
    let origin = origin();
    let gateway = limited(&origin, "\"user\"", &format!("{TRUSTING}anonymous = 0.5\n{}", rule("user", "user", 5)));
    let mut proxy = gateway.connect();
    let mut of = |user: &str, tier: &str, address: &str| {
        passed(&mut proxy, "/", &[("X-User", user), ("X-Tier", tier), ("X-Forwarded-For", address)], 20)
    };
    assert_eq!(of("ann", "platinum", "198.51.100.1"), 16, "3.2 times the burst");
    assert_eq!(of("ann", "platinum", "198.51.100.2"), 0, "the same user at another address");
    assert_eq!((of("bob", "standard", "198.51.100.1"), of("cid", "unheard-of", "198.51.100.1")), (5, 5));
    // Without a user, the user rule does not apply.
    assert_eq!(passed(&mut proxy, "/", &[("X-Tier", "platinum")], 30), 30);
}

#[test]
fn weights_apply_to_device_but_not_to_shared_rules() {
    let origin = origin();
    let rules = format!("{TRUSTING}anonymous = 0.5\n{}{}", rule("device", "device", 10), rule("node", "node", 10));
    let gateway = Gateway::start(&routes(
        origin.address,
        &[("a", "limits = [\"device\"]"), ("b", "limits = [\"node\"]")],
        &rules,
    ));
    let mut proxy = gateway.connect();
    let platinum = [("X-User", "ann"), ("X-Tier", "platinum"), ("X-Forwarded-For", "198.51.100.1")];
    assert_eq!(passed(&mut proxy, "/a/", &platinum, 40), 32);
    assert_eq!(passed(&mut proxy, "/a/", &[("X-Forwarded-For", "198.51.100.2"), ("X-Tier", "platinum")], 40), 5);
    assert_eq!(passed(&mut proxy, "/b/", &platinum, 40), 10);
}

#[test]
fn identity_fields_of_untrusted_peers_are_ignored() {
    let origin = origin();
    let identity = TRUSTING.replace("127.0.0.0/8", "127.0.0.1/32");
    let rules = format!("{identity}{}{}", rule("device", "device", 3), rule("user", "user", 1));
    let gateway = limited(&origin, "\"device\", \"user\"", &rules);
    let mut untrusted = from(3, &gateway);
    let claims = |number: usize| format!("198.51.100.{number}");
    let statuses = (0..5).map(|number| {
        let (address, forwarded) = (claims(number), format!("for={}", claims(number)));
        let fields =
            [("X-User", "ann"), ("X-Tier", "platinum"), ("X-Forwarded-For", &*address), ("Forwarded", &forwarded)];
        untrusted.get("/", &fields).status
    });
    assert_eq!(statuses.collect::<Vec<_>>(), [200, 200, 200, 429, 429], "one device, no user, default class");
    for request in origin.requests() {
        assert!(request.field("x-user").is_none() && request.field("x-tier").is_none(), "{request:?}");
        assert_eq!(request.field("x-forwarded-for"), Some("127.0.0.3"));
    }
    // The user ann, through the proxy, was not charged.
    let fields = [("X-User", "ann"), ("X-Forwarded-For", "198.51.100.9")];
    assert_eq!(passed(&mut gateway.connect(), "/", &fields, 2), 1);
}

#[test]
fn node_limit_is_shared_by_all_clients() {
    let origin = origin();
    let gateway = limited(&origin, "\"node\"", &format!("{DEVICE}{}", rule("node", "node", 5)));
    let of = |last: u8| passed(&mut from(last, &gateway), "/", &[("X-Device", &last.to_string())], 2);
    assert_eq!([of(2), of(3), of(4), of(5)], [2, 2, 1, 0]);
    assert_eq!(origin.count(), 5);
}

#[test]
fn concurrent_connections_get_exactly_the_burst() {
    let origin = origin();
    let rules = format!("{DEVICE}{}{}", rule("device", "device", 17), rule("node", "node", 40));
    let gateway = limited(&origin, "\"device\", \"node\"", &rules);
    let concurrently = |device: &str| -> usize {
        std::thread::scope(|scope| {
            let one = || (0..10).filter(|_| gateway.get("/", &[("X-Device", device)]).status == 200).count();
            let clients: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
            clients.into_iter().map(|client| client.join().expect("no panic")).sum()
        })
    };
    assert_eq!(["a", "b", "c"].map(concurrently), [17, 17, 6]);
    assert_eq!(origin.count(), 40);
}

// Cost.

#[test]
fn denial_by_one_rule_charges_no_other() {
    let origin = origin();
    for (tight, wide) in [("node", "device"), ("device", "node")] {
        let rules = format!("{}{}", rule("tight", tight, 1), rule("wide", wide, 3));
        let both = [("both", "limits = [\"wide\", \"tight\"]"), ("wide", "limits = [\"wide\"]")];
        let gateway = Gateway::start(&routes(origin.address, &both, &rules));
        let mut client = gateway.connect();
        assert_eq!(passed(&mut client, "/both/", &[], 20), 1, "the burst of the {tight} rule");
        assert_eq!(
            passed(&mut client, "/wide/", &[], 4),
            2,
            "19 denials by the {tight} rule do not charge the {wide} rule"
        );
    }
}

#[test]
fn route_cost_is_charged_in_full_or_not_at_all() {
    let origin = origin();
    let costly = [("costly", "limits = [\"device\"]\ncost = 3"), ("cheap", "limits = [\"device\"]")];
    let gateway = Gateway::start(&routes(origin.address, &costly, &rule("device", "device", 7)));
    let mut client = gateway.connect();
    assert_eq!(limit_status(&client.get("/costly/", &[])).remaining, 4);
    assert_eq!(limit_status(&client.get("/costly/", &[])).remaining, 1);
    let denied = client.get("/costly/", &[]);
    assert_eq!((denied.status, limit_status(&denied).remaining), (429, 1));
    assert!(is_about(retry_after(&denied), 2 * HOUR), "two tokens are missing: {denied:?}");
    assert_eq!(passed(&mut client, "/cheap/", &[], 3), 1);
    // A cost above the burst is a configuration error.
    let dir = TempDir::new();
    let config = routes(origin.address, &costly, &rule("device", "device", 2));
    let file = dir.write("costly.toml", &format!("version = 1\n{config}"));
    let output = tidegate().arg("check").arg(file).output().expect("the command runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && stderr.contains("costly.toml:") && stderr.contains("cost"), "{stderr}");
}

#[test]
fn cache_hit_is_charged_and_carries_current_limit_status() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=600")], "stored"));
    let gateway = Gateway::start(&one_route(origin.address, "limits = [\"device\"]", &rule("device", "device", 3)));
    let mut client = gateway.connect();
    let responses = [(); 4].map(|()| client.get("/", &[]));
    assert_eq!(responses.each_ref().map(|response| response.status), [200, 200, 200, 429]);
    assert_eq!(responses.each_ref().map(|response| limit_status(response).remaining), [2, 1, 0, 0]);
    assert!(responses[1].is_hit() && responses[2].is_hit() && origin.count() == 1);
    assert_eq!(
        responses[3].cache_status(),
        "tidegate; detail=limited",
        "a denial is not replaced by the cached response"
    );
}

#[test]
fn tokens_refill_at_the_rate_despite_denied_requests() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", "[limits.device]\ntier = \"device\"\nrate = \"5/s\"\nburst = 1\n");
    let mut client = gateway.connect();
    let start = Instant::now();
    let mut pass = || wait_for(|| client.get("/", &[]).status == 200, STEP_TIMEOUT);
    (0..4).for_each(|_| pass());
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(600), "three tokens at 5/s arrived in {elapsed:?}");
    assert_eq!(origin.count(), 4);
}

// Content of a denial.

const HOUR: u64 = 3600;

/// Rate limit status of a response, from its two fields.
#[derive(Debug, PartialEq)]
struct RateLimitFields {
    rule: String,
    burst: u64,
    window: u64,
    remaining: u64,
    reset: u64,
}

/// Parses one item of a structured list (RFC 9651): a string without escapes, and these integer
/// parameters.
fn item<const N: usize>(text: &str, names: [&str; N]) -> Option<(String, [u64; N])> {
    let (name, mut rest) = text.strip_prefix('"')?.split_once('"')?;
    let mut values = [0; N];
    for (value, name) in values.iter_mut().zip(names) {
        rest = rest.strip_prefix(';')?.trim_start_matches(' ').strip_prefix(name)?.strip_prefix('=')?;
        let digits = rest.find(|it: char| !it.is_ascii_digit()).unwrap_or(rest.len());
        *value = rest[..digits].parse().ok().filter(|_| digits <= 15)?;
        rest = &rest[digits..];
    }
    rest.is_empty().then(|| (name.to_owned(), values))
}

/// draft-ietf-httpapi-ratelimit-headers-10: `q` is the quota and `w` its window in seconds, `r` the
/// remaining quota and `t` the seconds until the quota is restored.
#[track_caller]
fn limit_status(response: &ClientResponse) -> RateLimitFields {
    let (policy, limit) = (response.all("ratelimit-policy"), response.all("ratelimit"));
    assert!(policy.len() == 1 && limit.len() == 1, "{response:?}");
    let (rule, [burst, window]) = item(policy[0], ["q", "w"]).unwrap_or_else(|| panic!("{}", policy[0]));
    let (named, [remaining, reset]) = item(limit[0], ["r", "t"]).unwrap_or_else(|| panic!("{}", limit[0]));
    assert_eq!(rule, named, "both fields name the same rule");
    RateLimitFields { rule, burst, window, remaining, reset }
}

#[track_caller]
fn retry_after(response: &ClientResponse) -> u64 {
    let lines = response.all("retry-after");
    lines
        .first()
        .filter(|_| lines.len() == 1)
        .and_then(|line| line.parse().ok())
        .unwrap_or_else(|| panic!("{response:?}"))
}

/// Allows for the time that the test takes.
fn is_about(seconds: u64, expected: u64) -> bool {
    (expected - 60..=expected).contains(&seconds)
}

#[test]
fn responses_carry_limit_status_and_denials_retry_after() {
    let origin = origin();
    let gateway = limited(&origin, "\"per.device_1-a\"", &rule("\"per.device_1-a\"", "device", 2));
    let mut client = gateway.connect();
    for (status, remaining, reset) in [(200, 1, HOUR), (200, 0, 2 * HOUR), (429, 0, 2 * HOUR)] {
        let response = client.get("/", &[]);
        let status_fields = limit_status(&response);
        assert_eq!(response.status, status);
        assert!(is_about(status_fields.reset, reset), "{status_fields:?}");
        let rule = "per.device_1-a".to_owned();
        assert_eq!(
            status_fields,
            RateLimitFields { rule, burst: 2, window: 2 * HOUR, remaining, reset: status_fields.reset }
        );
        match status {
            200 => assert!(response.field("retry-after").is_none(), "{response:?}"),
            _ => assert!(is_about(retry_after(&response), HOUR), "{response:?}"),
        }
    }
}

#[test]
fn headers_show_weighted_quota_of_tightest_rule_and_longest_wait() {
    let origin = origin();
    let slow = "[limits.slow]\ntier = \"user\"\nrate = \"1/d\"\nburst = 5\n";
    let rules = format!("{TRUSTING}{}{slow}", rule("device", "device", 10));
    let gateway = limited(&origin, "\"slow\", \"device\"", &rules);
    let mut proxy = gateway.connect();
    let anonymous = limit_status(&proxy.get("/", &[("X-Forwarded-For", "198.51.100.1")]));
    assert_eq!((&*anonymous.rule, anonymous.burst, anonymous.remaining), ("device", 10, 9));
    let ann = [("X-User", "ann"), ("X-Tier", "platinum")];
    let first = limit_status(&proxy.get("/", &ann));
    assert_eq!((&*first.rule, first.burst, first.window, first.remaining), ("slow", 16, 5 * 24 * HOUR, 15));
    assert_eq!(passed(&mut proxy, "/", &ann, 16), 15);
    let denied = proxy.get("/", &ann);
    // 3.2 tokens a day.
    assert!(limit_status(&denied).rule == "slow" && is_about(retry_after(&denied), 27_000), "{denied:?}");
}

#[test]
fn denial_format_follows_accept_and_is_never_stored() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &rule("device", "device", 1));
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).status, 200);
    for accept in ["application/json", "*/*", "text/html;q=0.1, application/problem+json"] {
        let response = client.get("/", &[("Accept", accept)]);
        assert_eq!(
            (response.status, response.field("content-type")),
            (429, Some("application/problem+json")),
            "{accept}"
        );
        let problem: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
        assert_eq!((&problem["status"], &problem["title"]), (&429.into(), &"Too Many Requests".into()));
        assert_eq!((&problem["type"], &problem["reason"]), (&"about:blank".into(), &"limited".into()));
    }
    let browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
    let page = client.get("/", &[("Accept", browser)]);
    assert_eq!((page.status, page.field("content-type")), (429, Some("text/html; charset=utf-8")));
    assert!(page.text().starts_with("<!doctype html>") && page.text().contains("Too Many Requests"), "{}", page.text());
    let head = client.request("HEAD", "/", &[("Accept", browser)], b"");
    assert_eq!((head.status, head.field("content-length")), (429, page.field("content-length")));
    for response in [page, head] {
        assert_eq!(response.field("cache-control"), Some("no-store"));
        assert!(response.field("retry-after").is_some() && response.field("proxy-status").is_none(), "{response:?}");
    }
    assert_eq!(origin.count(), 1);
}

#[test]
fn denials_are_identical_for_all_request_forms() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &rule("device", "device", 1));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let lines = |response: &ClientResponse| {
        let is_compared =
            |(name, _): &&(String, String)| !["connection", "date"].contains(&name.to_lowercase().as_str());
        response.fields.iter().filter(is_compared).cloned().collect::<Vec<_>>()
    };
    // Each response has an id of its own.
    let without_id =
        |text: String, response: &ClientResponse| text.replace(response.field("x-request-id").expect("an id"), "ID");
    let lines = |response: &ClientResponse| without_id(format!("{:?}", lines(response)), response);
    let text = |response: &ClientResponse| without_id(response.text(), response);
    let first = gateway.get("/", &[]);
    assert!(first.fields.len() > 7 && first.text().ends_with("\"reason\":\"limited\"}\n"), "{first:?}");
    // Repeated and different requests on one connection, and the last one before its close.
    let mut client = gateway.connect();
    for (method, line, rest, connection) in [
        ("GET", "/ HTTP/1.1", "", None),
        ("GET", "/ HTTP/1.1", "", None),
        ("GET", "/other?x=y HTTP/1.1", "", None),
        ("HEAD", "/ HTTP/1.1", "", None),
        ("GET", "/ HTTP/1.0", "Connection: keep-alive\r\n", Some("keep-alive")),
        ("GET", "/ HTTP/1.1", "", None),
        ("GET", "/ HTTP/1.1", "Connection: close\r\n", Some("close")),
    ] {
        client.send(format!("{method} {line}\r\nHost: gate\r\n{rest}\r\n"));
        let response = client.read_response_to(method);
        assert_eq!((response.status, lines(&response)), (429, lines(&first)), "{method} {line} {rest}");
        assert_eq!(response.field("connection"), connection, "{method} {line} {rest}");
        assert_eq!(text(&response), if method == "HEAD" { String::new() } else { text(&first) });
    }
    assert!(client.is_closed_within(STEP_TIMEOUT));
    assert_eq!(origin.count(), 1);
}

#[test]
fn denied_request_body_is_neither_requested_nor_parsed_as_a_request() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &rule("device", "device", 1));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let mut waiting = gateway.connect();
    waiting.send("POST /asks HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(waiting.read_response_to("POST").status, 429, "no 100 before it");
    let mut sending = gateway.connect();
    let body = b"GET /inside HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(sending.request("POST", "/sends", &[], body).status, 429);
    // Either the connection closes or the body was read. The body must not be parsed as a request.
    sending.try_send(b"GET /after HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").ok();
    let rest = String::from_utf8_lossy(&sending.read_to_end()).into_owned();
    assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 429 ") && rest.matches("HTTP/1.1 ").count() == 1, "{rest}");
    assert_eq!(origin.requests().iter().map(|request| &*request.target).collect::<Vec<_>>(), ["/"]);
}

// Rules that do not deny.

#[test]
fn shadow_rule_admits_sends_no_headers_and_counts() {
    let origin = origin();
    let shadow = format!("{}mode = \"shadow\"\n", rule("shadow", "device", 1));
    let gateway = limited(&origin, "\"shadow\"", &shadow);
    let mut client = gateway.connect();
    for _ in 0..4 {
        let response = client.get("/", &[]);
        assert_eq!(
            (response.status, response.field("ratelimit"), response.field("ratelimit-policy")),
            (200, None, None)
        );
    }
    assert_eq!((decisions(&gateway, "allowed"), decisions(&gateway, "shadow_denied")), (1.0, 3.0));
    assert_eq!((decisions(&gateway, "denied"), origin.count()), (0.0, 4));
}

#[test]
fn shadow_rule_does_not_affect_enforced_rule() {
    let origin = origin();
    let shadow = format!("{}mode = \"shadow\"\n{}", rule("shadow", "device", 1), rule("device", "device", 3));
    let gateway = limited(&origin, "\"shadow\", \"device\"", &shadow);
    let mut client = gateway.connect();
    assert_eq!(limit_status(&client.get("/", &[])).rule, "device");
    assert_eq!(passed(&mut client, "/", &[], 4), 2);
}

#[test]
fn disabled_rule_has_no_effect() {
    let origin = origin();
    let off = format!("{}mode = \"off\"\n", rule("off", "device", 1));
    let gateway = limited(&origin, "\"off\"", &off);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/", &[], 5), 5);
    assert!(client.get("/", &[]).field("ratelimit").is_none());
    assert_eq!(["allowed", "denied", "shadow_denied"].map(|decision| decisions(&gateway, decision)), [0.0; 3]);
}

#[test]
fn percentage_selects_the_same_devices_on_every_node() {
    let origin = origin();
    let start = |percent: u32| {
        let secret = "secret = \"the same on every node\"\n";
        let rules = format!("{DEVICE}{secret}{}percent = {percent}\n", rule("some", "device", 1));
        limited(&origin, "\"some\"", &rules)
    };
    let limited_on = |gateway: &Gateway| -> Vec<bool> {
        let mut client = gateway.connect();
        let device = |number: u32| passed(&mut client, "/", &[("X-Device", &number.to_string())], 2) == 1;
        (0..100).map(device).collect()
    };
    let [none, some, again, all] = [0, 40, 40, 100].map(|percent| limited_on(&start(percent)));
    assert!(none.iter().all(|limited| !limited) && all.iter().all(|limited| *limited));
    let count = some.iter().filter(|limited| **limited).count();
    assert!((20..=60).contains(&count), "{count} of 100");
    assert_eq!(some, again);
}

/// The hash of a device is not the same in every process: a device id that shares the bucket of
/// another client cannot be computed from the program.
#[test]
fn without_a_secret_each_process_hashes_devices_differently() {
    let origin = origin();
    let limited_on = || -> Vec<bool> {
        let gateway = limited(&origin, "\"some\"", &format!("{DEVICE}{}percent = 50\n", rule("some", "device", 1)));
        let mut client = gateway.connect();
        (0..100).map(|number: u32| passed(&mut client, "/", &[("X-Device", &number.to_string())], 2) == 1).collect()
    };
    assert_ne!(limited_on(), limited_on());
}

// Cluster rules without Redis.

/// Configuration with an unreachable Redis and a fleet of four.
fn unreachable_redis() -> String {
    format!("[redis]\nnodes = 4\n[redis.regions.default]\nendpoints = [\"redis://{}\"]\n", free_address())
}

#[test]
fn cluster_limit_without_redis_is_local() {
    let origin = origin();
    let gateway = limited(&origin, "\"fleet\"", &rule("fleet", "cluster", 6));
    let of = |last: u8| passed(&mut from(last, &gateway), "/", &[], 4);
    assert_eq!([of(2), of(3), of(4)], [4, 2, 0]);
    let denied = gateway.get("/", &[]);
    assert_eq!((&*limit_status(&denied).rule, limit_status(&denied).burst), ("fleet", 6));
    // A lease counts in whole millionths of a token per second, rounded down: 277 instead of 277.8.
    assert!(is_about(retry_after(&denied), HOUR + HOUR / 300), "{denied:?}");
    assert_eq!(gateway.metric("tidegate_limit_local_fallback{rule=\"fleet\"}"), 1.0);
}

#[test]
fn cluster_limit_without_redis_is_divided_by_fleet_size() {
    let origin = origin();
    let fleet = format!("{}[redis]\nnodes = 3\n", rule("fleet", "cluster", 12));
    let gateway = limited(&origin, "\"fleet\"", &fleet);
    assert_eq!(passed(&mut gateway.connect(), "/", &[], 12), 4);
}

#[test]
fn cluster_limit_with_unreachable_redis_runs_on_local_fallback() {
    let origin = origin();
    let start = Instant::now();
    let fleet = "[limits.fleet]\ntier = \"cluster\"\nrate = \"40/s\"\nburst = 80\n";
    let gateway = limited(&origin, "\"fleet\"", &format!("{fleet}{}", unreachable_redis()));
    let mut client = gateway.connect();
    wait_for(|| client.get("/", &[]).status == 200, STEP_TIMEOUT);
    let first = Instant::now();
    (0..12).for_each(|_| wait_for(|| client.get("/", &[]).status == 200, STEP_TIMEOUT));
    // 0.8 of a quarter of 40/s, from an empty bucket: 8/s.
    assert!(start.elapsed() >= Duration::from_millis(13 * 125 - 5), "{:?}", start.elapsed());
    assert!(first.elapsed() < Duration::from_millis(12 * 125 * 2), "{:?}", first.elapsed());
    assert_eq!(gateway.metric("tidegate_limit_local_fallback{rule=\"fleet\"}"), 1.0);
    let is_fallback_event =
        |line: &str| line.contains("\"limit_local_fallback\"") && line.contains("\"rule\":\"fleet\"");
    assert!(gateway.process.stderr.find(STEP_TIMEOUT, is_fallback_event).is_some());
}

#[test]
fn burst_too_small_for_the_fleet_is_a_configuration_error() {
    let dir = TempDir::new();
    let config = one_route(
        free_address(),
        "limits = [\"fleet\"]",
        &format!("{}{}", rule("fleet", "cluster", 7), unreachable_redis()),
    );
    let file = dir.write("fleet.toml", &format!("version = 1\n{config}"));
    let output = tidegate().arg("check").arg(file).output().expect("the command runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1) && stderr.contains("fleet.toml:") && stderr.contains("at least 8"),
        "{stderr}"
    );
}

// Access log and metrics.

fn decisions(gateway: &Gateway, decision: &str) -> f64 {
    gateway.metric(&format!("tidegate_limit_decisions_total{{decision=\"{decision}\"}}"))
}

#[test]
fn denial_is_logged_with_its_rule_and_counted() {
    let origin = origin();
    let rules = format!("{}{}", rule("wide", "node", 9), rule("narrow", "device", 1));
    let gateway = limited(&origin, "\"wide\", \"narrow\"", &rules);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/shop?x=1", &[], 3), 1);
    let lines = gateway.access_log(3);
    let status_and_limit =
        |line: &serde_json::Value| (line["status"].as_u64(), line["limit"].as_str().map(str::to_owned));
    let denied = (Some(429), Some("narrow".to_owned()));
    assert_eq!(lines.iter().map(status_and_limit).collect::<Vec<_>>(), [(Some(200), None), denied.clone(), denied]);
    assert_eq!((&lines[1]["path"], &lines[1]["route"]), (&"/shop?x=1".into(), &"all".into()));
    assert_eq!((lines[0].get("blame"), &lines[1]["blame"]), (None, &"client".into()));
    assert!(lines[1].get("upstream").is_none() && lines[1].get("degraded").is_none(), "{}", lines[1]);
    assert_eq!((decisions(&gateway, "allowed"), decisions(&gateway, "denied")), (1.0, 2.0));
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"limited\"}"), 2.0);
    assert_eq!(gateway.metric("tidegate_route_responses_total{route=\"all\",status_class=\"4xx\"}"), 2.0);
    assert_eq!(gateway.metric("tidegate_route_degraded_total{route=\"all\"}"), 0.0);
}
