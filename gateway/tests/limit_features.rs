//! Advanced limits: custom keys, reserves, per-address caps, cost by status, allow and deny lists,
//! temporary overrides, and explanations.
//!
//! Refill rates are so low that no token returns during a test; the burst is then exactly what is
//! admitted.

mod support;

use std::time::{Duration, Instant};

use support::{Client, Gateway, Origin, Script, one_route, wait_for};

const SECOND: Duration = Duration::from_secs(1);
const TRUSTING: &str = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nuser = \"header:x-user\"\ntier = \"header:x-tier\"\n\
                        device = [\"header:x-device\"]\n[tiers]\ngold = 2.0\nplatinum = 3.2\n";

fn origin() -> Origin {
    Origin::start(|request| match request.target.split('/').nth(1) {
        Some("login") => Script::new().head(401, &[("Content-Length", "0")]),
        _ => Script::ok(&[], "passed"),
    })
}

fn limited(origin: &Origin, limits: &str, route: &str, rest: &str) -> Gateway {
    let route = format!("cache = {{ mode = \"off\" }}\nlimits = [{limits}]\n{route}");
    Gateway::start(&one_route(origin.address, &route, &format!("[log]\naccess = \"off\"\n{rest}")))
}

fn rule(name: &str, tier: &str, burst: u32, more: &str) -> String {
    format!("[limits.{name}]\ntier = \"{tier}\"\nrate = \"1/h\"\nburst = {burst}\n{more}\n")
}

/// Number of `count` requests that pass, in any position.
fn passed(client: &mut Client, target: &str, fields: &[(&str, &str)], count: usize) -> usize {
    (0..count).filter(|_| client.get(target, fields).status == 200).count()
}

fn json(gateway: &Gateway, method: &str, target: &str) -> (u16, serde_json::Value) {
    let response = Client::connect(gateway.admin).request(method, target, &[("host", "localhost")], b"");
    (response.status, serde_json::from_slice(&response.body).unwrap_or_default())
}

// Counting.

#[test]
fn custom_key_is_counted_by_value_and_ignored_if_absent() {
    let origin = origin();
    let rules = rule("tenants", "key", 3, "key = \"header:x-tenant\"") + &rule("shops", "key", 5, "key = \"path:2\"");
    let gateway = limited(&origin, "\"tenants\", \"shops\"", "", &rules);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/a/1", &[("x-tenant", "acme")], 5), 3);
    assert_eq!(passed(&mut client, "/a/1", &[("x-tenant", "other")], 5), 2, "the shop key has used three");
    assert_eq!(passed(&mut client, "/a/2", &[("x-tenant", "other")], 5), 1, "the tenant key has used two");
    assert_eq!(passed(&mut client, "/", &[], 20), 20, "neither tenant nor shop");
    // Long values with a common prefix are distinct keys.
    let long = ["t".repeat(4_000), "t".repeat(5_000)];
    assert_eq!(long.each_ref().map(|tenant| passed(&mut client, "/", &[("x-tenant", tenant)], 4)), [3, 3]);
}

#[test]
fn invented_device_ids_are_capped_per_address() {
    let origin = origin();
    let devices = rule("device", "device", 2, "per_address = 3");
    let gateway = limited(&origin, "\"device\"", "", &format!("{TRUSTING}{devices}"));
    let mut client = gateway.connect();
    let ids: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    let all: usize = ids.iter().map(|id| passed(&mut client, "/", &[("x-device", id)], 3)).sum();
    assert_eq!(all, 6, "three times the device burst of two");
    let elsewhere = [("x-device", "0"), ("x-forwarded-for", "192.0.2.7")];
    assert_eq!(passed(&mut client, "/", &elsewhere, 3), 2);
    let response = client.get("/", &[("x-device", "new")]);
    assert_eq!(
        (response.status, response.field("ratelimit").is_some_and(|value| value.contains("device:address"))),
        (429, true)
    );
}

#[test]
fn listed_callers_are_exempt_or_rejected() {
    let origin = origin();
    let access = "[access]\nexempt = [\"192.0.2.0/24\", \"user:ops\"]\ndenied = [\"192.0.2.66\", \"device:bot\"]\n";
    let gateway = limited(&origin, "\"all\"", "", &format!("{TRUSTING}{access}{}", rule("all", "node", 2, "")));
    let mut client = gateway.connect();
    for exempt in [("x-forwarded-for", "192.0.2.7"), ("x-user", "ops")] {
        assert_eq!(passed(&mut client, "/", &[exempt], 10), 10, "{exempt:?}");
    }
    for denied in [&[("x-forwarded-for", "192.0.2.66")][..], &[("x-device", "bot"), ("x-user", "ops")]] {
        let response = client.get("/", denied);
        assert_eq!((response.status, response.field("content-type")), (403, Some("application/problem+json")));
        assert!(
            response.text().contains("\"reason\":\"forbidden\"") && response.field("ratelimit").is_none(),
            "{}",
            response.text()
        );
    }
    assert_eq!(passed(&mut client, "/", &[], 10), 2, "requests of listed callers were not counted");
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"forbidden\"}"), 2.0);
}

// Cost.

#[test]
fn cost_by_status_is_charged_after_the_response() {
    let origin = origin();
    let route = "cost_by_status = { \"401\" = 9, \"5xx\" = 2 }";
    let gateway = limited(&origin, "\"user\"", route, &format!("{TRUSTING}{}", rule("user", "user", 30, "")));
    let mut client = gateway.connect();
    let logins = |client: &mut Client, user: &str| {
        (0..10).filter(|_| client.get("/login", &[("x-user", user)]).status == 401).count()
    };
    assert_eq!(logins(&mut client, "eve"), 3, "each login costs ten of thirty");
    assert_eq!(passed(&mut client, "/", &[("x-user", "eve")], 10), 0);
    assert_eq!(passed(&mut client, "/", &[("x-user", "bob")], 40), 30);
}

#[test]
fn reserve_stops_classes_of_lower_weight_first() {
    let origin = origin();
    let node = rule("node", "node", 100, "reserve = { anonymous = 0.5, standard = 0.3, gold = 0.1 }");
    let gateway = limited(&origin, "\"node\"", "", &format!("{TRUSTING}{node}"));
    let mut client = gateway.connect();
    let mut admitted = |tier: &str, user: &str| {
        let fields = [("x-user", user), ("x-tier", tier)];
        passed(&mut client, "/", if user.is_empty() { &[] } else { &fields }, 60)
    };
    assert_eq!(
        [admitted("", ""), admitted("standard", "a"), admitted("gold", "b"), admitted("platinum", "c")],
        [50, 20, 20, 10]
    );
}

/// Each client exceeds its limit for five seconds after its burst is used up.
#[test]
fn admitted_rates_match_weights_within_one_percent() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "passed"));
    let rule = "[limits.user]\ntier = \"user\"\nrate = \"100/s\"\nburst = 100\n";
    let config =
        one_route(origin.address, "limits = [\"user\"]", &format!("[log]\naccess = \"off\"\n{TRUSTING}{rule}"));
    let gateway = Gateway::start(&config);
    let counts = std::thread::scope(|scope| {
        let measure = |tier: &'static str| {
            let gateway = &gateway;
            scope.spawn(move || {
                let (mut client, fields) = (gateway.connect(), [("x-user", tier), ("x-tier", tier)]);
                let mut try_request = || {
                    let response = client.get("/", &fields);
                    let wait = if response.status == 200 { Duration::ZERO } else { Duration::from_millis(1) };
                    std::thread::sleep(wait);
                    response.status == 200
                };
                while try_request() {}
                let began = Instant::now();
                let mut admitted = 0;
                // Measures from one empty bucket to the next, so that pauses of the client do not
                // matter.
                loop {
                    let has_passed = try_request();
                    admitted += u32::from(has_passed);
                    if !has_passed && began.elapsed() >= 5 * SECOND {
                        break;
                    }
                }
                f64::from(admitted) / began.elapsed().as_secs_f64()
            })
        };
        ["standard", "gold", "platinum"].map(measure).map(|client| client.join().expect("no panic"))
    });
    println!("admitted per second: {counts:.1?}");
    for (count, expected) in counts.into_iter().zip([100.0, 200.0, 320.0]) {
        assert!((count / expected - 1.0).abs() < 0.01, "{counts:?}");
    }
}

// Reloads.

#[test]
fn raised_limit_passes_at_once_and_a_reload_builds_no_second_table() {
    let origin = origin();
    let device = "[limits.device]\ntier = \"device\"\nrate = \"10/d\"\nburst = 20\nkeys = 2000000\n";
    let node = "[limits.node]\ntier = \"node\"\nrate = \"60/h\"\nburst = 60\n";
    let config = one_route(
        origin.address,
        "cache = { mode = \"off\" }\nlimits = [\"device\", \"node\"]",
        &format!("[log]\naccess = \"off\"\n{TRUSTING}{device}{node}"),
    );
    let gateway = Gateway::start(&config);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/", &[("x-device", "a")], 22), 20);
    let peak = peak_memory(&gateway);
    let raised = config.replace("10/d", "100/s").replace("burst = 20", "burst = 40").replace("60/h", "6000/h");
    gateway.rewrite(&raised);
    wait_for(|| json(&gateway, "GET", "/api/v1/limits").1["rules"][0]["burst"] == 40, 5 * SECOND);
    assert_eq!(passed(&mut client, "/", &[("x-device", "a")], 20), 20, "20 of 40 are left, and 40 of 60");
    // One table has 120 MiB.
    let grown = peak_memory(&gateway).saturating_sub(peak);
    assert!(grown < 60 << 20, "{} MiB more for a reload", grown >> 20);
}

/// The most memory that the gateway has had, in bytes.
fn peak_memory(gateway: &Gateway) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.process.id())).expect("a live process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

// Overrides.

#[test]
fn override_survives_reload_and_expires() {
    let origin = origin();
    let config = one_route(
        origin.address,
        "cache = { mode = \"off\" }\nlimits = [\"device\"]",
        &format!("[log]\naccess = \"off\"\n{TRUSTING}{}", rule("device", "device", 2, "")),
    );
    let gateway = Gateway::start(&config);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/", &[], 4), 2);
    let evaluations = |mode: &str, decision: &str| {
        let class = "user_class=\"anonymous\"";
        gateway.metric(&format!(
            "tidegate_limit_evaluations_total{{rule=\"device\",{class},mode=\"{mode}\",decision=\"{decision}\"}}"
        ))
    };
    assert_eq!((evaluations("enforced", "passed"), evaluations("enforced", "denied")), (2.0, 2.0));

    let (status, reply) = json(&gateway, "POST", "/api/v1/limits/device?mode=shadow&for=1h");
    assert_eq!((status, reply["rules"][0]["override"]["mode"].as_str()), (200, Some("shadow")));
    assert_eq!(passed(&mut client, "/", &[], 4), 4);
    assert_eq!(evaluations("shadow", "denied"), 4.0);
    gateway.rewrite(&config.replace("burst = 2", "burst = 3"));
    wait_for(|| json(&gateway, "GET", "/api/v1/limits").1["rules"][0]["burst"] == 3, 5 * SECOND);
    assert_eq!(passed(&mut client, "/", &[], 4), 4, "a reload does not clear the override");

    for _ in 0..2 {
        let (status, _) = json(&gateway, "DELETE", "/api/v1/limits/device");
        assert_eq!((status, passed(&mut client, "/", &[], 2)), (200, 0));
    }
    assert_eq!(json(&gateway, "POST", "/api/v1/limits/device?percent=0&for=5s").0, 200);
    assert_eq!(passed(&mut client, "/", &[], 4), 4);
    assert_eq!(evaluations("holdout", "passed"), 4.0);
    wait_for(|| client.get("/", &[]).status == 429, 10 * SECOND);
    assert!(json(&gateway, "GET", "/api/v1/limits").1["rules"][0]["override"].is_null());

    for (method, target, status) in [
        ("POST", "/api/v1/limits/device", 400),
        ("POST", "/api/v1/limits/device?mode=shadow&for=99d", 400),
        ("POST", "/api/v1/limits/nothing?mode=off&for=1s", 404),
        ("DELETE", "/api/v1/limits/nothing", 404),
        ("PUT", "/api/v1/limits/device", 405),
        ("POST", "/api/v1/limits", 405),
        ("GET", "/api/v1/limitsx", 404),
    ] {
        assert_eq!(json(&gateway, method, target).0, status, "{method} {target}");
    }
    assert_eq!(gateway.process.stderr.events("limit_overridden").len(), 2);
    let ended = || gateway.process.stderr.events("limit_override_ended");
    wait_for(|| ended().len() >= 2, 5 * SECOND);
    let reasons: Vec<_> = ended().iter().map(|event| event["reason"].as_str().map(str::to_owned)).collect();
    assert_eq!(reasons, ["cleared", "expired"].map(|reason| Some(reason.to_owned())));
}

#[test]
fn override_keeps_unnamed_settings() {
    let origin = origin();
    let rules = rule("watched", "device", 2, "mode = \"shadow\"") + &rule("tenth", "device", 2, "percent = 0");
    let gateway = limited(&origin, "\"watched\", \"tenth\"", "", &rules);
    let mut client = gateway.connect();
    for target in ["/api/v1/limits/watched?percent=100&for=1h", "/api/v1/limits/tenth?mode=enforce&for=1h"] {
        assert_eq!(json(&gateway, "POST", target).0, 200, "{target}");
    }
    assert_eq!(
        passed(&mut client, "/", &[], 6),
        6,
        "one rule is still in shadow mode, the other still excludes all devices"
    );
    assert_eq!(json(&gateway, "POST", "/api/v1/limits/watched?mode=enforce&for=1h").0, 200);
    assert_eq!(passed(&mut client, "/", &[], 1), 0);
}

#[test]
fn explain_reports_status_and_reason_per_rule() {
    let origin = origin();
    let rules = rule("device", "device", 2, "")
        + &rule("tenants", "key", 5, "key = \"header:x-tenant\"")
        + &rule("user", "user", 10, "");
    let gateway = limited(&origin, "\"device\", \"tenants\", \"user\"", "", &format!("{TRUSTING}{rules}"));
    let mut client = gateway.connect();
    let fields = [("x-device", "a"), ("x-tenant", "acme"), ("x-forwarded-for", "192.0.2.7")];
    assert_eq!(passed(&mut client, "/", &fields, 3), 2);
    let (status, reply) = json(&gateway, "GET", "/api/v1/limits/explain?ip=192.0.2.7&device=a&key=tenants:acme");
    assert_eq!((status, reply["user_class"].as_str()), (200, Some("anonymous")), "{reply}");
    let rule = |name: &str| {
        let rules = reply["rules"].as_array().expect("a list");
        rules.iter().find(|rule| rule["name"] == name).unwrap_or_else(|| panic!("{reply}"))
    };
    let (device, tenants, user) = (rule("device"), rule("tenants"), rule("user"));
    assert_eq!((device["scope"].as_str(), tenants["scope"].as_str()), (Some("device"), Some("key")), "{reply}");
    assert!(reply.get("tier").is_none() && device.get("tier").is_none(), "{reply}");
    assert_eq!((device["remaining"].as_u64(), tenants["remaining"].as_u64()), (Some(0), Some(3)), "{reply}");
    assert!(device["wait_seconds"].as_f64().is_some_and(|wait| (1_000.0..3_600.0).contains(&wait)), "{reply}");
    assert!(device["reason"].as_str().is_some_and(|reason| reason.starts_with("denies for another")), "{reply}");
    assert!(device["last_denial"]["seconds_ago"].as_f64().is_some_and(|ago| ago < 60.0), "{reply}");
    assert!(
        tenants["last_denial"].is_null()
            && tenants["reason"].as_str().is_some_and(|reason| reason.starts_with("passes")),
        "{reply}"
    );
    assert!(user["reason"].as_str().is_some_and(|reason| reason.starts_with("does not apply")), "{reply}");
    // The explanation charged no rule.
    assert_eq!(passed(&mut client, "/", &[("x-device", "b"), ("x-tenant", "acme")], 9), 2);
    for query in
        ["", "?device=a", "?ip=x", "?ip=192.0.2.7&user_class=none", "?ip=192.0.2.7&key=device:a", "?ip=::1&x=y"]
    {
        assert!([400, 404].contains(&json(&gateway, "GET", &format!("/api/v1/limits/explain{query}")).0), "{query}");
    }
}

#[test]
fn headers_setting_controls_exposed_fields() {
    let origin = origin();
    for (headers, policy, remaining) in [("all", true, true), ("policy", true, false), ("none", false, false)] {
        let node = rule("node", "node", 1, &format!("headers = \"{headers}\""));
        let gateway = limited(&origin, "\"node\"", "", &node);
        for status in [200, 429] {
            let response = gateway.get("/", &[]);
            let exposed = (response.field("ratelimit-policy").is_some(), response.field("ratelimit").is_some());
            assert_eq!((response.status, exposed), (status, (policy, remaining)), "{headers}");
            assert_eq!(response.field("retry-after").is_some(), status == 429, "{headers}");
        }
    }
}

#[test]
fn denied_callers_are_listed_with_their_denials() {
    let origin = origin();
    let rules = rule("device", "device", 2, "per_address = 0") + &rule("user", "user", 3, "");
    // A random secret lets two of thirty callers share a place of the log in one run of ten.
    let trusting = TRUSTING.replacen("[identity]\n", "[identity]\nsecret = \"0123456789abcdef0123456789abcdef\"\n", 1);
    let gateway = limited(&origin, "\"device\", \"user\"", "", &format!("{trusting}{rules}"));
    let listed = || json(&gateway, "GET", "/api/v1/limits").1;
    assert_eq!((listed()["denials"].as_array().map(Vec::len), &listed()["denials_hidden"]), (Some(0), &0.into()));
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/", &[("x-device", "a")], 12), 2);
    assert_eq!(passed(&mut client, "/", &[("x-device", "b")], 40), 2);
    // Two devices of one user, whose denials count for the user.
    for device in ["c", "d"] {
        passed(&mut client, "/", &[("x-device", device), ("x-user", "ann")], 4);
    }
    let rows = |key: &str| -> Vec<serde_json::Value> {
        listed()["denials"].as_array().expect("a list").iter().map(|row| row[key].clone()).collect()
    };
    assert_eq!(rows("denials"), [38, 10, 5, 2], "{}", listed());
    assert_eq!(rows("rule"), ["device", "device", "user", "device"]);
    let callers: Vec<_> = rows("callers").iter().map(|callers| callers.as_array().map(Vec::len)).collect();
    assert_eq!(callers, [Some(1), Some(1), Some(2), Some(1)]);
    for row in listed()["denials"].as_array().expect("a list") {
        let [first, last] = ["since_seconds_ago", "seconds_ago"].map(|key| row[key].as_f64().expect("a number"));
        assert!(last <= first && first < 60.0, "{row}");
    }
    // More callers than are listed: those with most denials are.
    for device in 0..25 {
        passed(&mut client, "/", &[("x-device", &format!("e{device}"))], 4);
    }
    assert_eq!((rows("denials").len(), &rows("denials")[..3]), (20, &[38.into(), 10.into(), 5.into()][..]));
    assert_eq!(listed()["denials_hidden"], 9);
    // The same list is on the dashboard.
    let dashboard = json(&gateway, "GET", "/api/v1/dashboard").1;
    assert_eq!(dashboard["state"]["limits"]["denials"][0]["denials"], 38, "{}", dashboard["state"]["limits"]);
}
