//! The responses that are compressed, and what changes in their fields.

use crate::http::compressed_forms::ContentCoding;
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, Request, Response, StatusCode};
use crate::metrics::Label as _;

/// Compression of a route (`routes.compress`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CompressConfig {
    /// In the order of preference; not empty.
    pub(crate) codings: Vec<ContentCoding>,
    /// Types that are compressed.
    pub(crate) types: Vec<TypePattern>,
    /// A shorter body is sent as it is.
    pub(crate) min_bytes: u64,
    /// Whether unshared responses to requests with credentials are compressed too.
    pub(crate) credentials: bool,
}

/// A media type in lower case: `text/html`, or `text/*`, or `*+json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TypePattern {
    Exact(String),
    /// Stored as `text/`.
    Prefix(String),
    /// Stored as `+json`.
    Suffix(String),
}

impl TypePattern {
    /// The pattern as it is written in the configuration.
    pub(crate) fn source(&self) -> String {
        match self {
            TypePattern::Exact(name) => name.clone(),
            TypePattern::Prefix(prefix) => format!("{prefix}*"),
            TypePattern::Suffix(suffix) => format!("*{suffix}"),
        }
    }

    fn matches(&self, media_type: &str) -> bool {
        let (end, len) = match self {
            TypePattern::Exact(own) => return media_type.eq_ignore_ascii_case(own),
            TypePattern::Prefix(prefix) => (media_type.get(..prefix.len()), prefix),
            TypePattern::Suffix(suffix) => {
                (media_type.len().checked_sub(suffix.len()).and_then(|at| media_type.get(at..)), suffix)
            }
        };
        end.is_some_and(|end| end.eq_ignore_ascii_case(len))
    }
}

impl Default for CompressConfig {
    fn default() -> Self {
        let exact = [
            "application/javascript",
            "application/json",
            "application/manifest+json",
            "application/rss+xml",
            "application/wasm",
            "application/x-javascript",
            "application/x-ndjson",
            "application/xml",
            "font/otf",
            "font/ttf",
            "image/bmp",
            "image/svg+xml",
            "image/x-icon",
        ];
        let mut types = vec![TypePattern::Prefix("text/".to_owned())];
        types.extend(exact.map(|name| TypePattern::Exact(name.to_owned())));
        types.extend(["+json", "+xml"].map(|suffix| TypePattern::Suffix(suffix.to_owned())));
        CompressConfig {
            codings: vec![ContentCoding::Zstd, ContentCoding::Brotli, ContentCoding::Gzip],
            types,
            min_bytes: 1 << 10,
            credentials: false,
        }
    }
}

impl CompressConfig {
    /// Whether clients of this response get it in different codings, by its head alone.
    pub(crate) fn applies_to(&self, response: &Response) -> bool {
        let fields = &response.fields;
        let has_content = match response.length {
            BodyLength::Empty => false,
            BodyLength::Known(length) => length >= self.min_bytes.max(1),
            BodyLength::Streamed | BodyLength::UntilClose => true,
        };
        let status = response.status;
        let is_whole = status.as_u16() >= 200 && status != StatusCode::PARTIAL_CONTENT;
        let media_type = fields.get(KnownField::ContentType).and_then(|value| std::str::from_utf8(value).ok());
        let media_type = media_type.map(|value| value.split(';').next().unwrap_or_default().trim());
        let is_encoded = fields.has(KnownField::ContentEncoding);
        let may_transform =
            || !fields.members(KnownField::CacheControl).any(|member| member.eq_ignore_ascii_case(b"no-transform"));
        has_content
            && is_whole
            && !is_encoded
            && media_type.is_some_and(|media_type| self.types.iter().any(|pattern| pattern.matches(media_type)))
            && may_transform()
    }

    /// Whether a response that is not shared may carry a secret.
    pub(crate) fn may_carry_secret(request: &Request, response: &Response) -> bool {
        request.is_authorized() || request.fields.has(KnownField::Cookie) || response.fields.has(KnownField::SetCookie)
    }
}

/// Tells caches that the response depends on `Accept-Encoding`.
pub(crate) fn mark_variant(fields: &mut Fields) {
    let names = |member: &[u8]| member == b"*" || member.eq_ignore_ascii_case(b"accept-encoding");
    if !fields.members(KnownField::Vary).any(names) {
        fields.add(KnownField::Vary, "Accept-Encoding");
    }
}

/// Makes the head that of a body in `coding`, whose length is `None` while it is unknown.
pub(crate) fn write_coding(coding: ContentCoding, length: Option<u64>, response: &mut Response) {
    response.fields.add(KnownField::ContentEncoding, coding.as_str());
    response.fields.remove(KnownField::AcceptRanges);
    let digests = |name: &[u8]| {
        [&b"content-md5"[..], b"digest", b"content-digest", b"repr-digest"]
            .iter()
            .any(|digest| name.eq_ignore_ascii_case(digest))
    };
    response.fields.retain(|field| !digests(field.name));
    weaken_validator(&mut response.fields);
    response.length = length.map_or(BodyLength::Streamed, BodyLength::Known);
}

/// Makes a strong `ETag` weak: the body is another one than the origin named (RFC 9110 section
/// 8.8.1).
pub(crate) fn weaken_validator(fields: &mut Fields) {
    if let Some(tag) = fields.get(KnownField::ETag).filter(|tag| !tag.starts_with(b"W/")) {
        let weak = [b"W/", tag].concat();
        fields.set(KnownField::ETag, weak);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    fn response(length: BodyLength, lines: &[(&str, &str)]) -> Response {
        Response { fields: fields(lines), length, ..Response::new(StatusCode::OK) }
    }

    #[test]
    fn type_size_and_head_decide() {
        let config = CompressConfig::default();
        let applies = |length, lines: &[(&str, &str)]| config.applies_to(&response(length, lines));
        let long = BodyLength::Known(2_000);
        for media_type in [
            "text/html; charset=utf-8",
            "TEXT/plain",
            "application/json",
            "application/problem+json",
            "image/svg+xml",
            "application/atom+XML",
            "text/event-stream",
        ] {
            assert!(applies(long, &[("Content-Type", media_type)]), "{media_type}");
            assert!(applies(BodyLength::Streamed, &[("Content-Type", media_type)]), "{media_type}");
        }
        for media_type in ["image/png", "application/jsonx", "application/grpc", "text", "", "video/mp4", "\u{e9}+jso"]
        {
            assert!(!applies(long, &[("Content-Type", media_type)]), "{media_type}");
        }
        let json = ("Content-Type", "application/json");
        assert!(!applies(long, &[]) && !applies(BodyLength::Known(1_000), &[json]));
        assert!(!applies(BodyLength::Empty, &[json]));
        assert!(!applies(long, &[json, ("Content-Encoding", "br")]));
        assert!(!applies(long, &[json, ("Cache-Control", "max-age=1, No-Transform")]));
        let partial = Response { status: StatusCode::PARTIAL_CONTENT, ..response(long, &[json]) };
        assert!(!config.applies_to(&partial));
    }

    #[test]
    fn head_of_a_coded_body_has_no_facts_of_the_plain_one() {
        let mut coded = response(
            BodyLength::Known(9),
            &[("ETag", "\"a\""), ("Accept-Ranges", "bytes"), ("Content-MD5", "x"), ("Repr-Digest", "y"), ("A", "b")],
        );
        write_coding(ContentCoding::Brotli, Some(5), &mut coded);
        mark_variant(&mut coded.fields);
        mark_variant(&mut coded.fields);
        let lines: Vec<_> =
            coded.fields.iter().map(|field| [field.name, b": ", field.value].concat()).map(String::from_utf8).collect();
        let lines: Vec<String> = lines.into_iter().map(|line| line.expect("ASCII").to_ascii_lowercase()).collect();
        let mut sorted: Vec<&str> = lines.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        assert_eq!(sorted, ["a: b", "content-encoding: br", "etag: w/\"a\"", "vary: accept-encoding"]);
        assert_eq!(coded.length, BodyLength::Known(5));
    }
}
