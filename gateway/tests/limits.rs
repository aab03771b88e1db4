//! Limits as clients meet them: who is counted together, who is denied, what a denial says and what it must not cost.
//!
//! Rates are so slow that nothing comes back while a test runs; a burst is then exactly what is admitted.

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use support::{Answer, Client, Dir, Gateway, Origin, PATIENCE, Script, free_address, one_route, tidegate, wait_for};

const DEVICE: &str = "[identity]\ndevice = [\"header:x-device\"]\n";
/// The test's client is a proxy that is believed.
const TRUSTING: &str = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-user\"\ntier = \"header:x-tier\"\n\
                        [tiers]\nplatinum = 3.2\n";

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "passed"))
}

/// A rule of one token an hour.
fn rule(name: &str, tier: &str, burst: u32) -> String {
    format!("[limits.{name}]\ntier = \"{tier}\"\nrate = \"1/h\"\nburst = {burst}\n")
}

/// A route for each of these, `/NAME/*` with these keys, without a cache.
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

/// A gateway with one route under these limits.
fn limited(origin: &Origin, limits: &str, rest: &str) -> Gateway {
    let route = format!("cache = {{ mode = \"off\" }}\nlimits = [{limits}]");
    Gateway::start(&one_route(origin.address, &route, rest))
}

/// How many of `count` requests with these fields pass; the others are denied, and those after the first denial too.
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

// Who is counted together.

#[test]
fn a_device_is_its_header_at_its_address() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &format!("{DEVICE}{}", rule("device", "device", 2)));
    let mut here = gateway.connect();
    assert_eq!(passed(&mut here, "/", &[("X-Device", "a")], 4), 2);
    assert_eq!(passed(&mut here, "/", &[("X-Device", "b")], 3), 2, "another device at this address");
    assert_eq!(passed(&mut here, "/", &[], 3), 2, "whoever names no device is one");
    assert_eq!(
        passed(&mut gateway.connect(), "/", &[("x-device", "a")], 1),
        0,
        "another connection is no other device"
    );
    assert_eq!(passed(&mut from(2, &gateway), "/", &[("X-Device", "a")], 3), 2, "the same name at another address");
    assert_eq!(origin.count(), 8, "the origin never hears of what was denied");
}

#[test]
fn a_trusted_proxy_names_the_address_and_an_ipv6_network_is_one() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &format!("{TRUSTING}{}", rule("device", "device", 2)));
    let mut proxy = gateway.connect();
    let mut of = |chain: &str| passed(&mut proxy, "/", &[("X-Forwarded-For", chain)], 3);
    assert_eq!((of("198.51.100.1"), of("198.51.100.2"), of("198.51.100.1")), (2, 2, 0));
    assert_eq!(of("9.9.9.9, 198.51.100.2, 127.0.0.9"), 0, "what a client wrote before its own address buys nothing");
    assert_eq!((of("2001:db8::1"), of("2001:db8::ffff:2"), of("2001:db8:0:1::1")), (2, 0, 2));
}

/// A proxy that writes one field passes a client's own line of the other on.
#[test]
fn a_client_cannot_add_to_what_a_trusted_proxy_writes() {
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
        // What it appends to a client's own line counts, whatever that line says.
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
fn users_are_limited_wherever_they_are_and_by_the_weight_of_their_tier() {
    let origin = origin();
    let gateway = limited(&origin, "\"user\"", &format!("{TRUSTING}anonymous = 0.5\n{}", rule("user", "user", 5)));
    let mut proxy = gateway.connect();
    let mut of = |user: &str, tier: &str, address: &str| {
        passed(&mut proxy, "/", &[("X-User", user), ("X-Tier", tier), ("X-Forwarded-For", address)], 20)
    };
    assert_eq!(of("ann", "platinum", "198.51.100.1"), 16, "3.2 times the burst");
    assert_eq!(of("ann", "platinum", "198.51.100.2"), 0, "the same user elsewhere");
    assert_eq!((of("bob", "standard", "198.51.100.1"), of("cid", "unheard-of", "198.51.100.1")), (5, 5));
    // Nobody is identified: a rule of users does not apply.
    assert_eq!(passed(&mut proxy, "/", &[("X-Tier", "platinum")], 30), 30);
}

#[test]
fn weights_hold_for_devices_too_and_not_for_what_all_share() {
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
fn identity_fields_of_strangers_are_ignored() {
    let origin = origin();
    let identity = TRUSTING.replace("127.0.0.0/8", "127.0.0.1/32");
    let rules = format!("{identity}{}{}", rule("device", "device", 3), rule("user", "user", 1));
    let gateway = limited(&origin, "\"device\", \"user\"", &rules);
    let mut stranger = from(3, &gateway);
    let claims = |number: usize| format!("198.51.100.{number}");
    let statuses = (0..5).map(|number| {
        let (address, forwarded) = (claims(number), format!("for={}", claims(number)));
        let fields =
            [("X-User", "ann"), ("X-Tier", "platinum"), ("X-Forwarded-For", &*address), ("Forwarded", &forwarded)];
        stranger.get("/", &fields).status
    });
    assert_eq!(statuses.collect::<Vec<_>>(), [200, 200, 200, 429, 429], "one device, no user, no tier");
    for request in origin.requests() {
        assert!(request.field("x-user").is_none() && request.field("x-tier").is_none(), "{request:?}");
        assert_eq!(request.field("x-forwarded-for"), Some("127.0.0.3"));
    }
    // Ann herself, through the proxy, has lost nothing.
    let hers = [("X-User", "ann"), ("X-Forwarded-For", "198.51.100.9")];
    assert_eq!(passed(&mut gateway.connect(), "/", &hers, 2), 1);
}

#[test]
fn a_node_limit_counts_all_clients_together() {
    let origin = origin();
    let gateway = limited(&origin, "\"node\"", &format!("{DEVICE}{}", rule("node", "node", 5)));
    let of = |last: u8| passed(&mut from(last, &gateway), "/", &[("X-Device", &last.to_string())], 2);
    assert_eq!([of(2), of(3), of(4), of(5)], [2, 2, 1, 0]);
    assert_eq!(origin.count(), 5);
}

#[test]
fn many_connections_at_once_get_the_burst_and_no_more() {
    let origin = origin();
    let rules = format!("{DEVICE}{}{}", rule("device", "device", 17), rule("node", "node", 40));
    let gateway = limited(&origin, "\"device\", \"node\"", &rules);
    let at_once = |device: &str| -> usize {
        std::thread::scope(|scope| {
            let one = || (0..10).filter(|_| gateway.get("/", &[("X-Device", device)]).status == 200).count();
            let clients: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
            clients.into_iter().map(|client| client.join().expect("no panic")).sum()
        })
    };
    assert_eq!(["a", "b", "c"].map(at_once), [17, 17, 6]);
    assert_eq!(origin.count(), 40);
}

// What a request costs.

#[test]
fn a_denial_by_one_limit_spends_nothing_of_another() {
    let origin = origin();
    for (tight, wide) in [("node", "device"), ("device", "node")] {
        let rules = format!("{}{}", rule("tight", tight, 1), rule("wide", wide, 3));
        let both = [("both", "limits = [\"wide\", \"tight\"]"), ("wide", "limits = [\"wide\"]")];
        let gateway = Gateway::start(&routes(origin.address, &both, &rules));
        let mut client = gateway.connect();
        assert_eq!(passed(&mut client, "/both/", &[], 20), 1, "as many as the {tight} may");
        assert_eq!(passed(&mut client, "/wide/", &[], 4), 2, "19 denials by the {tight} cost the {wide} nothing");
    }
}

#[test]
fn a_route_may_cost_more_and_what_it_cannot_have_stays() {
    let origin = origin();
    let dear = [("dear", "limits = [\"device\"]\ncost = 3"), ("cheap", "limits = [\"device\"]")];
    let gateway = Gateway::start(&routes(origin.address, &dear, &rule("device", "device", 7)));
    let mut client = gateway.connect();
    assert_eq!(standing(&client.get("/dear/", &[])).remaining, 4);
    assert_eq!(standing(&client.get("/dear/", &[])).remaining, 1);
    let denied = client.get("/dear/", &[]);
    assert_eq!((denied.status, standing(&denied).remaining), (429, 1));
    assert!(is_about(retry_after(&denied), 2 * HOUR), "two tokens are missing: {denied:?}");
    assert_eq!(passed(&mut client, "/cheap/", &[], 3), 1);
    // A cost that can never be paid is a fault of the file.
    let dir = Dir::new();
    let config = routes(origin.address, &dear, &rule("device", "device", 2));
    let file = dir.write("dear.toml", &format!("version = 1\n{config}"));
    let output = tidegate().arg("check").arg(file).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("dear.toml:") && said.contains("cost"), "{said}");
}

#[test]
fn an_answer_from_the_cache_costs_as_much_and_carries_its_own_standing() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=600")], "stored"));
    let gateway = Gateway::start(&one_route(origin.address, "limits = [\"device\"]", &rule("device", "device", 3)));
    let mut client = gateway.connect();
    let answers = [(); 4].map(|()| client.get("/", &[]));
    assert_eq!(answers.each_ref().map(|answer| answer.status), [200, 200, 200, 429]);
    assert_eq!(answers.each_ref().map(|answer| standing(answer).remaining), [2, 1, 0, 0]);
    assert!(answers[1].is_hit() && answers[2].is_hit() && origin.count() == 1);
    assert_eq!(
        answers[3].cache_status(),
        "tidegate; detail=limited",
        "nor is a denial a reason to show what is stored"
    );
}

#[test]
fn tokens_come_back_at_the_rate_and_asking_too_often_delays_nothing() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", "[limits.device]\ntier = \"device\"\nrate = \"5/s\"\nburst = 1\n");
    let mut client = gateway.connect();
    let start = Instant::now();
    let mut pass = || wait_for(|| client.get("/", &[]).status == 200, PATIENCE);
    (0..4).for_each(|_| pass());
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(600), "three tokens at five a second came in {elapsed:?}");
    assert_eq!(origin.count(), 4);
}

// What a denial says.

const HOUR: u64 = 3600;

/// Where a caller stands, by the two fields of an answer.
#[derive(Debug, PartialEq)]
struct Told {
    rule: String,
    burst: u64,
    window: u64,
    remaining: u64,
    reset: u64,
}

/// One item of a structured list (RFC 9651): a string without escapes, and these parameters, each an integer.
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

/// draft-ietf-httpapi-ratelimit-headers-10: `q` is the quota and `w` its window in seconds, `r` what remains and `t` the
/// seconds until the quota is back.
#[track_caller]
fn standing(answer: &Answer) -> Told {
    let (policy, limit) = (answer.all("ratelimit-policy"), answer.all("ratelimit"));
    assert!(policy.len() == 1 && limit.len() == 1, "{answer:?}");
    let (rule, [burst, window]) = item(policy[0], ["q", "w"]).unwrap_or_else(|| panic!("{}", policy[0]));
    let (named, [remaining, reset]) = item(limit[0], ["r", "t"]).unwrap_or_else(|| panic!("{}", limit[0]));
    assert_eq!(rule, named, "both speak of the same rule");
    Told { rule, burst, window, remaining, reset }
}

#[track_caller]
fn retry_after(answer: &Answer) -> u64 {
    let lines = answer.all("retry-after");
    lines
        .first()
        .filter(|_| lines.len() == 1)
        .and_then(|line| line.parse().ok())
        .unwrap_or_else(|| panic!("{answer:?}"))
}

/// A test takes a while, so less of a wait may be left.
fn is_about(seconds: u64, expected: u64) -> bool {
    (expected - 60..=expected).contains(&seconds)
}

#[test]
fn answers_say_where_a_caller_stands_and_denials_when_to_come_back() {
    let origin = origin();
    let gateway = limited(&origin, "\"per.device_1-a\"", &rule("\"per.device_1-a\"", "device", 2));
    let mut client = gateway.connect();
    for (status, remaining, reset) in [(200, 1, HOUR), (200, 0, 2 * HOUR), (429, 0, 2 * HOUR)] {
        let answer = client.get("/", &[]);
        let told = standing(&answer);
        assert_eq!(answer.status, status);
        assert!(is_about(told.reset, reset), "{told:?}");
        let rule = "per.device_1-a".to_owned();
        assert_eq!(told, Told { rule, burst: 2, window: 2 * HOUR, remaining, reset: told.reset });
        match status {
            200 => assert!(answer.field("retry-after").is_none(), "{answer:?}"),
            _ => assert!(is_about(retry_after(&answer), HOUR), "{answer:?}"),
        }
    }
}

#[test]
fn a_caller_is_told_of_its_own_weight_of_the_tightest_rule_and_of_the_longest_wait() {
    let origin = origin();
    let slow = "[limits.slow]\ntier = \"user\"\nrate = \"1/d\"\nburst = 5\n";
    let rules = format!("{TRUSTING}{}{slow}", rule("device", "device", 10));
    let gateway = limited(&origin, "\"slow\", \"device\"", &rules);
    let mut proxy = gateway.connect();
    let anonymous = standing(&proxy.get("/", &[("X-Forwarded-For", "198.51.100.1")]));
    assert_eq!((&*anonymous.rule, anonymous.burst, anonymous.remaining), ("device", 10, 9));
    let ann = [("X-User", "ann"), ("X-Tier", "platinum")];
    let first = standing(&proxy.get("/", &ann));
    assert_eq!((&*first.rule, first.burst, first.window, first.remaining), ("slow", 16, 5 * 24 * HOUR, 15));
    assert_eq!(passed(&mut proxy, "/", &ann, 16), 15);
    let denied = proxy.get("/", &ann);
    // 3.2 tokens a day.
    assert!(standing(&denied).rule == "slow" && is_about(retry_after(&denied), 27_000), "{denied:?}");
}

#[test]
fn a_denial_is_a_page_or_a_problem_by_accept_and_never_stored() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &rule("device", "device", 1));
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).status, 200);
    for accept in ["application/json", "*/*", "text/html;q=0.1, application/problem+json"] {
        let answer = client.get("/", &[("Accept", accept)]);
        assert_eq!((answer.status, answer.field("content-type")), (429, Some("application/problem+json")), "{accept}");
        let problem: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
        assert_eq!((&problem["status"], &problem["title"]), (&429.into(), &"Too Many Requests".into()));
        assert_eq!((&problem["type"], &problem["reason"]), (&"about:blank".into(), &"limited".into()));
    }
    let browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
    let page = client.get("/", &[("Accept", browser)]);
    assert_eq!((page.status, page.field("content-type")), (429, Some("text/html; charset=utf-8")));
    assert!(page.text().starts_with("<!doctype html>") && page.text().contains("Too Many Requests"), "{}", page.text());
    let head = client.request("HEAD", "/", &[("Accept", browser)], b"");
    assert_eq!((head.status, head.field("content-length")), (429, page.field("content-length")));
    for answer in [page, head] {
        assert_eq!(answer.field("cache-control"), Some("no-store"));
        assert!(answer.field("retry-after").is_some() && answer.field("proxy-status").is_none(), "{answer:?}");
    }
    assert_eq!(origin.count(), 1);
}

#[test]
fn a_denial_says_the_same_however_it_was_asked_for() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &rule("device", "device", 1));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let lines = |answer: &Answer| {
        let own = |(name, _): &&(String, String)| !["connection", "date"].contains(&name.to_lowercase().as_str());
        answer.fields.iter().filter(own).cloned().collect::<Vec<_>>()
    };
    let first = gateway.get("/", &[]);
    assert!(first.fields.len() > 7 && first.text().ends_with("\"reason\":\"limited\"}\n"), "{first:?}");
    // What one connection says twice, in the same words or others, and what it says in the end.
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
        let answer = client.answer_to(method);
        assert_eq!((answer.status, lines(&answer)), (429, lines(&first)), "{method} {line} {rest}");
        assert_eq!(answer.field("connection"), connection, "{method} {line} {rest}");
        assert_eq!(answer.text(), if method == "HEAD" { String::new() } else { first.text() });
    }
    assert!(client.is_closed_within(PATIENCE));
    assert_eq!(origin.count(), 1);
}

#[test]
fn a_denied_body_is_neither_asked_for_nor_taken_for_a_request() {
    let origin = origin();
    let gateway = limited(&origin, "\"device\"", &rule("device", "device", 1));
    assert_eq!(gateway.get("/", &[]).status, 200);
    let mut waiting = gateway.connect();
    waiting.send("POST /asks HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(waiting.answer_to("POST").status, 429, "no 100 before it");
    let mut sending = gateway.connect();
    let body = b"GET /inside HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(sending.request("POST", "/sends", &[], body).status, 429);
    // Either the connection ends here or the body was read; its bytes are no request.
    sending.try_send(b"GET /after HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").ok();
    let rest = String::from_utf8_lossy(&sending.read_to_end()).into_owned();
    assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 429 ") && rest.matches("HTTP/1.1 ").count() == 1, "{rest}");
    assert_eq!(origin.requests().iter().map(|request| &*request.target).collect::<Vec<_>>(), ["/"]);
}

// Rules that do not deny.

#[test]
fn a_shadow_rule_admits_says_nothing_and_counts() {
    let origin = origin();
    let shadow = format!("{}mode = \"shadow\"\n", rule("shadow", "device", 1));
    let gateway = limited(&origin, "\"shadow\"", &shadow);
    let mut client = gateway.connect();
    for _ in 0..4 {
        let answer = client.get("/", &[]);
        assert_eq!((answer.status, answer.field("ratelimit"), answer.field("ratelimit-policy")), (200, None, None));
    }
    assert_eq!((decisions(&gateway, "allowed"), decisions(&gateway, "shadow_denied")), (1.0, 3.0));
    assert_eq!((decisions(&gateway, "denied"), origin.count()), (0.0, 4));
}

#[test]
fn a_shadow_rule_does_not_soften_one_that_is_enforced() {
    let origin = origin();
    let shadow = format!("{}mode = \"shadow\"\n{}", rule("shadow", "device", 1), rule("device", "device", 3));
    let gateway = limited(&origin, "\"shadow\", \"device\"", &shadow);
    let mut client = gateway.connect();
    assert_eq!(standing(&client.get("/", &[])).rule, "device");
    assert_eq!(passed(&mut client, "/", &[], 4), 2);
}

#[test]
fn a_rule_that_is_off_does_nothing() {
    let origin = origin();
    let off = format!("{}mode = \"off\"\n", rule("off", "device", 1));
    let gateway = limited(&origin, "\"off\"", &off);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/", &[], 5), 5);
    assert!(client.get("/", &[]).field("ratelimit").is_none());
    assert_eq!(["allowed", "denied", "shadow_denied"].map(|decision| decisions(&gateway, decision)), [0.0; 3]);
}

#[test]
fn a_percentage_chooses_devices_and_the_same_ones_on_every_node() {
    let origin = origin();
    let start = |percent: u32| {
        let rules = format!("{DEVICE}{}percent = {percent}\n", rule("some", "device", 1));
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

// The cluster, without a Redis.

/// A Redis that is configured and not there, in a fleet of four.
fn away() -> String {
    format!("[redis]\nnodes = 4\n[redis.regions.default]\nendpoints = [\"redis://{}\"]\n", free_address())
}

#[test]
fn a_cluster_limit_without_a_redis_is_this_nodes_own() {
    let origin = origin();
    let gateway = limited(&origin, "\"fleet\"", &rule("fleet", "cluster", 6));
    let of = |last: u8| passed(&mut from(last, &gateway), "/", &[], 4);
    assert_eq!([of(2), of(3), of(4)], [4, 2, 0]);
    let denied = gateway.get("/", &[]);
    assert_eq!((&*standing(&denied).rule, standing(&denied).burst), ("fleet", 6));
    // A lease counts in whole millionths of a token a second, rounded down: 277 instead of 277.8.
    assert!(is_about(retry_after(&denied), HOUR + HOUR / 300), "{denied:?}");
    assert_eq!(gateway.metric("tidegate_limit_on_share{rule=\"fleet\"}"), 1.0);
}

#[test]
fn a_cluster_limit_without_a_redis_is_shared_out_by_the_size_of_the_fleet() {
    let origin = origin();
    let fleet = format!("{}[redis]\nnodes = 3\n", rule("fleet", "cluster", 12));
    let gateway = limited(&origin, "\"fleet\"", &fleet);
    assert_eq!(passed(&mut gateway.connect(), "/", &[], 12), 4);
}

#[test]
fn a_cluster_limit_whose_redis_is_away_runs_on_most_of_this_nodes_share() {
    let origin = origin();
    let start = Instant::now();
    let fleet = "[limits.fleet]\ntier = \"cluster\"\nrate = \"40/s\"\nburst = 80\n";
    let gateway = limited(&origin, "\"fleet\"", &format!("{fleet}{}", away()));
    let mut client = gateway.connect();
    wait_for(|| client.get("/", &[]).status == 200, PATIENCE);
    let first = Instant::now();
    (0..12).for_each(|_| wait_for(|| client.get("/", &[]).status == 200, PATIENCE));
    // 0.8 of a quarter of 40 a second, from nothing: eight a second.
    assert!(start.elapsed() >= Duration::from_millis(13 * 125 - 5), "{:?}", start.elapsed());
    assert!(first.elapsed() < Duration::from_millis(12 * 125 * 2), "{:?}", first.elapsed());
    assert_eq!(gateway.metric("tidegate_limit_on_share{rule=\"fleet\"}"), 1.0);
    let told = |line: &str| line.contains("\"limit_on_share\"") && line.contains("\"rule\":\"fleet\"");
    assert!(gateway.process.stderr.find(PATIENCE, told).is_some());
}

#[test]
fn a_burst_that_the_fleet_cannot_share_is_a_fault_of_the_file() {
    let dir = Dir::new();
    let config =
        one_route(free_address(), "limits = [\"fleet\"]", &format!("{}{}", rule("fleet", "cluster", 7), away()));
    let file = dir.write("fleet.toml", &format!("version = 1\n{config}"));
    let output = tidegate().arg("check").arg(file).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("fleet.toml:") && said.contains("at least 8"), "{said}");
}

// What operators see.

fn decisions(gateway: &Gateway, decision: &str) -> f64 {
    gateway.metric(&format!("tidegate_limit_decisions_total{{decision=\"{decision}\"}}"))
}

#[test]
fn a_denial_is_in_the_access_log_with_its_rule_and_in_the_metrics() {
    let origin = origin();
    let rules = format!("{}{}", rule("wide", "node", 9), rule("narrow", "device", 1));
    let gateway = limited(&origin, "\"wide\", \"narrow\"", &rules);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/shop?x=1", &[], 3), 1);
    let lines = gateway.access_log(3);
    let told = |line: &serde_json::Value| (line["status"].as_u64(), line["limit"].as_str().map(str::to_owned));
    let denied = (Some(429), Some("narrow".to_owned()));
    assert_eq!(lines.iter().map(told).collect::<Vec<_>>(), [(Some(200), None), denied.clone(), denied]);
    assert_eq!((&lines[1]["path"], &lines[1]["route"]), (&"/shop?x=1".into(), &"all".into()));
    assert!(lines[1].get("upstream").is_none() && lines[1].get("degraded").is_none(), "{}", lines[1]);
    assert_eq!((decisions(&gateway, "allowed"), decisions(&gateway, "denied")), (1.0, 2.0));
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"limited\"}"), 2.0);
    assert_eq!(gateway.metric("tidegate_route_answers_total{route=\"all\",status_class=\"4xx\"}"), 2.0);
    assert_eq!(gateway.metric("tidegate_route_degraded_total{route=\"all\"}"), 0.0);
}
