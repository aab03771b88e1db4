//! Fields that the gateway adds to a response: `Cache-Status` (RFC 9211) and `Age` (RFC 9111).

use std::time::Duration;

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
    if record.retries > 0 {
        text.extend_from_slice(b"; retries=");
        text::push_number(text, u64::from(record.retries));
    }
    if record.is_hedged {
        text.extend_from_slice(b"; hedged");
    }
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

/// Sets `Age` on a response from the cache (RFC 9111 section 5.1).
pub(crate) fn write_age(age: Duration, fields: &mut Fields) {
    fields.remove(KnownField::Age);
    fields.add(KnownField::Age, itoa::Buffer::new().format(age.as_secs()));
}
