//! The responses that are compressed, and what changes in their fields.

use crate::cache::extent::Extent;
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
    /// Whether the response is compressed for clients that accept it, by its head alone.
    pub(crate) fn applies_to(&self, response: &Response) -> bool {
        let status = response.status;
        let is_whole = status.as_u16() >= 200 && status != StatusCode::PARTIAL_CONTENT;
        let length = match response.length {
            BodyLength::Empty => Some(0),
            BodyLength::Known(length) => Some(length),
            BodyLength::Streamed | BodyLength::UntilClose => None,
        };
        is_whole && self.is_long_enough(length) && self.is_compressible(&response.fields)
    }

    /// Whether clients of this URI get its content in different codings: all responses then name
    /// `Accept-Encoding` in `Vary` (RFC 9110 section 12.5.5). A 206 is sent as it is, but the
    /// response to the same request without `Range`, or to one with another `Accept-Encoding`,
    /// may be compressed. A 304 has no fields of its content any more: of one that the gateway
    /// makes, the caller knows them.
    pub(crate) fn is_one_of_several(&self, response: &Response) -> bool {
        match response.status {
            StatusCode::NOT_MODIFIED => true,
            StatusCode::PARTIAL_CONTENT => {
                // That of several ranges has the types of its parts in its body. Without them,
                // `Vary` is also on those of a type that is never compressed: correct, although
                // caches then keep more copies.
                let total = Extent::from_content_range(response).map(|extent| extent.total);
                let is_of_several = media_type(&response.fields).is_some_and(|own| {
                    own.get(..MULTIPART.len()).is_some_and(|start| start.eq_ignore_ascii_case(MULTIPART))
                });
                self.is_long_enough(total)
                    && (self.is_compressible(&response.fields)
                        || is_of_several && !response.fields.has(KnownField::ContentEncoding))
            }
            _ => self.applies_to(response),
        }
    }

    /// `length`: of the complete content, `None` while it is unknown.
    fn is_long_enough(&self, length: Option<u64>) -> bool {
        length.is_none_or(|length| length >= self.min_bytes.max(1))
    }

    fn is_compressible(&self, fields: &Fields) -> bool {
        let forbids = |member: &[u8]| member.eq_ignore_ascii_case(b"no-transform");
        let is_of_type = |own: &str| self.types.iter().any(|pattern| pattern.matches(own));
        !fields.has(KnownField::ContentEncoding)
            && media_type(fields).is_some_and(is_of_type)
            && !fields.members(KnownField::CacheControl).any(forbids)
    }

    /// Whether a response that is not shared may carry a secret.
    pub(crate) fn may_carry_secret(request: &Request, response: &Response) -> bool {
        request.is_authorized() || request.fields.has(KnownField::Cookie) || response.fields.has(KnownField::SetCookie)
    }
}

/// The type of a 206 with several ranges.
const MULTIPART: &str = "multipart/byteranges";

/// The media type of the content, without its parameters.
fn media_type(fields: &Fields) -> Option<&str> {
    let value = std::str::from_utf8(fields.get(KnownField::ContentType)?).ok()?;
    Some(value.split(';').next().unwrap_or_default().trim())
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
    describe_form(&mut response.fields);
    response.length = length.map_or(BodyLength::Streamed, BodyLength::Known);
}

/// Removes what is true of the origin's body and not of a compressed one: ranges and digests. Makes
/// its validator weak.
pub(crate) fn describe_form(fields: &mut Fields) {
    fields.remove(KnownField::AcceptRanges);
    let digests = |name: &[u8]| {
        [&b"content-md5"[..], b"digest", b"content-digest", b"repr-digest"]
            .iter()
            .any(|digest| name.eq_ignore_ascii_case(digest))
    };
    fields.retain(|field| !digests(field.name));
    weaken_validator(fields);
}

/// Makes a strong `ETag` weak: the body is another one than the origin named (RFC 9110 section
/// 8.8.1).
fn weaken_validator(fields: &mut Fields) {
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
