//! Generates the reference of configuration keys. Types, ranges and defaults come from the readers;
//! only the descriptions are written here.

#[cfg(test)]
use std::fmt::Write;
use std::path::Path;

use super::document::{self, DocumentFormat};
use super::expand::ExpansionEnvironment;
#[cfg(test)]
use super::read_context::KeyDefault;
use super::read_context::{KeySpec, ReadContext, TableSpec};
use super::{section, table_reader};

/// A document with one table of each kind, so that every reader declares its keys.
const SKELETON: &str = "[[listen]]\n[listen.tls]\n[[listen.tls.certificates]]\n[identity.user.jwt]\n[identity.tier]\n[redis.regions.NAME]\n[limits.NAME]\n[upstreams.NAME]\n[upstreams.NAME.health]\n[upstreams.NAME.concurrency]\n[[routes]]\n[routes.compress]\n[routes.canary]\n[routes.mirror]\n";

/// Descriptions in the order of the documentation. A test proves that each key has exactly one.
const DESCRIPTIONS: &[(&str, &str)] = &[
    ("version", "Version of the configuration format."),
    ("server.workers", "Event loops, one thread each. 0: one per core available to the process."),
    (
        "server.node",
        "Name of this gateway in the fleet; appears in its first log line, `/api/v1/status` and `tidegate_info`.",
    ),
    (
        "server.zone",
        "Zone of this gateway, such as an availability zone. Endpoints of the same `zone`, or of none, are preferred while at least half of them are available.",
    ),
    (
        "server.drain_idle",
        "After SIGTERM: how long connections are still accepted and idle ones kept, each until its next response, so that no request is lost; ends earlier when no connection has been open for a second. At most `drain_timeout`.",
    ),
    ("server.drain_timeout", "After SIGTERM: longest time for requests in flight to complete before they are aborted."),
    (
        "server.upgrade_socket",
        "Path of a Unix socket on which a running gateway hands its listening sockets to `tidegate run --upgrade`, then drains: an upgrade without a lost request. Relative to the directory of this file; only processes of the same user may use it. Absent: the gateway cannot be upgraded in place. [Upgrade](operations.md#upgrade)",
    ),
    (
        "server.paths.normalise",
        "Whether each path is brought into one normal form before routes, limits, keys and purges: unreserved characters decoded, dot segments removed, duplicate slashes merged. `off`: paths stay as received. [Paths](paths.md)",
    ),
    (
        "server.paths.encoded_slash",
        "Handling of `%2F`, `%5C` and `\\` in a path: `refuse` with 400; `keep` them encoded, as a part of their segment; `decode` makes `%2F` a separator and refuses the others.",
    ),
    (
        "listen[].address",
        "Listen address. `[[listen]]` may be repeated; without any, the gateway listens on one loopback port.",
    ),
    (
        "listen[].proxy_protocol",
        "PROXY protocol header (version 1 or 2) at the start of each connection, accepted from `identity.trusted_proxies` alone: `required` closes connections of other peers and those without a header; `optional` treats the bytes of other peers as an ordinary request.",
    ),
    (
        "listen[].http2",
        "Whether clients may use HTTP/2: with TLS as both agree in the handshake (ALPN), without TLS if they begin with it (prior knowledge), as gRPC does. Absent: with TLS they may, without TLS they may not.",
    ),
    (
        "listen[].tls.certificates[].cert",
        "PEM file with the certificate chain, leaf first. Selected by SNI; reloaded when the file changes.",
    ),
    ("listen[].tls.certificates[].key", "PEM file with the private key of the leaf certificate."),
    ("listen[].tls.min_version", "Lowest accepted TLS version."),
    (
        "listen[].tls.client_ca",
        "PEM file with the authorities of client certificates; reloaded when the file changes. Absent: clients are not asked for a certificate.",
    ),
    (
        "listen[].tls.client_auth",
        "With `client_ca`: whether a client must have a certificate. An invalid certificate is refused in both cases.",
    ),
    (
        "listen[].tls.client_crl",
        "PEM file with current revocation lists of all authorities in the chain of a client certificate; reloaded when the file changes. Absent: no certificate counts as revoked.",
    ),
    ("admin.address", "Listen address of `/live`, `/ready`, `/metrics`, `/api/v1` and the dashboard."),
    ("admin.token", "Bearer token that `/api` requires. Empty: `/api` is enabled on a loopback address only."),
    ("limits_http.header_bytes", "Largest request head; a larger one gets 431."),
    ("limits_http.header_fields", "Most fields of a request head; more get 431."),
    ("limits_http.uri_bytes", "Longest request target; a longer one gets 414."),
    ("limits_http.body_bytes", "Largest request body; a larger one gets 413."),
    (
        "limits_http.header_timeout",
        "Longest time from the accepted connection, or the first byte of a request head, to the end of the head; after it the client gets 408.",
    ),
    (
        "limits_http.idle_timeout",
        "Longest time between two requests on a connection, without a byte of a request body that the gateway waits for, or without the client accepting bytes of a response that wait for it. A pause of the upstream does not count.",
    ),
    (
        "limits_http.body_rate",
        "Lowest average rate per second at which a client must send a request body or read a response, measured after 10 s (or `idle_timeout` if that is shorter); only time spent waiting for the client counts. A slower client gets 408 or an aborted response. `\"0B\"`: no lower bound.",
    ),
    ("limits_http.get_body", "Handling of a body of GET or HEAD: `forward` it, or `refuse` it with 400."),
    (
        "limits_http.underscores",
        "Handling of request fields with `_` in their name: `drop` them, because many applications take `_` for `-` (`X_User_Id` for `X-User-Id`), or `forward` them.",
    ),
    (
        "limits_http.http2_memory",
        "Most memory that all HTTP/2 connections of the process may hold for their streams; beyond it, new streams are refused, and clients may send them again. One connection holds at most 2 MiB. Responses of upstreams over HTTP/2 may reserve half as much in addition (upstreams.md).",
    ),
    (
        "limits_http.http2_memory_per_ip",
        "Most of `http2_memory` that the connections of one address (IPv6: one /64) may hold; beyond it, new streams of that address are refused, and others are not affected.",
    ),
    ("limits_http.connections", "Most concurrent connections of the process; further ones are closed on arrival."),
    ("limits_http.connections_per_ip", "Most concurrent connections of one address (IPv6: one /64)."),
    (
        "identity.trusted_proxies",
        "Networks of trusted proxies: `Forwarded`, `X-Forwarded-For` (with `X-Forwarded-Proto` and `-Host`) and identity headers are accepted from them only.",
    ),
    (
        "identity.forwarded_field",
        "Field in which trusted proxies record the client address; the other one is ignored. `either`: `Forwarded` is used only if `X-Forwarded-For` is absent. A proxy that writes one of the fields forwards the other one unchanged from the client: set this key to `forwarded` if the proxy writes `Forwarded`.",
    ),
    (
        "identity.device",
        "Sources of the device, tried in order, combined with the address (IPv6: its /64). If none is present, the device is the address alone.",
    ),
    (
        "identity.user",
        "Source of the user: a header, accepted from `trusted_proxies` only, a name in the client's certificate (`subject` as RFC 4514 writes it, or `san`: the first URI, DNS name or mail address), or a claim of a signed token. docs/identity.md",
    ),
    (
        "identity.user.jwt.keys",
        "File with the JWK set (RFC 7517) that verifies tokens, reloaded when it changes; or the `https://` URL where the issuer publishes it. Keys with another use or algorithm are ignored. docs/identity.md",
    ),
    (
        "identity.user.jwt.keys_ca",
        "With a URL: PEM file with the authorities that may certify the issuer's server. Absent: those of the system.",
    ),
    (
        "identity.user.jwt.keys_stale",
        "With a URL: how long a key set is used after its lifetime while it cannot be fetched. After that, tokens are not accepted.",
    ),
    (
        "identity.user.jwt.algorithms",
        "Accepted signature algorithms; the token's own choice is not trusted. `HS` algorithms need `oct` keys and cannot be combined with others.",
    ),
    (
        "identity.user.jwt.claim",
        "Claim that names the user: a string or a number. With dots also a member of a claim that is an object, such as `realm_access.user`; a claim whose own name has the dots comes first.",
    ),
    ("identity.user.jwt.issuer", "Required value of `iss`. Absent: any issuer is accepted."),
    (
        "identity.user.jwt.audience",
        "Accepted values of `aud`, of which a token needs one. Empty: `aud` is not checked, and tokens that the issuer made for other services are accepted.",
    ),
    (
        "identity.user.jwt.leeway",
        "Tolerated clock difference between issuer and gateway, for `exp` (required in a token) and `nbf`.",
    ),
    (
        "identity.user.jwt.token",
        "Location of the token: `Authorization: Bearer`, a header (with or without `Bearer `) or a cookie. It is forwarded to the upstream unchanged.",
    ),
    (
        "identity.tier",
        "Source of the user class: a header, accepted from `trusted_proxies` only, or a claim of the token of `identity.user`. A user without a class, or with one that `[tiers]` does not define, is `standard`; a caller without a user is `anonymous`.",
    ),
    (
        "identity.tier.jwt_claim",
        "Claim of the token of `identity.user` that names the user class, likewise. Of an array of names, the class counts that `[tiers]` defines last.",
    ),
    (
        "identity.region",
        "Sources of the region, tried in order. `geoip:` is the region of the country or continent in `identity.geoip.regions`, `geoip:country` and `geoip:continent` the region with the code in lower case as its name; an area without a region leaves it to the next source.",
    ),
    (
        "identity.geoip.database",
        "Database of countries or cities in MaxMind's format, at most 256 MiB; reloaded when it changes. docs/identity.md",
    ),
    (
        "identity.geoip.regions.NAME",
        "Countries and continents whose addresses belong to the region, for the source `geoip:`. A country comes before its continent.",
    ),
    (
        "identity.region_default",
        "Region of callers without a region, or with one that is not configured. Its shards also serve regions without their own, and hold the state that a fleet shares; if it has none, those of `default` do.",
    ),
    (
        "identity.regions",
        "Names of regions, in addition to those of `[redis.regions]` and `region_default`. Any other name counts as `region_default`.",
    ),
    (
        "identity.request_id",
        "Whether each request has an id in `X-Request-Id`, which origin, client, access log, pages and problem documents show: that of a peer in `trusted_proxies`, or a new UUID of version 7. Without it, the field passes unchanged.",
    ),
    (
        "identity.untrusted_fields",
        "Request fields that are removed unless a peer in `trusted_proxies` sends them: other names of the client's address, and of the scheme, host, path, method and user of the request (request-fields.md). A name that ends with `*` stands for all names with this beginning. Setting the key replaces the list. Always removed from others: the fields of `user` and `tier`. Always replaced: `Forwarded`, `X-Forwarded-For`, `X-Forwarded-Host` and `X-Forwarded-Proto`.",
    ),
    (
        "identity.secret",
        "Key of the hashes by which limits count subjects, at least 16 characters; the same on all gateways of a fleet. Empty: a random key of the process, and `percent` of a limit selects other subjects on each gateway.",
    ),
    (
        "tiers.NAME",
        "Weight of a user class: a factor on rate and burst of limits with tier `device`, `user` and `key`. `anonymous` and `standard` always exist, with weight 1.",
    ),
    ("redis.deadline", "Longest time of any cache operation, whatever the state of Redis."),
    (
        "redis.nodes",
        "Expected number of nodes in the fleet: sets a node's share of cluster limits until Redis has assigned one, or without Redis (`nodes` is then the only key).",
    ),
    ("redis.secret", "Key of the MAC on stored entries. Empty: entries have a checksum against damage only."),
    (
        "redis.regions.NAME.slots",
        "Slots of the region's key space, spread over its endpoints; at least one per endpoint. The region `identity.region_default` or `default` must exist.",
    ),
    (
        "redis.compression",
        "Compression of text bodies stored in Redis: `zstd` needs a third less memory in Redis and three times as long to decompress. Every gateway reads all three forms, whatever this key is set to.",
    ),
    (
        "redis.compress_from",
        "Smallest text body that is compressed for Redis; a body with `Content-Encoding` is never compressed.",
    ),
    (
        "redis.hot_copies",
        "Servers of a region that hold a hot key (`cache.hot_rate`), including the server of its own slot; readers choose one at random.",
    ),
    ("redis.tls.ca", "File with the CA certificates for `rediss://` servers; absent: those of the system."),
    ("redis.tls.cert", "File with the client certificate for `rediss://` servers that require one."),
    ("redis.tls.key", "File with the private key of the client certificate."),
    (
        "redis.regions.NAME.endpoints",
        "Redis servers of the region: `redis://`, `rediss://` for TLS, or `redis+sentinel://HOST:PORT,HOST:PORT/MASTER` for a master that Sentinels monitor (the connections to Sentinels use neither TLS nor a login). Excludes `cluster`.",
    ),
    (
        "redis.regions.NAME.fallback",
        "Regions that are read, in this order, on a miss or an error in this region. Their entries were stored for their own clients.",
    ),
    (
        "redis.regions.NAME.cluster",
        "Some nodes of the Redis Cluster that holds the region, instead of `endpoints`; the other nodes are discovered.",
    ),
    ("cache.memory", "Size of the local cache layer."),
    (
        "cache.hot_rate",
        "Rate of lookups of one key, over all threads of the process, at which the key becomes hot: it is pinned in memory, and its entry is read from several servers.",
    ),
    ("cache.object_bytes", "Largest response that is stored; larger ones pass through."),
    ("cache.remote_object_bytes", "Largest response that is stored in Redis; larger ones are stored locally only."),
    (
        "cache.inflight_fetch_bytes",
        "Bytes of all responses being fetched into the cache; further ones pass through and are not stored. Its former name `fill_bytes` is accepted in this version, with a warning.",
    ),
    (
        "cache.key_ignore_query",
        "Query parameters that are not part of the cache key; a trailing `*` matches any suffix.",
    ),
    (
        "cache.key_query_order",
        "Whether the order of query parameters is part of the cache key (`kept`) or not (`sorted`).",
    ),
    (
        "cache.honour_client",
        "Effect of a client's `no-cache`, `max-age`, `min-fresh` and `Pragma: no-cache`: `full` forces a validation as RFC 9111 says; `limited` does so only for a response that was stored or validated more than a second ago; `off` ignores them and `no-store`.",
    ),
    (
        "cache.key_fields",
        "Request fields that are part of every cache key, such as a tenant header. Responses are never shared between different values.",
    ),
    ("cache.status_key", "Whether `Cache-Status` contains the cache key: for debugging, not for public responses."),
    (
        "cache.variants",
        "Most variants (`Vary`) of one URI that are stored at a time; after that, further ones pass through for a minute.",
    ),
    (
        "cache.targeted",
        "Targeted cache-control fields (RFC 9213), which take precedence over `Cache-Control` and `Expires`; the first valid one is used.",
    ),
    ("cache.targeted_to_clients", "Whether clients receive the targeted fields."),
    ("access.exempt", "Allow list, exempt from limits: networks, `device:ID`, `user:ID`."),
    (
        "access.denied",
        "Deny list, rejected with 403: networks, `device:ID`, `user:ID`. Takes precedence over `exempt`.",
    ),
    (
        "limits.NAME.tier",
        "Scope of the limit: each device, each user, each value of a `key`, this node, or the whole fleet (`cluster`).",
    ),
    ("limits.NAME.rate", "Long-term rate of admitted requests: an integer per `s`, `m`, `h` or `d`."),
    ("limits.NAME.burst", "Requests admitted at once."),
    ("limits.NAME.mode", "`enforce` denies, `shadow` only counts what it would deny, `off` disables the limit."),
    (
        "limits.NAME.percent",
        "Percentage of subjects that the limit applies to; the choice is stable per subject while `identity.secret` is the same.",
    ),
    (
        "limits.NAME.key",
        "Key of a limit with tier `key`, such as a tenant, an API key, a path segment, a claim of a verified token, a name in the client certificate, a JA4 fingerprint or the country of the address. A request without the key is not counted. At most 8 different keys in all limits.",
    ),
    (
        "limits.NAME.keys",
        "Most devices, users or keys that the limit tracks at a time, 63 bytes each; 65,536 if absent. Under a flood of new keys, those with the highest demand stay.",
    ),
    (
        "limits.NAME.per_address",
        "With tier `device`: budget of one address (IPv6: one /64) as a multiple of one device's quota, whatever device IDs and TLS fingerprints it has. 0: no bound.",
    ),
    (
        "limits.NAME.reserve.NAME",
        "With tier `node` or `cluster`: fraction of the available burst that this user class leaves to the others, so that ordinary traffic is denied before users of higher classes; below 1.",
    ),
    (
        "limits.NAME.headers",
        "`RateLimit` headers sent to clients: `all`, the `policy` without the remaining quota, or `none`. A denial always has `Retry-After`.",
    ),
    (
        "dns.servers",
        "Name servers that resolve the names of endpoints; empty: those of `/etc/resolv.conf`, which is read again when it changes. `/etc/hosts` comes first in both cases.",
    ),
    ("dns.timeout", "Longest time of one lookup. A failed lookup keeps the last known addresses."),
    (
        "kubernetes.url",
        "The API server of Kubernetes, for endpoints `kubernetes://...` ([upstreams.md](upstreams.md#kubernetes)). Absent: that of the cluster in which the gateway runs (`KUBERNETES_SERVICE_HOST`, `KUBERNETES_SERVICE_PORT`). Over `http://` no token is sent.",
    ),
    (
        "kubernetes.ca",
        "PEM file with the authorities of its certificate. Absent: in a cluster, `ca.crt` of the service account; with `url`, those of the system.",
    ),
    (
        "kubernetes.token_file",
        "File with the bearer token, read again when it changes. Absent: in a cluster, `token` of the service account; with `url`, none.",
    ),
    (
        "kubernetes.kubeconfig",
        "File as `kubectl` reads it, in place of `url`, `ca` and `token_file`. Read again after a failure.",
    ),
    ("kubernetes.context", "The context of `kubeconfig`. Absent: its current one."),
    (
        "kubernetes.namespace",
        "Namespace of services that are named without one. Absent: that of the pod, or of the context.",
    ),
    (
        "kubernetes.timeout",
        "Longest time of one answer: of a page of a list, and of the head of the response to a watch. A failure keeps the last known endpoints.",
    ),
    (
        "kubernetes.watch_timeout",
        "Longest time of one watch; the next one continues where it ended. Without any data for this time and `timeout`, the connection counts as dead.",
    ),
    (
        "upstreams.NAME.retries",
        "Most times that one request is sent again: when no endpoint can be reached, or when a response has a status of `retry_on` or the connection ends before a response, and the method is idempotent or the request has `Idempotency-Key`. Retries and hedges in progress are at most 20 % of the requests in flight, or 3. Requests that no endpoint can have processed are sent again without this key.",
    ),
    (
        "upstreams.NAME.retry_on",
        "Statuses after which a request is sent again within `retries`. After a response with `Retry-After`, the same endpoint gets the request again only when that time has passed, if `timeout` allows it.",
    ),
    (
        "upstreams.NAME.tls.ca",
        "File with the certificates of the authorities that sign those of `https://` endpoints; absent: the system's (`SSL_CERT_FILE` and `SSL_CERT_DIR`, or the usual places). Reloaded when it changes, as are `cert` and `key`.",
    ),
    (
        "upstreams.NAME.tls.server_name",
        "Name that the certificate of every endpoint must have, and that SNI names; absent: the host of the endpoint.",
    ),
    ("upstreams.NAME.tls.cert", "File with the gateway's certificate, leaf first, for upstreams that ask for one."),
    ("upstreams.NAME.tls.key", "File with the private key of `cert`."),
    (
        "upstreams.NAME.tls.verify",
        "Whether certificates are verified. `false`: any certificate is accepted, which is logged at each start (`upstream_unverified`).",
    ),
    ("upstreams.NAME.tls.min_version", "Lowest TLS version."),
    (
        "upstreams.NAME.tls.alpn",
        "Protocols that are offered to `https://` endpoints, the preferred one first. A request that offers to switch protocols (WebSocket) needs \"http/1.1\".",
    ),
    (
        "upstreams.NAME.eject.after",
        "Failures of one endpoint in a row (status 5xx, broken connections, timeouts) after which it is ejected. An endpoint of which 80 % of the calls time out in three windows of 10 s in a row is ejected too. 0: no endpoint is ejected.",
    ),
    (
        "upstreams.NAME.eject.base",
        "Time of the first ejection. After its time the endpoint gets calls again. If the first of them to end fails, it is ejected at once and for twice as long as before, at most ten times `base`; if it succeeds, `after` failures in a row are needed again. The time is `base` again once the endpoint was in use for ten times `base` without an ejection.",
    ),
    (
        "upstreams.NAME.eject.share",
        "Largest share of endpoints that may be ejected at a time. If more are out, because health checks fail, all that are reachable are used (panic mode).",
    ),
    ("upstreams.NAME.health.path", "Path that each endpoint is asked for with GET, over a connection of its own."),
    ("upstreams.NAME.health.host", "`Host` of the check; absent: the host of the endpoint."),
    ("upstreams.NAME.health.interval", "Time between two checks of an endpoint."),
    ("upstreams.NAME.health.timeout", "Longest time of a check, from connecting to the head of the response."),
    ("upstreams.NAME.health.healthy", "Passed checks in a row after which an unhealthy endpoint is used again."),
    ("upstreams.NAME.health.unhealthy", "Failed checks in a row after which an endpoint is not used."),
    ("upstreams.NAME.health.expect", "Statuses that pass a check."),
    (
        "upstreams.NAME.concurrency.min",
        "Least number of calls that may be in progress at a time, up to the head of their responses. `concurrency = {}` enables the limit.",
    ),
    (
        "upstreams.NAME.concurrency.max",
        "Largest number of calls in progress. Between both the limit follows the throughput and latency of the upstream.",
    ),
    (
        "upstreams.NAME.concurrency.wait",
        "Longest time that a call waits for its turn. User classes share the turns by their weights (`tiers`); at most 1024 wait. A call that does not get its turn is answered by the degrade ladder, reason `concurrency_limit`.",
    ),
    (
        "upstreams.NAME.endpoints",
        "Servers: `http://HOST:PORT`, or `srv://_SERVICE._tcp.DOMAIN` for those in SRV records, with TLS `srv+https://_SERVICE._tcp.DOMAIN`, whose certificates are for DOMAIN. `kubernetes://SERVICE.NAMESPACE:PORT` for the pods of a service of Kubernetes, also as `kubernetes+https://` and `kubernetes+h2c://` ([upstreams.md](upstreams.md#kubernetes)). Every address of a name is an endpoint; it is looked up again when its TTL has passed. With `https://` certificates are verified. As a table: `weight` is its share compared to the others, `zone` its zone (`server.zone`).",
    ),
    (
        "upstreams.NAME.balance",
        "Load balancing over the endpoints: each in turn; the one with the fewest requests in flight; the one with the shortest expected latency (peak EWMA); or equal requests to the same one, unless it has 1.25 times the mean of requests in flight. The middle two compare two endpoints at random if there are more than 4, and count recent failures as load.",
    ),
    (
        "upstreams.NAME.hash_by",
        "With `consistent-hash`: the part of a request that selects the endpoint. `url` is host, path and query. Without the field or the cookie: the address of the client.",
    ),
    (
        "upstreams.NAME.slow_start",
        "Time in which the share of an endpoint that joins or comes back grows from a tenth to the whole. `\"0s\"`: at once.",
    ),
    ("upstreams.NAME.connect_timeout", "Longest time to establish a connection."),
    (
        "upstreams.NAME.timeout",
        "Longest time from the complete request sent to the head of the response. The time that a client takes to send its request does not count.",
    ),
    (
        "upstreams.NAME.idle_timeout",
        "Longest time in which the upstream accepts no byte of a request body, or sends no byte of a response body, while the gateway waits for it.",
    ),
    (
        "upstreams.NAME.total_timeout",
        "Longest time of the whole exchange, both bodies included. `\"0s\"`: no limit. A call that it ends is no failure for the breaker.",
    ),
    ("upstreams.NAME.breaker.error_ratio", "Ratio of failed calls in the window at which the breaker opens."),
    ("upstreams.NAME.breaker.slow", "Duration above which a call counts as slow, even while it is in flight."),
    ("upstreams.NAME.breaker.slow_ratio", "Ratio of slow calls in the window at which the breaker opens."),
    ("upstreams.NAME.breaker.minimum", "Calls in the window before the breaker may open."),
    ("upstreams.NAME.breaker.window", "Length of the window in which calls are counted."),
    (
        "upstreams.NAME.breaker.open",
        "How long the breaker stays open before it is half-open and admits probes. Doubled with each further opening, up to 8 times, unless it was closed for as long as the last one and for `window`; up to 20 % longer by chance.",
    ),
    (
        "upstreams.NAME.breaker.ramp",
        "Time from successful probes until all calls are admitted: 5, 25 and 50 % of them for a third of it each, and at least 3 at a time. `\"0s\"`: at once.",
    ),
    ("upstreams.NAME.breaker.scope", "Whether each route of the upstream has a breaker of its own, or all share one."),
    (
        "upstreams.NAME.breaker.mode",
        "`shadow`: the breaker logs and counts what it would do, and rejects nothing. `off`: it judges no call.",
    ),
    ("routes[].name", "Name in logs and metrics; unique."),
    ("routes[].match.host", "Matching host: any, an exact one, or all subdomains of a domain."),
    ("routes[].match.path", "Matching path; the most specific route wins."),
    ("routes[].match.methods", "Matching methods; empty: all."),
    (
        "routes[].match.scheme",
        "Matching scheme of the public URL, as a trusted proxy reports it or as the connection has it.",
    ),
    (
        "routes[].match.headers.NAME",
        "Matching value of a header field. Responses of such a route have cache keys of their own.",
    ),
    ("routes[].match.query.NAME", "Matching value of a query parameter, as it is written in the URL."),
    ("routes[].upstream", "Name of the upstream. Not with `redirect` or `respond`."),
    ("routes[].redirect.to", "Answers with this `Location`. Variables: see [routes](routes.md)."),
    ("routes[].redirect.status", "Status of the redirect: 301, 302, 303, 307 or 308."),
    ("routes[].respond.status", "Status of a response without an upstream."),
    ("routes[].respond.body", "Its body, at most 64 KiB."),
    ("routes[].respond.content_type", "Its content type."),
    (
        "routes[].headers.request.set.NAME",
        "Replaces a field of requests to the origin; `host` is the host for the origin. Variables: see [routes](routes.md).",
    ),
    ("routes[].headers.request.add.NAME", "Adds a line to requests to the origin."),
    ("routes[].headers.request.remove", "Removes fields of requests to the origin."),
    ("routes[].headers.response.set.NAME", "Replaces a field of responses, those of the gateway included."),
    ("routes[].headers.response.add.NAME", "Adds a line to responses, those of the gateway included."),
    ("routes[].headers.response.remove", "Removes fields of responses."),
    (
        "routes[].strip_prefix",
        "Removes this beginning of the path for the origin. Route, limits, cache key and purges keep the public path.",
    ),
    (
        "routes[].rewrite",
        "The path for the origin, with variables such as `{rest}`: what the `*` of `match.path` stands for. The query stays.",
    ),
    (
        "pages.NAME",
        "File with the page for a status (`404`) or class (`5xx`) of the gateway's own responses to clients that accept HTML, as a template. Used where the route has none, and for requests without a route. [Routes](routes.md#pages)",
    ),
    ("routes[].pages.NAME", "As `pages`, for this route. The origin's own error responses pass unchanged."),
    (
        "routes[].body_bytes",
        "Bytes of a request body on this route, in place of `limits_http.body_bytes`; more is answered 413.",
    ),
    (
        "routes[].allow",
        "Addresses of clients that may use the route; empty: all that are not in `deny`. Others get 403.",
    ),
    ("routes[].deny", "Addresses of clients that get 403."),
    (
        "routes[].security_headers",
        "Preset of response fields that tell browsers to be strict; a field that the response has already stays (routes.md).",
    ),
    (
        "routes[].compress",
        "Content codings for clients, in the order of preference, or a table with the keys below (routes.md). Absent: responses are not compressed.",
    ),
    ("routes[].compress.codings", "Content codings, in the order of preference."),
    ("routes[].compress.types", "Media types that are compressed; replaces the default list."),
    ("routes[].compress.min_bytes", "A shorter body is sent as it is."),
    (
        "routes[].compress.credentials",
        "Whether responses to requests with `Cookie` or `Authorization`, and responses with `Set-Cookie`, are compressed too where no other client gets them: an attacker who chooses part of such a response can guess a secret in it from its size (BREACH).",
    ),
    (
        "routes[].cors.origins",
        "Origins whose scripts may use the route. The gateway answers preflights and replaces the origin's fields.",
    ),
    ("routes[].cors.methods", "Methods that a preflight allows."),
    ("routes[].cors.headers", "Request fields that a preflight allows; empty: those that it asks for."),
    ("routes[].cors.expose", "Response fields that scripts may read."),
    ("routes[].cors.credentials", "Whether requests may carry cookies and other credentials."),
    ("routes[].cors.max_age", "How long a browser may remember a preflight."),
    ("routes[].limits", "Names of the limits that apply; all of them must admit the request."),
    ("routes[].cost", "Cost of one request in each limit; at most the burst of each."),
    (
        "routes[].cost_by_status.NAME",
        "Additional cost of a response by its status or class (`401`, `5xx`), for failed logins for instance.",
    ),
    ("routes[].journal", "Accepts writes with 202 and replays them."),
    (
        "routes[].auth.basic",
        "File of users and password hashes (bcrypt, argon2 or SHA-crypt) that HTTP Basic accepts; reloaded when it changes. docs/identity.md",
    ),
    (
        "routes[].auth.api_keys",
        "File of hashed API keys, as `tidegate key` prints them; reloaded when it changes. The name of the key is the user.",
    ),
    (
        "routes[].auth.forward",
        "URL of a service that decides about each request: a GET with the fields of the request, `X-Forwarded-Method`, `-Uri`, `-Host`, `-Proto` and `-For`. A response 2xx lets the request pass and is used again as its `Cache-Control` says; any other one but 5xx is the response to the client. Without an answer, the client gets 503.",
    ),
    (
        "routes[].auth.headers",
        "Fields of the service's acceptance that the origin receives; those of the client are removed.",
    ),
    ("routes[].auth.user", "Field of the service's acceptance that names the user, for `{user}`."),
    ("routes[].auth.timeout", "Longest time of a call of the service."),
    (
        "routes[].auth.header",
        "Field that carries the API key. In `authorization`, the key follows the scheme `Bearer`.",
    ),
    ("routes[].auth.realm", "Name in the challenge to requests without valid credentials."),
    (
        "routes[].auth.credentials",
        "Whether the field with the credentials is removed from requests to the origin, or forwarded.",
    ),
    (
        "routes[].cache.tags",
        "Response field with the surrogate keys, separated by white space or commas; `\"\"`: none. They can be purged: see [purging](purging.md).",
    ),
    ("routes[].cache.mode", "`standard` is RFC 9111 as a shared cache; `off` neither looks up nor stores."),
    ("routes[].cache.default_ttl", "Freshness lifetime of responses without explicit freshness information."),
    (
        "routes[].cache.ttl.NAME",
        "Freshness lifetime of responses with a status (`404`) or of a class (`5xx`), which overrides the origin's; `\"0s\"`: not stored.",
    ),
    (
        "routes[].cache.ttl_jitter_percent",
        "Up to this percentage of the freshness lifetime is subtracted at random from each response, so that responses stored together do not expire together.",
    ),
    (
        "cache.heuristic",
        "Whether responses without explicit freshness may be reused for a tenth of the time since `Last-Modified`, where a route sets neither `cache.heuristic` nor `cache.heuristic_max`.",
    ),
    (
        "routes[].cache.heuristic",
        "Whether the route has heuristic freshness; `false` is `heuristic_max = \"0s\"`. Absent: as `cache.heuristic`.",
    ),
    (
        "routes[].cache.heuristic_max",
        "Upper bound of heuristic freshness: a tenth of the time since `Last-Modified`, for responses without other freshness information. `\"0s\"`: no heuristic freshness.",
    ),
    (
        "routes[].cache.set_cookie",
        "Handling of responses with `Set-Cookie`: `private` does not store them, `shared` stores them like others, including the cookie.",
    ),
    (
        "routes[].cache.cookies",
        "Whether `default_ttl`, `ttl` and heuristic freshness apply to responses to requests with `Cookie`: `explicit` counts only a lifetime that the origin gives, `ignored` states that no page of the route depends on cookies. Absent: as `ignored`, with a warning of `tidegate check`.",
    ),
    ("routes[].cache.stale_if_error", "How long a stale response may be served if the upstream fails (RFC 5861)."),
    (
        "routes[].cache.stale_while_revalidate",
        "How long a stale response may be served while it is revalidated (RFC 5861).",
    ),
    (
        "routes[].cache.languages",
        "Languages of the responses, such as `[\"en\", \"zh\"]`: `Accept-Language` is reduced to the one that the client prefers, for the cache and the origin; removed if it accepts none. Empty: it stays as it is.",
    ),
    (
        "routes[].forward_path",
        "Path that the origin gets: the `normal` form, or the path as `received`. Routes, limits and keys use the normal form in any case.",
    ),
    (
        "routes[].canary.upstream",
        "Name of another upstream for a part of the requests. Stored responses of both are kept apart.",
    ),
    (
        "routes[].canary.percent",
        "Part of the callers, in percent: by user, without one by device. A caller stays with its upstream; a larger percentage only adds callers. With `identity.secret` the same on all gateways.",
    ),
    (
        "routes[].canary.header.NAME",
        "Value of a field of requests that go to the canary in any case: `header = { x-canary = \"1\" }`, `\"*\"` for any value. All must match.",
    ),
    (
        "routes[].mirror.upstream",
        "Name of another upstream that gets copies of the requests which the route's upstream gets, with bodies of up to 64 KiB. Its responses are dropped.",
    ),
    ("routes[].mirror.percent", "Part of the requests that are copied, in percent."),
    ("routes[].timeout", "Replaces `timeout` of the upstream for this route."),
    ("routes[].idle_timeout", "Replaces `idle_timeout` of the upstream for this route."),
    (
        "routes[].hedge",
        "Whether a request without a body and of an idempotent method is sent to a second endpoint if the first one has not responded in the time in which 95 % of the recent responses came. The first good response is used. Hedges share the budget of `retries`.",
    ),
    ("routes[].total_timeout", "Replaces `total_timeout` of the upstream for this route. `\"0s\"`: no limit."),
    (
        "routes[].degrade.status",
        "Status of the degrade page; 503 becomes 502 if the response of the upstream is malformed.",
    ),
    ("routes[].degrade.html", "File with the page for clients that accept HTML. Absent: the built-in page."),
    ("routes[].degrade.json", "File with the document for clients that accept JSON. Absent: the built-in document."),
    ("routes[].degrade.retry_after", "Center of the range of the jittered `Retry-After`."),
    ("log.access", "Destination of the access log (JSON lines)."),
    ("log.format", "Form of access log lines: JSON objects, or the combined format of Apache and nginx."),
    ("log.fields", "Members of JSON lines, in their order (operations.md). Members without a value are left out."),
    ("log.level", "Least severe event in the log."),
    ("journal", "Store of accepted writes."),
    (
        "tracing.otlp",
        "Collector that spans are sent to, by OTLP over HTTP in JSON ([tracing.md](tracing.md)); `/v1/traces` is added to a URL without it. Absent or empty: requests are not traced.",
    ),
    (
        "tracing.ratio",
        "Share of the requests without a trace that are sampled, and of those for which a peer outside `identity.trusted_proxies` asks. A request with a trace of a trusted peer is sampled as its sender has decided.",
    ),
    ("tracing.service_name", "`service.name` of the spans."),
    ("tracing.compression", "Compression of exports, as in `OTEL_EXPORTER_OTLP_COMPRESSION`."),
    (
        "tracing.query",
        "Whether spans have the query of the request (`url.query`), which may carry tokens and signatures.",
    ),
    ("tracing.headers.NAME", "A field of each export, such as `authorization`."),
];

/// The table of keys in Markdown, as in `docs/configuration.md`.
#[cfg(test)]
pub(crate) fn markdown() -> String {
    let keys = declared_keys();
    let mut text = String::from("| key | type | default | description |\n|---|---|---|---|\n");
    for (key, description) in DESCRIPTIONS {
        let spec = keys.iter().find(|spec| spec.key == *key);
        let (kind, default) = spec.map_or_else(Default::default, kind_and_default);
        writeln!(text, "| `{key}` | {kind} | {default} | {description} |").expect("writing to a string does not fail");
    }
    text
}

#[cfg(test)]
fn kind_and_default(spec: &KeySpec) -> (String, String) {
    let default = match &spec.default {
        KeyDefault::Required => "required".to_owned(),
        KeyDefault::RequiredWithout(others) => {
            let others: Vec<String> = others.iter().map(|other| format!("`{other}`")).collect();
            format!("required without {}", others.join(" or "))
        }
        KeyDefault::None => "none".to_owned(),
        KeyDefault::Value(value) => format!("`{value}`"),
        KeyDefault::Unavailable => "not available yet".to_owned(),
    };
    (spec.kind.clone(), default)
}

/// Every available key with its description.
pub(super) fn documented_keys() -> impl Iterator<Item = (KeySpec, &'static str)> {
    let description = |key: &str| DESCRIPTIONS.iter().find(|(documented, _)| *documented == key);
    declared_keys().into_iter().filter_map(move |spec| {
        let (_, text) = description(&spec.key)?;
        Some((spec, *text))
    })
}

/// All declarations of readers about tables.
pub(super) fn declared_tables() -> Vec<TableSpec> {
    read_skeleton(|context| context.tables())
}

/// Every key that a reader declares.
fn declared_keys() -> Vec<KeySpec> {
    read_skeleton(|context| context.keys())
}

fn read_skeleton<T>(declared: fn(&ReadContext<'_>) -> T) -> T {
    let root = document::parse(SKELETON, DocumentFormat::Toml).expect("the skeleton is well-formed");
    let environment = ExpansionEnvironment::new(Path::new(""), &|_| None);
    let context = ReadContext::new(SKELETON, environment);
    table_reader::read_document(&context, &root, section::read);
    declared(&context)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "<!-- keys: generated by the tests of gateway with UPDATE_DOCS=1 -->\n";
    const END: &str = "<!-- end of keys -->\n";

    #[test]
    fn every_declared_key_is_documented_and_no_other() {
        let mut declared: Vec<String> = declared_keys().into_iter().map(|spec| spec.key).collect();
        let mut documented: Vec<&str> = DESCRIPTIONS.iter().map(|(key, _)| *key).collect();
        declared.sort();
        documented.sort_unstable();
        assert_eq!(declared, documented);
    }

    #[test]
    fn configuration_page_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(path).expect("docs/configuration.md exists");
        let (before, rest) = page.split_once(BEGIN).expect("the page marks where the keys begin");
        let (_, after) = rest.split_once(END).expect("the page marks where the keys end");
        let expected = format!("{before}{BEGIN}{}{END}{after}", markdown());
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, expected).expect("docs/configuration.md is writable");
        } else {
            assert!(page == expected, "docs/configuration.md is out of date: run the tests with UPDATE_DOCS=1");
        }
    }
}
