//! What a stored response can be purged by: the names its origin gave it (surrogate keys), and its URL.

use shard::{KeyBuilder, Tag};

use super::Settings;
use super::key::{self, Query};
use crate::http::fields::Fields;
use crate::http::message::{Request, Scheme};

/// The URL of `request`, whatever the scheme, the region and the request fields that its variants are told apart by.
pub fn address(settings: &Settings, request: &Request) -> Tag {
    tag(settings, key::address(request), request.path(), request.query())
}

/// The tags of a response to `request`: first its URL, then the members of its fields called `field`, which are separated by
/// white space (`Surrogate-Key`) or commas (`Cache-Tag`).
pub fn of(settings: &Settings, field: Option<&str>, request: &Request, response: &Fields) -> Vec<Tag> {
    let lines = field.into_iter().flat_map(|field| response.named(field.as_bytes()));
    let names = lines.flat_map(|line| line.split(|byte| matches!(byte, b' ' | b'\t' | b',')));
    let mut tags: Vec<Tag> = names.filter(|name| !name.is_empty()).map(Tag::named).collect();
    tags.sort_unstable();
    tags.dedup();
    tags.insert(0, address(settings, request));
    tags
}

/// Why text is not a URL that can be purged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    #[error("write the whole URL, such as \"http://shop.example/orders/7\"")]
    NotAbsolute,
    #[error("write it as clients ask for it: spaces and other letters in hexadecimal, such as %20")]
    NotAscii,
}

/// The tag of a URL as an operator writes it. Its scheme decides which port goes without saying; a fragment never reached anybody.
pub fn of_url(settings: &Settings, url: &str) -> Result<Tag, BadUrl> {
    let (scheme, rest) = url.split_once("://").ok_or(BadUrl::NotAbsolute)?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        _ => return Err(BadUrl::NotAbsolute),
    };
    if !rest.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(BadUrl::NotAscii);
    }
    let rest = rest.split('#').next().unwrap_or(rest);
    let (authority, target) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    if authority.is_empty() {
        return Err(BadUrl::NotAbsolute);
    }
    let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
    let (path, query) = target.split_once('?').map_or((&*target, None), |(path, query)| (path, Some(query)));
    let authority = authority.to_ascii_lowercase();
    Ok(tag(settings, key::without_port(scheme, &authority), path, query))
}

fn tag(settings: &Settings, authority: &str, path: &str, query: Option<&str>) -> Tag {
    let mut builder = KeyBuilder::new();
    builder.part(authority.as_bytes()).part(path.as_bytes());
    Query::of(settings, query).write(&mut builder);
    Tag::address(&builder.key())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(scheme: Scheme, authority: &str, target: &str) -> Request {
        let mut request = Request { scheme, authority: authority.to_owned(), ..Request::default() };
        request.set_target(target);
        request
    }

    #[test]
    fn a_url_is_what_its_requests_are_for() {
        let settings = Settings { key_ignore_query: vec!["utm_*".to_owned()], ..Settings::default() };
        let stored = address(&settings, &request(Scheme::Http, "shop.example", "/a?x=1&utm_id=3"));
        for url in
            ["http://shop.example/a?x=1", "HTTP://Shop.Example:80/a?utm_q&x=1#top", "https://shop.example:443/a?x=1"]
        {
            assert_eq!(of_url(&settings, url), Ok(stored), "{url}");
        }
        for url in [
            "http://shop.example/a",
            "http://shop.example/a?x=1&",
            "http://shop.example:8080/a?x=1",
            "http://shop/a?x=1",
        ] {
            assert_ne!(of_url(&settings, url), Ok(stored), "{url}");
        }
        let root = address(&settings, &request(Scheme::Https, "shop.example", "/"));
        assert_eq!(of_url(&settings, "https://shop.example"), Ok(root));
        for url in ["", "/a", "shop.example/a", "ftp://shop.example/a", "http:///a"] {
            assert_eq!(of_url(&settings, url), Err(BadUrl::NotAbsolute), "{url}");
        }
        assert_eq!(of_url(&settings, "http://shop.example/a b"), Err(BadUrl::NotAscii));
    }

    #[test]
    fn tags_are_separated_by_white_space_or_commas() {
        let settings = Settings::default();
        let request = request(Scheme::Http, "a", "/");
        let mut response = Fields::default();
        response.push(b"Surrogate-Key", b"one  two\tone");
        response.push(b"surrogate-key", b",three, ,four ");
        let tags = of(&settings, Some("surrogate-key"), &request, &response);
        let mut named: Vec<Tag> = ["one", "two", "three", "four"].map(|name| Tag::named(name.as_bytes())).into();
        named.sort_unstable();
        assert_eq!((tags[0], &tags[1..]), (address(&settings, &request), &named[..]));
        assert_eq!(of(&settings, None, &request, &response).len(), 1);
    }
}
