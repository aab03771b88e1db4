//! Request and response heads, independent of the protocol engine that parsed them.
//!
//! A `Request` is filled in place and reused, so its parts are plain buffers. A head of these types
//! is well-formed: `http::h1` and `http::h2` refuse anything else.

pub(crate) use http::Method;
pub use http::StatusCode;

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::buffer::ReadSize;
use super::compressed_forms::CompressedForms;
use super::fields::{Fields, KnownField};

/// Protocol version of a received request; determines framing, persistence and the value in `Via`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpVersion {
    Http10,
    Http11,
    Http2,
}

impl HttpVersion {
    /// The version as written in `Via` (RFC 9110 section 7.6.3).
    pub(crate) fn via(self) -> &'static str {
        match self {
            HttpVersion::Http10 => "1.0",
            HttpVersion::Http11 => "1.1",
            HttpVersion::Http2 => "2.0",
        }
    }
}

/// The HTTP version that a head names, for the access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum NamedVersion {
    /// That of the request.
    #[default]
    Parsed,
    /// Another one, `D.D`, in a head that was refused.
    Other([u8; 3]),
    /// A refused head names none.
    None,
}

impl NamedVersion {
    /// Reads `HTTP/D.D` (RFC 9112 section 2.3).
    pub(crate) fn of(text: &[u8]) -> Self {
        match text {
            [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
                NamedVersion::Other([*major, b'.', *minor])
            }
            _ => NamedVersion::None,
        }
    }

    /// Empty without a version. `parsed`: that of the request.
    pub(crate) fn text(&self, parsed: HttpVersion) -> &str {
        match self {
            NamedVersion::Parsed => parsed.via(),
            NamedVersion::Other(text) => std::str::from_utf8(text).unwrap_or_default(),
            NamedVersion::None => "",
        }
    }
}

/// URI scheme of a request; part of the cache key, and determines the default port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

/// How many body bytes follow a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    /// None at all.
    Empty,
    /// Exactly this many.
    Known(u64),
    /// Unknown until the end: chunked, or HTTP/2 data frames.
    Streamed,
    /// A response body that ends when its connection closes (HTTP/1.0 style).
    UntilClose,
}

/// Whether a request keeps its connection open and expects `100 Continue` (RFC 9112 section 9.3,
/// RFC 9110 section 10.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionOptions {
    pub(crate) keep_alive: bool,
    pub(crate) expects_continue: bool,
}

/// A request head: method, target, fields, and the length of the body. After parsing, only its
/// fields are modified, until the next head is parsed into it.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub scheme: Scheme,
    /// Host and port in lower case, from `Host`, `:authority` or the absolute target; empty only
    /// for HTTP/1.0.
    pub authority: String,
    /// Path and query in their normal form (see `target`); `*` for `OPTIONS *`.
    pub target: String,
    /// Length of the path inside `target`.
    pub path_len: usize,
    /// The path as received, where it differs from its normal form. Only an origin whose route asks
    /// for it gets this path (`routes.forward_path`).
    pub received_path: Option<Box<str>>,
    /// Whether the authority is that of a target in absolute form, and `Host` named another one.
    pub ignores_host: bool,
    pub version: HttpVersion,
    pub fields: Fields,
    pub length: BodyLength,
    /// Default on a connection that multiplexes requests (HTTP/2).
    pub connection: ConnectionOptions,
    /// Whether the head is byte-identical to the previous one that was parsed into this value.
    pub repeats_previous: bool,
    /// The number of the field section that this head was read from (HTTP/2); `None`: it is not
    /// known, and the next head is not compared with it.
    pub section_number: Option<u64>,
    /// The protocols to which the client offers to switch (`Upgrade`), joined by commas; `None`
    /// without an offer that can be forwarded.
    pub upgrade: Option<Box<[u8]>>,
    /// Whether the client has declared that it accepts trailers (RFC 9110 section 6.5.1).
    pub accepts_trailers: bool,
    /// The request as a trusted proxy received it. `None` from other peers, and without such
    /// fields.
    pub forwarded: Option<Box<TrustedForwarding>>,
    /// Whether the credentials of the request were accepted by the gateway, and removed if the
    /// origin does not get them.
    pub is_authenticated: bool,
    /// The changes that the route makes for the origin; `None` without any.
    pub origin_edits: Option<Rc<OriginEdits>>,
    /// A number for the route, where requests with one cache key can have several routes: responses
    /// of one are not for another. Part of the cache key.
    pub key_route: Option<u64>,
    /// Whether the canary of the route gets the request.
    pub is_canary: bool,
    /// How much of the response is read before the client takes it.
    pub read_size: ReadSize,
    /// Interim responses received while the request is in progress. They belong to the exchange: a
    /// clone of the request discards its own.
    pub interim: InterimResponses,
}

/// The changes of a route in a request for the origin. Route, limits and cache key use the request
/// as it was received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OriginEdits {
    /// The path in place of the public one.
    pub path: Option<String>,
    /// The value of `Host` in place of the public authority.
    pub host: Option<String>,
    /// Names in lower case.
    pub removed: Vec<String>,
    /// Fields that replace those of the request.
    pub set: Vec<(String, Vec<u8>)>,
    /// Lines that are added.
    pub added: Vec<(String, Vec<u8>)>,
}

impl OriginEdits {
    /// The fields as the origin gets them; `None` if they are those of the request.
    pub(crate) fn edited(&self, fields: &Fields) -> Option<Fields> {
        let OriginEdits { removed, set, added, .. } = self;
        if removed.is_empty() && set.is_empty() && added.is_empty() {
            return None;
        }
        let mut edited = fields.clone();
        let is_replaced = |name: &[u8]| {
            removed
                .iter()
                .chain(set.iter().map(|(name, _)| name))
                .any(|other| name.eq_ignore_ascii_case(other.as_bytes()))
        };
        edited.retain(|field| !is_replaced(field.name));
        set.iter().chain(added).for_each(|(name, value)| edited.push(name.as_bytes(), value));
        Some(edited)
    }
}

/// The request as a trusted proxy received it, according to its forwarding fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedForwarding {
    /// The addresses before the peer, client first, in the format of `X-Forwarded-For`. Can be
    /// empty.
    pub forwarded_for: String,
    pub proto: Option<Vec<u8>>,
    pub host: Option<Vec<u8>>,
}

/// Queue of interim (1xx) responses of one exchange, from the upstream to the client (RFC 9110
/// section 15.2).
///
/// A clone has no queue and discards what is pushed: requests are cloned for fetches that other
/// clients share or no client awaits. A fetch of the same exchange gets the queue by `share`. A
/// response for which the queue has no room is discarded: a client can do without it. The upstream
/// connection bounds the number of interim responses of one exchange.
#[derive(Debug)]
pub struct InterimResponses(Option<Rc<RefCell<Vec<Response>>>>);

/// Bytes of interim responses above which the queue of an exchange takes no further ones: as many
/// as one response head may have. The client's connection empties the queue after each step of the
/// upstream's.
const INTERIM_QUEUE_BYTES_MAX: usize = 64 << 10;

impl Default for InterimResponses {
    fn default() -> Self {
        InterimResponses(Some(Rc::default()))
    }
}

impl Clone for InterimResponses {
    fn clone(&self) -> Self {
        InterimResponses(None)
    }
}

impl InterimResponses {
    /// The queue itself, for a part of the same exchange.
    pub(crate) fn share(&self) -> Self {
        InterimResponses(self.0.clone())
    }

    /// Appends a response, if there is room. A client waits for 100 Continue, which comes once.
    pub(crate) fn push(&self, response: Response) {
        let Some(queue) = &self.0 else { return };
        let mut queue = queue.borrow_mut();
        let bytes: usize = queue.iter().map(|queued| size_of::<Response>() + queued.fields.heap_bytes()).sum();
        if bytes < INTERIM_QUEUE_BYTES_MAX || response.status == StatusCode::CONTINUE {
            queue.push(response);
        }
    }

    /// Empties the queue for the next exchange. A part of the previous one that still holds the
    /// queue keeps it.
    pub(super) fn clear(&mut self) {
        match &self.0 {
            Some(queue) if Rc::strong_count(queue) == 1 => queue.borrow_mut().clear(),
            _ => *self = InterimResponses::default(),
        }
    }

    /// Removes and returns the oldest queued response.
    pub(crate) fn take(&self) -> Option<Response> {
        let mut queue = self.0.as_ref()?.borrow_mut();
        if queue.is_empty() { None } else { Some(queue.remove(0)) }
    }
}

impl Default for Request {
    fn default() -> Self {
        Request {
            method: Method::GET,
            scheme: Scheme::Http,
            authority: String::new(),
            target: String::new(),
            path_len: 0,
            received_path: None,
            ignores_host: false,
            version: HttpVersion::Http11,
            fields: Fields::default(),
            length: BodyLength::Empty,
            connection: ConnectionOptions::default(),
            repeats_previous: false,
            section_number: None,
            upgrade: None,
            accepts_trailers: false,
            forwarded: None,
            is_authenticated: false,
            origin_edits: None,
            key_route: None,
            is_canary: false,
            read_size: ReadSize::Normal,
            interim: InterimResponses::default(),
        }
    }
}

impl Request {
    /// Clears the head and keeps its buffers.
    pub(crate) fn clear(&mut self) {
        self.authority.clear();
        self.target.clear();
        self.path_len = 0;
        self.received_path = None;
        self.ignores_host = false;
        self.fields.clear();
        self.length = BodyLength::Empty;
        self.connection = ConnectionOptions::default();
        self.repeats_previous = false;
        self.section_number = None;
        self.upgrade = None;
        self.accepts_trailers = false;
        self.forwarded = None;
        self.is_authenticated = false;
        self.origin_edits = None;
        self.key_route = None;
        self.is_canary = false;
        self.read_size = ReadSize::Normal;
        self.interim.clear();
    }

    /// Makes the head the one that was read into this value, as it was received; false if it cannot
    /// be restored.
    pub(super) fn repeat(&mut self) -> bool {
        self.repeats_previous = self.fields.restore_received();
        self.read_size = ReadSize::Normal;
        self.interim.clear();
        self.repeats_previous
    }

    /// Whether the request has credentials: a shared cache stores a response to it only with the
    /// origin's permission (RFC 9111 section 3.5).
    pub(crate) fn is_authorized(&self) -> bool {
        self.is_authenticated || self.fields.has(KnownField::Authorization)
    }

    pub fn path(&self) -> &str {
        &self.target[..self.path_len]
    }

    /// Appends path and query as the origin gets them.
    pub(super) fn push_origin_target(&self, out: &mut Vec<u8>) {
        let edits = self.origin_edits.as_deref();
        match edits.and_then(|edits| edits.path.as_deref()).or(self.received_path.as_deref()) {
            None => out.extend_from_slice(self.target.as_bytes()),
            Some(path) => {
                out.extend_from_slice(path.as_bytes());
                out.extend_from_slice(&self.target.as_bytes()[self.path_len..]);
            }
        }
    }

    /// The authority as the origin gets it.
    pub(super) fn origin_authority(&self) -> &str {
        self.origin_edits.as_deref().and_then(|edits| edits.host.as_deref()).unwrap_or(&self.authority)
    }

    /// The fields as the origin gets them.
    pub(super) fn origin_fields(&self) -> Cow<'_, Fields> {
        let edited = self.origin_edits.as_deref().and_then(|edits| edits.edited(&self.fields));
        edited.map_or(Cow::Borrowed(&self.fields), Cow::Owned)
    }

    /// The query without its question mark; `None` without one.
    pub(crate) fn query(&self) -> Option<&str> {
        self.target.get(self.path_len + 1..)
    }

    /// The authority without its port.
    pub(crate) fn host(&self) -> &str {
        match memchr::memrchr(b':', self.authority.as_bytes()) {
            Some(colon) if !self.authority[colon..].contains(']') => &self.authority[..colon],
            _ => &self.authority,
        }
    }

    /// Sets path and query, and the length of the path.
    pub fn set_target(&mut self, target: &str) {
        self.target.clear();
        self.target.push_str(target);
        self.path_len = memchr::memchr(b'?', target.as_bytes()).unwrap_or(target.len());
    }
}

/// A response head: status, fields, and the length of the body.
#[derive(Clone, Debug)]
pub struct Response {
    /// The version that it was received with.
    pub version: HttpVersion,
    pub status: StatusCode,
    pub fields: Fields,
    pub length: BodyLength,
    /// The compressed forms of its complete body, where its route compresses.
    pub(crate) forms: Option<Arc<CompressedForms>>,
}

impl Default for Response {
    fn default() -> Self {
        Response::new(StatusCode::OK)
    }
}

impl Response {
    pub fn new(status: StatusCode) -> Self {
        Response {
            version: HttpVersion::Http11,
            status,
            fields: Fields::default(),
            length: BodyLength::Empty,
            forms: None,
        }
    }
}

/// Whether a response to `method` with `status` has no body regardless of its fields (RFC 9112
/// section 6.3).
pub(crate) fn is_bodiless(method: &Method, status: StatusCode) -> bool {
    *method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn early_hints() -> Response {
        Response::new(StatusCode::EARLY_HINTS)
    }

    #[test]
    fn interim_responses_of_a_clone_are_discarded() {
        let request = Request::default();
        let clone = request.clone();
        clone.interim.push(early_hints());
        assert!(request.interim.take().is_none() && clone.interim.take().is_none());
    }

    #[test]
    fn next_request_gets_no_interim_responses_of_the_previous_one() {
        let mut request = Request::default();
        let shared = request.interim.share();
        shared.push(early_hints());
        assert!(request.interim.take().is_some());
        request.clear();
        shared.push(early_hints());
        assert!(request.interim.take().is_none());
    }
}
