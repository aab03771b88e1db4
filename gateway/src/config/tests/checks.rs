//! Errors and warnings about constraints between keys.

use std::path::Path;

use super::super::DocumentFormat;
use super::super::fault::{ConfigFault, FaultSeverity};
use super::super::load::parse_for_purposes;
use super::{MINIMAL, faults, parse_toml};
use crate::route::{HostPattern, PathPattern};

#[test]
fn unresolved_references_get_a_suggestion() {
    let text = format!(
        "{MINIMAL}limits = [\"device\", \"divice\"]
[limits.device]
tier = \"device\"
rate = \"100/s\"
burst = 200
[[routes]]
name = \"orders\"
match = {{ path = \"/orders/*\" }}
upstream = \"shp\"
"
    );
    assert_eq!(
        faults(&text),
        [
            "9:21 routes[0].limits[1]: unknown limit `divice` (did you mean `device`?)",
            "17:12 routes[1].upstream: unknown upstream `shp` (did you mean `shop`?)",
        ]
    );
}

#[test]
fn weak_or_missing_secrets_of_subject_hashes_are_warned_of() {
    let limit = |percent: u8| {
        format!(
            "{MINIMAL}limits = [\"device\"]\n[limits.device]\ntier = \"device\"\nrate = \"1/s\"\nburst = 2\npercent = {percent}\n"
        )
    };
    let hint = "without `identity.secret`, `percent` selects other subjects on each gateway and after each restart (set `identity.secret`)";
    assert_eq!(faults(&limit(10)), [format!("10:9 limits.device: {hint}")]);
    assert_eq!(faults(&limit(100)), [""; 0]);
    assert_eq!(faults(&limit(0)), [""; 0]);
    assert_eq!(faults(&format!("{}[identity]\nsecret = \"0123456789abcdef\"\n", limit(10))), [""; 0]);
    let short = faults(&format!("{}[identity]\nsecret = \"guess\"\n", limit(10)));
    assert!(short.len() == 1 && short[0].contains("identity.secret: the secret is short"), "{short:?}");
    assert!(!short[0].contains("guess"), "a secret is not repeated: {short:?}");
}

#[test]
fn duplicates_are_errors() {
    let text = format!(
        "{MINIMAL}
[[routes]]
name = \"everything\"
match = {{ path = \"/*\", methods = [\"GET\"] }}
upstream = \"shop\"
[[routes]]
name = \"b\"
match = {{ path = \"/*\", methods = [\"HEAD\", \"GET\"] }}
upstream = \"shop\"
[[listen]]
address = \"127.0.0.1:8080\"
[[listen]]
address = \"127.0.0.1:8080\"
[admin]
address = \"127.0.0.1:8080\"
"
    );
    assert_eq!(
        faults(&text),
        [
            "11:8 routes[1].name: duplicate route name `everything`",
            "16:9 routes[2].match: route `everything` matches the same host, path and methods",
            "21:11 listen[1].address: duplicate listen address 127.0.0.1:8080",
            "23:11 admin.address: duplicate listen address 127.0.0.1:8080",
        ]
    );
}

#[test]
fn limits_are_checked_against_costs_and_weights() {
    let text = format!(
        "{MINIMAL}limits = [\"small\", \"fast\", \"broken\"]
cost = 10
[limits.small]
tier = \"node\"
rate = \"1/s\"
burst = 5
[limits.fast]
tier = \"device\"
rate = \"9000000/s\"
burst = 200
[limits.broken]
tier = \"device\"
rate = \"many\"
burst = 200
percent = 101
[tiers]
gold = 2
"
    );
    assert_eq!(
        faults(&text),
        [
            "10:8 routes[0].cost: cost 10 always exceeds limit `small`, whose burst for anonymous users is 5",
            "15:9 limits.fast: rule `fast` cannot be weighted by 2: rate `9000000/s x 2` is above 10000000 a second, the finest this \
             limiter can measure",
            "21:8 limits.broken.rate: rate `many` is not of the form `100/s`: a count, a slash and one of s, m, h, d (write an \
             integer number of requests per s, m, h or d, such as \"100/s\")",
            "23:11 limits.broken.percent: out of range: expected an integer, 0 to 100",
        ]
    );
}

#[test]
fn canary_and_mirror_name_upstreams_and_get_requests() {
    let text = format!(
        "{MINIMAL}canary = {{ upstream = \"shpo\" }}
mirror = {{ percent = 101 }}
[[routes]]
name = \"ok\"
match = {{ path = \"/ok\" }}
respond = {{ status = 200 }}
mirror = {{ upstream = \"shop\" }}
"
    );
    assert_eq!(
        faults(&text),
        [
            "9:10 routes[0].canary: the canary gets no request (set `percent`, or `header = { x-canary = \"1\" }`)",
            "9:23 routes[0].canary.upstream: unknown upstream `shpo` (did you mean `shop`?)",
            "10:10 routes[0].mirror.upstream: `upstream` is missing (expected a string)",
            "10:22 routes[0].mirror.percent: out of range: expected an integer, 0 to 100",
            "15:10 routes[1].mirror: `mirror` has no effect: the route answers by itself",
        ]
    );
}

#[test]
fn malformed_match_conditions_are_errors() {
    for (matched, want) in [
        (
            "path = \"//a/%7e/./b/*\"",
            "routes[1].match.path: `//a/%7e/./b/*` matches no request: it is not in its normal form (write \"/a/~/b/*\")",
        ),
        (
            "path = \"/a[b]\"",
            "routes[1].match.path: `/a[b]` matches no request: it is not in its normal form (write \"/a%5Bb%5D\")",
        ),
        (
            "path = \"/a%2Fb\"",
            "routes[1].match.path: `/a%2Fb` matches no request: requests with this path are refused (encoded_slash) (docs/paths.md lists which paths are refused)",
        ),
        (
            "path = \"/a;v=1/b\"",
            "routes[1].match.path: `/a;v=1/b` matches no request: parameters of segments are not compared (leave out what follows the `;` up to the next `/`)",
        ),
        (
            "path = \"/a\", host = \"b\u{fc}cher example\"",
            "routes[1].match.host: `b\u{fc}cher example` is not a host (write \"*\", \"shop.example\" or \"*.shop.example\", without scheme and port)",
        ),
        ("path = \"orders\"", "routes[1].match.path: `orders` does not start with `/` (write \"/orders\")"),
        ("path = \"/a*\"", "routes[1].match.path: `/a*` has a `*` that does not follow a `/` (write \"/a/*\")"),
        ("path = \"/*/b\"", "routes[1].match.path: `/*/b` has a `*` that is not at its end"),
        (
            "path = \"/a/../b\"",
            "routes[1].match.path: `/a/../b` matches no request: it is not in its normal form (write \"/b\")",
        ),
        (
            "path = \"/a?b\"",
            "routes[1].match.path: `/a?b` has a character that is not allowed in a path (percent-encode the path, without a query)",
        ),
        (
            "path = \"/a\", methods = [\"get\"]",
            "routes[1].match.methods[0]: `get` is not in upper case (write \"GET\")",
        ),
        ("path = \"/a\", methods = [\"G T\"]", "routes[1].match.methods[0]: `G T` is not a method"),
        (
            "path = \"/a\", host = \"shop.example:80\"",
            "routes[1].match.host: `shop.example:80` is not a host (write \"*\", \"shop.example\" or \"*.shop.example\", without scheme and port)",
        ),
        (
            "host = \"*\"",
            "routes[1].match.path: `path` is missing (expected a path such as \"/orders\", or \"/orders/*\" as a prefix)",
        ),
    ] {
        let text = format!("{MINIMAL}[[routes]]\nname = \"b\"\nupstream = \"shop\"\nmatch = {{ {matched} }}\n");
        let found = faults(&text);
        assert!(found.len() == 1 && found[0].ends_with(want), "{found:#?}\n{want}");
    }
}

#[test]
fn patterns_of_routes_are_compared_in_the_form_of_requests() {
    let config = |server: &str, matched: &str| {
        let document = MINIMAL.replace("path = \"/*\"", matched);
        parse_toml(&format!("{document}{server}\n")).unwrap_or_else(|report| panic!("{report}")).0
    };
    let pattern = |server: &str, path: &str| match &config(server, &format!("path = \"{path}\"")).routes[0].path {
        PathPattern::Exact(path) | PathPattern::Prefix(path) => path.clone(),
    };
    assert_eq!(pattern("", "/a%40b/%C3%A4/*"), "/a@b/%C3%A4/");
    assert_eq!(pattern("[server]\npaths = { encoded_slash = \"keep\" }", "/a%2Fb"), "/a%2Fb");
    assert_eq!(pattern("[server]\npaths = { normalise = \"off\" }", "//a/../b"), "//a/../b");
    let host = |host: &str| config("", &format!("path = \"/*\", host = \"{host}\"")).routes[0].host.clone();
    assert_eq!(host("B\u{fc}cher.example."), HostPattern::Exact("xn--bcher-kva.example".to_owned()));
    assert_eq!(host("*.b\u{fc}cher.example"), HostPattern::Suffix(".xn--bcher-kva.example".to_owned()));
    assert_eq!(host("[0::1]"), HostPattern::Exact("[::1]".to_owned()));
}

#[test]
fn settings_of_paths_without_effect_or_with_a_risk_are_reported() {
    let text = format!("{MINIMAL}[server]\npaths = {{ normalise = \"off\", encoded_slash = \"keep\" }}\n");
    let want = "server.paths.encoded_slash: `encoded_slash` has no effect with `normalise = \"off\"` (remove it: paths then stay as received, encoded slashes included)";
    assert!(matches!(&faults(&text)[..], [fault] if fault.ends_with(want)), "{:?}", faults(&text));
    let received = |more: &str| faults(&format!("{MINIMAL}forward_path = \"received\"\n{more}"));
    assert!(
        matches!(&received("")[..], [fault] if fault.contains("is served to clients that send another form of it"))
    );
    assert_eq!(received("cache = { mode = \"off\" }\n"), [""; 0]);
}

#[test]
fn malformed_endpoints_are_errors() {
    for (endpoint, want) in [
        ("127.0.0.1:3000", "it does not start with a scheme"),
        ("localhost:3000", "it does not start with a scheme"),
        ("http://", "it is not a URL"),
        ("http://a:b@c", "it has a user name"),
        ("http://a:0", "its port is not 1 to 65535"),
        ("http://a:70000", "its port is not 1 to 65535"),
        ("http://a:+80", "its port is not 1 to 65535"),
        ("http://a/b", "it has a path"),
        ("http://a?b", "it has a path"),
        ("ftp://a", "its scheme is not known"),
        ("srv://_http._tcp.a:80", "it has a port, which the records of the service name"),
        ("srv://127.0.0.1", "an address has no SRV records"),
        ("srv+https://_https._tcp.", "a certificate cannot name its host"),
    ] {
        let found = faults(&MINIMAL.replace("http://127.0.0.1:3000", endpoint));
        let hint = "(write \"http://HOST:PORT\", \"https://HOST:PORT\", \"h2c://HOST:PORT\", \"srv://_SERVICE._tcp.DOMAIN\" for servers in SRV records, with TLS \"srv+https://...\", or \"kubernetes://SERVICE.NAMESPACE:PORT\")";
        assert!(
            found.len() == 1 && found[0].ends_with(&format!("not an endpoint: {want} {hint}")),
            "{endpoint}: {found:?}"
        );
    }
}

#[test]
fn tls_of_an_upstream_needs_an_endpoint_and_usable_files() {
    for (endpoint, tls, want) in [
        ("http://a", "verify = true", "no endpoint of this upstream uses TLS"),
        ("https://a", "cert = \"c.pem\"", "`cert` and `key` belong together"),
        ("https://a", "ca = \"missing.pem\"", "cannot read"),
        ("https://a", "verify = 1", "expected `true` or `false`, found an integer"),
        ("https://a", "verify = false, ca = \"missing.pem\"", "`verify = false` does not use `ca`"),
        ("https://a", "server_name = \"a b\"", "`a b` is not a name of a certificate"),
        ("https://a", "min_version = \"1.1\"", "unknown value \"1.1\""),
        ("https://a_b.example:0", "", "its port is not 1 to 65535"),
    ] {
        let text = MINIMAL.replace(
            "endpoints = [\"http://127.0.0.1:3000\"]",
            &format!("endpoints = [\"{endpoint}\"]\ntls = {{ {tls} }}"),
        );
        let found = faults(&text);
        assert!(found.iter().any(|fault| fault.contains(want)), "{endpoint} {tls}: {found:?}");
    }
}

#[test]
fn redis_needs_a_default_region_and_faults_hide_passwords() {
    let text = format!(
        "{MINIMAL}[redis]
secret = \"0123456789abcdef\"
[redis.regions.eu]
endpoints = [\"redis://u:hunter2@a:0\", \"redis://a:1/x\", \"redis://[::1]:6379/1\", \"tcp://a\"]
[redis.regions.EU]
endpoints = []
[redis.regions.us]
slots = 1
endpoints = [\"redis://a\", \"redis://u:hunter2@a:6379/0\", \"redis+unix:///run/redis\"]
"
    );
    let found = faults(&text);
    assert_eq!(found.len(), 8, "{found:#?}");
    assert!(found[0].starts_with("9:1 redis: the region `default` is missing"), "{found:#?}");
    assert!(found.iter().all(|fault| !fault.contains("hunter2")), "{found:#?}");
}

#[test]
fn redis_urls_that_would_fail_the_start_are_errors() {
    let with = |endpoint: &str| {
        let text = format!(
            "{MINIMAL}[redis]\nsecret = \"0123456789abcdef\"\n[redis.regions.default]\nendpoints = [\"{endpoint}\"]\n"
        );
        faults(&text)
    };
    for endpoint in ["rediss://u:p#hunter2@h", "rediss://u:hunter?2@h", "rediss://h#insecure", "redis://u:hunter/2@h"] {
        let found = with(endpoint);
        assert!(found.len() == 1 && found[0].contains("percent-encode"), "{endpoint}: {found:#?}");
        assert!(!found[0].contains("hunter"), "{found:#?}");
    }
    assert_eq!(with("rediss://u:p%23hunter2@h"), [""; 0]);
}

#[test]
fn entries_that_never_apply_are_errors() {
    let text = format!(
        "{MINIMAL}[access]
exempt = [\"user:ops\"]
denied = [\"device:bot\", \"::ffff:192.0.2.0/120\", \"user:\", \"nobody\"]
[limits.node]
tier = \"node\"
rate = \"1/s\"
burst = 5
per_address = 3
keys = 9
[limits.tenant]
tier = \"key\"
rate = \"1/s\"
burst = 5
[limits.explain]
tier = \"device\"
key = \"claim:org\"
reserve = {{ unknown = 0.5 }}
rate = \"1/s\"
burst = 5
"
    );
    let found = faults(&text);
    for (n, part) in [
        "access.exempt[0]: `user:ops` never matches: `identity.user` is not set",
        "access.denied[0]: `device:bot` never matches",
        "access.denied[2]: `user:` has an empty ID",
        "access.denied[3]: `nobody` is not a network",
        "limits.node.per_address: `per_address` applies to limits with `tier = \"device\"` only",
        "limits.node.keys: `keys` does not apply to limits with `tier = \"node\"` or `\"cluster\"`",
        "limits.tenant: a limit with `tier = \"key\"` needs a `key`",
        "limits.explain: the name `explain` is reserved for the admin API",
        "limits.explain.key: `key` applies to limits with `tier = \"key\"` only",
        "limits.explain.reserve.unknown: unknown user class `unknown`",
    ]
    .into_iter()
    .enumerate()
    {
        assert!(found.iter().any(|fault| fault.contains(part)), "{n}: {part} in {found:#?}");
    }
    assert_eq!(found.len(), 13, "{found:#?}");
}

#[test]
fn risky_settings_are_warnings() {
    let text = format!(
        "{MINIMAL}[admin]
address = \"0.0.0.0:9900\"
[identity]
user = \"header:x-user\"
forwarded_field = \"forwarded\"
[upstreams.spare]
endpoints = [\"http://a\"]
[limits.spare]
tier = \"node\"
rate = \"1/s\"
burst = 5
"
    );
    let (_, warnings) = parse_toml(&text).expect("warnings do not reject the document");
    assert_eq!(
        super::lines(&warnings),
        [
            "10:11 admin.address: without a token, /api is disabled on a non-loopback address (set `admin.token`; /live, /ready and /metrics need no token)",
            "12:8 identity.user: this key has no effect: there are no trusted proxies (set `identity.trusted_proxies` to the networks of the proxies)",
            "13:19 identity.forwarded_field: this key has no effect: there are no trusted proxies (set `identity.trusted_proxies` to the networks of the proxies)",
            "14:12 upstreams.spare: no route uses the upstream `spare`",
            "16:9 limits.spare: no route uses the limit `spare` (add it to the `limits` of a route)",
        ]
    );
}

#[test]
fn default_per_address_above_the_resolution_is_dropped_and_a_configured_one_is_an_error() {
    let text = |per_address: &str| {
        format!(
            "{MINIMAL}[identity]
device = [\"header:x-device\"]
trusted_proxies = [\"::ffff:10.0.0.0/104\"]
[tiers]
gold = 3.0
[limits.device]
tier = \"device\"
rate = \"50000/s\"
burst = 5
{per_address}
"
        )
    };
    let (config, _) = parse_toml(&text("")).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(
        config.limit.rules[0].per_address, None,
        "the quota of 100 devices of a gold user is above the resolution"
    );
    assert_eq!(config.identify.trusted_proxies[0].to_string(), "10.0.0.0/8");
    let found = faults(&text("per_address = 100"));
    assert!(found.iter().any(|fault| fault.contains("limits.device.per_address: rate `5000000/s x 3`")), "{found:?}");
}

/// A fault is reported once: not again as the lack of the value that it has prevented.
#[test]
fn consequences_of_a_fault_are_not_reported() {
    let limited = format!("{MINIMAL}limits = [\"own\"]\n");
    let limit = |keys: &str| format!("[limits.own]\nrate = \"9/s\"\nburst = 9\n{keys}\n");
    let tokens = "[identity]\nuser = { jwt = { keys = \"absent.json\", algorithms = [\"ES256\"] } }\n";
    let proxied = "[identity]\ntrusted_proxies = [\"10.0.0.0/8\"]\n";
    for (text, want) in [
        (format!("{limited}{tokens}{}", limit("tier = \"user\"")), "identity.user.jwt.keys: cannot read"),
        (
            format!("{limited}{tokens}{}", limit("tier = \"key\"\nkey = \"claim:org\"")),
            "identity.user.jwt.keys: cannot",
        ),
        (format!("{MINIMAL}{tokens}tier = {{ jwt_claim = \"tier\" }}\n"), "identity.user.jwt.keys: cannot read"),
        (format!("{MINIMAL}{tokens}[access]\ndenied = [\"user:ann\"]\n"), "identity.user.jwt.keys: cannot read"),
        (
            format!("{limited}{proxied}usr = \"header:x-user\"\n{}", limit("tier = \"user\"")),
            "identity.usr: unknown key `usr` (did you mean `user`?)",
        ),
        (
            format!("{MINIMAL}[admin]\naddress = \"0.0.0.0:9900\"\ntoken = \"${{ADMIN_TOKEN_ABSENT}}\"\n"),
            "admin.token: ",
        ),
        (format!("redis = 3\n{limited}{}", limit("tier = \"cluster\"")), "redis: expected a table"),
        (
            format!("{MINIMAL}[identity]\ntrusted_proxies = [\"ten\"]\nuser = \"header:x-user\"\n"),
            "identity.trusted_proxies[0]: ",
        ),
        (
            format!("{limited}[identity]\nsecret = 3\n{}", limit("tier = \"device\"\npercent = 5")),
            "identity.secret: expected a string",
        ),
        (format!("{limited}{}", limit("tier = \"key\"\nkey = \"ip\"")), "limits.own.key: "),
        (
            format!("{limited}[identity]\ndevice = [\"ip\"]\n{}", limit("tier = \"device\"\nper_address = 2")),
            "identity.device[0]: ",
        ),
        (format!("{MINIMAL}limts = [\"own\"]\n{}", limit("tier = \"node\"")), "routes[0].limts: unknown key"),
        (format!("{MINIMAL}limits = [3]\n{}", limit("tier = \"node\"")), "routes[0].limits[0]: expected a string"),
        (format!("{MINIMAL}limits = 3\ncost = 2\n"), "routes[0].limits: expected an array"),
        (
            MINIMAL.replace("[\"http://127.0.0.1:3000\"]", "[{ url = \"http://127.0.0.1:3000\", zone = \"a\" }]")
                + "[server]\nzone = 3\n",
            "server.zone: expected a name",
        ),
    ] {
        let found = faults(&text);
        assert!(found.len() == 1 && found[0].contains(want), "{text}\n{found:#?}");
    }
    // A warning with another cause is reported.
    let both = format!("{limited}[identity]\nregion_default = 3\n{}", limit("tier = \"user\""));
    let found = faults(&both);
    assert!(found.len() == 2 && found[1].contains("this limit never applies: no request has a user"), "{found:#?}");
}

/// The ranges are those of the limiter, so that a value in the range is none that it refuses.
#[test]
fn weights_and_devices_per_address_have_the_range_of_the_limiter() {
    let text = |weight: &str, per_address: &str| {
        format!(
            "{MINIMAL}[identity]\ndevice = [\"cookie:id\"]\n[tiers]\ngold = {weight}\n[limits.device]\n\
             tier = \"device\"\nrate = \"100/s\"\nburst = 1\nper_address = {per_address}\n"
        )
    };
    let of_ranges = |text: &str| {
        let found = faults(text);
        found.into_iter().filter(|fault| !fault.contains("no route uses")).collect::<Vec<_>>()
    };
    for (weight, per_address) in [("1", "10_000"), ("1", "0"), ("10000", "1"), ("1e-6", "1")] {
        assert_eq!(of_ranges(&text(weight, per_address)), [""; 0], "{weight} {per_address}");
    }
    for (weight, per_address, want) in [
        ("1", "10_001", "limits.device.per_address: out of range: expected an integer, 0 to 10000"),
        ("10_001", "1", "tiers.gold: out of range: expected a number from 0.000001 to 10000"),
        ("1e-7", "1", "tiers.gold: out of range: expected a number from 0.000001 to 10000"),
        ("nan", "1", "tiers.gold: out of range: expected a number from 0.000001 to 10000"),
    ] {
        let found = of_ranges(&text(weight, per_address));
        assert!(found.len() == 1 && found[0].contains(want), "{weight} {per_address}: {found:?}");
    }
}

#[test]
fn former_key_name_is_accepted_with_a_warning() {
    let (config, warnings) =
        parse_toml(&format!("{MINIMAL}[cache]\nfill_bytes = \"3MiB\"\n")).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(config.cache.inflight_fetch_bytes, 3 << 20);
    assert_eq!(
        super::lines(&warnings),
        ["10:1 cache.fill_bytes: `fill_bytes` is deprecated (rename it to `inflight_fetch_bytes`)"]
    );
    assert_eq!(warnings.faults()[0].code, super::super::FaultCode::Deprecated);
    let found = faults(&format!("{MINIMAL}[cache]\nfill_bytes = 3\n"));
    assert!(found.iter().any(|fault| fault.starts_with("10:14 cache.fill_bytes: expected a size,")), "{found:?}");
}

#[test]
fn new_key_name_has_no_warning_and_both_names_are_an_error() {
    let (config, warnings) = parse_toml(&format!("{MINIMAL}[cache]\ninflight_fetch_bytes = \"3MiB\"\n"))
        .unwrap_or_else(|report| panic!("{report}"));
    assert_eq!((config.cache.inflight_fetch_bytes, warnings.is_empty()), (3 << 20, true));
    let both = format!("{MINIMAL}[cache]\nfill_bytes = \"3MiB\"\ninflight_fetch_bytes = \"3MiB\"\n");
    assert!(parse_toml(&both).is_err());
    assert_eq!(
        faults(&both),
        ["10:1 cache.fill_bytes: `fill_bytes` is the former name of `inflight_fetch_bytes`, which is also set \
             (remove `fill_bytes`)"]
    );
    let misspelt = faults(&format!("{MINIMAL}[cache]\nfill_byte = \"3MiB\"\n"));
    assert!(!misspelt[0].contains("fill_bytes`?") && !misspelt[0].contains("`fill_bytes`"), "{misspelt:?}");
}

#[test]
fn properties_of_connections_without_a_listener_for_them_are_warnings() {
    let text = format!(
        "{MINIMAL}[[listen]]
address = \"127.0.0.1:0\"
proxy_protocol = \"required\"
[[listen]]
address = \"127.0.0.1:0\"
proxy_protocol = \"optional\"
[identity]
user = \"certificate:san\"
"
    );
    let (_, warnings) = parse_toml(&text).expect("warnings do not reject the document");
    assert_eq!(
        super::lines(&warnings),
        [
            "10:11 listen[0].address: this listener refuses every connection: there are no trusted proxies (set `identity.trusted_proxies` to the networks of the proxies)",
            "13:11 listen[1].address: `proxy_protocol` has no effect: there are no trusted proxies (set `identity.trusted_proxies` to the networks of the proxies)",
            "16:8 identity.user: no request has a user: no listener asks for client certificates (set `client_ca` in `[listen.tls]`)",
        ]
    );
}

#[test]
fn limits_by_connections_without_a_listener_for_them_are_warnings() {
    let limit = |name: &str, key: &str| {
        format!("[limits.{name}]\ntier = \"key\"\nkey = \"{key}\"\nrate = \"1/s\"\nburst = 1\n")
    };
    let text = format!("{MINIMAL}{}{}", limit("stack", "ja4:"), limit("holder", "certificate:san"));
    let (_, warnings) = parse_toml(&text).expect("warnings do not reject the document");
    let found = super::lines(&warnings);
    let of = |rule: &str, text: &str| found.iter().any(|line| line.contains(rule) && line.contains(text));
    assert!(of("limits.stack", "no request has a fingerprint (set `[listen.tls]`)"), "{found:?}");
    assert!(
        of("limits.holder", "no request has a client certificate (set `client_ca` in `[listen.tls]`)"),
        "{found:?}"
    );
}

#[test]
fn sources_of_connections_are_refused_for_others() {
    for (identity, fault) in [
        ("user = \"certificate:cn\"", "a certificate has no `cn`"),
        ("user = \"ja4:\"", "a client could set this source itself"),
        ("tier = \"certificate:subject\"", "a certificate does not name a user class"),
        ("device = [\"ja4:\"]", "`ja4:` is not a source"),
        ("region = [\"certificate:san\"]", "`certificate:san` is not a source"),
    ] {
        let found = faults(&format!("{MINIMAL}[identity]\n{identity}\n"));
        assert!(matches!(&found[..], [only] if only.contains(fault)), "{identity}: {found:?}");
    }
}

#[test]
fn client_certificates_need_an_authority_that_can_be_read() {
    let listen = |keys: &str| {
        faults(&format!("{MINIMAL}[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\ncertificates = []\n{keys}\n"))
    };
    let found = listen("client_auth = \"optional\"\nclient_crl = \"absent.pem\"");
    let of = |key: &str, text: &str| found.iter().any(|fault| fault.contains(key) && fault.contains(text));
    assert!(of("client_auth", "there is no authority"), "{found:?}");
    assert!(of("client_crl", "there is no authority") && of("client_crl", "cannot read"), "{found:?}");
    let found = listen("client_ca = \"absent.pem\"");
    assert!(found.iter().any(|fault| fault.contains("client_ca: cannot read")), "{found:?}");
}

#[test]
fn redis_without_a_secret_is_warned_of() {
    let redis = |rest: &str| {
        faults(&format!(
            "{MINIMAL}[redis]\n{rest}\n[redis.regions.default]\nendpoints = [\"redis://127.0.0.1:6379\"]\n"
        ))
    };
    let missing = "without a secret, an entry that another program writes to Redis is served to clients";
    let hint = "(write at least 16 random characters, the same on all gateways, such as `openssl rand -hex 16` prints)";
    assert_eq!(redis(""), [format!("9:1 redis.secret: {missing} {hint}")]);
    assert_eq!(redis("secret = \"\""), [format!("10:10 redis.secret: {missing} {hint}")]);
    let short = redis("secret = \"guess\"");
    assert!(short.len() == 1 && short[0].starts_with("10:10 redis.secret: the secret is short"), "{short:?}");
    assert!(!short[0].contains("guess"), "a secret is not repeated: {short:?}");
    assert_eq!(redis("secret = \"0123456789abcdef\""), [""; 0]);
    assert_eq!(faults(&format!("{MINIMAL}[redis]\nnodes = 2\n")), [""; 0], "no Redis is used");
}

#[test]
fn lifetimes_of_responses_to_cookies_are_warned_of() {
    let cached = |cache: &str, rest: &str| faults(&format!("{MINIMAL}cache = {{ {cache} }}\n{rest}"));
    for (cache, column) in [
        ("default_ttl = \"1s\"", "9:25 routes[0].cache.default_ttl"),
        ("mode = \"standard\", default_ttl = \"1h\", set_cookie = \"private\"", "9:44 routes[0].cache.default_ttl"),
        ("ttl = { \"2xx\" = \"1s\" }", "9:17 routes[0].cache.ttl"),
        ("default_ttl = \"0s\", ttl = { \"200\" = \"1s\" }", "9:37 routes[0].cache.ttl"),
    ] {
        let found = cached(cache, "");
        let expected = format!("{column}: a response to a request with `Cookie` is stored for all clients");
        assert!(found.len() == 1 && found[0].starts_with(&expected), "{cache}: {found:?}");
    }
    for cache in [
        "",
        "default_ttl = \"0s\"",
        "mode = \"off\", default_ttl = \"1s\"",
        "ttl = { \"404\" = \"1s\", \"5xx\" = \"1s\" }",
        "default_ttl = \"1s\", ttl = { \"2xx\" = \"0s\" }",
        "default_ttl = \"1s\", cookies = \"ignored\"",
        "ttl = { \"2xx\" = \"1s\" }, cookies = \"explicit\"",
    ] {
        assert_eq!(cached(cache, ""), [""; 0], "{cache}");
    }
    assert_eq!(cached("default_ttl = \"1s\"", "[cache]\nkey_fields = [\"cookie\"]\n"), [""; 0]);
}

#[test]
fn settings_of_a_route_without_effect_are_errors() {
    let route =
        |keys: &str| faults(&format!("{MINIMAL}[[routes]]\nname = \"x\"\nmatch = {{ path = \"/x\" }}\n{keys}\n"));
    let only = |keys: &str, at: &str, text: &str| {
        let found = route(keys);
        assert!(found.len() == 1 && found[0].contains(at) && found[0].contains(text), "{keys}: {found:?}");
    };
    for status in [204, 205, 304] {
        let keys = format!("respond = {{ status = {status}, body = \"x\" }}");
        only(&keys, "routes[1].respond.body: ", &format!("a response with status {status} has no body"));
        assert_eq!(route(&format!("respond = {{ status = {status} }}")), [""; 0]);
    }
    let rest = "`{rest}` is empty";
    only("upstream = \"shop\"\nrewrite = \"/y/{rest}\"", "routes[1].rewrite: ", rest);
    only("redirect = { to = \"https://a.test/{rest}\" }", "routes[1].redirect.to: ", rest);
    let deny = "upstream = \"shop\"\ndeny = [\"10.0.0.0/8\"]\nallow = ";
    only(&format!("{deny}[\"10.0.0.0/8\"]"), "routes[1].allow: ", "`allow` has no effect for 10.0.0.0/8");
    only(&format!("{deny}[\"fd00::/8\", \"10.1.0.0/16\"]"), "routes[1].allow: ", "no effect for 10.1.0.0/16");
    assert_eq!(route(&format!("{deny}[\"10.0.0.0/7\"]")), [""; 0]);
}

#[test]
fn pages_for_statuses_that_are_never_sent_are_warned_of() {
    let with = |root: &str, route: &str| {
        let directory = directory_with_page();
        let text =
            format!("{root}\n{MINIMAL}{route}\n").replace("PAGE", &directory.join("page.html").display().to_string());
        let found = faults(&text);
        std::fs::remove_dir_all(&directory).expect("the directory was created above");
        found
    };
    for status in ["400", "401", "403", "404", "408", "413", "421", "429", "500", "502", "503", "504", "4xx", "5xx"] {
        let pages = format!("pages = {{ \"{status}\" = \"PAGE\" }}");
        assert_eq!((with("", &pages), with(&pages, "")), (Vec::new(), Vec::new()), "{status}");
    }
    for status in ["418", "499", "431", "520"] {
        let pages = format!("pages = {{ \"{status}\" = \"PAGE\" }}");
        for (found, at) in [(with("", &pages), "routes[0].pages: "), (with(&pages, ""), " pages: ")] {
            let expected = format!("the page for {status} has no effect");
            assert!(found.len() == 1 && found[0].contains(at) && found[0].contains(&expected), "{found:?}");
        }
    }
    let pages = "pages = { 520 = \"PAGE\" }";
    let degrade = "degrade = { status = 520 }";
    assert_eq!((with("", &format!("{pages}\n{degrade}")), with(pages, degrade)), (Vec::new(), Vec::new()));
}

/// A directory of its own with `page.html`.
fn directory_with_page() -> std::path::PathBuf {
    static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("tidegate-page-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    std::fs::write(directory.join("page.html"), "<p>{{ status }}</p>").expect("the temporary directory is writable");
    directory
}

#[test]
fn listeners_do_not_overlap_and_are_no_endpoints() {
    let listen = |addresses: &[&str], rest: &str| {
        let listeners: String =
            addresses.iter().map(|address| format!("[[listen]]\naddress = \"{address}\"\n")).collect();
        faults(&format!("{MINIMAL}{listeners}{rest}"))
    };
    let overlap = listen(&["0.0.0.0:8080", "127.0.0.1:8080"], "");
    assert!(overlap.len() == 1 && overlap[0].contains("0.0.0.0:8080 and 127.0.0.1:8080 overlap"), "{overlap:?}");
    let admin = listen(&["0.0.0.0:8080"], "[admin]\naddress = \"127.0.0.1:8080\"\n");
    assert!(admin.len() == 1 && admin[0].contains("admin.address: the listen addresses"), "{admin:?}");
    for apart in [["0.0.0.0:8080", "127.0.0.1:8081"], ["10.0.0.1:8080", "127.0.0.1:8080"], ["0.0.0.0:0", "127.0.0.1:0"]]
    {
        assert_eq!(listen(&apart, ""), [""; 0]);
    }
    for own in ["0.0.0.0:3000", "127.0.0.1:3000"] {
        let found = listen(&[own], "");
        let expected = format!("upstreams.shop: the endpoint 127.0.0.1:3000 is this gateway: it listens on {own}");
        assert!(found.len() == 1 && found[0].contains(&expected), "{found:?}");
    }
    assert_eq!(listen(&["10.0.0.1:3000"], ""), [""; 0]);
    assert_eq!(listen(&["127.0.0.1:8080"], "[admin]\naddress = \"127.0.0.1:3000\"\n").len(), 1);
}

#[test]
fn limits_that_do_not_limit_as_written_are_warned_of() {
    let limit = |keys: &str, rest: &str| {
        faults(&format!("{MINIMAL}limits = [\"l\"]\n[limits.l]\nrate = \"1/s\"\nburst = 2\n{keys}\n{rest}"))
    };
    let cluster = limit("tier = \"cluster\"", "");
    assert!(cluster.len() == 1 && cluster[0].contains("limits.l: without `[redis]`"), "{cluster:?}");
    assert_eq!(limit("tier = \"cluster\"", "[redis]\nnodes = 2\n"), [""; 0]);
    let device = "[identity]\ndevice = [\"header:x-device-id\"]\n";
    let chosen = limit("tier = \"device\"", device);
    assert!(chosen.len() == 1 && chosen[0].contains("an address gets 100 times this limit"), "{chosen:?}");
    assert_eq!(limit("tier = \"device\"\nper_address = 50", device), [""; 0]);
    assert_eq!(limit("tier = \"device\"", ""), [""; 0]);
}

/// A printed configuration has the same text in place of each secret.
#[test]
fn replaced_secrets_are_checked_and_do_not_run() {
    for (keys, path) in [
        ("[admin]\ntoken = \"***\"\n", "admin.token"),
        ("[identity]\nsecret = \"***\"\n", "identity.secret"),
        ("[redis]\nsecret = \"REDACTED\"\n[redis.regions.default]\nendpoints = [\"redis://h:1\"]\n", "redis.secret"),
    ] {
        let text = format!("{MINIMAL}{keys}");
        let reports = parse_for_purposes(Path::new(""), &text, DocumentFormat::Toml);
        let severities = reports.map(|report| {
            let is_of = |fault: &&ConfigFault| fault.path == path && fault.message.contains("replaced");
            report.faults().iter().find(is_of).map(|fault| fault.severity)
        });
        assert_eq!(severities, [Some(FaultSeverity::Error), Some(FaultSeverity::Warning)], "{keys}");
    }
}
