//! Reads the decoded fields of a request into a `Request`, or finds the reason why it is refused
//! (RFC 9113 sections 8.2 and 8.3). The checks that do not depend on the protocol are those of
//! `head`, as for HTTP/1.1.

use super::hpack_table::HpackField;
use super::priority::Priority;
use crate::http::fields::KnownField;
use crate::http::fields::KnownFieldSet;
use crate::http::head;
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, ConnectionOptions, HttpVersion, Method, Request};
use crate::http::refusal::RequestRefusal;

/// Most of the fields of one connection, which HTTP/2 does not have (RFC 9113 section 8.2.2).
const CONNECTION_FIELDS: KnownFieldSet =
    KnownFieldSet::of(&[KnownField::Connection, KnownField::TransferEncoding, KnownField::Upgrade]);

const NAME_BYTE: u8 = 1;
const VALUE_BYTE: u8 = 2;

/// The bytes of names, which are in lower case, and of values.
const CLASS: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let is_value = byte == b'\t' as usize || (byte >= 0x20 && byte != 0x7f);
        let is_name = matches!(byte as u8, b'a'..=b'z' | b'0'..=b'9' | b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*')
            || matches!(byte as u8, b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~');
        table[byte] = if is_value { VALUE_BYTE } else { 0 } | if is_name { NAME_BYTE } else { 0 };
        byte += 1;
    }
    table
};

/// Whether a name is a token in lower case.
pub(super) fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|byte| CLASS[usize::from(*byte)] & NAME_BYTE != 0)
}

/// Whether a value has no control characters, and no white space at its ends.
pub(super) fn is_value(value: &[u8]) -> bool {
    let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    value.iter().all(|byte| CLASS[usize::from(*byte)] & VALUE_BYTE != 0)
        && !is_space(value.first())
        && !is_space(value.last())
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadRefusal {
    pub(crate) refusal: RequestRefusal,
    /// The head is malformed in the sense of RFC 9113 section 8.1.1: the stream is reset after the
    /// response.
    pub(crate) is_malformed: bool,
}

impl From<RequestRefusal> for HeadRefusal {
    fn from(refusal: RequestRefusal) -> Self {
        HeadRefusal { refusal, is_malformed: false }
    }
}

/// Collects one head. Its buffers are reused for the next one.
#[derive(Default)]
pub(super) struct HeadReader {
    method: Option<Method>,
    scheme: Vec<u8>,
    authority: Vec<u8>,
    path: Vec<u8>,
    protocol: Vec<u8>,
    cookie: Vec<u8>,
    priority: Option<Priority>,
    /// Bit by pseudo field.
    seen: u8,
    has_fields: bool,
    has_cookie: bool,
    is_target_too_long: bool,
    /// Bytes of the head, as they would be in HTTP/1.1.
    bytes: usize,
    malformed: Option<RequestRefusal>,
}

const METHOD: u8 = 1;
const SCHEME: u8 = 2;
const AUTHORITY: u8 = 4;
const PATH: u8 = 8;
const PROTOCOL: u8 = 16;

/// A head that was read: what is not part of the `Request`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HeadDetails {
    pub(super) priority: Option<Priority>,
    /// The request opens a tunnel (RFC 8441).
    pub(crate) is_tunnel: bool,
    pub(crate) bytes: usize,
}

impl HeadReader {
    pub(super) fn begin(&mut self, request: &mut Request) {
        request.clear();
        request.version = HttpVersion::Http2;
        for buffer in [&mut self.scheme, &mut self.authority, &mut self.path, &mut self.protocol, &mut self.cookie] {
            buffer.clear();
        }
        (self.method, self.priority, self.seen, self.malformed) = (None, None, 0, None);
        (self.has_fields, self.has_cookie, self.is_target_too_long) = (false, false, false);
        // The empty line.
        self.bytes = 2;
    }

    /// Takes one field. Those beyond `limits` are counted and not kept.
    pub(super) fn receive(&mut self, field: HpackField<'_>, limits: &HttpLimits, request: &mut Request) {
        let HpackField { known, name, value } = field;
        let is_pseudo = name.first() == Some(&b':');
        // The bytes of the line in HTTP/1.1: of the request line, of `Host`, or of the field.
        self.bytes += match name {
            b":method" => value.len() + 1,
            b":scheme" => 0,
            b":path" => value.len() + 11,
            b":authority" => value.len() + 8,
            name => name.len() + value.len() + 4,
        };
        self.is_target_too_long |= is_pseudo && name == b":path" && value.len() > limits.uri_bytes;
        if self.bytes > limits.header_bytes {
            return;
        }
        if is_pseudo {
            return self.receive_pseudo(name, value);
        }
        self.has_fields = true;
        if !(known.is_some() || is_name(name)) || !is_value(value) || name.is_empty() {
            return self.refuse(RequestRefusal::FieldSyntax);
        }
        match known {
            Some(KnownField::Cookie) => {
                if std::mem::replace(&mut self.has_cookie, true) {
                    self.cookie.extend_from_slice(b"; ");
                }
                return self.cookie.extend_from_slice(value);
            }
            // A known name may be written with capital letters.
            Some(known) if known.as_str().as_bytes() != name => return self.refuse(RequestRefusal::FieldSyntax),
            Some(known) if CONNECTION_FIELDS.contains(known) || matches!(name, b"keep-alive" | b"proxy-connection") => {
                return self.refuse(RequestRefusal::FieldSyntax);
            }
            Some(KnownField::Te) if !value.eq_ignore_ascii_case(b"trailers") => {
                return self.refuse(RequestRefusal::FieldSyntax);
            }
            None if name == b"priority" => self.priority = Some(Priority::parse(value)),
            _ => {}
        }
        if request.fields.len() <= limits.header_fields {
            request.fields.push_known(known, name, value);
        }
    }

    fn receive_pseudo(&mut self, name: &[u8], value: &[u8]) {
        let (bit, buffer) = match name {
            b":method" => {
                match Method::from_bytes(value) {
                    Ok(method) => self.method = Some(method),
                    Err(_) => self.refuse(RequestRefusal::RequestLine),
                }
                (METHOD, None)
            }
            b":scheme" => (SCHEME, Some(&mut self.scheme)),
            b":authority" => (AUTHORITY, Some(&mut self.authority)),
            b":path" => (PATH, Some(&mut self.path)),
            b":protocol" => (PROTOCOL, Some(&mut self.protocol)),
            _ => return self.refuse(RequestRefusal::FieldSyntax),
        };
        if self.has_fields || self.seen & bit != 0 {
            return self.refuse(RequestRefusal::FieldSyntax);
        }
        if let Some(buffer) = buffer {
            buffer.extend_from_slice(value);
        }
        self.seen |= bit;
    }

    fn refuse(&mut self, refusal: RequestRefusal) {
        self.malformed.get_or_insert(refusal);
    }

    /// Completes the head. `has_ended`: no body follows.
    pub(super) fn finish(
        &mut self,
        has_ended: bool,
        limits: &HttpLimits,
        request: &mut Request,
    ) -> Result<HeadDetails, HeadRefusal> {
        let mut details =
            HeadDetails { priority: self.priority, is_tunnel: self.seen & PROTOCOL != 0, bytes: self.bytes };
        if self.is_target_too_long {
            return Err(RequestRefusal::TargetTooLong.into());
        }
        if self.bytes > limits.header_bytes {
            return Err(RequestRefusal::HeadTooLarge.into());
        }
        let malformed = |refusal| Err(HeadRefusal { refusal, is_malformed: true });
        if let Some(refusal) = self.malformed {
            return malformed(refusal);
        }
        if self.has_cookie {
            request.fields.add(KnownField::Cookie, &self.cookie);
        }
        // The authority counts as the field that it is in HTTP/1.1.
        let fields = request.fields.len() + usize::from(self.seen & AUTHORITY != 0);
        if fields > limits.header_fields {
            return Err(RequestRefusal::TooManyFields.into());
        }
        let Some(method) = self.method.take() else { return malformed(RequestRefusal::RequestLine) };
        let is_connect = method == Method::CONNECT;
        if details.is_tunnel {
            if !is_connect || self.seen & AUTHORITY == 0 {
                return malformed(RequestRefusal::FieldSyntax);
            }
            if !self.protocol.eq_ignore_ascii_case(b"websocket") {
                return Err(RequestRefusal::Protocol.into());
            }
            // The origin gets the HTTP/1.1 form of the same (RFC 8441 section 5).
            request.method = Method::GET;
        } else {
            request.method = method;
            if is_connect && self.seen & (SCHEME | PATH) != 0 {
                return malformed(RequestRefusal::FieldSyntax);
            }
        }
        head::check_method(&request.method)?;
        if self.seen & SCHEME == 0 || self.seen & PATH == 0 || self.path.is_empty() {
            return malformed(RequestRefusal::Target);
        }
        if !self.scheme.eq_ignore_ascii_case(b"http") && !self.scheme.eq_ignore_ascii_case(b"https") {
            return Err(RequestRefusal::Target.into());
        }
        let target = str::from_utf8(&self.path).map_err(|_| RequestRefusal::Target)?;
        head::set_target(target, limits, request)?;
        self.set_authority(request)?;
        self.set_length(has_ended, limits, request)?;
        if details.is_tunnel {
            request.upgrade = Some(Box::from(&b"websocket"[..]));
            request.length = BodyLength::Empty;
        }
        request.connection = ConnectionOptions {
            keep_alive: true,
            expects_continue: head::expects_continue(request)? && request.length != BodyLength::Empty,
        };
        details.bytes = self.bytes;
        Ok(details)
    }

    /// Sets the authority from the pseudo field or from `Host`, which must not contradict each
    /// other (RFC 9113 section 8.3.1).
    fn set_authority(&self, request: &mut Request) -> Result<(), HeadRefusal> {
        let mut authority = std::mem::take(&mut request.authority);
        let mut hosts = request.fields.all(KnownField::Host);
        let (host, second) = (hosts.next(), hosts.next());
        if second.is_some() {
            return Err(RequestRefusal::RepeatedHost.into());
        }
        let pseudo = (self.seen & AUTHORITY != 0).then_some(&*self.authority);
        let Some(given) = pseudo.or(host) else { return Err(RequestRefusal::NoHost.into()) };
        let text = |bytes| str::from_utf8(bytes).map_err(|_| RequestRefusal::BadHost);
        head::set_authority(text(given)?, &mut authority)?;
        if let Some(host) = host
            && pseudo.is_some_and(|pseudo| pseudo != host)
        {
            let mut from_host = String::new();
            head::set_authority(text(host)?, &mut from_host)?;
            if from_host != authority {
                return Err(RequestRefusal::HostMismatch.into());
            }
        }
        request.authority = authority;
        Ok(())
    }

    /// The end of the stream tells whether there is a body; an announced length must agree (RFC
    /// 9113 section 8.1.1).
    fn set_length(&self, has_ended: bool, limits: &HttpLimits, request: &mut Request) -> Result<(), HeadRefusal> {
        head::set_length(limits, request)?;
        match request.length {
            BodyLength::Known(1..) if has_ended && !self.is_tunnel() => {
                return Err(HeadRefusal { refusal: RequestRefusal::BadLength, is_malformed: true });
            }
            BodyLength::Empty if !has_ended && !request.fields.has(KnownField::ContentLength) => {
                request.length = BodyLength::Streamed;
            }
            _ => {}
        }
        Ok(())
    }

    fn is_tunnel(&self) -> bool {
        self.seen & PROTOCOL != 0
    }
}

/// Whether a request whose stream has not ended may still have no body: it announces none, and its
/// method has no use for one. The next frame then tells.
pub(crate) fn may_be_bodiless(request: &Request) -> bool {
    request.length == BodyLength::Streamed && matches!(request.method, Method::GET | Method::HEAD | Method::OPTIONS)
}
