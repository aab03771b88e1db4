//! Fields that the gateway adds to a response: `Cache-Status` (RFC 9211), `Proxy-Status` (RFC 9209)
//! and `Age` (RFC 9111).

use std::time::Duration;

use crate::error::ErrorKind;
use crate::http::fields::{Fields, KnownField};
use crate::http::text;
use crate::record::{CacheDetail, CacheResult, RequestRecord};

/// Appends this cache's member to `Cache-Status` (RFC 9211 section 2). Members of caches nearer the
/// origin stay before it.
pub(crate) fn write_cache_status(record: &RequestRecord, fields: &mut Fields) {
    fields.add_with(KnownField::CacheStatus, |text| write_member(record, text));
}

fn write_member(record: &RequestRecord, text: &mut Vec<u8>) {
    text.extend_from_slice(b"tidegate");
    match record.cache {
        CacheResult::Hit | CacheResult::Remote | CacheResult::Stale => text.extend_from_slice(b"; hit"),
        CacheResult::Error => {}
        CacheResult::Miss
        | CacheResult::Collapsed
        | CacheResult::Revalidated
        | CacheResult::Bypass
        | CacheResult::Pass => {
            text.extend_from_slice(b"; fwd=");
            text.extend_from_slice(record.forward.as_str().as_bytes());
        }
    }
    if record.cache == CacheResult::Collapsed {
        text.extend_from_slice(b"; collapsed");
    }
    if let Some(status) = record.forwarded_status {
        text.extend_from_slice(b"; fwd-status=");
        text::push_number(text, u64::from(status));
    }
    write_repeats(record, text);
    if record.stored {
        text.extend_from_slice(b"; stored");
    }
    if let Some(freshness) = record.freshness {
        text.extend_from_slice(b"; ttl=");
        text.extend_from_slice(itoa::Buffer::new().format(freshness.ttl()).as_bytes());
    }
    if let Some(key) = &record.key {
        text.extend_from_slice(b"; key=\"");
        text.extend_from_slice(key.as_bytes());
        text.push(b'"');
    }
    match record.detail {
        CacheDetail::None => {}
        CacheDetail::Reason(reason) => {
            text.extend_from_slice(b"; detail=");
            text.extend_from_slice(reason.as_bytes());
        }
        CacheDetail::Location(layer, region, slot) => {
            text.extend_from_slice(b"; detail=\"");
            text.extend_from_slice(layer.as_bytes());
            text.push(b' ');
            text.extend_from_slice(region.as_str().as_bytes());
            text.push(b':');
            text::push_number(text, u64::from(slot.number()));
            text.push(b'"');
        }
    }
}

/// The parameters of further attempts: registered by neither RFC, which allow others.
fn write_repeats(record: &RequestRecord, text: &mut Vec<u8>) {
    if record.retries > 0 {
        text.extend_from_slice(b"; retries=");
        text::push_number(text, u64::from(record.retries));
    }
    if record.is_hedged {
        text.extend_from_slice(b"; hedged");
    }
}

/// Appends this proxy's member to `Proxy-Status` (RFC 9209 section 2), if there is anything to
/// tell: why the response is a page or stale instead of the origin's, and further attempts. Members
/// of proxies nearer the origin stay before it.
#[cold]
pub(crate) fn write_proxy_status(record: &RequestRecord, fields: &mut Fields) {
    let error = record.failure.filter(|_| !record.degraded.is_empty()).map(proxy_error);
    if error.is_none() && record.retries == 0 && !record.is_hedged {
        return;
    }
    fields.add_with(KnownField::ProxyStatus, |text| {
        text.extend_from_slice(b"tidegate");
        if let Some(error) = error {
            text.extend_from_slice(b"; error=");
            text.extend_from_slice(error.as_bytes());
        }
        write_repeats(record, text);
    });
}

/// The error type of RFC 9209 section 2.3 for a failure.
fn proxy_error(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::BreakerOpen | ErrorKind::NoEndpoints => "destination_unavailable",
        ErrorKind::ConcurrencyLimit => "connection_limit_reached",
        ErrorKind::Connect => "connection_refused",
        ErrorKind::NoAddress => "dns_error",
        ErrorKind::UpstreamTls => "tls_certificate_error",
        ErrorKind::UpstreamTlsAlert => "tls_alert_received",
        ErrorKind::UpstreamTlsProtocol => "tls_protocol_error",
        ErrorKind::ConnectTimeout => "connection_timeout",
        ErrorKind::NoResponse => "connection_terminated",
        ErrorKind::Malformed => "http_protocol_error",
        ErrorKind::Timeout | ErrorKind::TotalTimeout | ErrorKind::SharedFetchTimeout => "http_response_timeout",
        ErrorKind::Upstream => "http_response_incomplete",
        ErrorKind::NotSwitched => "http_upgrade_failed",
        _ => "proxy_internal_error",
    }
}

/// Sets `Age` on a response from the cache (RFC 9111 section 5.1).
pub(crate) fn write_age(age: Duration, fields: &mut Fields) {
    fields.remove(KnownField::Age);
    fields.add(KnownField::Age, itoa::Buffer::new().format(age.as_secs()));
}
