//! Two gateways that share Redis, and the effect on clients when Redis is slow, down, hung or
//! faulty: cache misses only.
//!
//! Every scenario runs real processes. It prints its figures; `--nocapture` shows them.

mod support;

#[path = "support/redis.rs"]
mod server;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use server::{Redis, free_port};
use support::{Client, ClientResponse, Gateway, Origin, Script, one_route, wait_for};

const CACHED: &str = "cache = { mode = \"standard\" }";
const LIMITED: &str = "limits = [\"cluster\"]\ncache = { mode = \"off\" }";
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Redis deadline for scenarios about latency: the default.
const DEFAULT_DEADLINE: &str = "20ms";
/// Redis deadline for other scenarios, long enough for a busy machine.
const LONG_DEADLINE: &str = "1s";
/// Tolerated extra latency of a request on a busy machine with two cores.
const SLACK: Duration = Duration::from_millis(150);

/// Cluster limit per second; clients offer five times as much.
const RATE: usize = 200;
const OFFERED: usize = 5 * RATE;
/// Half a second of the rate. A half-full bucket bridges a quarter of a second without lease
/// requests.
const BURST: usize = RATE / 2;

#[test]
fn object_stored_by_one_gateway_is_a_remote_hit_of_another() {
    let (redis, origin) = (Redis::start(), origin("max-age=60", Duration::ZERO));
    let [one, other] = gateways(&cached(&origin, LONG_DEADLINE, &[("default", &redis.url())]));
    let first = one.get("/a", &[]);
    assert_eq!((first.status, first.is_hit()), (200, false));
    wait_for(|| redis.entries().len() == 1, 5 * SECOND);

    let second = other.get("/a", &[]);
    assert_eq!((second.status, cache_detail(&second)), (200, format!("remote default:{}", slot(&redis))));
    assert_eq!((second.text(), second.field("content-type")), (first.text(), first.field("content-type")));
    let third = other.get("/a", &[]);
    assert!(third.is_hit() && !is_remote(&third), "{}", third.cache_status());
    assert_eq!(origin.count(), 1);
}

#[test]
fn regions_store_on_their_own_servers() {
    let (eu, us, origin) = (Redis::start(), Redis::start(), origin("max-age=60", Duration::ZERO));
    let (eu_url, us_url) = (eu.url(), us.url());
    let regions = [("default", eu_url.as_str()), ("eu", &eu_url), ("us", &us_url)];
    let [one, other] = gateways(&cached(&origin, LONG_DEADLINE, &regions));
    for (region, own, foreign) in [("eu", &eu, &us), ("us", &us, &eu)] {
        let before = foreign.keys();
        let fields = [("x-region", region)];
        assert!(!one.get("/a", &fields).is_hit(), "regions do not share responses");
        wait_for(|| own.entries().len() == 1, 5 * SECOND);
        assert_eq!(foreign.keys(), before);
        // The key on the server and the response field name the same region and slot.
        let slot = slot(own);
        assert!(own.entries()[0].starts_with(&format!("tg:{{{region}:{slot}}}:")), "{:?}", own.entries());
        assert_eq!(cache_detail(&other.get("/a", &fields)), format!("remote {region}:{slot}"));
        assert!(cache_detail(&other.get("/a", &fields)).ends_with(&format!(" {region}:{slot}")));
    }
    assert_eq!(origin.count(), 2);
}

#[test]
fn large_text_is_stored_compressed_and_read_back_intact() {
    let redis = Redis::start();
    let text = "all work and no play ".repeat(10_000);
    let body = text.clone();
    let origin = Origin::start(move |request| {
        let content =
            if request.target.starts_with("/text") { "application/problem+JSON; charset=utf-8" } else { "image/png" };
        Script::ok(&[("Cache-Control", "max-age=60"), ("Content-Type", content)], &body)
    });
    let config = cached(&origin, LONG_DEADLINE, &[("default", &redis.url())]);
    let [set_to_lz4, set_to_zstd] = ["lz4", "zstd"].map(|compression| {
        Gateway::start(&config.replace("[redis]", &format!("[redis]\ncompression = \"{compression}\"")))
    });
    let mut texts = Vec::new();
    for (one, other, target, most) in [
        (&set_to_lz4, &set_to_zstd, "/text?1", text.len() / 10),
        (&set_to_zstd, &set_to_lz4, "/text?2", text.len() / 10),
        (&set_to_lz4, &set_to_zstd, "/image", text.len() + 1_000),
    ] {
        let before = redis.entries();
        one.get(target, &[]);
        wait_for(|| redis.entries().len() > before.len(), 5 * SECOND);
        let name = redis.entries().into_iter().find(|name| !before.contains(name)).expect("a new entry");
        let stored = redis.value(&name).expect("an entry").len();
        assert!(stored < most && (target != "/image" || stored > text.len()), "{target}: {stored}");
        texts.push(stored);
        let mut found = other.get(target, &[]);
        wait_for(
            || {
                found = other.get(target, &[]);
                found.is_hit()
            },
            5 * SECOND,
        );
        assert!(found.text() == text, "{target} was changed");
    }
    assert!(texts[1] < texts[0], "zstd compresses better: {texts:?}");
}

/// An override set on one gateway applies on all gateways that share Redis, and on one that starts
/// later.
#[test]
fn override_applies_to_the_fleet_or_to_one_node() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let node = |name: &str| {
        let rule = "[limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 2\n";
        let rest = format!("[server]\nnode = \"{name}\"\n{rule}{}", rest(LONG_DEADLINE, &[("default", &redis.url())]));
        Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }\nlimits = [\"device\"]", &rest))
    };
    let send = |gateway: &Gateway, method: &str, query: &str| -> (u16, serde_json::Value) {
        let target = format!("/api/v1/limits/device{query}");
        let response = Client::connect(gateway.admin).request(method, &target, &[("host", "localhost")], b"");
        (response.status, serde_json::from_slice(&response.body).expect("JSON"))
    };
    let passed = |gateway: &Gateway| (0..6).filter(|_| gateway.get("/", &[]).status == 200).count();
    let (one, other) = (node("one"), node("other"));
    let set_override = |gateway: &Gateway| {
        let (status, reply) = send(gateway, "POST", "?mode=shadow&for=1h");
        let count = |key: &str| reply[key].as_array().map_or(0, Vec::len);
        (status, count("acknowledged_nodes"), count("unacknowledged_nodes"))
    };
    // Both nodes must have subscribed to the bus.
    wait_for(|| set_override(&one) == (200, 2, 0), 10 * SECOND);
    assert_eq!((passed(&one), passed(&other)), (6, 6));
    wait_for(|| !other.process.stderr.events("limit_overridden").is_empty(), 5 * SECOND);

    let (status, response) = send(&other, "POST", "?mode=enforce&for=1h&node=one");
    assert_eq!((status, &response["acknowledged_nodes"]), (200, &serde_json::json!(["one"])), "{response}");
    assert_eq!((passed(&one), passed(&other)), (0, 6), "node one has used its burst of two");
    let late = node("late");
    wait_for(|| passed(&late) == 6, 10 * SECOND);
    let (status, response) = send(&late, "DELETE", "");
    assert_eq!((status, response["acknowledged_nodes"].as_array().map(Vec::len)), (200, Some(3)), "{response}");
    assert_eq!((passed(&one), passed(&other), passed(&late)), (0, 0, 0));

    // Without Redis, an override applies to this node only.
    drop(redis);
    let (status, response) = send(&one, "POST", "?mode=off&for=1h");
    assert_eq!(
        (status, &response["acknowledged_nodes"], response["unreachable_servers"].as_array().map(Vec::len)),
        (202, &serde_json::json!(["one"]), Some(1))
    );
    assert_eq!((passed(&one), passed(&other)), (6, 0));
}

/// A state of a breaker that is set on one gateway applies on all, and on one that starts later.
#[test]
fn state_of_a_breaker_applies_to_the_fleet_or_to_one_node() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let node = |name: &str| {
        let rest = format!("[server]\nnode = \"{name}\"\n{}", rest(LONG_DEADLINE, &[("default", &redis.url())]));
        Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", &rest))
    };
    let send = |gateway: &Gateway, method: &str, rest: &str| -> (u16, serde_json::Value) {
        let target = format!("/api/v1/breakers/{rest}");
        let response = Client::connect(gateway.admin).request(method, &target, &[("host", "localhost")], b"");
        (response.status, serde_json::from_slice(&response.body).unwrap_or_default())
    };
    let count = |reply: &serde_json::Value, key: &str| reply[key].as_array().map_or(0, Vec::len);
    let status = |gateway: &Gateway| gateway.get("/", &[]).status;
    let (one, other) = (node("one"), node("other"));
    let opened = || {
        let (status, reply) = send(&one, "POST", "route/all?state=open&for=1h");
        (status, count(&reply, "acknowledged_nodes"), count(&reply, "unacknowledged_nodes"))
    };
    // Both nodes must have subscribed to the bus.
    wait_for(|| opened() == (200, 2, 0), 10 * SECOND);
    wait_for(|| (status(&one), status(&other)) == (503, 503), 5 * SECOND);
    let late = node("late");
    wait_for(|| status(&late) == 503, 10 * SECOND);
    // A state of one node hides that of the fleet until it expires.
    assert_eq!(send(&other, "POST", "route/all?state=closed&for=2s&node=one").0, 200);
    wait_for(|| status(&one) == 200, 5 * SECOND);
    assert_eq!(status(&other), 503);
    wait_for(|| status(&one) == 503, 5 * SECOND);
    // The later one of a route and of its upstream applies.
    let (code, reply) = send(&other, "POST", "upstream/origin?state=closed&for=1h&node=one");
    assert_eq!((code, &reply["acknowledged_nodes"]), (200, &serde_json::json!(["one"])), "{reply}");
    wait_for(|| status(&one) == 200, 5 * SECOND);
    assert_eq!((status(&other), status(&late)), (503, 503));
    // The end of the state of an upstream leaves those of its routes.
    assert_eq!(send(&other, "DELETE", "upstream/origin").0, 200);
    wait_for(|| status(&one) == 503, 5 * SECOND);
    assert_eq!((status(&other), status(&late)), (503, 503));
    assert_eq!(send(&other, "POST", "route/all?state=open&for=1h&node=one").0, 200);
    let (code, reply) = send(&other, "DELETE", "route/all");
    assert_eq!((code, count(&reply, "acknowledged_nodes")), (200, 3), "{reply}");
    wait_for(|| [&one, &other, &late].map(status) == [200; 3], 5 * SECOND);
    assert_eq!(other.process.stderr.events("breaker_override_ended").len(), 1);
    assert_eq!(send(&one, "POST", "route/all?state=open&for=1h&node=nobody").0, 400);
    // Without Redis, a state is that of this node.
    drop(redis);
    let (code, reply) = send(&one, "POST", "route/all?state=open&for=1s");
    let missing = count(&reply, "unreachable_servers");
    assert_eq!((code, &reply["acknowledged_nodes"], missing), (202, &serde_json::json!(["one"]), 1), "{reply}");
    assert_eq!((status(&one), status(&other)), (503, 200));
    let ended = || one.process.stderr.events("breaker_override_ended");
    wait_for(|| ended().iter().any(|event| event["reason"] == "expired"), 5 * SECOND);
}

#[test]
fn fallback_regions_are_read_in_order() {
    let (eu, us, origin) = (Redis::start(), Redis::start(), origin("max-age=60", Duration::ZERO));
    let (eu_url, us_url) = (eu.url(), us.url());
    let regions = [("default", eu_url.as_str()), ("eu", &eu_url), ("us", &us_url)];
    let config = cached(&origin, LONG_DEADLINE, &regions)
        .replace("[redis.regions.us]", "[redis.regions.us]\nfallback = [\"eu\", \"default\"]");
    let [one, other] = gateways(&config);
    one.get("/a", &[("x-region", "eu")]);
    one.get("/b", &[("x-region", "us")]);
    wait_for(|| eu.entries().len() == 1 && us.entries().len() == 1, 5 * SECOND);
    let found = other.get("/a", &[("x-region", "us")]);
    assert!(cache_detail(&found).starts_with("remote eu:"), "{}", found.cache_status());
    let again = other.get("/a", &[("x-region", "us")]);
    assert!(again.is_hit() && !cache_detail(&again).starts_with("remote"), "{}", again.cache_status());
    // Fallback is one-way, and a dead region does not affect the others.
    assert!(!other.get("/b", &[("x-region", "eu")]).is_hit());
    us.kill();
    one.get("/c", &[("x-region", "eu")]);
    wait_for(|| eu.entries().len() == 3, 5 * SECOND);
    wait_for(|| cache_detail(&other.get("/c", &[("x-region", "us")])).contains("eu:"), 5 * SECOND);
}

#[test]
fn gateway_starts_without_redis_and_connects_when_it_appears() {
    let (port, origin) = (free_port(), origin("max-age=60", Duration::ZERO));
    let [one, other] = gateways(&cached(&origin, DEFAULT_DEADLINE, &[("default", &server::url(port))]));
    let (mut here, mut there) = (one.connect(), other.connect());
    // Connection attempts are rare, so it takes some time until a gateway reports the shard as
    // degraded.
    let mut n = 0;
    let is_degraded = || {
        n += 1;
        let target = format!("/absent/{n}");
        let (first, second) = (here.get(&target, &[]), here.get(&target, &[]));
        assert_eq!((first.status, first.text(), second.status), (200, target, 200));
        assert!(second.is_hit(), "the local cache still works: {}", second.cache_status());
        degraded(&one) == [format!("shard default 127.0.0.1:{port}")]
    };
    wait_for(is_degraded, 5 * SECOND);

    let redis = Redis::start_on(port);
    let began = Instant::now();
    wait_for(|| is_shared(&mut here, &mut there, &redis), 5 * SECOND);
    println!("redis absent at the start, {n} requests before it appeared: shared {:?} after that", began.elapsed());
    // Reads resume through the half-open breaker, one probe at a time.
    wait_for(|| is_shared(&mut here, &mut there, &redis) && degraded(&one).is_empty(), 5 * SECOND);
}

#[test]
fn killed_redis_fails_no_request() {
    let origin_takes = 5 * MS;
    let (redis, origin) = (Redis::start(), origin("max-age=1", origin_takes));
    let both = gateways(&cached(&origin, DEFAULT_DEADLINE, &[("default", &redis.url())]));
    let mut restarted = None;
    let samples = Load { interval: 4 * MS, duration: 5 * SECOND }.run(&both, mixed, |load| {
        load.at(SECOND);
        let port = redis.kill();
        load.at(3 * SECOND);
        restarted = Some(Redis::start_on(port));
    });
    let (before, down, after) = (during(&samples, 0, 1), during(&samples, 1, 3), during(&samples, 3, 5));
    let back = first_remote(&after).map(|at| at - 3 * SECOND);
    println!("redis killed: {}", summary(&[("before", &before), ("down", &down), ("after", &after)]));
    println!("redis killed: remote hits again {back:?} after the restart began");
    assert!(samples.iter().all(|sample| sample.status == 200), "{:?}", statuses(&samples));
    assert!(before.iter().any(|sample| sample.remote), "remote hits before the fault");
    let worst = samples.iter().map(|sample| sample.latency).max().unwrap_or_default();
    assert!(worst < 20 * MS + origin_takes + SLACK, "{worst:?}");
    assert!(back.is_some(), "no remote hit within two seconds");
}

#[test]
fn hung_redis_delays_few_requests_by_the_deadline() {
    let (redis, origin) = (Redis::start(), origin("max-age=1", 5 * MS));
    let both = gateways(&cached(&origin, DEFAULT_DEADLINE, &[("default", &redis.url())]));
    let samples = Load { interval: 4 * MS, duration: 8 * SECOND }.run(&both, mixed, |load| {
        load.at(SECOND);
        redis.freeze();
        load.at(3 * SECOND);
        redis.thaw();
    });
    let (before, hung, after) = (during(&samples, 0, 1), during(&samples, 1, 3), during(&samples, 3, 8));
    let back = first_remote(&after).map(|at| at - 3 * SECOND);
    println!("redis hung: {}", summary(&[("before", &before), ("hung", &hung), ("after", &after)]));
    println!("redis hung: remote hits again {back:?} after it resumed");
    assert!(samples.iter().all(|sample| sample.status == 200), "{:?}", statuses(&samples));
    assert!(before.iter().any(|sample| sample.remote), "remote hits before the fault");
    let slow = hung.iter().filter(|sample| sample.latency > 50 * MS + SLACK).count();
    assert!(slow * 100 <= hung.len(), "{slow} of {}", hung.len());
    assert!(back.is_some(), "no remote hit within five seconds");
}

/// Error replies of a server, one kind after the other, each for one second at 500 requests per
/// second.
#[test]
fn redis_error_replies_fail_no_request_and_are_reported() {
    let (redis, origin) = (Redis::start(), origin("max-age=1", 5 * MS));
    let execute = |command: &str| {
        let parts: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
        redis.command(&parts);
    };
    let user = "ACL SETUSER gate on >pw ~* +@all";
    execute(user);
    let url = redis.url().replace("redis://", "redis://gate:pw@");
    let both = gateways(&cached(&origin, DEFAULT_DEADLINE, &[("default", &url)]));
    let faults: [(&str, &[&str], &[&str]); 5] = [
        ("read_only", &["REPLICAOF 127.0.0.1 1"], &["REPLICAOF NO ONE"]),
        (
            "master_down",
            &["CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"],
            &["REPLICAOF NO ONE", "CONFIG SET replica-serve-stale-data yes"],
        ),
        (
            "out_of_memory",
            &["CONFIG SET maxmemory-policy noeviction", "CONFIG SET maxmemory 1"],
            &["CONFIG SET maxmemory 0"],
        ),
        ("timeout", &["CLIENT PAUSE 1000 ALL"], &[]),
        ("denied", &["ACL DELUSER gate"], &[user]),
    ];
    let mut degraded_by = Vec::new();
    let phases = u32::try_from(faults.len()).expect("few");
    let samples = Load::offering(500, SECOND * (1 + 3 * phases)).run(&both, mixed, |load| {
        for (n, (name, break_commands, repair_commands)) in (0..).zip(&faults) {
            load.at(SECOND * (1 + 3 * n));
            break_commands.iter().for_each(|command| execute(command));
            for check in 2..10 {
                load.at(SECOND * (1 + 3 * n) + 100 * MS * check);
                if !degraded(&both[0]).is_empty() {
                    degraded_by.push(*name);
                    break;
                }
            }
            load.at(SECOND * (2 + 3 * n));
            repair_commands.iter().for_each(|command| execute(command));
        }
    });
    for (n, (name, ..)) in (0..).zip(&faults) {
        let (broken, after) = (during(&samples, 1 + 3 * n, 2 + 3 * n), during(&samples, 2 + 3 * n, 4 + 3 * n));
        let back = first_remote(&after).map(|at| at - Duration::from_secs(2 + 3 * n));
        println!("{name}: {}; remote hits again after {back:?}", summary(&[("broken", &broken), ("after", &after)]));
        let slow = broken.iter().filter(|sample| sample.latency > 50 * MS + SLACK).count();
        assert!(slow * 100 <= broken.len(), "{name}: {slow} of {}", broken.len());
        assert!(back.is_some(), "{name}: no remote hit within two seconds");
        let endpoint = redis.url().replace("redis://", "");
        let count = |metric: &str, label: &str| {
            let series = format!("{metric}{{region=\"default\",endpoint=\"{endpoint}\",{label}=\"{name}\"}}");
            both.iter().map(|gateway| gateway.metric(&series)).sum::<f64>()
        };
        // The bus may hit the fault before the first request; then the shard is not read.
        let counted = count("tidegate_shard_reads_total", "result")
            + count("tidegate_shard_writes_total", "result")
            + count("tidegate_shard_bus_faults_total", "fault");
        assert!(counted > 0.0, "{name} is not counted");
    }
    assert!(samples.iter().all(|sample| sample.status == 200), "{:?}", statuses(&samples));
    assert_eq!(degraded_by, faults.map(|(name, ..)| name), "on /ready");
    wait_for(|| degraded(&both[0]).is_empty() && degraded(&both[1]).is_empty(), 5 * SECOND);
}

/// Nine of ten requests are for one page of one region.
#[test]
fn hot_key_is_reported_and_pinned_in_memory() {
    let (servers, origin) = ([Redis::start(), Redis::start()], origin("max-age=60", Duration::ZERO));
    let urls = servers.each_ref().map(Redis::url);
    let config = cached(&origin, LONG_DEADLINE, &[("default", &urls.join("\", \""))]);
    let gateway = [Gateway::start(&format!(
        "{config}[cache]\nmemory = \"1MiB\"\nobject_bytes = \"1MiB\"\nhot_rate = \"100/s\"\n"
    ))];
    let hot =
        || -> serde_json::Value { serde_json::from_slice(&gateway[0].admin("/api/v1/hot").body).expect("a JSON body") };
    assert_eq!((gateway[0].metric("tidegate_hot_keys"), hot()["keys"].as_array().map(Vec::len)), (0.0, Some(0)));
    let mostly_one = |client, n| if n % 10 < 9 { "/order".to_owned() } else { format!("/{client}/{n}") };
    let samples = Load::offering(500, 4 * SECOND).run(&gateway, mostly_one, |load| {
        load.at(2 * SECOND);
        let is_reported = || {
            let reply = hot();
            let (key, rate) = (reply["keys"][0]["key"].as_str(), reply["keys"][0]["per_second"].as_f64());
            key.is_some_and(|key| key.contains("/order")) && rate.is_some_and(|rate| (250.0..900.0).contains(&rate))
        };
        wait_for(is_reported, 2 * SECOND);
        assert_eq!(gateway[0].metric("tidegate_hot_keys"), 1.0);
    });
    assert!(samples.iter().all(|sample| sample.status == 200));
    wait_for(|| gateway[0].metric("tidegate_hot_keys") == 0.0, 10 * SECOND);
}

/// A restarted server replies with an error while it loads its data, for two seconds here.
#[test]
fn loading_server_fails_no_request() {
    let (origin, dir) = (origin("max-age=1", 5 * MS), support::TempDir::new());
    let redis = Redis::start_with(free_port(), &["--dir", &dir.path().display().to_string()]);
    let both = gateways(&cached(&origin, DEFAULT_DEADLINE, &[("default", &redis.url())]));
    let path = dir.path().display().to_string();
    redis.command(&[b"EVAL", b"for n = 1, 2000 do redis.call('SET', 'filler' .. n, string.rep('x', 100)) end", b"0"]);
    let (mut restarted, mut is_reported) = (None, false);
    let samples = Load::offering(500, 7 * SECOND).run(&both, mixed, |load| {
        load.at(SECOND);
        redis.command(&[b"SAVE"]);
        let port = redis.kill();
        let slow_load = ["--dir", &path, "--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"];
        restarted = Some(Redis::start_with(port, &slow_load));
        for check in 0..10 {
            load.at(SECOND + 200 * MS * check);
            is_reported |= !degraded(&both[0]).is_empty();
        }
    });
    let (before, loading, after) = (during(&samples, 0, 1), during(&samples, 1, 3), during(&samples, 3, 7));
    let back = first_remote(&after).map(|at| at - 3 * SECOND);
    println!("loading: {}", summary(&[("before", &before), ("loading", &loading), ("after", &after)]));
    println!("loading: remote hits again {back:?} after the expected end");
    assert!(samples.iter().all(|sample| sample.status == 200), "{:?}", statuses(&samples));
    let slow = loading.iter().filter(|sample| sample.latency > 50 * MS + SLACK).count();
    assert!(slow * 100 <= loading.len(), "{slow} of {}", loading.len());
    let endpoint = restarted.as_ref().expect("a restarted server").url().replace("redis://", "");
    let count = |operation: &str| {
        let series = format!(
            "tidegate_shard_{operation}_total{{region=\"default\",endpoint=\"{endpoint}\",result=\"loading\"}}"
        );
        both.iter().map(|gateway| gateway.metric(&series)).sum::<f64>()
    };
    assert!(is_reported, "/ready does not report the shard");
    // Nothing is read or written without a subscription, so the subscription meets the error.
    let series =
        format!("tidegate_shard_bus_faults_total{{region=\"default\",endpoint=\"{endpoint}\",fault=\"loading\"}}");
    let bus_faults = both.iter().map(|gateway| gateway.metric(&series)).sum::<f64>();
    assert!(count("reads") + count("writes") + bus_faults > 0.0, "loading is not counted");
    assert!(back.is_some(), "no remote hit within four seconds");
}

/// A server that is out of memory rejects a purge. The purge takes effect locally at once, and on
/// the other nodes when the server has memory again.
#[test]
fn purge_with_full_redis_takes_effect_locally_and_is_published_later() {
    let (redis, origin) = (Redis::start(), origin("max-age=600", Duration::ZERO));
    let [one, other] = gateways(&cached(&origin, LONG_DEADLINE, &[("default", &redis.url())]));
    let host = [("host", "shop.example")];
    one.get("/a", &host);
    wait_for(|| redis.entries().len() == 1, 5 * SECOND);
    wait_for(|| other.get("/a", &host).is_hit(), 5 * SECOND);
    redis.command(&[b"CONFIG", b"SET", b"maxmemory", b"1"]);
    let order = ["purge", "--url", "http://shop.example/a", "--admin", &one.admin.to_string()];
    let output = support::tidegate().args(order).output().expect("the command runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(text.contains(&redis.url().replace("redis://", "")), "the output names the server: {text}");
    assert_eq!(one.metric("tidegate_purges_pending"), 1.0);
    let requests = origin.count();
    assert_eq!(
        (one.get("/a", &host).status, origin.count()),
        (200, requests + 1),
        "neither the local cache nor Redis has the object"
    );
    redis.command(&[b"CONFIG", b"SET", b"maxmemory", b"0"]);
    wait_for(|| one.metric("tidegate_purges_pending") == 0.0, 10 * SECOND);
    wait_for(|| other.metric("tidegate_bus_messages_total{kind=\"purge\"}") == 1.0, 5 * SECOND);
    let response = other.get("/a", &host);
    assert!(!response.is_hit() || is_remote(&response), "the local copy was purged: {}", response.cache_status());
}

#[test]
fn dead_redis_of_one_region_does_not_affect_another() {
    let (eu, us, origin) = (Redis::start(), Redis::start(), origin("max-age=60", Duration::ZERO));
    let (eu_url, us_url) = (eu.url(), us.url());
    let regions = [("default", eu_url.as_str()), ("eu", &eu_url), ("us", &us_url)];
    let [one, other] = gateways(&cached(&origin, LONG_DEADLINE, &regions));
    eu.kill();
    let (mut here, mut there) = (one.connect(), other.connect());
    for n in 0..40 {
        let target = format!("/{n}");
        for client in [&mut here, &mut there] {
            let response = client.get(&target, &[("x-region", "eu")]);
            assert_eq!((response.status, response.is_hit()), (200, false), "{}", response.cache_status());
        }
        assert_eq!(here.get(&target, &[("x-region", "us")]).status, 200);
        wait_for(|| us.entries().len() == n + 1, 5 * SECOND);
        let response = there.get(&target, &[("x-region", "us")]);
        assert!(is_remote(&response), "{n}: {}", response.cache_status());
    }
    assert!(degraded(&other).iter().all(|name| !name.contains("us")), "{:?}", degraded(&other));
}

#[test]
fn corrupt_entry_is_never_served() {
    let (redis, origin) = (Redis::start(), origin("max-age=60", Duration::ZERO));
    let [one, other] = gateways(&cached(&origin, LONG_DEADLINE, &[("default", &redis.url())]));
    let reads = |result: &str| {
        let endpoint = redis.url().replace("redis://", "");
        let labels = format!("{{region=\"default\",endpoint=\"{endpoint}\",result=\"{result}\"}}");
        other.metric(&format!("tidegate_shard_reads_total{labels}"))
    };
    let (mut here, mut there) = (one.connect(), other.connect());
    // Offsets in the entry: magic, digest, MAC, metadata, body.
    for (n, at) in [0, 20, 80, 110, -1].into_iter().enumerate() {
        let target = format!("/flipped/{n}");
        let before = redis.entries();
        assert_eq!(here.get(&target, &[]).status, 200);
        wait_for(|| redis.entries().len() > before.len(), 5 * SECOND);
        let key = redis.entries().into_iter().find(|key| !before.contains(key)).expect("a new key");
        let corrupt = flip(&redis, &key, at);

        // A connection that delivered a corrupt entry is replaced; lookups meanwhile are misses.
        wait_for(|| is_shared(&mut here, &mut there, &redis), 5 * SECOND);
        let response = there.get(&target, &[]);
        assert_eq!((response.status, response.text(), response.is_hit()), (200, target, false));
        assert_eq!(reads("corrupt"), n as f64 + 1.0);
        // The valid response replaces the corrupt entry.
        wait_for(|| redis.value(&key).is_some_and(|value| value != corrupt), 5 * SECOND);
    }
}

#[test]
fn cluster_limit_is_enforced_over_two_gateways() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let both = gateways(&limited(&origin, &[("default", &redis.url())]));
    let samples = Load::offering(OFFERED, 12 * SECOND).run(&both, root, |_| {});
    println!("cluster limit: admitted per second {:?}", admitted(&samples, 0, 12));
    assert!(samples.iter().all(|sample| matches!(sample.status, 200 | 429)), "{:?}", statuses(&samples));
    let offered = during(&samples, 2, 12).len();
    assert!(offered > 9 * OFFERED, "the clients offered only {offered} in ten seconds");
    // The count of the origin equals that of the clients.
    assert_eq!(origin.count(), samples.iter().filter(|sample| sample.status == 200).count());
    let total: usize = admitted(&samples, 2, 12).iter().sum();
    println!("cluster limit: {total} of {} in ten seconds, {offered} offered", 10 * RATE);
    assert!(total.abs_diff(10 * RATE) * 100 <= 3 * 10 * RATE, "{total}");
}

#[test]
fn cluster_limit_continues_while_redis_is_down() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let both = gateways(&limited(&origin, &[("default", &redis.url())]));
    let mut restarted = None;
    let samples = Load::offering(OFFERED, 10 * SECOND).run(&both, root, |load| {
        load.at(3 * SECOND);
        let port = redis.kill();
        load.at(6 * SECOND);
        restarted = Some(Redis::start_on(port));
    });
    let seconds = admitted(&samples, 2, 10);
    println!("cluster limit, redis killed at 3 s and back at 6 s: admitted per second from 2 s on {seconds:?}");
    check_outage(&samples, &seconds);
}

#[test]
fn cluster_limit_continues_while_redis_hangs() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let both = gateways(&limited(&origin, &[("default", &redis.url())]));
    let samples = Load::offering(OFFERED, 10 * SECOND).run(&both, root, |load| {
        load.at(3 * SECOND);
        redis.freeze();
        load.at(6 * SECOND);
        redis.thaw();
    });
    let seconds = admitted(&samples, 2, 10);
    println!("cluster limit, redis hung from 3 s to 6 s: admitted per second from 2 s on {seconds:?}");
    check_outage(&samples, &seconds);
}

#[test]
fn stopped_gateway_returns_its_share() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let [one, other] = gateways(&limited(&origin, &[("default", &redis.url())]));
    let mut busy = [other];
    Load::offering(OFFERED, 2 * SECOND).run(&busy, root, |_| {});
    busy[0].process.signal("TERM");
    assert!(busy[0].process.wait(5 * SECOND).is_some_and(|status| status.success()), "the drain completes");
    let samples = Load::offering(OFFERED, 4 * SECOND).run(&[one], root, |_| {});
    let seconds = admitted(&samples, 0, 4);
    println!("cluster limit, after the busier of two gateways ended: admitted per second {seconds:?}");
    assert!(seconds[1..].iter().sum::<usize>() * 10 > 3 * 9 * RATE, "{seconds:?}");
}

/// A killed process returns no tokens. Its successor gets the whole rate within seconds.
#[test]
fn killed_and_restarted_gateway_regains_its_share() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let config = limited(&origin, &[("default", &redis.url())]).replace("nodes = 2", "nodes = 1");
    let mut first = [Gateway::start(&config)];
    Load::offering(OFFERED, 2 * SECOND).run(&first, root, |_| {});
    first[0].process.kill();
    let samples = Load::offering(OFFERED, 8 * SECOND).run(&[Gateway::start(&config)], root, |_| {});
    let seconds = admitted(&samples, 0, 8);
    println!("cluster limit, single gateway killed and restarted: admitted per second {seconds:?}");
    let last: usize = seconds[4..].iter().sum();
    assert!(last * 100 > 4 * 93 * RATE && last * 100 < 4 * 105 * RATE, "{seconds:?}");
}

/// Twenty seconds at five times the limit over four processes.
#[test]
fn cluster_limit_is_accurate_over_four_gateways() {
    let (redis, origin) = (Redis::start(), origin("no-store", Duration::ZERO));
    let config = limited(&origin, &[("default", &redis.url())]).replace("nodes = 2", "nodes = 4");
    let fleet: Vec<_> = (0..4).map(|_| Gateway::start(&config)).collect();
    let samples = Load::offering(OFFERED, 20 * SECOND).run(&fleet, root, |_| {});
    let seconds = admitted(&samples, 0, 20);
    println!("cluster limit over four gateways: admitted per second {seconds:?}");
    let (all, steady) = (seconds.iter().sum::<usize>(), seconds[2..].iter().sum::<usize>());
    assert!(samples.iter().all(|sample| matches!(sample.status, 200 | 429)), "{:?}", statuses(&samples));
    assert_eq!(origin.count(), samples.iter().filter(|sample| sample.status == 200).count());
    // Never more than rate and burst, and at least 93 % of the rate.
    assert!(all <= 20 * RATE + BURST, "{seconds:?}");
    assert!(steady * 100 >= 18 * 93 * RATE, "{seconds:?}");
}

#[test]
fn cluster_limit_without_redis_is_local() {
    let origin = origin("no-store", Duration::ZERO);
    let gateway = Gateway::start(&limited(&origin, &[]));
    let samples = Load::offering(OFFERED, 6 * SECOND).run(&[gateway], root, |_| {});
    println!("cluster limit without redis: admitted per second {:?}", admitted(&samples, 0, 6));
    assert!(samples.iter().all(|sample| matches!(sample.status, 200 | 429)), "{:?}", statuses(&samples));
    let total: usize = admitted(&samples, 1, 6).iter().sum();
    assert!(total.abs_diff(5 * RATE) * 100 <= 3 * 5 * RATE, "{total}");
}

fn check_outage(samples: &[Sample], seconds: &[usize]) {
    assert!(samples.iter().all(|sample| matches!(sample.status, 200 | 429)), "{:?}", statuses(samples));
    // The count of a second is exact except for requests that the scheduler shifts over its
    // boundaries.
    assert!(seconds.iter().all(|&count| count * 20 <= 21 * RATE), "{seconds:?}");
    // A bucket of a restarted server starts empty and is not charged for tokens admitted without
    // it. A hang, and its end, are detected a fraction of a second late.
    assert!(seconds.iter().all(|&count| count * 2 > RATE), "{seconds:?}");
    let last: usize = seconds[6..].iter().sum();
    assert!(last * 10 > 2 * 9 * RATE, "{last} in the last two seconds");
}

/// Responses with the target as the body.
fn origin(cache_control: &'static str, takes: Duration) -> Origin {
    Origin::start(move |request| {
        let length = request.target.len().to_string();
        let fields = [("Cache-Control", cache_control), ("Content-Type", "text/plain"), ("Content-Length", &length)];
        Script::new().pause(takes).head(200, &fields).send(&request.target)
    })
}

fn gateways(config: &str) -> [Gateway; 2] {
    [Gateway::start(config), Gateway::start(config)]
}

fn cached(origin: &Origin, deadline: &str, regions: &[(&str, &str)]) -> String {
    one_route(origin.address, CACHED, &rest(deadline, regions))
}

fn limited(origin: &Origin, regions: &[(&str, &str)]) -> String {
    let rule = format!("[limits.cluster]\ntier = \"cluster\"\nrate = \"{RATE}/s\"\nburst = {BURST}\n");
    one_route(origin.address, LIMITED, &(rule + &rest(DEFAULT_DEADLINE, regions)))
}

fn rest(deadline: &str, regions: &[(&str, &str)]) -> String {
    let mut text = "[log]\naccess = \"off\"\n[identity]\nregion = [\"header:x-region\"]\n".to_owned();
    if !regions.is_empty() {
        text.push_str(&format!("[redis]\ndeadline = \"{deadline}\"\nnodes = 2\nsecret = \"scenario\"\n"));
    }
    for (region, url) in regions {
        text.push_str(&format!("[redis.regions.{region}]\nendpoints = [\"{url}\"]\n"));
    }
    text
}

/// The `detail` parameter of the gateway's member of `Cache-Status`: cache layer, region and slot.
fn cache_detail(response: &ClientResponse) -> String {
    let detail = response.cache_status().split_once("detail=\"").map(|(_, rest)| rest.trim_end_matches('"'));
    detail.unwrap_or_default().to_owned()
}

fn is_remote(response: &ClientResponse) -> bool {
    cache_detail(response).starts_with("remote ")
}

/// The slot of the server's only entry.
fn slot(redis: &Redis) -> u16 {
    let keys = redis.entries();
    let [key] = keys.as_slice() else { panic!("one entry: {keys:?}") };
    let slot = key.split([':', '}']).nth(2).and_then(|slot| slot.parse().ok());
    slot.unwrap_or_else(|| panic!("no slot in {key}"))
}

/// Degraded components that `/ready` reports; the gateway is still ready.
fn degraded(gateway: &Gateway) -> Vec<String> {
    let response = gateway.admin("/ready");
    assert_eq!(response.status, 200, "{}", response.text());
    let body: serde_json::Value = serde_json::from_slice(&response.body).expect("a JSON body");
    body["degraded"].as_array().into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// Whether a new response currently passes from one gateway through Redis to the other. The
/// connection of a client stays on one worker thread, and therefore on one connection to Redis.
fn is_shared(one: &mut Client, other: &mut Client, redis: &Redis) -> bool {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let target = format!("/fresh/{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let (began, before) = (Instant::now(), redis.entries());
    assert_eq!(one.get(&target, &[]).status, 200);
    while redis.entries().iter().all(|key| before.contains(key)) {
        if began.elapsed() > 200 * MS {
            return false;
        }
        sleep(MS);
    }
    let response = other.get(&target, &[]);
    assert_eq!(response.status, 200);
    is_remote(&response)
}

/// Inverts the byte at offset `at` (`-1`: the last byte) and returns the new value.
fn flip(redis: &Redis, key: &str, at: i64) -> Vec<u8> {
    let mut value = redis.value(key).expect("an entry");
    let at = usize::try_from(at).unwrap_or(value.len() - 1);
    value[at] ^= 0xff;
    redis.command(&[b"SETRANGE", key.as_bytes(), at.to_string().as_bytes(), &value[at..=at]]);
    value
}

/// Load of clients that each send requests to one gateway at a constant rate on one connection.
struct Load {
    interval: Duration,
    duration: Duration,
}

/// Start time of a load.
struct LoadStart(Instant);

/// One response: its time since the start of the load, and its latency.
struct Sample {
    at: Duration,
    latency: Duration,
    status: u16,
    remote: bool,
}

impl Load {
    const CLIENTS: u32 = 4;

    /// Load of `per_second` requests for all clients together.
    fn offering(per_second: usize, duration: Duration) -> Load {
        Load { interval: SECOND * Load::CLIENTS / u32::try_from(per_second).expect("a small number"), duration }
    }

    /// Runs the load while `meanwhile` runs. A client that is behind schedule sends without delay
    /// until it has caught up.
    fn run(
        &self,
        gateways: &[Gateway],
        target: impl Fn(u32, u32) -> String + Sync,
        meanwhile: impl FnOnce(&LoadStart),
    ) -> Vec<Sample> {
        let start = LoadStart(Instant::now());
        let run_client = |client: u32| {
            let mut samples = Vec::new();
            let mut connection = gateways[client as usize % gateways.len()].connect();
            for n in 0.. {
                let due = self.interval * n + self.interval * client / Load::CLIENTS;
                if due >= self.duration || start.0.elapsed() >= self.duration {
                    break;
                }
                start.at(due);
                let sent = Instant::now();
                let target = target(client, n);
                let response = connection.get(&target, &[]);
                let (at, latency) = (start.0.elapsed(), sent.elapsed());
                assert!(response.status != 200 || response.text() == target, "the body of another page");
                samples.push(Sample { at, latency, status: response.status, remote: is_remote(&response) });
            }
            samples
        };
        scope(|scope| {
            let run_client = &run_client;
            let clients: Vec<_> = (0..Load::CLIENTS).map(|client| scope.spawn(move || run_client(client))).collect();
            meanwhile(&start);
            clients.into_iter().flat_map(|client| client.join().expect("no panic")).collect()
        })
    }
}

impl LoadStart {
    /// Waits until `age` after the start.
    fn at(&self, age: Duration) {
        sleep(age.saturating_sub(self.0.elapsed()));
    }
}

/// One of 200 targets in a pseudo-random order, so that hits, cache layers and ages vary.
fn mixed(client: u32, n: u32) -> String {
    let hash = (n * Load::CLIENTS + client).wrapping_mul(0x9e37_79b1) >> 16;
    format!("/{}", hash % 200)
}

fn root(_client: u32, _n: u32) -> String {
    "/".to_owned()
}

/// Samples between two seconds.
fn during(samples: &[Sample], from: u64, to: u64) -> Vec<&Sample> {
    let window = Duration::from_secs(from)..Duration::from_secs(to);
    samples.iter().filter(|sample| window.contains(&sample.at)).collect()
}

fn first_remote(samples: &[&Sample]) -> Option<Duration> {
    samples.iter().filter(|sample| sample.remote).map(|sample| sample.at).min()
}

/// Admitted requests per second in a range of seconds.
fn admitted(samples: &[Sample], from: u64, to: u64) -> Vec<usize> {
    let passed = |second| during(samples, second, second + 1).iter().filter(|sample| sample.status == 200).count();
    (from..to).map(passed).collect()
}

fn statuses(samples: &[Sample]) -> BTreeMap<u16, usize> {
    samples.iter().fold(BTreeMap::new(), |mut counts, sample| {
        *counts.entry(sample.status).or_default() += 1;
        counts
    })
}

/// Formats statistics of time windows.
fn summary(windows: &[(&str, &[&Sample])]) -> String {
    let describe = |(name, samples): &(&str, &[&Sample])| {
        let mut times: Vec<_> = samples.iter().map(|sample| sample.latency).collect();
        times.sort_unstable();
        let quantile = |permille: usize| times.get(times.len() * permille / 1000).copied().unwrap_or_default();
        let remote = samples.iter().filter(|sample| sample.remote).count();
        let slow = times.iter().filter(|latency| **latency > 50 * MS).count();
        let (median, p99, worst) = (quantile(500), quantile(990), times.last().copied().unwrap_or_default());
        format!(
            "{name}: {} requests, {remote} remote, median {median:.1?}, p99 {p99:.1?}, worst {worst:.1?}, {slow} over 50 ms",
            times.len()
        )
    };
    windows.iter().map(describe).collect::<Vec<_>>().join("; ")
}

/// Another gateway stores a response with its cookie; one that is configured to keep cookies
/// private does not serve it.
#[test]
fn a_cookie_that_another_gateway_shares_is_not_served_by_a_private_one() {
    let redis = Redis::start();
    let fields = [("Cache-Control", "max-age=60"), ("Set-Cookie", "session=1")];
    let origin = Origin::start(move |_| Script::ok(&fields, ""));
    let start = |set_cookie: &str| {
        let remote = format!(
            "[redis]\ndeadline = \"{LONG_DEADLINE}\"\n[redis.regions.default]\nendpoints = [\"{}\"]\n",
            redis.url()
        );
        Gateway::start(&one_route(origin.address, &format!("cache = {{ set_cookie = \"{set_cookie}\" }}"), &remote))
    };
    let (sharing, private) = (start("shared"), start("private"));
    sharing.get("/a", &[]);
    wait_for(|| redis.entries().len() == 1, 5 * SECOND);
    let response = private.get("/a", &[]);
    assert!(!response.is_hit() && origin.count() == 2, "{}", response.cache_status());
    assert!(sharing.get("/a", &[]).is_hit());
}

/// Regions north and south, north the default one, and none named `default`.
#[test]
fn any_configured_region_can_be_the_default_one() {
    let (north, south, origin) = (Redis::start(), Redis::start(), origin("max-age=60", Duration::ZERO));
    let region = |name: &str, redis: &Redis| format!("[redis.regions.{name}]\nendpoints = [\"{}\"]\n", redis.url());
    let rest = format!(
        "[identity]\nregion = [\"header:x-region\"]\nregion_default = \"north\"\n\
         [limits.cluster]\ntier = \"cluster\"\nrate = \"1000/s\"\nburst = 1000\n\
         [redis]\ndeadline = \"{LONG_DEADLINE}\"\n{}{}",
        region("north", &north),
        region("south", &south),
    );
    let route = "limits = [\"cluster\"]\ncache = { mode = \"standard\" }";
    let gateway = Gateway::start(&one_route(origin.address, route, &rest));
    // The bucket of a cluster limit starts empty.
    wait_for(|| gateway.get("/a", &[]).is_hit(), 5 * SECOND);
    wait_for(|| gateway.get("/a", &[("X-Region", "south")]).is_hit(), 5 * SECOND);
    for name in ["north", "default", "unknown", ""] {
        wait_for(|| gateway.get("/a", &[("X-Region", name)]).is_hit(), 5 * SECOND);
    }
    // Neither server has an entry of another region.
    wait_for(|| north.entries().len() == 1 && south.entries().len() == 1, 5 * SECOND);
    // The bucket of the cluster limit is on a server of the default region.
    let has_bucket = |redis: &Redis| redis.keys().iter().any(|key| key.starts_with("tg:lease:"));
    wait_for(|| has_bucket(&north), 5 * SECOND);
    assert!(!has_bucket(&south));
    // A write removes the response from every configured region.
    gateway.request("POST", "/a", &[], b"");
    assert!(["north", "south"].iter().all(|name| !gateway.get("/a", &[("X-Region", name)]).is_hit()));
}
