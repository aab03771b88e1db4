//! What the gateway says about an answer: `Cache-Status`, `Age`, `Via`, limits, and the story told to log and metrics.

use std::sync::Arc;
use std::time::Duration;

use limiter::{Report, Verdict};
use shard::{Region, Slot};

use crate::cache::stored::Standing;
use crate::http::fields::{Fields, Known};
use crate::http::h1::Refusal;
use crate::http::text;
use crate::identify::Trace;
use crate::label;

label! {
    /// How the cache took part in a request.
    CacheResult, "cache", {
        Bypass = "bypass",
        Hit = "hit",
        Miss = "miss",
        Stale = "stale",
        Revalidated = "revalidated",
        Collapsed = "collapsed",
        Remote = "remote",
        Pass = "pass",
        Error = "error",
    }
}

/// Why a request went towards the origin (RFC 9211 section 2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forward {
    /// The cache is off here.
    #[default]
    Bypass,
    /// The method is none that a cache answers.
    Method,
    UriMiss,
    /// The URI is stored, and not for these request fields.
    VaryMiss,
    /// Known to be uncacheable.
    Miss,
    /// What is stored is fresh, and the request wants it validated or something else.
    Request,
    Stale,
    /// A part is stored, and not the one that is wanted.
    Partial,
}

impl Forward {
    fn as_str(self) -> &'static str {
        match self {
            Forward::Bypass => "bypass",
            Forward::Method => "method",
            Forward::UriMiss => "uri-miss",
            Forward::VaryMiss => "vary-miss",
            Forward::Miss => "miss",
            Forward::Request => "request",
            Forward::Stale => "stale",
            Forward::Partial => "partial",
        }
    }
}

/// The `detail` of `Cache-Status` (RFC 9211 section 2.8).
#[derive(Clone, Copy, Debug, Default)]
pub enum Detail {
    #[default]
    None,
    Reason(&'static str),
    /// Tier, region and slot of a stored answer.
    Place(&'static str, Region, Slot),
}

/// Everything worth telling about a request, gathered on its way.
#[derive(Debug)]
pub struct Story {
    /// Its place among the routes.
    pub route: Option<usize>,
    pub cache: CacheResult,
    pub forward: Forward,
    /// Where an answer was found or why it was not stored; for `Cache-Status`.
    pub detail: Detail,
    /// The key that was looked up, where it is to be told.
    pub key: Option<String>,
    pub standing: Option<Standing>,
    pub forwarded_status: Option<u16>,
    pub stored: bool,
    /// What limits said.
    pub verdict: Verdict,
    /// Why the request was refused as malformed or oversize.
    pub refused: Option<Refusal>,
    pub degraded: &'static str,
    pub upstream: Option<Arc<str>>,
    pub trace: Option<Trace>,
    pub ip: Option<std::net::IpAddr>,
    /// The request's body failed: what follows it on the connection cannot be trusted.
    pub must_close: bool,
}

impl Default for Story {
    fn default() -> Self {
        Story {
            route: None,
            cache: CacheResult::Bypass,
            forward: Forward::Bypass,
            detail: Detail::None,
            key: None,
            standing: None,
            forwarded_status: None,
            stored: false,
            verdict: Verdict::Allowed(Report::default()),
            refused: None,
            degraded: "",
            upstream: None,
            trace: None,
            ip: None,
            must_close: false,
        }
    }
}

/// Appends this cache's member to `Cache-Status` (RFC 9211); those of caches nearer the origin stay before it.
pub fn write_cache_status(story: &Story, fields: &mut Fields) {
    fields.add_with(Known::CacheStatus, |text| write_member(story, text));
}

fn write_member(story: &Story, text: &mut Vec<u8>) {
    text.extend_from_slice(b"tidegate");
    match story.cache {
        CacheResult::Hit | CacheResult::Remote | CacheResult::Stale => text.extend_from_slice(b"; hit"),
        CacheResult::Error => {}
        CacheResult::Miss
        | CacheResult::Collapsed
        | CacheResult::Revalidated
        | CacheResult::Bypass
        | CacheResult::Pass => {
            text.extend_from_slice(b"; fwd=");
            text.extend_from_slice(story.forward.as_str().as_bytes());
        }
    }
    if story.cache == CacheResult::Collapsed {
        text.extend_from_slice(b"; collapsed");
    }
    if let Some(status) = story.forwarded_status {
        text.extend_from_slice(b"; fwd-status=");
        text::push_number(text, u64::from(status));
    }
    if story.stored {
        text.extend_from_slice(b"; stored");
    }
    if let Some(standing) = story.standing {
        text.extend_from_slice(b"; ttl=");
        text.extend_from_slice(itoa::Buffer::new().format(standing.ttl()).as_bytes());
    }
    if let Some(key) = &story.key {
        text.extend_from_slice(b"; key=\"");
        text.extend_from_slice(key.as_bytes());
        text.push(b'"');
    }
    match story.detail {
        Detail::None => {}
        Detail::Reason(reason) => {
            text.extend_from_slice(b"; detail=");
            text.extend_from_slice(reason.as_bytes());
        }
        Detail::Place(tier, region, slot) => {
            text.extend_from_slice(b"; detail=\"");
            text.extend_from_slice(tier.as_bytes());
            text.push(b' ');
            text.extend_from_slice(region.as_str().as_bytes());
            text.push(b':');
            text::push_number(text, u64::from(slot.number()));
            text.push(b'"');
        }
    }
}

/// Sets `Age` on an answer from the cache (RFC 9111 section 5.1).
pub fn write_age(age: Duration, fields: &mut Fields) {
    fields.remove(Known::Age);
    fields.add(Known::Age, itoa::Buffer::new().format(age.as_secs()));
}
