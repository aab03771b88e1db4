//! What is refused, or warned of, because it does not fit together.

use super::{LEAST, faults, toml};

#[test]
fn names_that_refer_to_nothing_get_a_suggestion() {
    let text = format!(
        "{LEAST}limits = [\"device\", \"divice\"]
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
            "9:21 routes[0].limits[1]: there is no limit `divice` (did you mean `device`?)",
            "17:12 routes[1].upstream: there is no upstream `shp` (did you mean `shop`?)",
        ]
    );
}

#[test]
fn what_may_exist_once_exists_once() {
    let text = format!(
        "{LEAST}
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
            "11:8 routes[1].name: there are two routes `everything`",
            "16:9 routes[2].match: route `everything` matches the same host, path and methods",
            "21:11 listen[1].address: 127.0.0.1:8080 is listened on twice",
            "23:11 admin.address: 127.0.0.1:8080 is listened on twice",
        ]
    );
}

#[test]
fn limits_fit_their_routes_and_weights() {
    let text = format!(
        "{LEAST}limits = [\"small\", \"fast\", \"broken\"]
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
            "10:8 routes[0].cost: a cost of 10 never passes limit `small`, which lets anonymous users have at most 5 at once",
            "15:9 limits.fast: rule `fast` cannot be weighted by 2: rate `9000000/s x 2` is above 10000000 a second, the finest this \
             limiter can measure",
            "21:8 limits.broken.rate: rate `many` is not of the form `100/s`: a count, a slash and one of s, m, h, d (a whole \
             number of requests per s, m, h or d, such as \"100/s\")",
            "23:11 limits.broken.percent: out of range: expected a whole number, 0 to 100",
        ]
    );
}

#[test]
fn routes_say_what_they_match() {
    for (matched, want) in [
        ("path = \"orders\"", "routes[1].match.path: `orders` does not start with `/` (write \"/orders\")"),
        ("path = \"/a*\"", "routes[1].match.path: `/a*` has a `*` that does not follow a `/` (write \"/a/*\")"),
        ("path = \"/*/b\"", "routes[1].match.path: `/*/b` has a `*` that is not at its end"),
        ("path = \"/a/../b\"", "routes[1].match.path: `/a/../b` has a dot segment"),
        (
            "path = \"/a?b\"",
            "routes[1].match.path: `/a?b` has a character that no path holds (a path has no query and is percent-encoded)",
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
            "routes[1].match.path: `path` is missing (it takes a path such as \"/orders\", or \"/orders/*\" for all below it)",
        ),
    ] {
        let text = format!("{LEAST}[[routes]]\nname = \"b\"\nupstream = \"shop\"\nmatch = {{ {matched} }}\n");
        let found = faults(&text);
        assert!(found.len() == 1 && found[0].ends_with(want), "{found:#?}\n{want}");
    }
}

#[test]
fn endpoints_are_a_host_and_a_port() {
    for (endpoint, want) in [
        ("127.0.0.1:3000", "it does not start with http://"),
        ("localhost:3000", "it does not start with http://"),
        ("http://", "it is not a URL"),
        ("http://a:b@c", "it has a user name"),
        ("http://a:0", "its port is not 1 to 65535"),
        ("http://a:70000", "its port is not 1 to 65535"),
        ("http://a/b", "it has a path"),
        ("http://a?b", "it has a path"),
        ("ftp://a", "its scheme is not http"),
    ] {
        let found = faults(&LEAST.replace("http://127.0.0.1:3000", endpoint));
        let shown = "(write \"http://HOST:PORT\")";
        assert!(
            found.len() == 1 && found[0].ends_with(&format!("not an endpoint: {want} {shown}")),
            "{endpoint}: {found:?}"
        );
    }
}

#[test]
fn redis_needs_a_default_region_and_hides_passwords() {
    let text = format!(
        "{LEAST}[redis]
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
    assert!(found[0].starts_with("9:1 redis: there is no region `default`"), "{found:#?}");
    assert!(found.iter().all(|fault| !fault.contains("hunter2")), "{found:#?}");
}

#[test]
fn what_a_start_would_stumble_over_is_found_before() {
    let with = |endpoint: &str| {
        let text = format!("{LEAST}[redis.regions.default]\nendpoints = [\"{endpoint}\"]\n");
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
fn what_could_never_apply_is_a_fault() {
    let text = format!(
        "{LEAST}[access]
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
reserve = {{ unheard = 0.5 }}
rate = \"1/s\"
burst = 5
"
    );
    let found = faults(&text);
    for (n, part) in [
        "access.exempt[0]: `user:ops` is nobody: there is no `identity.user`",
        "access.denied[0]: `device:bot` is nobody",
        "access.denied[2]: `user:` names nobody",
        "access.denied[3]: `nobody` is not a network",
        "limits.node.per_address: only a limit of tier `device`",
        "limits.node.keys: a limit that all share holds no keys",
        "limits.tenant: a limit of tier `key` says what it counts by",
        "limits.explain: `explain` is what the admin address calls",
        "limits.explain.key: only a limit of tier `key` counts by a key",
        "limits.explain.reserve.unheard: there is no user tier `unheard`",
    ]
    .into_iter()
    .enumerate()
    {
        assert!(found.iter().any(|fault| fault.contains(part)), "{n}: {part} in {found:#?}");
    }
    assert_eq!(found.len(), 13, "{found:#?}");
}

#[test]
fn surprises_are_warnings() {
    let text = format!(
        "{LEAST}[admin]
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
    let (_, warnings) = toml(&text).expect("warnings do not refuse");
    assert_eq!(
        super::lines(&warnings),
        [
            "10:11 admin.address: without a token, /api is disabled on an address that is not loopback (set `admin.token`; /live, /ready and /metrics stay open)",
            "12:8 identity.user: this field is never believed: there are no trusted proxies (set `identity.trusted_proxies` to the networks that set it)",
            "13:19 identity.forwarded_field: this field is never believed: there are no trusted proxies (set `identity.trusted_proxies` to the networks that set it)",
            "14:12 upstreams.spare: no route uses the upstream `spare`",
            "16:9 limits.spare: no route attaches the limit `spare` (name it in the `limits` of a route)",
        ]
    );
}

#[test]
fn an_address_of_many_fast_devices_is_not_limited_and_no_fault() {
    let text = |per_address: &str| {
        format!(
            "{LEAST}[identity]
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
    let (config, _) = toml(&text("")).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(config.limit.rules[0].per_address, None, "a hundred devices of a gold user are too much to be measured");
    assert_eq!(config.identify.trusted_proxies[0].to_string(), "10.0.0.0/8");
    let told = faults(&text("per_address = 100"));
    assert!(told.iter().any(|fault| fault.contains("limits.device.per_address: rate `5000000/s x 3`")), "{told:?}");
}
