//! Purge tags of a stored response: its URL and the surrogate keys from the origin.

use std::borrow::Cow;

use shard::{KeyBuilder, Tag};

use super::config::CacheConfig;
use super::key::{self, KeyedQuery};
use crate::http::fields::Fields;
use crate::http::message::{Request, Scheme};
use crate::http::refusal::RequestRefusal;
use crate::http::{authority, target};

/// The tag of the URL of `request`. It is the same for all schemes, regions and variants.
pub(crate) fn url_tag(config: &CacheConfig, request: &Request) -> Tag {
    tag(config, &key::public_authority(request), request.path(), request.query())
}

/// The tags of a response to `request`: first its URL, then the members of the response fields
/// named `field`, separated by white space (`Surrogate-Key`) or commas (`Cache-Tag`).
pub(crate) fn response_tags(
    config: &CacheConfig,
    field: Option<&str>,
    request: &Request,
    response: &Fields,
) -> Vec<Tag> {
    let lines = field.into_iter().flat_map(|field| response.named(field.as_bytes()));
    let names = lines.flat_map(|line| line.split(|byte| matches!(byte, b' ' | b'\t' | b',')));
    let mut tags: Vec<Tag> = names.filter(|name| !name.is_empty()).map(Tag::surrogate_key).collect();
    tags.sort_unstable();
    tags.dedup();
    tags.insert(0, url_tag(config, request));
    tags
}

/// Why a URL cannot be purged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PurgeUrlError {
    #[error("write the whole URL, such as \"http://shop.example/orders/7\"")]
    NotAbsolute,
    #[error("write the URL as clients send it: spaces and non-ASCII letters percent-encoded, such as %20")]
    NotAscii,
    #[error("its host is not valid")]
    BadHost,
    #[error("requests with this path are refused ({})", .0.reason())]
    RefusedPath(RequestRefusal),
}

/// The tag of an operator-supplied URL. The default port follows from the scheme. A fragment is
/// ignored, because clients never send it.
pub(crate) fn tag_of_url(config: &CacheConfig, url: &str) -> Result<Tag, PurgeUrlError> {
    let (scheme, rest) = url.split_once("://").ok_or(PurgeUrlError::NotAbsolute)?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        _ => return Err(PurgeUrlError::NotAbsolute),
    };
    let rest = rest.split('#').next().unwrap_or(rest);
    let (authority, target) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    if authority.is_empty() {
        return Err(PurgeUrlError::NotAbsolute);
    }
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(PurgeUrlError::NotAscii);
    }
    let target = if target.starts_with('/') { Cow::Borrowed(target) } else { Cow::Owned(format!("/{target}")) };
    let target = target::normal(&target, config.paths).map_err(PurgeUrlError::RefusedPath)?;
    let (path, query) = target.split_once('?').map_or((&*target, None), |(path, query)| (path, Some(query)));
    let authority = authority::normal_of_unicode(authority).ok_or(PurgeUrlError::BadHost)?;
    Ok(tag(config, key::strip_default_port(scheme, &authority), path, query))
}

fn tag(config: &CacheConfig, authority: &str, path: &str, query: Option<&str>) -> Tag {
    let mut builder = KeyBuilder::new();
    builder.part(authority.as_bytes()).part(path.as_bytes());
    KeyedQuery::of(config, query).write(&mut builder);
    Tag::url(&builder.key())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::target::{EncodedSlashPolicy, PathRules};

    fn request(scheme: Scheme, authority: &str, target: &str) -> Request {
        let mut request = Request { scheme, authority: authority.to_owned(), ..Request::default() };
        request.set_target(target);
        request
    }

    #[test]
    fn url_has_the_tag_of_its_requests() {
        let config = CacheConfig { key_ignore_query: vec!["utm_*".to_owned()], ..CacheConfig::default() };
        let stored = url_tag(&config, &request(Scheme::Http, "shop.example", "/a?x=1&utm_id=3"));
        for url in [
            "http://shop.example/a?x=1",
            "HTTP://Shop.Example:80/a?utm_q&x=1#top",
            "https://shop.example:443/a?x=1",
            "http://shop.example.:/%61?x=1",
            "http://shop.example//b/../a?x=1#\u{e4}",
        ] {
            assert_eq!(tag_of_url(&config, url), Ok(stored), "{url}");
        }
        for url in [
            "http://shop.example/a",
            "http://shop.example/a?x=1&",
            "http://shop.example:8080/a?x=1",
            "http://shop/a?x=1",
        ] {
            assert_ne!(tag_of_url(&config, url), Ok(stored), "{url}");
        }
        let root = url_tag(&config, &request(Scheme::Https, "shop.example", "/"));
        assert_eq!(tag_of_url(&config, "https://shop.example"), Ok(root));
        for url in ["", "/a", "shop.example/a", "ftp://shop.example/a", "http:///a"] {
            assert_eq!(tag_of_url(&config, url), Err(PurgeUrlError::NotAbsolute), "{url}");
        }
        assert_eq!(tag_of_url(&config, "http://shop.example/a b"), Err(PurgeUrlError::NotAscii));
        assert_eq!(tag_of_url(&config, "http://u@shop.example/a"), Err(PurgeUrlError::BadHost));
        let refused = PurgeUrlError::RefusedPath(RequestRefusal::EncodedSlash);
        assert_eq!(tag_of_url(&config, "http://shop.example/a%2fb"), Err(refused));
        let keep = PathRules { encoded_slash: EncodedSlashPolicy::Keep, ..PathRules::default() };
        let stored = url_tag(&config, &request(Scheme::Http, "xn--bcher-kva.example", "/a%2Fb"));
        let config = CacheConfig { paths: keep, ..config };
        assert_eq!(tag_of_url(&config, "http://b\u{fc}cher.example/a%2fb"), Ok(stored));
    }

    #[test]
    fn tags_are_separated_by_white_space_or_commas() {
        let config = CacheConfig::default();
        let request = request(Scheme::Http, "a", "/");
        let mut response = Fields::default();
        response.push(b"Surrogate-Key", b"one  two\tone");
        response.push(b"surrogate-key", b",three, ,four ");
        let tags = response_tags(&config, Some("surrogate-key"), &request, &response);
        let mut named: Vec<Tag> =
            ["one", "two", "three", "four"].map(|name| Tag::surrogate_key(name.as_bytes())).into();
        named.sort_unstable();
        assert_eq!((tags[0], &tags[1..]), (url_tag(&config, &request), &named[..]));
        assert_eq!(response_tags(&config, None, &request, &response).len(), 1);
    }
}
