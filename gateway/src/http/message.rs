//! The heads of requests and answers as the rest of the gateway sees them, whatever engine read them.
//!
//! A `Request` is filled in place and reused, so its parts are plain buffers. A head in here is well-formed:
//! `http::h1` and `http::h2` refuse anything else before it gets this type.

pub use http::{Method, StatusCode};

use std::cell::RefCell;
use std::rc::Rc;

use super::fields::Fields;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
    Http2,
}

impl Version {
    /// As written in `Via` (RFC 9110 section 7.6.3).
    pub fn via(self) -> &'static str {
        match self {
            Version::Http10 => "1.0",
            Version::Http11 => "1.1",
            Version::Http2 => "2.0",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

/// How many body bytes follow a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// None at all.
    Empty,
    /// Exactly this many.
    Known(u64),
    /// Unknown until the end: chunked, or HTTP/2 data frames.
    Streamed,
    /// An answer that ends with its connection (HTTP/1.0 style).
    UntilClose,
}

/// What a request asks of its connection (RFC 9112 section 9.3, RFC 9110 section 10.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    pub keep_alive: bool,
    pub expects_continue: bool,
}

/// A request head. What was read into it stays as it is but for its fields, until the next one is read.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub scheme: Scheme,
    /// Host and port in lower case, from `Host`, `:authority` or the absolute target; empty only for HTTP/1.0.
    pub authority: String,
    /// Path and query as sent; `*` for `OPTIONS *`.
    pub target: String,
    /// Length of the path inside `target`.
    pub path_len: usize,
    pub version: Version,
    pub fields: Fields,
    pub length: Length,
    /// Nothing where its connection carries more than one at a time.
    pub wishes: Wishes,
    /// Whether it was sent in the same words as the last one that was read into this place.
    pub repeats: bool,
    /// Where interim answers to it go while it is under way; every clone of the request has the same place.
    pub interim: Interim,
}

/// Interim (1xx) answers of an upstream on their way to the client (RFC 9110 section 15.2).
#[derive(Clone, Debug, Default)]
pub struct Interim(Rc<RefCell<Vec<Response>>>);

impl Interim {
    pub fn push(&self, response: Response) {
        self.0.borrow_mut().push(response);
    }

    pub(super) fn clear(&self) {
        self.0.borrow_mut().clear();
    }

    /// The oldest that nobody has taken.
    pub fn take(&self) -> Option<Response> {
        let mut waiting = self.0.borrow_mut();
        if waiting.is_empty() { None } else { Some(waiting.remove(0)) }
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
            version: Version::Http11,
            fields: Fields::default(),
            length: Length::Empty,
            wishes: Wishes::default(),
            repeats: false,
            interim: Interim::default(),
        }
    }
}

impl Request {
    /// Empties the head and keeps its buffers.
    pub fn clear(&mut self) {
        self.authority.clear();
        self.target.clear();
        self.path_len = 0;
        self.fields.clear();
        self.length = Length::Empty;
        self.wishes = Wishes::default();
        self.repeats = false;
        self.interim.clear();
    }

    pub fn path(&self) -> &str {
        &self.target[..self.path_len]
    }

    /// Without the question mark; `None` where there is no question mark.
    pub fn query(&self) -> Option<&str> {
        self.target.get(self.path_len + 1..)
    }

    /// The authority without its port.
    pub fn host(&self) -> &str {
        match memchr::memrchr(b':', self.authority.as_bytes()) {
            Some(colon) if !self.authority[colon..].contains(']') => &self.authority[..colon],
            _ => &self.authority,
        }
    }

    /// Sets path and query and finds the path's end.
    pub fn set_target(&mut self, target: &str) {
        self.target.clear();
        self.target.push_str(target);
        self.path_len = memchr::memchr(b'?', target.as_bytes()).unwrap_or(target.len());
    }
}

/// An answer's head.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: StatusCode,
    pub fields: Fields,
    pub length: Length,
}

impl Default for Response {
    fn default() -> Self {
        Response::new(StatusCode::OK)
    }
}

impl Response {
    pub fn new(status: StatusCode) -> Self {
        Response { status, fields: Fields::default(), length: Length::Empty }
    }
}

/// Whether an answer to `method` with `status` has no body whatever its fields say (RFC 9112 section 6.3).
pub fn is_bodiless(method: &Method, status: StatusCode) -> bool {
    *method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
}
