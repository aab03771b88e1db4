//! The request fields that only trusted proxies may send.
//!
//! Applications and frameworks read the client's address, the host, the path, the scheme or the
//! method from them. Not in the cache key of an ordinary client, they would let it store its own
//! response for others.

use crate::hop;
use crate::http::fields::{Fields, KnownField, KnownFieldSet};

/// The fields that are removed unless a trusted proxy sends them (`identity.untrusted_fields`).
/// The gateway always replaces `Forwarded` and `X-Forwarded-For`, `-Host` and `-Proto`.
pub(super) fn default_list() -> impl Iterator<Item = &'static str> {
    hop::CLIENT_ADDRESS_FIELDS.iter().chain(hop::ALTERNATIVE_FIELDS).map(|known| known.as_str())
}

/// The names to remove, known ones as a set, so that a request without them costs one bit test.
pub(super) struct UntrustedFields {
    known: KnownFieldSet,
    names: Vec<Vec<u8>>,
}

impl UntrustedFields {
    pub(super) fn new<'a>(list: impl Iterator<Item = &'a str>) -> Self {
        let mut known = KnownFieldSet::default();
        let mut names = Vec::new();
        for name in list {
            match KnownField::of(name.as_bytes()) {
                Some(field) => known = known.with(field),
                None => names.push(name.as_bytes().to_vec()),
            }
        }
        UntrustedFields { known, names }
    }

    /// Removes the fields from a request of an untrusted peer.
    pub(super) fn remove(&self, fields: &mut Fields) {
        let has_name = || fields.iter().any(|field| self.is_named(field.name));
        if fields.has_any(self.known) || (!self.names.is_empty() && has_name()) {
            fields.retain(|field| {
                !field.known.is_some_and(|known| self.known.contains(known)) && !self.is_named(field.name)
            });
        }
    }

    fn is_named(&self, name: &[u8]) -> bool {
        self.names.iter().any(|other| name.eq_ignore_ascii_case(other))
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
            ("Accept", "6"),
        ]);
        UntrustedFields::new(list.into_iter()).remove(&mut request);
        assert_eq!(request.iter().map(|field| field.value).collect::<Vec<_>>(), [b"5", b"6"]);
        UntrustedFields::new(default_list()).remove(&mut request);
        assert_eq!(request.iter().map(|field| field.value).collect::<Vec<_>>(), [b"6"]);
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
