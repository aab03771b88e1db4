//! Limits beyond a quota for each device: keys of one's own, what is kept for heavier users, what an answer costs, who is exempt,
//! what is tried out for a while, and why a caller is denied.
//!
//! Rates are so slow that nothing comes back while a test runs; a burst is then exactly what is admitted.

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

/// How many of `count` requests pass, wherever among them.
fn passed(client: &mut Client, target: &str, fields: &[(&str, &str)], count: usize) -> usize {
    (0..count).filter(|_| client.get(target, fields).status == 200).count()
}

fn json(gateway: &Gateway, method: &str, target: &str) -> (u16, serde_json::Value) {
    let answer = Client::connect(gateway.admin).request(method, target, &[("host", "localhost")], b"");
    (answer.status, serde_json::from_slice(&answer.body).unwrap_or_default())
}

// Who is counted together.

#[test]
fn a_key_of_ones_own_is_counted_by_its_value_and_not_where_there_is_none() {
    let origin = origin();
    let rules = rule("tenants", "key", 3, "key = \"header:x-tenant\"") + &rule("shops", "key", 5, "key = \"path:2\"");
    let gateway = limited(&origin, "\"tenants\", \"shops\"", "", &rules);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/a/1", &[("x-tenant", "acme")], 5), 3);
    assert_eq!(passed(&mut client, "/a/1", &[("x-tenant", "other")], 5), 2, "the shop has had three");
    assert_eq!(passed(&mut client, "/a/2", &[("x-tenant", "other")], 5), 1, "the tenant has had two");
    assert_eq!(passed(&mut client, "/", &[], 20), 20, "neither tenant nor shop");
    // However long they are, and however alike they begin.
    let long = ["t".repeat(4_000), "t".repeat(5_000)];
    assert_eq!(long.each_ref().map(|tenant| passed(&mut client, "/", &[("x-tenant", tenant)], 4)), [3, 3]);
}

#[test]
fn making_up_device_ids_buys_no_more_than_one_address_may_have() {
    let origin = origin();
    let devices = rule("device", "device", 2, "per_address = 3");
    let gateway = limited(&origin, "\"device\"", "", &format!("{TRUSTING}{devices}"));
    let mut client = gateway.connect();
    let ids: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    let all: usize = ids.iter().map(|id| passed(&mut client, "/", &[("x-device", id)], 3)).sum();
    assert_eq!(all, 6, "three devices' worth of two");
    let elsewhere = [("x-device", "0"), ("x-forwarded-for", "192.0.2.7")];
    assert_eq!(passed(&mut client, "/", &elsewhere, 3), 2);
    let answer = client.get("/", &[("x-device", "new")]);
    assert_eq!(
        (answer.status, answer.field("ratelimit").is_some_and(|told| told.contains("device:address"))),
        (429, true)
    );
}

#[test]
fn who_is_listed_is_exempt_or_gets_nothing() {
    let origin = origin();
    let access = "[access]\nexempt = [\"192.0.2.0/24\", \"user:ops\"]\ndenied = [\"192.0.2.66\", \"device:bot\"]\n";
    let gateway = limited(&origin, "\"all\"", "", &format!("{TRUSTING}{access}{}", rule("all", "node", 2, "")));
    let mut client = gateway.connect();
    for exempt in [("x-forwarded-for", "192.0.2.7"), ("x-user", "ops")] {
        assert_eq!(passed(&mut client, "/", &[exempt], 10), 10, "{exempt:?}");
    }
    for denied in [&[("x-forwarded-for", "192.0.2.66")][..], &[("x-device", "bot"), ("x-user", "ops")]] {
        let answer = client.get("/", denied);
        assert_eq!((answer.status, answer.field("content-type")), (403, Some("application/problem+json")));
        assert!(
            answer.text().contains("\"reason\":\"forbidden\"") && answer.field("ratelimit").is_none(),
            "{}",
            answer.text()
        );
    }
    assert_eq!(passed(&mut client, "/", &[], 10), 2, "what the others did was not counted");
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"forbidden\"}"), 2.0);
}

// What it costs.

#[test]
fn a_failed_login_costs_more() {
    let origin = origin();
    let route = "cost_by_status = { \"401\" = 9, \"5xx\" = 2 }";
    let gateway = limited(&origin, "\"user\"", route, &format!("{TRUSTING}{}", rule("user", "user", 30, "")));
    let mut client = gateway.connect();
    let logins = |client: &mut Client, user: &str| {
        (0..10).filter(|_| client.get("/login", &[("x-user", user)]).status == 401).count()
    };
    assert_eq!(logins(&mut client, "eve"), 3, "each takes ten of thirty");
    assert_eq!(passed(&mut client, "/", &[("x-user", "eve")], 10), 0);
    assert_eq!(passed(&mut client, "/", &[("x-user", "bob")], 40), 30);
}

#[test]
fn ordinary_traffic_stops_at_what_is_kept_for_heavier_users() {
    let origin = origin();
    let node = rule("node", "node", 100, "reserve = { anonymous = 0.5, standard = 0.3, gold = 0.1 }");
    let gateway = limited(&origin, "\"node\"", "", &format!("{TRUSTING}{node}"));
    let mut client = gateway.connect();
    let mut asked = |tier: &str, user: &str| {
        let fields = [("x-user", user), ("x-tier", tier)];
        passed(&mut client, "/", if user.is_empty() { &[] } else { &fields }, 60)
    };
    assert_eq!([asked("", ""), asked("standard", "a"), asked("gold", "b"), asked("platinum", "c")], [50, 20, 20, 10]);
}

/// Each asks for more than it may have, for five seconds after its burst is spent.
#[test]
fn weights_are_exact_through_the_whole_gateway() {
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
                let mut ask = || {
                    let answer = client.get("/", &fields);
                    let wait = if answer.status == 200 { Duration::ZERO } else { Duration::from_millis(1) };
                    std::thread::sleep(wait);
                    answer.status == 200
                };
                while ask() {}
                let began = Instant::now();
                let mut admitted = 0;
                // From an empty bucket to an empty bucket, so that a client's pauses change nothing.
                loop {
                    let has_passed = ask();
                    admitted += u32::from(has_passed);
                    if !has_passed && began.elapsed() >= 5 * SECOND {
                        break;
                    }
                }
                f64::from(admitted) / began.elapsed().as_secs_f64()
            })
        };
        ["standard", "gold", "platinum"].map(measure).map(|client| client.join().expect("it gets its answers"))
    });
    println!("admitted per second: {counts:.1?}");
    for (count, expected) in counts.into_iter().zip([100.0, 200.0, 320.0]) {
        assert!((count / expected - 1.0).abs() < 0.01, "{counts:?}");
    }
}

// What is tried out.

#[test]
fn a_rule_is_tried_out_for_a_while_through_a_reload_and_goes_back_by_itself() {
    let origin = origin();
    let config = one_route(
        origin.address,
        "cache = { mode = \"off\" }\nlimits = [\"device\"]",
        &format!("[log]\naccess = \"off\"\n{TRUSTING}{}", rule("device", "device", 2, "")),
    );
    let gateway = Gateway::start(&config);
    let mut client = gateway.connect();
    assert_eq!(passed(&mut client, "/", &[], 4), 2);
    let votes = |arm: &str, decision: &str| {
        let class = "tier_class=\"anonymous\"";
        gateway.metric(&format!(
            "tidegate_limit_votes_total{{rule=\"device\",{class},arm=\"{arm}\",decision=\"{decision}\"}}"
        ))
    };
    assert_eq!((votes("enforced", "passed"), votes("enforced", "denied")), (2.0, 2.0));

    let (status, told) = json(&gateway, "POST", "/api/v1/limits/device?mode=shadow&for=1h");
    assert_eq!((status, told["rules"][0]["trial"]["mode"].as_str()), (200, Some("shadow")));
    assert_eq!(passed(&mut client, "/", &[], 4), 4);
    assert_eq!(votes("shadow", "denied"), 4.0);
    gateway.rewrite(&config.replace("burst = 2", "burst = 3"));
    wait_for(|| json(&gateway, "GET", "/api/v1/limits").1["rules"][0]["burst"] == 3, 5 * SECOND);
    assert_eq!(passed(&mut client, "/", &[], 4), 4, "a reload does not end it");

    let (status, _) = json(&gateway, "DELETE", "/api/v1/limits/device");
    assert_eq!((status, passed(&mut client, "/", &[], 2)), (200, 0));
    assert_eq!(json(&gateway, "POST", "/api/v1/limits/device?percent=0&for=5s").0, 200);
    assert_eq!(passed(&mut client, "/", &[], 4), 4);
    assert_eq!(votes("left_out", "passed"), 4.0);
    wait_for(|| client.get("/", &[]).status == 429, 10 * SECOND);
    assert!(json(&gateway, "GET", "/api/v1/limits").1["rules"][0]["trial"].is_null());

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
    assert_eq!(gateway.process.stderr.events("limit_changed").len(), 3);
}

#[test]
fn what_a_trial_does_not_name_stays_as_configured() {
    let origin = origin();
    let rules = rule("watched", "device", 2, "mode = \"shadow\"") + &rule("tenth", "device", 2, "percent = 0");
    let gateway = limited(&origin, "\"watched\", \"tenth\"", "", &rules);
    let mut client = gateway.connect();
    for target in ["/api/v1/limits/watched?percent=100&for=1h", "/api/v1/limits/tenth?mode=enforce&for=1h"] {
        assert_eq!(json(&gateway, "POST", target).0, 200, "{target}");
    }
    assert_eq!(passed(&mut client, "/", &[], 6), 6, "one still only watches, the other still leaves everybody out");
    assert_eq!(json(&gateway, "POST", "/api/v1/limits/watched?mode=enforce&for=1h").0, 200);
    assert_eq!(passed(&mut client, "/", &[], 1), 0);
}

#[test]
fn it_is_explained_how_a_caller_is_treated_and_why() {
    let origin = origin();
    let rules = rule("device", "device", 2, "")
        + &rule("tenants", "key", 5, "key = \"header:x-tenant\"")
        + &rule("user", "user", 10, "");
    let gateway = limited(&origin, "\"device\", \"tenants\", \"user\"", "", &format!("{TRUSTING}{rules}"));
    let mut client = gateway.connect();
    let fields = [("x-device", "a"), ("x-tenant", "acme"), ("x-forwarded-for", "192.0.2.7")];
    assert_eq!(passed(&mut client, "/", &fields, 3), 2);
    let (status, told) = json(&gateway, "GET", "/api/v1/limits/explain?ip=192.0.2.7&device=a&key=tenants:acme");
    assert_eq!((status, told["tier"].as_str()), (200, Some("anonymous")), "{told}");
    let rule = |name: &str| {
        let rules = told["rules"].as_array().expect("a list");
        rules.iter().find(|rule| rule["name"] == name).unwrap_or_else(|| panic!("{told}"))
    };
    let (device, tenants, user) = (rule("device"), rule("tenants"), rule("user"));
    assert_eq!((device["remaining"].as_u64(), tenants["remaining"].as_u64()), (Some(0), Some(3)), "{told}");
    assert!(device["wait_seconds"].as_f64().is_some_and(|wait| (1_000.0..3_600.0).contains(&wait)), "{told}");
    assert!(device["why"].as_str().is_some_and(|why| why.starts_with("denies for another")), "{told}");
    assert!(device["last_denial"]["seconds_ago"].as_f64().is_some_and(|ago| ago < 60.0), "{told}");
    assert!(
        tenants["last_denial"].is_null() && tenants["why"].as_str().is_some_and(|why| why.starts_with("passes")),
        "{told}"
    );
    assert!(user["why"].as_str().is_some_and(|why| why.starts_with("does not apply")), "{told}");
    // Asking has charged nobody.
    assert_eq!(passed(&mut client, "/", &[("x-device", "b"), ("x-tenant", "acme")], 9), 2);
    for query in ["", "?device=a", "?ip=x", "?ip=192.0.2.7&tier=none", "?ip=192.0.2.7&key=device:a", "?ip=::1&x=y"] {
        assert!([400, 404].contains(&json(&gateway, "GET", &format!("/api/v1/limits/explain{query}")).0), "{query}");
    }
}

#[test]
fn clients_are_told_as_much_as_a_rule_says() {
    let origin = origin();
    for (headers, policy, left) in [("all", true, true), ("policy", true, false), ("none", false, false)] {
        let node = rule("node", "node", 1, &format!("headers = \"{headers}\""));
        let gateway = limited(&origin, "\"node\"", "", &node);
        for status in [200, 429] {
            let answer = gateway.get("/", &[]);
            let told = (answer.field("ratelimit-policy").is_some(), answer.field("ratelimit").is_some());
            assert_eq!((answer.status, told), (status, (policy, left)), "{headers}");
            assert_eq!(answer.field("retry-after").is_some(), status == 429, "{headers}");
        }
    }
}
