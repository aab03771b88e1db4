//! The documentation of keys. Types, ranges and defaults are those that the readers ask with; only meanings are written here.

use std::fmt::Write;
use std::path::Path;

use super::expand::Values;
use super::reading::{Absent, Asked, Reading};
use super::{Format, document, section};

/// A document with one table of each kind, so that every reader asks for its keys.
const SKELETON: &str = "[[listen]]\n[listen.tls]\n[[listen.tls.certificates]]\n[identity.user.jwt]\n[identity.tier]\n[redis.regions.NAME]\n[limits.NAME]\n[upstreams.NAME]\n[[routes]]\n";

/// What each key means, in the order of the documentation. A test proves that no key is missing and none is left over.
const MEANINGS: &[(&str, &str)] = &[
    ("version", "Version of this format."),
    ("server.workers", "Event loops, each on a thread of its own. 0: one per core available to the process."),
    ("server.node", "This gateway's name in a fleet, in its first log line, `/api/v1/status` and `tidegate_info`."),
    ("server.drain_timeout", "After SIGTERM: how long running requests may take to end before they are cut off."),
    ("listen[].address", "Address to serve. `[[listen]]` may be repeated; without any, one loopback port is served."),
    ("listen[].proxy_protocol", "Whether connections begin with a PROXY header."),
    (
        "listen[].tls.certificates[].cert",
        "PEM file with the certificate chain, leaf first. Chosen by SNI; read again when it changes.",
    ),
    ("listen[].tls.certificates[].key", "PEM file with the private key of the leaf."),
    ("listen[].tls.min_version", "Lowest TLS version that is spoken."),
    ("admin.address", "Address of `/live`, `/ready`, `/metrics`, `/api/v1` and the dashboard."),
    ("admin.token", "Bearer token that `/api` asks for. Empty: `/api` answers on a loopback address only."),
    ("limits_http.header_bytes", "Bytes of a request head; more is answered 431."),
    ("limits_http.header_fields", "Fields of a request head; more is answered 431."),
    ("limits_http.uri_bytes", "Bytes of a request target; more is answered 414."),
    ("limits_http.body_bytes", "Bytes of a request body; more is answered 413."),
    (
        "limits_http.header_timeout",
        "From the first byte of a head, or the accepted connection, to its last; later is answered 408.",
    ),
    (
        "limits_http.idle_timeout",
        "Silence between two requests on a connection, or while a body or an answer should move.",
    ),
    (
        "limits_http.body_rate",
        "Bytes per second that a client must send of a body, or take of an answer, on average, after 10 s (or `idle_timeout` if that is shorter); slower is answered 408 or cut. `\"0B\"`: any rate. HTTP/1.1 only.",
    ),
    ("limits_http.get_body", "What becomes of a body of GET or HEAD: passed on, or answered 400."),
    ("limits_http.connections", "Connections the process holds at once; more are closed as they arrive."),
    ("limits_http.connections_per_ip", "Connections one address (IPv6: one /64) holds at once."),
    (
        "identity.trusted_proxies",
        "Networks whose `Forwarded`, `X-Forwarded-For` (with `X-Forwarded-Proto` and `-Host`) and identity headers are believed.",
    ),
    (
        "identity.forwarded_field",
        "Which field trusted proxies write whom a request came from in; the other is not believed. `either`: `Forwarded` only where there is no `X-Forwarded-For`. A proxy that writes one passes a client's own line of the other on: name it where that is `forwarded`.",
    ),
    (
        "identity.device",
        "Sources of the device, tried in order, bound to the address (IPv6: its /64). None present: that alone.",
    ),
    (
        "identity.user",
        "What names the user: a header, believed from `trusted_proxies` only, or a claim of a signed token.",
    ),
    (
        "identity.user.jwt.keys",
        "File with the JWK set (RFC 7517) that tokens are verified with; read again when it changes. Keys for other uses or algorithms are left out.",
    ),
    (
        "identity.user.jwt.algorithms",
        "Algorithms that a token may be signed with, whatever it says itself. `HS` algorithms take `oct` keys, and neither goes together with others.",
    ),
    ("identity.user.jwt.claim", "Claim at the top level of the token that names the user: text or a number."),
    ("identity.user.jwt.issuer", "What `iss` must be. Absent: it may be anything."),
    (
        "identity.user.jwt.audience",
        "Values of which `aud` must have one. None: it is not looked at, and tokens that the issuer made for others are believed.",
    ),
    (
        "identity.user.jwt.leeway",
        "By how much the clocks of issuer and gateway may differ, for `exp` (which a token must have) and `nbf`.",
    ),
    (
        "identity.user.jwt.token",
        "Where the token is: `Authorization: Bearer`, a header (after `Bearer ` or alone) or a cookie. It goes on to the upstream as it came.",
    ),
    (
        "identity.tier",
        "What names the user's tier, likewise. A name that `[tiers]` does not have, or none, is `standard`; who has no user is `anonymous`.",
    ),
    ("identity.tier.jwt_claim", "Claim of the token of `identity.user` that names the tier."),
    (
        "identity.region",
        "Sources of the region, tried in order. Responses are stored for the first 1,024 regions that a process meets. `geoip:` is not available yet.",
    ),
    ("identity.region_default", "Region of callers that name none."),
    (
        "tiers.NAME",
        "Weight of a user tier on rate and burst of device, user and key limits. `anonymous` and `standard` always exist, with weight 1.",
    ),
    ("redis.deadline", "Longest time any cache operation takes, whatever Redis does."),
    (
        "redis.nodes",
        "Expected size of the fleet: a node's share of cluster limits before Redis has told it one, or without any Redis (`nodes` is then the only key).",
    ),
    ("redis.secret", "Authenticates stored entries. Empty: they are checked for damage only."),
    (
        "redis.regions.NAME.slots",
        "Parts that the region's keys are split into, spread over its endpoints and at least as many. The region `default` must exist.",
    ),
    (
        "redis.compression",
        "How texts are compressed on their way to Redis: `zstd` takes a third less of its memory and three times as long to decompress. Gateways read what others stored, whatever they are set to.",
    ),
    (
        "redis.compress_from",
        "Bodies of text that are as large are compressed on their way to Redis; those with a `Content-Encoding` never.",
    ),
    (
        "redis.hot_copies",
        "Servers of a region that hold what is hot (`cache.hot_rate`), the key's own included; readers choose one at random.",
    ),
    (
        "redis.tls.ca",
        "File with the certificates that may sign those of `rediss://` servers; without it, the system's.",
    ),
    ("redis.tls.cert", "File with a certificate of this node for `rediss://` servers that ask for one."),
    ("redis.tls.key", "File with its key."),
    (
        "redis.regions.NAME.endpoints",
        "Redis servers of the region: `redis://`, `rediss://` for TLS, or `redis+sentinel://HOST:PORT,HOST:PORT/MASTER` for a master that Sentinels name (which are asked in plain text, without a login). Not with `cluster`.",
    ),
    (
        "redis.regions.NAME.fallback",
        "Regions that are asked, in this order, for what this one does not have or cannot say. What they have was meant for their own clients.",
    ),
    (
        "redis.regions.NAME.cluster",
        "Some nodes of the Redis Cluster that holds the region, instead of `endpoints`; the others are found by themselves.",
    ),
    ("cache.memory", "Bytes of the local tier."),
    (
        "cache.hot_rate",
        "Lookups of one key, over all threads of the process, from which it is hot: it is not pushed out of memory, and its entry is read from several servers.",
    ),
    ("cache.object_bytes", "Largest response that is stored; larger ones pass through."),
    ("cache.remote_object_bytes", "Largest response that is stored remotely; larger ones stay local."),
    ("cache.fill_bytes", "Bytes of all responses on their way into the cache; more pass through and are not stored."),
    (
        "cache.key_ignore_query",
        "Query parameters that are left out of the cache key; a `*` at the end stands for any rest.",
    ),
    (
        "cache.key_query_order",
        "Whether two queries that differ in the order of their parameters are two keys (`kept`) or one (`sorted`).",
    ),
    (
        "cache.key_fields",
        "Request fields that are part of every key, such as the one that names a tenant. Their answers are never shared between values.",
    ),
    (
        "cache.status_key",
        "Whether `Cache-Status` tells the key that was looked up: for finding out, not for the public.",
    ),
    ("cache.variants", "Most variants (`Vary`) of one URI that are stored at a time; more pass through for a minute."),
    (
        "cache.targeted",
        "Fields by which the origin speaks to this cache alone, before `Cache-Control` and `Expires`; the first that is valid counts (RFC 9213).",
    ),
    ("cache.targeted_to_clients", "Whether clients see these fields."),
    ("access.exempt", "Who is never limited: networks, `device:ID`, `user:ID`."),
    ("access.denied", "Who is answered 403, likewise; before `exempt`."),
    (
        "limits.NAME.tier",
        "What the limit counts by: each device, each user, each value of a `key`, this node, or the whole fleet.",
    ),
    ("limits.NAME.rate", "Requests that are let through in the long run: a whole number per `s`, `m`, `h` or `d`."),
    ("limits.NAME.burst", "Requests that are let through at once."),
    ("limits.NAME.mode", "`enforce` denies, `shadow` only counts what it would deny, `off` does nothing."),
    ("limits.NAME.percent", "Share of subjects the limit applies to; which ones is stable."),
    (
        "limits.NAME.key",
        "What a limit of tier `key` counts by, such as a tenant, an API key, a part of the path or a claim of a verified token. A request without it is not counted. At most 8 different ones.",
    ),
    (
        "limits.NAME.keys",
        "Devices, users or keys that the limit holds at a time, 63 bytes each; 65,536 where nothing is said. Under a flood of new ones those that asked for most stay.",
    ),
    (
        "limits.NAME.per_address",
        "Of a limit of tier `device`: how many devices' worth one address (IPv6: one /64) may use in all, whatever ids it shows. 0: any.",
    ),
    (
        "limits.NAME.reserve.NAME",
        "Of a limit that all share: the part of what can be had at once that this tier of users leaves to the others, so that ordinary traffic stops before heavier users do; below 1.",
    ),
    (
        "limits.NAME.headers",
        "What clients are told: `all`, the `policy` without what is left, or `none`. A denial always says when to come back.",
    ),
    ("upstreams.NAME.dns", "URL whose host is resolved to endpoints."),
    ("upstreams.NAME.retries", "Further attempts of safe methods."),
    ("upstreams.NAME.health", "Active health checks: `{ path, interval }`."),
    ("upstreams.NAME.concurrency", "Adaptive limit on concurrent requests: `{ min, max }`."),
    ("upstreams.NAME.endpoints", "Servers. `https://` is not available yet."),
    ("upstreams.NAME.balance", "How a request chooses an endpoint."),
    ("upstreams.NAME.connect_timeout", "From the first packet to an open connection."),
    ("upstreams.NAME.timeout", "The whole exchange; the deadline that travels with the request."),
    ("upstreams.NAME.breaker.error_ratio", "Share of failed calls in the window at which the breaker opens."),
    ("upstreams.NAME.breaker.slow", "A call that takes longer is slow, from that moment on."),
    ("upstreams.NAME.breaker.slow_ratio", "Share of slow calls in the window at which the breaker opens."),
    ("upstreams.NAME.breaker.minimum", "Calls in the window before it may open."),
    ("upstreams.NAME.breaker.window", "How far back calls count."),
    ("upstreams.NAME.breaker.open", "How long calls are rejected before probes are let through."),
    ("routes[].name", "Name in logs and metrics; unique."),
    ("routes[].match.host", "Host that matches: any, this one, or those below a domain."),
    ("routes[].match.path", "Path that matches; the most specific route wins."),
    ("routes[].match.methods", "Methods that match; none: all."),
    ("routes[].upstream", "Name of the upstream that answers."),
    ("routes[].limits", "Names of the limits that apply, all of which have to agree."),
    ("routes[].cost", "What one request costs in each limit; at most the burst of each."),
    (
        "routes[].cost_by_status.NAME",
        "What an answer costs beside that, by its status or class (`401`, `5xx`): failed logins, for instance.",
    ),
    ("routes[].journal", "Accepts writes with 202 and replays them."),
    (
        "routes[].cache.tags",
        "Response field that holds surrogate keys, separated by white space or commas; `\"\"`: none. What it names can be purged: see [purging](purging.md).",
    ),
    ("routes[].cache.mode", "`standard` is RFC 9111 as a shared cache; `off` neither looks up nor stores."),
    ("routes[].cache.default_ttl", "Freshness of responses that carry none."),
    (
        "routes[].cache.ttl.NAME",
        "Freshness of responses with a status (`404`) or of a class (`5xx`), over what the origin says; `\"0s\"`: not stored.",
    ),
    (
        "routes[].cache.ttl_jitter_percent",
        "Up to this many percent of its freshness are taken from each response at random: what was stored together does not expire together.",
    ),
    (
        "routes[].cache.heuristic_max",
        "At most this long counts as fresh what has `Last-Modified` and nothing else: a tenth of its time without a change. `\"0s\"`: never.",
    ),
    (
        "routes[].cache.set_cookie",
        "Whether responses with `Set-Cookie` are stored: `private` not, `shared` like others, cookie and all.",
    ),
    (
        "routes[].cache.stale_if_error",
        "How long past its freshness a response answers for a failing upstream (RFC 5861).",
    ),
    (
        "routes[].cache.stale_while_revalidate",
        "How long past its freshness a response answers while it is validated (RFC 5861).",
    ),
    ("routes[].degrade.status", "Status of the last answer; 503 is 502 where the upstream's answer is malformed."),
    ("routes[].degrade.html", "File with the page for clients that accept HTML. Absent: the built-in one."),
    ("routes[].degrade.json", "File with the page for clients that accept JSON. Absent: the built-in one."),
    ("routes[].degrade.retry_after", "Middle of the jittered `Retry-After`."),
    ("log.access", "Where the access log goes, as JSON lines."),
    ("log.level", "Least severe event that is logged."),
    ("journal", "Store of accepted writes."),
    ("tracing.otlp", "Endpoint that spans are sent to."),
];

/// The table of keys in Markdown, as it stands in `docs/configuration.md`.
pub fn markdown() -> String {
    let asked = asked();
    let mut text = String::from("| key | takes | default | meaning |\n|---|---|---|---|\n");
    for (key, meaning) in MEANINGS {
        let found = asked.iter().find(|asked| asked.key == *key);
        let (kind, default) = found.map_or_else(Default::default, described);
        writeln!(text, "| `{key}` | {kind} | {default} | {meaning} |").expect("writing to a string does not fail");
    }
    text
}

fn described(asked: &Asked) -> (String, String) {
    let default = match &asked.absent {
        Absent::Required => "required".to_owned(),
        Absent::Nothing => "none".to_owned(),
        Absent::Value(value) => format!("`{value}`"),
        Absent::Later => "not available yet".to_owned(),
    };
    (asked.kind.clone(), default)
}

/// Every key that some reader asks for.
fn asked() -> Vec<Asked> {
    let root = document::read(SKELETON, Format::Toml).expect("the skeleton is well-formed");
    let values = Values::new(Path::new(""), &|_| None);
    let reading = Reading::new(SKELETON, values);
    reading.document(&root, section::read);
    reading.asked()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "<!-- keys: generated by the tests of gateway with UPDATE_DOCS=1 -->\n";
    const END: &str = "<!-- end of keys -->\n";

    #[test]
    fn exactly_the_keys_that_are_read_are_documented() {
        let mut read: Vec<String> = asked().into_iter().map(|asked| asked.key).collect();
        let mut documented: Vec<&str> = MEANINGS.iter().map(|(key, _)| *key).collect();
        read.sort();
        documented.sort_unstable();
        assert_eq!(read, documented);
    }

    #[test]
    fn the_page_shows_the_keys() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(path).expect("docs/configuration.md exists");
        let (before, rest) = page.split_once(BEGIN).expect("the page marks where the keys begin");
        let (_, after) = rest.split_once(END).expect("the page marks where the keys end");
        let wanted = format!("{before}{BEGIN}{}{END}{after}", markdown());
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, wanted).expect("docs/configuration.md is writable");
        } else {
            assert!(page == wanted, "docs/configuration.md is out of date: run the tests with UPDATE_DOCS=1");
        }
    }
}
