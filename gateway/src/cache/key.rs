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
        Some(query) if settings.key_ignore_query.is_empty() && !settings.key_sort_query => {
            builder.part(query.as_bytes());
        }
        Some(query) => {
            let kept = query.split('&').filter(|pair| !is_ignored(&settings.key_ignore_query, pair));
            let mut kept: Vec<&str> = kept.collect();
            if settings.key_sort_query {
                // Stable: the values of one parameter keep their order, which often means something.
                kept.sort_by_key(|pair| pair.split('=').next());
            }
            builder.part(kept.join("&").as_bytes());
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

/// Path and query of a URI of the same origin as `request` (RFC 9110 section 4.3.1): absolute, or a path from the root.
pub fn same_origin(uri: &str, request: &Request) -> Option<String> {
    let target = if uri.starts_with('/') && !uri.starts_with("//") {
        uri
    } else {
        let (scheme, rest) = uri.split_once("://")?;
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let is_same =
            scheme.eq_ignore_ascii_case(request.scheme.as_str()) && authority.eq_ignore_ascii_case(&request.authority);
        if !is_same {
            return None;
        }
        target
    };
    let target = target.split('#').next().unwrap_or_default();
    Some(if target.starts_with('/') { target.to_owned() } else { format!("/{target}") })
}

/// Appends what makes a variant: each named request field with its members, white space and empty members aside. Where the
/// grammar says that order and letter case mean nothing, they make no difference.
pub fn variant<'a>(builder: &'a mut KeyBuilder, names: &[String], stamp: u64, request: &Fields) -> KeyRef<'a> {
    builder.part(&stamp.to_le_bytes());
    for name in names {
        builder.part(name.as_bytes());
        let values: Vec<&[u8]> = request.named(name.as_bytes()).flat_map(members).collect();
        match name.as_str() {
            "accept-encoding" | "accept-language" => builder.part(&preferences(&values).join(&b","[..])),
            _ => builder.part(&values.join(&b","[..])),
        };
    }
    builder.key()
}

/// Codings or languages in a form that is the same for the same preferences: small letters, no white space, weights only where
/// they are not 1, in order of their names (RFC 9110 sections 12.4.2, 12.5.3 and 12.5.4).
fn preferences(values: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut preferences: Vec<Vec<u8>> = values
        .iter()
        .map(|value| {
            let mut text: Vec<u8> = value.iter().filter(|byte| !byte.is_ascii_whitespace()).copied().collect();
            text.make_ascii_lowercase();
            if let Some(at) = memchr::memmem::find(&text, b";q=") {
                let zeroless = text.trim_ascii_end().iter().rposition(|byte| *byte != b'0').map_or(at, |last| last + 1);
                let is_fraction = text[at..].contains(&b'.');
                text.truncate(if is_fraction { zeroless } else { text.len() });
                if text.ends_with(b".") {
                    text.pop();
                }
                if text.ends_with(b";q=1") {
                    text.truncate(at);
                }
            }
            text
        })
        .collect();
    preferences.sort_unstable();
    preferences.dedup();
    preferences
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
    fn the_same_preferences_are_one_variant() {
        let of = |value: &str| preferences(&members(value.as_bytes()).collect::<Vec<_>>());
        assert_eq!(of("gzip, br"), of("BR,GZIP;q=1.000"));
        assert_eq!(of("de;q=0.50, en"), of("en, DE ; q=0.5"));
        assert_ne!(of("gzip;q=0"), of("gzip"));
        assert_ne!(of("gzip;q=0.1"), of("gzip;q=0.01"));
        assert_ne!(of("en;q=0.5"), of("en;q=0.6"));
    }

    #[test]
    fn the_order_of_a_query_counts_unless_told_otherwise() {
        let sorted = |target: &str| {
            let settings = Settings { key_sort_query: true, ..Settings::default() };
            let mut request = Request::default();
            request.set_target(target);
            let mut builder = KeyBuilder::new();
            primary(&mut builder, &settings, &request, &Region::DEFAULT);
            builder.key().as_bytes().to_vec()
        };
        assert_eq!(sorted("/?b=1&a=2"), sorted("/?a=2&b=1"));
        assert_ne!(sorted("/?a=1&a=2"), sorted("/?a=2&a=1"));
        assert_ne!(key("/?b=1&a=2", "eu", &[]), key("/?a=2&b=1", "eu", &[]));
    }

    #[test]
    fn only_uris_of_the_same_origin_are_ours() {
        let request = Request { authority: "a:8080".into(), ..Request::default() };
        let of = |uri: &str| same_origin(uri, &request);
        for (uri, target) in
            [("/x?y#z", "/x?y"), ("HTTP://A:8080/x", "/x"), ("http://a:8080", "/"), ("http://a:8080?q", "/?q")]
        {
            assert_eq!(of(uri).as_deref(), Some(target), "{uri}");
        }
        for uri in ["//b/x", "https://a:8080/x", "http://a/x", "http://b:8080/x", "x", "mailto:a", ""] {
            assert_eq!(of(uri), None, "{uri}");
        }
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
