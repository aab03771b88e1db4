//! Metadata of a cache entry: the response head, and the times and names that decisions need,
//! computed when the response is stored.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shard::{CacheHit, StaleReason, Tag};

use super::extent::Extent;
use crate::http::fields::{Fields, KnownField};

/// The metadata of a stored response, or a marker in its place: hit-for-miss, or the `Vary` names
/// of its variants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum CacheMeta {
    Object(CachedObject),
    /// `Vary` marker: responses of this key vary by these request fields. Each variant has its own
    /// key, which contains the nonce. Variants of an invalidated marker are therefore never found
    /// again.
    Varies {
        names: Vec<String>,
        nonce: u64,
        tags: Vec<Tag>,
        /// The variants that this node has stored.
        #[serde(skip)]
        variants: VariantSet,
    },
    /// Hit-for-miss marker: responses of this key are not stored, and requests do not wait for each
    /// other.
    HitForMiss,
    /// A partial response to GET, with the head of the complete response.
    Partial(CachedObject, Extent),
}

/// Hashes of the variant keys that this node has stored for one URI, to bound their number.
#[derive(Clone, Debug, Default)]
pub struct VariantSet(Arc<Mutex<Vec<u64>>>);

impl VariantSet {
    /// Adds a variant, unless there are `max` others already. Returns whether the variant is in the
    /// set.
    pub(crate) fn admit(&self, hash: u64, max: usize) -> bool {
        let mut hashes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if hashes.contains(&hash) {
            return true;
        }
        if hashes.len() >= max {
            return false;
        }
        hashes.push(hash);
        true
    }
}

/// The head of a stored response, with its age, lifetimes and purge tags.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CachedObject {
    pub status: u16,
    #[serde(with = "fields")]
    pub fields: Fields,
    /// Age when the response was stored (RFC 9111 section 4.2.3).
    pub initial_age: Duration,
    /// Age at which the response becomes stale.
    pub lifetime: Duration,
    pub stale_while_revalidate: Duration,
    pub stale_if_error: Duration,
    /// `no-cache`: the response is never used without validation.
    pub must_validate: bool,
    /// The response is not served stale, not even to a request with `max-stale` (RFC 9111 section
    /// 4.2.4).
    pub forbids_stale: bool,
    /// The tags that the response can be purged by.
    pub tags: Vec<Tag>,
}

/// The age and lifetime of an object at one point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    pub(crate) age: Duration,
    pub(crate) lifetime: Duration,
}

impl Freshness {
    pub fn is_fresh(self) -> bool {
        self.age < self.lifetime
    }

    /// Remaining freshness in seconds, negative if stale. The `ttl` of RFC 9211 section 2.5.
    pub fn ttl(self) -> i64 {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        seconds(self.lifetime) - seconds(self.age)
    }

    /// How long the object has been stale.
    pub fn staleness(self) -> Duration {
        self.age.saturating_sub(self.lifetime)
    }
}

impl CachedObject {
    /// The freshness of the object in `hit` at `now`. After a soft purge the object is stale since
    /// the purge. During a subscription gap it is stale from now on.
    pub(crate) fn freshness_at(&self, hit: &CacheHit<CacheMeta>, now: Instant) -> Freshness {
        let Freshness { age, lifetime } = self.freshness_after(hit.age(now));
        let age_when_stale = match hit.stale_reason(now) {
            None => return Freshness { age, lifetime },
            Some(StaleReason::SoftPurged(ago)) => age.saturating_sub(ago),
            Some(StaleReason::SubscriptionGap) => age,
        };
        Freshness { age, lifetime: lifetime.min(age_when_stale) }
    }

    /// The freshness of the object `stored_for` after it was stored.
    pub fn freshness_after(&self, stored_for: Duration) -> Freshness {
        Freshness { age: self.initial_age.saturating_add(stored_for), lifetime: self.lifetime }
    }

    pub fn has_validator(&self) -> bool {
        self.fields.has(KnownField::ETag) || self.fields.has(KnownField::LastModified)
    }
}

impl shard::EntryMeta for CacheMeta {
    const SCHEMA: u16 = 3;

    fn heap_bytes(&self) -> usize {
        match self {
            CacheMeta::Object(object) | CacheMeta::Partial(object, _) => {
                object.fields.heap_bytes() + object.tags.capacity() * size_of::<Tag>()
            }
            CacheMeta::Varies { names, .. } => names.iter().map(|name| name.capacity() + size_of::<String>()).sum(),
            CacheMeta::HitForMiss => 0,
        }
    }

    fn tags(&self) -> &[Tag] {
        match self {
            CacheMeta::Object(object) | CacheMeta::Partial(object, _) => &object.tags,
            CacheMeta::Varies { tags, .. } => tags,
            CacheMeta::HitForMiss => &[],
        }
    }

    fn is_compressible(&self) -> bool {
        let CacheMeta::Object(object) = self else { return false };
        let content_type = object.fields.get(KnownField::ContentType).unwrap_or_default();
        let media_type = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        let is_text = media_type.get(..5).is_some_and(|prefix| prefix.eq_ignore_ascii_case(b"text/"));
        let media_type = media_type.to_ascii_lowercase();
        let textual_suffixes = [&b"json"[..], b"xml", b"javascript", b"wasm", b"x-www-form-urlencoded"];
        !object.fields.has(KnownField::ContentEncoding)
            && (is_text || textual_suffixes.iter().any(|suffix| media_type.ends_with(suffix)))
    }
}

/// Serialises fields as pairs of name and value. The indexes of known names differ between
/// releases.
mod fields {
    use super::{Deserialize, Deserializer, Fields, Serializer};

    pub(super) fn serialize<S: Serializer>(fields: &Fields, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(fields.iter().map(|field| (field.name, field.value)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Fields, D::Error> {
        let pairs: Vec<(Vec<u8>, Vec<u8>)> = Vec::deserialize(deserializer)?;
        let mut fields = Fields::default();
        for (name, value) in pairs {
            fields.push(&name, &value);
        }
        Ok(fields)
    }
}
