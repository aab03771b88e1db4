//! Configuration of the response cache: the `[cache]` table and the cache policy of a route.

use std::sync::Arc;
use std::time::Duration;

use crate::http::target::PathRules;

/// Configuration that all routes share (`[cache]`).
#[derive(Clone, Debug, PartialEq)]
pub struct CacheConfig {
    /// Capacity of the local cache layer in bytes.
    pub(crate) memory_bytes: u64,
    /// Lookups per second of one key, over all threads, at which the key counts as hot.
    pub(crate) hot_rate: u32,
    /// Largest response that is stored, in bytes. A larger response is passed through.
    pub(crate) object_bytes: u64,
    /// Largest response that is stored remotely, in bytes. A larger response is stored only
    /// locally.
    pub(crate) remote_object_bytes: u64,
    /// Limit on the bytes of all bodies that are being fetched into the cache. Bodies above the
    /// limit are passed through and not stored.
    pub(crate) inflight_fetch_bytes: u64,
    /// Query parameters that are not part of the cache key. A trailing `*` matches any suffix.
    /// Default: none.
    pub(crate) key_ignore_query: Vec<String>,
    /// Sorts the query parameters in the cache key, so that their order is not significant.
    pub(crate) key_sort_query: bool,
    /// Request fields, in lower case, that are part of every key. They separate the tenants of one
    /// origin.
    pub(crate) key_fields: Vec<String>,
    /// Adds the cache key to `Cache-Status`.
    pub(crate) exposes_key: bool,
    /// Whether routes have heuristic lifetimes unless they say otherwise.
    pub(crate) heuristic: bool,
    /// Maximum number of stored variants (`Vary`) per URI.
    pub(crate) variants: usize,
    /// Targeted fields (RFC 9213) for this cache, in lower case, the most specific first.
    pub(crate) targeted: Vec<String>,
    /// Removes the targeted fields from responses to clients.
    pub(crate) strip_targeted: bool,
    pub(crate) honour_client: HonourClient,
    /// The normal form of paths in the URLs of purges and in `Location` (`server.paths`).
    pub(crate) paths: PathRules,
}

/// How far the demands of a request (`no-cache`, `max-age`, `min-fresh` and `Pragma: no-cache`)
/// force the validation of a stored response (RFC 9111 section 5.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum HonourClient {
    /// Always, as RFC 9111 says.
    #[default]
    Full,
    /// Not if the response was stored or validated within the last second: clients cannot send more
    /// than one request a second for each object to the origin.
    Limited,
    /// Never. Nor does `no-store` of a request prevent storing.
    Off,
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig {
            memory_bytes: 256 << 20,
            // One hundredth of the request rate of one core. Ordinary keys stay far below it.
            hot_rate: 1_000,
            object_bytes: 8 << 20,
            remote_object_bytes: 1 << 20,
            inflight_fetch_bytes: 128 << 20,
            key_ignore_query: Vec::new(),
            key_sort_query: false,
            key_fields: Vec::new(),
            exposes_key: false,
            heuristic: true,
            variants: 128,
            targeted: vec!["cdn-cache-control".to_owned()],
            strip_targeted: false,
            honour_client: HonourClient::Full,
            paths: PathRules::default(),
        }
    }
}

/// Cache policy of a route (`routes.cache`). It applies where the origin gives no directive of its
/// own.
#[derive(Clone, Debug, PartialEq)]
pub struct CachePolicy {
    /// Freshness lifetime of a response without one. Zero: only responses with an explicit lifetime
    /// are stored.
    pub(crate) default_ttl: Duration,
    /// Freshness lifetimes by status, which override the origin. The first match applies. A
    /// response that must not be stored is not stored despite a match.
    pub(crate) ttl: Vec<(StatusPattern, Duration)>,
    /// Random reduction of each lifetime, up to this percentage. Responses stored at the same time
    /// then do not expire at the same time.
    pub(crate) ttl_jitter_percent: u32,
    /// Upper bound of the heuristic lifetime derived from `Last-Modified` (RFC 9111 section 4.2.2).
    /// Zero disables the heuristic.
    pub(crate) heuristic_max: Duration,
    pub(crate) set_cookie: SetCookiePolicy,
    pub(crate) cookies: CookiePolicy,
    /// The response field with the surrogate keys, in lower case.
    pub(crate) tags: Option<String>,
    /// How long past its lifetime a response is served if the origin fails (RFC 5861 section 4).
    pub(crate) stale_if_error: Duration,
    /// How long past its lifetime a response is served while it is revalidated (RFC 5861 section
    /// 3).
    pub(crate) stale_while_revalidate: Duration,
    /// The languages of the route's responses, to which `Accept-Language` is reduced; empty: it
    /// stays as it is.
    pub(crate) languages: Arc<[String]>,
}

/// One status or a class of statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum StatusPattern {
    One(u16),
    /// The first digit of the status.
    Class(u16),
}

impl CachePolicy {
    /// The configured lifetime of responses with `status`.
    pub(crate) fn ttl_for_status(&self, status: u16) -> Option<Duration> {
        self.ttl.iter().find(|(statuses, _)| statuses.matches(status)).map(|(_, ttl)| *ttl)
    }
}

impl StatusPattern {
    pub(crate) fn matches(self, status: u16) -> bool {
        match self {
            StatusPattern::One(one) => one == status,
            StatusPattern::Class(class) => class == status / 100,
        }
    }
}

/// Whether a response with `Set-Cookie` is stored including its cookie, or is not stored (RFC 9111
/// section 7.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SetCookiePolicy {
    /// The response is not stored, because a cookie nearly always belongs to one user.
    #[default]
    Private,
    /// The response is stored including its cookie.
    Shared,
}

/// Whether the configured and heuristic lifetimes apply to responses to requests with `Cookie`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum CookiePolicy {
    /// They do. The configuration does not say whether pages depend on cookies.
    #[default]
    Unstated,
    /// They do: no page depends on cookies.
    Ignored,
    /// They do not: only a lifetime that the origin gives counts.
    Explicit,
}

impl Default for CachePolicy {
    fn default() -> Self {
        CachePolicy {
            default_ttl: Duration::ZERO,
            ttl: Vec::new(),
            ttl_jitter_percent: 0,
            heuristic_max: Duration::from_secs(3600),
            set_cookie: SetCookiePolicy::Private,
            cookies: CookiePolicy::Unstated,
            tags: Some("surrogate-key".to_owned()),
            stale_if_error: Duration::from_secs(600),
            stale_while_revalidate: Duration::ZERO,
            languages: Arc::default(),
        }
    }
}
