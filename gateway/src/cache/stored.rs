//! What is kept beside a body: the head to answer with, and the few times and names a decision needs, worked out when stored.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shard::{Doubt, Hit, Tag};

use super::part::Extent;
use crate::http::fields::{Fields, Known};

/// A stored response's metadata, or a mark that stands in its place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Meta {
    Object(Object),
    /// Responses of this key differ by these request fields; each variant has a key of its own, made with the stamp, so
    /// that variants of a mark that was invalidated are never found again.
    Varies {
        names: Vec<String>,
        stamp: u64,
        tags: Vec<Tag>,
        /// Which variants this node has stored.
        #[serde(skip)]
        variants: Variants,
    },
    /// Responses of this key are not stored (hit-for-miss): nobody waits for another's answer.
    Pass,
    /// A part of a response to GET, with the head of the whole.
    Part(Object, Extent),
}

/// The variants of one URI, by the hashes of their keys.
#[derive(Clone, Debug, Default)]
pub struct Variants(Arc<Mutex<Vec<u64>>>);

impl Variants {
    /// Whether a variant is among the `most` that are stored, or becomes one of them.
    pub fn admit(&self, hash: u64, most: usize) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains(&hash) {
            return true;
        }
        if known.len() >= most {
            return false;
        }
        known.push(hash);
        true
    }
}

/// A response that may answer again.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Object {
    pub status: u16,
    #[serde(with = "fields")]
    pub fields: Fields,
    /// Its age when it was stored (RFC 9111 section 4.2.3).
    pub initial_age: Duration,
    /// How old it may become and still be fresh.
    pub lifetime: Duration,
    pub stale_while_revalidate: Duration,
    pub stale_if_error: Duration,
    /// `no-cache`: never used without validation.
    pub must_validate: bool,
    /// Not even a request that accepts stale answers gets it stale (RFC 9111 section 4.2.4).
    pub forbids_stale: bool,
    /// What it can be purged by.
    pub tags: Vec<Tag>,
}

/// Where an object stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub age: Duration,
    pub lifetime: Duration,
}

impl Standing {
    pub fn is_fresh(self) -> bool {
        self.age < self.lifetime
    }

    /// Seconds of freshness left; negative when stale. The `ttl` of RFC 9211 section 2.5.
    pub fn ttl(self) -> i64 {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        seconds(self.lifetime) - seconds(self.age)
    }

    /// How long it has been stale.
    pub fn staleness(self) -> Duration {
        self.age.saturating_sub(self.lifetime)
    }
}

impl Object {
    /// Its standing now, as what `hit` holds: one that was purged softly is stale since then, one in doubt from now on.
    pub fn standing_of(&self, hit: &Hit<Meta>, now: Instant) -> Standing {
        let Standing { age, lifetime } = self.standing(hit.age(now));
        let doubted = match hit.doubt(now) {
            None => return Standing { age, lifetime },
            Some(Doubt::Purged(ago)) => age.saturating_sub(ago),
            Some(Doubt::Unwatched) => age,
        };
        Standing { age, lifetime: lifetime.min(doubted) }
    }

    /// Its standing when it has been stored for `held`.
    pub fn standing(&self, held: Duration) -> Standing {
        Standing { age: self.initial_age.saturating_add(held), lifetime: self.lifetime }
    }

    pub fn has_validator(&self) -> bool {
        self.fields.has(Known::ETag) || self.fields.has(Known::LastModified)
    }
}

impl shard::Meta for Meta {
    const SCHEMA: u16 = 3;

    fn heap_bytes(&self) -> usize {
        match self {
            Meta::Object(object) | Meta::Part(object, _) => {
                object.fields.heap_bytes() + object.tags.capacity() * size_of::<Tag>()
            }
            Meta::Varies { names, .. } => names.iter().map(|name| name.capacity() + size_of::<String>()).sum(),
            Meta::Pass => 0,
        }
    }

    fn tags(&self) -> &[Tag] {
        match self {
            Meta::Object(object) | Meta::Part(object, _) => &object.tags,
            Meta::Varies { tags, .. } => tags,
            Meta::Pass => &[],
        }
    }

    fn is_compressible(&self) -> bool {
        let Meta::Object(object) = self else { return false };
        let content = object.fields.get(Known::ContentType).unwrap_or_default();
        let content = content.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        let is_text = content.get(..5).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/"));
        let content = content.to_ascii_lowercase();
        let is_like_text = [&b"json"[..], b"xml", b"javascript", b"wasm", b"x-www-form-urlencoded"];
        !object.fields.has(Known::ContentEncoding)
            && (is_text || is_like_text.iter().any(|kind| content.ends_with(kind)))
    }
}

/// Fields travel as pairs; which names are known is this release's own affair.
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
