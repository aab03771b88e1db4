//! Names of stored responses: injective over scheme, authority, path, query, region, and the request fields a response varies by.

use std::time::Duration;

use shard::{KeyBuilder, KeyRef, Region};
use url::Url;

use super::Settings;
use crate::http::fields::{Fields, Known, is_token, members};
use crate::http::message::{Request, Scheme};

/// Most names in a `Vary` that is honoured; a response with more is not stored.
pub const VARY_MAX: usize = 16;

/// How long a key is known to vary after a response said so; each response that is stored says it anew.
pub const VARIES_FOR: Duration = Duration::from_secs(24 * 3600);

/// How long a URI that has as many variants as are stored waits before it forgets them all and stores new ones.
pub const TURNOVER: Duration = Duration::from_secs(60);

/// Writes the primary key of a request. HEAD is answered from GET's response, so methods are not part of it.
pub fn primary(builder: &mut KeyBuilder, settings: &Settings, request: &Request, region: &Region) {
    builder.clear();
    builder.part(request.scheme.as_str().as_bytes());
    builder.part(address(request).as_bytes());
    builder.part(request.path().as_bytes());
    builder.part(region.as_str().as_bytes());
    Query::of(settings, request.query()).write(builder);
    // Nodes may be configured differently, so names and their count are told.
    builder.part(&[u8::try_from(settings.key_fields.len()).unwrap_or(u8::MAX)]);
    for name in &settings.key_fields {
        let lines = request.fields.named(name.as_bytes());
        builder.part(name.as_bytes()).part(&[u8::try_from(lines.count()).unwrap_or(u8::MAX)]);
        request.fields.named(name.as_bytes()).for_each(|line| {
            builder.part(line);
        });
    }
}

/// What of a query counts.
pub(super) enum Query<'a> {
    Absent,
    Whole(&'a str),
    Some(String),
}

impl<'a> Query<'a> {
    pub(super) fn of(settings: &Settings, query: Option<&'a str>) -> Query<'a> {
        let Some(query) = query else { return Query::Absent };
        if settings.key_ignore_query.is_empty() && !settings.key_sort_query {
            return Query::Whole(query);
        }
        let kept = query.split('&').filter(|pair| !is_ignored(&settings.key_ignore_query, pair));
        let mut kept: Vec<&str> = kept.collect();
        if settings.key_sort_query {
            // Stable: the values of one parameter keep their order, which often means something.
            kept.sort_by_key(|pair| pair.split('=').next());
        }
        Query::Some(kept.join("&"))
    }

    pub(super) fn write(&self, builder: &mut KeyBuilder) {
        match self {
            Query::Absent => builder.part(b""),
            Query::Whole(query) => builder.part_of(&[b"?", query.as_bytes()]),
            Query::Some(query) => builder.part_of(&[b"?", query.as_bytes()]),
        };
    }
}

/// A key as `Cache-Status` tells it (RFC 9211 section 2.7): its parts between bars; what is not printable, quotes and
/// backslashes in hexadecimal.
pub fn told(key: &KeyRef<'_>) -> String {
    let mut text = String::new();
    for part in key.parts() {
        let is_text = part.iter().all(|byte| matches!(byte, b' '..=b'~'));
        for byte in part {
            let is_plain = is_text && !br#""\|%"#.contains(byte);
            if is_plain { text.push(char::from(*byte)) } else { text.push_str(&format!("%{byte:02X}")) }
        }
        text.push('|');
    }
    text.pop();
    text
}

fn is_ignored(patterns: &[String], pair: &str) -> bool {
    let name = pair.split('=').next().unwrap_or(pair);
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    })
}

/// The authority without the port that the scheme has anyway (RFC 9110 section 4.2.3).
pub(super) fn address(request: &Request) -> &str {
    without_port(request.scheme, &request.authority)
}

pub(super) fn without_port(scheme: Scheme, authority: &str) -> &str {
    let port = match scheme {
        Scheme::Http => ":80",
        Scheme::Https => ":443",
    };
    authority.strip_suffix(port).unwrap_or(authority)
}

/// Path and query of what `reference` names, where that is on the same origin as `request` (RFC 9110 section 4.3.1); a
/// relative one is resolved against the request's own URI (RFC 3986 section 5).
pub fn same_origin(reference: &str, request: &Request) -> Option<String> {
    let own = format!("{}://{}{}", request.scheme.as_str(), request.authority, request.target);
    let own = Url::parse(&own).ok()?;
    let named = own.join(reference).ok()?;
    (named.origin() == own.origin()).then(|| named[url::Position::BeforePath..url::Position::AfterQuery].to_owned())
}

/// Appends what makes a variant: each named request field with its members, white space and empty members aside. Where the
/// grammar says that order and letter case mean nothing, they make no difference.
pub fn variant<'a>(builder: &'a mut KeyBuilder, names: &[String], stamp: u64, request: &Fields) -> KeyRef<'a> {
    builder.part(&stamp.to_le_bytes());
    for name in names {
        builder.part(name.as_bytes());
        let is_there = request.named(name.as_bytes()).next().is_some();
        let values: Vec<&[u8]> = request.named(name.as_bytes()).flat_map(members).collect();
        let text = match name.as_str() {
            "accept-encoding" => codings(preferences(&values)).join(&b","[..]),
            "accept-language" => preferences(&values).join(&b","[..]),
            _ => values.join(&b","[..]),
        };
        // An empty field is not the absence of one.
        builder.part_of(&[if is_there { b"=" } else { b"" }, &text]);
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

/// Without the codings that are refused by name, for what is not listed is refused as well, unless `*` lists it; `identity` is
/// accepted without being listed (RFC 9110 section 12.5.3).
fn codings(mut preferences: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    if !preferences.iter().any(|coding| coding.starts_with(b"*")) {
        preferences.retain(|coding| !coding.ends_with(b";q=0") || coding.starts_with(b"identity;"));
    }
    preferences
}

/// The names in a response's `Vary`, lower case, sorted, without repetition (RFC 9111 section 4.1).
/// `None` where no request can ever match: `*`, what is no name, or more names than are honoured.
pub fn vary(response: &Fields) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for member in response.members(Known::Vary) {
        if member == b"*" || !is_token(member) || names.len() == VARY_MAX {
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
    use proptest::prelude::*;

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
    fn fields_of_the_key_keep_tenants_apart() {
        let settings = Settings { key_fields: vec!["x-tenant".to_owned()], ..Settings::default() };
        let of = |lines: &[&str]| {
            let mut request = Request { authority: "a".into(), ..Request::default() };
            request.set_target("/?q");
            lines.iter().for_each(|line| request.fields.push(b"X-Tenant", line.as_bytes()));
            let mut builder = KeyBuilder::new();
            primary(&mut builder, &settings, &request, &Region::DEFAULT);
            told(&builder.key())
        };
        assert_eq!(of(&["one"]), "http|a|/|default|?q|%01|x-tenant|%01|one");
        let all = [of(&[]), of(&[""]), of(&["a"]), of(&["a", "b"]), of(&["a, b"]), of(&["a|b"])];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one), "{one}");
        }
    }

    /// What a key is made of, from letters so few that pieces run into each other.
    fn made_of() -> impl Strategy<Value = (bool, String, String, String, Vec<String>, Vec<Vec<String>>)> {
        let text = || "[a/?|=&]{0,3}";
        let lines = prop::collection::vec("[ab=|]{0,2}", 0..3);
        (
            any::<bool>(),
            "[a:b]{1,3}",
            text(),
            "[ab]{1,2}",
            prop::collection::vec("[ab]{1,2}", 0..3),
            prop::collection::vec(lines, 2),
        )
    }

    proptest! {
        #[test]
        fn keys_are_the_same_only_where_everything_is(one in made_of(), two in made_of(), same in any::<u8>()) {
            // Often all but a piece is the same.
            let mut two = two;
            if same & 1 > 0 { two.0 = one.0; }
            if same & 2 > 0 { two.1.clone_from(&one.1); }
            if same & 4 > 0 { two.2.clone_from(&one.2); }
            if same & 8 > 0 { two.3.clone_from(&one.3); }
            if same & 16 > 0 { two.4.clone_from(&one.4); }
            if same & 32 > 0 { two.5.clone_from(&one.5); }
            let settings = Settings { key_fields: vec!["x-tenant".to_owned()], ..Settings::default() };
            let key = |(is_tls, authority, target, region, names, lines): &(bool, String, String, String, Vec<String>, Vec<Vec<String>>)| {
                let scheme = if *is_tls { Scheme::Https } else { Scheme::Http };
                let mut request = Request { scheme, authority: authority.clone(), ..Request::default() };
                request.set_target(&format!("/{target}"));
                lines[0].iter().for_each(|line| request.fields.push(b"X-Tenant", line.as_bytes()));
                lines[1].iter().for_each(|line| request.fields.push(b"a", line.as_bytes()));
                let mut builder = KeyBuilder::new();
                primary(&mut builder, &settings, &request, &Region::new(region).expect("valid"));
                if names.is_empty() { builder.key().to_owned() } else { variant(&mut builder, names, 7, &request.fields).to_owned() }
            };
            // A variant's members count, not on which line they are; nor does a field that it does not vary by.
            let normal = |made: &(bool, String, String, String, Vec<String>, Vec<Vec<String>>)| {
                let mut made = made.clone();
                let varies = made.4.iter().any(|name| name == "a");
                let is_there = !made.5[1].is_empty();
                let members: Vec<String> = made.5[1].iter().filter(|line| !line.is_empty()).cloned().collect();
                made.5[1] = if varies { [vec![is_there.to_string()], members].concat() } else { Vec::new() };
                made
            };
            prop_assert_eq!(key(&one) == key(&two), normal(&one) == normal(&two));
        }
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
        let codings = |value: &str| codings(of(value));
        assert_eq!(codings("gzip, br;q=0, deflate;q=0.0"), codings("gzip"));
        assert_ne!(codings("gzip, br;q=0, *"), codings("gzip, *"));
        assert_ne!(codings("gzip, identity;q=0"), codings("gzip"));
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
        let mut request = Request { authority: "a:8080".into(), ..Request::default() };
        request.set_target("/");
        let of = |uri: &str| same_origin(uri, &request);
        for (uri, target) in [
            ("/x?y#z", "/x?y"),
            ("HTTP://A:8080/x", "/x"),
            ("http://a:8080", "/"),
            ("http://a:8080?q", "/?q"),
            ("x/../y", "/y"),
            ("", "/"),
        ] {
            assert_eq!(of(uri).as_deref(), Some(target), "{uri}");
        }
        for uri in ["//b/x", "https://a:8080/x", "http://a/x", "http://b:8080/x", "mailto:a", "http://[/"] {
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
