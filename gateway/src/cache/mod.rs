//! The response cache: what is stored, for how long, and what is answered when it is stale (RFC 9111 as a shared cache).
//!
//! `date`, `control` and `targeted` read fields, `fresh` reckons ages, `range` takes parts of a whole, `part` stores parts without the whole, `policy` decides, `stored` is what is kept beside a body, `key` names it, `tags` is what it is purged by, `fill` makes many
//! requests for one missing answer into one.

pub mod control;
mod date;
pub mod fill;
mod fresh;
pub mod key;
pub mod part;
pub mod policy;
mod range;
pub mod stored;
pub mod tags;
mod targeted;

use std::time::Duration;

/// Sizes and keys shared by all routes (`[cache]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Bytes of the local tier.
    pub memory_bytes: u64,
    /// Lookups of one key per second, over all threads, from which it is hot.
    pub hot_rate: u32,
    /// Bytes of the largest response that is stored; larger ones pass through.
    pub object_bytes: u64,
    /// Bytes of the largest response that is stored remotely; larger ones stay local.
    pub remote_object_bytes: u64,
    /// Bytes of all bodies on their way into the cache; more pass through without being stored.
    pub fill_bytes: u64,
    /// Names of query parameters that are left out of the cache key; a trailing `*` matches any rest. None by default.
    pub key_ignore_query: Vec<String>,
    /// Whether the order of query parameters counts for nothing.
    pub key_sort_query: bool,
    /// Request fields that are part of every key, in lower case: what tells the tenants of one origin apart.
    pub key_fields: Vec<String>,
    /// Whether `Cache-Status` tells the key.
    pub tells_key: bool,
    /// Most variants (`Vary`) of one URI that are stored at a time.
    pub variants: usize,
    /// Targeted fields (RFC 9213) that speak to this cache, the most specific first, in lower case.
    pub targeted: Vec<String>,
    /// Whether answers lose these fields on their way to clients.
    pub strip_targeted: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            memory_bytes: 256 << 20,
            // A key that takes a hundredth of what one core answers; ordinary ones stay far below.
            hot_rate: 1_000,
            object_bytes: 8 << 20,
            remote_object_bytes: 1 << 20,
            fill_bytes: 128 << 20,
            key_ignore_query: Vec::new(),
            key_sort_query: false,
            key_fields: Vec::new(),
            tells_key: false,
            variants: 128,
            targeted: vec!["cdn-cache-control".to_owned()],
            strip_targeted: false,
        }
    }
}

/// Freshness of one route's responses (`routes.cache`), where the origin says nothing itself.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutePolicy {
    /// Freshness lifetime of a response that carries none; zero stores only what says so itself.
    pub default_ttl: Duration,
    /// Freshness lifetimes by status, whatever the origin says of them; the first that fits counts. What may not be stored at
    /// all is not stored for them either.
    pub ttl: Vec<(Statuses, Duration)>,
    /// Up to this many hundredths of its lifetime are taken from each response at random, so that what was stored together does
    /// not expire together.
    pub ttl_jitter_percent: u32,
    /// At most this long counts a response as fresh for having `Last-Modified` alone (RFC 9111 section 4.2.2); zero for never.
    pub heuristic_max: Duration,
    pub set_cookie: SetCookie,
    /// The response field that holds surrogate keys, in lower case.
    pub tags: Option<String>,
    /// How long past its freshness a response may answer for a failing origin (RFC 5861 section 4).
    pub stale_if_error: Duration,
    /// How long past its freshness a response may answer while it is validated (RFC 5861 section 3).
    pub stale_while_revalidate: Duration,
}

/// One status, or a class of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Statuses {
    One(u16),
    /// By the first digit.
    Class(u16),
}

impl RoutePolicy {
    /// The lifetime that the operator gives to responses with `status`.
    pub fn ttl_of(&self, status: u16) -> Option<Duration> {
        let fits = |statuses: &Statuses| match statuses {
            Statuses::One(one) => *one == status,
            Statuses::Class(class) => *class == status / 100,
        };
        self.ttl.iter().find(|(statuses, _)| fits(statuses)).map(|(_, ttl)| *ttl)
    }
}

/// What becomes of responses with `Set-Cookie` (RFC 9111 section 7.3 leaves that to us).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SetCookie {
    /// They are not stored: a cookie is nearly always one user's.
    #[default]
    Private,
    /// They are stored like others, cookie and all.
    Shared,
}

impl Default for RoutePolicy {
    fn default() -> Self {
        RoutePolicy {
            default_ttl: Duration::ZERO,
            ttl: Vec::new(),
            ttl_jitter_percent: 0,
            heuristic_max: Duration::from_secs(3600),
            set_cookie: SetCookie::Private,
            tags: Some("surrogate-key".to_owned()),
            stale_if_error: Duration::from_secs(600),
            stale_while_revalidate: Duration::ZERO,
        }
    }
}
