//! Names of stored responses: injective over scheme, authority, path, query, region, and the request fields a response varies by.

use std::time::Duration;

use shard::{KeyBuilder, KeyRef, Region};

use super::Settings;
use crate::http::fields::{Fields, Known, members};
use crate::http::message::Request;

/// Most names in a `Vary` that is honoured; a response with more is not stored.
pub const VARY_MAX: usize = 16;

/// How long a key is known to vary after a response said so; each response that is stored says it anew.
pub const VARIES_FOR: Duration = Duration::from_secs(24 * 3600);

/// Writes the primary key of a request. HEAD is answered from GET's response, so methods are not part of it.
pub fn primary(builder: &mut KeyBuilder, settings: &Settings, request: &Request, region: &Region) {
    builder.clear();
    builder.part(request.scheme.as_str().as_bytes());
    builder.part(request.authority.as_bytes());
    builder.part(request.path().as_bytes());
    builder.part(region.as_str().as_bytes());
    match request.query() {
        None => {}
        Some(query) if settings.key_ignore_query.is_empty() => {
            builder.part(query.as_bytes());
        }
        Some(query) => {
            let kept = query.split('&').filter(|pair| !is_ignored(&settings.key_ignore_query, pair));
            builder.part(kept.collect::<Vec<_>>().join("&").as_bytes());
        }
    }
}

fn is_ignored(patterns: &[String], pair: &str) -> bool {
    let name = pair.split('=').next().unwrap_or(pair);
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    })
}

/// Appends what makes a variant: each named request field with its members, white space and empty members aside.
pub fn variant<'a>(builder: &'a mut KeyBuilder, names: &[String], stamp: u64, request: &Fields) -> KeyRef<'a> {
    builder.part(&stamp.to_le_bytes());
    for name in names {
        builder.part(name.as_bytes());
        let values: Vec<&[u8]> = request.named(name.as_bytes()).flat_map(members).collect();
        builder.part(&values.join(&b","[..]));
    }
    builder.key()
}

/// The names in a response's `Vary`, lower case, sorted, without repetition (RFC 9111 section 4.1).
/// `None` where no request can ever match: `*`, or more names than are honoured.
pub fn vary(response: &Fields) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for member in response.members(Known::Vary) {
        if member == b"*" || names.len() == VARY_MAX {
            return None;
        }
        names.push(String::from_utf8_lossy(member).to_ascii_lowercase());
    }
    names.sort_unstable();
    names.dedup();
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(target: &str, region: &str, ignore: &[&str]) -> Vec<u8> {
        let settings = Settings {
            key_ignore_query: ignore.iter().map(|name| (*name).to_owned()).collect(),
            ..Settings::default()
        };
        let mut request = Request { authority: "a".into(), ..Request::default() };
        request.set_target(target);
        let mut builder = KeyBuilder::new();
        primary(&mut builder, &settings, &request, &Region::new(region).expect("valid"));
        builder.key().as_bytes().to_vec()
    }

    #[test]
    fn different_requests_have_different_keys() {
        let keys = ["/", "/?", "/a", "/a?b", "/a?", "/ab"].map(|target| key(target, "eu", &[]));
        for (at, one) in keys.iter().enumerate() {
            assert!(keys[at + 1..].iter().all(|other| other != one));
        }
        assert_ne!(key("/", "eu", &[]), key("/", "us", &[]));
    }

    #[test]
    fn ignored_parameters_do_not_count() {
        assert_eq!(key("/?utm_a=1&x=2&utm_b", "eu", &["utm_*"]), key("/?x=2", "eu", &["utm_*"]));
        assert_ne!(key("/?utmost=1", "eu", &["utm_*"]), key("/?", "eu", &["utm_*"]));
    }

    #[test]
    fn variants_compare_members_not_spelling_of_lists() {
        let names = vec!["accept-language".to_owned()];
        let of = |lines: &[&str]| {
            let mut fields = Fields::default();
            for line in lines {
                fields.push(b"Accept-Language", line.as_bytes());
            }
            let mut builder = KeyBuilder::new();
            variant(&mut builder, &names, 7, &fields).as_bytes().to_vec()
        };
        assert_eq!(of(&["de,  en"]), of(&["de", "en"]));
        assert_ne!(of(&["de"]), of(&[]));
        assert_ne!(of(&["de"]), of(&["en"]));
    }

    #[test]
    fn a_star_matches_nothing() {
        let mut fields = Fields::default();
        fields.push(b"Vary", b"B, a, b");
        assert_eq!(vary(&fields), Some(vec!["a".to_owned(), "b".to_owned()]));
        fields.push(b"vary", b"*");
        assert_eq!(vary(&fields), None);
    }
}
