//! The facts of one request, from which its access log line, metrics and `Cache-Status` are
//! written.
//!
//! Each phase of the pipeline fills in its own fields. Decisions read only `must_close`, `verdict`
//! and `cache`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use limiter::{Admission, KeyHash, Verdict};
use shard::{Region, Slot};

use crate::cache::stored::Freshness;
use crate::error::ErrorKind;
use crate::http::exchange_clock::Blame;
use crate::http::h1::RequestRefusal;
use crate::http::message::NamedVersion;
use crate::identify::auth::PrincipalIndex;
use crate::identify::{CountryCode, RequestId, Trace};
use crate::label;
use crate::spans::RequestSpans;

label! {
    /// How the cache took part in a request.
    pub(crate) CacheResult, "cache", {
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

/// Why a request was forwarded to the origin (RFC 9211 section 2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ForwardReason {
    /// The route does not cache.
    #[default]
    Bypass,
    /// The cache does not answer this method.
    Method,
    UriMiss,
    /// A response is stored for the URI, but not for these request fields.
    VaryMiss,
    /// The key is marked as uncacheable.
    Miss,
    /// The stored response is fresh, but the request demands validation or a newer response.
    Request,
    Stale,
    /// A part is stored, but not the requested one.
    Partial,
}

impl ForwardReason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            ForwardReason::Bypass => "bypass",
            ForwardReason::Method => "method",
            ForwardReason::UriMiss => "uri-miss",
            ForwardReason::VaryMiss => "vary-miss",
            ForwardReason::Miss => "miss",
            ForwardReason::Request => "request",
            ForwardReason::Stale => "stale",
            ForwardReason::Partial => "partial",
        }
    }
}

/// The `detail` parameter of `Cache-Status` (RFC 9211 section 2.8).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum CacheDetail {
    #[default]
    None,
    Reason(&'static str),
    /// Cache layer, region and slot of a stored response.
    Location(&'static str, Region, Slot),
}

/// The facts of one request that log, metrics and `Cache-Status` report.
#[derive(Debug)]
pub(crate) struct RequestRecord {
    /// Index of the route in the snapshot.
    pub(crate) route: Option<usize>,
    pub(crate) cache: CacheResult,
    pub(crate) forward: ForwardReason,
    /// The location of a stored response, or the reason why a response was not stored.
    pub(crate) detail: CacheDetail,
    /// The cache key, where `cache.status_key` exposes it.
    pub(crate) key: Option<String>,
    pub(crate) freshness: Option<Freshness>,
    /// Status of the origin's response.
    pub(crate) forwarded_status: Option<u16>,
    pub(crate) stored: bool,
    /// The decision of the route's limits.
    pub(crate) verdict: Verdict,
    /// The version that the head of a refused request names.
    pub(crate) version: NamedVersion,
    /// Why the request was refused as malformed or oversize.
    pub(crate) refusal: Option<RequestRefusal>,
    /// The rung of the degrade ladder that answered; empty where none did.
    pub(crate) degraded: &'static str,
    /// The side that is responsible for a failure.
    pub(crate) blame: Option<Blame>,
    /// The failure that the response, or the degrade page, reports.
    pub(crate) failure: Option<ErrorKind>,
    /// Why the response was not completed; empty if it was.
    pub(crate) aborted: &'static str,
    /// The endpoint that was called.
    pub(crate) upstream: Option<Arc<str>>,
    /// From the call of the upstream to the head of its response, or to its failure.
    pub(crate) upstream_time: Option<Duration>,
    /// The part of it in which a connection was opened; `None` if a kept one was used.
    pub(crate) connect_time: Option<Duration>,
    /// How often an endpoint was sent the whole request, for a fetch that others can join.
    pub(crate) requests_sent: u32,
    /// How often the request was sent again, as the configuration allows.
    pub(crate) retries: u32,
    /// Whether a second endpoint was sent the request because the first one was slow.
    pub(crate) is_hedged: bool,
    pub(crate) trace: Option<Trace>,
    /// `None`: the request is not traced, or not sampled.
    pub(crate) spans: Option<Box<RequestSpans>>,
    /// `None` also where requests have no id (`identity.request_id`).
    pub(crate) request_id: Option<RequestId>,
    pub(crate) client_ip: Option<IpAddr>,
    pub(crate) device: Option<KeyHash>,
    /// Index of the user class.
    pub(crate) user_class: Option<usize>,
    pub(crate) country: Option<CountryCode>,
    /// The key or the user that the route has authenticated.
    pub(crate) principal: Option<PrincipalIndex>,
    /// The response is a 304 or a 206 of content that is never compressed here.
    pub(crate) has_one_coding: bool,
    /// The request body failed, so the bytes that follow it on the connection are unusable.
    pub(crate) must_close: bool,
}

impl Default for RequestRecord {
    fn default() -> Self {
        RequestRecord {
            route: None,
            cache: CacheResult::Bypass,
            forward: ForwardReason::Bypass,
            detail: CacheDetail::None,
            key: None,
            freshness: None,
            forwarded_status: None,
            stored: false,
            verdict: Verdict::Allowed(Admission::default()),
            version: NamedVersion::Parsed,
            refusal: None,
            degraded: "",
            blame: None,
            failure: None,
            aborted: "",
            upstream: None,
            upstream_time: None,
            connect_time: None,
            requests_sent: 0,
            retries: 0,
            is_hedged: false,
            trace: None,
            spans: None,
            request_id: None,
            client_ip: None,
            device: None,
            user_class: None,
            country: None,
            principal: None,
            has_one_coding: false,
            must_close: false,
        }
    }
}
