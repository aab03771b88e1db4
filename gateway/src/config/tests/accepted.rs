//! Accepted documents and the resulting configurations.

use std::path::PathBuf;
use std::time::Duration;

use super::super::document;
use super::super::node::{DocumentEntry, DocumentNode, DocumentValue};
use super::super::{Config, DocumentFormat, LogConfig, ServerConfig};
use super::{MINIMAL, debug_text, parse, parse_toml};
use crate::breaker::{BreakerMode, BreakerScope};
use crate::endpoint::{BalanceConfig, BalancePolicy, EjectConfig, EndpointAddress};
use crate::http::limits::GetBodyPolicy;
use crate::http::target::{EncodedSlashPolicy, PathNormalisation, PathRules};
use crate::identify::{ForwardedField, IdentitySource};
use crate::log::{AccessLogFormat, AccessLogTarget, LogField};
use crate::proxy_protocol::ProxyProtocolMode;
use crate::route::{ForwardPath, HostPattern, PathPattern, TimeoutOverrides};
use crate::spans::{ExportCompression, TracingConfig};
use crate::upstream::{HashKey, HealthConfig};
use crate::{accept, admin, cache, degrade, identify, limit, upstream};

#[test]
fn absent_keys_have_their_defaults() {
    let (config, warnings) = parse_toml(MINIMAL).expect("the minimal document is valid");
    assert!(warnings.is_empty());
    let endpoint = EndpointAddress::http("127.0.0.1", 3000);
    assert_eq!(config.server, ServerConfig::default());
    assert_eq!(config.listen, [accept::ListenConfig::default()]);
    assert_eq!(config.admin, admin::AdminConfig::default());
    assert_eq!(config.http, crate::http::HttpLimits::default());
    assert_eq!(config.accept, accept::ConnectionLimits::default());
    assert_eq!(config.identify, identify::IdentityConfig::default());
    assert_eq!(config.limit, limit::LimitConfig::default());
    assert!(config.remote.is_none());
    assert_eq!(config.cache, cache::CacheConfig::default());
    assert_eq!(config.upstreams, [upstream::UpstreamConfig::new("shop".into(), vec![endpoint])]);
    assert_eq!(config.routes[0].cache, Some(cache::CachePolicy::default()));
    assert_eq!(config.routes[0].degrade, degrade::DegradeConfig::default());
    assert_eq!(config.log, LogConfig::default());
}

#[test]
fn minimal_file_equals_upstream_argument() {
    let (mut config, _) = parse_toml(MINIMAL).expect("the minimal document is valid");
    config.upstreams[0].name = "upstream".into();
    let from_arguments = Config::for_upstream("http://127.0.0.1:3000", None).expect("a URL");
    // No endpoint is a service of Kubernetes: its API server is not asked.
    config.kubernetes = from_arguments.kubernetes.clone();
    assert_eq!(debug_text(&from_arguments), debug_text(&config));
    let listen = "127.0.0.1:1".parse().expect("an address");
    let config = Config::for_upstream("http://[::1]", Some(listen)).expect("a URL");
    assert_eq!(
        (config.listen[0].address, config.upstreams[0].endpoints[0].to_string()),
        (listen, "http://[::1]:80".to_owned())
    );
}

#[test]
fn every_key_has_effect() {
    let text = r#"
version = 1
server = { workers = 3, node = "edge-${PORT}", zone = "eu-1a", drain_timeout = "5m", drain_idle = "20s", upgrade_socket = "run/up.sock", paths = { normalise = "on", encoded_slash = "keep" } }
listen = [{ address = "[::]:${PORT}", proxy_protocol = "optional" }]
admin = { address = "127.0.0.1:1", token = "a$$b" }
limits_http = { header_bytes = "1KiB", header_fields = 10, uri_bytes = "512B", body_bytes = "0B", header_timeout = "250ms", idle_timeout = "1h", body_rate = "1KiB", get_body = "refuse", http2_memory = "2MiB", http2_memory_per_ip = "1MiB", connections = 5, connections_per_ip = 4 }
identity = { trusted_proxies = ["10.1.2.3/8", "::1"], forwarded_field = "forwarded", device = ["header:X-Device", "cookie:Dev"], user = "header:x-u", tier = "header:x-t", region = ["path:2", "host:"], region_default = "eu" }
tiers = { anonymous = 0.5, gold = 2 }
redis = { deadline = "5ms", nodes = 3, secret = "0123456789abcdef", compression = "zstd", compress_from = "1KiB", hot_copies = 3, regions = { default = { slots = 4, endpoints = ["redis://a:1"] } } }
cache = { memory = "1GiB", hot_rate = "90000/m", object_bytes = "2MiB", inflight_fetch_bytes = "3MiB", remote_object_bytes = "1KiB", key_ignore_query = ["utm_*", "q"], key_query_order = "sorted", key_fields = ["X-Tenant", "cookie"], status_key = "tell", variants = 9, targeted = ["Mine"], targeted_to_clients = "strip" }
access = { exempt = ["10.0.0.0/8", "user:ops"], denied = ["device:bot"] }
[limits]
hosts = { tier = "node", rate = "60/m", burst = 9, mode = "shadow", percent = 0, reserve = { standard = 0.5 }, headers = "policy" }
tenants = { tier = "key", key = "header:X-Tenant", keys = 9, rate = "5/s", burst = 5, headers = "none" }
devices = { tier = "device", rate = "5/s", burst = 5, per_address = 7 }
[log]
access = "logs/access"
fields = ["status", "path"]
level = "debug"

[tracing]
otlp = "https://collector.test/base/"
ratio = 0.25
service_name = "edge"
query = true
headers = { authorization = "Bearer a" }

[dns]
servers = ["10.0.0.2", "[::1]:5353"]
timeout = "500ms"

[upstreams.shop]
endpoints = ["http://A.example", { url = "http://[::1]:81", weight = 3, zone = "eu-1b" }]
balance = "consistent-hash"
hash_by = "cookie:Sid"
slow_start = "8s"
connect_timeout = "2s"
timeout = "3s"
idle_timeout = "4s"
total_timeout = "5s"
eject = { after = 7, base = "4s", share = 0.25 }
health = { path = "/h?a=b", host = "Check.example:81", interval = "3s", timeout = "2s", healthy = 4, unhealthy = 5, expect = ["204", "3xx"] }
concurrency = { min = 2, max = 8, wait = "1s" }
breaker = { error_ratio = 1, slow = "1s", slow_ratio = 0.25, minimum = 5, window = "20s", open = "1m", ramp = "0s", scope = "upstream", mode = "shadow" }

[[routes]]
name = "one"
match = { host = "*.Shop.example", path = "/a/*", methods = ["GET"] }
upstream = "shop"
limits = ["hosts", "tenants", "devices"]
cost = 2
cost_by_status = { "401" = 9, "5xx" = 3 }
cache = { mode = "off" }
forward_path = "received"
degrade = { status = 429, retry_after = "9s" }
timeout = "6s"
idle_timeout = "7s"
total_timeout = "0s"

[[routes]]
name = "two"
match = { host = "Shop.example", path = "/a" }
upstream = "shop"
forward_path = "normal"
cache = { default_ttl = "1s", ttl = { "5xx" = "6s", "404" = "5s" }, heuristic_max = "4s", languages = ["en", "pt-BR"], ttl_jitter_percent = 7, set_cookie = "shared", cookies = "explicit", tags = "Cache-Tag", stale_if_error = "2s", stale_while_revalidate = "3s" }
"#;
    let (config, warnings) = parse_toml(text).unwrap_or_else(|report| panic!("{report}"));
    assert!(warnings.is_empty(), "{warnings}");
    let second = Duration::from_secs(1);
    let paths = PathRules { normalise: PathNormalisation::On, encoded_slash: EncodedSlashPolicy::Keep };
    assert_eq!(
        config.server,
        ServerConfig {
            workers: 3,
            node: "edge-9000".to_owned(),
            zone: Some("eu-1a".to_owned()),
            drain_timeout: 300 * second,
            drain_idle: 20 * second,
            upgrade_socket: Some("/nonexistent/run/up.sock".into()),
            paths
        }
    );
    assert_eq!((config.http.paths, config.cache.paths), (paths, paths));
    assert_eq!(config.listen[0].address.to_string(), "[::]:9000");
    assert_eq!(config.listen[0].proxy_protocol, ProxyProtocolMode::Optional);
    assert_eq!(config.admin.token.as_deref(), Some("a$b"));
    assert_eq!((config.http.header_bytes, config.http.header_fields, config.http.uri_bytes), (1_024, 10, 512));
    assert_eq!(
        (config.http.body_bytes, config.http.header_timeout, config.http.idle_timeout),
        (0, second / 4, 3_600 * second)
    );
    assert_eq!((config.http.http2_memory, config.http.http2_memory_per_ip), (2 << 20, 1 << 20));
    assert_eq!((config.http.body_rate, config.http.get_body), (1_024, GetBodyPolicy::Refuse));
    assert_eq!(config.accept, accept::ConnectionLimits { connections: 5, connections_per_ip: 4 });
    let identify = &config.identify;
    assert_eq!(identify.trusted_proxies.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "::1/128"]);
    assert_eq!(
        identify.device,
        [IdentitySource::Header("x-device".to_owned()), IdentitySource::Cookie("Dev".to_owned())]
    );
    assert_eq!(identify.region, [IdentitySource::Path(2), IdentitySource::Host]);
    assert_eq!(identify.region_default.as_str(), "eu");
    assert_eq!(identify.forwarded_field, ForwardedField::Forwarded);
    assert_eq!(identify.user, Some(IdentitySource::Header("x-u".to_owned())));
    assert_eq!(identify.user_class, Some(IdentitySource::Header("x-t".to_owned())));
    let weights =
        [("anonymous", 0.5), ("standard", 1.0), ("gold", 2.0)].map(|(name, weight)| (name.to_owned(), weight));
    assert_eq!(config.limit.weights, weights);
    assert_eq!(config.limit.nodes, 3);
    let [hosts, tenants, devices] = &config.limit.rules[..] else { panic!("three rules") };
    assert_eq!(
        (hosts.rule.quota.rate().to_string().as_str(), hosts.exposure),
        ("60/m", limit::HeaderExposure::PolicyOnly)
    );
    assert_eq!(hosts.rule.reserve.iter().map(ToString::to_string).collect::<Vec<_>>(), ["0", "0.5", "0"]);
    assert_eq!((tenants.rule.key, tenants.rule.keys.map(usize::from)), (Some(limiter::KeyIndex(0)), Some(9)));
    assert_eq!(
        (identify.keys.as_slice(), tenants.exposure),
        (&[IdentitySource::Header("x-tenant".to_owned())][..], limit::HeaderExposure::Hidden)
    );
    assert_eq!((devices.per_address.map(u32::from), hosts.per_address), (Some(7), None));
    assert_eq!(devices.limiter_rules().expect("the quota is representable").count(), 2);
    let network = identify::AccessEntry::Network("10.0.0.0/8".parse().expect("a network"));
    assert_eq!(identify.access.exempt, [network, identify::AccessEntry::User("ops".to_owned())]);
    assert_eq!(identify.access.denied, [identify::AccessEntry::Device("bot".to_owned())]);
    let remote = config.remote.expect("there is a `[redis]` section");
    assert_eq!(
        (remote.deadline, remote.secret.as_str(), remote.object_bytes),
        (second / 200, "0123456789abcdef", 1 << 10)
    );
    let region = &remote.regions[&shard::Region::DEFAULT];
    assert_eq!((region.slots, &region.endpoints[..]), (4, &["redis://a:1".to_owned()][..]));
    assert_eq!((config.cache.memory_bytes, config.cache.hot_rate, remote.hot_copies), (1 << 30, 1_500, 3));
    assert_eq!((remote.compression, remote.compress_from), (shard::Compression::Zstd, 1 << 10));
    assert_eq!((config.cache.object_bytes, config.cache.remote_object_bytes), (2 << 20, 1 << 10));
    assert_eq!(config.cache.key_ignore_query, ["utm_*", "q"]);
    assert_eq!(config.cache.inflight_fetch_bytes, 3 << 20);
    assert_eq!(config.cache.targeted, ["mine"]);
    assert!(config.cache.key_sort_query && config.cache.strip_targeted && config.cache.exposes_key);
    assert_eq!(
        (&config.cache.key_fields[..], config.cache.variants),
        (&["x-tenant", "cookie"].map(str::to_owned)[..], 9)
    );
    assert_eq!(
        config.log,
        LogConfig {
            format: AccessLogFormat::Json(vec![LogField::Status, LogField::Path]),
            access: AccessLogTarget::File(PathBuf::from("/nonexistent/logs/access")),
            level: tracing::Level::DEBUG
        }
    );
    let tracing = TracingConfig {
        url: "https://collector.test/base/v1/traces".to_owned(),
        ratio: 0.25,
        service_name: "edge".to_owned(),
        has_query: true,
        compression: ExportCompression::None,
        headers: vec![("authorization".to_owned(), "Bearer a".to_owned())],
    };
    assert_eq!(config.tracing, Some(tracing));
    assert_eq!(config.identify.trace_sampling, Some(identify::TraceSampling::new(0.25)));
    let shop = &config.upstreams[0];
    assert_eq!(
        shop.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["http://a.example:80", "http://[::1]:81"]
    );
    let balance = BalanceConfig { policy: BalancePolicy::ConsistentHash, slow_start: 8 * second };
    assert_eq!((shop.balance, shop.connect_timeout, shop.timeout), (balance, 2 * second, 3 * second));
    assert_eq!(shop.zones, [None, Some("eu-1b".to_owned())]);
    assert_eq!((&shop.hash_by, &shop.weights[..]), (&HashKey::Cookie("Sid".to_owned()), &[1, 3][..]));
    assert_eq!((shop.idle_timeout, shop.total_timeout), (4 * second, Some(5 * second)));
    assert_eq!(shop.eject, EjectConfig { after: 7, base: 4 * second, share: 0.25 });
    let health = HealthConfig {
        path: "/h?a=b".to_owned(),
        host: Some("check.example:81".to_owned()),
        interval: 3 * second,
        timeout: 2 * second,
        healthy: 4,
        unhealthy: 5,
        expect: vec![204, 3],
    };
    assert_eq!(shop.health, Some(health));
    let servers: Vec<_> = config.dns.servers.iter().map(ToString::to_string).collect();
    assert_eq!((servers, config.dns.timeout), (vec!["10.0.0.2:53".to_owned(), "[::1]:5353".to_owned()], second / 2));
    let concurrency = shop.concurrency.expect("a limit");
    assert_eq!((concurrency.min, concurrency.max, concurrency.wait), (2, 8, second));
    assert_eq!((shop.breaker.error_ratio, shop.breaker.slow_ratio, shop.breaker.minimum), (1.0, 0.25, 5));
    assert_eq!((shop.breaker.slow, shop.breaker.window, shop.breaker.open), (second, 20 * second, 60 * second));
    assert!(shop.breaker.ramp.is_zero() && shop.breaker.scope == BreakerScope::Upstream);
    assert_eq!(shop.breaker.mode, BreakerMode::Shadow);
    let [one, two] = &config.routes[..] else { panic!("two routes") };
    assert_eq!(
        (&one.host, &one.path),
        (&HostPattern::Suffix(".shop.example".to_owned()), &PathPattern::Prefix("/a/".to_owned()))
    );
    assert_eq!(
        (&one.methods[..], &one.limits[..], one.cost.get(), &one.cache),
        (&[http::Method::GET][..], &[0, 1, 2][..], 2, &None)
    );
    let costs: Vec<_> = one.cost_by_status.iter().map(|(statuses, cost)| (*statuses, cost.get())).collect();
    assert_eq!(costs, [(cache::StatusPattern::One(401), 9), (cache::StatusPattern::Class(5), 3)]);
    assert_eq!((one.degrade.status.as_u16(), one.degrade.retry_after), (429, 9 * second));
    let timeouts = TimeoutOverrides { head: Some(6 * second), idle: Some(7 * second), total: Some(Duration::ZERO) };
    assert_eq!((one.timeouts, two.timeouts), (timeouts, TimeoutOverrides::default()));
    assert_eq!(
        (&two.host, &two.path),
        (&HostPattern::Exact("shop.example".to_owned()), &PathPattern::Exact("/a".to_owned()))
    );
    assert_eq!((one.forward_path, two.forward_path), (ForwardPath::Received, ForwardPath::Normal));
    let policy = cache::CachePolicy {
        default_ttl: second,
        ttl: vec![(cache::StatusPattern::One(404), 5 * second), (cache::StatusPattern::Class(5), 6 * second)],
        heuristic_max: 4 * second,
        set_cookie: cache::SetCookiePolicy::Shared,
        cookies: cache::CookiePolicy::Explicit,
        tags: Some("cache-tag".to_owned()),
        stale_if_error: 2 * second,
        stale_while_revalidate: 3 * second,
        ttl_jitter_percent: 7,
        languages: ["en".to_owned(), "pt-BR".to_owned()].into(),
    };
    assert_eq!(two.cache, Some(policy));
}

#[test]
fn json_and_toml_are_equivalent() {
    let example = include_str!("../../../../docs/tidegate.example.toml");
    let json = as_json(&document::parse(example, DocumentFormat::Toml).expect("the example is TOML"));
    let from_json = parse(&json, DocumentFormat::Json).unwrap_or_else(|report| panic!("{report}"));
    let from_toml = parse_toml(example).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(debug_text(&from_json.0), debug_text(&from_toml.0));
}

fn as_json(node: &DocumentNode) -> String {
    match &node.value {
        DocumentValue::String(text) => serde_json::to_string(text).expect("text serializes"),
        DocumentValue::Integer(number) => number.to_string(),
        DocumentValue::Float(number) => format!("{number:?}"),
        DocumentValue::Boolean(truth) => truth.to_string(),
        DocumentValue::Array(items) => format!("[{}]", items.iter().map(as_json).collect::<Vec<_>>().join(", ")),
        DocumentValue::Table(entries) => {
            let entry = |entry: &DocumentEntry| format!("{:?}: {}", entry.key, as_json(&entry.node));
            format!("{{ {} }}", entries.iter().map(entry).collect::<Vec<_>>().join(",\n"))
        }
        DocumentValue::Unsupported(_) => "null".to_owned(),
    }
}

#[test]
fn pages_are_read_at_load() {
    let directory = std::env::temp_dir().join(format!("tidegate-pages-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    std::fs::write(directory.join("busy.html"), "<p>${busy}</p>\n").expect("the temporary directory is writable");
    let file = directory.join("tidegate.toml");
    std::fs::write(&file, format!("{MINIMAL}degrade = {{ html = \"busy.html\" }}"))
        .expect("the temporary directory is writable");
    let loaded = Config::load(&file);
    std::fs::remove_dir_all(&directory).expect("the directory was created above");
    let (config, _) = loaded.unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(config.routes[0].degrade.html.as_deref(), Some("<p>${busy}</p>\n"));
    assert!(Config::load(&file).expect_err("the file was removed").to_string().contains("cannot read"));
}
