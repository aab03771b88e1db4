//! Cache keys of stored responses. A key is injective over scheme, authority, path, query, region,
//! and the request fields that a response varies by.

use std::borrow::Cow;
use std::net::IpAddr;
use std::time::Duration;

use shard::{KeyBuilder, KeyRef, Region};
use url::Url;

use super::config::CacheConfig;
use crate::hop;
use crate::http::fields::{Fields, KnownField, KnownFieldSet, is_token, members};
use crate::http::message::{Request, Scheme};
use crate::http::target;

/// Maximum number of names in `Vary`. A response with more names is not stored.
pub const VARY_MAX: usize = 16;

/// Lifetime of a `Vary` marker. Each stored response renews it.
pub(crate) const VARY_MARKER_TTL: Duration = Duration::from_secs(24 * 3600);

/// Minimum age of a `Vary` marker that has the maximum number of variants before it is replaced, so
/// that new variants can be stored.
pub(crate) const VARIANTS_RESET_INTERVAL: Duration = Duration::from_secs(60);

/// Writes the primary key of a request. The method is not part of it, because HEAD is answered from
/// a stored GET response.
pub fn write_primary(builder: &mut KeyBuilder, config: &CacheConfig, request: &Request, region: &Region) {
    builder.clear();
    builder.part(scheme(request).as_str().as_bytes());
    builder.part(authority(request).as_bytes());
    builder.part(request.path().as_bytes());
    builder.part(region.as_str().as_bytes());
    KeyedQuery::of(config, request.query()).write(builder);
    // Nodes may have different configurations. The key therefore contains the names and their
    // count.
    builder.part(&[u8::try_from(config.key_fields.len()).unwrap_or(u8::MAX)]);
    for name in &config.key_fields {
        let lines = request.fields.named(name.as_bytes());
        builder.part(name.as_bytes()).part(&[u8::try_from(lines.count()).unwrap_or(u8::MAX)]);
        request.fields.named(name.as_bytes()).for_each(|line| {
            builder.part(line);
        });
    }
    if request.forwarded.is_some() || request.key_route.is_some() || request.fields.has_any(ALTERNATIVES) {
        write_alternatives(builder, request);
    }
}

/// Fields that tell the origin another scheme, host, path or method than the request line, or the
/// client's certificate.
const ALTERNATIVES: KnownFieldSet = KnownFieldSet::of(hop::ALTERNATIVE_FIELDS);

/// Writes the alternatives that the origin is told, where there are any; else nothing.
#[cold]
fn write_alternatives(builder: &mut KeyBuilder, request: &Request) {
    if let Some(route) = request.key_route {
        // No field has a name with a blank.
        builder.part(b"by route").part(&route.to_be_bytes());
    }
    if let Some(forwarded) = &request.forwarded {
        let proto = forwarded.proto.as_deref().filter(|proto| scheme_of(proto).is_none());
        let host = forwarded.host.as_deref().filter(|host| !host.eq_ignore_ascii_case(request.authority.as_bytes()));
        for (name, value) in [(KnownField::XForwardedProto, proto), (KnownField::XForwardedHost, host)] {
            if let Some(value) = value {
                builder.part(name.as_str().as_bytes()).part(value);
            }
        }
    }
    for field in request.fields.iter() {
        if let Some(known) = field.known.filter(|known| ALTERNATIVES.contains(*known)) {
            builder.part(known.as_str().as_bytes()).part(field.value);
        }
    }
}

/// The scheme that the client used, according to a trusted proxy or else to its connection.
pub(crate) fn scheme(request: &Request) -> Scheme {
    let forwarded = request.forwarded.as_ref().and_then(|forwarded| forwarded.proto.as_deref());
    forwarded.and_then(scheme_of).unwrap_or(request.scheme)
}

fn scheme_of(proto: &[u8]) -> Option<Scheme> {
    [Scheme::Http, Scheme::Https].into_iter().find(|scheme| proto.eq_ignore_ascii_case(scheme.as_str().as_bytes()))
}

/// The authority of the URL that the client used, in lower case, without the default port: that
/// which a trusted proxy reports, or else the request's.
pub(crate) fn public_authority(request: &Request) -> Cow<'_, str> {
    let forwarded = request.forwarded.as_ref().and_then(|forwarded| forwarded.host.as_deref());
    match forwarded.and_then(|host| std::str::from_utf8(host).ok()) {
        Some(host) => Cow::Owned(strip_default_port(scheme(request), &host.to_ascii_lowercase()).to_owned()),
        None => Cow::Borrowed(authority(request)),
    }
}

/// The query of one request as it enters the cache key: absent, unchanged, or sorted and without
/// ignored parameters.
pub(super) enum KeyedQuery<'a> {
    Absent,
    Unchanged(&'a str),
    Normalized(String),
}

impl<'a> KeyedQuery<'a> {
    pub(super) fn of(config: &CacheConfig, query: Option<&'a str>) -> KeyedQuery<'a> {
        let Some(query) = query else { return KeyedQuery::Absent };
        if config.key_ignore_query.is_empty() && !config.key_sort_query {
            return KeyedQuery::Unchanged(query);
        }
        let pairs = query.split('&').filter(|pair| !is_ignored(&config.key_ignore_query, pair));
        let mut pairs: Vec<&str> = pairs.collect();
        if pairs.is_empty() {
            return KeyedQuery::Absent;
        }
        if config.key_sort_query {
            // The sort is stable: the values of one parameter keep their order, which is often
            // significant.
            pairs.sort_by_key(|pair| pair.split('=').next());
        }
        KeyedQuery::Normalized(pairs.join("&"))
    }

    pub(super) fn write(&self, builder: &mut KeyBuilder) {
        match self {
            KeyedQuery::Absent => builder.part(b""),
            KeyedQuery::Unchanged(query) => builder.part_of(&[b"?", query.as_bytes()]),
            KeyedQuery::Normalized(query) => builder.part_of(&[b"?", query.as_bytes()]),
        };
    }
}

/// Reduces the target of a request to what its key contains: the origin of a shared response must
/// not see parameters that other clients of the response did not send.
pub(crate) fn reduce_target(config: &CacheConfig, request: &mut Request) {
    let target = match KeyedQuery::of(config, request.query()) {
        KeyedQuery::Unchanged(_) => return,
        KeyedQuery::Absent if request.query().is_none() => return,
        KeyedQuery::Absent => request.path().to_owned(),
        KeyedQuery::Normalized(query) => format!("{}?{query}", request.path()),
    };
    request.set_target(&target);
}

/// Formats a key for `Cache-Status` (RFC 9211 section 2.7): its parts separated by `|`. Unprintable
/// parts, quotes and backslashes are written in hexadecimal.
pub fn display(key: &KeyRef<'_>) -> String {
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

/// The authority without the default port of the scheme (RFC 9110 section 4.2.3).
pub(super) fn authority(request: &Request) -> &str {
    strip_default_port(scheme(request), &request.authority)
}

pub(super) fn strip_default_port(scheme: Scheme, authority: &str) -> &str {
    let port = match scheme {
        Scheme::Http => ":80",
        Scheme::Https => ":443",
    };
    authority.strip_suffix(port).unwrap_or(authority)
}

/// Resolves `reference` against the URI of `request` (RFC 3986 section 5) and returns path and
/// query of the result in their normal form. `None` if it has another origin (RFC 9110 section
/// 4.3.1), or if requests with this path are refused.
pub(crate) fn resolve_same_origin(config: &CacheConfig, reference: &str, request: &Request) -> Option<String> {
    let own = format!("{}://{}{}", scheme(request).as_str(), public_authority(request), request.target);
    let own = Url::parse(&own).ok()?;
    let resolved = own.join(reference).ok()?;
    let target = &resolved[url::Position::BeforePath..url::Position::AfterQuery];
    (resolved.origin() == own.origin()).then(|| target::normal(target, config.paths).ok())?
}

/// Appends the variant: the members of each named request field, without white space and empty
/// members, as the origin receives them from the gateway at `peer`'s request. Order and letter case
/// are ignored where the grammar of the field gives them no meaning.
#[expect(clippy::too_many_arguments, reason = "the request and its peer are what a fetch forwards")]
pub fn write_variant<'a>(
    builder: &'a mut KeyBuilder,
    names: &[String],
    nonce: u64,
    request: &Request,
    peer: IpAddr,
) -> KeyRef<'a> {
    builder.part(&nonce.to_le_bytes());
    for name in names {
        builder.part(name.as_bytes());
        let replaced = hop::replaced_value(request, peer, name);
        let lines = || request.fields.named(name.as_bytes());
        let is_present = replaced.as_ref().map_or_else(|| lines().next().is_some(), |value| !value.is_empty());
        let values: Vec<&[u8]> = match &replaced {
            Some(value) => members(value).collect(),
            None => lines().flat_map(members).collect(),
        };
        let text = match name.as_str() {
            "accept-encoding" => without_refused_codings(normalized_preferences(&values)).join(&b","[..]),
            "accept-language" => normalized_preferences(&values).join(&b","[..]),
            _ => values.join(&b","[..]),
        };
        // An empty field differs from an absent one.
        builder.part_of(&[if is_present { b"=" } else { b"" }, &text]);
    }
    builder.key()
}

/// Normalises a list of codings or languages, so that equal preferences have the same form: lower
/// case, no white space, no weight of 1, sorted by name (RFC 9110 sections 12.4.2, 12.5.3 and
/// 12.5.4).
fn normalized_preferences(values: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut preferences: Vec<Vec<u8>> = values
        .iter()
        .map(|value| {
            let mut text: Vec<u8> = value.iter().filter(|byte| !byte.is_ascii_whitespace()).copied().collect();
            text.make_ascii_lowercase();
            if let Some(at) = memchr::memmem::find(&text, b";q=") {
                let significant_end =
                    text.trim_ascii_end().iter().rposition(|byte| *byte != b'0').map_or(at, |last| last + 1);
                let is_fraction = text[at..].contains(&b'.');
                text.truncate(if is_fraction { significant_end } else { text.len() });
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

/// Removes the codings that are refused by name. Unless `*` is present, a coding that is not listed
/// is refused as well. `identity` is acceptable without being listed (RFC 9110 section 12.5.3).
fn without_refused_codings(mut preferences: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    if !preferences.iter().any(|coding| coding.starts_with(b"*")) {
        preferences.retain(|coding| !coding.ends_with(b";q=0") || coding.starts_with(b"identity;"));
    }
    preferences
}

/// The names in `Vary`: lower case, sorted, without duplicates (RFC 9111 section 4.1). `None` if no
/// request can match: `*`, a field that the gateway sends with a new value each time, an invalid
/// name, or more names than `VARY_MAX`.
pub fn vary_names(response: &Fields) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for member in response.members(KnownField::Vary) {
        let is_unique = matches!(
            KnownField::of(member),
            Some(
                KnownField::Traceparent
                    | KnownField::Tracestate
                    | KnownField::XEnvoyExpectedRqTimeoutMs
                    | KnownField::XRequestId
            )
        );
        if member == b"*" || is_unique || !is_token(member) || names.len() == VARY_MAX {
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
    use crate::http::message::TrustedForwarding;
    use proptest::prelude::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn key(target: &str, region: &str, ignore: &[&str]) -> Vec<u8> {
        let config = CacheConfig {
            key_ignore_query: ignore.iter().map(|name| (*name).to_owned()).collect(),
            ..CacheConfig::default()
        };
        let mut request = Request { authority: "a".into(), ..Request::default() };
        request.set_target(target);
        let mut builder = KeyBuilder::new();
        write_primary(&mut builder, &config, &request, &Region::new(region).expect("valid"));
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
    fn key_fields_separate_tenants() {
        let config = CacheConfig { key_fields: vec!["x-tenant".to_owned()], ..CacheConfig::default() };
        let of = |lines: &[&str]| {
            let mut request = Request { authority: "a".into(), ..Request::default() };
            request.set_target("/?q");
            lines.iter().for_each(|line| request.fields.push(b"X-Tenant", line.as_bytes()));
            let mut builder = KeyBuilder::new();
            write_primary(&mut builder, &config, &request, &Region::DEFAULT);
            display(&builder.key())
        };
        assert_eq!(of(&["one"]), "http|a|/|default|?q|%01|x-tenant|%01|one");
        let all = [of(&[]), of(&[""]), of(&["a"]), of(&["a", "b"]), of(&["a, b"]), of(&["a|b"])];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one), "{one}");
        }
    }

    /// Parts of a key from a small alphabet, so that the parts could be confused with each other.
    fn key_parts() -> impl Strategy<Value = (bool, String, String, String, Vec<String>, Vec<Vec<String>>)> {
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
        fn keys_are_equal_only_if_all_parts_are_equal(one in key_parts(), two in key_parts(), same in any::<u8>()) {
            // Often all parts but one are equal.
            let mut two = two;
            if same & 1 > 0 { two.0 = one.0; }
            if same & 2 > 0 { two.1.clone_from(&one.1); }
            if same & 4 > 0 { two.2.clone_from(&one.2); }
            if same & 8 > 0 { two.3.clone_from(&one.3); }
            if same & 16 > 0 { two.4.clone_from(&one.4); }
            if same & 32 > 0 { two.5.clone_from(&one.5); }
            let config = CacheConfig { key_fields: vec!["x-tenant".to_owned()], ..CacheConfig::default() };
            let key = |(is_tls, authority, target, region, names, lines): &(bool, String, String, String, Vec<String>, Vec<Vec<String>>)| {
                let scheme = if *is_tls { Scheme::Https } else { Scheme::Http };
                let mut request = Request { scheme, authority: authority.clone(), ..Request::default() };
                request.set_target(&format!("/{target}"));
                lines[0].iter().for_each(|line| request.fields.push(b"X-Tenant", line.as_bytes()));
                lines[1].iter().for_each(|line| request.fields.push(b"a", line.as_bytes()));
                let mut builder = KeyBuilder::new();
                write_primary(&mut builder, &config, &request, &Region::new(region).expect("valid"));
                if names.is_empty() { builder.key().to_owned() } else { write_variant(&mut builder, names, 7, &request, PEER).to_owned() }
            };
            // A variant depends on the members of a field, not on their lines, and not on a field
            // that is not in `Vary`.
            let normal = |made: &(bool, String, String, String, Vec<String>, Vec<Vec<String>>)| {
                let mut made = made.clone();
                let varies = made.4.iter().any(|name| name == "a");
                let is_present = !made.5[1].is_empty();
                let members: Vec<String> = made.5[1].iter().filter(|line| !line.is_empty()).cloned().collect();
                made.5[1] = if varies { [vec![is_present.to_string()], members].concat() } else { Vec::new() };
                made
            };
            prop_assert_eq!(key(&one) == key(&two), normal(&one) == normal(&two));
        }
    }

    /// A key of a request with fields, and with what a trusted proxy reports about it.
    fn key_of(lines: &[(&str, &str)], proto: Option<&str>, host: Option<&str>) -> String {
        let bytes = |text: &str| text.as_bytes().to_vec();
        let forwarded =
            TrustedForwarding { proto: proto.map(bytes), host: host.map(bytes), ..TrustedForwarding::default() };
        let mut request = Request { authority: "a".into(), forwarded: Some(forwarded.into()), ..Request::default() };
        request.set_target("/");
        lines.iter().for_each(|(name, value)| request.fields.push(name.as_bytes(), value.as_bytes()));
        let mut builder = KeyBuilder::new();
        write_primary(&mut builder, &CacheConfig::default(), &request, &Region::DEFAULT);
        display(&builder.key())
    }

    #[test]
    fn key_contains_what_the_origin_is_told() {
        assert_eq!(key_of(&[], None, None), "http|a|/|default||%00");
        assert_eq!(key_of(&[("Accept", "text/html")], Some("HTTP"), Some("A")), "http|a|/|default||%00");
        assert_eq!(key_of(&[], Some("https"), None), "https|a|/|default||%00");
        let all = [
            key_of(&[], None, None),
            key_of(&[], Some("https"), None),
            key_of(&[], Some("ftp"), None),
            key_of(&[], None, Some("b")),
            key_of(&[], None, Some("a:80")),
            key_of(&[("X-Forwarded-Prefix", "/b")], None, None),
            key_of(&[("X-Forwarded-Prefix", "/c")], None, None),
            key_of(&[("X-Rewrite-URL", "/b")], None, None),
            key_of(&[("X-HTTP-Method-Override", "DELETE")], None, None),
            key_of(&[("X-Forwarded-Client-Cert", "Hash=1")], None, None),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one), "{one}");
        }
    }

    #[test]
    fn variants_compare_what_the_origin_receives() {
        let variant = |name: &str, peer: [u8; 4], lines: &[(&str, &str)]| {
            let mut request = Request { authority: "a".into(), ..Request::default() };
            lines.iter().for_each(|(name, value)| request.fields.push(name.as_bytes(), value.as_bytes()));
            let mut builder = KeyBuilder::new();
            write_variant(&mut builder, &[name.to_owned()], 7, &request, peer.into()).as_bytes().to_vec()
        };
        let (one, two) = ([127, 0, 0, 1], [127, 0, 0, 2]);
        assert_ne!(variant("x-forwarded-for", one, &[]), variant("x-forwarded-for", two, &[]));
        let claim = [("X-Forwarded-For", "127.0.0.1")];
        assert_eq!(variant("x-forwarded-for", two, &claim), variant("x-forwarded-for", two, &[]));
        assert_eq!(variant("accept", one, &[]), variant("accept", two, &[]));
        assert_eq!(variant("te", one, &[("TE", "trailers")]), variant("te", two, &[]), "the origin never receives it");
    }

    #[test]
    fn ignored_parameters_are_not_part_of_the_key() {
        assert_eq!(key("/?utm_a=1&x=2&utm_b", "eu", &["utm_*"]), key("/?x=2", "eu", &["utm_*"]));
        assert_ne!(key("/?utmost=1", "eu", &["utm_*"]), key("/?", "eu", &["utm_*"]));
        assert_eq!(key("/?utm_a=1", "eu", &["utm_*"]), key("/", "eu", &["utm_*"]));
        assert_ne!(key("/?", "eu", &["utm_*"]), key("/", "eu", &["utm_*"]));
    }

    #[test]
    fn origin_sees_the_parameters_of_the_key_only() {
        let config = CacheConfig { key_ignore_query: vec!["utm_*".into(), "q".into()], ..CacheConfig::default() };
        for (received, sent) in [
            ("/a", "/a"),
            ("/a?", "/a?"),
            ("/a?x=1&utm_b=<script>&y", "/a?x=1&y"),
            ("/a?q=1&utm_b", "/a"),
            ("/a?q=1;x=2", "/a"),
            ("/a?x=2;q=1", "/a?x=2;q=1"),
        ] {
            let mut request = Request::default();
            request.set_target(received);
            let key = |request: &Request| {
                let mut builder = KeyBuilder::new();
                write_primary(&mut builder, &config, request, &Region::DEFAULT);
                builder.key().to_owned()
            };
            let before = key(&request);
            reduce_target(&config, &mut request);
            assert_eq!(request.target, sent, "{received}");
            assert!(before == key(&request), "{received}: the key stays");
        }
    }

    #[test]
    fn variants_compare_list_members_not_line_layout() {
        let names = vec!["accept-language".to_owned()];
        let of = |lines: &[&str]| {
            let mut request = Request::default();
            for line in lines {
                request.fields.push(b"Accept-Language", line.as_bytes());
            }
            let mut builder = KeyBuilder::new();
            write_variant(&mut builder, &names, 7, &request, PEER).as_bytes().to_vec()
        };
        assert_eq!(of(&["de,  en"]), of(&["de", "en"]));
        assert_ne!(of(&["de"]), of(&[]));
        assert_ne!(of(&["de"]), of(&["en"]));
    }

    #[test]
    fn equivalent_preferences_share_a_variant() {
        let normalized = |value: &str| normalized_preferences(&members(value.as_bytes()).collect::<Vec<_>>());
        assert_eq!(normalized("gzip, br"), normalized("BR,GZIP;q=1.000"));
        assert_eq!(normalized("de;q=0.50, en"), normalized("en, DE ; q=0.5"));
        let codings = |value: &str| without_refused_codings(normalized(value));
        assert_eq!(codings("gzip, br;q=0, deflate;q=0.0"), codings("gzip"));
        assert_ne!(codings("gzip, br;q=0, *"), codings("gzip, *"));
        assert_ne!(codings("gzip, identity;q=0"), codings("gzip"));
        assert_ne!(normalized("gzip;q=0"), normalized("gzip"));
        assert_ne!(normalized("gzip;q=0.1"), normalized("gzip;q=0.01"));
        assert_ne!(normalized("en;q=0.5"), normalized("en;q=0.6"));
    }

    #[test]
    fn query_order_is_significant_unless_sorted() {
        let sorted = |target: &str| {
            let config = CacheConfig { key_sort_query: true, ..CacheConfig::default() };
            let mut request = Request::default();
            request.set_target(target);
            let mut builder = KeyBuilder::new();
            write_primary(&mut builder, &config, &request, &Region::DEFAULT);
            builder.key().as_bytes().to_vec()
        };
        assert_eq!(sorted("/?b=1&a=2"), sorted("/?a=2&b=1"));
        assert_ne!(sorted("/?a=1&a=2"), sorted("/?a=2&a=1"));
        assert_ne!(key("/?b=1&a=2", "eu", &[]), key("/?a=2&b=1", "eu", &[]));
    }

    #[test]
    fn only_same_origin_references_are_resolved() {
        let mut request = Request { authority: "a:8080".into(), ..Request::default() };
        request.set_target("/");
        let of = |uri: &str| resolve_same_origin(&CacheConfig::default(), uri, &request);
        for (uri, target) in [
            ("/x?y#z", "/x?y"),
            ("HTTP://A:8080/x", "/x"),
            ("http://a:8080", "/"),
            ("http://a:8080?q", "/?q"),
            ("x/../y", "/y"),
            ("x//%7ey", "/x/~y"),
            ("", "/"),
        ] {
            assert_eq!(of(uri).as_deref(), Some(target), "{uri}");
        }
        for uri in
            ["//b/x", "https://a:8080/x", "http://a/x", "http://b:8080/x", "mailto:a", "http://[/", "/a%2fb", "/%00"]
        {
            assert_eq!(of(uri), None, "{uri}");
        }
    }

    #[test]
    fn vary_star_has_no_names() {
        let mut fields = Fields::default();
        fields.push(b"Vary", b"B, a, b");
        assert_eq!(vary_names(&fields), Some(vec!["a".to_owned(), "b".to_owned()]));
        let mut traced = Fields::default();
        traced.push(b"Vary", b"Accept, Traceparent");
        assert_eq!(vary_names(&traced), None, "each fetch has its own");
        let mut identified = Fields::default();
        identified.push(b"Vary", b"X-Request-ID");
        assert_eq!(vary_names(&identified), None);
        fields.push(b"vary", b"*");
        assert_eq!(vary_names(&fields), None);
    }
}
