//! `Accept-Language` reduced to one of the languages that a route has (RFC 4647 section 3.4).
//!
//! Browsers send hundreds of different values; a response that varies by them would be stored for
//! each. The origin gets the reduced value too, so that its response is that of the key.

use crate::http::fields::{Fields, KnownField};

/// Replaces `Accept-Language` by the language of `offered` that the client prefers; removes it if
/// the client accepts none of them, so that the origin sends its default.
pub(crate) fn normalise(offered: &[String], request: &mut Fields) {
    if !request.has(KnownField::AcceptLanguage) {
        return;
    }
    match preferred(offered, request) {
        Some(language) => request.set(KnownField::AcceptLanguage, language),
        None => request.remove(KnownField::AcceptLanguage),
    }
}

/// The language with the highest weight; of equal ones, the one that the client names first.
fn preferred<'o>(offered: &'o [String], request: &Fields) -> Option<&'o str> {
    let mut best: Option<(u16, &str)> = None;
    for member in request.members(KnownField::AcceptLanguage).filter_map(|member| std::str::from_utf8(member).ok()) {
        let mut parts = member.split(';').map(str::trim);
        let range = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Some(1_000), thousandths).unwrap_or(0);
        let is_chosen = |language: &&String| match range {
            "*" => !is_named(language, request),
            range => matches(range, language),
        };
        let Some(language) = offered.iter().find(is_chosen).filter(|_| weight > 0) else { continue };
        if best.is_none_or(|(other, _)| weight > other) {
            best = Some((weight, language));
        }
    }
    best.map(|(_, language)| language)
}

/// Whether a range of the client covers the language, so that `*` does not (RFC 4647 section
/// 3.3.1): with weight 0, the client refuses it.
fn is_named(language: &str, request: &Fields) -> bool {
    request.members(KnownField::AcceptLanguage).any(|member| {
        let range = std::str::from_utf8(member).ok().and_then(|member| member.split(';').next());
        range.map(str::trim).is_some_and(|range| !range.is_empty() && is_beginning(range, language))
    })
}

/// Whether a range of a client, or a beginning of it, names a language or its beginning: `en-GB`
/// and `en` match `en`, and `pt` matches `pt-BR`.
fn matches(range: &str, language: &str) -> bool {
    !range.is_empty() && (is_beginning(range, language) || is_beginning(language, range))
}

/// Whether the subtags of `short` are the first ones of `long`.
fn is_beginning(short: &str, long: &str) -> bool {
    long.get(..short.len()).is_some_and(|start| start.eq_ignore_ascii_case(short))
        && matches!(long.as_bytes().get(short.len()), None | Some(b'-'))
}

/// A weight (RFC 9110 section 12.4.2) in thousandths.
fn thousandths(text: &str) -> Option<u16> {
    let weight: f32 = text.trim().parse().ok()?;
    (0.0..=1.0).contains(&weight).then_some((weight * 1_000.0) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn value_becomes_one_of_the_languages() {
        let offered = ["en", "zh", "pt-BR"].map(str::to_owned);
        for (value, expected) in [
            ("en-GB,en;q=0.9,de;q=0.8", Some("en")),
            ("de,zh-CN;q=0.9,en;q=0.8", Some("zh")),
            ("de-AT, fr", None),
            ("*", Some("en")),
            ("de, *;q=0.1", Some("en")),
            ("pt", Some("pt-BR")),
            ("PT-br;q=0.5, ZH;q=0.4", Some("pt-BR")),
            ("en;q=0, zh;q=0.1", Some("zh")),
            ("*, en;q=0", Some("zh")),
            ("en;q=0, *;q=0.5", Some("zh")),
            ("*, en;q=0.5", Some("zh")),
            ("en-GB;q=0, *", Some("en")),
            ("*, pt;q=0, en;q=0, ZH;q=0", None),
            ("*;q=0", None),
            ("eng", None),
            ("en;q=x, zh", Some("zh")),
            ("é, ;;", None),
            ("", None),
        ] {
            let mut request = fields(&[("Accept-Language", value)]);
            normalise(&offered, &mut request);
            assert_eq!(request.get(KnownField::AcceptLanguage), expected.map(str::as_bytes), "{value}");
        }
        let mut request = fields(&[]);
        normalise(&offered, &mut request);
        assert!(!request.has(KnownField::AcceptLanguage));
    }
}
