//! Metadata of a cache entry: the response head, and the times and names that decisions need,
//! computed when the response is stored.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shard::{CacheHit, StaleReason, Tag};

use super::config::CachePolicy;
use super::extent::Extent;
use crate::http::compressed_forms::CompressedForms;
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
    pub lifetime_source: LifetimeSource,
    /// Whether `stale_while_revalidate` was given by the cache policy.
    pub assumes_stale_while_revalidate: bool,
    /// Whether `stale_if_error` was given by the cache policy.
    pub assumes_stale_if_error: bool,
    /// The compressed forms of the body that this process has made.
    #[serde(skip)]
    pub forms: StoredForms,
}

/// Compressed forms of a stored body, which exist once a route that compresses has sent it.
#[derive(Clone, Debug, Default)]
pub struct StoredForms(OnceLock<Arc<CompressedForms>>);

impl StoredForms {
    pub(crate) fn get(&self) -> &Arc<CompressedForms> {
        self.0.get_or_init(Arc::default)
    }
}

/// Source of a stored lifetime. A lifetime that is not the origin's is also bounded by the policy
/// at the time of use, which may be another one: after a reload, or on another gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LifetimeSource {
    #[default]
    Origin,
    /// `default_ttl` of the policy.
    DefaultTtl,
    /// `ttl` of the policy, by status.
    StatusTtl,
    /// The time since the last modification, at most `heuristic_max`.
    Heuristic,
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
    pub(crate) fn freshness_at(&self, hit: &CacheHit<CacheMeta>, now: Instant, policy: &CachePolicy) -> Freshness {
        let Freshness { age, .. } = self.freshness_after(hit.age(now));
        let lifetime = self.lifetime_under(policy);
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

    /// The lifetime, as far as `policy` allows it.
    fn lifetime_under(&self, policy: &CachePolicy) -> Duration {
        if self.lifetime_source == LifetimeSource::Origin && policy.ttl.is_empty() {
            return self.lifetime;
        }
        let by_status = policy.ttl_for_status(self.status);
        let bound = match self.lifetime_source {
            LifetimeSource::Origin => by_status.unwrap_or(Duration::MAX),
            LifetimeSource::StatusTtl => by_status.unwrap_or(Duration::ZERO),
            LifetimeSource::DefaultTtl => by_status.unwrap_or(policy.default_ttl),
            LifetimeSource::Heuristic => by_status.unwrap_or(policy.heuristic_max),
        };
        self.lifetime.min(bound)
    }

    /// How long past its lifetime the object is served while it is revalidated, as far as `policy`
    /// allows it.
    pub(crate) fn stale_while_revalidate_under(&self, policy: &CachePolicy) -> Duration {
        let bound = if self.assumes_stale_while_revalidate { policy.stale_while_revalidate } else { Duration::MAX };
        self.stale_while_revalidate.min(bound)
    }

    /// How long past its lifetime the object is served if the origin fails, as far as `policy`
    /// allows it.
    pub(crate) fn stale_if_error_under(&self, policy: &CachePolicy) -> Duration {
        let bound = if self.assumes_stale_if_error { policy.stale_if_error } else { Duration::MAX };
        self.stale_if_error.min(bound)
    }

    pub fn has_validator(&self) -> bool {
        self.fields.has(KnownField::ETag) || self.fields.has(KnownField::LastModified)
    }
}

impl shard::EntryMeta for CacheMeta {
    const SCHEMA: u16 = 4;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::config::StatusPattern;

    const HOUR: Duration = Duration::from_secs(3_600);
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn lifetimes_of_a_policy_are_bounded_by_the_policy_at_the_time_of_use() {
        let policy = |change: fn(&mut CachePolicy)| {
            let mut policy = CachePolicy { default_ttl: HOUR, heuristic_max: HOUR, ..CachePolicy::default() };
            change(&mut policy);
            policy
        };
        let same = policy(|_| {});
        let shorter = policy(|policy| (policy.default_ttl, policy.heuristic_max) = (MINUTE, Duration::ZERO));
        let by_status = policy(|policy| policy.ttl = vec![(StatusPattern::Class(2), MINUTE)]);
        for (source, expected) in [
            (LifetimeSource::Origin, [HOUR, HOUR, MINUTE]),
            (LifetimeSource::DefaultTtl, [HOUR, MINUTE, MINUTE]),
            (LifetimeSource::Heuristic, [HOUR, Duration::ZERO, MINUTE]),
            (LifetimeSource::StatusTtl, [Duration::ZERO, Duration::ZERO, MINUTE]),
        ] {
            let object =
                CachedObject { status: 200, lifetime: HOUR, lifetime_source: source, ..CachedObject::default() };
            let lifetimes = [&same, &shorter, &by_status].map(|policy| object.lifetime_under(policy));
            assert_eq!(lifetimes, expected, "{source:?}");
        }
    }

    #[test]
    fn stale_windows_of_a_policy_are_bounded_by_the_policy_at_the_time_of_use() {
        let policy =
            CachePolicy { stale_if_error: MINUTE, stale_while_revalidate: Duration::ZERO, ..CachePolicy::default() };
        let object = |assumes| CachedObject {
            stale_if_error: HOUR,
            stale_while_revalidate: HOUR,
            assumes_stale_if_error: assumes,
            assumes_stale_while_revalidate: assumes,
            ..CachedObject::default()
        };
        let windows = |object: &CachedObject| {
            (object.stale_if_error_under(&policy), object.stale_while_revalidate_under(&policy))
        };
        assert_eq!(windows(&object(true)), (MINUTE, Duration::ZERO));
        assert_eq!(windows(&object(false)), (HOUR, HOUR), "the origin's own");
    }
}
