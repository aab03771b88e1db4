//! The request fields that only trusted proxies may send.
//!
//! Applications and frameworks read the client's address, the host, the path, the scheme or the
//! method from them. Not in the cache key of an ordinary client, they would let it store its own
//! response for others.

use crate::hop;
use crate::http::fields::{Field, Fields, KnownFieldSet, matches_pattern};

/// The fields that are removed unless a trusted proxy sends them (`identity.untrusted_fields`).
/// The gateway always replaces `Forwarded` and `X-Forwarded-For`, `-Host` and `-Proto`.
pub(super) fn default_list() -> impl Iterator<Item = &'static str> {
    let known = hop::CLIENT_ADDRESS_FIELDS.iter().chain(hop::ALTERNATIVE_FIELDS).map(|known| known.as_str());
    // Names of the user among them: `X-Forwarded-User`, `-Email`, `-Groups`.
    known.chain(["x-forwarded-*"])
}

/// The names to remove. Known ones are a set; the others are patterns, compared with unknown names.
pub(super) struct UntrustedFields {
    known: KnownFieldSet,
    patterns: Vec<Vec<u8>>,
}

impl UntrustedFields {
    pub(super) fn new<'a>(list: impl Iterator<Item = &'a str>) -> Self {
        let (mut known, mut patterns) = (KnownFieldSet::default(), Vec::new());
        for name in list {
            let fields = KnownFieldSet::matching(name);
            known = known.union(fields);
            if fields == KnownFieldSet::default() || name.ends_with('*') {
                patterns.push(name.as_bytes().to_vec());
            }
        }
        UntrustedFields { known, patterns }
    }

    /// Removes the fields from a request of an untrusted peer.
    pub(super) fn remove(&self, fields: &mut Fields) {
        if fields.has_any(self.known) || fields.iter().any(|field| self.contains(field)) {
            fields.retain(|field| !self.contains(field));
        }
    }

    fn contains(&self, field: Field<'_>) -> bool {
        match field.known {
            Some(known) => self.known.contains(known),
            None => self.patterns.iter().any(|pattern| matches_pattern(field.name, pattern)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn removes_aliases_identity_and_configured_names() {
        let list = ["x-user-id", "x-tier", "x-real-ip", "x-internal"];
        let mut request = fields(&[
            ("X-Real-IP", "1"),
            ("x-user-ID", "2"),
            ("X-Tier", "3"),
            ("X-Internal", "4"),
            ("X-Original-URL", "5"),
            ("X-Forwarded-User", "5"),
            ("X-FORWARDED-anything", "5"),
            ("X-Forwarder", "6"),
            ("Accept", "6"),
        ]);
        UntrustedFields::new(list.into_iter()).remove(&mut request);
        assert_eq!(request.iter().map(|field| field.value).collect::<Vec<_>>(), [b"5", b"5", b"5", b"6", b"6"]);
        UntrustedFields::new(default_list()).remove(&mut request);
        assert_eq!(request.iter().map(|field| field.value).collect::<Vec<_>>(), [b"6", b"6"]);
    }

    #[test]
    fn a_prefix_stands_for_known_names_too() {
        let mut request = fields(&[("CF-Connecting-IP", "1"), ("CF-Visitor", "2"), ("CDN-Cache-Control", "3")]);
        UntrustedFields::new(["cf-*"].into_iter()).remove(&mut request);
        assert_eq!(request.iter().map(|field| field.value).collect::<Vec<_>>(), [b"3"]);
    }

    #[test]
    fn the_list_is_documented() {
        let page = include_str!("../../../docs/request-fields.md").to_ascii_lowercase();
        let section = page.split("\n## ").find(|section| section.starts_with("`identity.untrusted_fields`"));
        let mut documented: Vec<&str> = section
            .expect("the page has the section")
            .lines()
            .skip(1)
            .flat_map(|line| line.split('`').skip(1).step_by(2))
            .collect();
        documented.sort_unstable();
        let mut listed: Vec<&str> = default_list().collect();
        listed.sort_unstable();
        assert_eq!(documented, listed);
    }
}
