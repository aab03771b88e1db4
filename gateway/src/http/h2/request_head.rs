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
use crate::http::websocket;

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
    previous: NormalAuthority,
}

/// An authority as it was received, and in its normal form: most requests of a connection have the
/// same one.
#[derive(Default)]
struct NormalAuthority {
    received: Vec<u8>,
    normal: String,
}

const METHOD: u8 = 1;
const SCHEME: u8 = 2;
const AUTHORITY: u8 = 4;
const PATH: u8 = 8;
const PROTOCOL: u8 = 16;

/// Bytes of a scheme that are kept: more than `https` has.
const SCHEME_MAX: usize = 8;
/// Bytes of a head whose buffers are kept for the next one.
const KEPT_MAX: usize = 8 << 10;

/// A head that was read: what is not part of the `Request`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HeadDetails {
    pub(super) priority: Option<Priority>,
    pub(super) bytes: usize,
}

impl HeadReader {
    pub(super) fn begin(&mut self, request: &mut Request) {
        request.clear();
        request.version = HttpVersion::Http2;
        if self.bytes > KEPT_MAX {
            *self = HeadReader::default();
        }
        let HeadReader { scheme, authority, path, protocol, cookie, .. } = self;
        for buffer in [scheme, authority, path, protocol, cookie] {
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
        if is_pseudo && self.bytes > limits.header_bytes {
            self.keep_beginning(name, value);
        }
        if is_pseudo && name == b":method" && value.len() > limits.uri_bytes {
            // As over HTTP/1.1.
            self.refuse(RequestRefusal::RequestLine);
        }
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
            // A known name may be written with capital letters, or CR for a hyphen.
            Some(known) if known.as_str().as_bytes() != name => return self.refuse(RequestRefusal::FieldSyntax),
            Some(KnownField::Cookie) => {
                if std::mem::replace(&mut self.has_cookie, true) {
                    self.cookie.extend_from_slice(b"; ");
                }
                return self.cookie.extend_from_slice(value);
            }
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

    /// Keeps the beginning of a target that is too long for the head, for the access log.
    #[cold]
    fn keep_beginning(&mut self, name: &[u8], value: &[u8]) {
        if name == b":path" && self.path.is_empty() {
            self.path.extend_from_slice(&value[..value.len().min(head::REFUSED_TARGET_MAX)]);
        }
    }

    fn receive_pseudo(&mut self, name: &[u8], value: &[u8]) {
        let (bit, buffer) = match name {
            b":method" => {
                match Method::from_bytes(value) {
                    Ok(method) => self.method = Some(method),
                    Err(_) => {
                        // For the access log.
                        self.method = Method::from_bytes(b"-").ok();
                        self.refuse(RequestRefusal::RequestLine);
                    }
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
            // A scheme is part of no limit. A longer one is none that is served.
            let kept = if bit == SCHEME { value.len().min(SCHEME_MAX) } else { value.len() };
            buffer.extend_from_slice(&value[..kept]);
        }
        self.seen |= bit;
    }

    fn refuse(&mut self, refusal: RequestRefusal) {
        self.malformed.get_or_insert(refusal);
    }

    /// Completes the head. `has_ended`: no body follows. After a refusal of the head, `request` is
    /// its description.
    pub(super) fn finish(
        &mut self,
        has_ended: bool,
        limits: &HttpLimits,
        request: &mut Request,
    ) -> Result<HeadDetails, HeadRefusal> {
        let completed = self.complete(has_ended, limits, request);
        if completed.as_ref().is_err_and(|refused| !refused.refusal.is_of_body()) {
            // A method that was taken is in `request`, except that of an extended CONNECT.
            let taken = if self.seen & PROTOCOL != 0 { Method::CONNECT } else { request.method.clone() };
            let method = self.method.take().unwrap_or(taken);
            let method = if self.seen & METHOD != 0 { method.as_str().as_bytes() } else { b"" };
            head::describe_refused(request, method, &self.path);
            request.version = HttpVersion::Http2;
        }
        completed
    }

    fn complete(
        &mut self,
        has_ended: bool,
        limits: &HttpLimits,
        request: &mut Request,
    ) -> Result<HeadDetails, HeadRefusal> {
        let details = HeadDetails { priority: self.priority, bytes: self.bytes };
        let malformed = |refusal| Err(HeadRefusal { refusal, is_malformed: true });
        if self.malformed == Some(RequestRefusal::RequestLine) {
            return malformed(RequestRefusal::RequestLine);
        }
        if self.is_target_too_long {
            return Err(RequestRefusal::TargetTooLong.into());
        }
        if self.bytes > limits.header_bytes {
            return Err(RequestRefusal::HeadTooLarge.into());
        }
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
        let has_protocol = self.seen & PROTOCOL != 0;
        // Only an extended CONNECT has a protocol, and only it has a target (RFC 8441 section 4).
        let is_malformed = match method == Method::CONNECT {
            true => !has_protocol && self.seen & (SCHEME | PATH) != 0,
            false => has_protocol,
        };
        if is_malformed {
            return malformed(RequestRefusal::FieldSyntax);
        }
        request.method = method;
        if has_protocol {
            self.begin_switch(request)?;
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
        request.connection = ConnectionOptions {
            keep_alive: true,
            expects_continue: head::expects_continue(request)? && request.length != BodyLength::Empty,
        };
        Ok(details)
    }

    /// Makes an extended CONNECT the request to which it corresponds in HTTP/1.1: a GET that offers
    /// to switch to the protocol (RFC 8441 section 5).
    fn begin_switch(&self, request: &mut Request) -> Result<(), HeadRefusal> {
        if !self.protocol.eq_ignore_ascii_case(websocket::PROTOCOL.as_bytes()) {
            return Err(RequestRefusal::Protocol.into());
        }
        request.method = Method::GET;
        request.upgrade = Some(websocket::PROTOCOL.as_bytes().into());
        let of_gateway = [websocket::KEY, websocket::ACCEPT];
        request.fields.retain(|field| !of_gateway.iter().any(|name| field.name == name.as_bytes()));
        Ok(())
    }

    /// Sets the authority from the pseudo field or from `Host`, which must not contradict each
    /// other (RFC 9113 section 8.3.1).
    fn set_authority(&mut self, request: &mut Request) -> Result<(), HeadRefusal> {
        let mut authority = std::mem::take(&mut request.authority);
        let mut hosts = request.fields.all(KnownField::Host);
        let (host, second) = (hosts.next(), hosts.next());
        if second.is_some() {
            return Err(RequestRefusal::RepeatedHost.into());
        }
        let pseudo = (self.seen & AUTHORITY != 0).then_some(&*self.authority);
        let Some(given) = pseudo.or(host) else { return Err(RequestRefusal::NoHost.into()) };
        let text = |bytes| str::from_utf8(bytes).map_err(|_| RequestRefusal::BadHost);
        let NormalAuthority { received, normal } = &mut self.previous;
        if !given.is_empty() && *received == given {
            authority.clear();
            authority.push_str(normal);
        } else {
            head::set_authority(text(given)?, &mut authority)?;
            received.clear();
            received.extend_from_slice(given);
            normal.clone_from(&authority);
        }
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
            // The bytes after the head are those of the other protocol.
            BodyLength::Empty if request.upgrade.is_some() => {}
            _ if request.upgrade.is_some() => {
                return Err(HeadRefusal { refusal: RequestRefusal::BadLength, is_malformed: true });
            }
            BodyLength::Known(1..) if has_ended => {
                return Err(HeadRefusal { refusal: RequestRefusal::BadLength, is_malformed: true });
            }
            BodyLength::Empty if !has_ended && !request.fields.has(KnownField::ContentLength) => {
                request.length = BodyLength::Streamed;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a request whose stream has not ended may still have no body: it announces none, and its
/// method has no use for one. The next frame then tells.
pub(crate) fn may_be_bodiless(request: &Request) -> bool {
    request.length == BodyLength::Streamed && matches!(request.method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Makes `request` the description of a head that was not read to its end.
#[cold]
pub(crate) fn describe_unread(request: &mut Request) {
    head::describe_refused(request, b"", b"");
    request.version = HttpVersion::Http2;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::hpack_decode::HpackDecoder;
    use super::*;
    use crate::http::fields::is_token;

    /// A field section of literals, some of them malformed.
    fn section() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![
            Just(":method"),
            Just(":path"),
            Just(":scheme"),
            Just(":authority"),
            Just(":protocol"),
            Just("cookie"),
            Just("host"),
            Just("te"),
            Just("X-A"),
            Just("x-a"),
            Just("content-length"),
            Just("connection"),
            Just("x\"a"),
            Just(""),
        ];
        let value = prop_oneof![
            Just("GET".to_owned()),
            Just("/a".to_owned()),
            Just("https".to_owned()),
            Just("a.test".to_owned()),
            Just("websocket".to_owned()),
            Just("5".to_owned()),
            "[ -~\t\r\n\u{e9}]{0,12}",
        ];
        let literal = (name, value).prop_map(|(name, value)| {
            let lengths = [name.len(), value.len()].map(|length| u8::try_from(length).expect("short"));
            [&[0, lengths[0]], name.as_bytes(), &[lengths[1]], value.as_bytes()].concat()
        });
        let start = b"\x82\x87\x84\x01\x06a.test".to_vec();
        let valid =
            prop::collection::vec(literal.clone(), 0..4).prop_map(move |rest| [start.clone(), rest.concat()].concat());
        prop_oneof![valid, prop::collection::vec(literal, 0..8).prop_map(|all| all.concat()), any::<Vec<u8>>()]
    }

    proptest! {
        #[test]
        fn accepted_heads_are_well_formed(section in section(), has_ended: bool) {
            let (mut reader, mut request) = (HeadReader::default(), Request::default());
            let limits = HttpLimits::default();
            reader.begin(&mut request);
            let decoded = HpackDecoder::new().decode(&section, |field| reader.receive(field, &limits, &mut request));
            if decoded.is_ok() && reader.finish(has_ended, &limits, &mut request).is_ok() {
                prop_assert!(request.target.starts_with('/') || request.target == "*");
                prop_assert!(!request.authority.is_empty());
                for field in request.fields.iter() {
                    prop_assert!(is_token(field.name) && !field.name.iter().any(u8::is_ascii_uppercase));
                    prop_assert!(is_value(field.value));
                    prop_assert!(!matches!(field.name, b"connection" | b"transfer-encoding" | b"upgrade"));
                }
            }
        }
    }
}
